"""Every recipe's own file, with its defaults but for sizes: with and without the technique, and resumed."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.filterwarnings("ignore")

ROOT = Path(__file__).resolve().parents[2]
NETWORK = ["--model.depth=2", "--model.width=16", "--model.num_heads=2"]
TEXT = [*NETWORK, "--data.sequence_length=16", "--data.batch_size=4", "--data.max_val_sequences=8"]
IMAGES = [*NETWORK, "--data.image_size=16", "--data.batch_size=8", "--data.max_val_images=32"]
DECODER = ["--model.decoder_depth=1", "--model.decoder_width=8", "--model.decoder_heads=2"]
FLAGS = {
    "bert_dynamic_sparsity": [*TEXT, "--dynamic_sparsity.density=0.5"],
    "gpt_sequence_length_warmup": TEXT,
    "vit_patch_dropping": IMAGES,
    "vit_resolution_growing": IMAGES,
    "vit_importance_sampling": IMAGES,
    "vit_importance_sampling_text": ["--task=text", *TEXT],
    "vit_selective_backprop": IMAGES,
    "mae_masked_token_skip": [*IMAGES, *DECODER, "--trainer.callbacks=null"],
    "bert_all_in_one": [*TEXT, "--model.depth=4"],
    "bert_token_dropping": [*TEXT, "--model.depth=4"],
    "bert_random_ltd": [*TEXT, "--model.depth=4"],
    "bert_mask_later": [*TEXT, "--model.depth=4"],
    "vit_all_in_one": IMAGES,
}


def run(recipe: str, *flags: str) -> int:
    path, given = str(ROOT / "recipes" / f"{recipe.removesuffix('_text')}.py"), sys.argv
    sys.argv = [path, "--trainer.max_steps=8", "--trainer.enable_progress_bar=false", *FLAGS[recipe], *flags]
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as error:
        return int(error.code or 0)
    finally:
        sys.argv = given
    return 0


def test_every_recipe_that_trains_is_here() -> None:
    trains = {path.stem for path in (ROOT / "recipes").glob("*.py") if "run_recipe" in path.read_text()}
    own = {
        "bert_progressive_stack",
        "bert_large_batch",
        "gpt_eight_bit_optimizer",
        "vit_rho_loss",
    }  # have tests of their own
    assert {recipe.removesuffix("_text") for recipe in FLAGS} == trains - own


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, tiny_corpus: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIT_SCALE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    for recipe, flags in FLAGS.items():
        if TEXT[-1] in flags:
            monkeypatch.setitem(FLAGS, recipe, [*flags, f"--data.corpus={tiny_corpus}"])
    return tmp_path


def plain_steps(record: dict) -> set[int]:
    """FLOPs of the plain steps, whether they were made or only priced."""
    return {s["flops_each"] for s in record["step_kinds"] if s["phase"] == "train" and s["plain"] and s["update"]}


@pytest.mark.parametrize("recipe", FLAGS)
def test_a_recipe_compares_both_sides_and_tells_what_was_saved(recipe: str, folder: Path, capsys) -> None:
    assert run(recipe, "--compare") == 0
    printed = capsys.readouterr()
    root = folder / "runs" / recipe
    baseline, technique = json.loads((root / "comparison.json").read_text()).values()
    if recipe.startswith("vit_importance_sampling"):  # in so few steps its gate stays closed
        assert technique["flops"] == baseline["flops"]
    else:
        assert technique["flops"] < baseline["flops"]
    plain = [plain_steps(record) for record in (baseline, technique)]
    assert plain[1]
    assert plain[1] <= plain[0]  # each side has priced the same plain step, also the one that never made it
    assert technique["steps"] == baseline["steps"] == 8
    assert technique["metrics"].keys() == baseline["metrics"].keys() >= {"val/loss"}
    assert "at equal steps, not equal loss" in printed.out
    assert "error" not in printed.err
    assert (root / "comparison.png").stat().st_size > 10_000


@pytest.mark.parametrize("recipe", FLAGS)
def test_a_recipe_resumes_exactly(recipe: str, folder: Path) -> None:
    saved = (
        '--trainer.callbacks=[{"class_path":"lightning.pytorch.callbacks.ModelCheckpoint","init_args":'
        '{"dirpath":"kept","filename":"{step}","every_n_train_steps":3,"save_top_k":-1}}]'
    )
    assert run(recipe, saved) == 0
    assert run(recipe, "--trainer.default_root_dir=runs/rest", "--ckpt_path=kept/step=3.ckpt") == 0
    whole, rest = (
        torch.load(folder / "runs" / name / "checkpoints" / "last.ckpt", weights_only=True) for name in (recipe, "rest")
    )
    assert whole["state_dict"].keys() == rest["state_dict"].keys()
    for name, tensor in whole["state_dict"].items():
        assert torch.equal(tensor, rest["state_dict"][name]), name
    assert json.loads((folder / "runs" / "rest" / "result.json").read_text())["steps"] == 8


def test_an_unknown_task_is_one_clear_error(capsys) -> None:
    assert run("vit_importance_sampling", "--task=speech") == 2
    assert capsys.readouterr().err == "error: --task: expected one of 'text'. Got value: speech\n"
