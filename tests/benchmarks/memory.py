"""Bytes a network keeps for its backward pass, by part.

    python -m tests.benchmarks.memory [--backbone eca_resnet101] [--amp bf16] [--recompute light] [--size 257,257]
    python -m tests.benchmarks.memory --all          every combination, as a table

Two crops, 19 classes. Every storage that is alive after the forward pass because of the graph counts once:
what autograd functions saved, and what they hold otherwise. Parameters, their low-precision copies, the images
and the logits that are returned do not count.
"""

import gc
from collections import defaultdict

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from networks.backbones.names import BACKBONES
from networks.backbones.resnet import RECOMPUTE
from networks.build import build_network
from utils.common import flags

AMP = {"off": None, "bf16": torch.bfloat16}


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


def main():
    parser = flags.Parser(description=__doc__)
    parser.add_argument("--backbone", choices=BACKBONES, default="eca_resnet101")
    parser.add_argument("--amp", choices=("off", "bf16"), default="off")
    parser.add_argument("--recompute", choices=RECOMPUTE, default="none")
    parser.add_argument("--norm", choices=("inplace_abn", "bn"), default="inplace_abn")
    parser.add_argument("--size", type=flags.size, default=(257, 257))
    parser.add_argument("--all", action="store_true", help="every combination of --amp and --recompute, and --norm bn")
    args = parser.parse_args()
    if not args.all:
        parts, pixels = measure(args.backbone, AMP[args.amp], args.recompute, args.size, args.norm)
        for part, size in parts.items():
            print(f"{part:<20}{size / pixels:>10.0f} bytes per pixel")
        print(f"{'all':<20}{sum(parts.values()) / pixels:>10.0f} bytes per pixel")
        return
    for amp in AMP:
        for norm, recompute in (("bn", "none"), *(("inplace_abn", c) for c in RECOMPUTE)):
            parts, pixels = measure(args.backbone, AMP[amp], recompute, args.size, norm)
            print(f"amp {amp:<5} norm {norm:<12} recompute {recompute:<6}"
                  f"{sum(parts.values()) / pixels / 1000:>8.2f} KB per pixel", flush=True)


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
    kept = defaultdict(int)
    for pointer, (part, size) in saved.items():
        kept[part] += 0 if pointer in returned else size
    after = _live(copy_of_weight)
    kept["outside"] = sum(size for pointer, size in after.items()
                          if pointer not in before and pointer not in saved and pointer not in returned)
    return dict(kept), outputs


def _live(excluded):
    """{storage pointer: bytes} of every tensor Python knows, but for those that `excluded(tensor)` leaves out."""
    gc.collect()
    actual = {}
    for thing in gc.get_objects():
        if type(thing) not in (torch.Tensor, torch.nn.Parameter) or thing.layout != torch.strided:
            continue        # sparse ones have no storage of their own
        if not excluded(thing):
            storage = thing.untyped_storage()
            actual[storage.data_ptr()] = storage.nbytes()
    return actual


if __name__ == "__main__":
    main()
