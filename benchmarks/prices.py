"""Measures the price of a step of each network of a task, in steps of the task's unit; all are timed in turn."""

from __future__ import annotations

import os
import runpy
import statistics
import time
from datetime import date
from typing import Any

import numpy as np
from provenance import ROOT
from tasks import Task

__all__ = ["measure", "model_and_data", "recipe_of"]


def recipe_of(name: str) -> Any:
    """The arguments that a recipe's script passes to ``run_recipe``, without running the recipe."""
    from lit_scale import cli

    caught: dict[str, Any] = {}

    def catch(model: Any, data: Any, *, technique: Any, defaults: dict[str, Any], first: Any = None, **_: Any) -> None:
        techniques = (technique,) if isinstance(technique, type) else tuple(technique)
        caught["recipe"] = cli.Recipe(name, "", [], model, data, techniques, defaults, first=first)

    own = cli.run_recipe
    try:
        cli.run_recipe = catch  # type: ignore[assignment]
        runpy.run_path(str(ROOT / "recipes" / f"{name}.py"), run_name="__main__")
    finally:
        cli.run_recipe = own
    return caught["recipe"]


def model_and_data(task: Task, size: str) -> tuple[Any, Any]:
    """The LightningModule and the data module of a plain run, made from the recipe and the task's flags."""
    from lit_scale import cli

    flags = [*task.machine, *task.flags, *task.sizes[size], "--baseline", "--trainer.enable_progress_bar=false"]
    made = cli.RecipeCLI(recipe_of(task.recipe), flags)
    made.datamodule.prepare_data()
    made.datamodule.setup("fit")
    return made.model, made.datamodule


def measure(task: Task, rounds: int = 40, core: int | None = None) -> dict[str, Any]:
    """Measure relative prices of all sizes, standard deviations of their logarithms, and the seconds of the unit.

    Args:
        task: The task.
        rounds: Timed rounds over all sizes.
        core: Number of the core to run on; None for any.
    """
    import torch

    from lit_scale.factors.optimizers import create_optimizer
    from lit_scale.restoring import unnoticed

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if core is not None:
        os.sched_setaffinity(0, {core})
    device = torch.device("cuda" if "--trainer.accelerator=gpu" in task.machine else "cpu")
    precision = torch.autocast(device.type, torch.bfloat16, enabled="--trainer.precision=bf16-mixed" in task.machine)
    steps: dict[str, Any] = {}
    parameters: dict[str, int] = {}
    waits: dict[str, float] = {}
    for size in task.sizes:
        model, data = model_and_data(task, size)
        loader = iter(data.train_dataloader())
        batch = next(loader)
        begun = time.perf_counter()
        for _ in range(5):
            next(loader)
        waits[size] = (time.perf_counter() - begun) / 5
        model, own = model.to(device), model.hparams
        batch = model.transfer_batch_to_device(batch, device, 0)
        optimizer = create_optimizer(model, own["optimizer"], lr=own["lr"], weight_decay=own["weight_decay"])

        def step(model: Any = model, batch: Any = batch, optimizer: Any = optimizer) -> None:
            with precision:
                loss = model.training_step(batch, 0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        steps[size] = (model, step)
        parameters[size] = sum(parameter.numel() for parameter in model.parameters())
    wait = statistics.median(waits.values())  # the loader is the same for all sizes
    seconds: dict[str, list[float]] = {size: [] for size in steps}
    for round_ in range(rounds + 1):
        for size, (model, step) in steps.items():
            with unnoticed(model):
                repeats = 1 if not seconds[size] else max(1, round(0.1 / seconds[size][0]))
                begun = time.perf_counter()
                for _ in range(repeats):
                    step()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                spent = (time.perf_counter() - begun) / repeats + wait
            if round_ or not seconds[size]:
                seconds[size].append(spent)
    timed = np.array([own[1:] for own in seconds.values()])  # (sizes, rounds), without the warm-up
    unit = list(seconds).index(task.unit)

    def ratios(chosen: np.ndarray) -> np.ndarray:
        """Logarithms of the prices, from the lower quartiles of the times, which other work disturbs least."""
        quick = np.quantile(timed[:, chosen], 0.25, axis=1)
        return np.log(quick / quick[unit])

    rounds = timed.shape[1]
    generator = np.random.default_rng(0)
    spread = np.std([ratios(generator.integers(rounds, size=rounds)) for _ in range(400)], axis=0)
    prices = {
        size: {"price": round(float(np.exp(ratio)), 4), "log_sd": round(float(sd), 5), "parameters": parameters[size]}
        for size, ratio, sd in zip(seconds, ratios(np.arange(rounds)), spread, strict=True)
    }
    return {
        "unit": task.unit,
        "unit_seconds": float(np.quantile(timed[unit], 0.25)),
        "sizes": prices,
        "rounds": rounds,
        "date": date.today().isoformat(),
    }
