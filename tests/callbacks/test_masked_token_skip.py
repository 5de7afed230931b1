import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from lit_scale.callbacks import MaskedTokenSkip, ProgressiveStacking
from lit_scale.cost import CostMeter
from lit_scale.models import MaskedAutoencoder
from tests.support.data import PATCHES, pictures
from tests.support.equality import assert_same
from tests.support.networks import WIDTH, build, tiny_mae, viewer
from tests.support.training import fit, left, quiet_trainer, save_every_step

pytestmark = [pytest.mark.filterwarnings("ignore")]

STEPS = 8
SEEN = PATCHES // 4


def train(module: LightningModule, root: Path, *callbacks: Callback, size: int = 20, **options: Any) -> Trainer:
    data, val = pictures(size=size), pictures(size=4, shuffle=False)
    return fit(module, data, root, *callbacks, val=val, **({"max_steps": STEPS} | options))


class Lengths(Callback):
    """How many tokens reach the first block of encoder and decoder, in training and in validation."""

    def __init__(self) -> None:
        self.seen: dict[tuple[str, bool], set[int]] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for name in ("encoder.blocks.0", "decoder.0"):

            def look(block: nn.Module, args: Any, name: str = name) -> None:
                self.seen.setdefault((name, block.training), set()).add(args[0].shape[1])

            pl_module.get_submodule(name).register_forward_pre_hook(look)


# ---- what it changes


@pytest.mark.parametrize("skip", [True, False])
def test_the_encoder_sees_a_quarter_with_it_and_everything_without(skip: bool, tmp_path: Path) -> None:
    module, lengths = tiny_mae(), Lengths()
    train(module, tmp_path, *([MaskedTokenSkip()] if skip else []), lengths, val_check_interval=1)
    encoded, decoded = {1 + (SEEN if skip else PATCHES)}, {1 + PATCHES}  # with the class token
    assert lengths.seen == {
        (name, training): tokens
        for name, tokens in (("encoder.blocks.0", encoded), ("decoder.0", decoded))
        for training in (True, False)
    }
    assert module.encode_masked is not skip


@pytest.mark.parametrize("skip", [True, False])
def test_a_run_is_that_of_the_model_built_so_by_hand(skip: bool, tmp_path: Path) -> None:
    with_callback, by_hand = tiny_mae(), tiny_mae(encode_masked=not skip)
    one = left(train(with_callback, tmp_path, *([MaskedTokenSkip()] if skip else [])))
    other = left(train(by_hand, tmp_path))
    for part in ("weights", "optimizers", "metrics"):
        assert_same(one[part], other[part], part)


def test_both_hide_and_restore_the_same_pixels() -> None:
    module, (images, _) = tiny_mae(), next(iter(pictures()))
    expected = None
    for encode_masked in (True, False):
        module.encode_masked = encode_masked
        torch.manual_seed(3)
        targets = module.targets(images, module.random_order(images))
        assert expected is None or torch.equal(targets, expected)
        expected = targets


def test_the_clock_counts_what_the_formula_says(tmp_path: Path) -> None:
    each: dict[bool | None, int] = {}
    for skip in (True, False):
        meter = CostMeter(repeats=1, filename=f"{skip}.json")
        train(tiny_mae(), tmp_path, *([MaskedTokenSkip()] if skip else []), meter, size=32, limit_val_batches=0)
        shape, *priced = json.loads((tmp_path / f"{skip}.json").read_text())["step_kinds"]
        assert shape["plain"] is not skip
        assert [(other["plain"], other["count"]) for other in priced] == [(True, 0)] * skip  # a step without skipping
        for other in priced:
            each[None] = other["flops_each"]
        assert shape.get("masked_token_skip/encode_masked", True) is not skip
        assert shape["seconds_each"] > 0
        each[skip] = shape["flops_each"]
    # Of two blocks: the linear maps, 24 C^2 a token, once forward and twice backward; attention, 4 T^2 C, once forward
    # and 2.5 times backward. Beside them the projection to the decoder: of all patches, or of the seen and one token.
    tokens, kept, inner = 1 + PATCHES, 1 + SEEN, 8
    blocks = 2 * 4 * (3 * (tokens - kept) * 24 * WIDTH**2 + 3.5 * (tokens**2 - kept**2) * 4 * WIDTH)
    projection = 3 * 2 * WIDTH * inner * (4 * (tokens - kept) - 1)
    assert each[False] - each[True] == blocks + projection
    assert each[None] == each[False]


