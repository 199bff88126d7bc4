"""Scores of predictions."""

from .iou import ConfusionMatrix

__all__ = ["ConfusionMatrix"]
