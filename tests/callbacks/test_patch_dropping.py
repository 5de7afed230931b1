import copy
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn

from lit_scale.callbacks import PatchDropping, ProgressiveStacking
from lit_scale.cost import CostMeter
from lit_scale.models import ViTClassifier
from tests.support.data import PATCHES, as_loader, loader, pictures
from tests.support.equality import assert_same, same
from tests.support.networks import DEPTH, VIEWERS, WIDTH, Viewer, all_blocks, build, viewer
from tests.support.training import fit, left, quiet_trainer, save_every_step

pytestmark = [pytest.mark.filterwarnings("ignore")]

STEPS = 8


class Tokens(Callback):
    """What reaches the first block: (optimizer steps done, tokens (B, T, C)) of each batch."""

    def __init__(self) -> None:
        self.train: list[tuple[int, Tensor]] = []
        self.validation: list[Tensor] = []

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        def look(block: nn.Module, args: Any, kwargs: Any) -> None:
            tokens = (args or tuple(kwargs.values()))[0].detach()
            if block.training:
                self.train.append((trainer.global_step, tokens))
            else:
                self.validation.append(tokens)

        first = all_blocks(pl_module, pl_module.blocks)[0]
        self.hook = first.register_forward_pre_hook(look, with_kwargs=True)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.hook.remove()


def train(
    module: Viewer, root: Path, dropping: PatchDropping | None, *callbacks: Callback, size: int = 20, **options: Any
) -> Trainer:
    parts = callbacks if dropping is None else (dropping, *callbacks)
    data, val = pictures(size=size), pictures(size=4, shuffle=False)
    return fit(module, data, root, *parts, val=val, **({"max_steps": STEPS} | options))


# ---- what is dropped


@pytest.mark.parametrize("fraction", [0.5, 0.75])
@pytest.mark.parametrize("name", VIEWERS)
def test_a_random_part_of_each_images_patches_stays_and_all_tokens_before_them(
    name: str, fraction: float, tmp_path: Path
) -> None:
    module, tokens = viewer(name, dropout=0.0), Tokens()
    before = copy.deepcopy(module)
    dropping = PatchDropping(fraction, tune=0.0, **module.options)
    train(module, tmp_path, dropping, tokens, max_steps=1, val_check_interval=1)
    ((_, found),) = tokens.train

    whole = Tokens()  # the same batch and weights, whole images
    train(before, tmp_path, None, whole, max_steps=1)
    ((_, expected),) = whole.train
    kept = round(PATCHES * (1 - fraction))
    assert expected.shape[1] == module.prefix + PATCHES
    assert found.shape[1] == module.prefix + kept
    assert torch.equal(found[:, : module.prefix], expected[:, : module.prefix])
    chosen = []
    for one, all_ in zip(found[:, module.prefix :], expected[:, module.prefix :], strict=True):
        where = (one[:, None] == all_[None]).all(-1)  # (kept, patches)
        assert where.sum(1).tolist() == [1] * kept  # each is one of the image's patches
        chosen.append(frozenset(where.int().argmax(1).tolist()))
        assert len(chosen[-1]) == kept  # none twice
    assert len(set(chosen)) > 1  # of its own for each image
    assert {seen.shape[1] for seen in tokens.validation} == {module.prefix + PATCHES}


def test_it_trains_as_timms_own_patch_dropout_does(tmp_path: Path) -> None:
    from timm.layers import PatchDropout

    weights = []
    for own in (True, False):
        module = viewer("timm")
        if own:
            module.net.patch_drop = PatchDropout(0.5, num_prefix_tokens=3)
        train(module, tmp_path, None if own else PatchDropping(0.5, tune=0.0))
        weights.append(module.state_dict())
    assert same(*weights)
    assert not same(weights[0], viewer("timm").state_dict())


@pytest.mark.parametrize("name", ["timm", "hf_vit"])
@pytest.mark.parametrize(
    ("limits", "tune", "dropped"),
    [
        ({}, 0.0, [1] * 8),
        ({}, 0.25, [1, 1, 1, 1, 1, 1, 0, 0]),  # progress 6/8 is where the last quarter begins
        ({}, 0.2, [1, 1, 1, 1, 1, 1, 1, 0]),  # 6/8 is before 0.8, 7/8 is not
        ({"max_steps": -1, "max_epochs": 2, "size": 16}, 0.5, [1, 1, 1, 1, 0, 0, 0, 0]),
        ({"max_steps": 4, "accumulate_grad_batches": 2, "size": 16}, 0.5, [1, 1, 1, 1, 0, 0, 0, 0]),
    ],
    ids=str,
)
def test_the_end_of_the_run_sees_whole_images(
    name: str, limits: dict[str, Any], tune: float, dropped: list[int], tmp_path: Path
) -> None:
    module, tokens = viewer(name), Tokens()
    train(module, tmp_path, PatchDropping(tune=tune), tokens, **limits)
    assert [int(seen.shape[1] < module.prefix + PATCHES) for _, seen in tokens.train] == dropped


