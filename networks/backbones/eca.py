"""Efficient Channel Attention. Wang et al., CVPR 2020, arXiv 1910.03151, section 3.2."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from libs.functions import statistics_dtype
from utils.ops.autocast import without_autocast


class ScaleAndAdd(torch.autograd.Function):
    """shortcut + x · ω (equation 9) with a backward pass that writes the gradient of x once.

    Autograd by itself adds that of the mean as a map of its own, which is not channels-last where x is: more bytes to
    move, and maps of two layouts, which a GPU reads slowly.
    """

    @staticmethod
    def forward(ctx, x, shortcut, kernel):
        """x, shortcut (B, C, H, W); kernel (1, 1, k) → (B, C, H, W)."""
        with without_autocast(x):
            y = x.mean(dim=(2, 3), dtype=statistics_dtype(x))                   # (B, C)
            kernel = kernel.to(y.dtype)
            omega = attention(y, kernel, kernel.shape[2] // 2)
            ctx.save_for_backward(x, y, omega, kernel)
            return torch.addcmul(shortcut, x, along_channels(omega, x))

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        """gradient (B, C, H, W) → those of x, shortcut and kernel."""
        x, y, omega, kernel = ctx.saved_tensors
        padding = kernel.shape[2] // 2
        with without_autocast(x):
            by_omega = (gradient * x).sum(dim=(2, 3), dtype=omega.dtype)                            # (B, C)
            by_logit = (by_omega * omega * (1 - omega))[:, None]                                    # (B, 1, C)
            by_y = F.conv1d(by_logit, kernel.flip(2), padding=padding)[:, 0]                        # (B, C)
            by_kernel = torch.nn.grad.conv1d_weight(y[:, None], kernel.shape, by_logit, padding=padding)
            by_mean = along_channels(by_y / x.shape[2:].numel(), x)
            return torch.addcmul(by_mean, gradient, along_channels(omega, x)), gradient, by_kernel


def attention(y, kernel, padding):
    """y (B, C), kernel (1, 1, k), padding (k - 1) / 2 → ω (B, C), equation 9."""
    return torch.sigmoid(F.conv1d(y[:, None], kernel, padding=padding)[:, 0])


def along_channels(vectors, x):
    """(B, C) → (B, C, 1, 1) in the dtype of x."""
    return vectors[:, :, None, None].to(x.dtype)


class ECA(nn.Module):
    """Scale each channel by ω = σ(Conv1D_k(y)), y the spatial mean of every channel (equation 9).

    Args:
        kernel_size: k, the odd number of neighboring channels that decide one weight.
    """

    def __init__(self, kernel_size):
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"ECA kernel size: expected an odd number, found {kernel_size}")
        self.conv = nn.Conv1d(1, 1, kernel_size, padding=kernel_size // 2, bias=False)

    def forward(self, x, shortcut=None):
        """x (B, C, H, W), and what is added to it if anything, the same → (B, C, H, W)."""
        if shortcut is None:
            return x * self.weights(x)
        # Without gradients, and for compilers, which write backward passes of their own, the formula as it is.
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return torch.addcmul(shortcut, x, self.weights(x))
        return ScaleAndAdd.apply(x, shortcut, self.conv.weight)

    def weights(self, x):
        """x (B, C, H, W) → ω (B, C, 1, 1)."""
        return along_channels(attention(x.mean(dim=(2, 3)), self.conv.weight, self.conv.padding[0]), x)
