"""Whether Triton's kernels can be used, and what is said about it."""

import pytest
import torch

from libs import backend
from libs.fused import launch
from utils.common.errors import UserError

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
RUN = {"norm": "inplace_abn", "amp": "bf16", "recompute": "none", "compiled": False, "shared": False,
       "replicas": False, "channels_last": True}


@pytest.fixture
def obstacle():
    """`launch.obstacle`, which asks again with each call."""
    return launch.obstacle.__wrapped__


def test_kernels_that_agree_can_be_used(obstacle, launches, large_tiles):
    state = torch.random.get_rng_state()
    assert obstacle(CPU) is None and len(launches) == 14
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("operator, kernel, position, clause", [
    ("norm", "elements_kernel", 7, "dL/dx of norm in float32 differs from PyTorch's by "),
    ("block_end", "attention_gradient_kernel", 8, "dL/dx of block_end in float32 differs from PyTorch's by ")])
def test_kernels_that_disagree_are_not_used(operator, kernel, position, clause, obstacle, launches, large_tiles,
                                            monkeypatch):
    """One of the vectors that a kernel reads, the sums or the gradient of the logit, is wrong by one percent."""
    start = launch.start

    def start_wrongly(function, grid, arguments, constants):
        if function.fn.__name__ == kernel:
            arguments[position].mul_(1.01)
        start(function, grid, arguments, constants)

    monkeypatch.setattr(launch, "start", start_wrongly)
    monkeypatch.setattr(launch, "OPERATORS", (operator,))
    assert obstacle(CPU).startswith(clause)


def test_what_fails_is_said(obstacle, monkeypatch):
    pytest.importorskip("triton", reason="Triton is not installed")

    def fail(*arguments):
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")

    monkeypatch.setattr(launch, "start", fail)
    assert obstacle(CPU) == "a call of Triton's kernels failed (RuntimeError: Failed to find C compiler.)"


def test_devices_without_kernels(obstacle, monkeypatch):
    assert obstacle(GPU) == "TRITON_INTERPRET=1 runs Triton's kernels on the CPU"
    monkeypatch.delenv("TRITON_INTERPRET")
    assert obstacle(CPU) == "there is no GPU of CUDA"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert obstacle(GPU).startswith("the GPU is older" if launch.find_triton() else "Triton is not installed")
    monkeypatch.setattr(launch, "find_triton", lambda: False)
    assert obstacle(GPU) == "Triton is not installed"


@pytest.mark.parametrize("flag, reason, options, choice, words", [
    ("auto", None, {}, "triton", "norms and the ends of residual blocks use Triton's kernels"),
    ("triton", None, {}, "triton", "norms and the ends of residual blocks use Triton's kernels"),
    ("auto", "it rains", {}, "auto", "; without Triton's kernels, which save memory traffic: it rains"),
    ("auto", None, {"compiled": True}, "auto", ": --compile cannot be combined with them"),
    ("auto", "it rains", {"norm": "bn"}, "torch", "without Triton's kernels, which save memory traffic: it rains"),
    ("torch", None, {}, "torch", "in-place norms use PyTorch's kernels")])
def test_the_choice_on_a_gpu(flag, reason, options, choice, words, monkeypatch):
    monkeypatch.setattr(backend, "package", lambda: None)
    monkeypatch.setattr(backend, "obstacle", lambda device: reason)
    actual, sentence = backend.choose(flag, GPU, **RUN | options)
    assert actual == choice and sentence.endswith(words)


def test_the_choice_on_a_cpu(monkeypatch):
    """The interpreter is for tests that choose it."""
    monkeypatch.setattr(backend, "package", lambda: None)
    monkeypatch.setattr(backend, "obstacle", lambda device: None)
    assert backend.choose("auto", CPU, **RUN) == ("auto", "in-place norms use PyTorch's kernels")
    assert backend.choose("auto", CPU, **RUN | {"norm": "bn"}) == ("torch", None)
    assert backend.choose("triton", CPU, **RUN)[0] == "triton"


@pytest.mark.parametrize("options, words", [
    ({"amp": "apex"}, "--amp apex"), ({"compiled": True}, "--compile"), ({"replicas": True}, "--parallel dp"),
    ({"channels_last": False, "amp": "apex"}, "--amp apex, --no-channels-last")], ids=str)
def test_what_cannot_be_combined_is_refused(options, words):
    with pytest.raises(UserError, match=f"--kernels triton: expected .*, found {words}; --kernels torch supports"):
        backend.check("triton", **RUN | options)


def test_kernels_that_cannot_be_used_are_refused(monkeypatch):
    monkeypatch.setattr(backend, "obstacle", lambda device: "it rains")
    with pytest.raises(UserError, match="--kernels triton: expected a GPU .*, found that it rains; --kernels torch"):
        backend.choose("triton", GPU, **RUN)
