import inspect
import math
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.cli import LightningArgumentParser
from torch.nn import functional as F

from lit_scale.callbacks import ProgressiveStacking
from lit_scale.datamodules import TextDataModule
from lit_scale.models import GPT
from tests.support.data import as_loader
from tests.support.training import quiet_trainer, trained_and_reloaded

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*val_dataloader", "ignore:.*LeafSpec", "ignore:.*batch_size"
)

V, T, C, H = 50, 12, 16, 2


def gpt(**options):
    torch.manual_seed(0)
    return GPT(**{"vocab_size": V, "max_length": T, "depth": 2, "width": C, "num_heads": H} | options)


def batch_of(size=4, length=T, seed=0):
    return {"input_ids": torch.randint(V, (size, length), generator=torch.Generator().manual_seed(seed))}


def loader_of(count=8, size=4):
    return as_loader([batch_of(size, seed=seed) for seed in range(count)])


# -- the network ------------------------------------------------------------------------------------------------------


def huggingface_twin(model):
    """Hugging Face's GPT2LMHeadModel with the weights of ours, drawn anew so that no bias is zero."""
    import transformers

    hugging_face: Any = transformers  # whose classes are not typed in full
    config = hugging_face.GPT2Config(
        vocab_size=V,
        n_positions=T,
        n_embd=C,
        n_layer=2,
        n_head=H,
        activation_function="gelu",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        attn_implementation="eager",
    )
    theirs = hugging_face.GPT2LMHeadModel(config)
    body = theirs.transformer
    pairs = {
        model.embedding.tokens.weight: body.wte.weight,
        model.embedding.positions: body.wpe.weight,
        model.encoder.norm.weight: body.ln_f.weight,
        model.encoder.norm.bias: body.ln_f.bias,
    }
    for block, layer in zip(model.encoder.blocks, body.h, strict=True):
        for own, other in (
            (block.attention_residual.norm, layer.ln_1),
            (block.attention.qkv, layer.attn.c_attn),
            (block.attention.out, layer.attn.c_proj),
            (block.feedforward_residual.norm, layer.ln_2),
            (block.feedforward.up, layer.mlp.c_fc),
            (block.feedforward.down, layer.mlp.c_proj),
        ):
            pairs |= {own.weight: other.weight, own.bias: other.bias}
    assert {id(p) for p in pairs} == {id(p) for p in model.parameters()}
    assert {id(p) for p in pairs.values()} == {id(p) for p in theirs.parameters()}
    with torch.no_grad():
        for ours, other in pairs.items():
            ours.add_(torch.randn_like(ours), alpha=0.1)
            other.copy_(_laid_out(ours, other, body))
    return theirs, pairs


def _laid_out(values, parameter, body):
    """Between our layout and GPT-2's: the matrices of its Conv1D layers are transposed, the embeddings are not."""
    same = parameter.ndim == 1 or parameter is body.wte.weight or parameter is body.wpe.weight
    return values if same else values.T


def test_it_is_gpt2():
    model = gpt()
    theirs, _ = huggingface_twin(model)
    ids = batch_of()["input_ids"]
    torch.testing.assert_close(model(ids), theirs(input_ids=ids).logits, atol=1e-5, rtol=1e-5)


