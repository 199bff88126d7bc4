"""Class tables: what the ids in a label map mean.

A table is a CSV file with the columns name, id, train_id, red, green, blue and, if wanted, category.
`id` is the value in label maps, `train_id` the channel of the network's output; pixels of the train ids -1 and 255 are
ignored in training and scores. Where all others are left empty, the classes are numbered in their order.
The Cityscapes table is that of cityscapesScripts, helpers/labels.py.
"""

import csv
import functools
import io
import re
import warnings
from pathlib import Path

import numpy as np

from utils.common.errors import UserError
from utils.imaging.classes import IGNORE_INDEX, UNKNOWN, Classes

from .text import read_csv, read_text

SHOWN = 8       # rows of a table in a message
CITYSCAPES = Path(__file__).parent / "list" / "cityscapes" / "classes.csv"
COLUMNS = ("name", "id", "train_id", "red", "green", "blue")
COLORS = COLUMNS[3:]
HEADINGS = {"class": "name", "pixel value": "id", "r": "red", "g": "green", "b": "blue"}    # of other tools
WHOLE = re.compile(r"[+-]?\d+(\.0+)?")     # spreadsheets write 1.0
LABELMAP = re.compile(r"\s*([^:#]+):(\d+),(\d+),(\d+):[^:]*:[^:]*")     # a line of CVAT: label:color_rgb:parts:actions


class TableNeeded(UserError):
    """A class table has to be written. `table`: a `ClassTable` to begin with, or None."""

    def __init__(self, message, table=None):
        super().__init__(message)
        self.table = table


