"""The registry holds every technique, and the card tells what it holds."""

import inspect
from pathlib import Path

import lit_scale.callbacks
from lit_scale.technique import Technique
from tests.support.cases import CASES, PLACES


def test_every_technique_that_is_offered_is_in_the_registry() -> None:
    offered = {name: getattr(lit_scale.callbacks, name) for name in lit_scale.callbacks.__all__}
    assert set(CASES) == {name for name, kind in offered.items() if issubclass(kind, Technique)}


def test_every_callback_that_is_no_technique_is_a_meter() -> None:
    others = {name for name in lit_scale.callbacks.__all__ if name not in CASES}
    assert others == {"GradientNoiseScale"}  # it only looks


def test_every_entry_names_networks_that_are_there_and_arguments_that_are_taken() -> None:
    for case in CASES.values():
        assert set(case.places) <= PLACES.keys()
        assert case.told.keys() <= set(case.places)
        taken = inspect.signature(case.technique).parameters
        for arguments in case.told.values():
            assert arguments.keys() <= taken.keys()


def test_the_card_says_who_goes_along_with_whom() -> None:
    kinds = sorted(CASES.values(), key=lambda case: (case.technique.factor, case.name))
    lines = ["| technique | lowers | refused beside it |", "|---|---|---|"]
    for case in kinds:
        refused = [f"`{other.name}`" for other in kinds if other.name in case.refused or case.name in other.refused]
        lines.append(f"| `{case.name}` | {case.technique.factor} | {', '.join(refused) or 'none'} |")
    card = (Path(__file__).parents[2] / "docs" / "all_in_one.md").read_text()
    assert "\n".join(lines) in card, "\n".join(lines)
