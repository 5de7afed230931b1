"""The clock: FLOPs by formula, prices by replay, and no trace of either in the run that is measured."""

import copy
import json
import math
import random
import time
import warnings
from collections import UserDict
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from lit_scale.callbacks import ProgressiveStacking
from lit_scale.cost import CostMeter, charge, charge_run, hardware, versions
from lit_scale.datamodules import ResumableLoader
from lit_scale.guards import StepSeed
from lit_scale.models import BertMLM
from lit_scale.technique import Technique
from lit_scale.trainers import callbacks_of
from tests.support.equality import assert_same
from tests.support.training import quiet_trainer

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*LeafSpec",
    "ignore:.*does not have many workers",
    "ignore:The dirpath has changed",
    "ignore:You defined a `validation_step` but",
)

V, T, M, WIDTH = 24, 8, 2, 16


# -- small modules and their data -------------------------------------------------------------------------------------


def replaying(trainer: Trainer) -> bool:
    return any(meter._replaying for meter in callbacks_of(trainer, CostMeter))


class Bert(BertMLM):
    """Our own model, 4 blocks; `naps` are seconds to sleep in chosen training steps."""

    def __init__(self, **options: Any) -> None:
        torch.manual_seed(0)
        super().__init__(V, T, **({"depth": 4, "width": WIDTH, "num_heads": 2, "dropout": 0.1, "lr": 3e-3} | options))
        self.naps: dict[int, float] = {}
        self.nap_when = lambda batch: 0.0

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        step = None if replaying(self.trainer) else self.trainer.fit_loop.total_batch_idx
        time.sleep((0.0 if step is None else self.naps.get(step, 0.0)) + self.nap_when(batch))
        return super().training_step(batch, batch_idx)


