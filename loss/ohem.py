"""Online hard example mining over pixels. Shrivastava et al., CVPR 2016, in the form segmentation uses."""

import math

import numpy as np
import torch

from utils.parallel.processes import find_peers

from .cross_entropy import CrossEntropy


def keep_hardest(pixel_losses, valid, thres, min_kept, peers=None):
    """Which pixels count: those with p ≤ max(thres, k-th smallest p), p the probability of the true class.

    Args:
        pixel_losses: (P,) cross-entropies, -log p.
        valid: (P,) bool, False where the label is to be ignored.
        thres: probability.
        min_kept: k, pixels. Ties with the k-th are kept; with fewer valid pixels than k all are.
        peers: `utils.parallel.processes.Processes` or `utils.parallel.replicas.Replicas`, each with as many pixels of
            the batch, among all of which the k-th smallest is taken; None if these are all.

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


class OhemCrossEntropy(CrossEntropy):
    """Mean cross-entropy over the hardest pixels. Runs on the device, without a host copy.

    Args:
        thres: pixels whose true class has at most this probability always count.
        min_kept: never fewer than this many pixels of a call (or all that are valid).
        ignore_index: label of pixels that do not count.
        class_weights: as in `CrossEntropy`; which pixels are the hardest does not depend on them.
    """

    def __init__(self, thres=0.7, min_kept=100000, ignore_index=255, class_weights=None):
        super().__init__(ignore_index, class_weights)
        self.thres = thres
        self.min_kept = min_kept

    def select(self, losses, valid, images):
        return keep_hardest(losses, valid, self.thres, self.min_kept)

    def divisor(self, labels):
        return None     # the logits decide


class BatchOhemCrossEntropy(OhemCrossEntropy):
    """`OhemCrossEntropy` over a batch that processes or replicas share: they agree on its hardest pixels.

    Args as there, but min_kept: pixels for every two images of the batch.
    """

    def select(self, losses, valid, images):
        peers = find_peers()
        images *= 1 if peers is None else peers.size
        return keep_hardest(losses, valid, self.thres, self.min_kept * images // 2, peers)
