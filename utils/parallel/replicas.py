"""Replicas of a module in threads of one process, for `--parallel dp`.

By default each GPU has a process of its own, as threads of one process cannot run Python code at the same time.
"""

import functools
import threading

import torch
from torch import nn


class ReplicaStopped(RuntimeError):
    """Another replica has failed or ended, so that this one cannot continue."""


class ReplicaGroup:
    """Threads that run the same code on parts of a batch and exchange values.

    Args:
        size: number of threads.
    """

    def __init__(self, size):
        self.size = size
        self.changed = threading.Condition()
        self.values, self.arrived, self.round, self.result = [None] * size, 0, 0, None
        self.name = None        # of the value that is being exchanged
        self.stopped = None     # reason why no more values can be exchanged

    def exchange(self, rank, value, name):
        """Exchange a value with all replicas.

        Args:
            rank: of this replica.
            value: of this replica.
            name: must be the same in all replicas; a different name shows that they run different code.

        Returns:
            The values of all replicas, in order of rank.

        Raises:
            ReplicaStopped: if another replica has ended.
            RuntimeError: if the names differ.
        """
        with self.changed:
            if self.stopped:
                raise ReplicaStopped(self.stopped)
            if self.arrived and name != self.name:
                raise RuntimeError(f"replica {rank}: expected to exchange {self.name}, as the others do, found {name}")
            self.name = name
            self.values[rank] = value
            self.arrived += 1
            if self.arrived == self.size:
                self.result, self.values, self.arrived = self.values, [None] * self.size, 0
                self.round += 1
                self.changed.notify_all()
                return self.result
            this_round = self.round
            while self.round == this_round and not self.stopped:
                self.changed.wait()
            if self.round == this_round:
                raise ReplicaStopped(self.stopped)
            return self.result      # the next round cannot end before this replica joins it

    def leave(self, rank, failed):
        """Mark a replica as ended, so that `exchange` of the others raises `ReplicaStopped`."""
        with self.changed:
            self.stopped = self.stopped or f"replica {rank} {'failed' if failed else 'ended'} before the others"
            self.changed.notify_all()


class Replicas:
    """The threads of a `ReplicaGroup`, each with a part of the batch.

    Args:
        group: `ReplicaGroup`.
        rank: of this thread.
    """

    def __init__(self, group, rank):
        self.group, self.rank, self.size = group, rank, group.size

    def gather(self, tensor):
        """Gather a tensor of the same shape from each replica, without gradients: a list in order of rank."""
        return [other.to(tensor.device) for other in self.share(tensor.detach())]

    def share(self, tensor):
        """Gather like `gather`, but keep the tensors on their devices and in the autograd graph."""
        # Dtype and shape tell the statistics and tokens of different norms and the losses of OHEM apart.
        name = f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
        return self.group.exchange(self.rank, tensor, name)


_thread = threading.local()


def current_replica():
    """Return (group, rank) of the calling thread if `run_replicas` started it, else None."""
    return getattr(_thread, "replica", None)


def run_replicas(functions, devices=None):
    """Call functions in parallel, each in a thread.

    The threads are replicas of one group (`current_replica`), with the caller's grad mode and autocast. The first
    error ends all threads and is raised.

    Args:
        functions: without arguments.
        devices: CUDA device of each thread, or None.

    Returns:
        The results of the functions, in order.
    """
    group = ReplicaGroup(len(functions))
    results, errors = [None] * len(functions), []
    grad = torch.is_grad_enabled()
    kind = devices[0].type if devices else "cpu"
    autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))

    def work(rank):
        _thread.replica = (group, rank)
        failed = True
        try:
            with (torch.set_grad_enabled(grad), torch.autocast(*autocast),
                  torch.cuda.device(devices[rank] if devices else -1)):
                results[rank] = functions[rank]()
            failed = False
        except BaseException as error:  # noqa: BLE001, raised again in the caller's thread
            errors.append(error)
        finally:
            _thread.replica = None
            group.leave(rank, failed)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise next((error for error in errors if not isinstance(error, ReplicaStopped)), errors[0])
    return results


class DataParallel(nn.DataParallel):
    """`nn.DataParallel` whose replicas can exchange batch statistics."""

    def parallel_apply(self, replicas, inputs, kwargs):
        devices = [torch.device("cuda", index) for index in self.device_ids[:len(replicas)]]
        return run_replicas([functools.partial(replica, *args, **named) for replica, args, named
                             in zip(replicas, inputs, kwargs, strict=True)], devices)


class ThreadReplicas(nn.Module):
    """`DataParallel` on a single device: threads process parts of the batch with shared parameters.

    Args:
        module: called with tensors; returns a tensor, or a dict, list or tuple of tensors.
        size: number of replicas. The sizes of their parts differ by one at most, as with `torch.tensor_split`.
    """

    def __init__(self, module, size):
        super().__init__()
        self.module, self.size = module, size

    def forward(self, *tensors):
        """Call the module on parts of tensors (B, ...), and join the outputs along their first dimension."""
        parts = zip(*(tensor.tensor_split(self.size) for tensor in tensors), strict=True)
        return _join(run_replicas([functools.partial(self.module, *part) for part in parts]))


def _join(outputs):
    first = outputs[0]
    if isinstance(first, dict):
        return {key: _join([output[key] for output in outputs]) for key in first}
    if isinstance(first, list | tuple):
        return type(first)(_join(list(parts)) for parts in zip(*outputs, strict=True))
    return torch.cat(outputs)
