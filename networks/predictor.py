"""Load a trained network from a file and predict images with it: the Python interface to what evaluate.py does.

    from networks import load

    network = load("snapshots/CS_scenes_60000.pth")
    labels = network.predict("street.jpg").labels       # (H, W) train ids; network.names has their class names
"""

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from libs.abn import set_backend
from libs.convert import fold_norms
from libs.fused.launch import obstacle
from utils.common.errors import UserError
from utils.common.messages import logger
from utils.devices.precision import AUTOCAST, best_precision, exact_float32
from utils.devices.select import check_kernels, select_devices
from utils.imaging import draw
from utils.imaging.classes import Classes
from utils.imaging.decode import to_rgb
from utils.inference.sliding import SlidingPredictor, fitting_size
from utils.ops.probabilities import most_probable
from utils.reports import charts

from .build import build_network
from .exported import OnnxNetwork, is_exported
from .weights.start import read_snapshot

AMP = ("off", "bf16", "fp16")
KERNELS = ("auto", "torch")
PAPER_SCALES = (0.75, 1.0, 1.25, 1.5, 1.75, 2.0)


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How images are predicted and scored.

    Attributes:
        window: (height, width) of the sliding windows in pixels; None for the training crop.
        whole: predict the whole image at once, without windows.
        overlap, scales, flip, batch_size: as in `SlidingPredictor`.
        amp: one of `AMP`.
        raw_weights, kernels: as in `load_network`.
        boundary: tolerance in pixels of the boundary scores; None for no boundary scores.
    """

    window: tuple | None = None
    whole: bool = False
    overlap: float = 1 / 3
    scales: tuple = PAPER_SCALES
    flip: bool = True
    batch_size: int = 4
    amp: str = "off"
    raw_weights: bool = False
    kernels: str = "auto"
    boundary: float | None = None

    def as_json(self, window, split, config):
        """Describe the protocol as plain values for `result.json`.

        Args:
            window: (height, width) of the windows that were used; None for whole images.
            split: name of the set of images.
            config: `Config` of the snapshot.
        """
        averaged = (config.arguments or {}).get("ema") is not None
        return {"window": window and list(window), "overlap": None if self.whole else self.overlap,
                "scales": list(self.scales), "flip": self.flip, "amp": self.amp, "split": split,
                "average": "probabilities"} | (
                    {"weights": "raw" if self.raw_weights else "moving average"} if averaged else {}) | (
                    {"boundary": self.boundary} if self.boundary else {})

    def out_of_memory_error(self, reason):
        """Build the `UserError` for too little memory; reason: first line of the original error."""
        choices = [f"a --batch-size below {self.batch_size}"] * (self.batch_size > 1) + [
            "windows, by --input-size, instead of --whole" if self.whole else "a smaller --input-size",
            f"--scales below {max(self.scales):g}", "fewer --num-workers"]
        return UserError("out of memory: expected room for the passes of this protocol over an image, found: "
                         f"{reason}; what helps: {', '.join(choices)}")


def load(path, *, device=None, amp=None, window=None, whole=False, overlap=1 / 3, scales=(1.0,), flip=False,
         batch_size=4, raw_weights=False, kernels="auto"):
    """Load a trained network for prediction.

    Remarks, such as which weights are used, are logged at level INFO; `logging.basicConfig(level="INFO")` shows them.

    Args:
        path: a snapshot of train.py; a .safetensors or .onnx file written by `evaluate.py --export`; or hf:owner/name,
            a network on the Hugging Face Hub. For .onnx, `amp` and `raw_weights` have no effect.
        device: `torch.device` or its name; None for the first GPU, or the CPU if there is none.
        amp: `off`, `bf16` or `fp16`; None for the fastest of them that is accurate on the device.
        window: (height, width) of the sliding windows in pixels, rounded up to 8k + 1 and limited to the image size;
            None for the size of the training crops.
        whole: predict the whole image at once, without windows.
        overlap: overlap of neighboring windows, as a fraction of their size.
        scales: factors by which the image is resized, one pass each; the default of evaluate.py is 0.75 to 2.0 in steps
            of 0.25.
        flip: add a mirrored pass at each scale, as evaluate.py does by default.
        batch_size: number of windows per forward pass.
        raw_weights: use the weights of the last step, even if the snapshot has a moving average.
        kernels: as in `prepare_for_evaluation`.

    Returns:
        `Predictor`.

    Raises:
        UserError: if the file is not a snapshot or the GPU cannot be used.
        ValueError: for any other invalid argument.
    """
    if amp not in (None, *AMP):
        raise ValueError(f"amp: expected one of {', '.join(AMP)}, or None, found {amp!r}")
    if kernels not in KERNELS:
        raise ValueError(f"kernels: expected {' or '.join(KERNELS)}, found {kernels!r}")
    device = _device(device)
    amp = amp or ("off" if is_exported(path) else best_precision(device))
    exact_float32(amp, device)
    protocol = Protocol(window=window, whole=whole, overlap=overlap, scales=scales, flip=flip, batch_size=batch_size,
                        amp=amp, raw_weights=raw_weights, kernels=kernels)
    network, config = load_network(path, device, raw_weights, kernels)
    return Predictor(sliding_predictor(network, config, device, protocol),
                     Classes(config.classes, f"classes of {path}"))


class Predictor:
    """A network that predicts images of any size.

    Attributes:
        names: N class names, by train id.
        palette: colors of the classes, (N, 3) uint8 RGB.
        sliding: `SlidingPredictor` that maps an image to probabilities on the device.
    """

    def __init__(self, sliding, classes):
        self.sliding, self.classes = sliding, classes
        self.names, self.palette = classes.names, classes.palette[:classes.num_classes]

    def predict(self, image):
        """Predict one image.

        Args:
            image: path of a file, which is rotated according to its EXIF orientation; `PIL.Image` of any mode; or uint8
                array or tensor with values from 0 to 255: RGB (H, W, 3), gray (H, W), or RGBA (H, W, 4), whose alpha
                channel is ignored.

        Returns:
            `Prediction`.

        Raises:
            ValueError: for any other array.
            UserError: if the file cannot be read.
            MemoryError: if the device has too little memory.
        """
        image = to_rgb(image)
        return Prediction(image, self.sliding(image), self.classes)


class Prediction:
    """Prediction of one image, at the size of the image, as NumPy arrays. A notebook shows it as a picture.

    The object keeps the probabilities on the device, 4N bytes per pixel. For many images keep only the `labels`.

    Attributes:
        image: (H, W, 3) uint8 RGB.
        labels: (H, W) uint8, the train id of the most probable class.
        names: N class names, by train id.
    """

    def __init__(self, image, probabilities, classes):
        self.image = np.array(image.cpu().numpy() if torch.is_tensor(image) else image)     # copied: callers reuse it
        self._probabilities, self._classes, self.names = probabilities, classes, classes.names
        self.labels = most_probable(probabilities)[1].cpu().numpy()

    @functools.cached_property
    def probabilities(self):
        """Class probabilities (N, H, W) float32, which sum to 1 over the classes."""
        return self._probabilities.cpu().numpy()

    @property
    def colors(self):
        """Color of the predicted class (H, W, 3) uint8 RGB."""
        return self._classes.color(self.labels)

    @property
    def ids(self):
        """Label ids (H, W) of the class table: uint8, or uint16 if an id exceeds 255."""
        return self._classes.decode(self.labels)

    def overlay(self, strength=0.5):
        """Image and class colors blended (H, W, 3) uint8 RGB; strength: weight of the colors, 0 to 1."""
        return draw.overlay(self.image, self.colors, strength)

    def save(self, path):
        """Write the class colors as .png, a palette whose indices are train ids, or the overlay as .jpg."""
        suffix = Path(path).suffix.lower()
        if suffix == ".png":
            draw.save_palette_png(path, self.labels, self._classes.palette)
        elif suffix in (".jpg", ".jpeg"):
            draw.save_jpeg(path, self.overlay())
        else:
            raise UserError(f"{path}: expected a name that ends in .png, for class colors, or .jpg, for the overlay, "
                            f"found {suffix or 'none of these'}")

    def _repr_png_(self):
        """Image, class colors and legend side by side, as a PNG for notebooks."""
        return charts.prediction_picture(self.image, self.labels, self.names, self._classes.palette)


def load_network(path, device, raw_weights=False, kernels="auto", classes=None):
    """Load a network from a file for evaluation.

    Args:
        path: as in `load`.
        device: `torch.device`.
        raw_weights: use the weights of the last step, even if the snapshot has a moving average; not for .onnx.
        kernels: as in `prepare_for_evaluation`.
        classes: as in `OnnxNetwork`.

    Returns:
        (network as of `build_for_evaluation`, or an `OnnxNetwork`; `networks.weights.snapshot.Config` of the file).

    Raises:
        UserError: if the file is not a valid snapshot or export.
    """
    if is_exported(path):
        network = OnnxNetwork(path, device, classes)
        return network, network.config
    snapshot = read_snapshot(path)
    network = build_for_evaluation(snapshot.config, select_weights(snapshot, raw_weights), device, kernels)
    return network.to(device, memory_format=torch.channels_last), snapshot.config


def select_weights(snapshot, raw):
    """Return the weights of a `Snapshot` to evaluate, as `Snapshot.weights`; log the choice if there are two."""
    if snapshot.average is not None:
        kind = "weights of the last step" if raw else "moving average of the weights"
        logger.info(f"{snapshot.path}: using the {kind}")
    return snapshot.weights(raw)


def build_for_evaluation(config, state, device=None, kernels="auto"):
    """Build the network of a `Config` with these weights, prepared by `prepare_for_evaluation`."""
    network = build_network(**config.network)
    network.load_state_dict(state)
    return prepare_for_evaluation(network, device, kernels)


def prepare_for_evaluation(network, device=None, kernels="auto"):
    """Return a network in evaluation mode, whose norms cost as little as they can on a device.

    Norms are folded into the convolutions before them, in a copy of the network. On a GPU where Triton's kernels can be
    used they stay: there a norm and its activation, or all that ends a residual block, are one operator that reads and
    writes each map once, while the bias of a convolution and the activation are two.

    Args:
        network: nn.Module.
        device: `torch.device` on which the network will run; None for any.
        kernels: `auto`, or `torch` to fold norms on a GPU too.
    """
    if kernels == "auto" and device is not None and device.type == "cuda":
        reason = obstacle(device)
        if reason is None:
            set_backend(network, "triton")
            return network.eval()
        logger.info(f"without Triton's kernels, which save memory traffic: {reason}")
    return fold_norms(network).eval()


def sliding_predictor(network, config, device, protocol, watch=None):
    """Build the `SlidingPredictor` of a network.

    Args:
        network, config: as `load_network` returns them.
        device: `torch.device`.
        protocol: `Protocol`.
        watch: as in `SlidingPredictor`.
    """
    window = None if protocol.whole else protocol.window or config.input_size
    predictor = SlidingPredictor(network, window, overlap=protocol.overlap, scales=protocol.scales, flip=protocol.flip,
                                 batch_size=protocol.batch_size, normalization=config.normalization, device=device,
                                 autocast=AUTOCAST[protocol.amp], memory_format=torch.channels_last, watch=watch)
    if window is not None:
        fitting_size(window, "windows", predictor.grid)     # only for its message; the predictor has checked the size
    return predictor


def _device(device):
    """Check the argument `device` of `load`."""
    if device is None:
        first = select_devices()[0]
        check_kernels(first)        # select_devices leaves this check to the caller if there are several GPUs
        return first
    try:
        device = torch.device(device)
        if device.type != "cuda":
            return torch.empty(0, device=device).device
    except (RuntimeError, TypeError, AssertionError, ImportError):      # the last two: PyTorch built without the device
        raise ValueError("device: expected a device that PyTorch can use here, such as cpu or cuda:0, or None, found "
                         f"{str(device)!r}") from None
    return select_devices(str(device.index or 0))[0]
