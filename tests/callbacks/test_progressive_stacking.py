import copy
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lit_scale.callbacks import ProgressiveStacking
from lit_scale.callbacks.progressive_stacking import blocks_at_depth, growth_map
from lit_scale.cost import CostMeter
from lit_scale.guards import StepSeed
from lit_scale.models import BertMLM
from lit_scale.trainers import callbacks_of
from tests.support.data import loader
from tests.support.equality import assert_same, same
from tests.support.networks import DEPTH, FOREIGN, OPTIMIZERS, all_blocks, build, path_of
from tests.support.training import Recorder, StepTimer, fit, left, quiet_trainer, save_every_step

pytestmark = [pytest.mark.filterwarnings("ignore")]

STEPS = 8
STAGES = [(0.0, 0.25), (0.25, 0.5), (0.625, 1.0)]  # 1, 2 and 4 blocks, from steps 0, 2 and 5
EVERYTHING = ["bert", *FOREIGN]


def same_tensors(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return list(one) == list(other) and same(one, other)


# ---- what is copied


def test_the_copy_maps_are_those_of_the_paper() -> None:
    # Gong et al., algorithm 1 with figure 2b: T' = T stacked on T, so block l of the upper half is block l - L
    assert growth_map((0, 1, 2), (0, 1, 2, 3, 4, 5)) == {3: 0, 4: 1, 5: 2}
    assert growth_map((0, 1), tuple(range(6))) == {2: 0, 3: 1, 4: 0, 5: 1}
    # interpolation, as No Train No Gain calls it: each block is followed by its copy, A B becomes A A B B
    assert growth_map((0, 2), (0, 1, 2, 3), "interleave") == {1: 0, 3: 2}
    assert growth_map((0, 4), tuple(range(8)), "interleave") == {1: 0, 2: 0, 3: 0, 5: 4, 6: 4, 7: 4}
    assert blocks_at_depth(3, 6) == (0, 1, 2)
    assert blocks_at_depth(3, 6, "interleave") == (0, 2, 4)


# ---- growth against a reference that builds a larger network and copies by name

# For each growth operator and depth: which block of the network before becomes which of the deeper one, by hand.
SOURCES = {"stack": {2: [0, 0], 4: [0, 1, 0, 1]}, "interleave": {2: [0, 0], 4: [0, 0, 1, 1]}}


class SeedEachBatch(Callback):
    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        torch.manual_seed(1_000 + trainer.fit_loop.total_batch_idx)


def reference_optimizer(name: str, module: nn.Module) -> Optimizer:
    if name != "bert":
        return torch.optim.AdamW(module.parameters(), lr=3e-3, weight_decay=0.1)
    vectors = [p for p in module.parameters() if p.ndim <= 1]
    matrices = [p for p in module.parameters() if p.ndim > 1]
    groups = [{"params": vectors, "weight_decay": 0.0}, {"params": matrices, "weight_decay": 0.1}]
    return torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.98), fused=True)


def reference_rates(name: str, steps: int) -> list[float]:
    if name == "bert":
        done = [step / steps for step in range(steps)]
        return [3e-3 * (p / 0.05 if p < 0.05 else 0.5 * (1 + math.cos(math.pi * (p - 0.05) / 0.95))) for p in done]
    dummy = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(dummy, T_max=100)
    rates: list[float] = []
    for _ in range(steps):
        rates += map(float, schedule.get_last_lr())
        dummy.step()
        schedule.step()
    return rates


def rename(name: str, path: str, sources: list[int]) -> str:
    """The parameter of the shallow network that a parameter of the deep one starts from."""
    if not name.startswith(f"{path}."):
        return name
    index, rest = name[len(path) + 1 :].split(".", 1)
    return f"{path}.{sources[int(index)]}.{rest}"


