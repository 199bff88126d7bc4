"""Inferred class tables, and whether the advice in each error message helps when it is followed."""

import re
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from PIL import Image, ImageFilter

import train
from dataset import check
from dataset.cityscapes import CityscapesDataset, all_label_maps
from dataset.folders import data_flag
from dataset.infer import count_values, infer_classes, keep_table
from dataset.labels import CITYSCAPES, ClassTable, distinct_color
from tests.conftest import SMALL
from tests.dataset.test_folders import BINARY, make, refusal, words
from utils.common import flags
from utils.common.errors import UserError
from utils.training.options import DataOptions


def infer(folders, splits=None, lists=None):
    splits = splits or all_label_maps(folders, lists)
    return infer_classes(splits, folders, f"--labels-dir {folders[1]}", 0, "s/classes.csv")


def draw(root, **maps):
    """Two folders with an image for each label map, {stem: array}; __ in a stem stands for a folder."""
    for stem, ids in maps.items():
        for kind, array in (("images", np.zeros((*ids.shape[:2], 3), np.uint8)), ("labels", np.asarray(ids, np.uint8))):
            path = root / kind / (stem.replace("__", "/") + ".png")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(path)
    return str(root / "images"), str(root / "labels")


def read_all(folders, table, split="train", **options):
    """All label maps with a table: arrays of train ids. Raises `UserError` where it does not know a value."""
    dataset = CityscapesDataset(folders, split, classes=table, **options)
    return [dataset.train_ids(index) for index in range(len(dataset))]


def samples(words):
    """The samples that train.py learns from with these flags."""
    args, root, _, classes, _ = train.parse_and_check(words)
    data = flags.from_flags(DataOptions, vars(args))
    classes = classes or train.infer_classes(data, root, data_flag(args), 0, "s/classes.csv")
    return train.make_data(data, root, classes, None, 0)[0]


def table_of(message, root, number=0):
    """The class table that a message advises, as a file."""
    lines = re.findall(r"with the lines (name,id[^;]*)", message)[number].split(" / ")
    (root / "advised.csv").write_text("\n".join(lines) + "\n")
    return str(root / "advised.csv")


def convert_all(message, folder):
    """Do what a message advises in Python to each label map."""
    code = re.search(r"in Python by (PIL\S*(?: \S+)*?\.save\(COPY\))", message)[1]
    for path in sorted(Path(folder).rglob("*.png")):
        exec(code, {"PIL": PIL, "FILE": path, "COPY": path})


def test_0_and_255_are_background_and_foreground(tmp_path, capsys):
    classes = infer(make(tmp_path, "a", "b"))
    assert classes.as_csv() == BINARY
    assert "background (0): 50 % of pixels in 2 of 2 files\n" in capsys.readouterr().out
    assert classes.decode(classes.encode(np.array([[0, 255]], np.uint8))).tolist() == [[0, 255]]


@pytest.mark.parametrize("values", [(0, 1), (0, 1, 255), tuple(range(150)), (*range(254), 255)], ids=len)
def test_0_to_n_are_the_classes(tmp_path, values):
    make(tmp_path, "a", values=values[:90])
    make(tmp_path, "b", values=values[90:180] or values)
    classes = infer(make(tmp_path, "c", values=values[180:] or values[:9]))
    number = len(set(values) - {255})
    assert classes.names == [f"class {one}" for one in range(number)] and classes.ids.tolist() == list(range(number))
    assert classes.encode(np.array([[255, number - 1]], np.uint8)).tolist() == [[255, number - 1]]
    assert len({tuple(color) for color in classes.palette[:number]}) == number
    (tmp_path / "classes.csv").write_text(classes.as_csv())
    assert [{**row, "category": ""} for row in ClassTable.read(tmp_path / "classes.csv").rows] == classes.rows


