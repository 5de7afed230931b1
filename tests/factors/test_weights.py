import functools
import itertools
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lit_scale.factors.blocks import find_blocks
from lit_scale.factors.units import UnitGroup, find_units
from lit_scale.factors.weights import (
    Cells,
    WeightMasks,
    erk_densities,
    find_matrices,
    pack_bits,
    unpack_bits,
    zero_slots,
)
from tests.support.data import loader
from tests.support.networks import DEPTH, OPTIMIZERS, WIDTH, build, slots, tiny_bert

# ---- which weights, and how many


def test_the_kernel_rule_solved_by_hand() -> None:
    # of 10,000 + 100 + 4,608 weights a fifth: 2,941.6. Proportional to 200/10,000, 20/100 and (16+32+3+3)/4,608 they
    # would be scale (200 + 20 + 54) = 2,941.6, so scale = 10.7 and the second 2.1: dense. Then (2,941.6 - 100) / 254.
    shapes = [(100, 100), (10, 10), (32, 16, 3, 3)]
    scale = (Fraction(29416, 10) - 100) / 254
    expected = [scale * Fraction(200, 10_000), Fraction(1), scale * Fraction(54, 4_608)]
    assert erk_densities(shapes, 0.2) == pytest.approx([float(d) for d in expected])
    assert expected[0] < 1


@pytest.mark.parametrize("density", [0.05, 0.2, 0.5, 0.9, 1.0])
def test_the_kernel_rule_keeps_the_density_asked_for(density: float) -> None:
    shapes = [(8, 8), (64, 8), (512, 256), (3, 3), (10, 1_000), (16, 8, 5, 5)]
    densities, sizes = erk_densities(shapes, density), [math.prod(shape) for shape in shapes]
    assert sum(d * n for d, n in zip(densities, sizes, strict=True)) == pytest.approx(density * sum(sizes))
    assert all(0 < d <= 1 for d in densities)
    sparse = [d * n / sum(s) for d, n, s in zip(densities, sizes, shapes, strict=True) if d < 1]
    assert sparse == pytest.approx([sparse[0]] * len(sparse) if sparse else [])  # one scale for all of them


@pytest.mark.parametrize(
    ("name", "each"),
    [("bert", 4), ("timm_vit", 4), ("hf_bert", 6), ("hf_gpt2", 4), ("torch_encoder", 4), ("plain_torch", 2)],
)
def test_matrices_of_blocks_are_found_in_any_network(name: str, each: int) -> None:
    module = build(name)
    stack = find_blocks(module)
    found = find_matrices(module, stack)
    assert len(found) == DEPTH * each
    assert all(key.startswith(f"{stack.path}.") and parameter.ndim == 2 for key, (parameter, _) in found.items())
    assert sum(p.numel() for p, _ in found.values()) == sum(p.numel() for b in stack.blocks for p in b.parameters()) - (
        sum(p.numel() for b in stack.blocks for p in b.parameters() if p.ndim == 1)
    )


def test_shared_weights_are_found_once_and_frozen_ones_not_at_all() -> None:
    module = build("plain_torch")
    module.net.layers[1].inner.weight = module.net.layers[0].inner.weight
    module.net.layers[2].outer.weight.requires_grad_(False)
    found = find_matrices(module, find_blocks(module))
    assert len(found) == 2 * DEPTH - 2
    assert "net.layers.0.inner.weight" in found


def test_matrices_can_be_named() -> None:
    module = tiny_bert()
    found = find_matrices(module, None, ["encoder.blocks.1.feedforward", "head.0", "embedding.tokens.weight"])
    assert list(found) == [
        *(f"encoder.blocks.1.feedforward.{part}.weight" for part in ("up", "down")),
        "head.0.weight",
        "embedding.tokens.weight",
    ]


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["encoder.blocks.9"], "'encoder.blocks.9' names no trained matrix; there are 'encoder.blocks.0.attention.qkv"),
        (["encoder.norm"], "'encoder.norm' names no trained matrix"),
        (["embedding.tokens", "output"], r"'output' holds the weights of 'embedding.tokens.weight' again \(tied\)"),
        (["head", "head.0.weight"], r"'head.0.weight' holds the weights of 'head.0.weight' again"),
    ],
)
def test_wrong_names_are_refused(paths: list[str], message: str) -> None:
    module = tiny_bert()
    module.output = nn.Linear(WIDTH, len(module.head_bias), bias=False)
    module.output.weight = module.embedding.tokens.weight
    with pytest.raises(ValueError, match=message):
        find_matrices(module, None, paths)


