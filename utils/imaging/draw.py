"""Pictures of predictions: overlays, panels, error maps. Files are written atomically."""

import io

import cv2
import numpy as np
from PIL import Image

from ..common import files

LONGEST_SIDE = 65500    # of a JPEG, in pixels, as libjpeg has it


def overlay(image, colors, strength=0.5):
    """Blend an image with class colors, both (H, W, 3) uint8; strength: weight of the colors."""
    return cv2.addWeighted(image, 1 - strength, colors, strength, 0)


def panel(pictures):
    """Place pictures (H, W, 3) uint8 of one size side by side: (H, sum of W, 3)."""
    return np.concatenate(list(pictures), axis=1)


def difference(truth, coarse, fine, ignore_index=255):
    """Show where two label maps (H, W) differ, as (H, W, 3) uint8.

    Green: only fine is right. Red: only coarse is right. Yellow: both are wrong in different ways. Dark gray: the truth
    is unknown.
    """
    picture = np.full((*truth.shape, 3), 235, np.uint8)
    picture[truth == ignore_index] = 60
    differ = (coarse != fine) & (truth != ignore_index)
    picture[differ] = (230, 190, 40)
    picture[differ & (fine == truth)] = (30, 150, 60)
    picture[differ & (coarse == truth)] = (200, 40, 40)
    return picture


def error_map(image, truth, predicted, ignored):
    """The image in gray, wrong pixels red, ignored pixels dark: (H, W, 3) uint8. All maps are (H, W), ignored bool."""
    gray = np.repeat(image.mean(2, keepdims=True) * 0.6 + 90, 3, 2).astype(np.uint8)
    gray[(predicted != truth) & ~ignored] = (200, 40, 40)
    gray[ignored] = (60, 60, 60)
    return gray


def save_png(path, array):
    """Write (H, W) uint8 or uint16, or (H, W, 3) uint8, as PNG; the folder is created."""
    write_picture(path, lambda file: Image.fromarray(array).save(file, "PNG"))


def save_palette_png(path, indices, palette):
    """Write indices (H, W) uint8 as a PNG with a palette (up to 256, 3) uint8 RGB, compressed fast."""
    picture = Image.fromarray(indices)
    picture.putpalette(palette.tobytes())
    write_picture(path, lambda file: picture.save(file, "PNG", compress_level=1))


def save_jpeg(path, picture, quality=95):
    """Write (H, W, 3) uint8 as JPEG, which takes a small fraction of the time and size of PNG where there is noise.

    JPEG has sides of at most `LONGEST_SIDE` pixels: a longer picture is shrunk.
    """
    scale = LONGEST_SIDE / max(picture.shape)
    if scale < 1:
        size = [max(1, int(scale * length)) for length in picture.shape[1::-1]]
        picture = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
    encoded = cv2.imencode(".jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), (cv2.IMWRITE_JPEG_QUALITY, quality))[1]
    write_picture(path, lambda file: file.write(encoded))


def write_picture(path, save):
    """Encode a picture in memory with `save(file)`, then write it atomically."""
    file = io.BytesIO()
    save(file)
    files.write_atomically(path, lambda target: target.write(file.getbuffer()))
