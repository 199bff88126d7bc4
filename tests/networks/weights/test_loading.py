"""Weights from files into networks: each family against the package, or the description, that it comes from."""

import argparse
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

import train
from networks.backbones.names import BACKBONES, build_backbone
from networks.build import build_network
from networks.weights.families import recognize
from networks.weights.loading import load_weights
from networks.weights.start import read_weights
from tests.conftest import SHARED, SMALL, randomize, snapshot_content
from utils.common import files
from utils.common.errors import UserError
from utils.ops.normalization import CAFFE, Normalization


def reference(name, stride):
    """timm's network, every tensor random: it starts the last norm of each block at zero, which would hide much."""
    network = timm.create_model(name, pretrained=False, features_only=True, output_stride=stride,
                                out_indices=(0, 1, 2, 3, 4))
    randomize(network)
    return network.double().eval()


def ours_from(weights, stride, **options):
    actual = weights.structure
    network = build_backbone(actual["backbone"], "bn", "relu", actual["stem"], actual["average_downsample"],
                             actual["eca_kernels"], output_stride=stride, **options)
    network.load_state_dict({key.removeprefix("backbone."): value for key, value in weights.state.items()
                             if ".fc." not in key})
    return network.double().eval()


def stages(network, images):
    """Output of the stem and of the four stages."""
    with torch.no_grad():
        stem = network.bn1(network.conv1(images))
        return [stem, *network(images)]


@pytest.mark.parametrize("stride", [32, 8])
@pytest.mark.parametrize("name, expected", [
    ("ecaresnet101d", ("eca_resnet101", "32-32-64", True, [5, 5, 5, 7])),
    ("ecaresnet50d", ("eca_resnet50", "32-32-64", True, [5, 5, 5, 7])),
    ("resnet101d", ("resnet101", "32-32-64", True, None)),
    ("resnet18d", ("resnet18", "32-32-64", True, None)),
    ("resnet50", ("resnet50", "7x7", False, None)),
    ("resnet34", ("resnet34", "7x7", False, None)),
])
def test_timm_networks_compute_the_same(name, expected, stride, tmp_path):
    theirs = reference(name, stride)
    state = {key: value.contiguous() for key, value in theirs.state_dict().items()}
    save_file(state, tmp_path / f"{name}.safetensors")
    weights = read_weights(tmp_path / f"{name}.safetensors")
    actual = weights.structure
    assert (actual["backbone"], actual["stem"], actual["average_downsample"], actual["eca_kernels"]) == expected
    ours = ours_from(weights, stride)
    images = torch.randn(1, 3, 49, 65, dtype=torch.float64)
    with torch.no_grad():
        expected_maps = theirs(images)
    for a, b in zip(stages(ours, images), expected_maps, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * float(b.abs().max()))
    if actual["eca_kernels"]:
        with torch.no_grad():
            ours.layer3[2].eca.conv.weight[0, 0, 1] += 0.3
        difference = stages(ours, images)[3] - expected_maps[3]
        assert difference.abs().max() > 1e-3 * expected_maps[3].abs().max()


@pytest.mark.parametrize("name", ["resnet50", "resnet101"])
def test_torchvision_networks_compute_the_same(name, tmp_path):
    theirs = getattr(torchvision.models, name)(replace_stride_with_dilation=[False, True, True])
    randomize(theirs)
    torch.save({"state_dict": {f"module.{key}": value for key, value in theirs.state_dict().items()}},
               tmp_path / f"{name}.pth")
    weights = read_weights(tmp_path / f"{name}.pth")
    assert weights.family == "torchvision" and weights.normalization == Normalization()
    ours = ours_from(weights, 8)
    theirs = theirs.double().eval()
    x = torch.randn(1, 3, 49, 65, dtype=torch.float64)
    with torch.no_grad():
        expected = [theirs.relu(theirs.bn1(theirs.conv1(x)))]
        y = theirs.maxpool(expected[0])
        for layer in (theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4):
            y = layer(y)
            expected.append(y)
    for a, b in zip(stages(ours, x), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * float(b.abs().max()))


