"""The boundary F-score against its definition, pixel by pixel."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from dataset.labels import ClassTable
from tests.test_evaluate import run, snapshot  # noqa: F401, a fixture
from utils.common import files
from utils.metrics.boundaries import BoundaryF
from utils.runs import snapshots

pytestmark = pytest.mark.usefixtures("short_networks")


def boundary_pixels(labels, truth, wanted):
    """[(row, column)] of a class's boundary, by the definition."""
    height, width = labels.shape
    actual = []
    for row in range(height):
        for column in range(width):
            for other in ((row, column + 1), (row + 1, column), (row + 1, column + 1)):
                inside = other[0] < height and other[1] < width
                if inside and truth[row, column] != 255 and truth[other] != 255 and (
                        (labels[row, column] == wanted) != (labels[other] == wanted)):
                    actual.append((row, column))
                    break
    return actual


def share_near(places, others, tolerance):
    near = 0
    for row, column in places:
        near += any((row - r) ** 2 + (column - c) ** 2 <= tolerance ** 2 for r, c in others)
    return near / len(places)


def expected(pairs, wanted, tolerance):
    """The score of a class by loops over all pixels; pairs: [(truth, prediction)]."""
    scores = []
    for truth, predicted in pairs:
        true, actual = (boundary_pixels(labels, truth, wanted) for labels in (truth, predicted))
        if true and actual:
            precision, recall = share_near(actual, true, tolerance), share_near(true, actual, tolerance)
            scores.append(2 * precision * recall / (precision + recall) if precision + recall > 0 else 0)
        elif true or actual:
            scores.append(0)
    return sum(scores) / len(scores) if scores else None


def score(pairs, tolerance, classes=3):
    """[F of each class] of [(truth, prediction)]."""
    metric = BoundaryF(tolerance, classes)
    for number, (truth, predicted) in enumerate(pairs):
        metric.update(str(number), np.asarray(truth), {"fine": np.asarray(predicted)})
    names = [str(i) for i in range(classes)]
    return list(metric.scores(names)["fine"]["class_boundary_f"].values())


def regions(rng, values, shape):
    """Regions of some of these values, with straight and crooked outlines."""
    points = rng.integers(0, max(shape), (rng.integers(1, 6), 2))
    rows, columns = np.mgrid[:shape[0], :shape[1]]
    nearest = np.argmin([(rows - r) ** 2 + (columns - c) ** 2 for r, c in points], axis=0)
    return rng.choice(values, len(points))[nearest].astype(np.uint8)


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.5, 1, 1.5, 2, 3, 5]), st.integers(1, 3))
@example(0, 1, 1)
def test_equal_to_loops_over_all_pixels(seed, tolerance, images):
    """Regions, ignored ones among them, and predictions moved, speckled, of other classes; void (9) in predictions."""
    rng = np.random.default_rng(seed)
    shape = rng.integers(1, 16, 2)
    pairs = []
    for _ in range(images):
        truth = regions(rng, [0, 1, 2, 255], shape)
        predicted = np.roll(truth, rng.integers(-3, 4, 2), (0, 1)) if rng.uniform() < 0.6 else regions(
            rng, [0, 1, 2, 9], shape)
        pairs.append((truth, np.where(rng.uniform(size=shape) < 0.02, rng.integers(0, 3, shape), predicted)))
    assert score(pairs, tolerance) == pytest.approx([expected(pairs, i, tolerance) for i in range(3)], abs=1e-12)


def upright(edge, shape=(12, 20)):
    """Class 0 left of a column, class 1 from there on."""
    return np.where(np.arange(shape[1]) < edge, 0, 1)[None].repeat(shape[0], 0)


@pytest.mark.parametrize("tolerance, f", [(1, 0.0), (1.99, 0.0), (2, 1.0), (3, 1.0)])
def test_an_edge_two_pixels_off_is_met_from_a_tolerance_of_two(tolerance, f):
    assert score([(upright(8), upright(10))], tolerance) == [f, f, None]


def test_distances_are_euclidean():
    """A lone pixel of class 1, and one moved by (2, 2): the corners of their outlines are 2.83 pixels apart."""
    truth, moved = np.zeros((2, 12, 12), int)
    truth[5, 5] = moved[7, 7] = 1
    # Outlines of four pixels each: rows and columns 4, 5 and 6, 7. One pixel of each is 1.41 away from the other's
    # nearest, two are 2.24 away, and one is 2.83 away.
    assert [score([(truth, moved)], tolerance)[1] for tolerance in (1, 1.42, 2, 2.3, 2.8, 2.83)] == [
        0, 0.25, 0.25, 0.75, 0.75, 1]


def test_part_of_an_edge_gives_precision_and_recall():
    """A prediction that follows the upper half of a true edge and nothing else, and one that adds a false edge."""
    truth = upright(8)
    half = np.vstack([truth[:6], np.zeros((6, 20), int)])       # the outline goes on to the right between rows 5 and 6
    both = truth.copy()
    both[:, 16:] = 0
    for predicted in (half, both):
        assert score([(truth, predicted)], 1) == pytest.approx([expected([(truth, predicted)], i, 1) for i in range(3)])
    assert score([(truth, both)], 1)[0] == pytest.approx(2 * 0.5 / 1.5)     # precision 1/2, recall 1


