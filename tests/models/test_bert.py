import inspect
import math
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import LightningArgumentParser
from torch import nn
from torch.nn import functional as F

from lit_scale.factors.blocks import find_blocks
from lit_scale.models import BertMLM
from tests.support.data import as_loader
from tests.support.training import quiet_trainer, trained_and_reloaded

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*val_dataloader", "ignore:.*LeafSpec"
)

V, T, C, H, M = 50, 12, 16, 2, 3


def bert(**options):
    torch.manual_seed(0)
    return BertMLM(**{"vocab_size": V, "max_length": T, "depth": 2, "width": C, "num_heads": H} | options)


def batch_of(size=4, length=T, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "input_ids": torch.randint(V, (size, length), generator=generator),
        "positions": torch.rand(size, length, generator=generator).argsort(1)[:, :M],
        "labels": torch.randint(V, (size, M), generator=generator),
    }


def loader_of(count=10):
    return as_loader([batch_of(seed=seed) for seed in range(count)])


# -- the network ------------------------------------------------------------------------------------------------------


def huggingface_twin(model):
    """Hugging Face's BertForMaskedLM with the weights of ours, drawn anew so that no bias is zero.

    Of its embedding, what ours does not have is taken out: the sum over token types and the norm behind it.
    """
    import transformers

    hugging_face: Any = transformers  # whose classes are not typed in full
    config = hugging_face.BertConfig(
        vocab_size=V,
        hidden_size=C,
        num_hidden_layers=2,
        num_attention_heads=H,
        intermediate_size=4 * C,
        max_position_embeddings=T,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        layer_norm_eps=1e-5,
        attn_implementation="eager",
    )
    theirs = hugging_face.BertForMaskedLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        embeddings, head = theirs.bert.embeddings, theirs.cls.predictions
        embeddings.LayerNorm = nn.Identity()
        embeddings.token_type_embeddings.weight.zero_()
        embeddings.word_embeddings.weight.copy_(model.embedding.tokens.weight)
        embeddings.position_embeddings.weight.copy_(model.embedding.positions)
        for layer, block in zip(theirs.bert.encoder.layer, find_blocks(model).blocks, strict=True):
            ours: Any = block
            attention, own = layer.attention, ours.attention
            for part, weight, bias in zip(
                (attention.self.query, attention.self.key, attention.self.value),
                own.qkv.weight.chunk(3),
                own.qkv.bias.chunk(3),
                strict=True,
            ):
                part.weight.copy_(weight)
                part.bias.copy_(bias)
            attention.output.dense.load_state_dict(own.out.state_dict())
            attention.output.LayerNorm.load_state_dict(ours.attention_residual.norm.state_dict())
            layer.intermediate.dense.load_state_dict(ours.feedforward.up.state_dict())
            layer.output.dense.load_state_dict(ours.feedforward.down.state_dict())
            layer.output.LayerNorm.load_state_dict(ours.feedforward_residual.norm.state_dict())
        head.transform.dense.load_state_dict(model.head[0].state_dict())
        head.transform.LayerNorm.load_state_dict(model.head[2].state_dict())
        head.decoder.weight = embeddings.word_embeddings.weight
        head.decoder.bias.copy_(model.head_bias)
    return theirs


@pytest.mark.parametrize("padded", [False, True])
def test_with_post_norm_it_is_bert(padded):
    model = bert(norm="post")
    theirs, ids = huggingface_twin(model), batch_of()["input_ids"]
    seen = (torch.arange(T) < torch.tensor([12, 8, 5, 1])[:, None]) if padded else torch.ones(4, T).bool()
    expected = theirs(input_ids=ids, attention_mask=seen.long()).logits
    ours = model(ids, mask=seen[:, None, None] if padded else None)
    torch.testing.assert_close(ours[seen], expected[seen], atol=1e-5, rtol=1e-5)


