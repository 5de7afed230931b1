import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
    XLAStrategy,
)
from lightning.pytorch.strategies.single_xla import SingleDeviceXLAStrategy

from lit_scale.callbacks import EightBitOptimizer, LargeBatch, ProgressiveStacking
from lit_scale.technique import Technique, check_techniques, techniques
from lit_scale.trainers import callbacks_of
from tests.support.data import loader
from tests.support.networks import build
from tests.support.training import quiet_trainer, save_every_step

pytestmark = [pytest.mark.filterwarnings("ignore")]


# ---- checks at the start


class Shallower(Technique):
    factor = "blocks"

    def __init__(self, rate: float = 0.5, names: tuple[str, ...] = ()) -> None:
        self.rate, self.names = rate, names

    def settings(self) -> dict[str, Any]:
        return {"rate": self.rate, "names": list(self.names)}


class Dropper(Technique):
    factor = "blocks"


class Sharer(Technique):
    factor = "blocks"
    shares_with = frozenset({"Shallower"})


class Shorter(Technique):
    factor = "tokens"


class Manual(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, *_: Any) -> None:
        raise AssertionError("a batch was trained")

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize(
    "kind",
    [FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy, XLAStrategy, SingleDeviceXLAStrategy],
    ids=lambda kind: kind.__name__,
)
@pytest.mark.parametrize("technique", [Shallower(), ProgressiveStacking()], ids=lambda t: type(t).__name__)
def test_untested_strategies_are_refused_by_name(technique: Technique, kind: type[Strategy]) -> None:
    strategy = kind.__new__(kind)  # some cannot be made without their hardware or package
    trainer: Any = SimpleNamespace(strategy=strategy, callbacks=[technique])
    message = f"{type(technique).__name__} does not support strategy {kind.__name__}; use strategy='ddp' or one device"
    with pytest.raises(ValueError, match=re.escape(message)):
        technique.setup(trainer, build("plain_torch"), "fit")


@pytest.mark.parametrize("kind", [SingleDeviceStrategy, DDPStrategy])
def test_tested_strategies_pass(kind: type[Strategy]) -> None:
    technique = Shallower()
    trainer: Any = SimpleNamespace(strategy=kind.__new__(kind), callbacks=[technique])
    technique._decided_at = 5
    technique.setup(trainer, build("plain_torch"), "fit")
    assert technique._decided_at == -1, "setup went through to its end"


def test_manual_optimization_is_refused(tmp_path: Path) -> None:
    for technique in (Shallower(), ProgressiveStacking()):
        trainer = quiet_trainer(tmp_path, max_steps=2, callbacks=[technique])
        message = f"{type(technique).__name__} needs automatic optimization, but Manual turned it off"
        with pytest.raises(ValueError, match=message):
            trainer.fit(Manual(), loader("plain_torch"))


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        ([Shallower(), Dropper()], "Shallower and Dropper both change the blocks of a step; use one of them"),
        ([ProgressiveStacking(), Dropper()], "ProgressiveStacking and Dropper both change the blocks"),
        ([Dropper(), ProgressiveStacking()], "both change the blocks of a step"),
    ],
)
def test_two_techniques_on_one_factor_are_refused(callbacks: list[Any], message: str, tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, max_steps=2, callbacks=callbacks)
    with pytest.raises(ValueError, match=message):
        trainer.fit(build("plain_torch"), loader("plain_torch"))


def test_a_technique_given_twice_is_refused(tmp_path: Path) -> None:
    for one, other in ((Shallower(), Shallower()), (ProgressiveStacking(), ProgressiveStacking())):
        trainer = quiet_trainer(tmp_path, max_steps=1, callbacks=[one, other])
        message = f"callbacks holds {type(one).__name__} twice; keep one, with the settings of the whole run"
        with pytest.raises(ValueError, match=message):
            trainer.fit(build("plain_torch"), loader("plain_torch"))


@pytest.mark.parametrize("callbacks", [[Shallower(), Sharer()], [Sharer(), Shallower()], [Shallower(), Shorter()]])
def test_techniques_that_can_share_pass(callbacks: list[Any], tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, max_steps=1, callbacks=callbacks)
    trainer.fit(build("plain_torch"), loader("plain_torch"))
    assert trainer.global_step == 1
    assert {type(technique) for technique in techniques(trainer)} == {type(callback) for callback in callbacks}


