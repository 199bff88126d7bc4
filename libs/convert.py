"""Conversion of weights between ordinary and in-place batch norms, and folding of norms into convolutions.

The ordinary layer scales by the signed weight, the in-place layer by |weight| + eps. A negative scale moves into the
convolution before the norm: negating a filter and the running mean negates x̂.
"""

import copy

import torch
from torch import nn

from .abn import ABN, InPlaceABN


def to_plain(state, norms, eps=1e-5):
    """Convert a state dict of in-place norms for ordinary ones, without loss: the weight becomes |weight| + eps.

    Args:
        state: {name: tensor}; not changed.
        norms: names of the norm modules.
        eps: of the in-place layer.

    Returns:
        The new state dict.
    """
    state = dict(state)
    for name in norms:
        key = f"{name}.weight"
        if key in state:
            state[key] = state[key].abs() + eps
    return state


def to_in_place(state, pairs, eps=1e-5):
    """Convert a state dict of ordinary norms for in-place ones.

    Args:
        state: {name: tensor}; not changed.
        pairs: {name of norm module: name of the convolution before it}.
        eps: of the in-place layer.

    Returns:
        (new state dict, number of channels that are not exact): those whose |weight| is below eps, which the in-place
        layer cannot represent, or whose weight is negative without a convolution that can take the sign.
    """
    state = dict(state)
    inexact = 0
    for norm, convolution in pairs.items():
        key = f"{norm}.weight"
        if key not in state:
            continue
        weight = state[key]
        negative = weight < 0
        filters = state.get(f"{convolution}.weight")
        lost = weight.abs() < eps
        if filters is None:
            lost = lost | negative
        else:
            sign = torch.where(negative, -1, 1).to(filters.dtype)
            state[f"{convolution}.weight"] = filters * sign.view(-1, *[1] * (filters.ndim - 1))
            for other in (f"{convolution}.bias", f"{norm}.running_mean"):
                if other in state:
                    state[other] = state[other] * sign.to(state[other].dtype)
        state[key] = (weight.abs() - eps).clamp(min=0)
        inexact += int(lost.sum())
    return state, inexact


def norms_and_convolutions(network, example):
    """Find the convolution before each norm, by a forward pass of a copy on the meta device.

    Args:
        network: nn.Module; the copy is in training mode, so that all heads run.
        example: an input; only its shape is used.

    Returns:
        {name of norm module: name of the convolution before it}.
    """
    network = copy.deepcopy(network).to("meta").float().train()
    outputs, pairs = [], {}

    def convolved(name):
        return lambda module, args, output: outputs.append((name, output))

    def normed(name):
        def hook(module, args):
            for convolution, output in outputs:
                if output is args[0]:
                    pairs[name] = convolution
        return hook

    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(convolved(name))
        elif isinstance(module, ABN):
            module.register_forward_pre_hook(normed(name))
            module.forward = torch.clone        # shapes are enough; statistics would need other processes
    with torch.no_grad():
        network(example.to("meta").float())
    return pairs


def norm_kind(network):
    """Return "inplace_abn" or "bn", the kind of the network's norms."""
    kinds = {"inplace_abn" if isinstance(m, InPlaceABN) else "bn"
             for m in network.modules() if isinstance(m, ABN)}
    return kinds.pop() if len(kinds) == 1 else "bn"


@torch.no_grad()
def fold_norms(network):
    """Copy a network for evaluation, with its norms folded into the convolutions before them.

    With running statistics a norm is y = x · a + b in each channel, which the convolution can compute. The activation
    stays, and so do norms without a convolution before them.
    """
    pairs = norms_and_convolutions(network, torch.empty(2, 3, 65, 65))
    network = copy.deepcopy(network).eval()
    for norm_name, convolution_name in pairs.items():
        norm, convolution = network.get_submodule(norm_name), network.get_submodule(convolution_name)
        if norm.running_mean is None:
            continue
        mean, variance = norm.running_mean.double(), norm.running_var.double()
        scale, shift = torch.ones_like(mean), torch.zeros_like(mean)
        if norm.affine:
            scale = norm.weight.double()
            scale = scale.abs() + norm.eps if isinstance(norm, InPlaceABN) else scale
            shift = norm.bias.double()
        factor = scale / torch.sqrt(variance + norm.eps)                              # (C,)
        bias = 0 if convolution.bias is None else convolution.bias.double()
        filters = convolution.weight.double() * factor.view(-1, *[1] * (convolution.weight.ndim - 1))
        convolution.weight = nn.Parameter(filters.to(convolution.weight.dtype))
        convolution.bias = nn.Parameter(((bias - mean) * factor + shift).to(convolution.weight.dtype))
        parent, _, name = norm_name.rpartition(".")
        setattr(network.get_submodule(parent), name, activation_module(norm))
    return network


def activation_module(norm):
    """Make a module of the activation of a norm, in place."""
    slope = norm.activation_param
    return {"leaky_relu": lambda: nn.LeakyReLU(slope, inplace=True), "relu": lambda: nn.ReLU(inplace=True),
            "elu": lambda: nn.ELU(slope, inplace=True), "identity": nn.Identity}[norm.activation]()
