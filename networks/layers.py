"""Layers shared by heads and context modules: the classifier, and a convolution with norm and activation."""

from torch import nn

DROPOUT = 0.1   # rate of Dropout2d before each classifier (our choice: the paper does not give it)


def classifier(in_channels, num_classes):
    """Build a 1×1 convolution to logits, with small initial weights so that no class is favored."""
    conv = nn.Conv2d(in_channels, num_classes, 1)
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.zeros_(conv.bias)
    return conv


def convolution(in_channels, channels, norm, size=3, dilation=1):
    """Build a size×size convolution with norm and activation: (B, in_channels, h, w) → (B, channels, h, w).

    Followed by a single classifier, it is the head of a fully convolutional network (Long, Shelhamer, Darrell, CVPR
    2015) in the form that papers compare with today. `norm(channels)` builds a norm with the network's activation.
    """
    return nn.Sequential(nn.Conv2d(in_channels, channels, size, padding=size // 2 * dilation, dilation=dilation,
                                   bias=False), norm(channels))
