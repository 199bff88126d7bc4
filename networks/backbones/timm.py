"""Networks of timm (Wightman, "PyTorch Image Models", 2019) as backbones: `timm:NAME`, if they support `features_only`.

timm is optional, and is imported only for such a backbone. The arguments with which a network of timm takes images of
any size are determined by trials on the meta device, which need neither memory nor computation.
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
from utils.common.errors import UserError
from utils.common.messages import logger
from utils.ops.normalization import Normalization
from utils.ops.upsampling import upsample

PREFIX = "timm:"
# The only arguments and values that are passed on to timm. It would also accept file names and URLs, and a snapshot may
# come from an untrusted source.
ARGUMENTS = {
    "output_stride": lambda value: type(value) is int and value in (8, 16, 32),
    "dynamic_img_size": lambda value: value is True,
    "strict_img_size": lambda value: value is False,
    "feature_location": lambda value: value == "",
    "out_indices": lambda value: isinstance(value, list) and all(type(i) is int and 0 <= i < 1000 for i in value),
}
# Feature maps of HRNet at all strides, without the convolutions that widen them for classification.
BRANCHES = {"feature_location": "", "out_indices": [1, 2, 3, 4]}


@dataclass(frozen=True)
class Plan:
    """How to build and call a network of timm.

    Attributes:
        arguments: keyword arguments of `timm.create_model`.
        channels: number of channels of each feature map in use: the last two, or all if they are joined.
        reductions: stride of each feature map in use, in pixels of the image.
        multiple: image sides are padded to multiples of this, in pixels.
        patches: whether the network cuts the image into adjacent patches; otherwise the positions of a map with stride
            r correspond to the pixels 0, r, 2r, ...
        channels_last: whether channels are the last axis of the maps.
        unused: names of parameters that no feature map depends on.
    """

    arguments: dict
    channels: tuple
    reductions: tuple
    multiple: int
    patches: bool
    channels_last: bool
    unused: tuple

    @property
    def joined(self):
        """Whether all maps are joined to a single one, at the finest stride."""
        return _joined(self.arguments)

    @property
    def stride(self):
        """Stride of the logits, in pixels."""
        return self.reductions[0 if self.joined else -1]

    @property
    def grid(self):
        """(step, rest): for image sides of k · step + rest, maps align with the image as well as possible.

        `multiple` may require padding even then.
        """
        return max(self.reductions), 0 if self.patches else 1


class TimmBackbone(nn.Module):
    """A network of timm that computes feature maps of images of any size.

    The output stride is 8 if the network supports it, else its own. The maps of HRNet are joined at the finest stride,
    4, as its authors do for segmentation (Wang et al., TPAMI 2020, HRNetV2). A plain transformer provides the map after
    its last block and the map after two thirds of its blocks.

    Images with sides that a network does not accept are padded with zeros, the mean color, on the right and at the
    bottom. Logits of all backbones are upsampled with aligned corners. This is exact for a network whose maps
    correspond to the pixels 0, r, 2r, ... In a network that cuts the image into patches, the outermost positions
    represent the center of a patch but are placed on the border, up to half a patch away.

    Args:
        backbone: `timm:NAME`, an architecture of timm, with or without the tag of its weights.
        arguments: keyword arguments of `timm.create_model`, of `ARGUMENTS`; None to determine them.

    Attributes:
        arguments: the given or determined keyword arguments.
        channels: number of channels of each map.
        stride, grid: as in `Plan`.

    Raises:
        ValueError: if timm is not installed or does not know the backbone, or if the backbone does not take images of
            any size; the message names the backbone.
    """

    def __init__(self, backbone, arguments=None):
        super().__init__()
        plan = find_plan(backbone, arguments)
        self.plan, self.arguments, self.stride, self.grid = plan, plan.arguments, plan.stride, plan.grid
        self.channels = [sum(plan.channels)] * 2 if plan.joined else list(plan.channels)
        self.name, self.body = backbone, _create(backbone, plan.arguments)
        for name in plan.unused:        # DistributedDataParallel would wait for their gradients
            self.body.get_parameter(name).requires_grad_(False)

    def forward(self, images):
        """Map images (B, 3, H, W) to two feature maps, which replace stages 3 and 4 of a residual network.

        Returns:
            Maps (B, channels[i], ceil(H / r), ceil(W / r)) with the stride r of each; the last r is `stride`.
        """
        height, width = images.shape[2:]
        # The ceiling is written with non-negative numbers: ONNX rounds quotients of negative numbers differently.
        maps = [feature_map[..., :(height + r - 1) // r, :(width + r - 1) // r] for feature_map, r in
                zip(_feature_maps(self.body, images, self.plan), self.plan.reductions, strict=True)]
        if not self.plan.joined:
            return maps
        finest = maps[0].shape[-2:]
        upsampled = (upsample(feature_map, finest).to(feature_map.dtype) for feature_map in maps[1:])
        joined = torch.cat([maps[0], *upsampled], 1)
        return [joined, joined]

    def layers_to_head(self):
        """Return the number of layers from each parameter to the head, in timm's own grouping; 1 for the last layer."""
        layers = find_layers(self.name)
        return [layers[_flat_name(name)] for name, _ in self.body.named_parameters()]

    def first_stages(self, names):
        """Return no modules: the stages of networks of timm are unknown. Raise ValueError if there are names."""
        if names:
            raise ValueError(f"stages: expected no names with a backbone of timm, whose stages are unknown, found "
                             f"{','.join(map(str, names))}")
        return []


