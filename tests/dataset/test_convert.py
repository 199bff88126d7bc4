"""`python -m dataset.convert` on exports that the tools' own libraries wrote (golden/), and on files that are wrong."""

import base64
import json
import multiprocessing
import re
import shutil
import signal
import sys
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset import check, convert
from dataset.cityscapes import CityscapesDataset, all_label_maps
from dataset.infer import check_meaning, infer_classes
from dataset.labels import ClassTable
from dataset.outlines import draw
from tests.conftest import SMALL, finish, start
from tests.dataset.test_folders import refusal, words
from tests.dataset.test_infer import samples

GOLDEN = Path(__file__).parent / "golden"
SQUARE = [2, 2, 6, 2, 6, 6, 2, 6]


def run(monkeypatch, *words):
    """The command in this process."""
    monkeypatch.setattr(sys, "argv", ["convert", *map(str, words), "--num-workers", "0"])
    convert.main()


def read(path):
    return np.asarray(Image.open(path))


def mask_of(size, *shapes):
    """(H, W) bool: the pixels of shapes (kind, geometry)."""
    mask = np.zeros(size, bool)
    for window, part in (part for shape in shapes for part in draw(*shape, size)):
        mask[window] |= part
    return mask


def distance(size, points):
    """(H, W) distance of each pixel's center to the outline of a polygon."""
    rows, columns = np.indices(size)
    centers = np.stack([columns, rows], -1) + 0.5
    starts = np.reshape(points, (-1, 2)).astype(float)
    best = np.full(size, np.inf)
    for start_point, end in zip(starts, np.roll(starts, -1, 0), strict=True):
        edge = end - start_point
        along = ((centers - start_point) @ edge / max(edge @ edge, 1e-12)).clip(0, 1)
        best = np.minimum(best, np.linalg.norm(centers - start_point - along[..., None] * edge, axis=-1))
    return best


def write_coco(root, files, annotations, name="instances.json", categories=("crack", "spall"), **more):
    """A COCO file: files {name of an image: (H, W)}, which are written unless they exist, annotations (image, class,
    segmentation)."""
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    for file, size in files.items():
        if not (root / file).exists():
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.zeros((*size, 3), np.uint8)).save(root / file)
    content = {"images": [{"id": number, "file_name": file, "height": size[0], "width": size[1]}
                          for number, (file, size) in enumerate(files.items(), 5)],
               "categories": [{"id": number, "name": label} for number, label in enumerate(categories, 3)],
               "annotations": [{"id": number, "image_id": 5 + image, "category_id": 3 + label, "segmentation": outline}
                               for number, (image, label, outline) in enumerate(annotations)]} | more
    (root / name).write_text(json.dumps(content))


# ---- outlines


def test_a_pixel_belongs_to_a_polygon_if_its_center_does():
    """Against the definition in fractions: an odd number of edges is crossed on the way to the left."""
    rng = np.random.default_rng(0)
    for _ in range(60):
        points = rng.integers(-12, 60, (rng.integers(3, 9), 2)) / 4     # also on centers, and outside
        size = 9, 11
        ends = [[Fraction(value) for value in (*first, *second)] for first, second in zip(
            points, np.roll(points, -1, 0), strict=True)]
        for row, column in np.ndindex(*size):
            y, x = row + Fraction(1, 2), column + Fraction(1, 2)
            crossings = [x0 + (y - y0) * (x1 - x0) / (y1 - y0) for x0, y0, x1, y1 in ends
                         if min(y0, y1) <= y < max(y0, y1)]
            inside = sum(crossing <= x for crossing in crossings) % 2 == 1
            assert mask_of(size, ("coco", [points.ravel().tolist()]))[row, column] == inside


def test_neighbors_neither_overlap_nor_leave_a_gap():
    rng = np.random.default_rng(1)
    for _ in range(50):
        center, border = rng.uniform(3, 27, 2), np.array([[0, 0], [13.3, 0], [30, 0], [30, 11.7], [30, 30], [0, 30]])
        count = sum(mask_of((30, 30), ("coco", [np.ravel(triangle).tolist()])).astype(int) for triangle in zip(
            border, np.roll(border, -1, 0), [center] * 6, strict=True))
        assert (count == 1).all()


def test_polygons_are_those_of_pycocotools():
    coco, rng, size = pytest.importorskip("pycocotools.mask"), np.random.default_rng(2), (40, 50)
    assert mask_of(size, ("coco", [[3, 4, 13, 4, 13, 9, 3, 9]])).sum() == 50        # corners are corners of pixels
    for _ in range(100):
        points = rng.uniform(-5, 55, (rng.integers(3, 8), 2)).ravel().tolist()
        theirs = coco.decode(coco.merge(coco.frPyObjects([points], *size))) > 0
        differ = theirs != mask_of(size, ("coco", [points]))
        assert not differ[distance(size, points) > 0.5].any()       # it rounds to a fifth of a pixel


