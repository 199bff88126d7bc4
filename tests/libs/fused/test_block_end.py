"""Triton's kernels of the ends of residual blocks against the same blocks by PyTorch's operators in float64."""

import copy
import dataclasses
from functools import partial

import pytest
import torch
from torch import nn

from libs.abn import ABN, ABNSync, InPlaceABN, InPlaceABNSync, set_backend
from libs.recompute import checkpoint
from networks.backbones import names
from networks.backbones.eca import ECA
from networks.backbones.names import ACTIVATIONS
from networks.backbones.resnet import BasicBlock, Bottleneck, activation_of
from networks.build import build_network

from .test_norm import assert_near, random_map

TRAINING = {"partial_statistics_kernel": 1, "merge_statistics_kernel": 1, "end_block_kernel": 1,
            "partial_end_sums_kernel": 1, "merge_sums_kernel": 1, "end_elements_kernel": 1}
WITH_ATTENTION = {name: 1 for name in [*TRAINING, "attention_kernel", "logit_gradient_kernel",
                                       "attention_gradient_kernel"] if name != "merge_sums_kernel"}


def randomize(network):
    """Weights of both signs, and running statistics that are not those of the batch."""
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, ABN):
                module.weight.uniform_(0.5, 1.5)
                module.weight[::3] *= -1
                module.bias.uniform_(-0.5, 0.5)
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
            if isinstance(module, ECA):
                module.conv.weight.normal_()
    return network


def make_block(kind, norm, activation, kernel, in_channels=32, width=8):
    def make_norm(channels, activation=activation):
        return norm(channels, activation=activation)

    attention = None if kernel is None else lambda channels: ECA(kernel)
    downsample = None if in_channels == width * kind.expansion else nn.Sequential(
        nn.Conv2d(in_channels, width * kind.expansion, 1, bias=False), make_norm(width * kind.expansion, "identity"))
    return randomize(kind(in_channels, width, 1, 1, 1, make_norm, activation=ACTIVATIONS[activation],
                          attention=attention, downsample=downsample))


