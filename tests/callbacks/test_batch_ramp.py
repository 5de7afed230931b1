"""Ramps against accumulation by hand, against the uninterrupted run, and what they refuse."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from lit_scale.callbacks import BatchRamp, EightBitOptimizer, LargeBatch, SequenceLengthWarmup
from lit_scale.cost import CostMeter
from lit_scale.guards import SafeCheckpointIO, StepSeed
from lit_scale.technique import Technique
from tests.support.cases import CASES
from tests.support.data import loader
from tests.support.equality import assert_same
from tests.support.networks import build
from tests.support.training import StepTimer, fit, left, quiet_trainer, save_every_step

pytestmark = [pytest.mark.filterwarnings("ignore")]

STAGES = [(0.0, 4), (0.25, 8), (0.5, 16)]  # of batches of 4: 1, 2 and 4 micro-batches


class Steps(Callback):
    """Micro-batches that each optimizer step took."""

    def __init__(self) -> None:
        self.taken: list[int] = []
        self._batches = 0

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self._batches += 1
        if not trainer.fit_loop._should_accumulate():
            self.taken.append(self._batches)
            self._batches = 0


def ramped(
    root: Path,
    ramp: BatchRamp,
    *also: Callback,
    name: str = "bert",
    resume: Path | None = None,
    size: int = 32,
    momentum: bool = False,
    **options: Any,
) -> tuple[Any, Trainer, list[int]]:
    """The module, its Trainer, and the micro-batches that each step took."""
    module, steps = build(name, seed=1 if resume else 0), Steps()
    if momentum:
        module.optimizer = lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)
    parts, plugins = [*also, ramp, steps], [SafeCheckpointIO()]
    trainer = fit(module, loader(name, size=size), root, *parts, resume=resume, plugins=plugins, **options)
    return module, trainer, steps.taken


@pytest.mark.parametrize(
    ("limits", "windows", "taken"),
    [
        ({"max_steps": 8}, [(0, 1), (2, 2), (5, 4)], [1, 1, 2, 2, 2, 4, 4, 4]),  # due at 4 after 6 batches, begun at 8
        ({"max_epochs": 2}, [(0, 1), (4, 2), (6, 4)], [1, 1, 1, 1, 2, 2, 4, 4]),  # a quarter and a half of 16 batches
        ({"max_epochs": 1, "size": 64}, [(0, 1), (4, 2), (6, 4)], [1, 1, 1, 1, 2, 2, 4, 4]),
        ({"max_epochs": 2, "max_steps": 4}, [(0, 1), (2, 2), (3, 4)], [1, 1, 2, 4]),
    ],
    ids=str,
)
def test_stages_begin_at_their_share_of_steps_or_of_data(
    limits: dict[str, Any], windows: list[tuple[int, int]], taken: list[int], tmp_path: Path
) -> None:
    ramp = BatchRamp(STAGES)
    _, trainer, found = ramped(tmp_path, ramp, **limits)
    assert ramp.windows == windows
    assert found == taken
    assert trainer.accumulate_grad_batches == 1  # a plain Trainer again


@pytest.mark.parametrize("scaling", ["none", "sqrt", "linear"])
def test_a_ramp_is_accumulation_by_hand(scaling: Any, tmp_path: Path) -> None:
    module, _, taken = ramped(
        tmp_path, BatchRamp(STAGES, scaling=scaling), name="plain_torch", momentum=True, max_steps=8
    )
    expected = build("plain_torch")
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)
    batches = loader("plain_torch")
    source = iter([batch for _ in range(3) for batch in batches])
    seed = StepSeed()
    count = 0
    for size in taken:
        optimizer.zero_grad()
        for _ in range(size):
            count += 1
            trainer: Any = SimpleNamespace(global_rank=0, strategy=SimpleNamespace(root_device=torch.device("cpu")))
            seed._set(trainer, str(count - 1))
            (expected.per_sample_loss(next(source)).mean() / size).backward()
        (group,) = optimizer.param_groups
        rate, factor = group["lr"], {"none": 1.0, "sqrt": (size / 4) ** 0.5, "linear": size / 4}[scaling]
        group["lr"] = rate * factor
        optimizer.step()
        group["lr"] = rate
        schedule.step()
    for one, other in zip(module.parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("options", [{"max_steps": 8}, {"max_epochs": 2}, {"max_epochs": -1, "timed": True}], ids=str)
def test_a_resumed_run_is_the_uninterrupted_one_from_any_step(options: dict[str, Any], tmp_path: Path) -> None:
    options = dict(options)
    clock = [StepTimer()] if options.pop("timed", False) else []

    def run(*also: Callback, resume: Path | None = None) -> tuple[Any, list[int]]:
        ramp = BatchRamp(STAGES, scaling="sqrt")
        _, trainer, taken = ramped(tmp_path, ramp, *clock, *also, resume=resume, **options)
        return left(trainer), taken

    whole, taken = run(save_every_step(tmp_path / "saved"))
    assert set(taken) == {1, 2, 4}
    for stop in range(1, 8):
        rest, again = run(resume=tmp_path / "saved" / f"step={stop}.ckpt")
        assert again == taken[stop:]
        assert_same(whole, rest, f"resumed at step {stop}")


@pytest.mark.parametrize(
    ("name", "others"),
    [("hf_gpt2", [SequenceLengthWarmup]), ("bert", [EightBitOptimizer]), ("bert", [LargeBatch, EightBitOptimizer])],
    ids=["lengths", "8 bits", "large batches and 8 bits"],
)
def test_it_goes_along_with_others_that_change_what_a_step_is(
    name: str, others: list[type[Technique]], tmp_path: Path
) -> None:
    """They see the progress of a run whose steps change, and the ramp that of a run whose batch is multiplied."""

    def run(*also: Callback, resume: Path | None = None) -> Any:
        module = build(name, seed=1 if resume else 0, width=64)
        ramp = BatchRamp([(0.0, 4), (0.3, 8)])
        techniques = [CASES[other.__name__].make() for other in others]
        trainer = fit(module, loader(name), tmp_path, *techniques, ramp, *also, resume=resume, max_epochs=2)
        assert ramp.windows == [(0, 1), (6, 2)]  # due after 4.8 of 16 batches, begun where two of them make a step
        assert trainer.global_step == 11
        assert trainer.accumulate_grad_batches == 1
        return left(trainer)

    whole = run(save_every_step(tmp_path / "saved"))
    for stop in (3, 6, 8):
        assert_same(whole, run(resume=tmp_path / "saved" / f"step={stop}.ckpt"), f"resumed at step {stop}")


def test_fractions_are_of_the_trainers_own_batch_and_the_clock_tells_the_stages(tmp_path: Path) -> None:
    ramp, meter = BatchRamp([(0.0, 0.25), (0.5, 1.0)]), CostMeter(repeats=1)
    options: dict[str, Any] = {"max_epochs": 2, "accumulate_grad_batches": 4}
    trainer = fit(build("bert"), loader("bert"), tmp_path, ramp, meter, **options)
    record = meter.record(trainer, trainer.lightning_module)
    assert [(stage["batch_ramp/micro_batches"], stage["plain"], stage["samples"]) for stage in record["stages"]] == [
        (1, False, 32),
        (4, True, 32),
    ]
    assert record["steps"] == 8 + 2
    assert trainer.accumulate_grad_batches == 4


@pytest.mark.parametrize(
    ("stages", "options", "message"),
    [
        (
            [(0.0, 4), (0.5, 10)],
            {},
            "batch=10 is no multiple of the 4 samples that all ranks take at once; use 8 or 12",
        ),
        (
            [(0.0, 8), (0.5, 12)],
            {},
            r"batch of 3 micro-batches is not a multiple of the one before it, 2; ramp to 4, 6",
        ),
        ([(0.0, 8), (0.5, 4)], {}, "batch of 1 micro-batches is not a multiple"),
        (
            [(0.0, 0.3), (0.5, 1.0)],
            {"accumulate_grad_batches": 4},
            "0.3 of accumulate_grad_batches=4 is 1.2 micro-batch",
        ),
        (
            [(0.0, 4), (0.5, 12)],
            {},
            r"8 batches ends inside an optimizer step of 3; pass Trainer\(limit_train_batches=6",
        ),
        ([(0.0, 4), (0.5, 64)], {}, "step takes 16 batches, but an epoch has only 8"),
    ],
)
def test_a_ramp_that_does_not_divide_is_refused_at_the_start(
    stages: Any, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    trainer = quiet_trainer(tmp_path, max_epochs=2, callbacks=[BatchRamp(stages)], **options)
    with pytest.raises(ValueError, match=message):
        trainer.fit(build("plain_torch"), loader("plain_torch"))
    assert trainer.global_step == 0


def test_what_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="scaling='cubic': choose 'linear', 'sqrt', 'none'"):
        BatchRamp(scaling="cubic")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="starts must ascend from 0.0"):
        BatchRamp([(0.1, 4)])
    endless = quiet_trainer(tmp_path, max_epochs=-1, callbacks=[BatchRamp(STAGES)])
    with pytest.raises(ValueError, match="a run whose length is unknown; pass max_steps or max_time"):
        endless.fit(build("plain_torch"), loader("plain_torch"))
    both = [GradientAccumulationScheduler({0: 1}), BatchRamp(STAGES)]
    with pytest.raises(ValueError, match="GradientAccumulationScheduler both set the accumulation"):
        quiet_trainer(tmp_path, max_steps=2, callbacks=both).fit(build("plain_torch"), loader("plain_torch"))
    saver = save_every_step(tmp_path / "saved")
    ramped(tmp_path, BatchRamp(STAGES), saver, max_steps=8)
    with pytest.raises(ValueError, match="resume with the same max_steps, max_epochs and data"):
        ramped(tmp_path, BatchRamp(STAGES), max_steps=20, resume=tmp_path / "saved" / "step=4.ckpt")
