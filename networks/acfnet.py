"""ACFNet and its base network. Zhang et al., ICCV 2019, arXiv 1909.09408, figure 2."""

import torch
import torch.nn.functional as F
from torch import nn

from utils.precision import at_least_float32, without_autocast

from .acf import ACFModule, mix, true_logits

# What is not in the paper's module, to see what it would bring: norm and activation after its two convolutions; a
# convolution with norm and activation before the classifier; centers from the truth, as an upper bound.
ABLATIONS = ("norms", "fusion", "true_centers")
DROPOUT = 0.1  # whole channels, before each classifier (ours: the paper does not say)


class BaseNet(nn.Module):
    """Backbone, context, a classifier, and in training an auxiliary head on stage 3.

    Args:
        backbone: images → feature maps of stages 1 to 4.
        context: stage 4 → F (B, channels, h, w).
        channels: C of F.
        num_classes: N.
        aux: module from stage 3 to logits (B, N, h, w), for training.
    """

    def __init__(self, backbone, context, channels, num_classes, aux):
        super().__init__()
        self.backbone = backbone
        self.context = context
        self.dropout = nn.Dropout2d(DROPOUT)
        self.fine = classifier(channels, num_classes)
        self.aux = aux

    def forward(self, images, *more):
        """images (B, 3, H, W) → {"fine", "aux"}, each (B, N, ceil(H/8), ceil(W/8)); no "aux" in evaluation.

        more: what `heads` takes beside the features.
        """
        *_, stage3, stage4 = self.backbone(images)
        outputs = self.heads(self.context(stage4), *more)
        if self.training:
            outputs["aux"] = self.aux(stage3)
        return outputs

    def heads(self, features):
        """F (B, C, h, w) → logits by name, each (B, N, h, w)."""
        return {"fine": self.fine(self.dropout(features))}


class ACFNet(BaseNet):
    """Coarse-to-fine segmentation: the coarse result picks class centers, the fine one uses them.

    Fine logits are `fine(dropout(concat(F'_a, F)))`, computed without F'_a: the classifier is
    W_a F'_a + W_f F + b, and W_a is applied to the N convolved centers before they are mixed by P.

    Args:
        backbone, context, channels, num_classes, aux: as in `BaseNet`.
        key_channels: C' of the ACF module.
        norm: makes norms for the ablations.
        ablations: names of `ABLATIONS`; none for the network as drawn. Raises ValueError for any other.
    """

    def __init__(self, backbone, context, channels, num_classes, aux, key_channels, norm=None, ablations=()):
        check_ablations(ablations)
        super().__init__(backbone, context, channels, num_classes, aux)
        self.coarse = classifier(channels, num_classes)
        self.acf = ACFModule(channels, key_channels, norm if "norms" in ablations else None)
        self.fusion = None
        if "fusion" in ablations:
            self.fusion = nn.Sequential(nn.Conv2d(key_channels + channels, channels, 1, bias=False), norm(channels))
        self.fine = classifier(channels if self.fusion else key_channels + channels, num_classes)
        self.true_centers = "true_centers" in ablations

    def forward(self, images, truth=None):
        """images (B, 3, H, W) → {"fine", "coarse", "aux"}, each (B, N, ceil(H/8), ceil(W/8)).

        In evaluation "aux" is left out. truth: labels (B, H, W), which the ablation `true_centers` needs.
        """
        if self.true_centers and truth is None:
            raise ValueError("true_centers: expected the truth beside the images, found none")
        return super().forward(images, truth)

    def heads(self, features, truth=None):
        coarse = self.coarse(self.dropout(features))
        centers_from = None
        if self.true_centers:
            centers_from = true_logits(truth, coarse.shape[1], coarse.shape[2:], at_least_float32(coarse).dtype)
        if self.fusion is None and self.acf.cab.norm is None:
            return {"fine": self.fine_logits(features, coarse, centers_from), "coarse": coarse}
        attended = self.acf(features, coarse, centers_from).to(features.dtype)             # (B, C', h, w)
        joined = torch.cat([attended, features], dim=1)                                    # (B, C' + C, h, w)
        joined = joined if self.fusion is None else self.fusion(joined)
        return {"fine": self.fine(self.dropout(joined)), "coarse": coarse}

    def fine_logits(self, features, coarse, centers_from=None):
        """F (B, C, h, w), coarse logits (B, N, h, w) → fine logits (B, N, h, w)."""
        centers = self.acf.convolved_centers(features, coarse, centers_from)  # (B, N, C')
        weight = self.fine.weight[None, :, :, 0, 0]                           # (1, N, C' + C)
        if self.training:
            # Dropout2d on concat(F'_a, F) drops whole channels of one image, hence columns of W.
            kept = weight.new_ones(len(features), weight.shape[2], 1, 1)
            weight = weight * self.dropout(kept).flatten(1)[:, None]          # (B, N, C' + C)
        weight_a, weight_f = weight.split([centers.shape[2], features.shape[1]], dim=2)

        with without_autocast(features):
            center_logits = centers @ weight_a.to(centers.dtype).transpose(1, 2)   # (B, N centers, N logits)
        from_centers = mix(center_logits, coarse)                                  # (B, N, h, w)
        from_features = _classify(features, weight_f, self.fine.bias)
        return from_centers + at_least_float32(from_features)


def check_ablations(ablations):
    """Raise ValueError unless these are a tuple or list of names in `ABLATIONS`: one that is misspelt, or a string
    in place of a tuple, would silently be the network without it."""
    if not isinstance(ablations, list | tuple) or not all(name in ABLATIONS for name in ablations):
        raise ValueError(f"ablations: expected a tuple of {', '.join(ABLATIONS)}, found {ablations!r:.60}")


def _classify(features, weights, bias):
    """features (B, C, h, w), weights (B or 1, N, C), bias (N,) → logits (B, N, h, w)."""
    if len(weights) == 1:
        return F.conv2d(features, weights[0, :, :, None, None], bias)
    logits = weights @ features.flatten(2) + bias[:, None]                         # (B, N, hw)
    return logits.view(len(features), -1, *features.shape[2:])                     # (B, N, h, w)


def classifier(in_channels, num_classes):
    """1×1 convolution to logits, small at the start so that no class is favoured."""
    conv = nn.Conv2d(in_channels, num_classes, 1)
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.zeros_(conv.bias)
    return conv


def auxiliary_head(in_channels, channels, num_classes, norm):
    """3×3 convolution, norm and activation, Dropout2d, classifier: deep supervision of stage 3."""
    conv = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
    return nn.Sequential(conv, norm(channels), nn.Dropout2d(DROPOUT), classifier(channels, num_classes))
