"""Check a data set before training on it: `python -m dataset.check DATA`.

    python -m dataset.check CITYSCAPES
    python -m dataset.check DATA --data-list DATA/train.lst DATA/val.lst --classes DATA/classes.csv
    python -m dataset.check --images-dir DATA/images --labels-dir DATA/labels
    python -m dataset.check CITYSCAPES --fast        only a few files of each split

Decodes every image and label map, with several processes. Finds missing and unreadable files, images with the same
content, label maps that differ in size from their image, and values that are not in the class table. Prints a summary
of each split; writes check.json, a chart of the class frequencies, and contact sheets (images with their label maps as
overlays). The exit status is 1 if there are problems.
"""

import contextlib
import hashlib
import itertools
import json
import math
import os
from pathlib import Path

if __name__ == "__main__":      # before any import of a package that may be missing
    from utils import environment
    environment.check_packages()

import cv2
import numpy as np
from PIL import Image

from utils.common import command, files, flags
from utils.common.errors import UserError, plural
from utils.common.files import read_file
from utils.common.progress import progress
from utils.imaging.classes import IGNORE_INDEX
from utils.imaging.decode import read_ids, read_image, read_palette, size_mismatch, unclear_orientation
from utils.imaging.draw import overlay, panel, save_png
from utils.parallel.workers import MOST_WORKERS, do_jobs
from utils.reports import charts

from .cityscapes import COARSE, OFFICIAL_COUNTS, check_name, compare_palettes, read_pairs, split_files
from .folders import (
    DEFAULT_SPLITS,
    DEFAULT_TABLE,
    OTHER_LAYOUTS,
    add_data_flags,
    check_folder,
    data_flag,
    data_root,
    match_stems,
    pair_folders,
    read_table,
    report_loose_files,
    shared_splits,
)
from .infer import ASSUMED, infer_classes, keep_table
from .labels import TableNeeded

FAST_PAIRS = 16         # pairs of each split that --fast checks
SHEET_PAIRS = 12        # pairs on a contact sheet
SHEET_WIDTH = 320       # width of each picture on it, pixels
MAX_PROBLEMS = 5        # printed problems of one kind; check.json has all
SPLITS = ("train", "val", "test", COARSE)


def inspect_pair(job):
    """Check one image and its label map, and collect statistics.

    Args:
        job: (image path, label path, `ClassTable`).

    Returns:
        A dict of plain values: image and label (paths), problems [(kind, sentence)], and remarks [(kind, sentence)]
        about files that are readable, but only in part or after a change. For a readable image also size [H, W], hash
        (SHA-256 of the file), sum and squares (sums of values and of squared values of each channel); for a readable
        label map also classes (256 pixel counts by train id) and palette.
    """
    image_path, label_path, classes = job
    facts = {"image": str(image_path), "label": str(label_path), "problems": [], "remarks": []}
    image = ids = None
    try:
        image = read_image(image_path, lambda *remark: facts["remarks"].append(remark))
        mean, std = (values[:, 0] for values in cv2.meanStdDev(image))
        pixels = image.shape[0] * image.shape[1]
        facts |= {"size": list(image.shape[:2]), "hash": hashlib.sha256(read_file(image_path)).hexdigest(),
                  "sum": (mean * pixels).tolist(), "squares": ((std ** 2 + mean ** 2) * pixels).tolist()}
    except UserError as error:
        facts["problems"].append(("unreadable image", str(error)))
    try:
        check_name(label_path, classes)
        ids = read_ids(label_path)
        train_ids = classes.encode(ids, label_path)
        facts["palette"] = read_palette(label_path)
        facts["classes"] = np.bincount(train_ids.ravel(), minlength=256).tolist()
        if ids.ndim == 2 and classes.looks_like_train_ids(ids):
            facts["problems"].append(("looks like train ids", f"{label_path}: expected ids, found values that look "
                                      "like train ids"))
    except UserError as error:
        facts["problems"].append(("label map", str(error)))
    if image is not None and ids is not None and (sentence := unclear_orientation(image_path, label_path)):
        facts["remarks"].append(("turned by EXIF", sentence))
    if image is not None and ids is not None and image.shape[:2] != ids.shape[:2]:
        facts["problems"].append(("sizes differ", size_mismatch(image_path, image, label_path, ids)))
    return facts


