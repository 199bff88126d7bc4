"""Sliding-window inference: class probabilities of an image from windows, several scales and mirrored passes."""

import functools
import itertools
import math

import numpy as np
import torch
import torch.nn.functional as F

from ..common.messages import logger
from ..devices import memory
from ..devices.select import cudnn_benchmark
from ..ops.normalization import Normalization
from ..ops.probabilities import most_probable
from ..ops.upsampling import GRID, grid_of, round_size, upsample_by_matmul, upsampling_matrix

HEADS = ("fine", "coarse")      # heads whose probabilities can be predicted


def fitting_size(size, name, grid=GRID):
    """Round a size up by `round_size`, with a message if it changes; name: "crops" or "windows"."""
    rounded = round_size(size, grid)
    if rounded != tuple(size):
        logger.info(f"{name} of {size[0]}×{size[1]} are rounded up to {rounded[0]}×{rounded[1]}: logits lie on the "
                    f"pixels only if both sides are {grid[0]}k{' + 1' * grid[1]}")
    return rounded


def window_starts(length, window, overlap):
    """First pixels of the windows along an axis; the last window ends at the end of the axis."""
    if length <= window:
        return [0]
    stride = max(1, int(window * (1 - overlap)))
    count = math.ceil((length - window) / stride) + 1
    return [min(i * stride, length - window) for i in range(count)]


