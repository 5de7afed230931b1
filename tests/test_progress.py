from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Timer
from torch.utils.data import DataLoader, IterableDataset

from lit_scale.progress import progress, progress_after
from tests.support.data import loader
from tests.support.networks import build
from tests.support.training import quiet_trainer, save_every_step

pytestmark = [pytest.mark.filterwarnings("ignore")]


class Progress(Callback):
    """The progress at the start of every batch, and after the last."""

    def __init__(self) -> None:
        self.seen: list[float] = []
        self.ahead: list[float] = []

    def on_train_start(self, trainer: Trainer, *_: Any) -> None:
        batches = trainer.num_training_batches
        if batches < float("inf"):
            total = int(batches) * max(1, trainer.max_epochs or 1)
            self.ahead = [progress_after(trainer, batch) for batch in range(total)]

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        self.seen.append(progress(trainer))

    def on_train_end(self, trainer: Trainer, *_: Any) -> None:
        self.seen.append(progress(trainer))


def progress_of(root: Path, data: Any = None, **limits: Any) -> list[float]:
    seen = Progress()
    trainer = quiet_trainer(root, callbacks=[seen], **limits)
    trainer.fit(build("plain_torch"), loader("plain_torch", size=20) if data is None else data)
    if seen.ahead and "max_time" not in limits:  # what was said before the first batch
        assert seen.ahead[: len(seen.seen) - 1] == seen.seen[:-1]
    return seen.seen


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"max_steps": 4}, [0, 1 / 4, 2 / 4, 3 / 4, 1]),
        ({"max_epochs": 2}, [step / 10 for step in range(11)]),
        ({"max_epochs": 2, "limit_train_batches": 2}, [0, 1 / 4, 2 / 4, 3 / 4, 1]),
        ({"max_epochs": 1, "limit_train_batches": 0.4}, [0, 1 / 2, 1]),
        ({"max_steps": 2, "accumulate_grad_batches": 2}, [0, 0, 1 / 2, 1 / 2, 1]),
        ({"max_epochs": 1, "accumulate_grad_batches": 2}, [0, 0, 1 / 3, 1 / 3, 2 / 3, 1]),
        ({"max_steps": 3, "max_epochs": 100}, [0, 1 / 3, 2 / 3, 1]),
        ({"max_steps": 100, "max_epochs": 1}, [step / 5 for step in range(6)]),
    ],
    ids=str,
)
def test_progress_goes_from_0_to_1_by_whichever_limit_is_nearest(
    limits: dict[str, Any], expected: list[float], tmp_path: Path
) -> None:
    assert progress_of(tmp_path, **limits) == expected


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        samples = loader("plain_torch").dataset
        return (samples[index] for index in range(8))


def test_of_a_stream_whole_epochs_are_told(tmp_path: Path) -> None:
    stream = DataLoader(Stream(), batch_size=4)
    assert progress_of(tmp_path, stream, max_epochs=2, limit_val_batches=0) == [0, 0, 1 / 2, 1 / 2, 1]


def test_progress_by_the_clock_climbs_to_the_end(tmp_path: Path) -> None:
    seen = progress_of(tmp_path, max_epochs=-1, max_time={"seconds": 1})
    assert seen == sorted(seen)
    assert seen[0] < 0.9
    assert seen[-1] == 1.0


def test_rank_0_tells_the_time_to_all() -> None:
    timer: Any = Timer(duration={"seconds": 100})
    timer._offset = 30.0
    told = []

    def broadcast(fraction: float) -> float:
        told.append(fraction)
        return 0.75

    trainer: Any = SimpleNamespace(
        global_step=0, max_steps=-1, max_epochs=None, callbacks=[timer], strategy=SimpleNamespace(), world_size=1
    )
    assert progress(trainer) == pytest.approx(0.3)
    trainer.strategy, trainer.world_size = SimpleNamespace(broadcast=broadcast), 2
    assert progress(trainer) == 0.75
    assert told == [pytest.approx(0.3)]


def test_a_resumed_run_goes_on_from_its_progress(tmp_path: Path) -> None:
    saved = quiet_trainer(tmp_path, max_epochs=2, callbacks=[save_every_step(tmp_path)], enable_checkpointing=True)
    saved.fit(build("plain_torch"), loader("plain_torch", size=20))
    seen = Progress()
    trainer = quiet_trainer(tmp_path, max_epochs=2, callbacks=[seen])
    trainer.fit(build("plain_torch"), loader("plain_torch", size=20), ckpt_path=tmp_path / "step=7.ckpt")
    assert seen.seen == [0.7, 0.8, 0.9, 1.0]