def test_the_gradient_of_its_loss_is_berts():
    model, batch = bert(norm="post"), batch_of()
    theirs = huggingface_twin(model)
    labels = torch.full((4, T), -100).scatter(1, batch["positions"], batch["labels"])
    expected = theirs(input_ids=batch["input_ids"], labels=labels).loss
    loss = model.per_sample_loss(batch).mean()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    first = theirs.bert.encoder.layer[0]
    for one, other in (
        (model.embedding.tokens.weight, theirs.bert.embeddings.word_embeddings.weight),
        (model.embedding.positions, theirs.bert.embeddings.position_embeddings.weight),
        (model.encoder.blocks[0].feedforward.up.weight, first.intermediate.dense.weight),
        (model.head_bias, theirs.cls.predictions.decoder.bias),
    ):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("positions", ["learned", "rotary"])
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_the_head_at_some_positions_is_the_head_at_all_of_them(positions, norm):
    model, batch = bert(positions=positions, norm=norm), batch_of()
    logits = model(batch["input_ids"])
    assert logits.shape == (4, T, V)
    rows = torch.arange(4)[:, None]
    torch.testing.assert_close(model(batch["input_ids"], batch["positions"]), logits[rows, batch["positions"]])

    everywhere = torch.full((4, T), -100).scatter(1, batch["positions"], batch["labels"])
    expected = F.cross_entropy(logits.flatten(0, 1), everywhere.flatten(), ignore_index=-100)
    torch.testing.assert_close(model.per_sample_loss(batch).mean(), expected)


@pytest.mark.filterwarnings("ignore:.*self.log")
def test_the_training_step_is_the_mean_of_the_per_sample_losses():
    model, batch = bert(), batch_of()
    losses = model.per_sample_loss(batch)
    assert losses.shape == (4,)
    torch.testing.assert_close(losses.mean(), model.training_step(batch, 0))
    for index, loss in enumerate(losses):
        torch.testing.assert_close(model.per_sample_loss({k: v[index : index + 1] for k, v in batch.items()})[0], loss)


@pytest.mark.parametrize("positions", ["learned", "rotary"])
@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("vocab_size", [258, 8192])
def test_the_first_loss_is_that_of_a_uniform_guess(positions, norm, vocab_size):
    model = bert(vocab_size=vocab_size, positions=positions, norm=norm, width=128, num_heads=4)
    assert model.per_sample_loss(batch_of(64)).mean().item() == pytest.approx(math.log(vocab_size), abs=0.1)


def test_init_std_reaches_every_part():
    model = bert(init_std=0.1, width=64, vocab_size=500, max_length=64)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and name != "embedding.positions"]
    assert [p.std().item() for p in matrices] == pytest.approx([0.1] * len(matrices), rel=0.1)


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_position_matters(positions):
    model, ids = bert(positions=positions, init_std=0.5), batch_of()["input_ids"]
    assert not torch.allclose(model(ids).flip(1), model(ids.flip(1)), atol=1e-3)


