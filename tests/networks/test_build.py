"""Every model by name: its outputs, its parameters, and the whole way from training to a file for other runtimes."""

import json

import numpy as np
import pytest
import torch

import evaluate
import train
from libs.convert import fold_norms
from networks.build import ACF_LOSS, MODELS, build_network, find_model
from networks.weights.loading import load_weights
from tests.test_train import run
from utils.common import files
from utils.common.errors import UserError
from utils.inference.export import ImagesToLogits, write_program
from utils.ops.normalization import Normalization

pytestmark = pytest.mark.usefixtures("short_networks")
ONE_MAP = [name for name, model in MODELS.items() if model.head == "plain"]


@pytest.mark.parametrize("norm", ["inplace_abn", "bn"])
@pytest.mark.parametrize("model", MODELS)
def test_every_parameter_learns_and_evaluation_needs_no_other_head(model, norm):
    network = build_network(model, 5, "resnet18", norm=norm)
    outputs = network(torch.randn(2, 3, 41, 57))
    assert all(logits.shape == (2, 5, 6, 8) for logits in outputs.values())
    sum(logits.square().mean() for logits in outputs.values()).backward()
    assert [name for name, parameter in network.named_parameters() if parameter.grad is None] == []
    network.eval()
    images = torch.randn(1, 3, 41, 57)
    with torch.no_grad():
        expected, folded = network(images), fold_norms(network).eval()(images)
    assert expected.keys() == {"fine", *["coarse"] * (MODELS[model].head == "acf")}
    torch.testing.assert_close(folded, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model", MODELS)
def test_dropout_is_as_published(model):
    """Before the last and before the auxiliary classifier alike: 0.05 in the files of OCNet (base) and OCR."""
    shares = [module.p for module in build_network(model, 5, "resnet18").modules()
              if isinstance(module, torch.nn.Dropout2d)]
    assert shares == [0.05 if model in ("ocnet", "ocrnet") else 0.1] * (1 if model == "danet" else 2)


@pytest.mark.parametrize("model", ONE_MAP)
def test_acf_on_other_networks(model):
    network, plain = build_network(model, 4, "resnet18", acf=True), build_network(model, 4, "resnet18")
    assert network(torch.randn(2, 3, 33, 33)).keys() == ACF_LOSS.keys() == find_model(model, True).loss_weights.keys()
    shared = {name for name in plain.state_dict() if not name.startswith("head.")}
    assert shared == {name for name in network.state_dict() if not name.startswith("head.")}


def test_acfnet_is_acf_on_the_base_networks():
    """The same names and shapes, and with the same weights the same logits."""
    for named, base in (("acfnet", "deeplabv3"), ("acfnet", "base"), ("acfnet_resnet", "fcn")):
        one, other = build_network(named, 4, "resnet18").eval(), build_network(base, 4, "resnet18", acf=True).eval()
        other.load_state_dict(one.state_dict())
        images = torch.randn(1, 3, 33, 33)
        assert torch.equal(one(images)["fine"], other(images)["fine"])


@pytest.mark.parametrize("model", ["danet", "ocrnet"])
def test_acf_needs_one_feature_map(model, streets, tmp_path):
    with pytest.raises(UserError, match=f"--acf: expected a model whose head takes one feature map, found {model}; "
                       "base, fcn, deeplabv3"):
        run(streets, tmp_path / "s", "--model", model, "--acf")
    assert not (tmp_path / "s").exists()


def test_image_pooling_needs_two_crops(streets, tmp_path):
    with pytest.raises(UserError, match="--batch-size 2: expected at least two crops in each part with --model pspnet"):
        run(streets, tmp_path / "s", "--model", "pspnet", "--accumulate", "2")


@pytest.mark.parametrize("norm", ["inplace_abn", "bn"])
def test_a_crop_too_small_for_the_norms_is_a_sentence(streets, tmp_path, norm):
    with pytest.raises(UserError, match="--batch-size, --input-size: expected more or .*found 1 of 1×1") as error:
        run(streets, tmp_path / "s", "--norm", norm, "--batch-size", "1", "--input-size", "1,1")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("words", [("ccnet", "--acf"), ("danet",), ("ocrnet",)], ids=" ".join)
def test_from_training_to_predictions(streets, tmp_path, words):
    """Trained, resumed, scored and predicted with; the snapshot alone says which network it is."""
    folder = tmp_path / "s"
    run(streets, folder, "--model", *words, "--val-every", "2", steps=2)
    run(streets, folder, "--model", *words, "--resume", steps=3)
    path = folder / "CS_scenes_3.pth"
    evaluate.main(["--data-dir", str(streets), "--restore-from", str(path), "--gpu", "cpu", "--scales", "1.0",
                   "--no-flip", "--num-workers", "0", "--save", "none"])
    result = json.loads((folder / "CS_scenes_3_val/result.json").read_text())
    assert 0 <= result["mean_iou"] <= 1 and ("coarse" in result) == ("--acf" in words)
    account = load_weights(build_network(words[0], 19, "eca_resnet18"), files.load(path), "s.pth")
    assert account.share == 1


def test_acf_is_part_of_what_a_run_is(streets, tmp_path):
    run(streets, tmp_path / "s", "--model", "fcn", "--acf", steps=1)
    with pytest.raises(UserError, match="expected a run with --acf False, found True"):
        run(streets, tmp_path / "s", "--model", "fcn", "--resume", steps=2)
    with pytest.raises(UserError, match="--acf"):
        train.main(["--data-dir", str(streets), "--acf", "--model", "ocrnet", "--snapshot-dir", str(tmp_path / "t")])


class OneConvolution(torch.nn.Module):
    """Maps images to the feature maps of a ResNet-18 with output stride 8, of which the last is not zero."""

    grid = (8, 1)

    def __init__(self):
        super().__init__()
        self.convolution = torch.nn.Conv2d(3, 512, 9, stride=8, padding=4)

    def forward(self, images):
        return None, None, None, self.convolution(images)


@pytest.mark.parametrize("model", ["pspnet", "ocnet_asp", "ccnet"])
def test_exported_files_hold_for_every_size(model, tmp_path):
    """Pooling and attention are traced with one size and run with others. A single convolution in place of the
    backbone, which other tests export, makes the export ten times faster."""
    onnxruntime = pytest.importorskip("onnxruntime")
    network = build_network(model, 4, "resnet18").eval()
    network.backbone, network.aux = OneConvolution(), None
    network = fold_norms(network)       # as every exported network
    write_program(tmp_path / "n.onnx", network, Normalization())
    session = onnxruntime.InferenceSession(tmp_path / "n.onnx")
    for size in ((65, 97), (70, 51), (33, 129)):
        images = torch.randint(256, (1, 3, *size)).float()
        with torch.no_grad():
            expected = ImagesToLogits(network, Normalization())(images)[0].numpy()
        np.testing.assert_allclose(session.run(None, {"images": images.numpy()})[0], expected, rtol=1e-3, atol=1e-5)
