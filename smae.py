"""Self-guided masked autoencoder: a ViT masked autoencoder (MAE) written with einops, and its checkpoints.

Works alone: needs torch, einops and safetensors. What to mask is decided elsewhere (``masks.py``); any object with
ascending integer index tensors ``visible`` (b, v) and ``masked`` (b, m) will do.

Letters in shapes: ``b`` batch, ``n`` patches (n = h * w of the patch grid), ``v`` visible, ``m`` masked, ``d`` width,
``p`` patch side, ``c`` channels, ``H``/``W`` image height/width in pixels.

Sources: MAE (He et al., CVPR 2022, arXiv 2111.06377); ViT (Dosovitskiy et al., ICLR 2021).
"""

import argparse
import errno
import json
import math
import os
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

PRESETS = {
    "tiny": dict(width=192, depth=12, heads=3, decoder_width=128, decoder_depth=2, decoder_heads=4),
    "small": dict(width=384, depth=12, heads=6, decoder_width=256, decoder_depth=8, decoder_heads=8),
    "base": dict(width=768, depth=12, heads=12, decoder_width=512, decoder_depth=8, decoder_heads=16),
    "large": dict(width=1024, depth=24, heads=16, decoder_width=512, decoder_depth=8, decoder_heads=16),
    "huge": dict(width=1280, depth=32, heads=16, decoder_width=512, decoder_depth=8, decoder_heads=16, patch_size=14),
}

LIMITS = {  # of the arguments of SMAE: more than the first number, at most the second; beyond them nothing is a model
    "width": (0, 2**16),
    "depth": (0, 256),
    "heads": (0, 2**16),
    "decoder_width": (0, 2**16),
    "decoder_depth": (-1, 256),
    "decoder_heads": (0, 2**16),
    "patch_size": (0, 2**12),
    "channels": (0, 2**12),
    "mlp_ratio": (0.0, 1000.0),
    "norm_eps": (0.0, 1.0),
    "mean": (-1e6, 1e6),
    "std": (0.0, 1e6),
}
MOST_PATCHES = 2**16


def sincos_positions(h: int, w: int, width: int) -> Tensor:
    """Fixed 2-D sine-cosine position embeddings of an (h, w) patch grid: (h * w, width), float32.

    The first half of the channels encodes the column, the second half the row, each as sines then cosines of
    geometrically falling frequencies (MAE, appendix A.1). Raises ValueError unless ``width`` is divisible by 4.
    """
    if width % 4:
        raise ValueError(f"sin-cos positions need a width divisible by 4, got {width}")
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))

    def encode(positions: Tensor) -> Tensor:  # (length,) -> (length, width / 2)
        angles = positions[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1).float()

    columns, rows = encode(torch.arange(w).double()), encode(torch.arange(h).double())
    return torch.cat([repeat(columns, "w d -> (h w) d", h=h), repeat(rows, "h d -> (h w) d", w=w)], dim=1)


def position_table(grid: tuple[int, int], width: int, prefix: int) -> Tensor:
    """Position embeddings (prefix + n, width): zero for the CLS token, sin-cos for the patches, as in MAE."""
    return F.pad(sincos_positions(*grid, width), (0, 0, prefix, 0))


def patchify(images: Tensor, p: int) -> Tensor:
    """Images (b, c, H, W) to flattened patches (b, n, p * p * c), row by row."""
    return rearrange(images, "b c (h p1) (w p2) -> b (h w) (p1 p2 c)", p1=p, p2=p)


def unpatchify(patches: Tensor, p: int, grid: tuple[int, int]) -> Tensor:
    """Flattened patches (b, n, p * p * c) of an (h, w) grid back to images (b, c, H, W)."""
    return rearrange(patches, "b (h w) (p1 p2 c) -> b c (h p1) (w p2)", h=grid[0], w=grid[1], p1=p, p2=p)


def take(tokens: Tensor, indices: Tensor) -> Tensor:
    """The tokens (b, k, d) at ``indices`` (b, k) of ``tokens`` (b, n, d), or of (1, n, d) shared by the batch."""
    return tokens.expand(len(indices), -1, -1).gather(1, indices[..., None].expand(-1, -1, tokens.shape[-1]))


class Attention(nn.Module):
    """Multi-head self-attention over tokens (b, n, d)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = F.scaled_dot_product_attention(*self.split(x))
        return self.out(rearrange(x, "b heads n d -> b n (heads d)"))

    def split(self, x: Tensor) -> Tensor:
        """Queries, keys and values, each (b, heads, n, d)."""
        return rearrange(self.qkv(x), "b n (three heads d) -> three b heads n d", three=3, heads=self.heads)

    def weights(self, x: Tensor, queries: slice = slice(None)) -> Tensor:
        """How much ``queries``, some of the tokens, attend to each: (b, heads, queries, n), float32, rows sum to 1."""
        q, k, _ = self.split(x)
        return ((q[:, :, queries] * q.shape[-1] ** -0.5) @ k.mT).float().softmax(dim=-1)


class Block(nn.Module):
    """Pre-norm transformer block over tokens (b, n, d).

    While training, either branch is left out of an image with probability ``drop_path``, an attribute
    (stochastic depth, Huang et al., ECCV 2016).
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float, norm_eps: float = 1e-6):
        super().__init__()
        hidden = round(width * mlp_ratio)
        self.norm1 = nn.LayerNorm(width, eps=norm_eps)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.drop_path = 0.0

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._drop(self.attention(self.norm1(x)))
        return x + self._drop(self.mlp(self.norm2(x)))

    def _drop(self, branch: Tensor) -> Tensor:
        if not self.training or self.drop_path == 0:
            return branch
        kept = torch.rand(len(branch), 1, 1, device=branch.device) >= self.drop_path
        return branch * (kept / (1 - self.drop_path)).to(branch.dtype)


