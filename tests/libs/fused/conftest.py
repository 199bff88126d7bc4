"""Fixtures of the tests of Triton's kernels, which its interpreter runs on the CPU."""

import collections

import pytest

from libs.fused import launch


@pytest.fixture
def launches(monkeypatch):
    """{name of a kernel: how often it was launched}."""
    pytest.importorskip("triton", reason="Triton is not installed")
    start, counts = launch.start, collections.Counter()

    def count(kernel, grid, arguments, constants):
        counts[kernel.fn.__name__] += 1
        start(kernel, grid, arguments, constants)

    monkeypatch.setattr(launch, "start", count)
    return counts


@pytest.fixture
def large_tiles(monkeypatch):
    """Few programs, each of which costs the interpreter as much time for large tiles as for small ones."""
    norm = pytest.importorskip("libs.fused.norm", reason="Triton is not installed")
    for name, value in {"TILE": 1 << 16, "WIDTH": 2048, "PROGRAMS": 1}.items():
        monkeypatch.setattr(norm, name, value)
