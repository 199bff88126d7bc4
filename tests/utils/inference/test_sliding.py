"""Sliding windows, scales and mirror."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import evaluate
from networks.build import build_network
from utils.devices import memory
from utils.inference.sliding import SlidingPredictor, _Pass, add_at_once, add_by_strips, window_starts
from utils.ops.normalization import Normalization
from utils.ops.upsampling import round_size

PLAIN = Normalization("RGB", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


@settings(deadline=None)
@given(st.integers(1, 3000), st.integers(1, 1000), st.floats(0, 0.95))
def test_windows_cover_exactly(length, window, overlap):
    starts = window_starts(length, window, overlap)
    if length <= window:
        assert starts == [0]
        return
    assert starts[0] == 0 and starts[-1] + window == length
    gaps = np.diff(starts)
    assert (gaps > 0).all() and (gaps <= max(1, window * (1 - overlap))).all()


def test_window_sizes_are_rounded_up():
    assert round_size((769, 770)) == (769, 777) and round_size((256, 512)) == (257, 513)


def where_network(images):
    """Logits (x, 0) at stride 8, from images whose pixels hold their own x and y: the position comes back."""
    cells = images[:, :, ::8, ::8]
    return {"fine": torch.stack([cells[:, 0] / 40, cells[:, 1] / 40, torch.zeros_like(cells[:, 0])], dim=1)}


def positions(probabilities):
    """Undo the softmax of `where_network` → x, y."""
    logits = probabilities.log()
    return (logits[0] - logits[2]) * 40, (logits[1] - logits[2]) * 40


@pytest.mark.parametrize("scales", [(1.0,), (0.75,), (1.5,), (2.0,), (0.75, 1.0, 1.25, 1.5, 1.75, 2.0)])
@pytest.mark.parametrize("window", [(65, 81), None])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("size", [(120, 200), (200, 120), (40, 60)])
def test_coordinates_come_back(scales, window, flip, size):
    """To a tenth of a pixel: half a pixel of shift per scale, or aligned corners off the 8k + 1 grid, would show.

    Within half a cell of the border interpolation has nothing to lean on, so the border is left out.
    """
    height, width = size
    y, x = np.mgrid[0:height, 0:width]
    image = np.stack([x, y, 0 * x], axis=2).astype(np.uint8)
    predictor = SlidingPredictor(where_network, window, scales=scales, flip=flip, normalization=PLAIN)
    probabilities = predictor(image)
    assert probabilities.shape == (3, height, width)
    found_x, found_y = positions(probabilities)
    inner = (slice(12, -12), slice(12, -12))
    assert (found_x[inner] - torch.tensor(x)[inner]).abs().max() < 0.1
    assert (found_y[inner] - torch.tensor(y)[inner]).abs().max() < 0.1


def local_network(images):
    """A network that looks at one cell only, so that windows cannot differ: stride 8, five classes."""
    torch.manual_seed(1)
    weight = torch.randn(5, 3, dtype=images.dtype) / 60
    cells = torch.einsum("nc,bchw->bnhw", weight, images[:, :, ::8, ::8])
    return {"fine": cells, "coarse": -cells}


def numpy_reference(image, window, overlap):
    """One window at a time, float64, no torch: upsample each cell grid by hand, softmax, sum, divide."""
    height, width, _ = image.shape
    window = [min(side, next(n for n in range(length, length + 8) if n % 8 == 1))
              for length, side in zip((height, width), window, strict=True)]
    padded = np.zeros((max(height, window[0]), max(width, window[1]), 3))
    padded[:height, :width] = image
    torch.manual_seed(1)
    weight = torch.randn(5, 3).numpy().astype(np.float64) / 60
    total, count = np.zeros((5, *padded.shape[:2])), np.zeros(padded.shape[:2])

    def lines(n):       # interpolation matrix from (n - 1) / 8 + 1 cells to n pixels, corners aligned
        place = np.arange(n) / 8
        low = np.minimum(place.astype(int), (n - 1) // 8 - 1)
        matrix = np.zeros((n, (n - 1) // 8 + 1))
        matrix[np.arange(n), low] = 1 - (place - low)
        matrix[np.arange(n), low + 1] += place - low
        return matrix

    def starts(length, size):
        step, out = int(size * (1 - overlap)), [0]
        while out[-1] + size < length:
            out.append(min(out[-1] + step, length - size))
        return out

    for top in starts(height, window[0]):
        for left in starts(width, window[1]):
            area = (slice(top, top + window[0]), slice(left, left + window[1]))
            cells = np.einsum("nc,hwc->nhw", weight, padded[area][::8, ::8])
            logits = lines(window[0]) @ cells @ lines(window[1]).T
            p = np.exp(logits - logits.max(0))
            total[(slice(None), *area)] += p / p.sum(0)
            count[area] += 1
    return (total / count)[:, :height, :width]


@pytest.mark.parametrize("size", [(90, 150), (150, 90), (30, 40), (66, 200), (65, 73)])
@pytest.mark.parametrize("batch", [1, 3, 100])
def test_equals_the_slow_reference(rng, size, batch):
    image = rng.integers(256, size=(*size, 3)).astype(np.uint8)
    predictor = SlidingPredictor(local_network, (65, 73), batch_size=batch, normalization=PLAIN)
    expected = numpy_reference(image.astype(np.float64), (65, 73), 1 / 3)
    assert np.abs(predictor(image).numpy() - expected).max() < 1e-5


def test_probabilities_are_averaged_at_image_size(rng):
    """Multi-scale is the mean of its passes; single-scale is one of them."""
    image = rng.integers(256, size=(50, 70, 3)).astype(np.uint8)
    make = dict(window=(33, 33), normalization=PLAIN)
    both = SlidingPredictor(local_network, scales=(0.5, 1.0), flip=True, **make).predict(image)
    passes = [SlidingPredictor(local_network, scales=(s,), **make)(image) for s in (0.5, 1.0)]
    mirrored = [SlidingPredictor(local_network, scales=(s,), **make)(image[:, ::-1].copy()).flip(-1)
                for s in (0.5, 1.0)]
    torch.testing.assert_close(both["single_scale"]["fine"], passes[1])
    torch.testing.assert_close(both["multi_scale"]["fine"], torch.stack(passes + mirrored).mean(0))
    assert set(both["multi_scale"]) == {"fine", "coarse"}
    torch.testing.assert_close(both["multi_scale"]["fine"].sum(0), torch.ones(50, 70))


def test_heads_that_are_not_asked_for_cost_nothing(rng, monkeypatch):
    """Labels are those of the fine head; a GPU spends a tenth of an evaluation on adding up both."""
    image = rng.integers(256, size=(50, 70, 3)).astype(np.uint8)
    predictor = SlidingPredictor(local_network, (33, 33), scales=(0.5, 1.0))
    both, added = predictor.predict(image)["multi_scale"], []
    monkeypatch.setattr(_Pass, "add", lambda self, name, *rest, add=_Pass.add: added.append(name) or add(
        self, name, *rest))
    assert torch.equal(predictor.labels(image), both["fine"].argmax(0)) and set(added) == {"fine"}
    actual = predictor.predict(image, ("coarse",))["multi_scale"]
    assert actual.keys() == {"coarse"} and torch.equal(actual["coarse"], both["coarse"])


@pytest.mark.parametrize("scales", [(1.0,), (0.7, 1.0, 2.0)])
@pytest.mark.parametrize("size", [(20, 24), (1, 1), (60, 24)])
def test_a_window_larger_than_the_image_is_the_image(size, scales):
    """Every pixel of a window enters ECA's means and ACF's class centers, the padding too."""
    torch.manual_seed(3)
    network = build_network("acfnet_resnet", 5, "eca_resnet18").eval()
    image = np.random.default_rng(2).integers(256, size=(*size, 3), dtype=np.uint8)
    large, whole = (SlidingPredictor(network, window, scales=scales)(image) for window in ((129, 129), None))
    assert torch.equal(large, whole)


def test_the_sides_of_windows():
    """At most the scaled image's, rounded up to the network's grid, each side for itself."""
    shapes = []

    def network(crops):
        shapes.append(tuple(crops.shape[2:]))
        return local_network(crops)

    predictor = SlidingPredictor(network, (65, 97), scales=(0.5, 1.0, 2.0), batch_size=1)
    predictor(np.zeros((50, 80, 3), np.uint8))
    assert list(dict.fromkeys(shapes)) == [(25, 41), (57, 81), (65, 97)]    # of 25×40, 50×80 and 100×160
    shapes.clear()
    network.grid = (32, 0)
    predictor = SlidingPredictor(network, (65, 97), scales=(0.5, 1.0, 2.0), batch_size=1)
    assert predictor.window == (96, 128)
    predictor(np.zeros((50, 80, 3), np.uint8))
    assert list(dict.fromkeys(shapes)) == [(32, 64), (64, 96), (96, 128)]


@pytest.mark.parametrize("scale", evaluate.PAPER_SCALES)
def test_windows_of_cityscapes_are_all_of_full_size(scale):
    """0.75 is the least scale of the paper's protocol: 768 pixels, rounded up, are the 769 of the window."""
    one = _Pass(scale, False, (1024, 2048), (769, 769), 1 / 3, torch.device("cpu"))
    assert one.window == (769, 769) and one.padded == (max(769, 1024 * scale), 2048 * scale)


