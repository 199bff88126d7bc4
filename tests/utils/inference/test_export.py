"""Exported networks, by the runtimes they are for, against `SlidingPredictor`; and exported weights."""

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
from dataset.labels import ClassTable
from libs.convert import fold_norms
from networks.build import build_network
from networks.predictor import load, load_network
from networks.weights.loading import load_weights
from networks.weights.start import read_weights
from tests.conftest import snapshot_content
from tests.test_evaluate import snapshot  # noqa: F401, a fixture
from utils.common import compat, files
from utils.common.errors import UserError
from utils.inference import export
from utils.inference.sliding import SlidingPredictor
from utils.ops.normalization import Normalization
from utils.runs import snapshots

pytestmark = pytest.mark.usefixtures("short_networks")
CPU = torch.device("cpu")
NEW = compat.torch_version() >= export.EXPORT
RGB = np.random.default_rng(1).integers(0, 256, (70, 100, 3), dtype=np.uint8)


def write(snapshot, target, *words):  # noqa: F811
    evaluate.main(["--restore-from", str(snapshot), "--export", str(target), *words])


def batch(image):
    return torch.from_numpy(image.transpose(2, 0, 1)[None].astype(np.float32))


def expected(snapshot, image, head="fine"):  # noqa: F811
    """Log-probabilities (N, H, W) of the whole image."""
    network, config = load_network(snapshot, CPU)
    predictor = SlidingPredictor(network, None, normalization=config.normalization)
    return predictor.predict(image)["single_scale"][head].log()


def by_onnx(path):
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session, lambda images: [torch.from_numpy(one) for one in session.run(None, {"images": images.numpy()})]


def by_torch(path):
    return None, torch.export.load(path).module()


OPEN = {".onnx": by_onnx, **({".pt2": by_torch} if NEW else {})}


@pytest.fixture(scope="module")
def exported(snapshot, tmp_path_factory):  # noqa: F811
    pytest.importorskip("safetensors")
    target = tmp_path_factory.mktemp("exported") / "acfnet.safetensors"
    write(snapshot, target)
    return target


@pytest.mark.parametrize("suffix", OPEN)
@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-4), ("fp16", 5e-2)])
def test_files_of_a_fixed_size(snapshot, tmp_path, capsys, suffix, precision, tolerance):  # noqa: F811
    """Of a size that is no multiple of the stride; half precision within 5 % of a logit."""
    path = tmp_path / f"acfnet{suffix}"
    write(snapshot, path, "--export-size", "70,100", "--export-precision", precision)
    shown = capsys.readouterr().out
    assert "images (1, 3, 70, 100) float32 RGB" in shown and "whole images, no windows; checked against PyTorch: " \
        "largest difference" in shown and list(tmp_path.iterdir()) == [path]
    session, run = OPEN[suffix](path)
    with torch.no_grad():
        outputs = run(batch(RGB))
    for head, logits in zip(("fine", "coarse"), outputs, strict=True):
        wanted = expected(snapshot, RGB, head)
        assert logits.dtype == torch.float32 and logits.shape == (1, 19, 70, 100)
        torch.testing.assert_close(logits[0].log_softmax(0), wanted, rtol=0, atol=tolerance)
        assert (logits[0].argmax(0) == wanted.argmax(0)).float().mean() > (0.999 if precision == "fp32" else 0.97)
    if session is not None:
        assert session.get_inputs()[0].shape == [1, 3, 70, 100] and session.get_inputs()[0].type == "tensor(float)"
        metadata = json.loads(session.get_modelmeta().custom_metadata_map["acfnet"])
        assert metadata["precision"] == precision and metadata["classes"] == ClassTable.read().rows
    with pytest.raises(Exception, match="100|shape|dimension"):
        run(batch(RGB[:, :90]))


@pytest.mark.parametrize("traced", [False, True], ids=["exporter", "older exporter"])
def test_half_precision_is_in_the_weights(snapshot, tmp_path, traced):  # noqa: F811
    """All but those of the class centers and their attention, which compute in float32."""
    onnx = pytest.importorskip("onnx")
    network, config = load_network(snapshot, CPU)
    for precision in ("fp16", "fp32"):
        export.write_program(tmp_path / f"{precision}.onnx", network, config.normalization, size=(65, 97),
                             precision=precision, traced=traced)
    assert os.path.getsize(tmp_path / "fp16.onnx") < 0.52 * os.path.getsize(tmp_path / "fp32.onnx")
    weights = onnx.load(tmp_path / "fp16.onnx").graph.initializer
    large = [one for one in weights if np.prod(one.dims) > 1000]
    single = [tuple(one.dims) for one in large if one.data_type == onnx.TensorProto.FLOAT]
    assert len(large) > 12 and single == [(128, 128, 1, 1)] * 2


