"""Real photographs: a short training run and its score."""

import json

import pytest
import torch
from PIL import Image

import evaluate
import train
from dataset.labels import ClassTable
from networks.acf import ACFModule
from networks.backbones.names import build_backbone
from networks.build import build_network
from networks.predictor import load_network
from tests.benchmarks import altered, compare, contribution
from tests.benchmarks import camvid as comparison
from tests.benchmarks.test_compare import fork_run
from tests.conftest import randomize
from utils.common.errors import UserError
from utils.ops.normalization import Normalization


def test_a_network_learns_from_real_photographs(camvid, tmp_path):
    """Thirty steps from random weights. Guessing one class everywhere gives under 4 % mIoU."""
    data = ["--data-dir", str(camvid), "--gpu", "cpu", "--classes", str(camvid / "classes.csv")]
    train.main([*data, "--data-list", str(camvid / "train.lst"), "--snapshot-dir", str(tmp_path), "--random-mirror",
                "--backbone", "eca_resnet18", "--model", "acfnet_resnet", "--input-size", "97,97", "--batch-size", "4",
                "--num-steps", "30", "--optimizer", "adamw", "--learning-rate", "1e-3", "--amp", "off"])
    few = (camvid / "val.lst").read_text().splitlines()[::25]
    (tmp_path / "few.lst").write_text("\n".join(few))
    evaluate.main([*data, "--data-list", str(tmp_path / "few.lst"), "--output-dir", str(tmp_path / "r"), "--whole",
                   "--restore-from", str(tmp_path / "CS_scenes_30.pth"), "--scales", "1.0", "--no-flip"])
    result = json.loads((tmp_path / "r/result.json").read_text())
    assert result["num_images"] == len(few) and set(result["single_scale"]["class_iou"]) >= {"sky", "road", "car"}
    assert result["mean_iou"] > 0.08


SPECIAL = ("acfnet_resnet, no term", "acfnet_resnet, true centers", "acfnet_resnet, P detached")


def test_the_comparison_goes_through(camvid, tmp_path, capsys, monkeypatch, short_networks):
    """The variants that no flag of train.py makes, one step: the commands behind the README's findings."""
    monkeypatch.setattr(compare, "start", fork_run)
    monkeypatch.setattr(compare, "MAX_RUNS", 1)
    monkeypatch.setattr(comparison, "select_devices", lambda gpu: [torch.device("cpu")] * 2)
    for name in ("images", "labels", "classes.csv"):
        (tmp_path / name).symlink_to(camvid / name)
    for name, count in (("train.lst", 9), ("val.lst", 2)):
        (tmp_path / name).write_text("\n".join((camvid / name).read_text().splitlines()[:count]))
    torch.save(build_backbone("resnet18", "bn", "relu").state_dict(), tmp_path / "w.pth")
    comparison.main([str(tmp_path), str(tmp_path / "w.pth"), "--steps", "1", "--seeds", "1", "--input-size", "97,97",
                     "--batch-size", "2", "--output-dir", str(tmp_path / "r"), "--variants", *SPECIAL])
    results = [json.loads((tmp_path / f"r/acfnet_resnet{end}_seed0/result/result.json").read_text())
               for end in ("_no_term", "_true_centers", "_P_detached")]
    assert all(0 < result["mean_iou"] < 1 and result["num_images"] == 2 for result in results)
    network, _ = load_network(tmp_path / "r/acfnet_resnet_no_term_seed0/CS_scenes_1.pth", torch.device("cpu"))
    assert not any(parameter.any() for parameter in network.head.acf.cab.parameters())
    capsys.readouterr()
    (tmp_path / "r/acfnet_resnet_seed0").symlink_to("acfnet_resnet_true_centers_seed0")      # without truth a plain one
    contribution.main([str(tmp_path), str(tmp_path / "r"), "--gpu", "cpu"])
    shown = capsys.readouterr().out
    assert "acfnet_resnet, 1 networks" in shown and "another photograph's centers" in shown


def test_every_variant_is_one_of_train_py(tmp_path):
    for name, variant in comparison.VARIANTS.items():
        args = train.get_parser().parse_args(["--data-dir", "x", "--snapshot-dir", str(tmp_path), *variant.words])
        train.check(args, [torch.device("cpu")], ClassTable.read())
        assert name.startswith(args.model)


