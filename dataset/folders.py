"""Find data sets of two folders: images in one, label maps with the same file stems in the other.

    images/a.jpg  images/b.jpg          or, with splits,    images/train/a.jpg  images/val/b.jpg
    labels/a.png  labels/b.png                              labels/train/a.png  labels/val/b.png

If no stems agree, endings that all files of a folder share are removed from the stems, so that a.jpg and a_mask.png
are a pair. Both may also be in one folder, as Roboflow exports them.

The module also defines the command-line flags that name a data set, and checks of folders and lists.
"""

import contextlib
import itertools
import os
import re
import unicodedata
import warnings
from collections import Counter
from pathlib import Path

from utils.common import flags
from utils.common.errors import UserError, plural
from utils.common.files import kind_of
from utils.common.progress import log_once
from utils.imaging.decode import SUFFIXES

from .labels import TABLE_NAMES, ClassTable
from .text import read_text

FLAGS = ("--images-dir", "--labels-dir")
OTHER_LAYOUTS = ("--images-dir DIR --labels-dir DIR read two folders of files of the same stems, --data-list FILE of "
                 "\"image label\" lines any other layout")
MASK = "_mask"      # ending of label maps in the folder of their images
DEFAULT_TABLE = "for folders and file names of Cityscapes its table, else inferred from the values of the label maps"
VALIDATION = ("val", "valid", "validation")     # names of the folder of the split val
DEFAULT_SPLITS = ("train", "val")       # defaults of --split and --val-split; the user has named any other split


def add_data_flags(parser, classes):
    """Add the flags that name a data set, except --data-dir.

    Args:
        parser: to add the flags to.
        classes: default of --classes, in words, for its help.
    """
    parser.add_argument("--images-dir", type=flags.path, metavar="DIR", help="instead of the data set's folder: a "
                        "folder of images, or of folders train, val, ... of images; --data-list then has one file stem "
                        "per line")
    parser.add_argument("--labels-dir", type=flags.path, metavar="DIR", help="with --images-dir: the folder of the "
                        "label maps, with the same file stems; if their values are 0 and 255, or 0 to N-1 and 255 to "
                        "ignore, --classes may be omitted")
    parser.add_argument("--data-list", type=flags.path, nargs="+", metavar="FILE", help="text files of \"image "
                        "label\" lines, paths relative to the data set's folder or to the list (default: scan the "
                        "folder)")
    parser.add_argument("--classes", type=flags.path, metavar="TABLE", help="class table: a file (CSV: name,id,"
                        "train_id,red,green,blue[,category]) or the name of a data set in dataset/README.md, such as "
                        f"voc or ade20k (default: {classes})")


def read_table(path, images_dir, lists):
    """Read the class table of the command line.

    Args:
        path: --classes, a file or the name of a known data set, or None.
        images_dir: --images-dir, or None.
        lists: --data-list, or None.

    Returns:
        The `ClassTable` of the path; without a path that of Cityscapes or, for two folders or lists, None: it is then
        inferred from the label maps (`dataset.infer`).

    Raises:
        UserError: if the file is not a class table, or has only one class.
    """
    if path is None and (images_dir or lists):
        return None
    classes = ClassTable.read(path) if path else ClassTable.read()
    classes.check_at_least_two()
    return classes


def data_root(data_dir, images_dir, labels_dir):
    """Return the root of a data set from the flags --data-dir, --images-dir and --labels-dir.

    Returns:
        The folder of the data set, or the pair (folder of images, folder of label maps).

    Raises:
        UserError: if the flags name neither, or both.
    """
    if images_dir and labels_dir and not data_dir:
        return images_dir, labels_dir
    if images_dir or labels_dir:
        given = {"--images-dir": images_dir, "--labels-dir": labels_dir, "--data-dir": data_dir}
        raise UserError("--images-dir, --labels-dir: expected both and no --data-dir, found "
                        + " and ".join(f"{flag} {path}" for flag, path in given.items() if path))
    if not data_dir:
        raise UserError("--data-dir: expected the folder of the data set, or --images-dir and --labels-dir, found none")
    return data_dir


def data_flag(args):
    """Return the flag that names the label maps of a data set, with its value, for messages."""
    return f"--labels-dir {args.labels_dir}" if args.labels_dir else f"--data-list {' '.join(args.data_list)}"


def split_folder(root, split):
    """Return the name of the folder of a split in the first of two folders: for val also valid, as tools export it.

    None if there is no such folder.
    """
    names = VALIDATION if split == "val" else (split,)
    return next((name for name in names if os.path.isdir(os.path.join(root[0], name))), None)


