"""Scores as text, and `report.html`: scores and the images that went worst, in one file that needs nothing else."""

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

OVERALL = 10        # images shown of the whole data set
EACH_CLASS = 2      # and of every class
WIDTH = 640         # pixels of a picture in the report
LEAST_MASS = 5e-3   # share of an image's coarse probability from which a class's attention is shown


class WorstImages:
    """Keeps the images with the lowest IoU, overall and by class, as small encoded pictures.

    Memory grows with the number of classes, not with the data set.

    Args:
        names: of the N classes.
        color: train ids (H, W) → RGB (H, W, 3) uint8.
        ignore_index: truth that does not count.
    """

    def __init__(self, names, color, ignore_index=255):
        self.names, self.color, self.ignore_index = names, color, ignore_index
        self.kept = {}      # name → entry

    def add(self, name, image, truth, labels, counts, attention=None):
        """Look at an image.

        Args:
            image, truth: (H, W, 3) uint8 and (H, W) train ids, arrays.
            labels, counts: {head: train ids (H, W)} and {head: ConfusionMatrix} of its prediction.
            attention: coarse probabilities (N, H, W), or None.
        """
        class_iou = {head: [none_if_nan(iou) for iou in matrix.class_iou().tolist()]
                     for head, matrix in counts.items()}
        entry = {"name": name, "class_iou": class_iou,
                 "mean_iou": {head: mean_of_scores(values) for head, values in class_iou.items()},
                 "true_classes": np.setdiff1d(truth, [self.ignore_index]).tolist()}
        self.kept[name] = entry
        if name in self._prune():
            entry["pictures"] = self._pictures(image, truth, {head: np.asarray(one) for head, one in labels.items()})
            entry["attention"] = {} if attention is None else self._attention(attention)

    def merge(self, others):
        """Add what other processes kept."""
        for other in others:
            self.kept |= other
        self._prune()

    def entries(self):
        """The images kept, worst first; `overall` tells those that are worst regardless of class."""
        ranked = sorted(self.kept.values(), key=_badness)
        return [entry | {"overall": number < OVERALL} for number, entry in enumerate(ranked)]

    def _prune(self):
        """Drop what is not among the worst; returns the names that stay."""
        entries = sorted(self.kept.values(), key=_badness)
        stay = {entry["name"] for entry in entries[:OVERALL]}
        for index in range(len(self.names)):
            having = [entry for entry in entries if index in entry["true_classes"]]
            having.sort(key=lambda entry: (entry["class_iou"]["fine"][index], entry["name"]))
            stay |= {entry["name"] for entry in having[:EACH_CLASS]}
        self.kept = {name: entry for name, entry in self.kept.items() if name in stay}
        return stay

    def _pictures(self, image, truth, labels):
        ignored = truth == self.ignore_index
        shown = {"image": _encode(image, "JPEG"), "truth": _encode(self.color(truth))}
        for head, predicted in labels.items():
            shown[head] = _encode(self.color(predicted))
        shown["errors"] = _encode(error_map(image, truth, labels["fine"], ignored), "JPEG")
        if "coarse" in labels:
            shown["coarse against fine"] = _encode(difference(truth, labels["coarse"], labels["fine"],
                                                              self.ignore_index))
        return shown

    def _attention(self, probabilities):
        """{class: picture} of the coarse probability P, the weight with which pixels make and take each center."""
        mass = probabilities.flatten(1).mean(1)
        return {self.names[i]: _encode((255 * probabilities[i]).byte().cpu().numpy(), "JPEG")
                for i in mass.argsort(descending=True).tolist() if mass[i] >= LEAST_MASS}


