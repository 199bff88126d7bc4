"""Activated batch norms: the `inplace_abn` package, nn.BatchNorm2d and finite differences as oracles."""

import copy
import math
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from libs import abn, backend, functions, kernels, recompute
from libs.abn import ABN, ABNSync, InPlaceABN, InPlaceABNSync, count_input_keeping_norms, set_backend
from libs.synchronize import combine
from networks.build import build_network
from tests.conftest import SHARED, shorten
from utils.parallel.replicas import ReplicaGroup, ReplicaStopped, ThreadReplicas, current_replica, run_replicas

CLASSES = [InPlaceABN, InPlaceABNSync]
SHAPES = [(6, 3), (4, 3, 5), (4, 3, 5, 7), (2, 3, 4, 5, 3)]


def randomized(layer):
    with torch.no_grad():
        for name, tensor in layer.state_dict().items():
            if name == "running_var":
                tensor.uniform_(0.5, 2)
            elif tensor.is_floating_point():
                tensor.normal_()
        if layer.weight is not None:
            layer.weight[0] = -0.7
    return layer


def gradients(layer, x, dy):
    """Output and gradients of input, weight and bias."""
    x = x.clone().requires_grad_()
    y = layer(x.clone())
    watched = [x] + ([layer.weight, layer.bias] if layer.weight is not None else [])
    return [y.detach().clone(), *torch.autograd.grad((y * dy).sum(), watched)]


def reference(layer, x):
    """The package's meaning with ordinary operations, differentiable by autograd itself."""
    dims = [0, *range(2, x.ndim)]
    shape = (1, -1, *[1] * (x.ndim - 2))
    if layer.training or layer.running_mean is None:
        mean, var = x.mean(dims), x.var(dims, correction=0)
    else:
        mean, var = layer.running_mean, layer.running_var
    z = (x - mean.view(shape)) / (var.view(shape) + layer.eps).sqrt()
    if layer.weight is not None:
        z = z * (layer.weight.abs() + layer.eps).view(shape) + layer.bias.view(shape)
    return {"identity": lambda: z, "leaky_relu": lambda: F.leaky_relu(z, layer.activation_param),
            "elu": lambda: F.elu(z, layer.activation_param)}[layer.activation]()


# ---- against the real package ----

@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-6), (torch.float32, 1e-4)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("activation, param", [("leaky_relu", 0.01), ("elu", 1.0), ("identity", 0.01)])
@pytest.mark.parametrize("training", [True, False])
def test_equals_the_package(dtype, tolerance, shape, activation, param, training):
    package = pytest.importorskip("inplace_abn", reason="the inplace_abn package is not installed")
    theirs = randomized(package.InPlaceABN(3, activation=activation, activation_param=param).to(dtype)).train(training)
    x, dy = torch.randn(shape, dtype=dtype) * 2 + 1, torch.randn(shape, dtype=dtype)
    for kind in CLASSES:
        ours = kind(3, activation=activation, activation_param=param).to(dtype).train(training)
        ours.load_state_dict(copy.deepcopy(theirs).state_dict())
        fresh = copy.deepcopy(theirs)
        for a, b in zip(gradients(ours, x, dy), gradients(fresh, x, dy), strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
        for name, value in fresh.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[name], value, rtol=tolerance, atol=tolerance)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert ours._version == theirs._version


@pytest.mark.parametrize("options", [{"momentum": None}, {"momentum": 0.3}, {"affine": False},
                                     {"track_running_stats": False}], ids=str)
@pytest.mark.parametrize("kind", ["ABN", "InPlaceABN"])
def test_options_equal_the_package(options, kind):
    package = pytest.importorskip("inplace_abn", reason="the inplace_abn package is not installed")
    theirs, ours = getattr(package, kind)(3, **options), getattr(abn, kind)(3, **options)
    for _ in range(3):
        x, dy = torch.randn(4, 3, 5, 5) + 2, torch.randn(4, 3, 5, 5)
        for a, b in zip(gradients(ours, x, dy), gradients(theirs, x, dy), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value)
    for layer in (ours, theirs):
        layer.eval()
    torch.testing.assert_close(ours(x.clone()), theirs(x.clone()), rtol=1e-4, atol=1e-4)
    assert repr(ours) == repr(theirs)


