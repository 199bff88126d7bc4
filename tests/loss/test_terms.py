"""Focal, Dice and Lovász losses: against other packages and the definition, and the same however a batch is shared."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import sigmoid_focal_loss

import train
from loss import strips
from loss.criterion import SegmentationCriterion
from loss.cross_entropy import CrossEntropy
from loss.focal import FocalLoss
from loss.ohem import BatchOhemCrossEntropy
from loss.regions import DiceLoss, LovaszSoftmax, lovasz_gradient
from loss.terms import TERMS, choose_terms
from utils.common.errors import UserError
from utils.parallel.replicas import ThreadReplicas

NEW = {"focal": FocalLoss, "dice": DiceLoss, "lovasz": LovaszSoftmax}
PRESENT = [0, 1, 3]         # classes with true pixels


def make_batch(classes=5, images=4, side=9, dtype=torch.float64):
    """Logits and labels with a different number of labeled pixels in each image, and of some classes only."""
    torch.manual_seed(classes)
    logits = 2 * torch.randn(images, classes, side, side, dtype=dtype)
    labels = torch.tensor([number for number in PRESENT if number < classes])[
        torch.randint(len([n for n in PRESENT if n < classes]), (images, side, side))].to(torch.uint8)
    labels[0, :4], labels[1] = 255, 255
    return logits, labels


def smp_losses():
    return pytest.importorskip("segmentation_models_pytorch.losses", reason="an oracle")


def value_and_gradient(function, logits):
    logits = logits.detach().clone().requires_grad_()
    value = function(logits)
    return value.detach(), torch.autograd.grad(value, logits)[0]


def same(actual, expected, **tolerance):
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


def test_focal_loss_is_that_of_other_packages():
    smp_losses()
    from segmentation_models_pytorch.losses._functional import softmax_focal_loss_with_logits

    def expected(logits):
        valid = labels != 255
        return softmax_focal_loss_with_logits(logits.movedim(1, -1)[valid], labels[valid].long())
    logits, labels = make_batch()
    same(value_and_gradient(lambda x: FocalLoss()(x, labels), logits), value_and_gradient(expected, logits))

    def binary(logits):         # a softmax over two classes is a sigmoid of the difference
        difference, true = (logits[:, 1] - logits[:, 0])[labels != 255], labels[labels != 255]
        alpha = torch.tensor([0.5, 2.0], dtype=torch.float64)[true.long()]
        return (alpha * sigmoid_focal_loss(difference, true.double(), alpha=-1)).sum() / alpha.sum()
    logits, labels = make_batch(2)
    same(value_and_gradient(lambda x: FocalLoss(class_weights=[0.5, 2])(x, labels), logits),
         value_and_gradient(binary, logits))


@pytest.mark.parametrize("class_weights", [None, [1.0, 3.0, 1.0, 0.5, 2.0]], ids=["", "weights"])
def test_dice_loss_is_that_of_another_package(class_weights):
    """Per class there, of which we take the weighted mean over those that have true pixels."""
    smp = smp_losses()
    logits, labels = make_batch()
    weights = torch.ones(5) if class_weights is None else torch.tensor(class_weights)

    def expected(logits):
        losses = [smp.DiceLoss("multiclass", classes=[number], ignore_index=255)(logits, labels.long())
                  for number in PRESENT]
        return sum(weights[number] * loss for number, loss in zip(PRESENT, losses, strict=True)
                   ) / weights[PRESENT].sum()
    same(value_and_gradient(lambda x: DiceLoss(class_weights=class_weights)(x, labels), logits),
         value_and_gradient(expected, logits))


def test_lovasz_loss_is_that_of_another_package():
    smp = smp_losses()
    logits, labels = make_batch(dtype=torch.float32)        # theirs counts in float32
    same(value_and_gradient(lambda x: LovaszSoftmax()(x, labels), logits), value_and_gradient(
        lambda x: smp.LovaszLoss("multiclass", ignore_index=255)(x, labels.long()), logits), rtol=1e-4, atol=1e-6)


def lovasz_by_thresholds(logits, labels, weights):
    """The definition, in NumPy: the integral over thresholds of the Jaccard losses of pixels with errors above."""
    shifted = np.exp(logits - logits.max(1, keepdims=True))
    probabilities = np.moveaxis(shifted / shifted.sum(1, keepdims=True), 1, -1)[labels != 255]      # (P, N)
    losses = []
    for number in np.unique(labels[labels != 255]):
        true = labels[labels != 255] == number
        errors = np.where(true, 1 - probabilities[:, number], probabilities[:, number])
        thresholds = np.concatenate([[0], np.unique(errors)])
        losses.append(sum(
            (high - low) * np.sum(errors >= high) / np.sum(true | (errors >= high))
            for low, high in zip(thresholds, thresholds[1:], strict=False)))
    return np.average(losses, weights=weights[np.unique(labels[labels != 255])])


def test_lovasz_is_an_integral_over_thresholds():
    for classes, images, rounded in ((5, 4, False), (2, 3, False), (5, 2, True)):
        logits, labels = make_batch(classes, images)
        logits = logits.round() if rounded else logits          # errors with ties
        for weights in (np.ones(classes), np.linspace(0.25, 2, classes, dtype=np.float32)):
            actual = LovaszSoftmax(class_weights=weights)(logits, labels)
            expected = lovasz_by_thresholds(logits.numpy(), labels.numpy(), weights)
            assert float(actual) == pytest.approx(expected, rel=1e-12)


def test_lovasz_gradient_keeps_its_digits_among_many_pixels():
    """The differences of float32 Jaccard losses, as usual code has them, are wrong by a third among 4 million."""
    errors, true = torch.rand(1_000_000), torch.rand(1_000_000) < 0.01
    torch.testing.assert_close(lovasz_gradient(errors, true).double(), lovasz_gradient(errors.double(), true),
                               rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", NEW)
def test_gradients(name):
    logits, labels = make_batch(images=2, side=4)
    labels[0, 2:, 1:] = 3
    assert torch.autograd.gradcheck(lambda x: NEW[name]()(x, labels), logits.requires_grad_())


@pytest.mark.parametrize("name", NEW)
def test_ignored_pixels_change_nothing(name):
    logits, labels = make_batch()
    value, gradient = value_and_gradient(lambda x: NEW[name]()(x, labels), logits)
    others = logits.where((labels != 255)[:, None], 1000 * torch.randn_like(logits))
    same(value_and_gradient(lambda x: NEW[name]()(x, labels), others), (value, gradient))
    assert not gradient.movedim(1, -1)[labels == 255].any()
    relabeled = NEW[name](ignore_index=2)(logits, labels.where(labels != 255, 2))        # a number of a class
    torch.testing.assert_close(relabeled, value)
    nothing = value_and_gradient(lambda x: NEW[name]()(x, torch.full_like(labels, 255)), logits)
    assert nothing[0] == 0 and not nothing[1].any()


@pytest.mark.parametrize("name", NEW)
def test_a_pixel_that_is_not_a_number_is_not_hidden(name):
    logits, labels = make_batch()
    logits[3, :, 2, 2] = math.nan
    assert NEW[name]()(logits, labels).isnan()


class Rows(torch.nn.Module):
    """What each device hands out, as `NetworkWithLoss` does."""

    def __init__(self, criterion):
        super().__init__()
        self.criterion = criterion

    def forward(self, logits, labels):
        return {name: sums[None] for name, sums in self.criterion.sums({"fine": logits}, labels).items()}


@pytest.mark.parametrize("class_weights", [None, [1.0, 3.0, 1.0, 0.5, 2.0]], ids=["", "weights"])
@pytest.mark.parametrize("devices", [2, 4])
def test_devices_that_share_a_batch_compute_its_loss(devices, class_weights):
    logits, labels = make_batch(side=3)
    labels = labels.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, :17, :17]
    criterion = SegmentationCriterion({"fine": 1.0}, loss="ce+0.5*focal+2*dice+lovasz", class_weights=class_weights)
    shared = ThreadReplicas(Rows(criterion), devices)
    actual = value_and_gradient(lambda x: criterion.total(criterion.combine(
        {name: rows.sum(0) for name, rows in shared(x, labels).items()})), logits)
    same(actual, value_and_gradient(lambda x: criterion.total(criterion({"fine": x}, labels)), logits), rtol=1e-12,
         atol=1e-14)
    assert actual[1][1].abs().sum() == 0 and actual[1][2].abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NEW)
def test_half_precision_is_computed_in_float32(name, dtype):
    logits, labels = make_batch(dtype=dtype)
    criterion = SegmentationCriterion({"fine": 1.0}, loss=name)
    value, gradient = value_and_gradient(lambda x: criterion({"fine": x}, labels)["fine"], logits.double())
    with torch.autocast("cpu", torch.bfloat16):
        half = value_and_gradient(lambda x: criterion({"fine": x}, labels)["fine"], logits)
    assert half[0].dtype == torch.float32 and half[1].dtype == dtype
    assert float(half[0]) == pytest.approx(float(value), rel=1e-6)
    torch.testing.assert_close(half[1].double(), gradient, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


class OnADevice(torch.Tensor):
    """Takes the way of a GPU."""

    is_cpu = False


def test_lovasz_does_not_skip_classes_on_a_device():
    """There the host would have to wait, to know which ones have true pixels."""
    logits, labels = make_batch()
    expected = value_and_gradient(lambda x: LovaszSoftmax()(x, labels), logits)
    actual = value_and_gradient(lambda x: LovaszSoftmax()(x, labels.as_subclass(OnADevice)), logits)
    same([value.as_subclass(torch.Tensor) for value in actual], expected)


def test_lovasz_keeps_what_its_docstring_counts():
    logits, labels = make_batch(19, 2, 17, torch.float32)
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
            lambda x: kept.update({x.data_ptr(): x.untyped_storage().nbytes()}) or x, lambda x: x):
        LovaszSoftmax().sums(logits.requires_grad_(), labels)
    assert sum(kept.values()) <= 9 * logits.numel() + 10 * labels.numel()


def test_terms_of_heads():
    heads = {"fine": 0.7, "coarse": 0.6, "aux": 0.4}
    criterion = SegmentationCriterion()
    assert criterion.weights == heads and {type(term) for term in criterion.terms.values()} == {CrossEntropy}
    criterion = SegmentationCriterion(loss="fine=ce+0.5*dice,aux=lovasz", ohem=True)
    assert criterion.weights == {"fine_ohem": 0.7, "fine_dice": 0.35, "coarse": 0.6, "aux": 0.4}
    assert list(map(type, criterion.terms.values())) == [BatchOhemCrossEntropy, DiceLoss, CrossEntropy, LovaszSoftmax]
    assert choose_terms("ce + lovasz, aux = 2 * focal", heads) == {
        "fine": {"ce": 1, "lovasz": 1}, "coarse": {"ce": 1, "lovasz": 1}, "aux": {"focal": 2}}
    assert choose_terms("fine=ohem", heads, ohem=True) == choose_terms("ce", heads, ohem=True)
    for text, ohem, message in (("tail=ce", False, "^--loss: expected heads from fine, coarse, aux, those .*'tail'$"),
                                ("dice", True, "^--ohem 1: expected cross-entropy .* --loss dice; add the term")):
        with pytest.raises(UserError, match=message):
            choose_terms(text, heads, ohem=ohem)


@pytest.mark.parametrize("text", [
    "", "iou", "ce+", "ce+ce", "ce,dice", "fine=ce,fine=dice", "0*ce", "-1*ce", "nan*ce", "*ce", "ce\n", "fine=",
    "0.5 ce", f"1{'0' * 400}*ce"])
def test_senseless_terms_are_a_sentence(text):
    with pytest.raises(UserError) as caught:
        choose_terms(text, ("fine", "aux"))
    message = str(caught.value)
    assert message.startswith("--loss: expected TERMS or HEAD=TERMS") and "\n" not in message and len(message) < 300
    assert message.endswith(f"each of ce, ohem, focal, dice, lovasz once, found {text[:80]!r}")


def test_terms_that_cannot_be_split_refuse_parts(tmp_path):
    assert choose_terms("ohem+focal", ("fine", "aux"), parts=4)["aux"] == {"ohem": 1, "focal": 1}
    assert [name for name, term in TERMS.items() if term.needs_whole_batch] == ["dice", "lovasz"]
    with pytest.raises(UserError, match="^--accumulate 2: expected a --loss of terms .* found lovasz, whose"):
        train.main(["--data-dir", str(tmp_path), "--gpu", "cpu", "--snapshot-dir", str(tmp_path / "run"),
                    "--accumulate", "2", "--loss", "aux=lovasz"])


def test_cross_entropy_beside_other_terms_needs_no_upsampled_logits(monkeypatch):
    monkeypatch.setattr(strips, "STRIP", 1)
    logits, labels = torch.randn(1, 5, 4, 4, requires_grad=True), torch.randint(5, (1, 25, 25))
    criterion = SegmentationCriterion({"fine": 1.0}, loss="ce+dice+focal")
    sums = criterion.sums({"fine": logits}, labels)
    assert ["UpsampledCrossEntropy" in value.grad_fn.name() for value in sums.values()] == [True, False, False]
    large = F.interpolate(logits, (25, 25), mode="bilinear", align_corners=True)
    losses = criterion.combine(sums)
    for name, term in (("fine_ce", F.cross_entropy(large, labels)), ("fine_dice", DiceLoss()(large, labels)),
                       ("fine_focal", FocalLoss()(large, labels))):
        torch.testing.assert_close(losses[name], term)
