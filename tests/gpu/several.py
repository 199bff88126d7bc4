"""Processes of torch.distributed: a group of one on any device, and steps that several devices share."""

import contextlib
import json
import os
import socket
import tempfile
from pathlib import Path
from unittest import mock

import torch
import torch.multiprocessing as mp

from loss.criterion import WEIGHTS
from utils.parallel.launch import join_processes, leave_processes
from utils.parallel.processes import Processes

from .rows import near
from .steps import make_batch, make_engine


def free_port():
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


@contextlib.contextmanager
def joined(device, port, rank=0, world=1):
    """`Processes` that have met as those of train.py do; port: of this machine, where they meet."""
    torchrun = {"WORLD_SIZE": world, "RANK": rank, "LOCAL_WORLD_SIZE": world, "LOCAL_RANK": rank,
                "MASTER_ADDR": "localhost", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
    with mock.patch.dict(os.environ, {name: str(value) for name, value in torchrun.items()}):
        join_processes(device)
        try:
            yield Processes()
        finally:
            leave_processes()


def group_of_one(device):
    """torch.distributed with this process alone."""
    return joined(device, free_port())


def collectives(processes, device):
    """Every exchange that the project makes."""
    values = torch.arange(5.0, device=device)
    assert torch.equal(processes.gather(values)[processes.rank], values)
    assert torch.equal(processes.all_reduce(values), values * processes.size)
    assert processes.broadcast({"a": [1]}) == {"a": [1]}
    assert processes.gather_objects("b") == ["b"] * processes.size
    map = torch.arange(24.0, device=device).view(1, 2, 3, 4).contiguous(memory_format=torch.channels_last)
    shifted = map + processes.rank
    processes.average([shifted])
    assert torch.equal(shifted, map + (processes.size - 1) / 2)
    module = torch.nn.Conv2d(2, 2, 3).to(device, memory_format=torch.channels_last)
    processes.copy_from_first(module)
    same_everywhere(processes, module)
    processes.barrier()
    return "gather, all_reduce, average, copy_from_first, broadcast, gather_objects, barrier"


def same_everywhere(processes, module):
    """Raise AssertionError unless all processes have the same weights, to the bit."""
    flat = torch.cat([weight.detach().flatten() for weight in module.parameters()])
    assert all(torch.equal(other, flat) for other in processes.gather(flat)), "the weights of processes differ"


def step_as_without(processes, device, **shape):
    """A step of DistributedDataParallel with one process equals one without it."""
    actual = []
    for shared in (None, processes):
        engine = make_engine(device, processes=shared, **shape)
        terms, _ = engine.step([make_batch(33)])
        actual.append(([terms[head] for head in WEIGHTS],
                      torch.cat([weight.detach().flatten() for weight in engine.network.parameters()])))
    (alone, weights), (shared, same) = actual
    losses = near(torch.tensor(shared), torch.tensor(alone), 1e-6, "losses")
    return f"losses {losses:.1e}, weights {near(same, weights, 1e-6, 'weights'):.1e}"


def losses_of(devices, processes, steps, size, images, **shape):
    """Losses (steps, terms) of a run on these devices; `images` are those of the whole batch."""
    engine = make_engine(devices[0], devices=devices, processes=processes, **shape)
    actual = []
    for seed in range(steps):
        batch = make_batch(size, seed, images)
        if processes is not None:
            batch = {key: value.chunk(processes.size)[processes.rank] for key, value in batch.items()}
        terms, _ = engine.step([batch])
        actual.append([terms[head] for head in WEIGHTS])
    if processes is not None:
        same_everywhere(processes, engine.network)
    engine.release()
    return actual


def work(rank, kind, world, port, folder, steps, size, images, shape):
    """One of the processes that share a run; the first one writes its losses."""
    torch.set_num_threads(1)
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False
    with joined(device, port, rank, world) as processes:
        collectives(processes, device)
        losses = losses_of([device], processes, steps, size, images, **shape)
    if rank == 0:
        Path(folder, "losses.json").write_text(json.dumps(losses))


def shared_by_processes(kind, world, steps, size, expected, **shape):
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(work, (kind, world, free_port(), folder, steps, size, 2 * world, shape), nprocs=world,
                           start_method="forkserver")
        actual = json.loads(Path(folder, "losses.json").read_text())
    return as_alone(actual, expected)


def as_alone(actual, expected):
    """The first step's losses are one device's; later ones drift apart by what rounding grows to."""
    actual, expected = torch.tensor(actual), torch.tensor(expected)
    first = near(actual[0], expected[0], 1e-5, "losses of the first step")
    return f"losses of the first step {first:.1e}, of all {near(actual, expected, 1e-2, 'losses of all steps'):.1e}"


def section(rows, device, world=None, steps=20, size=129, **shape):
    """world: devices to share steps; None for all GPUs there are."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    with group_of_one(device) as processes:
        rows.check("all exchanges, one process", collectives, processes, device)
        rows.check("a step of DistributedDataParallel, one process", step_as_without, processes, device, **shape)
    world = world or torch.cuda.device_count()
    if world < 2:
        rows.note("several GPUs", "not looked at: there is one")
        return
    expected = losses_of([device], None, steps, size, 2 * world, **shape)
    rows.check(f"{steps} steps of {world} processes as on one device", shared_by_processes, device.type, world, steps,
               size, expected, **shape)
    if device.type == "cuda":
        rows.check(f"the same in CUDA graphs, {world} processes", shared_by_processes, device.type, world, steps, size,
                   expected, options={"cuda_graph": "on"}, **shape)
        devices = [torch.device("cuda", index) for index in range(world)]
        rows.check(f"{steps} steps of DataParallel on {world} GPUs as on one", lambda: as_alone(
            losses_of(devices, None, steps, size, 2 * world, **shape), expected))
