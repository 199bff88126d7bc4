"""The drawn data set: layout, classes, repeatability."""

import hashlib
import os
import subprocess
import sys

import numpy as np
from cityscapesscripts.helpers.csHelpers import getCsFileInfo
from cityscapesscripts.helpers.labels import id2label
from PIL import Image

from dataset.streets import draw_scene, write_dataset
from tests.conftest import ROOT


def test_files_are_named_and_encoded_like_cityscapes(streets):
    images = sorted(streets.glob("leftImg8bit/*/*/*.png"))
    assert len(images) == 12
    for image in images:
        info = getCsFileInfo(str(image))
        assert (info.city, info.type, info.ext) == ("drawn", "leftImg8bit", "png")
        stem = str(image).replace("leftImg8bit/", "gtFine/").removesuffix("_leftImg8bit.png") + "_gtFine_"
        ids, instances, color = (np.asarray(Image.open(f"{stem}{kind}.png"))
                                 for kind in ("labelIds", "instanceIds", "color"))
        assert ids.dtype == np.uint8 and ids.shape == np.asarray(Image.open(image)).shape[:2]
        assert set(np.unique(ids)) <= set(id2label)
        for value in np.unique(ids):
            assert (color[ids == value] == (*id2label[value].color, 255)).all()
        with_instances = instances >= 1000
        assert (instances[with_instances] // 1000 == ids[with_instances]).all()
        assert (instances[~with_instances] == ids[~with_instances]).all()
        assert all(id2label[i].hasInstances for i in np.unique(ids[with_instances]))
        assert not any(id2label[i].hasInstances for i in np.unique(ids[~with_instances]))


def test_all_classes_are_in_each_split_of_the_default_size():
    """Half of the 50 validation scenes (training has more); a class must be worth learning, not a few pixels."""
    pixels = np.zeros(34, int)
    for index in range(25):
        _, ids, _ = draw_scene(256, 512, 0, "val", index)
        pixels += np.bincount(ids.ravel(), minlength=34)
    evaluated = [i for i, label in id2label.items() if not label.ignoreInEval]
    assert len(evaluated) == 19
    assert (pixels[evaluated] > 1500).all(), dict(zip(evaluated, pixels[evaluated], strict=True))
    assert 0 < pixels[:7].sum() < 0.2 * pixels.sum()      # some void, as in the real data


def digest(root):
    files = sorted(path for path in root.rglob("*.png"))
    return hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in files)).hexdigest()


def test_same_seed_same_bytes(tmp_path):
    for name, seed, workers in (("a", 1, 1), ("b", 1, 2), ("c", 2, 2)):
        write_dataset(tmp_path / name, train=2, val=1, size=(64, 128), seed=seed, workers=workers)
    assert digest(tmp_path / "a") == digest(tmp_path / "b") != digest(tmp_path / "c")


def test_the_hash_seed_of_the_process_does_not_matter():
    """Sets of strings come in another order in every process; scene 7 must hold two classes that take one place."""
    code = ("import hashlib; from dataset.streets import draw_scene; "
            "print(hashlib.sha256(b''.join(map(bytes, draw_scene(64, 128, 0, 'train', 7)))).hexdigest())")
    actual = {subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": str(seed)},
                            capture_output=True, text=True, check=True).stdout for seed in range(4)}
    assert len(actual) == 1 and len(actual.pop()) == 65


def test_splits_show_different_streets():
    a, b = (draw_scene(64, 128, 0, split, 0)[0] for split in ("train", "val"))
    assert not np.array_equal(a, b)
