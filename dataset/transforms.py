"""Training transforms: random scale, crop and mirror, applied alike to image and label map.

A `Window` is chosen first. Image and label map are then resampled in one step, and only inside that window.
"""

from dataclasses import dataclass

import cv2
import numpy as np

# The color outside the image: the mean of ImageNet, which becomes about zero by the normalization.
PADDING_COLOR = (124, 116, 104)


@dataclass(frozen=True)
class Window:
    """A crop window of a scaled and optionally mirrored image.

    Attributes:
        size: (height, width) of the window, pixels.
        scale: factor by which the source is resized before the window is cut.
        top, left: first row and column of the window in the scaled source, pixels.
        mirrored: whether the window is mirrored left-right.
    """

    size: tuple
    scale: float
    top: int
    left: int
    mirrored: bool

    def image(self, image):
        """Cut the window from an image with bilinear interpolation.

        Between the center of an edge pixel and the edge of the image, the edge pixel is repeated, as in `cv2.resize`.
        Outside the image, pixels have the `PADDING_COLOR`.

        Args:
            image: (H, W, 3) uint8.

        Returns:
            (height, width, 3) uint8.
        """
        height, width = self.size
        s, left, top = self.scale, self.left, self.top
        # Window to source coordinates: x_source = (x_window + left + 1/2) / scale - 1/2.
        to_source = np.array([[1 / s, 0, (left + 0.5) / s - 0.5], [0, 1 / s, (top + 0.5) / s - 0.5]])
        if self.mirrored:
            to_source[0] = [-1 / s, 0, (left + width - 0.5) / s - 0.5]
        if s == 1:      # integer offsets: no interpolation
            to_source = np.round(to_source)
        pixels = cv2.warpAffine(image, to_source, (width, height), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
                                borderMode=cv2.BORDER_REPLICATE)
        return self._fill_outside(pixels, image.shape, PADDING_COLOR)

    def label(self, label):
        """Cut the window from a label map with nearest-neighbor interpolation.

        Outside the source, the values at its edge are repeated; `ignore_outside` overwrites them.

        Args:
            label: (H, W[, C]), any dtype.

        Returns:
            (height, width[, C]), same dtype.
        """
        rows, columns = self._nearest()
        return label.take(rows, 0, mode="clip").take(columns, 1, mode="clip")

    def pair(self, image, label, ignore_index):
        """Cut the window from image (H, W, 3) and label (H, W); the label is `ignore_index` outside the source."""
        return self.image(image), self.ignore_outside(self.label(label), label.shape, ignore_index)

    def ignore_outside(self, label, shape, ignore_index):
        """Set a cut label to `ignore_index`, in place, outside a source of `shape`, and return it."""
        return self._fill_outside(label, shape, ignore_index)

    def _fill_outside(self, values, shape, value):
        rows, columns = self._nearest()
        values[(rows < 0) | (rows >= shape[0])] = value
        values[:, (columns < 0) | (columns >= shape[1])] = value
        return values

    def _nearest(self):
        """Return the nearest source row of each window row, and likewise for columns; they may lie outside."""
        rows, columns = (np.floor((np.arange(length) + first + 0.5) / self.scale).astype(np.int64)
                         for length, first in zip(self.size, (self.top, self.left), strict=True))
        return rows, columns[::-1] if self.mirrored else columns


@dataclass(frozen=True)
class TrainTransform:
    """Random scale s, random window and random mirroring.

    Coordinates are measured from the image's edge (pixel centers at 0.5, 1.5, ...): x in the source becomes s · x.

    Args:
        input_size: (height, width) of the window, pixels.
        scale_range: (lowest, highest) scale, drawn uniformly; None for scale 1.
        mirror: whether to mirror left-right with probability 1/2.
        ignore_index: label outside the image.
    """

    input_size: tuple
    scale_range: tuple | None = (0.5, 2.0)
    mirror: bool = True
    ignore_index: int = 255

    def __call__(self, image, label, rng=None):
        """Transform an image and its label map.

        Args:
            image: (H, W, 3) uint8.
            label: (H, W).
            rng: NumPy Generator of all random draws, which are always in the same order; None for a new generator.

        Returns:
            Image and label of `input_size`.
        """
        return self.choose(label.shape, rng or np.random.default_rng()).pair(image, label, self.ignore_index)

    def choose(self, shape, rng, focus=None):
        """Draw a random `Window`.

        Args:
            shape: (H, W, ...) of the source.
            rng: NumPy Generator.
            focus: (row, column) of a source pixel that the window must contain, or None.
        """
        low, high = self.scale_range or (1.0, 1.0)
        scale = rng.uniform(low, high)
        position = rng.uniform(size=2)
        mirrored = bool(rng.integers(2)) and self.mirror
        top, left = (_offset(int(round(length * scale)), window, u, None if focus is None else (point + 0.5) * scale)
                     for length, window, u, point
                     in zip(shape[:2], self.input_size, position[::-1], focus or (0, 0), strict=True))
        return Window(tuple(self.input_size), scale, top=top, left=left, mirrored=mirrored)


def _offset(length, window, u, point=None):
    """Place a window on one axis of a source and return its first pixel.

    An axis shorter than the window is padded at its end.

    Args:
        length: of the axis, pixels.
        window: length of the window, pixels.
        u: random number from 0 to 1.
        point: coordinate on the axis that the window must contain, or None.
    """
    low, high = 0, max(0, length - window)
    if point is not None:
        low, high = max(low, int(np.ceil(point - window))), min(high, int(point))
    return low + int(u * (max(low, high) - low + 1))


train_transform = TrainTransform        # public name, in function style
