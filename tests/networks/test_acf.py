"""The ACF module against the paper's drawn order, written out in loops."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from libs.abn import InPlaceABN
from loss.criterion import WEIGHTS
from networks.acf import ACFHead, ACFModule
from networks.build import MODELS, build_network
from tests.conftest import randomize


def conv(layer, vector):
    return layer.weight[:, :, 0, 0] @ vector + layer.bias


def drawn_centers(module, features, probabilities):
    """Section 3.2, pixel by pixel: the mean of F' weighted by P, for every class. One image: (N, C')."""
    channels, height, width = features.shape
    pixels = [(y, x) for y in range(height) for x in range(width)]
    keys = {(y, x): conv(module.ccb.conv, features[:, y, x]) for y, x in pixels}
    centers = []
    for i in range(len(probabilities)):
        mass = sum(probabilities[i, y, x] for y, x in pixels)
        centers.append(sum(probabilities[i, y, x] * keys[y, x] for y, x in pixels) / mass)
    return torch.stack(centers)


def drawn_attention(module, centers, probabilities):
    """Section 3.3, pixel by pixel: F'_a of one image (C', H, W)."""
    _, height, width = probabilities.shape
    rows = []
    for y in range(height):
        mixed = [sum(probabilities[i, y, x] * centers[i] for i in range(len(centers))) for x in range(width)]
        rows.append(torch.stack([conv(module.cab.conv, vector) for vector in mixed], dim=1))
    return torch.stack(rows, dim=1)


def drawn(module, features, coarse):
    probabilities = coarse.softmax(1)
    return torch.stack([drawn_attention(module, drawn_centers(module, f, p), p)
                        for f, p in zip(features, probabilities, strict=True)])


def assert_same_gradients(actual, expected, watched, **tolerance):
    """Of a random weighting of both results, with regard to the tensors watched."""
    weight = torch.randn_like(expected)
    for a, b in zip(torch.autograd.grad((actual * weight).sum(), watched),
                    torch.autograd.grad((expected * weight).sum(), watched), strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def inputs(classes=4, channels=6, size=(5, 3)):
    features = torch.randn(2, channels, *size, dtype=torch.float64, requires_grad=True)
    coarse = (3 * torch.randn(2, classes, *size, dtype=torch.float64)).requires_grad_()
    return features, coarse


def test_module_and_its_gradients_equal_the_drawn_order():
    module = ACFModule(6, key_channels=5).double()
    features, coarse = inputs()
    watched = [features, coarse, *module.parameters()]
    expected, actual = drawn(module, features, coarse), module(features, coarse)
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    assert_same_gradients(actual, expected, watched, rtol=1e-10, atol=1e-12)


def test_centers_equal_the_drawn_ones():
    module = ACFModule(6, key_channels=5).double()
    features, coarse = inputs()
    centers = module.class_centers(features, coarse)
    assert centers.shape == (2, 4, 5)
    expected = torch.stack([drawn_centers(module, f, p)
                            for f, p in zip(features, coarse.softmax(1), strict=True)])
    torch.testing.assert_close(centers, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("training", [False, True])
def test_the_head_equals_the_drawn_one(training):
    """conv1x1(dropout(concat(F'_a, F))), forward and gradients; Dropout2d with the same draws."""
    head = ACFHead(6, 3, key_channels=5).double().train(training)
    features, _ = inputs()
    watched = [features, *head.parameters()]
    torch.manual_seed(7)
    actual = head(features)
    torch.manual_seed(7)
    coarse = head.coarse(F.dropout2d(features, 0.1, training))
    dropped = F.dropout2d(torch.cat([drawn(head.acf, features, coarse), features], dim=1), 0.1, training)
    expected = {"fine": head.fine(dropped), "coarse": coarse}
    assert actual.keys() == expected.keys() and head.fine.in_channels == 5 + 6
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(actual["fine"].square().sum(), watched),
                               torch.autograd.grad(expected["fine"].square().sum(), watched), rtol=1e-9, atol=1e-11)


def test_the_head_fits_any_network_with_one_feature_map():
    """In one line, as its docstring says: on torchvision's FCN, with its own backbone and classes."""
    from torchvision.models.segmentation import fcn_resnet50

    network = fcn_resnet50(weights=None, weights_backbone=None, num_classes=4).eval()
    network.classifier = ACFHead(2048, 4)
    with torch.no_grad():
        logits = network.classifier(network.backbone(torch.randn(1, 3, 33, 41))["out"])
    assert {name: tuple(one.shape) for name, one in logits.items()} == {"fine": (1, 4, 5, 6), "coarse": (1, 4, 5, 6)}


def test_whole_network_uses_the_module_as_drawn():
    """Images to fine logits: features and coarse logits are caught on their way, the rest is redrawn."""
    network = build_network(num_classes=4, backbone="eca_resnet18").double().eval()
    caught = {}
    network.context.register_forward_hook(lambda *args: caught.update(features=args[2]))
    with torch.no_grad():
        outputs = network(torch.randn(2, 3, 33, 41, dtype=torch.float64))
        features = caught["features"]
        torch.testing.assert_close(outputs["coarse"], network.head.coarse(features))
        joined = torch.cat([drawn(network.head.acf, features, outputs["coarse"]), features], dim=1)
        torch.testing.assert_close(outputs["fine"], network.head.fine(joined), rtol=1e-9, atol=1e-12)


def test_one_hot_maps_give_class_means():
    module = ACFModule(6, key_channels=5).double()
    features, _ = inputs()
    truth = torch.randint(3, (2, 5, 3))
    truth[0, 0, 0], truth[1, 0, 0] = 2, 2
    logits = 1e5 * F.one_hot(truth, 4).permute(0, 3, 1, 2).double()     # class 3 is nowhere
    centers = module.class_centers(features, logits)
    for image in range(2):
        for i in truth[image].unique():
            mean = features[image][:, truth[image] == i].mean(1)
            torch.testing.assert_close(centers[image, i], conv(module.ccb.conv, mean), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("absence", [30.0, 1e3, 1e8])
def test_class_without_mass_stays_finite(absence):
    module = ACFModule(6, key_channels=5)
    features = torch.randn(2, 6, 9, 9, requires_grad=True)
    coarse = torch.randn(2, 4, 9, 9)
    coarse[:, 2] -= absence
    coarse.requires_grad_()
    actual = module(features, coarse)
    actual.square().sum().backward()
    for value in (actual, features.grad, coarse.grad, *(p.grad for p in module.parameters())):
        assert value.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs(dtype):
    module = ACFModule(64, key_channels=32)
    features = torch.randn(2, 64, 31, 33)
    coarse = 5 * torch.randn(2, 19, 31, 33)
    exact = module.double()(features.to(dtype).double(), coarse.to(dtype).double())
    module.float()
    actual = module(features.to(dtype), coarse.to(dtype))
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), exact, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(module(features.to(dtype), coarse.to(dtype)), actual, rtol=1e-6, atol=1e-6)


def test_network_under_autocast_is_close_to_float32():
    network = build_network(num_classes=5, backbone="eca_resnet18").eval()
    images = torch.randn(1, 3, 65, 65)
    with torch.no_grad():
        exact = network(images)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual = network(images)
    for name in exact:
        scale = exact[name].abs().max()
        assert (actual[name].float() - exact[name]).abs().max() < 0.05 * scale, name


def drawn_with_norms(head, features, coarse):
    """The ablations in the drawn order, with loops over classes and pixels' sums written out, in float64."""
    p = coarse.softmax(1)
    keys = head.acf.ccb.norm(head.acf.ccb.conv(features))
    attended = torch.zeros_like(keys)
    for b, i in itertools.product(range(p.shape[0]), range(p.shape[1])):
        attended[b] += p[b, i] * ((p[b, i] * keys[b]).sum((1, 2)) / p[b, i].sum())[:, None, None]
    attended = head.acf.cab.norm(head.acf.cab.conv(attended))
    return head.fine(head.fusion(torch.cat([attended, features], 1)))


@torch.no_grad()
@pytest.mark.parametrize("ablations", [("norms",), ("fusion",), ("norms", "fusion")])
def test_ablations_compute_what_they_are_named_after(ablations):
    network = build_network("acfnet_resnet", 4, "resnet18", ablations=ablations)
    randomize(network)
    network.double().eval()
    head, norms = network.head, {"norms": 0, "fusion": 0}
    for block in (head.acf.ccb.norm, head.acf.cab.norm):
        norms["norms"] += isinstance(block, InPlaceABN)
    norms["fusion"] = sum(isinstance(module, InPlaceABN) for module in head.fusion.modules())
    assert norms == {"norms": 2 * ("norms" in ablations), "fusion": int("fusion" in ablations)}
    features = torch.randn(2, 128, 5, 6, dtype=torch.float64)
    coarse = head.coarse(features) * 3
    expected = drawn_with_norms(head, features, coarse)
    head.coarse.forward = lambda x: coarse
    actual = head(features)["fine"]
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))
    plain = build_network("acfnet_resnet", 4, "resnet18").head
    assert not [module for module in plain.modules() if isinstance(module, InPlaceABN)]


def test_ablations_need_acf():
    with pytest.raises(ValueError, match="expected a model with ACF, found base"):
        build_network("base", 4, "resnet18", ablations=("norms",))


@pytest.mark.parametrize("ablations", [("norm",), ("Fusion",), "norms", "", ["norms", "fusions"], ("true_centers",)])
@pytest.mark.parametrize("model", ["acfnet", "base"])
def test_an_unknown_ablation_is_not_the_plain_network(model, ablations):
    with pytest.raises(ValueError, match="ablations: expected a tuple of norms, fusion, found"):
        build_network(model, 4, "resnet18", ablations=ablations)


def test_loss_weights_stand_beside_the_models():
    """Those of ACFNet are the criterion's own, and every model has one for each of its outputs."""
    assert MODELS["acfnet"].loss_weights == WEIGHTS
    for name, model in MODELS.items():
        assert build_network(name, 3, "resnet18")(torch.zeros(2, 3, 17, 17)).keys() == model.loss_weights.keys()
