"""Efficient Channel Attention. Wang et al., CVPR 2020, arXiv 1910.03151, section 3.2."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from libs.functions import statistics_dtype
from utils.ops.autocast import without_autocast


class ScaleAndAdd(torch.autograd.Function):
    """shortcut + x · ω (equation 9), with a backward pass that writes the gradient of x only once.

    Plain autograd computes the gradient through the mean as a separate map, which is not channels-last even if x is:
    more memory traffic, and a sum of maps with two memory layouts, which is slow on a GPU.
    """

    @staticmethod
    def forward(ctx, x, shortcut, kernel):
        """Map x and shortcut (B, C, H, W) and kernel (1, 1, k) to (B, C, H, W)."""
        with without_autocast(x):
            y = x.mean(dim=(2, 3), dtype=statistics_dtype(x))                   # (B, C)
            kernel = kernel.to(y.dtype)
            omega = attention(y, kernel, kernel.shape[2] // 2)
            ctx.save_for_backward(x, y, omega, kernel)
            return torch.addcmul(shortcut, x, along_channels(omega, x))

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        """Map the gradient of the output (B, C, H, W) to the gradients of x, shortcut and kernel."""
        x, y, omega, kernel = ctx.saved_tensors
        padding = kernel.shape[2] // 2
        with without_autocast(x):
            grad_omega = (gradient * x).sum(dim=(2, 3), dtype=omega.dtype)                          # (B, C)
            grad_logit = (grad_omega * omega * (1 - omega))[:, None]                                # (B, 1, C)
            grad_y = F.conv1d(grad_logit, kernel.flip(2), padding=padding)[:, 0]                    # (B, C)
            grad_kernel = torch.nn.grad.conv1d_weight(y[:, None], kernel.shape, grad_logit, padding=padding)
            grad_mean = along_channels(grad_y / x.shape[2:].numel(), x)
            return torch.addcmul(grad_mean, gradient, along_channels(omega, x)), gradient, grad_kernel


def attention(y, kernel, padding):
    """Compute ω (B, C) from y (B, C), kernel (1, 1, k) and padding (k - 1) / 2 (equation 9)."""
    return torch.sigmoid(F.conv1d(y[:, None], kernel, padding=padding)[:, 0])


def along_channels(vectors, x):
    """Reshape (B, C) to (B, C, 1, 1), in the dtype of x."""
    return vectors[:, :, None, None].to(x.dtype)


class ECA(nn.Module):
    """Scaling of each channel by ω = σ(Conv1D_k(y)), where y are the spatial means of the channels (equation 9).

    Args:
        kernel_size: k, the odd number of neighboring channels that determine each weight.
    """

    def __init__(self, kernel_size):
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"ECA kernel size: expected an odd number, found {kernel_size}")
        self.conv = nn.Conv1d(1, 1, kernel_size, padding=kernel_size // 2, bias=False)

    def forward(self, x, shortcut=None):
        """Map x (B, C, H, W) to x · ω, plus the shortcut (B, C, H, W) if given."""
        if shortcut is None:
            return x * self.weights(x)
        # `ScaleAndAdd` is not needed without gradients, nor under torch.compile, which generates the backward pass.
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return torch.addcmul(shortcut, x, self.weights(x))
        return ScaleAndAdd.apply(x, shortcut, self.conv.weight)

    def weights(self, x):
        """Compute ω (B, C, 1, 1) from x (B, C, H, W)."""
        return along_channels(attention(x.mean(dim=(2, 3)), self.conv.weight, self.conv.padding[0]), x)
