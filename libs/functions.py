"""Batch norm with activation, as autograd functions that save one large tensor for the backward pass.

Symbols: x is the input, x̂ = (x - mean) / sqrt(var + eps), z = x̂ · γ + β, y = act(z). In place, y overwrites x, and the
backward pass recovers z and x̂ from y (Rota Bulo et al. 2018, section 3, variant I). Otherwise x is saved.

Values per channel are vectors (C,), in float64 for float64 inputs and in float32 for all others.
"""

import contextlib
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from . import kernels
from .synchronize import combine


class Settings(NamedTuple):
    """Settings of a layer in one forward pass.

    Attributes:
        eps, activation, activation_param: as in `libs.abn.ABN`.
        training: normalize with the statistics of the batch.
        absolute: γ is |weight| + eps instead of weight.
        keep_input: write the output to a new tensor, and save the input. False: overwrite the input with the output.
    """

    eps: float
    activation: str
    activation_param: float
    training: bool
    absolute: bool
    keep_input: bool


def statistics_dtype(x):
    """Dtype in which statistics of x are computed."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def values_per_channel(x):
    """Number of values in each channel of x (B, C, ...)."""
    return x.numel() // max(x.shape[1], 1)


def local_statistics(x, running_mean=None, running_var=None, momentum=0.0):
    """Compute mean and biased variance, (C,) each, of x (B, C, ...). Updates running statistics if they are given."""
    dtype = statistics_dtype(x)
    with running_in_dtype((running_mean, running_var), dtype) as running:
        updated = [x.new_zeros(x.shape[1], dtype=dtype) if buffer is None else buffer for buffer in running]
        return updated if x.is_meta else torch.ops.aten.batch_norm_update_stats(x, *updated, momentum)


def packed_statistics(x, eps):
    """Compute mean, 1 / sqrt(var + eps) and number of values per channel of x (B, C, ...), one vector (2 · C + 1,)."""
    mean, invstd = kernels.statistics(x, eps)
    count = mean.new_full((1,), values_per_channel(x))      # a tensor made from a list would make the host wait
    return torch.cat([mean, invstd, count])


def shared_statistics(packed, peers, eps, running_mean=None, running_var=None, momentum=0.0):
    """Compute the statistics of a batch whose parts are on several GPUs.

    Args:
        packed: `packed_statistics` of this part of the batch.
        peers: `Processes` or `Replicas` that share the batch.
        eps: added to the variance.
        running_mean, running_var, momentum: running statistics (C,) to update, or None, and the weight of this batch.

    Returns:
        (mean (C,), 1 / sqrt(var + eps) (C,), counts (P,)): the statistics of the batch, and the number of values per
        channel in each of its P parts.
    """
    parts, channels = torch.stack(peers.gather(packed)), len(packed) // 2                           # (P, 2C + 1)
    means, invstds, counts = parts.split([channels, channels, 1], dim=1)
    counts = counts.flatten()
    with running_in_dtype((running_mean, running_var), packed.dtype) as (running_mean, running_var):
        mean, invstd = kernels.combined_statistics(means, invstds, counts, running_mean=running_mean,
                                                   running_var=running_var, momentum=momentum, eps=eps)
    return mean, invstd, counts


class GatherAcrossProcesses(torch.autograd.Function):
    """Tensor (K,) of each of P processes → (P, K) in all of them.

    In compiled code the collectives become nodes of the graph, because the compiler replaces those of
    torch.distributed by functional ones (PyTorch 2.9 and newer, `utils.common.compat.COMPILER`).
    """

    @staticmethod
    def forward(ctx, tensor, processes):
        ctx.processes = processes
        return torch.stack(processes.gather(tensor))

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return ctx.processes.all_reduce(gradient)[ctx.processes.rank], None


def shared_batch_norm(x, running_mean, running_var, weight, bias, momentum, eps, processes):
    """Batch norm in training over the batch of all processes, of operations that autograd and the compiler know.

    Args:
        x: (B, C, ...), this part of the batch; parts may have different sizes.
        running_mean, running_var: (C,) to update, or None.
        weight, bias: (C,), or None.
        momentum: weight of this batch in the running statistics.
        eps: added to the variance.
        processes: `Processes` that share the batch.

    Returns:
        (B, C, ...) in the dtype of x.
    """
    wide = x.to(statistics_dtype(x))
    var, mean = torch.var_mean(wide, [0, *range(2, x.ndim)], correction=0)
    parts = GatherAcrossProcesses.apply(torch.cat([mean, var, mean.new_full((1,), values_per_channel(x))]), processes)
    means, variances, counts = parts.split([len(mean), len(mean), 1], dim=1)                        # (P, C or 1)
    count, mean, moment = combine(counts.flatten(), means, variances * counts)
    if running_mean is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((moment / (count - 1)).to(running_var.dtype), momentum)
    scale = (moment / count + eps).rsqrt()
    if weight is not None:
        scale = scale * weight.to(scale.dtype)
    z = (wide - along_channels(mean, x)) * along_channels(scale, x)
    return (z if bias is None else z + along_channels(bias.to(z.dtype), x)).to(x.dtype)


@contextlib.contextmanager
def running_in_dtype(running, dtype):
    """Context that converts running statistics to the dtype in which a kernel updates them.

    Buffers of another dtype, such as those of a module in half precision, are copied, and the updated copies are
    written back at the end.

    Args:
        running: buffers (C,), or None for those that do not exist.
        dtype: of the kernel.
    """
    converted = [None if buffer is None else buffer.to(dtype) for buffer in running]
    yield converted
    for buffer, updated in zip(running, converted, strict=True):
        if updated is not buffer:
            buffer.copy_(updated)


def along_channels(vector, x):
    """Reshape a vector (C,) to (1, C, 1, ...), which broadcasts to x (B, C, ...)."""
    return vector.view(1, -1, *[1] * (x.ndim - 2))


def gamma_and_beta(weight, bias, settings, like):
    """γ and β (C,) in the dtype of `like`; ones and zeros without affine parameters."""
    if weight is None:
        return torch.ones_like(like), torch.zeros_like(like)
    gamma = weight.to(like.dtype)
    return (gamma.abs() + settings.eps if settings.absolute else gamma), bias.to(like.dtype)


def activate_(z, settings):
    """Apply the activation in place."""
    if settings.activation == "leaky_relu":
        return F.leaky_relu(z, settings.activation_param, inplace=True)
    if settings.activation == "relu":
        return F.relu(z, inplace=True)
    if settings.activation == "elu":
        return F.elu(z, settings.activation_param, inplace=True)
    return z


def undo_activation(y, dy, settings):
    """Compute z and dL/dz from the output y and dL/dy. Layers with relu, which has no inverse, keep their input."""
    param = settings.activation_param
    if settings.activation == "leaky_relu":
        return F.leaky_relu(y, 1 / param), torch.ops.aten.leaky_relu_backward(dy, y, param, True)
    if settings.activation == "elu":
        # Far below zero y rounds to -α, so that z would be -∞. The clamp keeps z finite; dL/dz is zero there.
        below = torch.log((y / param + 1).clamp_min(torch.finfo(y.dtype).tiny))
        return torch.where(y < 0, below, y), torch.ops.aten.elu_backward(dy, param, 1, 1, True, y)
    return y, dy


def activation_backward(z, dy, settings):
    """Compute dL/dz from z and dL/dy."""
    param = settings.activation_param
    if settings.activation == "leaky_relu":
        return torch.ops.aten.leaky_relu_backward(dy, z, param, False)
    if settings.activation == "relu":
        return torch.ops.aten.threshold_backward(dy, z, 0)
    if settings.activation == "elu":
        return torch.ops.aten.elu_backward(dy, param, 1, 1, False, z)
    return dy


def affine(x, mean, invstd, gamma, beta, out):
    """Compute z = x̂ · γ + β (B, C, ...).

    Args:
        x: (B, C, ...).
        mean, invstd, gamma, beta: (C,).
        out: map for the result, which may be x. It is not used for half precision on a CPU: there z is a new map in
            the dtype of the statistics, so that the activation is applied before rounding.
    """
    if kernels.supports(x):
        return kernels.transform(x, mean, invstd, gamma=gamma, beta=beta, out=out)
    scale = gamma * invstd
    shift = along_channels(beta - mean * scale, x)
    return torch.mul(x, along_channels(scale, x), out=out if x.dtype == invstd.dtype else None).add_(shift)


def normalize(x, mean, invstd, gamma, beta, settings):
    """Compute y (B, C, ...), in the storage of x unless the input is kept."""
    out = torch.empty_like(x) if settings.keep_input else x
    z = activate_(affine(x, mean, invstd, gamma=gamma, beta=beta, out=out), settings)
    return z if z is out else out.copy_(z)


class Operands(NamedTuple):
    """Operands of the backward pass: dL/dz, and the terms of x̂ = (source - center) · scale."""

    source: torch.Tensor        # (B, C, ...): the saved input x, or z recovered from y
    dz: torch.Tensor            # (B, C, ...)
    center: torch.Tensor        # (C,)
    scale: torch.Tensor         # (C,)


def backward_operands(saved, dy, mean, invstd, gamma, beta, settings):
    """Compute the `Operands` from the saved map (x or y) and dL/dy, both (B, C, ...).

    Maps are converted to the dtype of the statistics, except for CUDA's kernels, which accept half precision.
    """
    if kernels.supports(saved):
        dy = kernels.match_layout(dy, saved)
    else:
        saved, dy = saved.to(invstd.dtype), dy.to(invstd.dtype)
    if not settings.keep_input:
        z, dz = undo_activation(saved, dy, settings)
        return Operands(z, dz, beta, 1 / gamma)
    if settings.activation == "identity":
        return Operands(saved, dy, mean, invstd)
    z = affine(saved, mean, invstd, gamma=gamma, beta=beta, out=torch.empty_like(saved))
    return Operands(saved, activation_backward(z, dy, settings), mean, invstd)


def channel_sums(operands):
    """Sum dL/dz and x̂ · dL/dz over each channel: (2, C)."""
    if kernels.supports(operands.source):
        return kernels.backward_sums(*operands)
    source, dz, center, scale = operands
    dims = [0, *range(2, dz.ndim)]
    centered = source - along_channels(center, source)
    return torch.stack([dz.sum(dims), (centered * dz).sum(dims) * scale])


def input_gradient(operands, factor, totals, count):
    """Compute dL/dx in training.

    Args:
        operands: `Operands` of this part of the batch.
        factor: γ / sqrt(var + eps), (C,).
        totals: (2, C), `channel_sums` of the whole batch.
        count: values per channel of the whole batch; an int, or a tensor as in `Normalize`.
    """
    if kernels.supports(operands.source):
        return kernels.backward_elements(*operands, factor=factor, totals=totals, count=count)
    source, dz, center, scale = operands
    mean_dz, mean_normal_dz = totals / count
    dx = torch.addcmul(dz - along_channels(mean_dz, dz), source - along_channels(center, source),
                       -along_channels(mean_normal_dz * scale, dz))
    return dx.mul_(along_channels(factor, dz))


def parameter_gradients(sums, weight, settings):
    """Gradients of weight and bias from the `channel_sums` of this part; (None, None) without affine parameters."""
    if weight is None:
        return None, None
    d_gamma = sums[1]
    if settings.absolute:
        d_gamma = torch.where(weight < 0, -d_gamma, d_gamma)
    return d_gamma.to(weight.dtype), sums[0].to(weight.dtype)


def unshared_gradients(operands, factor, count, eps):
    """Compute dL/dx and the pair of `channel_sums` in training, for a batch that is not shared.

    On a CPU this is one call of ATen's kernel, with `source` as its input, `center` as the mean and `scale` as
    1 / sqrt(var + eps).

    Args:
        operands: `Operands`.
        factor: γ / sqrt(var + eps), (C,).
        count: values per channel.
        eps: as in `libs.abn.ABN`.
    """
    if kernels.supports(operands.source):
        return kernels.backward_unshared(*operands, factor=factor, count=count)
    source, dz, center, scale = operands
    dx, sum_normal_dz, sum_dz = torch.ops.aten.native_batch_norm_backward(
        dz, source, factor / scale, None, None, center, scale, True, eps, [True, True, True])
    return dx, (sum_dz, sum_normal_dz)


def normalize_and_save(ctx, x, weight, bias, mean, invstd, count, settings):
    """Compute y as `normalize` does, and save in ctx what the backward pass needs, with one large tensor: x or y."""
    gamma, beta = gamma_and_beta(weight, bias, settings, invstd)
    y = normalize(x, mean, invstd, gamma=gamma, beta=beta, settings=settings)
    ctx.count, ctx.settings = count, settings
    if not settings.keep_input:
        ctx.mark_dirty(x)
    ctx.save_for_backward(x if settings.keep_input else y, mean, invstd, gamma, beta, weight)
    return y


class Normalize(torch.autograd.Function):
    """The layer in one process, which may share the batch with others: x (B, C, ...) → y (B, C, ...).

    Args:
        x: (B, C, ...).
        weight, bias: (C,), or None.
        mean, invstd: (C,), used to normalize.
        count: values per channel of the whole batch: an int, or a tensor () or (P,) whose sum it is. None if
            `settings.training` is False.
        settings: `Settings`.
        processes: `Processes` that share the batch, over which the backward pass sums; None if the batch is not shared.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, mean, invstd, count, settings, processes):
        ctx.processes = processes
        return normalize_and_save(ctx, x, weight, bias, mean=mean, invstd=invstd, count=count, settings=settings)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        saved, mean, invstd, gamma, beta, weight = ctx.saved_tensors
        settings, processes = ctx.settings, ctx.processes
        operands = backward_operands(saved, dy, mean, invstd, gamma=gamma, beta=beta, settings=settings)
        factor = gamma * invstd
        if settings.training and not processes:
            dx, sums = unshared_gradients(operands, factor, ctx.count, settings.eps)
        else:
            sums = channel_sums(operands)
            if not settings.training:
                dx = operands.dz * along_channels(factor, operands.dz)
            else:
                dx = input_gradient(operands, factor, processes.all_reduce(sums), ctx.count)
        return dx.to(dy.dtype), *parameter_gradients(sums, weight, settings), None, None, None, None, None