def test_several_polygons_of_an_annotation_are_united():
    coco, size = pytest.importorskip("pycocotools.mask"), (20, 20)
    rings = [[2, 2, 12, 2, 12, 12, 2, 12], [8, 8, 18, 8, 18, 18, 8, 18], [4, 4, 6, 4, 6, 6, 4, 6]]
    theirs = coco.decode(coco.merge(coco.frPyObjects(rings, *size)))
    assert np.array_equal(mask_of(size, ("coco", rings)), theirs)


def test_run_lengths_are_those_of_pycocotools():
    coco, rng = pytest.importorskip("pycocotools.mask"), np.random.default_rng(3)
    for density in (0, 0.001, 0.1, 0.5, 0.9, 1):
        mask = np.repeat(np.repeat(rng.random((23, 31)) < density, 4, 0), 7, 1)
        packed = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
        text = {"size": packed["size"], "counts": packed["counts"].decode()}
        assert np.array_equal(mask_of(mask.shape, ("coco", text)), mask)
        flat = np.concatenate([[0], mask.T.ravel(), [2]])
        runs = np.diff(np.flatnonzero(np.diff(flat)), prepend=0).tolist() if mask.any() else [mask.size]
        plain = {"size": list(mask.shape), "counts": [0, *runs[1:]] if flat[1] else runs}
        assert np.array_equal(mask_of(mask.shape, ("coco", plain)), coco.decode(coco.frPyObjects(plain, *mask.shape)))


def test_shapes_of_labelme_are_drawn():
    size = 20, 24
    rows, columns = np.indices(size) + 0.5
    circle = mask_of(size, ("circle", {"points": [[11, 9], [11, 2.6]]}))
    assert np.array_equal(circle, (columns - 11) ** 2 + (rows - 9) ** 2 <= 6.4 ** 2)
    box = mask_of(size, ("rectangle", {"points": [[9, 12], [4, 30]]}))
    assert np.array_equal(box, (columns > 4) & (columns < 9) & (rows > 12))


@pytest.mark.parametrize("shape, reason", [
    (("coco", []), "without an outline"), (("coco", None), "without an outline"), (("coco", "abc"), "an outline"),
    (("coco", [[]]), "fewer than three"), (("coco", [[1, 2, 3, 4]]), "fewer than three"),
    (("coco", [[1, 2, 3, 4, 5]]), "not pairs"), (("coco", [["a", "b"]]), "not pairs"), (("coco", [{}]), "not pairs"),
    (("coco", [[10 ** 400, 1, 2, 3, 4, 5]]), "not pairs"), (("coco", [[float("nan"), 1, 2, 3, 4, 5]]), "not finite"),
    (("coco", [[1e300, 1, -1e300, 3, 4, 5]]), "not finite"), (("coco", [[float("inf"), 1, 2, 3, 4, 5]]), "not finite"),
    *((("coco", {"size": [4, 5], "counts": counts}), "do not fit the size") for counts in (
        [], [19], [21], [-1, 21], [[20]], [[1], [2, 3]], [10 ** 30], [20.0], "", "o", "oooooooooooooooo", "5", "zz",
        "ä", None, 7, [2 ** 62, 2 ** 62, 20])),
    (("coco", {"size": [5, 4], "counts": [20]}), "do not fit the size"), (("coco", {}), "do not fit the size"),
    (("mask", {"points": [[0, 0]], "mask": "?"}), "not images"), (("mask", {"points": [[0, 0]]}), "not images"),
    (("circle", {"points": [[1, 1]]}), "no area"), (("polygon", {}), "not finite|not pairs"),
    (("linestrip", {"points": [[1, 1], [2, 2]]}), "the kind linestrip, which has no area"), ((7, {}), "not")])
def test_what_is_no_outline_is_refused_with_the_reason(shape, reason):
    with pytest.raises(ValueError, match=reason):
        draw(*shape, (4, 5))


def test_coordinates_may_lie_far_outside_of_the_image():
    assert mask_of((4, 5), ("coco", [[-9e8, -9e8, 9e8, -9e8, 9e8, 9e8, -9e8, 9e8]])).all()
    assert not mask_of((4, 5), ("coco", [[10, 10, 20, 10, 20, 20]]), ("circle", {"points": [[-9, -9], [-9, -8]]})).any()


# ---- exports of the tools' own libraries


