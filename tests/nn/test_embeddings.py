from typing import Any

import pytest
import torch

from lit_scale.nn import Embedding


def test_learned_positions_are_added():
    embedding, ids = Embedding(10, 8, 6), torch.tensor([[3, 1, 3, 9]])
    assert embedding.positions is not None
    torch.testing.assert_close(embedding(ids), embedding.tokens.weight[ids] + embedding.positions[:4])


def test_rotary_positions_add_nothing():
    embedding, ids = Embedding(10, 8, 6, positions="rotary"), torch.tensor([[3, 1, 3, 9]])
    assert torch.equal(embedding(ids), embedding.tokens.weight[ids])
    assert set(embedding.state_dict()) == {"tokens.weight"}


def test_dropout_is_for_training_only():
    embedding, ids = Embedding(10, 64, 6, dropout=0.5), torch.tensor([[3, 1, 3, 9]])
    assert (embedding(ids) == 0.0).float().mean() == pytest.approx(0.5, abs=0.2)
    assert (embedding.eval()(ids) != 0.0).all()


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_a_sequence_longer_than_max_length(positions):
    embedding = Embedding(10, 8, 6, positions=positions)
    with pytest.raises(ValueError, match=r"a sequence of 7 tokens is longer than max_length=6; .*max_length=7 or more"):
        embedding(torch.zeros(2, 7, dtype=torch.long))


def test_unknown_positions():
    unknown: Any = "sinusoidal"
    with pytest.raises(ValueError, match="positions='sinusoidal': choose 'learned' or 'rotary'"):
        Embedding(10, 8, 6, positions=unknown)