class NormalizeReplica(torch.autograd.Function):
    """First half of the layer in a replica, which is one of several threads: x → (y, token).

    The token (2, C) has no content in the forward pass. Its gradient is the sum of the `channel_sums` of all replicas:
    it comes from the `SumReplica` of each of them, through `Gather`, by the edges of the autograd graph alone.
    Arguments as in `Normalize`.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, mean, invstd, count, settings):
        y = normalize_and_save(ctx, x, weight, bias, mean=mean, invstd=invstd, count=count, settings=settings)
        return y, torch.zeros(2, len(mean), dtype=mean.dtype, device=mean.device)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, totals):
        saved, mean, invstd, gamma, beta, _ = ctx.saved_tensors
        operands = backward_operands(saved, dy, mean, invstd, gamma=gamma, beta=beta, settings=ctx.settings)
        dx = input_gradient(operands, gamma * invstd, totals, ctx.count)
        return dx.to(dy.dtype), None, None, None, None, None, None


class Gather(torch.autograd.Function):
    """Tokens of all replicas → the token of this replica, whose gradient goes back to all of them."""

    @staticmethod
    def forward(ctx, rank, *tokens):
        ctx.devices = [token.device for token in tokens]
        return tokens[rank].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, sums):
        return None, *(sums.to(device) for device in ctx.devices)


class SumReplica(torch.autograd.Function):
    """Second half of the layer in a replica: y is unchanged; the backward pass computes this replica's `channel_sums`.

    They are the gradient of the token. `x` is the input if it is kept, else None; other arguments as in `Normalize`.
    """

    @staticmethod
    def forward(ctx, y, token, x, weight, bias, mean, invstd, settings):
        gamma, beta = gamma_and_beta(weight, bias, settings, invstd)
        ctx.settings = settings
        ctx.save_for_backward(x if settings.keep_input else y, mean, invstd, gamma, beta, weight)
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        saved, mean, invstd, gamma, beta, weight = ctx.saved_tensors
        sums = channel_sums(backward_operands(saved, dy, mean, invstd, gamma=gamma, beta=beta, settings=ctx.settings))
        return dy, sums, None, *parameter_gradients(sums, weight, ctx.settings), None, None, None
