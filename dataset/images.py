"""Images without label maps: any files to predict, and the archive that the Cityscapes server takes."""

import contextlib
import glob
import os
import zipfile
from collections import deque
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from utils.common.errors import UserError, plural
from utils.common.files import read_file, write_atomically
from utils.imaging.decode import SUFFIXES, load, open_image, read_image, upright_size
from utils.imaging.video import NUMBER, is_numbered, is_video, numbered_images, open_video
from utils.runs.results import RECORD, recorded

from .cityscapes import OFFICIAL_COUNTS, as_tensor, images_in, relative_paths, unique_names
from .folders import is_image, report_left_out

SUBMISSION = "submission.zip"


class ImageFiles(Dataset):
    """Image files, upright by their EXIF orientation.

    An item is {"image": uint8 (3, H, W) RGB, "name": str}, or, for a file that cannot be read, {"error": sentence,
    "name": str}.

    Args:
        paths: of the files; or {path: relative path}, as `find_images` gives them, where names are made of the latter.
    """

    def __init__(self, paths):
        self.paths = list(paths)
        self.names = unique_names(paths.values() if isinstance(paths, dict) else relative_paths(self.paths, Path()))

    def __len__(self):
        return len(self.paths)

    def look_at_first(self):
        """Read the first image in this process, so that what its kind calls for is said here, and not by every process
        that reads images."""
        with contextlib.suppress(UserError):        # said in its turn
            read_image(self.paths[0])

    def __getitem__(self, index):
        try:
            image = read_image(self.paths[index])
        except UserError as error:
            return {"error": str(error), "name": self.names[index]}
        return {"image": as_tensor(image.transpose(2, 0, 1)), "name": self.names[index]}


def find_images(places):
    """Find the images that files, folders (with all below them) and patterns such as "a/*.png" stand for, each once;
    "a/%05d.png" stands for one video, and is found as it is.

    Returns {path: relative path}: relative to the folder that was given, with that folder's name before it if there
    are several places; of single files to the folder of the first, or the one common to all. Raises `UserError`.
    """
    found, single = {}, []
    for place in map(str, places):
        if os.path.isdir(place):
            inside = _search(place)
            what = f"images ({', '.join(sorted(SUFFIXES))}) in it"
            root = os.path.abspath(place)
            found |= dict(zip(inside, relative_paths(inside, os.path.dirname(root) if len(places) > 1 else root),
                              strict=True))
        elif os.path.lexists(place):
            inside, what = [Path(place)] if os.path.isfile(place) else [], "a regular file, a folder or a pattern"
            single += inside
        elif is_numbered(place):
            inside, what = [Path(place)] * bool(numbered_images(place)), "numbered images of such names"
            single += inside
        else:
            inside = []
            for file in map(Path, sorted(glob.glob(place, recursive=True))):
                inside += [file] * (is_image(file) or file.is_file())
            what = "an image or a video, a folder, or a pattern that fits files"
            single += inside
        if not inside:
            raise UserError(f"--images {place}: expected {what}, found none")
    if single:
        found |= dict(zip(single, relative_paths(single, os.path.dirname(os.path.abspath(single[0]))), strict=True))
    once = {}
    for path in found:
        once.setdefault(os.path.abspath(path), path)
    return {path: found[path] for path in once.values()}


def _search(top):
    """Images below a folder, sorted. Links to folders are followed, each folder once; hidden files are left out, and
    the results that an earlier run has recorded in one of the folders. Lines say what is left out, but for hidden
    files. Raises `UserError` for links that lead nowhere."""
    found, left_out, of_results, seen, results, waiting = [], [], [], set(), set(), deque([Path(top)])
    while waiting:
        folder = waiting.popleft()
        if os.path.realpath(folder) in seen:
            continue
        seen.add(os.path.realpath(folder))
        try:
            names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
        except OSError as error:
            raise UserError(f"--images {folder}: expected a folder that can be read, found: {error}") from None
        with contextlib.suppress(UserError):        # another's file of that name
            results |= {folder / name for name in (RECORD, *recorded(folder))}
        for path in (folder / name for name in names):
            if path.is_dir():       # links last: a folder that lies here too is found under its own name
                (waiting.append if path.is_symlink() else waiting.appendleft)(path)
            elif path in results:
                of_results.append(path)
            else:
                (found if is_image(path) else left_out).append(path)
    report_left_out(f"--images {top}", left_out)
    report_left_out(f"--images {top}", of_results, "results of an earlier run")
    return sorted(found)


def open_videos(found):
    """The videos among what `find_images` gives: {name: `Video`}, of which no two names are the same; none where all
    are images. Raises `UserError` where both are, or where a video cannot be read."""
    videos = {path: relative for path, relative in found.items() if is_video(path)}
    if videos and len(videos) < len(found):
        raise UserError(f"--images: expected images or videos, found both, such as {min(found.keys() - videos.keys())} "
                        f"and {min(videos)}")
    names = unique_names([_named(path, relative) for path, relative in videos.items()])
    return dict(zip(names, map(open_video, videos), strict=True))


def _named(path, relative):
    """The relative path from which a video gets its name: that of numbered images has no number, or is its folder's."""
    if not is_numbered(path):
        return relative
    left = NUMBER.sub("", path.stem).strip("_-. ")
    return relative.with_name((left or path.absolute().parent.name or "images") + path.suffix)


def images_of_split(root, split):
    """The images of a Cityscapes split, which needs no label maps. Raises `UserError`."""
    found = images_in(root, split)
    if not found:
        raise UserError(f"{Path(root) / 'leftImg8bit' / split}: expected <city>/*_leftImg8bit.png in it, found none")
    return found


def write_submission(folder, dataset, classes):
    """Check the label ids of all images and pack them as the Cityscapes server takes them: a flat zip archive.

    Args:
        folder: of the PNGs, named after their images.
        dataset: `ImageFiles`.
        classes: `ClassTable`.

    Returns:
        A sentence about it. Raises `UserError` where a file is missing, of another size, or holds other values.
    """
    known = set(classes.ids.tolist())
    target = folder.parent / SUBMISSION
    files = [folder / f"{name}.png" for name in dataset.names]
    for file, path in zip(files, dataset.paths, strict=True):
        size, labels = upright_size(path), open_image(file, read_file(file, f"the prediction for {path}"))
        load(file, labels)
        found, values, mode = labels.size, set(np.unique(np.asarray(labels)).tolist()), labels.mode
        if found != size or not values <= known or mode != "L":
            raise UserError(f"{file}: expected 8-bit label ids of {size[0]}×{size[1]} pixels, found mode {mode}, "
                            f"{found[0]}×{found[1]}, values {sorted(values - known) or 'known'}")

    def write(stream):
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:      # PNGs are compressed already
            for file in files:
                archive.write(file, file.name)

    write_atomically(target, write)
    official = OFFICIAL_COUNTS["test"]
    note = "" if len(files) == official else f" (the official test split has {official})"
    return f"{target}: {plural(len(files), 'label map')} checked{note}, {target.stat().st_size / 1e6:.1f} MB"
