"""Fixtures and settings that all tests share."""

import contextlib
import functools
import os
import random
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

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

# What a distributed launcher leaves in the environment; a script of its own must not take itself for a rank.
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


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


def _end_group(process: subprocess.Popen[str]) -> None:
    """Kill a process that leads its own group, and with it the ranks and workers that it started."""
    with contextlib.suppress(ProcessLookupError):  # all of them have ended
        os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def run_python(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a script in a process of its own: ``run_python(script, *args, timeout=120, env=None, cwd=None)``.

    ``script`` is a path, or the text of a script. The repository can be imported, OpenMP has one thread, and the
    folder is ``tmp_path`` unless ``cwd`` says otherwise. At the timeout the whole process group is killed and
    ``subprocess.TimeoutExpired`` raised. The exit status is for the test to judge; when it is not 0, what the script
    wrote is shown with a failing test.
    """

    def run(
        script: str | Path,
        *args: str | Path,
        timeout: float = 120,
        env: dict[str, str] | None = None,
        cwd: str | Path | None = None,
    ) -> subprocess.CompletedProcess[str]:
        if isinstance(script, str):
            text, script = script, tmp_path / "script.py"
            script.write_text(textwrap.dedent(text))
        variables = {name: value for name, value in os.environ.items() if name not in _RANK_VARIABLES}
        path = [str(ROOT), *filter(None, [variables.get("PYTHONPATH")])]
        variables |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path)} | (env or {})
        command = [sys.executable, str(script), *map(str, args)]
        with subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=variables,
            cwd=cwd or tmp_path,
            start_new_session=True,
        ) as process:
            try:
                stdout, stderr = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                _end_group(process)
                stdout, stderr = process.communicate()
                print(stdout, stderr, sep="\n")
                raise
            finally:
                _end_group(process)  # nothing that a script started outlives its test
        if process.returncode:
            print(stdout, stderr, sep="\n")
        return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)

    return run


@functools.cache
def _documents(count: int = 40, size: int = 1500) -> tuple[str, ...]:
    """Deterministic pseudo-English: invented words, a few of them frequent, in a handful of sentence shapes."""
    rng = random.Random(0)

    def words(number: int, ending: str = "") -> list[str]:
        syllables = [
            onset + vowel
            for onset in ("b", "d", "f", "gr", "k", "l", "m", "n", "pl", "s", "t", "v")
            for vowel in "aeiou"
        ]
        return [
            "".join(rng.choices(syllables, k=rng.randint(1, 3))) + rng.choice("nrst") + ending for _ in range(number)
        ]

    kinds = {"N": words(120), "V": words(60, "s"), "A": words(60, "y"), "R": words(20, "ly")}
    weights = {kind: [1 / (rank + 1) for rank in range(len(members))] for kind, members in kinds.items()}
    shapes = [
        "the N V the A N.",
        "a A N V R.",
        "the N of the N V a N, and the N V.",
        "when the N V, the A N V R.",
        "no N V the N but the A N.",
    ]

    def fill(word: str) -> str:
        kind, rest = word[0], word[1:]
        return rng.choices(kinds[kind], weights[kind])[0] + rest if kind in kinds else word

    documents = []
    for _ in range(count):
        text = ""
        while len(text) < size:
            sentence = " ".join(map(fill, rng.choice(shapes).split()))
            text += sentence.capitalize() + rng.choice([" ", " ", " ", "\n"])
        documents.append(text.rstrip() + "\n")
    return tuple(documents)


@pytest.fixture
def tiny_corpus(tmp_path: Path) -> Path:
    """A folder of 40 small text files, about 60 kB altogether, the same in every run."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for index, text in enumerate(_documents()):
        (folder / f"{index:02d}.txt").write_text(text)
    return folder
