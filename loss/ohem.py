"""Online hard example mining (OHEM) over pixels: Shrivastava et al., CVPR 2016, as it is used in segmentation."""

import math

import numpy as np
import torch

from utils.parallel.processes import find_peers

from .cross_entropy import CrossEntropy


def keep_hardest(pixel_losses, valid, thres, min_kept, peers=None):
    """Select pixels with p ≤ max(thres, k-th smallest p), where p is the probability of the true class.

    Args:
        pixel_losses: (P,) cross-entropies, -log p.
        valid: (P,) bool, False where the label is ignored.
        thres: probability.
        min_kept: k, in pixels. Ties with the k-th pixel are kept. If fewer than k pixels are valid, all of them are.
        peers: `utils.parallel.processes.Processes` or `utils.parallel.replicas.Replicas` that share the batch, with the
            same number of pixels each; the k-th smallest is taken over the pixels of all. None if the batch is not
            shared.

    Returns:
        (P,) bool, True for the selected pixels.
    """
    # In terms of losses: p ≤ thres is loss ≥ -log(thres), and the k-th smallest p is the k-th largest loss. Pixels that
    # are not valid have the smallest loss.
    min_loss = -math.log(thres) if thres > 0 else math.inf
    if min_kept > 0:
        losses = pixel_losses.detach().masked_fill(~valid, -math.inf)
        if peers is not None:       # the k hardest pixels of the batch are among the k hardest of each peer
            hardest = losses.topk(min(min_kept, len(losses)), sorted=False).values
            losses = torch.cat(peers.gather(hardest))
        k = min(min_kept, len(losses))
        min_loss = kth_smallest(losses, len(losses) - k + 1).clamp(max=min_loss)
    # Not "≥": a loss that is not a number must not be dropped, so that it shows in the sum.
    return ~(pixel_losses < min_loss) & valid


def kth_smallest(values, k):
    """Return the k-th smallest of values (P,), k from 1, as a scalar tensor on their device."""
    if values.is_cpu:       # NumPy reads the same memory, and is ten times faster than kthvalue
        return values.new_tensor(np.partition(values.numpy(), k - 1)[k - 1])
    return values.topk(len(values) - k + 1, sorted=False).values.min()      # kthvalue uses one block of a GPU


class OhemCrossEntropy(CrossEntropy):
    """Mean cross-entropy over the hardest pixels. Computed on the device, without copies to the host.

    Args:
        thres: pixels whose true class has at most this probability always count.
        min_kept: minimum number of pixels of a call that count; all valid ones, if there are fewer.
        ignore_index: label of pixels that do not count.
        class_weights: as in `CrossEntropy`. They do not influence which pixels are the hardest.
    """

    selects = True

    def __init__(self, thres=0.7, min_kept=100000, ignore_index=255, class_weights=None):
        super().__init__(ignore_index, class_weights)
        self.thres = thres
        self.min_kept = min_kept

    def select(self, losses, valid, images):
        return keep_hardest(losses, valid, self.thres, self.min_kept)

    def divisor(self, labels):
        return None     # depends on the logits


class BatchOhemCrossEntropy(OhemCrossEntropy):
    """`OhemCrossEntropy` over the hardest pixels of a batch, which processes or replicas may share.

    Arguments as in `OhemCrossEntropy`, but `min_kept` is the number of pixels per two images of the batch.
    """

    def select(self, losses, valid, images):
        peers = find_peers()
        images_in_batch = images * (1 if peers is None else peers.size)
        return keep_hardest(losses, valid, self.thres, self.min_kept * images_in_batch // 2, peers=peers)
