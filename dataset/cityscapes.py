"""Data set of images with label maps: Cityscapes, lists of files, or two folders; and the search for its files."""

import contextlib
import hashlib
import itertools
import os
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from utils.common.errors import UserError, plural
from utils.common.files import check_room, kind_of
from utils.common.messages import logger
from utils.common.progress import progress
from utils.imaging.classes import IGNORE_INDEX
from utils.imaging.decode import read_ids, read_image, read_palette, size_mismatch, unclear_orientation, warn_once
from utils.ops.jitter import draw_jitter
from utils.parallel.workers import do_jobs

from .folders import (
    OTHER_LAYOUTS,
    check_folder,
    decode_as_path,
    has_no_split_folders,
    match_stems,
    pair_folders,
    pair_listed,
    read_list,
    refuse_broken_link,
    report_left_out,
    shared_splits,
    to_nfc,
    to_nfd,
)
from .labels import ClassTable
from .reading import DecodedCache
from .sampling import class_positions

OFFICIAL_COUNTS = {"train": 2975, "val": 500, "test": 1525, "train_extra": 19998}
IMAGE_ENDING = "_leftImg8bit.png"
COARSE = "train_extra"      # the split with label maps in gtCoarse
DECODERS = (read_image, read_ids)       # for an image and for its label map