def test_the_encoder_can_grow_meanwhile(tmp_path: Path) -> None:
    module, lengths = tiny_mae(depth=4), Lengths()
    stacking = ProgressiveStacking([(0.0, 1), (0.25, 2), (0.5, 4)], blocks="encoder.blocks")
    meter = CostMeter(repeats=0)
    train(module, tmp_path, MaskedTokenSkip(), stacking, meter, lengths, limit_val_batches=0)
    shapes = json.loads((tmp_path / "result.json").read_text())["step_kinds"]
    assert {
        (shape["progressive_stacking/blocks"], shape["masked_token_skip/encode_masked"], shape["count"])
        for shape in shapes
    } == {
        (1, False, 2),
        (2, False, 2),
        (4, False, 4),
    }
    assert lengths.seen["encoder.blocks.0", True] == {1 + SEEN}


# ---- exact resume


def test_a_resumed_run_is_the_uninterrupted_one_from_any_step(tmp_path: Path) -> None:
    def run(*callbacks: Callback, resume: Path | None = None) -> Any:
        options: dict[str, Any] = {"val_check_interval": 1, "gradient_clip_val": 0.05}
        module = tiny_mae(seed=1 if resume else 0)
        return left(train(module, tmp_path, MaskedTokenSkip(), *callbacks, resume=resume, **options))

    whole = run(save_every_step(tmp_path / "whole"))
    for stop in range(1, STEPS):
        assert_same(whole, run(resume=tmp_path / "whole" / f"step={stop}.ckpt"), f"resumed at step {stop}")


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("half")
    trainer = train(tiny_mae(), folder, MaskedTokenSkip(), max_steps=4)
    trainer.save_checkpoint(folder / "half.ckpt")
    return folder / "half.ckpt"


def test_a_checkpoint_knows_how_it_was_trained(half: Path, tmp_path: Path) -> None:
    assert torch.load(half, weights_only=True)["lit_scale_techniques"] == {"MaskedTokenSkip": {"autoencoder": None}}
    module = MaskedAutoencoder.load_from_checkpoint(half)
    assert module.encode_masked is False
    data = pictures(size=8, shuffle=False)
    expected = quiet_trainer(tmp_path).validate(module, data, verbose=False)
    for callbacks in ([], [MaskedTokenSkip()]):
        trainer = quiet_trainer(tmp_path, callbacks=callbacks)
        assert trainer.validate(tiny_mae(seed=3), data, ckpt_path=half, verbose=False) == expected


def test_it_must_not_be_left_out_at_resume(half: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="trained with MaskedTokenSkip, which is missing"):
        train(tiny_mae(), tmp_path, resume=half)


def test_it_can_join_a_run_that_began_without_it(tmp_path: Path) -> None:
    train(tiny_mae(), tmp_path, max_steps=4).save_checkpoint(tmp_path / "plain.ckpt")
    module, lengths = tiny_mae(), Lengths()
    train(module, tmp_path, MaskedTokenSkip(), lengths, resume=tmp_path / "plain.ckpt")
    assert lengths.seen["encoder.blocks.0", True] == {1 + SEEN}
    assert module.encode_masked is False


# ---- bad input


class Pair(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = tiny_mae(), tiny_mae()


def test_one_of_several_autoencoders_is_chosen_by_name(tmp_path: Path) -> None:
    module = Pair()
    skip = MaskedTokenSkip("other")
    skip.setup(quiet_trainer(tmp_path, callbacks=[skip]), module, "fit")
    assert (module.one.encode_masked, module.other.encode_masked) == (True, False)
    assert skip.step_kind() == {"encode_masked": False}
    assert not skip.is_plain()
    skip.impose_step_kind(quiet_trainer(tmp_path), module, {"encode_masked": True})
    assert skip.is_plain()


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda: build("bert"), {}, "BertMLM holds no masked autoencoder.*for classifiers there is PatchDropping"),
        (lambda: viewer("timm"), {}, "Timm holds no masked autoencoder"),
        (Pair, {}, "Pair holds several autoencoders; choose one with autoencoder=: 'one', 'other'"),
        (Pair, {"autoencoder": "none"}, "autoencoder='none' has no switch encode_masked; those that have: 'one'"),
    ],
)
def test_a_module_without_the_switch_is_refused_at_setup(
    make: Any, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    skip = MaskedTokenSkip(**options)
    with pytest.raises(ValueError, match=message):
        skip.setup(quiet_trainer(tmp_path, callbacks=[skip]), make(), "fit")
