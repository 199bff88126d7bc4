"""Is a network right as often as it is sure? Guo et al., On Calibration of Modern Neural Networks, ICML 2017."""

import numpy as np
import torch

from .iou import Counts, none_if_nan

BINS = 15                       # as in the paper
CERTAIN = 1 << 24               # float32 has no finer steps below 1


class Calibration(Counts):
    """Counts pixels by the confidence of their prediction, the probability of the class that was chosen.

    Bin m of M holds confidences above (m - 1) / M, up to and with m / M. Confidences are added up as whole numbers of
    1 / `CERTAIN`: sums then depend neither on their order nor on who shares the images.

    Args:
        ignore_index: truth that does not count.
        bins: M.
    """

    def __init__(self, ignore_index=255, bins=BINS):
        super().__init__(3, bins + 1)       # pixels, those that are right, confidences; ignored pixels last
        self.ignore_index, self.bins = ignore_index, bins

    def update(self, confidence, prediction, label):
        """Add maps of one shape: confidences 0 to 1, predicted and true train ids; tensors, any device, or arrays."""
        confidence, prediction, label = (torch.as_tensor(a).reshape(-1) for a in (confidence, prediction, label))
        label = label.to(confidence.device)
        units = (confidence.float() * CERTAIN).round().long().clamp(0, CERTAIN)    # means may exceed 1 by rounding
        place = (units * self.bins - 1).div(CERTAIN, rounding_mode="floor").clamp(min=0)    # ⌈confidence · M⌉ - 1
        place = torch.where(label == self.ignore_index, self.bins, place)
        values = torch.stack([torch.ones_like(units), (prediction == label).long(), units])
        self._count(torch.zeros(3, self.bins + 1, dtype=torch.int64, device=units.device).scatter_add_(
            1, place.expand(3, -1), values))

    def scores(self):
        """Plain values: the expected calibration error and, of each bin, its pixels, their accuracy and their mean
        confidence. Fractions; None where there are no pixels."""
        pixels, right, units = self._counts.cpu().numpy()[:, :-1]
        # Equation (3): ECE = Σ |B_m| / n · |acc(B_m) - conf(B_m)|
        gaps = np.abs(right - units / CERTAIN)      # |B_m| · |acc - conf|
        with np.errstate(invalid="ignore"):
            accuracy, confidence = right / pixels, units / CERTAIN / pixels
            error = gaps.sum() / pixels.sum()
        return {"expected_calibration_error": none_if_nan(float(error)), "pixels": pixels.tolist(),
                "accuracy": [*map(none_if_nan, accuracy.tolist())],
                "confidence": [*map(none_if_nan, confidence.tolist())]}
