"""A GPU that is not there: PyTorch's fake tensors of device `cuda`, which have shapes, dtypes and layouts, no values.

What code asks of CUDA is rehearsed on them: each operator that exists on CUDA alone checks its arguments as ATen's
kernel would, and where the host would wait for the device is noted. Autograd's own engine wants a driver for tensors of
this kind, so the backward pass walks the graph here.
"""

import collections
import contextlib
import math
import threading
import traceback
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from utils.parallel.replicas import ReplicaGroup

ROOT = Path(__file__).resolve().parents[1]
aten = torch.ops.aten
# Composite operators, which are taken apart so that what they consist of is seen.
COMPOSITE = {"to", "conv2d", "conv1d", "linear", "matmul", "item", "cpu", "reshape", "contiguous", "flatten", "type_as",
             "log_softmax", "softmax", "einsum", "pad"}
NO_KERNEL = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "lift_fresh", "detach_"}
GPU = torch.device("cuda", 0)
LAYOUTS = {"NCHW": torch.contiguous_format, "channels-last": torch.channels_last}


def place():
    """The innermost lines of the project, "file:line"."""
    frames = [f"{Path(frame.filename).relative_to(ROOT)}:{frame.lineno}" for frame in traceback.extract_stack()
              if Path(frame.filename).is_relative_to(ROOT) and Path(frame.filename).parent != ROOT / "tests"
              and "site-packages" not in frame.filename]
    return " < ".join(reversed(frames[-2:])) or "elsewhere"


def backward(loss, gradient=None):
    """`loss.backward()` without autograd's engine, but in its order: of the nodes into which all gradients have flowed,
    the one made last."""
    waiting, known, stack = collections.Counter(), {loss.grad_fn}, [loss.grad_fn]
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is None:
                continue
            waiting[node] += 1
            if node not in known:
                known.add(node)
                stack.append(node)
    arrived = collections.defaultdict(dict)         # {node: {input: gradient}}
    arrived[loss.grad_fn][0] = torch.ones_like(loss) if gradient is None else gradient
    ready = [loss.grad_fn]
    with torch.no_grad():
        while ready:
            node = ready.pop(max(range(len(ready)), key=lambda number: ready[number]._sequence_nr()))
            given = [arrived[node].get(number) for number in range(len(node._input_metadata))]
            del arrived[node]
            after = node.next_functions
            if isinstance(node, torch.autograd.function.BackwardCFunction):     # written in Python
                results = node.apply(*(torch.zeros(like.shape, dtype=like.dtype, device=like.device) if one is None
                                       else one for one, like in zip(given, node._input_metadata, strict=True)))
                results = results if isinstance(results, tuple) else (results,)
                # A result for every argument, of which some are no tensors and have no place in the graph.
                results = [one for one, needed in zip(results, node.needs_input_grad, strict=True) if needed]
                after = [edge for edge in after if edge[0] is not None]
            else:
                results = node(*given)
                results = results if isinstance(results, tuple) else (results,)
            for (follower, number), result in zip(after, results, strict=bool(after)):
                if follower is None:
                    continue
                if result is not None:
                    like = follower._input_metadata[number]
                    result = result.sum_to_size(like.shape).to(like.dtype)
                    before = arrived[follower].get(number)
                    arrived[follower][number] = result if before is None else before + result
                waiting[follower] -= 1
                if not waiting[follower]:
                    ready.append(follower)
    assert not any(waiting.values()), "a node was never reached"


