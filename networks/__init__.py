"""Networks by name. This is the only place that knows sizes."""

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from libs.abn import NORMS
from utils.inference import GRID

from .acf import DROPOUT, ACFHead
from .acfnet import PlainHead, SegmentationNet, auxiliary_head
from .aspp import ASPP
from .convolution import convolution
from .criss_cross import CrissCross
from .dual_attention import DualAttention, DualHead
from .eca import ECA
from .object_context import BaseObjectContext, PyramidObjectContext
from .ocr import OCRHead, OCRNet
from .psp import PyramidPooling
from .resnet import RECOMPUTE, BasicBlock, Bottleneck, ResNet
from .timm_backbone import TimmBackbone, find_plan, is_timm

STEMS = {"7x7": None, "64-64-128": (64, 64, 128), "32-32-64": (32, 32, 64)}
ACTIVATIONS = {"leaky_relu": partial(nn.LeakyReLU, 0.01, inplace=True), "relu": partial(nn.ReLU, inplace=True)}


@dataclass(frozen=True)
class Backbone:
    """A residual network.

    Attributes:
        block: `BasicBlock` or `Bottleneck`.
        depths: blocks of stages 1 to 4.
        eca_kernels: k of the channel attention in stages 1 to 4, as ECANet released it; None without attention.
    """

    block: type
    depths: tuple
    eca_kernels: tuple | None = None

    def build(self, *, norm, activation, stem, average_downsample, eca_kernels, output_stride, recompute):
        """The `ResNet`; norm: makes norms, eca_kernels: instead of the released ones; the rest by name."""
        kernels = eca_kernels or self.eca_kernels
        attention = None if kernels is None else lambda channels, stage: ECA(kernels[stage])
        return ResNet(self.block, self.depths, norm, ACTIVATIONS[activation], attention, STEMS[stem],
                      average_downsample, output_stride, recompute)

    def recompute_choices(self):
        """What `recompute` can be: `light` drops what only bottlenecks have."""
        return [kind for kind in RECOMPUTE if kind != "light" or self.block is Bottleneck]


BACKBONE = "eca_resnet101"      # where nobody says another
# ECA kernel sizes are in the names of the files ECANet released: 18 k3577, 50 k3557, others k3357.
BACKBONES = {
    "eca_resnet18": Backbone(BasicBlock, (2, 2, 2, 2), (3, 5, 7, 7)),
    "eca_resnet34": Backbone(BasicBlock, (3, 4, 6, 3), (3, 3, 5, 7)),
    "eca_resnet50": Backbone(Bottleneck, (3, 4, 6, 3), (3, 5, 5, 7)),
    "eca_resnet101": Backbone(Bottleneck, (3, 4, 23, 3), (3, 3, 5, 7)),
    "eca_resnet152": Backbone(Bottleneck, (3, 8, 36, 3), (3, 3, 5, 7)),
    "resnet18": Backbone(BasicBlock, (2, 2, 2, 2)),
    "resnet34": Backbone(BasicBlock, (3, 4, 6, 3)),
    "resnet50": Backbone(Bottleneck, (3, 4, 6, 3)),
    "resnet101": Backbone(Bottleneck, (3, 4, 23, 3)),
    "resnet152": Backbone(Bottleneck, (3, 8, 36, 3)),
}


# Between backbone and head: `context(in_channels, channels, norm)`.
CONTEXTS = {"convolution": convolution, "aspp": ASPP, "psp": PyramidPooling, "criss_cross": CrissCross,
            "object_context": BaseObjectContext, "pyramid_object_context": PyramidObjectContext,
            "dual_attention": DualAttention}


@dataclass(frozen=True)
class Model:
    """What a model is made of.

    Attributes:
        context: a key of `CONTEXTS`.
        loss_weights: factor of each output's loss; without "aux" there is no auxiliary head.
        head: `plain`, one classifier; `acf`; or `dual` and `ocr`, which want more than one feature map.
        dropout: of whole channels before the last classifier.
        aux_share: channels of the auxiliary head, as a share of those of stage 3.
    """

    context: str
    loss_weights: dict
    head: str = "plain"
    dropout: float = DROPOUT
    aux_share: float = 1 / 2


