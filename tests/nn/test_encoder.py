import pytest
import torch
from torch import nn

from lit_scale.factors.blocks import find_blocks
from lit_scale.nn import Encoder, EncoderBlock, PostNorm, PreNorm, normal_init

B, T, C, H = 3, 7, 24, 4


def copy_layer(layer, block):
    """Weights of an nn.TransformerEncoderLayer into one of our blocks, all drawn anew, biases and norms too."""
    pairs = {
        block.attention.qkv.weight: layer.self_attn.in_proj_weight,
        block.attention.qkv.bias: layer.self_attn.in_proj_bias,
        **dict(zip(block.attention.out.parameters(), layer.self_attn.out_proj.parameters(), strict=True)),
        **dict(zip(block.feedforward.up.parameters(), layer.linear1.parameters(), strict=True)),
        **dict(zip(block.feedforward.down.parameters(), layer.linear2.parameters(), strict=True)),
        **dict(zip(block.attention_residual.norm.parameters(), layer.norm1.parameters(), strict=True)),
        **dict(zip(block.feedforward_residual.norm.parameters(), layer.norm2.parameters(), strict=True)),
    }
    assert {id(p) for p in pairs} == {id(p) for p in block.parameters()}
    with torch.no_grad():
        for ours, theirs in pairs.items():
            ours.copy_(theirs.add_(torch.randn_like(theirs), alpha=0.1))
    return pairs


def torch_layer(norm_first):
    return nn.TransformerEncoderLayer(C, H, 4 * C, 0.0, "gelu", batch_first=True, norm_first=norm_first)


@pytest.mark.parametrize(("residual", "norm_first"), [(PreNorm, True), (PostNorm, False)])
@pytest.mark.parametrize("masked", [False, True])
def test_a_block_is_torchs_encoder_layer(residual, norm_first, masked):
    torch.manual_seed(0)
    layer, block = torch_layer(norm_first), EncoderBlock(C, H, residual=residual)
    pairs = copy_layer(layer, block)
    x, weight = torch.randn(B, T, C), torch.randn(B, T, C)
    hidden = (torch.arange(T) >= torch.tensor([7, 4, 2])[:, None]) if masked else None  # (B, T)

    ours = block(x, None if hidden is None else ~hidden[:, None, None])
    theirs = layer(x, src_key_padding_mask=hidden)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)

    gradients = torch.autograd.grad(ours, list(pairs), weight)
    expected = torch.autograd.grad(theirs, list(pairs.values()), weight)
    for one, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_a_stack_is_torchs_encoder():
    torch.manual_seed(0)
    theirs = nn.TransformerEncoder(torch_layer(norm_first=True), 3, nn.LayerNorm(C), enable_nested_tensor=False)
    ours, x = Encoder(3, C, H), torch.randn(B, T, C)
    for layer, block in zip(theirs.layers, ours.blocks, strict=True):
        copy_layer(layer, block)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"rotary": True, "max_length": T}, {"residual": PostNorm}, {"causal": True}])
def test_with_some_blocks_active_it_is_the_encoder_of_these(options):
    torch.manual_seed(0)
    full, small, x = Encoder(4, C, H, **options), Encoder(2, C, H, **options), torch.randn(B, T, C)
    stack = find_blocks(full)
    for source, target in zip((0, 2), small.blocks, strict=True):
        target.load_state_dict(stack.blocks[source].state_dict())
    small.norm.load_state_dict(full.norm.state_dict())
    everything = full(x)
    stack.activate([0, 2])
    assert torch.equal(full(x), small(x))
    assert not torch.allclose(full(x), everything)
    full(x).sum().backward()
    assert all(
        (p.grad is not None) == (i in (0, 2)) for i, block in enumerate(stack.blocks) for p in block.parameters()
    )


def test_dropout_is_for_training_only():
    encoder, x = Encoder(2, C, H, dropout=0.5), torch.randn(B, T, C)
    assert not torch.equal(encoder(x), encoder(x))
    assert torch.equal(encoder.eval()(x), encoder(x))


def test_initialisation_sees_each_block_and_the_depth():
    seen = []
    encoder = Encoder(3, C, H, init=lambda block, depth: seen.append((block, depth)))
    assert seen == [(block, 3) for block in encoder.blocks]


def test_normal_init():
    block = EncoderBlock(128, H)
    normal_init(block, 1, std=0.05)
    for linear in (m for m in block.modules() if isinstance(m, nn.Linear)):
        assert linear.weight.std().item() == pytest.approx(0.05, rel=0.05)
        assert not linear.bias.any()
    assert (block.attention_residual.norm.weight == 1.0).all()


def test_sizes_must_fit():
    with pytest.raises(ValueError, match="depth=0: an encoder needs at least one block"):
        Encoder(0, C, H)
    with pytest.raises(ValueError, match="width=24 is not a multiple of num_heads=5"):
        Encoder(1, C, 5)
    with pytest.raises(ValueError, match="width / num_heads = 3 is odd"):
        Encoder(1, 12, 4, rotary=True)
    with pytest.raises(ValueError, match="8 tokens is longer than max_length=7"):
        Encoder(1, C, H, rotary=True, max_length=7)(torch.randn(1, 8, C))
