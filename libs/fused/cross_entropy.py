"""Cross-entropy of bilinearly upsampled logits, by Triton kernels that make no map (B, N, H, W) of the full size.

The functions are those of `loss.strips`, which computes the same by PyTorch's operators.

A cell is the square of step · step pixels between the logits at (i, j), (i, j + 1), (i + 1, j) and (i + 1, j + 1): its
corners here, right, below and across. Each program computes the pixels of one cell, in float32. Nothing is added up
atomically, so that results are the same in every run: cells write their sums, and their shares of the gradients of
their four corners into four maps of the size of the logits.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from utils.ops.upsampling import step_between

from .launch import launch

LARGEST_STEP = 16
TILE = 512          # values of a tile (classes, rows, columns): all pixels of a cell, some classes
WARPS = 2           # a pixel of an 8×8 cell for each thread, so that sums over classes need no exchange


# --- Parts of kernels ---

@triton.jit
def cell_pixels(H, W, STEP: tl.constexpr, SIDE: tl.constexpr):
    """The pixels (SIDE, SIDE) of this program's cell.

    Returns:
        (offsets, inside, down, right): offsets (SIDE, SIDE) in maps (B, H, W), which of them are in the cell and exist,
        and distances from the corner here, from 0 to 1: (1, SIDE, 1) of rows and (1, 1, SIDE) of columns.
    """
    j, i, image = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    number = tl.arange(0, SIDE)
    y, x = i * STEP + number, j * STEP + number
    inside = ((number < STEP) & (y < H))[:, None] & ((number < STEP) & (x < W))[None, :]
    distance = number.to(tl.float32) / STEP
    return (image * H + y[:, None]) * W + x[None, :], inside, distance[None, :, None], distance[None, None, :]


@triton.jit
def cell_corners(height, width, image_stride, row_stride, column_stride):
    """Offsets of the corners here, right, below and across of this program's cell in maps (B, N, height, width)."""
    j, i, image = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    here = image * image_stride + i * row_stride + j * column_stride
    right = tl.where(j + 1 < width, column_stride, 0)       # at the edges the weight of this corner is 0
    below = tl.where(i + 1 < height, row_stride, 0)
    return here, here + right, here + below, here + below + right


@triton.jit
def upsampled(logits, corner, corner_right, corner_below, corner_across, first, classes, class_stride, down, right,
              CLASSES: tl.constexpr):
    """Logits (CLASSES, SIDE, SIDE) of a cell for classes from `first` on; -inf for classes that do not exist."""
    number = first + tl.arange(0, CLASSES)
    offsets, exists = number * class_stride, number < classes
    here = tl.load(logits + corner + offsets, mask=exists, other=float("-inf")).to(tl.float32)[:, None, None]
    beside = tl.load(logits + corner_right + offsets, mask=exists, other=0.0).to(tl.float32)[:, None, None]
    below = tl.load(logits + corner_below + offsets, mask=exists, other=0.0).to(tl.float32)[:, None, None]
    across = tl.load(logits + corner_across + offsets, mask=exists, other=0.0).to(tl.float32)[:, None, None]
    left_side = (1 - down) * here + down * below
    right_side = (1 - down) * beside + down * across
    return (1 - right) * left_side + right * right_side


@triton.jit
def cell_losses(logits, corner, corner_right, corner_below, corner_across, label, classes, class_stride, down, right,
                SIDE: tl.constexpr, CLASSES: tl.constexpr):
    """Cross-entropies of the pixels of a cell, by an online softmax over blocks of classes.

    Returns:
        (losses, shift, total), (SIDE, SIDE) each: probabilities are exp(logits - shift) / total. A loss is NaN where
        F.cross_entropy's is, and where there is no class with the number `label`.
    """
    highest = tl.full([SIDE, SIDE], float("-inf"), tl.float32)
    total = tl.zeros([SIDE, SIDE], tl.float32)
    true_logit = tl.zeros([SIDE, SIDE], tl.float32)
    for first in range(0, classes, CLASSES):
        x = upsampled(logits, corner, corner_right, corner_below, corner_across, first, classes, class_stride, down,
                      right, CLASSES)
        higher = tl.maximum(highest, tl.max(x, 0))
        shift = tl.where(higher == float("-inf"), 0.0, higher)      # -inf - -inf would be NaN
        total = total * tl.exp(highest - shift) + tl.sum(tl.exp(x - shift[None, :, :]), 0)
        highest = higher
        hit = (first + tl.arange(0, CLASSES))[:, None, None] == label[None, :, :]
        true_logit += tl.sum(tl.where(hit, x, 0.0), 0)
    losses = tl.log(total) - (true_logit - highest)
    losses = tl.where((label >= 0) & (label < classes), losses, float("nan"))
    return losses, tl.where(highest == float("-inf"), 0.0, highest), total


