"""Tests of charts look at them."""

import pytest


@pytest.fixture(autouse=True)
def charts_unrendered():
    """Replaces the fixture of all other tests, which leaves out the rendering."""
