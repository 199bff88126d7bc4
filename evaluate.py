"""Score a snapshot of train.py.

The paper's protocol (sliding window, scales 0.75 to 2.0 by 0.25, mirror):

    python evaluate.py --data-dir CITYSCAPES --restore-from snapshots/CS_scenes_60000.pth --gpu 0

The quick answer:

    python evaluate.py --data-dir CITYSCAPES --restore-from snapshots/CS_scenes_60000.pth --scales 1.0 --no-flip

Several GPUs share the images: --gpu 0,1,2,3, or torchrun --nproc_per_node 4 in place of python.
"""

import argparse
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Subset

from dataset.cityscapes import CityscapesDataset
from dataset.labels import IGNORE_INDEX, ClassTable
from networks import build_network
from utils import checkpoint, cli, visualize
from utils.cli import UserError
from utils.distributed import (
    join_processes,
    leave_processes,
    own_device,
    select_devices,
    share_cores,
    start_processes,
    started_by_torchrun,
)
from utils.inference import Normalization, SlidingPredictor, round_window, score
from utils.logger import progress, speak_for_all
from utils.precision import AUTOCAST

PAPER_SCALES = (0.75, 1.0, 1.25, 1.5, 1.75, 2.0)
SAVED = ("labelIds", "color", "overlay")


def get_parser():
    parser = cli.Parser(description="Score a snapshot.", epilog=__doc__,
                        formatter_class=argparse.RawDescriptionHelpFormatter)
    data = parser.add_argument_group("data")
    data.add_argument("--data-dir", required=True,
                      help="folder with leftImg8bit/ and gtFine/, or the root of --data-list")
    data.add_argument("--data-list", help="file of \"image label\" lines, paths relative to --data-dir")
    data.add_argument("--split", default="val", help="split to scan (val)")
    data.add_argument("--classes", help="class table (CSV); default: the one the snapshot was trained with")
    data.add_argument("--num-workers", type=cli.not_negative(int),
                      help="processes that read images, for each that predicts; default: by the number of cores")

    protocol = parser.add_argument_group("protocol")
    protocol.add_argument("--restore-from", nargs="+", required=True, metavar="FILE", help="snapshot of train.py")
    protocol.add_argument("--input-size", type=cli.size, metavar="H,W", help="window; default: the training crop")
    protocol.add_argument("--overlap", type=cli.probability, default=1 / 3, help="of neighbouring windows (1/3)")
    protocol.add_argument("--whole", action="store_true", help="the whole image at once, no windows")
    protocol.add_argument("--scales", type=cli.positive(float), nargs="+", default=PAPER_SCALES,
                          help="(0.75 1.0 1.25 1.5 1.75 2.0)")
    protocol.add_argument("--flip", action=argparse.BooleanOptionalAction, default=True, help="run mirrored too (yes)")

    run = parser.add_argument_group("machine")
    run.add_argument("--gpu", help="ids such as 0,1, which share the images, or cpu; default: all visible GPUs, "
                     "else the CPU")
    run.add_argument("--batch-size", type=cli.positive(int), default=4, help="windows at a time (4)")
    run.add_argument("--amp", choices=("off", "bf16", "fp16"), default="off", help="mixed precision (off)")

    out = parser.add_argument_group("results")
    out.add_argument("--output-dir", help="default: a folder named after the snapshot and the split, beside it")
    out.add_argument("--overwrite", action="store_true", help="replace the results of an earlier run there")
    out.add_argument("--save", nargs="+", choices=(*SAVED, "none"), default=SAVED,
                     help="pictures of each image: label ids, colours, colours over the image (all)")
    return parser


def load_network(path, device):
    """Snapshot file → (network in evaluation mode, its config)."""
    content = checkpoint.load_snapshot(path)
    network = build_network(**content["config"]["network"])
    try:
        network.load_state_dict(content["model"])
    except RuntimeError as error:
        raise UserError(f"{path}: expected the weights its config describes, found: "
                        f"{str(error).splitlines()[1].strip()}") from None
    return network.to(device).eval(), content["config"]