def test_an_export_of_labelme(monkeypatch, tmp_path, capsys):
    """Differs from labelme's own label map only where outlines pass, whose pixels it draws as a whole."""
    run(monkeypatch, GOLDEN / "labelme", tmp_path / "t")
    out = capsys.readouterr().out
    labels, theirs = read(tmp_path / "t/labels/a.png"), read(GOLDEN / "labelme.png")
    shapes = json.loads((GOLDEN / "labelme/a.json").read_text())["shapes"]
    edges = np.full(labels.shape, np.inf)
    for shape in shapes:
        (x, y), *_, (x_end, y_end) = points = shape["points"]
        if shape["shape_type"] in ("rectangle", "mask"):
            points = [(x, y), (x_end, y), (x_end, y_end), (x, y_end)]
        if shape["shape_type"] == "circle":
            turns = np.linspace(0, 2 * np.pi, 200)
            points = np.stack([x + (y_end - y) * np.cos(turns), y + (y_end - y) * np.sin(turns)], 1)
        if shape["shape_type"] != "linestrip":
            edges = np.minimum(edges, distance(labels.shape, points))
    assert not (labels != theirs)[edges > 1].any() and 0.02 < (edges > 1).mean()
    assert np.array_equal(labels[14:22, 2:12] == 2, theirs[14:22, 2:12] == 2)      # the bitmap, with its hole
    table = ClassTable.read(tmp_path / "t/classes.csv")
    assert table.names == ["background", "crack", "spall"] and 255 in labels
    assert "outside of outlines: shape of the kind linestrip, which has no area: 1, such as crack in a.png\n" in out
    # The second image is in its annotation file alone.
    assert np.array_equal(read(tmp_path / "t/images/b.png")[..., 2], np.full((24, 32), 120))
    assert set(np.unique(read(tmp_path / "t/labels/b.png"))) == {0, 1}


@pytest.mark.parametrize("export, json_name", [
    ("cvat_coco", "annotations/instances_default.json"), ("label_studio", "result.json"),
    ("supervision", "train/_annotations.coco.json")])
def test_exports_of_coco(monkeypatch, tmp_path, export, json_name, capsys):
    """The label maps are those by pycocotools, drawn in the order of the file; its polygons are only near ours."""
    coco = pytest.importorskip("pycocotools.mask")
    run(monkeypatch, GOLDEN / export, tmp_path / "t")
    content = json.loads((GOLDEN / export / json_name).read_text())
    size = 24, 32
    for image in content["images"]:
        theirs, edges = np.zeros(size, int), np.full(size, np.inf)
        for item in (item for item in content["annotations"] if item["image_id"] == image["id"]):
            outline, names = item["segmentation"], {one["id"]: one["name"] for one in content["categories"]}
            if outline:
                packed = coco.frPyObjects(outline, *size)
                packed = packed if isinstance(outline, dict) else coco.merge(packed)
                theirs[coco.decode(packed) > 0] = ["background", "crack", "spall"].index(names[item["category_id"]])
            for ring in outline if isinstance(outline, list) else []:
                edges = np.minimum(edges, distance(size, ring))
        stem = Path(image["file_name"]).stem
        labels = read(next((tmp_path / "t/labels").rglob(f"{stem}.png")))
        assert not (labels != theirs)[edges > 0.3].any() and labels.any()
        assert len(list((tmp_path / "t/images").rglob(f"{stem}.*"))) == 1
    out = capsys.readouterr().out
    assert ClassTable.read(tmp_path / "t/classes.csv").names == ["background", "crack", "spall"]
    assert ("annotation without an outline, such as a box: 1, such as spall in images/default/cam/b.jpg" in out) == (
        export == "cvat_coco")
    assert sorted(path.name for path in (tmp_path / "t/labels").iterdir() if path.is_dir()) == (
        ["train", "val"] if export == "supervision" else [])


def test_the_result_is_a_data_set(monkeypatch, tmp_path, capsys):
    run(monkeypatch, GOLDEN / "supervision", tmp_path / "t")
    out = capsys.readouterr().out
    assert "1 image in images/train\n1 image in images/val\n" in out and f"--images-dir {tmp_path}/t/images" in out
    shown = re.search("python -m dataset.check (.*)", out)[1].split()
    monkeypatch.setattr(sys, "argv", ["check", *shown, "--output-dir", str(tmp_path / "c"), "--num-workers", "0"])
    check.main()
    assert "0 problems" in capsys.readouterr().out
    data = samples([*re.search("python train.py (.*)", out)[1].split(), *SMALL])
    assert data.classes.num_classes == 3 and len(data) == 1
    pixels = {name: int(number) for name, number in zip(
        data.classes.names, np.bincount(read(data.pairs[0][1]).ravel(), minlength=3), strict=True)}
    for name, number in pixels.items():
        both = number + (read(tmp_path / "t/labels/val/valid_jpg.rf.01.png") == data.classes.names.index(name)).sum()
        assert re.search(rf"  {name} +{100 * both / (2 * 24 * 32):.3f} % of pixels, in 2 images", out)


