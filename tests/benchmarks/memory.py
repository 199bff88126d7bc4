"""Bytes a network keeps for its backward pass, by part.

    python -m tests.benchmarks.memory [--backbone eca_resnet101] [--amp bf16] [--recompute light] [--size 257,257]
    python -m tests.benchmarks.memory --all          every combination, as a table
    python -m tests.benchmarks.memory --write        count anew what train.py says where the memory does not suffice

Two crops, 19 classes. Every storage that is alive after the forward pass because of the graph counts once:
what autograd functions saved, and what they hold otherwise. Parameters, their low-precision copies, the images
and the logits that are returned do not count.
"""

import itertools

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from libs.abn import NORMS
from networks import BACKBONES, build_network
from networks.resnet import RECOMPUTE
from utils import checkpoint, cli
from utils.memory import TABLE, kept_bytes, table_key

AMP = {"off": None, "bf16": torch.bfloat16}
COUNTED = ("resnet18", "eca_resnet18", "eca_resnet50", "eca_resnet101")     # backbones in the table of train.py
COUNTED_MODELS = ("acfnet", "acfnet_resnet", "base")


def measure(backbone, autocast, recompute, size, norm="inplace_abn", model="acfnet"):
    torch.manual_seed(0)
    network = build_network(model, backbone=backbone, recompute=recompute, norm=norm)
    images = torch.randn(2, 3, *size)
    parts, _ = kept_bytes(network, images, autocast)
    return parts, 2 * size[0] * size[1]


class NoConvolutions(TorchDispatchMode):
    """Convolutions return zeros of the right shape at once: what is kept of them is the same."""

    def __torch_dispatch__(self, function, types, words=(), named=None):
        if function is not torch.ops.aten.convolution.default:
            return function(*words, **(named or {}))
        result = function(*(word.to("meta") if isinstance(word, torch.Tensor) else word for word in words))
        return torch.zeros(result.shape, dtype=result.dtype)


def write():
    """Count the usual networks with crops of 129×129, and write `utils.memory.TABLE`."""
    counted, images = {}, torch.randn(2, 3, 129, 129)
    for backbone, model, norm, recompute in itertools.product(COUNTED, COUNTED_MODELS, NORMS, RECOMPUTE):
        if recompute not in BACKBONES[backbone].recompute_choices():
            continue
        with torch.device("meta"):      # drawing random weights would take longer than everything else
            network = build_network(model, backbone=backbone, norm=norm, recompute=recompute)
        network.to_empty(device="cpu")
        for name, tensor in network.state_dict().items():
            tensor.fill_(0 if name.endswith(("bias", "mean")) else 1)
        for amp, dtype in AMP.items():
            with NoConvolutions():
                parts, _ = kept_bytes(network, images, dtype)
            key = table_key(model=model, backbone=backbone, norm=norm, recompute=recompute, amp=amp)
            counted[key] = round(sum(parts.values()) / images[:, 0].numel())
            print(f"{key}: {counted[key]} bytes a pixel", flush=True)
    checkpoint.write_json(TABLE, counted)


def main():
    parser = cli.Parser(description=__doc__)
    parser.add_argument("--backbone", choices=BACKBONES, default="eca_resnet101")
    parser.add_argument("--amp", choices=("off", "bf16"), default="off")
    parser.add_argument("--recompute", choices=RECOMPUTE, default="none")
    parser.add_argument("--norm", choices=("inplace_abn", "bn"), default="inplace_abn")
    parser.add_argument("--size", type=cli.size, default=(257, 257))
    parser.add_argument("--all", action="store_true", help="every combination of --amp and --recompute, and --norm bn")
    parser.add_argument("--write", action="store_true", help="write the table in utils/")
    args = parser.parse_args()
    if args.write:
        write()
        return
    if not args.all:
        parts, pixels = measure(args.backbone, AMP[args.amp], args.recompute, args.size, args.norm)
        for part, size in parts.items():
            print(f"{part:<20}{size / pixels:>10.0f} bytes a pixel")
        print(f"{'all':<20}{sum(parts.values()) / pixels:>10.0f} bytes a pixel")
        return
    for amp in AMP:
        for norm, recompute in (("bn", "none"), *(("inplace_abn", c) for c in RECOMPUTE)):
            parts, pixels = measure(args.backbone, AMP[amp], recompute, args.size, norm)
            print(f"amp {amp:<5} norm {norm:<12} recompute {recompute:<6}"
                  f"{sum(parts.values()) / pixels / 1000:>8.2f} KB a pixel", flush=True)


if __name__ == "__main__":
    main()