def write_report(path, result, matrix, classes, palette, entries):
    """Write the report.

    Args:
        path: of the file, which is replaced whole.
        result: what `result.json` holds.
        matrix: (N, N + 1) pixel counts of the headline, rows the truth.
        classes: N names.
        palette: (N, 3) uint8 RGB.
        entries: of `WorstImages`.
    """
    import jinja2  # drawn once at the end; training and scoring do without

    matrix = np.asarray(matrix, float)
    share = 100 * matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    reliability = reliability_chart(result["calibration"])
    template = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
    columns, bounded = (dict(reversed(some(result).items()))        # the headline first, for narrow screens
                        for some in (score_columns, boundary_columns))
    page = template.render(
        plural=plural, result=result, columns=columns, share=share.tolist(), entries=entries, classes=classes,
        colors=["#{:02x}{:02x}{:02x}".format(*color) for color in np.asarray(palette).tolist()],
        rows=[(name, [column["class_iou"][name] for column in columns.values()]) for name in classes],
        bounded=bounded,
        boundary_rows=[(name, [column["class_boundary_f"][name] for column in bounded.values()]) for name in classes],
        void=bool(matrix[:, -1].any()), reliability=reliability and _data_url("PNG", reliability))
    content = page.encode(errors="backslashreplace")        # names of files may be any bytes
    files.write_atomically(path, lambda file: file.write(content))


def score_columns(result):
    """{heading: scores} of a result: each protocol, coarse and fine side by side."""
    columns = {}
    for protocol in ("single_scale", "multi_scale"):
        if protocol in result:
            short = protocol.removesuffix("_scale")
            if "coarse" in result:
                columns[f"{short} coarse"] = result["coarse"][protocol]
            columns[f"{short} fine"] = result[protocol]
    return columns


def boundary_columns(result):
    """Those of `score_columns` that hold scores of boundaries."""
    return {heading: scores for heading, scores in score_columns(result).items() if "mean_boundary_f" in scores}


def score_table(result):
    """The scores as lines of text: a column for each protocol and head."""
    columns = score_columns(result)
    first = next(iter(columns.values()))
    wide = max(map(len, [*first["class_iou"], "mean IoU (categories)"]))
    lines = []

    def add(label, values, missing="not in data"):
        shown = (missing if value is None else value if isinstance(value, str) else f"{100 * value:.2f}"
                 for value in values)
        lines.append(f"{label:<{wide}}" + "".join(f"{text:>15}" for text in shown))

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
    lines.append(f"IoU in per cent; mean over {first['classes_averaged']} of "
                 f"{plural(len(first['class_iou']), 'class')}")
    *_, richest = columns
    lines.append("expected calibration error, " + ", ".join(
        f"{head} {100 * found['expected_calibration_error']:.2f} %" for head, found in result["calibration"].items())
        + f" ({richest.split()[0]}-scale, {BINS} bins)")
    bounded = boundary_columns(result)
    if bounded:
        lines.append("")
        add(f"boundary F, {result['protocol']['boundary']:g} px, %", bounded)
        for name in first["class_iou"]:
            add(name, [scores["class_boundary_f"][name] for scores in bounded.values()], "no boundary")
        lines.append("-" * len(lines[-1]))
        add("mean", [scores["mean_boundary_f"] for scores in bounded.values()], "no boundary")
    return "\n".join(lines)


def comparison_table(results):
    """One line a snapshot: mean IoU in per cent of each protocol and head."""
    headings = list(score_columns(results[0]))
    wide = max(len(result["checkpoint"]) for result in results)
    lines = [f"{'mean IoU, %':<{wide}}" + "".join(f"{name:>15}" for name in headings)]
    for result in results:
        values = score_columns(result)
        lines.append(f"{result['checkpoint']:<{wide}}" + "".join(
            f"{100 * (values[name]['mean_iou'] or 0):>15.2f}" if name in values else f"{'':>15}" for name in headings))
    return "\n".join(lines)


def _badness(entry):
    mean = entry["mean_iou"]["fine"]
    return (2.0 if mean is None else mean, entry["name"])


def _encode(array, kind="PNG"):
    """A picture as a data URL, at most `WIDTH` wide; label colors are not mixed."""
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
