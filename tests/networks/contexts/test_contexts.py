"""The contexts and heads of the networks beside ACFNet, each against its definition written out in loops."""

import math

import pytest
import torch
import torch.nn.functional as F

from libs.abn import ABN
from networks.contexts.aspp import ASPP
from networks.contexts.attention import attend
from networks.contexts.criss_cross import CrissCross, CrissCrossAttention
from networks.contexts.dual_attention import ChannelAttention, DualAttention, DualHead, PositionAttention
from networks.contexts.object_context import BaseObjectContext, ObjectContext, PyramidObjectContext
from networks.contexts.psp import PyramidPooling
from networks.ocr import OCRHead
from tests.benchmarks.memory import kept_bytes
from tests.conftest import randomize
from tests.networks.test_acf import assert_same_gradients, conv

SIZES = [(5, 3), (1, 4), (4, 1), (1, 1), (7, 6)]


def prepared(module, dtype=torch.float64):
    """With weights of any kind, gammas among them, and norms that use their statistics."""
    torch.manual_seed(0)
    randomize(module)
    for name, parameter in module.named_parameters():
        if name.endswith("gamma"):
            torch.nn.init.constant_(parameter, 0.7)
    return module.to(dtype).eval()


def features(channels, size, images=2):
    return torch.randn(images, channels, *size, dtype=torch.float64, requires_grad=True)


def pixels(image):
    return [(y, x) for y in range(image.shape[1]) for x in range(image.shape[2])]


def as_map(vectors, size):
    """{(y, x): (C,)} → (C, H, W)."""
    return torch.stack([torch.stack([vectors[y, x] for x in range(size[1])], 1) for y in range(size[0])], 1)


def weighted_mean(scores, vectors):
    """Attention of one pixel: softmax over a list of scalars, times a list of vectors."""
    powers = [torch.exp(score - max(scores)) for score in scores]
    return sum(power * vector for power, vector in zip(powers, vectors, strict=True)) / sum(powers)


def compare(module, x, expected, *others):
    actual = module(x, *others)
    torch.testing.assert_close(actual, expected)
    watched = [x, *(one for one in others if one.requires_grad), *module.parameters()]
    assert_same_gradients(actual, expected, watched)


@pytest.mark.parametrize("size", SIZES)
def test_criss_cross(size):
    module, x = prepared(CrissCrossAttention(6, 2)), features(6, size)
    images = []
    for image in x:
        seen = {}
        for y, column in pixels(image):
            cross = {(y, other) for other in range(size[1])} | {(other, column) for other in range(size[0])}
            assert len(cross) == size[0] + size[1] - 1          # itself once
            query = conv(module.query, image[:, y, column])
            scores = [query @ conv(module.key, image[:, row, place]) for row, place in cross]
            mean = weighted_mean(scores, [conv(module.value, image[:, row, place]) for row, place in cross])
            seen[y, column] = module.gamma * mean + image[:, y, column]
        images.append(as_map(seen, size))
    compare(module, x, torch.stack(images))


def position_attention(query, key, value, image, scale=1.0):
    """One image (C, H, W), by three functions of a vector."""
    keys = [key(image[:, y, x]) for y, x in pixels(image)]
    values = [value(image[:, y, x]) for y, x in pixels(image)]
    return as_map({(y, x): weighted_mean([scale * (query(image[:, y, x]) @ other) for other in keys], values)
                   for y, x in pixels(image)}, image.shape[1:])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("keys", [2, 3, 8])       # values in three pieces, two with one channel too many, and one
def test_position_attention(size, keys):
    module, x = prepared(PositionAttention(5, keys)), features(5, size)
    expected = torch.stack([module.gamma * position_attention(*(
        lambda vector, layer=layer: conv(layer, vector) for layer in (module.query, module.key, module.value)), image)
        + image for image in x])
    compare(module, x, expected)


