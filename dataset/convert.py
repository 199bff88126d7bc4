"""Convert annotations of labelling tools to label maps: `python -m dataset.convert SOURCE TARGET`.

SOURCE is a folder of images, and of JSON files of Labelme, or of COCO as CVAT, Label Studio and Roboflow export it.
TARGET gets images/ (hard links where possible), labels/ and classes.csv once all is done. Folders train, valid (or val)
and test, and these words in the names of COCO files, make the splits train, val and test.

Outlines are drawn in the order of the file, later ones on top; the polygons of one COCO annotation are united, and a
crowd belongs to its class. Holes come from COCO's run lengths or, in Labelme, from outlines on top: _background_ is
background there, and __ignore__ ignored. Boxes of COCO are not drawn. Coordinates refer to the image turned upright by
its EXIF orientation. If several files annotate an image, the first counts that states where the image is.
"""

import base64
import json
import os
import re
import shlex
import shutil
import traceback
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":      # before any import of a package that may be missing
    from utils import environment
    environment.check_packages()

import numpy as np

from utils.common import command, flags
from utils.common.errors import UserError, first_line, plural
from utils.common.files import kind_of, open_file, write_atomically
from utils.common.progress import progress
from utils.imaging.classes import IGNORE_INDEX, UNKNOWN
from utils.imaging.decode import SUFFIXES, upright_size
from utils.imaging.draw import save_png
from utils.parallel.workers import do_jobs

from .cityscapes import unique_names
from .folders import VALIDATION, check_folder, to_nfc
from .labels import COLUMNS, ClassTable, distinct_color
from .outlines import draw
from .text import read_text

SPLITS = {"train": "train", "test": "test", **dict.fromkeys(VALIDATION, "val")}
BACKGROUND, IGNORED = "background", "__ignore__"
MAX_SHOWN = 3       # named files of each kind of problem


@dataclass
class Entry:
    """An image of an annotation file.

    Attributes:
        file: path of the annotation file, relative to the source.
        image: path of the image, relative to the source; None if only the annotation file contains it.
        certain: whether the annotation file states exactly where the image is, or only itself contains it.
        split: "train", "val", "test" or "".
        size: [height, width] as stated there; values may be missing.
        shapes: [(class name, kind, geometry)] for `dataset.outlines.draw`.
    """

    file: Path
    image: Path | None
    certain: bool
    split: str
    size: list
    shapes: list

    @property
    def name(self):
        """Path of the image or, if only the annotation file contains it, of that file."""
        return self.image or self.file


def list_files(root):
    """List the files in a folder and its subfolders: JSON files and images {name: [path]}, paths relative to it."""
    annotations, images, visited = [], defaultdict(list), set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        repeated = os.path.realpath(folder) in visited      # links may lead back
        visited.add(os.path.realpath(folder))
        subfolders[:] = [] if repeated else sorted(name for name in subfolders if not name.startswith("."))
        names = [] if repeated else sorted(name for name in names if not name.startswith("."))
        for path in (Path(folder, name).relative_to(root) for name in names):
            if path.suffix.lower() == ".json":
                annotations.append(path)
            elif path.suffix.lower() in SUFFIXES and (root / path).is_file():
                images[to_nfc(path.name)].append(path)
    return annotations, images


def find_split(names):
    """Return the split that the last of these names stands for, such as train or val2017, or ""."""
    words = [name.lower().rstrip("0123456789") for name in reversed(names)]
    return next((SPLITS[word] for word in words if word in SPLITS), "")


def image_at(images, name, file):
    """Return the image at a path that an annotation file states relative to itself; None if there is none."""
    path = Path(os.path.normpath(file.parent / to_nfc(str(name)).replace("\\", "/")))
    return next((image for image in images.get(path.name, ()) if to_nfc(str(image)) == to_nfc(str(path))), None)


