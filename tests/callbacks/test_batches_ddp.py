"""The batch ramp, large batches and the noise scale in two processes.

A test runs this file as a script; Lightning starts its second process, and both leave what they hold in a folder.
"""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_scale.callbacks import BatchRamp, EightBitOptimizer, GradientNoiseScale, LargeBatch
from tests.support.data import loader
from tests.support.equality import assert_same
from tests.support.networks import OPTIMIZERS, build
from tests.support.processes import cases_asked_for, of_ranks, run_phases, run_ranks
from tests.support.training import fit, left, save_every_step

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]

CASES = ("ramp", "plain", "bits")
STOP = 4
SMOOTHING = 0.5


def train(case: str, folder: Path, phase: str = "", resume: Path | None = None, ranks: int = 1) -> dict[str, Any]:
    """Train in one process or two; a run of one takes both ranks' batches."""
    noise = GradientNoiseScale(SMOOTHING)
    ramp = BatchRamp([(0.0, 8), (0.25, 16), (0.5, 32)])
    parts: dict[str, list[Any]] = {
        "ramp": [ramp, noise],
        "plain": [noise],
        "bits": [LargeBatch(2, lr=0.02), EightBitOptimizer()],
    }
    optimizer = OPTIMIZERS["SGD" if case != "bits" else "AdamW"]
    module = build("torch_encoder", seed=1 if resume else 0, dropout=0.0, optimizer=optimizer)
    options: dict[str, Any] = {"max_epochs": 2} if case == "ramp" else {"max_steps": 6}
    if ranks > 1:
        options |= {"strategy": "ddp", "devices": 2}
    callbacks = [*parts[case], *([save_every_step(folder / phase)] if phase == "whole" else [])]
    data = loader("torch_encoder", size=128, batch_size=8 // ranks)
    trainer = fit(module, data, folder, *callbacks, resume=resume, **options)
    return {"left": left(trainer), "windows": list(ramp.windows), "noise": noise.state_dict()}


def noise_by_hand(steps: int) -> tuple[float, float]:
    """Both averages of the plain case, from each rank's batches and one network: the small batch is a rank's, 4."""
    module: Any = build("torch_encoder", dropout=0.0, optimizer=OPTIMIZERS["SGD"])
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)
    ranks = [loader("torch_encoder", size=128, batch_size=4, rank=rank, world_size=2) for rank in (0, 1)]
    signal = noise = 0.0
    for _, batches in zip(range(steps), zip(*ranks, strict=True), strict=False):
        gradients = []
        for batch in batches:
            module.zero_grad()
            module.per_sample_loss(batch).mean().backward()
            gradients.append([p.grad.clone() for p in module.parameters()])
        small = sum(float(g.double().square().sum()) for own in gradients for g in own) / 2
        for p, one, other in zip(module.parameters(), *gradients, strict=True):
            p.grad = (one + other) / 2
        large = sum(float(p.grad.double().square().sum()) for p in module.parameters())
        signal = SMOOTHING * signal + (1 - SMOOTHING) * (8 * large - 4 * small) / 4
        noise = SMOOTHING * noise + (1 - SMOOTHING) * (small - large) / (1 / 4 - 1 / 8)
        optimizer.step()
        schedule.step()
    return signal, noise


def test_two_processes_take_the_same_batches_see_the_same_noise_and_resume(tmp_path: Path) -> None:
    printed = run_ranks(__file__, CASES, tmp_path)
    assert printed.count("gradient noise scale: ") == 4  # of rank 0 alone, at the end of each run
    for case in CASES:
        reference = train(case, tmp_path)["left"]
        whole, rest = of_ranks(tmp_path / case), of_ranks(tmp_path / case, f"from {STOP}")
        assert_same(whole[0]["left"]["weights"], whole[1]["left"]["weights"], case)
        assert_same(whole[0]["noise"], whole[1]["noise"], case)
        assert_same(whole, rest, case)
        for found in whole:
            assert found["left"]["steps"] == reference["steps"]
            for key, weight in reference["weights"].items():
                tolerance = 1e-5 if case != "bits" else 1e-3
                torch.testing.assert_close(found["left"]["weights"][key], weight, rtol=0, atol=tolerance)
    assert of_ranks(tmp_path / "ramp")[0]["windows"] == train("ramp", tmp_path)["windows"] == [(0, 1), (8, 2), (12, 4)]
    noise = of_ranks(tmp_path / "plain")[0]["noise"]
    assert (float(noise["signal"]), float(noise["noise"])) == pytest.approx(noise_by_hand(6), rel=1e-4)
    assert noise["batch"] == 8


if __name__ == "__main__":
    names, root = cases_asked_for()
    for name in names:
        run_phases(name, root, (STOP,), functools.partial(train, name, ranks=2))
