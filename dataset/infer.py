"""Class tables that nobody stated: what the values in the label maps of a data set can mean.

Where the values allow only one reading, the class table is inferred, and an account of them is printed. Elsewhere the
error names files of each kind and the class table to write.
"""

import os
import re
from collections import Counter
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

from .labels import CITYSCAPES, COLUMNS, SHOWN, ClassTable, TableNeeded, distinct_color, ids_in_channels

ASSUMED = "the assumed class table"
IGNORED = (-1, IGNORE_INDEX, 65535)     # values that mean "ignore" where nothing else is said; the last: -1 in 16 bits
CITYSCAPES_NAME = re.compile(r"(_labelIds|_labelTrainIds|_gtFine_color|_gtCoarse_color)\.png$")
TABLES = ("classes.csv", "class_dict.csv", "_classes.csv", "labelmap.txt")     # names that class tables often have
MANY = 100          # values of one label map: no picture shows so many classes, but soft edges and photographs do


@dataclass
class LabelValues:
    """What a label map holds.

    Attributes:
        path: of the file.
        split: its split, or its list.
        pixels: {value: number of pixels}; values are ids or, of a map of colors, (red, green, blue).
        remedy: what helps where its colors seem to be ids, else "".
    """

    path: Path
    split: str
    pixels: dict
    remedy: str = ""

    @property
    def is_mask(self):
        return self.pixels.keys() == {0, IGNORE_INDEX}


def infer_classes(splits, root, flag, workers, target, skip_unreadable=False):
    """Infer the class table from the values of the label maps, and print what they hold.

    Args:
        splits: {split or list: paths of its label maps}, of every split there is.
        root: as of `dataset.folders.data_root`.
        flag: with which the label maps were given, and its value; for messages.
        workers: processes that read label maps.
        target: path that the table will be written to, for messages.
        skip_unreadable: whether to go on without label maps that cannot be read, unless all of them are such.

    Returns:
        That of Cityscapes if all files are named as its label maps, else one whose source is `ASSUMED`.

    Raises:
        TableNeeded: if the values allow several readings, or a class table beside them says otherwise.
        UserError: if a label map cannot be read, or some but not all are named as those of Cityscapes.
    """
    files = [(split, Path(path)) for split, paths in splits.items() for path in paths]
    named = {bool(CITYSCAPES_NAME.search(path.name)): path for _, path in files}
    if len(named) > 1:
        raise UserError(f"{flag}: expected label maps of one kind where --classes is left out, found {named[True].name}"
                        f", which is named as those of Cityscapes, and {named[False].name}")
    if True in named:
        logger.info("label maps are named as those of Cityscapes, and --classes is left out: its class table is taken")
        return ClassTable.read()
    jobs = do_jobs(_count_if_readable if skip_unreadable else count_values, [path for _, path in files], workers)
    maps = [LabelValues(path, split, *counted) for (split, path), counted in zip(
        files, progress(jobs, "reading ids", "label map"), strict=True)]
    maps = [one for one in maps if one.pixels] or [LabelValues(path, split, *count_values(path)) for split, path in
                                                   files[:1]]
    values = sorted(set().union(*(one.pixels for one in maps)), key=_by_value)
    table, found, remedy = _read_values(maps, values)
    stated, complete = _table_beside(root, maps, values)
    if stated is not None and not found and any(stated.lookup[value] != table.lookup[value] for value in values
                                                if value >= 0):
        found = f"{_shown(values)}, but {stated.source} beside them, which says otherwise"
    if found:
        if stated is not None:
            table = stated
            remedy = f"--classes {stated.source} knows all of them" if complete else (
                f"say what they mean by {stated.as_advice()}, which have their names from {stated.source}")
        raise TableNeeded(f"{flag}: expected the values 0 and 255, or 0 to N-1 and 255 to ignore, where --classes is "
                          f"left out, found {found}; {remedy}", None if complete else table)
    logger.info("\n".join(describe(maps, table, target)))
    if complete:
        logger.info(f"  {stated.source} names these classes: --classes {stated.source}")
    return table


