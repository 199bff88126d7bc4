"""Atrous spatial pyramid pooling. Chen et al., "DeepLab", TPAMI 2018, section 3.2; widths as in ACFNet."""

import torch
from torch import nn

from ..layers import convolution


class ASPP(nn.Module):
    """A 1×1 and three dilated 3×3 convolutions in parallel, joined by a 1×1 convolution. No image pooling.

    Args:
        in_channels, out_channels: channels of input and output; each branch also has out_channels.
        norm: `norm(channels)` builds a norm with the network's activation.
        rates: dilations of the 3×3 branches, in pixels of the feature map (at output stride 8).
    """

    def __init__(self, in_channels, out_channels, norm, rates=(12, 24, 36)):
        super().__init__()
        self.branches = nn.ModuleList([
            convolution(in_channels, out_channels, norm, size=1),
            *(convolution(in_channels, out_channels, norm, dilation=rate) for rate in rates)])
        self.project = convolution(out_channels * len(self.branches), out_channels, norm, size=1)

    def forward(self, x):
        """Map x (B, in_channels, H, W) to (B, out_channels, H, W)."""
        return self.project(torch.cat([branch(x) for branch in self.branches], dim=1))
