"""Activated batch normalization: the layers of the `inplace_abn` package 1.1.0, implemented in PyTorch.

Rota Bulo, Porzi, Kontschieder, "In-Place Activated BatchNorm for Memory-Optimized Training of DNNs", CVPR 2018. A layer
is a batch norm followed by an activation. In a network of your own:

    import torch
    from libs.abn import InPlaceABN

    block = torch.nn.Sequential(torch.nn.Conv2d(3, 64, 3, bias=False), InPlaceABN(64, activation="leaky_relu"))
    block(torch.rand(2, 3, 64, 64)).mean().backward()
"""

import copy
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from utils.common.compat import outside_compiled_code
from utils.ops.autocast import without_autocast
from utils.parallel.replicas import Replicas

from . import backend, functions, kernels, recompute
from .fused.launch import supports
from .synchronize import combine, find_norm_peers

HALF = (torch.float16, torch.bfloat16)
# Rounding y to half precision shifts the recovered x̂ by about ε · sqrt(x̂² + r²), where r = |bias| / (|weight| + eps).
# Rounding x, which happens with every norm, shifts x̂ by ε · |x̂|. In a whole layer, where x̂ is about one, the error is
# at most twice that of a norm that keeps its input, if the root mean square of r is at most this ratio.
MAX_RATIO = 2 ** 0.5
CHECK_EVERY = 256       # forward passes
ACTIVATIONS = ("leaky_relu", "relu", "elu", "identity")