def ecanet_file(path, kernels=(3, 3, 5, 7)):
    """As ECANet publishes: a dict with epoch and state_dict, `module.` before torchvision's names, ECA in blocks."""
    state = torchvision.models.resnet101().state_dict()
    for stage, kernel in enumerate(kernels, 1):
        for key in [key for key in state if key.startswith(f"layer{stage}.") and key.endswith("bn3.weight")]:
            state[key.replace("bn3.weight", "eca.conv.weight")] = torch.randn(1, 1, kernel)
    torch.save({"epoch": 100, "arch": "eca_resnet101", "best_prec1": 78.65, "optimizer": {"state": {}},
                "state_dict": {f"module.{key}": value for key, value in state.items()}}, path)
    return state


def test_an_ecanet_file_with_every_key_accounted_for(tmp_path):
    state = ecanet_file(tmp_path / "eca_resnet101_k3357.pth.tar")
    weights = read_weights(tmp_path / "eca_resnet101_k3357.pth.tar")
    assert weights.family == "ECANet" and weights.structure["eca_kernels"] == [3, 3, 5, 7]
    network = build_network("acfnet_resnet", 5, "eca_resnet101", norm="bn")
    account = load_weights(network, weights)
    assert account.share == 1 and set(account.ignored) == {"backbone.fc.weight", "backbone.fc.bias"}
    assert set(account.ignored.values()) == {"the classifier of the file"}
    assert len(account.loaded) == len(state) - 2
    heads = {key for key in network.state_dict() if not key.startswith("backbone.") and "num_batches" not in key}
    assert set(account.initialized) == heads and set(account.initialized.values()) == {"no counterpart in the file"}
    key = "layer3.7.eca.conv.weight"
    assert torch.equal(network.backbone.state_dict()[key], state[key])


def csail_file(path):
    """As CSAIL's segmentation code publishes: three 3×3 convolutions 64, 64, 128 as conv1 to conv3, no attention."""
    theirs = torchvision.models.resnet101()
    state = {key: value for key, value in theirs.state_dict().items() if not key.startswith(("conv1.", "bn1."))}
    for number, (before, width) in enumerate(((3, 64), (64, 64), (64, 128)), 1):
        state[f"conv{number}.weight"] = torch.randn(width, before, 3, 3) / (3 * before ** 0.5)
        state |= {f"bn{number}.{key}": value for key, value in nn.BatchNorm2d(width).state_dict().items()}
    for key, shape in (("conv1", (64, 128, 1, 1)), ("downsample.0", (256, 128, 1, 1))):
        state[f"layer1.0.{key}.weight"] = torch.randn(shape) / 12
    torch.save(state, path)
    return state


def test_a_csail_file(tmp_path):
    state = csail_file(tmp_path / "resnet101-imagenet.pth")
    weights = read_weights(tmp_path / "resnet101-imagenet.pth")
    assert weights.family == "CSAIL"
    ours = ours_from(weights, 8)
    x = torch.randn(1, 3, 33, 49, dtype=torch.float64)
    y = x
    with torch.no_grad():
        for number, stride in ((1, 2), (2, 1), (3, 1)):     # the published forward pass
            y = nn.functional.conv2d(y, state[f"conv{number}.weight"].double(), stride=stride, padding=1)
            values = [state[f"bn{number}.{key}"].double() for key in ("running_mean", "running_var", "weight", "bias")]
            y = nn.functional.batch_norm(y, *values).relu()
        torch.testing.assert_close(ours.bn1(ours.conv1(x)), y, rtol=1e-9, atol=1e-9)
    network = build_network("base", 5, "resnet101", stem="64-64-128")
    account = load_weights(network, weights)
    assert account.share == 1 and set(account.ignored) == {"backbone.fc.weight", "backbone.fc.bias"}


