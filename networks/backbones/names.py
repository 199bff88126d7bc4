"""Backbones by name: residual networks of our own, and those of timm. `find_backbone` gives a `ResidualNetwork` or a
`TimmNetwork`, which answer the same questions, each for its kind."""

import re
from dataclasses import dataclass
from functools import partial

from torch import nn

from libs.abn import NORMS
from utils.common.errors import UserError
from utils.ops.normalization import Normalization
from utils.ops.upsampling import GRID

from . import timm
from .eca import ECA
from .resnet import RECOMPUTE, STAGES, BasicBlock, Bottleneck, ResNet
from .timm import PREFIX, TimmBackbone, find_plan

STEMS = {"7x7": None, "64-64-128": (64, 64, 128), "32-32-64": (32, 32, 64)}
ACTIVATIONS = {"leaky_relu": partial(nn.LeakyReLU, 0.01, inplace=True), "relu": partial(nn.ReLU, inplace=True)}


@dataclass(frozen=True)
class ResidualNetwork:
    """A residual network of our own.

    Attributes:
        name: a key of `BACKBONES`.
        block: `BasicBlock` or `Bottleneck`.
        depths: blocks of stages 1 to 4.
        eca_kernels: k of the channel attention in stages 1 to 4, as ECANet released it; None without attention.
    """

    name: str
    block: type
    depths: tuple
    eca_kernels: tuple | None = None

    weights_by_timm = False     # whether timm reads its files, and has weights for its name
    traced = False              # whether its way to ONNX is a recorded pass

    def build(self, *, norm, activation, stem, average_downsample, eca_kernels, output_stride, recompute,
              backbone_arguments, multi_grid):
        """The `ResNet`; arguments as in `build_backbone`."""
        check(backbone_arguments is None, "backbone_arguments", backbone_arguments, f"none with {self.name}")
        for name, value, choices in (("norm", norm, NORMS), ("activation", activation, ACTIVATIONS),
                                     ("stem", stem, STEMS)):
            check(isinstance(value, str) and value in choices, name, value, f"one of {', '.join(choices)}")
        check(isinstance(average_downsample, bool), "average_downsample", average_downsample, "true or false")
        if activation == "relu" and norm != "bn":
            raise ValueError("activation relu: expected norm bn, found "
                             f"{norm}: an in-place norm cannot recover its input from a ReLU's output")
        if eca_kernels is not None:
            check(self.eca_kernels is not None, "eca_kernels", eca_kernels,
                  f"none with {self.name}, which has no channel attention")
            check(isinstance(eca_kernels, list | tuple) and len(eca_kernels) == 4 and all(
                type(k) is int and k > 0 and k % 2 for k in eca_kernels), "eca_kernels", eca_kernels,
                "four odd numbers")
        check(multi_grid is None or isinstance(multi_grid, list | tuple) and len(multi_grid) == self.depths[-1] and all(
            type(factor) is int and factor > 0 for factor in multi_grid), "multi_grid", multi_grid,
            f"a whole number above 0 for each of the {self.depths[-1]} blocks of the last stage")
        kernels = eca_kernels or self.eca_kernels
        attention = None if kernels is None else lambda channels, stage: ECA(kernels[stage])
        return ResNet(self.block, self.depths, norm_maker(norm, activation), ACTIVATIONS[activation], attention,
                      STEMS[stem], average_downsample, output_stride, recompute, multi_grid)

    def recompute_choices(self):
        """What `recompute` can be, from none to the most: `light` drops what only bottlenecks have."""
        return [kind for kind in RECOMPUTE if kind != "light" or self.block is Bottleneck]

    def check_training(self, *, recompute, freeze):
        """Raise `UserError` where it cannot be trained so."""
        if freeze != STAGES[:len(freeze)]:
            raise UserError(f"--freeze {','.join(freeze)}: expected stages from {','.join(STAGES)} that begin with "
                            "stem and leave none out, such as stem,1,2")
        if recompute not in self.recompute_choices():
            raise UserError(f"--recompute {recompute}: expected a backbone of at least 50 layers, found {self.name}, "
                            "in which it would save nothing; --recompute full works there")

    def normalization(self):
        """Of the images that weights for it were trained on, where their file does not say another."""
        return Normalization()

    def grid(self, arguments=None):
        """(step, rest): sides of images that are a multiple of step, plus rest, need no padding."""
        return GRID

    def head_channels(self, channels):
        """(those of context and head, those of which the auxiliary head gets a share); channels: of its maps. 512 for
        a ResNet-101, as in the paper; 128 for a ResNet-18."""
        return channels[-1] // 4, channels[-2]

    def follow(self, theirs, flags, source):
        """Arguments of `build_network`: what flags say and, where they leave it open, a file.

        Args:
            theirs: `Weights.structure` of the file; empty without one.
            flags: {"stem", "downsample", "eca-kernels": value, or None for nothing}.
            source: name of the file.
        """
        found = {"stem": "7x7", "downsample": "strided", "eca-kernels": None}
        if theirs:
            named = theirs["backbone"]
            if self.name not in (named, f"eca_{named}"):    # more attention starts where it changes nothing
                raise UserError(f"--backbone {self.name}: expected one of {', '.join(BACKBONES)} that fits {source}, "
                                f"found {named} there")
            found = {"stem": theirs["stem"], "downsample": "average" if theirs["average_downsample"] else "strided",
                     "eca-kernels": theirs["eca_kernels"]}
            for flag, value in flags.items():
                if None not in (value, found[flag]) and value != found[flag]:
                    raise UserError(f"--{flag} {value}: expected that of {source}, found {found[flag]} there")
            if found["stem"] not in STEMS:
                raise UserError(f"{source}: expected a stem of {', '.join(STEMS)}, found {found['stem']}")
        if flags["eca-kernels"] and self.eca_kernels is None:
            raise UserError(f"--eca-kernels: expected a --backbone with channel attention, found {self.name}")
        chosen = {name: found[name] if flags[name] is None else flags[name] for name in flags}
        kernels = chosen["eca-kernels"] or self.eca_kernels
        return {"backbone": self.name, "stem": chosen["stem"],
                "average_downsample": chosen["downsample"] == "average", "eca_kernels": kernels and list(kernels)}

    def structure(self, arguments, state):
        """`Weights.structure` of a network of `build_network` with these arguments; state: of its backbone."""
        return read_structure(state)

    def describe(self, arguments):
        """What is to be said of it beside its name; arguments: of `build_network`."""
        return f"stem {arguments['stem']}, {'average' if arguments['average_downsample'] else 'strided'} downsampling"


