"""Reading of images and label maps as arrays.

Everywhere (training, evaluation, checking, prediction), both are turned upright according to their EXIF orientation, as
`cv2.imread` and Pillow's `exif_transpose` do.
"""

import contextlib
import io
import os
import re
import threading
import warnings
import zlib
from collections import Counter

import cv2
import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from ..common.errors import UserError, first_line
from ..common.files import open_file, read_file
from . import tiff

# File name suffixes of images.
SUFFIXES = {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".tif", ".tiff", ".webp", ".avif", ".jp2", ".j2k", ".bmp", ".dib",
            ".gif", ".tga", ".ppm", ".pgm", ".pbm", ".pnm"}
LOSSY = {"JPEG", "MPO", "WEBP", "AVIF", "JPEG2000"}     # formats that may change the values of a label map
MAX_PIXELS = 1 << 30            # OpenCV's limit; larger images are refused
DARK = 1 << 14                  # a 16-bit image whose values are all smaller was not scaled to 16 bits
ORIENTATION = 0x0112            # the EXIF tag
BITS, PLANES, SAMPLE_FORMAT = 258, 284, 339        # TIFF tags; planes 2: band by band; format 2: signed
TURNS = {2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1], 5: lambda a: a.swapaxes(0, 1),
         6: lambda a: np.rot90(a, -1), 7: lambda a: np.rot90(a, 2).swapaxes(0, 1), 8: lambda a: np.rot90(a)}
# Chunks of a PNG that do not change its pixels. Text chunks may hold an EXIF orientation, see `_plain_png`.
HARMLESS = {b"IHDR", b"IDAT", b"IEND", b"pHYs", b"tIME", b"sRGB", b"gAMA", b"cHRM", b"iCCP", b"sBIT", b"bKGD", b"tEXt",
            b"zTXt"}
JPEG_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")       # any but a restart marker, the only kind within a scan

_warned_kinds = set()       # of `warn_once`
_opening = threading.Lock()


def warn_once(kind, sentence):
    """Warn that something in a file was ignored or looks wrong: once per kind, in this process and its forks."""
    if kind not in _warned_kinds:
        _warned_kinds.add(kind)
        warnings.warn(f"{sentence}; other files of this kind are not named", stacklevel=3)


def _no_warning(kind, sentence):
    """A `warn` callback that does nothing."""


def read_image(path, warn=warn_once):
    """Read an image file as upright RGB (H, W, 3) uint8; converts gray, palettes, 16 bits and transparency.

    Args:
        path: the file.
        warn: called with (kind, sentence) if bands are ignored or a 16-bit image becomes nearly black.

    Raises `UserError`.
    """
    data = read_file(path)
    image = open_image(path, data, warn)
    if _plain_jpeg(image, data) or _plain_png(image, data, ((8, 0), (8, 2))):
        pixels = _by_opencv(image, data, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
        if pixels is not None:
            pixels = cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)
            return pixels if image.format == "PNG" else turn_upright(pixels, image)     # a plain PNG has no EXIF
    tags = _tiff_tags(image)
    if tags:
        tiff.warn_of_ignored_bands(path, tags.get(tiff.SAMPLES, 1), photometric=tags.get(tiff.PHOTOMETRIC),
                                   extra=tags.get(tiff.EXTRA_SAMPLES), warn=warn)
    load(path, image)
    pixels = _upright_rgb(path, image)
    largest = _largest_of_16_bits(image, data, pixels)
    if largest is not None and 0 < largest < DARK:
        # A camera uses the same number of bits for every image, dark or bright.
        remedy = "save it as 8 bits" if largest < 256 else (
            f"if no image has larger values, multiply the values of all images by {65536 >> largest.bit_length()}")
        warn("dark", f"{path}: expected values up to 65535 in an image of 16 bits, found at most {largest}, which "
                     f"makes it nearly black ({largest // 257} of 255); {remedy}")
    return pixels


