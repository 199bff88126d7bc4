"""Exported .onnx files, scored and used by the same commands as the snapshot of which they were made."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
from dataset.labels import CITYSCAPES
from networks import exporting
from networks.build import build_network
from networks.exported import METADATA, OnnxNetwork
from networks.predictor import load
from tests.conftest import snapshot_content
from utils.common.errors import UserError
from utils.ops.normalization import Normalization
from utils.reports import charts, report
from utils.runs import snapshots

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

ONCE = ("--scales", "1", "--no-flip")
RGB = np.random.default_rng(1).integers(0, 256, (40, 70, 3), dtype=np.uint8)
QUICK = ["--gpu", "cpu", "--num-workers", "0"]


@pytest.fixture(autouse=True)
def no_charts(monkeypatch):
    """They are the same for all kinds of files, and take most of the time."""
    for picture in ("confusion_picture", "iou_chart"):
        monkeypatch.setattr(charts, picture, lambda *words: None)
    monkeypatch.setattr(report, "reliability_chart", lambda *words: b"")


@pytest.fixture(scope="module")
def files(streets, tmp_path_factory):
    """A snapshot that predicts many classes, its export of any size, and one of the size of the training crops.

    The normalization is not the default one: a wrong mean color or order of channels would show at the borders.
    """
    folder = tmp_path_factory.mktemp("exported")
    content = snapshot_content()
    content["config"]["normalization"] = {"order": "BGR", "mean": [20.0, 120.0, 220.0], "std": [50.0, 60.0, 70.0]}
    network = build_network(**content["config"]["network"])
    network.load_state_dict(content["model"])
    street = next(streets.glob("leftImg8bit/val/*/*.png"))
    image = torch.from_numpy(np.array(Image.open(street))).permute(2, 0, 1)[None]
    image = Normalization.from_config(content["config"]["normalization"])(image)
    for head in ("coarse", "fine"):     # in this order, as the fine logits depend on the coarse ones
        with torch.no_grad():
            logits, classifier = network.eval()(image)[head], getattr(network.head, head)
            classifier.bias -= logits.mean((0, 2, 3))
            for values in (classifier.weight, classifier.bias):
                values *= (3 / logits.std((0, 2, 3))).view(-1, *[1] * (values.ndim - 1))
    snapshots.save(folder / "a.pth", content | {"model": network.state_dict()})
    with pytest.MonkeyPatch.context() as patch:     # the older exporter is faster, and files are compared below
        patch.setattr(exporting, "find_backbone", lambda name: SimpleNamespace(traced=True))
        patch.setattr(exporting.export, "compare", lambda *words, **options: "not compared")
        evaluate.main(["--restore-from", str(folder / "a.pth"), "--export", str(folder / "any.onnx")])
    model = onnx.load(folder / "any.onnx")
    for dimension, length in zip(model.graph.input[0].type.tensor_type.shape.dim, (1, 3, 65, 97), strict=True):
        dimension.dim_value = length
    onnx.save(model, folder / "fixed.onnx")
    # It knows nothing of streets: the truth is what it predicts, moved by three pixels.
    ids = load(folder / "a.pth", device="cpu", amp="off").predict(street).ids
    Image.fromarray(np.roll(ids, 3, axis=1)).save(folder / "label.png")
    (folder / "one.lst").write_text(f"{street} {folder / 'label.png'}")
    return folder


def scores(files, name, folder, *words):
    """Result of evaluate.py on one street, and its label ids (H, W)."""
    evaluate.main(["--data-dir", str(files), "--data-list", str(files / "one.lst"), "--restore-from",
                   str(files / name), *QUICK, "--save", "labels", "--output-dir", str(folder), *words])
    picture, = (folder / "labelIds").iterdir()
    return json.loads((folder / "result.json").read_text()), np.asarray(Image.open(picture))


@pytest.mark.parametrize("name, words", [("any.onnx", ("--scales", "0.6", "1")), ("fixed.onnx", ONCE)],
                         ids=["scales and mirror", "fixed"])
def test_scores_of_an_export_are_those_of_the_snapshot(files, tmp_path, name, words):
    """Of both heads, for an image that is no multiple of the windows."""
    expected, expected_labels = scores(files, "a.pth", tmp_path / "s", "--amp", "off", *words)
    actual, labels = scores(files, name, tmp_path / "e", *words)
    assert len(np.unique(labels)) > 5 and (labels == expected_labels).mean() > 0.9995
    assert actual["protocol"] == expected["protocol"] and actual["num_images"] == 1
    name = "multi_scale" if "0.6" in words else "single_scale"
    for ours, theirs in ((actual, expected), (actual["coarse"], expected["coarse"])):
        assert ours[name]["mean_iou"] == pytest.approx(theirs[name]["mean_iou"], abs=5e-4)
        assert ours[name]["class_iou"] == pytest.approx(theirs[name]["class_iou"], abs=5e-3)
    assert 0.1 < actual[name]["mean_iou"] < 0.95


@pytest.mark.parametrize("options", [{"scales": (0.5, 1.0)}, {"whole": True}], ids=["windows", "whole"])
def test_borders_have_the_color_of_the_snapshots_mean(files, options):
    """The image is smaller than the windows, and no multiple of the stride."""
    actual, expected = (load(files / name, device="cpu", amp="off", **options).predict(RGB)
                        for name in ("any.onnx", "a.pth"))
    np.testing.assert_allclose(actual.probabilities, expected.probabilities, atol=2e-3)
    assert actual.names == expected.names and (actual.ids == expected.ids).mean() > 0.999


@pytest.mark.parametrize("words, size", [
    (("--input-size", "33,33"), "33×33"), (("--whole",), "128×256"), (("--scales", "0.25"), "32×64")])
def test_a_fixed_size_is_the_size_of_the_windows(files, tmp_path, words, size):
    with pytest.raises(UserError, match=f"fixed.onnx: expected windows of 65×97, the fixed size of this export, found "
                                        f"{size}; --input-size 65,97, and --scales"):
        scores(files, "fixed.onnx", tmp_path / "r", *ONCE, *words)


def with_metadata(source, target, text):
    model = onnx.load(source)
    del model.metadata_props[:]
    if text is not None:
        onnx.helper.set_model_props(model, {METADATA: text})
    onnx.save(model, target)
    return target


def test_a_file_without_metadata_needs_the_classes(files, tmp_path, capsys):
    with_metadata(files / "fixed.onnx", files / "old.onnx", None)
    with pytest.raises(UserError, match="old.onnx: expected its classes in the file, where --export writes them, or"):
        scores(files, "old.onnx", tmp_path / "r", *ONCE)
    capsys.readouterr()
    words = (*ONCE, "--input-size", "65,97")
    actual, _ = scores(files, "old.onnx", tmp_path / "r", *words, "--classes", str(CITYSCAPES))
    assert "old.onnx: without metadata, so windows have" in capsys.readouterr().out
    expected, _ = scores(files, "fixed.onnx", tmp_path / "e", *words)
    assert actual["mean_iou"] == pytest.approx(expected["mean_iou"], abs=5e-4)
    assert actual["protocol"] == expected["protocol"]
    (tmp_path / "two.csv").write_text("name,id,train_id,red,green,blue\na,0,0,1,1,1\nb,1,1,2,2,2\n")
    with pytest.raises(UserError, match="old.onnx: expected logits of the 2 classes of its metadata or --classes, f"):
        evaluate.main(["--restore-from", str(files / "old.onnx"), "--images", str(files / "label.png"), *QUICK, *ONCE,
                       "--output-dir", str(tmp_path / "t"), "--classes", str(tmp_path / "two.csv")])


@pytest.mark.parametrize("change, message", [
    ("rubbish", "a dict as metadata, found nothing"), ("[" * 9999, "a dict as metadata, found nothing"),
    ({"grid": [0, 1]}, r"a whole number from 1 to 1024 as metadata.grid.0, found 0"),
    ({"precision": "int4"}, "expected one of fp32, fp16 as metadata.precision, found 'int4'"),
    ({"normalization": None}, "metadata.normalization"), ({"classes": []}, "metadata.network.num_classes")])
def test_metadata_are_not_trusted(files, tmp_path, change, message):
    text = change
    if isinstance(change, dict):
        model = onnx.load(files / "fixed.onnx")
        text = json.dumps(json.loads({one.key: one.value for one in model.metadata_props}[METADATA]) | change)
    path = with_metadata(files / "fixed.onnx", tmp_path / "a.onnx", text)
    with pytest.raises(UserError, match=f"a.onnx: .*{message}"):
        load(path, device="cpu")


def test_images_and_speed_of_an_export(files, tmp_path, capsys):
    Image.fromarray(RGB).save(tmp_path / "a.png")
    words = ["--restore-from", str(files / "any.onnx"), "--images", str(tmp_path / "a.png"), *QUICK, *ONCE]
    evaluate.main([*words, "--output-dir", str(tmp_path / "r"), "--save", "labels"])
    labels = np.asarray(Image.open(tmp_path / "r/labelIds/a.png"))
    assert np.array_equal(labels, load(files / "any.onnx", device="cpu").predict(RGB).ids)
    evaluate.main([*words, "--benchmark"])
    assert "any.onnx on CPU, --amp off: 1 image of 40×70; windows of 65×97" in capsys.readouterr().out
    content, = (one.value for one in onnx.load(files / "any.onnx").metadata_props if one.key == METADATA)
    content = json.dumps(json.loads(content) | {"precision": "fp16"})
    half = with_metadata(files / "any.onnx", tmp_path / "half.onnx", content)
    assert OnnxNetwork(half, torch.device("cpu")).amp == "fp16"     # which result.json names


def test_what_is_no_export_is_a_sentence(files, tmp_path, monkeypatch):
    for words in (["--amp", "bf16"], ["--raw-weights"], ["--export", "b.onnx"], ["--push", "hf:owner/name"]):
        with pytest.raises(UserError, match=f"{words[0]}: expected a snapshot, found .*any.onnx, an export, whose"):
            evaluate.main(["--restore-from", str(files / "any.onnx"), *words, *([] if words[0] in ("--export", "--push")
                                                                           else ["--images", str(tmp_path)])])
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "other", [
        value("x", onnx.TensorProto.FLOAT, [1])], [value("y", onnx.TensorProto.FLOAT, [1])])
    onnx.save(onnx.helper.make_model(graph, ir_version=9, opset_imports=[onnx.helper.make_opsetid("", 17)]),
              tmp_path / "other.onnx")
    (tmp_path / "text.onnx").write_text("text")
    for name, message in (("other", "expected a file of evaluate.py --export, from images to fine.*, found x to y"),
                          ("text", "expected an ONNX file, found: "), ("none", "expected an ONNX file, found: ")):
        with pytest.raises(UserError, match=f"{name}.onnx: {message}") as caught:
            load(tmp_path / f"{name}.onnx", device="cpu")
        assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match="any.onnx: expected the package onnxruntime, found none; pip install"):
        OnnxNetwork(files / "any.onnx", None)
