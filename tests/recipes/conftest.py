"""A tiny run of a recipe's own file, in this process or as one of its own."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.equality import assert_same
from tests.support.processes import ROOT, environment, run_file

BERT = ROOT / "recipes" / "bert_progressive_stack.py"
TINY = {
    "trainer.max_steps": 8,
    "trainer.enable_progress_bar": "false",
    "model.depth": 4,
    "model.width": 16,
    "model.num_heads": 2,
    "data.sequence_length": 16,
    "data.batch_size": 4,
    "data.max_val_sequences": 16,
}


@dataclass
class Tiny:
    """Runs ``bert_progressive_stack`` with small flags; further ones win."""

    folder: Path
    corpus: Path

    @property
    def flags(self) -> list[str]:
        return [f"--{name}={value}" for name, value in {**TINY, "data.corpus": self.corpus}.items()]

    @property
    def environment(self) -> dict[str, str]:
        names = environment(LIT_SCALE_CACHE=str(self.folder / "cache"))
        return {name: value for name, value in names.items() if name != "PL_GLOBAL_SEED"}

    def here(self, *args: str) -> int:
        """Run in this process; the exit code."""
        return run_file(BERT, *self.flags, *args)

    def start(self, *args: str, command: list[str] | None = None, **options: Any) -> "subprocess.Popen[str]":
        """Start a process of its own; ``command`` replaces the command line."""
        command = command or [sys.executable, str(BERT), *self.flags, *args]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(
            command, cwd=self.folder, env=self.environment, start_new_session=True, **pipes, **options
        )

    def record(self, root: str = "runs/bert_progressive_stack") -> dict[str, Any]:
        return json.loads((self.folder / root / "result.json").read_text())

    def checkpoint(self, root: str = "runs/bert_progressive_stack") -> dict[str, Any]:
        return torch.load(self.folder / root / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.fixture
def tiny(own_folder: Path, tiny_corpus: Path) -> Tiny:
    return Tiny(own_folder, tiny_corpus)


@pytest.fixture
def same_run() -> Callable[[Tiny, str, str], None]:
    """Assert that two folders hold the same run: weights, optimizer, schedule, counts, metrics."""

    def compare(tiny: Tiny, one: str, other: str) -> None:
        a, b = tiny.checkpoint(one), tiny.checkpoint(other)
        assert a["global_step"] == b["global_step"]
        for part in ("state_dict", "optimizer_states", "lr_schedulers"):
            assert_same(a[part], b[part], part)
        a, b = tiny.record(one), tiny.record(other)
        for name in ("steps", "samples", "tokens", "flops", "metrics", "unigram_entropy"):
            assert a[name] == b[name], name

    return compare


@pytest.fixture
def await_file() -> Callable[..., None]:
    """Wait until a file is there, and newer than ``since``, while a process lives."""

    def wait(path: Path, process: "subprocess.Popen[str]", since: int = 0, timeout: float = 240) -> None:
        deadline = time.monotonic() + timeout
        while not (path.exists() and path.stat().st_mtime_ns > since):
            if process.poll() is not None or time.monotonic() > deadline:
                os.killpg(process.pid, signal.SIGKILL)
                raise AssertionError(f"no {path.name}, exit {process.returncode}: {process.communicate()}")
            time.sleep(0.005)

    return wait
