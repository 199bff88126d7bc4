"""Losses without upsampled logits, against PyTorch's operators on upsampled logits in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from loss import strips
from loss.criterion import SegmentationCriterion
from loss.upsampled import find_operators
from utils.ops.autocast import apex_casts
from utils.ops.upsampling import upsample


@pytest.fixture(autouse=True)
def many_strips(monkeypatch):
    """Strips of one row of cells, and strips for small maps too."""
    monkeypatch.setattr(strips, "STRIP", 1)


def make_batch(classes, step, height, width, *, images=1, ignored=0.2, dtype=torch.float32, label_dtype=torch.uint8):
    """Logits (images, classes, height, width) and labels at `step`, of which a part is ignored."""
    logits = (3 * torch.randn(images, classes, height, width)).to(dtype)
    labels = torch.randint(classes, (images, step * (height - 1) + 1, step * (width - 1) + 1), dtype=label_dtype)
    labels[torch.rand(labels.shape) < ignored] = 255
    return logits, labels


def in_float64(logits, labels, class_weights=None, counted=None):
    """Losses of pixels without weights, sum, weight of the pixels and gradient of the sum, from upsampled logits."""
    logits = logits.detach().double().contiguous().requires_grad_()
    labels = labels.long() if counted is None else labels.long().where(counted, 255)
    large = F.interpolate(logits, labels.shape[1:], mode="bilinear", align_corners=True)
    weights = torch.ones(logits.shape[1]) if class_weights is None else class_weights
    total = F.cross_entropy(large, labels, weights.double(), ignore_index=255, reduction="sum")
    gradient, = torch.autograd.grad(total, logits)
    losses = F.cross_entropy(large.detach(), labels, ignore_index=255, reduction="none")
    return losses, total.detach(), weights.double()[labels[labels != 255]].sum(), gradient


def check(operators, logits, labels, class_weights=None, counted=None, tolerance=1e-6):
    """Compare all that a module of operators returns with `in_float64`."""
    losses, total, count, gradient = in_float64(logits, labels, class_weights, counted)
    if counted is None:
        actual = operators.pixel_losses(logits, labels, 255)
        torch.testing.assert_close(actual.double(), losses, rtol=tolerance, atol=20 * tolerance)
    sums, actual_gradient = operators.sums(logits, labels, 255, class_weights, counted)
    torch.testing.assert_close(sums.double(), torch.stack([total, count]), rtol=tolerance, atol=tolerance)
    assert actual_gradient.shape == logits.shape
    assert (actual_gradient - gradient).norm() <= tolerance * gradient.norm()
    if counted is None:
        without_gradient, nothing = operators.sums(logits, labels, 255, class_weights, with_gradient=False)
        assert nothing is None and torch.equal(without_gradient, sums)


def weights_of(classes):
    """Class weights, of which one is 0."""
    return torch.linspace(0, 2, classes)


def part_of_a_larger_tensor(logits):
    large = torch.zeros(*logits.shape[:2], 2 * logits.shape[2], logits.shape[3] + 3, dtype=logits.dtype)
    large[:, :, ::2, 1:-2] = logits
    return large[:, :, ::2, 1:-2]


def channels_last(logits):
    return logits.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("classes", [2, 11, 19, 150, 254])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_strips(classes, dtype, monkeypatch):
    for number, (step, height, width) in enumerate([(8, 4, 3), (3, 2, 5), (16, 3, 2), (8, 1, 1), (8, 1, 3), (1, 3, 2)]):
        monkeypatch.setattr(strips, "STRIP", [1, 2 * classes * step * step * width, 10**9][number % 3])
        logits, labels = make_batch(classes, step, height, width, images=2, dtype=dtype,
                                    label_dtype=[torch.uint8, torch.int32, torch.int64][number % 3])
        logits = [torch.Tensor.clone, channels_last, part_of_a_larger_tensor][number // 2](logits)
        tolerance = 1e-12 if dtype == torch.float64 else 2e-6
        check(strips, logits, labels, tolerance=tolerance)
        check(strips, logits, labels, weights_of(classes), torch.rand(labels.shape) < 0.5, tolerance=tolerance)


def check_special_values(operators):
    """Losses are infinite and not a number exactly where those of upsampled logits are."""
    logits = torch.randn(1, 3, 4, 5)
    logits[0, 1, 0, 0] = math.inf
    logits[0, 1, 0, 3] = -math.inf
    logits[0, 1, 3, 0] = math.nan
    logits[0, 1, 3, 4] = -math.inf
    logits[0, :, 2, 3] = -math.inf
    for true in (1, 2):
        labels = torch.full((1, 13, 17), true)
        losses = operators.pixel_losses(logits, labels, 255)
        expected = F.cross_entropy(upsample(logits, labels.shape[1:]), labels, reduction="none")
        assert torch.equal(losses.isnan(), expected.isnan()) and torch.equal(losses.isinf(), expected.isinf())
        assert losses.isnan().any() and losses.isfinite().any() and (true != 1 or losses.isinf().any())
    labels[losses.isnan()] = 255        # of the last class, whose losses are finite elsewhere
    sums, _ = operators.sums(logits, labels, 255)
    assert sums.isfinite().all() and sums[1] > 0


@pytest.mark.parametrize("strip", [1, 10**9])
def test_infinite_logits_and_nan(strip, monkeypatch):
    monkeypatch.setattr(strips, "STRIP", strip)
    check_special_values(strips)


def check_ignored(operators):
    """Without a labeled pixel sums and gradient are 0."""
    logits, labels = make_batch(5, 8, 1, 2, ignored=2)
    sums, gradient = operators.sums(logits, labels, 255, weights_of(5))
    assert not sums.any() and not gradient.any()


def test_everything_ignored():
    check_ignored(strips)


class FullSize(torch.nn.Module):
    """A term that needs upsampled logits."""

    def __init__(self, term):
        super().__init__()
        self.sums, self.combine, self.divisor = term.sums, term.combine, term.divisor


def check_criterion(kernels, **options):
    """Sums and gradients of a criterion with and without upsampled logits: the same pixels are selected."""
    logits, labels = make_batch(5, 8, 2, 2, images=2)
    logits = logits.round()                               # with ties
    results = []
    for upsampled in (False, True):
        criterion = SegmentationCriterion(kernels=kernels, **options)
        if upsampled:
            criterion.terms = torch.nn.ModuleDict({name: FullSize(term) for name, term in criterion.terms.items()})
        outputs = {name: (scale * logits).requires_grad_() for name, scale in (("fine", 1), ("coarse", 2), ("aux", 3))}
        sums = criterion.sums(outputs, labels)
        assert upsampled or all("UpsampledCrossEntropy" in value.grad_fn.name() for value in sums.values())
        criterion.total(criterion.combine(sums)).backward()
        results.append({name: (sums[name].detach(), outputs[name].grad) for name in outputs})
    for name, (sums, gradient) in results[0].items():
        torch.testing.assert_close(sums, results[1][name][0], rtol=1e-6, atol=0)
        torch.testing.assert_close(gradient, results[1][name][1], rtol=1e-5, atol=1e-6)
    return {name: sums for name, (sums, _) in results[0].items()}


OHEM = [{}, {"ohem": True, "ohem_thres": 0.3, "ohem_keep": 50}, {"ohem": True, "ohem_thres": 0.0, "ohem_keep": 100},
        {"ohem": True, "ohem_thres": 0.05, "ohem_keep": 0}]


@pytest.mark.parametrize("class_weights", [None, weights_of(5)], ids=["", "weights"])
@pytest.mark.parametrize("options", OHEM, ids=str)
def test_criterion(options, class_weights):
    sums = check_criterion("torch", class_weights=class_weights, **options)
    if options and class_weights is None:
        assert 0 < sums["fine"][1] < sums["coarse"][1]


def test_several_parts_and_losses_that_are_not_fused():
    """Parts of a batch add up to the whole, and terms may be of both kinds."""
    logits, labels = make_batch(5, 8, 3, 2, images=4)
    outputs = {name: logits.double() * scale for name, scale in (("fine", 1), ("coarse", 2), ("aux", 3))}
    criterion = SegmentationCriterion()
    expected = criterion(outputs, labels)
    criterion.terms["coarse"] = FullSize(criterion.terms["coarse"])
    divisors = criterion.divisors(labels)
    shares = [criterion.combine(criterion.sums({name: value[part] for name, value in outputs.items()}, labels[part]),
                                divisors, parts=2) for part in (slice(0, 1), slice(1, 4))]
    for name, loss in expected.items():
        torch.testing.assert_close(sum(share[name] for share in shares), loss)
        torch.testing.assert_close(loss, F.cross_entropy(upsample(outputs[name], labels.shape[1:]), labels.long(),
                                                         ignore_index=255))


@pytest.mark.parametrize("casts", [lambda: torch.autocast("cpu", torch.bfloat16), apex_casts], ids=["autocast", "apex"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_casts_change_nothing(dtype, casts):
    """Computed in float32 whatever is active, with a gradient in the dtype of the logits."""
    logits, labels = make_batch(5, 8, 3, 2, dtype=dtype)
    _, total, count, gradient = in_float64(logits, labels)
    logits.requires_grad_()
    with casts():
        loss = SegmentationCriterion({"fine": 1})({"fine": logits}, labels)["fine"]
        loss.backward()
    assert loss.dtype == torch.float32 and float(loss.detach()) == pytest.approx(float(total / count), rel=1e-6)
    assert logits.grad.dtype == dtype
    torch.testing.assert_close(logits.grad.double(), gradient / count, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("size", [(16, 17), (17, 24), (9, 17), (2, 17), (17, 2)])
def test_other_sizes_are_upsampled(size):
    """Logits that do not lie on pixels, or in which both sides differ in their step."""
    logits, labels = torch.randn(1, 4, 3, 3), torch.randint(4, (1, *size))
    assert find_operators("torch", logits, size) is None
    actual = SegmentationCriterion()({"fine": logits}, labels)["fine"]
    torch.testing.assert_close(actual, F.cross_entropy(upsample(logits, size), labels))


def test_small_maps_are_upsampled(monkeypatch):
    logits = torch.randn(1, 4, 3, 3)
    assert find_operators("torch", logits, (17, 17)) is strips
    monkeypatch.setattr(strips, "STRIP", 2 * 17 * 17 + 1)
    assert find_operators("torch", logits, (17, 17)) is None


class LargestTensor(TorchDispatchMode):
    """The number of values of the largest tensor that an operator returns."""

    values = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.values = max([self.values, *(leaf.numel() for leaf in tree_leaves(result)
                                          if isinstance(leaf, torch.Tensor))])
        return result


@pytest.mark.parametrize("options", OHEM[:2], ids=str)
def test_no_map_of_the_full_size_is_made_or_kept(options):
    logits, labels = make_batch(19, 8, 9, 9, images=2)
    full = 19 * labels.numel()
    largest, kept = [], []
    for kind in (lambda term: term, FullSize):
        saved, criterion = [], SegmentationCriterion({"fine": 1}, **options)
        criterion.terms["fine"] = kind(criterion.terms["fine"])
        with (torch.autograd.graph.saved_tensors_hooks(lambda x, saved=saved: saved.append(x.nbytes) or x, lambda x: x),
              LargestTensor() as made):
            criterion({"fine": logits.requires_grad_()}, labels)
        largest.append(made.values)
        kept.append(sum(saved))
    assert largest[0] <= max(full // 7, labels.numel()) and largest[1] >= full      # a ninth, if not for the last row
    assert kept[0] <= logits.nbytes + 1000 and kept[1] >= 4 * full
