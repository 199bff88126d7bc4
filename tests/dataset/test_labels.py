"""Class tables, against cityscapesScripts' own."""

import re
from contextlib import nullcontext

import numpy as np
import pytest
import torchvision
from cityscapesscripts.helpers.labels import labels as official

from dataset import folders
from dataset.labels import CITYSCAPES, ClassTable, distinct_color
from utils.common.errors import UserError
from utils.imaging.decode import read_ids

TABLE = "name,id,train_id,red,green,blue\nroad,1,0,1,2,3\ncar,2,1,4,5,6\nvoid,3,255,0,0,0\n"


@pytest.fixture
def table(tmp_path):
    def make(text=TABLE):
        path = tmp_path / "classes.csv"
        path.write_text(text, encoding="utf-8")
        return ClassTable.read(path)
    return make


def test_cityscapes_table_is_the_official_one():
    classes = ClassTable.read()
    actual = [(r["name"], r["id"], r["train_id"], r["category"], (r["red"], r["green"], r["blue"]))
             for r in classes.rows]
    assert actual == [(x.name, x.id, x.trainId, x.category, x.color) for x in official]
    evaluated = [x for x in official if not x.ignoreInEval]
    assert classes.names == [x.name for x in evaluated]
    assert classes.categories == [x.category for x in evaluated]
    assert classes.ids.tolist() == [x.id for x in evaluated]
    assert classes.palette[:19].tolist() == [list(x.color) for x in evaluated]


@pytest.mark.parametrize("name, ids, ignored", [
    ("ade20k", range(1, 151), {0}), ("bdd100k", range(19), {255}), ("camvid", range(11), {11}),
    ("idd", range(26), {255}), ("loveda", range(1, 8), {0}), ("mapillary", range(65), {65}), ("voc", range(21), {255}),
    ("gta5", [x.id for x in official if not x.ignoreInEval], {x.id % 35 for x in official if x.ignoreInEval})])
def test_tables_of_known_data_sets(name, ids, ignored):
    """Ids; colors of classes that have a name of Cityscapes, whose colors these data sets share (GTA5, IDD, ...)."""
    classes = ClassTable.read(name)
    assert classes.ids.tolist() == list(ids)
    assert {row["id"] for row in classes.rows if row["train_id"] == 255} == ignored
    colors = {x.name: list(x.color) for x in official if not x.ignoreInEval}
    shared = {row["name"].lower(): [row[key] for key in ("red", "green", "blue")] for row in classes.rows}
    if name in ("bdd100k", "gta5", "idd", "mapillary"):
        assert sum(colors.get(one) == color for one, color in shared.items()) >= 14
        assert {one for one in shared.keys() & colors if shared[one] != colors[one]} == set()


def test_tables_of_other_programs(camvid):
    """PASCAL VOC as torchvision has it, and its color map; CamVid as SegNet's label maps have it."""
    weights = torchvision.models.segmentation.FCN_ResNet50_Weights.COCO_WITH_VOC_LABELS_V1
    voc, segnet = ClassTable.read("voc"), ClassTable.read("camvid")
    assert voc.names == ["background", *weights.meta["categories"][1:]]
    assert voc.palette[:21].tolist() == [list(distinct_color(number)) for number in range(21)]
    theirs = ClassTable.read(camvid / "classes.csv")
    assert (segnet.names, segnet.ids.tolist()) == (theirs.names, theirs.ids.tolist())
    assert len(segnet.color_lookup) == 32


def test_ids_become_train_ids_and_back():
    classes = ClassTable.read()
    ids = np.array([[x.id for x in official if x.id >= 0]], np.uint8)
    train_ids = classes.encode(ids)
    assert train_ids.dtype == np.uint8
    assert train_ids[0].tolist() == [x.trainId for x in official if x.id >= 0]
    evaluated = train_ids != 255
    assert (classes.decode(train_ids)[evaluated] == ids[evaluated]).all()
    assert (classes.decode(train_ids)[~evaluated] == 0).all()


def test_several_ids_may_share_a_class(table):
    classes = table("name,id,train_id,red,green,blue,category\na,300,0,1,1,1,x\nb,7,0,2,2,2,x\nc,9,1,3,3,3,\n")
    assert classes.names == ["a", "c"] and classes.categories == ["x", "c"]
    assert classes.encode(np.array([[300, 7, 9]], np.uint16)).tolist() == [[0, 0, 1]]
    assert classes.decode(np.array([[0, 1]])).tolist() == [[300, 9]]