def count_values(path):
    """({value: pixels}, remedy) of a label map, as in `LabelValues`; black and white in colors are 0 and 255. Raises
    `UserError`."""
    ids, remedy = read_ids(path), ""
    if ids.ndim == 3:
        gray = ids[..., 0]
        if (ids != gray[..., None]).any() or ((gray != 0) & (gray != 255)).any():
            remedy = ids_in_channels(ids)
            packed = ids.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)      # (H, W)
            colors, counts = np.unique(packed, return_counts=True)
            most = np.argsort(-counts, kind="stable")[:UNKNOWN + 1]     # one more than a table can tell apart
            return {(int(color) >> 16, int(color) >> 8 & 255, int(color) & 255): int(count)
                    for color, count in zip(colors[most], counts[most], strict=True)}, remedy
        ids = gray
    if ids.dtype == np.uint8:
        counts = np.bincount(ids.ravel())
        return {int(value): int(counts[value]) for value in np.flatnonzero(counts)}, remedy
    return dict(zip(*(array.tolist() for array in np.unique(ids, return_counts=True)), strict=True)), remedy


def _count_if_readable(path):
    """As `count_values`, with no pixels for a file that cannot be read."""
    try:
        return count_values(path)
    except UserError:
        return {}, ""


def _read_values(maps, values):
    """What the values of label maps mean: (class table or None, what was found if that is not clear, what helps)."""
    if any(isinstance(value, tuple) for value in values):
        return _doubt_colors(maps, values)
    classes = [value for value in values if value not in IGNORED]
    if values == [0, IGNORE_INDEX]:
        return _table([_row("background", 0, 0, (0, 0, 0)), _row("foreground", 255, 1, (255, 255, 255))]), "", ""
    if len(classes) < 2:
        return None, f"{_shown(values)} ({values[-1]} in {_holding(maps, values[-1])})", (
            "a network learns to tell at least two classes apart")
    table = None
    if len(classes) <= UNKNOWN and classes[0] >= 0 and classes[-1] <= 65535:
        inferred = classes == list(range(len(classes)))
        ignored = [_row("ignored", IGNORE_INDEX, IGNORE_INDEX, distinct_color(IGNORE_INDEX))] * (
            inferred or IGNORE_INDEX in values)
        ignored += [_row("ignored too", value, IGNORE_INDEX, distinct_color(IGNORE_INDEX)) for value in IGNORED if
                    value in values and value != IGNORE_INDEX]
        table = _table([_row(f"class {value}", value, place, distinct_color(value)) for place, value in enumerate(
            classes)] + ignored)
    doubt = (_doubt_grays(maps, values, table) or _doubt_gaps(maps, values, table)
             or _doubt_cityscapes(classes, table))
    if not doubt and (masks := _doubt_masks(maps, values)):
        return None, *masks     # a table to begin with would hold one of the readings
    return table, *(doubt or ("", ""))


def _doubt_grays(maps, values, table):
    """(found, remedy) where the values look like grays, as soft edges make them of masks; else None."""
    pixels = _count(maps)
    between = [value for value in values if 0 < value < values[-1]]
    share = sum(pixels[value] for value in between) / pixels.total()
    spread = all(any(low <= value <= high for value in between) for low, high in ((1, 85), (86, 170), (171, 254)))
    soft = values[0] == 0 and 200 <= values[-1] <= 255 and len(between) > 2 and spread and share < 0.5
    most = max(maps, key=lambda one: len(one.pixels))
    if not soft and len(most.pixels) < MANY:
        return None
    why = (f"the {len(between)} values between are {100 * share:.2g} % of pixels, as soft edges, scaling or JPEG make "
           f"them of masks" if soft else
           f"{len(most.pixels)} values in {most.path} look like grays of soft edges or of a picture, not like classes")
    otherwise = f"; if they are classes, say so by {table.as_advice()}" if table is not None else ""
    return f"{_shown(values)} ({between[-1]} in {_holding(maps, between[-1])})", (
        f"{why}: make masks black and white, in Python by PIL.Image.open(FILE).convert('L').point(lambda value: 255 * "
        f"(value > 127)).save(COPY){otherwise}")