def has_no_split_folders(root, split):
    """Whether the root is two folders without a folder for the split, so that all files belong to the split."""
    return isinstance(root, tuple) and split_folder(root, split) is None


def check_validation(root, data_list, val_list, val_split, what="--val-every"):
    """Check that the validation has images of its own.

    Args:
        root: from `data_root`.
        data_list, val_list: --data-list and --val-list, or None.
        val_split: --val-split.
        what: the flag that requests the validation, for error messages.

    Raises:
        UserError: if there is no list or split folder of validation images.
    """
    undivided = not data_list and any(has_no_split_folders(root, part.partition(":")[0])
                                      for part in val_split.split("+"))
    if undivided and (splits := shared_splits(root)):
        raise UserError(f"--val-split {val_split}: expected names of folders in {root[0]} and {root[1]}, found "
                        f"{', '.join(splits)}")
    if not val_list and (data_list or undivided):
        raise UserError(f"{what}: expected --val-list with {'--data-list' if data_list else '--images-dir'}, found "
                        "none")
    if undivided:
        raise UserError("--val-list: expected --data-list with it, found none; without it, the validation images are "
                        "also used for training")


def check_folder(path, flag=""):
    """Raise `UserError`, which starts with the flag, if a path is not a folder."""
    if not os.path.isdir(path):
        kind = kind_of(path)
        raise UserError(f"{flag}{path}: expected a folder, found "
                        f"{'nothing there' if kind == 'no such file' else kind}")


def read_list(path, what):
    """Read the lines of a list, without empty lines and comments.

    Args:
        path: of the text file.
        what: description of the expected lines, for error messages.

    Returns:
        [(line number, text)].

    Raises:
        UserError: if the file cannot be read or has no such lines.
    """
    lines = [(number, line.strip()) for number, line in enumerate(read_text(path, "a text file").splitlines(), 1)]
    lines = [(number, line) for number, line in lines if line and not line.startswith("#")]
    if not lines:
        raise UserError(f"{path}: expected lines {what}, found an empty list")
    return lines


def shared_splits(folders):
    """List the names of the subfolders that both folders have. Raises `UserError` if a folder cannot be read."""
    images, labels = ({path.name for path in _list_folder(folder, flag) if path.is_dir()}
                      for folder, flag in zip(folders, FLAGS, strict=True))
    return sorted(images & labels)


def pair_folders(folders, splits):
    """Pair the images and label maps of splits in two folders.

    Args:
        folders: (folder of images, folder of label maps).
        splits: names of the splits. If the folders have no folders of these names, all their files are one split.

    Returns:
        [[(image, label map)]], one list per split.

    Raises:
        UserError: if split folders are missing, or a file has no partner.
    """
    if not all(has_no_split_folders(folders, name) for name in splits):
        report_loose_files(folders, splits)
        return [_pair_all(tuple(Path(folder, split_folder(folders, name) or name) for folder in folders))
                for name in splits]
    if len(splits) > 1 or splits[0] not in DEFAULT_SPLITS:
        raise UserError(f"--split {'+'.join(splits)}: expected folders of these names in {folders[0]}, found none")
    others = shared_splits(folders)
    if others and not any(map(is_image, _list_folder(folders[0], FLAGS[0]))):
        remedy = list_remedy(folders, *(Path(folder, others[0], "NAME.png") for folder in folders))
        raise UserError(f"--images-dir {folders[0]}: expected images in it, or a folder {splits[0]} there and in "
                        f"--labels-dir, found folders: {', '.join(others)[:200]}; --split {others[0]} takes one of "
                        f"them, several are joined by +; {remedy}")
    return [_pair_all(folders)]


def match_stems(folders):
    """Match the images and label maps of two folders by their stems.

    Args:
        folders: (folder of images, folder of label maps).

    Returns:
        [(image, label map)], [image without a label map], [label map without an image].

    Raises:
        UserError: if a folder cannot be read or has no images, or a stem occurs twice in it.
    """
    images, labels = _files_by_stem(folders)
    return ([(image, labels[stem]) for stem, image in images.items() if stem in labels],
            [image for stem, image in images.items() if stem not in labels],
            [label for stem, label in labels.items() if stem not in images])