def _check(config: dict):
    """Raise ValueError where an argument of SMAE() is of a wrong type or beyond its limits."""
    for name, (low, high) in LIMITS.items():
        several = name in ("mean", "std")
        kinds, kind = (int, "an integer") if isinstance(high, int) else ((int, float), "a number")
        values = config[name] if several else [config[name]]
        if several and not (isinstance(values, (list, tuple)) and len(values) in (3, config["channels"])):
            raise ValueError(f"{name} must be a list of 3 numbers, or one for each channel, got {_told(values)}")
        for value in values:
            if not isinstance(value, kinds) or isinstance(value, bool) or not low < value <= high:
                raise ValueError(f"{name} must be {kind} above {low} and at most {high}, got {_told(value)}")
    for name in ("normalize_pixels", "class_token", "learned_positions"):
        if not isinstance(config[name], bool):
            raise ValueError(f"{name} must be true or false, got {_told(config[name])}")


def _sides(image_size) -> tuple[int, int]:
    """Height and width of an image size, a side or a pair. Raises ValueError if it is neither."""
    sides = (image_size, image_size) if isinstance(image_size, int) else image_size
    if not (isinstance(sides, (list, tuple)) and len(sides) == 2 and all(type(s) is int and s > 0 for s in sides)):
        raise ValueError(f"image_size must be a side or a pair of sides, in pixels, got {_told(image_size)}")
    return tuple(sides)


def _told(value) -> str:
    """What was received, for a message: short, whatever it is."""
    plain = value is None or isinstance(value, (int, float, str))
    return repr(value)[:60] if plain else f"a {type(value).__name__}"


