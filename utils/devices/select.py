"""Choice and preparation of the devices of a run."""

import contextlib
import os
import warnings

import torch

from ..common.errors import UserError, plural
from ..common.limits import available_cores
from ..common.messages import logger
from ..parallel.launch import torchrun_ranks
from ..parallel.processes import gather_from_ranks
from .driver import missing_kernels, unusable_gpu
from .precision import PRECISIONS, best_precision, exact_float32


def select_devices(gpu=None):
    """Choose devices by the value of `--gpu`.

    Args:
        gpu: ids such as "0,1", "cpu", or None for all visible GPUs, else the CPU. With None a GPU that cannot be used
            causes only a warning.

    Returns:
        A list of `torch.device`.

    Raises:
        UserError: if an id does not exist, or a GPU cannot be used.
    """
    with warnings.catch_warnings():     # PyTorch's own warning about an old driver
        warnings.simplefilter("ignore")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    reason = unusable_gpu() if count == 0 and gpu != "cpu" else None
    if gpu is None:
        devices = [torch.device("cuda", i) for i in range(count)]
        if count == 1:          # of several GPUs each process checks its own; this one may only start the others
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
        existing = f"GPUs 0 to {count - 1}" if count else "no GPU (--gpu cpu uses the CPU)"
        raise UserError(f"--gpu {gpu}: expected different ids of GPUs that exist; this machine has {existing}")
    devices = [torch.device("cuda", i) for i in ids]
    if len(devices) == 1:       # of several GPUs each process checks its own
        check_kernels(devices[0])
    return devices


def check_kernels(device):
    """Raise `UserError` if PyTorch has no kernels for a GPU. Creates a CUDA context. Does nothing for a CPU."""
    if device.type == "cuda" and (reason := _missing_kernels(device)):
        raise UserError(f"--gpu {device.index}: expected a GPU that can be used, found {reason} (--gpu cpu uses the "
                        "CPU)")


def _missing_kernels(device):
    with warnings.catch_warnings():     # PyTorch's own warnings about each GPU of the machine
        warnings.simplefilter("ignore")
        return missing_kernels(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device),
                             torch.cuda.get_arch_list())


def shared_precision(devices, processes):
    """Return the best precision that all devices of the run support.

    The devices may be of different kinds, and scaled gradients cannot be added to gradients without a scale.

    Args:
        devices: of this process.
        processes: `Processes`, or None.
    """
    precisions = gather_from_ranks(processes, [best_precision(device) for device in devices])
    return min(sum(precisions, []), key=PRECISIONS.index)


@contextlib.contextmanager
def cudnn_benchmark(device, enabled):
    """Set whether cuDNN tries all its algorithms when it sees a size for the first time, and restore the setting. Does
    nothing for a CPU."""
    if device.type != "cuda":
        yield
        return
    previous, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, enabled
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = previous


def prepare_device(device, channels_last, amp):
    """Configure PyTorch for training on a device, and log the defaults that are chosen.

    Args:
        device: of this process.
        channels_last: whether feature maps have their channels innermost; None for the default of the device.
        amp: value of `--amp`.

    Returns:
        Whether feature maps have their channels innermost.
    """
    on_gpu = device.type == "cuda"
    if channels_last is None:
        channels_last = on_gpu
        logger.info("--channels-last: the default on a GPU, whose convolutions are optimized for it" if on_gpu else
                    "--no-channels-last: the default on a CPU, where neither is faster for every network")
    if on_gpu:
        torch.cuda.set_device(device)               # also used by the thread that pins memory
        torch.backends.cudnn.benchmark = True       # all crops have the same size
    exact_float32(amp, device)
    return channels_last


def share_cores(devices, workers=None):
    """Divide the cores of the machine among the processes of the run on it, and this process's workers.

    Without a GPU each process computes on its share of the cores. By default the number of workers fits the share of
    the process: at most 8 per device, and at most 2 on the CPU, where they compete with the network for cores.

    Args:
        devices: of this process.
        workers: number of worker processes that read samples; None for the default.

    Returns:
        (workers, a sentence for the log).
    """
    ranks = torchrun_ranks()
    local = 1 if ranks is None else ranks.local_size
    cores = available_cores()
    share = max(1, cores // local)
    on_cpu = devices[0].type == "cpu"
    # torchrun always sets one thread, and PyTorch does not know the limit of a container.
    if on_cpu and (local > 1 or torch.get_num_threads() > share and "OMP_NUM_THREADS" not in os.environ):
        torch.set_num_threads(share)
    if workers is None:
        workers = min(2, share) if on_cpu else max(1, min(8 * len(devices), share - len(devices)))
    computing = f"{plural(torch.get_num_threads(), 'thread')} for computing and " if on_cpu else ""
    return workers, (f"{plural(cores, 'core')} for {plural(local, 'process')} here: {computing}{workers} --num-workers "
                     f"that read samples{' each' * (local > 1)}")


def writer_threads(device):
    """Number of threads that count predictions and write pictures: the process's share of the cores, at most 16; or 2
    on the CPU, where they compete with the network for cores."""
    ranks = torchrun_ranks()
    local = 1 if ranks is None else ranks.local_size
    return 2 if device.type == "cpu" else min(16, max(1, available_cores() // local))


def own_device(devices):
    """Return the device of this process, and make it the current one.

    Args:
        devices: of the machine.

    Raises:
        UserError: if there are fewer devices than processes, or PyTorch has no kernels for the device.
    """
    ranks = torchrun_ranks()
    local = 0 if ranks is None else ranks.local_rank
    if devices[0].type == "cpu":
        return devices[0]
    if local >= len(devices):
        raise UserError(f"--gpu: expected a GPU for each of the processes, found {len(devices)} for process {local}")
    check_kernels(devices[local])
    torch.cuda.set_device(devices[local])
    return devices[local]


def device_name(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
