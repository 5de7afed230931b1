"""A data loader that resumes from a checkpoint exactly at the next batch.

The order of an epoch is a function of (seed, epoch) alone. The state of the loader is therefore only its position: the
epoch, and the number of batches returned since the epoch began. It is the same on every rank, and no state of a random
generator is saved.
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
    """The ``rank`` and ``world_size`` for a loader of this Trainer.

    Under tensor parallelism the ranks of a group process the same samples, and only the strategy knows the groups.

    Args:
        trainer: A Trainer that has set up its strategy, or None.

    Returns:
        Keyword arguments for `ResumableLoader`; both are None if the loader should use `torch.distributed`.
    """
    known = trainer.distributed_sampler_kwargs if trainer is not None else None
    known = known or {}
    return {"rank": known.get("rank"), "world_size": known.get("num_replicas")}


class EpochSampler(DistributedSampler[Any]):
    """The keys of one rank in one epoch: every ``world_size``-th of a permutation that all ranks share.

    It derives from `DistributedSampler` because Lightning does not replace samplers of that class. Rank and world size
    are looked up when they are needed, so a loader can be built before the process group.

    Args:
        dataset: A dataset with a length. If its attribute ``epochwise`` is true, keys are ``(epoch, index)``.
        shuffle: Whether each epoch has a new permutation; otherwise the order of the dataset.
        seed: Seed of the permutations.
        drop_last: Whether to leave out the up to ``world_size - 1`` samples that do not divide evenly; otherwise
            samples from the front are repeated. All ranks get equally many samples.
        rank: Rank of this process; None asks the process group.
        world_size: Number of processes that share the data; None asks the process group.
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
        self.start = 0  # samples of this rank to skip in the next iteration
        self.requested: int | None = None  # epoch given to set_epoch and not yet used by an iteration

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
        # Rank r takes r, r + W, ...: the W ranks together take consecutive samples of the shared order, so that a run
        # resumed on another number of ranks with the same global batch continues with the same samples.
        return order[self.rank : self.total_size : self.num_replicas]

    def __iter__(self) -> Iterator[Any]:
        epoch = self.epoch
        for part in self.order(epoch)[self.start :].split(4096):  # a list of all integers would take much memory
            for index in part.tolist():
                yield (epoch, index) if self.epochwise else index