@dataclass(frozen=True)
class TimmNetwork:
    """A network of timm, known to it or not. Methods as those of `ResidualNetwork`; name: `timm:NAME`."""

    name: str

    weights_by_timm = True
    traced = True

    def build(self, *, norm, activation, backbone_arguments, **options):
        """The `TimmBackbone`, which takes none of the options of a `ResNet`."""
        defaults = {"stem": "7x7", "average_downsample": False, "eca_kernels": None, "output_stride": 8,
                    "recompute": "none", "multi_grid": None}
        for option, value in options.items():
            check(value == defaults[option], option, value, f"{defaults[option]} with {self.name}")
        return TimmBackbone(self.name, backbone_arguments)

    def recompute_choices(self):
        return ["none"]

    def check_training(self, *, recompute, freeze):
        for flag, value in (("recompute", recompute.replace("none", "")), ("freeze", ",".join(freeze))):
            if value:
                raise UserError(f"--{flag} {value}: expected a residual network of our own, whose stages are known, "
                                f"found {self.name}")

    def normalization(self):
        return timm.input_normalization(self.name)

    def grid(self, arguments=None):
        return find_plan(self.name, arguments).grid

    def head_channels(self, channels):
        """Those of a ResNet-101: networks of timm are of all widths, which say little of what a head needs."""
        return 512, 1024

    def follow(self, theirs, flags, source):
        if theirs and theirs["backbone"] != self.name:
            raise UserError(f"--backbone {self.name}: expected the one of {source}, found {theirs['backbone']} there")
        for flag, value in flags.items():
            if value is not None:
                raise UserError(f"--{flag}: expected no such flag with {self.name}, which timm builds as it is, found "
                                f"{value}")
        try:
            plan = find_plan(self.name, theirs.get("backbone_arguments"))
        except ValueError as error:
            raise UserError(f"--{error}") from None
        return {"backbone": self.name, "backbone_arguments": plan.arguments}

    def structure(self, arguments, state):
        return {"backbone": self.name, "backbone_arguments": arguments.get("backbone_arguments")}

    def describe(self, arguments):
        stride = find_plan(self.name, arguments["backbone_arguments"]).stride
        return f"output stride {stride}{', the only one it has' * (stride != 8)}"


