"""What the parts cost: the ACF part is next to nothing."""

import pytest

from networks import build_network
from tests.benchmarks.macs import count


def test_acf_part_costs_a_thousandth_of_the_base():
    parts = count(build_network(), (769, 769))
    base = parts["backbone"][1] + parts["context"][1]
    assert 0 < parts["acf and fine"][1] <= base / 1000
    assert sum(p for p, _ in parts.values()) == pytest.approx(73.5e6, rel=0.02)


def test_count_agrees_with_arithmetic():
    """The coarse head is C·N products a pixel of a 97×97 map; the ACF part is written out term by term."""
    classes, channels = 19, 512
    parts = count(build_network(), (769, 769))
    pixels = 97 * 97
    assert parts["coarse"][1] == classes * channels * pixels
    pooling, mixing = classes * channels * pixels, classes * classes * pixels
    centers = 2 * classes * channels * channels + classes * channels * classes
    assert parts["acf and fine"][1] == pooling + mixing + centers + classes * channels * pixels
