r"""Score a snapshot of train.py, or use it.

The paper's protocol (sliding window, scales 0.75 to 2.0 by 0.25, mirror):

    python evaluate.py --data-dir CITYSCAPES --restore-from snapshots/CS_scenes_60000.pth --gpu 0

A quick score:

    python evaluate.py --data-dir CITYSCAPES --restore-from snapshots/CS_scenes_60000.pth --scales 1.0 --no-flip

Several snapshots, as one table: --restore-from snapshots/CS_scenes_*.pth
Several GPUs share the images: --gpu 0,1,2,3, or torchrun --nproc_per_node 4 in place of python
Images without labels:

    python evaluate.py --restore-from snapshots/CS_scenes_60000.pth --images holiday/ 'more/*.jpg'

Videos, or numbered images as one video, frame by frame; results are color/drive.mp4 and overlay/drive.mp4:

    python evaluate.py --restore-from snapshots/CS_scenes_60000.pth --images drive.mp4 'frames/%05d.png'

Measure how fast that is, with any protocol; nothing is written:

    python evaluate.py --restore-from snapshots/CS_scenes_60000.pth --images drive.mp4 --whole --benchmark

Predictions for the Cityscapes server:

    python evaluate.py --data-dir CITYSCAPES --restore-from snapshots/CS_scenes_60000.pth --split test \
        --submission FOLDER

For other runtimes:

    python evaluate.py --restore-from snapshots/CS_scenes_60000.pth --export acfnet.onnx
    python evaluate.py --restore-from snapshots/CS_scenes_60000.pth --export fixed.onnx --export-size 1024,2048

    python evaluate.py --restore-from snapshots/CS_scenes_60000.pth --push hf:OWNER/NAME

.onnx files and names of the Hugging Face Hub are used like snapshots: --restore-from acfnet.onnx hf:OWNER/NAME

Flags can be in a file, one per line: python evaluate.py @FILE ...
From Python: networks/predictor.py
"""

import argparse
import itertools
import os
import sys
from collections import Counter
from dataclasses import replace
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
from dataset.infer import check_meaning
from dataset.labels import ClassTable
from networks.exported import is_exported
from networks.exporting import export_snapshot, push_snapshot
from networks.predictor import AMP, KERNELS, PAPER_SCALES, Protocol, load_network, sliding_predictor
from networks.weights import hub
from networks.weights.snapshot import Config
from utils.common import command, files, flags
from utils.common.errors import UserError, plural
from utils.common.messages import logger, show_messages
from utils.common.progress import FirstImage, progress
from utils.devices import memory
from utils.devices.precision import describe_default, exact_float32
from utils.devices.select import device_name, own_device, select_devices, share_cores, shared_precision, writer_threads
from utils.imaging.video import DEFAULT_RATE
from utils.inference import timing
from utils.inference.pictures import FOLDERS, Pictures, VideoPictures, picture_file
from utils.metrics.evaluation import Evaluation
from utils.ops.probabilities import most_probable
from utils.parallel.launch import join_processes, leave_processes, start_processes, started_by_torchrun
from utils.parallel.processes import Processes, gather_from_ranks, rank_and_size, share_items
from utils.parallel.workers import load_items
from utils.reports import charts
from utils.reports.report import comparison_table, score_table, write_report
from utils.runs import recipes
from utils.runs.results import ResultsFolder

PICTURES, VIDEO_PICTURES = ("labels", "color", "overlay"), ("color", "overlay")     # by default
SCORES = ("result.json", "confusion.png", "iou.png", "report.html")
RESULTS = (*SCORES, *FOLDERS.values())
IGNORED_FLAGS = {       # {task: (what it expects, flags that would have no effect)}
    "benchmark": ("a protocol and images, of which nothing is written",
                  ("submission", "export", "push", "boundary", "save", "output_dir", "overwrite")),
    "export": ("the snapshot's classes, and --export-size for a fixed size", ("classes", "input_size")),
    "push": ("the snapshot's classes, and weights for any size", ("classes", "input_size", "export_size")),
}