def test_dropout_is_for_training_only():
    model, ids = bert(dropout=0.5), batch_of()["input_ids"]
    assert not torch.equal(model(ids), model(ids))
    assert torch.equal(model.eval()(ids), model(ids))


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_under_autocast(positions):
    model, batch = bert(positions=positions), batch_of()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.per_sample_loss(batch).mean()
    loss.backward()
    torch.testing.assert_close(loss.float(), model.per_sample_loss(batch).mean(), atol=0.02, rtol=0.01)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_it_can_be_compiled_in_one_piece():
    model, batch = bert(positions="rotary", depth=1), batch_of()
    loss = torch.compile(model.per_sample_loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(loss(batch), model.per_sample_loss(batch))


# -- training ---------------------------------------------------------------------------------------------------------


def optimizer_of(model, folder):
    model.trainer = quiet_trainer(folder, max_steps=10)
    return model.configure_optimizers()["optimizer"]


def test_decay_is_for_matrices_only(tmp_path):
    model = bert()
    optimizer = optimizer_of(model, tmp_path)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {
        group["weight_decay"]: {names.pop(id(parameter)) for parameter in group["params"]}
        for group in optimizer.param_groups
    }
    assert not names  # each parameter in one group
    assert set(groups) == {0.0, 0.01}
    assert all(model.get_parameter(name).ndim == 1 for name in groups[0.0])
    assert all(model.get_parameter(name).ndim == 2 for name in groups[0.01])
    assert {"head_bias", "encoder.norm.weight", "encoder.blocks.0.attention.qkv.bias"} <= groups[0.0]


def test_the_optimizer_gets_the_models_settings(tmp_path):
    optimizer = optimizer_of(bert(lr=0.5, weight_decay=0.3, beta2=0.9), tmp_path)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.9)}
    assert {group["initial_lr"] for group in optimizer.param_groups} == {0.5}
    assert max(group["weight_decay"] for group in optimizer.param_groups) == 0.3


@pytest.mark.parametrize("name", ["lamb", "sgd", "adafactor", "lion", "nadamw"])
def test_other_optimizers_train(name, tmp_path):
    model = bert(optimizer=name)
    before = model.embedding.tokens.weight.detach().clone()
    quiet_trainer(tmp_path, max_steps=3).fit(model, loader_of())
    assert not torch.equal(model.embedding.tokens.weight, before)
    assert all(p.isfinite().all() for p in model.parameters())


def test_an_unknown_optimizer_lists_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match=r"optimizer='adamv' is unknown; .*adamw.*lamb"):
        optimizer_of(bert(optimizer="adamv"), tmp_path)


