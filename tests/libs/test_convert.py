"""Weights of one kind of norm in a network with the other."""

import pytest
import torch

from libs.abn import ABN
from libs.convert import fold_norms, norms_and_convolutions, to_in_place, to_plain
from networks.build import build_network
from tests.conftest import randomize

BACKBONES = {"eca_resnet18": {}, "resnet50": {"stem": "64-64-128", "average_downsample": True}}


def networks(backbone):
    options = {"num_classes": 4, "backbone": backbone, **BACKBONES[backbone]}
    pair = [build_network(norm=norm, **options).double().eval() for norm in ("bn", "inplace_abn")]
    randomize(pair[0])
    with torch.no_grad():       # half of the scales negative, as trained ones may be
        for name, p in pair[0].named_parameters():
            if p.ndim == 1 and name.endswith("weight") and "eca" not in name:
                p.mul_(torch.where(torch.rand(len(p)) < 0.5, -1, 1))
    return pair


def assert_same_outputs(actual, expected):
    images = torch.randn(1, 3, 33, 41, dtype=torch.float64)
    with torch.no_grad():
        actual, expected = actual(images), expected(images)
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_norm_has_its_convolution(backbone):
    network, _ = networks(backbone)
    pairs = norms_and_convolutions(network, torch.empty(2, 3, 33, 33))
    norms = [name for name, module in network.named_modules()
             if type(module).__name__ == "ABNSync"]
    assert set(pairs) == set(norms) and len(set(pairs.values())) == len(norms)
    assert pairs["backbone.layer2.0.bn2"] == "backbone.layer2.0.conv2"


@pytest.mark.parametrize("backbone", BACKBONES)
def test_plain_weights_in_an_in_place_network_compute_the_same(backbone):
    plain, in_place = networks(backbone)
    pairs = norms_and_convolutions(plain, torch.empty(2, 3, 33, 33))
    state, inexact = to_in_place(plain.state_dict(), pairs)
    assert inexact == 0
    in_place.load_state_dict(state)
    assert_same_outputs(in_place, plain)


def test_in_place_weights_in_a_plain_network_compute_the_same():
    plain, in_place = networks("eca_resnet18")
    randomize(in_place)
    with torch.no_grad():
        for name, p in in_place.named_parameters():
            if p.ndim == 1 and name.endswith("weight"):
                p.mul_(torch.where(torch.rand(len(p)) < 0.5, -1, 1))
    norms = [name for name, module in in_place.named_modules() if type(module).__name__ == "InPlaceABNSync"]
    plain.load_state_dict(to_plain(in_place.state_dict(), norms))
    assert_same_outputs(plain, in_place)


def test_scales_too_small_are_counted():
    state = {"bn.weight": torch.tensor([1.0, -1.0, 1e-6, -1e-7]), "bn.running_mean": torch.ones(4),
             "conv.weight": torch.ones(4, 2, 1, 1)}
    converted, inexact = to_in_place(state, {"bn": "conv"})
    assert inexact == 2
    assert converted["conv.weight"][:, 0, 0, 0].tolist() == [1, -1, 1, -1]
    assert converted["bn.running_mean"].tolist() == [1, -1, 1, -1]
    assert (converted["bn.weight"] >= 0).all() and state["bn.weight"][1] == -1
    without = {key: value for key, value in state.items() if key != "conv.weight"}
    assert to_in_place(without, {"bn": "conv"})[1] == 3


@pytest.mark.parametrize("norm, activation", [("inplace_abn", "leaky_relu"), ("bn", "leaky_relu"), ("bn", "relu")])
@pytest.mark.parametrize("model, backbone", [("acfnet", "eca_resnet50"), ("base", "resnet18")])
def test_folded_norms_change_no_logit(norm, activation, model, backbone):
    network = build_network(model, 5, backbone, norm, activation)
    randomize(network)
    network.double().eval()
    images = torch.randn(2, 3, 33, 41)
    with torch.no_grad():
        expected, actual = network(images.double()), fold_norms(network)(images.double())
    assert expected.keys() == actual.keys()
    for name, logits in expected.items():
        assert logits.std() > 0.05
        torch.testing.assert_close(actual[name], logits, rtol=1e-9, atol=1e-9 * float(logits.abs().max()))
    assert not [m for m in fold_norms(network).modules() if isinstance(m, ABN)]


@pytest.mark.parametrize("ablations", [("norms",), ("norms", "fusion")])
def test_folded_norms_of_the_ablations(ablations):
    network = build_network("acfnet_resnet", 5, "resnet18", ablations=ablations)
    randomize(network)
    network.double().eval()
    images = torch.randn(2, 3, 33, 41, dtype=torch.float64)
    with torch.no_grad():
        expected, actual = network(images)["fine"], fold_norms(network)(images)["fine"]
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))


def test_folded_norms_in_float32():
    """Of a network as it is after some training: statistics that fit, logits within 1e-4."""
    network = build_network("acfnet", 5, "eca_resnet18")
    torch.nn.init.normal_(network.head.fine.weight, std=0.1)
    images = torch.randn(4, 3, 33, 41)
    with torch.no_grad():
        for _ in range(30):
            network(images)
        network.eval()
        expected, actual = network(images), fold_norms(network)(images)
    for name, logits in expected.items():
        torch.testing.assert_close(actual[name], logits, rtol=0, atol=1e-4 * max(1.0, float(logits.abs().max())))
