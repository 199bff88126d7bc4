"""Data sets of two folders, and the class table inferred for them."""

import json
import os
import re
import unicodedata
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import evaluate
import train
from dataset import check
from dataset.cityscapes import CityscapesDataset
from dataset.folders import check_validation, data_root
from dataset.infer import infer_classes
from dataset.labels import ClassTable
from tests.conftest import SMALL
from utils.common import files
from utils.common.errors import UserError

pytestmark = pytest.mark.usefixtures("short_networks")
BINARY = "name,id,train_id,red,green,blue\nbackground,0,0,0,0,0\nforeground,255,1,255,255,255\n"


def make(root, *stems, values=(0, 255), suffixes=(".png", ".jpg", ".TIF"), size=(40, 48)):
    """Two folders with a pair for each stem, such as train/a; the label maps hold these values."""
    rng = np.random.default_rng(1)
    for number, stem in enumerate(stems):
        image, label = (root / kind / stem for kind in ("images", "labels"))
        for path in (image, label):
            path.parent.mkdir(parents=True, exist_ok=True)
        ids = rng.permutation(np.resize(np.array(values, np.uint8), size[0] * size[1])).reshape(size)
        Image.fromarray(ids).save(f"{label}.png")
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(f"{image}{suffixes[number % len(suffixes)]}")
    return str(root / "images"), str(root / "labels")


def words(folders, *more):
    return ["--images-dir", folders[0], "--labels-dir", folders[1], *map(str, more)]


def refusal(call, *args, **options):
    with pytest.raises(UserError) as caught:
        call(*args, **options)
    return str(caught.value)


def infer_table(folders, *names):
    """The class table of these label maps."""
    paths = [os.path.join(folders[1], name) for name in names]
    return infer_classes({"train": paths}, folders, "--labels-dir", 0, "c.csv")


def stems_of(dataset):
    assert all(image.stem == label.stem for image, label in dataset.pairs)
    return [image.stem for image, _ in dataset.pairs]


def test_pairs_are_the_files_of_one_stem(tmp_path):
    folders = make(tmp_path, "a", "b.2", "c")
    (tmp_path / "images/notes.txt").touch()
    (tmp_path / "labels/.hidden.png").touch()
    dataset = CityscapesDataset(folders, classes=ClassTable.read())
    assert stems_of(dataset) == dataset.names == ["a", "b.2", "c"]
    assert [image.suffix for image, _ in dataset.pairs] == [".png", ".jpg", ".TIF"]
    assert dataset.describe().startswith("both folders: 3 images")


def test_splits_are_folders_in_both(tmp_path):
    folders = make(tmp_path, "train/a", "train/b", "val/a", "extra/c")
    assert stems_of(CityscapesDataset(folders, "val")) == ["a"]
    both = CityscapesDataset(folders, "train:2+extra:1")
    assert stems_of(both) == ["a", "b", "c"] and both.counts == [2, 1] and both.weights == [2, 1]
    assert both.describe().startswith("train:2+extra:1: 3 images")
    assert "expected a folder, found nothing there" in refusal(CityscapesDataset, folders, "train+gone")
    assert "--split gone: expected folders of these names" in refusal(CityscapesDataset, folders, "gone")


def test_a_list_holds_a_stem_a_line(tmp_path):
    folders = make(tmp_path, "a", "b.2", "c d", "alone")
    os.remove(tmp_path / "labels/alone.png")
    (tmp_path / "some.txt").write_text("# validation\n\nc d\nb.2\n")
    (tmp_path / "more.txt").write_text("a\n")
    dataset = CityscapesDataset(folders, data_list=[tmp_path / "some.txt", tmp_path / "more.txt"])
    assert stems_of(dataset) == ["c d", "b.2", "a"] and dataset.counts == [2, 1]
    assert dataset.source == "some.txt+more.txt"
    assert dataset.lines[1] == f"{tmp_path / 'some.txt'}, line 4"


def test_a_run_is_known_again_when_the_folders_are_moved(tmp_path):
    before = CityscapesDataset(make(tmp_path / "here", "train/a", "train/b")).fingerprint()
    (tmp_path / "here").rename(tmp_path / "there")
    assert CityscapesDataset((tmp_path / "there/images", tmp_path / "there/labels")).fingerprint() == before
    assert CityscapesDataset(make(tmp_path / "other", "train/a", "train/c")).fingerprint() != before


