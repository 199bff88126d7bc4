"""Segmentation networks: built by name, or loaded from a snapshot for prediction."""

import libs  # noqa: F401, imported first: it raises ImportError if another package is named utils

from .backbones import BACKBONES, build_backbone
from .build import MODELS, build_network
from .predictor import load

__all__ = ["BACKBONES", "MODELS", "build_backbone", "build_network", "load"]
