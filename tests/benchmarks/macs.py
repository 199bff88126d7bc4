"""Parameters and multiply-accumulates of each part of a network.

    python -m tests.benchmarks.macs [--model acfnet] [--backbone eca_resnet101] [--size 769,769]
    python -m tests.benchmarks.macs --all       a line for each model

MACs are half of what torch.utils.flop_counter counts: matrix products and convolutions, nothing else.
"""

import torch
from torch.utils.flop_counter import FlopCounterMode

from networks.backbones.names import BACKBONES
from networks.build import MODELS, build_network, meta_network
from utils.common import flags


def count(network, size, training=False):
    """{part: (parameters, MACs of one image of that size)}; the parts of the head by their names."""
    network = network.to("meta").train(training)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.empty(1, 3, *size, device="meta"))
    flops = {name: sum(by_kind.values()) for name, by_kind in counter.get_flop_counts().items()}
    root = type(network).__name__
    parts = {}
    children = [(name, module) for name, module in network.named_children() if name != "head"]
    for name, module in [*children, *((f"head.{name}", module) for name, module in network.head.named_children())]:
        macs = flops.get(f"{root}.{name}", 0) // 2
        parameters = sum(p.numel() for p in module.parameters())
        if parameters and (macs or name != "aux"):      # OCR needs it in evaluation too
            parts[name] = (parameters, macs)
    return parts


def main():
    parser = flags.Parser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="acfnet")
    parser.add_argument("--backbone", choices=BACKBONES, default="eca_resnet101")
    parser.add_argument("--size", type=flags.size, default=(769, 769))
    parser.add_argument("--all", action="store_true", help="all models, without their parts")
    args = parser.parse_args()
    if args.all:
        for model in MODELS:
            parameters, macs = map(sum, zip(*count(meta_network(model=model, backbone=args.backbone),
                                                   args.size).values(), strict=True))
            print(f"{model:<14}{parameters / 1e6:>10.1f} M parameters{macs / 1e9:>10.0f} GMACs")
        return
    parts = count(build_network(args.model, backbone=args.backbone), args.size)
    total = [sum(column) for column in zip(*parts.values(), strict=True)]
    print(f"{args.model}, {args.backbone}, one image of {args.size[0]}×{args.size[1]}, evaluation")
    print(f"{'part':<14}{'parameters, M':>15}{'MACs, G':>12}{'share of MACs':>16}")
    for name, (parameters, macs) in [*parts.items(), ("all", total)]:
        print(f"{name:<14}{parameters / 1e6:>15.3f}{macs / 1e9:>12.3f}{macs / total[1]:>16.3%}")


if __name__ == "__main__":
    main()
