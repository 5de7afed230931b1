"""Callbacks: one technique a file, named after it."""

from lit_scale.callbacks.dynamic_sparsity import DynamicSparsity
from lit_scale.callbacks.masked_token_skip import MaskedTokenSkip
from lit_scale.callbacks.patch_dropping import PatchDropping
from lit_scale.callbacks.progressive_stacking import ProgressiveStacking
from lit_scale.callbacks.resolution_growing import ResolutionGrowing
from lit_scale.callbacks.sequence_length_warmup import SequenceLengthWarmup
from lit_scale.callbacks.token_dropping import TokenDropping

__all__ = [
    "DynamicSparsity",
    "MaskedTokenSkip",
    "PatchDropping",
    "ProgressiveStacking",
    "ResolutionGrowing",
    "SequenceLengthWarmup",
    "TokenDropping",
]
