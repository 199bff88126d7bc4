"""Speed of training steps, what they wait for, and of the samples that feed them."""

import collections
import contextlib
import functools
import re
import sys
import tempfile
import time
import traceback
import warnings
from itertools import pairwise
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from dataset.cityscapes import CityscapesDataset
from dataset.sampling import EpochSampler
from dataset.streets import write_dataset
from dataset.transforms import train_transform
from libs import backend
from libs.abn import set_backend
from libs.fused.launch import obstacle
from tests.benchmarks.engine import matmul_rate
from utils.devices import memory
from utils.devices.capture import WARMUP
from utils.devices.compilation import compile_network
from utils.devices.precision import AUTOCAST
from utils.devices.select import share_cores
from utils.inference.sliding import SlidingPredictor
from utils.inference.timing import median_ms, synchronize
from utils.metrics.evaluation import score
from utils.parallel.workers import Loader

from .evaluation import make_image, make_network
from .rows import near
from .several import group_of_one
from .steps import RATE, make_batch, make_engine

ROOT = Path(__file__).resolve().parents[2]
IN_PLACE, BY_TRITON = "in place, bf16", "in place, bf16, Triton"
PLAIN = {"amp": "bf16", "layout": torch.channels_last, "norm": "inplace_abn", "recompute": "none", "ohem": False,
         "tf32": True, "kernels": "torch"}
# How each way differs from the first. The most telling come first, should the time run out.
WAYS = {
    IN_PLACE: {},
    BY_TRITON: {"kernels": "triton"},
    "bn, bf16": {"norm": "bn"},
    "in place, bf16, OHEM": {"ohem": True},
    "in place, bf16, light": {"recompute": "light"},
    "in place, bf16, full": {"recompute": "full"},
    "in place, bf16, NCHW": {"layout": torch.contiguous_format},
    "bn, bf16, NCHW": {"norm": "bn", "layout": torch.contiguous_format},
    "in place, fp16": {"amp": "fp16"},
    "in place, TF32": {"amp": "off"},
    "bn, TF32": {"amp": "off", "norm": "bn"},
    "in place, fp32 without TF32": {"amp": "off", "tf32": False},
    "package, fp16, NCHW": {"amp": "fp16", "kernels": "package", "layout": torch.contiguous_format},
}
# What a kernel belongs to, by its name; the first that fits.
KINDS = (("loss", "nll_loss|softmax|cross_entropy|upsample|topk|radix|bitonic|sort"),
         ("norm", "batch_norm|batchnorm|bn_fw|bn_bw|leaky_relu|normalize_kernel|(statistics|sums|elements)_kernel|"
                  "(end_block|attention|attention_gradient|logit_gradient)_kernel"),
         ("update", "multi_tensor|foreach|_amp_"),
         ("convolution", r"conv(?!ert)|cudnn|gemm|xmma|cutlass|wgrad|dgrad|winograd|nvjet|splitk|sm\d\d_|::(add|b|)mm"))


def kind_of(kernel):
    """Which of `KINDS` a kernel's name belongs to; the rest, sums, copies and elementwise work, is glue."""
    return next((kind for kind, names in KINDS if re.search(names, kernel, re.IGNORECASE)), "glue")


def build(device, tf32, kernels, **options):
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
    engine = make_engine(device, dropout=True, **options)
    set_backend(engine.network, kernels)
    return engine


