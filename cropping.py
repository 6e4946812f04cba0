"""Random numbers by key and index, random crops from them, and crops of whole batches.

Every random choice is a function of (seed, epoch, index of the picture). It does not depend on the
number of worker processes, GPUs or accumulation steps.

Letters in shapes: ``b`` batch, ``c`` channels, ``H``/``W`` image height/width in pixels.
"""

import math
from collections.abc import Callable
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from pixels import RGB, PixelFormat, Size, pair


class RandomStream(IntEnum):
    """The purpose of random numbers, a part of the key of :func:`uniform`."""

    CROP = 0
    MASK = 1
    AUGMENT = 2
    MIX = 3


def uniform(key: tuple[int, ...], indices: np.ndarray, count: int) -> np.ndarray:
    """Random numbers (b, count) float32 in [0, 1), a function of key, index (b,) and column only.

    Uses SplitMix64 (Steele, Lea & Flood, OOPSLA 2014) as a hash, because NumPy lacks a generator
    with a key per row.
    """

    def mix(x: np.ndarray) -> np.ndarray:
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))

    golden = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        state = np.zeros(len(indices), np.uint64)
        for part in (*key, indices):
            state = mix(state + golden + np.asarray(part).astype(np.uint64))
        x = mix(state[:, None] + golden * np.arange(1, count + 1, dtype=np.uint64))
    return ((x >> np.uint64(40)) * 2.0**-24).astype(np.float32)


class Crops(NamedTuple):
    """The boxes of crops in their pictures, and which crops are flipped.

    ``boxes`` (b, 4): top, left, height, width, in pixels (int64) or as fractions of the picture
    (float32). ``flips`` (b,) bool.
    """

    boxes: np.ndarray
    flips: np.ndarray

    def as_fractions(self, sizes: np.ndarray) -> "Crops":
        """Turn boxes in pixels into fractions of the pictures' ``sizes`` (b, 2)."""
        return Crops((self.boxes / np.tile(sizes, 2)).astype(np.float32), self.flips)


def torch_seeds(key: tuple[int, ...], indices: np.ndarray) -> list[int]:
    """Seeds for torch's generators, one for each index (b,): a function of key and index only."""
    return (uniform(key, indices, 1)[:, 0] * 2**24).astype(int).tolist()


