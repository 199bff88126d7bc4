"""Pictures of predictions: label ids, colors, overlays, confidence; of images as PNGs, of videos as videos."""

import contextlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import torch

from .draw import overlay, save_png
from .video import VideoWriter

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
        gray = (255 * confidence).round().to(torch.uint8).cpu().numpy() if "confidence" in self.kinds else None
        self.waiting.append(self.writers.submit(self._write, name, image.numpy(), labels.to(torch.uint8).cpu().numpy(),
                                                gray))

    def _write(self, name, image, labels, gray):
        draw = {"labels": lambda: self.classes.decode(labels), "color": lambda: self.classes.color(labels),
                "overlay": lambda: overlay(image, self.classes.color(labels)), "confidence": lambda: gray}
        for kind in self.kinds:
            self._save(kind, name, draw[kind]())

    def _save(self, kind, name, picture):
        """picture (H, W) or (H, W, 3) uint8, label ids also uint16."""
        save_png(self.folder / FOLDERS[kind] / f"{name}.png", picture)


class VideoPictures(Pictures):
    """The same of a video's frames, in order: as videos, finished also where an error ends the work; label ids, which
    no codec at hand keeps, as a PNG for each frame.

    Args:
        name: of the video.
        rate: frames/s.
    """

    def __init__(self, folder, kinds, classes, name, rate):
        super().__init__(folder, kinds, classes, writers=1)
        self.name = name
        self.files = {kind: VideoWriter(folder / FOLDERS[kind] / f"{name}.mp4", rate) for kind in kinds
                      if kind != "labels"}

    @staticmethod
    def output_files(name, kinds, frames):
        """What of a video with so many frames is written, relative to the folder of results; frames: the last one's
        number, as far as label ids are written."""
        return [file for kind in kinds for file in (
            [f"{FOLDERS[kind]}/{name}_{number:06}.png" for number in range(1, frames + 1)] if kind == "labels" else
            [f"{FOLDERS[kind]}/{name}.mp4"])]

    def __exit__(self, *error):
        with contextlib.ExitStack() as stack:
            for file in self.files.values():
                stack.callback(file.close)
            super().__exit__(*error)

    def _save(self, kind, name, picture):
        if kind == "labels":
            super()._save(kind, f"{self.name}_{name}", picture)
        else:
            self.files[kind].write(picture)
