"""Threads that finish images while the network goes on with the next ones."""

from collections import deque
from concurrent.futures import ThreadPoolExecutor

import torch


class Threads:
    """Calls functions in threads, at most a few calls more than are running.

    An error of a call is raised by a later `call` or at the end of the context. If an error ends the context, the calls
    that have not begun are dropped.

    Args:
        count: of the threads, which start when they are needed; with one, calls run in order.
        waiting: largest number of calls that wait for a thread.
    """

    def __init__(self, count, waiting=2):
        self.executor, self.calls, self.most = ThreadPoolExecutor(count), deque(), count + waiting

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.executor.shutdown(cancel_futures=error[0] is not None)
        while self.calls and error[0] is None:
            self.calls.popleft().result()

    def call(self, function, *arguments):
        """Queue a call; wait while too many are queued, so that memory does not grow with the data set."""
        while self.calls and (len(self.calls) >= self.most or self.calls[0].done()):
            self.calls.popleft().result()
        self.calls.append(self.executor.submit(function, *arguments))


def copies_of(device):
    """Mark the copies to the host that are queued on a device so far; they must be made with `non_blocking`.

    Returns:
        A function that waits for them, in any thread.
    """
    if device.type != "cuda":
        return lambda: None
    event = torch.cuda.Event(blocking=True)     # does not keep a core busy while it waits
    event.record(torch.cuda.current_stream(device))
    return event.synchronize
