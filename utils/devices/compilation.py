"""Compilation of a network by torch.compile."""

import torch

from ..common.compat import COMPILER, torch_version
from ..common.errors import UserError
from ..common.messages import logger

# Memory that compiled code may keep for the backward pass, as a share of what it keeps without recomputation.
COMPILED_BUDGET = 0.8


def compile_network(network, **options):
    """Compile a network in place, as `nn.Module.compile` does. Dropout draws the same numbers as without.

    By default the compiler keeps the input and the output of a norm, half as much again as in-place norms keep. With a
    memory budget (`activation_memory_budget`, PyTorch 2.4 and newer), it recomputes norms and activations, but no
    convolution, and keeps less than in-place norms.

    Args:
        network: nn.Module.
        **options: of `nn.Module.compile`.
    """
    import torch._dynamo.config  # here, because the import takes seconds
    import torch._functorch.config
    import torch._inductor.config

    # One graph, so that no map is kept or copied at its borders. PyTorch would split it at the buckets of
    # DistributedDataParallel, whose exchange of gradients now begins after the backward pass.
    torch._dynamo.config.optimize_ddp = False
    torch._functorch.config.activation_memory_budget = COMPILED_BUDGET
    torch._inductor.config.fallback_random = True
    network.compile(**options)
    logger.info("the network is compiled in the first step, which takes minutes")


def check_compile(*, devices, parallel, recompute, amp):
    """Check whether --compile can work.

    Args:
        devices: of this process.
        parallel, recompute, amp: values of the flags.

    Raises:
        UserError: if it cannot.
    """
    if len(devices) > 1 and parallel == "dp":
        raise UserError("--compile: expected one GPU or --parallel ddp, found several GPUs with --parallel dp, whose "
                        "replicas cannot share compiled code")
    if recompute != "none":
        raise UserError(f"--compile: expected --recompute none with it, found {recompute}, which cannot be "
                        "compiled; the compiler itself chooses what to recompute")
    if amp == "apex":
        raise UserError("--compile: expected --amp off, bf16 or fp16 with it, found apex, which replaces functions and "
                        "was not tested with compiled code")
    if torch_version() < COMPILER:
        raise UserError(f"--compile: expected PyTorch {'.'.join(map(str, COMPILER))} or newer, found "
                        f"{torch.__version__}, which was not tested with --compile, or updates running statistics "
                        "twice")
