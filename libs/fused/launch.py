"""Launches of Triton kernels, and the check whether they can replace PyTorch's operators on a device."""

import functools
import importlib
import importlib.util
import itertools
import os

import torch

from utils.common.errors import first_line

# Modules of this package. Each has `examples(device, dtype)`, which calls its operator forward and backward on small
# tensors and returns {name: (result, result of PyTorch's operators)}.
OPERATORS = ("norm", "block_end", "cross_entropy")
# {dtype of maps: largest |result - expected| / |expected|, Euclidean norms}. Rounding errors are about 1e-6 in float32;
# in half precision an in-place norm with small weights makes errors of a percent.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.05}


def launch(kernel, grid, *arguments, **constants):
    """Launch a Triton kernel on the device of its first argument.

    Args:
        kernel: function decorated with `triton.jit`.
        grid: number of programs along each axis, up to three.
        arguments: tensors and numbers, in the order of the kernel's parameters. The first one is a tensor.
        constants: its `constexpr` parameters, and options of the compiler such as `num_warps`.
    """
    device = arguments[0].device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            start(kernel, grid, arguments, constants)
    else:
        start(kernel, grid, arguments, constants)


def start(kernel, grid, arguments, constants):
    """Start a kernel. All kernels of this project are started here, so that tests can count them or compile them."""
    kernel[grid](*arguments, **constants)


def supports(*maps):
    """Whether the kernels can compute with maps: channels-last, of one shape and dtype, on a device that runs them."""
    first = maps[0]
    runs = first.is_cuda or (first.device.type == "cpu" and interpreted())
    return runs and not torch.compiler.is_compiling() and first.dtype in TOLERANCES and first.numel() > 0 and all(
        x.ndim == 4 and x.dtype == first.dtype and x.shape == first.shape
        and x.is_contiguous(memory_format=torch.channels_last) for x in maps)


def interpreted():
    """Whether Triton's interpreter, which runs kernels on the CPU, is enabled."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def find_triton():
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def obstacle(device):
    """Return why the kernels cannot be used on a device, as a clause; None if they can.

    The first call for a device compiles and runs the kernels on small tensors, and compares the results with those of
    PyTorch's operators.

    Args:
        device: torch.device.
    """
    if device.type != "cuda" and not (device.type == "cpu" and interpreted()):
        return "there is no GPU of CUDA"
    if device.type == "cuda" and interpreted():
        return "TRITON_INTERPRET=1 runs Triton's kernels on the CPU"
    if not find_triton():
        return "Triton is not installed"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU is older than compute capability 8.0"
    try:
        return disagreement(device)
    except Exception as error:  # noqa: BLE001, a compiler or a driver can raise any error
        return f"a call of Triton's kernels failed ({type(error).__name__}: {first_line(error)})"


def random_map(*shape, seed, device, dtype):
    """A channels-last map (B, C, H, W) of normally distributed values; leaves the global random generators alone."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return values.to(device, dtype, memory_format=torch.channels_last)


@torch.inference_mode(False)
@torch.enable_grad()
def disagreement(device):
    """Compare all operators with PyTorch's on small tensors: a clause that names the first that differs, or None."""
    for name, (dtype, tolerance) in itertools.product(OPERATORS, TOLERANCES.items()):
        operator = importlib.import_module(f"{__package__}.{name}")
        # The kernels use no TF32 either; the caller may predict, without gradients or in half precision.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False), torch.autocast(device.type, enabled=False):
            results = operator.examples(device, dtype)
        for what, (result, expected) in results.items():
            error = ((result - expected).norm() / expected.norm()).item()
            if not error <= tolerance:          # also where it is NaN
                kind = str(dtype).removeprefix("torch.")
                return f"{what} of {name} in {kind} differs from PyTorch's by {error:.0e}"
    return None
