import functools
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F

from lit_scale.callbacks import ProgressiveStacking, TokenDropping
from lit_scale.callbacks.token_dropping import growing_share
from lit_scale.cost import CostMeter
from lit_scale.factors.blocks import find_blocks
from lit_scale.factors.token_choice import running_loss
from lit_scale.factors.tokens import release_tokens
from lit_scale.guards import StepSeed
from lit_scale.models import BertMLM
from tests.support.data import LENGTH, VOCABULARY, loader
from tests.support.networks import HFBert, TorchEncoder, all_blocks, build
from tests.support.training import quiet_trainer, save_every_step

pytestmark = [pytest.mark.filterwarnings("ignore")]

STEPS = 8
MASK = 0  # the token that hides another, in the loader of tiny_bert
EASY: dict[str, Any] = {"drop": "easy", "special_ids": [MASK]}
MASKED: dict[str, Any] = {"drop": "masked"}
RANDOM: dict[str, Any] = {"drop": "random", "keep": 0.25, "stages": 3}
KINDS = {"easy": EASY, "masked": MASKED, "random": RANDOM}
IMAGES_AND_TEXT = ["timm_vit", "hf_bert", "hf_gpt2", "torch_encoder", "bert"]


class MaskedHFBert(HFBert):
    """A Hugging Face BERT with a head over all positions, and labels of -100 where nothing is to be predicted."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        losses = self.per_token_loss(batch)
        return losses.sum() / (batch["labels"] >= 0).sum()

    def per_token_loss(self, batch: dict[str, Tensor]) -> Tensor:
        hidden = self.net(batch["input_ids"]).last_hidden_state
        logits = hidden @ self.net.embeddings.word_embeddings.weight.T  # (B, T, V)
        return F.cross_entropy(logits.mT, batch["labels"], reduction="none", ignore_index=-100)


class MaskedTorchEncoder(TorchEncoder):
    """A plain torch network that is trained on batches as BertMLM takes them."""

    def build(self, depth: int, dropout: float) -> nn.Module:
        network = super().build(depth, dropout)
        network[2] = nn.Linear(network[2].in_features, VOCABULARY)
        return network

    def per_token_loss(self, batch: dict[str, Tensor]) -> Tensor:
        logits = self.net(batch["input_ids"])  # (B, T, V)
        logits = logits.gather(1, batch["positions"][..., None].expand(-1, -1, VOCABULARY))
        return F.cross_entropy(logits.mT, batch["labels"], reduction="none")

    def per_sample_loss(self, batch: dict[str, Tensor]) -> Tensor:
        return self.per_token_loss(batch).mean(1)


def made(name: str, **options: Any) -> LightningModule:
    kinds = {"hf_bert, masked": MaskedHFBert, "torch_encoder, masked": MaskedTorchEncoder}
    if name not in kinds:
        return build(name, **options)
    torch.manual_seed(options.pop("seed", 0))
    return kinds[name](**options)


class EveryPosition(Callback):
    """Turns positions and labels (B, M) into labels (B, T), -100 elsewhere."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        full = torch.full_like(batch["input_ids"], -100)
        batch["labels"] = full.scatter_(1, batch.pop("positions"), batch["labels"])


def path_of(module: LightningModule) -> str:
    return getattr(module, "blocks", "encoder.blocks")


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
                places = functools.partial(note_places, index)
                self._handles.append(block.attention.register_forward_pre_hook(places, with_kwargs=True))

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


# ---- the formulas


def test_the_running_loss_moves_for_tokens_that_were_predicted_only() -> None:
    table, losses, labels = torch.tensor([10.0, 4.0, 10.0]), [2.0, 4.0, 1.0], [0, 0, 1]
    sums = torch.tensor([sum(v for v, t in zip(losses, labels, strict=True) if t == token) for token in range(3)])
    counts = torch.tensor([float(labels.count(token)) for token in range(3)])
    expected = [0.995 * 10.0 + 0.005 * 3.0, 0.995 * 4.0 + 0.005 * 1.0, 10.0]
    torch.testing.assert_close(running_loss(table, sums, counts, 0.995), torch.tensor(expected))


