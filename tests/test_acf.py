"""The ACF module against the paper's drawn order, written out in loops."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from networks import build_network
from networks.acf import ACFModule
from networks.acfnet import ACFNet
from tests.conftest import randomise


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


def assert_same_gradients(found, expected, watched, **tolerance):
    """Of a random weighting of both results, with regard to the tensors watched."""
    weight = torch.randn_like(expected)
    for a, b in zip(torch.autograd.grad((found * weight).sum(), watched),
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
    expected, found = drawn(module, features, coarse), module(features, coarse)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert_same_gradients(found, expected, watched, rtol=1e-10, atol=1e-12)


def test_centers_equal_the_drawn_ones():
    module = ACFModule(6, key_channels=5).double()
    features, coarse = inputs()
    centers = module.class_centers(features, coarse)
    assert centers.shape == (2, 4, 5)
    expected = torch.stack([drawn_centers(module, f, p)
                            for f, p in zip(features, coarse.softmax(1), strict=True)])
    torch.testing.assert_close(centers, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("model", ["acfnet", "acfnet_resnet"])
def test_fine_logits_equal_the_drawn_network(model, training):
    """conv1x1(dropout(concat(F'_a, F))), forward and gradients; Dropout2d with the same draws."""
    network = build_network(model, num_classes=3, backbone="resnet18").double().train(training)
    features = torch.randn(2, 128, 3, 4, dtype=torch.float64, requires_grad=True)
    coarse = (2 * torch.randn(2, 3, 3, 4, dtype=torch.float64)).requires_grad_()
    watched = [features, coarse, *network.acf.parameters(), *network.fine.parameters()]
    torch.manual_seed(7)
    found = network.fine_logits(features, coarse)
    torch.manual_seed(7)
    joined = torch.cat([drawn(network.acf, features, coarse), features], dim=1)
    dropped = F.dropout2d(joined, 0.1, training)
    assert training == bool((dropped == 0).any())
    expected = network.fine(dropped)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert_same_gradients(found, expected, watched, rtol=1e-9, atol=1e-11)


def test_whole_network_uses_the_module_as_drawn():
    """Images to fine logits: features and coarse logits are caught on their way, the rest is redrawn."""
    network = build_network(num_classes=4, backbone="eca_resnet18").double().eval()
    caught = {}
    network.context.register_forward_hook(lambda *args: caught.update(features=args[2]))
    with torch.no_grad():
        outputs = network(torch.randn(2, 3, 33, 41, dtype=torch.float64))
        features = caught["features"]
        torch.testing.assert_close(outputs["coarse"], network.coarse(features))
        joined = torch.cat([drawn(network.acf, features, outputs["coarse"]), features], dim=1)
        torch.testing.assert_close(outputs["fine"], network.fine(joined), rtol=1e-9, atol=1e-12)


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
    found = module(features, coarse)
    found.square().sum().backward()
    for value in (found, features.grad, coarse.grad, *(p.grad for p in module.parameters())):
        assert value.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs(dtype):
    module = ACFModule(64, key_channels=32)
    features = torch.randn(2, 64, 31, 33)
    coarse = 5 * torch.randn(2, 19, 31, 33)
    exact = module.double()(features.to(dtype).double(), coarse.to(dtype).double())
    module.float()
    found = module(features.to(dtype), coarse.to(dtype))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(module(features.to(dtype), coarse.to(dtype)), found, rtol=1e-6, atol=1e-6)


def test_network_under_autocast_is_close_to_float32():
    network = build_network(num_classes=5, backbone="eca_resnet18").eval()
    images = torch.randn(1, 3, 65, 65)
    with torch.no_grad():
        exact = network(images)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = network(images)
    for name in exact:
        scale = exact[name].abs().max()
        assert (found[name].float() - exact[name]).abs().max() < 0.05 * scale, name


def test_nothing_of_key_channels_exists_at_full_size():
    """Neither F' nor F'_a is made: C' is chosen so that it cannot be mistaken for another size."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Sizes(TorchDispatchMode):
        seen = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.seen.append(tuple(out.shape))
            return out

    network = build_network("acfnet", num_classes=3, backbone="resnet18")
    network.acf = ACFModule(128, key_channels=77)
    network.fine = torch.nn.Conv2d(77 + 128, 3, 1)
    for training in (True, False):
        network.train(training)
        with Sizes() as sizes:
            outputs = network.heads(torch.randn(2, 128, 13, 11, requires_grad=True))
            outputs["fine"].sum().backward()
        large = [shape for shape in sizes.seen if {77, 77 + 128} & set(shape) and {13, 11, 143} & set(shape)]
        assert sizes.seen and not large


def drawn_with_norms(network, features, coarse, labels=None):
    """The ablations in the drawn order, with loops over classes and pixels' sums written out, in float64."""
    p = coarse.softmax(1)
    weights = p
    if labels is not None:
        weights = torch.zeros_like(p)
        for b, i in itertools.product(range(p.shape[0]), range(p.shape[1])):
            weights[b, i] = (labels[b] == i).double()
    keys = network.acf.ccb.conv(features)
    keys = keys if network.acf.ccb.norm is None else network.acf.ccb.norm(keys)
    attended = torch.zeros_like(keys)
    for b, i in itertools.product(range(p.shape[0]), range(p.shape[1])):
        mass = weights[b, i].sum()
        center = (weights[b, i] * keys[b]).sum((1, 2)) / mass if mass > 0 else keys[b].mean((1, 2))
        attended[b] += p[b, i] * center[:, None, None]
    attended = network.acf.cab.conv(attended)
    attended = attended if network.acf.cab.norm is None else network.acf.cab.norm(attended)
    joined = torch.cat([attended, features], 1)
    return network.fine(joined if network.fusion is None else network.fusion(joined))


@torch.no_grad()
@pytest.mark.parametrize("ablations", [("norms",), ("fusion",), ("norms", "fusion"), ("true_centers",),
                                       ("norms", "true_centers"), ("norms", "fusion", "true_centers")])
def test_ablations_compute_what_they_are_named_after(ablations):
    network = build_network("acfnet_resnet", 4, "resnet18", ablations=ablations)
    randomise(network)
    network.double().eval()
    features = torch.randn(2, 128, 5, 6, dtype=torch.float64)
    coarse = network.coarse(features) * 3
    labels = torch.randint(3, (2, 5, 6))        # the fourth class is nowhere
    expected = drawn_with_norms(network, features, coarse, labels if "true_centers" in ablations else None)
    network.coarse.forward = lambda x: coarse
    found = network.heads(features, labels)["fine"]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))
    plain = build_network("acfnet_resnet", 4, "resnet18")
    assert plain.fusion is None and plain.acf.cab.norm is None and not plain.true_centers


def test_centers_from_the_truth_need_it_and_ablations_need_acf():
    network = build_network("acfnet_resnet", 4, "resnet18", ablations=("true_centers",)).eval()
    with pytest.raises(ValueError, match="true_centers: expected the truth"):
        network(torch.zeros(1, 3, 33, 33))
    with pytest.raises(ValueError, match="expected a model with ACF, found base"):
        build_network("base", 4, "resnet18", ablations=("norms",))


@pytest.mark.parametrize("ablations", [("norm",), ("Fusion",), "norms", "", ["norms", "fusions"]])
@pytest.mark.parametrize("model", ["acfnet", "base"])
def test_an_unknown_ablation_is_not_the_plain_network(model, ablations):
    for build in (build_network, lambda *args, ablations: ACFNet(None, None, 8, 4, None, 8, ablations=ablations)):
        with pytest.raises(ValueError, match="ablations: expected a tuple of norms, fusion, true_centers, found"):
            build(model, 4, "resnet18", ablations=ablations)
