"""Samples: what is read, and how a bad file is named."""

import pickle
import re
import shutil
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader

from dataset.check import find_pairs
from dataset.cityscapes import CityscapesDataset
from dataset.images import ImageFiles, find_images, images_of_split
from dataset.sampling import ClassSampler, EpochSampler, WeightedSampler
from dataset.transforms import train_transform
from tests.conftest import finish, fork
from utils.common.errors import UserError, user_message
from utils.parallel.workers import Jobs, Loader

TABLE = "name,id,train_id,red,green,blue\nroad,1,0,1,2,3\ncar,2,1,4,5,6\nvoid,3,255,0,0,0\n"


@pytest.fixture
def own(tmp_path):
    """Two images with labels, a list and a table, in a folder of their own."""
    for name in ("a", "b"):
        Image.fromarray(np.random.default_rng(0).integers(256, size=(6, 8, 3)).astype(np.uint8)).save(
            tmp_path / f"{name}.png")
        Image.fromarray(np.full((6, 8), 2, np.uint8)).save(tmp_path / f"{name}_label.png")
    (tmp_path / "list.txt").write_text("a.png a_label.png\n\nb.png b_label.png\n")
    (tmp_path / "classes.csv").write_text(TABLE)
    return tmp_path


def open_own(root):
    return CityscapesDataset(root, data_list=root / "list.txt", classes=root / "classes.csv")


def test_streets_are_scanned_and_items_are_as_documented(streets):
    dataset = CityscapesDataset(streets, "train")
    assert len(dataset) == 9
    item = dataset[4]
    assert item["image"].dtype == torch.uint8 and item["image"].shape == (3, 128, 256)
    assert item["label"].dtype == torch.uint8 and item["label"].shape == (128, 256)
    assert item["name"] == "drawn_000004_000019_leftImg8bit"
    stem = streets / "leftImg8bit/train/drawn/drawn_000004_000019_leftImg8bit.png"
    assert np.array_equal(item["image"].permute(1, 2, 0), np.asarray(Image.open(stem)))
    assert dataset.describe() == "train: 9 images, 19 classes (the official Cityscapes train split has 2975)"


def test_what_a_scan_of_cityscapes_leaves_out(streets, tmp_path, capsys):
    """Files of macOS are hidden; other images are said; links that lead nowhere are refused."""
    root = tmp_path / "city"
    shutil.copytree(streets, root)
    before = CityscapesDataset(root, "train").pairs
    capsys.readouterr()
    image, label = before[0]
    for path in (image, label):
        path.with_name(f"._{path.name}").write_bytes(b"\0\5\x16\7")
    image.with_name("x_leftImg8bit.jpg").touch()
    label.with_name("y_gtFine_labelIds.png").touch()
    assert CityscapesDataset(root, "train").pairs == before
    assert find_pairs(root, "train")[0] == before and len(images_of_split(root, "train")) == len(before)
    assert capsys.readouterr().out.splitlines() == [
        f"{root / 'leftImg8bit/train'}: left out (not <city>/*_leftImg8bit.png): 1 of .jpg, such as "
        "x_leftImg8bit.jpg",
        f"{root / 'gtFine/train'}: left out (label maps without an image in leftImg8bit/train): 1 of .png, such as "
        "y_gtFine_labelIds.png"]
    label.unlink()
    label.symlink_to("gone.png")
    with pytest.raises(UserError, match="labelIds.png: expected a file, found a link to gone.png, which .* exist$"):
        CityscapesDataset(root, "train")
    before[1][1].unlink()
    before[1][1].symlink_to("gone.png")
    with pytest.raises(UserError, match="which does not exist, one of 2 such links in .*drawn$"):
        CityscapesDataset(root, "train")


def test_a_list_and_a_table_describe_any_data_set(own):
    dataset = open_own(own)
    assert dataset.describe() == "list.txt: 2 images, 2 classes"
    assert (dataset[0]["label"] == 1).all() and dataset.names == ["a", "b"]


def test_images_that_are_not_predicted_are_said(own, capsys):
    (own / "._a.png").touch()
    (own / "d.heic").touch()
    assert [path.name for path in find_images([own])] == ["a.png", "a_label.png", "b.png", "b_label.png"]
    assert capsys.readouterr().out == (f"--images {own}: left out (not readable as images): 1 of .csv, 1 of "
                                       ".heic, 1 of .txt, such as classes.csv\n")