def _doubt_gaps(maps, values, table):
    """(found, remedy) where the values are not 0 to N-1; else None."""
    odd = [value for place, value in enumerate(value for value in values if value not in IGNORED) if place != value]
    if not odd:
        return None
    found = f"{_shown(values)} ({odd[0]} in {_holding(maps, odd[0])}"
    plain = next((one for one in maps if one.pixels.keys().isdisjoint(odd)), None)
    if plain is not None:
        found += f", but only {_shown(sorted(plain.pixels))} in {plain.path}"
    if table is None:
        return f"{found})", f"save at most {UNKNOWN} ids of 0 to 65535"
    remedy = f"say what they mean by {table.as_advice()}"
    cityscapes = ClassTable.read()
    known = cityscapes.lookup[[value for value in values if value not in IGNORED]] != UNKNOWN
    if known.all() and len(known) > cityscapes.num_classes // 2:
        remedy += f"; if they are ids of Cityscapes, --classes {CITYSCAPES} takes them"
    for value in IGNORED:
        remedy += f"; {value} is ignored there: if it is a class, give it a train_id of its own" * (value in values)
    return f"{found})", remedy


def _doubt_cityscapes(classes, table):
    """(what was found, what helps) where the values are all ids of Cityscapes and no others; else None. classes: sorted
    values."""
    if classes != sorted(row["id"] for row in ClassTable.read().rows if row["id"] >= 0):
        return None
    return f"{_shown(classes)}, all ids of Cityscapes", (
        f"--classes {CITYSCAPES} takes them as such; if they are {len(classes)} classes, say so by {table.as_advice()}")


def _doubt_masks(maps, values):
    """(found, remedy) where 255 is the foreground of some label maps and seems to be ignored in others; else None."""
    others = [one for one in maps if any(value not in (0, *IGNORED) for value in one.pixels)]
    in_splits = {}
    for one in maps:
        in_splits.setdefault(one.split, set()).update(one.pixels)
    masks = [one for one in maps if one.is_mask and (in_splits[one.split] == {0, IGNORE_INDEX} or not any(
        IGNORE_INDEX in other.pixels for other in others))]
    if not masks:
        return None
    remedy = f"if 255 is to be ignored, say so by {_table(_ignoring(values)).as_advice()}"
    if set(values) == {0, 1, IGNORE_INDEX}:
        remedy += "; if 1 and 255 are the same, by " + _table([
            _row("background", 0, 0, (0, 0, 0)), _row("foreground", 1, 1, (255, 255, 255)),
            _row("foreground as 255", 255, 1, (255, 255, 255))]).as_advice()
    return (f"two kinds: {_shown(sorted(masks[0].pixels))} in {masks[0].path} and {len(masks) - 1} more, "
            f"{_shown(sorted(others[0].pixels))} in {others[0].path} and {len(others) - 1} more"), remedy


def _ignoring(values):
    """Rows for the classes among values, and for 255 as ignored."""
    return [_row(f"class {value}", value, value, distinct_color(value)) for value in values if value not in IGNORED] + [
        _row("ignored", IGNORE_INDEX, IGNORE_INDEX, distinct_color(IGNORE_INDEX))]


def _doubt_colors(maps, values):
    """As `_read_values`, for label maps of which some hold colors."""
    colored = next(one for one in maps if any(isinstance(value, tuple) for value in one.pixels))
    plain = next((one for one in maps if one.pixels.keys() - {0, 255} and not any(
        isinstance(value, tuple) for value in one.pixels)), None)
    colors = sorted({value if isinstance(value, tuple) else (value, value, value) for value in values})
    found = f"a label map of colors, such as {colors[-1]} in {_holding(maps, colors[-1])}"
    if plain is not None:
        return None, f"{found}, beside ids in {plain.path}", "make all of them maps of ids"
    remedies = {one.remedy for one in maps if any(isinstance(value, tuple) for value in one.pixels)}
    if len(remedies) == 1 and colored.remedy:
        return None, found, colored.remedy
    if len(colors) == 1:
        return None, found, "a network learns to tell at least two classes apart"
    if len(colors) > UNKNOWN:
        return None, f"{found}, and more than {UNKNOWN} others", (
            "save label maps without soft edges, which mix the colors of classes")
    table = _table([_row(f"class {place}", place, place, color) for place, color in enumerate(colors)])
    return table, found, f"say what they mean by {table.as_advice()}"


