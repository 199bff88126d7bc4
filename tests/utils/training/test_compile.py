"""`--compile`: whole graphs, and what they keep. PyTorch runs AOTAutograd's graphs itself, so that nothing is built."""

import copy

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._decomp import core_aten_decompositions
from torch._dynamo.backends.common import aot_autograd

from networks.build import build_network
from utils.common.compat import COMPILER, torch_version
from utils.training.engine import compile_network


class Graphs:
    """A backend that notes the forward and backward graphs it is given."""

    def __init__(self):
        self.seen = []
        self.backend = aot_autograd(fw_compiler=self.note("forward"), bw_compiler=self.note("backward"),
                                    partition_fn=min_cut_rematerialization_partition,
                                    decompositions=core_aten_decompositions())     # of norms, as Inductor has them

    def note(self, kind):
        def compiler(graph, inputs):
            self.seen.append(kind)
            return make_boxed_func(graph.forward)
        return compiler


def step(network, images):
    """Loss, bytes kept for the backward pass besides the weights, gradients and statistics of one training step."""
    weights = {t.untyped_storage().data_ptr() for t in [*network.parameters(), *network.buffers(), images]}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = network(images)
    loss = sum(logits.square().mean() for logits in outputs.values())
    kept = sum(kept.values())
    loss.backward()
    return loss.detach(), kept, {**{key: p.grad for key, p in network.named_parameters()},
                                 **{key: b.float() for key, b in network.named_buffers()}}


@pytest.mark.skipif(torch_version() < COMPILER, reason="older compilers keep more, and break the graph")
def test_the_default_norm_compiles_to_one_graph_each_way():
    """Loss, gradients and statistics as without compilation; at most 1.2 times the bytes that are kept in place.

    In float64: in float32 a value next to 0 may change sign when it is computed again, and its activation with it.
    """
    plain, graphs = build_network("acfnet_resnet", 5, "eca_resnet18").double(), Graphs()
    for module in plain.modules():
        if isinstance(module, torch.nn.Dropout2d):
            module.p = 0.0
    compiled = copy.deepcopy(plain)
    compile_network(compiled, backend=graphs.backend, fullgraph=True)
    images = torch.randn(2, 3, 65, 65, dtype=torch.float64)
    expected, actual = (step(network, images) for network in (plain, compiled))
    assert graphs.seen == ["forward", "backward"]
    assert actual[1] <= 1.2 * expected[1]
    torch.testing.assert_close(actual[0], expected[0])
    for key, value in expected[2].items():
        assert (actual[2][key] - value).norm() <= 1e-9 * value.norm() + 1e-12, key
