"""`--compile`: whole graphs, and what they keep. PyTorch runs AOTAutograd's graphs itself, so that nothing is built."""

import copy
import json
from pathlib import Path

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._decomp import core_aten_decompositions
from torch._dynamo.backends.common import aot_autograd
from torch.nn.parallel import DistributedDataParallel

from libs.abn import set_group
from networks.build import build_network
from tests.conftest import in_processes, shorten
from utils.common.compat import COMPILER, no_buffer_sync, torch_version
from utils.devices.compilation import compile_network
from utils.parallel.launch import new_group


class Graphs:
    """A backend that notes the forward and backward graphs it is given.

    Args:
        **options: of `aot_autograd`.
    """

    def __init__(self, **options):
        self.seen = []
        self.backend = aot_autograd(fw_compiler=self.note("forward"), bw_compiler=self.note("backward"), **options)

    def note(self, kind):
        def compiler(graph, inputs):
            self.seen.append(kind)
            return make_boxed_func(graph.forward)
        return compiler


def step(network, images, module=None):
    """Loss, bytes kept for the backward pass besides the weights, gradients and statistics of one training step.

    `module` is what to call instead of the network.
    """
    weights = {t.untyped_storage().data_ptr() for t in [*network.parameters(), *network.buffers(), images]}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = (module or network)(images)
    loss = sum(logits.square().mean() for logits in outputs.values())
    kept = sum(kept.values())
    loss.backward()
    return loss.detach(), kept, {**{key: p.grad for key, p in network.named_parameters()},
                                 **{key: b.float() for key, b in network.named_buffers()}}


def small_network(backbone, norm="inplace_abn"):
    """In float64, without dropout, and of one block per stage: each block is traced anew.

    In float32 a value next to 0 may change sign when it is computed again, and its activation with it.
    """
    with shorten(backbone):
        network = build_network("acfnet_resnet", 5, backbone, norm=norm).double()
    for module in network.modules():
        if isinstance(module, torch.nn.Dropout2d):
            module.p = 0.0
    return network


@pytest.mark.skipif(torch_version() < COMPILER, reason="older compilers keep more, and break the graph")
def test_the_default_norm_compiles_to_one_graph_each_way():
    """Loss, gradients and statistics as without compilation; at most 1.2 times the bytes that are kept in place."""
    plain = small_network("eca_resnet18")
    graphs = Graphs(partition_fn=min_cut_rematerialization_partition,
                    decompositions=core_aten_decompositions())      # of norms, as Inductor has them
    compiled = copy.deepcopy(plain)
    compile_network(compiled, backend=graphs.backend, fullgraph=True)
    images = torch.randn(2, 3, 65, 65, dtype=torch.float64)
    expected, actual = (step(network, images) for network in (plain, compiled))
    assert graphs.seen == ["forward", "backward"]
    assert actual[1] <= 1.2 * expected[1]
    assert_equal_step(actual, expected)


def assert_equal_step(actual, expected):
    torch.testing.assert_close(actual[0], expected[0])
    for key, value in expected[2].items():
        assert (actual[2][key] - value).norm() <= 1e-10 * value.norm() + 1e-12, key


CASES = (("eca_resnet18", "inplace_abn", (1, 3)), ("eca_resnet50", "bn", (2, 2)))


def compare_in_process(rank, folder):
    """Save the graphs of a process, after its steps with and without compilation were compared."""
    seen = []
    for backbone, norm, counts in CASES:
        torch.manual_seed(0)
        plain, graphs = small_network(backbone, norm), Graphs()
        set_group(plain, new_group())
        compiled = copy.deepcopy(plain)
        compile_network(compiled, backend=graphs.backend, fullgraph=True)
        images = torch.randn(sum(counts), 3, 33, 33, dtype=torch.float64).split(counts)[rank]
        expected, actual = (step(network, images, DistributedDataParallel(network, **no_buffer_sync()))
                            for network in (plain, compiled))
        assert_equal_step(actual, expected)
        seen.append(graphs.seen)
    Path(folder, f"{rank}.json").write_text(json.dumps(seen))


@pytest.mark.skipif(torch_version() < COMPILER, reason="older compilers break the graph")
def test_norms_among_processes_compile_to_one_graph_each_way(tmp_path):
    """Gradients and statistics of two processes as without compilation, also if their parts differ in size."""
    in_processes(compare_in_process, str(tmp_path))
    for rank in range(2):
        assert json.loads(Path(tmp_path, f"{rank}.json").read_text()) == [["forward", "backward"]] * len(CASES)
