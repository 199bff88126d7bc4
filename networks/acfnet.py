"""Segmentation network of a backbone, a context module, a head, and an auxiliary head used in training only.

With `networks.acf.ACFHead` it is ACFNet (Zhang et al., ICCV 2019, arXiv 1909.09408, figure 2); with `PlainHead` it is
one of the networks that ACFNet is compared with.
"""

from torch import nn

from .layers import DROPOUT, classifier, convolution


class SegmentationNet(nn.Module):
    """A backbone, a context module, a head and an auxiliary head.

    Args:
        backbone: maps images to the feature maps of stages 1 to 4.
        context: maps stage 4 to F (B, C, h, w), such as ASPP.
        head: maps F to a dict of logits, each (B, N, h, w).
        aux: maps stage 3 to logits (B, N, h, w), in training only; None without an auxiliary head.
    """

    def __init__(self, backbone, context, head, aux):
        super().__init__()
        self.backbone, self.context, self.head, self.aux = backbone, context, head, aux

    def forward(self, images):
        """Map images (B, 3, H, W) to a dict of logits (B, N, h, w): those of the head and, in training, "aux"."""
        *_, stage3, stage4 = self.backbone(images)
        outputs = self.head(self.context(stage4))
        return outputs | {"aux": self.aux(stage3)} if self.training and self.aux is not None else outputs

    @property
    def grid(self):
        """(step, rest): for image sides of k · step + rest, the logits align exactly with their pixels."""
        return self.backbone.grid


class PlainHead(nn.Module):
    """A single classifier: maps features F (B, C, h, w) to {"fine"}, logits (B, N, h, w)."""

    def __init__(self, in_channels, num_classes, dropout=DROPOUT):
        super().__init__()
        self.dropout = nn.Dropout2d(dropout)
        self.fine = classifier(in_channels, num_classes)

    def forward(self, features):
        return {"fine": self.fine(self.dropout(features))}


def auxiliary_head(in_channels, channels, num_classes, norm, dropout=DROPOUT):
    """Build the auxiliary head on stage 3: 3×3 convolution, norm with activation, Dropout2d, classifier."""
    return nn.Sequential(*convolution(in_channels, channels, norm), nn.Dropout2d(dropout),
                         classifier(channels, num_classes))
