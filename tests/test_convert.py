"""Checkpoints of other projects, read and written, against the code of those projects."""

import argparse
import ast
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from foreign import mae_checkpoint, same_weights, scrambled, timm_vit, vitmae

import convert
import masks
import smae


@pytest.fixture
def images():
    return torch.randn(2, 3, 48, 48)


# ------------------------------------------------------------------------------------------- dictionaries


def test_convert_imports_nothing_of_this_project():
    source = Path(convert.__file__)
    imported = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    assert "torch" in imported
    assert not imported & {file.stem for file in source.parent.glob("*.py")}


@pytest.mark.parametrize("format", ["mae", "timm", "transformers"])
def test_dictionaries_of_each_format_give_back_arguments_and_tensors(format, small_model):
    arguments = small_model.config | dict(norm_eps=1e-5, mean=[0.5, 0.4, 0.3], learned_positions=True)
    model = scrambled(smae.SMAE(**arguments))
    content = convert.WRITERS[format](model.state_dict(), model.config)
    if format == "mae":
        config, weights = convert.unwrap(content)
    else:
        weights, texts = content
        config = texts.get("preprocessor_config.json", {}) | texts["config.json"]
    again, tensors = convert.from_foreign(weights, config, smae.position_table)
    kept = {name for name in model.state_dict() if format != "timm" or not name.startswith(("decoder", "mask", "head"))}
    assert tensors.keys() == kept and all(torch.equal(tensors[name], model.state_dict()[name]) for name in kept)
    expected = arguments | (dict(decoder_depth=0, decoder_width=512, decoder_heads=16) if format == "timm" else {})
    assert smae.SMAE(**again).config == expected


def test_position_tables_that_the_model_computes_are_left_out(small_model):
    weights = small_model.state_dict() | dict(small_model.named_buffers())
    mae = convert.to_mae(weights, small_model.config)["model"]
    arguments, tensors = convert.from_foreign(mae, {}, smae.position_table, heads=2)
    assert not arguments["learned_positions"] and tensors.keys() == small_model.state_dict().keys()
    mae["decoder_pos_embed"] = mae["decoder_pos_embed"] + 1e-6
    arguments, tensors = convert.from_foreign(mae, {}, smae.position_table, heads=2)
    assert arguments["learned_positions"] and {"positions", "decoder_positions"} <= tensors.keys()


def test_what_the_caller_gives_overrules_the_configuration(small_model):
    weights = small_model.state_dict() | dict(small_model.named_buffers())
    weights, texts = convert.to_timm(weights, small_model.config)
    config = texts["config.json"]
    told, _ = convert.from_foreign(weights, config, smae.position_table)
    assert (told["heads"], told["image_size"]) == (2, [32, 32])
    given, _ = convert.from_foreign(weights, config, smae.position_table, heads=4, image_size=(16, 64))
    assert (given["heads"], given["image_size"]) == (4, (16, 64))


def test_renaming_replaces_whole_parts_of_a_name():
    weights = dict.fromkeys(["norm.weight", "blocks.0.norm1.weight", "decoder_norm.weight"], torch.ones(1))
    assert list(convert.rename(weights, {"norm": "fc_norm", "blocks.0": "layer.0"})) == [
        "fc_norm.weight", "layer.0.norm1.weight", "decoder_norm.weight",
    ]  # fmt: skip


def test_splitting_and_joining_and_reshaping_there_and_back_changes_nothing(small_model):
    weights = scrambled(small_model).state_dict()
    split = convert.split_qkv(weights)
    assert "blocks.0.attention.query.weight" in split and "blocks.0.attention.qkv.weight" not in split
    for again in (convert.join_qkv(split), convert.flatten(convert.unflatten(weights, 8))):
        assert again.keys() == weights.keys() and all(torch.equal(again[name], weights[name]) for name in weights)


