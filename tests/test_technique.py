import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
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
from lit_scale.technique import Technique, check_techniques
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
    trainer = SimpleNamespace(strategy=strategy, callbacks=[technique])
    message = f"{type(technique).__name__} does not support strategy {kind.__name__}; use strategy='ddp' or one device"
    with pytest.raises(ValueError, match=re.escape(message)):
        technique.setup(trainer, build("plain_torch"), "fit")


@pytest.mark.parametrize("kind", [SingleDeviceStrategy, DDPStrategy])
def test_tested_strategies_pass(kind: type[Strategy]) -> None:
    technique = Shallower()
    trainer = SimpleNamespace(strategy=kind.__new__(kind), callbacks=[technique])
    technique.setup(trainer, build("plain_torch"), "fit")


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
        with pytest.raises(ValueError, match=f"callbacks holds {type(one).__name__} twice"):
            trainer.fit(build("plain_torch"), loader("plain_torch"))


@pytest.mark.parametrize("callbacks", [[Shallower(), Sharer()], [Sharer(), Shallower()], [Shallower(), Shorter()]])
def test_techniques_that_can_share_pass(callbacks: list[Any], tmp_path: Path) -> None:
    quiet_trainer(tmp_path, max_steps=1, callbacks=callbacks).fit(build("plain_torch"), loader("plain_torch"))


def test_evaluation_needs_none_of_these_checks(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, callbacks=[Shallower(), Dropper()])
    trainer.validate(build("plain_torch"), loader("plain_torch"), verbose=False)


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
    trainer = quiet_trainer(checkpoint.parent, callbacks=[Shorter()])
    trainer.validate(build("plain_torch"), loader("plain_torch"), ckpt_path=checkpoint, verbose=False)
    check_techniques(trainer, torch.load(checkpoint, weights_only=True))


def test_a_checkpoint_from_before_a_setting_existed_still_resumes(checkpoint: Path) -> None:
    stored = torch.load(checkpoint, weights_only=True)
    del stored["lit_scale_techniques"]["Shallower"]["rate"]
    torch.save(stored, checkpoint)
    assert resume(checkpoint, Shallower(0.75, ("a",)), Shorter()).global_step == 2
