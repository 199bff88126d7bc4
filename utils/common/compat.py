"""What the versions of PyTorch and OpenCV that requirements.txt allows do in different ways, and from which version on
nothing of it is needed any more: tests/oldest.sh runs the lowest ones, tests/run.sh the newest."""

import contextlib
import inspect
import os
import re

import cv2
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

# What oneDNN can be told to leave unused (ONEDNN_MAX_CPU_ISA), as far as bf16 is not among what remains.
WITHOUT_BF16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI")

# From which version on --compile is tested. In 2.4 compiled code updates the running statistics of our norms twice.
COMPILER = (2, 9)


def total_norm(tensors):
    """Euclidean norm of all values of some tensors on one device: scalar tensor."""
    if hasattr(torch.nn.utils, "get_total_norm"):       # 2.6
        return torch.nn.utils.get_total_norm(tensors)
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(tensor) for tensor in tensors]))


def outside_compiled_code(function):
    """`torch.compiler.disable`, but the compiler, whose import takes a second, comes with the first call: PyTorch's own
    way of decorating what it imports itself, in all versions so far."""
    return getattr(torch, "_disable_dynamo", torch.compiler.disable)(function)


class CheckedConvolutions(TorchDispatchMode):
    """Inside, a convolution of a map that is smaller than its kernel is a ValueError on the device "meta" too, where
    PyTorch 2.4 takes it."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function is torch.ops.aten.convolution.default:
            x, weight, _, _, padding, dilation, transposed, *_ = arguments
            if not transposed and any(side + 2 * pad <= step * (kernel - 1) for side, pad, step, kernel in zip(
                    x.shape[2:], padding, dilation, weight.shape[2:], strict=False)):
                raise ValueError("map smaller than a kernel")
        return function(*arguments, **options or {})


def keeping_buffers():
    """The argument by which `DistributedDataParallel` leaves buffers alone, as a dict: norms keep the same ones in all
    processes."""
    named = inspect.signature(DistributedDataParallel).parameters
    return {"forward_sync_buffers" if "forward_sync_buffers" in named else "broadcast_buffers": False}     # 2.13


def cpu_computes_in_bf16(cpuinfo="/proc/cpuinfo"):
    """Whether the CPU has instructions for bf16, and oneDNN may use them: without them bf16 is slower than float32.

    cpuinfo: the file by which Linux names a CPU's instructions; where there is none, the answer is no.
    """
    if os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() in WITHOUT_BF16:
        return False
    if hasattr(torch.cpu, "get_capabilities"):          # 2.11
        able = torch.cpu.get_capabilities()
        return any(able.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))      # the last one is ARM's
    try:
        with open(cpuinfo, encoding="utf-8") as file:
            return re.search(r"^(flags|Features)\s*:.*\b(avx512_bf16|amx_bf16|bf16)\b", file.read(), re.M) is not None
    except OSError:
        return False


@contextlib.contextmanager
def plain_classes(classes):
    """Inside, `torch.load(weights_only=True)` also reads objects of these {"module.name": class}. PyTorch 2.4 goes on
    to do so afterward, and 2.5 still takes classes by their own names alone."""
    entries = list(classes.values()) if torch_version() < (2, 6) else [(kind, name) for name, kind in classes.items()]
    if torch_version() < (2, 5):
        torch.serialization.add_safe_globals(entries)
        yield
        return
    with torch.serialization.safe_globals(entries):
        yield


def classes_in_file(path, error):
    """Names of the classes in a file of `torch.save` that `torch.load(weights_only=True)` does not read; error: its
    message, which names one of them, for PyTorch before 2.6 and for files of the format before 1.6."""
    with contextlib.suppress(Exception):        # of another format, or damaged
        return torch.serialization.get_unsafe_globals_in_checkpoint(path)
    return re.findall(r"GLOBAL ([\w.]+) was not an allowed global", error)


def torch_version():
    """(major, minor) of PyTorch."""
    return tuple(map(int, torch.__version__.split(".")[:2]))


@contextlib.contextmanager
def opencv_silent():
    """Without what OpenCV prints of its own about files that it cannot open; version 5 asks for that elsewhere."""
    place = cv2 if hasattr(cv2, "setLogLevel") else cv2.utils.logging
    before = place.setLogLevel(0)
    try:
        yield
    finally:
        place.setLogLevel(before)