class CityscapesDataset(Dataset):
    """Data set of images with label maps.

    With one root folder and no list, `root/leftImg8bit/<split>/<city>/*_leftImg8bit.png` and
    `root/gtFine/<split>/<city>/*_gtFine_labelIds.png` are scanned (gtCoarse for `train_extra`).

    An item is {"image": uint8 (3, H, W) RGB, "label": uint8 (H, W) train ids, "name": str}, with instances also
    {"instances": int32 (H, W), "index": int}, with jitter also {"jitter": (4,) float32}: factors for
    `utils.ops.jitter.apply_jitter`. Image and label map are turned upright by their EXIF orientation.

    The key of an item is one of
        index: random draws are new every time, from PyTorch's generator, which a DataLoader seeds in each worker and
            epoch;
        (index, entry): random draws are a function of (seed, entry) alone, whichever worker makes the sample
            (`dataset.sampling`);
        (index, entry, (row, column)): as before, and the window of the transform contains this pixel.

    Args:
        root: folder of the data set, or (folder of images, folder of label maps with the same stems), see
            `dataset.folders`.
        split: `train`, `val`, `test` or `train_extra`; several are joined by +, optionally with weights:
            `train:2+train_extra:1`.
        data_list: text file, or a list of them, of "image label" lines, with paths relative to root or to the list; for
            two folders of one stem per line.
        classes: `ClassTable`, or the path of its CSV file; None for Cityscapes.
        transform: function (image (H, W, 3) uint8, label (H, W), NumPy Generator) → image, label, such as
            `dataset.transforms.train_transform`.
        seed: of the random draws of `transform` and `jitter`.
        instances: whether to read *_instanceIds.png, too, if it exists beside *_labelIds.png.
        cache: folder for decoded arrays (`dataset.reading.DecodedCache`), or None.
        jitter: largest change of brightness, contrast, saturation (factors 1 ± change) and hue (turns), or None; as in
            `utils.ops.jitter`.

    Attributes:
        pairs: [(path of the image, path of its label map)].
        names: unique names of the images, from `unique_names`.
        splits: names of the scanned splits; empty with lists.
        lists: paths of the lists; empty with splits.
        counts: number of images of each split or list, in order.
        weights: of the splits, or None.

    Raises:
        UserError: if a file or a list is missing, unreadable or wrong; also when an item is read.
    """

    def __init__(self, root, split="train", data_list=None, classes=None, transform=None, seed=0,
                 instances=False, cache=None, jitter=None):
        self.root = root
        self.folders = [Path(folder) for folder in (root if isinstance(root, tuple) else (root,))]
        self.split = split
        self.classes = classes if isinstance(classes, ClassTable) else ClassTable.read(*([classes] * bool(classes)))
        self.transform, self.seed = transform, seed
        self.instances, self.jitter = instances, jitter
        self.cache = DecodedCache(cache) if cache else None
        self.scanned = not data_list
        self.lists = [data_list] if isinstance(data_list, str | Path) else data_list or []
        groups = self._scan_splits() if self.scanned else self._read_lists(self.lists)
        self.counts = [len(pairs) for pairs in groups]
        self.pairs = [pair for pairs in groups for pair in pairs]
        self.names = unique_names(relative_paths([image for image, _ in self.pairs], self.folders[0]))

    def _scan_splits(self):
        """Find the pairs of each split: [[(image, label map)]]."""
        self.lines = self.list_folders = None
        self.splits, self.weights = parse_split(self.split)
        if len(self.folders) == 2:
            return pair_folders(self.root, self.splits)
        check_folder(self.root, "--data-dir ")
        return [_scan(self.folders[0], name) for name in self.splits]

    def _read_lists(self, lists):
        """Read the pairs of each list: [[(image, label map)]]."""
        self.splits, self.weights = (), None
        contents = [read_pairs(self.root, path) for path in lists]
        for _, _, errors in contents:
            if errors:
                raise UserError(errors[0] + f"; {plural(len(errors) - 1, 'more line')} cannot be used"
                                * (len(errors) > 1))
        groups = [pairs for pairs, _, _ in contents]
        # For each pair: "FILE, line N" for messages, and the folder of its list.
        self.lines = [line for _, lines, _ in contents for line in lines]
        self.list_folders = [Path(path).parent for path, pairs in zip(lists, groups, strict=True) for _ in pairs]
        return groups

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        index, entry, focus = (*index, None)[:3] if isinstance(index, tuple) else (index, None, None)
        if entry is None and (self.transform is not None or self.jitter is not None):
            entry = int(torch.randint(1 << 62, ()))
        try:
            return self._item(index, np.random.default_rng((self.seed, entry or 0)), focus)
        except UserError as error:
            raise self._with_line(index, error) from None

    def _item(self, index, rng, focus):
        path, label_path = self.pairs[index]
        image, ids = self._decode(path, read_image), self._decode(label_path, read_ids)
        if image.shape[:2] != ids.shape[:2]:
            raise UserError(size_mismatch(path, image, label_path, ids))
        check_name(label_path, self.classes)
        choose = getattr(self.transform, "choose", None)
        if choose is not None:      # cut the window first, so that only its ids are converted to train ids
            window = choose(ids.shape, rng, focus)
            image, label = window.image(image), self.classes.encode(window.label(ids), label_path)
            label = window.ignore_outside(label, ids.shape, self.transform.ignore_index)
        else:
            label = self.classes.encode(ids, label_path)
            if self.transform is not None:
                image, label = self.transform(image, label, rng)
        item = {"image": as_tensor(image.transpose(2, 0, 1)), "label": as_tensor(label), "name": self.names[index]}
        if self.jitter is not None:
            item["jitter"] = torch.tensor(draw_jitter(self.jitter, rng))
        instances = label_path.with_name(label_path.name.replace("labelIds", "instanceIds"))
        if self.instances and instances != label_path and instances.is_file():
            item |= {"instances": torch.from_numpy(read_ids(instances).astype(np.int32)), "index": index}
        return item

    def _decode(self, path, decode):
        return decode(path) if self.cache is None else self.cache.read(path, decode)

    def _with_line(self, index, error):
        """Return the `UserError` of a sample; with lists, the message starts with list and line of the sample."""
        return error if self.scanned else UserError(f"{self.lines[index]}: {error}")

    def fill_cache(self, workers):
        """Decode all files that are not in the cache yet, and show the progress.

        Args:
            workers: number of processes.

        Raises:
            UserError: before any file is decoded, if the disk does not have enough free space; or if a file cannot be
                read.
        """
        missing, needed = self.cache.missing([file for pair in self.pairs for file in zip(pair, DECODERS, strict=True)])
        if not missing:
            return
        logger.info(f"--cache {self.cache.folder}: {plural(len(missing), 'file')} to decode, {needed / 1e9:.2f} GB")
        check_room(f"--cache {self.cache.folder}", self.cache.folder, needed, "the decoded images")
        missing = {path for path, _ in missing}
        todo = [index for index, pair in enumerate(self.pairs) if not missing.isdisjoint(pair)]
        for _ in progress(do_jobs(self.decode_pair, todo, workers), "decoding", "image"):
            pass

    def decode_pair(self, index):
        """Decode the image and the label map of a sample into the cache, and return the index."""
        for path, decode in zip(self.pairs[index], DECODERS, strict=True):
            try:
                self.cache.read(path, decode)
            except UserError as error:
                raise self._with_line(index, error) from None
        return index

    def train_ids(self, index):
        """Read the label map of a sample as train ids: (H, W) uint8."""
        try:
            return self.classes.encode(self._decode(self.pairs[index][1], read_ids), self.pairs[index][1])
        except UserError as error:
            raise self._with_line(index, error) from None

    def positions(self, index):
        """Draw pixels of each class in a label map by `class_positions`: [(index, class, row, column)]."""
        return [(index, *row) for row in class_positions(self.train_ids(index), (self.seed, index), IGNORE_INDEX)]

    def count_classes(self, index):
        """Count the pixels of each class in a label map: (N,) int64."""
        return np.bincount(self.train_ids(index).ravel(), minlength=256)[:self.classes.num_classes]

    def check_labels(self, count=8):
        """Check `count` label maps, spread evenly over the data set, and the first image, before a long run.

        Warns of label maps that look like train ids.

        Raises:
            UserError: if a label map has values that are not in the class table, or if all pixels of all these label
                maps are ignored.
        """
        self.read_first_image()
        self._check_palettes(count)
        chosen = sorted({len(self) * k // count for k in range(count)})
        labeled = False
        for index in chosen:
            image, path = self.pairs[index]
            try:
                ids = read_ids(path)
                if sentence := unclear_orientation(image, path):
                    warn_once("turned by EXIF", sentence)
                labeled |= bool((self.classes.encode(ids, path) != IGNORE_INDEX).any())
            except UserError as error:
                raise self._with_line(index, error) from None
            if ids.ndim == 2 and self.classes.looks_like_train_ids(ids):
                warnings.warn(f"{path}: its values look like train ids, but are read as ids ({self.classes.source}); "
                              "as ids the map is mostly void", stacklevel=2)
        if not labeled:
            raise UserError(f"{self.pairs[chosen[0]][1]} and {plural(len(chosen) - 1, 'other label map')}: "
                            f"expected pixels of the {plural(self.classes.num_classes, 'class')} of "
                            f"{self.classes.source}, found only ignored ones")

    def _check_palettes(self, count):
        """Compare the palettes of about `count` label maps. Raises `UserError` if their indices cannot be ids."""
        paths = [label for _, label in self.pairs[::max(1, len(self) // count)]]
        contradiction, sentence = compare_palettes((path, read_palette(path)) for path in paths)
        if contradiction:
            raise UserError(sentence)
        if sentence:
            warnings.warn(sentence, stacklevel=3)

    def read_first_image(self):
        """Read the first image, so that warnings about its kind appear once, in this process, not in every worker.

        Raises:
            UserError: if the image cannot be read.
        """
        try:
            read_image(self.pairs[0][0])
        except UserError as error:
            raise self._with_line(0, error) from None

    def fingerprint(self):
        """Return {"count", "sha256"} of the pairs' relative paths, which stay the same if the data move."""
        names = hashlib.sha256()
        for index, pair in enumerate(self.pairs):
            folders = self.folders if self.scanned else [*self.folders, self.list_folders[index]]
            names.update("".join(f"{_relative_to_any(path, folders)}\n" for path in pair)
                         .encode(errors="surrogateescape"))
        return {"count": len(self), "sha256": names.hexdigest()}

    @property
    def source(self):
        """The splits or the file names of the lists, joined by +; "both folders" for two folders without splits."""
        if self.lists:
            return "+".join(Path(path).name for path in self.lists)
        return "both folders" if has_no_split_folders(self.root, self.splits[0]) else self.split

    def describe(self):
        """Describe the data set in one line: numbers of images and classes, and the official number if it differs."""
        text = f"{self.source}: {plural(len(self), 'image')}, {plural(self.classes.num_classes, 'class')}"
        if self.splits and has_no_split_folders(self.root, self.splits[0]):
            text += f" (all images, as there is no folder {self.splits[0]})"
        for name, count in zip(self.splits, self.counts, strict=False):
            official = OFFICIAL_COUNTS.get(name) if len(self.folders) == 1 else None
            if official and count != official:
                text += f" (the official Cityscapes {name} split has {official})"
        return text


def parse_split(text):
    """Parse names and weights of splits: "train:2+train_extra:1" → (["train", "train_extra"], [2.0, 1.0]).

    Without weights, the second value is None. Raises `UserError` for any other text.
    """
    names, weights = [], []
    for part in text.split("+"):
        name, colon, weight = part.partition(":")
        try:
            weights.append(float(weight) if colon else None)
        except ValueError:
            weights.append(-1.0)
        names.append(name)
        if not name or (weights[-1] is not None and not 0 < weights[-1] < float("inf")):
            raise UserError(f"--split {text}: expected names joined by +, such as train+val or train:2+train_extra:1, "
                            f"found {part!r}")
    if None in weights:
        if set(weights) != {None}:
            raise UserError(f"--split {text}: expected a weight for every split or for no split, found weights for "
                            "some splits")
        return names, None
    return names, weights


def check_name(path, classes):
    """Raise `UserError` if a label map is named as one of train ids, but the class table maps other ids."""
    if not classes.is_identity and "labelTrainIds" in Path(path).name:
        raise UserError(f"{path}: expected ids ({classes.source}), found a file of train ids by its name: "
                        "use *_labelIds.png")


def compare_palettes(palettes):
    """Compare the palettes of label maps, whose indices are read as ids.

    Args:
        palettes: (path, {index: color}) of each label map, from `read_palette`.

    Returns:
        Whether a color has two indices, so that indices cannot be ids; and a sentence about that or about an index that
        has two colors, else "".
    """
    indices, colors, sentence = {}, {}, ""
    remedy = "save ids as gray PNG, or red, green and blue with a color for each class in --classes"
    for path, palette in palettes:
        for index, color in palette.items():
            other, first = indices.setdefault(color, (index, path))
            if other != index:
                return True, (f"{path}: expected the palette of {first}, since indices are read as ids, found the "
                              f"color {color} as {index}, which is {other} there; {remedy}")
            other, first = colors.setdefault(index, (color, path))
            if other != color and not sentence:
                sentence = (f"{path}: the index {index} has the color {color}, in {first} {other}; indices are read as "
                            f"ids, whatever their colors; if the colors stand for the classes, {remedy}")
    return False, sentence


def split_files(root, split):
    """Find the files of a Cityscapes split.

    Returns:
        {key: image}, {key: label map}, with "city/stem" as key, and the name of the folder of the label maps.
    """
    truth = "gtCoarse" if split == COARSE else "gtFine"
    images, labels = ({f"{path.parent.name}/{path.name.removesuffix(ending)}": path for path in paths}
                      for paths, ending in ((images_in(root, split), IMAGE_ENDING),
                                            (_visible(root / truth / split, f"*/*_{truth}_labelIds.png"),
                                             f"_{truth}_labelIds.png")))
    return images, labels, truth


def images_in(root, split):
    """Find the images of a Cityscapes split, and report other files beside them."""
    folder = Path(root) / "leftImg8bit" / split
    files = [path for path in _visible(folder, "*") + _visible(folder, "*/*") if not path.is_dir()]
    images = [path for path in files if path.parent != folder and path.name.endswith(IMAGE_ENDING)]
    report_left_out(folder, sorted({*files} - {*images}), f"not <city>/*{IMAGE_ENDING}")
    return images


def _visible(folder, pattern):
    """Find the files that match a pattern, sorted, without hidden ones such as the ._* files of macOS."""
    return [path for path in sorted(folder.glob(pattern))
            if not any(part.startswith(".") for part in path.relative_to(folder).parts)]


def _scan(root, split):
    """Find the pairs of a Cityscapes split: [(image, label map)]. Raises `UserError` if there are none or not all."""
    images, labels, truth = split_files(root, split)
    if not images:
        parent = f"--data-dir {root.parent} names this folder's parent; " * (root.name == "leftImg8bit")
        raise UserError(f"{root / 'leftImg8bit' / split}: expected <city>/*_leftImg8bit.png in it, found none; {parent}"
                        f"{OTHER_LAYOUTS}")
    for key in images:
        if key not in labels:
            raise UserError(f"{root / truth / split / key}_{truth}_labelIds.png: expected the label map of "
                            f"{images[key]}, found no such file")
        refuse_broken_link(images[key])
        refuse_broken_link(labels[key])
    report_left_out(root / truth / split, [path for key, path in labels.items() if key not in images],
                  f"label maps without an image in leftImg8bit/{split}")
    return [(image, labels[key]) for key, image in images.items()]


def read_pairs(root, path):
    """Read a list of pairs.

    Args:
        root: as in `CityscapesDataset`.
        path: of the list.

    Returns:
        pairs [(image, label map)], the line of each pair ["FILE, line N"], and errors: a sentence for each line that
        does not name a pair.

    Raises:
        UserError: if the list or a folder cannot be read.
    """
    if isinstance(root, tuple):
        return pair_listed(root, path)
    check_folder(root, "--data-dir ")
    root, path = Path(root), Path(path)
    pairs, lines, errors, backslashes = [], [], [], False
    for number, text in read_list(path, '"image label"'):
        line = f"{path}, line {number}"
        try:
            pairs.append(_find_pair(text, root, path.parent))
            lines.append(line)
            backslashes |= "\\" in text and not any("\\" in str(file) for file in pairs[-1])
        except UserError as error:
            errors.append(f"{line}: {error}")
    if backslashes:
        warnings.warn(f"{path}: backslashes in its paths are read as slashes", stacklevel=2)
    return pairs, lines, errors


def _find_pair(line, *folders):
    """Find the image and the label map that a line of a list names, in one of the folders. Raises `UserError`."""
    choices = [parts for separator in ("\t", None, ";", ",") if len(parts := line.split(separator)) == 2]
    if not choices:
        raise UserError(f"expected \"image label\" (a tab between names with spaces), found {line!r}")
    error = None
    for parts in choices:
        try:
            return tuple(_find_file(part.strip().strip('"'), *folders) for part in parts)
        except UserError as part_error:
            error = error or part_error
    raise error


def _find_file(name, *folders):
    """Find a file that a list names, in the first folder that contains it. Raises `UserError` if there is none."""
    forms = name, to_nfc(name), to_nfd(name)
    for folder, spelling in itertools.product(folders, dict.fromkeys([*forms, *map(decode_as_path, forms)])):
        if os.path.isfile(folder / spelling):       # false, not an error, for a name too long or a loop of links
            return folder / spelling
    if "\\" in name:        # a list written on Windows
        return _find_file(name.replace("\\", "/"), *folders)
    raise UserError(f"expected the file {folders[0] / name}, found {kind_of(folders[0] / name)}")


def all_label_maps(root, lists):
    """Find the label maps of all lists or, without lists, of all splits of two folders.

    Args:
        root: as in `CityscapesDataset`; two folders if there are no lists.
        lists: paths of lists, or None.

    Returns:
        {split or list: paths of its label maps}, without splits that cannot be read.

    Raises:
        UserError: if a list cannot be read.
    """
    if lists:
        return {str(path): [label for _, label in read_pairs(root, path)[0]] for path in lists}
    label_maps = {}
    for name in [*shared_splits(root), ""]:
        with contextlib.suppress(UserError):        # reported where the split is used
            pairs, _, _ = match_stems([os.path.join(folder, name) for folder in root])
            label_maps[name or "both folders"] = [label for _, label in pairs]
    return label_maps


def _relative_to_any(path, folders):
    """Return a path relative to the first folder that contains it, else the absolute path."""
    path = Path(os.path.abspath(path))
    for folder in map(os.path.abspath, folders):
        if path.is_relative_to(folder):
            return path.relative_to(folder).as_posix()
    return path.as_posix()


def unique_names(paths):
    """Make a unique name without folders for each relative path; no name starts with a dot.

    The name is the file's stem. If several files have the same stem, the folders are added (a_b_stem); if these are
    equal, too, the suffix is added, and finally a number.

    Args:
        paths: relative `Path`s.

    Returns:
        A list of names.
    """
    choices = [[name.lstrip(".") or "image" for name in (path.stem, "_".join(path.with_suffix("").parts),
                                                         "_".join(path.parts))] for path in paths]
    lengths, clashing = [0] * len(paths), True
    while clashing:
        names = [choice[length] for choice, length in zip(choices, lengths, strict=True)]
        count = Counter(names)
        clashing = [i for i, name in enumerate(names) if count[name] > 1 and lengths[i] < 2]
        for i in clashing:
            lengths[i] += 1
    taken, seen = set(names), set()
    for i, name in enumerate(names):
        if name in seen:
            names[i] = next(other for k in itertools.count(2) if (other := f"{name}_{k}") not in taken)
            taken.add(names[i])
        seen.add(name)
    return names


def relative_paths(paths, root):
    """Make paths relative to a folder or, if some are outside it, to the folder that all have in common."""
    paths, root = [os.path.abspath(path) for path in paths], os.path.abspath(root)
    if paths and os.path.commonpath([root, *paths]) != root:
        root = os.path.commonpath(map(os.path.dirname, paths))
    return [Path(os.path.relpath(path, root)) for path in paths]


def as_tensor(array):
    """Convert an array to a tensor; a read-only array, as mapped from the cache, is copied."""
    return torch.from_numpy(np.require(array, requirements="CW"))
