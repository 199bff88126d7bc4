"""Reading of the weights that a run starts from: a file, a snapshot, or pretrained weights of torchvision or timm."""

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
from .card import CONFIG
from .families import Weights, convert_old_layout, find_state_dict, is_snapshot, recognize
from .hub import fetch
from .snapshot import Snapshot, parse


def read_weights(path, backbone=None):
    """Read a file of weights, and recognize its family.

    Args:
        path: path of the file, hf:owner/name, or torchvision's name for weights, such as
            ResNet101_Weights.IMAGENET1K_V2.
        backbone: name of the backbone, or None. For a backbone of timm, timm reads the file.

    Returns:
        `Weights`.

    Raises:
        UserError: if the file has no such weights; the message says what it appears to be.
    """
    path = Path(fetch(path))
    if re.fullmatch(r"\w+_Weights\.\w+", str(path)) and not os.path.exists(path):
        path = _download(str(path))
    _check_kind(path)
    content = files.load(path)
    content = _exported_content(path, content) or content
    if find_backbone(backbone or BACKBONE).weights_by_timm and not is_snapshot(content):
        return timm_weights(backbone, find_state_dict(content, str(path)), str(path))
    return recognize(content, str(path))


def timm_weights(backbone, state=None, name="--pretrained"):
    """Read weights for a backbone of timm, renamed and reshaped by timm.

    Args:
        backbone: `timm:NAME`.
        state: tensors of a file by name; None for timm's pretrained weights, from its cache or the internet.
        name: name of the file or flag, for messages.

    Returns:
        `Weights`.

    Raises:
        UserError: if timm cannot read them.
    """
    arguments = choose_backbone(None, backbone)["backbone_arguments"]
    try:
        state, others = timm.read_state(backbone, arguments, state)
    except Exception as error:  # noqa: BLE001, the download, the cache and timm's conversions raise many types
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        expected = (f"weights of {backbone} in timm's cache or on the internet" if name == "--pretrained" else
                    f"weights of {backbone}")
        raise UserError(f"{name}: expected {expected}, found: {' '.join(lines[:2])[:240]}") from None
    state = {f"backbone.{key}": value for key, value in (others | state).items()}
    return Weights(name, backbone, state=state, norm="bn",
                   structure={"backbone": backbone, "backbone_arguments": arguments},
                   normalization=timm.input_normalization(backbone))


def read_snapshot(path, resuming=False):
    """Read and check a snapshot of train.py, or a .safetensors file that `evaluate.py --export` made of one.

    Args:
        path: path of the file, or hf:owner/name.
        resuming: whether a run will resume from it.

    Returns:
        `networks.weights.snapshot.Snapshot`.

    Raises:
        UserError: if the file is not a valid snapshot.
    """
    file = fetch(path)
    content, is_exported = files.load(file), Path(file).suffix == ".safetensors"
    if is_exported and (content := _exported_content(file, content)) is None:
        raise UserError(f"{path}: expected the {CONFIG} of --export beside it, found none of an export")
    return parse(path, convert_old_layout(content), resuming)


class Start(NamedTuple):
    """What a run starts from: a `Snapshot` to resume, initial `Weights`, or neither."""

    snapshot: Snapshot | None = None
    weights: Weights | None = None


def find_start(*, resume_from, folder, restore_from, pretrained, backbone, processes=None):
    """Read what a run starts from.

    Args:
        resume_from: path of a snapshot, "newest" for the newest one in the folder, or None.
        folder: folder of the run's snapshots.
        restore_from: path of a file of weights, or None.
        pretrained: use the pretrained weights that timm has for the backbone.
        backbone: name of the backbone, or None.
        processes: `Processes` of the run, or None. Only the first one reads the snapshot: they may not share a disk.

    Returns:
        `Start`.

    Raises:
        UserError: if a file cannot be read or is not what it should be.
    """
    snapshot = resume_from and broadcast_from_rank0(processes, lambda: find_snapshot(resume_from, folder))
    if snapshot is not None:
        if restore_from or pretrained:
            logger.info("--resume: the weights are those of the snapshot; "
                        f"--{'restore-from' if restore_from else 'pretrained'} is not read")
        return Start(snapshot=snapshot)
    if resume_from:
        logger.info(f"--resume: no snapshot in {folder} yet, so this run starts from the beginning")
    if restore_from:
        return Start(weights=read_weights(restore_from, backbone))
    return Start(weights=timm_weights(backbone) if pretrained else None)


