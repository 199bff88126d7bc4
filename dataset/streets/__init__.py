"""Draw labeled street scenes, laid out and named like Cityscapes, for a machine without the real data.

    python -m dataset.streets OUT --train 200 --val 50 --size 256,512 --seed 0

A camera stands on a road and looks along it. Ground and house fronts are planes; all other objects are polygons in
meters, drawn from far to near. Colors are random within each class, so that classes differ in shape, position and
texture. The same seed gives the same files, byte for byte.

    camera.py       projection, and drawing into image and label maps
    surfaces.py     sky, ground, house fronts, walls, fences
    objects.py      vehicles, people, plants, street furniture
    scene.py        composition of a scene: `draw_scene`
"""

from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from utils.common import errors, flags
from utils.common.progress import progress
from utils.parallel.workers import MOST_WORKERS, do_jobs

from ..labels import ClassTable
from .scene import draw_scene

__all__ = ["draw_scene", "main", "write_dataset", "write_scene"]

CITY = "drawn"      # folder of the files, in place of a Cityscapes city


def write_scene(scene, out, size, seed):
    """Draw a scene and write its image, label ids, instance ids and colors.

    Args:
        scene: (split, index).
        out: folder of the data set.
        size: (height, width), pixels.
        seed: of the data set.
    """
    split, index = scene
    image, ids, instances = draw_scene(*size, seed, split, index)
    table = np.zeros((256, 4), np.uint8)
    for row in ClassTable.read().rows:
        table[row["id"] % 256] = row["red"], row["green"], row["blue"], 255
    stem = f"{CITY}_{index:06d}_000019"
    images, labels = (Path(out) / kind / split / CITY for kind in ("leftImg8bit", "gtFine"))
    for folder in (images, labels):
        folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(images / f"{stem}_leftImg8bit.png")
    Image.fromarray(ids).save(labels / f"{stem}_gtFine_labelIds.png")
    Image.fromarray(instances).save(labels / f"{stem}_gtFine_instanceIds.png")
    Image.fromarray(table[ids]).save(labels / f"{stem}_gtFine_color.png")


def write_dataset(out, train=200, val=50, size=(256, 512), seed=0, workers=None):
    """Draw a data set.

    Args:
        out: folder of the data set, created if it does not exist.
        train, val: number of scenes of each split.
        size: (height, width), pixels.
        seed: of all random draws.
        workers: number of processes, as in `do_jobs`.

    Raises:
        UserError: if the folder already has images.
    """
    out = Path(out)
    existing = next((out / "leftImg8bit").glob("*/*/*.png"), None)
    if existing:
        raise errors.UserError(f"{out}: expected a folder without images, found {existing}")
    scenes = [(split, index) for split, count in (("train", train), ("val", val)) for index in range(count)]
    for _ in progress(do_jobs(partial(write_scene, out=out, size=size, seed=seed), scenes, workers), f"drawing {out}",
                      "scene"):
        pass


def main():
    parser = flags.Parser(prog="python -m dataset.streets", usage="%(prog)s folder [flags]",
                        description="Draw labeled street scenes in the layout of Cityscapes.")
    parser.add_argument("out", metavar="folder", type=flags.path, help="folder of the data set, to be created")
    parser.add_argument("--train", type=flags.not_negative(int, 999999), default=200,
                        help="training scenes (default: 200)")
    parser.add_argument("--val", type=flags.not_negative(int, 999999), default=50,
                        help="validation scenes (default: 50)")
    parser.add_argument("--size", type=flags.size, default=(256, 512), help="HEIGHT,WIDTH in pixels (default: 256,512)")
    parser.add_argument("--seed", type=flags.random_seed, default=0, help="seed of the random scenes (default: 0)")
    parser.add_argument("--num-workers", type=flags.num_workers, help="worker processes; 0 to use only this "
                        f"process (default: one per core, at most {MOST_WORKERS})")
    args = parser.parse_args()
    write_dataset(args.out, args.train, val=args.val, size=args.size, seed=args.seed, workers=args.num_workers)
    print(f"{args.out}: {args.train} training and {args.val} validation scenes of {args.size[1]}×{args.size[0]}")
