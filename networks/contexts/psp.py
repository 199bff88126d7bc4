"""Pyramid pooling. Zhao et al., "Pyramid Scene Parsing Network", CVPR 2017, section 3.2."""

import torch
from torch import nn

from utils.ops.autocast import at_least_float32, without_autocast
from utils.ops.upsampling import upsample

from ..layers import convolution


class PyramidPooling(nn.Module):
    """Means over 1, 2×2, 3×3 and 6×6 parts of the map beside the map itself, joined by a 3×3 convolution.

    Args:
        in_channels, channels: of input and output; each level has channels too.
        norm: `norm(channels)` makes a norm with the network's activation.
        bins: rectangles of each level to a side.
    """

    def __init__(self, in_channels, channels, norm, bins=(1, 2, 3, 6)):
        super().__init__()
        self.bins = bins
        self.levels = nn.ModuleList([convolution(in_channels, channels, norm, size=1) for _ in bins])
        self.join = convolution(in_channels + len(bins) * channels, channels, norm)

    def forward(self, x):
        """x (B, in_channels, H, W) → (B, channels, H, W)."""
        pooled = [upsample(level(means(x, bins)), x.shape[2:]).to(x.dtype)
                  for bins, level in zip(self.bins, self.levels, strict=True)]
        return self.join(torch.cat([x, *pooled], dim=1))


def means(x, bins):
    """Means of bins×bins rectangles of a map, as `F.adaptive_avg_pool2d`: (B, C, H, W) → (B, C, bins, bins).

    A product with a matrix from each side, which ONNX can say for any size, as it cannot say the function.
    """
    with without_autocast(x):
        rows, columns = (_bin_weights(length, bins, at_least_float32(x)) for length in x.shape[2:])
        return torch.einsum("ih,bchw,jw->bcij", rows, at_least_float32(x), columns).to(x.dtype)


def _bin_weights(length, bins, like):
    """(bins, length): bin i covers the places from floor(i · length / bins) to ceil((i + 1) · length / bins)."""
    index, place = torch.arange(bins, device=like.device)[:, None], torch.arange(length, device=like.device)
    inside = (place >= index * length // bins) & (place * bins < (index + 1) * length)
    return inside.to(like.dtype) / inside.sum(1, keepdim=True)
