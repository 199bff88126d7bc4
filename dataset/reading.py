"""Files → arrays: images of all kinds, label maps, and a cache of what was decoded."""

import hashlib
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from utils import checkpoint
from utils.cli import UserError

LOSSY = {"JPEG", "WEBP"}        # formats that may change the values of a label map


def read_image(path, upright=False):
    """File → RGB (H, W, 3) uint8: grey, palettes, 16 bits and transparency become RGB. Raises `UserError`.

    upright: turn it as its EXIF orientation says.
    """
    image = open_image(path)
    if upright:
        image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise UserError(f"{path}: expected an image of 8 or 16 bits, found one of floating-point numbers")
    if image.mode.startswith("I"):      # 16 bits: Pillow would clip at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    return np.asarray(image.convert("RGB"))


def read_ids(path):
    """File → what a label map holds: ids (H, W) of any integer dtype, or colours (H, W, 3) uint8. Raises `UserError`.

    A palette's indices are ids. Colours become ids by the class table (`ClassTable.encode`).
    """
    image = open_image(path)
    if image.format in LOSSY and not (image.format == "WEBP" and image.mode == "RGB" and _lossless_webp(path)):
        raise UserError(f"{path}: expected a label map in a lossless format such as PNG, found {image.format}, which "
                        "changes values")
    if image.mode == "F":
        raise UserError(f"{path}: expected whole numbers, found a label map of floating-point numbers")
    if image.mode == "1":
        image = image.convert("L")
        return np.asarray(image) // 255
    values = np.asarray(image)
    if values.ndim == 2:
        return values
    if image.mode == "LA" or (image.mode == "RGBA" and (values[..., 3] != 255).any()):
        raise UserError(f"{path}: expected a label map of ids or colours, found one with transparency")
    if image.mode not in ("RGB", "RGBA"):
        raise UserError(f"{path}: expected a label map of ids or colours, found mode {image.mode}")
    return np.ascontiguousarray(values[..., :3])


def open_image(path):
    """A decoded `PIL.Image`. Raises `UserError` that says what is wrong with the file."""
    try:
        image = Image.open(path)
        if getattr(image, "n_frames", 1) > 1:
            raise UserError(f"{path}: expected one image, found an animation of {image.n_frames}")
        image.load()
        return image
    except FileNotFoundError:
        raise UserError(f"{path}: expected an image, found no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: expected an image, found a folder") from None
    except UnidentifiedImageError:
        what = "an empty file" if Path(path).stat().st_size == 0 else "a file that is none"
        raise UserError(f"{path}: expected an image, found {what}") from None
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: expected an image, found one that cannot be read: {error}") from None


def _lossless_webp(path):
    with open(path, "rb") as file:
        return b"VP8L" in file.read(64)


class DecodedCache:
    """Decoded arrays as files that all processes map into memory.

    A file is keyed by path, size and time of change: one that changed is decoded again, and its old array is removed.
    Arrays are written whole or not at all, so an interrupted build goes on where it was.

    Args:
        folder: made if it is not there.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--cache {folder}: expected a folder, found: {error}") from None

    def place(self, path):
        """Where the array of a file lies, or would lie."""
        try:
            found = os.stat(path)
        except OSError:
            raise UserError(f"{path}: expected an image, found no such file") from None
        return self.folder / f"{self._name(path)}_{found.st_size}_{found.st_mtime_ns}.npy"

    @staticmethod
    def _name(path):
        return hashlib.sha256(os.path.abspath(path).encode()).hexdigest()[:24]

    def read(self, path, decode):
        """The array of a file: mapped from the cache, where `decode(path)` puts it if it is not there yet."""
        place = self.place(path)
        if not place.exists():
            array = decode(path)
            checkpoint.write_atomically(place, lambda file: np.save(file, array))
            for old in self.folder.glob(f"{self._name(path)}_*.npy"):
                if old != place:
                    old.unlink(missing_ok=True)
        return np.load(place, mmap_mode="r")

    def missing(self, paths):
        """Those of the files that are not in the cache, and about how many bytes their arrays will take."""
        paths = [path for path in paths if not self.place(path).exists()]
        return paths, sum(map(decoded_bytes, paths))


def decoded_bytes(path):
    """Bytes of a file's array, from its header; 0 where that cannot be read (decoding will say why)."""
    try:
        with Image.open(path) as image:
            channels = {"RGB": 3, "RGBA": 3, "I;16": 2, "I": 4}.get(image.mode, 1)
            return image.width * image.height * channels + 128
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return 0
