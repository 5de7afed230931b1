from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from PIL import Image
from torch.nn import functional as F

from lit_scale.callbacks import ResolutionGrowing
from lit_scale.callbacks.resolution_growing import patch_size, resize
from lit_scale.cost import CostMeter
from tests.support.data import FULL_SIDE, full_loader, loader, sized_loader, val_loader
from tests.support.equality import assert_same
from tests.support.networks import ANY_SIZE, build, image_model
from tests.support.training import Ran, StepTimer, Watch, quiet_trainer, run, save_every_step

pytestmark = [pytest.mark.filterwarnings("ignore")]

STEPS = 8
STAGES = [(0.0, 0.5), (0.25, 0.75), (0.625, 1.0)]  # 8, 12 and 16 pixels, from steps 0, 2 and 5
SIZES = [8, 8, 12, 12, 12, 16, 16, 16]


class Sizes(Watch):
    """Also tells how large the images of each batch are."""

    @property
    def sizes(self) -> list[int]:
        return [batch["image"].shape[-1] for batch in self.batches]

    @property
    def validated(self) -> set[int]:
        return {batch["image"].shape[-1] for batch in self.validated_batches}


def grow(name: str, folder: Path, data: Any, *callbacks: Callback, growing: Any = None, **options: Any) -> Ran:
    """Train a network of this name while images grow."""
    module = image_model(name, seed=1 if options.get("resume") else 0)
    limits: dict[str, Any] = {} if options.keys() & {"max_epochs", "max_steps"} else {"max_steps": STEPS}
    if "max_epochs" not in options:
        limits |= {"val_check_interval": 4, "check_val_every_n_epoch": None}
    parts = [*options.pop("before", ()), ResolutionGrowing(STAGES, **(growing or {})), *callbacks]
    return run(module, data, folder, *parts, watch=Sizes(), val=val_loader(), **limits, **options)


def sizes(ran: Ran) -> list[int]:
    assert isinstance(ran.watch, Sizes)
    return ran.watch.sizes


# ---- sizes


def test_resizing_is_that_of_pillow() -> None:
    """Pillow's bilinear reduction is antialiased; another library's result, but for its rounding to whole values."""
    image = F.interpolate(torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(0)), (32, 32)).mul(255).round()
    pillow = Image.fromarray(image[0].permute(1, 2, 0).byte().numpy()).resize((20, 20), Image.Resampling.BILINEAR)
    expected = torch.tensor(list(pillow.getdata())).view(20, 20, 3).permute(2, 0, 1).float()
    assert (resize(image, 20)[0] - expected).abs().max() <= 1.0


@pytest.mark.parametrize("name", ANY_SIZE)
@pytest.mark.parametrize("make", [sized_loader, full_loader])
def test_any_network_sees_the_sizes_of_its_stages_and_is_validated_at_full_size(
    name: str, make: Callable[[], Any], tmp_path: Path
) -> None:
    found = grow(name, tmp_path, make())
    assert sizes(found) == SIZES
    assert isinstance(found.watch, Sizes)
    assert found.watch.validated == {FULL_SIDE}
    assert "batch_to_device" not in found.trainer.strategy.__dict__
    assert not [part for part in found.module.modules() if "forward" in part.__dict__]


def test_the_loader_resizes_as_the_device_does(tmp_path: Path) -> None:
    early, late = (grow("timm", tmp_path / str(i), data) for i, data in enumerate([sized_loader(), full_loader()]))
    torch.testing.assert_close(early.watch.losses, late.watch.losses, rtol=1e-4, atol=1e-4)


def test_workers_that_prefetch_make_the_size_of_the_step(tmp_path: Path) -> None:
    found = grow("by_hand", tmp_path, sized_loader(num_workers=2))
    assert sizes(found) == SIZES


@pytest.mark.parametrize("limit", [{"max_steps": STEPS}, {"max_epochs": 2, "limit_train_batches": 4}])
@pytest.mark.parametrize("window", [1, 2])
def test_sizes_follow_optimizer_steps_whatever_limits_the_run(
    limit: dict[str, int], window: int, tmp_path: Path
) -> None:
    found = grow("by_hand", tmp_path, sized_loader(2), accumulate_grad_batches=window, **limit)
    steps = found.trainer.global_step
    expected = [
        (8 if i / steps < 0.25 else 12 if i / steps < 0.625 else 16) for i in range(steps) for _ in range(window)
    ]
    assert sizes(found) == expected


def test_in_a_run_limited_by_time_stages_follow_the_clock(tmp_path: Path) -> None:
    found = grow("by_hand", tmp_path, sized_loader(), before=[StepTimer()], max_epochs=-1)
    assert sizes(found) == SIZES


def test_batches_grow_to_keep_tokens(tmp_path: Path) -> None:
    found = grow("by_hand", tmp_path, sized_loader(), growing={"grow_batch": True})
    assert found.watch.brought == [16, 16, 7, 7, 7, 4, 4, 4]  # 4 (16 / s)^2
    assert sizes(found) == SIZES


def test_the_last_stage_is_the_plain_run(tmp_path: Path) -> None:
    """With the first stages over, a step is that of a Trainer without the callback."""
    plain = image_model("timm")
    run(plain, sized_loader(), tmp_path, max_steps=2)
    run(grown := image_model("timm"), sized_loader(), tmp_path, ResolutionGrowing([(0.0, 1.0)]), max_steps=2)
    assert_same(dict(plain.state_dict()), dict(grown.state_dict()))


# ---- resume


