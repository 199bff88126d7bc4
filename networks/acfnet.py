"""Segmentation networks: a backbone, a context module, a head, and in training an auxiliary head.

With `networks.acf.ACFHead` it is ACFNet (Zhang et al., ICCV 2019, arXiv 1909.09408, figure 2); with `PlainHead` one of
the networks it is compared with.
"""

from torch import nn

from .layers import DROPOUT, classifier, convolution


class SegmentationNet(nn.Module):
    """Args:
        backbone: images → feature maps of stages 1 to 4.
        context: stage 4 → F (B, C, h, w), such as ASPP.
        head: F → logits by name, each (B, N, h, w).
        aux: stage 3 → logits (B, N, h, w), for training alone; None for none.
    """

    def __init__(self, backbone, context, head, aux):
        super().__init__()
        self.backbone, self.context, self.head, self.aux = backbone, context, head, aux

    def forward(self, images):
        """images (B, 3, H, W) → logits by name: those of the head and, in training, "aux"; each (B, N, h, w)."""
        *_, stage3, stage4 = self.backbone(images)
        outputs = self.head(self.context(stage4))
        return outputs | {"aux": self.aux(stage3)} if self.training and self.aux is not None else outputs

    @property
    def grid(self):
        """(step, rest): logits lie on the pixels they stand for where sides are a multiple of step, plus rest."""
        return self.backbone.grid


class PlainHead(nn.Module):
    """One classifier: features F (B, C, h, w) → {"fine"}, logits (B, N, h, w)."""

    def __init__(self, in_channels, num_classes, dropout=DROPOUT):
        super().__init__()
        self.dropout = nn.Dropout2d(dropout)
        self.fine = classifier(in_channels, num_classes)

    def forward(self, features):
        return {"fine": self.fine(self.dropout(features))}


def auxiliary_head(in_channels, channels, num_classes, norm, dropout=DROPOUT):
    """3×3 convolution, norm and activation, Dropout2d, classifier: deep supervision of stage 3."""
    return nn.Sequential(*convolution(in_channels, channels, norm), nn.Dropout2d(dropout),
                         classifier(channels, num_classes))
