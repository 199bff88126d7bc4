"""Charts of scores and of training. Picture files are written atomically."""

import contextlib
import functools
import io
import itertools
import os
import sys

import numpy as np

from ..common.errors import UserError, first_line
from ..common.messages import logger
from ..imaging.draw import write_picture

COLORS = ("#222222", "#1f5f99", "#d1791e", "#7a9a3a", "#8a4f9e", "#c23b3b", "#3aa6a0", "#8a8a8a")     # of lines


@contextlib.contextmanager
def _default_settings():
    """Use matplotlib's default settings in this context, regardless of the user's backend, LaTeX and style settings."""
    # matplotlib cannot be imported while this variable names a backend of another environment, such as a notebook's.
    fresh, backend = "matplotlib" not in sys.modules, os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib  # imported here: training does not need it
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    if fresh and backend:
        with contextlib.suppress(ValueError):       # as the import would have set it, for the user's own figures
            matplotlib.rcParams["backend"] = backend
    defaults = {name: value for name, value in matplotlib.rcParamsDefault.items() if name != "backend"}
    with matplotlib.rc_context(defaults):
        yield


def chart(draw):
    """Decorate a function to draw with matplotlib's default settings, and to log a warning if drawing fails.

    `UserError`, such as for a full disk, is still raised.
    """
    @functools.wraps(draw)
    def wrapper(*args, **options):
        try:
            with _default_settings():
                return draw(*args, **options)
        except UserError:
            raise
        except Exception as error:
            logger.warning(f"{draw.__name__.replace('_', ' ')}: expected to draw it, found: {first_line(error)}; it "
                           "is left out")
    return wrapper


def new_figure(width, height):
    from matplotlib.figure import Figure  # the object interface needs no display

    return Figure(figsize=(width, height), dpi=120, layout="constrained")


@chart
def confusion_picture(path, matrix, names):
    """Draw a confusion matrix (N, N + 1), a row per true class, in percent of each row; path: of the PNG."""
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
    figure.colorbar(picture, label="% of the pixels of the true class", shrink=0.8)
    write_picture(path, lambda file: figure.savefig(file, bbox_inches="tight"))


@chart
def iou_chart(path, class_iou, palette):
    """Draw the IoU of each class as bars, one per head, as a PNG.

    Args:
        class_iou: {head: {class name: fraction or None}}.
        palette: (N, 3) uint8 RGB, colors of the marks beside the class names.
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
            axes.bar_label(bars, ["not in the data" if class_iou[head][name] is None else f"{value:.1f}"
                                  for name, value in zip(names, values, strict=True)], fontsize=7, padding=2)
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
    """Draw accuracy and share of the pixels by confidence, a column for each head.

    calibration: {head: `Calibration.scores`}. Returns the PNG as bytes; None if it could not be drawn.
    """
    figure = new_figure(8, 5)
    rows = figure.subplots(2, len(calibration), sharex=True, sharey="row", squeeze=False, height_ratios=[3, 1])
    for (upper, lower), (head, scores) in zip(rows.T, calibration.items(), strict=True):
        bins = len(scores["pixels"])
        places, pixels = (np.arange(bins) + 0.5) / bins, np.array(scores["pixels"])
        accuracy, confidence = (np.array([np.nan if v is None else v for v in scores[name]], float)
                                for name in ("accuracy", "confidence"))
        upper.bar(places, accuracy, 0.92 / bins, color="#1f5f99", label="accuracy")
        upper.bar(places, confidence - accuracy, 0.92 / bins, accuracy, color="#c23b3b40", edgecolor="#c23b3b",
                  linewidth=0.6, label="gap between accuracy and confidence")
        upper.plot([0, 1], [0, 1], color=COLORS[0], linewidth=0.8, linestyle="--")
        upper.set_title(f"{head}: expected calibration error {100 * scores['expected_calibration_error']:.2f} %",
                        fontsize=10)
        lower.bar(places, 100 * pixels / pixels.sum(), 0.92 / bins, color=COLORS[-1])
        lower.set_xlabel("confidence")
        lower.set_xlim(0, 1)
        for axes in (upper, lower):
            axes.spines[["top", "right"]].set_visible(False)
    upper.set_ylim(0, 1)
    rows[0, 0].set_ylabel("accuracy")
    rows[1, 0].set_ylabel("pixels, %")
    rows[0, 0].legend(loc="upper left", frameon=False)
    file = io.BytesIO()
    figure.savefig(file)
    return file.getvalue()


@chart
def prediction_picture(image, labels, names, palette, limit=24):
    """Draw an image, its class colors and a legend of the most frequent classes side by side.

    image: (H, W, 3) uint8 RGB; labels: (H, W) train ids; names: N class names; palette: (N or more, 3) uint8 RGB;
    limit: most classes in the legend. Returns the PNG as bytes; None if it could not be drawn.
    """
    from matplotlib.patches import Patch

    height, width, _ = image.shape
    scale = 5 / max(height, width)      # inches per pixel
    figure = new_figure(2 * scale * width + 2.6, max(scale * height, 1) + 0.2)
    for axes, picture in zip(figure.subplots(1, 2), (image, palette[labels]), strict=True):
        axes.imshow(picture, interpolation="nearest")
        axes.set_axis_off()
    shares = np.bincount(labels.ravel()) / labels.size
    frequent = [train_id for train_id in np.argsort(-shares, kind="stable")[:limit] if shares[train_id]]
    # The share comes first, since matplotlib leaves out labels that begin with an underscore.
    figure.legend(handles=[Patch(color=palette[train_id] / 255, label=f"{shares[train_id]:.1%}  {names[train_id]}")
                           for train_id in frequent], loc="outside right upper", frameon=False, fontsize=8)
    file = io.BytesIO()
    figure.savefig(file)
    return file.getvalue()


@chart
def frequency_chart(path, pixels, palette):
    """Draw the share of each class in each split on a logarithmic scale as a PNG.

    Args:
        pixels: {split: {class name: pixels}}.
        palette: (N, 3) uint8 RGB, colors of the marks beside the class names.
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
    """Draw losses, learning rate and quick validation over the steps as a PNG.

    metrics, quick: the entries of `metrics.jsonl` and `quick_validation.jsonl`.
    """
    heads = [name.removeprefix("quick_mean_iou_") for name in (quick[0] if quick else ())
             if name.startswith("quick_mean_iou_")]
    figure = new_figure(8, 7.2 if heads else 5)
    losses, rate, *scores = figure.subplots(3 if heads else 2, 1, sharex=True,
                                            height_ratios=[3, 1, 2] if heads else [3, 1])
    # --resume may change the terms.
    terms = list(dict.fromkeys(name for line in metrics for name in line if name.startswith("loss")))
    for name, color in zip(terms, itertools.cycle(COLORS), strict=False):
        steps, values = zip(*((line["step"], float(line[name])) for line in metrics if name in line), strict=True)
        losses.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
        losses.plot(steps, _smooth(values), color=color, label=name.removeprefix("loss_") if "_" in name else "total")
    losses.set_ylabel("loss")
    losses.set_ylim(bottom=0)
    losses.legend(ncols=min(len(terms), 5), frameon=False)
    rate.plot([line["step"] for line in metrics], [line["lr"] for line in metrics], color="#222222")
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
    """Running mean: of each value and those before it, over a window of a twentieth of all values."""
    width = max(1, len(values) // 20)
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - width)
    return (sums[ends] - sums[starts]) / (ends - starts)