def test_names_that_repeat_carry_their_folders(own):
    for folder in ("x", "y"):
        (own / folder).mkdir()
        shutil.copy(own / "a.png", own / folder / "0.png")
    (own / "list.txt").write_text("x/0.png a_label.png\ny/0.png a_label.png\n")
    assert open_own(own).names == ["x_0", "y_0"]


def test_the_sample_of_an_entry_is_the_same_in_every_worker(streets):
    transform = train_transform((65, 65))
    dataset = CityscapesDataset(streets, "train", transform=transform, seed=5)
    sampler = EpochSampler(len(dataset), 5, 0, 24)
    loaded = [list(DataLoader(dataset, 4, sampler=sampler, num_workers=workers)) for workers in (0, 2)]
    late = list(DataLoader(dataset, 4, sampler=EpochSampler(len(dataset), 5, 12, 24)))
    for a, b in zip(loaded[0], loaded[1], strict=True):
        assert a["name"] == b["name"] and torch.equal(a["image"], b["image"]) and torch.equal(a["label"], b["label"])
    for a, b in zip(loaded[0][3:], late, strict=True):
        assert a["name"] == b["name"] and torch.equal(a["image"], b["image"])
    other = CityscapesDataset(streets, "train", transform=transform, seed=6)
    assert not torch.equal(other[0, 0]["image"], dataset[0, 0]["image"])
    assert not torch.equal(dataset[0, 9]["image"], dataset[0, 0]["image"])


@pytest.mark.parametrize("workers, persistent", [(0, False), (2, False), (2, True)])
def test_an_index_alone_draws_anew_every_time_as_the_seed_says(streets, workers, persistent):
    dataset = CityscapesDataset(streets, "train", transform=train_transform((33, 33)), jitter=(0.4, 0.4, 0.4, 0.1))

    def two_epochs(seed):
        torch.manual_seed(seed)
        loader = DataLoader(dataset, 3, shuffle=True, num_workers=workers, persistent_workers=persistent)
        return [batch for _ in range(2) for batch in loader]

    drawn = two_epochs(1)
    assert len({tuple(factors) for batch in drawn for factors in batch["jitter"].tolist()}) == 18
    crops = {}
    for batch in drawn:
        for name, image in zip(batch["name"], batch["image"], strict=True):
            crops.setdefault(name, []).append(image)
    assert len(crops) == 9 and not any(torch.equal(*two) for two in crops.values())
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(drawn, two_epochs(1), strict=True))
    assert not torch.equal(drawn[0]["jitter"], two_epochs(2)[0]["jitter"])


def test_without_a_transform_nothing_is_drawn(streets):
    dataset, before = CityscapesDataset(streets, "train"), torch.get_rng_state()
    assert torch.equal(dataset[-1]["image"], dataset[8]["image"]) and torch.equal(torch.get_rng_state(), before)


def test_everything_crosses_to_workers_that_inherit_nothing(streets, tmp_path):
    dataset = CityscapesDataset(streets, "train", transform=train_transform((33, 33)), cache=tmp_path / "c",
                                jitter=(0.4, 0.4, 0.4, 0.1))
    everything = ConcatDataset([ImageFiles([streets / "gone.png", dataset.pairs[0][0]]), Jobs(dataset.positions, [3]),
                                Jobs(dataset.decode_pair, [5]), dataset])
    items = list(Loader(everything, workers=1, multiprocessing_context="spawn"))
    assert "gone.png: expected an image" in items[0]["error"]
    assert np.array_equal(items[1]["image"].permute(1, 2, 0), np.asarray(Image.open(dataset.pairs[0][0])))
    assert list(map(tuple, items[2])) == dataset.positions(3) and items[3] == 5
    assert len(items) == 13 and len({tuple(item["jitter"].tolist()) for item in items[4:]}) == 9
    samplers = (EpochSampler(9, 1, 0, 8), WeightedSampler([4, 5], [1, 2], 1, 0, 8),
                ClassSampler(np.array(dataset.positions(0)), 1, 0, 8))
    for sampler in samplers:
        assert list(pickle.loads(pickle.dumps(sampler))) == list(sampler)


