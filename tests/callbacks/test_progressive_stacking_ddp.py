"""Progressive stacking in two processes.

A test runs this file as a script; Lightning starts its second process, and both leave what they hold in a folder.
"""

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.strategies import DDPStrategy

from lit_scale.callbacks import ProgressiveStacking
from tests.support.data import loader
from tests.support.equality import assert_same
from tests.support.networks import OPTIMIZERS, build, path_of
from tests.support.processes import cases_asked_for, of_ranks, run_phases, run_ranks
from tests.support.training import Recorder, StepTimer, quiet_trainer, run, save_every_step

pytestmark = [pytest.mark.filterwarnings("ignore")]

STEPS = 8
STAGES = [(0.0, 0.25), (0.25, 0.5), (0.625, 1.0)]  # 1, 2 and 4 blocks, from steps 0, 2 and 5
PLAIN, UNUSED = "ddp", "ddp_find_unused_parameters_true"


def train(name: str, folder: Path, phase: str, strategy: str = "", **options: Any) -> dict[str, Any]:
    """Train, in two processes or in one, and return what this rank holds; a run of one takes both ranks' batches."""
    resume, freeze, ema = options.get("resume"), options.pop("freeze", ()), options.pop("ema", False)
    # With Adam, a gradient that is 0 but for rounding, as of the bias of keys, would make two equal runs differ.
    momentum = {"optimizer": "momentum", "lr": 0.05} if name == "bert" else {"optimizer": OPTIMIZERS["SGD"]}
    optimizer: dict[str, Any] = {} if options.pop("adam", False) else momentum
    module = build(name, seed=1 if resume else 0, dropout=options.pop("dropout", 0.0), **optimizer)
    for part in freeze:
        module.get_submodule(part).requires_grad_(False)
    recorder = Recorder(path_of(module))
    stacking = options.pop("kind", ProgressiveStacking)(STAGES, **options.pop("stacking", {}))
    parts: list[Callback] = [stacking, recorder, *([EMAWeightAveraging(decay=0.5)] if ema else [])]
    if strategy:
        options |= {"strategy": strategy, "devices": 2}
        parts += [] if resume else [save_every_step(folder / phase)]
    if options.pop("timed", False):
        parts.insert(0, StepTimer())
    else:
        options |= {"max_steps": STEPS}
    ran = run(module, loader(name, size=40, batch_size=4 if strategy else 8), folder, *parts, **options)
    return {
        "weights": {key: value for key, value in ran.left["weights"].items() if isinstance(value, torch.Tensor)},
        "optimizer": ran.left["optimizers"][0],
        "losses": recorder.losses,
        "depths": recorder.depths,
        "gaps": ran.watch.gaps,
        "frozen": sorted(key for key, p in module.named_parameters() if not p.requires_grad),
    }


def flat(found: dict[str, Any]) -> list[torch.Tensor]:
    states = found["optimizer"]["state"].values()
    return [*found["weights"].values(), *(torch.as_tensor(v) for state in states for v in state.values())]


