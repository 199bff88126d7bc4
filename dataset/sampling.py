"""Samplers, and the loader of a training run.

An entry is a position in the sequence of samples, counted from 0 over the whole run: batch t of size B consists of the
entries tB to (t+1)B - 1. The sample of an entry is a function of seed and entry alone. It does not depend on the number
of processes and workers, and a resumed run continues with the same samples as an uninterrupted one.
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

POSITIONS = 16      # maximum number of pixels per class and image in the class index


class EntrySampler(Sampler):
    """Sampler that yields the samples of all entries that belong to this process.

    Args:
        seed: of all random draws.
        start, stop: first entry, and the entry after the last; multiples of batch_size.
        batch_size: entries per batch, over all processes; a multiple of world.
        rank: number of this process, which gets the rank-th slice of every batch.
        world: number of processes.
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
        """Choose the sample of an entry.

        Returns:
            The argument of the data set's `__getitem__`: (index, entry), or (index, entry, (row, column)) for a crop
            that contains this pixel.
        """
        raise NotImplementedError


class EpochSampler(EntrySampler):
    """Sampler of every image once per epoch; the order in epoch e is a function of (seed, e).

    Args:
        length: number of images in the data set.
        seed, start, stop, batch_size, rank, world: as in `EntrySampler`.
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
    """Sampler that draws a split with probability proportional to its weight, then one of its images.

    Args:
        lengths: number of images of each split, in the data set's order.
        weights: of each split.
        seed, start, stop, batch_size, rank, world: as in `EntrySampler`.
    """

    def __init__(self, lengths, weights, seed, start, stop, batch_size=1, rank=0, world=1):
        super().__init__(seed, start, stop, batch_size, rank, world)
        self.first_images = np.concatenate([[0], np.cumsum(lengths)])       # index of each split's first image
        self.probabilities = np.asarray(weights, float) / np.sum(weights)

    def sample(self, entry):
        rng = np.random.default_rng((self.seed, entry, 1))
        split = rng.choice(len(self.probabilities), p=self.probabilities)
        return int(rng.integers(self.first_images[split], self.first_images[split + 1])), entry


class ClassSampler(EntrySampler):
    """Sampler of class-uniform crops: draws a class, an image that contains it, and a pixel of it for the crop.

    After Zhu et al., "Improving Semantic Segmentation via Video Propagation and Label Relaxation", CVPR 2019,
    section 3.4 (there for a part of each epoch; here for every sample).

    Images of a class, and pixels of an image, are numbered in the order of the index. Memory: 8 bytes per row of the
    index and 12 per image and class.

    Args:
        index: (M, 4) int64 rows of image, class, row, column, from `class_index`.
        seed, start, stop, batch_size, rank, world: as in `EntrySampler`.
    """

    def __init__(self, index, seed, start, stop, batch_size=1, rank=0, world=1):
        super().__init__(seed, start, stop, batch_size, rank, world)
        images = int(index[:, 0].max(initial=0)) + 1
        # A group is the pixels of one class in one image; groups are sorted by class, then by their first row.
        keys, first, group, counts = np.unique(index[:, 1] * images + index[:, 0], return_index=True,
                                               return_inverse=True, return_counts=True)
        order = np.lexsort((first, keys // images))
        rank_of_group = np.empty_like(order)
        rank_of_group[order] = np.arange(len(order))
        rows = np.argsort(rank_of_group[group.reshape(-1)], kind="stable")
        self.pixels = np.stack([index[:, 2].astype(np.int32)[rows], index[:, 3].astype(np.int32)[rows]], axis=1)
        self.first_pixels = np.concatenate([[0], np.cumsum(counts[order])])             # of each group, and the end
        self.images = (keys % images)[order].astype(np.int32)                           # of each group
        classes, first_groups = np.unique(keys // images, return_index=True)            # of each class
        self.num_classes, self.first_groups = len(classes), [*first_groups.tolist(), len(keys)]

    def sample(self, entry):
        rng = np.random.default_rng((self.seed, entry, 2))
        number = rng.integers(self.num_classes)
        first, end = self.first_groups[number:number + 2]
        group = first + rng.integers(end - first)
        first, end = self.first_pixels[group:group + 2]
        row, column = self.pixels[first + rng.integers(end - first)].tolist()
        return int(self.images[group]), entry, (row, column)


def make_sampler(dataset, *, kind: str, seed: int, start: int, stop: int, batch_size: int, rank: int = 0,
                 world: int = 1, index: np.ndarray | None = None) -> EntrySampler:
    """Make the sampler for the entries start to stop - 1 of a run.

    Args:
        dataset: a `CityscapesDataset`.
        kind: "uniform": every image once per epoch or, if the data set's splits have weights, splits by their weights;
            "class": class-uniform crops.
        seed, start, stop, batch_size, rank, world: as in `EntrySampler`.
        index: from `class_index`, the same in all processes; used by "class" only.

    Raises:
        ValueError: for another kind, for "class" without an index, and for "class" with weighted splits, whose weights
            it would ignore.
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
    """Make the loader of the training batches of the steps `start` to `stop` - 1.

    Args:
        dataset: a `CityscapesDataset`.
        start, stop: first step, and the step after the last.
        batch_size: images per step, over all processes.
        parts: number of parts, loaded one after the other, into which each batch is divided.
        rank: number of this process.
        world: number of processes.
        workers: processes that read samples.
        pin_memory: whether to use pinned memory, for copies to a GPU.
        sampling: kind, index and seed, as in `make_sampler`.
    """
    part = batch_size // parts
    sampler = make_sampler(dataset, start=start * batch_size, stop=stop * batch_size, batch_size=part, rank=rank,
                           world=world, **sampling)
    return Loader(dataset, part // world, sampler=sampler, workers=workers, prefetch=4, pin_memory=pin_memory)


def class_positions(train_ids, seed, ignore_index=255):
    """Draw up to `POSITIONS` random pixels of each class in a label map.

    Args:
        train_ids: (H, W) uint8.
        seed: of the random draw.
        ignore_index: train id that is left out.

    Returns:
        [(class, row, column)].
    """
    rng = np.random.default_rng(seed)
    flat = train_ids.ravel()
    positions = []
    for train_id in np.flatnonzero(np.bincount(flat, minlength=256)):
        if train_id == ignore_index:
            continue
        pixels = np.flatnonzero(flat == train_id)
        pixels = rng.choice(pixels, min(POSITIONS, len(pixels)), replace=False)
        positions += [(int(train_id), *divmod(int(pixel), train_ids.shape[1])) for pixel in pixels]
    return positions


def class_index(dataset, folder, workers):
    """Return the class index of a data set: positions of pixels of each class, for class-uniform crops.

    The index is created by reading all label maps, and stored in `folder`. It is created again if label maps or classes
    have changed and, with a warning, if the stored file is damaged or not a class index.

    Args:
        dataset: a `CityscapesDataset`.
        folder: where the index is stored.
        workers: processes that read label maps.

    Returns:
        (M, 4) int64 rows of image, class, row, column.
    """
    files = [(str(path), *stamp(path)) for _, path in dataset.pairs]
    key = hashlib.sha256(repr((files, dataset.classes.rows, dataset.seed)).encode()).hexdigest()[:16]
    path = Path(folder, f"class_index_{key}.npz")       # a zip archive, which has a checksum
    index = _read_index(path)
    if index is not None:
        return index
    if os.path.lexists(path):
        warnings.warn(f"{path} is not a class index and is created again", stacklevel=2)
        if os.path.isdir(path) and not os.listdir(path):
            os.rmdir(path)
    rows = []
    for positions in progress(do_jobs(dataset.positions, range(len(dataset)), workers), "finding classes", "label map"):
        rows += positions
    index = np.array(rows, np.int64).reshape(-1, 4)
    write_atomically(path, lambda file: np.savez(file, index=index))
    return index


def _read_index(path):
    """Read a class index; None if the file is missing or does not contain such an array."""
    try:
        if not os.path.isfile(path):
            return None
        with zipfile.ZipFile(path) as archive, archive.open("index.npy") as file:
            index = np.lib.format.read_array(file, allow_pickle=False)
    except (OSError, ValueError, KeyError, EOFError, NotImplementedError, MemoryError, zipfile.BadZipFile):
        return None
    return index if index.dtype == np.int64 and index.ndim == 2 and index.shape[1] == 4 else None
