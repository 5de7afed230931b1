"""The batch ramp, large batches and the noise scale in two processes.

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

from lit_scale.callbacks import BatchRamp, EightBitOptimizer, GradientNoiseScale, LargeBatch
from lit_scale.guards import StepSeed
from tests.support.data import loader
from tests.support.networks import OPTIMIZERS, build
from tests.support.training import quiet_trainer, save_every_step

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]

STOP = 4
SMOOTHING = 0.5


def fit(case: str, folder: Path, ranks: int = 1, resume: Path | None = None) -> dict[str, Any]:
    """Train in one process or two; a run of one takes both ranks' batches."""
    noise = GradientNoiseScale(SMOOTHING)
    ramp = BatchRamp([(0.0, 8), (0.25, 16), (0.5, 32)])
    parts: dict[str, list[Any]] = {
        "ramp": [ramp, noise],
        "plain": [noise],
        "bits": [LargeBatch(2, lr=0.02), EightBitOptimizer()],
    }
    options: dict[str, Any] = {"optimizer": OPTIMIZERS["SGD" if case != "bits" else "AdamW"]}
    module: Any = build("torch_encoder", seed=1 if resume else 0, dropout=0.0, **options)
    callbacks = [StepSeed(), *parts[case]]
    more: dict[str, Any] = {"max_epochs": 2} if case == "ramp" else {"max_steps": 6}
    if ranks > 1:
        more |= {"strategy": "ddp", "devices": 2, "enable_checkpointing": True}
        callbacks += [] if resume else [save_every_step(folder / case)]
    trainer = quiet_trainer(folder, callbacks=callbacks, **more)
    trainer.fit(module, loader("torch_encoder", size=128, batch_size=8 // ranks), ckpt_path=resume)
    states = torch.utils._pytree.tree_leaves(trainer.optimizers[0].state_dict()["state"])
    return {
        "weights": dict(module.state_dict()),
        "optimizer": list(map(torch.as_tensor, states)),
        "windows": list(ramp.windows),
        "steps": trainer.global_step,
        "noise": noise.state_dict(),
    }


def load(folder: Path, name: str) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in (0, 1)]


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


def test_two_processes_take_the_same_batches_see_the_same_noise_and_resume(
    run_python: Callable[..., CompletedProcess[str]], tmp_path: Path
) -> None:
    result = run_python(Path(__file__), "ramp,plain,bits", tmp_path, timeout=280)
    assert result.returncode == 0, result.stderr[-3_000:]
    assert result.stdout.count("gradient noise scale: ") == 4  # of rank 0 alone, at the end of each run
    for case in ("ramp", "plain", "bits"):
        reference = fit(case, tmp_path)
        whole, rest = load(tmp_path, case), load(tmp_path, f"{case}-resumed")
        for found, again in zip(whole, rest, strict=True):
            assert found["steps"] == again["steps"] == reference["steps"]
            assert found["windows"] == again["windows"] == reference["windows"]
            for part in ("weights", "noise"):
                own, first, resumed = found[part], whole[0][part], again[part]
                for key, value in own.items():
                    assert torch.equal(torch.as_tensor(value), torch.as_tensor(first[key])), key
                    assert torch.equal(torch.as_tensor(value), torch.as_tensor(resumed[key])), key
            assert all(map(torch.equal, found["optimizer"], again["optimizer"]))
            for key, weight in reference["weights"].items():
                torch.testing.assert_close(found["weights"][key], weight, rtol=0, atol=1e-5 if case != "bits" else 1e-3)
    assert load(tmp_path, "ramp")[0]["windows"] == [(0, 1), (8, 2), (12, 4)]
    noise = load(tmp_path, "plain")[0]["noise"]
    assert (float(noise["signal"]), float(noise["noise"])) == pytest.approx(noise_by_hand(6), rel=1e-4)
    assert noise["batch"] == 8


if __name__ == "__main__":
    torch.set_num_threads(1)
    cases, folder = sys.argv[1].split(","), Path(sys.argv[2])
    for case in cases:
        torch.save(found := fit(case, folder, 2), folder / f"{case}-{dist.get_rank()}.pt")
        found = fit(case, folder, 2, folder / case / f"step={STOP}.ckpt")
        torch.save(found, folder / f"{case}-resumed-{dist.get_rank()}.pt")
