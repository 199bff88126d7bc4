"""The kernels of in-place norms: those of PyTorch, or on a GPU those of the `inplace_abn` package."""

import functools
import importlib

import torch

from utils.common.errors import UserError

CHOICES = ("auto", "torch", "package")


def set_backend(network, choice):
    """Choose the kernels of all in-place norms of a network.

    Args:
        network: nn.Module.
        choice: `torch`; `package`; or `auto`, as norms are made: the package on a GPU in float16 or float32, if it is
            installed, no statistics are shared and nothing is recomputed, else PyTorch.

    Raises:
        ValueError: another choice.
        RuntimeError: `package`, which cannot be imported.
    """
    if choice not in CHOICES:
        raise ValueError(f"backend: expected one of {', '.join(CHOICES)}, found {choice!r}")
    if choice == "package" and package() is None:
        raise RuntimeError("backend package: expected the package inplace_abn (libs/requirements-extensions.txt), "
                           "found none that imports")
    for module in network.modules():
        if hasattr(module, "backend"):
            module.backend = choice


def check(choice, *, amp, recompute, shared):
    """Raise `UserError` for a training that the package cannot run, or if it is not installed.

    Args:
        choice: the value of --abn-backend.
        amp: mixed precision, as `--amp`.
        recompute: as `--recompute`.
        shared: whether several devices share a batch.
    """
    if choice != "package":
        return
    if package() is None:
        raise UserError("--abn-backend package: expected the package inplace_abn (libs/requirements-extensions.txt), "
                        "found none that imports")
    conflicts = ([f"--amp {amp}"] * (amp == "bf16") + [f"--recompute {recompute}"] * (recompute != "none")
                 + ["several devices"] * shared)
    if conflicts:
        raise UserError("--abn-backend package: expected --amp off or fp16, no --recompute and one device, found "
                        f"{', '.join(conflicts)}; --abn-backend torch does this")


@functools.cache
def package():
    """The function `inplace_abn` of the package, or None if it cannot be imported."""
    try:
        return importlib.import_module("inplace_abn.functions").inplace_abn
    except Exception:  # noqa: BLE001, a broken extension raises anything when it is loaded
        return None


def describe(choice):
    """One sentence: the kernels that in-place norms with this choice use."""
    if choice == "torch":
        return "in-place norms run on PyTorch's own kernels"
    if package() is None:
        return "in-place norms run on PyTorch's own kernels (the package inplace_abn is not installed; not needed)"
    if choice == "package":
        return "in-place norms run on the kernels of the package inplace_abn"
    return ("in-place norms run on the kernels of the package inplace_abn on a GPU in float16 and float32 where "
            "nothing is shared between devices, and on PyTorch's own otherwise")


def uses_package(choice, x, settings, shared, recomputed):
    """Whether a layer runs on the kernels of the package. Raises RuntimeError if it must and cannot.

    Args:
        choice: of the layer, one of `CHOICES`.
        x: its input.
        settings: `libs.functions.Settings`.
        shared: whether statistics are shared with other devices.
        recomputed: whether the layer is inside a checkpoint.
    """
    if choice == "torch" or (choice == "auto" and not x.is_cuda):
        return False
    supported = (x.dtype != torch.bfloat16 and not shared and not recomputed and not settings.keep_input
                 and (x.is_cuda or x.dtype != torch.float16))
    if choice == "package" and not supported:
        raise RuntimeError("backend package: expected float32 (on a GPU also float16), statistics of one device and "
                           f"no checkpoint, found {x.dtype} on {x.device}{', shared' * shared}"
                           f"{', recomputed' * recomputed}; the backend torch does this")
    return supported and package() is not None
