"""Why a GPU that is there cannot be used: said from what the driver and this PyTorch tell of themselves."""

import os
import re
from pathlib import Path

import torch

# Lowest driver for each CUDA (NVIDIA, "CUDA Compatibility", minor version compatibility).
DRIVERS = {11: 450, 12: 525, 13: 580}


def unusable_gpu(proc="/proc/driver/nvidia", dev="/dev", cuda=torch.version.cuda, torch_version=torch.__version__):
    """A sentence's part about an NVIDIA GPU that PyTorch does not see; None where there is none, or it was hidden.

    proc, dev: where the driver tells its version, and has its devices. cuda: that PyTorch is built for, or None.
    """
    found = re.search(r"Kernel Module.*?\s((\d+)\.[\d.]+)\s", _read(Path(proc, "version")))
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if found is None or hidden or not any(Path(dev).glob("nvidia[0-9]*")):
        return None
    driver, major = found[1], int(found[2])
    fits = max((version for version, lowest in DRIVERS.items() if lowest <= major), default=None)
    instead = f"a PyTorch built for CUDA {fits}" if fits else f"driver {min(DRIVERS.values())} or newer"
    if cuda is None:
        return f"a GPU with driver {driver}, and PyTorch {torch_version} built for the CPU alone; install {instead}"
    needed = DRIVERS.get(int(cuda.split(".")[0]), max(DRIVERS.values()))
    if major < needed:
        also = f", or {instead}" if fits else ""
        return (f"a GPU with driver {driver}, and PyTorch {torch_version} built for CUDA {cuda}, which needs driver "
                f"{needed} or newer; install that{also}")
    return (f"a GPU with driver {driver} that PyTorch {torch_version}, built for CUDA {cuda}, cannot use though the "
            "driver is new enough; see whether nvidia-smi can, and restart or reinstall the driver")


def _read(path):
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