def test_options_and_tensors_are_found_in_nested_dictionaries():
    tensors = {"a": torch.ones(1), 7: torch.ones(1), "epoch": 3}
    inner = {"model": tensors, "args": argparse.Namespace(norm_pix_loss=False, lr=0.1)}
    config, weights = convert.unwrap({"teacher": {"state_dict": inner}, "args": {"image_size": 48}})
    assert config == {"norm_pix_loss": False, "image_size": 48} and list(weights) == ["a"]
    endless = {}
    endless["model"] = endless
    assert convert.unwrap(endless) == ({}, {}) == convert.unwrap([tensors])


# ------------------------------------------------------------------------------------------- timm

VARIANTS = {
    "plain ViT": ("vit_base_patch16_224", {}),
    "DeiT": ("deit_base_patch16_224", {}),
    "DINO": ("vit_base_patch16_224.dino", {}),
    "no CLS token": ("vit_base_patch16_224", dict(class_token=False, global_pool="avg", fc_norm=False)),
    "no CLS token, norm after the mean": ("vit_base_patch16_224", dict(class_token=False, global_pool="avg")),
    "CLS token without position": ("vit_base_patch16_224", dict(no_embed_class=True)),
    "DINOv2": ("vit_small_patch14_dinov2", {}),
    "DINOv2 with registers": ("vit_small_patch14_reg4_dinov2", {}),
    "registers without CLS token": ("vit_medium_patch16_reg4_gap_256", {}),
    "DeiT, distilled": ("deit_tiny_distilled_patch16_224", {}),
    "MAE": ("vit_base_patch16_224.mae", {}),
    "DeiT III": ("deit3_base_patch16_224", {}),
    "SigLIP, mean": ("vit_base_patch16_siglip_gap_224", {}),
}


