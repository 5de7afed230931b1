import copy
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lit_scale.callbacks import ProgressiveStacking
from lit_scale.callbacks.progressive_stacking import blocks_at_depth, growth_map
from lit_scale.guards import StepSeed
from lit_scale.models import BertMLM
from tests.foreign_models import DEPTH, FOREIGN, Recorder, all_blocks, build, loader, quiet_trainer, save_every_step

pytestmark = [pytest.mark.filterwarnings("ignore")]

STEPS = 8
STAGES = [(0.0, 0.25), (0.25, 0.5), (0.625, 1.0)]  # 1, 2 and 4 blocks, from steps 0, 2 and 5
EVERYTHING = ["bert", *FOREIGN]


def blocks_of(module: LightningModule) -> str:
    return getattr(module, "blocks", "encoder.blocks")


def same_tensors(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return list(one) == list(other) and all(torch.equal(a, b) for a, b in zip(one.values(), other.values(), strict=True))


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
    rates = []
    for _ in range(steps):
        rates += schedule.get_last_lr()
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
    path = blocks_of(full)
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
            (module.per_sample_loss(next(batches)).mean() / accumulate).backward()  # type: ignore[operator]
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
    name: str, options: dict[str, str], accumulate: int, clip: float | None, tmp_path: Path
) -> None:
    dropout = 0.0 if name == "timm_vit" else 0.1  # stochastic depth of a block depends on the depth of the network
    module = build(name, dropout=dropout)
    trainer = quiet_trainer(
        tmp_path,
        max_steps=STEPS,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=clip,
        callbacks=[SeedEachBatch(), ProgressiveStacking(STAGES, **options)],  # type: ignore[arg-type]
    )
    trainer.fit(module, loader(name))

    def endless() -> Iterator[Any]:
        source = loader(name)
        while True:
            yield from source

    expected = train_reference(name, endless(), accumulate=accumulate, clip=clip, dropout=dropout, **options)  # type: ignore[arg-type]
    assert same_tensors(module.state_dict(), expected.state_dict())
    assert type(module.get_submodule(blocks_of(module))).__name__ in {"ModuleList", "Sequential", "BlockList"}


# ---- exact resume


@dataclass
class Run:
    """What a run leaves behind, in a form that can be compared."""

    weights: dict[str, Any]
    averages: dict[str, Any]
    optimizer: dict[str, Any]
    rates: list[float]
    metrics: dict[str, Any]
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
    step_seed: bool = True,
    plain_loader: bool = False,
    workers: int = 0,
    size: int = 20,
    **options: Any,
) -> Run:
    if resume is not None:
        torch.manual_seed(12_345)  # a resumed process has another past
    module = build(name, seed=1 if resume else 0)
    recorder = Recorder(blocks_of(module))
    callbacks: list[Callback] = [ProgressiveStacking(**({"stages": STAGES} | (stacking or {}))), recorder]
    average = EMAWeightAveraging(decay=0.5)
    if ema is not None:
        callbacks.insert({"first": 0, "last": 1}[ema], average)
    callbacks += [StepSeed()] * step_seed + [save_every_step(save)] * (save is not None)
    limit = {} if "max_epochs" in options else {"max_steps": STEPS}
    trainer = quiet_trainer(
        root, callbacks=callbacks, enable_checkpointing=save is not None, val_check_interval=1, **(limit | options)
    )
    train_loader: Any = loader(name, size=size, num_workers=workers)
    if plain_loader:
        train_loader = DataLoader(train_loader.dataset, 4)
    trainer.fit(module, train_loader, loader(name, size=4, shuffle=False), ckpt_path=resume)
    assert trainer.global_step == STEPS
    return Run(
        weights=module.state_dict(),
        averages=average._average_model.state_dict() if average._average_model is not None else {},
        optimizer=trainer.optimizers[0].state_dict(),
        rates=[group["lr"] for group in trainer.optimizers[0].param_groups],
        metrics=dict(trainer.callback_metrics),
        losses=recorder.losses,
        depths=recorder.depths,
    )


def differences(one: Run, other: Run) -> list[str]:
    """What of a whole run and its resumed end is not equal to the last bit."""
    found = [what for what in ("weights", "averages") if not same_tensors(getattr(one, what), getattr(other, what))]
    if not equal(one.optimizer, other.optimizer):
        found.append("optimizer")
    if one.rates != other.rates or not equal(one.metrics, other.metrics):
        found.append("rates or metrics")
    count = len(other.losses)
    if one.losses[-count:] != other.losses or one.depths[-count:] != other.depths:
        found.append("losses or depths")
    return found


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


def check_resume(name: str, root: Path, stops: Iterable[int] = range(1, STEPS), **options: Any) -> Run:
    whole = train(name, root, save=root / "whole", **options)
    for stop in stops:
        resumed = train(name, root, resume=root / "whole" / f"step={stop}.ckpt", **options)
        assert not differences(whole, resumed), f"resumed from step {stop}"
        assert len(resumed.losses) < len(whole.losses)
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
        pytest.param({"workers": 2}, id="workers", marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one_from_any_step(options: dict[str, Any], tmp_path: Path) -> None:
    whole = check_resume("bert", tmp_path, **options)
    assert sorted({depth for _, depth in whole.depths}) == [1, 2, 4]


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
    assert not differences(whole, train("bert", tmp_path, **options))  # the run itself repeats
    resumed = train("bert", tmp_path, resume=tmp_path / "whole" / "step=3.ckpt", **options)
    assert "weights" in differences(whole, resumed)
