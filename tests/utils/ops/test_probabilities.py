"""The most probable class of each pixel, against PyTorch's operator."""

import numpy as np
import torch

from utils.ops.probabilities import most_probable


def test_the_most_probable_class_is_that_of_pytorch():
    """The first of several that are equal, for as many classes and rows as there may be."""
    for shape in ((1, 3, 5), (19, 130, 7), (254, 65, 3)):
        probabilities = torch.randint(0, 9, shape, generator=torch.Generator().manual_seed(0)).float() / 8
        expected = torch.from_numpy(probabilities.numpy().argmax(0).astype(np.uint8))
        confidence, labels = most_probable(probabilities)
        assert torch.equal(labels, expected) and torch.equal(confidence, probabilities.amax(0))
