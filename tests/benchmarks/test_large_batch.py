import json
import math
import sys
from dataclasses import replace

import component_tables
import large_batch
import pytest
import tables
from rich.console import Console

TINY = [
    "--trainer.accelerator=cpu",
    "--trainer.callbacks=null",
    "--data.sequence_length=16",
    "--data.batch_size=4",
    "--data.max_val_sequences=8",
    "--model.depth=2",
    "--model.width=16",
    "--model.num_heads=2",
]


def sweep_of(folder):
    sides = {side: flags for side, (flags, _) in large_batch.SIDES.items()}
    return large_batch.LargeSweep(large_batch.RECIPE, large_batch.PRESETS["cpu"], sides, folder, Console(), 1)


def test_every_side_is_tuned_beyond_the_ends_of_its_grid(tmp_path):
    sweep = sweep_of(tmp_path)
    best = {"small batch": 1e-3, "AdamW": 8e-3, "LAMB": 5e-3}
    sweep.make_all = lambda runs, what: {
        run: {"metrics": {"val/loss": abs(math.log(run.lr / best[run.side]))}} for run in runs
    }
    rates, tried = large_batch.tune(sweep)
    assert rates == best
    for side in best:
        own = sorted(one["lr"] for one in tried if one["side"] == side)
        assert own[0] < best[side] < own[-1]
        assert all(b / a == pytest.approx(2.0, rel=0.05) for a, b in zip(own, own[1:], strict=False))


def test_sides_see_equal_samples_and_differ_in_what_they_should(tmp_path):
    sweep = sweep_of(tmp_path)
    flags = {side: sweep.flags(large_batch.Run(side, 320, 0.01, 1)) for side in large_batch.SIDES}
    for own in flags.values():
        assert "--trainer.limit_train_batches=320" in own
        assert "--trainer.max_epochs=1" in own
    assert "--baseline" in flags["small batch"]
    assert "--model.lr=0.01" in flags["small batch"]
    assert {"--large_batch.optimizer=own", "--large_batch.lr=0.01", "--large_batch.times=16"} <= set(flags["AdamW"])
    assert {"--large_batch.optimizer=lamb", "--large_batch.lr=0.01", "--large_batch.times=16"} <= set(flags["LAMB"])


@pytest.mark.slow
def test_a_sweep_runs_and_is_stored(tmp_path, tiny_corpus, monkeypatch):
    monkeypatch.setenv("LIT_SCALE_CACHE", str(tmp_path / "cache"))
    preset = replace(
        large_batch.PRESETS["cpu"],
        flags=[*TINY, f"--data.corpus={tiny_corpus}"],
        lrs=[1e-3],
        steps=16,
        times=4,
        jobs=2,
    )
    monkeypatch.setitem(large_batch.PRESETS, "cpu", preset)
    monkeypatch.setattr(tables, "update_pages", lambda folder: None)
    command = ["large_batch.py", "--seeds=1", f"--runs={tmp_path / 'runs'}", f"--out={tmp_path / 'out'}"]
    monkeypatch.setattr(sys, "argv", command)
    large_batch.main()
    stored = json.loads((tmp_path / "out" / "large_batch.cpu.json").read_text())
    assert {(p["side"], p["steps"], p["samples"]) for p in stored["points"]} == {
        ("small batch", 16, 64),
        ("AdamW", 4, 64),
        ("LAMB", 4, 64),
    }
    assert "| LAMB | 16 | 4 |" in component_tables.large_batch_table(stored)
    assert str(tmp_path) not in stored["command"]