# ACFNet: the paper's factors. The only head of `base` weighs as much as both of ACFNet, 0.7 + 0.6: what the two share
# then learns from gradients of one size at one learning rate. All others as published.
ACF_LOSS, BASE_LOSS, LOSS = ({"fine": 0.7, "coarse": 0.6, "aux": 0.4}, {"fine": 1.3, "aux": 0.4},
                             {"fine": 1.0, "aux": 0.4})
MODELS = {
    "acfnet": Model("aspp", ACF_LOSS, head="acf"),
    "acfnet_resnet": Model("convolution", ACF_LOSS, head="acf"),
    "base": Model("aspp", BASE_LOSS),
    "fcn": Model("convolution", LOSS),
    "deeplabv3": Model("aspp", LOSS),
    "pspnet": Model("psp", LOSS, aux_share=1 / 4),
    "ccnet": Model("criss_cross", LOSS),
    "ocnet": Model("object_context", LOSS, dropout=0.05),
    "ocnet_asp": Model("pyramid_object_context", LOSS),
    "danet": Model("dual_attention", {"fine": 1.0, "position": 1.0, "channel": 1.0}, head="dual"),
    "ocrnet": Model("convolution", LOSS, head="ocr", dropout=0.05),
}
# What is not in the paper's module, to see what it would bring: norm and activation after its two convolutions; a
# convolution with norm and activation before the fine classifier.
ABLATIONS = ("norms", "fusion")


def build_backbone(backbone, norm="inplace_abn", activation="leaky_relu", stem="7x7",
                   average_downsample=False, eca_kernels=None, output_stride=8, recompute="none",
                   backbone_arguments=None):
    """The `ResNet` of that name, or the `TimmBackbone`, which takes none of the options of a `ResNet`.

    eca_kernels: k of stages 1 to 4, instead of the released ones; backbone_arguments: of a `TimmBackbone`.
    """
    if is_timm(backbone):
        for name, value, default in (("stem", stem, "7x7"), ("average_downsample", average_downsample, False),
                                     ("eca_kernels", eca_kernels, None), ("output_stride", output_stride, 8),
                                     ("recompute", recompute, "none")):
            _check(value == default, name, value, f"{default} with {backbone}")
        return TimmBackbone(backbone, backbone_arguments)
    _check(backbone_arguments is None, "backbone_arguments", backbone_arguments, f"none with {backbone}")
    for name, value, choices in (("backbone", backbone, BACKBONES), ("norm", norm, NORMS),
                                 ("activation", activation, ACTIVATIONS), ("stem", stem, STEMS)):
        _check(isinstance(value, str) and value in choices, name, value, f"one of {', '.join(choices)}")
    _check(isinstance(average_downsample, bool), "average_downsample", average_downsample, "true or false")
    if activation == "relu" and norm != "bn":
        raise ValueError("activation relu: expected norm bn, found "
                         f"{norm}: an in-place norm cannot recover its input from a ReLU's output")
    if eca_kernels is not None:
        _check(BACKBONES[backbone].eca_kernels is not None, "eca_kernels", eca_kernels,
               f"none, as {backbone} has no channel attention,")
        _check(isinstance(eca_kernels, list | tuple) and len(eca_kernels) == 4 and all(
            type(k) is int and k > 0 and k % 2 for k in eca_kernels), "eca_kernels", eca_kernels, "four odd numbers")
    return BACKBONES[backbone].build(
        norm=norm_maker(norm, activation), activation=activation, stem=stem, average_downsample=average_downsample,
        eca_kernels=eca_kernels, output_stride=output_stride, recompute=recompute)


def recompute_choices(backbone):
    """What `recompute` can be with a backbone."""
    return ["none"] if is_timm(backbone) else BACKBONES[backbone].recompute_choices()


def fitting_grid(backbone, arguments=None):
    """(step, rest) of a backbone: sides of images that are a multiple of step, plus rest, need no padding."""
    return find_plan(backbone, arguments).grid if is_timm(backbone) else GRID


def norm_maker(norm, activation):
    """`make(channels, activation=...)` → a norm with the network's activation, or with the one named."""
    return lambda channels, activation=activation: NORMS[norm](channels, activation=activation)


