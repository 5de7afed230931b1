import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

from lit_scale.callbacks import ImportanceSampling, RhoLoss, SelectiveBackprop
from lit_scale.factors.scores import sample_losses
from tests.support.networks import PlainTorch
from tests.support.training import quiet_trainer

pytestmark = [pytest.mark.filterwarnings("ignore")]


class WithoutLosses(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])


@pytest.mark.parametrize(
    "technique",
    [ImportanceSampling(), SelectiveBackprop(), RhoLoss(PlainTorch())],
    ids=lambda technique: type(technique).__name__,
)
def test_a_module_without_losses_of_samples_is_told_how_to_have_them(technique: Any, tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, callbacks=[technique], max_steps=1)
    with pytest.raises(ValueError, match="WithoutLosses has no method per_sample_loss") as caught:
        technique.setup(trainer, WithoutLosses(), "fit")
    lines = textwrap.dedent(re.split(r"\n\n", str(caught.value), maxsplit=1)[1])
    own: dict[str, Any] = {"torch": torch}
    exec(lines, own)  # what the message says is enough
    mended = type("Mended", (WithoutLosses,), {n: own[n] for n in ("per_sample_loss", "training_step")})()
    mended.log = lambda *_: None
    batch = (torch.randn(4, 3), torch.tensor([0, 1, 1, 0]))
    torch.testing.assert_close(mended.training_step(batch, 0), WithoutLosses.training_step(mended, batch, 0))
    assert sample_losses(mended, batch).shape == (4,)
