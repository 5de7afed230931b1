"""What tests compare by can tell differences, and names the first."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.cases import CASES, train
from tests.support.data import Indexed, loader, pictures, sized_loader
from tests.support.equality import assert_same, first_difference, same
from tests.support.networks import FOREIGN, build, image_model, viewer
from tests.support.training import left

NAN = float("nan")


@pytest.mark.parametrize(
    ("one", "other", "difference"),
    [
        (torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.0, 2.5, 7.0]), "it differs in 2 of 3 values, by up to 3"),
        (torch.tensor([1.0]), torch.tensor([1]), r"it is float32 \(1,\) and int64 \(1,\)"),
        (torch.zeros(2), torch.zeros(2, 1), r"it is float32 \(2,\) and float32 \(2, 1\)"),
        (torch.tensor([NAN]), torch.tensor([0.0]), "it differs in 1 of 1 values"),
        (torch.tensor(1.0), 1.0, r"it is tensor\(1.\) and 1.0"),
        (1, 1.0, "it is 1 and 1.0"),
        ([1, 2], [1, 2, 3], "it has 2 and 3 items"),
        ({"a": 1}, {"a": 1, "b": 2}, "it has 'b' on one side only"),
        ({"a": [0, {"b": 3}]}, {"a": [0, {"b": 4}]}, r"it.a\[1\].b is 3 and 4"),
        (np.array([1]), np.array([2]), "it differs in 1 of 1 values, by up to 1"),
        (torch.tensor([True]), torch.tensor([False]), "it differs in 1 of 1 values, by up to 1"),
        ("a", "b", "it is 'a' and 'b'"),
    ],
)
def test_the_first_difference_is_named(one: Any, other: Any, difference: str) -> None:
    assert not same(one, other)
    with pytest.raises(AssertionError, match=f"^{difference}"):
        assert_same(one, other, "it")


@pytest.mark.parametrize(
    "value", [torch.tensor([1.0, NAN]), {"a": [1, (2.0, NAN)], "b": None}, "x", np.array([NAN, 1.0]), torch.zeros(0)]
)
def test_what_is_equal_has_no_difference(value: Any) -> None:
    copied = torch.utils._pytree.tree_map(lambda leaf: leaf.clone() if hasattr(leaf, "clone") else leaf, value)
    assert first_difference(value, copied) is None


def test_one_bit_is_a_difference() -> None:
    one = torch.rand(50)
    other = one.clone()
    other.view(torch.int32)[17] ^= 1
    assert not same({"a": one}, {"a": other})


def test_samples_are_a_function_of_their_index() -> None:
    for make in (lambda: pictures(), lambda: sized_loader(), *(lambda name=name: loader(name) for name in FOREIGN)):
        assert_same(list(make()), list(make()))
    assert not same(Indexed(lambda generator: torch.rand(3, generator=generator))[0], torch.zeros(3))


@pytest.mark.parametrize(
    "make",
    [
        lambda seed: build("hf_gpt2", seed=seed),
        lambda seed: viewer("timm", seed=seed),
        lambda seed: image_model("hf", seed=seed),
    ],
)
def test_the_seed_decides_the_weights(make: Any) -> None:
    assert_same(make(0).state_dict(), make(0).state_dict())
    assert not same(make(0).state_dict(), make(1).state_dict())


@pytest.mark.filterwarnings("ignore")
def test_what_a_run_left_is_a_copy_and_complete(tmp_path: Path) -> None:
    trainer, watch = train("bert", tmp_path, CASES["TokenDropping"].make("bert"))
    found = left(trainer)
    assert_same(found, left(trainer))
    for part in ("weights", "optimizers", "metrics"):
        assert torch.utils._pytree.tree_leaves(found[part])
    assert found["techniques"]["token_dropping"]["running_loss"].shape == (24,)
    with torch.no_grad():
        trainer.lightning_module.get_parameter("head_bias").add_(1.0)
    assert first_difference(found, left(trainer)) == "weights.head_bias differs in 24 of 24 values, by up to 1"
    assert len(watch.losses) == len(watch.batches) == trainer.global_step
