"""Segmentation networks: built by name, or read from a snapshot, ready to predict."""

import libs  # noqa: F401, first of the packages here: it refuses another one named utils

from .backbones import BACKBONES, build_backbone
from .build import MODELS, build_network
from .predictor import load

__all__ = ["BACKBONES", "MODELS", "build_backbone", "build_network", "load"]