@pytest.mark.parametrize("stem", ["7x7", "64-64-128"])
@pytest.mark.parametrize("normalization", [Normalization(), CAFFE])
def test_the_input_is_told_from_what_the_first_norm_has_seen(stem, normalization):
    """Networks that have looked at photographs in the one way or the other; here only their first layers have."""
    data = pytest.importorskip("skimage.data")
    network = build_backbone("resnet18", "bn", "relu", stem)
    for image in (data.chelsea(), data.coffee(), data.rocket()) * 8:
        pixels = torch.from_numpy(image[::3, ::3].copy()).permute(2, 0, 1)[None]
        network.bn1(network.conv1(normalization(pixels)))
    assert recognize(network.state_dict(), "w.pth").normalization == normalization


@pytest.mark.parametrize("norm", ["bn", "inplace_abn"])
@pytest.mark.parametrize("depth", [18, 50])
def test_attention_that_the_file_lacks_changes_nothing(norm, depth):
    theirs = getattr(torchvision.models, f"resnet{depth}")()
    randomize(theirs)
    plain, attentive = (build_network("base", 3, f"{kind}resnet{depth}", norm=norm) for kind in ("", "eca_"))
    load_weights(plain, theirs.state_dict(), "r.pth")
    account = load_weights(attentive, theirs.state_dict(), "r.pth")
    missing = [key for key, reason in account.initialized.items() if "so nothing changes" in reason]
    assert len(missing) == sum(".eca." in key for key in attentive.state_dict())
    images = torch.randn(1, 3, 65, 65)
    for a, b in zip(stages(plain.backbone.eval(), images), stages(attentive.backbone.eval(), images), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-4 * float(a.abs().max()))


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_torchvision_file_goes_through_in_place_norms(wrapped):
    """Negative scales move into the convolutions."""
    theirs = torchvision.models.resnet50(replace_stride_with_dilation=[False, True, True])
    randomize(theirs)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "bn" in name and name.endswith("weight"):
                p.mul_(torch.where(torch.rand(len(p)) < 0.3, -1, 1))
    state = theirs.state_dict()
    if wrapped:
        state = {"state_dict": {f"module.{key}": value for key, value in state.items()}, "epoch": 90}
    plain = build_network("acfnet_resnet", 5, "resnet50", norm="bn")
    in_place = build_network("acfnet_resnet", 5, "resnet50", norm="inplace_abn")
    account = load_weights(plain, state, "r50.pth")
    # 53 convolutions and 53 norms of weight, bias, mean, variance and count; the classifier has no place.
    assert len(account.loaded) == 318 and len(account.ignored) == 2
    account = load_weights(in_place, state, "r50.pth")
    assert "negative scales moved" in str(account) and "and 0 channels" in str(account)
    images = torch.randn(1, 3, 65, 65)
    for a, b in zip(stages(plain.backbone.eval(), images), stages(in_place.backbone.eval(), images), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(a.abs().max()))


@pytest.fixture(scope="session")
def real():
    path = SHARED / "weights/resnet50_imagenet_rgb.pth"
    if not path.is_file():
        pytest.skip("needs the shared ResNet-50 weights, which are not part of the project")
    return path


