"""Losses of the overlap of predicted and true regions: terms of the training loss.

A region consists of the pixels of a class in the whole batch. The loss is the mean over the classes that have true
pixels there, weighted by the class weights.
"""

import torch

from utils.ops.autocast import at_least_float32
from utils.parallel.processes import find_peers

from .term import Term


class RegionTerm(Term):
    """A term that needs the probabilities of all pixels. Arguments as in `Term`."""

    needs_whole_batch = True

    def _regions(self, logits, labels):
        """Probabilities (B, N, H, W), and masks of true pixels (B, N, H, W) and of labeled pixels (B, 1, H, W)."""
        probabilities, labels = at_least_float32(logits).softmax(1), labels[:, None]
        valid, classes = labels != self.ignore_index, torch.arange(logits.shape[1], device=labels.device)
        return probabilities, (labels == classes.view(-1, 1, 1)) & valid, valid

    def _weight(self, classes):
        """Weight of classes, of a number or slice."""
        return 1 if self.class_weights is None else self.class_weights[classes]


class DiceLoss(RegionTerm):
    """Dice loss: Milletari et al., 3DV 2016, but with plain sums: 1 - 2 · Σ p·t / (Σ p + Σ t) for each class.

    Here p is the probability of the class, t is 1 at its true pixels and else 0. Arguments as in `Term`.
    """

    def sums(self, logits, labels):
        """As `Term.sums`, (3 · N,): Σ p·t of each class, then Σ p, then Σ t."""
        probabilities, true, valid = self._regions(logits, labels)
        # torch.where instead of a product with the mask, because 0 · inf is nan.
        overlap, predicted = (torch.where(mask, probabilities, 0).sum((0, 2, 3)) for mask in (true, valid))
        return torch.cat([overlap, predicted, true.sum((0, 2, 3)).to(overlap.dtype)])

    def combine(self, sums, divisor=None):
        overlap, predicted, count = sums.view(3, -1)
        losses = 1 - 2 * overlap / (predicted + count).where(count > 0, 1)
        weights = (count > 0) * self._weight(slice(None))
        return super().combine(((losses * weights).sum(), weights.sum()))


class LovaszSoftmax(RegionTerm):
    """Lovász-softmax loss: Berman et al., CVPR 2018, over all pixels of the batch ("per_image=False" in their code).

    The gradient at a pixel depends on the rank of its error in the batch. Devices that share the batch therefore gather
    the errors, one class at a time: each receives 4 bytes per pixel of the batch N times, and sorts them. For the
    backward pass a device keeps 9 bytes per class and pixel of its own. Arguments as in `Term`.
    """

    def sums(self, logits, labels):
        """As `Term.sums`, (2,): this device's share of the weighted losses of classes, and of the sum of weights."""
        probabilities, true, valid = self._regions(logits, labels)
        errors = torch.where(true, 1 - probabilities, probabilities)
        gradients, weight = self._gradients(errors.detach().where(valid, -1), labels)
        return torch.stack([torch.where(valid, errors * gradients, 0).sum(), weight])

    @torch.no_grad()
    def _gradients(self, errors, labels):
        """Gradients of the weighted losses of classes, each of which is the scalar product of errors and gradients.

        Args:
            errors: (B, N, H, W), -1 where the label is ignored.
            labels: (B, H, W).

        Returns:
            (gradients like errors, weight of the classes in the batch divided by the number of devices).
        """
        peers = find_peers()
        size, rank = (1, 0) if peers is None else (peers.size, peers.rank)

        def gather(values):
            return values if peers is None else torch.cat(peers.gather(values))

        labels, gradients, weight = gather(labels.flatten()), torch.zeros_like(errors), errors.new_zeros(())
        for number in range(errors.shape[1]):
            true = (labels == number) & (labels != self.ignore_index)
            if true.is_cpu and not true.any():      # the host would have to wait for a GPU
                continue
            values = lovasz_gradient(gather(errors[:, number].flatten()), true) * self._weight(number)
            gradients[:, number] = values.chunk(size)[rank].view_as(errors[:, number])
            weight += true.any() * self._weight(number)
        return gradients, weight / size


def lovasz_gradient(errors, true):
    """Gradient of the Lovász extension of the Jaccard loss of a class with respect to its errors.

    Algorithm 1 of the paper: with the errors in descending order, J(i) - J(i - 1), where J(i) = 1 - (T - t) / (T + f)
    is the Jaccard loss with i wrong pixels, t true ones and f others, and T is the number of all true pixels. The
    differences are computed without subtracting numbers that are almost equal: 1 / (T + f) if pixel i is true,
    otherwise (T - t) / ((T + f) · (T + f - 1)).

    Args:
        errors: (P,).
        true: (P,) bool, true pixels of the class.

    Returns:
        (P,); 0 if no pixel is true.
    """
    order = errors.sort(descending=True, stable=True).indices       # stable: the same in all processes
    true = true[order]
    wrong_true = true.cumsum(0)
    wrong_others = torch.arange(1, len(true) + 1, device=true.device) - wrong_true
    missed, union = ((wrong_true[-1] + counts).to(errors.dtype) for counts in (-wrong_true, wrong_others))
    steps = torch.where(true, 1 / union, missed / (union * (union - 1)))
    return torch.zeros_like(errors).scatter_(0, order, steps.where(wrong_true[-1] > 0, 0))
