"""Fixtures that several test files share."""

import contextlib
import dataclasses
import itertools
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image

from dataset.labels import ClassTable
from dataset.streets import write_dataset
from networks.backbones.names import BACKBONES
from networks.build import build_network
from utils.common.messages import show_messages
from utils.reports import charts
from utils.training import seeds

# Inductor imports setuptools in the middle of a step. Late in this long process that has failed now and then, in
# setuptools' own replacement of distutils; early it never has. Versions of PyTorch without it need none.
with contextlib.suppress(ImportError):
    import setuptools  # noqa: F401

# FFmpeg reads it when this process opens its first video, which a test may do before the product.
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
# Triton's kernels run on the CPU if this is set before Triton is imported, by whichever test or compiler comes first.
os.environ.setdefault("TRITON_INTERPRET", "1")
show_messages()     # as scripts do: many tests read what is said

# Started by nohup, this process hands down that SIGHUP is ignored, and the runs that tests hang up would go on.
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
# A network and crops small enough for many steps per second.
SMALL = ["--gpu", "cpu", "--backbone", "resnet18", "--model", "acfnet_resnet", "--input-size", "33,33", "--num-workers",
         "0", "--log-every", "1", "--amp", "off", "--panel-every", "1000"]


NEW_FIGURE = charts.new_figure      # for tests that look at a chart: `charts_unrendered` replaces it
started = []        # by `start` and `fork`, and perhaps still at work


def environment_of(variables):
    """The environment of a started process: this one's, with these variables."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONUNBUFFERED": "1", **variables}


def start(*words, processes=1, **options):
    """Start a script of the project with these words, under torchrun if there are several processes: `Popen`. What is
    left of it at the end of the test is killed. `env` adds variables."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = environment_of(options.pop("env", {}))
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started.append(subprocess.Popen([sys.executable, *(launcher if processes > 1 else []), *map(str, words)], cwd=ROOT,
                                    env=environment, **streams | options))
    return started[-1]


# A process that has imported the project but not computed anything: what it forks does not wait for these imports.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["train", "evaluate", "tests.conftest"])


class Fork:
    """Python with these words, as a fork of a process that has imported the project, with what tests use of `Popen`."""

    def __init__(self, words, environment, cwd, log):
        pipes = [FORKS.Pipe(duplex=False) for _ in range(2)]
        self.process = FORKS.Process(target=_run_words, args=(words, environment, cwd, log, shortened(),
                                                                     *(end for _, end in pipes)))
        self.process.start()
        self.pid = self.process.pid
        self.stdout, self.stderr = (open(os.dup(reader.fileno()), encoding="utf-8") for reader, _ in pipes)
        for pipe in itertools.chain(*pipes):
            pipe.close()

    @property
    def returncode(self):
        return self.process.exitcode

    def poll(self):
        return self.process.exitcode

    def wait(self, timeout=None):
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("fork", timeout)
        return self.process.exitcode

    def communicate(self, timeout=None):
        texts = {}
        readers = [threading.Thread(target=lambda name=name: texts.update({name: getattr(self, name).read()}),
                                    daemon=True) for name in ("stdout", "stderr")]
        for reader in readers:
            reader.start()
        self.wait(timeout)
        for reader in readers:
            reader.join(timeout)
        return texts["stdout"], texts["stderr"]

    def send_signal(self, number):
        os.kill(self.pid, number)

    def kill(self):
        self.process.kill()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.join()
        self.stdout.close()
        self.stderr.close()