def get_parser():
    parser = flags.Parser(usage="%(prog)s [@FILE] --restore-from FILE [FILE ...] [flags]",
                          description="Score a snapshot, or use it.", epilog=__doc__)
    parser.add_argument("--restore-from", type=flags.path, nargs="+", required=True, metavar="FILE",
                        help="snapshot of train.py, .safetensors or .onnx file of --export, or hf:OWNER/NAME[@REVISION]"
                        " of the Hugging Face Hub; several are scored one after the other")
    data = parser.add_argument_group("data")
    data.add_argument("--data-dir", type=flags.path,
                      help="folder with leftImg8bit/ and gtFine/, or the root of --data-list")
    add_data_flags(data, "that of the snapshot")
    data.add_argument("--split", type=flags.split, default="val", help="split to score (default: val)")
    data.add_argument("--num-workers", type=flags.num_workers,
                      help="processes that read images, per predicting process (default: depends on the number of "
                      "cores)")

    tasks = parser.add_argument_group("tasks other than scoring")
    tasks.add_argument("--images", type=flags.path, nargs="+", metavar="PATH",
                       help="predict images: files, folders or patterns; or videos: files, or patterns of numbered "
                       f"images such as 'frames/%%05d.png', which are taken at {DEFAULT_RATE:g} frames/s; results have "
                       "the rate of the video and no sound")
    tasks.add_argument("--submission", type=flags.path, metavar="FOLDER",
                       help="predict the images of --split for the Cityscapes server: FOLDER/labelIds/ and the archive "
                       f"to upload, FOLDER/{SUBMISSION}")
    tasks.add_argument("--export", type=flags.path, metavar="FILE",
                       help="write the network for whole images, without windows: FILE.onnx or FILE.pt2 "
                       "(torch.export); or only its weights, with config.json and a model card: FILE.safetensors")
    tasks.add_argument("--push", type=flags.path, metavar="hf:OWNER/NAME",
                       help="upload what --export FILE.safetensors writes to the Hugging Face Hub; a new repository is "
                       "private, a public one needs --overwrite")
    tasks.add_argument("--export-size", type=flags.size, metavar="H,W",
                       help="fixed size of the images that .onnx and .pt2 take, one per call (default: any size and "
                       "number)")
    tasks.add_argument("--export-precision", choices=("fp32", "fp16"),
                       help="precision of weights and arithmetic; images and logits are always float32 (default: fp32)")
    tasks.add_argument("--benchmark", action="store_true",
                       help="measure how fast some of the images are predicted, from pixels to labels; write nothing")

    protocol = parser.add_argument_group("protocol")
    add_protocol(protocol)
    protocol.add_argument("--boundary", type=flags.positive(float, 1000), metavar="PIXELS", help="also compute the "
                          "boundary F-score of each class, which measures how well outlines match, with this tolerance "
                          "in pixels (default: not computed)")

    run = parser.add_argument_group("machine")
    run.add_argument("--gpu", help="ids of GPUs such as 0,1, or cpu; several GPUs share the images, and each predicts "
                     "whole videos (default: all visible GPUs, else the CPU)")
    run.add_argument("--batch-size", type=flags.batch_size, default=4, help="windows per forward pass (default: 4)")
    run.add_argument("--amp", choices=AMP, help="mixed precision (default: on a GPU bf16 if it has instructions for "
                     "it, else fp16; on a CPU bf16 if a measurement shows that it is faster, else off)")
    run.add_argument("--kernels", choices=KERNELS, default="auto", help="auto: on a GPU norms by Triton's kernels, if "
                     "they agree with PyTorch's operators there; torch: norms folded into convolutions (default: auto)")

    out = parser.add_argument_group("results")
    out.add_argument("--output-dir", type=flags.path, help="folder of the results (default: beside the snapshot, named "
                     "after the snapshot and the split)")
    out.add_argument("--overwrite", action="store_true", help="replace the results of an earlier run in that folder, "
                     "or the file of --export, or the files of --push, and nothing else; also publish in a public "
                     "repository")
    out.add_argument("--save", nargs="+", choices=(*FOLDERS, "none"), help="pictures of each image; labels: label ids; "
                     "color: class colors, a PNG with a palette; overlay: class colors over the image, JPEG; "
                     "confidence: probability of the predicted class in gray, 255 for 1 (default: labels color "
                     "overlay; for videos color overlay). Video codecs change label ids, so that labels of a video are "
                     "one PNG per frame")
    return parser


