"""The training loss: a weighted sum of the cross-entropies of a network's heads over the labeled pixels."""

import torch
from torch import nn

from utils.ops.upsampling import upsample
from utils.parallel.processes import find_peers

from .ohem import keep_hardest, masked_cross_entropy, pixel_weights

WEIGHTS = {"fine": 0.7, "coarse": 0.6, "aux": 0.4}      # of ACFNet, in the paper


class SegmentationCriterion(nn.Module):
    """Named losses of a network's outputs, at the size of the labels.

    A term is a sum over pixels divided by a number of pixels; `sums` hands out both, so that the number
    can be counted over all devices before the division.

    Args:
        weights: {output: factor of its loss}; None for those of ACFNet. Outputs without a factor are not looked at.
        ignore_index: label of pixels that do not count.
        ohem: count only the hardest pixels in the fine term.
        ohem_thres: probability of the true class up to which a pixel always counts.
        ohem_keep: pixels that count at least, for every two images of the batch.
        class_weights: N numbers by which the losses of a class's pixels count, in the mean and in what it is divided
            by, as in `torch.nn.CrossEntropyLoss`; which pixels are the hardest does not depend on them. None for 1.
    """

    def __init__(self, weights=None, ignore_index=255, *, ohem=False, ohem_thres=0.7, ohem_keep=100000,
                 class_weights=None):
        super().__init__()
        self.weights = dict(weights or WEIGHTS)
        self.ignore_index = ignore_index
        self.ohem = ohem
        self.ohem_thres = ohem_thres
        self.ohem_keep = ohem_keep
        self.register_buffer("class_weights", None if class_weights is None else
                             torch.as_tensor(class_weights, dtype=torch.float32), persistent=False)

    def counts_hardest_only(self, name):
        """Whether OHEM decides which of the labeled pixels count in a term."""
        return self.ohem and name == "fine"

    def labeled(self, labels):
        """What all labeled pixels of labels (B, H, W) count for: their number, or the sum of their weights; scalar."""
        return pixel_weights(labels.long(), labels != self.ignore_index, self.class_weights).sum()

    def sums(self, outputs, labels):
        """Logits by name (each (B, N, h, w)), labels (B, H, W) → {name: (sum of losses, pixels counted)}; with weights
        of the classes, weighted sums and the sum of the weights.

        With OHEM, processes or replicas that share a batch, equally, agree which of its pixels are the hardest.
        """
        def hardest(losses, valid):
            peers = find_peers()
            images = len(labels) * (1 if peers is None else peers.size)
            return keep_hardest(losses, valid, self.ohem_thres, self.ohem_keep * images // 2, peers)

        return {name: masked_cross_entropy(upsample(outputs[name], labels.shape[-2:]), labels,
                                           self.ignore_index,
                                           hardest if self.counts_hardest_only(name) else None, self.class_weights)
                for name in self.weights if name in outputs}

    def forward(self, outputs, labels):
        """Logits by name, labels (B, H, W) → {name: scalar loss}, before weighting; 0 with nothing labeled."""
        return {name: total / count.where(count > 0, 1) for name, (total, count) in self.sums(outputs, labels).items()}

    def total(self, losses):
        """{name: scalar} → their weighted sum."""
        return sum(self.weights[name] * loss for name, loss in losses.items())
