"""Files that hold tensors: written whole or not at all, read without running any code in them."""

import os
import re
from pathlib import Path

import torch

from .cli import UserError

NAME = "CS_scenes_{step}.pth"


def write_atomically(path, write):
    """Call `write(file)` on a temporary file beside `path`, flush it to the disk, and rename it.

    Whatever stood at `path` stays whole until the new content is. Raises `UserError` where the disk is
    full or the folder cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path}: expected to write a file there, found: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def save(path, content):
    """Write a dict of tensors and plain Python values, atomically."""
    write_atomically(path, lambda file: torch.save(content, file))


def load(path):
    """Read a file that `torch.save` wrote, on the CPU, as data only. Raises `UserError`."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: expected a file of weights, found {'a folder' if path.is_dir() else 'no such file'}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001, torch raises many kinds for a file that is not its own
        reason = str(error).strip().split("\n")[0][:160]
        raise UserError(f"{path}: expected a file of tensors written by torch.save, found one that cannot be "
                        f"read as data alone ({reason})") from None


def load_snapshot(path):
    """Read one of our own snapshots; see `train.snapshot` for its keys. Raises `UserError`."""
    content = load(path)
    missing = {"model", "config", "step"} - set(content if isinstance(content, dict) else ())
    if missing:
        raise UserError(f"{path}: expected a snapshot that train.py wrote, found a file without "
                        f"{', '.join(sorted(missing))}")
    return content


def newest(folder):
    """(path, content) of the newest snapshot in a folder that can be read; (None, None) without any.

    Damaged ones are passed over and said. Raises `UserError` if all are damaged.
    """
    found = [path for _, path in reversed(snapshots(folder))]
    for number, path in enumerate(found):
        try:
            return path, load_snapshot(path)
        except UserError as error:
            if number == len(found) - 1:
                raise
            print(f"{error}; taking the snapshot before it")
    return None, None


def snapshots(folder):
    """Snapshots in a folder as [(step, path)], oldest first."""
    pattern = re.compile(re.escape(NAME).replace(r"\{step\}", r"(\d+)"))
    found = [(pattern.fullmatch(path.name), path) for path in Path(folder).glob("*.pth")]
    return sorted((int(match[1]), path) for match, path in found if match)
