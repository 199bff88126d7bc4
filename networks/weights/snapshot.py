"""Content of a snapshot of train.py, and the checks of every value in it before anything uses it."""

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
# Largest negative variance that is accepted. CUDA's kernel that combines the statistics of several processes gets
# variances only as 1 / sqrt(var + eps). For a channel that is always 0 it computes eps - eps, and rounding may leave a
# few -1e-7 · eps.
ROUNDING = 1e-8
MISSING = object()
# State of the gradient scaler of fp16: the minimum of each value.
SCALER = {"scale": 1e-30, "growth_factor": 1e-30, "backoff_factor": 1e-30, "growth_interval": 1, "_growth_tracker": 0}


@dataclass
class Config:
    """The values that are needed to rebuild a network and its input, and to recognize a run.

    Attributes:
        network: arguments of `networks.build_network`.
        normalization: `Normalization` of the network's input.
        classes: rows of the class table.
        input_size: (height, width) of the training crops in pixels.
        arguments: plain values by the names of flags, or None.
        samples: {"count": number of pairs of image and label, "sha256": hash of their names}; None in files of older
            versions.
    """

    network: dict
    normalization: Normalization
    classes: list
    input_size: tuple
    arguments: dict | None = None
    samples: dict | None = None

    def plain(self):
        """Return the "config" of a snapshot: plain values."""
        return vars(self) | {"normalization": self.normalization.as_config(), "input_size": list(self.input_size)}