@pytest.mark.parametrize("spoil, message", [
    (lambda root: (root / "labels/b.png").unlink(),
     "labels: expected a partner of each of the 5 files in {images}, found none with the stem of b.jpg; use "
     "--data-list"),
    (lambda root: [(root / f"labels/{stem}.png").unlink() for stem in "abcd"], "a.png, b.jpg, c.TIF and 1 more"),
    (lambda root: (root / "images/b.jpg").unlink(), "images: expected a partner of each of the 5 files in {labels}"),
    (lambda root: (root / "images/a.jpeg").touch(), "images: expected every stem once, found a.jpeg and a.png"),
    (lambda root: (root / "labels/a.tif").touch(), "labels: expected every stem once, found a.png and a.tif"),
    (lambda root: (root / "images").rename(root / "moved"), "images: expected a folder, found nothing there"),
    (lambda root: [path.unlink() for path in (root / "labels").iterdir()],
     "labels: expected images (.avif, .bmp, .dib, .gif, .j2k, .jfif, .jp2, .jpe, .jpeg, .jpg, .pbm, .pgm, .png, .pnm, "
     ".ppm, .tga, .tif, .tiff, .webp) in it, found none"),
    (lambda root: [path.unlink() for path in (root / "images").iterdir()] + [(root / "images/sets").mkdir()],
     "found none, but folders: sets"),
])
def test_what_is_no_pair_is_a_sentence(tmp_path, spoil, message):
    folders = make(tmp_path, *"abcde")
    spoil(tmp_path)
    output = refusal(CityscapesDataset, folders)
    assert message.format(images=folders[0], labels=folders[1]) in output and output.startswith("--"), output


@pytest.mark.parametrize("text, message", [
    ("a\na.png\n", "line 2: expected the stem of a file in {images}, such as a, found 'a.png'"),
    ("a\n\na\n", "line 3: expected every stem once, found 'a' again"), ("# none\n", "found an empty list"),
    ("b\n", "line 1: expected the stem of a file in {labels}, such as a, found 'b'"), ("../images/a", "line 1: ")])
def test_what_is_no_list_of_stems_is_a_sentence(tmp_path, text, message):
    folders = make(tmp_path, "a", "b")
    (tmp_path / "labels/b.png").unlink()
    (tmp_path / "list.txt").write_text(text)
    assert message.format(images=folders[0], labels=folders[1]) in refusal(
        CityscapesDataset, folders, data_list=tmp_path / "list.txt")


@pytest.mark.parametrize("given, message", [
    ((None, None, None), "--data-dir: expected .* or --images-dir and --labels-dir, found none"),
    ((None, "A", None), "found --images-dir A$"), ((None, None, "B"), "found --labels-dir B$"),
    (("C", "A", "B"), "found --images-dir A and --labels-dir B and --data-dir C$")])
def test_one_kind_of_folder_is_named(given, message):
    with pytest.raises(UserError, match=message):
        data_root(*given)


@pytest.mark.parametrize("image, label", [
    ("{}", "{}_mask"), ("{}_sat", "{}_mask"), ("img_{}_jpg.rf.0a1b", "img_{}_jpg.rf.0a1b_mask"), ("{}", "{}.label"),
    ("{}_leftImg8bit", "{}_gtFine_labelTrainIds"), ("{}", "{}_train_id"), ("{}_image", "{}_lab"), ("{}_rgb", "{}_seg"),
    ("{}", "{}_L")])
@pytest.mark.parametrize("stems", [("7", "10", "20"), ("a_1", "b_1"), ("one_a",)])
def test_a_common_ending_is_left_out_of_stems_and_said(tmp_path, image, label, stems):
    folders = make(tmp_path, *(f"train/{stem}" for stem in stems))
    for kind, pattern in (("images", image), ("labels", label)):
        for path in (tmp_path / kind / "train").iterdir():
            path.rename(path.with_name(pattern.format(path.stem) + path.suffix))
    with pytest.warns(UserWarning, match=f"stems without .*{label[2:][-5:]} in --labels-dir .*labels/train"):
        dataset = CityscapesDataset(folders)
    assert {path.stem: other.stem for path, other in dataset.pairs} == {
        image.format(stem): label.format(stem) for stem in stems}
    shared = re.sub("_(sat|leftImg8bit|image|rgb)$", "", image)
    (tmp_path / "some.txt").write_text(shared.format(stems[0]))
    with pytest.warns(UserWarning, match="stems without"):
        some = CityscapesDataset(tuple(f"{one}/train" for one in folders), data_list=tmp_path / "some.txt")
    assert [path.stem for path, _ in some.pairs] == [image.format(stems[0])]


