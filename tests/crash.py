"""Kill a training run again and again, resume it each time, and compare its end with an undisturbed run's.

    python -m tests.crash [--kills 100] [--steps 24] [--seed 0] [--folder DIR]

Runs are `train.main` in forked processes, ended by SIGKILL: the first and then every third while a snapshot is being
written (its temporary file lies there, unfinished, after the kill), the others at a random moment. A run that gets to
its end is compared, tensor by tensor, and another one begins. Exit status 1 if anything differs.
"""

import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

import train
from dataset.streets import write_dataset
from utils.common import files, flags
from utils.runs.log import read_lines


def words(data, folder, steps):
    return ["--data-dir", str(data), "--snapshot-dir", str(folder), "--gpu", "cpu", "--backbone", "eca_resnet18",
            "--model", "acfnet_resnet", "--input-size", "33,33", "--batch-size", "2", "--num-workers", "0", "--amp",
            "off", "--num-steps", str(steps), "--save-pred-every", "2", "--log-every", "1", "--keep", "3",
            "--random-mirror", "--random-scale", "--resume", "--panel-every", "1000"]


def start(data, folder, steps):
    """`train.main` in a new process; returns its id. Torch was imported, but has not computed, before the fork."""
    pid = os.fork()
    if pid:
        return pid
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    torch.set_num_threads(1)
    status = 1
    try:
        train.main(words(data, folder, steps))
        status = 0
    except BaseException as error:  # noqa: BLE001, told and turned into a status
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    finally:
        os._exit(status)


def unfinished(folder):
    return list(folder.glob(".CS_scenes_*.tmp"))


def disturb(pid, folder, in_writing, rng, longest):
    """Kill a run. Returns how it ended: "done", "killed", or "killed while writing"."""
    until = time.monotonic() + (60 if in_writing else rng.uniform(0, longest))
    while time.monotonic() < until:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            if status:
                sys.exit(f"a run ended with status {status}")
            return "done"
        if in_writing and unfinished(folder):
            os.kill(pid, signal.SIGSTOP)
            os.waitpid(pid, os.WUNTRACED)
            if unfinished(folder):      # it may have been finished before the run stopped
                break
            os.kill(pid, signal.SIGCONT)
        time.sleep(0.0005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "killed while writing" if unfinished(folder) else "killed"


def same(a, b):
    """Whether two snapshots' contents are equal to the bit, but for the folders in their configurations."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a if key != "snapshot_dir")
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def main():
    parser = flags.Parser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--steps", type=int, default=24, help="of each run (default: 24)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="where to work; default: a temporary one")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        folder = Path(folder)
        write_dataset(folder / "streets", train=5, val=1, size=(64, 128), seed=3, workers=1)
        began = time.monotonic()
        if disturb(start(folder / "streets", folder / "undisturbed", args.steps), folder, False, rng, 1e9) != "done":
            sys.exit("the undisturbed run did not end")
        longest = (time.monotonic() - began) / 2
        expected = files.load(folder / "undisturbed" / f"CS_scenes_{args.steps}.pth")
        kills, writing, rounds, attempt = 0, 0, 0, folder / "disturbed"
        while kills < args.kills or rounds == 0:
            more = kills < args.kills
            ended = disturb(start(folder / "streets", attempt, args.steps), attempt, more and kills % 3 == 0, rng,
                            longest if more else 1e9)
            kills += ended != "done"
            writing += ended == "killed while writing"
            if ended == "done":
                if not same(expected, files.load(attempt / f"CS_scenes_{args.steps}.pth")):
                    sys.exit(f"after {kills} kills the end differs from the undisturbed run's")
                steps = [line["step"] for line in read_lines(attempt / "metrics.jsonl")]
                if steps != list(range(1, args.steps + 1)):
                    sys.exit(f"after {kills} kills metrics.jsonl holds the steps {steps}")
                rounds += 1
                shutil.rmtree(attempt)
    print(f"{kills} kills, {writing} of them while a snapshot was being written; {rounds} runs came to their end, "
          "each equal to the bit to the undisturbed one")


if __name__ == "__main__":
    main()
