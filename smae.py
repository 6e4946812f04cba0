"""A ViT masked autoencoder (MAE), a classifier on its encoder, and their checkpoints.

Works alone, with torch, einops and safetensors; checkpoints of other projects also need
``convert.py``, those of ``dense.py`` also ``segmenter.py`` or ``detector.py``. A mask is any object
with ascending integer index tensors ``visible`` (b, v) and ``masked`` (b, m), such as a
``masks.Mask``.

Letters in shapes: ``b`` batch, ``n`` patches (n = h * w of the patch grid), ``v`` visible, ``m``
masked, ``d`` width, ``p`` patch side, ``c`` channels, ``H``/``W`` image height/width in pixels.

Sources: MAE (He et al., CVPR 2022, arXiv 2111.06377); ViT (Dosovitskiy et al., ICLR 2021).
"""

import contextlib
import errno
import json
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, field, fields
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
MOST_PATCHES = 2**16


def accepted(above: float, most: float, default=MISSING):
    """A field of :class:`Config` with its accepted range: above ``above``, at most ``most``."""
    return field(default=default, metadata=dict(above=above, most=most))


@dataclass(kw_only=True)
class Config:
    """The arguments of :class:`SMAE` with their defaults and accepted ranges.

    ``image_size``, a side or (H, W) in pixels, sets the grid of the stored positions; the model
    also accepts other sizes divisible by ``patch_size``. ``normalize_pixels`` normalises each patch
    in the target of the loss by its own mean and deviation. ``decoder_depth=0`` leaves out the
    decoder, ``class_token=False`` the CLS token; ``registers`` more tokens follow it. ``norm_after_mean``
    leaves the last norm to :meth:`SMAE.pooled` (timm's fc_norm). ``learned_positions`` makes the position
    embeddings parameters; otherwise they are computed for ``position_size`` (default: image_size).
    For any other grid they are interpolated. The caller normalises images with ``mean``
    and ``std`` (values in 0 ... 1); three of them become their average for other ``channels``.

    Raises ValueError for wrong types, values out of range, and sizes that do not divide.
    """

    width: int = accepted(0, 2**16)
    depth: int = accepted(0, 256)
    heads: int = accepted(0, 2**16)
    decoder_width: int = accepted(0, 2**16, default=512)
    decoder_depth: int = accepted(-1, 256, default=8)
    decoder_heads: int = accepted(0, 2**16, default=16)
    image_size: int | Sequence[int] = accepted(0, 2**40, default=224)
    patch_size: int = accepted(0, 2**12, default=16)
    channels: int = accepted(0, 2**12, default=3)
    mlp_ratio: float = accepted(0.0, 1000.0, default=4.0)
    norm_eps: float = accepted(0.0, 1.0, default=1e-6)
    normalize_pixels: bool = True
    class_token: bool = True
    registers: int = accepted(-1, 2**10, default=0)
    norm_after_mean: bool = False
    learned_positions: bool = False
    position_size: int | Sequence[int] | None = accepted(0, 2**40, default=None)
    mean: Sequence[float] = accepted(-1e6, 1e6, default=(0.485, 0.456, 0.406))
    std: Sequence[float] = accepted(0.0, 1e6, default=(0.229, 0.224, 0.225))

    def __post_init__(self):
        if isinstance(self.image_size, int):
            self.image_size = [self.image_size, self.image_size]
        if isinstance(self.position_size, int):
            self.position_size = [self.position_size, self.position_size]
        lengths = dict(image_size=[2], position_size=[2], mean=[3, self.channels], std=[3, self.channels])
        for argument in fields(self):
            name, values = argument.name, getattr(self, argument.name)
            if values is None and argument.default is None:
                continue
            if name not in lengths:
                values = [values]
            elif not isinstance(values, (list, tuple)) or len(values) not in lengths[name]:
                raise ValueError(f"{name} must be a list of {lengths[name][-1]} numbers, got {describe(values)}")
            for value in values:
                check(name, value, **argument.metadata)
        self.image_size, self.mean, self.std = list(self.image_size), list(self.mean), list(self.std)
        if self.channels != 3:  # those of RGB, averaged
            self.mean = self.mean if len(self.mean) != 3 else [sum(self.mean) / 3] * self.channels
            self.std = self.std if len(self.std) != 3 else [sum(self.std) / 3] * self.channels
        self._check_sizes()

    def _check_sizes(self):
        for heads, width in ((self.heads, self.width), (self.decoder_heads, self.decoder_width)):
            if width % heads:
                raise ValueError(f"the number of heads ({heads}) must divide the width ({width})")
            if not round(width * self.mlp_ratio):
                raise ValueError(f"mlp_ratio ({self.mlp_ratio}) leaves no MLP at a width of {width}")
        for height, width in (self.image_size, self.position_size or self.image_size):
            h, w = patch_grid(height, width, self.patch_size)
            if h * w > MOST_PATCHES:
                raise ValueError(
                    f"an image of {height}x{width} has more than {MOST_PATCHES} patches of {self.patch_size}"
                )


