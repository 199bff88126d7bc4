"""Pyramid pooling. Zhao et al., "Pyramid Scene Parsing Network", CVPR 2017, section 3.2."""

import torch
from torch import nn

from utils.ops.autocast import at_least_float32, without_autocast
from utils.ops.upsampling import upsample

from ..layers import convolution


class PyramidPooling(nn.Module):
    """The feature map and its means over 1×1, 2×2, 3×3 and 6×6 bins, joined by a 3×3 convolution.

    Args:
        in_channels, channels: number of channels of input and output; each level also has channels.
        norm: `norm(channels)` builds a norm with the network's activation.
        bins: number of bins per side, for each level.
    """

    def __init__(self, in_channels, channels, norm, bins=(1, 2, 3, 6)):
        super().__init__()
        self.bins = bins
        self.levels = nn.ModuleList([convolution(in_channels, channels, norm, size=1) for _ in bins])
        self.join = convolution(in_channels + len(bins) * channels, channels, norm)

    def forward(self, x):
        """Map x (B, in_channels, H, W) to (B, channels, H, W)."""
        pooled = [upsample(level(bin_means(x, bins)), x.shape[2:]).to(x.dtype)
                  for bins, level in zip(self.bins, self.levels, strict=True)]
        return self.join(torch.cat([x, *pooled], dim=1))


def bin_means(x, bins):
    """Average a map (B, C, H, W) over bins×bins rectangles, as `F.adaptive_avg_pool2d` does: (B, C, bins, bins).

    Computed as a product with one matrix per axis, which ONNX can express for any image size, unlike that function.
    """
    with without_autocast(x):
        rows, columns = (_bin_weights(length, bins, at_least_float32(x)) for length in x.shape[2:])
        return torch.einsum("ih,bchw,jw->bcij", rows, at_least_float32(x), columns).to(x.dtype)


def _bin_weights(length, bins, like):
    """Weights (bins, length): bin i averages positions floor(i · length / bins) to ceil((i + 1) · length / bins)."""
    index, position = torch.arange(bins, device=like.device)[:, None], torch.arange(length, device=like.device)
    inside = (position >= index * length // bins) & (position * bins < (index + 1) * length)
    return inside.to(like.dtype) / inside.sum(1, keepdim=True)
