"""How long work takes on a device, and how much of a prediction is not the network's."""

import copy
import itertools
import math
import time
from statistics import median

import torch

from ..devices import memory
from .sliding import SlidingPredictor

TURNS, SECONDS = 10, 30.0       # most predictions that are timed, and most seconds for them


def finished(device):
    """Wait for what a GPU has been told to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_calls(function, device, turns, most=math.inf):
    """Seconds of each of so many calls of a function; one call before them is not counted. No call begins after `most`
    seconds in all, but one is counted in any case."""
    found = []
    while len(found) <= turns and (len(found) < 2 or sum(found) < most):
        finished(device)
        start = time.perf_counter()
        function()
        finished(device)
        found.append(time.perf_counter() - start)
    return found[1:]


def median_ms(function, runs, device):
    """{"ms", "spread_ms"} of calls of a function; one call before them is not counted."""
    return in_ms(time_calls(function, device, runs))


def in_ms(seconds):
    return {"ms": 1e3 * median(seconds), "spread_ms": 1e3 * (max(seconds) - min(seconds))}


class ReadyLogits:
    """In place of a network: what it gave for the first crops of the same shape, at no cost."""

    def __init__(self, network):
        self.network, self.ready = network, {}

    def __call__(self, crops):
        if crops.shape not in self.ready:
            self.ready[crops.shape] = {head: logits.clone() for head, logits in self.network(crops).items()}
        return self.ready[crops.shape]


def prediction(predictor, images, turns, most=math.inf, predict=SlidingPredictor.labels):
    """What a `SlidingPredictor` takes from the pixels of an image to its labels in the host's memory.

    Args:
        predictor: a `SlidingPredictor`.
        images: (H, W, 3) uint8 each, which take turns.
        turns, most: as in `time_calls`.
        predict: (predictor, image) → what is asked for, a tensor.

    Returns {"ms", "spread_ms", "images_per_s", "beyond_the_network": share of the time that is left when its logits are
    ready, "peak_gb": of the device, on the CPU of the process}.
    """
    device = predictor.device
    memory.reset_peak(device)

    def seconds(predictor, turns, most=math.inf):
        waiting = itertools.cycle(images)
        return time_calls(lambda: predict(predictor, next(waiting)).cpu(), device, turns, most)

    whole = seconds(predictor, turns, most)
    peak = memory.peak_bytes(device)
    without = copy.copy(predictor)
    without.network = ReadyLogits(predictor.network)
    for image in {tuple(image.shape): image for image in images}.values():
        predict(without, image)
    rest = seconds(without, len(whole))
    found = in_ms(whole)
    return found | {"images_per_s": 1e3 / found["ms"], "beyond_the_network": in_ms(rest)["ms"] / found["ms"],
                    "peak_gb": peak / 1e9}
