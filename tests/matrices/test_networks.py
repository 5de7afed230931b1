"""Every technique on networks of timm, Hugging Face and plain torch: it acts, resumes, and leaves them as they were."""

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from lit_scale.factors.blocks import find_blocks
from lit_scale.factors.tokens import release_tokens
from tests.support.cases import CASES, HUGGING_FACE, PLACES, TIMM, TORCH, Case, train
from tests.support.equality import assert_same, same
from tests.support.training import left, quiet_trainer

pytestmark = [pytest.mark.filterwarnings("ignore")]

LIBRARIES = (TIMM, HUGGING_FACE, TORCH)


def first_of_each_library(case: Case) -> dict[str, str]:
    """The network of each library that the case names first."""
    found = {PLACES[place].library: place for place in reversed(case.places)}
    return {library: found[library] for library in LIBRARIES if library in found}


ON = [(case, place) for case in CASES.values() for place in first_of_each_library(case).values()]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_each_is_tried_on_networks_of_three_libraries_or_says_why_not(case: Case) -> None:
    missing = set(LIBRARIES) - first_of_each_library(case).keys()
    assert bool(missing) == bool(case.not_foreign), f"{case.name} is not tried on {', '.join(sorted(missing))}"


def wrapped(module: nn.Module) -> set[str]:
    """Where something hangs on a module: methods that stand before those of the class, and hooks of a forward pass."""
    parts = list(module.named_modules())
    methods = {
        f"{path}.{name}" for path, part in parts for name in vars(part) if callable(getattr(type(part), name, 0))
    }
    hooks = {f"{path} hook" for path, part in parts if part._forward_hooks or part._forward_pre_hooks}
    return methods | hooks


def test_what_hangs_on_a_network_is_seen() -> None:
    module: Any = PLACES["plain_torch"].network()
    assert wrapped(module) == set()
    module.net.stem.register_forward_hook(lambda *_: None)
    module.net.head.forward = module.net.head.forward
    module.training_step = module.training_step
    assert wrapped(module) == {"net.stem hook", "net.head.forward", ".training_step"}


@pytest.mark.parametrize(("case", "place"), ON, ids=[f"{case.name}-{place}" for case, place in ON])
def test_it_acts_resumes_and_leaves_the_network_as_it_was(case: Case, place: str, tmp_path: Path) -> None:
    plain, _ = train(place, tmp_path)
    whole, watch = train(place, tmp_path, case.make(place), save=tmp_path / "saved")
    weights = left(plain)["weights"]
    assert not same(weights, {name: left(whole)["weights"][name] for name in weights})  # it does something
    rest, again = train(place, tmp_path, case.make(place), resume=tmp_path / "saved" / "step=4.ckpt")
    assert_same(left(whole), left(rest))
    assert again.losses == watch.losses[-len(again.losses) :] != watch.losses
    module: Any = whole.lightning_module
    if case.lasting:
        assert wrapped(module) != wrapped(plain.lightning_module)
        release_tokens(find_blocks(module))
    assert wrapped(module) == wrapped(plain.lightning_module)
    assert vars(whole.strategy).keys() == vars(plain.strategy).keys()


@pytest.mark.parametrize("case", [case for case in CASES.values() if case.needs], ids=lambda case: case.name)
def test_what_a_module_lacks_is_named_at_setup(case: Case, tmp_path: Path) -> None:
    for missing in case.needs:
        place = PLACES["plain_torch"]
        module = place.network()
        kind: Any = type("Bare", (type(module),), {missing: None})
        module.__class__ = kind
        technique = case.make()
        with pytest.raises(ValueError, match=missing):
            technique.setup(quiet_trainer(tmp_path, callbacks=[technique]), module, "fit")