def train_reference(
    name: str,
    batches: Iterator[Any],
    *,
    growth: str = "stack",
    moments: str = "copy",
    accumulate: int = 1,
    clip: float | None = None,
    **options: Any,
) -> nn.Module:
    """Train at depths 1, 2 and 4 in plain PyTorch, building a new network and a new optimizer at each growth."""
    full = build(name, **options)
    path = path_of(full)
    module = build(name, depth=1, **options)
    module.load_state_dict({key: value for key, value in full.state_dict().items() if key in module.state_dict()})
    optimizer = reference_optimizer(name, module)
    micro_batches = 0
    for step, rate in enumerate(reference_rates(name, STEPS)):
        if step in (2, 5):
            sources = SOURCES[growth][{2: 2, 5: 4}[step]]
            deeper = build(name, depth=len(sources), **options)
            old = module.state_dict()
            deeper.load_state_dict({key: old[rename(key, path, sources)] for key in deeper.state_dict()})
            states = {key: optimizer.state[parameter] for key, parameter in module.named_parameters()}
            module, optimizer = deeper, reference_optimizer(name, deeper)
            old_blocks = {"stack": len(sources) // 2 * [True] + len(sources) // 2 * [False]}.get(growth)
            for key, parameter in module.named_parameters():
                if moments == "reset":
                    continue
                state = copy.deepcopy(states[rename(key, path, sources)])
                if moments == "copy_step0" and key.startswith(f"{path}."):
                    assert old_blocks is not None
                    if not old_blocks[int(key[len(path) + 1 :].split(".")[0])]:
                        state["step"] = torch.zeros(())
                if state:
                    optimizer.state[parameter] = state
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        for _ in range(accumulate):
            torch.manual_seed(1_000 + micro_batches)
            (module.per_sample_loss(next(batches)).mean() / accumulate).backward()
            micro_batches += 1
        if clip is not None:
            nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], clip)
        optimizer.step()
    return module


@pytest.mark.parametrize(
    ("name", "options", "accumulate", "clip"),
    [
        ("bert", {}, 1, None),
        ("bert", {"growth": "interleave"}, 1, None),
        ("bert", {"moments": "reset"}, 1, None),
        ("bert", {"moments": "copy_step0"}, 1, None),
        ("bert", {}, 2, 0.05),
        ("timm_vit", {"growth": "interleave"}, 2, None),
        ("hf_bert", {}, 1, 0.05),
        ("hf_gpt2", {"moments": "reset"}, 1, 0.05),
        ("torch_encoder", {}, 1, None),
        ("plain_torch", {"growth": "interleave", "moments": "reset"}, 1, None),
    ],
)
def test_growth_equals_building_a_deeper_network(
    name: str, options: dict[str, Any], accumulate: int, clip: float | None, tmp_path: Path
) -> None:
    dropout = 0.0 if name == "timm_vit" else 0.1  # stochastic depth of a block depends on the depth of the network
    module = build(name, dropout=dropout)
    trainer = quiet_trainer(
        tmp_path,
        max_steps=STEPS,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=clip,
        callbacks=[SeedEachBatch(), ProgressiveStacking(STAGES, **options)],
    )
    trainer.fit(module, loader(name))

    def endless() -> Iterator[Any]:
        source = loader(name)
        while True:
            yield from source

    expected = train_reference(name, endless(), accumulate=accumulate, clip=clip, dropout=dropout, **options)
    assert same_tensors(module.state_dict(), expected.state_dict())
    assert type(module.get_submodule(path_of(module))).__name__ in {"ModuleList", "Sequential", "BlockList"}


# ---- exact resume


@dataclass
class Run:
    """What a run leaves behind, and what was seen on the way."""

    left: dict[str, Any]
    losses: list[float]
    depths: list[tuple[int, int]]


def train(
    name: str,
    root: Path,
    *,
    resume: Path | None = None,
    save: Path | None = None,
    stacking: dict[str, Any] | None = None,
    ema: str | None = None,
    plain_loader: bool = False,
    workers: int = 0,
    size: int = 20,
    also: Iterable[Callback] = (),
    **options: Any,
) -> Run:
    module = build(name, seed=1 if resume else 0)
    recorder = Recorder(path_of(module))
    callbacks: list[Callback] = [ProgressiveStacking(**({"stages": STAGES} | (stacking or {}))), recorder]
    if ema is not None:
        callbacks.insert({"first": 0, "last": 1}[ema], EMAWeightAveraging(decay=0.5))
    callbacks += [*([save_every_step(save)] if save else []), *also]
    data: Any = loader(name, size=size, num_workers=workers)
    if plain_loader:
        data = DataLoader(data.dataset, 4)
    options = ({} if "max_epochs" in options else {"max_steps": STEPS}) | options
    options |= {"val": loader(name, size=4, shuffle=False), "val_check_interval": 1, "log_every_n_steps": 1}
    trainer = fit(module, data, root, *callbacks, resume=resume, **options)
    assert trainer.global_step == STEPS
    return Run(left(trainer), recorder.losses, recorder.depths)


def assert_ends_alike(whole: Run, resumed: Run, where: str = "") -> None:
    assert_same(whole.left, resumed.left, where)
    count = len(resumed.losses)
    assert 0 < count < len(whole.losses)
    assert (whole.losses[-count:], whole.depths[-count:]) == (resumed.losses, resumed.depths), where


