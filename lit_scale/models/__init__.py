"""LightningModules: one per architecture and task."""

from lit_scale.models.bert import BertMLM
from lit_scale.models.gpt import GPT

__all__ = ["GPT", "BertMLM"]