# ---- masks


@pytest.mark.parametrize("count", [1, 7, 8, 9, 1_000])
def test_masks_are_packed_without_loss(count: int) -> None:
    mask = torch.rand(count) < 0.3
    packed = pack_bits(mask)
    assert packed.dtype == torch.uint8
    assert packed.numel() == -(-count // 8)
    assert torch.equal(unpack_bits(packed, count), mask)


@pytest.mark.parametrize(("side", "shape"), [(1, (4, 6)), (2, (4, 6)), (3, (6, 3, 2, 2)), (4, (8, 4))])
def test_a_mask_of_cells_is_the_kronecker_product_with_a_tile(side: int, shape: tuple[int, ...]) -> None:
    parameter = nn.Parameter(torch.randn(shape))
    cells = Cells("weight", parameter, nn.Identity(), side)
    cells.active = torch.rand(len(cells.active)) < 0.5
    ((_, mask),) = cells.masks()
    grid = cells.active.view(shape[0] // side, -1)
    assert torch.equal(mask.flatten(1).int(), torch.kron(grid.int(), torch.ones(side, side, dtype=torch.int)))
    tiles = parameter.detach().flatten(1).unfold(0, side, side).unfold(1, side, side)  # (rows, columns, side, side)
    sums = tiles.abs().sum((2, 3)).flatten()
    torch.testing.assert_close(cells.magnitude(), sums)


def test_tiles_must_divide() -> None:
    with pytest.raises(ValueError, match="tiles of 4 x 4 do not divide weight, which is 8 x 6"):
        Cells("weight", nn.Parameter(torch.ones(8, 6)), nn.Identity(), 4)


def test_masked_weights_are_zero_even_if_an_optimizer_left_no_number_there() -> None:
    line = nn.Linear(3, 2, bias=False)
    average = nn.Linear(3, 2, bias=False)
    masks = WeightMasks(line)
    masks.set(line.get_parameter("weight"), torch.tensor([[True], [False]]))  # broadcast over a row
    kept = line.weight[0].clone(), average.weight[0].clone()
    with torch.no_grad():
        line.weight[1, 0] = math.nan
    masks.zero_weights([average])
    for weight, first in zip((line.weight, average.weight), kept, strict=True):
        assert torch.equal(weight, torch.stack([first, torch.zeros(3)]))
    line(torch.ones(1, 3)).sum().backward()
    masks.zero_gradients()
    assert line.weight.grad is not None
    assert torch.equal(line.weight.grad, torch.tensor([[1.0] * 3, [0.0] * 3]))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_slots_are_zeroed_entry_by_entry(name: str) -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(24, 32))  # three blocks of 256
    optimizer = OPTIMIZERS[name]([weight])
    for _ in range(3):
        weight.grad = torch.randn_like(weight)
        optimizer.step()
    keep, before = torch.rand(weight.shape) < 0.5, slots(optimizer, weight)
    assert all((value != 0).sum() > 300 for value in before.values())
    zero_slots([optimizer], weight, keep)
    after = slots(optimizer, weight)
    assert before.keys() == after.keys()
    assert len(after) >= 1 or name == "Adafactor"  # which keeps rows and columns
    for key, value in after.items():
        assert torch.equal(value, torch.where(keep, before[key], 0)), key
    weight.grad = torch.randn_like(weight)
    optimizer.step()  # goes on


@pytest.mark.parametrize("name", ["AdEMAMix", "AdEMAMix8bit"])
def test_slots_that_hold_two_averages_are_zeroed_entry_by_entry(name: str) -> None:
    import bitsandbytes
    from bitsandbytes.functional import dequantize_blockwise

    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(24, 32))
    optimizer = getattr(bitsandbytes.optim, name)([weight], min_8bit_size=16)
    for _ in range(3):
        weight.grad = torch.randn_like(weight)
        optimizer.step()

    def averages() -> torch.Tensor:  # (2, 24, 32)
        state = optimizer.state[weight]
        if name == "AdEMAMix":
            return state["state1"].clone()
        codes = zip(state["state1"], state["absmax1"], strict=True)
        return torch.stack([dequantize_blockwise(c, absmax=a, code=state["qmap1"], blocksize=256) for c, a in codes])

    keep, before = torch.rand(24, 1) < 0.5, averages()
    assert before.shape == (2, 24, 32)
    assert (before != 0).sum() > 1_200
    masks = WeightMasks(nn.ParameterList([weight]))
    masks.set(weight, keep)
    masks.zero_codes([optimizer])
    assert torch.equal(averages(), before if name == "AdEMAMix" else before * keep)  # others have no codes
    zero_slots([optimizer], weight, keep)
    assert torch.equal(averages(), before * keep)
    assert not slots(optimizer, weight)["state2"][~keep[:, 0]].any()