def build_network(model="acfnet", num_classes=19, backbone=BACKBONE, norm="inplace_abn",
                  activation="leaky_relu", stem="7x7", average_downsample=False, eca_kernels=None,
                  output_stride=8, recompute="none", ablations=(), acf=False,
                  backbone_arguments=None):
    """Build a network by name.

    Args:
        model: a key of `MODELS`: `acfnet` is ACF on ASPP, `acfnet_resnet` on a 3×3 convolution; others are those it is
            compared with.
        num_classes: N.
        backbone: a key of `BACKBONES`, or `timm:NAME` (`networks.timm_backbone`), with which what follows of stem,
            shortcuts, attention, stride and recomputation stays as it is.
        norm: `inplace_abn` or `bn`.
        activation: `leaky_relu` (slope 0.01), or `relu` with norm `bn`.
        stem: a key of `STEMS`.
        average_downsample: average pooling in the shortcuts that stride.
        eca_kernels: k of stages 1 to 4; None for the released ones.
        output_stride: 8 or 16.
        recompute: `none`, `light` or `full`: memory for time, see `networks.resnet.ResNet`.
        ablations: names of `ABLATIONS`, for models with ACF; none is the network as published.
        acf: put the ACF head on a model that has one classifier.
        backbone_arguments: how timm is to build its network; None to find out.

    Returns:
        nn.Module. Training: images (B, 3, H, W) → logits (B, N, h, w) for each of the model's `loss_weights`, with
        h = ceil(H / output_stride). Evaluation: {"fine"}, and "coarse" with ACF.
        Raises ValueError naming the argument that is none of these.
    """
    parts = find_model(model, acf)
    _check(type(num_classes) is int and num_classes > 0, "num_classes", num_classes, "a whole number above 0")
    # A string in place of a tuple, or a name that is misspelt, must not silently build the network without it.
    _check(isinstance(ablations, list | tuple) and all(name in ABLATIONS for name in ablations), "ablations",
           ablations, f"a tuple of {', '.join(ABLATIONS)}")
    if ablations and parts.head != "acf":
        raise ValueError(f"ablations: expected a model with ACF, found {model}")
    trunk = build_backbone(backbone, norm, activation, stem, average_downsample, eca_kernels, output_stride,
                           recompute, backbone_arguments)
    make_norm = norm_maker(norm, activation)
    *_, stage3, stage4 = trunk.channels
    # 512 for a ResNet-101, as in the paper; 128 for a ResNet-18. What timm has is of all widths, which say little of
    # what a head needs: it gets the heads of a ResNet-101.
    channels, aux_base = (512, 1024) if is_timm(backbone) else (stage4 // 4, stage3)
    context = CONTEXTS[parts.context](stage4, channels, make_norm)
    aux = auxiliary_head(stage3, int(aux_base * parts.aux_share), num_classes, make_norm) \
        if "aux" in parts.loss_weights else None
    if parts.head == "ocr":
        return OCRNet(trunk, context, OCRHead(channels, num_classes, make_norm, parts.dropout), aux)
    if parts.head == "acf":
        head = ACFHead(channels, num_classes, channels, make_norm if "norms" in ablations else None,
                       partial(_fusion, norm=make_norm) if "fusion" in ablations else None, recompute != "none")
    else:
        head = {"plain": PlainHead, "dual": DualHead}[parts.head](channels, num_classes, parts.dropout)
    return SegmentationNet(trunk, context, head, aux)


def find_model(model, acf=False):
    """The `Model` of that name; acf: with the ACF head in place of its one classifier. Raises ValueError."""
    _check(isinstance(model, str) and model in MODELS, "model", model, f"one of {', '.join(MODELS)}")
    _check(isinstance(acf, bool), "acf", acf, "true or false")
    found = MODELS[model]
    if acf and found.head not in ("plain", "acf"):
        raise ValueError(f"acf: expected a model whose head takes one feature map, found {model}; "
                         f"{', '.join(name for name, one in MODELS.items() if one.head == 'plain')} are such")
    return replace(found, head="acf", loss_weights=ACF_LOSS) if acf else found


def _fusion(in_channels, out_channels, norm):
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, bias=False), norm(out_channels))


def meta_network(**arguments):
    """`build_network` without memory: names, shapes and dtypes of the tensors alone. For arguments from a file."""
    with torch.device("meta"):
        return build_network(**arguments)


def _check(holds, name, value, expected):
    if not holds:
        raise ValueError(f"{name}: expected {expected}, found {value!r:.60}")


from .predictor import load  # noqa: E402, F401, it builds on what stands above
