"""Activated batch normalization: the layers of the `inplace_abn` package 1.1.0 in PyTorch alone.

Rota Bulo, Porzi, Kontschieder, "In-Place Activated BatchNorm for Memory-Optimized Training of DNNs",
CVPR 2018. A layer is a batch norm and the activation after it. In a network of your own:

    import torch
    from libs.abn import InPlaceABN

    block = torch.nn.Sequential(torch.nn.Conv2d(3, 64, 3, bias=False), InPlaceABN(64, activation="leaky_relu"))
    block(torch.rand(2, 3, 64, 64)).mean().backward()
"""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from utils.common.compat import outside_compiled_code
from utils.ops.autocast import without_autocast
from utils.parallel.replicas import Replicas

from . import backend, functions, kernels, recompute
from .synchronize import combine, find_exchange

HALF = (torch.float16, torch.bfloat16)
# Rounding y to half precision shifts the recovered x̂ by about ε · sqrt(x̂² + r²), r = |bias| / (|weight| + eps);
# rounding x, which no norm escapes, by ε · |x̂|. So over a layer, where x̂ is about one, the error is at most twice
# that of a norm that keeps its input while the root mean square of r is at most the square root of two.
LARGEST_RATIO = 2 ** 0.5
CHECK_EVERY = 256       # forward passes
ACTIVATIONS = ("leaky_relu", "relu", "elu", "identity")