def test_evaluation_needs_none_of_these_checks(tmp_path: Path) -> None:
    trainer, module = quiet_trainer(tmp_path, callbacks=[Shallower(), Dropper()]), build("plain_torch")
    found = trainer.validate(module, loader("plain_torch"), verbose=False)
    alone = quiet_trainer(tmp_path).validate(module, loader("plain_torch"), verbose=False)
    assert found == alone
    assert found[0]["val/loss"] > 0.0
    with pytest.raises(ValueError, match="both change the blocks"):  # the same callbacks, in training
        trainer.fit(module, loader("plain_torch"))


# ---- the mark in the checkpoint


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    callbacks: list[Any] = [Shallower(rate=0.25, names=("a",)), Shorter(), save_every_step(tmp_path)]
    trainer = quiet_trainer(tmp_path, max_steps=2, callbacks=callbacks, enable_checkpointing=True)
    trainer.fit(build("plain_torch"), loader("plain_torch"))
    return tmp_path / "step=1.ckpt"


def resume(checkpoint: Path, *callbacks: Callback) -> Trainer:
    trainer = quiet_trainer(checkpoint.parent, max_steps=2, callbacks=list(callbacks))
    trainer.fit(build("plain_torch"), loader("plain_torch"), ckpt_path=checkpoint)
    return trainer


def test_a_checkpoint_names_its_techniques_and_their_settings(checkpoint: Path) -> None:
    mark = torch.load(checkpoint, weights_only=True)["lit_scale_techniques"]
    assert mark == {"Shallower": {"rate": 0.25, "names": ["a"]}, "Shorter": {}}
    assert resume(checkpoint, Shallower(0.25, ("a",)), Shorter()).global_step == 2


def test_a_setting_must_not_change(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=r"Shallower\(rate=0.5\) differs from the checkpoint's rate=0.25; resume with"):
        resume(checkpoint, Shallower(0.5, ("a",)), Shorter())


def test_another_technique_notices_one_that_is_missing(checkpoint: Path) -> None:
    message = re.escape(
        "trained with Shallower, which is missing from this Trainer; add it: callbacks=[Shallower(rate=0.25, "
    )
    with pytest.raises(ValueError, match=message):
        resume(checkpoint, Shorter())


@pytest.mark.parametrize("technique", [ProgressiveStacking([(0.0, 1), (0.5, 2)]), EightBitOptimizer(), LargeBatch(2)])
def test_what_has_to_be_there_from_the_first_step_cannot_join_later(technique: Technique, checkpoint: Path) -> None:
    name = type(technique).__name__
    with pytest.raises(
        ValueError, match=f"was trained without {name}, which has to be there from the first step; leave"
    ):
        resume(checkpoint, Shorter(), technique)


def test_only_training_minds(checkpoint: Path) -> None:
    trainer, module = quiet_trainer(checkpoint.parent, callbacks=[Shorter()]), build("plain_torch", seed=1)
    trainer.validate(module, loader("plain_torch"), ckpt_path=checkpoint, verbose=False)
    stored = torch.load(checkpoint, weights_only=True)
    assert all(torch.equal(value, stored["state_dict"][name]) for name, value in module.state_dict().items())
    check_techniques(trainer, stored)
    with pytest.raises(ValueError, match="trained with Shallower, which is missing"):  # the same callbacks, in training
        trainer.fit(module, loader("plain_torch"), ckpt_path=checkpoint)


def test_a_checkpoint_from_before_a_setting_existed_still_resumes(checkpoint: Path) -> None:
    stored = torch.load(checkpoint, weights_only=True)
    del stored["lit_scale_techniques"]["Shallower"]["rate"]
    torch.save(stored, checkpoint)
    assert resume(checkpoint, Shallower(0.75, ("a",)), Shorter()).global_step == 2


# ---- one decision per optimizer step, logs, and the way back