@pytest.mark.parametrize("text, message", [
    ("name,id,train_id,red,green,blue\nroad,1,0,1,2\n", "line 2: expected a whole number for blue, found None"),
    ("name,id,train_id,red,green,blue\nroad,x,0,1,2,3\n", "line 2: expected a whole number for id, found 'x'"),
    ("name,id,train_id,red,green,blue\nroad,1,0,1,2,300\n", "line 2: expected blue from 0 to 255, found 300"),
    ("name,id,train_id,red,green,blue\nroad,70000,0,1,2,3\n", "line 2: expected id from 0 to 65535, found 70000"),
    ("name,red,green\nroad,1,2\n", "found no id, train_id, blue"),
    (TABLE.replace("car,2,1", "car,2,"), "line 3: expected a whole number for train_id, found ''"),
    ("name,id,train_id,red,green,blue\na,1,0,0,0,0\nb,2,2,0,0,0\n", r"expected train ids 0 to N-1 .* found \[0, 2\]"),
    ("name,id,train_id,red,green,blue\na,1,0,0,0,0\nb,1,1,0,0,0\n", r"expected every id once, found \[1\]"),
    ("name,id,train_id,red,green,blue\n", r"found \[\]"),
])
def test_a_broken_table_is_one_sentence(table, text, message):
    with pytest.raises(UserError, match="classes.csv.*" + message):
        table(text)


def test_comments_count_as_lines(table):
    with pytest.raises(UserError, match="line 4: expected a whole number for id"):
        table("# one\n# two\n" + TABLE.replace("road,1,", "road,x,"))


def test_a_missing_table_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere.csv: expected a class table"):
        ClassTable.read(tmp_path / "nowhere.csv")


def test_unknown_values_are_named():
    with pytest.raises(UserError, match=r"map.png: expected ids that .*classes.csv knows, found 77, 200; --classes "):
        ClassTable.read().encode(np.array([[7, 77, 200]]), "map.png")


@pytest.mark.parametrize("values", [(0, 1, 2), (1, 33), (0, 7)])
def test_a_value_without_a_row_is_given_one(table, tmp_path, values):
    """Values of anybody's, small as ids of Cityscapes are: the row in the sentence helps to learn or to ignore them."""
    text = "name,id,train_id,red,green,blue\na,0,0,1,1,1\nb,1,1,2,2,2\n"
    with pytest.raises(UserError) as caught:
        table(text).encode(np.array([values]), "map.png")
    assert "Cityscapes" not in str(caught.value)
    row, train_ids = re.search(r"add a row for each of these: (NAME,\S+), where the (.*)", str(caught.value)).groups()
    for train_id in re.search(r"TRAIN_ID (\d+) makes a class of it and (\d+) ignores it", train_ids).groups():
        line = row.replace("TRAIN_ID", train_id).replace("RED,GREEN,BLUE", "9,9,9")
        assert table(f"{text}{line}\n").encode(np.array([values]))[0, -1] == int(train_id)


def test_train_ids_that_are_left_empty_are_numbered(table):
    classes = table("name,id,train_id,red,green,blue\nvoid,0,255,0,0,0\na,1,,1,1,1\nb,2,,2,2,2\n")
    assert classes.encode(np.array([[0, 1, 2]])).tolist() == [[255, 0, 1]]


@pytest.mark.parametrize("text, missing, ids, names, colors", [
    ("Pixel Value, Class\n0, background\n1, crack\n5, spall\n", "train_id, red, green, blue", [0, 1, 5],
     ["background", "crack", "spall"], [[0, 0, 0], [128, 0, 0]]),
    ("name,r,g,b\nAnimal,64,128,64\nArchway,192,0,128\n", "id, train_id", [0, 1], ["Animal", "Archway"],
     [[64, 128, 64], [192, 0, 128]]),
    ("# label:color_rgb:parts:actions\nbackground:0,0,0::\nperson:192,128,128::\n", "id, train_id", [0, 1],
     ["background", "person"], [[0, 0, 0], [192, 128, 128]])])
def test_tables_of_other_tools_are_given_with_our_columns(table, text, missing, ids, names, colors):
    """Roboflow's _classes.csv, class_dict.csv of Kaggle's CamVid, CVAT's labelmap.txt."""
    with pytest.raises(UserError, match=f"found no {missing}; --classes FILE.csv with the lines ") as caught:
        table(text)
    classes = table(re.search("with the lines (.*), where", str(caught.value))[1].replace(" / ", "\n") + "\n")
    assert classes.ids.tolist() == ids and classes.names == names
    assert classes.encode(np.array([colors], np.uint8)).tolist() == [[0, 1]]


@pytest.mark.parametrize("change", [
    lambda text: text.replace(",", ";"), lambda text: text.replace(",", "\t"), lambda text: text.replace(",", ", "),
    lambda text: text.title().replace("Name", " NAME "), lambda text: text.replace("\n", "\r\n\r\n") + ",,,,,\n",
    lambda text: "sep=;\n" + text.replace(",", ";"), lambda text: f"# from, a; book\n#\n{text}",
    lambda text: text.replace(",2,1,", ",2.0,1.0,"),
    lambda text: text.replace("\n", ",x,y\n")])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_tables_are_read_as_spreadsheets_save_them(tmp_path, change, encoding):
    (tmp_path / "t.csv").write_text(change(TABLE), encoding=encoding)
    classes = ClassTable.read(tmp_path / "t.csv")
    assert [name.lower() for name in classes.names] == ["road", "car"] and not classes.remarks
    assert classes.encode(np.array([[1, 2, 3]])).tolist() == [[0, 1, 255]]


