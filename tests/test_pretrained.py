"""Weights from files into networks."""

import pytest
import torch
import torchvision

from networks import build_network
from networks.pretrained import load_weights
from tests.conftest import SHARED, randomise
from utils import checkpoint
from utils.cli import UserError


def stages(network, images):
    network.eval()
    with torch.no_grad():
        return network.backbone(images)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_torchvision_file_gives_torchvision_features(wrapped):
    """Through the in-place norm too: negative scales move into the convolutions."""
    theirs = torchvision.models.resnet50(replace_stride_with_dilation=[False, True, True])
    randomise(theirs)
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
    # 53 convolutions and 53 norms of weight, bias, mean and variance; the classifier of the file has no place.
    assert "loaded 265 tensors (100.0% of the backbone)" in account and "2 of the file have no place" in account
    account = load_weights(in_place, state, "r50.pth")
    assert "negative scales moved" in account and "and 0 channels" in account
    images = torch.randn(1, 3, 65, 65)
    for a, b in zip(stages(plain, images), stages(in_place, images), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(a.abs().max()))


def test_real_weights_load_whole():
    path = SHARED / "weights/resnet50_imagenet_rgb.pth"
    if not path.is_file():
        pytest.skip("needs the shared ResNet-50 weights, which are not part of the project")
    network = build_network("acfnet_resnet", 11, "resnet50")
    account = load_weights(network, checkpoint.load(path), path.name)
    assert "loaded 265 tensors (100.0% of the backbone)" in account
    assert all(value.isfinite().all() for value in network.state_dict().values())


def test_a_snapshot_of_the_other_norm_computes_the_same():
    for source, target in (("bn", "inplace_abn"), ("inplace_abn", "bn")):
        first, second = (build_network("acfnet", 4, "eca_resnet18", norm=norm) for norm in (source, target))
        randomise(first)
        content = {"model": first.state_dict(), "step": 1, "config": {"network": {"norm": source}}}
        account = load_weights(second, content, "CS_scenes_1.pth")
        assert "0 keep their initial values; 0 of the file" in account
        assert "in-place norms" in account
        first.eval(), second.eval()
        images = torch.randn(1, 3, 65, 49)
        with torch.no_grad():
            for name, logits in first(images).items():
                torch.testing.assert_close(second(images)[name], logits, rtol=1e-3, atol=1e-3)


def test_another_class_count_keeps_all_but_the_classifiers():
    first, second = build_network("acfnet", 4, "eca_resnet18"), build_network("acfnet", 9, "eca_resnet18")
    account = load_weights(second, {"model": first.state_dict()}, "four.pth")
    fresh = [key for key, value in second.state_dict().items() if value.shape != first.state_dict()[key].shape]
    assert sorted(fresh) == ["aux.3.bias", "aux.3.weight", "coarse.bias", "coarse.weight", "fine.bias", "fine.weight"]
    assert f"{len(fresh)} keep their initial values" in account


@pytest.mark.parametrize("content, message", [
    ({"weight": torch.zeros(3)}, "found 0 fitting tensors of 1"),
    ([1, 2], "expected named tensors .a state dict., found none"),
    ({"state_dict": {}}, "expected named tensors"),
])
def test_files_without_the_backbone_are_refused(content, message):
    with pytest.raises(UserError, match=f"f.pth: .*{message}"):
        load_weights(build_network("base", 3, "resnet18"), content, "f.pth")


def test_another_depth_is_refused():
    state = torchvision.models.resnet50().state_dict()
    with pytest.raises(UserError, match="r50.pth: expected the backbone of this network, found convolutions"):
        load_weights(build_network("base", 3, "resnet18"), state, "r50.pth")
    state = torchvision.models.resnet101().state_dict()
    with pytest.raises(UserError, match=r"layer3.6.conv1.weight \(256, 1024, 1, 1\)"):
        load_weights(build_network("base", 3, "resnet50"), state, "r101.pth")