def check_resume(name: str, root: Path, stops: Iterable[int] = range(1, STEPS), **options: Any) -> Run:
    whole = train(name, root, save=root / "whole", **options)
    for stop in stops:
        resumed = train(name, root, resume=root / "whole" / f"step={stop}.ckpt", **options)
        assert_ends_alike(whole, resumed, f"resumed from step {stop}")
    return whole


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="growth at the end of an epoch"),
        pytest.param({"max_epochs": 2, "size": 16}, id="limited by epochs"),
        pytest.param({"accumulate_grad_batches": 2, "gradient_clip_val": 0.05}, id="accumulation and clipping"),
        pytest.param({"ema": "first"}, id="average before"),
        pytest.param({"ema": "last", "accumulate_grad_batches": 2}, id="average behind, accumulation"),
        pytest.param({"stacking": {"rewarmup": 0.3, "freeze_old": True}}, id="re-warm-up, frozen"),
        pytest.param({"stacking": {"growth": "interleave", "moments": "reset"}}, id="interleaved, reset"),
        pytest.param({"stacking": {"moments": "copy_step0"}, "ema": "last"}, id="step 0"),
        pytest.param({"precision": "bf16-mixed"}, id="mixed precision"),
        pytest.param({"workers": 2}, id="workers"),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one_from_any_step(options: dict[str, Any], tmp_path: Path) -> None:
    whole = check_resume("bert", tmp_path, **options)
    assert {depth for _, depth in whole.depths} >= {1, 4}


@pytest.mark.parametrize("ema", [None, "first", "last"])
@pytest.mark.parametrize("moment", ["validation end", "epoch end"])
def test_a_file_from_the_end_of_an_epoch_resumes_too(moment: str, ema: str | None, tmp_path: Path) -> None:
    # the epoch ends where the growth is due, and the file is the one before it
    options: dict[str, Any] = {"stacking": {"stages": [(0.0, 2), (0.5, 4)]}, "max_epochs": 2, "size": 16, "ema": ema}
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=moment == "epoch end")
    whole = train("bert", tmp_path, also=[saving], **options)
    path = tmp_path / "epoch=0.ckpt"
    assert any("find_blocks" in key for key in torch.load(path, weights_only=True)["state_dict"])
    resumed = train("bert", tmp_path, resume=path, **options)
    assert_ends_alike(whole, resumed)
    assert resumed.depths == [(5, 4), (6, 4), (7, 4), (8, 4)]


@pytest.mark.parametrize("name", FOREIGN)
def test_any_network_grows_and_resumes_exactly(name: str, tmp_path: Path) -> None:
    whole = check_resume(name, tmp_path, stops=(1, 2, 3, 5, 6))  # before, at and after a growth; at an epoch's end
    assert whole.depths == [(step + 1, 1 if step < 2 else 2 if step < 5 else 4) for step in range(STEPS)]


