"""Time of a training step with in-place norms against ordinary ones, and with recomputation, as ratios.

    python -m tests.benchmarks.norm [--backbone eca_resnet101] [--size 129,129] [--runs 5]

Two crops; forward and backward pass of the whole network with the training loss. The variants take turns, so
that what else the machine does meets all of them; medians. With a GPU, also the peak memory of each.
"""

import time
from statistics import median

import torch

from loss.criterion import SegmentationCriterion
from networks.backbones.names import BACKBONES
from networks.build import build_network
from utils.common import flags
from utils.devices import memory
from utils.devices.select import select_devices
from utils.inference.timing import synchronize

VARIANTS = {"bn": ("bn", "none"), "in place": ("inplace_abn", "none"), "light": ("inplace_abn", "light"),
            "full": ("inplace_abn", "full")}


def step(network, criterion, images, labels, autocast):
    """Seconds of one forward and backward pass."""
    start = time.perf_counter()
    with torch.autocast(images.device.type, dtype=autocast, enabled=autocast is not None):
        outputs = network(images)
    criterion.total(criterion(outputs, labels)).backward()
    network.zero_grad(set_to_none=True)
    synchronize(images.device)
    return time.perf_counter() - start


def main():
    parser = flags.Parser(description=__doc__)
    parser.add_argument("--backbone", choices=BACKBONES, default="eca_resnet101")
    parser.add_argument("--size", type=flags.size, default=(129, 129))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--gpu")
    args = parser.parse_args()
    device = select_devices(args.gpu)[0]
    images = torch.randn(2, 3, *args.size, device=device)
    labels = torch.randint(19, (2, *args.size), device=device)
    criterion = SegmentationCriterion()
    possible = BACKBONES[args.backbone].recompute_choices()
    for name, autocast in (("fp32", None), ("bf16", torch.bfloat16)):
        networks = {variant: build_network(backbone=args.backbone, norm=norm, recompute=recompute).to(device)
                    for variant, (norm, recompute) in VARIANTS.items() if recompute in possible}
        times, peaks = {variant: [] for variant in networks}, {}
        for run in range(args.runs + 1):        # the first run is not counted
            for variant, network in networks.items():
                memory.reset_peak(device)
                seconds = step(network, criterion, images, labels, autocast)
                if run:
                    times[variant].append(seconds)
                if device.type == "cuda":
                    peaks[variant] = torch.cuda.max_memory_allocated(device)
        base = median(times["bn"])
        for variant, values in times.items():
            peak = f"  peak {peaks[variant] / 1e9:.2f} GB" if peaks else ""
            print(f"{name}  {variant:<9}{median(values):8.3f} s (spread {max(values) - min(values):.3f})"
                  f"  ratio to bn {median(values) / base:.2f}{peak}", flush=True)


if __name__ == "__main__":
    main()
