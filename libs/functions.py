"""Batch norm with activation as autograd functions that keep one buffer.

Symbols: x the input, x̂ = (x - mean) / sqrt(var + eps), z = x̂ · γ + β, y = act(z). In place, y overwrites x
and the backward pass finds z and x̂ from y (Rota Bulo et al. 2018, section 3, variant I). Otherwise x is kept.

Per-channel values are (C,) in float64 for float64 inputs and in float32 for all others.
"""

import contextlib
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from . import kernels


class Settings(NamedTuple):
    """What a layer is: see `libs.abn.ABN`; `absolute`: γ is |weight| + eps; `keep_input`: not in place."""

    eps: float
    activation: str
    activation_param: float
    training: bool
    absolute: bool
    keep_input: bool


def statistics_dtype(x):
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def values_a_channel(x):
    return x.numel() // max(x.shape[1], 1)


def local_statistics(x, running_mean=None, running_var=None, momentum=0.0):
    """x (B, C, ...) → mean and variance (C,), not the unbiased one. Updates running statistics, if they are given."""
    dtype = statistics_dtype(x)
    with in_dtype((running_mean, running_var), dtype) as running:
        updated = [x.new_zeros(x.shape[1], dtype=dtype) if one is None else one for one in running]
        return updated if x.is_meta else torch.ops.aten.batch_norm_update_stats(x, *updated, momentum)


def shared_statistics(x, exchange, eps, running_mean=None, running_var=None, momentum=0.0):
    """x (B, C, ...), a part of a batch on a GPU → mean and 1 / sqrt(var + eps) (C,) of the batch, and the values a
    channel of each of its parts (P,). Updates running statistics, if they are given."""
    mean, invstd = kernels.statistics(x, eps)
    count = mean.new_full((1,), values_a_channel(x))        # a copy of a list would wait
    parts = torch.stack(exchange.gather(torch.cat([mean, invstd, count])))                          # (P, 2C + 1)
    means, invstds, counts = parts.split([len(mean), len(mean), 1], dim=1)
    counts = counts.flatten()
    with in_dtype((running_mean, running_var), mean.dtype) as running:
        return *kernels.combined_statistics(means, invstds, counts, *running, momentum, eps), counts


@contextlib.contextmanager
def in_dtype(running, dtype):
    """Running statistics, (C,) or None, as kernels want them, which update them: those of a module in half precision
    as copies, written back at the end."""
    updated = [None if one is None else one.to(dtype) for one in running]
    yield updated
    for one, new in zip(running, updated, strict=True):
        if new is not one:
            one.copy_(new)


def along(vector, x):
    """(C,) → (1, C, 1, ...), to be used with x (B, C, ...)."""
    return vector.view(1, -1, *[1] * (x.ndim - 2))


def factors(weight, bias, settings, like):
    """γ and β (C,) in the dtype of `like`; ones and zeros without affine parameters."""
    if weight is None:
        return torch.ones_like(like), torch.zeros_like(like)
    gamma = weight.to(like.dtype)
    return (gamma.abs() + settings.eps if settings.absolute else gamma), bias.to(like.dtype)


def activate_(z, settings):
    if settings.activation == "leaky_relu":
        return F.leaky_relu(z, settings.activation_param, inplace=True)
    if settings.activation == "relu":
        return F.relu(z, inplace=True)
    if settings.activation == "elu":
        return F.elu(z, settings.activation_param, inplace=True)
    return z


def undo_activation(y, dy, settings):
    """Output y and its gradient → z and dL/dz. relu cannot be undone, so layers with it keep their input."""
    param = settings.activation_param
    if settings.activation == "leaky_relu":
        return F.leaky_relu(y, 1 / param), torch.ops.aten.leaky_relu_backward(dy, y, param, True)
    if settings.activation == "elu":
        # Far below zero y rounds to -α and z would be -∞. The clamp keeps it finite; its gradient is zero there.
        below = torch.log((y / param + 1).clamp_min(torch.finfo(y.dtype).tiny))
        return torch.where(y < 0, below, y), torch.ops.aten.elu_backward(dy, param, 1, 1, True, y)
    return y, dy


