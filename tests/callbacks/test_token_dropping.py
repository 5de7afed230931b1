"""Token dropping: the running losses, and that tokens are kept by them."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn import functional as F

from lit_scale.callbacks import TokenDropping
from lit_scale.callbacks.token_dropping import running_loss
from lit_scale.models import BertMLM
from tests.support.data import LENGTH, MASK, VOCABULARY, loader
from tests.support.equality import assert_same, same
from tests.support.networks import build
from tests.support.tokens import STEPS, EveryPosition, Lengths, MustNotTrain, train
from tests.support.training import quiet_trainer, save_every_step

pytestmark = [pytest.mark.filterwarnings("ignore")]

EASY: dict[str, Any] = {"special_ids": [MASK]}


def test_the_running_loss_moves_for_tokens_that_were_predicted_only() -> None:
    table, losses, labels = torch.tensor([10.0, 4.0, 10.0]), [2.0, 4.0, 1.0], [0, 0, 1]
    sums = torch.tensor([sum(v for v, t in zip(losses, labels, strict=True) if t == token) for token in range(3)])
    counts = torch.tensor([float(labels.count(token)) for token in range(3)])
    expected = [0.995 * 10.0 + 0.005 * 3.0, 0.995 * 4.0 + 0.005 * 1.0, 10.0]
    torch.testing.assert_close(running_loss(table, sums, counts, 0.995), torch.tensor(expected))


# ---- which tokens run through which blocks


class Remembers(BertMLM):
    """Keeps the labels and losses of each batch by itself."""

    def per_token_loss(self, batch: dict[str, Tensor]) -> Tensor:
        losses = super().per_token_loss(batch)
        if self.training:
            self.__dict__.setdefault("noted", []).append((batch, losses.detach()))
        return losses


@pytest.mark.parametrize("accumulate", [1, 2])
def test_easy_tokens_pass_the_middle_by_and_are_told_by_their_running_loss(accumulate: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module: Any = Remembers(VOCABULARY, LENGTH, depth=6, width=16, num_heads=2, positions="rotary", lr=3e-2)
    lengths, dropping = Lengths(), TokenDropping(**EASY, beta=0.9)
    trainer = quiet_trainer(
        tmp_path,
        max_steps=STEPS,
        accumulate_grad_batches=accumulate,
        callbacks=[dropping, lengths],
        val_check_interval=2,
    )
    trainer.fit(module, loader("bert", size=64), loader("bert", size=4, shuffle=False))
    # of six blocks the first three and the last see all of the eight tokens
    assert lengths.training == [[8, 8, 8, 4, 4, 8]] * STEPS * accumulate  # one forward pass a batch, and no other
    assert lengths.evaluation
    assert all(seen == [8] * 6 for seen in lengths.evaluation)
    kept = [found for found in lengths.kept if found]

    table = [10.0] * VOCABULARY
    for start in range(0, len(module.noted), accumulate):
        window = module.noted[start : start + accumulate]
        for batch, _ in window:
            for ids, places in zip(batch["input_ids"].tolist(), kept.pop(0)[3], strict=True):
                order = sorted(range(LENGTH), key=lambda i: (ids[i] != MASK, -table[ids[i]], i))
                assert places == sorted(order[: LENGTH // 2])
        for token in range(VOCABULARY):
            own = [v for batch, losses in window for v in losses[batch["labels"] == token].tolist()]
            if own:
                table[token] = 0.9 * table[token] + 0.1 * sum(own) / len(own)
    torch.testing.assert_close(dropping.state_dict()["running_loss"], torch.tensor(table))
    assert min(table) < 8.0


@pytest.mark.parametrize("name", ["masked_hf_bert", "masked_torch_encoder"])
def test_easy_tokens_are_told_in_any_module_that_gives_its_losses(name: str, tmp_path: Path) -> None:
    module = build(name)
    lengths, dropping = Lengths(), TokenDropping(**EASY)
    reshape = [EveryPosition()] * ("hf" in name)
    quiet_trainer(tmp_path, max_steps=STEPS, callbacks=[*reshape, dropping, lengths]).fit(module, loader("bert"))
    # of four blocks only the third drops: two before it, one behind; BERT's norm stands behind its attention
    assert lengths.training == [[8, 8, 4, 8]] * STEPS
    table = dropping.state_dict()["running_loss"]
    assert table.numel() == VOCABULARY
    assert 0 < (table < 10.0).sum() < VOCABULARY + 1
    predicted = {label for batch in loader("bert") for label in batch["labels"].flatten().tolist()}
    assert {token for token, loss in enumerate(table.tolist()) if loss != 10.0} <= predicted  # others keep their start


def test_padding_is_dropped_before_anything_else(tmp_path: Path) -> None:
    class Padding(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, *_: Any) -> None:
            batch["attention_mask"] = (torch.arange(LENGTH) >= 4).long().expand(4, -1)

    lengths = Lengths()
    callbacks = [Padding(), TokenDropping(special_ids=[]), lengths]
    quiet_trainer(tmp_path, max_steps=2, callbacks=callbacks).fit(build("bert"), loader("bert"))
    assert all(row == [4, 5, 6, 7] for found in lengths.kept for row in found[2])


def test_all_tokens_run_through_all_blocks_from_until_on(tmp_path: Path) -> None:
    lengths = Lengths()
    quiet_trainer(tmp_path, max_steps=STEPS, callbacks=[TokenDropping(until=0.75, **EASY), lengths]).fit(
        build("bert"), loader("bert")
    )
    assert lengths.training == [[8, 8, 4, 8]] * 6 + [[8, 8, 8, 8]] * 2


# ---- the running losses in a checkpoint


def test_the_running_losses_are_those_of_the_weights_that_were_loaded_last(tmp_path: Path) -> None:
    dropping, data = TokenDropping(**EASY), (loader("bert", size=20), loader("bert", size=4, shuffle=False))
    saving = save_every_step(tmp_path / "steps")
    trainer = quiet_trainer(tmp_path, callbacks=[dropping, saving], max_steps=4, enable_checkpointing=True)
    trainer.fit(module := build("bert"), *data)
    ended = dropping.state_dict()
    early = torch.load(tmp_path / "steps" / "step=2.ckpt", weights_only=True)
    trainer.validate(module, data[1], ckpt_path=tmp_path / "steps" / "step=2.ckpt", verbose=False)
    assert not same(dropping.state_dict(), ended)
    trainer.save_checkpoint(again := tmp_path / "again.ckpt")
    late = torch.load(again, weights_only=True)
    assert_same(late["callbacks"]["TokenDropping"], early["callbacks"]["TokenDropping"])


def test_without_the_running_losses_a_resumed_run_differs(tmp_path: Path) -> None:
    class Forgetful(TokenDropping):
        def state_dict(self) -> dict[str, Any]:
            return {}

    settings = EASY | {"beta": 0.5}
    whole = train("bert", tmp_path, Forgetful(**settings), val_check_interval=5)
    path = tmp_path / "whole" / "step=5.ckpt"
    resumed = train("bert", tmp_path, Forgetful(**settings), resume=path, val_check_interval=5)
    assert not same(whole["weights"], resumed["weights"])


def test_settings_must_not_change_at_resume_nor_be_left_out(tmp_path: Path) -> None:
    train("bert", tmp_path, TokenDropping(**EASY))
    path = tmp_path / "whole" / "step=3.ckpt"
    for change, message in (
        ({"keep": 0.25}, "keep=0.25.* differs from the checkpoint's keep=0.5"),
        ({"beta": 0.9}, "beta=0.9.* differs"),
        ({"special_ids": [1]}, r"special_ids=\[1\].* differs"),
    ):
        with pytest.raises(ValueError, match=message):
            train("bert", tmp_path, TokenDropping(**(EASY | change)), resume=path)
    with pytest.raises(ValueError, match="trained with TokenDropping, which is missing"):
        quiet_trainer(tmp_path, max_steps=STEPS).fit(build("bert"), loader("bert", size=20), ckpt_path=path)
    checkpoint = torch.load(path, weights_only=True)  # numbers, strings and tensors
    assert any("running_loss" in str(state) for state in checkpoint["callbacks"].values())


# ---- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0.0}, r"keep=0.0 is not a share of the tokens in \(0, 1\]"),
        ({"keep": 1.5}, "keep=1.5"),
        ({"keep": math.nan}, "keep=nan"),
        ({"keep": "random"}, "keep='random' is not a share"),  # the first argument was a kind once
        ({"until": 0.0}, "until=0.0 is not a share of the run"),
        ({"until": 2.0}, "until=2.0"),
        ({"beta": 1.0}, r"beta=1.0 is not in \[0, 1\)"),
    ],
)
def test_bad_arguments_are_refused_at_construction(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenDropping(**options)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("bert", {}, r"give special_ids=\[...\] with those of \[MASK\]"),
        ("bert", {"special_ids": [24]}, r"special_ids=\[24\] are not all token ids of a vocabulary of 24"),
        ("timm_vit", EASY, "needs a method per_token_loss.*TimmViT has not both; use RandomLTD"),
        ("hf_bert", EASY, "HFBert has not both"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_trained(
    name: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    trainer = quiet_trainer(tmp_path, max_steps=STEPS, callbacks=[TokenDropping(**options), MustNotTrain()])
    module = build(name)
    with pytest.raises(ValueError, match=message):
        trainer.fit(module, loader(name))
    assert not {"training_step", "per_token_loss"} & set(vars(module))


def test_a_module_that_does_not_ask_for_its_losses_is_refused(tmp_path: Path) -> None:
    class Other(BertMLM):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            return F.cross_entropy(self(batch["input_ids"], batch["positions"]).mT, batch["labels"])

    class Reduced(BertMLM):
        def per_token_loss(self, batch: dict[str, Tensor]) -> Tensor:
            return super().per_token_loss(batch).mean(0, keepdim=True)

    for kind, message in (
        (Other, "Other.training_step did not call"),
        (Reduced, r"returned \(1, 2\) for labels \(4, 2\)"),
    ):
        trainer = quiet_trainer(tmp_path, max_steps=STEPS, callbacks=[TokenDropping(**EASY), MustNotTrain()])
        with pytest.raises(ValueError, match=message):
            trainer.fit(kind(VOCABULARY, LENGTH, depth=4, width=16, num_heads=2), loader("bert"))
