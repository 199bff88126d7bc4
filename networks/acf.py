"""The attentional class feature module. Zhang et al., ACFNet, ICCV 2019, arXiv 1909.09408, section 3.

Symbols of the paper: N classes, F the feature map (C×H×W), P the coarse probabilities (N×H×W), C' the key
channels. The paper draws, for every image,

    F' = conv1x1(F)                                           CCB, class center block
    F_class[i] = sum_j P[i, j] F'[:, j] / sum_j P[i, j]       the center of class i, over pixels j
    F_a[:, j] = sum_i P[i, j] F_class[i]                      CAB, class attention block
    F'_a = conv1x1(F_a)

Everything after P is linear in F, and the weights of a mean sum to one, as do the probabilities of a pixel.
So the order may be exchanged exactly: pool first and convolve N centers instead of H·W pixels. F' and F_a
never exist.
"""

import torch
import torch.nn.functional as F
from torch import nn

from utils.precision import at_least_float32, without_autocast


class ClassCenterBlock(nn.Module):
    """CCB: one feature vector a class (section 3.2). `conv` is plain, with bias, as drawn.

    norm: `norm(channels)` makes a norm with activation after it, as an ablation; then nothing can be exchanged.
    """

    def __init__(self, in_channels, key_channels, norm=None):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, key_channels, 1)
        self.norm = norm(key_channels) if norm else None

    def forward(self, features, coarse_logits):
        """features (B, C, H, W), coarse_logits (B, N, H, W) → class centers (B, N, C')."""
        # P divided by its class mass is the softmax over pixels of log P. That form needs no epsilon: a
        # class with no mass anywhere gets the plain mean of all pixels.
        shares = coarse_logits.flatten(2).log_softmax(dim=1).softmax(dim=2)    # (B, N, HW)
        if self.norm is not None:
            keys = self.norm(self.conv(features))                              # (B, C', H, W)
            return torch.einsum("bnj,bcj->bnc", shares, keys.flatten(2))
        pooled = torch.einsum("bnj,bcj->bnc", shares, features.flatten(2))     # (B, N, C)
        return conv1x1_on_vectors(self.conv, pooled)


class ClassAttentionBlock(nn.Module):
    """CAB: every pixel takes the centers in the proportions P (section 3.3). `conv` is plain, with bias.

    norm: as in `ClassCenterBlock`.
    """

    def __init__(self, key_channels, norm=None):
        super().__init__()
        self.conv = nn.Conv2d(key_channels, key_channels, 1)
        self.norm = norm(key_channels) if norm else None

    def forward(self, centers):
        """Class centers (B, N, C') → convolved centers (B, N, C'), whose mixture by P is F'_a."""
        return conv1x1_on_vectors(self.conv, centers)


class ACFModule(nn.Module):
    """Class centers and per-pixel attention to them.

    Inputs are raised to float32 at least, also under autocast; float64 stays float64.

    Args:
        in_channels: C.
        key_channels: C'.
        norm: `norm(channels)` makes a norm with activation after each of the two convolutions: an ablation, not the
            paper's module; None for the module as drawn.
    """

    def __init__(self, in_channels, key_channels=512, norm=None):
        super().__init__()
        self.ccb = ClassCenterBlock(in_channels, key_channels, norm)
        self.cab = ClassAttentionBlock(key_channels, norm)

    def class_centers(self, features, coarse_logits):
        """features (B, C, H, W), coarse_logits (B, N, H, W) → F_class (B, N, C')."""
        with without_autocast(features):
            return self.ccb(at_least_float32(features), at_least_float32(coarse_logits))

    def convolved_centers(self, features, coarse_logits, center_logits=None):
        """As `class_centers`, followed by CAB's convolution: (B, N, C').

        center_logits: (B, N, H, W) that say which pixels make the centers, instead of the coarse ones.
        """
        with without_autocast(features):
            return self.cab(self.class_centers(features, coarse_logits if center_logits is None else center_logits))

    def forward(self, features, coarse_logits, center_logits=None):
        """features (B, C, H, W), coarse_logits (B, N, H, W) → F'_a (B, C', H, W), in full size.

        The network as drawn never calls this: it classifies the centers instead (`networks.acfnet`).
        """
        if self.cab.norm is None:
            return mix(self.convolved_centers(features, coarse_logits, center_logits), coarse_logits)
        centers = self.class_centers(features, coarse_logits if center_logits is None else center_logits)
        with without_autocast(features):
            return self.cab.norm(self.cab.conv(mix(centers, coarse_logits)))


def true_logits(labels, num_classes, size, dtype=torch.float32):
    """Labels (B, H, W), any other value than a class ignored → logits (B, N, *size) whose softmax they are.

    An ignored pixel belongs to all classes alike.
    """
    labels = F.interpolate(labels[:, None].float(), size=size, mode="nearest-exact")[:, 0].long()
    known = labels < num_classes
    chosen = F.one_hot(labels.where(known, 0), num_classes) * known[..., None]                # (B, h, w, N)
    return 50 * chosen.permute(0, 3, 1, 2).to(dtype)


def mix(vectors, coarse_logits):
    """Per-class vectors (B, N, K), coarse_logits (B, N, H, W) → their mixture by P (B, K, H, W)."""
    with without_autocast(vectors):
        probabilities = at_least_float32(coarse_logits).softmax(dim=1)
        return torch.einsum("bnk,bnhw->bkhw", vectors, probabilities)


def conv1x1_on_vectors(conv, vectors):
    """Apply the 1×1 convolution `conv` to vectors (B, N, C) → (B, N, C')."""
    bias = None if conv.bias is None else conv.bias.to(vectors.dtype)
    return F.linear(vectors, conv.weight[:, :, 0, 0].to(vectors.dtype), bias)
