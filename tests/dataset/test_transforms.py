"""Training transforms: image and label by one geometry."""

import itertools
import math

import cv2
import numpy as np
import pytest
from PIL import Image

from dataset.cityscapes import CityscapesDataset
from dataset.transforms import PADDING_COLOR, Window, train_transform


def coordinates(height, width):
    """An image whose first channels are x and y, and a label map of small blocks."""
    y, x = np.mgrid[0:height, 0:width]
    image = np.stack([x, y, np.zeros_like(x)], axis=2).astype(np.uint8)
    return image, (x // 8 + 16 * (y // 8)).astype(np.uint8)


@pytest.mark.parametrize("mirror, turned", [(False, {}), (True, {}), (True, {
    "rotate": 180, "vertical_flip": True, "quarter_turns": True, "blur": 0.4})], ids=["plain", "mirror", "turned"])
def test_image_and_label_move_together(rng, mirror, turned):
    """The colors of a pixel say where it came from; the label must be the one of that place."""
    image, label = coordinates(120, 128)
    transform = train_transform((90, 70), mirror=mirror, **turned)
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
    assert (mirrored > 0) == mirror or turned


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


def test_without_the_other_flags_windows_are_those_of_earlier_versions():
    """Frozen: scale, place and mirroring of three windows, and the number that the generator gives next."""
    for seed, focus, *expected in ((7, None, 1.4376431999070005, 109, 163, True, 241814378),
                                   (8, (100, 20), 0.9904584149083411, 73, 20, True, 846697972),
                                   (9, None, 1.805373805955127, 111, 69, True, 834870864)):
        rng = np.random.default_rng(seed)
        actual = train_transform((33, 49)).choose((120, 160), rng, focus)
        assert [actual.scale, actual.top, actual.left, actual.mirrored, int(rng.integers(1 << 30))] == expected
        assert (actual.angle, actual.flipped, actual.turns, actual.blur) == (0, False, 0, 0)


def test_other_flags_draw_after_the_window():
    """Scale and mirroring stay those of the same entry without them; each choice occurs, and nothing else does."""
    plain, turned = train_transform((33, 33)), train_transform((33, 33), rotate=20, vertical_flip=True,
                                                               quarter_turns=True, blur=1.5)
    windows = []
    for seed in range(200):
        a, b = (transform.choose((120, 160), np.random.default_rng(seed)) for transform in (plain, turned))
        assert (a.scale, a.top, a.left, a.mirrored) == (b.scale, b.top, b.left, b.mirrored)
        windows.append(b)
    assert {(window.turns, window.flipped) for window in windows} == {*itertools.product(range(4), (False, True))}
    angles, blurs = [window.angle for window in windows], [window.blur for window in windows]
    assert -20 <= min(angles) < -18 and 18 < max(angles) <= 20
    assert 60 < blurs.count(0) < 140 and 1.3 < max(blurs) <= 1.5


@pytest.mark.parametrize("turns, flipped, mirrored", [*itertools.product(range(4), (False, True), (False, True))])
def test_flips_and_quarter_turns_are_pillows(rng, turns, flipped, mirrored):
    """To the pixel, of a window that reaches beyond the image, for label maps of ids and of colors."""
    image = rng.integers(256, size=(40, 50, 3)).astype(np.uint8)
    label = rng.integers(19, size=(40, 50)).astype(np.uint8)
    window = Window((30, 20), 1.0, 25, 35, mirrored=mirrored, flipped=flipped, turns=turns)
    height, width = window.frame
    assert (height, width) == ((20, 30) if turns % 2 else (30, 20))
    padded_image = np.full((80, 90, 3), PADDING_COLOR, np.uint8)
    padded_label = np.full((80, 90), 255, np.uint8)
    padded_image[:40, :50], padded_label[:40, :50] = image, label
    expected = []
    for padded in (padded_image, padded_label):
        cut = Image.fromarray(padded[25:25 + height, 35:35 + width])
        for used, operation in ((mirrored, Image.Transpose.FLIP_LEFT_RIGHT), (flipped, Image.Transpose.FLIP_TOP_BOTTOM),
                                (turns == 1, Image.Transpose.ROTATE_90), (turns == 2, Image.Transpose.ROTATE_180),
                                (turns == 3, Image.Transpose.ROTATE_270)):
            cut = cut.transpose(operation) if used else cut
        expected.append(np.asarray(cut))
    assert all(map(np.array_equal, window.pair(image, label, 255), expected))
    ids = np.stack([label] * 3, axis=2)
    assert np.array_equal(window.ignore_outside(window.label(ids), ids.shape, 255), np.stack([expected[1]] * 3, axis=2))


def by_hand(window, image, label):
    """A rotated window, pixel by pixel: bilinear image, nearest label, and where they come from, in float64."""
    height, width = window.frame
    out, moved = np.empty((height, width, 3)), np.empty((height, width), np.uint8)
    cos, sin = math.cos(math.radians(window.angle)), math.sin(math.radians(window.angle))
    for i, j in np.ndindex(height, width):
        x, y = j + 0.5 - width / 2, i + 0.5 - height / 2        # from the center; y points down
        x, y = cos * x - sin * y, sin * x + cos * y             # where this was before a counterclockwise rotation
        x = (window.left + width / 2 + (-x if window.mirrored else x)) / window.scale
        y = (window.top + height / 2 + y) / window.scale
        row, column = math.floor(y), math.floor(x)
        if not (0 <= row < label.shape[0] and 0 <= column < label.shape[1]):
            out[i, j], moved[i, j] = PADDING_COLOR, 255
            continue
        moved[i, j] = label[row, column]
        x, y = x - 0.5, y - 0.5                                 # between the centers of four pixels
        rows, columns = (np.clip([math.floor(v), math.floor(v) + 1], 0, side - 1)
                         for v, side in zip((y, x), label.shape, strict=True))
        u, v = x - math.floor(x), y - math.floor(y)
        out[i, j] = ((1 - v) * ((1 - u) * image[rows[0], columns[0]] + u * image[rows[0], columns[1]].astype(float))
                     + v * ((1 - u) * image[rows[1], columns[0]] + u * image[rows[1], columns[1]].astype(float)))
    return out, moved


@pytest.mark.parametrize("angle, scale, mirrored", [(17.0, 1.0, False), (-128.0, 1.4, True), (33.0, 0.7, True)])
def test_a_rotation_is_the_formula_pixel_by_pixel(rng, angle, scale, mirrored):
    image = cv2.GaussianBlur(rng.integers(256, size=(60, 70, 3)).astype(np.uint8), (0, 0), 2)
    label = rng.integers(19, size=(60, 70)).astype(np.uint8)
    window = Window((41, 50), scale, top=9, left=30, mirrored=mirrored, angle=angle)
    out, moved = window.pair(image, label, 255)
    expected, expected_label = by_hand(window, image, label)
    assert 0 < (expected_label == 255).sum() < 1600
    assert np.array_equal(moved, expected_label)
    assert np.abs(out - expected).max() <= 3        # OpenCV interpolates in steps of 1 / 32
    assert (out[moved == 255] == PADDING_COLOR).all()


def test_a_rotation_is_counterclockwise_as_pillows(rng):
    label = np.kron(rng.integers(19, size=(8, 9)), np.ones((8, 8))).astype(np.uint8)
    window = Window(label.shape, 1.0, top=0, left=0, mirrored=False, angle=25.0)
    expected = np.asarray(Image.fromarray(label).rotate(25, Image.Resampling.NEAREST, fillcolor=255))
    actual = window.ignore_outside(window.label(label), label.shape, 255)
    assert (actual != expected).mean() < 0.01 and (actual == 255).any()


@pytest.mark.parametrize("mirror", [False, True])
def test_a_rotated_window_contains_its_pixel(mirror):
    """Also in the corners of the image, and with quarter turns."""
    transform = train_transform((40, 24), (1.0, 2.0), mirror, rotate=180, quarter_turns=True, vertical_flip=True)
    image = np.zeros((60, 80, 3), np.uint8)
    for seed in range(300):
        rng = np.random.default_rng(seed)
        row, column = (0, 59)[seed % 2] if seed % 3 else 30, (0, 79)[seed // 2 % 2] if seed % 5 else 40
        label = np.zeros((60, 80), np.uint8)
        label[max(0, row - 1):row + 2, max(0, column - 1):column + 2] = 1       # rotated, one pixel may fall between
        _, moved = transform.choose(label.shape, rng, (row, column)).pair(image, label, 255)
        assert (moved == 1).any(), seed


def test_blur_is_a_gaussian_of_the_image_alone(rng):
    """That of SciPy; neither the label nor the padding changes, and the edge is not mixed with the padding."""
    ndimage = pytest.importorskip("scipy.ndimage")
    image = rng.integers(256, size=(40, 50, 3)).astype(np.uint8)
    label = rng.integers(19, size=(40, 50)).astype(np.uint8)
    sharp, blurred = (Window((48, 60), 1.0, 0, 0, False, blur=blur).pair(image, label, 255) for blur in (0.0, 1.3))
    assert np.array_equal(sharp[1], blurred[1])
    assert (blurred[0][40:] == PADDING_COLOR).all() and (blurred[0][:, 50:] == PADDING_COLOR).all()
    expected = ndimage.gaussian_filter(image.astype(float), (1.3, 1.3, 0), mode="nearest")
    assert np.abs(blurred[0][:40, :50] - expected).max() <= 1.5 < np.abs(sharp[0][:40, :50] - expected).max()


def test_turned_samples_are_a_function_of_seed_and_entry(streets):
    transform = train_transform((33, 49), rotate=30, vertical_flip=True, quarter_turns=True, blur=2)
    a, b = (CityscapesDataset(streets, transform=transform, seed=5) for _ in range(2))
    for key in ((0, 3), (4, 7), (4, 8, (100, 250))):
        first, second = a[key], b[key]
        assert first["image"].shape == (3, 33, 49) and first["label"].shape == (33, 49)
        assert first["image"].is_contiguous() and first["image"].equal(second["image"])
        assert first["label"].equal(second["label"]) and not first["image"].equal(a[key[0], 9]["image"])
