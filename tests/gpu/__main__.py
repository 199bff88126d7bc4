"""Prove on a GPU what could only be rehearsed without one, in about ten minutes.

    python -m tests.gpu [--output snapshots/gpu.json] [--sections norms steps ...]
    python -m tests.gpu --rehearse          all of it on the CPU, with tiny sizes: proves that the command runs

Each section runs in a process of its own with a time limit, so that one that fails or hangs does not stop the next;
cheap checks of correctness come first, and after ten minutes no section begins that was not named. Exit status 1 where
a check failed; figures and goals decide nothing. 2 without a GPU.
"""

import argparse
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from utils.common import command, flags
from utils.common.errors import UserError
from utils.common.files import write_json
from utils.devices.driver import unusable_gpu
from utils.runs.log import describe_run

from . import evaluation, fused, losses, norms, several, speed, steps
from .rows import Rows

MINUTES = 10
TINY = {"backbone": "eca_resnet18", "model": "acfnet_resnet"}
# name: time limit in seconds, function(rows, device), what it is called with for a rehearsal.
SECTIONS = {
    "norms": (60, norms.section, {"shape": (4, 8, 9, 7)}),
    "steps": (150, steps.section, {"size": 17, "backbone": "eca_resnet18", "attentive": ("danet",)}),
    "processes": (120, several.section, {"world": 2, "steps": 2, "size": 33, "backbone": "resnet18"}),
    "evaluation": (90, evaluation.section, {"size": (41, 57), "scales": (1.0, 1.5), "model": "acfnet_resnet"}),
    "waits": (60, speed.waits_section, {"size": 17, "window": 17, "backbone": "eca_resnet18"}),
    "speed": (240, speed.section, {"size": 33, "images": 2, "runs": 1, "ways": [speed.IN_PLACE, "bn, bf16"],
                                   "product": 256, **TINY}),
    "fused": (180, fused.section, {"shape": (2, 8, 5, 3), "runs": 1}),
    "loss": (60, losses.section, {"images": 1, "side": 2, "runs": 1, "classes": (3,)}),
    "inference": (90, evaluation.speed_section, {"size": (33, 49), "window": (33, 33), "batch_size": 2, "runs": 1,
                                                 **TINY}),
    "pictures": (90, evaluation.pictures_section, {"size": (64, 128), "window": (33, 33), "images": 2, **TINY}),
    "loader": (60, speed.loader_section, {"size": (64, 128), "crop": (33, 33), "images": 3, "batch": 2,
                                          "batches": 6}),
    "graph": (180, speed.graph_section, {"size": 33, "runs": 1, **TINY}),
    "compiled": (180, speed.compiled_section, {"size": 33, "images": 2, "runs": 1, "product": 256, **TINY}),
}


def about(device):
    """The machine, the driver, the versions and the commit: plain values."""
    actual = describe_run({}, [device])
    driver = Path("/proc/driver/nvidia/version")
    number = re.search(r"Kernel Module.*?\s([\d.]+)\s", driver.read_text()) if driver.exists() else None
    actual |= {"driver": number[1] if number else "unknown", "gpus": torch.cuda.device_count(),
              "processor": platform.machine(), "cores": os.cpu_count()}
    if device.type == "cuda":
        actual["memory_gb"] = torch.cuda.get_device_properties(device).total_memory / 1e9
        actual["capability"] = list(torch.cuda.get_device_capability(device))
        actual["cudnn"] = torch.backends.cudnn.version()
    return actual


def run_here(name, device, rehearsal, path):
    """A section in this process; each row is a line of a file as soon as it is known."""
    torch.manual_seed(0)
    if device.type == "cuda":
        torch.cuda.set_device(device)

    def emit(row):
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    rows = Rows(name, emit)
    if name == "about":
        rows.figure(name, about, device)
    else:
        _, section, tiny = SECTIONS[name]
        section(rows, device, **(tiny if rehearsal else {}))


