"""Random-LTD: the share that grows, and the subsets."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor

from lit_scale.callbacks import RandomLTD
from lit_scale.callbacks.random_ltd import growing_share
from lit_scale.cost import CostMeter
from tests.foreign_models import LENGTH, build, loader, quiet_trainer
from tests.token_runs import STEPS, Lengths, MustNotTrain, made

pytestmark = [pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize(("keep", "until", "stages"), [(0.0625, 0.75, 8), (0.5, 1.0, 1), (0.3, 0.6, 7)])
def test_the_share_grows_in_equal_steps_to_all_tokens(keep: float, until: float, stages: int) -> None:
    grid = [i / 1000 for i in range(1001)]
    shares = [growing_share(p, keep, until, stages) for p in grid]
    assert shares == sorted(shares)
    assert sorted(set(shares)) == pytest.approx([keep + (1 - keep) * i / stages for i in range(stages + 1)], abs=1e-6)
    for p, share in zip(grid, shares, strict=True):  # never ahead of the line, nor a step behind
        line = min(1.0, keep + (1 - keep) * p / until)
        assert line - (1 - keep) / stages - 1e-5 <= share <= line + 1e-5
    assert growing_share(until, keep, until, stages) == 1.0


@pytest.mark.parametrize("limit", [{"max_steps": 2 * STEPS}, {"max_epochs": 3, "accumulate_grad_batches": 2}])
def test_one_stage_until_the_end_keeps_the_share_from_the_first_step_to_the_last(
    limit: dict[str, Any], tmp_path: Path
) -> None:
    """The control that other ways of dropping tokens are compared with."""
    lengths, meter = Lengths(), CostMeter(repeats=1)
    dropping = RandomLTD(keep=0.5, before=2, after=1, until=1.0, stages=1)
    trainer = quiet_trainer(tmp_path, callbacks=[dropping, lengths, meter], **limit)
    module = build("bert", depth=6)
    trainer.fit(module, loader("bert", size=40), loader("bert", size=8, shuffle=False))
    assert len(lengths.training) == (2 * STEPS if "max_steps" in limit else 30)
    assert all(seen == [8, 8, 4, 4, 4, 8] for seen in lengths.training)
    assert all(seen == [8] * 6 for seen in lengths.evaluation)
    assert {shape["random_ltd/kept"] for shape in meter.record(trainer, module)["stages"]} == {0.5}
    middle = [rows for found in lengths.kept for rows in found.values()]
    assert len({str(rows) for rows in middle}) == len(middle), "drawn anew in each block of each step"
    assert {place for rows in middle for row in rows for place in row} == set(range(LENGTH))


def test_random_subsets_are_a_function_of_seed_step_and_block(tmp_path: Path) -> None:
    def run(**options: Any) -> tuple[list[dict[int, Any]], list[list[int]]]:
        lengths = Lengths()
        torch.manual_seed(torch.seed())  # whatever else is drawn does not matter
        dropping = RandomLTD(**({"keep": 0.5, "until": 1.0, "stages": 2} | options))
        trainer = quiet_trainer(tmp_path, max_steps=STEPS, callbacks=[dropping, lengths], val_check_interval=2)
        trainer.fit(build("bert", depth=6, dropout=0.0), loader("bert"), loader("bert", size=4))
        assert all(seen == [8] * 6 for seen in lengths.evaluation)
        return [found for found in lengths.kept if found], lengths.training

    kept, seen = run()
    assert seen == [[8, 4, 4, 4, 4, 8]] * 4 + [[8, 6, 6, 6, 6, 8]] * 4
    assert kept == run()[0]
    assert kept != run(seed=1)[0]
    assert all(row == sorted(set(row)) for found in kept for rows in found.values() for row in rows)  # causal order
    every = [tuple(map(tuple, rows)) for found in kept for rows in found.values()]
    assert len(every) == len(set(every)) == 32, "each block of each step has its own"
    assert all(len(set(rows)) > 1 for rows in every), "and each sample"


@pytest.mark.parametrize("name", ["timm_vit", "hf_bert", "hf_gpt2", "torch_encoder"])
def test_it_serves_any_network(name: str, tmp_path: Path) -> None:
    lengths = Lengths()
    trainer = quiet_trainer(tmp_path, max_steps=STEPS, callbacks=[RandomLTD(keep=0.5, stages=1), lengths])
    trainer.fit(made(name), loader(name))
    tokens = 5 if name == "timm_vit" else LENGTH
    middle = round(0.5 * tokens)
    assert lengths.training == [[tokens, middle, middle, tokens]] * 6 + [[tokens] * 4] * 2  # until 3/4 of the run


def test_the_class_token_is_always_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lit_scale.factors import tokens

    kept: list[Tensor] = []
    begin = tokens.TokenSpan.begin

    def watch(self: Any, x: Tensor) -> None:
        begin(self, x)
        kept.extend([] if self.kept is None else [self.kept])

    monkeypatch.setattr(tokens.TokenSpan, "begin", watch)
    for prefix, first in ((None, {0}), (0, {0, 1, 2, 3})):
        kept.clear()
        dropping = RandomLTD(keep=0.4, until=1.0, stages=1, prefix=prefix)
        quiet_trainer(tmp_path, max_steps=20, callbacks=[dropping]).fit(made("timm_vit"), loader("timm_vit"))
        places = torch.cat(kept)
        assert set(places[:, 0].tolist()) == first
        assert places.shape[1] == 2


@pytest.mark.slow
def test_a_compiled_network_recompiles_once_for_each_share(tmp_path: Path) -> None:
    weights = []
    for compiled in (False, True):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        module = made("torch_encoder", dropout=0.0)
        if compiled:
            module.net = torch.compile(module.net, backend="eager", fullgraph=True)
        dropping = RandomLTD(keep=0.25, stages=3, blocks="net._orig_mod.1.layers" if compiled else None)
        quiet_trainer(tmp_path, max_steps=STEPS, callbacks=[dropping]).fit(module, loader("torch_encoder"))
        weights.append(list(module.state_dict().values()))
    for one, other in zip(*weights, strict=True):
        torch.testing.assert_close(one, other)
    assert 1 < torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4  # shares


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0.0}, r"keep=0.0 is not a share of the tokens in \(0, 1\]"),
        ({"until": 2.0}, "until=2.0 is not a share of the run"),
        ({"stages": 0}, "stages=0 must be at least 1"),
        ({"prefix": -1}, "prefix=-1 must not be negative"),
    ],
)
def test_bad_arguments_are_refused_at_construction(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RandomLTD(**options)


def test_blocks_without_tokens_are_refused(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, max_steps=STEPS, callbacks=[RandomLTD(), MustNotTrain()])
    module = made("plain_torch")
    with pytest.raises(ValueError, match=r"from \(batch, tokens, channels\), but the blocks get \(4, 16\)"):
        trainer.fit(module, loader("plain_torch"))
    assert "training_step" not in vars(module)
