"""Score a snapshot of train.py, or use it.

The paper's protocol (sliding window, scales 0.75 to 2.0 by 0.25, mirror):

    python evaluate.py --data-dir CITYSCAPES --restore-from snapshots/CS_scenes_60000.pth --gpu 0

The quick answer:

    python evaluate.py --data-dir CITYSCAPES --restore-from snapshots/CS_scenes_60000.pth --scales 1.0 --no-flip

Several snapshots, as one table: --restore-from snapshots/CS_scenes_*.pth
Several GPUs share the images: --gpu 0,1,2,3, or torchrun --nproc_per_node 4 in place of python
Any images, without truth:

    python evaluate.py --restore-from snapshots/CS_scenes_60000.pth --images holiday/ 'more/*.jpg'

Videos, and numbered images as one, frame by frame into color/drive.mp4 and overlay/drive.mp4:

    python evaluate.py --restore-from snapshots/CS_scenes_60000.pth --images drive.mp4 'frames/%05d.png'

How fast that is, by any protocol; nothing is written:

    python evaluate.py --restore-from snapshots/CS_scenes_60000.pth --images drive.mp4 --whole --benchmark

What the Cityscapes server takes:

    python evaluate.py --data-dir CITYSCAPES --restore-from snapshots/CS_scenes_60000.pth --split test \
        --submission FOLDER

For other runtimes:

    python evaluate.py --restore-from snapshots/CS_scenes_60000.pth --export acfnet.onnx
    python evaluate.py --restore-from snapshots/CS_scenes_60000.pth --export fixed.onnx --export-size 1024,2048

From Python: networks/predictor.py
"""

import argparse
import itertools
import os
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))     # PYTHONSAFEPATH leaves it out
if __name__ == "__main__":      # before anything is imported that may be missing
    from utils import environment
    environment.check_packages()

import numpy as np
import torch

from dataset.cityscapes import CityscapesDataset
from dataset.folders import add_data_flags, data_root
from dataset.images import SUBMISSION, ImageFiles, find_images, images_of_split, open_videos, write_submission
from dataset.labels import ClassTable
from networks.exporting import export_snapshot
from networks.predictor import AMP, load_network, sliding_predictor
from utils.common import command, flags
from utils.common.errors import UserError, plural
from utils.common.files import write_json
from utils.common.progress import FirstImage, progress
from utils.devices import memory, select
from utils.devices.precision import describe_default, exact_float32
from utils.devices.select import own_device, select_devices, share_cores, shared_precision
from utils.imaging.classes import IGNORE_INDEX
from utils.imaging.pictures import FOLDERS, Pictures, VideoPictures
from utils.imaging.video import RATE
from utils.inference import timing
from utils.metrics import charts
from utils.metrics.boundaries import BoundaryF
from utils.metrics.calibration import Calibration
from utils.metrics.evaluation import score
from utils.metrics.iou import InstanceIoU
from utils.metrics.report import WorstImages, comparison_table, score_table, write_report
from utils.parallel.launch import join_processes, leave_processes, start_processes, started_by_torchrun
from utils.parallel.processes import Processes, from_all, rank_and_size, share_items, speak_for_all
from utils.parallel.workers import Loader
from utils.runs.results import ResultsFolder

PAPER_SCALES = (0.75, 1.0, 1.25, 1.5, 1.75, 2.0)
PICTURES, VIDEO_PICTURES = ("labels", "color", "overlay"), ("color", "overlay")     # by default
SCORES = ("result.json", "confusion.png", "iou.png", "report.html")
RESULTS = (*SCORES, *FOLDERS.values())
IDLE = {        # task → what it expects, and flags that would do nothing there
    "benchmark": ("a protocol and images, of which nothing is written",
                  ("submission", "export", "boundary", "save", "output_dir", "overwrite")),
    "export": ("the snapshot's classes, and --export-size for a fixed size", ("classes", "input_size")),
}


