"""A trained network from its file, ready to predict: what evaluate.py does, for Python.

    from networks import load

    network = load("snapshots/CS_scenes_60000.pth")
    labels = network.predict("street.jpg").labels       # (H, W) train ids; network.names says which classes they are
"""

import functools
from dataclasses import dataclass

import torch

from libs.convert import fold_norms
from utils.common.errors import UserError
from utils.common.messages import logger
from utils.devices.precision import AUTOCAST, best_precision, exact_float32
from utils.devices.select import check_kernels, select_devices
from utils.imaging.classes import Classes
from utils.imaging.decode import to_rgb
from utils.inference.sliding import SlidingPredictor, fitting_size, most_probable

from .build import build_network
from .weights.start import read_snapshot

AMP = ("off", "bf16", "fp16")
PAPER_SCALES = (0.75, 1.0, 1.25, 1.5, 1.75, 2.0)


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How an image is predicted.

    Attributes:
        window: (height, width) in pixels; None for the training crop.
        whole: the whole image at once, no windows.
        overlap, scales, flip, batch_size: as in `SlidingPredictor`.
        amp: one of `AMP`.
        raw_weights: as in `load_network`.
        boundary: tolerance in pixels with which boundaries are scored, or None.
    """

    window: tuple | None = None
    whole: bool = False
    overlap: float = 1 / 3
    scales: tuple = PAPER_SCALES
    flip: bool = True
    batch_size: int = 4
    amp: str = "off"
    raw_weights: bool = False
    boundary: float | None = None

    def as_json(self, window, split, config):
        """What `result.json` says of it, with a snapshot of this `Config`; window: that was used, or None;
        split: name of the images."""
        averaged = (config.arguments or {}).get("ema") is not None
        return {"window": window and list(window), "overlap": None if self.whole else self.overlap,
                "scales": list(self.scales), "flip": self.flip, "amp": self.amp, "split": split,
                "average": "probabilities"} | (
                    {"weights": "raw" if self.raw_weights else "moving average"} if averaged else {}) | (
                    {"boundary": self.boundary} if self.boundary else {})

    def out_of_memory_error(self, found):
        """The `UserError`; found: the error's first words."""
        choices = [f"a --batch-size below {self.batch_size}"] * (self.batch_size > 1) + [
            "windows, by --input-size, instead of --whole" if self.whole else "a smaller --input-size",
            f"--scales below {max(self.scales):g}", "fewer --num-workers"]
        return UserError(f"out of memory: expected room for the passes of this protocol over an image, found: {found}; "
                         f"what helps: {', '.join(choices)}")


def load(path, *, device=None, amp=None, window=None, whole=False, overlap=1 / 3, scales=(1.0,), flip=False,
         batch_size=4, raw_weights=False):
    """Load a snapshot of train.py, or what `evaluate.py --export` wrote as .safetensors → `Predictor`.

    Args:
        path: of the file.
        device: `torch.device` or its name; None for the first GPU, else the CPU.
        amp: `off`, `bf16` or `fp16`; None for what the device computes in fastest without harm.
        window: (height, width) in pixels, rounded up to 8k + 1, and no larger than the image; None for the crops of
            the training.
        whole: the whole image at once, no windows.
        overlap: of neighboring windows, as a share.
        scales, flip: passes over an image; evaluate.py takes 0.75 to 2.0 by 0.25, each mirrored too.
        batch_size: windows at a time.
        raw_weights: those of the last step, also where the snapshot has a moving average.

    Raises `UserError` for a file or a GPU that is none, ValueError for the rest.
    """
    if amp not in (None, *AMP):
        raise ValueError(f"amp: expected one of {', '.join(AMP)}, or None, found {amp!r}")
    device = _device(device)
    amp = amp or best_precision(device)
    exact_float32(amp, device)
    protocol = Protocol(window=window, whole=whole, overlap=overlap, scales=scales, flip=flip, batch_size=batch_size,
                        amp=amp, raw_weights=raw_weights)
    network, config = load_network(path, device, raw_weights)
    return Predictor(sliding_predictor(network, config, device, protocol),
                     Classes(config.classes, f"classes of {path}"))


