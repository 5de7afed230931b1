from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lit_scale.callbacks import RhoLoss
from lit_scale.callbacks.rho_loss import top_reducible
from lit_scale.cost import CostMeter
from lit_scale.models import BertMLM
from tests.support.data import loader, sized_loader
from tests.support.equality import assert_same
from tests.support.networks import PlainTorch, build, image_model, tiny_bert
from tests.support.training import Ran, quiet_trainer, run, save_every_step

pytestmark = [pytest.mark.filterwarnings("ignore")]

STEPS = 5


class Weights(Callback):
    """Keeps the weights that each step begins with."""

    def __init__(self) -> None:
        self.before: list[dict[str, Tensor]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.before.append({name: value.clone() for name, value in pl_module.state_dict().items()})


def choose(module: Any, data: Any, other: Any, folder: Path, *also: Callback, **options: Any) -> Ran:
    technique = RhoLoss(other, share=options.pop("share", 0.25))
    return run(module, data, folder, technique, *also, max_steps=STEPS, **options)


def test_the_top_is_what_can_be_reduced_most() -> None:
    losses, irreducible = torch.tensor([3.0, 1.0, 2.0, 0.5, 5.0, 2.0]), torch.tensor([3.0, 0.2, 0.5, 0.5, 4.9, 0.0])
    differences = (losses - irreducible).tolist()
    best = sorted(range(6), key=lambda i: -differences[i])
    for share in (1 / 6, 0.5, 1.0):
        assert top_reducible(losses, irreducible, share).tolist() == sorted(best[: round(6 * share)])
    assert top_reducible(torch.tensor([1.0, float("nan"), 2.0]), torch.zeros(3), 1 / 3).tolist() == [1]


@pytest.mark.parametrize("planned", [True, False])
def test_a_step_trains_those_that_two_models_tell_apart_most(planned: bool, tmp_path: Path) -> None:
    """Recomputed for every step from the weights that it began with."""
    if planned:
        module, other, data = image_model("by_hand"), image_model("by_hand", seed=7), sized_loader()
    else:
        module, other, data = build("plain_torch"), build("plain_torch", seed=7), loader("plain_torch", batch_size=16)
    weights = Weights()
    watch = choose(module, data, other, tmp_path, weights).watch
    assert watch.brought == [16] * STEPS  # of the planned loader four times 4
    again, other = type(module)(), other.eval()
    for batch, trained, begun_with in zip(watch.batches, watch.trained_batches, weights.before, strict=True):
        again.load_state_dict(begun_with)
        with torch.no_grad():
            gap = again.eval().per_sample_loss(batch) - other.per_sample_loss(batch)
        chosen = gap.argsort(descending=True)[:4].sort().values
        assert torch.equal(trained["image"], batch["image"][chosen])
        assert torch.equal(trained["label"], batch["label"][chosen])


def test_the_second_model_never_changes_and_is_left_alone(tmp_path: Path) -> None:
    other = build("plain_torch", seed=7)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    other.train()
    choose(build("plain_torch"), loader("plain_torch", batch_size=16), other, tmp_path)
    assert all(
        torch.equal(value, other.state_dict()[name]) for name, value in before.items()
    )  # its counter of calls too
    assert not any(p.requires_grad for p in other.parameters())


def test_a_checkpoint_serves_as_the_second_model_and_the_run_resumes(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, max_steps=2)
    trainer.fit(held_out := tiny_bert(seed=5), loader("bert"))
    trainer.save_checkpoint(path := tmp_path / "irreducible.ckpt")
    saver = save_every_step(tmp_path / "saved")
    whole = choose(tiny_bert(), loader("bert", batch_size=8), path, tmp_path, saver)
    same = choose(tiny_bert(), loader("bert", batch_size=8), held_out, tmp_path)
    (technique,) = (one for one in whole.trainer.callbacks if isinstance(one, RhoLoss))  # type: ignore[attr-defined]
    assert isinstance(technique._other, BertMLM)
    assert whole.watch.losses == same.watch.losses
    for stop in (1, 3):
        resume = tmp_path / "saved" / f"step={stop}.ckpt"
        rest = choose(tiny_bert(seed=1), loader("bert", batch_size=8), path, tmp_path, resume=resume)
        assert rest.watch.losses == whole.watch.losses[stop:]
        assert_same(whole.left, rest.left)
    with pytest.raises(ValueError, match=r"RhoLoss\(irreducible='\w+'\) differs from the checkpoint's"):
        choose(tiny_bert(seed=1), loader("bert", batch_size=8), tiny_bert(seed=6), tmp_path, resume=resume)


def test_a_step_costs_two_forward_passes_more(tmp_path: Path) -> None:
    meter, plain = CostMeter(repeats=1), CostMeter(repeats=1)
    choose(image_model("by_hand"), sized_loader(), image_model("by_hand"), tmp_path, meter)
    run(image_model("by_hand"), sized_loader(), tmp_path, plain, max_steps=1)
    step, unscored = [shape for shape in meter.ledger.record()["step_kinds"] if shape["phase"] == "train"]
    (reference,) = [shape for shape in plain.ledger.record()["step_kinds"] if shape["phase"] == "train"]
    assert (step["samples"], step["rho_loss/samples_kept"], step["plain"], step["price"]) == (16, 0.25, False, "replay")
    assert step["flops_each"] / reference["flops_each"] == pytest.approx(1 + 2 * 4 / 3, rel=0.05)
    # the step without the technique is priced beside it, though the run has made none
    assert (unscored["plain"], unscored["count"], unscored["flops_each"]) == (True, 0, reference["flops_each"])


def test_bad_input_is_refused(tmp_path: Path) -> None:
    class Mute(PlainTorch):
        per_sample_loss = None  # type: ignore[assignment]

    with pytest.raises(ValueError, match=r"share=0.0 is not a share of the samples in \(0, 1\), such as 0.1"):
        RhoLoss(build("plain_torch"), share=0.0)
    data, module = loader("plain_torch", batch_size=16), build("plain_torch")
    with pytest.raises(ValueError, match="PlainTorch is the model that is trained; give another"):
        choose(module, data, module, tmp_path)
    with pytest.raises(ValueError, match="Mute has no method per_sample_loss"):
        choose(module, data, Mute(), tmp_path)
    with pytest.raises(ValueError, match="irreducible='no.ckpt' is no checkpoint of a PlainTorch"):
        choose(module, data, "no.ckpt", tmp_path)
    torch.save({"state_dict": nn.Linear(1, 1).state_dict()}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="other.ckpt' is no checkpoint of a PlainTorch"):
        choose(module, data, tmp_path / "other.ckpt", tmp_path)
