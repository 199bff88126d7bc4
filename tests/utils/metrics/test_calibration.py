"""Calibration against plain loops over pixels, and pictures of confidence."""

import base64
import io
import math
import pickle
import re

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
from dataset.labels import ClassTable
from tests.test_evaluate import run, snapshot  # noqa: F401, a fixture
from utils.common import files
from utils.imaging.decode import read_ids, read_image
from utils.inference.sliding import SlidingPredictor
from utils.metrics.calibration import Calibration
from utils.reports import charts
from utils.runs import snapshots

pytestmark = pytest.mark.usefixtures("short_networks")


def by_loops(confidence, prediction, label, bins=15):
    """Guo et al., equations (3) and before: B_m are the pixels of confidence in ((m - 1) / M, m / M]."""
    members = [[] for _ in range(bins)]
    for p, predicted, true in zip(confidence.ravel().tolist(), prediction.ravel(), label.ravel(), strict=True):
        if true != 255:
            m = next(m for m in range(1, bins + 1) if p <= m / bins or m == bins)
            members[m - 1].append((p, predicted == true))
    n = sum(map(len, members))
    error = sum(len(one) / n * abs(np.mean([right for _, right in one]) - np.mean([p for p, _ in one]))
                for one in members if one)
    return {"expected_calibration_error": error, "pixels": [*map(len, members)],
            "accuracy": [np.mean([right for _, right in one]) if one else None for one in members],
            "confidence": [np.mean([p for p, _ in one]) if one else None for one in members]}


def close(actual, expected):
    assert actual["pixels"] == expected["pixels"]
    assert actual["expected_calibration_error"] == pytest.approx(expected["expected_calibration_error"], abs=1e-7)
    for name in ("accuracy", "confidence"):
        assert [v is None for v in actual[name]] == [v is None for v in expected[name]]
        assert [v for v in actual[name] if v is not None] == pytest.approx(
            [v for v in expected[name] if v is not None], abs=1e-7)


def test_equal_to_plain_loops(rng):
    total, maps = Calibration(), []
    for size in ((17, 23), (9, 40)):
        probabilities = torch.softmax(torch.from_numpy(rng.normal(size=(5, *size)) * 2).float(), 0)
        label = rng.integers(0, 5, size).astype(np.uint8)
        label[rng.uniform(size=size) < 0.2] = 255
        confidence, prediction = probabilities.max(0)
        total.update(confidence, prediction, torch.from_numpy(label))
        maps.append([confidence.numpy().ravel(), prediction.numpy().ravel(), label.ravel()])
    expected = by_loops(*map(np.concatenate, zip(*maps, strict=True)))
    assert sum(count > 0 for count in expected["pixels"]) > 8 and expected["expected_calibration_error"] > 0.1
    close(total.scores(), expected)
    close(pickle.loads(pickle.dumps(total)).scores(), expected)


def test_a_case_by_hand():
    """Four pixels of 0.9, three right; two of 0.35, none right; one of exactly 1, right; one that does not count."""
    one = Calibration(bins=10)
    one.update(np.float32([0.9, 0.9, 0.9, 0.9, 0.35, 0.35, 1, 0.9]), np.array([1, 1, 1, 2, 0, 0, 3, 1]),
               np.array([1, 1, 1, 1, 1, 1, 3, 255]))
    actual = one.scores()
    assert actual["expected_calibration_error"] == pytest.approx(4 / 7 * 0.15 + 2 / 7 * 0.35 + 0, abs=1e-7)
    assert actual["pixels"] == [0, 0, 0, 2, 0, 0, 0, 0, 4, 1]
    assert actual["accuracy"][8] == 0.75 and actual["accuracy"][9] == 1 and actual["accuracy"][0] is None
    one.update(np.float32([0, 1.0000002]), np.array([0, 0]), np.array([0, 0]))      # a mean of probabilities, rounded
    assert one.scores()["pixels"] == [1, 0, 0, 2, 0, 0, 0, 0, 4, 2]
    assert Calibration().scores()["expected_calibration_error"] is None