def test_torchvision_weights_by_their_name(tmp_path, monkeypatch):
    """From PyTorch's cache, without any network; what is not there is fetched, or the address is said."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    theirs = torchvision.models.resnet18().state_dict()
    name = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url.rpartition("/")[2]
    (tmp_path / "checkpoints").mkdir()
    torch.save(theirs, tmp_path / "checkpoints" / name)
    weights = read_weights("ResNet18_Weights.IMAGENET1K_V1")
    assert weights.family == "torchvision" and torch.equal(weights.state["backbone.conv1.weight"],
                                                           theirs["conv1.weight"])
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"ResNet50_Weights.IMAGENET1K_V2: expected to fetch https://.*resnet50-"):
        read_weights("ResNet50_Weights.IMAGENET1K_V2")
    with pytest.raises(UserError, match="ResNet50_Weights.NONE: expected a file or weights that torchvision"):
        read_weights("ResNet50_Weights.NONE")


def test_real_weights_load_whole(real):
    account = load_weights(build_network("acfnet_resnet", 11, "resnet50"), read_weights(real))
    assert read_weights(real).normalization == Normalization()
    assert len(account.loaded) == 318 and account.share == 1 and set(account.ignored) == {"backbone.fc.weight",
                                                                                          "backbone.fc.bias"}


def test_real_weights_see(real):
    """Photographs that scikit-image ships, through our backbone and the file's own classifier."""
    data = pytest.importorskip("skimage.data")
    network = build_backbone("resnet50", "bn", "relu", output_stride=32).eval()
    weights = read_weights(real)
    fc = {key: value.float() for key, value in weights.state.items() if ".fc." in key}
    network.load_state_dict({key.removeprefix("backbone."): value for key, value in weights.state.items()
                             if ".fc." not in key})
    for image, sensible in ((data.chelsea(), {281, 282, 285}), (data.coffee(), {967, 968, 504}),
                            (data.rocket(), {657, 744, 812})):     # cats; espresso, cup, coffee mug; missile, shuttle
        pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None]
        pixels = nn.functional.interpolate(pixels.float(), size=(256, 320), mode="bilinear", antialias=True)
        with torch.no_grad():
            features = network(weights.normalization(pixels))[-1].mean((2, 3))
        logits = features @ fc["backbone.fc.weight"].T + fc["backbone.fc.bias"]
        assert set(logits[0].topk(5).indices.tolist()) & sensible


def test_a_snapshot_of_the_other_norm_computes_the_same():
    for source, target in (("bn", "inplace_abn"), ("inplace_abn", "bn")):
        first, second = (build_network("acfnet", 19, "eca_resnet18", norm=norm) for norm in (source, target))
        content = snapshot_content(1, model="acfnet", norm=source)
        first.load_state_dict(content["model"])
        account = load_weights(second, content, "CS_scenes_1.pth")
        assert account.family == "ours" and not account.initialized and not account.ignored
        assert "in-place norms" in str(account)
        first.eval(), second.eval()
        images = torch.randn(1, 3, 65, 49)
        with torch.no_grad():
            for name, logits in first(images).items():
                torch.testing.assert_close(second(images)[name], logits, rtol=1e-3, atol=1e-3)


def test_another_class_count_keeps_all_but_the_classifiers():
    first, second = build_network("acfnet", 4, "eca_resnet18"), build_network("acfnet", 9, "eca_resnet18")
    account = load_weights(second, {"model": first.state_dict()}, "four.pth")
    fresh = [key for key, value in second.state_dict().items() if value.shape != first.state_dict()[key].shape]
    assert sorted(fresh) == ["aux.3.bias", "aux.3.weight", "head.coarse.bias", "head.coarse.weight",
                             "head.fine.bias", "head.fine.weight"]
    assert account.initialized == dict.fromkeys(fresh, "another number of classes") == account.ignored


@pytest.mark.parametrize("prefix", ["", "module.", "model.backbone.", "_orig_mod.", "encoder."])
def test_our_backbone_alone_under_any_prefix(prefix):
    backbone = build_backbone("eca_resnet18", stem="64-64-128", average_downsample=True)
    randomize(backbone)
    weights = recognize({f"{prefix}{key}": value for key, value in backbone.state_dict().items()}, "b.pth")
    assert weights.structure == {"backbone": "eca_resnet18", "stem": "64-64-128", "average_downsample": True,
                                 "eca_kernels": [3, 5, 7, 7]}
    network = build_network("base", 3, "eca_resnet18", stem="64-64-128", average_downsample=True, norm="bn")
    assert load_weights(network, weights).share == 1


@pytest.mark.parametrize("place", ["net", "weights", "model_state", "model_state_dict", "network.state", "ema",
                                   "model", "state_dict", ""])