class SMAE(nn.Module):
    """A ViT masked autoencoder: ``SMAE(**PRESETS["base"])``.

    ``image_size`` (a side or an (H, W) pair, in pixels) names the grid whose positions are precomputed; any other
    image whose sides are divisible by ``patch_size`` works too. ``normalize_pixels`` makes the target of the loss the
    pixels of a patch with their own mean and deviation removed. ``decoder_depth=0`` makes an encoder alone, which can
    neither decode nor compute a loss. ``config`` holds the arguments of the constructor.

    For encoders from elsewhere: ``class_token=False`` does without the CLS token; ``learned_positions`` makes the
    position embeddings parameters, interpolated for other grids; ``mean`` and ``std`` say how the images (RGB in
    0 ... 1) are to be normalised by whoever feeds them. ``prefix`` is the number of tokens before the patches, 1 or 0.

    Raises ValueError where widths, heads, image and patch size do not divide, for wrong types, and beyond ``LIMITS``.
    """

    def __init__(
        self,
        *,
        width: int,
        depth: int,
        heads: int,
        decoder_width: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        image_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        channels: int = 3,
        mlp_ratio: float = 4.0,
        norm_eps: float = 1e-6,
        normalize_pixels: bool = True,
        class_token: bool = True,
        learned_positions: bool = False,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
    ):
        super().__init__()
        height, width_px = _sides(image_size)
        self.config = dict(
            width=width,
            depth=depth,
            heads=heads,
            decoder_width=decoder_width,
            decoder_depth=decoder_depth,
            decoder_heads=decoder_heads,
            image_size=[height, width_px],
            patch_size=patch_size,
            channels=channels,
            mlp_ratio=mlp_ratio,
            norm_eps=norm_eps,
            normalize_pixels=normalize_pixels,
            class_token=class_token,
            learned_positions=learned_positions,
            mean=mean,
            std=std,
        )
        _check(self.config)
        self.config |= dict(mean=list(mean), std=list(std))
        for name, d, count in (("heads", width, heads), ("decoder_heads", decoder_width, decoder_heads)):
            if d % count:
                raise ValueError(f"{name} ({count}) must divide the width ({d})")
            if not round(d * mlp_ratio):
                raise ValueError(f"mlp_ratio ({mlp_ratio}) leaves nothing of a width of {d}")
        if height * width_px > MOST_PATCHES * patch_size**2:
            raise ValueError(f"an image of {height}x{width_px} has more than {MOST_PATCHES} patches of {patch_size}")
        self.patch_size, self.normalize_pixels, self.prefix = patch_size, normalize_pixels, int(class_token)
        grid = self.grid(torch.empty(0, channels, height, width_px, device="meta"))
        self.patch_count = grid[0] * grid[1]
        patch_dim = patch_size * patch_size * channels

        self.embed = nn.Linear(patch_dim, width)
        if class_token:
            self.cls_token = nn.Parameter(torch.zeros(width))
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio, norm_eps) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self._add_positions("positions", grid, width)

        if decoder_depth:
            self.decoder_embed = nn.Linear(width, decoder_width)
            self.mask_token = nn.Parameter(torch.zeros(decoder_width))
            self.decoder_blocks = nn.ModuleList(
                Block(decoder_width, decoder_heads, mlp_ratio, norm_eps) for _ in range(decoder_depth)
            )
            self.decoder_norm = nn.LayerNorm(decoder_width, eps=norm_eps)
            self.head = nn.Linear(decoder_width, patch_dim)
            self._add_positions("decoder_positions", grid, decoder_width)
        if not self.norm.weight.is_meta:
            self._initialise()

    def _add_positions(self, name: str, grid: tuple[int, int], width: int):
        if self.norm.weight.is_meta:  # only names and shapes are wanted
            table = torch.empty(self.prefix + grid[0] * grid[1], width)
        else:
            table = position_table(grid, width, self.prefix)
        if self.config["learned_positions"]:
            self.register_parameter(name, nn.Parameter(table))
        else:
            self.register_buffer(name, table, persistent=False)

    def _initialise(self):
        """Xavier-uniform weights, zero biases, tokens from N(0, 0.02) (MAE, appendix A.1)."""
        for name, parameter in self.named_parameters():
            if name in ("cls_token", "mask_token"):
                nn.init.normal_(parameter, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def grid(self, images: Tensor) -> tuple[int, int]:
        """The patch grid (h, w) of images (b, c, H, W). Raises ValueError if a side is not divisible by the patch."""
        (channels, height, width), p = images.shape[1:], self.patch_size
        if height % p or width % p or not height or not width:
            raise ValueError(f"image size {height}x{width} is not a positive multiple of the patch size {p}")
        if channels != self.config["channels"]:
            raise ValueError(f"the model takes {self.config['channels']} channels, the images have {channels}")
        return height // p, width // p

    def _positions(self, table: Tensor, grid: tuple[int, int]) -> Tensor:
        """Position embeddings (1, prefix + n, d) for ``grid``: the table where it fits, else interpolated or anew."""
        own = tuple(side // self.patch_size for side in self.config["image_size"])
        if own == grid:
            return table[None]
        if not self.config["learned_positions"]:
            return position_table(grid, table.shape[1], self.prefix).to(table)[None]
        image = rearrange(table[self.prefix :].float(), "(h w) d -> 1 d h w", h=own[0])
        image = F.interpolate(image, grid, mode="bicubic", antialias=True, align_corners=False)  # as timm does
        return torch.cat([table[: self.prefix], rearrange(image, "1 d h w -> (h w) d").to(table)])[None]

    def forward(self, images: Tensor, mask) -> Tensor:
        """Mean squared error on the masked patches: normalised images (b, c, H, W) and a Mask to a float32 scalar."""
        latent = self.encode(images, mask.visible)
        prediction = self.decode(latent, mask, self.grid(images))
        target = self.target(images, mask.masked)
        return F.mse_loss(prediction.float(), target)

    def encode(self, images: Tensor, visible: Tensor | None = None, layer: int | None = None) -> Tensor:
        """Encode the ``visible`` patches (b, v), all of them by default: (b, 1 + v, d), CLS token first (if any).

        ``layer`` (1 ... depth) returns the tokens after that block, without the final norm. Raises ValueError if it
        is out of range.
        """
        if layer is not None and not 1 <= layer <= len(self.blocks):
            raise ValueError(f"layer must lie between 1 and {len(self.blocks)}, got {layer}")
        x = self._tokens(images, visible)
        for block in self.blocks[:layer]:
            x = block(x)
        return x if layer else self.norm(x)

    def _tokens(self, images: Tensor, visible: Tensor | None = None) -> Tensor:
        """What the first block sees: the CLS token, if any, and the embedded patches (b, 1 + v, d)."""
        table = self._positions(self.positions, self.grid(images))
        patches, positions = patchify(images, self.patch_size), table[:, self.prefix :]
        if visible is not None:
            patches, positions = take(patches, visible), take(positions, visible)
        x = self.embed(patches) + positions
        if self.prefix:
            cls = repeat(self.cls_token + table[0, 0], "d -> b 1 d", b=len(images))
            x = torch.cat([cls, x], dim=1)
        return x

    def decode(self, latent: Tensor, mask, grid: tuple[int, int]) -> Tensor:
        """Predict the masked patches of an (h, w) grid from the encoder's tokens (b, 1 + v, d): (b, m, p * p * c).

        Raises ValueError if the model is an encoder alone.
        """
        if not self.config["decoder_depth"]:
            raise ValueError("this model is an encoder alone: it has no decoder")
        x = self._decoder_tokens(latent, mask.visible, mask.masked, grid)
        for block in self.decoder_blocks:
            x = block(x)
        return self.head(self.decoder_norm(x[:, -mask.masked.shape[1] :]))

    def _decoder_tokens(self, latent: Tensor, visible: Tensor, masked: Tensor, grid: tuple[int, int]) -> Tensor:
        """What the decoder's first block sees, (b, 1 + v + m, decoder d): CLS, visible patches, mask tokens."""
        x = self.decoder_embed(latent)
        cls, positions = self._positions(self.decoder_positions, grid).split([self.prefix, grid[0] * grid[1]], dim=1)
        shown = x[:, self.prefix :] + take(positions, visible)
        hidden = self.mask_token + take(positions, masked)
        return torch.cat([x[:, : self.prefix] + cls, shown, hidden], dim=1)

    def features(self, images: Tensor, layer: int | str) -> Tensor:
        """Patch tokens (b, n, d) of whole images (b, c, H, W) after a block, without norm: what can guide a mask.

        ``layer``: 1 ... depth for an encoder block; "decoder-1", "decoder-2", ... for a decoder block, whose input
        then are the encoder's tokens of all patches and no mask token. Raises ValueError if there is no such block.
        """
        if layer not in self.layers:
            raise ValueError(f"there is no layer {layer!r}, only {', '.join(map(str, self.layers))}")
        if isinstance(layer, int):
            return self.encode(images, layer=layer)[:, self.prefix :]
        h, w = self.grid(images)
        everything = torch.arange(h * w, device=images.device).expand(len(images), -1)
        x = self._decoder_tokens(self.encode(images), everything, everything[:, :0], (h, w))
        for block in self.decoder_blocks[: int(layer.removeprefix("decoder-"))]:
            x = block(x)
        return x[:, self.prefix :]

    @property
    def layers(self) -> list[int | str]:
        """The names that :meth:`features` knows the blocks by."""
        decoder = [f"decoder-{i}" for i in range(1, self.config["decoder_depth"] + 1)]
        return [*range(1, len(self.blocks) + 1), *decoder]

    @torch.no_grad()
    def class_attention(self, images: Tensor) -> Tensor:
        """How much the CLS token attends to each patch in the last encoder block: (b, heads, n), float32.

        Raises ValueError if the model has no CLS token.
        """
        if not self.prefix:
            raise ValueError("this model has no CLS token, whose attention could be asked for")
        last = self.blocks[-1]
        x = self.encode(images, layer=len(self.blocks) - 1) if len(self.blocks) > 1 else self._tokens(images)
        return last.attention.weights(last.norm1(x), slice(1))[:, :, 0, 1:]

    @torch.no_grad()
    def decoder_attention(self, images: Tensor, mask) -> Iterator[Tensor]:
        """Attention of CLS, visible and masked patches in each decoder block in turn: (b, heads, t, t), float32."""
        x = self._decoder_tokens(self.encode(images, mask.visible), mask.visible, mask.masked, self.grid(images))
        for block in self.decoder_blocks:
            yield block.attention.weights(block.norm1(x))
            x = block(x)

    def target(self, images: Tensor, masked: Tensor) -> Tensor:
        """What the decoder should predict: the pixels (b, m, p * p * c) of the masked patches, normalised if asked."""
        target = take(patchify(images, self.patch_size), masked).float()
        if self.normalize_pixels:
            mean, std = patch_statistics(target)
            target = (target - mean) / std
        return target

    @torch.no_grad()
    def reconstruct(self, images: Tensor, mask) -> Tensor:
        """Images (b, c, H, W) with the masked patches replaced by the model's prediction.

        With normalised pixels the model predicts neither brightness nor contrast of a patch: both are borrowed from
        the input. Patches in neither set of the mask stay as they are.
        """
        grid, patches = self.grid(images), patchify(images, self.patch_size)
        prediction = self.decode(self.encode(images, mask.visible), mask, grid).to(patches.dtype)
        if self.normalize_pixels:
            mean, std = patch_statistics(take(patches, mask.masked))
            prediction = prediction * std + mean
        indices = mask.masked[..., None].expand_as(prediction)
        return unpatchify(patches.scatter(1, indices, prediction), self.patch_size, grid)


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (b, m, 1) of each patch's values (b, m, p * p * c), kept away from zero as in MAE."""
    return patches.mean(dim=-1, keepdim=True), (patches.var(dim=-1, keepdim=True) + 1e-6).sqrt()


def pool(tokens: Tensor, how: str, prefix: int = 1) -> Tensor:
    """One vector (b, d) for the tokens (b, prefix + n, d) of each image: the CLS token ("cls") or the patches' "mean".

    Raises ValueError for the CLS token of a model that has none (``prefix`` 0), and for anything else.
    """
    if how not in ("cls", "mean") or (how == "cls" and not prefix):
        raise ValueError(f"cannot pool by {how!r}, but by {'cls or ' * prefix}mean")
    return tokens[:, 0] if how == "cls" else tokens[:, prefix:].mean(dim=1)


class Classifier(nn.Module):
    """An encoder with a linear head: normalised images (b, c, H, W) to logits (b, classes).

    Tokens are pooled before the last norm, which then starts anew if they are averaged (MAE, fine-tuning).
    ``drop_path`` grows linearly over the blocks, from 0 to the value given. ``encoder`` loses its decoder.

    Raises ValueError for classes that are no names, a pooling that the encoder has not, a ``drop_path`` out of range.
    """

    def __init__(self, encoder: SMAE, classes: Sequence[str], pool: str = "mean", drop_path: float = 0.0):
        super().__init__()
        named = isinstance(classes, (list, tuple)) and all(isinstance(name, str) for name in classes)
        if not named or not classes:
            raise ValueError(f"classes must be a list of names, got {_told(classes)}")
        known = ["mean", "cls"] if encoder.prefix else ["mean"]
        if pool not in known:
            raise ValueError(f"cannot pool by {_told(pool)}, but by {' or '.join(known)}")
        if not isinstance(drop_path, (int, float)) or not 0 <= drop_path < 1:
            raise ValueError(f"drop_path must be a number from 0 to below 1, got {_told(drop_path)}")
        self.encoder = SMAE(**encoder.config | dict(decoder_depth=0))
        weights = encoder.state_dict()
        self.encoder.load_state_dict({name: weights[name] for name in self.encoder.state_dict()})
        self.classes, self.pool, self.config = list(classes), pool, self.encoder.config
        self.head = nn.Linear(self.config["width"], len(self.classes))
        nn.init.trunc_normal_(self.head.weight, std=2e-5)
        nn.init.zeros_(self.head.bias)
        if pool == "mean":
            self.encoder.norm.reset_parameters()
        depth = len(self.encoder.blocks)
        for i, block in enumerate(self.encoder.blocks):
            block.drop_path = drop_path * i / max(1, depth - 1)

    def features(self, images: Tensor) -> Tensor:
        """What the head sees of the images: (b, d)."""
        tokens = self.encoder.encode(images, layer=len(self.encoder.blocks))
        return self.encoder.norm(pool(tokens, self.pool, self.encoder.prefix))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


# ------------------------------------------------------------------------------------------------- checkpoints

MAE_NAMES = {  # ours: those of facebookresearch/mae, and of timm
    "embed": "patch_embed.proj",
    "positions": "pos_embed",
    "attention.qkv": "attn.qkv",
    "attention.out": "attn.proj",
    "mlp.0": "mlp.fc1",
    "mlp.2": "mlp.fc2",
    "decoder_positions": "decoder_pos_embed",
    "head": "decoder_pred",
}
TRANSFORMERS_NAMES = {  # ours: those of transformers' ViTMAE
    "embed": "vit.embeddings.patch_embeddings.projection",
    "cls_token": "vit.embeddings.cls_token",
    "positions": "vit.embeddings.position_embeddings",
    "blocks": "vit.encoder.layer",
    "norm1": "layernorm_before",
    "attention.query": "attention.attention.query",  # these three make up our attention.qkv
    "attention.key": "attention.attention.key",
    "attention.value": "attention.attention.value",
    "attention.out": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.0": "intermediate.dense",
    "mlp.2": "output.dense",
    "norm": "vit.layernorm",
    "decoder_embed": "decoder.decoder_embed",
    "mask_token": "decoder.mask_token",
    "decoder_positions": "decoder.decoder_pos_embed",
    "decoder_blocks": "decoder.decoder_layers",
    "decoder_norm": "decoder.decoder_norm",
    "head": "decoder.decoder_pred",
}
TOLD_BY_MAE = ("norm_pix_loss", "image_size", "image_mean", "image_std", "layer_norm_eps")  # and by _foreign_config
TOLD_BY_MAE += ("num_attention_heads", "decoder_num_attention_heads")
NOT_THE_ENCODER = ("head.", "head_dist.", "pre_logits.", "classifier.", "vit.pooler.", "pooler.")  # classifiers' heads


def save(model: SMAE | Classifier, path: str | os.PathLike, config: dict | None = None, format: str = "smae"):
    """Write a checkpoint; :func:`load` reads encoder and decoder back to the bit. Files appear whole or not at all.

    ``format``: "smae", a folder with ``model.safetensors`` and ``config.json`` (the constructor's arguments under
    "model", and whatever else ``config`` holds); "timm", a folder for ``timm.create_model("local-dir:" + folder)``:
    encoder and classifier; "transformers", a folder for ``ViTMAEForPreTraining.from_pretrained``; "mae", a ``.pth``
    file as facebookresearch/mae writes them. (timm has an epsilon of 1e-6 in its norms, whatever that of the model.)
    Raises ValueError for what a format has no place for.
    """
    path, classifier = Path(path), isinstance(model, Classifier)
    if format == "smae":
        content = {"model": model.config, **(config or {})}
        if classifier:
            content["classifier"] = dict(classes=model.classes, pool=model.pool)
        return _write_folder(path, _tensors(model), {"config.json": content})

    encoder = model.encoder if classifier else model
    weights, p = _tensors(encoder), encoder.patch_size
    for name in ("positions", "decoder_positions"):
        if hasattr(encoder, name):
            weights[name] = getattr(encoder, name).detach().cpu()[None]
    for name in {"cls_token", "mask_token"} & weights.keys():
        weights[name] = weights[name][None, None]
    weights["embed.weight"] = rearrange(weights["embed.weight"], "d (p1 p2 c) -> d c p1 p2", p1=p, p2=p).contiguous()

    if format == "transformers":
        if classifier or not encoder.prefix or len(set(encoder.config["image_size"])) > 1:
            raise ValueError("ViTMAE of transformers has a CLS token, a square grid, no classifier: write timm instead")
        for name in [name for name in weights if ".qkv." in name]:
            for part, tensor in zip(("query", "key", "value"), weights.pop(name).chunk(3)):
                weights[name.replace("qkv", part)] = tensor.contiguous()
        config = _foreign_config(encoder)
        processor = dict(
            image_processor_type="ViTImageProcessor",
            size=dict(zip(("height", "width"), config["image_size"])),
            image_mean=config.pop("image_mean"),
            image_std=config.pop("image_std"),
        )
        config["image_size"] = config["image_size"][0]
        texts = {"config.json": config, "preprocessor_config.json": processor}
        return _write_folder(path, _rename(weights, TRANSFORMERS_NAMES), texts)

    weights = _rename(weights, MAE_NAMES)
    if classifier:
        weights = _rename(weights, {"norm": "fc_norm"}) if model.pool == "mean" else weights
        weights |= {f"head.{name}": tensor for name, tensor in _tensors(model.head).items()}
    if format == "mae":
        path.parent.mkdir(parents=True, exist_ok=True)
        args = {name: value for name, value in _foreign_config(encoder).items() if name in TOLD_BY_MAE}

        def write(part: Path):
            with open(part, "wb") as file:  # given a path, torch.save would not tell the reason of a failure
                torch.save({"model": weights, "args": args}, file)

        return _write({path: write})
    if format == "timm":
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith(("decoder_", "mask_token"))}
        return _write_folder(path, weights, {"config.json": _timm_config(model)})
    raise ValueError(f"unknown format {format!r}: smae, timm, transformers or mae")


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}


