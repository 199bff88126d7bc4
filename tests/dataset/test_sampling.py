"""Which sample comes when, what is in it, and the cache it may come from."""

import os
import shutil
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import train
from dataset.cityscapes import CityscapesDataset, parse_split
from dataset.reading import DecodedCache
from dataset.sampling import ClassSampler, EpochSampler, WeightedSampler, class_index, class_positions, make_sampler
from dataset.transforms import train_transform
from tests.utils.imaging.test_decode import OTHER, other_content
from utils.common import files
from utils.common.errors import UserError
from utils.imaging import decode
from utils.imaging.decode import read_ids, read_image

pytestmark = pytest.mark.usefixtures("short_networks")


def index_of(dataset):
    return np.array([row for number in range(len(dataset)) for row in dataset.positions(number)])


def test_positions_are_pixels_of_their_class(streets):
    dataset = CityscapesDataset(streets, "train")
    index = index_of(dataset)
    for image, kind, row, column in index.tolist():
        assert dataset[image]["label"][row, column] == kind
    for image in range(len(dataset)):
        present = set(np.unique(dataset[image]["label"])) - {255}
        assert set(index[index[:, 0] == image, 1].tolist()) == present
    flat = np.zeros((30, 40), np.uint8)
    flat[:, 20:] = 3
    actual = np.array(class_positions(flat, 0))
    assert Counter(actual[:, 0].tolist()) == {0: 16, 3: 16} and (actual[actual[:, 0] == 3, 2] >= 20).all()


@pytest.mark.parametrize("scale_range", [None, (0.5, 2.0)])
def test_class_uniform_crops_show_every_class_as_often_as_expected(streets, scale_range):
    """Each class is drawn with probability 1 / N, and the crop holds the drawn pixel."""
    dataset = CityscapesDataset(streets, "train", transform=train_transform((65, 65), scale_range))
    index = index_of(dataset)
    kind_of = {(image, row, column): kind for image, kind, row, column in index.tolist()}
    kinds = sorted(set(kind_of.values()))
    drawn, seen = Counter(), Counter()
    for image, entry, (row, column) in ClassSampler(index, 3, 0, 1200):
        kind = kind_of[image, row, column]
        drawn[kind] += 1
        if entry < 200:
            seen[kind] += bool((dataset[image, entry, (row, column)]["label"] == kind).any())
    expected = 1200 / len(kinds)
    # A binomial count strays from its mean by more than four standard deviations once in 16,000 times.
    assert all(abs(drawn[kind] - expected) < 4 * (expected * (1 - 1 / len(kinds))) ** 0.5 for kind in kinds)
    # Nearest resampling at half the size may step over a drawn pixel of a thing one pixel wide.
    assert sum(seen.values()) >= (200 if scale_range is None else 190)


def test_a_class_sample_is_a_function_of_seed_and_entry(streets):
    index = index_of(CityscapesDataset(streets, "train"))
    whole = list(ClassSampler(index, 3, 0, 24, 6))
    assert list(ClassSampler(index, 3, 12, 24, 6)) == whole[12:]
    parts = [list(ClassSampler(index, 3, 0, 24, 6, rank, 2)) for rank in range(2)]
    assert [p for t in range(4) for part in parts for p in part[3 * t:3 * t + 3]] == whole
    assert list(ClassSampler(index, 4, 0, 24, 6)) != whole


def by_dicts(index, seed, entry):
    """The sample of an entry by plain dicts: {class: {image: [(row, column)]}} in the order of the index."""
    pixels = {}
    for image, kind, row, column in index.tolist():
        pixels.setdefault(kind, {}).setdefault(image, []).append((row, column))
    rng = np.random.default_rng((seed, entry, 2))
    images = pixels[sorted(pixels)[rng.integers(len(pixels))]]
    image = list(images)[rng.integers(len(images))]
    return image, entry, images[image][rng.integers(len(images[image]))]


