"""Choosing samples in two processes.

A test runs this file as a script; Lightning starts its second process, and both leave what they hold in a folder.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_scale.callbacks import ImportanceSampling, RhoLoss, SelectiveBackprop
from tests.support.data import sized_loader
from tests.support.equality import assert_same
from tests.support.networks import OPTIMIZERS, image_model
from tests.support.processes import cases_asked_for, of_ranks, run_phases, run_ranks
from tests.support.training import run, save_every_step

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


def train(case: str, folder: Path, phase: str = "", resume: Path | None = None, ranks: int = 1) -> dict[str, Any]:
    """Train in one process or two; a run of one takes both ranks' batches."""
    module = image_model("by_hand", seed=1 if resume else 0, dropout=0.0, optimizer=OPTIMIZERS["SGD"])
    options: dict[str, Any] = {"strategy": "ddp", "devices": 2} if ranks > 1 else {}
    saving = [save_every_step(folder / phase)] if phase == "whole" else []
    parts = [CASES[case](), *saving]
    ran = run(module, sized_loader(8 // ranks), folder, *parts, resume=resume, max_steps=STEPS, **options)
    found = {name: getattr(ran.watch, name) for name in ("brought", "trained", "losses", "gaps")}
    return found | {"weights": ran.left["weights"], "state": ran.left["techniques"]}


def test_two_processes_train_as_many_samples_agree_and_resume(
    tmp_path: Path,
) -> None:
    run_ranks(__file__, list(CASES), tmp_path)
    for case in CASES:
        whole = of_ranks(tmp_path / case)
        rest = of_ranks(tmp_path / case, f"from {STOP}") if case in RESUMED else whole
        one, other = whole
        assert one["brought"] == other["brought"]
        assert one["trained"] == other["trained"]
        assert one["state"] == other["state"]  # both know the same tau
        assert one["losses"] != other["losses"]  # of samples of their own
        if case in COUNTS:
            assert (one["brought"], one["trained"]) == COUNTS[case]
        for before, after in zip(whole, rest, strict=True):
            assert before["gaps"] == [0.0] * STEPS
            assert len(after["losses"]) == (STEPS - STOP if case in RESUMED else STEPS)
            assert after["losses"][-(STEPS - STOP) :] == before["losses"][STOP:]
            assert after["brought"][-(STEPS - STOP) :] == before["brought"][STOP:]
            assert after["state"] == before["state"]
            assert_same(before["weights"], after["weights"], case)
    gated = of_ranks(tmp_path / "gated")[0]
    opened = gated["brought"].index(12)
    assert gated["brought"] == [4] * opened + [12] * (STEPS - opened)
    assert gated["trained"] == [4] * STEPS
    assert 1 < opened < STEPS
    closed, reference = of_ranks(tmp_path / "closed")[0], train("closed", tmp_path)
    for name, weight in reference["weights"].items():  # the global batch of one process
        torch.testing.assert_close(closed["weights"][name], weight, rtol=0, atol=1e-5)


if __name__ == "__main__":
    names, root = cases_asked_for()
    for name in names:
        run_phases(name, root, (STOP,) if name in RESUMED else (), functools.partial(train, name, ranks=2))