def _write_folder(folder: Path, weights: dict[str, Tensor], texts: dict[str, dict]):
    folder.mkdir(parents=True, exist_ok=True)
    writers = {
        folder / "model.safetensors": lambda part: safetensors.torch.save_file(weights, part, metadata={"format": "pt"})
    }
    for name, content in texts.items():
        text = json.dumps(content, indent=2) + "\n"
        writers[folder / name] = lambda part, text=text: part.write_text(text)
    _write(writers)


def _write(writers: dict[Path, Callable[[Path], object]]):
    """Let each file of a folder be written beside its name, and name them when all are whole and on the disk.

    Raises OSError, and leaves nothing behind, where that fails: safetensors and torch have errors of their own.
    """
    parts = {path: path.with_name(f"{path.name}.part") for path in writers}
    try:
        for path, write in writers.items():
            write(parts[path])
            flush(parts[path])
        for path, part in parts.items():
            os.replace(part, path)
        flush(path.parent)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        told = re.search(r"\(os error (\d+)\)", str(error))  # by safetensors; torch.save hides it in the context
        code = int(told[1]) if told else getattr(error, "errno", getattr(error.__context__, "errno", None))
        reason = os.strerror(code) if code else " ".join(str(error).split())[:300]
        raise OSError(*filter(None, [code]), f"{path} could not be written: {reason}") from error
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)