@pytest.mark.skipif(not NEW, reason="torch.export of these versions cannot")
def test_a_program_holds_for_every_size(snapshot, tmp_path):  # noqa: F811
    path = tmp_path / "acfnet.pt2"
    write(snapshot, path)
    _, run = by_torch(path)
    for height, width in ((64, 64), (65, 97), (71, 40), (16, 200), (3, 50)):
        image = np.random.default_rng(2).integers(0, 256, (height, width, 3), dtype=np.uint8)
        with torch.no_grad():
            fine, _ = run(torch.cat([batch(image)] * 3))
        torch.testing.assert_close(fine[2].log_softmax(0), expected(snapshot, image), rtol=0, atol=1e-4)


@pytest.mark.skipif(not NEW, reason="torch.export of these versions cannot")
def test_a_program_of_any_size_is_not_for_backbones_of_timm(tmp_path):
    network = fold_norms(build_network("acfnet_resnet", 4, "resnet18").eval()).eval()
    with pytest.raises(UserError, match="a.pt2: expected --export-size with this backbone, .* found no such flag"):
        export.write_program(tmp_path / "a.pt2", network, Normalization(), traced=True)


def test_a_program_needs_a_newer_version(snapshot, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(export, "EXPORT", (99, 0))
    with pytest.raises(UserError, match="acfnet.pt2: expected PyTorch 99.0 or newer for .pt2, found 2"):
        write(snapshot, tmp_path / "acfnet.pt2")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("model", ["acfnet", "ocrnet", "danet", "ccnet", "ocnet_asp", "pspnet"])
def test_every_model_computes_in_half_precision(model):
    network = fold_norms(build_network(model, 4, "resnet18").eval()).eval()
    if model == "ocnet_asp" and compat.torch_version() < (2, 9):      # whose CPU has no padding in float16
        with pytest.raises(UserError, match="--export-precision fp16: expected a network that PyTorch 2.* computes in"):
            export.in_half_precision(network)
        return
    half = export.ImagesToLogits(export.in_half_precision(network), Normalization(), torch.float16)
    whole = export.ImagesToLogits(network, Normalization())
    with torch.no_grad():
        images = batch(RGB)
        for actual, wanted in zip(half(images), whole(images), strict=True):
            assert actual.dtype == torch.float32 and not torch.equal(actual, wanted)
            torch.testing.assert_close(actual, wanted, rtol=0, atol=0.02 * wanted.abs().max().item())
    kinds = {parameter.dtype for parameter in half.parameters()}
    assert torch.float16 in kinds and {parameter.dtype for parameter in network.parameters()} == {torch.float32}


@pytest.mark.parametrize("suffix", OPEN)
def test_a_file_that_computes_something_else_is_not_kept(snapshot, tmp_path, monkeypatch, suffix):  # noqa: F811
    pytest.importorskip("onnxruntime")
    name = {".onnx": "onnx_program", ".pt2": "exported_program"}[suffix]
    make = getattr(export, name)

    def wrong(model, *rest, **options):
        torch.nn.init.normal_(model.network.head.fine.bias)
        program = make(model, *rest, **options)
        torch.nn.init.zeros_(model.network.head.fine.bias)
        return program

    monkeypatch.setattr(export, name, wrong)
    (tmp_path / f"a{suffix}").write_text("earlier")
    with pytest.raises(UserError, match="expected logits within 0.001 of the largest of PyTorch's, .* a difference of"):
        write(snapshot, tmp_path / f"a{suffix}", "--export-size", "65,65", "--overwrite")
    monkeypatch.setattr(export, name, lambda *rest, **options: b"rubbish")
    with pytest.raises(UserError, match="expected a file that runs with 1 image of 65×65, found: ") as error:
        write(snapshot, tmp_path / f"a{suffix}", "--export-size", "65,65", "--overwrite")
    assert "fixes the size" not in str(error.value)         # it is fixed
    assert [file.read_text() for file in tmp_path.iterdir()] == ["earlier"]


def test_without_a_runtime_it_says_so(snapshot, tmp_path, monkeypatch, capsys):  # noqa: F811
    pytest.importorskip("onnxscript")
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    write(snapshot, tmp_path / "a.onnx", "--export-size", "65,65")
    assert "not checked against PyTorch: expected the package onnxruntime, found none" in capsys.readouterr().out
    assert (tmp_path / "a.onnx").stat().st_size > 1e6


@pytest.mark.parametrize("target, words, message", [
    ("a.bin", (), "a.bin: expected a name that ends in .onnx, .pt2 or .safetensors, found .bin"),
    ("a", (), "expected a name that ends in .onnx, .pt2 or .safetensors, found none of these"),
    ("a.safetensors", ("--export-size", "9,9"), "--export-size: expected .onnx or .pt2, found .safetensors"),
    ("there.onnx", (), r"there.onnx: expected nothing there \(or --overwrite\), found a file"),
    ("there.safetensors", (), "config.json: expected nothing there, or a file from an earlier export of"),
    ("there.safetensors", ("--overwrite",), "config.json: expected nothing there, or a file from an earlier export of"),
    (None, ("--export-size", "9,9"), "--export-size, --export-precision: expected with --export, found none"),
])
def test_what_cannot_be_exported(snapshot, tmp_path, target, words, message):  # noqa: F811
    (tmp_path / "there.onnx").write_text("mine")
    (tmp_path / "config.json").write_text("{}")
    words = [*words, *(["--export", str(tmp_path / target)] if target else [])]
    if target == "a.safetensors":
        (tmp_path / "config.json").unlink()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=message):
        evaluate.main(["--restore-from", str(snapshot), *words])
    assert sorted(tmp_path.iterdir()) == before and (tmp_path / "there.onnx").read_text() == "mine"


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_exported_weights_are_the_network(snapshot, tmp_path, capsys, precision):  # noqa: F811
    """For `load`, for evaluate.py, and for a training that begins with them."""
    pytest.importorskip("safetensors")
    target = tmp_path / "model/acfnet.safetensors"
    write(snapshot, target, "--export-precision", precision)
    assert "with config.json and README.md; checked against PyTorch: largest difference" in capsys.readouterr().out
    options = {"device": "cpu", "amp": "off", "whole": True}
    actual, wanted = (load(path, **options).predict(RGB) for path in (target, snapshot))
    assert actual.names == wanted.names and np.array_equal(actual.colors[actual.labels == wanted.labels],
                                                          wanted.colors[actual.labels == wanted.labels])
    np.testing.assert_allclose(actual.probabilities, wanted.probabilities, atol=1e-7 if precision == "fp32" else 0.02)
    size = target.stat().st_size / sum(tensor.nbytes for tensor in files.load(snapshot)["model"].values())
    assert size == pytest.approx(1 if precision == "fp32" else 0.5, abs=0.02)
    weights = read_weights(target)
    assert weights.norm == "inplace_abn" and weights.family == "ours"
    assert load_weights(build_network("acfnet_resnet", 19, "eca_resnet18"), weights).share == 1
    Image.fromarray(RGB).save(tmp_path / "a.png")
    evaluate.main(["--restore-from", str(target), "--images", str(tmp_path / "a.png"), "--gpu", "cpu", "--num-workers",
                   "0", "--amp", "off", "--scales", "1", "--no-flip", "--whole", "--save", "labels"])
    results = tmp_path / "model/acfnet_safetensors_images"
    assert np.array_equal(np.asarray(Image.open(results / "labelIds/a.png")), actual.ids)


