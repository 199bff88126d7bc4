"""Triton's kernels on a device: norms and ends of blocks against float64 on the CPU, and the time of each operator.

The predictions are computed from the bytes of a step of 8 crops of 769×769 in
bf16 (counted on fake tensors) and the memory rates of the GPUs; nothing of it was measured before.
"""

import copy
import itertools

import torch
import torch.nn.functional as F
from torch import nn

from libs.abn import InPlaceABNSync, set_backend
from libs.fused.launch import interpreted, obstacle
from networks.backbones.eca import ECA
from utils.inference.timing import median_ms

from .norms import KINDS, TOLERANCES, every_way
from .rows import near
from .several import group_of_one

# {operator: (maps moved by Triton's kernels, by PyTorch's operators, predicted change of a step)}
PREDICTIONS = {"norm": (8, 15, "-9 ms a step on an H100, -6 on an H200"),
               "end of a block": (12, 23, "-21 ms a step on an H100, -15 on an H200")}


class Norm(nn.Module):
    """The norm of a convolution, whose output is `x * 1`."""

    def __init__(self, channels):
        super().__init__()
        self.norm = InPlaceABNSync(channels)

    def forward(self, x, shortcut):
        return self.norm(x * 1)


class End(nn.Module):
    """The end of a residual block."""

    def __init__(self, channels):
        super().__init__()
        self.norm, self.eca = InPlaceABNSync(channels, activation="identity"), ECA(5)

    def forward(self, x, shortcut):
        x = x * 1
        if self.norm.fuses_end(x, shortcut):
            return self.norm.end_block(x, shortcut, self.eca.conv.weight, "leaky_relu", 0.01)
        return F.leaky_relu(self.eca(self.norm(x), shortcut), 0.01, inplace=True)


def make_maps(shape, dtype, device):
    """x, shortcut and the gradient of the output."""
    maps = [torch.randn(shape).add(offset).to(device, dtype).contiguous(memory_format=torch.channels_last)
            for offset in (1, 0, 0)]
    return [x.requires_grad_(number < 2) for number, x in enumerate(maps)]


def against_float64(device, dtype, shape):
    """Raise AssertionError where the end of a block is further from float64 than its dtype explains."""
    torch.manual_seed(0)
    worst = 0.0
    for training in (True, False):
        end, maps = End(shape[1]).train(training), make_maps(shape, dtype, device)
        expected = all_values(copy.deepcopy(end).double(), *(x.detach().cpu().double() for x in maps))
        set_backend(end, "triton")
        actual = all_values(end.to(device), *maps)
        worst = max(worst, *(near(actual[name], expected[name], TOLERANCES[dtype], name) for name in expected))
    return f"at most {worst:.1e}"


def all_values(end, x, shortcut, gradient):
    x, shortcut = x.detach().requires_grad_(), shortcut.detach().requires_grad_()
    output = end(x, shortcut)
    output.backward(gradient)
    return {"output": output, "dx": x.grad, "dshortcut": shortcut.grad, "dattention": end.eca.conv.weight.grad,
            "dweight": end.norm.weight.grad, "dbias": end.norm.bias.grad, "mean": end.norm.running_mean}


def median_of(kind, choice, device, shape, runs):
    """Milliseconds of a forward and backward pass in bf16."""
    module, (x, shortcut, gradient) = kind(shape[1]).to(device), make_maps(shape, torch.bfloat16, device)
    set_backend(module, choice)
    return median_ms(lambda: module(x, shortcut).backward(gradient), runs, device)["ms"]


def usable(device):
    """Raise AssertionError if the kernels cannot be used."""
    reason = obstacle(device)
    assert reason is None, reason
    return "all operators agree with PyTorch's"


def section(rows, device, shape=(8, 512, 97, 97), runs=20):
    """Agreement, and the time of each operator as a ratio to PyTorch's beside the ratio of the maps that they move."""
    if device.type == "cpu" and not interpreted():
        rows.note("Triton's kernels", "not checked: they need a GPU, or TRITON_INTERPRET=1 on a CPU")
        return
    rows.check("the check at the start of a training", usable, device)
    on_gpu = device.type == "cuda"      # elsewhere one of each
    with group_of_one(device):
        for parts, kind, dtype in itertools.product(("triton", "process, triton"), KINDS, TOLERANCES):
            if on_gpu or (parts, kind, dtype) == ("triton", "in place", torch.float32):
                rows.check(f"norm, {kind}, {str(dtype).removeprefix('torch.')}, {parts}", every_way, device, kind,
                           dtype, parts, (8, 32, 33, 31) if on_gpu else (2, 8, 5, 3))
    for dtype in TOLERANCES if on_gpu else (torch.float16,):
        rows.check(f"end of a block, {str(dtype).removeprefix('torch.')}", against_float64, device, dtype,
                   (2, 40, 13, 11) if on_gpu else (2, 8, 5, 3))
    for (name, (ours, theirs, step)), kind in zip(PREDICTIONS.items(), (Norm, End), strict=True):
        by_triton, by_torch = (median_of(kind, choice, device, shape, runs) for choice in ("triton", "torch"))
        rows.goal(f"{name}: time / time by PyTorch's operators", f"{ours / theirs:.2f}, predicted; {step}",
                  f"{by_triton / by_torch:.2f} ({by_triton:.2f} / {by_torch:.2f} ms, both with a copy of x)",
                  by_triton / by_torch <= 1.1 * ours / theirs)