@pytest.mark.parametrize("prefix", ["", "module.", "model.encoder."])
def test_weights_are_found_under_any_key(place, prefix):
    state = torchvision.models.resnet18().state_dict()
    content = {prefix + key: value for key, value in state.items()}
    for key in filter(None, reversed(place.split("."))):
        content = {"epoch": 3, key: content, "best": torch.tensor(0.5) if not place else 0.5, "optimizer_state_dict": {
            "state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": []}}
    weights = recognize(content, "w.pth")
    assert torch.equal(weights.state["backbone.layer1.0.conv1.weight"], state["layer1.0.conv1.weight"])


@pytest.mark.parametrize("keys, taken", [(("ema", "model"), "model"), (("student", "teacher"), "teacher"),
                                         (("state_dict_ema", "state_dict"), "state_dict")])
def test_of_several_weights_those_that_are_taken_are_said(keys, taken, capsys):
    state = torchvision.models.resnet18().state_dict()
    content = {key: {name: value + (key == taken) for name, value in state.items()} for key in keys}
    weights = recognize(content, "w.pth")
    assert torch.equal(weights.state["backbone.bn1.weight"], state["bn1.weight"] + 1)
    other, = set(keys) - {taken}
    assert capsys.readouterr().out == f"w.pth: using the weights in {taken}, not those in {other}\n"


def test_flags_paths_and_numbers_beside_tensors_are_read(tmp_path):
    """As torchvision's reference scripts, Lightning and many others save them."""
    content = {"model": {"a": torch.ones(2)}, "args": argparse.Namespace(lr=0.1, out=Path("x")), "folder": Path("y"),
               "best": np.float64(0.5), "step": np.int64(3), "curve": np.arange(4.0), "counts": Counter("aab")}
    torch.save(content, tmp_path / "w.pth")
    read = files.load(tmp_path / "w.pth")
    assert read["args"].lr == 0.1 and str(read["folder"]) == "y" and read["best"] == 0.5 and read["step"] == 3
    assert read["curve"].tolist() == [0, 1, 2, 3] and torch.equal(read["model"]["a"], torch.ones(2))


class Odd:
    """What only the project that wrote a file has."""


RESNET = "torchvision.models.resnet.ResNet, which"      # PyTorch 2.4 names the first class alone


@pytest.mark.parametrize("what, sentence", [
    ("module", RESNET), ("held", RESNET), ("object", "objects of tests.networks.weights.test_loading.Odd, which"),
    ("script", "a TorchScript program")])
def test_files_of_objects_name_the_line_that_converts_them(tmp_path, monkeypatch, what, sentence):
    network = torchvision.models.resnet18()
    if what == "script":
        torch.jit.save(torch.jit.script(network), tmp_path / "w.pth")
    else:
        contents = {"module": network, "held": {"epoch": 3, "out": Path("y"), "model": network, "optimizer": {}},
                    "object": {"odd": Odd(), "args": argparse.Namespace(lr=0.1), "callbacks": {},
                               "state_dict": {**network.state_dict(), "_extra_state": None}}}
        torch.save(contents[what], tmp_path / "w.pth")
    with pytest.raises(UserError, match="w.pth: expected tensors and plain values alone, found") as caught:
        files.load(tmp_path / "w.pth")
    message = str(caught.value)
    assert sentence in message and "add_safe_globals" not in message and "\n" not in message
    monkeypatch.chdir(tmp_path)
    exec(re.search(r'python -c "(.*?)"', message)[1], {})
    assert torch.equal(read_weights("weights.pth").state["backbone.bn1.weight"], network.state_dict()["bn1.weight"])


def test_damage_is_not_taken_for_objects(tmp_path):
    tensor = torch.arange(1000.0)
    torch.save({"args": argparse.Namespace(lr=0.1), "model": {"a": tensor}}, tmp_path / "w.pth")
    whole = bytearray((tmp_path / "w.pth").read_bytes())
    whole[whole.index(tensor.numpy().tobytes()[:64]) + 10] ^= 1
    (tmp_path / "w.pth").write_bytes(whole)
    with pytest.raises(UserError, match="damaged since it was written"):
        files.load(tmp_path / "w.pth")


