"""Cores and shared memory available to this process.

Containers, schedulers and `taskset` often allow less than the machine has. Needs only the standard library.
"""

import contextlib
import math
import os
import shutil
from pathlib import Path, PurePosixPath

SHARED_MEMORY = Path("/dev/shm")        # Linux only
MORE_SHARED_MEMORY = ("docker's --shm-size and --ipc=host give a container more shared memory, --num-workers 0 needs "
                      "none")


def available_cores():
    """Number of cores this process may use: its CPU affinity and the CPU limit of its cgroups, rounded up."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(cores, cgroup_cpu_limit())))


def cgroup_cpu_limit(root="/"):
    """The CPU limit of this process's cgroups (version 1 or 2) in cores; infinity without a limit.

    Args:
        root: root of the file system.
    """
    mount, limits = Path(root, "sys/fs/cgroup"), [math.inf]
    for line in read_system_file(Path(root, "proc/self/cgroup")).splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        # Parent groups limit this one too. In a container the path may be the one on the host; the container then sees
        # only its last folder, directly below the mount point.
        group = PurePosixPath("/", group)
        limits += [_cpu_limit(base / part.relative_to("/")) for part in (group, *group.parents)
                   for base in ([mount / controllers, mount / "cpu"] if controllers else [mount])]
    return min(limits)


def _cpu_limit(folder):
    """The CPU limit in a cgroup's folder, in cores; infinity without a limit."""
    quota_and_period = (read_system_file(folder / name) for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us"))
    text = read_system_file(folder / "cpu.max") or " ".join(quota_and_period)
    try:
        quota, period = map(int, text.split())
    except ValueError:      # "max", or no such files
        return math.inf
    return quota / period if quota > 0 and period > 0 else math.inf


def read_system_file(path):
    """The text of a file such as those in /proc; "" if it cannot be read."""
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace")
    return ""


def shared_memory():
    """Describe how much shared memory is free, for messages; "" on systems without `SHARED_MEMORY`."""
    try:
        usage = shutil.disk_usage(SHARED_MEMORY)
        read_only = bool(os.statvfs(SHARED_MEMORY).f_flag & os.ST_RDONLY)
    except OSError:
        return f"no {SHARED_MEMORY}" if os.name == "posix" and os.uname().sysname == "Linux" else ""
    return f"{SHARED_MEMORY} with {usage.free / 1e6:.1f} of {usage.total / 1e6:.1f} MB free{', read-only' * read_only}"
