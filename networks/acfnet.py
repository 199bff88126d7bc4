"""ACFNet and its base network. Zhang et al., ICCV 2019, arXiv 1909.09408, figure 2."""

import torch.nn.functional as F
from torch import nn

from utils.precision import at_least_float32, without_autocast

from .acf import ACFModule, mix

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

    def forward(self, images):
        """images (B, 3, H, W) → {"fine", "aux"}, each (B, N, ceil(H/8), ceil(W/8)); no "aux" in evaluation."""
        *_, stage3, stage4 = self.backbone(images)
        outputs = self.heads(self.context(stage4))
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

    Args: as in `BaseNet`; key_channels: C' of the ACF module.
    """

    def __init__(self, backbone, context, channels, num_classes, aux, key_channels):
        super().__init__(backbone, context, channels, num_classes, aux)
        self.coarse = classifier(channels, num_classes)
        self.acf = ACFModule(channels, key_channels)
        self.fine = classifier(key_channels + channels, num_classes)

    def forward(self, images):
        """images (B, 3, H, W) → {"fine", "coarse", "aux"}, each (B, N, ceil(H/8), ceil(W/8)).

        In evaluation "aux" is left out.
        """
        return super().forward(images)

    def heads(self, features):
        coarse = self.coarse(self.dropout(features))
        return {"fine": self.fine_logits(features, coarse), "coarse": coarse}

    def fine_logits(self, features, coarse):
        """F (B, C, h, w), coarse logits (B, N, h, w) → fine logits (B, N, h, w)."""
        centers = self.acf.convolved_centers(features, coarse)                # (B, N, C')
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