def test_the_account_says_pixels_files_and_splits(tmp_path, capsys):
    rare, plain = np.zeros((10, 10)), np.zeros((10, 10))
    rare[0, :3], plain[:, :5], plain[0, 0] = 2, 1, 255
    infer(draw(tmp_path, train__a=plain, train__b=np.zeros((10, 10)), val__c=rare))
    output = capsys.readouterr().out
    assert "  class 0: 82.3 % of pixels in 3 of 3 files\n" in output       # (50 + 100 + 97) / 300
    assert "  class 1: 16.3 % of pixels in 1 of 3 files, none in val\n" in output
    assert "  class 2: 1 % of pixels in 1 of 3 files, none in train\n" in output
    assert "  ignored (255): 0.333 % of pixels in 1 of 3 files, none in val\n" in output


def test_a_value_is_ignored_as_the_account_says(tmp_path, capsys):
    """LoveDA's 0 is no data: the table that training writes, copied and changed as its words say."""
    folders = make(tmp_path, "a", "b", values=range(4))
    run = [*SMALL, *words(folders, "--batch-size", 2, "--num-steps", 1)]
    train.main([*run, "--snapshot-dir", str(tmp_path / "s")])
    advice = re.search(r"To ignore one, copy (\S+); in the copy, write 255 as its train_id and leave the train_id of "
                       "all classes empty", capsys.readouterr().out)
    rows = [line.split(",") for line in Path(advice[1]).read_text().splitlines()]
    rows[1:] = [[name, number, "255" if number in ("0", "255") else "", *rest] for name, number, _, *rest in rows[1:]]
    (tmp_path / "copy.csv").write_text("".join(",".join(row) + "\n" for row in rows))
    assert [label.min() for label in read_all(folders, str(tmp_path / "copy.csv"))] == [0, 0]
    assert samples([*run, "--classes", str(tmp_path / "copy.csv")]).classes.num_classes == 3


@pytest.mark.parametrize("values, message", [
    ((0,), r"0 \(0 in"), ((255,), r"255 \(255 in"), ((0, 1, 3), r"0, 1, 3 \(3 in"),
    ((1, 2), r"1, 2 \(1 in"), ((0, 127, 255), r"0, 127, 255 \(127 in .*a.png\)"),
    (tuple(range(256)), r"0, 1, 2, 3, 4, 5, 6, 7 \.\.\. \(")])
def test_other_values_are_a_sentence(tmp_path, values, message):
    with pytest.raises(UserError, match=f"--labels-dir .*: expected the values 0 and 255.*, found {message}"):
        infer(make(tmp_path, "a", "b", values=values))


@pytest.mark.parametrize("maps", [
    {"train__a": [[0, 255]], "val__b": [[0, 1]]}, {"train__a": [[0, 255]], "train__b": [[0, 1]]},
    {"train__a": [[0, 255]], "val__b": [[0, 1, 255]]}, {"train__a": [[0, 255]], "train__b": [[0, 1]],
                                                        "train__c": [[0, 0]]}])
def test_255_as_foreground_beside_1_is_refused(tmp_path, maps):
    folders = draw(tmp_path, **{stem: np.array(ids) for stem, ids in maps.items()})
    message = refusal(infer, folders)
    for name in ("a.png", "b.png"):
        assert re.search(rf"0, 1[0-9, ]* in \S+b\.png|0, 255 in \S+{name}", message), message
    ignored, same = (table_of(message, tmp_path, number) for number in (0, 1))
    assert read_all(folders, same)[0].tolist() == [[0, 1]]
    assert read_all(folders, table_of(message, tmp_path, 0))[0].tolist() == [[0, 255]] and ignored == same


def test_files_with_ignored_pixels_only_contradict_nothing(tmp_path):
    maps = {"a": [[0, 255]], "b": [[0, 1]], "c": [[1, 255]], "d": [[255, 255]]}
    assert infer(draw(tmp_path, **{stem: np.array(ids) for stem, ids in maps.items()})).num_classes == 2


def test_one_file_of_each_kind_is_named(tmp_path):
    message = refusal(infer, draw(tmp_path, train__a=np.array([[0, 1]]), val__b=np.array([[0, 100]])))
    assert re.search(r"\(100 in \S+val/b\.png, but only 0, 1 in \S+train/a\.png\)", message)


