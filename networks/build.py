"""Networks by name. This and `backbones` are the only places that know sizes."""

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from .acf import ACFHead
from .acfnet import PlainHead, SegmentationNet, auxiliary_head
from .backbones.names import BACKBONE, build_backbone, check, find_backbone, norm_maker
from .contexts.aspp import ASPP
from .contexts.criss_cross import CrissCross
from .contexts.dual_attention import DualAttention, DualHead
from .contexts.object_context import BaseObjectContext, PyramidObjectContext
from .contexts.psp import PyramidPooling
from .layers import DROPOUT, convolution
from .ocr import OCRHead, OCRNet

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
        dropout: of whole channels before the last classifier, and before that of the auxiliary head.
        aux_share: channels of the auxiliary head, as a share of those of stage 3.
    """

    context: str
    loss_weights: dict
    head: str = "plain"
    dropout: float = DROPOUT
    aux_share: float = 1 / 2

    @property
    def least_crops(self):
        """In a part of a training batch: norms after pooling to one place see one value of each crop and channel."""
        return 2 if self.context == "psp" else 1


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


def build_network(model="acfnet", num_classes=19, backbone=BACKBONE, norm="inplace_abn",
                  activation="leaky_relu", stem="7x7", average_downsample=False, eca_kernels=None,
                  output_stride=8, recompute="none", ablations=(), acf=False,
                  backbone_arguments=None, multi_grid=None):
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
        multi_grid: as in `networks.resnet.ResNet`; (1, 2, 4) is that of DANet as published. No flag sets it.

    Returns:
        nn.Module. Training: images (B, 3, H, W) → logits (B, N, h, w) for each of the model's `loss_weights`, with
        h = ceil(H / output_stride). Evaluation: {"fine"}, and "coarse" with ACF.
        Raises ValueError naming the argument that is none of these.
    """
    design = find_model(model, acf)
    check(type(num_classes) is int and num_classes > 0, "num_classes", num_classes, "a whole number above 0")
    # A string in place of a tuple, or a name that is misspelt, must not silently build the network without it.
    check(isinstance(ablations, list | tuple) and all(name in ABLATIONS for name in ablations), "ablations",
           ablations, f"a tuple of {', '.join(ABLATIONS)}")
    if ablations and design.head != "acf":
        raise ValueError(f"ablations: expected a model with ACF, found {model}")
    trunk = build_backbone(backbone, norm, activation, stem, average_downsample, eca_kernels, output_stride,
                           recompute, backbone_arguments, multi_grid)
    make_norm = norm_maker(norm, activation)
    *_, stage3, stage4 = trunk.channels
    channels, aux_base = find_backbone(backbone).head_channels(trunk.channels)
    context = CONTEXTS[design.context](stage4, channels, make_norm)
    aux = auxiliary_head(stage3, int(aux_base * design.aux_share), num_classes, make_norm, design.dropout) \
        if "aux" in design.loss_weights else None
    if design.head == "ocr":
        return OCRNet(trunk, context, OCRHead(channels, num_classes, make_norm, design.dropout), aux)
    if design.head == "acf":
        head = ACFHead(channels, num_classes, channels, make_norm if "norms" in ablations else None,
                       partial(_fusion, norm=make_norm) if "fusion" in ablations else None, recompute != "none")
    else:
        head = {"plain": PlainHead, "dual": DualHead}[design.head](channels, num_classes, design.dropout)
    return SegmentationNet(trunk, context, head, aux)


def find_model(model, acf=False):
    """The `Model` of that name; acf: with the ACF head in place of its one classifier. Raises ValueError."""
    check(isinstance(model, str) and model in MODELS, "model", model, f"one of {', '.join(MODELS)}")
    check(isinstance(acf, bool), "acf", acf, "true or false")
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
