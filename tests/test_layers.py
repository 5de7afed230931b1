"""Who imports whom: dependencies point one way, and importing the techniques costs next to nothing."""

import ast
import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
GROUND = {"batches", "progress", "restoring", "schedules", "seeds", "trainers", "wrapping"}

#: Parts of lit_scale, each with all that it may import. ``cost`` prices optimizers and ``guards`` stands alone, so
#: neither imports the other, nor anything else on its own level.
MAY_IMPORT: dict[str, set[str]] = {
    **{name: set() for name in GROUND},
    "progress": {"trainers"},
    "technique": GROUND,
    "factors": GROUND | {"technique"},
    "guards": set(),
    "cost": GROUND | {"technique", "factors"},
    "nn": GROUND | {"technique", "factors", "cost", "guards"},
    "models": GROUND | {"technique", "factors", "cost", "guards", "nn"},
    "cli": GROUND | {"technique", "factors", "cost", "guards", "nn", "models"},
    "callbacks": GROUND | {"technique", "factors", "cost", "guards"},
    "datamodules": GROUND | {"guards"},
}
HEAVY = ("torchvision", "PIL", "timm", "transformers", "sklearn", "webdataset", "bitsandbytes", "matplotlib")


def modules() -> dict[str, Path]:
    """Every module of the package, by its name."""
    found = {}
    for folder in ("lit_scale", "callbacks", "datamodules"):
        for path in (ROOT / folder).rglob("*.py"):  # which does not follow the links
            parts = path.relative_to(ROOT).with_suffix("").parts
            parts = parts if parts[0] == "lit_scale" else ("lit_scale", *parts)
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


def imports(source: str, known: set[str]) -> Iterator[str]:
    """The modules of the package that a module imports: anywhere, in functions and for type checkers too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "lit_scale")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            if (node.module or "").split(".")[0] == "lit_scale":
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    yield inner if inner in known else node.module or ""


def part(name: str) -> str:
    """``lit_scale.factors.steps`` is a part of ``factors``."""
    return name.split(".")[1] if "." in name else ""


def wrong(sources: dict[str, str]) -> list[str]:
    """Imports that the layers do not allow."""
    known, found = set(sources), []
    for name, source in sources.items():
        allowed = MAY_IMPORT.get(part(name), set()) | {part(name), ""}
        found += [f"{name} imports {other}" for other in imports(source, known) if part(other) not in allowed]
    return found


def missing(sources: dict[str, str]) -> list[str]:
    """Imports of modules that are not there; an installed copy of the package could hide them."""
    known = set(sources)
    return [
        f"{name} imports {other}" for name, source in sources.items() for other in set(imports(source, known)) - known
    ]


def circles(sources: dict[str, str]) -> list[str]:
    """Modules that import each other, whichever way round."""
    known = set(sources)
    edges = {name: set(imports(source, known)) - {name} for name, source in sources.items()}
    for name in edges:  # a package's own __init__ is no dependency of the modules it gathers
        edges[name] = {other for other in edges[name] if not name.startswith(f"{other}.")}
    while leaves := {name for name, others in edges.items() if not others & edges.keys()}:
        edges = {name: others for name, others in edges.items() if name not in leaves}
    return sorted(edges)


def test_dependencies_point_one_way() -> None:
    sources = {name: path.read_text() for name, path in modules().items()}
    assert {part(name) for name in sources} - {""} == set(MAY_IMPORT), "a part without a place among the layers"
    assert not wrong(sources)
    assert not missing(sources)
    assert not circles(sources)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("lit_scale.technique", "from lit_scale.factors.blocks import find_blocks"),
        ("lit_scale.factors.sizes", "if TYPE_CHECKING:\n    from lit_scale.datamodules.loader import ResumableLoader"),
        ("lit_scale.factors.units", "def f():\n    from lit_scale.nn import Attention"),
        ("lit_scale.models.probe", "import lit_scale.cli.console"),
        ("lit_scale.callbacks.rho_loss", "from lit_scale.datamodules import cache"),
        ("lit_scale.callbacks.rho_loss", "from lit_scale import datamodules"),
    ],
)
def test_an_import_against_the_layers_is_found(name: str, line: str) -> None:
    sources = {known: path.read_text() for known, path in modules().items()}
    assert len(wrong(sources | {name: f"{sources[name]}\n{line}\n"})) == 1


def test_a_circle_is_found() -> None:
    sources = {name: path.read_text() for name, path in modules().items()}
    name = "lit_scale.factors.blocks"
    assert name in circles(sources | {name: f"{sources[name]}\nimport lit_scale.factors.tokens\n"})


def test_no_private_name_crosses_modules() -> None:
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lit_scale"):
                private = [alias.name for alias in node.names if alias.name.startswith("_")]
                assert not [one for one in private if not one.startswith("__")], name


# What lit_scale imports itself is noted apart: Lightning may have loaded it before, where it is installed.
IMPORT = f"""
import builtins, json, sys, time
import torch, lightning.pytorch

before, asked, plain = set(sys.modules), set(), builtins.__import__
def noted(name, globals=None, *args):
    if globals and globals.get("__name__", "").startswith("lit_scale"):
        asked.add(name.split(".")[0])
    return plain(name, globals, *args)
builtins.__import__ = noted
start = time.perf_counter()
import MODULE
seconds = time.perf_counter() - start
new = asked | {{name.split(".")[0] for name in set(sys.modules) - before}}
print(json.dumps([seconds, sorted(new & set({HEAVY}))]))
"""


def imported(run: Callable[..., subprocess.CompletedProcess[str]], module: str) -> tuple[float, list[str]]:
    """Seconds that a module's import takes after torch's and Lightning's, and what heavy packages it brings."""
    seconds, heavy = json.loads(run(IMPORT.replace("MODULE", module)).stdout.splitlines()[-1])
    return seconds, heavy


def test_the_techniques_are_imported_at_once(run_python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    fastest = float("inf")
    for _ in range(3):
        seconds, heavy = imported(run_python, "lit_scale.callbacks")
        assert not heavy
        fastest = min(fastest, seconds)
        if fastest <= 0.3:
            break
    assert fastest <= 0.3


@pytest.mark.parametrize("module", ["lit_scale.cli", "lit_scale.models"])
def test_what_every_run_imports_waits_with_the_heavy_packages(
    module: str, run_python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    assert not imported(run_python, module)[1]


def test_a_heavy_import_is_found(run_python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    """The control: the data modules read images."""
    assert "PIL" in imported(run_python, "lit_scale.datamodules")[1]