def find_pairs(root, split):
    """Pair the files of a Cityscapes split.

    Returns:
        [(image, label map)], and problems [(kind, sentence)]: files without a partner.
    """
    images, labels, truth = split_files(root, split)
    problems = [("label map missing", f"{images[key]}: expected its label map in {truth}/{split}, found none")
                for key in sorted(images.keys() - labels.keys()) if split != "test"]
    problems += [("image missing", f"{labels[key]}: expected its image in leftImg8bit/{split}, found none")
                 for key in sorted(labels.keys() - images.keys())]
    return [(images[key], labels[key]) for key in images if key in labels], problems


def find_pairs_of_folders(folders):
    """Pair the files of an image folder and a label map folder; returns the same as `find_pairs`."""
    pairs, images, labels = match_stems(folders)
    problems = [("label map missing", f"{path}: expected its label map in {folders[1]}, found none") for path in images]
    problems += [("image missing", f"{path}: expected its image in {folders[0]}, found none") for path in labels]
    return pairs, problems


def find_splits(root, lists):
    """Find the pairs of all splits or lists.

    Args:
        root: from `data_root`.
        lists: paths of lists, or None.

    Returns:
        {name of split or list: (pairs, problems)}, as from `find_pairs`; a split of two folders is named by the path of
        its images.

    Raises:
        UserError: if there are no pairs at all.
    """
    if lists:
        contents = {str(path): read_pairs(root, path) for path in lists}
        splits = {path: (pairs, [("line of a list", text) for text in errors])
                  for path, (pairs, _, errors) in contents.items()}
        message = next((text for _, problems in splits.values() for _, text in problems), None)
    elif isinstance(root, tuple):
        names = shared_splits(root)
        if names:
            report_loose_files(root, names)
        folder_pairs = [tuple(os.path.join(folder, name) for folder in root) for name in names] or [root]
        splits = {folders[0]: find_pairs_of_folders(folders) for folders in folder_pairs}
        if not any(pairs for pairs, _ in splits.values()):
            pair_folders(root, names or DEFAULT_SPLITS[:1])     # raises an error with a remedy
    else:
        check_folder(root)
        splits = {split: find_pairs(Path(root), split) for split in SPLITS if Path(root, "leftImg8bit", split).is_dir()}
        message = (f"{root}: expected leftImg8bit/<split>/<city>/*_leftImg8bit.png with label maps in gtFine, found "
                   f"none; {OTHER_LAYOUTS}")
    if not any(pairs for pairs, _ in splits.values()):
        raise UserError(message)
    return splits


def find_duplicates(facts):
    """Find images with identical files.

    Args:
        facts: {split: [dict of `inspect_pair`]}.

    Returns:
        Problems [(kind, sentence)].
    """
    places = {}
    for split, entries in facts.items():
        for entry in entries:
            if "hash" in entry:
                places.setdefault(entry["hash"], []).append((split, entry["image"]))
    problems = []
    for same in places.values():
        if len(same) > 1:
            leak = len({split for split, _ in same}) > 1
            problems.append(("image in several splits" if leak else "image twice in a split",
                             " = ".join(f"{image} ({split})" for split, image in same)))
    return problems


