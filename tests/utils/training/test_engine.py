"""A step that is not finite changes nothing; and how often the host waits for a step."""

import copy

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from loss.criterion import SegmentationCriterion
from networks.build import build_network
from tests.conftest import in_processes
from tests.crash import same
from utils.common.compat import no_buffer_sync
from utils.devices.precision import Precision
from utils.ops.normalization import Normalization
from utils.parallel.processes import Processes
from utils.training import seeds
from utils.training.engine import Engine, NetworkWithLoss, NotFinite

pytestmark = pytest.mark.usefixtures("short_networks")
CPU = torch.device("cpu")


def make_engine(amp="off", processes=None, ema=None, **network):
    torch.manual_seed(0)
    network = build_network("acfnet_resnet", 4, "resnet18", **network)
    precision, criterion = Precision(amp, CPU), SegmentationCriterion()
    module = NetworkWithLoss(network, criterion, Normalization(), precision.autocast)
    if processes is not None:
        module = DistributedDataParallel(module, **no_buffer_sync())
    optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.9, weight_decay=1e-4)
    return Engine(module, network, criterion, optimizer, precision, [CPU], processes=processes, ema=ema)


def make_batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {"image": torch.randint(256, (2, 3, 17, 17), dtype=torch.uint8, generator=generator),
            "label": torch.randint(4, (2, 17, 17), dtype=torch.uint8, generator=generator)}


def state(engine):
    return copy.deepcopy({"model": engine.network.state_dict(), "optimizer": engine.optimizer.state_dict(),
                          "scaler": engine.precision.state_dict(), "rng": seeds.random_state()})


def spoil(engine, what):
    """Make the next losses infinite, or the next gradients with a finite loss; returns what ends it."""
    if what == "gradient":
        weight = engine.network.backbone.layer2[0].conv1.weight
        return weight.register_hook(lambda gradient: gradient * torch.inf)
    return engine.network.head.coarse.register_forward_hook(lambda module, args, logits: logits * torch.inf)


def check_nothing_is_learnt(engine, what, parts, mine=True):
    """`mine`: spoil this process's step; otherwise another one's is."""
    batches = [make_batch(seed) for seed in range(parts)]
    engine.step(batches)
    before = state(engine)
    hook = spoil(engine, what) if mine else None
    with pytest.raises(NotFinite) as caught:
        engine.step(batches, 0.5)
    assert caught.value.what == what
    assert same(before, state(engine)) and all(weight.grad is None for weight in engine.network.parameters())
    if hook is not None:
        hook.remove()
    engine.step(batches, 0.5)     # and the next one learns
    after = state(engine)
    assert not same(before["model"], after["model"]) and not same(before["rng"], after["rng"])
    assert all(value.isfinite().all() for value in after["model"].values())


@pytest.mark.parametrize("amp, what, parts", [("off", "gradient", 1), ("off", "gradient", 2), ("off", "loss", 1),
                                              ("off", "loss", 2), ("bf16", "gradient", 1)])
def test_a_step_that_is_not_finite_changes_nothing(amp, what, parts):
    check_nothing_is_learnt(make_engine(amp), what, parts)


def work(rank):
    check_nothing_is_learnt(make_engine(processes=Processes()), "gradient", 1, mine=rank == 1)
    check_nothing_is_learnt(make_engine(processes=Processes()), "loss", 2, mine=rank == 1)
    engine = make_engine(processes=Processes())
    assert [engine.step([make_batch(rank)], stop=stop and rank == 0)[1] for stop in (False, True)] == \
        [False, True]


def test_no_process_learns_what_is_not_finite_in_one():
    in_processes(work)


def test_fp16_leaves_out_overflows_until_the_scale_is_not_at_fault():
    engine = make_engine("fp16", ema=0.9)
    engine.step([make_batch()])
    weights, average = (copy.deepcopy(one.state_dict()) for one in (engine.network, engine.average))
    scale = engine.precision.state_dict()["scale"]
    hook = spoil(engine, "gradient")
    terms, _ = engine.step([make_batch()])
    assert terms["gradient_norm"] is None and terms["fine"] > 0 and engine.skipped == 1
    assert engine.precision.state_dict()["scale"] == scale / 2
    assert all(torch.equal(engine.network.state_dict()[name], weights[name]) for name, _
               in engine.network.named_parameters())
    assert same(engine.average.state_dict(), average) and engine.average_updates == 1
    engine.precision.load_state_dict(engine.precision.state_dict() | {"scale": 1.0})
    engine.step([make_batch()])
    with pytest.raises(NotFinite, match="gradient"):
        engine.step([make_batch()])
    assert engine.precision.state_dict()["scale"] == 0.5
    hook.remove()
    terms, _ = engine.step([make_batch()])
    assert terms["gradient_norm"] > 0 and engine.skipped == 2 and engine.average_updates == 2
    assert not torch.equal(engine.network.head.coarse.weight, weights["head.coarse.weight"])


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a device: a value read, a copy to NumPy or a list."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.operations = []
        for name in ("tolist", "numpy"):
            self.count(name, monkeypatch)

    def count(self, name, monkeypatch):
        read = getattr(torch.Tensor, name)

        def method(tensor, *args):
            self.operations.append(name)
            return read(tensor, *args)

        monkeypatch.setattr(torch.Tensor, name, method)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            self.operations.append("scalar")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("amp, parts, expected", [("off", 1, 1), ("off", 3, 1), ("bf16", 1, 1), ("fp16", 1, 2)])
def test_the_host_waits_once_a_step(amp, parts, expected, monkeypatch):
    engine = make_engine(amp)
    batches = [make_batch(seed) for seed in range(parts)]
    engine.step(batches)      # the first one asks the norms about half precision
    monkeypatch.setattr("utils.training.engine.random_state", lambda devices: None)      # generators are the host's own
    waits = Waits(monkeypatch)
    with waits:
        assert float(torch.ones(())) and torch.ones(2).tolist()
        assert waits.operations == ["scalar", "tolist"]
        waits.operations.clear()
        engine.step(batches)
    assert len(waits.operations) == expected, waits.operations
