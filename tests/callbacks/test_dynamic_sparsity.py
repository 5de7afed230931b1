import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_scale.callbacks import DynamicSparsity, GradientNoiseScale, ImportanceSampling, ProgressiveStacking
from lit_scale.callbacks.dynamic_sparsity import drop_and_grow, drop_share, swap_in_fours
from lit_scale.cost import CostMeter
from lit_scale.factors.units import UnitGroup
from lit_scale.guards import StepSeed
from lit_scale.models import BertMLM
from lit_scale.technique import averages
from tests.support.data import LENGTH, loader
from tests.support.equality import assert_same, same
from tests.support.networks import DEPTH, OPTIMIZERS, WIDTH, build, slots, tiny_bert
from tests.support.training import fit, left, quiet_trainer, save_every_step

pytestmark = [pytest.mark.filterwarnings("ignore")]

STEPS = 8  # with every=2 and until=0.75, updates follow the steps 2 and 4
KINDS: dict[str, dict[str, Any]] = {
    "unit": {"density": 0.5},
    "unit, SET": {"density": 0.5, "grow": "random"},
    "weight": {"density": 0.3, "granularity": "weight"},
    "weight, SET": {"density": 0.3, "granularity": "weight", "grow": "random", "distribution": "uniform"},
    "block": {"density": 0.5, "granularity": "block", "tile": 4},
    "2:4": {"granularity": "2:4"},
}


def sparse(kind: str = "unit", **options: Any) -> DynamicSparsity:
    return DynamicSparsity(**({"every": 2} | KINDS[kind] | options))


class Watcher(Callback):
    """After every step: that what is masked is 0 wherever it is kept, and which cells and units are active."""

    def __init__(self, sparsity: DynamicSparsity) -> None:
        self.sparsity = sparsity
        self.active: list[dict[str, Tensor]] = []
        self.checked = 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == len(self.active):
            return  # gradients are being accumulated
        self.active.append({part.name: part.active.clone() for part in self.sparsity.parts})
        names = {parameter: name for name, parameter in pl_module.named_parameters()}
        others = [dict(average.named_parameters()) for average in averages(trainer)]
        for part in self.sparsity.parts:
            for parameter, mask in part.masks():
                off = ~mask.expand_as(parameter)
                for kept in (parameter, *(other[names[parameter]] for other in others)):
                    assert not kept[off].any()
                for name, slot in slots(trainer.optimizers[0], parameter).items():
                    assert (slot[off].abs() <= 1e-30).all(), name  # what Adafactor adds to each squared gradient
                self.checked += int(off.any())


class Grown(Callback):
    """Right behind each optimizer step: that what the update made active starts as it should."""

    def __init__(self, sparsity: DynamicSparsity) -> None:
        self.sparsity, self.grown = sparsity, 0
        self.before: dict[str, list[tuple[Any, Tensor]]] = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        now = {part.name: [(p, mask.expand_as(p).clone()) for p, mask in part.masks()] for part in self.sparsity.parts}
        for part in self.sparsity.parts if self.before else ():
            for (parameter, mask), (_, old) in zip(now[part.name], self.before[part.name], strict=True):
                new = mask & ~old
                self.grown += int(new.sum())
                for slot in slots(trainer.optimizers[0], parameter).values():
                    assert not slot[new].any()
                into = isinstance(part, UnitGroup) and any(parameter is linear.weight for linear in part.ins)
                assert parameter[new].all() if into else not parameter[new].any()
        self.before = now


def train(
    name: str,
    root: Path,
    sparsity: DynamicSparsity,
    *also: Callback,
    before: Iterable[Callback] = (),
    resume: Path | None = None,
    model: dict[str, Any] | None = None,
    val: bool = False,
    **options: Any,
) -> tuple[Any, Trainer]:
    module = build(name, seed=99 if resume else 0, **(model or {}))
    held_out = loader(name, size=4, shuffle=False) if val else None
    options = ({} if "max_epochs" in options else {"max_steps": STEPS}) | options
    data = loader(name, size=20)
    return module, fit(module, data, root, *before, sparsity, *also, val=held_out, resume=resume, **options)


# ---- the rule


def test_the_share_is_half_a_cosine() -> None:
    for t in range(75):  # Evci et al. 2020: f(t) = a/2 (1 + cos(t pi / T_end))
        assert drop_share(t / 100, 0.3, 0.75) == pytest.approx(0.15 * (1 + math.cos(t * math.pi / 75)))
    assert [drop_share(t, 0.3, 0.75) for t in (0.75, 0.9, 1.0)] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("count", [0, 1, 13, 40])