def test_files_of_the_package_load_also_those_that_count_no_batches():
    package = pytest.importorskip("inplace_abn", reason="the inplace_abn package is not installed")
    state = randomized(package.InPlaceABN(3)).state_dict()
    assert InPlaceABNSync(3).load_state_dict(state) is not None
    old = {key: value for key, value in state.items() if key != "num_batches_tracked"}
    InPlaceABN(3).load_state_dict(old)      # version 1: plain dicts carry no version


def test_the_package_is_a_backend(monkeypatch):
    """The same layer on the package's kernels; what they cannot do is refused, and auto leaves it to PyTorch."""
    pytest.importorskip("inplace_abn", reason="the inplace_abn package is not installed")
    layer = randomized(InPlaceABNSync(5))
    x, dy = torch.randn(4, 5, 6, 7), torch.randn(4, 5, 6, 7)
    expected = gradients(copy.deepcopy(layer), x, dy)
    set_backend(layer, "package")
    calls = []
    package = backend.package()
    monkeypatch.setattr(backend, "package", lambda: lambda *args: calls.append(1) or package(*args))
    for a, b in zip(gradients(layer, x, dy), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert calls == [1]
    with pytest.raises(RuntimeError, match="found torch.bfloat16 on cpu; the backend torch supports this"):
        layer(x.bfloat16())
    set_backend(layer, "auto")
    gradients(layer, x, dy)
    assert calls == [1]


def test_a_missing_package_is_said(monkeypatch):
    monkeypatch.setattr(backend, "package", lambda: None)
    assert "optional package inplace_abn is not installed" in backend.describe("auto")
    with pytest.raises(RuntimeError, match="expected the package inplace_abn .* found that it cannot be imported"):
        set_backend(InPlaceABN(3), "package")
    with pytest.raises(ValueError, match="expected one of auto, torch, triton, package"):
        set_backend(InPlaceABN(3), "other")


# ---- on its own ----

@pytest.mark.parametrize("activation, param", [("leaky_relu", 0.01), ("leaky_relu", 0.3), ("elu", 0.7),
                                               ("identity", 1)])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_ordinary_operations(activation, param, training, shape):
    layer = randomized(InPlaceABN(3, activation=activation, activation_param=param).double()).train(training)
    x, dy = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    actual = gradients(copy.deepcopy(layer), x, dy)
    x = x.requires_grad_()
    y = reference(layer, x)
    expected = [y, *torch.autograd.grad((y * dy).sum(), [x, layer.weight, layer.bias])]
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("activation", ["identity", "leaky_relu", "elu"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_gradients_of_any_layout(activation, memory_format):
    """One value for all (from a plain sum), and a permuted one: what reaches the backward pass need not be dense."""
    layer = randomized(InPlaceABN(5, activation=activation, activation_param=0.3).double())
    for weight in (torch.ones(()).double(), torch.randn(3, 6, 4, 5).double().permute(0, 3, 2, 1)):
        x = torch.randn(3, 5, 4, 6).double().to(memory_format=memory_format).requires_grad_()
        actual = torch.autograd.grad((layer(x * 1) * weight).sum(), [x, layer.weight, layer.bias])
        expected = torch.autograd.grad((reference(layer, x) * weight).sum(), [x, layer.weight, layer.bias])
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind, activation", [(InPlaceABN, "leaky_relu"), (InPlaceABN, "elu"), (InPlaceABN, "identity"),
                                              (ABNSync, "relu")])
@pytest.mark.parametrize("training", [True, False])
def test_gradcheck(kind, activation, training):
    layer = randomized(kind(3, activation=activation, activation_param=0.2, momentum=0.0).double()).train(training)
    x = torch.randn(4, 3, 2, 3, dtype=torch.float64, requires_grad=True)

    def function(x, weight, bias):
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x.clone(),))

    assert torch.autograd.gradcheck(function, (x, layer.weight, layer.bias))


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_overwrites_its_input_and_keeps_format_and_dtype(kind, memory_format, dtype):
    layer = kind(4)
    if dtype == torch.float64:
        layer.double()
    x = torch.randn(2, 4, 5, 6, requires_grad=True)
    z = x.to(dtype).to(memory_format=memory_format) * 1
    y = layer(z)
    assert y.data_ptr() == z.data_ptr() and y.dtype == dtype and y.is_contiguous(memory_format=memory_format)
    (gradient,) = torch.autograd.grad(y.float().square().sum(), z)
    assert gradient.is_contiguous(memory_format=memory_format) and gradient.dtype == dtype


