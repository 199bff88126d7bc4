"""Recognition of weights: which family a file belongs to, and its tensors by the names of this package.

Families are recognized from the tensors themselves:

    ours         snapshots of train.py, or the state dict of a network or backbone
    ECANet       eca_resnet{18,34,50,101,152}_k????.pth.tar: 7×7 stem, `layerN.M.eca.conv.weight`
    timm         .pth or .safetensors of resnet{18,34,50,101}[d], ecaresnet{50,101}d: `se.conv.weight`, deep stem
                 32-32-64, average-pool downsampling
    torchvision  resnet{18,34,50,101,152}, as files or by torchvision's name for them
    CSAIL        resnet{18,50,101}-imagenet.pth, also known from PSPNet: deep stem 64-64-128 as conv1 to conv3

The input normalization that the weights expect is recognized in the same way. With a backbone `timm:NAME`, timm reads
the files (`networks.weights.start`).
"""

from dataclasses import dataclass

import torch

from utils.common.errors import UserError
from utils.common.messages import logger
from utils.ops.normalization import CAFFE, Normalization

from ..backbones.names import find_backbone, read_structure
from .snapshot import Field, parse

PROBE = "layer1.0.conv1.weight"     # every residual network of these families has a tensor of this name
CSAIL_STEM = {"conv1": "conv1.0", "bn1": "conv1.1", "conv2": "conv1.2", "bn2": "conv1.3", "conv3": "conv1.4",
              "bn3": "bn1"}
TIMM_STEM = {"conv1.0": "conv1.0", "conv1.1": "conv1.1", "conv1.3": "conv1.2", "conv1.4": "conv1.3",
             "conv1.6": "conv1.4"}


@dataclass
class Weights:
    """Weights read from a file.

    Attributes:
        name: name of the file.
        family: name of the family, as listed at the top of this module.
        state: tensors by the names of this package, in which those of the backbone start with `backbone.`.
        norm: kind of norm for which the weights of norms are meant, `bn` or `inplace_abn`.
        structure: arguments of `build_network` that follow from the file: backbone; and stem, average_downsample and
            eca_kernels, with those of a snapshot output_stride, or backbone_arguments for a backbone of timm.
        normalization: `Normalization` of the input that the weights expect.
    """

    name: str
    family: str
    state: dict
    norm: str
    structure: dict
    normalization: Normalization


def weights_of_snapshot(snapshot):
    """Return the `Weights` of a `Snapshot`: their moving average if it has one, as in evaluation."""
    model = snapshot.weights()
    backbone = {key.removeprefix("backbone."): value for key, value in model.items() if key.startswith("backbone.")}
    family = "ours" if snapshot.average is None else "ours, the moving average of its weights"
    network = snapshot.config.network
    structure = find_backbone(network["backbone"]).structure(network, backbone)
    return Weights(snapshot.path, family, state=model, norm=network["norm"], structure=structure,
                   normalization=snapshot.config.normalization)


# Modules in the order of the network's parameters. In snapshots until November 2026 the modules of the head were not
# inside `head` but beside it.
PARTS = ("backbone", "context", "head", "coarse", "acf", "fusion", "fine", "aux")


def _current_name(key):
    """Convert the name of a tensor in a snapshot until November 2026 to the name of now."""
    return f"head.{key}" if key.split(".")[0] in ("coarse", "acf", "fusion", "fine") else key


def convert_old_layout(content):
    """Convert the content of a snapshot until November 2026 to the current names and order of parameters.

    Content of any other kind is returned unchanged.
    """
    if not (isinstance(content, dict) and isinstance(content.get("model"), dict) and "fine.weight" in content["model"]
            and all(isinstance(key, str) and key.split(".")[0] in PARTS for key in content["model"])):
        return content
    content = content | {"model": {_current_name(key): value for key, value in content["model"].items()}}
    state = content["optimizer"].get("state") if isinstance(content.get("optimizer"), dict) else None
    if isinstance(state, dict):     # its keys are the numbers of the parameters
        old_order = [key for key in content["model"]
                     if not key.endswith(("running_mean", "running_var", "num_batches_tracked"))]
        new_order = sorted(old_order, key=lambda key: PARTS.index(key.removeprefix("head.").split(".")[0]))
        new_number = {number: new_order.index(key) for number, key in enumerate(old_order)}
        content["optimizer"] = content["optimizer"] | {
            "state": {new_number.get(number, number): value for number, value in state.items()}}
    return content


def is_snapshot(content):
    """Whether the content of a file looks like a snapshot of train.py.

    Other projects also save a model and a step, so the keys "rng" or "config" are needed too.
    """
    if not isinstance(content, dict) or not {"model", "step"} <= content.keys():
        return False
    config = content.get("config")
    return "rng" in content or isinstance(config, dict) and "network" in config


