"""Decoding, against Pillow alone: equal pixels, nothing damaged taken for whole, upright by EXIF; and the cache."""

import io
import os
import warnings
from contextlib import suppress

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from dataset.check import inspect_pair
from dataset.labels import ClassTable
from dataset.reading import DecodedCache
from utils.common import files
from utils.common.errors import UserError
from utils.imaging import decode
from utils.imaging.decode import read_ids, read_image, upright_size

RNG = np.random.default_rng(0)
NOISE = RNG.integers(256, size=(11, 17, 3)).astype(np.uint8)
SMOOTH = cv2.GaussianBlur(RNG.integers(256, size=(61, 83, 3)).astype(np.uint8), (0, 0), 2)
TABLE = ClassTable([{"name": "a", "id": 0, "train_id": 0, "red": 0, "green": 0, "blue": 0, "category": ""}])
LABEL = RNG.integers(9, size=(11, 17)).astype(np.uint8)


def encoded(array, kind, mode=None, **options):
    file = io.BytesIO()
    image = Image.fromarray(array)
    (image if mode is None else image.convert(mode)).save(file, kind, **options)
    return file.getvalue()


def by_pillow(data, mode="RGB"):
    return np.asarray(Image.open(io.BytesIO(data)).convert(mode))


PLAIN = {"PNG": (encoded(SMOOTH, "PNG"), 0), "gray PNG": (encoded(SMOOTH, "PNG", "L"), 0),
         "PNG with density": (encoded(SMOOTH, "PNG", dpi=(72, 72)), 0),
         "gray JPEG": (encoded(SMOOTH, "JPEG", "L"), 1),
         **{f"JPEG {quality} {sampling}": (encoded(SMOOTH, "JPEG", quality=quality, subsampling=sampling), 1)
            for quality in (20, 75, 98) for sampling in (0, 1, 2)}}
SPECIAL = {"palette": encoded(SMOOTH, "PNG", "P"), "transparent": encoded(SMOOTH, "PNG", "RGBA"),
           "one color transparent": encoded(SMOOTH, "PNG", transparency=(3, 4, 5)),
           "progressive": encoded(SMOOTH, "JPEG", progressive=True), "CMYK": encoded(SMOOTH, "JPEG", "CMYK"),
           "two values": encoded(SMOOTH, "PNG", "1"), "TIFF": encoded(SMOOTH, "TIFF"), "BMP": encoded(SMOOTH, "BMP")}


@pytest.mark.parametrize("name", PLAIN)
def test_plain_files_go_through_opencv_with_pillows_pixels(tmp_path, monkeypatch, name):
    data, most = PLAIN[name]
    (tmp_path / "a").write_bytes(data)
    monkeypatch.setattr(decode, "load", lambda *file: pytest.fail("decoded by Pillow"))
    actual = read_image(tmp_path / "a")
    assert actual.dtype == np.uint8 and np.abs(actual.astype(int) - by_pillow(data)).max() <= most


@pytest.mark.parametrize("name", SPECIAL)
def test_what_is_not_plain_goes_through_pillow(tmp_path, monkeypatch, name):
    (tmp_path / "a").write_bytes(SPECIAL[name])
    monkeypatch.setattr(cv2, "imdecode", lambda *data: pytest.fail("decoded by OpenCV"))
    assert np.array_equal(read_image(tmp_path / "a"), by_pillow(SPECIAL[name]))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_plain_label_maps_go_through_opencv(tmp_path, monkeypatch, dtype):
    ids = LABEL.astype(dtype) * (1 if dtype == np.uint8 else 300)
    (tmp_path / "a.png").write_bytes(encoded(ids, "PNG"))
    monkeypatch.setattr(decode, "load", lambda *file: pytest.fail("decoded by Pillow"))
    actual = read_ids(tmp_path / "a.png")
    assert actual.dtype == dtype and np.array_equal(actual, ids)


@pytest.mark.parametrize("read, data", [
    (read_image, encoded(NOISE, "PNG")), (read_ids, encoded(LABEL, "PNG")),
    (read_image, encoded(SMOOTH[:40, :40], "JPEG")),
    (read_image, encoded(SMOOTH[:40, :40], "JPEG", quality=95, subsampling=0))])