def test_sums_do_not_depend_on_their_order(rng):
    confidence, prediction, label = rng.uniform(size=9999).astype(np.float32), np.zeros(9999, int), np.zeros(9999, int)
    whole, parts = Calibration(), [Calibration() for _ in range(7)]
    whole.update(confidence, prediction, label)
    for number, part in enumerate(parts):
        part.update(*(values[number::7] for values in (confidence, prediction, label)))
    total = Calibration()
    for part in reversed(parts):
        total.add(part)
    assert total.scores() == whole.scores()


def test_scoring_tells_calibration(streets, snapshot, tmp_path, capsys):  # noqa: F811
    """Of the richest protocol, coarse and fine: in the result, the table and the report; and confidence as pictures."""
    content = files.load(snapshot)
    for head in ("fine", "coarse"):     # surer, so that confidences differ
        content["model"][f"head.{head}.weight"] *= 10
    snapshot = tmp_path / "CS_scenes_7.pth"
    snapshots.save(snapshot, content)
    result = run(streets, snapshot, tmp_path / "r", "--scales", "1.0", "0.75", "--no-flip", "--save", "confidence")
    network, config = evaluate.load_network(snapshot, torch.device("cpu"))
    predictor = SlidingPredictor(network, config.input_size, scales=(1.0, 0.75), normalization=config.normalization)
    classes, maps = ClassTable.read(), {"fine": [], "coarse": []}
    for path in sorted(streets.glob("leftImg8bit/val/*/*.png")):
        truth = str(path).replace("leftImg8bit/", "gtFine/").replace("_leftImg8bit.png", "_gtFine_labelIds.png")
        label = classes.encode(read_ids(truth))
        for head, probabilities in predictor.predict(read_image(path))["multi_scale"].items():
            maps[head].append([v.numpy().ravel() for v in probabilities.max(0)] + [label.ravel()])
            if head == "fine":
                with Image.open(tmp_path / "r/confidence" / path.name) as picture:
                    assert picture.mode == "L"
                    gray = np.asarray(picture).astype(int)
                expected = 255 * probabilities.amax(0).numpy()
                assert gray.shape == label.shape and np.abs(gray - expected).max() < 0.51
                assert gray.max() - gray.min() > 9
    for head, values in maps.items():
        actual, expected = result["calibration"][head], by_loops(*map(np.concatenate, zip(*values, strict=True)))
        assert actual["expected_calibration_error"] == pytest.approx(expected["expected_calibration_error"], abs=1e-4)
        assert sum(actual["pixels"]) == sum(expected["pixels"]) and len(actual["pixels"]) == 15
    output = ", ".join(f"{head} {100 * result['calibration'][head]['expected_calibration_error']:.2f} %"
                     for head in ("fine", "coarse"))
    assert f"expected calibration error, {output} (multi-scale, 15 bins)" in capsys.readouterr().out
    page = (tmp_path / "r/report.html").read_text()
    (chart,) = re.findall(r'<img src="data:image/png;base64,([^"]+)"[^>]*alt="accuracy by confidence', page)
    assert min(Image.open(io.BytesIO(base64.b64decode(chart))).size) > 300
    assert not (tmp_path / "r/color").exists()


def test_the_chart_has_bars_as_high_as_the_accuracy(monkeypatch):
    """Also where a bin is empty; the gap goes from the accuracy to the confidence."""
    figures, make = [], charts.new_figure
    monkeypatch.setattr(charts, "new_figure", lambda *size: figures.append(make(*size)) or figures[-1])
    actual = {"expected_calibration_error": 0.1, "pixels": [0, 10, 30], "accuracy": [None, 0.25, 1.0],
             "confidence": [None, 0.5, 0.9]}
    picture = Image.open(io.BytesIO(charts.reliability_chart({"fine": actual, "coarse": actual})))
    assert picture.format == "PNG"
    upper, _, lower, _ = figures[0].axes
    heights = [(bar.get_y(), bar.get_height()) for bar in upper.patches]
    assert math.isnan(heights[0][1]) and heights[1:3] == [(0, 0.25), (0, 1.0)]
    assert heights[4:6] == [(0.25, 0.25), (1.0, pytest.approx(-0.1))]
    assert [bar.get_height() for bar in lower.patches] == [0, 25, 75]
