"""Importance sampling by gradient norms (Katharopoulos and Fleuret, ICML 2018, arXiv 1803.00942, algorithm 1).

    of B = 3b samples draw b with p_i ~ |dL_i / d output|, each with weight 1 / (B p_i), while tau > (B + 3b) / 3b

The weighted gradient has the mean of the plain one over all B samples and, by tau, less variance than what it costs.
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

_DECAY = 0.9  # of tau, a step; the paper's code


def variance_ratio(scores: Tensor) -> float:
    """How many times as large a uniform batch would have to be for the variance that drawing by score leaves: tau.

    With g the scores' shares and u = 1 / B the paper has 1 / sqrt(1 - |g - u|^2 / |g|^2), which is sqrt(B) |g|.

    Args:
        scores: Of all samples (B,); a common factor does not matter.

    Example:
        >>> variance_ratio(torch.ones(8)), variance_ratio(torch.eye(16)[0])
        (1.0, 4.0)
    """
    exact = scores.cpu().double()
    return float(exact.square().mean().sqrt() / exact.mean())


def draw(scores: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw samples by score, with replacement, and the weights that leave the mean over all of them unbiased.

    Args:
        scores: Of all samples (B,), at least 0; where all are 0 the draw is uniform.
        count: How many, b.
        generator: On the CPU.

    Returns:
        Indices (b,) and weights 1 / (B p), (b,).

    Example:
        >>> draw(torch.tensor([0.0, 3.0, 0.0]), 2, torch.Generator())
        (tensor([1, 1]), tensor([0.3333, 0.3333]))
    """
    exact = scores.cpu().double()
    if not exact.isfinite().all():  # the step is to meet the sample that has no finite loss, and the guard its loss
        exact = (~exact.isfinite()).double()
    if not exact.any():
        exact = torch.ones_like(exact)
    p = exact / exact.sum()
    index = torch.multinomial(p, count, replacement=True, generator=generator)
    return index.to(scores.device), (1 / (len(p) * p[index])).float().to(scores.device)


class ImportanceSampling(SampleChoice):
    """Trains on the samples of a larger batch that move the weights most, while that pays.

    While the gate is closed, steps are plain, and every ``look_every``-th step records the gradients of its own output,
    from which tau is computed. When tau shows that choosing pays, the gate opens: the loader takes ``presample`` times
    as many samples, one forward pass without dropout scores them, and the usual number is trained.

    The module needs ``per_sample_loss(batch) -> (B,)``, and ``training_step`` has to return its mean.

    A :class:`~lit_scale.datamodules.loader.ResumableLoader` over a dataset that takes a plan, as in our data modules,
    gets the sizes of its batches ahead of time. The gate's decisions then take effect after all batches that workers
    may already have prepared. With any other loader each batch is the presample, and ``1 / presample`` of it is
    trained, the first samples while the gate is closed; give it a batch size that is ``presample`` times as large.

    Args:
        presample: How many times as many samples are scored as are trained, b. The gate can open only where b is above
            the square of ``threshold``, since tau of b samples is at most the root of b.
        threshold: The gate is open while tau is above; None is where choosing pays, ``(presample + 3) / 3``, a step's
            backward pass costing two forward ones.
        look_every: Batches from one record of the scores to the next while the gate is closed.
        output: Path of the last layer; None finds the output by itself
            (:func:`lit_scale.factors.scores.output_gradients`).
        seed: Of the draws, which are a function of (seed, rank, batch counter).

    Raises:
        ValueError: At construction, in ``setup``, or with the first batch, before anything is trained.

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
        self._looked = -1  # the batch of the latest tau
        self._changes: list[int] = []  # batches from which on the gate is open, closed, open...
        self._delay = 1  # batches after which a decision takes effect
        self._gate = "closed"  # or "looks", or "open": in the current batch
        self._looks: list[list[Tensor]] = []  # squared scores of the batches since the last optimizer step
        self._checked = False

    def settings(self) -> dict[str, Any]:
        """The arguments, as plain values for the checkpoint."""
        return {name: getattr(self, name) for name in ("presample", "threshold", "look_every", "output", "seed")}

    # -- the batch --------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin with a closed gate; check that the named last layer exists."""
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
        """Give the loader the plan, or warn of a loader that takes none."""
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
        """Of few samples tau, at most the root of their number, may never reach the threshold."""
        if self.threshold >= (most := math.sqrt(count)):
            rank_zero_warn(
                f"ImportanceSampling: of {count} samples tau is at most {most:.3g}, and the gate opens above "
                f"{self.threshold:.3g}, so it stays closed: train more than {math.floor(self.threshold**2)} samples a "
                "step, or lower presample"
            )

    def samples(self, number: int, count: int) -> int:
        """More while the gate is open."""
        return count * self.presample if self._is_open(number) else count

    def _is_open(self, number: int) -> bool:
        return bisect_right(self._changes, number) % 2 == 1

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set what this step does; before the first one, check that the module's output can be scored."""
        if not self._checked:
            with trainer.precision_plugin.forward_context():
                check_outputs(pl_module, batch, self.output)
            self._checked = True
        number = self.number(trainer)
        looks = number % self.look_every == 0
        self._gate = "open" if self._is_open(number) else "looks" if looks else "closed"
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def logged(self, trainer: Trainer) -> dict[str, float]:
        """Tau, and whether the gate is open."""
        return {"tau": self.tau, "open": float(self._gate == "open")}

    def train(self, trainer: Trainer, pl_module: LightningModule, step: Step, batch: Any) -> Any:
        """Score and draw, or make the plain step."""
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
        """Update tau, equal on all ranks, and the gate, before a checkpoint is saved."""
        looks, self._looks = self._looks, []
        if not looks:
            return
        taus = [variance_ratio(torch.stack(squares).sum(0).sqrt()) for squares in looks]
        now = torch.tensor(sum(taus) / len(taus), device=pl_module.device)
        if trainer.world_size > 1:
            dist.all_reduce(now)
            now /= trainer.world_size
        tau = now.item()
        if self._ended or not math.isfinite(tau):  # a gradient scaler tries out infinities
            return
        number = self.number(trainer)
        decay = _DECAY ** (number - self._looked)  # as if the batches between had been like this one
        self.tau, self._looked = decay * self.tau + (1 - decay) * tau, number
        if (self.tau > self.threshold) != (len(self._changes) % 2 == 1):
            self._changes.append(number + self._delay)

    def state_dict(self) -> dict[str, Any]:
        """Tau, and from which batches on the gate is open or closed, future ones included."""
        return {"tau": self.tau, "looked": self._looked, "changes": list(self._changes), "delay": self._delay}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the gate, so that batches are those of the uninterrupted run."""
        self.tau, self._looked = state_dict["tau"], state_dict["looked"]
        self._changes, self._delay = list(state_dict["changes"]), state_dict["delay"]

    # -- the clock --------------------------------------------------------------------------------------------------

    def is_plain(self) -> bool:
        """The gate is closed, nothing is looked at, and the batch is trained whole."""
        return self._gate == "closed" and self._loader is not None

    def step_kind(self) -> dict[str, Any]:
        """Whether samples are chosen, or at least looked at."""
        return {"gate": self._gate}

    def impose_step_kind(self, trainer: Trainer, pl_module: LightningModule, kind: dict[str, Any]) -> None:
        """Choose as an earlier step did."""
        self._gate = kind["gate"]
