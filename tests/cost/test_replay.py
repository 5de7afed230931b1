"""A replayed step is the step that training makes, and a counted one multiplies as much and changes nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lit_scale.cost.replay import flops_of, is_compiled, replay_step
from tests.support.data import loader
from tests.support.equality import assert_same, same
from tests.support.networks import PlainTorch, build
from tests.support.training import left, quiet_trainer

pytestmark = [pytest.mark.filterwarnings("ignore")]


def started(root: Path, module: Any, **options: Any) -> Any:
    """A Trainer that has made one step of a network without dropout."""
    trainer = quiet_trainer(root, max_steps=1, **options)
    trainer.fit(module, loader("plain_torch", shuffle=False))
    module.log = lambda *_, **__: None  # outside of the loop Lightning refuses to
    return trainer


def batches() -> list[Any]:
    return list(loader("plain_torch", shuffle=False))


def by_hand(module: PlainTorch, optimizer: Any, given: list[Any]) -> None:
    optimizer.zero_grad()
    for batch in given:
        (module.per_sample_loss(batch).mean() / len(given)).backward()
    optimizer.step()


def test_a_replayed_step_is_a_step_by_hand(tmp_path: Path) -> None:
    one, other = build("plain_torch", dropout=0.0), build("plain_torch", dropout=0.0)
    first, second = started(tmp_path, one), started(tmp_path, other)
    before = left(first)
    replay_step(first, one, batches()[1], update=True)
    by_hand(other, second.optimizers[0], [batches()[1]])
    assert_same(left(first)["weights"], left(second)["weights"])
    assert_same(left(first)["optimizers"], left(second)["optimizers"])
    assert not same(before["weights"], left(first)["weights"])


def test_without_an_update_only_gradients_are_made(tmp_path: Path) -> None:
    module = build("plain_torch", dropout=0.0)
    trainer = started(tmp_path, module, accumulate_grad_batches=2)
    before = {name: value.clone() for name, value in module.named_parameters()}
    replay_step(trainer, module, batches()[2], update=False)
    assert_same(before, dict(module.named_parameters()))
    gradients = [parameter.grad.clone() for parameter in module.parameters() if parameter.grad is not None]
    module.zero_grad()
    (module.per_sample_loss(batches()[2]).mean() / 2).backward()  # of a step of two batches
    assert_same(gradients, [parameter.grad for parameter in module.parameters()])


@pytest.mark.parametrize("phase", ["train", "validate"])
def test_flops_are_those_of_the_eager_network_and_nothing_is_left(phase: str, tmp_path: Path) -> None:
    module, twin = build("plain_torch", dropout=0.0), build("plain_torch", dropout=0.0)
    trainer = started(tmp_path, module)
    module.net.compile(backend="eager")
    before = left(trainer) | {"gradients": [p.grad for p in module.parameters()], "random": torch.get_rng_state()}
    with FlopCounterMode(display=False) as counter:
        loss = twin.per_sample_loss(batches()[1]).mean()
        if phase == "train":
            loss.backward()
    assert flops_of(trainer, module, batches()[1], phase) == counter.get_total_flops() > 0
    after = left(trainer) | {"gradients": [p.grad for p in module.parameters()], "random": torch.get_rng_state()}
    assert_same(before, after)


def test_compiled_parts_are_found() -> None:
    module = build("plain_torch")
    assert not is_compiled(module)
    module.net.layers[2].compile(backend="eager")
    assert is_compiled(module)
    whole = build("plain_torch")
    whole.net = torch.compile(whole.net, backend="eager")
    assert is_compiled(whole)
