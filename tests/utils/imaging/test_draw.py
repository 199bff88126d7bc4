"""Pictures of predictions, read back by Pillow."""

import numpy as np
from PIL import Image

from dataset.labels import ClassTable
from utils.imaging.draw import LONGEST_SIDE, overlay, save_jpeg, save_palette_png


def test_colors_and_overlays_are_those_of_the_palette(rng, tmp_path):
    classes = ClassTable.read()
    labels = rng.choice([*range(19), 255], (33, 47)).astype(np.uint8)
    image = rng.integers(0, 256, (33, 47, 3), dtype=np.uint8)
    colors = classes.palette[labels]
    assert np.array_equal(classes.color(labels), colors) and np.array_equal(classes.color(labels.astype(int)), colors)
    assert np.abs(overlay(image, colors) - (image / 2 + colors / 2)).max() <= 0.5
    assert np.abs(overlay(image, colors, 0.25) - (0.75 * image + 0.25 * colors)).max() <= 0.51
    save_palette_png(tmp_path / "color.png", labels, classes.palette)
    with Image.open(tmp_path / "color.png") as picture:
        assert picture.mode == "P" and np.array_equal(np.asarray(picture), labels)
        assert np.array_equal(np.asarray(picture.convert("RGB")), colors)


def test_a_jpeg_has_the_colors_and_at_most_the_longest_side(tmp_path):
    picture = np.zeros((40, LONGEST_SIDE + 800, 3), np.uint8)
    picture[..., 0], picture[:, :33_000, 2] = 250, 120
    for name, part in (("whole", picture), ("part", picture[:, 32_900:33_100])):
        save_jpeg(tmp_path / f"{name}.jpg", part)
        with Image.open(tmp_path / f"{name}.jpg") as jpeg:
            actual = np.asarray(jpeg).astype(int)
        width = min(part.shape[1], LONGEST_SIDE)
        assert actual.shape[1:] == (width, 3) and actual.shape[0] in (39, 40)
        assert np.abs(actual[:, :width // 3] - [250, 0, 120]).max() < 6
        assert np.abs(actual[:, -width // 3:] - [250, 0, 0]).max() < 6
