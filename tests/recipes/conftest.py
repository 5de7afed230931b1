"""A tiny run of a recipe's own file, in this process or as one of its own."""

import json
import os
import runpy
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

ROOT = Path(__file__).resolve().parents[2]
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
        names = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "LIT_SCALE_CACHE": str(self.folder / "cache")}
        return {name: value for name, value in os.environ.items() if name != "PL_GLOBAL_SEED"} | names

    def here(self, *args: str) -> int:
        """Run in this process; the exit code."""
        given = sys.argv
        sys.argv = [str(BERT), *self.flags, *args]
        try:
            runpy.run_path(str(BERT), run_name="__main__")
        except SystemExit as error:
            return int(error.code or 0)
        finally:
            sys.argv = given
        return 0

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
def tiny(tmp_path: Path, tiny_corpus: Path, monkeypatch: pytest.MonkeyPatch) -> Tiny:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIT_SCALE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    return Tiny(tmp_path, tiny_corpus)


@pytest.fixture
def same_run() -> Callable[[Tiny, str, str], None]:
    """Assert that two folders hold the same run: weights, optimizer, schedule, counts, metrics."""

    def compare(tiny: Tiny, one: str, other: str) -> None:
        a, b = tiny.checkpoint(one), tiny.checkpoint(other)
        assert a["global_step"] == b["global_step"]
        for part in ("state_dict", "optimizer_states", "lr_schedulers"):
            assert_equal(a[part], b[part], part)
        a, b = tiny.record(one), tiny.record(other)
        for name in ("steps", "samples", "tokens", "flops", "metrics", "unigram_entropy"):
            assert a[name] == b[name], name

    return compare


def assert_equal(one: Any, other: Any, where: str) -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_equal(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_equal(a, b, f"{where}[{index}]")
    else:
        assert one == other, where


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
