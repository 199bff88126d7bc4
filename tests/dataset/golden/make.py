"""Make the golden exports in this folder with the libraries of the labelling tools themselves:

    pip install labelme datumaro label-studio-sdk supervision      in an environment of its own
    python tests/dataset/golden/make.py tests/dataset/golden

Made with labelme 6.3.1 (its LabelFile), datumaro 1.13.12 (with which CVAT exports), label-studio-sdk 2.1.2 (its
converter), and supervision 0.31.2 (by Roboflow). labelme.png has the label map of labelme/a.json by labelme's own
shapes_to_label, without the line, to which it gives a width of 10 pixels. Roboflow's masks are made by its server, not
by a library: roboflow/ has their layout and file names.
"""

import base64
import csv
import io
import json
import shutil
import sys
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (24, 32)     # height, width
CLASSES = ["crack", "spall"]
POLYGON = [2.0, 2.0, 20.5, 3.25, 18.0, 15.0, 4.0, 12.75]
OVER = [15.0, 8.0, 30.0, 8.0, 30.0, 22.0, 15.0, 22.0]


def image(number):
    """RGB (H, W, 3) uint8."""
    rows, columns = np.indices(SIZE)
    return np.stack([rows * 10, columns * 7, rows * 0 + 60 * number], -1).astype(np.uint8)


def ring():
    """A mask (H, W) bool with a hole."""
    mask = np.zeros(SIZE, bool)
    mask[14:22, 2:12] = True
    mask[16:20, 5:9] = False
    return mask


def save_image(path, number):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image(number)).save(path)


def labelme(folder):
    from labelme._label_file import LabelFile
    from labelme.utils import shapes_to_label

    bitmap = io.BytesIO()
    Image.fromarray(ring()[14:22, 2:12]).save(bitmap, "PNG")

    def shape(label, kind, *points, mask=None):
        return {"label": label, "points": [list(map(float, point)) for point in points], "group_id": None,
                "description": "", "shape_type": kind, "flags": {}, "mask": mask}

    shapes = [shape("crack", "polygon", *zip(POLYGON[::2], POLYGON[1::2], strict=True)),
              shape("_background_", "rectangle", (8, 5), (12, 9)), shape("spall", "rectangle", (30, 22), (15, 8)),
              shape("crack", "circle", (25, 14), (25, 17)), shape("crack", "linestrip", (0, 0), (5, 5), (9, 0)),
              shape("spall", "mask", (2, 14), (11, 21), mask=base64.b64encode(bitmap.getvalue()).decode()),
              shape("__ignore__", "polygon", (28, 0), (32, 0), (32, 6))]
    save_image(folder / "a.png", 1)
    LabelFile().save(str(folder / "a.json"), shapes, "a.png", *SIZE)
    png = io.BytesIO()
    Image.fromarray(image(2)).save(png, "PNG")
    loaded = [one for one in LabelFile(str(folder / "a.json")).shapes if one["shape_type"] != "linestrip"]
    ids = {"_background_": 0, "crack": 1, "spall": 2, "__ignore__": 255}
    Image.fromarray(shapes_to_label(SIZE, loaded, ids)[0].astype(np.uint8)).save(folder.with_name("labelme.png"))
    LabelFile().save(str(folder / "b.json"), shapes[:1], "b.png", *SIZE, image_data=png.getvalue())


def datumaro_dataset(*names):
    from datumaro.components.annotation import Bbox, Mask, Polygon
    from datumaro.components.dataset import Dataset
    from datumaro.components.dataset_base import DatasetItem
    from datumaro.components.media import Image as Media

    shapes = [[Polygon(POLYGON, label=0, id=1, group=1), Polygon(OVER, label=1, id=2, group=2, z_order=1),
               Mask(ring(), label=1, id=3, group=3, z_order=2, attributes={"is_crowd": True})],
              [Polygon(POLYGON, label=0, id=4, group=4), Bbox(20, 15, 5, 6, label=1, id=5, group=5)]]
    items = [DatasetItem(name, subset="default", media=Media.from_numpy(image(number)[..., ::-1]), annotations=drawn)
             for number, (name, drawn) in enumerate(zip(names, shapes, strict=True))]
    return Dataset.from_iterable(items, categories=CLASSES)