def summarize(split, entries, problems, classes, num_pairs):
    """Make the entry of a split in check.json.

    Args:
        split: its name.
        entries: dicts of `inspect_pair`.
        problems: [(kind, sentence)].
        classes: `ClassTable`.
        num_pairs: number of pairs in the split, checked or not.
    """
    sums, squares = (np.sum([entry[key] for entry in entries if key in entry] or [[0, 0, 0]], axis=0, dtype=float)
                     for key in ("sum", "squares"))
    pixels = sum(math.prod(entry["size"]) for entry in entries if "size" in entry)
    mean = sums / max(pixels, 1)
    counts = np.sum([entry["classes"] for entry in entries if "classes" in entry] or [[0] * 256], axis=0)
    n = classes.num_classes
    with_class = np.sum([np.asarray(entry["classes"]) > 0 for entry in entries if "classes" in entry]
                        or [[False] * 256], axis=0)
    sizes = {}
    for entry in entries:
        if "size" in entry:
            key = f"{entry['size'][1]}×{entry['size'][0]}"
            sizes[key] = sizes.get(key, 0) + 1
    return {"pairs": num_pairs, "looked_into": len(entries), "official": OFFICIAL_COUNTS.get(split), "sizes": sizes,
            "mean": mean.round(3).tolist(), "std": np.sqrt(np.maximum(squares / max(pixels, 1) - mean ** 2, 0))
            .round(3).tolist(), "pixels": dict(zip(classes.names, counts[:n].tolist(), strict=True)),
            "images_with": dict(zip(classes.names, with_class[:n].tolist(), strict=True)),
            "ignored_pixels": int(counts[IGNORE_INDEX]),
            "problems": [{"kind": kind, "text": text} for kind, text in problems],
            "remarks": [{"kind": kind, "text": text} for entry in entries for kind, text in entry["remarks"]]}


