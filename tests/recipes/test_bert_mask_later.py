"""The recipe's own file: what it trains, and that its checkpoint says so."""

import runpy
import sys
from pathlib import Path

import pytest
import torch

from lit_scale.models import BertMLM

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli")

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "bert_mask_later.py"
ROOT = "runs/bert_mask_later"


def run(tiny, monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", [str(RECIPE), *tiny.flags, *args])
    try:
        runpy.run_path(str(RECIPE), run_name="__main__")
    except SystemExit as error:
        return int(error.code or 0)
    return 0


def test_masks_join_late_and_the_checkpoint_says_so(tiny, monkeypatch, capsys):
    assert run(tiny, monkeypatch, "--data.mask_rate=0.4", "--trainer.max_steps=20") == 0
    record, printed = tiny.record(ROOT), capsys.readouterr()
    (stage,) = record["stages"]
    assert stage["mask_later/kept"] == "unmasked"
    (plain,) = (kind for kind in record["step_kinds"] if kind["plain"])  # of which the run made none
    assert stage["flops"] / stage["steps"] < plain["flops_each"]
    assert record["metrics"]["val/loss"] < record["curve"][0]["metrics"]["val/loss"], "it learns"
    assert printed.err == ""
    assert any("masks join late" in key for key in tiny.checkpoint(ROOT)["state_dict"])
    with pytest.raises(RuntimeError, match="masks join late: evaluate with the technique"):
        BertMLM.load_from_checkpoint(Path(ROOT, "checkpoints", "last.ckpt"))


def test_more_masks_are_more_that_is_saved(tiny, monkeypatch):
    flops = []
    for rate in (0.15, 0.5):
        assert run(tiny, monkeypatch, f"--data.mask_rate={rate}", "--trainer.max_steps=2") == 0
        (stage,) = tiny.record(ROOT)["stages"]
        (plain,) = (kind for kind in tiny.record(ROOT)["step_kinds"] if kind["plain"])
        flops.append(stage["flops"] / stage["steps"] / plain["flops_each"])
    assert flops[1] < flops[0] < 1.0


def test_without_the_technique_it_is_the_plain_run(tiny, monkeypatch):
    assert run(tiny, monkeypatch, "--baseline") == 0
    assert tiny.here("--baseline", "--trainer.default_root_dir=plain") == 0  # of progressive stacking's recipe
    one, other = tiny.checkpoint(ROOT)["state_dict"], tiny.checkpoint("plain")["state_dict"]
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize(
    ("flag", "code", "message"),
    [
        ("before=3", 1, "before=3 and after=0.25 leave no block of the model's 4"),
        ("keep=0.5", 2, "--mask_later.keep=0.5"),
        ("until=0.5", 2, "--mask_later.until=0.5"),
    ],
)
def test_flags_that_cannot_work_are_one_line(tiny, monkeypatch, capsys, flag, code, message):
    assert run(tiny, monkeypatch, f"--mask_later.{flag}") == code
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
