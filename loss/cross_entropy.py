"""Cross-entropy over the labeled pixels, a term of the training loss."""

import torch
import torch.nn.functional as F
from torch import nn

from utils.ops.autocast import at_least_float32


class CrossEntropy(nn.Module):
    """Mean cross-entropy over the labeled pixels of a batch.

    Like every term, it has two steps, because several devices may share a batch: `sums` adds up the pixels at hand, and
    `combine` makes the loss of the batch from the sums over all its pixels. Both are 0 if no pixel has a label.

    Args:
        ignore_index: label of pixels that do not count.
        class_weights: (N,) weights of the pixels of each class, in the sum and in what it is divided by, as in
            `torch.nn.CrossEntropyLoss`; None for 1.
    """

    def __init__(self, ignore_index=255, class_weights=None):
        super().__init__()
        self.ignore_index = ignore_index
        self.register_buffer("class_weights", None if class_weights is None else
                             torch.as_tensor(class_weights, dtype=torch.float32), persistent=False)

    def select(self, losses, valid, images):
        """Which pixels count.

        Args:
            losses: (P,) cross-entropies without class weights.
            valid: (P,) bool, whether a pixel has a label.
            images: number of images that the pixels come from.

        Returns:
            (P,) bool.
        """
        return valid

    def sums(self, logits, labels):
        """Add up the losses of pixels.

        Args:
            logits: (B, N, H, W).
            labels: (B, H, W), any integer dtype.

        Returns:
            (2,) in the dtype of the logits, at least float32: the sum of the losses of the pixels that count, and their
            number; with class weights the weighted sum, and the sum of the weights.
        """
        labels = labels.long()
        losses = F.cross_entropy(at_least_float32(logits), labels, ignore_index=self.ignore_index,
                                 reduction="none").flatten()
        counted = self.select(losses, (labels != self.ignore_index).flatten(), len(labels))
        weights = self._weights(labels.flatten(), counted)
        if self.class_weights is not None:
            losses = losses * weights.where(counted, 1)
        # where, not a product: 0 · inf would be nan.
        return torch.stack([torch.where(counted, losses, 0).sum(), weights.sum().to(losses.dtype)])

    def divisor(self, labels):
        """What the losses of labels (B, H, W) are divided by, if the labels alone decide it, else None; scalar."""
        return self._weights(labels.long(), labels != self.ignore_index).sum()

    def combine(self, sums, divisor=None):
        """The loss of a batch.

        Args:
            sums: (2,), those of all its pixels; or of some of them, with a divisor.
            divisor: `divisor` of all labels of the batch. The loss is then the share of the pixels in `sums`.

        Returns:
            Scalar.
        """
        total, count = sums
        if divisor is not None:
            count = divisor
        return total / count.where(count > 0, 1)

    def forward(self, logits, labels):
        """logits (B, N, H, W), labels (B, H, W) of any integer dtype → scalar."""
        return self.combine(self.sums(logits, labels))

    def _weights(self, labels, counted):
        """What each pixel counts for, in the shape of labels and counted: the weight of its class, or whether it
        counts."""
        if self.class_weights is None:
            return counted
        return self.class_weights[labels.where(counted, 0)].where(counted, 0)