def test_drawing_and_checking_work_with_workers_that_inherit_nothing(tmp_path):
    code = ("import multiprocessing, sys; multiprocessing.set_start_method('spawn', force=True); "
            "from dataset import check, streets; "
            "streets.write_dataset(sys.argv[1], train=1, val=1, size=(32, 64), workers=1); check.main()")
    status, out, error = finish(fork("-c", code, tmp_path / "d", "--output-dir", tmp_path / "r", "--num-workers", "1"))
    assert status == 0 and "0 problems" in out, error


def test_every_epoch_is_another_permutation():
    entries = list(EpochSampler(7, 3, 0, 21))
    assert [entry for _, entry in entries] == list(range(21))
    epochs = [[index for index, _ in entries[k:k + 7]] for k in (0, 7, 14)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def spoil(own, what):
    if what == "no list":
        (own / "list.txt").unlink()
    elif what == "empty list":
        (own / "list.txt").write_text("\n\n")
    elif what == "one word":
        (own / "list.txt").write_text("a.png a_label.png\nb.png\n")
    elif what == "no image":
        (own / "b.png").unlink()
    elif what == "not an image":
        (own / "b.png").write_text("hello")
    elif what == "truncated":
        whole = (own / "b.png").read_bytes()
        (own / "b.png").write_bytes(whole[:len(whole) // 2])
    elif what == "other size":
        Image.fromarray(np.full((6, 7), 2, np.uint8)).save(own / "b_label.png")
    elif what == "unknown id":
        Image.fromarray(np.full((6, 8), 9, np.uint8)).save(own / "b_label.png")
    elif what == "colors":
        Image.fromarray(np.full((6, 8, 3), 2, np.uint8)).save(own / "b_label.png")


@pytest.mark.parametrize("what, message", [
    ("no list", r"list.txt: expected a text file"),
    ("empty list", r"list.txt: expected lines \"image label\", found an empty list"),
    ("one word", r"list.txt, line 2: expected \"image label\" .*, found 'b.png'"),
    ("no image", r"list.txt, line 3: expected the file .*b.png, found no such file"),
    ("not an image", r"list.txt, line 3: .*b.png: expected an image, found a file that is not an image"),
    ("truncated", r"b.png: expected an image, found one that cannot be read"),
    ("other size", r"list.txt, line 3: .*b_label.png: expected the size of .*b.png, 8×6, found 7×6"),
    ("unknown id", r"b_label.png: expected ids that .*classes.csv knows, found 9; add a row"),
    ("colors", r"expected the colors of .*classes.csv, found .2, 2, 2.; red, green and blue are equal, as if ids"),
])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_file_is_one_sentence_also_from_a_worker(own, what, message, workers):
    spoil(own, what)
    with pytest.raises(UserError) as caught:
        list(DataLoader(open_own(own), num_workers=workers))
    assert "\n" not in user_message(caught.value)
    assert re.search(message, user_message(caught.value)), user_message(caught.value)


def test_missing_folders_are_named(tmp_path, streets):
    with pytest.raises(UserError, match="--data-dir .*nowhere: expected a folder, found nothing there"):
        CityscapesDataset(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"leftImg8bit/train: expected <city>/\*_leftImg8bit.png in it, found none"):
        CityscapesDataset(tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(streets, copy)
    next((copy / "gtFine/val").glob("*/*labelIds.png")).unlink()
    with pytest.raises(UserError, match="labelIds.png: expected the label map of"):
        CityscapesDataset(copy, "val")


def test_maps_of_train_ids_are_said(tmp_path, streets):
    dataset = CityscapesDataset(streets, "train")
    train_ids = dataset[0]["label"].numpy().copy()
    image, _ = dataset.pairs[0]
    shutil.copy(image, tmp_path / "a.png")
    train_ids[train_ids == 255] = 0
    for name, expected in (("a_labelTrainIds.png", "found a file of train ids by its name"), ("a_label.png", None)):
        Image.fromarray(train_ids).save(tmp_path / name)
        (tmp_path / "list.txt").write_text(f"a.png {name}\n")
        own = CityscapesDataset(tmp_path, data_list=tmp_path / "list.txt")
        if expected:
            with pytest.raises(UserError, match=expected):
                own[0]
        else:
            with pytest.warns(UserWarning, match="look like train ids"):
                own.check_labels()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset.check_labels()