def test_one_buffer_is_kept():
    kept = []
    layer = InPlaceABN(4)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(torch.randn(2, 4, 5, 6, requires_grad=True) * 1)
    large = {t.untyped_storage().data_ptr() for t in kept if t.numel() > 4}
    assert large == {y.untyped_storage().data_ptr()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_with_parameters_in_float32(dtype):
    """Statistics, x̂ and sums are formed in float32: only input, output and gradient are rounded."""
    layer = randomized(InPlaceABN(8))
    layer.bias.data.clamp_(-0.5, 0.5)
    layer.weight.data.abs_().clamp_(min=0.5)
    x, dy = (torch.randn(4, 8, 9, 9) + 3).to(dtype), torch.randn(4, 8, 9, 9).to(dtype)
    exact = gradients(copy.deepcopy(layer).double(), x.double(), dy.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = gradients(layer, x, dy)
    eps = torch.finfo(dtype).eps
    for a, b in zip(actual, exact, strict=True):
        assert (a.double() - b).norm() < 1.5 * eps * b.norm()
    assert not layer.keeps_input
    torch.testing.assert_close(layer.running_var, layer.running_var.to(dtype).float(), rtol=eps, atol=0)


@pytest.mark.parametrize("kind", [InPlaceABN, ABN])
@pytest.mark.parametrize(("parameters", "maps"), [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16),
                                                  (torch.float32, torch.float64), (torch.float64, torch.float32)])
def test_running_statistics_of_any_dtype_are_updated(kind, parameters, maps):
    torch.manual_seed(0)
    layer, truth = kind(3, momentum=0.5).to(parameters), nn.BatchNorm2d(3, momentum=0.5).double()
    for _ in range(2):
        x = 2 * torch.randn(2, 3, 9, 9).to(maps) + 1
        truth(x.double())
        layer._batch_statistics(x)      # what the layer takes itself, not the one kernel of `ABN` on its own
    eps = torch.finfo(parameters).eps if parameters in (torch.bfloat16, torch.float16) else 1e-6
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(layer, name).double(), getattr(truth, name), rtol=2 * eps, atol=eps)
    assert layer.running_mean.dtype == parameters and layer.num_batches_tracked == 2


def test_extremes_stay_finite():
    """Zero variance; ELU so far below zero that it has no digits left; a weight of zero. The package returns
    gradients that are not numbers for the second; here they are zero."""
    layer = InPlaceABN(3, activation="elu", activation_param=1.0)
    with torch.no_grad():
        layer.bias.copy_(torch.tensor([-300.0, 0.0, 0.0]))
        layer.weight[1] = 0
    x = torch.randn(4, 3, 5, 5)
    x[:, 2] = 7.0
    actual = gradients(layer, x, torch.randn(4, 3, 5, 5))
    assert all(value.isfinite().all() for value in actual)
    assert (actual[1][:, 0] == 0).all()


def test_what_cannot_be_undone_is_refused():
    for options in ({"activation": "relu"}, {"activation_param": 0.0}, {"activation": "elu", "activation_param": -1}):
        with pytest.raises(ValueError, match="activation that has an inverse"):
            InPlaceABN(3, **options)
    with pytest.raises(ValueError, match="expected one of leaky_relu, relu, elu, identity, found 'gelu'"):
        ABN(3, activation="gelu")


@pytest.mark.parametrize("kind", [*CLASSES, ABN])
def test_one_value_a_channel_is_an_error(kind):
    with pytest.raises(ValueError, match="more than one? value|more than 1 value"):
        kind(3)(torch.randn(1, 3, 1, 1))


