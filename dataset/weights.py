"""Weights of the classes in the loss, so that rare ones count as much as frequent ones."""

import csv
import io
import math

import numpy as np
from torch.utils.data import DataLoader

from utils.cli import UserError
from utils.logger import progress

from .labels import CITYSCAPES
from .reading import read_file
from .sampling import Jobs

# name,weight: as published with OCNet, HRNet and many after them; their origin is 1 / log of the pixel counts.
PUBLISHED = CITYSCAPES.with_name("class_weights.csv")


def class_weights(which, dataset, workers=0):
    """The weights of a data set's classes, a list of N floats. Raises `UserError`.

    Args:
        which: `cityscapes`, the published ones, by name; `balanced`, from the pixels of `dataset`, which so many
            worker processes count; or a CSV file with the columns name and weight, such as a class table with one
            column more.
        dataset: a `CityscapesDataset`.
    """
    if which == "balanced":
        return balanced(count_pixels(dataset, workers))
    return read_weights(PUBLISHED if which == "cityscapes" else which, dataset.classes.names)


def read_weights(path, names):
    """The column `weight` of a CSV file, for the classes of these names: a list of floats above 0."""
    found = {}
    try:
        text = read_file(path, "a table of weights (CSV)").decode("utf-8-sig")
        reader = csv.DictReader(io.StringIO(text, newline=""))
        if not {"name", "weight"} <= set(reader.fieldnames or ()):
            raise UserError(f"--class-weights {path}: expected the columns name and weight, found "
                            f"{', '.join(reader.fieldnames or ()) or 'none'}")
        for row in reader:
            if row["name"] not in names:
                continue
            try:
                found[row["name"]] = float(row["weight"])
            except (TypeError, ValueError):
                found[row["name"]] = -1.0
            if not 0 < found[row["name"]] < math.inf:
                raise UserError(f"--class-weights {path}, line {reader.line_num}: expected a number above 0 as weight, "
                                f"found {row['weight']!r}")
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--class-weights {path}: expected a CSV file, found: {error}") from None
    missing = [name for name in names if name not in found]
    if missing:
        raise UserError(f"--class-weights {path}: expected a weight for each of the {len(names)} classes, found none "
                        f"for {', '.join(missing[:5])}")
    return [found[name] for name in names]


def count_pixels(dataset, workers=0):
    """Pixels of each class in all label maps: (N,) int64."""
    jobs = DataLoader(Jobs(dataset.count_classes, range(len(dataset))), None, num_workers=workers)
    return np.sum(list(progress(jobs, "counting pixels of the classes", "label map")), axis=0)


def balanced(pixels):
    """Pixels of N classes → 1 / log(pixels), divided by its mean over the classes that occur; 1 for those that do
    not."""
    pixels = np.asarray(pixels)
    weights = 1 / np.log(np.maximum(pixels, 2))
    there = pixels > 0
    return np.where(there, weights / weights[there].mean(), 1.0).tolist() if there.any() else [1.0] * len(pixels)
