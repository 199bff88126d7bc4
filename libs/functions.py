"""Batch norm with activation as autograd functions that keep one buffer.

Symbols: x the input, x̂ = (x - mean) / sqrt(var + eps), z = x̂ · γ + β, y = act(z). In place, y overwrites x
and the backward pass finds z and x̂ from y (Rota Bulo et al. 2018, section 3, variant I). Otherwise x is kept.

Per-channel values are (C,) in float64 for float64 inputs and in float32 for all others.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from . import kernels

TINY = torch.finfo(torch.float32).tiny


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


def local_statistics(x):
    """x (B, C, ...) → number of values a channel, mean (C,), centred second moment (C,)."""
    count = x.numel() // max(x.shape[1], 1)
    # The kernel below updates running statistics too, and from their dtype takes that of its results.
    mean, var = (x.new_zeros(x.shape[1], dtype=statistics_dtype(x)) for _ in range(2))
    if not x.is_meta:
        mean, var = torch.ops.aten.batch_norm_update_stats(x, mean, var, 0.0)
    return count, mean, var * count


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
        below = torch.log((y / param + 1).clamp_min(TINY))
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


def normalise(x, mean, invstd, weight, bias, settings):
    """y (B, C, ...): in the storage of x unless the input is to be kept."""
    gamma, beta = factors(weight, bias, settings, invstd)
    if x.is_cuda and x.dtype != torch.float64:
        out = torch.empty_like(x) if settings.keep_input else x
        return activate_(kernels.transform(x, gamma, beta, mean, invstd, out), settings)
    scale = gamma * invstd
    shift = along(beta - mean * scale, x)
    if x.dtype == invstd.dtype and not settings.keep_input:
        return activate_(x.mul_(along(scale, x)).add_(shift), settings)
    # Half precision rounds once, at the end.
    z = activate_((x * along(scale, x)).add_(shift), settings)
    return z.to(x.dtype) if settings.keep_input else x.copy_(z)


def recover(buffer, dy, mean, invstd, weight, bias, settings):
    """The kept buffer (x or y) and dL/dy → x̂ and dL/dz, both (B, C, ...) in the statistics' dtype."""
    gamma, beta = factors(weight, bias, settings, invstd)
    buffer, dy = buffer.to(invstd.dtype), dy.to(invstd.dtype)
    if settings.keep_input:
        normal = (buffer - along(mean, buffer)) * along(invstd, buffer)
        if settings.activation == "identity":
            return normal, dy
        z = torch.addcmul(along(beta, buffer), normal, along(gamma, buffer))
        return normal, through_activation(z, dy, settings)
    z, dz = undo_activation(buffer, dy, settings)
    return (z - along(beta, z)) / along(gamma, z), dz


def channel_sums(normal, dz):
    """x̂ and dL/dz → (2, C): the sums over each channel of dL/dz and of x̂ · dL/dz."""
    dims = [0, *range(2, dz.ndim)]
    return torch.stack([dz.sum(dims), (normal * dz).sum(dims)])


def input_gradient(normal, dz, totals, count, gamma, invstd, training):
    """dL/dx from x̂ and dL/dz; totals (2, C) and count are those of the whole batch."""
    if not training:
        return dz * along(gamma * invstd, dz)
    mean_dz, mean_normal_dz = totals / count
    return torch.addcmul(dz - along(mean_dz, dz), normal, -along(mean_normal_dz, dz)).mul_(along(gamma * invstd, dz))


def parameter_gradients(sums, weight, settings):
    """(2, C) sums of this part → gradients of weight and bias; (None, None) without them."""
    if weight is None:
        return None, None
    d_gamma = sums[1]
    if settings.absolute:
        d_gamma = torch.where(weight < 0, -d_gamma, d_gamma)
    return d_gamma.to(weight.dtype), sums[0].to(weight.dtype)


