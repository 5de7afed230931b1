"""Importance sampling by gradient norms (Katharopoulos and Fleuret, ICML 2018, arXiv 1803.00942, algorithm 1).

    of B samples draw b with p_i ~ |dL_i / d output|, each with weight 1 / (B p_i), while tau > (B + 3b) / 3b

The weighted gradient is an unbiased estimate of the plain gradient over all B samples. tau is how many times larger a
uniform batch would have to be for the same variance; the condition on tau compares this with the cost of the choice.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lit_scale.batches import count_samples, take_samples
from lit_scale.factors.samples import SampleChoice, Step
from lit_scale.factors.scores import check_outputs, output_gradients, watch_outputs

__all__ = ["ImportanceSampling", "draw", "variance_ratio"]

_DECAY = 0.9  # weight of the past in tau's moving average, per step; from the paper's code


def variance_ratio(scores: Tensor) -> float:
    """tau: how many times larger a uniform batch would have to be for the variance of sampling by score.

    With g the scores divided by their sum and u = 1 / B, the paper has 1 / sqrt(1 - |g - u|^2 / |g|^2), which is equal
    to sqrt(B) |g|.

    Args:
        scores: Scores of all samples, (B,), up to a common factor.

    Example:
        >>> variance_ratio(torch.ones(8)), variance_ratio(torch.eye(16)[0])
        (1.0, 4.0)
    """
    exact = scores.cpu().double()
    return float(exact.square().mean().sqrt() / exact.mean())


def draw(scores: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw samples by score, with replacement, and the weights that make the weighted mean unbiased.

    Args:
        scores: Scores of all samples, (B,), at least 0; if all are 0 the draw is uniform. If a score is not finite,
            only samples with such scores are drawn.
        count: Number of samples to draw, b.
        generator: Random generator on the CPU.

    Returns:
        Indices, (b,), and weights 1 / (B p), (b,).

    Example:
        >>> draw(torch.tensor([0.0, 3.0, 0.0]), 2, torch.Generator())
        (tensor([1, 1]), tensor([0.3333, 0.3333]))
    """
    exact = scores.cpu().double()
    if not exact.isfinite().all():  # train on these samples, so that FiniteGuard sees the loss that is not finite
        exact = (~exact.isfinite()).double()
    if not exact.any():
        exact = torch.ones_like(exact)
    p = exact / exact.sum()
    index = torch.multinomial(p, count, replacement=True, generator=generator)
    return index.to(scores.device), (1 / (len(p) * p[index])).float().to(scores.device)