def add_protocol(group, window="--input-size", scales=PAPER_SCALES, flip=True):
    """Add the flags of the protocol by which images are predicted.

    Args:
        group: of an argument parser.
        window: name of the flag for the size of windows.
        scales, flip: defaults.
    """
    group.add_argument(window, type=flags.size, metavar="H,W", help="size of the windows, rounded up to 8k + 1; never "
                       "larger than the image (default: the training crop)")
    group.add_argument("--overlap", type=flags.probability, default=1 / 3,
                       help="overlap of neighboring windows, as a share of their size (default: 1/3)")
    group.add_argument("--whole", action="store_true", help="predict whole images, without windows")
    group.add_argument("--scales", type=flags.scale, nargs="+", default=scales,
                       help="scales of the image, whose probabilities are averaged (default: "
                       f"{' '.join(map(str, scales))})")
    group.add_argument("--flip", action=argparse.BooleanOptionalAction, default=flip,
                       help=f"also predict the mirrored image (default: {'yes' if flip else 'no'})")
    group.add_argument("--raw-weights", action="store_true", help="for a run with --ema: use the weights of the "
                       "last step (default: their moving average)")


def results_folder(path, what, output_dir=None, several=False):
    """The folder for the results of a snapshot.

    Args:
        path: of the snapshot.
        what: name of what is predicted.
        output_dir: the user's choice; None for a folder beside the snapshot, named after it and `what`.
        several: whether the results of other snapshots go to `output_dir` too, each into a folder of its own.
    """
    place = hub.place_of(path)
    name = place.stem       # an export beside its snapshot has results of its own
    if place == Path(path) and place.suffix in (".onnx", ".safetensors"):
        name += f"_{place.suffix[1:]}"
    if output_dir is None:
        return place.with_name(f"{name}_{what}")
    return Path(output_dir) / name if several else Path(output_dir)


def picture_files(dataset, kinds):
    """Names of the pictures of a data set, relative to the results folder."""
    return [picture_file(kind, name) for kind in kinds for name in dataset.names]


def describe_results(folder, kinds, files=()):
    """A sentence that lists the files and kinds of pictures in a results folder."""
    names = [*files, *(f"{FOLDERS[kind]}/" for kind in kinds)]
    return f"results in {folder}{': ' * bool(names)}{', '.join(names)}"


def make_folder(results, files, processes):
    """Prepare a results folder in the first process, while the others wait."""
    rank, _ = rank_and_size(processes)
    if rank == 0:
        results.prepare(files, FOLDERS.values())
    if processes is not None:
        processes.barrier()


