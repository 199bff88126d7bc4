"""Processes that share a batch: communication between them, and their shares of the work."""

import warnings

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Subset

from ..common.compat import no_buffer_sync
from ..common.messages import logger
from .replicas import DataParallel, Replicas, current_replica


class Processes:
    """The processes of a torch.distributed group, each with a part of the batch.

    Args:
        group: process group; None for the default one.
    """

    def __init__(self, group=None):
        self.group = group
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)

    def gather(self, tensor):
        """Gather a tensor of the same shape from each process: a list of tensors in order of rank."""
        gathered = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(gathered, tensor.contiguous(), group=self.group)
        return gathered

    def all_reduce(self, tensor):
        """Return the sum of a tensor over all processes."""
        tensor = tensor.clone()
        dist.all_reduce(tensor, group=self.group)
        return tensor

    @torch.no_grad()
    def average(self, tensors):
        """Replace tensors by their means over all processes, with one exchange.

        Args:
            tensors: of one dtype, without gaps in memory, with the same strides in all processes, such as gradients.
        """
        values = [_in_order_of_memory(tensor) for tensor in tensors]
        means = torch.cat(values)
        dist.all_reduce(means, group=self.group)
        means /= self.size
        torch._foreach_copy_(values, means.split([len(part) for part in values]))

    @torch.no_grad()
    def copy_from_first(self, module):
        """Replace the parameters and buffers of a module by those of the first process."""
        for tensor in module.state_dict().values():
            dist.broadcast(_in_order_of_memory(tensor), src=0, group=self.group)

    def barrier(self):
        """Wait until all processes have reached this call."""
        dist.barrier(self.group)

    def broadcast(self, value):
        """Return the plain value of the first process in all processes."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def gather_objects(self, value):
        """Gather a plain value from each process: a list in order of rank."""
        gathered = [None] * self.size
        dist.all_gather_object(gathered, value, group=self.group)
        return gathered


def _in_order_of_memory(tensor):
    """View a tensor without gaps in memory, of any strides, as one of one axis."""
    return tensor.as_strided((tensor.numel(),), (1,))


def find_peers(group=None):
    """Return the `Replicas` or `Processes` that share a batch with the caller; None if it is alone.

    Args:
        group: process group; None for the default one.
    """
    replica = current_replica()
    if replica is not None:
        return Replicas(*replica) if replica[0].size > 1 else None
    if dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1:
        return Processes(group)
    return None


def rank_and_size(processes):
    """Return (rank, number of processes) of the run; processes: `Processes`, or None if this process is alone."""
    return (0, 1) if processes is None else (processes.rank, processes.size)


def broadcast_from_rank0(processes, make):
    """Call `make()` in the first process, and return its plain value in all processes.

    Args:
        processes: `Processes`, or None if this process is alone.
        make: function without arguments.
    """
    if processes is None:
        return make()
    return processes.broadcast(make() if processes.rank == 0 else None)


def gather_from_ranks(processes, value):
    """Gather a plain value from each process: a list in order of rank.

    Args:
        processes: `Processes`, or None if this process is alone.
        value: of this process.
    """
    return [value] if processes is None else processes.gather_objects(value)


def share_batches(module, devices, processes, captured=False):
    """Wrap a module so that processes, or several devices of this process, share each batch.

    Args:
        module: on the first device.
        devices: of this process.
        processes: `Processes`, or None if this process is alone.
        captured: whether the passes of each process become a CUDA graph. DistributedDataParallel would tie them to the
            stream on which it was built, and the caller averages the gradients instead.
    """
    if processes is not None:
        logger.info(f"{processes.size} processes share each batch, and the statistics of its norms")
        if captured:
            processes.copy_from_first(module)
            return module
        # With channels-last inputs the gradient of a weight with one pixel or one input channel has other strides than
        # the weight, but the same order in memory. PyTorch's warning about slow strides does not apply.
        warnings.filterwarnings("ignore", r"(?s)Grad strides do not match .*grad\.sizes\(\) = \[\d+, "
                                r"(\d+, 1, 1|1, \d+, \d+)\]", UserWarning)
        return DistributedDataParallel(module, **no_buffer_sync())
    if len(devices) > 1:
        logger.info(f"{len(devices)} GPUs share each batch, and the statistics of its norms")
        return DataParallel(module, device_ids=devices)
    return module


def share_items(dataset, processes):
    """Return this process's part of a data set; each item is in exactly one part, without padding."""
    rank, size = rank_and_size(processes)
    return Subset(dataset, range(rank, len(dataset), size))
