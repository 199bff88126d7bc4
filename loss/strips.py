"""Cross-entropy of bilinearly upsampled logits in strips of rows, without a map (B, N, H, W) of the full size.

The functions are those of `libs.fused.cross_entropy`, by PyTorch's operators. A strip is upsampled, differentiated and
dropped while it is in the processor's cache. Everything is computed in the dtype of the logits, at least float32.
"""

import torch
import torch.nn.functional as F

from utils.ops.autocast import at_least_float32, without_autocast
from utils.ops.upsampling import step_between, upsampling_matrix

STRIP = 1_000_000       # upsampled logits of a strip, about


def supports(logits, size):
    """Whether to compute the loss of logits (B, N, h, w) upsampled to a size (H, W) here.

    Not if there are less than two strips in all: so few logits stay in the cache anyway, and OHEM, which computes each
    strip twice, is faster without.
    """
    upsampled = logits.shape[:2].numel() * size[0] * size[1]
    return logits.is_cpu and step_between(logits.shape[2:], size) is not None and upsampled >= 2 * STRIP


def pixel_losses(logits, labels, ignore_index):
    """Compute the cross-entropies of pixels.

    Args:
        logits: (B, N, h, w), whose upsampled size is that of the labels, see `step_between`.
        labels: (B, H, W), any integer dtype.
        ignore_index: label of pixels that do not count.

    Returns:
        (B, H, W), 0 where the label is ignored. Without a gradient.
    """
    logits = at_least_float32(logits.detach()).contiguous()
    losses = logits.new_empty(labels.shape)
    with without_autocast(logits):
        for image, points, rows in strips(logits, labels):
            true = labels[image, rows].long()
            log_probabilities = upsampled_log_probabilities(logits[image, :, points], true.shape)
            losses[image, rows], _ = true_losses(log_probabilities, true, ignore_index)
    return losses


def sums(logits, labels, ignore_index, class_weights=None, counted=None, with_gradient=True):
    """Add up the losses of pixels, as `CrossEntropy.sums` does.

    Args:
        logits, labels, ignore_index: as in `pixel_losses`.
        class_weights: (N,) float32, or None for 1.
        counted: (B, H, W) bool, pixels that count if they are not ignored; None for all.
        with_gradient: whether to compute the gradient too.

    Returns:
        (sums (2,), gradient (B, N, h, w) of the first of them, or None), both in the dtype of the logits, at least
        float32.
    """
    logits = at_least_float32(logits.detach()).contiguous()
    result = logits.new_zeros(2, dtype=torch.float64)
    wide = logits.new_zeros(*logits.shape[:3], labels.shape[2]) if with_gradient else None          # (B, N, h, W)
    with without_autocast(logits):
        for image, points, rows in strips(logits, labels):
            true = labels[image, rows].long()
            log_probabilities = upsampled_log_probabilities(logits[image, :, points], true.shape)
            losses, counts = true_losses(log_probabilities, true, ignore_index)
            if counted is not None:
                counts &= counted[image, rows]
            if points.stop < logits.shape[2]:
                counts[-1] = False          # this row is also the first one of the next strip
            true = true.where(counts, 0)
            weights = counts.to(logits.dtype) if class_weights is None else (
                class_weights.to(logits.dtype)[true].where(counts, 0))
            result += torch.stack([torch.where(counts, losses * weights, 0).sum(), weights.sum()])
            if with_gradient:
                gradient = log_probabilities.exp_()             # (N, rows, W): (p - 1 for the true class) · weight
                gradient.scatter_add_(0, true[None], gradient.new_full((), -1).expand_as(true)[None])
                gradient *= weights
                matrix = upsampling_matrix(len(true), points.stop - points.start, logits.device, logits.dtype)
                wide[image, :, points] += matrix.T @ gradient                                       # (N, points, W)
        if with_gradient:
            wide = wide @ upsampling_matrix(wide.shape[3], logits.shape[3], wide.device, wide.dtype)  # (B, N, h, w)
    return result.to(logits.dtype), wide


def strips(logits, labels):
    """Yield (image, rows of logits, rows of labels) of each strip: a number and two slices.

    The last row of a strip is also the first one of the next.
    """
    height = logits.shape[2]
    step = step_between(logits.shape[2:], labels.shape[1:])
    most = max(1, round(STRIP / (logits.shape[1] * step * labels.shape[2])))       # steps from row to row of logits
    for image in range(len(logits)):
        for first in range(0, max(1, height - 1), most):
            last = min(first + most, height - 1)
            yield image, slice(first, last + 1), slice(step * first, step * last + 1)


def upsampled_log_probabilities(logits, size):
    """Upsample logits (N, h, w) to a size (H, W); returns log p (N, H, W)."""
    return F.interpolate(logits[None], size, mode="bilinear", align_corners=True)[0].log_softmax(0)


def true_losses(log_probabilities, labels, ignore_index):
    """From log p (N, H, W): -log p of the true class (H, W), 0 where it is ignored, and whether it is not."""
    valid = labels != ignore_index
    losses = -log_probabilities.gather(0, labels.where(valid, 0)[None])[0]
    return losses.where(valid, 0), valid
