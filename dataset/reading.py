"""On-disk cache of decoded images and label maps. Decoding itself is in `utils.imaging.decode`."""

import hashlib
import os
import warnings
from pathlib import Path

import numpy as np

from utils.common.errors import UserError
from utils.common.files import write_atomically
from utils.imaging.decode import read_header, read_ids, read_image


class DecodedCache:
    """Cache of decoded arrays in NumPy files, which all processes map into memory.

    The name of a cache file contains a hash of the image's path, its size and its modification time: if an image
    changes, it is decoded again and its old array is removed. Arrays are written atomically, so after an interruption
    only the missing images are decoded. A cache file that cannot be the array of its image (truncated, another shape,
    a pickle) is replaced; the first one causes a warning.

    Args:
        folder: of the cache; created if it does not exist.

    Raises:
        UserError: if the folder cannot be created.
    """

    VERSION = 3     # of the decoder, part of the file names; increase it when decoding gives other values

    def __init__(self, folder):
        self.folder, self.warned = Path(folder), False
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--cache {folder}: expected a folder, found: {error}") from None

    def array_path(self, path, decode):
        """Return the path of the cache file for `decode(path)`, whether it exists or not."""
        size, changed = stamp(path)
        return self.folder / f"{self._name(path)}_{size}_{changed}_{decode.__name__}{self.VERSION}.npy"

    @staticmethod
    def _name(path):
        return hashlib.sha256(os.path.abspath(path).encode()).hexdigest()[:24]

    def read(self, path, decode):
        """Return the decoded array of an image, from the cache or by `decode(path)`, which is then cached.

        Args:
            path: of the image.
            decode: `read_image` or `read_ids`.
        """
        array = self._mapped(path, decode)
        if array is not None:
            return array
        array, array_path = decode(path), self.array_path(path, decode)
        if os.path.isdir(array_path) and not os.listdir(array_path):
            os.rmdir(array_path)
        write_atomically(array_path, lambda file: np.save(file, array))
        current = {self.array_path(path, known) for known in (read_image, read_ids)}
        for old in self.folder.glob(f"{self._name(path)}_*.npy"):
            if old not in current:
                old.unlink(missing_ok=True)
        return array

    def missing(self, files):
        """Find the images that are not in the cache.

        Args:
            files: [(path, decode)].

        Returns:
            The subset of `files` without a valid cache file, and the estimated number of bytes of their arrays.
        """
        files = [(path, decode) for path, decode in files if self._mapped(path, decode) is None]
        return files, sum(decoded_bytes(*file) for file in files)

    def _mapped(self, path, decode):
        """Map the array of an image from the cache; None if its cache file is missing or invalid."""
        array_path = self.array_path(path, decode)
        if not os.path.lexists(array_path):
            return None
        is_file = os.path.isfile(array_path)     # not a folder or a pipe
        array = self._load_if_valid(array_path, path, decode) if is_file else None
        if array is None and not self.warned:
            self.warned = True
            warnings.warn(f"--cache {self.folder}: {array_path.name} is not the array of {path}, which is decoded "
                          "again; other such files are replaced without a warning", stacklevel=3)
        return array

    @staticmethod
    def _load_if_valid(array_path, path, decode):
        """Map the array of a cache file; None if it cannot be the result of `decode(path)`."""
        try:
            array, (size, _) = np.lib.format.open_memmap(array_path, mode="r"), read_header(path)
        except Exception:       # a damaged header makes NumPy raise errors of any kind
            return None
        colors = array.dtype == np.uint8 and array.ndim == 3 and array.shape[2] == 3
        fits = colors if decode is read_image else colors or (array.dtype.kind in "iu" and array.ndim == 2)
        return array if fits and sorted(array.shape[:2]) == sorted(size) else None


def stamp(path):
    """Return (size in bytes, modification time in ns) of a file. Raises `UserError` if it does not exist."""
    try:
        status = os.stat(path)
    except OSError:
        raise UserError(f"{path}: expected an image, found no such file") from None
    return status.st_size, status.st_mtime_ns


def decoded_bytes(path, decode):
    """Estimate from an image's header how many bytes the file of its decoded array takes.

    Returns 0 if the header cannot be read; decoding reports the reason later.
    """
    try:
        (width, height), mode = read_header(path)
    except Exception:   # a damaged header makes Pillow and tifffile raise errors of any kind
        return 0
    channels = 3 if decode is read_image else {"RGB": 3, "RGBA": 3, "I;16": 2, "I": 4, "F": 4, "": 4}.get(mode, 1)
    return width * height * channels + 128
