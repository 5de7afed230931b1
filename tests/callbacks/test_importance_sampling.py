import itertools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn import functional as F

from lit_scale.callbacks import (
    ImportanceSampling,
    ProgressiveStacking,
    ResolutionGrowing,
    SequenceLengthWarmup,
    importance_sampling,
)
from lit_scale.callbacks.importance_sampling import draw, variance_ratio
from lit_scale.cost import CostMeter
from lit_scale.datamodules import TextDataModule
from lit_scale.factors.scores import output_gradients
from lit_scale.factors.token_choice import TokenChoice
from tests.support.data import loader, sized_loader
from tests.support.equality import assert_same
from tests.support.networks import FOREIGN, OPTIMIZERS, PlainTorch, build, image_model, tiny_bert
from tests.support.tokens import KINDS, make
from tests.support.training import Ran, quiet_trainer, run, save_every_step

pytestmark = [pytest.mark.filterwarnings("ignore")]

STEPS = 8
ALWAYS: dict[str, Any] = {"threshold": 0.0, "look_every": 1}  # open as soon as a decision can take effect
NEVER: dict[str, Any] = {"threshold": 1e9}


def choose(module: Any, data: Any, folder: Path, *before: Callback, choosing: Any = None, **options: Any) -> Ran:
    """Train with importance sampling behind these callbacks, and in front of those that are ``after`` it."""
    technique = ImportanceSampling(**(ALWAYS if choosing is None else choosing))
    after = options.pop("after", ())
    return run(module, data, folder, *before, technique, *after, **({"max_steps": STEPS} | options))


def tau(ran: Ran) -> float:
    found: float = ran.left["techniques"]["importance_sampling"]["tau"]
    return found


# ---- the formulas


@pytest.mark.parametrize("scores", [[1.0, 1.0, 1.0, 1.0], [0.5, 2.0, 0.1, 0.4, 7.0], [0.0, 0.0, 3.0]])
def test_tau_is_the_square_root_of_the_variance_that_is_left(scores: list[float]) -> None:
    """Of gradients of these norms, by hand: their second moment drawn uniformly, over that drawn by score."""
    total, n = sum(scores), len(scores)
    uniform = sum(s**2 / n for s in scores)
    by_score = sum((s / total) * (s / (n * s / total)) ** 2 for s in scores if s)
    assert variance_ratio(torch.tensor(scores)) ** 2 == pytest.approx(uniform / by_score)
    g = [s / total for s in scores]  # and as the paper writes it
    reduction = sum((x - 1 / n) ** 2 for x in g) / sum(x**2 for x in g)
    assert variance_ratio(torch.tensor(scores)) == pytest.approx(1 / (1 - reduction) ** 0.5)


def test_draws_follow_the_scores_and_weights_undo_them() -> None:
    scores = torch.tensor([1.0, 0.0, 2.0, 5.0])
    index, weights = draw(scores, 40_000, torch.Generator().manual_seed(0))
    counts = torch.bincount(index, minlength=4) / len(index)
    torch.testing.assert_close(counts, scores / 8, rtol=0, atol=0.01)  # five standard deviations
    torch.testing.assert_close(weights, 8 / (4 * scores[index]))
    assert draw(torch.zeros(4), 1000, torch.Generator())[0].unique().tolist() == [0, 1, 2, 3]
    broken = torch.tensor([1.0, float("nan"), 2.0])
    assert draw(broken, 5, torch.Generator())[0].tolist() == [1] * 5  # the loss that FiniteGuard is to see


