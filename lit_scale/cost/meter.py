"""The clock: what a run costs in FLOPs and in reference seconds, whatever the machine did meanwhile.

    reference seconds = sum over step kinds (count x calibrated median seconds) + charged overheads

Steps are told apart by their *kind*: batch sizes, tokens, and whatever the techniques say decides the cost (active
blocks, frozen blocks...). FLOPs of a kind are counted once, by torch's FlopCounterMode. Its seconds are measured when
training has ended, by replaying every kind in turn, several rounds, and taking medians: interleaved, so that a noisy
second hits all kinds alike and decides nothing; the step without any technique is among them even where the run made
none, so that prices have a common unit (Kaddour et al. 2023 call a fixed price per step Reference System Time,
section 3; theirs was a table made by hand).
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

_SAMPLES = 32  # in-run timings kept per step kind; after that a step costs a dictionary look-up
_REPLAYED = 32  # step kinds that are replayed, the most frequent ones; the others keep their in-run medians


class CostMeter(Callback):
    """Counts steps by kind, prices the kinds, and writes ``result.json`` into the run's root folder.

    The headline cost is that of training steps and of what techniques charge (growth, recompiles); validation is
    counted apart, and the replay at the end is not counted at all: weights, optimizer, random state and metrics are
    put back bit for bit. Where a step cannot be replayed (several processes, manual optimization, a step that fails
    out of its loop) the price of a kind is the median of its timings during the run.

    With several processes steps are those of each rank; samples, tokens, FLOPs and the counts of steps are sums over
    the ranks, and reference seconds their mean, which is what the run takes. Resumed, every rank goes on from the
    counts of rank 0.

    Reference seconds of two runs that were made at different hours do not compare: the price of a step is that of its
    hour. Their costs in *plain steps* do, since all step kinds of a run are timed in turn: ``plain_step_seconds`` is
    the run's own price of a step without any technique, and ``cost_in_plain_steps`` its reference seconds, charges
    included, in that unit. The record also holds ``plain_step_flops``, which tell whether two runs have the same plain
    step. A run without a plain step, whose techniques cannot say what one would be, has None there and the reason in
    ``no_plain_step``. ``prices`` says whether kinds were timed by replay (``"replay"``) or whether some have the
    medians of the run's own timings (``"run"``), which other work on the machine can distort. ``python -m
    lit_scale.cost.compare`` sets the records of several runs side by side.

    The meter is made for few step kinds, each met often. Batches padded to ever new lengths are new kinds, each
    counted and timed anew: pad them to a few lengths. On a GPU a step is timed alone, between two synchronisations.
    While steps are replayed, the module's and other callbacks' hooks around backward and optimizer step are called too.

    Args:
        recipe: Name of the recipe, for the record.
        technique: Name of the technique, for the record; what techniques log as ``their_name/...`` is left out of it.
        baseline: Whether this run is the one without the technique.
        repeats: Timed rounds over all step kinds; 0 keeps the in-run medians.
        filename: Name of the result file inside ``trainer.default_root_dir``.
        extra: More entries for the record, e.g. the command.

    Raises:
        ValueError: If ``repeats`` is negative, or a technique follows the meter in ``callbacks``.

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
        self._spent = {"wall": 0.0, "cpu": 0.0}  # by earlier parts of a resumed run
        self._begun: dict[str, float] = {}
        self._peak = 0
        self._state = 0  # bytes of optimizer state
        self._batches: dict[str, Any] = {}  # one for each shape of batch, for the replay
        self._replaying = False
        # the current step
        self._current: Key | None = None
        self._counting: ExitStack | None = None
        self._timed = False
        self._start = self._end = 0.0
        self._aside = 0.0  # seconds charged since then: neither the step's nor its wait
        self._compiles = 0

    # -- step kinds ---------------------------------------------------------------------------------------------------

    def samples_and_tokens(self, batch: Any) -> tuple[int, int]:
        """Samples and tokens of a batch; override for batches whose first tensor is neither ids nor samples.

        The samples are the first axis of the first tensor; the tokens, its elements if it holds integers in two axes
        (token ids, padding included), else one per sample.
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
        """Refuse an order of callbacks in which a technique would change the step after it was counted."""
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
        """Count the step under its kind; the first of a kind has its FLOPs counted too."""
        full = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        key = self._key(trainer, "train", batch, full or bool(trainer.is_last_batch))
        if len(self._batches) < _REPLAYED:
            self._batches.setdefault(dict(key)["batch"], batch)
        self._begin(trainer, pl_module, key, batch)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Take the step's time while its kind is new."""
        self._finish(trainer)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Count forward-only steps apart."""
        self._end = 0.0  # the time since the last training step is no waiting for data
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._begin(trainer, pl_module, self._key(trainer, "validate", batch, False), batch)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Take the step's time while its kind is new."""
        self._finish(trainer)
        self._end = 0.0

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add a point to the validation curve; after ``fit``, a ``validate`` completes the record."""
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
        """Count those of the step that begins now."""
        self._counting = ExitStack()
        if "torch._dynamo" in sys.modules:  # functions may be compiled, which would hide their operations
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
        """Leave no counting mode behind."""
        if self._counting is not None:
            self._counting.close()
            self._counting = None

    # -- pricing ------------------------------------------------------------------------------------------------------

    def charge(self, what: str, seconds: float) -> None:
        """Add to the overheads of the run, as :func:`charge` does."""
        self._aside += seconds
        if not self._replaying:
            self.ledger.charge(what, seconds)

    def totals(self) -> dict[str, Any]:
        """Steps, samples, tokens, FLOPs and reference seconds of the run so far, overheads included."""
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
        """The plain form of the most frequent step, if the run made no plain step and its techniques have one.

        What a technique that has ended does to a batch cannot be undone: such a step is one without it.
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
        """Wall and CPU seconds of training, in this process and those before it."""
        now = _clocks() if self._begun else {}
        return {name: spent + (now[name] - self._begun[name] if now else 0.0) for name, spent in self._spent.items()}

    def state_dict(self) -> dict[str, Any]:
        """Counts, prices, charges, stages, curve and clocks so far."""
        return self.ledger.state_dict() | {"spent": self._elapsed(), "peak": max(self._peak, _peak_memory())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting where the checkpoint stood."""
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
        """Everything about the run, as plain values."""
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
        """Write the record beside the run's checkpoints, in one piece."""
        path = Path(trainer.default_root_dir) / self.filename
        if trainer.is_global_zero:
            write_json(path, self.record(trainer, pl_module))
        return path


@contextmanager
def charge(trainer: Trainer, what: str) -> Iterator[None]:
    """Charge the time spent inside to the run's CostMeter, if it has one, under the name ``what``.

    For rare work, such as a growth: what every step does belongs to the step, whose price is calibrated. Time charged
    inside a step is not counted again as the step's.
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
    """Charge an earlier run, which this one builds on, to the run's CostMeter: seconds and FLOPs, on all clocks.

    Args:
        trainer: The Trainer, once its CostMeter's state is that of the run it goes on with.
        what: The name of the charge; one that the run already has is not charged again.
        checkpoint: The earlier run's, with the state of its own CostMeter. Of several processes it knows the FLOPs of
            the first.

    Returns:
        Whether the checkpoint holds the cost of its run, in the format of this version.
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
    """A technique's part of a step kind, under its name: ``token_dropping/kept``."""
    return {f"{technique.name}/{name}": value for name, value in kind.items()}


def _own(technique: Technique, kind: Mapping[str, Any]) -> dict[str, Any]:
    """What of a step kind is the technique's, as it said it."""
    prefix = f"{technique.name}/"
    return {name.removeprefix(prefix): value for name, value in kind.items() if name.startswith(prefix)}


def _synchronize() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _compiles() -> int:
    """How many frames Dynamo has compiled in this process."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return 0 if dynamo is None else dynamo.counters["frames"]["ok"]


def _clocks() -> dict[str, float]:
    return {"wall": time.perf_counter(), "cpu": sum(os.times()[:4])}


def resident_peak() -> int:
    """Bytes of memory this process has held at most, without those on a device."""
    status = Path("/proc/self/status")
    told = status.read_text().partition("VmHWM:")[2].split() if status.exists() else []
    if told:  # Linux's ru_maxrss begins at what the process that started this one held
        return 1024 * int(told[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _peak_memory() -> int:
    """Device memory if there is a device, else the process's largest resident set; in bytes."""
    return int(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else resident_peak()
