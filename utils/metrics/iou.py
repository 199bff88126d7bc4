"""IoU, accuracy and instance-weighted IoU, computed as the pixel-level evaluation of cityscapesScripts does."""

import functools
import operator

import numpy as np
import torch


class Counts:
    """Integer counts that stay on the device of the predictions, so that the host waits only when they are read."""

    def __init__(self, *shape):
        self._counts = torch.zeros(shape, dtype=torch.int64)

    def add(self, other):
        """Add counts of the same kind, on any device."""
        self._counts = self._counts.to(other._counts.device) + other._counts

    def to_host(self):
        """A copy on the host, without waiting for the device: see `utils.parallel.threads.copies_of`."""
        other = object.__new__(type(self))      # `copy.copy` would call `__getstate__`, which waits
        vars(other).update(vars(self), _counts=self._counts.to("cpu", non_blocking=True))
        return other

    def _count(self, counts):
        # A copy to a GPU can run asynchronously; the host must wait for a copy from a GPU.
        self._counts = self._counts.to(counts.device, non_blocking=self._counts.is_cpu) + counts

    def __getstate__(self):     # another process may not have the device
        return vars(self) | {"_counts": self._counts.cpu()}


class ConfusionMatrix(Counts):
    """Counts pixels by truth and prediction.

    Args:
        num_classes: N.
        ignore_index: label of pixels that do not count. A prediction that is no class, such as this one, is void and
            counts as a miss.
    """

    def __init__(self, num_classes, ignore_index=255):
        # The cells of the matrix, then the ignored pixels, then the pixels with an invalid label.
        super().__init__(num_classes * (num_classes + 1) + 2)
        self.num_classes, self.ignore_index = num_classes, ignore_index

    @property
    def matrix(self):
        """(N, N + 1) int64 tensor on the CPU: a row per true class, the last column void predictions.

        Raises:
            ValueError: if a label on a GPU had a value that is neither a class nor the ignore index.
        """
        counts = self._counts.cpu()
        if counts[-1]:
            raise ValueError(f"label: expected train ids 0 to {self.num_classes - 1} or {self.ignore_index}, found "
                             f"{int(counts[-1])} pixels of other values")
        return counts[:-2].view(self.num_classes, self.num_classes + 1)

    def update(self, prediction, label):
        """Add maps of train ids of any shape and any integer dtype: tensors on any device, or NumPy arrays.

        Raises:
            ValueError: if the label has a value that is neither a class nor the ignore index. For labels on a GPU,
                `matrix` raises it when it is read.
        """
        prediction, label = (torch.as_tensor(a).reshape(-1) for a in (prediction, label))
        pixels = None       # of each pair of values; else every pair is one pixel
        if label.is_cpu and prediction.dtype == label.dtype == torch.uint8:     # on a GPU bincount makes the host wait
            pixels = torch.bincount(label.int() * 256 + prediction, minlength=1 << 16)
            label, prediction = torch.arange(1 << 16) // 256, torch.arange(1 << 16) % 256
        n = self.num_classes
        ignored, invalid = n * (n + 1), n * (n + 1) + 1
        prediction = torch.where((prediction >= 0) & (prediction < n), prediction, n)
        cell = torch.where((label >= 0) & (label < n), label.long() * (n + 1) + prediction, invalid)
        cell = torch.where(label == self.ignore_index, ignored, cell)
        pixels = torch.ones_like(cell) if pixels is None else pixels
        counts = torch.zeros(invalid + 1, dtype=torch.int64, device=cell.device).scatter_add_(0, cell, pixels)
        if counts.is_cpu and counts[-1]:
            wrong = label[(cell == invalid) & (pixels > 0)]
            raise ValueError(f"label: expected train ids 0 to {n - 1} or {self.ignore_index}, "
                             f"found {int(wrong.min())} to {int(wrong.max())}")
        self._count(counts)

    def class_iou(self):
        """IoU of each class, (N,) float64: TP / (TP + FP + FN); NaN where all three are zero."""
        matrix = self.matrix.numpy()
        return _iou(matrix.diagonal(), matrix.sum(1) + matrix[:, :-1].sum(0))

    def mean_iou(self):
        """Mean IoU over the classes whose IoU is not NaN; NaN if there are none."""
        return mean_of_known(self.class_iou())

    def category_iou(self, categories):
        """IoU of each category, {name: IoU} in order of first appearance; categories: N names, one for each class."""
        names, matrix = list(dict.fromkeys(categories)), self.matrix.numpy()
        member = np.array([[category == name for category in categories] for name in names], np.int64)
        inner = matrix[:, :-1]
        true = (member @ inner * member).sum(1)
        return dict(zip(names, _iou(true, member @ (matrix.sum(1) + inner.sum(0))).tolist(), strict=True))

    def pixel_accuracy(self):
        """Share of the labeled pixels that are predicted correctly; NaN if there are no labeled pixels."""
        total = int(self.matrix.sum())
        return int(self.matrix.diagonal().sum()) / total if total else float("nan")

    def scores(self, names, categories):
        """All scores as one dict of plain values, fractions, None for NaN; names and categories: of the N classes."""
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


