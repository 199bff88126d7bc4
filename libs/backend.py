"""Choice of the kernels of norms: PyTorch's, Triton's (`libs.fused`), or those of the `inplace_abn` package."""

import functools
import importlib

import torch

from utils.common.errors import UserError

from .fused.launch import obstacle

CHOICES = ("auto", "torch", "triton", "package")


def check(choice, *, norm, amp, recompute, compiled, shared, replicas, channels_last):
    """Check whether the chosen kernels support a training run.

    Args:
        choice, norm, amp, recompute, compiled: values of --kernels, --norm, --amp, --recompute and --compile.
        shared: whether several devices share each batch.
        replicas: whether they are those of one process.
        channels_last: value of --channels-last; None where it is not known yet.

    Raises:
        UserError: if the kernels do not support the run, or the package cannot be imported.
    """
    if choice == "triton":
        if conflicts := conflicts_with_triton(amp=amp, compiled=compiled, replicas=replicas,
                                              channels_last=channels_last):
            raise UserError("--kernels triton: expected --channels-last, no --amp apex, no --compile and no --parallel "
                            f"dp over several GPUs, found {', '.join(conflicts)}; --kernels torch supports this")
    if choice != "package" or norm != "inplace_abn":
        return
    if package() is None:
        raise UserError("--kernels package: expected the package inplace_abn (libs/requirements-extensions.txt), found "
                        "that it cannot be imported")
    conflicts = ([f"--amp {amp}"] * (amp == "bf16") + [f"--recompute {recompute}"] * (recompute != "none")
                 + ["several devices"] * shared)
    if conflicts:
        raise UserError("--kernels package: expected --amp off or fp16, no --recompute and one device, found "
                        f"{', '.join(conflicts)}; --kernels torch supports this")


def conflicts_with_triton(*, amp, compiled, replicas, channels_last):
    """Flags with which Triton's kernels are not used; arguments as in `check`. Compiled code has kernels of its own."""
    return (["--amp apex"] * (amp == "apex") + ["--compile"] * compiled + ["--parallel dp"] * replicas
            + ["--no-channels-last"] * (channels_last is False))


def choose(choice, device, *, norm, amp, recompute, compiled, shared, replicas, channels_last):
    """Choose the kernels of a training run.

    `auto` is Triton's on a GPU where a small call of each operator, forward and backward, agrees with PyTorch's.

    Args:
        choice: value of --kernels.
        device: the first device of this process.
        others: as in `check`.

    Returns:
        (choice for `libs.abn.set_backend`, which is never `triton` where Triton's kernels cannot be used; a sentence
        about it, or None if there is nothing to say).

    Raises:
        UserError: as in `check`, and if Triton's kernels are chosen and cannot be used on the device.
    """
    check(choice, norm=norm, amp=amp, recompute=recompute, compiled=compiled, shared=shared, replicas=replicas,
          channels_last=channels_last)
    if choice == "triton" and (reason := obstacle(device)):
        raise UserError(f"--kernels triton: expected a GPU on which Triton's kernels agree with PyTorch's operators, "
                        f"found that {reason}; --kernels torch works everywhere")
    reason = None
    if choice == "auto" and device.type == "cuda":
        conflicts = conflicts_with_triton(amp=amp, compiled=compiled, replicas=replicas, channels_last=channels_last)
        reason = f"{', '.join(conflicts)} cannot be combined with them" if conflicts else obstacle(device)
        choice = "auto" if reason else "triton"
    if choice == "triton":
        return choice, "norms and the ends of residual blocks use Triton's kernels"
    if norm != "inplace_abn":       # the package has in-place norms only
        choice = "torch"
    without = [f"without Triton's kernels, which save memory traffic: {reason}"] * (reason is not None)
    used = "torch" if choice == "auto" and device.type != "cuda" else choice
    return choice, "; ".join([describe(used)] * (norm == "inplace_abn") + without) or None


@functools.cache
def package():
    """Return the function `inplace_abn` of the package, or None if it cannot be imported."""
    try:
        return importlib.import_module("inplace_abn.functions").inplace_abn
    except Exception:  # noqa: BLE001, loading a broken extension can raise any error
        return None


def describe(choice):
    """Describe the kernels that in-place norms use with this choice, other than `triton`, in one sentence."""
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
    if choice in ("torch", "triton") or (choice == "auto" and not x.is_cuda):
        return False
    supported = (x.dtype != torch.bfloat16 and not shared and not recomputed and not settings.keep_input
                 and (x.is_cuda or x.dtype != torch.float16))
    if choice == "package" and not supported:
        raise RuntimeError("backend package: expected float32 (on a GPU also float16), statistics of one device and "
                           f"no checkpoint, found {x.dtype} on {x.device}{', shared' * shared}"
                           f"{', recomputed' * recomputed}; the backend torch supports this")
    return supported and package() is not None
