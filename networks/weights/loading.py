"""Weights from files into a network, with an account of every tensor.

Families are recognized from the files themselves:

    ours         snapshots of train.py, or a network's or backbone's state dict
    ECANet       eca_resnet{18,34,50,101,152}_k????.pth.tar: 7×7 stem, `layerN.M.eca.conv.weight`
    timm         .pth or .safetensors of resnet{18,34,50,101}[d], ecaresnet{50,101}d: `se.conv.weight`, deep stem
                 32-32-64, average-pool downsampling
    torchvision  resnet{18,34,50,101,152}, as files or by torchvision's name for them
    CSAIL        resnet{18,50,101}-imagenet.pth, also known from PSPNet: deep stem 64-64-128 as conv1 to conv3

and so is the input normalization they expect. With a backbone `timm:NAME` timm itself reads its files.
"""

import re
from dataclasses import dataclass, field

import torch

from libs.convert import norm_kind, norms_and_convolutions, to_in_place, to_plain
from utils.common.errors import UserError

from .families import Weights, recognize


@dataclass
class Account:
    """What became of every tensor: names, with reasons where something was not loaded.

    `share`: of the backbone's values, loaded.
    """

    name: str
    family: str
    loaded: list = field(default_factory=list)
    initialized: dict = field(default_factory=dict)
    ignored: dict = field(default_factory=dict)
    notes: list = field(default_factory=list)
    share: float = 0.0

    def as_json(self):
        return {"file": self.name, "family": self.family, "backbone_loaded": self.share, "loaded": self.loaded,
                "initialized": self.initialized, "ignored": self.ignored, "notes": self.notes}

    def __str__(self):
        lines = [f"{self.name}, {self.family}: loaded {len(self.loaded)} tensors ({self.share:.1%} of the backbone's "
                 "values)"]
        for title, found in (("initialized", self.initialized), ("ignored", self.ignored)):
            reasons = {}
            for key, reason in found.items():
                reasons.setdefault(reason, []).append(key)
            for reason, keys in reasons.items():
                some = f"{', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''}"
                lines.append(f"  {title:<12}{len(keys):>4}  {reason}: {some}")
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


def load_weights(network, weights, name="", allow_partial=False):
    """Copy what fits into a network.

    Norms of the other kind are converted (`libs.convert`). Channel attention that the file does not have starts at
    zero, where it scales by 1/2, with the norm before it doubled: features are those of the network without it.

    Args:
        network: of `build_network`.
        weights: `Weights`, or what a file holds and its `name`.
        allow_partial: also when less than half of the backbone's values come from the file.

    Returns:
        `Account`. Raises `UserError` when a convolution of a stage has no counterpart, nothing fits, or too little.
    """
    if not isinstance(weights, Weights):
        weights = recognize(weights, name)
    target, account = network.state_dict(), Account(weights.name, weights.family)
    fitting = {}
    for key, value in weights.state.items():
        if key in target and value.shape == target[key].shape:
            fitting[key] = value
        else:
            account.ignored[key] = _why_ignored(key, value, target)
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
        insist = "; --allow-partial insists" if fitting else ""
        raise UserError(f"{weights.name}: expected weights of this network or its backbone, found {len(fitting)} "
                        f"fitting tensors of {len(weights.state)}: {account.share:.0%} of the backbone's values"
                        f"{insist}")
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


def _why_ignored(key, value, target):
    if key in target:
        classifiers = r"(head\.(fine|coarse|position|channel)|aux)\."
        return "another number of classes" if re.match(classifiers, key) else "another shape"
    if re.match(r"backbone\.(fc|classifier|last_linear|head)\.", key):
        return "the classifier of the file"
    if ".eca." in key:
        return "no attention in this network"
    return "no counterpart in this network"


def _neutral_attention(fitting, target, state):
    """Attention at zero and doubled norms before it, for a backbone with attention from a file without."""
    missing = [key for key in target if key.startswith("backbone.") and key.endswith(".eca.conv.weight")]
    if not missing or any(key.endswith(".eca.conv.weight") for key in state):
        return {}
    neutral = {}
    for key in missing:
        block = key.removesuffix("eca.conv.weight")
        last = "bn3" if f"{block}bn3.weight" in target else "bn2"
        neutral[key] = torch.zeros_like(target[key])
        for tensor in ("weight", "bias"):
            name = f"{block}{last}.{tensor}"
            if name in fitting:
                neutral[name] = 2 * fitting[name].to(target[name].dtype)
    return neutral


def _convert_norms(network, state, source):
    """Weights for norms of kind `source` → for those of the network; and a sentence, if anything changed."""
    target = norm_kind(network)
    if source == target:
        return state, ""
    pairs = norms_and_convolutions(network, torch.empty(2, 3, 65, 65))
    if not any(f"{norm}.weight" in state for norm in pairs):    # those of timm's networks stay as they are
        return state, ""
    if target == "bn":
        return to_plain(state, pairs), "scales of in-place norms became |weight| + eps"
    negative = sum(int((state[f"{norm}.weight"] < 0).sum()) for norm in pairs if f"{norm}.weight" in state)
    state, inexact = to_in_place(state, pairs)
    return state, (f"for in-place norms {negative} negative scales moved into the convolutions before them, and "
                   f"{inexact} channels with |weight| below 1e-5 are not exact")
