"""Export of a network to ONNX or a PyTorch exported program (.pt2).

Each file is compared with the network before it gets its final name.
"""

import contextlib
import copy
import functools
import io
import warnings

import torch
import torch.nn.functional as F
from torch import nn

from ..common import files
from ..common.compat import torch_version
from ..common.errors import UserError, first_line, plural
from ..ops.upsampling import grid_of, round_size

OPSET = 18
EXPORT = (2, 9)     # first PyTorch version with which .pt2 is tested; in 2.4 torch.export accepts none of our networks
# Largest difference of logits, as a share of the largest logit. A wrong export differs by much more than this; fp16 has
# eleven bits, of which few remain correct in the worst of a million pixels after a hundred layers.
TOLERANCE = {"fp32": 1e-3, "fp16": 0.25}


class ImagesToLogits(nn.Module):
    """The exported computation: normalization, network and upsampling of the logits to the size of the images.

    At any size it gives the same labels as `SlidingPredictor` with the whole image as its window.

    Args:
        network: in evaluation mode, with norms folded into convolutions.
        normalization: of the network's input.
        dtype: of the network's input.
    """

    def __init__(self, network, normalization, dtype=torch.float32):
        super().__init__()
        self.network, self.normalization, self.dtype = network, normalization, dtype

    def forward(self, images):
        """Images (B, 3, H, W) float32 RGB, 0 to 255 → tuple of float32 logits (B, N, H, W): fine[, coarse]."""
        height, width = images.shape[-2:]
        # As in inference: pad with the mean color, normalized to zero, up to a size where logits lie on pixels.
        below, right = size = round_size((height, width), grid_of(self.network))
        pixels = F.pad(self.normalization(images), (0, right - width, 0, below - height))
        outputs = self.network(pixels.to(self.dtype))
        return tuple(F.interpolate(outputs[name].float(), size=size, mode="bilinear",
                                   align_corners=True)[..., :height, :width] for name in head_names(outputs))


def head_names(outputs):
    """The heads among a network's outputs that are exported, in the order of the file's outputs."""
    return [name for name in ("fine", "coarse") if name in outputs]


def example_images(size=None):
    """Noise images, float32, 0 to 255: one of a fixed size (1, 3, *size), or two (2, 3, 257, 321) for any size."""
    return torch.randint(256, (2, 3, 257, 321) if size is None else (1, 3, *size)).float()


@torch.no_grad()
def write_program(path, network, normalization, *, size=None, precision="fp32", traced=False, metadata=None):
    """Write a network as .onnx or .pt2, depending on the suffix of the path.

    Args:
        path: the file to write.
        network: in evaluation mode, with norms folded; on the CPU.
        normalization: of the network's input.
        size: fixed (height, width) with a batch size of 1; None for any size and any batch size.
        precision: `fp32`, or `fp16` for weights and arithmetic; images and logits are always float32.
        traced: use the older ONNX exporter (see `onnx_program`), and allow .pt2 only with a fixed size.
        metadata: {key: text} that an .onnx file also holds, or None.

    Returns:
        (names of the outputs, a sentence with the result of the comparison with the network).

    Raises:
        UserError: if required packages are missing, or if the file's results differ from the network's.
    """
    reference = model = ImagesToLogits(network, normalization).eval()
    if path.suffix == ".pt2":
        _check_program(path, size, traced)
    if precision == "fp16":
        model = ImagesToLogits(in_half_precision(network), normalization, torch.float16).eval()
    example = example_images(size)
    examples = [example] if size else [example, example[:1, :, :72, :100]]
    axes = {} if size else {0: ("batch", 1), 2: ("height", 2), 3: ("width", 2)}
    names = head_names(network(_small_image(network)))
    if path.suffix == ".onnx":
        content, reopen = _onnx(path, model, example=example, names=names, axes=axes, traced=traced,
                                metadata=metadata or {}), _open_onnx
    else:
        content, reopen = _pt2(path, model, example, axes), _open_pt2
    checked = files.write_checked(path, content, lambda written: compare(
        path, lambda: reopen(written), reference=reference, examples=examples, precision=precision))
    return names, checked


