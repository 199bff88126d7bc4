"""How good predictions are: scores, charts, the report."""

from .iou import ConfusionMatrix

__all__ = ["ConfusionMatrix"]