def through_activation(z, dy, settings):
    """z and dL/dy → dL/dz."""
    param = settings.activation_param
    if settings.activation == "leaky_relu":
        return torch.ops.aten.leaky_relu_backward(dy, z, param, False)
    if settings.activation == "relu":
        return torch.ops.aten.threshold_backward(dy, z, 0)
    if settings.activation == "elu":
        return torch.ops.aten.elu_backward(dy, param, 1, 1, False, z)
    return dy


def affine(x, mean, invstd, gamma, beta, out):
    """x̂ · γ + β (B, C, ...) in `out`, which may be x; from half precision on a CPU a new map in the statistics' dtype,
    so that the activation comes before rounding."""
    if kernels.serve(x):
        return kernels.transform(x, gamma, beta, mean, invstd, out)
    scale = gamma * invstd
    shift = along(beta - mean * scale, x)
    return torch.mul(x, along(scale, x), out=out if x.dtype == invstd.dtype else None).add_(shift)


def normalize(x, mean, invstd, gamma, beta, settings):
    """y (B, C, ...): in the storage of x unless the input is to be kept."""
    out = torch.empty_like(x) if settings.keep_input else x
    z = activate_(affine(x, mean, invstd, gamma, beta, out), settings)
    return z if z is out else out.copy_(z)


class Operands(NamedTuple):
    """What the backward pass computes with: dL/dz, and x̂ = (source - center) · scale."""

    source: torch.Tensor        # (B, C, ...): the kept input x, or z found again from y
    dz: torch.Tensor            # (B, C, ...)
    center: torch.Tensor        # (C,)
    scale: torch.Tensor         # (C,)


def operands(buffer, dy, mean, invstd, gamma, beta, settings):
    """The kept buffer (x or y) and dL/dy, both (B, C, ...) → `Operands`.

    Maps are in the statistics' dtype, but where CUDA's kernels serve: those take half precision as it is.
    """
    if kernels.serve(buffer):
        dy = kernels.laid_out_like(dy, buffer)
    else:
        buffer, dy = buffer.to(invstd.dtype), dy.to(invstd.dtype)
    if not settings.keep_input:
        z, dz = undo_activation(buffer, dy, settings)
        return Operands(z, dz, beta, 1 / gamma)
    if settings.activation == "identity":
        return Operands(buffer, dy, mean, invstd)
    z = affine(buffer, mean, invstd, gamma, beta, torch.empty_like(buffer))
    return Operands(buffer, through_activation(z, dy, settings), mean, invstd)


def channel_sums(found):
    """`Operands` → (2, C): the sums over each channel of dL/dz and of x̂ · dL/dz."""
    if kernels.serve(found.source):
        return kernels.backward_sums(*found)
    dims = [0, *range(2, found.dz.ndim)]
    centered = found.source - along(found.center, found.source)
    return torch.stack([found.dz.sum(dims), (centered * found.dz).sum(dims) * found.scale])


def input_gradient(found, factor, totals, count):
    """dL/dx in training, from `Operands` and factor γ / sqrt(var + eps) (C,); totals (2, C) and count are those of
    the whole batch."""
    if kernels.serve(found.source):
        return kernels.backward_elements(*found, factor, totals, count)
    source, dz, center, scale = found
    mean_dz, mean_normal_dz = totals / count
    dx = torch.addcmul(dz - along(mean_dz, dz), source - along(center, source), -along(mean_normal_dz * scale, dz))
    return dx.mul_(along(factor, dz))


def parameter_gradients(sums, weight, settings):
    """The two sums (C,) of this part → gradients of weight and bias; (None, None) without them."""
    if weight is None:
        return None, None
    d_gamma = sums[1]
    if settings.absolute:
        d_gamma = torch.where(weight < 0, -d_gamma, d_gamma)
    return d_gamma.to(weight.dtype), sums[0].to(weight.dtype)