def test_the_smallest_are_dropped_and_as_many_grown_where_the_score_is_largest(count: int) -> None:
    torch.manual_seed(count)
    active = torch.zeros(200, dtype=torch.bool).index_fill(0, torch.randperm(200)[:40], True)
    magnitude, growth = torch.rand(200) * active, torch.rand(200)
    new = drop_and_grow(active, magnitude, growth, count)
    kept = sorted(active.nonzero().flatten().tolist(), key=lambda i: magnitude[i].item())[count:]
    rest = sorted(set(range(200)) - set(kept), key=lambda i: -growth[i].item())
    assert sorted(new.nonzero().flatten().tolist()) == sorted(kept + rest[:count])
    assert new.sum() == 40


def test_in_fours_two_stay_active_and_the_weakest_fours_change() -> None:
    torch.manual_seed(0)
    fours = torch.rand(50, 4).argsort(1) < 2
    magnitude, growth = torch.rand(200) * fours.flatten(), torch.rand(200)
    new = swap_in_fours(fours.flatten(), magnitude, growth, 7).view(50, 4)
    assert (new.sum(1) == 2).all()
    weakest = [min(m for m, a in zip(magnitude[4 * i : 4 * i + 4], fours[i], strict=True) if a) for i in range(50)]
    expected = sorted(sorted(range(50), key=lambda i: weakest[i])[:7])
    assert (new != fours).any(1).nonzero().flatten().tolist() == expected
    for i in expected:
        gone, came = (int(places.nonzero()) for places in (fours[i] & ~new[i], new[i] & ~fours[i]))
        assert magnitude[4 * i + gone] == weakest[i]
        assert growth[4 * i + came] == max(growth[4 * i + j] for j in range(4) if not fours[i, j])


class Witness(Callback):
    """Stands before the technique and notes dense gradients, and weights as the optimizer left them."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, Tensor]] = []
        self.weights: list[dict[str, Tensor]] = []
        self.alone: list[float] = []  # loss of the network before the technique prepares the step
        self.losses: list[float] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        def note(*_: Any) -> None:
            self.weights.append({name: p.detach().clone() for name, p in pl_module.named_parameters()})

        trainer.optimizers[0].register_step_post_hook(note)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, *_: Any) -> None:
        with torch.no_grad():
            self.alone.append(pl_module.per_sample_loss(batch).mean().item())

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Optimizer) -> None:
        self.gradients.append({name: p.grad.clone() for name, p in pl_module.named_parameters()})

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        self.losses.append(outputs["loss"].item())


def test_an_update_is_that_of_the_paper(tmp_path: Path) -> None:
    witness, sparsity = Witness(), sparse("weight")
    watcher = Watcher(sparsity)
    train("bert", tmp_path, sparsity, watcher, before=[witness])
    regrown = 0
    for step in range(1, STEPS):
        for name, old in watcher.active[step - 1].items():
            new = watcher.active[step][name]
            if step not in (2, 4):
                assert torch.equal(new, old)
                continue
            count = int(0.15 * (1 + math.cos(math.pi * step / 6)) * int(old.sum()))
            assert count > 0
            magnitude, gradient = (x[step][name].flatten().abs() for x in (witness.weights, witness.gradients))
            ones = old.nonzero().flatten()
            kept = ones[magnitude[ones].argsort()[count:]]
            others = torch.tensor(sorted(set(range(len(old))) - set(kept.tolist())))
            grown = others[gradient[others].argsort(descending=True)[:count]]
            expected = torch.zeros_like(old).index_fill(0, torch.cat([kept, grown]), True)
            assert torch.equal(new, expected)
            regrown += count - int((new & ~old).sum())
    assert regrown > 0  # some that were dropped were also where the gradient was largest


def test_an_update_of_units_goes_by_the_norms_in_and_out(tmp_path: Path) -> None:
    """Recomputed from the parameters' own layout, for feed-forward neurons and for heads."""
    witness, sparsity = Witness(), sparse("unit", drop=0.9)
    watcher = Watcher(sparsity)
    heads, width = 4, WIDTH // 4
    train("bert", tmp_path, sparsity, watcher, before=[witness], model={"dropout": 0.0, "num_heads": heads})

    def squares(values: dict[str, Tensor], path: str) -> tuple[Tensor, Tensor]:
        if path.endswith("attention"):
            into = values[f"{path}.qkv.weight"].view(3, heads, width, WIDTH).square().sum((0, 2, 3))
            out_of = values[f"{path}.out.weight"].view(WIDTH, heads, width).square().sum((0, 2))
        else:
            path = path.removesuffix(".down")
            into = values[f"{path}.up.weight"].square().sum(1)
            out_of = values[f"{path}.down.weight"].square().sum(0)
        return into, out_of

    changed = 0
    for step in range(1, STEPS):
        for name, old in watcher.active[step - 1].items():
            new = watcher.active[step][name]
            if step not in (2, 4):
                assert torch.equal(new, old)
                continue
            count = min(int(0.45 * (1 + math.cos(math.pi * step / 6)) * int(old.sum())), int((~old).sum()))
            into, out_of = squares(witness.weights[step], name)
            magnitude = into * out_of
            into, out_of = squares(witness.gradients[step], name)
            gradient = into + out_of
            ones, zeros = old.nonzero().flatten(), (~old).nonzero().flatten()
            kept = ones[magnitude[ones].argsort()[count:]]
            grown = zeros[gradient[zeros].argsort(descending=True)[:count]]
            assert gradient[zeros].all()
            assert torch.equal(new, torch.zeros_like(old).index_fill(0, torch.cat([kept, grown]), True))
            changed += count
    assert changed > 2 * DEPTH
    # with all units present and those that may grow leading nowhere yet, the network is still the same
    assert witness.losses == pytest.approx(witness.alone, rel=1e-5)


