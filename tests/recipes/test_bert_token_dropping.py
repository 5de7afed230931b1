"""The recipe's own file: what it trains, and that without the technique it is the plain run."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli")

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "bert_token_dropping.py"
ROOT = "runs/bert_token_dropping"


def run(tiny, monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", [str(RECIPE), *tiny.flags, *args])
    try:
        runpy.run_path(str(RECIPE), run_name="__main__")
    except SystemExit as error:
        return int(error.code or 0)
    return 0


def test_the_recipe_drops_tokens_and_tells_what_it_saved(tiny, monkeypatch, capsys):
    assert run(tiny, monkeypatch, "--token_dropping.until=0.5", "--trainer.max_steps=20") == 0
    record, printed = tiny.record(ROOT), capsys.readouterr()
    assert [stage["token_dropping/kept"] for stage in record["stages"]] == [0.25, 1.0]
    quarter, full = (stage["flops"] / stage["steps"] for stage in record["stages"])
    assert quarter < full
    assert record["metrics"]["val/loss"] < record["curve"][0]["metrics"]["val/loss"], "it learns"
    assert re.search(r"-\d+% FLOPs", printed.out)
    assert printed.err == ""
    state = next(s for name, s in tiny.checkpoint(ROOT)["callbacks"].items() if name.startswith("TokenDropping"))
    assert state["running_loss"].shape == (258,)
    assert (state["running_loss"] < 10.0).any()


@pytest.mark.parametrize("flags", [["--token_dropping.keep=1.0"], ["--token_dropping.keep=0.5", "--baseline"]])
def test_without_dropping_it_is_the_plain_run(tiny, monkeypatch, flags):
    assert run(tiny, monkeypatch, *flags) == 0
    assert tiny.here("--baseline", "--trainer.default_root_dir=plain") == 0  # of progressive stacking's recipe
    one, other = tiny.checkpoint(ROOT)["state_dict"], tiny.checkpoint("plain")["state_dict"]
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert tiny.record(ROOT)["flops"] == tiny.record("plain")["flops"]


@pytest.mark.parametrize(
    ("flag", "code", "message"),
    [
        ("drop=random", 2, "--token_dropping.drop=random; did you mean --token_dropping"),
        ("seed=2", 2, "--token_dropping.seed=2"),
        ("keep=2", 1, "keep=2.0 is not a share of the tokens"),
        ("before=4", 1, "before=4 and after=1 leave no block of the model's 4"),
    ],
)
def test_flags_that_cannot_work_are_one_line(tiny, monkeypatch, capsys, flag, code, message):
    assert run(tiny, monkeypatch, f"--token_dropping.{flag}") == code
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
