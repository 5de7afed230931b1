"""Progressive stacking in two processes.

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
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.strategies import DDPStrategy

from lit_scale.callbacks import ProgressiveStacking
from lit_scale.guards import StepSeed
from tests.support.data import loader
from tests.support.networks import OPTIMIZERS, build
from tests.support.training import Recorder, StepTimer, quiet_trainer, save_every_step

pytestmark = [pytest.mark.filterwarnings("ignore")]

RunPython = Callable[..., CompletedProcess[str]]

STEPS = 8
STAGES = [(0.0, 0.25), (0.25, 0.5), (0.625, 1.0)]  # 1, 2 and 4 blocks, from steps 0, 2 and 5
PLAIN, UNUSED = "ddp", "ddp_find_unused_parameters_true"


class Agreement(Callback):
    """Compares all parameters between the ranks after every optimizer step."""

    def __init__(self) -> None:
        self.gaps: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        own = torch.cat([p.detach().flatten() for p in pl_module.parameters()])
        both = [torch.empty_like(own) for _ in range(trainer.world_size)]
        dist.all_gather(both, own)
        self.gaps.append((both[0] - both[1]).abs().max().item())


def fit(name: str, folder: Path, phase: str, strategy: str = "", **options: Any) -> dict[str, Any]:
    """Train, in two processes or in one, and return what this rank holds; a run of one takes both ranks' batches."""
    resume, stacking = options.pop("resume", None), options.pop("stacking", {})
    freeze, ema = options.pop("freeze", ()), options.pop("ema", False)
    # With Adam, a gradient that is 0 but for rounding, as of the bias of keys, would make two equal runs differ.
    momentum = {"optimizer": "momentum", "lr": 0.05} if name == "bert" else {"optimizer": OPTIMIZERS["SGD"]}
    adam = options.pop("adam", False)
    module = build(name, seed=1 if resume else 0, dropout=options.pop("dropout", 0.0), **({} if adam else momentum))
    for part in freeze:
        module.get_submodule(part).requires_grad_(False)
    recorder, agreement = Recorder(getattr(module, "blocks", "encoder.blocks")), Agreement()
    callbacks = [StepSeed(), options.pop("kind", ProgressiveStacking)(STAGES, **stacking), recorder]
    callbacks += [EMAWeightAveraging(decay=0.5)] * ema
    if strategy:
        callbacks.append(agreement)
        options |= {"strategy": strategy, "devices": 2}
        if resume is None:
            callbacks.append(save_every_step(folder / phase))
    if options.pop("timed", False):
        callbacks.insert(0, StepTimer())
    else:
        options |= {"max_steps": STEPS}
    trainer = quiet_trainer(folder, callbacks=callbacks, enable_checkpointing=bool(strategy) and not resume, **options)
    trainer.fit(module, loader(name, size=40, batch_size=4 if strategy else 8), ckpt_path=resume)
    return {
        "weights": {key: value for key, value in module.state_dict().items() if isinstance(value, torch.Tensor)},
        "optimizer": trainer.optimizers[0].state_dict(),
        "losses": recorder.losses,
        "depths": recorder.depths,
        "gaps": agreement.gaps,
        "frozen": sorted(key for key, p in module.named_parameters() if not p.requires_grad),
    }


def flat(found: dict[str, Any]) -> list[torch.Tensor]:
    states = found["optimizer"]["state"].values()
    return [*found["weights"].values(), *(torch.as_tensor(v) for state in states for v in state.values())]


def both_ranks(folder: Path, phase: str) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{phase}-{rank}.pt", weights_only=True) for rank in (0, 1)]


def launch(run_python: RunPython, cases: str, folder: Path) -> None:
    result = run_python(Path(__file__), cases, folder, timeout=280)
    assert result.returncode == 0, result.stderr[-3_000:]


