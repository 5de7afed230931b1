from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch.utils.data import DataLoader, Dataset

from lit_scale.callbacks import SequenceLengthWarmup
from lit_scale.cost import CostMeter
from lit_scale.datamodules import TextDataModule
from lit_scale.models import BertMLM
from tests.support.data import LENGTH, loader
from tests.support.equality import assert_same
from tests.support.networks import build
from tests.support.training import Ran, quiet_trainer, run, save_every_step

pytestmark = [pytest.mark.filterwarnings("ignore")]

STEPS = 8
STAGES = [(0.0, 0.25), (0.25, 0.5), (0.625, 1.0)]  # a quarter, half and all of the tokens, from steps 0, 2 and 5
PARTS = [4, 4, 2, 2, 2, 1, 1, 1]  # pieces that a sequence is cut into


def shapes(ran: Ran) -> list[tuple[int, ...]]:
    return [tuple(batch["input_ids"].shape) for batch in ran.watch.batches]


def text(corpus: Path, cache: Path, **options: Any) -> TextDataModule:
    defaults: dict[str, Any] = {"sequence_length": 16, "batch_size": 4, "max_val_sequences": 8, "cache_dir": cache}
    return TextDataModule(str(corpus), **(defaults | options))


def bert(seed: int = 0) -> BertMLM:
    torch.manual_seed(seed)
    return BertMLM(258, 16, depth=2, width=16, num_heads=2, dropout=0.1, positions="rotary")


def warm_up(module: LightningModule, data: Any, folder: Path, *also: Callback, **options: Any) -> Ran:
    limits: dict[str, Any] = {"max_steps": STEPS, "val_check_interval": 4, "check_val_every_n_epoch": None}
    return run(module, data, folder, SequenceLengthWarmup(STAGES), *also, **limits, **options)


@pytest.mark.parametrize("mask_rate", [0.15, 0.0])
def test_our_text_is_cut_before_it_is_masked(mask_rate: float, tiny_corpus: Path, tmp_path: Path) -> None:
    """Every step has as many tokens, and every sequence its share of predictions; without masks no token changes."""

    class Logits(BertMLM):
        def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
            if mask_rate:
                assert batch["positions"].shape == (batch["input_ids"].shape[0], max(1, round(0.15 * length(batch))))
                return super().training_step(batch, batch_idx)
            return self(batch["input_ids"]).mean()

        def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
            assert length(batch) == 16

    def length(batch: dict[str, torch.Tensor]) -> int:
        return batch["input_ids"].shape[1]

    module = Logits(258, 16, depth=1, width=16, num_heads=2)
    ran = warm_up(module, text(tiny_corpus, tmp_path, mask_rate=mask_rate), tmp_path)
    assert shapes(ran) == [(4 * parts, 16 // parts) for parts in PARTS]
    assert {length(batch) for batch in ran.watch.validated_batches} == {16}
    if not mask_rate:
        data = text(tiny_corpus, tmp_path, mask_rate=0.0)
        data.prepare_data()
        data.setup()
        for batch, whole in zip(ran.watch.batches, data.train_dataloader(), strict=False):
            assert torch.equal(batch["input_ids"].reshape(4, 16), whole["input_ids"])


@pytest.mark.parametrize("name", ["hf_bert", "hf_gpt2", "torch_encoder"])
def test_the_batches_of_any_network_are_cut_on_the_device(name: str, tmp_path: Path) -> None:
    found = warm_up(build(name), loader(name), tmp_path)
    assert shapes(found) == [(4 * parts, LENGTH // parts) for parts in PARTS]


def test_what_belongs_to_a_sample_goes_to_each_of_its_pieces() -> None:
    warmup = SequenceLengthWarmup(STAGES)
    warmup._sizes = [2, 4, 8]
    ids = torch.arange(16).view(2, 8)
    cut = warmup.shrink({"input_ids": ids, "label": torch.tensor([0, 1]), "vectors": ids[..., None].float()}, 4)
    assert cut["input_ids"].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
    assert cut["label"].tolist() == [0, 0, 1, 1]
    assert torch.equal(cut["vectors"][..., 0].long(), cut["input_ids"])
    with pytest.raises(ValueError, match=r"a tensor of shape \(2, 3\), which cannot be cut along"):
        warmup.shrink({"input_ids": ids, "positions": torch.zeros(2, 3)}, 4)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_is_the_uninterrupted_one(workers: int, tiny_corpus: Path, tmp_path: Path) -> None:
    def data() -> TextDataModule:
        return text(tiny_corpus, tmp_path, num_workers=workers)

    whole = warm_up(bert(), data(), tmp_path, save_every_step(tmp_path / "saved"))
    for stop in (1, 2, 5, 7):
        rest = warm_up(bert(seed=1), data(), tmp_path, resume=tmp_path / "saved" / f"step={stop}.ckpt")
        assert shapes(rest) == shapes(whole)[stop:]
        assert rest.watch.losses == whole.watch.losses[stop:]
        assert_same(whole.left, rest.left, f"resumed at step {stop}")


def test_the_clock_prices_each_length(tiny_corpus: Path, tmp_path: Path) -> None:
    meter = CostMeter(repeats=1)
    warm_up(bert(), text(tiny_corpus, tmp_path), tmp_path, meter)
    shapes = [shape for shape in meter.ledger.record()["step_kinds"] if shape["phase"] == "train"]
    assert [
        (shape["sequence_length_warmup/size"], shape["count"], shape["tokens"], shape["plain"]) for shape in shapes
    ] == [
        (4, 2, 64, False),
        (8, 3, 64, False),
        (16, 3, 64, True),
    ]
    assert all(shape["price"] == "replay" for shape in shapes)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([(0.0, 3), (0.5, 16)], "3 is 3 of 16 tokens, .* use one of 1, 2, 4, 8, 16"),
        ([(0.0, 0.3), (0.5, 1.0)], "0.3 is 4.8 of 16 tokens"),
        ([(0.0, 8), (0.5, 0.5)], "these are sizes of 8, 8; they must ascend to full size, which is 16 here"),
        ([(0.0, 8), (0.5, 32)], "32 is 32 of 16 tokens"),
    ],
)
def test_lengths_that_do_not_fit_are_refused_before_a_step(
    stages: Any, message: str, tiny_corpus: Path, tmp_path: Path
) -> None:
    trainer = quiet_trainer(tmp_path, callbacks=[SequenceLengthWarmup(stages)], max_steps=STEPS)
    with pytest.raises(ValueError, match=message):
        trainer.fit(bert(), text(tiny_corpus, tmp_path))
    assert trainer.global_step == 0


class Vectors(Dataset[Any]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"label": torch.tensor(index)}


def test_batches_without_sequences_are_refused(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, callbacks=[SequenceLengthWarmup(STAGES)], max_steps=STEPS)
    with pytest.raises(ValueError, match="the batch holds no sequences"):
        trainer.fit(build("hf_bert"), DataLoader(Vectors()))
