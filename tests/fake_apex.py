"""NVIDIA's apex.amp of tag 25.04: a stand-in that behaves like its levels O0 and O1, and the real one on a CPU.

What of the real one breaks a training is here too: functions of PyTorch that cast whatever autocast says, a cast weight
that cannot be used twice, gradients that are put aside before each backward pass, and a `forward` in a closure.
`tests/utils/training/test_apex.py` trains under both and compares them. Both take tensors of the CPU for a GPU's.

    PYTHONPATH=FOLDER python -m tests.fake_apex real|fake O0|O1 MODEL [ohem=1 parts=2 recompute=full ...]

takes a few steps and prints what became of them; FOLDER holds apex/ of that tag, whose Python part needs no build.
"""

import contextlib
import functools
import json
import sys
import types
import warnings

import torch
import torch.nn.functional as F

from loss.criterion import SegmentationCriterion
from networks.build import build_network, find_model
from utils.devices.precision import Precision
from utils.ops.normalization import Normalization
from utils.parallel.replicas import ThreadReplicas
from utils.training.engine import make_engine
from utils.training.optimization import make_optimizer

# What O1 patches, as far as the networks here use it: to float16, to float32, and to the widest of the arguments.
HALF = ((F, "conv1d conv2d conv_transpose2d linear"), (torch, "conv1d conv2d conv_transpose2d matmul mm bmm addmm "
        "baddbmm prelu"), (torch.Tensor, "__matmul__ matmul mm bmm addmm baddbmm prelu"))
FLOAT = ((F, "interpolate softmax log_softmax gelu layer_norm group_norm normalize cross_entropy nll_loss softplus"),
         (torch, "exp log pow reciprocal rsqrt norm prod std sum var"),
         (torch.Tensor, "__pow__ __rpow__ cpu exp log pow reciprocal rsqrt norm prod std sum var"))
WIDEST = ((torch, "add addcmul addcdiv div mul eq ge gt le lt ne"),
          (torch.Tensor, "__add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __truediv__ add addcmul addcdiv div mul"))
SEQUENCES = ((torch, "cat stack"),)


class Handle:
    """Whether functions cast, and the weights that are cast already."""

    def __init__(self):
        self._is_active = self._enable_caching = True
        self.cache = {}

    def is_active(self):
        return self._is_active

    def half(self, value):
        if not (self._enable_caching and isinstance(value, torch.nn.Parameter)):
            return cast(value, torch.float16)
        if value not in self.cache:
            self.cache[value] = value.half()
        elif value.requires_grad and torch.is_grad_enabled():
            raise IndexError("tuple index out of range")    # looks for the parent of the cast weight in the wrong place
        return self.cache[value]


def is_float(value):
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def cast(value, dtype):
    return value.to(dtype) if is_float(value) else value


def patched(function, kind, handle):
    """The function, with the casts of its kind."""
    @functools.wraps(function)
    def wrapper(*arguments, **named):
        if not handle.is_active():
            return function(*arguments, **named)
        if kind == "sequences":
            dtypes = {one.dtype for one in arguments[0]}
            parts = [cast(one, torch.float32) for one in arguments[0]] if len(dtypes) > 1 else arguments[0]
            return function(parts, *arguments[1:], **named)
        convert = handle.half if kind == "half" else lambda value: cast(value, torch.float32)
        dtypes = {value.dtype for value in (*arguments, *named.values()) if is_float(value)}
        if kind != "widest" or len(dtypes) > 1:
            arguments = [convert(value) for value in arguments]
            named = {name: convert(value) for name, value in named.items()}
        return function(*arguments, **named)
    return wrapper


class FakeAmp(types.ModuleType):
    """The module apex.amp. Functions of PyTorch that it patches are put back by `monkeypatch`, of pytest."""

    def __init__(self, monkeypatch):
        super().__init__("apex.amp")
        self.monkeypatch = monkeypatch
        self._amp_state = types.SimpleNamespace()
        self.scale, self.unskipped, self.skip = 2.0 ** 16, 0, False

    def initialize(self, network, optimizer, opt_level):
        self.parameters = [weight for group in optimizer.param_groups for weight in group["params"]]
        self.stash, self.unscaled = [None] * len(self.parameters), True
        self.dynamic = opt_level == "O1"
        if not self.dynamic:
            self.scale, original = 1.0, network.forward

            def in_float32(*arguments):
                outputs = original(*(cast(one, torch.float32) for one in arguments))
                return {name: cast(one, torch.float32) for name, one in outputs.items()}

            network.forward = in_float32
            return network, optimizer
        self._amp_state.handle = Handle()
        for kind, places in (("half", HALF), ("float", FLOAT), ("widest", WIDEST), ("sequences", SEQUENCES)):
            for module, names in places:
                for name in names.split():
                    self.monkeypatch.setattr(module, name, patched(getattr(module, name), kind,
                                                                   self._amp_state.handle))
        step = optimizer.step
        optimizer.step = lambda: None if self.skip else step()
        return network, optimizer

    @contextlib.contextmanager
    def scale_loss(self, loss, optimizer, delay_unscale=False):
        if not self.dynamic:
            yield loss.float()
            return
        if not delay_unscale and self.unscaled:
            self.stash = [weight.grad for weight in self.parameters]
            for weight in self.parameters:
                weight.grad = None
        yield loss.float() * self.scale
        self.unscaled = not delay_unscale
        self._amp_state.handle.cache.clear()
        if delay_unscale:
            return
        self.skip = False
        for weight, before in zip(self.parameters, self.stash, strict=True):
            if weight.grad is not None:
                self.skip |= not torch.isfinite(weight.grad.float().sum())
                weight.grad.mul_(1 / self.scale)
            if before is not None:
                weight.grad = before if weight.grad is None else weight.grad + before
        self.stash = [None] * len(self.parameters)
        self.scale, self.unskipped = (self.scale / 2, 0) if self.skip else (self.scale, self.unskipped + 1)

    def state_dict(self):
        return {"loss_scaler0": {"loss_scale": self.scale, "unskipped": self.unskipped}}

    def load_state_dict(self, state):
        self.scale, self.unskipped = state["loss_scaler0"].values()