@pytest.mark.parametrize(
    ("every", "limits", "expected"),
    [
        (3, {"max_steps": 12}, [3, 6]),
        (0.25, {"max_steps": 12}, [3, 6]),
        (0.25, {"max_epochs": 2}, [2, 4, 6]),  # ten steps, of which a quarter is rounded to 2
        (0.25, {"max_epochs": 4, "accumulate_grad_batches": 2}, [3, 6]),  # twelve steps
        (None, {"max_steps": 12}, [1, 2, 3, 4, 5, 6, 7, 8]),  # 4% of it is less than one
    ],
)
def test_updates_come_at_even_distances_until_three_quarters(
    every: Any, limits: dict[str, Any], expected: list[int], tmp_path: Path
) -> None:
    sparsity = sparse("weight, SET", every=every)
    steps: list[int] = []
    watched: Any = sparsity
    update = watched._update

    def noted(trainer: Trainer, *rest: Any) -> None:
        steps.append(trainer.global_step)
        update(trainer, *rest)

    watched._update = noted
    train("plain_torch", tmp_path, sparsity, **limits)
    assert sorted(set(steps)) == expected


def test_a_long_run_updates_every_hundred_steps(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, max_steps=1_000_000)
    assert DynamicSparsity()._steps_between(trainer) == 100
    assert DynamicSparsity(every=0.01)._steps_between(trainer) == 10_000
    with pytest.raises(ValueError, match=r"every=0\.01: the run's number of steps is unknown"):
        DynamicSparsity(every=0.01)._steps_between(quiet_trainer(tmp_path, max_time="00:01:00:00", max_epochs=-1))


# ---- what is masked is 0


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", ["unit", "weight"])
def test_masks_are_exact_under_every_optimizer(kind: str, optimizer: str, tmp_path: Path) -> None:
    sparsity = sparse(kind)
    watcher, grown = Watcher(sparsity), Grown(sparsity)
    module, _ = train("plain_torch", tmp_path, sparsity, watcher, grown, model={"optimizer": OPTIMIZERS[optimizer]})
    assert watcher.checked >= STEPS * 2 * DEPTH
    assert grown.grown > 0
    assert all(parameter.isfinite().all() for parameter in module.parameters())
    counts = [{name: int(active.sum()) for name, active in step.items()} for step in watcher.active]
    assert counts == [counts[0]] * STEPS


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("bert", kind) for kind in KINDS),
        *((name, "unit") for name in ("timm_vit", "hf_bert", "torch_encoder")),
        ("timm_vit", "2:4"),
        ("hf_bert", "block"),
        ("torch_encoder", "weight"),
        ("hf_gpt2", "weight, SET"),
    ],
)
def test_masks_are_exact_in_any_network(name: str, kind: str, tmp_path: Path) -> None:
    sparsity = sparse(kind)
    watcher, grown = Watcher(sparsity), Grown(sparsity)
    train(name, tmp_path, sparsity, watcher, grown)
    assert watcher.checked >= STEPS * DEPTH
    assert grown.grown > 0
    if kind == "2:4":
        for part in sparsity.parts:
            assert (part.active.view(-1, 4).sum(1) == 2).all()


