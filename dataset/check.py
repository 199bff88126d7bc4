"""Check a data set before a long training: `python -m dataset.check DATA`.

    python -m dataset.check CITYSCAPES
    python -m dataset.check DATA --data-list DATA/train.lst DATA/val.lst --classes DATA/classes.csv
    python -m dataset.check --images-dir DATA/images --labels-dir DATA/labels
    python -m dataset.check CITYSCAPES --fast        a few files of each split

Decodes every image and label map, on all cores. Looks for files that are missing, unreadable or twice there, label maps
of another size than their image, and values that the class table does not know. Prints a summary of each split; writes
check.json, a chart of the class frequencies and contact sheets (images under their label maps). Exit status 1 when
something is wrong.
"""

import hashlib
import itertools
import json
import math
import os
from pathlib import Path

if __name__ == "__main__":      # before anything is imported that may be missing
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
from utils.metrics import charts
from utils.parallel.workers import MOST_WORKERS, do_jobs

from .cityscapes import COARSE, OFFICIAL_COUNTS, check_name, compare_palettes, read_pairs, split_files
from .folders import (
    DEFAULT_SPLITS,
    DEFAULT_TABLE,
    OTHER_LAYOUTS,
    add_data_flags,
    check_folder,
    data_flag,
    data_root,
    match,
    name_loose_files,
    pair_folders,
    read_table,
    splits_of,
)
from .infer import ASSUMED, infer_classes, keep_table
from .labels import TableNeeded

FAST = 16           # pairs of each split that --fast looks into
SHEET = 12          # pairs on a contact sheet
WIDTH = 320         # of each of its pictures, pixels
SHOWN = 5           # problems of one kind that are printed; check.json holds all
SPLITS = ("train", "val", "test", COARSE)


def inspect(job):
    """What can be said of one image and its label map: a dict of plain values, also for files that cannot be read.

    job: (image path, label path, `ClassTable`). The dict holds image, label (paths), problems [(kind, sentence)] and
    remarks of the same form about what is read, but not as the file has it;
    of a readable image size (H, W), hash, sum and squares (of the values of each channel); of a readable label map
    classes (256 counts of pixels by train id) and palette.
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
    """The [(image, label map)] of a split, and problems [(kind, sentence)]: files that lack their partner."""
    images, labels, truth = split_files(root, split)
    problems = [("label map missing", f"{images[key]}: expected its label map in {truth}/{split}, found none")
                for key in sorted(images.keys() - labels.keys()) if split != "test"]
    problems += [("image missing", f"{labels[key]}: expected its image in leftImg8bit/{split}, found none")
                 for key in sorted(labels.keys() - images.keys())]
    return [(images[key], labels[key]) for key in images if key in labels], problems


def find_partners(folders):
    """The same of two folders, of images and of label maps."""
    pairs, images, labels = match(folders)
    return pairs, [*(("label map missing", f"{path}: expected its label map in {folders[1]}, found none") for path in
                     images),
                   *(("image missing", f"{path}: expected its image in {folders[0]}, found none") for path in labels)]


def find_splits(root, lists):
    """{name of split or list: (pairs, problems)}. Raises `UserError` where there is nothing."""
    if lists:
        read = {str(path): read_pairs(root, path) for path in lists}
        found = {path: (pairs, [("line of a list", text) for text in wrong]) for path, (pairs, _, wrong) in
                 read.items()}
        expected = next((text for _, problems in found.values() for _, text in problems), None)
    elif isinstance(root, tuple):
        splits = splits_of(root)
        if splits:
            name_loose_files(root, splits)
        places = [tuple(os.path.join(folder, name) for folder in root) for name in splits] or [root]
        found = {folders[0]: find_partners(folders) for folders in places}
        if not any(pairs for pairs, _ in found.values()):
            pair_folders(root, splits or DEFAULT_SPLITS[:1])        # raises, with what helps
    else:
        check_folder(root)
        found = {split: find_pairs(Path(root), split) for split in SPLITS if Path(root, "leftImg8bit", split).is_dir()}
        expected = (f"{root}: expected leftImg8bit/<split>/<city>/*_leftImg8bit.png with label maps in gtFine, found "
                    f"none; {OTHER_LAYOUTS}")
    if not any(pairs for pairs, _ in found.values()):
        raise UserError(expected)
    return found


def duplicates(facts):
    """Problems [(kind, sentence)]: images whose files are equal. facts: {split: [what `inspect` says]}."""
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


def summarize(split, entries, problems, classes, listed):
    """What check.json holds of a split.

    entries: what `inspect` says of its pairs; problems: [(kind, sentence)]; listed: number of pairs in the split.
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
    return {"pairs": listed, "looked_into": len(entries), "official": OFFICIAL_COUNTS.get(split), "sizes": sizes,
            "mean": mean.round(3).tolist(), "std": np.sqrt(np.maximum(squares / max(pixels, 1) - mean ** 2, 0))
            .round(3).tolist(), "pixels": dict(zip(classes.names, counts[:n].tolist(), strict=True)),
            "images_with": dict(zip(classes.names, with_class[:n].tolist(), strict=True)),
            "ignored_pixels": int(counts[IGNORE_INDEX]),
            "problems": [{"kind": kind, "text": text} for kind, text in problems],
            "remarks": [{"kind": kind, "text": text} for entry in entries for kind, text in entry["remarks"]]}