class ABN(nn.Module):
    """Batch normalization followed by an activation: y = act(x̂ · weight + bias).

    Args:
        num_features: channels C of the input.
        eps: added to the variance.
        momentum: weight of the newest batch in the running statistics; None to average all batches equally.
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
        self.backend = "auto"       # changed by `set_backend`
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
        """Set the running statistics, weight and bias to their initial values."""
        self.reset_running_stats()
        if self.affine:
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)

    def _count_batch(self):
        """Count this batch in training, and return its weight in the running statistics."""
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked)
        return momentum

    def forward(self, x):
        """Normalize and activate x (B, C, ...): same shape, same dtype."""
        training = self._uses_batch_statistics()
        peers = self._find_peers(x) if training else None
        shared = training and (recompute.active() or peers is not None) and not self._can_be_compiled(peers)
        if shared or self._fuses(x):
            return self._forward_shared(x)
        return self._forward_composed(x, self.weight, peers)

    def _can_be_compiled(self, peers):
        """Whether this code is being compiled, and `_forward_composed` can keep its graph in one piece."""
        return torch.compiler.is_compiling() and not recompute.active() and not isinstance(peers, Replicas)

    def _forward_composed(self, x, weight, peers):
        """Forward pass of operations that the compiler knows; peers: `Processes` that share the batch, or None."""
        training, momentum = self._uses_batch_statistics(), self._count_batch()
        if peers is None:
            z = F.batch_norm(x, self.running_mean, self.running_var, weight, self.bias, training, momentum, self.eps)
        else:
            running_mean, running_var = (self.running_mean, self.running_var) if self.training else (None, None)
            z = functions.shared_batch_norm(x, running_mean, running_var, weight=weight, bias=self.bias,
                                            momentum=momentum, eps=self.eps, processes=peers)
        return functions.activate_(z, ABN._settings(self, x))

    @outside_compiled_code
    def _forward_shared(self, x):
        """Forward pass by Triton's kernels, or with statistics that are shared or that recomputation uses again."""
        with without_autocast(x):
            return self._normalize(x, self._settings(x))

    def _settings(self, x):
        return functions.Settings(self.eps, self.activation, self.activation_param, self._uses_batch_statistics(),
                                  absolute=False, keep_input=True)

    def _uses_batch_statistics(self):
        """Whether to normalize with the statistics of the batch instead of the running ones."""
        return self.training or self.running_mean is None

    def _find_peers(self, x):
        """`Processes` or `Replicas` that share the batch with this layer, or None (`libs.synchronize`)."""
        return None

    def _fuses(self, *maps):
        """Whether Triton's kernels compute with these maps; replicas have PyTorch's."""
        return self.backend == "triton" and supports(*maps) and not isinstance(self._find_peers(maps[0]), Replicas)

    def fuses_end(self, x, shortcut):
        """Whether `end_block` can compute the end of a block whose last norm this is."""
        return self.activation == "identity" and self._fuses(x, shortcut)

    def end_block(self, x, shortcut, taps, activation, param):
        """Normalize, scale by the channel attention, add the shortcut and activate, by `libs.fused.block_end`.

        Args:
            x, shortcut: (B, C, H, W), for which `fuses_end` is True.
            taps: weights (1, 1, k) of the attention's convolution over channels; None without attention.
            activation, param: as in `ABN`, of the activation after the addition.
        """
        from .fused import block_end  # imports Triton
        settings = functions.Settings(self.eps, activation, param, self._uses_batch_statistics(),
                                      absolute=isinstance(self, InPlaceABN), keep_input=True)
        attention = taps is not None
        if settings.training:
            *statistics, sample_means = recompute.compute_once(lambda: self._fused_statistics(x, by_sample=attention))
        else:
            statistics = self._running_statistics(x)
            sample_means = block_end.sample_means_of(x) if attention else None
        mean, invstd, count, peers = statistics
        return block_end.EndBlock.apply(x, shortcut, self.weight, self.bias, taps, mean, invstd, sample_means, count,
                                        settings, peers)

    @torch.no_grad()
    def _fused_statistics(self, x, by_sample=False):
        """Return `_batch_statistics` and, by_sample, the mean of each sample (B, C), else None; by Triton's kernels."""
        from .fused import norm  # imports Triton
        peers = self._find_peers(x)
        if peers is not None and not kernels.supports(x):       # the interpreter, beside collectives of a CPU
            return *self._batch_statistics(x), norm.statistics(x, self.eps, by_sample=True)[1] if by_sample else None
        if peers is None:
            self._check_count(functions.values_per_channel(x), x)
            packed, sample_means = norm.statistics(x, self.eps, **self._running_arguments(peers), by_sample=by_sample)
            return *norm.split_statistics(packed), None, sample_means
        packed, sample_means = norm.statistics(x, self.eps, by_sample=by_sample)
        mean, invstd, counts = functions.shared_statistics(packed, peers, self.eps, **self._running_arguments(peers))
        return mean, invstd, counts, peers, sample_means

    def _running_statistics(self, x):
        """The same as `_batch_statistics`, from the running statistics."""
        dtype = functions.statistics_dtype(x)
        return self.running_mean.to(dtype), (self.running_var.to(dtype) + self.eps).rsqrt(), None, None

    def _normalize(self, x, settings):
        """Normalize and activate x by the autograd functions of `libs.functions` or `libs.fused.norm`."""
        fused = self._fuses(x)
        if not settings.training:
            mean, invstd, count, peers = self._running_statistics(x)
        elif fused:
            mean, invstd, count, peers, _ = recompute.compute_once(lambda: self._fused_statistics(x))
        else:
            mean, invstd, count, peers = recompute.compute_once(lambda: self._batch_statistics(x))
        if fused:
            from .fused import norm  # imports Triton
            return norm.Normalize.apply(x, self.weight, self.bias, mean, invstd, count, settings, peers)
        if not isinstance(peers, Replicas):
            return functions.Normalize.apply(x, self.weight, self.bias, mean, invstd, count, settings, peers)
        kept = x if settings.keep_input else None
        y, token = functions.NormalizeReplica.apply(x, self.weight, self.bias, mean, invstd, count, settings)
        if not recompute.replaying():
            token = functions.Gather.apply(peers.rank, *peers.share(token))
        return functions.SumReplica.apply(y, token, kept, self.weight, self.bias, mean, invstd, settings)

    @torch.no_grad()
    def _batch_statistics(self, x):
        """Compute the statistics of the whole batch, and update the running statistics.

        Returns:
            (mean (C,), 1 / sqrt(var + eps) (C,), count, peers): `count` is the number of values per channel, an int, or
            on a GPU that shares the batch a tensor () or (P,) whose sum it is; `peers` as from `_find_peers`.
        """
        peers, local_count = self._find_peers(x), functions.values_per_channel(x)
        # On a GPU an operation on (C,) costs the host as much time as one on a map, so few kernels do all the work.
        if peers is None:
            self._check_count(local_count, x)
            mean, var = functions.local_statistics(x, **self._running_arguments(peers))
            return mean, (var + self.eps).rsqrt(), local_count, None
        if kernels.supports(x):
            packed = functions.packed_statistics(x, self.eps)
            return *functions.shared_statistics(packed, peers, self.eps, **self._running_arguments(peers)), peers
        count, mean, var = self._gather_statistics(x, local_count, peers)
        self._check_count(count, x)
        if running := self._running_arguments(peers):
            running_mean, running_var, momentum = running.values()
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((var * (count / (count - 1))).to(running_var.dtype), momentum)
        return mean, (var + self.eps).rsqrt(), count, peers

    def _running_arguments(self, peers):
        """Count this batch, and return the arguments for the update of the running statistics; {} without an update.

        Of several replicas, only the first one counts and updates.
        """
        if not self.training or not self.track_running_stats or isinstance(peers, Replicas) and peers.rank:
            return {}
        return {"running_mean": self.running_mean, "running_var": self.running_var, "momentum": self._count_batch()}

    def _gather_statistics(self, x, local_count, peers):
        """Compute (count, mean (C,), variance (C,)) of the whole batch.

        Args:
            x: (B, C, ...), this part of the batch.
            local_count: values per channel of this part.
            peers: `Processes` or `Replicas` that share the batch.
        """
        mean, var = functions.local_statistics(x)
        count = torch.full((1,), local_count, dtype=torch.double, device=mean.device)   # torch.tensor would wait
        parts = torch.stack(peers.gather(torch.cat([count, mean.double(), (var * local_count).double()])))
        counts, means, moments = parts[:, 0], *parts[:, 1:].chunk(2, dim=1)             # (P,), (P, C), (P, C)
        count, mean, moment = (values.to(mean.dtype) for values in combine(counts, means, moments))
        return count if x.is_cuda else int(count), mean, moment / count

    def _check_count(self, count, x):
        if not isinstance(count, torch.Tensor) and count <= 1:      # reading a tensor would wait for the GPU
            raise ValueError(f"{type(self).__name__}: expected more than one value per channel in training, found an "
                             f"input of shape {tuple(x.shape)}")

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        # State dicts of version 1, from the first releases of `inplace_abn`, have no count of batches.
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

    The backward pass recovers x̂ from the output, so that the norm, the activation and the next convolution save one
    tensor together. In half precision the division by |weight| + eps makes x̂ inaccurate where |bias| is many times
    larger; a layer with many such channels keeps its input instead (`keeps_input`).

    Arguments as in `ABN`, with an activation that has an inverse: `leaky_relu` or `elu` with a parameter above zero, or
    `identity`.
    """

    def __init__(self, num_features, eps=1e-5, momentum=0.1, affine=True, track_running_stats=True,
                 activation="leaky_relu", activation_param=0.01):
        super().__init__(num_features, eps=eps, momentum=momentum, affine=affine,
                         track_running_stats=track_running_stats, activation=activation,
                         activation_param=activation_param)
        if activation == "relu" or (activation in ("leaky_relu", "elu") and activation_param <= 0):
            raise ValueError("InPlaceABN: expected an activation that has an inverse (identity, leaky_relu or elu with "
                             f"a parameter above zero), found {activation} with {activation_param}")
        # Replicas, which `nn.DataParallel` makes anew for each pass, share this object with the layer they copy.
        self._choice = SimpleNamespace(keeps_input=False, passes_left=0)

    def forward(self, x):
        """Normalize and activate x (B, C, ...): same shape, same dtype, in the storage of x.

        In compiled code, unless replicas share statistics, the layer consists of operations that the compiler knows, so
        that the graph is not split. The compiler then decides what is saved for the backward pass, and x is not
        overwritten.

        Raises:
            ValueError: in training, if a channel has only one value.
        """
        if torch.compiler.is_compiling():
            peers = self._find_peers(x) if self._uses_batch_statistics() else None
            if self._can_be_compiled(peers):
                return self._forward_composed(x, None if self.weight is None else self.weight.abs() + self.eps, peers)
        return self._forward_in_place(x)

    @outside_compiled_code
    def _forward_in_place(self, x):
        with without_autocast(x):
            settings = self._settings(x)
            recomputed = recompute.active()
            shared = settings.training and not recomputed and self._find_peers(x) is not None
            if backend.uses_package(self.backend, x, settings, shared=shared, recomputed=recomputed):
                return self._normalize_with_package(x)
            return self._normalize(x, settings)

    def _normalize_with_package(self, x):
        training, momentum = self._uses_batch_statistics(), self._count_batch()
        return backend.package()(x, self.weight, self.bias, self.running_mean, self.running_var, training, momentum,
                                 self.eps, self.activation, self.activation_param)

    def _settings(self, x):
        keep_input = x.dtype in HALF and self._uses_batch_statistics() and self._must_keep_input()
        return functions.Settings(self.eps, self.activation, self.activation_param, self._uses_batch_statistics(),
                                  absolute=True, keep_input=keep_input)

    @torch.no_grad()
    def _must_keep_input(self):
        """Whether this forward pass in half precision has to keep the input; counts the pass."""
        if not recompute.replaying() and self.weight is not None:
            self.decide_kept_inputs([self], 1)
            self.count_pass()
        return self.keeps_input

    def count_pass(self):
        """Count a forward pass for which `decide_kept_inputs` decided."""
        self._choice.passes_left -= 1

    @property
    def keeps_input(self):
        """Whether the layer keeps its input in half precision, by the last decision."""
        return self._choice.keeps_input

    @staticmethod
    @torch.no_grad()
    def decide_kept_inputs(norms, passes):
        """Decide which norms keep their input, if this is due within a number of forward passes.

        A decision holds for `CHECK_EVERY` passes, because the host has to wait for the GPU. For several norms together
        it waits only once.

        Args:
            norms: `InPlaceABN` layers.
            passes: forward passes of each layer for which the decisions must last.
        """
        norms = [norm for norm in norms if norm.weight is not None]
        if not norms or min(norm._choice.passes_left for norm in norms) >= passes:
            return
        ratios = torch.stack([(norm.bias.abs() / (norm.weight.abs() + norm.eps)).square().mean() for norm in norms])
        for norm, ratio in zip(norms, ratios.sqrt().tolist(), strict=True):
            norm._choice.keeps_input, norm._choice.passes_left = ratio > MAX_RATIO, max(CHECK_EVERY, passes)

    def _load_from_state_dict(self, *args):
        super()._load_from_state_dict(*args)
        self._choice.passes_left = 0


class _Synchronized:
    """Mixin of a norm that uses the statistics of the whole batch, over all processes or replicas that share it.

    If the batch is not shared, the norm behaves as without this mixin. `forward` raises RuntimeError if parts of a
    batch cannot exchange statistics.
    """

    def __init__(self, num_features, eps=1e-5, momentum=0.1, affine=True, track_running_stats=True,
                 activation="leaky_relu", activation_param=0.01, group=None):
        super().__init__(num_features, eps=eps, momentum=momentum, affine=affine,
                         track_running_stats=track_running_stats, activation=activation,
                         activation_param=activation_param)
        self.group = group

    def __deepcopy__(self, memo):
        memo[id(self.group)] = self.group       # a process group cannot be copied
        duplicate = type(self).__new__(type(self))
        memo[id(self)] = duplicate
        duplicate.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return duplicate

    def set_group(self, group):
        """Synchronize with another process group from now on. Not to be called between forward and backward pass."""
        self.group = group

    def _find_peers(self, x):
        return find_norm_peers(x, self.group, getattr(self, "_is_replica", False))


class InPlaceABNSync(_Synchronized, InPlaceABN):
    """`InPlaceABN` with the statistics of the whole batch.

    Arguments as in `InPlaceABN`, and:
        group: process group, looked up in each forward pass; None for the default one.
    """


class ABNSync(_Synchronized, ABN):
    """`ABN` with the statistics of the whole batch. Arguments as in `InPlaceABNSync`."""


def set_backend(network, choice):
    """Choose the kernels of all norms of a network, and of the ends of its residual blocks.

    Args:
        network: nn.Module.
        choice: `torch`; `triton`, for channels-last maps on a device where `libs.fused.launch.obstacle` is None,
            otherwise PyTorch; or for in-place norms `package` or `auto`, the default of a norm. `auto` uses the package
            on a GPU in float16 or float32, if it is installed and statistics are neither shared nor recomputed;
            otherwise PyTorch.

    Raises:
        ValueError: if there is no such choice.
        RuntimeError: if `package` is chosen and the package cannot be imported.
    """
    if choice not in backend.CHOICES:
        raise ValueError(f"backend: expected one of {', '.join(backend.CHOICES)}, found {choice!r}")
    if choice == "package" and backend.package() is None:
        raise RuntimeError("backend package: expected the package inplace_abn (libs/requirements-extensions.txt), "
                           "found that it cannot be imported")
    for module in network.modules():
        if isinstance(module, ABN):
            module.backend = choice


def set_group(network, group):
    """Make all synchronized norms of a network use a process group (`utils.parallel.launch.new_group`)."""
    for module in network.modules():
        if isinstance(module, _Synchronized):
            module.set_group(group)


def count_input_keeping_norms(module):
    """Count in-place norms: (number of those that keep their input because of half precision, number of all)."""
    norms = [m for m in module.modules() if isinstance(m, InPlaceABN)]
    return sum(norm.keeps_input for norm in norms), len(norms)


NORMS = {"bn": ABNSync, "inplace_abn": InPlaceABNSync}