def test_an_ending_is_no_number(tmp_path):
    """Frames 1 of two videos are not the label maps of frames 2."""
    folders = make(tmp_path, "a_1", "b_1")
    for name in "ab":
        (tmp_path / f"labels/{name}_1.png").rename(tmp_path / f"labels/{name}_2.png")
    assert "found none with the stem of a_1.png, b_1.jpg; --data-dir" in refusal(CityscapesDataset, folders)


def test_endings_that_only_a_part_of_the_files_have_are_one_sentence(tmp_path):
    """Label maps of two kinds, or half of them with an ending: no pairs are guessed, and none are left out."""
    folders = make(tmp_path, "a", "b", "c")
    (tmp_path / "labels/a.png").rename(tmp_path / "labels/a_mask.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "each of the 3 files in" in (message := refusal(CityscapesDataset, folders))
        assert "found none with the stem of a.png; use --data-list to select" in message
        for stem in "abc":
            label = tmp_path / f"labels/{stem}{'_mask' * (stem == 'a')}.png"
            label.with_name(f"{stem}_color.png").write_bytes(label.read_bytes())
            label.rename(label.with_name(f"{stem}_mask.png"))
        message = refusal(CityscapesDataset, folders)
    assert "found none with the stem of a.png, b.jpg, c.TIF; --data-dir" in message
    assert listed(message, tmp_path).pairs[0][1].name == "a_color.png"


def listed(message, root):
    """The data set of the flags and the line that a message advises."""
    data_dir, line = re.search(r'--data-dir (\S+) --data-list FILE takes .* such as "(.*?)"', message).groups()
    (root / "advised.txt").write_text(line + "\n")
    return CityscapesDataset(data_dir, data_list=root / "advised.txt")


def test_a_list_of_pairs_helps_where_names_differ(tmp_path):
    folders = make(tmp_path, "x/img 1", "x/img 2")
    for number in (1, 2):
        (tmp_path / f"labels/x/img {number}.png").rename(tmp_path / f"labels/x/truth {number}.png")
    data = listed(refusal(CityscapesDataset, tuple(f"{one}/x" for one in folders)), tmp_path)
    assert [(image.name, label.name) for image, label in data.pairs] == [("img 1.png", "truth 1.png")]


def test_what_helps_for_other_folders_is_named(tmp_path):
    """Sub-folders that are no splits, as ACDC has them; splits of other names; both in one folder, as Roboflow's."""
    nested = make(tmp_path / "nested", "fog/a", "night/b")
    message = refusal(CityscapesDataset, nested, "fog+day")
    assert "expected a folder, found nothing there" in message
    (tmp_path / "nested/labels/fog").rename(tmp_path / "nested/labels/fog_gt")
    (tmp_path / "nested/labels/night").rename(tmp_path / "nested/labels/night_gt")
    message = refusal(CityscapesDataset, nested).replace("images/...", "images/fog").replace("NAME", "a")
    assert listed(message.replace("labels/...", "labels/fog_gt"), tmp_path).names == ["a"]
    named = make(tmp_path / "named", "training/a", "validation/b")
    message = refusal(CityscapesDataset, named)
    assert "found folders: training, validation" in message
    assert CityscapesDataset(named, re.search(r"--split (\S+) takes one of them", message)[1]).names == ["a"]
    assert listed(message.replace("NAME", "a"), tmp_path).names == ["a"]
    Image.new("L", (4, 3)).save(tmp_path / "named/images/a_seg.png")
    Image.new("RGB", (4, 3)).save(tmp_path / "named/images/a.jpg")
    assert listed(refusal(CityscapesDataset, (named[0], named[0])), tmp_path).names == ["a"]


@pytest.mark.parametrize("text, encoding", [("images\\a.png labels\\a.png\r\n", "utf-8"),
                                            ("images\\a.png;labels\\a.png\r\n", "utf-16")])
def test_lists_of_windows_are_read(tmp_path, text, encoding):
    make(tmp_path, "a")
    (tmp_path / "list.txt").write_bytes(text.encode(encoding))
    with pytest.warns(UserWarning, match="list.txt: backslashes in its paths are read as slashes"):
        assert CityscapesDataset(tmp_path, data_list=tmp_path / "list.txt").names == ["a"]


def test_validation_has_images_of_its_own(tmp_path):
    plain, divided = make(tmp_path / "plain", "a"), make(tmp_path / "divided", "train/a", "val/b")
    for root, data_list, val_list in ((divided, None, None), (plain, "l", "v"), ("city", None, None),
                                      ("city", "l", "v"), ("city", None, "v")):
        check_validation(root, data_list, val_list, "val")
    assert "--val-list with --images-dir, found none" in refusal(check_validation, plain, None, None, "val")
    assert "--val-list with --data-list, found none" in refusal(check_validation, "city", "l", None, "val")
    assert "--val-list: expected --data-list with it" in refusal(check_validation, plain, None, "v", "val")
    check_validation(divided, None, None, "val:2+train:1")
    for typo in ("vall", "val+tset"):
        output = f"--val-split {typo}: expected names of folders in {divided[0]} and {divided[1]}, found train, val"
        assert refusal(check_validation, divided, None, None, typo) == output


def test_training_and_evaluation(tmp_path, capsys):
    folders = make(tmp_path / "data", "train/a", "train/b", "val/a", "val/c")
    out = tmp_path / "s"
    train.main([*SMALL, *words(folders, "--snapshot-dir", out, "--batch-size", 2, "--num-steps", 1, "--val-every", 1)])
    output = capsys.readouterr().out
    for line in ("reading ids: 4/4", "train: 2 images, 2 classes\n", "val: 2 images, 2 classes"):
        assert line in output
    assert (out / "classes.csv").read_text() == BINARY
    resume = [*SMALL, *words(folders, "--snapshot-dir", out, "--batch-size", 2, "--num-steps", 2, "--resume")]
    (tmp_path / "ships.csv").write_text(BINARY.replace("foreground", "ship"))
    assert ("found another table (background, foreground); use --classes with that table to continue that run"
            in refusal(train.main, [*resume, "--classes", str(tmp_path / "ships.csv")]))
    train.main([*resume, "--classes", str(out / "classes.csv")])
    path = out / "CS_scenes_2.pth"
    assert ClassTable(files.load(path)["config"]["classes"]).as_csv() == BINARY
    evaluate.main(words(folders, "--restore-from", path, "--gpu", "cpu", "--num-workers", 0, "--amp", "off", "--scales",
                        1, "--no-flip", "--save", "labels"))
    result = json.loads((out / "CS_scenes_2_val/result.json").read_text())
    assert result["num_images"] == 2 and list(result["single_scale"]["class_iou"]) == ["background", "foreground"]
    label = np.asarray(Image.open(out / "CS_scenes_2_val/labelIds/a.png"))
    assert set(np.unique(label)) <= {0, 255} and label.shape == (40, 48)


def test_validation_ids_count_for_the_table(tmp_path):
    folders = make(tmp_path, "a", "b", values=(0, 1))
    Image.fromarray(np.full((40, 48), 2, np.uint8)).save(tmp_path / "labels/b.png")
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name)
    train.main([*SMALL, *words(folders, "--data-list", tmp_path / "a.txt", "--val-list", tmp_path / "b.txt",
                               "--val-every", 1, "--snapshot-dir", tmp_path / "s", "--batch-size", 1, "--accumulate", 1,
                               "--num-steps", 1)])
    assert "class 2,2,2" in (tmp_path / "s/classes.csv").read_text()


