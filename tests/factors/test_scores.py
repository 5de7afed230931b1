from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torchmetrics import MeanMetric

from lit_scale.factors.scores import check_outputs, output_gradients, sample_losses, watch_outputs
from tests.support.data import CLASSES, loader
from tests.support.networks import FOREIGN, PlainTorch, build, tiny_mae

pytestmark = [pytest.mark.filterwarnings("ignore")]


NAMES = [*FOREIGN, "bert"]


def batch_of(name: str, size: int = 8) -> Any:
    return next(iter(loader(name, batch_size=size)))


def logits_and_labels(module: Any, batch: Any, name: str) -> tuple[Tensor, Tensor]:
    """Logits (B, C) or (B, T, C) and labels, computed by the module's own parts."""
    with torch.no_grad():
        if name == "bert":
            return module(batch["input_ids"], batch["positions"]), batch["labels"]
        logits = module.logits(batch)
        return logits, batch["input_ids"][:, 1:] if name == "hf_gpt2" else batch["label"]


@pytest.mark.parametrize("name", NAMES)
def test_the_score_is_the_norm_of_p_minus_y(name: str) -> None:
    """The closed form of the gradient of softmax cross-entropy; of a mean over positions, all of them together."""
    module, batch = build(name), batch_of(name)
    scores = output_gradients(module, batch)
    logits, labels = logits_and_labels(module.eval(), batch, name)
    errors = logits.softmax(-1) - F.one_hot(labels, logits.shape[-1])
    positions = 1 if labels.ndim == 1 else labels.shape[1]
    torch.testing.assert_close(scores, errors.flatten(1).norm(dim=1) / positions)


def per_sample_gradients(module: PlainTorch, batch: Any) -> dict[str, Tensor]:
    weights = {name: p.detach() for name, p in module.net.named_parameters()}
    buffers = dict(module.net.named_buffers())

    def loss(weights: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(module.net, (weights, buffers), (image[None],)), label[None])

    return vmap(grad(loss), in_dims=(None, 0, 0))(weights, batch["image"], batch["label"])


def test_the_score_follows_the_true_norms_of_each_sample_s_gradient() -> None:
    """By torch.func: that of the output's bias is the gradient at the output, and all others grow along with it."""
    module, batch = build("plain_torch"), batch_of("plain_torch", 32)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    for _ in range(30):  # until some samples are easy
        module.per_sample_loss(batch).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    scores = output_gradients(module, batch)
    gradients = per_sample_gradients(module.eval(), batch)
    torch.testing.assert_close(gradients["head.bias"].norm(dim=1), scores, rtol=1e-4, atol=1e-6)
    full = torch.stack([g.flatten(1).square().sum(1) for g in gradients.values()]).sum(0).sqrt()
    assert (full >= scores).all()
    ratio = full / scores
    assert torch.corrcoef(torch.stack([scores, full]))[0, 1] > 0.9
    assert scores.max() / scores.min() > 2 * ratio.max() / ratio.min()  # a bound c * score with one c is no accident


@pytest.mark.parametrize("name", ["timm_vit", "torch_encoder", "plain_torch"])
def test_a_named_layer_scores_as_the_loss_does(name: str) -> None:
    module, batch = build(name), batch_of(name)
    paths = {"timm_vit": "net.head", "torch_encoder": "net.2", "plain_torch": "net.head"}
    named, found = output_gradients(module, batch, paths[name]), output_gradients(module, batch)
    # in front of a mean over T positions each of them has a T-th of the gradient
    torch.testing.assert_close(named, found / (8**0.5 if name == "torch_encoder" else 1))
    check_outputs(module, batch, paths[name])


@pytest.mark.parametrize("name", ["timm_vit", "hf_gpt2", "bert"])
def test_a_training_step_tells_the_same_scores_on_its_way(name: str) -> None:
    module, batch = build(name, dropout=0.0), batch_of(name)
    with watch_outputs(module, 8) as squares:
        loss = module.per_sample_loss(batch).mean()
    assert squares == []
    loss.backward()
    torch.testing.assert_close(8 * torch.stack(squares).sum(0).sqrt(), output_gradients(module, batch))
    plain = build(name, dropout=0.0)
    plain.per_sample_loss(batch).mean().backward()
    for one, other in zip(module.parameters(), plain.parameters(), strict=True):
        assert (one.grad is None and other.grad is None) or torch.equal(one.grad, other.grad)