def flush(path: str | os.PathLike):
    """Wait until a file, or the names in a folder, are on the disk: what was written before outlives a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems of networks cannot do it for a folder
            raise
    finally:
        os.close(handle)


def _rename(weights: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    """Replace whole dotted parts of the tensors' names."""
    longest_first = sorted(names, key=len, reverse=True)
    pattern = re.compile(r"(?<![^.])(" + "|".join(map(re.escape, longest_first)) + r")(?![^.])")
    return {pattern.sub(lambda match: names[match[0]], name): tensor for name, tensor in weights.items()}


def _foreign_config(model: SMAE) -> dict:
    """The configuration in the words of transformers."""
    c = model.config
    config = dict(
        model_type="vit_mae",
        architectures=["ViTMAEForPreTraining" if c["decoder_depth"] else "ViTMAEModel"],
        image_size=c["image_size"],
        image_mean=c["mean"],
        image_std=c["std"],
        patch_size=c["patch_size"],
        num_channels=c["channels"],
        hidden_size=c["width"],
        num_hidden_layers=c["depth"],
        num_attention_heads=c["heads"],
        intermediate_size=round(c["width"] * c["mlp_ratio"]),
        hidden_act="gelu",
        layer_norm_eps=c["norm_eps"],
        qkv_bias=True,
        norm_pix_loss=c["normalize_pixels"],
    )
    if c["decoder_depth"]:
        config |= dict(
            decoder_hidden_size=c["decoder_width"],
            decoder_num_hidden_layers=c["decoder_depth"],
            decoder_num_attention_heads=c["decoder_heads"],
            decoder_intermediate_size=round(c["decoder_width"] * c["mlp_ratio"]),
        )
    return config


