"""Networks from Python: the documented lines themselves, the files that evaluate.py writes, and images of all kinds."""

import io
import os
import re
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import evaluate
from dataset.labels import ClassTable
from libs import abn
from networks import predictor
from networks.backbones.names import BACKBONES
from networks.predictor import load
from networks.weights.snapshot import parse
from tests.conftest import LONG_BACKBONES, NEW_FIGURE, ROOT, snapshot_content
from tests.libs.fused.conftest import large_tiles, launches  # noqa: F401, fixtures
from tests.test_evaluate import snapshot  # noqa: F401, a fixture
from utils.common.errors import UserError
from utils.imaging.decode import to_rgb
from utils.reports import charts
from utils.runs import snapshots

pytestmark = pytest.mark.usefixtures("short_networks")
PLAIN = {"device": "cpu", "amp": "off"}
RGB = np.random.default_rng(1).integers(0, 256, (40, 70, 3), dtype=np.uint8)
GRAY = RGB[..., 0]


def python_blocks(text):
    """The blocks of Python in a text, as they stand there."""
    blocks = re.findall(r"(?:^(?: {4}.*)?\n)+", text, re.M)
    return [re.sub(r"^ {4}", "", block, flags=re.M).strip() for block in blocks if "import" in block]


def readme_blocks():
    """Those of the README's section, and the section."""
    section = re.search(r"^### From Python\n(.*?)^## ", (ROOT / "README.md").read_text(), re.M | re.S)[1]
    return python_blocks(section), section


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with what the README's lines name."""
    folder = tmp_path_factory.mktemp("elsewhere")
    with mock.patch.dict(BACKBONES, LONG_BACKBONES):        # for processes that know no others
        snapshots.save(folder / "snapshots/CS_scenes_60000.pth", snapshot_content(60000))
    Image.fromarray(RGB).save(folder / "street.jpg")
    return folder