@pytest.mark.parametrize("more, spoil, message", [
    ([], lambda root: Image.new("L", (48, 40), 3).save(f"{root}/labels/b.png"), "found 0, 3, 255 (3 in "),
    (["--num-classes", "3"], None, "--num-classes 3: expected the 2 classes of the assumed class table"),
    ([], lambda root: Path(root, "s").mkdir() or Path(root, "s/classes.csv").write_text("mine"),
     "s/classes.csv: expected the class table inferred from the label maps, or no file, found another one"),
    (["--val-every", "1"], None, "--val-every: expected --val-list with --images-dir, found none"),
    (["--val-every", "1", "--data-list", "{root}/one.txt", "--val-list", "{root}/gone.txt", "--classes",
      "{root}/classes.csv"], None, "gone.txt: expected a text file, found no such file"),
    (["--data-dir", "."], None, "--images-dir, --labels-dir: expected both and no --data-dir")])
def test_what_training_refuses(tmp_path, more, spoil, message):
    folders = make(tmp_path, "a", "b")
    (tmp_path / "one.txt").write_text("a")
    (tmp_path / "classes.csv").write_text(BINARY)
    more = [word.format(root=tmp_path) for word in more]
    if spoil:
        spoil(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert message in refusal(train.main, [*SMALL, *words(folders, "--snapshot-dir", tmp_path / "s", "--batch-size", 2,
                                                          *more)])
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("stems, splits", [("ab", ["images"]), (("train/a", "train/b", "val/c"), ["train", "val"])])
def test_the_check(tmp_path, monkeypatch, capsys, stems, splits):
    folders = make(tmp_path / "data", *stems)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["check", *words(folders, "--num-workers", "1")])
    check.main()
    actual = json.loads((tmp_path / "runs/check_data/check.json").read_text())["splits"]
    assert [Path(name).name for name in actual] == splits and not any(one["official"] for one in actual.values())
    assert (tmp_path / "runs/check_data/classes.csv").read_text() == BINARY and "0 problems" in capsys.readouterr().out
    (tmp_path / "some.txt").write_text("a\n")
    if splits == ["images"]:
        monkeypatch.setattr("sys.argv", ["check", *words(folders, "--data-list", "some.txt", "--num-workers", "1")])
        check.main()
        assert "some.txt: 1 pair;" in capsys.readouterr().out


