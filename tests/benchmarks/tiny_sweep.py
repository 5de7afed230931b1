"""A sweep of seconds: digits, two sizes, two seeds; run as a script by test_clock.py, with a folder to write into."""

import sys
from dataclasses import replace
from pathlib import Path

from clock import Sweep
from entries import Control, Entry, flags
from tasks import TASKS, ladder

from runs import Runner

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    task = replace(
        TASKS["image_noisy"],
        name="tiny",
        sizes=ladder((1, 32), (2, 32)),
        unit="1x32",
        budgets=(40, 80, 160),
        headline=80,
        trained=("2x32", 80),
        rates=(1e-3, 2e-3),
        seeds=(1, 2),
    )
    entry = Entry(
        "patch_dropping",
        "vit_patch_dropping",
        "tiny",
        Control("half of the depth", size={"2x32": "1x32", "1x32": "2x32"}),
        flags=flags("patch_dropping", fraction=0.5),
        variants={"a quarter": flags("patch_dropping", fraction=0.25)},
    )
    runner = Runner(folder / "runs", [0, 1])
    sweep = Sweep(task, runner, folder / "results")
    sweep.make_plain()
    sweep.make_technique(entry)