def test_what_pillow_refuses_is_refused_at_every_cut_and_every_spoilt_byte(monkeypatch, read, data):
    """OpenCV alone takes JPEGs cut anywhere, and damaged ones that Pillow does not, for whole."""
    spoilt = [data[:place] for place in range(len(data))]
    spoilt += [data[:place] + bytes([data[place] ^ flip]) + data[place + 1:]
               for place in range(len(data)) for flip in (0x01, 0xFF)]
    spoilt += [data[:place] + b"\0" * (len(data) - place) for place in range(9, len(data), 7)]
    refused = 0
    for one in spoilt:
        monkeypatch.setattr(decode, "read_file", lambda path, one=one: one)
        try:
            image = Image.open(io.BytesIO(one))
            image.load()
        except (OSError, SyntaxError, ValueError):
            refused += 1
            with pytest.raises(UserError, match="a.png: expected an image, found"):
                read("a.png")
            continue
        if image.mode in ("L", "RGB") and image.format == "PNG":    # what a damaged JPEG shows is up to the library
            expected = np.asarray(image if read is read_ids else image.convert("RGB"))
            assert np.abs(read("a.png").astype(int) - expected).max() <= 1
        else:
            with suppress(UserError):
                read("a.png")
    assert refused > len(data)


def test_a_photograph_with_a_preview_behind_it_is_the_photograph(tmp_path):
    Image.fromarray(NOISE).save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[Image.fromarray(NOISE[:5])],
                                quality=95)
    assert Image.open(tmp_path / "a.jpg").n_frames == 2
    expected = np.asarray(Image.open(tmp_path / "a.jpg"))
    assert np.abs(read_image(tmp_path / "a.jpg").astype(int) - expected).max() <= 1
    with pytest.raises(UserError, match="changes values"):
        read_ids(tmp_path / "a.jpg")


@pytest.mark.parametrize("turn", range(1, 9))
def test_everything_is_upright_by_its_orientation(tmp_path, turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    for kind, options in (("JPEG", {"quality": 95}), ("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True})):
        path = tmp_path / f"a.{kind.lower()}"
        Image.fromarray(NOISE).save(path, kind, exif=exif, **options)
        upright = np.asarray(ImageOps.exif_transpose(Image.open(path)))
        assert kind == "TIFF" or upright.shape == ((17, 11, 3) if turn > 4 else (11, 17, 3))
        assert np.abs(read_image(path).astype(int) - upright).max() <= (kind == "JPEG")
        assert upright_size(path) == upright.shape[1::-1]
    jpeg = cv2.cvtColor(cv2.imread(str(tmp_path / "a.jpeg")), cv2.COLOR_BGR2RGB)
    assert np.array_equal(read_image(tmp_path / "a.jpeg"), jpeg)
    for ids in (LABEL, LABEL.astype(np.uint16) * 300):
        Image.fromarray(ids).save(tmp_path / "ids.png", exif=exif)
        expected = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "ids.png")))
        assert np.array_equal(read_ids(tmp_path / "ids.png"), expected)


@pytest.mark.parametrize("turn, shape, named", [(1, (17, 17), False), (3, (11, 17), True), (6, (17, 17), True),
                                                (6, (11, 17), False)])
def test_a_label_map_that_may_lack_the_turn_is_said(tmp_path, turn, shape, named):
    """Of equal sizes nobody can know; of unequal ones the sizes tell."""
    exif = Image.Exif()
    exif[0x0112] = turn
    Image.fromarray(np.zeros((*shape, 3), np.uint8)).save(tmp_path / "a.jpg", exif=exif)
    upright = shape[::-1] if turn > 4 else shape
    for orientation, expected in ((None, named), (turn, False)):
        exif = Image.Exif()
        exif[0x0112] = orientation or 1
        stored = shape if orientation else upright
        Image.fromarray(np.zeros(stored, np.uint8)).save(tmp_path / "a.png", **{"exif": exif} if orientation else {})
        facts = inspect_pair((tmp_path / "a.jpg", tmp_path / "a.png", TABLE))
        assert not facts["problems"]
        assert [kind for kind, _ in facts["remarks"]] == ["turned by EXIF"] * expected


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_a_file_is_read_once_for_its_size(tmp_path, monkeypatch, kind):
    Image.fromarray(NOISE).save(tmp_path / "a", kind)
    read = []
    for module in (decode, files):
        monkeypatch.setattr(module, "open_file", lambda *args: read.append(args) or open(tmp_path / "a", "rb"))
    assert upright_size(tmp_path / "a") == (17, 11) and len(read) == 1


