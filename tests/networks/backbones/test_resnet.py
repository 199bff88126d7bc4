"""Backbones and ASPP against torchvision, and their sizes."""

import pytest
import torch
import torchvision

from networks.backbones.names import BACKBONES, build_backbone
from networks.build import build_network
from networks.contexts.aspp import ASPP
from tests.conftest import randomize


@pytest.mark.parametrize("depth", [50, 101])
def test_dilated_resnet_equals_torchvision(depth):
    ours = build_backbone(f"resnet{depth}", norm="bn", activation="relu").double()
    theirs = getattr(torchvision.models, f"resnet{depth}")(
        replace_stride_with_dilation=[False, True, True]).double()
    randomize(theirs)
    loaded = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert loaded.missing_keys == [] and loaded.unexpected_keys == ["fc.weight", "fc.bias"]
    images = torch.randn(1, 3, 33, 49, dtype=torch.float64)
    for training in (False, True):
        ours.train(training), theirs.train(training)
        with torch.no_grad():
            x = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(images))))
            for layer, actual in zip((theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4), ours(images),
                                    strict=True):
                x = layer(x)
                torch.testing.assert_close(actual, x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("output_stride, sizes", [(8, (193, 97, 97, 97)), (16, (193, 97, 49, 49))])
@pytest.mark.parametrize("stem", ["7x7", "64-64-128", "32-32-64"])
@pytest.mark.parametrize("average", [False, True])
def test_output_strides_are_exact_for_odd_sizes(output_stride, sizes, stem, average):
    network = build_backbone("resnet18", stem=stem, average_downsample=average, output_stride=output_stride)
    with torch.device("meta"):
        stages = network.to("meta").eval()(torch.empty(1, 3, 769, 513))
    assert tuple(stage.shape[2] for stage in stages) == sizes
    assert [stage.shape[1] for stage in stages] == network.channels


@pytest.mark.parametrize("size", [(769, 97), (65, 9), (64, 8), (57, 8), (56, 7)])
def test_network_output_is_ceil_of_an_eighth(size):
    pixels, cells = size
    network = build_network(backbone="eca_resnet18").to("meta").eval()
    outputs = network(torch.empty(1, 3, pixels, 41, device="meta"))
    assert {name: tuple(logits.shape) for name, logits in outputs.items()} == {
        name: (1, 19, cells, 6) for name in ("fine", "coarse")}


def test_first_block_of_a_dilated_stage_keeps_the_dilation_before_it():
    network = build_backbone("eca_resnet101")
    dilations = {stage: [block.conv2.dilation[0] for block in getattr(network, stage)]
                 for stage in ("layer2", "layer3", "layer4")}
    assert dilations == {"layer2": [1] * 4, "layer3": [1] + [2] * 22, "layer4": [2, 4, 4]}


def test_a_multi_grid_is_that_of_danet_as_published():
    """4, 8 and 16 in the last stage, and nothing else is another."""
    network = build_network("danet", 3, "resnet50", multi_grid=[1, 2, 4])
    assert [block.conv2.dilation for block in network.backbone.layer4] == [(4, 4), (8, 8), (16, 16)]
    assert [block.conv2.padding for block in network.backbone.layer4] == [(4, 4), (8, 8), (16, 16)]
    assert [block.conv2.dilation[0] for block in network.backbone.layer3] == [1, 2, 2, 2, 2, 2]
    basic = build_backbone("resnet18", multi_grid=(1, 2)).layer4
    assert [(block.conv1.dilation[0], block.conv2.dilation[0]) for block in basic] == [(4, 4), (8, 8)]
    for backbone, wrong in (("resnet50", (1, 2)), ("resnet50", (1, 2, 0)), ("resnet50", "124"),
                            ("timm:resnet10t", (1, 2, 4))):
        with pytest.raises(ValueError, match="multi_grid: expected"):
            build_backbone(backbone, multi_grid=wrong)


@pytest.mark.parametrize("name, kernels", [("eca_resnet101", (3, 3, 5, 7)), ("eca_resnet50", (3, 5, 5, 7))])
def test_eca_kernels_per_stage(name, kernels):
    network = build_backbone(name)
    actual = [{block.eca.conv.kernel_size[0] for block in getattr(network, f"layer{k}")} for k in (1, 2, 3, 4)]
    assert actual == [{k} for k in kernels]
    assert network.state_dict()["layer3.5.eca.conv.weight"].shape == (1, 1, kernels[2])
    other = build_backbone(name, eca_kernels=(5, 5, 5, 7))      # as timm's
    assert other.layer1[0].eca.conv.kernel_size == (5,)


def test_resnet_without_attention_has_none():
    assert build_backbone("resnet18").layer1[0].eca is None
    assert all((backbone.eca_kernels is None) == (not name.startswith("eca")) for name, backbone in BACKBONES.items())


def test_relu_needs_a_norm_that_keeps_its_input():
    with pytest.raises(ValueError, match="expected norm bn"):
        build_network(backbone="resnet18", activation="relu")


def test_every_parameter_gets_a_gradient():
    network = build_network(num_classes=3, backbone="eca_resnet18")
    outputs = network(torch.randn(2, 3, 33, 33))
    assert set(outputs) == {"fine", "coarse", "aux"}
    sum(logits.square().sum() for logits in outputs.values()).backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_aspp_branches_see_as_far_as_their_rates():
    module = ASPP(4, 6, lambda channels: torch.nn.Identity()).double()
    assert len(module.branches) == 4 and module.project[0].in_channels == 24
    for branch, reach in zip(module.branches, (0, 12, 24, 36), strict=True):
        x = torch.randn(1, 4, 81, 81, dtype=torch.float64, requires_grad=True)
        branch(x)[0, :, 40, 40].sum().backward()
        rows = x.grad.abs().sum((0, 1, 3)).nonzero().flatten()
        assert rows.tolist() == sorted({40 - reach, 40, 40 + reach})
