import math

import pytest
import torch
from torch import nn

from lit_scale.nn import Attention, RotaryPositions

B, T, C, H = 3, 7, 24, 4
D = C // H


def rotated_by_hand(x):
    """Each pair (i, i + D/2) as a complex number, times e^(i t theta_i)  # (B, T, H, D)."""
    half = x.shape[-1] // 2
    theta = 10_000.0 ** (-2 * torch.arange(half) / x.shape[-1])
    angle = torch.arange(x.shape[1])[:, None, None] * theta
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], -1)


def attention_by_hand(attention, x, mask=None):
    """Softmax of scaled scores, one einsum a line."""
    query, key, value = (x @ attention.qkv.weight.T + attention.qkv.bias).view(*x.shape[:2], 3, H, D).unbind(2)
    if attention.rotary is not None:
        query, key = rotated_by_hand(query), rotated_by_hand(key)
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(D)
    if attention.causal:
        mask = torch.ones(x.shape[1], x.shape[1]).tril().bool()
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value).reshape(x.shape)
    return out @ attention.out.weight.T + attention.out.bias


def padding(lengths=(7, 4, 1)):
    return (torch.arange(T) < torch.tensor(lengths)[:, None])[:, None, None]  # (B, 1, 1, T)


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("kind", ["all", "padding", "any", "causal"])
def test_equals_the_formula(kind, rotary):
    torch.manual_seed(0)
    positions = RotaryPositions(D, T + 2) if rotary else None
    attention = Attention(C, H, rotary=positions, causal=kind == "causal")
    x = torch.randn(B, T, C, requires_grad=True)
    mask = {"padding": padding(), "any": (torch.rand(B, 1, T, T) < 0.5) | torch.eye(T).bool()}.get(kind)

    ours, by_hand = attention(x, mask), attention_by_hand(attention, x, mask)
    torch.testing.assert_close(ours, by_hand, atol=1e-5, rtol=1e-5)

    weight = torch.randn(B, T, C)
    inputs = [x, *attention.parameters()]
    for one, other in zip(
        torch.autograd.grad(ours, inputs, weight), torch.autograd.grad(by_hand, inputs, weight), strict=True
    ):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("masked", [False, True])
def test_equals_torchs_multi_head_attention(masked):
    torch.manual_seed(0)
    theirs, ours = nn.MultiheadAttention(C, H, batch_first=True), Attention(C, H)
    with torch.no_grad():
        ours.qkv.weight.copy_(theirs.in_proj_weight)
        ours.qkv.bias.copy_(theirs.in_proj_bias.normal_())
        ours.out.load_state_dict(theirs.out_proj.state_dict())
    x, seen = torch.randn(B, T, C), padding() if masked else None
    expected, _ = theirs(x, x, x, key_padding_mask=None if seen is None else ~seen[:, 0, 0], need_weights=False)
    torch.testing.assert_close(ours(x, seen), expected, atol=1e-6, rtol=1e-5)


def test_hidden_positions_do_not_matter():
    attention, x = Attention(C, H, rotary=RotaryPositions(D, T)), torch.randn(B, T, C)
    other = x.clone()
    other[1, 4:] = 100.0
    torch.testing.assert_close(attention(x, padding())[1, :4], attention(other, padding())[1, :4])


def test_a_causal_position_does_not_see_what_comes_later():
    attention, x = Attention(C, H, causal=True), torch.randn(B, T, C)
    torch.testing.assert_close(attention(x)[:, :5], attention(x[:, :5]))


def test_dropout_is_for_training_only():
    attention, x = Attention(C, H, dropout=0.5), torch.randn(B, T, C)
    assert not torch.equal(attention(x), attention(x))
    attention.eval()
    assert torch.equal(attention(x), attention(x))


def test_rotary_scores_depend_on_distance_only():
    rotary = RotaryPositions(8, 32).double()
    query, key = torch.randn(2, 8, dtype=torch.double)
    at_each = [rotary(vector.expand(1, 32, 1, 8))[0, :, 0] for vector in (query, key)]  # (T, D)
    scores = at_each[0] @ at_each[1].T
    torch.testing.assert_close(scores[:-5, :-5], scores[5:, 5:], atol=1e-5, rtol=0.0)  # tables are of single precision
    assert scores[0, 0] == pytest.approx((query @ key).item())
    assert not torch.allclose(scores[0, 0], scores[0, 1])


def test_rotary_keeps_lengths_and_leaves_its_input_alone():
    rotary, x = RotaryPositions(8, 16), torch.randn(2, 10, 3, 8)
    before = x.clone()
    torch.testing.assert_close(rotary(x).norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(x, before)
    assert torch.equal(rotary(x)[:, 0], x[:, 0])


def test_rotary_tables_written_out_for_all_heads_are_the_same_rotation():
    x = torch.randn(2, 10, 3, 8)
    assert torch.equal(RotaryPositions(8, 16, num_heads=3)(x), RotaryPositions(8, 16)(x))


def test_rotary_gradient():
    rotary = RotaryPositions(4, 6).double()
    assert torch.autograd.gradcheck(rotary, torch.randn(2, 5, 3, 4, dtype=torch.double, requires_grad=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_rotary_keeps_the_type_of_its_input(dtype):
    assert RotaryPositions(8, 16)(torch.randn(2, 10, 3, 8, dtype=dtype)).dtype == dtype


def test_rotary_tables_are_not_saved():
    assert set(Attention(C, H, rotary=RotaryPositions(D, T)).state_dict()) == set(Attention(C, H).state_dict())


def test_head_widths_must_fit():
    with pytest.raises(ValueError, match="width=24 is not a multiple of num_heads=5"):
        Attention(24, 5)
    with pytest.raises(ValueError, match="num_heads=0"):
        Attention(24, 0)
    with pytest.raises(ValueError, match="width / num_heads = 3 is odd"):
        RotaryPositions(3, 16)


def test_a_sequence_longer_than_the_rotary_tables():
    rotary = RotaryPositions(8, 16)
    with pytest.raises(ValueError, match="a sequence of 17 tokens is longer than max_length=16"):
        rotary(torch.randn(1, 17, 2, 8))


def test_causal_attention_stays_causal_under_a_mask():
    attention = Attention(width=16, num_heads=2, causal=True)
    x = torch.randn(1, 6, 16)
    changed = x.clone()
    changed[:, -1] += 1.0
    everything = torch.ones(1, 1, 1, 6, dtype=torch.bool)
    torch.testing.assert_close(attention(x, everything), attention(x))
    assert torch.equal(attention(x, everything)[:, :-1], attention(changed, everything)[:, :-1])
