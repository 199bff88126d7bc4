"""Networks by name. This is the only place that knows sizes."""

from functools import partial

import torch
from torch import nn

from libs.abn import NORMS

from .acfnet import ACFNet, BaseNet, auxiliary_head, check_ablations
from .aspp import ASPP
from .eca import ECA
from .resnet import CHECKPOINTS, BasicBlock, Bottleneck, ResNet

# ECA kernel sizes of stages 1 to 4 are in the names of the files ECANet released: 18 k3577, 50 k3557, others k3357.
BACKBONES = {
    "eca_resnet18": {"block": BasicBlock, "depths": (2, 2, 2, 2), "eca_kernels": (3, 5, 7, 7)},
    "eca_resnet34": {"block": BasicBlock, "depths": (3, 4, 6, 3), "eca_kernels": (3, 3, 5, 7)},
    "eca_resnet50": {"block": Bottleneck, "depths": (3, 4, 6, 3), "eca_kernels": (3, 5, 5, 7)},
    "eca_resnet101": {"block": Bottleneck, "depths": (3, 4, 23, 3), "eca_kernels": (3, 3, 5, 7)},
    "eca_resnet152": {"block": Bottleneck, "depths": (3, 8, 36, 3), "eca_kernels": (3, 3, 5, 7)},
    "resnet18": {"block": BasicBlock, "depths": (2, 2, 2, 2), "eca_kernels": None},
    "resnet34": {"block": BasicBlock, "depths": (3, 4, 6, 3), "eca_kernels": None},
    "resnet50": {"block": Bottleneck, "depths": (3, 4, 6, 3), "eca_kernels": None},
    "resnet101": {"block": Bottleneck, "depths": (3, 4, 23, 3), "eca_kernels": None},
    "resnet152": {"block": Bottleneck, "depths": (3, 8, 36, 3), "eca_kernels": None},
}
STEMS = {"7x7": None, "64-64-128": (64, 64, 128), "32-32-64": (32, 32, 64)}
ACTIVATIONS = {"leaky_relu": partial(nn.LeakyReLU, 0.01, inplace=True), "relu": partial(nn.ReLU, inplace=True)}
# What each model is: context between backbone and heads, and whether the ACF module follows.
MODELS = {
    "acfnet": {"context": "aspp", "acf": True},
    "acfnet_resnet": {"context": "conv", "acf": True},
    "base": {"context": "aspp", "acf": False},
}


def build_backbone(backbone, norm="inplace_abn", activation="leaky_relu", stem="7x7",
                   average_downsample=False, eca_kernels=None, output_stride=8, recompute="none"):
    """The `ResNet` of that name. `eca_kernels`: k of stages 1 to 4, instead of the released ones."""
    for name, value, choices in (("backbone", backbone, BACKBONES), ("norm", norm, NORMS),
                                 ("activation", activation, ACTIVATIONS), ("stem", stem, STEMS)):
        _check(isinstance(value, str) and value in choices, name, value, f"one of {', '.join(choices)}")
    _check(isinstance(average_downsample, bool), "average_downsample", average_downsample, "true or false")
    if activation == "relu" and norm != "bn":
        raise ValueError("activation relu: expected norm bn, found "
                         f"{norm}: an in-place norm cannot recover its input from a ReLU's output")
    block, depths, released = BACKBONES[backbone].values()
    if eca_kernels is not None:
        _check(released is not None, "eca_kernels", eca_kernels, f"none, as {backbone} has no channel attention,")
        _check(isinstance(eca_kernels, list | tuple) and len(eca_kernels) == 4 and all(
            type(k) is int and k > 0 and k % 2 for k in eca_kernels), "eca_kernels", eca_kernels, "four odd numbers")
    kernels = eca_kernels or released
    attention = None if kernels is None else lambda channels, stage: ECA(kernels[stage])
    return ResNet(block, depths, norm_maker(norm, activation), ACTIVATIONS[activation], attention,
                  STEMS[stem], average_downsample, output_stride, recompute)


def recompute_choices(backbone):
    """What `recompute` can be with a backbone: `light` drops what only bottlenecks have."""
    return [kind for kind in CHECKPOINTS if kind != "light" or BACKBONES[backbone]["block"] is Bottleneck]


def norm_maker(norm, activation):
    """`make(channels, activation=...)` → a norm with the network's activation, or with the one named."""
    return lambda channels, activation=activation: NORMS[norm](channels, activation=activation)


def build_network(model="acfnet", num_classes=19, backbone="eca_resnet101", norm="inplace_abn",
                  activation="leaky_relu", stem="7x7", average_downsample=False, eca_kernels=None,
                  output_stride=8, recompute="none", ablations=()):
    """Build a network by name.

    Args:
        model: a key of `MODELS`: `acfnet` (ASPP), `acfnet_resnet` (3×3 convolution), `base` (no ACF).
        num_classes: N.
        backbone: a key of `BACKBONES`.
        norm: `inplace_abn` or `bn`.
        activation: `leaky_relu` (slope 0.01), or `relu` with norm `bn`.
        stem: a key of `STEMS`.
        average_downsample: average pooling in the shortcuts that stride.
        eca_kernels: k of stages 1 to 4; None for the released ones.
        output_stride: 8 or 16.
        recompute: `none`, `light` or `full`: memory for time, see `networks.resnet.ResNet`.
        ablations: names of `networks.acfnet.ABLATIONS`, for models with ACF; none is the network as published.

    Returns:
        nn.Module. Training: images (B, 3, H, W) → {"fine", "coarse", "aux"}, logits (B, N, h, w) with
        h = ceil(H / output_stride). Evaluation: {"fine", "coarse"}. `base` has no "coarse".
        Raises ValueError naming the argument that is none of these.
    """
    _check(isinstance(model, str) and model in MODELS, "model", model, f"one of {', '.join(MODELS)}")
    _check(type(num_classes) is int and num_classes > 0, "num_classes", num_classes, "a whole number above 0")
    check_ablations(ablations)
    if ablations and not MODELS[model]["acf"]:
        raise ValueError(f"ablations: expected a model with ACF, found {model}")
    trunk = build_backbone(backbone, norm, activation, stem, average_downsample, eca_kernels, output_stride,
                           recompute)
    make_norm = norm_maker(norm, activation)
    *_, stage3, stage4 = trunk.channels
    channels = stage4 // 4          # 512 for a ResNet-101, as in the paper; 128 for a ResNet-18
    if MODELS[model]["context"] == "aspp":
        context = ASPP(stage4, channels, make_norm)
    else:
        context = nn.Sequential(nn.Conv2d(stage4, channels, 3, padding=1, bias=False), make_norm(channels))
    aux = auxiliary_head(stage3, stage3 // 2, num_classes, make_norm)
    if MODELS[model]["acf"]:
        return ACFNet(trunk, context, channels, num_classes, aux, channels, make_norm, tuple(ablations))
    return BaseNet(trunk, context, channels, num_classes, aux)


def meta_network(**arguments):
    """`build_network` without memory: names, shapes and dtypes of the tensors alone. For arguments from a file."""
    with torch.device("meta"):
        return build_network(**arguments)


def _check(holds, name, value, expected):
    if not holds:
        raise ValueError(f"{name}: expected {expected}, found {value!r:.60}")