@pytest.mark.parametrize("kind", [InPlaceABNSync, ABNSync])
def test_compiled_network_falls_back_cleanly(kind):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), kind(4), nn.Conv2d(4, 2, 1))
    x = torch.randn(2, 3, 8, 8)
    expected = copy.deepcopy(network)(x)
    compiled = torch.compile(network, backend="eager")
    torch.testing.assert_close(compiled(x), expected)
    compiled(x).sum().backward()
    assert network[0].weight.grad is not None


# ---- on CUDA's kernels, by their formulas: the kernels themselves exist on GPUs alone ----

class OneProcess:
    """A group of one process: what is gathered and summed is its own."""

    def gather(self, packed):
        return [packed]

    def all_reduce(self, sums):
        return sums


class NoWideMaps(TorchDispatchMode):
    """Nothing of the size of a map is computed in float32 outside of the kernels: no casts there."""

    def __init__(self, values):
        super().__init__()
        self.values, self.inside_kernel, self.calls = values, False, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not self.inside_kernel and isinstance(result, torch.Tensor) and result.numel() >= self.values:
            if result.dtype == torch.float32:
                self.calls.append(str(function))
        return result


@pytest.fixture
def cuda_kernels(monkeypatch):
    """ATen's CUDA kernels written out (aten/src/ATen/native/cuda/Normalization.cuh) with what they ask of dtypes and
    layouts, so that what is passed to them and made of what they return is checked here."""
    watch = NoWideMaps(0)

    def along(v, x):
        return v.view(1, -1, *[1] * (x.ndim - 2))

    def check(maps, vectors):
        x = maps[0]
        assert {m.dtype for m in maps} == {x.dtype} and {m.stride() for m in maps} == {x.stride()}
        assert x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
        assert all(v.dtype == torch.float32 and v.is_contiguous() and v.shape == (x.shape[1],) for v in vectors)

    def kernel(function):
        def called(*args, **named):
            watch.inside_kernel = True
            try:
                return function(*args, **named)
            finally:
                watch.inside_kernel = False
        return called

    def elemt(x, weight, bias, mean, invstd, eps, out):
        check([x, out], [weight, bias, mean, invstd])
        return out.copy_((x.float() - along(mean, x)) * along(invstd * weight, x) + along(bias, x))

    def reduce(dy, x, mean, invstd, weight, input_g, weight_g, bias_g):
        check([dy, x], [mean, invstd, weight])
        dims = [0, *range(2, x.ndim)]
        sum_dy, sum_dy_xmu = dy.float().sum(dims), (dy.float() * (x.float() - along(mean, x))).sum(dims)
        return sum_dy, sum_dy_xmu, sum_dy_xmu * invstd if weight_g else None, None

    def backward(dy, x, mean, invstd, weight, sum_dy, sum_dy_xmu, count):
        check([dy, x], [mean, invstd, weight, sum_dy, sum_dy_xmu])
        assert count.dtype == torch.int32 and count.ndim == 1
        norm = 1 / count.sum()
        factor = invstd * invstd * sum_dy_xmu * norm
        return ((dy.float() - along(sum_dy * norm, x) - (x.float() - along(mean, x)) * along(factor, x))
                * along(invstd * weight, x)).to(x.dtype)

    def update_stats(x, running_mean=None, running_var=None, momentum=0.0):
        dims = [0, *range(2, x.ndim)]
        if running_mean is not None:
            running_mean.lerp_(x.float().mean(dims), momentum)
            running_var.lerp_(x.float().var(dims), momentum)
        return x.float().mean(dims), x.float().var(dims, correction=0)

    def stats(x, eps):
        check([x], [])
        mean, var = update_stats(x)
        return mean, (var + eps).rsqrt()

    def gather(like, means, invstds, running_mean, running_var, momentum, eps, counts):
        assert means.ndim == 2 and means.dtype == invstds.dtype == torch.float32 and counts.shape == means.shape[:1]
        assert counts.dtype == (like if running_mean is None else running_mean).dtype
        average, squares, number = torch.zeros(means.shape[1]), torch.zeros(means.shape[1]), 0
        for mean, invstd, count in zip(means, invstds, counts.tolist(), strict=True):
            squares += ((1 / invstd) ** 2 - eps) * count + (average - mean) ** 2 * number * count / (number + count)
            average = (number * average + count * mean) / (number + count)
            number += count
        if running_mean is not None:
            running_mean.lerp_(average, momentum)
            running_var.lerp_(squares / (number - 1), momentum)
        return average, (squares / number + eps).rsqrt()

    for name, function in (("elemt", elemt), ("backward_reduce", reduce), ("backward_elemt", backward),
                           ("stats", stats), ("gather_stats_with_counts", gather)):
        monkeypatch.setattr(torch, f"batch_norm_{name}", kernel(function))
    monkeypatch.setattr(functions, "local_statistics", kernel(update_stats))
    monkeypatch.setattr(kernels, "supports", lambda x: x.dtype != torch.float64)
    return watch


