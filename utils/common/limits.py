"""What the surroundings let a process use: cores and shared memory. Containers, schedulers and `taskset` often allow
less than the machine has. Needs nothing but Python itself."""

import contextlib
import math
import os
import shutil
from pathlib import Path, PurePosixPath

SHARED_MEMORY = Path("/dev/shm")        # of Linux
MORE_SHARED_MEMORY = ("docker's --shm-size and --ipc=host give a container more shared memory, --num-workers 0 needs "
                      "none")


def available_cores():
    """The cores that this process may use, by its affinity and the CPU limit of its cgroups, rounded up."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(cores, cgroup_cpu_limit())))


def cgroup_cpu_limit(root="/"):
    """The CPU limit of this process's cgroups, of version 1 or 2, in cores; infinity without one.

    Args:
        root: of the file system.
    """
    mount, limits = Path(root, "sys/fs/cgroup"), [math.inf]
    for line in text_of(Path(root, "proc/self/cgroup")).splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        # Groups around this one limit it too. A container may be told its path on the host, of which it sees only the
        # last folder, at the top.
        group = PurePosixPath("/", group)
        limits += [_cpu_limit(place / part.relative_to("/")) for part in (group, *group.parents)
                   for place in ([mount / controllers, mount / "cpu"] if controllers else [mount])]
    return min(limits)


def _cpu_limit(folder):
    """That of a cgroup's folder."""
    quota_and_period = (text_of(folder / name) for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us"))
    words = text_of(folder / "cpu.max") or " ".join(quota_and_period)
    try:
        quota, period = map(int, words.split())
    except ValueError:      # "max", or no such files
        return math.inf
    return quota / period if quota > 0 and period > 0 else math.inf


def text_of(path):
    """The text of a file of the system; "" where it cannot be read."""
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace")
    return ""


def shared_memory():
    """How much shared memory is left, in words; "" where it has no size of its own."""
    try:
        room = shutil.disk_usage(SHARED_MEMORY)
        read_only = bool(os.statvfs(SHARED_MEMORY).f_flag & os.ST_RDONLY)
    except OSError:
        return f"no {SHARED_MEMORY}" if os.name == "posix" and os.uname().sysname == "Linux" else ""
    return f"{SHARED_MEMORY} with {room.free / 1e6:.1f} of {room.total / 1e6:.1f} MB free{', read-only' * read_only}"