class Noticed(PlainTorch):
    """Logs, counts and draws whenever somebody asks for its losses."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.seen = MeanMetric()
        self.logged: list[str] = []

    def log(self, name: str, *args: Any, **kwargs: Any) -> None:
        self.logged.append(name)

    def per_sample_loss(self, batch: Any) -> Tensor:
        losses = super().per_sample_loss(batch)
        self.seen.update(losses)
        self.log("losses", losses.mean())
        return losses + 0 * torch.rand(len(losses))


@pytest.mark.parametrize("score", [sample_losses, output_gradients])
def test_scoring_is_without_dropout_and_leaves_no_trace(score: Any) -> None:
    module, batch = Noticed(dropout=0.5), batch_of("plain_torch")
    module.train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    random = torch.get_rng_state()
    first, second = score(module, batch), score(module, batch)
    assert torch.equal(first, second)
    assert not first.requires_grad
    assert torch.equal(random, torch.get_rng_state())
    assert module.training
    assert module.net.layers[0].training
    assert module.logged == []
    assert module.seen.update_called is False
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in before.items())
    assert all(p.grad is None for p in module.parameters())
    if score is sample_losses:
        with torch.no_grad():
            torch.testing.assert_close(first, PlainTorch.per_sample_loss(module.eval(), batch))


def test_scores_of_another_loss_are_its_own_gradients() -> None:
    """A masked autoencoder's squared errors: 2 (x - y) / n over the n numbers that are restored."""
    module = tiny_mae()
    images = torch.randn(6, 3, 8, 8)
    torch.manual_seed(3)
    scores = output_gradients(module, images)
    torch.manual_seed(3)
    with torch.no_grad():
        losses = module.eval().per_sample_loss(images)
        pixels = 12 * (3 * 2 * 2)
    torch.testing.assert_close(scores, 2 * (losses / pixels).sqrt())


def test_scoring_under_autocast_leaves_the_step_its_gradients() -> None:
    """Weights cast without gradients must not be what the step then finds in autocast's cache."""
    module, batch = build("plain_torch", dropout=0.0), batch_of("plain_torch")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output_gradients(module, batch)
        loss = module.per_sample_loss(batch).mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in module.net.head.parameters())
    assert all(p.grad is not None for p in module.net.parameters())


class TimeFirst(PlainTorch):
    """Gives its loss (positions, samples) flattened."""

    def per_sample_loss(self, batch: Any) -> Tensor:
        logits = torch.stack([self.logits(batch)] * 3)  # (T, B, C)
        labels = batch["label"].expand(3, -1)
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        return losses.view(3, -1).mean(0)


class Mixed(PlainTorch):
    def per_sample_loss(self, batch: Any) -> Tensor:
        losses = super().per_sample_loss(batch)
        return losses / losses.mean()


class ByHand(PlainTorch):
    def per_sample_loss(self, batch: Any) -> Tensor:
        return (self.logits(batch) - F.one_hot(batch["label"], CLASSES)).square().sum(1)


class Reduced(PlainTorch):
    def per_sample_loss(self, batch: Any) -> Tensor:
        return super().per_sample_loss(batch).mean()


def test_what_cannot_be_scored_is_refused() -> None:
    batch = batch_of("plain_torch")
    for kind in (TimeFirst, Mixed):
        with pytest.raises(ValueError, match="depends on the output of another"):
            check_outputs(kind(), batch)
    with pytest.raises(ValueError, match=r"is given to no loss of torch.nn.functional.*output='net.head'"):
        check_outputs(ByHand(), batch)
    by_hand = ByHand()
    check_outputs(by_hand, batch, "net.head")
    with torch.no_grad():
        errors = by_hand.eval().logits(batch) - F.one_hot(batch["label"], CLASSES)
    torch.testing.assert_close(output_gradients(by_hand, batch, "net.head"), 2 * errors.norm(dim=1))
    with pytest.raises(ValueError, match=r"returned \(\) for 8 samples; return one loss each, \(8,\)"):
        sample_losses(Reduced(), batch)
