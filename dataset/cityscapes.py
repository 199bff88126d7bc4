"""Cityscapes, and every data set that a list of files and a class table describe."""

import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.utils.data import Dataset, Sampler

from utils import cli
from utils.cli import UserError

from .labels import IGNORE_INDEX, ClassTable

OFFICIAL_COUNTS = {"train": 2975, "val": 500, "test": 1525}


class CityscapesDataset(Dataset):
    """Images with label maps.

    Without a list, `root/leftImg8bit/<split>/<city>/*_leftImg8bit.png` and
    `root/gtFine/<split>/<city>/*_gtFine_labelIds.png` are scanned.

    Args:
        root: folder of the data set.
        split: `train`, `val` or `test`.
        data_list: text file of "image label" lines, paths relative to root.
        classes: `ClassTable`, or the CSV file of one; None for Cityscapes.
        transform: (image (H, W, 3) uint8, label (H, W) uint8, NumPy Generator) → image, label.
        seed: of the draws of `transform`.
        instances: also read *_instanceIds.png beside *_labelIds.png, where there is one.

    An item is {"image": uint8 (3, H, W) RGB, "label": uint8 (H, W) train ids, "name": str}, with instances also
    {"instances": int32 (H, W), "index": int}. An index may be
    a pair (index, entry): the draws of `transform` are a function of (seed, entry) alone, so it does not
    matter which worker makes the sample. Raises `UserError` where a file or the list is at fault.
    """

    def __init__(self, root, split="train", data_list=None, classes=None, transform=None, seed=0,
                 instances=False):
        self.root = Path(root)
        self.split = split
        self.classes = classes if isinstance(classes, ClassTable) else ClassTable.read(*([classes] * bool(classes)))
        self.transform = transform
        self.seed = seed
        self.instances = instances
        if not self.root.is_dir():
            raise UserError(f"--data-dir {root}: expected a folder, found "
                            f"{'a file' if self.root.exists() else 'nothing there'}")
        self.scanned = not data_list
        if self.scanned:
            self.pairs, self.places = _scan(self.root, split), None
        else:
            self.pairs, self.places = _read_list(self.root, Path(data_list))
        self.names = unique_names([image for image, _ in self.pairs], self.root)

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        index, entry = index if isinstance(index, tuple) else (index, index)
        try:
            image, label = self._read(*self.pairs[index])
        except UserError as error:
            if self.scanned:
                raise
            raise UserError(f"{self.places[index]}: {error}") from None
        if self.transform is not None:
            image, label = self.transform(image, label, np.random.default_rng((self.seed, entry)))
        item = {"image": torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))),
                "label": torch.from_numpy(np.ascontiguousarray(label)),
                "name": self.names[index]}
        if self.instances:
            path = self.pairs[index][1]
            path = path.with_name(path.name.replace("labelIds", "instanceIds"))
            if path != self.pairs[index][1] and path.is_file():
                item |= {"instances": torch.from_numpy(np.asarray(_open(path)).astype(np.int32)), "index": index}
        return item

    def _read(self, image_path, label_path):
        image, label = read_image(image_path), read_label(label_path, self.classes)
        if image.shape[:2] != label.shape:
            raise UserError(f"{label_path}: expected the size of {image_path}, {_size(image)}, found {_size(label)}")
        return image, label

    def check_labels(self, count=8):
        """Read some label maps, spread evenly, before a long run begins.

        Raises `UserError` where one holds values that the class table does not know, as reading any does, or where
        nothing in them is labelled.
        """
        chosen = sorted({len(self) * k // count for k in range(count)})
        if all((read_label(self.pairs[index][1], self.classes) == IGNORE_INDEX).all() for index in chosen):
            raise UserError(f"{self.pairs[chosen[0]][1]} and {len(chosen) - 1} other label maps: expected pixels of "
                            f"the {self.classes.num_classes} classes of {self.classes.source}, found only ignored ones")

    def describe(self):
        """One line: how many images, and whether that differs from the official split."""
        text = f"{self.split if self.scanned else 'list'}: {len(self)} images, {self.classes.num_classes} classes"
        official = OFFICIAL_COUNTS.get(self.split)
        if self.scanned and official and len(self) != official:
            text += f" (the official Cityscapes {self.split} split has {official})"
        return text


class EpochSampler(Sampler):
    """Endless permutations of a data set, one after the other: yields (index, entry) from `start` on.

    Entry e lies in epoch e // length, whose permutation is a function of (seed, epoch).

    Args:
        length: entries of an epoch.
        seed: of the permutations.
        start, stop: first entry, and the one to stop before; whole batches.
        batch_size: entries of a batch, over all processes.
        rank, world: this process, and their number: it gets the rank-th slice of every batch.
    """

    def __init__(self, length, seed, start, stop, batch_size=1, rank=0, world=1):
        self.length, self.seed, self.start, self.stop = length, seed, start, stop
        self.batch_size, self.rank, self.share = batch_size, rank, batch_size // world

    def __len__(self):
        return (self.stop - self.start) // self.batch_size * self.share

    def __iter__(self):
        epoch, order = None, None
        for entry in range(self.start, self.stop):
            if entry % self.batch_size // self.share != self.rank:
                continue
            if entry // self.length != epoch:
                epoch = entry // self.length
                order = np.random.default_rng((self.seed, epoch)).permutation(self.length)
            yield int(order[entry % self.length]), entry


def read_image(path, upright=False):
    """File → RGB (H, W, 3) uint8: grey, palettes, 16 bits and transparency become RGB. Raises `UserError`.

    upright: turn it as its EXIF orientation says.
    """
    image = _open(path)
    if upright:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):      # 16 bits: Pillow would clip at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    return np.asarray(image.convert("RGB"))


def read_label(path, classes):
    """File → train ids (H, W) uint8 by the class table. Raises `UserError`."""
    ids = np.asarray(_open(path))
    if ids.ndim != 2:
        raise UserError(f"{path}: expected a label map with one channel of ids, found {ids.shape[2]} channels")
    if not np.issubdtype(ids.dtype, np.integer):
        raise UserError(f"{path}: expected whole numbers, found {ids.dtype}")
    if not classes.is_identity and "labelTrainIds" in Path(path).name:
        raise UserError(f"{path}: expected ids ({classes.source}), found a file of train ids by its name: "
                        "use *_labelIds.png")
    train_ids = classes.encode(ids, path)
    if classes.looks_like_train_ids(ids):
        warnings.warn(f"{path}: its values look like train ids, but are read as ids ({classes.source}); "
                      "as ids the map is mostly void", stacklevel=2)
    return train_ids


def _open(path):
    try:
        image = Image.open(path)
        image.load()
        return image
    except FileNotFoundError:
        raise UserError(f"{path}: expected an image, found no such file") from None
    except UnidentifiedImageError:
        raise UserError(f"{path}: expected an image, found a file that is none") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: expected an image, found one that cannot be read: {error}") from None


def _scan(root, split):
    folder = root / "leftImg8bit" / split
    images = sorted(folder.glob("*/*_leftImg8bit.png"))
    if not images:
        raise UserError(f"{folder}: expected <city>/*_leftImg8bit.png in it, found none "
                        "(--data-list reads other layouts)")
    pairs = []
    for image in images:
        name = image.name.replace("_leftImg8bit.png", "_gtFine_labelIds.png")
        label = root / "gtFine" / split / image.parent.name / name
        if not label.is_file():
            raise UserError(f"{label}: expected the label map of {image}, found no such file")
        pairs.append((image, label))
    return pairs


def _read_list(root, path):
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--data-list {path}: expected a text file, found: {error}") from None
    pairs, places = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        parts = line.split("\t") if "\t" in line else line.split()
        if len(parts) != 2:
            raise UserError(f"{path}, line {number}: expected \"image label\", found {line.strip()!r}")
        pair = tuple(root / part.strip() for part in parts)
        for file in pair:
            if not file.is_file():
                raise UserError(f"{path}, line {number}: expected the file {file}, found no such file")
        pairs.append(pair)
        places.append(f"{path}, line {number}")
    if not pairs:
        raise UserError(f"--data-list {path}: expected lines \"image label\", found an empty list")
    return pairs, places


def unique_names(images, root):
    """File stems; with the folders before them where two images share one."""
    stems = [image.stem for image in images]
    if max(Counter(stems).values()) == 1:
        return stems
    relative = (image.relative_to(root) if image.is_relative_to(root) else image for image in images)
    return ["_".join(path.with_suffix("").parts).strip("/") for path in relative]


def _size(array):
    return f"{array.shape[1]}×{array.shape[0]}"


def main():
    """What lies in a folder: counts of each split, and whether its first pair can be read."""
    parser = cli.Parser(description="Say what a Cityscapes folder holds.")
    parser.add_argument("data_dir", help="folder with leftImg8bit/ and gtFine/")
    data_dir = parser.parse_args().data_dir
    for split in ("train", "val"):
        dataset = CityscapesDataset(data_dir, split)
        item = dataset[0]
        print(f"{dataset.describe()}; the first is {item['label'].shape[1]}×{item['label'].shape[0]}")


if __name__ == "__main__":
    cli.run(main)
