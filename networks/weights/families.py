"""TODO."""

from dataclasses import dataclass

import torch

from utils.common.errors import UserError
from utils.common.messages import logger
from utils.ops.normalization import CAFFE, Normalization

from ..backbones.names import find_backbone, read_structure
from . import snapshot

PROBE = "layer1.0.conv1.weight"     # a tensor that every residual network here has
CSAIL_STEM = {"conv1": "conv1.0", "bn1": "conv1.1", "conv2": "conv1.2", "bn2": "conv1.3", "conv3": "conv1.4",
              "bn3": "bn1"}
TIMM_STEM = {"conv1.0": "conv1.0", "conv1.1": "conv1.1", "conv1.3": "conv1.2", "conv1.4": "conv1.3",
             "conv1.6": "conv1.4"}


@dataclass
class Weights:
    """What a file holds.

    Attributes:
        name: of the file.
        family: see the head of this file.
        state: our names (`backbone.` before those of a backbone) → tensors.
        norm: `bn` or `inplace_abn`: what a norm's weight means.
        structure: what the file says of the network: its backbone, and that one's stem, average_downsample and
            eca_kernels or, where it is one of timm, backbone_arguments.
        normalization: of the input that the weights expect.
    """

    name: str
    family: str
    state: dict
    norm: str
    structure: dict
    normalization: Normalization


def weights_of(found):
    """`Snapshot` → `Weights`: the moving average of its weights where it has one, as evaluation takes it."""
    model = found.weights()
    backbone = {key.removeprefix("backbone."): value for key, value in model.items() if key.startswith("backbone.")}
    family = "ours" if found.average is None else "ours, the moving average of its weights"
    network = found.config.network
    built = find_backbone(network["backbone"]).structure(network, backbone)
    return Weights(found.path, family, model, network["norm"], built, found.config.normalization)


# Parameters in the order of the network; in snapshots until November 2026 those of the head stood beside it.
PARTS = ("backbone", "context", "head", "coarse", "acf", "fusion", "fine", "aux")


def _in_head(key):
    """A tensor's name in the network of an earlier version → its name now."""
    return f"head.{key}" if key.split(".")[0] in ("coarse", "acf", "fusion", "fine") else key


def with_head(content):
    """The content of a snapshot of an earlier version, by the names and in the order of parameters of now."""
    if not (isinstance(content, dict) and isinstance(content.get("model"), dict) and "fine.weight" in content["model"]
            and all(isinstance(key, str) and key.split(".")[0] in PARTS for key in content["model"])):
        return content
    content = content | {"model": {_in_head(key): value for key, value in content["model"].items()}}
    state = content["optimizer"].get("state") if isinstance(content.get("optimizer"), dict) else None
    if isinstance(state, dict):     # by the number of the parameter
        before = [key for key in content["model"]
                  if not key.endswith(("running_mean", "running_var", "num_batches_tracked"))]
        now = sorted(before, key=lambda key: PARTS.index(key.removeprefix("head.").split(".")[0]))
        moved = {number: now.index(key) for number, key in enumerate(before)}
        content["optimizer"] = content["optimizer"] | {
            "state": {moved.get(number, number): value for number, value in state.items()}}
    return content


def is_snapshot(content):
    """Whether train.py wrote it, as far as what it has kept tells: other projects too save a model and a step."""
    if not isinstance(content, dict) or not {"model", "step"} <= content.keys():
        return False
    config = content.get("config")
    return "rng" in content or isinstance(config, dict) and "network" in config


