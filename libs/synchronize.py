"""Statistics of a batch whose parts are in several processes or threads.

Count, mean and centered second moment of each part are combined as in Chan, Golub, LeVeque, "Updating formulae and a
pairwise algorithm for computing sample variances", 1979. The processes are those of torch.distributed, the threads
those of `utils.parallel.replicas.run_replicas`.
"""

import torch.distributed as dist

from utils.parallel.processes import find_peers
from utils.parallel.replicas import current_replica


def combine(counts, means, moments):
    """Combine the statistics of P parts of a batch.

    Args:
        counts: (P,), values per channel.
        means: (P, C).
        moments: (P, C), centered second moments: sums of squared distances from the mean of the part.

    Returns:
        (count (), mean (C,), moment (C,)) of the batch.
    """
    count = counts.sum()
    shares = (counts / count)[:, None]                                                     # (P, 1)
    mean = (shares * means).sum(0)
    return count, mean, moments.sum(0) + (counts[:, None] * (means - mean) ** 2).sum(0)


def find_norm_peers(x, group=None, is_replica=False):
    """Find the `Processes` or `Replicas` that share a batch with a norm; None if the batch is not shared.

    Replicas exchange gradients through the autograd graph (`libs.functions.Gather`). The backward pass may run all of
    them in one thread, so none of them may wait for another there.

    Args:
        x: input of the norm.
        group: process group, looked up now; None for the default one.
        is_replica: whether the norm is a copy made by `nn.DataParallel`.

    Raises:
        RuntimeError: if the parts of a batch cannot exchange statistics.
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