@pytest.mark.parametrize("name", VIEWERS)
def test_evaluation_and_what_is_left_behind_are_the_plain_networks(name: str, tmp_path: Path) -> None:
    module = viewer(name)
    parts = dict(module.net.named_modules())
    before = {path: (type(part), set(part.__dict__), set(part._modules)) for path, part in parts.items()}
    trainer = train(module, tmp_path, PatchDropping(tune=0.0, **module.options), val_check_interval=1)
    parts = dict(module.net.named_modules())
    assert {path: (type(part), set(part.__dict__), set(part._modules)) for path, part in parts.items()} == before
    plain = viewer(name, seed=1)
    plain.load_state_dict(module.state_dict())
    (expected,) = quiet_trainer(tmp_path).validate(plain, pictures(size=4, shuffle=False), verbose=False)
    assert trainer.callback_metrics["val/loss"].item() == expected["val/loss"]


class Fails(Callback):
    def on_train_batch_end(self, *_: Any) -> None:
        raise RuntimeError("half way")


@pytest.mark.parametrize("name", ["timm", "timm_rotary", "hf_vit"])
def test_an_exception_leaves_a_plain_network_behind(name: str, tmp_path: Path) -> None:
    module = viewer(name, dropout=0.0)
    images = next(iter(pictures()))[0]
    with pytest.raises(RuntimeError, match="half way"):
        train(module, tmp_path, PatchDropping(), Fails())
    module.train()
    assert torch.equal(module.logits({"image": images}), module.logits({"image": images}))  # nothing random is left


def test_a_forward_that_somebody_put_on_the_embedding_survives(tmp_path: Path) -> None:
    module = viewer("hf_vit")
    own, calls = module.net.embeddings.forward, []

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        return own(*args, **kwargs)

    module.net.embeddings.forward = counted
    train(module, tmp_path, PatchDropping(), limit_val_batches=0)
    assert module.net.embeddings.forward is counted
    assert len(calls) == STEPS


class Named(Viewer):
    """A network of another library by its name, with as few blocks as it can have."""

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(depth=2)

    def build(self, depth: int, dropout: float) -> nn.Module:
        import transformers

        if self.name == "torchvision":
            from torchvision.models import VisionTransformer

            return VisionTransformer(8, 2, depth, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=4)
        kind, config = getattr(transformers, f"{self.name}Model"), getattr(transformers, f"{self.name}Config")
        sizes = {"hidden_size": 16, "num_hidden_layers": depth, "num_attention_heads": 2, "intermediate_size": 32}
        return kind(config(image_size=8, patch_size=2, **sizes))

    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        found = self.net(batch["image"])
        return found if self.name == "torchvision" else found.last_hidden_state.mean(1)[:, :4]


