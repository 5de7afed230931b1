"""What holds for every technique that drops tokens: its span, evaluation, resuming, the clock, and what it refuses."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from lit_scale.callbacks import MaskLater, ProgressiveStacking, RandomLTD, TokenDropping
from lit_scale.cost import CostMeter
from lit_scale.factors.token_choice import TokenChoice
from tests.support.data import loader
from tests.support.equality import assert_same, same
from tests.support.networks import all_blocks, build, path_of
from tests.support.tokens import KINDS, STEPS, Lengths, MustNotTrain, make, train
from tests.support.training import fit, quiet_trainer, run

pytestmark = [pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("kind", [TokenDropping, RandomLTD])
@pytest.mark.parametrize("name", ["bert", "masked_torch_encoder"])
def test_evaluation_uses_all_tokens_and_nothing_is_left_after_training(
    name: str, kind: type[TokenChoice], tmp_path: Path
) -> None:
    module = build(name, dropout=0.0)
    before = [set(vars(block)) for block in all_blocks(module, path_of(module))]
    trainer = quiet_trainer(tmp_path, max_steps=4, callbacks=[make(kind, until=1.0)], val_check_interval=4)
    data = loader("bert", size=12, shuffle=False)
    trainer.fit(module, loader("bert"), data)
    during = trainer.callback_metrics["val/loss"]
    (after,) = quiet_trainer(tmp_path).validate(module, data, verbose=False)
    plain = build(name, dropout=0.0)
    plain.load_state_dict(module.state_dict())
    (expected,) = quiet_trainer(tmp_path).validate(plain, data, verbose=False)
    assert during == after["val/loss"] == expected["val/loss"]
    assert [set(vars(block)) for block in all_blocks(module, path_of(module))] == before
    assert not {"training_step", "per_token_loss", "validation_step"} & set(vars(module))


def test_keeping_all_tokens_is_the_plain_run(tmp_path: Path) -> None:
    def weights(*callbacks: Callback) -> Any:
        return run(build("bert"), loader("bert"), tmp_path, *callbacks, max_steps=4).left["weights"]

    plain = weights()
    for kind in (TokenDropping, RandomLTD):
        assert_same(plain, weights(make(kind, keep=1.0)))
    assert not same(plain, weights(make(TokenDropping)))


# ---- exact resume


@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [
        ("bert", TokenDropping, {}),
        ("bert", TokenDropping, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05, "meter": True}),
        ("masked_torch_encoder", TokenDropping, {}),
        ("bert", MaskLater, {}),
        ("bert", RandomLTD, {}),
        ("timm_vit", RandomLTD, {}),
        ("hf_gpt2", RandomLTD, {}),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(
    name: str, kind: type[TokenChoice], options: dict[str, Any], tmp_path: Path
) -> None:
    whole = train(name, tmp_path, make(kind), **options)
    for stop in (1, 3, 5):  # within an epoch, and at its end
        resumed = train(name, tmp_path, make(kind), resume=tmp_path / "whole" / f"step={stop}.ckpt", **options)
        assert_same(whole, resumed, f"resumed at step {stop}")
    if kind is TokenDropping:
        assert (whole["techniques"]["token_dropping"]["running_loss"] < 10.0).any()


def formerly(path: Path, name: str, **settings: Any) -> None:
    """Let a checkpoint say that it was made when the three techniques were one."""
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["lit_scale_techniques"] = {"TokenDropping": {"drop": name, "stages": 8, "seed": 0} | settings}
    torch.save(checkpoint, path)


@pytest.mark.parametrize("present", [TokenDropping, MaskLater, RandomLTD])
@pytest.mark.parametrize(("drop", "kind"), [("masked", MaskLater), ("random", RandomLTD)])
def test_a_checkpoint_from_when_they_were_one_names_the_callback_of_now(
    drop: str, kind: type[TokenChoice], present: type[TokenChoice], tmp_path: Path
) -> None:
    train("bert", tmp_path, make(kind))
    formerly(path := tmp_path / "whole" / "step=3.ckpt", drop)
    message = rf"TokenDropping\(drop='{drop}'\), which is {kind.__name__} now"
    with pytest.raises(ValueError, match=message):
        train("bert", tmp_path, make(present), resume=path)


def test_a_checkpoint_from_when_they_were_one_goes_on_with_token_dropping(tmp_path: Path) -> None:
    whole = train("bert", tmp_path, make(TokenDropping))
    settings = {"keep": 0.5, "before": 0.5, "after": 1, "until": 1.0, "beta": 0.995, "prefix": None, "blocks": None}
    formerly(path := tmp_path / "whole" / "step=3.ckpt", "easy", special_ids=[0], **settings)
    assert_same(whole, train("bert", tmp_path, make(TokenDropping), resume=path))


# ---- what it costs


@pytest.mark.parametrize("kind", KINDS)
def test_the_clock_sees_the_shapes_and_its_replay_leaves_no_trace(kind: type[TokenChoice], tmp_path: Path) -> None:
    found = []
    for repeats in (0, 2):
        dropping = make(kind, **({} if kind is MaskLater else {"until": 0.75}))
        meter = CostMeter(repeats=repeats)
        ran = run(build("bert", depth=6), loader("bert"), tmp_path, dropping, meter, max_steps=STEPS)
        record = meter.record(ran.trainer, ran.module)
        found.append(ran.left)
    assert_same(found[0], found[1])
    assert all(shape["price"] == "replay" for shape in record["step_kinds"])
    stages = {stage[f"{dropping.name}/kept"]: stage for stage in record["stages"]}
    shares = {TokenDropping: [0.5, 1.0], MaskLater: ["unmasked"], RandomLTD: [0.25, 0.5, 0.75, 1.0]}
    assert list(stages) == shares[kind]
    assert [stage["plain"] for stage in stages.values()] == [kept == 1.0 for kept in stages]
    each = [stage["flops"] / stage["steps"] for stage in stages.values()]
    assert each == sorted(each)
    baseline = CostMeter(repeats=0)
    fit(build("bert", depth=6), loader("bert"), tmp_path, baseline, max_steps=2)
    full = baseline.totals()["flops"] / 2
    (plain,) = (shape for shape in record["step_kinds"] if shape["plain"])
    assert plain["flops_each"] == full > each[0]
    assert (plain["count"] == 0) == (kind is MaskLater)  # it makes no plain step, and has one priced all the same
    if kind is not MaskLater:
        assert full == each[-1]
        assert len(set(each)) == len(each)


# ---- with progressive stacking


STAGES = [(0.0, 0.25), (0.25, 0.5), (0.625, 1.0)]  # 1, 2 and 4 blocks, from steps 0, 2 and 5


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_with_progressive_stacking_the_span_counts_the_active_blocks(
    kind: type[TokenChoice], order: int, tmp_path: Path
) -> None:
    constant: dict[str, Any] = {"until": 1.0, "stages": 1} if kind is RandomLTD else {}
    lengths = Lengths()
    callbacks: list[Callback] = [ProgressiveStacking(STAGES)]
    callbacks.insert(order, make(kind, **constant))
    quiet_trainer(tmp_path, max_steps=STEPS, callbacks=[*callbacks, lengths]).fit(build("bert"), loader("bert"))
    one, two, four = {
        TokenDropping: ([8], [8, 8], [8, 8, 4, 8]),
        MaskLater: ([8], [6, 8], [6, 6, 6, 8]),
        RandomLTD: ([8], [8, 8], [8, 2, 2, 8]),
    }[kind]
    assert lengths.training == [one] * 2 + [two] * 3 + [four] * 3


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "order"), [(TokenDropping, 0), (MaskLater, 1), (RandomLTD, 1)])
def test_with_progressive_stacking_it_resumes_exactly(kind: type[TokenChoice], order: int, tmp_path: Path) -> None:
    options: dict[str, Any] = {"stages": STAGES, "order": order, "meter": True}
    whole = train("bert", tmp_path, make(kind), **options)
    for stop in (1, 2, 5, 6):
        resumed = train("bert", tmp_path, make(kind), resume=tmp_path / "whole" / f"step={stop}.ckpt", **options)
        assert_same(whole, resumed, f"resumed at step {stop}")


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_old_blocks_are_refused(kind: type[TokenChoice], tmp_path: Path) -> None:
    callbacks = [ProgressiveStacking(STAGES, freeze_old=True), make(kind)]
    with pytest.raises(ValueError, match=f"{kind.__name__} does not go with freeze_old=True"):
        quiet_trainer(tmp_path, max_steps=STEPS, callbacks=callbacks).fit(build("bert"), loader("bert"))


# ---- bad input


def test_a_whole_number_of_blocks_is_one_however_it_was_read() -> None:
    assert TokenDropping(before=4.0, after=1.0).settings() == TokenDropping(before=4, after=1).settings()
    assert TokenDropping(before=0.5).before == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"before": -1}, "before=-1 is neither a number of blocks nor a fraction"),
        ({"before": 1.5}, "before=1.5 is neither"),
        ({"after": True}, "after=True is neither"),
        ({"after": math.nan}, "after=nan is neither"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_bad_spans_are_refused_at_construction(kind: type[TokenChoice], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(kind, **options)


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (TokenDropping, ["drop", "stages", "prefix", "seed"]),
        (RandomLTD, ["drop", "beta", "special_ids"]),
        (MaskLater, ["drop", "keep", "until", "stages", "beta", "special_ids", "prefix", "seed"]),
    ],
)
def test_an_option_that_does_nothing_is_none(kind: type[TokenChoice], names: list[str]) -> None:
    for name in names:
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
            make(kind, **{name: 1})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"before": 3, "after": 1}, "before=3 and after=1 leave no block of the model's 4"),
        ({"before": 0.5, "after": 9}, "before=0.5 and after=9 leave no block"),
        ({"blocks": "nowhere"}, "blocks='nowhere'.*candidates: 'encoder.blocks'"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_span_that_does_not_fit_is_refused_before_anything_is_trained(
    kind: type[TokenChoice], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    trainer = quiet_trainer(tmp_path, max_steps=STEPS, callbacks=[make(kind, **options), MustNotTrain()])
    module = build("bert")
    with pytest.raises(ValueError, match=message):
        trainer.fit(module, loader("bert"))
    assert "training_step" not in vars(module)