def _timm_config(model: SMAE | Classifier) -> dict:
    c, classifier = model.config, isinstance(model, Classifier)
    mean = model.pool == "mean" if classifier else not c["class_token"]
    arguments = dict(
        img_size=c["image_size"],
        patch_size=c["patch_size"],
        in_chans=c["channels"],
        embed_dim=c["width"],
        depth=c["depth"],
        num_heads=c["heads"],
        mlp_ratio=c["mlp_ratio"],
        class_token=c["class_token"],
        global_pool="avg" if mean else "token",
        fc_norm=classifier and mean,
        num_classes=len(model.classes) if classifier else 0,
    )
    config = dict(
        architecture="vit_base_patch16_224",  # any: all that makes the difference is in model_args
        num_classes=arguments["num_classes"],
        num_features=c["width"],
        global_pool=arguments["global_pool"],
        layer_norm_eps=c["norm_eps"],  # for our load(): timm has 1e-6
        model_args=arguments,
        pretrained_cfg=dict(
            input_size=[c["channels"], *c["image_size"]],
            mean=c["mean"],
            std=c["std"],
            interpolation="bicubic",
            num_classes=arguments["num_classes"],
            first_conv="patch_embed.proj",
            classifier="head",
        ),
    )
    return config | (dict(label_names=model.classes) if classifier else {})


def load(
    path: str | os.PathLike,
    device: str | torch.device = "cpu",
    *,
    heads: int | None = None,
    image_size: tuple[int, int] | None = None,
) -> SMAE | Classifier:
    """The model of a checkpoint, in evaluation mode on ``device``.

    Reads what :func:`save` and ``train.py`` write (``eval.py finetune``: a :class:`Classifier`), and the encoder, with
    its decoder if it has one, of: facebookresearch/mae ``.pth`` files; folders of transformers' ViTMAE; ViTs in the
    naming of timm (plain ViT, DeiT, MoCo v3, DINO), as ``.safetensors``, ``.pth`` or a folder. Classification heads of
    others are left out, and a norm that followed their mean (``fc_norm``) is taken for the last norm.

    Files without a configuration do not tell everything: then an encoder has ``heads`` of 64 channels (huge: 80; the
    small one of MoCo v3: 32), a decoder of 32, the grid is square unless ``image_size`` (H, W) is given, and images
    are normalised as ImageNet's.

    Nothing that a file holds is ever run. Whatever is in config.json and ``.safetensors``, memory and time stay in
    proportion to their size; a hostile ``.pth`` can make torch's own unpickler take more, so prefer safetensors for
    the files of strangers. Raises FileNotFoundError if there is nothing to read, ValueError if it is not such a
    model, with the names of tensors that are missing, unexpected or of another shape.
    """
    path = Path(path)
    try:
        model = _load(path, heads, image_size)
    except FileNotFoundError:
        raise
    except Exception as error:  # whatever a broken or hostile file leads to; one printable line that names the file
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        text = kind + " ".join(str(error)[:2000].split())
        text = text if str(path) in text else f"{path} cannot be loaded: {text}"
        text = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text[:1000])
        raise ValueError(text) from (error if kind else None)
    return model.eval().to(device)


