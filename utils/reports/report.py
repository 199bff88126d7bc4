"""Score tables as text, and `report.html`: scores and the worst images in one self-contained file."""

from pathlib import Path

import numpy as np

from ..common import files
from ..common.errors import plural
from ..metrics.calibration import BINS
from ..metrics.worst import data_url
from .charts import reliability_chart


def write_report(path, result, matrix, classes, palette, entries):
    """Write `report.html`.

    Args:
        path: of the file, which is replaced atomically.
        result: content of `result.json`.
        matrix: (N, N + 1) pixel counts of the headline, a row per true class.
        classes: N names.
        palette: (N, 3) uint8 RGB.
        entries: as of `utils.metrics.worst.WorstImages.entries`.
    """
    import jinja2  # imported here: training and scoring do not need it

    matrix = np.asarray(matrix, float)
    share = 100 * matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    reliability = reliability_chart(result["calibration"])
    template = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
    columns = dict(reversed(score_columns(result).items()))     # the headline first, for narrow screens
    boundary = dict(reversed(boundary_columns(result).items()))
    page = template.render(
        plural=plural, result=result, columns=columns, share=share.tolist(), entries=entries, classes=classes,
        colors=["#{:02x}{:02x}{:02x}".format(*color) for color in np.asarray(palette).tolist()],
        rows=[(name, [column["class_iou"][name] for column in columns.values()]) for name in classes],
        boundary=boundary,
        boundary_rows=[(name, [column["class_boundary_f"][name] for column in boundary.values()]) for name in classes],
        void=bool(matrix[:, -1].any()), reliability=reliability and data_url("PNG", reliability))
    content = page.encode(errors="backslashreplace")        # file names may be any bytes
    files.write_atomically(path, lambda file: file.write(content))


def score_columns(result):
    """Return the columns of the score table, {heading: scores}: coarse and fine of each protocol."""
    columns = {}
    for protocol in ("single_scale", "multi_scale"):
        if protocol in result:
            short = protocol.removesuffix("_scale")
            if "coarse" in result:
                columns[f"{short} coarse"] = result["coarse"][protocol]
            columns[f"{short} fine"] = result[protocol]
    return columns


def boundary_columns(result):
    """Return the columns of `score_columns` that have boundary scores."""
    return {heading: scores for heading, scores in score_columns(result).items() if "mean_boundary_f" in scores}


def score_table(result):
    """Format the scores of a result as a text table with a column for each protocol and head."""
    columns = score_columns(result)
    first = next(iter(columns.values()))
    width = max(map(len, [*first["class_iou"], "mean IoU (categories)"]))
    lines = []

    def add(label, values, missing="not in data"):
        cells = (missing if value is None else value if isinstance(value, str) else f"{100 * value:.2f}"
                 for value in values)
        lines.append(f"{label:<{width}}" + "".join(f"{cell:>15}" for cell in cells))

    add("", columns)
    for name in first["class_iou"]:
        add(name, [scores["class_iou"][name] for scores in columns.values()])
    lines.append("-" * len(lines[0]))
    for label, key in (("mean IoU", "mean_iou"), ("mean IoU (categories)", "mean_category_iou"),
                       ("pixel accuracy", "pixel_accuracy")):
        add(label, [scores[key] for scores in columns.values()])
    for protocol in ("multi_scale", "single_scale"):
        if "mean_iiou" in result.get(protocol, {}):
            score = result[protocol]
            lines.append(f"mean iIoU {100 * (score['mean_iiou'] or 0):.2f}, of categories "
                         f"{100 * (score['mean_category_iiou'] or 0):.2f} ({protocol.replace('_', '-')}, fine)")
    lines.append(f"IoU in percent; mean over {first['classes_averaged']} of "
                 f"{plural(len(first['class_iou']), 'class')}")
    *_, richest = columns
    lines.append("expected calibration error, " + ", ".join(
        f"{head} {100 * scores['expected_calibration_error']:.2f} %" for head, scores in result["calibration"].items())
        + f" ({richest.split()[0]}-scale, {BINS} bins)")
    boundary = boundary_columns(result)
    if boundary:
        lines.append("")
        add(f"boundary F, {result['protocol']['boundary']:g} px, %", boundary)
        for name in first["class_iou"]:
            add(name, [scores["class_boundary_f"][name] for scores in boundary.values()], "no boundary")
        lines.append("-" * len(lines[-1]))
        add("mean", [scores["mean_boundary_f"] for scores in boundary.values()], "no boundary")
    return "\n".join(lines)


def comparison_table(results):
    """Format the mean IoU of several results in percent: a line per snapshot, a column for each protocol and head."""
    headings = list(score_columns(results[0]))
    width = max(len(result["checkpoint"]) for result in results)
    lines = [f"{'mean IoU, %':<{width}}" + "".join(f"{name:>15}" for name in headings)]
    for result in results:
        values = score_columns(result)
        lines.append(f"{result['checkpoint']:<{width}}" + "".join(
            f"{100 * (values[name]['mean_iou'] or 0):>15.2f}" if name in values else f"{'':>15}" for name in headings))
    return "\n".join(lines)