@pytest.mark.parametrize("shuffled", [False, True])
def test_class_samples_are_those_of_plain_dicts(shuffled):
    """Also for classes that are missing, for one image alone, and for rows in any order."""
    rng = np.random.default_rng(1)
    rows = [(image, kind, *rng.integers(0, 70_000, 2)) for image in range(40) for kind in (0, 3, 4, 18)
            if rng.uniform() < 0.3 for _ in range(rng.integers(1, 17))] + [(7, 11, 5, 6)]
    index = np.array(rows, np.int64)
    index = rng.permutation(index) if shuffled else index
    actual = list(ClassSampler(index, 5, 0, 300))
    assert actual == [by_dicts(index, 5, entry) for entry in range(300)]
    assert {type(value) for image, entry, pixel in actual for value in (image, entry, *pixel)} == {int}


def test_a_class_sampler_takes_little_memory():
    """8 bytes per row and 12 per image and class, however many images there are; dicts of tuples took 138."""
    index = np.stack(np.meshgrid(np.arange(200), np.arange(19), np.arange(16), indexing="ij"), -1).reshape(-1, 3)
    index = np.concatenate([index, index[:, 2:]], axis=1)
    sampler = ClassSampler(index, 0, 0, 1)
    arrays = [value for value in vars(sampler).values() if isinstance(value, np.ndarray)]
    assert sum(array.nbytes for array in arrays) == 8 * len(index) + 12 * 200 * 19 + 8
    assert all(array.base is None or array.base.nbytes == array.nbytes for array in arrays)


def test_weights_of_splits_are_shares_of_samples():
    counts = Counter(image >= 5 for image, _ in WeightedSampler([5, 50], [3, 1], 0, 0, 4000))
    assert abs(counts[False] - 3000) < 4 * (4000 * 0.75 * 0.25) ** 0.5
    images = {image for image, _ in WeightedSampler([5, 50], [3, 1], 0, 0, 4000)}
    assert images == set(range(55))


@pytest.mark.parametrize("kind, weights, expected", [
    ("uniform", None, lambda index, *entries: EpochSampler(9, *entries)),
    ("uniform", [3.0, 1.0], lambda index, *entries: WeightedSampler([4, 5], [3.0, 1.0], *entries)),
    ("class", None, lambda index, *entries: ClassSampler(index, *entries)),
])
def test_a_sampler_is_made_for_the_data_set_and_the_kind(streets, kind, weights, expected):
    dataset = CityscapesDataset(streets, "train")
    dataset.counts, dataset.weights = [4, 5], weights
    index = index_of(dataset) if kind == "class" else None
    made = make_sampler(dataset, kind=kind, seed=3, start=6, stop=24, batch_size=6, rank=1, world=2, index=index)
    same = expected(index, 3, 6, 24, 6, 1, 2)
    assert type(made) is type(same) and list(made) == list(same)
    assert [entry for _, entry, *_ in made] == [9, 10, 11, 15, 16, 17, 21, 22, 23]      # second half of every batch
    alone = make_sampler(dataset, kind=kind, seed=3, start=6, stop=24, batch_size=6, index=index)
    assert list(alone) == list(expected(index, 3, 6, 24, 6, 0, 1))


@pytest.mark.parametrize("kind, weights, message", [
    ("class", None, "found no index"), ("class", [1.0], "found weights"), ("Class", None, "found Class")])
def test_a_sampler_is_never_another_than_asked_for(streets, kind, weights, message):
    dataset = CityscapesDataset(streets, "train")
    dataset.weights = weights
    with pytest.raises(ValueError, match=message):
        make_sampler(dataset, kind=kind, seed=3, start=0, stop=6, batch_size=6,
                     index=np.zeros((1, 4), np.int64) if weights else None)


@pytest.mark.parametrize("text, expected", [("train", (["train"], None)), ("train+val", (["train", "val"], None)),
                                            ("train:2+train_extra:0.5", (["train", "train_extra"], [2.0, 0.5]))])
def test_splits_are_parsed(text, expected):
    assert parse_split(text) == expected


@pytest.mark.parametrize("text", ["", "train+", "train:x", "train:0", "train:-1", "train:2+val", "train:inf"])
def test_splits_that_make_no_sense(text):
    with pytest.raises(UserError, match="--split"):
        parse_split(text)


