"""Infer the class table of a data set from the values of its label maps, if --classes is omitted.

If the values allow only one interpretation, the class table is inferred, and a summary of the values is logged.
Otherwise, the error message names example files and the class table to write.
"""

import os
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils.common.errors import UserError, plural
from utils.common.files import read_file, write_atomically
from utils.common.messages import logger
from utils.common.progress import progress
from utils.imaging.classes import IGNORE_INDEX, UNKNOWN
from utils.imaging.decode import read_ids
from utils.parallel.workers import do_jobs

from .labels import (
    CITYSCAPES,
    COLORS,
    COLUMNS,
    MAX_SHOWN,
    TABLE_NAMES,
    ClassTable,
    TableNeeded,
    distinct_color,
    single_channel_remedy,
)

ASSUMED = "the assumed class table"
IGNORED = (-1, IGNORE_INDEX, 65535)     # values that mean "ignore" by default; 65535 is -1 in 16 bits
CITYSCAPES_NAME = re.compile(r"(_labelIds|_labelTrainIds|_gtFine_color|_gtCoarse_color)\.png$")
MANY_VALUES = 100   # in one label map: more than the classes of any scene; soft edges and photographs have as many


@dataclass
class LabelValues:
    """The values of a label map.

    Attributes:
        path: of the file.
        split: name of its split or list.
        pixels: {value: number of pixels}; a value is an id or, in a map of colors, (red, green, blue).
        remedy: for error messages, if its colors seem to be ids, else "".
    """

    path: Path
    split: str
    pixels: dict
    remedy: str = ""

    @property
    def is_mask(self):
        """Whether it is black and white: the values are 0 and 255."""
        return self.pixels.keys() == {0, IGNORE_INDEX}


def infer_classes(splits, root, flag, workers, target, skip_unreadable=False):
    """Infer the class table from the values of the label maps, and log a summary of the values.

    Args:
        splits: {split or list: paths of its label maps}, of all splits of the data set.
        root: from `dataset.folders.data_root`.
        flag: that names the label maps, and its value, for messages.
        workers: processes that read label maps.
        target: path that the table will be written to, for messages.
        skip_unreadable: whether to skip label maps that cannot be read, unless this applies to all of them.

    Returns:
        The `ClassTable` of Cityscapes if all files are named as its label maps, else one whose source is `ASSUMED`.

    Raises:
        TableNeeded: if the values allow several interpretations, or contradict a class table in the same folder.
        UserError: if a label map cannot be read, or some but not all files are named as label maps of Cityscapes.
    """
    files = [(split, Path(path)) for split, paths in splits.items() for path in paths]
    named = {bool(CITYSCAPES_NAME.search(path.name)): path for _, path in files}
    if len(named) > 1:
        raise UserError(f"{flag}: expected label maps of one kind where --classes is omitted, found "
                        f"{named[True].name}, which is named as a label map of Cityscapes, and {named[False].name}")
    if True in named:
        logger.info("--classes is omitted and the label maps are named as those of Cityscapes: using its class table")
        return ClassTable.read()
    jobs = do_jobs(_count_if_readable if skip_unreadable else count_values, [path for _, path in files], workers)
    maps = [LabelValues(path, split, *counted) for (split, path), counted in zip(
        files, progress(jobs, "reading ids", "label map"), strict=True)]
    # If no label map can be read, reading the first one again raises the error.
    maps = [label_map for label_map in maps if label_map.pixels] or [
        LabelValues(path, split, *count_values(path)) for split, path in files[:1]]
    values = sorted(set().union(*(label_map.pixels for label_map in maps)), key=_sort_key)
    table, finding, remedy = _interpret_values(maps, values)
    existing, complete = _find_table(root, [label_map.path.parent for label_map in maps], values)
    if existing is not None and _is_mask_export(existing, values):
        existing.check_at_least_two()
        logger.info(f"--classes is omitted: the classes are those of {existing.source}, in its order: "
                    f"{', '.join(existing.names[:MAX_SHOWN])}{' ...' * (existing.num_classes > MAX_SHOWN)}; to ignore "
                    "some, give a table with train_id 255 for them to --classes")
        return existing
    if existing is not None and not finding and any(existing.lookup[value] != table.lookup[value] for value in values
                                                    if value >= 0):
        finding = f"{_format_values(values)}, with other meanings in {existing.source}"
    if finding:
        if existing is not None:
            table = existing
            remedy = f"use --classes {existing.source}, which contains all of them" if complete else (
                f"state their meaning by {existing.as_advice()}; the names are those in {existing.source}")
        raise TableNeeded(f"{flag}: expected the values 0 and 255, or 0 to N-1 and 255 to ignore, where --classes is "
                          f"omitted, found {finding}; {remedy}", None if complete else table)
    logger.info("\n".join(describe(maps, table, target)))
    if complete:
        logger.info(f"  {existing.source} has names for these classes: --classes {existing.source}")
    return table


