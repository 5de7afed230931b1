"""The two recipes whose sides differ in the optimizer: as many samples, smaller state."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.processes import run_file

pytestmark = pytest.mark.filterwarnings("ignore")

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
NETWORK = ["--model.depth=2", "--model.num_heads=2", "--data.sequence_length=16", "--data.batch_size=4"]
FLAGS = {
    "bert_large_batch": [
        *NETWORK,
        "--model.width=16",
        "--trainer.limit_train_batches=32",
        "--large_batch.times=4",
    ],
    "gpt_eight_bit_optimizer": [*NETWORK, "--model.width=128", "--trainer.max_steps=8"],
}


@pytest.fixture
def run(own_folder: Path, tiny_corpus: Path) -> Any:
    def run(recipe: str, *flags: str) -> int:
        common = ["--trainer.enable_progress_bar=false", "--data.max_val_sequences=8", f"--data.corpus={tiny_corpus}"]
        return run_file(RECIPES / f"{recipe}.py", *common, *FLAGS[recipe], *flags)

    return run


def test_lamb_takes_as_many_samples_in_fewer_steps(run: Any, tmp_path: Path, capsys: Any) -> None:
    assert run("bert_large_batch", "--compare") == 0
    printed = capsys.readouterr()
    baseline, large = json.loads((tmp_path / "runs/bert_large_batch/comparison.json").read_text()).values()
    assert (baseline["steps"], large["steps"]) == (32, 8)
    assert baseline["samples"] == large["samples"] == 128
    assert large["metrics"]["val/loss"] < large["curve"][0]["metrics"]["val/loss"]
    assert "gradient_noise_scale/critical_batch" not in baseline["metrics"]
    assert "at equal samples, not equal loss" in printed.out
    assert printed.out.count("gradient noise scale:") == 1
    assert printed.err.count("can estimate nothing") <= 1  # of the baseline's steps, each of one batch


def test_8_bit_state_is_smaller_and_the_loss_as_good(run: Any, tmp_path: Path, capsys: Any) -> None:
    assert run("gpt_eight_bit_optimizer", "--compare") == 0
    printed = capsys.readouterr()
    plain, small = json.loads((tmp_path / "runs/gpt_eight_bit_optimizer/comparison.json").read_text()).values()
    assert small["optimizer_state_bytes"] < 0.35 * plain["optimizer_state_bytes"]
    assert small["flops"] == plain["flops"]
    assert small["metrics"]["val/loss"] == pytest.approx(plain["metrics"]["val/loss"], rel=0.02)
    assert "optimizer state bytes" in printed.out
    assert printed.err == ""


@pytest.mark.parametrize("recipe", FLAGS)
def test_a_recipe_resumes_exactly(recipe: str, run: Any, tmp_path: Path) -> None:
    saved = (
        '--trainer.callbacks=[{"class_path":"lightning.pytorch.callbacks.ModelCheckpoint","init_args":'
        '{"dirpath":"kept","filename":"{step}","every_n_train_steps":3,"save_top_k":-1}}]'
    )
    assert run(recipe, saved) == 0
    rest = ["--trainer.callbacks=null", "--trainer.default_root_dir=runs/rest", "--ckpt_path=kept/step=3.ckpt"]
    assert run(recipe, *rest) == 0
    whole, resumed = (
        torch.load(tmp_path / "runs" / name / "checkpoints" / "last.ckpt", weights_only=True)
        for name in (recipe, "rest")
    )
    for name, tensor in whole["state_dict"].items():
        assert torch.equal(tensor, resumed["state_dict"][name]), name


def test_no_file_is_saved_inside_a_step(run: Any, tmp_path: Path) -> None:
    """Validated in the middle of a step, where its gradients would be lost with the process."""
    every = ["--trainer.val_check_interval=3", "--trainer.check_val_every_n_epoch=null"]
    seen = []

    from lightning.pytorch.callbacks import ModelCheckpoint

    save = ModelCheckpoint._save_last_checkpoint

    def noted(self: Any, trainer: Any, *args: Any) -> None:
        seen.append(trainer.fit_loop.total_batch_idx + 1)
        save(self, trainer, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelCheckpoint, "_save_last_checkpoint", noted)
        assert run("bert_large_batch", *every) == 0
    assert seen
    assert all(batches % 4 == 0 for batches in seen)
