"""Reasons why PyTorch cannot use a GPU: the versions of driver, CUDA and PyTorch, and missing kernels."""

import os
import platform
import re
from pathlib import Path

import torch

from ..common.limits import read_system_file

# Oldest driver for each major version of CUDA (NVIDIA, "CUDA Compatibility", minor version compatibility).
DRIVERS = {11: 450, 12: 525, 13: 580}


def unusable_gpu(proc="/proc/driver/nvidia", dev="/dev", cuda=torch.version.cuda, torch_version=torch.__version__):
    """Describe why PyTorch does not see an NVIDIA GPU.

    Args:
        proc: folder of the driver's version file.
        dev: folder of the driver's devices.
        cuda: version that PyTorch is built for, or None.
        torch_version: version of PyTorch.

    Returns:
        A phrase for an error message; None if the machine has no such GPU, or CUDA_VISIBLE_DEVICES hides it.
    """
    loaded = re.search(r"Kernel Module.*?\s((\d+)\.[\d.]+)\s", read_system_file(Path(proc, "version")))
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if loaded is None or hidden or not any(Path(dev).glob("nvidia[0-9]*")):
        return None
    driver, major = loaded[1], int(loaded[2])
    newest = max((version for version, oldest in DRIVERS.items() if oldest <= major), default=None)
    instead = f"a PyTorch built for CUDA {newest}" if newest else f"driver {min(DRIVERS.values())} or newer"
    if cuda is None:
        also = "" if newest else " and a PyTorch built for CUDA"
        return (f"a GPU with driver {driver}, and PyTorch {torch_version} built for the CPU only; install {instead}"
                f"{also}")
    needed = DRIVERS.get(int(cuda.split(".")[0]))
    if needed is None:
        return (f"a GPU with driver {driver} that PyTorch {torch_version}, built for CUDA {cuda}, cannot use; for "
                f"the driver that CUDA {cuda} needs see NVIDIA's list, or install {instead}")
    if major < needed:
        also = f", or {instead}" if newest else ""
        return (f"a GPU with driver {driver}, and PyTorch {torch_version} built for CUDA {cuda}, which needs driver "
                f"{needed} or newer; install that{also}")
    return (f"a GPU with driver {driver} that PyTorch {torch_version}, built for CUDA {cuda}, cannot use although "
            "the driver is new enough; check whether nvidia-smi works, and restart or reinstall the driver")


def missing_kernels(name, capability, archs, torch_version=torch.__version__, cuda=torch.version.cuda):
    """Describe a GPU for which PyTorch has no kernels.

    Args:
        name: of the GPU.
        capability: compute capability, (major, minor).
        archs: architectures that PyTorch was built for, such as "sm_80" or "compute_90"; a build for the CPU or ROCm
            has none of this form.
        torch_version: version of PyTorch.
        cuda: version that PyTorch is built for, or None.

    Returns:
        A phrase for an error message; None if PyTorch has kernels, or if the architectures are unknown.
    """
    built = [(kind, (int(major), int(minor)), limit) for kind, major, minor, limit in
             re.findall(r"\b(sm|compute)_(\d+)(\d)([af]?)\b", " ".join(archs))]

    def supports(kind, version, limit):
        if limit == "a":        # only for exactly this capability
            return version == capability
        return version <= capability and (version[0] == capability[0] or (kind == "compute" and not limit))

    if not built or any(supports(*arch) for arch in built):
        return None
    if capability < (5, 0):
        instead = "PyTorch 2.4 and newer have none for this GPU"
    elif capability < (7, 5) and platform.machine() == "x86_64":
        instead = "install PyTorch 2.14 or older built for CUDA 12.6, which still has Maxwell, Pascal and Volta"
    elif capability < min(version for _, version, _ in built):
        instead = "build PyTorch for this GPU from source"
    else:
        instead = "install a newer PyTorch"
    return (f"{name} of compute capability {capability[0]}.{capability[1]}, and PyTorch {torch_version} built for CUDA "
            f"{cuda} with kernels for {', '.join(archs)}; {instead}")
