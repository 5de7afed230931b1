"""What holds for every technique: whom it goes along with, and that the clock's prices are those of its own steps.

Techniques on different factors of a step go together: a run with both, resumed in its middle, ends like the
uninterrupted one. Those on one factor are refused, with the reason.
"""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import lit_scale.callbacks
import lit_scale.cost.meter
from lit_scale.callbacks import (
    BatchRamp,
    DynamicSparsity,
    EightBitOptimizer,
    ImportanceSampling,
    LargeBatch,
    MaskedTokenSkip,
    MaskLater,
    PatchDropping,
    ProgressiveStacking,
    RandomLTD,
    ResolutionGrowing,
    RhoLoss,
    SelectiveBackprop,
    SequenceLengthWarmup,
    TokenDropping,
)
from lit_scale.cost import CostMeter
from lit_scale.guards import StepSeed
from lit_scale.technique import Technique
from tests.foreign_models import build, loader, quiet_trainer, save_every_step
from tests.image_models import Timm, pictures, tiny_mae
from tests.sized_models import image_model, sized_loader

pytestmark = [pytest.mark.filterwarnings("ignore")]

STEPS = 6
GROWTH = [(0.0, 0.5), (0.5, 1.0)]
MAKE: dict[type[Technique], Callable[[], Technique]] = {
    BatchRamp: lambda: BatchRamp([(0.0, 4), (0.5, 8)]),
    EightBitOptimizer: EightBitOptimizer,
    LargeBatch: lambda: LargeBatch(2, lr=0.02),
    ImportanceSampling: lambda: ImportanceSampling(2, threshold=0.0, look_every=1),
    DynamicSparsity: lambda: DynamicSparsity(0.5, every=2),
    MaskLater: MaskLater,
    MaskedTokenSkip: MaskedTokenSkip,
    PatchDropping: lambda: PatchDropping(0.5, tune=0.25),
    ProgressiveStacking: lambda: ProgressiveStacking(GROWTH),
    RandomLTD: RandomLTD,
    ResolutionGrowing: lambda: ResolutionGrowing(GROWTH),
    RhoLoss: lambda: RhoLoss(image_model("timm", seed=9), share=0.5),
    SelectiveBackprop: lambda: SelectiveBackprop(0.0, 1.0),
    SequenceLengthWarmup: lambda: SequenceLengthWarmup(GROWTH),
    TokenDropping: lambda: TokenDropping(until=0.75, special_ids=[0]),
}


def test_every_technique_is_here() -> None:
    offered = {
        name for name in lit_scale.callbacks.__all__ if issubclass(getattr(lit_scale.callbacks, name), Technique)
    }
    assert {kind.__name__ for kind in MAKE} == offered


def same_factor() -> list[Any]:
    pairs = [pair for pair in itertools.combinations(MAKE, 2) if pair[0].factor == pair[1].factor]
    pairs = [(a, b) for a, b in pairs if a.__name__ not in b.shares_with]
    return [pytest.param(a, b, id=f"{a.__name__}-{b.__name__}") for a, b in pairs]


@pytest.mark.parametrize(("one", "other"), same_factor())
def test_two_on_one_factor_are_refused(one: type[Technique], other: type[Technique], tmp_path: Path) -> None:
    for first, second in ((one, other), (other, one)):
        techniques = [MAKE[first](), MAKE[second]()]
        trainer = quiet_trainer(tmp_path, callbacks=techniques)
        with pytest.raises(ValueError, match=f"both change the {one.factor} of a step; use one of them"):
            Technique.setup(techniques[0], trainer, build("plain_torch"), "fit")


# ---- different factors


def wide(seed: int) -> Any:
    """A network whose matrices are large enough for 8-bit state."""
    return build("bert", seed=seed, width=64)


def viewer(seed: int) -> Any:
    torch.manual_seed(seed)
    return Timm()


#: A module, its data, and what ProgressiveStacking has to be told, for each technique that it goes along with.
WITH_STACKING: dict[type[Technique], tuple[Callable[[int], Any], Callable[[], Any], dict[str, Any]]] = {
    BatchRamp: (lambda seed: build("hf_bert", seed=seed), lambda: loader("hf_bert"), {}),
    EightBitOptimizer: (wide, lambda: loader("bert"), {}),
    LargeBatch: (lambda seed: build("torch_encoder", seed=seed), lambda: loader("torch_encoder"), {}),
    ImportanceSampling: (lambda seed: image_model("timm", seed=seed), sized_loader, {}),
    DynamicSparsity: (lambda seed: build("hf_bert", seed=seed), lambda: loader("hf_bert"), {}),
    MaskLater: (lambda seed: build("bert", seed=seed), lambda: loader("bert"), {}),
    MaskedTokenSkip: (lambda seed: tiny_mae(seed=seed), pictures, {"blocks": "encoder.blocks"}),
    PatchDropping: (viewer, pictures, {}),
    RandomLTD: (lambda seed: build("hf_bert", seed=seed), lambda: loader("hf_bert"), {}),
    ResolutionGrowing: (lambda seed: image_model("timm", seed=seed), sized_loader, {}),
    RhoLoss: (lambda seed: image_model("timm", seed=seed), sized_loader, {}),
    SelectiveBackprop: (lambda seed: build("hf_bert", seed=seed), lambda: loader("hf_bert"), {}),
    SequenceLengthWarmup: (lambda seed: build("hf_gpt2", seed=seed), lambda: loader("hf_gpt2"), {}),
    TokenDropping: (lambda seed: build("bert", seed=seed), lambda: loader("bert"), {}),
}