def install(monkeypatch):
    """Make the stand-in what `import apex` gives."""
    package = types.ModuleType("apex")
    package.amp = FakeAmp(monkeypatch)
    monkeypatch.setitem(sys.modules, "apex", package)
    monkeypatch.setitem(sys.modules, "apex.amp", package.amp)


def install_real():
    """Make the real apex.amp, which must be importable, take tensors of the CPU for those of a GPU."""
    warnings.filterwarnings("ignore")
    torch.cuda.IntTensor = lambda values: torch.tensor(values, dtype=torch.int32)
    from apex.amp import _initialize, utils

    def converting(dtype):
        def convert(value, name="", verbose=False):
            if isinstance(value, list | tuple):
                return type(value)(convert(one) for one in value)
            return value.to(dtype)
        return convert

    utils.maybe_half, utils.maybe_float = converting(torch.float16), converting(torch.float32)
    _initialize.check_params_fp32 = lambda models: None
    kind = torch.Tensor.type
    torch.Tensor.type = lambda tensor, *more, **named: (
        kind(tensor, *more, **named) if more or named else kind(tensor).replace("torch.", "torch.cuda."))


def make(level, model="acfnet_resnet", *, amp="apex", backbone="resnet18", norm="inplace_abn", recompute="none", acf=0,
         ohem=0, clip=None, ema=None, optimizer="sgd", replicas=1, processes=None):
    """An `Engine` of a small network on the CPU, after `install` or `install_real`."""
    torch.manual_seed(0)
    cpu = torch.device("cpu")
    network = build_network(model, 5, backbone, norm=norm, activation="relu" if norm == "bn" else "leaky_relu",
                            recompute=recompute, acf=bool(acf))
    engine = make_engine(
        network, optimizer=make_optimizer(network, kind=optimizer), normalization=Normalization(),
        criterion=SegmentationCriterion(find_model(model, bool(acf)).loss_weights, ohem=bool(ohem), ohem_keep=300),
        precision=Precision(amp, torch.device("cuda"), level), devices=[cpu], processes=processes, clip_gradient=clip,
        ema=ema)
    if replicas > 1:
        engine.module = ThreadReplicas(engine.module, replicas)
        for module in network.modules():
            if isinstance(module, torch.nn.Dropout2d):
                module.p = 0.0      # threads draw in any order
    engine.train_mode()
    return engine


def batch(seed, rank=0):
    """Two crops with their labels."""
    generator = torch.Generator().manual_seed(1000 * rank + seed)
    return {"image": torch.randint(256, (2, 3, 17, 17), dtype=torch.uint8, generator=generator),
            "label": torch.randint(5, (2, 17, 17), generator=generator)}


def learn(engine, parts=1, rank=0, steps=2):
    """The terms of some steps, each with the sum of all weights, and the state of the loss scale after them."""
    results = []
    for step in range(steps):
        terms, _ = engine.step([batch(10 * step + part, rank) for part in range(parts)])
        weights = sum(float(weight.detach().double().sum()) for weight in engine.scored_network.parameters())
        results.append({**terms, "weights": weights})
    return results, dict(engine.precision.state_dict()["loss_scaler0"]) if engine.precision.apex else None


def main(kind, level, model, *options):
    from pytest import MonkeyPatch

    torch.set_num_threads(1)
    install_real() if kind == "real" else install(MonkeyPatch())
    named = dict(option.split("=") for option in options)
    parts = int(named.pop("parts", 1))
    named = {name: value if name in ("norm", "recompute", "optimizer", "backbone") else float(value)
             for name, value in named.items()}
    named |= {name: int(named[name]) for name in ("replicas",) if name in named}
    print(json.dumps(learn(make(level, model, **named), parts)))


if __name__ == "__main__":
    main(*sys.argv[1:])
