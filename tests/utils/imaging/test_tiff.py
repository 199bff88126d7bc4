"""What files hold: pages, bands and numbers that few files have. Expected values are those that tifffile, Pillow and
NumPy wrote."""

import re
import struct
import warnings
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image

from dataset.check import check, format_report, inspect_pair
from dataset.cityscapes import CityscapesDataset
from dataset.labels import ClassTable
from dataset.reading import DecodedCache
from utils.common.errors import UserError
from utils.imaging import decode
from utils.imaging.classes import IGNORE_INDEX
from utils.imaging.decode import read_ids, read_image, upright_size

RNG = np.random.default_rng(0)
RGB = RNG.integers(256, size=(24, 36, 3)).astype(np.uint8)
LABEL = RNG.integers(4, size=(24, 36)).astype(np.uint8)
ROWS = [{"name": name, "id": number, "train_id": train_id, "red": number & 255, "green": 0, "blue": 0, "category": ""}
        for name, number, train_id in (("void", -1, 255), ("a", 0, 0), ("b", 1, 1), ("c", 2, 2), ("d", 3, 3))]


@pytest.fixture(autouse=True)
def nothing_said_yet(monkeypatch):
    monkeypatch.setattr(decode, "_warned_kinds", set())


def write_pages(path, *pages):
    with tifffile.TiffWriter(path) as file:
        for values, kind in pages:
            what = "mask" if kind == 4 else "rgb" if values.ndim == 3 else "minisblack"
            file.write(values, photometric=what, subfiletype=kind)


def remarks_of(path):
    remarks = []
    image = read_image(path, lambda *remark: remarks.append(remark))
    return image, remarks


@pytest.mark.parametrize("pages", [
    [(RGB, 0), (RGB[::2, ::2], 1), (RGB[::4, ::4], 1)],         # as gdaladdo writes overviews
    [(RGB, 0), (np.full(RGB.shape[:2], True), 4)],     # and GDAL a mask
    [(RGB[::4, ::4], 1), (RGB, 0)],                             # a preview first
])
def test_overviews_and_masks_are_no_images(tmp_path, pages):
    path = tmp_path / "a.tif"
    write_pages(path, *pages)
    image, remarks = remarks_of(path)
    assert np.array_equal(image, RGB) and remarks == [] and upright_size(path) == (36, 24)
    cache = DecodedCache(tmp_path / "cache")
    for _ in range(2):
        assert np.array_equal(cache.read(path, read_image), RGB)
    assert isinstance(DecodedCache(tmp_path / "cache").read(path, read_image), np.memmap)


def test_labels_have_overviews_too(tmp_path):
    for number, dtype in enumerate((np.uint8, np.int64)):
        path = tmp_path / f"{number}.tif"
        write_pages(path, (LABEL.astype(dtype), 0), (LABEL[::2, ::2].astype(dtype), 1))
        assert np.array_equal(read_ids(path), LABEL)


def test_pages_of_one_size_are_refused_and_smaller_ones_said(tmp_path):
    write_pages(tmp_path / "a.tif", (RGB, 0), (RGB, 0), (RGB[::2, ::2], 1))
    with pytest.raises(UserError, match="a.tif: expected one image, found a TIFF of 3 pages, 2 of them of 36×24; save"):
        read_image(tmp_path / "a.tif")
    write_pages(tmp_path / "b.tif", (RGB[:5, :5], 0), (RGB, 0))
    image, remarks = remarks_of(tmp_path / "b.tif")
    assert np.array_equal(image, RGB)
    assert remarks == [("pages", f"{tmp_path / 'b.tif'}: page 2 of 2 is used, the largest; 1 smaller page left out")]


def bands(number, dtype=np.uint8, planar="contig", photometric="rgb", extra="unspecified"):
    values = RNG.integers(256, size=(24, 36, number)).astype(dtype)
    values *= 257 if np.dtype(dtype).itemsize == 2 else 1
    beyond = number - (3 if photometric == "rgb" else 1)
    options = {"photometric": photometric, "planarconfig": planar, "extrasamples": [extra] * beyond}
    return values, options


@pytest.mark.parametrize("left_out, case", [
    (0, bands(3)), (0, bands(3, planar="separate")), (0, bands(3, np.uint16)), (1, bands(4)), (2, bands(5)),
    (5, bands(8)), (5, bands(8, planar="separate")), (1, bands(4, planar="separate")),
    (1, bands(4, np.uint16, planar="separate")),
    (2, bands(5, np.uint16)), (0, bands(4, extra="unassalpha")), (1, bands(4, photometric="minisblack")),
    (0, bands(3, np.int16))], ids=lambda case: None)
