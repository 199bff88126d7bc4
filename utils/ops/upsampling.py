"""Bilinear upsampling with aligned corners; on a GPU as what it is, a product with a matrix from each side."""

import functools

import torch
import torch.nn.functional as F

from .autocast import at_least_float32, without_autocast

GRID = (8, 1)       # the sides of images that fit a network are a multiple of the first, plus the second


def grid_of(network):
    """The grid that a network says it has, else `GRID`."""
    return getattr(network, "grid", GRID)


def round_size(size, grid=GRID):
    """(height, width) → each rounded up to 8k + 1: only there do logits at stride 8, with aligned corners,
    lie on the pixels they stand for. grid: of a network with another stride."""
    step, rest = grid
    return tuple(length + -(length - rest) % step for length in size)


def upsample(logits, size):
    """Logits (B, N, h, w) → (B, N, *size) in at least float32, bilinear with aligned corners."""
    logits = at_least_float32(logits)
    if logits.is_cuda:
        return upsample_by_products(logits, size)
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=True)


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)        # a matrix first needed in evaluation must serve training too
def upsampling_matrix(length, source, device, dtype=torch.float32):
    """The matrix (length, source) of linear interpolation with aligned corners."""
    places = torch.arange(length, dtype=torch.float64) * ((source - 1) / max(1, length - 1))
    low = places.floor().clamp(max=max(0, source - 2)).long()
    weight = places - low
    matrix = torch.zeros(length, source, dtype=torch.float64)
    index = torch.arange(length)
    matrix[index, low] = 1 - weight
    if source > 1:
        matrix[index, low + 1] += weight
    return matrix.to(device, dtype)


def upsample_by_products(maps, size):
    """Maps (B, C, h, w) → (B, C, *size), as `F.interpolate(mode="bilinear", align_corners=True)` gives them.

    On a GPU its backward pass adds with atomics, slowly and in another order each time; that of a product does not.
    """
    rows, columns = (upsampling_matrix(length, source, maps.device, maps.dtype)
                     for length, source in zip(size, maps.shape[2:], strict=True))
    # Products of float32 stay exact on a GPU: unlike convolutions they use TF32 only where a program asks for it.
    with without_autocast(maps):
        planes = maps.flatten(0, 1) @ columns.T                                         # (B · C, h, W)
        planes = torch.bmm(rows.expand(len(planes), -1, -1), planes)                    # (B · C, H, W)
    return planes.unflatten(0, maps.shape[:2])                                          # (B, C, H, W)
