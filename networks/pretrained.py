"""Weights from files into a network, with an account of every tensor."""

import re

import torch

from libs.convert import norm_kind, norms_and_convolutions, to_in_place, to_plain
from utils.cli import UserError


def load_weights(network, content, name):
    """Copy what fits from a file's content into a network; say what became of the tensors.

    Accepted: a snapshot of ours, or a state dict (also under `state_dict`, also with the prefix `module.`)
    of a whole network or of a ResNet with torchvision's names. Tensors whose name or shape has no
    counterpart are left out; a convolution of a stage without one means another depth, and is refused.

    Norms of the other kind are converted (`libs.convert`): weights are taken as signed scales unless the file
    is a snapshot whose network has in-place norms.

    Args:
        network: of `build_network`.
        content: what the file holds.
        name: the file's name, for messages.

    Returns:
        A sentence that counts loaded, initialised and ignored tensors. Raises `UserError` when less than
        half of the backbone's values come from the file.
    """
    found = _state_dict(content, name)
    target = network.state_dict()
    renamed = {key if key in target else f"backbone.{key}": value for key, value in found.items()}
    fitting = {key: value for key, value in renamed.items() if key in target and value.shape == target[key].shape}
    misfits = [key for key in renamed if re.search(r"layer\d\.\d+\.conv\d\.weight$", key) and key not in fitting]
    if misfits:
        raise UserError(f"{name}: expected the backbone of this network, found convolutions of another one: "
                        f"{misfits[0].removeprefix('backbone.')} {tuple(renamed[misfits[0]].shape)}{_some(misfits)}")
    counted = {key: value for key, value in target.items() if not key.endswith("num_batches_tracked")}
    backbone = [key for key in counted if key.startswith("backbone.")]
    values = sum(counted[key].numel() for key in backbone)
    loaded = sum(counted[key].numel() for key in backbone if key in fitting)
    if loaded < values / 2:
        raise UserError(f"{name}: expected weights of this network or its backbone, found {len(fitting)} fitting "
                        f"tensors of {len(found)}: {loaded / values:.0%} of the backbone's values")
    fitting, converted = _convert_norms(network, fitting, _norm_of(content))
    network.load_state_dict(fitting, strict=False)
    fresh = [key for key in counted if key not in fitting]
    ignored = [key for key in renamed if key not in fitting]
    return (f"{name}: loaded {len([key for key in fitting if key in counted])} tensors "
            f"({loaded / values:.1%} of the backbone); {len(fresh)} keep their initial values{_some(fresh)}; "
            f"{len(ignored)} of the file have no place here{_some(ignored)}{converted}")


def _norm_of(content):
    config = content.get("config")
    return config["network"]["norm"] if isinstance(config, dict) and "network" in config else "bn"


def _convert_norms(network, state, source):
    """Weights for norms of kind `source` → for those of the network; and a sentence, if anything changed."""
    target = norm_kind(network)
    if source == target:
        return state, ""
    pairs = norms_and_convolutions(network, torch.empty(2, 3, 65, 65))
    if target == "bn":
        return to_plain(state, pairs), "; scales of in-place norms became |weight| + eps"
    negative = sum(int((state[f"{norm}.weight"] < 0).sum()) for norm in pairs if f"{norm}.weight" in state)
    state, inexact = to_in_place(state, pairs)
    return state, (f"; for in-place norms {negative} negative scales moved into the convolutions before them, and "
                   f"{inexact} channels with |weight| below 1e-5 are not exact")


def _state_dict(content, name):
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not any(isinstance(value, torch.Tensor) for value in content.values()):
        raise UserError(f"{name}: expected named tensors (a state dict), found none")
    return {key.removeprefix("module."): value for key, value in content.items()
            if isinstance(value, torch.Tensor)}


def _some(keys):
    return f" ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})" if keys else ""