def test_bands_beyond_three_are_left_out_and_said(tmp_path, left_out, case):
    values, options = case
    stored = values.transpose(2, 0, 1) if options["planarconfig"] == "separate" else values
    tifffile.imwrite(tmp_path / "a.tif", np.ascontiguousarray(stored), **options)
    image, remarks = remarks_of(tmp_path / "a.tif")
    expected = values[..., :3].clip(0) // (257 if values.itemsize == 2 else 1)
    assert np.array_equal(image, expected)
    assert [kind for kind, _ in remarks] == ["bands"] * bool(left_out)
    if left_out:
        assert f"{values.shape[2]} bands" in remarks[0][1] and f" {left_out} band" in remarks[0][1]


def test_it_is_said_once_and_each_time_in_a_check(tmp_path):
    values, options = bands(4)
    for name in "ab":
        tifffile.imwrite(tmp_path / f"{name}.tif", values, **options)
        Image.fromarray(LABEL).save(tmp_path / f"{name}.png")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for name in "aab":
            read_image(tmp_path / f"{name}.tif")
    assert len(caught) == 1 and str(tmp_path / "a.tif") in str(caught[0].message)
    facts = [inspect_pair((tmp_path / f"{name}.tif", tmp_path / f"{name}.png", ClassTable(ROWS))) for name in "ab"]
    assert [len(one["remarks"]) for one in facts] == [1, 1] and not facts[0]["problems"]
    remarks = [{"kind": kind, "text": text} for one in facts for kind, text in one["remarks"]]
    report = {"pairs": 2, "looked_into": 2, "official": None, "sizes": {}, "mean": [], "std": [], "pixels": {},
              "images_with": {}, "ignored_pixels": 0, "problems": [], "remarks": remarks}
    text = format_report({"x": report})
    assert "NOTE, bands: 2" in text and "a.tif: of its 4 bands" in text


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, np.uint32])
def test_images_of_other_numbers_are_refused_by_what_they_are(tmp_path, dtype):
    tifffile.imwrite(tmp_path / "a.tif", RGB.astype(dtype), photometric="rgb")
    with pytest.raises(UserError, match="expected an image of 8 or 16 bits, found a TIFF of 3 bands of "
                                        f"{np.dtype(dtype)}"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("largest, remedy", [(4095, "if no image has larger values, multiply the values of all images "
                                                    "by 16"), (3000, "by 16"), (4096, "by 8"), (16383, "by 4"),
                                             (256, "by 128"), (255, "save it as 8 bits"), (16384, None),
                                             (65535, None), (0, None)])
def test_16_bits_that_hold_fewer_are_said(tmp_path, largest, remedy):
    ramp = np.linspace(0, largest, 24 * 36).reshape(24, 36).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "gray.png")
    tifffile.imwrite(tmp_path / "gray.tif", ramp)
    tifffile.imwrite(tmp_path / "rgb.tif", ramp[..., None].repeat(3, 2), photometric="rgb")
    tifffile.imwrite(tmp_path / "five.tif", ramp[..., None].repeat(5, 2), photometric="rgb")
    write_png(tmp_path / "rgb.png", ramp[..., None].repeat(3, 2), 16, 2)
    for name in ("gray.png", "gray.tif", "rgb.tif", "five.tif", "rgb.png"):
        _, remarks = remarks_of(tmp_path / name)
        output = [text for kind, text in remarks if kind == "dark"]
        assert len(output) == (remedy is not None), name
        assert remedy is None or str(largest) in output[0] and remedy in output[0] and name in output[0]


