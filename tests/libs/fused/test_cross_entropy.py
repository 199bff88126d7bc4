"""Kernels of the loss in Triton's interpreter."""

import pytest
import torch

from loss.upsampled import UpsampledCrossEntropy, find_operators
from tests.loss import test_upsampled as upsampled

cross_entropy = pytest.importorskip("libs.fused.cross_entropy", reason="Triton is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")      # of NumPy, about infinite values


@pytest.mark.parametrize("classes, step, height, width, layout, label_dtype, tile, plain", [
    (2, 8, 2, 3, torch.Tensor.clone, torch.uint8, 512, True),
    (11, 8, 1, 1, upsampled.channels_last, torch.int32, 512, False),
    (11, 8, 1, 2, torch.Tensor.clone, torch.uint8, 512, True),
    (19, 8, 2, 2, upsampled.channels_last, torch.uint8, 1024, False),
    (19, 3, 2, 2, upsampled.part_of_a_larger_tensor, torch.int64, 512, True),
    (5, 16, 2, 1, upsampled.channels_last, torch.uint8, 2048, False),
    (150, 4, 2, 1, torch.Tensor.clone, torch.int64, 1024, False),
    (254, 2, 1, 2, upsampled.channels_last, torch.uint8, 2048, True)])
def test_values_and_gradients(classes, step, height, width, layout, label_dtype, tile, plain, monkeypatch):
    """Without weights, or with weights and a selection of pixels. Larger tiles take the interpreter less time."""
    monkeypatch.setattr(cross_entropy, "TILE", tile)
    logits, labels = upsampled.make_batch(classes, step, height, width, images=2 if step == 3 else 1, ignored=0.1,
                                          dtype=torch.float16 if layout is upsampled.channels_last else torch.float32,
                                          label_dtype=label_dtype)
    options = [] if plain else [upsampled.weights_of(classes), torch.rand(labels.shape) < 0.6]
    upsampled.check(cross_entropy, layout(logits), labels, *options)


def test_infinite_logits_and_nan():
    upsampled.check_special_values(cross_entropy)


def test_everything_ignored():
    upsampled.check_ignored(cross_entropy)


def test_criterion():
    """The head "fine" with OHEM, the others without."""
    sums = upsampled.check_criterion("triton", **upsampled.OHEM[1])
    assert 0 < sums["fine"][1] < sums["coarse"][1]


def test_a_label_without_a_class_makes_the_sum_nan():
    """PyTorch's operators raise an error, for which a GPU would have to be waited for."""
    labels = torch.tensor([[[3]]])
    for class_weights in (None, upsampled.weights_of(3)):
        assert cross_entropy.sums(torch.zeros(1, 3, 1, 1), labels, 255, class_weights)[0][0].isnan()


def test_the_gradient_has_the_dtype_of_the_logits():
    logits, labels = upsampled.make_batch(3, 2, 1, 2, ignored=0, dtype=torch.float16)
    *_, gradient = upsampled.in_float64(logits, labels)
    logits.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        sums = UpsampledCrossEntropy.apply(logits, cross_entropy, labels, 255, None, None)
    (sums[0] / 8).backward()
    assert sums.dtype == torch.float32 and logits.grad.dtype == torch.float16
    torch.testing.assert_close(logits.grad.double(), gradient / 8, rtol=1e-3, atol=1e-4)


def test_what_is_supported():
    logits = torch.zeros(1, 2, 3, 3)
    assert find_operators("triton", logits, (17, 17)) is cross_entropy
    assert find_operators("triton", logits, (33, 33)) is cross_entropy
    for unsupported, size in ((logits, (65, 65)), (logits, (16, 16)), (logits, (3, 3)), (logits.double(), (17, 17))):
        assert find_operators("triton", unsupported, size) is None


def test_examples():
    for name, (result, expected) in cross_entropy.examples(torch.device("cpu"), torch.float32).items():
        assert (result - expected).norm() <= 1e-6 * expected.norm(), name
