"""Which devices to use."""

import torch

from .cli import UserError


def select_devices(gpu=None):
    """Parse `--gpu`: "0,1", "cpu", or None for all visible GPUs, else the CPU.

    Returns a list of `torch.device`. Raises `UserError` naming the GPUs there are.
    """
    count = torch.cuda.device_count()
    if gpu is None:
        gpu = ",".join(map(str, range(count))) or "cpu"
    if gpu == "cpu":
        return [torch.device("cpu")]
    try:
        ids = [int(part) for part in gpu.split(",")]
    except ValueError:
        raise UserError(f"--gpu: expected ids such as 0,1 or cpu, found {gpu!r}") from None
    unknown = [i for i in ids if not 0 <= i < count]
    if unknown or len(set(ids)) < len(ids):
        there = f"GPUs 0 to {count - 1}" if count else "no GPU (--gpu cpu uses the CPU)"
        raise UserError(f"--gpu {gpu}: expected different ids of GPUs that exist; this machine has {there}")
    return [torch.device("cuda", i) for i in ids]