def count_values(path):
    """Count the pixels of each value in a label map. Colors that are only black and white count as ids 0 and 255.

    Returns:
        {value: number of pixels} and remedy, as in `LabelValues`.

    Raises:
        UserError: if the file cannot be read.
    """
    ids, remedy = read_ids(path), ""
    if ids.ndim == 3:
        gray = ids[..., 0]
        if (ids != gray[..., None]).any() or ((gray != 0) & (gray != 255)).any():
            remedy = single_channel_remedy(ids)
            packed = ids.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)      # (H, W)
            colors, counts = np.unique(packed, return_counts=True)
            most = np.argsort(-counts, kind="stable")[:UNKNOWN + 1]     # one more than a table can have
            return {(int(color) >> 16, int(color) >> 8 & 255, int(color) & 255): int(count)
                    for color, count in zip(colors[most], counts[most], strict=True)}, remedy
        ids = gray
    if ids.dtype == np.uint8:
        counts = np.bincount(ids.ravel())
        return {int(value): int(counts[value]) for value in np.flatnonzero(counts)}, remedy
    return dict(zip(*(array.tolist() for array in np.unique(ids, return_counts=True)), strict=True)), remedy


def _count_if_readable(path):
    """Count values as `count_values` does; a file that cannot be read has no pixels."""
    try:
        return count_values(path)
    except UserError:
        return {}, ""


def _interpret_values(maps, values):
    """Interpret the values of label maps.

    Args:
        maps: list of `LabelValues`.
        values: all their values, sorted.

    Returns:
        (class table or None, finding, remedy). If the interpretation is not certain, finding and remedy are the parts
        "found ..." and "...; remedy" of the error message, else "".
    """
    if any(isinstance(value, tuple) for value in values):
        return _interpret_colors(maps, values)
    classes = [value for value in values if value not in IGNORED]
    if values == [0, IGNORE_INDEX]:
        return _table([_row("background", 0, 0, (0, 0, 0)), _row("foreground", 255, 1, (255, 255, 255))]), "", ""
    if len(classes) < 2:
        return None, f"{_format_values(values)} ({values[-1]} in {_path_with(maps, values[-1])})", (
            "at least two classes are needed to train a network")
    table = None
    if len(classes) <= UNKNOWN and classes[0] >= 0 and classes[-1] <= 65535:
        inferred = classes == list(range(len(classes)))
        ignored = [_row("ignored", IGNORE_INDEX, IGNORE_INDEX, distinct_color(IGNORE_INDEX))] * (
            inferred or IGNORE_INDEX in values)
        ignored += [_row("ignored too", value, IGNORE_INDEX, distinct_color(IGNORE_INDEX)) for value in IGNORED if
                    value in values and value != IGNORE_INDEX]
        table = _table([_row(f"class {value}", value, train_id, distinct_color(value)) for train_id, value in enumerate(
            classes)] + ignored)
    doubt = (_doubt_grays(maps, values, table) or _doubt_gaps(maps, values, table)
             or _doubt_cityscapes(classes, table))
    if not doubt and (masks := _doubt_masks(maps, values)):
        return None, *masks     # no table, since it would be only one of two interpretations
    return table, *(doubt or ("", ""))


# The functions `_doubt_*` return (finding, remedy), as `_interpret_values`, or None if they have no doubt.