@pytest.mark.parametrize(("keep", "until", "stages"), [(0.0625, 0.75, 8), (0.5, 1.0, 1), (0.3, 0.6, 7)])
def test_random_dropping_grows_in_equal_steps_to_all_tokens(keep: float, until: float, stages: int) -> None:
    grid = [i / 1000 for i in range(1001)]
    shares = [growing_share(p, keep, until, stages) for p in grid]
    assert shares == sorted(shares)
    assert sorted(set(shares)) == pytest.approx([keep + (1 - keep) * i / stages for i in range(stages + 1)], abs=1e-6)
    for p, share in zip(grid, shares, strict=True):  # never ahead of the line, nor a step behind
        line = min(1.0, keep + (1 - keep) * p / until)
        assert line - (1 - keep) / stages - 1e-5 <= share <= line + 1e-5
    assert growing_share(until, keep, until, stages) == 1.0


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
    module = Remembers(VOCABULARY, LENGTH, depth=6, width=16, num_heads=2, positions="rotary", lr=3e-2)
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


@pytest.mark.parametrize("name", ["hf_bert, masked", "torch_encoder, masked"])
def test_easy_tokens_are_told_in_any_module_that_gives_its_losses(name: str, tmp_path: Path) -> None:
    module = made(name)
    lengths, dropping = Lengths(), TokenDropping(**EASY)
    reshape = [EveryPosition()] * name.startswith("hf")
    quiet_trainer(tmp_path, max_steps=STEPS, callbacks=[*reshape, dropping, lengths]).fit(module, loader("bert"))
    # of four blocks only the third drops: two before it, one behind; BERT's norm stands behind its attention
    assert lengths.training == [[8, 8, 4, 8]] * STEPS
    table = dropping.state_dict()["running_loss"]
    assert table.numel() == VOCABULARY
    assert 0 < (table < 10.0).sum() < VOCABULARY + 1
    assert table[MASK] == 10.0 or 0 in {i for batch in loader("bert") for i in batch["labels"].flatten().tolist()}


def test_padding_is_dropped_before_anything_else(tmp_path: Path) -> None:
    class Padding(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, *_: Any) -> None:
            batch["attention_mask"] = (torch.arange(LENGTH) >= 4).long().expand(4, -1)

    lengths = Lengths()
    callbacks = [Padding(), TokenDropping("easy", special_ids=[]), lengths]
    quiet_trainer(tmp_path, max_steps=2, callbacks=callbacks).fit(build("bert"), loader("bert"))
    assert all(row == [4, 5, 6, 7] for found in lengths.kept for row in found[2])


def test_masked_positions_join_for_the_last_blocks_only_also_in_evaluation(tmp_path: Path) -> None:
    lengths, batches = Lengths(), []

    class Watch(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, *_: Any) -> None:
            batches.append(batch)

        on_validation_batch_start = on_train_batch_start

    callbacks = [Watch(), TokenDropping("masked"), lengths]
    trainer = quiet_trainer(tmp_path, max_steps=4, callbacks=callbacks, num_sanity_val_steps=1)
    trainer.fit(build("bert"), loader("bert", size=16), loader("bert", size=8, shuffle=False))
    assert lengths.training == [[6, 6, 6, 8]] * 4
    assert lengths.evaluation == [[6, 6, 6, 8]] * 3
    for batch, kept in zip(batches, lengths.kept, strict=True):
        masked = [set(row) for row in batch["positions"].tolist()]
        for index in (0, 1, 2):
            assert kept[index] == [sorted(set(range(LENGTH)) - row) for row in masked]
        assert 3 not in kept