def check(name: str, value, above: float | None = None, most: float | None = None):
    """Raise ValueError unless ``value`` is in its range, or a bool if there is no range.

    If ``most`` is an integer, ``value`` must be one.
    """
    if most is None:
        right, expected = isinstance(value, bool), "true or false"
    else:
        kind, noun = (int, "an integer") if isinstance(most, int) else ((int, float), "a number")
        right = isinstance(value, kind) and not isinstance(value, bool) and above < value <= most
        expected = f"{noun} above {above} and at most {most}"
    if not right:
        raise ValueError(f"{name} must be {expected}, got {describe(value)}")


def describe(value) -> str:
    """Describe any value in a few words, for a message."""
    plain = value is None or isinstance(value, (int, float, str))
    return repr(value)[:60] if plain else f"a {type(value).__name__}"


def patch_grid(height: int, width: int, p: int) -> tuple[int, int]:
    """The patch grid (h, w) of an image.

    Raises ValueError unless both sides are positive multiples of ``p``.
    """
    if height % p or width % p or not height or not width:
        raise ValueError(f"image size {height}x{width} is not a positive multiple of the patch size {p}")
    return height // p, width // p


def sincos_positions(h: int, w: int, width: int) -> Tensor:
    """Fixed 2-D sine-cosine position embeddings of an (h, w) patch grid: (h * w, width), float32.

    The first half of the channels encodes the column, the second half the row, each as sines then
    cosines of geometrically falling frequencies (MAE, appendix A.1). Raises ValueError unless
    ``width`` is divisible by 4.
    """
    if width % 4:
        raise ValueError(f"sin-cos positions need a width divisible by 4, got {width}")
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))

    def encode(positions: Tensor) -> Tensor:  # (length,) -> (length, width / 2)
        angles = positions[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1).float()

    columns = repeat(encode(torch.arange(w).double()), "w d -> (h w) d", h=h)
    rows = repeat(encode(torch.arange(h).double()), "h d -> (h w) d", w=w)
    return torch.cat([columns, rows], dim=1)


def position_table(grid: tuple[int, int], width: int, prefix: int) -> Tensor:
    """MAE's position embeddings (prefix + n, width): zero for CLS token and registers, sin-cos for patches."""
    return F.pad(sincos_positions(*grid, width), (0, 0, prefix, 0))


def stretch_positions(
    table: Tensor, own: tuple[int, int], grid: tuple[int, int], prefix: int, antialias: bool = False
) -> Tensor:
    """Position embeddings (prefix + n, d) of a patch ``grid``, interpolated from those of the ``own`` grid.

    Bicubic, as in MAE and transformers; with ``antialias`` as in timm, whose cubic is another one.
    """
    if own == grid:
        return table
    image = rearrange(table[prefix:].float(), "(h w) d -> 1 d h w", h=own[0])
    image = F.interpolate(image, grid, mode="bicubic", antialias=antialias, align_corners=False)
    return torch.cat([table[:prefix], rearrange(image, "1 d h w -> (h w) d").to(table)])


def patchify(images: Tensor, p: int) -> Tensor:
    """Cut images (b, c, H, W) into flattened patches (b, n, p * p * c), row by row."""
    return rearrange(images, "b c (h p1) (w p2) -> b (h w) (p1 p2 c)", p1=p, p2=p)


def unpatchify(patches: Tensor, p: int, grid: tuple[int, int]) -> Tensor:
    """Join flattened patches (b, n, p * p * c) of an (h, w) grid into images (b, c, H, W)."""
    return rearrange(patches, "b (h w) (p1 p2 c) -> b c (h p1) (w p2)", h=grid[0], w=grid[1], p1=p, p2=p)


def gather_tokens(tokens: Tensor, indices: Tensor) -> Tensor:
    """Tokens (b, k, d) at ``indices`` (b, k) of tokens (b, n, d), or (1, n, d) for all images."""
    tokens = tokens.expand(indices.shape[0], -1, -1)
    return tokens.gather(1, indices[..., None].expand(-1, -1, tokens.shape[-1]))


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation (b, m, 1) of each patch (b, m, p * p * c); the latter > 0 as in MAE."""
    return patches.mean(dim=-1, keepdim=True), (patches.var(dim=-1, keepdim=True) + 1e-6).sqrt()


class Attention(nn.Module):
    """Multi-head self-attention over tokens (b, n, d)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, attended: Tensor | None = None) -> Tensor:
        """``attended`` (b, n) bool: the tokens that all attend to (default: all of them)."""
        mask = None if attended is None else attended[:, None, None]
        x = F.scaled_dot_product_attention(*self.split(x), attn_mask=mask)
        return self.out(rearrange(x, "b heads n d -> b n (heads d)"))

    def split(self, x: Tensor) -> Tensor:
        """Queries, keys and values, each (b, heads, n, d)."""
        return rearrange(self.qkv(x), "b n (three heads d) -> three b heads n d", three=3, heads=self.heads)

    def weights(self, x: Tensor, queries: slice = slice(None)) -> Tensor:
        """Attention weights (b, heads, queries, n) of some tokens, float32; rows sum to 1."""
        q, k, _ = self.split(x)
        return ((q[:, :, queries] * q.shape[-1] ** -0.5) @ k.mT).float().softmax(dim=-1)