def recognize(content, name):
    """What `torch.load` gave → `Weights`. Raises `UserError` where there is no residual network in it."""
    if is_snapshot(content):
        return weights_of(snapshot.parse(name, with_head(content)))
    state = state_dict_of(content, name)
    prefix = next((key.removesuffix(PROBE) for key in state if key.endswith(PROBE)), None)
    if prefix is None:
        raise UserError(f"{name}: expected weights of a residual network, found {len(state)} tensors without "
                        f"{PROBE}, such as {', '.join(list(state)[:3])}")
    whole = prefix.endswith("backbone.")
    outer = prefix.removesuffix("backbone.")
    inside = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    family, renamed = _rename(inside, whole)
    ours = {f"backbone.{key}": value for key, value in renamed.items()}
    if whole:
        ours |= {key.removeprefix(outer): value for key, value in state.items()
                 if key.startswith(outer) and not key.startswith(prefix)}
        ours = {_in_head(key): value for key, value in ours.items()}
    found = read_structure(renamed)
    kernels = found["eca_kernels"] or ()
    if not all(kernel % 2 for kernel in kernels):
        raise UserError(f"{name}: expected kernels of odd sizes for the channel attention, found {kernels}")
    return Weights(name, family, ours, "bn", found, CAFFE if _expects_bytes(renamed) else Normalization())


def _expects_bytes(state):
    """Whether a backbone was trained on pixels up to 255, not on pixels divided by their deviation of about 58.

    The first norm has seen the variance of the first convolution's output: per squared weight it is about that of a
    pixel, 1.3 for a real network of the latter kind and 58² times as much for one of the former.
    """
    convolution, norm = ("conv1.0", "conv1.1") if "conv1.0.weight" in state else ("conv1", "bn1")
    filters, variance = state.get(f"{convolution}.weight"), state.get(f"{norm}.running_var")
    if filters is None or variance is None or filters.ndim != 4 or variance.shape != filters.shape[:1]:
        return False
    squares = filters.float().square().flatten(1).sum(1)          # (filters,)
    return float((variance.float() / squares.clamp(min=1e-12)).median()) > 100


def state_dict_of(content, name):
    """{name: tensor} of a file's content: its own tensors, or those of the dictionary in it that holds weights. Says
    which one, where there are several. Raises `UserError` where there is none."""
    states = dict(_nested_states(content))
    with_network = [place for place, state in states.items() if any(str(key).endswith(PROBE) for key in state)]
    largest = max(map(len, states.values()), default=0)     # others hold scores or means
    places = sorted(with_network or [place for place, state in states.items() if len(state) > largest / 2],
                    key=_preference)
    if not places:
        raise UserError(f"{name}: expected named tensors (a state dict), found none")
    if len(places) > 1:
        logger.info(f"{name}: the weights named {places[0] or 'at the top'} are taken, not {', '.join(places[1:])}")
    field = snapshot.Field(name, "", states[places[0]])
    return {str(key): field[key].tensor() for key, value in field.value.items() if isinstance(value, torch.Tensor)}


def _nested_states(content, place="", depth=3):
    """(place, dictionary) of the dictionaries in a file's content that hold tensors by text, such as "ema.model"; ""
    is the content itself. States of optimizers hold theirs by number."""
    if not isinstance(content, dict) or depth < 0:
        return
    if any(isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in content.items()):
        yield place, content
    for key, value in content.items():
        if isinstance(key, str):
            yield from _nested_states(value, f"{place}.{key}".lstrip("."), depth - 1)


def _preference(place):
    """Sorts the places of weights: those that a file calls its model come first."""
    names = place.split(".")
    return next((rank for rank, known in enumerate(("model", "state_dict", "teacher")) if known in names), 3)


def _rename(state, ours):
    """A residual network's tensors by the names of its family → (family, by our names)."""
    if ours or ("conv1.4.weight" in state and "conv1.6.weight" not in state):       # this stem: our backbone alone
        return "ours", state
    stem = {}
    family = "torchvision"
    if any(".se.conv.weight" in key for key in state) or "conv1.6.weight" in state:
        family, stem = "timm", TIMM_STEM if "conv1.6.weight" in state else {}
    elif any(".eca.conv.weight" in key for key in state):
        family = "ECANet"
    elif "conv3.weight" in state:
        family, stem = "CSAIL", CSAIL_STEM
    renamed = {}
    for key, value in state.items():
        module, _, tensor = key.rpartition(".")
        renamed[f"{stem.get(module, module)}.{tensor}".replace(".se.conv.", ".eca.conv.")] = value
    return family, renamed
