"""Class tables: what the ids in a label map mean.

A table is a CSV file with the columns name, id, train_id, red, green, blue and, optionally, category.
`id` is the value in label maps, `train_id` the channel of the network's output. Pixels with train id -1 or 255 are
ignored in training and scores. If all other train ids are empty, the classes are numbered in their order. Lines above
the header that start with # are comments. The Cityscapes table has the values of cityscapesScripts, helpers/labels.py;
those of other public data sets are in dataset/classes/, each with its source, and go by the names of their files.
"""

import csv
import functools
import io
import os
import re
import warnings
from pathlib import Path

import numpy as np

from utils.common.errors import UserError
from utils.imaging.classes import IGNORE_INDEX, UNKNOWN, Classes

from .text import read_csv, read_text

MAX_SHOWN = 8       # rows of a table, or values, in a message
CITYSCAPES = Path(__file__).parent / "list" / "cityscapes" / "classes.csv"
TABLES = Path(__file__).parent / "classes"
TABLE_NAMES = ("classes.csv", "class_dict.csv", "_classes.csv", "labelmap.txt")    # usual names of their files
COLUMNS = ("name", "id", "train_id", "red", "green", "blue")
COLORS = COLUMNS[3:]
HEADINGS = {"class": "name", "pixel value": "id", "r": "red", "g": "green", "b": "blue"}    # of other tools → ours
INTEGER = re.compile(r"[+-]?\d+(\.0+)?")       # spreadsheets write 1.0
LABELMAP = re.compile(r"\s*([^:#]+):(\d+),(\d+),(\d+):[^:]*:[^:]*")     # a line of CVAT: label:color_rgb:parts:actions


class TableNeeded(UserError):
    """Error: the user has to write a class table.

    Args:
        message: one sentence, as of `UserError`.
        table: a `ClassTable` to start from, or None.
    """

    def __init__(self, message, table=None):
        super().__init__(message)
        self.table = table


