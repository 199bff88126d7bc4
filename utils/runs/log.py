"""What a training run tells: a progress line, `metrics.jsonl`, TensorBoard, services that keep experiments."""

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
except ImportError:     # not on Windows: nothing keeps two runs out of one folder there
    fcntl = None

METRICS = "metrics.jsonl"
QUICK = "quick_validation.jsonl"


class RunLog:
    """Progress of a run of `num_steps` steps, in the console and in files below `folder`.

    On a terminal progress is a bar; elsewhere it is one plain line each time something is logged. To be used in
    `with`: no other run can write to the folder meanwhile. Raises `UserError` where the folder cannot be written
    or another run writes there.

    Args:
        folder: where `metrics.jsonl`, `quick_validation.jsonl`, `runs.json` and `tensorboard/` go.
        num_steps: steps in all.
        start: steps done before; lines of later ones, which will be done again, are dropped.
        about: plain values that describe this start of the run, for `runs.json`.
        track: names of services that are told too (`utils.trackers`).
    """

    def __init__(self, folder, num_steps, start=0, about=None, track=()):
        self.folder = Path(folder)
        self.about, self.track, self.trackers = about or {}, track, []
        self.lock = _lock(self.folder)
        snapshots.remove_unfinished(self.folder)
        self.num_steps = num_steps
        self.first = start
        self.started = time.monotonic()
        self.bar = tqdm(total=num_steps, initial=start, unit="step", dynamic_ncols=True,
                        disable=not sys.stderr.isatty())
        _remember(self.folder / "runs.json", self.about)
        self.files = {name: _continued(self.folder / name, start) for name in (METRICS, QUICK)}
        self.board = Board(self.folder / "tensorboard")

    def __enter__(self):
        self.trackers = start_trackers(self.track, self.folder, self.first > 0, self.about)
        return self

    def __exit__(self, *error):
        self.bar.close()
        for tracker in self.trackers:
            tracker.close(failed=error[0] is not None)
        for file in (*self.files.values(), self.board, self.lock):
            file.close()

    def step(self):
        self.bar.update()

    def metric(self, step, values, seconds):
        """values: {name: number}, with loss, lr, images_per_second, seconds_data among them; seconds: since the
        last time."""
        self._write(METRICS, {"step": step, **values})
        self._numbers(values, step)
        terms = "  ".join(f"{name.removeprefix('loss_')} {value:.3f}" for name, value in values.items()
                          if name.startswith("loss"))
        speed = (f"{values['images_per_second']:.1f} images/s, {100 * values['seconds_data'] / seconds:.0f} % of the "
                 "time waiting for data")
        if self.bar.disable:
            done = step - self.first
            left = (time.monotonic() - self.started) / done * (self.num_steps - step)
            logger.info(f"step {step}/{self.num_steps}  {terms}  lr {values['lr']:.2e}  {speed}  "
                        f"{duration(left)} left")
        else:
            self.bar.set_postfix_str(f"{terms}  lr {values['lr']:.2e}  {speed}")

    def quick_validation(self, step, scores):
        """scores: {head: `ConfusionMatrix.scores`}. Named quick everywhere: it is not the official protocol."""
        values, curves = {"step": step}, {}
        for head, score in scores.items():
            values[f"quick_mean_iou_{head}"] = score["mean_iou"]
            values[f"quick_class_iou_{head}"] = score["class_iou"]
            curves[f"quick_mean_iou/{head}"] = score["mean_iou"] or 0
            curves |= {f"quick_class_iou_{head}/{name}": iou for name, iou in score["class_iou"].items()}
        self._write(QUICK, values)
        self._numbers(curves, step)
        self.say(f"quick validation after step {step} (whole images at scale 1, not the official protocol): mIoU "
                 + ", ".join(f"{head} {100 * (score['mean_iou'] or 0):.2f} %" for head, score in scores.items()))

    def picture(self, name, image, step):
        """image (H, W, 3) uint8."""
        self.board.add(summary.image(name, image, dataformats="HWC"), step)
        for tracker in self.trackers:
            tracker.picture(name, image, step)

    def say(self, text):
        """A line that stays, above the bar."""
        logger.info(text)

    def _numbers(self, values, step):
        """Points of curves; values: {name: number, or None where there is none}."""
        values = {name: value for name, value in values.items() if value is not None}
        for name, value in values.items():
            self.board.add(summary.scalar(name, value), step)
        for tracker in self.trackers:
            tracker.numbers(values, step)

    def _write(self, name, values):
        self.files[name].append((json.dumps(values) + "\n").encode())


