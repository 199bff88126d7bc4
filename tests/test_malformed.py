"""Broken data sets: each ends with a sentence that names the file, or works where it should. Never a traceback."""

import io
import os
import re
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dataset.cityscapes import CityscapesDataset
from dataset.reading import DecodedCache
from tests.conftest import finish, fork
from tests.utils.imaging.test_decode import OTHER, other_content
from utils.common.errors import UserError, user_message
from utils.imaging.decode import read_ids, read_image

TABLE = "name,id,train_id,red,green,blue\nroad,1,0,1,2,3\ncar,2,1,4,5,6\nvoid,3,255,0,0,0\n"
IMAGE = np.random.default_rng(0).integers(256, size=(12, 16, 3)).astype(np.uint8)
LABEL = np.full((12, 16), 2, np.uint8)


def png(array, **options):
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG", **options)
    return file.getvalue()


def bomb():
    """A PNG whose header promises 60,000 × 60,000 pixels."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0" * 100)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def turned(array, orientation, kind="PNG"):
    """A file whose EXIF orientation says how to turn it."""
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(array).save(file, kind, exif=exif)
    return file.getvalue()


def photograph(kind, palette=False, **options):
    file, image = io.BytesIO(), Image.fromarray(IMAGE)
    (image.quantize(16) if palette else image).save(file, kind, **options)
    return file.getvalue()


def animated(kind):
    file = io.BytesIO()
    frames = [Image.fromarray(IMAGE), Image.fromarray(IMAGE[::-1].copy())]
    frames[0].save(file, kind, save_all=True, append_images=frames[1:], duration=50)
    return file.getvalue()


def spoilt(data, position=0.5):
    """One byte in the middle of the compressed data turned over."""
    place = int(len(data) * position)
    return data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1:]


def put(name, data):
    return lambda root: (root / name).write_bytes(data if isinstance(data, bytes) else data.encode())


def save(name, array, **options):
    return lambda root: Image.fromarray(array).save(root / name, **options)


def make_folder(name):
    def change(root):
        (root / name).unlink()
        (root / name).mkdir()
    return change


def loop(root):
    (root / "b.png").unlink()
    (root / "b.png").symlink_to(root / "b2.png")
    (root / "b2.png").symlink_to(root / "b.png")


def pipe(name):
    def change(root):
        (root / name).unlink()
        os.mkfifo(root / name)
    return change


def link(name, target):
    def change(root):
        (root / name).unlink()
        (root / name).symlink_to(target)
    return change


def rename(image, line):
    def change(root):
        (root / "b.png").rename(root / image)
        (root / "list.txt").write_text(f"a.png a_label.png\n{line}\n", encoding="utf-8")
    return change


def write_list(text, encoding="utf-8"):
    return lambda root: (root / "list.txt").write_bytes(text.encode(encoding))


def write_table(text):
    return lambda root: (root / "classes.csv").write_text(text)


def table_with(column, value):
    """The table with another value for the class car."""
    row = {"name": "car", "id": "2", "train_id": "1", "red": "4", "green": "5", "blue": "6", column: value}
    return write_table(TABLE.replace("car,2,1,4,5,6", ",".join(row.values())))


GOOD = "a.png a_label.png\nb.png b_label.png\n"
LONG = "x" * 300        # more than a file's name may have
PNG, LABEL_PNG = png(IMAGE), png(LABEL)
PALETTE = photograph("PNG", palette=True)
WRONG = {       # what is done to the second pair → what the sentence says
    **{f"image cut after {share:.0%}": (put("b.png", PNG[:int(len(PNG) * share)]), r"b\.png: expected an image, found")
       for share in (0.0, 0.01, 0.05, 0.3, 0.6, 0.9)},
    **{f"label cut after {share:.0%}": (put("b_label.png", LABEL_PNG[:int(len(LABEL_PNG) * share)]),
                                        r"b_label\.png: expected an image, found") for share in (0.0, 0.1, 0.3, 0.5)},
    "image of zero bytes": (put("b.png", b"\0" * 500), r"b\.png: expected an image, found a file that is not an image"),
    "empty image": (put("b.png", b""), r"b\.png: expected an image, found an empty file"),
    "empty label": (put("b_label.png", b""), r"b_label\.png: expected an image, found an empty file"),
    "text as image": (put("b.png", "hello"), r"b\.png: expected an image, found a file that is not an image"),
    "web page as image": (put("b.png", "<!DOCTYPE html><html>"), r"b\.png: expected an image"),
    "random bytes": (put("b.png", np.random.default_rng(1).bytes(4000)), r"b\.png: expected an image"),
    "array as image": (lambda root: np.save(open(root / "b.png", "wb"), IMAGE), r"b\.png: expected an image"),
    "archive as image": (put("b.png", b"PK\x03\x04" + b"\0" * 100), r"b\.png: expected an image"),
    "damaged image": (put("b.png", spoilt(PNG)), r"b\.png: expected an image, found one that cannot be read"),
    "damaged label": (put("b_label.png", spoilt(LABEL_PNG, 0.6)), r"b_label\.png: expected an image"),
    "damaged header": (put("b.png", spoilt(PNG, 18 / len(PNG))), r"b\.png: expected"),
    "decompression bomb": (put("b.png", bomb()), r"b\.png: expected an image of at most 1,074 million"),
    "bomb as label": (put("b_label.png", bomb()), r"b_label\.png: expected an image of at most 1,074 million pixels"),
    "animated PNG": (put("b.png", animated("PNG")), r"b\.png: expected one image, found an animation of 2"),
    "animated GIF": (put("b.png", animated("GIF")), r"b\.png: expected one image, found an animation of 2"),
    "animated WebP": (put("b.png", animated("WEBP")), r"b\.png: expected one image, found an animation of 2"),
    "animated label": (put("b_label.png", animated("PNG")), r"b_label\.png: expected one image, found an animation"),
    "TIFF of pages as label": (put("b_label.png", animated("TIFF")), r"b_label\.png: expected one image"),
    "folder as image": (make_folder("b.png"), r"list\.txt, line 2: expected the file .*b\.png, found a folder"),
    "folder as label": (make_folder("b_label.png"), r"line 2: expected the file .*b_label\.png, found a folder"),
    "no image": (lambda root: (root / "b.png").unlink(), r"line 2: expected the file .*b\.png, found no such file"),
    "no label": (lambda root: (root / "b_label.png").unlink(), r"line 2: expected the file .*b_label\.png, found no"),
    "link to nowhere": (lambda root: [(root / "b.png").unlink(), (root / "b.png").symlink_to("gone.png")],
                        r"line 2: expected the file .*b\.png, found no such file"),
    "loop of links": (loop, r"line 2: expected the file .*b\.png, found no such file"),
    "label one row smaller": (save("b_label.png", LABEL[1:]), r"b_label\.png: expected the size of .*, found 16×11"),
    "label one column larger": (save("b_label.png", np.full((12, 17), 2, np.uint8)), r"found 17×12"),
    "label turned": (save("b_label.png", LABEL.T.copy()), r"found 12×16"),
    "label of one pixel": (save("b_label.png", LABEL[:1, :1]), r"found 1×1"),
    "unknown id": (save("b_label.png", np.full((12, 16), 9, np.uint8)), r"b_label\.png: expected ids .* found 9; add"),
    "unknown deep id": (save("b_label.png", np.full((12, 16), 900, np.uint16)), r"b_label\.png: expected .* 900; add"),
    "one unknown pixel": (save("b_label.png", np.where(np.arange(192).reshape(12, 16) == 190, 77, 2).astype(np.uint8)),
                          r"b_label\.png: expected ids .* found 77; add"),
    "negative id": (lambda root: Image.fromarray(np.full((12, 16), -1, np.int32)).save(root / "b_label.png", "TIFF"),
                    r"b_label\.png: expected ids .* found -1; add"),
    "floating-point label": (lambda root: Image.fromarray(np.full((12, 16), 2.5, np.float32)).save(
        root / "b_label.png", "TIFF"), r"b_label\.png: expected whole numbers, found a label map of floating-point"),
    "floating-point image": (lambda root: Image.fromarray(np.full((12, 16), 0.5, np.float32)).save(
        root / "b.png", "TIFF"), r"b\.png: expected an image of 8 or 16 bits"),
    "unknown color": (save("b_label.png", np.full((12, 16, 3), (9, 8, 7), np.uint8)), r"found \(9, 8, 7\)"),
    "ids in three channels": (save("b_label.png", np.full((12, 16, 3), 2, np.uint8)), r"as if ids were saved in three"),
    "transparent label": (save("b_label.png", np.full((12, 16, 4), 2, np.uint8)), r"b_label\.png: .* transparency"),
    "JPEG label": (save("b_label.png", LABEL, format="JPEG"), r"b_label\.png: expected .* lossless format .* JPEG"),
    "lossy WebP label": (lambda root: Image.fromarray(np.full((12, 16, 3), 2, np.uint8)).save(
        root / "b_label.png", "WEBP", quality=50), r"b_label\.png: expected .* lossless format .* WEBP"),
    "label named train ids": (lambda root: [(root / "b_label.png").rename(root / "b_labelTrainIds.png"), write_list(
        "b.png b_labelTrainIds.png\n")(root)], r"b_labelTrainIds\.png: expected ids .* file of train ids by its name"),
    "no list": (lambda root: (root / "list.txt").unlink(), r"list\.txt: expected a text file"),
    "folder as list": (make_folder("list.txt"), r"list\.txt: expected a text file"),
    "empty list": (write_list(""), r"list\.txt: expected lines \"image label\", found an empty list"),
    "list of comments": (write_list("# nothing\n\n"), r"found an empty list"),
    "list of one word": (write_list("a.png a_label.png\nb.png\n"), r"list\.txt, line 2: expected \"image label\""),
    "list of three words": (write_list("b.png b_label.png x\n"), r"list\.txt, line 1: expected \"image label\""),
    "list in Latin-1": (write_list("größe.png b_label.png\n", "latin-1"), r"list\.txt: .* save it as UTF-8"),
    "binary list": (put("list.txt", PNG), r"list\.txt: expected a text file"),
    "list with commas": (write_list("b.png,b_label.png,9\n"), r"line 1: expected \"image label\""),
    "list with endless name": (write_list(f"{'x' * 5000}.png b_label.png\n"), r"line 1: expected the file .* no such"),
    "spaces without a tab": (rename("my image.png", "my image.png b_label.png"), r"line 2: .*a tab between names"),
    "swapped columns": (write_list("b_label.png b.png\n"), r"b\.png: expected the colors of .*classes\.csv, found"),
    "no table": (lambda root: (root / "classes.csv").unlink(), r"classes\.csv: expected a class table"),
    "binary table": (put("classes.csv", PNG), r"classes\.csv: expected a class table"),
    "table without header": (write_table("road,1,0,1,2,3\n"), r"classes\.csv: expected the columns"),
    "table with a gap": (write_table(TABLE.replace("car,2,1", "car,2,5")), r"expected train ids 0 to N-1"),
    "table with a color of two classes": (lambda root: [write_table(TABLE.replace("4,5,6", "1,2,3"))(root), save(
        "b_label.png", np.full((12, 16, 3), (1, 2, 3), np.uint8))(root)], r"expected a color for each class"),
    "pipe as image": (pipe("b.png"), r"line 2: expected the file .*b\.png, found a pipe"),
    "pipe as label": (pipe("b_label.png"), r"line 2: expected the file .*b_label\.png, found a pipe"),
    "pipe as list": (pipe("list.txt"), r"list\.txt: expected a text file, found a pipe"),
    "pipe as table": (pipe("classes.csv"), r"classes\.csv: expected a class table \(CSV\), found a pipe"),
    "folder as table": (make_folder("classes.csv"), r"classes\.csv: expected a class table \(CSV\), found a folder"),
    **{f"{device} as {name}": (link(name, f"/dev/{device}"), message) for device in ("zero", "null")
       for name, message in (("b.png", r"line 2: expected the file .*b\.png, found a device"),
                             ("b_label.png", r"line 2: expected the file .*b_label\.png, found a device"),
                             ("list.txt", r"list\.txt: expected a text file, found a device"),
                             ("classes.csv", r"classes\.csv: expected a class table \(CSV\), found a device"))},
    **{f"{kind} cut after {share:.0%}": (put("b.png", data[:int(len(data) * share)]), r"b\.png: expected an image")
       for kind, data in (("JPEG", photograph("JPEG")), ("progressive JPEG", photograph("JPEG", progressive=True)),
                          ("WebP", photograph("WEBP", lossless=True)), ("TIFF", photograph("TIFF")),
                          ("BMP", photograph("BMP"))) for share in (0.02, 0.5, 0.9)},
    **{f"{kind} cut after {share:.0%}": (put("b.png", data[:int(len(data) * share)]), r"b\.png: expected an image")
       for kind, data in (("16-bit PNG", png(IMAGE[..., 0].astype(np.uint16) * 257)), ("palette PNG", PALETTE),
                          ("transparent PNG", png(np.dstack([IMAGE, IMAGE[..., :1]])))) for share in (0.1, 0.5, 0.9)},
    **{f"{kind} label cut after {share:.0%}": (put("b_label.png", data[:int(len(data) * share)]),
                                               r"b_label\.png: expected an image")
       for kind, data in (("16-bit PNG", png(LABEL.astype(np.uint16))), ("palette PNG", PALETTE),
                          ("TIFF", photograph("TIFF")), ("BMP", photograph("BMP")),
                          ("lossless WebP", photograph("WEBP", lossless=True))) for share in (0.1, 0.3, 0.5)},
    **{f"{what} damaged after {share:.0%}": (put(name, spoilt(data, share)), rf"{name}: expected an image")
       for what, name, data in (("image", "b.png", PNG), ("palette PNG label", "b_label.png", PALETTE))
       for share in (0.2, 0.6, 0.7)},
    **{f"zeros after {share:.0%} of the {what}": (put(name, data[:int(len(data) * share)] + b"\0" * int(
        len(data) * (1 - share) + 1)), rf"{name}: expected an image, found") for share in (0.1, 0.5)
       for what, name, data in (("image", "b.png", PNG), ("label", "b_label.png", LABEL_PNG))},
    **{f"{name} turned by EXIF {turn} alone": (put(name, turned(array, turn)), r"b_label\.png: expected the size of "
                                               rf".*; .*{name} was turned upright by its EXIF orientation: turn ")
       for name, array in (("b.png", IMAGE), ("b_label.png", LABEL)) for turn in (5, 6, 7, 8)},
    "image turned by EXIF, as JPEG": (put("b.png", turned(IMAGE, 6, "JPEG")), r"b\.png was turned upright by its EXIF"),
    **{f"table with {column} {value!r}": (table_with(column, value), rf"line 3: expected a whole number for {column}")
       for column in ("id", "train_id", "red", "green", "blue") for value in ("", "x", "1.5", "nan", "1e3", "0x1")},
    **{f"table with {column} {value!r}": (table_with(column, value), rf"line 3: expected {column} from 0 to")
       for column, value in (("id", "65536"), ("red", "256"), ("green", "-1"), ("blue", "99999999999999999999"))},
    **{f"table with train id {value}": (table_with("train_id", value), r"expected train ids 0 to N-1 without a gap")
       for value in ("-2", "7", "254", "256")},
    "table with an id twice": (table_with("id", "1"), r"expected every id once, found \[1\]"),
    "table with an id that never occurs": (table_with("id", "-1"), r"b_label\.png: expected ids .* found 2|a_label"),
    "table in Latin-1": (lambda root: (root / "classes.csv").write_text(TABLE.replace("car", "Straße"), "latin-1"),
                         r"classes\.csv: expected a class table .* save it as UTF-8"),
    "table with a null byte": (write_table(TABLE.replace("car", "c\0ar").replace("2,1", "x,1")), r"classes\.csv"),
    "list with a name too long": (write_list(f"{LONG}.png b_label.png\n"), r"line 1: expected the file .* no such"),
    "list with a null byte": (write_list("a\0.png a_label.png\n"), r"line 1: expected the file .* no such file"),
    "list of folders": (write_list(". .\n"), r"line 1: expected the file .*, found a folder"),
}
FINE = {
    "names with spaces": rename("my image.png", "my image.png\tb_label.png"),
    "names in other letters": rename("größe_北京_🚗.png", "größe_北京_🚗.png b_label.png"),
    "Windows line ends": write_list(GOOD.replace("\n", "\r\n")),
    "byte order mark": write_list(GOOD, "utf-8-sig"),
    "no line end": write_list(GOOD.rstrip()),
    "list in UTF-16": write_list(GOOD, "utf-16"),
    "list with commas": write_list(GOOD.replace(" ", ",")),
    "list with commas and spaces": write_list(GOOD.replace(" ", ", ")),
    "list with semicolons": write_list(GOOD.replace(" ", ";")),
    "list with quotes": write_list(re.sub(r"(\S+)", r'"\1"', GOOD)),
    "names with spaces and semicolons": rename("my image.png", "my image.png;b_label.png"),
    "names with commas": rename("my,image.png", "my,image.png b_label.png"),
    "table in UTF-16": lambda root: (root / "classes.csv").write_text(TABLE, "utf-16"),
    "gray image": save("b.png", IMAGE[..., 0].copy()),
    "16-bit image": save("b.png", IMAGE[..., 0].astype(np.uint16) * 257),
    "transparent image": save("b.png", np.dstack([IMAGE, IMAGE[..., :1]])),
    "JPEG named PNG": save("b.png", IMAGE, format="JPEG"),
    "TIFF named PNG": save("b.png", IMAGE, format="TIFF"),
    "CMYK image": lambda root: Image.fromarray(IMAGE).convert("CMYK").save(root / "b.png", "JPEG"),
    "16-bit label": save("b_label.png", LABEL.astype(np.uint16)),
    "colored label": save("b_label.png", np.full((12, 16, 3), (4, 5, 6), np.uint8)),
    "link to an image": lambda root: [(root / "b.png").rename(root / "c.png"), (root / "b.png").symlink_to("c.png")],
    "image of one pixel": lambda root: [save("b.png", IMAGE[:1, :1])(root), save("b_label.png", LABEL[:1, :1])(root)],
    "trailing rubbish after the image": put("b.png", PNG + b"rubbish" * 99),
    **{f"both turned by EXIF {turn}": lambda root, turn=turn: [
        put("b.png", turned(IMAGE, turn, "JPEG"))(root), put("b_label.png", turned(LABEL, turn))(root)]
       for turn in range(2, 9)},
}


@pytest.fixture
def own(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.png").write_bytes(PNG)
        (tmp_path / f"{name}_label.png").write_bytes(LABEL_PNG)
    (tmp_path / "list.txt").write_text(GOOD)
    (tmp_path / "classes.csv").write_text(TABLE)
    return tmp_path


def read_all(root, **options):
    dataset = CityscapesDataset(root, data_list=root / "list.txt", classes=root / "classes.csv", **options)
    return [dataset[index] for index in range(len(dataset))]


def test_there_are_enough_of_them():
    assert len(WRONG) >= 180


@pytest.mark.parametrize("what", WRONG)
def test_a_broken_data_set_is_one_sentence(own, what):
    change, message = WRONG[what]
    change(own)
    with pytest.raises(UserError, match=message) as caught:
        read_all(own)
    assert "\n" not in user_message(caught.value)


@pytest.mark.parametrize("what", FINE)
def test_unusual_but_sound(own, what):
    FINE[what](own)
    items = read_all(own)
    assert len(items) == 2 and torch.equal(items[1]["label"], torch.ones_like(items[1]["label"]))
    assert items[1]["image"].shape[1:] == items[1]["label"].shape and items[1]["image"].dtype == torch.uint8


@pytest.mark.parametrize("name", ["b.png", "b_label.png"])
@pytest.mark.parametrize("what", OTHER)
@pytest.mark.filterwarnings("ignore:--cache")
def test_a_cache_is_only_a_cache(own, what, name):
    read_all(own, cache=own / "c")
    decode = read_ids if "label" in name else read_image
    place = DecodedCache(own / "c").array_path(own / name, decode)
    other_content(place, what)
    for _ in range(2):
        items = read_all(own, cache=own / "c")
        assert len(items) == 2 and torch.equal(items[1]["label"], torch.ones_like(items[1]["label"]))
        assert torch.equal(items[1]["image"], items[0]["image"])


@pytest.mark.parametrize("what, message", [
    ({"root": LONG}, f"--data-dir {LONG}: expected a folder, found nothing there"),
    ({"root": "list.txt"}, "--data-dir list.txt: expected a folder, found a file"),
    ({"root": "pipe"}, "--data-dir pipe: expected a folder, found a pipe"),
    ({"split": LONG}, f"leftImg8bit/{LONG}: expected"), ({"split": "train+val"}, "leftImg8bit/train: expected"),
    ({"data_list": LONG}, f"{LONG}: expected a text file, found .*too long"),
    ({"data_list": ["list.txt", "gone.txt"]}, "gone.txt: expected a text file, found no such file"),
    ({"data_list": "list.txt/x"}, "list.txt/x: expected a text file"),
    ({"classes": LONG}, f"{LONG}: expected a class table .* found neither"),
    ({"classes": "gone.csv"}, "gone.csv: expected a class table .* found no such file"),
    ({"cache": LONG}, f"--cache {LONG}: expected a folder"),
    ({"cache": "list.txt"}, "--cache list.txt: expected a folder"),
    ({"cache": "list.txt/x"}, "--cache list.txt/x: expected a folder")])
def test_a_path_that_makes_no_sense(own, monkeypatch, what, message):
    monkeypatch.chdir(own)
    os.mkfifo("pipe")
    with pytest.raises(UserError, match=message) as caught:
        CityscapesDataset(**{"root": own, **what})
    assert "\n" not in user_message(caught.value)


@pytest.mark.skipif(os.geteuid() != 0, reason="root may become somebody who cannot read a file")
def test_a_file_that_may_not_be_read(own):
    for path in (own, *own.parents[:3]):
        path.chmod(0o755)
    (own / "b.png").chmod(0)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setuid(65534)
            read_all(own)
        except UserError as error:
            status = 0 if "b.png: expected an image, found one that cannot be read: [Errno 13]" in str(error) else 3
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_broken_file_ends_training_from_a_worker_without_a_traceback(own):
    """The whole way: four pairs, the broken one found by a worker process, exit status 2 and one sentence."""
    shutil.copy(own / "a.png", own / "c.png")
    (own / "b.png").write_bytes(PNG[:len(PNG) // 2])
    (own / "list.txt").write_text(GOOD + "c.png a_label.png\n")
    status, _, error = finish(fork(
        "train.py", "--data-dir", own, "--data-list", own / "list.txt", "--classes", own / "classes.csv", "--gpu",
        "cpu", "--backbone", "resnet18", "--model", "acfnet_resnet", "--input-size", "17,17", "--batch-size", "3",
        "--num-workers", "1", "--num-steps", "5", "--snapshot-dir", own / "s"))
    assert status == 2
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "line 2" in lines[0] and "b.png: expected an image" in lines[0]
    assert "Traceback" not in error
    assert not list(Path(own / "s").glob("*.pth"))
