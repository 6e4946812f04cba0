"""Columns of object masks: which of their values are the object, and how much of each patch it covers.

Letters in shapes: ``b`` batch, ``k`` sampled pictures, ``H``/``W`` image height/width in pixels,
``h``/``w`` cells of a grid.
"""

import contextlib
import io
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor

import data
import pixels

SHADES = 32  # more values than this in one mask, up to 255, are shades of a soft one, not classes
SAMPLES = 32  # masks to look at before their values are understood
VOID_COLOUR = (224, 224, 192)  # of the rims in Pascal VOC


class MaskRule(NamedTuple):
    """Which values of a mask are the object.

    ``ids``: these values; without them every value above ``above``, except ``void``. ``kind`` says how
    the masks were understood. The default rule takes what exceeds 127, or, in a mask without such
    values, what is not 0.
    """

    kind: str = "by threshold"
    ids: tuple[int, ...] | None = None
    above: int | None = None
    void: int | None = None

    def is_object(self, values: np.ndarray) -> np.ndarray:
        """Whether each value of a mask belongs to the object."""
        if self.ids is not None:
            return np.isin(values, self.ids)
        above = self.above
        if above is None:
            above = 127 if values.max() > 127 else 0
        found = values > above
        return found if self.void is None else found & (values != self.void)


BY_THRESHOLD = MaskRule()


def mask_values(mask: Image.Image) -> np.ndarray:
    """The values (H, W) of a mask picture: grey levels or palette indices.

    Of a cut-out they are its transparency, of a colour picture 255 wherever it is neither black nor
    Pascal VOC's void. Fractions become 0 to 255.
    """
    if mask.mode in ("LA", "RGBA", "PA"):
        alpha = np.asarray(mask.getchannel("A"))
        if alpha.min() < 255:
            return alpha
        mask = mask.convert("RGB")
    if mask.mode in ("L", "P", "1") or mask.mode.startswith("I"):
        return np.asarray(mask).astype(int)
    if mask.mode == "F":
        values = np.nan_to_num(np.asarray(mask), posinf=0, neginf=0)
        return np.rint(values * 255 if values.max() <= 1 else values).astype(int)
    colours = np.asarray(mask.convert("RGB"))
    if (colours == colours[..., :1]).all():
        return colours[..., 0]
    return np.where(colours.any(axis=-1) & (colours != VOID_COLOUR).any(axis=-1), 255, 0)


def understand(masks: Iterable[np.ndarray], ids: Iterable[int] | None = None, void: int | None = None) -> MaskRule:
    """The rule for masks like these values: binary, soft, trimaps or classes.

    ``ids`` and ``void`` overrule what the values suggest. Raises ValueError if no mask has any
    background, so that nobody can tell what the object is.
    """
    if ids is not None:
        names = ", ".join(map(str, ids))
        return MaskRule(f"the object has the value {names}", ids=tuple(ids))
    counted = [np.unique(mask, return_counts=True) for mask in masks]  # one by one: masks may be large
    values = sorted({value for found, _ in counted for value in found.tolist()}) or [0, 255]
    shades = max((len(found) for found, _ in counted), default=2) > SHADES
    if void is None and shades and 127 < values[-1] <= 255:
        return MaskRule("soft: the object is above 127", above=127)
    if 0 not in values:
        shown = ", ".join(map(str, values[:8]))
        hint = "a trimap? " if len(values) <= 3 else ""
        raise ValueError(
            f"the masks have no background (0), only the values {shown}: {hint}name the object's with --object-ids"
        )
    others = [value for value in values if value not in (0, void)]
    if void is None and 127 < values[-1] <= 255:
        if len(others) == 2 and others[1] == 255 and 100 < others[0] < 155:
            return MaskRule(f"trimaps: 255 is the object, {others[0]} is unknown, taken for background", above=254)
        if len(others) <= 1 or others == [1, 255]:
            return MaskRule("binary: everything but 0 is the object", above=0)
        if _have_soft_edges(counted):
            return MaskRule("soft: the object is above 127", above=127)
        if others[-1] == 255:
            void = others.pop()
    if len(others) <= 1 and void is None:
        return MaskRule("binary: everything but 0 is the object", above=0)
    named = f"{others[0]} to {others[-1]}" if len(others) > 1 else ", ".join(map(str, others))
    ignored = "" if void is None else f", {void} is void, taken for background"
    return MaskRule(f"classes: {named} are the object{ignored}", above=0, void=void)


def _have_soft_edges(counted: list[tuple[np.ndarray, np.ndarray]]) -> bool:
    """Whether most masks with shades between black and white have more white than shades.

    ``counted``: the values of each mask, and how many pixels have them.
    """
    counts = [(n[values >= 250].sum(), n[(values > 0) & (values < 250)].sum()) for values, n in counted]
    shaded = [white > between for white, between in counts if between]
    return 2 * sum(shaded) > len(shaded)


