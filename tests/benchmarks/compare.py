r"""Models trained alike: scores, differences and costs in one table.

    python -m tests.benchmarks.compare DATA --models fcn,deeplabv3,ccnet,ccnet+acf,acfnet --seeds 3 --steps 3000 \
        [--data-list DATA/train.lst --val-list DATA/val.lst --classes DATA/classes.csv] [any flag of train.py]

    python -m tests.benchmarks.compare CITYSCAPES --paper --restore-from dataset/WEIGHTS.pth [--gpu 0,1,2,3]

The second one trains ACFNet once by the paper's settings and scores it by the paper's protocol; paper.txt then has the
published settings and figures beside those here, of each class too. Any of its flags can be changed: --steps 3000.

DATA is train.py's --data-dir; --images-dir and --labels-dir stand in its place. `ccnet+acf` is --model ccnet --acf.
Every run is a `python train.py`, then a `python evaluate.py` on --val-list or --val-split, in --output-dir/MODEL_seedS
with what they said in log.txt. The seed fixes the samples, so models of one seed see the same ones in the same order.
With --gpu 0,1,2,3 each GPU takes the next run. The same command goes on where it was stopped, also with more models or
seeds. table.txt, table.csv and scores.png lie in --output-dir.

Intervals are Student's, 95 %, of the mean over the seeds. MACs are those of one window (one image with --whole);
kept bytes those for the backward pass, of two crops of at most 257×257; images/s and the time of evaluation, from the
image to its labels, are medians, the latter of one image on one device after all runs.
"""

import argparse
import csv
import functools
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median, stdev

import torch

import evaluate
import train
from dataset.cityscapes import CityscapesDataset
from dataset.folders import check_validation, data_root
from networks.build import MODELS, build_network, meta_network
from networks.predictor import load_network, sliding_predictor
from tests.benchmarks import paper
from tests.benchmarks.macs import count
from tests.benchmarks.memory import NoConvolutions, kept_bytes
from utils.common import files, flags
from utils.common.command import Interrupted, StopRequest, run
from utils.common.errors import UserError
from utils.demo.local import FOLDERS
from utils.devices.precision import best_precision, exact_float32
from utils.devices.select import device_name, select_devices
from utils.imaging.decode import read_image
from utils.imaging.draw import write_picture
from utils.inference.timing import MAX_RUNS, MAX_SECONDS, time_calls
from utils.ops.upsampling import round_size
from utils.reports.charts import chart, new_figure
from utils.runs import snapshots
from utils.runs.log import METRICS, RUNS, read_lines, read_runs

PROJECT = Path(__file__).resolve().parents[2]
RESULT = "result/result.json"
BASE = "deeplabv3"      # what others are compared with, if it is there
# Student's t for 95 %, by the number of values: 2 to 30.
T_95 = dict(enumerate((12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
                       2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052,
                       2.048, 2.045), start=2))
# Flags of train.py that this command sets itself, and by what.
SET = {"data_dir": "by its first word", "model": "by --models", "acf": "by --models NAME+acf", "gpu": "by --gpu",
       "random_seed": "by --seeds", "num_steps": "by --steps", "snapshot_dir": "by --output-dir", "resume": "always"}
# Flags that may change before the same command goes on: they say how, not what.
FREE = {*SET, "num_workers", "cache", "parallel", "val_every", "save_pred_every", "keep", "log", "log_every",
        "panel_every"} - {"data_dir"}
LARGEST_CROP = 257      # pixels a side, for counting kept bytes