def _pair_all(folders):
    """Match the files of two folders; raise `UserError` if a file has no partner."""
    pairs, *unmatched = match_stems(folders)
    for files, folder, flag, other_folder in zip(unmatched, folders, reversed(FLAGS), reversed(folders), strict=True):
        if files:
            names = ", ".join(path.name for path in files[:3])
            remedy = "use --data-list to select a part of the files" if pairs else list_remedy(folders, *(
                paths[0] for paths in unmatched))
            raise UserError(f"{flag} {other_folder}: expected a partner of each of the {len(pairs) + len(files)} files "
                            f"in {folder}, found none with the stem of {names}"
                            f"{f' and {len(files) - 3} more' * (len(files) > 3)}; {remedy}")
    return pairs


def list_remedy(folders, image, label):
    """Return the remedy if images and label maps of two folders do not match by stem: a list, with an example line.

    Args:
        folders: (folder of images, folder of label maps).
        image, label: paths of a file in each folder.
    """
    root = os.path.commonpath([os.path.abspath(folder) for folder in folders])
    line = "\t".join(os.path.relpath(path, root) for path in (image, label))
    line = line if " " in line else line.replace("\t", " ")
    return (f"--data-dir {root} --data-list FILE takes lines of \"image label\", paths below that folder, such as "
            f"\"{line}\", in place of --images-dir and --labels-dir")


def pair_listed(folders, path):
    """Pair the files of two folders that a list of stems names.

    Args:
        folders: (folder of images, folder of label maps).
        path: of the list.

    Returns and raises as `dataset.cityscapes.read_pairs`.
    """
    files_by_stem, lines, errors = _files_by_stem(folders), {}, []
    for number, text in read_list(path, "of one stem"):
        stem = to_nfc(text)
        line = f"{path}, line {number}"
        lacking = [(folder, files) for folder, files in zip(folders, files_by_stem, strict=True) if stem not in files]
        for folder, files in lacking[:1]:
            errors.append(f"{line}: expected the stem of a file in {folder}, such as {next(iter(files))}, found "
                          f"{stem!r}")
        if stem in lines:
            errors.append(f"{line}: expected every stem once, found {stem!r} again")
        elif not lacking:
            lines[stem] = line
    return [tuple(files[stem] for files in files_by_stem) for stem in lines], list(lines.values()), errors


def _files_by_stem(folders):
    """List the images and label maps of two folders by stem, sorted.

    If no stems agree, endings that all files of a folder share are removed from the stems, with a warning, provided
    that some stems then agree.

    Returns:
        [{stem: path} of the images, {stem: path} of the label maps].

    Raises:
        UserError: if a folder cannot be read or has no images, or a stem occurs twice in it.
    """
    if os.path.realpath(folders[0]) == os.path.realpath(folders[1]):
        return _masks_beside_images(folders)
    files = [_folder_by_stem(folder, flag, folders) for folder, flag in zip(folders, FLAGS, strict=True)]
    if not files[0].keys().isdisjoint(files[1]):
        return files
    choices = itertools.product(*map(_shared_endings, files))
    best, endings, most = files, None, 0
    for ending in sorted(choices, key=lambda pair: sum(map(len, pair))):
        shorter = [{stem.removesuffix(end): path for stem, path in paths.items()}
                   for paths, end in zip(files, ending, strict=True)]
        if (count := len(shorter[0].keys() & shorter[1].keys())) > most:
            best, endings, most = shorter, ending, count
    if endings:
        removed = " and ".join(f"{end} in {flag} {folder}" for end, flag, folder in zip(
            endings, FLAGS, folders, strict=True) if end)
        warnings.warn(f"images and label maps are matched by their stems without {removed}; for other pairs, use "
                      "--data-dir and --data-list with lines of \"image label\"", stacklevel=2)
    return best


def _masks_beside_images(folders):
    """Divide the files of one folder into images a.jpg and label maps a_mask.png; returns the same as `_files_by_stem`.
    """
    files = _folder_by_stem(folders[0], FLAGS[0], folders)
    masks = {stem for stem in files if stem.endswith(MASK) and (
        stem.removesuffix(MASK) in files or stem + MASK not in files)}
    if not masks:
        raise UserError(f"{FLAGS[1]} {folders[1]}: expected another folder than --images-dir, or label maps "
                        f"a{MASK}.png beside the images a.jpg, found neither; --data-dir {folders[1]} --data-list FILE "
                        "takes lines of \"image label\", such as \"a.jpg a_seg.png\"")
    return [{stem: path for stem, path in files.items() if stem not in masks},
            {stem.removesuffix(MASK): path for stem, path in files.items() if stem in masks}]