@pytest.mark.parametrize("values", [(1, 2, 3), (0, 1, 2, 4), (0, 1, 3), (0, 1, 2, 250), (0, 127, 255), (3, 70)])
def test_the_lines_of_a_refusal_make_a_table(tmp_path, values):
    folders = make(tmp_path, "a", "b", values=values)
    table = ClassTable.read(table_of(refusal(infer, folders), tmp_path))
    assert sorted(table.ids) == [one for one in values if one != 255]
    assert np.unique(read_all(folders, table)).tolist() == sorted({*range(table.num_classes), *({255} & set(values))})


def test_a_long_table_is_written_by_the_check(tmp_path, monkeypatch):
    folders = make(tmp_path, "a", "b", values=range(1, 51), suffixes=(".png",))
    assert "python -m dataset.check writes all" in refusal(infer, folders)
    monkeypatch.setattr("sys.argv", ["check", *words(folders, "--num-workers", 1, "--output-dir", tmp_path / "c")])
    message = refusal(check.main)
    path = re.search(r"; such a table was written to (\S+), to be edited$", message)[1]
    assert np.unique(read_all(folders, path)).tolist() == list(range(50))
    first = Path(path).read_text()
    draw(tmp_path, b=np.arange(1, 61).reshape(6, 10))
    assert f"written to {path}, to be edited" in refusal(check.main)        # its own draft, which nobody has edited
    assert Path(path).read_text() != first and read_all(folders, path)[1].max() == 59
    Path(path).write_text("mine")
    assert "writes all of them to a file" in (message := refusal(check.main)) and "written to" not in message
    assert Path(path).read_text() == "mine"
    Path(path).unlink()
    assert f"written to {path}" in refusal(check.main)
    draw(tmp_path, a=np.array([[0, 1, 2]]), b=np.array([[2, 1], [0, 0]]))
    check.main()        # and where the label maps need no table any more
    assert ClassTable.read(path).num_classes == 3


def soft_masks():
    """Discs with soft edges, made as others make them: blurred; scaled; saved as JPEG."""
    rows, columns = np.ogrid[:96, :128]
    mask = Image.fromarray(np.uint8(255 * ((rows - 48) ** 2 + (columns - 64) ** 2 < 900)))
    scaled = mask.resize((37, 29)).resize((128, 96), Image.Resampling.BICUBIC)
    return {"wide": mask.filter(ImageFilter.GaussianBlur(9)), "narrow": mask.filter(ImageFilter.GaussianBlur(1)),
            "scaled": scaled, "all": Image.fromarray(np.tile(np.arange(254, dtype=np.uint8), (9, 1)))}


@pytest.mark.parametrize("kind", ["wide", "narrow", "scaled", "all"])
def test_soft_edges_are_no_classes(tmp_path, kind):
    mask = np.asarray(soft_masks()[kind])
    folders = draw(tmp_path, a=mask, b=mask[::-1])
    message = refusal(infer, folders)
    assert "soft edges" in message
    convert_all(message, folders[1])
    assert infer(folders).names == ["background", "foreground"]


@pytest.mark.parametrize("channels, message", [((0, 1, 2), "three channels"), ((0,), "in the red channel")])
def test_ids_in_channels_of_colors_are_said(tmp_path, channels, message):
    """Saved by cv2.imwrite in three channels, or by CARLA in red: with a table and without."""
    ids = np.kron(np.arange(3), np.ones((4, 4))).astype(np.uint8)
    colors = np.zeros((*ids.shape, 3), np.uint8)
    colors[..., channels] = ids[..., None]
    folders, table = draw(tmp_path, a=colors, b=colors[::-1]), ClassTable.read()
    assert message in refusal(infer, folders)
    assert message in (advice := refusal(read_all, folders, table))
    convert_all(advice, folders[1])
    assert infer(folders).num_classes == 3


def test_colors_have_a_line_each(tmp_path):
    palette = np.array([[0, 0, 0], [128, 64, 0], [3, 200, 5]], np.uint8)
    folders = draw(tmp_path, a=palette[np.array([[0, 1, 2, 2]])], b=palette[np.array([[0, 0, 0, 1]])])
    message = refusal(infer, folders)
    assert "found a label map of colors" in message
    assert [one.tolist() for one in read_all(folders, table_of(message, tmp_path))] == [[[0, 2, 1, 1]], [[0, 0, 0, 2]]]