@pytest.mark.parametrize(
    ("name", "make", "growing"),
    [
        ("timm", full_loader, {}),
        ("hf", sized_loader, {}),
        ("by_hand", lambda: sized_loader(num_workers=2), {"grow_batch": True}),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(name: str, make: Any, growing: dict[str, Any], tmp_path: Path) -> None:
    whole = grow(name, tmp_path, make(), save_every_step(tmp_path / "saved"), growing=growing)
    for stop in (1, 2, 5, 7):
        path = tmp_path / "saved" / f"step={stop}.ckpt"
        rest = grow(name, tmp_path, make(), resume=path, growing=growing)
        assert sizes(rest) == SIZES[stop:]
        assert rest.watch.losses == whole.watch.losses[stop:]
        assert_same(whole.left, rest.left, f"resumed at step {stop}")


def test_other_stages_are_refused_at_resume(tmp_path: Path) -> None:
    grow("by_hand", tmp_path, full_loader(), save_every_step(tmp_path / "saved"))
    trainer = quiet_trainer(tmp_path, callbacks=[ResolutionGrowing([(0.0, 0.5), (0.5, 1.0)])], max_steps=STEPS)
    with pytest.raises(ValueError, match=r"ResolutionGrowing\(stages=.* differs from the checkpoint's"):
        trainer.fit(image_model("by_hand"), full_loader(), ckpt_path=tmp_path / "saved" / "step=3.ckpt")


# ---- the clock and compilation


def test_the_clock_prices_each_size(tmp_path: Path) -> None:
    meter = CostMeter(repeats=1)
    grow("by_hand", tmp_path, sized_loader(), meter)
    shapes = [shape for shape in meter.ledger.record()["step_kinds"] if shape["phase"] == "train"]
    assert [(shape["resolution_growing/size"], shape["count"], shape["plain"]) for shape in shapes] == [
        (8, 2, False),
        (12, 3, False),
        (16, 3, True),
    ]
    assert shapes[0]["flops_each"] < shapes[1]["flops_each"] < shapes[2]["flops_each"]
    assert all(shape["price"] == "replay" for shape in shapes)


def test_there_is_at_most_one_compile_per_size(tmp_path: Path) -> None:
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    torch._dynamo.reset()
    module = image_model("by_hand", dropout=0.0)
    module.net.compile(backend=backend)
    trainer = quiet_trainer(tmp_path, callbacks=[ResolutionGrowing(STAGES)], max_steps=STEPS)
    trainer.fit(module, full_loader())
    assert 1 <= len(graphs) <= len(STAGES)


# ---- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": [(0.0, 0.5), (0.5, 0.5)]}, None),
        ({"stages": [(0.1, 0.5), (0.5, 1.0)]}, "starts must ascend from 0.0"),
        ({"stages": [(0.0, 0.5), (1.0, 1.0)]}, "stay below 1.0"),
        ({"stages": [(0.0, 0.0), (0.5, 1.0)]}, "size 0.0 is neither a positive number nor a fraction"),
        ({"stages": [(0.0, 0.5), (0.5, 1.5)]}, "size 1.5 is a fraction above 1.0"),
        ({"stages": [0.5, 1.0]}, r"write pairs \(start, size\)"),
        ({"patch": 0}, "patch=0 must be at least 1 pixel"),
    ],
)
def test_bad_arguments_are_refused_at_construction(options: dict[str, Any], message: str | None) -> None:
    if message is None:
        assert ResolutionGrowing(**options)  # whether sizes ascend is known once full size is
        return
    with pytest.raises(ValueError, match=message):
        ResolutionGrowing(**options)


class Stopped(Callback):
    """No training step may begin."""

    def on_train_batch_end(self, *_: Any) -> None:
        raise AssertionError("a step was made")


@pytest.mark.parametrize("make", [sized_loader, full_loader])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": [(0.0, 10), (0.5, 16)]}, "images of 10 pixels are no whole number of patches of 4; use 8 or 12"),
        ({"stages": [(0.0, 0.5), (0.5, 0.75)]}, "must ascend to full size, which is 16 here"),
        ({"stages": [(0.0, 0.5), (0.5, 0.51), (0.6, 1.0)]}, "these are sizes of 8, 8, 16; they must ascend"),
        ({"stages": [(0.0, 8), (0.5, 32)]}, "which is 16 here"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_before_a_step(
    make: Any, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    trainer = quiet_trainer(tmp_path, callbacks=[ResolutionGrowing(**options), Stopped()], max_steps=STEPS)
    with pytest.raises(ValueError, match=message):
        trainer.fit(image_model("by_hand"), make())


def test_models_that_cannot_take_other_sizes_are_refused(tmp_path: Path) -> None:
    stages = [(0.0, 0.5), (0.5, 1.0)]

    def refused(module: LightningModule, message: str, data: Any, **options: Any) -> None:
        trainer = quiet_trainer(tmp_path, callbacks=[ResolutionGrowing(stages, **options), Stopped()], max_steps=STEPS)
        with pytest.raises(ValueError, match=message):
            trainer.fit(module, data)

    refused(
        build("timm_vit"), "net.patch_embed takes images of one size only; .* dynamic_img_size=True", sized_loader()
    )
    refused(build("plain_torch"), "PlainTorch shows no patches; say patch=", loader("plain_torch"))

    class OneSize(type(build("plain_torch"))):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x)

    refused(OneSize(), "OneSize cannot take images of 4 pixels", loader("plain_torch"), patch=4)
    refused(build("hf_bert"), "say patch=", loader("hf_bert"))
    refused(build("hf_bert"), "the batch holds no images", loader("hf_bert"), patch=4)
    refused(image_model("timm"), "grow_batch=True needs a loader", full_loader(), grow_batch=True)


def test_patches_are_found() -> None:
    assert [patch_size(image_model(name)) for name in ANY_SIZE] == [4, 4, 4]
    assert patch_size(torch.nn.Conv2d(3, 8, 3, padding=1)) is None
