"""Training steps and evaluation on a GPU that is not there: what CUDA's kernels are given, where the host waits."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from libs import backend
from libs.abn import ABN, NORMS, InPlaceABNSync, set_backend
from libs.convert import activation_module
from loss.criterion import SegmentationCriterion
from networks.build import MODELS, build_network, find_model
from tests.fake_cuda import GPU, LAYOUTS, InTurns, backward, fake_gpu
from utils.common.compat import torch_version
from utils.devices import capture
from utils.devices.precision import AUTOCAST, Precision
from utils.inference.sliding import SlidingPredictor
from utils.metrics.calibration import Calibration
from utils.metrics.evaluation import add_matrices, score
from utils.ops import upsampling
from utils.ops.normalization import Normalization
from utils.parallel.processes import Processes
from utils.parallel.replicas import ThreadReplicas
from utils.training import engine as training_engine
from utils.training.engine import Engine, NetworkWithLoss
from utils.training.optimization import make_optimizer

pytestmark = [pytest.mark.skipif(torch_version() < (2, 9), reason="older fake tensors know other operators"),
              pytest.mark.usefixtures("short_networks")]
NORM_KERNELS = ("statistics", "batch_norm_backward_reduce", "batch_norm_backward_elemt")


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(backend, "package", lambda: None)
    upsampling.upsampling_matrix.cache_clear()
    with fake_gpu(monkeypatch) as device:
        yield device
    upsampling.upsampling_matrix.cache_clear()     # what is fake must not outlive it


def make_network(layout, kernels="torch", **shape):
    with torch.device(GPU):
        network = build_network(**{"model": "acfnet", "num_classes": 19, "backbone": "eca_resnet18"} | shape)
    for module in network.modules():        # `Module.to` wants a device that is there
        for name, weight in module._parameters.items():
            if weight is not None and weight.ndim == 4:
                module._parameters[name] = torch.nn.Parameter(weight.detach().contiguous(memory_format=layout))
    set_backend(network, kernels)
    return network


def make_batch(size=65, images=4):
    return {"image": torch.zeros(images, 3, size, size, dtype=torch.uint8),
            "label": torch.zeros(images, size, size, dtype=torch.uint8)}


def take_steps(gpu, amp="bf16", layout="channels-last", ohem=False, loss="ce", parts=1, processes=None, wrap=None,
               kind="sgd", learning=None, batch=None, steps=2, **shape):
    """Two steps, of which the second waits once: the first one asks the norms about half precision.
    learning: arguments of the `Engine`; batch: arguments of `make_batch`. Returns the network."""
    layout = LAYOUTS[layout]
    network = make_network(layout, **shape).train()
    criterion = SegmentationCriterion(
        find_model(shape.get("model", "acfnet"), shape.get("acf", False)).loss_weights, ohem=ohem, loss=loss,
        kernels=shape.get("kernels", "torch"))
    precision = Precision(amp, GPU)
    optimizer = make_optimizer(network, kind=kind)
    module = NetworkWithLoss(network, criterion, Normalization(), precision.autocast)
    module = module if wrap is None else wrap(module)
    engine = Engine(module, network, criterion, optimizer, precision, [GPU], processes=processes,
                    memory_format=layout, **learning or {})
    for _ in range(steps):
        gpu.clear()
        engine.step([make_batch(**(batch or {})) for _ in range(parts)])
    assert all(weight.grad is not None and weight.grad.is_cuda for weight in network.parameters())
    assert steps < 2 or len(gpu.waits) == 1, gpu.waits
    return network


def check_norms(gpu, network, amp, layout):
    """Every norm runs on CUDA's own kernels, in the dtype and layout that was asked for."""
    norms = sum(hasattr(module, "running_var") for module in network.modules())
    actual = dict(gpu.called, statistics=gpu.called["batch_norm_update_stats"] + gpu.called["batch_norm_stats"])
    assert [actual[name] for name in NORM_KERNELS] == [norms] * 3
    assert gpu.called["batch_norm_elemt"] >= norms      # more often where the output is computed again
    assert set(gpu.maps) == {(AUTOCAST[amp] or torch.float32, layout)}, gpu.maps


