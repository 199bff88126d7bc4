"""Snapshots as files in a folder: their names, the newest, and how many are kept."""

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
    """Write a dict of tensors and plain Python values, atomically."""
    write_atomically(path, lambda file: torch.save(content, file))


def step_of(path):
    """The step in a snapshot's name; None for other names."""
    match = re.fullmatch(re.escape(NAME).replace(r"\{step\}", r"(\d+)"), Path(path).name)
    return match and int(match[1])


def list_snapshots(folder):
    """Snapshots in a folder as [(step, path)], oldest first."""
    found = [(step_of(path), path) for path in Path(folder).glob("*.pth")]
    return sorted((step, path) for step, path in found if step is not None)


def save_step(folder, step, content, keep=None, sound=None):
    """Write the snapshot of a step, let `latest.pth` point to it, and remove older ones beyond the newest `keep`.

    sound: step of a snapshot that stays in any case.
    """
    path = Path(folder) / NAME.format(step=step)
    save(path, content)
    link = path.with_name(f".{LATEST}.{os.getpid()}.tmp")
    try:
        link.symlink_to(path.name)
        os.replace(link, path.with_name(LATEST))
    except OSError:     # a file system without links: --resume finds the newest by its number anyway
        link.unlink(missing_ok=True)
    # What has a higher number was passed over as damaged; it must not push out what was written just now.
    older = [found for found in list_snapshots(folder) if found[0] <= step]
    for number, old in older[:-keep] if keep else ():
        if number != sound:
            old.unlink()


def set_aside(path):
    """Give a file a name of its own beside its old one; returns the new path."""
    free = (path.with_name(f"{path.stem}_earlier_{number}{path.suffix}") for number in itertools.count(1))
    return path.rename(next(name for name in free if not name.exists()))


def remove_unfinished(folder):
    """Remove what a killed run left behind of files it had begun to write."""
    for path in Path(folder).glob(".*.tmp"):
        path.unlink(missing_ok=True)
