"""Result files that are saved after every run, so that an interrupted sweep can continue later."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from provenance import code_digest

from runs import Run

__all__ = ["Store"]


class Store:
    """One JSON file: runs, each with its key and the digest of its code, and other data of the sweep.

    Args:
        path: Path of the file, which need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"runs": []}
        self._lock = threading.Lock()

    @property
    def runs(self) -> list[dict[str, Any]]:
        """Entries of all runs."""
        return self.data["runs"]

    def entries(self, accept: Callable[[dict[str, Any]], bool]) -> Iterator[dict[str, Any]]:
        """The entries for which ``accept`` is true."""
        return (entry for entry in self.runs if accept(entry))

    def find(self, run: Run) -> dict[str, Any] | None:
        """The entry of a run, if it was made with the present code and the present flags of its task."""
        wanted = run.key | {"settings": run.settings, "code": code_digest(run.recipe, run.technique is not None)}
        fits = (entry for entry in self.runs if all(entry[name] == value for name, value in wanted.items()))
        return next(fits, None)

    def add(self, run: Run, entry: dict[str, Any]) -> None:
        """Store the entry of a run; it replaces an entry with the same key."""
        with self._lock:
            key = run.key
            self.data["runs"] = [e for e in self.runs if any(e[name] != value for name, value in key.items())] + [entry]
            self.data["runs"].sort(key=lambda e: json.dumps([e[name] for name in sorted(key)]))
            self.save()

    def save(self) -> None:
        """Write the file atomically, with one line per entry."""
        lines = ",\n".join(json.dumps(entry) for entry in self.runs)
        rest = json.dumps({name: value for name, value in self.data.items() if name != "runs"} | {"runs": []}, indent=1)
        head, _, tail = rest.rpartition("[]")
        text = f"{head}[\n{lines}\n]{tail}\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        temporary.write_text(text)
        temporary.replace(self.path)