def gradients_alone(found, factor, count, eps):
    """dL/dx and the sums of `channel_sums`, as a pair, in training without other parts. On a CPU one call of ATen's
    kernel, for which `source` is the input, `center` its mean and `scale` its inverse deviation."""
    if kernels.serve(found.source):
        return kernels.backward_alone(*found, factor, count)
    dx, sum_normal_dz, sum_dz = torch.ops.aten.native_batch_norm_backward(
        found.dz, found.source, factor / found.scale, None, None, found.center, found.scale, True, eps,
        [True, True, True])
    return dx, (sum_dz, sum_normal_dz)


def normalize_and_keep(ctx, x, weight, bias, mean, invstd, count, settings):
    """`normalize`, and in ctx what the backward pass needs: one large buffer, x or y."""
    gamma, beta = factors(weight, bias, settings, invstd)
    y = normalize(x, mean, invstd, gamma, beta, settings)
    ctx.count, ctx.settings = count, settings
    if not settings.keep_input:
        ctx.mark_dirty(x)
    ctx.save_for_backward(x if settings.keep_input else y, mean, invstd, gamma, beta, weight)
    return y


class Normalize(torch.autograd.Function):
    """The layer alone, or one of several processes: backward sums over them with `processes.total`."""

    @staticmethod
    def forward(ctx, x, weight, bias, mean, invstd, count, settings, processes):
        ctx.processes = processes
        return normalize_and_keep(ctx, x, weight, bias, mean, invstd, count, settings)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        buffer, mean, invstd, gamma, beta, weight = ctx.saved_tensors
        settings, processes = ctx.settings, ctx.processes
        found = operands(buffer, dy, mean, invstd, gamma, beta, settings)
        factor = gamma * invstd
        if settings.training and not processes:
            dx, sums = gradients_alone(found, factor, ctx.count, settings.eps)
        else:
            sums = channel_sums(found)
            if not settings.training:
                dx = found.dz * along(factor, found.dz)
            else:
                dx = input_gradient(found, factor, processes.all_reduce(sums), ctx.count)
        return dx.to(dy.dtype), *parameter_gradients(sums, weight, settings), None, None, None, None, None


class NormaliseReplica(torch.autograd.Function):
    """The layer in one of several threads, first half: (y, token).

    The token is empty going forward. Coming back it brings the sums of all replicas: from each one's
    `MeasureReplica` through `Gather` to here, by the edges of the graph alone.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, mean, invstd, count, settings):
        y = normalize_and_keep(ctx, x, weight, bias, mean, invstd, count, settings)
        return y, torch.zeros(2, len(mean), dtype=mean.dtype, device=mean.device)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, totals):
        buffer, mean, invstd, gamma, beta, _ = ctx.saved_tensors
        found = operands(buffer, dy, mean, invstd, gamma, beta, ctx.settings)
        dx = input_gradient(found, gamma * invstd, totals, ctx.count)
        return dx.to(dy.dtype), None, None, None, None, None, None


class Gather(torch.autograd.Function):
    """Tokens of all replicas → one for this replica; its gradient goes back to all of them."""

    @staticmethod
    def forward(ctx, rank, *tokens):
        ctx.devices = [token.device for token in tokens]
        return tokens[rank].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, sums):
        return None, *(sums.to(device) for device in ctx.devices)


class MeasureReplica(torch.autograd.Function):
    """The layer in one of several threads, second half: y unchanged; backward measures this replica's sums."""

    @staticmethod
    def forward(ctx, y, token, x, weight, bias, mean, invstd, settings):
        ctx.settings = settings
        ctx.save_for_backward(x if settings.keep_input else y, mean, invstd, *factors(weight, bias, settings, invstd),
                              weight)
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        buffer, mean, invstd, gamma, beta, weight = ctx.saved_tensors
        sums = channel_sums(operands(buffer, dy, mean, invstd, gamma, beta, ctx.settings))
        return dy, sums, None, *parameter_gradients(sums, weight, ctx.settings), None, None, None