def test_several_splits_and_coarse_labels(streets, tmp_path, capsys):
    shutil.copytree(streets, tmp_path / "d")
    for kind, suffix in (("leftImg8bit", "leftImg8bit"), ("gtFine", "gtFine_labelIds")):
        target = tmp_path / "d" / kind.replace("gtFine", "gtCoarse") / "train_extra/drawn"
        target.mkdir(parents=True)
        for path in sorted((tmp_path / "d" / kind / "val/drawn").glob(f"*{suffix}.png"))[:2]:
            shutil.copy(path, target / path.name.replace("gtFine", "gtCoarse"))
    dataset = CityscapesDataset(tmp_path / "d", "train+train_extra")
    assert len(dataset) == 11 and "gtCoarse" in str(dataset.pairs[-1][1]) and dataset[10]["label"].shape == (128, 256)
    train.main(["--data-dir", str(tmp_path / "d"), "--split", "train:1+train_extra:2", "--snapshot-dir",
                str(tmp_path / "s"), "--gpu", "cpu", "--backbone", "resnet18", "--model", "acfnet_resnet",
                "--input-size", "33,33", "--batch-size", "2", "--num-workers", "0", "--num-steps", "2",
                "--jitter", "0.4,0.4,0.4,0.05", "--random-scale", "0.7,1.5"])
    shown = capsys.readouterr().out
    assert "train:1+train_extra:2: 11 images" in shown and "official Cityscapes train_extra split has 19998" in shown


def test_class_sampling_trains_and_keeps_its_index(streets, tmp_path, capsys):
    words = ["--data-dir", str(streets), "--snapshot-dir", str(tmp_path / "s"), "--gpu", "cpu", "--backbone",
             "resnet18", "--model", "acfnet_resnet", "--input-size", "33,33", "--batch-size", "2", "--num-workers", "0",
             "--sampling", "class", "--cache", str(tmp_path / "c")]
    train.main([*words, "--num-steps", "1"])
    shown = capsys.readouterr().out
    assert "finding classes: 9/9" in shown and "18 files to decode, 0.00 GB" in shown
    train.main([*words, "--num-steps", "2", "--resume"])
    shown = capsys.readouterr().out
    assert "finding classes" not in shown and "to decode" not in shown


def test_the_cache_gives_the_same_samples_and_decodes_once(streets, tmp_path, monkeypatch):
    transform = train_transform((65, 65))
    plain = CityscapesDataset(streets, "train", transform=transform)
    cached = CityscapesDataset(streets, "train", transform=transform, cache=tmp_path / "c")
    for _ in range(2):
        for index in range(len(plain)):
            a, b = plain[index, index], cached[index, index]
            assert torch.equal(a["image"], b["image"]) and torch.equal(a["label"], b["label"])
        monkeypatch.setattr(decode, "open_image", lambda *file: pytest.fail("decoded again"))
        plain = cached
    assert len(list((tmp_path / "c").iterdir())) == 18


def test_a_changed_file_is_decoded_again_and_a_half_written_array_is_not_used(tmp_path):
    path, cache = tmp_path / "a.png", DecodedCache(tmp_path / "c")
    Image.fromarray(np.full((4, 5, 3), 7, np.uint8)).save(path)
    assert (cache.read(path, read_image) == 7).all() and cache.missing([(path, read_image)]) == ([], 0)
    Image.fromarray(np.full((4, 5, 3), 9, np.uint8)).save(path)
    os.utime(path, ns=(1, 1))
    missing, needed = cache.missing([(path, read_image)])
    assert missing == [(path, read_image)] and needed == 4 * 5 * 3 + 128
    (tmp_path / "c" / f".{cache.array_path(path, read_image).name}.123.tmp").write_bytes(b"half")
    assert (cache.read(path, read_image) == 9).all()
    assert len(list((tmp_path / "c").glob("*.npy"))) == 1


