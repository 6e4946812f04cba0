"""From decoded pictures to bytes: how many channels, which range of values, which square.

Pictures are PIL images, or :class:`Bands` if PIL has no mode for their channels. Letters in shapes:
``c`` channels, ``H``/``W`` image height/width in pixels.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF


class PixelFormat(NamedTuple):
    """What becomes of a picture: its number of ``channels``, and 8 bits for each.

    Values from ``low`` to ``high`` become 0 to 255; None leaves that to the type of the picture.
    Pictures of 8 bits keep their values.
    """

    channels: int = 3
    low: float | None = None
    high: float | None = None


RGB = PixelFormat()


class Bands:
    """A picture of any number of channels: a grey PIL image for each of them."""

    def __init__(self, bands: Sequence[Image.Image]):
        self.bands = list(bands)
        self.size = self.width, self.height = self.bands[0].size


Picture = Image.Image | Bands


def is_deep(picture: Image.Image | np.ndarray) -> bool:
    """Whether the values of a picture need more than 8 bits."""
    if isinstance(picture, np.ndarray):
        return picture.dtype != np.uint8
    return picture.mode.startswith("I") or picture.mode == "F"


def convert(picture: Image.Image | np.ndarray, form: PixelFormat = RGB) -> Picture:
    """Convert a PIL picture, or an array (H, W), (H, W, c) or (c, H, W), to 8 bits in each channel.

    One channel is grey and three are RGB, whatever the picture has; transparency is laid over white.
    Raises ValueError if it has not as many channels as any other number asks for.
    """
    if isinstance(picture, np.ndarray):
        return _from_array(picture, form)
    if form.channels not in (1, 3):
        bands = picture.split()
        if len(bands) != form.channels:
            raise ValueError(f"it has {len(bands)} channels ({picture.mode}), expected {form.channels} (--channels)")
        return Bands(bands)
    if is_deep(picture):
        grey = _deep_grey(picture, form)
        return grey if form.channels == 1 else grey.convert("RGB")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert("L" if form.channels == 1 else "RGB")


def _from_array(values: np.ndarray, form: PixelFormat) -> Picture:
    c = form.channels
    if values.ndim == 2:
        values = values[..., None]
    if values.ndim != 3 or c not in (values.shape[0], values.shape[-1]):
        raise ValueError(f"it is an array of shape {values.shape}, expected {c} channels first or last (--channels)")
    if values.shape[-1] != c:
        values = np.moveaxis(values, 0, -1)
    values = np.ascontiguousarray(scale(values, form) if is_deep(values) else values)
    if c == 3:
        return Image.fromarray(values)
    bands = [Image.fromarray(np.ascontiguousarray(values[..., i])) for i in range(c)]
    return bands[0] if c == 1 else Bands(bands)


def scale(values: np.ndarray, form: PixelFormat) -> np.ndarray:
    """Values in the range of ``form`` as uint8; missing ones (NaN, infinite) are black."""
    low, high = (0, usual_top(values)) if form.low is None else (form.low, form.high)
    values = np.where(np.isfinite(values), values.astype(np.float64), low)
    return ((values - low) * (255 / (high - low))).round().clip(0, 255).astype(np.uint8)


def usual_top(values: np.ndarray) -> int:
    """The value of white: 65,535 for 16 bits and beyond 255, 1 for floats and booleans up to 1, else 255."""
    finite = values[np.isfinite(values)]
    largest = finite.max() if finite.size else 0
    if values.dtype == np.uint16 or largest > 255:
        return 65535
    return 1 if values.dtype.kind in "fb" and largest <= 1 else 255


def _deep_grey(image: Image.Image, form: PixelFormat) -> Image.Image:
    """A picture of more than 8 bits as one of 8."""
    values = np.asarray(image)
    if form.low is not None:
        return Image.fromarray(scale(values, form))
    if image.mode == "F":
        values = np.where(np.isfinite(values), values, np.float32(0))  # missing values are black
    top = 65535 if image.mode.startswith("I;16") else usual_top(values)
    if image.mode == "F":
        values = values.clip(0, top) * np.float32(255 / top)
        return Image.fromarray(values.round(out=values).astype(np.uint8))
    table = (np.arange(top + 1) * (255 / top)).round().astype(np.uint8)  # saves memory
    return Image.fromarray(table[values.clip(0, top)])


def blank(form: PixelFormat = RGB) -> Picture:
    """A black picture of one pixel."""
    return convert(np.zeros((1, 1, form.channels), np.uint8), form)


# ------------------------------------------------------------------------------ ranges


def measure_range(pictures: Iterable[Image.Image | np.ndarray]) -> tuple[float, float] | None:
    """The range of values of deep pictures, without the outer half per cent on each side; None if none is deep."""
    values = _deep_values(pictures)
    if not values.size:
        return None
    low, high = np.percentile(values, [0.5, 99.5])
    return (float(low), float(high)) if high > low else None


def white_of_floats(pictures: Iterable[Image.Image | np.ndarray]) -> int | None:
    """The value of white in data whose deep pictures are floats: 1, 255 or 65,535; None for any other data."""
    kinds = {np.asarray(picture).dtype.kind for picture in pictures if is_deep(picture)}
    return usual_top(_deep_values(pictures)) if kinds == {"f"} else None


def _deep_values(pictures: Iterable[Image.Image | np.ndarray]) -> np.ndarray:
    """A sample of the finite values of pictures of more than 8 bits."""
    found = [np.empty(0)]
    for picture in pictures:
        if is_deep(picture):
            values = np.asarray(picture, np.float64).ravel()
            values = values[np.isfinite(values)]
            found.append(values[:: max(1, len(values) // 10000)])
    return np.concatenate(found)


def unused_range(pictures: Iterable[Image.Image | np.ndarray]) -> str:
    """A warning if deep pictures use less than an eighth of the range that their type has; else empty."""
    values = _deep_values(pictures)
    if not values.size:
        return ""
    low, high = np.percentile(values, [0.5, 99.5])  # an outlier is no use of the range
    top = 1 if values.max() <= 1 else 255 if values.max() <= 255 else 65535
    if values.min() >= 0 and high - low >= top / 8:
        return ""
    return (
        f"pictures of more than 8 bits have values from {low:g} to {high:g}, of 0 to {top}: few grey levels are left; "
        f"name the range with --pixel-range {low:g} {high:g}, or auto"
    )


# ------------------------------------------------------------------------------ crops

Size = int | Sequence[int]  # a side, or height and width, in pixels


def pair(size: Size) -> tuple[int, int]:
    """Height and width of a size."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def compact(size: Size) -> int | list[int]:
    """A size as one side, if both are equal, else as a list of height and width."""
    height, width = pair(size)
    return height if height == width else [height, width]