def test_masks_of_cvat_are_training_data(capsys):
    root = GOLDEN / "cvat_masks"
    folders = str(root / "JPEGImages"), str(root / "SegmentationClass")
    data = samples(words(folders, *SMALL))
    assert f"the classes are those of {root / 'labelmap.txt'}, in its order: background, crack, spall" in (
        capsys.readouterr().out)
    colors = read(root / "SegmentationClass/a.png")
    expected = (colors == [250, 50, 83]).all(-1) + 2 * (colors == [36, 179, 83]).all(-1)
    assert np.array_equal(data.train_ids(0), expected) and set(np.unique(expected)) == {0, 1, 2}
    lists = [str(root / "ImageSets/Segmentation/default.txt")]
    assert [len(CityscapesDataset(folders, data_list=lists, classes=data.classes))] == [2]


@pytest.mark.parametrize("text, names", [
    ("background:0,0,0::\ncrack:250,50,83::\n", None),
    ("crack:250,50,83::\nspall:36,179,83::\nbackground:0,0,0::\n", 3),
    ("# ids\nbackground:0,0,0::\ncrack:250,50,83::\nspall:36,179,83::\nmore:1,2,3::\n", 4)])
def test_a_table_of_cvat_counts_if_it_has_all_colors(tmp_path, text, names):
    shutil.copytree(GOLDEN / "cvat_masks", tmp_path / "x")
    (tmp_path / "x/labelmap.txt").write_text(text)
    folders = str(tmp_path / "x/JPEGImages"), str(tmp_path / "x/SegmentationClass")

    def infer():
        return infer_classes(all_label_maps(folders, None), folders, "--labels-dir l", 0, "c.csv")

    if names is None:
        assert "state their meaning by --classes" in refusal(infer)
    else:
        assert infer().num_classes == names
    # An image without any annotation is black: where black is not the first row, as an id it would mean another class.
    black = np.zeros((24, 32, 3), np.uint8)
    Image.fromarray(black).save(tmp_path / "x/SegmentationClass/c.png")
    Image.fromarray(black).save(tmp_path / "x/JPEGImages/c.png")
    if names == 4:
        assert infer().encode(black[..., 0]).max() == 0
    elif names == 3:
        assert "state their meaning by --classes" in refusal(infer)


def test_masks_of_roboflow_are_training_data(tmp_path, capsys):
    root = str(GOLDEN / "roboflow")
    data = samples(["--images-dir", root, "--labels-dir", root, "--val-every", "5", "--val-split", "valid", *SMALL])
    assert "_classes.csv, in its order: background, crack, spall" in capsys.readouterr().out
    assert [path.name for path in data.pairs[0]] == ["train_jpg.rf.00.png", "train_jpg.rf.00_mask.png"]
    assert len(data) == 1 and np.array_equal(data.train_ids(0), read(data.pairs[0][1]))
    assert [path.name for path in CityscapesDataset((root, root), "val").pairs[0]] == [
        "valid_jpg.rf.01.png", "valid_jpg.rf.01_mask.png"]       # its folder is named valid
    assert capsys.readouterr().out == ""        # the table is not named as a file that is left out


def test_in_one_folder_label_maps_end_in_mask(tmp_path):
    for name in ("a.jpg", "a_mask.png", "b_mask.jpg", "b_mask_mask.png"):
        Image.fromarray(np.zeros((4, 5), np.uint8)).save(tmp_path / name)
    data = CityscapesDataset((str(tmp_path), f"{tmp_path}/"))
    assert [[path.name for path in pair] for pair in data.pairs] == [["a.jpg", "a_mask.png"],
                                                                     ["b_mask.jpg", "b_mask_mask.png"]]
    (tmp_path / "a_mask.png").unlink()
    assert "found none with the stem of a.jpg" in refusal(CityscapesDataset, (str(tmp_path), str(tmp_path)))
    (tmp_path / "b_mask_mask.png").unlink()
    (tmp_path / "b_mask.jpg").unlink()
    assert "beside the images a.jpg, found neither" in refusal(CityscapesDataset, (str(tmp_path), str(tmp_path)))


# ---- names, sizes, orientation, splits


def test_images_are_those_of_the_source_alone(monkeypatch, tmp_path, capsys):
    """A name that leads out of the source names the image in it with the same end, or none."""
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "secret.png")
    names = {"x/a.png": (8, 8), "y/a.png": (8, 9)}
    write_coco(tmp_path / "s", names, [])
    listed = ["/home/me/x/a.png", r"C:\data\y\a.png", "../secret.png", str(tmp_path / "secret.png"), "a.png", "z/a.png",
              None, "..", ""]
    images = [{"id": number, "file_name": name} for number, name in enumerate(listed)]
    write_coco(tmp_path / "s", names, [(-5, 0, [SQUARE]), (-4, 0, [SQUARE])], images=images)
    run(monkeypatch, tmp_path / "s", tmp_path / "t")
    out = capsys.readouterr().out
    assert sorted(path.relative_to(tmp_path / "t").as_posix() for path in (tmp_path / "t").rglob("*.png")) == [
        "images/x_a.png", "images/y_a.png", "labels/x_a.png", "labels/y_a.png"]
    assert "image not found, or several of its name: 7, such as ../secret.png in instances.json" in out
    assert read(tmp_path / "t/labels/y_a.png").shape == (8, 9) and len(list(tmp_path.iterdir())) == 3


