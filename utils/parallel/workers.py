"""Processes that read samples, or do other work beside this one. They end in one sentence where they cannot go on."""

import contextlib
import io
import signal
import traceback

import cv2
import torch
from torch.utils.data import DataLoader, default_collate, get_worker_info

from ..common.command import leave_signals_to_the_parent
from ..common.errors import UserError, first_line
from ..common.limits import MORE_SHARED_MEMORY, available_cores, shared_memory

MOST_WORKERS = 32       # by default: disks hardly serve more, and each takes memory


class Loader(DataLoader):
    """A `DataLoader` that raises `UserError` where worker processes cannot be started or lack shared memory.

    Its generator is its own: what is random elsewhere does not depend on whether something was loaded.

    Args:
        dataset: whose items are plain values or dicts, with tensors as values.
        batch_size: items that are collated; None for single items, as they are.
        workers: processes; with 0 this one loads.
        prefetch: batches that each of them is ahead at most.
        options: of `DataLoader`.
    """

    def __init__(self, dataset, batch_size=None, *, workers=0, prefetch=2, **options):
        hand_over = HandOver(batch_size is not None, workers * prefetch)
        super().__init__(dataset, batch_size, num_workers=workers, prefetch_factor=prefetch if workers else None,
                         collate_fn=hand_over, worker_init_fn=start_worker, generator=torch.Generator(), **options)

    def __iter__(self):
        try:
            return _end_workers_on_error(super().__iter__())
        except (OSError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "start new thread" not in str(error):
                raise
            # PyTorch's iterator is only half made, and complains about that when it is deleted.
            with contextlib.redirect_stderr(io.StringIO()):
                traceback.clear_frames(error.__traceback__)
            memory = shared_memory()
            raise UserError(f"--num-workers {self.num_workers}: expected to start so many processes that read samples, "
                            f"found: {first_line(error)}{memory and f' ({memory})'}; {MORE_SHARED_MEMORY}") from None


def _end_workers_on_error(iterator):
    """Iterate. An error that a worker has sent holds itself, and the iterator with it, which as garbage of that kind
    could not tell the workers to end any more: it would wait for them in vain."""
    try:
        yield from iterator
    except Exception as error:
        traceback.clear_frames(error.__traceback__)
        del iterator
        raise


class HandOver:
    """Collates samples, and puts their tensors into shared memory as long as errors can be reported.

    PyTorch would leave single samples to a thread of the worker, which prints its errors and goes on without the
    sample: the parent would wait forever.

    Args:
        collate: whether samples become a batch.
        batches: that wait for the parent at most.
    """

    def __init__(self, collate, batches):
        self.collate, self.batches = collate, batches

    def __call__(self, samples):
        try:
            batch = default_collate(samples) if self.collate else samples
            if get_worker_info() is not None:
                for tensor in _tensors(batch):
                    tensor.share_memory_()
            return batch
        except RuntimeError as error:
            if "shared memory" not in str(error):
                raise
            size = sum(tensor.nbytes for sample in (samples if self.collate else [samples]) for tensor in
                       _tensors(sample)) / 1e6
            raise UserError(f"shared memory: expected room for what processes that read samples hand over, {size:.1f} "
                            f"MB for each batch and {self.batches * size:.1f} MB for the {self.batches} that may wait, "
                            f"found {shared_memory() or first_line(error)}; {MORE_SHARED_MEMORY}") from None


def _tensors(item):
    return [value for value in item.values() if torch.is_tensor(value)] if isinstance(item, dict) else []


def start_worker(worker):
    """A process of a `Loader` begins: it leaves signals to the parent, and other cores to other workers."""
    leave_signals_to_the_parent(worker)
    if hasattr(signal, "SIGBUS"):       # for want of shared memory: the parent says so, instead of PyTorch in here
        signal.signal(signal.SIGBUS, signal.SIG_DFL)
    one_thread()


def one_thread():
    """Let OpenCV use no threads of its own: there is a worker process for each core already."""
    cv2.setNumThreads(0)


class Jobs(torch.utils.data.Dataset):
    """A function over a list as a data set, so that a `Loader`'s workers call it."""

    def __init__(self, function, arguments):
        self.function, self.arguments = function, arguments

    def __len__(self):
        return len(self.arguments)

    def __getitem__(self, number):
        return self.function(self.arguments[number])


def do_jobs(function, arguments, workers):
    """What a function makes of each argument, in order, by so many worker processes: a `Loader`.

    Args:
        workers: None for one per core that this process may use, at most `MOST_WORKERS`; 0 for this process itself.
    """
    return Loader(Jobs(function, arguments), workers=default_workers() if workers is None else workers)


def default_workers():
    return min(available_cores(), MOST_WORKERS)
