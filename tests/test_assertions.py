"""Every test can fail: it asserts, expects an exception or a warning, or calls a helper that does."""

import ast
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
EXPECTS = {"raises", "warns", "deprecated_call", "fail"}  # of pytest
Functions = dict[str, ast.AST]


def functions_of(tree: ast.Module) -> Functions:
    """All functions and methods by name, and a class as its methods."""
    return {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def used(node: ast.AST, methods: Collection[str]) -> Iterator[str]:
    """Functions that are called or given to another one to be called, and methods of these names."""
    for part in ast.walk(node):
        if isinstance(part, ast.Name):
            yield part.id
        elif isinstance(part, ast.Attribute) and part.attr in methods:
            yield part.attr


def asserts(node: ast.AST, known: Functions, methods: Collection[str], seen: frozenset[str] = frozenset()) -> bool:
    for part in ast.walk(node):
        if isinstance(part, ast.Assert):
            return True
        if isinstance(part, ast.Call):
            name = getattr(part.func, "attr", getattr(part.func, "id", ""))
            if name in EXPECTS or name.startswith("assert_"):
                return True
    names = set(used(node, methods)) & known.keys() - seen
    return any(asserts(known[name], known, methods, seen | {name}) for name in names)


def idle(path: Path, helpers: Iterable[Path]) -> list[str]:
    """Tests of a file that cannot fail but by an exception that nobody expects."""
    tree = ast.parse(path.read_text())
    known: Functions = {}
    for file in (*helpers, path):
        known |= functions_of(ast.parse(file.read_text()))
    known = {name: node for name, node in known.items() if not name.startswith("test_")}
    tests = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    return [f"{node.name} (line {node.lineno})" for node in tests if not asserts(node, known, functions_of(tree))]


@pytest.mark.parametrize("path", sorted(TESTS.rglob("test_*.py")), ids=lambda path: path.relative_to(TESTS).as_posix())
def test_every_test_can_fail(path: Path) -> None:
    helpers = [*(TESTS / "support").glob("*.py"), *TESTS.glob("conftest.py"), *path.parent.glob("conftest.py")]
    assert idle(path, helpers) == []


def test_a_test_that_asserts_nothing_is_found(tmp_path: Path) -> None:
    (tmp_path / "support.py").write_text("def check(x):\n    assert x\ndef look(x):\n    return x\n")
    (tmp_path / "test_it.py").write_text(
        "def own(x):\n    check(x)\n"
        "def test_by_itself():\n    assert 1\n"
        "def test_by_a_helper():\n    own(1)\n"
        "def test_by_torch():\n    torch.testing.assert_close(1, 1)\n"
        "def test_by_an_exception():\n    with pytest.raises(ValueError):\n        look(1)\n"
        "def test_nothing():\n    look(1)\n"
    )
    assert idle(tmp_path / "test_it.py", [tmp_path / "support.py"]) == ["test_nothing (line 12)"]
