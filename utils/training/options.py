"""Resolved options of a training run, which nothing changes afterward."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Training samples and how they are drawn. Fields are named like the flags.

    Attributes:
        input_size: (height, width) of the crops in pixels, rounded to a size that fits the network.
        batch_size: images per step, over all devices.
    """

    split: str
    data_list: list | None
    cache: str | None
    sampling: str
    random_mirror: bool
    random_scale: tuple | None
    rotate: float | None
    vertical_flip: bool
    quarter_turns: bool
    blur: float | None
    jitter: tuple | None
    input_size: tuple
    batch_size: int
    random_seed: int
    val_every: int
    val_split: str
    val_list: str | None
    patience: int


@dataclass(frozen=True, kw_only=True)
class LearningOptions:
    """The loss and the optimizer. Fields are named like the flags.

    Attributes:
        loss: as in `loss.terms.parse_terms`.
        loss_weights: {head: factor}.
        accumulate: number of parts in which a batch is processed.
    """

    optimizer: str
    learning_rate: float
    head_lr_factor: float
    momentum: float
    layer_decay: float | None
    weight_decay: float
    schedule: str
    power: float
    warmup_steps: int
    num_steps: int
    clip_gradient: float | None
    ema: float | None
    freeze: tuple
    loss: str
    loss_weights: dict
    class_weights: str | None
    accumulate: int
    ohem: int
    ohem_thres: float
    ohem_keep: int


@dataclass(frozen=True, kw_only=True)
class MachineOptions:
    """How a run computes. Fields are named like the flags.

    Attributes:
        amp: mixed precision, one of `utils.devices.precision.CHOICES`.
        cuda_graph: `off`, `auto` or `on`, as in `utils.devices.capture`.
        channels_last: whether feature maps are in channels-last memory format.
        kernels: one of `libs.backend.CHOICES`, as `libs.backend.choose` returns it.
    """

    amp: str
    opt_level: str
    channels_last: bool
    compile: bool
    cuda_graph: str
    kernels: str
    recompute: str

    @property
    def memory_format(self):
        return torch.channels_last if self.channels_last else torch.contiguous_format


@dataclass(frozen=True, kw_only=True)
class ResultOptions:
    """What a run writes, where, and after how many steps. Fields are named like the flags."""

    snapshot_dir: str
    save_pred_every: int
    keep: int | None
    log_every: int
    panel_every: int
    log: list
