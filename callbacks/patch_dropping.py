"""Patch dropping (FLIP, Li et al. 2023, arXiv 2212.00794, section 3): train on a random part of each image's patches.

    tokens = [class and register tokens, random subset of the patches]; the last steps of the run use all patches

The cost of a step falls about in proportion to the patches that are kept. Evaluation uses all patches.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lit_scale.progress import progress
from lit_scale.technique import Technique
from lit_scale.wrapping import replace

__all__ = ["PatchDropping"]

_PREFIX = ("cls_token", "class_embedding", "distillation_token", "register_tokens")  # Hugging Face's names
_PATCHES = ("patch_embeddings", "patch_embedding")
_INSIDE = re.compile("rope|rotary|relative_position|rel_pos", re.IGNORECASE)


class PatchDropping(Technique):
    """Drops a random part of the patches of any timm or Hugging Face Vision Transformer while it trains.

    The dropped patches differ from image to image. They are drawn from torch's default generator, which
    :class:`~lit_scale.guards.StepSeed` makes a function of (seed, rank, batch). Class and register tokens are kept. In
    the last ``tune`` of the run nothing is dropped, so that the network adapts to whole images (FLIP's unmasked
    tuning).

    In timm's networks the technique uses their own layer for this, ``patch_drop``, which also handles rotary positions.
    In other networks patches are dropped from the output of the embedding, after positions are added. The embedding is
    found in Hugging Face's ViT, DeiT, DINOv2, CLIP and SigLIP; name it by ``embedding`` in others. Plain DDP works:
    every parameter has a gradient.

    Args:
        fraction: Share of the patches that is dropped, in (0, 1). The paper uses 0.5 and 0.75.
        tune: Fraction of the run, at its end, that trains on all patches, in [0, 1). The default is ours.
        embedding: Dotted path of the module whose output (B, T, C) is all tokens with their positions; needed only
            if it cannot be found. For torchvision's ViT it is ``"encoder.dropout"``.
        prefix: Number of leading tokens of that output that are not patches; by default the number of its class and
            register tokens.

    Raises:
        ValueError: At construction or in ``setup``, if a number is out of range, or if the network has no place to drop
            patches or several, drops patches already, or adds positions inside its blocks.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> dropping = PatchDropping(0.5, tune=0.1)
        >>> trainer = Trainer(max_steps=1_000, callbacks=[dropping], logger=False)
    """

    factor = "tokens"

    def __init__(
        self, fraction: float = 0.5, tune: float = 0.05, *, embedding: str | None = None, prefix: int | None = None
    ) -> None:
        if not 0.0 < fraction < 1.0:
            raise ValueError(f"fraction={fraction} must lie between 0 and 1, such as 0.5")
        if not 0.0 <= tune < 1.0:
            raise ValueError(f"tune={tune} is not a fraction of the run in [0, 1)")
        if prefix is not None and (embedding is None or prefix < 0):
            raise ValueError(f"prefix={prefix}: give it along with embedding='...', and not negative")
        self.fraction, self.tune = fraction, tune
        self.embedding, self.prefix = embedding, prefix
        self._now = 0.0  # the share that is dropped in the current step
        self._dropout: Any

    def settings(self) -> dict[str, Any]:
        """The arguments, as plain values for the checkpoint."""
        return {"fraction": self.fraction, "tune": self.tune, "embedding": self.embedding, "prefix": self.prefix}

    # -- hooks --------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a network whose patches cannot be dropped."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            _find(pl_module, self.embedding)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Insert the layer that drops patches."""
        self._attach(_find(pl_module, self.embedding))

    def decide(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drop patches until the last ``tune`` of the run begins."""
        self._drop(self.fraction if progress(trainer) < 1.0 - self.tune else 0.0)

    # -- the technique ------------------------------------------------------------------------------------------------

    def _attach(self, module: Any) -> None:
        from timm.layers import PatchDropout
        from timm.layers.patch_dropout import PatchDropoutWithIndices

        if hasattr(module, "patch_drop"):
            rotary = module.patch_drop is None  # rotary positions need the indices of the kept patches
            kind = PatchDropoutWithIndices if rotary else PatchDropout
            self._dropout = kind(0.0, module.num_prefix_tokens).train(module.training)
            self.undo_later(replace(module, "patch_drop", self._dropout))
        else:
            self._dropout = PatchDropout(0.0, _prefix_tokens(module) if self.prefix is None else self.prefix)
            self.undo_later(
                replace(module, "forward", partial(_dropping_forward, module.forward, module, self._dropout))
            )

    def _drop(self, fraction: float) -> None:
        self._dropout.prob = self._now = fraction

    # -- the clock ----------------------------------------------------------------------------------------------------

    def is_plain(self) -> bool:
        """Whether no patches are dropped."""
        return self._now == 0.0

    def plain_step_kind(self) -> dict[str, Any]:
        """No patches are dropped."""
        return {"dropped": 0.0}

    def step_kind(self) -> dict[str, Any]:
        """The share of the patches that is dropped."""
        return {"dropped": self._now}

    def impose_step_kind(self, trainer: Trainer, pl_module: LightningModule, kind: dict[str, Any]) -> None:
        """Drop as many patches as a step of this kind."""
        self._drop(kind["dropped"])


def _dropping_forward(
    forward: Callable[..., Any], module: nn.Module, drop: nn.Module, *args: Any, **kwargs: Any
) -> Any:
    """Forward of an embedding that leaves out some of its patches in training."""
    tokens = forward(*args, **kwargs)
    if not isinstance(tokens, Tensor) or tokens.ndim != 3:
        raise ValueError(
            f"PatchDropping expects tokens (B, T, C) from {type(module).__name__}, but it returns a "
            f"{type(tokens).__name__}; name another module with embedding='...'"
        )
    drop.train(module.training)
    return drop(tokens)


def _prefix_tokens(module: nn.Module) -> int:
    """Number of tokens before the patches; each parameter in ``_PREFIX`` is (C,) or (1, R, C)."""
    tokens = [getattr(module, name, None) for name in _PREFIX]
    return sum(1 if token.ndim == 1 else token.shape[-2] for token in tokens if isinstance(token, Tensor))


def _find(model: nn.Module, path: str | None) -> nn.Module:
    """The module at which patches can be dropped: a timm network itself, or the embedding of another network."""
    parts = list(model.modules())
    found = [part for part in parts if hasattr(part, "patch_drop") and hasattr(part, "num_prefix_tokens")]
    found = found or [part for part in parts if any(hasattr(part, name) for name in _PATCHES)]
    if path is not None:
        try:
            found = [model.get_submodule(path)]
        except AttributeError:
            raise ValueError(f"embedding={path!r}: {type(model).__name__} has no such part") from None
    if len(found) != 1:
        what = "no Vision Transformer" if not found else f"{len(found)} Vision Transformers"
        raise ValueError(
            f"found {what} in {type(model).__name__}; name the module that returns all tokens (B, T, C) with their "
            "positions added: PatchDropping(embedding='...', prefix=...); text models drop tokens by RandomLTD"
        )
    if hasattr(found[0], "patch_drop"):
        if not isinstance(found[0].patch_drop, nn.Identity | None):
            raise ValueError(f"{type(found[0]).__name__} drops patches already; build it with patch_drop_rate=0")
        return found[0]
    names = [name for name, _ in (*model.named_modules(), *model.named_parameters()) if _INSIDE.search(name)]
    if names:
        raise ValueError(
            f"{type(model).__name__} has positions inside of its blocks ({names[0]}), which need all patches"
        )
    return found[0]