class FakeDevice(TorchDispatchMode):
    """Entered inside a `FakeTensorMode`.

    Attributes:
        waits: places where the host waits for the device.
        called: {name of an operator that this class knows: how often}.
        maps: {(dtype, layout) of the maps that norms were given: how many}; not of maps of one pixel.
        launches: {name of an operator that computes on the device: how often}. Some start several kernels.
        mixed: names of operators that were given maps of both layouts, which a GPU reads slowly.
        bytes: what these operators read and write, if each reads and writes its tensors once.
        mode: the `FakeTensorMode` it was entered in.
    """

    def __init__(self):
        super().__init__()
        self.waits, self.mixed, self.bytes = [], [], 0
        self.called, self.maps, self.launches = (collections.Counter() for _ in range(3))

    def clear(self):
        for record in (self.waits, self.mixed, self.called, self.maps, self.launches):
            record.clear()
        self.bytes = 0

    def start(self, kernel, grid, arguments, constants):
        """Stands in for `libs.fused.launch.start`."""
        tensors = [value for value in arguments if isinstance(value, torch.Tensor)]
        need(all(tensor.is_cuda for tensor in tensors), "expected tensors on the GPU")
        maps = [tensor for tensor in tensors if tensor.ndim == 4 and tensor.dtype != torch.float32
                and kernel.fn.__name__ not in ("losses_kernel", "sums_kernel")]         # which take any layout
        need(all(x.is_contiguous(memory_format=torch.channels_last) for x in maps), "expected channels-last maps")
        need(1 <= len(grid) <= 3 and max(grid[1:], default=1) < 1 << 16, f"found the grid {grid}")
        self.launches[kernel.fn.__name__] += 1
        self.bytes += sum(map(size_in_memory, tensors))

    def wait(self, what):
        self.waits.append(f"{what} {place()}")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.name().removeprefix("aten::").split(".")[0]
        if name in COMPOSITE and function._can_decompose():
            with self:
                actual = function.decompose(*args, **kwargs)
            if actual is not NotImplemented:
                return actual
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        on_gpu = any(tensor.is_cuda for tensor in tensors)
        computes = on_gpu and function.namespace == "aten" and not function.is_view and name not in NO_KERNEL
        if computes:
            self.launches[name] += 1
            if len({layout_of(tensor) for tensor in tensors if tensor.ndim == 4 and min(tensor.shape[1:]) > 1}) > 1:
                self.mixed.append(name)
        mixed = on_gpu and any(tensor.is_cpu and tensor.ndim for tensor in tensors)
        assert not mixed or "copy" in name, f"{function} of tensors on both devices, {place()}"
        result = self.compute(function, name, on_gpu, args, kwargs)
        if computes:
            self.bytes += bytes_moved(name, args, result)
        return result

    def compute(self, function, name, on_gpu, args, kwargs):
        """The result of an operator, and notes about whether the host waits for it."""
        if function is aten._local_scalar_dense.default:
            return self.read(args[0])
        if function is aten._to_copy.default and kwargs.get("device") is not None:
            # To the host without blocking, the new tensor is in pinned memory.
            self.note_copy(args[0].device, torch.device(kwargs["device"]), kwargs.get("non_blocking", False), True)
        if function is aten.copy_.default:
            self.note_copy(args[1].device, args[0].device, args[2] if len(args) > 2 else False)
        if on_gpu and function is aten.index.Tensor and any(
                index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]):
            self.wait("an index by a mask")
            return args[0].flatten()[:args[1][0].numel()].clone()       # as if all were picked
        if on_gpu and function is aten.bincount.default:
            self.wait("bincount")
            self.wait("bincount")
            return torch.empty(kwargs.get("minlength") or args[2], dtype=torch.int64, device=args[0].device)
        if on_gpu and hasattr(self, name):
            self.called[name] += 1
            return getattr(self, name)(*args, **kwargs)
        return function(*args, **kwargs)

    def note_copy(self, source, target, non_blocking, pinned=False):
        if source.type != target.type and not (non_blocking and (pinned or target.type == "cuda")):
            self.wait(f"a copy from {source.type} to {target.type}")

    def read(self, tensor):
        """A scalar as a number, of which nothing is known on the device: any that is finite."""
        if tensor.is_cuda:
            self.wait("a value is read")
        elif tensor.constant is not None:
            return tensor.constant.item()
        return {torch.bool: False}.get(tensor.dtype, 0.5 if tensor.dtype.is_floating_point else 7)

    # Convolutions, whose results cuDNN lays out as the map or the filters are.

    def convolution(self, x, weight, *rest):
        need(x.dtype == weight.dtype, f"expected one dtype, found {x.dtype} and {weight.dtype}")
        return aten.convolution.default(x, weight, *rest).contiguous(memory_format=layout_of(x, weight))

    def convolution_backward(self, dy, x, weight, *rest):
        need(dy.dtype == x.dtype == weight.dtype, f"expected one dtype, found {dy.dtype}, {x.dtype}, {weight.dtype}")
        dx, dweight, dbias = aten.convolution_backward.default(dy, x, weight, *rest)
        return dx if dx is None else dx.contiguous(memory_format=layout_of(x, weight)), dweight, dbias

    # Norms, by kernels that exist on CUDA alone.

    def batch_norm_update_stats(self, x, mean, var, momentum):
        self.take(x, mean, var)
        return tuple(x.new_empty(x.shape[1], dtype=torch.float32) for _ in range(2))

    def batch_norm_stats(self, x, eps):
        self.take(x)
        return tuple(x.new_empty(x.shape[1], dtype=torch.float32) for _ in range(2))

    def batch_norm_gather_stats_with_counts(self, like, means, invstds, running_mean, running_var, momentum, eps,
                                            counts):
        for vector in (running_mean, running_var):
            need(vector is None or vector.dtype == torch.float32 and vector.shape == means.shape[1:],
                 f"expected float32 {tuple(means.shape[1:])}")
        need(means.dtype == invstds.dtype == torch.float32 and means.ndim == 2 and means.shape == invstds.shape
             and counts.shape == means.shape[:1] and counts.dtype == (running_mean if running_mean is not None else like
                                                                     ).dtype and counts.is_cuda,
             f"found means {tuple(means.shape)}, counts {counts.dtype} {tuple(counts.shape)}")
        return tuple(means.new_empty(means.shape[1]) for _ in range(2))

    def batch_norm_elemt(self, x, weight, bias, mean, invstd, eps, *, out=None):
        self.take(x, weight, bias, mean, invstd)
        out = torch.empty_like(x) if out is None else out
        need_alike(x, out)
        return out

    def batch_norm_backward_reduce(self, dy, x, mean, invstd, weight, input_g, weight_g, bias_g):
        self.take(x, mean, invstd, *[weight] * (weight is not None))
        need_alike(x, dy)
        return tuple(x.new_empty(x.shape[1] if requested else 0, dtype=torch.float32)
                     for requested in (input_g, input_g, weight_g, bias_g))

    def batch_norm_backward_elemt(self, dy, x, mean, invstd, weight, sum_dy, sum_dy_xmu, count):
        self.take(x, mean, invstd, weight, sum_dy, sum_dy_xmu)
        need_alike(x, dy)
        need(count.dtype == torch.int32 and count.ndim == 1 and count.is_cuda, f"counts: found {count.dtype}, "
             f"{count.ndim} dimensions, on {count.device}")
        return torch.empty_like(x)

    # Fused optimizers, which refuse tensors of different strides.

    def _fused_sgd_(self, weights, *lists, **options):
        for tensors in lists:
            for weight, tensor in zip(weights, tensors, strict=True):
                attributes = [(x.shape, x.stride(), x.dtype) for x in (weight, tensor)]
                need(attributes[0] == attributes[1], f"expected {attributes[0]}, found {attributes[1]}")

    def _fused_adamw_(self, weights, grads, means, squares, largest, steps, **options):
        self._fused_sgd_(weights, grads, means, squares)
        need(len(steps) == len(weights) and all(step.is_cuda for step in steps), "expected steps on the device")

    def take(self, x, *vectors):
        """A map and vectors of one value per channel, float32, on its device."""
        for vector in vectors:
            need(vector.dtype == torch.float32 and vector.shape == (x.shape[1],) and vector.device == x.device
                 and vector.is_contiguous(), f"expected float32 ({x.shape[1]},) on {x.device}, found {vector.dtype} "
                 f"{tuple(vector.shape)} on {vector.device}")
        if x.shape[2:].numel() > 1:
            self.maps[x.dtype, next((name for name, layout in LAYOUTS.items() if x.is_contiguous(memory_format=layout)),
                                    "neither")] += 1


