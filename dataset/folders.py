"""Data sets of two folders: images in one, label maps of the same stems in the other.

    images/a.jpg  images/b.jpg          or, with splits,    images/train/a.jpg  images/val/b.jpg
    labels/a.png  labels/b.png                              labels/train/a.png  labels/val/b.png

Where no stems agree, endings that all files of a folder share are left out: a.jpg and a_mask.png are a pair.
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

from .labels import ClassTable
from .text import read_text

FLAGS = ("--images-dir", "--labels-dir")
OTHER_LAYOUTS = ("--images-dir DIR --labels-dir DIR read two folders of files of the same stems, --data-list FILE of "
                 "\"image label\" lines any other layout")
DEFAULT_TABLE = "that of Cityscapes for its folders and file names, else by the values of the label maps"
DEFAULT_SPLITS = ("train", "val")       # of the command lines; others were asked for


def add_data_flags(parser, classes):
    """The flags that name a data set, but for its one folder. classes: what --classes is where it is left out."""
    parser.add_argument("--images-dir", type=flags.path, metavar="DIR", help="instead of a data set's folder: one of "
                        "images, or of folders train, val, ... of images; --data-list then holds one stem a line")
    parser.add_argument("--labels-dir", type=flags.path, metavar="DIR", help="with it: their label maps, of the same "
                        "stems; where the values are 0 and 255, or 0 to N-1 and 255 to ignore, --classes may be left "
                        "out")
    parser.add_argument("--data-list", type=flags.path, nargs="+", metavar="FILE", help="files of \"image label\" "
                        "lines, paths relative to the data set's folder or to the list; without it the folder is "
                        "scanned")
    parser.add_argument("--classes", type=flags.path, metavar="FILE", help="class table (CSV: name,id,train_id,red,"
                        f"green,blue[,category]); default: {classes}")


def read_table(path, images_dir, lists):
    """The `ClassTable` of a file, or else of Cityscapes; None where the label maps of two folders, or of lists, will
    tell it (`dataset.infer`). Raises `UserError`, also for a table of one class."""
    if path is None and (images_dir or lists):
        return None
    classes = ClassTable.read(path) if path else ClassTable.read()
    classes.check_several()
    return classes


def data_root(data_dir, images_dir, labels_dir):
    """Where the data are: the folder of a data set or, of two folders, (of images, of label maps). Raises `UserError`
    where the flags name neither, or both."""
    if images_dir and labels_dir and not data_dir:
        if os.path.realpath(images_dir) == os.path.realpath(labels_dir):
            raise UserError(f"--labels-dir {labels_dir}: expected another folder than --images-dir, found the same; "
                            f"of one folder, --data-dir {labels_dir} --data-list FILE takes lines of \"image label\", "
                            "such as \"a.jpg a_mask.png\"")
        return images_dir, labels_dir
    if images_dir or labels_dir:
        raise UserError("--images-dir, --labels-dir: expected both and no other folder of data, found "
                        + " and ".join(filter(None, (images_dir, labels_dir, data_dir))))
    if not data_dir:
        raise UserError("--data-dir: expected the folder of the data set, or --images-dir and --labels-dir, found none")
    return data_dir


def data_flag(args):
    """The flag that names the label maps of a data set, with its value, for messages."""
    return f"--labels-dir {args.labels_dir}" if args.labels_dir else f"--data-list {' '.join(args.data_list)}"


def has_no_split_folders(root, split):
    """Whether two folders have no folders of a split's name in them, so that all files belong to it."""
    return isinstance(root, tuple) and not os.path.isdir(os.path.join(root[0], split))


def check_validation(root, data_list, val_list, val_split, what="--val-every"):
    """Refuse a validation that has no images of its own. root: of `data_root`; what: asks for it, in the message."""
    without = not data_list and any(has_no_split_folders(root, part.partition(":")[0]) for part in val_split.split("+"))
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
    lines = read_text(path, "a text file").splitlines()
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
    """[[(image, label map)]] of splits; of all files where the folders have none. Raises `UserError`."""
    if not all(has_no_split_folders(folders, name) for name in splits):
        name_loose_files(folders, splits)
        return [_pair(tuple(Path(folder, name) for folder in folders)) for name in splits]
    if len(splits) > 1 or splits[0] not in DEFAULT_SPLITS:
        raise UserError(f"--split {'+'.join(splits)}: expected folders of these names in {folders[0]}, found none")
    others = splits_of(folders)
    if others and not any(map(is_image, _inside(folders[0], FLAGS[0]))):
        remedy = list_remedy(folders, *(Path(one, others[0], "NAME.png") for one in folders))
        raise UserError(f"--images-dir {folders[0]}: expected images in it, or a folder {splits[0]} there and in "
                        f"--labels-dir, found folders: {', '.join(others)[:200]}; --split {others[0]} takes one of "
                        f"them, several are joined by +; {remedy}")
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
            remedy = "--data-list takes only those that it names" if pairs else list_remedy(folders, *(
                paths[0] for paths in alone))
            raise UserError(f"{flag} {place}: expected a partner of each of the {len(pairs) + len(files)} files in "
                            f"{folder}, found none of the stem of {names}"
                            f"{f' and {len(files) - 3} more' * (len(files) > 3)}; {remedy}")
    return pairs


def list_remedy(folders, image, label):
    """What helps where images and label maps of two folders do not pair by their stems: a list, with its first line.

    image, label: paths of a file of each kind.
    """
    root = os.path.commonpath([os.path.abspath(folder) for folder in folders])
    line = "\t".join(os.path.relpath(path, root) for path in (image, label))
    line = line if " " in line else line.replace("\t", " ")
    return (f"--data-dir {root} --data-list FILE takes lines of \"image label\", paths below that folder, such as "
            f"\"{line}\", in place of --images-dir and --labels-dir")