def test_the_check_names_all_that_have_no_partner(tmp_path, monkeypatch, capsys):
    folders = make(tmp_path / "data", *"abcdef")
    for name in ("labels/b.png", "labels/d.png", "images/f.TIF"):
        (tmp_path / "data" / name).unlink()
    (tmp_path / "some.txt").write_text("a\nb\nc\nzz\na\n")
    monkeypatch.chdir(tmp_path)

    def checked(*more):
        monkeypatch.setattr("sys.argv", ["check", *words(folders, "--num-workers", "1", *more)])
        with pytest.raises(SystemExit, match="1"):
            check.main()
        out, (actual,) = capsys.readouterr().out, json.loads(Path("runs/check_data/check.json").read_text())[
            "splits"].values()
        assert f"{len(actual['problems'])} problems" in out
        return actual["pairs"], [(one["kind"], one["text"].partition(":")[0]) for one in actual["problems"]]

    assert checked() == (3, [("label map missing", f"{folders[0]}/b.jpg"), ("label map missing", f"{folders[0]}/d.png"),
                             ("image missing", f"{folders[1]}/f.png")])
    assert checked("--data-list", "some.txt") == (2, [("line of a list", f"some.txt, line {k}") for k in (2, 4, 5)])
    for name in "ace":
        (tmp_path / f"data/labels/{name}.png").unlink()
    assert "labels: expected a partner of each of the 5 files in" in refusal(check.find_splits, folders, None)


def test_a_split_for_the_server_is_of_cityscapes(tmp_path):
    output = refusal(evaluate.main, words(("A", "B"), "--restore-from", "x.pth", "--submission", "F", "--gpu", "cpu"))
    assert output == "--submission: expected a Cityscapes folder in --data-dir, found --images-dir"


@pytest.mark.parametrize("where", ["images/c.jpg", "labels/c.png"])
def test_a_link_that_leads_nowhere_is_refused(tmp_path, where):
    folders = make(tmp_path, *"ab")
    (tmp_path / where).symlink_to(tmp_path / "gone.png")
    message = refusal(CityscapesDataset, folders)
    assert message == (f"{tmp_path / where}: expected a file, found a link to {tmp_path / 'gone.png'}, which does not "
                       "exist")