def test_normalization_is_the_documented_one(rng):
    image = torch.from_numpy(rng.integers(256, size=(1, 3, 4, 5)).astype(np.uint8))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (image / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    torch.testing.assert_close(Normalization()(image), expected)
    bgr = Normalization("BGR", (103.0, 116.0, 123.0), (1.0, 1.0, 1.0))
    torch.testing.assert_close(bgr(image), image.float().flip(1) - torch.tensor([103.0, 116, 123]).view(3, 1, 1))
    assert Normalization.from_config(bgr.as_config()) == bgr


def test_labels_and_tensors(rng):
    image = rng.integers(256, size=(40, 40, 3)).astype(np.uint8)
    predictor = SlidingPredictor(local_network, (33, 33), normalization=PLAIN)
    assert torch.equal(predictor.labels(image).long(), predictor(torch.from_numpy(image)).argmax(0))


@pytest.mark.parametrize("wrong, actual", [
    (lambda image: image / 255, r"float64 \(40, 50, 3\)"), (lambda image: image.astype(np.float32), "float32"),
    (lambda image: image.transpose(2, 0, 1), r"uint8 \(3, 40, 50\)"), (lambda image: image[..., 0], r"\(40, 50\)"),
    (lambda image: image[None], r"\(1, 40, 50, 3\)"), (lambda image: image[:0], r"\(0, 50, 3\)"),
    (lambda image: torch.from_numpy(image).float(), "float32"),
    (lambda image: np.dstack([image, image[..., :1]]), r"\(40, 50, 4\)"),
])
def test_other_kinds_of_images_are_refused(rng, wrong, actual):
    """Numbers from 0 to 1 would pass for a nearly black image."""
    image = rng.integers(256, size=(40, 50, 3)).astype(np.uint8)
    predictor = SlidingPredictor(local_network, (33, 33), normalization=PLAIN)
    with pytest.raises(ValueError, match=rf"image: expected uint8 \(H, W, 3\) RGB, found .*{actual}"):
        predictor(wrong(image))
    turned = image[::-1, ::-1]      # a view, which torch takes a copy of only
    assert torch.equal(predictor(turned), predictor(turned.copy()))


@pytest.mark.parametrize("wrong", [{"overlap": 1.0}, {"scales": ()}, {"scales": (1.0, 0.0)}])
def test_impossible_protocols_are_refused(wrong):
    with pytest.raises(ValueError, match="expected"):
        SlidingPredictor(local_network, **wrong)


def test_interpolation_of_windows_matches_torch():
    """The reference's hand-made interpolation is torch's, so the comparison above means something."""
    cells = torch.arange(9.0).view(1, 1, 3, 3)
    large = F.interpolate(cells, size=(17, 17), mode="bilinear", align_corners=True)
    assert torch.equal(large[0, 0, ::8, ::8], cells[0, 0])


@pytest.mark.parametrize("add", [add_by_strips, add_at_once])
@pytest.mark.parametrize("spread", [1.0, 10.0, 100.0, 3000.0])
@pytest.mark.parametrize("shape, size", [((19, 97, 97), (769, 769)), ((3, 5, 7), (33, 49)), ((2, 1, 1), (8, 9)),
                                         ((4, 9, 6), (100, 37)), ((5, 3, 3), (3, 3))])
def test_what_a_window_adds_is_softmax_of_the_upsampled_logits(shape, size, spread, add):
    """Also where classes lie thousands apart, so that without care all of them would vanish between two cells."""
    logits = torch.randn(shape) * spread
    total = torch.zeros(shape[0], *size)
    rows, columns = torch.rand(size[0]), torch.rand(size[1])
    add(total, logits, rows, columns)
    up = F.interpolate(logits.double()[None], size=size, mode="bilinear", align_corners=True)[0]
    expected = (up.softmax(0) * rows[:, None] * columns).float()
    # Interpolation itself rounds logits to float32, which moves probabilities by their size times 1e-7.
    torch.testing.assert_close(total, expected, rtol=0, atol=1e-6 * max(1, spread))


@pytest.mark.parametrize("window", [(33, 49), (97, 65), None])
def test_the_batch_of_windows_does_not_matter(window):
    """Windows of different scales and sides share a batch where they are of one size."""
    image = np.random.default_rng(2).integers(0, 256, (70, 110, 3), dtype=np.uint8)
    torch.manual_seed(3)
    network = build_network("acfnet_resnet", 5, "resnet18").eval()
    results = [SlidingPredictor(network, window, scales=(0.75, 1.0, 1.3), flip=True, batch_size=size).predict(image)
               for size in (1, 3, 16)]
    for other in results[1:]:
        for protocol, heads in results[0].items():
            for head, probabilities in heads.items():
                torch.testing.assert_close(other[protocol][head], probabilities, rtol=0, atol=1e-5)


class Cells(torch.nn.Module):
    """One convolution to logits of five classes at stride 8."""

    def __init__(self):
        super().__init__()
        self.convolution = torch.nn.Conv2d(3, 5, 1, stride=8)

    def forward(self, images):
        return {"fine": self.convolution(images)}


@pytest.mark.parametrize("window, scales, flip, needed", [
    # pixels of three channels, and then either the maps of all classes or the batch with its logits
    (None, (1.0,), False, 65 * 73 * (12 + 20)), (None, (100.0,), False, 6505 * 7305 * (12 + 20)),
    ((1025, 1025), (1.0,), False, 65 * 73 * (12 + 20)),
    ((1025, 1025), (0.5, 1.0), True, 65 * 73 * (12 + 2 * (65 ** 2 * 12 + 81 * 20) / 72 ** 2)),
])
def test_memory_that_is_not_there_is_not_asked_for(monkeypatch, window, scales, flip, needed):
    predictor = SlidingPredictor(Cells(), window, scales=scales, flip=flip)
    image = np.zeros((65, 73, 3), np.uint8)
    monkeypatch.setattr(memory, "free_bytes", lambda device: needed * 0.99)
    monkeypatch.setattr(predictor, "_run", lambda *_: iter(()))
    with pytest.raises(MemoryError, match=f"an image of 73×65 needs at least {needed / 1e9:.1f} GB, but only .* free"):
        predictor.predict(image)
    monkeypatch.setattr(memory, "free_bytes", lambda device: needed * 1.01)
    predictor.predict(image)


def test_calls_of_the_network_are_as_few_as_its_batch_allows():
    calls = []

    def network(crops):
        calls.append(len(crops))
        return local_network(crops)

    SlidingPredictor(network, (33, 49), scales=(1.0, 1.5), flip=True, batch_size=5)(np.zeros((70, 110, 3), np.uint8))
    windows = 2 * (3 * 3 + 5 * 5)
    assert sum(calls) == windows and len(calls) == -(-windows // 5)


def test_the_watch_is_left_alone_when_it_has_heard_enough():
    received = []
    network = lambda x: {"fine": F.avg_pool2d(x, 8, 8, ceil_mode=True)}     # noqa: E731
    predictor = SlidingPredictor(network, (33, 33), batch_size=1,
                                 watch=lambda done, windows: received.append(done) or done == windows)
    image = torch.zeros(33, 49, 3, dtype=torch.uint8)
    predictor(image), predictor(image)
    assert received == [0, 1, 2] and predictor.watch is None
