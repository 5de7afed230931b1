"""A row of the table from runs that were made up, so that the right answer is known."""

import math
from pathlib import Path
from typing import Any

import pytest
from analysis import analyse, envelope, envelope_size, same_network
from entries import Control, Entry
from store import Store
from tasks import Task, ladder

SEEDS = (1, 2, 3, 4, 5)
TASK = Task(
    name="made_up",
    about="",
    recipe="bert_progressive_stack",
    flags=("--data.batch_size=4",),
    sizes=ladder((1, 64), (2, 64), (4, 64)),
    unit="1x64",
    budgets=(1_000, 2_000, 4_000),
    headline=2_000,
    trained=("4x64", 2_000),
    rates=(1e-3,),
    tokens=8,
    seeds=SEEDS,
)
PRICES = {"1x64": 1.0, "2x64": 2.0, "4x64": 4.0}


def loss_of(size: str, cost: float, seed: int) -> float:
    """Small networks learn sooner, large ones further; test losses lie 0.1 above those of validation."""
    floor = {"1x64": 1.30, "2x64": 1.0, "4x64": 0.98}[size]
    return floor + {"1x64": 4.0, "2x64": 14.0, "4x64": 18.0}[size] * cost**-0.5 + seed / 1_000


def run(size: str, cost: float, seed: int, loss: float, **more: Any) -> dict[str, Any]:
    steps = round(cost / PRICES[size])
    entry = {"size": size, "steps": steps, "lr": 1e-3, "seed": seed, "technique": None, "flags": [], "again": ""}
    entry |= {"own_steps": cost / PRICES[size], "flops": cost * 1e6, "tokens": steps * 32, "parameters": 1_000}
    entry |= {"val": {"loss": loss - 0.1}, "test": {"loss": loss}, "wall_seconds": cost / 100}
    return entry | {"reference": 3.2, "priced": "by steps", "charges": {}} | more


@pytest.fixture
def plain(tmp_path: Path) -> Store:
    store = Store(tmp_path / "plain.json")
    sizes = {size: {"price": price, "log_sd": 0.01, "parameters": 1_000} for size, price in PRICES.items()}
    store.data |= {"prices": {"sizes": sizes}, "rates": dict.fromkeys(PRICES, 1e-3)}
    store.data["runs"] = [
        run(size, cost, seed, loss_of(size, cost, seed))
        for size in PRICES
        for cost in TASK.budgets
        for seed in (*SEEDS, 1_000)
    ]
    return store


def technique(tmp_path: Path, size: str, cost: float, better: float) -> Store:
    """Runs whose loss is that of the same network at this cost, less ``better``."""
    store = Store(tmp_path / "technique.json")
    store.data |= {"headline": "trained", "networks": {"trained": [size, 2_000]}}
    steps = round(2_000 / PRICES[size])
    store.data["chosen"] = {"trained": {"lr": 1e-3, "flags": ["--x"], "steps": steps, "settings_tried": 3}}
    own = {"technique": ["--x"], "steps": steps, "own_steps": cost / PRICES[size]}
    store.data["runs"] = [run(size, cost, seed, loss_of(size, cost, seed) - better, **own) for seed in SEEDS]
    return store


ENTRY = Entry("made", "bert_progressive_stack", "made_up", Control("half of the depth", size={"4x64": "2x64"}))


def test_the_envelope_is_of_the_best_size_at_each_budget(plain: Store) -> None:
    curve = envelope(plain, TASK)
    assert curve is not None
    best = [min(PRICES, key=lambda size: loss_of(size, cost, 0)) for cost in TASK.budgets]
    assert list(curve.sizes) == best
    assert len(set(best)) > 1
    assert envelope_size(plain, TASK) == best[1]


def test_a_technique_that_a_smaller_network_beats(plain: Store, tmp_path: Path) -> None:
    store = technique(tmp_path, "4x64", 2_000, better=0.05)
    store.data["control"] = {"trained": {"about": "half of the depth", "size": "2x64"}}
    row = analyse(TASK, ENTRY, plain, store)
    assert row["loss_at_equal_cost"]["same_network"]["estimate"] == pytest.approx(-0.05, abs=1e-5)
    expected = loss_of("4x64", 2_000, 0) - 0.05 - min(loss_of(size, 2_000, 0) for size in PRICES)
    assert row["loss_at_equal_cost"]["any_size"]["estimate"] == pytest.approx(expected, abs=1e-5)
    assert expected > 0
    assert row["saving"]["same_network"]["estimate"] > 0 > row["saving"]["any_size"]["estimate"]
    assert row["static_control"]["estimate"] == pytest.approx(
        loss_of("4x64", 2_000, 0) - 0.05 - loss_of("2x64", 2_000, 0), abs=1e-5
    )
    assert row["tokens_per_parameter"] == pytest.approx(2_000 / 4 * 32 / 1_000)
    assert not row["complete"]  # no pairs of runs for the wall time


