"""Pictures for people: overlays, panels, charts. Files are written whole or not at all."""

import contextlib
import functools
import io
import math
import os
import sys

import numpy as np
from PIL import Image

from . import checkpoint
from .cli import UserError, first_words

COLORS = ("#222222", "#1f5f99", "#d1791e", "#7a9a3a", "#8a4f9e", "#c23b3b", "#3aa6a0", "#8a8a8a")     # of lines


def overlay(image, colors, strength=0.5):
    """image and colors (H, W, 3) uint8 → their mixture (H, W, 3) uint8."""
    return (image * (1 - strength) + colors * strength).astype(np.uint8)


def panel(pictures):
    """Pictures (H, W, 3) uint8 of one size → side by side (H, sum of W, 3)."""
    return np.concatenate(list(pictures), axis=1)


def difference(truth, coarse, fine, ignore_index=255):
    """Where two label maps (H, W) differ → (H, W, 3) uint8: green where the fine one alone is right, red where the
    coarse one alone is, yellow where both are wrong in different ways, dark grey where the truth is unknown."""
    picture = np.full((*truth.shape, 3), 235, np.uint8)
    picture[truth == ignore_index] = 60
    differ = (coarse != fine) & (truth != ignore_index)
    picture[differ] = (230, 190, 40)
    picture[differ & (fine == truth)] = (30, 150, 60)
    picture[differ & (coarse == truth)] = (200, 40, 40)
    return picture


def error_map(image, truth, predicted, ignored):
    """The image in grey, wrong pixels red, ignored ones dark: (H, W, 3) uint8. All maps (H, W), ignored bool."""
    grey = np.repeat(image.mean(2, keepdims=True) * 0.6 + 90, 3, 2).astype(np.uint8)
    grey[(predicted != truth) & ~ignored] = (200, 40, 40)
    grey[ignored] = (60, 60, 60)
    return grey


def save_png(path, array):
    """Write (H, W) uint8 or uint16, or (H, W, 3) uint8, as PNG; its folder is made."""
    _write(path, lambda file: Image.fromarray(array).save(file, "PNG"))


def _write(path, save):
    """Make a picture in memory, where no disk can be full, and write it."""
    file = io.BytesIO()
    save(file)
    checkpoint.write_atomically(path, lambda target: target.write(file.getbuffer()))


@contextlib.contextmanager
def _default_settings():
    """Draw as matplotlib does by itself, whatever the user's files and variables say of backends, LaTeX and styles.
    Afterwards they hold again."""
    # matplotlib cannot be imported where this names a backend of another environment, such as a notebook's.
    fresh, backend = "matplotlib" not in sys.modules, os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib  # not before: training does without
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    if fresh and backend:
        with contextlib.suppress(ValueError):       # for what the user draws, as the import would have set it
            matplotlib.rcParams["backend"] = backend
    defaults = {name: value for name, value in matplotlib.rcParamsDefault.items() if name != "backend"}
    with matplotlib.rc_context(defaults):
        yield


def chart(draw):
    """Decorate a function that draws with matplotlib: it does not depend on the user's settings, and what it cannot
    draw is missing, in a line: scores and weights are what counts. A full disk still raises `UserError`."""
    @functools.wraps(draw)
    def wrapper(*args, **options):
        try:
            with _default_settings():
                return draw(*args, **options)
        except UserError:
            raise
        except Exception as error:
            print(f"{draw.__name__.replace('_', ' ')}: expected to draw it, found: {first_words(error)}; it is missing",
                  file=sys.stderr, flush=True)
    return wrapper


def _figure(width, height):
    from matplotlib.figure import Figure  # the object interface needs no display

    return Figure(figsize=(width, height), dpi=120, layout="constrained")


@chart
def confusion_picture(path, matrix, names):
    """Confusion matrix (N, N + 1), rows the truth, in per cent of each row → PNG at `path`."""
    matrix = np.asarray(matrix, float)
    share = 100 * matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    columns = [*names, "void"] if matrix[:, -1].any() else list(names)
    figure = _figure(2 + 0.42 * len(columns), 1.5 + 0.38 * len(names))
    axes = figure.subplots()
    picture = axes.imshow(share[:, :len(columns)], cmap="Blues", vmin=0, vmax=100)
    axes.set_xticks(range(len(columns)), columns, rotation=60, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("prediction")
    axes.set_ylabel("truth")
    for row, column in zip(*np.nonzero(share[:, :len(columns)] >= 0.5), strict=True):
        value = share[row, column]
        axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=7,
                  color="white" if value > 60 else "black")
    figure.colorbar(picture, label="% of the true class's pixels", shrink=0.8)
    _write(path, lambda file: figure.savefig(file, bbox_inches="tight"))


