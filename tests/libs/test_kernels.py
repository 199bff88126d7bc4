"""Calls of the kernels that exist on CUDA alone, on stand-ins for the CPU."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from libs import kernels
from libs.abn import InPlaceABNSync
from utils.ops.normalization import Normalization


def backward_elemt(dy, x, mean, invstd, weight, sum_dy, sum_dy_xmu, counts):
    """torch.batch_norm_backward_elemt written out; like the kernel it takes int32 counts alone."""
    assert counts.dtype == torch.int32 and counts.ndim == 1
    mean, invstd, weight, sum_dy, sum_dy_xmu = (
        values[:, None, None] for values in (mean, invstd, weight, sum_dy, sum_dy_xmu))
    total = counts.sum()
    return (dy - sum_dy / total - (x - mean) * invstd ** 2 * sum_dy_xmu / total) * invstd * weight


@pytest.mark.parametrize("count", [90, torch.tensor([60.0, 30.0])], ids=["alone", "of several processes"])
def test_the_gradient_of_the_input(count, monkeypatch):
    monkeypatch.setattr(torch, "batch_norm_backward_elemt", backward_elemt)
    x = torch.randn(3, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    gamma, beta = torch.rand(4, dtype=torch.float64) + 0.5, torch.randn(4, dtype=torch.float64)
    z = F.batch_norm(x, None, None, gamma, beta, True, eps=1e-5)
    dz = torch.randn_like(z)
    z.backward(dz)
    normal = (z - beta[:, None, None]) / gamma[:, None, None]
    totals = torch.stack([dz.sum((0, 2, 3)), (normal * dz).sum((0, 2, 3))]).detach()
    invstd = (x.var((0, 2, 3), correction=0) + 1e-5).rsqrt().detach()
    actual = kernels.backward_elements(z.detach(), dz, beta, 1 / gamma, gamma * invstd, totals, count)
    torch.testing.assert_close(actual, x.grad, rtol=1e-9, atol=1e-9)


class NoListBecomesATensor(TorchDispatchMode):
    """On a GPU that is a copy for which the host waits."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten.lift_fresh.default, "a tensor was made from a list or number"
        return function(*args, **(kwargs or {}))


class Twice:
    """An exchange with one other part that is equal."""

    def gather(self, tensor):
        return [tensor, tensor]

    def all_reduce(self, tensor):
        return 2 * tensor


def test_no_tensor_is_made_from_a_list(monkeypatch):
    norm = InPlaceABNSync(4)
    monkeypatch.setattr(norm, "_find_peers", lambda x: Twice())
    x = torch.randn(3, 4, 5, 6)
    expected = F.leaky_relu(F.batch_norm(x, None, None, torch.full((4,), 1 + 1e-5), None, True), 0.01)
    with NoListBecomesATensor():
        actual = norm(x.clone())
    torch.testing.assert_close(actual, expected)
    images = torch.randint(256, (2, 3, 5, 6), dtype=torch.uint8)
    expected = (images.numpy() - np.array([[[1.5]], [[2]], [[3]]])) / np.array([[[4]], [[5]], [[0.5]]])
    with NoListBecomesATensor():
        actual = Normalization("RGB", (1.5, 2.0, 3.0), (4.0, 5.0, 0.5))(images)
    torch.testing.assert_close(actual, torch.from_numpy(expected).float())
    with pytest.raises(AssertionError, match="from a list or number"), NoListBecomesATensor():
        torch.ones(2).new_tensor([3])
