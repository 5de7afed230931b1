"""The recipe's own file: what it trains, and what it tells of sparsity that saves no time."""

from pathlib import Path

import pytest

from tests.support.processes import run_file

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli")

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "bert_dynamic_sparsity.py"
ROOT = "runs/bert_dynamic_sparsity"
HALF = ["--dynamic_sparsity.density=0.5"]  # the tiny model has two heads


def run(tiny, *args):
    return run_file(RECIPE, *tiny.flags, *args)


def test_the_recipe_computes_some_of_the_units_and_learns(tiny, capsys):
    assert run(tiny, *HALF, "--dynamic_sparsity.every=5", "--trainer.max_steps=30") == 0
    record, printed = tiny.record(ROOT), capsys.readouterr()
    few, all_ = record["stages"]
    assert (few["dynamic_sparsity/growing"], all_["dynamic_sparsity/growing"]) == (False, True)
    assert (few["steps"], all_["steps"]) == (26, 4)
    assert few["flops"] / few["steps"] < 0.7 * all_["flops"] / all_["steps"]
    assert record["metrics"]["val/loss"] < record["curve"][0]["metrics"]["val/loss"], "it learns"
    assert record["charges"]["mask update"]["count"] == 2 * 4  # new weights are drawn before the step
    assert "sparse_flops" not in record
    assert printed.err == ""


def test_what_a_sparse_kernel_would_save_is_told_apart(tiny, capsys):
    flags = ("--dynamic_sparsity.granularity=weight", "--dynamic_sparsity.density=0.2")
    assert run(tiny, *flags) == 0
    record, printed = tiny.record(ROOT), capsys.readouterr().out
    assert tiny.here("--baseline", "--trainer.default_root_dir=plain") == 0  # of progressive stacking's recipe
    assert record["flops"] == tiny.record("plain")["flops"]
    assert 0.15 * record["flops"] < record["sparse_flops"] < 0.5 * record["flops"]
    assert "a kernel that leaves zeros out would make" in printed


@pytest.mark.parametrize(
    ("flag", "code", "message"),
    [
        ("granularity=row", 2, "expected one of 'unit', 'weight', 'block', '2:4'"),
        ("density=2", 1, "density=2.0 is not a share of the weights"),
        ("density=0.1", 1, "density=0.1 leaves none of the 2 heads of encoder.blocks.0.attention; give 0.5 or more"),
    ],
)
def test_flags_that_cannot_work_are_one_line(tiny, capsys, flag, code, message):
    assert run(tiny, f"--dynamic_sparsity.{flag}") == code
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
