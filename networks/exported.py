"""Networks that `evaluate.py --export` wrote as .onnx, run by onnxruntime in the form that `SlidingPredictor` takes."""

import json
from dataclasses import replace
from pathlib import Path

import torch

from utils.common.errors import UserError, first_line
from utils.common.messages import logger
from utils.imaging.classes import IGNORE_INDEX
from utils.ops.normalization import Normalization
from utils.ops.upsampling import GRID

from .weights.snapshot import MISSING, Field, parse_config

METADATA = "acfnet"     # key of the file's metadata, JSON: the config.json of an export, and "grid"
DEFAULTS = {            # for files of older versions, which have none
    "network": dict.fromkeys(("model", "backbone", "norm", "activation"), "unknown"),
    "normalization": Normalization().as_config(), "input_size": [769, 769], "grid": GRID, "precision": "fp32"}


def is_exported(path):
    """Whether a file is one for `OnnxNetwork`, by its name."""
    return Path(path).suffix == ".onnx"


class OnnxNetwork:
    """An exported network: images (B, 3, h, w) minus the mean color → {"fine": logits (B, N, h, w)[, "coarse"]}.

    The file normalizes images itself, but `SlidingPredictor` pads normalized ones with zeros, the mean color: it
    subtracts the mean, and this adds it again.

    Args:
        path: of the file.
        device: `torch.device` of the logits, on which onnxruntime computes if it can.
        classes: rows of a class table for a file without metadata, or None.

    Attributes:
        config: `Config`, with the normalization above; of a fixed size, with this size of the windows.
        grid: as in `SlidingPredictor`.
        amp: precision of the file, as a value of --amp.
    """

    def __init__(self, path, device, classes=None):
        self.path, self.device, self.session = path, device, _open_session(path, device)
        inputs, outputs = ({one.name: one.shape for one in values}
                           for values in (self.session.get_inputs(), self.session.get_outputs()))
        if list(inputs) != ["images"] or "fine" not in outputs:
            raise UserError(f"{path}: expected a file of evaluate.py --export, from images to fine[, coarse], found "
                            f"{', '.join(inputs)} to {', '.join(outputs)}")
        self.heads, sides = list(outputs), inputs["images"][2:]
        self.size = tuple(sides) if all(isinstance(side, int) for side in sides) else None      # if it is fixed
        field = Field(path, "metadata", self._metadata(classes))
        config = parse_config(field)
        step, rest = field["grid"].fields(2)
        grid = step.integer(1, 1024), rest.integer(0, 1024)
        self.grid = (1, 0) if self.size else grid       # (1, 0): windows of any size
        self.amp = "fp16" if field["precision"].text("fp32", "fp16") == "fp16" else "off"
        mean = config.normalization.mean[::1 if config.normalization.order == "RGB" else -1]
        self.mean = torch.tensor(mean).float()[:, None, None]
        self.config = replace(config, normalization=Normalization("RGB", tuple(mean), (1.0, 1.0, 1.0)),
                              input_size=self.size or config.input_size)

    def _metadata(self, classes):
        """Plain values of the file's metadata, or else of `DEFAULTS` and the class table."""
        text = self.session.get_modelmeta().custom_metadata_map.get(METADATA)
        if text is None and classes is None:
            raise UserError(f"{self.path}: expected its classes in the file, where --export writes them, or --classes, "
                            "found neither")
        if text is None:
            count = len({row["train_id"] for row in classes} - {-1, IGNORE_INDEX})
            logger.info(f"{self.path}: without metadata, so windows have 769×769 pixels by default and are padded with "
                        "the mean color of ImageNet")
            return DEFAULTS | {"network": DEFAULTS["network"] | {"num_classes": count}, "classes": classes}
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            return MISSING

    def __call__(self, images):
        size = tuple(images.shape[-2:])
        if self.size not in (None, size):
            raise UserError("{}: expected windows of {}×{}, the fixed size of this export, found {}×{}; --input-size "
                            "{},{}, and --scales at which images are not smaller".format(
                                self.path, *self.size, *size, *self.size))
        images = (images.float().cpu() + self.mean).contiguous()
        try:        # a fixed size has a batch size of 1
            parts = [self.session.run(self.heads, {"images": part.numpy()})
                     for part in images.split(len(images) if self.size is None else 1)]
        except Exception as error:  # noqa: BLE001, onnxruntime has its own exceptions
            raise UserError(f"{self.path}: expected a file that runs with images of {size[0]}×{size[1]}, found: "
                            f"{first_line(error)}") from None
        outputs = {head: torch.cat(list(map(torch.from_numpy, logits))).to(self.device)
                   for head, logits in zip(self.heads, zip(*parts, strict=True), strict=True)}
        count, channels = self.config.network["num_classes"], outputs["fine"].shape[1]
        if channels != count:       # the older exporter leaves the number open in the file
            raise UserError(f"{self.path}: expected logits of the {count} classes of its metadata or --classes, found "
                            f"{channels}")
        return outputs


def _open_session(path, device):
    try:
        import onnxruntime
    except ImportError:
        raise UserError(f"{path}: expected the package onnxruntime, found none; pip install onnxruntime") from None
    options, providers = onnxruntime.SessionOptions(), ["CPUExecutionProvider"]
    options.intra_op_num_threads = torch.get_num_threads()
    if device.type == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": device.index or 0}))
    elif device.type == "cuda":
        logger.warning(f"warning: {path}: computing on the CPU: expected the package onnxruntime-gpu, found none")
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # noqa: BLE001, onnxruntime has its own exceptions
        raise UserError(f"{path}: expected an ONNX file, found: {first_line(error)}") from None
