"""LightningModules: one per architecture and task."""

from lit_scale.models.bert import BertMLM
from lit_scale.models.gpt import GPT
from lit_scale.models.mae import MaskedAutoencoder
from lit_scale.models.probe import ProbeAtEnd, fine_tune, linear_probe
from lit_scale.models.vit import ViTClassifier

__all__ = ["GPT", "BertMLM", "MaskedAutoencoder", "ProbeAtEnd", "ViTClassifier", "fine_tune", "linear_probe"]