def pair_listed(folders, path):
    """[(image, label map)] of a list of stems; ["FILE, line N"], where each stands; and a sentence for each line that
    names none. Raises `UserError`."""
    found, lines, wrong = _files(folders), {}, []
    for number, text in read_list(path, "of one stem"):
        stem = composed(text)
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
    """[{stem: path}] of the images and of the label maps, sorted. Where no stems agree, the endings that all files of a
    folder share are left out of the stems, if then some agree, with a warning. Raises `UserError`."""
    files = [_by_stem(folder, flag, folders) for folder, flag in zip(folders, FLAGS, strict=True)]
    if not files[0].keys().isdisjoint(files[1]):
        return files
    choices = itertools.product(*map(_shared_endings, files))
    best, endings, most = files, None, 0
    for ending in sorted(choices, key=lambda pair: sum(map(len, pair))):
        shorter = [{stem.removesuffix(end): path for stem, path in one.items()}
                   for one, end in zip(files, ending, strict=True)]
        if (count := len(shorter[0].keys() & shorter[1].keys())) > most:
            best, endings, most = shorter, ending, count
    if endings:
        left_out = " and ".join(f"{end} in {flag} {folder}" for end, flag, folder in zip(
            endings, FLAGS, folders, strict=True) if end)
        warnings.warn(f"images and label maps are matched by their stems without {left_out}; other pairs take "
                      "--data-dir and --data-list, with lines of \"image label\"", stacklevel=2)
    return best


def _shared_endings(files):
    """The endings that all stems share, such as _mask but no numbers; "" is one. files: {stem: path}."""
    shared = os.path.commonprefix([stem[::-1] for stem in files])[::-1]
    shortest = min(map(len, files))
    endings = [shared[match.start():] for match in re.finditer(r"[-_. ](?=[^\W\d_])", shared)]
    return ["", *(ending for ending in endings if len(ending) < shortest)]


def is_image(path):
    """Whether a path is a file that is named as images are. Raises `UserError` for such a link that leads nowhere."""
    if path.suffix.lower() not in SUFFIXES:
        return False
    refuse_dead_link(path)
    return path.is_file()


def _by_stem(folder, flag, folders):
    found, paths, left_out = {}, _inside(folder, flag), []
    for path in paths:
        if not is_image(path):
            left_out.append(path)
            continue
        stem = composed(path.stem)
        if stem in found:
            raise UserError(f"{flag} {folder}: expected every stem once, found {found[stem].name} and {path.name}")
        found[stem] = path
    if not found:
        inside = [path.name for path in paths if path.is_dir()]
        raise UserError(f"{flag} {folder}: expected images ({', '.join(sorted(SUFFIXES))}) in it, found none"
                        + (f", but folders: {', '.join(inside)[:200]}; "
                           + list_remedy(folders, *(Path(one, "...", "NAME.png") for one in folders))) * bool(inside))
    name_left_out(f"{flag} {folder}", left_out)
    return found


def composed(name):
    """A name with its letters and accents composed (NFC): macOS writes them one after the other (NFD). Bytes of UTF-8
    that the locale's encoding does not know, as in C, are read as such."""
    with contextlib.suppress(UnicodeError):
        name = os.fsencode(name).decode("utf-8")
    return unicodedata.normalize("NFC", name)


def decomposed(name):
    """A name with its letters and accents one after the other (NFD)."""
    return unicodedata.normalize("NFD", name)


def as_stored(name):
    """A name as this process spells a file's whose bytes are its UTF-8; in most locales the same."""
    with contextlib.suppress(UnicodeError):
        return os.fsdecode(name.encode("utf-8"))
    return name


def refuse_dead_link(path):
    """Raise `UserError` where a path is a link that leads nowhere; circles of links are no files, and are left out."""
    if _is_dead_link(path):
        path = Path(path)
        dead = sum(map(_is_dead_link, (other for other in path.parent.iterdir() if other.suffix == path.suffix)))
        raise UserError(f"{path}: expected a file, found a link to {os.readlink(path)}, which does not exist"
                        + f", one of {dead} such links in {path.parent}" * (dead > 1))


def _is_dead_link(path):
    try:
        os.stat(path)
    except FileNotFoundError:
        return os.path.islink(path)
    except OSError:
        pass
    return False


def name_left_out(place, paths, why="not images that can be read"):
    """Print one line about what lies in a place and is left out, if anything: how many of each suffix, and folders."""
    kinds = Counter("folder" if path.is_dir() else path.suffix.lower() for path in paths)
    folders = kinds.pop("folder", 0)
    parts = [f"{count} of {suffix}" if suffix else plural(count, "file") + " without a suffix"
             for suffix, count in sorted(kinds.items())] + [plural(folders, "folder")] * bool(folders)
    if parts:
        log_once(f"{place}: left out, as {why}: {', '.join(parts)}, such as {min(paths, key=str).name}")


def name_loose_files(folders, splits):
    """Print a line about images and label maps that lie beside the folders of splits, if there are any."""
    for folder, flag in zip(folders, FLAGS, strict=True):
        loose = list(filter(is_image, _inside(folder, flag)))
        name_left_out(f"{flag} {folder}", loose, f"they lie beside the {plural(len(splits), 'folder')} of splits "
                                                 f"({', '.join(splits)}) and belong to none")


def _inside(folder, flag):
    """What lies in a folder, sorted, but for what is hidden."""
    check_folder(folder, f"{flag} ")
    try:
        return [Path(folder, name) for name in sorted(os.listdir(folder)) if not name.startswith(".")]
    except OSError as error:
        raise UserError(f"{flag} {folder}: expected a folder that can be read, found: {error}") from None