def _largest_of_16_bits(image, data, pixels):
    """The largest value in a 16-bit file, None for other files; pixels: the image decoded from it."""
    if tiff.LARGEST in image.info:
        return image.info[tiff.LARGEST]
    if image.mode.startswith("I"):
        return None if _tiff_bits(image) == 12 else int(np.asarray(image).max())
    if pixels.max() < DARK // 257 + 1 and (_tiff_bits(image) == 16 or image.format == "PNG" and data[24] == 16):
        values = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)      # Pillow kept only 8 bits
        return 257 * int(pixels.max()) if values is None else int(values[..., :3].max())
    return None


def to_rgb(image):
    """Convert an image of any supported kind to RGB (H, W, 3) uint8, an array, or a tensor for a tensor.

    Args:
        image: a path, a `PIL.Image`, or a uint8 array or tensor of values 0 to 255, (H, W) or (H, W, 1) gray,
            (H, W, 3) RGB, or (H, W, 4) RGBA.

    Raises:
        UserError: if a file cannot be read.
        ValueError: for anything else. Values from 0 to 1 or channels in front would otherwise give wrong results.
    """
    if isinstance(image, str | os.PathLike):
        return read_image(image)
    if isinstance(image, Image.Image):
        load(getattr(image, "filename", None) or "image", image)
        return pil_to_rgb(image)
    if not isinstance(image, np.ndarray | torch.Tensor):
        raise ValueError(f"image: expected a path, a PIL image, or a uint8 array, found {type(image).__name__}")
    kind, shape, hint = str(image.dtype).removeprefix("torch."), tuple(image.shape), ""
    if kind == "uint8" and 0 not in shape:
        if len(shape) == 2 or len(shape) == 3 and shape[2] == 1:
            return image.reshape(*shape[:2], 1)[..., [0, 0, 0]]
        if len(shape) == 3 and shape[2] in (3, 4):
            return image[..., :3]
        if len(shape) == 4:
            hint = "; one image at a time"
        elif len(shape) == 3 and shape[0] in (1, 3, 4):
            hint = f"; channels come last: image.{'permute' if torch.is_tensor(image) else 'transpose'}(1, 2, 0)"
    elif "float" in kind:
        hint = "; of values from 0 to 1, take 255 times as much, rounded to uint8"
    elif "int" in kind and kind != "uint8":
        hint = "; of 16 bits, take image // 257 as uint8"
    raise ValueError(f"image: expected uint8 (H, W, 3) RGB, (H, W) gray or (H, W, 4) RGBA, found {kind} {shape}{hint}")


