"""LightningModules: one per architecture and task."""

from lit_scale.models.bert import BertMLM
from lit_scale.models.gpt import GPT
from lit_scale.models.vit import ViTClassifier

__all__ = ["GPT", "BertMLM", "ViTClassifier"]
