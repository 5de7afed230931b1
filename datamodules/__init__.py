"""Data for the recipes: seeded, checked before the first step, and resumed exactly at the next batch."""

from lit_scale.datamodules.images import ImageDataModule
from lit_scale.datamodules.loader import ResumableLoader, data_ranks
from lit_scale.datamodules.masking import mask_tokens, num_predictions
from lit_scale.datamodules.shards import Shards, write_shards
from lit_scale.datamodules.text import TextDataModule
from lit_scale.seeds import derive_seed

__all__ = [
    "ImageDataModule",
    "ResumableLoader",
    "Shards",
    "TextDataModule",
    "data_ranks",
    "derive_seed",
    "mask_tokens",
    "num_predictions",
    "write_shards",
]