@pytest.mark.parametrize("content, message", [
    ({"weight": torch.zeros(3)}, "expected weights of a residual network, found 1 tensors without layer1.0.conv1"),
    ([1, 2], "expected named tensors .a state dict., found none"),
    ({"state_dict": {}}, "expected named tensors"),
    ({"layer1.0.conv1.weight": torch.zeros(64, 64, 3, 3)}, "found 1 fitting tensors of 1: 0% .*--allow-partial"),
    ({"layer1.0.conv1.weight": torch.zeros(7, 7)}, "found convolutions of another one"),
])
def test_files_without_the_backbone_are_refused(content, message):
    with pytest.raises(UserError, match=f"f.pth: .*{message}"):
        load_weights(build_network("base", 3, "resnet18"), content, "f.pth")


def test_zero_tensors_are_refused_whatever_is_allowed():
    network = build_network("base", 3, "resnet18")
    state = {"layer1.0.conv1.weight": torch.zeros(64, 64, 3, 3)}
    assert load_weights(network, state, "f.pth", allow_partial=True).loaded == ["backbone.layer1.0.conv1.weight"]
    with pytest.raises(UserError, match="expected the backbone of this network"):
        load_weights(nn.Sequential(nn.Linear(1, 1)), recognize(state, "f.pth"), allow_partial=True)


def run(streets, folder, *words):
    train.main(["--data-dir", str(streets), "--snapshot-dir", str(folder), *SMALL, "--batch-size", "2", "--num-steps",
                "1", *map(str, words)])


def test_training_follows_the_file(streets, tmp_path, capsys):
    """Stem, downsampling, kernels, depth, attention and normalization, into snapshot and evaluation."""
    backbone = build_backbone("eca_resnet18", "bn", "relu", "32-32-64", True, (5, 5, 5, 7))
    torch.save(backbone.state_dict(), tmp_path / "w.pth")
    words = [word for word in SMALL if word not in ("--backbone", "resnet18")]
    train.main(["--data-dir", str(streets), "--snapshot-dir", str(tmp_path / "s"), *words, "--batch-size", "2",
                "--num-steps", "1", "--restore-from", str(tmp_path / "w.pth"), "--normalization", "bgr"])
    shown = capsys.readouterr().out
    assert "network: acfnet_resnet, eca_resnet18, stem 32-32-64, average downsampling, output stride 8; input BGR" in \
        shown
    config = files.load(tmp_path / "s/CS_scenes_1.pth")["config"]
    assert config["network"]["eca_kernels"] == [5, 5, 5, 7] and config["network"]["average_downsample"]
    assert Normalization.from_config(config["normalization"]) == CAFFE
    account = json.loads((tmp_path / "s/weights.json").read_text())
    assert account["backbone_loaded"] == 1 and account["family"] == "ours"
    assert "head.fine.weight" in account["initialised"]
    train.main(["--data-dir", str(streets), "--snapshot-dir", str(tmp_path / "t"), *words, "--batch-size", "2",
                "--num-steps", "1", "--restore-from", str(tmp_path / "s/CS_scenes_1.pth")])
    assert files.load(tmp_path / "t/CS_scenes_1.pth")["config"]["normalization"]["order"] == "BGR"


def test_the_output_stride_goes_with_the_snapshot(streets, tmp_path, capsys):
    run(streets, tmp_path / "a", "--output-stride", 16)
    assert "output stride 16" in capsys.readouterr().out
    first = tmp_path / "a/CS_scenes_1.pth"
    for name, words, expected in (("b", (), {"output_stride": 16}), ("c", ("--output-stride", 8), {})):
        run(streets, tmp_path / name, "--restore-from", first, *words)
        network = files.load(tmp_path / name / "CS_scenes_1.pth")["config"]["network"]
        assert {key: network[key] for key in network if key == "output_stride"} == expected
    for name, stride, other in (("a", 8, 16), ("c", 16, 8)):
        with pytest.raises(UserError, match=f"expected a network with output_stride {stride}, found {other}"):
            run(streets, tmp_path / name, "--resume", "--output-stride", stride)


