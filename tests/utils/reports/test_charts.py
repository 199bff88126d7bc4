"""Charts: they depend on nobody's settings, and one that cannot be drawn stops nothing."""

import os
from unittest import mock

import numpy as np
import pytest

from tests.conftest import finish, fork
from utils.common.errors import UserError
from utils.reports import charts

PROGRAM = """
import sys
from pathlib import Path
from utils.reports import charts
assert "matplotlib" not in sys.modules
lines = [{"step": k, "loss": 3 / k, "loss_fine": 2 / k, "lr": 0.1 / k} for k in range(1, 9)]
charts.training_curves(Path(sys.argv[1]), lines, [])
"""
SETTINGS = {    # what a notebook's kernel hands on, a backend that needs a display, and what else people have
    "inline": ({"MPLBACKEND": "module://matplotlib_inline.backend_inline"}, ""), "none": ({"MPLBACKEND": "nope"}, ""),
    "display": ({"MPLBACKEND": "TkAgg"}, ""), "latex": ({}, "text.usetex: True\nbackend: nope\n"),
    "style": ({}, "font.size: 30\naxes.facecolor: red\nsavefig.dpi: 30\nlines.linewidth: 9\n")}


@pytest.fixture(scope="module")
def draw(tmp_path_factory):
    def draw(variables, file):
        folder = tmp_path_factory.mktemp("here")
        (folder / "matplotlibrc").write_text(file)
        with mock.patch.dict(os.environ):
            for name in ("MPLBACKEND", "DISPLAY"):
                os.environ.pop(name, None)
            status, _, error = finish(fork("-c", PROGRAM, "curves.png", cwd=folder, env=variables))
        assert status == 0 and "Traceback" not in error, error
        return (folder / "curves.png").read_bytes()
    return draw


@pytest.fixture(scope="module")
def plain(draw):
    return draw({}, "")


@pytest.mark.parametrize("name", SETTINGS)
def test_a_chart_does_not_depend_on_the_users_settings(draw, plain, name):
    assert draw(*SETTINGS[name]) == plain


def test_the_users_settings_hold_again_after_a_chart(tmp_path):
    import matplotlib
    with matplotlib.rc_context({"font.size": 30}):
        charts.frequency_chart(tmp_path / "a.png", {"train": {"road": 3, "car": 1}}, np.zeros((2, 3), np.uint8))
        assert matplotlib.rcParams["font.size"] == 30


def test_a_name_that_is_not_utf8_is_drawn(tmp_path, capsys):
    split = os.fsdecode(b"/data/gro\xdf")
    charts.frequency_chart(tmp_path / "a.png", {split: {"road": 3, "car": 1}}, np.zeros((2, 3), np.uint8))
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG") and capsys.readouterr() == ("", "")


def test_a_chart_that_cannot_be_drawn_is_a_line(tmp_path, monkeypatch, capsys):
    matrix = np.eye(2, 3)
    (tmp_path / "file").touch()
    with pytest.raises(UserError):      # of the disk, as before
        charts.confusion_picture(tmp_path / "file/a.png", matrix, ["road", "car"])
    monkeypatch.setattr(charts, "new_figure", lambda *size: 1 / 0)
    charts.confusion_picture(tmp_path / "a.png", matrix, ["road", "car"])
    assert capsys.readouterr().err == (
        "confusion picture: expected to draw it, found: division by zero; it is left out\n")
    assert not (tmp_path / "a.png").exists() and charts.reliability_chart({}) is None


def test_the_terms_of_the_loss_may_change_during_a_run(tmp_path, monkeypatch):
    """With --resume and another --loss; and there may be more of them than colors."""
    drawn = []
    monkeypatch.setattr(charts, "_smooth", lambda values: drawn.append(list(values)) or values)
    lines = [{"step": 1, "loss": 3, "loss_fine": 2, "lr": 1}, {"step": 2, "loss": 4, "lr": 1} | {
        f"loss_fine_{number}": number for number in range(9)}]
    charts.training_curves(tmp_path / "curves.png", lines, [])
    assert drawn == [[3, 4], [2], *([number] for number in range(9))]
