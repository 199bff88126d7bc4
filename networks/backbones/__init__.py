"""Backbones by name: residual networks of our own, and those of timm."""

from .names import BACKBONES, build_backbone

__all__ = ["BACKBONES", "build_backbone"]
