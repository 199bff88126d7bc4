"""Training transforms: random scale, rotation, crop, mirroring and blur, applied alike to image and label map.

A `Window` is chosen first. Image and label map are then resampled in one step, and only inside that window.
"""

import math
from dataclasses import dataclass, replace

import cv2
import numpy as np

# The color outside the image: the mean of ImageNet, which becomes about zero by the normalization.
PADDING_COLOR = (124, 116, 104)


@dataclass(frozen=True)
class Window:
    """A crop window of a scaled, mirrored and turned image.

    The window is cut in this order: scale, cut a frame, mirror it, rotate around its center, flip, quarter turns.

    Attributes:
        size: (height, width) of the window, pixels.
        scale: factor by which the source is resized before the window is cut.
        top, left: first row and column of the frame in the scaled source, pixels. The frame is the window before the
            quarter turns.
        mirrored: whether the window is mirrored left-right.
        angle: rotation around the center of the frame, degrees counterclockwise.
        flipped: whether the window is flipped top-bottom.
        turns: number of counterclockwise quarter turns.
        blur: standard deviation of a Gaussian that blurs the image, pixels of the window; 0 for none.
    """

    size: tuple
    scale: float
    top: int
    left: int
    mirrored: bool
    angle: float = 0.0
    flipped: bool = False
    turns: int = 0
    blur: float = 0.0

    @property
    def frame(self):
        """(height, width) of the window before its quarter turns, pixels."""
        return self.size[::-1] if self.turns % 2 else self.size

    def image(self, image):
        """Cut the window from an image with bilinear interpolation.

        Between the center of an edge pixel and the edge of the image, the edge pixel is repeated, as in `cv2.resize`.
        Outside the image, pixels have the `PADDING_COLOR`.

        Args:
            image: (H, W, 3) uint8.

        Returns:
            (height, width, 3) uint8.
        """
        pixels = cv2.warpAffine(image, self._to_source(), self.frame[::-1],
                                flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, borderMode=cv2.BORDER_REPLICATE)
        if self.blur:       # before the padding, which must not be mixed with the edge
            pixels = cv2.GaussianBlur(pixels, (0, 0), self.blur, borderType=cv2.BORDER_REPLICATE)
        return self._turn(self._fill_outside(pixels, image.shape, PADDING_COLOR))

    def label(self, label):
        """Cut the window from a label map with nearest-neighbor interpolation.

        Outside the source, the values at its edge are repeated; `ignore_outside` overwrites them.

        Args:
            label: (H, W[, C]), any dtype.

        Returns:
            (height, width[, C]), same dtype.
        """
        rows, columns = self._nearest()
        if self.angle:
            return self._turn(label[rows.clip(0, label.shape[0] - 1), columns.clip(0, label.shape[1] - 1)])
        return self._turn(label.take(rows, 0, mode="clip").take(columns, 1, mode="clip"))

    def pair(self, image, label, ignore_index):
        """Cut the window from image (H, W, 3) and label (H, W); the label is `ignore_index` outside the source."""
        return self.image(image), self.ignore_outside(self.label(label), label.shape, ignore_index)

    def ignore_outside(self, label, shape, ignore_index):
        """Set a cut label to `ignore_index`, in place, outside a source of `shape`, and return it."""
        self._fill_outside(self._turn_back(label), shape, ignore_index)
        return label

    def _turn(self, values):
        """Flip and turn the frame (h, w[, C]): a view of (height, width[, C])."""
        return np.rot90(values[::-1 if self.flipped else 1], self.turns)

    def _turn_back(self, values):
        """Undo `_turn`."""
        return np.rot90(values, -self.turns)[::-1 if self.flipped else 1]

    def _fill_outside(self, values, shape, value):
        """Set the values of the frame (h, w[, C]) outside a source of `shape`, in place, and return them."""
        rows, columns = self._nearest()
        outside_rows, outside_columns = (rows < 0) | (rows >= shape[0]), (columns < 0) | (columns >= shape[1])
        values[outside_rows] = value
        values[outside_columns if self.angle else (slice(None), outside_columns)] = value
        return values

    def _to_source(self):
        """Return the (2, 3) matrix from pixel coordinates (x, y, 1) of the frame to those of the source."""
        height, width = self.frame
        s, left, top = self.scale, self.left, self.top
        # Frame to source coordinates: x_source = (x_frame + left + 1/2) / scale - 1/2.
        to_source = np.array([[1 / s, 0, (left + 0.5) / s - 0.5], [0, 1 / s, (top + 0.5) / s - 0.5]])
        if self.mirrored:
            to_source[0] = [-1 / s, 0, (left + width - 0.5) / s - 0.5]
        if self.angle:
            back = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), -self.angle, 1.0)
            return to_source @ np.vstack([back, [0, 0, 1]])
        return np.round(to_source) if s == 1 else to_source     # integer offsets: no interpolation

    def _nearest(self):
        """Return the nearest source rows (h,) and columns (w,) of the frame, both (h, w) if it is rotated.

        They may lie outside.
        """
        if self.angle:
            (xx, xy, x0), (yx, yy, y0) = self._to_source()
            y, x = np.ogrid[:self.frame[0], :self.frame[1]]
            return (np.floor(yx * x + yy * y + y0 + 0.5).astype(np.int64),
                    np.floor(xx * x + xy * y + x0 + 0.5).astype(np.int64))
        rows, columns = (np.floor((np.arange(length) + first + 0.5) / self.scale).astype(np.int64)
                         for length, first in zip(self.frame, (self.top, self.left), strict=True))
        return rows, columns[::-1] if self.mirrored else columns


