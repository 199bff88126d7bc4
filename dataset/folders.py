"""Data sets of two folders: images in one, label maps of the same stems in the other.

    images/a.jpg  images/b.jpg          or, with splits,    images/train/a.jpg  images/val/b.jpg
    labels/a.png  labels/b.png                              labels/train/a.png  labels/val/b.png

Where nobody says what the values of the label maps mean, and there is but one thing they can mean, that is assumed.
"""

import os
from pathlib import Path

import numpy as np

from utils import checkpoint, cli
from utils.cli import UserError
from utils.decoding import SUFFIXES, kind_of, read_file, read_ids
from utils.logger import progress
from utils.workers import do_jobs

from .labels import COLUMNS, IGNORE_INDEX, UNKNOWN, ClassTable

FLAGS = ("--images-dir", "--labels-dir")
ASSUMED = "the assumed class table"
DEFAULT_SPLITS = ("train", "val")       # of the command lines; others were asked for


def add_data_flags(parser, classes):
    """The flags that name a data set, but for its one folder. classes: what --classes is where it is left out."""
    parser.add_argument("--images-dir", type=cli.path, metavar="DIR", help="instead of a data set's folder: one of "
                        "images, or of folders train, val, ... of images; --data-list then holds one stem a line")
    parser.add_argument("--labels-dir", type=cli.path, metavar="DIR", help="with it: their label maps, of the same "
                        "stems; where the values are 0 and 255, or 0 to N-1 and 255 to ignore, --classes may be left "
                        "out")
    parser.add_argument("--data-list", type=cli.path, nargs="+", metavar="FILE", help="files of \"image label\" lines, "
                        "paths relative to the data set's folder or to the list; without it the folder is scanned")
    parser.add_argument("--classes", type=cli.path, metavar="FILE", help="class table (CSV: name,id,train_id,red,green,"
                        f"blue[,category]); default: {classes}")


def read_table(path, images_dir):
    """The `ClassTable` of a file, or else of Cityscapes; None where a folder of images leaves it to the label maps."""
    if path is None and images_dir:
        return None
    return ClassTable.read(path) if path else ClassTable.read()


def data_root(data_dir, images_dir, labels_dir):
    """Where the data are: the folder of a data set or, of two folders, (of images, of label maps). Raises `UserError`
    where the flags name neither, or both."""
    if images_dir and labels_dir and not data_dir:
        if os.path.realpath(images_dir) == os.path.realpath(labels_dir):
            raise UserError(f"--labels-dir {labels_dir}: expected another folder than --images-dir, found the same")
        return images_dir, labels_dir
    if images_dir or labels_dir:
        raise UserError("--images-dir, --labels-dir: expected both and no other folder of data, found "
                        + " and ".join(filter(None, (images_dir, labels_dir, data_dir))))
    if not data_dir:
        raise UserError("--data-dir: expected the folder of the data set, or --images-dir and --labels-dir, found none")
    return data_dir


def undivided(root, split):
    """Whether two folders have no folders of a split's name in them, so that all files belong to it."""
    return isinstance(root, tuple) and not os.path.isdir(os.path.join(root[0], split))


def check_validation(root, data_list, val_list, val_split, what="--val-every"):
    """Refuse a validation that has no images of its own. root: of `data_root`; what: asks for it, in the message."""
    without = not data_list and any(undivided(root, part.partition(":")[0]) for part in val_split.split("+"))
    if without and (splits := splits_of(root)):
        raise UserError(f"--val-split {val_split}: expected names of folders in {root[0]} and {root[1]}, found "
                        f"{', '.join(splits)}")
    if not val_list and (data_list or without):
        raise UserError(f"{what}: expected --val-list with {'--data-list' if data_list else '--images-dir'}, found "
                        "none")
    if without:
        raise UserError("--val-list: expected --data-list with it, found none, so that its images would be learnt too")


def check_folder(path, flag=""):
    """Raise `UserError` where a path is no folder."""
    if not os.path.isdir(path):
        found = kind_of(path)
        raise UserError(f"{flag}{path}: expected a folder, found "
                        f"{'nothing there' if found == 'no such file' else found}")


def read_list(path, what):
    """[(number, line)] of a text file of such lines, but for empty ones and comments. Raises `UserError`."""
    try:
        lines = read_file(path, "a text file").decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: expected a text file, found: {error}") from None
    found = [(number, line.strip()) for number, line in enumerate(lines, 1)]
    found = [(number, line) for number, line in found if line and not line.startswith("#")]
    if not found:
        raise UserError(f"{path}: expected lines {what}, found an empty list")
    return found


def splits_of(folders):
    """Names of the folders that two folders both have. Raises `UserError`."""
    images, labels = ({path.name for path in _inside(folder, flag) if path.is_dir()}
                      for folder, flag in zip(folders, FLAGS, strict=True))
    return sorted(images & labels)


def pair_folders(folders, splits):
    """[[(image, label map)]] of splits; of all files where the folders are undivided. Raises `UserError`."""
    if not all(undivided(folders, name) for name in splits):
        return [_pair(tuple(Path(folder, name) for folder in folders)) for name in splits]
    if len(splits) > 1 or splits[0] not in DEFAULT_SPLITS:
        raise UserError(f"--split {'+'.join(splits)}: expected folders of these names in {folders[0]}, found none")
    return [_pair(folders)]


def match(folders):
    """[(image, label map)] of two folders; images that have no label map; and label maps that have no image. Raises
    `UserError`."""
    images, labels = _files(folders)
    return ([(image, labels[stem]) for stem, image in images.items() if stem in labels],
            [image for stem, image in images.items() if stem not in labels],
            [label for stem, label in labels.items() if stem not in images])


