"""Losses against a sort in NumPy."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from loss import ohem, strips
from loss.criterion import SegmentationCriterion
from loss.ohem import OhemCrossEntropy, keep_hardest, kth_smallest


def numpy_ohem(logits, labels, thres, min_kept, ignore_index=255):
    """The definition: sort the true classes' probabilities, keep p <= max(thres, k-th smallest)."""
    logits, labels = np.moveaxis(logits, 1, -1).reshape(-1, logits.shape[1]), labels.reshape(-1)
    logits, labels = logits[labels != ignore_index], labels[labels != ignore_index]
    if not len(labels):
        return 0.0, 0
    shifted = logits - logits.max(1, keepdims=True)
    p = (np.exp(shifted) / np.exp(shifted).sum(1, keepdims=True))[np.arange(len(labels)), labels]
    k_th = np.sort(p)[min(min_kept, len(p)) - 1] if min_kept else 0
    kept = p[p <= max(thres, k_th)]
    return float(-np.log(kept).sum()), len(kept)


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0, 1), st.integers(0, 90), st.floats(0, 1))
def test_ohem_equals_a_sort(seed, thres, min_kept, ignored):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(2, 4, 5, 8)) * 3
    labels = np.where(rng.uniform(size=(2, 5, 8)) < ignored, 255, rng.integers(4, size=(2, 5, 8)))
    total, count = OhemCrossEntropy(thres, min_kept).sums(torch.tensor(logits), torch.tensor(labels))
    expected_total, expected_count = numpy_ohem(logits, labels, thres, min_kept)
    assert int(count) == expected_count
    assert float(total) == pytest.approx(expected_total, rel=1e-10)


def test_ties_with_the_kth_are_kept():
    logits = torch.tensor([3.0, 1.0, 1.0, 1.0, 5.0]).view(1, 1, 1, 5)
    logits = torch.cat([logits, torch.zeros_like(logits)], dim=1).double()
    labels = torch.zeros(1, 1, 5, dtype=torch.uint8)
    _, count = OhemCrossEntropy(thres=0.0, min_kept=2).sums(logits, labels)
    assert int(count) == 3
    assert int(OhemCrossEntropy(0.0, 4).sums(logits, labels)[1]) == 4
    assert int(OhemCrossEntropy(0.999, 1).sums(logits, labels)[1]) == 5


def test_threshold_itself_is_hard():
    logits = torch.zeros(1, 2, 1, 6)      # p is exactly one half everywhere
    labels = torch.zeros(1, 1, 6, dtype=torch.long)
    assert int(OhemCrossEntropy(0.5, 0).sums(logits, labels)[1]) == 6
    assert int(OhemCrossEntropy(0.4999, 0).sums(logits, labels)[1]) == 0


def test_fewer_valid_pixels_than_k():
    logits, labels = torch.randn(1, 3, 4, 4), torch.full((1, 4, 4), 255)
    labels[0, 0, :3] = torch.tensor([0, 1, 2])
    actual = OhemCrossEntropy(0.0, 10)(logits, labels)
    torch.testing.assert_close(actual, F.cross_entropy(logits, labels, ignore_index=255))
    actual = OhemCrossEntropy(0.0, 10**9)(logits, labels)
    torch.testing.assert_close(actual, F.cross_entropy(logits, labels, ignore_index=255))


@pytest.mark.parametrize("ohem", [False, True])
def test_everything_ignored_is_zero_with_a_finite_gradient(ohem):
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    labels = torch.full((2, 16, 16), 255, dtype=torch.uint8)
    criterion = SegmentationCriterion(ohem=ohem)
    losses = criterion({"fine": logits, "coarse": logits, "aux": logits}, labels)
    assert all(loss == 0 for loss in losses.values())
    criterion.total(losses).backward()
    assert (logits.grad == 0).all()