def random_crops(
    sizes: np.ndarray, noise: np.ndarray, scale: tuple[float, float] = (0.2, 1.0), aspect: float = 1.0
) -> Crops:
    """RandomResizedCrop with flips, for pictures of ``sizes`` (b, 2), height and width.

    The crops are a function of ``noise`` (b, 23) in [0, 1). The area of a crop is uniform in
    ``scale`` (fractions of the picture), its aspect ratio log-uniform in (3/4, 4/3) times
    ``aspect``. The first of ten draws that fits is taken; if none fits, the largest central crop of
    an allowed aspect ratio.
    """
    narrow, wide = 3 / 4 * aspect, 4 / 3 * aspect
    height, width = sizes[:, :1].astype(np.float64), sizes[:, 1:].astype(np.float64)

    # ten draws for each picture, (b, 10)
    area = height * width * (scale[0] + noise[:, :10] * (scale[1] - scale[0]))
    ratio = np.exp(math.log(narrow) + noise[:, 10:20] * math.log(wide / narrow))
    h, w = np.round(np.sqrt(area / ratio)), np.round(np.sqrt(area * ratio))

    # the first draw that fits, (b, 1)
    fits = (h >= 1) & (w >= 1) & (h <= height) & (w <= width)
    first = fits.argmax(axis=1)[:, None]
    h, w = np.take_along_axis(h, first, 1), np.take_along_axis(w, first, 1)
    top = np.floor(noise[:, 20:21] * (height - h + 1))
    left = np.floor(noise[:, 21:22] * (width - w + 1))

    # the central crop, where no draw fits
    central_h = np.round(np.minimum(height, width / narrow)).clip(1)
    central_w = np.round(np.minimum(width, height * wide)).clip(1)
    central = [(height - central_h) // 2, (width - central_w) // 2, central_h, central_w]

    drawn = np.hstack([top, left, h, w])
    boxes = np.where(fits.any(axis=1, keepdims=True), drawn, np.hstack(central))
    return Crops(boxes.astype(np.int64), noise[:, 22] < 0.5)


def crop_batch(
    images: Tensor,
    boxes: Tensor,
    flips: Tensor,
    size: Size,
    how: str = "inside",
) -> Tensor:
    """Cut boxes out of images (b, c, H, W) on their device and resize them: (b, c, *size).

    The type stays the same. ``size`` is one side or two; ``boxes`` (b, 4) are top, left, height and
    width in pixels, and may be fractional; ``flips`` (b,) bool. Both are on the device of the images.
    Applies PIL's antialiased bicubic filter as two matrix products. ``how``: "inside"
    uses only pixels inside the box, as :func:`pixels.crop` does; "beyond" also uses those around it;
    "area" takes means over areas.
    """
    if images.device.type == "cpu" and len(images) > 16:  # parts that fit in the caches: twice as fast
        parts = zip(images.split(16), boxes.split(16), flips.split(16))
        return torch.cat([crop_batch(*part, size, how) for part in parts])
    top, left, height, width = boxes.float().unbind(1)
    size = pair(size)
    rows = _resize_weights(top, height, images.shape[-2], size[0], how)
    columns = _resize_weights(left, width, images.shape[-1], size[1], how)
    columns = torch.where(flips[:, None, None], columns.flip(1), columns)
    wide = rearrange(images.float(), "b c h w -> b (c h) w") @ columns.mT
    crops = rows[:, None] @ rearrange(wide, "b (c h) w -> b c h w", c=images.shape[1])
    return crops if images.is_floating_point() else crops.round().clamp(0, 255).to(images.dtype)


def _resize_weights(start: Tensor, length: Tensor, pixels: int, size: int, how: str) -> Tensor:
    """Weights (b, size, pixels) that resize [start, start + length) of ``pixels`` to ``size``."""
    step = (length / size)[:, None, None]  # input pixels per output pixel
    position = torch.arange(pixels, device=start.device) + 0.5
    centre = start[:, None, None] + (torch.arange(size, device=start.device)[:, None] + 0.5) * step
    if how == "area":
        low, high = centre - step / 2, centre + step / 2
        overlap = torch.minimum(high, position + 0.5) - torch.maximum(low, position - 0.5)
        weights = overlap.clamp(min=0)
        return weights / weights.sum(-1, keepdim=True)
    t = ((position - centre).abs() / step.clamp(min=1)).clamp(max=2)  # (b, size, pixels), in widths of the filter
    near = (1.5 * t - 2.5) * t * t + 1  # Keys' cubic, a = -1/2
    far = ((-0.5 * t + 2.5) * t - 4) * t + 2  # 0 at 2
    weights = torch.where(t < 1, near, far)
    if how == "inside":
        half = length[:, None, None] / 2
        weights = weights * ((position - start[:, None, None] - half).abs() < half + 0.5)
    return weights / weights.sum(-1, keepdim=True)


class CropOptions(NamedTuple):
    """How to crop for training.

    ``size``: of the crops, a side or (H, W) in pixels. ``scale``: smallest and largest crop, as fractions of the
    image area. ``bad_limit``: the number of broken pictures that makes a reader give up a batch.
    ``augment`` takes a crop (c, H, W) uint8 and returns another; it draws from torch's
    default generator. ``form``: what pictures are decoded to.
    """

    size: Size
    scale: tuple[float, float]
    seed: int
    bad_limit: int
    augment: Callable[[Tensor], Tensor] | None = None
    form: PixelFormat = RGB

    def crops(self, sizes: np.ndarray, epoch: int | None, indices: np.ndarray) -> Crops:
        """Random crops of pictures of ``sizes`` (b, 2); whole pictures if ``epoch`` is None."""
        if epoch is None:
            return Crops(np.hstack([np.zeros_like(sizes), sizes]), np.zeros(len(sizes), bool))
        noise = uniform((self.seed, epoch, RandomStream.CROP), indices, 23)
        height, width = pair(self.size)
        return random_crops(sizes, noise, self.scale, width / height)

    def augmented(self, images: Tensor, epoch: int | None, indices: np.ndarray) -> Tensor:
        """Augment each crop with its own random numbers; unchanged if ``epoch`` is None."""
        if self.augment is None or epoch is None:
            return images
        augmented = []
        seeds = torch_seeds((self.seed, epoch, RandomStream.AUGMENT), indices)
        with torch.random.fork_rng(devices=[]):
            for image, seed in zip(images, seeds):
                torch.default_generator.manual_seed(seed)
                augmented.append(self.augment(image))
        return torch.stack(augmented)