def test_senseless_metadata_is_no_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 1
    data = encoded(NOISE, "JPEG", exif=exif)
    start = data.index(b"Exif\0\0")
    for place in range(start, start + 32):
        (tmp_path / "a.jpg").write_bytes(data[:place] + b"\xff" + data[place + 1:])
        assert read_image(tmp_path / "a.jpg").shape == (11, 17, 3)


def other_content(place, what):
    """Put something else in the place of an array."""
    whole = place.read_bytes()
    place.unlink()
    if what == "folder":
        place.mkdir()
    elif what == "pipe":
        os.mkfifo(place)
    elif what == "link to a device":
        place.symlink_to("/dev/zero")
    elif what == "pickle":
        with open(place, "wb") as file:
            np.save(file, np.array([[{}]]), allow_pickle=True)
    elif what == "archive":
        with open(place, "wb") as file:
            np.savez(file, a=np.zeros(3))
    elif what in ("cut", "cut header", "empty", "one byte less", "text"):
        place.write_bytes({"cut": whole[:len(whole) // 2], "cut header": whole[:60], "empty": b"", "text": b"x" * 999,
                           "one byte less": whole[:-1]}[what])
    else:
        shape, dtype = {"other shape": ((5, 4, 3), np.uint8), "other dtype": ((11, 17, 3), np.float32),
                        "two dimensions": ((11, 17), np.uint8), "no dimensions": ((), np.uint8),
                        "four channels": ((11, 17, 4), np.uint8)}[what]
        with open(place, "wb") as file:     # by its name, NumPy would add an ending
            np.save(file, np.zeros(shape, dtype))


OTHER = ("folder", "pipe", "link to a device", "pickle", "archive", "cut", "cut header", "empty", "one byte less",
         "text", "other shape", "other dtype", "two dimensions", "no dimensions", "four channels")


@pytest.mark.parametrize("what", OTHER)
def test_what_is_no_array_of_the_cache_is_said_once_and_replaced(tmp_path, what):
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for path in paths:
        Image.fromarray(NOISE).save(path)
        DecodedCache(tmp_path / "c").read(path, read_image)
        other_content(DecodedCache(tmp_path / "c").array_path(path, read_image), what)
    cache = DecodedCache(tmp_path / "c")
    with warnings.catch_warnings(record=True) as output:
        warnings.simplefilter("always")
        assert len(cache.missing([(path, read_image) for path in paths])[0]) == 2
        assert all(np.array_equal(cache.read(path, read_image), NOISE) for path in paths)
    assert len(output) == 1 and "a.png, which is decoded again" in str(output[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for path in paths:
            assert isinstance(DecodedCache(tmp_path / "c").read(path, read_image), np.memmap)


def test_every_byte_of_a_cached_header_may_be_wrong(tmp_path):
    path, cache = tmp_path / "a.png", DecodedCache(tmp_path / "c")
    Image.fromarray(NOISE).save(path)
    cache.read(path, read_image)
    place, cache.warned = cache.array_path(path, read_image), True
    whole = place.read_bytes()
    for byte in range(128):
        place.write_bytes(whole[:byte] + bytes([whole[byte] ^ (1, 0x10, 0xFF)[byte % 3]]) + whole[byte + 1:])
        assert cache.read(path, read_image).shape == NOISE.shape


def test_one_file_may_be_image_and_label_map(tmp_path):
    Image.fromarray(LABEL).save(tmp_path / "a.png")
    cache = DecodedCache(tmp_path / "c")
    for _ in range(2):
        assert cache.read(tmp_path / "a.png", read_image).shape == (11, 17, 3)
        assert cache.read(tmp_path / "a.png", read_ids).shape == (11, 17)
    assert cache.missing([(tmp_path / "a.png", read_ids)]) == ([], 0)


@pytest.mark.parametrize("read", [read_image, read_ids])
def test_only_regular_files_are_read(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")
    sparse = tmp_path / "sparse"
    with open(sparse, "wb") as file:
        file.truncate(files.MAX_FILE_BYTES * 4)
    for path, actual in ((tmp_path / "pipe", "a pipe"), ("/dev/zero", "a device"), (tmp_path, "a folder"),
                        (sparse, "4.3 GB"), (tmp_path / ("x" * 300), "one that cannot be read"),
                        (tmp_path / "gone", "no such file"), (tmp_path / "nul\0", "one that cannot be read")):
        with pytest.raises(UserError, match=f"expected an image.*, found {actual}"):
            read(path)