@pytest.mark.parametrize("options", [{"step_seed": False}, {"plain_loader": True}], ids=["no StepSeed", "plain loader"])
def test_without_the_parts_that_make_it_exact_a_resumed_run_differs(options: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    train("bert", tmp_path, save=tmp_path / "whole", **options)
    torch.manual_seed(0)
    whole = train("bert", tmp_path, **options)
    torch.manual_seed(0)
    assert_same(whole.left, train("bert", tmp_path, **options).left)  # the run itself repeats
    resumed = train("bert", tmp_path, resume=tmp_path / "whole" / "step=3.ckpt", **options)
    assert not same(whole.left["weights"], resumed.left["weights"])


# ---- when it grows


def due(step: int, total: int, stages: Sequence[tuple[Fraction, int]]) -> int:
    """The depth at a step, in exact arithmetic: a stage begins at the first step that is not before its start."""
    return [depth for start, depth in stages if step >= start * total][-1]


@pytest.mark.parametrize(
    ("limits", "total"),
    [
        ({"max_steps": 10}, 10),
        ({"max_steps": 7}, 7),
        ({"max_epochs": 2}, 10),
        ({"max_epochs": 3, "limit_train_batches": 3}, 9),
        ({"max_epochs": 4, "accumulate_grad_batches": 2}, 12),  # of 5 batches each: the third step has one
        ({"max_steps": 6, "accumulate_grad_batches": 3}, 6),
        ({"max_steps": 100, "max_epochs": 2}, 10),
    ],
    ids=str,
)
def test_it_grows_at_the_first_step_of_each_stage(limits: dict[str, Any], total: int, tmp_path: Path) -> None:
    module = build("plain_torch")
    recorder = Recorder(path_of(module))
    stacking = ProgressiveStacking([(0.0, 1), (0.3, 2), (0.7, 4)])
    trainer = quiet_trainer(tmp_path, callbacks=[stacking, recorder], **limits)
    trainer.fit(module, loader("plain_torch", size=20))
    assert trainer.global_step == total
    stages = [(Fraction(0), 1), (Fraction(3, 10), 2), (Fraction(7, 10), 4)]
    previous = 0
    for done, depth in recorder.depths:  # one for each micro-batch: nothing changes within an accumulation window
        assert depth == due(previous, total, stages)
        previous = done


def test_a_run_limited_by_time_goes_through_all_stages(tmp_path: Path) -> None:
    module = build("plain_torch")
    recorder = Recorder(path_of(module))
    callbacks = [StepTimer(), ProgressiveStacking(STAGES), recorder]
    quiet_trainer(tmp_path, max_epochs=-1, callbacks=callbacks).fit(module, loader("plain_torch"))
    assert [depth for _, depth in recorder.depths] == [1, 1, 2, 2, 2, 4, 4, 4]
    recorder = Recorder(path_of(module))
    trainer = quiet_trainer(
        tmp_path, max_time={"seconds": 1}, max_epochs=-1, callbacks=[ProgressiveStacking(STAGES), recorder]
    )
    trainer.fit(module, loader("plain_torch"))  # on a real clock
    depths = [depth for _, depth in recorder.depths]
    assert depths == sorted(depths)


def test_stages_that_fall_into_one_step_are_made_up_for_one_by_one(tmp_path: Path) -> None:
    module = build("plain_torch")
    recorder = Recorder(path_of(module))
    stacking = ProgressiveStacking([(0.0, 1), (0.3, 2), (0.4, 4)])
    quiet_trainer(tmp_path, max_steps=2, callbacks=[stacking, recorder]).fit(module, loader("plain_torch"))
    assert [depth for _, depth in recorder.depths] == [1, 4]


def test_the_number_of_active_blocks_is_logged_where_lightning_writes(tmp_path: Path) -> None:
    logger = DictLogger()
    trainer = quiet_trainer(
        tmp_path, max_steps=STEPS, callbacks=[ProgressiveStacking(STAGES)], logger=logger, log_every_n_steps=2
    )
    trainer.fit(build("plain_torch"), loader("plain_torch"))
    written = {step: row["progressive_stacking/active_blocks"] for step, row in logger.rows if "train/loss" in row}
    assert written == {1: 1.0, 3: 2.0, 5: 4.0, 7: 4.0}


class DictLogger(Logger):
    name = version = "memory"

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass


def test_a_second_fit_of_the_same_model_starts_over(tmp_path: Path) -> None:
    module, stacking = build("plain_torch"), ProgressiveStacking(STAGES)
    depths = []
    for _ in range(2):
        recorder = Recorder(path_of(module))
        before = copy.deepcopy(module)
        trainer = quiet_trainer(tmp_path, max_steps=STEPS, callbacks=[StepSeed(), stacking, recorder])
        trainer.fit(module, loader("plain_torch"))
        depths.append(recorder.depths)
    assert depths[0] == depths[1]
    trainer = quiet_trainer(tmp_path, max_steps=STEPS, callbacks=[StepSeed(), ProgressiveStacking(STAGES)])
    trainer.fit(before, loader("plain_torch"))
    assert same_tensors(before.state_dict(), module.state_dict())  # nothing of the first fit was left over


def test_a_fit_that_ended_half_grown_is_taken_up_at_its_depth(tmp_path: Path) -> None:
    module = build("plain_torch")
    trainer = quiet_trainer(tmp_path, max_steps=STEPS, callbacks=[ProgressiveStacking(STAGES), StopAt(3)])
    trainer.fit(module, loader("plain_torch"))
    assert len(module.net.layers) == 2
    recorder = Recorder(path_of(module))
    trainer = quiet_trainer(tmp_path, max_steps=STEPS, callbacks=[ProgressiveStacking(STAGES), recorder])
    trainer.fit(module, loader("plain_torch"))
    assert [depth for _, depth in recorder.depths] == [2] * 5 + [4] * 3


class StopAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.step


def test_weights_that_are_loaded_in_the_modules_setup_leave_the_stages_as_they_are(tmp_path: Path) -> None:
    module: Any = build("plain_torch")
    pretrained = build("plain_torch", seed=5).state_dict()
    module.setup = lambda stage: module.load_state_dict(pretrained)
    recorder = Recorder(path_of(module))
    trainer = quiet_trainer(tmp_path, max_steps=STEPS, callbacks=[ProgressiveStacking(STAGES), recorder])
    trainer.fit(module, loader("plain_torch"))
    assert [depth for _, depth in recorder.depths] == [1, 1, 2, 2, 2, 4, 4, 4]


# ---- learning rate, frozen blocks, averages, compilation, optimizers


class Applied(Callback):
    """The learning rate of every step as plain SGD applied it to one parameter, and as its schedule had it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.applied: list[float] = []
        self.scheduled: list[float] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self.before = pl_module.get_parameter(self.name).detach().clone()

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        pass

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        self.scheduled += [group["lr"] for group in trainer.optimizers[0].param_groups]

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        parameter = pl_module.get_parameter(self.name)
        assert parameter.grad is not None
        moved = (self.before - parameter.detach()).double()
        self.applied.append((moved.norm() / parameter.grad.double().norm()).item())


def sgd(parameters: Iterable[nn.Parameter]) -> Optimizer:
    return torch.optim.SGD(parameters, lr=0.02)


def test_rewarmup_scales_the_update_and_no_schedule_sees_it(tmp_path: Path) -> None:
    runs = []
    for rewarmup in (0.0, 0.25):
        module, applied = build("plain_torch", optimizer=sgd), Applied("net.head.weight")
        stacking = ProgressiveStacking([(0.0, 1), (0.2, 2), (0.6, 4)], rewarmup=rewarmup)
        trainer = quiet_trainer(tmp_path, max_steps=20, callbacks=[stacking, applied])
        trainer.fit(module, loader("plain_torch"))
        runs.append(applied)
        assert not trainer.optimizers[0]._optimizer_step_pre_hooks
    without, scaled = runs
    assert without.scheduled == scaled.scheduled
    assert without.applied == pytest.approx(without.scheduled, rel=1e-3)
    # over 0.25 x 20 = 5 steps after the growths at steps 4 and 12
    factors = [1.0] * 4 + [0.0, 0.2, 0.4, 0.6, 0.8] + [1.0] * 3 + [0.0, 0.2, 0.4, 0.6, 0.8] + [1.0] * 3
    expected = [factor * rate for factor, rate in zip(factors, scaled.scheduled, strict=True)]
    assert scaled.applied == pytest.approx(expected, rel=1e-3, abs=1e-9)


def test_an_exception_in_a_scaled_step_leaves_the_rate_as_it_was(tmp_path: Path) -> None:
    class Fails(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, *_: Any) -> None:
            assert trainer.optimizers[0].param_groups[0]["lr"] == 0.0 or trainer.global_step < 4
            if trainer.global_step == 4:
                raise RuntimeError("here")

    stacking = ProgressiveStacking([(0.0, 2), (0.5, 4)], rewarmup=0.25)
    trainer = quiet_trainer(tmp_path, max_steps=STEPS, callbacks=[stacking, Fails()])
    with pytest.raises(RuntimeError, match="here"):
        trainer.fit(build("plain_torch", optimizer=sgd), loader("plain_torch"))
    assert trainer.optimizers[0].param_groups[0]["lr"] == trainer.lr_scheduler_configs[0].scheduler.get_last_lr()[0] > 0


class Gradients(Callback):
    """Which top-level parts and blocks got a gradient at each step."""

    def __init__(self, blocks: str) -> None:
        self.blocks = blocks
        self.seen: list[set[str]] = []
        self.weights: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        trained = {name for name, p in pl_module.named_parameters() if p.grad is not None and p.grad.count_nonzero()}
        self.seen.append(trained)
        self.weights.append({name: p.detach().clone() for name, p in pl_module.named_parameters()})


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", ["bert", "timm_vit", "torch_encoder"])
def test_freeze_old_trains_only_what_lies_above_the_old_blocks(name: str, compiled: bool, tmp_path: Path) -> None:
    module = build(name, dropout=0.0)
    path = path_of(module)
    if compiled:
        torch._dynamo.reset()
        for block in all_blocks(module, path):
            block.compile(backend="eager")
    kept = module.get_submodule(path)[1]
    kept.forward = functools.partial(own_forward, kept.forward)  # as some libraries do; it must survive
    gradients = Gradients(path)
    trainer = quiet_trainer(
        tmp_path, max_steps=STEPS, callbacks=[ProgressiveStacking(STAGES, freeze_old=True), gradients]
    )
    trainer.fit(module, loader(name))
    assert kept.forward.func is own_forward

    names = [name for name, _ in module.named_parameters()]
    inside = {i: {n for n in names if n.startswith(f"{path}.{i}.")} for i in range(DEPTH)}
    above = {n for n in names if n.split(".")[1 if name != "bert" else 0] in {"head", "head_bias", "norm", "2"}}
    above |= {n for n in names if n.startswith(("net.1.norm", "net.fc_norm", "encoder.norm"))}
    below = {"bert": {"embedding.positions"}, "timm_vit": {"net.pos_embed"}, "torch_encoder": {"net.0.weight"}}
    first, middle, last = gradients.seen[1], gradients.seen[3], gradients.seen[-1]
    assert inside[0] & first
    assert middle & (inside[0] | below[name]) == set()  # nothing at all below the first new block
    assert inside[1] & middle
    assert above & middle
    assert all(inside[i] & last for i in range(DEPTH))
    assert below[name] <= first & last
    for old in inside[0] | below[name]:  # neither decay nor old moments move them
        assert torch.equal(gradients.weights[1][old], gradients.weights[4][old])


def own_forward(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return forward(*args, **kwargs)


class Watch(Callback):
    """The averages of the blocks right after a growth."""

    def __init__(self, blocks: str) -> None:
        self.blocks = blocks
        self.copied: list[list[bool]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step not in (1, 2, 5):
            return
        for callback in callbacks_of(trainer, Callback):
            model = getattr(callback, "_average_model", None)
            if model is not None:
                blocks = all_blocks(model, f"module.{self.blocks}" if hasattr(model, "module") else self.blocks)
                first = blocks[0].state_dict()
                self.copied.append([same_tensors(first, block.state_dict()) for block in blocks[1:]])


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_averages_of_new_blocks_start_as_copies_too(kind: str, order: int, tmp_path: Path) -> None:
    average: Callback = EMAWeightAveraging(decay=0.5)
    if kind == "swa":
        average = StochasticWeightAveraging(swa_lrs=1e-3, swa_epoch_start=1)
    module = build("plain_torch")
    callbacks: list[Callback] = [ProgressiveStacking(STAGES)]
    callbacks.insert(order, average)
    watch = Watch(path_of(module))
    trainer = quiet_trainer(tmp_path, max_epochs=4, callbacks=[*callbacks, watch])
    trainer.fit(module, loader("plain_torch", size=8))
    # of blocks 1, 2, 3 after steps 1, 2 and 5: none is a copy of block 0, then 1 is, then 2 is, and 1 has moved on
    assert watch.copied == [[False, False, False], [True, False, False], [False, True, False]]


def test_an_average_that_missed_growth_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ProgressiveStacking, "_averages", lambda self, trainer: [])
    module = build("plain_torch")
    watch = Watch(path_of(module))
    callbacks = [ProgressiveStacking(STAGES), EMAWeightAveraging(decay=0.5), watch]
    quiet_trainer(tmp_path, max_steps=STEPS, callbacks=callbacks).fit(module, loader("plain_torch", size=8))
    assert watch.copied == [[False] * 3] * 3


@pytest.mark.parametrize("what", ["blocks", "network"])
def test_compiled_networks_grow_as_eager_ones_do(what: str, tmp_path: Path) -> None:
    weights, graphs = [], []
    for compiled in (False, True):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        module = build("torch_encoder", dropout=0.0)
        if compiled and what == "blocks":
            for block in all_blocks(module, path_of(module)):
                block.compile(backend="eager", fullgraph=True)
        elif compiled:
            module.net = torch.compile(module.net, backend="eager", fullgraph=True)
        trainer = quiet_trainer(tmp_path, max_steps=STEPS, callbacks=[ProgressiveStacking(STAGES)])
        trainer.fit(module, loader("torch_encoder"))
        weights.append(list(module.state_dict().values()))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert all(map(torch.equal, *weights))
    assert graphs == [0, {"blocks": 1, "network": len(STAGES)}[what]]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_grows_and_resumes_exactly(name: str, tmp_path: Path) -> None:
    def run(*saving: Callback, resume: Path | None = None) -> dict[str, Any]:
        module = build("plain_torch", seed=1 if resume else 0, optimizer=OPTIMIZERS[name])
        callbacks = [ProgressiveStacking(STAGES, rewarmup=0.1), *saving]
        data = loader("plain_torch", size=20)
        return left(fit(module, data, tmp_path, *callbacks, resume=resume, max_steps=STEPS))

    whole = run(save_every_step(tmp_path / "whole"))
    for step in (2, 4, 6):
        assert_same(whole, run(resume=tmp_path / "whole" / f"step={step}.ckpt"), f"resumed at step {step}")


# ---- a checkpoint from the middle of a run


@pytest.fixture(scope="module")
def half_grown(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a run's checkpoints, by the name of the module; ``step=4.ckpt`` has 2 of 4 blocks active."""

    @functools.cache
    def make(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        train(name, folder, save=folder)
        return folder

    return make


@pytest.mark.parametrize("name", EVERYTHING)
def test_it_is_evaluated_at_the_depth_it_was_trained_to(
    name: str, half_grown: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = half_grown(name)
    weights = torch.load(folder / "step=4.ckpt", weights_only=True)["state_dict"]
    shallow = build(name, depth=2)
    shallow.load_state_dict({key: weights[key] for key in shallow.state_dict()})
    data = loader(name, size=12, shuffle=False)
    (expected,) = quiet_trainer(tmp_path).validate(shallow, data, verbose=False)

    trainer = quiet_trainer(tmp_path, callbacks=[ProgressiveStacking(STAGES)])
    module = build(name, seed=3)
    (found,) = trainer.validate(module, data, ckpt_path=folder / "step=4.ckpt", verbose=False)
    assert found == expected
    assert len(module.get_submodule(path_of(module))) == 2
    (full,) = trainer.validate(module, data, ckpt_path=folder / "step=7.ckpt", verbose=False)
    assert full["val/loss"] != expected["val/loss"]
    assert len(module.get_submodule(path_of(module))) == 4
    if name != "bert":
        module = build(name, seed=3)
        (found,) = trainer.test(module, data, ckpt_path=folder / "step=4.ckpt", verbose=False)
        assert found["test/loss"] == expected["val/loss"]


def test_our_own_model_needs_no_callback_to_be_evaluated(half_grown: Callable[[str], Path], tmp_path: Path) -> None:
    path = half_grown("bert") / "step=4.ckpt"
    data = loader("bert", size=12, shuffle=False)
    trainer = quiet_trainer(tmp_path, callbacks=[ProgressiveStacking(STAGES)])
    expected = trainer.validate(build("bert"), data, ckpt_path=path, verbose=False)
    module = BertMLM.load_from_checkpoint(path)
    assert len(module.encoder.blocks) == 2
    assert quiet_trainer(tmp_path).validate(module, data, verbose=False) == expected
    assert quiet_trainer(tmp_path).validate(build("bert"), data, ckpt_path=path, verbose=False) == expected
    assert len(BertMLM.load_from_checkpoint(path.with_name("step=7.ckpt")).encoder.blocks) == 4


@pytest.mark.parametrize("name", EVERYTHING)
def test_checkpoints_hold_nothing_but_tensors_and_plain_values(name: str, half_grown: Callable[[str], Path]) -> None:
    for step in (2, 4, 7):
        checkpoint = torch.load(half_grown(name) / f"step={step}.ckpt", weights_only=True)
        settings = checkpoint["lit_scale_techniques"]["ProgressiveStacking"]
        assert settings["stages"] == [list(stage) for stage in STAGES]
        partly = [key for key in checkpoint["state_dict"] if "find_blocks" in key]
        assert len(partly) == (step < 5)


def test_the_technique_must_not_be_left_out_at_resume(half_grown: Callable[[str], Path], tmp_path: Path) -> None:
    path = half_grown("bert") / "step=4.ckpt"
    trainer = quiet_trainer(tmp_path, max_steps=STEPS)
    with pytest.raises(ValueError, match=r"trained with ProgressiveStacking, which is missing.*callbacks=\[Progr"):
        trainer.fit(build("bert"), loader("bert", size=20), ckpt_path=path)
    path = half_grown("timm_vit") / "step=4.ckpt"
    trainer = quiet_trainer(tmp_path, max_steps=STEPS)
    with pytest.raises(RuntimeError, match="active blocks: resume with the technique that chose them"):
        trainer.fit(build("timm_vit"), loader("timm_vit", size=20), ckpt_path=path)
    path = half_grown("timm_vit") / "step=6.ckpt"  # fully grown, and so an ordinary checkpoint; the meter still knows
    trainer = quiet_trainer(tmp_path, max_steps=STEPS, callbacks=[CostMeter(repeats=0)])
    with pytest.raises(ValueError, match="trained with ProgressiveStacking, which is missing"):
        trainer.fit(build("timm_vit"), loader("timm_vit", size=20), ckpt_path=path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"stages": [(0.0, 0.5), (0.5, 1.0)]},
            r"stages=\[\[0.0, 0.5\], \[0.5, 1.0\]\].* differs from the checkpoint's",
        ),
        ({"growth": "interleave"}, "growth='interleave'.* differs from the checkpoint's growth='stack'"),
        ({"moments": "reset"}, "moments='reset'.* differs"),
        ({"rewarmup": 0.1}, "rewarmup=0.1.* differs"),
        ({"freeze_old": True}, "freeze_old=True.* differs"),
    ],
)
def test_settings_must_not_change_at_resume(
    options: dict[str, Any], message: str, half_grown: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        train("bert", tmp_path, stacking=options, resume=half_grown("bert") / "step=4.ckpt")


# ---- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": []}, "ascend from 0.0"),
        ({"stages": [(0.1, 2), (0.5, 4)]}, "ascend from 0.0"),
        ({"stages": [(0.0, 1), (0.6, 2), (0.3, 4)]}, "ascend from 0.0"),
        ({"stages": [(0.0, 2), (0.0, 4)]}, "ascend from 0.0"),
        ({"stages": [(0.0, 2), (1.0, 4)]}, "below 1.0"),
        ({"stages": [(0.0, 2), (7, 4)]}, "below 1.0"),
        ({"stages": [(-0.5, 2), (0.5, 4)]}, "ascend from 0.0"),
        ({"stages": [(0.0, 2), (math.nan, 4)]}, "ascend from 0.0"),
        ({"stages": [0.0, 0.5]}, r"write pairs \(start, depth\)"),
        ({"stages": [("soon", 2)]}, r"write pairs \(start, depth\)"),
        ({"stages": 3}, r"write pairs \(start, depth\)"),
        ({"stages": [(0.0, 0), (0.5, 4)]}, "depth 0 is neither"),
        ({"stages": [(0.0, -2), (0.5, 4)]}, "depth -2 is neither"),
        ({"stages": [(0.0, -0.5), (0.5, 1.0)]}, "depth -0.5 is neither"),
        ({"stages": [(0.0, math.nan), (0.5, 1.0)]}, "depth nan is neither"),
        ({"stages": [(0.0, True), (0.5, 4)]}, "depth True is neither"),
        ({"stages": [(0.0, "half"), (0.5, 4)]}, "depth 'half' is neither"),
        ({"stages": [(0.0, 2.0), (0.5, 4.0)]}, "write a number as an int"),
        ({"growth": "double"}, "growth='double': choose 'stack' or 'interleave'"),
        ({"moments": "keep"}, "moments='keep': choose 'copy', 'copy_step0' or 'reset'"),
        ({"rewarmup": 1.0}, "rewarmup=1.0"),
        ({"rewarmup": -0.1}, "rewarmup=-0.1"),
        ({"rewarmup": math.nan}, "rewarmup=nan"),
        ({"freeze_old": True, "growth": "interleave"}, "freeze_old=True needs growth='stack'"),
    ],
)
def test_bad_arguments_are_refused_at_construction(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProgressiveStacking(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": [(0.0, 0.3), (0.5, 1.0)]}, "0.3 of 4 blocks is 1.2, not a whole number"),
        ({"stages": [(0.0, 2), (0.5, 8)]}, "depth 8 is more than the 4 blocks"),
        ({"stages": [(0.0, 3), (0.5, 4)]}, "depth 4 is not a multiple of the depth before it, 3"),
        ({"stages": [(0.0, 4), (0.5, 2)]}, "depth 2 is not a multiple"),
        ({"stages": [(0.0, 2), (0.5, 2)]}, "depth 2 is not a multiple"),
        ({"stages": [(0.0, 1), (0.5, 3)], "growth": "interleave"}, r"depths \[1, 3\] must divide 4"),
        ({"blocks": "net.nowhere"}, "blocks='net.nowhere'.*candidates: 'net.blocks'"),
        ({"blocks": "net.head"}, "blocks='net.head' is a Linear.*candidates: 'net.blocks'"),
    ],
)
@pytest.mark.parametrize("call", ["fit", "validate"])
def test_what_does_not_fit_the_model_is_refused_before_anything_runs(
    options: dict[str, Any], message: str, call: str, tmp_path: Path
) -> None:
    trainer = quiet_trainer(tmp_path, max_steps=STEPS, callbacks=[ProgressiveStacking(**options), MustNotRun()])
    with pytest.raises(ValueError, match=message):
        getattr(trainer, call)(build("timm_vit"), loader("timm_vit"))