class Decider(Technique):
    """Notes when it decides, and changes something that has to be changed back."""

    factor = "samples"

    def __init__(self) -> None:
        self.decided: list[tuple[int, int]] = []  # optimizer step, batches that the run had begun
        self.asked: list[int] = []  # steps at which logs were asked for
        self.calls: list[str] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.undo_later(lambda: self.calls.append("first"), lambda: self.calls.append("second"))
        self.undo_later(lambda: self.calls.append("third"))

    def decide(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.decided.append((trainer.global_step, trainer.fit_loop.total_batch_idx + 1))

    def logged(self, trainer: Trainer) -> dict[str, float]:
        self.asked.append(trainer.global_step)
        return {"step": float(trainer.global_step), "half": 0.5}


class Written(DummyLogger):
    """Keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))


def fit(root: Path, *callbacks: Callback, resume: Path | None = None, **options: Any) -> Trainer:
    trainer = quiet_trainer(root, callbacks=list(callbacks), **options)
    trainer.fit(build("plain_torch"), loader("plain_torch", size=20), ckpt_path=resume)  # five batches an epoch
    return trainer


def test_it_decides_once_per_optimizer_step_and_never_inside_a_window(tmp_path: Path) -> None:
    """The end of an epoch cuts a window short, and the next epoch begins with another."""
    technique = Decider()
    fit(tmp_path, technique, accumulate_grad_batches=3, max_epochs=3)
    windows = [(0, 1), (1, 4), (2, 6), (3, 9), (4, 11), (5, 14)]  # of 3, 2, 3, 2, 3 and 2 batches
    assert technique.decided == windows


def test_a_resumed_run_decides_before_its_first_batch_and_then_as_the_whole_one(tmp_path: Path) -> None:
    run: dict[str, Any] = {"accumulate_grad_batches": 3, "max_epochs": 3, "enable_checkpointing": True}
    whole = Decider()
    fit(tmp_path, whole, save_every_step(tmp_path / "saved"), **run)
    for stop in (1, 2, 3):  # inside the first epoch, at its end, inside the second
        rest = Decider()
        fit(tmp_path, rest, resume=tmp_path / "saved" / f"step={stop}.ckpt", **run)
        assert rest.decided == whole.decided[stop:]


def test_a_second_fit_decides_anew(tmp_path: Path) -> None:
    technique = Decider()
    for _ in range(2):
        fit(tmp_path, technique, max_steps=1)
    assert technique.decided == [(0, 1), (0, 1)]


@pytest.mark.parametrize(("every", "steps"), [(1, [0, 1, 2, 3, 4, 5]), (2, [1, 3, 5]), (4, [3]), (0, [])])
def test_it_logs_at_steps_that_are_written_and_only_there(every: int, steps: list[int], tmp_path: Path) -> None:
    technique, logger = Decider(), Written()
    fit(tmp_path, technique, max_steps=6, accumulate_grad_batches=2, log_every_n_steps=every, logger=logger)
    assert sorted(set(technique.asked)) == steps
    rows = [row for _, row in logger.rows if "decider/step" in row]
    assert [(row["decider/step"], row["decider/half"]) for row in rows] == [(float(step), 0.5) for step in steps]


def test_one_without_entries_logs_nothing(tmp_path: Path) -> None:
    class Silent(Technique):
        factor = "samples"

    logger = Written()
    fit(tmp_path, Silent(), max_steps=2, log_every_n_steps=1, logger=logger)
    assert logger.rows
    assert not [name for _, row in logger.rows for name in row if "silent" in name]


@pytest.mark.parametrize("fails", [True, False], ids=["exception", "teardown"])
def test_what_was_changed_is_changed_back_latest_first_and_once(fails: bool, tmp_path: Path) -> None:
    technique = Decider()

    class Fails(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            assert not technique.calls
            if fails:
                raise RuntimeError("out of memory")

        def on_train_end(self, *_: Any) -> None:
            assert not technique.calls, "the clock still replays steps"

    if fails:
        with pytest.raises(RuntimeError, match="out of memory"):
            fit(tmp_path, technique, Fails(), max_steps=1)
    else:
        fit(tmp_path, technique, Fails(), max_steps=1)
    assert technique.calls == ["third", "second", "first"]
    technique.undo()
    assert len(technique.calls) == 3


def test_the_callbacks_of_a_trainer_are_found_by_their_class(tmp_path: Path) -> None:
    one, other, timer = Shallower(), Decider(), Timer(duration={"hours": 1})
    trainer = quiet_trainer(tmp_path, callbacks=[one, timer, other])
    assert techniques(trainer) == [one, other]
    assert callbacks_of(trainer, Timer) == [timer]
    assert callbacks_of(trainer, Dropper) == []
    assert callbacks_of(trainer, Callback)[:3] == [one, timer, other]
