"""Backbones by name: the residual networks of this package, and networks of timm.

`find_backbone` returns a `ResidualNetwork` or a `TimmNetwork`; both have the same methods.
"""

import contextlib
import re
from dataclasses import dataclass
from functools import partial

from torch import nn

from libs.abn import NORMS
from utils.common.errors import UserError
from utils.ops.normalization import Normalization

from . import timm
from .eca import ECA
from .resnet import RECOMPUTE, STAGES, BasicBlock, Bottleneck, ResNet
from .timm import PREFIX, TimmBackbone, find_plan

STEMS = {"7x7": None, "64-64-128": (64, 64, 128), "32-32-64": (32, 32, 64)}
ACTIVATIONS = {"leaky_relu": partial(nn.LeakyReLU, 0.01, inplace=True), "relu": partial(nn.ReLU, inplace=True)}


@dataclass(frozen=True)
class ResidualNetwork:
    """A residual network of this package.

    Attributes:
        name: a key of `BACKBONES`.
        block: `BasicBlock` or `Bottleneck`.
        depths: number of blocks of stages 1 to 4.
        eca_kernels: kernel sizes of the channel attention in stages 1 to 4, as ECANet released them; None without
            attention.
        weights_by_timm: whether timm reads the files of weights, and has pretrained weights for the name.
        traced: whether the export to ONNX traces a forward pass.
    """

    name: str
    block: type
    depths: tuple
    eca_kernels: tuple | None = None

    weights_by_timm = False
    traced = False

    def build(self, *, norm, activation, stem, average_downsample, eca_kernels, output_stride, recompute,
              backbone_arguments, multi_grid):
        """Build the `ResNet`; arguments and errors as in `build_backbone`."""
        check_argument(backbone_arguments is None, "backbone_arguments", backbone_arguments,
                       f"no value with {self.name}")
        for name, value, choices in (("norm", norm, NORMS), ("activation", activation, ACTIVATIONS),
                                     ("stem", stem, STEMS)):
            check_argument(isinstance(value, str) and value in choices, name, value, f"one of {', '.join(choices)}")
        check_argument(isinstance(average_downsample, bool), "average_downsample", average_downsample, "true or false")
        if activation == "relu" and norm != "bn":
            raise ValueError("activation relu: expected norm bn, found "
                             f"{norm}: an in-place norm cannot recover its input from a ReLU's output")
        if eca_kernels is not None:
            check_argument(self.eca_kernels is not None, "eca_kernels", eca_kernels,
                           f"no value with {self.name}, which has no channel attention")
            check_argument(isinstance(eca_kernels, list | tuple) and len(eca_kernels) == 4 and all(
                type(k) is int and k > 0 and k % 2 for k in eca_kernels), "eca_kernels", eca_kernels,
                "four odd numbers")
        if multi_grid is not None:
            last = self.depths[-1]
            check_argument(isinstance(multi_grid, list | tuple) and len(multi_grid) == last and all(
                type(factor) is int and factor > 0 for factor in multi_grid), "multi_grid", multi_grid,
                f"a whole number above 0 for each of the {last} blocks of the last stage")
        kernels = eca_kernels or self.eca_kernels
        attention = None if kernels is None else lambda channels, stage: ECA(kernels[stage])
        return ResNet(self.block, self.depths, norm=norm_maker(norm, activation), activation=ACTIVATIONS[activation],
                      attention=attention, stem_widths=STEMS[stem], average_downsample=average_downsample,
                      output_stride=output_stride, recompute=recompute, multi_grid=multi_grid)

    def recompute_choices(self):
        """Values of `recompute` that the network supports, by growing savings: `light` needs bottlenecks."""
        return [kind for kind in RECOMPUTE if kind != "light" or self.block is Bottleneck]

    def check_training(self, *, recompute, freeze, layer_decay=None):
        """Raise `UserError` if the network cannot be trained with these values of the flags."""
        if layer_decay is not None:
            raise UserError(f"--layer-decay: expected a network of timm, {PREFIX}NAME, found {self.name}")
        if freeze != STAGES[:len(freeze)]:
            raise UserError(f"--freeze {','.join(freeze)}: expected stages from {','.join(STAGES)} that begin with "
                            "stem and leave none out, such as stem,1,2")
        if recompute not in self.recompute_choices():
            raise UserError(f"--recompute {recompute}: expected a backbone of at least 50 layers, found {self.name}, "
                            "where it would save nothing; use --recompute full")

    def normalization(self):
        """Input normalization of pretrained weights, unless their file implies another one."""
        return Normalization()

    def grid(self, arguments):
        """(step, rest): image sides of k · step + rest need no padding; arguments: of `build_network`."""
        return arguments.get("output_stride", 8), 1

    def head_channels(self, channels):
        """Return the numbers of channels of context and head, and of stage 3 as the auxiliary head counts them.

        The first is 512 for a ResNet-101, as in the paper, and 128 for a ResNet-18. `Model.aux_share` is a fraction of
        the second.

        Args:
            channels: number of channels of each feature map of the backbone.
        """
        return channels[-1] // 4, channels[-2]

    def choose_arguments(self, structure, flags, source, output_stride):
        """Choose the arguments of `build_network`: the values of flags, and for the others those of a file.

        Args:
            structure: `Weights.structure` of the file; empty without a file.
            flags: values of the flags "stem", "downsample" and "eca-kernels"; None for those that are not given.
            source: name of the file.
            output_stride: 8 or 16, whatever the file has; None for that of the file.

        Returns:
            dict of arguments of `build_network`; without `output_stride` if it is 8.

        Raises:
            UserError: if the file is of another network, or a flag contradicts it.
        """
        defaults = {"stem": "7x7", "downsample": "strided", "eca-kernels": None}
        if structure:
            file_backbone = structure["backbone"]
            # Attention that the file lacks starts at a state in which it changes nothing (`load_weights`).
            if self.name not in (file_backbone, f"eca_{file_backbone}"):
                raise UserError(f"--backbone {self.name}: expected one of {', '.join(BACKBONES)} that fits {source}, "
                                f"found {file_backbone} there")
            defaults = {"stem": structure["stem"],
                        "downsample": "average" if structure["average_downsample"] else "strided",
                        "eca-kernels": structure["eca_kernels"]}
            for flag, value in flags.items():
                if None not in (value, defaults[flag]) and value != defaults[flag]:
                    raise UserError(f"--{flag} {value}: expected the value of {source}, found {defaults[flag]} there")
            if defaults["stem"] not in STEMS:
                raise UserError(f"{source}: expected a stem of {', '.join(STEMS)}, found {defaults['stem']}")
        if flags["eca-kernels"] and self.eca_kernels is None:
            raise UserError(f"--eca-kernels: expected a --backbone with channel attention, found {self.name}")
        chosen = {name: defaults[name] if flags[name] is None else flags[name] for name in flags}
        kernels = chosen["eca-kernels"] or self.eca_kernels
        stride = output_stride or structure.get("output_stride", 8)
        return {"backbone": self.name, "stem": chosen["stem"],
                "average_downsample": chosen["downsample"] == "average", "eca_kernels": kernels and list(kernels),
                **({"output_stride": stride} if stride != 8 else {})}

    def structure(self, arguments, state):
        """Return the `Weights.structure` of a network.

        Args:
            arguments: arguments of `build_network`.
            state: state dict of the backbone.
        """
        return read_structure(state) | {"output_stride": arguments.get("output_stride", 8)}

    def describe(self, arguments):
        """Describe the network, apart from its name, in a few words; arguments: of `build_network`."""
        return (f"stem {arguments['stem']}, {'average' if arguments['average_downsample'] else 'strided'} "
                f"downsampling, output stride {arguments.get('output_stride', 8)}")


