"""Loading of weights into a network, with a report on every tensor."""

import re
from dataclasses import dataclass, field

import torch

from libs.convert import norm_kind, norms_and_convolutions, to_in_place, to_plain
from utils.common.errors import UserError

from .families import Weights, recognize


@dataclass
class Account:
    """Report of `load_weights`: where every tensor went.

    Attributes:
        name: name of the file.
        family: family of the weights, see `networks.weights.families`.
        loaded: names of the network's tensors that were loaded from the file.
        initialized: reasons by the names of the network's tensors that were not loaded.
        ignored: reasons by the names of the file's tensors that were not used.
        notes: sentences about conversions.
        share: fraction of the backbone's values that were loaded.
    """

    name: str
    family: str
    loaded: list = field(default_factory=list)
    initialized: dict = field(default_factory=dict)
    ignored: dict = field(default_factory=dict)
    notes: list = field(default_factory=list)
    share: float = 0.0

    def as_json(self):
        """Return the report as plain values."""
        # "initialised": the spelling in the files of earlier versions.
        return {"file": self.name, "family": self.family, "backbone_loaded": self.share, "loaded": self.loaded,
                "initialised": self.initialized, "ignored": self.ignored, "notes": self.notes}

    def __str__(self):
        lines = [f"{self.name}, {self.family}: loaded {len(self.loaded)} tensors ({self.share:.1%} of the backbone's "
                 "values)"]
        for title, reasons in (("initialized", self.initialized), ("ignored", self.ignored)):
            keys_by_reason = {}
            for key, reason in reasons.items():
                keys_by_reason.setdefault(reason, []).append(key)
            for reason, keys in keys_by_reason.items():
                examples = f"{', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''}"
                lines.append(f"  {title:<12}{len(keys):>4}  {reason}: {examples}")
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


def load_weights(network, weights, name="", allow_partial=False):
    """Copy the weights that fit into a network.

    If the weights are meant for norms of another kind, they are converted (`libs.convert`). If the file has no channel
    attention, the kernels of the attention are set to zero, so that it scales by 1/2, and the norm before it is
    doubled: the features are those of the network without attention.

    Args:
        network: a network of `build_network`; changed in place.
        weights: `Weights`, or the content of a file.
        name: name of the file, if `weights` is its content.
        allow_partial: accept a file with less than half of the backbone's values.

    Returns:
        `Account`.

    Raises:
        UserError: if a convolution of the file's stages has no counterpart in the network, if no tensor fits, or if
            less than half of the backbone's values are loaded.
    """
    if not isinstance(weights, Weights):
        weights = recognize(weights, name)
    target, account = network.state_dict(), Account(weights.name, weights.family)
    fitting = {}
    for key, value in weights.state.items():
        if key in target and value.shape == target[key].shape:
            fitting[key] = value
        else:
            account.ignored[key] = _why_ignored(key, target)
    misfits = [key for key in account.ignored if re.search(r"backbone\.layer\d\.\d+\.conv\d\.weight$", key)]
    if misfits:
        raise UserError(f"{weights.name}: expected the backbone of this network, found convolutions of another one: "
                        f"{misfits[0].removeprefix('backbone.')} {tuple(weights.state[misfits[0]].shape)}"
                        f"{f' and {len(misfits) - 1} more' if len(misfits) > 1 else ''}")
    counted = [key for key in target if not key.endswith("num_batches_tracked")]
    backbone = [key for key in counted if key.startswith("backbone.")]
    values = sum(target[key].numel() for key in backbone)
    account.share = sum(target[key].numel() for key in backbone if key in fitting) / values
    if not fitting or (account.share < 0.5 and not allow_partial):
        remedy = "; --allow-partial loads them anyway" if fitting else ""
        raise UserError(f"{weights.name}: expected weights of this network or its backbone, found {len(fitting)} "
                        f"fitting tensors of {len(weights.state)}: {account.share:.0%} of the backbone's values"
                        f"{remedy}")
    neutral = _neutral_attention(fitting, target, weights.state)
    fitting |= neutral
    account.loaded = [key for key in fitting if key not in neutral or ".eca." not in key]
    for key in counted:
        if key not in fitting:
            account.initialized[key] = ("another number of classes" if key in account.ignored
                                        else "no counterpart in the file")
        elif key in neutral and ".eca." in key:
            account.initialized[key] = "no attention in the file: 0, and the norm before it doubled, so nothing changes"
    fitting, note = _convert_norms(network, fitting, weights.norm)
    account.notes += [note] * bool(note)
    network.load_state_dict(fitting, strict=False)
    return account


def _why_ignored(key, target):
    """Say why a tensor of the file is not loaded; target: state dict of the network."""
    if key in target:
        classifiers = r"(head\.(fine|coarse|position|channel)|aux)\."
        return "another number of classes" if re.match(classifiers, key) else "another shape"
    if re.match(r"backbone\.(fc|classifier|last_linear|head)\.", key):
        return "the classifier of the file"
    if ".eca." in key:
        return "no attention in this network"
    return "no counterpart in this network"


def _neutral_attention(fitting, target, state):
    """Zero kernels of the attention, and doubled norms before it, if only the network has channel attention.

    Args:
        fitting: tensors to load.
        target: state dict of the network.
        state: all tensors of the file.

    Returns:
        dict of tensors that replace or complete `fitting`.
    """
    missing = [key for key in target if key.startswith("backbone.") and key.endswith(".eca.conv.weight")]
    if not missing or any(key.endswith(".eca.conv.weight") for key in state):
        return {}
    neutral = {}
    for key in missing:
        block = key.removesuffix("eca.conv.weight")
        last_norm = "bn3" if f"{block}bn3.weight" in target else "bn2"
        neutral[key] = torch.zeros_like(target[key])
        for tensor in ("weight", "bias"):
            name = f"{block}{last_norm}.{tensor}"
            if name in fitting:
                neutral[name] = 2 * fitting[name].to(target[name].dtype)
    return neutral


def _convert_norms(network, state, source):
    """Convert weights for norms of the kind `source` to the kind of the network.

    Returns:
        (weights, sentence about the conversion or "").
    """
    target = norm_kind(network)
    if source == target:
        return state, ""
    pairs = norms_and_convolutions(network, torch.empty(2, 3, 65, 65))
    if not any(f"{norm}.weight" in state for norm in pairs):    # only norms of timm, which are not converted
        return state, ""
    if target == "bn":
        return to_plain(state, pairs), "scales of in-place norms became |weight| + eps"
    negative = sum(int((state[f"{norm}.weight"] < 0).sum()) for norm in pairs if f"{norm}.weight" in state)
    state, inexact = to_in_place(state, pairs)
    return state, (f"for in-place norms {negative} negative scales moved into the convolutions before them, and "
                   f"{inexact} channels with |weight| below 1e-5 are not exact")
