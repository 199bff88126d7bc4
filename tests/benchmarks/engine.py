"""A training step's time, memory and speed for each way of computing it, as ratios from one run.

    python -m tests.benchmarks.engine [--backbone eca_resnet101] [--batch-size 2] [--size 129,129] [--runs 5]
    python -m tests.benchmarks.engine --batch-size 8 --size 769,769         on a GPU

A step as train.py takes it: `Engine.step`, with loss, non-finite check and SGD. The variants take turns, so that what
else the machine does meets all of them; medians. TFLOP/s count the multiplications and additions of a plain step,
whatever a variant recomputes; the share is of the rate that large matrix products of the same precision reach here.
With several GPUs the batch is shared by DataParallel, under torchrun by its processes.
"""

import time
from statistics import median

import torch
from torch.utils.flop_counter import FlopCounterMode

from loss.criterion import SegmentationCriterion
from networks.backbones.names import BACKBONES
from networks.build import build_network
from utils.common import flags
from utils.common.messages import logger, show_messages
from utils.devices import memory
from utils.devices.compilation import compile_network
from utils.devices.precision import AUTOCAST, Precision
from utils.devices.select import own_device, select_devices
from utils.inference.timing import synchronize, time_calls
from utils.ops.normalization import Normalization
from utils.parallel.launch import join_processes, leave_processes, started_by_torchrun
from utils.parallel.processes import rank_and_size, share_batches
from utils.training.engine import Engine, NetworkWithLoss

VARIANTS = {        # amp, channels last, compile, recompute
    "fp32": ("off", False, False, "none"),
    "fp32, channels last": ("off", True, False, "none"),
    "fp32, compile": ("off", False, True, "none"),
    "bf16": ("bf16", False, False, "none"),
    "bf16, channels last": ("bf16", True, False, "none"),
    "bf16, compile": ("bf16", False, True, "none"),
    "bf16, channels last, compile": ("bf16", True, True, "none"),
    "bf16, recompute light": ("bf16", False, False, "light"),
    "bf16, recompute full": ("bf16", False, False, "full"),
    "fp16": ("fp16", False, False, "none"),
}


def make(variant, args, devices, processes):
    """The engine of a variant."""
    amp, channels_last, compiled, recompute = VARIANTS[variant]
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    network = build_network(backbone=args.backbone, recompute=recompute).to(devices[0], memory_format=memory_format)
    if compiled:
        compile_network(network)
    precision, criterion = Precision(amp, devices[0]), SegmentationCriterion()
    module = share_batches(NetworkWithLoss(network.train(), criterion, Normalization(), precision.autocast),
                                 devices, processes)
    optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.9, weight_decay=1e-4)
    return Engine(module, network, criterion, optimizer, precision, devices, processes=processes,
                  memory_format=memory_format)


def matmul_rate(device, dtype, size):
    """FLOP/s of square matrix products."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size ** 3 / median(time_calls(lambda: a @ b, device, 5))


def timed(engine, batch):
    """Seconds of a step."""
    start = time.perf_counter()
    engine.step([batch])
    synchronize(engine.devices[0])
    return time.perf_counter() - start


def main():
    parser = flags.Parser(description=__doc__)
    parser.add_argument("--backbone", choices=BACKBONES, default="eca_resnet101")
    parser.add_argument("--batch-size", type=flags.positive(int), default=2)
    parser.add_argument("--size", type=flags.size, default=(129, 129))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--gpu")
    args = parser.parse_args()
    devices = select_devices(args.gpu)
    if started_by_torchrun():
        devices = [own_device(devices)]
    device = devices[0]
    processes = join_processes(device)
    show_messages(rank_and_size(processes)[0])
    if device.type == "cpu" and "fp16" in args.variants:
        args.variants.remove("fp16")        # emulated there
    share = args.batch_size // (processes.size if processes else 1)
    batch = {"image": torch.randint(256, (share, 3, *args.size), dtype=torch.uint8),
             "label": torch.randint(19, (share, *args.size))}
    times, peaks, rates = {}, {}, {}
    with FlopCounterMode(display=False) as counter:
        make("fp32", args, devices[:1], None).step([batch])
    flops = counter.get_total_flops()
    for amp in sorted({VARIANTS[variant][0] for variant in args.variants}):
        rates[amp] = matmul_rate(device, AUTOCAST[amp] or torch.float32, 8192 if device.type == "cuda" else 2048)
    if device.type == "cuda":       # one at a time: memory is what is measured, too
        for variant in args.variants:
            engine = make(variant, args, devices, processes)
            timed(engine, batch), timed(engine, batch)
            memory.reset_peak(device)
            times[variant] = [timed(engine, batch) for _ in range(args.runs)]
            peaks[variant] = torch.cuda.max_memory_allocated(device)
            del engine
            torch.cuda.empty_cache()
    else:
        engines = {variant: make(variant, args, devices, processes) for variant in args.variants}
        for run in range(args.runs + 2):        # the first two are not counted: compilation, first allocations
            for variant, engine in engines.items():
                seconds = timed(engine, batch)
                if run >= 2:
                    times.setdefault(variant, []).append(seconds)
    products = ", ".join(f"{amp} {rate / 1e12:.2f} TFLOP/s" for amp, rate in rates.items())
    logger.info(f"{args.batch_size} crops of {args.size[0]}×{args.size[1]}, {args.backbone}, {flops / 1e12:.2f} TFLOP; "
                f"matrix products: {products}")
    base = median(next(iter(times.values())))
    for variant, values in times.items():
        speed = flops / median(values)
        peak = f"  peak {peaks[variant] / 1e9:.1f} GB" if peaks else ""
        logger.info(f"{variant:<30}{median(values):8.3f} s (spread {max(values) - min(values):.3f})  ratio "
                    f"{median(values) / base:.2f}  {speed / 1e12:.2f} TFLOP/s, "
                    f"{speed / rates[VARIANTS[variant][0]]:.0%} of matrix products{peak}")
    leave_processes()


if __name__ == "__main__":
    main()