def test_the_weighted_gradient_is_the_plain_one_on_average(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The exact expectation over all 6^2 draws, through the very step that training makes."""
    torch.manual_seed(0)
    module: Any = build("plain_torch", dropout=0.0)
    module.log = lambda *_: None
    batch = next(iter(loader("plain_torch", batch_size=6)))
    choosing = ImportanceSampling()
    trainer = quiet_trainer(tmp_path, callbacks=[choosing])
    p = output_gradients(module, batch).double()
    p /= p.sum()
    module.per_sample_loss(batch).mean().backward()
    plain = [parameter.grad.double() for parameter in module.parameters()]
    choosing.setup(trainer, module, "fit")
    choosing._gate = "open"
    expected = [torch.zeros_like(g) for g in plain]
    for drawn in itertools.product(range(6), repeat=2):
        chosen = torch.tensor(drawn)
        monkeypatch.setattr(importance_sampling.torch, "multinomial", lambda *_, now=chosen, **__: now)
        module.zero_grad()
        module.training_step(batch, 0).backward()
        for total, parameter in zip(expected, module.parameters(), strict=True):
            total += p[chosen].prod() * parameter.grad
    choosing.teardown(trainer, module, "fit")
    for one, other in zip(expected, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


# ---- the gate


def test_a_closed_gate_is_the_plain_run(tmp_path: Path) -> None:
    plain = image_model("timm")
    run(plain, sized_loader(), tmp_path, max_steps=STEPS)
    found = choose(image_model("timm"), sized_loader(), tmp_path, choosing=NEVER | {"look_every": 3})
    assert tau(found) > 0
    assert_same(found.left["weights"], dict(plain.state_dict()))
    assert found.watch.brought == found.watch.trained == [4] * STEPS


@pytest.mark.parametrize("workers", [0, 2])
def test_an_open_gate_asks_for_more_once_all_that_was_prepared_is_through(workers: int, tmp_path: Path) -> None:
    found = choose(image_model("by_hand"), sized_loader(num_workers=workers), tmp_path)
    first = 1 + workers * 2  # each worker prepares two batches
    assert found.watch.brought == [4] * first + [12] * (STEPS - first)
    assert found.watch.trained == [4] * STEPS
    loader: Any = found.trainer.train_dataloader
    assert loader.plan is None


def test_no_sample_is_met_twice_before_all_were(tmp_path: Path) -> None:
    """The larger batches go on where the smaller ones stopped: 48 images, of which 4 + 12 + 12 + 12 + 8 of the next."""
    brought: list[Tensor] = []

    class Sees(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, *_: Any) -> None:
            brought.extend(batch["image"].flatten(1).sum(1))

    choose(image_model("by_hand"), sized_loader(), tmp_path, Sees(), max_steps=5)
    first = torch.stack(brought)[:48]
    assert len(first.unique()) == 48
    assert len(torch.stack(brought)) == 52


class Keeps(Callback):
    """Tau by its definition, from ||p - y|| of the batches that are trained while the gate is closed."""

    def __init__(self, watch_every: int) -> None:
        self.every, self.taus = watch_every, [0.0]

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % self.every:
            return
        with torch.no_grad():
            p = pl_module.logits(batch).softmax(1)
        scores = (p - F.one_hot(batch["label"], p.shape[1])).norm(dim=1)
        now = (scores.square().mean().sqrt() / scores.mean()).item()
        decay = 0.9 if batch_idx == 0 else 0.9**self.every
        self.taus.append(decay * self.taus[-1] + (1 - decay) * now)


@pytest.mark.parametrize("every", [1, 3])
def test_tau_is_the_moving_average_of_what_the_steps_themselves_show(every: int, tmp_path: Path) -> None:
    keeps = Keeps(every)
    choosing = NEVER | {"look_every": every}
    found = choose(image_model("by_hand", dropout=0.0), sized_loader(), tmp_path, keeps, choosing=choosing)
    assert tau(found) == pytest.approx(keeps.taus[-1], rel=1e-5)
    assert keeps.taus[-1] < 1.5  # with the paper's start at 0, nothing opens at once


def test_the_gate_opens_and_closes_where_tau_crosses_the_threshold(tmp_path: Path) -> None:
    alike = [1024, 2, *[1024] * 6]  # of 1024 samples so many score 1 and the others 0: tau is the root of 1024 / n
    found: list[tuple[float, bool]] = []

    class Told(ImportanceSampling):
        def on_before_optimizer_step(self, *args: Any) -> None:
            scores = torch.zeros(1024)
            scores[: alike[len(found)]] = 1.0
            self._looks = [[scores]]
            super().on_before_optimizer_step(*args)
            found.append((self.tau, self._is_open(10**9)))

    watch = run(image_model("by_hand"), sized_loader(), tmp_path, Told(look_every=1), max_steps=STEPS).watch
    average, expected = 0.0, []
    for count in alike:
        average = 0.9 * average + 0.1 * (1024 / count) ** 0.5
        expected.append((pytest.approx(average), average > 2.0))
    assert found == expected
    assert watch.brought == [4, 4, 12, 12, 12, 4, 4, 4]  # 2.35, 2.22 and 2.10 after steps 1, 2 and 3


def test_of_a_loader_that_cannot_be_asked_the_batch_is_the_presample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr("lit_scale.callbacks.importance_sampling.rank_zero_info", told.append)
    found = choose(build("plain_torch"), loader("plain_torch", batch_size=8), tmp_path)
    watch = found.watch
    assert watch.brought == [8] * STEPS
    assert watch.trained == [2] * STEPS  # 8 // 3
    first = next(iter(loader("plain_torch", batch_size=8)))
    assert torch.equal(watch.trained_batches[0]["image"], first["image"][:2])  # closed: the first ones
    assert "each of its batches is the presample, and a step trains 1 / 3 of it" in told[0]


# ---- any network, resumed anywhere


@pytest.mark.parametrize("name", [*FOREIGN, "bert"])
def test_any_network_resumes_to_the_same_bits_with_the_gate_open(name: str, tmp_path: Path) -> None:
    saver = save_every_step(tmp_path / "saved")
    whole = choose(build(name), loader(name, batch_size=6), tmp_path, after=[saver])
    assert len(set(whole.watch.losses)) == STEPS
    for stop in (1, 5):
        path = tmp_path / "saved" / f"step={stop}.ckpt"
        rest = choose(build(name, seed=1), loader(name, batch_size=6), tmp_path, resume=path)
        assert rest.watch.losses == whole.watch.losses[stop:]
        assert_same(whole.left, rest.left, f"resumed at step {stop}")


@pytest.mark.parametrize(
    ("choosing", "options"),
    [
        (ALWAYS, {}),
        (NEVER | {"look_every": 2}, {}),
        (ALWAYS | {"look_every": 2}, {"num_workers": 2}),
        (ALWAYS, {"accumulate_grad_batches": 2}),
    ],
    ids=["open", "closed", "workers", "accumulated"],
)
def test_planned_batches_are_the_same_in_a_resumed_run(
    choosing: dict[str, Any], options: dict[str, Any], tmp_path: Path
) -> None:
    workers = {"num_workers": options.pop("num_workers")} if "num_workers" in options else {}
    window = options.get("accumulate_grad_batches", 1)
    saver = save_every_step(tmp_path / "saved")
    whole = choose(image_model("timm"), sized_loader(**workers), tmp_path, choosing=choosing, after=[saver], **options)
    for stop in (1, 4, 7):
        path = tmp_path / "saved" / f"step={stop}.ckpt"
        rest = choose(
            image_model("timm", seed=1), sized_loader(**workers), tmp_path, resume=path, choosing=choosing, **options
        )
        assert rest.watch.brought == whole.watch.brought[stop * window :]
        assert rest.watch.losses == whole.watch.losses[stop * window :]
        assert_same(whole.left, rest.left, f"resumed at step {stop}")


def test_fewer_workers_at_resume_change_nothing(tmp_path: Path) -> None:
    saver = save_every_step(tmp_path / "saved")
    whole = choose(image_model("by_hand"), sized_loader(num_workers=2), tmp_path, after=[saver])
    rest = choose(image_model("by_hand", seed=1), sized_loader(), tmp_path, resume=tmp_path / "saved" / "step=2.ckpt")
    assert rest.watch.brought == whole.watch.brought[2:] == [4, 4, 4, 12, 12, 12]
    assert_same(whole.left, rest.left)


def test_other_random_choices_are_another_run(tmp_path: Path) -> None:
    """What makes the tests above fail if draws did not follow the batch counter."""
    one, other = (
        choose(image_model("timm"), sized_loader(), tmp_path, choosing=ALWAYS | {"seed": seed}) for seed in (0, 1)
    )
    assert one.watch.losses[1:] != other.watch.losses[1:]


# ---- along with others


@pytest.mark.parametrize("order", [1, -1])
def test_sizes_and_samples_of_a_batch_are_both_planned(order: int, tmp_path: Path) -> None:
    growing = ResolutionGrowing([(0.0, 0.5), (0.5, 1.0)], grow_batch=True)
    before, after = ([growing], []) if order == 1 else ([], [growing])
    found = choose(image_model("timm"), sized_loader(), tmp_path, *before, after=after)
    assert found.watch.brought == [16, 48, 48, 48, 12, 12, 12, 12]
    assert found.watch.trained == [16, 16, 16, 16, 4, 4, 4, 4]


def text(corpus: Path, folder: Path, **options: Any) -> TextDataModule:
    defaults: dict[str, Any] = {"sequence_length": 16, "batch_size": 4, "mask_rate": 0.25}
    defaults["cache_dir"] = str(folder / "cache")
    return TextDataModule(str(corpus), **(defaults | options))


def test_text_is_planned_across_the_ends_of_epochs_and_along_with_lengths(tiny_corpus: Path, tmp_path: Path) -> None:
    def bert(seed: int = 0) -> Any:
        torch.manual_seed(seed)
        from lit_scale.models import BertMLM

        return BertMLM(258, 16, depth=2, width=16, num_heads=2, dropout=0.1)

    data = text(tiny_corpus, tmp_path, val_fraction=0.95)
    data.prepare_data()
    data.setup()
    per_epoch = len(data.train_dataloader())
    steps = per_epoch // 3 + 3  # across the end of the first epoch
    warmup = lambda: SequenceLengthWarmup([(0.0, 0.5), (0.5, 1.0)])  # noqa: E731
    saver = save_every_step(tmp_path / "saved")
    options = {"max_steps": steps, "limit_val_batches": 0}
    whole = choose(bert(), data, tmp_path, warmup(), after=[saver], **options)
    assert set(whole.watch.brought) == {8, 24, 12}
    path = tmp_path / "saved" / f"step={steps - 2}.ckpt"
    again = text(tiny_corpus, tmp_path, val_fraction=0.95)
    rest = choose(bert(1), again, tmp_path, warmup(), resume=path, **options)
    assert_same(whole.left, rest.left)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_dropped_from_the_samples_that_are_trained(
    kind: type[TokenChoice], order: int, tmp_path: Path
) -> None:
    def both(*saving: Callback, resume: Path | None = None) -> Ran:
        tokens = [make(kind)]
        before, after = (tokens, saving) if order == 1 else ([], [*tokens, *saving])
        module, data = tiny_bert(seed=1 if resume else 0), loader("bert", size=48, batch_size=6)
        return choose(module, data, tmp_path, *before, after=after, resume=resume)

    whole = both(save_every_step(tmp_path / "saved"))
    assert whole.watch.trained == [2] * STEPS
    assert_same(whole.left, both(resume=tmp_path / "saved" / "step=3.ckpt").left)


# ---- the clock


def test_each_kind_of_step_has_its_price(tmp_path: Path) -> None:
    meter = CostMeter(repeats=1)
    choose(image_model("by_hand"), sized_loader(), tmp_path, choosing=ALWAYS | {"look_every": 2}, after=[meter])
    shapes = [shape for shape in meter.ledger.record()["step_kinds"] if shape["phase"] == "train"]
    assert [(s["importance_sampling/gate"], s["count"], s["samples"], s["plain"]) for s in shapes] == [
        ("looks", 1, 4, False),
        ("open", STEPS - 1, 12, False),
    ]
    looks, chooses = (shape["flops_each"] for shape in shapes)
    closed = CostMeter(repeats=1)
    choose(image_model("by_hand"), sized_loader(), tmp_path, choosing=NEVER | {"look_every": 4}, after=[closed])
    (looked, plain) = [s for s in closed.ledger.record()["step_kinds"] if s["phase"] == "train"]
    assert (looked["count"], plain["count"], plain["plain"]) == (2, 6, True)
    assert looked["flops_each"] == plain["flops_each"] == looks  # scores come free
    assert 1.8 < chooses / plain["flops_each"] < 2.1  # three forward passes of a third each, and the step
    assert all(shape["price"] == "replay" for shape in shapes)


# ---- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"presample": 1}, "presample=1: more samples must be scored than are trained"),
        ({"presample": 2.5}, "presample=2.5: more samples must be scored than are trained, a whole number of times"),
        ({"threshold": -1.0}, "threshold=-1.0 must not be negative"),
        ({"look_every": 0}, "look_every=0 must be at least 1"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImportanceSampling(**arguments)


def no_batch(root: Path) -> Callable[..., Any]:
    def attempt(module: Any, data: Any, **choosing: Any) -> None:
        trainer = quiet_trainer(root, callbacks=[ImportanceSampling(**choosing)], max_steps=1)
        try:
            trainer.fit(module, data)
        finally:
            assert trainer.global_step == 0
            assert not {"training_step", "per_sample_loss"} & module.__dict__.keys()

    return attempt


def test_what_cannot_work_is_refused_before_a_step(tmp_path: Path) -> None:
    attempt = no_batch(tmp_path)
    with pytest.raises(ValueError, match="presample=3 is not smaller than the batch of 2 samples"):
        attempt(build("plain_torch"), loader("plain_torch", batch_size=2))
    with pytest.raises(ValueError, match="output='net.tail': PlainTorch has no such part"):
        attempt(build("plain_torch"), loader("plain_torch"), output="net.tail")


@pytest.mark.parametrize(("count", "warned"), [(4, True), (5, False)])
def test_a_batch_too_small_for_the_gate_ever_to_open_is_told(count: int, warned: bool, tmp_path: Path) -> None:
    """Of n samples of which one has all of the gradient tau is the root of n: the most there is."""
    assert (variance_ratio(torch.eye(count)[0]) <= 2.0) == warned
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        choose(image_model("timm"), sized_loader(batch_size=count), tmp_path, choosing={}, max_steps=1)
    assert any("train more than 4 samples a step" in str(one.message) for one in told) == warned


@pytest.mark.parametrize("choosing", [ALWAYS, NEVER], ids=["opens", "never opens"])
def test_a_step_that_goes_around_its_losses_is_refused(choosing: dict[str, Any], tmp_path: Path) -> None:
    """With the first batch, whose gate is closed."""

    class Around(PlainTorch):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.logits(batch), batch["label"])

    with pytest.raises(ValueError, match=r"training_step did not call self.per_sample_loss\(batch\)"):
        no_batch(tmp_path)(Around(optimizer=OPTIMIZERS["SGD"]), sized_like_plain(), **choosing)


def sized_like_plain() -> Any:
    return loader("plain_torch", batch_size=6)


def test_it_goes_along_with_growing_depth(tmp_path: Path) -> None:
    stacking = ProgressiveStacking([(0.0, 0.5), (0.5, 1.0)])
    found = choose(image_model("timm"), sized_loader(), tmp_path, stacking)
    assert found.watch.trained == [4] * STEPS


@pytest.mark.slow
@pytest.mark.parametrize("choosing", [ALWAYS, NEVER | {"look_every": 2}], ids=["open", "closed"])
def test_a_compiled_network_trains_as_the_plain_one(choosing: dict[str, Any], tmp_path: Path) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = image_model("by_hand", dropout=0.0, optimizer=OPTIMIZERS["SGD"])
    compiled.net = torch.compile(compiled.net, backend="aot_eager", dynamic=False)
    plain = image_model("by_hand", dropout=0.0, optimizer=OPTIMIZERS["SGD"])
    one, other = (choose(module, sized_loader(), tmp_path, choosing=choosing) for module in (compiled, plain))
    assert one.watch.brought == other.watch.brought
    torch.testing.assert_close(one.watch.losses, other.watch.losses, rtol=1e-4, atol=1e-5)
    assert tau(one) == pytest.approx(tau(other), rel=1e-4)
    assert torch._dynamo.utils.counters["graph_break"] == {}
    # trained, looked at or scored, and evaluated: one graph each, and none for every step
    assert torch._dynamo.utils.counters["frames"]["total"] <= 4