@pytest.mark.parametrize("size", SIZES)
def test_channel_attention(size):
    module, x = prepared(ChannelAttention()), features(4, size)
    images = []
    for image in x:
        rows = [row.flatten() for row in image]
        energy = [[one @ other for other in rows] for one in rows]
        mixed = [weighted_mean([max(line) - value for value in line], rows) for line in energy]
        images.append(module.gamma * torch.stack(mixed).view_as(image) + image)
    compare(module, x, torch.stack(images))


@pytest.mark.parametrize("size", SIZES)
def test_object_context(size):
    module, x = prepared(ObjectContext(6, 4, 3, ABN)), features(6, size)

    def key(vector):
        return module.key(vector.view(1, -1, 1, 1)).flatten()

    expected = torch.stack([
        module.out(position_attention(key, key, lambda vector: conv(module.value, vector), image, 4 ** -0.5)[None])[0]
        for image in x])
    compare(module, x, expected)


def test_object_context_on_a_smaller_map():
    """Maxima of 2×2 pixels, the context of those, bilinear back."""
    module, x = prepared(ObjectContext(6, 4, 3, ABN, pooling=2)), features(6, (5, 7))
    pooled = torch.stack([torch.stack([x[:, :, y:y + 2, c:c + 2].amax((2, 3)) for c in (0, 2, 4, 6)], 2)
                          for y in (0, 2, 4)], 2)
    module.pooling = 1
    expected = F.interpolate(module(pooled), (5, 7), mode="bilinear", align_corners=True)
    module.pooling = 2
    compare(module, x, expected)


