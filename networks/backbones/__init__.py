"""Backbones by name: the residual networks of this package, and networks of timm."""

from .names import BACKBONES, build_backbone

__all__ = ["BACKBONES", "build_backbone"]
