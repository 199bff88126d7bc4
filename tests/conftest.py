"""Fixtures that several test files share."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dataset.labels import ClassTable
from dataset.streets import write_dataset
from networks.build import build_network
from utils.common.messages import show_messages
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


started = []        # by `start`, and perhaps still at work


def start(*words, processes=1, **options):
    """Start a script of the project with these words, under torchrun if there are several processes: `Popen`. What is
    left of it at the end of the test is killed. `env` adds variables."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONUNBUFFERED": "1",
                   **options.pop("env", {})}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started.append(subprocess.Popen([sys.executable, *(launcher if processes > 1 else []), *map(str, words)], cwd=ROOT,
                                    env=environment, **streams | options))
    return started[-1]


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


def read_until(process, text):
    """Read standard output until a line begins with a text; returns the lines."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith(text):
            break
    return lines


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