class MustNotRun(Callback):
    def on_train_batch_start(self, *_: Any) -> None:
        raise AssertionError("a batch was trained")

    def on_validation_batch_start(self, *_: Any) -> None:
        raise AssertionError("a batch was validated")


def test_a_model_whose_depth_is_of_no_stage_is_refused(half_grown: Callable[[str], Path], tmp_path: Path) -> None:
    module = BertMLM.load_from_checkpoint(half_grown("bert") / "step=4.ckpt")
    trainer = quiet_trainer(tmp_path, max_steps=STEPS, callbacks=[ProgressiveStacking([(0.0, 1), (0.5, 4)])])
    with pytest.raises(ValueError, match=r"blocks \(0, 1\) of 4 active, as in no stage"):
        trainer.fit(module, loader("bert"))


def test_a_step_counter_per_group_cannot_start_anew_for_some_blocks(tmp_path: Path) -> None:
    module = build("plain_torch", optimizer=OPTIMIZERS["LAMB"])
    trainer = quiet_trainer(tmp_path, max_steps=100, callbacks=[ProgressiveStacking(STAGES, moments="copy_step0")])
    with pytest.raises(ValueError, match="moments='copy_step0'.*Lamb"):
        trainer.fit(module, loader("plain_torch"))
    assert trainer.global_step == 1  # long before the growth