@pytest.mark.parametrize("what", [*OTHER, "spoilt"])
def test_what_is_no_class_index_is_said_and_made_again(streets, tmp_path, what, monkeypatch):
    dataset = CityscapesDataset(streets, "val")
    first = class_index(dataset, tmp_path, 0)
    [place] = tmp_path.iterdir()
    if what == "spoilt":
        whole = bytearray(place.read_bytes())
        whole[len(whole) // 2] ^= 0x01
        place.write_bytes(whole)
    else:
        other_content(place, what)
    with pytest.warns(UserWarning, match="is not a class index and is created again"):
        assert np.array_equal(class_index(dataset, tmp_path, 0), first)
    monkeypatch.setattr(CityscapesDataset, "positions", lambda *index: pytest.fail("made again"))
    assert np.array_equal(class_index(dataset, tmp_path, 0), first)


def test_too_little_room_for_the_cache_is_said_first(streets, tmp_path, monkeypatch):
    dataset = CityscapesDataset(streets, "train", cache=tmp_path / "c")
    monkeypatch.setattr(files.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"--cache .*: expected \d+ MB free for the decoded images, found 0 MB"):
        dataset.fill_cache(0)
    assert not list((tmp_path / "c").iterdir())


def test_labels_of_all_kinds(tmp_path):
    """16 bits, ids above 255, palettes, two values, colors through the table: the same map of classes."""
    table = tmp_path / "classes.csv"
    table.write_text("name,id,train_id,red,green,blue\nroad,7,0,128,64,128\ncar,300,1,0,0,142\nvoid,0,255,0,0,0\n")
    ids = np.array([[7, 300, 0], [300, 300, 7]])
    colors = {7: (128, 64, 128), 300: (0, 0, 142), 0: (0, 0, 0)}
    image = Image.fromarray(np.zeros((2, 3, 3), np.uint8))
    image.save(tmp_path / "i.png")
    expected = [[0, 1, 255], [1, 1, 0]]
    rgb = np.array([[colors[i] for i in row] for row in ids.tolist()], np.uint8)
    Image.fromarray(ids.astype(np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray(ids.astype(np.int32)).save(tmp_path / "int.tif")
    Image.fromarray(rgb).save(tmp_path / "color.png")
    Image.fromarray(np.dstack([rgb, np.full((2, 3, 1), 255, np.uint8)])).save(tmp_path / "rgba.png")
    Image.fromarray(rgb).save(tmp_path / "lossless.webp", lossless=True)
    for name in ("deep.png", "int.tif", "color.png", "rgba.png", "lossless.webp"):
        (tmp_path / "l.txt").write_text(f"# a comment\ni.png {name}\n")
        dataset = CityscapesDataset(tmp_path, data_list=tmp_path / "l.txt", classes=table)
        assert dataset[0]["label"].tolist() == expected, name
    small = np.array([[1, 0, 2], [0, 0, 1]], np.uint8)
    palette = Image.fromarray(small).convert("P")
    palette.putdata(small.ravel().tolist())
    palette.save(tmp_path / "palette.png")
    assert read_ids(tmp_path / "palette.png").tolist() == small.tolist()
    Image.fromarray(small % 2 == 1).save(tmp_path / "bits.png")
    assert read_ids(tmp_path / "bits.png").tolist() == (small % 2).tolist()


def test_lists_may_be_several_and_relative_to_themselves(tmp_path):
    (tmp_path / "inner").mkdir()
    for name in ("a", "b"):
        Image.fromarray(np.zeros((2, 3, 3), np.uint8)).save(tmp_path / "inner" / f"{name}.png")
    Image.fromarray(np.full((2, 3), 7, np.uint8)).save(tmp_path / "inner/l.png")
    (tmp_path / "inner/one.lst").write_text("a.png l.png\r\n\r\n# b.png l.png\r\n")
    (tmp_path / "two.lst").write_text("inner/b.png inner/l.png\n")
    dataset = CityscapesDataset(tmp_path, data_list=[tmp_path / "inner/one.lst", tmp_path / "two.lst"])
    assert dataset.names == ["a", "b"] and dataset.counts == [1, 1] and (dataset[1]["label"] == 0).all()
