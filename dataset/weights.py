"""Class weights for the loss, so that rare classes count as much as frequent ones."""

import os

import numpy as np

from utils.common.errors import UserError
from utils.common.progress import progress
from utils.parallel.workers import do_jobs

from .labels import CITYSCAPES
from .text import read_csv

# Columns name,weight: the values published with OCNet, HRNet and later projects, from 1 / log of the pixel counts.
PUBLISHED = CITYSCAPES.with_name("class_weights.csv")


def class_weights(source, dataset, workers=0):
    """Return the loss weights of a data set's classes.

    Args:
        source: "cityscapes" for the published weights, looked up by class name; "balanced" for weights from the pixel
            counts of `dataset`; or the path of a CSV file with the columns name and weight, such as a class table with
            an additional column weight.
        dataset: a `CityscapesDataset`.
        workers: processes that count pixels for "balanced".

    Returns:
        A list of N floats, by train id.

    Raises:
        UserError: if the file is missing or does not give one valid weight for every class.
    """
    if source == "balanced":
        return balanced_weights(count_pixels(dataset, workers))
    path = PUBLISHED if source == "cityscapes" else source
    if not os.path.isfile(path):
        raise UserError(f"--class-weights {source}: expected cityscapes, balanced or a CSV file, found no such file")
    return read_weights(path, dataset.classes.names, source)


def read_weights(path, names, display_name=None):
    """Read the column `weight` of a CSV file.

    Args:
        path: of the file.
        names: class names whose weights are returned.
        display_name: what error messages call the file; None for its path.

    Returns:
        A list of floats from 1e-6 to 1e6, in the order of `names`.

    Raises:
        UserError: if the file does not give one valid weight for every name.
    """
    weights, flag = {}, f"--class-weights {display_name or path}"
    header, rows = read_csv(path, "a table of weights (CSV)")
    if not {"name", "weight"} <= set(header):
        raise UserError(f"{flag}: expected the columns name and weight, found {', '.join(header) or 'none'}")
    for number, row in rows:
        name, text = (row.get("name") or "").strip(), row.get("weight")
        if name not in names:
            continue
        if name in weights:
            raise UserError(f"{flag}, line {number}: expected every class once, found {name} again")
        try:
            weights[name] = float(text)
        except (TypeError, ValueError):
            weights[name] = -1.0
        if not 1e-6 <= weights[name] <= 1e6:
            raise UserError(f"{flag}, line {number}: expected a weight from 1e-6 to 1e6, found {text!r}")
    missing = [name for name in names if name not in weights]
    if missing:
        raise UserError(f"{flag}: expected a weight for each of the {len(names)} classes, found none "
                        f"for {', '.join(missing[:5])}")
    return [weights[name] for name in names]


def count_pixels(dataset, workers=0):
    """Count the pixels of each class in all label maps of a `CityscapesDataset`: (N,) int64."""
    jobs = do_jobs(dataset.count_classes, range(len(dataset)), workers)
    return np.sum(list(progress(jobs, "counting pixels of the classes", "label map")), axis=0)


def balanced_weights(pixels):
    """Compute class weights from pixel counts.

    Args:
        pixels: (N,) number of pixels of each class.

    Returns:
        A list of N floats: 1 / log(pixels), divided by the mean over the classes that occur; 1.0 for classes that do
        not occur.
    """
    pixels = np.asarray(pixels)
    weights = 1 / np.log(np.maximum(pixels, 2))
    present = pixels > 0
    return np.where(present, weights / weights[present].mean(), 1.0).tolist() if present.any() else [1.0] * len(pixels)
