"""The clock: what a run costs in FLOPs and in reference seconds, whatever the machine did meanwhile.

    reference seconds = sum over shapes of step (count x calibrated median seconds) + charged overheads

Steps are told apart by their *shape*: batch sizes, tokens, and whatever the techniques say decides the cost (active
blocks, frozen blocks...). FLOPs of a shape are counted once, by torch's FlopCounterMode. Its seconds are measured when
training has ended, by replaying every shape in turn, several rounds, and taking medians: interleaved, so that a noisy
second hits all shapes alike and decides nothing (Kaddour et al. 2023 call a fixed price per step Reference System Time,
section 3; theirs was a table made by hand).
"""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torchmetrics import Metric

from lit_scale.technique import Technique, check_techniques

__all__ = ["CostMeter", "charge", "hardware", "versions", "write_json"]

Key = tuple[tuple[str, Any], ...]

_COMMON = ("kind", "samples", "tokens", "update", "plain", "batch")  # of every shape; the rest comes from techniques
_SAMPLES = 32  # in-run timings kept per shape; after that a step costs a dictionary look-up
_WARM = 2  # first steps of a shape that are not timed: allocation, compilation


class CostMeter(Callback):
    """Counts steps by shape, prices the shapes, and writes ``result.json`` into the run's root folder.

    The headline cost is that of training steps and of what techniques charge (growth, selection, recompiles);
    validation is counted apart, and the replay at the end is not counted at all: weights, optimizer, random state and
    metrics are put back bit for bit. In runs of several processes, or where a step cannot be replayed, the price of a
    shape is the median of its timings during the run.

    Args:
        recipe: Name of the recipe, for the record.
        technique: Name of the technique, for the record.
        baseline: Whether this run is the one without the technique.
        repeats: Timed rounds over all shapes; 0 keeps the in-run medians.
        filename: Name of the result file inside ``trainer.default_root_dir``.
        extra: More entries for the record, e.g. the command.

    Raises:
        ValueError: If ``repeats`` is negative, or a technique stands behind the meter in ``callbacks``.

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
        self._counts: dict[Key, int] = {}
        self._flops: dict[Key, int] = {}
        self._timings: dict[Key, list[float]] = {}  # in-run seconds of a step
        self._waits: dict[Key, list[float]] = {}  # in-run seconds of waiting for a batch
        self._calibrated: dict[Key, float] = {}
        self._charges: dict[str, list[float]] = {}
        self._stages: list[dict[str, Any]] = []
        self._curve: list[dict[str, Any]] = []
        self._spent = {"wall": 0.0, "cpu": 0.0}  # by earlier parts of a resumed run
        self._batches: dict[Key, Any] = {}
        self._begun: dict[str, float] = {}
        self._current: Key | None = None
        self._start = self._end = 0.0
        self._counter: FlopCounterMode | None = None
        self._compiles = 0
        self._peak = 0

    # -- shapes -------------------------------------------------------------------------------------------------------

    def samples_and_tokens(self, batch: Any) -> tuple[int, int]:
        """Samples and tokens of a batch; override for batches whose first tensor is neither ids nor samples.

        The samples are the first axis of the first tensor; the tokens, its elements if it holds integers in two axes
        (token ids), else one per sample.
        """
        first = next((leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)), None)
        if first is None or first.ndim == 0:
            return 0, 0
        is_ids = first.ndim == 2 and not first.is_floating_point()
        return first.shape[0], first.numel() if is_ids else first.shape[0]

    def _key(self, trainer: Trainer, kind: str, batch: Any, update: bool) -> Key:
        samples, tokens = self.samples_and_tokens(batch)
        key: list[tuple[str, Any]] = [("kind", kind), ("samples", samples), ("tokens", tokens), ("update", update)]
        techniques = [c for c in trainer.callbacks if isinstance(c, Technique)]  # type: ignore[attr-defined]
        key.append(("plain", all(technique.is_plain() for technique in techniques)))
        for technique in techniques:
            key += technique.step_shape().items()
        shapes = " ".join("x".join(map(str, leaf.shape)) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor))
        return (*key, ("batch", shapes))

    # -- counting -----------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse an order of callbacks in which a technique would change the step after it was counted."""
        order = [c for c in trainer.callbacks if isinstance(c, Technique | CostMeter)]  # type: ignore[attr-defined]
        if stage == "fit" and isinstance(order[-1], Technique):
            raise ValueError(f"callbacks: put CostMeter behind {type(order[-1]).__name__}, whose steps it counts")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clocks."""
        self._begun = _clocks()
        self._end = 0.0
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Count the step under its shape; the first of a shape has its FLOPs counted too."""
        update = (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or batch_idx + 1 == trainer.num_training_batches
        key = self._key(trainer, "train", batch, update)
        self._begin_stage(trainer, key)
        self._begin(key, batch)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take the step's time while the shape is new."""
        self._finish()

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Count forward-only steps apart."""
        self._end = 0.0  # the time since the last training step is no waiting for data
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._begin(self._key(trainer, "validate", batch, False), batch)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Take the step's time while the shape is new."""
        self._finish()
        self._end = 0.0

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add a point to the validation curve; after ``fit``, a ``validate`` completes the record."""
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if value.numel() == 1}
        if trainer.sanity_checking or not self._counts:
            return
        step = trainer.global_step
        if trainer.state.fn == "fit":
            if self._stages:
                self._stages[-1]["metrics"] = _validation(metrics)
            self._add_point(step, metrics)
        elif trainer.state.fn == "validate" and not self._begun:
            if not self._curve or self._curve[-1]["step"] != step:
                self._add_point(step, metrics)
            if self._stages:
                self._stages[-1]["metrics"] = _validation(metrics)
            self.write(trainer, pl_module)

    def _add_point(self, step: int, metrics: dict[str, float]) -> None:
        self._curve.append(
            {
                "step": step,
                "counts": [[_plain(key), count] for key, count in self._counts.items()],
                "charged_seconds": self.charged_seconds,
                **{f"{name}_seconds": seconds for name, seconds in self._elapsed().items()},
                "metrics": _validation(metrics),
            }
        )

    def _begin_stage(self, trainer: Trainer, key: Key) -> None:
        shape = {name: value for name, value in key if name not in _COMMON}
        if not self._stages or self._stages[-1]["shape"] != shape:
            self._stages.append({"shape": shape, "first_step": trainer.global_step, "counts": {}, "metrics": {}})
        counts = self._stages[-1]["counts"]
        counts[key] = counts.get(key, 0) + 1

    def _begin(self, key: Key, batch: Any) -> None:
        now = time.perf_counter()
        self._counts[key] = self._counts.get(key, 0) + 1
        self._current = key
        if key not in self._flops:
            self._batches[key] = batch
            if _compiles() is not None:
                torch.compiler.set_stance("force_eager")  # compiled code hides its operations from the counter
            self._counter = FlopCounterMode(display=False)
            self._counter.__enter__()
            return
        self._batches.setdefault(key, batch)
        timings = self._timings.setdefault(key, [])
        if len(timings) < _SAMPLES:
            if self._end and key[0][1] == "train":
                self._waits.setdefault(key, []).append(now - self._end)
            _synchronize()
            self._start = time.perf_counter()
        self._compiles = _compiles() or 0

    def _finish(self) -> None:
        key, self._current = self._current, None
        if key is None:
            return
        if self._counter is not None:
            self._stop_counting(key)
        elif self._start:
            _synchronize()
            seconds = time.perf_counter() - self._start
            if (_compiles() or 0) > self._compiles:  # a recompile: charge it, whatever its length
                self._charges.setdefault("recompile", []).append(seconds)
            else:
                self._timings[key].append(seconds)
        elif (_compiles() or 0) > self._compiles:
            self._charges.setdefault("recompile", []).append(0.0)
        self._start = 0.0
        self._end = time.perf_counter()

    def _stop_counting(self, key: Key | None = None) -> None:
        if self._counter is not None:
            self._counter.__exit__(None, None, None)
            if key is not None:
                self._flops[key] = self._counter.get_total_flops()
            if _compiles() is not None:
                torch.compiler.set_stance("default")
            self._counter = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no counting mode behind."""
        self._stop_counting()

    # -- pricing ------------------------------------------------------------------------------------------------------

    @property
    def charged_seconds(self) -> float:
        """Seconds that techniques and recompiles have been charged so far."""
        return sum(map(sum, self._charges.values()))

    def seconds_each(self, key: Key) -> float:
        """Price of one step of a shape: calibrated, else the in-run median; plus the median wait for its batch."""
        timings = self._timings.get(key, [])
        timed = timings[_WARM:] or timings
        step = self._calibrated.get(key) or (statistics.median(timed) if timed else 0.0)
        waits = self._waits.get(key, [])
        return step + (statistics.median(waits) if waits else 0.0)

    def _price(self, counts: dict[Key, int], kind: str = "train") -> dict[str, float]:
        """Sums over the shapes of one kind of step; overheads not included."""
        own = {key: n for key, n in counts.items() if dict(key)["kind"] == kind}
        return {
            "steps": sum(n for key, n in own.items() if dict(key)["update"]),
            "samples": sum(n * dict(key)["samples"] for key, n in own.items()),
            "tokens": sum(n * dict(key)["tokens"] for key, n in own.items()),
            "flops": sum(n * self._flops.get(key, 0) for key, n in own.items()),
            "reference_seconds": sum(n * self.seconds_each(key) for key, n in own.items()),
        }

    def totals(self) -> dict[str, float]:
        """Steps, samples, tokens, FLOPs and reference seconds of the run so far, overheads included."""
        totals = self._price(self._counts)
        return totals | {"reference_seconds": totals["reference_seconds"] + self.charged_seconds}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clocks, price the shapes by replay, write the record."""
        self._spent, self._begun = self._elapsed(), {}
        self._peak = max(self._peak, _peak_memory())
        if self.repeats and trainer.world_size == 1 and pl_module.automatic_optimization:
            self._calibrate(trainer, pl_module)
        self._batches = {}
        self.write(trainer, pl_module)

    def _calibrate(self, trainer: Trainer, pl_module: LightningModule) -> None:
        by_batch = {dict(key)["batch"]: batch for key, batch in self._batches.items()}
        keys = [key for key in self._counts if dict(key)["kind"] == "train" and dict(key)["batch"] in by_batch]
        techniques = [c for c in trainer.callbacks if isinstance(c, Technique)]  # type: ignore[attr-defined]
        now = [technique.step_shape() for technique in techniques]
        times: dict[Key, list[float]] = {key: [] for key in keys}
        try:
            with _unchanged(trainer, pl_module):
                try:
                    for round_ in range(self.repeats + 1):
                        for key in keys[round_ % len(keys) :] + keys[: round_ % len(keys)]:
                            shape = dict(key)
                            for technique in techniques:
                                technique.impose_shape(trainer, pl_module, shape)
                            _synchronize()
                            start = time.perf_counter()
                            _replay(trainer, pl_module, by_batch[shape["batch"]], shape["update"])
                            _synchronize()
                            if round_:  # the first round warms up
                                times[key].append(time.perf_counter() - start)
                finally:
                    for technique, shape in zip(techniques, now, strict=True):
                        technique.impose_shape(trainer, pl_module, shape)
        except Exception as error:  # a trained model must not be lost to a measurement
            rank_zero_warn(f"CostMeter could not replay a step ({error}); prices are medians of the run's own timings")
            return
        self._calibrated = {key: statistics.median(seconds) for key, seconds in times.items()}

    # -- state and record ---------------------------------------------------------------------------------------------

    def _elapsed(self) -> dict[str, float]:
        now = _clocks()
        return {name: spent + (now[name] - self._begun[name] if self._begun else 0.0) for name, spent in self._spent.items()}

    def state_dict(self) -> dict[str, Any]:
        """Counts, prices, charges, stages, curve and clocks so far."""
        return {
            "counts": list(self._counts.items()),
            "flops": list(self._flops.items()),
            "timings": list(self._timings.items()),
            "waits": list(self._waits.items()),
            "charges": self._charges,
            "stages": [stage | {"counts": list(stage["counts"].items())} for stage in self._stages],
            "curve": self._curve,
            "spent": self._elapsed(),
            "peak": max(self._peak, _peak_memory()),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting where the checkpoint stood."""
        self._counts, self._flops = dict(state_dict["counts"]), dict(state_dict["flops"])
        self._timings, self._waits = dict(state_dict["timings"]), dict(state_dict["waits"])
        self._charges, self._curve = dict(state_dict["charges"]), list(state_dict["curve"])
        self._stages = [stage | {"counts": dict(stage["counts"])} for stage in state_dict["stages"]]
        self._spent, self._peak = dict(state_dict["spent"]), state_dict["peak"]

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuse to resume without a technique that the checkpoint was trained with."""
        check_techniques(trainer, checkpoint)

    def record(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Everything about the run, as plain values."""
        metrics = self._curve[-1]["metrics"] if self._curve else {}
        curve = []
        for point in self._curve:
            cost = self._price({_key(shape): n for shape, n in point["counts"]})
            cost["reference_seconds"] += point["charged_seconds"]
            curve.append({k: v for k, v in point.items() if k not in ("counts", "charged_seconds")} | cost)
        return {
            "recipe": self.recipe,
            "technique": self.technique,
            "baseline": self.baseline,
            "seed": int(os.environ.get("PL_GLOBAL_SEED", 0)),
            **self.totals(),
            "wall_seconds": self._elapsed()["wall"],
            "cpu_seconds": self._elapsed()["cpu"],
            "peak_memory_bytes": self._peak,
            "parameters": sum(p.numel() for p in pl_module.parameters()),
            "metrics": metrics,
            "curve": curve,
            "stages": [
                stage["shape"] | self._price(stage["counts"]) | {"first_step": stage["first_step"], "metrics": stage["metrics"]}
                for stage in self._stages
            ],
            "shapes": [
                dict(key)
                | {"count": n, "flops_each": self._flops.get(key, 0), "seconds_each": self.seconds_each(key)}
                | {"price": "replay" if key in self._calibrated else "run"}
                for key, n in self._counts.items()
            ],
            "charges": {name: {"count": len(all_), "seconds": sum(all_)} for name, all_ in self._charges.items()},
            "validation": self._price(self._counts, "validate"),
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
    """Charge the time spent inside to the run's CostMeter, if it has one, under the name ``what``."""
    meters = [c for c in trainer.callbacks if isinstance(c, CostMeter)]  # type: ignore[attr-defined]
    if meters:
        _synchronize()
    start = time.perf_counter()
    yield
    for meter in meters:
        _synchronize()
        meter._charges.setdefault(what, []).append(time.perf_counter() - start)


def _replay(trainer: Trainer, pl_module: LightningModule, batch: Any, update: bool) -> None:
    """One training step as Lightning's automatic optimization does it, outside of the loop."""
    optimizer = trainer.optimizers[0]

    def closure() -> Tensor:
        output = trainer.strategy.training_step(batch, 0)
        loss = (output["loss"] if isinstance(output, dict) else output) / trainer.accumulate_grad_batches
        optimizer.zero_grad()
        trainer.strategy.backward(loss, optimizer)
        return loss

    if update:
        trainer.strategy.optimizer_step(optimizer, closure, pl_module)
    else:
        closure()


@contextmanager
def _unchanged(trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    """Put weights, optimizer, scaler, metrics, random state and logging back as they were."""

    def keep(value: Any) -> Any:
        return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value

    tensors = [*pl_module.parameters(), *pl_module.buffers()]
    values = [keep(tensor) for tensor in tensors]
    optimizers = [
        (o, {p: {k: keep(v) for k, v in s.items()} for p, s in o.state.items()}, [dict(g) for g in o.param_groups])
        for o in trainer.optimizers
    ]
    metrics = [(m, m._copy_state_dict(), m._update_count) for m in pl_module.modules() if isinstance(m, Metric)]
    precision = trainer.precision_plugin.state_dict()
    training = pl_module.training
    silenced = {"log": _silent, "log_dict": _silent}
    pl_module.__dict__.update(silenced)
    try:
        with isolate_rng(), torch.enable_grad():
            pl_module.train()
            yield
    finally:
        for name in silenced:
            del pl_module.__dict__[name]
        pl_module.zero_grad(set_to_none=True)
        with torch.no_grad():
            for tensor, value in zip(tensors, values, strict=True):
                tensor.copy_(value)
        for optimizer, state, groups in optimizers:
            for parameter in [p for p in optimizer.state if p not in state]:
                del optimizer.state[parameter]
            for parameter, kept in state.items():
                own = optimizer.state[parameter]
                for name, value in kept.items():
                    if isinstance(value, Tensor):
                        own[name].copy_(value)
                    else:
                        own[name] = value
            for group, kept in zip(optimizer.param_groups, groups, strict=True):
                group.update(kept)
        for metric, state, updates in metrics:
            for name, value in state.items():
                setattr(metric, name, value)
            metric._update_count = updates
        trainer.precision_plugin.load_state_dict(precision)
        pl_module.train(training)


def _silent(*_: Any, **__: Any) -> None:
    """Stands in for ``LightningModule.log``, which refuses to work outside of the loop."""


def _synchronize() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _compiles() -> int | None:
    """How many frames Dynamo has compiled in this process; None while nobody has imported it."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return None if dynamo is None else dynamo.counters["frames"]["ok"]


def _clocks() -> dict[str, float]:
    return {"wall": time.perf_counter(), "cpu": sum(os.times()[:4])}


def _peak_memory() -> int:
    """Device memory if there is a device, else the process's largest resident set; in bytes."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _plain(key: Key) -> dict[str, Any]:
    return dict(key)


def _key(shape: dict[str, Any]) -> Key:
    return tuple(shape.items())


def _validation(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if not name.startswith("train")}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result."""
    found = {"python": platform.python_version()}
    for package in ("torch", "lightning", "timm", "torchmetrics", "lit-scale"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """The machine a result was measured on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line), cpu)
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpus": gpus}


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON beside ``path`` and move it there, so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            json.dump(value, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            os.unlink(file.name)
            raise
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)
