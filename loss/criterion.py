"""The training loss: a weighted sum of the losses of a network's outputs."""

from torch import nn

from utils.ops.upsampling import upsample

from .cross_entropy import CrossEntropy
from .ohem import BatchOhemCrossEntropy
from .upsampled import find_operators

WEIGHTS = {"fine": 0.7, "coarse": 0.6, "aux": 0.4}      # of ACFNet, as in the paper


class SegmentationCriterion(nn.Module):
    """Losses of a network's outputs by name, computed at the size of the labels.

    To add another kind of loss, write a class with the methods of `CrossEntropy`, and use it in `__init__`. Without a
    method `upsampled_sums` it is computed from logits that are upsampled to the size of the labels.

    Args:
        weights: {name of an output: weight of its loss}; None for those of ACFNet. Other outputs are not used.
        ignore_index: label of pixels that do not count.
        ohem: whether only the hardest pixels count in the loss of the output "fine".
        ohem_thres: pixels whose true class has at most this probability always count.
        ohem_keep: minimum number of pixels that count, per two images of the batch.
        class_weights: (N,), as in `CrossEntropy`.
        kernels: "triton" for Triton's kernels, which need no upsampled logits, where they support the logits; otherwise
            PyTorch's operators.
    """

    def __init__(self, weights=None, ignore_index=255, *, ohem=False, ohem_thres=0.7, ohem_keep=100000,
                 class_weights=None, kernels="torch"):
        super().__init__()
        self.kernels = kernels
        self.weights = dict(weights or WEIGHTS)
        self.terms = nn.ModuleDict({
            name: BatchOhemCrossEntropy(ohem_thres, ohem_keep, ignore_index, class_weights)
            if ohem and name == "fine" else CrossEntropy(ignore_index, class_weights) for name in self.weights})

    def sums(self, outputs, labels):
        """Add up the losses of pixels for each term.

        Args:
            outputs: {name: logits (B, N, h, w)}.
            labels: (B, H, W).

        Returns:
            {name: (K,)}, as from `CrossEntropy.sums`. Added up over devices, they are the sums of the batch.
        """
        return {name: self._term_sums(term, outputs[name], labels)
                for name, term in self.terms.items() if name in outputs}

    def _term_sums(self, term, logits, labels):
        size = labels.shape[-2:]
        operators = find_operators(self.kernels, logits, size) if hasattr(term, "upsampled_sums") else None
        if operators is None:
            return term.sums(upsample(logits, size), labels)
        return term.upsampled_sums(logits, labels, operators)

    def divisors(self, labels):
        """Divisors of the terms for labels (B, H, W): {name: scalar or None}, as from `CrossEntropy.divisor`."""
        return {name: term.divisor(labels) for name, term in self.terms.items()}

    def combine(self, sums, divisors=None, parts=1):
        """Compute the losses of a batch, without their weights.

        Args:
            sums: {name: (K,)}, `sums` of all images of the batch, or of one part if it is processed in several parts.
            divisors: with several parts, `divisors` of all labels of the batch. A term whose divisor is None becomes
                the mean over the parts, because it is unknown which pixels of the later parts will count.
            parts: number of parts.

        Returns:
            {name: scalar}. With several parts, their results add up to the losses of the batch.
        """
        divisors = divisors or {}
        losses = {name: self.terms[name].combine(values, divisors.get(name)) for name, values in sums.items()}
        return {name: loss if parts == 1 or divisors[name] is not None else loss / parts
                for name, loss in losses.items()}

    def forward(self, outputs, labels):
        """Map outputs {name: logits (B, N, h, w)} and labels (B, H, W) to {name: scalar loss}, without the weights.

        Losses are 0 if no pixel has a label.
        """
        return self.combine(self.sums(outputs, labels))

    def total(self, losses):
        """Weighted sum of losses {name: scalar}."""
        return sum(self.weights[name] * loss for name, loss in losses.items())
