import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from lit_scale.callbacks import SelectiveBackprop
from lit_scale.callbacks.selective_backprop import select_by_percentile
from lit_scale.cost import CostMeter
from tests.support.data import loader
from tests.support.equality import assert_same
from tests.support.networks import build
from tests.support.training import Ran, run, save_every_step

pytestmark = [pytest.mark.filterwarnings("ignore")]

STEPS = 8
ALL: dict[str, Any] = {"start": 0.0, "end": 1.0, "interrupt": 0}


def choose(name: str, folder: Path, *also: Callback, resume: Path | None = None, **arguments: Any) -> Ran:
    options = {"max_steps": STEPS, "resume": resume} | arguments.pop("options", {})
    module, data = build(name, seed=1 if resume else 0), loader(name, batch_size=8, size=128)
    return run(module, data, folder, SelectiveBackprop(**arguments), *also, **options)


@pytest.mark.parametrize("keep", [0.5, 0.25])
def test_samples_are_drawn_by_the_percentile_of_their_loss(keep: float) -> None:
    """Exact inclusion probabilities of drawing one after the other without replacement, over all orders."""
    losses = torch.tensor([0.3, 4.0, 1.0, 2.5])
    weights = {sample: ((rank + 0.5) / 4) ** (1 / keep - 1) for rank, sample in enumerate([0, 2, 3, 1])}
    count = round(4 * keep)
    expected = dict.fromkeys(range(4), 0.0)
    for order in itertools.permutations(range(4), count):
        left, probability = dict(weights), 1.0
        for sample in order:
            probability *= left.pop(sample) / (sum(left.values()) + weights[sample])
        for sample in order:
            expected[sample] += probability
    generator, draws = torch.Generator().manual_seed(0), 4_000
    found = [select_by_percentile(losses, keep, generator).tolist() for _ in range(draws)]
    assert all(chosen == sorted(set(chosen)) and len(chosen) == count for chosen in found)
    for sample, probability in expected.items():
        share = sum(sample in chosen for chosen in found) / draws
        assert abs(share - probability) < 5 * math.sqrt(probability * (1 - probability) / draws)


def test_a_loss_that_is_no_number_is_met() -> None:
    losses = torch.tensor([1.0, float("nan"), 2.0, 0.5, 0.1, 0.2])
    generator = torch.Generator().manual_seed(0)
    shares = [1 in select_by_percentile(losses, 0.5, generator).tolist() for _ in range(200)]
    assert sum(shares) > 120  # as the largest of all


@pytest.mark.parametrize(
    ("arguments", "trained"),
    [
        ({}, [8, 8, 8, 8, 4, 8, 4, 8]),  # from half of the run to 90%, every second batch whole
        ({"start": 0.25, "end": 0.5, "interrupt": 0}, [8, 8, 4, 4, 8, 8, 8, 8]),
        ({"start": 0.0, "end": 1.0, "interrupt": 3, "keep": 0.25}, [2, 2, 8, 2, 2, 8, 2, 2]),
    ],
)
def test_it_chooses_where_it_is_told_to(arguments: dict[str, Any], trained: list[int], tmp_path: Path) -> None:
    assert choose("plain_torch", tmp_path, **arguments).watch.trained == trained


@pytest.mark.parametrize(("name", "window"), [("timm_vit", 1), ("hf_bert", 2), ("torch_encoder", 1), ("bert", 1)])
def test_any_network_resumes_to_the_same_bits(name: str, window: int, tmp_path: Path) -> None:
    options = {"options": {"accumulate_grad_batches": window}}
    arguments: dict[str, Any] = {"start": 0.25, "interrupt": 3} | options
    whole = choose(name, tmp_path, save_every_step(tmp_path / "saved"), **arguments)
    assert {4, 8} == set(whole.watch.trained)
    rest = choose(name, tmp_path, resume=tmp_path / "saved" / "step=3.ckpt", **arguments)
    assert rest.watch.losses == whole.watch.losses[3 * window :]
    assert_same(whole.left, rest.left)


def test_a_step_costs_the_losses_and_what_is_kept(tmp_path: Path) -> None:
    meter = CostMeter(repeats=1)
    choose("torch_encoder", tmp_path, meter, start=0.5, end=1.0, interrupt=0)
    shapes = [shape for shape in meter.ledger.record()["step_kinds"] if shape["phase"] == "train"]
    assert [(s["selective_backprop/samples_kept"], s["plain"], s["count"], s["price"]) for s in shapes] == [
        (1.0, True, 4, "replay"),
        (0.5, False, 4, "replay"),
    ]
    plain, chosen = (shape["flops_each"] for shape in shapes)
    assert 0.8 < chosen / plain < 0.86  # a third and a half


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"start": 0.9, "end": 0.5}, "start=0.9, end=0.5: must be fractions of the run"),
        ({"keep": 1.0}, r"keep=1.0 is not a share of the samples in \(0, 1\)"),
        ({"interrupt": 1}, "interrupt=1: use 0 to choose from all batches, or at least 2"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SelectiveBackprop(**arguments)
