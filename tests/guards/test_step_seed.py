"""StepSeed: resumed runs draw what the uninterrupted ones did; without it they do not."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from lit_scale.guards import (
    StepSeed,
)
from tests.support.data import Numbers, numbers
from tests.support.equality import same
from tests.support.networks import Net
from tests.support.training import SaveAt, left, trainer_of

pytestmark = pytest.mark.filterwarnings("ignore")


class Augmented(Net):
    """Also draws where augmentation on the device does, before the batch's start."""

    def on_after_batch_transfer(self, batch: Tensor, dataloader_idx: int) -> Tensor:
        return batch + torch.randn_like(batch) if self.trainer.training else batch


def resume_differs(
    tmp_path: Path, model: type[Net], stop: int, callbacks: Callable[[], list[pl.Callback]], **options: Any
) -> bool:
    """Whether a run stopped at a step and resumed in a dirty process state ends other than the uninterrupted one."""
    validation = torch.utils.data.DataLoader(Numbers(), batch_size=16) if options.pop("validate", False) else None
    whole = trainer_of(tmp_path, *callbacks(), **options)
    torch.manual_seed(1)
    whole.fit(model(), numbers(), validation)
    path = tmp_path / "stop.ckpt"
    with pytest.raises(KeyError, match="stop"):
        trainer_of(tmp_path, *callbacks(), SaveAt(stop, path), **options).fit(model(), numbers(), validation)
    second = trainer_of(tmp_path, *callbacks(), **options)
    fresh = model()
    torch.manual_seed(999)
    second.fit(fresh, numbers(), validation, ckpt_path=path)
    assert second.global_step == whole.global_step
    return not same(left(second), left(whole))


@pytest.mark.parametrize("stop", [1, 7, 15, 16, 17])  # 16 batches an epoch
def test_resume_is_exact_with_dropout(tmp_path: Path, stop: int) -> None:
    assert not resume_differs(tmp_path, Augmented, stop, lambda: [StepSeed(5)])


def test_resume_is_exact_with_accumulation_and_validation(tmp_path: Path) -> None:
    options = {"accumulate_grad_batches": 2, "val_check_interval": 4, "validate": True}
    assert not resume_differs(tmp_path, Augmented, 5, lambda: [StepSeed(5)], **options)


def test_without_step_seed_resume_differs(tmp_path: Path) -> None:
    assert resume_differs(tmp_path, Net, 7, list)


class Seeds(pl.Callback):
    """The seed in force in each training batch."""

    def __init__(self) -> None:
        self.seeds: list[int] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.seeds.append(torch.initial_seed())


@pytest.mark.parametrize("stop", [7, 16])
def test_the_counter_goes_on_where_it_stopped(tmp_path: Path, stop: int) -> None:
    logs = [Seeds(), Seeds(), Seeds()]
    trainer_of(tmp_path, StepSeed(), logs[0]).fit(Net(), numbers())
    with pytest.raises(KeyError):
        trainer_of(tmp_path, StepSeed(), logs[1], SaveAt(stop, tmp_path / "a.ckpt")).fit(Net(), numbers())
    trainer_of(tmp_path, StepSeed(), logs[2]).fit(Net(), numbers(), ckpt_path=tmp_path / "a.ckpt")
    assert logs[1].seeds + logs[2].seeds == logs[0].seeds
    assert len(set(logs[0].seeds)) == 32, "no batch shares its seed"


def test_validation_draws_the_same_and_shifts_nothing(tmp_path: Path) -> None:
    validation = torch.utils.data.DataLoader(Numbers(), batch_size=16)
    with_validation, without = Net(), Net()
    trainer_of(tmp_path, StepSeed()).fit(with_validation, numbers(), validation)
    trainer_of(tmp_path, StepSeed()).fit(without, numbers())
    assert with_validation.losses == without.losses
    first, second = with_validation.validated[:2], with_validation.validated[2:]
    assert first == second
    assert first[0] != first[1]


def test_ranks_and_seeds_draw_differently_and_cheaply() -> None:
    def drawn(seed: int, rank: int, batch: int) -> float:
        device = SimpleNamespace(root_device=torch.device("cpu"))
        loop = SimpleNamespace(total_batch_idx=batch)
        fake: Any = SimpleNamespace(global_rank=rank, strategy=device, fit_loop=loop)
        StepSeed(seed).on_train_batch_start(fake, fake, None, 0)
        return torch.rand((), dtype=torch.float64).item()

    places = [(seed, rank, batch) for seed in range(3) for rank in range(3) for batch in range(3)]
    assert len({drawn(*place) for place in places}) == len(places)
    assert drawn(1, 1, 1) == drawn(1, 1, 1)
    fastest = math.inf
    for _ in range(20):
        start = time.perf_counter()
        drawn(0, 0, 0)
        fastest = min(fastest, time.perf_counter() - start)
    assert fastest < 1e-4


def test_the_current_cuda_device_is_seeded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    generators = (torch.Generator().manual_seed(7), torch.Generator())
    monkeypatch.setattr(torch.cuda, "default_generators", generators)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    loop, device = SimpleNamespace(total_batch_idx=0), SimpleNamespace(root_device=torch.device("cuda", 1))
    fake: Any = SimpleNamespace(global_rank=1, strategy=device, fit_loop=loop)
    StepSeed().on_train_batch_start(fake, fake, None, 0)
    assert generators[1].initial_seed() == torch.initial_seed()
    assert generators[0].initial_seed() == 7
