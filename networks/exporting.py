"""Export of a trained network to .onnx, .pt2 or .safetensors, or to the Hub: evaluate.py --export and --push."""

import json
import os
import tempfile
from pathlib import Path

from utils.common.errors import UserError
from utils.inference import export
from utils.ops.upsampling import grid_of
from utils.runs.results import check_file

from .backbones.names import find_backbone
from .exported import METADATA
from .predictor import build_for_evaluation, select_weights
from .weights import card, hub
from .weights.start import read_snapshot

SUFFIXES = (".onnx", ".pt2", ".safetensors")


def export_snapshot(path, target, *, raw_weights=False, size=None, precision="fp32", overwrite=False, name=None):
    """Write the network of a snapshot to a file with one of `SUFFIXES`.

    The written file is compared with the network before it gets its final name.

    Args:
        path: `Path` of the snapshot.
        target: `Path` of the file to write; with .safetensors, config.json and a model card are written beside it.
        raw_weights: use the weights of the last step, even if the snapshot has a moving average.
        size: (height, width) of the images that .onnx and .pt2 take; None for any size.
        precision: `fp32` or `fp16`, of weights and arithmetic.
        overwrite: replace the file, and the files that an earlier export wrote beside it.
        name: what messages and the model card call the file; None for its path.

    Returns:
        A sentence that describes the written file.

    Raises:
        UserError: if the snapshot cannot be read, or the file cannot be written or differs from the network.
    """
    check_target(target, size, overwrite)
    snapshot = read_snapshot(path)
    config = snapshot.config
    network = build_for_evaluation(config, select_weights(snapshot, raw_weights))
    if target.suffix == ".safetensors":
        def check(state):
            def reopen():
                return export.ImagesToLogits(build_for_evaluation(config, state), config.normalization)
            return export.compare(target, reopen, reference=export.ImagesToLogits(network, config.normalization),
                                  examples=[export.example_images()], precision=precision)

        checked = card.write_weights(target, snapshot, raw=raw_weights, precision=precision, check=check, name=name,
                                     scores=card.find_scores(path, card.weights_kind(snapshot, raw_weights)))
        return f"{name or target}, with {' and '.join(card.SIDE_FILES)}; {checked}"
    metadata = card.describe(snapshot, raw_weights, precision) | {"grid": grid_of(network)}
    heads, checked = export.write_program(target, network, config.normalization, size=size, precision=precision,
                                          traced=find_backbone(config.network["backbone"]).traced,
                                          metadata={METADATA: json.dumps(metadata)})
    count, shape = ("1", "{}, {}".format(*size)) if size else ("B", "H, W")
    return (f"{target}: images ({count}, 3, {shape}) float32 RGB, 0 to 255 → {', '.join(heads)} logits ({count}, "
            f"{config.network['num_classes']}, {shape}); whole images, no windows; {checked}")


def push_snapshot(path, name, *, raw_weights=False, precision="fp32", overwrite=False):
    """Upload a snapshot as `export_snapshot` writes it as .safetensors; name, overwrite, errors: as of `hub.push`."""
    hub.push(name, None, overwrite)     # checks, before anything is computed
    with tempfile.TemporaryDirectory() as folder:
        written = export_snapshot(path, Path(folder, hub.WEIGHTS), raw_weights=raw_weights, precision=precision,
                                  name=name)
        return f"{written}; {hub.push(name, folder, overwrite)}"


def check_target(target, size, overwrite):
    """Raise `UserError` if an export to this file is impossible or would replace other files."""
    if target.suffix not in SUFFIXES:
        raise UserError(f"--export {target}: expected a name that ends in .onnx, .pt2 or .safetensors, found "
                        f"{target.suffix or 'none of these'}")
    check_file("--export", target, overwrite)
    if target.suffix != ".safetensors":
        return
    if size:
        raise UserError("--export-size: expected .onnx or .pt2, found .safetensors, which holds weights for any size")
    belong_to_other_export = not os.path.lexists(target) and any(target.parent.glob("*.safetensors"))
    for name in card.SIDE_FILES:
        path = target.with_name(name)
        if os.path.lexists(path) and (belong_to_other_export or not card.is_from_export(path)):
            raise UserError(f"--export {path}: expected nothing there, or a file from an earlier export of "
                            f"{target.name}, found another file, which is kept; choose another folder")
        check_file("--export", path, overwrite)
