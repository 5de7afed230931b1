import copy
import io
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_scale.factors.eight_bit import EIGHT_BIT
from lit_scale.factors.optimizers import create_optimizer, replace_optimizers, scale_rates, transfer_state
from tests.support.data import loader
from tests.support.equality import assert_same, same
from tests.support.networks import FOREIGN, OPTIMIZERS, MakeOptimizer, PlainTorch, build

pytestmark = [pytest.mark.filterwarnings("ignore")]

SOURCES = {2: 0, 3: 1}  # blocks 0 and 1 are old; 2 and 3 become copies of them


class Nested(Optimizer):
    """Adagrad that keeps its sums in a list and changes them in place, as timm's Kron does its factors."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 1e-2})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    sums = state.setdefault("sums", [torch.zeros_like(parameter)])
                    sums[0] += parameter.grad.square()
                    parameter -= group["lr"] * parameter.grad / (sums[0].sqrt() + 1e-8)


ALL: dict[str, MakeOptimizer] = OPTIMIZERS | {
    "nested": Nested,
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-3),
    "two groups": lambda p: torch.optim.AdamW(halves(p), lr=1e-2),
}
PER_GROUP = {"LAMB", "Adan"}


def halves(parameters: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
    every = list(parameters)
    vectors = [p for p in every if p.ndim < 2]
    return [{"params": vectors, "weight_decay": 0.0}, {"params": [p for p in every if p.ndim > 1], "lr": 1e-3}]


def batches() -> list[dict[str, Tensor]]:
    return list(loader("plain_torch", size=32))


def step(module: Any, optimizer: Optimizer, batch: dict[str, Tensor]) -> None:
    torch.manual_seed(3)
    optimizer.zero_grad()
    module.per_sample_loss(batch).mean().backward()
    optimizer.step()


def source_of(name: str) -> str:
    parts = name.split(".")
    if parts[:2] == ["net", "layers"]:
        parts[2] = str(SOURCES.get(int(parts[2]), int(parts[2])))
    return ".".join(parts)


def grown(make: MakeOptimizer, rule: Any) -> tuple[nn.Module, Optimizer, nn.Module, Optimizer]:
    """A module that went from 2 to 4 blocks, and the module of 2 blocks it came from, each with its optimizer."""
    deep, shallow = build("plain_torch", dropout=0.0), build("plain_torch", depth=2, dropout=0.0)
    shallow.load_state_dict({key: value for key, value in deep.state_dict().items() if key in shallow.state_dict()})
    whole = cast(Any, deep).net.layers
    optimizer, other = make(deep.parameters()), make(shallow.parameters())
    cast(Any, deep).net.layers = whole[:2]
    for batch in batches()[:3]:
        step(deep, optimizer, batch)
        step(shallow, other, batch)
    cast(Any, deep).net.layers = whole
    pairs = []
    for target, source in SOURCES.items():
        whole[target].load_state_dict(whole[source].state_dict())
        pairs += list(zip(whole[source].parameters(), whole[target].parameters(), strict=True))
    transfer_state([optimizer], pairs, rule)
    return deep, optimizer, shallow, other


def reference(make: MakeOptimizer, rule: str, shallow: nn.Module, other: Optimizer) -> tuple[nn.Module, Optimizer]:
    """A module built with 4 blocks and its own new optimizer, given weights and state by name."""
    module = build("plain_torch", dropout=0.0, seed=7)
    weights = shallow.state_dict()
    module.load_state_dict({key: weights[source_of(key)] for key in module.state_dict()})
    optimizer = make(module.parameters())
    if rule == "reset":
        return module, optimizer
    named = dict(shallow.named_parameters())
    for name, parameter in module.named_parameters():
        state = copy.deepcopy(dict(other.state[named[source_of(name)]]))
        if rule == "copy_step0" and source_of(name) != name and "step" in state:
            state["step"] = torch.zeros(()) if isinstance(state["step"], Tensor) else 0
        optimizer.state[parameter] = state
    for group, old in zip(optimizer.param_groups, other.param_groups, strict=True):
        if "step" in old:
            group["step"] = copy.deepcopy(old["step"])
    if hasattr(other, "initialized"):  # bitsandbytes notes that its tables exist
        cast(Any, optimizer).initialized = True
    return module, optimizer


CASES = [(name, rule) for name in ALL for rule in ("copy", "copy_step0", "reset")]


@pytest.mark.parametrize(
    ("name", "rule"), [case for case in CASES if case[0] not in PER_GROUP or case[1] != "copy_step0"]
)
def test_the_next_updates_are_those_of_a_network_built_at_that_depth(name: str, rule: str) -> None:
    module, optimizer, shallow, other = grown(ALL[name], rule)
    expected, its_optimizer = reference(ALL[name], rule, shallow, other)
    assert_same(module.state_dict(), expected.state_dict())
    for batch in batches()[3:6]:
        step(module, optimizer, batch)
        step(expected, its_optimizer, batch)
        assert_same(module.state_dict(), expected.state_dict())


@pytest.mark.parametrize("name", ALL)
def test_the_state_can_be_saved_afterwards_and_goes_on_from_a_file(name: str) -> None:
    module, optimizer, _, _ = grown(ALL[name], "copy")
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    twin = copy.deepcopy(module)
    again = ALL[name](twin.parameters())
    again.load_state_dict(torch.load(file, weights_only=True))
    for batch in batches()[3:5]:
        step(module, optimizer, batch)
        step(twin, again, batch)
    assert_same(module.state_dict(), twin.state_dict())


@pytest.mark.parametrize("name", ALL)
def test_source_and_target_share_no_memory(name: str) -> None:
    module, optimizer, _, _ = grown(ALL[name], "copy")
    layers = cast(Any, module).net.layers
    one, other = (memory([optimizer.state[p] for p in layers[index].parameters()]) for index in (0, 2))
    assert one
    assert other
    assert one.isdisjoint(other)


def memory(value: Any) -> set[int]:
    if isinstance(value, Tensor):
        return {value.data_ptr()}
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return set().union(*map(memory, parts))


@pytest.mark.parametrize(("one", "other"), [("copy", "reset"), ("copy", "copy_step0"), ("reset", "copy_step0")])
def test_the_rules_are_not_the_same(one: str, other: str) -> None:
    module, optimizer, shallow, its_optimizer = grown(ALL["AdamW"], one)
    expected, reference_optimizer = reference(ALL["AdamW"], other, shallow, its_optimizer)
    step(module, optimizer, batches()[3])
    step(expected, reference_optimizer, batches()[3])
    assert not same(module.state_dict(), expected.state_dict())


@pytest.mark.parametrize("name", sorted(PER_GROUP))
def test_a_counter_per_group_cannot_start_anew_for_some(name: str) -> None:
    with pytest.raises(ValueError, match="moments='copy_step0' needs a step counter per parameter, but .* per group"):
        grown(ALL[name], "copy_step0")


def test_a_reset_counts_its_steps_anew_where_they_are_counted_per_group() -> None:
    _, optimizer, _, _ = grown(ALL["LAMB"], "reset")
    assert [int(group["step"]) for group in optimizer.param_groups] == [0]
    assert not optimizer.state


def test_sources_without_state_and_optimizers_of_other_parameters_are_passed_over() -> None:
    a, b, c = (nn.Parameter(torch.ones(2)) for _ in range(3))
    mine, foreign = torch.optim.AdamW([a, b]), torch.optim.AdamW([c])
    transfer_state([mine, foreign], [(a, b)])
    assert not mine.state
    assert not foreign.state
    a.sum().backward()
    mine.step()
    transfer_state([mine, foreign], [(a, b)])
    assert set(mine.state) == {a, b}
    assert not foreign.state


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("options", [{"capturable": True}, {"fused": True}, {"foreach": True}], ids=str)
def test_counters_on_the_device_are_copied_on_the_device(options: dict[str, Any]) -> None:
    a, b = (nn.Parameter(torch.ones(2, device="cuda")) for _ in range(2))
    optimizer = torch.optim.AdamW([a, b], **options)
    a.sum().backward()
    optimizer.step()
    rules: list[tuple[Any, float]] = [("copy", 1.0), ("copy_step0", 0.0)]
    for rule, expected in rules:
        transfer_state([optimizer], [(a, b)], rule)
        counter, source = optimizer.state[b]["step"], optimizer.state[a]["step"]
        assert counter.device == source.device
        assert counter.item() == expected
        assert counter.data_ptr() != source.data_ptr()
    b.sum().backward()
    optimizer.step()


# ---- construction by name


def test_vectors_are_not_decayed_and_frozen_parameters_not_trained() -> None:
    module = build("plain_torch")
    assert isinstance(module, PlainTorch)
    module.get_submodule("net.stem").requires_grad_(False)
    optimizer = create_optimizer(module, "adamw", lr=1e-3, weight_decay=0.1)
    named = {id(p): name for name, p in module.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert (group["weight_decay"] == 0.0) == (parameter.ndim <= 1), named[id(parameter)]
    trained = {named[id(p)] for group in optimizer.param_groups for p in group["params"]}
    assert trained == {name for name in named.values() if not name.startswith("net.stem")}


@pytest.mark.parametrize("weight_decay", [0.1, 0.0])
@pytest.mark.parametrize("kind", ["bert", *FOREIGN])
def test_adamw_is_the_one_that_timm_makes(kind: str, weight_decay: float) -> None:
    module = build(kind)
    options: dict[str, Any] = {"lr": 1e-3, "weight_decay": weight_decay, "betas": (0.9, 0.98), "fused": True}
    ours, timms = create_optimizer(module, "adamw", **options), create_optimizer_v2(module, opt="adamw", **options)
    assert type(ours) is type(timms)
    assert ours.defaults.items() >= {key: timms.defaults[key] for key in ("lr", "betas", "eps", "fused")}.items()
    for group, expected in zip(ours.param_groups, timms.param_groups, strict=True):
        assert [id(p) for p in group.pop("params")] == [id(p) for p in expected.pop("params")]
        assert group == expected


def test_names_are_timms_and_an_unknown_one_lists_them() -> None:
    module = nn.Linear(2, 2)
    assert type(create_optimizer(module, "lamb", lr=1e-3)).__name__ == "Lamb"
    assert create_optimizer(module, "adamw", lr=1e-3, betas=(0.9, 0.98)).defaults["betas"] == (0.9, 0.98)
    listing = (
        "optimizer='adamx' is unknown; choose one of .*adamw, adamw8bit, .*lamb, lamb8bit, .*lars, .*muon, .*sgd8bit"
    )
    for unknown in ("adamx", "ADAMW", "lars8bit"):
        with pytest.raises(ValueError, match=listing.replace("adamx", unknown)):
            create_optimizer(module, unknown, lr=1e-3)


@pytest.mark.parametrize("name", ["adamw", "lamb", "lars", "lion", "sgd", "muon", *EIGHT_BIT])
def test_every_name_decays_matrices_only_and_learns(name: str) -> None:
    module = build("bert", dropout=0.0)
    rate = {"sgd": 0.1, "sgd8bit": 0.1, "lars": 5.0, "lamb": 0.02, "lamb8bit": 0.02}.get(name, 1e-3)
    optimizer = create_optimizer(module, name, lr=rate, weight_decay=0.01)
    named = {id(p): key for key, p in module.named_parameters()}
    grouped = [(p, group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p, _ in grouped} == set(named)
    for parameter, decay in grouped:
        assert decay == (0.01 if parameter.ndim > 1 else 0.0), named[id(parameter)]
    batch = next(iter(loader("bert", size=32, batch_size=32)))
    losses = []
    for _ in range(30):
        step(module, optimizer, batch)
        losses.append(module.per_sample_loss(batch).mean().item())
    assert losses[-1] < losses[0] - 0.05


def test_sgd_is_nesterovs() -> None:
    (group,) = create_optimizer(nn.Linear(2, 2, bias=False), "sgd", lr=0.1).param_groups
    assert (group["momentum"], group["nesterov"]) == (0.9, True)


@pytest.mark.parametrize("kind", ["bert", *FOREIGN])
def test_muon_makes_orthogonal_what_is_inside_the_blocks(kind: str) -> None:
    module = build(kind, dropout=0.0)
    optimizer = create_optimizer(module, "muon", lr=1e-3)
    for parameter in module.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    path = getattr(module, "blocks", "encoder.blocks")
    for name, parameter in module.named_parameters():
        hidden = name.startswith(f"{path}.") and parameter.ndim > 1
        assert ("momentum_buffer" in optimizer.state[parameter]) == hidden, name
        assert ("exp_avg_sq" in optimizer.state[parameter]) != hidden, name


# ---- in a run


def test_another_optimizer_goes_on_with_the_run_s_schedule(recwarn: pytest.WarningsRecorder) -> None:
    weight = nn.Parameter(torch.zeros(3))
    plain = torch.optim.SGD([weight], lr=1.0)
    parts = [torch.optim.lr_scheduler.LinearLR(plain, 0.5, total_iters=2), torch.optim.lr_scheduler.StepLR(plain, 1)]
    schedule = torch.optim.lr_scheduler.SequentialLR(plain, parts, milestones=[2])
    strategy = SimpleNamespace(optimizers=[plain])
    trainer: Any = SimpleNamespace(
        optimizers=[plain], strategy=strategy, lr_scheduler_configs=[SimpleNamespace(scheduler=schedule)]
    )
    replace_optimizers(trainer, lambda old: torch.optim.SGD(old.param_groups, lr=0.0))
    (new,) = strategy.optimizers
    assert new is not plain
    rates = []
    for _ in range(4):
        weight.grad = torch.ones(3)
        new.step()
        rates.append(new.param_groups[0]["lr"])
        schedule.step()
    reference = torch.optim.SGD([nn.Parameter(torch.zeros(3))], lr=1.0)
    parts = [
        torch.optim.lr_scheduler.LinearLR(reference, 0.5, total_iters=2),
        torch.optim.lr_scheduler.StepLR(reference, 1),
    ]
    expected = torch.optim.lr_scheduler.SequentialLR(reference, parts, milestones=[2])
    wanted = []
    for _ in range(4):
        wanted.append(reference.param_groups[0]["lr"])
        reference.step()
        expected.step()
    assert rates == wanted
    assert weight.tolist() == [pytest.approx(-sum(wanted))] * 3
    assert not [w for w in recwarn if "optimizer.step" in str(w.message)]


def test_a_step_inside_a_step_is_scaled_once() -> None:
    """torch hooks the step of a class at its first object: of a subclass, then, both its own and its base's."""

    class Base(torch.optim.SGD):
        pass

    class Twice(Base):
        def step(self, closure: Any = None) -> Any:
            super().step(closure)
            for group in self.param_groups:
                for p in group["params"]:
                    p.data.sub_(group["lr"])

    Base([nn.Parameter(torch.zeros(1))], lr=0.5)
    weight = nn.Parameter(torch.zeros(1))
    optimizer = Twice([weight], lr=0.5)
    ends = [scale_rates(optimizer, lambda: 4.0), scale_rates(optimizer, lambda: 3.0)]
    weight.grad = torch.ones(1)
    for step in range(1, 4):
        optimizer.step()
        assert (weight.item(), optimizer.param_groups[0]["lr"]) == (-12.0 * step, 0.5)
    for end in ends[::-1]:
        end()
    optimizer.step()
    assert weight.item() == -37.0


def test_rates_are_scaled_in_a_step_and_nowhere_else() -> None:
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    ends = [scale_rates(optimizer, lambda: 4.0), scale_rates(optimizer, lambda: 3.0)]
    weight.grad = torch.ones(1)
    optimizer.step()
    assert (weight.item(), optimizer.param_groups[0]["lr"]) == (-6.0, 0.5)

    def fails() -> None:
        raise RuntimeError("in the middle of a step")

    with pytest.raises(RuntimeError):
        optimizer.step(fails)
    for end in ends[::-1]:
        end()
    assert optimizer.param_groups[0]["lr"] == 0.5
    optimizer.step()
    assert weight.item() == -6.5
