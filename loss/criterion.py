"""The training loss: 0.7 · fine + 0.6 · coarse + 0.4 · aux, each a cross-entropy over the labelled pixels."""

import torch.nn.functional as F
from torch import nn

from utils.distributed import find_parts
from utils.precision import at_least_float32
from utils.upsampling import upsample_by_products

from .ohem import keep_hardest, masked_cross_entropy

WEIGHTS = {"fine": 0.7, "coarse": 0.6, "aux": 0.4}


class SegmentationCriterion(nn.Module):
    """Named losses of a network's outputs, at the size of the labels.

    A term is a sum over pixels divided by a number of pixels; `sums` hands out both, so that the number
    can be counted over all devices before the division.

    Args:
        weights: factor of each term. Outputs without a factor are not looked at.
        ignore_index: label of pixels that do not count.
        ohem: count only the hardest pixels in the fine term.
        ohem_thres: probability of the true class up to which a pixel always counts.
        ohem_keep: pixels that count at least, for every two images of the batch.
    """

    def __init__(self, weights=None, ignore_index=255, ohem=False, ohem_thres=0.7, ohem_keep=100000):
        super().__init__()
        self.weights = dict(weights or WEIGHTS)
        self.ignore_index = ignore_index
        self.ohem = ohem
        self.ohem_thres = ohem_thres
        self.ohem_keep = ohem_keep

    def picks(self, name):
        """Whether only some of the labelled pixels count in a term."""
        return self.ohem and name == "fine"

    def sums(self, outputs, labels):
        """Logits by name (each (B, N, h, w)), labels (B, H, W) → {name: (sum of losses, pixels counted)}.

        With OHEM, processes or replicas that share a batch, equally, agree which of its pixels are the hardest.
        """
        def hardest(losses, valid):
            parts = find_parts()
            images = len(labels) * (1 if parts is None else parts.size)
            return keep_hardest(losses, valid, self.ohem_thres, self.ohem_keep * images // 2, parts)

        return {name: masked_cross_entropy(upsample(outputs[name], labels.shape[-2:]), labels,
                                           self.ignore_index,
                                           hardest if self.picks(name) else None)
                for name in self.weights if name in outputs}

    def forward(self, outputs, labels):
        """Logits by name, labels (B, H, W) → {name: scalar loss}, before weighting; 0 with nothing labelled."""
        return {name: total / count.clamp(min=1) for name, (total, count) in self.sums(outputs, labels).items()}

    def total(self, losses):
        """{name: scalar} → their weighted sum."""
        return sum(self.weights[name] * loss for name, loss in losses.items())


def upsample(logits, size):
    """Logits (B, N, h, w) → (B, N, *size) in at least float32, bilinear with aligned corners."""
    logits = at_least_float32(logits)
    if logits.is_cuda:
        return upsample_by_products(logits, size)
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=True)
