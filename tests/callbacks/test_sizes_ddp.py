"""Growing sizes in two processes.

A test runs this file as a script; Lightning starts its second process, and both leave what they hold in a folder.
"""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from lit_scale.callbacks import ResolutionGrowing, SequenceLengthWarmup
from tests.support.data import loader, sized_loader
from tests.support.equality import assert_same
from tests.support.networks import OPTIMIZERS, build, image_model
from tests.support.processes import cases_asked_for, of_ranks, run_phases, run_ranks
from tests.support.training import StepTimer, run, save_every_step

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]

STEPS, STOP = 8, 3
STAGES = [(0.0, 0.5), (0.25, 0.75), (0.625, 1.0)]
HALVES = [(0.0, 0.25), (0.25, 0.5), (0.625, 1.0)]


def train(case: str, folder: Path, phase: str = "", resume: Path | None = None, ranks: int = 1) -> dict[str, Any]:
    """Train in one process or two; a run of one takes both ranks' batches."""
    batch, seed = 8 // ranks, 1 if resume else 0
    technique: Any
    if case == "length":
        module: Any = build("torch_encoder", seed=seed, dropout=0.0, optimizer=OPTIMIZERS["SGD"])
        data, technique = loader("torch_encoder", size=64, batch_size=batch), SequenceLengthWarmup(HALVES)
    else:
        module = image_model("by_hand", seed=seed, dropout=0.0, optimizer=OPTIMIZERS["SGD"])
        data, technique = sized_loader(batch), ResolutionGrowing(STAGES, grow_batch=case == "grow")
    parts: list[Callback] = [StepTimer(), technique] if case == "time" else [technique]
    options: dict[str, Any] = {"max_epochs": -1} if case == "time" else {"max_steps": STEPS}
    if ranks > 1:
        options |= {"strategy": "ddp", "devices": 2}
    parts += [save_every_step(folder / phase)] if phase == "whole" else []
    ran = run(module, data, folder, *parts, resume=resume, **options)
    shapes = [tuple(next(iter(batch.values())).shape) for batch in ran.watch.batches]
    return {"weights": ran.left["weights"], "shapes": shapes}


def test_two_processes_take_the_same_sizes_and_resume(tmp_path: Path) -> None:
    run_ranks(__file__, ["grow", "length", "time"], tmp_path)
    for case in ("grow", "length"):
        reference = train(case, tmp_path)
        whole, rest = of_ranks(tmp_path / case), of_ranks(tmp_path / case, f"from {STOP}")
        for rank in (0, 1):
            assert [(2 * n, *shape) for n, *shape in whole[rank]["shapes"]] == reference["shapes"]
            assert rest[rank]["shapes"] == whole[rank]["shapes"][STOP:]
            assert_same(whole[rank]["weights"], whole[0]["weights"], case)
            assert_same(whole[rank]["weights"], rest[rank]["weights"], case)
            for name, weight in reference["weights"].items():
                torch.testing.assert_close(whole[rank]["weights"][name], weight, rtol=0, atol=1e-5)
    one, other = of_ranks(tmp_path / "time")
    assert one["shapes"] == other["shapes"]  # by the clock of rank 0
    assert [shape[-1] for shape in one["shapes"]] == [8, 8, 12, 12, 12, 16, 16, 16]


if __name__ == "__main__":
    names, root = cases_asked_for()
    for name in names:
        run_phases(name, root, () if name == "time" else (STOP,), functools.partial(train, name, ranks=2))
