"""Memory of a device: peak, free, needed for inference; out-of-memory errors."""

import contextlib
import math
import os
import sys
from pathlib import Path

import torch

from ..common.errors import UserError
from ..ops.upsampling import grid_of

try:
    import resource
except ImportError:     # on Windows
    resource = None


def peak_bytes(device):
    """Return the peak memory in bytes: of PyTorch's allocations on a GPU, of the whole process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reset_peak(device):
    """Reset the peak memory of a GPU; the peak of a process on the CPU cannot be reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def is_out_of_memory(error):
    """Whether an error, or its text, means that a GPU or CPU ran out of memory."""
    return isinstance(error, MemoryError) or any(
        text in str(error) for text in ("out of memory", "can't allocate memory", "not enough memory",
                                        "_ALLOC_FAILED", "_ALLOCATION_FAILED"))       # cuBLAS and cuDNN


def catch_out_of_memory(work, make_error):
    """Return `work()`; if the memory runs out, raise `make_error(problem)` with the first line of the error."""
    try:
        return work()
    except (RuntimeError, MemoryError) as error:        # PyTorch raises RuntimeError when memory runs out
        if not is_out_of_memory(error):
            raise
        problem = (str(error).strip() or "no memory left").splitlines()[0][:160]
    raise make_error(problem)       # outside the except block, whose traceback keeps tensors alive


def out_of_memory_error(problem, *, crops, input_size, accumulate, recompute, recompute_choices, amp):
    """Make the `UserError` for too little memory in training, with flags that reduce the memory.

    Args:
        problem: first line of the original error.
        crops: crops per pass on one device.
        input_size: (height, width) of a crop in pixels.
        accumulate: parts of a batch.
        recompute: as `--recompute`.
        recompute_choices: possible values of `recompute`, from none to the most recomputation.
        amp: as `--amp`.
    """
    more = recompute_choices[recompute_choices.index(recompute) + 1:] if recompute in recompute_choices else ()
    remedies = (["--amp bf16"] * (amp == "off") + [f"--recompute {choice}" for choice in more]
                + [f"--accumulate {2 * accumulate}"] * (crops > 1) + ["a smaller --input-size"])
    return UserError(f"out of memory: expected room for {crops} crops of {input_size[0]}×{input_size[1]} on a device, "
                     f"found: {problem}; these need less memory: {', '.join(remedies)}")


def free_bytes(device):
    """Return the free memory of a device in bytes, swap space included; infinity if it is unknown."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    limits = []
    with contextlib.suppress(OSError, ValueError, KeyError):        # Linux
        with open("/proc/meminfo", encoding="ascii") as file:
            sizes = {name: int(size.split()[0]) << 10 for name, size in (line.split(":") for line in file)}
        limits.append(sizes["MemAvailable"] + sizes["SwapFree"])
    for name in ("memory.max", "memory/memory.limit_in_bytes"):     # limit of a container
        with contextlib.suppress(OSError, ValueError):
            limits.append(int(Path("/sys/fs/cgroup", name).read_text(encoding="ascii")))
    with contextlib.suppress(AttributeError, OSError, ValueError):
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))     # all memory of the machine
    return min(limits, default=math.inf)


@torch.inference_mode()
def measure_forward_pass(network, device, autocast=None):
    """Measure a lower bound of the memory of a forward pass in evaluation, by a pass over a small image.

    Args:
        network: in evaluation mode, on the device.
        device: `torch.device`.
        autocast: dtype of PyTorch's autocast, or None.

    Returns:
        (bytes per input pixel of the module with the largest input and output, logit maps of all heads).
    """
    largest = 0

    def measure(module, args, output):
        nonlocal largest
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
                    for tensor in (*args, output) if isinstance(tensor, torch.Tensor)}
        largest = max(largest, sum(storages.values()))

    hooks = [module.register_forward_hook(measure) for module in network.modules()]
    with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
        step, rest = grid_of(network)
        outputs = network(torch.zeros(1, 3, 8 * step + rest, 8 * step + rest, device=device))
    for hook in hooks:
        hook.remove()
    # At stride 8 the image has 65 pixels and 9 logits per side. It is counted as 9 · 8 = 72 pixels, because the border
    # of such a small image would otherwise have too much weight.
    return largest / ((8 + rest) * step) ** 2, sum(logits.shape[1] for logits in outputs.values())
