"""Data for the recipes: seeded, resumable to the very next batch, and checked before the first step."""

from lit_scale.datamodules.loader import ResumableLoader, data_ranks, derive_seed
from lit_scale.datamodules.masking import mask_tokens, num_predictions
from lit_scale.datamodules.text import TextDataModule

__all__ = ["ResumableLoader", "TextDataModule", "data_ranks", "derive_seed", "mask_tokens", "num_predictions"]
