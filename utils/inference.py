"""From an image to class probabilities: input normalisation, sliding windows, several scales, mirror."""

import itertools
import math
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F

from .metrics import ConfusionMatrix


@dataclass(frozen=True)
class Normalization:
    """What a network's input looks like: (pixel - mean) / std, channels in the given order.

    mean, std: per channel, in units of 0 to 255. The default is ImageNet's, RGB.
    """

    order: str = "RGB"
    mean: tuple = (123.675, 116.28, 103.53)
    std: tuple = (58.395, 57.12, 57.375)

    def __call__(self, images):
        """images (B, 3, H, W) uint8 or float RGB, 0 to 255 → (B, 3, H, W) float32, on the same device."""
        mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (self.mean, self.std))
        images = images.float() if self.order == "RGB" else images.float().flip(1)
        return (images - mean) / std

    def as_config(self):
        """Plain values for a snapshot; `Normalization.from_config` reads them back."""
        return {key: value if isinstance(value, str) else list(value) for key, value in asdict(self).items()}

    @classmethod
    def from_config(cls, config):
        return cls(config["order"], tuple(config["mean"]), tuple(config["std"]))


def round_window(size):
    """(height, width) → each rounded up to 8k + 1: only there do logits at stride 8, with aligned corners,
    lie on the pixels they stand for."""
    return tuple(math.ceil((length - 1) / 8) * 8 + 1 for length in size)


def window_starts(length, window, overlap):
    """First pixels of the windows along an axis. They cover it exactly: the last one ends at its end."""
    if length <= window:
        return [0]
    stride = max(1, int(window * (1 - overlap)))
    count = math.ceil((length - window) / stride) + 1
    return [min(i * stride, length - window) for i in range(count)]


