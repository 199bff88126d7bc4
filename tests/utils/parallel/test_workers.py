"""Worker processes that cannot work, cores that may not be used: containers, schedulers, small shared memory."""

import math
import os
import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT, finish, fork
from utils.common.compat import torch_version
from utils.common.limits import cgroup_cpu_limit

# Ends as a command does; a worker that holds a sample of 2.5 MB, or cannot be started, or is killed.
PROGRAM = """
import multiprocessing, os, signal, sys, time
import torch
from utils.common import command
from utils.common.progress import progress
from utils.parallel.workers import Jobs, Loader, do_jobs

multiprocessing.set_start_method("fork", force=True)
fork, calls = os.fork, []


def fork_once():
    calls.append(1)
    if len(calls) > 1:
        raise BlockingIOError(11, "Resource temporarily unavailable")
    return fork()


def sample(number):
    return {"image": torch.zeros(2500000, dtype=torch.uint8), "name": str(number)}


def die(number):
    os.kill(os.getpid(), getattr(signal, sys.argv[2]))


def load(what):
    if what == "samples":
        return Loader(Jobs(sample, range(9)), workers=2)
    if what == "batches":
        return Loader(Jobs(sample, range(9)), 3, workers=2)
    if what == "no workers":
        return Loader(Jobs(sample, range(9)), 3, workers=0)
    if what == "fork":
        os.fork = fork_once
        os.register_at_fork(after_in_child=lambda: time.sleep(1))       # so that it is ended before it is ready
    if what == "signals":       # to the whole process group, as soon as a worker exists
        os.register_at_fork(after_in_child=lambda: [os.kill(os.getpid(), number) for number in command.STOP_SIGNALS])
    return do_jobs(die if what == "die" else len, ["a"] * 9, 2)


command.run(lambda: print(sum(1 for _ in progress(load(sys.argv[1]), "reading", "sample"))))
"""


def surrounded(mount, *words):
    """`finish` of a Python process whose /dev/shm is mounted with these options; None for the usual one."""
    if not mount:
        return finish(fork(*words))
    words = ["unshare", "-rm", "sh", "-c", f'mount -t tmpfs -o {mount} none /dev/shm && exec "$@"', "sh",
             sys.executable, *map(str, words)]
    if not shutil.which("unshare") or subprocess.run([*words[:6], "true"], capture_output=True).returncode:
        pytest.skip("needs a mount namespace, which this user cannot make")
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("mount, what, output", [
    ("size=1m", ("samples",), ("2.5 MB for each batch and 10.0 MB for the 4", "/dev/shm with ", "of 1.0 MB free")),
    ("size=1m", ("batches",), ("7.5 MB for each batch and 30.0 MB for the 4", "of 1.0 MB free")),
    ("ro", ("jobs",), ("--num-workers 2: ", "Read-only file system", "read-only)")),
    (None, ("fork",), ("--num-workers 2: ", "Resource temporarily unavailable")),
    (None, ("die", "SIGKILL"), ("a process that reads samples died", "/dev/shm with ")),
    (None, ("die", "SIGBUS"), ("a process that reads samples died", "/dev/shm with "))])
def test_workers_that_cannot_go_on_are_a_sentence(mount, what, output):
    status, out, error = surrounded(mount, "-c", PROGRAM, *what)
    assert status == 2 and error.startswith("error: ") and error.count("\n") == 1 and not out, error
    if mount == "size=1m" and torch_version() < (2, 9) and "died" in error:     # by SIGBUS
        output = ("a process that reads samples died", "/dev/shm with ")
    missing = [words for words in (*output, "--shm-size", "--ipc=host", "--num-workers 0") if words not in error]
    assert missing == [], error


def test_a_worker_leaves_signals_to_its_parent_from_its_first_moment():
    status, out, error = finish(fork("-c", PROGRAM, "signals"))
    assert (status, error) == (0, "") and out.endswith("\n9\n")


@pytest.mark.parametrize("mount", ["size=1m", "ro"])
def test_without_workers_no_shared_memory_is_needed(mount):
    status, out, error = surrounded(mount, "-c", PROGRAM, "no workers")
    assert status == 0 and out.endswith("3\n"), error


def test_a_check_without_shared_memory(streets, tmp_path):
    words = ("-m", "dataset.check", streets, "--fast", "--output-dir", tmp_path / "r", "--num-workers")
    status, _, error = surrounded("ro", *words, 1)
    assert status == 2 and error.count("\n") == 1 and "--num-workers 0 needs none" in error
    status, out, error = surrounded("ro", *words, 0)       # which is what the sentence advises
    assert status == 0 and "0 problems" in out, error


def test_a_process_uses_the_cores_it_may():
    code = ("import os; from utils.common.limits import available_cores\n"
            "os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1]); print(available_cores())")
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("only Linux lets a process choose")
    status, out, error = finish(fork("-c", code))
    assert (status, out) == (0, "1\n"), error


@pytest.mark.parametrize("own, files, cores", [     # docker run --cpus=1.5 is a quota of 150000 per period of 100000
    ("0::/", {"cpu.max": "150000 100000\n"}, 1.5), ("0::/", {"cpu.max": "max 100000\n"}, math.inf),
    ("0::/a/b", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "200000 50000\n", "cpu.max": "800000 100000\n"}, 4),
    ("0::/../../host/docker/1f", {"cpu.max": "50000 100000\n"}, 0.5),
    ("4:cpu,cpuacct:/docker/1f", {"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
    ("4:cpu,cpuacct:/a", {"cpu,cpuacct/a/cpu.cfs_quota_us": "-1\n", "cpu,cpuacct/a/cpu.cfs_period_us": "100000\n",
                          "cpu,cpuacct/cpu.cfs_quota_us": "100000\n",
                          "cpu,cpuacct/cpu.cfs_period_us": "50000\n"}, 2),
    ("3:cpuset:/\n0::/", {"cpuset/cpu.cfs_quota_us": "1\n", "cpuset/cpu.cfs_period_us": "1\n"}, math.inf),
    ("", {}, math.inf)])
def test_the_cpu_limit_of_a_container(tmp_path, own, files, cores):
    for name, text in {"proc/self/cgroup": f"{own}\n" * bool(own), **{f"sys/fs/cgroup/{name}": text for name, text in
                                                                      files.items()}}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cgroup_cpu_limit(tmp_path) == cores