@pytest.mark.parametrize("kind", ["unit", "weight"])
@pytest.mark.parametrize("place", ["before", "behind"])
def test_averages_are_masked_too(place: str, kind: str, tmp_path: Path) -> None:
    sparsity, average = sparse(kind), EMAWeightAveraging(decay=0.9)
    watcher = Watcher(sparsity)
    also = {"before": [], "behind": [average]}[place]
    first = {"before": [average], "behind": []}[place]
    module, trainer = train(
        "bert", tmp_path, sparsity, *also, watcher, before=first, val=True, accumulate_grad_batches=2
    )
    assert watcher.checked
    check_zeros(module, sparsity)  # after training the module holds the average


def test_weights_that_lightning_averages_are_masked_too(tmp_path: Path) -> None:
    sparsity = sparse("weight")
    swa = StochasticWeightAveraging(swa_lrs=1e-3, swa_epoch_start=2)
    watcher = Watcher(sparsity)
    module, _ = train("bert", tmp_path, sparsity, swa, watcher, max_epochs=4, model={"optimizer": "sgd"})
    assert watcher.checked
    check_zeros(module, sparsity)


def check_zeros(module: LightningModule, sparsity: DynamicSparsity) -> None:
    for part in sparsity.parts:
        for parameter, mask in part.masks():
            assert torch.equal(parameter, parameter * mask)
    assert any((p == 0).float().mean() > 0.3 for p in module.parameters())


class Norms(Callback):
    """The norm of the gradient without what is masked, and as the optimizer got it."""

    def __init__(self, sparsity: DynamicSparsity) -> None:
        self.sparsity = sparsity
        self.sparse: list[float] = []
        self.clipped: list[float] = []

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        def note(*_: Any) -> None:
            self.clipped.append(torch.stack([p.grad.norm() for p in pl_module.parameters()]).norm().item())

        trainer.optimizers[0].register_step_post_hook(note)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Optimizer) -> None:
        masks = {p: mask for part in self.sparsity.parts for p, mask in part.masks()}
        norms = [(p.grad * masks[p] if p in masks else p.grad).norm() for p in pl_module.parameters()]
        self.sparse.append(torch.stack(norms).norm().item())


@pytest.mark.parametrize("kind", ["unit", "weight"])
def test_gradients_are_clipped_by_the_norm_of_the_sparse_network(kind: str, tmp_path: Path) -> None:
    sparsity = sparse(kind)
    norms = Norms(sparsity)
    train("bert", tmp_path, sparsity, before=[norms], gradient_clip_val=0.3)
    assert max(norms.sparse) > 0.3
    assert norms.clipped == pytest.approx([min(0.3, norm) for norm in norms.sparse], rel=1e-4)


# ---- exact resume


