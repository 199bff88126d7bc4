"""Optimizers, the learning rate schedule, and the moving average of the weights."""

import copy
import itertools
import math
from collections import defaultdict
from dataclasses import dataclass

import torch

from ..common.errors import UserError
from ..common.messages import logger

# State of each optimizer per parameter: "step" is a scalar tensor, the others have the shape of the parameter.
OPTIMIZERS = {"sgd": ("momentum_buffer",), "adamw": ("step", "exp_avg", "exp_avg_sq")}
SCHEDULES = ("poly", "cosine", "constant")


def check(*, kind, momentum, ema, warmup_steps, num_steps):
    """Raise `UserError` for flags with which nothing would be learned; kind: value of --optimizer."""
    if kind == "adamw" and momentum == 1:
        raise UserError("--momentum 1: expected less than 1 with --optimizer adamw")
    if ema == 1:
        raise UserError("--ema 1: expected less than 1, with which the average would never change")
    if warmup_steps >= num_steps:
        raise UserError(f"--warmup-steps {warmup_steps}: expected fewer than the {num_steps} steps of --num-steps")


def make_optimizer(network: torch.nn.Module, *, kind: str = "sgd", learning_rate: float = 1e-2, momentum: float = 0.9,
                   weight_decay: float = 1e-4, head_lr_factor: float = 1.0,
                   layer_decay: float | None = None) -> torch.optim.Optimizer:
    """Make the optimizer of a network with two parameter groups: the backbone and all other parameters.

    With layer decay the backbone has several groups, of successive parameters with the same learning rate.

    The parameters keep the order of the network, which snapshots rely on. Frozen parameters are included; the optimizer
    does not change them.

    Args:
        network: with a `backbone` as its first module.
        kind: `sgd`, or `adamw` (Loshchilov and Hutter, ICLR 2019).
        learning_rate: of the backbone.
        momentum: of SGD; for AdamW beta 1, the decay of the mean gradient.
        weight_decay: of all parameters.
        head_lr_factor: learning rate of the other parameters, as a multiple of `learning_rate`.
        layer_decay: factor of the learning rate from each layer of a `TimmBackbone` to the layer before it (Bao et al.,
            "BEiT", ICLR 2022); None for one learning rate.

    Raises:
        ValueError: for another kind.
    """
    if kind not in OPTIMIZERS:
        raise ValueError(f"kind of optimizer: expected one of {', '.join(OPTIMIZERS)}, found {kind!r}")
    backbone = list(network.backbone.parameters())
    others = list(network.parameters())[len(backbone):]
    depths = [0] * len(backbone) if layer_decay is None else network.backbone.layers_to_head()
    groups = [{"params": [weight for weight, _ in layer], "lr": learning_rate * (layer_decay or 1.0) ** depth}
              for depth, layer in itertools.groupby(zip(backbone, depths, strict=True), lambda pair: pair[1])]
    if layer_decay is not None:
        rates = [group["lr"] for group in groups]
        logger.info(f"--layer-decay {layer_decay:g}: learning rates of the backbone from {min(rates):.1e} to "
                    f"{max(rates):.1e}")
    groups.append({"params": others, "lr": learning_rate * head_lr_factor})
    fused = True if backbone[0].is_cuda else None       # a few kernels for all weights
    if kind == "adamw":
        optimizer = torch.optim.AdamW(groups, learning_rate, (momentum, 0.999), weight_decay=weight_decay, fused=fused)
    else:
        optimizer = torch.optim.SGD(groups, learning_rate, momentum, weight_decay=weight_decay, fused=fused)
    if fused:
        optimizer.register_step_pre_hook(prepare_for_fused_step)
    return optimizer


@torch.no_grad()
def prepare_for_fused_step(optimizer, *args):
    """Give gradients and optimizer state the strides of their parameters, which fused optimizers require.

    The gradient of a weight with one pixel or one input channel may have other strides, and the state comes from a
    snapshot that was written with or without --channels-last. A missing momentum starts at 0, which is the same step:
    with fp16, PyTorch's fused SGD would keep uninitialized memory as momentum if the first gradients overflow.
    """
    for group in optimizer.param_groups:
        for weight in group["params"]:
            if group.get("momentum") and optimizer.state[weight].get("momentum_buffer") is None:
                optimizer.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
            if weight.grad is not None and weight.grad.stride() != weight.stride():
                weight.grad = torch.empty_like(weight).copy_(weight.grad)
            for name, value in optimizer.state.get(weight, {}).items():
                if value is not None and value.shape == weight.shape and value.stride() != weight.stride():
                    optimizer.state[weight][name] = torch.empty_like(weight).copy_(value)


@dataclass(frozen=True)
class Schedule:
    """Schedule of a factor by which the learning rate of each parameter group is multiplied.

    Attributes:
        num_steps: of the run.
        power: of the poly schedule; 0.9 in the paper.
        warmup_steps: number of steps at the beginning over which the factor also grows linearly from 0.
        kind: of `SCHEDULES`; poly: (1 - step / num_steps) ^ power; cosine: (1 + cos(π · step / num_steps)) / 2;
            constant: 1.
    """

    num_steps: int
    power: float = 0.9
    warmup_steps: int = 0
    kind: str = "poly"

    def factor(self, step):
        """Return the factor of a step; the first step is 0."""
        warmup = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        if self.kind == "constant":
            return warmup
        if self.kind == "cosine":
            return warmup * (1 + math.cos(math.pi * step / self.num_steps)) / 2
        return warmup * (1 - step / self.num_steps) ** self.power


def average_of_weights(network):
    """Copy a network for `update_average`."""
    average = copy.deepcopy(network).requires_grad_(False)
    average.__dict__.pop("forward", None)       # set by a library such as apex; it would call the original network
    return average


@torch.no_grad()
def update_average(average, network, decay, updates):
    """Update the moving average of the weights after a step.

    The average becomes d · average + (1 - d) · weights, with d = min(decay, (1 + updates) / (10 + updates)); running
    statistics are copied from the network. The first updates have a small d, so that the initial values, which are
    random in the heads, soon lose their influence, as in TensorFlow's `ExponentialMovingAverage` with `num_updates`.
    PyTorch's `AveragedModel` has its count of updates on the device, for which the host would wait in every step.

    Args:
        average: of `average_of_weights`.
        network: in training.
        decay: largest decay d.
        updates: number of earlier updates of this average.
    """
    decay = min(decay, (1 + updates) / (10 + updates))
    torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), 1 - decay)
    for targets, sources in zip(buffers_by_dtype(average), buffers_by_dtype(network), strict=True):
        torch._foreach_copy_(targets, sources)


def buffers_by_dtype(network):
    """Group the buffers of a network into a list per dtype, which a single kernel can copy on a GPU."""
    groups = defaultdict(list)
    for buffer in network.buffers():
        groups[buffer.dtype].append(buffer)
    return list(groups.values())
