"""The recipe's own file: what it trains, compares and leaves behind."""

import json
import re
import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli")

STACKED, PLAIN = "runs/bert_progressive_stack", "runs/plain"


def test_the_recipe_stacks_and_tells_what_it_saved(tiny, capsys):
    assert tiny.here("--trainer.max_steps=30") == 0
    printed = capsys.readouterr()
    record = tiny.record()
    blocks = [stage["progressive_stacking/blocks"] for stage in record["stages"]]
    assert blocks == sorted(blocks)
    assert blocks[-1] == 4
    assert record["recipe"] == "bert_progressive_stack"
    assert record["technique"] == "progressive_stacking"
    assert record["unigram_entropy"] > 1
    assert record["metrics"]["val/loss"] < record["curve"][0]["metrics"]["val/loss"], "it learns"
    assert re.search(r"-\d\d% FLOPs", printed.out)
    assert printed.err == ""
    assert (tiny.folder / STACKED / "result.png").read_bytes().startswith(b"\x89PNG")
    weights = tiny.checkpoint()["state_dict"]
    grown, source = (weights[f"encoder.blocks.{index}.attention.qkv.weight"] for index in (3, 1))
    assert not torch.equal(grown, source), "copied, and trained since"


def test_compare_trains_both_from_the_same_start(tiny, capsys):
    assert tiny.here("--compare", "--progressive_stacking.stages=[[0.0,2],[0.5,4]]") == 0
    records = json.loads((tiny.folder / STACKED / "comparison.json").read_text())
    assert list(records) == ["baseline", "progressive_stacking"]
    baseline, stacked = records.values()
    assert baseline["baseline"]
    assert baseline["steps"] == stacked["steps"] == 8
    assert baseline["tokens"] == stacked["tokens"]
    each = {
        shape["progressive_stacking/blocks"]: shape["flops_each"]
        for shape in stacked["step_kinds"]
        if shape["phase"] == "train"
    }
    assert baseline["flops"] == 8 * each[4]
    assert stacked["flops"] == 4 * each[2] + 4 * each[4]
    out = capsys.readouterr().out
    assert "at equal steps, not equal loss" in out
    assert re.search(r"val/loss +[\d.]+ +[\d.]+ +[-+]\d+%", out)


def test_a_baseline_is_the_same_run_without_the_technique(tiny):
    root = f"--trainer.default_root_dir={PLAIN}"
    assert tiny.here("--baseline", root) == 0
    one_stage = "--progressive_stacking.stages=[[0.0,1.0]]"  # all blocks from the start
    assert tiny.here(one_stage) == 0
    stacked, plain = tiny.checkpoint(STACKED), tiny.checkpoint(PLAIN)
    assert all(torch.equal(value, plain["state_dict"][name]) for name, value in stacked["state_dict"].items())
    assert tiny.record(PLAIN)["metrics"] == tiny.record(STACKED)["metrics"]
    assert tiny.record(PLAIN)["flops"] == tiny.record(STACKED)["flops"]


def test_a_seed_decides_everything_and_another_one_differs(tiny):
    losses = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert (
            tiny.here(f"--trainer.default_root_dir={name}", f"--seed_everything={seed}", "--trainer.max_steps=4") == 0
        )
        losses.append(tiny.record(name)["metrics"]["val/loss"])
        assert tiny.record(name)["seed"] == seed
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_train_one_run(tiny):
    process = tiny.start(
        "--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.accelerator=cpu", "--data.batch_size=2", "--compare"
    )
    out, err = process.communicate(timeout=560)
    assert process.returncode == 0, out + err
    assert tiny.here("--compare", "--trainer.default_root_dir=runs/one") == 0
    for arm in ("baseline", "progressive_stacking"):
        both, one = tiny.record(f"{STACKED}/{arm}"), tiny.record(f"runs/one/{arm}")
        assert (both["world_size"], one["world_size"]) == (2, 1)
        for name in ("steps", "samples", "tokens", "flops"):
            assert both[name] == one[name], name
        assert both["metrics"]["val/loss"] == pytest.approx(one["metrics"]["val/loss"], rel=1e-4)
    assert out.count("bert_progressive_stack (baseline):") == 1, "printed by one rank"
    assert "error" not in err


@pytest.mark.slow
def test_a_start_imports_nothing_heavy_that_the_first_step_does_not_need(tiny):
    code = (
        "import sys\nfrom lit_scale.callbacks import ProgressiveStacking\nfrom lit_scale.cli import run_recipe\n"
        "from lit_scale.datamodules import TextDataModule\nfrom lit_scale.models import BertMLM\n"
        "import lightning.pytorch.cli\nheavy = {'timm', 'bitsandbytes', 'webdataset'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=tiny.environment, capture_output=True, text=True)
    assert done.stdout.strip().splitlines()[-1] == "[]", done.stdout + done.stderr