def test_random_subsets_are_a_function_of_seed_step_and_block(tmp_path: Path) -> None:
    def run(**options: Any) -> tuple[list[dict[int, Any]], list[list[int]]]:
        lengths = Lengths()
        torch.manual_seed(torch.seed())  # whatever else is drawn does not matter
        dropping = TokenDropping("random", **({"keep": 0.5, "until": 1.0, "stages": 2} | options))
        trainer = quiet_trainer(tmp_path, max_steps=STEPS, callbacks=[dropping, lengths], val_check_interval=2)
        trainer.fit(build("bert", depth=6, dropout=0.0), loader("bert"), loader("bert", size=4))
        assert all(seen == [8] * 6 for seen in lengths.evaluation)
        return [found for found in lengths.kept if found], lengths.training

    kept, seen = run()
    assert seen == [[8, 4, 4, 4, 4, 8]] * 4 + [[8, 6, 6, 6, 6, 8]] * 4
    assert kept == run()[0]
    assert kept != run(seed=1)[0]
    assert all(row == sorted(set(row)) for found in kept for rows in found.values() for row in rows)  # causal order
    every = [tuple(map(tuple, rows)) for found in kept for rows in found.values()]
    assert len(every) == len(set(every)) == 32, "each block of each step has its own"
    assert all(len(set(rows)) > 1 for rows in every), "and each sample"


@pytest.mark.parametrize("name", ["timm_vit", "hf_bert", "hf_gpt2", "torch_encoder"])
def test_random_dropping_serves_any_network(name: str, tmp_path: Path) -> None:
    lengths = Lengths()
    trainer = quiet_trainer(tmp_path, max_steps=STEPS, callbacks=[TokenDropping("random", keep=0.5, stages=1), lengths])
    trainer.fit(made(name), loader(name))
    tokens = 5 if name == "timm_vit" else LENGTH
    middle = round(0.5 * tokens)
    assert lengths.training == [[tokens, middle, middle, tokens]] * 6 + [[tokens] * 4] * 2  # until 3/4 of the run


def test_the_class_token_is_always_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lit_scale.factors import tokens

    kept: list[Tensor] = []
    begin = tokens.TokenSpan.begin

    def watch(self: Any, x: Tensor) -> None:
        begin(self, x)
        kept.extend([] if self.kept is None else [self.kept])

    monkeypatch.setattr(tokens.TokenSpan, "begin", watch)
    for prefix, first in ((None, {0}), (0, {0, 1, 2, 3})):
        kept.clear()
        dropping = TokenDropping("random", keep=0.4, until=1.0, stages=1, prefix=prefix)
        quiet_trainer(tmp_path, max_steps=20, callbacks=[dropping]).fit(made("timm_vit"), loader("timm_vit"))
        places = torch.cat(kept)
        assert set(places[:, 0].tolist()) == first
        assert places.shape[1] == 2


# ---- evaluation


@pytest.mark.parametrize("kind", ["easy", "random"])
@pytest.mark.parametrize("name", ["bert", "torch_encoder, masked"])
def test_evaluation_uses_all_tokens_and_nothing_is_left_after_training(name: str, kind: str, tmp_path: Path) -> None:
    module = made(name, dropout=0.0)
    before = [set(vars(block)) for block in all_blocks(module, path_of(module))]
    options = KINDS[kind] | ({"until": 1.0} if kind == "random" else {})
    trainer = quiet_trainer(tmp_path, max_steps=4, callbacks=[TokenDropping(**options)], val_check_interval=4)
    data = loader("bert", size=12, shuffle=False)
    trainer.fit(module, loader("bert"), data)
    during = trainer.callback_metrics["val/loss"]
    (after,) = quiet_trainer(tmp_path).validate(module, data, verbose=False)
    plain = made(name, dropout=0.0)
    plain.load_state_dict(module.state_dict())
    (expected,) = quiet_trainer(tmp_path).validate(plain, data, verbose=False)
    assert during == after["val/loss"] == expected["val/loss"]
    assert [set(vars(block)) for block in all_blocks(module, path_of(module))] == before
    assert not {"training_step", "per_token_loss", "validation_step"} & set(vars(module))


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
        callbacks=[TokenDropping("masked"), save_every_step(tmp_path)],
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
    with pytest.raises(RuntimeError, match=r"join late.*callbacks=\[TokenDropping\('masked'\)\].*release_tokens"):
        quiet_trainer(tmp_path).validate(module, data, verbose=False)
    with pytest.raises(RuntimeError, match="join late"):
        module(torch.zeros(1, LENGTH, dtype=torch.long))
    for _ in range(2):
        again = quiet_trainer(tmp_path, callbacks=[TokenDropping("masked")])
        (found,) = again.validate(module, data, verbose=False)
        assert found["val/loss"] == pytest.approx(expected, rel=1e-5)

    # from the file: the same
    with pytest.raises(RuntimeError, match="masks join late: evaluate with the technique"):
        BertMLM.load_from_checkpoint(path)
    with pytest.raises(RuntimeError, match="masks join late"):
        quiet_trainer(tmp_path).validate(build("bert", positions="rotary"), data, ckpt_path=path, verbose=False)
    for wrong, message in (
        (TokenDropping("masked", after=2), r"masks pass blocks \(0, 3\).*here they pass \(0, 2\)"),
        (TokenDropping("random"), "masks join late"),
    ):
        with pytest.raises(RuntimeError, match=message):
            quiet_trainer(tmp_path, callbacks=[wrong]).validate(
                build("bert", positions="rotary"), data, ckpt_path=path, verbose=False
            )
    fresh = build("bert", seed=5, positions="rotary")
    again = quiet_trainer(tmp_path, callbacks=[TokenDropping("masked")])
    (found,) = again.validate(fresh, data, ckpt_path=path, verbose=False)
    assert found["val/loss"] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match=r"pass blocks \(0, 3\) by; with drop='random'"):
        quiet_trainer(tmp_path, callbacks=[TokenDropping("random")]).validate(fresh, data, verbose=False)

    # let go, on purpose
    release_tokens(find_blocks(fresh))
    (found,) = quiet_trainer(tmp_path).validate(fresh, data, verbose=False)
    assert found["val/loss"] == pytest.approx(full, rel=1e-5)
    loaded = BertMLM.load_from_checkpoint(path, strict=False)
    (found,) = quiet_trainer(tmp_path).validate(loaded, data, verbose=False)
    assert found["val/loss"] == pytest.approx(full, rel=1e-5)