BACKBONE = "eca_resnet101"      # where nobody says another
# ECA kernel sizes are in the names of the files ECANet released: 18 k3577, 50 k3557, others k3357.
BACKBONES = {one.name: one for one in (
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
    """The `ResidualNetwork` or `TimmNetwork` of that name. Raises ValueError for one that is neither."""
    if isinstance(name, str) and name.startswith(PREFIX):
        return TimmNetwork(name)
    check(isinstance(name, str) and name in BACKBONES, "backbone", name,
          f"one of {', '.join(BACKBONES)}, or {PREFIX}NAME")
    return BACKBONES[name]


def build_backbone(backbone, norm="inplace_abn", activation="leaky_relu", stem="7x7",
                   average_downsample=False, eca_kernels=None, output_stride=8, recompute="none",
                   backbone_arguments=None, multi_grid=None):
    """The `ResNet` or `TimmBackbone` of that name; arguments as in `build_network`."""
    return find_backbone(backbone).build(
        norm=norm, activation=activation, stem=stem, average_downsample=average_downsample, eca_kernels=eca_kernels,
        output_stride=output_stride, recompute=recompute, backbone_arguments=backbone_arguments,
        multi_grid=multi_grid)


def norm_maker(norm, activation):
    """`make(channels, activation=...)` → a norm with the network's activation, or with the one named."""
    return lambda channels, activation=activation: NORMS[norm](channels, activation=activation)


def read_structure(state):
    """`Weights.structure` of a residual network's tensors, by our names; None for what they leave open."""
    depths = tuple(1 + max((int(match[1]) for key in state if (match := re.match(rf"layer{stage}\.(\d+)\.", key))),
                           default=-1) for stage in (1, 2, 3, 4))
    block = Bottleneck if "layer1.0.conv3.weight" in state else BasicBlock
    stem = "7x7"
    if "conv1.0.weight" in state:
        stem = "-".join(str(*state[key].shape[:1]) if (key := f"conv1.{index}.weight") in state else "?"
                        for index in (0, 2, 4))
    kernels = [state[key].shape[2] if state[key].ndim == 3 else 0 for stage in (1, 2, 3, 4)
               if (key := f"layer{stage}.0.eca.conv.weight") in state]
    named = (name for name, one in BACKBONES.items()
             if (one.block, one.depths, one.eca_kernels is None) == (block, depths, not kernels))
    unknown = f"a residual network with {'-'.join(map(str, depths))} blocks"
    return {"backbone": next(named, unknown), "stem": stem, "eca_kernels": kernels or None,
            "average_downsample": "layer2.0.downsample.1.weight" in state
            and state["layer2.0.downsample.1.weight"].ndim == 4}


def check(holds, name, value, expected):
    """Raise the ValueError for an argument's value, unless that holds."""
    if not holds:
        raise ValueError(f"{name}: expected {expected}, found {value!r:.60}")