def check(args):
    """Raise `UserError` for flags that contradict each other, before anything is read."""
    if args.overlap >= 1:
        raise UserError("--overlap: expected a share below 1, found 1")
    if not (args.export or args.push) and (args.export_size or args.export_precision):
        raise UserError("--export-size, --export-precision: expected with --export, found none")
    exported = list(filter(is_exported, args.restore_from))
    fixed = [f"--{name.replace('_', '-')}" for name in ("amp", "kernels", "raw_weights", "export", "push")
             if getattr(args, name) not in (None, False, "off", "auto")]
    if exported and fixed:
        raise UserError(f"{fixed[0]}: expected a snapshot, found {exported[0]}, an export, whose weights and "
                        "arithmetic are fixed")
    if args.whole and args.input_size:
        raise UserError("--whole: expected no size of windows with it, found {}×{}".format(*args.input_size))
    tasks = [f"--{name}" for name in ("images", "submission", "export", "push") if getattr(args, name)]
    if len(tasks) > 1:
        raise UserError(f"{tasks[0]}: expected one task at a time, found {' and '.join(tasks)}")
    if tasks and args.boundary:
        raise UserError(f"--boundary: expected a data set to score, which has truth, found {tasks[0]}")
    if tasks and len(args.restore_from) > 1:
        raise UserError(f"--restore-from: expected one snapshot with {tasks[0]}, found {len(args.restore_from)}")
    folder, count = Counter(results_folder(name, args.split, args.output_dir, True)
                            for name in args.restore_from).most_common(1)[0]
    if count > 1:
        raise UserError(f"--restore-from: expected a results folder for each file, found {folder} for {count} of them")
    if not (args.images or args.export or args.push):
        data_root(args.data_dir, args.images_dir, args.labels_dir)
    if args.submission and (args.data_list or args.images_dir):
        raise UserError("--submission: expected a Cityscapes folder in --data-dir, found "
                        f"{'--data-list' if args.data_list else '--images-dir'}")
    for task, (expected, names) in IGNORED_FLAGS.items():
        others = [f"--{name.replace('_', '-')}" for name in names if getattr(args, name)]
        if getattr(args, task) and others:
            raise UserError(f"--{task}: expected {expected}, found {others[0]}")


def protocol_of(args):
    """Flags → `Protocol`; without --amp in float32."""
    return Protocol(window=args.input_size, whole=args.whole, overlap=args.overlap, scales=tuple(args.scales),
                    flip=args.flip, batch_size=args.batch_size, amp=args.amp or "off", raw_weights=args.raw_weights,
                    kernels=args.kernels, boundary=args.boundary)


class Machine(NamedTuple):
    """What this process computes with.

    Attributes:
        device: `torch.device`.
        workers: number of processes that read images.
        threads: number of threads that count predictions and write pictures.
        processes: `Processes` that share the images, or None.
    """

    device: torch.device
    workers: int
    threads: int
    processes: Processes | None


class TrainedNetwork(NamedTuple):
    """A network from a snapshot, and the protocol by which it predicts.

    Attributes:
        path: of the snapshot.
        network: prepared for evaluation, on the device.
        config: `Config` of the snapshot.
        classes: `ClassTable` of the results.
        protocol: `Protocol`.
        device: `torch.device`.
    """

    path: Path
    network: torch.nn.Module
    config: Config
    classes: ClassTable
    protocol: Protocol
    device: torch.device

    @classmethod
    def open(cls, path, protocol, device, table=None):
        """Read a snapshot.

        Args:
            path: of the snapshot.
            protocol: `Protocol`.
            device: `torch.device`.
            table: path of a class table that fits the network, or None for the snapshot's classes.
        """
        table = table and ClassTable.read(table)
        network, config = load_network(path, device, protocol.raw_weights, protocol.kernels, table and table.rows)
        classes = table or ClassTable(config.classes, f"classes of {path}")
        if is_exported(path):
            protocol = replace(protocol, amp=network.amp)
        if classes.num_classes != config.network["num_classes"]:
            raise UserError(f"--classes {classes.source}: expected the {config.network['num_classes']} classes of "
                            f"{path}, found {classes.num_classes}")
        for remark in classes.remarks:
            logger.info(remark)
        return cls(path, network, config=config, classes=classes, protocol=protocol, device=device)

    def predictor(self, images=None):
        """The `SlidingPredictor`. images: their number, to show the progress of the first one; None to show nothing."""
        return sliding_predictor(self.network, self.config, self.device, self.protocol,
                                 watch=None if images is None else FirstImage(images))


