"""Snapshot files in the folder of a run: naming, listing, writing and pruning."""

import itertools
import os
import re
from pathlib import Path

import torch

from ..common.files import write_atomically

NAME = "CS_scenes_{step}.pth"
LATEST = "latest.pth"       # a link to the newest snapshot
BEST = "best_quick.pth"     # the snapshot with the best result of the quick validation


def save(path, content):
    """Write a dict of tensors and plain Python values atomically."""
    write_atomically(path, lambda file: torch.save(content, file))


def step_of(path):
    """Return the step in the name of a snapshot; None for other names."""
    match = re.fullmatch(re.escape(NAME).replace(r"\{step\}", r"(\d+)"), Path(path).name)
    return match and int(match[1])


def list_snapshots(folder):
    """List the snapshots in a folder as [(step, path)], ordered by step."""
    paths = [(step_of(path), path) for path in Path(folder).glob("*.pth")]
    return sorted((step, path) for step, path in paths if step is not None)


def save_step(folder, step, content, keep=None, healthy=None):
    """Write the snapshot of a step, point `latest.pth` to it, and remove old snapshots.

    Args:
        folder: of the run.
        step: steps done.
        content: a dict of tensors and plain Python values.
        keep: how many of the newest snapshots stay; None for all.
        healthy: step of a snapshot that always stays; None for none.
    """
    path = Path(folder) / NAME.format(step=step)
    save(path, content)
    link = path.with_name(f".{LATEST}.{os.getpid()}.tmp")
    try:
        link.symlink_to(path.name)
        os.replace(link, path.with_name(LATEST))
    except OSError:     # the file system has no links; --resume finds the newest snapshot by its step
        link.unlink(missing_ok=True)
    # Snapshots of later steps were damaged and skipped by --resume; they do not count among the newest.
    candidates = [(number, path) for number, path in list_snapshots(folder) if number <= step]
    for number, path in candidates[:-keep] if keep else ():
        if number != healthy:
            path.unlink()


def set_aside(path):
    """Rename a file to an unused name in the same folder, and return the new path."""
    free = (path.with_name(f"{path.stem}_earlier_{number}{path.suffix}") for number in itertools.count(1))
    return path.rename(next(name for name in free if not name.exists()))


def remove_unfinished(folder):
    """Remove the temporary files of a killed run."""
    for path in Path(folder).glob(".*.tmp"):
        path.unlink(missing_ok=True)