@pytest.mark.parametrize("order", [0, 1])
def test_an_average_of_weights_is_marked_too(order: int, tmp_path: Path) -> None:
    callbacks: list[Callback] = [TokenDropping("masked")]
    callbacks.insert(order, EMAWeightAveraging(decay=0.5))
    saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    options: dict[str, Any] = {"max_steps": 4, "enable_checkpointing": True}
    trainer = quiet_trainer(tmp_path, callbacks=[*callbacks, saving], **options)
    trainer.fit(build("bert"), loader("bert"), loader("bert", size=4))
    with pytest.raises(RuntimeError, match="masks join late"):
        BertMLM.load_from_checkpoint(tmp_path / "step=4.ckpt")
    callbacks = [TokenDropping("masked")]
    callbacks.insert(order, EMAWeightAveraging(decay=0.5))
    again = quiet_trainer(tmp_path, callbacks=callbacks, **options)
    again.fit(build("bert", seed=1), loader("bert"), ckpt_path=tmp_path / "step=2.ckpt")
    assert again.global_step == 4


# ---- exact resume


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


def train(
    name: str, root: Path, dropping: dict[str, Any], *, resume: Path | None = None, **options: Any
) -> dict[str, Any]:
    if resume is not None:
        torch.manual_seed(12_345)  # a resumed process has another past
    module = made(name, seed=1 if resume else 0)
    lengths, callback = Lengths(), options.pop("kind", TokenDropping)(**dropping)
    also = [ProgressiveStacking(options.pop("stages"))] if "stages" in options else []
    also.insert(options.pop("order", 0), callback)
    meter = [CostMeter(repeats=1)] if options.pop("meter", False) else []
    saving = [] if resume else [save_every_step(root / "whole")]
    defaults = {"max_steps": STEPS, "val_check_interval": 1, "enable_checkpointing": not resume}
    trainer = quiet_trainer(root, callbacks=[*also, lengths, StepSeed(), *meter, *saving], **(defaults | options))
    data = "bert" if "masked" in name else name
    trainer.fit(module, loader(data, size=20), loader(data, size=4, shuffle=False), ckpt_path=resume)
    assert trainer.global_step == STEPS
    return {
        "weights": module.state_dict(),
        "optimizer": trainer.optimizers[0].state_dict(),
        "state": callback.state_dict(),
        "metrics": dict(trainer.callback_metrics),
        "lengths": lengths.training[-1],
        "kept": lengths.kept[-2:],
    }


