"""From an image to class probabilities."""

from .sliding import SlidingPredictor

__all__ = ["SlidingPredictor"]
