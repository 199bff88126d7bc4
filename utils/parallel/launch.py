"""Launching the processes of a run, their ranks, and their process group."""

import logging
import math
import os
import sys
import time
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from ..common.command import give_up_after
from ..common.errors import UserError, first_line, plural
from ..common.messages import logger
from .interfaces import choose_interface, local_address
from .processes import Processes


class Ranks(NamedTuple):
    """Rank and number of processes, in the run and on this host, as torchrun sets them."""

    size: int
    rank: int
    local_size: int
    local_rank: int


def torchrun_ranks():
    """Read the `Ranks` of this process from the environment.

    Returns:
        `Ranks`; None if torchrun did not start this process.

    Raises:
        UserError: if a variable that torchrun sets is missing or invalid.
    """
    # Kubeflow sets WORLD_SIZE for a single pod, too.
    if "LOCAL_RANK" not in os.environ and os.environ.get("WORLD_SIZE", "1") == "1":
        return None
    size = _read_variable("WORLD_SIZE", 1, 1 << 20)
    rank = _read_variable("RANK", 0, size - 1)
    local_size = _read_variable("LOCAL_WORLD_SIZE", 1, size)
    local_rank = _read_variable("LOCAL_RANK", 0, local_size - 1)
    _read_variable("MASTER_PORT", 1, 65535)
    if not os.environ.get("MASTER_ADDR", "").strip():
        raise UserError("MASTER_ADDR: expected the address of the first host, as torchrun sets it, found none")
    return Ranks(size, rank, local_size, local_rank)


def _warn_about_srun_tasks():
    """Warn if srun started this command several times, as these tasks do not share their work."""
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS") or "1"
    if tasks != "1":
        logger.warning(f"warning: SLURM_STEP_NUM_TASKS {tasks}: srun started this command as {tasks} tasks; each of "
                       "them runs alone and shares no work with the others; to share it, let srun start one torchrun "
                       "per node (README.md)")


def _read_variable(name, low, high):
    """Read a whole number from `low` to `high` from an environment variable."""
    text = os.environ.get(name)
    if text is None or not text.isascii() or not text.isdigit() or len(text) > 9 or not low <= int(text) <= high:
        raise UserError(f"{name}: expected a number from {low} to {high}, as torchrun sets it, found "
                        f"{'none' if text is None else repr(text[:40])}; without WORLD_SIZE and LOCAL_RANK the "
                        "command runs alone")
    return int(text)


def started_by_torchrun():
    return torchrun_ranks() is not None


def crops_per_device(batch_size, accumulate, devices):
    """Divide a batch among devices and parts.

    Args:
        batch_size: crops per step, over all devices.
        accumulate: parts of the batch, one after the other.
        devices: of this process.

    Returns:
        Crops that each device processes at a time.

    Raises:
        UserError: if the batch cannot be divided equally.
    """
    ranks = torchrun_ranks()
    sharing = max(len(devices), 1 if ranks is None else ranks.size)
    if batch_size % (sharing * accumulate):
        parts = f" × --accumulate {accumulate}" if accumulate > 1 else ""
        raise UserError(f"--batch-size {batch_size}: expected a multiple of {sharing * accumulate} "
                        f"({plural(sharing, 'device')}{parts})")
    return batch_size // accumulate // sharing


def start_processes(count, argv=None):
    """Run this command in several processes, as torchrun does, and exit with their status. Does not return.

    If one of them fails, or a signal ends this process, the others get half a minute to end.

    Args:
        count: number of processes.
        argv: arguments of the command; None for those of this process.
    """
    from torch.distributed.elastic.multiprocessing import api
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if _is_interactive():
        raise UserError("--gpu: expected one GPU in a notebook or an interactive session, which has no script to start "
                        f"in a process per GPU, found {count}; --gpu 0 takes one, and !python train.py (or "
                        "evaluate.py) with the same flags takes all")
    _warn_about_srun_tasks()
    words = sys.argv[1:] if argv is None else argv
    # The processes report their own errors; the launcher's long report of a failure would hide them.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    # A second signal would make the launcher stop waiting for processes that are still saving.
    api._terminate_process_handler = _debounce_signals(api._terminate_process_handler)
    config = LaunchConfig(1, 1, count, run_id=str(os.getpid()), rdzv_backend="c10d", rdzv_endpoint="localhost:0",
                          max_restarts=0)
    try:
        elastic_launch(config, sys.executable)("-u", sys.argv[0], *words)
    except ChildFailedError as error:
        statuses = {failure.exitcode for failure in error.failures.values()}
        # Status 2: a process has reported an error of the user's input; the others failed because it ended.
        status = 2 if 2 in statuses else error.get_first_failure()[1].exitcode
        sys.exit(status if status > 0 else 128 - status)
    except api.SignalException as error:
        sys.exit(128 + error.sigval)    # the processes got the signal, saved a snapshot and ended
    sys.exit(0)


