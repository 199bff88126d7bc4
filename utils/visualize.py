"""Pictures for people: overlays, panels, charts."""

import numpy as np
from PIL import Image


def overlay(image, colors, strength=0.5):
    """image and colors (H, W, 3) uint8 → their mixture (H, W, 3) uint8."""
    return (image * (1 - strength) + colors * strength).astype(np.uint8)


def panel(pictures):
    """Pictures (H, W, 3) uint8 of one size → side by side (H, sum of W, 3)."""
    return np.concatenate(list(pictures), axis=1)


def save_png(path, array):
    """Write (H, W) uint8 or uint16, or (H, W, 3) uint8, as PNG; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def _figure(width, height):
    # Imported here: drawing is not needed to train, and the object interface needs no display.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=120, layout="constrained")


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
    figure.savefig(path, bbox_inches="tight")


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
    figure.savefig(path, bbox_inches="tight")