# --- Kernels ---

@triton.jit
def losses_kernel(logits, labels, losses, classes, height, width, H, W, image_stride, class_stride, row_stride,
                  column_stride, ignore_index, STEP: tl.constexpr, SIDE: tl.constexpr, CLASSES: tl.constexpr):
    """The losses (B, H, W) of all pixels, 0 where they are ignored."""
    offsets, inside, down, right = cell_pixels(H, W, STEP, SIDE)
    corner, corner_right, corner_below, corner_across = cell_corners(height, width, image_stride, row_stride,
                                                                     column_stride)
    label = tl.load(labels + offsets, mask=inside, other=0).to(tl.int32)
    loss, _, _ = cell_losses(logits, corner, corner_right, corner_below, corner_across, label, classes, class_stride,
                             down, right, SIDE, CLASSES)
    tl.store(losses + offsets, tl.where(label == ignore_index, 0.0, loss), mask=inside)


@triton.jit
def sums_kernel(logits, labels, weights, counted, sums, d_here, d_right, d_below, d_across, classes, height, width, H,
                W, image_stride, class_stride, row_stride, column_stride, ignore_index, STEP: tl.constexpr,
                SIDE: tl.constexpr, CLASSES: tl.constexpr, WEIGHTED: tl.constexpr, SELECTED: tl.constexpr,
                GRADIENT: tl.constexpr):
    """Sums (B, h, w, 2) of losses and weights of each cell, and its gradients of its corners, (B, N, h, w) each."""
    offsets, inside, down, right = cell_pixels(H, W, STEP, SIDE)
    corner, corner_right, corner_below, corner_across = cell_corners(height, width, image_stride, row_stride,
                                                                     column_stride)
    label = tl.load(labels + offsets, mask=inside, other=0).to(tl.int32)
    loss, shift, total = cell_losses(logits, corner, corner_right, corner_below, corner_across, label, classes,
                                     class_stride, down, right, SIDE, CLASSES)
    counts = inside & (label != ignore_index)
    if SELECTED:
        counts = counts & (tl.load(counted + offsets, mask=inside, other=0) != 0)
    weight = counts.to(tl.float32)
    if WEIGHTED:
        weight = tl.load(weights + label, mask=counts & (label >= 0) & (label < classes), other=0.0)
    cell = (tl.program_id(2).to(tl.int64) * height + tl.program_id(1)) * width + tl.program_id(0)
    tl.store(sums + 2 * cell, tl.sum(tl.sum(tl.where(counts, loss * weight, 0.0), 1), 0))
    tl.store(sums + 2 * cell + 1, tl.sum(tl.sum(weight, 1), 0))
    if GRADIENT:
        counts, weight, share = counts[None, :, :], weight[None, :, :], (weight / total)[None, :, :]
        for first in range(0, classes, CLASSES):
            x = upsampled(logits, corner, corner_right, corner_below, corner_across, first, classes, class_stride, down,
                          right, CLASSES)
            number = first + tl.arange(0, CLASSES)
            hit = number[:, None, None] == label[None, :, :]
            dx = tl.exp(x - shift[None, :, :]) * share - tl.where(hit, weight, 0.0)     # (p - hit) · weight
            dx = tl.where(counts, dx, 0.0)          # not NaN where a pixel does not count
            left_side, right_side = tl.sum((1 - right) * dx, 2), tl.sum(right * dx, 2)      # (CLASSES, SIDE)
            rows = tl.reshape(down, [1, SIDE])
            target, exists = corner + number * class_stride, number < classes
            tl.store(d_here + target, tl.sum((1 - rows) * left_side, 1), mask=exists)
            tl.store(d_right + target, tl.sum((1 - rows) * right_side, 1), mask=exists)
            tl.store(d_below + target, tl.sum(rows * left_side, 1), mask=exists)
            tl.store(d_across + target, tl.sum(rows * right_side, 1), mask=exists)


