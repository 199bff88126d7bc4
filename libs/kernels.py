"""ATen's batch-norm kernels that exist only for CUDA, under the names that `libs.functions` uses.

They take maps (B, C, ...), contiguous or channels-last, in float32 or half precision, with float32 vectors (C,).
"""

import torch


def supports(x):
    """Whether these kernels can compute the layer for a map x."""
    return x.is_cuda and x.dtype != torch.float64


def match_layout(dy, x):
    """Convert dy to the layout of x, contiguous or channels-last: the kernels need the same layout for all maps."""
    channels_last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return dy.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def statistics(x, eps):
    """Compute mean and 1 / sqrt(var + eps), (C,) each, of a map."""
    return torch.batch_norm_stats(x, eps)


def combined_statistics(means, invstds, counts, running_mean, running_var, momentum, eps):
    """Combine the statistics of P parts of a batch, and update running statistics, with one kernel.

    Args:
        means, invstds: (P, C), `statistics` of each part.
        counts: (P,), values per channel of each part.
        running_mean, running_var: (C,), or None.
        momentum: weight of this batch in the running statistics.
        eps: as in `statistics`.

    Returns:
        (mean (C,), 1 / sqrt(var + eps) (C,)) of the batch.
    """
    # Without running statistics, counts must have the dtype of the first argument.
    return torch.batch_norm_gather_stats_with_counts(means, means, invstds, running_mean, running_var, momentum, eps,
                                                     counts)


def transform(x, mean, invstd, gamma, beta, out):
    """Write x̂ · γ + β to `out`, which may be x."""
    return torch.batch_norm_elemt(x, gamma, beta, mean, invstd, 0.0, out=out)


def backward_sums(source, dz, center, scale):
    """Sum dz and x̂ · dz, where x̂ = (source - center) · scale, over each channel: (2, C)."""
    # The kernel uses only the dtype of the weight: float32 beside half-precision maps.
    sum_dz, sum_dz_centered, _, _ = torch.batch_norm_backward_reduce(dz, source, center, scale, scale, True, False,
                                                                     False)
    return torch.stack([sum_dz, sum_dz_centered * scale])


def backward_unshared(source, dz, center, scale, factor, count):
    """Compute dL/dx and the pair of `backward_sums` of a batch that is not shared.

    This takes a third of the operations on vectors that `backward_sums` and `backward_elements` take; each costs the
    host as much time as an operation on a map.
    """
    sum_dz, sum_dz_centered, sum_normal_dz, _ = torch.batch_norm_backward_reduce(dz, source, center, scale, scale, True,
                                                                                 True, False)
    dx = torch.batch_norm_backward_elemt(dz, source, center, scale, factor / scale, sum_dz, sum_dz_centered,
                                         as_counts(count, dz.device))
    return dx, (sum_dz, sum_normal_dz)


def backward_elements(source, dz, center, scale, factor, totals, count):
    """Compute dL/dx = factor · (dz - mean(dz) - x̂ · mean(x̂ · dz)), with means over the whole batch.

    The kernel computes (dz - sum dz / n - (source - mean) · invstd² · sum(dz · (source - mean)) / n) · invstd · weight.

    Args:
        source, dz, center, scale: as in `backward_sums`, of this part of the batch.
        factor: γ / sqrt(var + eps), (C,).
        totals: (2, C), `backward_sums` of the whole batch.
        count: values per channel of the whole batch: an int, or a tensor whose sum it is.
    """
    return torch.batch_norm_backward_elemt(dz, source, center, scale, factor / scale, totals[0], totals[1] / scale,
                                           as_counts(count, dz.device))


def as_counts(count, device):
    """Convert a count, an int or a tensor, to the int32 vector that the kernel expects."""
    if isinstance(count, torch.Tensor):
        return count.reshape(-1).to(torch.int32)
    return torch.full((1,), count, dtype=torch.int32, device=device)