@pytest.mark.parametrize("kind, activation", [
    (InPlaceABNSync, "leaky_relu"), (InPlaceABNSync, "elu"), (InPlaceABNSync, "identity"), (ABNSync, "leaky_relu"),
    (ABNSync, "relu"), (ABNSync, "identity"), ("kept", "leaky_relu")])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("setting", ["alone", "process", "two replicas"])
def test_the_path_of_cuda(cuda_kernels, monkeypatch, kind, activation, layout, dtype, tolerance, setting):
    """Alone, as one of several processes and of several threads, against nn.BatchNorm2d in float64; half precision is
    never raised to float32."""
    slope = 1.0 if activation == "elu" else 0.01
    layer = randomized((InPlaceABNSync if kind == "kept" else kind)(5, activation=activation, activation_param=slope))
    with torch.no_grad():
        layer.weight.copy_(layer.weight.sign() * layer.weight.abs().clamp(min=0.3))
    if kind == "kept":
        monkeypatch.setattr(InPlaceABN, "_must_keep_input", lambda self: True)
    truth = nn.BatchNorm2d(5, momentum=layer.momentum).double()
    truth.load_state_dict({name: value.double() for name, value in layer.state_dict().items()})
    if kind is not ABNSync:
        truth.weight.data = truth.weight.data.abs() + layer.eps
    if setting != "two replicas":      # an ordinary norm that is alone is ATen's own
        shared = setting == "process" or kind is ABNSync
        monkeypatch.setattr(layer, "_find_peers", lambda x: OneProcess() if shared else None, raising=False)
    x = (torch.randn(4, 5, 6, 7) * 2 + 1).to(dtype).contiguous(memory_format=layout)
    dy = torch.randn(4, 5, 6, 7).to(dtype)              # of another layout than x, once in two
    x.requires_grad_()
    module = nn.Sequential(nn.ZeroPad2d(0), layer)      # a copy, which the layer may overwrite
    y = (ThreadReplicas(module, 2) if setting == "two replicas" else module)(x)
    cuda_kernels.values = x.numel() // 2
    with cuda_kernels:
        actual = [y.detach().clone(), *torch.autograd.grad(y, [x, layer.weight, layer.bias], dy)]
    assert dtype == torch.float32 or cuda_kernels.calls == []
    exact = x.detach().double().requires_grad_()
    z = truth(exact)
    z = {"leaky_relu": lambda: F.leaky_relu(z, 0.01), "relu": lambda: F.relu(z), "elu": lambda: F.elu(z),
         "identity": lambda: z}[activation]()
    expected = [z.detach(), *torch.autograd.grad(z, [exact, truth.weight, truth.bias], dy.double())]
    if kind is not ABNSync:
        expected[2] = expected[2] * layer.weight.sign()
    for a, b in zip(actual, expected, strict=True):
        assert (a - b).norm() <= tolerance * b.norm()
    torch.testing.assert_close(layer.running_var, truth.running_var.float(), rtol=1e-2, atol=1e-3)


def test_running_statistics_in_half_precision_are_updated(cuda_kernels):
    """Of a whole network in bf16, shared: the kernel wants them in float32."""
    x = (torch.randn(4, 5, 6, 7) * 2 + 1).bfloat16()
    mean, var = torch.zeros(5, dtype=torch.bfloat16), torch.ones(5, dtype=torch.bfloat16)
    functions.shared_statistics(functions.packed_statistics(x, 1e-5), OneProcess(), 1e-5, mean, var, 0.5)
    torch.testing.assert_close(mean, (0.5 * x.double().mean((0, 2, 3))).bfloat16())
    torch.testing.assert_close(var, (0.5 + 0.5 * x.double().var((0, 2, 3))).bfloat16())


