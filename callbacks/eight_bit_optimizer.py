"""8-bit optimizer state (Dettmers et al., ICLR 2022, sections 2.1 to 2.3): moments in one byte each.

    each block of 256 values: the nearest of 256 levels, dense near 0, times the block's largest magnitude

Adam's state falls from 8 bytes a parameter to 2.03. No step becomes cheaper; what pays is the memory that is free then.
"""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer

from lit_scale.factors.eight_bit import embedding_weights, to_eight_bit
from lit_scale.factors.optimizers import replace_optimizers
from lit_scale.technique import Technique

__all__ = ["EightBitOptimizer"]


class EightBitOptimizer(Technique):
    """Puts the 8-bit form of an optimizer in the place of the one that the module configures.

    torch's AdamW, Adam and SGD with momentum and timm's Lion and Lamb have one, bitsandbytes'; groups, rates and
    schedulers stay as they are. State stays in 32 bits for embeddings and for tensors of fewer than 4096 elements.
    A module of one's own can just as well make it by name: ``create_optimizer(self, "adamw8bit", lr=1e-3)``.

    Args:
        embeddings: Whether the state of embedding tables is in 8 bits too.

    Raises:
        ValueError: Before the first step, if the optimizer has no 8-bit form, or the device no 8-bit update.

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
        """Replace the optimizers; what a checkpoint holds is restored into the new ones."""
        full = () if self.embeddings else embedding_weights(pl_module)
        replace_optimizers(trainer, lambda optimizer: to_eight_bit(optimizer, full))
