"""Which devices to use, and the processes that share a batch."""

import array
import contextlib
import ipaddress
import logging
import os
import socket
import struct
import sys
import warnings
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Subset

from .cli import UserError, deaf_for_a_second, first_words, give_up_after, plural
from .driver import lacks_kernels, unusable_gpu
from .limits import available_cores
from .precision import PRECISIONS, best_precision, exact_float32
from .replicas import DataParallel, Replicas, ThreadReplicas, current_replica, run_replicas  # noqa: F401
from .versions import keeping_buffers


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
            print(f"warning: computing on the CPU, many times slower: expected a GPU, found {reason}", file=sys.stderr)
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


class Processes:
    """The processes of a torch.distributed group, each with a part of the batch."""

    def __init__(self, group=None):
        self.group = group
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)

    def gather(self, tensor):
        """A tensor of the same shape from each process → all of them, in order of rank."""
        gathered = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(gathered, tensor.contiguous(), group=self.group)
        return gathered

    def all_reduce(self, tensor):
        """The sum of a tensor over all processes."""
        tensor = tensor.clone()
        dist.all_reduce(tensor, group=self.group)
        return tensor

    def barrier(self):
        """Until all have come here."""
        dist.barrier(self.group)

    def broadcast(self, value):
        """A plain value of the first process, for all."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def gather_objects(self, value):
        """A plain value from each process → all of them, in order of rank."""
        gathered = [None] * self.size
        dist.all_gather_object(gathered, value, group=self.group)
        return gathered


def find_peers(group=None):
    """`Replicas` or `Processes` that share a batch with the caller; None if it is alone.

    group: process group, None for the default one.
    """
    replica = current_replica()
    if replica is not None:
        return Replicas(*replica) if replica[0].size > 1 else None
    if dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1:
        return Processes(group)
    return None


def rank_and_size(processes):
    """Of this process among those of the run, `Processes` or None: (0, 1) if it is alone."""
    return (0, 1) if processes is None else (processes.rank, processes.size)


def by_the_first(processes, make):
    """What `make()` returns in the first process, for all: a plain value. processes: `Processes`, or None."""
    if processes is None:
        return make()
    return processes.broadcast(make() if processes.rank == 0 else None)


def from_all(processes, value):
    """The plain value of each process of the run, in order of rank. processes: `Processes`, or None for this alone."""
    return [value] if processes is None else processes.gather_objects(value)


def share_batches(module, devices, processes):
    """Wrap a module so that processes, or several devices of this one, share each batch."""
    if processes is not None:
        print(f"{processes.size} processes share each batch, and the statistics of its norms")
        # Of a channels-last input the gradient of a weight of one pixel, or of one input channel, has other strides
        # than the weight, but the same order in memory: what PyTorch warns of costs nothing.
        warnings.filterwarnings("ignore", r"(?s)Grad strides do not match .*grad\.sizes\(\) = \[\d+, "
                                r"(\d+, 1, 1|1, \d+, \d+)\]", UserWarning)
        return DistributedDataParallel(module, **keeping_buffers())
    if len(devices) > 1:
        print(f"{len(devices)} GPUs share each batch, and the statistics of its norms")
        return DataParallel(module, device_ids=devices)
    return module


def shared_precision(devices, processes):
    """The best precision that all devices of the run have: they may be of different kinds, and gradients of which one
    alone is scaled cannot be added up. devices: of this process; processes: `Processes`, or None."""
    found = from_all(processes, [best_precision(device) for device in devices])
    return min(sum(found, []), key=PRECISIONS.index)


def prepare_device(device, channels_last, amp):
    """Set what a process that trains sets for its device, and say what was not asked for.

    channels_last: whether feature maps have their channels innermost; None for what suits the device. Returns it.
    """
    on_gpu = device.type == "cuda"
    if channels_last is None:
        channels_last = on_gpu
        print("--channels-last: the default on a GPU, whose convolutions are made for it" if on_gpu else
              "--no-channels-last: the default on a CPU, where it makes no difference")
    if on_gpu:
        torch.cuda.set_device(device)               # for the thread that pins memory, too
        torch.backends.cudnn.benchmark = True       # crops are of one size, for which it finds the fastest kernels
    exact_float32(amp, device)
    return channels_last


def share_items(dataset, processes):
    """This process's part of a data set, without padding: every item is in exactly one part."""
    rank, size = rank_and_size(processes)
    return Subset(dataset, range(rank, len(dataset), size))


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
        print(f"warning: SLURM_STEP_NUM_TASKS {tasks}: srun started this command as {tasks} tasks; each of them runs "
              "alone and shares no work with the others, for which srun must start one torchrun per node (README.md)",
              file=sys.stderr)


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
        print(f"error: --gpu: expected one GPU in a notebook or an interactive session, where there is no script to "
              f"start a process for each, found {count}; --gpu 0 takes one, and !python train.py (or evaluate.py) with "
              "the same flags takes all", file=sys.stderr)
        sys.exit(2)
    _warn_of_tasks()
    words = sys.argv[1:] if argv is None else argv
    # The processes report their own errors; the launcher's long report of a failure would hide them.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    # A second signal would make the launcher stop waiting for processes that are still saving.
    api._terminate_process_handler = deaf_for_a_second(api._terminate_process_handler)
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
        _choose_interface(place, store)
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
              "its interface towards the others, where no firewall may keep them apart")
    with give_up_after(seconds, f"{expected}no answer to process {place.rank}{remedy}"):
        try:
            # Tensors on a GPU go by NCCL; plain objects stay in the memory of the host.
            dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", store=store, rank=place.rank,
                                    world_size=place.size, timeout=WAITING, device_id=device if on_gpu else None)
            _exchange(device)
        except (RuntimeError, ValueError, OSError) as error:
            raise UserError(f"{expected}{first_words(error)}{remedy}") from None


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
        address = _local_address(os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"])
        store.set(f"met/{place.rank}", address)
        store.wait([f"met/{rank}" for rank in range(place.size)], MEETING)
    except (RuntimeError, ValueError, OSError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(f"MASTER_ADDR, MASTER_PORT {where}: expected the {place.size} processes of the run to meet "
                        f"there within {MEETING.total_seconds():.0f} s, found: {first_words(error)}"
                        ) from None
    store.set_timeout(WAITING)
    return store


def _choose_interface(place, store):
    """Let gloo use the interface that routes to MASTER_ADDR where the processes span hosts, unless the user chose one.

    By itself gloo takes the address of the host's own name, which on Debian and Ubuntu is a loopback one.
    store: where all have met, each leaving its address.
    """
    if place.local_size == place.size or os.environ.get("GLOO_SOCKET_IFNAME"):
        return
    addresses = [store.get(f"met/{rank}").decode() for rank in range(place.size)]
    address = addresses[place.rank]
    remote = [other for other in addresses if other and not _is_loopback(other)]
    if remote and _is_loopback(address):        # MASTER_ADDR is the name of this very host
        address = _local_address(remote[0], os.environ["MASTER_PORT"])
    interface = None
    with contextlib.suppress(OSError):      # of a system that does not tell
        interface = _interface(address)
    if interface is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = interface
    if place.local_rank == 0:
        print("GLOO_SOCKET_IFNAME: not set; " + (
            f"gloo uses {interface}, which leads to the other hosts from {address}" if interface is not None else
            "which interface leads to the other hosts could not be found out, so gloo uses the address of this host's "
            "own name, by which the others may not reach it"))


def _local_address(host, port):
    """The address from which this machine would send to another, as text; "" without a route. Sends nothing."""
    with contextlib.suppress(OSError):      # also for a name that has no address
        for family, kind, protocol, _, target in socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM):
            with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as probe:
                probe.connect(target)
                return probe.getsockname()[0]
    return ""


def _is_loopback(address):
    return address != "" and ipaddress.ip_address(address).is_loopback


def _interface(address):
    """The name of the network interface that has an address; None if none has, or outside of Linux."""
    if sys.platform != "linux" or address == "":
        return None
    import fcntl

    address = ipaddress.ip_address(address)
    if address.version == 6:
        rows = [row.split() for row in Path("/proc/net/if_inet6").read_text().splitlines()]
        return next((name for number, *_, name in rows if number == address.packed.hex()), None)
    # SIOCGIFCONF of netdevice(7) fills in a `struct ifreq` of 40 bytes for each IPv4 address: a name of 16 bytes, and
    # in a `struct sockaddr_in` the address after family and port.
    entries = array.array("B", bytes(1024 * 40))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("iP", len(entries), entries.buffer_info()[0])
        filled, _ = struct.unpack("iP", fcntl.ioctl(any_socket, 0x8912, request))
    for start in range(0, filled, 40):
        name, _, packed = struct.unpack_from("16s4s4s", entries, start)
        if packed == address.packed:
            return name.rstrip(b"\0").decode()
    return None


def leave_processes():
    """End what `join_processes` began, when all are done."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
