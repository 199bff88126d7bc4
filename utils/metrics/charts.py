"""Charts of scores and of training. Files are written whole or not at all."""

import contextlib
import functools
import io
import os
import sys

import numpy as np

from ..common.errors import UserError, first_line
from ..common.messages import logger
from ..imaging.draw import write_picture

COLORS = ("#222222", "#1f5f99", "#d1791e", "#7a9a3a", "#8a4f9e", "#c23b3b", "#3aa6a0", "#8a8a8a")     # of lines


@contextlib.contextmanager
def _default_settings():
    """Draw as matplotlib does by itself, whatever the user's files and variables say of backends, LaTeX and styles.
    Afterward they hold again."""
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
            logger.warning(f"{draw.__name__.replace('_', ' ')}: expected to draw it, found: {first_line(error)}; it "
                           "is missing")
    return wrapper


def new_figure(width, height):
    from matplotlib.figure import Figure  # the object interface needs no display

    return Figure(figsize=(width, height), dpi=120, layout="constrained")


@chart
def confusion_picture(path, matrix, names):
    """Confusion matrix (N, N + 1), rows the truth, in per cent of each row → PNG at `path`."""
    matrix = np.asarray(matrix, float)
    share = 100 * matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    columns = [*names, "void"] if matrix[:, -1].any() else list(names)
    figure = new_figure(2 + 0.42 * len(columns), 1.5 + 0.38 * len(names))
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
    write_picture(path, lambda file: figure.savefig(file, bbox_inches="tight"))


@chart
def iou_chart(path, class_iou, palette):
    """Bars of every head's IoU by class → PNG at `path`.

    class_iou: {head: {class name: fraction or None}}; palette (N, 3) uint8 RGB colors the class names' marks.
    """
    heads = list(class_iou)
    names = list(class_iou[heads[0]])
    figure = new_figure(8, 1.2 + 0.34 * len(names))
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
    write_picture(path, lambda file: figure.savefig(file, bbox_inches="tight"))


@chart
def reliability_chart(calibration):
    """Accuracy and share of the pixels by their confidence, a column for each head → PNG, as bytes; None if it cannot
    be drawn.

    calibration: {head: `Calibration.scores`}.
    """
    figure = new_figure(8, 5)
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

    pixels: {split: {class name: pixels}}; palette (N, 3) uint8 RGB colors the class names' marks.
    """
    splits = {name: values for name, values in pixels.items() if sum(values.values())}
    names = list(next(iter(pixels.values())))
    figure = new_figure(8, 1.2 + 0.34 * len(names))
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
    axes.set_xlabel("share of the labeled pixels, %")
    if splits:
        axes.legend(loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    write_picture(path, lambda file: figure.savefig(file, bbox_inches="tight"))


@chart
def training_curves(path, metrics, quick):
    """Losses, learning rate and quick validation over the steps → PNG at `path`.

    metrics, quick: the lines of `metrics.jsonl` and `quick_validation.jsonl`.
    """
    heads = [name.removeprefix("quick_mean_iou_") for name in (quick[0] if quick else ())
             if name.startswith("quick_mean_iou_")]
    figure = new_figure(8, 7.2 if heads else 5)
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
    write_picture(path, figure.savefig)


def _smooth(values):
    """Running mean over a twentieth of the values, ending at each."""
    width = max(1, len(values) // 20)
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - width)
    return (sums[ends] - sums[starts]) / (ends - starts)
