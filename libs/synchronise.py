"""Statistics of the whole batch, whoever holds its parts.

Each part gives its count, mean and centred second moment; Chan, Golub, LeVeque, "Updating formulae and a
pairwise algorithm for computing sample variances", 1979, combines them. There are two settings: processes of
torch.distributed, and threads of `utils.distributed.run_replicas`.
"""

import torch
import torch.distributed as dist

from utils.distributed import current_replica


def combine(counts, means, moments):
    """counts (P,), means and centred second moments (P, C) of P parts → count (), mean (C,), moment (C,)."""
    count = counts.sum()
    shares = (counts / count)[:, None]                                                     # (P, 1)
    mean = (shares * means).sum(0)
    return count, mean, moments.sum(0) + (counts[:, None] * (means - mean) ** 2).sum(0)


class Processes:
    """Exchange within a process group."""

    def __init__(self, group):
        self.group = group

    def statistics(self, packed):
        """packed (1 + 2C,) float64: count, mean, moment of this part → (P, 1 + 2C) of all."""
        gathered = [torch.empty_like(packed) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(gathered, packed, group=self.group)
        return torch.stack(gathered)

    def total(self, sums):
        """Sum a tensor over all parts."""
        sums = sums.clone()
        dist.all_reduce(sums, group=self.group)
        return sums


class Replicas:
    """Exchange between threads of one process, as far as values go.

    Their gradients meet in the autograd graph (`libs.functions.Gather`), so that the backward pass, which may
    run all of them in one thread, waits for nobody.
    """

    def __init__(self, group, rank):
        self.group, self.rank = group, rank

    def statistics(self, packed):
        return torch.stack([other.to(packed.device) for other in self.group.exchange(self.rank, packed)])

    def share(self, token):
        """A tensor of this part → those of all parts."""
        return self.group.exchange(self.rank, token)


def find_exchange(x, group=None, is_replica=False):
    """How a layer whose input is `x` reaches the other parts of the batch; None when there are none.

    Args:
        x: the input.
        group: process group; None for the default one, looked up now.
        is_replica: the layer is a copy that `nn.DataParallel` made.

    Raises RuntimeError where synchronisation is asked for and cannot be had.
    """
    replica = current_replica()
    if replica is not None:
        return Replicas(*replica) if replica[0].size > 1 else None
    if is_replica:
        raise RuntimeError("InPlaceABNSync: expected utils.distributed.DataParallel around the module, found "
                           "nn.DataParallel, whose replicas cannot exchange statistics")
    if not (dist.is_available() and dist.is_initialized()):
        if group is not None:
            raise RuntimeError("InPlaceABNSync: expected torch.distributed to be initialised for the given group, "
                               "found that it is not")
        return None
    if dist.get_world_size(group) == 1:
        return None
    if dist.get_backend(group) == "nccl" and x.device.type != "cuda":
        raise RuntimeError(f"InPlaceABNSync: expected tensors on a GPU for the backend nccl, found {x.device}")
    return Processes(group)
