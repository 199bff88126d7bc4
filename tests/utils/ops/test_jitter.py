"""Color jitter: what is drawn, and what it does to an image."""

import numpy as np
import torch

from dataset.cityscapes import CityscapesDataset
from utils.ops.jitter import apply_jitter, draw_jitter


def test_jitter_changes_colors_as_drawn_and_nothing_else(streets):
    torch.manual_seed(0)
    images = torch.randint(256, (3, 3, 9, 11), dtype=torch.uint8)
    same = apply_jitter(images, torch.tensor([[1.0, 1.0, 1.0, 0.0]] * 3))
    assert (same.int() - images.int()).abs().max() <= 1 and same.dtype == torch.uint8
    darker = apply_jitter(images, torch.tensor([[0.5, 1.0, 1.0, 0.0], [1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 1.0, 0.0]]))
    assert (darker[0].int() * 2 - images[0].int()).abs().max() <= 3
    assert (darker[1] == darker[1][:1]).all()                        # no saturation: gray
    assert darker[2].float().std() < 1                               # no contrast: one value
    dataset = CityscapesDataset(streets, "train", jitter=(0.4, 0.4, 0.4, 0.1))
    assert torch.equal(dataset[0, 5]["jitter"], dataset[1, 5]["jitter"])
    assert not torch.equal(dataset[0, 5]["jitter"], dataset[0, 6]["jitter"])
    drawn = np.array([draw_jitter((0.4, 0.2, 1.0, 0.1), np.random.default_rng(k)) for k in range(500)])
    for column, (low, high) in zip(drawn.T, ((0.6, 1.4), (0.8, 1.2), (0.0, 2.0), (-0.1, 0.1)), strict=True):
        assert low <= column.min() < low + 0.05 * (high - low) and high - 0.05 * (high - low) < column.max() <= high