def get_parser():
    parser = flags.Parser(description="Score a snapshot, or use it.", epilog=__doc__)
    parser.add_argument("--restore-from", type=flags.path, nargs="+", required=True, metavar="FILE",
                        help="snapshot of train.py; several are scored one after the other")
    data = parser.add_argument_group("data")
    data.add_argument("--data-dir", type=flags.path,
                      help="folder with leftImg8bit/ and gtFine/, or the root of --data-list")
    add_data_flags(data, "the one the snapshot was trained with")
    data.add_argument("--split", type=flags.split, default="val", help="split to scan (val)")
    data.add_argument("--num-workers", type=flags.num_workers,
                      help="processes that read images, for each that predicts; default: by the number of cores")

    tasks = parser.add_argument_group("instead of scoring")
    tasks.add_argument("--images", type=flags.path, nargs="+", metavar="PATH",
                       help="predict images: files, folders, patterns; or videos, at their rate and without sound: "
                       f"files, or the names of numbered images, such as 'frames/%%05d.png' ({RATE:g} frames/s)")
    tasks.add_argument("--submission", type=flags.path, metavar="FOLDER",
                       help="predict the images of --split for the Cityscapes server: FOLDER/labelIds/ and, to upload, "
                       f"FOLDER/{SUBMISSION}")
    tasks.add_argument("--export", type=flags.path, metavar="FILE",
                       help="write the network for whole images, without windows: FILE.onnx, FILE.pt2 (torch.export); "
                       "or its weights, with config.json and a model card beside them: FILE.safetensors")
    tasks.add_argument("--export-size", type=flags.size, metavar="H,W",
                       help="of the images that .onnx and .pt2 take, one at a time; default: any size and number")
    tasks.add_argument("--export-precision", choices=("fp32", "fp16"),
                       help="of weights and arithmetic (fp32); images and logits are float32 in any case")
    tasks.add_argument("--benchmark", action="store_true", help="time the prediction of some of the images, from "
                       "pixels to labels, and write nothing")

    protocol = parser.add_argument_group("protocol")
    add_protocol(protocol)
    protocol.add_argument("--boundary", type=flags.positive(float, 1000), metavar="PIXELS", help="also score how well "
                          "outlines are met: boundary F-score of each class, with so many pixels of tolerance (off)")

    run = parser.add_argument_group("machine")
    run.add_argument("--gpu", help="ids such as 0,1, which share the images, and videos whole, or cpu; default: all "
                     "visible GPUs, else the CPU")
    run.add_argument("--batch-size", type=flags.batch_size, default=4, help="windows at a time (4)")
    run.add_argument("--amp", choices=AMP, help="mixed precision; default: bf16 on a GPU that has "
                     "instructions for it, else fp16; on a CPU bf16 where that is measured to be faster, else off")

    out = parser.add_argument_group("results")
    out.add_argument("--output-dir", type=flags.path,
                     help="default: a folder named after the snapshot and the split, beside it")
    out.add_argument("--overwrite", action="store_true", help="replace the results of an earlier run there, "
                     "or the file of --export, and nothing else")
    out.add_argument("--save", nargs="+", choices=(*FOLDERS, "none"), help="pictures of each image: label ids, "
                     "colours, colours over the image (these three), and the probability of the class that was chosen, "
                     "in grey, 255 for certain; of videos the default leaves out label ids, which codecs would change: "
                     "they are a PNG for each frame")
    return parser


def add_protocol(group, window="--input-size", scales=PAPER_SCALES, flip=True):
    """Flags that say how images are predicted, with these defaults; window: name of the flag for its size."""
    group.add_argument(window, type=flags.size, metavar="H,W",
                       help="window, rounded up to 8k + 1, and no larger than the image; default: the training crop")
    group.add_argument("--overlap", type=flags.probability, default=1 / 3, help="of neighbouring windows (1/3)")
    group.add_argument("--whole", action="store_true", help="the whole image at once, no windows")
    group.add_argument("--scales", type=flags.scale, nargs="+", default=scales, help=f"({' '.join(map(str, scales))})")
    group.add_argument("--flip", action=argparse.BooleanOptionalAction, default=flip,
                       help=f"run mirrored too ({'yes' if flip else 'no'})")
    group.add_argument("--raw-weights", action="store_true", help="the weights of the last step, also of a run with "
                       "--ema, whose moving average is scored otherwise")


def load_items(dataset, workers, processes, what):
    """This process's share of a data set, with progress."""
    if workers:
        dataset.look_at_first()
    return progress(Loader(share_items(dataset, processes), workers=workers), what, "image")


