"""What the channels of a network's output stand for: names, label ids and colors."""

import numpy as np

from ..common.errors import UserError

IGNORE_INDEX = 255
UNKNOWN = 254       # stands for ids that are not in a class table, so train ids end at 253


class Classes:
    """The classes that a network tells apart, by the rows of a class table.

    Attributes:
        names: N names, by train id.
        categories: N category names, by train id; the class's own name where the table has none.
        ids: (N,) the id written for each train id in predictions: of several with that train id, the table's first.
        palette: (256, 3) uint8 RGB by train id; black for what is ignored.
    """

    def __init__(self, rows, source="class table"):
        """rows: dicts with the columns of the file; source: its name, for messages. Raises `UserError`."""
        self.source = str(source)
        self.rows = rows
        evaluated = [row for row in rows if row["train_id"] not in (-1, IGNORE_INDEX)]
        found = sorted({row["train_id"] for row in evaluated})
        if not found or found != list(range(len(found))) or len(found) > UNKNOWN:
            raise UserError(f"{source}: expected train ids 0 to N-1 without a gap (-1 or 255 to ignore), "
                            f"N at most 254, found {found}")
        ids = [row["id"] for row in rows]
        twice = sorted({i for i in ids if ids.count(i) > 1})
        if twice:
            raise UserError(f"{source}: expected every id once, found {twice} several times")
        first = {row["train_id"]: row for row in reversed(evaluated)}
        classes = [first[train_id] for train_id in found]
        self.names = [row["name"] for row in classes]
        twice = sorted({name for name in self.names if self.names.count(name) > 1})
        if twice:       # scores are reported by name
            raise UserError(f"{source}: expected another name for every class, found {', '.join(twice)} several times")
        self.categories = [row["category"] or row["name"] for row in classes]
        self.ids = np.array([row["id"] for row in classes])
        self.palette = np.zeros((256, 3), np.uint8)
        self.palette[:len(classes)] = [[row["red"], row["green"], row["blue"]] for row in classes]

    @property
    def num_classes(self):
        return len(self.names)

    def decode(self, train_ids):
        """Train ids (H, W) → ids (H, W), uint8 or, where ids go beyond 255, uint16; ignored ones become 0."""
        table = np.zeros(256, np.uint8 if self.ids.max() < 256 else np.uint16)
        table[:self.num_classes] = self.ids
        return table[train_ids]

    def color(self, train_ids):
        """Train ids (H, W) → RGB (H, W, 3) uint8."""
        return self.palette[train_ids]
