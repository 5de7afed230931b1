"""The recipe's own file: what it trains, by default and as a control."""

import runpy
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli")

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "bert_random_ltd.py"
ROOT = "runs/bert_random_ltd"


def run(tiny, monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", [str(RECIPE), *tiny.flags, *args])
    try:
        runpy.run_path(str(RECIPE), run_name="__main__")
    except SystemExit as error:
        return int(error.code or 0)
    return 0


def test_the_recipe_drops_fewer_and_fewer_tokens(tiny, monkeypatch, capsys):
    assert run(tiny, monkeypatch, "--random_ltd.keep=0.25", "--random_ltd.stages=3", "--trainer.max_steps=20") == 0
    record, printed = tiny.record(ROOT), capsys.readouterr()
    assert [stage["random_ltd/kept"] for stage in record["stages"]] == [0.25, 0.5, 0.75, 1.0]
    each = [stage["flops"] / stage["steps"] for stage in record["stages"]]
    assert each == sorted(set(each))
    assert record["metrics"]["val/loss"] < record["curve"][0]["metrics"]["val/loss"], "it learns"
    assert record["technique"] == "random_ltd"
    assert printed.err == ""


def test_as_a_control_it_keeps_the_same_share_throughout(tiny, monkeypatch):
    """The command that token dropping's static control is run by."""
    flags = "--random_ltd.keep 0.5 --random_ltd.before 2 --random_ltd.after 1 --random_ltd.until 1.0"
    assert run(tiny, monkeypatch, *flags.split(), "--random_ltd.stages", "1") == 0
    (stage,) = tiny.record(ROOT)["stages"]
    assert stage["random_ltd/kept"] == 0.5
    assert stage["steps"] == 8
    assert not stage["plain"]


@pytest.mark.parametrize(
    ("flag", "code", "message"),
    [
        ("keep=2", 1, "keep=2.0 is not a share of the tokens"),
        ("stages=0", 1, "stages=0 must be at least 1"),
        ("before=3", 1, "before=3 and after=1 leave no block of the model's 4"),
        ("beta=0.9", 2, "--random_ltd.beta=0.9"),
    ],
)
def test_flags_that_cannot_work_are_one_line(tiny, monkeypatch, capsys, flag, code, message):
    assert run(tiny, monkeypatch, f"--random_ltd.{flag}") == code
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
