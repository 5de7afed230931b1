"""The clock: the cost of a run in FLOPs and in reference seconds, which do not depend on the load of the machine.

    reference seconds = sum over kinds of step (count x median seconds of a replayed step) + charges

Steps of equal cost have the same *kind*: the sizes of the batch and the entries of each technique, such as the number
of active blocks. FLOPs of a kind are counted once, by torch's FlopCounterMode. Its seconds are measured after training:
all kinds are replayed in turn for several rounds, and the median is taken. Because the kinds alternate, disturbances of
the machine affect all of them alike. The step without any technique is replayed even if the run made none, so that runs
have a common unit. (Kaddour et al. 2023, section 3, call a fixed price per step Reference System Time.)
"""

from __future__ import annotations

import os
import resource
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.flop_counter import FlopCounterMode

from lit_scale.batches import tensors
from lit_scale.cost.ledger import Key, Ledger
from lit_scale.cost.record import hardware, versions, write_json
from lit_scale.cost.replay import flops_of, is_compiled, replay_step
from lit_scale.factors.optimizers import state_bytes
from lit_scale.restoring import undone
from lit_scale.technique import Technique, check_techniques, techniques
from lit_scale.trainers import callbacks_of

__all__ = ["CostMeter", "charge", "charge_run", "resident_peak"]

_SAMPLES = 32  # steps of a kind that are timed during the run; for later ones the meter only looks up a dictionary
_REPLAYED = 32  # largest number of kinds that are replayed, the most frequent ones; others keep their in-run medians