@dataclass(frozen=True)
class Variant:
    """A line of the table: its name, words for train.py, and the scripts, as words for Python."""

    name: str
    words: tuple
    train: tuple = (str(PROJECT / "train.py"),)
    evaluate: tuple = (str(PROJECT / "evaluate.py"),)

    @property
    def stem(self):
        """Its name in the names of files."""
        return self.name.replace(", ", "_").replace(" ", "_")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What is compared on what.

    Attributes:
        variants: lines of the table.
        base: name of the one that others are compared with.
        seeds, steps: their numbers.
        words: of train.py, for all runs.
        protocol: words of evaluate.py that say how an image is predicted.
        folder: of all runs and of the table.
        paper: whether the paper's figures are shown beside the measured ones.
    """

    variants: tuple
    base: str
    seeds: int
    steps: int
    words: tuple
    protocol: tuple
    folder: Path
    paper: bool = False

    @functools.cached_property
    def args(self):
        """The flags of train.py, of all runs."""
        return train.get_parser().parse_args(self.words)

    @property
    def amp(self):
        """Mixed precision of evaluation, which knows no apex; None for the best of the device."""
        return None if self.args.amp == "apex" else self.args.amp

    @property
    def root(self):
        """Where the data are, as of `data_root`. Raises `UserError`."""
        return data_root(*(getattr(self.args, name) for name in FOLDERS))

    def validation_data(self):
        """What is scored."""
        return CityscapesDataset(self.root, self.args.val_split, self.args.val_list, self.args.classes)

    def run_folder(self, variant, seed):
        return self.folder / f"{variant.stem}_seed{seed}"

    def snapshot(self, variant, seed):
        return self.run_folder(variant, seed) / snapshots.NAME.format(step=self.steps)

    def training_words(self, variant, seed, gpu="cpu"):
        """What train.py is told."""
        return [*self.words, *variant.words, "--random-seed", str(seed), "--num-steps", str(self.steps),
                "--snapshot-dir", str(self.run_folder(variant, seed)), "--resume", "--gpu", gpu]

    def scoring_words(self, variant, seed, gpu="cpu"):
        """What evaluate.py is told."""
        args = self.args
        given = {**{f"--{name.replace('_', '-')}": getattr(args, name) for name in FOLDERS},
                 **({"--data-list": args.val_list} if args.val_list else {"--split": args.val_split}),
                 "--classes": args.classes, "--num-workers": args.num_workers, "--amp": self.amp}
        return [*(str(word) for pair in given.items() if pair[1] is not None for word in pair), *self.protocol,
                "--restore-from", str(self.snapshot(variant, seed)), "--output-dir",
                str((self.run_folder(variant, seed) / RESULT).parent), "--save", "none", "--overwrite", "--gpu", gpu]

    def command(self, variant, seed, gpu):
        """Words for Python that take a run on, from what lies in its folder; None where it is finished."""
        if (self.run_folder(variant, seed) / RESULT).exists():
            return None
        if self.snapshot(variant, seed).exists():
            return [*variant.evaluate, *self.scoring_words(variant, seed, gpu)]
        return [*variant.train, *self.training_words(variant, seed, gpu)]

    def result(self, variant, seed):
        """What evaluate.py wrote of a run; None before."""
        path = self.run_folder(variant, seed) / RESULT
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def published(self):
        """The table of `paper.table`; "" unless --paper asks for it and a run of its model is finished."""
        runs = [(variant, seed) for variant in self.variants for seed in range(self.seeds)
                if self.paper and variant.name == paper.MODEL and self.result(variant, seed)]
        if not runs:
            return ""
        training = read_runs(self.run_folder(*runs[0]) / RUNS)[-1]["arguments"]
        return paper.table([self.result(*run) for run in runs], training)

    def stage(self, variant, seed):
        """How far a run is, in words."""
        lines = read_lines(self.run_folder(variant, seed) / METRICS)
        if self.snapshot(variant, seed).exists():
            return "scoring"
        return f"step {lines[-1]['step']}/{self.steps}, loss {lines[-1]['loss']:.3f}" if lines else "starting"


def run_all(comparison, gpus, every=60.0):
    """Train and score what is left, seed by seed, one run at a time on each of `gpus`: words for --gpu.

    every: seconds between lines that tell how the runs get on. Returns the exit statuses of runs that failed; a request
    to stop is passed on to those at work, and raises `command.Interrupted` when they have saved.
    """
    waiting = deque((variant, seed) for seed in range(comparison.seeds) for variant in comparison.variants)
    failed, working, received, output = [], [], False, time.monotonic()
    with StopRequest() as stop:
        workers = [work(comparison, waiting, gpu, stop, failed) for gpu in gpus]
        try:
            while working := [pair for worker in workers if (pair := next(worker, None))]:
                if stop.requested and not received:
                    received = True
                    for _, process in working:
                        process.send_signal(stop.number)
                if time.monotonic() - output > every:
                    output = time.monotonic()
                    for run, _ in working:
                        say(run, comparison.stage(*run))
                time.sleep(0.1)
        finally:        # asked twice, or an error here
            for _, process in working:
                process.kill()
                process.wait()
    if stop.requested:
        print("stopped; the same command goes on", flush=True)
        raise Interrupted(stop.number)
    return failed


def work(comparison, waiting, gpu, stop, failed):
    """What one device does: it takes run after run from a deque, trains and scores it. Yields (run, process) as long as
    a process is at work; statuses of those that failed go to a list."""
    while waiting and not stop.requested:
        run = waiting.popleft()
        while not stop.requested and (command := comparison.command(*run, gpu)):
            say(run, f"{comparison.stage(*run)}, on {gpu}")
            process = start(command, comparison.run_folder(*run))
            while process.poll() is None:
                yield run, process
            if process.returncode and not stop.requested:
                failed.append(process.returncode)
                say(run, last_words(comparison.run_folder(*run), process.returncode), file=sys.stderr)
                break
            if result := comparison.result(*run):
                say(run, f"mIoU {100 * result['mean_iou']:.2f} %")


def start(command, folder):
    """A Python with these words, which speaks into the run's log.txt. It hears signals from this process alone: a
    terminal would send Ctrl-C to both."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log.txt", "ab") as log:
        return subprocess.Popen([sys.executable, *command], stdin=subprocess.DEVNULL, stdout=log,
                                stderr=subprocess.STDOUT, start_new_session=True)