def test_gradient_comes_from_kept_pixels_only():
    logits = torch.randn(2, 3, 6, 6, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(3, (2, 6, 6))
    labels[0, :2] = 255
    OhemCrossEntropy(0.0, 7)(logits, labels).backward()
    assert int(logits.grad.abs().sum(1).count_nonzero()) == 7
    assert torch.autograd.gradcheck(lambda x: OhemCrossEntropy(0.3, 5)(x, labels), logits)


def test_a_loss_that_is_not_a_number_is_not_hidden():
    logits = torch.randn(1, 3, 4, 4)
    logits[0, :, 2, 2] = math.nan
    labels = torch.zeros(1, 4, 4, dtype=torch.long)
    for min_kept in (0, 3):
        assert OhemCrossEntropy(0.7, min_kept)(logits, labels).isnan()


def test_criterion_terms_are_cross_entropies_at_label_size():
    outputs = {name: torch.randn(2, 5, 9, 9) for name in ("fine", "coarse", "aux")}
    labels = torch.randint(5, (2, 65, 65))
    labels[:, :7] = 255
    criterion = SegmentationCriterion()
    assert criterion.weights == {"fine": 0.7, "coarse": 0.6, "aux": 0.4}
    losses = criterion(outputs, labels)
    for name, logits in outputs.items():
        large = F.interpolate(logits, size=(65, 65), mode="bilinear", align_corners=True)
        torch.testing.assert_close(losses[name], F.cross_entropy(large, labels, ignore_index=255))
    expected = 0.7 * losses["fine"] + 0.6 * losses["coarse"] + 0.4 * losses["aux"]
    torch.testing.assert_close(criterion.total(losses), expected)


def test_sums_of_parts_make_the_whole():
    """What several devices hand out adds up, whatever the number of labeled pixels in each part."""
    outputs = {name: torch.randn(4, 5, 9, 9, dtype=torch.float64) for name in ("fine", "coarse", "aux")}
    labels = torch.randint(5, (4, 33, 33))
    labels[0] = 255
    labels[1, :20] = 255
    criterion = SegmentationCriterion()
    whole = criterion(outputs, labels)
    parts = [criterion.sums({n: o[i:i + 1] for n, o in outputs.items()}, labels[i:i + 1]) for i in range(4)]
    for name, loss in whole.items():
        torch.testing.assert_close(criterion.combine({name: sum(part[name] for part in parts)})[name], loss)
        divisors = criterion.divisors(labels)
        shares = [criterion.combine({name: part[name]}, divisors, parts=4)[name] for part in parts]
        torch.testing.assert_close(sum(shares), loss)


def test_ohem_keep_counts_for_every_two_images():
    outputs = {name: torch.randn(4, 5, 9, 9) for name in ("fine", "coarse", "aux")}
    labels = torch.randint(5, (4, 33, 33), dtype=torch.uint8)
    criterion = SegmentationCriterion(ohem=True, ohem_thres=0.0, ohem_keep=100)
    sums = criterion.sums(outputs, labels)
    assert {name: int(count) for name, (_, count) in sums.items()} == {
        "fine": 200, "coarse": labels.numel(), "aux": labels.numel()}


def test_half_precision_logits_are_summed_in_float32():
    outputs = {"fine": torch.randn(1, 19, 17, 17)}
    labels = torch.randint(19, (1, 129, 129))
    exact = SegmentationCriterion()({"fine": outputs["fine"].bfloat16().double()}, labels)["fine"]
    actual = SegmentationCriterion()({"fine": outputs["fine"].bfloat16()}, labels)["fine"]
    assert actual.dtype == torch.float32
    assert float(actual) == pytest.approx(float(exact), rel=1e-5)


def test_base_network_has_no_coarse_term():
    losses = SegmentationCriterion()({"fine": torch.randn(1, 3, 4, 4), "aux": torch.randn(1, 3, 4, 4)},
                                     torch.randint(3, (1, 25, 25)))
    assert set(losses) == {"fine", "aux"}


class OnADevice(torch.Tensor):
    """Takes the way of a GPU."""

    is_cpu = False


@pytest.mark.parametrize("make", [torch.Tensor.clone, OnADevice], ids=["cpu", "device"])
def test_the_kth_smallest_is_that_of_a_sort(make, monkeypatch):
    values = torch.randn(500).round(decimals=1)     # with ties
    values[::7] = -torch.inf
    ordered = values.sort().values
    monkeypatch.setattr(torch.Tensor, "kthvalue", None)
    for k in (1, 2, 250, 499, 500):
        assert float(kth_smallest(make(values), k)) == ordered[k - 1]


class _Parts:
    """Stands for processes: what one of them gives is met by what the others, told beforehand, give."""

    def __init__(self, others):
        self.others, self.size, self.exchanges = others, len(others) + 1, 0

    def gather(self, tensor):
        self.exchanges += 1
        return [tensor, *(losses.topk(len(tensor)).values for losses in self.others)]


def test_shared_ohem_takes_one_exchange(monkeypatch):
    torch.manual_seed(0)
    losses, valid = torch.rand(4, 50), torch.ones(4, 50, dtype=torch.bool)
    expected = keep_hardest(losses.flatten(), valid.flatten(), 0.0, 23).view(4, 50)
    parts = _Parts(list(losses[1:]))
    actual = keep_hardest(losses[0], valid[0], 0.0, 23, parts)
    assert actual.tolist() == expected[0].tolist() and 0 < actual.sum() < 23 and parts.exchanges == 1

    logits, labels = torch.randn(4, 3, 5, 5), torch.randint(3, (4, 9, 9))
    criterion = SegmentationCriterion(ohem=True, ohem_thres=0.0, ohem_keep=40)
    expected, losses = criterion.sums({"fine": logits}, labels)["fine"], F.cross_entropy(
        F.interpolate(logits, (9, 9), mode="bilinear", align_corners=True), labels, reduction="none").flatten(1)
    for strip in (strips.STRIP, 1):         # from upsampled logits, and in strips
        monkeypatch.setattr(strips, "STRIP", strip)
        shares = []
        for image in range(4):
            parts = _Parts([losses[other] for other in range(4) if other != image])
            monkeypatch.setattr(ohem, "find_peers", lambda parts=parts: parts)
            shares.append(criterion.sums({"fine": logits[image:image + 1]}, labels[image:image + 1])["fine"])
            assert parts.exchanges == 1
        torch.testing.assert_close(sum(shares), expected)
    assert 0 < expected[1] < labels.numel()