def test_the_model_card(snapshot, streets, tmp_path):  # noqa: F811
    pytest.importorskip("safetensors")
    path = tmp_path / "CS_scenes_7.pth"
    path.symlink_to(snapshot)
    write(path, tmp_path / "one/a.safetensors")
    card = (tmp_path / "one/README.md").read_text()
    assert "Not measured." in card and "IoU" not in card and 'load("a.safetensors").predict("image.jpg")' in card
    for name, label_id, color in zip(*(getattr(ClassTable.read(), name) for name in ("names", "ids", "palette")),
                                     strict=False):
        assert f"| {name} | {label_id} | {', '.join(map(str, color))} |" in card
    evaluate.main(["--data-dir", str(streets), "--restore-from", str(path), "--gpu", "cpu", "--num-workers", "0",
                   "--amp", "off", "--scales", "1", "--whole", "--save", "none"])
    write(path, tmp_path / "one/a.safetensors", "--overwrite")
    card = (tmp_path / "one/README.md").read_text()
    scores = json.loads((tmp_path / "CS_scenes_7_val/result.json").read_text())["multi_scale"]
    assert "val, 3 images: whole images, scales 1, mirrored too" in card
    assert f"| multi fine | {100 * scores['mean_iou']:.2f} | {100 * scores['mean_category_iou']:.2f} |" in card
    assert f"| road | 7 | 128, 64, 128 | {100 * scores['class_iou']['road']:.2f} |" in card
    with pytest.raises(UserError, match="config.json: expected nothing there, or a file from an earlier export of b"):
        write(path, tmp_path / "one/b.safetensors", "--overwrite")      # they would tell of another file
    (tmp_path / "one/a.safetensors").unlink()
    write(path, tmp_path / "one/b.safetensors", "--overwrite")          # of none
    (tmp_path / "CS_scenes_7_val/result.json").write_text('{"checkpoint": "CS_scenes_7.pth", "protocol": {}}')
    with pytest.raises(UserError, match="result.json: expected a result of evaluate.py, for the model card, found"):
        write(path, tmp_path / "two/a.safetensors")
    assert not (tmp_path / "two").exists()


