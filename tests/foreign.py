"""Models and checkpoints of other projects, as the tests need them: small and random."""

import pytest
import torch

import smae


def scrambled(module: torch.nn.Module) -> torch.nn.Module:
    """Give every tensor random values, so that none can be mistaken for another."""
    for tensor in module.state_dict().values():
        torch.nn.init.normal_(tensor, std=0.2)
    return module.eval()


def timm_vit(name: str = "vit_base_patch16_224", **options) -> torch.nn.Module:
    timm = pytest.importorskip("timm")
    sizes = dict(img_size=48, patch_size=8, embed_dim=64, depth=2, num_heads=4, num_classes=7)
    return scrambled(timm.create_model(name, **sizes | options))


def vitmae(kind: str = "ViTMAEForPreTraining", **options) -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTMAEConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=192, decoder_hidden_size=32,
        decoder_num_hidden_layers=2, decoder_num_attention_heads=2, decoder_intermediate_size=128,
        image_size=48, patch_size=8, norm_pix_loss=True, **options,
    )  # fmt: skip
    return scrambled(getattr(transformers, kind)(config))


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def mae_checkpoint(decoder: bool = True) -> dict[str, torch.Tensor]:
    """Tensors with the names and shapes of facebookresearch/mae: a ViT of timm, and a decoder like one."""
    encoder = timm_vit()
    tensors = {n: t for n, t in encoder.state_dict().items() if not n.startswith("head.")}
    tensors["pos_embed"] = smae.position_table((6, 6), 64, prefix=1)[None]
    if decoder:
        blocks = timm_vit(embed_dim=32, num_heads=1).state_dict()
        tensors |= {f"decoder_{n}": t for n, t in blocks.items() if n.startswith(("blocks.", "norm."))}
        tensors["decoder_pos_embed"] = smae.position_table((6, 6), 32, prefix=1)[None]
        shapes = {"mask_token": (1, 1, 32), "decoder_embed.weight": (32, 64), "decoder_embed.bias": (32,)}
        shapes |= {"decoder_pred.weight": (192, 32), "decoder_pred.bias": (192,)}
        tensors |= {name: torch.randn(shape) for name, shape in shapes.items()}
    return tensors