class Predictor:
    """A network that predicts images of any size.

    Attributes:
        names: N class names, by train id.
        palette: (N, 3) uint8 RGB, the colors of the classes.
        sliding: the `SlidingPredictor`: image → probabilities on the device.
    """

    def __init__(self, sliding, classes):
        self.sliding, self.classes = sliding, classes
        self.names, self.palette = classes.names, classes.palette[:classes.num_classes]

    def predict(self, image):
        """Predict one image → `Prediction`.

        image: path of a file, which is turned upright by its EXIF orientation; `PIL.Image` of any mode; or uint8 array
            or tensor of 0 to 255: RGB (H, W, 3), gray (H, W), or RGBA, whose transparency is left out.

        Raises ValueError for any other array, `UserError` for a file that cannot be read, and `MemoryError` where the
        device has too little memory.
        """
        return Prediction(self.sliding(to_rgb(image)), self.classes)


class Prediction:
    """What a network makes of an image, at the image's size, as NumPy arrays.

    Of many images keep `labels` alone: this object holds the probabilities, 4N bytes per pixel, on the device.

    Attributes:
        labels: (H, W) uint8, the train id of the most probable class.
        names: N class names, by train id.
    """

    def __init__(self, probabilities, classes):
        self._probabilities, self._classes, self.names = probabilities, classes, classes.names
        self.labels = most_probable(probabilities).to(torch.uint8).cpu().numpy()

    @functools.cached_property
    def probabilities(self):
        """(N, H, W) float32; their sum over the classes is 1."""
        return self._probabilities.cpu().numpy()

    @property
    def colors(self):
        """(H, W, 3) uint8 RGB, the colors of the classes."""
        return self._classes.color(self.labels)

    @property
    def ids(self):
        """(H, W) label ids, as the class table has them: uint8, or uint16 where they go beyond 255."""
        return self._classes.decode(self.labels)


def load_network(path, device, raw_weights=False):
    """File → (network prepared for evaluation, its `utils.snapshot.Config`).

    raw_weights: those of the last step, also where the snapshot has a moving average of the weights.
    """
    found = read_snapshot(path)
    network = prepared(found.config, chosen_weights(found, raw_weights))
    return network.to(device, memory_format=torch.channels_last), found.config


def chosen_weights(found, raw):
    """Those of a `Snapshot` to evaluate with, as `Snapshot.weights`; says which, where there is a choice."""
    if found.average is not None:
        logger.info(f"{found.path}: {'the weights of the last step' if raw else 'the moving average of the weights'}")
    return found.weights(raw)


def prepared(config, state):
    """The network of a `Config` with these weights, in evaluation mode and with its norms folded."""
    network = build_network(**config.network)
    network.load_state_dict(state)
    return fold_norms(network).eval()


def sliding_predictor(network, config, device, protocol, watch=None):
    """The `SlidingPredictor` of what `load_network` gave.

    Args:
        network, config: of `load_network`.
        device: `torch.device`.
        protocol: `Protocol`.
        watch: as in `SlidingPredictor`.
    """
    window = None if protocol.whole else protocol.window or config.input_size
    predictor = SlidingPredictor(
        network, window, protocol.overlap, protocol.scales, protocol.flip, protocol.batch_size,
        normalization=config.normalization, device=device, autocast=AUTOCAST[protocol.amp],
        memory_format=torch.channels_last, watch=watch)
    if window is not None:
        fitting_size(window, "windows", predictor.grid)     # said, after the predictor has taken it
    return predictor


def _device(device):
    if device is None:
        first = select_devices()[0]
        check_kernels(first)        # of several GPUs none has been asked yet
        return first
    try:
        device = torch.device(device)
        if device.type != "cuda":
            return torch.empty(0, device=device).device
    except (RuntimeError, TypeError, AssertionError, ImportError):      # the last two: built without it
        raise ValueError("device: expected one that PyTorch can use here, such as cpu or cuda:0, or None, found "
                         f"{str(device)!r}") from None
    return select_devices(str(device.index or 0))[0]