class SlidingPredictor:
    """Class probabilities of whole images, from windows of a fixed size.

    Probabilities of overlapping windows, of scales and of mirrored passes are averaged, the latter at the
    size of the image.

    Args:
        network: images (B, 3, h, w) → {"fine": logits[, "coarse": logits]}, in evaluation mode, at stride 8.
        window: (height, width) in pixels, rounded up to 8k + 1; None for the whole (scaled) image at once.
        overlap: of neighbouring windows, as a share of the window.
        scales: factors by which the image is resized (bilinear, half-pixel centres).
        flip: run each scale mirrored too.
        batch_size: windows a forward pass.
        normalization: of the network's input.
        device: where to compute; None for the device of the network's parameters.
        autocast: dtype of mixed precision, or None.
    """

    def __init__(self, network, window=(769, 769), overlap=1 / 3, scales=(1.0,), flip=False, batch_size=4,
                 normalization=None, device=None, autocast=None):
        if not 0 <= overlap < 1:
            raise ValueError(f"overlap: expected a share from 0 up to but not 1, found {overlap}")
        if not scales or min(scales) <= 0:
            raise ValueError(f"scales: expected numbers above 0, found {scales}")
        self.network = network
        self.window = None if window is None else round_window(window)
        self.overlap = overlap
        self.scales = tuple(scales)
        self.flip = flip
        self.batch_size = batch_size
        self.normalization = normalization or Normalization()
        parameters = network.parameters() if isinstance(network, torch.nn.Module) else iter(())
        self.device = device or getattr(next(parameters, None), "device", torch.device("cpu"))
        self.autocast = autocast

    def __call__(self, image):
        """image (H, W, 3) uint8 RGB, array or tensor → fine probabilities (N, H, W) float32."""
        passes = self.predict(image)
        return passes.get("multi_scale", passes.get("single_scale"))["fine"]

    def labels(self, image):
        """image (H, W, 3) uint8 RGB → train ids (H, W) uint8, the most probable class."""
        return self(image).argmax(0).to(torch.uint8)

    @torch.inference_mode()
    def predict(self, image):
        """image (H, W, 3) uint8 RGB → {protocol: {head: probabilities (N, H, W) float32}}.

        Protocols: `single_scale`, the plain pass at scale 1 (or at the only scale), where it is among the
        passes; `multi_scale`, the mean over all passes, where there is more than one.
        """
        image = torch.as_tensor(image).to(self.device).permute(2, 0, 1)[None]     # (1, 3, H, W)
        size = image.shape[-2:]
        pixels = self.normalization(image)
        total, results = None, {}
        passes = list(itertools.product(self.scales, (False, True) if self.flip else (False,)))
        for scale, mirrored in passes:
            heads = self._one_pass(pixels, size, scale, mirrored)
            if not mirrored and (scale == 1 or len(self.scales) == 1):
                results["single_scale"] = heads
            if total is None:
                total = {name: p.clone() for name, p in heads.items()}
            else:
                for name, p in heads.items():
                    total[name] += p
        if len(passes) > 1:
            results["multi_scale"] = {name: p.div_(len(passes)) for name, p in total.items()}
        return results

    def _one_pass(self, pixels, size, scale, mirrored):
        """Normalised pixels (1, 3, H, W) → {head: probabilities (N, H, W)} of one scale and side."""
        if scale != 1:
            scaled = [max(1, round(length * scale)) for length in size]
            pixels = F.interpolate(pixels, size=scaled, mode="bilinear", align_corners=False)
        if mirrored:
            pixels = pixels.flip(-1)
        heads = self._windows(pixels)
        for name, p in heads.items():
            p = p.flip(-1) if mirrored else p
            if p.shape[-2:] != size:
                p = F.interpolate(p[None], size=size, mode="bilinear", align_corners=False)[0]
            heads[name] = p
        return heads

    def _windows(self, pixels):
        """Pixels (1, 3, h, w) → {head: probabilities (N, h, w)}, the mean over the windows on each pixel."""
        height, width = pixels.shape[-2:]
        window = self.window or round_window((height, width))
        # The padding is the mean colour, which normalisation takes to zero. It never enters a score.
        pixels = F.pad(pixels, (0, max(0, window[1] - width), 0, max(0, window[0] - height)))
        places = list(itertools.product(window_starts(height, window[0], self.overlap),
                                        window_starts(width, window[1], self.overlap)))
        total = {}
        count = pixels.new_zeros(pixels.shape[-2:])
        for first in range(0, len(places), self.batch_size):
            batch = places[first:first + self.batch_size]
            crops = torch.cat([pixels[..., y:y + window[0], x:x + window[1]] for y, x in batch])
            for name, logits in self._forward(crops).items():
                if name not in total:
                    total[name] = pixels.new_zeros(logits.shape[1], *pixels.shape[-2:])
                for (y, x), one in zip(batch, logits, strict=True):
                    p = F.interpolate(one[None], size=window, mode="bilinear", align_corners=True)[0].softmax(0)
                    total[name][:, y:y + window[0], x:x + window[1]] += p
            for y, x in batch:
                count[y:y + window[0], x:x + window[1]] += 1
        return {name: p.div_(count)[:, :height, :width] for name, p in total.items()}

    def _forward(self, crops):
        with torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            outputs = self.network(crops)
        return {name: outputs[name].float() for name in ("fine", "coarse") if name in outputs}


def score(predictor, items, num_classes, ignore_index, processes=None, seen=None):
    """Predict and count.

    Args:
        predictor: `SlidingPredictor`.
        items: {"image": (3, H, W) uint8, "label": (H, W) train ids, ...}; with processes, those of this one.
        processes: `Processes` that share the data set; the counts of all are added up.
        seen: called with (item, (H, W) train ids of the richest protocol's fine head) for every item, or None.

    Returns:
        {protocol: {head: ConfusionMatrix}}, the richest protocol last.
    """
    matrices = {}
    for item in items:
        for protocol, heads in predictor.predict(item["image"].permute(1, 2, 0)).items():
            for head, probabilities in heads.items():
                labels = probabilities.argmax(0)
                matrices.setdefault(protocol, {}).setdefault(
                    head, ConfusionMatrix(num_classes, ignore_index)).update(labels, item["label"].to(labels.device))
                if head == "fine":
                    headline = labels
        if seen is not None:
            seen(item, headline)
    if processes is None:
        return matrices
    total = {}      # one without images knows neither protocols nor heads, so they travel as plain values
    for part in processes.gather_objects(matrices):
        for protocol, heads in part.items():
            for head, matrix in heads.items():
                total.setdefault(protocol, {}).setdefault(
                    head, ConfusionMatrix(num_classes, ignore_index)).matrix += matrix.matrix
    return total
