"""Those of ATen's batch-norm kernels that exist on CUDA alone, under the names that `libs.functions` uses.

They take half precision with float32 parameters, contiguous and channels-last.
"""

import torch


def transform(x, gamma, beta, mean, invstd, out):
    """x̂ · γ + β into `out`, which may be x."""
    return torch.batch_norm_elemt(x, gamma, beta, mean, invstd, 0.0, out=out)


def fit(y, settings):
    """Whether `backward_sums` and `backward_elements` may serve: in place, in training."""
    return y.is_cuda and y.dtype != torch.float64 and settings.training and not settings.keep_input


def backward_sums(dz, z, gamma, beta):
    """(2, C): sums of dz and of x̂ · dz, where x̂ = (z - β) / γ."""
    sum_dz, sum_dz_z, _, _ = torch.batch_norm_backward_reduce(dz, z, beta, 1 / gamma, gamma, True, False, False)
    return torch.stack([sum_dz, sum_dz_z / gamma])


def backward_elements(dz, z, gamma, beta, invstd, totals, count):
    """dL/dx. The kernel's own (dz - mean dz - (z - mean) · invstd² · mean(dz · z)) · invstd · weight, with
    mean β, invstd 1/γ and weight γ² / sqrt(var + eps), is the gradient through x̂."""
    # A number, or a tensor on the device where processes share the statistics: never read by the host.
    counts = count.to(torch.int32).view(1) if isinstance(count, torch.Tensor) else torch.full(
        (1,), count, dtype=torch.int32, device=dz.device)
    return torch.batch_norm_backward_elemt(dz, z, beta, 1 / gamma, gamma ** 2 * invstd, totals[0],
                                           totals[1] * gamma, counts)
