"""Batch norm with activation, by Triton kernels that read and write each map as few times as possible.

The layer, its symbols and its arguments are those of `libs.functions`, which computes the same by PyTorch's operators:
x̂ = (x - mean) / sqrt(var + eps), z = x̂ · γ + β, y = act(z). Here forward and backward pass move 3 and 5 maps where
PyTorch's operators move 5 and 10.

A channels-last map (B, C, H, W) is a matrix of B·H·W rows, the pixels, and C columns, the channels. A tile is a part of
it, of ROWS pixels and CHANNELS channels. Kernels compute in float32.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from ..functions import Settings
from .launch import launch, random_map

PROGRAMS = 1024         # of a kernel that reduces a map: several for each multiprocessor of an A100, H100 or H200
MOST_PARTS = 512        # into which such a kernel splits the rows of a sample
TILE = 4096             # values of a tile; half as many of a kernel with sums or several maps
WIDTH = 128             # channels of a tile, at most
WARPS = 4


# --- Parts of kernels ---

@triton.jit
def tile_of(first_row, end_row, channel, channels, ROWS: tl.constexpr):
    """Offsets (ROWS, CHANNELS) of the tile of some channels from `first_row` on, and which of them are inside."""
    row = first_row + tl.arange(0, ROWS)
    offsets = row.to(tl.int64)[:, None] * channels + channel[None, :]
    return offsets, (row < end_row)[:, None] & (channel < channels)[None, :]


@triton.jit
def load_map(map, offsets, inside):
    """A tile of a map in float32, zero outside."""
    return tl.load(map + offsets, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def load_vector(vector, channel, channels):
    """The values (1, CHANNELS) of some channels in float32, zero outside."""
    return tl.load(vector + channel, mask=channel < channels, other=0.0).to(tl.float32)[None, :]


@triton.jit
def load_gamma(weight, channel, channels, eps, ABSOLUTE: tl.constexpr):
    """γ (1, CHANNELS) of some channels, not zero outside, where x̂ is divided by it too."""
    gamma = tl.load(weight + channel, mask=channel < channels, other=1.0).to(tl.float32)[None, :]
    if ABSOLUTE:
        gamma = tl.abs(gamma) + eps
    return gamma


@triton.jit
def activate(z, param, ACTIVATION: tl.constexpr):
    """act(z). NaN stays NaN, so that a loss shows it."""
    if ACTIVATION == "leaky_relu":
        z = tl.where(z > 0, z, z * param)
    elif ACTIVATION == "relu":
        z = tl.where(z <= 0, 0.0, z)
    elif ACTIVATION == "elu":
        z = tl.where(z > 0, z, param * (tl.exp(tl.where(z > 0, 0.0, z)) - 1))
    return z


@triton.jit
def gradient_at_output(y, dy, param, ACTIVATION: tl.constexpr):
    """dL/dz from y = act(z) and dL/dy."""
    if ACTIVATION == "leaky_relu":
        dy = tl.where(y > 0, dy, dy * param)
    elif ACTIVATION == "relu":
        dy = tl.where(y > 0, dy, 0.0)
    elif ACTIVATION == "elu":
        dy = tl.where(y > 0, dy, dy * (y + param))
    return dy


@triton.jit
def undo_activation(y, param, ACTIVATION: tl.constexpr):
    """z from y = act(z), for an activation that has an inverse."""
    if ACTIVATION == "leaky_relu":
        y = tl.where(y > 0, y, y / param)
    elif ACTIVATION == "elu":
        # Far below zero y rounds to -α. The bound, the smallest normal number, keeps z finite; dL/dz is zero there.
        y = tl.where(y < 0, tl.log(tl.maximum(y / param + 1, 1.1754943508222875e-38)), y)
    return y


@triton.jit
def normal_and_gradient(saved, dy, mean, invstd, gamma, beta, param, KEPT: tl.constexpr, ACTIVATION: tl.constexpr):
    """x̂ and dL/dz of a tile, from dL/dy and what the forward pass saved: x (KEPT) or y."""
    if KEPT:
        normal = (saved - mean) * invstd
        dz = gradient_at_output(activate(normal * gamma + beta, param, ACTIVATION), dy, param, ACTIVATION)
    else:
        normal = (undo_activation(saved, param, ACTIVATION) - beta) / gamma
        dz = gradient_at_output(saved, dy, param, ACTIVATION)
    return normal, dz


@triton.jit
def merge(counts, means, moments):
    """Merge the statistics of P parts of a batch (Chan, Golub, LeVeque 1979): mean and moment (CHANNELS,).

    Args: counts (P, 1), means (P, CHANNELS), moments (P, CHANNELS), sums of squared distances from the part's mean.
    """
    mean = tl.sum(counts * means, 0) / tl.sum(counts, 0)
    distance = means - mean[None, :]
    return mean, tl.sum(moments + counts * distance * distance, 0)


@triton.jit
def load_count(counts, parts, PARTS: tl.constexpr):
    """Sum of a vector of counts."""
    part = tl.arange(0, PARTS)
    return tl.sum(tl.load(counts + part, mask=part < parts, other=0.0), 0)


# --- Forward pass ---

@triton.jit
def partial_statistics_kernel(x, means, moments, rows, rows_per_part, channels, ROWS: tl.constexpr,
                              CHANNELS: tl.constexpr):
    """Mean and moment of each part of each sample: (samples, parts, channels). `rows` are those of a sample."""
    part, sample = tl.program_id(1), tl.program_id(2)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    first = part * rows_per_part
    end = tl.minimum(first + rows_per_part, rows)
    # Each value of the tile has statistics of its own (Welford 1962), which are merged at the end.
    mean = tl.zeros((ROWS, CHANNELS), tl.float32)
    moment = tl.zeros((ROWS, CHANNELS), tl.float32)
    count = 0.0
    for start in range(first, end, ROWS):
        offsets, inside = tile_of(sample * rows + start, sample * rows + end, channel, channels, ROWS)
        value = load_map(x, offsets, inside)
        count += 1.0
        distance = tl.where(inside, value - mean, 0.0)
        mean += distance * (1.0 / count)
        moment += distance * (value - mean)
    lane = tl.arange(0, ROWS)
    counts = tl.maximum((end - first - lane + ROWS - 1) // ROWS, 0).to(tl.float32)
    mean, moment = merge(counts[:, None], mean, moment)
    target = (sample * tl.num_programs(1) + part) * channels + channel
    tl.store(means + target, mean, mask=channel < channels)
    tl.store(moments + target, moment, mask=channel < channels)


@triton.jit
def merge_statistics_kernel(means, moments, statistics, sample_means, running_mean, running_var, samples, parts, rows,
                            rows_per_part, channels, momentum, eps, RUNNING: tl.constexpr, BY_SAMPLE: tl.constexpr,
                            PARTS: tl.constexpr, CHANNELS: tl.constexpr):
    """Merge the statistics of parts and samples, and update the running statistics (RUNNING).

    `statistics` receives mean (channels), 1 / sqrt(var + eps) (channels) and the number of values per channel;
    `sample_means` (samples, channels) the mean of each sample (BY_SAMPLE).
    """
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside_channels = channel < channels
    mean = tl.zeros((CHANNELS,), tl.float32)
    moment = tl.zeros((CHANNELS,), tl.float32)
    count = 0.0
    for sample in range(0, samples):
        lane_counts = tl.zeros((PARTS, 1), tl.float32)
        lane_means = tl.zeros((PARTS, CHANNELS), tl.float32)
        lane_moments = tl.zeros((PARTS, CHANNELS), tl.float32)
        for start in range(0, parts, PARTS):
            part = start + tl.arange(0, PARTS)
            offsets = (sample * parts + part)[:, None] * channels + channel[None, :]
            inside = (part < parts)[:, None] & inside_channels[None, :]
            part_counts = tl.maximum(tl.minimum(rows - part * rows_per_part, rows_per_part), 0)[:, None].to(tl.float32)
            total = lane_counts + part_counts
            share = part_counts / tl.maximum(total, 1.0)
            distance = load_map(means, offsets, inside) - lane_means
            lane_means += distance * share
            lane_moments += load_map(moments, offsets, inside) + distance * distance * (lane_counts * share)
            lane_counts = total
        sample_mean, sample_moment = merge(lane_counts, lane_means, lane_moments)
        if BY_SAMPLE:
            tl.store(sample_means + sample * channels + channel, sample_mean, mask=inside_channels)
        share = rows / (count + rows)
        distance = sample_mean - mean
        mean += distance * share
        moment += sample_moment + distance * distance * (count * share)
        count += rows
    tl.store(statistics + channel, mean, mask=inside_channels)
    tl.store(statistics + channels + channel, tl.rsqrt(moment / count + eps), mask=inside_channels)
    if tl.program_id(0) == 0:
        tl.store(statistics + 2 * channels, count)
    if RUNNING:
        old_mean = tl.load(running_mean + channel, mask=inside_channels, other=0.0).to(tl.float32)
        old_var = tl.load(running_var + channel, mask=inside_channels, other=0.0).to(tl.float32)
        new_mean = old_mean + momentum * (mean - old_mean)
        new_var = old_var + momentum * (moment / (count - 1) - old_var)
        tl.store(running_mean + channel, new_mean.to(running_mean.dtype.element_ty), mask=inside_channels)
        tl.store(running_var + channel, new_var.to(running_var.dtype.element_ty), mask=inside_channels)


@triton.jit
def normalize_kernel(x, y, mean, invstd, weight, bias, rows, channels, eps, param, ABSOLUTE: tl.constexpr,
                     ACTIVATION: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """y = act(x̂ · γ + β), where y may be x."""
    blocks = tl.cdiv(channels, CHANNELS)
    channel = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    offsets, inside = tile_of(tl.program_id(0) // blocks * ROWS, rows, channel, channels, ROWS)
    scale = load_gamma(weight, channel, channels, eps, ABSOLUTE) * load_vector(invstd, channel, channels)
    centered = load_map(x, offsets, inside) - load_vector(mean, channel, channels)
    z = centered * scale + load_vector(bias, channel, channels)
    tl.store(y + offsets, activate(z, param, ACTIVATION).to(y.dtype.element_ty), mask=inside)


# --- Backward pass ---

@triton.jit
def partial_sums_kernel(saved, dy, mean, invstd, weight, bias, partial, rows, rows_per_part, channels, eps, param,
                        KEPT: tl.constexpr, ABSOLUTE: tl.constexpr, ACTIVATION: tl.constexpr, ROWS: tl.constexpr,
                        CHANNELS: tl.constexpr):
    """Sums of dL/dz and x̂ · dL/dz over each part of the rows: `partial` (2, parts, channels)."""
    part, parts = tl.program_id(1), tl.num_programs(1)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    center, factor = load_vector(mean, channel, channels), load_vector(invstd, channel, channels)
    gamma = load_gamma(weight, channel, channels, eps, ABSOLUTE)
    beta = load_vector(bias, channel, channels)
    sum_dz = tl.zeros((ROWS, CHANNELS), tl.float32)
    sum_normal_dz = tl.zeros((ROWS, CHANNELS), tl.float32)
    end = tl.minimum((part + 1) * rows_per_part, rows)
    for start in range(part * rows_per_part, end, ROWS):
        offsets, inside = tile_of(start, end, channel, channels, ROWS)
        normal, dz = normal_and_gradient(load_map(saved, offsets, inside), load_map(dy, offsets, inside), center,
                                         factor, gamma, beta, param, KEPT, ACTIVATION)
        sum_dz += dz
        sum_normal_dz += normal * dz
    target = part * channels + channel
    tl.store(partial + target, tl.sum(sum_dz, 0), mask=channel < channels)
    tl.store(partial + parts * channels + target, tl.sum(sum_normal_dz, 0), mask=channel < channels)


@triton.jit
def total(partial, parts, channel, channels, PARTS: tl.constexpr, CHANNELS: tl.constexpr):
    """Sum (CHANNELS,) over the parts of partial sums (parts, channels)."""
    lanes = tl.zeros((PARTS, CHANNELS), tl.float32)
    for start in range(0, parts, PARTS):
        offsets, inside = tile_of(start, parts, channel, channels, PARTS)
        lanes += load_map(partial, offsets, inside)
    return tl.sum(lanes, 0)


@triton.jit
def store_sums(sum_dz, sum_normal_dz, sums, weight, d_weight, d_bias, channel, channels, ABSOLUTE: tl.constexpr,
               AFFINE: tl.constexpr):
    """Store `sums` (2, channels) and, from them, the gradients of weight and bias (AFFINE)."""
    inside = channel < channels
    tl.store(sums + channel, sum_dz, mask=inside)
    tl.store(sums + channels + channel, sum_normal_dz, mask=inside)
    if AFFINE:
        d_gamma = sum_normal_dz
        if ABSOLUTE:
            d_gamma = tl.where(tl.load(weight + channel, mask=inside, other=0.0) < 0, -d_gamma, d_gamma)
        tl.store(d_weight + channel, d_gamma.to(d_weight.dtype.element_ty), mask=inside)
        tl.store(d_bias + channel, sum_dz.to(d_bias.dtype.element_ty), mask=inside)


@triton.jit
def merge_sums_kernel(partial, sums, weight, d_weight, d_bias, parts, channels, ABSOLUTE: tl.constexpr,
                      AFFINE: tl.constexpr, PARTS: tl.constexpr, CHANNELS: tl.constexpr):
    """Add up `partial` (2, parts, channels): `sums` (2, channels), and the gradients of weight and bias."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    sum_dz = total(partial, parts, channel, channels, PARTS, CHANNELS)
    sum_normal_dz = total(partial + parts * channels, parts, channel, channels, PARTS, CHANNELS)
    store_sums(sum_dz, sum_normal_dz, sums, weight, d_weight, d_bias, channel, channels, ABSOLUTE, AFFINE)


