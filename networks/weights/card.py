"""Export of trained weights as a .safetensors file, with a config.json and a model card beside it."""

import glob
import json
from pathlib import Path

import torch

from utils.common import files
from utils.common.errors import UserError, plural
from utils.imaging.classes import Classes
from utils.reports.report import score_columns

SIDE_FILES = CONFIG, CARD = "config.json", "README.md"
MARK = "evaluate.py --export"       # part of both side files: an export replaces only files that contain it
RAW, AVERAGE = "last step", "moving average"


def is_from_export(path):
    """Whether a file is a config.json or a model card that an earlier export wrote."""
    try:
        return MARK in path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False


def write_weights(path, snapshot, *, raw, precision, scores, check, name=None):
    """Write the weights of a snapshot as a .safetensors file, and its config.json and model card beside it.

    Args:
        path: path of the .safetensors file.
        snapshot: `networks.weights.snapshot.Snapshot`.
        raw: write the weights of the last step, even if there is a moving average.
        precision: `fp32`, or `fp16` for half the bytes; the statistics of norms keep their precision.
        scores: as `find_scores` returns them.
        name: for `load` in the model card; None for the name of the file.
        check: function of the dict of tensors read back from the file; it returns a sentence or raises `UserError`.

    Returns:
        The sentence that `check` returned.

    Raises:
        UserError: if safetensors is not installed, float16 cannot represent a weight, or the check fails.
    """
    try:
        from safetensors.torch import load_file, save
    except ImportError:
        raise UserError(f"--export {path}: expected the package safetensors, found none; pip install safetensors"
                        ) from None
    weights = snapshot.weights(raw)
    if precision == "fp16":
        weights = {name: tensor if "running_" in name or not tensor.is_floating_point() else _half(path, name, tensor)
                   for name, tensor in weights.items()}
    content = save({name: tensor.contiguous() for name, tensor in weights.items()}, {"format": "pt"})
    checked = files.write_checked(path, content, lambda written: check(load_file(written)))
    kind = weights_kind(snapshot, raw)
    files.write_json(path.with_name(CONFIG), describe(snapshot, raw, precision) | {"file": path.name})
    description = f"{'moving average at' if kind == AVERAGE else 'those of'} step {snapshot.step}, {precision}"
    text = card(name or path.name, snapshot.config, description, scores)
    files.write_atomically(path.with_name(CARD), lambda file: file.write(text.encode()))
    return checked


def describe(snapshot, raw, precision):
    """Describe an export by plain values, from which the network can be rebuilt; arguments as of `write_weights`."""
    plain = snapshot.config.plain()
    return {"written_by": MARK, "step": snapshot.step, "weights": weights_kind(snapshot, raw), "precision": precision,
            **{name: plain[name] for name in ("network", "normalization", "input_size", "classes")}}


def weights_kind(snapshot, raw):
    """Name the weights that `Snapshot.weights` returns: `RAW` or `AVERAGE`."""
    return RAW if raw or snapshot.average is None else AVERAGE


def _half(path, name, tensor):
    """Convert a tensor to float16; raise `UserError` if a value is too large for it."""
    half = tensor.to(torch.float16)
    if not half.isfinite().all():
        raise UserError(f"--export-precision fp16: expected weights that float16 can hold, up to 65504, for {path}, "
                        f"found {tensor.abs().max():.3g} in {name}")
    return half


def find_scores(path, kind):
    """Read the scores of weights from the results of evaluate.py beside their snapshot.

    Args:
        path: path of the snapshot.
        kind: `RAW` or `AVERAGE`.

    Returns:
        list of (lines of Markdown about protocol and mean scores, {class name: IoU or None}).

    Raises:
        UserError: if a result.json is not a result of evaluate.py.
    """
    scores = []
    for file in sorted(path.parent.glob(f"{glob.escape(path.stem)}_*/result.json")):
        try:
            result = json.loads(file.read_text(encoding="utf-8"))
            if Path(result["checkpoint"]).name == path.name and kind == (
                    AVERAGE if result["protocol"].get("weights") == AVERAGE else RAW):
                scores.append(_scores(result))
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            raise UserError(f"{file}: expected a result of evaluate.py, for the model card, found something else"
                            ) from None
    return scores


def _scores(result):
    """Format one result; returns an entry of the list of `find_scores`."""
    protocol, columns = result["protocol"], score_columns(result)
    windows = "whole images" if protocol["window"] is None else "windows of {}×{}".format(*protocol["window"])
    scales = ", ".join(f"{scale:g}" for scale in protocol["scales"])
    lines = [f"{protocol['split']}, {plural(result['num_images'], 'image')}: {windows}, scales {scales}"
             f"{', mirrored too' if protocol['flip'] else ''}; single: scale 1 only.", "",
             "| | mean IoU, % | of categories | pixel accuracy, % |", "|---|---|---|---|"]
    for heading, scores in columns.items():
        means = (scores[name] for name in ("mean_iou", "mean_category_iou", "pixel_accuracy"))
        lines.append(f"| {heading} | {' | '.join(map(_percent, means))} |")
    *_, richest = columns.values()
    return lines, richest["class_iou"]


def _percent(value):
    return "" if value is None else f"{100 * value:.2f}"


def card(name, config, description, scores):
    """Compose the model card, as Markdown.

    Args:
        name: what `load` is given.
        config: `networks.weights.snapshot.Config`.
        description: description of the weights.
        scores: as `find_scores` returns them.
    """
    classes, normalization = Classes(config.classes), config.normalization
    model, backbone, (height, width) = config.network["model"], config.network["backbone"], config.input_size
    mean, deviation = (", ".join(map("{:g}".format, values)) for values in (normalization.mean, normalization.std))
    lines = ["---", "pipeline_tag: image-segmentation", "tags:", "- semantic-segmentation", "---", "",
             f"# {model} on {backbone}, {classes.num_classes} classes", "",
             f"Weights: {description}. Written by `{MARK}`.", "",
             "    from networks import load", "",
             f"    labels = load(\"{name}\").predict(\"image.jpg\").labels", "",
             f"Trained on crops of {height}×{width}. `load` predicts by sliding windows and normalizes the input: "
             f"{normalization.order} values from 0 to 255, minus the mean {mean}, divided by {deviation}.", "",
             "## Scores", ""]
    lines += [line for summary, _ in scores for line in (*summary, "")] or ["Not measured.", ""]
    heads = ["train id", "class", "label id", "red, green, blue", *["IoU, %"] * bool(scores)]
    lines += ["## Classes", "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for train_id, (class_name, label_id) in enumerate(zip(classes.names, classes.ids, strict=True)):
        iou = [_percent(class_iou.get(class_name)) for _, class_iou in scores[:1]]
        color = ", ".join(map(str, classes.palette[train_id]))
        lines.append(f"| {' | '.join([str(train_id), class_name.replace('|', ' '), str(label_id), color, *iou])} |")
    return "\n".join(lines) + "\n"
