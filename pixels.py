"""From decoded pictures to bytes: how many channels, which range of values, which square.

Pictures are PIL images, :class:`Bands` if PIL has no mode for their channels, or :class:`Jpeg` as long as they are
not decoded. Letters in shapes: ``c`` channels, ``H``/``W`` image height/width in pixels.
"""

import io
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor


class PixelFormat(NamedTuple):
    """What becomes of a picture: its number of ``channels``, and 8 bits for each.

    Values from ``low`` to ``high`` become 0 to 255; None leaves that to the type of the picture.
    Pictures of 8 bits keep their values.
    """

    channels: int = 3
    low: float | None = None
    high: float | None = None


RGB = PixelFormat()
ORIENTATION = 0x0112  # an EXIF tag, and how pictures with its values must be turned
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def turned(image: Image.Image, turn: Image.Transpose) -> Image.Image:
    """A picture turned; unlike PIL's it still knows its file format."""
    found = image.transpose(turn)
    found.format = image.format
    return found


class Bands:
    """A picture of any number of channels: a grey PIL image for each of them."""

    def __init__(self, bands: Sequence[Image.Image]):
        self.bands = list(bands)
        self.size = self.width, self.height = self.bands[0].size


class Jpeg:
    """A JPEG in ``encoded`` bytes, which is decoded when its pixels are wanted, no larger than these need.

    ``size``: width and height, upright. What is broken inside raises only then.
    """

    START = b"\xff\xd8"  # of its file

    def __init__(self, encoded: bytes, size: tuple[int, int], orientation: int, form: PixelFormat):
        self.encoded, self.form = encoded, form
        self.mirror_rows, self.mirror_columns = orientation in (3, 4, 6, 7), orientation in (2, 3, 7, 8)
        self.sideways = orientation in (5, 6, 7, 8)
        self.lying = size
        self.size = self.width, self.height = size[::-1] if self.sideways else size

    @classmethod
    def open(cls, encoded: bytes, form: PixelFormat) -> "Jpeg | None":
        """A JPEG as grey or RGB; None for other files, colours and formats, which PIL must read."""
        if not encoded.startswith(cls.START) or form.channels not in (1, 3):
            return None
        with Image.open(io.BytesIO(encoded)) as image:
            known = image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB")
            return cls(encoded, image.size, orientation_of(image), form) if known else None

    def cut(self, top: int, left: int, height: int, width: int, size: tuple[int, int]) -> Tensor:
        """Cut out a box and resize it: (c, H, W) uint8."""
        # where the box lies in the picture that is not turned yet
        if self.sideways:
            top, left, height, width, size = left, top, width, height, size[::-1]
        if self.mirror_rows:
            top = self.lying[1] - top - height
        if self.mirror_columns:
            left = self.lying[0] - left - width

        room = min(height // size[0], width // size[1])
        factor = next(factor for factor in (8, 4, 2, 1) if factor <= max(room, 1))
        image = self.decode(factor)
        if factor == 1:
            found = resize(from_array(image[top : top + height, left : left + width]), size)
        else:
            box = np.array([left, top, left + width, top + height]) / factor
            low, high = np.floor(box[:2]).astype(int), np.ceil(box[2:]).astype(int)
            around = to_pil(image[low[1] : high[1], low[0] : high[0]])
            box = tuple(box - np.tile(low, 2))
            found = from_array(np.array(around.resize(size[::-1], Image.Resampling.BICUBIC, box)))

        found = found.flip(1) if self.mirror_rows else found
        found = found.flip(2) if self.mirror_columns else found
        return found.mT if self.sideways else found

    def decode(self, factor: int = 1) -> np.ndarray:
        """The whole picture, not turned, at a part of its size, 1, 1/2, 1/4 or 1/8: (H, W, c) or (H, W) uint8.

        libjpeg leaves out the work for the details that are not wanted.
        """
        width, height = self.lying
        least = dict(min_height=-(-height // factor), min_width=-(-width // factor)) if factor > 1 else {}
        try:
            return simplejpeg.decode_jpeg(self.encoded, "GRAY" if self.form.channels == 1 else "RGB", **least)
        except ValueError:  # PIL reads it nevertheless, or says what is wrong
            with Image.open(io.BytesIO(self.encoded)) as image:
                image.draft(None, (width // factor, height // factor))
                return np.array(image.convert("L" if self.form.channels == 1 else "RGB"))


Picture = Image.Image | Bands | Jpeg


def orientation_of(image: Image.Image) -> int:
    """The orientation of a picture by its EXIF, 1 to 8; 1, which is upright, if that is damaged."""
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:  # of many kinds; the pixels are sound
        return 1


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
    if is_16_bit(values):
        return 65535
    finite = values[np.isfinite(values)]
    largest = finite.max() if finite.size else 0
    if largest > 255:
        return 65535
    return 1 if values.dtype.kind in "fb" and largest <= 1 else 255


def is_16_bit(values: np.ndarray) -> bool:
    """Whether the values are unsigned, of 16 bits, in either order of bytes."""
    return values.dtype.kind == "u" and values.dtype.itemsize == 2


def _deep_grey(image: Image.Image, form: PixelFormat) -> Image.Image:
    """A picture of more than 8 bits as one of 8."""
    values = np.asarray(image)
    if form.low is not None:
        return Image.fromarray(scale(values, form))
    top = usual_top(values)
    if image.mode == "F":
        values = np.where(np.isfinite(values), values, np.float32(0))  # missing values are black
        values = values.clip(0, top) * np.float32(255 / top)
        return Image.fromarray(values.round(out=values).astype(np.uint8))
    table = (np.arange(top + 1) * (255 / top)).round().astype(np.uint8)  # saves memory
    return Image.fromarray(table[values.clip(0, top)])


def blank(form: PixelFormat) -> Picture:
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


def common_white(pictures: Iterable[Image.Image | np.ndarray]) -> int | None:
    """The value of white in data whose deep pictures are floats or integers: 1 (floats only), 255 or 65,535.

    By itself, each of them would find its own. None for any other data, whose type settles it.
    """
    deep = [np.asarray(picture) for picture in pictures if is_deep(picture)]
    if not deep or any(values.dtype.kind not in "iuf" or is_16_bit(values) for values in deep):
        return None
    floats = any(values.dtype.kind == "f" for values in deep)
    return usual_top(_deep_values(pictures).astype(np.float64 if floats else np.int64))


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
    return crop(image, (0, 0, image.height, image.width))


def crop(image: Picture, box: Sequence[int], flip: bool = False, size: Size | None = None) -> Tensor:
    """Cut out a box (top, left, height, width) and resize it: (c, H, W) uint8.

    Without a size it keeps its own. What resamples is the antialiased bicubic filter of PIL, as torch
    has it. Values differ by rounding, at hard edges by more, because PIL may filter columns first.
    """
    if isinstance(image, Bands):
        return torch.cat([crop(band, box, flip, size) for band in image.bands])
    top, left, height, width = (int(x) for x in box)
    size = pair(size or (height, width))
    if isinstance(image, Jpeg):
        found = image.cut(top, left, height, width, size)
    else:
        if (height, width) != (image.height, image.width):
            image = image.crop((left, top, left + width, top + height))
        found = resize(from_array(np.array(image)), size)
    return found.flip(-1) if flip else found


def from_array(values: np.ndarray) -> Tensor:
    """A picture (H, W, c) or (H, W) uint8 as (c, H, W)."""
    return torch.from_numpy(values.reshape(*values.shape[:2], -1)).permute(2, 0, 1)


def to_pil(values: np.ndarray) -> Image.Image:
    """A picture (H, W, c) or (H, W) uint8 as a PIL image, grey or RGB."""
    return Image.fromarray(values[..., 0] if values.ndim == 3 and values.shape[2] == 1 else values)


def resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize (c, H, W) uint8 by the antialiased bicubic filter."""
    if image.shape[1:] == size:
        return image
    return F.interpolate(image[None], size, mode="bicubic", antialias=True)[0]


def stretch(image: Picture, size: Size) -> Tensor:
    """Resize a whole picture, ignoring its aspect ratio: (c, H, W) uint8."""
    return crop(image, (0, 0, image.height, image.width), size=size)


def center_crop(image: Picture, size: Size, ratio: float = 1.0) -> Tensor:
    """Resize a picture and cut out its centre: (c, H, W) uint8. ``ratio``: side of the crop over the short side."""
    limit = 8 * min(image.size)  # a strip of 1 x 10,000 pixels would become enormous
    h, w = min(image.height, limit), min(image.width, limit)
    box = (round((image.height - h) / 2), round((image.width - w) / 2), h, w)
    height, width = pair(size)
    if height == width:
        short = round(height / ratio)
        sides = (int(short * h / w), short) if w <= h else (short, int(short * w / h))
    else:
        scale = max(height / h, width / w) / ratio
        sides = (max(height, round(h * scale)), max(width, round(w * scale)))
    top, left = (round((side - length) / 2) for side, length in zip(sides, (height, width)))
    return crop(image, box, size=sides)[:, top : top + height, left : left + width]
