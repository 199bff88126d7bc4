"""A trained network for others: evaluate.py --export."""

import os

from utils.common.errors import UserError
from utils.inference import export
from utils.runs.results import check_file

from .backbones.names import find_backbone
from .predictor import chosen_weights, prepared
from .weights import card
from .weights.start import read_snapshot

SUFFIXES = (".onnx", ".pt2", ".safetensors")


def export_snapshot(path, target, *, raw_weights=False, size=None, precision="fp32", overwrite=False):
    """Write the network of a snapshot as a file of one of `SUFFIXES`, compared with it before it takes its name.

    Args:
        path, target: `Path` of the snapshot and of the file; weights get config.json and a model card beside them.
        raw_weights: those of the last step, also where the snapshot has a moving average.
        size: (height, width) of the images that .onnx and .pt2 take; None for any.
        precision: `fp32` or `fp16`, of weights and arithmetic.
        overwrite: replace the file, and what an earlier export wrote beside it.

    Returns:
        A sentence about it. Raises `UserError`.
    """
    check_target(target, size, overwrite)
    found = read_snapshot(path)
    config = found.config
    network = prepared(config, chosen_weights(found, raw_weights))
    if target.suffix == ".safetensors":
        def check(state):
            def reopen():
                return export.ImagesToLogits(prepared(config, state), config.normalization)
            return export.compare(target, reopen, export.ImagesToLogits(network, config.normalization),
                                  [export.example_images()], precision)

        checked = card.write_weights(target, found, raw=raw_weights, precision=precision, check=check,
                                           scores=card.find_scores(path, card.kind_of(found, raw_weights)))
        return f"{target}, with {' and '.join(card.BESIDE)}; {checked}"
    heads, checked = export.write_program(target, network, config.normalization, size=size, precision=precision,
                                          traced=find_backbone(config.network["backbone"]).traced)
    count, shape = ("1", "{}, {}".format(*size)) if size else ("B", "H, W")
    return (f"{target}: images ({count}, 3, {shape}) float32 RGB, 0 to 255 → {', '.join(heads)} logits ({count}, "
            f"{config.network['num_classes']}, {shape}); whole images, no windows; {checked}")


def check_target(target, size, overwrite):
    """Raise `UserError` where nothing can be, or must not be, written, before anything is done for it."""
    if target.suffix not in SUFFIXES:
        raise UserError(f"--export {target}: expected a name that ends in .onnx, .pt2 or .safetensors, found "
                        f"{target.suffix or 'none of these'}")
    check_file("--export", target, overwrite)
    if target.suffix != ".safetensors":
        return
    if size:
        raise UserError("--export-size: expected .onnx or .pt2, found .safetensors, which holds weights for any size")
    of_another = not os.path.lexists(target) and any(target.parent.glob("*.safetensors"))
    for name in card.BESIDE:
        path = target.with_name(name)
        check_file("--export", path, overwrite)
        if os.path.lexists(path) and (of_another or not card.is_ours(path)):
            raise UserError(f"--export {path}: expected nothing there, or what an earlier export of {target.name} "
                            "wrote, found another file, which stays: name another folder")