def test_coordinates_are_those_of_the_upright_image(monkeypatch, tmp_path, capsys):
    """As labelme and CVAT turn images; what states the size as stored is left out."""
    (tmp_path / "s").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("a.jpg", "b.jpg"):
        Image.fromarray(np.zeros((10, 20, 3), np.uint8)).save(tmp_path / "s" / name, exif=exif)
    write_coco(tmp_path / "s", {"a.jpg": (20, 10), "b.jpg": (10, 20)}, [(0, 0, [[0, 15, 5, 15, 5, 20, 0, 20]])])
    run(monkeypatch, tmp_path / "s", tmp_path / "t")
    out = capsys.readouterr().out
    assert np.argwhere(read(tmp_path / "t/labels/a.png")).tolist() == np.argwhere(np.pad(np.ones((5, 5)), (
        (15, 0), (0, 5)))).tolist()
    assert "b.jpg, expected 20×10, as in instances.json, found 10×20" in out
    assert [path.name for path in (tmp_path / "t/images").iterdir()] == ["a.jpg"]
    classes = ClassTable.read(tmp_path / "t/classes.csv")
    data = CityscapesDataset((tmp_path / "t/images", tmp_path / "t/labels"), classes=classes)
    assert data[0]["image"].shape == (3, 20, 10) and data[0]["label"].shape == (20, 10)


def test_words_in_folders_and_files_are_splits(monkeypatch, tmp_path, capsys):
    """The layout of COCO itself, with a name that both splits have."""
    root = tmp_path / "s"
    for split in ("train", "val"):
        write_coco(root, {f"{split}2017/a.png": (8, 8)}, [(0, split == "val", [SQUARE])],
                   f"annotations/instances_{split}2017.json", images=[{"id": 5, "file_name": "a.png"}])
    run(monkeypatch, root, tmp_path / "t")
    for split, largest in (("train", 1), ("val", 2)):
        assert (tmp_path / f"t/images/{split}/a.png").samefile(root / f"{split}2017/a.png")
        assert read(tmp_path / f"t/labels/{split}/a.png").max() == largest
    write_coco(root, {"more/b.png": (8, 8)}, [(0, 0, [SQUARE])], "more/c.json")
    assert refusal(run, monkeypatch, root, tmp_path / "u").startswith(
        f"{root}: expected all images in folders train, valid and test, or none, found 1 image elsewhere")
    shutil.rmtree(root / "more")
    shutil.rmtree(root / "val2017")
    capsys.readouterr()
    run(monkeypatch, root, tmp_path / "one")
    assert (tmp_path / "one/images/a.png").is_file()        # of one split only: its name is not needed
    assert "several of its name: 1, such as a.png in annotations/instances_val2017.json" in capsys.readouterr().out


def test_pixels_outside_are_background_or_ignored(monkeypatch, tmp_path):
    write_coco(tmp_path / "s", {"a.png": (8, 8)}, [(0, 0, [SQUARE]), (0, 1, [[4, 4, 8, 4, 8, 8, 4, 8]])])
    for flag, names, ids in (([], ["background", "crack", "spall"], {0, 1, 2}),
                             (["--ignore-rest"], ["crack", "spall"], {0, 1, 255})):
        run(monkeypatch, tmp_path / "s", tmp_path / "t", *flag)
        assert ClassTable.read(tmp_path / "t/classes.csv").names == names
        labels = read(tmp_path / "t/labels/a.png")
        assert set(np.unique(labels)) == ids and labels[5, 5] == names.index("spall")      # the later one is on top
        shutil.rmtree(tmp_path / "t")
    write_coco(tmp_path / "s", {"a.png": (8, 8)}, [(0, 0, [SQUARE])], categories=["crack"])
    assert refusal(run, monkeypatch, tmp_path / "s", tmp_path / "t", "--ignore-rest") == (
        "--ignore-rest: expected 2 to 254 classes, found crack")
    write_coco(tmp_path / "s", {"a.png": (8, 8)}, [], categories=map(str, range(300)))
    assert "expected 2 to 254 classes with background, found background, 0, 1 and 298 more" in refusal(
        run, monkeypatch, tmp_path / "s", tmp_path / "t")