def test_loss_and_gradient_are_gpt2s():
    model, batch = gpt(), batch_of()
    theirs, pairs = huggingface_twin(model)
    expected = theirs(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss
    loss = model.per_sample_loss(batch).mean()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    for ours, other in pairs.items():
        gradient = _laid_out(other.grad, other, theirs.transformer)
        torch.testing.assert_close(ours.grad, gradient, atol=1e-6, rtol=1e-4)


def test_the_loss_by_hand():
    model, batch = gpt(init_std=0.3), batch_of()
    ids, losses = batch["input_ids"], model.per_sample_loss(batch)
    assert losses.shape == (4,)
    for row, loss in zip(ids, losses, strict=True):
        surprise = []
        for length in range(1, T):  # the prefix alone, so nothing behind it can be seen
            probabilities = model(row[None, :length])[0, -1].softmax(0)
            surprise.append(-probabilities[row[length]].log())
        torch.testing.assert_close(loss, torch.stack(surprise).mean(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("positions", ["learned", "rotary"])
@pytest.mark.parametrize("masked", [False, True])
def test_no_token_is_seen_before_its_time(positions, masked):
    model, ids = gpt(positions=positions, init_std=0.3), batch_of(2)["input_ids"]
    mask = torch.ones(2, 1, 1, T, dtype=torch.bool) if masked else None
    logits = model(ids, mask)
    for position in range(T):
        other = ids.clone()
        other[:, position] = (other[:, position] + 1) % V
        changed = (model(other, mask) - logits).abs().amax((0, 2)) > 1e-6
        assert not changed[:position].any()
        assert changed[position:].all()  # itself and all that follow


def test_the_initial_weights_are_gpt2s():
    depth, std = 8, 0.04
    model = gpt(depth=depth, width=128, num_heads=4, init_std=std, vocab_size=500, max_length=128)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            adds = name.endswith(("attention.out.weight", "feedforward.down.weight"))
            expected = std / math.sqrt(2 * depth) if adds else std
            assert parameter.std().item() == pytest.approx(expected, rel=0.05), name


@pytest.mark.parametrize("vocab_size", [258, 8192])
def test_the_first_loss_is_that_of_a_uniform_guess(vocab_size):
    model = gpt(vocab_size=vocab_size, width=128, num_heads=4)
    assert model.per_sample_loss(batch_of(64)).mean().item() == pytest.approx(math.log(vocab_size), abs=0.1)


def test_embedding_and_head_are_one_matrix():
    names = [name for name, parameter in gpt().named_parameters() if V in parameter.shape]
    assert names == ["embedding.tokens.weight"]


def test_dropout_is_for_training_only():
    model, ids = gpt(dropout=0.5), batch_of()["input_ids"]
    assert not torch.equal(model(ids), model(ids))
    assert torch.equal(model.eval()(ids), model(ids))


def test_it_can_be_compiled_in_one_piece():
    model, batch = gpt(positions="rotary", depth=1), batch_of()
    loss = torch.compile(model.per_sample_loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(loss(batch), model.per_sample_loss(batch))


# -- training ---------------------------------------------------------------------------------------------------------


def test_accumulated_batches_are_one_large_batch(tmp_path):
    weights = []
    for accumulate in (1, 2):
        model = gpt(optimizer="momentum", lr=0.1, warmup=0.0)
        trainer = quiet_trainer(tmp_path, max_steps=4, accumulate_grad_batches=accumulate)
        halves = [batch_of(4, seed=seed) for seed in range(8)]
        pairs = zip(halves[::2], halves[1::2], strict=True)
        wholes = [{"input_ids": torch.cat([a["input_ids"], b["input_ids"]])} for a, b in pairs]
        trainer.fit(model, as_loader(halves if accumulate == 2 else wholes))
        assert trainer.global_step == 4
        weights.append(model.state_dict())
    assert not torch.equal(weights[0]["embedding.positions"], gpt().embedding.positions)
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], atol=1e-6, rtol=1e-5)


def test_it_learns_a_repeating_pattern(tmp_path):
    """Sequences that repeat a period of 3 random tokens: after the first period all is known."""
    generator = torch.Generator().manual_seed(0)
    periods = torch.randint(8, (400, 16, 3), generator=generator)
    batches = [{"input_ids": period.repeat(1, 4)} for period in periods]
    model = gpt(vocab_size=8, width=32, lr=1e-2, weight_decay=0.01)
    quiet_trainer(tmp_path, max_epochs=1).fit(model, as_loader(batches[:-8]))
    with torch.no_grad():
        losses = torch.stack(
            [F.cross_entropy(model(b["input_ids"])[:, 2:-1].mT, b["input_ids"][:, 3:]) for b in batches[-8:]]
        )
    assert losses.mean() < 0.2 * math.log(8)


def test_it_trains_on_text_without_masks(tiny_corpus, tmp_path):
    data = TextDataModule(str(tiny_corpus), sequence_length=32, mask_rate=0, batch_size=16, cache_dir=str(tmp_path))
    seed_everything(1, verbose=False)
    model = GPT(data.vocab_size, 32, depth=1, width=64, num_heads=2, lr=1e-2)
    trainer = quiet_trainer(tmp_path, max_steps=40)
    trainer.fit(model, data)
    (found,) = trainer.validate(model, data, verbose=False)
    assert found["val/loss"] < data.unigram_entropy


def test_metrics_are_those_of_the_whole_set(tmp_path):
    model = gpt(init_std=0.5)
    batches = [batch_of(4, seed=1), batch_of(4, seed=2), batch_of(1, seed=3)]  # the last one is smaller
    (found,) = quiet_trainer(tmp_path).validate(model, as_loader(batches), verbose=False)
    ids = torch.cat([batch["input_ids"] for batch in batches])
    loss = F.cross_entropy(model(ids)[:, :-1].mT, ids[:, 1:]).item()
    assert found["val/loss"] == pytest.approx(loss, rel=1e-5)
    assert found["val/perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)


@pytest.mark.parametrize("options", [{}, {"positions": "rotary", "depth": 3}])
def test_a_checkpoint_brings_model_and_settings_back(options, tmp_path):
    model, ids = gpt(**options), batch_of()["input_ids"]
    loaded = trained_and_reloaded(model, loader_of(), tmp_path)
    assert torch.equal(loaded.eval()(ids), model.eval()(ids))


def test_a_technique_grows_it_and_must_not_be_left_out_at_resume(tmp_path):
    stacking = ProgressiveStacking([(0.0, 1), (0.5, 2)])
    trainer = quiet_trainer(tmp_path, max_steps=4, callbacks=[stacking])
    trainer.fit(gpt(), loader_of())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match="trained with ProgressiveStacking, which is missing"):
        quiet_trainer(tmp_path, max_steps=8).fit(gpt(), loader_of(), ckpt_path=tmp_path / "last.ckpt")


# -- its arguments ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 15}, "width=15 is not a multiple of num_heads=2"),
        ({"width": 6, "positions": "rotary"}, "width / num_heads = 3 is odd"),
        ({"depth": 0}, "depth=0"),
        ({"vocab_size": 0}, "vocab_size=0 must be at least 1"),
        ({"positions": "none"}, "positions='none': choose 'learned' or 'rotary'"),
        ({"warmup": 1.0}, "warmup=1.0 is not a fraction of the run"),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        gpt(**options)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"images": torch.zeros(1)}, "the batch has no input_ids, only images"),
        (batch_of() | {"positions": torch.zeros(4, 1).long()}, "masked; with TextDataModule set mask_rate=0"),
        (batch_of(length=1), "a sequence of 1 token has no next one"),
        (batch_of(length=T + 2), f"a sequence of {T + 1} tokens is longer than max_length={T}"),
    ],
)
def test_a_batch_that_cannot_be_learnt_from_is_refused(batch, message):
    with pytest.raises(ValueError, match=message):
        gpt().training_step(batch, 0)


def test_every_argument_is_a_flag():
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_lightning_class_args(GPT, "model")
    flags = {name: value for name, value in vars(parser.parse_args([]).model).items() if not name.startswith("__")}
    assert flags == {n: p.default for n, p in inspect.signature(GPT).parameters.items()}
    assert parser.parse_args(["--model.positions=rotary"]).model.positions == "rotary"
