"""Bytes a network keeps for its backward pass, by part.

    python -m tests.benchmarks.memory [--backbone eca_resnet101] [--amp bf16] [--checkpoint light] [--size 257,257]
    python -m tests.benchmarks.memory --all          every combination, as a table

Two crops, 19 classes. Every storage that is alive after the forward pass because of the graph counts once:
what autograd functions saved, and what they hold otherwise. Parameters, their low-precision copies, the images
and the logits that are returned do not count.
"""

import argparse

import torch

from networks import BACKBONES, build_network
from networks.resnet import CHECKPOINTS
from utils import cli
from utils.memory import kept_bytes


def measure(backbone, autocast, recompute, size, norm="inplace_abn"):
    torch.manual_seed(0)
    network = build_network(backbone=backbone, recompute=recompute, norm=norm)
    images = torch.randn(2, 3, *size)
    parts, _ = kept_bytes(network, images, autocast)
    return parts, 2 * size[0] * size[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", choices=BACKBONES, default="eca_resnet101")
    parser.add_argument("--amp", choices=("off", "bf16"), default="off")
    parser.add_argument("--checkpoint", choices=CHECKPOINTS, default="none")
    parser.add_argument("--norm", choices=("inplace_abn", "bn"), default="inplace_abn")
    parser.add_argument("--size", type=cli.size, default=(257, 257))
    parser.add_argument("--all", action="store_true", help="every combination of --amp and --checkpoint, and --norm bn")
    args = parser.parse_args()
    autocast = {"off": None, "bf16": torch.bfloat16}
    if not args.all:
        parts, pixels = measure(args.backbone, autocast[args.amp], args.checkpoint, args.size, args.norm)
        for part, size in parts.items():
            print(f"{part:<20}{size / pixels:>10.0f} bytes a pixel")
        print(f"{'all':<20}{sum(parts.values()) / pixels:>10.0f} bytes a pixel")
        return
    for amp in autocast:
        for norm, recompute in (("bn", "none"), *(("inplace_abn", c) for c in CHECKPOINTS)):
            parts, pixels = measure(args.backbone, autocast[amp], recompute, args.size, norm)
            print(f"amp {amp:<5} norm {norm:<12} checkpoint {recompute:<6}"
                  f"{sum(parts.values()) / pixels / 1000:>8.2f} KB a pixel", flush=True)


if __name__ == "__main__":
    main()
