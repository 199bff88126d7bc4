"""Prediction of class probabilities, export to other runtimes, and timing."""

from .sliding import SlidingPredictor

__all__ = ["SlidingPredictor"]
