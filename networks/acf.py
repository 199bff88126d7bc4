"""The attentional class feature module. Zhang et al., ACFNet, ICCV 2019, arXiv 1909.09408, section 3.

Symbols of the paper: N classes, F the feature map (C×H×W), P the coarse probabilities (N×H×W), C' the key channels,
j a pixel, i a class. For every image, equations 1 to 3 and figure 3:

    F'            = conv1x1(F)                                   CCB, class center block
    F_class[i]    = Σ_j P[i,j] F'[:,j] / Σ_j P[i,j]              the center of class i: its mean feature
    F_a[:,j]      = Σ_i P[i,j] F_class[i]                        CAB, class attention block
    F'_a          = conv1x1(F_a)
    fine logits   = conv1x1(concat(F'_a, F))

What the module can express: everything after P is linear in F, the weights of each mean sum to one, and so do the
probabilities of each pixel. Therefore F'_a adds P[:,j] · M to the logits of pixel j, with one N×N matrix M per image;
row i of M is the classifier's response to the center of class i (`tests/benchmarks/contribution.py` measures M in
trained networks). For the same reason, the convolutions could be applied after the pooling, to N centers instead of H·W
pixels. The code keeps the order of the paper, which costs 0.7 % of the network's multiplications.
"""

from functools import partial

import torch
from torch import nn

from libs.recompute import checkpoint
from utils.ops.autocast import at_least_float32, without_autocast

from .layers import DROPOUT, classifier


class ClassCenterBlock(nn.Module):
    """CCB: one feature vector per class (section 3.2).

    Args:
        in_channels, key_channels: C and C'.
        norm: `norm(channels)` builds a norm with activation, applied after the convolution (an ablation). None: no
            norm, as in the paper.
    """

    def __init__(self, in_channels, key_channels, norm=None):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, key_channels, 1)
        self.norm = norm(key_channels) if norm else nn.Identity()

    def forward(self, features, coarse_logits):
        """Map features F (B, C, H, W) and coarse_logits (B, N, H, W) to class centers F_class (B, N, C')."""
        keys = self.norm(self.conv(features))                                   # F' (B, C', H, W)
        # P[i,j] / Σ_j P[i,j] is the softmax over pixels of log P. In this form a class without any
        # probability mass needs no epsilon: its center is the mean of all pixels.
        weights = coarse_logits.flatten(2).log_softmax(dim=1).softmax(dim=2)    # (B, N, HW)
        return torch.einsum("bij,bcj->bic", weights, keys.flatten(2))


class ClassAttentionBlock(nn.Module):
    """CAB: for every pixel, the class centers weighted by its class probabilities (section 3.3).

    Args:
        key_channels: C'.
        norm: as in `ClassCenterBlock`.
    """

    def __init__(self, key_channels, norm=None):
        super().__init__()
        self.conv = nn.Conv2d(key_channels, key_channels, 1)
        self.norm = norm(key_channels) if norm else nn.Identity()

    def forward(self, centers, coarse_logits):
        """Map centers F_class (B, N, C') and coarse_logits (B, N, H, W) to F'_a (B, C', H, W)."""
        probabilities = coarse_logits.softmax(dim=1)                            # P (B, N, H, W)
        attended = torch.einsum("bic,bihw->bchw", centers, probabilities)       # F_a (B, C', H, W)
        return self.norm(self.conv(attended))


class ACFModule(nn.Module):
    """The class centers of an image, and every pixel's attention to them (figure 3).

    Computes in at least float32, also under autocast; float64 stays float64. Arguments as in `ClassCenterBlock`.
    """

    def __init__(self, in_channels, key_channels=512, norm=None):
        super().__init__()
        self.ccb = ClassCenterBlock(in_channels, key_channels, norm)
        self.cab = ClassAttentionBlock(key_channels, norm)

    def class_centers(self, features, coarse_logits):
        """Map features F (B, C, H, W) and coarse_logits (B, N, H, W) to class centers F_class (B, N, C')."""
        with without_autocast(features):
            return self.ccb(at_least_float32(features), at_least_float32(coarse_logits))

    def forward(self, features, coarse_logits):
        """Map features F (B, C, H, W) and coarse_logits (B, N, H, W) to F'_a (B, C', H, W)."""
        centers = self.class_centers(features, coarse_logits)
        with without_autocast(features):
            return self.cab(centers, at_least_float32(coarse_logits))


class ACFHead(nn.Module):
    """Coarse classifier, ACF module and fine classifier (figure 2), for any network that ends in a single feature map.

        head = ACFHead(in_channels=2048, num_classes=19)
        logits = head(features)     # {"fine", "coarse"}; the paper's loss weighs them 0.7 and 0.6

    Args:
        in_channels, num_classes, key_channels: C, N and C'.
        norm: as in `ClassCenterBlock`.
        fusion: `fusion(in_channels, out_channels)` builds a module between concatenation and fine classifier (an
            ablation). None: no such module, as in the paper.
        recompute: free the feature maps inside the ACF module, and recompute them in the backward pass.
    """

    def __init__(self, in_channels, num_classes, key_channels=512, norm=None, fusion=None, recompute=False):
        super().__init__()
        self.recompute = recompute
        self.dropout = nn.Dropout2d(DROPOUT)
        self.coarse = classifier(in_channels, num_classes)
        self.acf = ACFModule(in_channels, key_channels, norm)
        joined = key_channels + in_channels
        self.fusion = fusion(joined, in_channels) if fusion else nn.Identity()
        self.fine = classifier(in_channels if fusion else joined, num_classes)

    def forward(self, features):
        """Map features F (B, C, h, w) to {"fine", "coarse"}, logits (B, N, h, w)."""
        coarse = self.coarse(self.dropout(features))                            # (B, N, h, w)
        acf = partial(checkpoint, self.acf) if self.recompute and torch.is_grad_enabled() else self.acf
        attended = acf(features, coarse).to(features.dtype)                     # F'_a (B, C', h, w)
        joined = self.fusion(torch.cat([attended, features], dim=1))            # (B, C' + C, h, w)
        return {"fine": self.fine(self.dropout(joined)), "coarse": coarse}
