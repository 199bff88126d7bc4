"""How well the outlines of classes are met: the boundary F-score."""

import cv2
import numpy as np

from .iou import mean_of_scores

NEIGHBORS = ((0, 1), (1, 0), (1, 1))       # (rows down, columns right)


class BoundaryF:
    """Boundary F-score of each class, after Csurka, Larlus and Perronnin, What is a good evaluation measure for
    semantic segmentation?, BMVC 2013.

    A pixel lies on the boundary of a class where one of it and its right, lower or lower right neighbor is of the
    class and the other is not: outlines one pixel wide that are connected over corners, as seg2bmap of the Berkeley
    benchmark and of DAVIS draws them. The edge of the image is no boundary. Pixels whose truth is ignored are left out
    of the truth and of the prediction: they lie on no boundary, and as neighbors they make none.

    Precision is the share of a prediction's boundary pixels from which one of the truth is at most `tolerance` pixels
    away (the Euclidean distance between their middles), recall the same the other way round, and F = 2PR / (P + R).
    It is 0 where only truth or only prediction has a boundary of the class; where neither has one, the image does not
    count for the class. The score of a class is the mean of F over the images that count.

    Args:
        tolerance: in pixels, above 0.
        num_classes: N.
        ignore_index: truth that does not count.

    Attributes:
        terms: {name of the image: {head: [F or None, N of them]}}; those of several processes can be put together.
    """

    def __init__(self, tolerance, num_classes, ignore_index=255):
        self.tolerance, self.num_classes, self.ignore_index = tolerance, num_classes, ignore_index
        self.terms = {}

    def update(self, name, truth, predictions):
        """Add an image: its name, train ids (H, W), and {head: predicted train ids (H, W)}, all NumPy arrays."""
        ignored = truth == self.ignore_index
        true = outlines(truth, ignored)
        found = {head: outlines(labels, ignored) for head, labels in predictions.items()}
        self.terms[name] = {head: [self._f(true.get(i), lines.get(i)) for i in range(self.num_classes)]
                            for head, lines in found.items()}

    def scores(self, names):
        """{head: {"class_boundary_f": {name: F}, "mean_boundary_f": mean over the classes that have one}}.

        names: of the N classes. F is a fraction; None for a class of which no image has a boundary.
        """
        scores = {}
        for head in next(iter(self.terms.values()), {}):
            images = [self.terms[name][head] for name in sorted(self.terms)]        # whatever process had them
            means = [mean_of_scores(column) for column in zip(*images, strict=True)]
            scores[head] = {"class_boundary_f": dict(zip(names, means, strict=True)),
                            "mean_boundary_f": mean_of_scores(means)}
        return scores

    def _f(self, true, found):
        """Boundary pixels (2, n) of truth and prediction, or None → F, or None without both."""
        if true is None or found is None:
            return None if true is found else 0.0
        top_left = np.minimum(true.min(1), found.min(1))[:, None]       # the rest of the image has no boundary pixels
        true, found = true - top_left, found - top_left
        shape = np.maximum(true.max(1), found.max(1)) + 1
        precision, recall = (self._share_near(places, others, shape) for places, others in ((found, true),
                                                                                           (true, found)))
        return 2 * precision * recall / (precision + recall) if precision + recall else 0.0

    def _share_near(self, places, others, shape):
        """Share of places (2, n) that lie at most the tolerance away from one of the others (2, m)."""
        away = np.ones(shape, np.uint8)
        away[tuple(others)] = 0
        distances = cv2.distanceTransform(away, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
        return np.count_nonzero(distances[tuple(places)] <= self.tolerance) / places.shape[1]


def outlines(labels, ignored):
    """Train ids (H, W), ignored pixels (H, W) bool → {class: rows and columns (2, n) of its boundary pixels}."""
    classes, places = [], []
    for down, right in NEIGHBORS:
        height, width = (length - step for length, step in zip(labels.shape, (down, right), strict=True))
        here, there = np.s_[:height, :width], np.s_[down:, right:]
        pairs = np.nonzero((labels[here] != labels[there]) & ~ignored[here] & ~ignored[there])
        classes += [labels[here][pairs], labels[there][pairs]]
        places += 2 * [np.ravel_multi_index(pairs, labels.shape)]
    classes, places = np.concatenate(classes), np.concatenate(places)
    return {i: np.stack(np.unravel_index(np.unique(places[classes == i]), labels.shape))
            for i in np.unique(classes).tolist()}
