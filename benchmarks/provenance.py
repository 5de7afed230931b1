"""The code that a result was made with, as a digest of all modules that affect what a run learns.

The digest covers the callbacks, models and data modules that a recipe imports, and the modules of lit_scale that these
import. It ignores docstrings, comments, imports, and the file in which a definition is. It also ignores modules that
only observe a run: the clock, the guards and the command line, whose tests show that they do not change weights.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

__all__ = ["ROOT", "code_digest", "modules_of"]

ROOT = Path(__file__).resolve().parents[1]
WATCHING = ("lit_scale.cost", "lit_scale.cli", "lit_scale.guards", "lit_scale.restoring")


def path_of(module: str) -> Path | None:
    """File of a module of this project; None if there is none."""
    stem = ROOT.joinpath(*module.split("."))
    for path in (stem.with_suffix(".py"), stem / "__init__.py"):
        if path.exists():
            return path
    return None


@cache
def parsed(path: Path) -> ast.Module:
    """A file's syntax tree without docstrings."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (
            node.body and isinstance(node.body[0], ast.Expr) and isinstance(node.body[0].value, ast.Constant)
        ):
            node.body[0] = ast.Pass()
    return tree


def imported(path: Path) -> Iterator[str]:
    """Modules of lit_scale that a file imports; for a name that a package re-exports, the module that defines it."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.startswith("lit_scale"))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lit_scale"):
            for name in node.names:
                yield defining(str(node.module), name.name)


def defining(module: str, name: str) -> str:
    """The module that defines a name which is imported from another module."""
    if path_of(f"{module}.{name}") is not None:
        return f"{module}.{name}"
    path = path_of(module)
    if path is not None and path.name == "__init__.py":
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.ImportFrom) and any((own.asname or own.name) == name for own in node.names):
                return defining(str(node.module), name)
    return module


def modules_of(recipe: str, technique: bool) -> list[str]:
    """All modules that affect what a run of a recipe learns, with its technique or without."""
    begin = ROOT / "recipes" / f"{recipe}.py"
    found: dict[str, None] = {}
    todo = [m for m in imported(begin) if technique or not m.startswith("lit_scale.callbacks")]
    while todo:
        module = todo.pop()
        if module in found or module.startswith(WATCHING) or (module == "lit_scale.technique" and not technique):
            continue
        found[module] = None
        path = path_of(module)
        if path is None:
            raise ValueError(f"{module}, which {recipe} needs, has no file")
        todo += imported(path)
    return sorted(found)


@cache
def code_digest(recipe: str, technique: bool) -> str:
    """Digest of the code of a run, 16 hexadecimal digits.

    The recipe's own file is included only with a technique; the flags of plain runs are all stored.
    """
    paths = [path_of(module) for module in modules_of(recipe, technique)]
    if technique:
        paths.append(ROOT / "recipes" / f"{recipe}.py")
    definitions = {
        ast.dump(node)
        for path in paths
        if path is not None
        for node in parsed(path).body
        if not isinstance(node, ast.Import | ast.ImportFrom | ast.Pass) and "'__all__'" not in ast.dump(node)[:80]
    }
    return hashlib.blake2b("".join(sorted(definitions)).encode(), digest_size=8).hexdigest()