@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [
        pytest.param("bert", "unit", {"gradient_clip_val": 0.05}, id="units, clipped"),
        pytest.param("bert", "unit, SET", {"accumulate_grad_batches": 2}, id="units at random, accumulated"),
        pytest.param("timm_vit", "unit", {}, id="timm"),
        pytest.param("hf_bert", "unit", {"ema": True}, id="Hugging Face, averaged"),
        pytest.param("bert", "weight", {"ema": True, "accumulate_grad_batches": 2}, id="weights, averaged"),
        pytest.param("plain_torch", "weight", {"model": {"optimizer": OPTIMIZERS["8-bit AdamW"]}}, id="8-bit"),
        pytest.param("torch_encoder", "2:4", {}, id="2:4"),
        pytest.param("hf_gpt2", "block", {}, id="blocks"),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(name: str, kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    averaged = options.pop("ema", False)

    def run(*saving: Callback, resume: Path | None = None) -> dict[str, Any]:
        also: list[Callback] = [EMAWeightAveraging(decay=0.5)] * averaged
        _, trainer = train(name, tmp_path, sparse(kind), *also, *saving, resume=resume, **options)
        return left(trainer)

    whole = run(save_every_step(tmp_path))
    for stop in (1, 2, 3, 4, 5, 7):  # before, at and after an update
        assert_same(whole, run(resume=tmp_path / f"step={stop}.ckpt"), f"resumed at step {stop}")


def test_a_checkpoint_is_that_of_a_plain_network(tmp_path: Path) -> None:
    sparsity = sparse("unit")
    module, trainer = train("bert", tmp_path, sparsity, val=True, val_check_interval=1)
    loss = trainer.callback_metrics["val/loss"].item()
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = BertMLM.load_from_checkpoint(tmp_path / "last.ckpt")
    (found,) = quiet_trainer(tmp_path).validate(loaded, loader("bert", size=4, shuffle=False), verbose=False)
    assert found["val/loss"] == pytest.approx(loss, rel=1e-5)
    (again,) = trainer.validate(module, loader("bert", size=4, shuffle=False), verbose=False)
    assert again["val/loss"] == pytest.approx(loss, rel=1e-5)
    bits = sum(mask.numel() for mask in sparsity.state_dict()["masks"].values())
    assert bits == DEPTH * (8 + 1)  # 64 neurons, and 2 heads in a byte
    with pytest.raises(ValueError, match="trained with DynamicSparsity, which is missing"):
        quiet_trainer(tmp_path, max_steps=9).fit(tiny_bert(), loader("bert"), ckpt_path=tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"DynamicSparsity\(density=0.75\) differs from the checkpoint's density=0.5"):
        train("bert", tmp_path, sparse("unit", density=0.75), resume=tmp_path / "last.ckpt", max_steps=9)


def test_a_second_fit_goes_on_with_the_same_masks(tmp_path: Path) -> None:
    sparsity = sparse("weight", drop=0.0)
    module, trainer = train("bert", tmp_path, sparsity)
    before = sparsity.state_dict()["masks"]
    trainer.fit_loop.epoch_loop.max_steps = STEPS + 2
    trainer.fit(module, loader("bert", size=20))
    assert trainer.global_step == STEPS + 2
    assert same(before, sparsity.state_dict()["masks"])


@pytest.mark.parametrize("kind", ["unit", "weight"])
def test_at_density_one_it_is_the_plain_run(kind: str, tmp_path: Path) -> None:
    sparsity = sparse(kind, density=1.0)
    module, _ = train("bert", tmp_path, sparsity)
    plain = build("bert", seed=0)
    fit(plain, loader("bert", size=20), tmp_path, max_steps=STEPS)
    assert same(module.state_dict(), plain.state_dict())
    assert sparsity.is_plain()


# ---- with progressive stacking


@pytest.mark.parametrize("kind", ["unit", "weight"])
def test_copied_blocks_have_the_masks_of_their_originals(kind: str, tmp_path: Path) -> None:
    results = []
    for order in (1, -1):
        # the network grows at step 4, which an update follows
        sparsity, stacking = sparse(kind), ProgressiveStacking([(0.0, 0.5), (0.5, 1.0)])
        watcher = Watcher(sparsity)
        first, *rest = [sparsity, stacking][::order]
        module, _ = train("bert", tmp_path, *rest, watcher, before=[first])  # type: ignore[arg-type]
        results.append(module.state_dict())
    assert same(*results)

    sparsity, stacking = sparse(kind, every=100), ProgressiveStacking([(0.0, 0.5), (0.5, 1.0)])
    watcher = Watcher(sparsity)
    train("bert", tmp_path, sparsity, stacking, watcher)
    for step, masks in enumerate(watcher.active):
        for name, active in masks.items():
            if (source := name.replace("blocks.2", "blocks.0").replace("blocks.3", "blocks.1")) != name:
                assert torch.equal(active, masks[source]) is (step >= 4) or active.numel() == 2


# ---- compiled


@pytest.mark.parametrize("whole", [True, False], ids=["encoder", "blocks"])
def test_a_compiled_network_trains_as_the_plain_one(whole: bool, tmp_path: Path) -> None:
    torch._dynamo.reset()
    results, flops = [], []
    for compiled in (False, True):
        module, meter = tiny_bert(dropout=0.0), CostMeter(repeats=0)
        for part in ([module.encoder] if whole else module.encoder.blocks) if compiled else ():
            part.compile(backend="eager")
        before = torch._dynamo.utils.counters["frames"]["ok"]
        quiet_trainer(tmp_path, max_steps=STEPS, callbacks=[sparse("unit"), meter]).fit(module, loader("bert"))
        results.append(module.state_dict())
        flops.append(meter.totals()["flops"])
    assert same(*results)
    assert flops[0] == flops[1]
    # once with some of the units and once with all, whichever they are
    assert torch._dynamo.utils.counters["frames"]["ok"] - before == 2 * (1 if whole else DEPTH)


# ---- the clock


def test_flops_fall_as_the_arithmetic_says(tmp_path: Path) -> None:
    sparsity, meter = sparse("unit", density=0.25), CostMeter(repeats=0)
    train("bert", tmp_path, sparsity, meter, model={"dropout": 0.0, "num_heads": 4})
    each = {dict(key)["dynamic_sparsity/growing"]: flops for key, flops in meter.ledger.flops.items()}
    # Of three quarters of the units: qkv, projection and two maps of 4 C, once forward and twice backward; attention
    # 4 T^2 C, once forward and 2.5 times backward.
    linear = 3 * 2 * 4 * LENGTH * (3 + 1 + 4 + 4) * WIDTH**2
    attention = 3.5 * 4 * 4 * LENGTH**2 * WIDTH
    assert each[True] - each[False] == DEPTH * 0.75 * (linear + attention)
    assert sorted(meter.ledger.counts.values()) == [2, STEPS - 2]
    assert "sparse_flops" not in meter.ledger.record()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("bert", "weight"),
        ("bert", "weight, SET"),
        ("timm_vit", "2:4"),
        ("torch_encoder", "weight"),
        ("hf_gpt2", "block"),
    ],
)
def test_flops_of_single_weights_are_reported_apart(name: str, kind: str, tmp_path: Path) -> None:
    sparsity, meter = sparse(kind), CostMeter(repeats=0)
    module, _ = train(name, tmp_path, sparsity, meter)
    record = meter.ledger.record()
    plain = CostMeter(repeats=0)
    callbacks = [StepSeed(), plain]
    quiet_trainer(tmp_path, max_steps=STEPS, callbacks=callbacks).fit(build(name), loader(name, size=20))
    assert record["flops"] == plain.totals()["flops"]  # nothing is really saved
    tokens, left_out = 4 * {"timm_vit": 5}.get(name, LENGTH), 0  # four patches and a class token
    for step in range(STEPS):
        products = 2 if step in (2, 4) and "SET" not in kind else 3  # a dense gradient of the weights, where some grow
        for part in sparsity.parts:
            left_out += products * 2 * tokens * int((~part.masks()[0][1]).sum())
    assert record["flops"] - record["sparse_flops"] == left_out


