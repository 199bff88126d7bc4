"""Activation checkpointing for modules with batch norms.

Chen et al., "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174. What is computed again reuses
the statistics of the first time: no second update of the running ones, no second exchange.
"""

import threading

from torch.utils.checkpoint import checkpoint as torch_checkpoint

from utils.ops.autocast import with_current_casts

_thread = threading.local()


class Tape:
    """Statistics of the norms that ran inside one checkpoint, in order."""

    def __init__(self):
        self.entries = []

    def recording(self):
        return _Mode(self, replaying=False)

    def replaying(self):
        return _Mode(self, replaying=True)


class _Mode:
    """While it is entered, norms in this thread write to the tape or read from it."""

    def __init__(self, tape, replaying):
        self.tape, self.replaying, self.place = tape, replaying, 0

    def __enter__(self):
        self.before = getattr(_thread, "mode", None)
        self.place = 0
        _thread.mode = self

    def __exit__(self, *error):
        _thread.mode = self.before

    def next(self):
        self.place += 1
        return self.tape.entries[self.place - 1]


def replaying():
    """Whether this thread computes something again."""
    mode = getattr(_thread, "mode", None)
    return mode is not None and mode.replaying


def active():
    """Whether this thread is inside a checkpoint, for the first time or again."""
    return getattr(_thread, "mode", None) is not None


def remembered(compute):
    """`compute()`, or what it returned when this place was reached the first time."""
    mode = getattr(_thread, "mode", None)
    if mode is None:
        return compute()
    if mode.replaying:
        return mode.next()
    entry = compute()
    mode.tape.entries.append(entry)
    return entry


def checkpoint(function, *args):
    """Call a function of tensors; what it saves for backward is dropped and computed again when needed."""
    tape = Tape()
    return torch_checkpoint(with_current_casts(function), *args, use_reentrant=False,
                            context_fn=lambda: (tape.recording(), tape.replaying()))