def say(run, text, file=None):
    variant, seed = run
    print(f"{variant.name}, seed {seed}: {text}", file=file or sys.stdout, flush=True)


def last_words(folder, status):
    """Why a run ended early, as far as its log tells."""
    path = folder / "log.txt"
    error = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines()
             if line.startswith("error: ")]
    reason = error[-1].removeprefix("error: ") if status == 2 and error else (
        f"ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}")
    return f"failed, {reason}; see {path}; the other runs go on"


def interval(values):
    """Mean and half of its 95 % interval; None with one value."""
    if len(values) < 2:
        return mean(values), None
    return mean(values), T_95[len(values)] * stdev(values) / math.sqrt(len(values))


def find_costs(comparison, device):
    """{name: what a network costs} of every variant of which a run is finished; counted once, and kept in a file."""
    actual, image = {}, None
    for variant in comparison.variants:
        seed = next((seed for seed in range(comparison.seeds) if comparison.result(variant, seed)), None)
        if seed is None:
            continue
        path = comparison.folder / f"{variant.stem}.json"
        if not path.exists():
            if image is None:
                image = read_image(comparison.validation_data().pairs[0][0])
            say((variant, seed), "counting and timing")
            files.write_json(path, cost(comparison, comparison.snapshot(variant, seed), image, device))
        actual[variant.name] = json.loads(path.read_text(encoding="utf-8"))
    return actual


def cost(comparison, path, image, device):
    """Parameters, MACs, kept bytes per pixel and milliseconds for an image (H, W, 3), of a snapshot's network."""
    scoring = evaluate.get_parser().parse_args([*comparison.protocol, "--restore-from", str(path)])
    args, amp = comparison.args, comparison.amp or best_precision(device)
    exact_float32(amp, device)
    protocol = replace(evaluate.protocol_of(scoring), amp=amp)
    network, config = load_network(path, device, scoring.raw_weights)
    predictor = sliding_predictor(network, config, device, protocol)
    seconds = time_calls(lambda: predictor.labels(image).cpu(), device, MAX_RUNS, MAX_SECONDS)
    size = tuple(image.shape[:2])
    if predictor.window is not None:
        size = tuple(map(min, predictor.window, round_size(size, predictor.grid)))
    parameters, macs = (sum(column) for column in zip(*count(meta_network(**config.network), size).values(),
                                                      strict=True))
    return {"parameters": parameters, "macs": macs, "macs_size": list(size),
            "kept_bytes_a_pixel": kept_a_pixel(config, args.recompute, args.freeze, amp),
            "evaluation_ms": 1000 * median(seconds), "image_size": list(image.shape[:2]),
            "device": device_name(device)}


def kept_a_pixel(config, recompute, freeze, amp):
    """Bytes kept for the backward pass, a pixel of the input. Convolutions are not computed, which keeps the same."""
    network = build_network(**config.network, recompute=recompute)
    for module in network.backbone.first_stages(freeze):
        module.requires_grad_(False).eval()
    images = torch.randn(2, 3, *(min(LARGEST_CROP, length) for length in config.input_size))
    with NoConvolutions():
        parts, _ = kept_bytes(network, images, torch.bfloat16 if amp in ("bf16", "fp16") else None)
    return sum(parts.values()) / images[:, 0].numel()