@pytest.mark.parametrize(
    ("name", "prefix", "options"),
    [
        ("DeiT", 2, {}),
        ("Dinov2", 1, {}),
        ("Dinov2WithRegisters", 5, {}),
        ("SiglipVision", 0, {}),
        ("torchvision", 1, {"embedding": "net.encoder.dropout", "prefix": 1}),
    ],
)
def test_other_libraries_networks(name: str, prefix: int, options: dict[str, Any], tmp_path: Path) -> None:
    module = Named(name)
    lengths: list[tuple[bool, int]] = []
    blocks = [part for part in module.modules() if hasattr(part, "self_attention") or hasattr(part, "mlp")]
    blocks[0].register_forward_pre_hook(
        lambda block, args, kwargs: lengths.append((block.training, (args or tuple(kwargs.values()))[0].shape[1])),
        with_kwargs=True,
    )
    train(module, tmp_path, PatchDropping(tune=0.5, **options), max_steps=2, val_check_interval=2)
    assert lengths == [(True, prefix + PATCHES // 2), (True, prefix + PATCHES), (False, prefix + PATCHES)]


def test_our_own_classifier_at_two_resolutions(tmp_path: Path) -> None:
    module: Any = ViTClassifier(num_classes=4, image_size=8, patch_size=2, depth=2, width=16, num_heads=2)
    lengths: list[int] = []
    module.net.blocks[0].register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    large = [(torch.randn(4, 3, 16, 16), torch.arange(4)) for _ in range(2)]
    trainer = quiet_trainer(tmp_path, max_steps=4, callbacks=[PatchDropping(tune=0.25)])
    trainer.fit(module, as_loader([*large, *itertools.islice(pictures(), 2)]))
    assert lengths == [1 + 32, 1 + 32, 1 + 8, 1 + 16]


@pytest.mark.parametrize("name", ["timm", "timm_rotary", "hf_vit"])
def test_with_progressive_stacking_and_averages_of_weights(name: str, tmp_path: Path) -> None:
    module, tokens = viewer(name), Tokens()
    stacking = ProgressiveStacking([(0.0, 2), (0.5, 4)], blocks=module.blocks)
    average = EMAWeightAveraging(decay=0.5)
    train(module, tmp_path, PatchDropping(tune=0.25), stacking, average, tokens, limit_val_batches=0)
    lengths = [seen.shape[1] - module.prefix for _, seen in tokens.train]
    assert lengths == [PATCHES // 2] * 6 + [PATCHES] * 2
    assert len(list(module.get_submodule(module.blocks).children())) == 4


def test_a_compiled_network_drops_as_an_eager_one_does(tmp_path: Path) -> None:
    weights, graphs = [], []
    for compiled in (False, True):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        module = viewer("timm", dropout=0.0, depth=1)
        if compiled:
            module.net.compile(backend="eager")
        train(module, tmp_path, PatchDropping(tune=0.5), limit_val_batches=0, max_steps=4)
        weights.append(module.state_dict())
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert same(*weights)
    assert graphs[0] == 0
    assert graphs[1] >= 2  # one that drops, one that does not


# ---- exact resume


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("timm", {}),
        ("timm", {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05, "max_steps": 4}),
        ("timm_rotary", {}),
        ("hf_vit", {}),
        ("plain", {}),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    def run(*callbacks: Callback, resume: Path | None = None) -> Any:
        module = viewer(name, seed=1 if resume else 0)
        dropping = PatchDropping(tune=0.25, **module.options)
        return left(train(module, tmp_path, dropping, *callbacks, resume=resume, val_check_interval=1, **options))

    whole = run(save_every_step(tmp_path / "whole"))
    for stop in (1, 2) if options else (1, 5, 6, 7):  # in an epoch, at its end, where the tuning begins, inside it
        assert_same(whole, run(resume=tmp_path / "whole" / f"step={stop}.ckpt"), f"resumed at step {stop}")


def test_without_counted_randomness_a_resumed_run_drops_other_patches(tmp_path: Path) -> None:
    def run(*callbacks: Callback, resume: Path | None = None) -> dict[str, Tensor]:
        module = viewer("timm", seed=1 if resume else 0, dropout=0.0)  # nothing else is random
        torch.manual_seed(7)
        options: dict[str, Any] = {"max_steps": 4, "step_seed": False, "resume": resume}
        return fit(module, pictures(), tmp_path, PatchDropping(), *callbacks, **options).lightning_module.state_dict()

    whole = run(save_every_step(tmp_path / "whole"))
    assert_same(whole, run())
    assert not same(whole, run(resume=tmp_path / "whole" / "step=2.ckpt"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 0.25}, r"fraction=0.25.* differs from the checkpoint's fraction=0.5"),
        ({"tune": 0.5}, r"tune=0.5.* differs from the checkpoint's tune=0.05"),
    ],
)
def test_settings_must_not_change_at_resume(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    trainer = train(viewer("timm"), tmp_path, PatchDropping(), max_steps=2)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    marks = torch.load(tmp_path / "last.ckpt", weights_only=True)["lit_scale_techniques"]
    assert marks == {"PatchDropping": {"fraction": 0.5, "tune": 0.05, "embedding": None, "prefix": None}}
    with pytest.raises(ValueError, match=message):
        train(viewer("timm"), tmp_path, PatchDropping(**options), resume=tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match="trained with PatchDropping, which is missing"):
        train(viewer("timm"), tmp_path, None, CostMeter(repeats=0), resume=tmp_path / "last.ckpt")


# ---- the clock


@pytest.mark.parametrize("name", ["timm", "hf_vit"])
def test_the_clock_knows_two_kinds_of_step(name: str, tmp_path: Path) -> None:
    module = viewer(name, dropout=0.0)
    train(module, tmp_path, PatchDropping(tune=0.25), CostMeter(repeats=1), size=32, limit_val_batches=0)
    record = json.loads((tmp_path / "result.json").read_text())
    shapes = {shape["patch_dropping/dropped"]: shape for shape in record["step_kinds"]}
    assert {dropped: (shape["count"], shape["plain"]) for dropped, shape in shapes.items()} == {
        0.5: (6, False),
        0.0: (2, True),
    }
    assert [stage["patch_dropping/dropped"] for stage in record["stages"]] == [0.5, 0.0]
    assert all(shape["seconds_each"] > 0 for shape in shapes.values())

    meter = CostMeter(repeats=0, filename="plain.json")
    train(viewer(name, dropout=0.0), tmp_path, None, meter, size=32, max_steps=1, limit_val_batches=0)
    (plain,) = json.loads((tmp_path / "plain.json").read_text())["step_kinds"]
    assert shapes[0.0]["flops_each"] == plain["flops_each"]
    # A token that is gone saves in each block the linear maps, 2 (4 + 2 r) C^2 with a hidden layer of r C channels,
    # once forward and twice backward; and attention, 4 T^2 C for T tokens, once forward and 2.5 times backward.
    ratio, tokens, kept = (4 if name == "timm" else 2), module.prefix + PATCHES, module.prefix + PATCHES // 2
    linear = 3 * (tokens - kept) * 2 * (4 + 2 * ratio) * WIDTH**2
    attention = 3.5 * (tokens**2 - kept**2) * 4 * WIDTH
    assert shapes[0.0]["flops_each"] - shapes[0.5]["flops_each"] == 4 * DEPTH * (linear + attention)


# ---- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 0.0}, "fraction=0.0 must lie between 0 and 1"),
        ({"fraction": 1.0}, "fraction=1.0 must lie between 0 and 1"),
        ({"fraction": math.nan}, "fraction=nan"),
        ({"tune": 1.0}, "tune=1.0 is not a fraction of the run"),
        ({"tune": -0.1}, "tune=-0.1 is not a fraction of the run"),
        ({"prefix": 1}, "prefix=1: give it along with embedding"),
        ({"prefix": -1, "embedding": "net"}, "prefix=-1.*not negative"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_at_construction(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PatchDropping(**options)


class Pair(Viewer):
    def build(self, depth: int, dropout: float) -> nn.Module:
        return nn.ModuleList([viewer("timm").net, viewer("timm").net])


class Dropping(Viewer):
    def build(self, depth: int, dropout: float) -> nn.Module:
        import timm

        return timm.create_model("vit_tiny_patch16_224", img_size=32, patch_drop_rate=0.25)


class Swin(Viewer):
    def build(self, depth: int, dropout: float) -> nn.Module:
        from transformers import SwinConfig, SwinModel

        sizes: dict[str, Any] = {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2]}
        return SwinModel(SwinConfig(image_size=16, patch_size=2, window_size=2, **sizes))


class Rotary(Viewer):
    def build(self, depth: int, dropout: float) -> nn.Module:
        from transformers import DINOv3ViTConfig, DINOv3ViTModel

        sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        return DINOv3ViTModel(DINOv3ViTConfig(image_size=8, patch_size=2, intermediate_size=32, **sizes))


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda: build("hf_bert"), {}, "found no Vision Transformer in HFBert; name the module.*embedding="),
        (lambda: build("plain_torch"), {}, "found no Vision Transformer in PlainTorch"),
        (Pair, {}, "found 2 Vision Transformers in Pair; name"),
        (Dropping, {}, "VisionTransformer drops patches already; build it with patch_drop_rate=0"),
        (Swin, {}, "has positions inside of its blocks .*relative_position"),
        (Rotary, {}, "has positions inside of its blocks .*rope"),
        (lambda: viewer("timm"), {"embedding": "net.stem"}, "embedding='net.stem': Timm has no such part"),
    ],
)
def test_a_network_whose_patches_cannot_be_dropped_is_refused_at_setup(
    make: Any, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    dropping = PatchDropping(**options)
    with pytest.raises(ValueError, match=message):
        dropping.setup(quiet_trainer(tmp_path, callbacks=[dropping]), make(), "fit")


def test_a_module_that_returns_no_tokens_is_refused_at_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expects tokens \(B, T, C\) from Linear, but it returns a Tensor"):
        train(viewer("timm"), tmp_path, PatchDropping(embedding="net.head"))


def test_the_tokens_of_a_text_can_be_dropped_too_where_they_are_named(tmp_path: Path) -> None:
    module = build("torch_encoder", dropout=0.0)
    seen = []
    module.net[1].layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    trainer = quiet_trainer(tmp_path, max_steps=2, callbacks=[PatchDropping(tune=0.5, embedding="net.0")])
    trainer.fit(module, loader("torch_encoder"))
    assert seen == [4, 8]
