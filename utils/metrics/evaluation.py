"""Evaluation of a network on a data set, image by image."""

import itertools
from collections import defaultdict
from typing import NamedTuple

import torch

from ..common.progress import progress
from ..imaging.classes import IGNORE_INDEX
from ..parallel.processes import share_items
from ..parallel.workers import Loader
from .boundaries import BoundaryF
from .calibration import Calibration
from .iou import ConfusionMatrix, InstanceIoU
from .report import WorstImages


class ScoredImage(NamedTuple):
    """An image of a data set with the predictions of a network.

    The richest protocol is multi-scale if the predictor makes several passes over an image, else single-scale.

    Attributes:
        item: of the data set, {"image": (3, H, W) uint8, "label": (H, W) train ids, "name", ...}.
        probabilities: {head: (N, H, W)} of the richest protocol, on the device.
        confidence, labels: {head: (H, W)}, the largest probability and its train id, on the device.
        truth: (H, W) train ids, on the device.
        matrices: {protocol: {head: ConfusionMatrix}} of this image, the richest protocol last.
    """

    item: dict
    probabilities: dict
    confidence: dict
    labels: dict
    truth: torch.Tensor
    matrices: dict

    @property
    def richest(self):
        """{head: ConfusionMatrix} of the richest protocol."""
        return list(self.matrices.values())[-1]


def score(predictor, items, num_classes, ignore_index=IGNORE_INDEX):
    """Predict images and compare them with the truth.

    Args:
        predictor: `SlidingPredictor`.
        items: {"image": (3, H, W) uint8, "label": (H, W) train ids, ...}.
        num_classes: of the predictions.
        ignore_index: label of pixels that do not count.

    Yields:
        A `ScoredImage` for each item.
    """
    for item in items:
        truth, matrices = item["label"], {}
        for protocol, heads in predictor.predict(item["image"].permute(1, 2, 0)).items():
            confidence, labels, matrices[protocol] = {}, {}, {}
            for head, probabilities in heads.items():
                confidence[head], labels[head] = probabilities.max(0)
            for head, predicted in labels.items():
                truth = truth.to(predicted.device)
                matrices[protocol][head] = ConfusionMatrix(num_classes, ignore_index)
                matrices[protocol][head].update(predicted, truth)
        yield ScoredImage(item, heads, confidence=confidence, labels=labels, truth=truth, matrices=matrices)


def add_matrices(total, part):
    """Add the matrices of an image or of a process to a total.

    Args:
        total: {protocol: {head: ConfusionMatrix}}, the richest protocol last; changed in place.
        part: the same, or empty for a process that had no image.
    """
    for protocol, heads in part.items():
        for head, matrix in heads.items():
            total.setdefault(protocol, {}).setdefault(
                head, ConfusionMatrix(matrix.num_classes, matrix.ignore_index)).add(matrix)


def sum_of_matrices(parts):
    """Sum several {protocol: {head: ConfusionMatrix}} without changing them."""
    total = {}
    for part in parts:
        add_matrices(total, part)
    return total


def load_items(dataset, workers, processes, description):
    """Iterate over this process's share of a data set, and show the progress.

    Args:
        dataset: of images, with `read_first_image`.
        workers: processes that read images.
        processes: `Processes` that share the data set, or None.
        description: of the work, for the progress line.
    """
    if workers:
        dataset.read_first_image()
    return progress(Loader(share_items(dataset, processes), workers=workers), description, "image")