class Evaluation:
    """What a network makes of a data set, counted: one pass over it, each process over its share.

    Args:
        dataset: with labels; a `CityscapesDataset`.
        pictures: `Pictures`, which gets the predictions.
        tolerance: of boundaries, in pixels, or None.

    Attributes, after `run` of all processes:
        matrices: {protocol: {head: ConfusionMatrix}}, the richest protocol last.
        calibration: {head: `Calibration`} of the richest protocol.
        worst: `WorstImages`.
        instances: `InstanceIoU`; boundaries: `BoundaryF`; None without instances and without tolerance.
    """

    def __init__(self, dataset, pictures, tolerance=None):
        self.dataset, self.pictures, self.classes = dataset, pictures, dataset.classes
        classes = self.classes
        self.matrices, self.calibration = {}, defaultdict(lambda: Calibration(IGNORE_INDEX))
        self.worst = WorstImages(classes.names, classes.color, IGNORE_INDEX)
        self.instances = InstanceIoU(classes.instance_sizes, classes.train_ids, classes.categories,
                                     classes.whole_categories)
        self.boundaries = tolerance and BoundaryF(tolerance, classes.num_classes, IGNORE_INDEX)

    def run(self, predictor, workers, processes=None):
        """predictor: `SlidingPredictor`; workers: that read images."""
        self.matrices = score(predictor, load_items(self.dataset, workers, processes, "evaluating"),
                              self.classes.num_classes, IGNORE_INDEX, processes, self._see)
        if processes is not None:
            self._merge(processes)
        if len(self.instances.terms) < len(self.dataset) or self.classes.train_ids.keys().isdisjoint(
                self.classes.instance_sizes):
            self.instances = None

    def _see(self, item, heads, confidence, labels, counts, truth):
        """An image, as `utils.inference.score` shows it."""
        for head, values in labels.items():
            self.calibration[head].update(confidence[head], values, truth)
        image, labels = item["image"].permute(1, 2, 0), {head: values.cpu() for head, values in labels.items()}
        self.pictures.add(item["name"], image, labels["fine"], confidence["fine"])
        self.worst.add(item["name"], image.numpy(), item["label"].numpy(), labels, counts, heads.get("coarse"))
        if "instances" in item:
            self.instances.update(item["index"], item["instances"].numpy(), labels["fine"].numpy())
        if self.boundaries:
            self.boundaries.update(item["name"], item["label"].numpy(),
                                   {head: values.numpy() for head, values in labels.items()})

    def _merge(self, processes):
        """Add what the other processes found; the matrices are whole."""
        self.worst.merge(processes.gather_objects(self.worst.kept))
        for scored in filter(None, (self.instances, self.boundaries)):
            for terms in processes.gather_objects(scored.terms):
                scored.terms |= terms
        found = processes.gather_objects(dict(self.calibration))
        self.calibration.clear()
        for head, one in itertools.chain.from_iterable(one.items() for one in found):
            self.calibration[head].add(one)

    @property
    def headline(self):
        """{head: ConfusionMatrix} of the richest protocol that was run."""
        return list(self.matrices.values())[-1]

    def result(self, checkpoint_path, protocol):
        """What `result.json` holds; protocol: its plain values. The first score is the headline's fine head's."""
        names = self.classes.names
        scores = {name: {head: matrix.scores(names, self.classes.categories) for head, matrix in heads.items()}
                  for name, heads in self.matrices.items()}
        richest = list(scores.values())[-1]
        if self.instances is not None:
            richest["fine"] |= self.instances.scores(self.headline["fine"], names)
        if self.boundaries is not None:
            for head, found in self.boundaries.scores(names).items():
                richest[head] |= found
        coarse = {name: heads["coarse"] for name, heads in scores.items() if "coarse" in heads}
        return {
            "mean_iou": richest["fine"]["mean_iou"],
            **{name: heads["fine"] for name, heads in scores.items()},
            **({"coarse": coarse} if coarse else {}),
            "calibration": {head: one.scores() for head, one in self.calibration.items()},
            "num_images": len(self.dataset), "checkpoint": str(checkpoint_path), "protocol": protocol,
        }


