"""From an image to class probabilities: sliding windows, several scales, mirror."""

import functools
import itertools
import math

import numpy as np
import torch
import torch.nn.functional as F

from ..common.messages import logger
from ..devices import memory
from ..ops.normalization import Normalization
from ..ops.upsampling import GRID, grid_of, round_size, upsample_by_products, upsampling_matrix

HEADS = ("fine", "coarse")      # of which probabilities can be asked for


def fitting_size(size, what, grid=GRID):
    """`round_size`, and says so where it changes something; what: crops or windows."""
    rounded = round_size(size, grid)
    if rounded != tuple(size):
        logger.info(f"{what} of {size[0]}×{size[1]} are rounded up to {rounded[0]}×{rounded[1]}: logits fit the "
                    f"pixels at {grid[0]}k{' + 1' * grid[1]} only")
    return rounded


def window_starts(length, window, overlap):
    """First pixels of the windows along an axis. They cover it exactly: the last one ends at its end."""
    if length <= window:
        return [0]
    stride = max(1, int(window * (1 - overlap)))
    count = math.ceil((length - window) / stride) + 1
    return [min(i * stride, length - window) for i in range(count)]


class SlidingPredictor:
    """Class probabilities of whole images, from sliding windows.

    Probabilities of overlapping windows, of scales and of mirrored passes are averaged, the latter at the
    size of the image. Everything happens on the device, in float32 where probabilities are concerned.

    Args:
        network: images (B, 3, h, w) → {"fine": logits[, "coarse": logits]}, in evaluation mode; `grid`, if it has
            one, says at which sizes logits fit the pixels (`round_size`).
        window: (height, width) in pixels, rounded up to these; None for the whole (scaled) image at once. A side that
            is longer than the (scaled) image's is that of the image, rounded up: features and class centers then see
            as little padding as possible.
        overlap: of neighboring windows, as a share of the window.
        scales: factors by which the image is resized (bilinear, half-pixel centers).
        flip: run each scale mirrored too.
        batch_size: windows a forward pass, of any scale and side.
        normalization: of the network's input.
        device: where to compute; None for the device of the network's parameters.
        autocast: dtype of mixed precision, or None.
        memory_format: of the network's input.
        watch: called with the windows done and those of the image, when it begins and after each batch, until it
            returns True; or None.
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
        self.fitted = 0         # bytes that are known to be there

    def __call__(self, image):
        """image (H, W, 3) uint8 RGB, array or tensor → fine probabilities (N, H, W) float32."""
        passes = self.predict(image, ("fine",))
        return passes.get("multi_scale", passes.get("single_scale"))["fine"]

    def labels(self, image):
        """image (H, W, 3) uint8 RGB → train ids (H, W) uint8, the most probable class."""
        return most_probable(self(image)).to(torch.uint8)

    def checked(self, image):
        """An array or tensor as a tensor; `ValueError` if it is not uint8 (H, W, 3)."""
        image = torch.as_tensor(np.require(image, requirements="CW") if isinstance(image, np.ndarray) else image)
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise ValueError(f"image: expected uint8 (H, W, 3) RGB, found {str(image.dtype).removeprefix('torch.')} "
                             f"{tuple(image.shape)}")
        return image

    @torch.inference_mode()
    def predict(self, image, heads=HEADS):
        """image (H, W, 3) uint8 RGB → {protocol: {head: probabilities (N, H, W) float32}}, of these heads where the
        network has them.

        Protocols: `single_scale`, the plain pass at scale 1 (or at the only scale), where it is among the
        passes; `multi_scale`, the mean over all passes, where there is more than one. Raises `ValueError` for any
        other kind of array: 0 to 1 would pass for a dark image. Raises `MemoryError` before memory is asked for that
        the device has not.
        """
        image = self.checked(image)
        size = image.shape[:2]
        sides = (False, True) if self.flip else (False,)
        passes = [_Pass(scale, mirrored, size, self.window, self.overlap, self.device, self.grid)
                  for scale, mirrored in itertools.product(self.scales, sides)]
        self._check_memory(passes)
        image = image.to(self.device).permute(2, 0, 1)[None]                      # (1, 3, H, W)
        total, results = {}, {}
        for done in self._run(passes, self.normalization(image), heads):
            found = done.result()
            if not done.mirrored and (done.scale == 1 or len(self.scales) == 1):
                results["single_scale"] = found
            if len(passes) > 1:
                for name, probabilities in found.items():
                    if name in total:
                        total[name] += probabilities
                    else:
                        total[name] = probabilities.clone()
            done.totals.clear()
        if total:
            results["multi_scale"] = {name: p.div_(len(passes)) for name, p in total.items()}
        return results

    @functools.cached_property
    def _passing(self):
        known = isinstance(self.network, torch.nn.Module)
        return memory.measure_forward_pass(self.network, self.device, self.autocast) if known else (0, 0)

    def _check_memory(self, passes):
        """Raise `MemoryError` if the device has less memory than passes over an image take at the least."""
        a_pixel, maps = self._passing
        needed = 0
        for one in passes:
            batch = min(self.batch_size, sum(other.left for other in passes if other.window == one.window))
            area = math.prod(one.padded)
            needed = max(needed, 3 * 4 * area + max(batch * math.prod(one.window) * a_pixel, maps * 4 * area))
        if needed <= self.fitted:
            return
        free = memory.free_bytes(self.device)
        if needed > free:
            height, width = passes[0].size
            raise MemoryError(f"an image of {width}×{height} needs at least {needed / 1e9:,.1f} GB, of which "
                              f"{free / 1e9:,.1f} GB are free")
        self.fitted = needed

    def _run(self, passes, pixels, heads):
        """Run the network over the windows of all passes, several a time; yields each pass when it is complete."""
        waiting = []        # (pass, place, crop), of one size
        windows = sum(one.left for one in passes)

        def watch():
            if self.watch is not None:
                if self.device.type == "cuda":      # it is told when windows are done, not when they are queued
                    torch.cuda.synchronize(self.device)
                if self.watch(windows - sum(one.left for one in passes), windows):
                    self.watch = None

        def flush():
            if not waiting:
                return
            crops = torch.cat([crop for _, _, crop in waiting]).contiguous(memory_format=self.memory_format)
            outputs = self._forward(crops)
            for name in (name for name in heads if name in outputs):
                for (one, place, _), logits in zip(waiting, outputs[name].float(), strict=True):
                    one.add(name, logits, place)
            for one, _, _ in waiting:
                one.left -= 1
            waiting.clear()
            watch()

        watch()
        running = []
        for one in passes:
            running.append(one)
            for place, crop in one.crops(pixels):
                if waiting and waiting[0][2].shape != crop.shape:
                    flush()
                waiting.append((one, place, crop))
                if len(waiting) == self.batch_size:
                    flush()
            while running and not running[0].left:
                yield running.pop(0)
        flush()
        yield from running

    def _forward(self, crops):
        with torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            return self.network(crops)


class _Pass:
    """One scale and side of an image: where its windows lie, and the probabilities they add up to.

    Args:
        scale, mirrored: of this pass.
        size: (height, width) of the image.
        window: (height, width) at most; None for the whole scaled image.
        overlap: of neighboring windows.
        device: of the probabilities.
        grid: of the network.
    """

    def __init__(self, scale, mirrored, size, window, overlap, device, grid=GRID):
        self.scale, self.mirrored, self.size = scale, mirrored, size
        self.scaled = size if scale == 1 else tuple(max(1, round(length * scale)) for length in size)
        whole = round_size(self.scaled, grid)
        self.window = whole if window is None else tuple(map(min, window, whole))
        self.padded = tuple(max(pair) for pair in zip(self.scaled, self.window, strict=True))
        starts = [window_starts(length, side, overlap)
                  for length, side in zip(self.scaled, self.window, strict=True)]
        self.starts = starts
        self.left = math.prod(map(len, starts))
        # 1 / the number of windows on each row and column: their product is that of a pixel.
        self.weights = [_inverse_counts(length, side, first, device)
                        for length, side, first in zip(self.padded, self.window, starts, strict=True)]
        self.totals = {}

    def crops(self, pixels):
        """Normalized pixels (1, 3, H, W) → ((top, left), (1, 3, h, w)) of each window."""
        if self.scaled != tuple(pixels.shape[-2:]):
            pixels = F.interpolate(pixels, size=self.scaled, mode="bilinear", align_corners=False)
        if self.mirrored:
            pixels = pixels.flip(-1)
        # The padding is the mean color, which normalization takes to zero. It never enters a score.
        pixels = F.pad(pixels, (0, self.padded[1] - self.scaled[1], 0, self.padded[0] - self.scaled[0]))
        height, width = self.window
        for top, left in itertools.product(*self.starts):
            yield (top, left), pixels[..., top:top + height, left:left + width]

    def add(self, name, logits, place):
        """Add a window's probabilities; logits (N, h, w) at any stride, place (top, left)."""
        if name not in self.totals:
            self.totals[name] = logits.new_zeros(len(logits), *self.padded)
        top, left = place
        rows, columns = (slice(first, first + length) for first, length in zip(place, self.window, strict=True))
        add_probabilities(self.totals[name][:, rows, columns], logits, self.weights[0][rows], self.weights[1][columns])

    def result(self):
        """{head: probabilities (N, H, W)} at the size of the image, not mirrored."""
        results = {}
        for name, total in self.totals.items():
            total = total[:, :self.scaled[0], :self.scaled[1]]
            total = total.flip(-1) if self.mirrored else total
            if self.scaled != tuple(self.size):
                total = F.interpolate(total[None], size=self.size, mode="bilinear", align_corners=False)[0]
            results[name] = total
        return results


