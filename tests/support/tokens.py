"""Runs of the techniques that drop tokens, and what a test notes of them: which tokens ran through which blocks."""

import functools
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from lit_scale.callbacks import MaskLater, ProgressiveStacking, RandomLTD, TokenDropping
from lit_scale.cost import CostMeter
from lit_scale.factors.token_choice import TokenChoice
from lit_scale.models import BertMLM
from tests.support.data import MASK, loader
from tests.support.networks import all_blocks, build, path_of
from tests.support.training import fit, left, save_every_step

STEPS = 8
#: Each technique, with arguments that suit networks of 4 blocks and sequences of 8 tokens.
KINDS: dict[type[TokenChoice], dict[str, Any]] = {
    TokenDropping: {"special_ids": [MASK]},
    MaskLater: {},
    RandomLTD: {"keep": 0.25, "stages": 3},
}


def make(kind: type[TokenChoice], **options: Any) -> TokenChoice:
    return kind(**(KINDS[kind] | options))


class EveryPosition(Callback):
    """Turns positions and labels (B, M) into labels (B, T), -100 elsewhere."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        full = torch.full_like(batch["input_ids"], -100)
        batch["labels"] = full.scatter_(1, batch.pop("positions"), batch["labels"])


class Lengths(Callback):
    """Notes, for every forward pass, how many tokens the blocks saw, and of our own which; found without lit_scale."""

    def __init__(self) -> None:
        self.training: list[list[int]] = []
        self.evaluation: list[list[int]] = []
        self.kept: list[dict[int, list[list[int]]]] = []
        self._now: list[int] = []
        self._handles: list[Any] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        def note(index: int, module: nn.Module, args: Any) -> None:
            self._now.append(args[0].shape[1])

        def note_places(index: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            if kwargs.get("positions") is not None:
                self.kept[-1][index] = kwargs["positions"].tolist()

        for index, block in enumerate(all_blocks(pl_module, path_of(pl_module))):
            norm = next(part for part in block.modules() if isinstance(part, nn.LayerNorm))
            self._handles.append(norm.register_forward_pre_hook(functools.partial(note, index)))
            if isinstance(pl_module, BertMLM):
                places, attention = functools.partial(note_places, index), block.attention
                assert isinstance(attention, nn.Module)
                self._handles.append(attention.register_forward_pre_hook(places, with_kwargs=True))

    def on_train_batch_start(self, *_: Any) -> None:
        self._now = []
        self.training.append(self._now)
        self.kept.append({})

    def on_validation_batch_start(self, *_: Any) -> None:
        self._now = []
        self.evaluation.append(self._now)
        self.kept.append({})

    def teardown(self, *_: Any, **__: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    on_train_end = teardown  # what comes after is replayed for the clock


class MustNotTrain(Callback):
    """Fails where a step is made."""

    def on_before_optimizer_step(self, *_: Any) -> None:
        raise AssertionError("a step was made")


def train(
    name: str, root: Path, technique: TokenChoice, *, resume: Path | None = None, **options: Any
) -> dict[str, Any]:
    """Train a network, from its beginning or from a checkpoint, and return all that has to be equal then."""
    lengths = Lengths()
    callbacks: list[Callback] = [ProgressiveStacking(options.pop("stages"))] if "stages" in options else []
    callbacks.insert(options.pop("order", 0), technique)
    callbacks += [lengths, *([CostMeter(repeats=1)] if options.pop("meter", False) else [])]
    callbacks += [] if resume else [save_every_step(root / "whole")]
    usual: dict[str, Any] = {"max_steps": STEPS, "val_check_interval": 1, "val": loader(name, size=4, shuffle=False)}
    options = usual | options
    module = build(name, seed=1 if resume else 0)
    trainer = fit(module, loader(name, size=20), root, *callbacks, resume=resume, **options)
    assert trainer.global_step == options["max_steps"]
    return left(trainer) | {"lengths": lengths.training[-1], "kept": lengths.kept[-2:]}
