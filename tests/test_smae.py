import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from einops import rearrange
from helpers import needs_compiler

import masks
import smae


def mask_of(n: int, v: int, b: int = 2) -> masks.Mask:
    """Random masks of ``b`` images, with ``v`` of ``n`` patches visible."""
    return masks.random_mask(b, n, 1 - v / n)


# ------------------------------------------------------------------------------------------- parity


def peer_and_ours(folder, normalize_pixels: bool = True):
    """A random ViTMAE of transformers with MAE's positions, and our model loaded from it."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTMAEConfig(
        hidden_size=48, num_hidden_layers=3, num_attention_heads=4, intermediate_size=192, decoder_hidden_size=32,
        decoder_num_hidden_layers=2, decoder_num_attention_heads=2, decoder_intermediate_size=128,
        image_size=48, patch_size=8, layer_norm_eps=1e-6, norm_pix_loss=normalize_pixels,
    )  # fmt: skip
    peer = transformers.ViTMAEForPreTraining(config).eval()
    for parameter in peer.parameters():  # all but the positions, so that none stays zero or one
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    # MAE's positions have the column first; transformers 5 has zeros, or the row first
    peer.vit.embeddings.position_embeddings.data[0] = smae.position_table((6, 6), 48, prefix=1)
    peer.decoder.decoder_pos_embed.data[0] = smae.position_table((6, 6), 32, prefix=1)
    peer.save_pretrained(folder)
    return peer, smae.load(folder)


@pytest.mark.parametrize("normalize_pixels", [True, False])
def test_loss_encoder_and_reconstruction_agree_with_transformers(normalize_pixels, tmp_path):
    peer, ours = peer_and_ours(tmp_path, normalize_pixels)
    assert ours.config["normalize_pixels"] == normalize_pixels and not ours.config["learned_positions"]
    images, noise = torch.randn(3, 3, 48, 48), torch.rand(3, 36)
    mask = masks.Mask(*(x.sort(1).values for x in noise.argsort(1).split([9, 27], dim=1)))
    with torch.no_grad():
        expected = peer(images, noise=noise)
        latent = ours.encode(images, mask.visible)
        # the peer encodes the visible patches in the order of their noise
        order = noise.argsort(1)[:, :9].argsort(1).argsort(1)
        hidden = peer.vit(images, noise=noise).last_hidden_state
        prediction = ours.decode(latent, mask, (6, 6))
    torch.testing.assert_close(ours(images, mask), expected.loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(smae.gather_tokens(latent[:, 1:], order), hidden[:, 1:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(latent[:, 0], hidden[:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(prediction, smae.gather_tokens(expected.logits, mask.masked), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", [32, 64, 96])
def test_fixed_positions_are_stretched_for_another_grid_as_in_transformers(side, tmp_path):
    """Computed anew, they doubled the masked loss of a trained model."""
    peer, ours = peer_and_ours(tmp_path)
    n = (side // 8) ** 2
    images, noise = torch.randn(2, 3, side, side), torch.arange(n).expand(2, n) / n
    visible = torch.arange(n // 4).expand(2, n // 4)
    with torch.no_grad():
        latent = ours.encode(images, visible)
        expected = peer.vit(images, noise=noise, interpolate_pos_encoding=True).last_hidden_state
        torch.testing.assert_close(latent, expected, rtol=1e-5, atol=1e-5)
        stretched = smae.SMAE(**ours.config | dict(image_size=side, position_size=48)).eval()
        stretched.load_state_dict(ours.state_dict())
        torch.testing.assert_close(stretched.encode(images, visible), latent)
        smae.save(stretched, tmp_path / "again")
        torch.testing.assert_close(smae.load(tmp_path / "again").encode(images, visible), latent)


def test_gradients_agree_with_transformers(tmp_path):
    peer, ours = peer_and_ours(tmp_path)
    images, noise = torch.randn(3, 3, 48, 48), torch.rand(3, 36)
    mask = masks.Mask(*(x.sort(1).values for x in noise.argsort(1).split([9, 27], dim=1)))
    peer(images, noise=noise).loss.backward()
    ours(images, mask).backward()
    expected, close = peer.vit.embeddings.patch_embeddings.projection.weight.grad, dict(rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ours.embed.weight.grad, rearrange(expected, "d c p1 p2 -> d (p1 p2 c)"), **close)
    torch.testing.assert_close(ours.mask_token.grad, peer.decoder.mask_token.grad.flatten(), **close)
    torch.testing.assert_close(ours.cls_token.grad, peer.vit.embeddings.cls_token.grad.flatten(), **close)


@pytest.mark.parametrize(
    "preset, name",
    [
        ("tiny", "vit_tiny_patch16_224"),
        ("small", "vit_small_patch16_224"),
        ("base", "vit_base_patch16_224"),
        ("large", "vit_large_patch16_224"),
        ("huge", "vit_huge_patch14_224"),
    ],
)
def test_encoder_presets_have_the_parameters_of_timm(preset, name):
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        peer = timm.create_model(name, num_classes=0)
        ours = smae.SMAE(**smae.PRESETS[preset])
    count = sum(
        p.numel() for name, p in ours.named_parameters() if name.split("_")[0] not in ("decoder", "mask", "head")
    )
    count -= sum(p.numel() for p in ours.head.parameters())
    assert count == sum(p.numel() for p in peer.parameters()) - peer.pos_embed.numel()
    assert ours.config["heads"] == peer.blocks[0].attn.num_heads


# ------------------------------------------------------------------------------------------- properties


def test_positions_encode_column_then_row_as_sines_and_cosines():
    table = smae.sincos_positions(2, 3, 8)  # row 1, column 2 is the last of 6
    angles = torch.tensor([2.0, 2.0 / 100, 1.0, 1.0 / 100])
    expected = torch.cat([angles[:2].sin(), angles[:2].cos(), angles[2:].sin(), angles[2:].cos()])
    torch.testing.assert_close(table[5], expected)
    with pytest.raises(ValueError, match="divisible by 4"):
        smae.sincos_positions(2, 2, 6)


def test_patchify_and_back_is_the_identity_and_goes_row_by_row():
    images = torch.randn(2, 3, 24, 16)
    patches = smae.patchify(images, 8)
    assert torch.equal(smae.unpatchify(patches, 8, (3, 2)), images)
    assert torch.equal(patches[:, 1], rearrange(images[:, :, :8, 8:], "b c p1 p2 -> b (p1 p2 c)"))


def test_masked_pixels_do_not_reach_the_encoder(small_model):
    images, mask = torch.randn(2, 3, 32, 32), mask_of(16, 4)
    changed = smae.patchify(images, 8)
    changed.scatter_(1, mask.masked[..., None].expand(-1, -1, changed.shape[-1]), 7.0)
    changed = smae.unpatchify(changed, 8, (4, 4))
    assert torch.equal(small_model.encode(images, mask.visible), small_model.encode(changed, mask.visible))
    assert small_model(images, mask) != small_model(changed, mask)


def test_thrown_patches_are_neither_encoded_nor_decoded_nor_scored(small_model):
    images, mask = torch.randn(2, 3, 32, 32), mask_of(16, 4)
    mask = masks.Mask(mask.visible, mask.masked[:, 3:])
    thrown = torch.ones(2, 16, dtype=torch.bool).scatter(1, torch.cat(mask, dim=1), False)
    changed = smae.patchify(images, 8)
    changed[thrown] = 7.0
    changed = smae.unpatchify(changed, 8, (4, 4))
    assert torch.equal(small_model(images, mask), small_model(changed, mask))
    assert torch.equal(small_model.reconstruct(changed, mask)[changed == 7], changed[changed == 7])


def test_the_order_of_patches_does_not_matter(small_model):
    images, mask = torch.randn(2, 3, 32, 32), mask_of(16, 4)
    shuffled = masks.Mask(mask.visible.flip(1), mask.masked.roll(5, dims=1))
    torch.testing.assert_close(small_model(images, mask), small_model(images, shuffled))


def test_encoding_all_patches_explicitly_is_the_default(small_model):
    images = torch.randn(2, 3, 32, 32)
    everything = torch.arange(16).expand(2, -1)
    torch.testing.assert_close(small_model.encode(images), small_model.encode(images, everything))
    assert small_model.encode(images).shape == (2, 17, 32)


def test_layer_gives_the_output_of_that_block_without_the_norm(small_model):
    images, outputs = torch.randn(2, 3, 32, 32), []
    hooks = [block.register_forward_hook(lambda *args: outputs.append(args[-1])) for block in small_model.blocks]
    final = small_model.encode(images)
    for hook in hooks:
        hook.remove()
    for layer, output in enumerate(outputs, start=1):
        assert torch.equal(small_model.encode(images, layer=layer), output)
    assert torch.equal(final, small_model.norm(outputs[-1]))
    for layer in (0, 4, -1):
        with pytest.raises(ValueError, match="between 1 and 3"):
            small_model.encode(images, layer=layer)


@pytest.mark.parametrize("size", [(32, 48), (16, 64), (8, 8)])
def test_any_grid_works_with_stretched_positions(small_model, size):
    images = torch.randn(2, 3, *size)
    other = smae.SMAE(**small_model.config | dict(image_size=size, position_size=32)).eval()
    other.load_state_dict(small_model.state_dict())
    n = size[0] * size[1] // 64
    torch.testing.assert_close(small_model.encode(images), other.encode(images))
    if n > 1:
        mask = mask_of(n, n // 2)
        torch.testing.assert_close(small_model(images, mask), other(images, mask))
        assert small_model.reconstruct(images, mask).shape == images.shape


def test_transposed_grids_of_as_many_patches_have_positions_of_their_own(small_model):
    wide = smae.SMAE(**small_model.config | dict(image_size=(16, 64))).eval()
    tall = wide.resize_positions(wide.positions, (8, 2))
    assert tall.shape == wide.positions.shape and not torch.allclose(tall, wide.positions)
    torch.testing.assert_close(wide.encode(torch.randn(1, 3, 64, 16)).shape, torch.Size([1, 17, 32]))


def test_images_that_do_not_divide_into_patches_are_refused(small_model):
    for images in (torch.zeros(1, 3, 30, 32), torch.zeros(1, 3, 0, 32)):
        with pytest.raises(ValueError, match="multiple of the patch size 8"):
            small_model.encode(images)
    with pytest.raises(ValueError, match="takes 3 channels"):
        small_model.encode(torch.zeros(1, 1, 32, 32))


@pytest.mark.parametrize("wrong", [dict(heads=5), dict(decoder_heads=3), dict(image_size=30), dict(depth=0)])
def test_sizes_that_do_not_fit_are_refused(small_model, wrong):
    with pytest.raises(ValueError):
        smae.SMAE(**small_model.config | wrong)


def test_config_holds_every_argument_and_builds_the_same_model():
    config = smae.SMAE(width=8, depth=1, heads=2, image_size=(16, 32), mean=(0.5, 0.4, 0.3)).config
    assert list(config) == [argument.name for argument in dataclasses.fields(smae.Config)]
    assert config["image_size"] == [16, 32] and config["mean"] == [0.5, 0.4, 0.3] and config["depth"] == 1
    assert smae.SMAE(**config).config == config == json.loads(json.dumps(config))
    with pytest.raises(TypeError, match="unexpected keyword argument 'withd'"):
        smae.SMAE(**config, withd=8)


def test_statistics_are_the_mean_and_deviation_of_the_configuration(small_model):
    model = smae.SMAE(**small_model.config | dict(mean=[0.1, 0.2, 0.3], std=[1, 2, 3]))
    assert model.statistics == ((0.1, 0.2, 0.3), (1, 2, 3))
    assert smae.Classifier(model, ["cat"]).statistics == model.statistics
    for few, many in (("mean", "std"), ("std", "mean")):  # those of RGB are averaged for other channels
        given = {"channels": 4, few: [0.1, 0.2, 0.3], many: [1, 2, 3, 4]}
        model = smae.SMAE(**small_model.config | given)
        assert model.config[few] == pytest.approx([0.2] * 4) and model.config[many] == [1, 2, 3, 4]


def test_normalised_target_has_no_mean_and_unit_deviation_in_every_patch(small_model):
    target = small_model.target(5 + 3 * torch.randn(2, 3, 32, 32), mask_of(16, 4).masked)
    torch.testing.assert_close(target.mean(-1), torch.zeros(2, 12), atol=1e-5, rtol=0)
    torch.testing.assert_close(target.std(-1), torch.ones(2, 12), atol=1e-4, rtol=0)


def test_reconstruction_keeps_what_is_visible_and_undoes_the_normalisation(small_model):
    images, mask = torch.randn(2, 3, 32, 32), mask_of(16, 4)
    rebuilt = smae.patchify(small_model.reconstruct(images, mask), 8)
    patches = smae.patchify(images, 8)
    assert torch.equal(smae.gather_tokens(rebuilt, mask.visible), smae.gather_tokens(patches, mask.visible))
    prediction = small_model.decode(small_model.encode(images, mask.visible), mask, (4, 4))
    hidden = smae.gather_tokens(patches, mask.masked)
    expected = prediction * hidden.std(-1, keepdim=True) + hidden.mean(-1, keepdim=True)
    torch.testing.assert_close(smae.gather_tokens(rebuilt, mask.masked), expected, atol=1e-5, rtol=1e-5)


def test_weights_start_xavier_uniform_with_zero_biases(small_model):
    for name, module in small_model.named_modules():
        if isinstance(module, torch.nn.Linear):
            bound = (6 / (module.in_features + module.out_features)) ** 0.5
            assert module.weight.abs().max() <= bound, name
            assert module.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1), name
            assert not module.bias.any(), name
    big = smae.SMAE(width=768, depth=1, heads=12)
    assert big.cls_token.std().item() == pytest.approx(0.02, rel=0.1)
    assert big.mask_token.std().item() == pytest.approx(0.02, rel=0.15)


def test_autocast_changes_the_loss_little_and_keeps_it_float32(small_model):
    images, mask = torch.randn(2, 3, 32, 32), mask_of(16, 4)
    with torch.autocast("cpu", torch.bfloat16):
        loss = small_model(images, mask)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, small_model(images, mask), rtol=0.02, atol=0)


# ------------------------------------------------------------------------------------------- behaviour


def test_one_batch_can_be_overfitted(small_model):
    images, mask = torch.nn.functional.interpolate(torch.randn(4, 3, 4, 4), scale_factor=8), mask_of(16, 4, b=4)
    images = images + 0.3 * torch.sin(torch.arange(32) / 2)  # for some variance in every patch
    optimizer = torch.optim.AdamW(small_model.parameters(), lr=3e-3)
    first = small_model(images, mask).item()
    for _ in range(150):
        loss = small_model(images, mask)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.1 * first


class Encoder(torch.nn.Module):
    """``SMAE.encode`` as the forward pass of a module, for torch.export."""

    def __init__(self, model: smae.SMAE):
        super().__init__()
        self.model = model

    def forward(self, images, visible=None):
        return self.model.encode(images, visible)


@pytest.mark.parametrize("class_token", [True, False])
def test_an_encoder_exported_with_2_images_runs_with_5(class_token, small_model):
    model = smae.SMAE(**small_model.config | dict(class_token=class_token)).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    dynamic = {"images": {0: batch}, "visible": None}
    exported = torch.export.export(Encoder(model), (torch.randn(2, 3, 32, 32), None), dynamic_shapes=dynamic)
    for b in (1, 5):
        images = torch.randn(b, 3, 32, 32)
        torch.testing.assert_close(exported.module()(images, None), model.encode(images))


def test_visible_patches_are_encoded_by_an_export_with_any_batch(small_model):
    batch, images, mask = torch.export.Dim("batch", min=1, max=64), torch.randn(2, 3, 32, 32), mask_of(16, 4)
    dynamic = {"images": {0: batch}, "visible": {0: batch}}
    exported = torch.export.export(Encoder(small_model), (images, mask.visible), dynamic_shapes=dynamic)
    images, visible = torch.randn(5, 3, 32, 32), mask_of(16, 4, b=5).visible
    torch.testing.assert_close(exported.module()(images, visible), small_model.encode(images, visible))


def test_the_loss_exported_with_2_images_and_their_masks_runs_with_5(small_model):
    batch = torch.export.Dim("batch", min=1, max=64)
    dynamic = {"images": {0: batch}, "mask": masks.Mask({0: batch}, {0: batch})}
    example = torch.randn(2, 3, 32, 32), mask_of(16, 4)
    exported = torch.export.export(small_model, example, dynamic_shapes=dynamic)
    images, mask = torch.randn(5, 3, 32, 32), mask_of(16, 4, b=5)
    torch.testing.assert_close(exported.module()(images, mask), small_model(images, mask))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=[pytest.mark.slow, needs_compiler])])
def test_compiling_the_whole_graph_gives_the_same_loss_and_gradients(small_model, backend):
    model = smae.SMAE(**small_model.config | dict(depth=1, decoder_depth=1))
    images, mask = torch.randn(2, 3, 32, 32), mask_of(16, 4)
    expected = model(images, mask)
    expected.backward()
    gradient = model.embed.weight.grad.clone()
    model.zero_grad()
    loss = torch.compile(model, fullgraph=True, backend=backend)(images, mask)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(model.embed.weight.grad, gradient, rtol=1e-4, atol=1e-6)


def test_a_saved_model_comes_back_bit_by_bit(small_model, tmp_path):
    smae.save(small_model, tmp_path / "run", config={"train": {"epochs": 3}})
    loaded = smae.load(tmp_path / "run")
    assert loaded.config == small_model.config
    assert not loaded.training
    for name, tensor in small_model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded.encode(images), small_model.encode(images))
    assert json.loads((tmp_path / "run" / "config.json").read_text())["train"] == {"epochs": 3}
    assert sorted(file.name for file in (tmp_path / "run").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]


def test_smae_works_alone_in_an_empty_folder(tmp_path):
    shutil.copy(smae.__file__, tmp_path)
    script = """