def loaded(variant: str, folder: Path) -> tuple[torch.nn.Module, smae.SMAE]:
    """A ViT of timm, and what we read of it."""
    name, options = VARIANTS[variant]
    peer = timm_vit(name, **options)
    safetensors.torch.save_file(peer.state_dict(), folder / "vit.safetensors")
    return peer, smae.load(folder / "vit.safetensors", heads=4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_vit_of_timm_gives_the_same_features(variant, images, tmp_path):
    peer, ours = loaded(variant, tmp_path)
    assert ours.config["decoder_depth"] == 0 and ours.config["learned_positions"]
    with torch.no_grad():
        tokens, mean = peer.forward_features(images), ours.pooled(images, "mean")
        torch.testing.assert_close(ours.encode(images), tokens, rtol=1e-5, atol=1e-5)
        expected = peer.fc_norm(peer.pool(tokens, "avg"))  # the identity where there is no such norm
        torch.testing.assert_close(mean, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", list(VARIANTS)[:5])
def test_timm_weights_come_back_bit_by_bit(variant, images, tmp_path):
    timm = pytest.importorskip("timm")
    peer, ours = loaded(variant, tmp_path)
    smae.save(ours, tmp_path / "timm", format="timm")
    written = safetensors.torch.load_file(tmp_path / "timm" / "model.safetensors")
    original = {n: t for n, t in peer.state_dict().items() if not n.startswith("head.")}
    assert written.keys() == original.keys() and all(torch.equal(written[n], original[n]) for n in original)
    again = smae.load(tmp_path / "timm")  # its config.json holds heads, size and normalisation
    assert again.config == ours.config and same_weights(again, ours)

    rebuilt = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=False).eval()
    timm.models.load_checkpoint(rebuilt, str(tmp_path / "timm" / "model.safetensors"))
    with torch.no_grad():
        torch.testing.assert_close(rebuilt.forward_features(images), ours.encode(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", list(VARIANTS)[4:9])
def test_timm_reads_what_is_written_of_registers_and_layer_scale(variant, images, tmp_path):
    timm = pytest.importorskip("timm")
    peer, ours = loaded(variant, tmp_path)
    smae.save(ours, tmp_path / "timm", format="timm")
    rebuilt = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    assert rebuilt.num_prefix_tokens == ours.prefix == peer.num_prefix_tokens
    with torch.no_grad():
        expected = peer.forward_features(images)
        torch.testing.assert_close(rebuilt.forward_features(images), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(rebuilt.fc_norm(rebuilt.pool(expected)), peer.fc_norm(peer.pool(expected)))
    again = smae.load(tmp_path / "timm")
    assert again.config == ours.config and same_weights(again, ours)


def test_what_the_names_of_timms_architectures_imply_is_known():
    """Of each ViT of timm that could be loaded, the configuration without arguments gives heads and activation."""
    timm = pytest.importorskip("timm")
    loaded = 0
    for name in timm.list_models():
        if timm.models.model_entrypoint(name).__module__ != "timm.models.vision_transformer":
            continue
        with torch.device("meta"):
            vit = timm.create_model(name, depth=1)
        theirs, config = vit.state_dict(), dict(architecture=name)
        theirs |= {table: torch.zeros(theirs[table].shape) for table in theirs.keys() & {"pos_embed"}}
        try:
            arguments, weights = convert.from_foreign(theirs, config, smae.position_table)
            with torch.device("meta"):
                ours = smae.SMAE(**arguments)
            smae.compare_weights(ours.state_dict(), weights)
        except ValueError:
            continue
        block, norm = vit.blocks[0], vit.norm if hasattr(vit.norm, "eps") else vit.fc_norm
        assert arguments["heads"] == block.attn.num_heads or name.startswith("test_"), name
        assert type(block.mlp.act) is torch.nn.GELU and block.mlp.act.approximate == "none", name
        assert norm.eps == arguments["norm_eps"], name
        assert arguments["norm_after_mean"] == (norm is vit.fc_norm), name
        assert ours.prefix == vit.num_prefix_tokens, name
        loaded += 1
    assert loaded > 60


def test_learned_positions_are_interpolated_as_in_timm(tmp_path):
    peer = timm_vit(dynamic_img_size=True)
    safetensors.torch.save_file(peer.state_dict(), tmp_path / "vit.safetensors")
    ours = smae.load(tmp_path / "vit.safetensors", heads=4)
    wide = torch.randn(2, 3, 32, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours.encode(wide), peer.forward_features(wide), rtol=1e-5, atol=1e-5)


def test_mean_and_deviation_of_the_images_come_with_a_timm_folder(tmp_path):
    timm = pytest.importorskip("timm")
    peer = timm_vit()
    cfg = dict(mean=(0.5, 0.4, 0.3), std=(0.1, 0.2, 0.3))
    timm.models.save_for_hf(peer, tmp_path, model_config=cfg, safe_serialization=True, model_args=dict(num_heads=4))
    config = json.loads((tmp_path / "config.json").read_text())
    config["pretrained_cfg"] = config.get("pretrained_cfg", {}) | {n: list(v) for n, v in cfg.items()}
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours = smae.load(tmp_path)
    assert (ours.config["mean"], ours.config["std"], ours.config["heads"]) == ([0.5, 0.4, 0.3], [0.1, 0.2, 0.3], 4)


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_a_classifier_works_in_timm(pool, small_model, tmp_path):
    timm = pytest.importorskip("timm")
    classifier = scrambled(smae.Classifier(small_model, ["cat", "dog", "fox"], pool))
    smae.save(classifier, tmp_path, format="timm")
    peer = timm.create_model(f"local-dir:{tmp_path}", pretrained=False).eval()
    timm.models.load_checkpoint(peer, str(tmp_path / "model.safetensors"))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(peer(images), classifier(images), rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------- transformers


@pytest.mark.parametrize("eps", [1e-12, 1e-6])
def test_vitmae_of_transformers_comes_back_bit_by_bit(eps, images, tmp_path):
    transformers = pytest.importorskip("transformers")
    peer = vitmae(layer_norm_eps=eps)
    peer.save_pretrained(tmp_path / "theirs")
    ours = smae.load(tmp_path / "theirs")
    assert ours.config["norm_eps"] == eps and ours.config["decoder_heads"] == 2
    noise = torch.rand(2, 36)
    mask = masks.Mask(*(x.sort(1).values for x in noise.argsort(1).split([9, 27], dim=1)))
    with torch.no_grad():
        expected, latent = peer(images, noise=noise), ours.encode(images, mask.visible)
        torch.testing.assert_close(ours(images, mask), expected.loss, rtol=1e-5, atol=0)
        prediction = ours.decode(latent, mask, (6, 6))
        torch.testing.assert_close(prediction, smae.gather_tokens(expected.logits, mask.masked), rtol=1e-5, atol=1e-5)
    smae.save(ours, tmp_path / "ours", format="transformers")
    again, info = transformers.ViTMAEForPreTraining.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    assert same_weights(again, peer)
    for name in ("layer_norm_eps", "norm_pix_loss", "hidden_size", "decoder_num_attention_heads", "image_size"):
        assert getattr(again.config, name) == getattr(peer.config, name)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "ours")
    assert list(processor.image_mean) == ours.config["mean"]
    assert same_weights(smae.load(tmp_path / "ours"), ours)


def test_the_encoder_alone_of_a_vitmae(images, tmp_path):
    peer = vitmae("ViTMAEModel", mask_ratio=0.0)
    peer.save_pretrained(tmp_path)
    ours = smae.load(tmp_path)
    noise = torch.rand(2, 36)
    with torch.no_grad():
        hidden = peer(images, noise=noise).last_hidden_state
        order = noise.argsort(1)  # the order of the peer's patches
        tokens = ours.encode(images)
        torch.testing.assert_close(tokens[:, 0], hidden[:, 0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(smae.gather_tokens(tokens[:, 1:], order), hidden[:, 1:], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="no decoder"):
        ours(images, masks.random_mask(2, 36))


@pytest.mark.parametrize("kind", ["ViT", "DeiT", "Dinov2", "Dinov2WithRegisters", "IJepa", "ViTMSN"])
def test_other_vits_of_transformers_give_the_same_features(kind, images, tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=192)
    config = getattr(transformers, f"{kind}Config")(**sizes, image_size=48, patch_size=8)
    peer = scrambled(getattr(transformers, f"{kind}Model")(config))
    peer.save_pretrained(tmp_path)
    ours = smae.load(tmp_path)
    with torch.no_grad():
        expected = peer(images).last_hidden_state
        torch.testing.assert_close(ours.encode(images), expected, rtol=1e-5, atol=1e-5)


def test_images_that_a_processor_does_not_normalise(tmp_path):
    vitmae().save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(dict(do_normalize=False, image_mean=[0.5] * 3)))
    assert smae.load(tmp_path).statistics == ((0, 0, 0), (1, 1, 1))


def test_a_missing_key_of_a_vitmae_is_named(tmp_path):
    vitmae().save_pretrained(tmp_path)
    weights = safetensors.torch.load_file(tmp_path / "model.safetensors")
    name = next(name for name in weights if name.endswith("0.attention.attention.key.weight") and "decoder" not in name)
    del weights[name]
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing: blocks\.0\.attention\.qkv\.weight; unexpected: blocks\.0"):
        smae.load(tmp_path)


def test_a_format_refuses_models_that_it_cannot_hold(small_model, tmp_path):
    classifier = smae.Classifier(small_model, ["a", "b"])
    wide = smae.SMAE(**small_model.config | dict(image_size=(32, 64)))
    without_cls = smae.SMAE(**small_model.config | dict(class_token=False))
    for model in (classifier, wide, without_cls):
        with pytest.raises(ValueError, match="transformers"):
            smae.save(model, tmp_path, format="transformers")
    with pytest.raises(ValueError, match="unknown format"):
        smae.save(small_model, tmp_path, format="onnx")


# ------------------------------------------------------------------------------------------- facebookresearch/mae


@pytest.mark.parametrize("decoder", [True, False])
def test_a_mae_checkpoint_comes_back_bit_by_bit(decoder, tmp_path):
    tensors = mae_checkpoint(decoder)
    options = argparse.Namespace(norm_pix_loss=False, lr=1e-3)
    torch.save({"model": tensors, "args": options, "epoch": 3}, tmp_path / "mae.pth")
    model = smae.load(tmp_path / "mae.pth", heads=4)
    assert model.config["decoder_depth"] == (2 if decoder else 0)
    assert not model.config["learned_positions"]  # MAE's own positions exist for any grid
    assert not model.config["normalize_pixels"]
    smae.save(model, tmp_path / "again" / "mae.pth", format="mae")
    again = torch.load(tmp_path / "again" / "mae.pth", weights_only=True)["model"]
    assert again.keys() == tensors.keys() and all(torch.equal(again[name], tensors[name]) for name in tensors)


def test_the_decoder_of_a_mae_checkpoint_is_that_of_transformers(images, tmp_path):
    peer = vitmae(layer_norm_eps=1e-6)
    peer.save_pretrained(tmp_path / "theirs")
    smae.save(smae.load(tmp_path / "theirs"), tmp_path / "mae.pth", format="mae")
    names = torch.load(tmp_path / "mae.pth", weights_only=True)["model"]
    assert {"decoder_blocks.1.attn.qkv.weight", "decoder_pred.bias", "blocks.0.mlp.fc2.weight"} <= names.keys()
    ours, noise = smae.load(tmp_path / "mae.pth", heads=4), torch.rand(2, 36)
    ours.decoder_blocks[0].attention.heads = ours.decoder_blocks[1].attention.heads = 2  # 32 channels: 1 is assumed
    mask = masks.Mask(*(x.sort(1).values for x in noise.argsort(1).split([9, 27], dim=1)))
    with torch.no_grad():
        torch.testing.assert_close(ours(images, mask), peer(images, noise=noise).loss, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tensors: tensors,
        lambda tensors: {"state_dict": {f"module.base_encoder.{n}": t for n, t in tensors.items()}},  # MoCo v3
        lambda tensors: {"student": {}, "teacher": {f"backbone.{n}": t for n, t in tensors.items()}},  # DINO
    ],
)
def test_weights_are_found_where_others_put_them(wrap, tmp_path):
    tensors = mae_checkpoint(decoder=False)
    wrapped = wrap(tensors)
    if "state_dict" in wrapped:  # with a momentum encoder and heads of contrastive learning
        wrapped["state_dict"] |= {f"module.momentum_encoder.{n}": t + 1 for n, t in tensors.items()}
        wrapped["state_dict"]["module.predictor.0.weight"] = torch.zeros(3)
    torch.save(wrapped, tmp_path / "x.pth")
    assert torch.equal(smae.load(tmp_path / "x.pth", heads=4).cls_token, tensors["cls_token"][0, 0])


@pytest.mark.parametrize(
    "width, wrap, heads",
    [(192, "", 3), (384, "", 6), (768, "", 12), (1280, "", 16), (256, "", 4), (384, "module.base_encoder.", 12)],
)
def test_heads_of_a_file_without_configuration(width, wrap, heads, tmp_path):
    tensors = timm_vit(embed_dim=width, depth=1, num_heads=1).state_dict()
    torch.save({"state_dict": {wrap + name: tensor for name, tensor in tensors.items()}}, tmp_path / "vit.pth")
    assert smae.load(tmp_path / "vit.pth").config["heads"] == heads


def test_options_that_weights_do_not_show_are_written_beside_them(small_model, tmp_path):
    unusual = dict(
        image_size=[16, 48], norm_eps=1e-4, normalize_pixels=False, mean=[0.5, 0.4, 0.3], std=[0.3, 0.2, 0.1]
    )
    model = scrambled(smae.SMAE(**small_model.config | unusual | dict(learned_positions=True)))
    smae.save(model, tmp_path / "mae.pth", format="mae")
    again = smae.load(tmp_path / "mae.pth")
    assert again.config == model.config and same_weights(again, model)
    smae.save(model, tmp_path / "timm", format="timm")
    encoder = smae.load(tmp_path / "timm" / "model.safetensors")  # the config.json beside it is read
    kept = [name for name in model.config if "decoder" not in name and name != "normalize_pixels"]
    assert [encoder.config[name] for name in kept] == [model.config[name] for name in kept]


# ------------------------------------------------------------------------------------------- what does not fit


def change(tensors: dict, name: str, value: torch.Tensor | None = None) -> dict:
    tensors = dict(tensors)
    tensors.pop(name, None)
    return tensors if value is None else tensors | {name: value}


def test_errors_name_the_tensors_that_do_not_fit(tmp_path):
    tensors = mae_checkpoint()
    cases = [
        (change(tensors, "blocks.1.norm1.weight"), r"missing: blocks\.1\.norm1\.weight"),
        (change(tensors, "blocks.1.ls3.gamma", torch.ones(64)), r"unexpected: blocks\.1\.ls3\.gamma"),
        (change(tensors, "norm.bias", torch.ones(63)), r"another shape: norm\.bias \(63,\) instead of \(64,\)"),
        (change(tensors, "blocks.0.attn.q_norm.weight", torch.ones(64)), "it has norms of queries and keys"),
        (change(tensors, "blocks.0.attn.rel_pos_h", torch.ones(9, 64)), "it has relative positions"),
        (change(tensors, "blocks.0.attn.rope.freqs", torch.ones(9, 64)), "it has rotary positions"),
        (change(tensors, "blocks.0.mlp.w12.weight", torch.ones(9, 64)), "it has SwiGLU"),
        (change(tensors, "blocks.0.gamma_1", torch.ones(64)), "DeiT III"),
        (change(tensors, "norm_pre.weight", torch.ones(64)), "a norm before its blocks"),
        (change(tensors, "decoder_embed.bias"), "missing: .*decoder_embed.bias"),
        (change(tensors, "pos_embed"), "lacks absolute positions"),
        (change(tensors, "pos_embed", torch.zeros(1, 30, 64)), "30 positions do not form a square"),
        (change(tensors, "patch_embed.proj.weight"), r"not a supported ViT"),
        ({"layer1.weight": torch.ones(2)}, r"not a supported ViT: .*layer1\.weight"),
    ]
    for i, (content, message) in enumerate(cases):
        torch.save({"model": content}, tmp_path / f"{i}.pth")
        with pytest.raises(ValueError, match=message):
            smae.load(tmp_path / f"{i}.pth", heads=4)
    torch.save({"model": tensors, "loss": torch.ones(())}, tmp_path / "loss.pth")  # this one does fit
    assert smae.load(tmp_path / "loss.pth", heads=4).config["depth"] == 2
    torch.save({"epoch": 3}, tmp_path / "none.pth")
    with pytest.raises(ValueError, match="holds no model"):
        smae.load(tmp_path / "none.pth")
    (tmp_path / "text.pth").write_text("not a checkpoint")
    with pytest.raises(ValueError, match="must hold tensors and plain values only"):
        smae.load(tmp_path / "text.pth")
    (tmp_path / "text.safetensors").write_text("not a checkpoint")
    with pytest.raises(ValueError, match=r"text\.safetensors cannot be loaded: SafetensorError"):
        smae.load(tmp_path / "text.safetensors")
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        smae.load(tmp_path / "nowhere.pth")


# ------------------------------------------------------------------------------------------- what people have


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(hidden_act="relu"), "hidden_act is 'relu', and only gelu"),
        (dict(hidden_act="gelu_new"), "hidden_act is 'gelu_new'"),
        (dict(hidden_activation="relu"), "hidden_activation is 'relu'"),
        (dict(vision_config=dict(hidden_act="quick_gelu")), "hidden_act is 'quick_gelu'"),
        (dict(use_swiglu_ffn=True), "it has use_swiglu_ffn"),
        (dict(architecture="vit_base_patch32_clip_quickgelu_224"), "quickgelu_224 has another activation"),
        (dict(architecture="vit_small_patch16_rope_224"), "rope_224 has rotary positions"),
        (dict(model_type="dinov3_vit"), "dinov3_vit has rotary positions"),
        (dict(model_args=dict(act_layer="silu")), "act_layer is 'silu'"),
        (dict(model_args=dict(norm_layer="rmsnorm")), "norm_layer is 'rmsnorm'"),
        (dict(model_args=dict(qk_norm=True)), "it has qk_norm"),
        (dict(model_args=dict(final_norm=False)), "no final norm"),
    ],
)
def test_options_that_change_the_forward_pass_are_refused_by_name(change, message, tmp_path):
    smae.save(smae.SMAE(**SIZES), tmp_path, format="timm")
    config = json.loads((tmp_path / "config.json").read_text())
    for name, value in change.items():
        config[name] = config.get(name, {}) | value if isinstance(value, dict) else value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        smae.load(tmp_path)


SIZES = dict(width=32, depth=2, heads=2, decoder_depth=0, image_size=32, patch_size=8)


def test_a_state_dict_of_transformers_5_is_read_like_its_folder(tmp_path):
    transformers = pytest.importorskip("transformers", minversion="5")
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    sizes |= dict(decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2)
    config = transformers.ViTMAEConfig(**sizes, decoder_intermediate_size=32, image_size=32, patch_size=8)
    theirs = transformers.ViTMAEForPreTraining(config).eval()
    theirs.save_pretrained(tmp_path / "folder")
    torch.save(theirs.state_dict(), tmp_path / "whole.pth")
    torch.save(theirs.vit.state_dict(), tmp_path / "encoder.pth")
    expected = smae.load(tmp_path / "folder").state_dict()
    whole = smae.load(tmp_path / "whole.pth", heads=2).state_dict()
    assert whole.keys() == expected.keys() and all(torch.equal(whole[name], expected[name]) for name in whole)
    twice = torch.nn.Module()
    twice.model = twice.encoder = theirs.vit
    torch.save({"state_dict": twice.state_dict()}, tmp_path / "twice.pth")
    torch.save({"state_dict": torch.nn.ModuleDict(dict(module=theirs)).state_dict()}, tmp_path / "module.pth")
    for file in ("encoder.pth", "twice.pth", "module.pth"):
        encoder = smae.load(tmp_path / file, heads=2).state_dict()
        assert encoder and all(torch.equal(encoder[name], expected[name]) for name in encoder), file


def test_an_encoder_under_two_names_is_read_once(tmp_path):
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0)
    twice = torch.nn.Module()
    twice.model = twice.encoder = model
    torch.save({"state_dict": twice.state_dict()}, tmp_path / "twice.ckpt")
    loaded = smae.load(tmp_path / "twice.ckpt")
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(loaded.encode(images), model.eval().forward_features(images), rtol=1e-5, atol=1e-5)


def test_a_file_that_needs_code_names_what_it_needs_and_gives_no_bad_advice(tmp_path):
    torch.save({"model": torch.nn.Linear(2, 2)}, tmp_path / "whole.pth")
    with pytest.raises(
        ValueError, match=r"needs the code of torch\.nn\.modules\.linear\.Linear.*save its state_dict"
    ) as error:
        smae.load(tmp_path / "whole.pth")
    assert "weights_only" not in str(error.value)