def test_vectors_without_a_gradient_are_one_product_of_the_matrix() -> None:
    line = nn.Linear(4, 6)
    cells = Cells("weight", line.get_parameter("weight"), line, side=2)
    cells.active = torch.tensor([True, False, True, False, False, True])  # 12 weights are not
    handle = cells.watch()
    line(torch.ones(5, 2, 4)).sum().backward()
    with torch.no_grad():
        line(torch.ones(7, 4))
    assert (cells.positions, cells.forward_only) == (17, 7)
    assert cells.skipped(products=3) == 2 * 12 * (3 * 10 + 7)
    cells.begin()
    line(torch.ones(4))
    handle.remove()
    assert cells.skipped(products=2) == 2 * 12 * 2


# ---- units


def shown(module: nn.Module, share: float) -> tuple[list[UnitGroup], WeightMasks]:
    """Let a share of the units be computed, and zero the others' weights."""
    groups = find_units(find_blocks(module))
    masks = WeightMasks(module)
    for index, group in enumerate(groups):
        count = len(group.active)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(index))
        group.active = torch.zeros(count, dtype=torch.bool).index_fill(0, order[: round(share * count)], True)
        for parameter, mask in group.masks():
            masks.set(parameter, mask)
        group.attach()
        group.show(group.active)
    masks.zero_weights()
    return groups, masks


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["bert", "rotary", "timm_vit", "hf_bert", "torch_encoder", "plain_torch"])
def test_shown_units_compute_what_the_masked_network_does(name: str, training: bool) -> None:
    plain = "bert" if name == "rotary" else name
    options: dict[str, Any] = {"positions": "rotary"} if name == "rotary" else {}
    module = build(plain, dropout=0.0, **options).train(training)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # biases, too
    groups, masks = shown(module, 0.5)
    batch = next(iter(loader(plain)))
    results = []
    for reduced in (True, False):
        for group in groups:
            if not reduced:
                group.release()
        module.zero_grad()
        losses = module.per_sample_loss(batch)
        losses.sum().backward()
        gradients = {key: p.grad for key, p in module.named_parameters() if p.grad is not None}
        if reduced:
            for parameter, mask in masks.masks.items():
                assert parameter.grad is not None
                assert not parameter.grad[~mask.expand_as(parameter)].any()
        masks.zero_gradients()
        results.append((losses.detach(), {key: gradient.clone() for key, gradient in gradients.items()}))
    (one, ours), (other, theirs) = results
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert ours.keys() == theirs.keys()
    for key, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[key], rtol=1e-4, atol=1e-5, msg=f"the gradient of {key}")


def test_a_released_network_is_as_it_was() -> None:
    for name in ("bert", "timm_vit", "hf_bert"):
        module = build(name)
        before = {path: dict(part.__dict__) for path, part in module.named_modules()}
        groups, _ = shown(module, 0.5)
        assert any("forward" in part.__dict__ for part in module.modules())
        for group in groups:
            group.release()
        for path, part in module.named_modules():
            own = {k: v for k, v in part.__dict__.items() if not k.startswith("_")}
            assert own == {k: v for k, v in before[path].items() if not k.startswith("_")}, path