class InstanceIoU:
    """Instance-weighted IoU (iIoU), as cityscapesScripts computes it: every instance gets the weight of an average one.

    The terms of all images are added up in the order of the images, so that the last digit does not depend on how many
    processes share the images.

    Args:
        average_sizes: {label id: average pixels per instance} for the classes that have instances.
        train_ids: {label id: train id} for the classes that are scored.
        categories: N names, by train id.
        whole_categories: names of the categories whose classes all have instances.

    Attributes:
        terms: {image number: [(label id, pixels predicted as its class, pixels predicted as its category, size in
            pixels) for each instance]}.
    """

    def __init__(self, average_sizes, train_ids, categories, whole_categories):
        self.average_sizes, self.train_ids = average_sizes, train_ids
        self.categories, self.whole_categories = list(categories), set(whole_categories)
        self.terms = {}

    def update(self, number, instances, prediction):
        """Add an image: its number in the data set, instance ids (H, W) as label id · 1000 + count, and predicted
        train ids (H, W), both NumPy arrays."""
        n = len(self.categories)
        inside = np.flatnonzero(instances > 1000)
        instance_ids, indices = _unique_small(instances.reshape(-1)[inside])
        predicted = np.minimum(prediction.reshape(-1)[inside], n)       # void predictions as n
        table = np.bincount(indices * (n + 1) + predicted, minlength=len(instance_ids) * (n + 1)).reshape(-1, n + 1)
        terms = []
        for instance_id, pixels in zip(instance_ids.tolist(), table, strict=True):
            label = instance_id // 1000
            train_id = self.train_ids.get(label)
            if train_id is None or label not in self.average_sizes:
                continue
            in_category = sum(int(pixels[i]) for i, name in enumerate(self.categories)
                              if name == self.categories[train_id])
            terms.append((label, int(pixels[train_id]), in_category, int(pixels.sum())))
        self.terms[number] = terms

    def scores(self, matrix, names):
        """Class and category iIoU and their means, None where undefined; matrix: `ConfusionMatrix` of the images."""
        n = len(names)
        without = {train_id for label, train_id in self.train_ids.items() if label not in self.average_sizes}
        hit, missed = [0.0] * n, [0.0] * n
        group_hit, group_missed = dict.fromkeys(self.categories, 0.0), dict.fromkeys(self.categories, 0.0)
        for number in sorted(self.terms):
            for label, pixels, group_pixels, size in self.terms[number]:
                train_id, weight = self.train_ids[label], self.average_sizes[label] / float(size)
                hit[train_id] += float(pixels) * weight
                missed[train_id] += float(size - pixels) * weight
                group_hit[self.categories[train_id]] += float(group_pixels) * weight
                group_missed[self.categories[train_id]] += float(size - group_pixels) * weight
        counts = matrix.matrix.cpu().numpy()[:, :n]
        member = {name: np.array([category == name for category in self.categories]) for name in group_hit}
        class_iiou = {
            name: _ratio(hit[i], int(counts[:, i].sum() - counts[i, i]), missed[i])
            if i not in without else None for i, name in enumerate(names)}
        category_iiou = {
            name: _ratio(group_hit[name], int(counts[~inside][:, inside].sum()), group_missed[name])
            if name in self.whole_categories else None for name, inside in member.items()}
        return {"class_iiou": class_iiou, "mean_iiou": mean_of_scores(class_iiou.values()),
                "category_iiou": category_iiou, "mean_category_iiou": mean_of_scores(category_iiou.values())}


def _iou(true, sum_of_sizes):
    """true / (sum_of_sizes - true) of pixel counts; NaN without pixels. sum_of_sizes: of truth and prediction."""
    union = sum_of_sizes - true
    return np.divide(true, union, out=np.full(len(true), np.nan), where=union > 0)


def _unique_small(values):
    """`np.unique(values, return_inverse=True)` of (M,) integers above 0; by counting, which takes a tenth of the time
    of sorting, unless a value is far beyond the 16 bits of label maps."""
    if values.max(initial=0) >= 1 << 20:
        return np.unique(values, return_inverse=True)
    unique = np.flatnonzero(np.bincount(values))
    numbers = np.zeros(unique.max(initial=0) + 1, np.int64)
    numbers[unique] = np.arange(len(unique))
    return unique, numbers[values]


def _ratio(true, false_positive, false_negative):
    total = true + false_positive + false_negative
    return true / total if total else None


def mean_of_scores(values):
    """Mean of the values that are not None; None if there are none."""
    return none_if_nan(mean_of_known([value for value in values if value is not None]))


def mean_of_known(values):
    """Mean of the values that are not NaN, summed in order as in the official script; NaN if there are none."""
    known = [float(value) for value in values if value == value]
    total = functools.reduce(operator.add, known, 0.0)      # `sum` rounds differently since Python 3.12
    return total / len(known) if known else float("nan")


def none_if_nan(value):
    return None if value != value else value
