"""8-bit optimizer state (Dettmers et al., ICLR 2022, sections 2.1 to 2.3): each moment is stored in one byte.

    in each block of 256 values: value ~ nearest of 256 levels (dense near 0) x largest magnitude of the block

Adam's state falls from 8 bytes to 2.03 bytes per parameter. Steps do not become faster; the gain is the freed memory.
"""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer

from lit_scale.factors.eight_bit import embedding_weights, to_eight_bit
from lit_scale.factors.optimizers import replace_optimizers
from lit_scale.technique import Technique

__all__ = ["EightBitOptimizer"]


class EightBitOptimizer(Technique):
    """Replaces the optimizer that the module configures by its 8-bit form.

    torch's AdamW, Adam and SGD with momentum, and timm's Lion and Lamb have an 8-bit form, made with bitsandbytes.
    Parameter groups, learning rates and schedulers are kept. State stays in 32 bits for embeddings and for tensors of
    fewer than 4096 elements (bitsandbytes' default). A module can also create the optimizer itself:
    ``create_optimizer(self, "adamw8bit", lr=1e-3)``.

    Args:
        embeddings: Whether the state of embedding tables is in 8 bits too. By default it is not (Dettmers et al.,
            section 2.3).

    Raises:
        ValueError: Before the first step, if the optimizer has no 8-bit form, or bitsandbytes has no 8-bit update for
            the device.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(max_steps=1_000, callbacks=[EightBitOptimizer()], accelerator="cpu", logger=False)
    """

    factor = "bytes"
    joins_late = False

    def __init__(self, embeddings: bool = False) -> None:
        self.embeddings = embeddings

    def settings(self) -> dict[str, bool]:
        """The argument."""
        return {"embeddings": self.embeddings}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replace the optimizers; Lightning then restores a checkpoint's state into the new ones."""
        full = () if self.embeddings else embedding_weights(pl_module)
        replace_optimizers(trainer, lambda optimizer: to_eight_bit(optimizer, full))
