"""Writing predictions as pictures: label ids, colors, overlays, confidence; files for images, videos for videos."""

import contextlib

import torch

from ..imaging.draw import overlay, save_jpeg, save_palette_png, save_png
from ..imaging.video import VideoWriter
from ..parallel.threads import Threads, copies_of

FOLDERS = {"labels": "labelIds", "color": "color", "overlay": "overlay", "confidence": "confidence"}


def picture_file(kind, name):
    """The file of an image's picture, relative to the results folder."""
    return f"{FOLDERS[kind]}/{name}{'.jpg' if kind == 'overlay' else '.png'}"


class Pictures:
    """Writes pictures of predictions.

    Args:
        folder: of the results.
        kinds: keys of `FOLDERS`.
        classes: `Classes`.
        threads: number of threads that draw and encode what is added.
    """

    def __init__(self, folder, kinds, classes, threads=2):
        self.folder, self.kinds, self.classes = folder, kinds, classes
        self.threads = Threads(threads)

    def __enter__(self):
        self.threads.__enter__()
        return self

    def __exit__(self, *error):
        self.threads.__exit__(*error)

    def add(self, name, image, labels, confidence):
        """Queue an image, without waiting for the device of its prediction.

        Args:
            name: of the files.
            image: (H, W, 3) uint8 tensor.
            labels: (H, W) train ids, tensor on any device.
            confidence: (H, W) 0 to 1, tensor on that device.
        """
        if not self.kinds:
            return
        labels, gray = labels.to(torch.uint8).to("cpu", non_blocking=True), self.gray(confidence)
        self.threads.call(self._finish, copies_of(confidence.device), name, image, labels, gray)

    def gray(self, confidence):
        """Confidence (H, W) as gray values on their way to the host, (H, W) uint8; None if they are not written."""
        if "confidence" in self.kinds:
            return (255 * confidence).round().to(torch.uint8).to("cpu", non_blocking=True)

    def _finish(self, wait, *picture):
        wait()
        self.write(*picture)

    def write(self, name, image, labels, gray):
        """Write the pictures of an image; image (H, W, 3), labels and gray (H, W): uint8 tensors on the host."""
        image, labels, gray = (None if one is None else one.numpy() for one in (image, labels, gray))
        draw = {"labels": lambda: self.classes.decode(labels), "color": lambda: labels,
                "overlay": lambda: overlay(image, self.classes.color(labels)), "confidence": lambda: gray}
        for kind in self.kinds:
            self._save(kind, name, draw[kind]())

    def _save(self, kind, name, picture):
        """Write a picture: (H, W, 3) uint8, or (H, W): label ids, uint8 or uint16; train ids of colors; gray."""
        path = self.folder / picture_file(kind, name)
        if kind == "color":
            save_palette_png(path, picture, self.classes.palette)
        else:
            (save_jpeg if kind == "overlay" else save_png)(path, picture)


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
            self.files[kind].write(self.classes.color(picture) if kind == "color" else picture)
