"""Color jitter: random changes of brightness, contrast, saturation and hue.

`draw_jitter` draws the factors of an image where its sample is made, and they become part of the sample. `apply_jitter`
applies them to the batch on the device in the training step, which saves the processes that read samples time.
"""

import torch


def draw_jitter(amounts, rng):
    """Draw the factors for one image, uniformly.

    Args:
        amounts: largest changes of brightness, contrast and saturation, each from 0 (no change) to 1, and of hue, from
            0 to 0.5 turns of the color circle.
        rng: NumPy Generator.

    Returns:
        4 floats: factors of brightness, contrast and saturation, from 1 - amount to 1 + amount, where 1 means no
        change; and the shift of hue in turns, from -amount to amount, where 0 means no change.
    """
    return [*(rng.uniform(max(0.0, 1 - amount), 1 + amount) for amount in amounts[:3]),
            rng.uniform(-amounts[3], amounts[3])]


def apply_jitter(images, factors):
    """Change brightness, contrast, saturation and hue of each image, in this order, on its device.

    Args:
        images: (B, 3, H, W) uint8 RGB.
        factors: (B, 4) float, each row from `draw_jitter`.

    Returns:
        Images of the same shape and dtype.
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