def test_what_is_left_out_is_one_line(tmp_path, capsys):
    folders = make(tmp_path, *"abc")
    for name in ("d.heic", "e.HEIC", "f.mp4", "README", ".DS_Store", "._a.png"):
        (tmp_path / "images" / name).touch()
    (tmp_path / "images/latest").symlink_to("gone")      # not named as an image is: it matters to nobody here
    (tmp_path / "labels/old").mkdir()
    for _ in range(2):      # as a training does for --val-every
        assert stems_of(CityscapesDataset(folders)) == ["a", "b", "c"]
    assert capsys.readouterr().out.splitlines() == [
        f"--images-dir {folders[0]}: left out (not readable as images): 2 files without a suffix, 2 of .heic, "
        "1 of .mp4, such as README",
        f"--labels-dir {folders[1]}: left out (not readable as images): 1 folder, such as old"]


def test_files_beside_the_folders_of_splits_are_said(tmp_path, capsys):
    folders = make(tmp_path, "a", "b", "train/a", "val/b")
    assert stems_of(CityscapesDataset(folders, "train")) == ["a"]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[1].startswith(f"--labels-dir {folders[1]}: left out (not in a split "
                                                   "folder: train)")
    assert "1 of .jpg, 1 of .png" in lines[0] and "2 of .png" in lines[1]
    check.find_splits(folders, None)
    assert "left out (not in a split folder: train, val)" in capsys.readouterr().out


@pytest.mark.parametrize("suffix, kind", [(".jfif", "JPEG"), (".avif", "AVIF"), (".jp2", "JPEG2000"), (".gif", "GIF"),
                                          (".tga", "TGA"), (".pgm", "PPM"), (".jpe", "JPEG"), (".dib", "DIB")])
def test_every_suffix_that_is_found_is_read(tmp_path, suffix, kind):
    Image.init()
    if kind not in Image.SAVE:
        pytest.skip(f"this Pillow has no {kind}")
    folders = make(tmp_path, "a", "b")
    image = Image.fromarray(np.full((40, 48), 90, np.uint8))
    (image if kind in ("GIF", "PPM") else image.convert("RGB")).save(tmp_path / f"images/c{suffix}", kind)
    Image.open(tmp_path / "labels/a.png").save(tmp_path / "labels/c.png")
    dataset = CityscapesDataset(folders, classes=infer_table(folders, "a.png"))
    assert abs(dataset[2]["image"].float().mean() - 90) < 2 and dataset.names[2] == "c"


def test_names_composed_and_decomposed_are_the_same(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "Zürich é") for form in ("NFC", "NFD"))
    assert composed != decomposed
    folders = make(tmp_path, composed, "b")
    (tmp_path / f"labels/{composed}.png").rename(tmp_path / f"labels/{decomposed}.png")
    (image, label), = (pair for pair in CityscapesDataset(folders).pairs if "rich" in pair[0].name)
    assert image.stem == composed and label.stem == decomposed
    for name in (composed, decomposed):
        (tmp_path / "stems.txt").write_text(f"{name}\n", encoding="utf-8")
        assert CityscapesDataset(folders, data_list=tmp_path / "stems.txt").pairs == [(image, label)]
        (tmp_path / "pairs.txt").write_text(f"images/{name}.png\tlabels/{name}.png\n", encoding="utf-8")
        assert CityscapesDataset(tmp_path, data_list=tmp_path / "pairs.txt").pairs == [(image, label)]


def test_minus_one_is_ignored_without_a_table(tmp_path):
    folders = make(tmp_path, "a", "b", values=(0, 1, 2))
    ids = np.asarray(Image.open(tmp_path / "labels/a.png")).astype(np.int32)
    ids[:4] = -1
    os.remove(tmp_path / "labels/a.png")
    Image.fromarray(ids).save(tmp_path / "labels/a.tif")
    table = infer_table(folders, "a.tif", "b.png")
    assert table.num_classes == 3
    label = CityscapesDataset(folders, classes=table)[0]["label"].numpy()
    assert (label[:4] == 255).all() and np.array_equal(label[4:], ids[4:])
    (tmp_path / "classes.csv").write_text(table.as_csv())
    assert np.array_equal(ClassTable.read(tmp_path / "classes.csv").encode(ids), label)