def _shared_endings(files):
    """List the endings that all stems of {stem: path} share, such as _mask but not numbers; "" is the first."""
    shared = os.path.commonprefix([stem[::-1] for stem in files])[::-1]
    shortest = min(map(len, files))
    endings = [shared[match.start():] for match in re.finditer(r"[-_. ](?=[^\W\d_])", shared)]
    return ["", *(ending for ending in endings if len(ending) < shortest)]


def is_image(path):
    """Whether a path is a file with the suffix of an image. Raises `UserError` if it is a broken link with it."""
    if path.suffix.lower() not in SUFFIXES:
        return False
    refuse_broken_link(path)
    return path.is_file()


def _folder_by_stem(folder, flag, folders):
    """List the images of one of two folders: {stem: path}."""
    images, paths, left_out = {}, _list_folder(folder, flag), []
    for path in paths:
        if not is_image(path):
            left_out += [path] * (path.name not in TABLE_NAMES)
            continue
        stem = to_nfc(path.stem)
        if stem in images:
            raise UserError(f"{flag} {folder}: expected every stem once, found {images[stem].name} and {path.name}")
        images[stem] = path
    if not images:
        subfolders = [path.name for path in paths if path.is_dir()]
        raise UserError(f"{flag} {folder}: expected images ({', '.join(sorted(SUFFIXES))}) in it, found none"
                        + (f", but folders: {', '.join(subfolders)[:200]}; " + list_remedy(
                            folders, *(Path(root, "...", "NAME.png") for root in folders))) * bool(subfolders))
    report_left_out(f"{flag} {folder}", left_out)
    return images


def to_nfc(name):
    """Normalize a file name to Unicode NFC, since macOS stores names in NFD.

    A name whose UTF-8 bytes the encoding of the locale (such as C) cannot represent is decoded as UTF-8 first.
    """
    with contextlib.suppress(UnicodeError):
        name = os.fsencode(name).decode("utf-8")
    return unicodedata.normalize("NFC", name)


def to_nfd(name):
    """Normalize a file name to Unicode NFD."""
    return unicodedata.normalize("NFD", name)


def decode_as_path(name):
    """Return the string by which Python names a file whose name is stored as UTF-8; unchanged in most locales."""
    with contextlib.suppress(UnicodeError):
        return os.fsdecode(name.encode("utf-8"))
    return name


def refuse_broken_link(path):
    """Raise `UserError` if a path is a link to a missing file. A loop of links is accepted here: it is not a file."""
    if _is_broken_link(path):
        path = Path(path)
        broken = sum(map(_is_broken_link, (other for other in path.parent.iterdir() if other.suffix == path.suffix)))
        raise UserError(f"{path}: expected a file, found a link to {os.readlink(path)}, which does not exist"
                        + f", one of {broken} such links in {path.parent}" * (broken > 1))


def _is_broken_link(path):
    try:
        os.stat(path)
    except FileNotFoundError:
        return os.path.islink(path)
    except OSError:
        pass
    return False


def report_left_out(place, paths, reason="not readable as images"):
    """Log one line about files and folders that are not used, if there are any: how many of each suffix.

    Args:
        place: where they are, for the message.
        paths: of the files and folders.
        reason: why they are not used, for the message.
    """
    kinds = Counter("folder" if path.is_dir() else path.suffix.lower() for path in paths)
    folders = kinds.pop("folder", 0)
    parts = [f"{count} of {suffix}" if suffix else plural(count, "file") + " without a suffix"
             for suffix, count in sorted(kinds.items())] + [plural(folders, "folder")] * bool(folders)
    if parts:
        log_once(f"{place}: left out ({reason}): {', '.join(parts)}, such as {min(paths, key=str).name}")


def report_loose_files(folders, splits):
    """Log a line about images and label maps beside the split folders, if there are any."""
    for folder, flag in zip(folders, FLAGS, strict=True):
        loose = list(filter(is_image, _list_folder(folder, flag)))
        report_left_out(f"{flag} {folder}", loose, f"not in a split folder: {', '.join(splits)}")


def _list_folder(folder, flag):
    """List the paths in a folder, sorted, without hidden ones. Raises `UserError` if the folder cannot be read."""
    check_folder(folder, f"{flag} ")
    try:
        return [Path(folder, name) for name in sorted(os.listdir(folder)) if not name.startswith(".")]
    except OSError as error:
        raise UserError(f"{flag} {folder}: expected a folder that can be read, found: {error}") from None