def test_a_category_that_groups_others_is_no_class(monkeypatch, tmp_path):
    categories = [{"id": 0, "name": "defects", "supercategory": "none"},
                  {"id": 1, "name": " Background\n", "supercategory": "defects"},
                  {"id": 2, "name": "crack", "supercategory": "defects"}, {"id": 3, "name": "crack"}]
    write_coco(tmp_path / "s", {"a.png": (8, 8)}, [(0, 0, [SQUARE])], categories=[])
    content = json.loads((tmp_path / "s/instances.json").read_text())
    (tmp_path / "s/instances.json").write_text(json.dumps(content | {"categories": categories}))
    run(monkeypatch, tmp_path / "s", tmp_path / "t")
    assert ClassTable.read(tmp_path / "t/classes.csv").names == ["background", "crack"]
    assert read(tmp_path / "t/labels/a.png").sum() == 16


def test_a_stated_place_comes_before_a_search(monkeypatch, tmp_path, capsys):
    """Then the image beside a file of Labelme, one of the name elsewhere, and the one in the file."""
    root, one = tmp_path / "s", {"label": "crack", "points": [[0, 0], [4, 0], [4, 4]]}
    for place, color in (("a/x.png", 10), ("b/x.png", 20), ("c/z.png", 30), ("d/w.png", 40)):
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), color, np.uint8)).save(root / place)
    inside = base64.b64encode((root / "d/w.png").read_bytes()).decode()
    for place, more in (("a/x.json", {"imagePath": r"..\b\x.png"}), ("a/0.json", {"imagePath": "x.png"}),
                        ("c/z.json", {"imagePath": "old/x.png"}), ("e/x.json", {"imagePath": "w.png"}),
                        ("e/v.json", {"imagePath": "gone.png", "imageData": inside})):
        (root / place).parent.mkdir(exist_ok=True)
        (root / place).write_text(json.dumps({"shapes": [one], **more}))
    run(monkeypatch, root, tmp_path / "t")
    out = capsys.readouterr().out
    colors = {path.name: read(path)[0, 0, 0] for path in (tmp_path / "t/images").iterdir()}
    assert sorted(colors.values()) == [10, 20, 30, 40, 40] and "second annotation" not in out
    # A search does not take the image of a file that states it, whichever comes first.
    (root / "0.json").write_text(json.dumps({"shapes": [one | {"label": "spall"}], "imagePath": "z.png"}))
    for place in ("a/y.json", "d/y.json"):
        (root / place).write_text(json.dumps({"shapes": [one], "imagePath": "w.png", "imageData": inside}))
    run(monkeypatch, root, tmp_path / "u")
    assert "second annotation of an image: 3, such as c/z.png in 0.json; d/w.png in a/y.json; d/w.png in e/x.json" in (
        capsys.readouterr().out)
    assert ClassTable.read(tmp_path / "u/classes.csv").names == ["background", "crack"]


def test_later_annotations_get_the_same_ids(monkeypatch, tmp_path, capsys):
    write_coco(tmp_path / "first", {"a.png": (8, 8)}, [(0, 0, [SQUARE]), (0, 1, [[4, 4, 8, 4, 8, 8, 4, 8]])])
    write_coco(tmp_path / "later", {"b.png": (8, 8)}, [(0, 0, [SQUARE])], categories=["spall"])
    run(monkeypatch, tmp_path / "first", tmp_path / "t")
    more = re.search("python -m dataset.convert SOURCE TARGET (.*)", capsys.readouterr().out)[1].split()
    run(monkeypatch, tmp_path / "later", tmp_path / "u", *more)
    assert set(np.unique(read(tmp_path / "u/labels/b.png"))) == {0, 2}
    assert (tmp_path / "u/classes.csv").read_text() == (tmp_path / "t/classes.csv").read_text()
    assert "convert SOURCE TARGET" not in capsys.readouterr().out
    write_coco(tmp_path / "new", {"c.png": (8, 8)}, [(0, 0, [SQUARE])], categories=["dent"])
    assert refusal(run, monkeypatch, tmp_path / "new", tmp_path / "v", *more).endswith(
        "classes.csv: expected rows with ids up to 255 for all classes of the annotations, found none for dent; add "
        "them, where train_id 255 ignores a class")
    # Images that have only background are not without outlines.
    write_coco(tmp_path / "none", {"e.png": (8, 8)}, [(0, 0, [SQUARE])], categories=["background"])
    run(monkeypatch, tmp_path / "none", tmp_path / "y", *more)
    assert not read(tmp_path / "y/labels/e.png").any()
    # By a table that ships: outside is what it ignores.
    write_coco(tmp_path / "cars", {"d.png": (8, 8)}, [(0, 0, [SQUARE])], categories=["car"])
    run(monkeypatch, tmp_path / "cars", tmp_path / "w", "--classes", "cityscapes")
    assert set(np.unique(read(tmp_path / "w/labels/d.png"))) == {0, 26}
    (tmp_path / "two.csv").write_text("name,id,train_id,red,green,blue\ncar,3,0,0,0,0\nbus,4,1,1,1,1\n")
    for flag, row in (([], "a row background, or one with"), (["--ignore-rest"], "a row with")):
        assert f"two.csv: expected {row} train_id 255, for pixels outside" in refusal(
            run, monkeypatch, tmp_path / "cars", tmp_path / "x", "--classes", tmp_path / "two.csv", *flag)


