"""Decoded arrays in files, so that no picture is decoded twice. Decoding itself: `utils.imaging.decode`."""

import hashlib
import os
import warnings
from pathlib import Path

import numpy as np

from utils.common.errors import UserError
from utils.common.files import write_atomically
from utils.imaging.decode import read_header, read_ids, read_image


class DecodedCache:
    """Decoded arrays, kept in files that all processes map into memory.

    An array's file is named by path, size and time of change of the picture: a picture that changed is decoded again,
    and its old array is removed. Arrays are written whole or not at all, so after an interruption only the rest is
    decoded. A file in the cache that does not hold its picture's array (cut short, of another shape, a pickle) is
    replaced; the first one is reported by a warning.

    Args:
        folder: created if it does not exist.
    """

    VERSION = 3     # of the decoding, part of the names; to be raised when the same picture gives another array

    def __init__(self, folder):
        self.folder, self.warned = Path(folder), False
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--cache {folder}: expected a folder, found: {error}") from None

    def place(self, path, decode):
        """The path of the array that `decode` makes of a picture, whether it exists or not."""
        size, changed = stamp(path)
        return self.folder / f"{self._name(path)}_{size}_{changed}_{decode.__name__}{self.VERSION}.npy"

    @staticmethod
    def _name(path):
        return hashlib.sha256(os.path.abspath(path).encode()).hexdigest()[:24]

    def read(self, path, decode):
        """The array of a picture, from the cache; if it is not there yet, `decode(path)` makes it, and it is kept."""
        array = self._mapped(path, decode)
        if array is not None:
            return array
        array, place = decode(path), self.place(path, decode)
        if os.path.isdir(place) and not os.listdir(place):
            os.rmdir(place)
        write_atomically(place, lambda file: np.save(file, array))
        current = {self.place(path, known) for known in (read_image, read_ids)}
        for old in self.folder.glob(f"{self._name(path)}_*.npy"):
            if old not in current:
                old.unlink(missing_ok=True)
        return array

    def missing(self, files):
        """Those of the (path, decode) that are not in the cache, and about how many bytes their arrays will take."""
        files = [(path, decode) for path, decode in files if self._mapped(path, decode) is None]
        return files, sum(decoded_bytes(*file) for file in files)

    def _mapped(self, path, decode):
        """The array of a picture, mapped from the cache, or None where its file is missing or holds something else."""
        place = self.place(path, decode)
        if not os.path.lexists(place):
            return None
        is_file = os.path.isfile(place)     # not a folder or a pipe
        array = self._load_if_valid(place, path, decode) if is_file else None
        if array is None and not self.warned:
            self.warned = True
            warnings.warn(f"--cache {self.folder}: {place.name} is no array of {path}, which is decoded again, as is "
                          "any other file of which this is so", stacklevel=3)
        return array

    @staticmethod
    def _load_if_valid(place, path, decode):
        """The array in a file of the cache, or None if `decode` cannot have made it of the picture at `path`."""
        try:
            array, (size, _) = np.lib.format.open_memmap(place, mode="r"), read_header(path)
        except Exception:       # a damaged header makes NumPy raise errors of any kind
            return None
        colors = array.dtype == np.uint8 and array.ndim == 3 and array.shape[2] == 3
        fits = colors if decode is read_image else colors or (array.dtype.kind in "iu" and array.ndim == 2)
        return array if fits and sorted(array.shape[:2]) == sorted(size) else None


def stamp(path):
    """(bytes, time of change in ns) of a file. Raises `UserError`."""
    try:
        found = os.stat(path)
    except OSError:
        raise UserError(f"{path}: expected an image, found no such file") from None
    return found.st_size, found.st_mtime_ns


def decoded_bytes(path, decode):
    """Bytes of the array that `decode` makes of a picture, as far as its header tells; 0 where that cannot be read
    (decoding will say why)."""
    try:
        (width, height), mode = read_header(path)
    except Exception:   # a damaged header makes Pillow and tifffile raise errors of any kind
        return 0
    channels = 3 if decode is read_image else {"RGB": 3, "RGBA": 3, "I;16": 2, "I": 4, "F": 4, "": 4}.get(mode, 1)
    return width * height * channels + 128
