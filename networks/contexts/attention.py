"""Self-attention over the positions of a feature map, without storing the matrix of all pairs."""

import torch
import torch.nn.functional as F
from torch import nn


class SelfAttention(nn.Module):
    """Base class with the projections to queries, keys and values, and the weight gamma of the attention output.

    Args:
        channels: number of channels of the input, the values and the output.
        key_channels: number of channels of queries and keys.
    """

    def __init__(self, channels, key_channels):
        super().__init__()
        self.query = nn.Conv2d(channels, key_channels, 1)
        self.key = nn.Conv2d(channels, key_channels, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(()))      # zero: the module starts as the identity


def attend(queries, keys, values, scale=None):
    """Attend to the values with weights softmax(scale · queriesᵀ keys) over m.

    Uses `F.scaled_dot_product_attention`, whose fused kernels store no n×m matrix. They need values with as many
    channels as keys. Longer values are therefore split into pieces of K channels, each processed as a head with the
    same queries and keys: the result is the same, and the weights are computed once per piece.

    Args:
        queries: (B, K, n).
        keys: (B, K, m).
        values: (B, C, m).
        scale: factor of the products; None for 1 / √K.

    Returns:
        (B, C, n).
    """
    length, channels = queries.shape[1], values.shape[1]
    pieces = -(-channels // length)
    queries, keys, values = (tokens.transpose(1, 2).contiguous() for tokens in (queries, keys, values))
    values = F.pad(values, (0, pieces * length - channels)).unflatten(2, (pieces, length)).transpose(1, 2)
    queries, keys = (tokens[:, None].expand(-1, pieces, -1, -1) for tokens in (queries, keys))
    attended = F.scaled_dot_product_attention(queries, keys, values, scale=scale)           # (B, pieces, n, K)
    return attended.transpose(2, 3).flatten(1, 2)[:, :channels]
