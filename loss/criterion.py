"""The training loss: a weighted sum of the losses of a network's outputs."""

from torch import nn

from utils.ops.upsampling import upsample

from .terms import TERMS, choose_terms
from .upsampled import find_operators

WEIGHTS = {"fine": 0.7, "coarse": 0.6, "aux": 0.4}      # of ACFNet, as in the paper


class SegmentationCriterion(nn.Module):
    """Losses of a network's outputs by name, computed at the size of the labels.

    To add another kind of loss, write a subclass of `Term` and name it in `loss.terms.TERMS`. Without a method
    `upsampled_sums` it is computed from logits that are upsampled to the size of the labels.

    Args:
        weights: {name of an output: weight of its loss}; None for those of ACFNet. Other outputs are not used.
        ignore_index: label of pixels that do not count.
        loss: terms of the loss of each output, as in `loss.terms.parse_terms`.
        ohem: whether only the hardest pixels count in the cross-entropy of the output "fine".
        ohem_thres: pixels whose true class has at most this probability always count.
        ohem_keep: minimum number of pixels that count, per two images of the batch.
        class_weights: (N,), as in the terms.
        kernels: "triton" for Triton's kernels, which need no upsampled logits, where they support the logits; otherwise
            PyTorch's operators.

    Attributes:
        terms: {name: `Term`}. The name is that of the output if it has one term; else fine_ce, fine_dice and so on.
        weights: {name of a term: its weight in the total}.
    """

    def __init__(self, weights=None, ignore_index=255, *, loss="ce", ohem=False, ohem_thres=0.7, ohem_keep=100000,
                 class_weights=None, kernels="torch"):
        super().__init__()
        self.kernels = kernels
        self.weights, self.terms, self._outputs = {}, nn.ModuleDict(), {}
        weights = weights or WEIGHTS
        for output, factors in choose_terms(loss, weights, ohem=ohem).items():
            for kind, factor in factors.items():
                name = output if len(factors) == 1 else f"{output}_{kind}"
                options = {"thres": ohem_thres, "min_kept": ohem_keep} if kind == "ohem" else {}
                self.weights[name] = factor * weights[output]
                self.terms[name] = TERMS[kind](ignore_index=ignore_index, class_weights=class_weights, **options)
                self._outputs.setdefault(output, []).append(name)

    def sums(self, outputs, labels):
        """Add up over pixels what each term depends on.

        Args:
            outputs: {name: logits (B, N, h, w)}.
            labels: (B, H, W).

        Returns:
            {name of a term: (K,)}, as from `Term.sums`. Added up over devices, they are the sums of the batch.
        """
        sums = {}
        for output, names in self._outputs.items():
            if output in outputs:
                sums |= self._output_sums(names, outputs[output], labels)
        return sums

    def _output_sums(self, names, logits, labels):
        """`sums` of the terms of one output, which share upsampled logits."""
        size, upsampled, sums = labels.shape[-2:], None, {}
        for name in names:
            term = self.terms[name]
            operators = find_operators(self.kernels, logits, size) if getattr(term, "upsampled_sums", None) else None
            if operators is not None:
                sums[name] = term.upsampled_sums(logits, labels, operators)
            else:
                upsampled = upsample(logits, size) if upsampled is None else upsampled
                sums[name] = term.sums(upsampled, labels)
        return sums

    def divisors(self, labels):
        """Divisors of the terms for labels (B, H, W): {name: scalar or None}, as from `Term.divisor`."""
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