class _PlannedBatches:
    """Keys of batches whose sizes a plan gives; one iteration yields the batches of ``numbers``."""

    def __init__(self, loader: "ResumableLoader") -> None:
        self.loader = loader
        self.numbers = range(0)

    def __len__(self) -> int:
        return len(self.loader.sampler) // (self.loader.batch_size or 1)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[list[tuple[int, int, int | None]]]:
        numbers, loader = self.numbers, self.loader
        usual = loader.batch_size or 1
        plan = loader.plan or (lambda number: (None, usual))
        per_epoch = len(self) * usual  # the rest is dropped, as without a plan
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
    """A `DataLoader` over a map-style dataset that resumes exactly, with or without workers, on one rank or many.

    After ``load_state_dict`` the next iteration continues with the next batch, or with the first batch of the following
    epoch if the saved epoch was complete. Lightning saves and restores the state by itself.

    Each iteration is one epoch, and the next iteration is the next epoch. A shuffled loader is a stream of epochs: if a
    Trainer begins a new epoch before the current one is complete (max_steps, limit_train_batches), the loader continues
    with the next batch. A loader that is not shuffled starts from the front, as validation should. (When Lightning
    resumes from a checkpoint of ``on_train_epoch_end`` without max_steps, it does not restore the loader's state, and
    the epoch that it sets starts from the front. `ResumableDataModule` therefore keeps the position itself.)

    Iteration starts with the first ``next``, not with ``iter``: Lightning calls ``iter`` before it sets the epoch, and
    workers started by ``iter`` would repeat the order of epoch 0 (Lightning #21938). Neither call draws from the global
    random generators.

    A dataset that sets ``epochwise = True`` gets keys ``(epoch, index)``, so that augmentation or masking can be a
    function of (seed, epoch, index), in workers too. If it defines ``__getitems__(keys)``, it gets the keys of a whole
    batch at once. If it also sets ``sized = True`` and has a ``full_size``, keys are ``(epoch, index, size)``, where
    size is the one that ``plan`` returns for the batch, or None for full size. Because the size is part of the key,
    workers that are many batches ahead, and resumed runs, use the right one.

    Attributes:
        plan: Function from the number of a batch to its size and number of samples; None for ``batch_size`` samples of
            full size. If a plan changes the number of samples, an epoch of the loader still has the same number of
            batches, but covers another share of the data: the samples then form one endless stream of permutations.

    Args:
        dataset: A dataset with a length.
        batch_size: Samples per batch and rank.
        shuffle: Whether each epoch has a new permutation.
        seed: Seed of the order, the same on all ranks.
        drop_last: Whether to leave out the last batch of an epoch if it is not full.
        rank: Rank of this process; None asks `torch.distributed` when the iteration starts.
        world_size: Number of processes that share the data; give it together with ``rank``.
        kwargs: Other arguments of `DataLoader`. A ``sampler`` or ``batch_sampler`` given here (Lightning does so for
            ``predict`` and ``overfit_batches``) replaces the order; the keys are then those that it yields.

    Raises:
        ValueError: If the dataset is empty or too small for one batch on each rank, only one of ``rank`` and
            ``world_size`` is given, or the dataset is ``sized`` and ``drop_last`` is false.

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
            kwargs["worker_init_fn"] = shield_worker  # so that workers survive a signal to the process group
        kwargs.setdefault("generator", torch.Generator())  # without one, each `iter` draws from the global generator
        super().__init__(dataset, **kwargs)
        self.seed = seed
        self._position = 0  # batches returned since epoch 0 began
        self._pass = 0, 0  # begin and planned end of the last iteration
        self._told: int | None = None  # the epoch that a Trainer set last
        self._planned: _PlannedBatches | None = None
        self._loaded = False  # whether the position is from a checkpoint and no iteration has started since
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
                self._position += 1  # before the yield, because Lightning does not call next after the last batch
                remaining -= 1
                yield batch
            if self._position == before:  # a given sampler that yields less than its length
                return

    def _batches(self, epoch: int, done: int) -> Iterator[Any]:
        """The batches of an epoch without the first ``done``."""
        if not isinstance(self.sampler, EpochSampler):
            return itertools.islice(super().__iter__(), done, None)
        self.sampler.epoch, self.sampler.start = epoch, done * (self.batch_size or 1)
        if self._planned is not None:
            first = epoch * len(self)
            self._planned.numbers = range(first + done, first + len(self))
        # Workers get their seeds from this generator, for datasets that use global generators nevertheless.
        self.generator.manual_seed(derive_seed(self.seed, epoch, "workers", self.sampler.rank))
        return super().__iter__()

    @property
    def takes_plan(self) -> bool:
        """Whether ``plan`` has an effect: the dataset is sized, and no other sampler was given."""
        return self._planned is not None

    @property
    def _index_sampler(self) -> Any:
        """The object from which torch's iterators take the keys of each batch."""
        planned = self.__dict__.get("_planned")
        return super()._index_sampler if planned is None else planned

    def _begin(self) -> int:
        """Set the position at which an iteration starts, and return its number of batches."""
        length, sampler = len(self), self.sampler
        loaded, self._loaded = self._loaded, False
        told, stream = None, False
        if isinstance(sampler, EpochSampler):
            told, sampler.requested, stream = sampler.requested, None, sampler.shuffle
        if told is not None:
            # If the Trainer set a later epoch, a stream continues at its position: after an epoch that was cut short
            # (by max_steps or limit_train_batches), an interrupted run gets the same batches as one that was not.
            if loaded:
                goes_on = stream or told <= self._position // length
            else:
                goes_on = stream and self._told is not None and told > self._told
            if not goes_on:
                self._position = told * length
            self._told = told
        elif not loaded and self._position < self._pass[1]:
            self._position = self._pass[0]  # the last iteration was not finished: repeat it
        # A Trainer counts the batches itself. Without one, an iteration ends with its epoch.
        remaining = length if self._told is not None else length - self._position % length
        self._pass = self._position, self._position + remaining
        return remaining

    def state_dict(self) -> dict[str, int]:
        """The position: the ``epoch``, the number of its ``batches`` that were returned, and its ``length`` in batches.

        All ranks have the same position, so the state of one rank is valid for all.
        """
        epoch, batches = divmod(self._position, len(self))
        return {"epoch": epoch, "batches": batches, "length": len(self)}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue after this position.

        Args:
            state_dict: A return value of `state_dict`; ``length`` may be missing.

        Raises:
            ValueError: If it is the state of another kind of loader, or of one with another number of batches.
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
