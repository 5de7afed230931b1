import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import DataLoader

from lit_scale.cost import CostMeter
from lit_scale.models import ProbeAtEnd, fine_tune, linear_probe
from lit_scale.models.probe import solve
from tests.support.data import CLASSES, Pictures, pictures
from tests.support.equality import assert_same
from tests.support.networks import build, tiny_mae
from tests.support.training import quiet_trainer

pytestmark = [pytest.mark.filterwarnings("ignore")]


class Data(LightningDataModule):
    """96 pictures to train on, 32 others to validate on."""

    num_classes = CLASSES

    def train_dataloader(self) -> Any:
        return pictures(size=96, batch_size=16)

    def val_dataloader(self) -> Any:
        return DataLoader(torch.utils.data.Subset(Pictures(128), range(96, 128)), 16)


@pytest.mark.parametrize("decay", [1e-4, 1e-2, 1.0])
def test_the_solver_finds_scikit_learns_optimum(decay: float) -> None:
    from sklearn.linear_model import LogisticRegression

    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (300,), generator=generator)
    features = torch.randn(300, 8, generator=generator, dtype=torch.float64) + F.one_hot(labels, 8)
    weight, bias = solve(features, labels, decay=decay)
    theirs = LogisticRegression(C=1 / (decay * 300), tol=1e-10, max_iter=10_000)  # its penalty is that of the sum
    theirs.fit(features.numpy(), labels.numpy())
    np.testing.assert_allclose(weight.numpy(), theirs.coef_, atol=1e-4)
    np.testing.assert_allclose((bias - bias.mean()).numpy(), theirs.intercept_ - theirs.intercept_.mean(), atol=1e-4)


def test_the_linear_probe_is_scikit_learns_on_the_models_features() -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model, data = tiny_mae(), Data()
    accuracy = linear_probe(model, data, decay=1e-3)
    with torch.no_grad():
        (train, labels), (held_out, expected) = (
            [torch.cat(parts).numpy() for parts in zip(*((model.eval()(x), y) for x, y in loader), strict=True)]
            for loader in (data.train_dataloader(), data.val_dataloader())
        )
    theirs = make_pipeline(StandardScaler(), LogisticRegression(C=1 / (1e-3 * 96), tol=1e-10, max_iter=10_000))
    assert accuracy == pytest.approx(theirs.fit(train, labels).score(held_out, expected))
    assert accuracy > 2 / CLASSES  # brightness is the class, and any features tell it


def test_fine_tuning_of_the_head_alone_finds_what_scikit_learn_does() -> None:
    """With hardly any rate below the head the features stay, and a classifier of them is a logistic regression."""
    from sklearn.linear_model import LogisticRegression

    model, data = tiny_mae(), Data()
    accuracy = fine_tune(model, data, steps=200, lr=0.1, weight_decay=0.0, layer_decay=1e-6)
    features = []
    for loader in (data.train_dataloader(), data.val_dataloader()):
        with torch.no_grad():
            pairs = [(model.encoder.forward_features(x)[:, 1:].mean(1), y) for x, y in loader]  # as the paper pools
        features.append([torch.cat(parts).numpy() for parts in zip(*pairs, strict=True)])
    (train, labels), (held_out, expected) = features
    theirs = LogisticRegression(C=np.inf, tol=1e-8, max_iter=10_000).fit(train, labels)
    assert accuracy == pytest.approx(theirs.score(held_out, expected), abs=1.5 / 32)  # of 32 one may lie on the line
    assert accuracy > 2 / CLASSES


