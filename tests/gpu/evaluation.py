"""Evaluation on a device: sliding windows, scores and folded norms against the CPU; its speed."""

import functools
import itertools
import math
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from dataset.cityscapes import CityscapesDataset
from dataset.streets import write_dataset
from libs.abn import ABN
from libs.convert import fold_norms
from libs.fused.launch import obstacle
from networks.build import build_network
from networks.predictor import prepare_for_evaluation
from utils.devices.precision import AUTOCAST
from utils.devices.select import share_cores, writer_threads
from utils.inference import timing
from utils.inference.pictures import Pictures
from utils.inference.sliding import SlidingPredictor, window_starts
from utils.metrics.calibration import Calibration
from utils.metrics.evaluation import Evaluation, score, sum_of_matrices
from utils.metrics.iou import ConfusionMatrix
from utils.ops.normalization import Normalization
from utils.ops.probabilities import most_probable

from .rows import near


def make_network(size=65, **shape):
    """A network whose running statistics are of images, on the CPU."""
    torch.manual_seed(0)
    network = build_network(**shape).train()
    with torch.no_grad():
        for _ in range(5):
            network(torch.randn(4, 3, size, size))
        for one in (network.head.fine, network.head.coarse):    # small at the start: every class is as likely
            one.weight.mul_(200)
    return network.eval()


