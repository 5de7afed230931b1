"""Callbacks: one module for each technique."""

from lit_scale.callbacks.batch_ramp import BatchRamp
from lit_scale.callbacks.dynamic_sparsity import DynamicSparsity
from lit_scale.callbacks.eight_bit_optimizer import EightBitOptimizer
from lit_scale.callbacks.gradient_noise_scale import GradientNoiseScale
from lit_scale.callbacks.importance_sampling import ImportanceSampling
from lit_scale.callbacks.large_batch import LargeBatch
from lit_scale.callbacks.mask_later import MaskLater
from lit_scale.callbacks.masked_token_skip import MaskedTokenSkip
from lit_scale.callbacks.patch_dropping import PatchDropping
from lit_scale.callbacks.progressive_stacking import ProgressiveStacking
from lit_scale.callbacks.random_ltd import RandomLTD
from lit_scale.callbacks.resolution_growing import ResolutionGrowing
from lit_scale.callbacks.rho_loss import RhoLoss
from lit_scale.callbacks.selective_backprop import SelectiveBackprop
from lit_scale.callbacks.sequence_length_warmup import SequenceLengthWarmup
from lit_scale.callbacks.token_dropping import TokenDropping

__all__ = [
    "BatchRamp",
    "EightBitOptimizer",
    "GradientNoiseScale",
    "LargeBatch",
    "ImportanceSampling",
    "DynamicSparsity",
    "MaskLater",
    "MaskedTokenSkip",
    "PatchDropping",
    "ProgressiveStacking",
    "RandomLTD",
    "ResolutionGrowing",
    "RhoLoss",
    "SelectiveBackprop",
    "SequenceLengthWarmup",
    "TokenDropping",
]
