import pytest
import torch
from torch import nn

from lit_scale.nn import Encoder, PostNorm, PreNorm, Residual

B, T, C, H = 3, 7, 24, 4


def normal(x):
    """LayerNorm at its start, by hand."""
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()


@pytest.mark.parametrize(
    ("scheme", "formula"),
    [(PreNorm, lambda x, f: x + f(normal(x))), (PostNorm, lambda x, f: normal(x + f(x)))],
    ids=["x + f(LN(x))", "LN(x + f(x))"],
)
def test_a_scheme_is_its_formula(scheme, formula):
    x, layer = torch.randn(B, T, C), nn.Linear(C, C)
    torch.testing.assert_close(scheme(C)(x, layer), formula(x, layer))


def test_dropout_is_of_the_sublayers_output_and_not_of_the_stream():
    x, scheme = torch.randn(B, T, C), PreNorm(C, dropout=0.5)
    joined = scheme(x, torch.ones_like) - x
    assert {0.0, 2.0} == set(joined.round(decimals=4).unique().tolist())
    torch.testing.assert_close(scheme.eval()(x, torch.ones_like), x + 1)


def test_only_pre_norm_ends_in_a_norm():
    assert isinstance(Encoder(1, C, H).norm, nn.LayerNorm)
    assert not list(Encoder(1, C, H, residual=PostNorm).norm.parameters())


def test_a_residual_scheme_is_a_replaceable_part():
    class Half(Residual):
        def forward(self, x, sublayer):
            return x + 0.5 * self.drop(sublayer(self.norm(x)))

    assert all(isinstance(m, Half) for m in Encoder(1, C, H, residual=Half).modules() if isinstance(m, Residual))
    with pytest.raises(TypeError, match="Residual does not say how"):
        Encoder(1, C, H, residual=Residual)(torch.randn(B, T, C))