def main(argv=None):
    show_messages()
    args = recipes.parse_args(get_parser(), argv)
    check(args)
    paths = [Path(name) for name in args.restore_from]
    protocol = protocol_of(args)
    if args.export or args.push:
        options = {"raw_weights": args.raw_weights, "precision": args.export_precision or "fp32",
                   "overwrite": args.overwrite}
        logger.info(memory.catch_out_of_memory(
            lambda: push_snapshot(paths[0], args.push, **options) if args.push else export_snapshot(
                paths[0], Path(args.export), size=args.export_size, **options), protocol.out_of_memory_error))
        return
    devices = select_devices(args.gpu)[:1 if args.benchmark else None]
    if len(devices) > 1 and not started_by_torchrun():
        start_processes(len(devices), argv)
    device = own_device(devices)
    processes = join_processes(device)
    show_messages(rank_and_size(processes)[0])
    workers, cores = share_cores([device], args.num_workers)
    if all(map(is_exported, paths)):        # in the precision of their files
        logger.info(cores)
    else:
        protocol = replace(protocol, amp=args.amp or shared_precision([device], processes))
        reason = "" if args.amp else f": {describe_default(device)}"
        logger.info(f"{cores}; --amp {protocol.amp}{reason}")
    exact_float32(protocol.amp, device)
    machine = Machine(device, workers, writer_threads(device), processes)
    memory.catch_out_of_memory(lambda: perform(args, paths, protocol, machine), protocol.out_of_memory_error)


def perform(args, paths, protocol, machine):
    """Carry out the task that the flags name. No function below knows the flags."""
    images = find_images(args.images) if args.images else {}
    videos = open_videos(images)
    kinds = tuple(dict.fromkeys(args.save or (VIDEO_PICTURES if videos else PICTURES)))
    kinds = () if "none" in kinds else kinds
    root = None if images or args.submission else data_root(args.data_dir, args.images_dir, args.labels_dir)

    def trained(path):
        return TrainedNetwork.open(path, protocol, machine.device, args.classes)

    def data(classes):
        dataset = CityscapesDataset(root, args.split, args.data_list, classes, instances=True)
        if not args.classes:
            check_meaning(root, classes, dataset.pairs[0][1])
        return dataset

    broken = 0
    if args.benchmark:
        if machine.processes is not None:
            raise UserError(f"--benchmark: expected one process, found {machine.processes.size}")
        for path in paths:
            benchmark(trained(path), videos or (ImageFiles(images) if images else data), machine)
    elif args.submission:
        dataset = ImageFiles(images_of_split(args.data_dir, args.split))
        broken = predict(trained(paths[0]), dataset, machine, kinds=("labels",), submission=True,
                         results=ResultsFolder("--submission", Path(args.submission), args.overwrite))
    elif args.images:
        folder = results_folder(paths[0], "images", args.output_dir)
        work, source = (predict_videos, videos) if videos else (predict, ImageFiles(images))
        broken = work(trained(paths[0]), source, machine, kinds=kinds,
                      results=ResultsFolder("--output-dir", folder, args.overwrite))
    else:
        folders = [ResultsFolder("--output-dir", results_folder(path, f"{args.split}{'_raw' * args.raw_weights}",
                                                               args.output_dir, len(paths) > 1),
                                 args.overwrite) for path in paths]
        if rank_and_size(machine.processes)[0] == 0:        # of all snapshots, before hours go into the first
            for results in folders:
                results.check(RESULTS)
        results = [score_snapshot(trained(path), data, machine, kinds=kinds, results=folder)
                   for path, folder in zip(paths, folders, strict=True)]
        if len(results) > 1 and results[0]:
            logger.info(comparison_table(results))
    leave_processes()
    if broken and rank_and_size(machine.processes)[0]:      # the first process says it for all
        sys.exit(1)
    if broken:
        error = UserError(f"--images: expected images that can be read, found {broken} that are skipped")
        error.status = 1        # all others are predicted
        raise error


