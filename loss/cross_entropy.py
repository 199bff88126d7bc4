"""Cross-entropy over the labeled pixels: a term of the training loss."""

import torch
import torch.nn.functional as F

from utils.ops.autocast import at_least_float32

from .term import Term
from .upsampled import UpsampledCrossEntropy


class CrossEntropy(Term):
    """Mean cross-entropy over the labeled pixels of a batch.

    Args:
        ignore_index: label of pixels that do not count.
        class_weights: (N,) weight of the pixels of each class, in both the sum and the divisor of the mean, as in
            `torch.nn.CrossEntropyLoss`; None for 1.

    Attributes:
        selects: whether `select` depends on the losses.
    """

    selects = False

    def pixel_losses(self, logits, labels):
        """Losses of pixels without class weights: (B, H, W) from logits (B, N, H, W) and labels (B, H, W), int64."""
        return F.cross_entropy(at_least_float32(logits), labels, ignore_index=self.ignore_index, reduction="none")

    def select(self, losses, valid, images):
        """Select the pixels that count.

        Args:
            losses: (P,) cross-entropies without class weights.
            valid: (P,) bool, whether a pixel has a label.
            images: number of images to which the pixels belong.

        Returns:
            (P,) bool, True for pixels that count.
        """
        return valid

    def sums(self, logits, labels):
        """Add up the losses of pixels.

        Args:
            logits: (B, N, H, W).
            labels: (B, H, W), any integer dtype.

        Returns:
            (2,) in the dtype of the logits, at least float32: the sum of the losses of the pixels that count, and the
            number of these pixels. With class weights: the weighted sum, and the sum of the weights.
        """
        labels = labels.long()
        losses = self.pixel_losses(logits, labels).flatten()
        counted = self.select(losses, (labels != self.ignore_index).flatten(), len(labels))
        weights = self._weights(labels.flatten(), counted)
        if self.class_weights is not None:
            losses = losses * weights.where(counted, 1)
        # torch.where instead of a product with the mask, because 0 · inf is nan.
        return torch.stack([torch.where(counted, losses, 0).sum(), weights.sum().to(losses.dtype)])

    def upsampled_sums(self, logits, labels, operators):
        """As `sums` of logits (B, N, h, w) upsampled to the size of the labels, but without their map of that size.

        Args:
            logits, labels: as in `sums`, but for the size of the logits.
            operators: from `find_operators`.
        """
        counted = None
        if self.selects:
            losses = operators.pixel_losses(logits, labels, self.ignore_index)
            valid = labels.long() != self.ignore_index
            counted = self.select(losses.flatten(), valid.flatten(), len(labels)).view_as(labels)
        return UpsampledCrossEntropy.apply(logits, operators, labels, self.ignore_index, self.class_weights, counted)

    def divisor(self, labels):
        return self._weights(labels.long(), labels != self.ignore_index).sum()

    def _weights(self, labels, counted):
        """Weight of each pixel where `counted`, else 0: its class weight, or True without class weights."""
        if self.class_weights is None:
            return counted
        return self.class_weights[labels.where(counted, 0)].where(counted, 0)
