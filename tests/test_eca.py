"""Efficient Channel Attention against timm."""

import pytest
import timm.layers
import torch

from networks.eca import ECA


@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_equals_timm(kernel):
    ours, theirs = ECA(kernel).double(), timm.layers.EcaModule(kernel_size=kernel).double()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 16, 5, 7, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(x)
    a, b = (torch.autograd.grad((m(x) * weight).sum(), [x, m.conv.weight]) for m in (ours, theirs))
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_even_kernel_is_refused():
    with pytest.raises(ValueError, match="odd"):
        ECA(4)
