import io
import os
from typing import Any

import pytest
from rich.console import Console

from lit_scale.cli.report import amount, saving_line, seconds, stage_table

WIDE: dict[str, Any] = {
    "recipe": "bert_progressive_stack",
    "technique": "progressive_stacking",
    "baseline": False,
    "steps": 1_000_000,
    "samples": 10**6,
    "tokens": 10**12,
    "flops": 3.1e21,
    "reference_seconds": 1.2e6,
    "metrics": {"val/loss": 2.123},
    "stages": [
        {"progressive_stacking/blocks": n, "progressive_stacking/frozen": f, "plain": n == 96, "first_step": 250_000,
         "steps": 250_000, "samples": 1, "tokens": 2 * 10**11, "flops": 1e21, "reference_seconds": 4e5,
         "metrics": {"val/loss": 11.5}}
        for n, f in ((24, 0), (48, 24), (96, 0))
    ],
}  # fmt: skip


def test_the_table_is_readable_at_80_columns_whatever_the_numbers():
    console = Console(width=80, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(stage_table(WIDE))
    text = console.export_text()
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80
    assert "frozen" in text
    pictures = WIDE | {"samples": 10**12}
    console.print(stage_table(pictures))
    assert "samples" in (text := console.export_text())
    assert "tokens" not in text
    still = WIDE | {"stages": [stage | {"progressive_stacking/frozen": 0} for stage in WIDE["stages"]]}
    console.print(stage_table(still))
    assert "frozen" not in console.export_text()


def test_the_saving_is_told_against_the_plain_step_only():
    line = saving_line(WIDE)
    assert line.startswith("against 1,000,000 steps of the full model: -22% FLOPs, -25% reference seconds")
    made = {"phase": "train", "plain": False, "update": True, "count": 1_000_000}
    unfinished = WIDE | {"stages": [stage | {"plain": False} for stage in WIDE["stages"]], "step_kinds": [made]}
    assert saving_line(unfinished).startswith("no step was the full model's")
    plain = made | {"plain": True, "count": 0, "flops_each": 6.2e15, "seconds_each": 1.5}  # the clock priced one apart
    line = saving_line(unfinished | {"step_kinds": [made, plain]})
    assert line.startswith("against 1,000,000 steps of the full model: -50% FLOPs, -20% reference seconds")
    accumulated = unfinished | {
        "step_kinds": [made, plain, made | {"update": False}]
    }  # a step is more than one of these
    assert saving_line(accumulated).startswith("no step was the full model's")
    assert saving_line(WIDE | {"baseline": True}) == ""
    assert "34% below the unigram entropy" in saving_line(WIDE | {"baseline": True, "unigram_entropy": 3.2})
    classifier = {"baseline": True, "metrics": {"val/accuracy": 0.5}, "chance_accuracy": 0.125}
    expected = "validation accuracy 50.0%; always the most frequent class would reach 12.5%"
    assert saving_line(WIDE | classifier) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0, "0"), (999, "999"), (999.7, "1.00k"), (12_345, "12.3k"), (999_600, "1.00M"), (1.5e21, "1.50Z")],
)
def test_amounts(value, expected):
    assert amount(value) == expected


def test_seconds_have_three_digits():
    assert [seconds(value) for value in (0.01234, 1.234, 123.4, 12345.6)] == ["0.012", "1.2", "123.4", "12,346"]


def test_columns_of_two_techniques_that_use_one_word_are_told_apart():
    both = [stage | {"token_dropping/kept": 0.5, "rho_loss/kept": 0.1} for stage in WIDE["stages"]]
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(stage_table(WIDE | {"stages": both}))
    text = console.export_text()
    assert "token dropping kept" in text
    assert "rho loss kept" in text
    assert "progressive stacking blocks" not in text
