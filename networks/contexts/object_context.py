"""Object context. Yuan and Wang, OCNet, arXiv 1809.00916, section 3."""

import torch
import torch.nn.functional as F
from torch import nn

from utils.ops.upsampling import upsample

from ..layers import convolution
from .attention import attend


class ObjectContext(nn.Module):
    """Self-attention that uses the keys as queries, scaled by key_channels^-½ (section 3.1).

    Args:
        channels: number of channels of input and output.
        key_channels, value_channels: number of channels of keys and values.
        norm: `norm(channels)` builds a norm with the network's activation.
        pooling: side in pixels of the max pooling before the attention; windows at the right and bottom border may be
            smaller. 1 for no pooling.
    """

    def __init__(self, channels, key_channels, value_channels, norm, pooling=1):
        super().__init__()
        self.pooling = pooling
        self.key = convolution(channels, key_channels, norm, size=1)
        self.value = nn.Conv2d(channels, value_channels, 1)
        self.out = nn.Conv2d(value_channels, channels, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x):
        """Map x (B, channels, H, W) to the context of each pixel, of the same shape; zeros before training."""
        size = x.shape[2:]
        if self.pooling > 1:
            margin = self.pooling - 1   # keeps the incomplete windows at the right and bottom border
            x = F.max_pool2d(F.pad(x, (0, margin, 0, margin), mode="replicate"), self.pooling)
        keys, values = self.key(x).flatten(2), self.value(x).flatten(2)
        context = attend(keys, keys, values)
        context = self.out(context.unflatten(2, x.shape[2:]))
        return upsample(context, size).to(context.dtype) if self.pooling > 1 else context


class BaseObjectContext(nn.Module):
    """OCNet's base context: features and their object context, joined by a 1×1 convolution (figure 3 b).

    Args:
        in_channels, channels: number of channels of input and output.
        norm: `norm(channels)` builds a norm with the network's activation.
    """

    def __init__(self, in_channels, channels, norm):
        super().__init__()
        self.before = convolution(in_channels, channels, norm)
        self.context = ObjectContext(channels, channels // 2, channels // 2, norm)
        self.join = convolution(2 * channels, channels, norm, size=1)

    def forward(self, x):
        """Map x (B, in_channels, H, W) to (B, channels, H, W)."""
        features = self.before(x)
        return self.join(torch.cat([self.context(features), features], dim=1))


class PyramidObjectContext(nn.Module):
    """OCNet's ASP context: object context as one branch of an atrous spatial pyramid (figure 3 d).

    Args:
        in_channels, channels: number of channels of input and output; each of the five branches has channels / 2.
        norm: `norm(channels)` builds a norm with the network's activation.
        rates: dilations of the three 3×3 branches, in pixels of the feature map (at output stride 8).
    """

    def __init__(self, in_channels, channels, norm, rates=(12, 24, 36)):
        super().__init__()
        width = channels // 2
        self.before = convolution(in_channels, channels, norm)
        context = nn.Sequential(convolution(channels, width, norm),
                                ObjectContext(width, width // 2, width, norm, pooling=2),
                                convolution(width, width, norm, size=1))
        self.branches = nn.ModuleList([context, convolution(channels, width, norm, size=1),
                                       *(convolution(channels, width, norm, dilation=rate) for rate in rates)])
        self.join = convolution(len(self.branches) * width, channels, norm, size=1)

    def forward(self, x):
        """Map x (B, in_channels, H, W) to (B, channels, H, W)."""
        x = self.before(x)
        return self.join(torch.cat([branch(x) for branch in self.branches], dim=1))