class Block(nn.Module):
    """Pre-norm transformer block over tokens (b, n, d).

    In training, each branch is dropped for an image with probability ``drop_path``, an attribute
    (stochastic depth, Huang et al., ECCV 2016).
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float, norm_eps: float = 1e-6):
        super().__init__()
        mlp_width = round(width * mlp_ratio)
        self.norm1 = nn.LayerNorm(width, eps=norm_eps)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = nn.Sequential(nn.Linear(width, mlp_width), nn.GELU(), nn.Linear(mlp_width, width))
        self.drop_path = 0.0

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.attention(self.norm1(x)))
        return x + self.drop(self.mlp(self.norm2(x)))

    def drop(self, branch: Tensor) -> Tensor:
        """Drop a branch (b, n, d) for some of the images, in training."""
        if not self.training or self.drop_path == 0:
            return branch
        kept = torch.rand(branch.shape[0], 1, 1, device=branch.device) >= self.drop_path
        return branch * (kept / (1 - self.drop_path)).to(branch.dtype)


class SMAE(nn.Module):
    """A ViT masked autoencoder: ``SMAE(**PRESETS["base"], image_size=224)``.

    Takes the arguments of :class:`Config` by keyword; ``config`` holds them as a dictionary.
    ``statistics`` are the mean and the deviation to normalise images with. ``prefix`` is the number
    of tokens before the patches: CLS token and registers.
    """

    def __init__(self, **arguments):
        super().__init__()
        c = Config(**arguments)
        self.config, self.statistics = dict(vars(c)), (tuple(c.mean), tuple(c.std))
        self.patch_size, self.normalize_pixels = c.patch_size, c.normalize_pixels
        self.prefix = c.class_token + c.registers
        grid, patch_dim = patch_grid(*c.image_size, c.patch_size), c.patch_size**2 * c.channels
        self.patch_count = grid[0] * grid[1]

        def build_blocks(depth: int, width: int, heads: int) -> nn.Sequential:
            return nn.Sequential(*(Block(width, heads, c.mlp_ratio, c.norm_eps) for _ in range(depth)))

        # encoder
        self.embed = nn.Linear(patch_dim, c.width)
        if c.class_token:
            self.cls_token = nn.Parameter(torch.zeros(c.width))
        if c.registers:
            self.registers = nn.Parameter(torch.zeros(c.registers, c.width))
        self.blocks = build_blocks(c.depth, c.width, c.heads)
        self.norm = nn.LayerNorm(c.width, eps=c.norm_eps)
        self._add_positions("positions", grid, c.width)

        # decoder
        if c.decoder_depth:
            self.decoder_embed = nn.Linear(c.width, c.decoder_width)
            self.mask_token = nn.Parameter(torch.zeros(c.decoder_width))
            self.decoder_blocks = build_blocks(c.decoder_depth, c.decoder_width, c.decoder_heads)
            self.decoder_norm = nn.LayerNorm(c.decoder_width, eps=c.norm_eps)
            self.head = nn.Linear(c.decoder_width, patch_dim)
            self._add_positions("decoder_positions", grid, c.decoder_width)
        self._initialise_weights()

    def _add_positions(self, name: str, grid: tuple[int, int], width: int):
        computed = patch_grid(*(self.config["position_size"] or self.config["image_size"]), self.patch_size)
        table = stretch_positions(position_table(computed, width, self.prefix), computed, grid, self.prefix)
        if self.config["learned_positions"]:
            self.register_parameter(name, nn.Parameter(table))
        else:
            self.register_buffer(name, table, persistent=False)

    def _initialise_weights(self):
        """Xavier-uniform weights, zero biases, tokens from N(0, 0.02) (MAE, appendix A.1)."""
        for name, parameter in self.named_parameters():
            if name in ("cls_token", "registers", "mask_token"):
                nn.init.normal_(parameter, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    @property
    def layers(self) -> list[int | str]:
        """The names of the blocks that :meth:`features` takes."""
        decoder = [f"decoder-{i}" for i in range(1, self.config["decoder_depth"] + 1)]
        return [*range(1, len(self.blocks) + 1), *decoder]

    @property
    def guiding_layer(self) -> int:
        """The block that guides masks unless another is named: the last of the encoder but one."""
        return max(1, len(self.blocks) - 1)

    def grid(self, images: Tensor) -> tuple[int, int]:
        """The patch grid (h, w) of images (b, c, H, W). Raises ValueError if they do not fit."""
        expected, received = self.config["channels"], images.shape[1]
        if received != expected:
            raise ValueError(f"the model takes {expected} channels, the images have {received}")
        return patch_grid(*images.shape[2:], self.patch_size)

    def resize_positions(self, table: Tensor, grid: tuple[int, int]) -> Tensor:
        """Position embeddings (prefix + n, d) of any ``grid``, from those of the model's grid."""
        own = patch_grid(*self.config["image_size"], self.patch_size)
        return stretch_positions(table, own, grid, self.prefix, antialias=self.config["learned_positions"])

    def forward(self, images: Tensor, mask) -> Tensor:
        """The loss on masked patches of images (b, c, H, W): mean squared error, float32 scalar."""
        latent = self.encode(images, mask.visible)
        prediction = self.decode(latent, mask, self.grid(images))
        target = self.target(images, mask.masked)
        return F.mse_loss(prediction.float(), target)

    def encode(self, images: Tensor, visible: Tensor | None = None, layer: int | None = None) -> Tensor:
        """Encode the ``visible`` patches (b, v), or all: (b, prefix + v, d), the CLS token first.

        With ``layer`` (1 ... depth), returns the tokens after that block, without the final norm.
        Raises ValueError if it is out of range.
        """
        if layer is not None and not 1 <= layer <= len(self.blocks):
            raise ValueError(f"layer must lie between 1 and {len(self.blocks)}, got {layer}")
        x = self.blocks[:layer](self.embed_patches(images, visible))
        return x if layer or self.config["norm_after_mean"] else self.norm(x)

    def pooled(self, images: Tensor, how: str) -> Tensor:
        """Features (b, d) of whole images: the CLS token ("cls") or the "mean" of the patches.

        Raises ValueError for any other ``how``, and for "cls" without a CLS token.
        """
        check_pool(how, self.config["class_token"])
        x = pool(self.encode(images), how, self.prefix)
        return self.norm(x) if self.config["norm_after_mean"] else x

    def embed_patches(self, images: Tensor, visible: Tensor | None = None) -> Tensor:
        """The input of the first encoder block (b, prefix + v, d): CLS token, registers, embedded patches."""
        table = self.resize_positions(self.positions, self.grid(images))
        patches, positions = patchify(images, self.patch_size), table[None, self.prefix :]
        if visible is not None:
            patches, positions = gather_tokens(patches, visible), gather_tokens(positions, visible)
        x = self.embed(patches) + positions
        if self.prefix:
            first = [self.cls_token[None]] if self.config["class_token"] else []
            first += [self.registers] if self.config["registers"] else []
            first = torch.cat(first) + table[: self.prefix]
            x = torch.cat([repeat(first, "k d -> b k d", b=images.shape[0]), x], dim=1)
        return x

    def decode(self, latent: Tensor, mask, grid: tuple[int, int]) -> Tensor:
        """Predict the masked patches (b, m, p * p * c) from encoder tokens (b, prefix + v, d).

        Raises ValueError if the model has no decoder.
        """
        if not self.config["decoder_depth"]:
            raise ValueError("this model has no decoder")
        x = self.decoder_blocks(self._decoder_tokens(latent, mask.visible, mask.masked, grid))
        return self.head(self.decoder_norm(x[:, -mask.masked.shape[1] :]))

    def _decoder_tokens(self, latent: Tensor, visible: Tensor, masked: Tensor, grid: tuple[int, int]) -> Tensor:
        """The decoder's input tokens (b, prefix + v + m, decoder d): CLS, visible, mask tokens."""
        x = self.decoder_embed(latent)
        table = self.resize_positions(self.decoder_positions, grid)[None]
        cls, positions = table[:, : self.prefix], table[:, self.prefix :]
        visible_tokens = x[:, self.prefix :] + gather_tokens(positions, visible)
        mask_tokens = self.mask_token + gather_tokens(positions, masked)
        return torch.cat([x[:, : self.prefix] + cls, visible_tokens, mask_tokens], dim=1)

    def features(self, images: Tensor, layer: int | str) -> Tensor:
        """Patch tokens (b, n, d) of whole images (b, c, H, W) after a block, without final norm.

        ``layer``: 1 ... depth for an encoder block; "decoder-1", "decoder-2", ... for a decoder
        block, whose input is all encoded patches without mask tokens. Raises ValueError for an
        unknown block.
        """
        if layer not in self.layers:
            raise ValueError(f"layer must be one of {', '.join(map(str, self.layers))}, got {layer!r}")
        if isinstance(layer, int):
            return self.encode(images, layer=layer)[:, self.prefix :]
        h, w = self.grid(images)
        everything = torch.arange(h * w, device=images.device).expand(images.shape[0], -1)
        x = self._decoder_tokens(self.encode(images), everything, everything[:, :0], (h, w))
        return self.decoder_blocks[: int(layer.removeprefix("decoder-"))](x)[:, self.prefix :]

    def intermediate(self, images: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """Patch tokens, a map (b, d, h, w) after each of the encoder blocks ``layers``, without final norm."""
        x, maps = self.embed_patches(images), {}
        for number, block in enumerate(self.blocks[: max(layers)], start=1):
            x = block(x)
            if number in layers:
                maps[number] = rearrange(x[:, self.prefix :], "b (h w) d -> b d h w", h=self.grid(images)[0])
        return [maps[number] for number in layers]

    def copy_encoder(self, drop_path: float = 0.0) -> "SMAE":
        """A copy without the decoder. ``drop_path`` grows linearly over its blocks, from 0 to the given value.

        Raises ValueError if it is outside 0 ... 1.
        """
        if not isinstance(drop_path, (int, float)) or not 0 <= drop_path < 1:
            raise ValueError(f"drop_path must be a number from 0 to below 1, got {describe(drop_path)}")
        copy, weights = SMAE(**self.config | dict(decoder_depth=0)), self.state_dict()
        copy.load_state_dict({name: weights[name] for name in copy.state_dict()})
        for i, block in enumerate(copy.blocks):
            block.drop_path = drop_path * i / max(1, len(copy.blocks) - 1)
        return copy

    @torch.no_grad()
    def class_attention(self, images: Tensor) -> Tensor:
        """Attention (b, heads, n), float32, of the CLS token to patches in the last encoder block.

        Raises ValueError if the model has no CLS token.
        """
        if not self.config["class_token"]:
            raise ValueError("this model has no CLS token: build it with class_token=True")
        last = self.blocks[-1]
        x = self.blocks[:-1](self.embed_patches(images))
        return last.attention.weights(last.norm1(x), slice(1))[:, :, 0, self.prefix :]

    @torch.no_grad()
    def decoder_attention(self, images: Tensor, mask) -> Iterator[Tensor]:
        """Attention (b, heads, t, t), float32, in each decoder block; t = prefix + v + m tokens."""
        x = self._decoder_tokens(self.encode(images, mask.visible), mask.visible, mask.masked, self.grid(images))
        for _, attention in _attend(self.decoder_blocks, x):
            yield attention

    @torch.no_grad()
    def trace(self, images: Tensor, mask=None) -> Iterator[tuple[int | str, Tensor, Tensor]]:
        """The name of each block, its output (b, t, d) and its attention (b, heads, t, t), float32.

        The encoder sees whole images; t = prefix + n tokens. With a ``mask`` the decoder follows, which
        sees the visible patches and mask tokens. The patches of both are in the order of the grid.
        """
        for i, (tokens, attention) in enumerate(_attend(self.blocks, self.embed_patches(images)), start=1):
            yield i, tokens, attention
        if mask is None or not self.config["decoder_depth"]:
            return
        x = self._decoder_tokens(self.encode(images, mask.visible), mask.visible, mask.masked, self.grid(images))
        order = torch.cat([mask.visible, mask.masked], dim=1).argsort(dim=1) + self.prefix
        order = torch.cat([torch.arange(self.prefix, device=x.device).expand(len(x), -1), order], dim=1)
        x = gather_tokens(x, order)  # the decoder does not mind the order of its tokens
        for i, (tokens, attention) in enumerate(_attend(self.decoder_blocks, x), start=1):
            yield f"decoder-{i}", tokens, attention

    def target(self, images: Tensor, masked: Tensor) -> Tensor:
        """Pixels (b, m, p * p * c) of masked patches, normalised per patch if the model does so."""
        target = gather_tokens(patchify(images, self.patch_size), masked).float()
        if self.normalize_pixels:
            mean, std = patch_statistics(target)
            target = (target - mean) / std
        return target

    @torch.no_grad()
    def errors(self, images: Tensor, mask) -> Tensor:
        """The loss of each masked patch, (b, m) float32, whose mean is that of :meth:`forward`."""
        prediction = self.decode(self.encode(images, mask.visible), mask, self.grid(images))
        return (prediction.float() - self.target(images, mask.masked)).square().mean(dim=-1)

    @torch.no_grad()
    def reconstruct(self, images: Tensor, mask) -> Tensor:
        """Images (b, c, H, W) with the masked patches replaced by the model's prediction.

        A model of normalised pixels predicts neither brightness nor contrast of a patch; both are
        taken from the input. Patches in neither set of the mask keep their pixels.
        """
        grid, patches = self.grid(images), patchify(images, self.patch_size)
        prediction = self.decode(self.encode(images, mask.visible), mask, grid).to(patches.dtype)
        if self.normalize_pixels:
            mean, std = patch_statistics(gather_tokens(patches, mask.masked))
            prediction = prediction * std + mean
        indices = mask.masked[..., None].expand_as(prediction)
        return unpatchify(patches.scatter(1, indices, prediction), self.patch_size, grid)


def _attend(blocks: nn.Sequential, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The output (b, t, d) of each block, and the attention (b, heads, t, t) within it."""
    for block in blocks:
        attention = block.attention.weights(block.norm1(x))
        x = block(x)
        yield x, attention


def pool(tokens: Tensor, how: str, prefix: int = 1) -> Tensor:
    """Pool tokens (b, prefix + n, d) to (b, d): the first, the CLS token ("cls"), or the "mean" of the patches."""
    return tokens[:, 0] if how == "cls" else tokens[:, prefix:].mean(dim=1)


def check_pool(how: str, class_token: bool):
    """Raise ValueError for a way to pool that is unknown, or for "cls" without a CLS token."""
    known = ["cls", "mean"] if class_token else ["mean"]
    if how not in known:
        raise ValueError(f"pool must be {' or '.join(known)}, got {describe(how)}")


class Classifier(nn.Module):
    """A copy of an encoder with a linear head: normalised images (b, c, H, W) to logits.

    The logits are (b, classes). Pools tokens before the last norm, which is reset for "mean"
    pooling (MAE, fine-tuning). ``drop_path`` grows linearly over the blocks, from 0 to the given
    value.

    Raises ValueError for wrong types, a missing CLS token, and ``drop_path`` outside 0 ... 1.
    """

    task = "classifier"

    def __init__(self, encoder: SMAE, classes: Sequence[str], pool: str = "mean", drop_path: float = 0.0):
        super().__init__()
        named = isinstance(classes, (list, tuple)) and all(isinstance(name, str) for name in classes)
        if not named or not classes:
            raise ValueError(f"classes must be a list of names, got {describe(classes)}")
        check_pool(pool, encoder.config["class_token"])
        self.encoder = encoder.copy_encoder(drop_path)
        self.classes, self.pool = list(classes), pool
        self.arguments = dict(classes=self.classes, pool=pool)
        self.config, self.statistics = self.encoder.config, self.encoder.statistics
        self.head = nn.Linear(self.config["width"], len(self.classes))
        nn.init.trunc_normal_(self.head.weight, std=2e-5)
        nn.init.zeros_(self.head.bias)
        if pool == "mean" and not self.config["norm_after_mean"]:
            self.encoder.norm.reset_parameters()

    def features(self, images: Tensor) -> Tensor:
        """The input of the head (b, d)."""
        tokens = self.encoder.encode(images, layer=len(self.encoder.blocks))
        return self.encoder.norm(pool(tokens, self.pool, self.encoder.prefix))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


def initialise(model: SMAE, source: SMAE, decoder: bool = True):
    """Copy the encoder of ``source`` into ``model``, and its decoder if wanted.

    Resizes learned positions. Raises ValueError, with names, if tensors are missing, unexpected or
    of another shape.
    """
    weights, grid = source.state_dict(), patch_grid(*model.config["image_size"], model.patch_size)
    for name in {"positions", "decoder_positions"} & weights.keys():
        weights[name] = source.resize_positions(weights[name], grid)
    if not decoder:
        own, parts = model.state_dict(), ("decoder_", "mask_token", "head.")
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith(parts)}
        weights |= {name: tensor for name, tensor in own.items() if name.startswith(parts)}
    compare_weights(model.state_dict(), weights)
    model.load_state_dict(weights)


# ------------------------------------------------------------------------------------- checkpoints

LARGEST_CONFIG = 2**21  # bytes of a JSON file


def save(model: nn.Module, path: str | os.PathLike, config: dict | None = None, format: str = "smae"):
    """Write a checkpoint that :func:`load` reads back to the bit. Files appear whole or not at all.

    ``model``: an SMAE, a Classifier, or a Segmenter or Detector, which only the first format holds.
    ``format``: "smae", a folder with ``model.safetensors`` and ``config.json`` (the model's
    arguments under "model", and the content of ``config``); "timm", a folder of the encoder or
    classifier for ``timm.create_model("local-dir:" + folder, pretrained=True)`` (without that
    argument the weights are random), whose norms always have an epsilon of 1e-6; "transformers", a
    folder for ``ViTMAEForPreTraining.from_pretrained``; "mae", a ``.pth`` file like those of
    facebookresearch/mae. With ``hub.py``, folders also get a model card (README.md) for the hub.
    Raises ValueError if the format cannot hold the model.
    """
    path, description = Path(path), describe_model(model)
    content = description | (config or {})
    if format == "smae":
        write_folder(path, tensors_of(model), {"config.json": content})
        return write_card(model, path, content, format)

    import convert

    if format not in convert.WRITERS:
        raise ValueError(f"unknown format {format!r}: expected smae, {', '.join(convert.WRITERS)}")
    if getattr(model, "task", "classifier") != "classifier":
        raise ValueError(f"the format {format} cannot hold a {model.task}: save its encoder")
    tensors = tensors_of(model, positions=True)
    written = convert.WRITERS[format](tensors, model.config, description.get("classifier"))
    if format != "mae":
        write_folder(path, *written)
        return write_card(model, path, content, format)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as part, open(part, "wb") as file:  # with a path, torch.save hides a full disk
        torch.save(written, file)


def describe_model(model: nn.Module) -> dict:
    """The content of config.json: the arguments that :func:`build_model` needs."""
    return dict(model=model.config) | ({model.task: model.arguments} if hasattr(model, "task") else {})


def tensors_of(model: nn.Module, positions: bool = False) -> dict[str, Tensor]:
    """The state dict on the CPU; ``positions`` adds the position tables that the model computes."""
    tensors = model.state_dict() | (dict(model.named_buffers()) if positions else {})
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def write_card(model: nn.Module, folder: Path, config: dict, format: str):
    """Write the model card (README.md) that a folder is published with; warn if it cannot be written."""
    try:
        import hub

        text = hub.card(folder, config, sum(tensor.numel() for tensor in model.parameters()), format)
        if text:
            write_text(folder / "README.md", text)
    except ModuleNotFoundError:  # smae.py was copied without it
        return
    except Exception as error:  # of an unusual configuration or folder: the weights matter more
        warnings.warn(f"no model card for {folder}: {error}", stacklevel=3)


def write_folder(folder: Path, weights: dict[str, Tensor], contents: dict[str, dict]):
    """Write tensors and JSON files; they get their names after all are on the disk."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {name: json.dumps(content, indent=2) + "\n" for name, content in contents.items()}
    with contextlib.ExitStack() as files:
        part = files.enter_context(whole_file(folder / "model.safetensors"))
        safetensors.torch.save_file(weights, part, metadata={"format": "pt"})
        flush(part)
        for name, text in texts.items():
            part = files.enter_context(whole_file(folder / name))
            part.write_text(text)
            flush(part)


@contextlib.contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """Write a file whole or not at all: ``with whole_file(path) as part: part.write_text(...)``.

    ``part`` is a name beside ``path``. After the block it is flushed to the disk and renamed; after
    an error it is removed. Raises OSError, with the path, if the disk fails.
    """
    path = Path(path)
    part = path.with_name(f"{path.name}.part")
    part.unlink(missing_ok=True)  # an old one may be a link to a file in use
    try:
        yield part
        flush(part)
        os.replace(part, path)
        flush(path.parent)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        raise disk_error(error, path) from None
    finally:
        part.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str):
    """Write a text file, in UTF-8, whole or not at all."""
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")


def disk_error(error: Exception, path: Path) -> Exception:
    """The OSError behind an error of safetensors or torch.save, with ``path``; else ``error``."""
    code = re.search(r"\(os error (\d+)\)", str(error))
    if code and isinstance(error, safetensors.SafetensorError):
        error = OSError(int(code[1]), os.strerror(int(code[1])))
    behind = error.__context__  # torch.save hides a failed write() here
    if isinstance(error, RuntimeError) and isinstance(behind, OSError) and not behind.filename:
        error = behind
    if isinstance(error, OSError) and error.errno and not error.filename:  # from write() or fsync()
        error.filename = str(path)
    return error


def flush(path: str | os.PathLike):
    """Wait until a file, or the names in a folder, are on the disk and survive a power cut."""
    if os.name == "nt" and os.path.isdir(path):  # Windows opens no folders
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot flush a folder
            raise
    finally:
        os.close(handle)


def load(path: str | os.PathLike, device="cpu", *, heads: int | None = None, image_size=None) -> nn.Module:
    """Load the model of a checkpoint, in evaluation mode, on ``device``: an SMAE, Classifier, Segmenter or Detector.

    Reads checkpoints of :func:`save`, ``train.py``, ``eval.py`` and ``dense.py``. With
    ``convert.py``, also reads the encoder, and the decoder if any, of facebookresearch/mae ``.pth``
    files, folders of transformers' ViTMAE, ViT, DeiT, DINOv2, I-JEPA and MSN, and ViTs with timm's
    names (ViT, DeiT, DeiT III, MoCo v3, DINO, DINOv2, SigLIP) as ``.safetensors``, ``.pth`` or a
    folder. With ``hub.py``, ``path`` may be the name of any of these on the Hugging Face hub: user/model or
    user/model@revision. ``heads`` and ``image_size`` (H, W) describe files without a configuration;
    ``convert.from_foreign`` documents the defaults.

    Runs no code from a file. Memory and time are proportional to the size of JSON and safetensors
    files, even of hostile ones; a hostile ``.pth`` can make torch's unpickler take more. Raises
    FileNotFoundError if the checkpoint does not exist, ValueError for all other errors, with the
    names of tensors that do not fit.
    """
    path = find(path)
    try:
        config, weights = read_checkpoint(path)
        if "model" not in config:
            import convert

            arguments, weights = convert.from_foreign(weights, config, position_table, heads, image_size)
            config = {"model": arguments}
        model = build_model(weights, config)
    except FileNotFoundError:
        raise
    except Exception as error:  # a hostile file can raise any error; report it in one printable line
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        text = kind + " ".join(str(error)[:2000].split())
        text = text if str(path) in text else f"{path} cannot be loaded: {text}"
        text = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text[:1000])
        raise ValueError(text) from (error if kind else None)
    return model.eval().to(device)