def results_folder(path, what, output_dir=None, several=False):
    """Where the results for a snapshot go: beside it, named after it and what was predicted, or where it is said; of
    several snapshots into a folder each."""
    if output_dir is None:
        return path.with_name(f"{path.stem}_{what}")
    return Path(output_dir) / path.stem if several else Path(output_dir)


def picture_files(dataset, kinds):
    """The files of a data set's pictures, relative to the folder of results."""
    return [f"{FOLDERS[kind]}/{name}.png" for kind in kinds for name in dataset.names]


def where(folder, kinds, files=()):
    """What is said of a folder with these files and kinds of pictures."""
    names = [*files, *(f"{FOLDERS[kind]}/" for kind in kinds)]
    return f"results in {folder}{': ' * bool(names)}{', '.join(names)}"


def make_folder(results, files, processes):
    """Make room for results; the first process does, and the others wait for it."""
    rank, _ = rank_and_size(processes)
    if rank == 0:
        results.prepare(files, FOLDERS.values())
    if processes is not None:
        processes.barrier()


def check(args):
    """Refuse what cannot work, before anything is read."""
    if args.overlap >= 1:
        raise UserError("--overlap: expected a share below 1, found 1")
    if not args.export and (args.export_size or args.export_precision):
        raise UserError("--export-size, --export-precision: expected with --export, found none")
    if args.whole and args.input_size:
        raise UserError("--whole: expected no size of windows with it, found {}×{}".format(*args.input_size))
    tasks = [f"--{name}" for name in ("images", "submission", "export") if getattr(args, name)]
    if len(tasks) > 1:
        raise UserError(f"{tasks[0]}: expected one task at a time, found {' and '.join(tasks)}")
    if tasks and args.boundary:
        raise UserError(f"--boundary: expected a data set to score, which has truth, found {tasks[0]}")
    if tasks and len(args.restore_from) > 1:
        raise UserError(f"--restore-from: expected one snapshot with {tasks[0]}, found {len(args.restore_from)}")
    names, most = Counter(Path(name).stem for name in args.restore_from).most_common(1)[0]
    if most > 1 and args.output_dir:
        raise UserError(f"--restore-from: expected snapshots of different names with --output-dir, found {names} "
                        f"{most} times")
    if not args.images and not args.export:
        data_root(args.data_dir, args.images_dir, args.labels_dir)
    if args.submission and (args.data_list or args.images_dir):
        raise UserError("--submission: expected a Cityscapes folder in --data-dir, found "
                        f"{'--data-list' if args.data_list else '--images-dir'}")
    for task, (expected, names) in IDLE.items():
        others = [f"--{name.replace('_', '-')}" for name in names if getattr(args, name)]
        if getattr(args, task) and others:
            raise UserError(f"--{task}: expected {expected}, found {others[0]}")


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How an image is predicted.

    Attributes:
        window: (height, width) in pixels; None for the training crop.
        whole: the whole image at once, no windows.
        overlap, scales, flip, batch_size: as in `SlidingPredictor`.
        amp: one of `AMP`.
        raw_weights: as in `load_network`.
        boundary: tolerance in pixels with which boundaries are scored, or None.
    """

    window: tuple | None = None
    whole: bool = False
    overlap: float = 1 / 3
    scales: tuple = PAPER_SCALES
    flip: bool = True
    batch_size: int = 4
    amp: str = "off"
    raw_weights: bool = False
    boundary: float | None = None

    def predictor(self, network, config, device, images):
        """The `SlidingPredictor` of a snapshot's network, which tells how the first of so many images gets on."""
        return sliding_predictor(network, config, device, window=self.window, whole=self.whole, overlap=self.overlap,
                                 scales=self.scales, flip=self.flip, batch_size=self.batch_size, amp=self.amp,
                                 watch=FirstImage(images))

    def as_json(self, window, split, config):
        """What `result.json` says of it, with a snapshot of this `Config`; window: that was used, or None;
        split: name of the images."""
        averaged = (config.arguments or {}).get("ema") is not None
        return {"window": window and list(window), "overlap": None if self.whole else self.overlap,
                "scales": list(self.scales), "flip": self.flip, "amp": self.amp, "split": split,
                "average": "probabilities"} | (
                    {"weights": "raw" if self.raw_weights else "moving average"} if averaged else {}) | (
                    {"boundary": self.boundary} if self.boundary else {})

    def out_of_memory_error(self, found):
        """The `UserError`; found: the error's first words."""
        choices = [f"a --batch-size below {self.batch_size}"] * (self.batch_size > 1) + [
            "windows, by --input-size, instead of --whole" if self.whole else "a smaller --input-size",
            f"--scales below {max(self.scales):g}", "fewer --num-workers"]
        return UserError(f"out of memory: expected room for the passes of this protocol over an image, found: {found}; "
                         f"what helps: {', '.join(choices)}")


