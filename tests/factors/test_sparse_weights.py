"""The base of techniques that train some of the weights, by two small ones."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor
from torch.optim import Optimizer

from lit_scale.cost import CostMeter
from lit_scale.factors.sparse_weights import SparseWeights
from lit_scale.factors.units import UnitGroup
from lit_scale.factors.weights import Cells, highest_cells
from lit_scale.guards import StepSeed
from lit_scale.technique import averages
from tests.support.data import loader
from tests.support.equality import assert_same
from tests.support.networks import OPTIMIZERS, build, slots
from tests.support.training import left, quiet_trainer, save_every_step

pytestmark = [pytest.mark.filterwarnings("ignore")]

STEPS = 4
KINDS: dict[str, dict[str, Any]] = {
    "unit": {"density": 0.5},
    "weight": {"density": 0.3, "granularity": "weight"},
    "block": {"density": 0.5, "granularity": "block", "tile": 4},
    "2:4": {"granularity": "2:4"},
}


class Largest(SparseWeights):
    """Pruning at initialisation: the largest weights are trained."""

    def first_scores(self, part: Cells | UnitGroup) -> Tensor:
        return part.magnitude()


class Wandering(SparseWeights):
    """Other cells after every second step, for whose gradient the step asks."""

    def decide(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.dense_gradient = trainer.global_step % 2 == 1

    def after_step(self, trainer: Trainer) -> None:
        if self.dense_gradient:
            for part in self.parts:
                scores = self.random(part, trainer.global_step, "wander").to(part.active.device)
                active = highest_cells(scores, int(part.active.sum()), in_fours=self.granularity == "2:4")
                self.set_active(trainer, part, active)


class Watcher(Callback):
    """Behind the technique: that what is inactive is 0 wherever it is kept."""

    def __init__(self, sparsity: SparseWeights) -> None:
        self.sparsity, self.checked = sparsity, 0
        self.active: list[Any] = []

    def inactive(self) -> Any:
        for part in self.sparsity.parts:
            for parameter, mask in part.masks():
                yield parameter, ~mask.expand_as(parameter)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        for parameter, off in self.inactive():
            assert not parameter.grad[off].any(), "before gradients are clipped"

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        names = {parameter: name for name, parameter in pl_module.named_parameters()}
        others = [dict(average.named_parameters()) for average in averages(trainer)]
        self.active.append([part.active.clone() for part in self.sparsity.parts])
        for parameter, off in self.inactive():
            for kept in (parameter, *(other[names[parameter]] for other in others)):
                assert not kept[off].any()
            for name, slot in slots(trainer.optimizers[0], parameter).items():
                assert not slot[off].any(), name
            self.checked += int(off.any())


def fit(root: Path, *callbacks: Callback, resume: Path | None = None, seed: int = 0, **options: Any) -> Any:
    model = options.pop("model", {})
    module = build("bert", seed=seed) if not model else build("plain_torch", seed=seed, **model)
    name = "plain_torch" if model else "bert"
    trainer = quiet_trainer(root, callbacks=[StepSeed(), *callbacks], **({"max_steps": STEPS} | options))
    trainer.fit(module, loader(name, size=16), ckpt_path=resume)
    return module, trainer


@pytest.mark.parametrize("make", [Largest, Wandering])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_inactive_is_zero_everywhere(kind: str, make: type[SparseWeights], tmp_path: Path) -> None:
    sparsity = make(**KINDS[kind])
    watcher, average = Watcher(sparsity), EMAWeightAveraging(decay=0.9)
    fit(tmp_path, average, sparsity, watcher, gradient_clip_val=0.1)
    assert watcher.checked >= STEPS * len(sparsity.parts)
    before, after = watcher.active[0], watcher.active[-1]
    assert all(map(torch.equal, before, after)) == (make is Largest)
    assert [int(part.sum()) for part in before] == [int(part.sum()) for part in after]


def test_quantised_slots_are_zero_too(tmp_path: Path) -> None:
    sparsity = Wandering(0.3, granularity="weight")
    watcher = Watcher(sparsity)
    fit(tmp_path, sparsity, watcher, model={"optimizer": OPTIMIZERS["8-bit AdamW"]})
    assert watcher.checked


@pytest.mark.parametrize("kind", ["weight", "unit"])
def test_the_highest_scores_become_active(kind: str, tmp_path: Path) -> None:
    sparsity, module = Largest(**KINDS[kind]), build("bert")
    sparsity.setup(quiet_trainer(tmp_path, callbacks=[sparsity]), module, "fit")
    for part in sparsity.parts:
        magnitude = part.magnitude()
        assert magnitude[part.active].min() >= magnitude[~part.active].max()


def test_by_default_the_first_choice_is_random_and_follows_the_seed(tmp_path: Path) -> None:
    def first(seed: int) -> Tensor:
        sparsity = SparseWeights(0.3, granularity="weight", seed=seed)
        sparsity.setup(quiet_trainer(tmp_path, callbacks=[sparsity]), build("bert"), "fit")
        return torch.cat([part.active for part in sparsity.parts])

    assert torch.equal(first(0), first(0))
    assert not torch.equal(first(0), first(1))


def test_the_layers_together_have_the_density(tmp_path: Path) -> None:
    for distribution in ("uniform", "erk"):
        sparsity = SparseWeights(0.3, granularity="weight", distribution=distribution)
        sparsity.setup(quiet_trainer(tmp_path, callbacks=[sparsity]), build("bert"), "fit")
        active = torch.cat([part.active for part in sparsity.parts])
        assert active.float().mean().item() == pytest.approx(0.3, abs=0.005)
        each = {round(part.active.float().mean().item(), 2) for part in sparsity.parts}
        assert (len(each) > 1) == (distribution == "erk")


@pytest.mark.parametrize("kind", ["unit", "weight"])
def test_the_gradient_is_dense_where_a_step_asks_for_it(kind: str, tmp_path: Path) -> None:
    sparsity, seen = Wandering(**KINDS[kind]), []

    class Looks(Callback):  # in front of the technique
        def on_before_optimizer_step(self, *_: Any) -> None:
            pairs: list[Any] = [pair for part in sparsity.parts for pair in part.masks()]
            off = [p.grad[~m.expand_as(p)].any() for p, m in pairs]
            seen.append(bool(torch.stack(off).any()))

    fit(tmp_path, Looks(), sparsity)
    shown = kind == "weight"  # units that are not computed have no gradient, unless the technique shows all of them
    assert seen == [False, shown, False, shown]


def test_all_units_are_computed_where_a_technique_shows_them(tmp_path: Path) -> None:
    group = SparseWeights(0.5)
    widths: list[int] = []

    class Shows(Callback):
        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            group.show(everything=trainer.global_step == 1)
            part: Any = next(part for part in group.parts if part.name.endswith("down"))
            widths.append(part.ins[0](torch.zeros(1, part.ins[0].in_features)).shape[1])

    fit(tmp_path, group, Shows())
    assert widths == [32, 64, 32, 32]


@pytest.mark.parametrize("make", [Largest, Wandering])
@pytest.mark.parametrize("kind", ["unit", "weight"])
def test_a_resumed_run_ends_like_the_whole_one(kind: str, make: type[SparseWeights], tmp_path: Path) -> None:
    saver = save_every_step(tmp_path / "saved")
    _, whole = fit(tmp_path, make(**KINDS[kind]), saver)
    for stop in (1, 2, 3):
        _, rest = fit(tmp_path, make(**KINDS[kind]), resume=tmp_path / "saved" / f"step={stop}.ckpt", seed=1)
        assert_same(left(whole), left(rest), f"resumed at step {stop}")


def test_the_same_trainer_goes_on_with_its_masks(tmp_path: Path) -> None:
    sparsity = Wandering(0.3, granularity="weight")
    watcher = Watcher(sparsity)
    module, trainer = fit(tmp_path, sparsity, watcher, max_steps=2)
    trainer.fit_loop.epoch_loop.max_steps = 3
    trainer.fit(module, loader("bert", size=16))
    before, after = watcher.active[1:]
    assert all(map(torch.equal, before, after)), "and does not draw them anew"


def test_copied_weights_have_the_mask_of_their_originals(tmp_path: Path) -> None:
    sparsity, module = Largest(0.3, granularity="weight"), build("bert")
    trainer = quiet_trainer(tmp_path, callbacks=[sparsity])
    sparsity.setup(trainer, module, "fit")
    parts: list[Any] = sparsity.parts
    one, other = next((a, b) for a in parts for b in parts if a is not b and a.grid == b.grid)
    assert not torch.equal(one.active, other.active)
    with torch.no_grad():
        other.parameter.copy_(one.parameter)
    sparsity.on_copy([(one.parameter, other.parameter)])
    assert torch.equal(one.active, other.active)
    assert not other.parameter.flatten()[~one.active].any()


@pytest.mark.parametrize("kind", ["unit", "weight"])
def test_an_exception_leaves_a_plain_model_behind(kind: str, tmp_path: Path) -> None:
    class Fails(Callback):
        def on_after_backward(self, *_: Any) -> None:
            raise RuntimeError("out of memory")

    sparsity, module = Largest(**KINDS[kind]), build("bert")
    trainer = quiet_trainer(tmp_path, max_steps=STEPS, callbacks=[sparsity, Fails()])
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.fit(module, loader("bert"))
    assert not [name for name, part in module.named_modules() if "forward" in vars(part) or part._forward_hooks]
    assert not [name for name, p in module.named_parameters() if p._backward_hooks]
    assert not trainer.optimizers[0]._optimizer_step_post_hooks


def test_steps_are_priced_by_density_and_skipped_flops_are_told(tmp_path: Path) -> None:
    dense, saved = CostMeter(repeats=0), {}
    fit(tmp_path, dense)
    for kind in ("unit", "weight"):
        meter = CostMeter(repeats=1)
        module, _ = fit(tmp_path, Largest(**KINDS[kind]), meter)
        ledger = meter.ledger
        kinds = {(dict(key)["largest/density"], dict(key)["plain"]) for key in ledger.calibrated}
        assert kinds == {(KINDS[kind]["density"], False), (1.0, True)}
        plain, *_ = {ledger.flops[key] for key in ledger.calibrated if dict(key)["plain"]}
        sparse, *_ = {ledger.flops[key] for key in ledger.counts}
        assert plain in set(dense.ledger.flops.values())
        saved[kind] = plain - sparse, sum(ledger.skipped.values())
        assert not [name for name, part in module.named_modules() if "forward" in vars(part)]
    assert saved["unit"][0] > 0 == saved["unit"][1], "products are shorter"
    assert saved["weight"][0] == 0 < saved["weight"][1], "only on a kernel for sparse matrices"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.0}, "density=0.0 is not a share"),
        ({"granularity": "row"}, "granularity='row': choose one of 'unit', 'weight', 'block', '2:4'"),
        ({"distribution": "equal"}, "distribution='equal': choose one of 'uniform', 'erk'"),
        ({"units": "rows"}, "units='rows': choose one of 'all', 'neurons', 'heads'"),
        ({"granularity": "2:4", "density": 0.25}, "two of four are 0.5"),
        ({"distribution": "erk"}, "distribution='erk' does not go with granularity='unit'"),
        ({"layers": ["net"]}, "layers names matrices"),
        ({"granularity": "block", "tile": 1}, "tile=1: the side of a tile is at least 2"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseWeights(**options)


def test_the_highest_cells_of_scores_that_are_not_finite() -> None:
    scores = torch.tensor([-math.inf, 1.0, math.inf, 0.0])
    assert highest_cells(scores, 2).tolist() == [False, True, True, False]
    assert highest_cells(scores, 4).all()