class Evaluation:
    """One pass over a data set, in which each process evaluates its share.

    Args:
        dataset: with labels; a `CityscapesDataset`.
        pictures: `Pictures`, which receives the predictions.
        tolerance: of the boundary F-score, in pixels; None to leave the score out.

    Attributes (of all processes after `run`):
        matrices: {protocol: {head: ConfusionMatrix}}, the richest protocol last.
        calibration: {head: `Calibration`} of the richest protocol.
        worst: `WorstImages`.
        instances: `InstanceIoU`, or None if the data set has no instances.
        boundaries: `BoundaryF`, or None without a tolerance.
    """

    def __init__(self, dataset, pictures, tolerance=None):
        self.dataset, self.pictures, self.classes = dataset, pictures, dataset.classes
        classes = self.classes
        self.matrices, self.calibration = {}, defaultdict(lambda: Calibration(IGNORE_INDEX))
        self.worst = WorstImages(classes.names, classes.color, IGNORE_INDEX)
        self.instances = InstanceIoU(classes.instance_sizes, classes.train_ids, classes.categories,
                                     classes.whole_categories)
        self.boundaries = tolerance and BoundaryF(tolerance, classes.num_classes, IGNORE_INDEX)

    def run(self, predictor, workers, processes=None):
        """Predict all images and add up the scores.

        Args:
            predictor: `SlidingPredictor`.
            workers: processes that read images.
            processes: `Processes` that share the data set, or None.
        """
        items = load_items(self.dataset, workers, processes, "evaluating")
        for image in score(predictor, items, self.classes.num_classes):
            add_matrices(self.matrices, image.matrices)
            self._count(image)
        if processes is not None:
            self._merge(processes)
        if len(self.instances.terms) < len(self.dataset) or self.classes.train_ids.keys().isdisjoint(
                self.classes.instance_sizes):
            self.instances = None

    def _count(self, image):
        """Add a `ScoredImage` to all scores but the matrices."""
        for head, values in image.labels.items():
            self.calibration[head].update(image.confidence[head], values, image.truth)
        item, labels = image.item, {head: values.cpu() for head, values in image.labels.items()}
        pixels = item["image"].permute(1, 2, 0)
        self.pictures.add(item["name"], pixels, labels["fine"], image.confidence["fine"])
        self.worst.add(item["name"], pixels.numpy(), item["label"].numpy(), labels, image.richest,
                       image.probabilities.get("coarse"))
        if "instances" in item:
            self.instances.update(item["index"], item["instances"].numpy(), labels["fine"].numpy())
        if self.boundaries:
            self.boundaries.update(item["name"], item["label"].numpy(),
                                   {head: values.numpy() for head, values in labels.items()})

    def _merge(self, processes):
        """Add the counts of the other processes."""
        self.matrices = sum_of_matrices(processes.gather_objects(self.matrices))
        self.worst.merge(processes.gather_objects(self.worst.kept))
        for metric in filter(None, (self.instances, self.boundaries)):
            for terms in processes.gather_objects(metric.terms):
                metric.terms |= terms
        counts = processes.gather_objects(dict(self.calibration))
        self.calibration.clear()
        for head, calibration in itertools.chain.from_iterable(part.items() for part in counts):
            self.calibration[head].add(calibration)

    @property
    def headline(self):
        """{head: ConfusionMatrix} of the richest protocol."""
        return list(self.matrices.values())[-1]

    def result(self, checkpoint, protocol):
        """Return the content of `result.json`; its first score is the mean IoU of the headline's fine head.

        Args:
            checkpoint: path of the snapshot.
            protocol: plain values that describe the evaluation.
        """
        names = self.classes.names
        scores = {name: {head: matrix.scores(names, self.classes.categories) for head, matrix in heads.items()}
                  for name, heads in self.matrices.items()}
        richest = list(scores.values())[-1]
        if self.instances is not None:
            richest["fine"] |= self.instances.scores(self.headline["fine"], names)
        if self.boundaries is not None:
            for head, values in self.boundaries.scores(names).items():
                richest[head] |= values
        coarse = {name: heads["coarse"] for name, heads in scores.items() if "coarse" in heads}
        return {
            "mean_iou": richest["fine"]["mean_iou"],
            **{name: heads["fine"] for name, heads in scores.items()},
            **({"coarse": coarse} if coarse else {}),
            "calibration": {head: counts.scores() for head, counts in self.calibration.items()},
            "num_images": len(self.dataset), "checkpoint": str(checkpoint), "protocol": protocol,
        }
