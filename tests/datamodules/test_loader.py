import itertools
import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import DataLoader, Dataset

import tests.support.training as support
from lit_scale.datamodules.loader import ResumableLoader, data_ranks
from lit_scale.seeds import derive_seed

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*dataloader is not resumable.*"),
]

RunPython = Callable[..., CompletedProcess[str]]


class Keys(Dataset[torch.Tensor]):
    """Samples that are their own keys, (epoch, index)."""

    epochwise = True

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, key: tuple[int, int] | int) -> torch.Tensor:
        return torch.tensor(key if isinstance(key, tuple) else (-1, key))


class Plain(Keys):
    epochwise = False


def batches(loader: Any) -> list[Any]:
    return [batch.tolist() for batch in loader]


def epochs(loader: ResumableLoader, number: int) -> list[Any]:
    return [batch for _ in range(number) for batch in batches(loader)]


# ---- order


def test_each_epoch_is_another_permutation_and_a_function_of_the_seed() -> None:
    def orders(seed: int) -> list[list[int]]:
        loader = ResumableLoader(Keys(50), 7, shuffle=True, seed=seed)
        return [[index for batch in batches(loader) for _, index in batch] for _ in range(3)]

    first, other = orders(0), orders(1)
    assert all(sorted(order) == list(range(50)) for order in first + other)
    assert len({tuple(order) for order in [*first, *other, list(range(50))]}) == 7
    assert orders(0) == first


def test_keys_carry_the_epoch_only_for_datasets_that_ask() -> None:
    loader = ResumableLoader(Keys(4), 4)
    assert [batches(loader), batches(loader)] == [[[[e, i] for i in range(4)]] for e in range(2)]
    assert batches(ResumableLoader(Plain(4), 4)) == [[[-1, i] for i in range(4)]]


