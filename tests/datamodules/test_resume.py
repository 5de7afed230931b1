"""The base of resumable data modules, by one that counts: where training goes on, and which data it goes on with."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from lit_scale.datamodules.resume import ResumableDataModule, check_at_least
from tests.support.networks import Reader
from tests.support.training import quiet_trainer

pytestmark = [pytest.mark.filterwarnings("ignore")]


class Counted(Dataset[Any]):
    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitems__(self, keys: list[Any]) -> torch.Tensor:
        return torch.tensor([float(key[1] if isinstance(key, tuple) else key) for key in keys])


class Counting(ResumableDataModule):
    def __init__(self, size: int = 12, batch_size: int = 2, seed: int = 0, num_workers: int = 0) -> None:
        super().__init__(batch_size=batch_size, seed=seed, num_workers=num_workers)
        self.size = size
        self.ready = False

    def setup(self, stage: str | None = None) -> None:
        self.train_set, self.validation_set, self.ready = Counted(self.size), Counted(3), True
        self.go_on()

    def settings(self) -> dict[str, Any] | None:
        return {"size": self.size, "batch_size": self.batch_size, "seed": self.seed} if self.ready else None


def read(data: Counting, steps: int, resume: Path | None = None, save: Path | None = None) -> list[list[float]]:
    reader, trainer = Reader(), quiet_trainer(max_steps=steps)
    trainer.fit(reader, data, ckpt_path=resume)
    if save is not None:
        trainer.save_checkpoint(save)
    return [batch.tolist() for batch in reader.seen]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [1, 5, 6, 7])
def test_training_goes_on_with_the_very_next_batch(stop: int, workers: int, tmp_path: Path) -> None:
    whole = read(Counting(), 15)
    assert [sorted(sum(whole[first : first + 6], [])) for first in (0, 6)] == [list(map(float, range(12)))] * 2
    assert whole[:6] != whole[6:12]  # in another order
    assert read(Counting(num_workers=workers), stop, save=tmp_path / "x.ckpt") == whole[:stop]
    assert read(Counting(num_workers=workers), 15, resume=tmp_path / "x.ckpt") == whole[stop:]


@pytest.mark.parametrize("change", [{"size": 14}, {"batch_size": 3}, {"seed": 1}], ids=str)
def test_training_does_not_go_on_with_other_data_but_evaluation_may(change: dict[str, int], tmp_path: Path) -> None:
    read(Counting(), 2, save=tmp_path / "x.ckpt")
    ((name, value),) = change.items()
    with pytest.raises(ValueError, match=rf"trained on other data.*: {name} \(was \d+, is {value}\)\. Resume with"):
        read(Counting(**change), 4, resume=tmp_path / "x.ckpt")
    quiet_trainer().validate(Reader(), Counting(**change), ckpt_path=tmp_path / "x.ckpt", verbose=False)


def test_a_state_that_comes_before_the_data_is_compared_once_they_are_there() -> None:
    first = Counting()
    first.setup()
    first.train_dataloader()
    state = first.state_dict()
    late = Counting(seed=1)
    late.load_state_dict(state)
    with pytest.raises(ValueError, match=r"seed \(was 0, is 1\)"):
        late.setup()
    assert Counting().state_dict() == {}


def test_validation_is_in_order_and_whole() -> None:
    data = Counting()
    data.setup()
    assert [batch.tolist() for batch in data.val_dataloader()] == [[0.0, 1.0], [2.0]]
    with pytest.raises(ValueError, match="Counting has no test set; pass test_fraction= or test_source="):
        data.test_dataloader()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size=0: must be at least 1"),
        ({"num_workers": -1}, "num_workers=-1: must be at least 0"),
    ],
)
def test_arguments_below_their_least_value_are_refused(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Counting(**arguments)
    check_at_least(anything=(None, 5))