def test_a_saving_against_the_same_network_is_that_of_its_curve(plain: Store, tmp_path: Path) -> None:
    """Half of the cost for the loss of 2,000: saved is half."""
    store = technique(tmp_path, "2x64", 1_000, better=0.0)
    for entry in store.runs:
        entry["test"] = {"loss": loss_of("2x64", 2_000, entry["seed"])}
    row = analyse(TASK, ENTRY, plain, store)
    assert row["saving"]["same_network"]["estimate"] == pytest.approx(0.5)
    assert row["saving"]["same_network"]["low"] == pytest.approx(0.5)
    assert row["saving_flops"]["same_network"]["estimate"] == pytest.approx(0.5)
    curve = same_network(plain, TASK, "2x64")
    assert curve is not None
    assert curve.costs == (1_000, 2_000, 4_000)


def test_the_noise_of_each_runs_own_timing_is_one_error_of_all(plain: Store, tmp_path: Path) -> None:
    """Seeds make the same steps: a run that timed them badly moves neither the cost nor a single seed's difference."""
    store = technique(tmp_path, "2x64", 1_500, better=0.02)
    exact = analyse(TASK, ENTRY, plain, store)
    for entry, noise in zip(store.runs, (0.9, 0.95, 1.0, 1.05, 1.1), strict=True):
        entry["own_steps"] *= noise
    noisy = analyse(TASK, ENTRY, plain, store)
    assert noisy["cost"] == exact["cost"] == pytest.approx(1_500)
    for one, other in ((noisy["loss_at_equal_cost"], exact["loss_at_equal_cost"]), (noisy["saving"], exact["saving"])):
        assert one["same_network"]["estimate"] == pytest.approx(other["same_network"]["estimate"])
        wide, narrow = (e["same_network"]["high"] - e["same_network"]["low"] for e in (one, other))
        assert wide > narrow + 0.005


def test_wall_time_is_told_of_pairs_alone(plain: Store, tmp_path: Path) -> None:
    store = technique(tmp_path, "2x64", 2_000, better=0.0)
    assert analyse(TASK, ENTRY, plain, store)["wall"]["estimate"] is None
    for entry in list(store.runs):  # the technique's step takes a tenth more wall time than its price says
        beside = run("2x64", 2_000, entry["seed"], 1.0, again="made", wall_seconds=10.0)
        store.runs.extend([entry | {"again": "plain", "wall_seconds": 11.0}, beside])
    row = analyse(TASK, ENTRY, plain, store)
    assert row["wall"]["estimate"] == pytest.approx(-0.1)
    assert row["saving"]["same_network"]["estimate"] == pytest.approx(0.0, abs=1e-6)
    assert row["complete"]


def test_prices_of_other_sizes_widen_the_interval(plain: Store, tmp_path: Path) -> None:
    store = technique(tmp_path, "4x64", 2_000, better=0.03)
    exact = analyse(TASK, ENTRY, plain, store)["saving"]["any_size"]
    for size in plain.data["prices"]["sizes"].values():
        size["log_sd"] = 0.1
    vague = analyse(TASK, ENTRY, plain, store)["saving"]["any_size"]
    assert vague["estimate"] == exact["estimate"]
    assert vague["high"] - vague["low"] > 5 * (exact["high"] - exact["low"])
    assert math.isfinite(vague["low"])


def test_seeds_of_tuning_are_not_reported(plain: Store) -> None:
    curve = same_network(plain, TASK, "1x64")
    assert curve is not None
    assert set(curve.losses) == set(SEEDS)


def test_a_store_keeps_one_entry_of_a_run_and_finds_it_by_its_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import store as module

    from runs import Run

    monkeypatch.setattr(module, "code_digest", lambda recipe, technique: "now")
    own = Run(TASK, "1x64", 10, 1e-3, 1, "bert_progressive_stack")
    store = Store(tmp_path / "deep" / "own.json")
    store.data["note"] = "kept"
    assert store.find(own) is None
    store.add(own, own.key | {"settings": own.settings, "code": "before", "val": {}})
    assert store.find(own) is None
    store.add(own, own.key | {"settings": own.settings, "code": "now", "val": {"loss": 1.0}})
    again = Store(tmp_path / "deep" / "own.json")
    assert len(again.runs) == 1
    assert again.find(own) == own.key | {"settings": own.settings, "code": "now", "val": {"loss": 1.0}}
    assert again.data["note"] == "kept"
    other = Run(TASK, "1x64", 10, 1e-3, 1, "bert_progressive_stack", ("--x",))
    assert again.find(other) is None
