"""Relative differences, and a sweep of one recipe that goes on where it stopped."""

import json
from pathlib import Path

import numpy as np
import pytest
import sweeps
from rich.console import Console
from scipy.stats import ttest_1samp, ttest_ind

TINY = [
    "--trainer.accelerator=cpu",
    "--data.sequence_length=16",
    "--data.batch_size=4",
    "--data.max_val_sequences=8",
    "--model.depth=4",
    "--model.width=16",
    "--model.num_heads=2",
]


def test_a_difference_is_students_of_the_runs_or_of_the_pairs() -> None:
    own, other = [1.2, 1.1, 1.4], [1.0, 0.9, 1.1]
    for paired, test in (
        (False, ttest_ind(own, other, equal_var=False)),
        (True, ttest_1samp(np.subtract(own, other), 0.0)),
    ):
        found = sweeps.above(own, other, paired=paired)
        low, high = test.confidence_interval(0.95)
        assert (found["low"], found["high"]) == pytest.approx((low / 1.0, high / 1.0), abs=1e-6)
    assert sweeps.above([2.0, 2.0], [1.0, 1.0]) == {"estimate": 1.0, "low": None, "high": None}


def test_the_recorded_command_names_no_folder() -> None:
    args = ["--runs", "/a/b", "--seeds", "3", "--out=/c"]
    assert sweeps.command("large_batch", args) == "python benchmarks/large_batch.py --seeds 3"


@pytest.mark.slow
def test_what_is_there_is_not_made_again_and_what_is_missing_comes_out_the_same(
    tmp_path: Path, tiny_corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIT_SCALE_CACHE", str(tmp_path / "cache"))
    preset = sweeps.Preset([*TINY, f"--data.corpus={tiny_corpus}"], [1e-3], 6, threads=1)
    sides = {"plain": ["--baseline"], "stacked": []}

    def made() -> dict[sweeps.Run, float]:
        sweep = sweeps.Sweep("bert_progressive_stack", preset, sides, tmp_path / "runs", Console(quiet=True), 2)
        runs = [sweeps.Run(side, 6, 1e-3, 1) for side in sides]
        return {run: record["metrics"]["val/loss"] for run, record in sweep.make_all(runs, "").items()}

    first = made()
    assert len(set(first.values())) == 2
    results = sorted((tmp_path / "runs").glob("*/result.json"))
    before = [path.stat().st_mtime_ns for path in results]
    assert json.loads(results[0].read_text())["baseline"]
    results[1].unlink()
    assert made() == first
    assert results[0].stat().st_mtime_ns == before[0]
    assert results[1].stat().st_mtime_ns != before[1]