def _load(path: Path, heads: int | None, image_size: tuple[int, int] | None) -> SMAE | Classifier:
    config, weights = _read(path)
    if "model" in config:
        arguments, classifier = _part(config, "model"), _part(config, "classifier")
    else:
        arguments, weights = _adopt(path, config, weights, heads, image_size)
        classifier = {}

    def build() -> SMAE | Classifier:
        if classifier:
            return Classifier(SMAE(**arguments | dict(decoder_depth=0)), **classifier)
        return SMAE(**arguments)

    with torch.device("meta"):  # takes no memory, however large the configuration says that the model is
        expected = build().state_dict()
    _compare(expected, weights, path)
    model = build()
    model.load_state_dict(weights)
    return model


def _part(config: dict, name: str) -> dict:
    """The part of a configuration that ``name`` says, {} without one. Raises ValueError if it is no dictionary."""
    part = config.get(name) or {}
    if not isinstance(part, dict):
        raise ValueError(f"the configuration should hold a dictionary as {name}, not {_told(part)}")
    return part


def initialise(model: SMAE, source: SMAE, decoder: bool = True):
    """Copy the encoder of ``source`` into ``model``, and its decoder if wanted; learned positions are interpolated.

    Raises ValueError, with names, where tensors are missing, unexpected or of another shape.
    """
    weights = source.state_dict()
    for name in {"positions", "decoder_positions"} & weights.keys():
        side = model.patch_size
        grid = model.config["image_size"][0] // side, model.config["image_size"][1] // side
        weights[name] = source._positions(weights[name], grid)[0]
    if not decoder:
        part = ("decoder_", "mask_token", "head.")
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith(part)}
        weights |= {name: tensor for name, tensor in model.state_dict().items() if name.startswith(part)}
    _fill(model, weights, "the model to start from")


def _fill(model: nn.Module, weights: dict[str, Tensor], source):
    """load_state_dict with an error that names what does not fit."""
    _compare(model.state_dict(), weights, source)
    model.load_state_dict(weights)


def _compare(own: dict[str, Tensor], weights: dict[str, Tensor], source):
    """Raise ValueError, with names, unless the weights are those of a model's ``own`` state, name and shape."""
    problems = {
        "missing": [name for name in own if name not in weights],
        "unexpected": [name for name in weights if name not in own],
        "of another shape": [
            f"{name} {tuple(weights[name].shape)} instead of {tuple(own[name].shape)}"
            for name in own
            if name in weights and weights[name].shape != own[name].shape
        ],
    }
    texts = [
        f"{kind}: {', '.join(names[:4])}" + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        for kind, names in problems.items()
        if names
    ]
    if texts:
        raise ValueError(f"{source} does not fit; " + "; ".join(texts))


def _read(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """The configuration (as far as there is one) and the tensors of a checkpoint."""
    config, file = {}, path
    if path.is_file() and path.name == "model.safetensors" and (path.parent / "config.json").is_file():
        path = path.parent
    if path.is_dir():
        files = [path / name for name in ("model.safetensors", "pytorch_model.bin")]
        file = next((file for file in files if file.is_file()), files[0])
        for needed in (path / "config.json", file):
            if not needed.is_file():
                raise FileNotFoundError(f"{path} is not a run folder or checkpoint: it has no {needed.name}")
        for name in ("preprocessor_config.json", "config.json"):
            if (path / name).is_file():
                config |= _read_json(path / name)
    elif not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        if file.suffix == ".safetensors":
            return config, safetensors.torch.load_file(file)
        content = _read_pickle(file)
    except Exception as error:  # the libraries have no common one
        raise ValueError(f"{file} is not a file of tensors alone: {' '.join(str(error).split())[:300]}") from None
    content = content if isinstance(content, dict) else {}
    for _ in range(4):  # not for ever: a dictionary can hold itself
        args = content.get("args")
        args = vars(args) if isinstance(args, argparse.Namespace) else args
        config |= {name: args[name] for name in TOLD_BY_MAE if isinstance(args, dict) and name in args}
        inner = [content[key] for key in ("model", "state_dict", "teacher") if isinstance(content.get(key), dict)]
        content = inner[0] if inner else content
    weights = {n: t for n, t in content.items() if isinstance(n, str) and isinstance(t, Tensor)}
    if not weights:
        raise ValueError(f"{file} holds no model: neither tensors nor a 'model' or 'state_dict' of them")
    if any(t.layout != torch.strided or t.is_meta or t.is_quantized for t in weights.values()):
        raise ValueError(f"{file} holds tensors that are sparse, quantized or without numbers")
    # a stride of 0 shows one number as many
    if sum(t.numel() * t.element_size() for t in weights.values()) > file.stat().st_size:
        raise ValueError(f"{file} claims more numbers than it holds")
    return config, weights


LARGEST_TEXT = 2**21  # bytes of a configuration


def _read_json(file: Path) -> dict:
    with open(file, "rb") as opened:
        text = opened.read(LARGEST_TEXT + 1)
    if len(text) > LARGEST_TEXT:
        raise ValueError(f"{file} is larger than any configuration ({LARGEST_TEXT} bytes)")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} should hold a JSON object, not {_told(content)}")
    return content


def _read_pickle(file: Path):
    """What ``torch.save`` wrote to a file, if that is tensors and plain values alone. Raises ValueError and others."""
    zipped = zipfile.is_zipfile(file)  # all but those from before PyTorch 1.6
    if zipped:
        with zipfile.ZipFile(file) as archive:
            if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
                raise ValueError("it is compressed, which torch.save never does")
    with torch.serialization.safe_globals([argparse.Namespace]):  # training checkpoints of MAE hold their options
        return torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)  # mapped: no size is believed