def save_predictions(folder, name, image, labels, classes, kinds):
    """Write the pictures of one image. image (H, W, 3) uint8, labels (H, W) train ids."""
    if "labelIds" in kinds:
        visualize.save_png(folder / "labelIds" / f"{name}.png", classes.decode(labels))
    if "color" in kinds:
        visualize.save_png(folder / "color" / f"{name}.png", classes.color(labels))
    if "overlay" in kinds:
        visualize.save_png(folder / "overlay" / f"{name}.png", visualize.overlay(image, classes.color(labels)))


def evaluate(predictor, dataset, folder, kinds, num_workers, processes=None):
    """Run over a data set once, this process over its share. Returns {protocol: {head: ConfusionMatrix}} of all;
    writes the headline's pictures."""
    classes = dataset.classes
    rank, world = (processes.rank, processes.size) if processes else (0, 1)
    mine = Subset(dataset, range(rank, len(dataset), world))        # no padding: each image counts once
    items = progress(DataLoader(mine, batch_size=None, num_workers=num_workers), "evaluating", "image")
    with ThreadPoolExecutor(2) as writers:
        written = []

        def keep(item, labels):
            if kinds:
                written.append(writers.submit(save_predictions, folder, item["name"],
                                              item["image"].permute(1, 2, 0).numpy(),
                                              labels.to(torch.uint8).cpu().numpy(), classes, kinds))

        matrices = score(predictor, items, classes.num_classes, IGNORE_INDEX, processes, keep)
        for job in written:
            job.result()
    return matrices


def summarise(matrices, classes, checkpoint_path, num_images, protocol):
    """What `result.json` holds. The headline is the fine head's, of the richest protocol that was run."""
    scores = {name: {head: matrix.scores(classes.names, classes.categories) for head, matrix in heads.items()}
              for name, heads in matrices.items()}
    headline = scores.get("multi_scale") or scores["single_scale"]
    return {
        "mean_iou": headline["fine"]["mean_iou"],
        **{name: heads["fine"] for name, heads in scores.items()},
        **({"coarse": {name: heads["coarse"] for name, heads in scores.items()}} if "coarse" in headline else {}),
        "num_images": num_images, "checkpoint": str(checkpoint_path), "protocol": protocol,
    }


def table(result):
    """The scores as lines of text: a column for each protocol and head."""
    columns = {}
    for name in ("single_scale", "multi_scale"):
        if name in result:
            if "coarse" in result:
                columns[f"{name[:-6]} coarse"] = result["coarse"][name]
            columns[f"{name[:-6]} fine"] = result[name]
    first = next(iter(columns.values()))
    wide = max(map(len, [*first["class_iou"], "mean IoU (categories)"]))
    lines = [" " * wide + "".join(f"{name:>15}" for name in columns)]

    def add(label, values):
        shown = ("not in data" if value is None else f"{100 * value:.2f}" for value in values)
        lines.append(f"{label:<{wide}}" + "".join(f"{text:>15}" for text in shown))

    for name in first["class_iou"]:
        add(name, [scores["class_iou"][name] for scores in columns.values()])
    lines.append("-" * len(lines[0]))
    add("mean IoU", [scores["mean_iou"] for scores in columns.values()])
    add("mean IoU (categories)", [scores["mean_category_iou"] for scores in columns.values()])
    add("pixel accuracy", [scores["pixel_accuracy"] for scores in columns.values()])
    lines.append(f"IoU in per cent; mean over {first['classes_averaged']} of {len(first['class_iou'])} classes")
    return "\n".join(lines)


def results_folder(args, path):
    return Path(args.output_dir or path.with_name(f"{path.stem}_{args.split}"))


