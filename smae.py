"""Self-guided masked autoencoder: a ViT masked autoencoder (MAE) written with einops.

Works alone: needs torch, einops and safetensors. What to mask is decided elsewhere (``masks.py``); any object with
ascending integer index tensors ``visible`` (b, v) and ``masked`` (b, m) will do.

Letters in shapes: ``b`` batch, ``n`` patches (n = h * w of the patch grid), ``v`` visible, ``m`` masked, ``d`` width,
``p`` patch side, ``c`` channels, ``H``/``W`` image height/width in pixels.

Sources: MAE (He et al., CVPR 2022, arXiv 2111.06377); ViT (Dosovitskiy et al., ICLR 2021).
"""

import json
import os
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
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    columns, rows = encode(torch.arange(w).double()), encode(torch.arange(h).double())
    return torch.cat([repeat(columns, "w d -> (h w) d", h=h), repeat(rows, "h d -> (h w) d", w=w)], dim=1).float()


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
        q, k, v = rearrange(self.qkv(x), "b n (three heads d) -> three b heads n d", three=3, heads=self.heads)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.out(rearrange(x, "b heads n d -> b n (heads d)"))


class Block(nn.Module):
    """Pre-norm transformer block over tokens (b, n, d)."""

    def __init__(self, width: int, heads: int, mlp_ratio: float):
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class SMAE(nn.Module):
    """A ViT masked autoencoder: ``SMAE(**PRESETS["base"])``.

    ``image_size`` (a side or an (H, W) pair, in pixels) names the grid whose positions are precomputed; any other
    image whose sides are divisible by ``patch_size`` works too. ``normalize_pixels`` makes the target of the loss the
    pixels of a patch with their own mean and deviation removed. ``config`` holds the arguments of the constructor.

    Raises ValueError where widths, heads, image and patch size do not divide.
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
        normalize_pixels: bool = True,
    ):
        super().__init__()
        height, width_px = (image_size, image_size) if isinstance(image_size, int) else image_size
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
            normalize_pixels=normalize_pixels,
        )
        for name, value in self.config.items():
            if name != "image_size" and value <= 0 and name != "normalize_pixels":
                raise ValueError(f"{name} must be positive, got {value}")
        for name, d, count in (("heads", width, heads), ("decoder_heads", decoder_width, decoder_heads)):
            if d % count:
                raise ValueError(f"{name} ({count}) must divide the width ({d})")
        self.patch_size, self.normalize_pixels = patch_size, normalize_pixels
        grid = self.grid(torch.empty(0, channels, height, width_px, device="meta"))
        patch_dim = patch_size * patch_size * channels

        self.embed = nn.Linear(patch_dim, width)
        self.cls_token = nn.Parameter(torch.zeros(width))
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

        self.decoder_embed = nn.Linear(width, decoder_width)
        self.mask_token = nn.Parameter(torch.zeros(decoder_width))
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_width, decoder_heads, mlp_ratio) for _ in range(decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder_width, eps=1e-6)
        self.head = nn.Linear(decoder_width, patch_dim)

        self.register_buffer("positions", sincos_positions(*grid, width), persistent=False)
        self.register_buffer("decoder_positions", sincos_positions(*grid, decoder_width), persistent=False)
        self._initialise()

    def _initialise(self):
        """Xavier-uniform weights, zero biases, tokens from N(0, 0.02) (MAE, appendix A.1)."""
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)
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
        """Position embeddings (1, n, d) for ``grid``: the precomputed table where it fits, else computed anew."""
        if tuple(side // self.patch_size for side in self.config["image_size"]) == grid:
            return table[None]
        return sincos_positions(*grid, table.shape[1]).to(table)[None]

    def forward(self, images: Tensor, mask) -> Tensor:
        """Mean squared error on the masked patches: normalised images (b, c, H, W) and a Mask to a float32 scalar."""
        latent = self.encode(images, mask.visible)
        prediction = self.decode(latent, mask, self.grid(images))
        target = self.target(images, mask.masked)
        return F.mse_loss(prediction.float(), target)

    def encode(self, images: Tensor, visible: Tensor | None = None, layer: int | None = None) -> Tensor:
        """Encode the ``visible`` patches (b, v), all of them by default: (b, 1 + v, d), CLS token first.

        ``layer`` (1 ... depth) returns the tokens after that block, without the final norm. Raises ValueError if it
        is out of range.
        """
        if layer is not None and not 1 <= layer <= len(self.blocks):
            raise ValueError(f"layer must lie between 1 and {len(self.blocks)}, got {layer}")
        positions = self._positions(self.positions, self.grid(images))
        patches = patchify(images, self.patch_size)
        if visible is not None:
            patches, positions = take(patches, visible), take(positions, visible)
        cls = repeat(self.cls_token, "d -> b 1 d", b=len(images))
        x = torch.cat([cls, self.embed(patches) + positions], dim=1)  # (b, 1 + v, d)
        for block in self.blocks[:layer]:
            x = block(x)
        return x if layer else self.norm(x)

    def decode(self, latent: Tensor, mask, grid: tuple[int, int]) -> Tensor:
        """Predict the masked patches of an (h, w) grid from the encoder's tokens (b, 1 + v, d): (b, m, p * p * c)."""
        x = self.decoder_embed(latent)
        positions = self._positions(self.decoder_positions, grid)
        shown = x[:, 1:] + take(positions, mask.visible)
        hidden = self.mask_token + take(positions, mask.masked)
        x = torch.cat([x[:, :1], shown, hidden], dim=1)  # (b, 1 + v + m, decoder d): the order does not matter
        for block in self.decoder_blocks:
            x = block(x)
        return self.head(self.decoder_norm(x[:, -mask.masked.shape[1] :]))

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


def save(model: SMAE, folder: str | os.PathLike, config: dict | None = None):
    """Write ``model.safetensors`` and ``config.json`` into ``folder``, each whole or not at all.

    ``config.json`` holds the constructor's arguments under "model", and whatever else ``config`` holds.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    safetensors.torch.save_file(weights, folder / "model.safetensors.part")
    text = json.dumps({"model": model.config, **(config or {})}, indent=2)
    (folder / "config.json.part").write_text(text + "\n")
    for name in ("model.safetensors", "config.json"):
        os.replace(folder / f"{name}.part", folder / name)


def load(folder: str | os.PathLike, device: str | torch.device = "cpu") -> SMAE:
    """The model saved in ``folder`` by :func:`save` or ``train.py``, in evaluation mode on ``device``.

    Raises FileNotFoundError if there is none, ValueError if its weights do not fit its configuration.
    """
    folder = Path(folder)
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} is not a run folder: it has no {name}")
    model = SMAE(**json.loads((folder / "config.json").read_text())["model"])
    try:
        model.load_state_dict(safetensors.torch.load_file(folder / "model.safetensors"))
    except RuntimeError as error:
        raise ValueError(f"{folder}: the weights do not fit config.json: {error}") from None
    return model.eval().to(device)
