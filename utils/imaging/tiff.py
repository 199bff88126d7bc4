"""TIFF files that Pillow alone cannot read, or would not read as they are meant: several pages, more bands than a
picture has, 64 bits, signed and floating-point numbers."""

import io

import cv2
import numpy as np
from PIL import Image

from ..common.errors import UserError, first_line, plural

HEADS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")        # the last two: BigTIFF, for files beyond 4 GB
PHOTOMETRIC, ORIENTATION, SAMPLES, EXTRA_SAMPLES = 262, 274, 277, 338        # tags
INVERTED, CMYK = 0, 5                   # photometric interpretations: 0 is white; four inks
COLORED = (5, 6, 8, 9, 10)              # those that only Pillow turns into red, green and blue
REDUCED, MASK = 1, 4                    # bits of the tag NewSubfileType
MOST_SAMPLES = 6                        # that Pillow reads; of more it complains by itself, every time
ALPHA = (1, 2)                          # kinds of extra samples
BANDS = "bands"                         # in the `info` of an image: how many its file has
LARGEST = "largest value"               # in the `info` of an image of 16 bits that was made one of 8


def is_tiff(data):
    """Whether a file's bytes begin as those of a TIFF do."""
    return data.startswith(HEADS)


def page_sizes(file):
    """[((width, height), kind, bands)] of the pages of a TIFF, from their headers; kind: the tag NewSubfileType."""
    import tifffile  # here: most files do without it

    file.seek(0)
    with tifffile.TiffFile(file) as tiff:
        return [((page.imagewidth, page.imagelength), int(page.subfiletype), page.samplesperpixel)
                for page in tiff.pages]


def choose_page(path, pages, remark):
    """The number of the page that is the image: the only one that is neither a mask nor a smaller copy of it.

    Args:
        path: of the file, for messages.
        pages: of `page_sizes`.
        remark: called with (kind, sentence) where pages that are not marked as smaller copies are left out.

    Raises `UserError` where several pages are of the largest size.
    """
    full = [number for number, (_, kind, _) in enumerate(pages) if not kind & (REDUCED | MASK)] or [0]
    largest = max((pages[number][0] for number in full), key=lambda size: size[0] * size[1])
    images = [number for number in full if pages[number][0] == largest]
    if len(images) > 1:
        raise UserError(f"{path}: expected one image, found a TIFF of {len(pages)} pages, {len(images)} of them of "
                        f"{largest[0]}×{largest[1]}; save each page as a file of its own")
    if len(full) > 1:
        remark("pages", f"{path}: page {images[0] + 1} of {len(pages)} is taken, the largest; "
                        f"{plural(len(full) - 1, 'smaller page')} left out")
    return images[0]


def remark_bands(path, samples, photometric, extra, remark):
    """Say that bands are left out, if any are: all beyond three (of CMYK four, below three one), but transparency.

    Args:
        path: of the file.
        samples, photometric, extra: the tags SamplesPerPixel, PhotometricInterpretation and ExtraSamples, or None.
        remark: called with (kind, sentence).
    """
    taken = 4 if photometric == CMYK else 3 if samples > 2 else 1
    extra = extra if isinstance(extra, tuple) else (extra,)
    left_out = samples - taken - any(kind in ALPHA for kind in extra)
    if left_out > 0:
        what = "the first is taken as gray" if taken == 1 else f"the first {taken} are taken as the picture's colors"
        remark("bands", f"{path}: of its {samples} bands {what}, and {plural(left_out, 'band')} left out")


def read_page(path, data, number, remark):
    """A page of a TIFF as a `PIL.Image`: whole numbers as mode I (L of 8 bits), floating-point numbers as mode F, and
    three or more bands of 8 or 16 bits as RGB.

    Args:
        path: of the file, for messages.
        data: its bytes.
        number: of the page.
        remark: called with (kind, sentence) where bands are left out.

    Raises `UserError` for pages of another kind, which it describes, and for damaged ones.
    """
    import tifffile  # here: most files do without it

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
    except Exception as error:      # noqa: BLE001, for a damaged file tifffile raises errors of any kind
        raise UserError(f"{path}: expected an image, found a TIFF that cannot be read: {first_line(error)}") from None
    if values is None:
        raise UserError(f"{path}: expected an image of 8 or 16 bits, found a TIFF of {plural(samples, 'band')} of "
                        f"{dtype or 'an unknown kind'}")
    remark_bands(path, samples, photometric, extra, remark)
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

    Of compression that tifffile leaves to another package, OpenCV knows some; data: of a file whose first page has a
    single band, or None.
    """
    try:
        return page.asarray()
    except ValueError as error:
        values = None if data is None else cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        if values is None or values.dtype != page.dtype or values.shape != page.shape:
            raise error
        return values


def _pillow_values(values):
    """Values of any kind as Pillow has one for: uint8, int32 or float32."""
    if values.ndim == 3 and values.dtype.itemsize == 2:
        return (values.clip(0, 65535) // 257).astype(np.uint8)
    if values.dtype == np.uint8:
        return np.ascontiguousarray(values)
    if values.dtype.kind == "f":
        return values.astype(np.float32)
    limits = np.iinfo(np.int32)
    return values.clip(max(limits.min, np.iinfo(values.dtype).min), min(limits.max, np.iinfo(values.dtype).max)).astype(
        np.int32)
