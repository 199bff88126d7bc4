"""`python -m dataset.check` on the streets, on CamVid, and on a data set in which everything is wrong."""

import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from dataset.check import main
from dataset.cityscapes import CityscapesDataset
from tests.conftest import finish, fork
from tests.dataset.test_folders import make, words
from utils.common.errors import UserError


def check(*words):
    return finish(fork("-m", "dataset.check", *words))


@pytest.fixture
def bad(streets, tmp_path):
    """Streets with one of each: missing, orphaned, unreadable, another size, train ids, colors, a leak."""
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
    actual = json.loads((tmp_path / "r/check.json").read_text())["splits"][str(tmp_path / "l.txt")]
    assert caught.value.code == 1 and actual["pairs"] == 2 and "2 pairs; sizes 8×6 (2)" in out
    assert any(problem["kind"] == "nothing labeled" for problem in actual["problems"])
    assert "; check.json and pictures of valid pairs" in out


@pytest.mark.parametrize("words", [(), ("--data-list", "gone.txt"), ("--classes", "gone.csv"),
                                   ("--data-list", "pipe")])
def test_what_cannot_be_checked_is_a_sentence_and_leaves_no_folder(tmp_path, words, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["check", str(tmp_path), *words])
    with pytest.raises(UserError, match="expected"):
        main()
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_data_of_the_same_name_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for parent in ("a", "b", "a"):
        folders = make(tmp_path / parent / "data", "x", "y")
        monkeypatch.setattr("sys.argv", ["check", *words(folders, "--num-workers", "0")])
        main()
    reports = {path.parent.name: json.loads(path.read_text())["data"] for path in tmp_path.glob("runs/*/check.json")}
    assert reports == {f"check_data{suffix}": [str(tmp_path / parent / f"data/{kind}") for kind in ("images", "labels")]
                       for suffix, parent in (("", "a"), ("_2", "b"))}


def test_label_maps_that_cannot_be_read_are_listed_where_others_tell_the_classes(tmp_path):
    make(tmp_path, "a", "b", "c", values=(0, 1, 2), suffixes=(".png",))
    Image.new("L", (48, 40)).save(tmp_path / "labels/c.png")
    (tmp_path / "labels/b.png").write_text("none")
    for name in ("ab", "c"):
        (tmp_path / f"{name}.txt").write_text("".join(f"images/{stem}.png labels/{stem}.png\n" for stem in name))
    lists = ("--data-list", tmp_path / "ab.txt", tmp_path / "c.txt")
    status, out, error = check("--data-dir", tmp_path, *lists, "--output-dir", tmp_path / "r")
    assert status == 1 and "WRONG, label map: 1" in out and "found a file that is not an image" in out, out + error
    assert f"NOTE, classes without pixels: 1\n    {tmp_path / 'c.txt'}: no pixels of class 1, class 2\n" in out
    (tmp_path / "labels/a.png").write_text("none")
    shutil.copy(tmp_path / "labels/a.png", tmp_path / "labels/c.png")
    status, _, error = check(tmp_path, *lists, "--output-dir", tmp_path / "s")
    assert status == 2 and error.count("\n") == 1 and "expected an image, found a file that is not an image" in error


def test_two_folders_without_pairs_are_told_of_the_list(tmp_path):
    folders = make(tmp_path, "train/img_0", "val/img_1", suffixes=(".png",))
    for split, number in (("train", 0), ("val", 1)):
        (tmp_path / f"labels/{split}/img_{number}.png").rename(tmp_path / f"labels/{split}/label_{number}.png")
    status, _, error = check(*words(folders))
    assert status == 2 and "such as \"images/train/img_0.png labels/train/label_0.png\"" in error
    status, _, error = check(tmp_path)
    assert status == 2 and "--images-dir DIR --labels-dir DIR read two folders" in error


def test_a_folder_without_data_is_a_sentence(tmp_path):
    status, _, error = check(tmp_path, "--output-dir", tmp_path / "r")
    assert status == 2 and error.startswith("error: ") and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "r").exists()
