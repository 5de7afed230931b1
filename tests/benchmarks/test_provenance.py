"""The digest of a result's code: what a run learns from is in it, and nothing else."""

from pathlib import Path

import provenance
import pytest
from provenance import code_digest, modules_of


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of our form, small."""
    files = {
        "recipes/own.py": "from lit_scale.callbacks import Trick\nfrom lit_scale.models import Net\n",
        "lit_scale/__init__.py": "",
        "lit_scale/callbacks/__init__.py": "from lit_scale.callbacks.trick import Trick\n"
        "from lit_scale.callbacks.other import Other\n",
        "lit_scale/callbacks/trick.py": "from lit_scale.cost import charge\nfrom lit_scale.ground import half\n"
        "class Trick:\n    '''Words.'''\n    share = half(1.0)\n",
        "lit_scale/callbacks/other.py": "class Other: pass\n",
        "lit_scale/cost/__init__.py": "def charge(): pass\n",
        "lit_scale/ground.py": "def half(x):\n    '''Half of it.'''\n    return x / 2\n",
        "lit_scale/models.py": "from lit_scale.nn import width\nclass Net:\n    size = width\n",
        "lit_scale/nn.py": "width = 8\n",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    return tmp_path


def digests() -> tuple[str, str]:
    for cached in (provenance.parsed, provenance.code_digest):
        cached.cache_clear()
    return code_digest("own", True), code_digest("own", False)


def test_modules_are_those_that_a_run_learns_from(tree: Path) -> None:
    plain = ["lit_scale.models", "lit_scale.nn"]
    assert modules_of("own", False) == plain
    assert modules_of("own", True) == sorted([*plain, "lit_scale.callbacks.trick", "lit_scale.ground"])


@pytest.mark.parametrize(
    ("file", "old", "new", "technique", "plain"),
    [
        ("lit_scale/nn.py", "8", "16", True, True),
        ("lit_scale/ground.py", "/ 2", "/ 3", True, False),
        ("lit_scale/callbacks/trick.py", "1.0", "2.0", True, False),
        ("lit_scale/ground.py", "Half of it.", "A half.", False, False),
        ("lit_scale/ground.py", "    return", "\n    # why\n    return", False, False),
        ("lit_scale/callbacks/other.py", "pass", "x = 1", False, False),
        ("lit_scale/cost/__init__.py", "pass", "return 1", False, False),
    ],
)
def test_a_digest_changes_with_what_a_run_learns_from_alone(
    tree: Path, file: str, old: str, new: str, technique: bool, plain: bool
) -> None:
    before = digests()
    path = tree / file
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    after = digests()
    assert (before[0] != after[0], before[1] != after[1]) == (technique, plain)


def test_a_definition_may_move_to_another_file(tree: Path) -> None:
    before = digests()
    (tree / "lit_scale/nn.py").rename(tree / "lit_scale/layers.py")
    models = tree / "lit_scale/models.py"
    models.write_text(models.read_text().replace("lit_scale.nn", "lit_scale.layers"))
    assert digests() == before


def test_every_recipe_has_a_digest() -> None:
    for path in (provenance.ROOT / "recipes").glob("*.py"):
        if path.stem != "write_shards":
            assert len(code_digest(path.stem, True)) == 16
            assert "lit_scale.models.training" in modules_of(path.stem, False)