def test_black_and_white_are_ids(tmp_path):
    for color, kind in (((255, 255, 255), "RGB"), ((255, 0, 0), "RGB"), (70000, "I"), (1, "1")):
        Image.new(kind, (4, 3), color).save(tmp_path / f"{kind}{color}.tif")
    for name, value in (("RGB(255, 255, 255)", 255), ("RGB(255, 0, 0)", (255, 0, 0)), ("I70000", 70000), ("11", 1)):
        assert count_values(tmp_path / f"{name}.tif")[0] == {value: 12}


def test_a_table_beside_them_is_not_passed_over(tmp_path, capsys):
    """CamVid's eleventh value is unlabeled, as the classes.csv beside it says."""
    folders = make(tmp_path, "a", "b", values=range(3))
    table = "name,id,train_id,red,green,blue\nsky,0,0,1,1,1\nroad,1,1,2,2,2\nvoid,2,255,0,0,0\n"
    (tmp_path / "classes.csv").write_text(table)
    message = refusal(infer, folders)
    assert f"with other meanings in {tmp_path / 'classes.csv'}" in message
    advised = re.search(r"; use --classes (\S+), which contains all of them$", message)[1]
    assert np.unique(read_all(folders, advised)).tolist() == [0, 1, 255]
    (tmp_path / "classes.csv").write_text(table.replace("2,255", "2,2"))
    capsys.readouterr()
    assert infer(folders).num_classes == 3 and f"--classes {tmp_path / 'classes.csv'}" in capsys.readouterr().out
    (tmp_path / "classes.csv").write_text("of something else")
    assert infer(folders).num_classes == 3


def test_a_table_of_another_tool_gives_the_names(tmp_path):
    palette = np.array([[64, 128, 64], [192, 0, 128]], np.uint8)
    folders = draw(tmp_path, a=palette[np.array([[0, 1]])])
    (tmp_path / "class_dict.csv").write_text("name,r,g,b\nVoid,0,0,0\nArchway,192,0,128\nAnimal,64,128,64\n")
    table = ClassTable.read(table_of(refusal(infer, folders), tmp_path))
    assert table.names == ["Void", "Archway", "Animal"] and read_all(folders, table)[0].tolist() == [[2, 1]]


def test_the_table_of_cityscapes_is_for_its_file_names(streets, tmp_path):
    image, label = CityscapesDataset(streets, "val").pairs[0]
    ids = np.asarray(Image.open(label))
    for name in ("a.png", "b.png"):
        shutil.copy(image, tmp_path / name)
    for name, values in (("a_gtFine_labelIds.png", ids), ("b_gtFine_labelIds.png", ids), ("a_mask.png", ids % 3),
                         ("b_mask.png", ids % 3)):
        Image.fromarray(values).save(tmp_path / name)

    def classes(*labels):
        (tmp_path / "list.txt").write_text("".join(f"{name[0]}.png {name}\n" for name in labels))
        lists = [str(tmp_path / "list.txt")]
        return infer_classes(all_label_maps(str(tmp_path), lists), str(tmp_path), "--data-list l", 0, "c.csv")

    assert classes("a_gtFine_labelIds.png", "b_gtFine_labelIds.png").source == str(CITYSCAPES)
    assert classes("a_mask.png", "b_mask.png").names == ["class 0", "class 1", "class 2"]
    message = refusal(classes, "a_gtFine_labelIds.png", "b_mask.png")
    assert "a_gtFine_labelIds.png, which is named as a label map of Cityscapes, and b_mask.png" in message


@pytest.mark.parametrize("ids", [range(34), (4, 7, 8, 11, 17, 19, 20, 21, 22, 23, 24, 26, 33)], ids=["all", "some"])
def test_ids_of_cityscapes_under_other_names_are_told_of_its_table(tmp_path, ids):
    folders = make(tmp_path, "a", "b", values=ids)
    advised = re.search(r"use --classes (\S+\.csv)", refusal(infer, folders))[1]
    assert advised == str(CITYSCAPES) and len(read_all(folders, advised)) == 2