class ABN(nn.Module):
    """Batch normalization followed by an activation: y = act(x̂ · weight + bias).

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
        return momentum, self._uses_batch()

    def forward(self, x):
        """x (B, C, ...) → (B, C, ...), same dtype."""
        if self._uses_batch() and (recompute.active() or self._exchange(x) is not None):
            return self._forward_in_parts(x)
        momentum, training = self._momentum_and_training()
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, training, momentum, self.eps)
        return functions.activate_(x, self._settings(x))

    @outside_compiled_code
    def _forward_in_parts(self, x):
        with without_autocast(x):
            return self._run(x, self._settings(x))

    def _settings(self, x):
        return functions.Settings(self.eps, self.activation, self.activation_param, self._uses_batch(),
                                  absolute=False, keep_input=True)

    def _uses_batch(self):
        """Whether the statistics are those of the batch."""
        return self.training or self.running_mean is None

    def _exchange(self, x):
        """How to reach the other parts of the batch (`libs.synchronize`); None: there are none."""
        return None

    def _run(self, x, settings):
        if settings.training:
            mean, invstd, count, exchange = recompute.remembered(lambda: self._batch_statistics(x))
        else:
            dtype = functions.statistics_dtype(x)
            mean, invstd, count = self.running_mean.to(dtype), (self.running_var.to(dtype) + self.eps).rsqrt(), None
            exchange = None     # nothing to share
        if not isinstance(exchange, Replicas):
            return functions.Normalize.apply(x, self.weight, self.bias, mean, invstd, count, settings, exchange)
        kept = x if settings.keep_input else None
        y, token = functions.NormaliseReplica.apply(x, self.weight, self.bias, mean, invstd, count, settings)
        if not recompute.replaying():
            token = functions.Gather.apply(exchange.rank, *exchange.share(token))
        return functions.MeasureReplica.apply(y, token, kept, self.weight, self.bias, mean, invstd, settings)

    @torch.no_grad()
    def _batch_statistics(self, x):
        """Mean and 1 / sqrt(var + eps) (C,) of the whole batch, its values per channel, and with whom it is shared.

        The values are a number, or on a GPU those of each part (P,). Updates the running statistics.
        """
        exchange, own = self._exchange(x), functions.values_a_channel(x)
        # On a GPU each operation on (C,) costs the host as much as one on a map: few kernels do it all.
        if exchange is None:
            self._check_count(own, x)
            mean, var = functions.local_statistics(x, *self._running(exchange))
            return mean, (var + self.eps).rsqrt(), own, None
        if kernels.serve(x):
            return *functions.shared_statistics(x, exchange, self.eps, *self._running(exchange)), exchange
        count, mean, var = self._gather_statistics(x, own, exchange)
        self._check_count(count, x)
        if running := self._running(exchange):
            running_mean, running_var, momentum = running
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((var * (count / (count - 1))).to(running_var.dtype), momentum)
        return mean, (var + self.eps).rsqrt(), count, exchange

    def _running(self, exchange):
        """[running mean, running variance, weight of this batch, which is counted]; none where they stay as they are:
        of several replicas the first one updates them."""
        if not self.training or not self.track_running_stats or isinstance(exchange, Replicas) and exchange.rank:
            return []
        return [self.running_mean, self.running_var, self._momentum_and_training()[0]]

    def _gather_statistics(self, x, own, exchange):
        """Count, mean and variance (C,) of all parts of the batch.

        own: values per channel of this part.
        """
        mean, var = functions.local_statistics(x)
        count = torch.full((1,), own, dtype=torch.double, device=mean.device)       # torch.tensor would wait
        parts = torch.stack(exchange.gather(torch.cat([count, mean.double(), (var * own).double()])))   # (P, 1 + 2C)
        counts, means, moments = parts[:, 0], *parts[:, 1:].chunk(2, dim=1)
        count, mean, moment = (values.to(mean.dtype) for values in combine(counts, means, moments))
        return count if x.is_cuda else int(count), mean, moment / count

    def _check_count(self, count, x):
        if not isinstance(count, torch.Tensor) and count <= 1:      # tensors stay on the GPU
            raise ValueError(f"{type(self).__name__}: expected more than one value per channel in training, found an "
                             f"input of shape {tuple(x.shape)}")

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
    """ABN with y = act(x̂ · (|weight| + eps) + bias) that overwrites its input with its output.

    For the backward pass x̂ is found again from the output, so one buffer is kept for norm, activation and
    the convolution that follows. In half precision this division by |weight| + eps loses x̂ where |bias| is
    many times larger; a layer where that matters keeps its input instead (`keeps_input`).

    Arguments as in `ABN`; `leaky_relu` with a slope above zero, `elu` or `identity`.
    """

    def __init__(self, num_features, eps=1e-5, momentum=0.1, affine=True, track_running_stats=True,
                 activation="leaky_relu", activation_param=0.01):
        super().__init__(num_features, eps, momentum, affine, track_running_stats, activation, activation_param)
        if activation == "relu" or (activation in ("leaky_relu", "elu") and activation_param <= 0):
            raise ValueError("InPlaceABN: expected an activation that can be undone (identity, leaky_relu or elu with "
                             f"a parameter above zero), found {activation} with {activation_param}")
        self.backend = "auto"       # `libs.backend.set_backend` chooses another
        # Replicas, which `nn.DataParallel` makes anew for each pass, share this object with the layer they copy.
        self._choice = SimpleNamespace(keeps_input=False, passes_left=0)

    def forward(self, x):
        """x (B, C, ...) → (B, C, ...), same dtype, in the storage of x. Raises ValueError with one value per channel.

        Compiled, and alone, it is written in operations that the compiler knows, so that the graph stays whole: what
        is kept for the backward pass is then the compiler's to choose, and x is not overwritten.
        """
        if torch.compiler.is_compiling() and not recompute.active() and self._exchange(x) is None:
            return self._forward_compiled(x)
        return self._forward_in_place(x)

    def _forward_compiled(self, x):
        momentum, training = self._momentum_and_training()
        weight = None if self.weight is None else self.weight.abs() + self.eps
        z = F.batch_norm(x, self.running_mean, self.running_var, weight, self.bias, training, momentum, self.eps)
        return functions.activate_(z, super()._settings(z))

    @outside_compiled_code
    def _forward_in_place(self, x):
        with without_autocast(x):
            settings = self._settings(x)
            recomputed = recompute.active()
            shared = settings.training and not recomputed and self._exchange(x) is not None
            if backend.uses_package(self.backend, x, settings, shared, recomputed):
                return self._run_package(x)
            return self._run(x, settings)

    def _run_package(self, x):
        momentum, training = self._momentum_and_training()
        return backend.package()(x, self.weight, self.bias, self.running_mean, self.running_var, training, momentum,
                                 self.eps, self.activation, self.activation_param)

    def _settings(self, x):
        keep = x.dtype in HALF and self._uses_batch() and self._is_ill_conditioned()
        return functions.Settings(self.eps, self.activation, self.activation_param, self._uses_batch(),
                                  absolute=True, keep_input=keep)

    @torch.no_grad()
    def _is_ill_conditioned(self):
        """Looked at now and then: on a GPU the answer waits for everything before it."""
        if not recompute.replaying() and self.weight is not None:
            self.look_ahead([self], 1)
            self._choice.passes_left -= 1
        return self.keeps_input

    @property
    def keeps_input(self):
        return self._choice.keeps_input

    @staticmethod
    @torch.no_grad()
    def look_ahead(norms, passes):
        """Decide which norms keep their input, if that falls due within so many forward passes: the host waits once."""
        norms = [norm for norm in norms if norm.weight is not None]
        if not norms or min(norm._choice.passes_left for norm in norms) >= passes:
            return
        ratios = torch.stack([(norm.bias.abs() / (norm.weight.abs() + norm.eps)).square().mean() for norm in norms])
        for norm, ratio in zip(norms, ratios.sqrt().tolist(), strict=True):
            norm._choice.keeps_input, norm._choice.passes_left = ratio > LARGEST_RATIO, max(CHECK_EVERY, passes)

    def _load_from_state_dict(self, *args):
        super()._load_from_state_dict(*args)
        self._choice.passes_left = 0


class _Synchronized:
    """Mixed into a norm: the statistics of the whole batch, over all processes or replicas that share it.

    Alone the norm is what it is without. Raises RuntimeError where parts of a batch cannot reach each other.
    """

    def __init__(self, num_features, eps=1e-5, momentum=0.1, affine=True, track_running_stats=True,
                 activation="leaky_relu", activation_param=0.01, group=None):
        super().__init__(num_features, eps, momentum, affine, track_running_stats, activation, activation_param)
        self.group = group

    def set_group(self, group):
        """Synchronize with another process group from now on; not between forward and backward."""
        self.group = group

    def _exchange(self, x):
        return find_exchange(x, self.group, getattr(self, "_is_replica", False))


class InPlaceABNSync(_Synchronized, InPlaceABN):
    """`InPlaceABN` with the statistics of the whole batch.

    Args as there; group: process group, None for the default one, looked up in each forward pass.
    """


class ABNSync(_Synchronized, ABN):
    """`ABN` with the statistics of the whole batch. Args as in `InPlaceABNSync`."""


def count_input_keeping_norms(module):
    """(number of in-place norms that keep their input because of half precision, number of in-place norms)."""
    norms = [m for m in module.modules() if isinstance(m, InPlaceABN)]
    return sum(norm.keeps_input for norm in norms), len(norms)


NORMS = {"bn": ABNSync, "inplace_abn": InPlaceABNSync}
