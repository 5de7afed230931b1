import json
from dataclasses import replace

import component_tables
import overhead


def test_hooks_and_runs_of_every_callback_are_timed(tmp_path, monkeypatch):
    sizes = [replace(overhead.PRESETS["cpu"][1], steps=5)]
    monkeypatch.setitem(overhead.PRESETS, "cpu", sizes)
    path = tmp_path / "overhead.cpu.json"
    returned = overhead.main(["--repeats", "1", "--output", str(path)])
    record = json.loads(path.read_text())
    assert record == returned
    (size,) = record["sizes"]
    assert set(size["callbacks"]) == {"CostMeter", "FiniteGuard", "StepSeed", "PreemptionGuard"}
    assert record["meter_share"] == size["callbacks"]["CostMeter"]["share"] > 0
    for name, runs in size["runs"].items():
        (one,) = runs
        assert one["cpu_seconds"] > 0
        assert (one["median_hook_seconds"] > 0) == (one["mean_hook_seconds"] > 0) == (name != "nothing")
    assert "CostMeter" in component_tables.overhead_lines([record])
    assert size["callbacks"]["CostMeter"]["median_seconds"] < 5e-4


def test_hooks_are_watched_once_the_meter_idles():
    class Counting(overhead.Callback):
        def on_train_batch_start(self, trainer, *args):
            trainer.seen += 1

        def on_train_batch_end(self, trainer, *args):
            pass

    class Trainer:
        global_step, max_steps, seen = 0, overhead.IDLE + 3, 0

    callback, trainer = Counting(), Trainer()
    spent = overhead.watched(callback)
    for step in range(trainer.max_steps):
        callback.on_train_batch_start(trainer)
        trainer.global_step = step + 1
        callback.on_train_batch_end(trainer)
    assert trainer.seen == trainer.max_steps
    assert len(spent) == 3
    assert all(second > 0 for second in spent)
