"""Efficient Channel Attention against timm."""

import pytest
import timm.layers
import torch

from networks.backbones.eca import ECA


@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_equals_timm(kernel):
    ours, theirs = ECA(kernel).double(), timm.layers.EcaModule(kernel_size=kernel).double()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 16, 5, 7, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(x)
    a, b = (torch.autograd.grad((m(x) * weight).sum(), [x, m.conv.weight]) for m in (ours, theirs))
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("amp", [None, torch.bfloat16])
def test_with_a_shortcut_it_is_timm_and_an_addition(layout, amp):
    ours, theirs = ECA(3), timm.layers.EcaModule(kernel_size=3)
    theirs.load_state_dict(ours.state_dict())
    x, shortcut, weight = (torch.randn(2, 16, 5, 7, dtype=amp).to(memory_format=layout) for _ in range(3))
    exact = [one.double().requires_grad_() for one in (x, shortcut)]
    rounded = [one.requires_grad_() for one in (x, shortcut)]
    expected = theirs.double()(exact[0]) + exact[1]
    with torch.autocast("cpu", amp or torch.bfloat16, enabled=amp is not None):
        actual = ours(*rounded)
    bound = {"rtol": 1e-5, "atol": 1e-5} if amp is None else {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close(actual.double(), expected, **bound)
    a = torch.autograd.grad((actual * weight).sum(), [*rounded, ours.conv.weight])
    b = torch.autograd.grad((expected * weight.double()).sum(), [*exact, theirs.conv.weight])
    for one, other in zip(a, b, strict=True):
        assert one.dtype == (torch.float32 if other is b[2] else x.dtype)
        torch.testing.assert_close(one.double(), other, **bound)
    assert a[0].is_contiguous(memory_format=layout)


def test_its_backward_pass_is_the_derivative():
    eca = ECA(3).double()
    x, shortcut = (torch.randn(2, 5, 3, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda x, shortcut, kernel: torch.func.functional_call(
        eca, {"conv.weight": kernel}, (x, shortcut)), (x, shortcut, eca.conv.weight))
    once, = torch.autograd.grad(eca(x, shortcut).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        once.sum().backward()


def test_even_kernel_is_refused():
    with pytest.raises(ValueError, match="odd"):
        ECA(4)
