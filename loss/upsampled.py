"""Sums of cross-entropies of upsampled logits as one operation of autograd."""

import torch
from torch.autograd.function import once_differentiable


def find_operators(kernels, logits, size):
    """Return the module that computes the loss of logits (B, N, h, w) at a size (H, W); None if it does not support it.

    Args:
        kernels: as in `SegmentationCriterion`. Both modules have the same functions; Triton is imported only if it is
            chosen.
        logits, size: as in the `supports` of the modules.
    """
    if kernels == "triton":
        from libs.fused import cross_entropy as operators
    else:
        from . import strips as operators
    return operators if operators.supports(logits, size) else None


class UpsampledCrossEntropy(torch.autograd.Function):
    """`CrossEntropy.sums` of logits (B, N, h, w), without their map of the full size.

    The gradient is computed in the forward pass, together with the sum, and kept for the backward pass: it has the size
    of the logits.
    """

    @staticmethod
    def forward(ctx, logits, operators, *arguments):
        """arguments: those of `operators.sums` from the labels to `counted`."""
        sums, gradient = operators.sums(logits, *arguments, with_gradient=ctx.needs_input_grad[0])
        ctx.save_for_backward(gradient)
        ctx.dtype = logits.dtype
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx, d_sums):
        gradient, = ctx.saved_tensors
        # The second sum, the number of pixels, does not depend on the logits.
        return (gradient * d_sums[0]).to(ctx.dtype), *[None] * (len(ctx.needs_input_grad) - 1)