@triton.jit
def elements_kernel(saved, dy, dx, mean, invstd, weight, bias, sums, counts, rows, channels, peers, eps, param,
                    TRAINING: tl.constexpr, KEPT: tl.constexpr, ABSOLUTE: tl.constexpr, ACTIVATION: tl.constexpr,
                    PEERS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """dL/dx = γ / sqrt(var + eps) · (dL/dz - mean of dL/dz - x̂ · mean of x̂ · dL/dz); without means in evaluation."""
    blocks = tl.cdiv(channels, CHANNELS)
    channel = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    offsets, inside = tile_of(tl.program_id(0) // blocks * ROWS, rows, channel, channels, ROWS)
    factor = load_vector(invstd, channel, channels)
    gamma = load_gamma(weight, channel, channels, eps, ABSOLUTE)
    normal, dz = normal_and_gradient(
        load_map(saved, offsets, inside), load_map(dy, offsets, inside), load_vector(mean, channel, channels), factor,
        gamma, load_vector(bias, channel, channels), param, KEPT, ACTIVATION)
    if TRAINING:
        share = 1.0 / load_count(counts, peers, PEERS)
        mean_dz = load_vector(sums, channel, channels) * share
        mean_normal_dz = load_vector(sums + channels, channel, channels) * share
        dz = dz - mean_dz - normal * mean_normal_dz
    tl.store(dx + offsets, (gamma * factor * dz).to(dx.dtype.element_ty), mask=inside)


# --- Calls of the kernels ---

def tile_sizes(channels, values=TILE):
    """Constants ROWS, CHANNELS and `num_warps` of a kernel whose tiles have so many values."""
    width = min(WIDTH, max(16, triton.next_power_of_2(channels)))
    return {"ROWS": max(1, values // width), "CHANNELS": width, "num_warps": WARPS}


def blocks_of(channels, sizes):
    """Number of tiles beside each other."""
    return triton.cdiv(channels, sizes["CHANNELS"])


def elementwise_grid(rows, channels, sizes, samples=1):
    """Grid of a kernel whose programs have one tile each. Neighbors in the first axis are neighbors in memory."""
    return triton.cdiv(rows, sizes["ROWS"]) * blocks_of(channels, sizes), samples


def split_rows(rows, channels, sizes, samples=1):
    """Split the rows of a sample among the programs of a kernel that reduces a map: (parts, rows per part)."""
    wanted = min(MOST_PARTS, max(1, PROGRAMS // (samples * blocks_of(channels, sizes))))
    rows_per_part = triton.cdiv(triton.cdiv(rows, wanted), sizes["ROWS"]) * sizes["ROWS"]
    return triton.cdiv(rows, rows_per_part), rows_per_part


def vector_sizes(parts):
    """Constants PARTS, CHANNELS and `num_warps` of a kernel that merges so many parts."""
    lanes = min(64, triton.next_power_of_2(parts))
    return {"PARTS": lanes, "CHANNELS": min(WIDTH, max(16, TILE // 4 // lanes)), "num_warps": WARPS}


def statistics(x, eps, running_mean=None, running_var=None, momentum=0.0, by_sample=False):
    """Compute the statistics of a map, and update the running statistics if they are given.

    Args:
        x: (B, C, H, W), channels-last.
        eps: added to the variance.
        running_mean, running_var, momentum: running statistics (C,), and the weight of this batch in them.
        by_sample: also compute the mean of each sample.

    Returns:
        (statistics (2 · C + 1,), sample means): mean (C,), 1 / sqrt(var + eps) (C,) and number of values per channel;
        sample means (B, C), or None.
    """
    samples, channels = (len(x) if by_sample else 1), x.shape[1]
    rows = x.numel() // channels // samples
    sizes = tile_sizes(channels, TILE // 2)
    parts, rows_per_part = split_rows(rows, channels, sizes, samples)
    means, moments = x.new_empty((2, samples, parts, channels), dtype=torch.float32).unbind()
    launch(partial_statistics_kernel, (blocks_of(channels, sizes), parts, samples),
           x, means, moments, rows, rows_per_part, channels, **sizes)
    result = x.new_empty(2 * channels + 1, dtype=torch.float32)
    sample_means = x.new_empty((samples, channels), dtype=torch.float32) if by_sample else None
    sizes, running = vector_sizes(parts), running_mean is not None
    launch(merge_statistics_kernel, (blocks_of(channels, sizes),),
           means, moments, result, sample_means if by_sample else result, running_mean if running else result,
           running_var if running else result, samples, parts, rows, rows_per_part, channels, float(momentum),
           float(eps), RUNNING=running, BY_SAMPLE=by_sample, **sizes)
    return result, sample_means


def split_statistics(packed):
    """Split `statistics` into mean (C,), 1 / sqrt(var + eps) (C,) and number of values per channel (1,)."""
    channels = len(packed) // 2
    return packed.split([channels, channels, 1])


def affine_parameters(weight, bias, settings, like):
    """(weight, bias, whether γ is |weight| + eps): ones and zeros (C,) for a layer without affine parameters."""
    if weight is None:
        return torch.ones_like(like), torch.zeros_like(like), False
    return weight, bias, settings.absolute


def backward_sums(saved, dy, vectors, weight, d_weight, d_bias, settings, absolute):
    """Sum dL/dz and x̂ · dL/dz over each channel: (2, C). Writes the gradients of weight and bias if they are given."""
    rows, channels = saved.numel() // saved.shape[1], saved.shape[1]
    sizes = tile_sizes(channels, TILE // 2)
    parts, rows_per_part = split_rows(rows, channels, sizes)
    partial = saved.new_empty((2, parts, channels), dtype=torch.float32)
    launch(partial_sums_kernel, (blocks_of(channels, sizes), parts), saved, dy, *vectors, partial, rows,
           rows_per_part, channels, settings.eps, settings.activation_param, KEPT=settings.keep_input,
           ABSOLUTE=absolute, ACTIVATION=settings.activation, **sizes)
    return merge_sums(partial, weight, d_weight, d_bias, absolute)


def merge_sums(partial, weight, d_weight, d_bias, absolute):
    """Add up partial sums (2, parts, C) to (2, C). Writes the gradients of weight and bias if they are given."""
    parts, channels = partial.shape[1:]
    sums, sizes, affine = partial.new_empty((2, channels)), vector_sizes(parts), d_weight is not None
    launch(merge_sums_kernel, (blocks_of(channels, sizes),), partial, sums, weight, d_weight if affine else sums,
           d_bias if affine else sums, parts, channels, ABSOLUTE=absolute, AFFINE=affine, **sizes)
    return sums


def counts_of(count, like):
    """Numbers of values per channel, a vector (P,) whose sum is that of the batch; count: an int or such a tensor."""
    if isinstance(count, torch.Tensor):
        return count.reshape(-1)
    return like.new_full((1,), 1 if count is None else count)


def gradient_buffers(weight, bias):
    """Tensors for the gradients of weight and bias; None without affine parameters."""
    return (None, None) if weight is None else (torch.empty_like(weight), torch.empty_like(bias))


class Normalize(torch.autograd.Function):
    """`libs.functions.Normalize`: the same arguments, gradients and saved tensors, for channels-last maps.

    `count` may also be a vector (P,) whose sum is the number of values per channel.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, mean, invstd, count, settings, processes):
        channels, sizes = x.shape[1], tile_sizes(x.shape[1])
        rows = x.numel() // channels
        y = torch.empty_like(x) if settings.keep_input else x
        scale, shift, absolute = affine_parameters(weight, bias, settings, mean)
        launch(normalize_kernel, elementwise_grid(rows, channels, sizes), x, y, mean, invstd, scale, shift, rows,
               channels, settings.eps, settings.activation_param, ABSOLUTE=absolute, ACTIVATION=settings.activation,
               **sizes)
        if not settings.keep_input:
            ctx.mark_dirty(x)
        ctx.count, ctx.settings, ctx.processes = count, settings, processes
        ctx.save_for_backward(x if settings.keep_input else y, mean, invstd, weight, bias)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        saved, mean, invstd, weight, bias = ctx.saved_tensors
        settings, channels, sizes = ctx.settings, saved.shape[1], tile_sizes(saved.shape[1])
        rows = saved.numel() // channels
        dy = dy.contiguous(memory_format=torch.channels_last)
        d_weight, d_bias = gradient_buffers(weight, bias)
        scale, shift, absolute = affine_parameters(weight, bias, settings, mean)
        vectors = mean, invstd, scale, shift
        sums = backward_sums(saved, dy, vectors, scale, d_weight, d_bias, settings=settings, absolute=absolute)
        if settings.training and ctx.processes:
            sums = ctx.processes.all_reduce(sums)
        counts, dx = counts_of(ctx.count, mean), torch.empty_like(saved)
        launch(elements_kernel, elementwise_grid(rows, channels, sizes), saved, dy, dx, *vectors, sums, counts, rows,
               channels, len(counts), settings.eps, settings.activation_param, TRAINING=settings.training,
               KEPT=settings.keep_input, ABSOLUTE=absolute, ACTIVATION=settings.activation,
               PEERS=triton.next_power_of_2(len(counts)), **sizes)
        return dx, d_weight, d_bias, None, None, None, None, None


def examples(device, dtype):
    """Results of the layer in training, forward and backward, beside those of PyTorch's operators in float32.

    Args:
        device: torch.device.
        dtype: of the maps.

    Returns:
        {name: (result, expected)}.
    """
    x, dy = (random_map(2, 24, 9, 7, seed=seed, device=device, dtype=dtype) for seed in range(2))
    results = []
    for fused in (True, False):
        z = (x.clone() if fused else x.float()).requires_grad_()
        weight = torch.linspace(-1.5, 1.5, 24, device=device, requires_grad=True)
        bias, mean, var = (torch.linspace(-0.5, stop, 24, device=device) for stop in (0.5, 1.0, 1.5))
        bias.requires_grad_()
        if fused:
            packed, _ = statistics(x, 1e-5, mean, var, 0.1)
            settings = Settings(1e-5, "leaky_relu", 0.1, training=True, absolute=True, keep_input=False)
            y = Normalize.apply(z.clone(), weight, bias, *split_statistics(packed), settings, None)
        else:
            y = F.leaky_relu(F.batch_norm(z, mean, var, weight.abs() + 1e-5, bias, True, 0.1, 1e-5), 0.1)
        y.backward(dy.to(y.dtype))
        results.append((y.detach(), z.grad, weight.grad, bias.grad, mean, var))
    names = "the output", "dL/dx", "dL/dweight", "dL/dbias", "the running mean", "the running variance"
    return dict(zip(names, zip(*results, strict=True), strict=True))
