"""Seeds and states of the random generators of the CPU and the devices."""

import random

import numpy as np
import torch


def seed_generators(seed):
    """Seed all random generators of this process."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2 ** 32)


def random_state(devices=()):
    """Return the states of all random generators of this process and its CUDA devices as plain values."""
    kind, keys, *rest = np.random.get_state()
    return {"torch": torch.get_rng_state(), "python": random.getstate(),
            "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), *rest],
            "cuda": [torch.cuda.get_rng_state(device) for device in devices if device.type == "cuda"]}


def set_random_state(state, devices=()):
    """Restore states of `random_state`, which must be of the same number of devices."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    for device, cuda_state in zip((d for d in devices if d.type == "cuda"), state["cuda"], strict=True):
        torch.cuda.set_rng_state(cuda_state, device)
