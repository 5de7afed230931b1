"""The ledger of a run: number and price of its steps by kind, and the charges that belong to no step."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Trainer

__all__ = ["Key", "Ledger"]

#: The kind of a step, which decides its cost: (name, value) pairs, with the phase (train, validate) first. Entries of a
#: technique are prefixed with its name: ``token_dropping/kept``.
Key = tuple[tuple[str, Any], ...]

_COMMON = ("phase", "samples", "tokens", "update", "plain", "batch")  # in every kind; other entries are techniques'
_FORM = 2  # version of the state's format
_WARM = 2  # number of first timings of a kind that are ignored: allocation, caches


class Ledger:
    """Counts of steps by kind, for the run and by stage, with the prices of the kinds.

    A *stage* comprises the training steps with equal entries of the techniques in their kind. The *curve* has a point
    for each validation, with the counts at that time, so that it can be priced when all prices are known.

    Example:
        >>> ledger, key = Ledger(), (("phase", "train"), ("samples", 4), ("tokens", 64), ("update", True))
        >>> ledger.count(key, step=0)
        >>> ledger.flops[key], ledger.timings[key] = 1000, [0.1, 0.1, 0.3, 0.2, 0.3]
        >>> ledger.charge("growth", 1.5)
        >>> ledger.totals()
        {'steps': 1, 'samples': 4, 'tokens': 64, 'flops': 1000, 'reference_seconds': 1.8}
    """

    def __init__(self) -> None:
        self.counts: dict[Key, int] = {}
        self.flops: dict[Key, int] = {}
        self.skipped: dict[Key, int] = {}  # FLOPs of a step that only kernels for sparse matrices would save, if any
        self.timings: dict[Key, list[float]] = {}  # seconds of steps, measured during the run
        self.waits: dict[Key, list[float]] = {}  # seconds of waiting for a batch, measured during the run
        self.calibrated: dict[Key, float] = {}  # seconds of a step, measured by replay after training
        self.charges: dict[str, tuple[int, float, int]] = {}  # count, seconds and FLOPs, by name
        self.stages: list[dict[str, Any]] = []
        self.curve: list[dict[str, Any]] = []
        self._stage: dict[str, Any] = {}  # the current stage
        self._others: list[dict[str, Any]] = []  # counts of the other ranks, after exchange

    # -- counting -----------------------------------------------------------------------------------------------------

    def count(self, key: Key, step: int) -> None:
        """Count a step of a kind; ``step`` is the optimizer step, stored as the first of a new stage."""
        self.counts[key] = self.counts.get(key, 0) + 1
        if key[0] != ("phase", "train"):
            return
        kind = {name: value for name, value in key if name not in _COMMON or name == "plain"}
        if self._stage.get("kind") != kind:
            known = [stage for stage in self.stages if stage["kind"] == kind]
            self._stage = known[0] if known else {"kind": kind, "first_step": step, "counts": {}, "metrics": {}}
            self.stages += [] if known else [self._stage]
        self._stage["counts"][key] = self._stage["counts"].get(key, 0) + 1

    def charge(self, what: str, seconds: float, flops: int = 0) -> None:
        """Add a charge."""
        times, total, more = self.charges.get(what, (0, 0.0, 0))
        self.charges[what] = (times + 1, total + seconds, more + flops)

    def add_point(self, step: int, metrics: dict[str, float], clocks: dict[str, float]) -> None:
        """Add a validation to the curve, unless there is one for that step, and to the current stage."""
        self._stage["metrics"] = metrics
        if not self.curve or self.curve[-1]["step"] != step:
            counts = {"counts": list(self.counts.items()), "charged": self.charged}
            self.curve.append({"step": step, **counts, **clocks, "metrics": metrics})

    # -- pricing ------------------------------------------------------------------------------------------------------

    @property
    def charged(self) -> tuple[float, int]:
        """Sum of the charges so far: seconds and FLOPs."""
        charges = self.charges.values()
        return sum(seconds for _, seconds, _ in charges), sum(flops for _, _, flops in charges)

    def seconds_each(self, key: Key) -> float:
        """Seconds of a step of a kind: by replay, else the median during the run; plus the median wait for a batch."""
        timings = self.timings.get(key, [])
        timed = timings[_WARM:] or timings
        step = self.calibrated.get(key) or (statistics.median(timed) if timed else 0.0)
        waits = self.waits.get(key, [])
        if key not in self.counts:  # a plain step that was only replayed: use the waits of steps with such batches
            batch = dict(key).get("batch")
            waits = [wait for other, own in self.waits.items() if dict(other).get("batch") == batch for wait in own]
        return step + (statistics.median(waits) if waits else 0.0)

    def price(self, counts: Mapping[Key, int], phase: str = "train") -> dict[str, Any]:
        """Sums over the kinds of step of one phase, without charges."""
        ranks = 1 + len(self._others)
        own = [(key, dict(key), n) for key, n in counts.items() if dict(key)["phase"] == phase]
        return {
            "steps": sum(n for _, kind, n in own if kind["update"]) // ranks,
            "samples": sum(n * kind["samples"] for _, kind, n in own),
            "tokens": sum(n * kind["tokens"] for _, kind, n in own),
            "flops": sum(n * self.flops.get(key, 0) for key, _, n in own),
            "reference_seconds": sum(n * self.seconds_each(key) for key, _, n in own) / ranks,
        }

    def totals(self) -> dict[str, Any]:
        """Steps, samples, tokens, FLOPs and reference seconds of the run so far, charges included."""
        return _with_charges(self.price(self._all_ranks(self.counts)), self.charged)

    # -- ranks --------------------------------------------------------------------------------------------------------

    def exchange(self, trainer: Trainer) -> None:
        """Gather the counts of the other ranks, which may have had batches of other shapes."""
        tally = {
            "counts": self.counts,
            "stages": [stage["counts"] for stage in self.stages],
            "curve": [dict(point["counts"]) for point in self.curve],
            "known": (self.flops, self.skipped, self.timings, self.waits),
        }
        tallies: list[Any] = [None] * trainer.world_size
        dist.all_gather_object(tallies, tally)
        self._others = [other for rank, other in enumerate(tallies) if rank != trainer.global_rank]
        for other in self._others:
            known: list[dict[Key, Any]] = [self.flops, self.skipped, self.timings, self.waits]
            for mine, theirs in zip(known, other["known"], strict=True):
                mine.update({key: value for key, value in theirs.items() if key not in mine})

    def forget_ranks(self) -> None:
        """Discard the counts of other ranks, before training continues."""
        self._others = []

    def _all_ranks(self, counts: Mapping[Key, int], part: str = "", index: int = 0) -> Mapping[Key, int]:
        """Sum over the ranks of the counts of the run, or of a stage or a point of the curve."""
        total = Counter(counts)
        for other in self._others:
            parts = other.get(part, [])
            total.update(parts[index] if index < len(parts) else other["counts"])
        return total

    # -- state and record ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything, as plain values."""
        return {
            "form": _FORM,
            "counts": list(self.counts.items()),
            "flops": list(self.flops.items()),
            "skipped": list(self.skipped.items()),
            "timings": list(self.timings.items()),
            "waits": list(self.waits.items()),
            "calibrated": list(self.calibrated.items()),
            "charges": self.charges,
            "stages": [stage | {"counts": list(stage["counts"].items())} for stage in self.stages],
            "curve": self.curve,
        }

    @staticmethod
    def reads(state_dict: Mapping[str, Any]) -> bool:
        """Whether :meth:`load_state_dict` can read a state; earlier versions used other names in the kinds."""
        return state_dict.get("form") == _FORM

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the counts and prices of a checkpoint."""
        self.counts, self.flops = dict(state_dict["counts"]), dict(state_dict["flops"])
        self.skipped = dict(state_dict["skipped"])
        self.timings, self.waits = dict(state_dict["timings"]), dict(state_dict["waits"])
        self.calibrated = dict(state_dict["calibrated"])
        self.charges, self.curve = dict(state_dict["charges"]), list(state_dict["curve"])
        self.stages = [stage | {"counts": dict(stage["counts"])} for stage in state_dict["stages"]]
        self._stage = self.stages[-1] if self.stages else {}

    def plain_step(self) -> Key | None:
        """The kind of the plain step, the most frequent one if there are several; None if none has a price."""
        kinds = {**dict.fromkeys(self.calibrated, 0), **self.counts}
        plain = [key for key in kinds if _is_plain_step(dict(key)) and self.seconds_each(key) > 0]
        return max(plain, key=lambda key: kinds[key], default=None)

    def in_plain_steps(self) -> dict[str, Any]:
        """The plain step's price, and the cost of the run in plain steps; or the reason why there is none."""
        key = self.plain_step()
        if key is None:
            reason = "the run made no plain step, and its techniques cannot say what one would be"
            if any(_is_plain_step(dict(key)) for key in self.counts):
                reason = "the plain step was never timed: the run is too short"
            nothing = dict.fromkeys(("plain_step_seconds", "plain_step_flops", "cost_in_plain_steps"))
            return {**nothing, "no_plain_step": reason}
        seconds = self.seconds_each(key)
        return {
            "plain_step_seconds": seconds,
            "plain_step_flops": self.flops.get(key, 0),
            "cost_in_plain_steps": self.totals()["reference_seconds"] / seconds,
        }

    def record(self) -> dict[str, Any]:
        """Totals, curve, stages, kinds of step and charges, with prices."""
        curve, charges = [], self.charges
        for index, point in enumerate(self.curve):
            cost = _with_charges(self.price(self._all_ranks(dict(point["counts"]), "curve", index)), point["charged"])
            curve.append({k: v for k, v in point.items() if k not in ("counts", "charged")} | cost)
        counts, totals = self._all_ranks(self.counts), self.totals()
        if self.skipped:
            skipped = sum(n * self.skipped.get(key, 0) for key, n in counts.items())
            totals["sparse_flops"] = totals["flops"] - skipped
        unmade = {key: 0 for key in self.calibrated if key not in counts}  # a plain step that was only replayed
        trained = [key for key in counts if dict(key)["phase"] == "train"]
        return {
            **totals,
            **self.in_plain_steps(),
            "prices": "replay" if trained and all(key in self.calibrated for key in trained) else "run",
            "metrics": self.curve[-1]["metrics"] if self.curve else {},
            "curve": curve,
            "stages": [
                stage["kind"]
                | self.price(self._all_ranks(stage["counts"], "stages", index))
                | {"first_step": stage["first_step"], "metrics": stage["metrics"]}
                for index, stage in enumerate(self.stages)
            ],
            "step_kinds": [
                dict(key)
                | {"count": n, "flops_each": self.flops.get(key, 0), "seconds_each": self.seconds_each(key)}
                | {"price": "replay" if key in self.calibrated else "run"}
                for key, n in (dict(counts) | unmade).items()
            ],
            "charges": {
                what: {"count": n, "seconds": seconds, "flops": flops} for what, (n, seconds, flops) in charges.items()
            },
            "validation": self.price(counts, "validate"),
        }


def _is_plain_step(kind: Mapping[str, Any]) -> bool:
    """Whether a kind is a training step without any technique that includes the optimizer's update."""
    return bool(kind["phase"] == "train" and kind["plain"] and kind["update"])


def _with_charges(cost: dict[str, Any], charged: tuple[float, int]) -> dict[str, Any]:
    seconds, flops = charged
    return cost | {"reference_seconds": cost["reference_seconds"] + seconds, "flops": cost["flops"] + flops}
