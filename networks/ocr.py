"""Object-contextual representations (OCR). Yuan, Chen, Wang, ECCV 2020, section 3."""

import torch
from torch import nn

from utils.ops.autocast import at_least_float32, without_autocast

from .acfnet import SegmentationNet
from .contexts.attention import attend
from .layers import classifier, convolution


class OCRHead(nn.Module):
    """One vector per class region, and every pixel's attention to these vectors (figure 3). Closely related to ACF.

    Args:
        in_channels: C of the features.
        num_classes: N.
        norm: `norm(channels)` builds a norm with the network's activation.
        dropout: rate of Dropout2d before the classifier.
    """

    def __init__(self, in_channels, num_classes, norm, dropout=0.05):
        super().__init__()
        keys = in_channels // 2
        self.pixel, self.object = (nn.Sequential(convolution(in_channels, keys, norm, size=1),
                                                 convolution(keys, keys, norm, size=1)) for _ in range(2))
        self.value = convolution(in_channels, keys, norm, size=1)
        self.up = convolution(keys, in_channels, norm, size=1)
        self.join = convolution(2 * in_channels, in_channels, norm, size=1)
        self.dropout = nn.Dropout2d(dropout)
        self.fine = classifier(in_channels, num_classes)

    def regions(self, features, logits):
        """Map features (B, C, h, w) and logits (B, N, h, w) to one vector per class region (B, C, N).

        Each vector is a weighted mean of the features; its weights are the softmax of the class's logits over all
        pixels (equation 3).
        """
        with without_autocast(features):
            weights = at_least_float32(logits).flatten(2).softmax(dim=2)
            return torch.einsum("bnj,bcj->bcn", weights, at_least_float32(features).flatten(2)).to(features.dtype)

    def forward(self, features, logits):
        """Map features (B, C, h, w) and region logits (B, N, h, w) to {"fine"}, logits (B, N, h, w)."""
        objects = self.regions(features, logits)[..., None]                             # (B, C, N, 1)
        queries = self.pixel(features)                                                  # (B, C / 2, h, w)
        keys, values = self.object(objects).flatten(2), self.value(objects).flatten(2)
        context = attend(queries.flatten(2), keys, values)                              # equations 2 and 4
        context = self.up(context.unflatten(2, features.shape[2:]))
        return {"fine": self.fine(self.dropout(self.join(torch.cat([context, features], dim=1))))}


class OCRNet(SegmentationNet):
    """Network with an `OCRHead`. Its auxiliary logits define the class regions, so evaluation computes them too."""

    def forward(self, images):
        """Map images (B, 3, H, W) to {"fine"} and, in training, {"fine", "aux"}: logits (B, N, h, w)."""
        *_, stage3, stage4 = self.backbone(images)
        aux = self.aux(stage3)
        outputs = self.head(self.context(stage4), aux)
        return outputs | {"aux": aux} if self.training else outputs