@pytest.mark.parametrize("rows, remedy", [
    ("weld,0,0,1,1,1\nvoid,255,255,0,0,0\n", "give void the train_id 1"),
    ("weld,0,0,1,1,1\n", "add a row for all other pixels, such as background,ID,1,0,0,0")])
def test_one_class_is_none_to_tell_apart(table, tmp_path, rows, remedy):
    classes = table("name,id,train_id,red,green,blue\n" + rows)
    with pytest.raises(UserError, match=f"classes.csv: expected at least two classes, found 1, weld; {remedy}"):
        folders.read_table(classes.source, None, None)
    better = rows.replace("void,255,255", "void,255,1") if "void" in rows else rows + remedy[-22:].replace("ID", "7")
    table("name,id,train_id,red,green,blue\n" + better).check_at_least_two()


def test_colors_that_are_alike_are_said(table):
    classes = table("name,id,train_id,red,green,blue\na,0,0,0,0,0\nb,1,1,0,0,0\nc,2,2,7,7,7\nd,3,255,7,7,7\n")
    assert ["gives a, b the same color (0, 0, 0)" in one for one in classes.remarks] == [True]
    assert not ClassTable.read().remarks and not ClassTable.read(CITYSCAPES.with_name("categories.csv")).remarks


def test_colors_of_cityscapes_are_read_with_the_table(streets):
    """Pole and polegroup share (153, 153, 153); the drawn streets have poles."""
    for kind in ("train", "val"):
        for path in sorted((streets / "gtFine" / kind).glob("*/*_color.png")):
            ids = read_ids(path.with_name(path.name.replace("_color", "_labelIds")))
            output = r"\(153, 153, 153\) to pole \(train id 5\), polegroup \(train id 255\): all its pixels are learned"
            with pytest.warns(UserWarning, match=output) if 17 in ids else nullcontext():
                colors = ClassTable.read().encode(read_ids(path), path)
            assert np.array_equal(colors, ClassTable.read().encode(ids))


@pytest.mark.parametrize("rows, actual", [
    ("a,1,0,5,5,6,\nb,2,0,5,5,6,\n", 0), ("a,1,0,5,5,6,x\nb,2,255,5,5,6,x\n", 0),
    ("a,1,0,1,1,1,\nb,2,255,5,5,6,x\nc,3,255,5,5,6,y\n", 255),
    ("a,1,0,5,5,6,x\nb,2,1,5,5,6,x\n", r"a \(train id 0\), b \(train id 1\); use a map of ids"),
    ("a,1,0,5,5,6,x\nb,2,255,5,5,6,void\n", r"a \(train id 0\), b \(train id 255\)"),
    ("a,1,0,5,5,6,\nb,2,255,5,5,6,\n", r"a \(train id 0\), b \(train id 255\)")])
@pytest.mark.filterwarnings("ignore:.*learned and scored as a")
def test_a_color_of_several_rows(table, rows, actual):
    classes = table("name,id,train_id,red,green,blue,category\n" + rows)
    colors = np.full((1, 1, 3), (5, 5, 6), np.uint8)
    if isinstance(actual, int):
        assert classes.encode(colors).tolist() == [[actual]]
    else:
        with pytest.raises(UserError, match=r"m\.png: expected a color for each class, found \(5, 5, 6\), .*" + actual):
            classes.encode(colors, "m.png")


def test_train_ids_in_place_of_ids_are_recognized():
    with pytest.raises(UserError, match="look like train ids"):
        ClassTable.read().encode(np.array([[0, 1, 13, 255]], np.uint8))


def test_ids_in_place_of_train_ids_are_recognized(table):
    rows = "".join(f"c{i},{i},{i},0,0,{i}\n" for i in range(19))
    classes = table("name,id,train_id,red,green,blue\n" + rows + "void,255,255,0,0,0\n")
    assert classes.is_identity
    with pytest.raises(UserError, match="by the file's name these are ids of Cityscapes: leave out --classes"):
        classes.encode(np.array([[7, 26, 33]], np.uint8), "a/b_gtFine_labelIds.png")


def test_a_map_that_reads_as_mostly_void_is_suspected():
    classes = ClassTable.read()
    assert classes.looks_like_train_ids(np.array([[0, 0, 2, 2, 13]]))
    assert not classes.looks_like_train_ids(np.array([[0, 0, 2, 2, 26]]))
    assert not classes.looks_like_train_ids(np.array([[7, 7, 8, 11, 1]]))
    assert not ClassTable.read("ade20k").looks_like_train_ids(np.array([[0, 0, 0, 2, 13]]))
