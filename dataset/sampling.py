"""The order of the samples of a run.

Entries are the places in that order, counted from 0 over the whole run: batch t of size B is entries tB to (t+1)B - 1.
Which sample stands at an entry is a function of seed and entry alone. So it does not matter how many processes and
workers there are, and a resumed run goes on with the samples that would have come.
"""

import hashlib
import os
import warnings
import zipfile
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset, Sampler

from utils.common.files import write_atomically
from utils.common.progress import progress
from utils.parallel.workers import Loader, do_jobs

from .reading import stamp

POSITIONS = 16      # pixels of a class that the class index keeps of an image


class EntrySampler(Sampler):
    """Yields the sample of every entry that belongs to this process.

    Args:
        seed: of everything drawn at random.
        start, stop: first entry, and the one to stop before; multiples of batch_size.
        batch_size: entries of a batch, over all processes; a multiple of world.
        rank, world: this process, and their number: it gets the rank-th slice of every batch.
    """

    def __init__(self, seed, start, stop, batch_size=1, rank=0, world=1):
        self.seed, self.start, self.stop = seed, start, stop
        self.batch_size, self.rank, self.per_process = batch_size, rank, batch_size // world

    def __len__(self):
        return (self.stop - self.start) // self.batch_size * self.per_process

    def __iter__(self):
        for entry in range(self.start, self.stop):
            if entry % self.batch_size // self.per_process == self.rank:
                yield self.sample(entry)

    def sample(self, entry):
        """What the data set's `__getitem__` gets for an entry: (index, entry), or (index, entry, (row, column)) for a
        crop that holds this pixel."""
        raise NotImplementedError


class EpochSampler(EntrySampler):
    """Every image once an epoch, in another order each time; that of epoch e is a function of (seed, e).

    length: images of the data set; the rest as in `EntrySampler`.
    """

    def __init__(self, length, seed, start, stop, batch_size=1, rank=0, world=1):
        super().__init__(seed, start, stop, batch_size, rank, world)
        self.length, self.epoch, self.order = length, None, None

    def sample(self, entry):
        if entry // self.length != self.epoch:
            self.epoch = entry // self.length
            self.order = np.random.default_rng((self.seed, self.epoch)).permutation(self.length)
        return int(self.order[entry % self.length]), entry


class WeightedSampler(EntrySampler):
    """Draws a split of the data set with a probability in proportion to its weight, then one of its images.

    lengths, weights: number of images of each split, in the data set's order, and its weight; the rest as in
        `EntrySampler`.
    """

    def __init__(self, lengths, weights, seed, start, stop, batch_size=1, rank=0, world=1):
        super().__init__(seed, start, stop, batch_size, rank, world)
        self.first = np.concatenate([[0], np.cumsum(lengths)])      # index of each split's first image
        self.probabilities = np.asarray(weights, float) / np.sum(weights)

    def sample(self, entry):
        rng = np.random.default_rng((self.seed, entry, 1))
        split = rng.choice(len(self.probabilities), p=self.probabilities)
        return int(rng.integers(self.first[split], self.first[split + 1])), entry


class ClassSampler(EntrySampler):
    """Class-uniform crops: draws a class, an image that has it, and one of its pixels, which the crop will hold.

    After Zhu et al., "Improving Semantic Segmentation via Video Propagation and Label Relaxation", CVPR 2019,
    section 3.4 (there for a part of each epoch; here for every sample).

    index: (M, 4) int64 rows of image, class, row, column, as `class_positions` finds them; the rest as in
        `EntrySampler`.
    """

    def __init__(self, index, seed, start, stop, batch_size=1, rank=0, world=1):
        super().__init__(seed, start, stop, batch_size, rank, world)
        self.pixels = {}        # {class: {image: [(row, column)]}}
        for image, train_id, row, column in index.tolist():
            self.pixels.setdefault(train_id, {}).setdefault(image, []).append((row, column))
        self.classes = sorted(self.pixels)

    def sample(self, entry):
        rng = np.random.default_rng((self.seed, entry, 2))
        images = self.pixels[self.classes[rng.integers(len(self.classes))]]
        image = list(images)[rng.integers(len(images))]
        return image, entry, images[image][rng.integers(len(images[image]))]


