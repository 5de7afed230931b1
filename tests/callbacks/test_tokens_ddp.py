"""Techniques that leave tokens out, in two processes under plain DDP.

A test runs this file as a script; Lightning starts its second process, and both leave what they hold in a folder.
"""

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_scale.callbacks import MaskedTokenSkip, PatchDropping
from lit_scale.guards import StepSeed
from tests.support.data import pictures
from tests.support.networks import tiny_mae, viewer
from tests.support.training import quiet_trainer, save_every_step

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]

STEPS, RATE, TUNE = 6, 0.05, 0.5
CASES = ("mae", "mae, all tokens", "timm", "hf_vit")


def sgd(module: LightningModule) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=RATE, momentum=0.9)


def make(case: str, seed: int) -> tuple[Any, list[Callback]]:
    """The module, without dropout, and the technique."""
    if case.startswith("mae"):
        module: Any = tiny_mae(seed=seed)
        techniques: list[Callback] = [] if case == "mae, all tokens" else [MaskedTokenSkip()]
    else:
        module, techniques = viewer(case, seed=seed, dropout=0.0), [PatchDropping(tune=TUNE)]
    module.configure_optimizers = lambda: sgd(module)
    return module, techniques


class Watch(Callback):
    """The rank's losses, and after every step how far its parameters are from those of the other."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.gaps: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        self.losses.append(outputs["loss"].item())
        own = torch.cat([p.detach().flatten() for p in pl_module.parameters()])
        both = [torch.empty_like(own) for _ in range(trainer.world_size)]
        dist.all_gather(both, own)
        self.gaps.append((both[0] - both[1]).abs().max().item())


def by_hand(case: str) -> tuple[dict[str, torch.Tensor], list[list[float]]]:
    """The same run in plain PyTorch: each step takes the mean gradient over both ranks' batches, each with its mask.

    Returns:
        The weights, and the losses of each rank.
    """
    from timm.layers.patch_dropout import patch_dropout_forward

    module, _ = make(case, seed=0)
    share = 0.0
    if case == "mae":
        module.encode_masked = False
    elif not case.startswith("mae"):
        place, name, prefix = (module.net, "_pos_embed", 3) if case == "timm" else (module.net.embeddings, "forward", 1)
        whole = getattr(place, name)
        setattr(
            place, name, lambda *args, **kw: patch_dropout_forward(whole(*args, **kw), share, prefix, False, True)[0]
        )
    optimizer = sgd(module)
    streams = [iter(pictures(size=48, rank=rank, world_size=2)) for rank in (0, 1)]
    losses: list[list[float]] = [[], []]
    for step in range(STEPS):
        share = 0.5 if step < STEPS * (1 - TUNE) else 0.0
        optimizer.zero_grad()
        for rank, stream in enumerate(streams):
            digest = hashlib.blake2b(f"0/{rank}/{step}".encode(), digest_size=8).digest()
            torch.manual_seed(int.from_bytes(digest, "little") >> 1)
            loss = module.per_sample_loss(next(stream)).mean()
            (loss / 2).backward()
            losses[rank].append(loss.item())
        optimizer.step()
    return {key: value for key, value in module.state_dict().items() if "extra" not in key}, losses


def test_two_processes_draw_masks_of_their_own_agree_and_resume(
    run_python: Callable[..., CompletedProcess[str]], tmp_path: Path
) -> None:
    result = run_python(Path(__file__), tmp_path, timeout=280)
    assert result.returncode == 0, result.stderr[-3_000:]
    for case in CASES:
        weights, losses = by_hand(case)
        for rank in (0, 1):
            whole, resumed = (torch.load(tmp_path / case / f"{phase}-{rank}.pt") for phase in ("whole", "resumed"))
            assert whole["gaps"] == [0.0] * STEPS, case
            assert whole["losses"] == pytest.approx(losses[rank], rel=1e-4), case
            for key, value in weights.items():
                torch.testing.assert_close(whole["weights"][key], value, atol=1e-5, rtol=1e-4, msg=f"{case}: {key}")
            assert resumed["losses"] == whole["losses"][2:], case
            assert all(torch.equal(whole["weights"][key], resumed["weights"][key]) for key in weights), case
        assert losses[0] != losses[1]


# ---- what the two processes run


def main(case: str, folder: Path) -> None:
    for phase in ("whole", "resumed"):
        module, techniques = make(case, seed=0 if phase == "whole" else 1)
        watch = Watch()
        saving = [save_every_step(folder / "steps")] if phase == "whole" else []
        trainer = quiet_trainer(
            folder,
            max_steps=STEPS,
            strategy="ddp",
            devices=2,
            callbacks=[StepSeed(), *techniques, watch, *saving],
            enable_checkpointing=bool(saving),
        )
        trainer.fit(module, pictures(size=48), ckpt_path=None if saving else folder / "steps" / "step=2.ckpt")
        weights = dict(module.state_dict())
        found = {"weights": weights, "losses": watch.losses, "gaps": watch.gaps}
        torch.save(found, folder / f"{phase}-{trainer.global_rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for one in CASES:
        Path(sys.argv[1], one).mkdir(exist_ok=True)
        main(one, Path(sys.argv[1], one))