class SlidingPredictor:
    """Predicts class probabilities of whole images from sliding windows.

    Probabilities of overlapping windows are averaged; those of scales and mirrored passes are resized to the image and
    averaged. Everything is computed on the device, probabilities in float32.

    Args:
        network: images (B, 3, h, w) → {"fine": logits[, "coarse": logits]}, in evaluation mode. Its attribute `grid`,
            if it has one, gives the sizes at which logits lie on pixels (see `round_size`).
        window: (height, width) in pixels, rounded up to such a size; None for the whole (scaled) image at once. A side
            longer than that of the (scaled) image is reduced to the image's side, rounded up, so that features and
            class centers see as little padding as possible.
        overlap: of neighboring windows, as a share of the window.
        scales: factors by which the image is resized (bilinear, half-pixel centers).
        flip: also run each scale mirrored.
        batch_size: windows per forward pass; may mix scales, mirrored or not.
        normalization: of the network's input.
        device: where to compute; None for the device of the network's parameters.
        autocast: dtype of mixed precision, or None.
        memory_format: of the network's input.
        watch: progress callback (windows done, windows of the image) or None; called at the start of each image and
            after each batch, until it returns True.

    Raises:
        ValueError: if `window`, `overlap`, `scales` or `batch_size` is invalid.
    """

    def __init__(self, network, window=(769, 769), overlap=1 / 3, scales=(1.0,), flip=False, batch_size=4,
                 normalization=None, device=None, autocast=None, memory_format=torch.contiguous_format, watch=None):
        if not 0 <= overlap < 1:
            raise ValueError(f"overlap: expected a share from 0 up to but not 1, found {overlap}")
        if np.ndim(scales) != 1 or not len(scales) or min(scales) <= 0:
            raise ValueError(f"scales: expected numbers above 0, such as (1.0,), found {scales}")
        if window is not None and (np.shape(window) != (2,) or min(window) < 1):
            raise ValueError(f"window: expected (height, width) of at least one pixel, found {window}")
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least one window, found {batch_size}")
        self.network = network
        self.grid = grid_of(network)
        self.window = None if window is None else round_size(window, self.grid)
        self.overlap = overlap
        self.scales = tuple(scales)
        self.flip = flip
        self.batch_size = batch_size
        self.normalization = normalization or Normalization()
        parameters = network.parameters() if isinstance(network, torch.nn.Module) else iter(())
        self.device = device or getattr(next(parameters, None), "device", torch.device("cpu"))
        self.autocast = autocast
        self.memory_format = memory_format
        self.watch = watch
        self.known_free = 0     # bytes; this much memory was free in an earlier check

    def __call__(self, image):
        """Image (H, W, 3) uint8 RGB, array or tensor → fine probabilities (N, H, W) float32."""
        protocols = self.predict(image, ("fine",))
        return protocols.get("multi_scale", protocols.get("single_scale"))["fine"]

    def labels(self, image):
        """Image (H, W, 3) uint8 RGB → train ids (H, W) uint8 of the most probable classes."""
        return most_probable(self(image))[1]

    def as_tensor(self, image):
        """Convert an array or tensor to a tensor. Raises `ValueError` if it is not uint8 (H, W, 3)."""
        image = torch.as_tensor(np.require(image, requirements="CW") if isinstance(image, np.ndarray) else image)
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise ValueError(f"image: expected uint8 (H, W, 3) RGB, found {str(image.dtype).removeprefix('torch.')} "
                             f"{tuple(image.shape)}")
        return image

    @torch.inference_mode()
    def predict(self, image, heads=HEADS):
        """Predict the probabilities of an image with every protocol.

        On a GPU the result is queued, and not waited for. There windows are of one size, of which cuDNN tries all its
        algorithms at first; whole images may each have another size, for which that would take too long.

        Args:
            image: (H, W, 3) uint8 RGB, array or tensor.
            heads: heads to predict; those that the network lacks are left out.

        Returns:
            {protocol: {head: probabilities (N, H, W) float32}}. Protocols: `single_scale`, the unmirrored pass at scale
            1 (or at the only scale), if it is among the passes; `multi_scale`, the mean over all passes, if there are
            several.

        Raises:
            ValueError: for any other kind of array; values from 0 to 1 would be mistaken for a dark image.
            MemoryError: if the device has too little memory, before any is allocated.
        """
        image = self.as_tensor(image)
        size = image.shape[:2]
        sides = (False, True) if self.flip else (False,)
        passes = [_Pass(scale, mirrored, size=size, window=self.window, overlap=self.overlap, device=self.device,
                        grid=self.grid)
                  for scale, mirrored in itertools.product(self.scales, sides)]
        self._check_memory(passes)
        image = image.to(self.device, non_blocking=True).permute(2, 0, 1)[None]   # (1, 3, H, W)
        of_one_size = self.window is not None and all(one.window == self.window for one in passes)
        with cudnn_benchmark(self.device, of_one_size):
            return self._combine(passes, image, heads)

    def _combine(self, passes, image, heads):
        """Run passes over an image (1, 3, H, W) on the device, and average them as `predict` describes."""
        total, results = {}, {}
        for done in self._run(passes, self.normalization(image), heads):
            head_probabilities = done.result()
            if not done.mirrored and (done.scale == 1 or len(self.scales) == 1):
                results["single_scale"] = head_probabilities
            if len(passes) > 1:
                for name, probabilities in head_probabilities.items():
                    if name in total:
                        total[name] += probabilities
                    else:
                        total[name] = probabilities.clone()
            done.totals.clear()
        if total:
            results["multi_scale"] = {name: p.div_(len(passes)) for name, p in total.items()}
        return results

    @functools.cached_property
    def _network_memory(self):
        """`memory.measure_forward_pass` of the network; zeros if it is not a module."""
        known = isinstance(self.network, torch.nn.Module)
        return memory.measure_forward_pass(self.network, self.device, self.autocast) if known else (0, 0)

    def _check_memory(self, passes):
        """Raise `MemoryError` if the device has less memory than the passes over an image need at minimum."""
        bytes_per_pixel, maps = self._network_memory
        needed = 0
        for current in passes:
            batch = min(self.batch_size, sum(other.remaining for other in passes if other.window == current.window))
            area = math.prod(current.padded)
            needed = max(needed, 3 * 4 * area + max(batch * math.prod(current.window) * bytes_per_pixel,
                                                    maps * 4 * area))
        if needed <= self.known_free:
            return
        free = memory.free_bytes(self.device)
        if needed > free:
            height, width = passes[0].size
            raise MemoryError(f"an image of {width}×{height} needs at least {needed / 1e9:,.1f} GB, but only "
                              f"{free / 1e9:,.1f} GB are free")
        self.known_free = needed

    def _run(self, passes, pixels, heads):
        """Run the network over the windows of all passes in batches; yield each pass when it is complete."""
        waiting = []        # (pass, (top, left), crop) of windows of the same size
        windows = sum(current.remaining for current in passes)

        def report():
            if self.watch is not None:
                if self.device.type == "cuda":      # report windows that are done, not only queued
                    torch.cuda.synchronize(self.device)
                if self.watch(windows - sum(current.remaining for current in passes), windows):
                    self.watch = None

        def flush():
            if not waiting:
                return
            crops = torch.cat([crop for _, _, crop in waiting]).contiguous(memory_format=self.memory_format)
            outputs = self._forward(crops)
            for name in (name for name in heads if name in outputs):
                for (current, corner, _), logits in zip(waiting, outputs[name].float(), strict=True):
                    current.add(name, logits, corner)
            for current, _, _ in waiting:
                current.remaining -= 1
            waiting.clear()
            report()

        report()
        running = []
        for current in passes:
            running.append(current)
            for corner, crop in current.crops(pixels):
                if waiting and waiting[0][2].shape != crop.shape:
                    flush()
                waiting.append((current, corner, crop))
                if len(waiting) == self.batch_size:
                    flush()
            while running and not running[0].remaining:
                yield running.pop(0)
        flush()
        yield from running

    def _forward(self, crops):
        with torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            return self.network(crops)


