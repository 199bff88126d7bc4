"""Full-precision operations within autocast of PyTorch or apex."""

import threading
from contextlib import contextmanager, nullcontext

import torch


class _ApexCasting(threading.local):
    """Whether apex casts in this thread. Its patches of PyTorch functions apply to the whole process."""

    active = False


apex_casting = _ApexCasting()


@contextmanager
def apex_casts(active=True):
    """Context in which the functions patched by apex cast in this thread (`active`) or do not."""
    before, apex_casting.active = apex_casting.active, active
    try:
        yield
    finally:
        apex_casting.active = before


def with_current_casts(function):
    """Wrap a function that autograd calls later in its own threads, so that apex casts there if it casts here now."""
    return apex_casts()(function) if apex_casting.active else function


def at_least_float32(x):
    """x, converted to float32 if it is float16 or bfloat16."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def without_autocast(x):
    """Context without autocast for the device of `x`: operations keep the dtype of their inputs."""
    if apex_casting.active:
        return apex_casts(False)
    device_type = x.device.type
    if not torch.amp.is_autocast_available(device_type):        # such as the device "meta"
        return nullcontext()
    return torch.autocast(device_type, enabled=False)
