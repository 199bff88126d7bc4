"""Logging of a training run: progress, `metrics.jsonl`, TensorBoard, experiment trackers."""

import contextlib
import json
import os
import platform
import shlex
import stat
import struct
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import torch
from tensorboardX import summary
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c
from tqdm import tqdm

from ..common import files
from ..common.errors import UserError
from ..common.messages import logger
from ..common.progress import duration
from ..devices.select import device_name
from . import snapshots
from .trackers import start_trackers

try:
    import fcntl
except ImportError:     # on Windows, where run folders are not locked
    fcntl = None

METRICS = "metrics.jsonl"
QUICK = "quick_validation.jsonl"
RUNS = "runs.json"


class RunLog:
    """Log of a run in the console and in files of its folder.

    Progress is a bar on a terminal; elsewhere it is one plain line each time metrics are logged. The log is a context
    manager. Its folder is locked against other runs until the context ends.

    Args:
        folder: for `metrics.jsonl`, `quick_validation.jsonl`, `runs.json` and `tensorboard/`.
        num_steps: total number of steps.
        start: steps done before. Log entries of later steps are removed, as these steps will be done again.
        description: plain values that describe this start of the run, for `runs.json`.
        track: names of experiment trackers that also get the log (`utils.runs.trackers`).

    Raises:
        UserError: if the folder cannot be written, or another run writes there.
    """

    def __init__(self, folder, num_steps, start=0, description=None, track=()):
        self.folder = Path(folder)
        self.description, self.track, self.trackers = description or {}, track, []
        self.lock = _lock(self.folder)
        snapshots.remove_unfinished(self.folder)
        self.num_steps = num_steps
        self.start = start
        self.started = time.monotonic()
        self.bar = tqdm(total=num_steps, initial=start, unit="step", dynamic_ncols=True,
                        disable=not sys.stderr.isatty())
        _append_run(self.folder / RUNS, self.description)
        self.files = {name: _open_at_step(self.folder / name, start) for name in (METRICS, QUICK)}
        self.board = Board(self.folder / "tensorboard")

    def __enter__(self):
        self.trackers = start_trackers(self.track, self.folder, self.start > 0, self.description)
        return self

    def __exit__(self, *error):
        self.bar.close()
        for tracker in self.trackers:
            tracker.close(failed=error[0] is not None)
        for file in (*self.files.values(), self.board, self.lock):
            file.close()

    def step(self):
        """Advance the progress bar by a step."""
        self.bar.update()

    def metric(self, step, values, seconds):
        """Log the metrics of a step.

        Args:
            step: number of the step.
            values: {name: number}, with at least loss, lr, images_per_second and seconds_data.
            seconds: since metrics were logged last.
        """
        self._write(METRICS, {"step": step, **values})
        self._scalars(values, step)
        terms = "  ".join(f"{name.removeprefix('loss_')} {value:.3f}" for name, value in values.items()
                          if name.startswith("loss"))
        speed = (f"{values['images_per_second']:.1f} images/s, {100 * values['seconds_data'] / seconds:.0f} % of the "
                 "time waiting for data")
        if self.bar.disable:
            done = step - self.start
            left = (time.monotonic() - self.started) / done * (self.num_steps - step)
            logger.info(f"step {step}/{self.num_steps}  {terms}  lr {values['lr']:.2e}  {speed}  "
                        f"{duration(left)} left")
        else:
            self.bar.set_postfix_str(f"{terms}  lr {values['lr']:.2e}  {speed}")

    def quick_validation(self, step, scores):
        """Log a quick validation, which is not the official protocol; hence "quick" in all names.

        Args:
            step: steps done.
            scores: {head: scores as of `ConfusionMatrix.scores`}.
        """
        values, curves = {"step": step}, {}
        for head, score in scores.items():
            values[f"quick_mean_iou_{head}"] = score["mean_iou"]
            values[f"quick_class_iou_{head}"] = score["class_iou"]
            curves[f"quick_mean_iou/{head}"] = score["mean_iou"] or 0
            curves |= {f"quick_class_iou_{head}/{name}": iou for name, iou in score["class_iou"].items()}
        self._write(QUICK, values)
        self._scalars(curves, step)
        self.info(f"quick validation after step {step} (whole images at scale 1, not the official protocol): mIoU "
                  + ", ".join(f"{head} {100 * (score['mean_iou'] or 0):.2f} %" for head, score in scores.items()))

    def picture(self, name, image, step):
        """Log a picture; image (H, W, 3) uint8."""
        self.board.add(summary.image(name, image, dataformats="HWC"), step)
        for tracker in self.trackers:
            tracker.picture(name, image, step)

    def info(self, text):
        """Print a line above the progress bar."""
        logger.info(text)

    def _scalars(self, values, step):
        """Log the scalars of a step to TensorBoard and the trackers; values: {name: number, or None to skip}."""
        values = {name: value for name, value in values.items() if value is not None}
        for name, value in values.items():
            self.board.add(summary.scalar(name, value), step)
        for tracker in self.trackers:
            tracker.numbers(values, step)

    def _write(self, name, values):
        self.files[name].append((json.dumps(values) + "\n").encode())


class Lines:
    """A file to which complete entries are appended.

    Entries that cannot be written, as on a full disk, are left out with one warning: logging must never stop a run.
    """

    def __init__(self, path):
        self.path, self.failed = path, False
        with _path_errors(path, "a file to write to"):
            self.file = open(path, "ab", buffering=0)  # noqa: SIM115, open as long as the run

    def append(self, entry):
        """Append an entry of bytes, completely or not at all."""
        end = os.fstat(self.file.fileno()).st_size
        try:
            if self.file.write(entry) != len(entry):
                raise OSError("no room for the whole entry")
        except OSError as error:
            with contextlib.suppress(OSError):
                self.file.truncate(end)     # part of an entry would corrupt the next one
            if not self.failed:
                logger.warning(f"{self.path}: expected to write there, found: {error}; training goes on, and this file "
                               "lacks the entries that cannot be written")
            self.failed = True

    def close(self):
        self.file.close()