# --- Functions for tensors ---

def supports(logits, size):
    """Whether the kernels can compute the loss of logits (B, N, h, w) upsampled to a size (H, W)."""
    step = step_between(logits.shape[2:], size)
    return step is not None and 2 <= step <= LARGEST_STEP and logits.dtype != torch.float64


def pixel_losses(logits, labels, ignore_index):
    """As in `loss.strips`."""
    labels, logits = labels.contiguous(), logits.detach()
    losses = logits.new_empty(labels.shape, dtype=torch.float32)
    launch(losses_kernel, cells_of(logits), logits, labels, losses, *lengths(logits, labels), ignore_index,
           **tiles(logits, labels))
    return losses


def sums(logits, labels, ignore_index, class_weights=None, counted=None, with_gradient=True):
    """As in `loss.strips`."""
    labels, logits = labels.contiguous(), logits.detach()
    corners = [torch.empty_like(logits, dtype=torch.float32) for _ in range(4 if with_gradient else 1)]
    if corners[0].stride() != logits.stride():      # such as a part of a larger tensor
        logits = torch.empty_like(corners[0], dtype=logits.dtype).copy_(logits)
    cells = logits.new_empty(*cells_of(logits)[::-1], 2, dtype=torch.float32)
    launch(sums_kernel, cells_of(logits), logits, labels, class_weights, None if counted is None else
           counted.contiguous(), cells, *(corners if with_gradient else [None] * 4), *lengths(logits, labels),
           ignore_index, WEIGHTED=class_weights is not None, SELECTED=counted is not None, GRADIENT=with_gradient,
           **tiles(logits, labels))
    result = cells.sum((0, 1, 2), dtype=torch.float64).float()
    if not with_gradient:
        return result, None
    gradient, right, below, across = corners
    gradient[..., 1:] += right[..., :-1]
    gradient[..., 1:, :] += below[..., :-1, :]
    gradient[..., 1:, 1:] += across[..., :-1, :-1]
    return result, gradient


def cells_of(logits):
    """The grid of programs for logits (B, N, h, w): (w, h, B)."""
    return logits.shape[3], logits.shape[2], logits.shape[0]


def lengths(logits, labels):
    """Sizes and strides, in the order of the parameters of both kernels."""
    image, channel, row, column = logits.stride()
    return *logits.shape[1:], *labels.shape[1:], image, channel, row, column


def tiles(logits, labels):
    """Constants of both kernels: the step, the side of a cell in a tile and the classes of a block, powers of two."""
    step = step_between(logits.shape[2:], labels.shape[1:])
    side = max(4, triton.next_power_of_2(step))
    classes = min(triton.next_power_of_2(logits.shape[1]), TILE // side**2)
    return {"STEP": step, "SIDE": side, "CLASSES": classes, "num_warps": WARPS}


def examples(device, dtype):
    """As `libs.fused.norm.examples`, of the loss and its gradient."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(1, 12, 2, 3, generator=generator).to(device, dtype)
    logits = values.float().requires_grad_()
    labels = torch.randint(12, (1, 9, 17), generator=generator).to(device)
    expected = F.cross_entropy(F.interpolate(logits, labels.shape[1:], mode="bilinear", align_corners=True), labels,
                               reduction="none")
    expected_gradient, = torch.autograd.grad(expected.sum(), logits)
    result, gradient = sums(values, labels, ignore_index=255)
    return {"the losses of pixels": (pixel_losses(values, labels, ignore_index=255), expected.detach()),
            "the sum": (result[0], expected.detach().sum()), "the gradient": (gradient, expected_gradient)}