def test_classes_that_only_one_side_has_score_zero_and_count():
    truth, predicted = upright(8), np.where(upright(8) == 1, 2, 0)
    assert score([(truth, predicted)], 3) == [1.0, 0.0, 0.0]
    assert score([(truth, truth), (truth, predicted)], 3) == [1.0, 0.5, 0.0]
    assert score([(truth, truth), (upright(0), upright(0))], 3) == [1.0, 1.0, None]     # the second does not count
    metric = BoundaryF(3, 3)
    metric.update("a", truth, {"fine": predicted})
    assert metric.scores("abc")["fine"]["mean_boundary_f"] == pytest.approx(1 / 3)


def test_the_edge_of_the_image_is_no_boundary():
    everywhere = np.ones((6, 9), int)
    assert score([(everywhere, everywhere)], 3) == [None, None, None]
    # Cut by the edge, a region's outline is only where it borders another; two columns at the edge, and three.
    assert score([(upright(2), upright(3))], 0.5) == [0.0, 0.0, None]
    assert score([(upright(1), upright(1))], 0.5) == [1.0, 1.0, None]
    assert score([(np.array([[0, 1]]), np.array([[0, 1]])), (np.array([[1]]), np.array([[1]]))], 1)[:2] == [1.0, 1.0]


def test_ignored_pixels_are_on_no_boundary_and_make_none():
    truth = upright(8)
    truth[:, 7:10] = 255        # over the true edge
    for edge in (7, 8, 9, 10):      # within what is ignored or at its rim there is nothing to meet or to miss
        assert score([(truth, upright(edge))], 1) == [None, None, None]
    assert score([(truth, upright(4))], 3) == [0.0, 0.0, None]      # outside it is an outline that the truth has not
    half = upright(8)
    half[:6, 6:11] = 255        # the upper half of the edge: what is predicted there does not matter
    predicted = np.vstack([upright(9)[:6], upright(8)[6:]])
    assert score([(half, predicted)], 0.5) == [1.0, 1.0, None]


def test_the_order_of_the_images_and_who_has_them_does_not_matter(rng):
    pairs = [(regions(rng, [0, 1, 255], (9, 9)), regions(rng, [0, 1, 2], (9, 9))) for _ in range(7)]
    whole, first, second = (BoundaryF(1, 3) for _ in range(3))
    for number, (truth, predicted) in enumerate(pairs):
        for metric in (whole, (first, second)[number % 2]):
            metric.update(f"{number}", truth, {"coarse": predicted[::-1], "fine": predicted})
    second.terms |= first.terms
    assert list(second.terms) != list(whole.terms) and second.scores("abc") == whole.scores("abc")
    assert set(whole.scores("abc")) == {"coarse", "fine"}


def test_scores_of_a_run_are_those_of_the_written_predictions(streets, snapshot, tmp_path, capsys):  # noqa: F811
    content, generator = files.load(snapshot), torch.Generator().manual_seed(0)
    for head in ("fine", "coarse"):     # of random classifiers: so short a training knows one class, without an outline
        content["model"][f"head.{head}.weight"].normal_(generator=generator)
    snapshot = tmp_path / snapshot.name
    snapshots.save(snapshot, content)
    result = run(streets, snapshot, tmp_path / "r", "--scales", "1.0", "1.25", "--no-flip", "--save", "labels",
                 "--boundary", "30")
    classes, pairs = ClassTable.read(), []
    for path in sorted((tmp_path / "r/labelIds").iterdir()):
        truth, = streets.glob(f"gtFine/val/*/{path.name.replace('leftImg8bit', 'gtFine_labelIds')}")
        pairs.append([classes.encode(np.asarray(Image.open(one))) for one in (truth, path)])
    fine, coarse = result["multi_scale"], result["coarse"]["multi_scale"]
    assert list(fine["class_boundary_f"].values()) == score(pairs, 30, 19) and len(pairs) == 3
    known = [f for f in fine["class_boundary_f"].values() if f is not None]
    assert len(known) > 0 and fine["mean_boundary_f"] == pytest.approx(np.mean(known))
    assert fine["mean_boundary_f"] > 0
    assert coarse["mean_boundary_f"] != fine["mean_boundary_f"] and result["protocol"]["boundary"] == 30
    assert "mean_boundary_f" not in result["single_scale"] and "mean_boundary_f" not in result["coarse"]["single_scale"]
    shown = capsys.readouterr().out
    _, block = shown.split("boundary F, 30 px, %")
    lines = block.splitlines()
    assert lines[0].split() == ["multi", "coarse", "multi", "fine"] and len(lines[1:20]) == 19
    (mean,) = [line.split() for line in lines if line.startswith("mean ")]
    figures = [f"{100 * scores['mean_boundary_f']:.2f}" for scores in (coarse, fine)]
    assert mean == ["mean", *figures]
    _, section = (tmp_path / "r/report.html").read_text().split("<h2>Boundaries</h2>")
    section, _ = section.split("<h2>Confusion</h2>")
    assert "at most 30 pixels" in section and all(figure in section for figure in figures)
