"""Processes that share a batch: who they are, what they exchange, and which part of the work is whose."""

import warnings

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Subset

from ..common.compat import no_buffer_sync
from ..common.messages import logger
from .replicas import DataParallel, Replicas, current_replica


class Processes:
    """The processes of a torch.distributed group, each with a part of the batch."""

    def __init__(self, group=None):
        self.group = group
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)

    def gather(self, tensor):
        """A tensor of the same shape from each process → all of them, in order of rank."""
        gathered = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(gathered, tensor.contiguous(), group=self.group)
        return gathered

    def all_reduce(self, tensor):
        """The sum of a tensor over all processes."""
        tensor = tensor.clone()
        dist.all_reduce(tensor, group=self.group)
        return tensor

    def barrier(self):
        """Until all have come here."""
        dist.barrier(self.group)

    def broadcast(self, value):
        """A plain value of the first process, for all."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def gather_objects(self, value):
        """A plain value from each process → all of them, in order of rank."""
        gathered = [None] * self.size
        dist.all_gather_object(gathered, value, group=self.group)
        return gathered


def find_peers(group=None):
    """`Replicas` or `Processes` that share a batch with the caller; None if it is alone.

    group: process group, None for the default one.
    """
    replica = current_replica()
    if replica is not None:
        return Replicas(*replica) if replica[0].size > 1 else None
    if dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1:
        return Processes(group)
    return None


def rank_and_size(processes):
    """Of this process among those of the run, `Processes` or None: (0, 1) if it is alone."""
    return (0, 1) if processes is None else (processes.rank, processes.size)


def broadcast_from_rank0(processes, make):
    """What `make()` returns in the first process, for all: a plain value. processes: `Processes`, or None."""
    if processes is None:
        return make()
    return processes.broadcast(make() if processes.rank == 0 else None)


def gather_from_ranks(processes, value):
    """The plain value of each process of the run, in order of rank. processes: `Processes`, or None for this alone."""
    return [value] if processes is None else processes.gather_objects(value)


def share_batches(module, devices, processes):
    """Wrap a module so that processes, or several devices of this one, share each batch."""
    if processes is not None:
        logger.info(f"{processes.size} processes share each batch, and the statistics of its norms")
        # Of a channels-last input the gradient of a weight of one pixel, or of one input channel, has other strides
        # than the weight, but the same order in memory: what PyTorch warns of costs nothing.
        warnings.filterwarnings("ignore", r"(?s)Grad strides do not match .*grad\.sizes\(\) = \[\d+, "
                                r"(\d+, 1, 1|1, \d+, \d+)\]", UserWarning)
        return DistributedDataParallel(module, **no_buffer_sync())
    if len(devices) > 1:
        logger.info(f"{len(devices)} GPUs share each batch, and the statistics of its norms")
        return DataParallel(module, device_ids=devices)
    return module


def share_items(dataset, processes):
    """This process's part of a data set, without padding: every item is in exactly one part."""
    rank, size = rank_and_size(processes)
    return Subset(dataset, range(rank, len(dataset), size))
