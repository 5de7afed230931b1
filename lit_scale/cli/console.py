"""Console output of a recipe: errors in one line, without the messages that Lightning prints on every run."""

from __future__ import annotations

import logging
import os
import re
import warnings
from argparse import ArgumentError
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console

from lit_scale.guards import NonFiniteError

__all__ = ["fail", "quiet", "rank", "say"]

_EXPECTED = (ValueError, OSError, ImportError, NonFiniteError, MisconfigurationException)  # of the input, not bugs
_NOISE = (
    "GPU available",
    "TPU available",
    "HPU available",
    "💡 Tip",
    "Seed set to",
    "`Trainer.fit` stopped",
    "`Trainer(val_check_interval=1)`",
    "Restor",  # -ing, -ed states from the checkpoint
    "\nDetected KeyboardInterrupt",
    "Initializing distributed",
    "ProgressiveStacking: ",  # shown in the table of stages
    "CostMeter: wrote",
    "-" * 20,
    "distributed_backend",
)
_LOGGERS = ("lightning", "lightning.pytorch", "lightning.fabric")
_KNOWN_WARNINGS = (
    "LightningCLI's args parameter",  # recipes are tested with it
    r"`isinstance\(treespec, LeafSpec\)`",  # Lightning's use of torch
    "Checkpoint directory .* exists and is not empty",  # true of every resumed run
    ".*does not have many workers",  # the meter reports the cost of waiting for data
)


def _is_news(record: logging.LogRecord) -> bool:
    return not re.sub(r"^\[rank: \d+\] ", "", record.getMessage()).startswith(_NOISE)


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress the messages that Lightning prints on every run; other messages and warnings are shown."""
    handlers = [handler for name in _LOGGERS for handler in logging.getLogger(name).handlers]
    for handler in handlers:
        handler.addFilter(_is_news)
    try:
        with warnings.catch_warnings():
            for message in _KNOWN_WARNINGS:
                warnings.filterwarnings("ignore", message)
            yield
    finally:
        for handler in handlers:
            handler.removeFilter(_is_news)


def fail(error: BaseException, code: int) -> NoReturn:
    """End the process with one line on stderr, or with the traceback if LIT_SCALE_TRACEBACK is set."""
    if os.environ.get("LIT_SCALE_TRACEBACK"):
        raise error
    text = _one_line(error) or type(error).__name__
    if rank() and re.search(r"[Cc]onnection (closed|reset) by peer", text):
        raise SystemExit(code) from error  # another rank ended first, and has printed the cause
    if code == 1 and not isinstance(error, _EXPECTED):
        text = f"{type(error).__name__}: {text} (LIT_SCALE_TRACEBACK=1 shows where)"
    console = Console(stderr=True)
    console.print("[bold red]error[/]" + (f" (rank {rank()})" if rank() else ""), end=": ")
    say(console, text)
    raise SystemExit(code) from error


def _one_line(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; nothing was saved since the last checkpoint"
    text = " ".join(str(error).split())
    if isinstance(error, OSError):
        text = text.removeprefix(f"[Errno {error.errno}] ")
    if isinstance(error, ArgumentError):
        text = re.sub(r'Parser key "([^"]+)":?', r"--\1:", text)
        text = re.sub(r"<class '(?:[\w.]+\.)?(\w+)'>", r"\1", text)
        text = re.sub(r"typing\.Literal\[([^\]]*)\]", r"one of \1", text).replace("Expected a ", "expected ")
    return text if len(text) < 1000 else f"{text[:1000]}..."


def say(console: Console, text: str) -> None:
    """Print a line without markup, highlighting or wrapping."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def rank() -> int:
    """Rank of this process; 0 if there is only one."""
    return getattr(rank_zero_only, "rank", 0)
