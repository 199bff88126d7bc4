"""Evaluation of a network on a data set, image by image."""

import functools
import itertools
import threading
from collections import defaultdict
from typing import NamedTuple

import torch

from ..imaging.classes import IGNORE_INDEX
from ..ops.probabilities import most_probable
from ..parallel.threads import Threads, copies_of
from ..parallel.workers import load_items
from .boundaries import BoundaryF
from .calibration import Calibration
from .iou import ConfusionMatrix, InstanceIoU
from .worst import WorstImages, attention_of


class ScoredImage:
    """An image of a data set with the predictions of a network.

    The richest protocol is multi-scale if the predictor makes several passes over an image, else single-scale.
    Everything but `item` and `probabilities` is computed on the device of the predictions when it is first read.

    Args:
        item: of the data set, {"image": (3, H, W) uint8, "label": (H, W) train ids, "name", ...}.
        predicted: {protocol: {head: probabilities (N, H, W)}}, the richest protocol last.
        num_classes: N.
        ignore_index: label of pixels that do not count.

    Attributes:
        probabilities: {head: (N, H, W)} of the richest protocol.
    """

    def __init__(self, item, predicted, num_classes, ignore_index=IGNORE_INDEX):
        self.item, self.predicted, self.num_classes, self.ignore_index = item, predicted, num_classes, ignore_index
        self.probabilities = list(predicted.values())[-1]

    @functools.cached_property
    def truth(self):
        """(H, W) train ids, on the device."""
        return self.item["label"].to(self.probabilities["fine"].device, non_blocking=True)

    @functools.cached_property
    def _most_probable(self):
        """{protocol: {head: (confidence (H, W), labels (H, W) uint8)}}."""
        return {protocol: {head: most_probable(one) for head, one in heads.items()}
                for protocol, heads in self.predicted.items()}

    @property
    def confidence(self):
        """{head: (H, W)} of the richest protocol, the largest probability."""
        return {head: confidence for head, (confidence, _) in list(self._most_probable.values())[-1].items()}

    @property
    def labels(self):
        """{head: (H, W) uint8} of the richest protocol, the train ids of the largest probability."""
        return {head: labels for head, (_, labels) in list(self._most_probable.values())[-1].items()}

    @functools.cached_property
    def matrices(self):
        """{protocol: {head: ConfusionMatrix}} of this image, the richest protocol last."""
        matrices = {}
        for protocol, heads in self._most_probable.items():
            matrices[protocol] = {head: ConfusionMatrix(self.num_classes, self.ignore_index) for head in heads}
            for head, (_, labels) in heads.items():
                matrices[protocol][head].update(labels, self.truth)
        return matrices

    @functools.cached_property
    def calibration(self):
        """{head: `Calibration`} of the richest protocol."""
        counts = {head: Calibration(self.ignore_index) for head in self.probabilities}
        for head, labels in self.labels.items():
            counts[head].update(self.confidence[head], labels, self.truth)
        return counts


class HostImage(NamedTuple):
    """What is counted of a `ScoredImage` on the host. On a GPU it arrives there only after `wait`.

    Attributes:
        item: as in `ScoredImage`.
        wait: function that waits for all that follows.
        labels: {head: (H, W) uint8} of the richest protocol.
        gray: confidence of the fine head, as of `Pictures.gray`.
        matrices, calibration: as in `ScoredImage`.
        attention: function that returns what `attention_of` returns, or None without a coarse head.
    """

    item: dict
    wait: object
    labels: dict
    gray: torch.Tensor | None
    matrices: dict
    calibration: dict
    attention: object

    @classmethod
    def of(cls, image, pictures):
        """Compute everything on the device of the predictions, and queue its copies to the host.

        Args:
            image: `ScoredImage`.
            pictures: `Pictures` that will be written.
        """
        device, attention = image.truth.device, None
        if "coarse" in image.probabilities:
            attention = functools.partial(attention_of, image.probabilities["coarse"])
            if device.type != "cpu":        # here few images need it; there it frees the probabilities
                small = [part.to("cpu", non_blocking=True) for part in attention()]
                attention = functools.partial(tuple, small)
        return cls(image.item, labels={head: one.to("cpu", non_blocking=True) for head, one in image.labels.items()},
                   gray=pictures.gray(image.confidence["fine"]), attention=attention,
                   matrices={protocol: {head: matrix.to_host() for head, matrix in heads.items()}
                             for protocol, heads in image.matrices.items()},
                   calibration={head: counts.to_host() for head, counts in image.calibration.items()},
                   wait=copies_of(device))


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
        yield ScoredImage(item, predictor.predict(item["image"].permute(1, 2, 0)), num_classes, ignore_index)


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
        self.worst = WorstImages(classes.names, classes.palette, IGNORE_INDEX)
        self.instances = InstanceIoU(classes.instance_sizes, classes.train_ids, classes.categories,
                                     classes.whole_categories)
        self.boundaries = tolerance and BoundaryF(tolerance, classes.num_classes, IGNORE_INDEX)
        self.lock = threading.Lock()        # of the sums

    def run(self, predictor, workers, processes=None, threads=2):
        """Predict all images, add up the scores and write the pictures.

        Args:
            predictor: `SlidingPredictor`.
            workers: processes that read images.
            processes: `Processes` that share the data set, or None.
            threads: number of threads that count and write while the network predicts the next images.
        """
        on_gpu = predictor.device.type == "cuda"
        items = load_items(self.dataset, workers, processes, "evaluating", pin_memory=on_gpu)
        # On a CPU each image in flight keeps its probabilities, 4 bytes per class, pixel, head and protocol.
        with Threads(threads, waiting=2 if on_gpu else 0) as background:
            for image in score(predictor, items, self.classes.num_classes):
                # A GPU counts in the order of its queue, before the next image; the CPU in one of the threads.
                image = HostImage.of(image, self.pictures) if on_gpu else image
                background.call(self._count, image)
                del image       # and with it the probabilities
        if processes is not None:
            self._merge(processes)
        if len(self.instances.terms) < len(self.dataset) or self.classes.train_ids.keys().isdisjoint(
                self.classes.instance_sizes):
            self.instances = None

    def _count(self, image):
        """Add a `ScoredImage` or `HostImage` to all scores, and write its pictures."""
        image = HostImage.of(image, self.pictures) if isinstance(image, ScoredImage) else image
        image.wait()
        with self.lock:
            add_matrices(self.matrices, image.matrices)
            for head, counts in image.calibration.items():
                self.calibration[head].add(counts)
        item, labels = image.item, {head: values.numpy() for head, values in image.labels.items()}
        pixels, truth = item["image"].permute(1, 2, 0), item["label"].numpy()
        if "instances" in item:
            self.instances.update(item["index"], item["instances"].numpy(), labels["fine"])
        if self.boundaries:
            self.boundaries.update(item["name"], truth, labels)
        self.worst.add(item["name"], pixels.numpy(), truth, labels, list(image.matrices.values())[-1], image.attention)
        self.pictures.write(item["name"], pixels, image.labels["fine"], image.gray)

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