def recognize(content, name):
    """Recognize the weights of a residual network in the content of a file.

    Args:
        content: what `utils.common.files.load` returned.
        name: name of the file.

    Returns:
        `Weights`.

    Raises:
        UserError: if there is no residual network in it.
    """
    if is_snapshot(content):
        return weights_of_snapshot(parse(name, convert_old_layout(content)))
    state = find_state_dict(content, name)
    prefix = next((key.removesuffix(PROBE) for key in state if key.endswith(PROBE)), None)
    if prefix is None:
        raise UserError(f"{name}: expected weights of a residual network, found {len(state)} tensors without "
                        f"{PROBE}, such as {', '.join(list(state)[:3])}")
    is_our_network = prefix.endswith("backbone.")
    outer = prefix.removesuffix("backbone.")
    backbone = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    family, renamed = _rename(backbone, is_our_network)
    ours = {f"backbone.{key}": value for key, value in renamed.items()}
    if is_our_network:
        ours |= {key.removeprefix(outer): value for key, value in state.items()
                 if key.startswith(outer) and not key.startswith(prefix)}
        ours = {_current_name(key): value for key, value in ours.items()}
    structure = read_structure(renamed)
    kernels = structure["eca_kernels"] or ()
    if not all(kernel % 2 for kernel in kernels):
        raise UserError(f"{name}: expected kernels of odd sizes for the channel attention, found {kernels}")
    return Weights(name, family, state=ours, norm="bn", structure=structure,
                   normalization=CAFFE if _expects_bytes(renamed) else Normalization())


def _expects_bytes(state):
    """Whether a backbone was trained on pixels up to 255 that were not divided by their standard deviation, about 58.

    The running variance of the first norm is the variance of the first convolution's output. Divided by the sum of the
    squared weights it is about the variance of an input pixel: 1.3 in a real network with divided pixels, and 58² times
    as much without the division.
    """
    convolution, norm = ("conv1.0", "conv1.1") if "conv1.0.weight" in state else ("conv1", "bn1")
    filters, variance = state.get(f"{convolution}.weight"), state.get(f"{norm}.running_var")
    if filters is None or variance is None or filters.ndim != 4 or variance.shape != filters.shape[:1]:
        return False
    squares = filters.float().square().flatten(1).sum(1)          # (filters,)
    return float((variance.float() / squares.clamp(min=1e-12)).median()) > 100


def find_state_dict(content, name):
    """Find the state dict in the content of a file: the content itself, or a dict inside it.

    The choice is logged if there are several.

    Args:
        content: what `utils.common.files.load` returned.
        name: name of the file.

    Returns:
        dict of tensors by name.

    Raises:
        UserError: if there is none.
    """
    states = dict(_nested_states(content))
    with_network = [place for place, state in states.items() if any(str(key).endswith(PROBE) for key in state)]
    largest = max(map(len, states.values()), default=0)     # much smaller ones hold scores or mean values
    places = sorted(with_network or [place for place, state in states.items() if len(state) > largest / 2],
                    key=_preference)
    if not places:
        raise UserError(f"{name}: expected named tensors (a state dict), found none")
    if len(places) > 1:
        chosen, *others = (place or "the top level" for place in places)
        logger.info(f"{name}: using the weights in {chosen}, not those in {', '.join(others)}")
    field = Field(name, "", states[places[0]])
    return {str(key): field[key].tensor() for key, value in field.value.items() if isinstance(value, torch.Tensor)}


def _nested_states(content, place="", depth=3):
    """Yield (place, dict) of all dicts in the content of a file that have tensors under keys of text.

    A place is a path of keys such as "ema.model"; "" is the content itself. The states of optimizers are left out,
    since their keys are numbers.
    """
    if not isinstance(content, dict) or depth < 0:
        return
    if any(isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in content.items()):
        yield place, content
    for key, value in content.items():
        if isinstance(key, str):
            yield from _nested_states(value, f"{place}.{key}".lstrip("."), depth - 1)


def _preference(place):
    """Sort key for the places of weights: first those named "model", then "state_dict", then "teacher"."""
    names = place.split(".")
    return next((rank for rank, known in enumerate(("model", "state_dict", "teacher")) if known in names), 3)


def _rename(state, is_ours):
    """Rename the tensors of a residual network from the names of its family to those of this package.

    Args:
        state: tensors of the backbone, by name.
        is_ours: whether they are known to have the names of this package.

    Returns:
        (family, tensors by the names of this package).
    """
    # Only backbones of this package have a stem with these names.
    if is_ours or ("conv1.4.weight" in state and "conv1.6.weight" not in state):
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