def protocol_of(args):
    """The `Protocol` that flags say; without --amp in float32."""
    return Protocol(window=args.input_size, whole=args.whole, overlap=args.overlap, scales=tuple(args.scales),
                    flip=args.flip, batch_size=args.batch_size, amp=args.amp or "off", raw_weights=args.raw_weights,
                    boundary=args.boundary)


class Machine(NamedTuple):
    """Where this process computes, with so many processes that read images, and with whom it shares them."""

    device: torch.device
    workers: int
    processes: Processes | None


def read_classes(path, config, snapshot):
    """The `ClassTable` of this file if it fits the network, or that of a snapshot for None."""
    classes = ClassTable.read(path) if path else ClassTable(config.classes, f"classes of {snapshot}")
    if classes.num_classes != config.network["num_classes"]:
        raise UserError(f"--classes {path}: expected the {config.network['num_classes']} classes of "
                        f"{snapshot}, found {classes.num_classes}")
    for remark in classes.remarks:
        print(remark)
    return classes


def main(argv=None):
    args = get_parser().parse_args(argv)
    check(args)
    paths = [Path(name) for name in args.restore_from]
    protocol = protocol_of(args)
    if args.export:
        print(memory.catch_out_of_memory(lambda: export_snapshot(
            paths[0], Path(args.export), raw_weights=args.raw_weights, size=args.export_size,
            precision=args.export_precision or "fp32", overwrite=args.overwrite), protocol.out_of_memory_error))
        return
    devices = select_devices(args.gpu)[:1 if args.benchmark else None]
    if len(devices) > 1 and not started_by_torchrun():
        start_processes(len(devices), argv)
    device = own_device(devices)
    processes = join_processes(device)
    speak_for_all(processes)
    workers, cores = share_cores([device], args.num_workers)
    protocol = replace(protocol, amp=args.amp or shared_precision([device], processes))
    reason = "" if args.amp else f": {describe_default(device)}"
    print(f"{cores}; --amp {protocol.amp}{reason}")
    exact_float32(protocol.amp, device)
    machine = Machine(device, workers, processes)
    memory.catch_out_of_memory(lambda: perform(args, paths, protocol, machine), protocol.out_of_memory_error)


def perform(args, paths, protocol, machine):
    """The task that the flags name. Nothing below knows flags."""
    found = find_images(args.images) if args.images else {}
    videos = open_videos(found)
    kinds = tuple(dict.fromkeys(args.save or (VIDEO_PICTURES if videos else PICTURES)))
    kinds = () if "none" in kinds else kinds
    root = None if found or args.submission else data_root(args.data_dir, args.images_dir, args.labels_dir)

    def data(classes):
        return CityscapesDataset(root, args.split, args.data_list, classes, instances=True)

    how = {"protocol": protocol, "machine": machine, "table_path": args.classes}
    if args.benchmark:
        for path in paths:
            benchmark(path, found and (videos or ImageFiles(found)), data, **how)
        broken = 0
    elif args.submission:
        dataset = ImageFiles(images_of_split(args.data_dir, args.split))
        broken = predict(paths[0], dataset, **how, kinds=("labels",), submission=True,
                         results=ResultsFolder("--submission", Path(args.submission), args.overwrite))
    elif args.images:
        folder = results_folder(paths[0], "images", args.output_dir)
        work, what = (predict_videos, videos) if videos else (predict, ImageFiles(found))
        broken = work(paths[0], what, **how, kinds=kinds,
                      results=ResultsFolder("--output-dir", folder, args.overwrite))
    else:
        folders = [ResultsFolder("--output-dir", results_folder(path, f"{args.split}{'_raw' * args.raw_weights}",
                                                               args.output_dir, len(paths) > 1),
                                 args.overwrite) for path in paths]
        if rank_and_size(machine.processes)[0] == 0:        # of all snapshots, before hours go into the first
            for results in folders:
                results.check(RESULTS)
        found = [score_snapshot(path, data, **how, kinds=kinds, results=results)
                 for path, results in zip(paths, folders, strict=True)]
        if len(found) > 1 and found[0]:
            print(comparison_table(found))
        broken = 0
    leave_processes()
    if broken:
        sys.exit(1)


