"""Training transforms: random scale, crop and mirror, the same for image and label map.

A `Window` is chosen first. Then image and label map are resampled in one step, and only inside that window.
"""

from dataclasses import dataclass

import cv2
import numpy as np

# The color outside the image: the mean of ImageNet, which normalization takes to about zero.
PADDING_COLOR = (124, 116, 104)


@dataclass(frozen=True)
class Window:
    """A window of a scaled image, perhaps mirrored.

    Attributes:
        size: (height, width), pixels.
        scale: of the image before the window is cut.
        top, left: first pixel, after scaling.
        mirrored: left-right.
    """

    size: tuple
    scale: float
    top: int
    left: int
    mirrored: bool

    def image(self, image):
        """image (H, W, 3) uint8 → its pixels in the window, bilinear, of `size`.

        Beyond the centers of its outermost pixels these are repeated, as by `cv2.resize`; outside there is
        `PADDING_COLOR`.
        """
        height, width = self.size
        s, left, top = self.scale, self.left, self.top
        # From a pixel of the window to one of the source: x_source = (x_window + left + 1/2) / scale - 1/2.
        to_source = np.array([[1 / s, 0, (left + 0.5) / s - 0.5], [0, 1 / s, (top + 0.5) / s - 0.5]])
        if self.mirrored:
            to_source[0] = [-1 / s, 0, (left + width - 0.5) / s - 0.5]
        if s == 1:      # whole pixels: nothing to interpolate
            to_source = np.round(to_source)
        pixels = cv2.warpAffine(image, to_source, (width, height), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
                                borderMode=cv2.BORDER_REPLICATE)
        return self._fill_outside(pixels, image.shape, PADDING_COLOR)

    def label(self, label):
        """label (H, W[, C]), any dtype → its values in the window, nearest neighbor, of `size`.

        Outside the source the values at its edge are repeated; `ignore_outside` overwrites them.
        """
        rows, columns = self._nearest()
        return label.take(rows, 0, mode="clip").take(columns, 1, mode="clip")

    def pair(self, image, label, ignore_index):
        """Image (H, W, 3) and label (H, W) in the window, with the ignore index where it lies outside them."""
        return self.image(image), self.ignore_outside(self.label(label), label.shape, ignore_index)

    def ignore_outside(self, label, shape, ignore_index):
        """Write the ignore index into a window's label where it lies outside a source of `shape`, and return it."""
        return self._fill_outside(label, shape, ignore_index)

    def _fill_outside(self, values, shape, value):
        rows, columns = self._nearest()
        values[(rows < 0) | (rows >= shape[0])] = value
        values[:, (columns < 0) | (columns >= shape[1])] = value
        return values

    def _nearest(self):
        """Source row and column of each row and column of the window; they may lie outside."""
        rows, columns = (np.floor((np.arange(length) + first + 0.5) / self.scale).astype(np.int64)
                         for length, first in zip(self.size, (self.top, self.left), strict=True))
        return rows, columns[::-1] if self.mirrored else columns


@dataclass(frozen=True)
class TrainTransform:
    """Random scale s, random window, random mirroring.

    Coordinates are measured from the image's edge (pixel centers at 0.5, 1.5, ...): x in the source becomes s · x.

    Args:
        input_size: (height, width) of the window, pixels.
        scale_range: lowest and highest scale, drawn uniformly; None to keep the size.
        mirror: mirror left-right with probability 1/2.
        ignore_index: label outside the image.
    """

    input_size: tuple
    scale_range: tuple | None = (0.5, 2.0)
    mirror: bool = True
    ignore_index: int = 255

    def __call__(self, image, label, rng=None):
        """image (H, W, 3) uint8, label (H, W) → the same of input_size.

        rng: a NumPy Generator; every draw comes from it, always in the same order.
        """
        return self.choose(label.shape, rng or np.random.default_rng()).pair(image, label, self.ignore_index)

    def choose(self, shape, rng, focus=None):
        """The window of a source of shape (H, W, ...); with focus (row, column) it holds that pixel of the source."""
        low, high = self.scale_range or (1.0, 1.0)
        scale = rng.uniform(low, high)
        place = rng.uniform(size=2)
        mirrored = bool(rng.integers(2)) and self.mirror
        top, left = (_offset(int(round(length * scale)), window, u, None if focus is None else (point + 0.5) * scale)
                     for length, window, u, point
                     in zip(shape[:2], self.input_size, place[::-1], focus or (0, 0), strict=True))
        return Window(tuple(self.input_size), scale, top, left, mirrored)


def _offset(length, window, u, point=None):
    """First pixel of a window on an axis of `length` pixels; an axis shorter than the window is padded at its end.

    u: random number in 0 to 1; point: place on the axis that the window must hold, or None.
    """
    low, high = 0, max(0, length - window)
    if point is not None:
        low, high = max(low, int(np.ceil(point - window))), min(high, int(point))
    return low + int(u * (max(low, high) - low + 1))


def warp(image, label, size, scale, top, left, mirrored, ignore_index):
    """Scale, cut the window at (top, left) of the scaled image, mirror it. Returns image, label of `size`.

    image (H, W, 3) uint8; label (H, W) uint8; size (height, width), top and left in pixels after scaling.
    """
    return Window(tuple(size), scale, top, left, mirrored).pair(image, label, ignore_index)


train_transform = TrainTransform        # the name for callers, to whom it is a function
