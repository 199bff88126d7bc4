"""Bilinear upsampling with aligned corners; on a GPU computed as a matrix product from each side."""

import functools

import torch
import torch.nn.functional as F

from .autocast import at_least_float32, without_autocast

GRID = (8, 1)       # (step, rest): logits fit the pixels of images whose sides are step · k + rest


def grid_of(network):
    """The network's attribute `grid` if it has one, else `GRID`."""
    return getattr(network, "grid", GRID)


def round_size(size, grid=GRID):
    """Round (height, width) up to step · k + rest; for `GRID`, to 8k + 1.

    Only at these sizes do logits at stride 8, with aligned corners, lie on the pixels they stand for.

    Args:
        size: (height, width).
        grid: (step, rest) of the network, see `grid_of`.
    """
    step, rest = grid
    return tuple(length + -(length - rest) % step for length in size)


def step_between(source, size):
    """Return the number of pixels from one logit to the next, if logits lie on pixels; else None.

    Args:
        source: (h, w) of the logits.
        size: (H, W) of the pixels; with aligned corners, H = step · (h - 1) + 1 and W = step · (w - 1) + 1.
    """
    step = max(1, *((length - 1) // max(1, points - 1) for length, points in zip(size, source, strict=True)))
    fits = all(length == step * (points - 1) + 1 for length, points in zip(size, source, strict=True))
    return step if fits else None


def upsample(logits, size):
    """Upsample logits (B, N, h, w) to (B, N, *size) in at least float32, bilinear with aligned corners."""
    logits = at_least_float32(logits)
    if logits.is_cuda:
        return upsample_by_matmul(logits, size)
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=True)


_matrices_of_graphs = set()      # kept forever, because CUDA graphs read their memory


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)        # a matrix cached during evaluation must be usable in training too
def upsampling_matrix(length, source, device, dtype=torch.float32):
    """The matrix (length, source) of linear interpolation with aligned corners."""
    positions = torch.arange(length, dtype=torch.float64) * ((source - 1) / max(1, length - 1))
    low = positions.floor().clamp(max=max(0, source - 2)).long()
    weight = positions - low
    matrix = torch.zeros(length, source, dtype=torch.float64)
    index = torch.arange(length)
    matrix[index, low] = 1 - weight
    if source > 1:
        matrix[index, low + 1] += weight
    return matrix.to(device, dtype)


def upsample_by_matmul(maps, size):
    """Upsample maps (B, C, h, w) to (B, C, *size) as `F.interpolate(mode="bilinear", align_corners=True)` does.

    On a GPU the backward pass of `F.interpolate` uses atomic additions, which are slow and nondeterministic; matrix
    products avoid both.
    """
    rows, columns = (upsampling_matrix(length, source, maps.device, maps.dtype)
                     for length, source in zip(size, maps.shape[2:], strict=True))
    if maps.is_cuda and torch.cuda.is_current_stream_capturing():
        _matrices_of_graphs.update((rows, columns))
    # Products of float32 stay exact on a GPU: unlike convolutions, they do not use TF32 by default.
    with without_autocast(maps):
        planes = maps.flatten(0, 1) @ columns.T                                         # (B · C, h, W)
        planes = torch.bmm(rows.expand(len(planes), -1, -1), planes)                    # (B · C, H, W)
    return planes.unflatten(0, maps.shape[:2])                                          # (B, C, H, W)
