"""Why a GPU that is there cannot be used: said from what the driver and this PyTorch tell of themselves."""

import os
import platform
import re
from pathlib import Path

import torch

from ..common.limits import read_system_file

# Lowest driver for each CUDA (NVIDIA, "CUDA Compatibility", minor version compatibility).
DRIVERS = {11: 450, 12: 525, 13: 580}


def unusable_gpu(proc="/proc/driver/nvidia", dev="/dev", cuda=torch.version.cuda, torch_version=torch.__version__):
    """A sentence's part about an NVIDIA GPU that PyTorch does not see; None where there is none, or it was hidden.

    proc, dev: where the driver tells its version, and has its devices. cuda: that PyTorch is built for, or None.
    """
    loaded = re.search(r"Kernel Module.*?\s((\d+)\.[\d.]+)\s", read_system_file(Path(proc, "version")))
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if loaded is None or hidden or not any(Path(dev).glob("nvidia[0-9]*")):
        return None
    driver, major = loaded[1], int(loaded[2])
    fits = max((version for version, lowest in DRIVERS.items() if lowest <= major), default=None)
    instead = f"a PyTorch built for CUDA {fits}" if fits else f"driver {min(DRIVERS.values())} or newer"
    if cuda is None:
        also = "" if fits else " and a PyTorch built for CUDA"
        return (f"a GPU with driver {driver}, and PyTorch {torch_version} built for the CPU alone; install {instead}"
                f"{also}")
    needed = DRIVERS.get(int(cuda.split(".")[0]))
    if needed is None:
        return (f"a GPU with driver {driver} that PyTorch {torch_version}, built for CUDA {cuda}, cannot use; which "
                f"driver CUDA {cuda} needs is not known here: see NVIDIA's list, or install {instead}")
    if major < needed:
        also = f", or {instead}" if fits else ""
        return (f"a GPU with driver {driver}, and PyTorch {torch_version} built for CUDA {cuda}, which needs driver "
                f"{needed} or newer; install that{also}")
    return (f"a GPU with driver {driver} that PyTorch {torch_version}, built for CUDA {cuda}, cannot use though the "
            "driver is new enough; see whether nvidia-smi can, and restart or reinstall the driver")


def lacks_kernels(name, capability, archs, torch_version=torch.__version__, cuda=torch.version.cuda):
    """A sentence's part about a GPU for which PyTorch was not built; None where it was, or nobody knows.

    capability: (major, minor). archs: those that PyTorch was built for, as "sm_80" or "compute_90"; none of these in a
    build for the CPU or ROCm.
    """
    built = [(kind, (int(major), int(minor)), limit) for kind, major, minor, limit in
             re.findall(r"\b(sm|compute)_(\d+)(\d)([af]?)\b", " ".join(archs))]

    def serves(kind, version, limit):
        if limit == "a":        # made for this one alone
            return version == capability
        return version <= capability and (version[0] == capability[0] or (kind == "compute" and not limit))

    if not built or any(serves(*one) for one in built):
        return None
    if capability < (5, 0):
        instead = "PyTorch 2.4 and newer have none for it"
    elif capability < (7, 5) and platform.machine() == "x86_64":
        instead = "install PyTorch 2.14 or older built for CUDA 12.6, which still has Maxwell, Pascal and Volta"
    elif capability < min(version for _, version, _ in built):
        instead = "build PyTorch for it from source"
    else:
        instead = "install a newer PyTorch"
    return (f"{name} of compute capability {capability[0]}.{capability[1]}, and PyTorch {torch_version} built for CUDA "
            f"{cuda} with kernels for {', '.join(archs)}; {instead}")
