import inspect
import math
from typing import Any

import pytest
import torch
from lightning.pytorch.cli import LightningArgumentParser
from torch.utils.data import DataLoader

from lit_scale.models import MaskedAutoencoder
from lit_scale.models.mae import patches_of
from tests.support.data import as_loader
from tests.support.training import quiet_trainer, trained_and_reloaded

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*val_dataloader", "ignore:.*LeafSpec"
)

S, P, C, D = 16, 4, 16, 8  # side of an image, of a patch; channels of encoder and decoder
N, SEEN = 16, 4  # patches of an image; those that are not hidden


def mae(**options):
    torch.manual_seed(0)
    defaults: dict[str, Any] = {
        "image_size": S,
        "patch_size": P,
        "architecture": "vit_tiny_patch16_224",
        "depth": 2,
        "width": C,
        "num_heads": 2,
        "decoder_depth": 1,
        "decoder_width": D,
        "decoder_heads": 2,
    }
    return MaskedAutoencoder(**(defaults | options))


def images_of(size=4, seed=0):
    return torch.randn(size, 3, S, S, generator=torch.Generator().manual_seed(seed))


def drawn_anew(model):
    """No bias zero, no norm the identity, no token alike."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


# -- targets and masks ------------------------------------------------------------------------------------------------


def test_a_patch_is_a_square_of_the_image():
    images = images_of(2)
    patches = patches_of(images, P)
    assert patches.shape == (2, N, P * P * 3)
    for index in range(N):
        row, column = divmod(index, S // P)
        square = images[:, :, row * P : (row + 1) * P, column * P : (column + 1) * P]  # (B, 3, p, p)
        torch.testing.assert_close(patches[:, index].view(2, P, P, 3), square.permute(0, 2, 3, 1))


@pytest.mark.parametrize("norm_pixels", [True, False])
def test_targets_by_hand(norm_pixels):
    model, images = mae(norm_pixels=norm_pixels), images_of(2) * 3 + 1
    order = model.random_order(images)
    targets = model.targets(images, order)
    assert targets.shape == (2, N - SEEN, P * P * 3)
    for image in range(2):
        for place, patch in enumerate(order[image, SEEN:].tolist()):
            pixels = patches_of(images, P)[image, patch].double()
            if norm_pixels:
                mean = pixels.sum() / len(pixels)
                variance = ((pixels - mean) ** 2).sum() / (len(pixels) - 1)
                pixels = (pixels - mean) / math.sqrt(variance + 1e-6)
            torch.testing.assert_close(targets[image, place].double(), pixels, atol=1e-5, rtol=1e-5)


def test_each_image_has_a_mask_of_its_own():
    model, images = mae(), images_of(64)
    order = model.random_order(images)
    assert torch.equal(order.sort(1).values, torch.arange(N).expand(64, N))
    seen = order[:, : model.num_visible]
    assert model.num_visible == SEEN
    assert len({tuple(sorted(row)) for row in seen.tolist()}) > 32
    often = seen.flatten().bincount(minlength=N) / 64  # each patch is seen in a quarter of the images
    assert (often - SEEN / N).abs().max() < 5 * math.sqrt(0.25 * 0.75 / 64)


@pytest.mark.parametrize(("ratio", "seen"), [(0.75, 4), (0.5, 8), (0.9, 2), (0.94, 1)])
def test_the_ratio_is_that_of_the_hidden_patches(ratio, seen):
    model = mae(mask_ratio=ratio)
    assert model.num_visible == seen
    assert model.targets(images_of(), model.random_order(images_of())).shape[1] == N - seen


# -- the network ------------------------------------------------------------------------------------------------------


def huggingface_twin(model):
    """Hugging Face's ViTMAEForPreTraining with the weights of ours."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    config = ViTMAEConfig(
        image_size=S,
        patch_size=P,
        hidden_size=C,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=4 * C,
        decoder_hidden_size=D,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=4 * D,
        layer_norm_eps=1e-6,
        norm_pix_loss=True,
        mask_ratio=0.75,
    )
    theirs = ViTMAEForPreTraining(config).eval()
    vit, decoder, ours = theirs.vit, theirs.decoder, model.encoder
    with torch.no_grad():
        vit.embeddings.cls_token.copy_(ours.cls_token)
        vit.embeddings.position_embeddings.copy_(ours.pos_embed)
        vit.embeddings.patch_embeddings.projection.load_state_dict(ours.patch_embed.proj.state_dict())
        for layer, block in zip([*vit.layers, *decoder.decoder_layers], [*ours.blocks, *model.decoder], strict=True):
            attention = layer.attention
            for part, weight, bias in zip(
                (attention.q_proj, attention.k_proj, attention.v_proj),
                block.attn.qkv.weight.chunk(3),
                block.attn.qkv.bias.chunk(3),
                strict=True,
            ):
                part.weight.copy_(weight)
                part.bias.copy_(bias)
            attention.o_proj.load_state_dict(block.attn.proj.state_dict())
            layer.mlp.load_state_dict(block.mlp.state_dict())
            layer.layernorm_before.load_state_dict(block.norm1.state_dict())
            layer.layernorm_after.load_state_dict(block.norm2.state_dict())
        vit.layernorm.load_state_dict(ours.norm.state_dict())
        decoder.decoder_embed.load_state_dict(model.to_decoder.state_dict())
        decoder.mask_token.copy_(model.to_decoder.weight @ model.mask_token + model.to_decoder.bias)
        decoder.decoder_pos_embed.zero_()
        decoder.decoder_pos_embed[0, 1:] = model.positions
        decoder.decoder_norm.load_state_dict(model.decoder_norm.state_dict())
        decoder.decoder_pred.load_state_dict(model.to_pixels.state_dict())
    return theirs