# ---- replicas in threads ----

def parts_network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 5, 3, bias=False), randomized(InPlaceABNSync(5)),
                         nn.Conv2d(5, 4, 1, bias=False), randomized(InPlaceABNSync(4, activation="identity")),
                         nn.Conv2d(4, 4, 1, bias=False), randomized(ABNSync(4, activation="relu"))).double()


def whole_batch(network, x, dy):
    x = x.clone().requires_grad_()
    y = network(x)
    grads = torch.autograd.grad((y * dy).sum(), [x, *network.parameters()])
    return [y, *grads, *(b for b in network.buffers())]


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("batch", [4, 7])
def test_thread_replicas_are_one_batch(size, batch):
    """Outputs, gradients of input and parameters, running statistics; parts of unequal size."""
    network = parts_network()
    x, dy = torch.randn(batch, 3, 9, 8).double(), torch.randn(batch, 4, 7, 6).double()
    expected = whole_batch(copy.deepcopy(network), x, dy)
    actual = whole_batch(ThreadReplicas(network, size), x, dy)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_whole_batch_means_batch_norm_of_torch():
    """The oracle of the oracle: nn.BatchNorm2d and the activation."""
    layer = InPlaceABNSync(3).double()
    plain = nn.BatchNorm2d(3).double()
    x, dy = torch.randn(6, 3, 4, 4).double(), torch.randn(6, 3, 4, 4).double()
    plain.weight.data.add_(layer.eps)
    replicas = ThreadReplicas(nn.Sequential(_Copy(), layer), 3)
    actual, expected = whole_batch(replicas, x, dy), whole_batch(nn.Sequential(plain, nn.LeakyReLU(0.01)), x, dy)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


class _Copy(nn.Module):
    def forward(self, x):
        return x * 1


def test_a_replica_that_fails_ends_the_others():
    layer = InPlaceABNSync(3)

    def work(fail):
        def run():
            if fail:
                raise KeyError("the real reason")
            return layer(torch.randn(2, 3, 4, 4))
        return run

    with pytest.raises(KeyError, match="the real reason"):
        run_replicas([work(False), work(True), work(False)])
    with pytest.raises(ReplicaStopped, match="replica 1 ended before the others"):
        run_replicas([work(False), lambda: None])
    assert current_replica() is None


def test_exchange_keeps_order_over_many_rounds():
    group = ReplicaGroup(3)
    seen = [[] for _ in range(3)]

    def work(rank):
        for turn in range(50):
            seen[rank].append(group.exchange(rank, (turn, rank), turn))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(3)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert seen[0] == seen[1] == seen[2] == [[(turn, rank) for rank in range(3)] for turn in range(50)]


def test_replicas_at_different_places_do_not_take_each_others_values():
    """A norm of one replica and another norm of the other: their statistics must not be added up."""
    wide, narrow = InPlaceABNSync(3), InPlaceABNSync(4)
    shape = r"float64 \([79],\)"
    with pytest.raises(RuntimeError, match=f"expected to exchange {shape}, as the others do, found {shape}"):
        run_replicas([lambda: wide(torch.randn(2, 3, 4, 4)), lambda: narrow(torch.randn(2, 4, 4, 4))])


def replicate(network, size):
    """What torch.nn.parallel.replicate makes of a network for its devices, on the CPU: copies of the modules whose
    parameters are results of a broadcast, and whose buffers, for the first device, are the network's own."""
    modules = dict(network.named_modules())
    broadcast = {name: [p * 1 for _ in range(size)] for name, p in network.named_parameters()}
    copies = []
    for rank in range(size):
        made = {name: module._replicate_for_data_parallel() for name, module in modules.items()}
        for name, module in modules.items():
            for key in module._modules:
                setattr(made[name], key, made[f"{name}.{key}".removeprefix(".")])
            for key, value in module._parameters.items():
                copied = None if value is None else broadcast[f"{name}.{key}".removeprefix(".")][rank]
                setattr(made[name], key, copied)
            for key, value in module._buffers.items():
                made[name]._buffers[key] = value if rank == 0 or value is None else value.clone()
        copies.append(made[""])
    return copies