def check_phases(folder: Path, phases: list[str], reference: dict[str, Any] | None) -> None:
    """Ranks agree after every step; the whole run equals the reference, and each resumed one the whole run."""
    whole = both_ranks(folder, phases[0])
    for rank, found in enumerate(whole):
        assert found["gaps"] == [0.0] * len(found["gaps"])
        assert [depth for _, depth in found["depths"]][-1] == 4
        if reference is not None:
            for one, other in zip(flat(found), flat(reference), strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
        for phase in phases[1:]:
            resumed = both_ranks(folder, phase)[rank]
            assert 0 < len(resumed["losses"]) < len(found["losses"])
            assert found["losses"][-len(resumed["losses"]) :] == resumed["losses"]
            assert all(map(torch.equal, flat(found), flat(resumed))), phase
    assert whole[0]["losses"] != whole[1]["losses"]  # each rank has its own samples


@pytest.mark.slow
def test_two_processes_grow_agree_and_resume(run_python: RunPython, tmp_path: Path) -> None:
    launch(run_python, "fast", tmp_path)
    check_phases(tmp_path / "fast", ["whole", "from 2"], fit("bert", tmp_path, "reference"))


@pytest.mark.slow
def test_dropout_accumulation_and_averages_resume_too(run_python: RunPython, tmp_path: Path) -> None:
    launch(run_python, "dropout", tmp_path)
    check_phases(tmp_path / "dropout", ["whole", "from 4", "from 5", "from 6"], None)  # before, at and after a growth


@pytest.mark.slow
def test_unused_parameters_and_frozen_old_blocks(run_python: RunPython, tmp_path: Path) -> None:
    launch(run_python, "unused", tmp_path)
    reference = fit("timm_vit", tmp_path, "reference", stacking={"freeze_old": True, "rewarmup": 0.2})
    for found in both_ranks(tmp_path / "unused", "whole"):
        assert found["depths"] == reference["depths"]
    check_phases(tmp_path / "unused", ["whole", "from 2", "from 5"], reference)


@pytest.mark.slow
def test_frozen_parameters_a_limit_of_time_and_what_happens_without_a_new_wrapper(
    run_python: RunPython, tmp_path: Path
) -> None:
    launch(run_python, "frozen,time,control", tmp_path)

    parts = ["net.stem", "net.layers.0.norm", "net.layers.3.inner"]
    reference = fit("plain_torch", tmp_path, "reference", freeze=parts)
    check_phases(tmp_path / "frozen", ["whole", "from 3"], reference)
    for found in both_ranks(tmp_path / "frozen", "whole"):
        assert found["frozen"] == sorted(f"{part}.{kind}" for part in parts for kind in ("weight", "bias"))

    for found in both_ranks(tmp_path / "time", "whole"):
        assert found["gaps"] == [0.0] * STEPS
        assert [depth for _, depth in found["depths"]] == [1, 1, 2, 2, 2, 4, 4, 4]  # by the clock of rank 0

    for found in both_ranks(tmp_path / "control", "whole"):
        assert found["gaps"][:2] == [0.0, 0.0]
        assert min(found["gaps"][2:]) > 0.0  # the ranks drift apart, and nothing says so


@pytest.mark.parametrize(
    ("strategy", "options", "message"),
    [
        (DDPStrategy(static_graph=True), {}, r"use DDPStrategy\(static_graph=False\)"),
        (DDPStrategy(), {"freeze_old": True}, "freeze_old=True needs strategy='ddp_find_unused_parameters_true'"),
    ],
)
def test_what_ddp_cannot_do_is_refused_at_setup(
    strategy: DDPStrategy, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    stacking = ProgressiveStacking(STAGES, **options)
    trainer = quiet_trainer(tmp_path, strategy=strategy, callbacks=[stacking])
    with pytest.raises(ValueError, match=message):
        stacking.setup(trainer, build("plain_torch"), "fit")


# ---- what the two processes run


class WithoutWrapping(ProgressiveStacking):
    """Freezes what waits and lets go of it, and leaves DDP's wrapper as it was."""

    def _share_gradients(self, trainer: Trainer, pl_module: LightningModule) -> None:
        first = not self._paused
        self._resume_parameters()
        for index, block in enumerate(self._stack.blocks):
            if index not in self._stack.active:
                self._paused += list(block.parameters())
        for parameter in self._paused:
            parameter.requires_grad_(False)
        if first:
            trainer.strategy.model = trainer.strategy.model.module
            trainer.strategy.configure_ddp()


CASES: dict[str, dict[str, Any]] = {
    "fast": {"name": "bert", "strategy": PLAIN, "stops": (2,)},
    "dropout": {
        "name": "bert",
        "strategy": PLAIN,
        "stops": (4, 5, 6),
        "dropout": 0.1,
        "adam": True,
        "accumulate_grad_batches": 2,
        "gradient_clip_val": 0.05,
        "ema": True,
        "stacking": {"growth": "interleave"},
    },
    "unused": {
        "name": "timm_vit",
        "strategy": UNUSED,
        "stops": (2, 5),
        "stacking": {"freeze_old": True, "rewarmup": 0.2},
    },
    "frozen": {
        "name": "plain_torch",
        "strategy": PLAIN,
        "stops": (3,),
        "freeze": ["net.stem", "net.layers.0.norm", "net.layers.3.inner"],
    },
    "time": {"name": "plain_torch", "strategy": PLAIN, "timed": True, "max_epochs": -1},
    "control": {"name": "plain_torch", "strategy": PLAIN, "kind": WithoutWrapping},
}


def main(case: str, folder: Path) -> None:
    torch.set_num_threads(1)
    folder.mkdir(exist_ok=True)
    options = dict(CASES[case])
    stops = options.pop("stops", ())
    for stop in (None, *stops):
        phase = "whole" if stop is None else f"from {stop}"
        resume = None if stop is None else folder / "whole" / f"step={stop}.ckpt"
        found = fit(folder=folder, phase=phase, resume=resume, **copy.deepcopy(options))
        torch.save(found, folder / f"{phase}-{dist.get_rank()}.pt")


if __name__ == "__main__":
    for one in sys.argv[1].split(","):
        main(one, Path(sys.argv[2], one))
