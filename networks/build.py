"""Models by name, and `build_network`. Only this module and `backbones` define the sizes of networks."""

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from .acf import ACFHead
from .acfnet import PlainHead, SegmentationNet, auxiliary_head
from .backbones.names import BACKBONE, build_backbone, check_argument, find_backbone, norm_maker
from .contexts.aspp import ASPP
from .contexts.criss_cross import CrissCross
from .contexts.dual_attention import DualAttention, DualHead
from .contexts.object_context import BaseObjectContext, PyramidObjectContext
from .contexts.psp import PyramidPooling
from .layers import DROPOUT, convolution
from .ocr import OCRHead, OCRNet

# Modules between backbone and head, built as `context(in_channels, channels, norm)`.
CONTEXTS = {"convolution": convolution, "aspp": ASPP, "psp": PyramidPooling, "criss_cross": CrissCross,
            "object_context": BaseObjectContext, "pyramid_object_context": PyramidObjectContext,
            "dual_attention": DualAttention}


@dataclass(frozen=True)
class Model:
    """The parts of a model.

    Attributes:
        context: a key of `CONTEXTS`.
        loss_weights: factor of each output's loss; without "aux" there is no auxiliary head.
        head: `plain`, a single classifier; `acf`; or `dual` and `ocr`, which take more than one feature map.
        dropout: rate of Dropout2d before the last classifier and before the auxiliary classifier.
        aux_share: channels of the auxiliary head, as a fraction of those of stage 3 (of 1024 with a backbone of
            timm).
    """

    context: str
    loss_weights: dict
    head: str = "plain"
    dropout: float = DROPOUT
    aux_share: float = 1 / 2

    @property
    def min_crops(self):
        """Minimum number of crops per forward pass in training.

        After pooling to 1×1, a norm sees a single value per crop and channel, so it needs two crops.
        """
        return 2 if self.context == "psp" else 1


# ACFNet: the factors of the paper. The only head of `base` weighs as much as both heads of ACFNet, 0.7 + 0.6, so that
# the layers common to both models receive gradients of the same scale at the same learning rate. All others as
# published.
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
# Additions to the paper's module, to measure their effect. "norms": norm and activation after its two convolutions;
# "fusion": a convolution with norm and activation before the fine classifier.
ABLATIONS = ("norms", "fusion")


def build_network(model="acfnet", num_classes=19, backbone=BACKBONE, norm="inplace_abn",
                  activation="leaky_relu", stem="7x7", average_downsample=False, eca_kernels=None,
                  output_stride=8, recompute="none", ablations=(), acf=False,
                  backbone_arguments=None, multi_grid=None):
    """Build a network by name.

    Args:
        model: a key of `MODELS`: `acfnet` is ACF on ASPP, `acfnet_resnet` is ACF on a 3×3 convolution; the others are
            networks that ACFNet is compared with.
        num_classes: N.
        backbone: a key of `BACKBONES`, or `timm:NAME` (`networks.backbones.timm`). With a network of timm, `stem`,
            `average_downsample`, `eca_kernels`, `output_stride`, `recompute` and `multi_grid` keep their defaults.
        norm: `inplace_abn` or `bn`.
        activation: `leaky_relu` (slope 0.01), or `relu` with norm `bn`.
        stem: a key of `STEMS`.
        average_downsample: whether strided shortcuts use average pooling.
        eca_kernels: kernel sizes of the channel attention in stages 1 to 4; None for those that ECANet released.
        output_stride: 8 or 16.
        recompute: `none`, `light` or `full`, to save memory for more time; see `networks.backbones.resnet.ResNet`.
        ablations: names of `ABLATIONS`, for models with ACF; the default is the network as published.
        acf: put the ACF head on a model that has a single classifier.
        backbone_arguments: keyword arguments of `timm.create_model`; None to determine them.
        multi_grid: as in `networks.backbones.resnet.ResNet`; (1, 2, 4) is DANet as published. No flag sets it.

    Returns:
        nn.Module. Training: images (B, 3, H, W) → a dict of logits (B, N, h, w) with the keys of the model's
        `loss_weights`, h = ceil(H / output_stride). Evaluation: {"fine"}, and "coarse" with ACF.

    Raises:
        ValueError: if an argument has none of these values; the message names the argument.
    """
    design = find_model(model, acf)
    check_argument(type(num_classes) is int and num_classes > 0, "num_classes", num_classes, "a whole number above 0")
    # A string instead of a tuple, or a misspelled name, must not silently build the network without the ablation.
    check_argument(isinstance(ablations, list | tuple) and all(name in ABLATIONS for name in ablations), "ablations",
                   ablations, f"a tuple of {', '.join(ABLATIONS)}")
    if ablations and design.head != "acf":
        raise ValueError(f"ablations: expected a model with ACF, found {model}")
    trunk = build_backbone(backbone, norm, activation=activation, stem=stem, average_downsample=average_downsample,
                           eca_kernels=eca_kernels, output_stride=output_stride, recompute=recompute,
                           backbone_arguments=backbone_arguments, multi_grid=multi_grid)
    make_norm = norm_maker(norm, activation)
    *_, stage3, stage4 = trunk.channels
    channels, aux_base = find_backbone(backbone).head_channels(trunk.channels)
    context = CONTEXTS[design.context](stage4, channels, make_norm)
    aux = None
    if "aux" in design.loss_weights:
        aux = auxiliary_head(stage3, int(aux_base * design.aux_share), num_classes=num_classes, norm=make_norm,
                             dropout=design.dropout)
    if design.head == "ocr":
        return OCRNet(trunk, context, OCRHead(channels, num_classes, make_norm, design.dropout), aux)
    if design.head == "acf":
        head = ACFHead(channels, num_classes, key_channels=channels, norm=make_norm if "norms" in ablations else None,
                       fusion=partial(_fusion, norm=make_norm) if "fusion" in ablations else None,
                       recompute=recompute != "none")
    else:
        head = {"plain": PlainHead, "dual": DualHead}[design.head](channels, num_classes, design.dropout)
    return SegmentationNet(trunk, context, head, aux)


def find_model(model, acf=False):
    """Look up a model by name.

    Args:
        model: a key of `MODELS`.
        acf: replace the model's single classifier by the ACF head.

    Returns:
        `Model`.

    Raises:
        ValueError: for an unknown name, or if the model's head takes more than one feature map.
    """
    check_argument(isinstance(model, str) and model in MODELS, "model", model, f"one of {', '.join(MODELS)}")
    check_argument(isinstance(acf, bool), "acf", acf, "true or false")
    design = MODELS[model]
    if acf and design.head not in ("plain", "acf"):
        suitable = ", ".join(name for name, other in MODELS.items() if other.head == "plain")
        raise ValueError(f"acf: expected a model whose head takes one feature map, found {model}; {suitable} are "
                         "suitable")
    return replace(design, head="acf", loss_weights=ACF_LOSS) if acf else design


def _fusion(in_channels, out_channels, norm):
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, bias=False), norm(out_channels))


def meta_network(**arguments):
    """Build a network on the meta device: names, shapes and dtypes of its tensors, without memory for their values.

    Checks arguments that come from a file. Arguments and errors as in `build_network`.
    """
    with torch.device("meta"):
        return build_network(**arguments)