def evenly(items, count):
    """Up to `count` items of a list, spread evenly over it."""
    count = min(count, len(items))
    return [items[len(items) * k // count] for k in range(count)]


def contact_sheet(path, entries, classes):
    """Write pairs, spread evenly over a split: each image, and beside it the same under its label map."""
    good = [entry for entry in entries if not entry["problems"]]
    if not good:
        return
    tiles = []
    for entry in evenly(good, SHEET):
        image, labels = read_image(entry["image"]), classes.encode(read_ids(entry["label"]), entry["label"])
        pair = panel([image, overlay(image, classes.color(labels))])
        height = max(1, round(image.shape[0] * WIDTH / image.shape[1]))
        tiles.append(np.asarray(Image.fromarray(pair).resize((2 * WIDTH, height))))
    tallest = max(tile.shape[0] for tile in tiles)
    tiles = [np.pad(tile, ((0, tallest - tile.shape[0]), (0, 0), (0, 0))) for tile in tiles]
    tiles += [np.zeros_like(tiles[0])] * (-len(tiles) % 2)
    rows = [np.concatenate(tiles[k:k + 2], axis=1) for k in range(0, len(tiles), 2)]
    save_png(path, np.concatenate(rows))


def check(splits, classes, fast, workers):
    """Inspect the pairs of all splits, or with `fast` some of each, in `workers` processes, as in `do_jobs`.

    Returns {split: what check.json holds of it}, {split: [what `inspect` says]}.
    """
    facts, report = {}, {}
    chosen = {split: evenly(pairs, FAST) if fast else pairs for split, (pairs, _) in splits.items()}
    done = iter(do_jobs(inspect, [(*pair, classes) for pair in itertools.chain(*chosen.values())], workers))
    for split, pairs in chosen.items():
        facts[split] = list(progress(itertools.islice(done, len(pairs)), f"checking {split}", "image",
                                     total=len(pairs)))
    leaks = duplicates(facts)
    for split, (pairs, problems) in splits.items():
        entries = facts[split]
        problems = [*problems, *(problem for entry in entries for problem in entry["problems"]),
                    *(leak for leak in leaks if f"({split})" in leak[1])]
        contradiction, sentence = compare_palettes((entry["label"], entry.get("palette", {})) for entry in entries)
        if contradiction:
            problems.append(("palettes differ", sentence))
        elif sentence:
            entries[0]["remarks"].append(("palettes differ", sentence))
        # The label maps of the official test split hold ignored ids only: its truth is not published.
        labeled = sum(sum(entry["classes"][:classes.num_classes]) for entry in entries if "classes" in entry)
        if entries and not labeled and split != "test":
            problems.append(("nothing labeled", f"{split}: expected pixels of the {classes.num_classes} classes, "
                             "found only ignored ones"))
        report[split] = summarize(split, entries, problems, classes, len(pairs))
        absent = [name for name, pixels in report[split]["pixels"].items() if not pixels]
        if absent and labeled and len(entries) == len(pairs):
            report[split]["remarks"].append({"kind": "classes without pixels", "text": f"{split}: no pixels of "
                                             + ", ".join(absent)})
    return report, facts


def draw(folder, report, facts, classes):
    """Write contact sheets and the chart of class frequencies, of what could be read."""
    for split, entries in facts.items():
        contact_sheet(folder / f"sheet_{Path(split).stem[:60]}.png", entries, classes)
    pixels = {split: found["pixels"] for split, found in report.items() if any(found["pixels"].values())}
    if pixels:
        charts.frequency_chart(folder / "classes.png", pixels, classes.palette)


def table(report):
    """The findings as text, a paragraph for each split."""
    lines = []
    for split, found in report.items():
        official = f" (official: {found['official']})" if found["official"] else ""
        looked = "" if found["looked_into"] == found["pairs"] else f", {found['looked_into']} looked into"
        lines.append(f"{split}: {plural(found['pairs'], 'pair')}{official}{looked}; sizes "
                     + ", ".join(f"{size} ({count})" for size, count in sorted(found["sizes"].items())[:4])
                     + (" ..." if len(found["sizes"]) > 4 else ""))
        lines.append(f"  mean {found['mean']}, std {found['std']} (RGB, 0 to 255)")
        total = sum(found["pixels"].values()) + found["ignored_pixels"]
        for name, pixels in found["pixels"].items():
            lines.append(f"  {name:<24}{100 * pixels / max(total, 1):7.3f} % of pixels, in "
                         f"{plural(found['images_with'][name], 'image')}")
        lines.append(f"  {'ignored':<24}{100 * found['ignored_pixels'] / max(total, 1):7.3f} %")
        lines += listed("WRONG", found["problems"], SHOWN) + listed("NOTE", found["remarks"], 1)
    return "\n".join(lines)


def listed(title, entries, shown):
    """Lines for problems or remarks [{"kind", "text"}]: a heading for each kind, and the first texts of it."""
    lines, kinds = [], {}
    for entry in entries:
        kinds.setdefault(entry["kind"], []).append(entry["text"])
    for kind, texts in kinds.items():
        lines += [f"  {title}, {kind}: {len(texts)}", *(f"    {text}" for text in texts[:shown])]
        if len(texts) > shown:
            lines.append("    ... (all in check.json)")
    return lines


def make_folder(folder):
    """Make the folder of results. Raises `UserError`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output-dir {folder}: expected a folder, found: {error}") from None


def label_maps(splits):
    """{split or list: paths of its label maps}. splits: of `find_splits`, which names two folders by their paths."""
    return {os.path.basename(name) if os.path.isdir(name) else name: [label for _, label in pairs]
            for name, (pairs, _) in splits.items()}


def _earlier_table(path):
    """The class table, as CSV, that an earlier check assumed and wrote, by its check.json; or None."""
    try:
        report = json.loads(read_file(path))
    except (UserError, ValueError, RecursionError):     # none, or somebody else's
        return None
    table = report.get("classes") if isinstance(report, dict) else None
    return table if isinstance(table, str) else None


def begin_table(path, error):
    """Write the table of a `TableNeeded`, unless it has none or a file is there, and raise a `UserError` with its
    path."""
    if error.table is not None and not os.path.lexists(path):
        make_folder(path.parent)
        keep_table(path, error.table)
        raise UserError(f"{error}; {path} is such a table to begin with") from None


def main():
    parser = flags.Parser(prog="python -m dataset.check", description="Check a data set before training on it.",
                        epilog=__doc__)
    parser.add_argument("folder", metavar="data_dir", type=flags.path, nargs="?",
                        help="folder with leftImg8bit/ and gtFine/, or the root of --data-list")
    parser.add_argument("--data-dir", type=flags.path, help="the same, as train.py and evaluate.py take it")
    add_data_flags(parser, DEFAULT_TABLE)
    parser.add_argument("--output-dir", type=flags.path, help="default: runs/check_<name of the folder>")
    parser.add_argument("--fast", action="store_true", help=f"look into {FAST} pairs of each split only")
    parser.add_argument("--num-workers", type=flags.num_workers, help="processes, or 0 for this one alone; "
                        f"default: one per core, at most {MOST_WORKERS}")
    args = parser.parse_args()
    root = data_root(args.data_dir or args.folder, args.images_dir, args.labels_dir)
    place = os.path.abspath(os.path.dirname(os.path.abspath(root[0])) if args.images_dir else root)
    folder = Path(args.output_dir or Path("runs") / f"check_{os.path.basename(place)}")
    try:
        classes = read_table(args.classes, args.images_dir, args.data_list)
        splits = find_splits(root, args.data_list)
        if classes is None:
            classes = infer_classes(label_maps(splits), root, data_flag(args), args.num_workers, folder / "classes.csv",
                                    skip_unreadable=True)
    except TableNeeded as error:
        begin_table(folder / "classes.csv", error)
        raise
    for remark in classes.remarks:
        print(remark)
    make_folder(folder)
    assumed = classes.as_csv() if classes.source == ASSUMED else None
    if assumed:
        keep_table(folder / "classes.csv", classes, _earlier_table(folder / "check.json"))
    report, facts = check(splits, classes, args.fast, args.num_workers)
    print(table(report))
    files.write_json(folder / "check.json", {"data": root, "fast": args.fast, "splits": report,
                                             "classes": assumed})
    draw(folder, report, facts, classes)
    wrong = sum(len(found["problems"]) for found in report.values())
    print(f"{plural(wrong, 'problem')}; check.json and pictures of what is sound in {folder}")
    if wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    command.run(main)
