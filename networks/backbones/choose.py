"""The backbone of a run, where no flag names one: that of its weights."""

from utils.common.errors import UserError

from .names import BACKBONE, find_backbone


def choose_backbone(weights=None, backbone=None, stem=None, downsample=None, eca_kernels=None):
    """Arguments of `build_network` for a backbone: what flags leave open follows the weights.

    A backbone's name fixes depth and attention. Raises `UserError` where a flag and the file contradict.

    Args:
        weights: `Weights`, or None.
        backbone, stem, downsample (`strided` or `average`), eca_kernels: what flags say; None for nothing.
    """
    theirs, source = ({}, None) if weights is None else (weights.structure, weights.name)
    flags = {"stem": stem, "downsample": downsample, "eca-kernels": eca_kernels and list(eca_kernels)}
    try:
        chosen = find_backbone(backbone or theirs.get("backbone", BACKBONE))
    except ValueError as error:
        raise UserError(f"{source}: {error}" if source else f"--{error}") from None
    return chosen.follow(theirs, flags, source)