def make_image(size):
    return torch.randint(256, (*size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@functools.cache
def slowly(size, window, overlap, scales, flip, **shape):
    """Probabilities of an image (H, W, 3) in float64 on the CPU: one window after the other, at full size."""
    network, image = make_network(**shape).double(), make_image(size)
    pixels = Normalization()(image.permute(2, 0, 1)[None]).double()
    total = 0
    for scale, mirrored in itertools.product(scales, (False, True) if flip else (False,)):
        scaled = [round(length * scale) for length in size]
        crop = F.interpolate(pixels, size=scaled, mode="bilinear", align_corners=False)
        crop = crop.flip(-1) if mirrored else crop
        sides = [min(side, 8 * math.ceil((length - 1) / 8) + 1) for length, side in zip(scaled, window, strict=True)]
        padded = [max(pair) for pair in zip(scaled, sides, strict=True)]
        crop = F.pad(crop, (0, padded[1] - scaled[1], 0, padded[0] - scaled[0]))
        added, count = torch.zeros(1, 19, *padded, dtype=torch.float64), torch.zeros(padded)
        for top, left in itertools.product(*(window_starts(length, side, overlap) for length, side
                                             in zip(scaled, sides, strict=True))):
            place = (..., slice(top, top + sides[0]), slice(left, left + sides[1]))
            logits = F.interpolate(network(crop[place])["fine"], size=sides, mode="bilinear", align_corners=True)
            added[place] += logits.softmax(1)
            count[place] += 1
        mean = (added / count)[..., :scaled[0], :scaled[1]]
        mean = mean.flip(-1) if mirrored else mean
        total = total + F.interpolate(mean, size=size, mode="bilinear", align_corners=False)[0]
    return total / (len(scales) * (2 if flip else 1))


@torch.no_grad()
def windows(device, amp, layout, size, window=(65, 65), *, scales, flip=True, **shape):
    """Probabilities of sliding windows against those of the slow way."""
    expected = slowly(size, window, 1 / 3, scales, flip, **shape)
    assert float(expected.amax(0).mean()) > 0.2, "expected classes that differ, found all alike"
    network = make_network(**shape).to(device, memory_format=layout)
    predictor = SlidingPredictor(network, window, scales=scales, flip=flip, autocast=AUTOCAST[amp],
                                 memory_format=layout)
    actual = predictor(make_image(size))
    return f"probabilities {near(actual, expected, 1e-4 if amp == 'off' else 0.1, 'probabilities'):.1e}"


def scores(device, size, window=(65, 65), **shape):
    """The confusion matrix of `score` against a count of the labels by NumPy."""
    predictor = SlidingPredictor(make_network(**shape).to(device), window)
    items = []
    for _ in range(2):
        label = torch.randint(19, size, dtype=torch.uint8)
        label[:9] = 255
        items.append({"image": torch.randint(256, (3, *size), dtype=torch.uint8), "label": label})
    total = sum_of_matrices(image.matrices for image in score(predictor, items, 19))
    actual = total["single_scale"]["fine"].matrix.numpy()
    expected = np.zeros((19, 20), dtype=np.int64)
    for item in items:
        predicted = predictor.labels(item["image"].permute(1, 2, 0)).cpu().numpy()
        known = item["label"].numpy() != 255
        np.add.at(expected, (item["label"].numpy()[known], predicted[known]), 1)
    assert np.array_equal(actual, expected), f"expected {expected.sum()} pixels counted, found {actual.sum()}"
    return f"{expected.sum()} pixels counted alike"


@torch.no_grad()
def prepared(device, amp, size=129, **shape):
    """Logits with norms folded into convolutions, and as evaluate.py prepares them, against those without."""
    network, worst = make_network(**shape).to(device), 0.0
    images = torch.randn(2, 3, size, size, device=device)
    with torch.autocast(device.type, dtype=AUTOCAST[amp], enabled=AUTOCAST[amp] is not None):
        expected = network(images)["fine"]
        for prepare in (fold_norms, functools.partial(prepare_for_evaluation, device=device)):
            ready = prepare(network)
            if prepare is not fold_norms and device.type == "cuda":
                kept = any(isinstance(module, ABN) for module in ready.modules())
                assert kept == (obstacle(device) is None), f"norms are kept: {kept}, obstacle: {obstacle(device)}"
            actual = ready.to(memory_format=torch.channels_last)(
                images.contiguous(memory_format=torch.channels_last))["fine"]
            worst = max(worst, near(actual, expected, 1e-4 if amp == "off" else 0.1, "logits"))
    return f"logits {worst:.1e}"


def section(rows, device, size=(129, 201), scales=(0.75, 1.0, 1.5), **shape):
    """Correctness; on CUDA without TF32."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    shape = {"backbone": "eca_resnet18"} | shape
    for amp in ("off", "bf16", "fp16") if device.type == "cuda" else ("off", "bf16"):
        for layout in (torch.contiguous_format, torch.channels_last):
            rows.check(f"windows, scales, mirror: {amp}, {str(layout).removeprefix('torch.')}", windows, device, amp,
                       layout, size, scales=scales, **shape)
        rows.check(f"norms of an evaluation, {amp}", prepared, device, amp, size=min(129, *size), **shape)
    rows.check("scores", scores, device, size, **shape)


def speed(device, network, scales, flip, size, window, batch_size, runs):
    """Time of an image, and the share of it that is not the network's."""
    predictor = SlidingPredictor(network, window, scales=scales, flip=flip, batch_size=batch_size, device=device,
                                 autocast=torch.bfloat16, memory_format=torch.channels_last)
    return timing.time_prediction(predictor, [make_image(size)], runs, predict=both_heads)


def both_heads(predictor, image):
    """Labels (2, H, W) of the fine and the coarse head, which an evaluation counts."""
    *_, richest = predictor.predict(image).values()
    return torch.stack([most_probable(probabilities)[1] for probabilities in richest.values()])


def counting(device, size, runs):
    """What `score` counts of a map, where all pixels are of one class: those that add to one number take turns."""
    labels, confidence = torch.zeros(size, dtype=torch.int64, device=device), torch.ones(size, device=device)

    def count():
        ConfusionMatrix(19).update(labels, labels)
        Calibration().update(confidence, labels, labels)

    return timing.median_ms(count, runs, device)


def speed_section(rows, device, size=(1024, 2048), window=(769, 769), batch_size=8, runs=3, **shape):
    """An image by the quick protocol and by the paper's, in bf16, as evaluate.py predicts it; and by the first with
    the fastest kernels, which cuDNN then looks for when it sees a size for the first time."""
    network = prepare_for_evaluation(make_network(**shape), device).to(device, memory_format=torch.channels_last)
    for name, scales, flip in (("single-scale", (1.0,), False),
                               ("multi-scale, mirrored", (0.75, 1.0, 1.25, 1.5, 1.75, 2.0), True)):
        actual = rows.figure(name, speed, device, network, scales, flip, size, window, batch_size, runs)
        if actual:
            share = actual["beyond_the_network"]
            rows.goal(f"{name}: evaluation beyond the network", "at most 10 % of its time", f"{share:.1%}",
                      share <= 0.1)
    rows.figure("counting a map of one class", counting, device, size, runs)
    torch.backends.cudnn.benchmark = True
    fastest = rows.figure("single-scale, cudnn.benchmark", speed, device, network, (1.0,), False, size, window,
                          batch_size, runs)
    folded_network = fold_norms(make_network(**shape)).to(device, memory_format=torch.channels_last)
    folded_time = rows.figure("single-scale, cudnn.benchmark, folded norms", speed, device, folded_network, (1.0,),
                              False, size, window, batch_size, runs)
    if device.type == "cuda" and fastest and folded_time:
        ratio = fastest["ms"] / folded_time["ms"]
        rows.goal("norms by Triton's kernels: time of an image / with folded norms", "below 1, as they move 26 GB in "
                  "place of 38 for four windows", f"{ratio:.2f}", ratio < 1)


def pictures_section(rows, device, size=(1024, 2048), window=(769, 769), images=16, **shape):
    """A whole evaluation with the default pictures, reading and writing included, beside its network alone."""
    network = prepare_for_evaluation(make_network(**shape), device).to(device, memory_format=torch.channels_last)
    predictor = SlidingPredictor(network, window, batch_size=8, device=device, autocast=torch.bfloat16,
                                 memory_format=torch.channels_last)
    with tempfile.TemporaryDirectory() as folder:
        write_dataset(Path(folder), train=1, val=images, size=size, seed=0)
        dataset = CityscapesDataset(folder, "val")
        alone = rows.figure("prediction", timing.time_prediction, predictor, [make_image(size)], 3, predict=both_heads)
        actual = rows.figure("evaluation with pictures", seconds_of_evaluation, predictor, dataset, Path(folder, "out"))
        if alone and actual:
            ratio = actual["ms"] / alone["ms"]
            rows.goal("evaluation with pictures", "at most 1.2 of the time of predictions", f"{ratio:.2f}",
                      ratio <= 1.2)


def seconds_of_evaluation(predictor, dataset, folder):
    """Time of an image in an evaluation by evaluate.py's means, after one that prepares."""
    workers, _ = share_cores([predictor.device])
    times = []
    for number in range(2):
        pictures = Pictures(folder / str(number), ("labels", "color", "overlay"), dataset.classes)
        evaluation = Evaluation(dataset, pictures)
        started = time.perf_counter()
        evaluation.run(predictor, workers, threads=writer_threads(predictor.device))
        times.append(time.perf_counter() - started)
    return {"ms": 1e3 * times[-1] / len(dataset), "images_per_s": len(dataset) / times[-1]}
