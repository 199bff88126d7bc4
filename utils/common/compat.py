"""Differences between the versions of PyTorch and OpenCV that requirements.txt allows.

A comment with a version number names the first version that no longer needs the workaround. tests/oldest.sh runs the
lowest versions, tests/run.sh the newest.
"""

import contextlib
import inspect
import os
import re

import cv2
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

# Values of ONEDNN_MAX_CPU_ISA that restrict oneDNN to instruction sets without bf16.
WITHOUT_BF16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI")

# First PyTorch version with which --compile is tested. In 2.4 compiled code updates the running statistics of our norms
# twice.
COMPILER = (2, 9)


def total_norm(tensors):
    """Euclidean norm of all values of several tensors on one device, as a scalar tensor."""
    if hasattr(torch.nn.utils, "get_total_norm"):       # 2.6
        return torch.nn.utils.get_total_norm(tensors)
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(tensor) for tensor in tensors]))


def outside_compiled_code(function):
    """Decorate as `torch.compiler.disable` does, but import the compiler only with the first call.

    That import takes a second. PyTorch decorates its own functions in this way, in all versions so far.
    """
    return getattr(torch, "_disable_dynamo", torch.compiler.disable)(function)


class CheckedConvolutions(TorchDispatchMode):
    """Context in which a convolution of a map smaller than its kernel raises ValueError on the device "meta" too.

    PyTorch 2.4 accepts such a convolution there.
    """

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function is torch.ops.aten.convolution.default:
            x, weight, _, _, padding, dilation, transposed, *_ = arguments
            if not transposed and any(side + 2 * pad <= step * (kernel - 1) for side, pad, step, kernel in zip(
                    x.shape[2:], padding, dilation, weight.shape[2:], strict=False)):
                raise ValueError("map smaller than a kernel")
        return function(*arguments, **options or {})


def no_buffer_sync():
    """Keyword arguments, as a dict, with which `DistributedDataParallel` does not synchronize buffers.

    Our norms keep equal buffers in all processes by themselves.
    """
    parameters = inspect.signature(DistributedDataParallel).parameters
    return {"forward_sync_buffers" if "forward_sync_buffers" in parameters else "broadcast_buffers": False}     # 2.13


def cpu_computes_in_bf16(cpuinfo="/proc/cpuinfo"):
    """Whether the CPU has bf16 instructions that oneDNN may use; without them bf16 is slower than float32.

    Args:
        cpuinfo: the file in which Linux lists a CPU's instructions; used before PyTorch 2.11. False if there is none.
    """
    if os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() in WITHOUT_BF16:
        return False
    if hasattr(torch.cpu, "get_capabilities"):          # 2.11
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))      # "bf16" is ARM's
    try:
        with open(cpuinfo, encoding="utf-8") as file:
            return re.search(r"^(flags|Features)\s*:.*\b(avx512_bf16|amx_bf16|bf16)\b", file.read(), re.M) is not None
    except OSError:
        return False


@contextlib.contextmanager
def plain_classes(classes):
    """Context in which `torch.load(weights_only=True)` also reads objects of the given classes.

    PyTorch 2.4 keeps accepting them afterward, and 2.5 accepts classes only under their own names.

    Args:
        classes: {"module.name": class}.
    """
    entries = list(classes.values()) if torch_version() < (2, 6) else [(kind, name) for name, kind in classes.items()]
    if torch_version() < (2, 5):
        torch.serialization.add_safe_globals(entries)
        yield
        return
    with torch.serialization.safe_globals(entries):
        yield


def classes_in_file(path, error):
    """Names of the classes in a file from `torch.save` that `torch.load(weights_only=True)` refuses to read.

    Args:
        path: the file.
        error: message of `torch.load`, which names one of the classes; used with PyTorch before 2.6 and for files in
            the format before 1.6.
    """
    with contextlib.suppress(Exception):        # another format, or damaged
        return torch.serialization.get_unsafe_globals_in_checkpoint(path)
    return re.findall(r"GLOBAL ([\w.]+) was not an allowed global", error)


def torch_version():
    """(major, minor) version of PyTorch."""
    return tuple(map(int, torch.__version__.split(".")[:2]))


@contextlib.contextmanager
def opencv_silent():
    """Context in which OpenCV, and FFmpeg in it, print nothing about files that they cannot open."""
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")       # read when the first video is opened
    logging = cv2 if hasattr(cv2, "setLogLevel") else cv2.utils.logging     # OpenCV 5 moved the function
    before = logging.setLogLevel(0)
    try:
        yield
    finally:
        logging.setLogLevel(before)
