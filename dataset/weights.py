"""Weights of the classes in the loss, so that rare ones count as much as frequent ones."""

import os

import numpy as np

from utils.common.errors import UserError
from utils.common.progress import progress
from utils.parallel.workers import do_jobs

from .labels import CITYSCAPES
from .text import read_csv

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
    path = PUBLISHED if which == "cityscapes" else which
    if not os.path.isfile(path):
        raise UserError(f"--class-weights {which}: expected cityscapes, balanced or a CSV file, found no such file")
    return read_weights(path, dataset.classes.names, which)


def read_weights(path, names, shown=None):
    """The column `weight` of a CSV file, for the classes of these names: a list of floats from 1e-6 to 1e6.

    shown: what the user calls the file, for messages.
    """
    found, flag = {}, f"--class-weights {shown or path}"
    header, rows = read_csv(path, "a table of weights (CSV)")
    if not {"name", "weight"} <= set(header):
        raise UserError(f"{flag}: expected the columns name and weight, found {', '.join(header) or 'none'}")
    for number, row in rows:
        name, text = (row.get("name") or "").strip(), row.get("weight")
        if name not in names:
            continue
        if name in found:
            raise UserError(f"{flag}, line {number}: expected every class once, found {name} again")
        try:
            found[name] = float(text)
        except (TypeError, ValueError):
            found[name] = -1.0
        if not 1e-6 <= found[name] <= 1e6:
            raise UserError(f"{flag}, line {number}: expected a weight from 1e-6 to 1e6, found {text!r}")
    missing = [name for name in names if name not in found]
    if missing:
        raise UserError(f"{flag}: expected a weight for each of the {len(names)} classes, found none "
                        f"for {', '.join(missing[:5])}")
    return [found[name] for name in names]


def count_pixels(dataset, workers=0):
    """Pixels of each class in all label maps: (N,) int64."""
    jobs = do_jobs(dataset.count_classes, range(len(dataset)), workers)
    return np.sum(list(progress(jobs, "counting pixels of the classes", "label map")), axis=0)


def balanced(pixels):
    """Pixels of N classes → 1 / log(pixels), divided by its mean over the classes that occur; 1 for those that do
    not."""
    pixels = np.asarray(pixels)
    weights = 1 / np.log(np.maximum(pixels, 2))
    there = pixels > 0
    return np.where(there, weights / weights[there].mean(), 1.0).tolist() if there.any() else [1.0] * len(pixels)