@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [
        ("bert", "easy", {}),
        ("bert", "easy", {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05, "meter": True}),
        ("torch_encoder, masked", "easy", {}),
        ("bert", "masked", {}),
        ("bert", "random", {}),
        ("timm_vit", "random", {}),
        ("hf_gpt2", "random", {}),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(name: str, kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    whole = train(name, tmp_path, KINDS[kind], **options)
    for stop in (1, 3, 5):  # within an epoch, and at its end
        resumed = train(name, tmp_path, KINDS[kind], resume=tmp_path / "whole" / f"step={stop}.ckpt", **options)
        assert [part for part in whole if not equal(whole[part], resumed[part])] == [], f"resumed from step {stop}"
    if kind == "easy":
        assert (whole["state"]["running_loss"] < 10.0).any()


def test_the_running_losses_are_those_of_the_weights_that_were_loaded_last(tmp_path: Path) -> None:
    dropping, data = TokenDropping(**EASY), (loader("bert", size=20), loader("bert", size=4, shuffle=False))
    saving = save_every_step(tmp_path / "steps")
    trainer = quiet_trainer(tmp_path, callbacks=[dropping, saving], max_steps=4, enable_checkpointing=True)
    trainer.fit(module := made("bert"), *data)
    ended = dropping.state_dict()
    early = torch.load(tmp_path / "steps" / "step=2.ckpt", weights_only=True)
    trainer.validate(module, data[1], ckpt_path=tmp_path / "steps" / "step=2.ckpt", verbose=False)
    assert not equal(dropping.state_dict(), ended)
    trainer.save_checkpoint(again := tmp_path / "again.ckpt")
    assert equal(
        torch.load(again, weights_only=True)["callbacks"]["TokenDropping"], early["callbacks"]["TokenDropping"]
    )


def test_without_the_running_losses_a_resumed_run_differs(tmp_path: Path) -> None:
    class Forgetful(TokenDropping):
        def state_dict(self) -> dict[str, Any]:
            return {}

    options: dict[str, Any] = {"kind": Forgetful, "val_check_interval": 5}
    settings = EASY | {"beta": 0.5}
    whole = train("bert", tmp_path, settings, **options)
    resumed = train("bert", tmp_path, settings, resume=tmp_path / "whole" / "step=5.ckpt", **options)
    assert not equal(whole["weights"], resumed["weights"])


def test_settings_must_not_change_at_resume_nor_be_left_out(tmp_path: Path) -> None:
    train("bert", tmp_path, EASY)
    path = tmp_path / "whole" / "step=3.ckpt"
    for change, message in (
        ({"keep": 0.25}, "keep=0.25.* differs from the checkpoint's keep=0.5"),
        ({"beta": 0.9}, "beta=0.9.* differs"),
        ({"drop": "random"}, "drop='random'.* differs"),
        ({"seed": 1}, "seed=1.* differs"),
    ):
        with pytest.raises(ValueError, match=message):
            train("bert", tmp_path, EASY | change, resume=path)
    with pytest.raises(ValueError, match="trained with TokenDropping, which is missing"):
        quiet_trainer(tmp_path, max_steps=STEPS).fit(build("bert"), loader("bert", size=20), ckpt_path=path)
    checkpoint = torch.load(path, weights_only=True)  # numbers, strings and tensors
    assert any("running_loss" in str(state) for state in checkpoint["callbacks"].values())


# ---- what it costs


def test_keeping_all_tokens_is_the_plain_run(tmp_path: Path) -> None:
    def run(*callbacks: Callback) -> dict[str, Any]:
        module = build("bert")
        quiet_trainer(tmp_path, max_steps=4, callbacks=[StepSeed(), *callbacks]).fit(module, loader("bert"))
        return module.state_dict()

    plain = run()
    for kind in (EASY, RANDOM):
        assert equal(plain, run(TokenDropping(**kind | {"keep": 1.0})))
    assert not equal(plain, run(TokenDropping(**EASY)))


@pytest.mark.parametrize("kind", KINDS)
def test_the_clock_sees_the_shapes_and_its_replay_leaves_no_trace(kind: str, tmp_path: Path) -> None:
    found = {}
    for repeats in (0, 2):
        module = build("bert", depth=6)
        options = KINDS[kind] | ({"until": 0.75} if kind != "masked" else {})
        dropping, meter = TokenDropping(**options), CostMeter(repeats=repeats)
        trainer = quiet_trainer(tmp_path, max_steps=STEPS, callbacks=[StepSeed(), dropping, meter])
        trainer.fit(module, loader("bert"))
        record = meter.record(trainer, module)
        found[repeats] = [module.state_dict(), trainer.optimizers[0].state_dict(), dropping.state_dict()]
    assert equal(*found.values())
    assert all(shape["price"] == "replay" for shape in record["step_kinds"])
    stages = {stage["token_dropping/kept"]: stage for stage in record["stages"]}
    assert list(stages) == {"easy": [0.5, 1.0], "masked": ["unmasked"], "random": [0.25, 0.5, 0.75, 1.0]}[kind]
    assert [stage["plain"] for stage in stages.values()] == [kept == 1.0 for kept in stages]
    each = [stage["flops"] / stage["steps"] for stage in stages.values()]
    assert each == sorted(each)
    baseline = CostMeter(repeats=0)
    trainer = quiet_trainer(tmp_path, max_steps=2, callbacks=[baseline])
    trainer.fit(build("bert", depth=6), loader("bert"))
    full = baseline.totals()["flops"] / 2
    (plain,) = (shape for shape in record["step_kinds"] if shape["plain"])
    assert plain["flops_each"] == full > each[0]
    assert (plain["count"] == 0) == (kind == "masked")  # it makes no plain step, and has one priced all the same
    if kind != "masked":
        assert full == each[-1]
        assert len(set(each)) == len(each)


@pytest.mark.slow
def test_a_compiled_network_recompiles_once_for_each_share(tmp_path: Path) -> None:
    weights = []
    for compiled in (False, True):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        module = made("torch_encoder", dropout=0.0)
        if compiled:
            module.net = torch.compile(module.net, backend="eager", fullgraph=True)
        dropping = TokenDropping("random", keep=0.25, stages=3, blocks="net._orig_mod.1.layers" if compiled else None)
        quiet_trainer(tmp_path, max_steps=STEPS, callbacks=[dropping]).fit(module, loader("torch_encoder"))
        weights.append(list(module.state_dict().values()))
    for one, other in zip(*weights, strict=True):
        torch.testing.assert_close(one, other)
    assert 1 < torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4  # shares


# ---- with progressive stacking


STAGES = [(0.0, 0.25), (0.25, 0.5), (0.625, 1.0)]  # 1, 2 and 4 blocks, from steps 0, 2 and 5


def test_a_whole_number_of_blocks_is_one_however_it_was_read() -> None:
    assert TokenDropping(before=4.0, after=1.0).settings() == TokenDropping(before=4, after=1).settings()
    assert TokenDropping(before=0.5).before == 0.5


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_with_progressive_stacking_the_span_counts_the_active_blocks(kind: str, order: int, tmp_path: Path) -> None:
    settings = KINDS[kind] | ({"until": 1.0, "stages": 1} if kind == "random" else {})
    lengths = Lengths()
    callbacks: list[Callback] = [ProgressiveStacking(STAGES)]
    callbacks.insert(order, TokenDropping(**settings))
    quiet_trainer(tmp_path, max_steps=STEPS, callbacks=[*callbacks, lengths]).fit(build("bert"), loader("bert"))
    one, two, four = {
        "easy": ([8], [8, 8], [8, 8, 4, 8]),
        "masked": ([8], [6, 8], [6, 6, 6, 8]),
        "random": ([8], [8, 8], [8, 2, 2, 8]),
    }[kind]
    assert lengths.training == [one] * 2 + [two] * 3 + [four] * 3


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "order"), [("easy", 0), ("masked", 1), ("random", 1)])
def test_with_progressive_stacking_it_resumes_exactly(kind: str, order: int, tmp_path: Path) -> None:
    options: dict[str, Any] = {"stages": STAGES, "order": order, "meter": True}
    whole = train("bert", tmp_path, KINDS[kind], **options)
    for stop in (1, 2, 5, 6):
        resumed = train("bert", tmp_path, KINDS[kind], resume=tmp_path / "whole" / f"step={stop}.ckpt", **options)
        assert [part for part in whole if not equal(whole[part], resumed[part])] == [], f"resumed from step {stop}"


