"""What the API pages show of the code: an extension of griffe, which reads the docstrings, named in ``mkdocs.yml``.

- Hooks that only Lightning calls are left out, and so is a method that overrides one of the package's own: it is
  described where it is defined, as what every technique has to say is in ``Technique``.
- A role such as ``:class:`~lit_scale.cost.CostMeter``` becomes a link to what it names, or plain code where that has no
  entry of its own.
- ``Example:`` becomes ``Examples:``, the only one of the two whose doctests griffe shows as code.
- What the comment ``#:`` above a name says of it becomes its docstring.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe

_HOOK = re.compile(
    r"setup|teardown|(load_)?state_dict|on_(after|before|exception|fit|load|sanity|save|test|train|validation)\w*"
)
_ROLE = re.compile(r":(?P<kind>attr|class|data|func|meth|mod):`(?P<short>~?)(?P<target>[\w.]+)`")
_EXAMPLE = re.compile(r"^Example:$", flags=re.MULTILINE)


class SiteDocstrings(griffe.Extension):
    """Goes through a package once it has been read as a whole."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Choose what is shown, and mend the docstrings."""
        for one in _all(pkg):
            if one.is_function and isinstance(one.parent, griffe.Class) and _is_described_elsewhere(one):
                one.public = False
            if one.is_attribute and one.docstring is None and (comment := _comment_above(one)):
                one.docstring = griffe.Docstring(comment, parent=one)
            if one.docstring is not None:
                text = _EXAMPLE.sub("Examples:", one.docstring.value)
                one.docstring.value = _ROLE.sub(lambda role, owner=one: _link(owner, role), text)  # type: ignore[misc]


def _all(owner: griffe.Object) -> Iterator[griffe.Object]:
    yield owner
    for member in owner.members.values():
        if isinstance(member, griffe.Object):  # and no alias of one
            yield from _all(member)


def _is_described_elsewhere(method: griffe.Object) -> bool:
    assert isinstance(method.parent, griffe.Class)
    return bool(_HOOK.fullmatch(method.name)) or any(method.name in base.members for base in method.parent.mro())


def _comment_above(one: griffe.Object) -> str:
    assert isinstance(one.filepath, Path)
    above = one.lines_collection[one.filepath][: (one.lineno or 1) - 1]
    lines = itertools.takewhile(lambda line: line.startswith("#:"), (line.strip() for line in reversed(above)))
    return "\n".join(line.removeprefix("#:").strip() for line in reversed(list(lines)))


def _link(owner: griffe.Object, role: re.Match[str]) -> str:
    target = role["target"]
    shown = target.rpartition(".")[2] if role["short"] else target
    path = _path(owner, role["kind"], target)
    return f'<autoref identifier="{path}" optional><code>{shown}</code></autoref>' if path else f"`{shown}`"


def _path(owner: griffe.Object, kind: str, target: str) -> str | None:
    """Full name of what a docstring names: in full, or a member of its class, or a name of its module."""
    scope = owner if isinstance(owner, griffe.Class) else owner.parent
    try:
        if target.partition(".")[0] == owner.package.name:
            path = target
        elif kind in ("attr", "meth") and isinstance(scope, griffe.Class):
            path = scope.all_members[target].path
        else:
            path = owner.module.resolve(target)
        return owner.package[path.partition(".")[2]].canonical_path
    except (KeyError, griffe.GriffeError):
        return None