def shares(engine, batch, device):
    """{kind: share of the device's time, "kernels": their number} of one step."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        engine.step([batch])
        synchronize(device)
    spent, kernels = collections.Counter(), 0
    for event in profile.key_averages():
        if device.type == "cuda" and event.device_type != torch.autograd.DeviceType.CUDA:
            continue
        own = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        spent[kind_of(event.key)] += own
        kernels += event.count
    total = max(sum(spent.values()), 1e-9)
    return {"kernels": kernels} | {kind: spent[kind] / total for kind in (*dict(KINDS), "glue")}


def measure(device, way, batch, runs, flops, rate, compiled=False, **shape):
    """A way's figures. flops: of a plain step; rate: FLOP/s of matrix products in the same precision."""
    engine = build(device, **way, **shape)
    if compiled:
        compile_network(engine.network)
    engine.step([batch])
    memory.reset_peak(device)
    actual = median_ms(lambda: engine.step([batch]), runs, device)
    if device.type == "cuda":
        actual["peak_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
    return actual | {"images_per_s": 1e3 * len(batch["image"]) / actual["ms"],
                    "of_matrix_products": 1e3 * flops / actual["ms"] / rate} | shares(engine, batch, device)


def free(device):
    if device.type == "cuda":
        torch.cuda.empty_cache()


def count_flops(device, batch, **shape):
    """Multiplications and additions of a plain step; RuntimeError where it does not fit."""
    with FlopCounterMode(display=False) as counter:
        build(device, **PLAIN, **shape).step([batch])
    return counter.get_total_flops()


def fitting_batch(device, size, images, **shape):
    """A batch of so many images, or half, a quarter ... as the memory allows; and the FLOP of a step with it."""
    while True:
        batch = make_batch(size, images=images)
        try:
            return batch, count_flops(device, batch, **shape)
        except torch.cuda.OutOfMemoryError:
            if images == 1:
                raise
        images //= 2
        free(device)


def rates_of(device, size):
    """{(amp, tf32): FLOP/s of matrix products}."""
    actual = {}
    for amp, tf32 in (("bf16", True), ("fp16", True), ("off", True), ("off", False)):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        actual[amp, tf32] = matmul_rate(device, AUTOCAST[amp] or torch.float32, size)
    return actual


def section(rows, device, size=769, images=8, runs=5, ways=WAYS, product=8192, seconds=160, **shape):
    """All ways of a training step; after so many seconds the rest is left out, and said."""
    started = time.monotonic()
    shape = {"model": "acfnet", "backbone": "eca_resnet101"} | shape
    torch.backends.cudnn.benchmark = True
    rates = rates_of(device, product)
    rows.figure("matrix products, TFLOP/s", lambda: {
        f"{amp}{'' if tf32 or amp != 'off' else ' without TF32'}": rate / 1e12 for (amp, tf32), rate in rates.items()})
    batch, flops = fitting_batch(device, size, images, **shape)
    images = len(batch["image"])
    rows.note("a step", f"{images} crops of {size}×{size}, {shape['backbone']}, {flops / 1e12:.2f} TFLOP")
    actual = {}
    for name in ways:
        way = PLAIN | WAYS[name]
        if time.monotonic() - started > seconds:
            rows.note(name, "not measured: the section's time was over")
        elif way["kernels"] == "triton" and (reason := obstacle(device)):
            rows.note(name, f"not measured: {reason}")
        elif way["kernels"] == "package" and (device.type != "cuda" or backend.package() is None):
            rows.note(name, "not measured: the package is not installed")
        else:
            free(device)
            actual[name] = rows.figure(name, measure, device, way, batch, runs, flops, rates[way["amp"], way["tf32"]],
                                      **shape)
    state_goals(rows, actual)
    if device.type == "cuda":
        for count, recompute in ((2, "none"), (4, "light")):
            free(device)
            few = make_batch(size, images=count)
            peak = rows.figure(f"{count} crops, {recompute}", measure, device, PLAIN | {"recompute": recompute}, few, 1,
                               flops * count / images, rates["bf16", True], **shape).get("peak_gb")
            if peak:
                rows.goal(f"{count} crops of {size}×{size} in bf16, recomputation {recompute}", "at most 12 GB",
                          f"{peak:.1f} GB", peak <= 12)


def state_goals(rows, actual):
    """found: {way: figures}, some of them missing or empty."""
    ours, bn, fused = (actual.get(name) for name in (IN_PLACE, "bn, bf16", BY_TRITON))
    if ours and fused:
        rows.goal("the bf16 step by Triton's kernels", "predicted: 30 ms less on an H100, 21 ms less on an H200",
                  f"{ours['ms'] - fused['ms']:.1f} ms less", ours["ms"] - fused["ms"] >= 21)
    if ours:
        rows.goal("the bf16 step", "at least 45 % of the matrix-product rate", f"{ours['of_matrix_products']:.0%}",
                  ours["of_matrix_products"] >= 0.45)
    if ours and bn:
        ratio = ours["ms"] / bn["ms"]
        rows.goal("time of the in-place norm", "at most 1.05 of bn's", f"{ratio:.2f}", ratio <= 1.05)
        if "peak_gb" in ours:
            ratio = ours["peak_gb"] / bn["peak_gb"]
            rows.goal("memory of the in-place norm", "at most two thirds of bn's", f"{ratio:.2f}", ratio <= 2 / 3)


def compiled_as_eager(device, size, images, **shape):
    """Losses of two steps in fp32, compiled, against those without; dropout draws differ, so there is none."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    actual = []
    for compiled in (False, True):
        engine = make_engine(device, **shape)
        if compiled:
            compile_network(engine.network)
        actual.append([list(engine.step([make_batch(size, seed, images)])[0].values())[:-1] for seed in (0, 1)])
    plain, same = map(torch.tensor, actual)
    return f"losses {near(same, plain, 1e-3, 'losses'):.1e}"


def compiled_section(rows, device, size=769, images=8, runs=5, product=8192, **shape):
    """`--compile`: first what it computes, of a small network, then its speed."""
    rows.check("compiled as without", compiled_as_eager, device, 97, 2, **shape | {"backbone": "eca_resnet18"})
    shape = {"model": "acfnet", "backbone": "eca_resnet101"} | shape
    torch.backends.cudnn.benchmark = True
    rates = rates_of(device, product)
    batch, flops = fitting_batch(device, size, images, **shape)
    for name in (IN_PLACE, "bn, bf16"):
        free(device)
        rows.figure(f"{name}, compiled", measure, device, PLAIN | WAYS[name], batch, runs, flops,
                    rates["bf16", True], compiled=True, **shape)


def replays_as_steps(device, size, images, processes=None, steps=WARMUP + 3, **shape):
    """Losses of steps in fp32, of which the last are replays of a CUDA graph, against those without; with dropout."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    actual = []
    for choice in ("off", "on"):
        engine = make_engine(device, dropout=True, processes=processes, options={"cuda_graph": choice}, **shape)
        actual.append([list(engine.step([make_batch(size, seed, images)])[0].values()) for seed in range(steps)])
        engine.release()
    plain, same = map(torch.tensor, actual)
    return f"losses {near(same, plain, 1e-3, 'losses'):.1e}"


def step_ms(device, kernels, cuda_graph, batch, runs, **shape):
    """Time of a bf16 step, after those that a CUDA graph needs before it is captured."""
    engine = build(device, **PLAIN | {"kernels": kernels}, options={"cuda_graph": cuda_graph}, **shape)
    for _ in range(WARMUP + 1):
        engine.step([batch])
    return median_ms(lambda: engine.step([batch]), runs, device)


def graph_section(rows, device, size=769, runs=9, **shape):
    """`--cuda-graph`: what it computes, and its gain for eight crops and for two, the share of each of four GPUs."""
    if device.type != "cuda":
        rows.note("CUDA graphs", "not measured: they need a GPU")
        return
    small = shape | {"backbone": "eca_resnet18"}
    rows.check("replays as steps", replays_as_steps, device, 97, 2, **small)
    with group_of_one(device) as processes:
        rows.check("replays as steps, a process group of one", replays_as_steps, device, 97, 2, processes, **small)
    shape = {"model": "acfnet", "backbone": "eca_resnet101"} | shape
    torch.backends.cudnn.benchmark = True
    for images, predicted in ((8, 97), (2, 25)):
        batch, actual = make_batch(size, images=images), {}
        for kernels, graph in (("torch", "off"), ("triton", "off"), ("torch", "on"), ("triton", "on")):
            free(device)
            if kernels == "triton" and (reason := obstacle(device)):
                rows.note(f"{images} crops, triton", f"not measured: {reason}")
                continue
            actual[kernels, graph] = rows.figure(f"{images} crops, {kernels}, graph {graph}", step_ms, device, kernels,
                                                 graph, batch, runs, **shape)
        if fastest := actual.get(("triton", "on")):
            rows.goal(f"{images} crops by Triton's kernels in a graph", f"predicted: {predicted} ms on an H200",
                      f"{fastest['ms']:.1f} ms", fastest["ms"] <= predicted)


@contextlib.contextmanager
def waits(device):
    """A list that the places fill where the host waits for the GPU, "file:line" of this project."""
    actual = []

    def note(message, *args, **options):
        if "called a synchronizing" not in str(message):    # and not PyTorch's word that this mode is new
            return
        frames = [frame for frame in traceback.extract_stack(sys._getframe(1))
                  if Path(frame.filename).is_relative_to(ROOT) and "site-packages" not in frame.filename]
        actual.append(f"{Path(frames[-1].filename).relative_to(ROOT)}:{frames[-1].lineno}" if frames else "elsewhere")

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield actual
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")


def count_waits(device, function):
    """{"waits", "where"} of one call of a function, after two that make what is made once."""
    for _ in range(2):
        function()
    with waits(device) as actual:
        function()
    places = collections.Counter(actual)
    return {"waits": len(actual), "where": "; ".join(f"{place} ×{number}" for place, number in places.most_common())}


def a_wait_is_seen(device):
    with waits(device) as actual:
        torch.ones(1, device=device).item()
    assert len(actual) == 1 and actual[0].startswith("tests/gpu/speed.py:"), f"expected one here, found {actual}"
    return actual[0]


def waits_section(rows, device, size=129, window=65, **shape):
    """Of a training step, and of the windows of an image; counted on CUDA alone."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        rows.check("a wait is seen", a_wait_is_seen, device)
    ways = {"bf16": ({"amp": "bf16"}, 1, 1), "OHEM": ({"amp": "bf16", "ohem": True}, 1, 1),
            "two parts": ({"amp": "bf16"}, 2, 1), "full": ({"amp": "bf16", "recompute": "full"}, 1, 1)}
    for name, (options, parts, expected) in (ways | {"fp16": ({"amp": "fp16"}, 1, 1)} if on_gpu else ways).items():
        engine = make_engine(device, **options, **shape)
        batch = [make_batch(size, seed) for seed in range(parts)]
        actual = rows.figure(f"of a step, {name}", count_waits, device, functools.partial(engine.step, batch, RATE))
        if actual and on_gpu:
            rows.goal(f"of a step, {name}", f"{expected}", f"{actual['waits']}", actual["waits"] <= expected)
    network = make_network(backbone="eca_resnet18", model="acfnet_resnet").to(device)
    predictor = SlidingPredictor(network, (window, window), autocast=torch.bfloat16)
    wide = window + 8 * (2 * window // 3)       # nine windows, each of which shares a third with the next
    few, many = (rows.figure(f"of an image of {windows} windows", count_waits, device,
                             functools.partial(predictor.labels, make_image((window, width))))
                 for windows, width in ((1, window), (9, wide)))
    if few and many and on_gpu:
        rows.goal("of a window", "none", f"{(many['waits'] - few['waits']) / 8:g}", many["waits"] == few["waits"])
    item = {"image": make_image((window, window)).permute(2, 0, 1),
            "label": torch.zeros(window, window, dtype=torch.uint8)}
    rows.figure("of an image that is scored", count_waits, device,
                lambda: list(score(predictor, [item], 19)))


def loader_section(rows, device, size=(1024, 2048), crop=(769, 769), images=16, batch=8, batches=12):
    """Samples a second, as train.py reads them, from drawn streets."""
    workers, words = share_cores([device])
    rows.note("processes that read", words)
    with tempfile.TemporaryDirectory() as folder:
        write_dataset(Path(folder), train=images, val=1, size=size, seed=0)
        for name, cache in (("decoded", None), ("from the cache", Path(folder, "cache"))):
            dataset = CityscapesDataset(folder, transform=train_transform(crop, (0.5, 2.0)), cache=cache)
            if cache:
                dataset.fill_cache(workers)
            sampler = EpochSampler(len(dataset), 0, 0, batch * batches, batch)
            loader = Loader(dataset, batch, sampler=sampler, workers=workers, prefetch=4,
                            pin_memory=device.type == "cuda")
            rows.figure(f"samples, {name}", samples_a_second, loader, batch)


def samples_a_second(loader, batch):
    """After the first third, whose batches were waiting while the workers started."""
    times = []
    for _ in loader:
        times.append(time.perf_counter())
    times = times[len(times) // 3:]
    return {"images_per_s": batch * (len(times) - 1) / (times[-1] - times[0]),
            "slowest_batch_ms": 1e3 * max(after - before for before, after in pairwise(times))}