@functools.lru_cache
def find_layers(backbone):
    """Count the layers from each parameter to the classifier, grouped as by `timm.optim.param_groups_layer_decay`.

    Returns:
        {`_flat_name` of the parameter: number of layers}.

    Raises:
        UserError: if timm does not group the layers of this network.
    """
    from timm.models import group_parameters

    with torch.device("meta"):
        network = _create(backbone, {}, features_only=False, num_classes=1)
    if not hasattr(network, "group_matcher"):
        raise UserError(f"--layer-decay: expected a network whose layers timm groups, found {backbone}")
    layers = group_parameters(network, network.group_matcher(coarse=False), reverse=True)
    return {_flat_name(name): max(layers.values()) - layer for name, layer in layers.items()}


def _flat_name(name):
    """Name of a parameter, the same with `features_only`, for which timm wraps networks or flattens their names."""
    return name.removeprefix("model.").replace(".", "_")


def _feature_maps(body, images, plan):
    """Pad images (B, 3, H, W), and compute the feature maps in use, with channels as the second axis."""
    height, width = images.shape[-2:]
    if plan.multiple > 1:
        images = F.pad(images, (0, -width % plan.multiple, 0, -height % plan.multiple))
    maps = body(images)[-len(plan.reductions):]
    return [feature_map.permute(0, 3, 1, 2) for feature_map in maps] if plan.channels_last else maps


def find_plan(backbone, arguments=None):
    """Find the `Plan` of a backbone; arguments and errors as in `TimmBackbone`."""
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
    """Import timm; raise ValueError naming the backbone if it is not installed."""
    try:
        import timm
    except ImportError:
        raise ValueError(f"backbone {backbone}: expected the package timm, which provides it, found none; pip install "
                         "timm") from None
    return timm


@functools.lru_cache
def _find_plan(backbone, arguments):
    """Implement `find_plan` for checked arguments, given as JSON because a cache needs hashable values."""
    reason = ""
    if backbone.startswith(f"{PREFIX}mvitv2"):      # on the meta device, reading beyond its tables raises no error
        candidates, reason = [], "its tables of relative positions are for 224×224 pixels"
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
                plan = _make_plan(backbone, candidate, device)
            except Exception as error:  # noqa: BLE001, networks of timm raise many types for what they do not support
                # Errors of other candidates may only say that the network does not know their arguments.
                if candidate in ({}, *candidates[:1]):
                    reason = textwrap.shorten(f"{type(error).__name__} {error}".splitlines()[0], 160,
                                              placeholder=" ...")
                if isinstance(error, NotImplementedError) or "meta" in str(error).lower():
                    continue        # the network needs the values of tensors: try again on the CPU
                break
            if "output_stride" not in candidate or given is not None or plan.reductions[-1] == 8:
                return plan
            break
    raise ValueError(f"backbone {backbone}: expected a network that takes images of any size, found one that does not: "
                     f"{reason}")


