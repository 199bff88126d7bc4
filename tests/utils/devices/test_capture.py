"""CUDA graphs on a CPU, with a stand-in for `torch.cuda.CUDAGraph` that notes ATen's operators and runs them again."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from libs.abn import InPlaceABNSync
from loss.criterion import SegmentationCriterion
from tests.conftest import in_processes
from tests.crash import same
from tests.utils.training.test_engine import CPU, make_batch, state
from utils.common.errors import UserError
from utils.devices import capture
from utils.devices.capture import CapturedFunction
from utils.devices.precision import Precision
from utils.ops.normalization import Normalization
from utils.parallel.processes import Processes, share_batches
from utils.training.engine import Engine, NetworkWithLoss, NotFinite

graphs = []


class RecordedGraph(TorchDispatchMode):
    """`torch.cuda.CUDAGraph`: operators that run in its context write to the same memory again in each replay.

    A real capture runs nothing. Here it does, and the first replay, which follows at once, has nothing left to do.
    """

    may_read = False        # whether the host may read values, which ends a real capture

    def __init__(self):
        super().__init__()
        self.calls, self.replays = [], 0
        graphs.append(self)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default and not self.may_read:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        results = function(*args, **kwargs or {})
        if not function.is_view:
            self.calls.append((function, args, kwargs or {}, results))
        return results

    @torch.no_grad()
    def replay(self):
        self.replays += 1
        if self.replays == 1:
            return
        for function, args, kwargs, results in self.calls:
            again = tree_leaves(function(*args, **kwargs))
            if function.namespace == "c10d":        # the last result of a collective is its work
                again[-1].wait()
            for before, now in zip(tree_leaves(results), again, strict=True):
                if isinstance(now, torch.Tensor) and now is not before:
                    before.copy_(now)


@contextlib.contextmanager
def recording(recorded, capture_error_mode):
    """`torch.cuda.graph`."""
    with recorded:
        yield


@pytest.fixture(autouse=True)
def cuda(monkeypatch):
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, value in {"CUDAGraph": RecordedGraph, "graph": recording, "empty_cache": lambda: None,
                        "Stream": lambda device: stream, "current_stream": lambda device: stream,
                        "set_stream": lambda which: None, "stream": lambda which: contextlib.nullcontext()}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(capture, "WARMUP", 2)
    graphs.clear()


class SmallNetwork(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.features = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), InPlaceABNSync(8),
                                            torch.nn.Dropout2d(0.3), torch.nn.Conv2d(8, 8, 1), InPlaceABNSync(8))
        self.fine = torch.nn.Conv2d(8, 4, 1)

    def forward(self, images):
        return {"fine": self.fine(self.features(images))}


def make_engine(amp="off", cuda_graph="off", processes=None):
    torch.manual_seed(0)
    network, criterion, precision = SmallNetwork(), SegmentationCriterion({"fine": 1.0}), Precision(amp, CPU)
    module = NetworkWithLoss(network, criterion, Normalization(), precision.autocast)
    optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.9)
    module = share_batches(module, [CPU], processes, captured=cuda_graph != "off")
    return Engine(module, network, criterion, optimizer, precision, [CPU],
                  processes=processes, cuda_graph=cuda_graph)


def train(engine, steps, before_step=lambda number, engine: None, first=0):
    """Terms of each step, and the state afterward. first: number of the first batch."""
    terms = []
    for number in range(steps):
        before_step(number, engine)
        terms.append(engine.step([make_batch(first + number)])[0])
    return terms, state(engine), [norm._choice.passes_left for norm in norms(engine)]


def norms(engine):
    return [layer for layer in engine.network.modules() if hasattr(layer, "decide_kept_inputs")]


def change_a_norm(number, engine):
    """Before step 4: let a norm keep its input from now on, which is another kind of pass."""
    if number == 4:
        with torch.no_grad():
            norms(engine)[1].bias.fill_(5)
        for norm in norms(engine):
            norm._choice.passes_left = 0


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_replays_train_as_steps_do(amp):
    """Also dropout's numbers, running statistics and the loss scale; a graph is captured again when a norm changes."""
    expected = train(make_engine(amp), 7, change_a_norm)
    assert not graphs
    actual = train(make_engine(amp, cuda_graph="on"), 7, change_a_norm)
    assert same(actual, expected)
    assert [graph.replays for graph in graphs] == ([5] if amp == "off" else [2, 2])


