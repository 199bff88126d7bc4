"""Dilated residual networks, with or without channel attention.

He et al., CVPR 2016 (ResNet); Yu, Koltun, Funkhouser, CVPR 2017 (dilated stages); He et al., CVPR 2019,
figure 2 (deep stem, average-pool downsampling). Norm, activation and attention are passed as arguments.
Submodules have the names of torchvision, so that its files load without renaming.
"""

import torch
from torch import nn

from libs.abn import ABN
from libs.recompute import checkpoint

RECOMPUTE = ("none", "light", "full")
STAGES = ("stem", "1", "2", "3", "4")


def conv3x3(in_channels, out_channels, stride=1, dilation=1):
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=dilation, dilation=dilation, bias=False)


def conv1x1(in_channels, out_channels, stride=1):
    return nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)


def activation_of(module):
    """Name and parameter, as in `libs.abn.ABN`, of the activation that a module computes; None for another module."""
    if isinstance(module, nn.LeakyReLU):
        return "leaky_relu", module.negative_slope
    return ("relu", 0.0) if isinstance(module, nn.ReLU) else None


class Block(nn.Module):
    """Base class of the residual blocks: the sum of a branch and a shortcut.

    Subclasses define the branch by `reduce` (all but its last convolution) and `last` (the last convolution and its
    norm).

    Args:
        channels: number of channels of the output.
        activation: `activation()` builds the module after the addition.
        attention: `attention(channels)` builds the channel attention of the branch; None for none.
        downsample: module of the shortcut; None for the identity.
    """

    def __init__(self, channels, activation, attention, downsample):
        super().__init__()
        self.eca = attention(channels) if attention else None
        self.downsample = downsample
        self.activation = activation()
        self.recompute_expand = False       # free the maps of `expand`, and recompute them in the backward pass

    def forward(self, x):
        """Map x (B, in_channels, H, W) to (B, channels, ceil(H/stride), ceil(W/stride))."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.reduce(x)
        if self.recompute_expand and torch.is_grad_enabled():
            return checkpoint(self.join, x, shortcut)
        return self.join(x, shortcut)

    def join(self, x, shortcut):
        """Apply the last convolution with its norm, the attention, the addition and the activation."""
        convolution, norm = self.last()
        x = convolution(x)
        activation = activation_of(self.activation)
        if activation is not None and isinstance(norm, ABN) and norm.fuses_end(x, shortcut):
            return norm.end_block(x, shortcut, None if self.eca is None else self.eca.conv.weight, *activation)
        x = norm(x)
        # Autograd saves nothing for the addition. For the in-place activation it saves the output, which the next
        # block's convolution saves anyway.
        return self.activation(x + shortcut if self.eca is None else self.eca(x, shortcut))


class BasicBlock(Block):
    """Two 3×3 convolutions and the shortcut (He et al. 2016, figure 5 left).

    Args:
        in_channels: number of channels of the input.
        width: number of channels of the convolutions and of the output.
        stride: stride of the first convolution.
        first_dilation, dilation: dilations of the first and the second convolution.
        norm: `norm(channels, activation=...)` builds a norm with the given activation, by default the network's.
        options: `activation`, `attention` and `downsample` of `Block`.
    """

    expansion = 1

    def __init__(self, in_channels, width, stride, first_dilation, dilation, norm, **options):
        super().__init__(width, **options)
        self.conv1 = conv3x3(in_channels, width, stride, first_dilation)
        self.bn1 = norm(width)
        self.conv2 = conv3x3(width, width, dilation=dilation)
        self.bn2 = norm(width, activation="identity")

    def reduce(self, x):
        return self.bn1(self.conv1(x))

    def last(self):
        return self.conv2, self.bn2


class Bottleneck(Block):
    """1×1, 3×3 and 1×1 convolution and the shortcut (He et al. 2016, figure 5 right).

    Arguments as in `BasicBlock`, but the 3×3 convolution has the stride and first_dilation, dilation is unused, and the
    output has 4 · width channels.
    """

    expansion = 4

    def __init__(self, in_channels, width, stride, first_dilation, dilation, norm, **options):
        super().__init__(width * self.expansion, **options)
        self.conv1 = conv1x1(in_channels, width)
        self.bn1 = norm(width)
        self.conv2 = conv3x3(width, width, stride, first_dilation)
        self.bn2 = norm(width)
        self.conv3 = conv1x1(width, width * self.expansion)
        self.bn3 = norm(width * self.expansion, activation="identity")

    def reduce(self, x):
        return self.bn2(self.conv2(self.bn1(self.conv1(x))))

    def last(self):
        return self.conv3, self.bn3


class ResNet(nn.Module):
    """Stem and four stages; the last stages are dilated instead of strided.

    Args:
        block: `BasicBlock` or `Bottleneck`.
        depths: number of blocks of stages 1 to 4.
        norm, activation: as in `BasicBlock` and `Block`.
        attention: `attention(channels, stage)` builds the attention of a block, with stage from 0 to 3; None for none.
        stem_widths: None for one 7×7 convolution, else the numbers of channels of three 3×3 convolutions:
            (64, 64, 128) in the CSAIL files, (32, 32, 64) in timm's "d" networks.
        average_downsample: use 2×2 average pooling and a 1×1 convolution in strided shortcuts.
        output_stride: input size divided by the size of the last stage: 8, 16, or 32 for no dilation.
        multi_grid: dilations of the blocks of the last stage, as multiples of the dilation of that stage (Chen et al.,
            2017, arXiv 1706.05587, section 3.2.1): (1, 2, 4) is 4, 8, 16 at output stride 8. None: all blocks have the
            dilation of the stage, except the first one, which keeps the dilation of the previous stage.
        recompute: what the forward pass frees and the backward pass recomputes: `none`; `light`, the expansion of each
            bottleneck with its norm (8 % more work per training step; not with `BasicBlock`); `full`, groups of blocks
            (a third more work).

    Attributes:
        channels: number of channels of stages 1 to 4.
        grid: (step, rest): image sides of k · step + rest need no padding.

    Raises:
        ValueError: for other values of `recompute` or `output_stride`, and for `light` with `BasicBlock`.
    """

    def __init__(self, block, depths, norm, activation, attention=None, stem_widths=None,
                 average_downsample=False, output_stride=8, recompute="none", multi_grid=None):
        super().__init__()
        if recompute not in RECOMPUTE:
            raise ValueError(f"recompute: expected one of {', '.join(RECOMPUTE)}, found {recompute!r}")
        if recompute == "light" and block is not Bottleneck:
            raise ValueError("recompute light: expected a backbone of bottlenecks (50 layers and more), found one with "
                             "two 3×3 convolutions per block, where it would save nothing; use full")
        self.recompute_groups = recompute == "full"
        if output_stride not in (8, 16, 32):
            raise ValueError(f"output stride: expected 8, 16 or 32, found {output_stride}")
        self.channels = [width * block.expansion for width in (64, 128, 256, 512)]
        self.grid = (output_stride, 1)
        if stem_widths is None:
            stem_out = 64
            self.conv1 = nn.Conv2d(3, stem_out, 7, stride=2, padding=3, bias=False)
        else:
            first, second, stem_out = stem_widths
            self.conv1 = nn.Sequential(conv3x3(3, first, stride=2), norm(first),
                                       conv3x3(first, second), norm(second),
                                       conv3x3(second, stem_out))
        self.bn1 = norm(stem_out)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)

        in_channels, current_stride, dilation = stem_out, 4, 1
        for stage, (width, depth) in enumerate(zip((64, 128, 256, 512), depths, strict=True)):
            stride = 1 if stage == 0 else 2
            # The first block of a dilated stage keeps the dilation of the previous stage, whose maps it reads (as in
            # torchvision).
            first_dilation = dilation
            dilated = current_stride * stride > output_stride
            if dilated:
                dilation, stride = dilation * stride, 1
            current_stride *= stride
            blocks = []
            dilations = [(first_dilation, dilation)] + [(dilation, dilation)] * (depth - 1)
            if stage == 3 and multi_grid is not None:
                dilations = [(dilation * factor,) * 2 for factor in multi_grid]
            for index in range(depth):
                stride = stride if index == 0 else 1
                out_channels = width * block.expansion
                downsample = None
                if stride != 1 or in_channels != out_channels:
                    downsample = _downsample(in_channels, out_channels, stride=stride, norm=norm,
                                             average=average_downsample, dilated=dilated)
                stage_attention = (lambda channels, stage=stage: attention(channels, stage)) if attention else None
                blocks.append(block(in_channels, width, stride, *dilations[index], norm,
                                    activation=activation, attention=stage_attention, downsample=downsample))
                in_channels = out_channels
                blocks[-1].recompute_expand = recompute == "light"
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        _initialize(self)

    def forward(self, images):
        """Map images (B, 3, H, W) to the feature maps of stages 1 to 4, a list of (B, channels[i], h, w).

        At output stride 8, h = ceil(H/4) for stage 1 and ceil(H/8) for the others.
        """
        x = self.maxpool(self.bn1(self.conv1(images)))
        stages = []
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            for group in self.split_into_groups(layer):
                x = checkpoint(group, x) if self.recompute_groups and torch.is_grad_enabled() else group(x)
            stages.append(x)
        return stages

    def first_stages(self, names):
        """Return the modules of the first stages, in the order of the forward pass.

        Args:
            names: the first of `STAGES`, such as ("stem", "1").

        Raises:
            ValueError: for other names.
        """
        if tuple(names) != STAGES[:len(names)]:
            raise ValueError(f"stages: expected the first of {','.join(STAGES)}, found {','.join(map(str, names))}")
        stages = ([self.conv1, self.bn1], [self.layer1], [self.layer2], [self.layer3], [self.layer4])
        return [module for stage in stages[:len(names)] for module in stage]

    @staticmethod
    def split_into_groups(stage):
        """Split the blocks of a stage into groups for recomputation.

        A group has about as many blocks as the square root of the depth, which minimizes the memory of all kept inputs
        plus the maps inside one group.
        """
        length = max(1, round(len(stage) ** 0.5))
        return [stage[first:first + length] for first in range(0, len(stage), length)]


def _downsample(in_channels, out_channels, stride, norm, average, dilated):
    """Build a shortcut that changes size or channels; dilated: whether dilation replaces the stride of the stage."""
    layers = []
    if average:
        if stride > 1:
            # With ceil_mode and means over existing pixels only, odd sizes become those of a strided convolution.
            layers = [nn.AvgPool2d(2, stride, ceil_mode=True, count_include_pad=False)]
        elif dilated:       # as in timm: still averaged, with a row and a column of zeros outside the border
            layers = [nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.AvgPool2d(2, 1))]
        else:
            layers = [nn.Identity()]
        stride = 1
    return nn.Sequential(*layers, conv1x1(in_channels, out_channels, stride),
                         norm(out_channels, activation="identity"))


def _initialize(network):
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
