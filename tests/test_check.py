"""`python -m dataset.check` on the streets, on CamVid, and on a data set in which everything is wrong."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from dataset.cityscapes import CityscapesDataset
from tests.conftest import finish, start


def check(*words):
    return finish(start("-m", "dataset.check", *words))


@pytest.fixture
def bad(streets, tmp_path):
    """Streets with one of each: missing, orphaned, unreadable, another size, train ids, colours, a leak."""
    shutil.copytree(streets, tmp_path / "bad")
    images, labels = (sorted((tmp_path / "bad" / kind).glob(f"train/drawn/*{suffix}.png"))
                      for kind, suffix in (("leftImg8bit", ""), ("gtFine", "labelIds")))
    labels[0].unlink()
    images[1].unlink()
    images[2].write_bytes(images[2].read_bytes()[:1000])
    Image.fromarray(np.asarray(Image.open(labels[3]))[1:]).save(labels[3])
    train_ids = CityscapesDataset(streets, "train")[4]["label"].numpy()
    Image.fromarray(np.where(train_ids == 255, 0, train_ids)).save(labels[4])
    Image.open(labels[5]).convert("RGB").save(labels[5])
    shutil.copy(images[6], next((tmp_path / "bad/leftImg8bit/val/drawn").glob("*.png")))
    return tmp_path / "bad"


def test_everything_that_is_wrong_is_found(bad, tmp_path):
    status, out, error = check(bad, "--output-dir", tmp_path / "r")
    assert status == 1, error
    report = json.loads((tmp_path / "r/check.json").read_text())["splits"]
    kinds = [problem["kind"] for problem in report["train"]["problems"]]
    assert sorted(kinds) == ["image in several splits", "image missing", "label map", "label map missing",
                             "looks like train ids", "sizes differ", "unreadable image"]
    assert [problem["kind"] for problem in report["val"]["problems"]] == ["image in several splits"]
    for kind in kinds:
        assert f"WRONG, {kind}: 1" in out
    assert report["train"]["pairs"] == 7 and report["train"]["official"] == 2975
    assert "8 problems" in out


def test_figures_are_those_of_the_files(streets, tmp_path):
    status, out, _ = check(streets, "--output-dir", tmp_path / "r")
    assert status == 0 and "0 problems" in out
    report = json.loads((tmp_path / "r/check.json").read_text())["splits"]
    items = [CityscapesDataset(streets, "train")[index] for index in range(9)]
    pixels = np.concatenate([item["image"].flatten(1).numpy() for item in items], axis=1).astype(float)
    assert report["train"]["mean"] == pytest.approx(pixels.mean(1), abs=2e-3)
    assert report["train"]["std"] == pytest.approx(pixels.std(1), abs=2e-3)
    labels = np.stack([item["label"].numpy() for item in items])
    assert report["train"]["pixels"]["road"] == (labels == 0).sum()
    assert report["train"]["images_with"]["car"] == (labels == 13).any((1, 2)).sum()
    assert report["train"]["ignored_pixels"] == (labels == 255).sum() and report["train"]["sizes"] == {"256×128": 9}
    for name in ("sheet_train.png", "sheet_val.png", "classes.png"):
        assert Image.open(tmp_path / "r" / name).size[0] > 300


def test_a_list_and_a_table(camvid, tmp_path):
    status, out, error = check(camvid, "--data-list", camvid / "train.lst", camvid / "val.lst", "--classes",
                               camvid / "classes.csv", "--output-dir", tmp_path / "r", "--fast")
    assert status == 0, out + error
    assert "16 looked into" in out and (tmp_path / "r/sheet_val.png").exists()


def test_a_folder_without_data_is_a_sentence(tmp_path):
    status, _, error = check(tmp_path, "--output-dir", tmp_path / "r")
    assert status == 2 and error.startswith("error: ") and len(error.strip().splitlines()) == 1
