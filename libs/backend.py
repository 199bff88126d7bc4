"""Choice of the kernels of in-place norms: PyTorch's, or those of the `inplace_abn` package."""

import functools
import importlib

import torch

from utils.common.errors import UserError

CHOICES = ("auto", "torch", "package")


def check(choice, *, amp, recompute, shared):
    """Check whether the package supports a training run, if it is chosen.

    Args:
        choice, amp, recompute: values of --abn-backend, --amp and --recompute.
        shared: whether several devices share each batch.

    Raises:
        UserError: if the package does not support the run, or cannot be imported.
    """
    if choice != "package":
        return
    if package() is None:
        raise UserError("--abn-backend package: expected the package inplace_abn (libs/requirements-extensions.txt), "
                        "found that it cannot be imported")
    conflicts = ([f"--amp {amp}"] * (amp == "bf16") + [f"--recompute {recompute}"] * (recompute != "none")
                 + ["several devices"] * shared)
    if conflicts:
        raise UserError("--abn-backend package: expected --amp off or fp16, no --recompute and one device, found "
                        f"{', '.join(conflicts)}; --abn-backend torch supports this")


@functools.cache
def package():
    """Return the function `inplace_abn` of the package, or None if it cannot be imported."""
    try:
        return importlib.import_module("inplace_abn.functions").inplace_abn
    except Exception:  # noqa: BLE001, loading a broken extension can raise any error
        return None


def describe(choice):
    """Describe the kernels that in-place norms use with this choice, in one sentence."""
    if choice == "torch":
        return "in-place norms use PyTorch's kernels"
    if package() is None:
        return "in-place norms use PyTorch's kernels (the optional package inplace_abn is not installed)"
    if choice == "package":
        return "in-place norms use the kernels of the package inplace_abn"
    return ("in-place norms use the kernels of the package inplace_abn on a GPU in float16 and float32 if no "
            "statistics are shared, otherwise PyTorch's kernels")


def uses_package(choice, x, settings, shared, recomputed):
    """Whether a layer uses the kernels of the package in this forward pass.

    Args:
        choice: of the layer, one of `CHOICES`.
        x: input of the layer.
        settings: `libs.functions.Settings`.
        shared: whether statistics are shared with other devices.
        recomputed: whether the layer is inside a checkpoint.

    Raises:
        RuntimeError: if the choice is `package`, and the package does not support this forward pass.
    """
    if choice == "torch" or (choice == "auto" and not x.is_cuda):
        return False
    supported = (x.dtype != torch.bfloat16 and not shared and not recomputed and not settings.keep_input
                 and (x.is_cuda or x.dtype != torch.float16))
    if choice == "package" and not supported:
        raise RuntimeError("backend package: expected float32 (on a GPU also float16), statistics of one device and "
                           f"no checkpoint, found {x.dtype} on {x.device}{', shared' * shared}"
                           f"{', recomputed' * recomputed}; the backend torch supports this")
    return supported and package() is not None