def search_image(images, name, file, split):
    """Find the image in the source whose path ends like a name in an annotation file; None if it is not unique.

    Of names that lead out of the source, such as /home/me/a/b.jpg or ../a/b.jpg, only the end has to agree. Images of
    another split do not count; those of the split are preferred, then those near the file.
    """
    parts = [part for part in re.split(r"[\\/]+", to_nfc(str(name))) if part not in ("", ".")]
    leads_out = ".." in parts or re.match(r"[\\/]|[A-Za-z]:", str(name))
    matching = []
    for length in range(len(parts), 0, -1) if leads_out else [len(parts)]:
        matching = matching or [path for path in images.get("".join(parts[-1:]), ()) if parts[-length:] == [
            to_nfc(part) for part in path.parts[-length:]] and (not split or find_split(path.parts) in (split, ""))]
    ranks = [(find_split(path.parts) == split, len(os.path.commonprefix([path.parent.parts, file.parent.parts])))
             for path in matching]
    nearest = [path for path, rank in zip(matching, ranks, strict=True) if rank == max(ranks)]
    return nearest[0] if len(nearest) == 1 else None


def class_name(name):
    """Return the name of a class as one line of text."""
    name = " ".join(str(name).split()) or "unnamed"
    return BACKGROUND if name.lower() in (BACKGROUND, "_background_") else name


def read_labelme(file, content, images, problems):
    """Read a file of Labelme; arguments and results as of `read_coco`."""
    name, split = content["imagePath"], find_split(file.parts)
    beside = (path for suffix in SUFFIXES for path in images.get(to_nfc(file.stem + suffix), ())
              if path.parent == file.parent)
    stated = image_at(images, name, file) or next(beside, None)
    image = stated or search_image(images, name, file, split)
    if image is None and not isinstance(content.get("imageData"), str):
        problems["left out: image not found, or several of its name"].append(f"{name} in {file}")
        return [], []
    shapes = [(class_name(shape.get("label")), shape.get("shape_type") or "polygon", shape)
              for shape in content["shapes"] if isinstance(shape, dict)]
    size = [content.get("imageHeight"), content.get("imageWidth")]
    split = split or find_split(image.parts if image else ())
    return [Entry(file, image, image == stated, split, size, shapes)], sorted({label for label, _, _ in shapes})


def read_coco(file, content, images, problems):
    """Read a COCO file.

    Args:
        file: its path, relative to the source.
        content: its JSON.
        images: from `list_files`.
        problems: {kind: [what it concerns]}, to be added to.

    Returns:
        [`Entry`], and the class names in order.
    """
    items, categories, annotations = ([item for item in content[key] if isinstance(item, dict)]
                                      for key in ("images", "categories", "annotations"))
    names = {str(item.get("id")): class_name(item.get("name")) for item in categories}
    shapes = {str(item.get("id")): [] for item in items}
    for item in annotations:
        image, category = str(item.get("image_id")), str(item.get("category_id"))
        if image in shapes and category in names:
            shapes[image].append((names[category], "coco", item.get("segmentation")))
        else:
            problems["not drawn: annotation of an image or a category that is not in its file"].append(
                f"image_id {image}, category_id {category} in {file}")
    split, entries = find_split([*file.parent.parts, *re.findall("[a-z]+", file.stem.lower())]), []
    for item in items:
        name = item.get("file_name")
        stated = image_at(images, name, file)
        image = stated or search_image(images, name, file, split)
        if image is None:
            problems["left out: image not found, or several of its name"].append(f"{name} in {file}")
        else:
            entries.append(Entry(file, image, image == stated, split or find_split(image.parts),
                                 [item.get("height"), item.get("width")], shapes[str(item.get("id"))]))
    # Roboflow adds a category that groups the others and has no annotations.
    used = {label for drawn in shapes.values() for label, _, _ in drawn}
    groups = {class_name(item.get("supercategory")) for item in categories}
    return entries, [name for name in names.values() if name in used or name not in groups]


