"""Choose the devices to compute on, and prepare them."""

import os
import warnings

import torch

from ..common.errors import UserError, plural
from ..common.limits import available_cores
from ..common.messages import logger
from ..parallel.launch import launched
from ..parallel.processes import gather_from_ranks
from .driver import lacks_kernels, unusable_gpu
from .precision import PRECISIONS, best_precision, exact_float32


def select_devices(gpu=None):
    """Parse `--gpu`: "0,1", "cpu", or None for all visible GPUs, else the CPU.

    Returns a list of `torch.device`. Raises `UserError` naming the GPUs there are, or why one cannot be used; if
    none is asked for, that is a warning.
    """
    with warnings.catch_warnings():     # PyTorch's own words about a driver that is too old
        warnings.simplefilter("ignore")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    reason = unusable_gpu() if count == 0 and gpu != "cpu" else None
    if gpu is None:
        devices = [torch.device("cuda", i) for i in range(count)]
        if count == 1:          # with several each process asks its own: this one perhaps only starts them
            reason = _missing_kernels(devices[0])
        if reason:
            logger.warning(f"warning: computing on the CPU, many times slower: expected a GPU, found {reason}")
        return [torch.device("cpu")] if reason or not devices else devices
    if gpu == "cpu":
        return [torch.device("cpu")]
    try:
        ids = [int(part) for part in gpu.split(",")]
    except ValueError:
        raise UserError(f"--gpu: expected ids such as 0,1 or cpu, found {gpu!r}") from None
    unknown = [i for i in ids if not 0 <= i < count]
    if unknown or len(set(ids)) < len(ids):
        if reason:
            raise UserError(f"--gpu {gpu}: expected a GPU that can be used, found {reason} (--gpu cpu uses the CPU)")
        there = f"GPUs 0 to {count - 1}" if count else "no GPU (--gpu cpu uses the CPU)"
        raise UserError(f"--gpu {gpu}: expected different ids of GPUs that exist; this machine has {there}")
    devices = [torch.device("cuda", i) for i in ids]
    if len(devices) == 1:       # as above
        check_kernels(devices[0])
    return devices


def check_kernels(device):
    """Raise `UserError` where PyTorch was not built for a GPU. That makes a CUDA context. A CPU is always fit."""
    if device.type == "cuda" and (reason := _missing_kernels(device)):
        raise UserError(f"--gpu {device.index}: expected a GPU that can be used, found {reason} (--gpu cpu uses the "
                        "CPU)")


def _missing_kernels(device):
    with warnings.catch_warnings():     # PyTorch's own words about every GPU of the machine
        warnings.simplefilter("ignore")
        return lacks_kernels(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device),
                             torch.cuda.get_arch_list())


def shared_precision(devices, processes):
    """The best precision that all devices of the run have: they may be of different kinds, and gradients of which one
    alone is scaled cannot be added up. devices: of this process; processes: `Processes`, or None."""
    found = gather_from_ranks(processes, [best_precision(device) for device in devices])
    return min(sum(found, []), key=PRECISIONS.index)


def prepare_device(device, channels_last, amp):
    """Set what a process that trains sets for its device, and say what was not asked for.

    channels_last: whether feature maps have their channels innermost; None for what suits the device. Returns it.
    """
    on_gpu = device.type == "cuda"
    if channels_last is None:
        channels_last = on_gpu
        logger.info("--channels-last: the default on a GPU, whose convolutions are made for it" if on_gpu else
                    "--no-channels-last: the default on a CPU, where it makes no difference")
    if on_gpu:
        torch.cuda.set_device(device)               # for the thread that pins memory, too
        torch.backends.cudnn.benchmark = True       # crops are of one size, for which it finds the fastest kernels
    exact_float32(amp, device)
    return channels_last


def share_cores(devices, workers=None):
    """How this process uses the cores of the machine, which it may share with others of the same run.

    Without a GPU each process computes on its share of the cores. Returns (worker processes that read samples,
    a sentence about it): as many as asked for, else what the share allows, at most 8, and on the CPU, where
    they take turns with the network, at most 2.
    """
    place = launched()
    local = 1 if place is None else place.local_size
    cores = available_cores()
    share = max(1, cores // local)
    on_cpu = devices[0].type == "cpu"
    # torchrun itself allows one thread, whatever there is; and PyTorch does not know a container's limit.
    if on_cpu and (local > 1 or torch.get_num_threads() > share and "OMP_NUM_THREADS" not in os.environ):
        torch.set_num_threads(share)
    if workers is None:
        workers = min(2, share) if on_cpu else max(1, min(8 * len(devices), share - len(devices)))
    computing = f"{plural(torch.get_num_threads(), 'thread')} for computing and " if on_cpu else ""
    return workers, (f"{plural(cores, 'core')} for {plural(local, 'process')} here: {computing}{workers} --num-workers "
                     f"that read samples{' each' * (local > 1)}")


def own_device(devices):
    """The device of this process among those of the machine, which it uses from now on.

    Raises `UserError` if there is none left for it, or PyTorch was not built for it.
    """
    place = launched()
    local = 0 if place is None else place.local_rank
    if devices[0].type == "cpu":
        return devices[0]
    if local >= len(devices):
        raise UserError(f"--gpu: expected a GPU for each of the processes, found {len(devices)} for process {local}")
    check_kernels(devices[local])
    torch.cuda.set_device(devices[local])
    return devices[local]


def device_name(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
