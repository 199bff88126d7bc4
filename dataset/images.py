"""Images without truth: any files to predict, and what the Cityscapes server takes."""

import glob
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from utils import checkpoint
from utils.cli import UserError

from .cityscapes import OFFICIAL_COUNTS, as_tensor, unique_names
from .reading import read_image

SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp", ".bmp", ".ppm"}
SUBMISSION = "submission.zip"


class ImageFiles(Dataset):
    """Image files, upright by their EXIF orientation.

    An item is {"image": uint8 (3, H, W) RGB, "name": str}, or, for a file that cannot be read, {"error": sentence,
    "name": str}.

    Args:
        paths: of the files.
    """

    def __init__(self, paths):
        self.paths = list(paths)
        self.names = unique_names(self.paths, Path())

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        try:
            image = read_image(self.paths[index])
        except UserError as error:
            return {"error": str(error), "name": self.names[index]}
        return {"image": as_tensor(image.transpose(2, 0, 1)), "name": self.names[index]}


def find_images(places):
    """Files, folders (searched through) and patterns → paths of images, each once. Raises `UserError`."""
    found = []
    for place in map(str, places):
        path = Path(place)
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
            what = f"images ({', '.join(sorted(SUFFIXES))}) in it"
        elif path.exists():
            inside, what = [path], ""
        else:
            inside = sorted(Path(file) for file in glob.glob(place, recursive=True) if Path(file).is_file())
            what = "an image, a folder or a pattern that fits files"
        if not inside:
            raise UserError(f"--images {place}: expected {what}, found none")
        found += inside
    return list(dict.fromkeys(found))


def images_of_split(root, split):
    """The images of a Cityscapes split, whose truth may be missing. Raises `UserError`."""
    folder = Path(root) / "leftImg8bit" / split
    found = sorted(folder.glob("*/*_leftImg8bit.png"))
    if not found:
        raise UserError(f"{folder}: expected <city>/*_leftImg8bit.png in it, found none")
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
        with Image.open(path) as image:
            size = image.size
        try:
            with Image.open(file) as labels:
                found, values, mode = labels.size, set(np.unique(np.asarray(labels)).tolist()), labels.mode
        except OSError as error:
            raise UserError(f"{file}: expected the prediction for {path}, found: {error}") from None
        if found != size or not values <= known or mode != "L":
            raise UserError(f"{file}: expected 8-bit label ids of {size[0]}×{size[1]} pixels, found mode {mode}, "
                            f"{found[0]}×{found[1]}, values {sorted(values - known) or 'known'}")

    def write(stream):
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:      # PNGs are compressed already
            for file in files:
                archive.write(file, file.name)

    checkpoint.write_atomically(target, write)
    official = OFFICIAL_COUNTS["test"]
    note = "" if len(files) == official else f" (the official test split has {official})"
    return f"{target}: {len(files)} label maps checked{note}, {target.stat().st_size / 1e6:.1f} MB"