def test_every_technique_on_another_factor_is_here() -> None:
    others = {kind for kind in MAKE if kind.factor != ProgressiveStacking.factor}
    assert set(WITH_STACKING) == others


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("kind", WITH_STACKING, ids=lambda kind: kind.__name__)
def test_it_goes_along_with_progressive_stacking(kind: type[Technique], order: int, tmp_path: Path) -> None:
    make, data, options = WITH_STACKING[kind]

    def fit(seed: int, resume: Path | None = None) -> list[torch.Tensor]:
        module = make(seed)
        techniques = [MAKE[kind](), ProgressiveStacking(GROWTH, **options)][::order]
        saver = [] if resume else [save_every_step(tmp_path / "saved")]
        callbacks = [StepSeed(), *techniques, *saver]
        trainer = quiet_trainer(tmp_path, max_steps=STEPS, callbacks=callbacks, enable_checkpointing=not resume)
        trainer.fit(module, data(), ckpt_path=resume)
        assert trainer.global_step == STEPS
        states = trainer.optimizers[0].state_dict()["state"].values()
        return [*module.state_dict().values(), *leaves(list(states))]

    whole = fit(0)
    for stop in (2, 4):  # before and after the growth
        assert all(map(torch.equal, whole, fit(1, tmp_path / "saved" / f"step={stop}.ckpt"))), stop


@pytest.mark.parametrize(
    "others",
    [[SequenceLengthWarmup], [EightBitOptimizer], [LargeBatch, EightBitOptimizer]],
    ids=lambda kinds: "-".join(kind.__name__ for kind in kinds),
)
def test_a_ramp_goes_along_with_the_others(others: list[type[Technique]], tmp_path: Path) -> None:
    """They see the progress of a run whose steps change, and the ramp that of a run whose batch is multiplied."""

    def fit(seed: int, resume: Path | None = None) -> list[torch.Tensor]:
        module = build("bert", seed=seed, width=64)
        ramp = BatchRamp([(0.0, 4), (0.3, 8)])
        saver = [] if resume else [save_every_step(tmp_path / "saved")]
        callbacks = [StepSeed(), *(MAKE[kind]() for kind in others), ramp, *saver]
        trainer = quiet_trainer(tmp_path, max_epochs=2, callbacks=callbacks, enable_checkpointing=not resume)
        data = loader("hf_gpt2") if SequenceLengthWarmup in others else loader("bert")
        if SequenceLengthWarmup in others:
            module = build("hf_gpt2", seed=seed)
        trainer.fit(module, data, ckpt_path=resume)
        assert ramp.windows == [(0, 1), (6, 2)]  # due after 4.8 of 16 batches, begun where two of them make a step
        assert trainer.global_step == 11
        assert trainer.accumulate_grad_batches == 1
        states = trainer.optimizers[0].state_dict()["state"].values()
        return [*module.state_dict().values(), *leaves(list(states))]

    whole = fit(0)
    for stop in (3, 6, 8):
        assert all(map(torch.equal, whole, fit(1, tmp_path / "saved" / f"step={stop}.ckpt"))), stop


def going_along() -> list[Any]:
    """Every other pair of techniques that is not refused."""
    pairs = itertools.combinations([kind for kind in MAKE if kind is not ProgressiveStacking], 2)
    allowed = [(a, b) for a, b in pairs if a.factor != b.factor or a.__name__ in b.shares_with]
    pairs_in_order = [(b, a) if b is LargeBatch else (a, b) for a, b in allowed]  # whoever replaces the optimizer
    return [pytest.param(a, b, id=f"{a.__name__}-{b.__name__}") for a, b in pairs_in_order]


