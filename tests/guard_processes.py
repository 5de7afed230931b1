"""Training scripts in processes of their own, for tests of the guards: signalled, killed, and left alone."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_scale.guards import load_checkpoint

ROOT = Path(__file__).resolve().parents[1]


RANK_VARIABLES = ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


# Training with dropout, shuffled data and accumulation over two batches. Slow where it is to be signalled: from step 3.
TRAINING = """
import os, sys, time
from pathlib import Path

import lightning.pytorch as pl
import torch
from lit_scale.datamodules.loader import ResumableLoader
from lit_scale.guards import FiniteGuard, PreemptionGuard, SafeCheckpointIO, StepSeed, shield_worker

torch.set_num_threads(1)


class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return 96

    def __getitem__(self, index):
        return torch.randn(4, generator=torch.Generator().manual_seed(index))


class Net(pl.LightningModule):
    def __init__(self, pause=0.0, fault=False):
        super().__init__()
        torch.manual_seed(0)
        self.body = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 2))
        self.pause, self.fault = pause, fault

    def training_step(self, batch, batch_idx):
        if self.trainer.global_step >= 3:
            time.sleep(self.pause)
        loss = (self.body(batch) - 1).square().mean()
        if self.fault and batch_idx == 5 and self.trainer.global_rank == 1:
            loss = loss + float("inf")
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class Tell(pl.Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 3:
            print(f"rank {trainer.global_rank} is {os.getpid()}", flush=True)

    def on_exception(self, trainer, module, exception):
        print(f"rank {trainer.global_rank} raised {type(exception).__name__}: {exception}", flush=True)


def fit(root, path=None, pause=0.0, ranks=1, workers=0, guard=True, fault=False):
    root = Path(root)
    callbacks = [StepSeed(), Tell(), FiniteGuard()] + ([PreemptionGuard(root / "saved")] if guard else [])
    trainer = pl.Trainer(
        accelerator="cpu", devices=ranks, strategy="ddp" if ranks > 1 else "auto", max_epochs=2, default_root_dir=root,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, accumulate_grad_batches=2, callbacks=callbacks, plugins=[SafeCheckpointIO()],
    )
    shield = {"worker_init_fn": shield_worker, "num_workers": workers} if workers else {}
    loader = ResumableLoader(Numbers(), batch_size=2, shuffle=True, seed=3, **shield)
    trainer.fit(Net(pause, fault), loader, ckpt_path=path)
    return trainer


if __name__ == "__main__":
    options = eval(sys.argv[2])
    linger = options.pop("linger", 0)
    try:
        trainer = fit(sys.argv[1], **options)
    finally:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            time.sleep(linger)  # as if it had logs to bring away
    trainer.save_checkpoint(Path(sys.argv[1]) / "end.ckpt")
"""


class Run:
    """A training script in a process group of its own, what it says, and how it ends."""

    def __init__(self, root: Path, **options: Any) -> None:
        root.mkdir(exist_ok=True)
        self.root = root
        script = root / "train.py"
        script.write_text(TRAINING)
        variables = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
        self.log = root / "log.txt"
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(script), str(root), repr(options)],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=variables | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
                start_new_session=True,
            )

    def ranks(self, count: int) -> list[int]:
        """Process ids by rank, once all are in the middle of training."""
        deadline = time.monotonic() + 150  # of which a quiet machine needs 10
        while time.monotonic() < deadline and self.process.poll() is None:
            found = dict(re.findall(r"rank (\d) is (\d+)\n", self.log.read_text()))
            if len(found) == count:
                return [int(found[str(rank)]) for rank in range(count)]
            time.sleep(0.05)
        raise AssertionError(f"training did not get under way:\n{self.log.read_text()}")

    def ended(self) -> tuple[int, float]:
        """Exit code, and the seconds it took from now; no process is left behind."""
        start = time.monotonic()
        code = self.process.wait(timeout=120)
        seconds = time.monotonic() - start
        print(self.log.read_text())  # shown if the test fails
        with pytest.raises(ProcessLookupError):  # the group is empty
            os.killpg(self.process.pid, 0)
        return code, seconds

    @property
    def saved(self) -> Path:
        (path,) = (self.root / "saved").iterdir()
        assert f"saved {path}; resume with" in self.log.read_text()
        return path


def assert_same_end(path: Path, other: Path) -> None:
    a, b = load_checkpoint(path), load_checkpoint(other)
    assert a["global_step"] == b["global_step"]
    for name, value in a["state_dict"].items():
        assert torch.equal(value, b["state_dict"][name]), name
    moments, others = (x["optimizer_states"][0]["state"] for x in (a, b))
    for index, state in moments.items():
        assert all(torch.equal(value, others[index][key]) for key, value in state.items())
