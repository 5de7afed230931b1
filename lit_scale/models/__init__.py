"""LightningModules: one per architecture and task."""

from lit_scale.models.bert import BertMLM
from lit_scale.models.gpt import GPT
from lit_scale.models.mae import MaskedAutoencoder

__all__ = ["GPT", "BertMLM", "MaskedAutoencoder"]