def output_folder(args, path):
    """The folder for the results, made and without old pictures. Raises `UserError` if results lie there already."""
    folder = results_folder(args, path)
    earlier = [name for name in ("result.json", *SAVED) if (folder / name).exists()]
    if earlier and not args.overwrite:
        raise UserError(f"--output-dir {folder}: expected a folder without results (or --overwrite), found "
                        f"{', '.join(earlier)}")
    for name in SAVED:      # pictures of other images must not stay among the new ones
        for file in (folder / name).glob("*.png"):
            file.unlink()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output-dir {folder}: expected a folder, found: {error}") from None
    if not os.access(folder, os.W_OK):
        raise UserError(f"--output-dir {folder}: expected a folder that can be written, found one that cannot")
    return folder


def main(argv=None):
    args = get_parser().parse_args(argv)
    if len(args.restore_from) > 1:
        raise UserError(f"--restore-from: expected one snapshot, found {len(args.restore_from)}: "
                        f"{' '.join(args.restore_from)}")
    if args.overlap >= 1:
        raise UserError("--overlap: expected a share below 1, found 1")
    path = Path(args.restore_from[0])
    devices = select_devices(args.gpu)
    if len(devices) > 1 and not started_by_torchrun():
        start_processes(len(devices), argv)
    device = own_device(devices) if started_by_torchrun() else devices[0]
    processes = join_processes(device)
    speak_for_all(processes)
    workers, cores = share_cores([device], args.num_workers)
    network, config = load_network(path, device)
    classes = ClassTable.read(args.classes) if args.classes else ClassTable(config["classes"], f"classes of {path}")
    if classes.num_classes != config["network"]["num_classes"]:
        raise UserError(f"--classes {args.classes}: expected the {config['network']['num_classes']} classes of "
                        f"{path}, found {classes.num_classes}")
    dataset = CityscapesDataset(args.data_dir, args.split, args.data_list, classes)
    first = processes is None or processes.rank == 0
    folder = output_folder(args, path) if first else results_folder(args, path)
    if processes is not None:
        processes.wait()        # for the first one, which clears the folder
    print(dataset.describe())
    print(cores)

    window = None if args.whole else args.input_size or tuple(config["input_size"])
    if window and round_window(window) != tuple(window):
        print(f"windows of {window[0]}×{window[1]} are rounded up to {'×'.join(map(str, round_window(window)))}: "
              "logits fit the pixels at 8k + 1 only")
    window = window and round_window(window)
    predictor = SlidingPredictor(network, window, args.overlap, args.scales, args.flip, args.batch_size,
                                 Normalization.from_config(config["normalization"]), device, AUTOCAST[args.amp])
    kinds = () if "none" in args.save else args.save
    matrices = evaluate(predictor, dataset, folder, kinds, workers, processes)
    protocol = {"window": window and list(window), "overlap": None if args.whole else args.overlap,
                "scales": list(args.scales), "flip": args.flip, "amp": args.amp, "split": args.split,
                "average": "probabilities"}
    if first:
        report(folder, matrices, classes, path, len(dataset), protocol, kinds)
    leave_processes()


def report(folder, matrices, classes, path, num_images, protocol, kinds):
    """Write and print the scores."""
    result = summarise(matrices, classes, path, num_images, protocol)
    headline = list(matrices.values())[-1]
    heads = {head: matrix.scores(classes.names, classes.categories)["class_iou"] for head, matrix in headline.items()}
    visualize.confusion_picture(folder / "confusion.png", np.asarray(headline["fine"].matrix), classes.names)
    visualize.iou_chart(folder / "iou.png", heads, classes.palette)
    checkpoint.write_atomically(folder / "result.json",
                                lambda file: file.write((json.dumps(result, indent=2) + "\n").encode()))
    print(table(result))
    print(f"results in {folder}: result.json, iou.png, confusion.png{''.join(f', {kind}/' for kind in kinds)}")


if __name__ == "__main__":
    cli.run(main)