def test_12_bits_are_scaled_as_they_say(tmp_path):
    """A TIFF of 12 bits, two values in three bytes, by hand: Pillow cannot write it."""
    values = np.array([[0, 1000, 2048, 4095]])
    packed = b"".join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in values.reshape(-1, 2).tolist())
    tags = [(256, 3, 4), (257, 3, 1), (258, 3, 12), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1), (278, 3, 1),
            (279, 4, len(packed))]
    ifd = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in
                                                  tags) + struct.pack("<I", 0)
    (tmp_path / "a.tif").write_bytes(b"II*\0" + struct.pack("<I", 8 + len(packed)) + packed + ifd)
    image, remarks = remarks_of(tmp_path / "a.tif")
    assert image[0, :, 0].tolist() == [0, 1000 * 255 // 4095, 2048 * 255 // 4095, 255] and not remarks


def write_png(path, values, bits, color):
    """A PNG of any number of bits; color: 0 gray, 2 RGB."""
    height = values.shape[0]
    if bits == 16:
        rows = values.astype(">u2").reshape(height, -1).view(np.uint8)
    else:
        unpacked = np.unpackbits(values.astype(np.uint8)[..., None], axis=2)[..., -bits:]      # (H, W, bits)
        rows = np.packbits(unpacked.reshape(height, -1), axis=1)
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", values.shape[1], height, bits, color, 0, 0, 0)),
              (b"IDAT", zlib.compress(raw)), (b"IEND", b""))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in
        chunks))


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_ids_are_what_is_stored_in_any_number_of_bits(tmp_path, bits):
    ids = RNG.integers(1 << min(bits, 8), size=(24, 35))
    write_png(tmp_path / "a.png", ids, bits, 0)
    assert np.array_equal(read_ids(tmp_path / "a.png"), ids)


@pytest.mark.parametrize("dtype", "uint8 int8 uint16 int16 uint32 int32 uint64 int64 float16 float32 float64".split())
@pytest.mark.parametrize("options", [{}, {"photometric": "miniswhite"}, {"compression": "zlib"}], ids=str)
def test_whole_numbers_of_any_kind_are_ids(tmp_path, dtype, options):
    ids = LABEL.astype(dtype)
    if np.dtype(dtype).kind != "u":
        ids[:3] = -1
    tifffile.imwrite(tmp_path / "a.tif", ids, **options)
    actual = read_ids(tmp_path / "a.tif")
    assert actual.dtype.kind in "iu" and np.array_equal(actual, ids)
    expected = np.where(ids.astype(int) < 0, IGNORE_INDEX, LABEL)
    assert np.array_equal(ClassTable(ROWS).encode(actual), expected)


@pytest.mark.parametrize("photometric", ["miniswhite", "minisblack"])
def test_single_bits_are_ids_as_they_are_stored(tmp_path, photometric):
    ids = LABEL % 2
    tifffile.imwrite(tmp_path / "a.tif", ids.astype(bool), photometric=photometric)
    (tmp_path / "a.pbm").write_text("P1\n36 24\n" + "\n".join(" ".join(map(str, row)) for row in ids))
    (tmp_path / "raw.pbm").write_bytes(b"P4\n36 24\n" + np.packbits(ids, axis=1).tobytes())
    for name in ("a.tif", "a.pbm", "raw.pbm"):
        assert np.array_equal(read_ids(tmp_path / name), ids), name


@pytest.mark.parametrize("number, dtype, planar", [(2, np.int16, "contig"), (2, np.float32, "contig"),
                                                   (7, np.uint8, "contig"), (5, np.uint8, "separate")])
def test_ids_are_not_taken_from_one_band_of_several(tmp_path, number, dtype, planar):
    values = LABEL[..., None].repeat(number, 2).astype(dtype)
    tifffile.imwrite(tmp_path / "a.tif", np.ascontiguousarray(values.transpose(2, 0, 1)) if planar == "separate" else
                     values, photometric="minisblack", planarconfig=planar)
    with pytest.raises(UserError, match=f"expected a label map of ids or colors, found {number} bands"):
        read_ids(tmp_path / "a.tif")


