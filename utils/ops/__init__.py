"""Tensor operations: full precision within autocast, upsampling, normalization, color jitter."""