def check_phases(folder: Path, phases: list[str], reference: dict[str, Any] | None) -> None:
    """Ranks agree after every step; the whole run equals the reference, and each resumed one the whole run."""
    whole = of_ranks(folder, phases[0])
    for rank, found in enumerate(whole):
        assert found["gaps"] == [0.0] * len(found["gaps"])
        assert [depth for _, depth in found["depths"]][-1] == 4
        if reference is not None:
            for one, other in zip(flat(found), flat(reference), strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
        for phase in phases[1:]:
            resumed = of_ranks(folder, phase)[rank]
            assert 0 < len(resumed["losses"]) < len(found["losses"])
            assert found["losses"][-len(resumed["losses"]) :] == resumed["losses"]
            assert_same(flat(found), flat(resumed), phase)
    assert whole[0]["losses"] != whole[1]["losses"]  # each rank has its own samples


@pytest.mark.slow
def test_two_processes_grow_agree_and_resume(tmp_path: Path) -> None:
    run_ranks(__file__, ["fast"], tmp_path)
    check_phases(tmp_path / "fast", ["whole", "from 2"], train("bert", tmp_path, "reference"))


@pytest.mark.slow
def test_dropout_accumulation_and_averages_resume_too(tmp_path: Path) -> None:
    run_ranks(__file__, ["dropout"], tmp_path)
    check_phases(tmp_path / "dropout", ["whole", "from 4", "from 5", "from 6"], None)  # before, at and after a growth


@pytest.mark.slow
def test_unused_parameters_and_frozen_old_blocks(tmp_path: Path) -> None:
    run_ranks(__file__, ["unused"], tmp_path)
    reference = train("timm_vit", tmp_path, "reference", stacking={"freeze_old": True, "rewarmup": 0.2})
    for found in of_ranks(tmp_path / "unused", "whole"):
        assert found["depths"] == reference["depths"]
    check_phases(tmp_path / "unused", ["whole", "from 2", "from 5"], reference)


@pytest.mark.slow
def test_frozen_parameters_a_limit_of_time_and_what_happens_without_a_new_wrapper(tmp_path: Path) -> None:
    run_ranks(__file__, ["frozen", "time", "control"], tmp_path)

    parts = ["net.stem", "net.layers.0.norm", "net.layers.3.inner"]
    reference = train("plain_torch", tmp_path, "reference", freeze=parts)
    check_phases(tmp_path / "frozen", ["whole", "from 3"], reference)
    for found in of_ranks(tmp_path / "frozen", "whole"):
        assert found["frozen"] == sorted(f"{part}.{kind}" for part in parts for kind in ("weight", "bias"))

    for found in of_ranks(tmp_path / "time", "whole"):
        assert found["gaps"] == [0.0] * STEPS
        assert [depth for _, depth in found["depths"]] == [1, 1, 2, 2, 2, 4, 4, 4]  # by the clock of rank 0

    for found in of_ranks(tmp_path / "control", "whole"):
        assert found["gaps"][:2] == [0.0, 0.0]
        assert min(found["gaps"][2:]) > 0.0  # the ranks drift apart, and nothing says so


@pytest.mark.parametrize(
    ("strategy", "options", "message"),
    [
        (DDPStrategy(static_graph=True), {}, r"use DDPStrategy\(static_graph=False\)"),
        (DDPStrategy(), {"freeze_old": True}, "freeze_old=True needs strategy='ddp_find_unused_parameters_true'"),
    ],
)
def test_what_ddp_cannot_do_is_refused_at_setup(
    strategy: DDPStrategy, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    stacking = ProgressiveStacking(STAGES, **options)
    trainer = quiet_trainer(tmp_path, strategy=strategy, callbacks=[stacking])
    with pytest.raises(ValueError, match=message):
        stacking.setup(trainer, build("plain_torch"), "fit")


# ---- what the two processes run


class WithoutWrapping(ProgressiveStacking):
    """Freezes what waits and lets go of it, and leaves DDP's wrapper as it was."""

    def _share_gradients(self, trainer: Trainer, pl_module: LightningModule) -> None:
        first = not self._paused
        self._resume_parameters()
        for index, block in enumerate(self.stack.blocks):
            if index not in self.stack.active:
                self._paused += list(block.parameters())
        for parameter in self._paused:
            parameter.requires_grad_(False)
        if first:
            strategy: Any = trainer.strategy
            strategy.model = strategy.model.module
            strategy.configure_ddp()


CASES: dict[str, dict[str, Any]] = {
    "fast": {"name": "bert", "strategy": PLAIN, "stops": (2,)},
    "dropout": {
        "name": "bert",
        "strategy": PLAIN,
        "stops": (4, 5, 6),
        "dropout": 0.1,
        "adam": True,
        "accumulate_grad_batches": 2,
        "gradient_clip_val": 0.05,
        "ema": True,
        "stacking": {"growth": "interleave"},
    },
    "unused": {
        "name": "timm_vit",
        "strategy": UNUSED,
        "stops": (2, 5),
        "stacking": {"freeze_old": True, "rewarmup": 0.2},
    },
    "frozen": {
        "name": "plain_torch",
        "strategy": PLAIN,
        "stops": (3,),
        "freeze": ["net.stem", "net.layers.0.norm", "net.layers.3.inner"],
    },
    "time": {"name": "plain_torch", "strategy": PLAIN, "timed": True, "max_epochs": -1},
    "control": {"name": "plain_torch", "strategy": PLAIN, "kind": WithoutWrapping},
}


def fit_case(case: str, folder: Path, phase: str, resume: Path | None) -> dict[str, Any]:
    options = copy.deepcopy(CASES[case])
    options.pop("stops", None)
    return train(folder=folder, phase=phase, resume=resume, **options)


if __name__ == "__main__":
    names, root = cases_asked_for()
    for name in names:
        run_phases(name, root, CASES[name].get("stops", ()), functools.partial(fit_case, name))
