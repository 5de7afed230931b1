"""A loader that a checkpoint can resume at the very next batch.

The order of an epoch is a function of (seed, epoch) alone, so the whole state of the loader is its position, the same
on every rank: the epoch, and how many batches were handed out since it began. Nothing is saved of any random generator.
"""

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lit_scale.batches import Plan
from lit_scale.guards import shield_worker
from lit_scale.seeds import derive_seed

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def data_ranks(trainer: "Trainer | None") -> dict[str, int | None]:
    """The ``rank`` and ``world_size`` that a loader of this Trainer should have.

    Under tensor parallelism the ranks of a group work on the same samples, which only the strategy knows.

    Args:
        trainer: A Trainer that has set up its strategy, or None.

    Returns:
        Keyword arguments for `ResumableLoader`; both None where `torch.distributed` is to be asked.
    """
    known = trainer.distributed_sampler_kwargs if trainer is not None else None
    known = known or {}
    return {"rank": known.get("rank"), "world_size": known.get("num_replicas")}


class EpochSampler(DistributedSampler[Any]):
    """The keys of one rank in one epoch: every ``world_size``-th of a permutation that all ranks share.

    Lightning leaves a `DistributedSampler` as it is, which is why this is one. Rank and world size are looked up when
    they are needed, so a loader can be built before the process group.

    Args:
        dataset: A dataset with a length. If it has a true attribute ``epochwise``, keys are ``(epoch, index)``.
        shuffle: A new permutation each epoch, otherwise the order of the dataset.
        seed: Of the permutations.
        drop_last: Leave out the up to ``world_size - 1`` samples that do not divide evenly, otherwise repeat as many
            from the front, so that all ranks take equally many.
        rank: Of this process; None asks the process group.
        world_size: How many processes share the data; None asks the process group.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        if (rank is None) != (world_size is None):
            raise ValueError(f"rank={rank} and world_size={world_size}: give both, or neither to ask torch.distributed")
        self._given = None if rank is None or world_size is None else (rank, world_size)
        rank, world_size = self._placement()
        super().__init__(dataset, world_size, rank, shuffle=shuffle, seed=seed, drop_last=drop_last)
        self.epochwise = bool(getattr(dataset, "epochwise", False))
        self.start = 0  # samples of this rank to pass over, once
        self.requested: int | None = None  # what set_epoch asked for and no iteration has taken up yet

    def _placement(self) -> tuple[int, int]:
        if self._given is not None:
            return self._given
        if dist.is_available() and dist.is_initialized():
            return dist.get_rank(), dist.get_world_size()
        return 0, 1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = self.requested = epoch

    def __len__(self) -> int:
        self.rank, self.num_replicas = self._placement()
        size = len(self.dataset)  # type: ignore[arg-type]
        return size // self.num_replicas if self.drop_last else -(-size // self.num_replicas)

    def order(self, epoch: int) -> Tensor:
        """The samples of this rank in an epoch, in order."""
        self.num_samples = len(self)
        self.total_size = self.num_samples * self.num_replicas
        size = len(self.dataset)  # type: ignore[arg-type]
        if self.shuffle:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch))
            order = torch.randperm(size, generator=generator)
        else:
            order = torch.arange(size)
        if self.total_size > size:
            order = order.repeat(-(-self.total_size // size))
        # Rank r takes r, r + W, ...: W ranks together take a batch of the shared order, so that a run resumed on
        # another number of ranks with the same global batch goes on with the same samples.
        return order[self.rank : self.total_size : self.num_replicas]

    def __iter__(self) -> Iterator[Any]:
        epoch = self.epoch
        for part in self.order(epoch)[self.start :].split(4096):  # lists of integers are large: as they are needed
            for index in part.tolist():
                yield (epoch, index) if self.epochwise else index


class _PlannedBatches:
    """Keys of batches whose sizes a plan tells; one iteration is what ``numbers`` says."""

    def __init__(self, loader: "ResumableLoader") -> None:
        self.loader = loader
        self.numbers = range(0)

    def __len__(self) -> int:
        return len(self.loader.sampler) // (self.loader.batch_size or 1)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[list[tuple[int, int, int | None]]]:
        numbers, loader = self.numbers, self.loader
        usual = loader.batch_size or 1
        plan = loader.plan or (lambda number: (None, usual))
        per_epoch = len(self) * usual  # the rest is dropped, as it is without a plan
        done = sum(plan(number)[1] for number in range(numbers.start))
        epoch, order = -1, torch.empty(0)
        for number in numbers:
            size, samples = plan(number)
            keys = []
            for position in range(done, done + samples):
                if position // per_epoch != epoch:
                    epoch = position // per_epoch
                    order = loader.sampler.order(epoch)  # type: ignore[attr-defined]
                keys.append((epoch, int(order[position % per_epoch]), size))
            done += samples
            yield keys


class ResumableLoader(DataLoader[Any]):
    """A `DataLoader` over a map dataset that resumes exactly, with or without workers, on one rank or many.

    ``load_state_dict`` makes the next iteration go on with the very next batch; when the saved epoch was complete,
    with the first of the following one. Lightning saves and restores the state by itself.

    Each iteration is one epoch, and the next one follows it. A shuffled loader is a stream of epochs: where a Trainer
    begins a new epoch before this one is through (max_steps, limit_train_batches), it goes on with the very next
    batch. One that is not shuffled begins from the front, as validation should. (Lightning returns no state to a
    loader when it resumes from a checkpoint of ``on_train_epoch_end`` without max_steps: the epoch that it tells is
    then begun from the front. `TextDataModule` keeps the position itself.)

    Work starts with the first ``next``, not with ``iter``: Lightning calls ``iter`` before it tells the epoch, and
    workers that start then would repeat the order of epoch 0 (Lightning #21938). Neither draws from the global
    generators.

    A dataset that sets ``epochwise = True`` is asked for keys ``(epoch, index)`` and so can make augmentation or
    masking a function of (seed, epoch, index), in workers too. If it defines ``__getitems__(keys)``, it is asked for
    a whole batch at once. If it also sets ``sized = True`` and has a ``full_size``, keys are ``(epoch, index, size)``,
    the size being what ``plan`` says of the batch, or None for full size. As the size travels with the key, workers
    make the right one however far ahead they are, and so does a resumed run.

    Attributes:
        plan: Size and number of samples of each batch; None for ``batch_size`` samples of full size. With batches of
            other numbers an epoch of the loader is as many batches as ever, but another share of the data: the
            samples are then one endless stream of permutations.

    Args:
        dataset: A dataset with a length.
        batch_size: Samples per batch and rank.
        shuffle: A new permutation each epoch.
        seed: Of the order, the same on all ranks.
        drop_last: Full batches only.
        rank: Of this process; None asks `torch.distributed` when the iteration starts.
        world_size: How many processes share the data, given along with ``rank``.
        kwargs: Anything else that `DataLoader` takes. A ``sampler`` or ``batch_sampler`` given here (Lightning does
            so for ``predict`` and ``overfit_batches``) replaces the order, and keys are then what it yields.

    Raises:
        ValueError: The dataset is empty, or too small for one batch on each rank.

    Example:
        >>> loader = ResumableLoader(range(10), batch_size=4, shuffle=True)
        >>> batches = iter(loader)
        >>> _, state, rest = next(batches), loader.state_dict(), [batch.tolist() for batch in batches]
        >>> loader.load_state_dict(state)
        >>> [batch.tolist() for batch in loader] == rest
        True
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int = 1,
        *,
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        if len(dataset) == 0:  # type: ignore[arg-type]
            raise ValueError("the dataset is empty: a loader needs at least one sample")
        if kwargs.get("batch_sampler") is None:
            kwargs |= {"batch_size": batch_size, "drop_last": drop_last}
            if kwargs.get("sampler") is None:
                kwargs["sampler"] = EpochSampler(
                    dataset, shuffle=shuffle, seed=seed, drop_last=drop_last, rank=rank, world_size=world_size
                )
        if kwargs.get("worker_init_fn") is None:
            kwargs["worker_init_fn"] = shield_worker  # so that a signal to the whole group leaves the main process time
        kwargs.setdefault("generator", torch.Generator())  # without one, each `iter` draws from the global generator
        super().__init__(dataset, **kwargs)
        self.seed = seed
        self._position = 0  # batches handed out since epoch 0 began
        self._pass = 0, 0  # where the last iteration began, and where it was to end
        self._told: int | None = None  # the epoch that a Trainer told last
        self._planned: _PlannedBatches | None = None
        self._loaded = False  # the position is from a checkpoint, and no iteration has started since
        self.plan: Plan | None = None
        if getattr(dataset, "sized", False) and isinstance(self.sampler, EpochSampler):
            if not drop_last:
                raise ValueError("drop_last=False: batches of planned sizes are full ones, so pass drop_last=True")
            self._planned = _PlannedBatches(self)

    def __len__(self) -> int:
        length = super().__len__()
        if length == 0:
            world_size = getattr(self.sampler, "num_replicas", 1)
            raise ValueError(
                f"{len(self.dataset)} samples do not fill one batch of batch_size={self.batch_size} on each of "  # type: ignore[arg-type]
                f"{world_size} rank(s): lower batch_size, or pass drop_last=False"
            )
        return length

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        remaining = self._begin()
        while remaining:
            before = self._position
            for batch in itertools.islice(self._batches(*divmod(before, len(self))), remaining):
                self._position += 1  # before it is handed out: Lightning does not ask beyond the last one
                remaining -= 1
                yield batch
            if self._position == before:  # a foreign sampler that has less than its length
                return

    def _batches(self, epoch: int, done: int) -> Iterator[Any]:
        """The batches of an epoch but for the first ones."""
        if not isinstance(self.sampler, EpochSampler):
            return itertools.islice(super().__iter__(), done, None)
        self.sampler.epoch, self.sampler.start = epoch, done * (self.batch_size or 1)
        if self._planned is not None:
            first = epoch * len(self)
            self._planned.numbers = range(first + done, first + len(self))
        # From this generator come the seeds of the workers, for datasets that use global generators after all.
        self.generator.manual_seed(derive_seed(self.seed, epoch, "workers", self.sampler.rank))
        return super().__iter__()

    @property
    def takes_plan(self) -> bool:
        """Whether ``plan`` has an effect: the dataset is sized, and nothing has replaced the order."""
        return self._planned is not None

    @property
    def _index_sampler(self) -> Any:
        """What torch's iterators take the keys of each batch from."""
        planned = self.__dict__.get("_planned")
        return super()._index_sampler if planned is None else planned

    def _begin(self) -> int:
        """Settle where an iteration starts, and return how many batches it has."""
        length, sampler = len(self), self.sampler
        loaded, self._loaded = self._loaded, False
        told, stream = None, False
        if isinstance(sampler, EpochSampler):
            told, sampler.requested, stream = sampler.requested, None, sampler.shuffle
        if told is not None:
            # Told a later epoch, a stream goes on where it is: an epoch that was cut short (by max_steps or
            # limit_train_batches) has the same successor whether the run was interrupted there or not.
            if loaded:
                goes_on = stream or told <= self._position // length
            else:
                goes_on = stream and self._told is not None and told > self._told
            if not goes_on:
                self._position = told * length
            self._told = told
        elif not loaded and self._position < self._pass[1]:
            self._position = self._pass[0]  # the last iteration was left half way: once more
        # The Trainer counts for itself. Without one, an iteration ends with its epoch.
        remaining = length if self._told is not None else length - self._position % length
        self._pass = self._position, self._position + remaining
        return remaining

    def state_dict(self) -> dict[str, int]:
        """The position: the ``epoch``, how many ``batches`` of it were handed out, and its ``length`` in batches.

        All ranks are at the same position, so that of one will do for all.
        """
        epoch, batches = divmod(self._position, len(self))
        return {"epoch": epoch, "batches": batches, "length": len(self)}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on after this position.

        Args:
            state_dict: What `state_dict` returned; ``length`` may be missing.

        Raises:
            ValueError: It is the state of another kind of loader, or of one with more or fewer batches.
        """
        if not {"epoch", "batches"} <= set(state_dict):
            raise ValueError(
                f"the checkpoint holds the state of another loader (keys {sorted(state_dict)}, without 'epoch' and "
                "'batches'): resume with the loader that it was saved with"
            )
        length = len(self)
        if state_dict.get("length", length) != length:
            raise ValueError(
                f"the checkpoint was saved with {state_dict['length']} batches per epoch, but this loader has "
                f"{length}: resume with the same data and global batch, which is batch_size times the number of ranks"
            )
        self._position = state_dict["epoch"] * length + state_dict["batches"]
        self._pass = self._position, self._position
        self._told, self._loaded = None, True
        if isinstance(self.sampler, EpochSampler):
            self.sampler.requested = None
