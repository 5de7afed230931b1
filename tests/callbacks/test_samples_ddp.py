"""Choosing samples in two processes.

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

from lit_scale.batches import count_samples
from lit_scale.callbacks import ImportanceSampling, RhoLoss, SelectiveBackprop
from lit_scale.guards import StepSeed
from tests.support.data import sized_loader
from tests.support.networks import OPTIMIZERS, image_model
from tests.support.training import quiet_trainer, save_every_step

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]

STEPS, STOP = 8, 3
CASES: dict[str, Callable[[], Any]] = {
    "gated": lambda: ImportanceSampling(threshold=0.2, look_every=1),
    "closed": lambda: ImportanceSampling(threshold=1e9, look_every=2),
    "selective": lambda: SelectiveBackprop(0.25, 1.0, interrupt=3),
    "rho": lambda: RhoLoss(image_model("by_hand", seed=9), share=0.5),
}
RESUMED = ("gated", "selective")
#: Samples that a rank is given and those that it trains; the gate opens when tau, 0.1 more a step, is above 0.2.
COUNTS: dict[str, tuple[list[int], list[int]]] = {
    "closed": ([4] * 8, [4] * 8),
    "selective": ([4] * 8, [4, 4, 4, 2, 2, 4, 2, 2]),
    "rho": ([8] * 8, [4] * 8),
}


class Watch(Callback):
    """Notes the counts of samples, and how far apart the ranks' weights are."""

    def __init__(self) -> None:
        self.brought: list[int] = []
        self.trained: list[int] = []
        self.losses: list[float] = []
        self.gaps: list[float] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        method = type(pl_module).per_sample_loss

        def noted(batch: Any) -> torch.Tensor:
            if pl_module.training:
                self.trained.append(count_samples(batch))
            return method(pl_module, batch)

        pl_module.per_sample_loss = noted

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, *_: Any) -> None:
        self.brought.append(count_samples(batch))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        self.losses.append(outputs["loss"].item())
        if trainer.world_size > 1:
            own = torch.cat([p.detach().flatten() for p in pl_module.parameters()])
            both = [torch.empty_like(own) for _ in range(2)]
            dist.all_gather(both, own)
            self.gaps.append((both[0] - both[1]).abs().max().item())


def fit(case: str, folder: Path, resume: Path | None = None, ranks: int = 2) -> dict[str, Any]:
    module = image_model("by_hand", seed=1 if resume else 0, dropout=0.0, optimizer=OPTIMIZERS["SGD"])
    watch, technique = Watch(), CASES[case]()
    callbacks: list[Callback] = [watch, StepSeed(), technique]
    options: dict[str, Any] = {}
    if ranks > 1:
        options = {"strategy": "ddp", "devices": 2, "enable_checkpointing": True}
        callbacks += [] if resume else [save_every_step(folder / case)]
    trainer = quiet_trainer(folder, callbacks=callbacks, max_steps=STEPS, **options)
    trainer.fit(module, sized_loader(8 // ranks), ckpt_path=resume)
    found = {name: getattr(watch, name) for name in ("brought", "trained", "losses", "gaps")}
    return found | {"weights": dict(module.state_dict()), "state": technique.state_dict()}


def load(folder: Path, name: str) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in (0, 1)]


def test_two_processes_train_as_many_samples_agree_and_resume(
    run_python: Callable[..., CompletedProcess[str]], tmp_path: Path
) -> None:
    result = run_python(Path(__file__), ",".join(CASES), tmp_path, timeout=280)
    assert result.returncode == 0, result.stderr[-3_000:]
    for case in CASES:
        whole = load(tmp_path, case)
        rest = load(tmp_path, f"{case}-resumed") if case in RESUMED else whole
        one, other = whole
        assert one["brought"] == other["brought"]
        assert one["trained"] == other["trained"]
        assert one["state"] == other["state"]  # both know the same tau
        assert one["losses"] != other["losses"]  # of samples of their own
        if case in COUNTS:
            assert (one["brought"], one["trained"]) == COUNTS[case]
        for before, after in zip(whole, rest, strict=True):
            assert before["gaps"] == [0.0] * STEPS
            assert after["losses"][-(STEPS - STOP) :] == before["losses"][STOP:]
            assert after["brought"][-(STEPS - STOP) :] == before["brought"][STOP:]
            assert after["state"] == before["state"]
            assert all(torch.equal(weight, after["weights"][name]) for name, weight in before["weights"].items())
    gated = load(tmp_path, "gated")[0]
    opened = gated["brought"].index(12)
    assert gated["brought"] == [4] * opened + [12] * (STEPS - opened)
    assert gated["trained"] == [4] * STEPS
    assert 1 < opened < STEPS
    closed, reference = load(tmp_path, "closed")[0], fit("closed", tmp_path, ranks=1)
    for name, weight in reference["weights"].items():  # the global batch of one process
        torch.testing.assert_close(closed["weights"][name], weight, rtol=0, atol=1e-5)


if __name__ == "__main__":
    torch.set_num_threads(1)
    cases, folder = sys.argv[1].split(","), Path(sys.argv[2])
    for case in cases:
        torch.save(fit(case, folder), folder / f"{case}-{dist.get_rank()}.pt")
        if case in RESUMED:
            found = fit(case, folder, folder / case / f"step={STOP}.ckpt")
            assert len(found["losses"]) == STEPS - STOP
            torch.save(found, folder / f"{case}-resumed-{dist.get_rank()}.pt")