def _adopt(path, config: dict, weights: dict[str, Tensor], heads, image_size) -> tuple[dict, dict[str, Tensor]]:
    """Constructor's arguments and state dict of ours for the tensors of another implementation."""
    weights = {re.sub(r"^(?=embeddings\.|encoder\.layer\.|layernorm\.)", "vit.", n): t for n, t in weights.items()}
    weights = {n.replace("decoder_encoder.layer.", "decoder_layers."): t for n, t in weights.items()}  # transformers 5
    names, entry = MAE_NAMES, "patch_embed.proj.weight"
    if TRANSFORMERS_NAMES["embed"] + ".weight" in weights:
        names, entry = TRANSFORMERS_NAMES, TRANSFORMERS_NAMES["embed"] + ".weight"
    prefix = min((name.removesuffix(entry) for name in weights if name.endswith(entry)), default=None)
    if prefix is None:
        raise ValueError(f"{path} is not a ViT known here: it has no {entry}, but {', '.join(list(weights)[:4])}, ...")
    weights = {n.removeprefix(prefix): t.float() for n, t in weights.items() if n.startswith(prefix)}
    weights = {n: t for n, t in weights.items() if not n.startswith(NOT_THE_ENCODER)}
    if "norm.weight" not in weights:
        weights = _rename(weights, {"fc_norm": "norm"})
    weights = {n: t for n, t in weights.items() if not n.startswith("fc_norm.")}

    weights = _rename(weights, {theirs: ours for ours, theirs in names.items()})
    for name in [name for name in weights if ".attention.query." in name]:
        parts = [name.replace("query", part) for part in ("query", "key", "value")]
        if all(part in weights for part in parts):
            weights[name.replace("query", "qkv")] = torch.cat([weights.pop(part) for part in parts])
    if weights["embed.weight"].ndim != 4 or weights.get("positions", torch.empty(0)).ndim < 2:
        raise ValueError(f"{path} is not a ViT known here: it has no absolute positions, or no convolution of patches")
    for name in {"cls_token", "mask_token"} & weights.keys():
        weights[name] = weights[name].flatten()
    for name in {"positions", "decoder_positions"} & weights.keys():
        weights[name] = weights[name].flatten(0, -2)
    if others := {"dist_token", "reg_token"} & weights.keys():
        raise ValueError(f"{path} has tokens that are not known here: {', '.join(others)}")
    width, channels, p, _ = weights["embed.weight"].shape
    if not weights["embed.weight"].numel():
        raise ValueError(f"{path} is not a ViT known here: its patches hold nothing")
    weights["embed.weight"] = rearrange(weights["embed.weight"], "d c p1 p2 -> d (p1 p2 c)")

    cls, rows = "cls_token" in weights, len(weights["positions"])
    model_args, pretrained = _part(config, "model_args"), _part(config, "pretrained_cfg")
    image_size = image_size or config.get("image_size") or model_args.get("img_size")
    if image_size is None:
        side = math.isqrt(rows)  # rows of the table: the patches of a square grid, and perhaps the CLS token
        if rows not in (side * side, side * side + cls):
            raise ValueError(f"{path} has {rows} positions, no square grid: image_size=(H, W) is needed")
        image_size = side * p
    height, width_px = _sides(image_size)
    grid = height // p, width_px // p
    if cls and rows == grid[0] * grid[1]:  # the CLS token has no position of its own
        weights["positions"] = F.pad(weights["positions"], (0, 0, 1, 0))

    def count_blocks(kind: str) -> int:
        return len({name.split(".")[1] for name in weights if name.startswith(f"{kind}.")})

    hidden = weights.get("blocks.0.mlp.0.weight", torch.empty(4 * width))
    arguments = dict(
        width=width,
        depth=count_blocks("blocks"),
        heads=heads or config.get("num_attention_heads") or model_args.get("num_heads") or _usual_heads(width, prefix),
        decoder_depth=count_blocks("decoder_blocks"),
        image_size=image_size,
        patch_size=p,
        channels=channels,
        mlp_ratio=len(hidden) / width,
        norm_eps=config.get("layer_norm_eps", 1e-6),
        normalize_pixels=config.get("norm_pix_loss", True),
        class_token=cls,
    )
    if arguments["decoder_depth"] and "decoder_embed.bias" in weights:
        arguments["decoder_width"] = len(weights["decoder_embed.bias"])
        usual = max(1, arguments["decoder_width"] // 32)
        arguments["decoder_heads"] = config.get("decoder_num_attention_heads") or usual
    for name in ("mean", "std"):
        if value := config.get(f"image_{name}") or pretrained.get(name):
            arguments[name] = value

    tables = [name for name in ("positions", "decoder_positions") if name in weights]
    if all(_is_fixed(weights[name], grid, cls) for name in tables):
        weights = {name: tensor for name, tensor in weights.items() if name not in tables}
    else:
        arguments["learned_positions"] = True
    return arguments, weights


def _is_fixed(table: Tensor, grid: tuple[int, int], prefix: int) -> bool:
    """Whether position embeddings (prefix + n, width) are MAE's. None are made for a grid that the table has not."""
    fits = table.ndim == 2 and len(table) == prefix + grid[0] * grid[1] and table.shape[1] % 4 == 0
    return fits and torch.equal(table, position_table(grid, table.shape[1], prefix))


def _usual_heads(width: int, prefix: str) -> int:
    """Heads of 64 channels, but for the presets that have others, and the small ViT of MoCo v3."""
    if width == 384 and prefix.endswith("base_encoder."):
        return 12
    return next((size["heads"] for size in PRESETS.values() if size["width"] == width), max(1, width // 64))