def texts(size: int = 12, batch_size: int = 4, lengths: tuple[int, ...] = (T,), **options: Any) -> DataLoader:
    """Masked sentences; a sample is a function of its index."""

    def sample(index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(1, V, (lengths[index // batch_size % len(lengths)],), generator=generator)
        return {"input_ids": ids.index_fill(0, torch.arange(M), 0), "positions": torch.arange(M), "labels": ids[:M]}

    samples: Any = [sample(i) for i in range(size)]
    return DataLoader(samples, batch_size, **options)


class Convolutions(LightningModule):
    """A user's own: convolutions, BatchNorm (one frozen), metrics in the training step, a dict of outputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.frozen = nn.BatchNorm2d(3)
        self.net = nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(6 * 36, 4)
        )
        self.mean = MeanMetric()
        self.scores = MetricCollection([MulticlassAccuracy(4), MulticlassConfusionMatrix(4)])

    def on_train_start(self) -> None:
        self.frozen.eval()

    def training_step(self, batch: list[Tensor]) -> dict[str, Tensor]:  # without batch_idx
        image, label = batch
        logits = self.net(self.frozen(image) + torch.randn(1) + random.random() + np.random.rand())
        loss = F.cross_entropy(logits, label)
        self.mean(loss)
        self.scores(logits, label)
        self.log("train/mean", self.mean, on_step=False, on_epoch=True)
        self.log("loss", loss, on_epoch=True)
        return {"loss": loss, "logits": logits.detach()}

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)]


def images(size: int = 12, batch_size: int = 4) -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    data: Any = [(torch.randn(3, 8, 8, generator=generator), i % 4) for i in range(size)]
    return DataLoader(data, batch_size, generator=torch.Generator())


def trainer_of(root: Path, *callbacks: Callback, **options: Any) -> Trainer:
    return quiet_trainer(root, callbacks=list(callbacks), **({"use_distributed_sampler": True} | options))


def fit(root: Path, module: LightningModule, loader: Any, *callbacks: Callback, **options: Any) -> dict[str, Any]:
    """Train with a meter, unless there is one among the callbacks; the record that was written."""
    ckpt_path, val = options.pop("ckpt_path", None), options.pop("val", None)
    if not any(isinstance(c, CostMeter) for c in callbacks):
        callbacks = (*callbacks, CostMeter(repeats=options.pop("repeats", 3)))
    trainer = trainer_of(root, *callbacks, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The '.*_dataloader' does not have many workers|.*LeafSpec.*|.*log_every_n")
        warnings.filterwarnings("ignore", "You defined a `validation_step` but have no")
        trainer.fit(module, loader, val, ckpt_path=ckpt_path)
    return json.loads((root / "result.json").read_text())


def every(steps: int) -> dict[str, Any]:
    return {"val_check_interval": steps, "check_val_every_n_epoch": None}


def train_kinds(record: dict[str, Any]) -> list[dict[str, Any]]:
    return [shape for shape in record["step_kinds"] if shape["phase"] == "train"]


class Choosing(Callback):
    """A callback that charges its work, between the steps and inside them."""

    def __init__(self, before: float = 0.0, inside: float = 0.0) -> None:
        self.before, self.inside = before, inside

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if self.before:
            with charge(trainer, "selection"):
                time.sleep(self.before)

    def on_before_backward(self, trainer: Trainer, *_: Any) -> None:
        if self.inside:
            with charge(trainer, "mask"):
                time.sleep(self.inside)


# -- FLOPs ------------------------------------------------------------------------------------------------------------


def bert_flops(samples: int, length: int, blocks: int) -> int:
    """Multiply-adds count two, backward twice the forward; attention's backward has 5 products for its forward's 2."""
    linear = blocks * 12 * WIDTH**2 * samples * length
    head = (WIDTH**2 + WIDTH * V) * samples * M  # at the masked positions only
    attention = blocks * samples * length**2 * WIDTH
    return 6 * (linear + head) + 2 * (2 + 5) * attention


def test_flops_follow_the_formula_at_every_depth_and_shape(tmp_path):
    stacking = ProgressiveStacking([(0.0, 1), (0.3, 2), (0.6, 4)])
    record = fit(tmp_path, Bert(dropout=0.0), texts(10), stacking, max_epochs=4)
    seen = {(s["samples"], s["progressive_stacking/blocks"]): s["flops_each"] for s in train_kinds(record)}
    assert seen == {(samples, blocks): bert_flops(samples, T, blocks) for samples, blocks in seen}
    assert set(seen) == {(4, 1), (2, 1), (4, 2), (2, 2), (4, 4), (2, 4)}
    assert record["flops"] == sum(shape["count"] * shape["flops_each"] for shape in train_kinds(record))
    assert record["flops"] == sum(stage["flops"] for stage in record["stages"])


def test_flops_equal_an_independent_count_of_a_foreign_module(tmp_path):
    module: Any = Convolutions()
    loader = images()
    record = fit(tmp_path, module, loader, max_steps=3)
    module.log = lambda *_, **__: None
    module.train()
    with FlopCounterMode(display=False) as counter:
        module.training_step(next(iter(loader)))["loss"].backward()
    assert record["flops"] == 3 * counter.get_total_flops() > 0


def test_compiled_parts_do_not_hide_flops(tmp_path):
    model = Bert(dropout=0.0)
    for block in model.encoder.blocks:
        block.compile(backend="eager")
    record = fit(tmp_path, model, texts(), max_steps=3, val=texts(4))
    assert record["flops"] == 3 * bert_flops(4, T, 4)
    assert record["validation"]["flops"] > 0


# -- counts -----------------------------------------------------------------------------------------------------------


def test_counts_with_accumulation_epochs_and_a_smaller_last_batch(tmp_path):
    record = fit(tmp_path, Bert(), texts(18), max_epochs=3, accumulate_grad_batches=2, repeats=1)
    # batches of 4, 4, 4, 4, 2: two whole windows, and the last batch is one of its own
    assert (record["steps"], record["samples"], record["tokens"]) == (9, 54, 54 * T)
    counts = {(shape["samples"], shape["update"]): shape["count"] for shape in train_kinds(record)}
    assert counts == {(4, False): 6, (4, True): 6, (2, True): 3}


def test_a_stream_without_length_ends_its_window_too(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(texts(12).dataset)

    record = fit(tmp_path, Bert(), DataLoader(Stream(), 4), max_epochs=2, accumulate_grad_batches=2, repeats=1)
    assert (record["steps"], record["samples"]) == (4, 24)


def test_stages_are_told_by_what_decides_the_cost(tmp_path):
    stacking = ProgressiveStacking([(0.0, 1), (0.25, 2), (0.5, 4)])
    record = fit(tmp_path, Bert(), texts(), stacking, max_steps=12, val=texts(4), **every(3))
    assert [(s["progressive_stacking/blocks"], s["first_step"], s["steps"]) for s in record["stages"]] == [
        (1, 0, 3),
        (2, 3, 3),
        (4, 6, 6),
    ]
    assert [s["metrics"]["val/loss"] for s in record["stages"]] == [
        next(p["metrics"]["val/loss"] for p in record["curve"] if p["step"] == step) for step in (3, 6, 12)
    ]
    assert [s["plain"] for s in train_kinds(record)] == [False, False, True]


def test_kinds_that_come_and_go_are_one_stage_each(tmp_path):
    class Alternating(ProgressiveStacking):
        def step_kind(self):
            return {"side": self.trainer.global_step % 2}

        def setup(self, trainer, pl_module, stage):
            self.trainer = trainer
            super().setup(trainer, pl_module, stage)

        def impose_step_kind(self, trainer, pl_module, kind):
            pass

    record = fit(tmp_path, Bert(), texts(), Alternating([(0.0, 4)]), max_steps=9, repeats=1)
    assert [(s["alternating/side"], s["first_step"], s["steps"]) for s in record["stages"]] == [(0, 0, 5), (1, 1, 4)]


class Keeper(Technique):
    """Keeps something, without a cost; what it is told to impose is noted."""

    def __init__(self, kept: int) -> None:
        self.kept = kept
        self.imposed: list[Any] = []

    def plain_step_kind(self):
        return {"kept": 0}

    def step_kind(self):
        return {"kept": self.kept}

    def impose_step_kind(self, trainer, pl_module, kind):
        self.imposed.append(kind)


class Tokens(Keeper):
    factor = "tokens"


class Samples(Keeper):
    factor = "samples"


def test_techniques_that_use_one_word_are_told_apart(tmp_path):
    tokens, samples = Tokens(3), Samples(5)
    record = fit(tmp_path, Bert(), texts(), tokens, samples, max_steps=2, repeats=1)
    (stage,) = record["stages"]
    assert (stage["tokens/kept"], stage["samples/kept"]) == (3, 5)
    made, plain = train_kinds(record)
    assert [(kind["tokens/kept"], kind["samples/kept"], kind["plain"]) for kind in (made, plain)] == [
        (3, 5, False),
        (0, 0, True),
    ]
    for technique in (tokens, samples):  # in two rounds, and once more when they were over
        assert sorted(one["kept"] for one in technique.imposed) == [0, 0, *3 * [technique.kept]]
        assert all(set(one) == {"kept"} for one in technique.imposed)


@dataclass
class Pair:
    image: Tensor
    label: Tensor


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        (torch.zeros(4, 8, dtype=torch.long), (4, 32)),
        ({"input_ids": torch.zeros(4, 8, dtype=torch.long), "labels": torch.zeros(4)}, (4, 32)),
        (UserDict(input_ids=torch.zeros(4, 8, dtype=torch.long)), (4, 32)),  # as tokenizers give
        ([torch.zeros(4, 3, 8, 8), torch.zeros(4)], (4, 4)),
        (Pair(torch.zeros(5, 3, 8, 8), torch.zeros(5)), (5, 5)),
        ((["a", "b"], torch.zeros(2, 7)), (2, 2)),
        (["a", "b"], (0, 0)),
    ],
)
def test_samples_and_tokens_of_batches_of_any_kind(batch, expected):
    assert CostMeter().samples_and_tokens(batch) == expected


def test_what_counts_as_a_sample_can_be_said_otherwise(tmp_path):
    class PerImage(CostMeter):
        def samples_and_tokens(self, batch):
            return len(batch[0]), 16 * len(batch[0])

    record = fit(tmp_path, Convolutions(), images(), PerImage(repeats=1), max_steps=2)
    assert (record["samples"], record["tokens"]) == (8, 128)


# -- no trace ---------------------------------------------------------------------------------------------------------


def everything(trainer: Trainer, module: LightningModule) -> dict[str, Any]:
    """All that a run leaves behind."""
    numpy_state: Any = np.random.get_state()
    return {
        "weights": module.state_dict(),
        "gradients": [p.grad for p in module.parameters()],
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "precision": trainer.precision_plugin.state_dict(),
        "modes": [part.training for part in module.modules()],
        "metrics": {name: part.metric_state for name, part in module.named_modules() if hasattr(part, "metric_state")},
        "logged": dict(trainer.callback_metrics),
        "random": (torch.get_rng_state(), random.getstate(), torch.from_numpy(numpy_state[1]), numpy_state[2]),
    }


def both(tmp_path: Path, make: Any, loader: Any, technique: Any = None, **options: Any) -> tuple[Any, Any, CostMeter]:
    """Two runs from the same seed, without the meter and with it."""
    left = []
    meter = CostMeter(repeats=3)
    for with_meter in (False, True):
        callbacks = [c for c in [technique and technique(), meter if with_meter else None] if c is not None]
        module = make()
        trainer = trainer_of(tmp_path, *callbacks, **{k: v() if k == "plugins" else v for k, v in options.items()})
        for seed in (torch.manual_seed, random.seed, np.random.seed):
            seed(1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.fit(module, loader(), loader())
        left.append(everything(trainer, module))
    return left[0], left[1], meter


CASES: dict[str, dict[str, Any]] = {
    "dropout": {"make": Bert, "loader": texts},
    "growth": {
        "make": Bert,
        "loader": texts,
        "technique": lambda: ProgressiveStacking([(0.0, 1), (0.3, 2), (0.6, 4)]),
    },
    "growth, old blocks frozen": {
        "make": Bert,
        "loader": texts,
        "technique": lambda: ProgressiveStacking([(0.0, 1), (0.3, 2), (0.6, 4)], freeze_old=True, rewarmup=0.2),
    },
    "BatchNorm and metrics": {"make": Convolutions, "loader": images},
    "clipping, accumulation": {
        "make": Convolutions,
        "loader": images,
        "gradient_clip_val": 0.5,
        "accumulate_grad_batches": 2,
    },
    "bf16": {"make": Bert, "loader": texts, "precision": "bf16-mixed"},
    "scaler": {
        "make": Bert,
        "loader": texts,
        "plugins": lambda: MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", growth_interval=3)),
    },
    "LAMB": {"make": lambda: Bert(optimizer="lamb"), "loader": texts},
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_with_the_meter_is_the_run_without_it(tmp_path, case):
    without, with_meter, meter = both(tmp_path, **CASES[case], max_epochs=3)
    assert_same(without, with_meter)
    assert all(shape["price"] == "replay" for shape in train_kinds(meter.ledger.record())), "nothing was replayed"


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_run_with_the_meter_is_the_run_without_it(tmp_path, backend):
    def make():
        torch._dynamo.reset()
        model = Bert()
        for block in model.encoder.blocks:
            block.compile(backend=backend)
        return model

    grow = lambda: ProgressiveStacking([(0.0, 2), (0.5, 4)])  # noqa: E731
    without, with_meter, meter = both(tmp_path, make, texts, grow, max_epochs=2)
    assert_same(without, with_meter)
    assert all(shape["price"] == "replay" for shape in train_kinds(meter.ledger.record()))


def test_the_comparison_sees_a_replay_that_leaves_traces(tmp_path, monkeypatch):
    from contextlib import nullcontext

    monkeypatch.setattr("lit_scale.cost.meter.undone", lambda *_: nullcontext())
    without, with_meter, _ = both(tmp_path, Bert, texts, max_epochs=2)
    with pytest.raises(AssertionError):
        assert_same(without, with_meter)


def test_nothing_is_logged_by_the_replay(tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    class Logs(Bert):
        def training_step(self, batch, batch_idx):
            assert self.logger is not None
            self.logger.log_metrics({"seen": 1.0}, step=self.trainer.fit_loop.total_batch_idx)
            return super().training_step(batch, batch_idx)

    class Kept(CSVLogger):
        def log_metrics(self, metrics, step=None):
            if "seen" in metrics:
                seen.append(step)

    seen: list[int] = []
    fit(tmp_path, Logs(), texts(), max_steps=4, logger=Kept(tmp_path))
    assert seen == [0, 1, 2, 3]


# -- prices -----------------------------------------------------------------------------------------------------------


def test_reference_seconds_are_the_sum_that_the_record_shows(tmp_path):
    stacking = ProgressiveStacking([(0.0, 1), (0.5, 4)])
    record = fit(tmp_path, Bert(), texts(10), stacking, max_epochs=4, val=texts())
    charged = sum(one["seconds"] for one in record["charges"].values())
    total = sum(shape["count"] * shape["seconds_each"] for shape in train_kinds(record)) + charged
    assert record["reference_seconds"] == pytest.approx(total, rel=1e-12)
    assert record["curve"][-1]["reference_seconds"] == pytest.approx(total, rel=1e-12)
    assert all(shape["price"] == "replay" and shape["seconds_each"] > 0 for shape in train_kinds(record))
    for clock in ("steps", "samples", "tokens", "flops", "reference_seconds", "wall_seconds", "cpu_seconds"):
        values = [point[clock] for point in record["curve"]]
        assert values == sorted(values), clock


def test_a_hiccup_decides_nothing_and_a_slow_shape_does(tmp_path):
    hiccup, slow = Bert(), Bert()
    hiccup.naps = {11: 2.0}
    slow.nap_when = lambda batch: 0.1 if len(batch["labels"]) == 2 else 0.0  # the last batch of each epoch
    one = fit(tmp_path / "hiccup", hiccup, texts(10), max_epochs=5, repeats=9)
    assert one["wall_seconds"] > 2 > one["reference_seconds"]
    each = fit(tmp_path / "slow", slow, texts(10), max_epochs=5, repeats=9)
    price = {shape["samples"]: shape["seconds_each"] for shape in train_kinds(each)}
    assert price[2] >= 0.1 > price[4]
    assert each["reference_seconds"] >= 5 * 0.1


def test_charges_are_added_once_and_are_no_step_time(tmp_path):
    record = fit(tmp_path, Bert(), texts(), Choosing(0.1, 0.1), max_steps=5, repeats=2)
    charges = record["charges"]
    assert (charges["selection"]["count"], charges["mask"]["count"]) == (5, 5)
    assert min(charges["selection"]["seconds"], charges["mask"]["seconds"]) >= 5 * 0.1
    assert all(shape["seconds_each"] < 0.1 for shape in train_kinds(record))
    total = sum(shape["count"] * shape["seconds_each"] for shape in train_kinds(record))
    added = charges["selection"]["seconds"] + charges["mask"]["seconds"]
    assert record["reference_seconds"] == pytest.approx(total + added)


def test_growth_is_charged(tmp_path):
    record = fit(tmp_path, Bert(), texts(), ProgressiveStacking([(0.0, 1), (0.3, 2), (0.6, 4)]), max_steps=9)
    assert record["charges"]["growth"]["count"] == 2
    assert record["charges"]["growth"]["seconds"] > 0


def test_charge_does_nothing_without_a_meter_and_nothing_for_failed_work(tmp_path):
    meter = CostMeter()
    with charge(SimpleNamespace(callbacks=[]), "nothing"):  # type: ignore[arg-type]
        pass
    with pytest.raises(KeyError), charge(SimpleNamespace(callbacks=[meter]), "failed"):  # type: ignore[arg-type]
        raise KeyError
    assert meter.ledger.charges == {}


def test_an_earlier_run_is_charged_once_on_all_clocks(tmp_path):
    class Standing(Callback):
        def on_train_start(self, trainer, pl_module):
            for _ in range(2):
                assert charge_run(trainer, "earlier", checkpoint)
            assert not charge_run(trainer, "unknown", {"callbacks": {}})

    saver = ModelCheckpoint(tmp_path, filename="earlier", save_on_train_epoch_end=False, every_n_train_steps=3)
    earlier = fit(tmp_path, Bert(), texts(), saver, max_steps=3, repeats=0)
    checkpoint = torch.load(tmp_path / "earlier.ckpt", weights_only=True)
    record = fit(tmp_path, Bert(), texts(), Standing(), max_steps=2, repeats=0, val=texts(), **every(2))
    assert record["charges"]["earlier"] == {
        "count": 1,
        "seconds": pytest.approx(earlier["reference_seconds"]),
        "flops": earlier["flops"],
    }
    assert record["steps"] == 2
    assert record["flops"] == earlier["flops"] * 5 // 3
    steps = sum(shape["count"] * shape["seconds_each"] for shape in train_kinds(record))
    assert record["reference_seconds"] == pytest.approx(steps + earlier["reference_seconds"])
    assert record["wall_seconds"] > earlier["wall_seconds"] - 0.1  # its checkpoint is from just before its end
    assert [point["flops"] for point in record["curve"]] == [record["flops"]]


def test_counts_of_an_earlier_version_are_left_with_a_warning(tmp_path):
    earlier, standing = CostMeter(repeats=0), SimpleNamespace(callbacks=[CostMeter()])
    saver = ModelCheckpoint(tmp_path, filename="earlier", save_on_train_epoch_end=False, every_n_train_steps=3)
    fit(tmp_path, Bert(), texts(), earlier, saver, max_steps=3)
    checkpoint = torch.load(tmp_path / "earlier.ckpt", weights_only=True)
    assert charge_run(standing, "earlier", checkpoint)  # type: ignore[arg-type]
    state = checkpoint["callbacks"]["CostMeter"]
    del state["form"]
    state["stages"] = [{"shape": stage.pop("kind")} | stage for stage in state["stages"]]
    torch.save(checkpoint, tmp_path / "old.ckpt")
    assert not charge_run(standing, "old", checkpoint)  # type: ignore[arg-type]
    assert list(standing.callbacks[0].ledger.charges) == ["earlier"]
    with pytest.warns(match="counted from this step on"):
        record = fit(tmp_path, Bert(), texts(), max_steps=5, repeats=0, ckpt_path=tmp_path / "old.ckpt")
    assert record["steps"] == 2


def test_recompiles_are_charged_and_replays_are_not(tmp_path):
    torch._dynamo.reset()
    model = Bert(dropout=0.0)
    model.encoder.compile(backend="eager")  # the list of blocks changes, so each growth compiles it anew
    stacking = ProgressiveStacking([(0.0, 1), (0.3, 2), (0.6, 4)])
    record = fit(tmp_path, model, texts(), stacking, max_steps=12)
    assert record["charges"]["recompile"]["count"] == 3
    assert record["charges"]["recompile"]["seconds"] > 0
    torch._dynamo.reset()
    model = Bert(dropout=0.0)
    for block in model.encoder.blocks:
        block.compile(backend="eager")
    record = fit(tmp_path, model, texts(), stacking_again := ProgressiveStacking([(0.0, 1), (0.5, 4)]), max_steps=12)
    assert stacking_again is not None
    assert record["charges"]["recompile"]["count"] == 1, "blocks compiled one by one need one graph"


def test_validation_is_counted_apart(tmp_path):
    alone = fit(tmp_path / "alone", Bert(dropout=0.0), texts(), max_steps=6)
    record = fit(tmp_path / "with", Bert(dropout=0.0), texts(), max_steps=6, val=texts(10), **every(2))
    assert record["flops"] == alone["flops"]
    assert record["validation"]["samples"] == 3 * 10
    forward = 2 * (4 * 12 * WIDTH**2 * T + (WIDTH**2 + WIDTH * V) * M) + 4 * 4 * T**2 * WIDTH
    assert record["validation"]["flops"] == 30 * forward
    assert record["validation"]["reference_seconds"] > 0
    assert [p["step"] for p in record["curve"]] == [2, 4, 6]


def test_a_step_that_cannot_be_replayed_keeps_its_price_from_the_run(tmp_path):
    class Once(Bert):
        def training_step(self, batch, batch_idx):
            if replaying(self.trainer):
                torch.rand(3)
                raise RuntimeError("I will not")
            return super().training_step(batch, batch_idx)

    with pytest.warns(UserWarning, match="could not replay a step .I will not.") as caught:
        without, with_meter, meter = both_warning(tmp_path, Once)
    assert sum("could not replay" in str(w.message) for w in caught) == 1
    assert_same(without, with_meter)
    shapes = train_kinds(meter.ledger.record())
    assert all(shape["price"] == "run" and shape["seconds_each"] > 0 for shape in shapes)


def both_warning(tmp_path: Path, make: Any) -> tuple[Any, Any, CostMeter]:
    left, meter = [], CostMeter(repeats=3)
    for other in (CostMeter(repeats=0), meter):
        module, trainer = make(), trainer_of(tmp_path, other, max_steps=5)
        torch.manual_seed(1)
        trainer.fit(module, texts())
        left.append(everything(trainer, module) | {"random": torch.get_rng_state()})
    return left[0], left[1], meter


def test_copies_that_do_not_fit_into_memory_are_not_made(tmp_path, monkeypatch):
    monkeypatch.setattr("lit_scale.restoring._free_memory", lambda: 1000)
    with pytest.warns(UserWarning, match="copies of weights and optimizer state need"):
        record = fit(tmp_path, Bert(), texts(), max_steps=5)
    assert {shape["price"] for shape in record["step_kinds"]} == {"run"}


def test_manual_optimization_is_counted_and_priced_from_the_run(tmp_path):
    class Manual(Convolutions):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch):
            optimizer: Any = self.optimizers()
            loss = F.cross_entropy(self.net(batch[0]), batch[1])
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    record = fit(tmp_path, Manual(), images(), max_steps=6)
    assert (record["steps"], record["samples"]) == (6, 24)
    assert record["flops"] > 0 < record["reference_seconds"]
    assert {shape["price"] for shape in record["step_kinds"]} == {"run"}


# -- costs in plain steps ---------------------------------------------------------------------------------------------


def test_a_plain_run_costs_as_many_plain_steps_as_it_made(tmp_path):
    record = fit(tmp_path, Bert(), texts(), max_steps=6)
    (kind,) = train_kinds(record)
    assert record["plain_step_seconds"] == kind["seconds_each"]
    assert record["plain_step_flops"] == kind["flops_each"]
    assert record["cost_in_plain_steps"] == pytest.approx(6)
    assert record["prices"] == "replay"
    assert "no_plain_step" not in record
    from_the_run = fit(tmp_path, Bert(), texts(), max_steps=6, repeats=0)
    assert from_the_run["cost_in_plain_steps"] == pytest.approx(6)
    assert from_the_run["prices"] == "run"


def test_a_techniques_run_is_told_in_its_own_plain_steps_with_its_charges(tmp_path):
    stacking = ProgressiveStacking([(0.0, 1), (0.5, 4)])
    record = fit(tmp_path, Bert(dropout=0.0), texts(), Choosing(before=0.02), stacking, max_steps=12)
    (plain,) = [kind for kind in train_kinds(record) if kind["plain"]]
    steps = sum(kind["count"] * kind["seconds_each"] for kind in train_kinds(record))
    charges = sum(one["seconds"] for one in record["charges"].values())
    assert charges > 12 * 0.02
    assert record["cost_in_plain_steps"] == pytest.approx((steps + charges) / plain["seconds_each"])
    assert record["plain_step_flops"] == bert_flops(4, T, 4)


def test_of_several_plain_steps_the_most_frequent_one_is_the_unit(tmp_path):
    record = fit(tmp_path, Bert(), texts(10), max_epochs=3)  # of 4, 4 and 2 samples
    assert record["plain_step_flops"] == max(kind["flops_each"] for kind in train_kinds(record))
    assert 6 < record["cost_in_plain_steps"] < 9 + 3


def test_a_plain_step_that_is_only_priced_waits_for_its_batch_too(tmp_path):
    """Otherwise a technique without plain steps would look dearer by the loader's share of a step."""

    class Slow(list):
        def __getitem__(self, index):
            time.sleep(0.01)
            return super().__getitem__(index)

    samples: Any = Slow(list(cast(Any, texts().dataset)))
    loader: Any = DataLoader(samples, 4)  # 40 ms a batch; a step takes a tenth of that
    record = fit(tmp_path, Bert(), loader, Tokens(3), max_steps=9)
    assert not any(kind["plain"] for kind in train_kinds(record) if kind["count"])
    assert record["plain_step_seconds"] > 0.03
    assert record["cost_in_plain_steps"] == pytest.approx(9, rel=0.25)


def test_a_run_without_a_plain_step_says_why_it_has_no_cost_in_them(tmp_path):
    class Formless(Tokens):
        def plain_step_kind(self):
            return None

    record = fit(tmp_path, Bert(), texts(), Formless(3), max_steps=3)
    assert record["cost_in_plain_steps"] is record["plain_step_seconds"] is record["plain_step_flops"] is None
    assert "cannot say what one would be" in record["no_plain_step"]
    assert record["reference_seconds"] > 0
    short = fit(tmp_path, Bert(), texts(), max_steps=1, repeats=0)  # the first step of a kind has its FLOPs counted
    assert short["cost_in_plain_steps"] is None
    assert "too short" in short["no_plain_step"]


def test_many_shapes_keep_the_replay_short(tmp_path, monkeypatch):
    monkeypatch.setattr("lit_scale.cost.meter._REPLAYED", 2)
    record = fit(tmp_path, Bert(), texts(16, lengths=(4, 5, 6, 7)), max_epochs=2, repeats=1)
    assert [shape["price"] for shape in train_kinds(record)] == ["replay", "replay", "run", "run"]


def test_an_exception_in_the_first_step_leaves_no_mode_behind(tmp_path):
    class Fails(Bert):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("first step")

    stance = torch._dynamo.eval_frame._stance.stance
    with pytest.raises(RuntimeError, match="first step"):
        fit(tmp_path, Fails(), texts(), max_steps=3)
    assert _get_current_dispatch_mode() is None
    assert torch._dynamo.eval_frame._stance.stance == stance


# -- resume -----------------------------------------------------------------------------------------------------------

TIMES = (
    *("reference_seconds", "wall_seconds", "cpu_seconds", "peak_memory_bytes", "charges", "seconds_each", "price"),
    *("prices", "plain_step_seconds", "cost_in_plain_steps"),
)


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without_times(one) for name, one in value.items() if name not in TIMES}
    return [without_times(one) for one in value] if isinstance(value, list) else value


@pytest.mark.parametrize("stop", [1, 5, 6, 8, 11])
def test_a_resumed_run_has_the_record_of_an_uninterrupted_one(tmp_path, stop):
    def run(root, **options):
        loaders = [ResumableLoader(texts(10).dataset, 4, shuffle=shuffle) for shuffle in (True, False)]
        callbacks = [ProgressiveStacking([(0.0, 1), (0.4, 2), (0.5, 4)]), CostMeter(repeats=1), StepSeed(3)]
        save = ModelCheckpoint(root, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        return fit(root, Bert(), loaders[0], *callbacks, save, max_steps=12, val=loaders[1], **every(2), **options)

    whole = run(tmp_path / "whole")
    checkpoint = torch.load(tmp_path / "whole" / f"step={stop}.ckpt", weights_only=True)
    state = checkpoint["callbacks"]["CostMeter"]
    assert sum(n for key, n in state["counts"] if dict(key)["phase"] == "train") == stop
    again = run(tmp_path / "again", ckpt_path=tmp_path / "whole" / f"step={stop}.ckpt")
    expected, got = without_times(whole), without_times(again)
    assert whole["charges"]["growth"]["count"] == again["charges"]["growth"]["count"] == 2
    if stop % 2 == 0:  # Lightning skips the validation that should follow a step it resumes from
        for record in (expected, got):
            record["curve"] = [p for p in record["curve"] if p["step"] != stop]
            for part in (record["stages"], record["step_kinds"], record["validation"]):
                drop_validation(part)
    assert got == expected
    assert again["wall_seconds"] > 0


def drop_validation(part: Any) -> None:
    if isinstance(part, dict):
        part.clear()
    else:
        part[:] = [{k: v for k, v in one.items() if k != "metrics"} for one in part if one.get("phase") != "validate"]


def test_the_meter_refuses_to_resume_without_the_technique(tmp_path):
    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    fit(tmp_path, Bert(), texts(), ProgressiveStacking([(0.0, 1), (0.5, 4)]), CostMeter(repeats=0), save, max_steps=4)

    with pytest.raises(ValueError, match="trained with ProgressiveStacking, which is missing"):
        fit(tmp_path, Bert(), texts(), max_steps=8, ckpt_path=tmp_path / "step=1.ckpt")


def test_training_on_after_the_end_counts_on(tmp_path):
    meter = CostMeter(repeats=1)
    trainer = trainer_of(tmp_path, meter, max_steps=3)
    model = Bert()
    trainer.fit(model, texts())
    trainer.fit_loop.epoch_loop.max_steps = 7
    trainer.fit(model, texts())
    assert meter.totals()["steps"] == 7


# -- refusals and the record ------------------------------------------------------------------------------------------


def test_wrong_arguments_and_a_wrong_order_are_refused(tmp_path):
    with pytest.raises(ValueError, match="repeats=-1 must not be negative"):
        CostMeter(repeats=-1)
    with pytest.raises(ValueError, match="put CostMeter behind ProgressiveStacking"):
        fit(tmp_path, Bert(), texts(), CostMeter(), ProgressiveStacking(), max_steps=4)


def test_the_record_says_what_was_run_and_on_what(tmp_path):
    meter = CostMeter(recipe="tiny", technique="progressive_stacking", repeats=1, extra={"command": "python tiny.py"})
    stacking = ProgressiveStacking([(0.0, 1), (0.5, 4)])
    record = fit(tmp_path, Bert(), texts(), stacking, meter, max_steps=4, val=texts(4), **every(2))
    names = """recipe technique baseline seed steps samples tokens flops reference_seconds wall_seconds cpu_seconds
        peak_memory_bytes optimizer_state_bytes parameters metrics curve stages step_kinds charges validation versions
        hardware precision hparams world_size command"""
    assert set(names.split()) <= set(record)
    assert (record["recipe"], record["technique"], record["baseline"]) == ("tiny", "progressive_stacking", False)
    assert set(record["metrics"]) == {"val/loss", "val/accuracy", "val/perplexity"}
    assert record["metrics"] == record["curve"][-1]["metrics"]
    assert record["parameters"] == sum(p.numel() for p in Bert().parameters())
    assert record["hparams"]["depth"] == 4
    assert record["versions"] == versions()
    assert {"python", "torch", "lightning"} <= set(record["versions"])
    assert record["hardware"] == hardware()
    assert record["hardware"]["threads"] == torch.get_num_threads()
    assert len(record["hardware"]["cpu"]) > 2
    assert record["peak_memory_bytes"] > 2**20
    assert list(tmp_path.glob(".result.json*")) == []


def test_a_validation_afterwards_completes_the_record(tmp_path):
    meter = CostMeter(repeats=1)
    trainer, model = trainer_of(tmp_path, meter, max_steps=5, limit_val_batches=0), Bert()
    trainer.fit(model, texts())
    assert json.loads((tmp_path / "result.json").read_text())["curve"] == []
    trainer = trainer_of(tmp_path, meter, max_steps=5)
    trainer.validate(model, texts(4), verbose=False)
    record = json.loads((tmp_path / "result.json").read_text())
    assert math.isfinite(record["metrics"]["val/loss"])
    assert record["curve"][-1]["flops"] == record["flops"]


def test_the_state_is_numbers_and_strings_and_copies_nothing_alive(tmp_path):
    meter = CostMeter(repeats=0)
    fit(tmp_path, Bert(), texts(), meter, max_steps=3, val=texts(4))
    torch.save(meter.state_dict(), tmp_path / "state.pt")
    again = CostMeter()
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert again.totals() == meter.totals()
    assert copy.deepcopy(again.state_dict()) == again.state_dict()


# -- processes --------------------------------------------------------------------------------------------------------

TWO_RANKS = """
import os, sys
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader
from lit_scale.callbacks import ProgressiveStacking
from lit_scale.cost import CostMeter
from lit_scale.models import BertMLM

def sentences(length, size):
    ids = torch.randint(24, (size, length), generator=torch.Generator().manual_seed(length))
    return [{"input_ids": row, "positions": torch.arange(2), "labels": row[:2]} for row in ids]

if __name__ == "__main__":
    torch.set_num_threads(1)
    rank = int(os.environ.get("LOCAL_RANK", 0))
    train = sentences(8, 16) if rank == 0 else sentences(6, 8) + sentences(4, 8)  # other shapes on rank 1
    model = BertMLM(24, 8, depth=4, width=16, num_heads=2)
    meter = CostMeter(recipe="two", repeats=2)
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, use_distributed_sampler=False, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=sys.argv[1],
        callbacks=[ProgressiveStacking([(0.0, 1), (0.5, 4)]), meter], val_check_interval=2, num_sanity_val_steps=0,
    )
    trainer.fit(model, DataLoader(train, 4), DataLoader(sentences(8, 4), 4))
    trainer.validate(model, DataLoader(sentences(8, 4), 4), verbose=False)
    assert meter.totals()["tokens"] == 4 * 32 + 2 * 24 + 2 * 16, meter.totals()  # known to both ranks
"""


@pytest.mark.slow
def test_two_processes_write_one_record_of_the_whole_run(tmp_path, run_python):
    done = run_python(TWO_RANKS, tmp_path / "run")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (record["world_size"], record["steps"], record["samples"]) == (2, 4, 32)
    assert record["tokens"] == 4 * 32 + 2 * 24 + 2 * 16
    assert record["flops"] == sum(
        2 * bert_flops(4, 8, blocks) + bert_flops(4, 6 if blocks == 1 else 4, blocks) * 2 for blocks in (1, 4)
    )
    assert [(s["progressive_stacking/blocks"], s["steps"], s["tokens"]) for s in record["stages"]] == [
        (1, 2, 112),
        (4, 2, 96),
    ]
    assert [(p["step"], p["tokens"]) for p in record["curve"]] == [(2, 112), (4, 208)]
    assert record["curve"][-1]["flops"] == record["flops"]
    charged = sum(one["seconds"] for one in record["charges"].values())
    total = sum(shape["count"] * shape["seconds_each"] for shape in train_kinds(record)) / 2 + charged
    assert record["reference_seconds"] == pytest.approx(total)
    assert 0 < record["reference_seconds"] < record["wall_seconds"]