def test_frozen_old_blocks_are_refused(tmp_path: Path) -> None:
    callbacks = [ProgressiveStacking(STAGES, freeze_old=True), TokenDropping(**EASY)]
    with pytest.raises(ValueError, match="does not go with freeze_old=True"):
        quiet_trainer(tmp_path, max_steps=STEPS, callbacks=callbacks).fit(build("bert"), loader("bert"))


# ---- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop": "hard"}, "drop='hard': choose 'easy', 'masked' or 'random'"),
        ({"keep": 0.0}, r"keep=0.0 is not a share of the tokens in \(0, 1\]"),
        ({"keep": 1.5}, "keep=1.5"),
        ({"keep": math.nan}, "keep=nan"),
        ({"drop": "masked", "keep": 0.5}, "keep=0.5 with drop='masked': the batch's masked positions decide"),
        ({"drop": "masked", "until": 0.5}, "until=0.5 with drop='masked'"),
        ({"until": 0.0}, "until=0.0 is not a share of the run"),
        ({"until": 2.0}, "until=2.0"),
        ({"before": -1}, "before=-1 is neither a number of blocks nor a fraction"),
        ({"before": 1.5}, "before=1.5 is neither"),
        ({"after": True}, "after=True is neither"),
        ({"after": math.nan}, "after=nan is neither"),
        ({"stages": 0}, "stages=0 must be at least 1"),
        ({"beta": 1.0}, r"beta=1.0 is not in \[0, 1\)"),
        ({"prefix": -1}, "prefix=-1 must not be negative"),
    ],
)
def test_bad_arguments_are_refused_at_construction(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenDropping(**options)


class MustNotTrain(Callback):
    def on_before_optimizer_step(self, *_: Any) -> None:
        raise AssertionError("a step was made")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("bert", EASY | {"before": 3}, "before=3 and after=1 leave no block of the model's 4"),
        ("bert", EASY | {"after": 9}, "before=0.5 and after=9 leave no block"),
        ("bert", {"drop": "easy"}, r"give special_ids=\[...\] with those of \[MASK\]"),
        (
            "bert",
            {"drop": "easy", "special_ids": [24]},
            r"special_ids=\[24\] are not all token ids of a vocabulary of 24",
        ),
        ("bert", EASY | {"blocks": "nowhere"}, "blocks='nowhere'.*candidates: 'encoder.blocks'"),
        ("timm_vit", EASY, "needs a method per_token_loss.*TimmViT has not both; use drop='random'"),
        ("hf_bert", EASY, "HFBert has not both"),
        ("hf_bert", MASKED, r"drop='masked' needs batch\['positions'\], but the batch has \['input_ids', 'label'\]"),
        ("timm_vit", MASKED, r"needs batch\['input_ids'\], but the batch has \['image', 'label'\]"),
        ("plain_torch", RANDOM, r"from \(batch, tokens, channels\), but the blocks get \(4, 16\)"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_trained(
    name: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    trainer = quiet_trainer(tmp_path, max_steps=STEPS, callbacks=[TokenDropping(**options), MustNotTrain()])
    module = made(name)
    with pytest.raises(ValueError, match=message):
        trainer.fit(module, loader(name))
    if options.get("drop") != "masked":
        assert "training_step" not in vars(module)


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


def test_blocks_that_see_other_tokens_than_the_batch_has_are_refused(tmp_path: Path) -> None:
    class WithClassToken(BertMLM):
        def forward(self, input_ids: Tensor, positions: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
            return super().forward(F.pad(input_ids, (1, 0)), None if positions is None else positions + 1)

    module = WithClassToken(VOCABULARY, LENGTH + 1, depth=4, width=16, num_heads=2)
    trainer = quiet_trainer(tmp_path, max_steps=STEPS, callbacks=[TokenDropping("masked"), MustNotTrain()])
    with pytest.raises(ValueError, match=r"\(4, 9\), the batch's input_ids are \(4, 8\)"):
        trainer.fit(module, loader("bert"))