def run(block, folder, **environment):
    done = subprocess.run([sys.executable, "-c", block], cwd=folder, capture_output=True, text=True, timeout=240,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("number", range(3), ids=["load", "ACFHead", "InPlaceABN"])
def test_documented_lines_run_from_any_folder(place, number):
    blocks, section = readme_blocks()
    blocks += python_blocks(abn.__doc__)
    assert len(blocks) == 3 and "`PYTHONPATH=/path/to/ACFNet python yours.py`" in section
    out = run(blocks[number], place, PYTHONPATH=str(ROOT))
    if number == 0:
        assert out.splitlines()[-1] == f"(40, 70) {ClassTable.read().names}"


@pytest.mark.parametrize("line", ["from networks import load", "from libs.abn import InPlaceABN"])
@pytest.mark.parametrize("other", ["utils.py", "utils/__init__.py", "imported before"])
def test_another_utils_in_the_way_is_named(tmp_path, line, other):
    """Beside the script, or in this process already, as torch.hub leaves some."""
    before = ""
    if other == "imported before":
        before = "import sys, types; sys.modules['utils'] = types.ModuleType('utils')"
        named = "<module 'utils'>"
    else:
        named = tmp_path / other
        named.parent.mkdir(exist_ok=True)
        named.touch()
    (tmp_path / "yours.py").write_text(f"{before}\n{line}\n")
    done = subprocess.run([sys.executable, "yours.py"], cwd=tmp_path, capture_output=True, text=True, timeout=240,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"ImportError: expected utils of {ROOT}, found {named}, ") and "rename it" in last


def test_the_readmes_lines_run_from_the_checkouts_folder(place, tmp_path):
    for name in ("networks", "libs", "utils"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("snapshots", "street.jpg"):
        (tmp_path / name).symlink_to(place / name)
    assert "(40, 70) ['road', " in run(readme_blocks()[0][0], tmp_path, PYTHONPATH="")


@pytest.mark.parametrize("words, options", [
    (("--scales", "1.0", "--no-flip"), {}),
    (("--scales", "0.75", "1.5", "--whole"), {"scales": (0.75, 1.5), "flip": True, "whole": True}),
    (("--scales", "1.0", "--input-size", "33,41", "--overlap", "0.5"),
     {"flip": True, "window": (33, 41), "overlap": 0.5})], ids=["plain", "scales", "windows"])
def test_predictions_are_those_of_evaluate(snapshot, tmp_path, words, options):  # noqa: F811
    Image.fromarray(RGB).save(tmp_path / "a.png")
    evaluate.main(["--restore-from", str(snapshot), "--images", str(tmp_path / "a.png"), "--output-dir",
                   str(tmp_path / "r"), "--gpu", "cpu", "--num-workers", "0", "--amp", "off", *words])
    network = load(snapshot, **PLAIN, **options)
    actual = network.predict(tmp_path / "a.png")
    ids, colors = (Image.open(tmp_path / f"r/{kind}/a.png") for kind in ("labelIds", "color"))
    assert np.array_equal(actual.ids, np.asarray(ids))
    assert np.array_equal(actual.colors, np.asarray(colors.convert("RGB")))
    assert len(np.unique(actual.ids)) > 1 and actual.labels.shape == (40, 70) and actual.labels.dtype == np.uint8
    assert actual.probabilities.shape == (19, 40, 70) and np.array_equal(actual.probabilities.argmax(0), actual.labels)
    np.testing.assert_allclose(actual.probabilities.sum(0), 1, rtol=1e-5)
    classes = ClassTable.read()
    assert actual.names == network.names == classes.names
    assert np.array_equal(network.palette[actual.labels], actual.colors) and network.palette.shape == (19, 3)
    for same in (RGB, torch.from_numpy(RGB), Image.fromarray(RGB), str(tmp_path / "a.png")):
        assert np.array_equal(network.predict(same).labels, actual.labels)


def pil(mode):
    return Image.fromarray(RGB).convert(mode)


TAKEN = {"RGB": (RGB, RGB), "gray": (GRAY, np.stack([GRAY] * 3, 2)), "one channel": (RGB[..., :1], RGB[..., [0] * 3]),
         "RGBA": (np.dstack([RGB, GRAY]), RGB), "not contiguous": (RGB[::-1, ::-1], RGB[::-1, ::-1]),
         **{f"PIL {mode}": (pil(mode), np.asarray(pil(mode).convert("RGB"))) for mode in (
             "RGB", "L", "P", "LA", "RGBA", "CMYK", "1", "YCbCr", "HSV")},
         "PIL I;16": (Image.fromarray(GRAY.astype(np.uint16) * 257), np.stack([GRAY] * 3, 2))}
REFUSED = {"0 to 1": (RGB / 255, r"float64 \(40, 70, 3\); of values from 0 to 1, take 255 times"),
           "16 bits": (RGB.astype(np.uint16), "found uint16"), "int64": (RGB.astype(int), "found int64"),
           "channels first": (RGB.transpose(2, 0, 1), r"\(3, 40, 70\); channels come last: image.transpose\(1, 2, 0\)"),
           "tensor, channels first": (torch.from_numpy(RGB).permute(2, 0, 1), r"image.permute\(1, 2, 0\)"),
           "several": (RGB[None], "one image at a time"), "bool": (RGB > 9, "found bool"),
           "none": (None, "found NoneType"), "two channels": (RGB[..., :2], r"found uint8 \(40, 70, 2\)"),
           "empty": (RGB[:0], r"found uint8 \(0, 70, 3\)"), "a row": (RGB[0, :, 0], r"found uint8 \(70,\)"),
           "PIL F": (pil("F"), "found one of floating-point numbers"), "a list": ([1], "found list"),
           "bf16": (torch.ones(3, 3).bfloat16(), "found bfloat16")}


@pytest.mark.parametrize("kind", TAKEN)
def test_images_that_are_taken(kind):
    image, expected = TAKEN[kind]
    assert np.array_equal(to_rgb(image), expected)
    if isinstance(image, np.ndarray):
        assert torch.equal(to_rgb(torch.from_numpy(image.copy())), torch.from_numpy(expected.copy()))


@pytest.mark.parametrize("kind", REFUSED)
def test_images_that_are_refused(kind):
    image, message = REFUSED[kind]
    with pytest.raises(ValueError, match=message) as caught:
        to_rgb(image)
    assert "expected" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.filterwarnings("error")
def test_read_only_and_turned_images(snapshot, tmp_path):  # noqa: F811
    """A file is turned upright, as in evaluate.py; labels of a PIL image lie on its pixels."""
    network = load(snapshot, **PLAIN, whole=True)
    read_only = RGB.copy()
    read_only.setflags(write=False)
    labels = network.predict(read_only).labels
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(RGB).save(tmp_path / "a.png", exif=exif)
    image = Image.open(tmp_path / "a.png")
    assert np.array_equal(network.predict(image).labels, labels)
    turned = network.predict(tmp_path / "a.png").labels
    assert turned.shape == (70, 40) and np.array_equal(turned, network.predict(ImageOps.exif_transpose(image)).labels)


def test_what_cannot_be_loaded_or_read(snapshot, tmp_path):  # noqa: F811
    for name, value in (("amp", "fp8"), ("device", "gpu"), ("device", "hpu"), ("scales", ()), ("scales", 1.0),
                        ("overlap", 1), ("window", (0, 9)), ("window", 97), ("batch_size", 0)):
        with pytest.raises(ValueError, match=f"^{name}: expected .*, found"):
            load(snapshot, **{**PLAIN, name: value})
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="expected"):
            load(snapshot, device="cuda:1")
    with pytest.raises(UserError, match="nowhere.pth: expected a file of weights, found no such file"):
        load(tmp_path / "nowhere.pth")
    (tmp_path / "a.png").write_text("text")
    with pytest.raises(UserError, match="a.png: expected an image, found a file that is not an image"):
        load(snapshot, **PLAIN).predict(tmp_path / "a.png")


def test_a_result_shows_and_saves_itself(snapshot, tmp_path, capsys, monkeypatch):  # noqa: F811
    """The picture holds image, colors and legend side by side; files hold what they are named after."""
    monkeypatch.setattr(charts, "new_figure", NEW_FIGURE)
    image = np.kron(RGB, np.ones((4, 4, 1), np.uint8))
    reused = image.copy()
    result = load(snapshot, **PLAIN).predict(reused)
    reused[:] = 0       # as a loop over the frames of a video does
    assert np.array_equal(result.image, image)
    picture = np.asarray(Image.open(io.BytesIO(result._repr_png_())).convert("RGB")).astype(int)
    height, width, _ = picture.shape
    left, middle, right = (picture[:, int(a * width):int(b * width)] for a, b in ((0, 0.36), (0.42, 0.72), (0.79, 1)))
    predicted = np.unique(result.colors.reshape(-1, 3), axis=0)
    counts = {part: [(np.abs(pixels - color).sum(2) < 3).sum() for color in predicted]
              for part, pixels in (("middle", middle), ("right", right))}
    assert len(predicted) > 2 and min(counts["middle"]) > 0 and min(counts["right"]) > 20, counts
    white = {"left": (left == 255).all(2).mean(), "right": (right == 255).all(2).mean()}
    assert white["left"] < 0.5 < white["right"], white
    assert np.array_equal(result.overlay(1.0), result.colors) and np.array_equal(result.overlay(0.0), image)
    assert np.abs(result.overlay() - (image / 2 + result.colors / 2)).max() <= 1
    result.save(tmp_path / "new/a.png")
    with Image.open(tmp_path / "new/a.png") as saved:
        assert np.array_equal(np.asarray(saved), result.labels)
        assert np.array_equal(np.asarray(saved.convert("RGB")), result.colors)
    result.save(tmp_path / "a.jpg")
    assert np.abs(np.asarray(Image.open(tmp_path / "a.jpg")).astype(int) - result.overlay()).mean() < 12
    for name in ("a", "a.tif"):
        with pytest.raises(UserError, match=f"{name}: expected a name that ends in .png, .* or .jpg, .*, found"):
            result.save(tmp_path / name)
    assert capsys.readouterr().err == ""


def test_the_moving_average_is_what_predicts(tmp_path, capsys):
    content = snapshot_content()
    content["config"]["arguments"]["ema"] = 0.9
    content["average"] = {name: tensor * 0.5 if tensor.is_floating_point() else tensor
                          for name, tensor in content["model"].items()}
    snapshots.save(tmp_path / "CS_scenes_7.pth", content)
    averaged, raw = (load(tmp_path / "CS_scenes_7.pth", **PLAIN, raw_weights=raw).predict(RGB).probabilities
                     for raw in (False, True))
    assert not np.allclose(averaged, raw)
    shown = capsys.readouterr().out
    assert "the moving average of the weights" in shown and "the weights of the last step" in shown


@pytest.mark.parametrize("reason", [None, "Triton is not installed"])
def test_norms_of_an_evaluation_on_a_gpu(reason, monkeypatch, capsys, launches, large_tiles):  # noqa: F811
    """By Triton's kernels where they can be used, with the same logits as norms folded into convolutions."""
    parsed = parse("CS_scenes_7.pth", snapshot_content(7))
    monkeypatch.setattr(predictor, "obstacle", lambda device: reason)
    folded = predictor.build_for_evaluation(parsed.config, parsed.weights())
    network = predictor.build_for_evaluation(parsed.config, parsed.weights(), torch.device("cuda"))
    without = predictor.build_for_evaluation(parsed.config, parsed.weights(), torch.device("cuda"), "torch")
    norms, none = ([module for module in one.modules() if isinstance(module, abn.ABN)] for one in (network, without))
    assert none == []
    x = torch.randn(2, 3, 33, 33).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        expected = folded(x)
        assert not launches
        actual = network.to(memory_format=torch.channels_last)(x)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    if reason is None:
        ends = launches["end_block_kernel"]
        assert ends == 4 and launches["normalize_kernel"] == len(norms) - ends - 1      # that of the auxiliary head
    else:
        assert not norms and not launches
        assert f"which save memory traffic: {reason}" in capsys.readouterr().out