@dataclass(frozen=True)
class TimmNetwork:
    """A network of timm, whether or not timm has one of this name. Methods as in `ResidualNetwork`.

    Attributes:
        name: `timm:NAME`.
        weights_by_timm, traced: as in `ResidualNetwork`.
    """

    name: str

    weights_by_timm = True
    traced = True

    def build(self, *, norm, activation, backbone_arguments, **options):
        """Build the `TimmBackbone`; the other options, of a `ResNet`, must have their defaults."""
        defaults = {"stem": "7x7", "average_downsample": False, "eca_kernels": None, "output_stride": 8,
                    "recompute": "none", "multi_grid": None}
        for option, value in options.items():
            check_argument(value == defaults[option], option, value, f"{defaults[option]} with {self.name}")
        return TimmBackbone(self.name, backbone_arguments)

    def recompute_choices(self):
        return ["none"]

    def check_training(self, *, recompute, freeze, layer_decay=None):
        if layer_decay is not None:
            timm.find_layers(self.name)
        for flag, value in (("recompute", recompute.replace("none", "")), ("freeze", ",".join(freeze))):
            if value:
                raise UserError(f"--{flag} {value}: expected a residual network of this package, whose stages are "
                                f"known, found {self.name}")

    def normalization(self):
        return timm.input_normalization(self.name)

    def grid(self, arguments):
        return find_plan(self.name, arguments["backbone_arguments"]).grid

    def head_channels(self, channels):
        """As for a ResNet-101: networks of timm have very different widths, which are no guide to the head's width."""
        return 512, 1024

    def choose_arguments(self, structure, flags, source, output_stride):
        if structure and structure["backbone"] != self.name:
            raise UserError(f"--backbone {self.name}: expected the backbone of {source}, found "
                            f"{structure['backbone']} there")
        for flag, value in flags.items():
            if value is not None:
                raise UserError(f"--{flag}: expected no such flag with {self.name}, whose structure timm defines, "
                                f"found {value}")
        try:
            plan = find_plan(self.name, structure.get("backbone_arguments"))
        except ValueError as error:
            raise UserError(f"--{error}") from None
        if output_stride not in (None, plan.stride):
            with contextlib.suppress(ValueError):       # for a network without this argument of timm
                plan = find_plan(self.name, plan.arguments | {"output_stride": output_stride})
            if plan.stride != output_stride:
                raise UserError(f"--output-stride {output_stride}: expected a network that can have it, found "
                                f"{self.name} with output stride {plan.stride} only")
        return {"backbone": self.name, "backbone_arguments": plan.arguments}

    def structure(self, arguments, state):
        return {"backbone": self.name, "backbone_arguments": arguments.get("backbone_arguments")}

    def describe(self, arguments):
        plan = find_plan(self.name, arguments["backbone_arguments"])
        only = "output_stride" not in plan.arguments and plan.stride != 8
        return f"output stride {plan.stride}{', the only one it has' * only}"