@pytest.mark.parametrize("kind", ["weight", "block"])
def test_the_noise_scale_is_that_of_the_sparse_network_in_any_order(kind: str, tmp_path: Path) -> None:
    class Norms(Callback):
        """Before anybody else, the squared norm of the step's gradient, of what is active alone too."""

        def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Optimizer) -> None:
            masks = dict(pair for part in sparsity.parts for pair in part.masks())
            gradients = [(p.grad, masks.get(p, torch.tensor(True))) for p in pl_module.parameters()]
            whole.append(sum(float(g.square().sum()) for g, _ in gradients))
            active.append(sum(float((g * mask).square().sum()) for g, mask in gradients))

    found = []
    for noise_first in (True, False):
        whole: list[float] = []
        active: list[float] = []
        sparsity, noise = sparse(kind, density=0.2, drop=0.0), GradientNoiseScale(smoothing=0.0)
        order = {"before": [Norms(), noise]} if noise_first else {"before": [Norms()]}
        also = [] if noise_first else [noise]
        train("timm_vit", tmp_path, sparsity, *also, **order, model={"dropout": 0.0}, accumulate_grad_batches=2)
        assert whole == active
        found.append((noise.signal.item(), noise.noise.item()))
        # signal + noise / batch is the squared norm of the large batch's gradient
        assert found[-1][0] + found[-1][1] / 8 == pytest.approx(active[-1], rel=1e-4)
    assert found[0] == found[1]