@pytest.mark.parametrize("how", ["detached_centers", "detached_p"])
def test_what_is_detached_passes_no_gradient_and_all_else_does(how):
    """The written equation, with constants for what is detached."""
    network = altered.ALTERATIONS[how](model="acfnet_resnet", num_classes=3, backbone="resnet18")
    module, plain = network.head.acf.double(), ACFModule(128, 128).double()
    plain.load_state_dict(module.state_dict())
    features = torch.randn(2, 128, 5, 7, dtype=torch.float64, requires_grad=True)
    logits = torch.randn(2, 3, 5, 7, dtype=torch.float64, requires_grad=True)

    def gradients(attended):
        inputs = (features, logits, module.ccb.conv.weight, plain.ccb.conv.weight)
        return torch.autograd.grad(attended.square().sum(), inputs, allow_unused=True)

    actual = gradients(module(features, logits))
    torch.testing.assert_close(module(features, logits), plain(features, logits))
    if how == "detached_p":
        expected = gradients(plain(features, logits.detach()))
        assert actual[1] is None
        torch.testing.assert_close(actual[0], expected[0])
    else:
        centers = plain.class_centers(features, logits)
        expected = gradients(plain.cab(centers.detach(), logits))
        assert actual[0] is None
        torch.testing.assert_close(actual[1], expected[1])
        expected = gradients(plain.cab(centers, logits.detach()))
    torch.testing.assert_close(actual[2], expected[3])


def test_true_centers_see_the_truth_and_only_that():
    """The mean feature of each class's pixels, written out; without the truth it is the network it was made of."""
    shape = {"model": "acfnet_resnet", "num_classes": 3, "backbone": "resnet18", "norm": "bn", "activation": "relu"}
    network = altered.with_true_centers(**shape).eval()
    randomize(network)
    plain = build_network(**shape).eval()
    plain.load_state_dict(network.state_dict())
    images, truth = torch.randn(1, 3, 33, 33), torch.zeros(1, 33, 33)
    truth[:, :, 17:], truth[:, 28:] = 1, 2
    torch.testing.assert_close(network(images), plain(images))
    assert (network(torch.cat([images, truth[:, None]], 1))["fine"] - plain(images)["fine"]).abs().max() > 1e-3
    features, coarse = torch.randn(1, 128, 5, 5), torch.randn(1, 3, 5, 5)
    actual, keys = network.head.acf.class_centers(features, coarse), network.head.acf.ccb.conv(features)
    small = torch.nn.functional.interpolate(truth[None], size=(5, 5), mode="nearest-exact")[0]
    for number in range(3):
        torch.testing.assert_close(actual[0, number], keys[0][:, small[0] == number].mean(1))


def test_a_folder_of_something_else_is_a_sentence(tmp_path):
    (tmp_path / "classes.csv").write_text("name,id,train_id,red,green,blue\nroad,0,0,0,0,0\n")
    for name in ("train", "val"):
        Image.new("RGB", (9, 9)).save(tmp_path / f"{name}.png")
        Image.new("L", (9, 9)).save(tmp_path / f"{name}_label.png")
        (tmp_path / f"{name}.lst").write_text(f"{name}.png {name}_label.png\n")
    torch.save({"model": {}}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="expected networks with ACF of tests.benchmarks.camvid, found none"):
        contribution.main([str(tmp_path), str(tmp_path), "--gpu", "cpu"])


def test_the_term_by_its_matrix_is_the_networks():
    network = build_network("acfnet_resnet", 11, "resnet18", norm="bn", activation="relu").eval()
    randomize(network)
    images = torch.randint(0, 256, (2, 3, 33, 41), dtype=torch.uint8)
    pixels = Normalization()(images)
    _, coarse, alone, matrix = contribution.look(network, pixels, None)
    with torch.inference_mode():
        outputs = network(pixels)
    torch.testing.assert_close(alone + contribution.mix(matrix(), coarse), outputs["fine"], rtol=1e-3, atol=1e-3)
    assert (alone - outputs["fine"]).abs().max() > 0.1
