"""The boundary F-score: how closely predicted class outlines follow the true ones."""

import cv2
import numpy as np

from .iou import mean_of_scores

NEIGHBORS = ((0, 1), (1, 0), (1, 1))       # (rows down, columns right)


class BoundaryF:
    """Boundary F-score of each class, after Csurka, Larlus and Perronnin, What is a good evaluation measure for
    semantic segmentation?, BMVC 2013.

    A pixel lies on the boundary of a class if exactly one of the two belongs to the class: the pixel, or its right,
    lower or lower right neighbor. These outlines are one pixel wide and connected over corners, as seg2bmap of the
    Berkeley benchmark and of DAVIS draws them. The edge of the image is no boundary. Pixels whose truth is ignored are
    ignored in the truth and in the prediction: they lie on no boundary, and a pixel does not become a boundary because
    of such a neighbor.

    Precision P is the share of the predicted boundary pixels that have a true boundary pixel at most `tolerance` pixels
    away (Euclidean distance between pixel centers); recall R is the share of the true boundary pixels that have a
    predicted one that near; F = 2PR / (P + R). F is 0 if only the truth or only the prediction has a boundary of the
    class. If neither has one, the image does not count for the class. The score of a class is the mean of F over the
    images that count.

    Args:
        tolerance: in pixels, above 0.
        num_classes: N.
        ignore_index: label of pixels that do not count.

    Attributes:
        terms: {image name: {head: [F or None for each of the N classes]}}; the dicts of several processes can be
            merged.
    """

    def __init__(self, tolerance, num_classes, ignore_index=255):
        self.tolerance, self.num_classes, self.ignore_index = tolerance, num_classes, ignore_index
        self.terms = {}

    def update(self, name, truth, predictions):
        """Add an image: its name, true train ids (H, W), and {head: predicted train ids (H, W)}, all NumPy arrays."""
        ignored = truth == self.ignore_index
        true = outlines(truth, ignored)
        predicted = {head: outlines(labels, ignored) for head, labels in predictions.items()}
        self.terms[name] = {head: [self._f(true.get(i), boundaries.get(i)) for i in range(self.num_classes)]
                            for head, boundaries in predicted.items()}

    def scores(self, names):
        """Average the F-scores over the images; names: of the N classes.

        Returns:
            {head: {"class_boundary_f": {name: F}, "mean_boundary_f": mean over the classes with a score}}, fractions;
            None for a class that has a boundary in no image.
        """
        scores = {}
        for head in next(iter(self.terms.values()), {}):
            # The order must not depend on the number of processes.
            images = [self.terms[name][head] for name in sorted(self.terms)]
            means = [mean_of_scores(column) for column in zip(*images, strict=True)]
            scores[head] = {"class_boundary_f": dict(zip(names, means, strict=True)),
                            "mean_boundary_f": mean_of_scores(means)}
        return scores

    def _f(self, true, predicted):
        """Return F of true and predicted boundary pixels (2, n), each None if there are none; None if both are."""
        if true is None or predicted is None:
            return None if true is predicted else 0.0
        top_left = np.minimum(true.min(1), predicted.min(1))[:, None]       # crop to the boundary pixels of both
        true, predicted = true - top_left, predicted - top_left
        shape = np.maximum(true.max(1), predicted.max(1)) + 1
        precision = self._share_near(predicted, true, shape)
        recall = self._share_near(true, predicted, shape)
        return 2 * precision * recall / (precision + recall) if precision + recall else 0.0

    def _share_near(self, pixels, others, shape):
        """Return the share of the pixels (2, n) that have one of the others (2, m) within the tolerance."""
        away = np.ones(shape, np.uint8)
        away[tuple(others)] = 0
        distances = cv2.distanceTransform(away, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
        return np.count_nonzero(distances[tuple(pixels)] <= self.tolerance) / pixels.shape[1]


def outlines(labels, ignored):
    """Return the rows and columns of each class's boundary pixels, {class: (2, n)}; ignored: mask of pixels (H, W)."""
    classes, indices = [], []
    for down, right in NEIGHBORS:
        height, width = (length - step for length, step in zip(labels.shape, (down, right), strict=True))
        here, there = np.s_[:height, :width], np.s_[down:, right:]
        pairs = np.nonzero((labels[here] != labels[there]) & ~ignored[here] & ~ignored[there])
        classes += [labels[here][pairs], labels[there][pairs]]
        indices += 2 * [np.ravel_multi_index(pairs, labels.shape)]
    classes, indices = np.concatenate(classes), np.concatenate(indices)
    return {i: np.stack(np.unravel_index(np.unique(indices[classes == i]), labels.shape))
            for i in np.unique(classes).tolist()}
