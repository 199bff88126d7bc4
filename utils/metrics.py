"""Scores of a segmentation, as cityscapesScripts' pixel-level evaluation computes them."""

import numpy as np
import torch


class ConfusionMatrix:
    """Counts pixels by truth and prediction.

    Args:
        num_classes: N.
        ignore_index: truth that does not count; as a prediction it is void and counts as a miss.

    Attributes:
        matrix: (N, N + 1) int64 tensor, rows the truth, the last column void predictions.
    """

    def __init__(self, num_classes, ignore_index=255):
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.matrix = torch.zeros(num_classes, num_classes + 1, dtype=torch.int64)

    def update(self, prediction, label):
        """Add maps of train ids, any shape, any integer dtype; tensors (any device) or NumPy arrays.

        Raises ValueError where the label holds a value that is neither a class nor the ignore index.
        """
        prediction, label = (torch.as_tensor(a).reshape(-1).long() for a in (prediction, label))
        n = self.num_classes
        counted = label != self.ignore_index
        prediction, label = prediction[counted], label[counted]
        if len(label) and not 0 <= int(label.min()) <= int(label.max()) < n:
            raise ValueError(f"label: expected train ids 0 to {n - 1} or {self.ignore_index}, "
                             f"found {int(label.min())} to {int(label.max())}")
        prediction = torch.where((prediction >= 0) & (prediction < n), prediction, n)
        counts = torch.bincount(label * (n + 1) + prediction, minlength=n * (n + 1))
        self.matrix += counts.view(n, n + 1).to(self.matrix.device)

    def class_iou(self):
        """(N,) float64: TP / (TP + FP + FN); NaN where all three are zero."""
        return self._iou(np.eye(self.num_classes, dtype=bool))

    def mean_iou(self):
        """Mean over the classes that are not NaN; NaN if all are."""
        return mean_of_known(self.class_iou())

    def category_iou(self, categories):
        """categories: N names. Returns {name: IoU}, in order of first appearance."""
        names = list(dict.fromkeys(categories))
        member = np.array([[category == name for category in categories] for name in names])
        return dict(zip(names, self._iou(member).tolist(), strict=True))

    def pixel_accuracy(self):
        """Share of the labelled pixels that are right; NaN without any."""
        total = int(self.matrix.sum())
        return int(self.matrix.diagonal().sum()) / total if total else float("nan")

    def _iou(self, member):
        """member (K, N) bool, the classes of each group → (K,) IoU of the groups."""
        matrix = self.matrix.cpu().numpy()
        member = member.astype(np.int64)
        inner = matrix[:, :-1]
        true = np.einsum("ki,ij,kj->k", member, inner, member)
        union = member @ matrix.sum(1) + member @ inner.sum(0) - true
        return np.divide(true, union, out=np.full(len(member), np.nan), where=union > 0)

    def scores(self, names, categories):
        """All scores as one dict of plain values, fractions; None for NaN."""
        class_iou = self.class_iou()
        category_iou = self.category_iou(categories)
        return {
            "mean_iou": none_if_nan(self.mean_iou()),
            "class_iou": {name: none_if_nan(iou) for name, iou in zip(names, class_iou.tolist(), strict=True)},
            "category_iou": {name: none_if_nan(iou) for name, iou in category_iou.items()},
            "mean_category_iou": none_if_nan(mean_of_known(list(category_iou.values()))),
            "pixel_accuracy": none_if_nan(self.pixel_accuracy()),
            "classes_averaged": int(np.count_nonzero(~np.isnan(class_iou))),
        }


def mean_of_known(values):
    """Mean of the values that are not NaN, summed in order as the official script does; NaN without any."""
    known = [float(value) for value in values if value == value]
    return sum(known) / len(known) if known else float("nan")


def none_if_nan(value):
    return None if value != value else value