@chart
def iou_chart(path, class_iou, palette):
    """Bars of every head's IoU by class → PNG at `path`.

    class_iou: {head: {class name: fraction or None}}; palette (N, 3) uint8 RGB colours the class names' marks.
    """
    heads = list(class_iou)
    names = list(class_iou[heads[0]])
    figure = _figure(8, 1.2 + 0.34 * len(names))
    axes = figure.subplots()
    thickness = 0.8 / len(heads)
    for k, head in enumerate(heads):
        values = [100 * (class_iou[head][name] or 0) for name in names]
        places = np.arange(len(names)) + (k - (len(heads) - 1) / 2) * thickness
        bars = axes.barh(places, values, thickness * 0.92, label=head, color=("#1f5f99", "#a9c4dd")[k % 2])
        if k == 0:
            known = [class_iou[head][name] is not None for name in names]
            axes.bar_label(bars, [f"{v:.1f}" if k else "not in the data" for v, k in zip(values, known, strict=True)],
                           fontsize=7, padding=2)
    axes.scatter(np.full(len(names), -2), np.arange(len(names)), marker="s", s=40, clip_on=False,
                 c=np.asarray(palette[:len(names)]) / 255)
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", pad=20, length=0)
    axes.invert_yaxis()
    axes.set_xlim(0, 105)
    axes.set_xlabel("IoU, %")
    axes.legend(loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    _write(path, lambda file: figure.savefig(file, bbox_inches="tight"))


@chart
def reliability_chart(calibration):
    """Accuracy and share of the pixels by their confidence, a column for each head → PNG, as bytes; None if it cannot
    be drawn.

    calibration: {head: `Calibration.scores`}.
    """
    figure = _figure(8, 5)
    rows = figure.subplots(2, len(calibration), sharex=True, sharey="row", squeeze=False, height_ratios=[3, 1])
    for (upper, lower), (head, found) in zip(rows.T, calibration.items(), strict=True):
        bins = len(found["pixels"])
        places, pixels = (np.arange(bins) + 0.5) / bins, np.array(found["pixels"])
        accuracy, confidence = (np.array([np.nan if v is None else v for v in found[name]], float)
                                for name in ("accuracy", "confidence"))
        upper.bar(places, accuracy, 0.92 / bins, color="#1f5f99", label="right")
        upper.bar(places, confidence - accuracy, 0.92 / bins, accuracy, color="#c23b3b40", edgecolor="#c23b3b",
                  linewidth=0.6, label="gap to the confidence")
        upper.plot([0, 1], [0, 1], color=COLORS[0], linewidth=0.8, linestyle="--")
        upper.set_title(f"{head}: expected calibration error {100 * found['expected_calibration_error']:.2f} %",
                        fontsize=10)
        lower.bar(places, 100 * pixels / pixels.sum(), 0.92 / bins, color=COLORS[-1])
        lower.set_xlabel("confidence")
        lower.set_xlim(0, 1)
        for axes in (upper, lower):
            axes.spines[["top", "right"]].set_visible(False)
    upper.set_ylim(0, 1)
    rows[0, 0].set_ylabel("share that is right")
    rows[1, 0].set_ylabel("pixels, %")
    rows[0, 0].legend(loc="upper left", frameon=False)
    file = io.BytesIO()
    figure.savefig(file)
    return file.getvalue()


@chart
def frequency_chart(path, pixels, palette):
    """Share of each class in each split, on a logarithmic scale → PNG at `path`.

    pixels: {split: {class name: pixels}}; palette (N, 3) uint8 RGB colours the class names' marks.
    """
    splits = {name: values for name, values in pixels.items() if sum(values.values())}
    names = list(next(iter(pixels.values())))
    figure = _figure(8, 1.2 + 0.34 * len(names))
    axes = figure.subplots()
    thickness = 0.8 / max(1, len(splits))
    for k, (split, values) in enumerate(splits.items()):
        shares = 100 * np.array([values[name] for name in names]) / sum(values.values())
        places = np.arange(len(names)) + (k - (len(splits) - 1) / 2) * thickness
        axes.barh(places, shares, thickness * 0.92, label=os.fsencode(split).decode(errors="replace"),
                  color=("#1f5f99", "#a9c4dd", "#d1791e", "#7a9a3a")[k % 4])
    axes.scatter(np.full(len(names), -0.02), np.arange(len(names)), marker="s", s=40, clip_on=False,
                 c=np.asarray(palette[:len(names)]) / 255, transform=axes.get_yaxis_transform())
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", pad=16, length=0)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("share of the labelled pixels, %")
    if splits:
        axes.legend(loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    _write(path, lambda file: figure.savefig(file, bbox_inches="tight"))


@chart
def training_curves(path, metrics, quick):
    """Losses, learning rate and quick validation over the steps → PNG at `path`.

    metrics, quick: the lines of `metrics.jsonl` and `quick_validation.jsonl`.
    """
    heads = [name.removeprefix("quick_mean_iou_") for name in (quick[0] if quick else ())
             if name.startswith("quick_mean_iou_")]
    figure = _figure(8, 7.2 if heads else 5)
    losses, rate, *scores = figure.subplots(3 if heads else 2, 1, sharex=True,
                                            height_ratios=[3, 1, 2] if heads else [3, 1])
    steps = [line["step"] for line in metrics]
    terms = [name for name in metrics[0] if name.startswith("loss")]
    for name, color in zip(terms, COLORS, strict=False):
        values = np.array([line[name] for line in metrics], float)
        losses.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
        losses.plot(steps, _smooth(values), color=color, label=name.removeprefix("loss_") if "_" in name else "total")
    losses.set_ylabel("loss")
    losses.set_ylim(bottom=0)
    losses.legend(ncols=len(terms), frameon=False)
    rate.plot(steps, [line["lr"] for line in metrics], color="#222222")
    rate.set_ylabel("learning rate")
    rate.set_ylim(bottom=0)
    for head, color in zip(heads, ("#1f5f99", "#d1791e"), strict=False):
        values = [100 * (line[f"quick_mean_iou_{head}"] or 0) for line in quick]
        scores[0].plot([line["step"] for line in quick], values, "o-", markersize=3, color=color, label=head)
    if heads:
        scores[0].set_ylabel("quick mIoU, %")
        scores[0].legend(ncols=len(heads), frameon=False)
    for axes in (losses, rate, *scores):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    (scores or [rate])[0].set_xlabel("step")
    _write(path, figure.savefig)


@chart
def scores_by_time(path, rows):
    """Mean IoU against the time to evaluate an image, with intervals where there are any → PNG at `path`.

    rows: dicts with model, mean_iou and its mean_iou_95, half of the interval or None, evaluation_ms, and whether there
    is a coarse_mean_iou, by which networks with ACF are told from others.
    """
    figure = _figure(8, 5)
    axes = figure.subplots()
    for acf, label, color, marker in ((False, "without ACF", "#d1791e", "D"),
                                      (True, "with ACF", "#1f5f99", "o")):
        some = [row for row in rows if (row["coarse_mean_iou"] is not None) == acf]
        if some:
            axes.errorbar([row["evaluation_ms"] for row in some], [100 * row["mean_iou"] for row in some],
                          [100 * (row["mean_iou_95"] or 0) for row in some], fmt=marker, color=color, label=label,
                          ecolor=f"{color}80", elinewidth=1.2, capsize=3, markersize=6)
    axes.margins(0.12)
    axes.set_ylim(bottom=max(0, axes.get_ylim()[0]))
    axes.set_xlabel("evaluation of an image, ms")
    axes.set_ylabel("mean IoU, %")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, loc="outside upper right", ncols=2)
    _name_points(figure, axes, rows)
    _write(path, figure.savefig)


def _name_points(figure, axes, rows):
    """Write the model's name beside each point of `scores_by_time`, where it covers as little as can be of other names,
    of points and of intervals."""
    from matplotlib.transforms import Bbox

    def area(one, other):
        both = Bbox.intersection(one, other)
        return 0 if both is None else both.width * both.height

    figure.draw_without_rendering()
    taken = []
    for row in rows:
        half = row["mean_iou_95"] or 0
        (x, low), (_, y), (_, high) = axes.transData.transform(
            [(row["evaluation_ms"], 100 * (row["mean_iou"] + way * half)) for way in (-1, 0, 1)])
        taken += [Bbox.from_extents(x - 7, y - 7, x + 7, y + 7), Bbox.from_extents(x - 2, low, x + 2, high)]
    for row in sorted(rows, key=lambda row: row["mean_iou"]):
        point = row["evaluation_ms"], 100 * row["mean_iou"]
        name = axes.annotate(row["model"], point, (0, 0), fontsize=9, textcoords="offset points", va="center",
                             in_layout=False)

        def cost(place, name=name):
            name.set(position=place, ha="left" if place[0] > 0 else "right")
            box = name.get_window_extent()
            outside = box.width * box.height - area(box, axes.bbox)
            return 3 * outside + sum(area(box, other) for other in taken) + math.hypot(*place)

        place = min(((right, up) for right in (8, -8, 20, -20, 40, -40) for up in range(-60, 61, 5)), key=cost)
        cost(place)     # puts it there
        taken.append(name.get_window_extent())
        if math.hypot(*place) > 15:
            axes.annotate("", point, place, textcoords="offset points", in_layout=False,
                          arrowprops={"arrowstyle": "-", "color": "#999999", "linewidth": 0.6})


def _smooth(values):
    """Running mean over a twentieth of the values, ending at each."""
    width = max(1, len(values) // 20)
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - width)
    return (sums[ends] - sums[starts]) / (ends - starts)
