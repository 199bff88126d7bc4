"""What run_local.sh does once it has a Python: a demonstration on drawn streets, or the README's way to a score.

    python -m utils.demo.local FOLDER_OF_THE_USER [CITYSCAPES] [words for train.py]

Started in the project's folder; relative paths are the user's.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from ..common import command, files
from ..common.errors import UserError, plural
from ..common.flags import Parser
from ..runs.log import METRICS, read_lines
from ..runs.snapshots import list_snapshots

PROJECT = Path(__file__).resolve().parents[2]
# The demonstration: scenes to draw, and a training. Its steps decide how long it takes; too short to learn all classes
# of Cityscapes, it learns the seven categories.
SCENES = ("--train", 120, "--val", 30, "--size", "256,512", "--seed", 0)
CLASSES = PROJECT / "dataset/list/cityscapes/categories.csv"
STEPS, BATCH = 400, 4
TRAINING = ("--backbone", "eca_resnet18", "--random-mirror", "--sampling", "class", "--input-size", "97,193",
            "--batch-size", BATCH, "--num-steps", STEPS, "--learning-rate", "4e-2", "--ohem", 1, "--ohem-keep", 10000,
            "--parallel", "none", "--log-every", 10)
SCORING = ("--input-size", "257,513", "--scales", "1.0", "--no-flip")
EXPECTED = "three runs gave coarse 52.5 to 54.7, fine 53.0 to 54.5 %"
SCORING_SHARE = 0.12        # of the time for training
ROOM = 200e6                # bytes: the scenes, a snapshot, pictures
PAPER = ("--random-mirror", "--random-scale", "--learning-rate", "1e-2", "--input-size", "769,769", "--weight-decay",
         "1e-4", "--batch-size", 8, "--num-steps", 60000)
FOLDERS = ("data_dir", "images_dir", "labels_dir")      # flags in whose place the first word stands
# `python -c CHECK PROJECT FLAGS...` asks train.py whether flags can work. sys.path[0] is the user's folder, from which
# Python would import first; and a process of its own gives back what it takes of a GPU.
CHECK = "import sys; sys.path[0] = sys.argv.pop(1); import train; train.command.run(train.parse_and_check)"


def get_parser():
    """Words that concern more than train.py; all others are its own."""
    parser = Parser(add_help=False)
    parser.add_argument("--gpu")
    parser.add_argument("--amp")
    for name in FOLDERS:
        parser.add_argument(f"--{name.replace('_', '-')}")
    parser.add_argument("--data-list", nargs="+")
    parser.add_argument("--classes")
    parser.add_argument("--restore-from", nargs="+", default=[])
    parser.add_argument("--resume", nargs="?", const="newest")
    parser.add_argument("--snapshot-dir")
    parser.add_argument("--num-steps")
    parser.add_argument("--batch-size")
    parser.add_argument("--from-scratch", action="store_true")
    return parser


def flags(args, *names):
    """The words that say again what was said of these flags."""
    words = []
    for name in names:
        value = getattr(args, name.replace("-", "_"))
        if value:
            words += [f"--{name}", *([value] if isinstance(value, str) else value)]
    return words


def scoring_flags(args, *names):
    """`flags` for evaluate.py, which does not know apex: it then takes what suits the device."""
    return flags(args, "gpu", *["amp"] * (args.amp != "apex"), *names)


def call(*words, folder=None, watch=lambda: None):
    """Run a script or module with this Python; ends this process with its status if that is not 0.

    folder: where it runs; None for the user's. watch: called once a second meanwhile.
    """
    process = subprocess.Popen([sys.executable, *map(str, words)], cwd=folder)
    # A terminal sends Ctrl-C to both processes, and the other one decides; what this one alone gets is handed on.
    before = [signal.signal(signal.SIGINT, signal.SIG_IGN),
              signal.signal(signal.SIGTERM, lambda number, frame: process.send_signal(number))]
    try:
        while process.poll() is None:
            watch()
            time.sleep(1)
    finally:
        process.terminate()     # what still runs, if `watch` failed
        process.wait()
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
            signal.signal(number, handler)
    if process.returncode:
        sys.exit(process.returncode if process.returncode > 0 else 128 - process.returncode)


def check_writable(folder):
    """Raise `UserError` at once where hours later nothing could be written. Leaves no folder that was not there."""
    made = [place for place in (folder, *folder.parents) if not os.path.exists(place)]
    probe = folder / ".writable"
    try:
        files.write_atomically(probe, lambda file: file.write(b"?"))
        probe.unlink()
        files.check_room(str(folder), folder, ROOM, "scenes, snapshots and pictures")
    finally:
        with contextlib.suppress(OSError):
            for place in made:
                place.rmdir()


def announce(run, began, steps, batch):
    """A function that says once, from the second measured rate, when all will be done.

    steps, batch: of the training, as text.
    """
    said, before = False, read_lines(run / METRICS)     # of a run that goes on

    def watch():
        nonlocal said
        lines = [] if said else [line for line in read_lines(run / METRICS) if line not in before]
        if len(lines) < 2:
            return
        said, values = True, lines[1]
        left = (int(steps) - values["step"]) * int(batch) / values["images_per_second"] * (1 + SCORING_SHARE)
        print(f"at {values['images_per_second']:.1f} images/s training and scoring take "
              f"{plural(round(left / 60), 'minute')} more, {(left + time.monotonic() - began) / 60:.0f} in all",
              flush=True)

    return watch


def latest_run(demo):
    """The newest run of the demonstration that has a snapshot."""
    found = [run for run in sorted(demo.glob("run_*")) if list_snapshots(run)]
    if not found:
        raise UserError(f"--resume: expected a run with a snapshot in {demo}, found none")
    return found[-1]


def draw(streets, training):
    """Draw the scenes. training: the words for train.py, which are checked before time goes into that."""
    call("-c", CHECK, PROJECT, *training)
    part = streets.with_name("streets.part")
    shutil.rmtree(part, ignore_errors=True)
    call("-m", "dataset.streets", part, *SCENES, folder=PROJECT)
    part.rename(streets)


def demonstrate(args, words):
    """Draw scenes, learn from them, score."""
    began = time.monotonic()
    demo = PROJECT / "demo"
    streets = demo / "streets"
    run = Path(args.snapshot_dir or (latest_run(demo) if args.resume == "newest" else
                                     demo / time.strftime("run_%Y%m%d_%H%M%S"))).absolute()
    print("This is a demonstration: streets that a program draws, an ECA-ResNet18 from random weights.", flush=True)
    check_writable(demo)
    check_writable(run)
    changes = flags(args, "amp", "restore-from", "num-steps", "batch-size") + words
    training = ["--data-dir", streets, "--snapshot-dir", run, *TRAINING, "--classes", args.classes or CLASSES,
                *flags(args, "gpu", "resume"), *changes]
    if not streets.is_dir():
        draw(streets, training)
    call(PROJECT / "train.py", *training,
         watch=announce(run, began, args.num_steps or STEPS, args.batch_size or BATCH))
    last = newest(run)
    call(PROJECT / "evaluate.py", "--data-dir", streets, "--restore-from", last, *SCORING, *scoring_flags(args))
    folder = last.with_name(f"{last.stem}_val")
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    fine = f"fine {100 * result['mean_iou']:.1f} %"
    if "coarse" in result:
        fine = f"coarse {100 * result['coarse']['single_scale']['mean_iou']:.1f} %, {fine}"
    expected = "" if changes or args.classes else f" ({EXPECTED})"
    print(f"\nmIoU of the demonstration: {fine}{expected}")
    print("what fine has more or less is not ACF's alone: its loss weighs more, and only it uses OHEM")
    print(f"look at {folder}/report.html for what went right and wrong, {folder}/overlay/ for all pictures")
    print(f"this took {(time.monotonic() - began) / 60:.1f} minutes")


def find_weights():
    """The one file of weights in dataset/."""
    found = sorted(path for pattern in ("*.pth", "*.pth.tar") for path in (PROJECT / "dataset").glob(pattern))
    if len(found) != 1:
        names = "".join(f"{' ' if number else ': '}dataset/{path.name}" for number, path in enumerate(found))
        raise UserError(f"dataset/: expected one file of backbone weights (*.pth, *.pth.tar), found {len(found)}{names}"
                        "; --restore-from FILE names one, --from-scratch trains without")
    return str(found[0])


def newest(folder):
    """The last snapshot in a folder."""
    found = list_snapshots(folder)
    if not found:
        raise UserError(f"{folder}: expected snapshots of the training, found none")
    return found[-1][1]


def run_for_real(data, args, words):
    """Check the data, train, score."""
    snapshots = Path(args.snapshot_dir or PROJECT / "snapshots").absolute()
    if not args.restore_from and not args.from_scratch:
        args.restore_from = [find_weights()]
    check_writable(snapshots)
    lists = [str(Path(name).absolute()) for name in args.data_list or []]
    check = ["-m", "dataset.check", Path(data).absolute(), "--fast", *(["--data-list", *lists] if lists else []),
             *(["--classes", Path(args.classes).absolute()] if args.classes else [])]
    status = subprocess.run([sys.executable, *map(str, check)], cwd=PROJECT).returncode
    if status == 1:
        raise UserError(f"{data}: expected a data set without faults, found what is WRONG above; train.py and "
                        "evaluate.py can be run all the same")
    if status:
        sys.exit(status)
    call(PROJECT / "train.py", "--data-dir", data, "--snapshot-dir", snapshots, *PAPER, "--resume",
         args.resume or "newest",
         *flags(args, "gpu", "amp", "data-list", "classes", "restore-from", "num-steps", "batch-size"), *words)
    call(PROJECT / "evaluate.py", "--data-dir", data, "--restore-from", newest(snapshots),
         *scoring_flags(args, "data-list", "classes"))


def main():
    stood, *words = sys.argv[1:]
    os.chdir(stood)
    data = words.pop(0) if words and not words[0].startswith("-") else None
    args, words = get_parser().parse_known_args(words)
    if data == "":
        raise UserError("expected the data's folder as the first word, found an empty one")
    for name in FOLDERS if data else (*FOLDERS, "data_list"):
        if getattr(args, name) is not None:
            raise UserError(f"--{name.replace('_', '-')}: expected the data's folder as the first word, found "
                            f"{f'this flag beside {data}' if data else 'none'}")
    if data is None:
        demonstrate(args, words)
    else:
        run_for_real(data, args, words)


if __name__ == "__main__":
    command.run(main)
