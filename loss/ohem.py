"""Online hard example mining over pixels. Shrivastava et al., CVPR 2016, in the form segmentation uses."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from utils.ops.autocast import at_least_float32


def keep_hardest(pixel_losses, valid, thres, min_kept, peers=None):
    """Which pixels count: those with p ≤ max(thres, k-th smallest p), p the probability of the true class.

    Args:
        pixel_losses: (P,) cross-entropies, -log p.
        valid: (P,) bool, False where the label is to be ignored.
        thres: probability.
        min_kept: k, pixels. Ties with the k-th are kept; with fewer valid pixels than k all are.
        peers: `utils.distributed.Processes` or `utils.replicas.Replicas` with as many pixels of the batch
            each, among all of which the k-th smallest is found; None if these are all.

    Returns:
        (P,) bool.
    """
    # In the order of losses: largest first. Ignored pixels sort last.
    limit = -math.log(thres) if thres > 0 else math.inf
    if min_kept > 0:
        ranked = pixel_losses.detach().masked_fill(~valid, -math.inf)
        if peers is not None:       # the k hardest of all are among the k hardest of each
            hardest = ranked.topk(min(min_kept, len(ranked)), sorted=False).values
            ranked = torch.cat(peers.gather(hardest))
        k = min(min_kept, len(ranked))
        limit = kth_smallest(ranked, len(ranked) - k + 1).clamp(max=limit)
    # Not "≥": a loss that is not a number must reach the sum and be seen.
    return ~(pixel_losses < limit) & valid


def kth_smallest(values, k):
    """The k-th smallest of values (P,), k from 1, as a scalar tensor on their device."""
    if values.is_cpu:       # NumPy reads the same memory and selects ten times faster than kthvalue
        return values.new_tensor(np.partition(values.numpy(), k - 1)[k - 1])
    return values.topk(len(values) - k + 1, sorted=False).values.min()      # kthvalue uses one block of a GPU


class OhemCrossEntropy(nn.Module):
    """Mean cross-entropy over the hardest pixels of a call. Runs on the device, without a host copy.

    Args:
        thres: pixels whose true class has at most this probability always count.
        min_kept: never fewer than this many pixels of this call (or all that are valid).
        ignore_index: label of pixels that do not count.
    """

    def __init__(self, thres=0.7, min_kept=100000, ignore_index=255):
        super().__init__()
        self.thres = thres
        self.min_kept = min_kept
        self.ignore_index = ignore_index

    def sums(self, logits, labels):
        """logits (B, N, H, W), labels (B, H, W) → (sum of the kept losses, number of kept pixels)."""
        return masked_cross_entropy(
            logits, labels, self.ignore_index,
            lambda losses, valid: keep_hardest(losses, valid, self.thres, self.min_kept))

    def forward(self, logits, labels):
        """logits (B, N, H, W), labels (B, H, W) of any integer dtype → scalar; 0 if every pixel is ignored."""
        total, count = self.sums(logits, labels)
        return total / count.clamp(min=1)


def pixel_weights(labels, counted, class_weights=None):
    """What each pixel counts for: labels int64 and counted bool of one shape → the weight of its class, 0 where it does
    not count; without weights (N,), whether it counts."""
    return counted if class_weights is None else class_weights[labels.where(counted, 0)].where(counted, 0)


def masked_cross_entropy(logits, labels, ignore_index, select=None, class_weights=None):
    """Sum of the pixels' cross-entropies and the number of pixels in it; or, with weights of the classes, the weighted
    sum and the sum of the weights, as `torch.nn.CrossEntropyLoss` does.

    Args:
        logits: (B, N, H, W).
        labels: (B, H, W), any integer dtype.
        ignore_index: label that does not count.
        select: (losses (P,) without weights, valid (P,)) → (P,) bool, the pixels to count; None for every valid one.
        class_weights: (N,) float, or None.

    Returns:
        (scalar of the logits' dtype, at least float32; scalar int64, or float with weights), both on the device of the
        logits.
    """
    labels = labels.long()
    losses = F.cross_entropy(at_least_float32(logits), labels, ignore_index=ignore_index, reduction="none").flatten()
    valid = (labels != ignore_index).flatten()
    kept = valid if select is None else select(losses, valid)
    weights = pixel_weights(labels.flatten(), kept, class_weights)
    if class_weights is not None:
        losses = losses * weights.where(kept, 1)
    # where, not a product: 0 · inf would be nan.
    return torch.where(kept, losses, 0).sum(), weights.sum()
