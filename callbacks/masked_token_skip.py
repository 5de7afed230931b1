"""Masked-token skipping (He et al. 2022, section 3, "MAE encoder"): the encoder runs on the visible patches only.

    latents = encoder(visible patches);  pixels of the hidden patches = decoder([latents, mask tokens])

With 3/4 of the patches hidden the encoder runs on a quarter of the tokens; the narrow decoder still runs on all.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lit_scale.technique import Technique

__all__ = ["MaskedTokenSkip"]


class MaskedTokenSkip(Technique):
    """Keeps mask tokens out of the encoder of a masked autoencoder; they join before the decoder.

    It sets ``encode_masked = False`` on the network. Without it :class:`~lit_scale.models.MaskedAutoencoder` encodes
    all patches, the hidden ones as mask tokens. Other networks work if they have a bool attribute ``encode_masked`` and
    obey it. The attribute stays False after training, because the weights were trained that way. Plain DDP works: the
    same parameters get gradients in both cases.

    Args:
        autoencoder: Dotted path of the autoencoder, needed only if the module holds several.

    Raises:
        ValueError: In ``setup``, if the module holds no such network, or several and none is named.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(max_steps=1_000, callbacks=[MaskedTokenSkip()], logger=False)
    """

    factor = "tokens"

    def __init__(self, autoencoder: str | None = None) -> None:
        self.autoencoder = autoencoder
        self._model: Any

    def settings(self) -> dict[str, Any]:
        """The arguments, as plain values for the checkpoint."""
        return {"autoencoder": self.autoencoder}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the autoencoder and switch its encoder to the visible patches."""
        super().setup(trainer, pl_module, stage)
        self._model = _find(pl_module, self.autoencoder)
        self._model.encode_masked = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the switch again: a checkpoint may have restored the other value."""
        self._model.encode_masked = False

    def is_plain(self) -> bool:
        """Whether the encoder runs on all patches, as without the technique."""
        return bool(self._model.encode_masked)

    def plain_step_kind(self) -> dict[str, Any]:
        """Hidden patches are encoded."""
        return {"encode_masked": True}

    def step_kind(self) -> dict[str, Any]:
        """Whether hidden patches are encoded."""
        return {"encode_masked": bool(self._model.encode_masked)}

    def impose_step_kind(self, trainer: Trainer, pl_module: LightningModule, kind: dict[str, Any]) -> None:
        """Encode hidden patches or not, as in a step of this kind."""
        self._model.encode_masked = kind["encode_masked"]


def _find(module: LightningModule, path: str | None) -> nn.Module:
    """The one network that can leave hidden patches out of its encoder."""
    found = {
        name: part for name, part in module.named_modules() if isinstance(getattr(part, "encode_masked", None), bool)
    }
    if path is not None and path in found:
        return found[path]
    names = ", ".join(repr(name) for name in found)
    if path is not None:
        raise ValueError(f"autoencoder={path!r} has no switch encode_masked; those that have: {names or 'none'}")
    if not found:
        raise ValueError(
            f"{type(module).__name__} holds no masked autoencoder with a switch encode_masked, such as "
            "lit_scale.models.MaskedAutoencoder; for classifiers there is PatchDropping"
        )
    if len(found) > 1:
        raise ValueError(f"{type(module).__name__} holds several autoencoders; choose one with autoencoder=: {names}")
    return next(iter(found.values()))