def score_snapshot(trained, data, machine, *, kinds, results):
    """Score one snapshot.

    Args:
        trained: `TrainedNetwork`.
        data: (class table) → the `CityscapesDataset`.
        machine: `Machine`.
        kinds: pictures to write, of `FOLDERS`.
        results: `ResultsFolder`.

    Returns:
        What `result.json` holds; None in all processes but the first.
    """
    classes, folder, processes = trained.classes, results.folder, machine.processes
    dataset = data(classes)
    make_folder(results, [*SCORES, *picture_files(dataset, kinds)], processes)
    logger.info(f"{trained.path}; {dataset.describe()}")
    predictor = trained.predictor(len(share_items(dataset, processes)))
    evaluation = Evaluation(dataset, Pictures(folder, kinds, classes), trained.protocol.boundary)
    evaluation.run(predictor, machine.workers, processes, machine.threads)
    if processes is not None:
        processes.barrier()        # results are shown when all have written their pictures
    if not evaluation.headline["fine"].matrix.any():
        raise UserError(f"{dataset.pairs[0][1]} and {plural(len(dataset) - 1, 'other label map')}: expected labeled "
                        "pixels to score, found none; --submission FOLDER makes predictions for the Cityscapes "
                        "server")
    if rank_and_size(processes)[0]:
        return None
    result = evaluation.result(trained.path, trained.protocol.as_json(predictor.window, dataset.source, trained.config))
    heads = {head: matrix.scores(classes.names, classes.categories)["class_iou"]
             for head, matrix in evaluation.headline.items()}
    matrix = np.asarray(evaluation.headline["fine"].matrix)
    logger.info(score_table(result))
    files.write_json(folder / "result.json", result)       # first: the disk may have no room for pictures
    charts.confusion_picture(folder / "confusion.png", matrix, classes.names)
    charts.iou_chart(folder / "iou.png", heads, classes.palette)
    write_report(folder / "report.html", result, matrix=matrix, classes=classes.names,
                 palette=classes.palette[:classes.num_classes], entries=evaluation.worst.entries())
    logger.info(describe_results(folder, kinds, ("report.html", "result.json", "iou.png", "confusion.png")))
    return result


def predict(trained, dataset, machine, *, kinds, results, submission=False):
    """Predict images without truth.

    Args:
        trained: `TrainedNetwork`.
        dataset: `ImageFiles`.
        machine: `Machine`.
        kinds: pictures to write, of `FOLDERS`.
        results: `ResultsFolder`.
        submission: whether the results are for the Cityscapes server.

    Returns:
        The number of images that could not be read.
    """
    classes, folder, processes = trained.classes, results.folder, machine.processes
    rank, _ = rank_and_size(processes)
    make_folder(results, picture_files(dataset, kinds) + [SUBMISSION] * submission, processes)
    logger.info(f"{trained.path}; {plural(len(dataset), 'image')}")
    predictor = trained.predictor(len(share_items(dataset, processes)))
    items = load_items(dataset, machine.workers, processes, "predicting", pin_memory=machine.device.type == "cuda")
    _, broken = predict_items(predictor, items, Pictures(folder, kinds, classes, machine.threads))
    count = sum(gather_from_ranks(processes, broken))
    if submission and count:
        raise UserError(f"--submission {folder}: expected every image to be readable, found {count} that are not")
    if rank == 0 and submission:
        logger.info(write_submission(folder / FOLDERS["labels"], dataset, classes))
    elif rank == 0:
        logger.info(f"{plural(len(dataset) - count, 'image')} predicted, {count} skipped; "
                    f"{describe_results(folder, kinds)}")
    if rank == 0:
        results.close()
    return count


def predict_items(predictor, items, pictures):
    """Predict images. Those that cannot be read are skipped with a warning.

    Args:
        predictor: `SlidingPredictor`.
        items: {"image": uint8 (3, H, W), "name"}; or {"error": sentence[, "frames": number of frames]}.
        pictures: `Pictures`.

    Returns:
        (number of predicted images, number of skipped images).
    """
    done = broken = 0
    with pictures:
        for item in items:
            if "error" in item:
                broken += item.get("frames", 1)
                logger.warning(f"skipped: {item['error']}")
                continue
            image = item["image"].permute(1, 2, 0)
            confidence, labels = most_probable(predictor(image))
            pictures.add(item["name"], image, labels, confidence)
            done += 1
    return done, broken


