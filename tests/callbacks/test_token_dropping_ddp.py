"""Token dropping, random-LTD and masks that join later, in two processes.

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

from lit_scale.callbacks import MaskLater, RandomLTD, TokenDropping
from lit_scale.factors.token_choice import TokenChoice
from lit_scale.guards import StepSeed
from tests.support.data import loader
from tests.support.networks import build
from tests.support.training import quiet_trainer, save_every_step

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]

STEPS = 8
EASY: dict[str, Any] = {"special_ids": [0], "beta": 0.5}


class Agreement(Callback):
    """Compares all parameters between the ranks after every step, and notes losses and kept positions."""

    def __init__(self) -> None:
        self.gaps: list[float] = []
        self.losses: list[float] = []
        self.kept: list[list[list[int]]] = []

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            if kwargs.get("positions") is not None:
                self.kept.append(kwargs["positions"].tolist())

        self.handle = pl_module.encoder.blocks[2].attention.register_forward_pre_hook(note, with_kwargs=True)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        self.losses.append(outputs["loss"].item())
        if trainer.world_size > 1:
            own = torch.cat([p.detach().flatten() for p in pl_module.parameters()])
            both = [torch.empty_like(own) for _ in range(trainer.world_size)]
            dist.all_gather(both, own)
            self.gaps.append((both[0] - both[1]).abs().max().item())


def fit(folder: Path, phase: str, callback: TokenChoice, ranks: int = 1, **options: Any) -> dict[str, Any]:
    """Train, in two processes or in one, and return what this rank holds; a run of one takes both ranks' batches."""
    resume = options.pop("resume", None)
    # with Adam, a gradient that is 0 but for rounding would make two equal runs differ
    module = build("bert", seed=1 if resume else 0, dropout=0.0, optimizer="momentum", lr=0.05)
    agreement = Agreement()
    callbacks: list[Callback] = [StepSeed(), callback, agreement]
    if ranks > 1:
        options |= {"strategy": "ddp", "devices": ranks}
        callbacks += [save_every_step(folder / phase)] * (resume is None)
    saving = ranks > 1 and resume is None
    trainer = quiet_trainer(folder, max_steps=STEPS, callbacks=callbacks, enable_checkpointing=saving, **options)
    trainer.fit(module, loader("bert", size=40, batch_size=8 // ranks), ckpt_path=resume)
    weights = {key: value for key, value in module.state_dict().items() if isinstance(value, torch.Tensor)}
    found = {"weights": weights, "state": callback.state_dict(), "gaps": agreement.gaps, "kept": agreement.kept}
    return found | {"losses": agreement.losses}


def both_ranks(folder: Path, phase: str) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{phase}-{rank}.pt", weights_only=True) for rank in (0, 1)]


def launch(run_python: Callable[..., CompletedProcess[str]], cases: str, folder: Path) -> None:
    result = run_python(Path(__file__), cases, folder, timeout=280)
    assert result.returncode == 0, result.stderr[-3_000:]


def check(folder: Path, phases: list[str], reference: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Ranks agree after every step; the whole run equals the reference, and each resumed one the whole run."""
    whole = both_ranks(folder, phases[0])
    for rank, found in enumerate(whole):
        assert found["gaps"] == [0.0] * len(found["gaps"]) != []
        if reference is not None:
            for part in ("weights", "state"):
                for key, value in reference[part].items():
                    torch.testing.assert_close(found[part][key], value, rtol=0, atol=1e-5)
        for phase in phases[1:]:
            resumed = both_ranks(folder, phase)[rank]
            assert 0 < len(resumed["losses"]) < len(found["losses"])
            assert found["losses"][-len(resumed["losses"]) :] == resumed["losses"]
            assert all(torch.equal(value, resumed["weights"][key]) for key, value in found["weights"].items())
            assert all(torch.equal(value, resumed["state"][key]) for key, value in found["state"].items())
    assert whole[0]["losses"] != whole[1]["losses"]  # each rank has its own samples
    return whole


def test_two_processes_keep_the_same_running_losses(
    run_python: Callable[..., CompletedProcess[str]], tmp_path: Path
) -> None:
    launch(run_python, "easy,accumulated,control", tmp_path)
    check(tmp_path / "easy", ["whole", "from 3"], fit(tmp_path, "reference", TokenDropping(**EASY)))
    one, other = check(tmp_path / "accumulated", ["whole", "from 5"], None)
    assert torch.equal(one["state"]["running_loss"], other["state"]["running_loss"])
    assert (one["state"]["running_loss"] < 10.0).sum() > 12
    one, other = both_ranks(tmp_path / "control", "whole")
    assert not torch.equal(one["state"]["running_loss"], other["state"]["running_loss"])  # and nothing says so


def test_two_processes_drop_masks_as_one(run_python: Callable[..., CompletedProcess[str]], tmp_path: Path) -> None:
    launch(run_python, "masked", tmp_path)
    check(tmp_path / "masked", ["whole", "from 3"], fit(tmp_path, "reference", MaskLater()))


def test_two_processes_draw_subsets_of_their_own(
    run_python: Callable[..., CompletedProcess[str]], tmp_path: Path
) -> None:
    launch(run_python, "random", tmp_path)
    one, other = check(tmp_path / "random", ["whole", "from 3"], None)
    assert len(one["kept"]) == len(other["kept"]) == 6  # until three quarters of the run
    assert all(a != b for a, b in zip(one["kept"], other["kept"], strict=True))
    again = both_ranks(tmp_path / "random", "from 3")
    assert [found["kept"] for found in again] == [one["kept"][3:], other["kept"][3:]]


# ---- what the two processes run


class OnItsOwn(TokenDropping):
    """Each rank goes by the losses of its own samples."""

    def on_before_optimizer_step(self, trainer: Trainer, *args: Any) -> None:
        class Alone:
            world_size = 1

        super().on_before_optimizer_step(Alone(), *args)  # type: ignore[arg-type]


CASES: dict[str, dict[str, Any]] = {
    "easy": {"make": lambda: TokenDropping(**EASY), "stops": (3,)},
    "accumulated": {"make": lambda: TokenDropping(**EASY), "stops": (5,), "accumulate_grad_batches": 2},
    "control": {"make": lambda: OnItsOwn(**EASY)},
    "masked": {"make": MaskLater, "stops": (3,)},
    "random": {"make": lambda: RandomLTD(keep=0.5, stages=2), "stops": (3,)},
}


def main(case: str, folder: Path) -> None:
    torch.set_num_threads(1)
    folder.mkdir(exist_ok=True)
    options = dict(CASES[case])
    make, stops = options.pop("make"), options.pop("stops", ())
    for stop in (None, *stops):
        phase = "whole" if stop is None else f"from {stop}"
        resume = None if stop is None else folder / "whole" / f"step={stop}.ckpt"
        found = fit(folder, phase, make(), ranks=2, resume=resume, **options)
        torch.save(found, folder / f"{phase}-{dist.get_rank()}.pt")


if __name__ == "__main__":
    for one in sys.argv[1].split(","):
        main(one, Path(sys.argv[2], one))