import sys, torch, smae
model = smae.SMAE(**smae.PRESETS["tiny"] | dict(depth=1, decoder_depth=1), image_size=32).eval()
smae.save(model, "run", config={"note": "alone"})
smae.save(smae.Classifier(model, ["cat", "dog"]), "classifier")
images = torch.randn(2, 3, 32, 32)
assert torch.equal(smae.load("run").encode(images), model.encode(images))
assert smae.load("classifier")(images).shape == (2, 2)
print(*sorted({"convert", "masks", "data", "train"} & sys.modules.keys()), smae.__file__)
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == tmp_path / "smae.py"


def test_loading_says_what_is_missing_or_does_not_fit(small_model, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        smae.load(tmp_path)
    smae.save(small_model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["model"]["depth"] = 2
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"blocks\.2"):
        smae.load(tmp_path)


def test_a_model_starts_from_the_encoder_and_decoder_of_another(small_model):
    model = smae.SMAE(**small_model.config | dict(image_size=(16, 64)))
    smae.initialise(model, small_model)
    assert all(torch.equal(tensor, small_model.state_dict()[name]) for name, tensor in model.state_dict().items())
    fresh = smae.SMAE(**small_model.config | dict(decoder_depth=1, decoder_width=8))
    before = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    smae.initialise(fresh, small_model, decoder=False)
    for name, tensor in fresh.state_dict().items():
        own = name.startswith(("decoder_", "mask_token", "head."))
        assert torch.equal(tensor, before[name] if own else small_model.state_dict()[name]), name
    with pytest.raises(ValueError, match=r"do not fit the model; unexpected: decoder_blocks\.1"):
        smae.initialise(fresh, small_model)


def test_a_model_starts_with_learned_positions_resized_to_its_grid(small_model):
    learned = smae.SMAE(**small_model.config | dict(learned_positions=True)).eval()
    torch.nn.init.normal_(learned.positions)
    model = smae.SMAE(**learned.config | dict(image_size=(16, 64))).eval()
    smae.initialise(model, learned)
    assert model.positions.shape == (17, 32)
    images = torch.randn(1, 3, 16, 64)
    torch.testing.assert_close(model.encode(images), learned.encode(images))


# ------------------------------------------------------------------------------------------- features, attention


def test_features_come_from_any_block_of_encoder_and_decoder(small_model):
    images = torch.randn(2, 3, 32, 32)
    assert small_model.layers == [1, 2, 3, "decoder-1", "decoder-2"]
    for layer in (1, 2, 3):
        assert torch.equal(small_model.features(images, layer), small_model.encode(images, layer=layer)[:, 1:])
    seen = []
    for block in small_model.decoder_blocks:
        block.register_forward_hook(lambda _, inputs, output: seen.append(output))
    everything = masks.Mask(torch.arange(16).expand(2, -1), torch.arange(16)[:0].expand(2, -1))
    small_model.decode(small_model.encode(images), everything, (4, 4))
    expected = list(seen)
    for name, tokens in zip(("decoder-1", "decoder-2"), expected):
        assert torch.equal(small_model.features(images, name), tokens[:, 1:]) and tokens.shape == (2, 17, 16)
    for layer in (0, 4, "decoder-0", "decoder-3", "2"):
        with pytest.raises(ValueError, match="layer must be one of"):
            small_model.features(images, layer)
    alone = smae.SMAE(**small_model.config | dict(class_token=False, decoder_depth=0))
    assert alone.features(images, 2).shape == (2, 16, 32) and alone.layers == [1, 2, 3]
    with pytest.raises(ValueError, match="no CLS token"):
        alone.class_attention(images)


def test_attention_weights_are_those_of_the_forward_pass(small_model):
    attention, x = small_model.blocks[0].attention, torch.randn(2, 17, 32)
    weights, values = attention.weights(x), attention.split(x)[2]
    mixed = rearrange(weights @ values, "b heads n d -> b n (heads d)")
    torch.testing.assert_close(attention.out(mixed), attention(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(attention.weights(x, slice(1)), weights[:, :, :1])


def test_class_attention_agrees_with_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    _, ours = peer_and_ours(tmp_path)
    peer = transformers.ViTMAEModel.from_pretrained(tmp_path, attn_implementation="eager", mask_ratio=0.0).eval()
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        theirs = peer(images, noise=torch.arange(36.0).expand(2, -1), output_attentions=True).attentions[-1]
    torch.testing.assert_close(ours.class_attention(images), theirs[:, :, 0, 1:], rtol=1e-4, atol=1e-6)


def test_decoder_attention_is_that_of_the_pass_that_decodes(small_model):
    images, mask, inputs = torch.randn(2, 3, 32, 32), masks.random_mask(2, 16), []
    for block in small_model.decoder_blocks:
        block.attention.register_forward_hook(lambda module, args, _: inputs.append((module, args[0])))
    with torch.no_grad():
        small_model(images, mask)
        expected = [module.weights(x) for module, x in inputs]
        maps = list(small_model.decoder_attention(images, mask))
    assert len(maps) == 2 and maps[0].shape == (2, 2, 17, 17)
    for x, y in zip(maps, expected, strict=True):
        torch.testing.assert_close(x, y)
        torch.testing.assert_close(x.sum(-1), torch.ones(2, 2, 17))


def test_registers_are_tokens_between_cls_and_patches(small_model):
    model = smae.SMAE(**small_model.config | dict(registers=3, learned_positions=True)).eval()
    images = torch.randn(2, 3, 32, 32)
    assert model.prefix == 4 and model.encode(images).shape == (2, 20, 32)
    seen = []
    weights = type(model.blocks[-1].attention).weights
    model.blocks[-1].attention.weights = lambda *a: seen.append(weights(model.blocks[-1].attention, *a)) or seen[-1]
    attention = model.class_attention(images)
    assert attention.shape == (2, 2, 16) and torch.equal(attention, seen[0][:, :, 0, 4:])
    mask = masks.random_mask(2, 16)
    model(images, mask).backward()
    assert model.registers.grad.abs().sum() > 0 and model.features(images, "decoder-1").shape == (2, 16, 16)


@pytest.mark.parametrize("class_token, registers", [(False, 2), (True, 0), (False, 0)])
def test_the_first_token_is_pooled_only_if_it_is_a_cls_token(class_token, registers, small_model):
    sizes = dict(class_token=class_token, registers=registers)
    model, images = smae.SMAE(**small_model.config | sizes), torch.randn(1, 3, 32, 32)
    tokens = model.encode(images)
    torch.testing.assert_close(model.pooled(images, "mean"), tokens[:, class_token + registers :].mean(1))
    if class_token:
        assert torch.equal(model.pooled(images, "cls"), tokens[:, 0])
    else:
        with pytest.raises(ValueError, match="pool must be mean"):
            model.pooled(images, "cls")
