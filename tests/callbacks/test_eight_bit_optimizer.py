"""8-bit optimizers against bitsandbytes' own, in a run; that a run resumes exactly is shown for every technique."""

from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from lightning.pytorch import Callback, Trainer

from lit_scale.callbacks import EightBitOptimizer
from lit_scale.cost import CostMeter
from lit_scale.guards import SafeCheckpointIO
from tests.support.data import loader
from tests.support.equality import assert_same
from tests.support.networks import build
from tests.support.training import fit, save_every_step

pytestmark = [pytest.mark.filterwarnings("ignore")]


def trained(
    root: Path, *callbacks: Callback, name: str = "plain_torch", resume: Path | None = None, **options: Any
) -> tuple[Any, Trainer]:
    module = build(name, seed=1 if resume else 0, **options.pop("build", {}))
    defaults: dict[str, Any] = {"max_epochs": 2, "plugins": [SafeCheckpointIO()]}
    return module, fit(module, loader(name), root, *callbacks, resume=resume, **(defaults | options))


@pytest.mark.parametrize("width", [16, 64])
def test_it_is_the_optimizer_that_bitsandbytes_has(width: int, tmp_path: Path) -> None:
    """On a network none of whose tensors is large enough for 8 bits, and on one that has such."""
    theirs: Any = {"optimizer": lambda p: bitsandbytes.optim.AdamW8bit(p, lr=3e-3, weight_decay=0.1)}
    one, trainer = trained(tmp_path, EightBitOptimizer(), build={"width": width})
    other, _ = trained(tmp_path, build={"width": width} | theirs)
    assert_same(one.state_dict(), other.state_dict())
    states = trainer.optimizers[0].state.values()
    assert any(state["state1"].dtype == torch.uint8 for state in states) is (width == 64)


def test_8_bit_state_is_what_the_record_says(tmp_path: Path) -> None:
    records = []
    for parts in ([], [EightBitOptimizer()], [EightBitOptimizer(embeddings=True)]):
        meter = CostMeter(repeats=0)
        _, trainer = trained(tmp_path, *parts, meter, name="bert", build={"width": 256, "depth": 2}, max_steps=1)
        records.append(meter.record(trainer, trainer.lightning_module)["optimizer_state_bytes"])
    plain, mixed, all_ = records
    assert 0.25 < all_ / plain < mixed / plain < 0.28


def test_a_checkpoint_of_the_one_does_not_go_on_as_the_other(tmp_path: Path) -> None:
    saver = save_every_step(tmp_path / "saved")
    trained(tmp_path, EightBitOptimizer(), saver, max_steps=2)
    path = tmp_path / "saved" / "step=2.ckpt"
    with pytest.raises(ValueError, match="trained with EightBitOptimizer, which is missing from this Trainer"):
        trained(tmp_path, CostMeter(), max_steps=4, resume=path)
    with pytest.raises(ValueError, match=r"EightBitOptimizer\(embeddings=True\) differs from the checkpoint's"):
        trained(tmp_path, EightBitOptimizer(embeddings=True), max_steps=4, resume=path)