def read_annotations(source, problems):
    """Read all annotation files of a folder: [`Entry`] and class names. Raises `UserError` if they have no images."""
    files, images = list_files(source)
    read = []       # (`Entry`, names of the classes in its file)
    for file in progress(files, "reading annotations", "file"):
        try:
            content = json.loads(read_text(source / file, "a JSON file"))
        except (UserError, ValueError, RecursionError) as error:
            problems["left out: file that is not valid JSON"].append(f"{file} ({first_line(error)})")
            continue
        lists = [key for key, value in content.items() if isinstance(value, list)] if isinstance(content, dict) else []
        if "shapes" in lists and "imagePath" in content:
            new, labels = read_labelme(file, content, images, problems)
        elif {"images", "annotations", "categories"} <= set(lists):
            new, labels = read_coco(file, content, images, problems)
        else:
            problems["left out: JSON neither of Labelme nor of COCO"].append(file)
            continue
        read += [(entry, labels) for entry in new]
    entries, names = {}, {}
    for entry, _ in sorted(read, key=lambda item: not item[0].certain):     # a guess does not take another's image
        entries.setdefault(entry.name, entry)
    kept = []       # in the order of the files
    for entry, labels in read:
        if entries[entry.name] is entry:
            kept.append(entry)
            names |= dict.fromkeys(labels)
        else:
            problems["left out: second annotation of an image"].append(f"{entry.image} in {entry.file}")
    if not entries:
        raise UserError(f"{source}: expected images and JSON files of Labelme or COCO, found "
                        f"{plural(sum(map(len, images.values())), 'image')} and {plural(len(files), 'JSON file')}"
                        f"{'; '.join(['', *format_problems(problems)])}")
    problems["left out: image without annotations"] += [path for paths in images.values() for path in paths
                                                        if path not in entries]
    return kept, list(names)


def make_table(names, ignore_rest):
    """Make a class table.

    Returns:
        `ClassTable`, {class name: id in label maps}, and the id of pixels outside of all outlines.

    Raises:
        UserError: for a wrong number of classes.
    """
    names = [name for name in dict.fromkeys([BACKGROUND] * (not ignore_rest) + names) if name != IGNORED]
    if not 2 <= len(names) <= UNKNOWN:
        raise UserError(f"{'--ignore-rest' if ignore_rest else 'the annotations'}: expected 2 to {UNKNOWN} classes"
                        f"{' with background' * (not ignore_rest)}, found {', '.join(names[:MAX_SHOWN]) or 'none'}"
                        f"{f' and {len(names) - MAX_SHOWN} more' * (len(names) > MAX_SHOWN)}")
    ids = {name: number for number, name in enumerate(names)} | {IGNORED: IGNORE_INDEX}
    rows = [(name, value, value, *distinct_color(value), "") for name, value in ids.items()]
    table = ClassTable([dict(zip((*COLUMNS, "category"), row, strict=True)) for row in rows])
    return table, ids, IGNORE_INDEX if ignore_rest else 0


def use_table(path, names, ignore_rest):
    """Read the class table of --classes; arguments and results as of `make_table`."""
    table = ClassTable.read(path)
    rows = [row for row in table.rows if 0 <= row["id"] <= IGNORE_INDEX]
    ids = {class_name(row["name"]): row["id"] for row in rows}
    ignored = next((row["id"] for row in rows if row["train_id"] in (-1, IGNORE_INDEX)), None)
    if ignored is not None:
        ids.setdefault(IGNORED, ignored)
    unknown = [name for name in names if name not in ids]
    if unknown:
        raise UserError(f"--classes {path}: expected rows with ids up to 255 for all classes of the annotations, found "
                        f"none for {', '.join(unknown)}; add them, where train_id 255 ignores a class")
    rest = ignored if ignore_rest else ids.get(BACKGROUND, ignored)
    if rest is None:
        raise UserError(f"--classes {path}: expected a row {'' if ignore_rest else 'background, or one '}with train_id "
                        "255, for pixels outside of all outlines, found none")
    return table, ids, rest


