"""Synchronized norms over gloo processes with unequal parts, against nn.BatchNorm2d on the whole batch.

This module is imported before any process group exists, as users do.
"""

import pytest
import torch
from torch import nn

from libs.abn import ABNSync, InPlaceABNSync
from tests.conftest import in_processes

SPLITS = {2: (5, 2), 3: (1, 4, 2)}


def layers(kind, activation):
    """Two synchronized norms in a row, with convolutions, and the same of torch's own parts."""
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Conv2d(3, 5, 3), kind(5, activation=activation), nn.Conv2d(5, 4, 1), kind(4))
    act = {"leaky_relu": nn.LeakyReLU(0.01), "elu": nn.ELU(0.01), "identity": nn.Identity(), "relu": nn.ReLU()}
    plain = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Sequential(nn.BatchNorm2d(5), act[activation]), nn.Conv2d(5, 4, 1),
                          nn.Sequential(nn.BatchNorm2d(4), nn.LeakyReLU(0.01)))
    extra = 1e-5 if kind is InPlaceABNSync else 0
    with torch.no_grad():
        for i in (1, 3):
            ours[i].weight.uniform_(0.5, 2), ours[i].bias.normal_()
            plain[i][0].weight.copy_(ours[i].weight + extra), plain[i][0].bias.copy_(ours[i].bias)
            plain[i - 1].load_state_dict(ours[i - 1].state_dict())
    return ours, plain


def batch():
    torch.manual_seed(1)
    return torch.randn(7, 3, 8, 6) * 2 + 1, torch.randn(7, 4, 6, 4)


def work(rank, world, folder, kind, activation):
    ours, _ = layers(kind, activation)
    x, dy = (t.split(SPLITS[world])[rank] for t in batch())
    x = x.clone().requires_grad_()
    y = ours(x)
    grads = torch.autograd.grad((y * dy).sum(), [x, *ours.parameters()])
    torch.save({"y": y.detach(), "x": grads[0], "parameters": grads[1:], "buffers": list(ours.buffers())},
               f"{folder}/{rank}.pth")


@pytest.mark.parametrize("world, kind, activation", [(2, InPlaceABNSync, "leaky_relu"), (3, InPlaceABNSync, "elu"),
                                                     (2, ABNSync, "relu")])
def test_processes_share_the_statistics_of_the_whole_batch(tmp_path, world, kind, activation):
    in_processes(work, world, str(tmp_path), kind, activation, count=world)
    parts = [torch.load(tmp_path / f"{rank}.pth", weights_only=True) for rank in range(world)]
    _, plain = layers(kind, activation)
    x, dy = batch()
    x.requires_grad_()
    y = plain(x)
    expected = torch.autograd.grad((y * dy).sum(), [x, *plain.parameters()])
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(torch.cat([part["y"] for part in parts]), y, **close)
    torch.testing.assert_close(torch.cat([part["x"] for part in parts]), expected[0], **close)
    for actual, value in zip(zip(*(part["parameters"] for part in parts), strict=True), expected[1:], strict=True):
        torch.testing.assert_close(sum(actual), value, rtol=1e-5, atol=1e-4)
    buffers = [b for b in plain.buffers()]
    for part in parts:
        for actual, value in zip(part["buffers"], buffers, strict=True):
            torch.testing.assert_close(actual, value, **close)