class Rates(Callback):
    """Learning rate of each optimizer step."""

    def __init__(self):
        self.of = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.of.append(optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize(
    ("limit", "steps"),
    [
        ({"max_steps": 40}, 40),
        ({"max_epochs": 4}, 40),
        ({"max_steps": 40, "max_epochs": 100}, 40),
        ({"max_epochs": 4, "accumulate_grad_batches": 2}, 20),
    ],
    ids=str,
)
def test_the_rate_climbs_and_falls_to_zero(limit, steps, tmp_path):
    rates, model = Rates(), bert(depth=1, lr=0.01, warmup=0.1)
    trainer = quiet_trainer(tmp_path, callbacks=[rates], **limit)
    trainer.fit(model, loader_of())
    assert len(rates.of) == trainer.global_step == steps
    top = rates.of.index(max(rates.of))
    assert rates.of[top] == pytest.approx(0.01)
    assert top == pytest.approx(0.1 * steps)
    assert rates.of[: top + 1] == sorted(rates.of[: top + 1])
    assert rates.of[top:] == sorted(rates.of[top:], reverse=True)
    assert rates.of[-1] < 0.01 * 0.01
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.0


def test_it_learns(tmp_path):
    model = bert(lr=0.01)
    before = sum(model.per_sample_loss(batch).mean().item() for batch in loader_of())
    quiet_trainer(tmp_path, max_epochs=20).fit(model, loader_of())
    assert sum(model.per_sample_loss(batch).mean().item() for batch in loader_of()) < 0.5 * before


@pytest.mark.filterwarnings("ignore:.*batch_size")
def test_metrics_are_those_of_the_whole_set(tmp_path):
    model = bert(init_std=0.5)
    batches = [batch_of(4, seed=1), batch_of(4, seed=2), batch_of(1, seed=3)]  # the last one is smaller
    found = quiet_trainer(tmp_path).validate(model, as_loader(batches), verbose=False)[0]

    logits = torch.cat([model(batch["input_ids"], batch["positions"]).flatten(0, 1) for batch in batches])
    labels = torch.cat([batch["labels"].flatten() for batch in batches])
    loss = -logits.log_softmax(-1)[torch.arange(len(labels)), labels].mean().item()
    assert found["val/loss"] == pytest.approx(loss, rel=1e-5)
    assert found["val/perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert found["val/accuracy"] == pytest.approx((logits.argmax(-1) == labels).float().mean().item())


@pytest.mark.parametrize("options", [{}, {"positions": "rotary", "norm": "post", "depth": 3}])
def test_a_checkpoint_brings_model_and_settings_back(options, tmp_path):
    model, ids = bert(**options), batch_of()["input_ids"]
    loaded = trained_and_reloaded(model, loader_of(), tmp_path)
    assert torch.equal(loaded.eval()(ids), model.eval()(ids))


# -- its arguments ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 15}, "width=15 is not a multiple of num_heads=2"),
        ({"width": 6, "positions": "rotary"}, "width / num_heads = 3 is odd"),
        ({"num_heads": 0}, "num_heads=0"),
        ({"depth": 0}, "depth=0"),
        ({"width": 0}, "width=0 must be at least 1"),
        ({"vocab_size": 0}, "vocab_size=0 must be at least 1"),
        ({"max_length": 0}, "max_length=0 must be at least 1"),
        ({"norm": "middle"}, "norm='middle': choose 'pre' or 'post'"),
        ({"positions": "none"}, "positions='none': choose 'learned' or 'rotary'"),
        ({"warmup": 1.0}, "warmup=1.0 is not a fraction of the run"),
        ({"warmup": -0.1}, "warmup=-0.1 is not a fraction of the run"),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        bert(**options)


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_a_sequence_longer_than_max_length(positions):
    with pytest.raises(ValueError, match="a sequence of 13 tokens is longer than max_length=12"):
        bert(positions=positions)(torch.zeros(2, 13, dtype=torch.long))


def test_a_shorter_sequence():
    assert bert()(torch.zeros(2, 5, dtype=torch.long)).shape == (2, 5, V)


@pytest.fixture
def parser():
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_lightning_class_args(BertMLM, "model")
    return parser


def test_every_argument_is_a_flag(parser):
    flags = {name: value for name, value in vars(parser.parse_args([]).model).items() if not name.startswith("__")}
    assert flags == {n: p.default for n, p in inspect.signature(BertMLM).parameters.items()}


def test_flags_are_read_and_checked(parser):
    model = parser.parse_args(["--model.norm=post", "--model.positions=rotary", "--model.lr=3e-4"]).model
    assert (model.norm, model.positions, model.lr) == ("post", "rotary", 3e-4)
    for wrong in ("--model.norm=middle", "--model.positions=none", "--model.depth=many"):
        with pytest.raises(Exception, match=wrong[2:].split("=")[0]):
            parser.parse_args([wrong])


def test_clipping_under_mixed_precision(tmp_path):
    data = {"input_ids": torch.zeros(8, dtype=torch.long), "positions": torch.tensor([1]), "labels": torch.tensor([2])}
    model = BertMLM(10, 8, depth=1, width=8, num_heads=1)
    trainer = Trainer(
        max_steps=2,
        precision="bf16-mixed",
        gradient_clip_val=0.1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
    )
    samples: Any = [data] * 4
    trainer.fit(model, torch.utils.data.DataLoader(samples, batch_size=2))
    assert trainer.global_step == 2


def test_positions_are_initialised_like_everything_else():
    model = BertMLM(50, 64, depth=1, width=64, num_heads=1, init_std=0.2)
    assert model.embedding.positions is not None
    assert model.embedding.positions.std().item() == pytest.approx(0.2, rel=0.1)


def test_an_unmasked_batch_is_refused_with_what_would_work():
    with pytest.raises(ValueError, match="no labels, positions; with TextDataModule set mask_rate > 0"):
        BertMLM(10, 8, depth=1, width=8, num_heads=1).training_step({"input_ids": torch.zeros(1, 8).long()}, 0)
