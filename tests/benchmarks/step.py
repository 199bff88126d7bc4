"""Peak growth of resident memory in one full training step on the CPU: what a GPU of 12 GB has to hold.

    python -m tests.benchmarks.step [--size 769,769] [--batch-size 2] [--amp off] [--recompute none]

The network is built first; then one step with loss and SGD, its gradients and momentum. Linux only.
"""

import time

import torch

from loss.criterion import SegmentationCriterion
from networks.backbones.names import BACKBONES
from networks.backbones.resnet import RECOMPUTE
from networks.build import build_network
from utils.common import flags


def memory(field):
    """A field of /proc/self/status, such as VmRSS or VmHWM, in bytes."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def main():
    parser = flags.Parser(description=__doc__)
    parser.add_argument("--backbone", choices=BACKBONES, default="eca_resnet101")
    parser.add_argument("--norm", choices=("inplace_abn", "bn"), default="inplace_abn")
    parser.add_argument("--size", type=flags.size, default=(769, 769))
    parser.add_argument("--batch-size", type=flags.positive(int), default=2)
    parser.add_argument("--amp", choices=("off", "bf16"), default="off")
    parser.add_argument("--recompute", choices=RECOMPUTE, default="none")
    args = parser.parse_args()
    network = build_network(backbone=args.backbone, norm=args.norm, recompute=args.recompute)
    criterion = SegmentationCriterion()
    optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.9, weight_decay=1e-4)
    images = torch.randn(args.batch_size, 3, *args.size)
    labels = torch.randint(19, (args.batch_size, *args.size))
    before, start = memory("VmRSS"), time.perf_counter()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.amp == "bf16"):
        outputs = network(images)
    forward = memory("VmRSS")
    criterion.total(criterion(outputs, labels)).backward()
    optimizer.step()
    print(f"{args.batch_size} crops of {args.size[0]}×{args.size[1]}, {args.backbone}, norm {args.norm}, "
          f"amp {args.amp}, recompute {args.recompute}: peak growth {(memory('VmHWM') - before) / 1e9:.2f} GB, "
          f"after the forward pass {(forward - before) / 1e9:.2f} GB, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
