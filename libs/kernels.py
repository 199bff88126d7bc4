"""Those of ATen's batch-norm kernels that exist on CUDA alone, under the names that `libs.functions` uses.

They take half precision with float32 parameters, contiguous and channels-last.
"""

import torch


def serve(x):
    """Whether these kernels compute the layer on a map x (B, C, ...)."""
    return x.is_cuda and x.dtype != torch.float64


def laid_out_like(dy, x):
    """dy (B, C, ...) contiguous or channels-last, as x is: the kernels take one layout at a time."""
    channels_last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return dy.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def statistics(x, eps):
    """Mean and 1 / sqrt(var + eps) (C,) of a map."""
    return torch.batch_norm_stats(x, eps)


def combined_statistics(means, invstds, counts, running_mean, running_var, momentum, eps):
    """Those of P parts of a batch, (P, C) each, of so many values per channel (P,) → of the batch, (C,), by one kernel.

    Updates running statistics, unless they are None.
    """
    # The first argument decides the dtype of counts where there are no running statistics.
    return torch.batch_norm_gather_stats_with_counts(means, means, invstds, running_mean, running_var, momentum, eps,
                                                     counts)


def transform(x, gamma, beta, mean, invstd, out):
    """x̂ · γ + β into `out`, which may be x."""
    return torch.batch_norm_elemt(x, gamma, beta, mean, invstd, 0.0, out=out)


def backward_sums(source, dz, center, scale):
    """(2, C): sums of dz and of x̂ · dz, where x̂ = (source - center) · scale."""
    # The kernel's weight decides nothing but its type: float32 beside half-precision maps.
    sum_dz, sum_dz_centered, _, _ = torch.batch_norm_backward_reduce(dz, source, center, scale, scale, True, False,
                                                                     False)
    return torch.stack([sum_dz, sum_dz_centered * scale])


def backward_alone(source, dz, center, scale, factor, count):
    """dL/dx and the sums of `backward_sums`, as a pair, where no other part of the batch has to be heard: a third of
    the operations on vectors, each of which costs the host as much as one on a map."""
    sum_dz, sum_dz_centered, sum_normal_dz, _ = torch.batch_norm_backward_reduce(dz, source, center, scale, scale, True,
                                                                                 True, False)
    dx = torch.batch_norm_backward_elemt(dz, source, center, scale, factor / scale, sum_dz, sum_dz_centered,
                                         as_counts(count, dz.device))
    return dx, (sum_dz, sum_normal_dz)


def backward_elements(source, dz, center, scale, factor, totals, count):
    """dL/dx = factor · (dz - mean(dz) - x̂ · mean(x̂ · dz)), means over `count` values: an int, or
    a tensor whose sum they are.

    The kernel computes (dz - sum dz / n - (source - mean) · invstd² · sum(dz · (source - mean)) / n) · invstd · weight.
    """
    return torch.batch_norm_backward_elemt(dz, source, center, scale, factor / scale, totals[0], totals[1] / scale,
                                           as_counts(count, dz.device))


def as_counts(count, device):
    if isinstance(count, torch.Tensor):
        return count.reshape(-1).to(torch.int32)
    return torch.full((1,), count, dtype=torch.int32, device=device)
