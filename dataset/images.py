"""Images and videos without label maps, for prediction, and the submission archive for the Cityscapes server."""

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
    """Data set of image files, turned upright by their EXIF orientation.

    An item is {"image": uint8 (3, H, W) RGB, "name": str} or, for a file that cannot be read, {"error": message,
    "name": str}.

    Args:
        paths: of the files; or {path: relative path} from `find_images`, whose relative paths become the names.
    """

    def __init__(self, paths):
        self.paths = list(paths)
        self.names = unique_names(paths.values() if isinstance(paths, dict) else relative_paths(self.paths, Path()))

    def __len__(self):
        return len(self.paths)

    def read_first_image(self):
        """Read the first image, so that warnings about its kind appear once, in this process, not in every worker."""
        with contextlib.suppress(UserError):        # the item of this image has the error
            read_image(self.paths[0])

    def __getitem__(self, index):
        try:
            image = read_image(self.paths[index])
        except UserError as error:
            return {"error": str(error), "name": self.names[index]}
        return {"image": as_tensor(image.transpose(2, 0, 1)), "name": self.names[index]}


def find_images(places):
    """Find images and videos for --images.

    Args:
        places: list of files, folders (with all their subfolders), patterns such as "a/*.png", and patterns of numbered
            images such as "a/%05d.png", which stand for one video.

    Returns:
        {path: relative path}, each file once; the path of a video of numbered images is its pattern. Files in a folder
        are relative to the given folder or, if there are several places, to its parent. Single files are relative to
        the folder of the first one or, if some are outside it, to the folder that all have in common.

    Raises:
        UserError: if a place has no images, or a link is broken.
    """
    images, single = {}, []
    for place in map(str, places):
        if os.path.isdir(place):
            paths = _search_folder(place)
            what = f"images ({', '.join(sorted(SUFFIXES))}) in it"
            root = os.path.abspath(place)
            images |= dict(zip(paths, relative_paths(paths, os.path.dirname(root) if len(places) > 1 else root),
                               strict=True))
        elif os.path.lexists(place):
            paths, what = [Path(place)] if os.path.isfile(place) else [], "a regular file, a folder or a pattern"
            single += paths
        elif is_numbered(place):
            paths, what = [Path(place)] * bool(numbered_images(place)), "numbered images with such names"
            single += paths
        else:
            paths = []
            for file in map(Path, sorted(glob.glob(place, recursive=True))):
                paths += [file] * (is_image(file) or file.is_file())
            what = "an image, a video, a folder, or a pattern that matches files"
            single += paths
        if not paths:
            raise UserError(f"--images {place}: expected {what}, found none")
    if single:
        images |= dict(zip(single, relative_paths(single, os.path.dirname(os.path.abspath(single[0]))), strict=True))
    unique = {}
    for path in images:
        unique.setdefault(os.path.abspath(path), path)
    return {path: images[path] for path in unique.values()}


def _search_folder(top):
    """Find the images in a folder and its subfolders, sorted.

    Links to folders are followed, each folder once. Hidden files are left out, and so are results that an earlier run
    has recorded in one of the folders. A line reports what is left out, except hidden files. Raises `UserError` for a
    broken link.
    """
    images, other_files, result_files, visited, recorded_paths = [], [], [], set(), set()
    waiting = deque([Path(top)])
    while waiting:
        folder = waiting.popleft()
        if os.path.realpath(folder) in visited:
            continue
        visited.add(os.path.realpath(folder))
        try:
            names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
        except OSError as error:
            raise UserError(f"--images {folder}: expected a folder that can be read, found: {error}") from None
        with contextlib.suppress(UserError):        # a file of another program with this name
            recorded_paths |= {folder / name for name in (RECORD, *recorded(folder))}
        for path in (folder / name for name in names):
            if path.is_dir():       # links last, so that a folder inside `top` is visited by its own path
                (waiting.append if path.is_symlink() else waiting.appendleft)(path)
            elif path in recorded_paths:
                result_files.append(path)
            else:
                (images if is_image(path) else other_files).append(path)
    report_left_out(f"--images {top}", other_files)
    report_left_out(f"--images {top}", result_files, "results of an earlier run")
    return sorted(images)


def open_videos(paths):
    """Open the videos among the results of `find_images`.

    Args:
        paths: {path: relative path} from `find_images`.

    Returns:
        {unique name: `Video`}, empty if all paths are images.

    Raises:
        UserError: if there are both images and videos, or a video cannot be read.
    """
    videos = {path: relative for path, relative in paths.items() if is_video(path)}
    if videos and len(videos) < len(paths):
        raise UserError(f"--images: expected images or videos, found both, such as {min(paths.keys() - videos.keys())} "
                        f"and {min(videos)}")
    names = unique_names([_named_path(path, relative) for path, relative in videos.items()])
    return dict(zip(names, map(open_video, videos), strict=True))


def _named_path(path, relative):
    """Return the relative path that names a video; numbered images are named without number, or after their folder."""
    if not is_numbered(path):
        return relative
    stem = NUMBER.sub("", path.stem).strip("_-. ")
    return relative.with_name((stem or path.absolute().parent.name or "images") + path.suffix)


def images_of_split(root, split):
    """List the images of a Cityscapes split, with or without label maps. Raises `UserError` if there are none."""
    images = images_in(root, split)
    if not images:
        raise UserError(f"{Path(root) / 'leftImg8bit' / split}: expected <city>/*_leftImg8bit.png in it, found none")
    return images


def write_submission(folder, dataset, classes):
    """Check the predicted label maps of all images and pack them into a flat zip archive for the Cityscapes server.

    Args:
        folder: of the PNG files of label ids, named after their images; the archive is written beside it.
        dataset: `ImageFiles`.
        classes: `ClassTable`.

    Returns:
        A sentence that describes the archive.

    Raises:
        UserError: if a label map is missing, has another size, or has values that are not class ids.
    """
    class_ids = set(classes.ids.tolist())
    target = folder.parent / SUBMISSION
    files = [folder / f"{name}.png" for name in dataset.names]
    for file, path in zip(files, dataset.paths, strict=True):
        size, labels = upright_size(path), open_image(file, read_file(file, f"the prediction for {path}"))
        load(file, labels)
        label_size, values, mode = labels.size, set(np.unique(np.asarray(labels)).tolist()), labels.mode
        if label_size != size or not values <= class_ids or mode != "L":
            raise UserError(f"{file}: expected 8-bit label ids of {size[0]}×{size[1]} pixels, found mode {mode}, "
                            f"{label_size[0]}×{label_size[1]}, values {sorted(values - class_ids) or 'valid'}")

    def write(stream):
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:      # PNG is already compressed
            for file in files:
                archive.write(file, file.name)

    write_atomically(target, write)
    official = OFFICIAL_COUNTS["test"]
    note = "" if len(files) == official else f" (the official test split has {official})"
    return f"{target}: {plural(len(files), 'label map')} checked{note}, {target.stat().st_size / 1e6:.1f} MB"
