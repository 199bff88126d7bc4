"""Worker processes that read samples or call functions, with errors in one sentence."""

import concurrent.futures.thread
import contextlib
import io
import multiprocessing
import signal
import traceback

import cv2
import torch
from torch.utils.data import DataLoader, default_collate, get_worker_info

from ..common.command import STOP_SIGNALS
from ..common.errors import UserError, first_line
from ..common.limits import MORE_SHARED_MEMORY, available_cores, shared_memory
from ..common.progress import progress
from .processes import share_items

MOST_WORKERS = 32       # largest default: each worker needs memory, and disks hardly serve more

# PyTorch's handler of these raises an error if a worker has ended.
CHILD_SIGNALS = [signal.SIGCHLD] if hasattr(signal, "SIGCHLD") else []      # Windows has none


class Loader(DataLoader):
    """A `DataLoader` that raises `UserError` if worker processes cannot be started or lack shared memory.

    It has its own random generator, so that loading does not change other random numbers.

    Args:
        dataset: whose items are plain values, or dicts with tensors as values.
        batch_size: items per batch; None for single items that are not collated.
        workers: number of worker processes; 0 to load in this process.
        prefetch: largest number of batches that each worker loads in advance.
        options: other arguments of `DataLoader`.
    """

    def __init__(self, dataset, batch_size=None, *, workers=0, prefetch=2, **options):
        collate = SharedMemoryCollate(batch_size is not None, workers * prefetch)
        super().__init__(dataset, batch_size, num_workers=workers, prefetch_factor=prefetch if workers else None,
                         collate_fn=collate, worker_init_fn=init_worker, generator=torch.Generator(), **options)

    def __iter__(self):
        others = multiprocessing.active_children()
        try:
            with _blocked(STOP_SIGNALS):        # a forked worker has this process's handlers until `init_worker`
                iterator = super().__iter__()
        except (OSError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "start new thread" not in str(error):
                raise
            # PyTorch would wait up to 30 seconds for each worker that was started, and its handler of SIGCHLD raises an
            # error. Its iterator is incomplete, and prints an error when it is deleted.
            with _blocked(CHILD_SIGNALS), contextlib.redirect_stderr(io.StringIO()):
                for worker in set(multiprocessing.active_children()).difference(others):
                    worker.kill()
                traceback.clear_frames(error.__traceback__)
            memory = shared_memory()
            raise UserError(f"--num-workers {self.num_workers}: expected to start this many worker processes, "
                            f"found: {first_line(error)}{memory and f' ({memory})'}; {MORE_SHARED_MEMORY}") from None
        return _end_workers_on_error(iterator)


@contextlib.contextmanager
def _blocked(signals):
    """Let signals wait until the context ends, and in processes that are forked in it until they unblock them."""
    if not hasattr(signal, "pthread_sigmask"):      # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_workers_on_error(iterator):
    """Iterate, and delete the iterator when a worker sends an error.

    The error of a worker refers to itself and to the iterator. If the garbage collector deleted the iterator later, it
    could no longer tell the workers to end, and would wait for them forever.
    """
    try:
        yield from iterator
    except Exception as error:
        traceback.clear_frames(error.__traceback__)
        del iterator
        raise


def load_items(dataset, workers, processes, description, pin_memory=False):
    """Iterate over this process's share of a data set, and show the progress.

    Args:
        dataset: of images, with `read_first_image`.
        workers: processes that read images.
        processes: `Processes` that share the data set, or None.
        description: of the work, for the progress line.
        pin_memory: whether to use pinned memory, from which copies to a GPU need not be waited for.
    """
    if workers:
        dataset.read_first_image()
    return progress(Loader(share_items(dataset, processes), workers=workers, pin_memory=pin_memory), description,
                    "image")


class SharedMemoryCollate:
    """Collates samples and moves their tensors to shared memory, so that a lack of it is reported as an error.

    PyTorch would move single samples in a thread of the worker, which prints an error and skips the sample, and the
    parent process would wait for it forever.

    Args:
        collate: whether samples are collated to a batch.
        batches: largest number of batches that wait for the parent process.
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
            raise UserError(f"shared memory: expected room for the samples that worker processes read, {size:.1f} MB "
                            f"for each batch and {self.batches * size:.1f} MB for the {self.batches} that may wait, "
                            f"found {shared_memory() or first_line(error)}; {MORE_SHARED_MEMORY}") from None


def _tensors(item):
    return [value for value in item.values() if torch.is_tensor(value)] if isinstance(item, dict) else []


def init_worker(worker):
    """Initialize a worker process of a `Loader`: the parent handles signals, and OpenCV uses no threads."""
    _leave_signals_to_the_parent()
    # A worker started in a thread of an executor (asyncio.to_thread) would fail at its end, when it joins that thread.
    concurrent.futures.thread._threads_queues.clear()
    if hasattr(signal, "SIGBUS"):       # sent without shared memory; the parent reports it, not PyTorch's handler here
        signal.signal(signal.SIGBUS, signal.SIG_DFL)
    disable_opencv_threads()


def _leave_signals_to_the_parent():
    """Ignore the signals that ask a run to stop.

    Terminals and supervisors send them to workers too, but the parent needs their samples to finish its step. SIGTERM,
    with which the parent may end them itself, takes effect after 30 seconds.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, lambda *_: signal.setitimer(signal.ITIMER_REAL, 30.0))
    if hasattr(signal, "pthread_sigmask"):      # blocked since the fork
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def disable_opencv_threads():
    """Turn off the threads of OpenCV, as there is a worker process for each core."""
    cv2.setNumThreads(0)


class Jobs(torch.utils.data.Dataset):
    """A data set that calls a function for each argument in a list, for use in a `Loader`."""

    def __init__(self, function, arguments):
        self.function, self.arguments = function, arguments

    def __len__(self):
        return len(self.arguments)

    def __getitem__(self, number):
        return self.function(self.arguments[number])


def do_jobs(function, arguments, workers):
    """Call a function for each argument in worker processes.

    Args:
        function: of one argument.
        arguments: list of arguments.
        workers: number of worker processes; None for one per core that this process may use, at most `MOST_WORKERS`; 0
            to call the function in this process.

    Returns:
        A `Loader` that yields the results in order.
    """
    if workers is None:
        workers = min(available_cores(), MOST_WORKERS)
    return Loader(Jobs(function, arguments), workers=workers)
