"""Operations in full precision within autocast, that of PyTorch or of apex."""

import threading
from contextlib import contextmanager, nullcontext

import torch


class _ApexCasting(threading.local):
    """Whether the functions of PyTorch that apex has patched, for the whole process, cast in this thread."""

    active = False


apex_casting = _ApexCasting()


@contextmanager
def apex_casts(active=True):
    """A context in which functions that apex has patched cast in this thread, or do not."""
    before, apex_casting.active = apex_casting.active, active
    try:
        yield
    finally:
        apex_casting.active = before


def with_present_casts(function):
    """The function, for autograd's threads to call later: apex will cast in it if it does now."""
    return apex_casts()(function) if apex_casting.active else function


def at_least_float32(x):
    """x, raised to float32 if it is of half precision."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def without_autocast(x):
    """A context in which operations on the device of `x` keep their dtype."""
    if apex_casting.active:
        return apex_casts(False)
    kind = x.device.type        # the device "meta" has no autocast
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()