@torch.no_grad()
def compare(path, reopen, reference, examples, precision):
    """Compare an exported file with the network.

    Args:
        path: final path of the file, for messages.
        reopen: () → a function (images → tensors) that runs the file, or the reason, a text, why it cannot be run here.
        reference: the network, images → tensors.
        examples: batches of images.
        precision: a key of `TOLERANCE`.

    Returns:
        A sentence with the result.

    Raises:
        UserError: if the file does not run or the results differ.
    """
    largest, scale = 0.0, 0.0
    for images in examples:
        try:
            run = reopen()
            if isinstance(run, str):
                return f"not checked against PyTorch: {run}"
            outputs = run(images)
        except Exception as error:  # noqa: BLE001, every runtime has its own exceptions
            raise UserError(f"--export {path}: expected a file that runs with {plural(len(images), 'image')} of "
                            f"{images.shape[2]}×{images.shape[3]}, found: {first_line(error)}"
                            f"{'; --export-size fixes the size' * (len(examples) > 1)}") from None
        for ours, theirs in zip(reference(images), outputs, strict=True):
            largest = max(largest, (ours - theirs).abs().nan_to_num(torch.inf).max().item())
            scale = max(scale, ours.abs().max().item())
    if largest > TOLERANCE[precision] * scale:
        raise UserError(f"--export {path}: expected logits within {TOLERANCE[precision]:g} of the largest of "
                        f"PyTorch's, {scale:.3g}, found a difference of {largest:.3g}")
    return f"checked against PyTorch: largest difference {largest:.2g}, of logits up to {scale:.3g}"


def in_half_precision(network):
    """Copy a network for float16 input.

    Modules that get float32 input, because the network computes in float32 there (such as the class centers), keep
    float32 weights; a forward pass finds them.

    Raises:
        UserError: if a layer does not support float16 on a CPU.
    """
    half = copy.deepcopy(network).half()

    def keep_float32(module, arguments, original):
        if any(isinstance(value, torch.Tensor) and value.dtype == torch.float32 for value in arguments):
            for name, parameter in original.named_parameters(recurse=False):
                getattr(module, name).data = parameter.data

    hooks = [module.register_forward_pre_hook(functools.partial(keep_float32, original=network.get_submodule(name)))
             for name, module in half.named_modules()]
    try:
        half(_small_image(network).half())
    except RuntimeError as error:
        raise UserError(f"--export-precision fp16: expected a network that PyTorch {torch.__version__} computes in "
                        f"float16 on a CPU, found: {first_line(error)}") from None
    for hook in hooks:
        hook.remove()
    return half


def _small_image(network):
    return torch.zeros(1, 3, *round_size((65, 65), grid_of(network)))


def _onnx(path, model, example, names, axes, traced, metadata):
    try:
        import onnx
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"--export {path}: expected the packages onnx and onnxscript, found no {error.name}; "
                        "pip install onnx onnxscript") from None
    with _exporter_errors(path, "torch.onnx", axes):
        content = onnx_program(model, example, inputs=["images"], outputs=names, axes=axes, opset=OPSET, traced=traced)
    entries = [onnx.StringStringEntryProto(key=key, value=text) for key, text in metadata.items()]
    return content + onnx.ModelProto(metadata_props=entries).SerializeToString()    # which adds fields to the message


def _open_onnx(written):
    try:
        import onnxruntime
    except ImportError:
        return "expected the package onnxruntime, found none"
    session = onnxruntime.InferenceSession(written, providers=["CPUExecutionProvider"])
    return lambda images: [torch.from_numpy(logits) for logits in session.run(None, {"images": images.numpy()})]


def _check_program(path, size, traced):
    if torch_version() < EXPORT:
        raise UserError(f"--export {path}: expected PyTorch {'.'.join(map(str, EXPORT))} or newer for .pt2, "
                        f"found {torch.__version__}")
    if traced and size is None:
        raise UserError(f"--export {path}: expected --export-size with this backbone, as torch.export takes minutes to "
                        "detect that it cannot leave the size open, found no such flag")


def _pt2(path, model, example, axes):
    with _exporter_errors(path, "torch.export", axes):
        return exported_program(model, example, axes)