def score_snapshot(path, data, *, protocol, machine, table_path, kinds, results):
    """Score one snapshot. Returns what `result.json` holds; None in all processes but the first.

    Args:
        path: of the snapshot.
        data: (class table) → the `CityscapesDataset`.
        table_path: of a class table, or None for the snapshot's.
        kinds: pictures to write, of `FOLDERS`.
        results: `ResultsFolder`.
    """
    network, config = load_network(path, machine.device, protocol.raw_weights)
    classes = read_classes(table_path, config, path)
    dataset = data(classes)
    folder, processes = results.folder, machine.processes
    make_folder(results, [*SCORES, *picture_files(dataset, kinds)], processes)
    print(f"{path}; {dataset.describe()}")
    predictor = protocol.predictor(network, config, machine.device, len(share_items(dataset, processes)))
    with Pictures(folder, kinds, classes) as pictures:
        found = Evaluation(dataset, pictures, protocol.boundary)
        found.run(predictor, machine.workers, processes)
    if processes is not None:
        processes.barrier()        # results are told when all have written their pictures
    if not found.headline["fine"].matrix.any():
        raise UserError(f"{dataset.pairs[0][1]} and {plural(len(dataset) - 1, 'other label map')}: expected labelled "
                        "pixels to score, found none; predictions for the Cityscapes server are made by --submission "
                        "FOLDER")
    if rank_and_size(processes)[0]:
        return None
    result = found.result(path, protocol.as_json(predictor.window, dataset.source, config))
    heads = {head: matrix.scores(classes.names, classes.categories)["class_iou"]
             for head, matrix in found.headline.items()}
    matrix = np.asarray(found.headline["fine"].matrix)
    print(score_table(result))
    write_json(folder / "result.json", result)       # first: the disk may have no room for pictures
    charts.confusion_picture(folder / "confusion.png", matrix, classes.names)
    charts.iou_chart(folder / "iou.png", heads, classes.palette)
    write_report(folder / "report.html", result, matrix, classes.names, classes.palette[:classes.num_classes],
                 found.worst.entries())
    print(where(folder, kinds, ("report.html", "result.json", "iou.png", "confusion.png")))
    return result


def predict(path, dataset, *, protocol, machine, table_path, kinds, results, submission=False):
    """Predict images without truth. Returns the number of images that could not be read.

    dataset: `ImageFiles`; submission: whether the Cityscapes server is to take the results; the rest as in
    `score_snapshot`.
    """
    network, config = load_network(path, machine.device, protocol.raw_weights)
    classes = read_classes(table_path, config, path)
    folder, processes = results.folder, machine.processes
    rank, _ = rank_and_size(processes)
    make_folder(results, picture_files(dataset, kinds) + [SUBMISSION] * submission, processes)
    print(f"{path}; {plural(len(dataset), 'image')}")
    predictor = protocol.predictor(network, config, machine.device, len(share_items(dataset, processes)))
    _, broken = predict_items(predictor, load_items(dataset, machine.workers, processes, "predicting"),
                              Pictures(folder, kinds, classes))
    count = sum(from_all(processes, broken))
    if submission and count:
        raise UserError(f"--submission {folder}: expected every image to be readable, found {count} that are not")
    if rank == 0 and submission:
        print(write_submission(folder / FOLDERS["labels"], dataset, classes))
    elif rank == 0:
        print(f"{plural(len(dataset) - count, 'image')} predicted, {count} skipped; {where(folder, kinds)}")
    if rank == 0:
        results.close()
    return count


