"""What a snapshot of train.py holds, checked to the last tensor before anything is made of it."""

import math
import random
import reprlib
from dataclasses import dataclass
from pathlib import Path

import torch

from utils.common.errors import UserError
from utils.common.flags import LONGEST_SIDE
from utils.ops.normalization import Normalization
from utils.runs import snapshots
from utils.training.optimization import OPTIMIZERS

from ..build import meta_network

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# CUDA's kernel that puts the statistics of several processes together knows variances as 1 / sqrt(var + eps) alone. For
# a channel that is always 0 it finds eps - eps, which rounding may leave below 0 by a few 1e-7 of eps.
ROUNDING = 1e-8
MISSING = object()
# What the loss scale of fp16 keeps → the least value that makes sense.
SCALER = {"scale": 1e-30, "growth_factor": 1e-30, "backoff_factor": 1e-30, "growth_interval": 1, "_growth_tracker": 0}


@dataclass
class Config:
    """All that rebuilds a network and its input, and tells one run from another.

    Attributes:
        network: arguments of `networks.build_network`.
        normalization: of the network's input.
        classes: rows of the class table.
        input_size: of the crops, (height, width) in pixels.
        arguments: {flag's name: plain value}, or None.
        samples: {"count": pairs of image and label, "sha256": of their names}; None in files of older versions.
    """

    network: dict
    normalization: Normalization
    classes: list
    input_size: tuple
    arguments: dict | None = None
    samples: dict | None = None

    def plain(self):
        """What a snapshot's "config" holds: plain values."""
        return vars(self) | {"normalization": self.normalization.as_config(), "input_size": list(self.input_size)}


@dataclass
class Snapshot:
    """A snapshot, checked.

    Attributes:
        path: of the file, for messages.
        model: names → tensors; names, shapes and kinds are those of the network that `config` describes.
        step: steps done.
        optimizer: {number of the parameter: {name: tensor}}, its state, or None without an optimizer.
        scaler: state of the loss scale; empty without one.
        rng: states of the random generators (`checkpoint.random_state`) of every process, or None.
        quick_mean_iou: result of the quick validation, in the best snapshot alone.
        average: the moving average of the weights, as `model`, or None.
        average_updates: how often that was updated; None in files of older versions, which had no warm-up of its decay.
    """

    path: str
    model: dict
    step: int
    config: Config
    optimizer: dict | None
    scaler: dict
    rng: list | None
    quick_mean_iou: float | None
    average: dict | None = None
    average_updates: int | None = None

    def weights(self, raw=False):
        """Names → tensors to evaluate with: the moving average where there is one; raw: of the last step anyway."""
        return self.model if raw or self.average is None else self.average


def parse(path, content, resuming=False):
    """What `checkpoint.load` gave for one of our own snapshots → `Snapshot`.

    Args:
        path: of the file; one that is named after a step must hold that step.
        resuming: a run is to go on from it, for which a network alone is not enough.

    Raises `UserError` naming the file, the field, what was expected and what was found.
    """
    needed = ["model", "config", "step", *["optimizer", "rng"] * resuming]
    missing = sorted(set(needed) - set(content if isinstance(content, dict) else ()))
    if missing:
        raise UserError(f"{path}: expected a snapshot that train.py wrote, found a file without {', '.join(missing)}")
    root = Field(path, "", content)
    step = root["step"].whole(0)
    named = snapshots.step_of(path)
    root["step"].need(named in (None, step), f"{named}, as the file's name says,")
    config = _config(root["config"], resuming)
    root["step"].need("num_steps" not in (config.arguments or {}) or step <= config.arguments["num_steps"],
                      "at most the --num-steps of its run")
    try:
        network = meta_network(**config.network)
    except (ValueError, TypeError) as error:        # TypeError: for an argument that does not exist
        raise UserError(f"{path}: config.network.{error}") from None
    model = root["model"].tensors(network.state_dict())
    present = {name: name in content for name in ("optimizer", "scaler", "rng", "quick_mean_iou", "average",
                                                  "average_updates")}
    present["quick_mean_iou"] |= Path(path).name == snapshots.BEST
    present["average"] |= (config.arguments or {}).get("ema") is not None
    return Snapshot(str(path), model, step, config,
                    _optimizer(root["optimizer"], network, config) if present["optimizer"] else None,
                    _scaler(root["scaler"]) if present["scaler"] else {},
                    _generators(root["rng"]) if present["rng"] else None,
                    root["quick_mean_iou"].number(0, 1) if present["quick_mean_iou"] else None,
                    root["average"].tensors(network.state_dict()) if present["average"] else None,
                    root["average_updates"].whole(0, step) if present["average_updates"] else None)