def _table_beside(root, maps, values):
    """The `ClassTable` of a file of a usual name beside the label maps that knows all of their values, and whether
    --classes takes it as it is; or (None, False)."""
    roots = [*root, *map(os.path.dirname, map(os.path.abspath, root))] if isinstance(root, tuple) else [root]
    for folder in dict.fromkeys([*map(Path, roots), *(one.path.parent for one in maps)]):
        for name in TABLES:
            if os.path.isfile(folder / name):
                try:
                    table, complete = ClassTable.read(folder / name), True
                except TableNeeded as error:        # of another tool
                    table, complete = error.table, False
                except UserError:       # something else
                    continue
                if all(_known(table, value) for value in values):
                    return table, complete
    return None, False


def _known(table, value):
    if isinstance(value, tuple):
        return (value[0] << 16 | value[1] << 8 | value[2]) in table.color_lookup
    return value == -1 or 0 <= value < len(table.lookup) and table.lookup[value] != UNKNOWN


def describe(maps, table, target):
    """Lines about the values of label maps: how many pixels and files hold them, and how to ignore one.

    Args:
        maps: list of `LabelValues`.
        table: their `ClassTable`.
        target: path that it will be written to.
    """
    pixels, files, splits = _count(maps), Counter(), {}
    for one in maps:
        files.update(one.pixels.keys())
        for value in one.pixels:
            splits.setdefault(value, set()).add(one.split)
    everywhere = dict.fromkeys(one.split for one in maps)
    lines = [f"{plural(len(maps), 'label map')}, and --classes is left out: this table is assumed"]
    for row in table.rows:
        value = row["id"]
        if files[value]:
            name = row["name"] if row["name"].endswith(f" {value}") else f"{row['name']} ({value})"
            without = [split for split in everywhere if split not in splits[value]]
            lines.append(f"  {name}: {100 * pixels[value] / pixels.total():.3g} % of pixels in {files[value]} of "
                         f"{plural(len(maps), 'file')}{', none in ' * bool(without)}{', '.join(without)}")
    if table.num_classes > 2:
        lines.append("  A value that means \"no data\" or \"unlabeled\", often 0 or the last, is learnt like any "
                     f"other. To ignore one, copy {target}, set its train_id to 255 in the copy, empty all other "
                     "train_ids that are not 255, and give the copy to --classes")
    return lines


def keep_table(path, classes, earlier=None):
    """Write a class table, unless it stands there already.

    Args:
        path: of the CSV file.
        classes: `ClassTable`.
        earlier: text of a table written there before, which may be replaced.

    Raises:
        UserError: where the file holds another text.
    """
    content = classes.as_csv().encode()
    present = read_file(path, "a class table (CSV)") if os.path.lexists(path) else None
    if present == content:
        return
    if present in (None, earlier and earlier.encode(errors="replace")):
        write_atomically(path, lambda file: file.write(content))
    else:
        raise UserError(f"{path}: expected the class table that the label maps make, or no file, found another one; "
                        f"--classes {path} takes it as it is, and without that file a new one is written")


def _count(maps):
    """Pixels of each value in all label maps."""
    pixels = Counter()
    for one in maps:
        pixels.update(one.pixels)
    return pixels


def _holding(maps, value):
    """The path of the first label map that holds a value; of black and white, also as ids."""
    same = {value, value[0]} if isinstance(value, tuple) and len(set(value)) == 1 else {value}
    return next(one.path for one in maps if not one.pixels.keys().isdisjoint(same))


def _shown(values):
    return ", ".join(map(str, values[:SHOWN])) + " ..." * (len(values) > SHOWN)


def _by_value(value):
    return value if isinstance(value, tuple) else (value,)


def _table(rows):
    return ClassTable(rows, ASSUMED)


def _row(name, number, train_id, color):
    return dict(zip((*COLUMNS, "category"), (name, number, train_id, *color, ""), strict=True))
