"""What a network keeps for its backward pass, and that recomputation changes nothing else."""

import os

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from libs.convert import fold_norms
from networks.build import build_network
from tests.benchmarks.memory import NoConvolutions, kept_bytes, measure
from tests.conftest import shorten
from utils.devices.memory import free_bytes, is_out_of_memory, measure_forward_pass

BOUNDS = {(None, "none"): 6800, (torch.bfloat16, "none"): 3500, (torch.bfloat16, "light"): 2300,
          (torch.bfloat16, "full"): 900}


@pytest.mark.parametrize("autocast, recompute", BOUNDS)
def test_kept_bytes_per_pixel_of_the_whole_network(autocast, recompute):
    with NoConvolutions():      # on CPUs without instructions for bf16 they would take many minutes
        parts, pixels = measure("eca_resnet101", autocast, recompute, (257, 257))
    kept = sum(parts.values()) / pixels
    assert 0.5 * BOUNDS[autocast, recompute] < kept <= BOUNDS[autocast, recompute], parts
    assert parts["outside"] < 0.01 * sum(parts.values())


def test_the_measure_sees_a_second_copy():
    """A ReLU after each norm, out of place, must show."""
    network = build_network("acfnet_resnet", 3, "resnet18")
    images = torch.randn(2, 3, 65, 65)
    lean = sum(kept_bytes(network, images)[0].values())
    plain = sum(kept_bytes(build_network("acfnet_resnet", 3, "resnet18", norm="bn"), images)[0].values())
    assert plain > 1.3 * lean


def run(recompute, norm, autocast):
    """Gradients, buffers and outputs; three blocks of a stage are recomputed as a group of two and one of one."""
    torch.manual_seed(3)
    with shorten("eca_resnet50", depths=(1, 3, 1, 1)):
        network = build_network("acfnet_resnet", num_classes=3, backbone="eca_resnet50", norm=norm, recompute=recompute)
    for module in network.modules():
        if isinstance(module, torch.nn.Dropout2d):
            module.p = 0.0
    torch.manual_seed(4)
    images = torch.randn(2, 3, 33, 33)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        outputs = network(images)
    sum(logits.float().square().mean() for logits in outputs.values()).backward()
    return {**{name: p.grad for name, p in network.named_parameters()}, **dict(network.named_buffers()),
            **{f"output {name}": logits for name, logits in outputs.items()}}


@pytest.mark.parametrize("recompute, autocast", [("light", False), ("full", True)])
def test_recomputation_is_bit_equal(recompute, autocast):
    """Gradients, running statistics and outputs; statistics are updated once."""
    expected, actual = run("none", "inplace_abn", autocast), run(recompute, "inplace_abn", autocast)
    assert expected.keys() == actual.keys()
    assert [name for name in expected if not torch.equal(expected[name], actual[name])] == []


def test_light_costs_at_most_8_per_cent_more_multiplications():
    from torch.utils.flop_counter import FlopCounterMode

    macs = {}
    for recompute in ("none", "light"):
        network = build_network(num_classes=19, backbone="eca_resnet101", recompute=recompute)
        with FlopCounterMode(display=False) as counter:
            outputs = network(torch.randn(1, 3, 33, 33))
            sum(logits.sum() for logits in outputs.values()).backward()
        macs[recompute] = counter.get_total_flops()
    assert 1 < macs["light"] / macs["none"] <= 1.08


@pytest.mark.parametrize("error", [
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB",
    "CUDA error: out of memory", "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED", "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"])
def test_every_way_of_running_out_is_recognized(error):
    assert is_out_of_memory(error)
    assert not is_out_of_memory("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`")


class LiveTensors(TorchDispatchMode):
    """The most bytes of tensors that were made inside this context and alive at once."""

    def __init__(self):
        super().__init__()
        self.alive, self.most = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **kwargs or {})
        for storage in (one.untyped_storage() for one in tree_leaves(made) if isinstance(one, torch.Tensor)):
            self.alive[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        self.alive = {key: kept for key, kept in self.alive.items() if not kept[0].expired()}
        self.most = max(self.most, sum(size for _, size in self.alive.values()))
        return made


@pytest.mark.parametrize("backbone", ["eca_resnet18", "eca_resnet50"])
def test_a_pass_takes_at_least_what_is_said(backbone):
    network = fold_norms(build_network("acfnet_resnet", 19, backbone))
    a_pixel, maps = measure_forward_pass(network, torch.device("cpu"))
    with LiveTensors() as live, torch.no_grad():
        network(torch.zeros(1, 3, 257, 257))
    assert maps == 38 and 0.25 < a_pixel * 257 ** 2 / live.most <= 1
    assert 0.4 < measure_forward_pass(network, torch.device("cpu"), torch.bfloat16)[0] / a_pixel < 0.7


def test_free_memory_is_that_of_the_machine():
    assert 10e6 < free_bytes(torch.device("cpu")) < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
