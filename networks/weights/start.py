"""Where the weights of a run come from: a file, a snapshot, or a name that a package knows."""

import json
import os
import re
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch

from utils.common import files
from utils.common.errors import UserError, plural
from utils.common.messages import logger
from utils.parallel.processes import broadcast_from_rank0
from utils.runs import snapshots

from ..backbones import timm
from ..backbones.choose import choose_backbone
from ..backbones.names import BACKBONE, find_backbone
from . import snapshot
from .card import CONFIG
from .families import Weights, is_snapshot, recognize, state_dict_of, with_head
from .snapshot import Snapshot


def read_weights(path, backbone=None):
    """Read and recognize a file → `Weights`. Raises `UserError` that says what the file looks like.

    path: of a file, or torchvision's name for weights, such as ResNet101_Weights.IMAGENET1K_V2; backbone: that the
    flags name, for which timm reads the file if it is one of its own.
    """
    path = Path(path)
    if re.fullmatch(r"\w+_Weights\.\w+", str(path)) and not os.path.exists(path):
        path = _fetch(str(path))
    _look(path)
    content = files.load(path)
    content = _exported(path, content) or content
    if find_backbone(backbone or BACKBONE).weights_by_timm and not is_snapshot(content):
        return timm_weights(backbone, state_dict_of(content, str(path)), str(path))
    return recognize(content, str(path))


def timm_weights(backbone, state=None, name="--pretrained"):
    """`Weights` of a backbone `timm:NAME`, renamed and reshaped by timm; state: names → tensors of a file, or None for
    what timm's cache or the network has. Raises `UserError` naming the file."""
    arguments = choose_backbone(None, backbone)["backbone_arguments"]
    try:
        state, others = timm.read_state(backbone, arguments, state)
    except Exception as error:  # noqa: BLE001, of the network, of its cache, of timm's many ways to rename tensors
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        expected = "weights of its cache, or from the network" if name == "--pretrained" else f"weights of {backbone}"
        raise UserError(f"{name}: expected {expected}, found: {' '.join(lines[:2])[:240]}") from None
    state = {f"backbone.{key}": value for key, value in (others | state).items()}
    return Weights(name, backbone, state, "bn", {"backbone": backbone, "backbone_arguments": arguments},
                   timm.input_normalization(backbone))


def read_snapshot(path, resuming=False):
    """Read one of our own snapshots, or what `evaluate.py --export` made of one as .safetensors: the only way to →
    `utils.snapshot.Snapshot`. Raises `UserError`.

    resuming: a run is to go on from it.
    """
    content, exported = files.load(path), Path(path).suffix == ".safetensors"
    if exported and (content := _exported(path, content)) is None:
        raise UserError(f"{path}: expected the {CONFIG} of --export beside it, found none such")
    return snapshot.parse(path, with_head(content), resuming)


class Start(NamedTuple):
    """What a run begins with: a `Snapshot` to go on from, `Weights` to start from, or neither."""

    snapshot: Snapshot | None = None
    weights: Weights | None = None


def find_start(*, resume_from, folder, restore_from, pretrained, backbone, processes=None):
    """Read what a run begins with → `Start`.

    Args:
        resume_from: file of a snapshot, "newest" of the folder, or None.
        folder: of the run's snapshots.
        restore_from: file of weights, or None.
        pretrained: take the weights that timm has for the backbone.
        backbone: that flags name, or None.
        processes: that share the run: they may share no disk.
    """
    found = resume_from and broadcast_from_rank0(processes, lambda: find_snapshot(resume_from, folder))
    if found is not None:
        if restore_from or pretrained:
            logger.info("--resume: the weights are the snapshot's; "
                        f"--{'restore-from' if restore_from else 'pretrained'} is not read")
        return Start(snapshot=found)
    if resume_from:
        logger.info(f"--resume: no snapshot in {folder} yet, so this run starts from the beginning")
    if restore_from:
        return Start(weights=read_weights(restore_from, backbone))
    return Start(weights=timm_weights(backbone) if pretrained else None)


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
        logger.info(f"{name}: fetching {url} to {path}")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), path.stem.rpartition("-")[2])
        except (OSError, RuntimeError) as error:        # OSError: no connection; RuntimeError: another checksum
            raise UserError(f"{name}: expected to fetch {url}, found: {error}; a copy of that file will do") from None
    return path


def _look(path):
    """Recognize what is no file of weights from its first bytes, before the rest is read."""
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


def newest_snapshot(folder):
    """The newest `Snapshot` of a folder that is sound; None without any.

    Unreadable ones are skipped with a message.

    Raises:
        UserError: if there are snapshots, but no sound one.
    """
    paths = [path for _, path in reversed(snapshots.list_snapshots(folder))]
    for path in paths:
        try:
            return read_snapshot(path, resuming=True)
        except UserError as error:
            if path == paths[-1]:
                raise
            logger.info(f"{error}; taking the snapshot before it")
    return None


def find_snapshot(path, folder):
    """The `Snapshot` to go on from; None without any.

    Args:
        path: of a file, or "newest".
        folder: of the run.
    """
    if path == "newest":
        return newest_snapshot(folder)
    chosen, existing = read_snapshot(path, resuming=True), snapshots.list_snapshots(folder)
    if existing and existing[-1][0] > chosen.step:
        raise UserError(f"--resume {path}, {plural(chosen.step, 'step')} done: expected no later snapshot in "
                        f"--snapshot-dir {folder}, found {existing[-1][1].name}, which this run would replace")
    return chosen


def best_quick_score(folder):
    """The best result of the quick validation in a folder, a fraction; None without any."""
    path = Path(folder, snapshots.BEST)
    return read_snapshot(path).quick_mean_iou if path.exists() else None
