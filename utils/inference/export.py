"""A network as a file for other runtimes: ONNX, or PyTorch's own exported program. Each is compared with the network
before it takes its name."""

import contextlib
import copy
import functools
import io
import warnings

import torch
import torch.nn.functional as F
from torch import nn

from ..common import compat, files
from ..common.compat import torch_version
from ..common.errors import UserError, first_line, plural
from ..ops.upsampling import grid_of, round_size

OPSET = 18
# For the largest difference of logits, as a share of the largest of them. What goes wrong shows in all of it; fp16
# keeps eleven bits, and the worst of a million pixels after a hundred layers has few of them left.
TOLERANCE = {"fp32": 1e-3, "fp16": 0.25}


class ImagesToLogits(nn.Module):
    """What the file computes, at any size the labels of `SlidingPredictor` with the whole image as its window.

    Args:
        network: in evaluation mode, with norms folded into convolutions.
        normalization: of its input.
        dtype: of the network's input.
    """

    def __init__(self, network, normalization, dtype=torch.float32):
        super().__init__()
        self.network, self.normalization, self.dtype = network, normalization, dtype

    def forward(self, images):
        """images (B, 3, H, W) float32 RGB, 0 to 255 → fine logits (B, N, H, W), and coarse ones if there are; float32.
        """
        height, width = images.shape[-2:]
        # As in inference: the mean color, which is zero here, up to the sizes where logits lie on pixels.
        below, right = size = round_size((height, width), grid_of(self.network))
        pixels = F.pad(self.normalization(images), (0, right - width, 0, below - height))
        outputs = self.network(pixels.to(self.dtype))
        return tuple(F.interpolate(outputs[name].float(), size=size, mode="bilinear",
                                   align_corners=True)[..., :height, :width] for name in head_names(outputs))


def head_names(outputs):
    return [name for name in ("fine", "coarse") if name in outputs]


def example_images(size=None):
    """Two images of noise (2, 3, 257, 321), for a network of any size; or one (1, 3, *size). float32, 0 to 255."""
    return torch.randint(256, (2, 3, 257, 321) if size is None else (1, 3, *size)).float()


@torch.no_grad()
def write_program(path, network, normalization, *, size=None, precision="fp32", traced=False):
    """Write a network as .onnx or .pt2, whichever the path ends in.

    Args:
        network: in evaluation mode, with norms folded; on the CPU.
        size: (height, width) of the images, one at a time; None for any, and any number of them.
        precision: `fp32`, or `fp16` for weights and arithmetic; images and logits are float32 in any case.
        traced: to ONNX by the older exporter (`versions.onnx_program`), and to .pt2 of a fixed size alone.

    Returns:
        (names of the outputs, what the comparison with the network found). Raises `UserError` without the packages it
        needs, and where the file computes something else.
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
        content, reopen = _onnx(path, model, example, names, axes, traced), _open_onnx
    else:
        content, reopen = _pt2(path, model, example, axes), _open_pt2
    checked = files.write_checked(path, content, lambda written: compare(
        path, lambda: reopen(written), reference, examples, precision))
    return names, checked


@torch.no_grad()
def compare(path, reopen, reference, examples, precision):
    """Raise `UserError` where a file that was exported computes something else than the network; else a sentence.

    Args:
        path: that the file will have.
        reopen: () → (images → tensors, by the file), or a text that says why nothing here can run it.
        reference: images → tensors.
        examples: images.
        precision: a key of `TOLERANCE`.
    """
    largest, scale = 0.0, 0.0
    for images in examples:
        try:
            run = reopen()
            if isinstance(run, str):
                return f"not checked against PyTorch: {run}"
            outputs = run(images)
        except Exception as error:  # noqa: BLE001, every runtime has errors of its own
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
    """A copy of a network for float16 input. What raises its input to float32 by itself, such as the class centers,
    keeps weights of float32: the dtype that arrives there tells. Raises `UserError` where a layer cannot."""
    half = copy.deepcopy(network).half()

    def keep(module, arguments, whole):
        if any(isinstance(value, torch.Tensor) and value.dtype == torch.float32 for value in arguments):
            for name, parameter in whole.named_parameters(recurse=False):
                getattr(module, name).data = parameter.data

    hooks = [module.register_forward_pre_hook(functools.partial(keep, whole=network.get_submodule(name)))
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


def _onnx(path, model, example, names, axes, traced):
    try:
        import onnx  # noqa: F401, the exporter imports it
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"--export {path}: expected the packages onnx and onnxscript, found no {error.name}; "
                        "pip install onnx onnxscript") from None
    with _refusals(path, "torch.onnx", axes):
        return onnx_program(model, example, ["images"], names, axes, OPSET, traced)


def _open_onnx(written):
    try:
        import onnxruntime
    except ImportError:
        return "expected the package onnxruntime, found none"
    session = onnxruntime.InferenceSession(written, providers=["CPUExecutionProvider"])
    return lambda images: [torch.from_numpy(one) for one in session.run(None, {"images": images.numpy()})]


def _check_program(path, size, traced):
    if compat.torch_version() < EXPORT:
        raise UserError(f"--export {path}: expected PyTorch {'.'.join(map(str, EXPORT))} or newer for .pt2, "
                        f"found {torch.__version__}")
    if traced and size is None:
        raise UserError(f"--export {path}: expected --export-size with this backbone, as torch.export takes minutes to "
                        "find that it cannot leave the size open, found no such flag")


def _pt2(path, model, example, axes):
    with _refusals(path, "torch.export", axes):
        return exported_program(model, example, axes)


@contextlib.contextmanager
def _refusals(path, exporter, axes):
    """Makes a `UserError` of what an exporter raises."""
    try:
        yield
    except Exception as error:  # noqa: BLE001, there are many ways not to be exported
        raise UserError(f"--export {path}: expected a network that {exporter} of PyTorch {torch.__version__} takes"
                        f"{' for any size' if axes else ''}, found: {first_line(error.__cause__ or error)}"
                        f"{'; --export-size fixes the size' if axes else ''}") from None


def _open_pt2(written):
    with open(written, "rb") as file:
        return torch.export.load(file).module()
# From which version on .pt2 is tested. In 2.4 torch.export takes none of our networks.
EXPORT = (2, 9)


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