def run_apart(words, limit, path):
    """`run_here` in a process with a time limit, in seconds: what is wrong with how it ended, or None."""
    with tempfile.TemporaryFile("w+", errors="replace") as spoken:
        process = subprocess.Popen([sys.executable, "-m", "tests.gpu", *words, "--rows", str(path)], text=True,
                                   stdout=subprocess.DEVNULL, stderr=spoken, start_new_session=True)
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            return f"expected an end within {limit} s, found none"
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)      # with what it may have left behind
            except ProcessLookupError:
                pass
            process.wait()
        spoken.seek(0)
        last = next(iter(spoken.read().strip().splitlines()[-1:]), "nothing said")
        return f"expected exit status 0, found {status}: {last[:300]}" if status else None


def examine(name, limit, rehearsal, device):
    """All rows of a section, the last of them a check that it came to its end."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.jsonl")
        words = ["--sections", name, "--device", device, *["--rehearse"] * rehearsal]
        wrong = run_apart(words, limit, path)
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    seconds = time.monotonic() - started
    return [*rows, {"section": name, "kind": "check", "name": "comes to its end", "ok": wrong is None,
                    "found": wrong or f"{seconds:.0f} of {limit} s"}]


def line(row):
    """A row as a line of the table."""
    if row["kind"] == "check":
        mark, words = "ok" if row["ok"] else "FAILED", row["found"]
    elif row["kind"] == "goal":
        mark, words = "met" if row["met"] else "not met", f"goal {row['goal']}, found {row['found']}"
    elif row["kind"] == "note" or "failed" in row:
        mark, words = "", row.get("failed") or row["found"]
    elif row["section"] == "about":
        mark, words = "", (f"{', '.join(row['devices'])}, driver {row['driver']}, CUDA {row['cuda']}, PyTorch "
                           f"{row['versions']['torch']}, {row['gpus']} GPUs, commit {row['git_commit']}")
    else:
        mark, words = "", ", ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                                    for key, value in row.items() if key not in ("section", "kind", "name"))
    return f"{row['section']:<12}{row['name']:<54}{mark:<9}{words}"


def main():
    parser = flags.Parser(description=__doc__)
    parser.add_argument("--output", type=flags.path, default="snapshots/gpu.json", help="(snapshots/gpu.json)")
    parser.add_argument("--sections", nargs="+", choices=[*SECTIONS, "about"])
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--device", help=argparse.SUPPRESS)     # of one section,
    parser.add_argument("--rows", help=argparse.SUPPRESS)       # run in this process
    args = parser.parse_args()
    if args.rows:
        run_here(args.sections[0], torch.device(args.device), args.rehearse, args.rows)
        return
    if not args.rehearse and not torch.cuda.is_available():
        raise UserError(f"tests.gpu: expected a GPU, found {unusable_gpu() or 'none'}; --rehearse runs it on the CPU, "
                        "which proves nothing about one")
    device = "cpu" if args.rehearse else "cuda:0"
    # So that a section, which is in a session of its own, does not outlive this process on the GPU.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    rows, started = [], time.monotonic()
    for name in ("about", *(args.sections or SECTIONS)):
        limit = 120 if name == "about" else SECTIONS[name][0]
        if args.sections is None and time.monotonic() - started > MINUTES * 60:
            actual = [{"section": name, "kind": "note", "name": "left out", "found":
                      f"{MINUTES} minutes are over; --sections {name} runs it"}]
        else:
            actual = examine(name, limit, args.rehearse, device)
        print(*map(line, actual), sep="\n", flush=True)
        rows += actual
        write_json(args.output, {"rehearsal": args.rehearse, "rows": rows})
    failed = [row for row in rows if row["kind"] == "check" and not row["ok"]]
    print(f"{sum(row['kind'] == 'check' for row in rows)} checks, {len(failed)} failed; written to {args.output}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    command.run(main)
