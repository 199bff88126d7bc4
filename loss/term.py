"""What the terms of the training loss have in common."""

import torch
from torch import nn


class Term(nn.Module):
    """A loss of the labeled pixels of a batch; 0 if there are none.

    It is computed in two steps, because several devices may share a batch: `sums` adds up what the loss depends on over
    some pixels, and `combine` computes the loss of the batch from the sums over all its pixels.

    Args:
        ignore_index: label of pixels that do not count.
        class_weights: (N,) weight of each class; None for 1.

    Attributes:
        needs_whole_batch: whether the batch cannot be processed in parts, because the gradient of a part depends on the
            logits of the others.
        upsampled_sums: method as in `CrossEntropy` of terms that need no upsampled logits, else None.
    """

    needs_whole_batch = False
    upsampled_sums = None

    def __init__(self, ignore_index=255, class_weights=None):
        super().__init__()
        self.ignore_index = ignore_index
        self.register_buffer("class_weights", None if class_weights is None else
                             torch.as_tensor(class_weights, dtype=torch.float32), persistent=False)

    def sums(self, logits, labels):
        """Map logits (B, N, H, W) and labels (B, H, W), of any integer dtype, to sums (K,) of at least float32."""
        raise NotImplementedError

    def divisor(self, labels):
        """Divisor of the mean for labels (B, H, W), as a scalar; None if it also depends on the logits."""
        return None

    def combine(self, sums, divisor=None):
        """Compute the loss of a batch.

        Args:
            sums: (2,), `sums` of all pixels of the batch or, with a divisor, of a part of them.
            divisor: `divisor` of all labels of the batch; None for the second value of `sums`.

        Returns:
            Scalar: the loss of the batch; if `sums` is that of a part of the pixels, their share of it.
        """
        total, count = sums
        if divisor is not None:
            count = divisor
        return total / count.where(count > 0, 1)

    def forward(self, logits, labels):
        """Map logits (B, N, H, W) and labels (B, H, W), of any integer dtype, to a scalar loss."""
        return self.combine(self.sums(logits, labels))
