"""From files to arrays: images, label maps, and a cache of decoded arrays.

Wherever they are read (training, evaluation, checking, prediction), images and label maps are turned upright by their
EXIF orientation, as `cv2.imread` and Pillow's `exif_transpose` turn them.
"""

import hashlib
import io
import os
import re
import stat
import warnings
import zlib
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from utils import checkpoint
from utils.cli import UserError

LOSSY = {"JPEG", "WEBP"}        # formats that may change the values of a label map
MOST_BYTES = 1 << 30            # of a file; a larger one is refused
KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
         stat.S_IFSOCK: "a socket"}
ORIENTATION = 0x0112            # the EXIF tag
TURNS = {2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1], 5: lambda a: a.swapaxes(0, 1),
         6: lambda a: np.rot90(a, -1), 7: lambda a: np.rot90(a, 2).swapaxes(0, 1), 8: lambda a: np.rot90(a)}
# Chunks of a PNG that do not change its pixels. Text chunks may hold an EXIF orientation: `_plain_png` looks at them.
HARMLESS = {b"IHDR", b"IDAT", b"IEND", b"pHYs", b"tIME", b"sRGB", b"gAMA", b"cHRM", b"iCCP", b"sBIT", b"bKGD", b"tEXt",
            b"zTXt"}
JPEG_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")       # any but a restart, the only one within a scan


def kind_of(path):
    """What stands at a path, in words: "a file", "a folder", "a pipe" ..., or "no such file"."""
    try:
        return KINDS.get(stat.S_IFMT(os.stat(path).st_mode), "a file")
    except (OSError, ValueError):       # ValueError: a null byte in the name
        return "no such file"


def open_file(path, what="an image"):
    """A regular file, open for reading in binary. Raises `UserError`: `what` was expected, and what was found.

    Pipes and devices are refused at once: waiting for a pipe, or reading a device, may never end.
    """
    try:
        file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0)))
    except FileNotFoundError:
        found = "no such file"
    except IsADirectoryError:
        found = "a folder"
    except (OSError, ValueError) as error:
        found = f"one that cannot be read: {error}"
    else:
        kind = stat.S_IFMT(os.fstat(file.fileno()).st_mode)
        if kind == stat.S_IFREG:
            return file
        file.close()
        found = KINDS.get(kind, "something else")
    raise UserError(f"{path}: expected {what}, found {found}")


def read_file(path, what="an image"):
    """The bytes of a regular file. Raises `UserError` as `open_file`, and for files beyond `MOST_BYTES`."""
    with open_file(path, what) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MOST_BYTES:
            raise UserError(f"{path}: expected {what} of at most {MOST_BYTES / 1e9:.1f} GB, found {size / 1e9:.1f} GB")
        try:
            return file.read()
        except OSError as error:
            raise UserError(f"{path}: expected {what}, found one that cannot be read: {error}") from None


def read_image(path):
    """Read an image file as RGB (H, W, 3) uint8, upright: grey, palettes, 16 bits and transparency become RGB.

    Raises `UserError`.
    """
    data = read_file(path)
    image = open_image(path, data)
    if _plain_jpeg(image, data) or _plain_png(image, data, ((8, 0), (8, 2))):
        pixels = _by_opencv(image, data, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
        if pixels is not None:
            pixels = cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)
            return pixels if image.format == "PNG" else turn_upright(pixels, image)     # a plain PNG has no EXIF
    load(path, image)
    if image.mode == "F":
        raise UserError(f"{path}: expected an image of 8 or 16 bits, found one of floating-point numbers")
    pixels = image
    if image.mode.startswith("I"):      # 16 bits: Pillow would clip at 255
        pixels = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    return turn_upright(np.asarray(pixels.convert("RGB")), image)


def read_ids(path):
    """Read a label map, upright: ids (H, W) of any integer dtype, or colours (H, W, 3) uint8.

    With a palette the indices are the ids. Colours are looked up in the class table later (`ClassTable.encode`).
    Raises `UserError`.
    """
    data = read_file(path)
    image = open_image(path, data)
    if _plain_png(image, data, ((8, 0), (16, 0))):
        ids = _by_opencv(image, data, cv2.IMREAD_UNCHANGED)
        if ids is not None:
            return ids
    load(path, image)
    if image.format in LOSSY and not (image.format == "WEBP" and image.mode == "RGB" and b"VP8L" in data[:64]):
        raise UserError(f"{path}: expected a label map in a lossless format such as PNG, found {image.format}, which "
                        "changes values")
    if image.mode == "F":
        raise UserError(f"{path}: expected whole numbers, found a label map of floating-point numbers")
    values = np.asarray(image) if image.mode != "1" else np.asarray(image.convert("L")) // 255
    if values.ndim == 2:
        return turn_upright(values, image)
    if image.mode == "LA" or (image.mode == "RGBA" and (values[..., 3] != 255).any()):
        raise UserError(f"{path}: expected a label map of ids or colours, found one with transparency")
    if image.mode not in ("RGB", "RGBA"):
        raise UserError(f"{path}: expected a label map of ids or colours, found mode {image.mode}")
    return turn_upright(np.ascontiguousarray(values[..., :3]), image)


