"""Criss-cross attention. Huang et al., CCNet, ICCV 2019 and TPAMI 2020, section 3."""

import torch
from torch import nn

from utils.ops.autocast import at_least_float32, without_autocast

from ..layers import convolution
from .attention import SelfAttention


class CrissCrossAttention(SelfAttention):
    """Attention of every pixel to the pixels of its column and its row (section 3.2).

    One softmax runs over these H + W - 1 pixels, which include the pixel itself once; products are not scaled. Computes
    in at least float32, since the products are unbounded.
    """

    def forward(self, x):
        """Map x (B, C, H, W) to gamma · attention + x."""
        projections = self.query(x), self.key(x), self.value(x)
        with without_autocast(x):
            queries, keys, values = (at_least_float32(projection) for projection in projections)
            column = torch.einsum("bcyx,bczx->byxz", queries, keys)                     # (B, H, W, H)
            row = torch.einsum("bcyx,bcyz->byxz", queries, keys)                        # (B, H, W, W)
            height, width = x.shape[2:]
            positions = torch.arange(height, device=x.device)
            # The pixel itself is part of the row already.
            diagonal = (positions[:, None] == positions)[:, None]                       # (H, 1, H)
            weights = torch.cat([column.masked_fill(diagonal, -torch.inf), row], dim=3).softmax(dim=3)
            column, row = weights.split([height, width], dim=3)
            attended = torch.einsum("byxz,bczx->bcyx", column, values) + torch.einsum("byxz,bcyz->bcyx", row, values)
        return self.gamma * attended.to(x.dtype) + x


class CrissCross(nn.Module):
    """Recurrent criss-cross attention between convolutions (figure 2).

    After two rounds every pixel has received information from all pixels.

    Args:
        in_channels, channels: number of channels of input and output.
        norm: `norm(channels)` builds a norm with the network's activation.
        recurrence: R, number of rounds, which share their weights.
    """

    def __init__(self, in_channels, channels, norm, recurrence=2):
        super().__init__()
        self.recurrence = recurrence
        self.before = convolution(in_channels, channels, norm)
        self.attention = CrissCrossAttention(channels, channels // 8)
        self.after = convolution(channels, channels, norm)
        self.join = convolution(in_channels + channels, channels, norm)

    def forward(self, x):
        """Map x (B, in_channels, H, W) to (B, channels, H, W)."""
        attended = self.before(x)
        for _ in range(self.recurrence):
            attended = self.attention(attended)
        return self.join(torch.cat([x, self.after(attended)], dim=1))
