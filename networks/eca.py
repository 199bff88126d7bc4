"""Efficient Channel Attention. Wang et al., CVPR 2020, arXiv 1910.03151, section 3.2."""

import torch
from torch import nn


class ECA(nn.Module):
    """Scale each channel by ω = σ(Conv1D_k(y)), y the spatial mean of every channel (equation 9).

    Args:
        kernel_size: k, the odd number of neighbouring channels that decide one weight.
    """

    def __init__(self, kernel_size):
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"ECA kernel size: expected an odd number, found {kernel_size}")
        self.conv = nn.Conv1d(1, 1, kernel_size, padding=kernel_size // 2, bias=False)

    def forward(self, x):
        """x (B, C, H, W) → (B, C, H, W)."""
        return x * self.weights(x)

    def weights(self, x):
        """x (B, C, H, W) → ω (B, C, 1, 1)."""
        y = x.mean(dim=(2, 3))                              # (B, C)
        omega = torch.sigmoid(self.conv(y[:, None])[:, 0])   # (B, C)
        return omega[:, :, None, None].to(x.dtype)
