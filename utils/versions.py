"""What the versions of PyTorch and OpenCV that requirements.txt allows do in different ways, and from which version on
nothing of it is needed any more: tests/oldest.sh runs the lowest ones, tests/run.sh the newest."""

import contextlib
import inspect
import io
import os
import re
import warnings

import cv2
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

# What oneDNN can be told to leave unused (ONEDNN_MAX_CPU_ISA), as far as bf16 is not among what remains.
WITHOUT_BF16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI")

# From which version on --compile is tested. In 2.4 compiled code updates the running statistics of our norms twice.
COMPILER = (2, 9)
# From which version on .pt2 is tested. In 2.4 torch.export takes none of our networks.
EXPORT = (2, 9)


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


def onnx_program(model, example, inputs, outputs, axes, opset, traced=False):
    """A model as the bytes of an ONNX file, for any size of some axes, or for that of the example.

    Args:
        model: in evaluation mode; takes one tensor, returns a tuple of tensors.
        example: the input that is traced.
        inputs, outputs: names; outputs have the axes of the input.
        axes: {axis: (name, least size)}.
        opset: version of the operators.
        traced: by the older exporter, which follows one pass: the one by torch.export fixes sizes that a network of
            others looks at in Python, or takes minutes to find that it need not.
    """
    names = {"input_names": inputs, "output_names": outputs, "opset_version": opset}
    if torch_version() >= (2, 9) and not traced:        # the default since; before, it was being made
        program = torch.onnx.export(model, (example,), dynamo=True, dynamic_shapes=_sizes(axes), verbose=False, **names)
        return program.model_proto.SerializeToString()
    file = io.BytesIO()
    free = {axis: name for axis, (name, _) in axes.items()}
    older = {"dynamo": False} if torch_version() >= (2, 5) else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)    # of constants that are constant
        warnings.simplefilter("ignore", DeprecationWarning)         # of the older exporter itself
        torch.onnx.register_custom_op_symbolic("aten::_upsample_bicubic2d_aa", _resize_bicubic, opset)
        torch.onnx.register_custom_op_symbolic("aten::addcmul", _addcmul, opset)
        torch.onnx.export(model, (example,), file, dynamic_axes=dict.fromkeys((*inputs, *outputs), free), **names,
                          **older)
    return file.getvalue()


def _resize_bicubic(graph, image, size, align_corners, *scales):
    """Bicubic resizing with antialiasing, of which the older exporter does not know; not with aligned corners."""
    kept = graph.op("Slice", graph.op("Shape", image), *(graph.op("Constant", value_t=torch.tensor([value]))
                                                         for value in (0, 2)))
    none = graph.op("Constant", value_t=torch.tensor([], dtype=torch.float32))
    size = graph.op("Concat", kept, graph.op("Cast", size, to_i=7), axis_i=0)      # 7: int64
    return graph.op("Resize", image, none, none, size, mode_s="cubic", antialias_i=1, cubic_coeff_a_f=-0.5,
                    exclude_outside_i=1, coordinate_transformation_mode_s="half_pixel")


def _addcmul(graph, total, one, other, value):
    """total + value · one · other in their dtype, which the older exporter would raise to float32 from here on."""
    product = graph.op("Mul", graph.op("Mul", one, other), graph.op("CastLike", value, one))
    return graph.op("Add", total, product).setType(total.type())


def exported_program(model, example, axes):
    """A model as the bytes of a file of `torch.export.save`; arguments as in `onnx_program`.

    Raises errors of many kinds.
    """
    file, as_given = io.BytesIO(), contextlib.nullcontext()
    if axes:        # as the exporter to ONNX does it: that the example's size fits must not become a condition
        from torch.fx.experimental import _config
        as_given = _config.patch(backed_size_oblivious=True)
    with as_given:
        program = torch.export.export(model, (example,), dynamic_shapes=_sizes(axes), strict=False)
    torch.export.save(program, file)
    return file.getvalue()


def _sizes(axes):
    """What torch.export wants to know of the only input, of which some axes may have any size; None of none."""
    sizes = {axis: torch.export.Dim(name, min=least) for axis, (name, least) in axes.items()}
    return (sizes,) if sizes else None


@contextlib.contextmanager
def plain_classes(classes):
    """Inside, `torch.load(weights_only=True)` also reads objects of these {"module.name": class}. PyTorch 2.4 goes on
    to do so afterwards, and 2.5 still takes classes by their own names alone."""
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