@shorten("eca_resnet50")
@pytest.mark.parametrize("recompute_mode", ["none", "light"])
def test_replicas_of_data_parallel_train_like_one_batch(recompute_mode):
    """The whole training module, as `utils.parallel.replicas.DataParallel` runs it, against one pass over the batch."""
    torch.manual_seed(0)
    network = build_network("acfnet_resnet", 3, "eca_resnet50", recompute=recompute_mode).double()
    for module in network.modules():
        if isinstance(module, nn.Dropout2d):
            module.p = 0.0
    images = torch.randn(3, 3, 33, 33).double()
    twin = copy.deepcopy(network)
    sum(logits.square().sum() for logits in twin(images).values()).backward()

    copies = replicate(network, 2)
    parts = run_replicas([lambda m=m, x=x: m(x) for m, x in zip(copies, images.split([2, 1]), strict=True)])
    sum(logits.square().sum() for part in parts for logits in part.values()).backward()
    for (name, a), (_, b) in zip(network.named_parameters(), twin.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-8 * float(b.grad.abs().max() + 1), msg=name)
    for (name, a), (_, b) in zip(network.named_buffers(), twin.named_buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_plain_data_parallel_is_refused():
    layer = InPlaceABNSync(3)
    replica = layer._replicate_for_data_parallel()
    replica.weight, replica.bias = layer.weight, layer.bias
    with pytest.raises(RuntimeError, match="expected utils.parallel.replicas.DataParallel around the module"):
        replica(torch.randn(2, 3, 4, 4))


def test_a_group_without_processes_is_refused():
    with pytest.raises(RuntimeError, match="expected torch.distributed to be initialized"):
        InPlaceABNSync(3, group="some group")(torch.randn(2, 3, 4, 4))


# ---- real weights in half precision ----

def real_norms():
    path = SHARED / "weights/resnet50_imagenet_rgb.pth"
    if not path.is_file():
        pytest.skip("needs the shared ResNet-50 weights, which are not part of the project")
    state = torch.load(path, weights_only=True)
    names = [key.removesuffix(".weight") for key in state if key.endswith(".weight") and state[key].ndim == 1]
    return [(name, state[f"{name}.weight"].float(), state[f"{name}.bias"].float()) for name in names]


def half_errors(weight, bias):
    """Relative errors of the bf16 gradients (input, weight, bias) against float64 without any rounding: ours, and
    those of a norm that saves its input."""
    c = len(weight)
    torch.manual_seed(c)
    x, dy = torch.randn(2, c, 14, 14), torch.randn(2, c, 14, 14)
    layer = InPlaceABN(c)
    layer.weight.data.copy_((weight.abs() - layer.eps).clamp(min=0))
    layer.bias.data.copy_(bias)
    plain = nn.Sequential(nn.BatchNorm2d(c), nn.LeakyReLU(0.01))
    plain[0].weight.data.copy_(layer.weight + layer.eps)
    plain[0].bias.data.copy_(bias)

    def grads(module, parameters, x, dy):
        x = x.clone().requires_grad_()
        return torch.autograd.grad((module(x * 1) * dy).sum(), [x, *parameters])

    exact_module = copy.deepcopy(plain).double()
    exact = grads(exact_module, exact_module.parameters(), x.double(), dy.double())
    errors = []
    for module, parameters in ((layer, [layer.weight, layer.bias]), (plain, list(plain.parameters()))):
        actual = grads(module, parameters, x.bfloat16(), dy.bfloat16())
        errors.append([float((a.double() - b).norm() / b.norm()) for a, b in zip(actual, exact, strict=True)])
    return errors, layer.keeps_input


def test_gradients_on_real_weights_are_at_most_twice_as_rough():
    """Layer by layer; and without the rule some layer would break the bound."""
    keeping = 0
    for name, weight, bias in real_norms():
        (ours, plain), kept = half_errors(weight, bias)
        keeping += kept
        assert all(a <= 2 * b for a, b in zip(ours, plain, strict=True)), (name, ours, plain)
    assert 0 < keeping < 20


def test_the_rule_is_needed(monkeypatch):
    monkeypatch.setattr(abn, "MAX_RATIO", math.inf)
    ratios = [ours[1] / plain[1] for (ours, plain), _ in (half_errors(w, b) for _, w, b in real_norms())]
    assert max(ratios) > 10


# ---- recomputation ----

@pytest.mark.parametrize("norm", [InPlaceABNSync, ABNSync])
def test_recomputation_reuses_statistics(norm):
    torch.manual_seed(0)
    first = nn.Sequential(nn.Conv2d(3, 6, 3), norm(6), nn.Conv2d(6, 4, 1), norm(4, activation="identity"))
    second = copy.deepcopy(first)
    x = torch.randn(3, 3, 7, 7, requires_grad=True)
    dy = torch.randn(3, 4, 5, 5)
    (first(x) * dy).sum().backward()
    expected = x.grad.clone()
    x.grad = None
    (recompute.checkpoint(second, x) * dy).sum().backward()
    exact = norm is InPlaceABNSync      # an ordinary norm takes ATen's kernel outside of a checkpoint
    compare = torch.equal if exact else lambda a, b: torch.allclose(a, b, rtol=1e-4, atol=1e-5)
    assert compare(x.grad, expected)
    for (name, a), (_, b) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert compare(a.grad, b.grad), name
    for (name, a), (_, b) in zip(first.named_buffers(), second.named_buffers(), strict=True):
        assert compare(a.float(), b.float()), name
    assert int(second[1].num_batches_tracked) == 1


def test_recomputation_in_replicas_exchanges_once():
    network = parts_network()

    class Checkpointed(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return recompute.checkpoint(self.inner, x)

    x, dy = torch.randn(5, 3, 9, 8).double(), torch.randn(5, 4, 7, 6).double()
    expected = whole_batch(copy.deepcopy(network), x, dy)
    actual = whole_batch(ThreadReplicas(Checkpointed(network), 2), x, dy)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_sizes_of_statistics_are_combined_exactly():
    parts = [torch.randn(n, 4).double() + k for k, n in enumerate((3, 10, 1))]
    counts, (means, variances) = torch.tensor([3.0, 10, 1]).double(), zip(*map(functions.local_statistics, parts),
                                                                         strict=True)
    count, mean, moment = combine(counts, torch.stack(means), counts[:, None] * torch.stack(variances))
    whole = torch.cat(parts)
    assert int(count) == 14 and not math.isnan(float(count))
    torch.testing.assert_close(mean, whole.mean(0))
    torch.testing.assert_close(moment, 14 * whole.var(0, correction=0))


def test_replicas_tell_the_layer_they_copy_whether_it_keeps_its_input():
    """And look no more often than it: copies are made anew for every pass."""
    layer = InPlaceABNSync(3)
    nn.init.constant_(layer.bias, 9.0)
    looks = []
    for _ in range(3):
        for copied in replicate(layer, 2):
            looks.append(copied._choice.passes_left == 0)
            run_replicas([lambda m=copied: m(torch.randn(2, 3, 4, 4).bfloat16())])
    assert layer.keeps_input and count_input_keeping_norms(layer) == (1, 1) and looks == [True] + [False] * 5
    layer.load_state_dict(InPlaceABNSync(3).state_dict())
    InPlaceABN.decide_kept_inputs([layer], 4)
    assert not layer.keeps_input


def test_norms_of_a_network_decide_in_one_read(monkeypatch):
    norms = [InPlaceABN(3) for _ in range(5)]
    nn.init.constant_(norms[2].bias, 9.0)
    reads, read = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: reads.append(1) or read(self))
    for _ in range(200):
        InPlaceABN.decide_kept_inputs(norms, 2)
        for norm in norms * 2:
            norm(torch.randn(2, 3, 2, 2).bfloat16())
    assert [norm.keeps_input for norm in norms] == [False, False, True, False, False]
    assert len(reads) == 2      # 400 passes, one look every 256
