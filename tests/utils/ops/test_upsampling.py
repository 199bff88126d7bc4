"""Upsampling by two matrix products, as on a GPU, against PyTorch's."""

import pytest
import torch
import torch.nn.functional as F

from loss import criterion
from utils.ops.upsampling import upsample_by_matmul, upsampling_matrix


@pytest.mark.parametrize("small, size", [((5, 7), (33, 49)), ((1, 3), (4, 17)), ((4, 1), (4, 1)), ((9, 9), (5, 6))])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_products_equal_interpolation(small, size, memory_format):
    torch.manual_seed(0)
    maps = torch.randn(2, 3, *small).contiguous(memory_format=memory_format).requires_grad_()
    weights = torch.randn(2, 3, *size)
    actual, expected = upsample_by_matmul(maps, size), F.interpolate(maps, size, mode="bilinear", align_corners=True)
    assert actual.is_contiguous() and actual.shape == expected.shape
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    ours, theirs = (torch.autograd.grad((result * weights).sum(), maps)[0] for result in (actual, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-5)


def test_a_matrix_first_made_in_evaluation_serves_training():
    upsampling_matrix.cache_clear()
    maps = torch.randn(1, 2, 3, 3)
    with torch.inference_mode():
        upsample_by_matmul(maps.clone(), (17, 17))
    maps.requires_grad_()
    upsample_by_matmul(maps, (17, 17)).sum().backward()
    assert maps.grad.sum() == pytest.approx(2 * 17 * 17, rel=1e-5)


def test_half_precision_around_it_changes_nothing():
    maps = torch.randn(1, 2, 3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(upsample_by_matmul(maps, (9, 9)), upsample_by_matmul(maps.clone(), (9, 9)))
        assert upsample_by_matmul(maps, (9, 9)).dtype == torch.float32


def test_the_loss_takes_the_products_on_a_gpu(monkeypatch):
    """Where a map says it is on a GPU, no interpolation is called."""
    labels = torch.randint(4, (2, 33, 33))
    outputs = {name: torch.randn(2, 4, 5, 5) for name in ("fine", "coarse", "aux")}
    loss = criterion.SegmentationCriterion()
    expected = loss(outputs, labels)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(F, "interpolate", None)
    for name, actual in loss(outputs, labels).items():
        torch.testing.assert_close(actual, expected[name], rtol=1e-6, atol=1e-6)