class CostMeter(Callback):
    """Counts steps by kind, prices the kinds, and writes ``result.json`` into the run's root folder.

    The cost of a run is that of its training steps and of charges (growth, recompiles). Validation is counted
    separately. The replay after training is not counted; weights, optimizer, random state and metrics are restored bit
    for bit. If steps cannot be replayed (several processes, manual optimization, a step that fails outside of the loop)
    the price of a kind is the median of its timings during the run.

    With several processes, ``steps`` are those of one rank; samples, tokens, FLOPs and the counts of ``step_kinds`` are
    sums over ranks, and reference seconds are the mean. When a run is resumed, every rank continues from the counts of
    rank 0.

    Reference seconds of two runs that were made at different times cannot be compared, because the speed of the machine
    may differ. Costs in *plain steps* can, since all kinds of a run are timed in turn. In the record,
    ``plain_step_seconds`` is the run's price of a step without any technique, and ``cost_in_plain_steps`` its reference
    seconds, charges included, in that unit. ``plain_step_flops`` shows whether two runs have the same plain step. If
    the run made no plain step and its techniques cannot replay one, these are None and ``no_plain_step`` is the reason.
    ``prices`` is ``"replay"`` if all kinds were timed by replay, and ``"run"`` if some prices are medians during the
    run, which other work on the machine can distort. ``python -m lit_scale.cost.compare`` compares the records of
    several runs.

    The meter is meant for runs with few kinds of step. Batches padded to many different lengths are many kinds, each
    of which is counted and timed; pad them to a few lengths instead. On a GPU each timed step is synchronized. During
    the replay the hooks of the module and of callbacks around backward and the optimizer step are called too.

    Args:
        recipe: Name of the recipe, for the record.
        technique: Name of the technique, for the record; by default the names of the run's techniques. Metrics that
            techniques log as ``their_name/...`` are not recorded.
        baseline: Whether this run is the one without the technique.
        repeats: Timed rounds over all kinds of step; 0 keeps the medians during the run.
        filename: Name of the result file inside ``trainer.default_root_dir``.
        extra: More entries for the record, e.g. the command.

    Raises:
        ValueError: If ``repeats`` is negative; in ``setup``, if a technique comes after the meter in ``callbacks``.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> meter = CostMeter(recipe="mine", technique="none")
        >>> trainer = Trainer(max_steps=10, callbacks=[meter], logger=False)
        >>> meter.totals()["steps"]
        0
    """

    def __init__(
        self,
        *,
        recipe: str = "",
        technique: str = "",
        baseline: bool = False,
        repeats: int = 9,
        filename: str = "result.json",
        extra: dict[str, Any] | None = None,
    ) -> None:
        if repeats < 0:
            raise ValueError(f"repeats={repeats} must not be negative")
        self.recipe, self.technique, self.baseline = recipe, technique, baseline
        self.repeats, self.filename, self.extra = repeats, filename, extra or {}
        self.ledger = Ledger()
        self._spent = {"wall": 0.0, "cpu": 0.0}  # seconds of earlier parts of a resumed run
        self._begun: dict[str, float] = {}
        self._peak = 0
        self._state = 0  # bytes of optimizer state
        self._batches: dict[str, Any] = {}  # one batch of each shape, for the replay
        self._replaying = False
        # of the current step
        self._current: Key | None = None
        self._counting: ExitStack | None = None
        self._timed = False
        self._start = self._end = 0.0
        self._aside = 0.0  # seconds charged since then, which belong neither to the step nor to its wait
        self._compiles = 0

    # -- step kinds ---------------------------------------------------------------------------------------------------

    def samples_and_tokens(self, batch: Any) -> tuple[int, int]:
        """Number of samples and tokens of a batch; override it for batches for which this rule does not hold.

        The number of samples is the length of the first axis of the first tensor. If that tensor holds integers in two
        axes (token ids), the number of tokens is its number of elements, padding included; else it is one per sample.
        """
        first = next(tensors(batch), None)
        if first is None or first.ndim == 0:
            return 0, 0
        is_ids = first.ndim == 2 and not first.is_floating_point()
        return first.shape[0], first.numel() if is_ids else first.shape[0]

    def _key(self, trainer: Trainer, phase: str, batch: Any, update: bool) -> Key:
        samples, tokens = self.samples_and_tokens(batch)
        key: list[tuple[str, Any]] = [("phase", phase), ("samples", samples), ("tokens", tokens), ("update", update)]
        present = techniques(trainer)
        key.append(("plain", all(technique.is_plain() for technique in present)))
        for technique in present:
            key += _named(technique, technique.step_kind()).items()
        return (*key, ("batch", " ".join("x".join(map(str, tensor.shape)) for tensor in tensors(batch))))

    # -- counting -----------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a technique that comes after the meter: it would change steps after they are counted."""
        order = [c for c in callbacks_of(trainer, Callback) if isinstance(c, Technique | CostMeter)]
        if stage == "fit" and isinstance(order[-1], Technique):
            raise ValueError(f"callbacks: put CostMeter behind {type(order[-1]).__name__}, whose steps it counts")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clocks."""
        self._begun, self._end = _clocks(), 0.0
        self.ledger.forget_ranks()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Count the step by its kind; for the first step of a kind, count FLOPs too."""
        full = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        key = self._key(trainer, "train", batch, full or bool(trainer.is_last_batch))
        if len(self._batches) < _REPLAYED:
            self._batches.setdefault(dict(key)["batch"], batch)
        self._begin(trainer, pl_module, key, batch)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Record the time of the step, for the first steps of a kind."""
        self._finish(trainer)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Count validation steps separately."""
        self._end = 0.0  # the time since the last training step is not a wait for data
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._begin(trainer, pl_module, self._key(trainer, "validate", batch, False), batch)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Record the time of the step, for the first steps of a kind."""
        self._finish(trainer)
        self._end = 0.0

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add a point to the validation curve; a ``validate`` after ``fit`` also writes the record again."""
        after = trainer.state.fn == "validate" and not self._begun
        if trainer.sanity_checking or not self.ledger.counts or not (after or trainer.state.fn == "fit"):
            return
        hidden = ("train", *(f"{technique.name}/" for technique in techniques(trainer)))
        logged = {name: value for name, value in trainer.callback_metrics.items() if value.numel() == 1}
        metrics = {name: float(value) for name, value in logged.items() if not name.startswith(hidden)}
        clocks = {f"{name}_seconds": seconds for name, seconds in self._elapsed().items()}
        self.ledger.add_point(trainer.global_step, metrics, clocks)
        if after:
            self.write(trainer, pl_module)

    def _begin(self, trainer: Trainer, pl_module: LightningModule, key: Key, batch: Any) -> None:
        wait = time.perf_counter() - self._end - self._aside if self._end else None
        phase, ledger = dict(key)["phase"], self.ledger
        ledger.count(key, trainer.global_step)
        self._current, self._compiles = key, _compiles()
        if key not in ledger.flops:
            if not is_compiled(pl_module):
                self._count_flops(key)
                return
            ledger.flops[key] = flops_of(trainer, pl_module, batch, phase)
            self._count_skipped(trainer, key)
        timings = ledger.timings.setdefault(key, [])
        self._timed = len(timings) < _SAMPLES
        if self._timed:
            if wait is not None and phase == "train":
                ledger.waits.setdefault(key, []).append(max(0.0, wait))
            _synchronize()
        self._aside = 0.0
        self._start = time.perf_counter()

    def _count_flops(self, key: Key) -> None:
        """Start to count the FLOPs of the current step."""
        self._counting = ExitStack()
        if "torch._dynamo" in sys.modules:  # compiled functions would hide their operations from the counter
            self._counting.enter_context(torch.compiler.set_stance("force_eager"))
        counter = self._counting.enter_context(FlopCounterMode(display=False))
        self._counting.callback(lambda: self.ledger.flops.update({key: int(counter.get_total_flops())}))

    def _count_skipped(self, trainer: Trainer, key: Key) -> None:
        skipped = sum(technique.skipped_flops() for technique in techniques(trainer))
        if skipped and dict(key)["phase"] == "train":
            self.ledger.skipped[key] = skipped

    def _finish(self, trainer: Trainer) -> None:
        key, self._current = self._current, None
        if key is None:
            return
        compiled = _compiles() > self._compiles
        if self._counting is not None:
            self._counting.close()
            self._counting = None
            self._count_skipped(trainer, key)
        elif self._timed or compiled:
            _synchronize()
            seconds = time.perf_counter() - self._start - self._aside
            if not compiled:
                self.ledger.timings[key].append(seconds)
            elif dict(key)["phase"] == "train":
                self.ledger.charge("recompile", seconds)
        self._end, self._aside = time.perf_counter(), 0.0

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop counting FLOPs."""
        if self._counting is not None:
            self._counting.close()
            self._counting = None

    # -- pricing ------------------------------------------------------------------------------------------------------

    def charge(self, what: str, seconds: float) -> None:
        """Add a charge to the run, as :func:`charge` does."""
        self._aside += seconds
        if not self._replaying:
            self.ledger.charge(what, seconds)

    def totals(self) -> dict[str, Any]:
        """Steps, samples, tokens, FLOPs and reference seconds of the run so far, charges included."""
        return self.ledger.totals()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clocks, price the step kinds by replay, write the record."""
        self._spent, self._begun = self._elapsed(), {}
        self._peak = max(self._peak, _peak_memory())
        self._state = state_bytes(trainer.optimizers)
        if trainer.world_size > 1:
            self.ledger.exchange(trainer)
        elif self.repeats and self._batches and pl_module.automatic_optimization:
            self._calibrate(trainer, pl_module)
        self._batches = {}
        rank_zero_info(f"CostMeter: wrote {self.write(trainer, pl_module)}")

    def _calibrate(self, trainer: Trainer, pl_module: LightningModule) -> None:
        present = techniques(trainer)
        frequent = sorted(self.ledger.counts, key=lambda key: -self.ledger.counts[key])
        keys = [k for k in frequent if dict(k)["phase"] == "train" and dict(k)["batch"] in self._batches][:_REPLAYED]
        if (plain := self._plain_key(keys, present)) is not None:
            keys.append(plain)
        times: dict[Key, list[float]] = {key: [] for key in keys}
        self._replaying = True
        try:
            now = [technique.step_kind() for technique in present]
            with undone(trainer, pl_module):
                try:
                    for round_ in range(self.repeats + 1):
                        for key in keys[round_ % len(keys) :] + keys[: round_ % len(keys)]:
                            kind = dict(key)
                            for technique in present:
                                technique.impose_step_kind(trainer, pl_module, _own(technique, kind))
                            if key not in self.ledger.flops:
                                batch = self._batches[kind["batch"]]
                                self.ledger.flops[key] = flops_of(trainer, pl_module, batch, "train")
                            _synchronize()
                            start, self._aside = time.perf_counter(), 0.0
                            replay_step(trainer, pl_module, self._batches[kind["batch"]], kind["update"])
                            _synchronize()
                            if round_:  # the first round warms up
                                times[key].append(time.perf_counter() - start - self._aside)
                finally:
                    for technique, kind in zip(present, now, strict=True):
                        technique.impose_step_kind(trainer, pl_module, kind)
        except Exception as error:  # a trained model must not be lost to a measurement
            rank_zero_warn(f"CostMeter could not replay a step ({error}); prices are medians of the run's own timings")
            return
        finally:
            self._replaying = False
        self.ledger.calibrated = {key: statistics.median(seconds) for key, seconds in times.items()}

    def _plain_key(self, keys: list[Key], present: list[Technique]) -> Key | None:
        """The kind of the plain step to replay, if the run made none and all of its techniques can make one.

        It is derived from the most frequent kind. Techniques that are plain at the end of training keep their entries,
        and only kinds with these entries are considered, because the batches of others were changed by the technique.
        """
        updates = [key for key in keys if dict(key)["update"]]
        if any(dict(key)["plain"] for key in updates):
            return None
        ended: dict[str, Any] = {}
        plain: dict[str, Any] = {}
        for technique in present:
            if technique.is_plain():
                ended |= _named(technique, technique.step_kind())
            elif (kind := technique.plain_step_kind()) is not None:
                plain |= _named(technique, kind)
            else:
                return None
        updates = [key for key in updates if ended.items() <= dict(key).items()]
        return tuple((dict(updates[0]) | plain | {"plain": True}).items()) if updates else None

    # -- state and record ---------------------------------------------------------------------------------------------

    def _elapsed(self) -> dict[str, float]:
        """Wall and CPU seconds of training, in this process and in earlier parts of a resumed run."""
        now = _clocks() if self._begun else {}
        return {name: spent + (now[name] - self._begun[name] if now else 0.0) for name, spent in self._spent.items()}

    def state_dict(self) -> dict[str, Any]:
        """Counts, prices, charges, stages, curve and clocks so far."""
        return self.ledger.state_dict() | {"spent": self._elapsed(), "peak": max(self._peak, _peak_memory())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the counts of a checkpoint."""
        if not Ledger.reads(state_dict):
            rank_zero_warn(
                "CostMeter: the checkpoint was written by an earlier version, whose counts cannot be read; the cost is "
                "counted from this step on, and result.json holds the rest of the run only"
            )
            return
        self.ledger.load_state_dict(state_dict)
        self._spent, self._peak = dict(state_dict["spent"]), state_dict["peak"]

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuse to resume without a technique that the checkpoint was trained with."""
        check_techniques(trainer, checkpoint)

    def record(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """The record of the run, as plain values."""
        seed = os.environ.get("PL_GLOBAL_SEED")
        return {
            "recipe": self.recipe,
            "technique": self.technique or " + ".join(technique.name for technique in techniques(trainer)),
            "baseline": self.baseline,
            "seed": None if seed is None else int(seed),
            **self.ledger.record(),
            **{f"{name}_seconds": seconds for name, seconds in self._elapsed().items()},
            "peak_memory_bytes": self._peak,
            "optimizer_state_bytes": self._state,
            "parameters": sum(p.numel() for p in pl_module.parameters()),
            "world_size": trainer.world_size,
            "precision": str(trainer.precision),
            "hparams": {k: v for k, v in pl_module.hparams.items() if isinstance(v, str | int | float | bool | None)},
            "versions": versions(),
            "hardware": hardware(),
            **self.extra,
        }

    def write(self, trainer: Trainer, pl_module: LightningModule) -> Path:
        """Write the record into ``trainer.default_root_dir``, on rank 0; return its path."""
        path = Path(trainer.default_root_dir) / self.filename
        if trainer.is_global_zero:
            write_json(path, self.record(trainer, pl_module))
        return path


@contextmanager
def charge(trainer: Trainer, what: str) -> Iterator[None]:
    """Charge the time spent inside the context to the run's CostMeter, if it has one, under the name ``what``.

    Use it for rare work, such as growth; work of every step is part of the step's price. Time that is charged inside a
    step is not counted in the step.
    """
    meters = callbacks_of(trainer, CostMeter)
    if meters:
        _synchronize()
    start = time.perf_counter()
    yield
    for meter in meters:
        _synchronize()
        meter.charge(what, time.perf_counter() - start)


def charge_run(trainer: Trainer, what: str, checkpoint: Mapping[str, Any]) -> bool:
    """Charge the cost of an earlier run that this one depends on: reference seconds, FLOPs, and wall and CPU seconds.

    Args:
        trainer: The Trainer; if the run is resumed, after its CostMeter's state is restored.
        what: The name of the charge. If the run already has a charge of that name, nothing is charged.
        checkpoint: Checkpoint of the earlier run, with the state of its CostMeter. If that run had several processes,
            only the FLOPs of rank 0 are known.

    Returns:
        Whether the checkpoint holds a cost in the format of this version.
    """
    state = checkpoint.get("callbacks", {}).get(CostMeter.__qualname__)
    if state is None or not Ledger.reads(state):
        return False
    earlier = Ledger()
    earlier.load_state_dict(state)
    cost = earlier.totals()
    for meter in callbacks_of(trainer, CostMeter):
        if what not in meter.ledger.charges:
            meter.ledger.charge(what, cost["reference_seconds"], cost["flops"])
            meter._spent = {name: spent + state["spent"][name] for name, spent in meter._spent.items()}
    return True


def _named(technique: Technique, kind: Mapping[str, Any]) -> dict[str, Any]:
    """A technique's entries of a step kind, prefixed with its name: ``token_dropping/kept``."""
    return {f"{technique.name}/{name}": value for name, value in kind.items()}


def _own(technique: Technique, kind: Mapping[str, Any]) -> dict[str, Any]:
    """The technique's entries of a step kind, without the prefix."""
    prefix = f"{technique.name}/"
    return {name.removeprefix(prefix): value for name, value in kind.items() if name.startswith(prefix)}


def _synchronize() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _compiles() -> int:
    """Number of frames that Dynamo has compiled in this process."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return 0 if dynamo is None else dynamo.counters["frames"]["ok"]


def _clocks() -> dict[str, float]:
    return {"wall": time.perf_counter(), "cpu": sum(os.times()[:4])}


def resident_peak() -> int:
    """Largest resident set of this process so far, in bytes; device memory is not included."""
    status = Path("/proc/self/status")
    told = status.read_text().partition("VmHWM:")[2].split() if status.exists() else []
    if told:  # preferred on Linux, where ru_maxrss starts at the size of the parent process
        return 1024 * int(told[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _peak_memory() -> int:
    """Peak of the device memory if there is a device, else of the process's resident set, in bytes."""
    return int(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else resident_peak()