@pytest.mark.parametrize("shared, most_forward, most_backward", [(False, 8, 11), (True, 14, 16)])
def test_a_norm_in_place_starts_few_operations(gpu, shared, most_forward, most_backward, monkeypatch):
    """An H100 computed faster than Python could ask for 36 of them in each norm."""
    if shared:
        monkeypatch.setattr("libs.synchronize.find_peers", lambda group=None: FourAlike())
    with torch.device(GPU):
        norm = InPlaceABNSync(8).train()
        x = torch.zeros(2, 8, 9, 9, dtype=torch.bfloat16, requires_grad=True)
    norm(x * 1)
    gpu.clear()
    y = norm(x * 1)
    forward = sum(gpu.launches.values()) - 1                                # x * 1
    backward(y, torch.empty_like(y))
    assert forward <= most_forward
    assert sum(gpu.launches.values()) - 1 - forward <= most_backward + 1 + 3        # of x * 1; into the three `grad`


@pytest.mark.parametrize("amp, norm, layout", [
    *((amp, "inplace_abn", "channels-last") for amp in ("off", "bf16", "fp16")),
    ("bf16", "inplace_abn", "NCHW"), ("bf16", "bn", "channels-last"), ("off", "bn", "NCHW")])
def test_a_step(gpu, amp, norm, layout):
    network = take_steps(gpu, amp, layout, norm=norm)
    if norm == "inplace_abn":
        check_norms(gpu, network, amp, layout)


@pytest.fixture
def triton_kernels():
    pytest.importorskip("triton", reason="Triton is not installed")


def count_kernels(gpu):
    """Launches of Triton's kernels of norms and of ends of blocks, forward and backward."""
    return [gpu.launches[name] for name in ("normalize_kernel", "elements_kernel", "end_block_kernel",
                                            "end_elements_kernel")]


@pytest.mark.parametrize("shared, options", [
    (True, {}), (False, {"norm": "bn", "amp": "off", "activation": "relu"}),
    (False, {"recompute": "light", "backbone": "eca_resnet50", "model": "acfnet_resnet"})], ids=str)
def test_a_step_by_triton(gpu, shared, options, triton_kernels, monkeypatch):
    """Every norm and every end of a block, alone and among processes; recomputation repeats forward kernels."""
    if shared:
        for module in ("libs.synchronize", "loss.ohem"):
            monkeypatch.setattr(f"{module}.find_peers", lambda group=None: FourAlike())
    network = take_steps(gpu, kernels="triton", processes=FourAlike() if shared else None, **options)
    norms = sum(hasattr(module, "running_var") for module in network.modules())
    ends = 4        # one block per stage
    forward, backward, forward_ends, backward_ends = count_kernels(gpu)
    assert backward == norms - ends and backward_ends == ends
    assert gpu.launches["partial_statistics_kernel"] == norms
    assert gpu.launches["sums_kernel"] == 3         # of the losses of the heads
    assert forward == norms - ends and forward_ends == ends * (2 if "recompute" in options else 1)
    assert not gpu.called["batch_norm_elemt"] and not gpu.called["batch_norm_backward_elemt"]