def test_with_visible_patches_only_it_is_huggingfaces_mae():
    model, images = drawn_anew(mae(encode_masked=False)), images_of()
    theirs = huggingface_twin(model)
    noise = torch.rand(4, N, generator=torch.Generator().manual_seed(1))
    order = noise.argsort(1)
    expected = theirs(images, noise=noise)
    latents = theirs.vit(images, noise=noise).last_hidden_state
    torch.testing.assert_close(model.encode(images, order), latents, atol=1e-5, rtol=1e-4)
    hidden = order[:, SEEN:, None].expand(-1, -1, P * P * 3)
    pixels = model.decode(model.encode(images, order), order)
    torch.testing.assert_close(pixels, expected.logits.gather(1, hidden), atol=1e-5, rtol=1e-4)
    model.random_order = lambda *_: order
    torch.testing.assert_close(model.per_sample_loss((images,)).mean(), expected.loss, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "architecture", ["vit_tiny_patch16_224", "vit_base_patch16_clip_224", "vit_small_patch14_reg4_dinov2"]
)
def test_the_encoder_is_timms_blocks_on_the_visible_patches(architecture):
    model, images = drawn_anew(mae(architecture=architecture, encode_masked=False)), images_of(3)
    vit, order = model.encoder, model.random_order(images)
    latents = model.encode(images, order)
    count = vit.num_prefix_tokens
    for index in range(3):  # one by one, by hand
        patches = vit.patch_embed(images[index : index + 1])[0]  # (N, C)
        positions = vit.pos_embed[0][-N:]
        tokens = [part[0] for part in (vit.cls_token, vit.reg_token) if part is not None]
        x = torch.cat([*tokens, torch.stack([patches[i] + positions[i] for i in order[index, :SEEN].tolist()])])
        x = vit.norm_pre(x[None])
        for block in vit.blocks:
            x = block(x)
        torch.testing.assert_close(latents[index], vit.norm(x)[0], atol=1e-5, rtol=1e-4)
    assert latents.shape == (3, count + SEEN, C)


