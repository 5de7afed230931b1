import json

import component_tables
import memory
import pytest
import torch

FLAGS = ["--trainer.accelerator=cpu", "--data.sequence_length=16", "--data.batch_size=4", "--data.max_val_sequences=8"]
FLAGS += ["--model.depth=2", "--model.width=128", "--model.num_heads=2"]


def tiny(monkeypatch):
    monkeypatch.setitem(memory.SIZES, "cpu", [memory.Size(depth=2, width=128, length=8, batch=2, vocab_size=70)])
    monkeypatch.setattr(memory, "PAIRS", {"adamw": "adamw8bit", "lamb": "lamb8bit"})


def test_state_time_and_peak_are_told_and_rendered(tmp_path, monkeypatch):
    tiny(monkeypatch)
    monkeypatch.setattr(memory, "peak_alone", lambda preset, index, name: 3 if "8bit" in name else 4)
    path = tmp_path / "memory.cpu.json"
    record = memory.main(["--repeats=2", "--seconds=0.001", "--seeds=0", f"--output={path}"])
    assert json.loads(path.read_text()) == record
    (size,) = record["sizes"]
    for row in size["optimizers"]:
        assert 0.25 < row["state_ratio"] == row["state_bytes"] / row["state_bytes_32"] < 0.32
        assert row["step_ratio"]["low"] <= row["step_ratio"]["estimate"] <= row["step_ratio"]["high"]
    shown = component_tables.memory_lines([record])
    assert "`lamb8bit` / `lamb`" in shown
    assert "| 0.75 |" in shown
    assert "Not measured yet" in component_tables.memory_lines([])


@pytest.mark.slow
def test_peak_memory_is_that_of_a_process_of_its_own():
    held = torch.ones(2**29 // 4)  # half a GiB, none of which is the other process's
    peak = memory.peak_alone("cpu", 0, "adamw")
    bytes_of_state = 8 * 4_700_000
    assert peak > 2 * bytes_of_state  # weights, gradients and moments of 4.8 million parameters, and activations
    assert peak < held.nbytes


@pytest.mark.slow
def test_loss_parity_is_that_of_the_recipe(tmp_path, tiny_corpus, monkeypatch):
    monkeypatch.setenv("LIT_SCALE_CACHE", str(tmp_path / "cache"))
    preset = memory.Preset([*FLAGS, f"--data.corpus={tiny_corpus}"], [1e-3], 6, jobs=2, threads=1)
    monkeypatch.setitem(memory.PARITY, "cpu", preset)
    same = memory.parity("cpu", 2, tmp_path, memory.Console(), None)
    assert len(same["losses"]["8-bit"]) == len(same["losses"]["32-bit"]) == 2
    assert abs(same["difference"]["estimate"]) < 0.1
    assert 0.25 < same["state_ratio"] < 0.35
    shown = component_tables.parity_lines({"parity": same})
    assert shown.count("\n| ") == 2
    assert "seed by seed: " in shown
    assert "no interval" in shown