class Field:
    """A value in a file, with the file and its place there, for the sentence that is due if it is wrong."""

    def __init__(self, path, name, value):
        self.path, self.name, self.value = path, name, value

    def __getitem__(self, key):
        """What a dict or list holds there; a dict may lack it."""
        value = self.value.get(key, MISSING) if isinstance(self.value, dict) else self.value[key]
        return Field(self.path, f"{self.name}.{key}".lstrip("."), value)

    def need(self, holds, expected, found=None):
        """The value, if that holds."""
        if not holds:
            raise UserError(f"{self.path}: expected {expected} as {self.name}, found {found or shown(self.value)}")
        return self.value

    def table(self):
        """A dict, by text alone."""
        return self.need(isinstance(self.value, dict) and all(isinstance(key, str) for key in self.value), "a dict")

    def fields(self, length=None):
        """The entries of a list as fields."""
        holds = isinstance(self.value, list | tuple) and length in (None, len(self.value))
        self.need(holds, "a list" if length is None else f"a list of {length}")
        return [self[index] for index in range(len(self.value))]

    def text(self, *choices):
        kind = f"one of {', '.join(choices)}" if choices else "text"
        return self.need(isinstance(self.value, str) and (not choices or self.value in choices), kind)

    def whole(self, low, high=2 ** 63):
        holds = isinstance(self.value, int) and not isinstance(self.value, bool) and low <= self.value <= high
        return self.need(holds, f"a whole number from {low}" + f" to {high}" * (high < 2 ** 63))

    def number(self, low=-math.inf, high=math.inf):
        holds = isinstance(self.value, int | float) and not isinstance(self.value, bool) and low <= self.value <= high
        return self.need(holds and abs(self.value) < 2 ** 63, f"a finite number from {low} to {high}")

    def plain(self, depth=3):
        """None, text, a number, or lists of them."""
        if isinstance(self.value, list) and depth:
            return [field.plain(depth - 1) for field in self.fields()]
        return self.need(self.value is None or type(self.value) in (bool, int, float, str), "a plain value")

    def tensor(self, like=None):
        """A dense tensor of finite values on the CPU; like: a tensor of its shape and kind, whole or floating."""
        value = self.value
        self.need(isinstance(value, torch.Tensor), "a tensor")
        self.need(value.layout == torch.strided and not value.is_quantized and not value.is_nested
                  and value.device.type == "cpu", "a dense tensor", f"{shown(value)}, {_kind(value)}")
        self.need(value.dtype in FLOATS or value.dtype in (torch.int64, torch.int32, torch.uint8),
                  "a tensor of real numbers")
        if like is not None:
            self.need(value.shape == like.shape and value.dtype.is_floating_point == like.dtype.is_floating_point,
                      shown(like))
        # A file of a few bytes can declare a huge tensor, with strides of 0.
        self.need(value.numel() * value.element_size() <= value.untyped_storage().nbytes(), "a place for each value",
                  f"{shown(value)} whose values share theirs")
        if value.numel():
            low, high = (one.item() for one in torch.aminmax(value.detach()))       # in one pass, without a copy
            self.need(math.isfinite(low) and math.isfinite(high), "finite values", "some that are not finite")
            self.need(low >= -ROUNDING or not self.name.endswith(("running_var", "num_batches_tracked")),
                      "no value below 0", f"{low:.4g}")
        return value

    def tensors(self, like):
        """A dict of tensors of exactly these names, shapes and kinds."""
        found = self.table()
        for names, what in ((like.keys() - found.keys(), "none named"), (found.keys() - like.keys(), "one named")):
            self.need(not names, "the tensors of the network that its config describes",
                      f"{what} {', '.join(sorted(names)[:3])}{', ...' if len(names) > 3 else ''}")
        return {name: self[name].tensor(tensor) for name, tensor in like.items()}


def shown(value):
    """A value from a file in a few words."""
    if value is MISSING:
        return "nothing"
    if isinstance(value, torch.Tensor):
        if value.is_nested:
            return "a nested tensor"
        return f"a tensor of {str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, dict):
        return f"a dict of {len(value)} entries"
    if isinstance(value, list | tuple) and (len(value) > 4 or not all(
            entry is None or isinstance(entry, bool | int | float | str) for entry in value)):
        return f"a list of {len(value)} entries"
    return " ".join(reprlib.repr(value).split())


def _kind(tensor):
    if tensor.is_nested or tensor.is_quantized:
        return "nested" if tensor.is_nested else "quantized"
    return "without values" if tensor.device.type == "meta" else str(tensor.layout).removeprefix("torch.")


