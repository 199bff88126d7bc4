"""A network as an ONNX file, for other runtimes."""

import torch
import torch.nn.functional as F
from torch import nn

from . import checkpoint, versions
from .cli import UserError
from .inference import grid_of

OPSET = 18


class ImagesToLogits(nn.Module):
    """What the file computes, at any size the labels of `SlidingPredictor` with the whole image as its window.

    Args:
        network: in evaluation mode, with norms folded into convolutions.
        normalization: of its input.
    """

    def __init__(self, network, normalization):
        super().__init__()
        self.network, self.normalization = network, normalization

    def forward(self, images):
        """images (B, 3, H, W) float32 RGB, 0 to 255 → fine logits (B, N, H, W), and coarse ones if there are."""
        height, width = images.shape[-2:]
        # As in inference: the mean colour, which is zero here, up to the sizes where logits lie on pixels.
        step, rest = grid_of(self.network)
        below, right = -(height - rest) % step, -(width - rest) % step
        outputs = self.network(F.pad(self.normalization(images), (0, right, 0, below)))
        return tuple(F.interpolate(outputs[name], size=(height + below, width + right), mode="bilinear",
                                   align_corners=True)[..., :height, :width] for name in head_names(outputs))


def head_names(outputs):
    return [name for name in ("fine", "coarse") if name in outputs]


def export_onnx(network, normalization, path, size=(257, 321), traced=False):
    """Write an ONNX file with any batch size, height and width. Raises `UserError` without the packages it needs.

    network: in evaluation mode, with norms folded; on the CPU. size: of the example that is traced. traced: by the
    older exporter (`versions.onnx_program`).
    """
    try:
        import onnx  # noqa: F401, the exporter imports it
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"--export {path}: expected the packages onnx and onnxscript, found no {error.name}; "
                        "pip install onnx onnxscript") from None
    model = ImagesToLogits(network, normalization).eval()
    example = torch.randint(256, (2, 3, *size)).float()
    with torch.no_grad():
        names = head_names(network(normalization(example)))
        program = versions.onnx_program(model, example, ["images"], names,
                                        {0: ("batch", 1), 2: ("height", 2), 3: ("width", 2)}, OPSET, traced)
    checkpoint.write_atomically(path, lambda file: file.write(program))
    return names