def test_a_list_infers_as_folders_do(tmp_path, capsys):
    folders = make(tmp_path, "a", "b", "c", values=range(2), suffixes=(".png",))
    Image.fromarray(np.full((40, 48), 2, np.uint8)).save(tmp_path / "labels/c.png")
    (tmp_path / "train.txt").write_text("images/a.png labels/a.png\nimages/b.png labels/b.png\n")
    (tmp_path / "val.txt").write_text("images/c.png labels/c.png\n")
    dataset = samples(["--gpu", "cpu", "--data-dir", str(tmp_path), "--data-list", str(tmp_path / "train.txt"),
                       "--val-list", str(tmp_path / "val.txt")])
    assert len(dataset) == 2 and f"in 1 of 3 files, none in {tmp_path / 'train.txt'}" in capsys.readouterr().out
    assert dataset.classes.as_csv() == infer(folders).as_csv()


def test_every_split_counts_and_stray_folders_do_not(tmp_path):
    folders = make(tmp_path, "train/a", "train/b", values=(0, 1))
    make(tmp_path, "val/c", values=(0, 1, 2))
    for kind in ("images", "labels"):
        (tmp_path / kind / "empty").mkdir()
    dataset = samples(["--gpu", "cpu", *words(folders)])
    assert len(dataset) == 2 and dataset.classes.num_classes == 3


def test_minus_one_of_16_bits_is_ignored(tmp_path, capsys):
    folders = make(tmp_path, "a", "b", values=(0, 1))
    Image.fromarray(np.full((40, 48), 65535, np.uint16)).save(tmp_path / "labels/b.png")
    classes = infer(folders)
    assert [label.min() for label in read_all(folders, classes)] == [0, 255] and classes.num_classes == 2
    assert "  ignored too (65535): 50 % of pixels in 1 of 2 files" in capsys.readouterr().out


def test_colors_are_those_of_pascal_voc():
    assert [distinct_color(one) for one in (0, 1, 2, 3, 8, 15, 20, 255)] == [
        (0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (64, 0, 0), (192, 128, 128), (0, 64, 128), (224, 224, 192)]


def test_a_table_is_written_once_and_never_over_another(tmp_path):
    classes, path = infer(make(tmp_path / "data", "a")), tmp_path / "s/classes.csv"
    keep_table(path, classes)
    before = path.stat().st_mtime_ns
    keep_table(path, classes)
    assert path.read_text() == BINARY and path.stat().st_mtime_ns == before
    path.write_text(BINARY.replace("foreground", "ship"))
    assert f"use it by --classes {path}" in refusal(keep_table, path, classes) and "ship" in path.read_text()


def test_a_second_check_replaces_the_table_of_the_first_but_not_the_users(tmp_path, monkeypatch, capsys):
    folders = draw(tmp_path, a=np.array([[0, 1], [1, 0]]))
    monkeypatch.setattr("sys.argv", ["check", *words(folders, "--num-workers", 0, "--output-dir", tmp_path / "c")])
    path = tmp_path / "c/classes.csv"
    check.main()
    first = path.read_text()
    draw(tmp_path, b=np.array([[0, 1, 1], [2, 2, 2]]))
    check.main()
    assert path.read_text() != first and "class 2" in path.read_text()
    path.write_text(first.replace("class 1", "ship"))
    assert "or delete it to have a new one written" in refusal(check.main) and "ship" in path.read_text()
    with monkeypatch.context() as patch:        # what the refusal advises makes it no table of the program's
        patch.setattr("sys.argv", ["check", *words(folders, "--num-workers", 0, "--output-dir", tmp_path / "c"),
                                   "--classes", str(path)])
        path.write_text(path.read_text().replace("ignored,", "class 2,2,2,0,128,0\nignored,"))
        check.main()
    assert "a new one written" in refusal(check.main) and "ship" in path.read_text()
    path.unlink()
    check.main()
    assert "class 2" in path.read_text() and "ship" not in path.read_text()
    (tmp_path / "labels/b.png").unlink()
    (tmp_path / "images/b.png").unlink()
    for text in ("[]", "[" * 200_000, '{"classes": "\\ud800"}', '{"classes": 1}', "\0"):
        (tmp_path / "c/check.json").write_text(text)
        assert str(path) in refusal(check.main)