class ClassTable(Classes):
    """Class table of a data set: `Classes`, and the meaning of the ids and colors in label maps.

    Args:
        rows: [{column: value}], numbers as int.
        source: name of the file, for messages.

    Attributes, in addition to those of `Classes`:
        lookup: (65536,) uint8, id → train id, `IGNORE_INDEX` or `UNKNOWN`.
        negative: {negative id: train id or `IGNORE_INDEX`}.
        color_lookup: {red · 65536 + green · 256 + blue: rows with this color}.
        remarks: sentences about the table, to be shown before it is used.

    Raises:
        UserError: if the rows do not make a class table.
    """

    def __init__(self, rows, source="class table"):
        super().__init__(rows, source)
        trained = {row["id"]: IGNORE_INDEX if row["train_id"] == -1 else row["train_id"] for row in rows}
        # Label maps of signed numbers may have negative ids; those of Cityscapes do not (license plate: -1).
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
        """Read a class table.

        Args:
            path: of a CSV file, or the name of a known data set, as for `find_table`.

        Raises:
            TableNeeded: if it is a table of another tool, without train ids: Roboflow's _classes.csv, class_dict.csv,
                or CVAT's labelmap.txt.
            UserError: if it is not a class table; the message has the file and the line.
        """
        path = find_table(path)
        rows, missing = _read_rows(path)
        table = cls(rows, path)
        if missing:
            raise TableNeeded(f"{path}: expected the columns {','.join(COLUMNS)}[,category], found no "
                              f"{', '.join(missing)}; {table.as_advice()}, where train_id 255 ignores a row", table)
        return table

    def as_csv(self):
        """Format the table as the text of its CSV file."""
        text = io.StringIO()
        categories = ["category"] * any(row["category"] for row in self.rows)
        writer = csv.DictWriter(text, [*COLUMNS, *categories], extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        return text.getvalue()

    def as_advice(self):
        """Format the flag --classes and the lines of the table for a message; of a long table only the first lines."""
        header, *lines = self.as_csv().splitlines()
        if len(lines) > MAX_SHOWN:
            lines = [*lines[:2], "... (python -m dataset.check writes all of them to a file)"]
        return f"--classes FILE.csv with the lines {' / '.join([header, *lines])}"

    def check_count(self, expected):
        """Raise `UserError` if --num-classes is not None and differs from the number of classes."""
        if expected not in (None, self.num_classes):
            raise UserError(f"--num-classes {expected}: expected the {self.num_classes} classes of {self.source}")

    def check_at_least_two(self):
        """Raise `UserError` if there is only one class, since a network would then learn nothing."""
        if self.num_classes < 2:
            ignored = [row["name"] for row in self.rows if row["train_id"] in (-1, IGNORE_INDEX)]
            remedy = (f"give {ignored[0]} the train_id 1" if ignored else
                      "add a row for all other pixels, such as background,ID,1,0,0,0")
            raise UserError(f"{self.source}: expected at least two classes, found 1, {self.names[0]}; {remedy}")

    def encode(self, ids, name="label map"):
        """Convert a label map to train ids.

        Args:
            ids: (H, W) ids of any integer dtype, or (H, W, 3) uint8 colors.
            name: of the label map, for error messages.

        Returns:
            (H, W) uint8 train ids; `IGNORE_INDEX` for ignored pixels.

        Raises:
            UserError: if a value is not in the table.
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
        """Encode ids (H, W) that are negative or too large for `lookup` where the mask `outside` (H, W) is true."""
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
            rows = self.color_lookup.get(color, ())
            values = color >> 16, color >> 8 & 255, color & 255
            color_text = f"({', '.join(map(str, values))})"
            if not rows:
                remedy = single_channel_remedy(colors) or self._row_remedy("ID", values)
                raise UserError(f"{name}: expected the colors of {self.source}, found {color_text}; {remedy}")
            train_ids[packed == color] = self._train_id_of_color(rows, color_text, name)
        return train_ids

    def _train_id_of_color(self, rows, color_text, name):
        """Return the train id, or `IGNORE_INDEX`, of a color that several rows of the table may share."""
        candidates = {int(self.lookup[row["id"]]): row for row in rows}
        if len(candidates) == 1:
            return next(iter(candidates))
        scored = sorted(candidates.keys() - {IGNORE_INDEX})
        names = ", ".join(f"{row['name']} (train id {row['train_id']})" for row in rows)
        # In Cityscapes, pole and polegroup (ignored) have the same color. They are in one category, and polegroup is
        # rare, so such pixels count as pole. Anything more ambiguous is an error.
        if len(scored) > 1 or len({row["category"] for row in rows}) > 1 or not rows[0]["category"]:
            raise UserError(f"{name}: expected a color for each class, found {color_text}, which {self.source} gives "
                            f"to {names}; use a map of ids")
        warnings.warn(f"{self.source} gives the color {color_text} to {names}: all its pixels are learned and scored "
                      f"as {candidates[scored[0]]['name']}; only maps of ids distinguish them", stacklevel=4)
        return scored[0]

    def looks_like_train_ids(self, ids):
        """Whether a label map (H, W) probably has train ids instead of ids.

        This is so if all its values are train ids, and most of its pixels would be ignored if they were ids, for more
        than one reason: a single one, such as 0 of ADE20K, may well be most of an image.
        """
        if self.is_identity or not 0 <= ids.min() <= ids.max() < self.num_classes:
            return False
        counts = np.bincount(ids.ravel(), minlength=self.num_classes)
        ignored = counts[self.lookup[:len(counts)] == IGNORE_INDEX]
        return np.count_nonzero(ignored) > 1 and ignored.sum() > ids.size / 2

    @property
    def instance_sizes(self):
        """{id: average instance size in pixels} of the classes that have instances in Cityscapes, for iIoU."""
        known = _average_sizes()
        return {row["id"]: known[row["name"]] for row in self.rows if row["name"] in known and row["id"] >= 0}

    @property
    def train_ids(self):
        """{id: train id} of the scored classes."""
        return {row["id"]: row["train_id"] for row in self.rows if row["train_id"] not in (-1, IGNORE_INDEX)}

    @property
    def whole_categories(self):
        """Categories in which every class has instances, so that iIoU is defined for them."""
        sizes = self.instance_sizes
        without = {row["category"] or row["name"] for row in self.rows if row["id"] >= 0 and row["id"] not in sizes}
        return set(self.categories) - without

    @property
    def is_identity(self):
        """Whether the id of every scored class equals its train id."""
        return np.array_equal(self.ids, np.arange(self.num_classes))

    def _raise_unknown(self, ids, mask, name):
        """Raise `UserError` for ids (H, W) that are not in the table where the mask (H, W) is true."""
        unknown = np.unique(ids[mask])
        train_ids = [*range(self.num_classes), IGNORE_INDEX]
        if self._is_cityscapes and not self.is_identity and np.isin(ids, train_ids).all():
            remedy = ("these look like train ids: for Cityscapes, give the maps of ids (*_labelIds.png); for another "
                      "data set, its own --classes and, to evaluate.py, a snapshot that was trained on them")
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
        """Return the remedy for a value without a row in the table: the row to add."""
        is_users_file = Path(self.source).is_file() and Path(self.source).parent not in (CITYSCAPES.parent, TABLES)
        action = "add" if is_users_file else "--classes FILE.csv takes a table of your own, with"
        return (f"{action} a row for each of these: NAME,{number},TRAIN_ID,{','.join(map(str, color))}, where the "
                f"TRAIN_ID {self.num_classes} makes a class of it and 255 ignores it")

    @property
    def _is_cityscapes(self):
        """Whether these are the classes of Cityscapes, by file or by name."""
        return Path(self.source).parent == CITYSCAPES.parent or self.names == ClassTable.read().names

    def _remark_colors(self):
        """Return a list with one sentence about classes that share a color, or an empty list."""
        alike = {}
        for name, color in zip(self.names, self.palette.tolist(), strict=False):
            alike.setdefault(tuple(color), []).append(name)
        color, names = max(alike.items(), key=lambda item: len(item[1]))
        shown = ", ".join(names[:4]) + " ..." * (len(names) > 4)
        return [f"{self.source} gives {shown} the same color {color}, so that pictures do not distinguish them: give "
                "each row a color of its own"] * (len(names) > 1)


def find_table(path):
    """Return the path of the class table that --classes names.

    Args:
        path: of a file; or the name of a known data set, unless the working folder has a file of this name.

    Raises:
        UserError: if it is a bare name, without a suffix, of neither a file nor a data set.
    """
    name = str(path)
    if os.path.basename(name) != name or "." in name or os.path.isfile(name):
        return path
    tables = {table.stem: table for table in TABLES.glob("*.csv")} | {"cityscapes": CITYSCAPES, "kitti": CITYSCAPES}
    if name not in tables:
        raise UserError(f"--classes {name}: expected a class table (CSV) or the name of a data set, "
                        f"{', '.join(sorted(tables))}, found neither")
    return tables[name]


def single_channel_remedy(colors):
    """Return the remedy if a label map of colors (H, W, 3) seems to have ids in one or all of its channels, else ""."""
    if (colors == colors[..., :1]).all():
        observation, channel = "red, green and blue are equal, as if ids were saved in three channels", "one of them"
    elif not colors[..., 1:].any():
        observation, channel = "green and blue are 0, as if ids were saved in the red channel", "only red"
    else:
        return ""
    return f"{observation}: save {channel}, in Python by PIL.Image.open(FILE).getchannel(0).save(COPY)"


def distinct_color(number):
    """Return the (red, green, blue) of a class number by the color map of PASCAL VOC.

    The bits of the number are distributed to red, green and blue in turn; the lowest bits have the highest weight.
    """
    return tuple(sum((number >> 3 * bit + channel & 1) << 7 - bit for bit in range(3)) for channel in range(3))


@functools.cache
def _average_sizes():
    """Read {class name: average instance size in pixels}, from cityscapesScripts, evalPixelLevelSemanticLabeling."""
    with open(CITYSCAPES.with_name("instance_sizes.csv"), newline="", encoding="utf-8") as file:
        return {row["name"]: float(row["pixels"]) for row in csv.DictReader(file)}


def _read_rows(path):
    """Read the rows of a class table.

    Returns:
        [{column: value}] with numbers as int, and the names of missing columns.

    Raises:
        UserError: if the file is not a class table.
    """
    what = "a class table (CSV)"
    labels = list(map(LABELMAP.fullmatch, _content_lines(read_text(path, what))))
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
    rows = [_parse_row(row, f"{path}, line {number}", index, missing) for index, (number, row) in enumerate(cells)]
    scored = [row for row in rows if row["train_id"] not in (-1, IGNORE_INDEX)]
    if all(row["train_id"] is None for row in scored):
        for train_id, row in enumerate(scored):
            row["train_id"] = train_id
    for (number, _), row in zip(cells, rows, strict=True):
        if row["train_id"] is None:
            raise UserError(f"{path}, line {number}: expected a whole number for train_id, found ''")
    return rows, missing


def _content_lines(text):
    """Split a text into lines, without empty lines and comments."""
    return [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]


def _parse_row(row, line, index, missing):
    """Convert the numbers of a row to int.

    Args:
        row: {column: text}.
        line: file and line, for error messages.
        index: of the row, which is its id if the table has no column id.
        missing: columns that the table does not have.

    Returns:
        {column: value}; an empty train id is None.

    Raises:
        UserError: if a value is not a number, or out of range.
    """
    numbers = {}
    for column in COLUMNS[1:]:
        text = (row.get(column) or "").strip()
        if column in missing and column == "id":
            numbers[column] = index
        elif column in COLORS and not set(COLORS).isdisjoint(missing):
            numbers[column] = distinct_color(numbers["id"])[COLORS.index(column)]
        elif column == "train_id" and not text:
            numbers[column] = None
        elif INTEGER.fullmatch(text):
            numbers[column] = int(text.partition(".")[0])
        else:
            raise UserError(f"{line}: expected a whole number for {column}, found {row.get(column)!r}")
    outside = [c for c in COLORS if not 0 <= numbers[c] <= 255]
    if outside or numbers["id"] > 65535:
        column = outside[0] if outside else "id"
        raise UserError(f"{line}: expected {column} from 0 to {255 if outside else 65535}, "
                        f"found {numbers[column]}")
    return {"name": (row.get("name") or "").strip(), "category": (row.get("category") or "").strip(), **numbers}