def test_with_mask_tokens_the_encoder_is_timms_network_on_an_image_with_holes():
    model, images = drawn_anew(mae(encode_masked=True)), images_of(3)
    vit, order = model.encoder, model.random_order(images)
    hidden = torch.zeros(3, N, dtype=torch.bool).scatter(1, order[:, SEEN:], True)
    x = torch.where(hidden[..., None], model.mask_token, vit.patch_embed(images)) + vit.pos_embed[:, 1:]
    x = vit.norm(vit.blocks(torch.cat([vit.cls_token.expand(3, -1, -1), x], 1)))
    expected = torch.cat([x[:, :1], x[:, 1:].gather(1, order[..., None].expand(-1, -1, C))], 1)
    torch.testing.assert_close(model.encode(images, order), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("encode_masked", [True, False])
def test_hidden_pixels_are_never_seen(encode_masked):
    model, images = drawn_anew(mae(encode_masked=encode_masked)), images_of(1)
    order = model.random_order(images)
    before = model.decode(model.encode(images, order), order)
    for place, patch in enumerate(order[0].tolist()):
        row, column = divmod(patch, S // P)
        changed = images.clone()
        changed[:, :, row * P : (row + 1) * P, column * P : (column + 1) * P] += 1.0
        after = model.decode(model.encode(changed, order), order)
        assert torch.equal(before, after) == (place >= SEEN)


@pytest.mark.parametrize("encode_masked", [True, False])
def test_every_parameter_is_trained_either_way(encode_masked):
    """So plain DDP will do, and switching changes no optimizer."""
    model = drawn_anew(mae(encode_masked=encode_masked))
    model.per_sample_loss((images_of(),)).mean().backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not without
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["encoder.pos_embed"]


def test_positions_are_sines_and_cosines_of_row_and_column():
    model = mae()
    for table, width in ((model.encoder.pos_embed[0, 1:], C), (model.positions, D)):
        expected = []
        for patch in range(N):
            angles = [place / 10_000 ** (4 * i / width) for place in divmod(patch, S // P) for i in range(width // 4)]
            expected.append([f(angle) for f in (math.sin, math.cos) for angle in angles])
        torch.testing.assert_close(table, torch.tensor(expected), atol=1e-6, rtol=1e-5)
    assert not model.encoder.pos_embed[0, 0].any()


def test_the_initial_weights_are_those_of_the_paper():
    model = mae(width=64, decoder_width=32)
    bound = {"encoder.blocks.0.mlp.fc1.weight": (64, 256), "to_decoder.weight": (64, 32)}
    bound |= {"encoder.patch_embed.proj.weight": (3 * P * P, 64), "decoder.0.attn.qkv.weight": (32, 96)}
    for name, (fan_in, fan_out) in bound.items():
        limit = math.sqrt(6 / (fan_in + fan_out))  # Glorot and Bengio 2010
        weight = model.get_parameter(name)
        assert 0.95 * limit < weight.abs().max() <= limit, name
    assert all(not p.any() for name, p in model.named_parameters() if name.endswith("bias"))


def test_features_are_the_mean_of_timms_own(tmp_path):
    model, images = drawn_anew(mae()), images_of()
    expected = model.encoder.forward_features(images)[:, 1:].mean(1)
    assert model(images).shape == (4, C)
    torch.testing.assert_close(model(images), expected)


def test_it_can_be_compiled_in_one_piece():
    model, images = mae(depth=1, encode_masked=False), images_of()
    order = model.random_order(images)
    restore = torch.compile(lambda: model.decode(model.encode(images, order), order), backend="eager", fullgraph=True)
    torch.testing.assert_close(restore(), model.decode(model.encode(images, order), order))


def test_under_autocast():
    for encode_masked in (True, False):
        model = mae(encode_masked=encode_masked)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.per_sample_loss((images_of(),), torch.Generator().manual_seed(0)).mean()
        loss.backward()
        expected = model.per_sample_loss((images_of(),), torch.Generator().manual_seed(0)).mean()
        torch.testing.assert_close(loss.float(), expected, atol=0.02, rtol=0.02)
        assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())


# -- training ---------------------------------------------------------------------------------------------------------


def plain_colours(count=160, size=8):
    """Batches of images of one colour each: a hidden patch is what any other is."""
    colours = torch.randn(count, size, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    return [(colour.expand(size, 3, S, S), torch.zeros(size, dtype=torch.long)) for colour in colours]


@pytest.mark.parametrize("encode_masked", [True, False])
def test_it_learns_what_follows_from_the_visible_patches(encode_masked, tmp_path):
    model = mae(encode_masked=encode_masked, lr=1e-2, norm_pixels=False)
    batches = plain_colours()
    trainer = quiet_trainer(tmp_path, max_steps=100)
    trainer.fit(model, as_loader(batches[:-4]))
    (found,) = trainer.validate(model, as_loader(batches[-4:]), verbose=False)
    variance = torch.cat([images for images, _ in batches[-4:]]).var().item()  # the loss without a look at the image
    assert found["val/loss"] < 0.3 * variance


@pytest.mark.filterwarnings("ignore:.*batch_size")
def test_validation_hides_the_same_patches_every_time_and_leaves_no_trace(tmp_path):
    model, trainer = mae(norm_pixels=False), quiet_trainer(tmp_path)
    batches: Any = [(images_of(4, seed=1),), (images_of(4, seed=2),), (images_of(1, seed=3) * 3,)]
    loader: Any = DataLoader(batches, batch_size=None, generator=torch.Generator())
    torch.manual_seed(5)
    state = torch.get_rng_state()
    found = [trainer.validate(model, loader, verbose=False)[0]["val/loss"] for _ in range(2)]
    assert found[0] == found[1]
    assert torch.equal(torch.get_rng_state(), state)
    losses = [model.per_sample_loss(b, torch.Generator().manual_seed(place)) for place, b in enumerate(loader)]
    assert found[0] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)
    assert found[0] != pytest.approx(sum(loss.mean().item() for loss in losses) / 3, rel=1e-3)


@pytest.mark.parametrize("encode_masked", [True, False])
def test_a_checkpoint_brings_model_settings_and_the_place_of_the_mask_token_back(encode_masked, tmp_path):
    model = mae()
    model.encode_masked = encode_masked  # as the technique does, after construction
    loaded = trained_and_reloaded(model, as_loader(plain_colours(4)), tmp_path)
    assert loaded.encode_masked is encode_masked
    one, other = (m.eval().per_sample_loss(images_of(), torch.Generator().manual_seed(0)) for m in (loaded, model))
    assert torch.equal(one, other)


# -- its arguments ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_ratio": 0.0}, "mask_ratio=0.0 must lie between 0 and 1"),
        ({"mask_ratio": 1.0}, "mask_ratio=1.0 must lie between 0 and 1"),
        ({"mask_ratio": -0.5}, "mask_ratio=-0.5"),
        ({"mask_ratio": 1.5}, "mask_ratio=1.5"),
        ({"mask_ratio": math.nan}, "mask_ratio=nan"),
        ({"mask_ratio": 0.99}, "mask_ratio=0.99.*at least one of the 16 patches but not all"),
        ({"mask_ratio": 0.01}, "mask_ratio=0.01.*at least one of the 16 patches"),
        ({"patch_size": 5}, "image_size=16 is not a multiple of patch_size=5"),
        ({"patch_size": 32}, "image_size=16 is not a multiple of patch_size=32"),
        ({"patch_size": 0}, "patch_size=0 must be at least 1"),
        ({"depth": 0}, "depth=0 must be at least 1"),
        ({"decoder_depth": -1}, "decoder_depth=-1 must not be negative"),
        ({"decoder_depth": 0, "encode_masked": False}, "decoder_depth=0 cannot restore"),
        ({"decoder_heads": 3}, "decoder_width=8 is not a multiple of decoder_heads=3"),
        ({"num_heads": 3}, "timm cannot build .*dim should be divisible by num_heads"),
        ({"width": 18}, "width=18: positions in two axes need a multiple of 4"),
        ({"decoder_width": 6}, "decoder_width=6: positions in two axes need a multiple of 4"),
        ({"architecture": "vit_nano"}, "timm cannot build architecture='vit_nano'.*Unknown model"),
        ({"architecture": "vit_relpos_small_patch16_224"}, "is no plain Vision Transformer"),
        ({"warmup": 1.0}, "warmup=1.0 is not a fraction of the run"),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        mae(**options)


@pytest.mark.parametrize(
    ("batch", "found"),
    [
        ((torch.zeros(2, 3, 8, 8), torch.zeros(2)), r"shape \(2, 3, 8, 8\)"),
        (torch.zeros(2, 1, S, S), r"shape \(2, 1, 16, 16\)"),
        ({"image": torch.zeros(2, 3, S, S)}, "a dict"),
        ((), "a tuple"),
    ],
    ids=["small", "grey", "dict", "empty"],
)
def test_a_batch_without_fitting_images_is_refused(batch, found):
    with pytest.raises(ValueError, match=rf"no images \(B, 3, 16, 16\) in front but {found}"):
        mae().training_step(batch, 0)


def test_every_argument_is_a_flag():
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_lightning_class_args(MaskedAutoencoder, "model")
    flags = {name: value for name, value in vars(parser.parse_args([]).model).items() if not name.startswith("__")}
    assert flags == {n: p.default for n, p in inspect.signature(MaskedAutoencoder).parameters.items()}
    assert parser.parse_args(["--model.depth=3"]).model.depth == 3