class Board:
    """A TensorBoard file in a folder, written by the calling thread.

    The writer thread of `SummaryWriter` dies when the disk is full, and the run would then wait for it forever.
    """

    def __init__(self, folder):
        with _path_errors(folder, "a folder to write to"):
            folder.mkdir(parents=True, exist_ok=True)
        self.lines = Lines(folder / f"events.out.tfevents.{int(time.time())}.{platform.node()}.{os.getpid()}")
        self._append(Event(wall_time=time.time(), file_version="brain.Event:2"))

    def add(self, values, step):
        """Add the values of a step, as made by `tensorboardX.summary`."""
        self._append(Event(wall_time=time.time(), step=step, summary=values))

    def _append(self, event):
        """Append an event as a TFRecord: length, checksum of the length, data, checksum of the data."""
        data = event.SerializeToString()
        length = struct.pack("<Q", len(data))
        self.lines.append(b"".join((length, struct.pack("<I", masked_crc32c(length)), data,
                                    struct.pack("<I", masked_crc32c(data)))))

    def close(self):
        self.lines.close()


class NoLog:
    """A `RunLog` that logs nothing, for all processes but the first."""

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def _ignore(self, *args):
        pass

    step = metric = quick_validation = picture = info = _ignore


def describe_run(arguments, devices):
    """Describe what is needed to repeat a run: command, flags, versions, code and machine.

    Args:
        arguments: {flag name: plain value}.
        devices: of the run.

    Returns:
        A dict of plain values.
    """
    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for name in ("torchvision", "numpy", "opencv-python", "Pillow", "inplace-abn", "apex"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {"started": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "command": shlex.join([sys.executable, *sys.argv]),
            "arguments": arguments, "versions": versions, "cuda": torch.version.cuda,
            "devices": list(map(device_name, devices)),
            "git_commit": _git("rev-parse", "HEAD"), "git_changed_files": _git("status", "--porcelain"),
            "host": platform.node()}


def read_lines(path):
    """Read the entries of a file of JSON lines that have a step.

    Other lines, such as an incomplete last one, are skipped. Without the file there are no entries.

    Raises:
        UserError: if the file cannot be read as text.
    """
    if not path.exists():
        return []
    with _path_errors(path, "a text file of JSON lines"):
        text = path.read_text(encoding="utf-8")
    entries = []
    for line in text.splitlines():
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict) and type(entry.get("step")) is int:
            entries.append(entry)
    return entries


def _open_at_step(path, step):
    """Open a file of JSON lines to append the entries after a step; remove those of later steps."""
    if path.exists():
        entries = read_lines(path)
        skipped = sum(bool(line.strip()) for line in path.read_text(encoding="utf-8").splitlines()) - len(entries)
        if skipped > 1:     # one incomplete line is normal after a killed run
            logger.info(f"{path}: {skipped} lines without a step are left out")
        kept = "".join(json.dumps(entry) + "\n" for entry in entries if entry["step"] <= step)
        files.write_atomically(path, lambda file: file.write(kept.encode()))
    return Lines(path)


@contextlib.contextmanager
def _path_errors(path, expected):
    """Raise errors of a path in the run's folder as `UserError`; expected: what it should be."""
    try:
        yield
    except UnicodeDecodeError:
        raise UserError(f"{path}: expected {expected}, found a binary file") from None
    except OSError as error:
        raise UserError(f"{path}: expected {expected}, found: {error.strerror or error}") from None


def _lock(folder):
    """Make a folder and lock it; return its lock file, which holds the lock until it is closed or the process ends."""
    path = folder / ".lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Follow no link, truncate no existing file, and do not wait for the other end of a pipe.
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
                                 | getattr(os, "O_NONBLOCK", 0), 0o666), "rb")
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError("not a regular file")
    except OSError as error:
        expected = "an ordinary file .lock there" if os.path.lexists(path) else "a folder to write to"
        raise UserError(f"--snapshot-dir {folder}: expected {expected}, found: {error}") from None
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(f"--snapshot-dir {folder}: expected a folder to which no other run is writing, found one "
                        "in use") from None
    except OSError:
        pass        # the file system does not support locks
    return file


def _append_run(path, description):
    """Add the description of a run's start to the list in `runs.json`."""
    runs = read_runs(path) if os.path.lexists(path) else []
    files.write_json(path, [*runs, description])


def read_runs(path):
    """Read the list in `runs.json`. Raises `UserError` if the file is another one."""
    with _path_errors(path, "the list of this folder's runs"):
        text = path.read_text(encoding="utf-8")
    try:
        runs = json.loads(text)
    except (ValueError, RecursionError):
        runs = None
    if not isinstance(runs, list):
        raise UserError(f"{path}: expected the list of this folder's runs, found something else; remove "
                        "the file to begin a new list")
    return runs


def _git(*words):
    """Return the output of a git command on this code; None if its root folder is not the root of a checkout."""
    root = Path(__file__).resolve().parents[2]

    def output(*words):
        try:
            process = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True)
        except OSError:
            return None
        return process.stdout.strip() if process.returncode == 0 else None

    top = output("rev-parse", "--show-toplevel")
    return output(*words) if top and Path(top).resolve() == root else None
