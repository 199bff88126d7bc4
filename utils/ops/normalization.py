"""Normalization of a network's input: channel order, mean and standard deviation."""

from dataclasses import asdict, dataclass

import torch


@dataclass(frozen=True)
class Normalization:
    """(pixel - mean) / std, with channels in the given order. The defaults are those of ImageNet.

    Attributes:
        order: "RGB" or "BGR".
        mean, std: per channel in that order, for pixels from 0 to 255.
    """

    order: str = "RGB"
    mean: tuple = (123.675, 116.28, 103.53)
    std: tuple = (58.395, 57.12, 57.375)

    def __call__(self, images):
        """Images (B, 3, H, W) uint8 or float RGB, 0 to 255 → (B, 3, H, W) float32 on the same device."""
        # Filled on the device: a copy from the host would synchronize in every pass.
        mean, std = (torch.cat([images.new_full((1, 1, 1), value, dtype=torch.get_default_dtype()) for value in values])
                     for values in (self.mean, self.std))                                       # (3, 1, 1)
        images = images.float() if self.order == "RGB" else images.float().flip(1)
        return (images - mean) / std

    def as_config(self):
        """Plain values for a snapshot."""
        return {key: value if isinstance(value, str) else list(value) for key, value in asdict(self).items()}

    @classmethod
    def from_config(cls, config):
        """Rebuild from `as_config`."""
        return cls(config["order"], tuple(config["mean"]), tuple(config["std"]))


# Caffe's channel order and mean, without division by a standard deviation. Used by CSAIL's networks until August 2019
# (pull request 190 of CSAILVision/semantic-segmentation-pytorch) and by other networks ported from Caffe. Files do not
# record it, but it can be inferred from the statistics of their norms.
CAFFE = Normalization("BGR", (102.9801, 115.9465, 122.7717), (1.0, 1.0, 1.0))
NORMALIZATIONS = {"rgb": Normalization(), "bgr": CAFFE}