def layout_of(*tensors):
    """Channels-last where one of them is, and is not contiguous as well."""
    last = any(tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
               and not tensor.is_contiguous() for tensor in tensors)
    return torch.channels_last if last else torch.contiguous_format


def bytes_moved(name, args, result):
    """What an operator reads and writes, if it reads each argument and writes each result once.

    The gradients of input and filters of a convolution are computed one after the other.
    """
    source = args[1] if name in ("copy_", "_foreach_copy_") else () if name in ("fill_", "zero_") else args
    target = args[::2] if name == "_fused_sgd_" else args[0] if name.startswith("_foreach") and name.endswith(
        "_") else result
    again = args[0] if name == "convolution_backward" and result[0] is not None else ()
    return sum(size_in_memory(leaf) for leaf in tree_leaves((source, target, again))
               if isinstance(leaf, torch.Tensor) and leaf.is_cuda)


def size_in_memory(tensor):
    """Bytes of the distinct values of a tensor, which may be expanded."""
    sides = [side for side, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
    return tensor.element_size() * math.prod(sides)


def need(holds, words):
    assert holds, f"{words}, {place()}"


def need_alike(x, other):
    """Maps of one dtype and one layout, contiguous or channels-last."""
    layouts = [layout for layout in LAYOUTS.values()
               if x.is_contiguous(memory_format=layout) and other.is_contiguous(memory_format=layout)]
    need(x.dtype == other.dtype and x.shape == other.shape and layouts, f"expected a map like {x.dtype} {x.stride()}, "
         f"found {other.dtype} {other.stride()}")


def nested(values, shape):
    """A flat list as nested ones."""
    if len(shape) < 2:
        return values if shape else values[0]
    step = len(values) // shape[0]
    return [nested(values[start:start + step], shape[1:]) for start in range(0, len(values), step)]


@contextlib.contextmanager
def fake_gpu(monkeypatch):
    """One GPU, as far as PyTorch is asked about it: `FakeDevice`. Tensors made inside are fake, on any device."""
    mode, device = FakeTensorMode(allow_non_fake_inputs=True), FakeDevice()

    def tolist(tensor):
        if tensor.is_cuda:
            device.wait("a list is read")
        return nested([0.5] * tensor.numel(), list(tensor.shape))

    monkeypatch.setattr(FakeTensor, "tolist", tolist)
    monkeypatch.setattr(torch.Tensor, "new_tensor", lambda tensor, data, **options: torch.tensor(
        data, **{"dtype": tensor.dtype, "device": tensor.device} | options))
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.setattr(torch._C, "_current_graph_task_id", lambda: 1)      # by which checkpoints tell backward passes
    monkeypatch.setattr(FakeTensorMode, "avoid_device_init", property(lambda self: True))
    for name, value in {"is_available": True, "is_initialized": True, "device_count": 1, "current_device": 0,
                        "is_bf16_supported": True, "get_device_capability": (9, 0), "get_arch_list": [],
                        "_lazy_init": None, "set_device": None, "synchronize": None, "max_memory_allocated": 0,
                        "memory_allocated": 0, "memory_reserved": 0, "mem_get_info": (1 << 40, 1 << 40),
                        "set_rng_state": None, "is_current_stream_capturing": False,
                        "get_rng_state": torch.zeros(16, dtype=torch.uint8)}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *args, value=value, **options: value)
    monkeypatch.setattr(torch.cuda, "device", type("device", (contextlib.nullcontext,), {}))
    monkeypatch.setattr("libs.fused.launch.start", device.start)
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    only_lift = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with mode, device:
            device.mode = mode
            yield device
    finally:
        torch._C._set_only_lift_cpu_tensors(only_lift)


class InTurns(torch.nn.Module):
    """A module for threads of replicas inside `fake_gpu`, whose modes know the thread alone that entered them, and no
    other at the same time: one runs until it waits for another's value."""

    def __init__(self, module, gpu, monkeypatch):
        super().__init__()
        self.module, self.gpu, self.turn = module, gpu, threading.Lock()
        exchange = ReplicaGroup.exchange

        def exchange_and_wait(group, *value):
            self.turn.release()
            try:
                return exchange(group, *value)
            finally:
                self.turn.acquire()

        monkeypatch.setattr(ReplicaGroup, "exchange", exchange_and_wait)

    def forward(self, *tensors):
        with self.turn, self.gpu.mode, self.gpu:
            torch._C._set_only_lift_cpu_tensors(True)
            return self.module(*tensors)