class _Pass:
    """One pass over an image at one scale, mirrored or not: its windows and the sum of their probabilities.

    Args:
        scale: factor by which the image is resized.
        mirrored: whether the image is mirrored.
        size: (height, width) of the image.
        window: largest (height, width) of a window; None for the whole scaled image.
        overlap: of neighboring windows.
        device: of the probabilities.
        grid: of the network.

    Attributes:
        remaining: number of windows that are not done.
    """

    def __init__(self, scale, mirrored, size, window, overlap, device, grid=GRID):
        self.scale, self.mirrored, self.size = scale, mirrored, size
        self.scaled = size if scale == 1 else tuple(max(1, round(length * scale)) for length in size)
        rounded = round_size(self.scaled, grid)
        self.window = rounded if window is None else tuple(map(min, window, rounded))
        self.padded = tuple(max(pair) for pair in zip(self.scaled, self.window, strict=True))
        self.starts = [window_starts(length, side, overlap)
                       for length, side in zip(self.scaled, self.window, strict=True)]
        self.remaining = math.prod(map(len, self.starts))
        # 1 / the number of windows that cover each row and column; the product is the weight of a pixel.
        self.weights = [_inverse_counts(length, side, first, device)
                        for length, side, first in zip(self.padded, self.window, self.starts, strict=True)]
        self.totals = {}

    def crops(self, pixels):
        """Yield ((top, left), crop (1, 3, h, w)) of each window; pixels: normalized (1, 3, H, W)."""
        if self.scaled != tuple(pixels.shape[-2:]):
            pixels = F.interpolate(pixels, size=self.scaled, mode="bilinear", align_corners=False)
        if self.mirrored:
            pixels = pixels.flip(-1)
        # The padding is the mean color, which is zero after normalization. `result` removes it.
        pixels = F.pad(pixels, (0, self.padded[1] - self.scaled[1], 0, self.padded[0] - self.scaled[0]))
        height, width = self.window
        for top, left in itertools.product(*self.starts):
            yield (top, left), pixels[..., top:top + height, left:left + width]

    def add(self, name, logits, corner):
        """Add a window's probabilities; logits (N, h, w) at any stride, corner (top, left)."""
        if name not in self.totals:
            self.totals[name] = logits.new_zeros(len(logits), *self.padded)
        rows, columns = (slice(first, first + length) for first, length in zip(corner, self.window, strict=True))
        add_probabilities(self.totals[name][:, rows, columns], logits, self.weights[0][rows], self.weights[1][columns])

    def result(self):
        """{head: probabilities (N, H, W)} at the size of the image, mirrored back."""
        results = {}
        for name, total in self.totals.items():
            total = total[:, :self.scaled[0], :self.scaled[1]]
            total = total.flip(-1) if self.mirrored else total
            if self.scaled != tuple(self.size):
                total = F.interpolate(total[None], size=self.size, mode="bilinear", align_corners=False)[0]
            results[name] = total
        return results


def _inverse_counts(length, window, starts, device):
    """1 / the number of windows that cover each position of an axis, (length,).

    Computed on the device, since a copy from the host would synchronize.
    """
    counts = torch.zeros(length, device=device)
    for start in starts:
        counts[start:start + window] += 1
    return 1 / counts


STRIP = 1 << 18         # values that a CPU processes at a time: a megabyte stays in its second-level cache
LARGEST_GAP = 80.0      # exp(-80) is above the smallest float32


def add_probabilities(total, logits, row_weights, column_weights):
    """total += softmax(upsampled logits) · weights; upsampling is bilinear with aligned corners.

    Args:
        total: (N, H, W) float32, changed in place; may be a view.
        logits: (N, h, w) float32.
        row_weights, column_weights: (H,) and (W,); a pixel's weight is their product.
    """
    add = add_at_once if total.is_cuda else add_by_strips
    add(total, logits, row_weights, column_weights)


def add_at_once(total, logits, row_weights, column_weights):
    """`add_probabilities` for a GPU, with few passes over the map."""
    values = upsample_by_matmul(logits[None], total.shape[1:])[0]                 # (N, H, W)
    total.addcmul_(values.softmax(0), row_weights[:, None] * column_weights)


def add_by_strips(total, logits, row_weights, column_weights):
    """`add_probabilities` for a CPU, without a full-size map.

    Upsamples the columns at once, then the rows strip by strip, so that everything after the first product stays in the
    cache.
    """
    _, height, width = total.shape
    from_rows, from_columns = (upsampling_matrix(length, source, logits.device) for length, source
                               in zip((height, width), logits.shape[1:], strict=True))
    # Shifted so that the largest logit of each pixel is 0: interpolated values are then at most 0, and exp at most 1.
    # If logits lie so far apart that exp could underflow for all classes between two pixels, shift again after
    # upsampling.
    logits = logits - logits.amax(0)
    shift_again = bool(logits.amin() < -LARGEST_GAP)
    wide = logits @ from_columns.T                                                  # (N, h, W)
    rows = max(1, STRIP // (len(total) * width))
    for top in range(0, height, rows):
        strip = slice(top, min(top + rows, height))
        first, last = _span(top, strip.stop - 1, height, logits.shape[1])
        values = from_rows[strip, first:last] @ wide[:, first:last]                 # (N, rows, W)
        if shift_again:
            values -= values.amax(0)
        values.exp_()
        factor = row_weights[strip, None] * column_weights / values.sum(0)          # (rows, W)
        total[:, strip].add_(values.mul_(factor))       # `+=` would also copy the slice onto itself


def _span(top, bottom, length, source):
    """Source rows needed for rows top to bottom (inclusive): (first, last + 1)."""
    ratio = (source - 1) / max(1, length - 1)
    return min(int(top * ratio), max(0, source - 2)), min(int(bottom * ratio) + 2, source)
