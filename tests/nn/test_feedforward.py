import torch
from torch.nn import functional as F

from lit_scale.nn import EncoderBlock, FeedForward

B, T, C, H = 3, 7, 24, 4


def test_feedforward_is_two_maps_and_an_exact_gelu():
    part, x = FeedForward(C, 50), torch.randn(B, T, C)
    expected = F.linear(F.gelu(F.linear(x, part.up.weight, part.up.bias)), part.down.weight, part.down.bias)
    torch.testing.assert_close(part(x), expected)


def test_hidden_width_and_its_default():
    assert EncoderBlock(C, H).feedforward.up.out_features == 4 * C
    assert EncoderBlock(C, H, hidden=10).feedforward.up.out_features == 10
