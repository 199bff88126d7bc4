"""Draw predictions: overlays, panels, maps of errors. Files are written whole or not at all."""

import io

import numpy as np
from PIL import Image

from ..common import files


def overlay(image, colors, strength=0.5):
    """image and colors (H, W, 3) uint8 → their mixture (H, W, 3) uint8."""
    return (image * (1 - strength) + colors * strength).astype(np.uint8)


def panel(pictures):
    """Pictures (H, W, 3) uint8 of one size → side by side (H, sum of W, 3)."""
    return np.concatenate(list(pictures), axis=1)


def difference(truth, coarse, fine, ignore_index=255):
    """Where two label maps (H, W) differ → (H, W, 3) uint8: green where the fine one alone is right, red where the
    coarse one alone is, yellow where both are wrong in different ways, dark gray where the truth is unknown."""
    picture = np.full((*truth.shape, 3), 235, np.uint8)
    picture[truth == ignore_index] = 60
    differ = (coarse != fine) & (truth != ignore_index)
    picture[differ] = (230, 190, 40)
    picture[differ & (fine == truth)] = (30, 150, 60)
    picture[differ & (coarse == truth)] = (200, 40, 40)
    return picture


def error_map(image, truth, predicted, ignored):
    """The image in gray, wrong pixels red, ignored ones dark: (H, W, 3) uint8. All maps (H, W), ignored bool."""
    gray = np.repeat(image.mean(2, keepdims=True) * 0.6 + 90, 3, 2).astype(np.uint8)
    gray[(predicted != truth) & ~ignored] = (200, 40, 40)
    gray[ignored] = (60, 60, 60)
    return gray


def save_png(path, array):
    """Write (H, W) uint8 or uint16, or (H, W, 3) uint8, as PNG; its folder is made."""
    write_picture(path, lambda file: Image.fromarray(array).save(file, "PNG"))


def write_picture(path, save):
    """Make a picture in memory, where no disk can be full, and write it."""
    file = io.BytesIO()
    save(file)
    files.write_atomically(path, lambda target: target.write(file.getbuffer()))
