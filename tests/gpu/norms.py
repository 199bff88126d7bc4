"""Activated batch norms on a device against PyTorch's batch norm and activation in float64 on the CPU."""

import itertools

import torch
import torch.nn.functional as F
from torch import nn

from libs import backend
from libs.abn import ABNSync, InPlaceABNSync, set_backend
from utils.parallel.processes import Processes
from utils.parallel.replicas import ThreadReplicas

from .rows import near
from .several import group_of_one

ACTIVATIONS = {"leaky_relu": lambda z: F.leaky_relu(z, 0.01), "elu": F.elu, "identity": lambda z: z}
# Largest distances of the output and of gradients: a few roundings of values of that type.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
KINDS = ("in place", "kept", "bn")


def make_norm(kind, channels, activation, device):
    """A norm with weights of both signs; `kept`: biases so large that in half precision it keeps its input."""
    norm = (ABNSync if kind == "bn" else InPlaceABNSync)(channels, activation=activation,
                                                                  activation_param=1.0 if activation == "elu" else 0.01)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 1.5, channels) * torch.tensor([1, -1]).repeat(channels // 2))
        norm.bias.copy_(torch.linspace(-1, 1, channels) * (8 if kind == "kept" else 0.5))
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    return norm.to(device)


def in_float64(norm, x, dy, activation, training):
    """Output, gradients of input, weight and bias, and running statistics of a norm, by PyTorch in float64."""
    x, dy, weight, bias, mean, var = (tensor.detach().cpu().double() for tensor in (
        x, dy, norm.weight, norm.bias, norm.running_mean, norm.running_var))
    x, weight, bias = (tensor.requires_grad_() for tensor in (x, weight, bias))
    scale = weight.abs() + norm.eps if isinstance(norm, InPlaceABNSync) else weight
    y = ACTIVATIONS[activation](F.batch_norm(x, mean, var, scale, bias, training, norm.momentum, norm.eps))
    y.backward(dy)
    return {"output": y, "dx": x.grad, "dweight": weight.grad, "dbias": bias.grad, "mean": mean, "var": var}


class Copy(nn.Module):
    """In place norms write on no leaf, and on no view of another replica's input."""

    def forward(self, x):
        return x * 1


def compare(device, kind, dtype, layout, activation, training, parts, shape=(8, 32, 33, 31)):
    """Raise AssertionError where a norm is further from float64 than its dtype explains.

    parts: "alone", "process" (a torch.distributed group of one), "replicas" (two threads on the device), "package", or
    "triton" and "process, triton", which compute channels-last maps by Triton's kernels.
    Returns the largest distance.
    """
    torch.manual_seed(0)
    x, dy = (torch.randn(shape).mul(2).add(offset).to(dtype).to(device).contiguous(memory_format=layout)
             for offset in (1, 0))
    norm = make_norm(kind, shape[1], activation, device).train(training)
    expected = in_float64(norm, x, dy, activation, training)
    set_backend(norm, next((choice for choice in ("package", "triton") if choice in parts), "torch"))
    if "process" in parts:
        norm._find_peers = lambda x: Processes()
    x.requires_grad_()
    module = nn.Sequential(Copy(), norm)
    y = (ThreadReplicas(module, 2) if parts == "replicas" else module)(x)
    y.backward(dy)
    if kind == "kept" and training and dtype != torch.float32:
        assert norm.keeps_input, "expected the norm to keep its input, found that it does not"
    assert y.dtype == dtype and y.is_contiguous(memory_format=layout), f"found {y.dtype}, strides {y.stride()}"
    actual = {"output": y, "dx": x.grad, "dweight": norm.weight.grad, "dbias": norm.bias.grad,
             "mean": norm.running_mean, "var": norm.running_var}
    return max(near(actual[name], expected[name], TOLERANCES[dtype], name) for name in expected)


def section(rows, device, shape=(8, 32, 33, 31)):
    """All combinations, a row for each dtype, kind and sharing: its largest distance."""
    sharing = ["alone", "process", "replicas"]
    if device.type == "cuda" and backend.package() is not None:
        sharing.append("package")
    with group_of_one(device):
        for parts, kind, dtype in itertools.product(sharing, KINDS, TOLERANCES):
            if parts == "package" and (kind != "in place" or dtype == torch.bfloat16):
                continue        # what the package does not do
            rows.check(f"{kind}, {str(dtype).removeprefix('torch.')}, {parts}", every_way, device, kind, dtype, parts,
                       shape)


def every_way(device, kind, dtype, parts, shape):
    """Both layouts, all activations, training and evaluation. Returns the largest distance in words."""
    ways = itertools.product((torch.contiguous_format, torch.channels_last), ACTIVATIONS, (True, False))
    worst, _, where = max((compare(device, kind, dtype, *way, parts, shape), number, way)
                          for number, way in enumerate(ways))
    return f"at most {worst:.1e}, {where[1]}, {'training' if where[2] else 'evaluation'}"