class ImportanceSampling(SampleChoice):
    """Trains on the samples of a larger batch with the largest gradients, while that pays.

    While the gate is closed, steps are plain, and every ``look_every``-th step computes tau from the gradients at its
    output. When tau exceeds the threshold, the gate opens: the loader is asked for ``presample`` times as many samples,
    a forward pass without dropout scores them without keeping activations, and the usual number is drawn and trained.

    The module needs ``per_sample_loss(batch) -> (B,)``, and its ``training_step`` must return the mean of these losses.

    A :class:`~lit_scale.datamodules.loader.ResumableLoader` over a dataset that takes a plan, as those of our data
    modules do, is asked for larger batches while the gate is open. Workers prepare batches in advance, so a decision
    takes effect after all batches that may already be prepared. With any other loader each batch is the presample, of
    which ``1 / presample`` is trained: drawn by score while the gate is open, the first samples while it is closed.
    Give such a loader a batch size that is ``presample`` times as large.

    Args:
        presample: Ratio B / b of the samples that are scored to the b samples that are trained, an integer of at least
            2. tau of b samples is at most sqrt(b), so the gate can open only if b exceeds ``threshold`` squared.
        threshold: The gate is open while tau is above this value. None is the value beyond which choosing pays,
            ``(presample + 3) / 3`` (the paper's condition, with a backward pass at the cost of two forward passes).
        look_every: While the gate is closed, tau is updated every ``look_every`` batches (ours; in the paper, always).
        output: Dotted path of the last layer; by default the output is what the loss function is given
            (:func:`lit_scale.factors.scores.output_gradients`).
        seed: Seed of the draws, which are a function of (seed, rank, batch counter).

    Raises:
        ValueError: At construction, in ``setup``, or at the first batch before it is trained, for arguments that are
            out of range, a module without ``per_sample_loss``, an output that is not found or is not one per sample,
            or a batch smaller than ``presample``.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(max_steps=1_000, callbacks=[ImportanceSampling(presample=4)], logger=False)
    """

    weighs = True

    def __init__(
        self,
        presample: int = 3,
        *,
        threshold: float | None = None,
        look_every: int = 8,
        output: str | None = None,
        seed: int = 0,
    ) -> None:
        if not isinstance(presample, int) or presample < 2:
            raise ValueError(
                f"presample={presample}: more samples must be scored than are trained, a whole number of times as many "
                "and at least 2"
            )
        if threshold is not None and not threshold >= 0.0:
            raise ValueError(f"threshold={threshold} must not be negative; None opens the gate where that pays")
        if look_every < 1:
            raise ValueError(f"look_every={look_every} must be at least 1 batch")
        self.presample, self.look_every, self.output, self.seed = presample, look_every, output, seed
        self.threshold = (presample + 3) / 3 if threshold is None else threshold
        self.tau = 0.0
        self._looked = -1  # number of the batch at which tau was last updated
        self._changes: list[int] = []  # numbers of the batches at which the gate opens, closes, opens...
        self._delay = 1  # batches until a decision takes effect
        self._gate = "closed"  # for the current batch; "looks" is closed, but tau is updated; or "open"
        self._looks: list[list[Tensor]] = []  # squared scores of the batches since the last optimizer step
        self._checked = False

    def settings(self) -> dict[str, Any]:
        """The arguments, as plain values for the checkpoint."""
        return {name: getattr(self, name) for name in ("presample", "threshold", "look_every", "output", "seed")}

    # -- the batch --------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Close the gate; check that the layer named by ``output`` exists."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        self.tau, self._looked, self._changes, self._delay = 0.0, -1, [], 1
        if self.output is not None:
            try:
                pl_module.get_submodule(self.output)
            except AttributeError:
                raise ValueError(f"output={self.output!r}: {type(pl_module).__name__} has no such part") from None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Install the plan in the loader, or check the batch size of a loader that takes none."""
        super().on_train_start(trainer, pl_module)
        self._looks, self._checked = [], False
        loader: Any = trainer.train_dataloader
        if self._loader is not None:
            ahead = loader.num_workers * (loader.prefetch_factor or 0) + 1
            self._delay = max(self._delay, ahead)
            self._warn_of_few(loader.batch_size)
            return
        size = getattr(loader, "batch_size", None)
        if isinstance(size, int) and size < self.presample:
            raise ValueError(
                f"presample={self.presample} is not smaller than the batch of {size} samples, of which "
                f"1 / {self.presample} are to be trained; give the loader a batch_size {self.presample} times as large "
                "as a step's, or lower presample"
            )
        rank_zero_info(
            f"ImportanceSampling: this loader cannot be asked for more samples, so each of its batches is the "
            f"presample, and a step trains 1 / {self.presample} of it"
        )
        if isinstance(size, int):
            self._warn_of_few(size // self.presample)

    def _warn_of_few(self, count: int) -> None:
        """Warn if tau, at most the square root of the number of samples, can never reach the threshold."""
        if self.threshold >= (most := math.sqrt(count)):
            rank_zero_warn(
                f"ImportanceSampling: of {count} samples tau is at most {most:.3g}, and the gate opens above "
                f"{self.threshold:.3g}, so it stays closed: train more than {math.floor(self.threshold**2)} samples a "
                "step, or lower presample"
            )

    def samples(self, number: int, count: int) -> int:
        """``presample`` times as many while the gate is open."""
        return count * self.presample if self._is_open(number) else count

    def _is_open(self, number: int) -> bool:
        return bisect_right(self._changes, number) % 2 == 1

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set the gate for this batch; before the first one, check that the module's output can be scored."""
        if not self._checked:
            with trainer.precision_plugin.forward_context():
                check_outputs(pl_module, batch, self.output)
            self._checked = True
        number = self.number(trainer)
        looks = number % self.look_every == 0
        self._gate = "open" if self._is_open(number) else "looks" if looks else "closed"
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def logged(self, trainer: Trainer) -> dict[str, float]:
        """tau, and whether the gate is open (1.0 or 0.0)."""
        return {"tau": self.tau, "open": float(self._gate == "open")}

    def train(self, trainer: Trainer, pl_module: LightningModule, step: Step, batch: Any) -> Any:
        """Score and draw, or make a plain step."""
        count = count_samples(batch)
        if self._gate == "open":
            scores = output_gradients(pl_module, batch, self.output)
            self._looks.append([scores.square()])
            index, weights = draw(scores, max(1, count // self.presample), self.generator(trainer, self.seed))
            return self.weighted(step, take_samples(batch, index), weights)
        if self._loader is None:
            count = max(1, count // self.presample)
            batch = take_samples(batch, slice(0, count))
        if self._gate == "closed":
            return step(batch)
        with watch_outputs(pl_module, count, self.output) as squares:
            self._looks.append(squares)
            return step(batch)

    # -- the gate ---------------------------------------------------------------------------------------------------

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Update tau, the mean over ranks, and decide on the gate; before a checkpoint can be saved."""
        looks, self._looks = self._looks, []
        if not looks:
            return
        taus = [variance_ratio(torch.stack(squares).sum(0).sqrt()) for squares in looks]
        now = torch.tensor(sum(taus) / len(taus), device=pl_module.device)
        if trainer.world_size > 1:
            dist.all_reduce(now)
            now /= trainer.world_size
        tau = now.item()
        if self._ended or not math.isfinite(tau):  # gradients overflow while a gradient scaler finds its scale
            return
        number = self.number(trainer)
        decay = _DECAY ** (number - self._looked)  # as if tau of the batches in between had been the same
        self.tau, self._looked = decay * self.tau + (1 - decay) * tau, number
        if (self.tau > self.threshold) != (len(self._changes) % 2 == 1):
            self._changes.append(number + self._delay)

    def state_dict(self) -> dict[str, Any]:
        """tau, and the batches at which the gate opens or closes, decided but future ones included."""
        return {"tau": self.tau, "looked": self._looked, "changes": list(self._changes), "delay": self._delay}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the gate, so that the resumed run gets the same batches as an uninterrupted one."""
        self.tau, self._looked = state_dict["tau"], state_dict["looked"]
        self._changes, self._delay = list(state_dict["changes"]), state_dict["delay"]

    # -- the clock --------------------------------------------------------------------------------------------------

    def is_plain(self) -> bool:
        """Whether the gate is closed, no scores are taken, and all samples of the batch are trained."""
        return self._gate == "closed" and self._loader is not None

    def step_kind(self) -> dict[str, Any]:
        """State of the gate: ``"open"``, ``"looks"`` or ``"closed"``."""
        return {"gate": self._gate}

    def impose_step_kind(self, trainer: Trainer, pl_module: LightningModule, kind: dict[str, Any]) -> None:
        """Set the gate as in a step of this kind."""
        self._gate = kind["gate"]