def _pair(folders):
    pairs, *alone = match(folders)
    for files, folder, flag, place in zip(alone, folders, reversed(FLAGS), reversed(folders), strict=True):
        if files:
            names = ", ".join(path.name for path in files[:3])
            raise UserError(f"{flag} {place}: expected a partner of each of the {len(pairs) + len(files)} files in "
                            f"{folder}, found none of the stem of {names}"
                            f"{f' and {len(files) - 3} more' * (len(files) > 3)}"
                            "; --data-list takes only those that it names")
    return pairs


def pair_listed(folders, path):
    """[(image, label map)] of a list of stems; ["FILE, line N"], where each stands; and a sentence for each line that
    names none. Raises `UserError`."""
    found, lines, wrong = _files(folders), {}, []
    for number, stem in read_list(path, "of one stem"):
        where = f"{path}, line {number}"
        lacking = [(folder, files) for folder, files in zip(folders, found, strict=True) if stem not in files]
        for folder, files in lacking[:1]:
            wrong.append(f"{where}: expected the stem of a file in {folder}, such as {next(iter(files))}, found "
                         f"{stem!r}")
        if stem in lines:
            wrong.append(f"{where}: expected every stem once, found {stem!r} again")
        elif not lacking:
            lines[stem] = where
    return [tuple(files[stem] for files in found) for stem in lines], list(lines.values()), wrong


def _files(folders):
    """[{stem: path}] of the images and of the label maps, sorted. Raises `UserError`."""
    return [_by_stem(folder, flag) for folder, flag in zip(folders, FLAGS, strict=True)]


def _by_stem(folder, flag):
    found, paths = {}, _inside(folder, flag)
    for path in paths:
        if path.suffix.lower() in SUFFIXES and path.is_file():
            if path.stem in found:
                raise UserError(f"{flag} {folder}: expected every stem once, found {found[path.stem].name} and "
                                f"{path.name}")
            found[path.stem] = path
    if not found:
        folders = ", ".join(path.name for path in paths if path.is_dir())
        raise UserError(f"{flag} {folder}: expected images ({', '.join(sorted(SUFFIXES))}) in it, found none"
                        + f", but folders: {folders[:200]}" * bool(folders))
    return found


def _inside(folder, flag):
    """What lies in a folder, sorted, but for what is hidden."""
    check_folder(folder, f"{flag} ")
    try:
        return [Path(folder, name) for name in sorted(os.listdir(folder)) if not name.startswith(".")]
    except OSError as error:
        raise UserError(f"{flag} {folder}: expected a folder that can be read, found: {error}") from None


def assume_classes(folder, paths, workers):
    """The `ClassTable` that goes without saying, by the values of label maps: 0 and 255 are background and foreground;
    0 to N-1 are the classes, and 255 is ignored. It is printed.

    Args:
        folder: where the label maps are, for messages.
        paths: of the label maps; `workers` processes read all of them.

    Raises `UserError` for other values.
    """
    first = {}      # {id: a label map that holds it}
    for path, ids in zip(paths, progress(do_jobs(ids_of, paths, workers), "reading ids", "label map"), strict=True):
        for one in ids:
            first.setdefault(one, path)
    ids = sorted(first)
    classes = [one for one in ids if one != IGNORE_INDEX]
    if ids == [0, 255]:
        rows = [_row("background", 0, 0, (0, 0, 0)), _row("foreground", 255, 1, (255, 255, 255))]
    elif classes == list(range(len(classes))) and 2 <= len(classes) <= UNKNOWN:
        rows = [_row(f"class {one}", one, one, distinct_color(one)) for one in classes] + [
            _row("ignored", IGNORE_INDEX, IGNORE_INDEX, distinct_color(IGNORE_INDEX))]
    else:
        odd = next((one for place, one in enumerate(classes) if one != place), ids[-1])
        raise UserError(f"--labels-dir {folder}: expected the values 0 and 255, or 0 to N-1 and 255 to ignore, where "
                        f"--classes is left out, found {', '.join(map(str, ids[:8]))}{' ...' * (len(ids) > 8)} ({odd} "
                        f"in {first[odd]})")
    classes = ClassTable(rows, ASSUMED)
    print(f"label maps hold {', '.join(map(str, ids[:8]))}{' ...' * (len(ids) > 8)}, and --classes is left out: "
          f"this table is assumed\n{classes.as_csv()}", end="")
    return classes


def keep_table(path, classes):
    """Write a class table, unless it stands there already. Raises `UserError` where something else does."""
    content = classes.as_csv().encode()
    if not os.path.lexists(path):
        checkpoint.write_atomically(path, lambda file: file.write(content))
    elif read_file(path, "a class table (CSV)") != content:
        raise UserError(f"{path}: expected the class table that the label maps make, or no file, found another one; "
                        f"--classes {path} takes it as it is")


def ids_of(path):
    """The ids in a label map; 0 and 255 for black and white in colours. Raises `UserError`."""
    ids = read_ids(path)
    if ids.ndim == 2:
        return np.flatnonzero(np.bincount(ids.ravel())).tolist() if ids.dtype == np.uint8 else np.unique(ids).tolist()
    grey = ids[..., 0]
    if (ids != grey[..., None]).any() or ((grey != 0) & (grey != 255)).any():
        raise UserError(f"{path}: expected ids where --classes is left out, found a label map of colours")
    return np.unique(grey).tolist()


def _row(name, number, train_id, color):
    return dict(zip((*COLUMNS, "category"), (name, number, train_id, *color, ""), strict=True))


def distinct_color(number):
    """(red, green, blue) of a class, as PASCAL VOC draws them: its bits, dealt to the three, the lowest counting
    most."""
    return tuple(sum((number >> 3 * place + channel & 1) << 7 - place for place in range(3)) for channel in range(3))
