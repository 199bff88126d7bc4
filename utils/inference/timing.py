"""Timing of work on a device, and of the share of a prediction's time that is spent outside the network."""

import copy
import itertools
import math
import time
from statistics import median

import torch

from ..devices import memory
from .sliding import SlidingPredictor

MAX_RUNS, MAX_SECONDS = 10, 30.0        # limits of the timed predictions: number, total time


def synchronize(device):
    """Wait until a GPU has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_calls(function, device, runs, max_seconds=math.inf):
    """Time repeated calls of a function after one warm-up call.

    Args:
        function: called without arguments.
        device: where it computes.
        runs: number of timed calls.
        max_seconds: no further call begins after this time, warm-up included; at least one call is timed.

    Returns:
        Seconds of each timed call.
    """
    seconds = []
    while len(seconds) <= runs and (len(seconds) < 2 or sum(seconds) < max_seconds):
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def median_ms(function, runs, device):
    """{"ms", "spread_ms"} of `runs` calls of a function after one warm-up call."""
    return in_ms(time_calls(function, device, runs))


def in_ms(seconds):
    """{"ms": median, "spread_ms": largest - smallest} of times in seconds."""
    return {"ms": 1e3 * median(seconds), "spread_ms": 1e3 * (max(seconds) - min(seconds))}


class CachedNetwork:
    """Stands in for a network and returns the logits of the first crops of the same shape, at no cost."""

    def __init__(self, network):
        self.network, self.cache = network, {}

    def __call__(self, crops):
        if crops.shape not in self.cache:
            self.cache[crops.shape] = {head: logits.clone() for head, logits in self.network(crops).items()}
        return self.cache[crops.shape]


def time_prediction(predictor, images, runs, max_seconds=math.inf, predict=SlidingPredictor.labels):
    """Time predictions, from the pixels of an image to its labels in the host's memory.

    Args:
        predictor: a `SlidingPredictor`.
        images: (H, W, 3) uint8 each, used in turn.
        runs, max_seconds: as in `time_calls`.
        predict: (predictor, image) → a tensor, the prediction.

    Returns:
        {"ms", "spread_ms", "images_per_s", "beyond_the_network": share of the time that remains with a network that
        costs nothing, "peak_gb": peak memory of the device, or of the process on the CPU}.
    """
    device = predictor.device
    memory.reset_peak(device)

    def seconds(predictor, runs, max_seconds=math.inf):
        cycle = itertools.cycle(images)
        return time_calls(lambda: predict(predictor, next(cycle)).cpu(), device, runs, max_seconds)

    total = seconds(predictor, runs, max_seconds)
    peak = memory.peak_bytes(device)
    without_network = copy.copy(predictor)
    without_network.network = CachedNetwork(predictor.network)
    for image in {tuple(image.shape): image for image in images}.values():
        predict(without_network, image)
    rest = seconds(without_network, len(total))
    result = in_ms(total)
    return result | {"images_per_s": 1e3 / result["ms"], "beyond_the_network": in_ms(rest)["ms"] / result["ms"],
                     "peak_gb": peak / 1e9}