def test_samples_that_are_only_scored_have_no_backward_pass_to_leave_out(tmp_path: Path) -> None:
    sparsity, meter = sparse("weight, SET", density=0.2, drop=0.0), CostMeter(repeats=0)
    choosing = ImportanceSampling(threshold=0.0, look_every=1)
    train("timm_vit", tmp_path, sparsity, meter, before=[choosing])
    inactive = sum(int((~part.active).sum()) for part in sparsity.parts)
    tokens, met = 5, {}  # four patches and a class token
    for key, skipped in meter.ledger.skipped.items():
        shape = dict(key)
        assert shape["samples"] == 4  # of which one is trained
        assert skipped == 2 * inactive * tokens * ((4 if shape["importance_sampling/gate"] == "open" else 0) + 3)
        met[shape["importance_sampling/gate"]] = True
    assert met == {"looks": True, "open": True}
    record = meter.ledger.record()
    assert 0 < record["sparse_flops"] < record["flops"]


# ---- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.0}, r"density=0.0 is not a share of the weights in \(0, 1\]"),
        ({"density": 1.5}, "density=1.5 is not a share"),
        ({"granularity": "row"}, "granularity='row': choose one of 'unit', 'weight', 'block', '2:4'"),
        ({"grow": "most"}, "grow='most': choose one of 'gradient', 'random'"),
        ({"distribution": "even"}, "distribution='even': choose one of"),
        ({"units": "layers"}, "units='layers': choose one of"),
        ({"drop": 1.0}, r"drop=1.0 is not a share of the active weights in \[0, 1\)"),
        ({"until": 0.0}, "until=0.0 is not a share of the run"),
        ({"every": 0}, "every=0 is neither a number of steps nor a share"),
        ({"every": 1.5}, "every=1.5 is neither a number of steps nor a share"),
        ({"granularity": "2:4", "density": 0.25}, "density=0.25 with granularity='2:4': two of four are 0.5"),
        ({"distribution": "erk"}, "distribution='erk' does not go with granularity='unit'"),
        ({"layers": ["head"]}, "layers names matrices; with granularity='unit' choose by units"),
        ({"granularity": "block", "tile": 1}, "tile=1: the side of a tile is at least 2"),
    ],
)
def test_arguments_that_cannot_work_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DynamicSparsity(**options)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("bert", {"density": 0.2}, "density=0.2 leaves none of the 2 heads of encoder.blocks.0.attention; give 0.5"),
        ("bert", {"density": 0.005, "units": "neurons"}, "none of the 64 neurons of encoder.blocks.0.feedforward.down"),
        (
            "bert",
            {"density": 1e-4, "granularity": "weight"},
            "none of the 768 weights or tiles of encoder.blocks.0.att",
        ),
        ("bert", {"granularity": "block", "tile": 5}, "tiles of 5 x 5 do not divide encoder.blocks.0.attention.qkv"),
        ("hf_gpt2", {"granularity": "2:4"}, "is of a Conv1D, not a Linear"),
        ("hf_gpt2", {}, "found no feed-forward neurons to leave out in BlockStack.net.h: 4 of 4 GPT2Block"),
        ("torch_encoder", {"units": "heads"}, "found no attention heads to leave out in BlockStack.net.1.layers"),
        ("bert", {"granularity": "weight", "layers": ["encoder.blocks.7"]}, "'encoder.blocks.7' names no trained"),
        (
            "bert",
            {"granularity": "weight", "layers": ["encoder", "encoder.blocks.0.attention"]},
            r"'encoder.blocks.0.attention' holds the weights of 'encoder.blocks.0.attention.qkv.weight' again \(tied\)",
        ),
    ],
)
def test_what_does_not_fit_the_model_is_refused_at_setup(
    name: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    sparsity = DynamicSparsity(**options)
    with pytest.raises(ValueError, match=message):
        sparsity.setup(quiet_trainer(tmp_path, callbacks=[sparsity]), build(name), "fit")


def test_two_of_four_need_inputs_in_fours(tmp_path: Path) -> None:
    sparsity = DynamicSparsity(granularity="2:4", layers=["net"])
    module = build("plain_torch")
    module.net = nn.Linear(6, 4)
    with pytest.raises(ValueError, match="granularity='2:4' needs inputs in fours, but net.weight has 6"):
        sparsity.setup(quiet_trainer(tmp_path, callbacks=[sparsity]), module, "fit")


def test_masks_of_another_model_are_refused(tmp_path: Path) -> None:
    sparsity, deeper = sparse(), sparse()
    for one, depth in ((sparsity, 2), (deeper, 4)):
        one.setup(quiet_trainer(tmp_path, callbacks=[one]), tiny_bert(depth=depth), "fit")
    with pytest.raises(ValueError, match="masks are of other layers: encoder.blocks.2.attention"):
        sparsity.load_state_dict(deeper.state_dict())
