"""Fixtures and settings that all tests share."""

import functools
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Before any library reads them: tests stay off the network and leave the terminal to pytest.
for _name, _value in {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "Agg",
}.items():
    os.environ.setdefault(_name, _value)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests run after all others, so that one run of pytest fails early and counts everything."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Sums in a fixed order: two runs that should be equal are equal to the last bit."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run_python(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a script in a process of its own: ``run_python(script, *args, timeout=120, env=None, cwd=None)``.

    ``script`` is a path, or the text of a script. The repository can be imported, OpenMP has one thread, and the
    folder is ``tmp_path`` unless ``cwd`` says otherwise. At the timeout the whole process group is killed and
    ``subprocess.TimeoutExpired`` raised. The exit status is for the test to judge; when it is not 0, what the script
    wrote is shown with a failing test.
    """
    from tests.support.processes import run_python

    return functools.partial(run_python, folder=tmp_path)


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of a recipe that runs in this process, with its cache in it and no seed from outside."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIT_SCALE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    return tmp_path


@pytest.fixture
def tiny_corpus(tmp_path: Path) -> Path:
    """A folder of 40 small text files, about 60 kB altogether, the same in every run."""
    from tests.support.data import write_corpus

    return write_corpus(tmp_path / "corpus")