def open_image(path, data):
    """A `PIL.Image` of a file's bytes, not decoded yet. Raises `UserError` that says what is wrong with the file."""
    try:
        image = Image.open(io.BytesIO(data))
        frames = getattr(image, "n_frames", 1)
    except UnidentifiedImageError:
        raise UserError(f"{path}: expected an image, found {'a file that is none' if data else 'an empty file'}"
                        ) from None
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: expected an image, found one that cannot be read: {error}") from None
    if frames > 1:
        raise UserError(f"{path}: expected one image, found an animation of {frames}")
    return image


def load(path, image):
    """Decode a `PIL.Image`. Raises `UserError`."""
    try:
        image.load()
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: expected an image, found one that cannot be read: {error}") from None


def orientation(image):
    """The EXIF orientation of a `PIL.Image`, 1 to 8; 1, upright, where it has none that can be read."""
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:   # damaged metadata makes Pillow raise errors of any kind
        return 1


def turn_upright(array, image):
    """An array (H, W, ...) as the EXIF orientation of its `PIL.Image` says."""
    turn = TURNS.get(orientation(image))
    return array if turn is None else np.ascontiguousarray(turn(array))


def upright_size(path):
    """(width, height) of an image file as `read_image` turns it, from its header. Raises `UserError`."""
    image = open_image(path, read_file(path))
    return image.size[::-1] if orientation(image) > 4 else image.size       # 5 to 8 exchange width and height


def sizes_differ(path, image, label_path, ids):
    """The sentence for an image and a label map, (H, W, ...), of two sizes; it names EXIF where that may be why."""
    text = (f"{label_path}: expected the size of {path}, {image.shape[1]}×{image.shape[0]}, "
            f"found {ids.shape[1]}×{ids.shape[0]}")
    for file in (path, label_path):
        if orientation(open_image(file, read_file(file))) > 4:      # 5 to 8 exchange width and height
            text += f"; {file} was turned upright by its EXIF orientation"
    return text


def _plain_png(image, data, kinds):
    """Whether OpenCV may decode a file: a whole PNG of one of these kinds (bits, colour type), with harmless chunks.

    OpenCV is faster than Pillow, but accepts files that are cut short or damaged: so the checksum of every chunk is
    compared here.
    """
    if image.format != "PNG" or data[12:16] != b"IHDR" or (data[24], data[25]) not in kinds:
        return False
    place, name = 8, None
    while name != b"IEND" and place + 12 <= len(data):
        length, name = int.from_bytes(data[place:place + 4], "big"), data[place + 4:place + 8]
        end = place + 8 + length
        text = name in (b"tEXt", b"zTXt") and data.startswith(b"Raw profile", place + 8)
        if name not in HARMLESS or text or zlib.crc32(memoryview(data)[place + 4:end]) != int.from_bytes(
                data[end:end + 4], "big"):
            return False
        place = end + 4
    return name == b"IEND"


def _plain_jpeg(image, data):
    """Whether OpenCV may decode a file: a JPEG of one scan that ends where the file does, grey or of three channels."""
    if image.format != "JPEG" or image.mode not in ("L", "RGB"):
        return False
    place = 2
    while data[place:place + 1] == b"\xff" and data[place + 1:place + 2] != b"\xda":     # segments before the scan
        place += 2 + int.from_bytes(data[place + 2:place + 4], "big")
    marker = JPEG_MARKER.search(data, place + 2)
    return marker is not None and marker.group() == b"\xff\xd9" and marker.end() == len(data)


def _by_opencv(image, data, flags):
    """The array that OpenCV decodes, or None where it cannot: the caller then tries Pillow, which says why."""
    try:
        array = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error:
        return None
    return array if array is not None and array.shape[1::-1] == image.size else None


class DecodedCache:
    """Decoded arrays, kept in files that all processes map into memory.

    An array's file is named by path, size and time of change of the picture: a picture that changed is decoded again,
    and its old array is removed. Arrays are written whole or not at all, so after an interruption only the rest is
    decoded. A file in the cache that does not hold its picture's array (cut short, of another shape, a pickle) is
    replaced; the first one is reported by a warning.

    Args:
        folder: created if it does not exist.
    """

    VERSION = 2     # of the decoding, part of the names; to be raised when the same picture gives another array

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
        checkpoint.write_atomically(place, lambda file: np.save(file, array))
        current = {self.place(path, known) for known in (read_image, read_ids)}
        for old in self.folder.glob(f"{self._name(path)}_*.npy"):
            if old not in current:
                old.unlink(missing_ok=True)
        return array

    def missing(self, files):
        """Those of the (path, decode) that are not in the cache, and about how many bytes their arrays will take."""
        files = [(path, decode) for path, decode in files if self._mapped(path, decode) is None]
        return files, sum(decoded_bytes(path) for path, _ in files)

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
            array = np.lib.format.open_memmap(place, mode="r")
            with open_file(path) as file, Image.open(file) as picture:
                size = picture.size
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


def decoded_bytes(path):
    """Bytes of a picture's array, from the picture's header; 0 where that cannot be read (decoding will say why)."""
    try:
        with open_file(path) as file, Image.open(file) as image:
            channels = {"RGB": 3, "RGBA": 3, "I;16": 2, "I": 4}.get(image.mode, 1)
            return image.width * image.height * channels + 128
    except (UserError, OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return 0