def understand_column(dataset: data.Dataset, column: str, ids: list[int] | None, void: int | None) -> MaskRule:
    """The rule for a column of masks, from a sample of it. Raises ValueError."""

    def readable() -> Iterator[np.ndarray]:
        for record in data.sample_records(dataset, SAMPLES, [column]):
            try:
                values = mask_values(data.open_upright(record[column]))
            except Exception:  # a broken mask
                continue
            yield values

    return understand(readable(), ids, void)


def object_mask(
    mask: Image.Image | dict,
    rule: MaskRule = BY_THRESHOLD,
    picture: dict | None = None,
) -> Image.Image:
    """Turn a mask picture into 255 on the object, 0 elsewhere.

    ``picture`` is the record of the picture that it belongs to. If that is turned by its EXIF, and the
    mask has the size that it had before, the mask is turned as well.
    """
    if isinstance(mask, dict):
        mask = data.open_upright(mask)
    values = rule.is_object(mask_values(mask))
    found = Image.fromarray(np.where(values, 255, 0).astype(np.uint8))
    turn = turn_of(picture, mask.size) if picture else None
    return found if turn is None else found.transpose(turn)


def turn_of(picture: dict, mask_size: tuple[int, int]) -> Image.Transpose | None:
    """How a picture is turned by its EXIF, if a mask of this size is not; None otherwise."""
    with contextlib.suppress(Exception):  # a broken picture, or damaged EXIF
        source = picture["path"] if picture["bytes"] is None else io.BytesIO(picture["bytes"])
        with Image.open(source) as image:
            orientation = pixels.orientation_of(image)
            if orientation > 4 and image.size == mask_size and image.width != image.height:
                return pixels.TURNS.get(orientation)
            if orientation in pixels.TURNS and (orientation < 5 or image.width == image.height):
                data.say_once(
                    "WARNING: some pictures are turned or mirrored by their EXIF, and the size of their masks does not "
                    "tell whether these are too: they are taken as they are"
                )
    return None


class ObjectMasks:
    """The column of object masks of a data set.

    ``rule`` says what the object is in them. ``missing`` lists the pictures whose mask could not be
    read. Raises ValueError if there is no such column.
    """

    def __init__(self, dataset: data.Dataset, column: str, ids: list[int] | None = None, void: int | None = None):
        features = dataset.features or {}
        if not isinstance(features.get(column), datasets.Image):
            columns = ", ".join(features)
            raise ValueError(f"the data has no column {column!r} of mask pictures, only {columns}")
        if isinstance(dataset, datasets.IterableDataset):
            raise ValueError("a stream has no index to find object masks by: drop --streaming")
        self.rule = understand_column(dataset, column, ids, void)
        names = dict.fromkeys([column, "image"])
        self.records = data.undecoded(dataset, [name for name in names if name in features])
        self.column = column
        self.missing: list[int] = []

    def coverage(self, indices: np.ndarray, grid: tuple[int, int]) -> Tensor:
        """The fraction of each cell of a grid (h, w) that the object covers: (b, h, w).

        For whole pictures ``indices`` (b,); 0 where a mask cannot be read.
        """
        found = torch.zeros(len(indices), *grid)
        for row, index in enumerate(indices.tolist()):
            record = self.records[index]
            try:
                mask = object_mask(record[self.column], self.rule, record.get("image"))
            except Exception:  # a decoder raises anything on a broken file
                self.missing.append(index)
                continue
            cells = mask.resize(grid[::-1], Image.Resampling.BOX)
            found[row] = torch.from_numpy(np.array(cells)) / 255
        return found


def sample_pictures(
    dataset: data.Dataset,
    count: int,
    size: data.Size,
    mask_column: str = "mask",
    rule: MaskRule = BY_THRESHOLD,
    form: data.PixelFormat = data.RGB,
) -> tuple[Tensor, Tensor | None]:
    """Up to ``count`` centre crops from all over the data (the first of a stream) and their objects.

    The crops are (k, c, H, W) uint8, the objects (k, H, W) bool, None without a mask
    column. Raises ValueError, with the reason for one, if none of the pictures tried can be decoded.
    """
    has_masks = isinstance((dataset.features or {}).get(mask_column), datasets.Image)
    columns = ["image", mask_column] if has_masks else ["image"]
    images, objects, reason = [], [], "there are none"
    for number, record in enumerate(data.sample_records(dataset, 2 * count, columns)):
        try:
            image = data.center_crop(data.open_picture(record["image"], form), size)
        except Exception as error:  # a broken picture; training counts and reports it
            reason = data.describe_bad(number, record["image"], error).description
            continue
        images.append(image)
        objects.append(torch.zeros(data.pair(size), dtype=torch.bool))
        if has_masks:
            with contextlib.suppress(Exception):  # a broken mask
                mask = object_mask(record[mask_column], rule, record["image"])
                objects[-1] = data.center_crop(mask, size)[0] > 127
    if not images:
        raise ValueError(f"none of the pictures sampled from the data can be decoded, for example {reason}")
    chosen = data.evenly_spaced(len(images), count)
    images = torch.stack([images[i] for i in chosen])
    objects = torch.stack([objects[i] for i in chosen])
    return images, objects if has_masks else None