class Lines:
    """A file that grows by whole entries. What cannot be written, as on a full disk, is left out, and that is said
    once: a log is not worth a training."""

    def __init__(self, path):
        self.path, self.failed = path, False
        with _as_sentence(path, "a file to write to"):
            self.file = open(path, "ab", buffering=0)  # noqa: SIM115, open as long as the run

    def append(self, entry):
        """entry: bytes."""
        end = os.fstat(self.file.fileno()).st_size
        try:
            if self.file.write(entry) != len(entry):
                raise OSError("no room for the whole entry")
        except OSError as error:
            with contextlib.suppress(OSError):
                self.file.truncate(end)     # half an entry would spoil the next one
            if not self.failed:
                logger.warning(f"{self.path}: expected to write there, found: {error}; training goes on, and what "
                               "does not fit is missing in this file")
            self.failed = True

    def close(self):
        self.file.close()


class Board:
    """A TensorBoard file in a folder, written by this thread: that of `SummaryWriter` dies with a full disk, and
    the run would wait for it forever."""

    def __init__(self, folder):
        with _as_sentence(folder, "a folder to write to"):
            folder.mkdir(parents=True, exist_ok=True)
        self.lines = Lines(folder / f"events.out.tfevents.{int(time.time())}.{platform.node()}.{os.getpid()}")
        self._append(Event(wall_time=time.time(), file_version="brain.Event:2"))

    def add(self, values, step):
        """values: what `tensorboardX.summary` makes."""
        self._append(Event(wall_time=time.time(), step=step, summary=values))

    def _append(self, event):
        """As a TFRecord: length, its checksum, the data, their checksum."""
        data = event.SerializeToString()
        length = struct.pack("<Q", len(data))
        self.lines.append(b"".join((length, struct.pack("<I", masked_crc32c(length)), data,
                                    struct.pack("<I", masked_crc32c(data)))))

    def close(self):
        self.lines.close()


class NoLog:
    """A `RunLog` of which nothing is seen, for all processes but the first."""

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def _nothing(self, *args):
        pass

    step = metric = quick_validation = picture = say = _nothing


def about_this_run(arguments, devices):
    """What one would need to know to repeat a run: command, flags, versions, code, machine; plain values."""
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
    """The entries of a file of JSON lines that have a step; none without the file. What else stands there, such as
    a last line that was cut off, is left out."""
    if not path.exists():
        return []
    with _as_sentence(path, "a text file of JSON lines"):
        text = path.read_text(encoding="utf-8")
    found = []
    for line in text.splitlines():
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict) and type(entry.get("step")) is int:
            found.append(entry)
    return found


def _continued(path, step):
    """A file of JSON lines opened to go on after a step, without lines of later steps."""
    if path.exists():
        found = read_lines(path)
        strange = sum(bool(line.strip()) for line in path.read_text(encoding="utf-8").splitlines()) - len(found)
        if strange > 1:     # a killed run leaves one that is cut off
            logger.info(f"{path}: {strange} lines without a step are left out")
        kept = "".join(json.dumps(line) + "\n" for line in found if line["step"] <= step)
        files.write_atomically(path, lambda file: file.write(kept.encode()))
    return Lines(path)


@contextlib.contextmanager
def _as_sentence(path, expected):
    """Turn what goes wrong with a path of the run's folder into a `UserError`."""
    try:
        yield
    except UnicodeDecodeError:
        raise UserError(f"{path}: expected {expected}, found a binary file") from None
    except OSError as error:
        raise UserError(f"{path}: expected {expected}, found: {error.strerror or error}") from None


def _lock(folder):
    """The folder's lock file, held until it is closed or the process ends. The folder is made."""
    path = folder / ".lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # It follows no link, empties no file that lies there, and does not wait for the other end of a pipe.
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
                                 | getattr(os, "O_NONBLOCK", 0), 0o666), "rb")
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError("not a regular file")
    except OSError as error:
        what = "an ordinary file .lock there" if os.path.lexists(path) else "a folder to write to"
        raise UserError(f"--snapshot-dir {folder}: expected {what}, found: {error}") from None
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(f"--snapshot-dir {folder}: expected a folder to which no other run is writing, found one "
                        "in use") from None
    except OSError:
        pass        # a file system without locks
    return file


def _remember(path, about):
    """Add one start of a run to the list in `runs.json`."""
    before = []
    if os.path.lexists(path):
        with _as_sentence(path, "the list of this folder's runs"):
            text = path.read_text(encoding="utf-8")
        try:
            before = json.loads(text)
        except (ValueError, RecursionError):
            before = None
        if not isinstance(before, list):
            raise UserError(f"{path}: expected the list of this folder's runs, found something else; without the file "
                            "a new list begins")
    files.write_json(path, [*before, about])


def _git(*words):
    """The output of a git command on this code; None outside a checkout, also where an outer folder is one of something
    else."""
    root = Path(__file__).resolve().parents[2]

    def output(*words):
        try:
            done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    top = output("rev-parse", "--show-toplevel")
    return output(*words) if top and Path(top).resolve() == root else None