def test_gated_neurons_are_found_and_norms_between_refused() -> None:
    class Gated(nn.Module):
        def __init__(self, norm: bool) -> None:
            super().__init__()
            self.gate, self.up, self.down = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)
            self.norm = nn.LayerNorm(6) if norm else nn.Identity()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.down(self.norm(torch.sigmoid(self.gate(x)) * self.up(x)))

    blocks = nn.Sequential(Gated(False), Gated(False))
    groups, masks = shown(nn.Sequential(blocks), 0.5)
    assert [len(group.ins) for group in groups] == [2, 2]
    x = torch.randn(3, 4)
    reduced = blocks(x)
    for group in groups:
        group.release()
    torch.testing.assert_close(reduced, blocks(x))
    with pytest.raises(ValueError, match=r"0\.0\.norm has weights for each of 6 neurons"):
        find_units(find_blocks(nn.Sequential(nn.Sequential(Gated(True), Gated(True)))))


def test_new_weights_are_as_large_as_the_active_ones() -> None:
    group = find_units(find_blocks(tiny_bert(width=64, num_heads=4)), "neurons")[0]
    group.active[100:] = False
    with torch.no_grad():
        group.ins[0].weight[:100].normal_(std=0.3)
        group.ins[0].weight[100:] = 0
    before = group.out.weight.clone()
    group.fill(~group.active, group.draw(torch.Generator().manual_seed(0)))
    assert group.ins[0].weight[100:].std().item() == pytest.approx(0.3, rel=0.05)
    assert torch.equal(group.out.weight, before)


class FeedForward(nn.Module):
    """On a stream 4 wide, with layers named and made in the order given: 'u' and 'g' lead in, 'd' leads out."""

    u: nn.Module
    g: nn.Module
    d: nn.Module

    def __init__(self, order: str = "ud", hidden: int = 6) -> None:
        super().__init__()
        self.order = order
        for name in order:
            setattr(self, name, nn.Linear(hidden, 4) if name == "d" else nn.Linear(4, hidden))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = torch.sigmoid(self.g(x)) if "g" in self.order else 1.0
        return x + self.d(torch.tanh(self.u(x)) * gate)


class Projected(nn.Module):
    """An attention with separate projections (T5's names by default), wider inside than the stream."""

    def __init__(self, names: str = "q k v o", inner: int = 6, value: int | None = None) -> None:
        super().__init__()
        self.names = sorted(names.split(), key=["q", "k", "v", "o", "to_q", "to_k", "to_v", "to_out"].index)
        for name in names.split():
            is_out, width = name in ("o", "to_out"), inner if name in ("q", "to_q") else value or inner
            setattr(self, name, nn.Linear(inner, 4) if is_out else nn.Linear(4, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v, o = (getattr(self, name) for name in self.names)
        q, k, v = (part(x).unflatten(-1, (-1, 3)).transpose(1, 2) for part in (q, k, v))
        scored = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return x + o(scored.transpose(1, 2).flatten(2))


class Flat(nn.Module):
    """Layers of the block's own; pairs of them, in order, are feed-forwards behind a flat attention."""

    def __init__(self, attention: bool, count: int) -> None:
        super().__init__()
        if attention:
            self.q, self.k, self.v, self.o = (nn.Linear(*pair) for pair in [(4, 6)] * 3 + [(6, 4)])
        for index in range(count):
            setattr(self, f"up{index}", nn.Linear(4, 6))
            setattr(self, f"down{index}", nn.Linear(6, 4))
        self.attention, self.count = attention, count

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.attention:
            x = x + self.o(nn.functional.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)))
        for index in range(self.count):
            x = x + getattr(self, f"down{index}")(torch.tanh(getattr(self, f"up{index}")(x)))
        return x


