"""The base of techniques that let some blocks run, by two small ones."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.strategies import DDPStrategy

from lit_scale.cost import CostMeter
from lit_scale.factors.active_blocks import ActiveBlocks
from lit_scale.factors.blocks import count_blocks, find_blocks
from lit_scale.guards import StepSeed
from lit_scale.technique import Technique, averages
from tests.support.data import loader
from tests.support.equality import assert_same
from tests.support.networks import DEPTH, build, slots
from tests.support.training import Recorder, left, quiet_trainer, save_every_step

pytestmark = [pytest.mark.filterwarnings("ignore")]


class Doubling(ActiveBlocks):
    """Half of the blocks, then all of them as copies."""

    joins_late = False

    def __init__(self, at: int = 2, blocks: str | None = None) -> None:
        super().__init__(blocks)
        self.at = at

    def first_blocks(self) -> Iterable[int]:
        return range(DEPTH // 2)

    def decide(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == self.at and not self.is_plain():
            self.copy_blocks(trainer, {2: 0, 3: 1})
            self.activate(trainer, pl_module, range(DEPTH))


class Skipping(ActiveBlocks):
    """Each step without one of the blocks, and every third with all of them."""

    for_one_step = True

    def decide(self, trainer: Trainer, pl_module: LightningModule) -> None:
        step, total = trainer.global_step, len(self.stack)
        self.activate(trainer, pl_module, [i for i in range(total) if i != step % total or step % 3 == 2])


class Copies(Technique):
    factor = "weights"

    def __init__(self) -> None:
        self.pairs: list[Any] = []

    def on_copy(self, pairs: Any) -> None:
        self.pairs += pairs


class Depths(Callback):
    """How many blocks of the model and of its averages run, at each hook."""

    def __init__(self) -> None:
        self.seen: dict[str, list[tuple[int, ...]]] = {}

    def note(self, hook: str, trainer: Trainer, module: Any) -> None:
        models: list[Any] = [module, *averages(trainer)]
        depths = tuple(len(model.net.layers) for model in models)
        self.seen.setdefault(hook, []).append(depths)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.note("start", trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.note("end", trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.note("validation", trainer, pl_module)


def fit(root: Path, *callbacks: Callback, resume: Path | None = None, seed: int = 0, **options: Any) -> Any:
    module = build("plain_torch", seed=seed)
    trainer = quiet_trainer(root, callbacks=[StepSeed(), *callbacks], **({"max_steps": 4} | options))
    trainer.fit(module, loader("plain_torch", size=16), loader("plain_torch", size=4), ckpt_path=resume)
    return module, trainer


def test_blocks_run_in_the_model_and_in_its_averages(tmp_path: Path) -> None:
    depths, average = Depths(), EMAWeightAveraging(decay=0.9)
    fit(tmp_path, Doubling(), average, depths)
    assert depths.seen["start"] == depths.seen["end"] == [(2, 2), (2, 2), (4, 4), (4, 4)]
    assert depths.seen["validation"] == [(4, 4)]


def test_copies_take_weights_averages_optimizer_state_and_what_others_keep(tmp_path: Path) -> None:
    found: dict[str, Any] = {}

    class Looks(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            if trainer.global_step == 2:
                for model in (pl_module, *averages(trainer)):
                    one, other = (dict(find_blocks(model).blocks[i].named_parameters()) for i in (0, 2))
                    assert all(torch.equal(one[name], other[name]) for name in one)
                optimizer = trainer.optimizers[0]
                pairs = zip(*(find_blocks(pl_module).blocks[i].parameters() for i in (1, 3)), strict=True)
                for a, b in pairs:
                    assert slots(optimizer, a)
                    assert_same(slots(optimizer, a), slots(optimizer, b))
                found["looked"] = True

    copies = Copies()
    module, _ = fit(tmp_path, EMAWeightAveraging(decay=0.9), copies, Doubling(), Looks())
    assert found == {"looked": True}
    names = {id(p): name for name, p in module.named_parameters()}
    assert {(names[id(a)], names[id(b)]) for a, b in copies.pairs} == {
        (name, name.replace(f"layers.{a}.", f"layers.{b}."))
        for name in names.values()
        for a, b in ((0, 2), (1, 3))
        if f"layers.{a}." in name
    }


@pytest.mark.parametrize("make", [Doubling, Skipping])
@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_resumed_run_ends_like_the_whole_one(make: type[ActiveBlocks], stop: int, tmp_path: Path) -> None:
    saver = save_every_step(tmp_path / "saved")
    _, whole = fit(tmp_path, make(), saver)
    _, rest = fit(tmp_path, make(), resume=tmp_path / "saved" / f"step={stop}.ckpt", seed=1)
    assert_same(left(whole), left(rest))


def test_blocks_of_one_step_are_those_of_all_its_micro_batches_and_of_nothing_else(tmp_path: Path) -> None:
    depths, recorder = Depths(), Recorder("net.layers")
    saver = save_every_step(tmp_path / "saved")
    also: dict[str, Any] = {
        "accumulate_grad_batches": 2,
        "val_check_interval": 1,
        "enable_checkpointing": True,
        "max_epochs": 2,
    }
    fit(tmp_path, Skipping(), EMAWeightAveraging(decay=0.9), depths, recorder, saver, **also)
    assert depths.seen["start"] == [(3, 4), (3, 4), (3, 4), (3, 4), (4, 4), (4, 4), (3, 4), (3, 4)]
    assert set(depths.seen["end"]) == set(depths.seen["validation"]) == {(4, 4)}
    assert [running for _, running in recorder.depths] == [3, 3, 3, 3, 4, 4, 3, 3]
    for path in (tmp_path / "saved").glob("*.ckpt"):
        build("plain_torch").load_state_dict(torch.load(path, weights_only=True)["state_dict"])  # a plain network's


@pytest.mark.parametrize(("make", "left"), [(Doubling, 2), (Skipping, 4)])
def test_an_exception_leaves_a_model_behind_that_can_be_used(
    make: type[ActiveBlocks], left: int, tmp_path: Path
) -> None:
    class Fails(Callback):
        def on_after_backward(self, *_: Any) -> None:
            raise RuntimeError("out of memory")

    module = build("plain_torch")
    trainer = quiet_trainer(tmp_path, max_steps=4, callbacks=[make(), Fails()])
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.fit(module, loader("plain_torch"))
    assert len(module.net.layers) == left
    assert (type(module.net.layers) is torch.nn.ModuleList) == (left == DEPTH)


def test_kinds_of_step_are_numbers_of_blocks_and_the_plain_one_is_priced(tmp_path: Path) -> None:
    class Two(ActiveBlocks):
        for_one_step = True

        def decide(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.activate(trainer, pl_module, [1, 3])

    technique, meter = Two(), CostMeter(repeats=1)
    module, _ = fit(tmp_path, technique, meter)
    kinds = {(dict(key)["two/blocks"], dict(key)["plain"]) for key in meter.ledger.calibrated}
    assert kinds == {(2, False), (4, True)}
    assert len(module.net.layers) == DEPTH
    plain = CostMeter(repeats=0)
    fit(tmp_path, plain)
    ledger = meter.ledger
    assert {ledger.flops[k] for k in ledger.calibrated if dict(k)["plain"]} <= set(plain.ledger.flops.values())
    assert technique.blocks_of_kind(2) == (1, 3), "the latest that were so many"
    assert list(technique.blocks_of_kind(3)) == [0, 1, 2], "none were: the lowest"


@pytest.mark.parametrize(
    ("strategy", "make", "message"),
    [
        (
            DDPStrategy(static_graph=True),
            Doubling,
            r"Doubling changes the graph; use DDPStrategy\(static_graph=False\)",
        ),
        (DDPStrategy(), Skipping, "Skipping runs other blocks at every step, .*ddp_find_unused_parameters_true'"),
        (DDPStrategy(find_unused_parameters=True), Skipping, None),
        (DDPStrategy(), Doubling, None),
    ],
)
def test_what_ddp_cannot_do_is_refused(
    strategy: DDPStrategy, make: type[ActiveBlocks], message: str | None, tmp_path: Path
) -> None:
    technique, module = make(), build("plain_torch")
    trainer = quiet_trainer(tmp_path, strategy=strategy, callbacks=[technique])
    if message is None:
        technique.setup(trainer, module, "fit")
        return
    with pytest.raises(ValueError, match=message):
        technique.setup(trainer, module, "fit")
    assert len(module.net.layers) == DEPTH, "refused before anything was changed"


def test_a_cut_lets_no_gradient_down_until_it_is_mended() -> None:
    module = build("plain_torch")
    stack = find_blocks(module)
    batch, mend = next(iter(loader("plain_torch"))), stack.cut(2)
    blocks: list[Any] = stack.blocks
    module.per_sample_loss(batch).sum().backward()
    assert [block.inner.weight.grad is None for block in blocks] == [True, True, False, False]
    mend()
    assert "forward" not in vars(stack.blocks[2])
    module.per_sample_loss(batch).sum().backward()
    assert not any(block.inner.weight.grad is None for block in blocks)


def test_depths_are_whole_numbers_of_blocks() -> None:
    assert [count_blocks(depth, 12) for depth in (3, 0.25, 1.0)] == [3, 3, 12]
    with pytest.raises(ValueError, match=r"stages: 0\.3 of 12 blocks is 3\.6, not a whole number; give a fraction"):
        count_blocks(0.3, 12, "stages")