def _is_interactive():
    """Whether this is a notebook or an interactive Python and not a script, which IPython's %run can also start."""
    script = sys.argv[0]
    return not hasattr(sys.modules["__main__"], "__file__") and (
        "IPython" in sys.modules or script.endswith("kernel_launcher.py") or not os.path.isfile(script))


MEET_TIMEOUT = timedelta(minutes=5)     # for all processes to meet at the start
WORK_TIMEOUT = timedelta(hours=12)      # later, for what the first process does alone, such as filling a cache


def join_processes(device):
    """Join the processes that torchrun started.

    Code of gloo or NCCL that waits longer than `MEET_TIMEOUT` cannot be interrupted; then the process exits with the
    message of the error below.

    Args:
        device: of this process.

    Returns:
        `Processes`, or None if this process is alone.

    Raises:
        UserError: if the processes do not meet within `MEET_TIMEOUT`, or cannot reach each other afterward.
    """
    ranks = torchrun_ranks()
    if ranks is None:
        _warn_about_srun_tasks()
        return None
    if not dist.is_initialized():
        store = _meet(ranks)
        choose_interface(ranks, store)
        _connect(ranks, store, device)
    return Processes() if ranks.size > 1 else None


def _connect(ranks, store, device):
    """Make the process group of the run and test it; errors as in `join_processes`."""
    on_gpu = device.type == "cuda"
    seconds = MEET_TIMEOUT.total_seconds()
    expected = (f"MASTER_ADDR {os.environ['MASTER_ADDR']}: expected the {ranks.size} processes of the run, which have "
                f"met there, to reach each other within {seconds:.0f} s, found: ")
    gloo, nccl = (os.environ.get(name) or "not set" for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"))
    remedy = (f"; set GLOO_SOCKET_IFNAME (now {gloo}) and, for GPUs, NCCL_SOCKET_IFNAME (now {nccl}) on each host to "
              "its interface toward the others, and allow the connections in firewalls")
    with give_up_after(seconds, f"{expected}no answer to process {ranks.rank}{remedy}"):
        try:
            # NCCL exchanges tensors on a GPU, gloo exchanges plain objects in host memory.
            dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", store=store, rank=ranks.rank,
                                    world_size=ranks.size, timeout=WORK_TIMEOUT, device_id=device if on_gpu else None)
            _try_all_reduce(device)
        except (RuntimeError, ValueError, OSError) as error:
            raise UserError(f"{expected}{first_line(error)}{remedy}") from None


def new_group():
    """Make another group of all processes. On GPUs its collectives do not wait for those of the default group."""
    return dist.new_group(timeout=WORK_TIMEOUT)


def _try_all_reduce(device):
    """Compute a sum over all processes with gloo and, on GPUs, with NCCL, which opens some connections only then."""
    for each in dict.fromkeys((torch.device("cpu"), device)):       # the same order in all processes
        dist.all_reduce(torch.zeros(1, device=each))
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _meet(ranks):
    """Wait for all processes of the run, and return their common store."""
    try:
        store, *_ = next(rendezvous("env://", timeout=MEET_TIMEOUT))
        address = local_address(os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"])
        store.set(f"met/{ranks.rank}", address)
        store.wait([f"met/{rank}" for rank in range(ranks.size)], MEET_TIMEOUT)
    except (RuntimeError, ValueError, OSError) as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(f"MASTER_ADDR, MASTER_PORT {address}: expected the {ranks.size} processes of the run to meet "
                        f"there within {MEET_TIMEOUT.total_seconds():.0f} s, found: {first_line(error)}"
                        ) from None
    store.set_timeout(WORK_TIMEOUT)
    return store


def leave_processes():
    """Destroy the process group of `join_processes`, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _debounce_signals(handler):
    """Wrap a signal handler so that it ignores repeats for a second after a call.

    The same request to stop often arrives two or more times.
    """
    last_call = -math.inf

    def debounced(number, frame):
        nonlocal last_call
        if time.monotonic() - last_call >= 1.0:
            last_call = time.monotonic()
            handler(number, frame)
    return debounced