def _row(*parts: nn.Module) -> nn.Sequential:
    return nn.Sequential(*parts)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: _row(Projected(), FeedForward()), ["1.d"]),
        (lambda: _row(Projected(inner=12), FeedForward(hidden=12)), ["1.d"]),
        (lambda: _row(Projected("to_q to_k to_v to_out"), FeedForward("gud")), ["1.d"]),
        (lambda: _row(Projected("k v q o", value=3), FeedForward()), ["1.d"]),  # several heads share a key
        (lambda: _row(Projected("q k v o", value=3), FeedForward()), ["1.d"]),
        (lambda: _row(FeedForward(), FeedForward()), ["0.d", "1.d"]),
        (lambda: _row(FeedForward("gud"), Projected(), FeedForward("gud")), ["0.d", "2.d"]),
        (lambda: _row(FeedForward("udg"), FeedForward("udg"), FeedForward()), ["2.d"]),  # gated in LLaMA's order
        (lambda: Flat(False, 2), ["down0", "down1"]),
        (lambda: Flat(True, 2), ["down0", "down1"]),
        (lambda: Flat(True, 1), ["down0"]),
    ],
)
def test_attentions_stay_dense_and_sublayers_apart(make: Callable[[], nn.Module], expected: list[str]) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Sequential(make(), make()))
    groups, _ = shown(network, 0.5)
    assert [group.name for group in groups] == [f"0.{block}.{name}" for block in (0, 1) for name in expected]
    x = torch.randn(2, 5, 4)
    reduced = network(x)
    for group in groups:
        group.release()
    torch.testing.assert_close(reduced, network(x))


def test_neurons_of_hugging_face_t5() -> None:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=8, d_model=16, d_kv=4, num_heads=6, d_ff=32, num_layers=2, dropout_rate=0.0)
    network = T5EncoderModel(config)
    groups, _ = shown(network, 0.5)
    assert [group.name for group in groups] == [f"encoder.block.{i}.layer.1.DenseReluDense.wo" for i in (0, 1)]
    ids = torch.arange(8)[None]
    reduced = network(input_ids=ids).last_hidden_state
    for group in groups:
        group.release()
    torch.testing.assert_close(reduced, network(input_ids=ids).last_hidden_state)


@pytest.mark.parametrize("own", [False, True], ids=["the class's forward", "a forward of its own"])
@pytest.mark.parametrize("order", list(itertools.permutations("abc")), ids="".join)
def test_groups_that_share_a_layer_are_released_in_any_order(order: tuple[str, ...], own: bool) -> None:
    up, down = nn.Linear(2, 3), nn.Linear(3, 2)
    if own:
        vars(up)["forward"] = functools.partial(F.linear, weight=up.weight)
    before = [vars(layer).get("forward") for layer in (up, down)]
    each = torch.arange(3)[:, None]
    groups = {name: UnitGroup(name, "neurons", [up], down, [each], each) for name in "abc"}
    for group in groups.values():
        group.attach()
        group.show(torch.tensor([True, False, True]))
    for name in order:
        groups[name].release()
        left = vars(up).get("forward") is not before[0]
        assert left == (name != order[-1])
    assert [vars(layer).get("forward") for layer in (up, down)] == before
    assert up(torch.ones(1, 2)).shape == (1, 3)


@pytest.mark.parametrize("name", ["u", "d"])
def test_blocks_that_share_some_of_a_units_weights_are_refused(name: str) -> None:
    blocks = nn.Sequential(*(FeedForward() for _ in range(3)))
    getattr(blocks[2], name).weight = getattr(blocks[0], name).weight
    message = rf"'0\.0\.{name}\.weight' and '0\.2\.{name}\.weight' are one weight \(tied\).*granularity='weight'"
    with pytest.raises(ValueError, match=message):
        find_units(find_blocks(nn.Sequential(blocks)))


def test_units_of_one_layer_in_two_blocks_are_one_group() -> None:
    blocks = nn.Sequential(*(FeedForward() for _ in range(3)))
    blocks[2].u, blocks[2].d = blocks[0].u, blocks[0].d
    network = nn.Sequential(blocks)
    groups, _ = shown(network, 0.5)
    assert [group.name for group in groups] == ["0.0.d", "0.1.d"]
    x = torch.randn(3, 4)
    reduced = network(x)
    for group in groups:
        group.release()
    torch.testing.assert_close(reduced, network(x))
