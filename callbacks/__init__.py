"""Callbacks: one technique a file, named after it."""

from lit_scale.callbacks.progressive_stacking import ProgressiveStacking

__all__ = ["ProgressiveStacking"]