def _doubt_grays(maps, values, table):
    """Doubt values that look like grays, as in masks with soft edges."""
    pixels = _count(maps)
    between = [value for value in values if 0 < value < values[-1]]
    share = sum(pixels[value] for value in between) / pixels.total()
    spread = all(any(low <= value <= high for value in between) for low, high in ((1, 85), (86, 170), (171, 254)))
    soft = values[0] == 0 and 200 <= values[-1] <= 255 and len(between) > 2 and spread and share < 0.5
    richest = max(maps, key=lambda label_map: len(label_map.pixels))
    if not soft and len(richest.pixels) < MANY_VALUES:
        return None
    reason = (f"the {len(between)} values between are {100 * share:.2g} % of pixels, as in masks with soft edges or "
              f"after scaling or JPEG compression" if soft else
              f"{len(richest.pixels)} values in {richest.path} look like grays of soft edges or of a picture, not like "
              f"classes")
    otherwise = f"; if they are classes, state this by {table.as_advice()}" if table is not None else ""
    return f"{_format_values(values)} ({between[-1]} in {_path_with(maps, between[-1])})", (
        f"{reason}: make masks black and white, in Python by PIL.Image.open(FILE).convert('L').point(lambda value: 255 "
        f"* (value > 127)).save(COPY){otherwise}")


def _doubt_gaps(maps, values, table):
    """Doubt values that are not 0 to N-1."""
    odd = [value for index, value in enumerate(value for value in values if value not in IGNORED) if index != value]
    if not odd:
        return None
    finding = f"{_format_values(values)} ({odd[0]} in {_path_with(maps, odd[0])}"
    plain = next((label_map for label_map in maps if label_map.pixels.keys().isdisjoint(odd)), None)
    if plain is not None:
        finding += f", but only {_format_values(sorted(plain.pixels))} in {plain.path}"
    if table is None:
        return f"{finding})", f"save at most {UNKNOWN} ids of 0 to 65535"
    remedy = f"state their meaning by {table.as_advice()}"
    cityscapes = ClassTable.read()
    known = cityscapes.lookup[[value for value in values if value not in IGNORED]] != UNKNOWN
    if known.all() and len(known) > cityscapes.num_classes // 2:
        remedy += f"; if they are ids of Cityscapes, use --classes {CITYSCAPES}"
    for value in IGNORED:
        remedy += f"; {value} is ignored there: if it is a class, give it a train_id of its own" * (value in values)
    return f"{finding})", remedy


def _doubt_cityscapes(classes, table):
    """Doubt sorted values that are exactly the ids of Cityscapes."""
    if classes != sorted(row["id"] for row in ClassTable.read().rows if row["id"] >= 0):
        return None
    return f"{_format_values(classes)}, all ids of Cityscapes", (
        f"if they are such ids, use --classes {CITYSCAPES}; if they are {len(classes)} classes, state this by "
        f"{table.as_advice()}")


def _doubt_masks(maps, values):
    """Doubt 255 if it is the foreground of some label maps and seems to be ignored in others."""
    others = [label_map for label_map in maps if any(value not in (0, *IGNORED) for value in label_map.pixels)]
    in_splits = {}
    for label_map in maps:
        in_splits.setdefault(label_map.split, set()).update(label_map.pixels)
    masks = [label_map for label_map in maps if label_map.is_mask and (
        in_splits[label_map.split] == {0, IGNORE_INDEX} or not any(IGNORE_INDEX in other.pixels for other in others))]
    if not masks:
        return None
    remedy = f"if 255 means ignore, state this by {_table(_rows_ignoring_255(values)).as_advice()}"
    if set(values) == {0, 1, IGNORE_INDEX}:
        remedy += "; if 1 and 255 are the same, by " + _table([
            _row("background", 0, 0, (0, 0, 0)), _row("foreground", 1, 1, (255, 255, 255)),
            _row("foreground as 255", 255, 1, (255, 255, 255))]).as_advice()
    return (f"two kinds: {_format_values(sorted(masks[0].pixels))} in {masks[0].path} and {len(masks) - 1} more, "
            f"{_format_values(sorted(others[0].pixels))} in {others[0].path} and {len(others) - 1} more"), remedy


