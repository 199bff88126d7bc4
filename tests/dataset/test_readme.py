"""dataset/README.md: its commands, on tiny files that lie and are named as it shows."""

import csv
import json
import re
import subprocess
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import evaluate
import train
from dataset import check, folders
from dataset.cityscapes import CityscapesDataset
from dataset.labels import CITYSCAPES, TABLES, ClassTable
from tests.conftest import SMALL
from utils.common.errors import UserError

NUM_CLASSES = {"ade20k": 150, "bdd100k": 19, "camvid": 11, "cityscapes": 19, "gta5": 19, "idd": 26, "kitti": 19,
               "loveda": 7, "mapillary": 65, "voc": 21}
PALETTES, COLORS = ("gta5", "mapillary", "voc"), ("camvid",)     # their label maps have a palette; red, green and blue
LINES = {"voc": "{}\n", "camvid": "/SegNet/CamVid/train/{0}.png /SegNet/CamVid/trainannot/{0}.png\n"}     # of lists
README = Path(folders.__file__).with_name("README.md").read_text()
SECTIONS = {}       # {title: (paths of its files: images, label maps, lists; commands; name of the table)}
for section in README.split("\n## ")[1:]:
    paths, *commands = re.findall(r"(?:^    .*\n)+", section, re.M)
    name = re.search(r"--classes (\w+)|$", "".join(commands))[1] or "cityscapes"
    SECTIONS[section.partition("\n")[0]] = (paths.split(), "".join(commands), name)


def draw(folder, paths, name):
    """Draw images, and label maps with every value of the table, as the data set stores them.

    Returns:
        {path of a label map: its train ids (H, W)}, by a reading of the table that knows only CSV.
    """
    table = TABLES / f"{name}.csv" if name not in ("cityscapes", "kitti") else CITYSCAPES
    lines = [line for line in table.read_text().splitlines() if not line.startswith("#")]
    rows = [row for row in csv.DictReader(lines) if int(row["id"]) >= 0]
    numbers = np.array([[int(row[key]) for key in ("id", "train_id", "red", "green", "blue")] for row in rows])
    pixels = np.random.default_rng(0).permutation(np.resize(np.arange(len(rows)), 320)).reshape(16, 20)
    ids, train_ids, colors = np.split(numbers[pixels].astype(np.uint8), [1, 2], axis=-1)
    label = Image.fromarray(colors if name in COLORS else ids[..., 0])
    if name in PALETTES:
        palette = np.zeros((256, 3), np.uint8)
        palette[numbers[:, 0]] = numbers[:, 2:]
        label.putpalette(palette.tobytes())
    files = [folder / path for path in paths if not path.endswith(".txt")]
    for number, path in enumerate(files):
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(number).integers(0, 256, (16, 20, 3), np.uint8)
        (Image.fromarray(noise) if number < len(files) / 2 else label).save(path)
    for file, text in zip(files, paths[len(files):], strict=False):
        (folder / text).parent.mkdir(parents=True, exist_ok=True)
        (folder / text).write_text(LINES[name].format(file.stem))
    return dict.fromkeys(files[len(files) // 2:], train_ids[..., 0])


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """A folder with the files of all sections, and {path of a label map: train ids}."""
    folder, truth = tmp_path_factory.mktemp("known"), {}
    for paths, _, name in SECTIONS.values():
        if name == "kitti":
            paths = [path.replace("000000", f"{number:06}") for path in paths for number in range(200)]
        truth |= draw(folder, paths, name)
    return folder, truth


def arguments(title, folder):
    """Run the commands of a section by the shell: what it gives to train.py, and to evaluate.py."""
    shell = 'set -eu; python() { printf "%s\\n" "${@:2}" > "$1.words"; }\n' + SECTIONS[title][1]
    subprocess.run(["bash", "-c", shell], cwd=folder, check=True)
    return [(folder / f"{script}.py.words").read_text().splitlines() for script in ("train", "evaluate")]


def test_every_table_has_a_section(tmp_path, monkeypatch):
    with pytest.raises(UserError) as caught:
        ClassTable.read("voc2012")
    names = ", ".join(sorted(NUM_CLASSES))
    assert str(caught.value) == ("--classes voc2012: expected a class table (CSV) or the name of a data set, "
                                 f"{names}, found neither")
    assert sorted(name for *_, name in SECTIONS.values()) == sorted(NUM_CLASSES)
    assert set(re.findall(r"`(\w+)`", README.partition("A file of that name")[0])) == set(NUM_CLASSES)
    monkeypatch.chdir(tmp_path)
    Path("voc").mkdir()                 # the data set itself, perhaps
    assert ClassTable.read("voc").num_classes == 21
    Path("idd").write_text((TABLES / "voc.csv").read_text())
    assert ClassTable.read("idd").num_classes == 21
    with pytest.raises(UserError, match="./voc: expected a class table"):
        ClassTable.read("./voc")


@pytest.mark.parametrize("title", SECTIONS)
def test_the_commands_read_the_files_that_are_shown(known, title, monkeypatch):
    (folder, truth), name = known, SECTIONS[title][2]
    monkeypatch.chdir(folder)
    training, evaluation = arguments(title, folder)
    args, root, _, classes, _ = train.parse_and_check([*training, "--gpu", "cpu"])
    assert classes.num_classes == NUM_CLASSES[name] and bool(classes.remarks) == (name == "ade20k")
    scored = evaluate.get_parser().parse_args(evaluation)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sets = [CityscapesDataset(root, args.split, args.data_list, classes),
                CityscapesDataset(folders.data_root(scored.data_dir, scored.images_dir, scored.labels_dir),
                                  scored.split, scored.data_list, classes)]
        if args.val_every:
            sets.append(CityscapesDataset(root, args.val_split, args.val_list, classes))
        for dataset in sets:
            dataset.check_labels(2)
            for index, (_, label) in enumerate(dataset.pairs[:4]):
                assert np.array_equal(dataset[index]["label"].numpy(), truth[folder / label])
    assert {str(warning.message).partition(";")[0] for warning in caught} == ({
        "images and label maps are matched by their stems without _L in --labels-dir CamVid/LabeledApproved_full"}
        if name == "camvid" else set())


def test_a_check_and_a_training(known, tmp_path, monkeypatch, capsys):
    """Of PASCAL VOC: whole, with one step."""
    folder, _ = known
    monkeypatch.chdir(folder)
    training, evaluation = arguments("PASCAL VOC 2012", folder)
    monkeypatch.setattr("sys.argv", ["check", *training[:training.index("--val-list")], "--num-workers", "0",
                                     "--output-dir", str(tmp_path / "c")])
    check.main()
    assert "0 problems" in capsys.readouterr().out
    (report,) = json.loads((tmp_path / "c/check.json").read_text())["splits"].values()
    ids = np.bincount(np.asarray(Image.open("VOC2012/SegmentationClass/2007_000032.png")).ravel(), minlength=256)
    assert [*report["pixels"].values(), report["ignored_pixels"]] == [*ids[:21], ids[255]] and ids[255] > 0
    train.main([*training, *SMALL, "--batch-size", "1", "--num-steps", "1", "--snapshot-dir", str(tmp_path / "s")])
    evaluate.main([*evaluation[:-1], str(tmp_path / "s/CS_scenes_1.pth"), "--gpu", "cpu", "--num-workers", "0", "--amp",
                   "off", "--scales", "1", "--no-flip", "--save", "none"])
    result = json.loads((tmp_path / "s/CS_scenes_1_val/result.json").read_text())
    assert result["num_images"] == 1 and list(result["single_scale"]["class_iou"]) == list(report["pixels"])