def convert_image(job):
    """Write an image and its label map.

    Args:
        job: (source, `Entry`, path of the new image, path of the new label map, {class: id}, id of the rest).

    Returns:
        (256,) pixel counts by id, None if the image is left out; whether an outline has a pixel; and problems [(kind,
        what it concerns)].
    """
    source, entry, image, label_map, ids, rest = job
    name, problems = entry.name, []
    image.parent.mkdir(parents=True, exist_ok=True)
    original = source / entry.image if entry.image else image
    if entry.image is None:
        decode_image(source / entry.file, image)
    try:
        width, height = upright_size(original)
        if all(entry.size) and entry.size != [height, width]:
            raise UserError(f"{original}: expected {entry.size[1]}×{entry.size[0]}, as in {entry.file}, found "
                            f"{width}×{height}")
    except UserError as error:
        image.unlink(missing_ok=True)
        reason = str(error).removeprefix(f"{original}: ")
        return None, False, [("left out: image that cannot be read, or of another size", f"{name}, {reason}")]
    if original != image:
        place_image(original, image)
    labels, covered = np.full((height, width), rest, np.uint8), False
    for label, kind, geometry in entry.shapes:
        try:
            parts = draw(kind, geometry, (height, width))
        except ValueError as error:
            problems.append((f"not drawn, so that its pixels are outside of outlines: {error}", f"{label} in {name}"))
            continue
        for window, mask in parts:
            labels[window][mask] = ids[label]
        if any(mask.any() for _, mask in parts):
            covered = True
        else:
            problems.append(("without pixels: outline", f"{label} in {name}"))
    if not entry.shapes:
        problems.append(("without outlines: image", name))
    save_png(label_map, labels)
    return np.bincount(labels.ravel(), minlength=256), covered, problems


def decode_image(file, target):
    """Decode the image that a file of Labelme contains. Raises `UserError` if the target cannot be written."""
    try:
        data = base64.b64decode(json.loads(read_text(file, "a JSON file"))["imageData"])
    except ValueError:
        data = b""      # is reported as an empty file
    write_atomically(target, lambda output: output.write(data))


def place_image(original, target):
    """Link or copy an image. Raises `UserError` if that fails."""
    try:
        os.link(os.path.realpath(original), target)
    except OSError:     # another disk, or a file system without links
        with open_file(original) as file:
            write_atomically(target, lambda output: shutil.copyfileobj(file, output))


def format_problems(problems):
    """Format problems {kind: [what it concerns]} as a list of sentences."""
    return [f"{kind}: {len(items)}, such as {'; '.join(map(str, items[:MAX_SHOWN]))}"
            for kind, items in problems.items() if items]


