"""Each module has a test file of its own name in the same place below `tests`, or another one that is named here."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

#: Modules that are tested elsewhere, and where.
ELSEWHERE = {
    "lit_scale/cli/flags.py": ["cli/test_recipe.py"],  # flags are what a recipe is run with
    "lit_scale/factors/sizes.py": [  # a base, by both of its techniques
        "callbacks/test_resolution_growing.py",
        "callbacks/test_sequence_length_warmup.py",
    ],
    "lit_scale/factors/units.py": ["factors/test_weights.py"],  # units are masked and shown together with cells
}


def modules() -> list[str]:
    """Paths of all modules but those that only hold names of others."""
    found = [path for part in ("lit_scale", "callbacks", "datamodules") for path in (ROOT / part).rglob("*.py")]
    own = {path.relative_to(ROOT).as_posix() for path in found if path.name != "__init__.py"}
    return sorted(path for path in own if not path.startswith(("lit_scale/callbacks/", "lit_scale/datamodules/")))


def own_test(module: str) -> str:
    folder, _, name = module.removeprefix("lit_scale/").rpartition("/")
    return f"{folder}/test_{name}".lstrip("/")


@pytest.mark.parametrize("module", modules())
def test_each_module_has_its_tests(module: str) -> None:
    for path in ELSEWHERE.get(module, [own_test(module)]):
        assert (ROOT / "tests" / path).is_file(), f"{module} has no tests/{path}"
        assert "def test_" in (ROOT / "tests" / path).read_text()


def test_exceptions_are_of_modules_that_are_there_and_have_no_file_of_their_own() -> None:
    assert ELSEWHERE.keys() <= set(modules())
    assert [module for module in ELSEWHERE if (ROOT / "tests" / own_test(module)).exists()] == []


def test_modules_are_found() -> None:
    assert {"callbacks/batch_ramp.py", "lit_scale/seeds.py", "lit_scale/nn/encoder.py"} <= set(modules())
    assert own_test("lit_scale/nn/encoder.py") == "nn/test_encoder.py"
    assert own_test("lit_scale/seeds.py") == "test_seeds.py"
