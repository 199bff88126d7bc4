"""Triton's kernels of norms against PyTorch's batch norm and activation in float64."""

import pytest
import torch
import torch.nn.functional as F

from libs.abn import ABN, ABNSync, InPlaceABN, InPlaceABNSync, set_backend
from utils.parallel.processes import Processes
from utils.parallel.replicas import ReplicaGroup, Replicas

ACTIVATIONS = {"leaky_relu": lambda z: F.leaky_relu(z, 0.1), "relu": F.relu, "elu": lambda z: F.elu(z, 0.7),
               "identity": lambda z: z}
TRAINING = {"partial_statistics_kernel": 1, "merge_statistics_kernel": 1, "normalize_kernel": 1,
            "partial_sums_kernel": 1, "merge_sums_kernel": 1, "elements_kernel": 1}
EVALUATION = {name: 1 for name in TRAINING if "statistics" not in name}


def random_map(shape, dtype=torch.float32, offset=0.0):
    return (torch.randn(shape) * 2 + offset).to(dtype).contiguous(memory_format=torch.channels_last)


def make_norm(kind, channels, activation="leaky_relu", largest_bias=1.0, **options):
    """A norm with weights of both signs and running statistics of its own, computed by Triton's kernels."""
    param = {"leaky_relu": 0.1, "elu": 0.7}.get(activation, 1.0)
    norm = kind(channels, activation=activation, activation_param=param, **options)
    with torch.no_grad():
        if norm.affine:
            norm.weight.uniform_(0.5, 1.5)
            norm.weight[::3] *= -1
            norm.bias.uniform_(-largest_bias, largest_bias)
        if norm.track_running_stats:
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    set_backend(norm, "triton")
    return norm


def in_float64(norm, x, dy, batch=None, batch_dy=None):
    """[output, gradients of x, weight and bias, running mean and variance], of the first samples of a batch of several
    processes if it is given, but running statistics of all."""
    state = {name: tensor.double() for name, tensor in norm.state_dict().items()}
    batch = (x if batch is None else batch).double().requires_grad_()
    dy = (dy if batch_dy is None else batch_dy).double()
    weight, bias = (state[name].requires_grad_() if norm.affine else None for name in ("weight", "bias"))
    scale = weight.abs() + norm.eps if norm.affine and isinstance(norm, InPlaceABN) else weight
    running = [state.get("running_mean"), state.get("running_var")]
    y = ACTIVATIONS[norm.activation](F.batch_norm(
        batch, *running, scale, bias, norm.training or running[0] is None, norm.momentum or 1.0, norm.eps))
    leaves = [batch] + [weight, bias] * norm.affine
    gradients = torch.autograd.grad(y, leaves, dy)
    return [y.detach()[:len(x)], gradients[0][:len(x)], *gradients[1:], *running * norm.track_running_stats]


def by_layer(norm, x, dy):
    """The same of a layer."""
    leaf = x.clone().requires_grad_()
    y = norm(leaf.clone())
    output = y.detach().clone()
    y.backward(dy)
    parameters, buffers = dict(norm.named_parameters()), dict(norm.named_buffers())
    return [output, leaf.grad, *(parameters[name].grad for name in ("weight", "bias") if name in parameters),
            *(buffers[name] for name in ("running_mean", "running_var") if name in buffers)]


def assert_near(actual, expected, tolerance):
    for number, (one, other) in enumerate(zip(actual, expected, strict=True)):
        error = (one.double() - other).norm() / other.norm()
        assert error <= tolerance, f"value {number}: {error:.1e}"


@pytest.mark.parametrize("kind, activation, training, shape, options", [
    (InPlaceABN, "leaky_relu", True, (2, 20, 5, 7), {}),
    (InPlaceABN, "elu", True, (2, 20, 5, 7), {"momentum": None}),
    (InPlaceABNSync, "identity", True, (3, 1, 4, 5), {}),
    (InPlaceABN, "leaky_relu", False, (2, 20, 5, 7), {}),
    (InPlaceABN, "elu", True, (1, 6, 5, 3), {"affine": False}),
    (ABN, "relu", True, (2, 20, 5, 7), {}),
    (ABNSync, "elu", False, (1, 6, 5, 3), {}),
    (ABN, "leaky_relu", False, (1, 6, 5, 3), {"track_running_stats": False}),
    (ABN, "identity", True, (1, 6, 5, 3), {"affine": False})], ids=str)
def test_float32(kind, activation, training, shape, options, launches):
    norm = make_norm(kind, shape[1], activation, **options).train(training)
    x, dy = random_map(shape, offset=5.0), random_map(shape)
    expected = in_float64(norm, x, dy)
    assert_near(by_layer(norm, x, dy), expected, 1e-6)
    assert launches == (TRAINING if training or not norm.track_running_stats else EVALUATION)
    if norm.track_running_stats:
        assert norm.num_batches_tracked == int(training)


@pytest.mark.parametrize("largest_bias, keeps", [(0.5, False), (8.0, True)])
def test_float16(largest_bias, keeps, launches):
    """Within two roundings of its values; with large biases x̂ is not recovered from y."""
    norm = make_norm(InPlaceABN, 20, largest_bias=largest_bias)
    x, dy = random_map((2, 20, 5, 7), torch.float16), random_map((2, 20, 5, 7), torch.float16)
    expected = in_float64(norm, x, dy)
    actual = by_layer(norm, x, dy)
    assert actual[0].dtype == torch.float16 and norm.keeps_input == keeps and launches == TRAINING
    assert_near(actual, expected, 1e-3)


