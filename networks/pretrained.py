"""Weights from files into a network, with an account of every tensor.

Families are recognised from the files themselves:

    ours         snapshots of train.py, or a network's or backbone's state dict
    ECANet       eca_resnet{18,34,50,101,152}_k????.pth.tar: 7×7 stem, `layerN.M.eca.conv.weight`
    timm         .pth or .safetensors of resnet{18,34,50,101}[d], ecaresnet{50,101}d: `se.conv.weight`, deep stem
                 32-32-64, average-pool downsampling
    torchvision  resnet{18,34,50,101,152}, as files or by torchvision's name for them
    CSAIL        resnet{18,50,101}-imagenet.pth, also known from PSPNet: deep stem 64-64-128 as conv1 to conv3

and so is the input normalisation they expect. With a backbone `timm:NAME` timm itself reads its files.
"""

import json
import os
import re
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import torch

from libs.convert import norm_kind, norms_and_convolutions, to_in_place, to_plain
from utils import checkpoint, resume, snapshot
from utils.cli import UserError
from utils.distributed import by_the_first
from utils.model_card import CONFIG
from utils.normalization import CAFFE, Normalization

from . import meta_network, timm_backbone
from .backbones import BACKBONE, find_backbone, read_structure

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


@dataclass
class Account:
    """What became of every tensor: names, with reasons where something was not loaded.

    `share`: of the backbone's values, loaded.
    """

    name: str
    family: str
    loaded: list = field(default_factory=list)
    initialised: dict = field(default_factory=dict)
    ignored: dict = field(default_factory=dict)
    notes: list = field(default_factory=list)
    share: float = 0.0

    def as_json(self):
        return {"file": self.name, "family": self.family, "backbone_loaded": self.share, "loaded": self.loaded,
                "initialised": self.initialised, "ignored": self.ignored, "notes": self.notes}

    def __str__(self):
        lines = [f"{self.name}, {self.family}: loaded {len(self.loaded)} tensors ({self.share:.1%} of the backbone's "
                 "values)"]
        for title, found in (("initialised", self.initialised), ("ignored", self.ignored)):
            reasons = {}
            for key, reason in found.items():
                reasons.setdefault(reason, []).append(key)
            for reason, keys in reasons.items():
                some = f"{', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''}"
                lines.append(f"  {title:<12}{len(keys):>4}  {reason}: {some}")
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


def read_weights(path, backbone=None):
    """Read and recognise a file → `Weights`. Raises `UserError` that says what the file looks like.

    path: of a file, or torchvision's name for weights, such as ResNet101_Weights.IMAGENET1K_V2; backbone: that the
    flags name, for which timm reads the file if it is one of its own.
    """
    path = Path(path)
    if re.fullmatch(r"\w+_Weights\.\w+", str(path)) and not os.path.exists(path):
        path = _fetch(str(path))
    _look(path)
    content = checkpoint.load(path)
    content = _exported(path, content) or content
    if find_backbone(backbone or BACKBONE).weights_by_timm and not _is_snapshot(content):
        return timm_weights(backbone, _state_dict(content, str(path)), str(path))
    return recognise(content, str(path))


def timm_weights(backbone, state=None, name="--pretrained"):
    """`Weights` of a backbone `timm:NAME`, renamed and reshaped by timm; state: names → tensors of a file, or None for
    what timm's cache or the network has. Raises `UserError` naming the file."""
    arguments = choose_backbone(None, backbone)["backbone_arguments"]
    try:
        state, others = timm_backbone.read_state(backbone, arguments, state)
    except Exception as error:  # noqa: BLE001, of the network, of its cache, of timm's many ways to rename tensors
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        expected = "weights of its cache, or from the network" if name == "--pretrained" else f"weights of {backbone}"
        raise UserError(f"{name}: expected {expected}, found: {' '.join(lines[:2])[:240]}") from None
    state = {f"backbone.{key}": value for key, value in (others | state).items()}
    return Weights(name, backbone, state, "bn", {"backbone": backbone, "backbone_arguments": arguments},
                   timm_backbone.input_normalization(backbone))


def read_snapshot(path, resuming=False):
    """Read one of our own snapshots, or what `evaluate.py --export` made of one as .safetensors: the only way to →
    `utils.snapshot.Snapshot`. Raises `UserError`.

    resuming: a run is to go on from it.
    """
    content, exported = checkpoint.load(path), Path(path).suffix == ".safetensors"
    if exported and (content := _exported(path, content)) is None:
        raise UserError(f"{path}: expected the {CONFIG} of --export beside it, found none such")
    return snapshot.parse(path, _with_head(content), meta_network, resuming)


def find_start(*, resume_from, folder, restore_from, pretrained, backbone, processes=None):
    """What a run begins with: (`Snapshot` to go on from, or None; `Weights` to start from, or None).

    Args:
        resume_from: file of a snapshot, "newest" of the folder, or None.
        folder: of the run's snapshots.
        restore_from: file of weights, or None.
        pretrained: take the weights that timm has for the backbone.
        backbone: that flags name, or None.
        processes: that share the run: they may share no disk.
    """
    found = resume_from and by_the_first(processes, lambda: resume.find_snapshot(resume_from, folder, read_snapshot))
    if found is not None:
        if restore_from or pretrained:
            print(f"--resume: the weights are the snapshot's; --{'restore-from' if restore_from else 'pretrained'} is "
                  "not read")
        return found, None
    if resume_from:
        print(f"--resume: no snapshot in {folder} yet, so this run starts from the beginning")
    if restore_from:
        return None, read_weights(restore_from, backbone)
    return None, timm_weights(backbone) if pretrained else None


