"""The training loss: a weighted sum of losses of a network's outputs."""

from torch import nn

from utils.ops.upsampling import upsample

from .cross_entropy import CrossEntropy
from .ohem import BatchOhemCrossEntropy

WEIGHTS = {"fine": 0.7, "coarse": 0.6, "aux": 0.4}      # of ACFNet, in the paper


class SegmentationCriterion(nn.Module):
    """Named losses of a network's outputs, at the size of the labels.

    A loss of another kind is a class with the methods of `CrossEntropy`, chosen here.

    Args:
        weights: {output: factor of its loss}; None for those of ACFNet. Outputs without a factor are not used.
        ignore_index: label of pixels that do not count.
        ohem: count only the hardest pixels in the fine term.
        ohem_thres: probability of the true class up to which a pixel always counts.
        ohem_keep: pixels that count at least, for every two images of the batch.
        class_weights: (N,), as in `CrossEntropy`.
    """

    def __init__(self, weights=None, ignore_index=255, *, ohem=False, ohem_thres=0.7, ohem_keep=100000,
                 class_weights=None):
        super().__init__()
        self.weights = dict(weights or WEIGHTS)
        self.terms = nn.ModuleDict({
            name: BatchOhemCrossEntropy(ohem_thres, ohem_keep, ignore_index, class_weights)
            if ohem and name == "fine" else CrossEntropy(ignore_index, class_weights) for name in self.weights})

    def sums(self, outputs, labels):
        """What these images add to each term.

        Args:
            outputs: {name: logits (B, N, h, w)}.
            labels: (B, H, W).

        Returns:
            {name: (K,)}; sums over devices are the sums of a batch.
        """
        return {name: term.sums(upsample(outputs[name], labels.shape[-2:]), labels)
                for name, term in self.terms.items() if name in outputs}

    def divisors(self, labels):
        """{name: scalar, or None if the logits decide it} for labels (B, H, W), as in `CrossEntropy.divisor`."""
        return {name: term.divisor(labels) for name, term in self.terms.items()}

    def combine(self, sums, divisors=None, parts=1):
        """Losses of a batch, before weighting.

        Args:
            sums: {name: (K,)}, over all its images; or of one part of several, one after the other.
            divisors: with several parts, those of all labels of the batch. A term without one is the mean over the
                parts, because what counts in the other parts is not known yet.
            parts: their number. The results of all parts add up to the losses of the batch.

        Returns:
            {name: scalar}.
        """
        divisors = divisors or {}
        losses = {name: self.terms[name].combine(values, divisors.get(name)) for name, values in sums.items()}
        return {name: loss if parts == 1 or divisors[name] is not None else loss / parts
                for name, loss in losses.items()}

    def forward(self, outputs, labels):
        """Logits by name, labels (B, H, W) → {name: scalar loss}, before weighting; 0 if nothing is labeled."""
        return self.combine(self.sums(outputs, labels))

    def total(self, losses):
        """{name: scalar} → their weighted sum."""
        return sum(self.weights[name] * loss for name, loss in losses.items())
