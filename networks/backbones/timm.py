"""Networks of timm (Wightman, "PyTorch Image Models", 2019) as backbones: `timm:NAME`, for all with `features_only`.

timm is optional, and imported when one is asked for. How a network of timm is to be built so that it takes images of
any size is found by trying, on the meta device, where that takes neither memory nor arithmetic.
"""

import contextlib
import difflib
import functools
import itertools
import json
import textwrap
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from utils.common.compat import CheckedConvolutions
from utils.common.messages import logger
from utils.ops.normalization import Normalization
from utils.ops.upsampling import upsample

PREFIX = "timm:"
# All that may be passed on to timm, which else would take names of files and addresses: snapshots come from strangers.
ARGUMENTS = {
    "output_stride": lambda value: type(value) is int and value in (8, 16, 32),
    "dynamic_img_size": lambda value: value is True,
    "strict_img_size": lambda value: value is False,
    "feature_location": lambda value: value == "",
    "out_indices": lambda value: isinstance(value, list) and all(type(i) is int and 0 <= i < 1000 for i in value),
}
# HRNet's maps of all strides, without the convolutions that widen them for classification.
BRANCHES = {"feature_location": "", "out_indices": [1, 2, 3, 4]}


@dataclass(frozen=True)
class Plan:
    """How to build and call a network of timm.

    Attributes:
        arguments: of `timm.create_model`.
        channels, reductions: of each map that is used, the last two or, to be joined, all; pixels of the image to a
            place of the map.
        multiple: sides of images are padded to multiples of this.
        tiles: whether the image is cut into patches side by side; else places of maps lie on the pixels 0, r, 2r, ...
        last: whether channels are the last axis.
        unused: names of parameters that no map depends on.
    """

    arguments: dict
    channels: tuple
    reductions: tuple
    multiple: int
    tiles: bool
    last: bool
    unused: tuple

    @property
    def joined(self):
        """Whether the maps are joined to one, at the finest stride."""
        return _joined(self.arguments)

    @property
    def stride(self):
        """Of the logits, in pixels."""
        return self.reductions[0 if self.joined else -1]

    @property
    def grid(self):
        """(step, rest): of images whose sides are a multiple of step, plus rest, the places of maps lie on the pixels
        they stand for as well as can be. `multiple` may ask for padding all the same."""
        return max(self.reductions), 0 if self.tiles else 1


