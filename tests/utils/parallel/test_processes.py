"""One step means the same however the batch is shared: one process, gloo processes, replicas in threads."""

import functools
import json
import os
import re
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import train as train_script
from dataset.sampling import EpochSampler
from loss.criterion import SegmentationCriterion
from networks.build import build_network
from tests.conftest import ROOT, finish, fork, in_processes, shorten, start
from tests.gpu.several import free_port
from utils.common.compat import no_buffer_sync
from utils.common.errors import UserError
from utils.devices import select
from utils.devices.precision import Precision
from utils.devices.select import share_cores, writer_threads
from utils.ops.normalization import Normalization
from utils.parallel import interfaces, launch
from utils.parallel.launch import Ranks, torchrun_ranks
from utils.parallel.processes import Processes, share_batches
from utils.parallel.replicas import ThreadReplicas
from utils.training.engine import Engine, NetworkWithLoss, step_loss

STEPS = 6


def batch():
    """Six images of one color a class, so that there is something to learn; the parts differ in labeled pixels."""
    generator = torch.Generator().manual_seed(5)
    labels = torch.randint(4, (6, 5, 5), generator=generator).repeat_interleave(7, 1).repeat_interleave(7, 2)
    colors = torch.tensor([[200, 30, 30], [30, 200, 30], [30, 30, 200], [120, 120, 120]])
    images = colors[labels].permute(0, 3, 1, 2) + torch.randint(-25, 25, (6, 3, 35, 35), generator=generator)
    labels[0], labels[1, :30], labels[3, :, :9] = 255, 255, 255
    return images.to(torch.uint8), labels.to(torch.uint8)


