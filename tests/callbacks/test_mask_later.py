"""Masks that join later: for the last blocks only, in evaluation too, and never another way without a word."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor
from torch.nn import functional as F

from lit_scale.callbacks import MaskLater, RandomLTD
from lit_scale.factors.blocks import find_blocks
from lit_scale.factors.tokens import release_tokens
from lit_scale.models import BertMLM
from tests.support.data import LENGTH, VOCABULARY, loader
from tests.support.networks import all_blocks, build
from tests.support.tokens import STEPS, Lengths, MustNotTrain
from tests.support.training import quiet_trainer, save_every_step

pytestmark = [pytest.mark.filterwarnings("ignore")]


def test_masked_positions_join_for_the_last_blocks_only_also_in_evaluation(tmp_path: Path) -> None:
    lengths, batches = Lengths(), []

    class Watch(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, *_: Any) -> None:
            batches.append(batch)

        def on_validation_batch_start(self, *args: Any) -> None:
            self.on_train_batch_start(*args)

    callbacks = [Watch(), MaskLater(), lengths]
    trainer = quiet_trainer(tmp_path, max_steps=4, callbacks=callbacks, num_sanity_val_steps=1)
    trainer.fit(build("bert"), loader("bert", size=16), loader("bert", size=8, shuffle=False))
    assert lengths.training == [[6, 6, 6, 8]] * 4
    assert lengths.evaluation == [[6, 6, 6, 8]] * 3
    for batch, kept in zip(batches, lengths.kept, strict=True):
        masked = [set(row) for row in batch["positions"].tolist()]
        for index in (0, 1, 2):
            assert kept[index] == [sorted(set(range(LENGTH)) - row) for row in masked]
        assert 3 not in kept


# ---- evaluation


def late_loss(module: BertMLM, data: Iterable[dict[str, Tensor]], late: int) -> float:
    """Loss of a BERT whose masked positions are hidden from the first blocks, which leave them as they are."""
    losses = []
    module.eval()
    with torch.no_grad():
        for batch in data:
            x = module.embedding(batch["input_ids"])
            seen = torch.ones_like(batch["input_ids"], dtype=torch.bool).scatter(1, batch["positions"], False)
            for index, block in enumerate(all_blocks(module, "encoder.blocks")):
                if index < late:
                    x = torch.where(seen[..., None], type(block).forward(block, x, seen[:, None, None]), x)
                else:
                    x = type(block).forward(block, x)
            x = module.encoder.norm(x).gather(1, batch["positions"][..., None].expand(-1, -1, x.shape[-1]))
            logits = F.linear(module.head(x), module.embedding.tokens.weight, module.head_bias)
            losses += F.cross_entropy(logits.mT, batch["labels"], reduction="none").mean(1).tolist()
    return sum(losses) / len(losses)


def test_late_masks_are_never_silently_evaluated_another_way(tmp_path: Path) -> None:
    module = build("bert", dropout=0.0, positions="rotary")
    trainer = quiet_trainer(
        tmp_path,
        max_steps=STEPS,
        callbacks=[MaskLater(), save_every_step(tmp_path)],
        enable_checkpointing=True,
        val_check_interval=STEPS,
    )
    data, path = loader("bert", size=12, shuffle=False), tmp_path / f"step={STEPS}.ckpt"
    trainer.fit(module, loader("bert"), data)
    expected = late_loss(module, data, late=3)
    assert trainer.callback_metrics["val/loss"].item() == pytest.approx(expected, rel=1e-5)
    full = late_loss(module, data, late=0)
    assert abs(full - expected) > 1e-3, "the test could not tell"

    # in memory: refused without the callback, right with it, by validate and by test alike
    with pytest.raises(RuntimeError, match=r"join late.*callbacks=\[MaskLater\(\)\].*release_tokens"):
        quiet_trainer(tmp_path).validate(module, data, verbose=False)
    with pytest.raises(RuntimeError, match="join late"):
        module(torch.zeros(1, LENGTH, dtype=torch.long))
    for _ in range(2):
        again = quiet_trainer(tmp_path, callbacks=[MaskLater()])
        (found,) = again.validate(module, data, verbose=False)
        assert found["val/loss"] == pytest.approx(expected, rel=1e-5)

    # from the file: the same
    with pytest.raises(RuntimeError, match="masks join late: evaluate with the technique"):
        BertMLM.load_from_checkpoint(path)
    with pytest.raises(RuntimeError, match="masks join late"):
        quiet_trainer(tmp_path).validate(build("bert", positions="rotary"), data, ckpt_path=path, verbose=False)
    for wrong, message in (
        (MaskLater(after=2), r"masks pass blocks \(0, 3\).*here they pass \(0, 2\)"),
        (RandomLTD(), "masks join late"),
    ):
        with pytest.raises(RuntimeError, match=message):
            quiet_trainer(tmp_path, callbacks=[wrong]).validate(
                build("bert", positions="rotary"), data, ckpt_path=path, verbose=False
            )
    fresh = build("bert", seed=5, positions="rotary")
    again = quiet_trainer(tmp_path, callbacks=[MaskLater()])
    (found,) = again.validate(fresh, data, ckpt_path=path, verbose=False)
    assert found["val/loss"] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match=r"pass blocks \(0, 3\) by; with RandomLTD .*use MaskLater"):
        quiet_trainer(tmp_path, callbacks=[RandomLTD()]).validate(fresh, data, verbose=False)

    # let go, on purpose
    release_tokens(find_blocks(fresh))
    (found,) = quiet_trainer(tmp_path).validate(fresh, data, verbose=False)
    assert found["val/loss"] == pytest.approx(full, rel=1e-5)
    loaded = BertMLM.load_from_checkpoint(path, strict=False)
    (found,) = quiet_trainer(tmp_path).validate(loaded, data, verbose=False)
    assert found["val/loss"] == pytest.approx(full, rel=1e-5)


@pytest.mark.parametrize("order", [0, 1])
def test_an_average_of_weights_is_marked_too(order: int, tmp_path: Path) -> None:
    callbacks: list[Callback] = [MaskLater()]
    callbacks.insert(order, EMAWeightAveraging(decay=0.5))
    saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    options: dict[str, Any] = {"max_steps": 4, "enable_checkpointing": True}
    trainer = quiet_trainer(tmp_path, callbacks=[*callbacks, saving], **options)
    trainer.fit(build("bert"), loader("bert"), loader("bert", size=4))
    with pytest.raises(RuntimeError, match="masks join late"):
        BertMLM.load_from_checkpoint(tmp_path / "step=4.ckpt")
    callbacks = [MaskLater()]
    callbacks.insert(order, EMAWeightAveraging(decay=0.5))
    again = quiet_trainer(tmp_path, callbacks=callbacks, **options)
    again.fit(build("bert", seed=1), loader("bert"), ckpt_path=tmp_path / "step=2.ckpt")
    assert again.global_step == 4


def test_a_mark_from_before_the_card_had_a_page_of_its_own_is_known(tmp_path: Path) -> None:
    saving = save_every_step(tmp_path)
    trainer = quiet_trainer(tmp_path, max_steps=2, callbacks=[MaskLater(), saving], enable_checkpointing=True)
    trainer.fit(build("bert"), loader("bert"))
    checkpoint = torch.load(path := tmp_path / "step=2.ckpt", weights_only=True)
    weights = checkpoint["state_dict"]
    (key,) = (key for key in weights if "masks join late" in key)
    former = "masks join late: evaluate with the technique that was trained with, see lit_scale's docs/token_dropping"
    assert key.startswith(prefix := "encoder.blocks.")
    weights[prefix + former] = weights.pop(key)
    options = {"drop": "masked", "keep": None, "before": 0, "after": 0.25, "until": 1.0, "stages": 8, "seed": 0}
    checkpoint["lit_scale_techniques"] = {"TokenDropping": options}
    torch.save(checkpoint, path)
    with pytest.raises(RuntimeError, match="masks join late: evaluate with the technique"):
        BertMLM.load_from_checkpoint(path)
    data = loader("bert", size=8, shuffle=False)
    with pytest.raises(RuntimeError, match=r"masks pass blocks \(0, 3\).*here they pass \(0, 2\)"):
        quiet_trainer(tmp_path, callbacks=[MaskLater(after=2)]).validate(build("bert"), data, ckpt_path=path)
    (found,) = quiet_trainer(tmp_path, callbacks=[MaskLater()]).validate(
        fresh := build("bert", seed=1), data, ckpt_path=path, verbose=False
    )
    assert found["val/loss"] == pytest.approx(late_loss(fresh, data, late=3), rel=1e-5)


# ---- bad input


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hf_bert", r"MaskLater needs batch\['positions'\], but the batch has \['input_ids', 'label'\]"),
        ("timm_vit", r"needs batch\['input_ids'\], but the batch has \['image', 'label'\]"),
    ],
)
def test_batches_without_masks_are_refused(name: str, message: str, tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, max_steps=STEPS, callbacks=[MaskLater(), MustNotTrain()])
    with pytest.raises(ValueError, match=message):
        trainer.fit(build(name), loader(name))


def test_blocks_that_see_other_tokens_than_the_batch_has_are_refused(tmp_path: Path) -> None:
    class WithClassToken(BertMLM):
        def forward(self, input_ids: Tensor, positions: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
            return super().forward(F.pad(input_ids, (1, 0)), None if positions is None else positions + 1)

    module = WithClassToken(VOCABULARY, LENGTH + 1, depth=4, width=16, num_heads=2)
    trainer = quiet_trainer(tmp_path, max_steps=STEPS, callbacks=[MaskLater(), MustNotTrain()])
    with pytest.raises(ValueError, match=r"\(4, 9\), the batch's input_ids are \(4, 8\)"):
        trainer.fit(module, loader("bert"))
