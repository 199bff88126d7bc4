"""Dual attention, over positions and over channels. Fu et al., DANet, CVPR 2019, section 3."""

import torch
from torch import nn

from utils.ops.autocast import at_least_float32, without_autocast

from ..layers import DROPOUT, classifier, convolution
from .attention import SelfAttention, attend


class PositionAttention(SelfAttention):
    """Attention of every pixel to all pixels (section 3.2, equations 1 and 2).

    Products are not scaled. The paper calls gamma α.
    """

    def forward(self, x):
        """Map x (B, C, H, W) to gamma · attention + x."""
        attended = attend(self.query(x).flatten(2), self.key(x).flatten(2), self.value(x).flatten(2), scale=1.0)
        return self.gamma * attended.unflatten(2, x.shape[2:]).to(x.dtype) + x


class ChannelAttention(nn.Module):
    """Attention of every channel to all channels (section 3.3, equations 3 and 4).

    As in the authors' code, the weights are the softmax of (largest product - product), so that a channel attends most
    to the channels least similar to it. Computes in at least float32, since the products are sums over all pixels.
    """

    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(()))      # β in the paper

    def forward(self, x):
        """Map x (B, C, H, W) to gamma · attention + x."""
        with without_autocast(x):
            rows = at_least_float32(x).flatten(2)                                       # (B, C, HW)
            products = rows @ rows.transpose(1, 2)                                      # (B, C, C)
            weights = (products.amax(dim=2, keepdim=True) - products).softmax(dim=2)
            attended = (weights @ rows).unflatten(2, x.shape[2:])
        return self.gamma * attended.to(x.dtype) + x


class DualAttention(nn.Module):
    """Position and channel attention in parallel, between convolutions (figure 2).

    Args:
        in_channels, channels: number of channels of input and output.
        norm: `norm(channels)` builds a norm with the network's activation.
    """

    def __init__(self, in_channels, channels, norm):
        super().__init__()
        self.position, self.channel = (
            nn.Sequential(convolution(in_channels, channels, norm), attention, convolution(channels, channels, norm))
            for attention in (PositionAttention(channels, channels // 8), ChannelAttention()))

    def forward(self, x):
        """Map x (B, in_channels, H, W) to (sum, position, channel), each (B, channels, H, W)."""
        position, channel = self.position(x), self.channel(x)
        return position + channel, position, channel


class DualHead(nn.Module):
    """A classifier for the sum of both attentions and, in training, one for each of the two."""

    def __init__(self, in_channels, num_classes, dropout=DROPOUT):
        super().__init__()
        self.dropout = nn.Dropout2d(dropout)
        self.fine, self.position, self.channel = (classifier(in_channels, num_classes) for _ in range(3))

    def forward(self, features):
        """Classify the features that `DualAttention` returns.

        Args:
            features: (sum, position, channel), each (B, C, h, w).

        Returns:
            {"fine"} and, in training, {"fine", "position", "channel"}: logits (B, N, h, w).
        """
        both, position, channel = features
        outputs = {"fine": self.fine(self.dropout(both))}
        if self.training:
            outputs |= {"position": self.position(self.dropout(position)),
                        "channel": self.channel(self.dropout(channel))}
        return outputs