def cvat_coco(folder):
    datumaro_dataset("a", "cam/b").export(str(folder), "coco_instances", save_media=True)


def cvat_masks(folder):
    label_map = {"background": [(0, 0, 0), [], []], "crack": [(250, 50, 83), [], []], "spall": [(36, 179, 83), [], []]}
    dataset = datumaro_dataset("a", "b").transform("polygons_to_masks")
    dataset.export(str(folder), "voc_segmentation", save_media=True, label_map=label_map, apply_colormap=True)


def label_studio(folder):
    from label_studio_sdk.converter import Converter

    config = ('<View><Image name="image" value="$image"/><PolygonLabels name="p" toName="image"><Label value="crack"/>'
              '<Label value="spall"/></PolygonLabels></View>')
    save_image(folder / "images/a.png", 1)

    def result(label, points):
        percent = [[100 * x / SIZE[1], 100 * y / SIZE[0]] for x, y in zip(points[::2], points[1::2], strict=True)]
        return {"from_name": "p", "to_name": "image", "type": "polygonlabels", "original_width": SIZE[1],
                "original_height": SIZE[0], "value": {"points": percent, "polygonlabels": [label]}}

    tasks = [{"id": 1, "data": {"image": "images/a.png"}, "annotations": [
        {"id": 1, "completed_by": 1, "result": [result("crack", POLYGON), result("spall", OVER)]}]}]
    source = folder / "tasks.json"
    source.write_text(json.dumps(tasks))
    converter = Converter(config, str(folder), download_resources=False)
    converter.convert_to_coco(str(source), str(folder), is_dir=False)
    source.unlink()
    # The converter names the image as a download, which it would be outside this folder.
    name = json.loads((folder / "result.json").read_text())["images"][0]["file_name"]
    (folder / "images/a.png").rename(folder / name)


def supervision(folder):
    import supervision as sv

    for number, split in enumerate(("train", "valid")):
        box = sv.polygon_to_mask(np.array(OVER).reshape(-1, 2).astype(int), SIZE[::-1]).astype(bool)
        masks = np.stack([box, ring()])
        detections = sv.Detections(xyxy=sv.mask_to_xyxy(masks).astype(float), mask=masks, class_id=np.array([1, 0]))
        name = f"{split}_jpg.rf.0{number}.png"
        save_image(folder / split / name, number)
        dataset = sv.DetectionDataset(CLASSES, [str(folder / split / name)], {str(folder / split / name): detections})
        dataset.as_coco(annotations_path=str(folder / split / "_annotations.coco.json"))


def roboflow(folder):
    for number, split in enumerate(("train", "valid")):
        name = f"{split}_jpg.rf.0{number}"
        save_image(folder / split / f"{name}.png", number)
        Image.fromarray(np.where(ring(), 2, 0).astype(np.uint8) + np.eye(*SIZE, dtype=np.uint8) * ~ring()).save(
            folder / split / f"{name}_mask.png")
        with open(folder / split / "_classes.csv", "w", newline="") as file:
            csv.writer(file).writerows([["Pixel Value", " Class"], [0, " background"], [1, " crack"], [2, " spall"]])


EXPORTS = {function.__name__: function for function in (labelme, cvat_coco, cvat_masks, label_studio, supervision,
                                                        roboflow)}

if __name__ == "__main__":
    for name, make in EXPORTS.items():
        shutil.rmtree(Path(sys.argv[1], name), ignore_errors=True)
        Path(sys.argv[1], name).mkdir(parents=True)
        make(Path(sys.argv[1], name).resolve())
