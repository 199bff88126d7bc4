"""Attention over the positions of a map, without a map of all pairs."""

import torch.nn.functional as F


def attend(queries, keys, values, scale=1.0):
    """softmax over m of scale · queriesᵀ keys, times the values.

    By `F.scaled_dot_product_attention`, whose fused kernels keep no n×m map. Those want values as long as keys, so
    longer values go through in pieces of that length, each as a head of its own with the same queries and keys: the
    same sums, and the weights are computed once for each piece.

    Args:
        queries: (B, K, n). keys: (B, K, m). values: (B, C, m).
        scale: of the products; 1 for attention that is not scaled.

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
