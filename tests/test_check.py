"""`python -m dataset.check` on the streets, on CamVid, and on a data set in which everything is wrong."""

import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from dataset.check import main
from dataset.cityscapes import CityscapesDataset
from tests.conftest import finish, start
from utils.cli import UserError


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


@pytest.mark.parametrize("values, suffix, table", [
    ((0, 255), ".png", "a,0,0,1,1,1\nb,1,1,2,2,2\n"), ((0, 1), ".png", "a,0,0,1,1,1\nb,255,1,2,2,2\n"),
    ((1, 2), ".jpg", "a,1,0,1,1,1\nb,2,1,2,2,2\n"), ((0, 1, 2), ".png", "a,1,0,1,1,1\nb,2,1,2,2,2\n"),
    ((3,), ".png", "a,1,0,1,1,1\nb,2,1,2,2,2\nvoid,3,255,2,2,2\n")])
def test_the_account_is_given_where_every_label_map_is_wrong(tmp_path, monkeypatch, capsys, values, suffix, table):
    for name in "ab":
        Image.fromarray(np.full((6, 8, 3), ord(name), np.uint8)).save(tmp_path / f"{name}.png")
        Image.fromarray(np.resize(values, (6, 8)).astype(np.uint8)).save(tmp_path / f"{name}_label{suffix}")
    (tmp_path / "l.txt").write_text("".join(f"{name}.png {name}_label{suffix}\n" for name in "ab"))
    (tmp_path / "classes.csv").write_text("name,id,train_id,red,green,blue\n" + table)
    monkeypatch.setattr("sys.argv", ["check", *map(str, (
        tmp_path, "--data-list", tmp_path / "l.txt", "--classes", tmp_path / "classes.csv", "--output-dir",
        tmp_path / "r", "--num-workers", "1"))])
    with pytest.raises(SystemExit) as caught:
        main()
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "r/check.json").read_text())["splits"][str(tmp_path / "l.txt")]
    assert caught.value.code == 1 and found["pairs"] == 2 and "2 pairs; sizes 8×6 (2)" in out
    assert any(problem["kind"] == "nothing labelled" for problem in found["problems"])
    assert "; check.json and pictures of what" in out


@pytest.mark.parametrize("words", [(), ("--data-list", "gone.txt"), ("--classes", "gone.csv"),
                                   ("--data-list", "pipe")])
def test_what_cannot_be_checked_is_a_sentence_and_leaves_no_folder(tmp_path, words, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["check", str(tmp_path), *words])
    with pytest.raises(UserError, match="expected"):
        main()
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_a_folder_without_data_is_a_sentence(tmp_path):
    status, _, error = check(tmp_path, "--output-dir", tmp_path / "r")
    assert status == 2 and error.startswith("error: ") and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "r").exists()