def make_sampler(dataset, *, kind: str, seed: int, start: int, stop: int, batch_size: int, rank: int = 0,
                 world: int = 1, index: np.ndarray | None = None) -> EntrySampler:
    """The sampler of a `CityscapesDataset` for the entries start to stop - 1 of a run.

    Args:
        kind: "uniform": every image once an epoch or, where the data set's splits have weights, splits by their
            weights; "class": class-uniform crops.
        seed, start, stop, batch_size, rank, world: as in `EntrySampler`.
        index: of `class_index`, the same in all processes; with "class" only.

    Raises `ValueError` for another kind, "class" without an index, and "class" for splits with weights, which it would
    not heed.
    """
    entries = {"seed": seed, "start": start, "stop": stop, "batch_size": batch_size, "rank": rank, "world": world}
    if kind == "class":
        if index is None or dataset.weights:
            raise ValueError("class sampling: expected an index of classes and splits without weights, found "
                             f"{'no index' if index is None else f'weights {dataset.weights}'}")
        return ClassSampler(index, **entries)
    if kind != "uniform":
        raise ValueError(f"kind of sampling: expected uniform or class, found {kind}")
    if dataset.weights:
        return WeightedSampler(dataset.counts, dataset.weights, **entries)
    return EpochSampler(len(dataset), **entries)


def make_loader(dataset: Dataset, *, start: int, stop: int, batch_size: int, parts: int = 1, rank: int = 0,
                world: int = 1, workers: int = 0, pin_memory: bool = False, **sampling) -> Loader:
    """The batches of the steps from `start` to `stop` - 1, or their parts.

    Args:
        batch_size: images per step, over all processes.
        parts: in which a batch is taken, one after the other.
        rank, world: this process, and their number.
        workers: processes that read samples.
        pin_memory: for a GPU.
        sampling: kind, index and seed as in `make_sampler`.
    """
    part = batch_size // parts
    sampler = make_sampler(dataset, start=start * batch_size, stop=stop * batch_size, batch_size=part, rank=rank,
                           world=world, **sampling)
    return Loader(dataset, part // world, sampler=sampler, workers=workers, prefetch=4, pin_memory=pin_memory)


def class_positions(train_ids, seed, ignore_index=255):
    """Where the classes of a label map are: [(class, row, column)] of up to `POSITIONS` random pixels of each class.

    train_ids: (H, W) uint8.
    """
    rng = np.random.default_rng(seed)
    flat = train_ids.ravel()
    found = []
    for train_id in np.flatnonzero(np.bincount(flat, minlength=256)):
        if train_id == ignore_index:
            continue
        pixels = np.flatnonzero(flat == train_id)
        pixels = rng.choice(pixels, min(POSITIONS, len(pixels)), replace=False)
        found += [(int(train_id), *divmod(int(pixel), train_ids.shape[1])) for pixel in pixels]
    return found


def class_index(dataset, folder, workers):
    """Where the classes are in the label maps of a `CityscapesDataset`: (M, 4) int64 rows of image, class, row, column.

    Made once by `workers` processes that read all label maps, and kept in `folder`. It is made again when files or
    classes have changed, and, with a warning, when the file in its place is damaged or something else.
    """
    files = [(str(path), *stamp(path)) for _, path in dataset.pairs]
    key = hashlib.sha256(repr((files, dataset.classes.rows, dataset.seed)).encode()).hexdigest()[:16]
    path = Path(folder, f"class_index_{key}.npz")       # a zip archive, which has a checksum
    index = _read_index(path)
    if index is not None:
        return index
    if os.path.lexists(path):
        warnings.warn(f"{path} is no index of classes, and is made again", stacklevel=2)
        if os.path.isdir(path) and not os.listdir(path):
            os.rmdir(path)
    rows = []
    for found in progress(do_jobs(dataset.positions, range(len(dataset)), workers), "finding classes", "label map"):
        rows += found
    index = np.array(rows, np.int64).reshape(-1, 4)
    write_atomically(path, lambda file: np.savez(file, index=index))
    return index


def _read_index(path):
    """The array of a class index, or None where there is no file, or one that does not hold such an array."""
    try:
        if not os.path.isfile(path):
            return None
        with zipfile.ZipFile(path) as archive, archive.open("index.npy") as file:
            index = np.lib.format.read_array(file, allow_pickle=False)
    except (OSError, ValueError, KeyError, EOFError, NotImplementedError, MemoryError, zipfile.BadZipFile):
        return None
    return index if index.dtype == np.int64 and index.ndim == 2 and index.shape[1] == 4 else None