def gradients_alone(buffer, dy, mean, invstd, weight, bias, settings):
    """dL/dx and the (2, C) sums in training without other parts: one call of ATen's kernel.

    In place, the kernel is given z for its input, β for its mean and 1/γ for its inverse deviation: its x̂ is
    ours, and its gradient of x̂ · γ² / sqrt(var + eps) with regard to z is that of z with regard to x.
    """
    gamma, beta = factors(weight, bias, settings, invstd)
    buffer, dy = buffer.to(invstd.dtype), dy.to(invstd.dtype)
    if settings.keep_input:
        z = (buffer - along(mean, buffer)).mul_(along(gamma * invstd, buffer)).add_(along(beta, buffer))
        source, dz, factor = buffer, through_activation(z, dy, settings), gamma
    else:
        source, dz = undo_activation(buffer, dy, settings)
        mean, invstd, factor = beta, 1 / gamma, gamma ** 2 * invstd
    dx, sum_normal_dz, sum_dz = torch.ops.aten.native_batch_norm_backward(
        dz, source, factor, None, None, mean, invstd, True, settings.eps, [True, True, True])
    return dx, torch.stack([sum_dz, sum_normal_dz])


def normalise_and_keep(ctx, x, weight, bias, mean, invstd, count, settings):
    """`normalise`, and in ctx what the backward pass needs: one large buffer, x or y."""
    y = normalise(x, mean, invstd, weight, bias, settings)
    ctx.count, ctx.settings = count, settings
    if not settings.keep_input:
        ctx.mark_dirty(x)
    ctx.save_for_backward(x if settings.keep_input else y, mean, invstd, weight, bias)
    return y


class Normalise(torch.autograd.Function):
    """The layer alone, or one of several processes: backward sums over them with `processes.total`."""

    @staticmethod
    def forward(ctx, x, weight, bias, mean, invstd, count, settings, processes):
        ctx.processes = processes
        return normalise_and_keep(ctx, x, weight, bias, mean, invstd, count, settings)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        buffer, mean, invstd, weight, bias = ctx.saved_tensors
        if ctx.settings.training and not ctx.processes:
            dx, sums = gradients_alone(buffer, dy, mean, invstd, weight, bias, ctx.settings)
            return dx.to(dy.dtype), *parameter_gradients(sums, weight, ctx.settings), None, None, None, None, None
        if kernels.fit(buffer, ctx.settings):
            return _cuda_backward(ctx, buffer, dy, invstd, weight, bias)
        normal, dz = recover(buffer, dy, mean, invstd, weight, bias, ctx.settings)
        sums = channel_sums(normal, dz)
        totals = ctx.processes.total(sums) if ctx.processes and ctx.settings.training else sums
        gamma, _ = factors(weight, bias, ctx.settings, invstd)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = input_gradient(normal, dz, totals, ctx.count, gamma, invstd, ctx.settings.training).to(dy.dtype)
        return dx, *parameter_gradients(sums, weight, ctx.settings), None, None, None, None, None


def _cuda_backward(ctx, y, dy, invstd, weight, bias):
    """The same with ATen's kernels, in the dtype of y."""
    settings = ctx.settings
    z, dz = undo_activation(y, dy.contiguous(memory_format=torch.channels_last) if _is_channels_last(y)
                            else dy.contiguous(), settings)
    gamma, beta = factors(weight, bias, settings, invstd)
    sums = kernels.backward_sums(dz, z, gamma, beta)
    totals = ctx.processes.total(sums)
    dx = kernels.backward_elements(dz, z, gamma, beta, invstd, totals, ctx.count) if ctx.needs_input_grad[0] else None
    return dx, *parameter_gradients(sums, weight, settings), None, None, None, None, None


def _is_channels_last(x):
    return x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


class NormaliseReplica(torch.autograd.Function):
    """The layer in one of several threads, first half: (y, token).

    The token is empty going forward. Coming back it brings the sums of all replicas: from each one's
    `MeasureReplica` through `Gather` to here, by the edges of the graph alone.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, mean, invstd, count, settings):
        y = normalise_and_keep(ctx, x, weight, bias, mean, invstd, count, settings)
        return y, torch.zeros(2, len(mean), dtype=mean.dtype, device=mean.device)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, totals):
        buffer, mean, invstd, weight, bias = ctx.saved_tensors
        normal, dz = recover(buffer, dy, mean, invstd, weight, bias, ctx.settings)
        gamma, _ = factors(weight, bias, ctx.settings, invstd)
        dx = input_gradient(normal, dz, totals, ctx.count, gamma, invstd, training=True)
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
        ctx.save_for_backward(x if settings.keep_input else y, mean, invstd, weight, bias)
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        buffer, mean, invstd, weight, bias = ctx.saved_tensors
        sums = channel_sums(*recover(buffer, dy, mean, invstd, weight, bias, ctx.settings))
        return dy, sums, None, *parameter_gradients(sums, weight, ctx.settings), None, None, None