def convert(source, target, table=None, ignore_rest=False, workers=None):
    """Convert a folder of annotations to a new folder; see the description of the command.

    Args:
        source: the folder.
        target: path of the new folder.
        table: path of a class table, whose ids are used, or its name; None to make one.
        ignore_rest: whether pixels outside all outlines are ignored, instead of background.
        workers: number of processes, as in `do_jobs`.

    Returns:
        The lines of a report.

    Raises:
        UserError: if nothing can be converted.
    """
    problems = defaultdict(list)
    entries, names = read_annotations(source, problems)
    classes, ids, rest = use_table(table, names, ignore_rest) if table else make_table(names, ignore_rest)
    splits = {name: [entry for entry in entries if entry.split == name] for name in ("train", "val", "test", "")}
    if splits[""] and len(splits[""]) < len(entries):
        raise UserError(f"{source}: expected all images in folders train, valid and test, or none, found "
                        f"{plural(len(splits['']), 'image')} elsewhere, such as "
                        f"{splits[''][0].name}")
    jobs = []
    for split, members in splits.items():
        stems = unique_names([entry.name for entry in members])
        split = split if len(members) < len(entries) else ""        # a single one needs no folder
        for entry, stem in zip(members, stems, strict=True):
            suffix = entry.image.suffix if entry.image else ".png"
            jobs.append((source, entry, target / "images" / split / (stem + suffix),
                         target / "labels" / split / f"{stem}.png", ids, rest))
    pixels, images, made, covered = np.zeros(256, np.int64), np.zeros(256, np.int64), Counter(), False
    results = progress(do_jobs(convert_image, jobs, workers), "converting", "image")
    for (_, _, image, *_), (counts, has_outlines, remarks) in zip(jobs, results, strict=True):
        for kind, what in remarks:
            problems[kind].append(what)
        if counts is not None:
            pixels, images = pixels + counts, images + (counts > 0)
            made[image.parent] += 1
            covered = covered or has_outlines
    sentences = format_problems(problems)
    if not made:
        raise UserError(f"{source}: expected images that can be converted, found none; {'; '.join(sentences)}")
    if not covered and any(entry.shapes for entry in entries):
        raise UserError(f"{source}: expected outlines of classes, found none that covers a pixel; "
                        f"{'; '.join(sentences)}")
    write_atomically(target / "classes.csv", lambda file: file.write(classes.as_csv().encode()))
    share, shown = 100 / pixels.sum(), {}
    for name, value in ids.items():
        shown.setdefault(value, name)       # names of one id: the first
    return [*(f"{plural(number, 'image')} in {folder.relative_to(target)}" for folder, number in made.items()),
            *(f"  {name:<24}{pixels[value] * share:7.3f} % of pixels, in {plural(images[value], 'image')}"
              for value, name in shown.items()), *sentences]


def main():
    parser = flags.Parser(prog="python -m dataset.convert", usage="%(prog)s SOURCE TARGET [flags]", epilog=__doc__,
                          description="Convert annotations of labelling tools to label maps.")
    parser.add_argument("source", type=flags.path, help="folder of images, and of JSON files of Labelme or COCO")
    parser.add_argument("target", type=flags.path, help="new folder for images/, labels/ and classes.csv")
    parser.add_argument("--classes", type=flags.path, metavar="TABLE", help="class table whose ids are used: a "
                        "file, such as classes.csv of an earlier TARGET, or the name of a data set (default: classes "
                        "are numbered in the order of the files, those of Labelme by name)")
    parser.add_argument("--ignore-rest", action="store_true", help="ignore pixels outside of all outlines (default: "
                        "they are a class, background)")
    parser.add_argument("--num-workers", type=flags.num_workers, help="worker processes; 0 to use only this process "
                        "(default: one per core)")
    args = parser.parse_args()
    check_folder(args.source)
    source, target = (Path(os.path.realpath(path)) for path in (args.source, args.target))
    if target.is_relative_to(source):
        raise UserError(f"{args.target}: expected a folder outside of {args.source}, found one in it")
    if os.path.lexists(target) and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{args.target}: expected nothing there, or an empty folder, found {kind_of(target)} with "
                        "content; choose another one")
    unfinished = target.with_name(f".{target.name[:20]}.{os.getpid()}.tmp")
    try:
        unfinished.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{args.target}: expected a folder that can be made, found: {error}") from None
    try:
        report = convert(source, unfinished, args.classes, args.ignore_rest, args.num_workers)
        if target.is_dir():
            target.rmdir()
        os.replace(unfinished, target)
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)     # ends the worker processes, which would go on writing
        raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    data = shlex.join(["--images-dir", f"{args.target}/images", "--labels-dir", f"{args.target}/labels", "--classes",
                       f"{args.target}/classes.csv"])
    evaluation = f"  python evaluate.py {data} --restore-from snapshots/CS_scenes_60000.pth"
    print("\n".join([*report, "Next:", f"  python -m dataset.check {data}", f"  python train.py {data}", evaluation]))
    if not args.classes:
        more = shlex.join(["--classes", f"{args.target}/classes.csv", *["--ignore-rest"] * args.ignore_rest])
        print(f"More annotations get the same ids by:\n  python -m dataset.convert SOURCE TARGET {more}")


if __name__ == "__main__":
    command.run(main)
