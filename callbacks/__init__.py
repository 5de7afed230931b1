"""Callbacks: one technique a file, named after it."""

from lit_scale.callbacks.masked_token_skip import MaskedTokenSkip
from lit_scale.callbacks.patch_dropping import PatchDropping
from lit_scale.callbacks.progressive_stacking import ProgressiveStacking

__all__ = ["MaskedTokenSkip", "PatchDropping", "ProgressiveStacking"]
