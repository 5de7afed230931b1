"""Dynamic sparsity in two processes.

A test runs this file as a script; Lightning starts its second process, and both leave what they hold in a folder.
"""

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_scale.callbacks import DynamicSparsity, ProgressiveStacking
from lit_scale.guards import StepSeed
from tests.support.data import loader
from tests.support.networks import build
from tests.support.training import quiet_trainer, save_every_step

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]

STEPS = 8
UNITS: dict[str, Any] = {"density": 0.5, "every": 2}
WEIGHTS: dict[str, Any] = {"density": 0.3, "every": 2, "granularity": "weight"}


class Agreement(Callback):
    """Compares all parameters between the ranks after every step, and notes the masks."""

    def __init__(self, sparsity: DynamicSparsity) -> None:
        self.sparsity = sparsity
        self.gaps: list[float] = []
        self.masks: list[torch.Tensor] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == self.step:
            return  # gradients are being accumulated
        self.step = trainer.global_step
        for part in self.sparsity._parts:
            for parameter, mask in part.masks():
                assert not parameter[~mask.expand_as(parameter)].any()
        own = torch.cat([p.detach().flatten() for p in pl_module.parameters()])
        both = [torch.empty_like(own) for _ in range(trainer.world_size)]
        dist.all_gather(both, own)
        self.gaps.append((both[0] - both[1]).abs().max().item())
        self.masks.append(torch.cat([part.active for part in self.sparsity._parts]))


def fit(folder: Path, phase: str, sparsity: dict[str, Any], **options: Any) -> dict[str, Any]:
    """Train in two processes, and return what this rank holds."""
    resume, kind = options.pop("resume", None), options.pop("kind", DynamicSparsity)
    stacking = options.pop("stacking", False)
    module = build("bert", seed=1 if resume else 0)
    callback = kind(**sparsity)
    agreement = Agreement(callback)
    callbacks: list[Callback] = [StepSeed(), callback, *[ProgressiveStacking([(0.0, 0.5), (0.5, 1.0)])] * stacking]
    callbacks += [agreement, *[save_every_step(folder / phase)] * (resume is None)]
    options |= {"strategy": "ddp", "devices": 2, "enable_checkpointing": resume is None}
    trainer = quiet_trainer(folder, max_steps=STEPS, callbacks=callbacks, **options)
    trainer.fit(module, loader("bert", size=40), ckpt_path=resume)
    weights = {key: value for key, value in module.state_dict().items() if isinstance(value, torch.Tensor)}
    return {"weights": weights, "gaps": agreement.gaps, "masks": agreement.masks}


@pytest.mark.parametrize("cases", [["units", "weights"], ["accumulated", "stacked"]], ids=" and ".join)
def test_two_processes_have_the_same_masks_and_resume_exactly(
    cases: list[str], run_python: Callable[..., CompletedProcess[str]], tmp_path: Path
) -> None:
    result = run_python(Path(__file__), ",".join(cases), tmp_path, timeout=280)
    assert result.returncode == 0, result.stderr[-3_000:]
    for case in cases:
        phases = ["whole", *(f"from {stop}" for stop in CASES[case]["stops"])]
        found = {
            phase: [torch.load(tmp_path / case / f"{phase}-{rank}.pt", weights_only=True) for rank in (0, 1)]
            for phase in phases
        }
        for phase, (one, other) in found.items():
            assert one["gaps"] == [0.0] * len(one["gaps"]) != []
            assert all(map(torch.equal, one["masks"], other["masks"])), phase
        whole = found["whole"][0]
        assert len({tuple(masks.tolist()) for masks in whole["masks"]}) >= 3  # they moved
        for phase in phases[1:]:
            resumed = found[phase][0]
            assert all(torch.equal(value, resumed["weights"][key]) for key, value in whole["weights"].items()), phase
            assert all(map(torch.equal, whole["masks"][-len(resumed["masks"]) :], resumed["masks"]))


def test_with_a_choice_of_its_own_each_rank_drifts_away(
    run_python: Callable[..., CompletedProcess[str]], tmp_path: Path
) -> None:
    result = run_python(Path(__file__), "control", tmp_path, timeout=280)
    assert result.returncode == 0, result.stderr[-3_000:]
    one, other = (torch.load(tmp_path / "control" / f"whole-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert not torch.equal(one["masks"][-1], other["masks"][-1])
    assert one["gaps"][-1] > 0  # and nothing says so


# ---- what the two processes run


class OnItsOwn(DynamicSparsity):
    """Each rank draws its own masks."""

    def _generator(self, *args: Any) -> torch.Generator:
        self.seed = dist.get_rank()
        return super()._generator(*args)


CASES: dict[str, dict[str, Any]] = {
    "units": {"sparsity": UNITS, "stops": (2, 3)},
    "weights": {"sparsity": WEIGHTS, "stops": (3,)},
    "accumulated": {"sparsity": UNITS, "stops": (4,), "accumulate_grad_batches": 2},
    "stacked": {"sparsity": WEIGHTS, "stops": (3, 5), "stacking": True},
    "control": {"sparsity": UNITS, "kind": OnItsOwn, "stops": ()},
}


def main(case: str, folder: Path) -> None:
    torch.set_num_threads(1)
    folder.mkdir(exist_ok=True)
    options = dict(CASES[case])
    for stop in (None, *options.pop("stops")):
        phase = "whole" if stop is None else f"from {stop}"
        resume = None if stop is None else folder / "whole" / f"step={stop}.ckpt"
        found = fit(folder, phase, resume=resume, **copy.deepcopy(options))
        torch.save(found, folder / f"{phase}-{dist.get_rank()}.pt")


if __name__ == "__main__":
    for one in sys.argv[1].split(","):
        main(one, Path(sys.argv[2], one))