@dataclass
class Snapshot:
    """The checked content of a snapshot.

    Attributes:
        path: path of the file, for messages.
        model: state dict; its names, shapes and kinds of dtype are those of the network that `config` describes.
        step: number of finished training steps.
        config: `Config`.
        optimizer: state of the optimizer, {number of the parameter: {name: tensor}}; None without an optimizer.
        scaler: state of the gradient scaler; empty without one.
        rng: states of the random generators (`utils.training.seeds.random_state`) of each process, or None.
        quick_mean_iou: mean IoU of the quick validation; None in all but the best snapshot.
        average: moving average of the weights, in the form of `model`, or None.
        average_updates: number of updates of the average; None in files of older versions, which had no warm-up of its
            decay.
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
        """Return the state dict to evaluate: the moving average if there is one.

        Args:
            raw: return the weights of the last step, even if there is a moving average.
        """
        return self.model if raw or self.average is None else self.average


def parse(path, content, resuming=False):
    """Check the content of a snapshot of train.py.

    Args:
        path: path of the file. If its name contains a step, the content must have the same step.
        content: what `utils.common.files.load` returned.
        resuming: whether a run will resume from it, which also needs the optimizer and the random generators.

    Returns:
        `Snapshot`.

    Raises:
        UserError: for a missing or wrong value; the message names the file, the field, what was expected and what was
            found.
    """
    needed = ["model", "config", "step", *["optimizer", "rng"] * resuming]
    missing = sorted(set(needed) - set(content if isinstance(content, dict) else ()))
    if missing:
        raise UserError(f"{path}: expected a snapshot that train.py wrote, found a file without {', '.join(missing)}")
    root = Field(path, "", content)
    step = root["step"].integer(0)
    step_of_name = snapshots.step_of(path)
    root["step"].require(step_of_name in (None, step), f"{step_of_name}, as in the file's name,")
    config = parse_config(root["config"], resuming)
    root["step"].require("num_steps" not in (config.arguments or {}) or step <= config.arguments["num_steps"],
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
    return Snapshot(str(path), model, step=step, config=config,
                    optimizer=_optimizer(root["optimizer"], network, config) if present["optimizer"] else None,
                    scaler=_scaler(root["scaler"]) if present["scaler"] else {},
                    rng=_generators(root["rng"]) if present["rng"] else None,
                    quick_mean_iou=root["quick_mean_iou"].number(0, 1) if present["quick_mean_iou"] else None,
                    average=root["average"].tensors(network.state_dict()) if present["average"] else None,
                    average_updates=root["average_updates"].integer(0, step) if present["average_updates"] else None)


class Field:
    """A value in a file, with the place of the value, which is used in error messages.

    Its methods check the value. They return it if it is valid, and raise `UserError` otherwise.

    Args:
        path: path of the file.
        name: place of the value in the content, such as "config.network"; "" for the whole content.
        value: the value; `MISSING` if there is none.
    """

    def __init__(self, path, name, value):
        self.path, self.name, self.value = path, name, value

    def __getitem__(self, key):
        """Return the field of an entry of a dict or list; its value is `MISSING` if the dict has no such key."""
        value = self.value.get(key, MISSING) if isinstance(self.value, dict) else self.value[key]
        return Field(self.path, f"{self.name}.{key}".lstrip("."), value)

    def require(self, holds, expected, actual=None):
        """Return the value if a condition holds.

        Args:
            holds: the condition.
            expected: description of the expected value, for the message.
            actual: description of the value, for the message; None to derive it from the value.
        """
        if not holds:
            raise UserError(f"{self.path}: expected {expected} as {self.name}, found {actual or describe(self.value)}")
        return self.value

    def mapping(self):
        """Check for a dict whose keys are all text."""
        return self.require(isinstance(self.value, dict) and all(isinstance(key, str) for key in self.value), "a dict")

    def fields(self, length=None):
        """Check for a list, of this length unless it is None; return its entries as fields."""
        holds = isinstance(self.value, list | tuple) and length in (None, len(self.value))
        self.require(holds, "a list" if length is None else f"a list of {length}")
        return [self[index] for index in range(len(self.value))]

    def text(self, *choices):
        """Check for text, one of the choices if there are any."""
        kind = f"one of {', '.join(choices)}" if choices else "text"
        return self.require(isinstance(self.value, str) and (not choices or self.value in choices), kind)

    def integer(self, low, high=2 ** 63):
        """Check for a whole number from low to high."""
        holds = isinstance(self.value, int) and not isinstance(self.value, bool) and low <= self.value <= high
        return self.require(holds, f"a whole number from {low}" + f" to {high}" * (high < 2 ** 63))

    def number(self, low=-math.inf, high=math.inf):
        """Check for a finite number from low to high."""
        holds = isinstance(self.value, int | float) and not isinstance(self.value, bool) and low <= self.value <= high
        return self.require(holds and abs(self.value) < 2 ** 63, f"a finite number from {low} to {high}")

    def plain(self, depth=3):
        """Check for None, text, a number, or lists of these, nested up to this depth."""
        if isinstance(self.value, list) and depth:
            return [field.plain(depth - 1) for field in self.fields()]
        return self.require(self.value is None or type(self.value) in (bool, int, float, str), "a plain value")

    def tensor(self, like=None):
        """Check for a dense tensor of finite values on the CPU.

        Args:
            like: tensor of the same shape, and floating-point or integer as the value must be; None for any.
        """
        value = self.value
        self.require(isinstance(value, torch.Tensor), "a tensor")
        self.require(value.layout == torch.strided and not value.is_quantized and not value.is_nested
                     and value.device.type == "cpu", "a dense tensor", f"{describe(value)}, {_kind(value)}")
        self.require(value.dtype in FLOATS or value.dtype in (torch.int64, torch.int32, torch.uint8),
                     "a tensor of real numbers")
        if like is not None:
            self.require(value.shape == like.shape and value.dtype.is_floating_point == like.dtype.is_floating_point,
                         describe(like))
        # With strides of 0, a file of a few bytes can declare a huge tensor.
        self.require(value.numel() * value.element_size() <= value.untyped_storage().nbytes(), "storage for each value",
                     f"{describe(value)} whose values share their storage")
        if value.numel():
            low, high = (extreme.item() for extreme in torch.aminmax(value.detach()))   # one pass, without a copy
            self.require(math.isfinite(low) and math.isfinite(high), "finite values", "some that are not finite")
            self.require(low >= -ROUNDING or not self.name.endswith(("running_var", "num_batches_tracked")),
                         "no value below 0", f"{low:.4g}")
        return value

    def tensors(self, like):
        """Check for a dict of tensors with exactly the names, and the shapes and kinds of dtype, of the dict `like`."""
        tensors = self.mapping()
        for names, what in ((like.keys() - tensors.keys(), "no tensor named"),
                            (tensors.keys() - like.keys(), "another tensor named")):
            self.require(not names, "the tensors of the network that its config describes",
                         f"{what} {', '.join(sorted(names)[:3])}{', ...' if len(names) > 3 else ''}")
        return {name: self[name].tensor(tensor) for name, tensor in like.items()}


def describe(value):
    """Describe a value from a file in a few words."""
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
    """Say in which way a tensor is not dense."""
    if tensor.is_nested or tensor.is_quantized:
        return "nested" if tensor.is_nested else "quantized"
    return "without values" if tensor.device.type == "meta" else str(tensor.layout).removeprefix("torch.")


def parse_config(field, resuming=False):
    """Check the "config" of a snapshot, a `Field`; returns a `Config`."""
    config = field.mapping()
    normalization = field["normalization"]
    normalization.mapping()
    normalization["order"].text("RGB", "BGR")
    for name, low in (("mean", -1e6), ("std", 1e-6)):
        for channel in normalization[name].fields(3):
            channel.number(low, 1e6)
    input_size = tuple(side.integer(1, LONGEST_SIDE) for side in field["input_size"].fields(2))
    network, classes = field["network"].mapping(), field["classes"]
    for row in classes.fields():
        row.mapping()
        for name, (low, high) in {"id": (-2 ** 31, 65535), "train_id": (-1, 255), "red": (0, 255), "green": (0, 255),
                                  "blue": (0, 255)}.items():
            row[name].integer(low, high)
        row["name"].text(), row["category"].text()
    scored = {row["train_id"]: row["name"] for row in reversed(classes.value) if row["train_id"] not in (-1, 255)}
    count = len(scored)
    classes.require(len(set(scored.values())) == count, "a different name for every class")
    field["network"]["num_classes"].require(
        type(network.get("num_classes")) is int and network["num_classes"] == count,
        f"the number of its classes, {count},")
    # Required, without defaults: a wrong value would not always be noticed by the shapes of the tensors.
    for name in ("model", "backbone", "norm", "activation"):
        field["network"][name].text()
    arguments = samples = None
    if resuming or "arguments" in config:
        names = field["arguments"].mapping()
        arguments = {name: field["arguments"][name].plain() for name in names}
        if "num_steps" in arguments:
            field["arguments"]["num_steps"].integer(1)
    if config.get("samples") is not None:
        field["samples"].mapping()
        samples = {"count": field["samples"]["count"].integer(1), "sha256": field["samples"]["sha256"].text()}
    return Config(network, Normalization.from_config(normalization.value), classes=classes.value, input_size=input_size,
                  arguments=arguments, samples=samples)


def _optimizer(field, network, config):
    """Check the state dict of an optimizer of PyTorch.

    Returns:
        {number of the parameter: {name: tensor}}.
    """
    field.mapping()
    parameters, arguments = list(network.parameters()), config.arguments or {}
    groups = field["param_groups"].fields()
    numbers = [number.integer(0) for group in groups if group.mapping() for number in group["params"].fields()]
    field["param_groups"].require(numbers == list(range(len(parameters))),
                                  f"groups of the network's {len(parameters)} parameters",
                                  f"{len(groups)} groups of {len(numbers)} parameters")
    freeze = Field(field.path, "config.arguments.freeze", arguments.get("freeze"))
    frozen = {parameter for module in _frozen_modules(freeze, network) for parameter in module.parameters()}
    learning = {number for number, parameter in enumerate(parameters)
                if parameter.requires_grad and parameter not in frozen}
    state = field["state"].require(isinstance(field["state"].value, dict), "a dict")
    field["state"].require(not state or state.keys() == learning,
                           "the state of every parameter that learns, or of none")
    kind = Field(field.path, "config.arguments.optimizer", arguments.get("optimizer", "sgd"))
    names = OPTIMIZERS[kind.text(*OPTIMIZERS)]
    entries, scalar = {}, torch.zeros(())
    for number in state:
        entry = field["state"][number]
        if any(entry.mapping().get(name) is not None for name in names):
            entries[number] = {name: entry[name].tensor(scalar if name == "step" else parameters[number])
                               for name in names}
            for name in {"step", "exp_avg_sq"}.intersection(names):     # a count, and a mean of squares
                entry[name].require(bool((entries[number][name] >= 0).all()), "no negative values")
    return entries


def _frozen_modules(field, network):
    """Return the modules that a run did not train, by the value of --freeze."""
    if field.value is None:
        return []
    try:
        return network.backbone.first_stages([name.text() for name in field.fields()])
    except ValueError as error:
        raise UserError(f"{field.path}: {field.name}: {error}") from None


def _scaler(field):
    """Check the state of the gradient scaler, of PyTorch or of apex."""
    state = field.mapping()
    if state and all(isinstance(value, dict) for value in state.values()):      # apex has a scaler for each loss
        for name in state:
            field[name]["loss_scale"].number(1e-30), field[name]["unskipped"].integer(0)
        return state
    field.require(state.keys() in (set(), SCALER.keys()), f"a dict of {', '.join(SCALER)}, or an empty one")
    for name in state:
        field[name].number(SCALER[name])
    return state


def _generators(field):
    """Check the states of the random generators of each process."""
    states = [state for state in field.fields() if state.mapping()]
    field.require(len(states) > 0 and len(states) == len(field.value), "the states of at least one process")
    for state in states:
        for cuda in state["cuda"].fields():
            tensor = cuda.tensor()
            cuda.require(tensor.dtype == torch.uint8 and tensor.shape == (16,), "16 bytes of a CUDA generator")
        kind, keys, position, gauss, cached = state["numpy"].fields(5)
        kind.text("MT19937"), position.integer(0, 624), gauss.integer(0, 1), cached.number()
        keys.require(keys.tensor().dtype == torch.int64 and keys.value.shape == (624,)
                     and 0 <= keys.value.min() and keys.value.max() < 2 ** 32, "624 numbers of 32 bits")
        state["torch"].tensor()
        for package, set_state in (("torch", torch.Generator().set_state), ("python", random.Random().setstate)):
            try:
                set_state(state[package].value)
            except (RuntimeError, TypeError, ValueError, OverflowError, LookupError):
                state[package].require(False, f"the state of a generator of {package}")
    return field.value