def test_fractions_and_bands_are_no_ids(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", LABEL + np.float64(0.5))
    with pytest.raises(UserError, match="a.tif: expected whole numbers, found a label map of floating-point numbers"):
        read_ids(tmp_path / "a.tif")
    tifffile.imwrite(tmp_path / "b.tif", np.where(LABEL == 0, np.nan, 1).astype(np.float32))
    with pytest.raises(UserError, match="such as nan"):
        read_ids(tmp_path / "b.tif")
    tifffile.imwrite(tmp_path / "c.tif", RNG.integers(9, size=(24, 36, 5)).astype(np.uint8), photometric="rgb",
                     extrasamples=["unspecified"] * 2)
    with pytest.raises(UserError, match="expected a label map of ids or colors, found 5 bands"):
        read_ids(tmp_path / "c.tif")


def test_ids_in_pgm_are_not_spread_over_a_byte(tmp_path):
    for name, head, dtype in (("a", b"P5 36 # width\n24\n18\n", np.uint8), ("b", b"P5 36 24 1000 ", ">u2")):
        (tmp_path / f"{name}.pgm").write_bytes(head + LABEL.astype(dtype).tobytes())
        assert np.array_equal(read_ids(tmp_path / f"{name}.pgm"), LABEL)
    (tmp_path / "c.pgm").write_bytes(b"P2\n36 24\n3\n" + " ".join(map(str, LABEL.ravel())).encode() + b"\n")
    assert np.array_equal(read_ids(tmp_path / "c.pgm"), LABEL)


def test_negative_ids_that_no_row_has_are_unknown():
    with pytest.raises(UserError, match="found -7"):
        ClassTable(ROWS).encode(np.array([[0, -7, -1]], np.int16))
    table = ClassTable([{**ROWS[1], "id": -2}, *ROWS[2:]])
    assert table.encode(np.array([[1, -2]], np.int16)).tolist() == [[1, 0]]


def test_beyond_pillows_limit_of_pixels(tmp_path, monkeypatch):
    """179 million pixels are its limit; here a tenth of a tenth, for speed."""
    Image.fromarray(RGB).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)     # of which it refuses twice as many
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(read_image(tmp_path / "a.png"), RGB) and upright_size(tmp_path / "a.png") == (36, 24)
    assert Image.MAX_IMAGE_PIXELS == 100
    monkeypatch.setattr(decode, "MAX_PIXELS", 800)
    with pytest.raises(UserError, match="found 36×24; cut it into parts"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("place", range(0, 400, 9))
def test_damaged_tiffs_are_a_sentence(tmp_path, place):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, LABEL.astype(np.int64))
    data = bytearray(path.read_bytes())
    data[place] ^= 0xFF
    for content in (bytes(data), bytes(data[:place])):
        path.write_bytes(content)
        for read in (read_image, read_ids):
            try:
                read(path)
            except UserError:
                continue


def save_palette(path, ids, colors):
    image = Image.fromarray(ids)
    image.putpalette([value for color in colors for value in color])
    image.save(path)


BLACK, RED, GREEN = (0, 0, 0), (200, 0, 0), (0, 200, 0)


@pytest.mark.parametrize("first, second, refused, sentence", [
    ((BLACK, RED, GREEN), (BLACK, RED, GREEN), False, ""),
    ((BLACK, RED, GREEN), (BLACK, GREEN, RED), True, r"found the color \(0, 200, 0\) as 1, which is 2 there; save ids"),
    ((BLACK, RED), (BLACK, GREEN), False, r"index 1 has the color \(0, 200, 0\), in .*a.png \(200, 0, 0\)"),
    ((BLACK, BLACK, BLACK), (BLACK, BLACK, BLACK), False, ""),
    # Black are the background, 0, of the first and what is ignored, 3, of the second, by one palette.
    ((BLACK, RED, GREEN, BLACK), (BLACK, RED, GREEN, BLACK), False, "")])
def test_palettes_that_differ_are_said(tmp_path, first, second, refused, sentence):
    for name, colors in (("a", first), ("b", second)):
        (tmp_path / "images").mkdir(exist_ok=True), (tmp_path / "labels").mkdir(exist_ok=True)
        Image.fromarray(RGB if name == "a" else RGB[::-1]).save(tmp_path / f"images/{name}.png")
        ids = LABEL % min(len(colors), 3)
        ids[(ids == 0) & (len(colors) > 3) & (name == "b")] = 3
        save_palette(tmp_path / f"labels/{name}.png", ids, colors)
    dataset = CityscapesDataset((tmp_path / "images", tmp_path / "labels"), classes=ClassTable(ROWS))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            dataset.check_labels()
            actual = "".join(str(one.message) for one in caught)
        except UserError as error:
            assert refused
            actual = str(error)
    assert re.search(sentence, actual) and bool(actual) == bool(sentence)
    report, _ = check({"x": (dataset.pairs, [])}, ClassTable(ROWS), False, 1)
    kinds = [[one["kind"] for one in report["x"][name] if one["kind"] != "classes without pixels"]
             for name in ("problems", "remarks")]
    assert kinds == [["palettes differ"] * refused, ["palettes differ"] * (bool(sentence) and not refused)]
