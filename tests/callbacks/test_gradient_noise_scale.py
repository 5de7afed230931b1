"""The noise scale where it is known, against sums made by hand, and that looking changes nothing."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn

from lit_scale.batches import count_samples
from lit_scale.callbacks import (
    BatchRamp,
    GradientNoiseScale,
    ImportanceSampling,
    ProgressiveStacking,
    RhoLoss,
    SelectiveBackprop,
)
from lit_scale.callbacks.gradient_noise_scale import signal_and_noise
from lit_scale.cost import CostMeter
from lit_scale.datamodules.loader import ResumableLoader
from lit_scale.guards import SafeCheckpointIO, StepSeed
from tests.support.data import loader, sized_loader
from tests.support.equality import assert_same
from tests.support.networks import build, image_model
from tests.support.training import fit, left, note_samples, quiet_trainer, save_every_step

pytestmark = [pytest.mark.filterwarnings("ignore")]


def test_the_estimates_are_unbiased() -> None:
    """Exactly, over all draws of two samples from three: E signal = |mean|^2, E noise = the trace of the covariance."""
    gradients = torch.tensor([[1.0, 0.0], [2.0, 3.0], [-1.0, 4.0]], dtype=torch.float64)
    pairs = list(itertools.product(gradients, repeat=2))
    estimates = [signal_and_noise(a.square().sum(), ((a + b) / 2).square().sum(), 1, 2) for a, b in pairs]
    mean = gradients.mean(0)
    assert sum(s for s, _ in estimates) / 9 == pytest.approx(mean.square().sum().item())
    assert sum(n for _, n in estimates) / 9 == pytest.approx((gradients - mean).square().sum(1).mean().item())


WIDTH, MEAN, DEVIATION = 50, 0.5, 2.0


class Quadratic(LightningModule):
    """Loss |w - x|^2 / 2 with x around MEAN: at w = 0 |G|^2 = 50 * 0.25 and tr(Sigma) = 50 * 4, so B_crit = 16."""

    def __init__(self, lr: float = 0.0) -> None:
        super().__init__()
        self.lr = lr
        self.one, self.other = nn.Parameter(torch.zeros(WIDTH - 7)), nn.Parameter(torch.zeros(7))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (torch.cat([self.one, self.other]) - batch).square().sum(1).mean() / 2

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def samples(count: int = 16_384, batch_size: int = 4) -> ResumableLoader:
    data = torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(0)) * DEVIATION + MEAN
    return ResumableLoader(list(data), batch_size, shuffle=True)  # type: ignore[arg-type]


def test_it_finds_a_known_noise_scale(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    noise = GradientNoiseScale(smoothing=0.998)
    trainer = quiet_trainer(
        tmp_path, max_epochs=1, accumulate_grad_batches=4, gradient_clip_val=0.1, callbacks=[noise], log_every_n_steps=1
    )
    trainer.fit(Quadratic(), samples())
    weight = noise._weight
    # 1,024 steps, each with a standard deviation of about a tenth of S and a quarter of |G|^2
    assert float(noise.noise) / weight == pytest.approx(WIDTH * DEVIATION**2, rel=0.05)
    assert float(noise.signal) / weight == pytest.approx(WIDTH * MEAN**2, rel=0.15)
    assert noise.critical_batch == pytest.approx(16, rel=0.2)
    metrics = trainer.callback_metrics
    assert metrics["gradient_noise_scale/critical_batch"].item() == pytest.approx(noise.critical_batch, rel=1e-5)
    assert metrics["gradient_noise_scale/noise"].item() == pytest.approx(float(noise.noise) / weight, rel=1e-5)
    printed = capsys.readouterr().out
    assert printed.count("gradient noise scale: the critical batch is about 1") == 1
    assert "this run's 16" in printed


def test_each_step_is_what_the_gradients_say(tmp_path: Path) -> None:
    module, noise = Quadratic(lr=0.01), GradientNoiseScale(smoothing=0.5)
    seen: list[tuple[float, float]] = []

    class Notes(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step > len(seen):
                seen.append((float(noise.signal), float(noise.noise)))

    trainer = quiet_trainer(tmp_path, max_steps=5, accumulate_grad_batches=3, callbacks=[noise, Notes()])
    trainer.fit(module, samples(120))
    weight, signal, noisy = torch.zeros(WIDTH), 0.0, 0.0
    batches = iter(samples(120))
    for step in range(5):
        micro = [(weight - next(batches)).mean(0) for _ in range(3)]
        mean = torch.stack(micro).mean(0)
        small, large = micro[0].square().sum().item(), mean.square().sum().item()
        signal = 0.5 * signal + 0.5 * (12 * large - 4 * small) / 8
        noisy = 0.5 * noisy + 0.5 * (small - large) / (1 / 4 - 1 / 12)
        assert seen[step] == pytest.approx((signal, noisy), rel=1e-4)
        weight = weight - 0.01 * mean


@pytest.mark.parametrize("batch", [4, 64])
def test_the_verdict_follows_the_papers_trade_off(batch: int) -> None:
    noise = GradientNoiseScale()
    noise.signal, noise.noise = torch.tensor(2.0), torch.tensor(32.0)
    # steps ~ 1 + 16 / B, samples ~ 1 + B / 16
    steps = 1 - (1 + 16 / (2 * batch)) / (1 + 16 / batch)
    more = (1 + 2 * batch / 16) / (1 + batch / 16) - 1
    expected = (
        f"{'still' if batch < 16 else 'hardly'} pays: twice the batch takes {steps:.0%} fewer steps and {more:.0%}"
    )
    assert f"about 16 samples and this run's {batch}, so a larger batch {expected} more samples" in noise.verdict(batch)
    noise.signal = torch.tensor(-1.0)
    assert "nothing is known yet" in noise.verdict(batch)


def watched(root: Path, *callbacks: Callback, resume: Path | None = None, **options: Any) -> dict[str, Any]:
    module, plugins = build("bert", seed=1 if resume else 0), [SafeCheckpointIO()]
    defaults: dict[str, Any] = {"max_epochs": 2, "plugins": plugins}
    return left(fit(module, loader("bert"), root, *callbacks, resume=resume, **(defaults | options)))


def ramp() -> BatchRamp:
    return BatchRamp([(0.0, 4), (0.25, 8), (0.5, 16)])


def test_it_changes_nothing_and_resumes_exactly(tmp_path: Path) -> None:
    stacking: dict[str, Any] = {"stages": [(0.0, 0.5), (0.5, 1.0)]}
    watching = GradientNoiseScale(0.9)
    parts = [ProgressiveStacking(**stacking), ramp(), watching, CostMeter(repeats=1)]
    whole = watched(tmp_path, *parts, save_every_step(tmp_path / "saved"))
    alone = watched(tmp_path, ProgressiveStacking(**stacking), ramp())
    assert_same(whole, alone)
    assert (
        0 < watching._weight < 1 - 0.9**4 + 1e-9
    )  # 2 + 2 of the 8 steps had more than one micro-batch; no replayed one
    for stop in (3, 5, 7):
        again = GradientNoiseScale(0.9)
        path = tmp_path / "saved" / f"step={stop}.ckpt"
        rest = watched(tmp_path, ProgressiveStacking(**stacking), ramp(), again, CostMeter(repeats=1), resume=path)
        assert_same(whole, rest, f"resumed at step {stop}")
        assert_same(watching.state_dict(), again.state_dict())


class Gradients(Callback):
    """Counts the samples of each micro-batch where they are trained, and notes the gradient each of them adds."""

    def __init__(self) -> None:
        self.trained: list[int] = []
        self.added: list[Tensor] = []
        self._sum: Tensor | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        note_samples(pl_module, lambda batch: self.trained.append(count_samples(batch)))

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        gradients = [p.grad.flatten() for p in pl_module.parameters() if p.grad is not None]
        before, self._sum = self._sum, torch.cat(gradients).double()
        self.added.append(self._sum if before is None else self._sum - before)

    def on_before_zero_grad(self, *_: Any) -> None:
        self._sum = None


class Opens(ImportanceSampling):
    """Its gate opens with the fourth batch, in the middle of a step."""

    def _is_open(self, number: int) -> bool:
        return number >= 3


CHOOSING: dict[str, Any] = {
    "importance": Opens,
    "rho": lambda: RhoLoss(image_model("by_hand", seed=7), share=0.25),
    "selective": lambda: SelectiveBackprop(0.25, 0.75, keep=0.5, interrupt=0),
    "interrupted": lambda: SelectiveBackprop(0.25, 0.75, keep=0.5, interrupt=2),
}


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("choosing", CHOOSING)
def test_it_counts_the_samples_that_are_trained(choosing: str, order: int, tmp_path: Path) -> None:
    """Against the gradients as they come, and what the network itself was given; unequal micro-batches tell nothing."""
    noise, watch = GradientNoiseScale(smoothing=0.5), Gradients()
    parts: list[Callback] = [CHOOSING[choosing](), noise]
    trainer = quiet_trainer(
        tmp_path, max_steps=8, accumulate_grad_batches=2, callbacks=[watch, StepSeed(), *parts[::order]]
    )
    trainer.fit(image_model("by_hand", dropout=0.0), sized_loader())
    weight = signal = noisy = 0.0
    kept = 0
    for step in range(8):
        one, other = watch.trained[2 * step : 2 * step + 2]
        if one != other or (choosing == "importance" and step == 1):  # one plain, the other weighted
            continue
        small = 2 * watch.added[2 * step]
        large = watch.added[2 * step] + watch.added[2 * step + 1]
        one_signal, one_noise = signal_and_noise(small.square().sum(), large.square().sum(), one, 2 * one)
        pairs = ((weight, 1.0), (signal, float(one_signal)), (noisy, float(one_noise)))
        weight, signal, noisy = (0.5 * past + 0.5 * now for past, now in pairs)
        kept += 1
    assert noise._weight == weight
    assert float(noise.signal) == pytest.approx(signal, rel=1e-3)
    assert float(noise.noise) == pytest.approx(noisy, rel=1e-3)
    assert noise._batch == 2 * watch.trained[-1] == 2 * 4
    assert kept == {"importance": 7, "rho": 8, "selective": 8, "interrupted": 4}[choosing]


def test_a_step_that_the_epoch_cuts_short_is_left_out(tmp_path: Path) -> None:
    noise = GradientNoiseScale(0.5)
    quiet_trainer(tmp_path, max_epochs=1, accumulate_grad_batches=2, callbacks=[noise]).fit(Quadratic(), samples(20))
    assert noise._weight == 0.75  # 5 batches: two steps of two count, that of one does not


def test_one_gradient_a_step_tells_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    noise = GradientNoiseScale()
    trainer = quiet_trainer(tmp_path, max_steps=2, callbacks=[noise])
    with pytest.warns(
        UserWarning, match="sees one gradient a step and can estimate nothing; pass accumulate_grad_batches"
    ):
        trainer.fit(Quadratic(), samples(20))
    assert noise._weight == 0.0
    assert capsys.readouterr().out == ""
    with pytest.raises(ValueError, match=r"smoothing=1.0 is not in \[0, 1\)"):
        GradientNoiseScale(smoothing=1.0)
