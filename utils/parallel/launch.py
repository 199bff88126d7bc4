"""Start processes, learn which of them this one is, and let them meet."""

import logging
import os
import sys
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from ..common.command import debounce_signals, give_up_after
from ..common.errors import UserError, first_line
from ..common.messages import logger
from .interfaces import choose_interface, local_address
from .processes import Processes


class Place(NamedTuple):
    """Of a process among those that torchrun started: in the whole run, and on its host."""

    size: int
    rank: int
    local_size: int
    local_rank: int


def launched():
    """The `Place` of this process; None if torchrun did not start it. Raises `UserError` where the variables that
    torchrun sets are missing or senseless."""
    if "LOCAL_RANK" not in os.environ and os.environ.get("WORLD_SIZE", "1") == "1":     # also set for a single pod
        return None
    size = _variable("WORLD_SIZE", 1, 1 << 20)
    rank = _variable("RANK", 0, size - 1)
    local_size = _variable("LOCAL_WORLD_SIZE", 1, size)
    local_rank = _variable("LOCAL_RANK", 0, local_size - 1)
    _variable("MASTER_PORT", 1, 65535)
    if not os.environ.get("MASTER_ADDR", "").strip():
        raise UserError("MASTER_ADDR: expected the address of the first host, as torchrun sets it, found none")
    return Place(size, rank, local_size, local_rank)


def _warn_of_tasks():
    """Say so where srun started this command several times, which alone does not make the tasks share their work."""
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS") or "1"
    if tasks != "1":
        logger.warning(f"warning: SLURM_STEP_NUM_TASKS {tasks}: srun started this command as {tasks} tasks; each of "
                       "them runs alone and shares no work with the others, for which srun must start one torchrun "
                       "per node (README.md)")


def _variable(name, least, most):
    found = os.environ.get(name)
    if found is None or not found.isascii() or not found.isdigit() or len(found) > 9 or not least <= int(found) <= most:
        raise UserError(f"{name}: expected a number from {least} to {most}, as torchrun sets it, found "
                        f"{'none' if found is None else repr(found[:40])}; without WORLD_SIZE and LOCAL_RANK the "
                        "command runs alone")
    return int(found)


def started_by_torchrun():
    return launched() is not None


def processes_started():
    """How many processes torchrun started, over all nodes; 1 without it."""
    place = launched()
    return 1 if place is None else place.size


def crops_at_once(batch_size, accumulate, devices):
    """Crops that each device takes at once. Raises `UserError` where devices and parts do not share them alike.

    batch_size: crops a step, over all devices; accumulate: parts of it; devices: of this process.
    """
    sharing = max(len(devices), processes_started())
    if batch_size % (sharing * accumulate):
        of = f" times {accumulate} parts of --accumulate" if accumulate > 1 else ""
        raise UserError(f"--batch-size {batch_size}: expected a multiple of the {sharing} devices{of} that share it")
    return batch_size // accumulate // sharing


def start_processes(count, argv=None):
    """Run this command in `count` processes, as torchrun would, and exit with their status. Does not return.

    When one of them ends with an error, or a signal ends this process, the others get half a minute to follow.
    """
    from torch.distributed.elastic.multiprocessing import api
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if _is_interactive():
        logger.warning("error: --gpu: expected one GPU in a notebook or an interactive session, where there is no "
                       f"script to start a process for each, found {count}; --gpu 0 takes one, and !python train.py "
                       "(or evaluate.py) with the same flags takes all")
        sys.exit(2)
    _warn_of_tasks()
    words = sys.argv[1:] if argv is None else argv
    # The processes report their own errors; the launcher's long report of a failure would hide them.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    # A second signal would make the launcher stop waiting for processes that are still saving.
    api._terminate_process_handler = debounce_signals(api._terminate_process_handler)
    config = LaunchConfig(1, 1, count, run_id=str(os.getpid()), rdzv_backend="c10d", rdzv_endpoint="localhost:0",
                          max_restarts=0)
    try:
        elastic_launch(config, sys.executable)("-u", sys.argv[0], *words)
    except ChildFailedError as error:
        found = {failure.exitcode for failure in error.failures.values()}
        # Status 2: a process found the user's input at fault, and the others failed because they lost it.
        first = 2 if 2 in found else error.get_first_failure()[1].exitcode
        sys.exit(first if first > 0 else 128 - first)
    except api.SignalException as error:
        sys.exit(128 + error.sigval)    # the processes were told, have saved and ended
    sys.exit(0)


def _is_interactive():
    """Whether a notebook or an interactive Python is at work, and not a script (also by IPython's %run)."""
    script = sys.argv[0]
    return not hasattr(sys.modules["__main__"], "__file__") and (
        "IPython" in sys.modules or script.endswith("kernel_launcher.py") or not os.path.isfile(script))


MEETING = timedelta(minutes=5)      # how long processes wait for each other at the start
WAITING = timedelta(hours=12)       # and later for what the first one does alone, such as filling a cache


def join_processes(device):
    """Join the processes that torchrun started. Returns `Processes`, or None if this one is alone.

    Raises `UserError` where they do not meet within `MEETING`, or fail to reach each other then. Code of gloo or NCCL
    that goes on waiting for longer cannot be interrupted: there the process ends with the same sentence.
    """
    place = launched()
    if place is None:
        _warn_of_tasks()
        return None
    if not dist.is_initialized():
        store = _meet(place)
        choose_interface(place, store)
        _connect(place, store, device)
    return Processes() if place.size > 1 else None


def _connect(place, store, device):
    """Make the process group of the run, and use it once. Raises `UserError`, or ends the process, as described in
    `join_processes`."""
    on_gpu = device.type == "cuda"
    seconds = MEETING.total_seconds()
    expected = (f"MASTER_ADDR {os.environ['MASTER_ADDR']}: expected the {place.size} processes of the run, which have "
                f"met there, to reach each other within {seconds:.0f} s, found: ")
    gloo, nccl = (os.environ.get(name) or "not set" for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"))
    remedy = (f"; set GLOO_SOCKET_IFNAME (now {gloo}) and, for GPUs, NCCL_SOCKET_IFNAME (now {nccl}) on each host to "
              "its interface toward the others, where no firewall may keep them apart")
    with give_up_after(seconds, f"{expected}no answer to process {place.rank}{remedy}"):
        try:
            # Tensors on a GPU go by NCCL; plain objects stay in the memory of the host.
            dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", store=store, rank=place.rank,
                                    world_size=place.size, timeout=WAITING, device_id=device if on_gpu else None)
            _exchange(device)
        except (RuntimeError, ValueError, OSError) as error:
            raise UserError(f"{expected}{first_line(error)}{remedy}") from None


def _exchange(device):
    """A sum over all processes by gloo and, with GPUs, by NCCL, some of whose connections are made only then."""
    for where in dict.fromkeys((torch.device("cpu"), device)):      # in the same order everywhere
        dist.all_reduce(torch.zeros(1, device=where))
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _meet(place):
    """The store of the run, when all of its processes have come there."""
    try:
        store, *_ = next(rendezvous("env://", timeout=MEETING))
        address = local_address(os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"])
        store.set(f"met/{place.rank}", address)
        store.wait([f"met/{rank}" for rank in range(place.size)], MEETING)
    except (RuntimeError, ValueError, OSError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(f"MASTER_ADDR, MASTER_PORT {where}: expected the {place.size} processes of the run to meet "
                        f"there within {MEETING.total_seconds():.0f} s, found: {first_line(error)}"
                        ) from None
    store.set_timeout(WAITING)
    return store


def leave_processes():
    """End what `join_processes` began, when all are done."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