@pytest.mark.slow
@pytest.mark.parametrize(("one", "other"), going_along())
def test_they_go_along(one: type[Technique], other: type[Technique], tmp_path: Path) -> None:
    factors = ["tokens", "samples", "weights", "bytes", "steps"]  # the first is the pickiest about its network
    make, data, _ = WITH_STACKING[min(one, other, key=lambda kind: factors.index(kind.factor))]

    def fit(seed: int, resume: Path | None = None) -> list[torch.Tensor]:
        made = MAKE | {RhoLoss: lambda: RhoLoss(make(9), share=0.5)}
        if other is SequenceLengthWarmup:  # GPT-2's layers are no nn.Linear, whose units could be left out
            made |= {DynamicSparsity: lambda: DynamicSparsity(0.5, granularity="weight", every=2)}
        techniques = [made[kind]() for kind in (one, other)]
        saver = [] if resume else [save_every_step(tmp_path / "saved")]
        callbacks = [StepSeed(), *techniques, *saver]
        trainer = quiet_trainer(tmp_path, max_steps=STEPS, callbacks=callbacks, enable_checkpointing=not resume)
        module = make(seed)
        trainer.fit(module, data(), ckpt_path=resume)
        assert trainer.global_step == STEPS
        states = trainer.optimizers[0].state_dict()["state"].values()
        return [*module.state_dict().values(), *leaves(list(states))]

    whole = fit(0)
    assert all(map(torch.equal, whole, fit(1, tmp_path / "saved" / "step=4.ckpt")))


def test_the_card_says_who_goes_along_with_whom() -> None:
    kinds = sorted(MAKE, key=lambda kind: (kind.factor, kind.__name__))
    lines = ["| technique | lowers | refused beside it |", "|---|---|---|"]
    for kind in kinds:
        same = [other for other in kinds if other is not kind and other.factor == kind.factor]
        refused = [other.__name__ for other in same if other.__name__ not in kind.shares_with]
        lines.append(f"| `{kind.__name__}` | {kind.factor} | {', '.join(f'`{name}`' for name in refused) or 'none'} |")
    card = (Path(__file__).parents[1] / "docs" / "all_in_one.md").read_text()
    assert "\n".join(lines) in card, "\n".join(lines)


def leaves(states: list[Any]) -> list[torch.Tensor]:
    return [torch.as_tensor(leaf) for leaf in torch.utils._pytree.tree_leaves(states)]


# ---- the clock


@pytest.mark.parametrize("kind", MAKE, ids=lambda kind: kind.__name__)
def test_the_clock_times_the_steps_that_were_made(
    kind: type[Technique], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that is replayed to be timed multiplies what the step of that kind multiplied in training."""
    make, data, _ = WITH_STACKING.get(kind, WITH_STACKING[RandomLTD])
    technique, meter, replay = MAKE[kind](), CostMeter(repeats=1), lit_scale.cost.meter.replay_step
    impose, imposed, multiplied = technique.impose_step_kind, [], []

    def noted(trainer: Any, module: Any, kind: dict[str, Any]) -> None:
        imposed.append(kind)
        impose(trainer, module, kind)

    def counted(*args: Any) -> None:
        with FlopCounterMode(display=False) as counter:
            replay(*args)
        multiplied.append(counter.get_total_flops())

    monkeypatch.setattr(technique, "impose_step_kind", noted)
    monkeypatch.setattr(lit_scale.cost.meter, "replay_step", counted)
    trainer = quiet_trainer(tmp_path, max_steps=STEPS, callbacks=[StepSeed(), technique, meter])
    trainer.fit(make(0), data())
    ledger = meter.ledger
    assert ledger.calibrated.keys() >= set(ledger.counts)
    keys = list(ledger.calibrated)
    keys += [*keys[1:], *keys[:1]]  # two rounds, the second of which begins with another kind
    assert multiplied == [ledger.flops[key] for key in keys]
    prefix = f"{technique.name}/"
    *during, _ = imposed  # the state before the replay is imposed again at its end
    assert during == [{n.removeprefix(prefix): v for n, v in key if n.startswith(prefix)} for key in keys]
    same = {BatchRamp, EightBitOptimizer, LargeBatch}  # a batch costs what it did, or there is one kind of step
    assert len(set(multiplied)) >= (1 if kind in same else 2)

    # and with them the step of a run without it, whether or not it made one
    without = CostMeter(repeats=0)
    trainer = quiet_trainer(tmp_path, max_steps=1, callbacks=[StepSeed(), without])
    trainer.fit(make(0), data())
    plain = [key for key in ledger.calibrated if dict(key)["plain"]]
    others = {EightBitOptimizer, ImportanceSampling, LargeBatch}  # another optimizer, or larger batches
    assert bool(plain) == (kind not in others)
    assert {ledger.flops[key] for key in plain} <= set(without.ledger.flops.values())
    made_none = bool(plain) and not set(plain) & set(ledger.counts)
    assert made_none == (kind in {DynamicSparsity, MaskLater, MaskedTokenSkip, RhoLoss})
    told = [one for one in meter.record(trainer, trainer.lightning_module)["step_kinds"] if one["plain"]]
    assert made_none == (bool(told) and all(one["count"] == 0 for one in told))