class ClassTable(Classes):
    """The classes of a data set: beside what a network's outputs stand for, what the values in label maps mean.

    Attributes, beside those of `Classes`:
        lookup: (65536,) id → train id, `IGNORE_INDEX` or `UNKNOWN`; uint8.
        negative: {negative id: train id or `IGNORE_INDEX`}.
        color_lookup: {red · 65536 + green · 256 + blue: the rows of that color}.
        remarks: sentences about the table that are due before it is used.
    """

    def __init__(self, rows, source="class table"):
        """rows: dicts with the columns of the file; source: its name, for messages. Raises `UserError`."""
        super().__init__(rows, source)
        trained = {row["id"]: IGNORE_INDEX if row["train_id"] == -1 else row["train_id"] for row in rows}
        # A file of signed numbers may hold negative ids; those of Cityscapes (license plate: -1) hold none.
        self.negative = {number: trained.pop(number) for number in sorted(trained) if number < 0}
        self.lookup = np.full(1 << 16, UNKNOWN, np.uint8)
        self.lookup[list(trained)] = list(trained.values())
        self.color_lookup = {}
        for row in rows:
            if row["id"] >= 0:
                color = row["red"] << 16 | row["green"] << 8 | row["blue"]
                self.color_lookup.setdefault(color, []).append(row)
        self.remarks = self._remark_colors()

    @classmethod
    def read(cls, path=CITYSCAPES):
        """Read a table from a CSV file. Raises `UserError` naming file and line; `TableNeeded` for a table of another
        tool, which does not say what is ignored: Roboflow's _classes.csv, class_dict.csv, CVAT's labelmap.txt."""
        rows, missing = _read_rows(path)
        table = cls(rows, path)
        if missing:
            raise TableNeeded(f"{path}: expected the columns {','.join(COLUMNS)}[,category], found no "
                              f"{', '.join(missing)}; {table.as_advice()}, where train_id 255 ignores a row", table)
        return table

    def as_csv(self):
        """The text of the table's file."""
        text = io.StringIO()
        categories = ["category"] * any(row["category"] for row in self.rows)
        writer = csv.DictWriter(text, [*COLUMNS, *categories], extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        return text.getvalue()

    def as_advice(self):
        """The flag and the lines of its table, for a message; of a long table the first."""
        header, *lines = self.as_csv().splitlines()
        if len(lines) > SHOWN:
            lines = [*lines[:2], "... (python -m dataset.check writes all of them to begin with)"]
        return f"--classes FILE.csv with the lines {' / '.join([header, *lines])}"

    def check_count(self, expected):
        """Raise `UserError` where --num-classes, None if it is not given, says another number of classes."""
        if expected not in (None, self.num_classes):
            raise UserError(f"--num-classes {expected}: expected the {self.num_classes} classes of {self.source}")

    def check_at_least_two(self):
        """Raise `UserError` where there is but one class, of which a network would learn nothing."""
        if self.num_classes < 2:
            ignored = [row["name"] for row in self.rows if row["train_id"] in (-1, IGNORE_INDEX)]
            remedy = (f"give {ignored[0]} the train_id 1" if ignored else
                      "add a row for all other pixels, such as background,ID,1,0,0,0")
            raise UserError(f"{self.source}: expected at least two classes to tell apart, found 1, {self.names[0]}; "
                            f"{remedy}")

    def encode(self, ids, name="label map"):
        """Ids (H, W), any integer dtype, or colors (H, W, 3) uint8 → train ids (H, W) uint8.

        Raises `UserError` naming `name` where the table does not know a value.
        """
        if ids.ndim == 3:
            return self._encode_colors(ids, name)
        if ids.dtype not in (np.uint8, np.uint16):
            outside = (ids < 0) | (ids >= len(self.lookup))
            if outside.any():
                return self._encode_outside(ids, outside, name)
        train_ids = self.lookup[ids]
        unknown = train_ids == UNKNOWN
        if unknown.any():
            self._raise_unknown(ids, unknown, name)
        return train_ids

    def _encode_outside(self, ids, outside, name):
        """`encode` for ids (H, W) of which those where `outside` (H, W) is true are negative or too large."""
        train_ids = self.lookup[np.where(outside, 0, ids)]
        train_ids[outside] = UNKNOWN
        for number, train_id in self.negative.items():
            train_ids[ids == number] = train_id
        unknown = train_ids == UNKNOWN
        if unknown.any():
            self._raise_unknown(ids, unknown, name)
        return train_ids

    def _encode_colors(self, colors, name):
        packed = colors.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)       # (H, W)
        train_ids = np.full(packed.shape, UNKNOWN, np.uint8)
        for color in np.unique(packed).tolist():
            found = self.color_lookup.get(color, ())
            values = color >> 16, color >> 8 & 255, color & 255
            shown = f"({', '.join(map(str, values))})"
            if not found:
                remedy = ids_in_channels(colors) or self._row_remedy("ID", values)
                raise UserError(f"{name}: expected the colors of {self.source}, found {shown}; {remedy}")
            train_ids[packed == color] = self._class_of(found, shown, name)
        return train_ids

    def _class_of(self, rows, shown, name):
        """The train id, or `IGNORE_INDEX`, of a color that these rows of the table share."""
        meant = {int(self.lookup[row["id"]]): row for row in rows}
        if len(meant) == 1:
            return next(iter(meant))
        scored = sorted(meant.keys() - {IGNORE_INDEX})
        names = ", ".join(f"{row['name']} (train id {row['train_id']})" for row in rows)
        # Cityscapes gives pole and polegroup, which is ignored, one color. They are of one category, and polegroup is
        # rare: such pixels count as pole. Anything more ambiguous is an error.
        if len(scored) > 1 or len({row["category"] for row in rows}) > 1 or not rows[0]["category"]:
            raise UserError(f"{name}: expected a color for each class, found {shown}, which {self.source} gives to "
                            f"{names}; use a map of ids")
        warnings.warn(f"{self.source} gives the color {shown} to {names}: all its pixels are learned and scored as "
                      f"{meant[scored[0]]['name']}; only maps of ids tell them apart", stacklevel=4)
        return scored[0]

    def looks_like_train_ids(self, ids):
        """Whether a map (H, W) that was given as ids probably holds train ids: all its values are train ids, and read
        as ids most of its pixels would be ignored."""
        if self.is_identity or not 0 <= ids.min() <= ids.max() < self.num_classes:
            return False
        counts = np.bincount(ids.ravel(), minlength=self.num_classes)
        return counts[self.lookup[:len(counts)] == IGNORE_INDEX].sum() > ids.size / 2

    @property
    def instance_sizes(self):
        """{id: pixels of an average instance} of the classes that have instances in Cityscapes; iIoU needs them."""
        known = _average_sizes()
        return {row["id"]: known[row["name"]] for row in self.rows if row["name"] in known and row["id"] >= 0}

    @property
    def train_ids(self):
        """{id: train id} of the scored classes."""
        return {row["id"]: row["train_id"] for row in self.rows if row["train_id"] not in (-1, IGNORE_INDEX)}

    @property
    def whole_categories(self):
        """The categories all of whose classes have instances, for which there is an iIoU."""
        sizes = self.instance_sizes
        without = {row["category"] or row["name"] for row in self.rows if row["id"] >= 0 and row["id"] not in sizes}
        return set(self.categories) - without

    @property
    def is_identity(self):
        """Whether ids and train ids of the scored classes are the same numbers."""
        return np.array_equal(self.ids, np.arange(self.num_classes))

    def _raise_unknown(self, ids, wrong, name):
        """Raise the `UserError` for ids (H, W) of which those where `wrong` (H, W) is true are not in the table."""
        unknown = np.unique(ids[wrong])
        train_ids = [*range(self.num_classes), IGNORE_INDEX]
        if self._is_cityscapes and not self.is_identity and np.isin(ids, train_ids).all():
            remedy = "these look like train ids: give the map of ids (*_labelIds.png)"
        elif self.is_identity and str(name).endswith("_labelIds.png"):
            remedy = ("by the file's name these are ids of Cityscapes: leave out --classes, or give the map of train "
                      "ids (*_labelTrainIds.png)")
        elif unknown[-1] > 65535:
            remedy = "save ids of at most 65535"
        else:
            remedy = self._row_remedy(unknown[0])
        raise UserError(f"{name}: expected ids that {self.source} knows, "
                        f"found {', '.join(map(str, unknown[:8]))}{' ...' if len(unknown) > 8 else ''}; {remedy}")

    def _row_remedy(self, number, color=("RED", "GREEN", "BLUE")):
        """What helps against a value that the table has no row for: its id and color, as far as they are known."""
        own = Path(self.source).is_file() and Path(self.source).parent != CITYSCAPES.parent
        place = "add" if own else "--classes FILE.csv takes a table of your own, with"
        return (f"{place} a row for each of these: NAME,{number},TRAIN_ID,{','.join(map(str, color))}, where the "
                f"TRAIN_ID {self.num_classes} makes a class of it and 255 ignores it")

    @property
    def _is_cityscapes(self):
        """Whether these are the classes of Cityscapes, by file or by name."""
        return Path(self.source).parent == CITYSCAPES.parent or self.names == ClassTable.read().names

    def _remark_colors(self):
        """[a sentence about classes that share a color], or none."""
        alike = {}
        for name, color in zip(self.names, self.palette.tolist(), strict=False):
            alike.setdefault(tuple(color), []).append(name)
        color, names = max(alike.items(), key=lambda item: len(item[1]))
        shown = ", ".join(names[:4]) + " ..." * (len(names) > 4)
        return [f"{self.source} gives {shown} the same color {color}, so that pictures do not tell them apart: give "
                "each row a color of its own"] * (len(names) > 1)


