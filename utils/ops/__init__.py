"""Operations on tensors: precision, upsampling, normalization, jitter."""