def encoder_of(model: nn.Module) -> SMAE:
    """The encoder of any model that :func:`load` returns; an SMAE is returned as it is."""
    return model if isinstance(model, SMAE) else model.encoder


def find(path: str | os.PathLike) -> Path:
    """The checkpoint at ``path``; if nothing is there, that of this name on the hub, fetched into its cache."""
    if not Path(path).exists():
        with contextlib.suppress(ModuleNotFoundError):  # without hub.py, names are paths
            import hub

            if hub.is_name(os.fspath(path)):
                return hub.fetch(os.fspath(path))
    return Path(path)


def config_of(path: str | os.PathLike) -> dict:
    """The content of the config.json of a run or checkpoint, {} if it has none; ``path`` is as in :func:`load`."""
    place = find(path)
    return read_json((place if place.is_dir() else place.parent) / "config.json")


def build_model(weights: dict[str, Tensor], config: dict) -> nn.Module:
    """Build the model that :func:`describe_model` described and load the weights.

    Raises ValueError if the weights do not fit.
    """
    arguments = config.get("model") or {}
    task = next((task for task in ("classifier", "segmenter", "detector") if config.get(task)), None)

    def build() -> nn.Module:
        if task is None:
            return SMAE(**arguments)
        return task_class(task)(SMAE(**arguments | dict(decoder_depth=0)), **config[task])

    with torch.device("meta"):  # takes no memory, even for a huge size in the configuration
        expected = build().state_dict()
    compare_weights(expected, weights)
    model = build()
    model.load_state_dict(weights)
    return model