def make_rows(comparison, costs):
    """The table as dicts, one a variant with a finished run. Scores are fractions; what ends in _95 is half of an
    interval, None with one seed."""
    results = {variant.name: {seed: scores(result) for seed in range(comparison.seeds)
                              if (result := comparison.result(variant, seed))} for variant in comparison.variants}
    rows = []
    for variant in comparison.variants:
        own, base = results[variant.name], results[comparison.base]
        if not own:
            continue
        columns = {"mean_iou": [fine for fine, _ in own.values()],
                   "coarse_mean_iou": [coarse for _, coarse in own.values() if coarse is not None],
                   "difference": [own[seed][0] - base[seed][0] for seed in own
                                  if seed in base and variant.name != comparison.base]}
        row = {"model": variant.name, "seeds": len(own), "steps": comparison.steps}
        for name, values in columns.items():
            row[name], row[f"{name}_95"] = interval(values) if values else (None, None)
        rates = [line["images_per_second"] for seed in own
                 for line in read_lines(comparison.run_folder(variant, seed) / METRICS)[1:]]
        rows.append(row | {"difference_to": comparison.base,
                           "images_per_second": median(rates) if rates else None} | costs[variant.name])
    return rows


def scores(result):
    """Mean IoU of the fine and of the coarse head, None without one, in the richest protocol of a `result.json`."""
    protocol = "multi_scale" if "multi_scale" in result else "single_scale"
    return result["mean_iou"], result["coarse"][protocol]["mean_iou"] if "coarse" in result else None


def as_text(rows, comparison):
    """The table for people; scores in per cent."""
    def score(row, name):
        if row[name] is None:
            return ""
        half = row[f"{name}_95"]
        return f"{100 * row[name]:.2f}" + (f" ± {100 * half:.2f}" if half is not None else "")

    def number(value, unit):
        return "" if value is None else f"{value / unit:.{2 if value / unit < 10 else 1}f}"

    columns = {"": [row["model"] for row in rows], "seeds": [str(row["seeds"]) for row in rows],
               "fine": [score(row, "mean_iou") for row in rows],
               "coarse": [score(row, "coarse_mean_iou") for row in rows],
               f"fine − {comparison.base}": [score(row, "difference") for row in rows]}
    for title, name, unit in (("parameters, M", "parameters", 1e6), ("MACs, G", "macs", 1e9),
                              ("training, images/s", "images_per_second", 1),
                              ("kept, KB per pixel", "kept_bytes_a_pixel", 1e3),
                              ("evaluation, ms", "evaluation_ms", 1)):
        columns[title] = [number(row[name], unit) for row in rows]
    lines = ["" for _ in range(len(rows) + 1)]
    for title, cells in columns.items():
        wide = max(map(len, [title, *cells]))
        lines = [line + (f"{cell:>{wide}}   " if title else f"{cell:<{wide}}   ")
                 for line, cell in zip(lines, [title, *cells], strict=True)]
    window, image = ("×".join(map(str, rows[0][name])) for name in ("macs_size", "image_size"))
    intervals = ", ± half of the 95 % interval" if any(row["mean_iou_95"] is not None for row in rows) else ""
    devices = " and ".join(dict.fromkeys(row["device"] for row in rows))
    lines.append(f"mean IoU in per cent after {comparison.steps} steps{intervals}; differences of the same seeds; MACs "
                 f"of a window of {window}; evaluation of an image of {image} on {devices}")
    return "\n".join(line.rstrip() for line in lines)


def as_csv(rows):
    """The table for programs; sizes are HEIGHTxWIDTH."""
    file = io.StringIO()
    writer = csv.DictWriter(file, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: "x".join(map(str, value)) if isinstance(value, list) else value
                      for name, value in row.items()} for row in rows)
    return file.getvalue()


def check(comparison, gpu):
    """Refuse what cannot work before hours go into it, and to go on in the folder of another comparison."""
    args = comparison.args
    check_validation(comparison.root, args.data_list, args.val_list, args.val_split, "scoring")
    for variant in comparison.variants:
        _, root, _, classes, _ = train.parse_and_check(comparison.training_words(variant, 0, gpu))
    evaluate.check(evaluate.get_parser().parse_args(comparison.scoring_words(variant, 0, gpu)))
    CityscapesDataset(root, args.split, args.data_list, classes), comparison.validation_data()
    requested = {name: os.path.abspath(value) if name in FOLDERS and value else value
                 for name, value in vars(args).items() if name not in FREE}
    requested |= {"steps": comparison.steps, "protocol": comparison.protocol}
    requested = json.loads(json.dumps(requested))
    path = comparison.folder / "compare.json"
    if path.exists():
        try:
            before = dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError):
            raise UserError(f"{path}: expected the flags of a comparison, found something else") from None
        for name, value in requested.items():
            if before.get(name, value) != value:
                raise UserError(f"--output-dir {comparison.folder}: expected a comparison with the same "
                                f"{name.replace('_', '-')}, found {before[name]} there and {value} here; another "
                                "folder begins another one")
    files.write_json(path, requested)


