import logging
import warnings
from argparse import ArgumentError

import pytest
from lightning.pytorch.utilities import rank_zero_only

from lit_scale.cli.console import fail, quiet, rank
from lit_scale.guards import NonFiniteError


def said(error: BaseException, code: int, capsys: pytest.CaptureFixture[str]) -> str:
    """What is printed where a process ends with an error."""
    with pytest.raises(SystemExit) as caught:
        fail(error, code)
    assert caught.value.code == code
    assert caught.value.__cause__ is error
    printed = capsys.readouterr()
    assert printed.out == ""
    return printed.err


@pytest.fixture(autouse=True)
def _no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIT_SCALE_TRACEBACK", raising=False)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("a\n  wrong   value [bold]"), "error: a wrong value [bold]\n"),
        (NonFiniteError("step 3"), "error: step 3\n"),
        (FileNotFoundError(2, "No such file", "x.txt"), "error: No such file: 'x.txt'\n"),
        (KeyError("x"), "error: KeyError: 'x' (LIT_SCALE_TRACEBACK=1 shows where)\n"),
        (ValueError(), "error: ValueError\n"),
        (KeyboardInterrupt(), "error: KeyboardInterrupt: interrupted; nothing was saved since the last checkpoint"),
        (ValueError("x" * 2_000), f"error: {'x' * 1_000}...\n"),
        (ArgumentError(None, "Parser key \"model.depth\": <class 'a.b.Net'>"), "--model.depth: Net"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_an_error_is_one_line(error: BaseException, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = said(error, 1, capsys)
    assert line in found
    assert found.count("\n") == 1


def test_the_traceback_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIT_SCALE_TRACEBACK", "1")
    with pytest.raises(KeyError, match="x"):
        fail(KeyError("x"), 1)


def test_a_rank_says_which_it_is_unless_another_one_ended_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    assert rank() == 1
    assert said(ValueError("here"), 2, capsys) == "error (rank 1): here\n"
    assert said(RuntimeError("Connection closed by peer"), 1, capsys) == ""
    monkeypatch.setattr(rank_zero_only, "rank", 0)
    assert "Connection closed by peer" in said(RuntimeError("Connection closed by peer"), 1, capsys)


def test_what_lightning_says_on_every_run_is_left_out_and_only_inside() -> None:
    logger, lines = logging.getLogger("lightning.pytorch"), []

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    handler = Lines()
    logger.addHandler(handler)
    try:
        with quiet():
            logger.warning("GPU available: False")
            logger.warning("[rank: 1] Seed set to 3")
            logger.warning("something new")
        logger.warning("GPU available: False")
    finally:
        logger.removeHandler(handler)
    assert lines == ["something new", "GPU available: False"]


def test_known_warnings_are_left_out_and_others_are_not() -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with quiet():
            warnings.warn("The 'train_dataloader' does not have many workers", stacklevel=1)
            warnings.warn("another one", stacklevel=1)
    assert [str(one.message) for one in told] == ["another one"]
