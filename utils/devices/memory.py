"""Memory: what a network keeps for its backward pass, counted; what a process has used; whether it ran out."""

import contextlib
import json
import math
import os
import sys
from pathlib import Path

import torch

from ..common.errors import UserError
from ..ops.upsampling import grid_of

try:
    import resource
except ImportError:     # not on Windows
    resource = None


TABLE = Path(__file__).with_name("memory.json")     # written by `python -m tests.benchmarks.memory --write`


def table_key(*, model, backbone, norm, recompute, amp):
    """Under which `TABLE` has a network's bytes per pixel."""
    return f"{model} {backbone} {norm} {recompute} {'bf16' if amp == 'fp16' else amp}"


def bytes_a_pixel(**network):
    """What a network, named as for `table_key`, keeps for its backward pass, a pixel of its input; None where the
    table does not know it. Nothing is built: this is asked when the memory has run out."""
    return json.loads(TABLE.read_text(encoding="utf-8")).get(table_key(**network))


def peak_bytes(device):
    """The most memory used so far: of a GPU what PyTorch allocated on it, on the CPU that of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reset_peak(device):
    """Count the most memory from now on; a process has only one peak in its life."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def ran_out(error):
    """Whether an error, or its text, is for too little memory, on a GPU or a CPU."""
    return isinstance(error, MemoryError) or any(
        text in str(error) for text in ("out of memory", "can't allocate memory", "not enough memory",
                                        "_ALLOC_FAILED", "_ALLOCATION_FAILED"))       # of cuBLAS and cuDNN


def catch_out_of_memory(work, make_error):
    """What `work()` returns; where the memory runs out meanwhile, `make_error(first words found)` is raised."""
    try:
        return work()
    except (RuntimeError, MemoryError) as error:        # torch's of memory are RuntimeErrors
        if not ran_out(error):
            raise
        found = (str(error).strip() or "no memory left").splitlines()[0][:160]
    raise make_error(found)        # outside of the block above: its traceback holds the memory that ran out


def out_of_memory_error(found, *, crops, input_size, accumulate, recompute, recompute_choices, amp, model, backbone,
                        norm):
    """The `UserError` for too little memory in training.

    Args:
        found: the error's first words.
        crops: of a pass on one device, input_size (height, width) each.
        accumulate: parts of a batch.
        recompute_choices: what `recompute` could be, from none to the most.
        model, backbone, norm, recompute, amp: as for `bytes_a_pixel`.
    """
    pixels = input_size[0] * input_size[1]

    def kept(recompute, amp, parts=1):
        """" 1.2 GB", or nothing for a network that nobody has counted."""
        size = bytes_a_pixel(model=model, backbone=backbone, norm=norm, recompute=recompute, amp=amp)
        return f" {size * crops * pixels / parts / 1e9:.1f} GB" if size else ""

    now = kept(recompute, amp)
    more = recompute_choices[recompute_choices.index(recompute) + 1:] if recompute in recompute_choices else ()
    choices = [f"--recompute {kind}{kept(kind, amp)}" for kind in more]
    if amp == "off":
        choices.insert(0, f"--amp bf16{kept(recompute, 'bf16')}")
    if crops > 1:
        choices.append(f"--accumulate {2 * accumulate}{kept(recompute, amp, 2) or ' half as much'}")
    choices.append("a smaller --input-size less in proportion to its pixels")
    what = f"about{now}" if now else "most of the memory"
    return UserError(f"out of memory: expected room for {crops} crops of {input_size[0]}×{input_size[1]} on a device, "
                     f"which keep {what} for the backward pass besides the weights, found: {found}; what helps, and "
                     f"what it would keep: {', '.join(choices)}")


def free_bytes(device):
    """Memory that can still be had on a device, swap space included; infinite where nobody tells."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    limits = []
    with contextlib.suppress(OSError, ValueError, KeyError):        # Linux
        with open("/proc/meminfo", encoding="ascii") as file:
            sizes = {name: int(size.split()[0]) << 10 for name, size in (line.split(":") for line in file)}
        limits.append(sizes["MemAvailable"] + sizes["SwapFree"])
    for name in ("memory.max", "memory/memory.limit_in_bytes"):     # of a container
        with contextlib.suppress(OSError, ValueError):
            limits.append(int(Path("/sys/fs/cgroup", name).read_text(encoding="ascii")))
    with contextlib.suppress(AttributeError, OSError, ValueError):
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))     # elsewhere: all that there is
    return min(limits, default=math.inf)


@torch.inference_mode()
def passing_bytes(network, device, autocast=None):
    """What a forward pass in evaluation holds at once, at the least: (bytes per pixel of its input, maps of logits).

    Found by one small pass: the largest input and output of a module. Maps are counted over all heads.
    """
    most = 0

    def measure(module, args, output):
        nonlocal most
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
                    for tensor in (*args, output) if isinstance(tensor, torch.Tensor)}
        most = max(most, sum(storages.values()))

    hooks = [module.register_forward_hook(measure) for module in network.modules()]
    with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
        step, rest = grid_of(network)
        outputs = network(torch.zeros(1, 3, 8 * step + rest, 8 * step + rest, device=device))
    for hook in hooks:
        hook.remove()
    # 9 logits to a side, or 72 pixels: taken by itself the border of a crop so small would count too much.
    return most / ((8 + rest) * step) ** 2, sum(logits.shape[1] for logits in outputs.values())
