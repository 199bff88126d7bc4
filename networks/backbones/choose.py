"""Choice of a run's backbone from the flags and, for what they leave open, from the file of weights."""

from utils.common.errors import UserError

from .names import BACKBONE, find_backbone


def choose_backbone(weights=None, backbone=None, stem=None, downsample=None, eca_kernels=None, output_stride=None):
    """Choose the arguments of `build_network` that describe the backbone.

    The values of flags take precedence; those that are None are taken from the weights, or else are the defaults. The
    name of a backbone determines its depth and whether it has channel attention.

    Args:
        weights: `Weights`, or None.
        backbone: name of the backbone, or None.
        stem: a key of `STEMS`, or None.
        downsample: `strided`, `average`, or None.
        eca_kernels: kernel sizes of the channel attention in stages 1 to 4, or None.
        output_stride: 8, 16, or None.

    Returns:
        dict of arguments of `build_network`.

    Raises:
        UserError: if a flag and the weights contradict each other.
    """
    structure, source = ({}, None) if weights is None else (weights.structure, weights.name)
    flags = {"stem": stem, "downsample": downsample, "eca-kernels": eca_kernels and list(eca_kernels)}
    try:
        network = find_backbone(backbone or structure.get("backbone", BACKBONE))
    except ValueError as error:
        raise UserError(f"{source}: {error}" if source else f"--{error}") from None
    return network.choose_arguments(structure, flags, source, output_stride)
