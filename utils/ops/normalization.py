"""What a network's input looks like."""

from dataclasses import asdict, dataclass

import torch


@dataclass(frozen=True)
class Normalization:
    """(pixel - mean) / std, channels in the given order.

    mean, std: per channel, in units of 0 to 255. The default is ImageNet's, RGB.
    """

    order: str = "RGB"
    mean: tuple = (123.675, 116.28, 103.53)
    std: tuple = (58.395, 57.12, 57.375)

    def __call__(self, images):
        """images (B, 3, H, W) uint8 or float RGB, 0 to 255 → (B, 3, H, W) float32, on the same device."""
        # Filled on the device: copied there they would make the host wait in every pass.
        mean, std = (torch.cat([images.new_full((1, 1, 1), value, dtype=torch.get_default_dtype()) for value in values])
                     for values in (self.mean, self.std))                                       # (3, 1, 1)
        images = images.float() if self.order == "RGB" else images.float().flip(1)
        return (images - mean) / std

    def as_config(self):
        """Plain values for a snapshot; `Normalization.from_config` reads them back."""
        return {key: value if isinstance(value, str) else list(value) for key, value in asdict(self).items()}

    @classmethod
    def from_config(cls, config):
        return cls(config["order"], tuple(config["mean"]), tuple(config["std"]))


# Caffe's order and mean, no division by a deviation: CSAIL's networks until August 2019 (pull request 190 of
# CSAILVision/semantic-segmentation-pytorch), and others that come from Caffe. Files do not say it; their norms do.
CAFFE = Normalization("BGR", (102.9801, 115.9465, 122.7717), (1.0, 1.0, 1.0))
NORMALIZATIONS = {"rgb": Normalization(), "bgr": CAFFE}
