"""Dilated residual networks, with or without channel attention.

He et al., CVPR 2016 (ResNet); Yu, Koltun, Funkhouser, CVPR 2017 (dilated stages); He et al., CVPR 2019,
figure 2 (deep stem, average-pool downsampling). Norm, activation and attention are passed in.
Names of sub-modules follow torchvision, so that its files load without renaming.
"""

import torch
from torch import nn

from libs.recompute import checkpoint

RECOMPUTE = ("none", "light", "full")
STAGES = ("stem", "1", "2", "3", "4")


def conv3x3(in_channels, out_channels, stride=1, dilation=1):
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=dilation, dilation=dilation, bias=False)


def conv1x1(in_channels, out_channels, stride=1):
    return nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)


class Block(nn.Module):
    """What all residual blocks share: branch and shortcut meet in an addition.

    Args:
        channels: of the output.
        activation: makes the module that follows the addition.
        attention: `attention(channels)` makes what scales the branch before the addition, or None.
        downsample: module of the shortcut, or None for the identity.
    """

    def __init__(self, channels, activation, attention, downsample):
        super().__init__()
        self.eca = attention(channels) if attention else None
        self.downsample = downsample
        self.activation = activation()
        self.light = False      # recompute `expand` in the backward pass

    def forward(self, x):
        """x (B, in_channels, H, W) → (B, channels, ceil(H/stride), ceil(W/stride))."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.reduce(x)
        if self.light and torch.is_grad_enabled():
            return checkpoint(self.join, x, shortcut)
        return self.join(x, shortcut)

    def join(self, x, shortcut):
        """The last convolution with its norm, the attention, the addition, the activation."""
        x = self.expand(x)
        # The addition keeps nothing of its own; the activation, in place, keeps its output, which the next block's
        # convolution keeps anyway.
        return self.activation(x + shortcut if self.eca is None else self.eca(x, shortcut))


class BasicBlock(Block):
    """Two 3×3 convolutions and the shortcut (He et al. 2016, figure 5 left).

    Args:
        in_channels, width: channels of the input and of the convolutions; the output has width channels.
        stride: of the first convolution.
        first_dilation, dilation: of the first and the second 3×3 convolution.
        norm: `norm(channels, activation=...)` makes a norm followed by the network's activation, or by
            the one that is named.
        others: activation, attention and downsample as in `Block`.
    """

    expansion = 1

    def __init__(self, in_channels, width, stride, first_dilation, dilation, norm, **others):
        super().__init__(width, **others)
        self.conv1 = conv3x3(in_channels, width, stride, first_dilation)
        self.bn1 = norm(width)
        self.conv2 = conv3x3(width, width, dilation=dilation)
        self.bn2 = norm(width, activation="identity")

    def reduce(self, x):
        return self.bn1(self.conv1(x))

    def expand(self, x):
        return self.bn2(self.conv2(x))


class Bottleneck(Block):
    """1×1, 3×3 and 1×1 convolution and the shortcut (He et al. 2016, figure 5 right); stride in the 3×3.

    Arguments as in `BasicBlock`; the only 3×3 convolution has first_dilation. The output has 4 · width channels.
    """

    expansion = 4

    def __init__(self, in_channels, width, stride, first_dilation, dilation, norm, **others):
        super().__init__(width * self.expansion, **others)
        self.conv1 = conv1x1(in_channels, width)
        self.bn1 = norm(width)
        self.conv2 = conv3x3(width, width, stride, first_dilation)
        self.bn2 = norm(width)
        self.conv3 = conv1x1(width, width * self.expansion)
        self.bn3 = norm(width * self.expansion, activation="identity")

    def reduce(self, x):
        return self.bn2(self.conv2(self.bn1(self.conv1(x))))

    def expand(self, x):
        return self.bn3(self.conv3(x))


class ResNet(nn.Module):
    """Stem and four stages; the last ones dilated instead of strided.

    Args:
        block: `BasicBlock` or `Bottleneck`.
        depths: blocks of stages 1 to 4.
        norm, activation: as in `BasicBlock` and `Block`.
        attention: `attention(channels, stage)` makes the attention of a block of stage 0 to 3, or None.
        stem_widths: None for one 7×7 convolution, else the channels of three 3×3 convolutions:
            (64, 64, 128) in the CSAIL files, (32, 32, 64) in timm's "d" networks.
        average_downsample: 2×2 average pooling and a 1×1 convolution in shortcuts that stride.
        output_stride: 8 or 16, or 32 for no dilation: input size over size of the last stage.
        multi_grid: dilations of the blocks of the last stage, as multiples of the stage's (Chen et al., 2017, arXiv
            1706.05587, section 3.2.1): (1, 2, 4) is 4, 8, 16 at output stride 8. None for the stage's own, of which
            the first block keeps that of the stage before.
        recompute: what is dropped in the forward pass and computed again in the backward pass: `none`;
            `light`, the expansion of each bottleneck with its norm (8 % more work in a training step; `BasicBlock`
            has none, ValueError);
            `full`, groups of blocks (a third more).
    """

    def __init__(self, block, depths, norm, activation, attention=None, stem_widths=None,
                 average_downsample=False, output_stride=8, recompute="none", multi_grid=None):
        super().__init__()
        if recompute not in RECOMPUTE:
            raise ValueError(f"recompute: expected one of {', '.join(RECOMPUTE)}, found {recompute!r}")
        if recompute == "light" and block is not Bottleneck:
            raise ValueError("recompute light: expected a backbone of bottlenecks (50 layers and more), found one of "
                             "two 3×3 convolutions a block, where it would save nothing; full does")
        self.groups = recompute == "full"
        if output_stride not in (8, 16, 32):
            raise ValueError(f"output stride: expected 8, 16 or 32, found {output_stride}")
        self.channels = [width * block.expansion for width in (64, 128, 256, 512)]
        self.grid = (output_stride, 1)      # sides of images are best a multiple of the first, plus the second
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

        in_channels, reached, dilation = stem_out, 4, 1
        for stage, (width, depth) in enumerate(zip((64, 128, 256, 512), depths, strict=True)):
            stride = 1 if stage == 0 else 2
            # The first block of a dilated stage keeps the dilation before it: it reads the grid of the
            # previous stage (as torchvision does).
            first_dilation = dilation
            unstrided = reached * stride > output_stride
            if unstrided:
                dilation, stride = dilation * stride, 1
            reached *= stride
            blocks = []
            dilations = [(first_dilation, dilation)] + [(dilation, dilation)] * (depth - 1)
            if stage == 3 and multi_grid is not None:
                dilations = [(dilation * factor,) * 2 for factor in multi_grid]
            for index in range(depth):
                stride = stride if index == 0 else 1
                out_channels = width * block.expansion
                downsample = None
                if stride != 1 or in_channels != out_channels:
                    downsample = _downsample(in_channels, out_channels, stride, norm, average_downsample,
                                             unstrided)
                attend = (lambda channels, stage=stage: attention(channels, stage)) if attention else None
                blocks.append(block(in_channels, width, stride, *dilations[index], norm,
                                    activation=activation, attention=attend, downsample=downsample))
                in_channels = out_channels
                blocks[-1].light = recompute == "light"
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        _initialize(self)

    def forward(self, images):
        """images (B, 3, H, W) → [stage 1, 2, 3, 4], each (B, channels[i], h, w).

        At output stride 8, h = ceil(H/4) for stage 1 and ceil(H/8) for the others.
        """
        x = self.maxpool(self.bn1(self.conv1(images)))
        stages = []
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            for group in self.group(layer):
                x = checkpoint(group, x) if self.groups and torch.is_grad_enabled() else group(x)
            stages.append(x)
        return stages

    def first_stages(self, names):
        """The modules of the first stages, in the order of the data; names: some of `STAGES`, from the first one on."""
        if tuple(names) != STAGES[:len(names)]:
            raise ValueError(f"stages: expected some of {','.join(STAGES)} from the first one on, found "
                             f"{','.join(map(str, names))}")
        stages = ([self.conv1, self.bn1], [self.layer1], [self.layer2], [self.layer3], [self.layer4])
        return [module for stage in stages[:len(names)] for module in stage]

    @staticmethod
    def group(stage):
        """A stage as groups of about the square root of its blocks: where kept inputs and one group's inner
        buffers together are fewest."""
        length = max(1, round(len(stage) ** 0.5))
        return [stage[first:first + length] for first in range(0, len(stage), length)]


def _downsample(in_channels, out_channels, stride, norm, average, unstrided):
    """The shortcut that changes size or channels; unstrided: the block's stride has become dilation."""
    layers = []
    if average:
        if stride > 1:
            # ceil_mode, and no counting of what lies outside: odd sizes come out as from a strided convolution.
            layers = [nn.AvgPool2d(2, stride, ceil_mode=True, count_include_pad=False)]
        elif unstrided:     # as timm: still averaged, with a row and a column of zeros beyond the border
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