def test_a_map_of_many_tiles(launches, monkeypatch):
    """Several parts of unequal size, several tiles in a part, and more parts than are merged at once."""
    from libs.fused import norm as kernels
    for name, value in {"TILE": 256, "WIDTH": 16, "PROGRAMS": 18}.items():
        monkeypatch.setattr(kernels, name, value)
    monkeypatch.setattr(kernels, "vector_sizes", lambda parts: {"PARTS": 4, "CHANNELS": 16})
    norm = make_norm(InPlaceABN, 20)
    x, dy = random_map((2, 20, 9, 7), offset=100.0), random_map((2, 20, 9, 7))
    expected = in_float64(norm, x, dy)
    assert_near(by_layer(norm, x, dy), expected, 1e-5)
    assert kernels.split_rows(126, 20, kernels.tile_sizes(20, 128)) == (8, 16)


def test_many_channels(launches, large_tiles):
    norm = make_norm(InPlaceABN, 4096)
    x, dy = random_map((1, 4096, 2, 3)), random_map((1, 4096, 2, 3))
    expected = in_float64(norm, x, dy)
    assert_near(by_layer(norm, x, dy), expected, 1e-5)
    assert launches == TRAINING


class WithAnother(Processes):
    """Stands in for the exchange with another process, whose part of the batch and gradient are given."""

    def __init__(self, norm, x, dy, whole, whole_dy):
        whole, whole_dy = whole.double(), whole_dy.double()
        mean, var = whole.mean((0, 2, 3), keepdim=True), whole.var((0, 2, 3), keepdim=True, correction=0)
        normal = ((whole - mean) / (var + norm.eps).sqrt())
        z = normal * (norm.weight.double().abs() + norm.eps)[:, None, None] + norm.bias.double()[:, None, None]
        z = z.detach().requires_grad_()
        dz, = torch.autograd.grad(ACTIVATIONS[norm.activation](z), z, whole_dy)
        other, dz, normal = whole[len(x):], dz[len(x):], normal[len(x):]
        count = other[:, 0].numel()
        self.statistics = torch.cat([torch.full((1,), count), other.mean((0, 2, 3)),
                                     other.var((0, 2, 3), correction=0) * count])
        self.sums = torch.stack([dz.sum((0, 2, 3)), (normal * dz).sum((0, 2, 3))]).float()

    def gather(self, tensor):
        return [tensor, self.statistics]

    def all_reduce(self, tensor):
        return tensor + self.sums


def test_among_processes(launches, monkeypatch):
    """Parts of different sizes. Gradients of parameters are those of this part alone, which DDP averages."""
    norm = make_norm(InPlaceABNSync, 6)
    whole, whole_dy = random_map((3, 6, 5, 4), offset=3.0), random_map((3, 6, 5, 4))
    x, dy = whole[:1], whole_dy[:1]
    expected = in_float64(norm, x, dy, whole, whole_dy)
    peers = WithAnother(norm, x, dy, whole, whole_dy)
    monkeypatch.setattr(norm, "_find_peers", lambda x: peers)
    output, dx, d_weight, d_bias, mean, var = by_layer(norm, x, dy)
    sums = peers.sums.double()
    d_weight = d_weight + torch.where(norm.weight < 0, -sums[1], sums[1])
    assert_near([output, dx, d_weight, d_bias + sums[0], mean, var], expected, 1e-5)
    assert launches == EVALUATION       # on a CPU PyTorch computes the statistics of processes


def test_packed_statistics(launches):
    """What processes exchange, and the mean of each sample."""
    from libs.fused import norm as kernels
    x = random_map((3, 6, 5, 4), offset=50.0)
    packed, sample_means = kernels.statistics(x, 1e-5, by_sample=True)
    mean, invstd, count = kernels.split_statistics(packed)
    assert_near([mean, invstd, sample_means, count], [
        x.double().mean((0, 2, 3)), (x.double().var((0, 2, 3), correction=0) + 1e-5).rsqrt(), x.double().mean((2, 3)),
        torch.tensor([60.0])], 1e-6)


def test_other_maps_are_left_to_pytorch(launches):
    """The same layer for another layout, for float64, and for vectors."""
    norm = make_norm(InPlaceABN, 6)
    for x in (torch.randn(2, 6, 5, 4), random_map((2, 6, 5, 4)).double(), torch.randn(9, 6)):
        assert norm.to(x.dtype)(x).shape == x.shape
    assert not launches


def test_replicas_are_left_to_pytorch(launches, monkeypatch):
    norm, x = make_norm(InPlaceABNSync, 6), random_map((2, 6, 5, 4))
    assert norm._fuses(x)
    monkeypatch.setattr("libs.synchronize.find_peers", lambda group=None: Replicas(ReplicaGroup(2), 0))
    assert not norm._fuses(x)


def test_a_single_value_per_channel_is_refused(launches):
    with pytest.raises(ValueError, match="expected more than one value per channel in training"):
        make_norm(InPlaceABN, 6)(random_map((1, 6, 1, 1)))


def test_not_a_number_is_seen(launches):
    for activation in ("leaky_relu", "elu", "relu"):
        norm = make_norm(ABN, 3, activation).eval()
        x = random_map((1, 3, 2, 2))
        x[0, 1, 0, 0] = float("nan")
        with torch.no_grad():
            assert norm(x).isnan().sum() == 1