def compare(comparison, devices):
    """Run what is left, write table and picture, and print the table. Ends the process with status 2 if runs failed by
    the user's input, and 1 if by anything else."""
    gpus = [str(device.index) if device.type == "cuda" else "cpu" for device in devices]
    check(comparison, gpus[0])
    failed = run_all(comparison, gpus)
    rows = make_rows(comparison, find_costs(comparison, devices[0]))
    if rows:
        text, folder = as_text(rows, comparison), comparison.folder
        contents = {"table.txt": f"{text}\n", "table.csv": as_csv(rows)}
        published = comparison.published()
        if published:
            text, contents["paper.txt"] = f"{text}\n\n{published}", f"{published}\n"
        for name, content in contents.items():
            files.write_atomically(folder / name, lambda file, content=content: file.write(content.encode()))
        scores_by_time(folder / "scores.png", rows)
        print(text)
    if failed:
        sys.exit(2 if set(failed) == {2} else 1)


def models(text):
    """Flag type: names of models, +acf behind those that shall have the ACF head → `Variant`s."""
    actual = []
    for name in flags.words(text):
        model, plus, _ = name.partition("+acf")
        if model not in MODELS or name != model + plus:
            raise argparse.ArgumentTypeError(f"expected models of {', '.join(MODELS)}, with or without +acf, found "
                                             f"{name!r:.60}")
        actual.append(Variant(name, ("--model", model, *["--acf"] * bool(plus))))
        if actual.count(actual[-1]) > 1:
            raise argparse.ArgumentTypeError(f"expected every model once, found {name} twice")
    if not actual:
        raise argparse.ArgumentTypeError("expected models, found none")
    return tuple(actual)


def get_parser():
    """Of all but DATA and the flags of train.py, whose values only train.py can tell from DATA."""
    parser = flags.Parser(description=__doc__, usage="%(prog)s [DATA] --models NAME,... --steps STEPS [flags of this "
                          "command and of train.py]")
    parser.add_argument("--paper", action="store_true", help="the paper's settings and protocol, and its figures "
                        f"beside those here; by default with --models {paper.MODEL}, --seeds 1, --steps {paper.STEPS}")
    parser.add_argument("--models", type=models, metavar="NAME,...")
    parser.add_argument("--seeds", type=flags.positive(int, max(T_95)), help="runs of each model (3)")
    parser.add_argument("--steps", type=flags.positive(int), help="of each run")
    parser.add_argument("--gpu", help="ids such as 0,1, each of which takes the next run, or cpu; default: all visible "
                        "GPUs, else the CPU")
    parser.add_argument("--output-dir", type=flags.path, default="runs/compare", help="(runs/compare)")
    evaluate.add_protocol(parser.add_argument_group("protocol, as in evaluate.py"), "--window", (1.0,), flip=False)
    return parser


def parse_args(argv):
    """Flags of `get_parser`, and the others, which are for train.py."""
    parser = get_parser()
    defaults = {"seeds": 3}
    if "--paper" in argv:
        defaults = {"models": models(paper.MODEL), "seeds": 1, "steps": paper.STEPS,
                    "scales": evaluate.PAPER_SCALES, "flip": True}
    parser.set_defaults(**defaults)
    args, words = parser.parse_known_args(argv)
    for name in ("models", "steps"):
        if getattr(args, name) is None:
            raise UserError(f"--{name}: expected with this command, unless --paper is given, found none")
    return args, [*paper.words(), *words] if args.paper else words