def predict_items(predictor, items, pictures):
    """Predict images; what cannot be read is named and skipped. Returns how many were predicted and skipped.

    items: {"image": uint8 (3, H, W), "name"}, or {"error": sentence, and "frames" where it is about several}.
    """
    done = broken = 0
    with pictures:
        for item in items:
            if "error" in item:
                broken += item.get("frames", 1)
                print(f"skipped: {item['error']}", file=sys.stderr)
                continue
            image = item["image"].permute(1, 2, 0)
            confidence, labels = predictor(image).max(0)
            pictures.add(item["name"], image, labels, confidence)
            done += 1
    return done, broken


def predict_videos(path, videos, *, protocol, machine, table_path, kinds, results):
    """Predict videos, {name: `Video`}, each as a whole in one process. Returns the number of frames that could not be
    read. Asked to stop, it finishes the videos with the frames that are done and raises `cli.Interrupted`."""
    network, config = load_network(path, machine.device, protocol.raw_weights)
    classes = read_classes(table_path, config, path)
    folder, processes = results.folder, machine.processes
    rank, size = rank_and_size(processes)
    make_folder(results, [] if rank else [file for name, video in videos.items() for file in VideoPictures.files_of(
        name, kinds, video.last() if "labels" in kinds else 0)], processes)
    own = list(videos.items())[rank::size]
    print(f"{path}; {plural(len(videos), 'video')}"
          f"{f', each predicted by one of {size} processes' * (size > 1)}")
    predictor = protocol.predictor(network, config, machine.device, sum(len(video) for _, video in own) or 1)
    done = broken = 0
    with command.StopRequest() as stop:
        for name, video in own:
            print(f"{video.path}: {plural(len(video) or 'unknown number of', 'frame')}, {video.rate:g} a second")
            items = itertools.takewhile(lambda _: not stop.asked, progress(video, name, "frame"))
            pictures = VideoPictures(folder, kinds, classes, name, video.rate)
            done, broken = map(sum, zip((done, broken), predict_items(predictor, items, pictures), strict=True))
    if stop.asked and processes is not None:
        raise command.Interrupted(stop.number)
    done, broken = map(sum, zip(*from_all(processes, (done, broken)), strict=True))
    if rank == 0:
        results.close()
        print(f"{plural(done, 'frame')} predicted, {broken} skipped{', then stopped' * stop.asked}; "
              f"{where(folder, kinds)}")
    if stop.asked:
        raise command.Interrupted(stop.number)
    return broken


def benchmark(path, found, data, *, protocol, machine, table_path):
    """Time predictions by a snapshot and print what they take.

    found: {name: `Video`} or `ImageFiles`, of which the first are taken; without any those of `data`; the rest as in
    `score_snapshot`.
    """
    if machine.processes is not None:
        raise UserError(f"--benchmark: expected one process, found {machine.processes.size}")
    network, config = load_network(path, machine.device, protocol.raw_weights)
    found = found or data(read_classes(table_path, config, path))
    items = itertools.chain.from_iterable(found.values()) if isinstance(found, dict) else map(
        found.__getitem__, range(len(found)))
    images = [item["image"].permute(1, 2, 0) for item in itertools.islice(
        (item for item in items if "image" in item), timing.TURNS)]
    if not images:
        raise UserError("--images: expected one that can be read, found none")
    predictor = protocol.predictor(network, config, machine.device, len(images))
    predictor.watch = None
    took = timing.prediction(predictor, images, timing.TURNS, timing.SECONDS)
    print(f"{path} on {select.device_name(machine.device)}, --amp {protocol.amp}: {plural(len(images), 'image')} of "
          f"{', '.join(dict.fromkeys(f'{image.shape[0]}×{image.shape[1]}' for image in images))}; "
          f"{'whole' if predictor.window is None else 'windows of {}×{}'.format(*predictor.window)}, "
          f"{protocol.batch_size} at a time, scales {' '.join(f'{scale:g}' for scale in protocol.scales)}"
          f"{', mirrored too' * protocol.flip}")
    print("{images_per_s:.3g} images/s, {ms:.4g} ms an image (median; spread {spread_ms:.3g}), "
          "{beyond_the_network:.1%} of it beyond the network; peak memory {peak_gb:.2f} GB".format(**took))


if __name__ == "__main__":
    command.run(main)
