"""The program behind run_local.sh: a demonstration on drawn streets, or the README's training and evaluation.

    python -m utils.demo.local FOLDER_OF_THE_USER [CITYSCAPES] [arguments for train.py]

Started in the project's folder; relative paths refer to the folder of the user.
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
from ..runs import recipes
from ..runs.log import METRICS, read_lines
from ..runs.snapshots import list_snapshots

PROJECT = Path(__file__).resolve().parents[2]
# The demonstration: scenes to draw, and a training run. Most of its time goes into the training steps; a run this short
# cannot learn all classes of Cityscapes, so it learns the seven categories.
SCENES = ("--train", 120, "--val", 30, "--size", "256,512", "--seed", 0)
CLASSES = PROJECT / "dataset/list/cityscapes/categories.csv"
STEPS, BATCH = 400, 4
TRAINING = ("--backbone", "eca_resnet18", "--random-mirror", "--sampling", "class", "--input-size", "97,193",
            "--batch-size", BATCH, "--num-steps", STEPS, "--learning-rate", "4e-2", "--parallel", "none", "--log-every",
            10, "--loss", "fine=ce+lovasz,coarse=ce+lovasz")
WEIGHTS = CLASSES.with_name("category_weights.csv")     # for poles and people, which have 1 % of the pixels each
EVALUATION = ("--input-size", "257,513", "--scales", "1.0", "--no-flip")
EXPECTED = "two runs gave coarse 56.1 and 57.1, fine 56.7 and 57.3 %"
EVALUATION_SHARE = 0.12     # time of the evaluation as a share of that of the training
NEEDED_BYTES = 200e6        # on the disk, for the scenes, a snapshot and pictures
PAPER = f"@{PROJECT / 'dataset/recipes/cityscapes.txt'}"
FOLDERS = ("data_dir", "images_dir", "labels_dir")      # flags that the first argument replaces
# `python -c CHECK PROJECT FLAGS...` lets train.py check its flags. Python sets sys.path[0] to the user's folder, which
# must not be searched for modules. The check is a process of its own so that it releases the GPU memory it uses.
CHECK = "import sys; sys.path[0] = sys.argv.pop(1); import train; train.command.run(train.parse_and_check)"


def get_parser():
    """The flags that concern more than train.py; all others are passed on to it."""
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
    """Turn the parsed values of these flags back into command-line arguments."""
    arguments = []
    for name in names:
        value = getattr(args, name.replace("-", "_"))
        if value:
            arguments += [f"--{name}", *([value] if isinstance(value, str) else value)]
    return arguments


def evaluation_flags(args, *names):
    """`flags` for evaluate.py. It does not support apex: --amp is then left to its default for the device."""
    return flags(args, "gpu", *["amp"] * (args.amp != "apex"), *names)


def call(*arguments, folder=None, watch=lambda: None):
    """Run Python with these arguments; if it fails, end this process with its exit status.

    Args:
        arguments: script or module, and its own arguments.
        folder: working folder; None for the user's.
        watch: called once per second while the process runs.
    """
    process = subprocess.Popen([sys.executable, *map(str, arguments)], cwd=folder)
    # A terminal sends Ctrl-C to both processes, and the child decides what to do. SIGTERM may be sent to this process
    # only, so it is forwarded.
    before = [signal.signal(signal.SIGINT, signal.SIG_IGN),
              signal.signal(signal.SIGTERM, lambda number, frame: process.send_signal(number))]
    try:
        while process.poll() is None:
            watch()
            time.sleep(1)
    finally:
        process.terminate()     # still runs if `watch` failed
        process.wait()
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
            signal.signal(number, handler)
    if process.returncode:
        sys.exit(process.returncode if process.returncode > 0 else 128 - process.returncode)


def check_writable(folder):
    """Raise `UserError` if results cannot be written to a folder, rather than hours later.

    Folders created for the check are removed.
    """
    created = [parent for parent in (folder, *folder.parents) if not os.path.exists(parent)]
    probe = folder / ".writable"
    try:
        files.write_atomically(probe, lambda file: file.write(b"?"))
        probe.unlink()
        files.check_room(str(folder), folder, NEEDED_BYTES, "scenes, snapshots and pictures")
    finally:
        with contextlib.suppress(OSError):
            for parent in created:
                parent.rmdir()


def time_left_reporter(run, began, steps, batch):
    """Make a function that prints once, from the second measured rate, when training and evaluation will be done.

    Args:
        run: folder of the training run.
        began: `time.monotonic()` at the start.
        steps, batch: number of steps and batch size, as numbers or text.
    """
    printed, earlier = False, read_lines(run / METRICS)     # lines from before a run was resumed

    def watch():
        nonlocal printed
        lines = [] if printed else [line for line in read_lines(run / METRICS) if line not in earlier]
        if len(lines) < 2:
            return
        printed, values = True, lines[1]
        left = (int(steps) - values["step"]) * int(batch) / values["images_per_second"] * (1 + EVALUATION_SHARE)
        print(f"at {values['images_per_second']:.1f} images/s training and scoring take "
              f"{plural(round(left / 60), 'minute')} more, {(left + time.monotonic() - began) / 60:.0f} in all",
              flush=True)

    return watch


def latest_run(demo):
    """The folder of the newest demonstration run that has a snapshot."""
    runs = [run for run in sorted(demo.glob("run_*")) if list_snapshots(run)]
    if not runs:
        raise UserError(f"--resume: expected a run with a snapshot in {demo}, found none")
    return runs[-1]


def draw(streets, training):
    """Draw the scenes; training: arguments for train.py, which are checked before the drawing takes time."""
    call("-c", CHECK, PROJECT, *training)
    part = streets.with_name("streets.part")
    shutil.rmtree(part, ignore_errors=True)
    call("-m", "dataset.streets", part, *SCENES, folder=PROJECT)
    part.rename(streets)


def demonstrate(args, rest):
    """Draw scenes, train on them, evaluate; rest: further arguments for train.py."""
    began = time.monotonic()
    demo = PROJECT / "demo"
    streets = demo / "streets"
    run = Path(args.snapshot_dir or (latest_run(demo) if args.resume == "newest" else
                                     demo / time.strftime("run_%Y%m%d_%H%M%S"))).absolute()
    print("This is a demonstration: streets that a program draws, an ECA-ResNet18 from random weights.", flush=True)
    check_writable(demo)
    check_writable(run)
    changes = flags(args, "amp", "restore-from", "num-steps", "batch-size") + rest
    training = ["--data-dir", streets, "--snapshot-dir", run, *TRAINING, "--classes", args.classes or CLASSES,
                *([] if args.classes else ["--class-weights", WEIGHTS]),
                *flags(args, "gpu", "resume"), *changes]
    if not streets.is_dir():
        draw(streets, training)
    call(PROJECT / "train.py", *training,
         watch=time_left_reporter(run, began, args.num_steps or STEPS, args.batch_size or BATCH))
    snapshot = newest_snapshot(run)
    call(PROJECT / "evaluate.py", "--data-dir", streets, "--restore-from", snapshot, *EVALUATION,
         *evaluation_flags(args))
    folder = snapshot.with_name(f"{snapshot.stem}_val")
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    scores = f"fine {100 * result['mean_iou']:.1f} %"
    if "coarse" in result:
        scores = f"coarse {100 * result['coarse']['single_scale']['mean_iou']:.1f} %, {scores}"
    expected = "" if changes or args.classes else f" ({EXPECTED})"
    print(f"\nmIoU of the demonstration: {scores}{expected}")
    print("the difference is not due to ACF alone: the fine loss has a larger weight")
    print(f"see {folder}/report.html for what went right and wrong, {folder}/overlay/ for all pictures")
    print(f"this took {(time.monotonic() - began) / 60:.1f} minutes")


def find_weights():
    """The only file of weights in dataset/. Raises `UserError` if there is none or several."""
    paths = sorted(path for pattern in ("*.pth", "*.pth.tar") for path in (PROJECT / "dataset").glob(pattern))
    if len(paths) != 1:
        names = "".join(f"{' ' if number else ': '}dataset/{path.name}" for number, path in enumerate(paths))
        raise UserError(f"dataset/: expected one file of backbone weights (*.pth, *.pth.tar), found {len(paths)}{names}"
                        "; --restore-from FILE names one, --from-scratch trains without weights")
    return str(paths[0])


def newest_snapshot(folder):
    """The path of the newest snapshot in a folder. Raises `UserError` if there is none."""
    snapshots = list_snapshots(folder)
    if not snapshots:
        raise UserError(f"{folder}: expected snapshots of the training, found none")
    return snapshots[-1][1]


def train_and_evaluate(data, args, rest):
    """Check the user's data set, train, evaluate; rest: further arguments for train.py."""
    snapshots = Path(args.snapshot_dir or PROJECT / "snapshots").absolute()
    if not args.restore_from and not args.from_scratch:
        args.restore_from = [find_weights()]
    check_writable(snapshots)
    lists = [str(Path(name).absolute()) for name in args.data_list or []]
    table = args.classes        # a file, or the name of a known data set
    if table and (os.path.basename(table) != table or "." in table or os.path.isfile(table)):
        table = Path(table).absolute()
    check = ["-m", "dataset.check", Path(data).absolute(), "--fast", *(["--data-list", *lists] if lists else []),
             *(["--classes", table] if table else [])]
    status = subprocess.run([sys.executable, *map(str, check)], cwd=PROJECT).returncode
    if status == 1:
        raise UserError(f"{data}: expected a data set without errors, found those marked WRONG above; train.py and "
                        "evaluate.py can still be run by hand")
    if status:
        sys.exit(status)
    call(PROJECT / "train.py", "--data-dir", data, "--snapshot-dir", snapshots, PAPER, "--resume",
         args.resume or "newest",
         *flags(args, "gpu", "amp", "data-list", "classes", "restore-from", "num-steps", "batch-size"), *rest)
    call(PROJECT / "evaluate.py", "--data-dir", data, "--restore-from", newest_snapshot(snapshots),
         *evaluation_flags(args, "data-list", "classes"))


def main():
    user_folder, *arguments = sys.argv[1:]
    os.chdir(user_folder)
    arguments = [*recipes.expand(arguments)]
    data = arguments.pop(0) if arguments and not arguments[0].startswith("-") else None
    args, rest = get_parser().parse_known_args(arguments)
    if data == "":
        raise UserError("expected the data's folder as the first argument, found an empty one")
    for name in FOLDERS if data else (*FOLDERS, "data_list"):
        if getattr(args, name) is not None:
            raise UserError(f"--{name.replace('_', '-')}: expected the data's folder as the first argument, found "
                            f"{f'this flag beside {data}' if data else 'none'}")
    if data is None:
        demonstrate(args, rest)
    else:
        train_and_evaluate(data, args, rest)


if __name__ == "__main__":
    command.run(main)
