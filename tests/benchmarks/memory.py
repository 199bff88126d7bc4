"""Bytes a network keeps for its backward pass, by part.

    python -m tests.benchmarks.memory [--backbone eca_resnet101] [--amp bf16] [--checkpoint light] [--size 257,257]
    python -m tests.benchmarks.memory --all          every combination, as a table

Two crops, 19 classes. Every storage that is alive after the forward pass because of the graph counts once:
what autograd functions saved, and what they hold otherwise. Parameters, their low-precision copies, the images
and the logits that are returned do not count.
"""

import argparse
import gc
from collections import defaultdict

import torch

from networks import BACKBONES, build_network
from networks.resnet import CHECKPOINTS
from utils import cli


def kept_bytes(network, images, autocast=None):
    """{part of the network: bytes}, from the tensors packed by autograd, each storage once; and, under
    "outside", what is alive beyond them (difference of live tensors before and after the forward pass)."""
    own = {t.untyped_storage().data_ptr() for t in [*network.parameters(), *network.buffers(), images]}
    shapes = {tuple(p.shape) for p in network.parameters()}
    saved, where = {}, ["?"]

    def copy_of_weight(tensor):
        return tensor.dtype == autocast and tuple(tensor.shape) in shapes

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and not copy_of_weight(tensor):
            saved.setdefault(storage.data_ptr(), (where[0], storage.nbytes()))
        return tensor

    hooks = []
    for name, module in network.named_modules():
        part = ".".join(name.split(".")[:2])
        hooks.append(module.register_forward_pre_hook(lambda m, a, part=part: where.__setitem__(0, part)))
    before = _live(copy_of_weight)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), \
            torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        outputs = network(images)
    for hook in hooks:
        hook.remove()
    returned = {t.untyped_storage().data_ptr() for t in outputs.values()}
    parts = defaultdict(int)
    for pointer, (part, size) in saved.items():
        parts[part] += 0 if pointer in returned else size
    after = _live(copy_of_weight)
    parts["outside"] = sum(size for pointer, size in after.items()
                           if pointer not in before and pointer not in saved and pointer not in returned)
    return dict(parts), outputs


def _live(excluded):
    """{storage pointer: bytes} of every tensor Python knows, but for those that `excluded(tensor)` leaves out."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and not excluded(thing):
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


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