def _exported(path, tensors):
    """The tensors of a .safetensors file and its config.json, as a snapshot has them; None without one of our own."""
    config = Path(path).with_name(CONFIG)
    if Path(path).suffix != ".safetensors" or not config.is_file():
        return None
    try:
        config = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return {"model": tensors, "config": config, "step": config.get("step")} if isinstance(
        config, dict) and "network" in config else None


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


def _with_head(content):
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


def _is_snapshot(content):
    """Whether train.py wrote it, as far as what it has kept tells: other projects too save a model and a step."""
    if not isinstance(content, dict) or not {"model", "step"} <= content.keys():
        return False
    config = content.get("config")
    return "rng" in content or isinstance(config, dict) and "network" in config


def recognise(content, name):
    """What `torch.load` gave → `Weights`. Raises `UserError` where there is no residual network in it."""
    if _is_snapshot(content):
        return weights_of(snapshot.parse(name, _with_head(content), meta_network))
    state = _state_dict(content, name)
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


def choose_backbone(weights=None, backbone=None, stem=None, downsample=None, eca_kernels=None):
    """Arguments of `build_network` for a backbone: what flags leave open follows the weights.

    A backbone's name fixes depth and attention. Raises `UserError` where a flag and the file contradict.

    Args:
        weights: `Weights`, or None.
        backbone, stem, downsample (`strided` or `average`), eca_kernels: what flags say; None for nothing.
    """
    theirs, source = ({}, None) if weights is None else (weights.structure, weights.name)
    flags = {"stem": stem, "downsample": downsample, "eca-kernels": eca_kernels and list(eca_kernels)}
    try:
        chosen = find_backbone(backbone or theirs.get("backbone", BACKBONE))
    except ValueError as error:
        raise UserError(f"{source}: {error}" if source else f"--{error}") from None
    return chosen.follow(theirs, flags, source)


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
        weights = recognise(weights, name)
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
            account.initialised[key] = ("another number of classes" if key in account.ignored
                                        else "no counterpart in the file")
        elif key in neutral and ".eca." in key:
            account.initialised[key] = "no attention in the file: 0, and the norm before it doubled, so nothing changes"
    fitting, note = _convert_norms(network, fitting, weights.norm)
    account.notes += [note] * bool(note)
    network.load_state_dict(fitting, strict=False)
    return account


def _fetch(name):
    """The file of weights that torchvision names so, in PyTorch's cache; downloaded if it is not there yet."""
    try:
        import torchvision
    except Exception as error:  # noqa: BLE001, beside ImportError what its compiled part raises beside another torch
        raise UserError(f"{name}: expected torchvision, which knows where to fetch it, found none that can be imported "
                        f"({str(error).splitlines()[0]}); the file itself will do") from None
    try:
        url = torchvision.models.get_weight(name).url
    except (ValueError, KeyError):
        raise UserError(f"{name}: expected a file or weights that torchvision {torchvision.__version__} names, such as "
                        "ResNet101_Weights.IMAGENET1K_V2, found neither") from None
    path = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    if not path.exists():
        print(f"{name}: fetching {url} to {path}")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), path.stem.rpartition("-")[2])
        except (OSError, RuntimeError) as error:        # OSError: no connection; RuntimeError: another checksum
            raise UserError(f"{name}: expected to fetch {url}, found: {error}; a copy of that file will do") from None
    return path


def _look(path):
    """Recognise what is no file of weights from its first bytes, before the rest is read."""
    if os.path.isdir(path):
        names = {file.name for file in path.iterdir()}
        if "latest" in names or any("zero_pp_rank" in name or "mp_rank" in name for name in names):
            raise UserError(f"{path}: expected a file of weights, found a folder that looks like DeepSpeed's; its "
                            "script zero_to_fp32.py makes one file of it")
        inside = [name for name in sorted(names) if name.endswith((".ckpt", ".pth", ".pt", ".safetensors"))]
        lightning = " that looks like Lightning's" if any(name.endswith(".ckpt") for name in inside) or (
            "checkpoints" in names and "hparams.yaml" in names) else ""
        raise UserError(f"{path}: expected a file of weights, found a folder{lightning}"
                        + (f"; give a file in it: {', '.join(inside[:3])}" if inside else
                           "; give the .ckpt file in checkpoints/" * bool(lightning)))
    if not os.path.isfile(path):
        raise UserError(f"{path}: expected a file of weights, found no such file")
    with open(path, "rb") as file:
        head = file.read(512)
    found = None
    if not head:
        found = "an empty file"
    elif head.startswith(b"version https://git-lfs"):
        found = "a Git LFS pointer in its place; git lfs pull fetches the file"
    elif re.match(rb"\s*(<!doctype|<html|<\?xml|<head)", head, re.I):
        found = "a web page; the download link leads to a page, not to the file"
    elif path.suffix != ".safetensors" and head.startswith(b"PK\x03\x04") and not zipfile.is_zipfile(path):
        found = f"a download that was cut off after {path.stat().st_size / 1e6:.1f} MB; fetch it again"
    elif not head.startswith((b"PK", b"\x80")) and path.suffix != ".safetensors" and all(
            byte in b"\t\n\r\f" or 32 <= byte < 127 for byte in head):
        found = f"a text file that begins {head[:40].decode()!r}"
    if found:
        raise UserError(f"{path}: expected a file of weights, found {found}")


def _state_dict(content, name):
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
        print(f"{name}: the weights named {places[0] or 'at the top'} are taken, not {', '.join(places[1:])}")
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