@pytest.mark.parametrize("flags, message", [
    (["--backbone", "eca_resnet50"], "--backbone eca_resnet50: expected .* that fits .*w.pth, found eca_resnet18"),
    (["--backbone", "resnet18"], "--backbone resnet18: expected .* that fits .*w.pth, found eca_resnet18 there"),
    (["--stem", "7x7"], "--stem 7x7: expected the value of .*w.pth, found 32-32-64 there"),
    (["--downsample", "strided"], "--downsample strided: expected the value of .*w.pth, found average there"),
    (["--eca-kernels", "3,3,5,7"], r"--eca-kernels .3, 3, 5, 7.: expected the value of .*w.pth, found .5, 5, 5, 7."),
])
def test_a_flag_that_contradicts_the_file_names_both(streets, tmp_path, flags, message):
    torch.save(build_backbone("eca_resnet18", "bn", "relu", "32-32-64", True, (5, 5, 5, 7)).state_dict(),
               tmp_path / "w.pth")
    words = SMALL if "--backbone" in flags else [word for word in SMALL if word not in ("--backbone", "resnet18")]
    with pytest.raises(UserError, match=message):
        train.main(["--data-dir", str(streets), "--snapshot-dir", str(tmp_path / "s"), *words, "--batch-size", "2",
                    "--num-steps", "1", "--restore-from", str(tmp_path / "w.pth"), *flags])
    assert not (tmp_path / "s").exists()


def spoil(path, what):
    if what == "text":
        path.write_text("just some words\n" * 50)
    elif what == "page":
        path.write_text("\n<!DOCTYPE html>\n<html><body>Google Drive - Virus scan warning</body></html>")
    elif what == "empty":
        path.write_bytes(b"")
    elif what == "pointer":
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 178793939\n")
    elif what == "cut":
        torch.save(torchvision.models.resnet18().state_dict(), path)
        path.write_bytes(path.read_bytes()[:3_000_000])
    elif what == "DeepSpeed":
        path.mkdir()
        (path / "latest").write_text("global_step100")
    elif what == "Lightning":
        (path / "checkpoints").mkdir(parents=True)
        (path / "hparams.yaml").write_text("")
    elif what == "folder":
        path.mkdir()
        (path / "model.pth").write_bytes(b"")


@pytest.mark.parametrize("what, message", [
    ("text", "found a text file that begins 'just some words"),
    ("page", "found a web page; the download link leads to a page"),
    ("empty", "found an empty file"),
    ("pointer", "found a Git LFS pointer in its place"),
    ("cut", "found a download that was cut off after 3.0 MB; fetch it again"),
    ("DeepSpeed", "found a folder that looks like DeepSpeed's; its script zero_to_fp32.py"),
    ("Lightning", "found a folder that looks like Lightning's; give the .ckpt file in checkpoints/"),
    ("folder", "found a folder; give a file in it: model.pth"),
    ("nothing", "found no such file"),
])
def test_what_is_no_file_of_weights_is_said(streets, tmp_path, what, message):
    spoil(tmp_path / "w.pth", what)
    with pytest.raises(UserError, match=f"w.pth: expected a file of weights, {message}"):
        run(streets, tmp_path / "s", "--restore-from", tmp_path / "w.pth")
    assert not (tmp_path / "s").exists()


def test_another_depth_is_refused():
    state = torchvision.models.resnet50().state_dict()
    with pytest.raises(UserError, match="r50.pth: expected the backbone of this network, found convolutions"):
        load_weights(build_network("base", 3, "resnet18"), state, "r50.pth")
    state = torchvision.models.resnet101().state_dict()
    with pytest.raises(UserError, match=r"layer3.6.conv1.weight \(256, 1024, 1, 1\)"):
        load_weights(build_network("base", 3, "resnet50"), state, "r101.pth")


def test_all_released_depths_have_names():
    assert {f"eca_resnet{depth}" for depth in (18, 34, 50, 101, 152)} <= set(BACKBONES)
