"""Attention over the positions of a map, without a map of all pairs."""

import torch
import torch.nn.functional as F
from torch import nn


class SelfAttention(nn.Module):
    """What makes queries, keys and values of a map, and the weight of what is attended.

    Args:
        channels: of the input, the values and the output.
        key_channels: of queries and keys.
    """

    def __init__(self, channels, key_channels):
        super().__init__()
        self.query = nn.Conv2d(channels, key_channels, 1)
        self.key = nn.Conv2d(channels, key_channels, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(()))      # at the start the input goes through as it is


def attend(queries, keys, values, scale=None):
    """softmax over m of scale · queriesᵀ keys, times the values.

    By `F.scaled_dot_product_attention`, whose fused kernels keep no n×m map. Those want values as long as keys, so
    longer values go through in pieces of that length, each as a head of its own with the same queries and keys: the
    same sums, and the weights are computed once for each piece.

    Args:
        queries: (B, K, n). keys: (B, K, m). values: (B, C, m).
        scale: of the products; None for 1 / √K.

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
