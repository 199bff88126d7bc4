"""Training transforms: image and label by one geometry."""

import cv2
import numpy as np
import pytest

from dataset.transforms import PADDING_COLOR, Window, train_transform


def coordinates(height, width):
    """An image whose first channels are x and y, and a label map of small blocks."""
    y, x = np.mgrid[0:height, 0:width]
    image = np.stack([x, y, np.zeros_like(x)], axis=2).astype(np.uint8)
    return image, (x // 8 + 16 * (y // 8)).astype(np.uint8)


@pytest.mark.parametrize("mirror", [False, True])
def test_image_and_label_move_together(rng, mirror):
    """The colors of a pixel say where it came from; the label must be the one of that place."""
    image, label = coordinates(120, 128)
    transform = train_transform((90, 70), mirror=mirror)
    mirrored = 0
    for _ in range(30):
        out, moved = transform(image, label, rng)
        assert out.shape == (90, 70, 3) and moved.shape == (90, 70)
        x, y = out[..., 0].astype(float), out[..., 1].astype(float)
        inside = cv2.erode((moved != 255).astype(np.uint8), np.ones((5, 5))) > 0
        middle = (np.abs(x % 8 - 3.5) < 2.5) & (np.abs(y % 8 - 3.5) < 2.5)    # away from the blocks' edges
        sure = inside & middle
        assert sure.sum() > 200
        assert (moved[sure] == (x // 8 + 16 * (y // 8))[sure]).all()
        mirrored += x[inside][0] > x[inside][-1] if (np.diff(x[45, 20:40]) < 0).all() else 0
    assert (mirrored > 0) == mirror


def test_window_is_a_plain_cut_at_scale_one(rng):
    image = rng.integers(256, size=(50, 60, 3)).astype(np.uint8)
    label = rng.integers(19, size=(50, 60)).astype(np.uint8)
    out, moved = Window((20, 30), 1.0, 7, 11, False).pair(image, label, 255)
    assert np.array_equal(out, image[7:27, 11:41]) and np.array_equal(moved, label[7:27, 11:41])
    out, moved = Window((20, 30), 1.0, 7, 11, True).pair(image, label, 255)
    assert np.array_equal(out, image[7:27, 11:41][:, ::-1]) and np.array_equal(moved, label[7:27, 11:41][:, ::-1])


@pytest.mark.parametrize("scale", [0.5, 0.75, 1.5, 2.0])
def test_equals_scaling_everything_and_then_cutting(rng, scale):
    """OpenCV's resize of the whole image, then a crop: the same pixels to rounding."""
    image = cv2.GaussianBlur(rng.integers(256, size=(120, 160, 3)).astype(np.uint8), (0, 0), 2)
    label = np.kron(rng.integers(19, size=(15, 20)), np.ones((8, 8))).astype(np.uint8)
    whole = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_LINEAR)
    whole_label = cv2.resize(label, None, fx=scale, fy=scale, interpolation=cv2.INTER_NEAREST_EXACT)
    out, moved = Window((40, 50), scale, 9, 13, False).pair(image, label, 255)
    assert np.abs(out.astype(int) - whole[9:49, 13:63]).max() <= 2
    assert (moved != whole_label[9:49, 13:63]).mean() < 0.01


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("scale", [0.6, 1.0, 1.5, 2.0, 4.0])
def test_the_edge_is_repeated_and_not_mixed_with_padding(rng, scale, mirrored):
    """OpenCV's resize to the last pixel at the border, and nothing but padding beyond it."""
    image = cv2.GaussianBlur(rng.integers(256, size=(20, 40, 3)).astype(np.uint8), (0, 0), 2)
    image[:, ::39] = image[::19] = (255, 0, 255)
    whole = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_LINEAR)
    height, width = whole.shape[:2]
    out, moved = Window((90, 170), scale, 0, 0, mirrored).pair(image, np.zeros((20, 40), np.uint8), 255)
    if mirrored:
        out, moved = out[:, ::-1], moved[:, ::-1]
    assert (moved[:height, :width] == 0).all() and (moved == 0).sum() == height * width
    assert np.abs(out[:height, :width].astype(int) - whole).max() <= 10    # OpenCV 4 weighs in steps of 1 / 32
    assert (out[moved == 255] == PADDING_COLOR).all()


def test_outside_is_padding(rng):
    image, label = np.full((10, 10, 3), 200, np.uint8), np.zeros((10, 10), np.uint8)
    out, moved = train_transform((16, 20), scale_range=None, mirror=False)(image, label, rng)
    assert (moved[:10, :10] == 0).all() and (moved[10:] == 255).all() and (moved[:, 10:] == 255).all()
    assert (out[12, 15] == PADDING_COLOR).all() and (out[:10, :10] == 200).all()


def test_every_window_of_the_image_occurs(rng):
    image, label = coordinates(12, 10)
    seen = {tuple(train_transform((8, 8), None, False)(image, label, rng)[0][0, 0, :2]) for _ in range(400)}
    assert seen == {(x, y) for x in range(3) for y in range(5)}


def test_scales_fill_the_range(rng):
    image, label = coordinates(200, 200)
    transform = train_transform((60, 60), (0.5, 2.0), False)
    rows = [transform(image, label, rng)[0][30, 10:50, 0].astype(float) for _ in range(200)]
    scales = 1 / np.array([np.diff(row).mean() for row in rows])
    assert 0.48 < scales.min() < 0.6 and 1.8 < scales.max() < 2.1


def test_draws_depend_on_the_generator_alone():
    image, label = coordinates(64, 64)
    transform = train_transform((32, 32))
    a, b = (transform(image, label, np.random.default_rng(9)) for _ in range(2))
    assert np.array_equal(a[0], b[0]) and np.array_equal(a[1], b[1])