def task_class(task: str) -> type[nn.Module]:
    """The model of a task: a Classifier, a Segmenter or a Detector."""
    if task == "segmenter":
        import segmenter

        return segmenter.Segmenter
    if task == "detector":
        import detector

        return detector.Detector
    return Classifier


def compare_weights(own: dict[str, Tensor], weights: dict[str, Tensor]):
    """Raise ValueError, with names, unless the weights have the names and shapes of ``own``."""
    shapes = {name: (tuple(weights[name].shape), tuple(own[name].shape)) for name in own if name in weights}
    problems = {
        "missing": [name for name in own if name not in weights],
        "unexpected": [name for name in weights if name not in own],
        "of another shape": [f"{name} {a} instead of {b}" for name, (a, b) in shapes.items() if a != b],
    }
    texts = []
    for kind, names in problems.items():
        if names:
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            texts.append(f"{kind}: {', '.join(names[:4])}{more}")
    if texts:
        raise ValueError("the weights do not fit the model; " + "; ".join(texts))


def read_checkpoint(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """The configuration (empty if missing) and the tensors of a file or folder."""
    if path.is_file() and path.name == "model.safetensors" and (path.parent / "config.json").is_file():
        path = path.parent
    config, file = {}, path
    if path.is_dir():
        names = "model.safetensors", "pytorch_model.bin"
        file = next((path / name for name in names if (path / name).is_file()), path / names[0])
        for needed in (path / "config.json", file):
            if not needed.is_file():
                raise FileNotFoundError(f"{path} is not a run folder or checkpoint: it has no {needed.name}")
        config = read_json(path / "preprocessor_config.json") | read_json(path / "config.json")
    elif not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    if file.suffix == ".safetensors":
        return config, safetensors.torch.load_file(file)

    import convert

    options, weights = convert.read_pth(file)
    return config | options, weights


def read_json(file: Path) -> dict:
    """The JSON object in a file, {} if there is no file."""
    if not file.is_file():
        return {}
    with open(file, "rb") as opened:
        text = opened.read(LARGEST_CONFIG + 1)
    if len(text) > LARGEST_CONFIG:
        raise ValueError(f"{file} is too large for a configuration: expected at most {LARGEST_CONFIG} bytes")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object, got {describe(content)}")
    return content