def _rows_ignoring_255(values):
    """Make rows for the classes among the values, and for 255 as ignored."""
    return [_row(f"class {value}", value, value, distinct_color(value)) for value in values if value not in IGNORED] + [
        _row("ignored", IGNORE_INDEX, IGNORE_INDEX, distinct_color(IGNORE_INDEX))]


def _interpret_colors(maps, values):
    """Interpret label maps as `_interpret_values` does, if at least one of them has colors."""
    colored = [label_map for label_map in maps if any(isinstance(value, tuple) for value in label_map.pixels)]
    plain = next((label_map for label_map in maps if label_map.pixels.keys() - {0, 255} and not any(
        isinstance(value, tuple) for value in label_map.pixels)), None)
    colors = sorted({value if isinstance(value, tuple) else (value, value, value) for value in values})
    finding = f"a label map of colors, such as {colors[-1]} in {_path_with(maps, colors[-1])}"
    if plain is not None:
        return None, f"{finding}, beside ids in {plain.path}", "make all of them maps of ids"
    remedies = {label_map.remedy for label_map in colored}
    if len(remedies) == 1 and colored[0].remedy:
        return None, finding, colored[0].remedy
    if len(colors) == 1:
        return None, finding, "at least two classes are needed to train a network"
    if len(colors) > UNKNOWN:
        return None, f"{finding}, and more than {UNKNOWN} others", (
            "save label maps without soft edges, which mix the colors of classes")
    table = _table([_row(f"class {number}", number, number, color) for number, color in enumerate(colors)])
    return table, finding, f"state their meaning by {table.as_advice()}"


def check_meaning(root, classes, label_map):
    """Compare classes with those of a class table in the folders of the data set, if there is one.

    Args:
        root: from `dataset.folders.data_root`.
        classes: `ClassTable` by which the label maps will be read.
        label_map: path of one of them.

    Raises:
        UserError: if a class has other ids there, or other colors if the label map has colors: the label maps were
            made with these.
    """
    table, complete = _find_table(root, [Path(label_map).parent], [])
    if table is None:
        return
    kind, columns, export = ("color", COLORS, "labelmap.txt") if read_ids(label_map).ndim == 3 else (
        "id", ("id",), "_classes.csv")
    if not complete and Path(table.source).name != export:      # a table that does not have both
        return
    own, other = defaultdict(set), defaultdict(set)     # {name of a class: ids or colors}; merged ones have several
    for values, rows in ((own, classes.rows), (other, table.rows)):
        for row in rows:
            if row["train_id"] not in (-1, IGNORE_INDEX):
                values[row["name"].casefold()].add(tuple(row[column] for column in columns))
    for name in own.keys() & other.keys():
        if own[name].isdisjoint(other[name]):
            here, there = (",".join(map(str, min(values))) for values in (own[name], other[name]))
            raise UserError(f"{table.source}: expected the {kind} {here} for {name}, as in {classes.source}, found "
                            f"{there}; if the label maps have that, make them again as the network's were (python -m "
                            "dataset.convert has --classes), else --classes TABLE states what they mean")
    names = {value: name for name, values in own.items() for value in values}
    for name in sorted(other.keys() - own.keys()):
        value = min(other[name])
        if names.get(value, name) not in other:
            logger.info(f"{table.source} has {name} for the {kind} {','.join(map(str, value))}, which {classes.source} "
                        f"reads as {names[value]}")


def _find_table(root, subfolders, values):
    """Find a class table of a usual name in the folders of the data set, with all values of the label maps.

    Returns:
        (`ClassTable`, whether --classes accepts the file), or (None, False).
    """
    roots = [*root, *map(os.path.dirname, map(os.path.abspath, root))] if isinstance(root, tuple) else [root]
    for folder in dict.fromkeys([*map(Path, roots), *subfolders]):
        for name in TABLE_NAMES:
            if os.path.isfile(folder / name):
                try:
                    table, complete = ClassTable.read(folder / name), True
                except TableNeeded as error:        # a table of another tool
                    table, complete = error.table, False
                except UserError:       # not a class table
                    continue
                if all(_is_in_table(table, value) for value in values):
                    return table, complete
    return None, False