BACKBONE = "eca_resnet101"      # the default
# The names of the files that ECANet released contain the kernel sizes: 18 k3577, 50 k3557, others k3357.
BACKBONES = {network.name: network for network in (
    ResidualNetwork("eca_resnet18", BasicBlock, (2, 2, 2, 2), (3, 5, 7, 7)),
    ResidualNetwork("eca_resnet34", BasicBlock, (3, 4, 6, 3), (3, 3, 5, 7)),
    ResidualNetwork("eca_resnet50", Bottleneck, (3, 4, 6, 3), (3, 5, 5, 7)),
    ResidualNetwork("eca_resnet101", Bottleneck, (3, 4, 23, 3), (3, 3, 5, 7)),
    ResidualNetwork("eca_resnet152", Bottleneck, (3, 8, 36, 3), (3, 3, 5, 7)),
    ResidualNetwork("resnet18", BasicBlock, (2, 2, 2, 2)),
    ResidualNetwork("resnet34", BasicBlock, (3, 4, 6, 3)),
    ResidualNetwork("resnet50", Bottleneck, (3, 4, 6, 3)),
    ResidualNetwork("resnet101", Bottleneck, (3, 4, 23, 3)),
    ResidualNetwork("resnet152", Bottleneck, (3, 8, 36, 3)),
)}


def find_backbone(name):
    """Return the `ResidualNetwork` or `TimmNetwork` of a name; raise ValueError if there is none."""
    if isinstance(name, str) and name.startswith(PREFIX):
        return TimmNetwork(name)
    check_argument(isinstance(name, str) and name in BACKBONES, "backbone", name,
                   f"one of {', '.join(BACKBONES)}, or {PREFIX}NAME")
    return BACKBONES[name]


def build_backbone(backbone, norm="inplace_abn", activation="leaky_relu", stem="7x7",
                   average_downsample=False, eca_kernels=None, output_stride=8, recompute="none",
                   backbone_arguments=None, multi_grid=None):
    """Build a `ResNet` or `TimmBackbone` by name; arguments and errors as in `build_network`."""
    return find_backbone(backbone).build(
        norm=norm, activation=activation, stem=stem, average_downsample=average_downsample, eca_kernels=eca_kernels,
        output_stride=output_stride, recompute=recompute, backbone_arguments=backbone_arguments,
        multi_grid=multi_grid)


def norm_maker(norm, activation):
    """Return a function `make(channels, activation=...)` that builds a norm, by default with this activation."""
    return lambda channels, activation=activation: NORMS[norm](channels, activation=activation)


def read_structure(state):
    """Derive `Weights.structure` from the tensors of a residual network, which have the names of this package."""
    depths = tuple(1 + max((int(match[1]) for key in state if (match := re.match(rf"layer{stage}\.(\d+)\.", key))),
                           default=-1) for stage in (1, 2, 3, 4))
    block = Bottleneck if "layer1.0.conv3.weight" in state else BasicBlock
    stem = "7x7"
    if "conv1.0.weight" in state:
        stem = "-".join(str(*state[key].shape[:1]) if (key := f"conv1.{index}.weight") in state else "?"
                        for index in (0, 2, 4))
    kernels = [state[key].shape[2] if state[key].ndim == 3 else 0 for stage in (1, 2, 3, 4)
               if (key := f"layer{stage}.0.eca.conv.weight") in state]
    names = (name for name, network in BACKBONES.items()
             if (network.block, network.depths, network.eca_kernels is None) == (block, depths, not kernels))
    unknown = f"a residual network with {'-'.join(map(str, depths))} blocks"
    return {"backbone": next(names, unknown), "stem": stem, "eca_kernels": kernels or None,
            "average_downsample": "layer2.0.downsample.1.weight" in state
            and state["layer2.0.downsample.1.weight"].ndim == 4}


def check_argument(is_valid, name, value, expected):
    """Raise ValueError for the value of an argument unless it is valid."""
    if not is_valid:
        raise ValueError(f"{name}: expected {expected}, found {value!r:.60}")