def for_all(data, words, steps, gpus=1):
    """Words of train.py for every run of so many steps, on a folder or what the words name; so many `gpus` share the
    machine's cores. Raises `UserError` where one is of a flag that this command sets itself."""
    given = train.get_parser().parse_args(words, argparse.Namespace(**{name: None for name in SET}))
    for name in SET:
        if getattr(given, name) is not None:
            raise UserError(f"--{name.replace('_', '-')}: expected a flag of train.py that holds for all runs, found "
                            f"one that this command sets itself, {SET[name]}")
    # Speed needs several lines, however few the steps; and the newest snapshot of each run is enough.
    few = ["--log-every", str(max(1, min(10, steps // 10))), "--keep", "1"]
    cores = ["--num-workers", str(max(1, min(8, os.cpu_count() // gpus - 1)))] if gpus > 1 else []
    return (*(["--data-dir", data] if data else []), *few, *cores, *words)


def main(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    data = argv.pop(0) if argv and not argv[0].startswith("-") else None
    args, words = parse_args(argv)
    window = ["--input-size", ",".join(map(str, args.window))] if args.window else []
    protocol = (*window, "--overlap", str(args.overlap), "--scales", *map(str, args.scales),
                "--flip" if args.flip else "--no-flip", *["--whole"] * args.whole,
                *["--raw-weights"] * args.raw_weights)
    names, devices = [variant.name for variant in args.models], select_devices(args.gpu)
    compare(Comparison(
        variants=args.models, base=BASE if BASE in names else names[0], seeds=args.seeds, steps=args.steps,
        words=for_all(data, words, args.steps, len(devices)), protocol=protocol,
        folder=Path(args.output_dir), paper=args.paper), devices)


@chart
def scores_by_time(path, rows):
    """Mean IoU against the time to evaluate an image, with intervals where there are any → PNG at `path`.

    rows: dicts with model, mean_iou and its mean_iou_95, half of the interval or None, evaluation_ms, and whether there
    is a coarse_mean_iou, by which networks with ACF are told from others.
    """
    figure = new_figure(8, 5)
    axes = figure.subplots()
    for acf, label, color, marker in ((False, "without ACF", "#d1791e", "D"),
                                      (True, "with ACF", "#1f5f99", "o")):
        some = [row for row in rows if (row["coarse_mean_iou"] is not None) == acf]
        if some:
            axes.errorbar([row["evaluation_ms"] for row in some], [100 * row["mean_iou"] for row in some],
                          [100 * (row["mean_iou_95"] or 0) for row in some], fmt=marker, color=color, label=label,
                          ecolor=f"{color}80", elinewidth=1.2, capsize=3, markersize=6)
    axes.margins(0.12)
    axes.set_ylim(bottom=max(0, axes.get_ylim()[0]))
    axes.set_xlabel("evaluation of an image, ms")
    axes.set_ylabel("mean IoU, %")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, loc="outside upper right", ncols=2)
    _name_points(figure, axes, rows)
    write_picture(path, figure.savefig)


def _name_points(figure, axes, rows):
    """Write the model's name beside each point of `scores_by_time`, where it covers as little as can be of other names,
    of points and of intervals."""
    from matplotlib.transforms import Bbox

    def area(one, other):
        both = Bbox.intersection(one, other)
        return 0 if both is None else both.width * both.height

    figure.draw_without_rendering()
    taken = []
    for row in rows:
        half = row["mean_iou_95"] or 0
        (x, low), (_, y), (_, high) = axes.transData.transform(
            [(row["evaluation_ms"], 100 * (row["mean_iou"] + way * half)) for way in (-1, 0, 1)])
        taken += [Bbox.from_extents(x - 7, y - 7, x + 7, y + 7), Bbox.from_extents(x - 2, low, x + 2, high)]
    for row in sorted(rows, key=lambda row: row["mean_iou"]):
        point = row["evaluation_ms"], 100 * row["mean_iou"]
        name = axes.annotate(row["model"], point, (0, 0), fontsize=9, textcoords="offset points", va="center",
                             in_layout=False)

        def cost(place, name=name):
            name.set(position=place, ha="left" if place[0] > 0 else "right")
            box = name.get_window_extent()
            outside = box.width * box.height - area(box, axes.bbox)
            return 3 * outside + sum(area(box, other) for other in taken) + math.hypot(*place)

        place = min(((right, up) for right in (8, -8, 20, -20, 40, -40) for up in range(-60, 61, 5)), key=cost)
        cost(place)     # puts it there
        taken.append(name.get_window_extent())
        if math.hypot(*place) > 15:
            axes.annotate("", point, place, textcoords="offset points", in_layout=False,
                          arrowprops={"arrowstyle": "-", "color": "#999999", "linewidth": 0.6})


if __name__ == "__main__":
    run(main)
