"""Atrous spatial pyramid pooling. Chen et al., "DeepLab", TPAMI 2018, section 3.2; widths as in ACFNet."""

import torch
from torch import nn


class ASPP(nn.Module):
    """A 1×1 and three dilated 3×3 convolutions side by side, joined by a 1×1. No image pooling.

    Args:
        in_channels, out_channels: channels of input and output; each branch has out_channels too.
        norm: `norm(channels)` makes a norm with the network's activation.
        rates: dilations of the 3×3 branches, in pixels of the feature map (output stride 8).
    """

    def __init__(self, in_channels, out_channels, norm, rates=(12, 24, 36)):
        super().__init__()
        self.branches = nn.ModuleList([nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, bias=False),
                                                     norm(out_channels))])
        for rate in rates:
            conv = nn.Conv2d(in_channels, out_channels, 3, padding=rate, dilation=rate, bias=False)
            self.branches.append(nn.Sequential(conv, norm(out_channels)))
        self.project = nn.Sequential(
            nn.Conv2d(out_channels * len(self.branches), out_channels, 1, bias=False), norm(out_channels))

    def forward(self, x):
        """x (B, in_channels, H, W) → (B, out_channels, H, W)."""
        return self.project(torch.cat([branch(x) for branch in self.branches], dim=1))
