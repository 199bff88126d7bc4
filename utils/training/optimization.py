"""Which parameters learn, by which steps, and at which rate."""

import copy
from collections import defaultdict
from dataclasses import dataclass

import torch

from ..common.errors import UserError

# What each keeps of every parameter: "step" is a number as a tensor, all else has the parameter's shape.
OPTIMIZERS = {"sgd": ("momentum_buffer",), "adamw": ("step", "exp_avg", "exp_avg_sq")}


def check(*, kind, momentum, ema, warmup_steps, num_steps):
    """Raise `UserError` for flags that would learn nothing; kind: the one of --optimizer."""
    if kind == "adamw" and momentum == 1:
        raise UserError("--momentum 1: expected less than 1 with --optimizer adamw")
    if ema == 1:
        raise UserError("--ema 1: expected less than 1, with which the average would never change")
    if warmup_steps >= num_steps:
        raise UserError(f"--warmup-steps {warmup_steps}: expected fewer than the {num_steps} steps of --num-steps")


def make_optimizer(network: torch.nn.Module, *, kind: str = "sgd", learning_rate: float = 1e-2, momentum: float = 0.9,
                   weight_decay: float = 1e-4, head_lr_factor: float = 1.0) -> torch.optim.Optimizer:
    """The optimizer of a network, in two groups: its backbone, and all that comes after.

    Parameters are numbered in the network's own order, which snapshots rely on; those that do not learn are among
    them, and stay as they are.

    Args:
        network: with a `backbone`, its first module.
        kind: `sgd`, or `adamw` (Loshchilov and Hutter, ICLR 2019).
        momentum: of SGD; of AdamW, the decay of the mean gradient, beta 1.
        head_lr_factor: the rate of all but the backbone, as a multiple of `learning_rate`.

    Raises ValueError for another kind.
    """
    if kind not in OPTIMIZERS:
        raise ValueError(f"kind of optimizer: expected one of {', '.join(OPTIMIZERS)}, found {kind!r}")
    backbone = list(network.backbone.parameters())
    others = list(network.parameters())[len(backbone):]
    groups = [{"params": backbone, "lr": learning_rate}, {"params": others, "lr": learning_rate * head_lr_factor}]
    if kind == "adamw":
        return torch.optim.AdamW(groups, learning_rate, (momentum, 0.999), weight_decay=weight_decay)
    return torch.optim.SGD(groups, learning_rate, momentum, weight_decay=weight_decay)


@dataclass(frozen=True)
class PolySchedule:
    """By which factor the rate of every parameter group is multiplied: (1 - step / num_steps) ^ power.

    Attributes:
        num_steps: of the run.
        power: of the paper, 0.9.
        warmup_steps: over so many steps at the beginning the factor also grows from 0, linearly.
    """

    num_steps: int
    power: float = 0.9
    warmup_steps: int = 0

    def factor(self, step):
        """At a step, from 0."""
        warmup = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        return warmup * (1 - step / self.num_steps) ** self.power


def average_of_weights(network):
    """A copy of the network, for `update_average`."""
    average = copy.deepcopy(network).requires_grad_(False)
    average.__dict__.pop("forward", None)       # a wrapper of others, such as apex, would call the original's
    return average


@torch.no_grad()
def update_average(average, network, decay, updates):
    """After a step: the average's weights become d · average + (1 - d) · weights, and its running statistics the
    network's own, with d = min(decay, (1 + updates) / (10 + updates)).

    So the weights of the start, which are random in the heads, are soon forgotten, as in TensorFlow's
    `ExponentialMovingAverage` with `num_updates`. PyTorch's `AveragedModel` has its count on the device, for which the
    host would wait in every step.

    Args:
        average: of `average_of_weights`.
        network: the one that learns.
        decay: at most.
        updates: of this average, before this one.
    """
    decay = min(decay, (1 + updates) / (10 + updates))
    torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), 1 - decay)
    for copied, buffers in zip(buffers_by_dtype(average), buffers_by_dtype(network), strict=True):
        torch._foreach_copy_(copied, buffers)


def buffers_by_dtype(network):
    """Its buffers as a list of each dtype: on a GPU one kernel copies those of a list."""
    kinds = defaultdict(list)
    for buffer in network.buffers():
        kinds[buffer.dtype].append(buffer)
    return list(kinds.values())
