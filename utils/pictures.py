"""Pictures of predictions: label ids, colours, overlays, confidence; of images as PNGs, of videos as videos."""

from collections import deque
from concurrent.futures import ThreadPoolExecutor

import torch

from .visualize import overlay, save_png

FOLDERS = {"labels": "labelIds", "color": "color", "overlay": "overlay", "confidence": "confidence"}
WAITING = 8         # images that writing may be behind, so that memory does not grow with the data set


class Pictures:
    """Writes the pictures of predictions beside the network's work, a bounded number of images behind it.

    Args:
        folder: of the results.
        kinds: of `FOLDERS`.
        classes: `Classes`.
        writers: threads that draw and encode.
    """

    def __init__(self, folder, kinds, classes, writers=2):
        self.folder, self.kinds, self.classes = folder, kinds, classes
        self.writers, self.waiting = ThreadPoolExecutor(writers), deque()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.writers.shutdown(cancel_futures=error[0] is not None)
        while self.waiting and error[0] is None:
            self.waiting.popleft().result()

    def add(self, name, image, labels, confidence):
        """image (H, W, 3) uint8, labels (H, W) train ids, confidence (H, W) 0 to 1; all tensors."""
        if not self.kinds:
            return
        while len(self.waiting) >= WAITING:
            self.waiting.popleft().result()
        grey = (255 * confidence).round().to(torch.uint8).cpu().numpy() if "confidence" in self.kinds else None
        self.waiting.append(self.writers.submit(self._write, name, image.numpy(), labels.to(torch.uint8).cpu().numpy(),
                                                grey))

    def _write(self, name, image, labels, grey):
        draw = {"labels": lambda: self.classes.decode(labels), "color": lambda: self.classes.color(labels),
                "overlay": lambda: overlay(image, self.classes.color(labels)), "confidence": lambda: grey}
        for kind in self.kinds:
            self._save(kind, name, draw[kind]())

    def _save(self, kind, name, picture):
        """picture (H, W) or (H, W, 3) uint8, label ids also uint16."""
        save_png(self.folder / FOLDERS[kind] / f"{name}.png", picture)
