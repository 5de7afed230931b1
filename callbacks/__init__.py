"""Callbacks: one technique a file, named after it."""

from lit_scale.callbacks.progressive_stacking import ProgressiveStacking
from lit_scale.callbacks.token_dropping import TokenDropping

__all__ = ["ProgressiveStacking", "TokenDropping"]