def test_ids_that_contradict_the_table_beside_the_labels_are_not_scored(tmp_path, capsys):
    """As of an earlier conversion with other classes: a network would be scored by wrong names."""
    folders = tmp_path / "images", tmp_path / "labels"
    header = "name,id,train_id,red,green,blue\n"

    def compare(own, beside):
        for path, rows in (("own.csv", own), ("classes.csv", beside)):
            numbered = (row if row.count(",") > 1 else f"{row},{number}" for number, row in enumerate(rows))
            (tmp_path / path).write_text(header + "".join(f"{row},1,2,3\n" for row in numbered))
        check_meaning(folders, ClassTable.read(tmp_path / "own.csv"), tmp_path / "map.png")
        return capsys.readouterr().out

    for folder in folders:
        folder.mkdir()
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "map.png")
    assert compare(["road,0", "car,1"], ["Road,0", "car,1"]) == ""
    assert compare(["road,0", "car,1"], ["road,0", "car,1", "bus,2"]) == ""
    # Merged classes, in either table
    assert compare(["road,0", "car,1", "car,2,1"], ["road,0", "car,1", "truck,2"]) == ""
    assert compare(["road,0", "car,1", "truck,2"], ["road,0", "car,1", "car,2,1"]) == ""
    assert "classes.csv has truck for the id 1, which" in compare(["road,0", "car,1"], ["road,0", "truck,1"])
    for own, beside in ((["road,0", "car,1", "bus,2"], ["road,0", "bus,1"]),
                        (["road,0", "void,1,255", "bus,2,1"], ["road,0", "bus,1"])):
        assert re.search("classes.csv: expected the id 2 for bus, as in .*/own.csv, found 1; if the label maps have",
                         refusal(compare, own, beside))
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "map.png")       # colors, which are alike
    assert compare(["road,0", "car,1", "bus,2"], ["road,0", "bus,1"]) == ""
    (tmp_path / "classes.csv").unlink()
    # Of exports of masks: without ids in maps of ids, the table says nothing; in those of colors it does.
    (tmp_path / "labels/labelmap.txt").write_text("bus:9,9,9::\n")
    label_map, own = tmp_path / "labels/map.png", ClassTable.read(tmp_path / "own.csv")
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(label_map)
    check_meaning(folders, own, label_map)
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(label_map)
    assert "labelmap.txt: expected the color 1,2,3 for bus, as in" in refusal(check_meaning, folders, own, label_map)
    (tmp_path / "labels/labelmap.txt").unlink()
    (tmp_path / "labels/_classes.csv").write_text("Pixel Value, Class\n0, road\n1, bus\n")
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(label_map)
    assert "_classes.csv: expected the id 2 for bus, as in" in refusal(check_meaning, folders, own, label_map)


# ---- what is wrong


def test_what_cannot_be_converted_is_named(monkeypatch, tmp_path, capsys):
    root = tmp_path / "s"
    write_coco(root, {"a.png": (8, 8), "b.png": (8, 8), "c.png": (8, 8), "d.png": (8, 8)},
               [(0, 0, [SQUARE]), (9, 0, [SQUARE]), (0, 9, [SQUARE]), (0, 0, []), (0, 1, [[float("nan")] * 6]),
                (0, 1, [[2.6, 2.6, 3.4, 2.6, 3.4, 3.4]])])
    (root / "b.png").unlink()
    (root / "b.png").symlink_to("nowhere")
    (root / "c.png").write_bytes(b"no image")
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(root / "unlisted.png")
    (root / "loop").symlink_to(root, target_is_directory=True)
    for name, text in (("broken.json", "{"), ("deep.json", "[" * 100000), ("other.json", "[1]"), ("latin.json", "ä"),
                       ("z.json", '{"shapes": [], "imagePath": "a.png"}'), ("n.json", '{"shapes": 1, "imagePath": 2}'),
                       ("y.json", '{"shapes": [3, {"points": []}], "imagePath": ["?"], "imageData": "=?"}')):
        (root / name).write_text(text, encoding="latin-1")
    run(monkeypatch, root, tmp_path / "t")
    out = capsys.readouterr().out
    for sentence in ("image not found, or several of its name: 1, such as b.png in instances.json",
                     "image that cannot be read, or of another size: 2, such as c.png, expected an image, found a file",
                     "annotation of an image or a category that is not in its file: 2, such as image_id 14, category",
                     "annotation without an outline, such as a box: 1, such as crack in a.png",
                     "coordinates that are not finite numbers: 1, such as spall in a.png",
                     "file that is not valid JSON: 3, such as broken.json (Expecting property name",
                     "JSON neither of Labelme nor of COCO: 2, such as n.json; other.json",
                     "second annotation of an image: 1, such as a.png in z.json",
                     "image without annotations: 1, such as unlisted.png", "y.json, expected an image, found an empty"):
        assert sentence in out, out
    assert "without pixels: outline: 1, such as spall in a.png" in out
    assert "without outlines: image: 1, such as d.png" in out
    assert sorted(path.name for path in (tmp_path / "t").rglob("*.png")) == ["a.png", "a.png", "d.png", "d.png"]
    assert read(tmp_path / "t/labels/a.png").sum() == 16