def test_averaged_weights_are_exported_as_such(tmp_path):
    pytest.importorskip("safetensors")
    content = snapshot_content()
    content["config"]["arguments"]["ema"] = 0.9
    content["average"] = {name: tensor * 0.5 if tensor.is_floating_point() else tensor
                          for name, tensor in content["model"].items()}
    path = tmp_path / "CS_scenes_7.pth"
    snapshots.save(path, content)
    for words, kind in ((), "average"), (("--raw-weights",), "model"):
        target = tmp_path / kind / "a.safetensors"
        write(path, target, *words)
        assert all(torch.equal(tensor, content[kind][name]) for name, tensor in files.load(target).items())
        words = {"average": "moving average at step 7", "model": "those of step 7"}[kind]
        assert words in (target.parent / "README.md").read_text()


def test_weights_beyond_half_precision_are_refused(tmp_path):
    pytest.importorskip("safetensors")
    content = snapshot_content()
    content["model"]["head.fine.bias"][3] = 1e6
    snapshots.save(tmp_path / "CS_scenes_7.pth", content)
    with pytest.raises(UserError, match="expected weights that float16 can hold, .*, found 1e.06 in head.fine.bias"):
        write(tmp_path / "CS_scenes_7.pth", tmp_path / "a.safetensors", "--export-precision", "fp16")
    assert [path.name for path in tmp_path.iterdir()] == ["CS_scenes_7.pth"]


CHANGED = {     # name → (change of the config, or the text in its place; what the sentence says)
    "backbone": (lambda config: config["network"].update(backbone="vgg"), "config.network.backbone: expected one of"),
    "num_classes": (lambda config: config["network"].update(num_classes=3), "as config.network.num_classes"),
    "model": (lambda config: config["network"].update(model="base"), "as model, found no tensor named context"),
    "std": (lambda config: config["normalization"].update(std=[1, 0, 1]), "config.normalization.std.1, found 0"),
    "mean": (lambda config: config["normalization"].update(mean=[1, float("nan"), 1]), "mean.1, found nan"),
    "input_size": (lambda config: config.update(input_size=[65]), "a list of 2 as config.input_size"),
    "red": (lambda config: config["classes"][7].update(red=300), "config.classes.7.red, found 300"),
    "no classes": (lambda config: config.pop("classes"), "as config.classes, found nothing"),
    "no step": (lambda config: config.pop("step"), "as step, found"),
    "no network": (lambda config: config.pop("network"), "expected the config.json of --export beside it, found none"),
    **{f"text {text[:9]!r}": (text, "the config.json of --export beside it, found none of an export") for text in (
        "rubbish", "", "[1]", "[" * 100000)}}


@pytest.mark.parametrize("what", CHANGED)
def test_a_config_is_not_trusted(exported, tmp_path, what):
    (change, message), config = CHANGED[what], json.loads(exported.with_name("config.json").read_text())
    if callable(change):
        change(config)
    target = tmp_path / exported.name
    target.symlink_to(exported)
    (tmp_path / "config.json").write_text(json.dumps(config) if callable(change) else change)
    with pytest.raises(UserError, match=message) as caught:
        load(target, device="cpu", amp="off")
    assert str(caught.value).startswith(str(target)) and "\n" not in str(caught.value)


def test_weights_that_are_damaged_or_alone(exported, tmp_path):
    target = tmp_path / "a.safetensors"
    target.write_bytes(exported.read_bytes()[:-1000])
    with pytest.raises(UserError, match="a.safetensors: expected a safetensors file, found one that cannot be read"):
        load(target)
    target.write_bytes(exported.read_bytes())
    with pytest.raises(UserError, match="a.safetensors: expected the config.json of --export beside it, found none"):
        load(target)