@pytest.mark.parametrize("world_size", [2, 3, 5])
@pytest.mark.parametrize("size", [30, 31, 34])
@pytest.mark.parametrize("shuffle", [True, False])
def test_ranks_share_the_data(world_size: int, size: int, shuffle: bool) -> None:
    def parts(drop_last: bool) -> list[list[int]]:
        return [
            [
                index
                for batch in ResumableLoader(
                    Plain(size), 2, shuffle=shuffle, drop_last=drop_last, rank=rank, world_size=world_size
                )
                for _, index in batch.tolist()
            ]
            for rank in range(world_size)
        ]

    padded = parts(drop_last=False)
    assert {len(part) for part in padded} == {-(-size // world_size)}
    assert set(itertools.chain(*padded)) == set(range(size))
    assert sum(map(len, padded)) - size < world_size  # no more duplicates than equal counts need

    disjoint = parts(drop_last=True)
    assert {len(part) for part in disjoint} == {size // world_size // 2 * 2}
    assert len(set(itertools.chain(*disjoint))) == sum(map(len, disjoint))


def test_the_global_batch_does_not_depend_on_the_number_of_ranks() -> None:
    alone = [{i for _, i in batch} for batch in batches(ResumableLoader(Keys(48), 8, shuffle=True))]
    ranks = [batches(ResumableLoader(Keys(48), 4, shuffle=True, rank=rank, world_size=2)) for rank in (0, 1)]
    assert [{i for _, i in [*one, *two]} for one, two in zip(*ranks, strict=True)] == alone


def test_more_ranks_than_samples() -> None:
    parts = [batches(ResumableLoader(Plain(2), 2, rank=rank, world_size=5)) for rank in range(5)]
    assert parts == [[[[-1, rank % 2]]] for rank in range(5)]


def test_a_whole_batch_is_asked_for_at_once_where_the_dataset_can() -> None:
    class Vectorised(Keys):
        def __getitems__(self, keys: list[tuple[int, int]]) -> torch.Tensor:
            return torch.tensor(keys)

    def identity(batch: torch.Tensor) -> torch.Tensor:
        return batch

    fast = ResumableLoader(Vectorised(10), 3, shuffle=True, collate_fn=identity)
    assert batches(fast) == batches(ResumableLoader(Keys(10), 3, shuffle=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_global_generator_is_left_alone(workers: int) -> None:
    loader = ResumableLoader(Keys(6), 2, shuffle=True, num_workers=workers)
    before = torch.get_rng_state()
    batches(loader)
    assert torch.equal(torch.get_rng_state(), before)

    batches(DataLoader(Keys(6), 2))  # the control
    assert not torch.equal(torch.get_rng_state(), before)


class Noise(Keys):
    """A dataset that draws from the global generator of its worker, as many do."""

    def __getitem__(self, key: Any) -> torch.Tensor:
        return torch.rand(1)


def test_seeds_of_workers_are_a_function_of_the_epoch_and_the_rank() -> None:
    def draw(epoch: int, **place: Any) -> list[Any]:
        loader = ResumableLoader(Noise(4), 2, num_workers=2, **place)
        loader.load_state_dict({"epoch": epoch, "batches": 0})
        return batches(loader)

    second = draw(1)
    assert second == draw(1)
    assert second != draw(0)
    assert draw(1, rank=0, world_size=2) != draw(1, rank=1, world_size=2)


def test_derived_seeds() -> None:
    seeds = {derive_seed(seed, epoch) for seed in range(30) for epoch in range(30)}
    assert len(seeds) == 900
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(0, 1) == 7359998640416684799  # the same on every machine and in every version


# ---- state


@pytest.mark.parametrize("drop_last", [True, False])
def test_resumes_at_every_batch_of_three_epochs(drop_last: bool) -> None:
    def new() -> ResumableLoader:
        return ResumableLoader(Keys(11), 3, shuffle=True, drop_last=drop_last)

    loader, states, full = new(), [new().state_dict()], []
    for _ in range(3):
        for batch in loader:
            full.append(batch.tolist())
            states.append(loader.state_dict())
    per_epoch = len(loader)
    assert len(full) == 3 * per_epoch == 3 * (3 if drop_last else 4)
    assert states[1] == {"epoch": 0, "batches": 1, "length": per_epoch}
    for done, state in enumerate(states):
        resumed = new()
        resumed.load_state_dict(json.loads(json.dumps(state)))
        assert resumed.state_dict() == state
        rest = full[done:]
        assert epochs(resumed, 3)[: len(rest)] == rest


@pytest.mark.parametrize("persistent", [True, False])
def test_resumes_with_workers(persistent: bool) -> None:
    def new() -> ResumableLoader:
        return ResumableLoader(Keys(11), 3, shuffle=True, num_workers=2, persistent_workers=persistent)

    full = epochs(ResumableLoader(Keys(11), 3, shuffle=True), 3)
    assert epochs(new(), 3) == full
    for epoch, done in ((0, 1), (0, 4), (1, 3)):
        resumed = new()
        resumed.load_state_dict({"epoch": epoch, "batches": done})
        rest = full[epoch * 4 + done :]
        assert epochs(resumed, 2) == rest[: 8 - done % 4]


def test_prefetched_batches_do_not_count() -> None:
    loader = ResumableLoader(Keys(40), 2, num_workers=2, prefetch_factor=4)
    next(iter(loader))
    assert loader.state_dict() == {"epoch": 0, "batches": 1, "length": 20}


def test_an_iteration_that_was_left_starts_the_epoch_again() -> None:
    loader = ResumableLoader(Keys(11), 3, shuffle=True)
    full = batches(loader)
    assert next(iter(loader)).tolist() != full[0]
    again = batches(loader)
    assert {epoch for batch in again for epoch, _ in batch} == {1}
    assert len(again) == len(full)


def tell_epoch(loader: Any, epoch: int) -> None:
    """As Lightning does."""
    loader.sampler.set_epoch(epoch)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_set_after_iter_counts(workers: int) -> None:
    """Lightning calls `iter` first and tells the epoch after (its bug 21938)."""
    loader = ResumableLoader(Keys(4), 4, num_workers=workers)
    iterator = iter(loader)
    tell_epoch(loader, 5)
    assert next(iterator).tolist() == [[5, index] for index in range(4)]


@pytest.mark.parametrize(
    ("state", "told", "in_order", "shuffled"),
    [
        ((2, 3), None, (2, 3), (2, 3)),
        ((2, 3), 2, (2, 3), (2, 3)),  # the Trainer tells the epoch that it resumes
        ((2, 3), 3, (3, 0), (2, 3)),  # the Trainer had ended the epoch early
        ((2, 4), 2, (3, 0), (3, 0)),  # it has not counted the epoch yet
        ((2, 4), 3, (3, 0), (3, 0)),
        ((2, 0), 2, (2, 0), (2, 0)),
    ],
)
def test_state_and_epoch_together(
    state: tuple[int, int], told: int | None, in_order: tuple[int, int], shuffled: tuple[int, int]
) -> None:
    for shuffle, position in ((False, in_order), (True, shuffled)):
        orders = epochs(ResumableLoader(Keys(8), 2, shuffle=shuffle), 4)
        loader = ResumableLoader(Keys(8), 2, shuffle=shuffle)
        tell_epoch(loader, 7)  # told before, and overruled by the state
        loader.load_state_dict(dict(zip(("epoch", "batches"), state, strict=True)))
        if told is not None:
            tell_epoch(loader, told)
        iter(loader)  # not used: Lightning does this too
        assert next(iter(loader)).tolist() == orders[4 * position[0] + position[1]]


def test_a_trainer_that_ends_epochs_early_sees_all_samples() -> None:
    loader = ResumableLoader(Keys(12), 2, shuffle=True)
    expected = epochs(ResumableLoader(Keys(12), 2, shuffle=True), 2)
    seen: list[Any] = []
    for epoch in range(3):  # four batches of six
        tell_epoch(loader, epoch)
        seen += [batch.tolist() for batch in itertools.islice(loader, 4)]
    assert seen == expected
    tell_epoch(loader, 0)  # a new run
    assert next(iter(loader)).tolist() == expected[0]


def test_validation_begins_from_the_front() -> None:
    loader = ResumableLoader(Plain(12), 2)
    for epoch in (0, 0, 1):
        tell_epoch(loader, epoch)
        iterator = iter(loader)
        assert [next(iterator).tolist() for _ in range(3)] == [[[-1, 2 * i], [-1, 2 * i + 1]] for i in range(3)]


# ---- under a Trainer


class Recorder(LightningModule):
    """Learns nothing; keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.seen: list[Any] = []

    def training_step(self, batch: torch.Tensor) -> torch.Tensor:
        self.seen.append(batch.tolist())
        return self.layer(batch.float()).sum()

    def validation_step(self, batch: torch.Tensor) -> None: ...

    def predict_step(self, batch: torch.Tensor) -> torch.Tensor:
        return batch

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-3)


class SaveAt(Callback):
    """Saves in every hook in which checkpoints are saved."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.saved: dict[Path, int] = {}

    def _save(self, trainer: Trainer, module: Recorder, hook: str) -> None:
        if trainer.sanity_checking:
            return
        path = self.folder / f"{len(module.seen)}-{hook}.ckpt"
        trainer.save_checkpoint(path)
        self.saved[path] = len(module.seen)

    def on_train_batch_end(self, trainer: Trainer, module: Any, *_: Any) -> None:
        self._save(trainer, module, "train_batch_end")

    def on_validation_end(self, trainer: Trainer, module: Any) -> None:
        self._save(trainer, module, "validation_end")

    def on_train_epoch_end(self, trainer: Trainer, module: Any) -> None:
        self._save(trainer, module, "train_epoch_end")


def quiet_trainer(**settings: Any) -> Trainer:
    settings = {"max_epochs": 3, "accelerator": "cpu", "devices": 1} | settings
    return support.quiet_trainer(num_sanity_val_steps=2, use_distributed_sampler=True, **settings)


def fit(loader: Any, ckpt_path: Path | None = None, recorder: type[Recorder] = Recorder, **settings: Any) -> list[Any]:
    module = recorder()
    quiet_trainer(**settings).fit(module, loader, DataLoader(Plain(2)), ckpt_path=ckpt_path)
    return module.seen


def resumes_exactly(folder: Path, loader: Callable[[], Any], step: int = 1, **settings: Any) -> dict[str, bool]:
    """By checkpoint: did the rest of the run see the same batches? ``step`` thins out the checkpoints."""
    save = SaveAt(folder)
    full = fit(loader(), callbacks=[save], **settings)
    chosen = [(path, done) for path, done in save.saved.items() if "batch_end" not in path.name or done % step == 0]
    assert chosen
    torch.manual_seed(len(chosen))  # what comes next must not depend on the global generator
    return {path.name: fit(loader(), path, **settings) == full[done:] for path, done in chosen}


def returned(checkpoint: str) -> bool:
    """Lightning returns no state to loaders where the epoch is complete and only epochs limit the run.

    Whole epochs of one loader are exact all the same.
    """
    return "train_epoch_end" not in checkpoint


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("settings", [{}, {"limit_train_batches": 4}, {"val_check_interval": 2}], ids=str)
def test_lightning_resumes_exactly(tmp_path: Path, workers: int, settings: dict[str, Any]) -> None:
    def loader() -> ResumableLoader:
        return ResumableLoader(Keys(22), 4, shuffle=True, num_workers=workers, persistent_workers=workers > 0)

    # six batches an epoch, or four: with workers only the first batches, the middles and the ends
    result = resumes_exactly(tmp_path, loader, step=2 if workers else 1, **settings)
    if "limit_train_batches" in settings:
        result = {name: exact for name, exact in result.items() if returned(name)}
    assert len(result) > 8
    assert all(result.values()), result


@pytest.mark.parametrize(
    "settings", [{"reload_dataloaders_every_n_epochs": 1}, {"accumulate_grad_batches": 2}], ids=str
)
def test_lightning_resumes_two_loaders_exactly(tmp_path: Path, settings: dict[str, Any]) -> None:
    """The shorter one begins its next epoch within an epoch of the Trainer."""

    class Pair(CombinedLoader):
        def __init__(self) -> None:
            loaders = [ResumableLoader(Keys(size), 4, shuffle=True, seed=size) for size in (22, 10)]
            super().__init__(loaders, "max_size_cycle")

    class PairRecorder(Recorder):
        def training_step(self, batch: Any) -> torch.Tensor:
            self.seen.append([part.tolist() for part in batch])
            return self.layer(batch[0].float()).sum()

    result = resumes_exactly(tmp_path, Pair, recorder=PairRecorder, **settings)
    assert all(exact for name, exact in result.items() if returned(name) or "max_steps" in settings)


@pytest.mark.parametrize("workers", [0, 2])
def test_lightning_resumes_what_max_steps_ended(tmp_path: Path, workers: int) -> None:
    """Lightning counts the epoch as complete then; the batches that it did not see come next all the same."""

    def loader() -> ResumableLoader:
        return ResumableLoader(Keys(22), 4, shuffle=True, num_workers=workers)

    full = fit(loader(), max_epochs=-1, max_steps=18)
    for steps in (1, 5, 6, 7, 13):
        trainer, module = quiet_trainer(max_epochs=-1, max_steps=steps), Recorder()
        trainer.fit(module, loader())
        trainer.save_checkpoint(tmp_path / "x.ckpt")
        assert module.seen == full[:steps]
        assert fit(loader(), tmp_path / "x.ckpt", max_epochs=-1, max_steps=18) == full[steps:]


def test_plain_loader_does_not_resume(tmp_path: Path) -> None:
    """The control: the comparison above can tell."""
    torch.manual_seed(0)
    result = resumes_exactly(tmp_path, lambda: DataLoader(Plain(22), 4, shuffle=True))
    assert result.pop("18-train_batch_end.ckpt")  # nothing is left to see
    for hook in ("train_epoch_end", "validation_end"):
        result.pop(f"18-{hook}.ckpt")
    assert not any(result.values())


def test_lightning_epochs_are_those_of_the_loader() -> None:
    seen = fit(ResumableLoader(Keys(22), 4, shuffle=True))
    assert seen == epochs(ResumableLoader(Keys(22), 4, shuffle=True), 3)
    assert [batch[0][0] for batch in seen] == [0] * 6 + [1] * 6 + [2] * 6


def test_lightning_trains_on(tmp_path: Path) -> None:
    """A second `fit` of the same Trainer takes up the next epoch."""
    trainer, module, loader = quiet_trainer(max_epochs=1), Recorder(), ResumableLoader(Keys(8), 4, shuffle=True)
    trainer.fit(module, loader)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, loader)
    assert module.seen == epochs(ResumableLoader(Keys(8), 4, shuffle=True), 3)


def test_lightning_may_replace_the_order() -> None:
    seen = fit(ResumableLoader(Keys(22), 4, shuffle=True), overfit_batches=2, max_epochs=2)
    assert seen == [[[-1, i] for i in range(4)], [[-1, i] for i in range(4, 8)]] * 2

    loader = ResumableLoader(Keys(10), 4, shuffle=False)
    predictions: Any = quiet_trainer().predict(Recorder(), loader)
    assert predictions is not None
    assert [i for batch in predictions for _, i in batch.tolist()] == list(range(10))


def test_replaced_order_resumes() -> None:
    loader = ResumableLoader(Plain(6), 2, sampler=[5, 3, 1, 0, 2, 4])
    loader.load_state_dict({"epoch": 0, "batches": 1})
    assert batches(loader) == [[[-1, 1], [-1, 0]], [[-1, 2], [-1, 4]]]


# ---- mistakes


def test_empty_dataset() -> None:
    with pytest.raises(ValueError, match="the dataset is empty"):
        ResumableLoader(Keys(0))


def test_too_small_for_one_batch() -> None:
    loader = ResumableLoader(Keys(7), 4, drop_last=True, rank=0, world_size=2)
    with pytest.raises(ValueError, match=r"7 samples do not fill one batch of batch_size=4 on each of 2 rank\(s\)"):
        fit(loader)


def test_rank_without_world_size() -> None:
    with pytest.raises(ValueError, match="rank=1 and world_size=None: give both"):
        ResumableLoader(Keys(7), rank=1)


def test_state_of_another_loader() -> None:
    with pytest.raises(ValueError, match=r"state of another loader \(keys \['_snapshot', 'steps'\]"):
        ResumableLoader(Keys(7)).load_state_dict({"_snapshot": 0, "steps": 1})


def test_state_of_a_longer_loader() -> None:
    state = ResumableLoader(Keys(9)).state_dict()
    with pytest.raises(ValueError, match="saved with 9 batches per epoch, but this loader has 7"):
        ResumableLoader(Keys(7)).load_state_dict(state)


# ---- two processes

DDP_SCRIPT = """
import json, sys, warnings
from pathlib import Path
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import Dataset
from lit_scale.datamodules import ResumableLoader, TextDataModule

warnings.filterwarnings("ignore")

class Keys(Dataset):
    epochwise = True
    def __len__(self):
        return 22
    def __getitem__(self, key):
        return torch.tensor(key)

class Recorder(LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []
    def training_step(self, batch):
        batch = batch if torch.is_tensor(batch) else batch["input_ids"]
        self.seen.append(batch.tolist())
        return self.weight * batch.float().mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-3)

class SaveAt(Callback):
    def on_train_batch_end(self, trainer, module, *_):
        if len(module.seen) in stops:
            trainer.save_checkpoint(folder / f"{len(module.seen)}.ckpt")

def fit(data, ckpt_path=None, callbacks=()):
    trainer = Trainer(
        max_steps=9, accelerator="cpu", devices=2, strategy=DDPStrategy(process_group_backend="gloo"),
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=list(callbacks),
    )
    module = Recorder()
    trainer.fit(module, data(), ckpt_path=ckpt_path)
    return trainer.global_rank, module.seen

def keys(workers):
    return ResumableLoader(Keys(), 3, shuffle=True, drop_last=True, num_workers=workers)

def text(workers):
    return TextDataModule(sys.argv[2], batch_size=4, mask_rate=0, cache_dir=folder / "cache")

if __name__ == "__main__":
    folder, stops = Path(sys.argv[1]), (2, 3)
    for name, data in {"0": lambda: keys(0), "2": lambda: keys(2), "text": lambda: text(0)}.items():
        rank, full = fit(data, callbacks=[SaveAt()])
        resumed = {stop: fit(data, folder / f"{stop}.ckpt")[1] for stop in stops}
        (folder / f"rank{rank}-{name}.json").write_text(json.dumps([full, resumed]))
"""


def test_two_ranks_see_disjoint_batches_and_resume_exactly(
    run_python: RunPython, tiny_corpus: Path, tmp_path: Path
) -> None:
    assert run_python(DDP_SCRIPT, tmp_path, tiny_corpus, timeout=240).returncode == 0
    for name in ("0", "2", "text"):
        (full, resumed), (other, other_resumed) = (
            json.loads((tmp_path / f"rank{rank}-{name}.json").read_text()) for rank in (0, 1)
        )
        assert len(full) == len(other) == 9
        for stop in (2, 3):
            assert resumed[str(stop)] == full[stop:]
            assert other_resumed[str(stop)] == other[stop:]
        # 22 samples on 2 ranks are 11 each, in three batches of three per epoch; the text has more than nine batches
        for epoch in range(1 if name == "text" else 3):
            one, two = (
                [tuple(row) for batch in part[3 * epoch : 3 * epoch + 3] for row in batch] for part in (full, other)
            )
            assert len({*one, *two}) == len(one) + len(two)
            if name == "text":
                continue
            assert {number for number, _ in [*one, *two]} == {epoch}
            shared = ResumableLoader(Keys(22), 6, shuffle=True)
            shared.load_state_dict({"epoch": epoch, "batches": 0})
            assert {index for _, index in [*one, *two]} == {i for batch in batches(shared)[:3] for _, i in batch}


def test_ranks_come_from_the_trainer() -> None:
    assert data_ranks(None) == data_ranks(quiet_trainer()) == {"rank": None, "world_size": None}

    class Parallel:
        distributed_sampler_kwargs = {"num_replicas": 4, "rank": 3}

    assert data_ranks(Parallel()) == {"rank": 3, "world_size": 4}  # type: ignore[arg-type]


# ---- planned sizes


class Sized(Keys):
    """Samples that are their keys, (epoch, index, size), with 0 for full size."""

    sized, full_size = True, 8

    def __getitem__(self, key: Any) -> torch.Tensor:
        epoch, index, size = key
        return torch.tensor([epoch, index, size or 0])


def by_stages(number: int) -> tuple[int | None, int]:
    """Five batches of 12 small samples, then 3 of 6, then 3 full ones."""
    return (2, 12) if number < 5 else (4, 6) if number < 8 else (None, 3)


def planned(plan: Any = by_stages, **options: Any) -> ResumableLoader:
    loader = ResumableLoader(Sized(20), 3, shuffle=True, seed=3, drop_last=True, **options)
    loader.plan = plan
    return loader


def test_without_a_plan_a_sized_dataset_has_the_order_of_any_other() -> None:
    usual = ResumableLoader(Keys(20), 3, shuffle=True, seed=3, drop_last=True)
    assert [[key[:2] for key in batch] for batch in epochs(planned(None), 3)] == epochs(usual, 3)


def test_a_plan_gives_each_batch_its_size_and_its_number_of_samples() -> None:
    found = epochs(planned(), 2)
    assert len(found) == 12
    for number, batch in enumerate(found):
        size, samples = by_stages(number)
        assert len(batch) == samples
        assert {key[2] for key in batch} == {size or 0}


def test_a_plan_changes_no_sample_and_leaves_none_out() -> None:
    """The samples of large batches are those of as many small ones, one after the other."""
    taken = [tuple(key[:2]) for batch in epochs(planned(), 2) for key in batch]
    stream = [
        tuple(key)
        for batch in epochs(ResumableLoader(Keys(20), 3, shuffle=True, seed=3, drop_last=True), 6)
        for key in batch
    ]
    assert taken == stream[: len(taken)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [0, 4, 5, 6, 9])
def test_a_planned_loader_resumes_with_the_very_next_batch(stop: int, workers: int) -> None:
    options = {"num_workers": workers, "persistent_workers": workers > 0}
    whole = epochs(planned(), 2)
    first = planned(**options)
    taken = []
    batches_of = (batch for _ in range(2) for batch in first)
    taken = [next(batches_of).tolist() for _ in range(stop)]
    second = planned(**options)
    second.load_state_dict(first.state_dict())
    rest = [batch.tolist() for _ in range(2) for batch in second]
    assert taken + rest[: 12 - stop] == whole


def test_planned_batches_of_two_ranks_are_disjoint_and_alike_in_size() -> None:
    ranks = [epochs(planned(rank=rank, world_size=2), 2) for rank in range(2)]
    for one, other in zip(*ranks, strict=True):
        assert len(one) == len(other)
        assert {key[2] for key in one} == {key[2] for key in other}
        assert not {tuple(key) for key in one} & {tuple(key) for key in other}


def test_planned_batches_are_full_ones() -> None:
    with pytest.raises(ValueError, match="drop_last=False: .* pass drop_last=True"):
        ResumableLoader(Sized(20), 3)