@pytest.mark.parametrize("size", [(7, 6), (1, 4), (13, 5)])
def test_pyramid_pooling(size):
    """Bin i of b covers the rows from floor(i · H / b) to ceil((i + 1) · H / b)."""
    module, x = prepared(PyramidPooling(4, 3, ABN)), features(4, size)
    levels = []
    for bins, level in zip((1, 2, 3, 6), module.levels, strict=True):
        edges = [[(i * length // bins, math.ceil((i + 1) * length / bins)) for i in range(bins)] for length in size]
        means = torch.stack([torch.stack([x[:, :, top:bottom, left:right].mean((2, 3)) for left, right in edges[1]], 2)
                             for top, bottom in edges[0]], 2)
        levels.append(F.interpolate(level(means), size, mode="bilinear", align_corners=True))
    compare(module, x, module.join(torch.cat([x, *levels], 1)))


@pytest.mark.parametrize("size", SIZES)
def test_regions_and_their_context(size):
    """OCR: equations 2 to 4."""
    module, x = prepared(OCRHead(6, 3, ABN)), features(6, size)
    logits = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)

    def apply(layers, vector):
        return layers(vector.view(1, -1, 1, 1)).flatten()

    images = []
    for image, regions in zip(x, logits, strict=True):
        vectors = [image[:, y, c] for y, c in pixels(image)]
        objects = [weighted_mean([regions[n, y, c] for y, c in pixels(image)], vectors) for n in range(3)]
        keys, values = ([apply(layers, one) for one in objects] for layers in (module.object, module.value))
        context = as_map({(y, c): weighted_mean([apply(module.pixel, image[:, y, c]) @ key * 3 ** -0.5 for key in keys],
                                                values) for y, c in pixels(image)}, size)
        images.append(module.fine(module.join(torch.cat([module.up(context[None]), image[None]], 1)))[0])
    torch.testing.assert_close(module.regions(x, logits)[1, :, 2], objects[2])
    actual, expected = module(x, logits)["fine"], torch.stack(images)
    torch.testing.assert_close(actual, expected)
    assert_same_gradients(actual, expected, [x, logits, *module.parameters()])


@pytest.mark.parametrize("size", [(3, 5), (1, 2)])
def test_how_the_parts_are_joined(size):
    """In the order of the drawings, from parts that are tested above."""
    x = features(16, size)

    def joined(module, *maps):
        return module.join(torch.cat(maps, 1))

    cross = prepared(CrissCross(16, 8, ABN))
    once = cross.attention(cross.before(x))
    torch.testing.assert_close(cross(x), joined(cross, x, cross.after(cross.attention(once))))
    cross.recurrence = 1
    torch.testing.assert_close(cross(x), joined(cross, x, cross.after(once)))
    base = prepared(BaseObjectContext(16, 8, ABN))
    torch.testing.assert_close(base(x), joined(base, base.context(base.before(x)), base.before(x)))
    pyramid = prepared(PyramidObjectContext(16, 8, ABN))
    assert len(pyramid.branches) == 5
    torch.testing.assert_close(pyramid(x), joined(pyramid, *(branch(pyramid.before(x)) for branch in pyramid.branches)))
    dual = prepared(DualAttention(16, 8, ABN))
    both, position, channel = dual(x)
    torch.testing.assert_close(both, position + channel)
    head = prepared(DualHead(8, 3))
    assert set(head((both, position, channel))) == {"fine"}
    logits = head.train()((both, position, channel))
    assert set(logits) == {"fine", "position", "channel"}


@pytest.mark.parametrize("attention", [CrissCrossAttention(16, 2), PositionAttention(16, 2), ChannelAttention()],
                         ids=lambda module: type(module).__name__)
def test_attention_starts_as_the_identity(attention):
    x = torch.randn(2, 16, 5, 3)
    assert attention.gamma.ndim == 0 and torch.equal(attention(x), x)


@pytest.mark.parametrize("make", [CrissCross, BaseObjectContext, PyramidObjectContext, DualAttention, PyramidPooling,
                                  ASPP])
def test_half_precision(make):
    """In bf16 autocast results are bf16, and as near to float32's as bf16 can tell."""
    module = prepared(make(32, 16, ABN), torch.float32)
    x = torch.randn(2, 32, 6, 5)
    exact = module(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = module(x)
    for one, other in zip(exact if isinstance(exact, tuple) else [exact],
                          actual if isinstance(actual, tuple) else [actual], strict=True):
        assert other.dtype == torch.bfloat16
        assert (other - one).norm() < 0.05 * one.norm()


def test_products_over_all_pixels_do_not_overflow_in_half_precision():
    """Values of 30 over 97×97 pixels: their products are 8.5 million, beyond float16."""
    x = torch.full((1, 2, 97, 97), 30.0, dtype=torch.float16)
    x[:, 1] = -30
    module = ChannelAttention()
    torch.nn.init.ones_(module.gamma)
    assert torch.equal(module(x), torch.zeros_like(x))      # each channel attends to the other, its negative


@pytest.mark.parametrize("make", [lambda: PositionAttention(32, 4), lambda: ObjectContext(32, 16, 16, ABN)],
                         ids=["position", "object context"])
def test_no_map_of_all_pairs_is_kept(make):
    """At 97×97 pixels it would have 88.5 million entries an image; all that is kept is less than a hundredth."""
    class Alone(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = make()

        def forward(self, x):
            return {"fine": self.attention(x)}

    parts, outputs = kept_bytes(Alone(), torch.randn(1, 32, 97, 97, requires_grad=True))
    outputs["fine"].sum().backward()
    assert 32 * 97 ** 2 * 4 < sum(parts.values()) < 4 * 97 ** 4 / 25


def test_attention_of_long_sequences_equals_the_plain_one():
    torch.manual_seed(0)
    queries, keys, values = torch.randn(2, 8, 300), torch.randn(2, 8, 200), torch.randn(2, 20, 200)
    weights = (0.5 * torch.einsum("bkn,bkm->bnm", queries, keys)).softmax(2)
    torch.testing.assert_close(attend(queries, keys, values, 0.5), torch.einsum("bnm,bcm->bcn", weights, values))