def _config(field, resuming):
    config = field.table()
    normalization = field["normalization"]
    normalization.table()
    normalization["order"].text("RGB", "BGR")
    for name, low in (("mean", -1e6), ("std", 1e-6)):
        for one in normalization[name].fields(3):
            one.number(low, 1e6)
    input_size = tuple(one.whole(1, LONGEST_SIDE) for one in field["input_size"].fields(2))
    network, classes = field["network"].table(), field["classes"]
    for row in classes.fields():
        row.table()
        for name, (low, high) in {"id": (-2 ** 31, 65535), "train_id": (-1, 255), "red": (0, 255), "green": (0, 255),
                                  "blue": (0, 255)}.items():
            row[name].whole(low, high)
        row["name"].text(), row["category"].text()
    scored = {row["train_id"]: row["name"] for row in reversed(classes.value) if row["train_id"] not in (-1, 255)}
    count = len(scored)
    classes.need(len(set(scored.values())) == count, "another name for every class")
    field["network"]["num_classes"].need(
        type(network.get("num_classes")) is int and network["num_classes"] == count,
        f"the number of its classes, {count},")
    for name in ("model", "backbone", "norm", "activation"):    # no defaults: the tensors do not always tell these
        field["network"][name].text()
    arguments = samples = None
    if resuming or "arguments" in config:
        names = field["arguments"].table()
        arguments = {name: field["arguments"][name].plain() for name in names}
        if "num_steps" in arguments:
            field["arguments"]["num_steps"].whole(1)
    if config.get("samples") is not None:
        field["samples"].table()
        samples = {"count": field["samples"]["count"].whole(1), "sha256": field["samples"]["sha256"].text()}
    return Config(network, Normalization.from_config(normalization.value), classes.value, input_size, arguments,
                  samples)


def _optimizer(field, network, config):
    """{number of the parameter: {name: tensor}}, of the state of PyTorch's optimizers."""
    field.table()
    parameters, arguments = list(network.parameters()), config.arguments or {}
    groups = field["param_groups"].fields()
    numbers = [number.whole(0) for group in groups if group.table() for number in group["params"].fields()]
    field["param_groups"].need(numbers == list(range(len(parameters))),
                               f"groups of the network's {len(parameters)} parameters",
                               f"{len(groups)} groups of {len(numbers)} parameters")
    frozen = {parameter for module in _frozen(Field(field.path, "config.arguments.freeze", arguments.get("freeze")),
                                              network) for parameter in module.parameters()}
    learning = {number for number, parameter in enumerate(parameters)
                if parameter.requires_grad and parameter not in frozen}
    state = field["state"].need(isinstance(field["state"].value, dict), "a dict")
    field["state"].need(not state or state.keys() == learning, "the state of every parameter that learns, or of none")
    kind = Field(field.path, "config.arguments.optimizer", arguments.get("optimizer", "sgd"))
    kept = OPTIMIZERS[kind.text(*OPTIMIZERS)]
    entries, scalar = {}, torch.zeros(())
    for number in state:
        entry = field["state"][number]
        if any(entry.table().get(name) is not None for name in kept):
            entries[number] = {name: entry[name].tensor(scalar if name == "step" else parameters[number])
                               for name in kept}
            for name in {"step", "exp_avg_sq"}.intersection(kept):      # a count, and a mean of squares
                entry[name].need(bool((entries[number][name] >= 0).all()), "no negative values")
    return entries


def _frozen(field, network):
    """The modules that a run did not train."""
    if field.value is None:
        return []
    try:
        return network.backbone.first_stages([name.text() for name in field.fields()])
    except ValueError as error:
        raise UserError(f"{field.path}: {field.name}: {error}") from None


def _scaler(field):
    state = field.table()
    if state and all(isinstance(value, dict) for value in state.values()):      # apex has one for each loss
        for name in state:
            field[name]["loss_scale"].number(1e-30), field[name]["unskipped"].whole(0)
        return state
    field.need(state.keys() in (set(), SCALER.keys()), f"a dict of {', '.join(SCALER)}, or an empty one")
    for name in state:
        field[name].number(SCALER[name])
    return state


def _generators(field):
    states = [one for one in field.fields() if one.table()]
    field.need(len(states) > 0 and len(states) == len(field.value), "the states of at least one process")
    for one in states:
        for cuda in one["cuda"].fields():
            tensor = cuda.tensor()
            cuda.need(tensor.dtype == torch.uint8 and tensor.shape == (16,), "16 bytes of a CUDA generator")
        kind, keys, position, gauss, cached = one["numpy"].fields(5)
        kind.text("MT19937"), position.whole(0, 624), gauss.whole(0, 1), cached.number()
        keys.need(keys.tensor().dtype == torch.int64 and keys.value.shape == (624,)
                  and 0 <= keys.value.min() and keys.value.max() < 2 ** 32, "624 numbers of 32 bits")
        one["torch"].tensor()
        for part, put in (("torch", torch.Generator().set_state), ("python", random.Random().setstate)):
            try:
                put(one[part].value)
            except (RuntimeError, TypeError, ValueError, OverflowError):
                one[part].need(False, f"the state of a generator of {part}")
    return field.value
