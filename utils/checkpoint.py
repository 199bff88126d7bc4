"""Files that hold tensors: written whole or not at all, read without running any code in them."""

import contextlib
import itertools
import json
import os
import random
import re
import shutil
import zlib
from pathlib import Path

import numpy as np
import torch

from .cli import UserError

NAME = "CS_scenes_{step}.pth"
LATEST = "latest.pth"       # a link to the newest snapshot
BEST = "best_quick.pth"     # the snapshot with the best result of the quick validation


def write_atomically(path, write):
    """Call `write(file)` on a temporary file beside `path`, flush it to the disk, and rename it.

    Whatever stood at `path` stays whole until the new content is. Raises `UserError` where the disk is
    full or the folder cannot be written.
    """
    path = Path(path)
    # Not longer than the name itself may be.
    temporary = path.with_name(f".{path.stem[:20]}.{zlib.crc32(os.fsencode(path.name)):08x}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        cause = error       # torch.save hides an error of the disk behind one of its own
        while cause.__context__ is not None:
            cause = cause.__context__
        if not isinstance(cause, OSError):
            raise cause from None
        raise UserError(f"{path}: expected to write a file there, found: {cause}") from error
    finally:
        with contextlib.suppress(OSError):      # where the folder is none, or its name too long
            temporary.unlink()


def save(path, content):
    """Write a dict of tensors and plain Python values, atomically."""
    write_atomically(path, lambda file: torch.save(content, file))


def write_json(path, values):
    """Write plain values as indented JSON, atomically."""
    text = json.dumps(values, indent=2) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


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
    older = [found for found in snapshots(folder) if found[0] <= step]
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


def check_room(flag, folder, needed, purpose):
    """Raise `UserError` that begins with `flag` if the disk of a folder, which need not exist yet, has less than
    `needed` bytes free."""
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UserError(f"{flag}: expected {needed / 1e6:,.0f} MB free for {purpose}, found {free / 1e6:,.0f} MB")


def seed_generators(seed):
    """Seed all random generators of this process."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2 ** 32)


def random_state(devices=()):
    """The states of all random generators of this process, and of those of its CUDA devices: plain values."""
    kind, keys, *rest = np.random.get_state()
    return {"torch": torch.get_rng_state(), "python": random.getstate(),
            "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), *rest],
            "cuda": [torch.cuda.get_rng_state(device) for device in devices if device.type == "cuda"]}


def set_random_state(state, devices=()):
    """What `random_state` gave, of the same number of devices."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    for device, one in zip((d for d in devices if d.type == "cuda"), state["cuda"], strict=True):
        torch.cuda.set_rng_state(one, device)
