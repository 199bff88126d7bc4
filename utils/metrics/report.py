"""Score tables as text, and `report.html`: scores and the worst images in one self-contained file."""

import base64
import io
from pathlib import Path

import numpy as np
from PIL import Image

from ..common import files
from ..common.errors import plural
from ..imaging.draw import difference, error_map
from .calibration import BINS
from .charts import reliability_chart
from .iou import mean_of_scores, none_if_nan

WORST_OVERALL = 10      # images with the lowest mean IoU that are kept
WORST_PER_CLASS = 2     # images with the lowest IoU of a class that are kept for each class
WIDTH = 640             # largest width in pixels of a picture in the report
MIN_ATTENTION = 5e-3    # mean coarse probability from which the attention of a class is shown


class WorstImages:
    """Keeps the images with the lowest IoU, overall and by class, as small encoded pictures.

    Memory grows with the number of classes, not with the size of the data set.

    Args:
        names: of the N classes.
        color: function of train ids (H, W) that returns RGB (H, W, 3) uint8.
        ignore_index: label of pixels that do not count.
    """

    def __init__(self, names, color, ignore_index=255):
        self.names, self.color, self.ignore_index = names, color, ignore_index
        self.kept = {}      # {image name: entry}, plain values

    def add(self, name, image, truth, labels, counts, attention=None):
        """Keep an image if it is among the worst so far.

        Args:
            image, truth: (H, W, 3) uint8 and train ids (H, W), arrays.
            labels: {head: predicted train ids (H, W)}.
            counts: {head: ConfusionMatrix} of this image.
            attention: coarse probabilities (N, H, W), or None.
        """
        class_iou = {head: [none_if_nan(iou) for iou in matrix.class_iou().tolist()]
                     for head, matrix in counts.items()}
        entry = {"name": name, "class_iou": class_iou,
                 "mean_iou": {head: mean_of_scores(values) for head, values in class_iou.items()},
                 "true_classes": np.setdiff1d(truth, [self.ignore_index]).tolist()}
        self.kept[name] = entry
        if name in self._prune():
            entry["pictures"] = self._pictures(image, truth, {head: np.asarray(m) for head, m in labels.items()})
            entry["attention"] = {} if attention is None else self._attention(attention)

    def merge(self, others):
        """Add the images that other processes kept; others: their `kept`."""
        for other in others:
            self.kept |= other
        self._prune()

    def entries(self):
        """Return the kept images, worst first; `overall` marks those with the lowest mean IoU."""
        ranked = sorted(self.kept.values(), key=_worst_first)
        return [entry | {"overall": rank < WORST_OVERALL} for rank, entry in enumerate(ranked)]

    def _prune(self):
        """Drop the images that are not among the worst; return the names of the others."""
        entries = sorted(self.kept.values(), key=_worst_first)
        worst = {entry["name"] for entry in entries[:WORST_OVERALL]}
        for index in range(len(self.names)):
            with_class = [entry for entry in entries if index in entry["true_classes"]]
            with_class.sort(key=lambda entry: (entry["class_iou"]["fine"][index], entry["name"]))
            worst |= {entry["name"] for entry in with_class[:WORST_PER_CLASS]}
        self.kept = {name: entry for name, entry in self.kept.items() if name in worst}
        return worst

    def _pictures(self, image, truth, labels):
        ignored = truth == self.ignore_index
        pictures = {"image": _encode(image, "JPEG"), "truth": _encode(self.color(truth))}
        for head, predicted in labels.items():
            pictures[head] = _encode(self.color(predicted))
        pictures["errors"] = _encode(error_map(image, truth, labels["fine"], ignored), "JPEG")
        if "coarse" in labels:
            pictures["coarse against fine"] = _encode(difference(truth, labels["coarse"], labels["fine"],
                                                                 self.ignore_index))
        return pictures

    def _attention(self, probabilities):
        """Encode the coarse probabilities, the weights of the pixels in each class center, as {class: picture}."""
        mean = probabilities.flatten(1).mean(1)
        return {self.names[i]: _encode((255 * probabilities[i]).byte().cpu().numpy(), "JPEG")
                for i in mean.argsort(descending=True).tolist() if mean[i] >= MIN_ATTENTION}


def write_report(path, result, matrix, classes, palette, entries):
    """Write `report.html`.

    Args:
        path: of the file, which is replaced atomically.
        result: content of `result.json`.
        matrix: (N, N + 1) pixel counts of the headline, a row per true class.
        classes: N names.
        palette: (N, 3) uint8 RGB.
        entries: as of `WorstImages.entries`.
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
        void=bool(matrix[:, -1].any()), reliability=reliability and _data_url("PNG", reliability))
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


def _worst_first(entry):
    """Sort key: by mean IoU of the fine head, images without one last."""
    mean = entry["mean_iou"]["fine"]
    return (2.0 if mean is None else mean, entry["name"])


def _encode(array, kind="PNG"):
    """Encode a picture as a data URL, at most `WIDTH` pixels wide; PNG keeps label colors exact when shrinking."""
    picture = Image.fromarray(array)
    if picture.width > WIDTH:
        size = (WIDTH, max(1, round(picture.height * WIDTH / picture.width)))
        picture = picture.resize(size, Image.Resampling.BILINEAR if kind == "JPEG" else Image.Resampling.NEAREST)
    if kind == "PNG":
        picture = picture.quantize(64, dither=Image.Dither.NONE) if picture.mode == "RGB" else picture
    file = io.BytesIO()
    picture.save(file, kind, **({"quality": 80} if kind == "JPEG" else {"optimize": True}))
    return _data_url(kind, file.getvalue())


def _data_url(kind, data):
    return f"data:image/{kind.lower()};base64,{base64.b64encode(data).decode()}"