def _inverse_counts(length, window, starts, device):
    """1 / the number of windows that cover each place of an axis: (length,), made on the device: a copy would wait."""
    counts = torch.zeros(length, device=device)
    for start in starts:
        counts[start:start + window] += 1
    return 1 / counts


STRIP = 1 << 18         # values a CPU computes on at a time: a megabyte stays in its second-level cache
LARGEST_GAP = 80.0      # exp(-80) is above the smallest float32


def add_probabilities(total, logits, row_weights, column_weights):
    """total += softmax(upsampled logits) · weights; upsampling (bilinear, aligned corners) is a matrix from each side.

    Args:
        total: (N, H, W) float32, changed in place; may be a view.
        logits: (N, h, w) float32.
        row_weights, column_weights: (H,) and (W,).
    """
    add = add_at_once if total.is_cuda else add_by_strips
    add(total, logits, row_weights, column_weights)


def add_at_once(total, logits, row_weights, column_weights):
    """`add_probabilities` in as few passes over the map as a GPU can do it."""
    values = upsample_by_products(logits[None], total.shape[1:])[0]                 # (N, H, W)
    total.addcmul_(values.softmax(0), row_weights[:, None] * column_weights)


def add_by_strips(total, logits, row_weights, column_weights):
    """`add_probabilities` without a map of full size: the columns once, then the rows strip by strip, so that on a CPU
    everything after the first product stays in the cache."""
    _, height, width = total.shape
    from_rows, from_columns = (upsampling_matrix(length, source, logits.device) for length, source
                               in zip((height, width), logits.shape[1:], strict=True))
    # Shifted so that the largest of each pixel is 0: interpolated values then stay below 0, and exp below 1. Where
    # classes lie so far apart that all could vanish between two pixels, the shift is found again after upsampling.
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
        total[:, strip].add_(values.mul_(factor))       # `+=` would copy the sum onto itself


def _span(top, bottom, length, source):
    """First source row that rows top to bottom read, and the one after the last."""
    ratio = (source - 1) / max(1, length - 1)
    return min(int(top * ratio), max(0, source - 2)), min(int(bottom * ratio) + 2, source)


def most_probable(probabilities):
    """(N, H, W) → class (H, W) int64. On a CPU `argmax` over the first dimension takes five times as long."""
    return probabilities.max(0).indices
