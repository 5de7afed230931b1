"""The recipe's own file: it trains, compares and probes."""

import json
import re
from pathlib import Path

import pytest
import torch

from tests.support.processes import run_file

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli"),
    pytest.mark.filterwarnings("ignore:.*val_dataloader"),
]

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "mae_masked_token_skip.py"
TINY = {
    "trainer.max_steps": 4,
    "trainer.enable_progress_bar": "false",
    "data.image_size": 8,
    "data.batch_size": 16,
    "data.max_val_images": 32,
    "model.patch_size": 2,
    "model.depth": 2,
    "model.width": 16,
    "model.num_heads": 2,
    "model.decoder_width": 8,
    "model.decoder_heads": 2,
}


@pytest.fixture
def run(own_folder):
    return lambda *args: run_file(RECIPE, *(f"--{name}={value}" for name, value in TINY.items()), *args)


def test_compare_trains_both_from_the_same_start_and_probes_both(run, capsys):
    probe = [{"class_path": "lit_scale.models.ProbeAtEnd", "init_args": {"steps": 2}}]  # not 100
    run("--compare", f"--trainer.callbacks={json.dumps(probe)}")
    root = Path("runs/mae_masked_token_skip")
    out = capsys.readouterr().out
    records = json.loads((root / "comparison.json").read_text())
    assert list(records) == ["baseline", "masked_token_skip"]
    for arm, record in records.items():
        assert record["steps"] == 4
        for name in ("linear_probe_accuracy", "fine_tune_accuracy"):
            assert 0 <= record[name] <= 1
            assert f"{name.replace('_', ' ')}: {record[name]:.1%}" in out
        state = torch.load(root / arm / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        assert state["_extra_state"].item() == (arm == "baseline")
    assert records["masked_token_skip"]["flops"] < 0.5 * records["baseline"]["flops"]
    assert re.search(r"val/loss +[\d.]+ +[\d.]+ +[-+]\d+%", out)


def test_a_resumed_run_ends_where_the_uninterrupted_one_does(run):
    saving = {"dirpath": "steps", "filename": "{step}", "every_n_train_steps": 2, "save_top_k": -1}
    run(f"--trainer.callbacks={json.dumps([{'class_path': 'ModelCheckpoint', 'init_args': saving}])}")
    run("--trainer.callbacks=null", "--trainer.default_root_dir=runs/rest", "--ckpt_path=steps/step=2.ckpt")
    whole, rest = (
        torch.load(f"runs/{root}/checkpoints/last.ckpt", weights_only=True)
        for root in ("mae_masked_token_skip", "rest")
    )
    assert whole["global_step"] == rest["global_step"] == 4
    assert all(torch.equal(value, rest["state_dict"][name]) for name, value in whole["state_dict"].items())
    assert json.loads(Path("runs/rest/result.json").read_text())["steps"] == 4