def choose_evenly(items, count):
    """Choose up to `count` items, spread evenly over a list."""
    count = min(count, len(items))
    return [items[len(items) * k // count] for k in range(count)]


def contact_sheet(path, entries, classes):
    """Write a picture of some pairs of a split: each image, and beside it the image with its label map as overlay."""
    valid = [entry for entry in entries if not entry["problems"]]
    if not valid:
        return
    tiles = []
    for entry in choose_evenly(valid, SHEET_PAIRS):
        image, labels = read_image(entry["image"]), classes.encode(read_ids(entry["label"]), entry["label"])
        pair = panel([image, overlay(image, classes.color(labels))])
        height = max(1, round(image.shape[0] * SHEET_WIDTH / image.shape[1]))
        tiles.append(np.asarray(Image.fromarray(pair).resize((2 * SHEET_WIDTH, height))))
    tallest = max(tile.shape[0] for tile in tiles)
    tiles = [np.pad(tile, ((0, tallest - tile.shape[0]), (0, 0), (0, 0))) for tile in tiles]
    tiles += [np.zeros_like(tiles[0])] * (-len(tiles) % 2)
    rows = [np.concatenate(tiles[k:k + 2], axis=1) for k in range(0, len(tiles), 2)]
    save_png(path, np.concatenate(rows))


def check(splits, classes, fast, workers):
    """Inspect the pairs of all splits.

    Args:
        splits: from `find_splits`.
        classes: `ClassTable`.
        fast: whether to inspect only some pairs of each split.
        workers: number of processes, as in `do_jobs`.

    Returns:
        {split: its entry in check.json}, {split: [dict of `inspect_pair`]}.
    """
    facts, report = {}, {}
    chosen = {split: choose_evenly(pairs, FAST_PAIRS) if fast else pairs for split, (pairs, _) in splits.items()}
    inspected = iter(do_jobs(inspect_pair, [(*pair, classes) for pair in itertools.chain(*chosen.values())], workers))
    for split, pairs in chosen.items():
        facts[split] = list(progress(itertools.islice(inspected, len(pairs)), f"checking {split}", "image",
                                     total=len(pairs)))
    copies = find_duplicates(facts)
    for split, (pairs, problems) in splits.items():
        entries = facts[split]
        problems = [*problems, *(problem for entry in entries for problem in entry["problems"]),
                    *(problem for problem in copies if f"({split})" in problem[1])]
        contradiction, sentence = compare_palettes((entry["label"], entry.get("palette", {})) for entry in entries)
        if contradiction:
            problems.append(("palettes differ", sentence))
        elif sentence:
            entries[0]["remarks"].append(("palettes differ", sentence))
        # The label maps of the official test split have only ignored ids, since its ground truth is not published.
        labeled = sum(sum(entry["classes"][:classes.num_classes]) for entry in entries if "classes" in entry)
        if entries and not labeled and split != "test":
            problems.append(("nothing labeled", f"{split}: expected pixels of the {classes.num_classes} classes, "
                             "found only ignored ones"))
        report[split] = summarize(split, entries, problems=problems, classes=classes, num_pairs=len(pairs))
        absent = [name for name, pixels in report[split]["pixels"].items() if not pixels]
        if absent and labeled and len(entries) == len(pairs):
            report[split]["remarks"].append({"kind": "classes without pixels", "text": f"{split}: no pixels of "
                                             + ", ".join(absent)})
    return report, facts


def draw_pictures(folder, report, facts, classes):
    """Write the contact sheets and the chart of class frequencies, of all files that could be read."""
    for split, entries in facts.items():
        contact_sheet(folder / f"sheet_{Path(split).stem[:60]}.png", entries, classes)
    pixels = {split: summary["pixels"] for split, summary in report.items() if any(summary["pixels"].values())}
    if pixels:
        charts.frequency_chart(folder / "classes.png", pixels, classes.palette)


def format_report(report):
    """Format the entries of check.json as text, with a paragraph for each split."""
    lines = []
    for split, summary in report.items():
        official = f" (official: {summary['official']})" if summary["official"] else ""
        looked = "" if summary["looked_into"] == summary["pairs"] else f", {summary['looked_into']} looked into"
        lines.append(f"{split}: {plural(summary['pairs'], 'pair')}{official}{looked}; sizes "
                     + ", ".join(f"{size} ({count})" for size, count in sorted(summary["sizes"].items())[:4])
                     + (" ..." if len(summary["sizes"]) > 4 else ""))
        lines.append(f"  mean {summary['mean']}, std {summary['std']} (RGB, 0 to 255)")
        total = sum(summary["pixels"].values()) + summary["ignored_pixels"]
        for name, pixels in summary["pixels"].items():
            lines.append(f"  {name:<24}{100 * pixels / max(total, 1):7.3f} % of pixels, in "
                         f"{plural(summary['images_with'][name], 'image')}")
        lines.append(f"  {'ignored':<24}{100 * summary['ignored_pixels'] / max(total, 1):7.3f} %")
        lines += format_entries("WRONG", summary["problems"], MAX_PROBLEMS)
        lines += format_entries("NOTE", summary["remarks"], 1)
    return "\n".join(lines)


def format_entries(title, entries, limit):
    """Format problems or remarks [{"kind", "text"}] as lines: a heading for each kind, and its first `limit` texts."""
    lines, kinds = [], {}
    for entry in entries:
        kinds.setdefault(entry["kind"], []).append(entry["text"])
    for kind, texts in kinds.items():
        lines += [f"  {title}, {kind}: {len(texts)}", *(f"    {text}" for text in texts[:limit])]
        if len(texts) > limit:
            lines.append("    ... (all in check.json)")
    return lines


def make_folder(folder):
    """Create the folder of the results. Raises `UserError` if this fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output-dir {folder}: expected a folder, found: {error}") from None


def label_maps(splits):
    """List {split or list: paths of its label maps} for `splits` from `find_splits`.

    Splits of two folders, which are named by paths there, are named by their last folder here.
    """
    return {os.path.basename(name) if os.path.isdir(name) else name: [label for _, label in pairs]
            for name, (pairs, _) in splits.items()}


def _read_report(folder):
    """Read the check.json of an earlier check; {} if the folder has none."""
    try:
        report = json.loads(read_file(folder / "check.json"))
    except (UserError, ValueError, RecursionError):     # no file, or a file of another program
        return {}
    return report if isinstance(report, dict) else {}


def _earlier_table(folder):
    """Read from check.json the class table, as CSV text, that an earlier check inferred and wrote; or None."""
    table = _read_report(folder).get("classes")
    return table if isinstance(table, str) else None


def default_folder(data):
    """Return the default folder of the results: runs/check_NAME or, if other data have it, runs/check_NAME_2, ...

    Args:
        data: absolute path of the data set, or a list of those of its two folders.
    """
    name = os.path.basename(data if isinstance(data, str) else os.path.dirname(data[0]))
    for number in itertools.count(1):
        folder = Path("runs", f"check_{name}" + f"_{number}" * (number > 1))
        if _read_report(folder).get("data") in (None, data):
            return folder


def write_draft_table(folder, data, error):
    """Write the table of a `TableNeeded` error for the user to edit, and raise a `UserError` that names the file.

    check.json has the same table, so that a later check can replace it unless the user has edited it. Does nothing if
    the error has no table, or the file is the user's.

    Args:
        folder: of the results.
        data: as for `default_folder`.
        error: `TableNeeded`.
    """
    if error.table is None:
        return
    make_folder(folder)
    with contextlib.suppress(UserError):
        keep_table(folder / "classes.csv", error.table, _earlier_table(folder))
        files.write_json(folder / "check.json", {"data": data, "error": str(error), "classes": error.table.as_csv()})
        error = UserError(f"{error}; such a table was written to {folder / 'classes.csv'}, to be edited")
    raise error from None


def main():
    parser = flags.Parser(prog="python -m dataset.check", usage="%(prog)s [data_dir] [flags]",
                        description="Check a data set before training on it.", epilog=__doc__)
    parser.add_argument("folder", metavar="data_dir", type=flags.path, nargs="?",
                        help="folder with leftImg8bit/ and gtFine/, or the root of --data-list")
    parser.add_argument("--data-dir", type=flags.path, help="the same folder, given by a flag as in train.py")
    add_data_flags(parser, DEFAULT_TABLE)
    parser.add_argument("--output-dir", type=flags.path, help="folder of the results (default: runs/check_NAME, where "
                        "NAME is the name of the data folder, or NAME_2, ... if other data have it)")
    parser.add_argument("--fast", action="store_true", help=f"check only {FAST_PAIRS} pairs of each split")
    parser.add_argument("--num-workers", type=flags.num_workers, help="worker processes; 0 to use only this "
                        f"process (default: one per core, at most {MOST_WORKERS})")
    args = parser.parse_args()
    root = data_root(args.data_dir or args.folder, args.images_dir, args.labels_dir)
    data = list(map(os.path.abspath, root)) if isinstance(root, tuple) else os.path.abspath(root)
    folder = Path(args.output_dir) if args.output_dir else default_folder(data)
    try:
        classes = read_table(args.classes, args.images_dir, args.data_list)
        splits = find_splits(root, args.data_list)
        if classes is None:
            classes = infer_classes(label_maps(splits), root, data_flag(args), args.num_workers, folder / "classes.csv",
                                    skip_unreadable=True)
    except TableNeeded as error:
        write_draft_table(folder, data, error)
        raise
    for remark in classes.remarks:
        print(remark)
    make_folder(folder)
    assumed = classes.as_csv() if classes.source == ASSUMED else None
    if assumed:
        keep_table(folder / "classes.csv", classes, _earlier_table(folder))
    report, facts = check(splits, classes, args.fast, args.num_workers)
    print(format_report(report))
    files.write_json(folder / "check.json", {"data": data, "fast": args.fast, "splits": report,
                                             "classes": assumed})
    draw_pictures(folder, report, facts, classes)
    problems = sum(len(summary["problems"]) for summary in report.values())
    print(f"{plural(problems, 'problem')}; check.json and pictures of valid pairs are in {folder}")
    if problems:
        raise SystemExit(1)


if __name__ == "__main__":
    command.run(main)
