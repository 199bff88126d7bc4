"""What heads and contexts are made of: a convolution, a norm and an activation."""

from torch import nn

DROPOUT = 0.1   # whole channels, before each classifier (ours: the paper does not say)


def classifier(in_channels, num_classes):
    """1×1 convolution to logits, small at the start so that no class is favoured."""
    conv = nn.Conv2d(in_channels, num_classes, 1)
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.zeros_(conv.bias)
    return conv


def convolution(in_channels, channels, norm, size=3, dilation=1):
    """size×size convolution with norm and activation: (B, in_channels, h, w) → (B, channels, h, w).

    With one classifier after it, the head of a fully convolutional network (Long, Shelhamer, Darrell, CVPR 2015) as it
    is compared with today. `norm(channels)` makes a norm with the network's activation.
    """
    return nn.Sequential(nn.Conv2d(in_channels, channels, size, padding=size // 2 * dilation, dilation=dilation,
                                   bias=False), norm(channels))