@dataclass(frozen=True)
class TrainTransform:
    """Random scale s, random window, random mirroring, and optionally rotation, flips, quarter turns and blur.

    Coordinates are measured from the image's edge (pixel centers at 0.5, 1.5, ...): x in the source becomes s · x.

    Args:
        input_size: (height, width) of the window, pixels.
        scale_range: (lowest, highest) scale, drawn uniformly; None for scale 1.
        mirror: whether to mirror left-right with probability 1/2.
        ignore_index: label outside the image.
        rotate: largest angle of a rotation in either direction, degrees, drawn uniformly; None for none.
        vertical_flip: whether to flip top-bottom with probability 1/2.
        quarter_turns: whether to turn by 0, 1, 2 or 3 quarters, drawn uniformly.
        blur: largest standard deviation of a Gaussian for half of the images, pixels, drawn uniformly; None for none.
    """

    input_size: tuple
    scale_range: tuple | None = (0.5, 2.0)
    mirror: bool = True
    ignore_index: int = 255
    rotate: float | None = None
    vertical_flip: bool = False
    quarter_turns: bool = False
    blur: float | None = None

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
        # Drawn only where they are used, so that other runs have the same samples as in earlier versions.
        turns = int(rng.integers(4)) if self.quarter_turns else 0
        window = Window(tuple(self.input_size), scale, top=0, left=0, mirrored=mirrored, turns=turns,
                        angle=rng.uniform(-self.rotate, self.rotate) if self.rotate else 0.0,
                        flipped=self.vertical_flip and bool(rng.integers(2)),
                        blur=rng.uniform(0, self.blur) if self.blur and rng.integers(2) else 0.0)
        points = (None, None) if focus is None else tuple((point + 0.5) * scale for point in focus)
        top, left = (_offset(int(round(length * scale)), extent, u, point) for length, extent, u, point
                     in zip(shape[:2], window.frame, position[::-1], points, strict=True))
        if window.angle and focus is not None:
            top, left = _keep_inside(points, replace(window, top=top, left=left))
        return replace(window, top=top, left=left)


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


def _keep_inside(point, window):
    """Return (top, left) of a rotated window that is moved to contain a point, (y, x) in the scaled source."""
    corner, half = np.array([window.top, window.left]), np.array(window.frame) / 2
    angle = math.radians(-window.angle if window.mirrored else window.angle)
    to_frame = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])      # of (y, x)
    place = to_frame @ (np.array(point) - corner - half)        # from the center of the frame
    return tuple((corner + to_frame.T @ (place - place.clip(0.5 - half, half - 0.5))).tolist())


train_transform = TrainTransform        # public name, in function style
