"""Replicas of a module in threads of one process, which work on parts of a batch: all that `--parallel dp` needs.

Several GPUs are processes by default, since threads wait for each other's turn to run Python.
"""

import functools
import threading

import torch
from torch import nn


class ReplicaStopped(RuntimeError):
    """Another replica failed or left, so this one cannot go on."""


class ReplicaGroup:
    """Threads that run the same code on parts of a batch and exchange values along the way."""

    def __init__(self, size):
        self.size = size
        self.changed = threading.Condition()
        self.values, self.arrived, self.round, self.result = [None] * size, 0, 0, None
        self.name = self.stopped = None     # of the value exchanged; why no more can be

    def exchange(self, rank, value, name):
        """Give a value, get everybody's in order of rank.

        Raises `ReplicaStopped` if one of them cannot come, and `RuntimeError` if one comes with a value of another
        name: it is at another place of the code.
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
        """A replica has ended; those that wait for it, now or later, are told."""
        with self.changed:
            self.stopped = self.stopped or f"replica {rank} {'failed' if failed else 'ended'} before the others"
            self.changed.notify_all()


class Replicas:
    """The threads of a `ReplicaGroup`, each with a part of the batch. Values only: no gradient flows."""

    def __init__(self, group, rank):
        self.group, self.rank, self.size = group, rank, group.size

    def gather(self, tensor):
        """A tensor of the same shape from each replica → all of them, in order of rank."""
        return [other.to(tensor.device) for other in self.share(tensor.detach())]

    def share(self, tensor):
        """As `gather`, but as they are, with their place in the graph."""
        # Dtype and shape name what is given: statistics and tokens of norms with so many channels, OHEM's losses.
        name = f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
        return self.group.exchange(self.rank, tensor, name)


_thread = threading.local()


def current_replica():
    """(group, rank) of the calling thread if `run_replicas` started it, else None."""
    return getattr(_thread, "replica", None)


def run_replicas(functions, devices=None):
    """Call the functions at the same time, one a thread, and return their results in order.

    Each thread is a replica of one group (`current_replica`) and computes under the caller's grad mode and
    autocast. The first error ends all of them and is raised; none is left waiting.

    Args:
        functions: without arguments.
        devices: CUDA device of each thread, or None.
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
    """What `DataParallel` does on GPUs, on one device: parts of the batch in threads, parameters shared.

    Args:
        module: called with tensors; returns a tensor, or a dict, list or tuple of tensors.
        size: number of replicas. Parts differ by one entry at most, as `torch.tensor_split` cuts them.
    """

    def __init__(self, module, size):
        super().__init__()
        self.module, self.size = module, size

    def forward(self, *tensors):
        """Tensors (B, ...) → the outputs of all parts, joined along their first dimension."""
        parts = zip(*(tensor.tensor_split(self.size) for tensor in tensors), strict=True)
        return _join(run_replicas([functools.partial(self.module, *part) for part in parts]))


def _join(outputs):
    first = outputs[0]
    if isinstance(first, dict):
        return {key: _join([output[key] for output in outputs]) for key in first}
    if isinstance(first, list | tuple):
        return type(first)(_join(list(parts)) for parts in zip(*outputs, strict=True))
    return torch.cat(outputs)
