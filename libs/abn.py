"""Activated batch normalisation: the layers of the `inplace_abn` package 1.1.0 in PyTorch alone.

Rota Bulo, Porzi, Kontschieder, "In-Place Activated BatchNorm for Memory-Optimized Training of DNNs",
CVPR 2018. A layer is a batch norm and the activation after it.
"""

import torch
import torch.nn.functional as F
from torch import nn

ACTIVATIONS = ("leaky_relu", "relu", "elu", "identity")


def activate_(x, activation, activation_param):
    """Apply the named activation to `x` in place and return it.

    `activation_param` is the slope of `leaky_relu` below zero or the alpha of `elu`.
    """
    if activation == "leaky_relu":
        return F.leaky_relu(x, activation_param, inplace=True)
    if activation == "relu":
        return F.relu(x, inplace=True)
    if activation == "elu":
        return F.elu(x, activation_param, inplace=True)
    if activation == "identity":
        return x
    raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, found {activation!r}")


class ABN(nn.Module):
    """Batch normalisation followed by an activation: y = act(x̂ · weight + bias).

    Args:
        num_features: channels C of the input.
        eps: added to the variance.
        momentum: weight of the newest batch in the running statistics; None for their plain average.
        affine: learn `weight` and `bias`.
        track_running_stats: keep `running_mean` and (unbiased) `running_var` for evaluation.
        activation: `leaky_relu`, `relu`, `elu` or `identity`.
        activation_param: slope of `leaky_relu` below zero, alpha of `elu`.
    """

    _version = 2

    def __init__(self, num_features, eps=1e-5, momentum=0.1, affine=True, track_running_stats=True,
                 activation="leaky_relu", activation_param=0.01):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, found {activation!r}")
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.affine = affine
        self.track_running_stats = track_running_stats
        self.activation = activation
        self.activation_param = activation_param
        self.register_parameter("weight", nn.Parameter(torch.ones(num_features)) if affine else None)
        self.register_parameter("bias", nn.Parameter(torch.zeros(num_features)) if affine else None)
        tracked = track_running_stats
        self.register_buffer("running_mean", torch.zeros(num_features) if tracked else None)
        self.register_buffer("running_var", torch.ones(num_features) if tracked else None)
        self.register_buffer("num_batches_tracked",
                             torch.tensor(0, dtype=torch.long) if tracked else None)

    def reset_running_stats(self):
        """Set the running statistics to mean 0 and variance 1."""
        if self.track_running_stats:
            self.running_mean.zero_()
            self.running_var.fill_(1)
            self.num_batches_tracked.zero_()

    def reset_parameters(self):
        """Set the running statistics, weight and bias to their first values."""
        self.reset_running_stats()
        if self.affine:
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)

    def _momentum_and_training(self):
        """Count this batch; return the weight it has in the running statistics, and whether to use its own."""
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked)
        return momentum, self.training or self.running_mean is None

    def scale(self):
        """(C,) factor of x̂, or None without affine parameters."""
        return self.weight

    def forward(self, x):
        """x (B, C, ...) → (B, C, ...), same dtype."""
        momentum, training = self._momentum_and_training()
        x = F.batch_norm(x, self.running_mean, self.running_var, self.scale(), self.bias, training, momentum,
                         self.eps)
        return activate_(x, self.activation, self.activation_param)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        # Version 1 files, of the first `inplace_abn` releases, do not count batches.
        key = prefix + "num_batches_tracked"
        if (local_metadata.get("version") or 1) < 2 and self.track_running_stats and key not in state_dict:
            state_dict[key] = torch.tensor(0, dtype=torch.long)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def extra_repr(self):
        text = (f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
                f"activation={self.activation}")
        return text + (f"[{self.activation_param}]" if self.activation in ("leaky_relu", "elu") else "")


class InPlaceABN(ABN):
    """y = act(x̂ · (|weight| + eps) + bias), the scale of the `inplace_abn` package.

    It computes what the in-place layer computes and keeps its state-dict keys; it does not yet overwrite
    its input.
    """

    def scale(self):
        return None if self.weight is None else self.weight.abs() + self.eps


NORMS = {"bn": ABN, "inplace_abn": InPlaceABN}