@contextlib.contextmanager
def _exporter_errors(path, exporter, axes):
    """Context that turns an exporter's exceptions into `UserError`."""
    try:
        yield
    except Exception as error:  # noqa: BLE001, exporters raise many kinds of exceptions
        raise UserError(f"--export {path}: expected a network that {exporter} of PyTorch {torch.__version__} accepts"
                        f"{' for any size' if axes else ''}, found: {first_line(error.__cause__ or error)}"
                        f"{'; --export-size fixes the size' if axes else ''}") from None


def _open_pt2(written):
    with open(written, "rb") as file:
        return torch.export.load(file).module()


def onnx_program(model, example, inputs, outputs, axes, opset, traced=False):
    """Export a model as the bytes of an ONNX file.

    Args:
        model: in evaluation mode; takes one tensor, returns a tuple of tensors.
        example: an input.
        inputs, outputs: names; outputs have the axes of the input.
        axes: {axis: (name, smallest size)} of the axes of any size; other axes have the size of the example.
        opset: version of the operators.
        traced: use the older exporter, which traces one pass. The exporter based on torch.export fixes sizes that a
            third-party network inspects in Python, or takes minutes to detect that it need not.
    """
    names = {"input_names": inputs, "output_names": outputs, "opset_version": opset}
    if torch_version() >= (2, 9) and not traced:        # the default since 2.9, unfinished before
        program = torch.onnx.export(model, (example,), dynamo=True, dynamic_shapes=_sizes(axes), verbose=False, **names)
        return program.model_proto.SerializeToString()
    file = io.BytesIO()
    axis_names = {axis: name for axis, (name, _) in axes.items()}
    options = {"dynamo": False} if torch_version() >= (2, 5) else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)    # about values that really are constant
        warnings.simplefilter("ignore", DeprecationWarning)         # the older exporter's own
        torch.onnx.register_custom_op_symbolic("aten::_upsample_bicubic2d_aa", _resize_bicubic, opset)
        torch.onnx.register_custom_op_symbolic("aten::addcmul", _addcmul, opset)
        torch.onnx.export(model, (example,), file, dynamic_axes=dict.fromkeys((*inputs, *outputs), axis_names),
                          **names, **options)
    return file.getvalue()


def _resize_bicubic(graph, image, size, align_corners, *scales):
    """Symbolic for bicubic resizing with antialiasing, which the older exporter lacks; without aligned corners."""
    kept = graph.op("Slice", graph.op("Shape", image), *(graph.op("Constant", value_t=torch.tensor([value]))
                                                         for value in (0, 2)))
    none = graph.op("Constant", value_t=torch.tensor([], dtype=torch.float32))
    size = graph.op("Concat", kept, graph.op("Cast", size, to_i=7), axis_i=0)      # 7: int64
    return graph.op("Resize", image, none, none, size, mode_s="cubic", antialias_i=1, cubic_coeff_a_f=-0.5,
                    exclude_outside_i=1, coordinate_transformation_mode_s="half_pixel")


def _addcmul(graph, total, a, b, value):
    """Symbolic for total + value · a · b in their dtype; the older exporter would continue in float32 from here on."""
    product = graph.op("Mul", graph.op("Mul", a, b), graph.op("CastLike", value, a))
    return graph.op("Add", total, product).setType(total.type())


def exported_program(model, example, axes):
    """Export a model as the bytes of a file from `torch.export.save`; arguments as in `onnx_program`.

    Raises exceptions of many kinds.
    """
    file, export_config = io.BytesIO(), contextlib.nullcontext()
    if axes:        # as the ONNX exporter does: properties of the example's size must not become conditions
        from torch.fx.experimental import _config
        export_config = _config.patch(backed_size_oblivious=True)
    with export_config:
        program = torch.export.export(model, (example,), dynamic_shapes=_sizes(axes), strict=False)
    torch.export.save(program, file)
    return file.getvalue()


def _sizes(axes):
    """`dynamic_shapes` for a model with one input; None if no axis is dynamic."""
    sizes = {axis: torch.export.Dim(name, min=smallest) for axis, (name, smallest) in axes.items()}
    return (sizes,) if sizes else None