def ids_in_channels(colors):
    """What helps where a label map of colors (H, W, 3) seems to hold ids in one or all of its channels, else ""."""
    if (colors == colors[..., :1]).all():
        where, which = "red, green and blue are equal, as if ids were saved in three channels", "one"
    elif not colors[..., 1:].any():
        where, which = "green and blue are 0, as if ids were saved in the red channel", "it alone"
    else:
        return ""
    return f"{where}: save {which}, in Python by PIL.Image.open(FILE).getchannel(0).save(COPY)"


def distinct_color(number):
    """(red, green, blue) of a class, as PASCAL VOC draws them: its bits, dealt to the three, the lowest counting
    most."""
    return tuple(sum((number >> 3 * place + channel & 1) << 7 - place for place in range(3)) for channel in range(3))


@functools.cache
def _average_sizes():
    """{class name: pixels of an average instance}, from cityscapesScripts, evalPixelLevelSemanticLabeling.py."""
    with open(CITYSCAPES.with_name("instance_sizes.csv"), newline="", encoding="utf-8") as file:
        return {row["name"]: float(row["pixels"]) for row in csv.DictReader(file)}


def _read_rows(path):
    """The rows of a table with their numbers as int, and the names of the columns it has not. Raises `UserError`."""
    what = "a class table (CSV)"
    labels = list(map(LABELMAP.fullmatch, _lines(read_text(path, what))))
    if labels and all(labels):
        header = ["name", *COLORS]
        cells = [(number, dict(zip(header, label.groups(), strict=True))) for number, label in enumerate(labels, 1)]
    else:
        header, cells = read_csv(path, what)
        header = [HEADINGS.get(name, name) for name in header]
        cells = [(number, {HEADINGS.get(name, name): text for name, text in row.items()}) for number, row in cells]
    missing = [name for name in COLUMNS if name not in header]
    if "name" in missing or "id" in missing and not set(COLORS).isdisjoint(missing):
        raise UserError(f"{path}: expected the columns {','.join(COLUMNS)}[,category], found no {', '.join(missing)}")
    rows = [_parse(row, f"{path}, line {number}", place, missing) for place, (number, row) in enumerate(cells)]
    scored = [row for row in rows if row["train_id"] not in (-1, IGNORE_INDEX)]
    if all(row["train_id"] is None for row in scored):
        for train_id, row in enumerate(scored):
            row["train_id"] = train_id
    for (number, _), row in zip(cells, rows, strict=True):
        if row["train_id"] is None:
            raise UserError(f"{path}, line {number}: expected a whole number for train_id, found ''")
    return rows, missing


def _lines(text):
    """The lines of a text, but for empty ones and comments."""
    return [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]


def _parse(row, where, place, missing):
    """A row of a table with its numbers as int; a train id that is left empty is None. Raises `UserError`.

    Args:
        row: {column: text}.
        where: file and line, for messages.
        place: of the row in the table, which is its id where the table has none.
        missing: columns that the table has not.
    """
    numbers = {}
    for column in COLUMNS[1:]:
        text = (row.get(column) or "").strip()
        if column in missing and column == "id":
            numbers[column] = place
        elif column in COLORS and not set(COLORS).isdisjoint(missing):
            numbers[column] = distinct_color(numbers["id"])[COLORS.index(column)]
        elif column == "train_id" and not text:
            numbers[column] = None
        elif WHOLE.fullmatch(text):
            numbers[column] = int(text.partition(".")[0])
        else:
            raise UserError(f"{where}: expected a whole number for {column}, found {row.get(column)!r}")
    outside = [c for c in COLORS if not 0 <= numbers[c] <= 255]
    if outside or numbers["id"] > 65535:
        column = outside[0] if outside else "id"
        raise UserError(f"{where}: expected {column} from 0 to {255 if outside else 65535}, "
                        f"found {numbers[column]}")
    return {"name": (row.get("name") or "").strip(), "category": (row.get("category") or "").strip(), **numbers}
