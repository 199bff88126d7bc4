"""Whose kernels the in-place norms run on: PyTorch's, or those of the `inplace_abn` package on CUDA."""

import importlib

import torch

from utils.common.errors import UserError

CHOICES = ("auto", "torch", "package")
_choice = "auto"
_package = None


def choose(name):
    """Set the backend of all in-place norms: `auto`, `torch` or `package`.

    `auto` takes the package on a GPU, where it is installed and right: float16 or float32, no statistics to
    share, nothing to recompute. Raises RuntimeError if `package` is asked for and does not import.
    """
    global _choice
    if name not in CHOICES:
        raise ValueError(f"backend: expected one of {', '.join(CHOICES)}, found {name!r}")
    if name == "package" and package() is None:
        raise RuntimeError("backend package: expected the package inplace_abn (libs/requirements-extensions.txt), "
                           "found none that imports")
    _choice = name


def check(amp, recompute, shared):
    """Refuse a training that the package was asked for and cannot do: raises `UserError`.

    amp: mixed precision, as `--amp`; recompute: as `--recompute`; shared: over several devices.
    """
    found = [f"--amp {amp}"] * (amp == "bf16") + [f"--recompute {recompute}"] * (recompute != "none") \
        + ["several devices"] * shared
    if _choice == "package" and found:
        raise UserError("--abn-backend package: expected --amp off or fp16, no --recompute and one device, found "
                        f"{', '.join(found)}; --abn-backend torch does this")


def package():
    """The function `inplace_abn` of the package, or None. Looked for once, when first asked."""
    global _package
    if _package is None:
        try:
            _package = importlib.import_module("inplace_abn.functions").inplace_abn
        except Exception:  # noqa: BLE001, a broken extension raises anything when it is loaded
            _package = False
    return _package or None


def describe():
    """One sentence: what will be used."""
    if _choice == "torch":
        return "in-place norms run on PyTorch's own kernels"
    if package() is None:
        return "in-place norms run on PyTorch's own kernels (the package inplace_abn is not installed; not needed)"
    if _choice == "package":
        return "in-place norms run on the kernels of the package inplace_abn"
    return ("in-place norms run on the kernels of the package inplace_abn on a GPU in float16 and float32 where "
            "nothing is shared between devices, and on PyTorch's own otherwise")


def takes_package(x, settings, shared, recomputed):
    """Whether the layer at hand goes to the package. Raises RuntimeError if it must and cannot.

    x: its input; settings: `libs.functions.Settings`; shared: statistics are shared with other devices;
    recomputed: inside a checkpoint.
    """
    if _choice == "torch" or (_choice == "auto" and not x.is_cuda):
        return False
    right = (x.dtype != torch.bfloat16 and not shared and not recomputed and not settings.keep_input
             and (x.is_cuda or x.dtype != torch.float16))
    if _choice == "package" and not right:
        raise RuntimeError("backend package: expected float32 (on a GPU also float16), statistics of one device and "
                           f"no checkpoint, found {x.dtype} on {x.device}{', shared' * shared}"
                           f"{', recomputed' * recomputed}; the backend torch does this")
    return right and package() is not None