def _make_plan(backbone, arguments, device):
    """Make the `Plan` with these arguments, and check it by forward passes of several image sizes.

    Raises:
        Exception: of any type, if the network does not work with these arguments.
    """
    with torch.device(device), torch.random.fork_rng(devices=[]):
        body = _create(backbone, arguments).eval()
        every = [entry["reduction"] for entry in body.feature_info.info]
        if len(set(every)) == 1 and "out_indices" not in arguments:     # a plain transformer, with an entry per block
            arguments = arguments | {"out_indices": [len(every) * 2 // 3 - 1, len(every) - 1]}
            body = _create(backbone, arguments).eval()
        used = slice(None) if _joined(arguments) else slice(-2, None)
        channels, reductions = tuple(body.feature_info.channels())[used], tuple(body.feature_info.reduction())[used]
        if len(channels) < 2:
            raise ValueError(f"{len(channels)} feature map")
        step, error = max(reductions), None
        for multiple, channels_last in itertools.product((1, step, 2 * step), (False, True)):
            plan = Plan(arguments, channels, reductions=reductions, multiple=multiple, patches=_cuts_patches(body),
                        channels_last=channels_last, unused=())
            try:
                maps, *_ = [_check_maps(body, plan, size) for size in (
                    (4 * step + 1, 6 * step + 5), (3 * step, 5 * step), (1, 1))]
            except Exception as attempt_error:  # noqa: BLE001, networks of timm raise many types
                error = attempt_error
                continue
            return replace(plan, unused=_unused_parameters(body, maps))
        raise error


def _joined(arguments):
    return arguments.get("feature_location") == ""


def _check_maps(body, plan, size):
    """Compute the feature maps of an image of size (height, width), and check their shapes.

    Raises:
        ValueError: if their sizes do not follow from the image size, as some networks resize every image.
    """
    with CheckedConvolutions():
        maps = _feature_maps(body, torch.zeros(1, 3, *size), plan)
    padded = [side + -side % plan.multiple for side in size]
    expected = [(1, count, *(-(-side // r) for side in padded))
                for count, r in zip(plan.channels, plan.reductions, strict=True)]
    if [tuple(feature_map.shape) for feature_map in maps] != expected:
        raise ValueError("maps of other sizes than timm says")
    return maps


def _cuts_patches(body):
    """Whether the first layer cuts the image into patches that do not overlap."""
    for module in body.modules():
        if isinstance(module, nn.Conv2d) and module.in_channels == 3:
            return module.stride[0] > 1 and module.kernel_size[0] <= module.stride[0]
    return True     # no convolution reads the image: it is cut by reshaping


def _unused_parameters(body, maps):
    """Names of the parameters that no feature map depends on."""
    sum(feature_map.sum() for feature_map in maps).backward()
    return tuple(name for name, parameter in body.named_parameters() if parameter.grad is None)


def _create(backbone, arguments, **options):
    """Build the network of timm, by default with `features_only`; options: arguments of `timm.create_model`."""
    import timm

    def create():
        return timm.create_model(backbone.removeprefix(PREFIX), **{"features_only": True} | arguments | options)

    try:
        return create()
    except (NotImplementedError, RuntimeError):
        if not torch.empty(0).is_meta:
            raise
        with torch.device("cpu"):       # constructors of older versions of timm read the values of tensors
            return create().to("meta")


def _config(backbone):
    """Return timm's description of the pretrained weights of this name, a `PretrainedCfg`, or None."""
    return _timm(backbone).get_pretrained_cfg(backbone.removeprefix(PREFIX))


def input_normalization(backbone):
    """Return the `Normalization` of the images that timm's weights of this name were trained on."""
    cfg = _config(backbone)
    if cfg is None:
        return Normalization()
    return Normalization("RGB", *(tuple(round(255 * value, 4) for value in values) for values in (cfg.mean, cfg.std)))


def read_state(backbone, arguments, state=None):
    """Read weights by timm, which renames and reshapes them.

    Args:
        backbone: `timm:NAME`.
        arguments: keyword arguments of `timm.create_model`.
        state: content of a file of timm, names → tensors; None for the weights that timm has for this name, from its
            cache or the internet.

    Returns:
        (tensors with the names of `TimmBackbone`, without those missing in the source; the other tensors of the source,
        with their names there).

    Raises:
        Exception: any exception of timm or of the download.
    """
    from timm.models import clean_state_dict

    overlay = {} if state is None else {"pretrained_cfg_overlay": {"state_dict": dict(clean_state_dict(state))}}
    with _record_loading() as loads:
        body = _create(backbone, arguments, pretrained=True, **overlay)
    kept = body.state_dict(keep_vars=True)
    kept_ids = {id(tensor) for tensor in kept.values()}
    missing, others = set(), {}
    for tensors, source, result in loads:
        missing |= {id(tensors[name]) for name in result.missing_keys if name in tensors}
        others |= {name: value for name, value in source.items() if id(tensors.get(name)) not in kept_ids}
    others |= {name: value for name, value in (state or {}).items() if name.startswith(_classifiers(backbone))}
    return {f"body.{name}": tensor.detach() for name, tensor in kept.items() if id(tensor) not in missing}, others


def _classifiers(backbone):
    """Prefixes of the classifier's tensors, which timm removes from a file before it loads the others."""
    names = getattr(_config(backbone), "classifier", None) or ()
    return tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))


@contextlib.contextmanager
def _record_loading():
    """Context that records calls of `load_state_dict`.

    Needed because timm loads weights into the complete network, reports missing tensors only in its log, and removes
    unused layers afterward.

    Yields:
        list of (the module's tensors by name, the tensors passed to it by name, the result of the call).
    """
    loads, load = [], nn.Module.load_state_dict

    def record(module, state, *args, **options):
        source = dict(state)
        result = load(module, state, *args, **options)
        loads.append((module.state_dict(keep_vars=True), source, result))
        return result

    nn.Module.load_state_dict = record
    try:
        yield loads
    finally:
        nn.Module.load_state_dict = load


def synchronize_norms(network, devices, processes):
    """Synchronize the batch norms of a timm backbone over the whole batch, or log that this is not possible.

    Other backbones have only norms of `libs.abn`, which synchronize themselves.

    Args:
        network: a network of `build_network`; changed in place.
        devices: devices of this process.
        processes: `Processes` that share the batch, or None.
    """
    norms = sum(isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in network.backbone.modules())
    if not norms or processes is None and len(devices) == 1:
        return
    if processes is not None and devices[0].type == "cuda":     # SyncBatchNorm needs one GPU per process
        from timm.layers import convert_sync_batchnorm

        network.backbone.body = convert_sync_batchnorm(network.backbone.body)
    else:
        logger.info(f"{norms} batch norms of the backbone compute statistics for each device separately: norms of timm "
                    "are synchronized only among processes on GPUs; few images per device make the statistics noisy")
