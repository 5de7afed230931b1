"""Blocks that are chosen for one step, in two processes.

The test runs this file as a script; Lightning starts its second process.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer

from lit_scale.factors.active_blocks import ActiveBlocks
from lit_scale.guards import StepSeed
from tests.support.data import loader
from tests.support.networks import OPTIMIZERS, build
from tests.support.training import quiet_trainer

STEPS = 6


class Skipping(ActiveBlocks):
    """Each step without one of the blocks; all but the first two without another one as well."""

    for_one_step = True

    def decide(self, trainer: Trainer, pl_module: LightningModule) -> None:
        step, total = trainer.global_step, len(self.stack)
        self.activate(trainer, pl_module, {i for i in range(total) if i != step % total and (step < 2 or i != 1)})


def fit(folder: Path, **options: Any) -> dict[str, Any]:
    ranks = options.get("devices", 1)
    module = build("plain_torch", dropout=0.0, optimizer=OPTIMIZERS["SGD"])
    callbacks = [StepSeed(), Skipping()]
    trainer = quiet_trainer(folder, max_steps=STEPS, accumulate_grad_batches=2, callbacks=callbacks, **options)
    trainer.fit(module, loader("plain_torch", size=48, batch_size=8 // ranks))
    return {"weights": module.state_dict(), "class": type(module.net.layers).__name__}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_ranks_stay_together_and_with_one_process(
    run_python: Callable[..., CompletedProcess[str]], tmp_path: Path
) -> None:
    result = run_python(Path(__file__), tmp_path, timeout=200)
    assert result.returncode == 0, result.stderr[-3_000:]
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    alone = fit(tmp_path)
    assert one["class"] == other["class"] == alone["class"] == "ModuleList"
    for name, value in alone["weights"].items():
        assert torch.equal(one["weights"][name], other["weights"][name]) or name.endswith("calls"), name
        torch.testing.assert_close(one["weights"][name], value, msg=name)


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    found = fit(folder, strategy="ddp_find_unused_parameters_true", devices=2)
    torch.save(found, folder / f"{dist.get_rank()}.pt")
