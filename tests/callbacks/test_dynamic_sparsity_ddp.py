"""Dynamic sparsity in two processes.

A test runs this file as a script; Lightning starts its second process, and both leave what they hold in a folder.
"""

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_scale.callbacks import DynamicSparsity, ProgressiveStacking
from tests.support.data import loader
from tests.support.equality import assert_same
from tests.support.networks import build
from tests.support.processes import cases_asked_for, of_ranks, run_phases, run_ranks
from tests.support.training import run, save_every_step

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]

STEPS = 8
UNITS: dict[str, Any] = {"density": 0.5, "every": 2}
WEIGHTS: dict[str, Any] = {"density": 0.3, "every": 2, "granularity": "weight"}


class Masks(Callback):
    """Notes the masks after every step, and checks that what they leave out is 0."""

    def __init__(self, sparsity: DynamicSparsity) -> None:
        self.sparsity = sparsity
        self.masks: list[torch.Tensor] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == self.step:
            return  # gradients are being accumulated
        self.step = trainer.global_step
        for part in self.sparsity.parts:
            for parameter, mask in part.masks():
                assert not parameter[~mask.expand_as(parameter)].any()
        self.masks.append(torch.cat([part.active for part in self.sparsity.parts]))


def train(case: str, folder: Path, phase: str, resume: Path | None) -> dict[str, Any]:
    """Train in two processes, and return what this rank holds."""
    options = copy.deepcopy(CASES[case]) | {"strategy": "ddp", "devices": 2, "max_steps": STEPS, "resume": resume}
    sparsity = options.pop("kind", DynamicSparsity)(**options.pop("sparsity"))
    masks, parts = Masks(sparsity), [sparsity]
    if options.pop("stacking", False):
        parts.append(ProgressiveStacking([(0.0, 0.5), (0.5, 1.0)]))
    parts += [masks, *([] if resume else [save_every_step(folder / phase)])]
    options.pop("stops")
    ran = run(build("bert", seed=1 if resume else 0), loader("bert", size=40), folder, *parts, **options)
    return {"weights": ran.left["weights"], "gaps": ran.watch.gaps, "masks": masks.masks}


@pytest.mark.parametrize("cases", [["units", "weights"], ["accumulated", "stacked"]], ids=" and ".join)
def test_two_processes_have_the_same_masks_and_resume_exactly(cases: list[str], tmp_path: Path) -> None:
    run_ranks(__file__, cases, tmp_path)
    for case in cases:
        phases = ["whole", *(f"from {stop}" for stop in CASES[case]["stops"])]
        found = {phase: of_ranks(tmp_path / case, phase) for phase in phases}
        for phase, (one, other) in found.items():
            assert one["gaps"] == [0.0] * len(one["gaps"]) != []
            assert_same(one["masks"], other["masks"], phase)
        whole = found["whole"][0]
        assert len({tuple(masks.tolist()) for masks in whole["masks"]}) >= 3  # they moved
        for phase in phases[1:]:
            resumed = found[phase][0]
            assert_same(whole["weights"], resumed["weights"], phase)
            assert_same(whole["masks"][-len(resumed["masks"]) :], resumed["masks"], phase)


def test_with_a_choice_of_its_own_each_rank_drifts_away(tmp_path: Path) -> None:
    run_ranks(__file__, ["control"], tmp_path)
    one, other = of_ranks(tmp_path / "control")
    assert not torch.equal(one["masks"][-1], other["masks"][-1])
    assert one["gaps"][-1] > 0  # and nothing says so


# ---- what the two processes run


class OnItsOwn(DynamicSparsity):
    """Each rank draws its own masks."""

    def generator(self, *args: Any) -> torch.Generator:
        self.seed = dist.get_rank()
        return super().generator(*args)


CASES: dict[str, dict[str, Any]] = {
    "units": {"sparsity": UNITS, "stops": (2, 3)},
    "weights": {"sparsity": WEIGHTS, "stops": (3,)},
    "accumulated": {"sparsity": UNITS, "stops": (4,), "accumulate_grad_batches": 2},
    "stacked": {"sparsity": WEIGHTS, "stops": (3, 5), "stacking": True},
    "control": {"sparsity": UNITS, "kind": OnItsOwn, "stops": ()},
}


if __name__ == "__main__":
    names, root = cases_asked_for()
    for name in names:
        run_phases(name, root, CASES[name]["stops"], functools.partial(train, name))
