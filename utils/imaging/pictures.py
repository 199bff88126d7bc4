"""Writing predictions as pictures: label ids, colors, overlays, confidence; PNGs for images, videos for videos."""

import contextlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import torch

from .draw import overlay, save_png
from .video import VideoWriter

FOLDERS = {"labels": "labelIds", "color": "color", "overlay": "overlay", "confidence": "confidence"}
MAX_WAITING = 8     # images waiting to be written, so that memory does not grow with the data set


class Pictures:
    """Writes pictures of predictions in threads while the network goes on, at most `MAX_WAITING` images behind.

    Args:
        folder: of the results.
        kinds: keys of `FOLDERS`.
        classes: `Classes`.
        threads: number of threads that draw and encode.
    """

    def __init__(self, folder, kinds, classes, threads=2):
        self.folder, self.kinds, self.classes = folder, kinds, classes
        self.executor, self.waiting = ThreadPoolExecutor(threads), deque()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.executor.shutdown(cancel_futures=error[0] is not None)
        while self.waiting and error[0] is None:
            self.waiting.popleft().result()

    def add(self, name, image, labels, confidence):
        """Queue an image: image (H, W, 3) uint8, labels (H, W) train ids, confidence (H, W) 0 to 1; all tensors."""
        if not self.kinds:
            return
        while len(self.waiting) >= MAX_WAITING:
            self.waiting.popleft().result()
        gray = (255 * confidence).round().to(torch.uint8).cpu().numpy() if "confidence" in self.kinds else None
        self.waiting.append(self.executor.submit(self._write, name, image.numpy(),
                                                 labels.to(torch.uint8).cpu().numpy(), gray))

    def _write(self, name, image, labels, gray):
        draw = {"labels": lambda: self.classes.decode(labels), "color": lambda: self.classes.color(labels),
                "overlay": lambda: overlay(image, self.classes.color(labels)), "confidence": lambda: gray}
        for kind in self.kinds:
            self._save(kind, name, draw[kind]())

    def _save(self, kind, name, picture):
        """Write a picture, (H, W) or (H, W, 3) uint8; label ids may be uint16."""
        save_png(self.folder / FOLDERS[kind] / f"{name}.png", picture)


class VideoPictures(Pictures):
    """`Pictures` of a video's frames, in order, as videos; they are finished even if an error ends the prediction.

    Label ids are written as one PNG per frame, since none of the available codecs preserves them.

    Args:
        name: of the video.
        rate: frames/s.
    """

    def __init__(self, folder, kinds, classes, name, rate):
        super().__init__(folder, kinds, classes, threads=1)
        self.name = name
        self.files = {kind: VideoWriter(folder / FOLDERS[kind] / f"{name}.mp4", rate) for kind in kinds
                      if kind != "labels"}

    @staticmethod
    def output_files(name, kinds, frames):
        """The files written for a video, relative to the results folder; frames: last frame number, for label ids."""
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
