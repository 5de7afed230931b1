import json
from dataclasses import replace

import overhead
import tables


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
        assert len(one["hook_seconds"]) == (1 if name == "nothing" else 5)
        assert all(second > 0 for second in one["hook_seconds"]) == (name != "nothing")
    assert "CostMeter" in tables.overhead_line([record])
    assert size["callbacks"]["CostMeter"]["median_seconds"] < 5e-4