def to_tensor(image: Picture) -> Tensor:
    """A picture as (c, H, W) uint8."""
    if isinstance(image, Bands):
        return torch.cat([to_tensor(band) for band in image.bands])
    return TF.pil_to_tensor(image)


def crop(image: Picture, box: np.ndarray, flip: bool, size: Size) -> Tensor:
    """Cut out a box (top, left, height, width) and resize it: (c, H, W) uint8."""
    if isinstance(image, Bands):
        return torch.cat([crop(band, box, flip, size) for band in image.bands])
    top, left, height, width = (int(x) for x in box)
    image = stretch(image.crop((left, top, left + width, top + height)), size)
    return image.flip(-1) if flip else image


def stretch(image: Picture, size: Size) -> Tensor:
    """Resize a whole picture, ignoring its aspect ratio: (c, H, W) uint8."""
    if isinstance(image, Bands):
        return torch.cat([stretch(band, size) for band in image.bands])
    height, width = pair(size)
    return TF.pil_to_tensor(image.resize((width, height), Image.Resampling.BICUBIC))


def center_crop(image: Picture, size: Size, ratio: float = 1.0) -> Tensor:
    """Resize a picture and cut out its centre: (c, H, W) uint8. ``ratio``: side of the crop over the short side."""
    if isinstance(image, Bands):
        return torch.cat([center_crop(band, size, ratio) for band in image.bands])
    limit = 8 * min(image.size)  # a strip of 1 x 10,000 pixels would become enormous
    if max(image.size) > limit:
        image = TF.center_crop(image, [min(image.height, limit), min(image.width, limit)])
    height, width = pair(size)
    if height == width:
        image = TF.resize(image, round(height / ratio), InterpolationMode.BICUBIC)
    else:
        scale = max(height / image.height, width / image.width) / ratio
        sides = [max(height, round(image.height * scale)), max(width, round(image.width * scale))]
        image = TF.resize(image, sides, InterpolationMode.BICUBIC)
    return TF.pil_to_tensor(TF.center_crop(image, [height, width]))