def _exported_content(path, tensors):
    """Combine the tensors of a .safetensors file and its config.json to the content of a snapshot.

    Returns:
        dict as in a snapshot; None if the file has no config.json of an export beside it.
    """
    config = Path(path).with_name(CONFIG)
    if Path(path).suffix != ".safetensors" or not config.is_file():
        return None
    try:
        config = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return {"model": tensors, "config": config, "step": config.get("step")} if isinstance(
        config, dict) and "network" in config else None


def _download(name):
    """Return the path in PyTorch's cache of weights named by torchvision; download them if they are not there."""
    try:
        import torchvision
    except Exception as error:  # noqa: BLE001, ImportError, or any error of its compiled part with another torch
        raise UserError(f"{name}: expected torchvision, which has the address of these weights, found none that can be "
                        f"imported ({str(error).splitlines()[0]}); or give the path of the file instead") from None
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
            raise UserError(f"{name}: expected to fetch {url}, found: {error}; or give the path of a copy instead"
                        ) from None
    return path


def _check_kind(path):
    """Raise `UserError` for folders, and for files whose first bytes show that they are not files of weights."""
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
    kind = None
    if not head:
        kind = "an empty file"
    elif head.startswith(b"version https://git-lfs"):
        kind = "a Git LFS pointer in its place; git lfs pull fetches the file"
    elif re.match(rb"\s*(<!doctype|<html|<\?xml|<head)", head, re.I):
        kind = "a web page; the download link leads to a page, not to the file"
    elif path.suffix != ".safetensors" and head.startswith(b"PK\x03\x04") and not zipfile.is_zipfile(path):
        kind = f"a download that was cut off after {path.stat().st_size / 1e6:.1f} MB; fetch it again"
    elif not head.startswith((b"PK", b"\x80")) and path.suffix != ".safetensors" and all(
            byte in b"\t\n\r\f" or 32 <= byte < 127 for byte in head):
        kind = f"a text file that begins {head[:40].decode()!r}"
    if kind:
        raise UserError(f"{path}: expected a file of weights, found {kind}")


def newest_snapshot(folder):
    """Read the newest valid `Snapshot` of a folder; return None if the folder has no snapshots.

    Snapshots that cannot be read are skipped with a message.

    Raises:
        UserError: if there are snapshots, but none of them is valid.
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
    """Read the `Snapshot` that a run resumes from.

    Args:
        path: path of the file, or "newest" for the newest valid one in the folder.
        folder: folder of the run's snapshots.

    Returns:
        `Snapshot`; None for "newest" if the folder has no snapshots.

    Raises:
        UserError: if it cannot be read, or if the folder has a later snapshot than the given file.
    """
    if path == "newest":
        return newest_snapshot(folder)
    chosen, existing = read_snapshot(path, resuming=True), snapshots.list_snapshots(folder)
    if existing and existing[-1][0] > chosen.step:
        raise UserError(f"--resume {path}, {plural(chosen.step, 'step')} done: expected no later snapshot in "
                        f"--snapshot-dir {folder}, found {existing[-1][1].name}, which this run would replace")
    return chosen


def best_quick_score(folder):
    """Read the best mean IoU of the quick validation in a folder, a fraction; return None if there is none."""
    path = Path(folder, snapshots.BEST)
    return read_snapshot(path).quick_mean_iou if path.exists() else None
