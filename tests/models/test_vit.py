import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from lightning.pytorch.cli import LightningArgumentParser
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lit_scale.callbacks import ProgressiveStacking
from lit_scale.cli import Recipe, RecipeCLI, run_recipe
from lit_scale.cli.report import saving_line
from lit_scale.datamodules import ImageDataModule
from lit_scale.factors.blocks import find_blocks
from lit_scale.models import ViTClassifier
from tests.support.data import as_loader
from tests.support.training import quiet_trainer, trained_and_reloaded

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*val_dataloader", "ignore:.*LeafSpec"
)

K, S = 7, 16


def vit(**options: Any) -> Any:
    torch.manual_seed(0)
    tiny: dict[str, Any] = {"num_classes": K, "image_size": S, "patch_size": 4, "depth": 2, "width": 16, "num_heads": 2}
    return ViTClassifier(**(tiny | options))


def batch_of(size: int = 4, seed: int = 0, side: int = S) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 3, side, side, generator=generator), torch.randint(K, (size,), generator=generator)


def loader_of(count: int = 10) -> DataLoader[Any]:
    return as_loader([batch_of(seed=seed) for seed in range(count)])


# -- the network ------------------------------------------------------------------------------------------------------


def test_it_is_timms() -> None:
    model, (images, _) = vit(drop_path=0.2), batch_of()
    torch.manual_seed(0)
    theirs = timm.create_model(
        "vit_tiny_patch16_224",
        num_classes=K,
        img_size=S,
        patch_size=4,
        depth=2,
        embed_dim=16,
        num_heads=2,
        drop_path_rate=0.2,
    )
    assert {name.removeprefix("net."): p.shape for name, p in model.named_parameters()} == {
        name: p.shape for name, p in theirs.named_parameters()
    }
    assert torch.equal(model.eval()(images), theirs.eval()(images))
    assert [block.drop_path1.drop_prob for block in model.net.blocks[1:]] == [pytest.approx(0.2)]
    assert (find_blocks(model).path, len(find_blocks(model))) == ("net.blocks", 2)


def test_initial_weights_have_the_scale_asked_for() -> None:
    wide, plain = vit(width=128, init_std=0.07), vit(width=128)
    linear = [name for name, part in wide.net.named_modules() if isinstance(part, torch.nn.Linear)]
    assert len(linear) == 2 * 4 + 1
    for name in linear:
        assert wide.net.get_submodule(name).weight.std().item() == pytest.approx(0.07, rel=0.1)
        assert plain.net.get_submodule(name).weight.std().item() == pytest.approx(0.02, rel=0.1)
    patches = [one.net.patch_embed.proj.weight.std().item() for one in (wide, plain)]
    assert patches[0] == pytest.approx(patches[1], rel=0.1)


def test_the_architecture_decides_what_is_not_given() -> None:
    model: Any = ViTClassifier("vit_tiny_patch16_224", num_classes=K, depth=1)
    assert model.net.embed_dim == 192
    assert model.net.patch_embed.patch_size == (16, 16)
    assert model.net.blocks[0].attn.num_heads == 3
    assert model.net.pos_embed.shape[1] == 14 * 14 + 1


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("resnet10t", {}),  # takes no image size
        ("eva02_tiny_patch14_224", {"image_size": 28, "depth": 1}),
        ("mixer_s32_224", {"image_size": 32}),  # takes one size only
        ("swin_tiny_patch4_window7_224", {"image_size": 56}),
    ],
)
def test_other_networks_of_timm(architecture: str, options: dict[str, Any]) -> None:
    model = ViTClassifier(architecture, num_classes=K, **({"image_size": 32} | options))
    images, labels = batch_of(2, side=model.hparams["image_size"])
    loss = model.per_sample_loss((images, labels))
    assert loss.shape == (2,)
    assert loss.isfinite().all()


def test_other_sizes_of_images_leave_the_parameters() -> None:
    model = vit()
    before = [(name, parameter.shape, id(parameter)) for name, parameter in model.named_parameters()]
    for side in (8, 12, 16, 24):
        assert model(batch_of(side=side)[0]).shape == (4, K)
    assert [(name, parameter.shape, id(parameter)) for name, parameter in model.named_parameters()] == before


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_the_loss_is_that_of_the_formula(smoothing: float) -> None:
    model, (images, labels) = vit(label_smoothing=smoothing), batch_of()
    target = torch.full((4, K), smoothing / K).scatter_add(1, labels[:, None], torch.full((4, 1), 1 - smoothing))
    expected = -(target * model(images).log_softmax(1)).sum(1)
    losses = model.per_sample_loss((images, labels))
    torch.testing.assert_close(losses, expected)
    for index, loss in enumerate(losses):
        torch.testing.assert_close(model.per_sample_loss((images[index, None], labels[index, None]))[0], loss)


