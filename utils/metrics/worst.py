"""The images with the lowest IoU, as small pictures for the report."""

import base64
import bisect
import io
import itertools
import threading
from collections import Counter

import numpy as np
import torch.nn.functional as F
from PIL import Image

from ..imaging.draw import difference, error_map
from .iou import mean_of_scores, none_if_nan

WORST_OVERALL = 10      # images with the lowest mean IoU that are kept
WORST_PER_CLASS = 2     # images with the lowest IoU of a class that are kept for each class
WIDTH = 640             # largest width in pixels of a picture in the report
MIN_ATTENTION = 5e-3    # mean coarse probability from which the attention of a class is shown


class WorstImages:
    """Keeps the images with the lowest IoU, overall and by class, as small encoded pictures.

    Memory grows with the number of classes, not with the size of the data set, and so does the time of an image that is
    not kept. Several threads may add images; what is kept does not depend on their order.

    Args:
        names: of the N classes.
        palette: (256, 3) uint8 RGB by train id.
        ignore_index: label of pixels that do not count.
    """

    def __init__(self, names, palette, ignore_index=255):
        self.names, self.palette, self.ignore_index = names, palette, ignore_index
        self.kept = {}      # {image name: entry}, plain values
        self.worst = {}     # {class, or None for all: [(IoU, image name), sorted]}
        self.places = Counter()     # {image name: in how many of these lists it is}
        self.lock = threading.Lock()

    def add(self, name, image, truth, labels, counts, attention=None):
        """Keep an image if it is among the worst so far.

        Args:
            image, truth: (H, W, 3) uint8 and train ids (H, W) uint8, arrays.
            labels: {head: predicted train ids (H, W)}.
            counts: {head: ConfusionMatrix} of this image.
            attention: function that returns what `attention_of` returns, or None.
        """
        class_iou = {head: [none_if_nan(iou) for iou in matrix.class_iou().tolist()]
                     for head, matrix in counts.items()}
        entry = {"name": name, "class_iou": class_iou,
                 "mean_iou": {head: mean_of_scores(values) for head, values in class_iou.items()},
                 "true_classes": np.flatnonzero(counts["fine"].matrix.sum(1)).tolist()}
        if self._keep(entry):
            entry["pictures"] = self._pictures(image, truth, {head: np.asarray(m) for head, m in labels.items()})
            entry["attention"] = {} if attention is None else self._attention(*attention())

    def merge(self, others):
        """Add the images that other processes kept; others: their `kept`."""
        for entry in itertools.chain.from_iterable(kept.values() for kept in others):
            if entry["name"] not in self.kept:
                self._keep(entry)

    def entries(self):
        """Return the kept images, worst first; `overall` marks those with the lowest mean IoU."""
        ranked = sorted(self.kept.values(), key=_worst_first)
        return [entry | {"overall": rank < WORST_OVERALL} for rank, entry in enumerate(ranked)]

    def _keep(self, entry):
        """Add an entry, drop those that are no longer among the worst, and return whether it is among them."""
        places = {None: _worst_first(entry)} | {
            index: (entry["class_iou"]["fine"][index], entry["name"]) for index in entry["true_classes"]}
        with self.lock:
            self.kept[entry["name"]] = entry
            self.places[entry["name"]] = len(places)
            for which, place in places.items():
                worst = self.worst.setdefault(which, [])
                bisect.insort(worst, place)
                if len(worst) > (WORST_OVERALL if which is None else WORST_PER_CLASS):
                    _, name = worst.pop()
                    self.places[name] -= 1
                    if not self.places[name]:
                        del self.places[name], self.kept[name]
            return entry["name"] in self.kept

    def _pictures(self, image, truth, labels):
        image, truth = _shrink(image), _shrink(truth)
        labels = {head: _shrink(predicted) for head, predicted in labels.items()}
        pictures = {"image": _encode(image, "JPEG"), "truth": _encode(truth, "PNG", self.palette)}
        for head, predicted in labels.items():
            pictures[head] = _encode(predicted, "PNG", self.palette)
        errors = error_map(image, truth, labels["fine"], truth == self.ignore_index)
        pictures["errors"] = _encode(errors, "JPEG")
        if "coarse" in labels:
            pictures["coarse against fine"] = _encode(
                difference(truth, labels["coarse"], labels["fine"], self.ignore_index), "PNG")
        return pictures

    def _attention(self, mean, probabilities):
        """Encode the coarse probabilities, the weights of the pixels in each class center, as {class: picture}."""
        return {self.names[i]: _encode(probabilities[i].numpy(), "JPEG")
                for i in mean.argsort(descending=True).tolist() if mean[i] >= MIN_ATTENTION}


def attention_of(probabilities):
    """Coarse probabilities (N, H, W) → their means (N,), and the probabilities as small gray pictures (N, h, w) uint8,
    on the same device."""
    _, height, width = probabilities.shape
    mean = probabilities.flatten(1).mean(1)
    if width > WIDTH:
        probabilities = F.interpolate(probabilities[None], size=_small_size(height, width), mode="area")[0]
    return mean, (255 * probabilities).byte()


def _worst_first(entry):
    """Sort key: by mean IoU of the fine head, images without one last."""
    mean = entry["mean_iou"]["fine"]
    return (2.0 if mean is None else mean, entry["name"])


def _small_size(height, width):
    """(height, width) of a picture in the report."""
    return (height, width) if width <= WIDTH else (max(1, round(height * WIDTH / width)), WIDTH)


def _shrink(array):
    """An image (H, W, 3) or a label map (H, W), uint8, at most `WIDTH` pixels wide; labels stay exact."""
    size = _small_size(*array.shape[:2])[::-1]
    resampling = Image.Resampling.BILINEAR if array.ndim == 3 else Image.Resampling.NEAREST
    return np.asarray(Image.fromarray(array).resize(size, resampling))


def _encode(array, kind, palette=None):
    """Encode a picture as a data URL; palette: (256, 3) uint8 RGB of indices (H, W)."""
    picture, file = Image.fromarray(array), io.BytesIO()
    if palette is not None:
        picture.putpalette(palette.tobytes())
    picture.save(file, kind, **({"quality": 80} if kind == "JPEG" else {}))
    return data_url(kind, file.getvalue())


def data_url(kind, data):
    """Encoded picture as a data URL; kind: "PNG" or "JPEG"."""
    return f"data:image/{kind.lower()};base64,{base64.b64encode(data).decode()}"
