"""Training transforms. Image and label always go through the same geometry, in one step."""

from dataclasses import dataclass

import cv2
import numpy as np

# What lies outside the image is painted in the ImageNet mean, which normalisation takes to about zero.
PADDING_COLOR = (124, 116, 104)


@dataclass(frozen=True)
class TrainTransform:
    """Random scale, random window, mirror.

    Scale, window and mirror are chosen first; then one resampling makes the window's pixels, bilinear for
    the image and nearest for the label. Pixels have half-pixel centres: a point x of the source, measured
    from its edge, goes to s · x.

    Args:
        input_size: (height, width) of the window, pixels.
        scale_range: lowest and highest scale, drawn uniformly; None to keep the size.
        mirror: mirror left-right every second time.
        ignore_index: label outside the image.
    """

    input_size: tuple
    scale_range: tuple | None = (0.5, 2.0)
    mirror: bool = True
    ignore_index: int = 255

    def __call__(self, image, label, rng=None):
        """image (H, W, 3) uint8, label (H, W) uint8 → the same of input_size.

        rng: a NumPy Generator; every draw comes from it, always in the same order.
        """
        rng = rng or np.random.default_rng()
        low, high = self.scale_range or (1.0, 1.0)
        scale = rng.uniform(low, high)
        place = rng.uniform(size=2)
        mirrored = bool(rng.integers(2)) and self.mirror
        left, top = (_offset(length * scale, window, u) for length, window, u
                     in zip(image.shape[1::-1], self.input_size[::-1], place, strict=True))
        return warp(image, label, self.input_size, scale, top, left, mirrored, self.ignore_index)


def _offset(length, window, u):
    """First pixel of the window along an axis of that many pixels; a shorter axis is padded at its end."""
    return int(u * (int(round(length)) - window + 1)) if length >= window else 0


def warp(image, label, size, scale, top, left, mirrored, ignore_index):
    """Scale, cut the window at (top, left) of the scaled image, mirror it. Returns image, label of `size`.

    image (H, W, 3) uint8; label (H, W) uint8; size (height, width), top and left in pixels after scaling.
    """
    height, width = size
    # From a pixel of the window to one of the source: x_source = (x_window + left + 1/2) / scale - 1/2.
    to_source = np.array([[1 / scale, 0, (left + 0.5) / scale - 0.5],
                          [0, 1 / scale, (top + 0.5) / scale - 0.5]])
    if mirrored:
        to_source[0] = [-1 / scale, 0, (left + width - 0.5) / scale - 0.5]
    if scale == 1:      # whole pixels: nothing to interpolate
        to_source = np.round(to_source)
    image = cv2.warpAffine(image, to_source, (width, height), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
                           borderMode=cv2.BORDER_CONSTANT, borderValue=PADDING_COLOR)
    label = cv2.warpAffine(label, to_source, (width, height), flags=cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP,
                           borderMode=cv2.BORDER_CONSTANT, borderValue=ignore_index)
    return image, label


train_transform = TrainTransform
