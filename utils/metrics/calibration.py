"""Calibration of confidence, after Guo et al., On Calibration of Modern Neural Networks, ICML 2017."""

import numpy as np
import torch

from .iou import Counts, none_if_nan

BINS = 15                       # as in the paper; at most 127, whose multiples of `CERTAIN` fit in 32 bits
CERTAIN = 1 << 24               # units of a confidence of 1; float32 has no finer steps just below 1


class Calibration(Counts):
    """Counts pixels by confidence, the probability of the predicted class.

    Bin m of M holds the confidences in ((m - 1) / M, m / M]. Confidences are added up as integer multiples of
    1 / `CERTAIN`, so that sums depend neither on the order of the images nor on how processes share them.

    Args:
        ignore_index: label of pixels that do not count.
        bins: M.
    """

    def __init__(self, ignore_index=255, bins=BINS):
        super().__init__(3, bins + 1)       # rows: pixels, correct pixels, confidences; last column: ignored pixels
        self.ignore_index, self.bins = ignore_index, bins

    def update(self, confidence, prediction, label):
        """Add maps of one shape: confidences 0 to 1, predicted and true train ids; tensors on any device, or arrays."""
        confidence, prediction, label = (torch.as_tensor(a).reshape(-1) for a in (confidence, prediction, label))
        label = label.to(confidence.device)
        units = (confidence.float() * CERTAIN).round_().clamp_(0, CERTAIN).int()        # means may exceed 1 by rounding
        index = units.mul(self.bins).sub_(1).div_(CERTAIN, rounding_mode="floor").clamp_(min=0)  # ⌈confidence · M⌉ - 1
        index = torch.where(label == self.ignore_index, self.bins, index)
        columns, correct = self.bins + 1, prediction == label
        if index.is_cpu:        # as in `ConfusionMatrix`; sums of integers in float64 are exact
            pixels = torch.bincount(index + columns * correct, minlength=2 * columns).view(2, columns)
            units = torch.bincount(index, units.double(), minlength=columns).long()
            self._count(torch.stack([pixels.sum(0), pixels[1], units]))
            return
        values = torch.stack([torch.ones_like(units), correct.int(), units]).long()
        self._count(torch.zeros(3, columns, dtype=torch.int64, device=units.device).scatter_add_(
            1, index.long().expand(3, -1), values))

    def scores(self):
        """Compute the expected calibration error and the statistics of the bins.

        Returns:
            {"expected_calibration_error": fraction, "pixels": [count per bin], "accuracy": [fraction per bin],
            "confidence": [mean per bin]}; None where there are no pixels.
        """
        pixels, correct, units = self._counts.cpu().numpy()[:, :-1]
        # Equation (3): ECE = Σ |B_m| / n · |acc(B_m) - conf(B_m)|
        gaps = np.abs(correct - units / CERTAIN)      # |B_m| · |acc - conf|
        with np.errstate(invalid="ignore"):
            accuracy, confidence = correct / pixels, units / CERTAIN / pixels
            error = gaps.sum() / pixels.sum()
        return {"expected_calibration_error": none_if_nan(float(error)), "pixels": pixels.tolist(),
                "accuracy": [*map(none_if_nan, accuracy.tolist())],
                "confidence": [*map(none_if_nan, confidence.tolist())]}