def _upright_rgb(path, image):
    """A decoded `PIL.Image` of a file → upright RGB (H, W, 3) uint8. Raises `UserError`."""
    try:
        return turn_upright(pil_to_rgb(image), image)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def pil_to_rgb(image):
    """A `PIL.Image` of any mode → RGB (H, W, 3) uint8. Raises `ValueError` for floating-point images."""
    if image.mode == "F":
        raise ValueError("expected an image of 8 or 16 bits, found one of floating-point numbers")
    if image.mode.startswith("I"):      # 16 bits: Pillow would clip at 255
        largest = 4095 if _tiff_bits(image) == 12 else 65535
        image = Image.fromarray((np.asarray(image).clip(0, largest).astype(np.int32) * 255 // largest).astype(np.uint8))
    return np.asarray(image.convert("RGB"))


def _tiff_tags(image):
    """The tags of a TIFF that Pillow has opened; empty for other formats."""
    return getattr(image, "tag_v2", {}) if image.format == "TIFF" else {}


def _tiff_bits(image):
    """Bits per value of a TIFF that Pillow has opened; 0 for other formats."""
    return _tiff_tags(image).get(BITS, (0,))[0]


def read_ids(path):
    """Read a label map, upright: ids (H, W) of any integer dtype, or colors (H, W, 3) uint8.

    Ids are the stored values with any number of bits, even in formats that show 0 as white; the indices of an image
    with a palette; and 0 and 1 in an image of one bit. `ClassTable.encode` looks colors up later. Raises `UserError`.
    """
    data = read_file(path)
    image = open_image(path, data)
    if _plain_png(image, data, ((8, 0), (16, 0))):
        ids = _by_opencv(image, data, cv2.IMREAD_UNCHANGED)
        if ids is not None:
            return ids
    samples = _tiff_tags(image).get(tiff.SAMPLES, image.info.get(tiff.BANDS, 1))
    load(path, image)
    if image.format in LOSSY and not (image.format == "WEBP" and image.mode == "RGB" and b"VP8L" in data[:64]):
        raise UserError(f"{path}: expected a label map in a lossless format such as PNG, found {image.format}, which "
                        "changes values; export it again from the tool that drew it, as PNG")
    values = np.asarray(image) if image.mode != "1" else np.asarray(image.convert("L")) // 255
    if values.ndim == 2 and samples == 1:
        return turn_upright(_stored_ids(path, values, image, data), image)
    if image.mode == "LA" or (image.mode == "RGBA" and (values[..., 3] != 255).any()):
        raise UserError(f"{path}: expected a label map of ids or colors, found one with transparency; save it "
                        f"without, in Python by PIL.Image.open(FILE).convert('{image.mode[:-1]}').save(COPY)")
    if image.mode not in ("RGB", "RGBA") or samples > 4:
        bands = f"{samples} bands" if samples > 1 else f"mode {image.mode}"
        raise UserError(f"{path}: expected a label map of ids or colors, found {bands}")
    return turn_upright(np.ascontiguousarray(values[..., :3]), image)


def _stored_ids(path, values, image, data):
    """The values (H, W) of a label map as stored: Pillow scales values of few bits to 0 to 255, and inverts TIFFs in
    which 0 is white. Raises `UserError` for fractions."""
    if image.mode == "F":
        wrong = ~np.isfinite(values) | (values != np.round(values))
        if wrong.any():
            raise UserError(f"{path}: expected whole numbers, found a label map of floating-point numbers such as "
                            f"{values[wrong][0]:g}")
        return values.clip(-2 ** 30, 2 ** 30).astype(np.int32)
    tags, bits = _tiff_tags(image), _tiff_bits(image)
    if image.mode == "1" and image.format == "PPM":         # a PBM file, in which 1 is black
        return 1 - values
    if image.mode in ("1", "L") and tags.get(tiff.PHOTOMETRIC) == tiff.INVERTED:
        values = (1 if image.mode == "1" else 255) - values
    if image.mode == "L" and bits == 8 and tags.get(SAMPLE_FORMAT, (1,))[0] == 2:
        return values.view(np.int8)
    if image.format == "PNG" and data[25] == 0:       # gray
        bits = data[24]
    if image.mode == "L" and bits in (2, 4):
        return values // (255 // ((1 << bits) - 1))
    if image.format == "PPM" and data[:2] in (b"P2", b"P5"):
        header = re.sub(rb"#[^\n]*", b"", data[:4096]).split(maxsplit=4)
        full, stored = 255 if image.mode == "L" else 65535, int(header[3])
        return np.round(values.astype(np.float64) * (stored / full)).astype(np.uint16)
    return values


def read_palette(path):
    """{index: (red, green, blue)} of the palette indices used in an image; empty for images without a palette.

    Colors that occur more than once in the palette are left out. Raises `UserError`.
    """
    image = open_image(path, read_file(path))
    if image.mode != "P":
        return {}
    load(path, image)
    values = image.getpalette("RGB")
    colors = [tuple(values[start:start + 3]) for start in range(0, len(values), 3)]
    count = Counter(colors)
    return {index: colors[index] for _, index in image.getcolors() if index < len(colors) and count[colors[index]] == 1}


def open_image(path, data, warn=_no_warning):
    """A `PIL.Image` of a file's bytes, in most formats not decoded yet.

    Args:
        path: the file, for messages.
        data: its bytes. In a TIFF, the page with the image is taken, not smaller copies or masks.
        warn: called with (kind, sentence) if pages or bands are ignored.

    Raises `UserError`, which describes what is wrong with the file.
    """
    if tiff.is_tiff(data):
        return _open_tiff(path, data, warn)
    try:
        image = _open(io.BytesIO(data))
        frames = getattr(image, "n_frames", 1)
    except UnidentifiedImageError:
        raise UserError(f"{path}: expected an image, found {_describe_unknown(data)}") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise UserError(f"{path}: expected an image, found one that cannot be read: {error}") from None
    _check_pixels(path, *image.size)
    if frames > 1 and image.format != "MPO":        # MPO: a photograph followed by previews or a depth map
        raise UserError(f"{path}: expected one image, found an animation of {frames}; save each as a file of its own")
    return image


def _open(file):
    """`Image.open` without Pillow's limit of 179 million pixels and its warning from half that size on."""
    with _opening:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(file)
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _check_pixels(path, width, height):
    if not 0 < width * height <= MAX_PIXELS:
        raise UserError(f"{path}: expected an image of at most {MAX_PIXELS / 1e6:,.0f} million pixels, found "
                        f"{width}×{height}{'; cut it into parts' * (width * height > 0)}")


def _open_tiff(path, data, warn):
    """The page of a TIFF that is the image: opened by Pillow, or decoded by tifffile if Pillow cannot read it."""
    try:
        pages = tiff.page_sizes(io.BytesIO(data))
    except Exception as error:      # noqa: BLE001, tifffile raises errors of any kind for damaged files
        raise UserError(f"{path}: expected an image, found a TIFF that cannot be read: {first_line(error)}") from None
    number = tiff.choose_page(path, pages, warn)
    _check_pixels(path, *pages[number][0])
    if max(pages[0][2], pages[number][2]) <= tiff.MAX_PILLOW_SAMPLES:
        with contextlib.suppress(OSError, SyntaxError, ValueError, EOFError):
            image = _open(io.BytesIO(data))
            image.seek(number)
            if _tiff_tags(image).get(PLANES) != 2:      # Pillow cannot read more than 8 bits band by band
                return image
    return tiff.read_page(path, data, number, warn)


def _describe_unknown(data):
    """Describe a file that Pillow does not recognize, for messages."""
    if not data:
        return "an empty file"
    brand = data[8:12] if data[4:8] == b"ftyp" else b""
    if brand in (b"avif", b"avis"):
        return "AVIF, which needs Pillow 11.3 or newer"
    if brand in (b"heic", b"heix", b"mif1", b"msf1", b"hevc"):
        return "HEIC, which Pillow cannot read; convert it to JPEG"
    return "a file that is not an image"


def load(path, image):
    """Decode a `PIL.Image`. Raises `UserError`."""
    try:
        image.load()
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise UserError(f"{path}: expected an image, found one that cannot be read: {error}") from None


def orientation(image):
    """The EXIF orientation of a `PIL.Image`, 1 to 8; 1 (upright) if it has no readable orientation."""
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:   # Pillow raises errors of any kind for damaged metadata
        return 1


def turn_upright(array, image):
    """Turn an array (H, W, ...) upright according to the EXIF orientation of its `PIL.Image`."""
    turn = TURNS.get(orientation(image))
    return array if turn is None else np.ascontiguousarray(turn(array))


def upright_size(path):
    """(width, height) of an image file after `read_image` has turned it upright. Raises `UserError`."""
    image = open_image(path, read_file(path))
    if image.format == "TIFF":      # Pillow turns TIFFs itself; versions differ in when, and in the size they report
        load(path, image)
        return _upright_rgb(path, image).shape[1::-1]
    return image.size[::-1] if orientation(image) > 4 else image.size       # 5 to 8 exchange width and height


def read_header(path):
    """((width, height), mode) of an image as stored, from the header of its file.

    mode: Pillow's, or "" if Pillow cannot read the file. Raises `UserError`, and for damaged files errors of any kind.
    """
    with open_file(path) as file:
        is_tiff = tiff.is_tiff(file.read(4))
        file.seek(0)
        if not is_tiff:
            image = _open(file)
            return image.size, image.mode
        pages = tiff.page_sizes(file)
        size, _, samples = pages[tiff.choose_page(path, pages, _no_warning)]
        file.seek(0)
        with contextlib.suppress(UnidentifiedImageError):
            return size, _open(file).mode if samples <= tiff.MAX_PILLOW_SAMPLES else ""
        return size, ""


def size_mismatch(path, image, label_path, ids):
    """The message for an image and a label map, (H, W, ...), of different sizes; names EXIF if it may be the cause."""
    text = (f"{label_path}: expected the size of {path}, {image.shape[1]}×{image.shape[0]}, "
            f"found {ids.shape[1]}×{ids.shape[0]}")
    for file in (path, label_path):
        if orientation(open_image(file, read_file(file))) > 4:      # 5 to 8 exchange width and height
            text += (f"; {file} was turned upright by its EXIF orientation: turn the other one too, or remove the "
                     f"orientation (exiftool -Orientation= {file})")
    return text


def unclear_orientation(path, label_path):
    """A warning if only the image was turned by its EXIF orientation and the sizes do not show whether that is right.

    "" if the label map was turned too, or if a wrong turn would make the sizes differ.
    """
    turn, (width, height) = _orientation_and_size(path)
    if turn == 1 or turn > 4 and width != height or _orientation_and_size(label_path)[0] != 1:
        return ""
    return (f"{path}: turned upright by its EXIF orientation ({turn}), but {label_path} has none: if the label map was "
            f"drawn on the image as stored, turn it too, or remove the orientation (exiftool -Orientation= {path})")


def _orientation_and_size(path):
    """(EXIF orientation, (width, height)) from a file's header; 1, (0, 0) if it cannot be read."""
    with contextlib.suppress(Exception), open_file(path) as file:       # damaged headers raise errors of any kind
        image = _open(file)
        return orientation(image), image.size
    return 1, (0, 0)


def _plain_png(image, data, kinds):
    """Whether OpenCV may decode a file: a complete PNG of one of these kinds (bits, color type) with harmless chunks.

    OpenCV is faster than Pillow but accepts truncated and damaged files, so the checksum of every chunk is compared.
    """
    if image.format != "PNG" or data[12:16] != b"IHDR" or (data[24], data[25]) not in kinds:
        return False
    start, name = 8, None
    while name != b"IEND" and start + 12 <= len(data):
        length, name = int.from_bytes(data[start:start + 4], "big"), data[start + 4:start + 8]
        end = start + 8 + length
        exif = name in (b"tEXt", b"zTXt") and data.startswith(b"Raw profile", start + 8)
        if name not in HARMLESS or exif or zlib.crc32(memoryview(data)[start + 4:end]) != int.from_bytes(
                data[end:end + 4], "big"):
            return False
        start = end + 4
    return name == b"IEND"


def _plain_jpeg(image, data):
    """Whether OpenCV may decode a file: a gray or RGB JPEG with one scan that ends at the end of the file."""
    if image.format != "JPEG" or image.mode not in ("L", "RGB"):
        return False
    start = 2
    while data[start:start + 1] == b"\xff" and data[start + 1:start + 2] != b"\xda":     # segments before the scan
        start += 2 + int.from_bytes(data[start + 2:start + 4], "big")
    marker = JPEG_MARKER.search(data, start + 2)
    return marker is not None and marker.group() == b"\xff\xd9" and marker.end() == len(data)


def _by_opencv(image, data, flags):
    """Decode with OpenCV; None if it fails, in which case the caller tries Pillow, whose errors name the reason."""
    try:
        array = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error:
        return None
    return array if array is not None and array.shape[1::-1] == image.size else None
