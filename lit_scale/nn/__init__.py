"""Building blocks: attention, feed-forward, residual schemes, embeddings and the encoder made of them."""

from lit_scale.nn.attention import Attention, RotaryPositions
from lit_scale.nn.embeddings import Embedding
from lit_scale.nn.encoder import Encoder, EncoderBlock, normal_init, residual_init
from lit_scale.nn.feedforward import FeedForward
from lit_scale.nn.residual import PostNorm, PreNorm, Residual

__all__ = [
    "Attention",
    "Embedding",
    "Encoder",
    "EncoderBlock",
    "FeedForward",
    "PostNorm",
    "PreNorm",
    "Residual",
    "RotaryPositions",
    "normal_init",
    "residual_init",
]