class TimmBackbone(nn.Module):
    """A network of timm that gives feature maps of images of any size.

    Output stride 8 where the network can, else its own. The maps of HRNet are joined at the finest stride, 4, as its
    authors do for segmentation (Wang et al., TPAMI 2020, HRNetV2). Plain transformers give the map after the last block
    and the one after two thirds of them.

    Sides that a network cannot take are padded with zeros, the mean color, on the right and below. Logits are
    upsampled with aligned corners everywhere: exact for a network whose maps lie on the pixels 0, r, 2r, ...; of one
    that cuts the image into patches the outermost places stand for the middle of a patch, and land on the border, up
    to half a patch away.

    Args:
        backbone: `timm:NAME`, an architecture of timm, with or without the tag of its weights.
        arguments: plain keyword arguments of `timm.create_model` (`ARGUMENTS`); None to find them.

    Attributes:
        arguments: those found or given.
        channels: of each map.
        stride, grid: as in `Plan`.

    Raises ValueError naming the backbone where timm is missing, does not know it, or it does not take any size.
    """

    def __init__(self, backbone, arguments=None):
        super().__init__()
        plan = find_plan(backbone, arguments)
        self.plan, self.arguments, self.stride, self.grid = plan, plan.arguments, plan.stride, plan.grid
        self.channels = [sum(plan.channels)] * 2 if plan.joined else list(plan.channels)
        self.body = _create(backbone, plan.arguments)
        for name in plan.unused:        # processes that share a batch would wait for their gradients
            self.body.get_parameter(name).requires_grad_(False)

    def forward(self, images):
        """images (B, 3, H, W) → two maps (B, channels[i], ceil(H / r), ceil(W / r)), one as stage 3 of a residual
        network, the other as stage 4, whose r is `stride`."""
        height, width = images.shape[2:]        # numbers above 0 below: ONNX divides others in another way
        maps = [one[..., :(height + r - 1) // r, :(width + r - 1) // r]
                for one, r in zip(_maps(self.body, images, self.plan), self.plan.reductions, strict=True)]
        if not self.plan.joined:
            return maps
        finest = maps[0].shape[-2:]
        joined = torch.cat([maps[0], *(upsample(one, finest).to(one.dtype) for one in maps[1:])], 1)
        return [joined, joined]

    def first_stages(self, names):
        """None: which modules are a network's stages is not known. Raises ValueError for any name."""
        if names:
            raise ValueError(f"stages: expected none with a backbone of timm, whose stages are not known here, found "
                             f"{','.join(map(str, names))}")
        return []


def _maps(body, images, plan):
    """The maps that are used, of padded images (B, 3, H, W)."""
    height, width = images.shape[-2:]
    if plan.multiple > 1:
        images = F.pad(images, (0, -width % plan.multiple, 0, -height % plan.multiple))
    maps = body(images)[-len(plan.reductions):]
    return [one.permute(0, 3, 1, 2) for one in maps] if plan.last else maps


def find_plan(backbone, arguments=None):
    """`Plan` of a backbone; arguments: instead of those that are found. Raises ValueError as `TimmBackbone` does."""
    name, timm = backbone.removeprefix(PREFIX), _timm(backbone)
    architecture = name.split(".")[0]
    if architecture not in timm.list_models() or name != architecture and name not in timm.list_pretrained():
        close = difflib.get_close_matches(name, timm.list_models(), 3)
        raise ValueError(f"backbone {backbone}: expected a network of timm {timm.__version__}"
                         f"{', such as ' * bool(close)}{', '.join(close)}, found none of this name")
    if arguments is not None and not (isinstance(arguments, dict) and all(
            key in ARGUMENTS and ARGUMENTS[key](value) for key, value in arguments.items())):
        raise ValueError(f"backbone_arguments: expected a dict of {', '.join(ARGUMENTS)}, found {arguments!r:.80}")
    return _find_plan(backbone, json.dumps(arguments))


def _timm(backbone):
    try:
        import timm
    except ImportError:
        raise ValueError(f"backbone {backbone}: expected the package timm, which has it, found none; pip install timm"
                         ) from None
    return timm


@functools.lru_cache
def _find_plan(backbone, arguments):
    """`find_plan` of what it has looked at; arguments: as JSON, so that they can be remembered."""
    found = ""
    if backbone.startswith(f"{PREFIX}mvitv2"):      # passes without values do not show that it looks beyond its tables
        candidates, found = [], "its tables of relative positions are for 224×224 pixels"
    elif (given := json.loads(arguments)) is not None:
        candidates = [given]
    elif backbone.startswith(f"{PREFIX}hrnet"):
        candidates = [BRANCHES]
    else:
        candidates = [stride | size for stride in ({"output_stride": 8}, {}) for size in
                      ({}, {"strict_img_size": False}, {"dynamic_img_size": True})]
    for candidate in candidates:
        for device in ("meta", "cpu"):
            try:
                plan = _try(backbone, candidate, device)
            except Exception as error:  # noqa: BLE001, timm's own kinds of error for what a network cannot do
                if candidate in ({}, *candidates[:1]):      # the others refuse arguments they do not know
                    found = textwrap.shorten(f"{type(error).__name__} {error}".splitlines()[0], 160, placeholder=" ...")
                if isinstance(error, NotImplementedError) or "meta" in str(error).lower():
                    continue        # what has no values cannot be asked for one
                break
            if "output_stride" not in candidate or given is not None or plan.reductions[-1] == 8:
                return plan
            break
    raise ValueError(f"backbone {backbone}: expected a network that takes images of any size, found one that does not: "
                     f"{found}")


def _try(backbone, arguments, device):
    """`Plan` with these arguments, proven by passes over several sizes; any kind of error where they do not do."""
    with torch.device(device), torch.random.fork_rng(devices=[]):
        body = _create(backbone, arguments).eval()
        every = [entry["reduction"] for entry in body.feature_info.info]
        if len(set(every)) == 1 and "out_indices" not in arguments:     # a plain transformer, an entry a block
            arguments = arguments | {"out_indices": [len(every) * 2 // 3 - 1, len(every) - 1]}
            body = _create(backbone, arguments).eval()
        used = slice(None) if _joined(arguments) else slice(-2, None)
        channels, reductions = (tuple(found())[used] for found in (body.feature_info.channels,
                                                                   body.feature_info.reduction))
        if len(channels) < 2:
            raise ValueError(f"{len(channels)} feature map")
        step, error = max(reductions), None
        for multiple, last in itertools.product((1, step, 2 * step), (False, True)):
            plan = Plan(arguments, channels, reductions, multiple, _tiles(body), last, ())
            try:
                maps, *_ = [_check_maps(body, plan, size) for size in (
                    (4 * step + 1, 6 * step + 5), (3 * step, 5 * step), (1, 1))]
            except Exception as attempt_error:  # noqa: BLE001, timm's own kinds of error
                error = attempt_error
                continue
            return replace(plan, unused=_unused(body, maps))
        raise error


def _joined(arguments):
    return arguments.get("feature_location") == ""


def _check_maps(body, plan, size):
    """Maps of an image (height, width). Raises ValueError where their sizes do not follow the image's: some networks
    squeeze every image into one size."""
    with CheckedConvolutions():
        maps = _maps(body, torch.zeros(1, 3, *size), plan)
    padded = [side + -side % plan.multiple for side in size]
    expected = [(1, count, *(-(-side // r) for side in padded))
                for count, r in zip(plan.channels, plan.reductions, strict=True)]
    if [tuple(one.shape) for one in maps] != expected:
        raise ValueError("maps of other sizes than timm says")
    return maps


def _tiles(body):
    """Whether a network begins by cutting the image into patches that do not overlap."""
    for module in body.modules():
        if isinstance(module, nn.Conv2d) and module.in_channels == 3:
            return module.stride[0] > 1 and module.kernel_size[0] <= module.stride[0]
    return True     # taken apart without a convolution


def _unused(body, maps):
    sum(one.sum() for one in maps).backward()
    return tuple(name for name, parameter in body.named_parameters() if parameter.grad is None)


def _create(backbone, arguments, **options):
    import timm

    def create():
        return timm.create_model(backbone.removeprefix(PREFIX), features_only=True, **arguments, **options)

    try:
        return create()
    except (NotImplementedError, RuntimeError):
        if not torch.empty(0).is_meta:
            raise
        with torch.device("cpu"):       # constructors of older versions ask tensors for their values
            return create().to("meta")


def _config(backbone):
    """What timm knows of the weights of this name: `PretrainedCfg`, or None."""
    return _timm(backbone).get_pretrained_cfg(backbone.removeprefix(PREFIX))


def input_normalization(backbone):
    """`Normalization` of the images that timm's weights of this name were trained on."""
    cfg = _config(backbone)
    if cfg is None:
        return Normalization()
    return Normalization("RGB", *(tuple(round(255 * value, 4) for value in values) for values in (cfg.mean, cfg.std)))


def read_state(backbone, arguments, state=None):
    """Weights as timm reads them: (tensors by the names of `TimmBackbone`, others that the source has, by its names).

    state: what a file of timm holds, names → tensors; None for the weights that timm has for this name, from its cache
    or the network. Tensors which the source lacks are left out. Raises whatever timm and the network raise.
    """
    from timm.models import clean_state_dict

    overlay = {} if state is None else {"pretrained_cfg_overlay": {"state_dict": dict(clean_state_dict(state))}}
    with _record_loading() as loads:
        body = _create(backbone, arguments, pretrained=True, **overlay)
    kept = body.state_dict(keep_vars=True)
    missing, others = set(), {}
    for tensors, given, result in loads:
        missing |= {id(tensors[name]) for name in result.missing_keys if name in tensors}
        here = {id(tensor) for tensor in kept.values()}
        others |= {name: value for name, value in given.items() if id(tensors.get(name)) not in here}
    others |= {name: value for name, value in (state or {}).items() if name.startswith(_classifiers(backbone))}
    return {f"body.{name}": tensor.detach() for name, tensor in kept.items() if id(tensor) not in missing}, others


def _classifiers(backbone):
    """How the names of tensors begin that timm takes out of a file before it loads the rest."""
    names = getattr(_config(backbone), "classifier", None) or ()
    return tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))


@contextlib.contextmanager
def _record_loading():
    """Inside, what `load_state_dict` does is noted: (the module's tensors by name, those given, what it returned).

    timm loads into the whole network, says what was missing only in its log, and cuts the network down afterward.
    """
    loads, load = [], nn.Module.load_state_dict

    def note(module, state, *args, **options):
        given = dict(state)
        result = load(module, state, *args, **options)
        loads.append((module.state_dict(keep_vars=True), given, result))
        return result

    nn.Module.load_state_dict = note
    try:
        yield loads
    finally:
        nn.Module.load_state_dict = load


def share_statistics(network, devices, processes):
    """Let the batch norms of a network's backbone see the whole batch, as those of our own do, or say that they do not.

    Networks of timm alone have such. devices: of this process; processes: `Processes` that share the batch, or None.
    """
    norms = sum(isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in network.backbone.modules())
    if not norms or processes is None and len(devices) == 1:
        return
    if processes is not None and devices[0].type == "cuda":     # PyTorch synchronizes on GPUs alone, one per process
        from timm.layers import convert_sync_batchnorm

        network.backbone.body = convert_sync_batchnorm(network.backbone.body)
    else:
        logger.info(f"{norms} batch norms of the backbone see the share of a device alone: those of timm are "
                    "synchronized among processes on GPUs only; small shares make their statistics noisy")
