"""Classes of a network's output channels: names, label ids and colors."""

import cv2
import numpy as np

from ..common.errors import UserError

IGNORE_INDEX = 255
UNKNOWN = 254       # marks ids that are not in the class table, so train ids are at most 253


class Classes:
    """The classes of a network, from the rows of a class table.

    Args:
        rows: dicts with the columns of the file.
        source: name of the file, for messages.

    Attributes:
        names: N names, by train id.
        categories: N category names, by train id; the class name where the table has no category.
        ids: (N,) the id written to predictions for each train id; the table's first if several rows share a train id.
        palette: (256, 3) uint8 RGB by train id; black for ignored values.

    Raises:
        UserError: if train ids, ids or names do not form a valid table.
    """

    def __init__(self, rows, source="class table"):
        self.source = str(source)
        self.rows = rows
        evaluated = [row for row in rows if row["train_id"] not in (-1, IGNORE_INDEX)]
        train_ids = sorted({row["train_id"] for row in evaluated})
        if not train_ids or train_ids != list(range(len(train_ids))) or len(train_ids) > UNKNOWN:
            raise UserError(f"{source}: expected train ids 0 to N-1 without a gap (-1 or 255 to ignore), or only empty "
                            f"ones, N at most 254, found {train_ids}")
        ids = [row["id"] for row in rows]
        duplicates = sorted({i for i in ids if ids.count(i) > 1})
        if duplicates:
            raise UserError(f"{source}: expected every id once, found {duplicates} several times")
        first = {row["train_id"]: row for row in reversed(evaluated)}
        classes = [first[train_id] for train_id in train_ids]
        self.names = [row["name"] for row in classes]
        duplicates = sorted({name for name in self.names if self.names.count(name) > 1})
        if duplicates:      # scores are reported by name
            raise UserError(f"{source}: expected a different name for every class, "
                            f"found {', '.join(duplicates)} several times")
        self.categories = [row["category"] or row["name"] for row in classes]
        self.ids = np.array([row["id"] for row in classes])
        self.palette = np.zeros((256, 3), np.uint8)
        self.palette[:len(classes)] = [[row["red"], row["green"], row["blue"]] for row in classes]

    @property
    def num_classes(self):
        return len(self.names)

    def decode(self, train_ids):
        """Train ids (H, W) → ids (H, W), uint8, or uint16 if an id exceeds 255; ignored pixels become 0."""
        table = np.zeros(256, np.uint8 if self.ids.max() < 256 else np.uint16)
        table[:self.num_classes] = self.ids
        return table[train_ids]

    def color(self, train_ids):
        """Train ids (H, W) → RGB (H, W, 3) uint8."""
        return cv2.LUT(cv2.merge(3 * [np.asarray(train_ids, np.uint8)]), self.palette[None])