def train(share, dtype, loss, rank=0, world=1):
    """Train a small network for some steps; `share(module)` → (module, processes). Returns loss of every step."""
    torch.manual_seed(0)
    with shorten("eca_resnet18"):
        network = build_network("acfnet_resnet", 4, "eca_resnet18").to(dtype)
    for module in network.modules():
        if isinstance(module, torch.nn.Dropout2d):
            module.p = 0.0      # its masks depend on how the batch is shared
    criterion = SegmentationCriterion(loss=loss, ohem_thres=0.3, ohem_keep=500)
    normalize = Normalization()
    module = NetworkWithLoss(network, criterion, lambda images: normalize(images).to(dtype), None)
    module, processes = share(module)
    optimizer = torch.optim.SGD(network.parameters(), 0.05, 0.9)
    images, labels = (t.split(6 // world)[rank] for t in batch())
    losses = []
    for _ in range(STEPS):
        loss, terms = step_loss(module, criterion, images, labels, processes)
        terms = dict(zip(criterion.weights, terms, strict=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(criterion.total(terms)))
    return losses


@functools.cache
def alone(dtype, loss):
    """Losses of one process that takes the whole batch."""
    return train(lambda module: (module, None), dtype, loss)


def work(rank, world, folder, runs):
    losses = [train(lambda module: (DistributedDataParallel(module, **no_buffer_sync()), Processes()), dtype, loss,
                    rank, world) for loss, dtype in runs]
    if rank == 0:
        Path(folder, "losses.json").write_text(json.dumps(losses))


def shared(way, folder, runs):
    """Losses of each run: the terms of its loss, and its dtype."""
    if way == "2 threads":
        return [train(lambda module: (ThreadReplicas(module, 2), None), dtype, loss) for loss, dtype in runs]
    world = int(way.split()[0])
    in_processes(work, world, str(folder), runs, count=world)
    return json.loads((folder / "losses.json").read_text())


ALL_TERMS = "fine=ohem+focal,coarse=ce+dice,aux=lovasz"


@pytest.mark.parametrize("way, runs", [
    ("2 processes", [(ALL_TERMS, torch.float64), (ALL_TERMS, torch.float32)]), ("3 processes", [("ce", torch.float64)]),
    ("2 threads", [("ce", torch.float64), (ALL_TERMS, torch.float64)])],
    ids=["2 processes", "3 processes", "2 threads"])
def test_every_way_of_sharing_trains_alike(way, runs, tmp_path):
    """In float64. In float32 sums in another order round otherwise, which training amplifies, OHEM above all: there the
    first losses alone are compared."""
    for (loss, dtype), actual in zip(runs, shared(way, tmp_path, runs), strict=True):
        expected = alone(dtype, loss)
        assert expected[-1] < 0.95 * expected[0]
        apart = [abs(a - b) / b for a, b in zip(actual, expected, strict=True)]
        if dtype == torch.float64:
            assert max(apart) < 1e-8
        else:
            assert apart[0] < 1e-5


def untouched():
    """A network whose norms are in evaluation and so do not mix the images of a batch."""
    torch.manual_seed(0)
    with shorten("eca_resnet18"):
        return build_network("acfnet_resnet", 4, "eca_resnet18").double().eval()


@pytest.mark.parametrize("parts", [2, 3])
def test_accumulated_parts_add_up_to_the_whole_batch(parts):
    """Without OHEM, and where statistics do not depend on the batch, the gradients are those of one pass."""
    images, labels = batch()
    normalize = Normalization()
    criterion = SegmentationCriterion({"fine": 0.7, "coarse": 0.6}, loss="fine=ce+focal")
    gradients, terms = [], []
    for count in (1, parts):
        network = untouched()
        module = NetworkWithLoss(network, criterion, lambda x: normalize(x).double(), None)
        optimizer = torch.optim.SGD(network.parameters(), 0.0)
        engine = Engine(module, network, criterion, optimizer, Precision("off", torch.device("cpu")),
                        [torch.device("cpu")])
        slices = [{"image": i, "label": y} for i, y in zip(images.chunk(count), labels.chunk(count), strict=True)]
        actual, _ = engine.step(slices)
        gradients.append([p.grad.clone() for p in network.parameters() if p.grad is not None])
        terms.append(actual)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert terms[0] == pytest.approx(terms[1], rel=1e-9) and len(gradients[0]) > 30


def test_accumulated_ohem_is_the_mean_of_its_parts():
    images, labels = batch()
    network = untouched()
    normalize = Normalization()
    criterion = SegmentationCriterion({"fine": 1.0, "coarse": 1.0}, ohem=True, ohem_thres=0.0, ohem_keep=300)
    module = NetworkWithLoss(network, criterion, lambda x: normalize(x).double(), None)
    engine = Engine(module, network, criterion, torch.optim.SGD(network.parameters(), 0.0),
                    Precision("off", torch.device("cpu")), [torch.device("cpu")])
    slices = [{"image": i, "label": y} for i, y in zip(images.chunk(2), labels.chunk(2), strict=True)]
    actual, _ = engine.step(slices)
    each = [criterion(network(normalize(part["image"]).double()), part["label"])["fine"].item() for part in slices]
    assert actual["fine"] == pytest.approx(sum(each) / 2, rel=1e-9)


TORCHRUN = {"WORLD_SIZE": "8", "RANK": "5", "LOCAL_WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost",
            "MASTER_PORT": "29500"}


def test_the_place_among_processes(monkeypatch):
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    assert torchrun_ranks() is None
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert torchrun_ranks() == (8, 5, 4, 1)


def test_a_single_pod_runs_alone(monkeypatch):
    """Kubeflow sets these four, as PyTorch's documentation names them, for a pod without others, too."""
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    for name, value in {"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    assert torchrun_ranks() is None


@pytest.mark.parametrize("tasks, warned", [(None, False), ("1", False), ("2", True)])
def test_tasks_of_srun_run_alone_and_say_so(monkeypatch, capsys, tasks, warned):
    """SLURM_NTASKS alone does not count: sbatch --ntasks sets it for the one process of the batch script as well."""
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", tasks) if tasks else monkeypatch.delenv("SLURM_STEP_NUM_TASKS", False)
    assert launch.join_processes(torch.device("cpu")) is None
    assert ("SLURM_STEP_NUM_TASKS 2: srun started" in capsys.readouterr().err) == warned


@pytest.mark.parametrize("name, value", [
    *((name, value) for name in TORCHRUN for value in (None, "", " ")), ("WORLD_SIZE", "0"), ("WORLD_SIZE", "two"),
    ("WORLD_SIZE", "1e3"), ("WORLD_SIZE", "9" * 5000), ("RANK", "8"), ("RANK", "-1"), ("LOCAL_WORLD_SIZE", "9"),
    ("LOCAL_RANK", "4"), ("LOCAL_RANK", "1.0"), ("LOCAL_RANK", "²"), ("MASTER_PORT", "0"), ("MASTER_PORT", "65536"),
])
def test_senseless_variables_are_a_sentence(monkeypatch, name, value):
    for other, good in TORCHRUN.items():
        monkeypatch.setenv(other, good)
    monkeypatch.setenv(name, value) if value is not None else monkeypatch.delenv(name)
    with pytest.raises(UserError, match=f"^{name}: expected .*as torchrun sets it, found "):
        torchrun_ranks()


@pytest.mark.parametrize("rank, address", [("0", "localhost"), ("1", "localhost"), ("1", "nowhere.invalid")])
def test_nobody_waits_forever_for_the_others(rank, address):
    port = free_port()
    code = ("from datetime import timedelta\nimport torch\n"
            "from utils.common import command\nfrom utils.parallel import launch\n"
            "launch.MEET_TIMEOUT = timedelta(seconds=2)\n"
            "command.run(lambda: launch.join_processes(torch.device('cpu')))\n")
    variables = {"WORLD_SIZE": "2", "RANK": rank, "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": rank, "MASTER_ADDR": address,
                 "MASTER_PORT": str(port)}
    status, _, error = finish(fork("-c", code, env=variables), 60)
    assert status == 2 and "Traceback" not in error
    (output,) = [line for line in error.splitlines() if line.startswith("error: ")]
    assert f"MASTER_PORT {address}:{port}: expected the 2 processes of the run to meet there within 2 s" in output


SEPARATED = {
    "refused": "os.environ['GLOO_SOCKET_IFNAME'] = 'nowhere'",
    "silent": "launch._try_all_reduce = lambda device: time.sleep(600)",
}


@pytest.mark.parametrize("fault", SEPARATED)
def test_processes_that_meet_but_do_not_reach_each_other_end_in_a_sentence(fault):
    """The second one fails, or joins and says nothing; the first one learns of neither, and waits in code of gloo."""
    code = ("import os, time\nfrom datetime import timedelta\nimport torch\n"
            "from utils.common import command\nfrom utils.parallel import launch\n"
            "meet = launch._meet\n"
            "def meet_and_hurry(ranks):\n    store = meet(ranks)\n    launch.MEET_TIMEOUT = timedelta(seconds=3)\n"
            "    return store\n"
            "launch._meet = meet_and_hurry\n"
            f"if os.environ['RANK'] == '1':\n    {SEPARATED[fault]}\n"
            "command.run(lambda: launch.join_processes(torch.device('cpu')))\n")
    variables = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT":
                 str(free_port())}
    processes = [fork("-c", code, env={**variables, "RANK": rank, "LOCAL_RANK": rank}) for rank in ("0", "1")]
    for process in processes:
        status, _, error = finish(process)
        assert status == 2 and "Traceback" not in error
        (sentence,) = [line for line in error.splitlines() if "error: " in line]
        assert "MASTER_ADDR localhost: expected the 2 processes of the run" in sentence
        assert "GLOO_SOCKET_IFNAME" in sentence and "NCCL_SOCKET_IFNAME" in sentence


def default_interface():
    """The one that the kernel's table names for addresses of no network it knows."""
    rows = [row.split() for row in Path("/proc/net/route").read_text().splitlines()[1:]] \
        if Path("/proc/net/route").exists() else []
    defaults = [(int(row[6]), row[0]) for row in rows if row[1] == row[7] == "00000000"]
    return min(defaults)[1] if defaults else pytest.skip("needs a default route, as Linux lists it")


ELSEWHERE = "192.0.2.77"        # of RFC 5737: nobody's


@pytest.mark.skipif(sys.platform != "linux", reason="interfaces are looked up on Linux only")
@pytest.mark.parametrize("own, other, expected", [
    ("127.0.0.1", "127.0.0.1", "lo"), ("::1", "::1", "lo"), ("", "127.0.0.1", None), ("", "", None),
    ("route", ELSEWHERE, default_interface), ("127.0.0.1", ELSEWHERE, default_interface),
    ("::1", ELSEWHERE, default_interface)])
def test_gloo_uses_the_interface_that_leads_to_the_other_hosts(monkeypatch, capsys, own, other, expected):
    """Addresses are what the processes of two hosts left where they met: what leads to MASTER_ADDR, "" if unknown.
    Where MASTER_ADDR is the host's own name, that is loopback; if it is for all, they share one machine."""
    expected = expected() if callable(expected) else expected
    store = dist.HashStore()
    store.set("met/0", interfaces.local_address(ELSEWHERE, "9") if own == "route" else own)
    store.set("met/1", other)
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    interfaces.choose_interface(Ranks(2, 0, 1, 0), store)
    chosen = os.environ.pop("GLOO_SOCKET_IFNAME", None)
    assert chosen == expected
    assert capsys.readouterr().out.startswith(
        f"GLOO_SOCKET_IFNAME: not set; gloo uses {expected}, " if expected else "GLOO_SOCKET_IFNAME: not set; the ")


@pytest.mark.parametrize("ranks, chosen", [(Ranks(2, 0, 2, 0), None), (Ranks(2, 0, 1, 0), "eth7")])
def test_one_host_or_a_chosen_interface_stay_as_they_are(monkeypatch, capsys, ranks, chosen):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", chosen) if chosen else monkeypatch.delenv("GLOO_SOCKET_IFNAME", False)
    interfaces.choose_interface(ranks, store=None)
    assert os.environ.get("GLOO_SOCKET_IFNAME") == chosen and not capsys.readouterr().out


# A selection of what srun sets for the tasks of a step on two nodes ("output environment variables" of its manual).
SLURM = {
    "SLURM_JOB_ID": "7", "SLURM_JOBID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NODELIST": "node[1-2]",
    "SLURM_JOB_NUM_NODES": "2", "SLURM_NNODES": "2", "SLURM_NTASKS": "2", "SLURM_NPROCS": "2",
    "SLURM_NTASKS_PER_NODE": "1", "SLURM_TASKS_PER_NODE": "1(x2)", "SLURM_STEP_ID": "0", "SLURM_STEPID": "0",
    "SLURM_STEP_NODELIST": "node[1-2]", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_LOCALID": "0", "SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1",
    "SLURM_CPUS_ON_NODE": "1"}


def test_the_line_for_slurm_starts_one_run(tmp_path):
    """README.md's own line, with stand-ins for SLURM's commands: srun runs its words as the tasks of two nodes."""
    (line,) = re.findall(r"`(srun [^`]+)`", (ROOT / "README.md").read_text())
    line = " ".join(line.split())
    for words, here in {"train.py ...": str(tmp_path / "script.py"), "--nproc-per-node 4": "--nproc-per-node 1",
                        "head -n 1)": f"head -n 1):{free_port()}"}.items():
        assert words in line
        line = line.replace(words, here)
    (tmp_path / "script.py").write_text(
        "import torch\nfrom utils.common import command\nfrom utils.parallel import launch\n"
        "def main():\n    processes = launch.join_processes(torch.device('cpu'))\n"
        "    print(processes.gather_objects(tuple(launch.torchrun_ranks())))\n    launch.leave_processes()\n"
        "command.run(main)\n")
    commands = {
        "srun": 'test "$1 $2" = "--ntasks-per-node 1" || exit 9\nshift 2\n'
                'for node in 0 1; do SLURM_NODEID=$node SLURM_PROCID=$node "$@" & done\nwait %1 && wait %2\n',
        "scontrol": 'test "$*" = "show hostnames" || exit 9\necho localhost\necho localhost\n',
        "torchrun": f'exec "{sys.executable}" -m torch.distributed.run "$@"\n'}
    for name, text in commands.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}")
        (tmp_path / name).chmod(0o755)
    process = start("-c", "import subprocess, sys; sys.exit(subprocess.call(['bash', '-c', sys.argv[1]]))", line, env={
        **SLURM, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": ""})
    status, out, error = finish(process, 300)
    assert status == 0, error
    assert "srun" not in error
    assert out.count("[(2, 0, 1, 0), (2, 1, 1, 0)]\n") == 2, out


def test_cores_are_shared_and_said(monkeypatch):
    monkeypatch.setattr(select, "available_cores", lambda: 32)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    cpu, gpus = [torch.device("cpu")], [torch.device("cuda", k) for k in range(4)]
    threads = torch.get_num_threads()
    assert share_cores(cpu)[0] == 2 and share_cores(gpus)[0] == 28 and share_cores(gpus[:1])[0] == 8
    assert share_cores(gpus, 3)[0] == 3
    assert [writer_threads(devices[0]) for devices in (cpu, gpus)] == [2, 16]
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert writer_threads(gpus[0]) == 8
    assert share_cores(gpus[:1]) == (7, "32 cores for 4 processes here: 7 --num-workers that read samples each")
    try:
        workers, sentence = share_cores(cpu)
        assert workers == 2 and torch.get_num_threads() == 8 and "8 threads for computing" in sentence
    finally:
        torch.set_num_threads(threads)


def test_processes_take_their_slices_of_every_batch():
    whole = list(EpochSampler(7, 3, 12, 36, 6))
    parts = [list(EpochSampler(7, 3, 12, 36, 6, rank, 3)) for rank in range(3)]
    assert [len(part) for part in parts] == [8, 8, 8]
    assert len(EpochSampler(7, 3, 12, 36, 6, 2, 3)) == 8
    for t in range(4):
        assert whole[6 * t:6 * t + 6] == [entry for part in parts for entry in part[2 * t:2 * t + 2]]


def test_the_launching_process_leaves_the_gpus_to_those_it_starts(monkeypatch, streets, tmp_path):
    """Whatever would make a CUDA context there fails; several GPUs are processes unless something else is asked."""
    gpus = [torch.device("cuda", number) for number in range(4)]
    monkeypatch.setattr(train_script, "select_devices", lambda gpu: gpus)
    for name in ("_lazy_init", "set_device", "get_device_capability", "is_bf16_supported"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, **__: pytest.fail("a CUDA context"))
    started = []

    def start(count, argv):
        started.append(count)
        raise SystemExit

    monkeypatch.setattr(train_script, "start_processes", start)
    words = ["--data-dir", str(streets), "--snapshot-dir", str(tmp_path), "--gpu", "0,1,2,3"]
    with pytest.raises(SystemExit):
        train_script.main(words)
    assert started == [4]
    with pytest.raises(UserError, match="--compile: expected one GPU or --parallel ddp"):
        train_script.main([*words, "--compile", "--parallel", "dp"])


@pytest.mark.parametrize("weight", [(4, 8, 1, 1), (8, 1, 3, 3)])
def test_strides_that_cost_nothing_are_no_warning(tmp_path, weight):
    """cuDNN and some of the CPU's convolutions give such gradients; here a hook does."""
    count, channels, side = weight[:3]
    groups = count if channels == 1 else 1
    strides = channels * side * side, 1, side * channels, channels      # channels-last
    image = torch.randn(2, channels * groups, 5, 6)
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for warned in (True, False):
                conv = torch.nn.Conv2d(channels * groups, count, side, groups=groups)
                conv.weight.register_hook(lambda gradient: gradient.contiguous().as_strided(weight, strides))
                module = DistributedDataParallel(conv) if warned else share_batches(
                    conv, [torch.device("cpu")], Processes())
                module(image).sum().backward()
                assert any("Grad strides" in str(one.message) for one in caught) is warned
                caught.clear()
    finally:
        torch.set_warn_always(False)
        dist.destroy_process_group()


def test_a_gpu_process_sets_its_device_and_says_what_it_chose(monkeypatch, capsys):
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    gpu = torch.device("cuda", 3)
    assert select.prepare_device(gpu, None, "bf16") and chosen == [gpu] and torch.backends.cudnn.benchmark
    assert torch.backends.cudnn.allow_tf32 and "--channels-last: " in capsys.readouterr().out
    channels_last = select.prepare_device(gpu, False, "off")
    output = capsys.readouterr().out
    assert channels_last is False and not torch.backends.cudnn.allow_tf32
    assert output.startswith("--amp off: fp32, exactly") and output.count("\n") == 1
    assert select.prepare_device(torch.device("cpu"), None, "off") is False
    assert "--no-channels-last: " in capsys.readouterr().out


@pytest.mark.parametrize("script", ["/opt/env/lib/python3.11/site-packages/ipykernel_launcher.py", "", "-c"])
def test_a_notebook_starts_no_processes_of_its_kernel(script):
    code = (f"import sys; sys.argv = [{script!r}, '-f', 'kernel.json']\nfrom utils.parallel import launch\n"
            "from utils.common import command\n"
            "command.run(lambda: launch.start_processes(2, ['--data-dir', 'x']))\n")
    status, _, error = finish(fork("-c", code), 60)
    assert status == 2 and error.count("\n") == 1 and error.startswith("error: --gpu: ")
    assert "notebook" in error and "!python train.py" in error and "--gpu 0" in error


class Another(Processes):
    """Stands in for a second process, which says this of itself."""

    def __init__(self, says):
        self.says = says

    def gather_objects(self, value):
        return [value, self.says]


def test_gpus_of_different_kinds_compute_in_what_all_of_them_have(monkeypatch):
    """Gradients of which one process alone scales its own, as fp16 does, would be added up."""
    monkeypatch.setattr(select, "best_precision", lambda device: ("bf16", "fp16")[device.index])
    new, old = torch.device("cuda", 0), torch.device("cuda", 1)
    assert select.shared_precision([new], None) == "bf16"
    assert select.shared_precision([new, old], None) == "fp16"
    for here in (new, old):
        assert select.shared_precision([here], Another(["bf16"])) == ("bf16", "fp16")[here.index]
        assert select.shared_precision([here], Another(["fp16"])) == "fp16"
        assert select.shared_precision([here], Another(["off"])) == "off"


@pytest.mark.parametrize("device, backend, bound", [("cpu", "gloo", None), ("cuda:1", "cpu:gloo,cuda:nccl", "cuda:1")])
def test_how_processes_reach_each_other(monkeypatch, device, backend, bound):
    """Plain objects never go by way of a GPU, and nobody gives up while the first process fills a cache."""
    requested = {}
    monkeypatch.setattr(launch, "_meet", lambda ranks: "store")
    monkeypatch.setattr(launch, "choose_interface", lambda ranks, store: requested.update(interface_for=store))
    monkeypatch.setattr(launch, "_try_all_reduce", lambda device: requested.update(exchanged_on=device))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **named: requested.update(named, backend=backend))
    monkeypatch.setattr(launch, "Processes", lambda: None)
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    launch.join_processes(torch.device(device))
    assert requested["backend"] == backend and requested["timeout"].total_seconds() >= 3600
    assert requested["device_id"] == (bound and torch.device(bound))
    assert (requested["rank"], requested["world_size"]) == (5, 8)
    assert requested["store"] == requested["interface_for"] == "store"
    assert requested["exchanged_on"] == torch.device(device)
