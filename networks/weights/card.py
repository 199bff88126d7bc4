"""Trained weights for others: a file of safetensors, with config.json and a model card beside it."""

import glob
import json
from pathlib import Path

import torch

from utils.common import files
from utils.common.errors import UserError, plural
from utils.imaging.classes import Classes
from utils.metrics.report import score_columns

BESIDE = CONFIG, CARD = "config.json", "README.md"
MARK = "evaluate.py --export"       # in both: only what has it is ever replaced
RAW, AVERAGE = "last step", "moving average"


def is_ours(path):
    """Whether a file is a config.json or a model card that was written here."""
    try:
        return MARK in path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False


def write_weights(path, found, *, raw, precision, scores, check):
    """Write the weights of a snapshot, and beside them what tells others about them.

    Args:
        path: of the file of safetensors.
        found: `utils.snapshot.Snapshot`.
        raw: the weights of the last step, also where there is a moving average.
        precision: `fp32`, or `fp16` for half the bytes; statistics of norms stay as they are.
        scores: as `find_scores` gives them.
        check: (names → tensors, as read back) → a sentence, or `UserError`.

    Returns:
        The sentence of the check. Raises `UserError`.
    """
    try:
        from safetensors.torch import load_file, save
    except ImportError:
        raise UserError(f"--export {path}: expected the package safetensors, found none; pip install safetensors"
                        ) from None
    weights = found.weights(raw)
    if precision == "fp16":
        weights = {name: tensor if "running_" in name or not tensor.is_floating_point() else _half(path, name, tensor)
                   for name, tensor in weights.items()}
    content = save({name: tensor.contiguous() for name, tensor in weights.items()}, {"format": "pt"})
    checked = files.write_checked(path, content, lambda written: check(load_file(written)))
    kind, plain = kind_of(found, raw), found.config.plain()
    files.write_json(path.with_name(CONFIG), {
        "written_by": MARK, "step": found.step, "weights": kind, "precision": precision,
        **{name: plain[name] for name in ("network", "normalization", "input_size", "classes")}})
    which = f"{'moving average at' if kind == AVERAGE else 'those of'} step {found.step}, {precision}"
    text = card(path.name, found.config, which, scores)
    files.write_atomically(path.with_name(CARD), lambda file: file.write(text.encode()))
    return checked


def kind_of(found, raw):
    """Which weights of a `Snapshot` are meant, in words."""
    return RAW if raw or found.average is None else AVERAGE


def _half(path, name, tensor):
    half = tensor.to(torch.float16)
    if not half.isfinite().all():
        raise UserError(f"--export-precision fp16: expected weights that float16 can hold, up to 65504, for {path}, "
                        f"found {tensor.abs().max():.3g} in {name}")
    return half


def find_scores(path, kind):
    """What evaluate.py found for these weights, in the folders of results beside a snapshot.

    path: of the snapshot; kind: `RAW` or `AVERAGE`.

    Returns [(lines of Markdown about the protocol and the means, {class name: IoU or None})]. Raises `UserError` for a
    result.json that holds something else.
    """
    found = []
    for file in sorted(path.parent.glob(f"{glob.escape(path.stem)}_*/result.json")):
        try:
            result = json.loads(file.read_text(encoding="utf-8"))
            if Path(result["checkpoint"]).name == path.name and kind == (
                    AVERAGE if result["protocol"].get("weights") == AVERAGE else RAW):
                found.append(_scores(result))
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            raise UserError(f"{file}: expected a result of evaluate.py, for the model card, found something else"
                            ) from None
    return found


def _scores(result):
    protocol, columns = result["protocol"], score_columns(result)
    windows = "whole images" if protocol["window"] is None else "windows of {}×{}".format(*protocol["window"])
    scales = ", ".join(f"{scale:g}" for scale in protocol["scales"])
    lines = [f"{protocol['split']}, {plural(result['num_images'], 'image')}: {windows}, scales {scales}"
             f"{', mirrored too' if protocol['flip'] else ''}; single: scale 1 alone.", "",
             "| | mean IoU, % | of categories | pixel accuracy, % |", "|---|---|---|---|"]
    for heading, scores in columns.items():
        means = (scores[name] for name in ("mean_iou", "mean_category_iou", "pixel_accuracy"))
        lines.append(f"| {heading} | {' | '.join(map(_percent, means))} |")
    *_, richest = columns.values()
    return lines, richest["class_iou"]


def _percent(value):
    return "" if value is None else f"{100 * value:.2f}"


def card(name, config, which, scores):
    """The model card, as Markdown.

    Args:
        name: of the file of weights.
        config: `utils.snapshot.Config`.
        which: weights these are, in words.
        scores: as `find_scores` gives them.
    """
    classes, normalization = Classes(config.classes), config.normalization
    model, backbone, (height, width) = config.network["model"], config.network["backbone"], config.input_size
    mean, deviation = (", ".join(f"{one:g}" for one in values) for values in (normalization.mean, normalization.std))
    lines = ["---", "pipeline_tag: image-segmentation", "tags:", "- semantic-segmentation", "---", "",
             f"# {model} on {backbone}, {classes.num_classes} classes", "",
             f"Weights: {which}. Written by `{MARK}`.", "",
             "    from networks import load", "",
             f"    labels = load(\"{name}\").predict(\"image.jpg\").labels", "",
             f"Trained on crops of {height}×{width}. `load` takes care of windows and of the input, which is "
             f"{normalization.order} of 0 to 255, less {mean}, over {deviation}.", "", "## Scores", ""]
    lines += [line for about, _ in scores for line in (*about, "")] or ["Not measured.", ""]
    heads = ["train id", "class", "label id", "red, green, blue", *["IoU, %"] * bool(scores)]
    lines += ["## Classes", "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for train_id, (each, label_id) in enumerate(zip(classes.names, classes.ids, strict=True)):
        iou = [_percent(class_iou.get(each)) for _, class_iou in scores[:1]]
        color = ", ".join(map(str, classes.palette[train_id]))
        lines.append(f"| {' | '.join([str(train_id), each.replace('|', ' '), str(label_id), color, *iou])} |")
    return "\n".join(lines) + "\n"
