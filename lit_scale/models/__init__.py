"""LightningModules: one per architecture and task."""

from lit_scale.models.bert import BertMLM

__all__ = ["BertMLM"]