@pytest.mark.filterwarnings("ignore:.*self.log")
def test_the_training_step_is_the_mean_of_the_per_sample_losses() -> None:
    model, batch = vit(label_smoothing=0.1), batch_of()
    torch.testing.assert_close(model.per_sample_loss(batch).mean(), model.training_step(batch, 0))


def test_the_first_loss_is_that_of_a_uniform_guess() -> None:
    assert vit(num_classes=100).per_sample_loss(batch_of(64)).mean().item() == pytest.approx(math.log(100), abs=0.1)


def test_it_can_be_compiled_in_one_piece() -> None:
    model, batch = vit(depth=1), batch_of()
    loss = torch.compile(model.per_sample_loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(loss(batch), model.per_sample_loss(batch))


# -- training ---------------------------------------------------------------------------------------------------------


def test_decay_is_for_matrices_only(tmp_path: Path) -> None:
    model = vit(weight_decay=0.3, lr=0.5, beta2=0.9)
    model.trainer = quiet_trainer(tmp_path, max_steps=10)
    optimizer = model.configure_optimizers()["optimizer"]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {g["weight_decay"]: {names.pop(id(p)) for p in g["params"]} for g in optimizer.param_groups}
    assert not names  # each parameter in one group
    assert set(groups) == {0.0, 0.3}
    assert {"net.pos_embed", "net.cls_token", "net.norm.weight", "net.head.bias"} <= groups[0.0]
    decayed = [model.get_parameter(name) for name in groups[0.3]]
    assert all(parameter.ndim in (2, 4) for parameter in decayed)
    assert len(decayed) == 2 * 4 + 2  # of each block, the patch embedding and the head
    assert isinstance(optimizer, torch.optim.AdamW)
    assert {(g["betas"], g["initial_lr"]) for g in optimizer.param_groups} == {((0.9, 0.9), 0.5)}


@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
def test_it_learns(optimizer: str, tmp_path: Path) -> None:
    model = vit(lr=0.01, optimizer=optimizer)
    before = sum(model.per_sample_loss(batch).mean().item() for batch in loader_of(4))
    trainer = quiet_trainer(tmp_path, max_epochs=40)
    trainer.fit(model, loader_of(4))
    assert sum(model.per_sample_loss(batch).mean().item() for batch in loader_of(4)) < 0.8 * before
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.0


@pytest.mark.filterwarnings("ignore:.*batch_size")
def test_metrics_are_those_of_the_whole_set(tmp_path: Path) -> None:
    model = vit(label_smoothing=0.5)
    batches = [batch_of(4, seed=1), batch_of(4, seed=2), batch_of(1, seed=3)]  # the last one is smaller
    loader = as_loader(batches)
    found = quiet_trainer(tmp_path).validate(model, loader, verbose=False)[0]
    logits, labels = torch.cat([model(images) for images, _ in batches]), torch.cat([labels for _, labels in batches])
    assert found["val/loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert found["val/accuracy"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())


def test_a_checkpoint_brings_model_and_settings_back(tmp_path: Path) -> None:
    model, (images, _) = vit(drop_path=0.1), batch_of()
    loaded = trained_and_reloaded(model, loader_of(), tmp_path)
    assert torch.equal(loaded.eval()(images), model.eval()(images))


def test_a_technique_of_the_checkpoint_must_not_be_missing(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, max_steps=4, callbacks=[ProgressiveStacking([(0.0, 0.5), (0.5, 1.0)])])
    trainer.fit(vit(), loader_of())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match="trained with ProgressiveStacking, which is missing"):
        quiet_trainer(tmp_path, max_steps=8).fit(vit(), loader_of(), ckpt_path=tmp_path / "last.ckpt")


# -- its arguments ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "vit_tinny_patch16_224"}, "unknown to timm; did you mean vit_tiny_patch16_224"),
        ({"architecture": "#?!"}, r"architecture='#\?!' is unknown to timm; timm.list_models\(\) has all names"),
        ({"image_size": 18}, "image_size=18 is not a multiple of the patch size, 4: choose 16 or 20"),
        ({"image_size": 3}, "image_size=3 is not a multiple of the patch size, 4: choose 4 or 4|cannot be made"),
        ({"patch_size": None}, None),
        (
            {"patch_size": None, "image_size": 20},
            "image_size=20 is not a multiple of the patch size, 16: choose 16 or 32",
        ),
        ({"architecture": "resnet10t"}, "patch_size=4: resnet10t takes no such argument"),
        ({"architecture": "resnet10t", "patch_size": None, "num_heads": None}, "depth=2: resnet10t takes no such"),
        ({"width": 15}, "width=15 is not a multiple of num_heads=2"),
        ({"width": 16, "num_heads": None}, "cannot be made with .*embed_dim=16"),
        ({"init_std": 0.0}, "init_std=0.0 is not above 0; 0.05 suits 128 channels"),
        ({"num_classes": 0}, "num_classes=0 must be at least 1"),
        ({"image_size": 0}, "image_size=0 must be at least 1"),
        ({"depth": 0}, "depth=0 must be at least 1"),
        ({"drop_path": 1.0}, r"drop_path=1.0 is not a rate in \[0, 1\)"),
        ({"label_smoothing": -0.1}, "label_smoothing=-0.1 is not a rate"),
        ({"warmup": 1.0}, "warmup=1.0 is not a fraction of the run"),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused(options: dict[str, Any], message: str | None) -> None:
    if message is None:
        vit(**options)
        return
    with pytest.raises(ValueError, match=message):
        vit(**options)


@pytest.mark.parametrize("label", [-1, K])
def test_classes_outside_of_the_models(label: int, tmp_path: Path) -> None:
    images, labels = batch_of()
    labels[2] = label
    loader = as_loader([(images, labels)])
    message = rf"the batch has classes from -?\d to \d, but num_classes={K} allows 0 to {K - 1}"
    for run in (quiet_trainer(tmp_path, max_steps=1).fit, quiet_trainer(tmp_path).validate):
        with pytest.raises(ValueError, match=message):
            run(vit(), loader)


@pytest.mark.parametrize("batch", [{"image": torch.zeros(1)}, torch.zeros(2, 3), (torch.zeros(2), torch.zeros(2))])
def test_batches_that_are_no_pairs(batch: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a batch has to be a pair of images and whole-numbered classes"):
        quiet_trainer(tmp_path, max_steps=1).fit(vit(), as_loader([batch]))


@pytest.fixture
def parser() -> LightningArgumentParser:
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_lightning_class_args(ViTClassifier, "model")
    return parser


def test_every_argument_is_a_flag(parser: LightningArgumentParser) -> None:
    flags = {name: value for name, value in vars(parser.parse_args([]).model).items() if not name.startswith("__")}
    assert flags == {n: p.default for n, p in inspect.signature(ViTClassifier).parameters.items()}
    assert parser.parse_args(["--model.depth=3", "--model.patch_size=null"]).model.depth == 3
    with pytest.raises(Exception, match="model.width"):
        parser.parse_args(["--model.width=wide"])


# -- in a recipe ------------------------------------------------------------------------------------------------------

DEFAULTS = {
    "trainer.max_steps": 600,
    "model.patch_size": 4,
    "model.depth": 4,
    "model.width": 32,
    "model.num_heads": 2,
    "model.lr": 3e-3,
    "data.image_size": 16,
    "data.batch_size": 32,
    "data.val_fraction": 0.2,
}


@pytest.fixture
def run(own_folder: Path) -> Callable[..., Any]:
    def run(*args: str) -> Any:
        flags = ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu", *args]
        return run_recipe(
            ViTClassifier, ImageDataModule, technique=ProgressiveStacking, defaults=DEFAULTS, args=flags, name="images"
        )

    return run


@pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli")
def test_the_data_tell_the_model_size_and_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = Recipe("tiny", "", [], ViTClassifier, ImageDataModule, (ProgressiveStacking,), DEFAULTS)
    cli = RecipeCLI(recipe, ["--data.image_size=8", "--seed_everything=3", "--trainer.accelerator=cpu"])
    own = cli.model.hparams
    assert (own["image_size"], own["num_classes"], cli.datamodule.seed) == (8, 10, 3)
    assert cli.model.net.head.out_features == 10


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli")
def test_digits_are_learned_far_above_chance(run: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    (record,) = run().values()
    assert 0.1 <= record["chance_accuracy"] < 0.2
    assert record["metrics"]["val/accuracy"] > 3 * record["chance_accuracy"]
    assert [stage["progressive_stacking/blocks"] for stage in record["stages"]] == [1, 2, 4]
    said = " ".join(capsys.readouterr().out.split())
    assert f"always the most frequent class would reach {record['chance_accuracy']:.1%}" in said
    assert f"validation accuracy {record['metrics']['val/accuracy']:.1%}" in saving_line(record)
