"""Images with label maps: Cityscapes, and any data set that a list of files and a class table describe."""

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
    as_stored,
    check_folder,
    composed,
    decomposed,
    has_no_split_folders,
    match,
    name_left_out,
    pair_folders,
    pair_listed,
    read_list,
    refuse_dead_link,
    splits_of,
)
from .labels import ClassTable
from .reading import DecodedCache
from .sampling import class_positions

OFFICIAL_COUNTS = {"train": 2975, "val": 500, "test": 1525, "train_extra": 19998}
IMAGE_ENDING = "_leftImg8bit.png"
COARSE = "train_extra"      # the split whose truth is in gtCoarse
DECODERS = (read_image, read_ids)       # of an image and of its label map


class CityscapesDataset(Dataset):
    """Images with label maps.

    Of one folder without a list, `root/leftImg8bit/<split>/<city>/*_leftImg8bit.png` and
    `root/gtFine/<split>/<city>/*_gtFine_labelIds.png` are scanned (gtCoarse for `train_extra`).

    Args:
        root: folder of the data set; or two, (of images, of label maps of the same stems): see `dataset.folders`.
        split: `train`, `val`, `test` or `train_extra`; several joined by +, with weights if wanted:
            `train:2+train_extra:1`.
        data_list: text file of "image label" lines, paths relative to root or to the list, or, of two folders, of one
            stem a line; or several of them.
        classes: `ClassTable`, or the CSV file of one; None for Cityscapes.
        transform: (image (H, W, 3) uint8, label (H, W), NumPy Generator) → image, label; such as
            `dataset.transforms.train_transform`.
        seed: of what `transform` and `jitter` draw at random.
        instances: whether to read *_instanceIds.png beside *_labelIds.png too, where there is one.
        cache: folder for decoded arrays (`dataset.reading.DecodedCache`), or None.
        jitter: largest change of brightness, contrast, saturation (factors 1 ± that) and hue (turns), or None; as in
            `utils.jitter`.

    An item is {"image": uint8 (3, H, W) RGB, "label": uint8 (H, W) train ids, "name": str}, with instances also
    {"instances": int32 (H, W), "index": int}, with jitter also {"jitter": (4,) float32}: factors for
    `utils.jitter.apply_jitter`. Image and label map are upright by their EXIF orientation. Raises `UserError` where a
    file or the list is at fault.

    What is asked for is one of
        index: the random draws are new every time, from PyTorch's generator, which a DataLoader seeds in each worker
            and epoch;
        (index, entry): they are a function of (seed, entry) alone, so it does not matter which worker makes the
            sample (`dataset.sampling`);
        (index, entry, (row, column)): the same, and the transform's window holds this pixel.

    Attributes:
        pairs: [(path of the image, path of its label map)].
        names: of the images, each another: `unique_names`.
        splits, lists: names of the scanned splits, none with lists; and the lists.
        counts: number of images of each split or list, in order.
        weights: of the splits, or None.
    """

    def __init__(self, root, split="train", data_list=None, classes=None, transform=None, seed=0,
                 instances=False, cache=None, jitter=None):
        self.root = root
        self.folders = [Path(one) for one in (root if isinstance(root, tuple) else (root,))]
        self.split = split
        self.classes = classes if isinstance(classes, ClassTable) else ClassTable.read(*([classes] * bool(classes)))
        self.transform, self.seed = transform, seed
        self.instances, self.jitter = instances, jitter
        self.cache = DecodedCache(cache) if cache else None
        self.scanned = not data_list
        self.lists = [data_list] if isinstance(data_list, str | Path) else data_list or []
        found = self._scan_splits() if self.scanned else self._read_lists(self.lists)
        self.counts = [len(pairs) for pairs in found]
        self.pairs = [pair for pairs in found for pair in pairs]
        self.names = unique_names(relative_paths([image for image, _ in self.pairs], self.folders[0]))

    def _scan_splits(self):
        """[[(image, label map)]] of each split."""
        self.lines = self.list_folders = None
        self.splits, self.weights = parse_split(self.split)
        if len(self.folders) == 2:
            return pair_folders(self.root, self.splits)
        check_folder(self.root, "--data-dir ")
        return [_scan(self.folders[0], name) for name in self.splits]

    def _read_lists(self, lists):
        """[[(image, label map)]] of each list."""
        self.splits, self.weights = (), None
        read = [read_pairs(self.root, one) for one in lists]
        for _, _, wrong in read:
            if wrong:
                raise UserError(wrong[0] + f"; {plural(len(wrong) - 1, 'more line')} cannot be used" * (len(wrong) > 1))
        found = [pairs for pairs, _, _ in read]
        # Of each pair: "FILE, line N", which messages name, and the folder of its list.
        self.lines = [line for _, lines, _ in read for line in lines]
        self.list_folders = [Path(one).parent for one, pairs in zip(lists, found, strict=True) for _ in pairs]
        return found

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
        if choose is not None:      # a transform that cuts a window first: only its ids need to become train ids
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
        """The `UserError` of a sample; with lists, it begins with the list and line that name the sample."""
        return error if self.scanned else UserError(f"{self.lines[index]}: {error}")

    def fill_cache(self, workers):
        """Decode the files that are not in the cache yet, in `workers` processes, and show how far it is.

        Raises `UserError` before it begins if the disk has too little room.
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
        """Decode image and label map of an index into the cache. Returns the index."""
        for path, decode in zip(self.pairs[index], DECODERS, strict=True):
            try:
                self.cache.read(path, decode)
            except UserError as error:
                raise self._with_line(index, error) from None
        return index

    def train_ids(self, index):
        """A label map: (H, W) uint8 train ids."""
        try:
            return self.classes.encode(self._decode(self.pairs[index][1], read_ids), self.pairs[index][1])
        except UserError as error:
            raise self._with_line(index, error) from None

    def positions(self, index):
        """[(index, class, row, column)] of some pixels of each class in a label map, drawn by `class_positions`."""
        return [(index, *row) for row in class_positions(self.train_ids(index), (self.seed, index), IGNORE_INDEX)]

    def count_classes(self, index):
        """Pixels of each class in a label map: (N,) int64."""
        return np.bincount(self.train_ids(index).ravel(), minlength=256)[:self.classes.num_classes]

    def check_labels(self, count=8):
        """Read `count` label maps, spread evenly over the data set, and the first image, before a long run begins.

        Raises `UserError` where one holds values that the class table does not know, or where every pixel of all of
        them is ignored. Warns of maps that look like train ids.
        """
        self.look_at_first()
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
        """Compare the palettes of so many label maps. Raises `UserError` where their indices cannot be ids."""
        paths = [label for _, label in self.pairs[::max(1, len(self) // count)]]
        contradiction, sentence = compare_palettes((path, read_palette(path)) for path in paths)
        if contradiction:
            raise UserError(sentence)
        if sentence:
            warnings.warn(sentence, stacklevel=3)

    def look_at_first(self):
        """Read the first image in this process, so that what its kind calls for is said here, and not by every process
        that reads images. Raises `UserError`."""
        try:
            read_image(self.pairs[0][0])
        except UserError as error:
            raise self._with_line(0, error) from None

    def fingerprint(self):
        """{"count", "sha256"} of the pairs' names in their order; it stays when the data and its lists are moved."""
        names = hashlib.sha256()
        for index, pair in enumerate(self.pairs):
            folders = self.folders if self.scanned else [*self.folders, self.list_folders[index]]
            names.update("".join(f"{_below(path, folders)}\n" for path in pair).encode(errors="surrogateescape"))
        return {"count": len(self), "sha256": names.hexdigest()}

    @property
    def source(self):
        """What names these images, in words: splits or lists; two folders without splits have no other name."""
        if self.lists:
            return "+".join(Path(one).name for one in self.lists)
        return "both folders" if has_no_split_folders(self.root, self.splits[0]) else self.split

    def describe(self):
        """One line: how many images and classes, and whether the official split has another number of images."""
        text = f"{self.source}: {plural(len(self), 'image')}, {plural(self.classes.num_classes, 'class')}"
        for name, found in zip(self.splits, self.counts, strict=False):
            official = OFFICIAL_COUNTS.get(name) if len(self.folders) == 1 else None
            if official and found != official:
                text += f" (the official Cityscapes {name} split has {official})"
        return text


