"""Class tables: what the ids in a label map mean.

A table is a CSV file with the columns name, id, train_id, red, green, blue and, if wanted, category.
`id` is the value in label maps, `train_id` the channel of the network's output; pixels of the train ids -1 and 255 are
ignored in training and scores.
The Cityscapes table is that of cityscapesScripts, helpers/labels.py.
"""

import csv
import functools
import io
import warnings
from pathlib import Path

import numpy as np

from utils.classes import IGNORE_INDEX, UNKNOWN, Classes
from utils.cli import UserError
from utils.decoding import read_file

CITYSCAPES = Path(__file__).parent / "list" / "cityscapes" / "classes.csv"
COLUMNS = ("name", "id", "train_id", "red", "green", "blue")


class ClassTable(Classes):
    """The classes of a data set: beside what a network's outputs stand for, what the values in label maps mean.

    Attributes, beside those of `Classes`:
        lookup: (65536,) id → train id, `IGNORE_INDEX` or `UNKNOWN`; uint8.
        negative: {negative id: train id or `IGNORE_INDEX`}.
        color_lookup: {red · 65536 + green · 256 + blue: the rows of that colour}.
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

    @classmethod
    def read(cls, path=CITYSCAPES):
        """Read a table from a CSV file. Raises `UserError` naming file and line."""
        rows = []
        try:
            text = read_file(path, "a class table (CSV)").decode("utf-8-sig")
            reader = csv.DictReader(io.StringIO(text, newline=""))
            missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                raise UserError(f"{path}: expected the columns {','.join(COLUMNS)}[,category], "
                                f"found no {', '.join(missing)}")
            rows = [_parse(row, f"{path}, line {reader.line_num}") for row in reader]
        except (UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"{path}: expected a class table (CSV), found: {error}") from None
        return cls(rows, path)

    def as_csv(self):
        """The text of the table's file."""
        text = io.StringIO()
        categories = ["category"] * any(row["category"] for row in self.rows)
        writer = csv.DictWriter(text, [*COLUMNS, *categories], extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        return text.getvalue()

    def check_count(self, expected):
        """Raise `UserError` where --num-classes, None if it is not given, says another number of classes."""
        if expected not in (None, self.num_classes):
            raise UserError(f"--num-classes {expected}: expected the {self.num_classes} classes of {self.source}")

    def encode(self, ids, name="label map"):
        """Ids (H, W), any integer dtype, or colours (H, W, 3) uint8 → train ids (H, W) uint8.

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
            shown = f"({color >> 16}, {color >> 8 & 255}, {color & 255})"
            if not found:
                same = "; red, green and blue are equal, as if ids were saved in three channels: save one" * (
                    len({color >> 16, color >> 8 & 255, color & 255}) == 1)
                raise UserError(f"{name}: expected the colours of {self.source}, found {shown}{same}")
            train_ids[packed == color] = self._class_of(found, shown, name)
        return train_ids

    def _class_of(self, rows, shown, name):
        """The train id, or `IGNORE_INDEX`, of a colour that these rows of the table share."""
        meant = {int(self.lookup[row["id"]]): row for row in rows}
        if len(meant) == 1:
            return next(iter(meant))
        scored = sorted(meant.keys() - {IGNORE_INDEX})
        names = ", ".join(f"{row['name']} (train id {row['train_id']})" for row in rows)
        # Cityscapes gives pole and polegroup, which is ignored, one colour. They are of one category, and polegroup is
        # rare: such pixels count as pole. Anything more ambiguous is an error.
        if len(scored) > 1 or len({row["category"] for row in rows}) > 1 or not rows[0]["category"]:
            raise UserError(f"{name}: expected a colour for each class, found {shown}, which {self.source} gives to "
                            f"{names}; use a map of ids")
        warnings.warn(f"{self.source} gives the colour {shown} to {names}: all its pixels are learned and scored as "
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
        everything = np.unique(ids)
        hint = ""
        if not self.is_identity and np.isin(everything, [*range(self.num_classes), IGNORE_INDEX]).all():
            hint = "; these look like train ids: give the map of ids (Cityscapes: *_labelIds.png)"
        elif self.is_identity and everything.max() <= 33:
            hint = "; these look like Cityscapes ids: use its class table, or the map of train ids"
        raise UserError(f"{name}: expected ids that {self.source} knows, "
                        f"found {', '.join(map(str, unknown[:8]))}{' ...' if len(unknown) > 8 else ''}{hint}")


@functools.cache
def _average_sizes():
    """{class name: pixels of an average instance}, from cityscapesScripts, evalPixelLevelSemanticLabeling.py."""
    with open(CITYSCAPES.with_name("instance_sizes.csv"), newline="", encoding="utf-8") as file:
        return {row["name"]: float(row["pixels"]) for row in csv.DictReader(file)}


def _parse(row, where):
    """A row of the file with its numbers as int; where: file and line, for messages. Raises `UserError`."""
    numbers = {}
    for column in COLUMNS[1:]:
        try:
            numbers[column] = int(row[column])
        except (TypeError, ValueError):
            raise UserError(f"{where}: expected a whole number for {column}, found {row[column]!r}") from None
    outside = [c for c in ("red", "green", "blue") if not 0 <= numbers[c] <= 255]
    if outside or numbers["id"] > 65535:
        column = outside[0] if outside else "id"
        raise UserError(f"{where}: expected {column} from 0 to {255 if outside else 65535}, "
                        f"found {numbers[column]}")
    return {"name": row["name"].strip(), "category": (row.get("category") or "").strip(), **numbers}