@pytest.mark.parametrize("prepare, message", [
    (lambda root: None, "s: expected images and JSON files of Labelme or COCO, found 0 images and 0 JSON files"),
    (lambda root: (root / "a.json").write_text("[]"), "0 images and 1 JSON file; left out: JSON neither of Labelme"),
    (lambda root: write_coco(root, {"a.png": (8, 8)}, [], images=[]), "found 1 image and 1 JSON file"),
    (lambda root: (write_coco(root, {"a.png": (8, 8)}, []), (root / "a.png").write_bytes(b"")),
     "expected images that can be converted, found none; left out: image that cannot be read"),
    (lambda root: write_coco(root, {"a.png": (8, 8)}, [(0, 0, [])]),
     "expected outlines of classes, found none that covers a pixel; not drawn, so that its pixels are outside of "
     "outlines: annotation without an outline, such as a box: 1, such as crack in a.png")])
def test_without_anything_to_convert_there_is_no_target(monkeypatch, tmp_path, prepare, message):
    (tmp_path / "s").mkdir()
    prepare(tmp_path / "s")
    assert message in refusal(run, monkeypatch, tmp_path / "s", tmp_path / "t")
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_an_existing_target_is_kept(monkeypatch, tmp_path):
    source, target = GOLDEN / "supervision", tmp_path / "t"
    target.mkdir()
    (target / "mine").touch()
    assert "expected nothing there, or an empty folder, found a folder with content" in refusal(
        run, monkeypatch, source, target)
    assert "expected a folder outside of" in refusal(run, monkeypatch, tmp_path, target)
    assert "expected a folder, found nothing there" in refusal(run, monkeypatch, tmp_path / "gone", target)
    assert "t/mine/x: expected a folder that can be made, found: " in refusal(
        run, monkeypatch, source, target / "mine/x")
    (target / "mine").unlink()
    run(monkeypatch, source, target)
    assert len(list(target.rglob("*.png"))) == 4 and [path.name for path in tmp_path.iterdir()] == ["t"]


def test_sigterm_removes_what_is_unfinished(tmp_path):
    files = {f"{number}.png": (8, 8) for number in range(40)}
    write_coco(tmp_path / "s", files, [(number, 0, [SQUARE]) for number in range(40)])
    code = "import time, dataset.outlines as o; o.draw = lambda *_: time.sleep(9)\n" \
           "import dataset.convert as c; c.command.run(c.main)"
    process = start("-c", code, tmp_path / "s", tmp_path / "t", "--num-workers", "0")
    while not list(tmp_path.glob(".t.*.tmp/images/*.png")):
        assert process.poll() is None
        time.sleep(0.05)
    for _ in range(3):      # supervisors often repeat it
        process.terminate()
        time.sleep(0.01)
    status, _, error = finish(process)
    assert status == 128 + signal.SIGTERM and "Traceback" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


@pytest.mark.parametrize("workers", [0, 2])
def test_ctrl_c_leaves_everything_as_it_was(monkeypatch, tmp_path, workers):
    """Also what the worker processes would write, which are ended first."""
    files = {f"{number}.png": (8, 8) for number in range(50)}
    write_coco(tmp_path / "s", files, [(number, 0, [SQUARE]) for number in range(50)])
    written = []

    def interrupted(items, *_, **__):
        for number, item in enumerate(items):
            if number == 5:
                written.extend(tmp_path.glob(".t.*.tmp/labels/*.png"))
                raise KeyboardInterrupt
            yield item

    monkeypatch.setattr(convert, "progress", interrupted)
    words = [tmp_path / "s", tmp_path / "t", "--num-workers", workers]
    monkeypatch.setattr(sys, "argv", ["convert", *map(str, words)])
    others = set(multiprocessing.active_children())
    with pytest.raises(KeyboardInterrupt):
        convert.main()
    assert len(written) >= 5 and set(multiprocessing.active_children()) <= others
    assert [path.name for path in tmp_path.iterdir()] == ["s"] and len(list((tmp_path / "s").iterdir())) == 51
