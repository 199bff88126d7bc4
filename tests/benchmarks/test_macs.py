"""What the parts cost: the ACF module is next to nothing."""

import pytest

from networks.build import build_network
from tests.benchmarks.macs import count


def test_the_module_costs_less_than_a_hundredth_of_the_network():
    parts = count(build_network(), (769, 769))
    assert 0 < parts["head.acf"][1] <= sum(macs for _, macs in parts.values()) / 100
    assert sum(parameters for parameters, _ in parts.values()) == pytest.approx(73.5e6, rel=0.02)


def test_count_agrees_with_arithmetic():
    """The head's terms on a 97×97 map, written out."""
    classes, channels, keys, pixels = 19, 512, 512, 97 * 97
    parts = count(build_network(), (769, 769))
    assert parts["head.coarse"][1] == classes * channels * pixels
    assert parts["head.acf"][1] == (channels * keys + 2 * classes * keys + keys * keys) * pixels
    assert parts["head.fine"][1] == (keys + channels) * classes * pixels


def test_what_only_training_needs_does_not_count():
    """The auxiliary head; but OCR takes its regions from it."""
    assert "aux" not in count(build_network("fcn", backbone="resnet18"), (65, 65))
    assert count(build_network("ocrnet", backbone="resnet18"), (65, 65))["aux"][1] > 0
