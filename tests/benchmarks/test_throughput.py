import json

import component_tables
import pytest
import throughput
import torch

SMALL = throughput.Size(depth=2, width=16, num_heads=2, length=8, batch=2, vocab_size=30)


@pytest.fixture
def record(tmp_path, monkeypatch):
    monkeypatch.setitem(throughput.PRESETS, "cpu", [SMALL])
    path = tmp_path / "results" / "throughput.cpu.json"
    returned = throughput.main(["--repeats", "2", "--seconds", "0.001", "--output", str(path)])
    stored = json.loads(path.read_text())
    assert stored == returned
    return stored


def test_the_record_holds_every_repetition(record, capsys):
    (size,) = record["sizes"]
    assert set(size["contestants"]) == {"lit_scale", "lit_scale, rotary", "huggingface", "torch", "timm"}
    assert all(len(one["seconds"]) == 2 and min(one["seconds"]) > 0 for one in size["contestants"].values())
    assert size["ratio"] == size["ratios"][size["fastest_peer"]]
    assert record["command"].startswith("python benchmarks/throughput.py --repeats 2")
    assert record["clock"] == "cpu"
    assert {"transformers", "timm", "torch"} <= set(record["versions"])
    assert {"cpu", "threads"} <= set(record["hardware"])


def test_the_readme_can_show_it(record):
    assert all(peer in component_tables.throughput_lines([record]) for peer in throughput.PEERS)


def test_the_contestants_are_of_one_size_and_start_from_a_uniform_guess():
    batch = throughput.random_batch(SMALL, torch.device("cpu"))
    torch.manual_seed(0)
    models = {name: make(SMALL) for name, make in throughput.CONTESTANTS.items()}
    count = {name: sum(p.numel() for p in model.parameters()) for name, (model, _) in models.items()}
    assert count["torch"] == count["timm"] == count["lit_scale"]
    # its token types and the norm of its embedding; ours and theirs have one norm in all behind or before the blocks
    assert count["huggingface"] == count["lit_scale"] + 2 * SMALL.width
    losses = [loss(batch).item() for _, loss in models.values()]
    assert losses == pytest.approx([torch.tensor(30.0).log().item()] * 5, abs=0.2)


def test_labels_everywhere_are_the_labels_at_the_masked_positions():
    batch = throughput.random_batch(SMALL, torch.device("cpu"))
    assert (batch["labels_everywhere"] != -100).sum() == batch["labels"].numel()
    assert torch.equal(batch["labels_everywhere"].gather(1, batch["positions"]), batch["labels"])


def test_ratio_pairs_what_was_measured_together():
    one = throughput.ratio([1.0, 2.0, 30.0], [2.0, 4.0, 60.0])
    assert one == {"estimate": 0.5, "low": 0.5, "high": 0.5}
    spread = throughput.ratio([1.0, 1.0, 1.0], [1.0, 2.0, 4.0])
    assert spread["low"] < spread["estimate"] == 0.5 < spread["high"]


@pytest.mark.parametrize("args", [["--repeats", "0"], ["--threads", "0"], ["--preset", "tpu"]])
def test_wrong_flags(args):
    with pytest.raises(SystemExit):
        throughput.main(args)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_without_a_gpu_the_gpu_preset_says_so(capsys):
    with pytest.raises(SystemExit):
        throughput.main(["--preset", "gpu"])
    assert "no CUDA device" in capsys.readouterr().err
