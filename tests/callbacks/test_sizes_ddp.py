"""Growing sizes in two processes.

A test runs this file as a script; Lightning starts its second process, and both leave what they hold in a folder.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_scale.callbacks import ResolutionGrowing, SequenceLengthWarmup
from lit_scale.guards import StepSeed
from tests.support.data import loader, sized_loader
from tests.support.networks import OPTIMIZERS, build, image_model
from tests.support.training import StepTimer, quiet_trainer, save_every_step

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]

STEPS, STOP = 8, 3
STAGES = [(0.0, 0.5), (0.25, 0.75), (0.625, 1.0)]
HALVES = [(0.0, 0.25), (0.25, 0.5), (0.625, 1.0)]


class Shapes(Callback):
    """Notes the shape of the first tensor of every batch."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, *_: Any) -> None:
        self.shapes.append(tuple(next(iter(batch.values())).shape))


def fit(case: str, folder: Path, ranks: int = 1, resume: Path | None = None) -> dict[str, Any]:
    """Train in one process or two; a run of one takes both ranks' batches."""
    batch, seed = 8 // ranks, 1 if resume else 0
    technique: Any
    if case == "length":
        module: Any = build("torch_encoder", seed=seed, dropout=0.0, optimizer=OPTIMIZERS["SGD"])
        data, technique = loader("torch_encoder", size=64, batch_size=batch), SequenceLengthWarmup(HALVES)
    else:
        module = image_model("by_hand", seed=seed, dropout=0.0, optimizer=OPTIMIZERS["SGD"])
        data, technique = sized_loader(batch), ResolutionGrowing(STAGES, grow_batch=case == "grow")
    shapes = Shapes()
    callbacks: list[Callback] = [StepSeed(), technique, shapes]
    options: dict[str, Any] = {"max_steps": STEPS}
    if case == "time":
        callbacks.insert(0, StepTimer())
        options = {"max_epochs": -1}
    if ranks > 1:
        options |= {"strategy": "ddp", "devices": 2, "enable_checkpointing": True}
        callbacks += [] if resume else [save_every_step(folder / case)]
    trainer = quiet_trainer(folder, callbacks=callbacks, **options)
    trainer.fit(module, data, ckpt_path=resume)
    return {"weights": dict(module.state_dict()), "shapes": shapes.shapes}


def load(folder: Path, name: str) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in (0, 1)]


def test_two_processes_take_the_same_sizes_and_resume(
    run_python: Callable[..., CompletedProcess[str]], tmp_path: Path
) -> None:
    result = run_python(Path(__file__), "grow,length,time", tmp_path, timeout=280)
    assert result.returncode == 0, result.stderr[-3_000:]
    for case in ("grow", "length"):
        reference = fit(case, tmp_path)
        whole, rest = load(tmp_path, case), load(tmp_path, f"{case}-resumed")
        for rank in (0, 1):
            assert [(2 * n, *shape) for n, *shape in whole[rank]["shapes"]] == reference["shapes"]
            assert rest[rank]["shapes"] == whole[rank]["shapes"][STOP:]
            for name, weight in reference["weights"].items():
                assert torch.equal(whole[rank]["weights"][name], whole[0]["weights"][name])
                assert torch.equal(whole[rank]["weights"][name], rest[rank]["weights"][name])
                torch.testing.assert_close(whole[rank]["weights"][name], weight, rtol=0, atol=1e-5)
    one, other = load(tmp_path, "time")
    assert one["shapes"] == other["shapes"]  # by the clock of rank 0
    assert [shape[-1] for shape in one["shapes"]] == [8, 8, 12, 12, 12, 16, 16, 16]


if __name__ == "__main__":
    torch.set_num_threads(1)
    cases, folder = sys.argv[1].split(","), Path(sys.argv[2])
    for case in cases:
        torch.save(found := fit(case, folder, 2), folder / f"{case}-{dist.get_rank()}.pt")
        if case != "time":
            found = fit(case, folder, 2, folder / case / f"step={STOP}.ckpt")
            torch.save(found, folder / f"{case}-resumed-{dist.get_rank()}.pt")