def values(network, loss_of, *inputs):
    """Outputs, gradients of inputs and parameters, and buffers."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    output, loss = loss_of(network, *inputs)
    loss.backward()
    return [output.detach(), *(x.grad for x in inputs), *(weight.grad for weight in network.parameters()),
            *(buffer for name, buffer in network.named_buffers() if "running" in name)]


def loss_of_block(block, x, dy):
    output = block(x * 1)
    return output, (output * dy).sum()


@pytest.mark.parametrize("kind, norm, activation, kernel, training, in_channels", [
    (Bottleneck, InPlaceABNSync, "leaky_relu", 5, True, 32),
    (Bottleneck, ABNSync, "relu", None, True, 16),
    (BasicBlock, InPlaceABN, "leaky_relu", None, True, 8),
    (BasicBlock, ABN, "relu", 3, True, 8),
    (BasicBlock, InPlaceABNSync, "leaky_relu", 3, False, 16),
    (Bottleneck, ABN, "relu", None, False, 32)], ids=str)
def test_blocks(kind, norm, activation, kernel, training, in_channels, launches, large_tiles):
    block = make_block(kind, norm, activation, kernel, in_channels).train(training)
    x, dy = random_map((2, in_channels, 5, 3)), random_map((2, 8 * kind.expansion, 5, 3))
    expected = values(copy.deepcopy(block).double(), loss_of_block, x.double(), dy.double())
    set_backend(block, "triton")
    assert_near(values(block, loss_of_block, x, dy), expected, 2e-6)
    assert launches["end_block_kernel"] == launches["end_elements_kernel"] == 1
    assert launches["normalize_kernel"] == sum(isinstance(module, ABN) for module in block.modules()) - 1


@pytest.mark.parametrize("activation, param, taps, dtype, tolerance", [
    ("leaky_relu", 0.1, 9, torch.float32, 2e-6), ("elu", 0.7, 3, torch.float32, 2e-6),
    ("identity", 1.0, None, torch.float32, 2e-6), ("leaky_relu", 0.1, 3, torch.float16, 1e-3)])
def test_one_end(activation, param, taps, dtype, tolerance, launches, monkeypatch):
    """In many tiles. The other activations, float16 and channels that need neighbors of another tile."""
    from libs.fused import norm as kernels
    for name, value in {"TILE": 512, "WIDTH": 16, "PROGRAMS": 8}.items():
        monkeypatch.setattr(kernels, name, value)
    norm = randomize(InPlaceABN(20, activation="identity"))
    x, shortcut, dy = (random_map((2, 20, 7, 5), dtype, offset=offset) for offset in (3.0, 0.0, 0.0))
    taps = None if taps is None else torch.randn(1, 1, taps, requires_grad=True)

    def by_kernels():
        leaves = [x.clone().requires_grad_(), shortcut.clone().requires_grad_()]
        y = norm.end_block(*leaves, taps, activation, param)
        y.backward(dy)
        return [y.detach(), *(leaf.grad for leaf in leaves), norm.weight.grad, norm.bias.grad, norm.running_var,
                *([] if taps is None else [taps.grad])]

    def in_float64():
        leaves = [tensor.detach().double().requires_grad_() for tensor in (x, shortcut, norm.weight, norm.bias)]
        var = norm.running_var.double()
        y = nn.functional.batch_norm(leaves[0], torch.zeros_like(var), var, leaves[2].abs() + norm.eps, leaves[3], True)
        if taps is not None:
            leaves.append(taps.detach().double().requires_grad_())
            logits = nn.functional.conv1d(y.mean((2, 3))[:, None], leaves[4], padding=taps.shape[2] // 2)[:, 0]
            y = y * torch.sigmoid(logits)[:, :, None, None]
        y = {"leaky_relu": partial(nn.functional.leaky_relu, negative_slope=param), "identity": lambda z: z,
             "elu": partial(nn.functional.elu, alpha=param)}[activation](y + leaves[1])
        return [y.detach(), *(grad := torch.autograd.grad(y, leaves, dy.double()))[:4], var, *grad[4:]]

    expected = in_float64()
    assert_near(by_kernels(), expected, tolerance)
    assert launches == (TRAINING if taps is None else WITH_ATTENTION)


@pytest.mark.parametrize("norm", [InPlaceABN, ABN])
def test_no_more_is_kept(norm, launches, large_tiles):
    """Of in-place norms the same maps, of others one less of six. Vectors are small beside them."""
    block, kept = make_block(BasicBlock, norm, "leaky_relu", 3, 4, 4), {}
    for choice in ("torch", "triton"):
        set_backend(block, choice)
        storages = {}
        with torch.autograd.graph.saved_tensors_hooks(
                lambda tensor, storages=storages: storages.update({tensor.untyped_storage().data_ptr(): tensor}),
                lambda nothing: nothing):
            block(random_map((2, 4, 33, 31)).requires_grad_() * 1)
        kept[choice] = sum(tensor.untyped_storage().nbytes() for tensor in storages.values())
    assert launches["end_block_kernel"] == 1
    assert kept["triton"] <= kept["torch"] * (1.02 if norm is InPlaceABN else 0.84), kept


def test_recomputation(launches):
    """The backward pass computes the end again, but neither its statistics nor running ones."""
    block = make_block(BasicBlock, InPlaceABN, "leaky_relu", 3, 8)
    x, dy = random_map((2, 8, 5, 3)), random_map((2, 8, 5, 3))
    expected = values(copy.deepcopy(block).double(), loss_of_block, x.double(), dy.double())
    set_backend(block, "triton")
    assert_near(values(block, lambda block, x, dy: loss_of_block(partial(checkpoint, block), x, dy), x, dy), expected,
                2e-6)
    assert launches["end_block_kernel"] == 2 and launches["partial_statistics_kernel"] == 2


def test_a_network(launches, large_tiles, monkeypatch):
    """Loss and gradients of a network with ACF module, of one block per stage."""
    small = dataclasses.replace(names.BACKBONES["eca_resnet18"], depths=(1, 1, 1, 1))
    monkeypatch.setitem(names.BACKBONES, "eca_resnet18", small)
    network = randomize(build_network("acfnet_resnet", 5, "eca_resnet18"))
    for module in network.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0

    def loss_of(network, images):
        logits = network(images)
        loss = sum((head ** 2).mean() for head in logits.values())
        return loss, loss

    images = random_map((2, 3, 17, 17))
    expected = values(copy.deepcopy(network).double(), loss_of, images.double())
    set_backend(network, "triton")
    network = network.to(memory_format=torch.channels_last)
    actual = values(network, loss_of, images)
    assert launches["end_block_kernel"] == 4 and launches["elements_kernel"] > 8
    assert_near(actual, expected, 1e-3)


def test_other_blocks_are_left_to_pytorch(launches):
    """Another activation of the norm or of the block, and maps that are not channels-last."""
    norm = InPlaceABN(8)
    set_backend(norm, "triton")
    maps = random_map((2, 8, 5, 3)), random_map((2, 8, 5, 3))
    assert not norm.fuses_end(*maps)
    norm.activation = "identity"
    assert norm.fuses_end(*maps) and not norm.fuses_end(maps[0], maps[1].contiguous())
    assert not norm.fuses_end(maps[0], maps[1].half())
    assert activation_of(nn.SiLU()) is None and activation_of(nn.LeakyReLU(0.2)) == ("leaky_relu", 0.2)
