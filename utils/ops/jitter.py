"""Color jitter: random changes of brightness, contrast, saturation and hue.

The factors of an image are drawn where its sample is made (`draw_jitter`) and travel with it; the training step applies
them to the batch on its device (`apply_jitter`), so that the processes that read samples have less to do.
"""

import torch


def draw_jitter(amounts, rng):
    """Draw the factors for one image, uniformly.

    Args:
        amounts: the largest changes: of brightness, contrast and saturation, each from 0 (none) to 1; and of hue, in
            turns of the color circle, from 0 to 0.5.
        rng: NumPy Generator.

    Returns:
        4 floats: factors of brightness, contrast and saturation, from 1 - amount to 1 + amount, where 1 changes
        nothing; and the shift of hue, from -amount to amount in turns, where 0 changes nothing.
    """
    return [*(rng.uniform(max(0.0, 1 - amount), 1 + amount) for amount in amounts[:3]),
            rng.uniform(-amounts[3], amounts[3])]


def apply_jitter(images, factors):
    """Change brightness, contrast, saturation and hue of each image, in this order, on its device.

    images (B, 3, H, W) uint8 RGB, factors (B, 4) float as `draw_jitter` draws them → images of that shape and dtype.
    """
    from torchvision.transforms.v2 import functional

    changes = (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation,
               functional.adjust_hue)
    changed = []
    for image, values in zip(images, factors.tolist(), strict=True):
        for change, value in zip(changes, values, strict=True):
            image = change(image, value)
        changed.append(image)
    return torch.stack(changed)