@pytest.mark.parametrize("norm", NORMS)
def test_a_norm_by_triton_moves_few_maps(gpu, norm, triton_kernels):
    """3 forward and 5 backward; in place PyTorch's operators move 15."""
    with torch.device(GPU):
        layer = NORMS[norm](8).train()
        x = torch.zeros(2, 8, 99, 99, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    set_backend(layer, "triton")
    x = x.requires_grad_() * 1
    if norm == "inplace_abn":
        InPlaceABNSync.decide_kept_inputs([layer], 9)
    gpu.clear()
    y = layer(x)
    y.grad_fn.apply(torch.empty_like(y))
    assert 8 <= gpu.bytes / (2 * x.numel()) < 8.5
    assert sum(gpu.launches.values()) == 3 + 3 + 1      # and the count of batches


@pytest.mark.parametrize("kernel, launches", [(None, 6), (5, 9)])
def test_the_end_of_a_block_by_triton_moves_few_maps(gpu, kernel, launches, triton_kernels):
    """4 forward and 8 backward."""
    with torch.device(GPU):
        norm = InPlaceABNSync(8, activation="identity").train()
        maps = [torch.zeros(2, 8, 99, 99, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
                .requires_grad_() for _ in range(2)]
        taps = None if kernel is None else torch.zeros(1, 1, kernel, requires_grad=True)
    set_backend(norm, "triton")
    gpu.clear()
    y = norm.end_block(*maps, taps, "leaky_relu", 0.01)
    y.grad_fn.apply(torch.empty_like(y))
    assert 12 <= gpu.bytes / (2 * y.numel()) < 12.5
    assert sum(gpu.launches.values()) == launches + 1


@pytest.mark.parametrize("shared, most", [(False, 2000), (True, 2600)])
def test_a_whole_step_by_triton(gpu, shared, most, triton_kernels, monkeypatch):
    """8 crops of 769×769 in bf16: 1,650 operations alone instead of 3,300, and 185 GB instead of 276.

    Not counted: norms of gradients, which are one operation for all on a GPU; copies of gradients, which autograd's
    engine takes as they are; the momentum, which is made in the first step; and five operations of each norm that
    decide in one of 256 steps whether it keeps its input.
    """
    if shared:
        for module in ("libs.synchronize", "loss.ohem"):
            monkeypatch.setattr(f"{module}.find_peers", lambda group=None: FourAlike())
    network = take_steps(gpu, kernels="triton", backbone="eca_resnet101", batch={"size": 769, "images": 8}, steps=1,
                         processes=FourAlike() if shared else None)
    norms = sum(hasattr(module, "running_var") for module in network.modules())
    once = gpu.launches["zeros_like"] + 5 * norms
    apart = gpu.launches["linalg_vector_norm"] + len(list(network.parameters())) + once
    assert sum(gpu.launches.values()) - apart <= most
    assert gpu.bytes <= 195e9


@pytest.mark.parametrize("backbone", ["eca_resnet18", "eca_resnet50"])
def test_the_maps_of_a_backbone_keep_their_layout(gpu, backbone):
    """Autograd's gradient of a mean does not: a map of its own, in the other layout, in each block with attention."""
    network = make_network(torch.channels_last, backbone=backbone).train().backbone
    with torch.device(GPU):
        x = torch.zeros(2, 3, 65, 65).contiguous(memory_format=torch.channels_last)
    last = network(x)[-1]
    gpu.clear()
    backward(last, torch.empty_like(last))
    assert gpu.launches["convolution_backward"] and not gpu.mixed


OTHERS = [name for name in MODELS if name != "acfnet"]


@pytest.mark.parametrize("options", [{"ohem": True}, {"loss": "fine=ohem+dice+focal,aux=lovasz"}, {"parts": 2},
                                     {"model": "ccnet", "acf": True},
                                     *({"model": name} for name in OTHERS)], ids=str)
def test_other_steps(gpu, options):
    take_steps(gpu, **options)


@pytest.mark.parametrize("kind, amp", [("sgd", "fp16"), ("adamw", "bf16")])
def test_ways_of_learning(gpu, kind, amp, monkeypatch):
    # `copy.deepcopy` takes fake tensors for memory, and ends the process.
    monkeypatch.setattr(training_engine, "average_of_weights",
                        lambda network: make_network(torch.channels_last).requires_grad_(False))
    take_steps(gpu, amp, kind=kind, learning={"ema": 0.99, "clip_gradient": 1e-3})
    assert gpu.launches["_foreach_copy_"] == 4      # of both dtypes: what a step may have to put back, and the average


@pytest.mark.parametrize("recompute", ["light", "full"])
def test_recomputation(gpu, recompute):
    network = take_steps(gpu, recompute=recompute, backbone="eca_resnet50", model="acfnet_resnet")
    check_norms(gpu, network, "bf16", "channels-last")
    assert gpu.called["batch_norm_elemt"] > gpu.called["batch_norm_update_stats"]


@pytest.mark.parametrize("shared, most", [(False, 20), (True, 25)])
def test_a_captured_step_is_a_few_calls(gpu, shared, most, monkeypatch):
    """Two inputs, one graph, the read of the terms, and the optimizer; of a process that shares the batch also the
    exchange of all gradients at once. The host waits once."""
    for module in ("libs.synchronize", "loss.ohem") * shared:
        monkeypatch.setattr(f"{module}.find_peers", lambda group=None: FourAlike())
    replays = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: replays.append(1)))
    monkeypatch.setattr(torch.cuda, "graph", lambda *args, **options: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(capture, "WARMUP", 0)
    take_steps(gpu, learning={"cuda_graph": "on"}, processes=FourAlike() if shared else None)
    assert len(replays) == 2 and gpu.launches["copy_"] == 2 and gpu.launches["_fused_sgd_"] == 2
    # For the norm of the gradient, PyTorch has one operator for all tensors, but for fake ones it uses one for each.
    assert sum(gpu.launches.values()) - gpu.launches["linalg_vector_norm"] <= most, gpu.launches


class FourAlike(Processes):
    """Stands in for the collectives of four processes with the same part of a batch."""

    def __init__(self, group=None):
        self.group, self.size, self.rank = None, 4, 0

    def gather(self, tensor):
        return [tensor.clone() for _ in range(self.size)]

    def all_reduce(self, tensor):
        return self.size * tensor

    def gather_objects(self, value):
        return [value] * self.size

    def average(self, tensors):
        torch._foreach_div_(tensors, 1.0)


@pytest.mark.parametrize("options, layout", [
    ({"norm": "bn"}, "channels-last"), ({"amp": "off"}, "NCHW"), ({"amp": "fp16", "ohem": True}, "channels-last"),
    ({"recompute": "full", "loss": "fine=ohem+dice+focal,aux=lovasz"}, "channels-last")], ids=str)
def test_a_step_of_several_processes(gpu, options, layout, monkeypatch):
    for module in ("libs.synchronize", "loss.ohem", "loss.regions"):
        monkeypatch.setattr(f"{module}.find_peers", lambda group=None: FourAlike())
    network = take_steps(gpu, layout=layout, processes=FourAlike(), **options)
    check_norms(gpu, network, options.get("amp", "bf16"), layout)


@pytest.mark.parametrize("options", [{"ohem": True}, {"norm": "bn", "layout": "NCHW", "amp": "off"},
                                     {"recompute": "full"}], ids=str)
def test_a_step_of_replicas(gpu, options, monkeypatch):
    """Two threads, as `--parallel dp` has them, on one device: statistics and sums are exchanged all the same."""
    network = take_steps(gpu, wrap=lambda module: ThreadReplicas(InTurns(module, gpu, monkeypatch), 2), **options)
    norms = sum(hasattr(module, "running_var") for module in network.modules())
    assert gpu.called["batch_norm_stats"] == 2 * norms


@pytest.mark.parametrize("amp, layout, scales, flip", [
    ("bf16", "channels-last", (0.75, 1.25), True), ("fp16", "channels-last", (1.0,), False),
    ("off", "NCHW", (1.0,), False)])
def test_evaluation(gpu, amp, layout, scales, flip):
    """The host waits for nothing: neither for an image, nor for a window, nor to count anything. Copies of unpinned
    memory, which take as long as the queue before them, are asynchronous here."""
    network, calibration = make_network(LAYOUTS[layout], model="acfnet_resnet").eval(), Calibration()
    for size in ((65, 65), (97, 129)):
        windows, waits = [], []
        predictor = SlidingPredictor(network.forward, (65, 65), scales=scales, flip=flip, device=GPU,
                                     autocast=AUTOCAST[amp], memory_format=LAYOUTS[layout],
                                     watch=lambda done, of, seen=windows: seen.append(of))

        def items(size=size, waits=waits):
            for _ in range(2):      # of which the first one makes what is made once
                gpu.clear()
                yield {"image": torch.zeros(3, *size, dtype=torch.uint8),
                       "label": torch.zeros(size, dtype=torch.uint8)}
            waits += gpu.waits

        total = {}
        for image in score(predictor, items(), 19):
            add_matrices(total, image.matrices)
            calibration.update(image.confidence["fine"], image.labels["fine"], image.truth)
        assert waits == []
    assert windows[0] > 3


class BiasAndActivation(torch.nn.Module):
    """What folding leaves of a norm: on a GPU `at::_convolution` adds the bias by an operator of its own."""

    def __init__(self, norm):
        super().__init__()
        self.bias, self.activation = norm.bias, activation_module(norm)

    def forward(self, x):
        return self.activation(x.add_(self.bias.to(x.dtype).view(-1, 1, 1)))


def test_an_evaluation_by_triton_moves_fewer_maps(gpu, triton_kernels):
    """Four windows of 769×769 in bf16: 26 GB instead of 39 with folded norms."""
    moved = {}
    for kernels in ("folded", "triton"):
        network = make_network(torch.channels_last, backbone="eca_resnet101").eval()
        set_backend(network, "triton")
        if kernels == "folded":
            for parent in list(network.modules()):
                for name, module in parent.named_children():
                    if isinstance(module, ABN):
                        setattr(parent, name, BiasAndActivation(module))
        with torch.device(GPU):
            windows = torch.zeros(4, 3, 769, 769).contiguous(memory_format=torch.channels_last)
        gpu.clear()
        with torch.inference_mode(), torch.autocast("cuda", dtype=torch.bfloat16):
            network(windows)
        moved[kernels] = gpu.bytes
        assert not gpu.waits
    assert moved["triton"] < 0.7 * moved["folded"]


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("window", [(65, 65), None])
def test_cudnn_tries_algorithms_for_windows_of_one_size_alone(gpu, monkeypatch, window, before):
    """And the setting of the run is as before after each image."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", before)
    seen = []

    def network(images):
        seen.append(torch.backends.cudnn.benchmark)
        return {"fine": images.new_zeros(len(images), 19, 9, 9)}

    SlidingPredictor(network, window, device=GPU).predict(torch.zeros(65, 97, 3, dtype=torch.uint8))
    assert set(seen) == {window is not None} and torch.backends.cudnn.benchmark == before


def test_the_walk_is_a_backward_pass(monkeypatch):
    """Gradients equal those of autograd's engine to the bit, on the CPU, with recomputation and autocast."""
    network = build_network("acfnet_resnet", 5, "eca_resnet50", recompute="light")
    images, actual = torch.randn(2, 3, 17, 17), []
    for run in (torch.Tensor.backward, backward):
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = sum(logits.float().square().mean() for logits in network(images).values())
        if run is backward:
            monkeypatch.setattr(torch._C, "_current_graph_task_id", lambda: 1)
        run(loss)
        actual.append([weight.grad.clone() for weight in network.parameters()])
        network.zero_grad()
    assert all(map(torch.equal, *actual))


def test_the_walk_goes_through_replicas():
    """Where sums of all replicas meet in the graph: as autograd's engine, but for the order of additions."""
    network, actual = build_network("acfnet_resnet", 5, "eca_resnet18").double().eval(), []
    for module in network.modules():
        module.training = hasattr(module, "running_var")        # no dropout
    images = torch.randn(4, 3, 33, 33, dtype=torch.float64)
    for run in (torch.Tensor.backward, backward):
        run(sum(logits.square().mean() for logits in ThreadReplicas(network, 2)(images).values()))
        actual.append([weight.grad.clone() for name, weight in network.named_parameters() if weight.grad is not None])
        network.zero_grad()
    assert len(actual[0]) > 30
    for expected, walked in zip(*actual, strict=True):
        torch.testing.assert_close(walked, expected, rtol=1e-9, atol=1e-12)


def test_what_is_wrong_is_seen(gpu):
    x, vector = torch.zeros(2, 3, 5, 5, device=GPU), torch.zeros(3, device=GPU)
    arguments = [x, x, *[vector] * 5]
    torch.batch_norm_backward_elemt(*arguments, torch.full((1,), 50, dtype=torch.int32, device=GPU))
    with pytest.raises(AssertionError, match="counts: found torch.int64"):
        torch.batch_norm_backward_elemt(*arguments, torch.full((1,), 50, device=GPU))
    with pytest.raises(AssertionError, match="expected a map like"):
        torch.batch_norm_backward_elemt(x.contiguous(memory_format=torch.channels_last), *arguments[1:],
                                        torch.full((1,), 50, dtype=torch.int32, device=GPU))
    with pytest.raises(AssertionError, match="expected float32"):
        torch.batch_norm_elemt(x, vector.half(), vector, vector, vector, 0.0)
    with pytest.raises(AssertionError, match="on both devices"):
        x + torch.zeros(5)
    assert gpu.waits == []
    for wait in (lambda: vector.new_tensor([1.0]), lambda: bool(vector.sum() > 1), lambda: vector.tolist(),
                 lambda: x[x > 0], lambda: x.cpu(), lambda: torch.zeros(5).to(GPU)):
        gpu.clear()
        wait()
        assert len(gpu.waits) == 1, gpu.waits


@pytest.mark.parametrize("ohem", [False, True])
def test_the_loss_keeps_no_map_of_the_full_size(gpu, ohem, monkeypatch):
    """With Triton's kernels it keeps a float32 gradient of the size of the logits for each head, and never waits."""
    cross_entropy = pytest.importorskip("libs.fused.cross_entropy", reason="Triton is not installed")
    labels, started, kept = torch.zeros(4, 65, 65, dtype=torch.uint8, device=GPU), [], {}
    monkeypatch.setattr(cross_entropy, "launch", lambda kernel, *arguments, **constants: started.append(kernel))
    for kernels in ("torch", "triton"):
        outputs = {name: torch.zeros(4, 19, 9, 9, dtype=torch.bfloat16, device=GPU, requires_grad=True)
                   for name in ("fine", "coarse", "aux")}
        criterion, saved = SegmentationCriterion(ohem=ohem, ohem_keep=100, kernels=kernels), []
        gpu.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda x, saved=saved: saved.append(x.nbytes) or x, lambda x: x):
            loss = criterion.total(criterion(outputs, labels))
        kept[kernels] = sum(saved)
        backward(loss)
    assert not gpu.waits and all(one.grad.dtype == torch.bfloat16 for one in outputs.values())
    assert started == [cross_entropy.losses_kernel] * ohem + [cross_entropy.sums_kernel] * 3
    low, full = (3 * 4 * 19 * side * side * 4 for side in (9, 65))      # bytes of three heads in float32
    assert kept["triton"] <= low + 1000 and kept["torch"] >= full