def test_fine_tuning_takes_the_rates_of_the_papers_table_and_leaves_the_model_alone() -> None:
    """Watched from torch: a warm-up and a half cosine, halved from each layer to the one before it."""
    model, steps = tiny_mae(), 12
    before = {key: value.clone() for key, value in model.state_dict().items()}
    seen: list[dict[tuple[int, ...], float]] = []
    counts: set[int] = set()

    def note(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        assert all(group["betas"] == (0.9, 0.999) for group in optimizer.param_groups)
        for group in optimizer.param_groups:
            assert {p.ndim > 1 and p.shape[0] != 1 for p in group["params"]} == {group["weight_decay"] == 0.05}
        seen.append({tuple(p.shape): group["lr"] for group in optimizer.param_groups for p in group["params"]})
        counts.add(len({group["lr"] for group in optimizer.param_groups}))

    handle = register_optimizer_step_pre_hook(note)
    try:
        accuracy = fine_tune(model, Data(), steps=steps, lr=3e-3, layer_decay=0.5)
    finally:
        handle.remove()
    done = [(step + 1) / (steps + 1) for step in range(steps)]
    rates = [p / 0.05 if p < 0.05 else 0.5 * (1 + math.cos(math.pi * (p - 0.05) / 0.95)) for p in done]
    assert [step[CLASSES, 16] for step in seen] == pytest.approx([3e-3 * rate for rate in rates])  # of the head
    assert [step[16, 3, 2, 2] for step in seen] == pytest.approx([3e-3 / 8 * rate for rate in rates])  # of the patches
    assert counts == {4}  # patches, two blocks, and the head
    assert accuracy > 1.5 * torch.cat([y for _, y in Data().val_dataloader()]).bincount().max() / 32  # of one guess
    assert_same(dict(model.state_dict()), before)  # the copy was trained
    assert not model.encoder.pos_embed.requires_grad


def test_probes_draw_nothing_from_the_generator_of_the_run() -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    data = Data()
    data.val_dataloader = lambda: pictures(size=8, shuffle=False)  # type: ignore[method-assign]
    linear_probe(tiny_mae(), data)
    torch.set_rng_state(state)
    model = tiny_mae()
    torch.set_rng_state(state)
    linear_probe(model, data)
    first = fine_tune(model, data, steps=2)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(4)
    assert fine_tune(model, data, steps=2) == first


def test_at_the_end_of_a_run_both_are_printed_and_noted_and_cost_nothing(tmp_path: Any, capsys: Any) -> None:
    records, weights = [], []
    for probes in ([], [ProbeAtEnd(steps=4)]):
        model, meter = tiny_mae(), CostMeter(repeats=0)
        trainer = quiet_trainer(tmp_path, max_steps=3, callbacks=[meter, *probes])
        torch.manual_seed(0)
        trainer.fit(model, datamodule=Data())
        records.append(json.loads((tmp_path / "result.json").read_text()))
        weights.append(model.state_dict())
    assert all(map(torch.equal, *(one.values() for one in weights)))
    assert records[0]["flops"] == records[1]["flops"]
    assert records[0]["steps"] == records[1]["steps"] == 3
    noted = {name: records[1][name] for name in set(records[1]) - set(records[0])}
    assert noted == probes[0].accuracies
    assert noted == {
        "linear_probe_accuracy": linear_probe(model, Data()),
        "fine_tune_accuracy": fine_tune(model, Data(), steps=4),
    }
    out = capsys.readouterr().out
    assert f"linear probe accuracy: {noted['linear_probe_accuracy']:.1%}" in out
    assert f"fine tune accuracy: {noted['fine_tune_accuracy']:.1%}" in out


def test_what_cannot_be_probed_is_refused(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match="steps=-1 must not be negative"):
        ProbeAtEnd(steps=-1)
    with pytest.raises(ValueError, match="steps=0 must be at least 1"):
        fine_tune(tiny_mae(), Data(), steps=0)
    with pytest.raises(ValueError, match="LightningDataModule has no num_classes"):
        fine_tune(tiny_mae(), LightningDataModule(), steps=1)
    trainer = quiet_trainer(tmp_path, max_steps=1, callbacks=[ProbeAtEnd()])
    with pytest.raises(ValueError, match="probes a MaskedAutoencoder, but this is a PlainTorch"):
        trainer.fit(build("plain_torch"), datamodule=Data())
    with pytest.raises(ValueError, match="needs labels: give the Trainer a data module"):
        quiet_trainer(tmp_path, max_steps=1, callbacks=[ProbeAtEnd()]).fit(tiny_mae(), pictures())