def replay_in_process(rank):
    with pytest.MonkeyPatch.context() as monkeypatch:
        cuda.__wrapped__(monkeypatch)
        # On the CPU, norms among processes read the number of values, which is the same in all steps.
        monkeypatch.setattr(RecordedGraph, "may_read", True)
        for amp in ("off", "bf16"):
            expected, actual = (train(make_engine(amp, cuda_graph, Processes()), 7, change_a_norm, first=10 * rank)
                                for cuda_graph in ("off", "on"))
            assert same(actual, expected)
        assert [graph.replays for graph in graphs] == [5, 2, 2]


def test_replays_of_processes_train_as_steps_do():
    """Statistics and losses are shared inside of the graphs, and gradients are averaged after them."""
    in_processes(replay_in_process)


def test_a_replay_that_is_not_finite_changes_nothing():
    engine = make_engine(cuda_graph="auto")
    train(engine, 4)
    weight = engine.network.fine.weight
    kept, before = weight.detach().clone(), state(engine)
    with torch.no_grad():
        weight.mul_(torch.nan)
    with pytest.raises(NotFinite):
        engine.step([make_batch()])
    with torch.no_grad():
        weight.copy_(kept)
    assert same(before, state(engine))
    assert train(engine, 1)[0][0]["fine"] > 0 and graphs[0].replays == 4


def test_a_failed_capture_leaves_no_trace_in_the_gradients(monkeypatch):
    """Its Python has run, and has given the weights gradients."""
    @contextlib.contextmanager
    def graph(recorded, capture_error_mode):
        yield
        raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    engines = [make_engine(cuda_graph=choice) for choice in ("off", "auto")]
    for engine in engines:
        engine.network.features[2].p = 0.0
    monkeypatch.setattr(torch.cuda, "graph", graph)
    (expected, *_), (actual, *_) = (train(engine, 5) for engine in engines)
    assert actual == expected and engines[1]._captured.failed


def test_other_inputs_are_captured_again():
    captured = CapturedFunction(lambda x, y: (x * y, (x + y).sum()), required=True)
    for size, replays in [(3, [False, False, False, True]), (4, [False, False, True]), (3, [False, False])]:
        for number, replayed in enumerate(replays):
            x, y = torch.full((size,), number + 1.0), torch.full((size,), 2.0)
            (product, total), replay = captured(x, y)
            assert replay == replayed
            torch.testing.assert_close(product, x * y)
            torch.testing.assert_close(total, (x + y).sum())


def test_what_cannot_be_captured_is_called_as_ever(capsys):
    def function(x):
        return (x * x.sum().item(),)

    captured = CapturedFunction(function, required=False)
    for number in range(5):
        (product,), replayed = captured(torch.tensor([number, 1.0]))
        assert product.tolist() == [number * (number + 1), number + 1] and not replayed
    output = "".join(capsys.readouterr())
    assert output.count("the step cannot be captured: CUDA error: operation not permitted") == 1
    captured = CapturedFunction(function, required=True)
    with pytest.raises(UserError, match="--cuda-graph on: expected a step that can be captured"):
        for _ in range(3):
            captured(torch.ones(1))


def test_the_flag_is_resolved(capsys):
    gpu = torch.device("cuda", 0)
    possible = {"devices": [gpu], "parallel": "ddp", "recompute": "none", "accumulate": 1, "amp": "bf16"}
    assert [capture.resolve(choice, **possible) for choice in capture.CHOICES] == list(capture.CHOICES)
    for other in ({"devices": [CPU]}, {"devices": [gpu, gpu], "parallel": "dp"}, {"accumulate": 2},
                  {"amp": "apex"}, {"recompute": "full"}):
        assert capture.resolve("auto", **possible | other) == capture.resolve("off", **possible | other) == "off"
        assert "--cuda-graph off: not possible with" in "".join(capsys.readouterr())
        with pytest.raises(UserError, match="--cuda-graph on: expected"):
            capture.resolve("on", **possible | other)
