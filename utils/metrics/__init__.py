"""Scores of predictions, charts and the HTML report."""

from .iou import ConfusionMatrix

__all__ = ["ConfusionMatrix"]