def parse_split(text):
    """"train:2+train_extra:1" → (["train", "train_extra"], [2.0, 1.0]); without weights ([...], None)."""
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
            raise UserError(f"--split {text}: expected a weight for every split or for none, found some")
        return names, None
    return names, weights


def check_name(path, classes):
    """Raise `UserError` where a file's name says that it holds train ids, and the table wants ids."""
    if not classes.is_identity and "labelTrainIds" in Path(path).name:
        raise UserError(f"{path}: expected ids ({classes.source}), found a file of train ids by its name: "
                        "use *_labelIds.png")


def compare_palettes(palettes):
    """Whether label maps with palettes give one color two indices, so that indices cannot be ids; and a sentence where
    they do, or where they at least give one index two colors.

    palettes: (path, {index: color}) of label maps, as `read_palette` finds them.
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
                            f"ids, whatever their colors; if the colors are what counts, {remedy}")
    return False, sentence


def split_files(root, split):
    """Files of a split by city and stem: {key: image}, {key: label map}, and the folder of the latter."""
    truth = "gtCoarse" if split == COARSE else "gtFine"
    images, labels = ({f"{path.parent.name}/{path.name.removesuffix(ending)}": path for path in paths}
                      for paths, ending in ((images_in(root, split), IMAGE_ENDING),
                                            (_visible(root / truth / split, f"*/*_{truth}_labelIds.png"),
                                             f"_{truth}_labelIds.png")))
    return images, labels, truth


def images_in(root, split):
    """The images of a split in the folders of Cityscapes; a line says what else lies there."""
    folder = Path(root) / "leftImg8bit" / split
    files = [path for path in _visible(folder, "*") + _visible(folder, "*/*") if not path.is_dir()]
    images = [path for path in files if path.parent != folder and path.name.endswith(IMAGE_ENDING)]
    name_left_out(folder, sorted({*files} - {*images}), f"not <city>/*{IMAGE_ENDING}")
    return images


def _visible(folder, pattern):
    """Files of a pattern, sorted, without what is hidden, such as the ._* that macOS writes."""
    return [path for path in sorted(folder.glob(pattern))
            if not any(part.startswith(".") for part in path.relative_to(folder).parts)]


def _scan(root, split):
    """[(image, label map)] of a split in the folders of Cityscapes. Raises `UserError`."""
    images, labels, truth = split_files(root, split)
    if not images:
        parent = f"--data-dir {root.parent} names this folder's parent; " * (root.name == "leftImg8bit")
        raise UserError(f"{root / 'leftImg8bit' / split}: expected <city>/*_leftImg8bit.png in it, found none; {parent}"
                        f"{OTHER_LAYOUTS}")
    for key in images:
        if key not in labels:
            raise UserError(f"{root / truth / split / key}_{truth}_labelIds.png: expected the label map of "
                            f"{images[key]}, found no such file")
        refuse_dead_link(images[key]), refuse_dead_link(labels[key])
    name_left_out(root / truth / split, [path for key, path in labels.items() if key not in images],
                  f"label maps without an image in leftImg8bit/{split}")
    return [(image, labels[key]) for key, image in images.items()]


def read_pairs(root, path):
    """[(image, label map)] of a list; ["FILE, line N"], where each stands; and a sentence for each line that names
    none. root: as in `CityscapesDataset`. Raises `UserError`."""
    if isinstance(root, tuple):
        return pair_listed(root, path)
    check_folder(root, "--data-dir ")
    root, path = Path(root), Path(path)
    pairs, lines, wrong, backslashes = [], [], [], False
    for number, line in read_list(path, '"image label"'):
        where = f"{path}, line {number}"
        try:
            pairs.append(_find_pair(line, root, path.parent))
            lines.append(where)
            backslashes |= "\\" in line and not any("\\" in str(one) for one in pairs[-1])
        except UserError as error:
            wrong.append(f"{where}: {error}")
    if backslashes:
        warnings.warn(f"{path}: backslashes in its paths are read as slashes", stacklevel=2)
    return pairs, lines, wrong


def _find_pair(line, *folders):
    """The paths of image and label map that a line of a list names. Raises `UserError`."""
    choices = [parts for separator in ("\t", None, ";", ",") if len(parts := line.split(separator)) == 2]
    if not choices:
        raise UserError(f"expected \"image label\" (a tab between names with spaces), found {line!r}")
    error = None
    for parts in choices:
        try:
            return tuple(_find(part.strip().strip('"'), *folders) for part in parts)
        except UserError as one:
            error = error or one
    raise error


def _find(name, *folders):
    """The path of a file that a list names, in the first of these folders that has it. Raises `UserError`."""
    forms = name, composed(name), decomposed(name)
    for folder, spelling in itertools.product(folders, dict.fromkeys([*forms, *map(as_stored, forms)])):
        if os.path.isfile(folder / spelling):       # false, not an error, for a name too long or a loop of links
            return folder / spelling
    if "\\" in name:        # a list of Windows
        return _find(name.replace("\\", "/"), *folders)
    raise UserError(f"expected the file {folders[0] / name}, found {kind_of(folders[0] / name)}")


def all_label_maps(root, lists):
    """{split or list: paths of its label maps} of the lists or, without any, of every split that two folders have; of
    splits that cannot be read, none. Raises `UserError` for a list that cannot be read."""
    if lists:
        return {str(one): [label for _, label in read_pairs(root, one)[0]] for one in lists}
    found = {}
    for name in [*splits_of(root), ""]:
        with contextlib.suppress(UserError):        # said where the split is used
            found[name or "both folders"] = [label for _, label in match([os.path.join(one, name) for one in root])[0]]
    return found


def _below(path, folders):
    """A path relative to the first of these folders that holds it; its absolute path where none does."""
    path = Path(os.path.abspath(path))
    for folder in map(os.path.abspath, folders):
        if path.is_relative_to(folder):
            return path.relative_to(folder).as_posix()
    return path.as_posix()


def unique_names(paths):
    """A name without folders for each relative path, never the same twice and never beginning with a dot.

    The file's stem; where several have the same, with the folders before it (a_b_stem); where these are the same too,
    with the suffix; and where even these are, numbered.
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
    """Paths relative to a folder; where some of them lie outside it, relative to the folder common to all."""
    paths, root = [os.path.abspath(path) for path in paths], os.path.abspath(root)
    if paths and os.path.commonpath([root, *paths]) != root:
        root = os.path.commonpath(map(os.path.dirname, paths))
    return [Path(os.path.relpath(path, root)) for path in paths]


def as_tensor(array):
    """An array as a tensor; one that is mapped from the cache, and so read-only, is copied."""
    return torch.from_numpy(np.require(array, requirements="CW"))