def _is_mask_export(table, values):
    """Whether a class table is that of a mask export, of which the values are: colors of CVAT, or ids of Roboflow."""
    name, colors = Path(table.source).name, [value for value in values if isinstance(value, tuple)]
    # Maps that are black all over have the value 0.
    black = table.color_lookup.get(0, [{"id": None}])[0]["id"] == 0
    return name == "_classes.csv" and not colors or name == "labelmap.txt" and colors and (
        len(colors) == len(values) or black and len(colors) == len(values) - 1 and values[0] == 0)


def _is_in_table(table, value):
    """Whether a class table has a row for an id or a color."""
    if isinstance(value, tuple):
        return (value[0] << 16 | value[1] << 8 | value[2]) in table.color_lookup
    return value == -1 or 0 <= value < len(table.lookup) and table.lookup[value] != UNKNOWN


def describe(maps, table, target):
    """Summarize the values of label maps: how many pixels and files have them, and how to ignore one.

    Args:
        maps: list of `LabelValues`.
        table: their `ClassTable`.
        target: path that it will be written to.

    Returns:
        A list of lines.
    """
    pixels, files, splits = _count(maps), Counter(), {}
    for label_map in maps:
        files.update(label_map.pixels.keys())
        for value in label_map.pixels:
            splits.setdefault(value, set()).add(label_map.split)
    all_splits = dict.fromkeys(label_map.split for label_map in maps)
    lines = [f"{plural(len(maps), 'label map')}, and --classes is omitted: this table is assumed"]
    for row in table.rows:
        value = row["id"]
        if files[value]:
            name = row["name"] if row["name"].endswith(f" {value}") else f"{row['name']} ({value})"
            without = [split for split in all_splits if split not in splits[value]]
            lines.append(f"  {name}: {100 * pixels[value] / pixels.total():.3g} % of pixels in {files[value]} of "
                         f"{plural(len(maps), 'file')}{', none in ' * bool(without)}{', '.join(without)}")
    if table.num_classes > 2:
        lines.append("  A value that means \"no data\" or \"unlabeled\", often 0 or the last, is learned like any "
                     f"other. To ignore one, copy {target}; in the copy, write 255 as its train_id and leave the "
                     "train_id of all classes empty, which numbers them; give the copy to --classes")
    return lines


def keep_table(path, classes, earlier=None):
    """Write a class table, unless the file has it already.

    Args:
        path: of the CSV file.
        classes: `ClassTable`.
        earlier: text of an earlier table that may be replaced, or None.

    Raises:
        UserError: if the file has another text.
    """
    content = classes.as_csv().encode()
    present = read_file(path, "a class table (CSV)") if os.path.lexists(path) else None
    if present == content:
        return
    if present in (None, earlier and earlier.encode(errors="replace")):
        write_atomically(path, lambda file: file.write(content))
    else:
        raise UserError(f"{path}: expected the class table inferred from the label maps, or no file, found another "
                        f"one; use it by --classes {path}, or delete it to have a new one written")


def _count(maps):
    """Count the pixels of each value in all label maps."""
    pixels = Counter()
    for label_map in maps:
        pixels.update(label_map.pixels)
    return pixels


def _path_with(maps, value):
    """Return the path of the first label map with a value; a gray color may also be there as an id."""
    same = {value, value[0]} if isinstance(value, tuple) and len(set(value)) == 1 else {value}
    return next(label_map.path for label_map in maps if not label_map.pixels.keys().isdisjoint(same))


def _format_values(values):
    return ", ".join(map(str, values[:MAX_SHOWN])) + " ..." * (len(values) > MAX_SHOWN)


def _sort_key(value):
    return value if isinstance(value, tuple) else (value,)


def _table(rows):
    return ClassTable(rows, ASSUMED)


def _row(name, number, train_id, color):
    return dict(zip((*COLUMNS, "category"), (name, number, train_id, *color, ""), strict=True))
