"""Statistics of the whole batch, whoever holds its parts.

Each part gives its count, mean and centered second moment; Chan, Golub, LeVeque, "Updating formulae and a
pairwise algorithm for computing sample variances", 1979, combines them. There are two settings: processes of
torch.distributed, and threads of `utils.parallel.replicas.run_replicas`.
"""

import torch.distributed as dist

from utils.parallel.processes import find_peers
from utils.parallel.replicas import current_replica


def combine(counts, means, moments):
    """counts (P,), means and centered second moments (P, C) of P parts → count (), mean (C,), moment (C,)."""
    count = counts.sum()
    shares = (counts / count)[:, None]                                                     # (P, 1)
    mean = (shares * means).sum(0)
    return count, mean, moments.sum(0) + (counts[:, None] * (means - mean) ** 2).sum(0)


def find_exchange(x, group=None, is_replica=False):
    """`Processes` or `Replicas` by which a layer whose input is `x` reaches the other parts of the batch, or None.

    Gradients of replicas meet in the autograd graph (`libs.functions.Gather`), so that the backward pass, which may
    run all of them in one thread, waits for nobody.

    Args:
        x: the input.
        group: process group; None for the default one, looked up now.
        is_replica: the layer is a copy that `nn.DataParallel` made.

    Raises RuntimeError where synchronization is asked for and cannot be had.
    """
    if current_replica() is None:
        if is_replica:
            raise RuntimeError("InPlaceABNSync: expected utils.parallel.replicas.DataParallel around the module, found "
                               "nn.DataParallel, whose replicas cannot exchange statistics")
        ready = dist.is_available() and dist.is_initialized()
        if group is not None and not ready:
            raise RuntimeError("InPlaceABNSync: expected torch.distributed to be initialized for the given group, "
                               "found that it is not")
        if ready and dist.get_backend(group) == "nccl" and x.device.type != "cuda":
            raise RuntimeError(f"InPlaceABNSync: expected tensors on a GPU for the backend nccl, found {x.device}")
    return find_peers(group)
