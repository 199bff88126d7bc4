"""TIFF files that Pillow cannot read or misreads: several pages, extra bands, 64-bit, signed or floating-point values.
"""

import io

import cv2
import numpy as np
from PIL import Image

from ..common.errors import UserError, first_line, plural

HEADS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")        # the last two are BigTIFF, for files over 4 GB
PHOTOMETRIC, ORIENTATION, SAMPLES, EXTRA_SAMPLES = 262, 274, 277, 338        # tags
INVERTED, CMYK = 0, 5                   # photometric interpretations: 0 is white; four inks
COLORED = (5, 6, 8, 9, 10)              # photometric interpretations that only Pillow converts to RGB
REDUCED, MASK = 1, 4                    # bits of the tag NewSubfileType
MAX_PILLOW_SAMPLES = 6                  # Pillow reads no more, and prints a message for every file with more
ALPHA = (1, 2)                          # kinds of extra samples
BANDS = "bands"                         # key in `Image.info`: number of bands in the file
LARGEST = "largest value"               # key in `Image.info`: largest value before 16 bits were reduced to 8


def is_tiff(data):
    """Whether a file's bytes begin like a TIFF."""
    return data.startswith(HEADS)


def page_sizes(file):
    """[((width, height), kind, bands)] of the pages of a TIFF, from their headers; kind: the tag NewSubfileType."""
    import tifffile  # here, since most files do not need it

    file.seek(0)
    with tifffile.TiffFile(file) as tiff:
        return [((page.imagewidth, page.imagelength), int(page.subfiletype), page.samplesperpixel)
                for page in tiff.pages]


def choose_page(path, pages, warn):
    """The index of the page that is the image: the largest one that is neither a mask nor a smaller copy.

    Args:
        path: the file, for messages.
        pages: from `page_sizes`.
        warn: called with (kind, sentence) if pages are ignored that are not marked as masks or smaller copies.

    Raises `UserError` if several pages have the largest size.
    """
    full = [number for number, (_, kind, _) in enumerate(pages) if not kind & (REDUCED | MASK)] or [0]
    largest = max((pages[number][0] for number in full), key=lambda size: size[0] * size[1])
    images = [number for number in full if pages[number][0] == largest]
    if len(images) > 1:
        raise UserError(f"{path}: expected one image, found a TIFF of {len(pages)} pages, {len(images)} of them of "
                        f"{largest[0]}×{largest[1]}; save each page as a file of its own")
    if len(full) > 1:
        warn("pages", f"{path}: page {images[0] + 1} of {len(pages)} is used, the largest; "
                      f"{plural(len(full) - 1, 'smaller page')} left out")
    return images[0]


def warn_of_ignored_bands(path, samples, photometric, extra, warn):
    """Warn if bands other than transparency are ignored: a file's image has three bands, four for CMYK, or one if the
    file has fewer than three.

    Args:
        path: the file, for messages.
        samples, photometric, extra: the tags SamplesPerPixel, PhotometricInterpretation and ExtraSamples, or None.
        warn: called with (kind, sentence).
    """
    used = 4 if photometric == CMYK else 3 if samples > 2 else 1
    extra = extra if isinstance(extra, tuple) else (extra,)
    ignored = samples - used - any(kind in ALPHA for kind in extra)
    if ignored > 0:
        description = "the first is used as gray" if used == 1 else f"the first {used} are used as the picture's colors"
        warn("bands", f"{path}: of its {samples} bands {description}, and {plural(ignored, 'band')} left out")


def read_page(path, data, number, warn):
    """A page of a TIFF as a `PIL.Image`.

    Integers become mode I (L if they have 8 bits), floating-point numbers mode F, three or more bands of 8 or 16 bits
    RGB.

    Args:
        path: the file, for messages.
        data: its bytes.
        number: index of the page.
        warn: called with (kind, sentence) if bands are ignored.

    Raises `UserError` for pages of any other kind, which it describes, and for damaged pages.
    """
    import tifffile  # here, since most files do not need it

    try:
        with tifffile.TiffFile(io.BytesIO(data)) as tiff:
            page = tiff.pages[number]
            samples, dtype, photometric = page.samplesperpixel, page.dtype, int(page.photometric)
            kind = "" if dtype is None else dtype.kind + str(dtype.itemsize)
            readable = page.imagedepth == 1 and photometric not in COLORED and (
                kind in ("u1", "u2", "i2") if samples > 2 else kind[:1] in tuple("iuf"))
            values = _decode(page, data if number == 0 and samples == 1 else None) if readable else None
            extra, orientation = page.tags.valueof(EXTRA_SAMPLES), page.tags.valueof(ORIENTATION, 1)
            if values is not None and samples > 1 and page.planarconfig == 2:       # band by band
                values = values.transpose(1, 2, 0)      # (H, W, bands)
    except Exception as error:      # noqa: BLE001, tifffile raises errors of any kind for damaged files
        raise UserError(f"{path}: expected an image, found a TIFF that cannot be read: {first_line(error)}") from None
    if values is None:
        raise UserError(f"{path}: expected an image of 8 or 16 bits, found a TIFF of {plural(samples, 'band')} of "
                        f"{dtype or 'an unknown kind'}")
    warn_of_ignored_bands(path, samples, photometric=photometric, extra=extra, warn=warn)
    values = values if samples == 1 else values[..., :3] if samples > 2 else values[..., 0]
    image = Image.fromarray(_pillow_values(values))
    image.format, image.info[BANDS] = "TIFF", samples
    if samples > 2 and dtype.itemsize == 2:
        image.info[LARGEST] = int(values.max())
    if orientation in range(2, 9):
        image.getexif()[ORIENTATION] = orientation
    return image


def _decode(page, data):
    """The values of a page, (H, W), (H, W, bands) or (bands, H, W).

    OpenCV decodes some compressions for which tifffile needs another package.

    Args:
        page: of tifffile.
        data: bytes of the file if the page is the first and has a single band, else None.
    """
    try:
        return page.asarray()
    except ValueError as error:
        values = None if data is None else cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        if values is None or values.dtype != page.dtype or values.shape != page.shape:
            raise error
        return values


def _pillow_values(values):
    """Convert values to a dtype that Pillow supports: uint8, int32 or float32."""
    if values.ndim == 3 and values.dtype.itemsize == 2:
        return (values.clip(0, 65535) // 257).astype(np.uint8)
    if values.dtype == np.uint8:
        return np.ascontiguousarray(values)
    if values.dtype.kind == "f":
        return values.astype(np.float32)
    limits = np.iinfo(np.int32)
    return values.clip(max(limits.min, np.iinfo(values.dtype).min), min(limits.max, np.iinfo(values.dtype).max)).astype(
        np.int32)
