"""Activation checkpointing for modules with batch norms.

Chen et al., "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174. The recomputation in the backward pass
reuses the batch statistics of the forward pass: it neither updates running statistics nor exchanges statistics again.
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
        """Context of the forward pass, in which norms append their statistics."""
        return _Mode(self, replaying=False)

    def replaying(self):
        """Context of the recomputation, in which norms read their statistics."""
        return _Mode(self, replaying=True)


class _Mode:
    """Context in which norms of this thread write to a tape or read from it."""

    def __init__(self, tape, replaying):
        self.tape, self.replaying = tape, replaying

    def __enter__(self):
        self.outer = getattr(_thread, "mode", None)
        self.position = 0
        _thread.mode = self

    def __exit__(self, *error):
        _thread.mode = self.outer

    def next(self):
        self.position += 1
        return self.tape.entries[self.position - 1]


def replaying():
    """Whether this thread recomputes activations."""
    mode = getattr(_thread, "mode", None)
    return mode is not None and mode.replaying


def active():
    """Whether this thread is inside a checkpoint, in the forward pass or in the recomputation."""
    return getattr(_thread, "mode", None) is not None


def compute_once(compute):
    """Return `compute()`; in the recomputation, return what it returned at the same place in the forward pass."""
    mode = getattr(_thread, "mode", None)
    if mode is None:
        return compute()
    if mode.replaying:
        return mode.next()
    entry = compute()
    mode.tape.entries.append(entry)
    return entry


def checkpoint(function, *args):
    """Call a function of tensors; what it saves for the backward pass is freed, and recomputed when needed."""
    tape = Tape()
    return torch_checkpoint(with_current_casts(function), *args, use_reentrant=False,
                            context_fn=lambda: (tape.recording(), tape.replaying()))