def _run_words(words, environment, cwd, log, short, out, error):
    """Be `python WORDS...` in a session of its own."""
    os.setsid()
    shorten(*short).start()
    for number, pipe in ((1, out), (2, error)):
        os.dup2(pipe.fileno() if log is None else os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        pipe.close()
    sys.stdout, sys.stderr = (open(number, "w", encoding="utf-8", buffering=1) for number in (1, 2))
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    os.fsync = lambda descriptor: None      # as in `nothing_waits_for_the_disk`
    torch.set_num_threads(1)
    if words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    elif words[0] == "-m":
        sys.argv = list(words[1:])
        sys.modules.pop(words[1], None)     # imported before, of which runpy would warn
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(words)
        runpy.run_path(words[0], run_name="__main__")


def fork(*words, env=None, cwd=ROOT, log=None):
    """`start` of one process, for tests of what a script does rather than of how it is started: seconds faster.

    log: file that all output is appended to.
    """
    started.append(Fork(tuple(map(str, words)), environment_of(env or {}), str(cwd), log))
    return started[-1]


def fork_ranks(*words, count=2):
    """A `fork` of each of several processes that find each other as those of torchrun do."""
    with socket.socket() as one:
        one.bind(("localhost", 0))
        port = one.getsockname()[1]
    shared = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "localhost",
              "MASTER_PORT": str(port)}
    return [fork(*words, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(count)]


def children(pid, script=""):
    """Ids of the processes that a process has started, with this text in their command lines."""
    command = ["ps", "-ww", "-o", "pid=,args=", "--ppid", str(pid)]
    listed = subprocess.run(command, capture_output=True, text=True).stdout
    return [int(line.split()[0]) for line in listed.splitlines() if script in line]


def kill(pid):
    """End a process and all that it has started."""
    below = children(pid)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    for child in below:
        kill(child)


@pytest.fixture(autouse=True)
def nothing_started_stays():
    yield
    while started:
        with started.pop() as process:
            if process.poll() is None:
                kill(process.pid)


def finish(process, seconds=120):
    """Wait for the end: (exit status, standard output, standard error)."""
    out, error = process.communicate(timeout=seconds)
    return process.returncode, out, error


def finish_all(processes, seconds=120):
    """Wait until processes that share a run have ended with success: what they wrote to standard output, joined."""
    ends = [finish(process, seconds) for process in processes]
    assert [status for status, _, _ in ends] == [0] * len(ends), ends
    return "".join(out for _, out, _ in ends)


def in_processes(work, *arguments, count=2):
    """Call a function in several processes of torch.distributed, and wait for their end.

    Args:
        work: function of a module, called as `work(rank, *arguments)` after the processes have met over gloo.
        *arguments: what can be pickled.
        count: number of processes.

    Raises:
        torch.multiprocessing.ProcessRaisedException: if the function raised an exception.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_meet, (count, folder, work, arguments), nprocs=count, start_method="forkserver")


def _meet(rank, count, folder, work, arguments):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=count)
    work(rank, *arguments)
    dist.barrier()
    dist.destroy_process_group()


def read_until(process, text):
    """Read standard output until a line begins with a text; returns the lines."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith(text):
            break
    return lines


@pytest.fixture(autouse=True, scope="session")
def nothing_waits_for_the_disk():
    """No test pulls the plug, and the files of all of them are gigabytes that are soon deleted."""
    with mock.patch("os.fsync", lambda descriptor: None):
        yield


@pytest.fixture(autouse=True)
def charts_unrendered(monkeypatch):
    """Charts are drawn into a figure, but not rendered, which takes longer than most of what they show."""

    def unrendered(width, height):
        figure = NEW_FIGURE(width, height)
        size = [round(side * figure.dpi) for side in (width, height)]
        figure.savefig = lambda file, **options: Image.new("RGB", size).save(file, "PNG")
        return figure

    monkeypatch.setattr(charts, "new_figure", unrendered)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def streets(tmp_path_factory):
    """A small drawn data set: 9 training and 3 validation scenes of 256×128."""
    root = tmp_path_factory.mktemp("streets")
    write_dataset(root, train=9, val=3, size=(128, 256), seed=3, workers=2)
    return root


@pytest.fixture(scope="session")
def camvid():
    if not (SHARED / "camvid").is_dir():
        pytest.skip("needs the shared CamVid images, which are not part of the project")
    return SHARED / "camvid"


LONG_BACKBONES = dict(BACKBONES)


def shorten(*backbones, depths=(1, 1, 1, 1)):
    """A context in which these backbones have so few blocks per stage, for what takes as long for each block."""
    return mock.patch.dict(BACKBONES, {name: dataclasses.replace(BACKBONES[name], depths=depths) for name in backbones})


def shortened():
    """Names of the backbones that are shortened at the moment."""
    return [name for name, backbone in BACKBONES.items() if backbone.depths == (1, 1, 1, 1)]


@pytest.fixture(scope="module")
def short_networks():
    """For tests of what happens around a network: these have half of their weights, here and in each `fork`."""
    with shorten("resnet18", "eca_resnet18", "eca_resnet50"):
        yield


@torch.no_grad()
def randomize(module):
    """Give every parameter and buffer a random value, so that no tensor can be swapped or left out unseen."""
    for name, tensor in module.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
        elif name.endswith(("bn1.weight", "bn2.weight", "bn3.weight", "downsample.1.weight", "norm.weight")):
            tensor.uniform_(0.5, 1.5)
        elif tensor.ndim <= 1 and tensor.is_floating_point():
            tensor.normal_(std=0.2)
        elif tensor.is_floating_point():
            tensor.normal_(std=(2 / tensor[0].numel()) ** 0.5)


def snapshot_content(step=7, classes=None, **shape):
    """What train.py wrote into a snapshot before it kept a hash of the samples: the layout that must go on loading."""
    rows = (classes or ClassTable.read()).rows
    shape = {"model": "acfnet_resnet", "num_classes": ClassTable(rows).num_classes, "norm": "inplace_abn", "activation":
             "leaky_relu", "ablations": [], "backbone": "eca_resnet18", "stem": "7x7", "average_downsample": False,
             "eca_kernels": [3, 5, 7, 7]} | shape
    network = build_network(**shape)
    randomize(network)
    optimizer = torch.optim.SGD(network.parameters(), 0.01, 0.9, weight_decay=1e-4)
    for parameter in network.parameters():
        parameter.grad = torch.randn_like(parameter) / 1000
    optimizer.step()
    arguments = {"model": shape["model"], "norm": shape["norm"], "activation": shape["activation"], "data_list": None,
                 "split": "train", "input_size": [65, 97], "batch_size": 2, "random_seed": 1234, "random_mirror": False,
                 "random_scale": None, "sampling": "uniform", "jitter": None, "learning_rate": 0.01, "num_steps": 60000}
    return {"model": network.state_dict(), "optimizer": optimizer.state_dict(), "scaler": {}, "step": step,
            "rng": [seeds.random_state()],
            "config": {"network": shape, "normalization": {"order": "RGB", "mean": [123.675, 116.28, 103.53],
                                                           "std": [58.395, 57.12, 57.375]},
                       "classes": rows, "input_size": [65, 97], "arguments": arguments}}