def predict_videos(trained, videos, machine, *, kinds, results):
    """Predict videos, each in one process. A run that is stopped completes the videos with the frames done so far.

    Args:
        trained: `TrainedNetwork`.
        videos: {name: `Video`}.
        machine: `Machine`.
        kinds: pictures to write, of `FOLDERS`.
        results: `ResultsFolder`.

    Returns:
        The number of frames that could not be read.

    Raises:
        Interrupted: after a signal.
    """
    classes, folder, processes = trained.classes, results.folder, machine.processes
    rank, size = rank_and_size(processes)
    make_folder(results, [] if rank else [file for name, video in videos.items() for file in VideoPictures.output_files(
        name, kinds, video.last_frame() if "labels" in kinds else 0)], processes)
    own = list(videos.items())[rank::size]
    logger.info(f"{trained.path}; {plural(len(videos), 'video')}"
                f"{f', each predicted by one of {size} processes' * (size > 1)}")
    predictor = trained.predictor(sum(len(video) for _, video in own) or 1)
    done = broken = 0
    with command.StopRequest() as stop:
        for name, video in own:
            logger.info(f"{video.path}: {plural(len(video) or 'unknown number of', 'frame')}, {video.rate:g} frames/s")
            items = itertools.takewhile(lambda _: not stop.requested, progress(video, name, "frame"))
            pictures = VideoPictures(folder, kinds, classes=classes, name=name, rate=video.rate)
            done, broken = map(sum, zip((done, broken), predict_items(predictor, items, pictures), strict=True))
    if stop.requested and processes is not None:
        raise command.Interrupted(stop.number)
    done, broken = map(sum, zip(*gather_from_ranks(processes, (done, broken)), strict=True))
    if rank == 0:
        results.close()
        logger.info(f"{plural(done, 'frame')} predicted, {broken} skipped{', then stopped' * stop.requested}; "
                    f"{describe_results(folder, kinds)}")
    if stop.requested:
        raise command.Interrupted(stop.number)
    return broken


def benchmark(trained, source, machine):
    """Measure how fast a snapshot predicts, and print the result.

    Args:
        trained: `TrainedNetwork`.
        source: {name: `Video`}, `ImageFiles`, or (class table) → data set; the first images are used.
        machine: `Machine`.
    """
    if isinstance(source, dict):
        items = itertools.chain.from_iterable(source.values())
    else:
        dataset = source if isinstance(source, ImageFiles) else source(trained.classes)
        items = map(dataset.__getitem__, range(len(dataset)))
    images = [item["image"].permute(1, 2, 0) for item in itertools.islice(
        (item for item in items if "image" in item), timing.MAX_RUNS)]
    if not images:
        raise UserError("--images: expected an image that can be read, found none")
    protocol, predictor = trained.protocol, trained.predictor()
    times = timing.time_prediction(predictor, images, timing.MAX_RUNS, timing.MAX_SECONDS)
    logger.info(f"{trained.path} on {device_name(machine.device)}, --amp {protocol.amp}: "
                f"{plural(len(images), 'image')} of "
                f"{', '.join(dict.fromkeys(f'{image.shape[0]}×{image.shape[1]}' for image in images))}; "
                f"{'whole' if predictor.window is None else 'windows of {}×{}'.format(*predictor.window)}, "
                f"{protocol.batch_size} at a time, scales "
                f"{' '.join(f'{scale:g}' for scale in protocol.scales)}{', also mirrored' * protocol.flip}")
    logger.info("{images_per_s:.3g} images/s, {ms:.4g} ms per image (median; spread {spread_ms:.3g}), "
                "{beyond_the_network:.1%} of it beyond the network; peak memory {peak_gb:.2f} GB".format(**times))


if __name__ == "__main__":
    command.run(main)
