"""Hugging Face image data to batches of crops; the demo data set ``shapes``, drawn by code.

Every random choice is a function of (seed, epoch, index of the image), so that it does not depend on how many worker
processes, GPUs or accumulation steps share the work. Pictures stay uint8 until they are on the device.

Letters in shapes: ``b`` batch, ``c`` channels, ``H``/``W`` image height/width in pixels.
"""

import contextlib
import functools
import glob
import hashlib
import inspect
import itertools
import math
import os
import re
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import torch
from datasets.distributed import split_dataset_by_node
from datasets.exceptions import DatasetsError
from einops import rearrange
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as in MAE
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}
TABLE_SUFFIXES = {".parquet", ".arrow", ".tar"}
TEST_SPLITS = {"val", "valid", "validation", "dev", "test", "testing"}  # beside these, "train" is a split, not a class
CROPS, MASKS, AUGMENT, MIX = 0, 1, 2, 3  # what random numbers are for: streams of their own, see uniform()


class Source(NamedTuple):
    """A data set known by name: its hub id (None: not there), columns, test split, and what to do if it is missing."""

    hub: str | None
    image: str
    label: str
    test: str
    hint: str = "is this machine online?"


DATASETS = {  # those of the paper; add your own row
    "imagenet-1k": Source(
        "ILSVRC/imagenet-1k",
        "image",
        "label",
        "validation",
        "accept its terms at huggingface.co/datasets/ILSVRC/imagenet-1k, then log in with: hf auth login",
    ),
    "inat2019": Source(
        None,
        "image",
        "label",
        "val",
        "it is not on the hub: get train_val2019.tar.gz, train2019.json and val2019.json as "
        "github.com/visipedia/inat_comp/tree/master/2019 says, sort the pictures into train/CLASS and val/CLASS "
        "folders by these lists, and give that folder to --dataset",
    ),
    "cifar10": Source("uoft-cs/cifar10", "img", "label", "test"),
    "cifar100": Source("uoft-cs/cifar100", "img", "fine_label", "test"),
    "cub200": Source("bentrevett/caltech-ucsd-birds-200-2011", "image", "label", "test"),
}


@functools.cache
def mean_and_std(device: torch.device, mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Both as (c, 1, 1) on the device, made once: copying them at every step would wait for the device."""
    return torch.tensor(mean, device=device).view(3, 1, 1), torch.tensor(std, device=device).view(3, 1, 1)


def normalize(images: Tensor, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> Tensor:
    """uint8 images (b, 3, H, W) to floats of about zero mean and unit deviation; a model's config has its own."""
    mean, std = mean_and_std(images.device, tuple(mean), tuple(std))
    return (images.float() / 255 - mean) / std


def denormalize(images: Tensor, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> Tensor:
    """The inverse of :func:`normalize`, rounded to uint8."""
    mean, std = mean_and_std(images.device, tuple(mean), tuple(std))
    return ((images.float() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


def to_device(values: Tensor | np.ndarray, device: torch.device) -> Tensor:
    """An array or tensor of the host on ``device``, without waiting for the device."""
    tensor = torch.as_tensor(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


# ------------------------------------------------------------------------------------------------- loading


def load_images(
    name_or_path: str,
    split: str = "train",
    image_column: str | None = None,
    label_column: str | None = None,
    streaming: bool = False,
    max_images: int | None = None,
) -> datasets.Dataset | datasets.IterableDataset:
    """Load a data set of images; its image column is renamed ``image`` (left undecoded), its label column ``label``.

    Other columns stay as they are, but that a stream leaves all of them undecoded.

    ``name_or_path``: ``shapes`` or ``shapes:easy`` (the demo data), a folder of images (with or without class folders;
    ``split`` may be a folder in it), a parquet file or a folder of them, a WebDataset, a folder written by
    ``save_to_disk``, one of :data:`DATASETS`, or a Hugging Face hub name, ``name`` or ``name:configuration``. The
    columns are found by their type unless named (``label_column=""``: no label is wanted).

    Raises FileNotFoundError if there is no such data, ValueError if it has no such split, no image column, or no
    image.
    """
    known = None if Path(name_or_path).exists() else DATASETS.get(name_or_path)
    if known:
        image_column, label_column = image_column or known.image, label_column or known.label
    dataset = _open(name_or_path, split, streaming, known)
    features = dataset.features or dict.fromkeys(next(iter(dataset), {}))
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    image_column = image_column or next((name for name in ("image", "img", "jpg", "png") if name in images), None)
    if image_column is None and len(images) == 1:
        image_column = images[0]
    if image_column not in features:
        wanted = f"has no column {image_column!r}" if image_column else "has no single image column"
        raise ValueError(f"{name_or_path} {wanted}; name one of its columns with --image-column: {', '.join(features)}")
    feature = features[image_column]
    raw = {"binary", "large_binary", "string", "large_string"}  # encoded pictures, or their paths
    if not (feature is None or isinstance(feature, datasets.Image) or getattr(feature, "dtype", None) in raw):
        raise ValueError(f"column {image_column!r} of {name_or_path} does not hold images, but {feature}")
    labels = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    if label_column is None:
        label_column = "label" if "label" in features else next(iter(labels), None)
    if label_column and label_column not in features:
        raise ValueError(
            f"{name_or_path} has no column {label_column!r}; name one with --label-column: {', '.join(features)}"
        )

    names = {image_column: "image"} | ({label_column: "label"} if label_column else {})
    names = {old: new for old, new in names.items() if old != new}
    in_the_way = [new for new in names.values() if new in features]
    dataset = dataset.decode(False) if streaming else dataset  # first: renaming a stream decodes it on the way
    dataset = (dataset.remove_columns(in_the_way) if in_the_way else dataset).rename_columns(names)
    dataset = dataset.cast_column("image", datasets.Image(decode=False))
    first = next(iter(dataset), None) if streaming else len(dataset) or None
    if first is None:
        raise ValueError(f"split {split!r} of {name_or_path} is empty")
    if max_images is not None:
        if max_images < 1:
            raise ValueError(f"--max-images must be positive, got {max_images}")
        dataset = dataset.take(max_images) if streaming else dataset.select(range(min(max_images, len(dataset))))
    return dataset


def load_tests(name_or_path: str, split: str | None, *options) -> datasets.Dataset | datasets.IterableDataset:
    """:func:`load_images` of the pictures to test on: ``split``, or the first there is of validation, val and test.

    Raises ValueError if there is no such split.
    """
    known = None if Path(name_or_path).exists() else DATASETS.get(name_or_path)
    if split or known:
        return load_images(name_or_path, split or known.test, *options)
    for split in ("validation", "val", "test"):
        try:
            return load_images(name_or_path, split, *options)
        except ValueError as error:
            if not re.search("(?i)unknown split|is empty", str(error)):
                raise
    raise ValueError(f"{name_or_path} has no split validation, val or test to test on: name one with --test-split")


def fingerprint(dataset: datasets.Dataset | datasets.IterableDataset, count: int = 16) -> list[str]:
    """What tells a data set from others: hashes of ``count`` pictures from all over it (of a stream: the first ones).

    Of their files as they are, undecoded; "" for one that cannot be read.
    """
    if isinstance(dataset, datasets.IterableDataset):
        records = dataset.take(count)
    else:
        records = dataset.select(np.linspace(0, len(dataset) - 1, min(count, len(dataset))).astype(int))
    hashes = []
    for record in records.select_columns(["image"]):
        try:
            blob = record["image"]["bytes"] or Path(record["image"]["path"]).read_bytes()
            hashes.append(hashlib.sha256(blob).hexdigest()[:16])
        except Exception:  # a broken picture, or one that has vanished
            hashes.append("")
    return hashes


def length_of(dataset: datasets.Dataset | datasets.IterableDataset, limit: int | None = None) -> int | None:
    """How many pictures there are; of a stream: ``limit``, or what its description promises, if it does."""
    if isinstance(dataset, datasets.Dataset):
        return len(dataset)
    splits = dataset.info.splits or {}
    return limit or (splits[str(dataset.split)].num_examples if str(dataset.split) in splits else None)


def _open(
    name: str, split: str, streaming: bool, known: Source | None = None
) -> datasets.Dataset | datasets.IterableDataset:
    if name in ("shapes", "shapes:easy"):
        dataset = load_shapes(split, easy=name == "shapes:easy")
        return dataset.to_iterable_dataset(num_shards=8) if streaming else dataset
    path = Path(name).expanduser()
    try:
        if path.is_file():
            if split != "train":
                raise ValueError(f"Unknown split {split!r}: a single file has only 'train'")
            kind = "webdataset" if path.suffix == ".tar" else path.suffix.lstrip(".")
            return datasets.load_dataset(kind, data_files={split: str(path)}, split=split, streaming=streaming)
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            dataset = datasets.load_from_disk(str(path))
            if isinstance(dataset, datasets.DatasetDict):
                if split not in dataset:
                    raise ValueError(f"Unknown split {split!r}; there are {list(dataset)}")
                dataset = dataset[split]
            elif split != "train":
                raise ValueError(f"Unknown split {split!r}: a single data set has only 'train'")
            return dataset.to_iterable_dataset() if streaming else dataset
        if path.is_dir():
            suffixes = {file.suffix.lower() for file in path.rglob("*")}
            if not suffixes & (IMAGE_SUFFIXES | TABLE_SUFFIXES):
                raise FileNotFoundError(f"{name} holds neither images nor parquet, arrow or tar files")
            if not suffixes & TABLE_SUFFIXES:  # every file belongs to the split asked for, whatever its name
                folders = {child.name for child in path.iterdir() if child.is_dir()}
                if split in folders and (split != "train" or len(folders) == 1 or folders & TEST_SPLITS):
                    path = path / split
                elif split != "train":
                    raise ValueError(f"Unknown split {split!r}: {name} has no folder of that name")
                files = {split: f"{glob.escape(str(path))}/**"}
                return datasets.load_dataset("imagefolder", data_files=files, split=split, streaming=streaming)
            return datasets.load_dataset(str(path), split=split, streaming=streaming)
        if name[0] in ".~/" or name.count("/") > 1:
            raise FileNotFoundError("it looks like a path, but there is no such file or folder")
        if known and not known.hub:
            raise FileNotFoundError(known.hint)
        hub, _, configuration = (known.hub if known else name).partition(":")
        return datasets.load_dataset(hub, configuration or None, split=split, streaming=streaming)
    except (FileNotFoundError, ConnectionError) as error:
        reason = one_line(error)
        if known and known.hub:
            reason = f"{known.hub} cannot be had: {known.hint} ({reason})"
        raise FileNotFoundError(f"no data set {name!r}, neither here nor on the Hugging Face hub: {reason}") from None
    except (ValueError, LookupError, ArithmeticError, OSError, RuntimeError, DatasetsError) as error:
        if "corresponds to no data" in str(error):
            raise ValueError(f"split {split!r} of {name} is empty") from None
        raise ValueError(f"cannot load {name}: {one_line(error)}") from None


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:500]


# ------------------------------------------------------------------------------------------------- decoding


def decode(record: dict) -> Image.Image:
    """An undecoded record of a ``datasets`` image column to an upright RGB picture. Raises whatever PIL raises."""
    return to_rgb(datasets.Image().decode_example(record))


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL picture in RGB: 16 bits scaled to 8, transparency laid over white."""
    if image.mode.startswith("I") or image.mode == "F":  # more than 8 bits of grey
        values = np.asarray(image)
        sixteen = image.mode.startswith("I;16") or values.max() > 255
        top = 1 if image.mode == "F" and values.max() <= 1 else 65535 if sixteen else 255
        if image.mode == "F":
            values = values.clip(0, top) * np.float32(255 / top)
            return Image.fromarray(values.round(out=values).astype(np.uint8)).convert("RGB")
        table = (np.arange(top + 1) * (255 / top)).round().astype(np.uint8)  # in less memory than arithmetic takes
        return Image.fromarray(table[values.clip(0, top)]).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def object_of(mask: Image.Image | dict) -> Image.Image:
    """The value of a mask column as 255 on the object: where it exceeds 127, or, if nothing does, where it is not 0."""
    mask = datasets.Image().decode_example(mask) if isinstance(mask, dict) else mask
    values = np.asarray(mask if mask.mode in ("L", "P", "1") else mask.convert("L")).astype(int)
    return Image.fromarray(np.where(values > (127 if values.max() > 127 else 0), 255, 0).astype(np.uint8))


class ObjectShares:
    """How much of each cell of a grid over a whole picture its object covers, by a mask column of the data.

    ``missing`` lists the pictures whose mask could not be read. Raises ValueError if there is no such column.
    """

    def __init__(self, dataset: datasets.Dataset | datasets.IterableDataset, column: str):
        names = ", ".join(dataset.features or {})
        if not isinstance((dataset.features or {}).get(column), datasets.Image):
            raise ValueError(f"the data has no column {column!r} of mask pictures, but {names}")
        if isinstance(dataset, datasets.IterableDataset):
            raise ValueError("a stream has no index to find a mask by: drop --streaming")
        self.masks = dataset.select_columns([column]).cast_column(column, datasets.Image(decode=False))
        self.column, self.missing = column, []

    def shares(self, indices: np.ndarray, grid: tuple[int, int]) -> Tensor:
        """Shares (b, h, w) in 0 ... 1 of the object in the (h, w) cells of the pictures ``indices`` (b,)."""
        found = torch.zeros(len(indices), *grid)
        for row, index in enumerate(indices.tolist()):
            try:
                mask = object_of(self.masks[index][self.column])
            except Exception:  # whatever a decoder raises on a broken file
                self.missing.append(index)
                continue
            cells = mask.resize(grid[::-1], Image.Resampling.BOX)
            found[row] = torch.from_numpy(np.array(cells)) / 255
        return found


class BadImage(NamedTuple):
    """A picture that could not be decoded: its index in the data, and what is known of it."""

    index: int
    description: str


class NothingToRead(ValueError):
    """A process has no share of a stream."""


class TooManyBadImages(ValueError):
    """More pictures than allowed could not be decoded."""


def decode_or_next(dataset: datasets.Dataset, index: int, tries: int) -> tuple[Image.Image, int, list[BadImage]]:
    """Picture ``index``, or the next one that can be decoded; its label (0 if none); the bad ones passed over.

    After ``tries`` bad ones in a row it is a blank picture: then the caller has reason enough to stop.
    """
    bad = []
    for i in range(index, index + tries):
        i, record = i % len(dataset), {}
        try:
            record = dataset[i]
            return decode(record["image"]), record.get("label", 0), bad
        except Exception as error:  # a decoder raises anything on a broken file; whatever it is, it is reported
            bad.append(describe_bad(i, record.get("image"), error))
    return Image.new("RGB", (1, 1)), 0, bad


def describe_bad(index: int, record: dict | None, error: Exception) -> BadImage:
    name = (record or {}).get("path") or f"image {index}"
    reason = re.sub(r" <_io\.BytesIO object at \w+>", "", one_line(error))  # PIL's name for a file in memory
    return BadImage(index, f"{name}: {type(error).__name__}: {reason}")


# ------------------------------------------------------------------------------------------------- crops


def uniform(key: tuple[int, ...], indices: np.ndarray, count: int) -> np.ndarray:
    """``count`` random numbers for each index: (b, count) float32 in [0, 1), a function of key, index and column only.

    SplitMix64 (Steele, Lea & Flood, OOPSLA 2014) used as a hash, since NumPy has no generator with a key per row.
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
    """Boxes (b, 4), top, left, height, width, in pixels (int64) or shares of the picture; whether to flip them (b,)."""

    boxes: np.ndarray
    flips: np.ndarray


def random_crops(sizes: np.ndarray, noise: np.ndarray, scale: tuple[float, float] = (0.2, 1.0)) -> Crops:
    """Crops of pictures of ``sizes`` (b, 2), height and width: ``noise`` (b, 23) decides (RandomResizedCrop + flip).

    The area of a crop is uniform in ``scale`` (shares of the picture), its aspect ratio log-uniform in (3/4, 4/3);
    the first of ten draws that fits is taken, else the largest central crop of an allowed aspect ratio.
    """
    ratios = (3 / 4, 4 / 3)
    height, width = sizes[:, :1].astype(np.float64), sizes[:, 1:].astype(np.float64)
    area = height * width * (scale[0] + noise[:, :10] * (scale[1] - scale[0]))
    ratio = np.exp(math.log(ratios[0]) + noise[:, 10:20] * math.log(ratios[1] / ratios[0]))
    h, w = np.round(np.sqrt(area / ratio)), np.round(np.sqrt(area * ratio))  # (b, 10)
    fits = (h >= 1) & (w >= 1) & (h <= height) & (w <= width)
    first = fits.argmax(axis=1)[:, None]
    h, w = np.take_along_axis(h, first, 1), np.take_along_axis(w, first, 1)
    top, left = np.floor(noise[:, 20:21] * (height - h + 1)), np.floor(noise[:, 21:22] * (width - w + 1))

    central_h = np.round(np.minimum(height, width / ratios[0])).clip(1)
    central_w = np.round(np.minimum(width, height * ratios[1])).clip(1)
    central = [(height - central_h) // 2, (width - central_w) // 2, central_h, central_w]
    boxes = np.where(fits.any(axis=1, keepdims=True), np.hstack([top, left, h, w]), np.hstack(central))
    return Crops(boxes.astype(np.int64), noise[:, 22] < 0.5)


def crop(image: Image.Image, box: np.ndarray, flip: bool, size: int) -> Tensor:
    """Cut ``box`` out of the picture and resize it to a uint8 square (3, size, size)."""
    top, left, height, width = (int(x) for x in box)
    image = image.crop((left, top, left + width, top + height)).resize((size, size), Image.Resampling.BICUBIC)
    image = TF.pil_to_tensor(image)
    return image.flip(-1) if flip else image


def crop_batch(
    images: Tensor, boxes: Tensor, flips: Tensor, size: int | tuple[int, int], how: str = "inside"
) -> Tensor:
    """:func:`crop` for a batch (b, c, H, W) on its device: (b, c, *size) of the same type; ``size`` is a side or two.

    ``boxes`` (b, 4) may be fractional. The same antialiased bicubic filter as PIL's, as two matrix products. Like
    PIL's it sees nothing of the image outside the box ("inside"), or does ("beyond"). "area" takes means over areas.
    """
    top, left, height, width = boxes.float().unbind(1)
    size = (size, size) if isinstance(size, int) else size
    rows = _resize_weights(top, height, images.shape[-2], size[0], how)
    columns = _resize_weights(left, width, images.shape[-1], size[1], how)
    columns = torch.where(flips[:, None, None], columns.flip(1), columns)
    out = rows[:, None] @ images.float() @ columns.mT[:, None]
    return out if images.is_floating_point() else out.round().clamp(0, 255).to(images.dtype)


def _resize_weights(start: Tensor, length: Tensor, pixels: int, size: int, how: str) -> Tensor:
    """Weights (b, size, pixels) that resize [start, start + length) of ``pixels`` samples to ``size`` samples."""
    step = (length / size)[:, None, None]  # input pixels per output pixel
    position = torch.arange(pixels, device=start.device) + 0.5
    centre = start[:, None, None] + (torch.arange(size, device=start.device)[:, None] + 0.5) * step
    if how == "area":  # how far an output pixel and an input pixel overlap
        low, high = centre - step / 2, centre + step / 2
        weights = (torch.minimum(high, position + 0.5) - torch.maximum(low, position - 0.5)).clamp(min=0)
        return weights / weights.sum(-1, keepdim=True)
    t = (position - centre).abs() / step.clamp(min=1)  # (b, size, pixels), in widths of the filter
    near, far = (1.5 * t - 2.5) * t * t + 1, ((-0.5 * t + 2.5) * t - 4) * t + 2  # Keys' cubic, a = -1/2
    weights = torch.where(t < 1, near, torch.where(t < 2, far, 0))
    if how == "inside":
        half = length[:, None, None] / 2
        weights = weights * ((position - start[:, None, None] - half).abs() < half + 0.5)
    return weights / weights.sum(-1, keepdim=True)


def center_crop(image: Image.Image, size: int, short_side: int | None = None) -> Tensor:
    """Resize the short side (to ``size`` by default), cut out the centre: (3, size, size) uint8, for evaluation."""
    limit = 8 * min(image.size)  # a slip of 1 x 10,000 pixels would become enormous
    if max(image.size) > limit:
        image = TF.center_crop(image, [min(image.height, limit), min(image.width, limit)])
    image = TF.resize(image, short_side or size, InterpolationMode.BICUBIC)
    return TF.pil_to_tensor(TF.center_crop(image, size))


def sample_pictures(
    dataset: datasets.Dataset | datasets.IterableDataset, count: int, size: int, mask: str = "mask"
) -> tuple[Tensor, Tensor | None]:
    """Up to ``count`` centre-cropped pictures from all over the data (the first of a stream): (k, 3, size, size).

    And, if there is a column ``mask``, where their objects are: (k, size, size) bool. Raises ValueError if no picture
    can be decoded.
    """
    known = isinstance((dataset.features or {}).get(mask), datasets.Image)
    if isinstance(dataset, datasets.IterableDataset):
        records = iter(dataset.take(2 * count))
    else:
        dataset = dataset.select_columns(["image", mask] if known else ["image"])
        dataset = dataset.cast_column(mask, datasets.Image(decode=False)) if known else dataset  # some may be broken
        records = (dataset[int(i)] for i in np.linspace(0, len(dataset) - 1, min(2 * count, len(dataset))))
    images, objects = [], []
    for record in records:
        with contextlib.suppress(Exception):  # a broken picture; training counts and reports it
            images.append(center_crop(decode(record["image"]), size))
            objects.append(torch.zeros(size, size, dtype=torch.bool))
            if known:
                objects[-1] = center_crop(object_of(record[mask]), size)[0] > 127
    if not images:
        raise ValueError("not one of the first pictures tried can be decoded")
    chosen = np.linspace(0, len(images) - 1, min(count, len(images))).astype(int)
    images, objects = (torch.stack([tensors[i] for i in chosen]) for tensors in (images, objects))
    return images, objects if known else None


# ------------------------------------------------------------------------------------------------- batches


class Share(NamedTuple):
    """Which part of the work is this process's: ``rank`` of ``world`` processes."""

    rank: int = 0
    world: int = 1


class Batch(NamedTuple):
    """Crops (b, 3, H, W) uint8, the indices (b,) their randomness hangs on, bad pictures met, labels (b,).

    Indices and labels are int64 arrays. What comes in the place of a bad picture brings its own label. ``crops`` says
    where in the pictures they lie, the boxes float32 in shares of a picture's height and width.
    """

    images: Tensor
    indices: np.ndarray
    bad: list[BadImage]
    labels: np.ndarray
    crops: Crops


class CropOptions(NamedTuple):
    """How to crop: side in pixels, range of the share of the area, seed, bad pictures in a row to put up with.

    ``augment`` takes a crop (3, size, size) uint8 and gives another, drawing from torch's default generator.
    """

    size: int
    scale: tuple[float, float]
    seed: int
    tries: int
    augment: Callable[[Tensor], Tensor] | None = None

    def draw(self, sizes: np.ndarray, epoch: int | None, indices: np.ndarray) -> Crops:
        """Crops of pictures of ``sizes`` (b, 2); without an epoch, the whole pictures."""
        if epoch is None:
            return Crops(np.hstack([np.zeros_like(sizes), sizes]), np.zeros(len(sizes), bool))
        return random_crops(sizes, uniform((self.seed, epoch, CROPS), indices, 23), self.scale)

    def finish(self, images: Tensor, epoch: int, indices: np.ndarray) -> Tensor:
        """Augment each crop by its own random numbers."""
        if self.augment is None or epoch is None:
            return images
        augmented = []
        with torch.random.fork_rng(devices=[]):
            for image, noise in zip(images, uniform((self.seed, epoch, AUGMENT), indices, 1)):
                torch.default_generator.manual_seed(int(noise[0] * 2**24))
                augmented.append(self.augment(image))
        return torch.stack(augmented)


class Request(NamedTuple):
    """What to read: pictures ``indices`` (b,), cropped as in ``epoch`` (None: whole), to squares of ``size`` pixels."""

    epoch: int | None
    indices: np.ndarray
    size: int


def _shares(crops: Crops, sizes: np.ndarray) -> Crops:
    """Boxes in pixels of pictures of ``sizes`` (b, 2), in shares of their height and width."""
    return Crops((crops.boxes / np.tile(sizes, 2)).astype(np.float32), crops.flips)


class MapCrops(torch.utils.data.Dataset):
    """Decodes and crops (epoch, indices), in worker processes, anew every epoch."""

    def __init__(self, dataset: datasets.Dataset, options: CropOptions):
        self.dataset, self.options = dataset, options

    def __getitem__(self, request: Request) -> Batch:
        epoch, indices, size = request
        pictures, labels, bad = [], [], []
        for i in indices:
            picture, label, met = decode_or_next(self.dataset, int(i), max(1, self.options.tries - len(bad)))
            pictures.append(picture)
            labels.append(label)
            bad += met
        sizes = np.array([(picture.height, picture.width) for picture in pictures])
        crops = self.options.draw(sizes, epoch, indices)
        images = torch.stack([crop(picture, *how, size) for picture, *how in zip(pictures, *crops)])
        images = self.options.finish(images, epoch, indices)
        return Batch(images, indices, bad, np.array(labels), _shares(crops, sizes))


class PreloadedCrops:
    """Decodes once into one uint8 tensor (images, 3, side, side) on ``store``; crops whole batches on ``device``.

    Every picture is stored stretched to a square, crops are drawn in the original picture and undo the stretching.
    ``side`` keeps the short side of the pictures (the longest one among the first 100), up to twice that of a crop.
    """

    def __init__(self, dataset: datasets.Dataset, options: CropOptions, threads: int, store, device):
        self.options, self.device = options, device
        first = [decode_or_next(dataset, i, options.tries)[0] for i in range(min(100, len(dataset)))]
        side = min(max(min(picture.size) for picture in first), 2 * options.size)
        self.images = torch.empty(len(dataset), 3, side, side, dtype=torch.uint8)
        self.sizes, self.labels = np.empty((len(dataset), 2), np.int64), np.empty(len(dataset), np.int64)
        self.bad: list[BadImage] = []

        def keep(i: int):
            picture, self.labels[i], bad = decode_or_next(dataset, i, max(1, options.tries - len(self.bad)))
            self.sizes[i] = picture.height, picture.width
            self.images[i] = TF.pil_to_tensor(picture.resize((side, side), Image.Resampling.BICUBIC))
            self.bad += bad

        with ThreadPoolExecutor(max(threads, 1)) as pool:
            list(pool.map(keep, range(len(dataset))))
        self.images = self.images.to(store)

    def __getitem__(self, request: Request) -> Batch:
        epoch, indices, size = request
        where = _shares(self.options.draw(self.sizes[indices], epoch, indices), self.sizes[indices])
        boxes = to_device(where.boxes * np.float32(self.images.shape[-1]), self.device)
        flips = to_device(where.flips, self.device)
        images = self.images[to_device(indices, self.images.device)]
        images = to_device(images, self.device) if images.device.type == "cpu" else images
        crops = self.options.finish(crop_batch(images, boxes, flips, size), epoch, indices)
        return Batch(crops, indices, self.bad, self.labels[indices], where)


class StreamCrops(torch.utils.data.IterableDataset):
    """Endless crops of a stream, pass after pass, each shuffled anew; every process and worker reads its own share.

    A stream has no index, so here the order of the data does depend on the number of processes and workers; given
    these, it is a function of seed and ``epoch``. To go on in the middle of one, the stream is read again from its
    start: the first ``done`` batches of this process are not decoded (their places are taken by empty ones), but for
    pictures known to be ``bad`` records count as before. A worker whose share is empty gives None for ever; ``alone``
    reads as if there were no other process.
    """

    def __init__(self, dataset: datasets.IterableDataset, options: CropOptions, batch: int, share: Share):
        self.dataset, self.options, self.batch, self.share = dataset, options, batch, share
        self.epoch, self.done, self.bad, self.alone = 0, 0, set(), False

    def __iter__(self) -> Iterator[Batch | None]:
        place, stride = _seat(self.share)
        again = self.done // (stride // self.share.world) * self.batch  # good pictures of this worker, known before
        tensors, indices, labels, where, bad = [], [], [], [], []

        def whole() -> Batch:
            crops = Crops(*map(np.concatenate, zip(*where))) if where else Crops(np.empty((0, 4)), np.empty(0, bool))
            images = torch.stack(tensors) if tensors else torch.empty(0, 3, self.options.size, self.options.size)
            images = self.options.finish(images, self.epoch, np.array(indices)) if tensors else images
            return Batch(images, np.array(indices, np.int64), bad, np.array(labels), crops)

        for index, record in enumerate(self._records()):
            index = index * stride + place
            if again:
                again -= index not in self.bad
                if again % self.batch == 0 and index not in self.bad:
                    yield whole()
                continue
            try:
                if isinstance(record, Exception):
                    raise record
                picture = decode(record["image"])
            except Exception as error:
                bad.append(describe_bad(index, None if isinstance(record, Exception) else record["image"], error))
                different = len({what.description for what in bad[-self.options.tries :]})
                if different == self.options.tries or len(bad) == 100 * self.options.tries:  # reason enough to stop
                    tensors, where = [], []
                    yield whole()
                    return
                continue
            size = np.array([(picture.height, picture.width)])
            crops = self.options.draw(size, self.epoch, np.array([index]))
            tensors.append(crop(picture, crops.boxes[0], crops.flips[0], self.options.size))
            where.append(_shares(crops, size))
            indices.append(index)
            labels.append(record.get("label", 0))
            if len(tensors) == self.batch:
                yield whole()
                tensors, indices, labels, where, bad = [], [], [], [], []
        while True:
            yield None

    def _records(self) -> Iterator[dict | Exception]:
        """This worker's records, pass after pass; an exception where the stream breaks, after which it starts anew.

        Shards are dealt out anew in each pass: it ends only after 20 passes in which there was nothing for this worker.
        """
        empty, (place, _) = 0, _seat(self.share)
        for number in itertools.count():
            order = (self.options.seed, self.epoch, number)
            dataset, empty = self.dataset.shuffle(generator=np.random.default_rng(order), buffer_size=1), empty + 1
            dataset = dataset if self.alone else split_dataset_by_node(dataset, *self.share)
            for record in _shuffled(dataset, np.random.default_rng((*order, place))):
                empty = 0
                yield record
            if empty == 20:
                return


def _shuffled(records: Iterable, random: np.random.Generator, size: int = 1000) -> Iterator:
    """Records in random order, as far as a buffer goes; last, the exception that ended them early, if one did.

    The buffer of ``datasets`` would keep its content from us if a stream broke before it was full.
    """
    buffer, records, end = [], iter(records), []
    while True:
        try:
            record = next(records)
        except StopIteration:
            break
        except Exception as error:
            end = [error]
            break
        if len(buffer) < size:
            buffer.append(record)
        else:
            i = random.integers(size)
            yield buffer[i]
            buffer[i] = record
    yield from (buffer[i] for i in random.permutation(len(buffer)))
    yield from end


def _bear_a_signal(worker: int):
    """Whoever signals a whole process group wants a run to stop in order, for which it needs its workers a little.

    They go with the second SIGTERM; the main process, when it ends, sends as many as it takes.
    """
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, lambda *_: os._exit(0)))


class TrainBatches:
    """Shuffled, cropped batches of a data set: ``for batch in batches.epoch(e)``, epochs counted from 1.

    To go on in the middle of an epoch, of which some pictures are ``seen``: ``batches.epoch(e, seen)``. Every step
    takes ``batch_size`` pictures, divided over the processes and then into ``accumulate`` micro-batches; one item is
    this process's part of one micro-batch, a :class:`Batch` with the crops on the device. The last pictures of an
    epoch's permutation that do not fill a step are left out. ``labels`` reads the labels too. ``preload`` ("host",
    "device" or None) names where decoded pictures are kept. For a stream, ``length`` is the number of pictures that
    make an epoch (default: what its description says). ``augment``: see CropOptions.

    ``bad`` names the pictures met so far that cannot be decoded, by index (of a stream: in this epoch), and ``told``
    is how many of them have been; more than the share ``max_bad`` raise TooManyBadImages, at once or, with several
    processes, when they are added up by :meth:`check_bad`. Raises ValueError if a step does not divide evenly or asks
    for more pictures than there are.
    """

    def __init__(
        self,
        dataset: datasets.Dataset | datasets.IterableDataset,
        size: int,
        batch_size: int,
        *,
        scale: tuple[float, float] = (0.2, 1.0),
        accumulate: int = 1,
        seed: int = 0,
        workers: int = 0,
        preload: str | None = None,
        device: torch.device | str = "cpu",
        share: Share = Share(),  # noqa: B008
        length: int | None = None,
        max_bad: float = 0.01,
        labels: bool = False,
        augment: Callable[[Tensor], Tensor] | None = None,
    ):
        streaming = isinstance(dataset, datasets.IterableDataset)
        self.length = length_of(dataset, length)
        self.batch_size, self.accumulate, self.seed, self.share = batch_size, accumulate, seed, share
        self.device, self.max_bad, self.bad, self.told = torch.device(device), max_bad, {}, 0
        if batch_size % (share.world * accumulate):
            raise ValueError(
                f"the batch size ({batch_size}) must be a multiple of processes x accumulation steps "
                f"({share.world} x {accumulate})"
            )
        if not self.length:
            raise ValueError("a stream of unknown length: say with --max-images how many images make an epoch")
        if self.length < batch_size:
            raise ValueError(f"a batch takes {batch_size} images, there are only {self.length}: lower --batch-size")
        if streaming and preload:
            raise ValueError("streamed data cannot be preloaded: drop --streaming or --preload")

        dataset = dataset.select_columns(["image", "label"] if labels else ["image"])
        options = CropOptions(size, scale, seed, int(max_bad * self.length) + 1, augment)
        pin = self.device.type == "cuda"
        loader = dict(batch_size=None, num_workers=workers, pin_memory=pin)
        loader["generator"] = torch.Generator()  # or every epoch, and every resumption, would draw from the global one
        loader["worker_init_fn"] = _bear_a_signal
        if streaming:  # its workers start anew in each epoch
            self.crops = StreamCrops(dataset, options, batch_size // (share.world * accumulate), share)
            self.loader = torch.utils.data.DataLoader(self.crops, **loader)
        elif preload:
            self.crops = PreloadedCrops(dataset, options, workers, "cpu" if preload == "host" else device, self.device)
            self.bad.update(self.crops.bad)
            self.check_bad()
        else:
            self.crops, self.order = MapCrops(dataset, options), []
            loader["persistent_workers"] = workers > 0
            self.loader = torch.utils.data.DataLoader(self.crops, sampler=self.order, **loader)

    @property
    def steps_per_epoch(self) -> int:
        return self.length // self.batch_size

    def steps_left(self, seen: int) -> int:
        """Steps of an epoch of which some pictures are ``seen``."""
        return (self.length - seen) // self.batch_size

    def epoch(self, epoch: int, seen: int = 0) -> Iterator[Batch]:
        """This process's micro-batches of what is left of an epoch: steps_left(seen) * accumulate of them."""
        if isinstance(self.crops, StreamCrops):
            return self._deliver(self._stream(epoch, seen))
        return self._read(self.requests(epoch, seen))

    def whole(self, count: int | None = None, size: int | None = None) -> Iterator[Batch]:
        """This process's share of all pictures (or the first ``count``), each whole and squeezed to a square.

        Batch by batch as :meth:`whole_indices` has them, the empty ones left out; ``size`` is the side of the squares
        (default: that of the crops). Raises ValueError for a stream, whose pictures have no index to tell them apart.
        """
        if isinstance(self.crops, StreamCrops):
            raise ValueError("a stream has no index to keep something for each picture by")
        size = size or self.crops.options.size
        return self._read([Request(None, indices, size) for indices in self.whole_indices(count) if len(indices)])

    def whole_indices(self, count: int | None = None) -> list[np.ndarray]:
        """The indices of all pictures (or the first ``count``), in batches of ``whole_size`` at most.

        Process r of w gets pictures r, r + w, r + 2w, ..., and as many batches as the others: the last may be empty.
        """
        count = min(count or self.length, self.length)
        mine = np.arange(self.share.rank, count, self.share.world)
        largest = -(-count // self.share.world)  # of the shares
        return [mine[i : i + self.whole_size] for i in range(0, largest, self.whole_size)]

    @property
    def whole_size(self) -> int:
        return self.batch_size // self.share.world // self.accumulate

    def _read(self, requests: list[Request]) -> Iterator[Batch]:
        if isinstance(self.crops, PreloadedCrops):
            return self._deliver(map(self.crops.__getitem__, requests))
        self.order[:] = requests  # what the loader goes through
        return self._deliver(self.loader)

    def _stream(self, epoch: int, seen: int) -> Iterator[Batch]:
        """What is left of an epoch of a stream."""
        if not seen:
            self.bad.clear()  # this pass meets the same ones under other indices
            self.told = 0
        done, wanted = seen * self.accumulate // self.batch_size, self.steps_left(seen) * self.accumulate
        self.crops.epoch, self.crops.done, self.crops.bad = epoch, done, set(self.bad)
        for self.crops.alone in (False, True):  # a process without a share of the shards reads those of others
            idle = 0
            for batch in self.loader if wanted else ():
                idle = idle + 1 if batch is None else 0
                if idle > self.loader.num_workers:
                    break
                if batch is not None and done:
                    done -= 1
                elif batch is not None:
                    yield batch
                    wanted -= 1
                if not wanted:
                    return
        if wanted:
            raise NothingToRead(f"process {self.share.rank} of {self.share.world} has nothing to read in the stream")

    def _deliver(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        for batch in batches:
            self.bad.update(batch.bad)
            if self.share.world == 1 or not len(batch.images):  # several processes stop together: see check_bad
                self.check_bad()
            yield batch._replace(images=batch.images.to(self.device, non_blocking=True))

    def requests(self, epoch: int, seen: int = 0) -> list[Request]:
        """What this process reads in the rest of an epoch: a request for every micro-batch."""
        order, steps = np.random.default_rng((self.seed, epoch)).permutation(self.length), self.steps_left(seen)
        rows = rearrange(
            order[seen : seen + steps * self.batch_size],
            "(step micro rank b) -> rank (step micro) b",
            step=steps,
            micro=self.accumulate,
            rank=self.share.world,
        )
        return [Request(epoch, indices, self.crops.options.size) for indices in rows[self.share.rank]]

    def bad_count(self) -> int:
        """How many bad pictures were met; a stream may bring the same file again, under another index."""
        return len(set(self.bad.values()) if isinstance(self.crops, StreamCrops) else self.bad)

    def news(self) -> list[str]:
        """The bad pictures not told of before."""
        met, (told, self.told) = list(self.bad.values()), (self.told, len(self.bad))
        return [description for description in dict.fromkeys(met[told:]) if description not in met[:told]]

    def close(self):
        """End the worker processes, which outlive a signal; nothing can be read any more."""
        self.loader = None

    def check_bad(self, met_elsewhere: Iterable[BadImage] = ()):
        """Raise TooManyBadImages if too many bad pictures were met, here and by the other processes."""
        self.bad.update(met_elsewhere)
        if self.bad_count() > self.max_bad * self.length:
            names = "".join(f"\n  {description}" for description in itertools.islice(self.bad.values(), 20))
            count = f"{self.bad_count()} of {self.length} images"
            raise TooManyBadImages(f"{count} are broken, more than --max-bad-images {self.max_bad}:{names}")


class EvalBatch(NamedTuple):
    """Centre crops (b, 3, H, W) uint8, indices and labels (b,) int64 (label -1: none), file names, and bad pictures.

    ``bad`` holds, for each picture, what is wrong with it, or None; a picture that cannot be decoded is blank.
    """

    images: Tensor
    indices: Tensor
    labels: Tensor
    names: list[str]
    bad: list[BadImage | None]


class EvalBatches:
    """Every picture of a data set once, centre-cropped, in order: an iterable of :class:`EvalBatch`.

    The pictures are shared out among the processes. ``crop_ratio`` is the side of the crop as a share of the short
    side of the picture. ``keep`` keeps the crops in memory. ``length``: the pictures of all processes, if known.
    """

    def __init__(
        self,
        dataset: datasets.Dataset | datasets.IterableDataset,
        size: int,
        batch_size: int,
        *,
        crop_ratio: float = 0.875,
        workers: int = 0,
        device: torch.device | str = "cpu",
        share: Share = Share(),  # noqa: B008
        keep: bool = False,
    ):
        self.device, self.kept, self.length = torch.device(device), [] if keep else None, None
        dataset = dataset.select_columns(
            [name for name in ("image", "label") if name in (dataset.features or ["image"])]
        )
        loader = dict(batch_size=batch_size, num_workers=workers, pin_memory=self.device.type == "cuda")
        crops = EvalCrops(dataset, size, round(size / crop_ratio))
        if isinstance(dataset, datasets.IterableDataset):
            crops = EvalStream(crops, share)
        else:
            self.length, loader["sampler"] = len(dataset), range(share.rank, len(dataset), share.world)
        self.loader = torch.utils.data.DataLoader(crops, collate_fn=_collate, **loader)

    def __iter__(self) -> Iterator[EvalBatch]:
        if self.kept is not None and not self.kept:
            self.kept = [batch._replace(images=batch.images.clone()) for batch in self.loader]  # not in shared memory
        for batch in self.kept or self.loader:
            yield batch._replace(images=batch.images.to(self.device, non_blocking=True))


class EvalCrops(torch.utils.data.Dataset):
    """Centre crops of the pictures of a data set, in worker processes: what an EvalBatch holds, one by one."""

    def __init__(self, dataset: datasets.Dataset | datasets.IterableDataset, size: int, short_side: int):
        self.dataset, self.size, self.short_side = dataset, size, short_side

    def __getitem__(self, index: int) -> tuple:
        return self.prepare(index, self.dataset[index])

    def prepare(self, index: int, record: dict) -> tuple:
        image, bad = torch.zeros(3, self.size, self.size, dtype=torch.uint8), None
        try:
            image = center_crop(decode(record["image"]), self.size, self.short_side)
        except Exception as error:
            bad = describe_bad(index, record["image"], error)
        label, path = record.get("label"), (record["image"] or {}).get("path")
        return image, index, -1 if label is None else label, path or f"image {index}", bad


class EvalStream(torch.utils.data.IterableDataset):
    """The same for a stream. Its shards are divided, so that indices tell pictures apart, but not their place."""

    def __init__(self, crops: EvalCrops, share: Share):
        crops.dataset = split_dataset_by_node(crops.dataset, share.rank, share.world)
        self.crops, self.share = crops, share

    def __iter__(self) -> Iterator[tuple]:
        place, stride = _seat(self.share)
        for number, record in enumerate(self.crops.dataset):
            yield self.crops.prepare(number * stride + place, record)


def _collate(pictures: list[tuple]) -> EvalBatch:
    images, indices, labels, names, bad = zip(*pictures)
    return EvalBatch(torch.stack(images), torch.tensor(indices), torch.tensor(labels), list(names), list(bad))


def _seat(share: Share) -> tuple[int, int]:
    """Which of all worker processes of all processes this is, and how many there are."""
    worker = torch.utils.data.get_worker_info()
    workers, number = (worker.num_workers, worker.id) if worker else (1, 0)
    return share.rank + share.world * number, share.world * workers


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ------------------------------------------------------------------------------------------------- demo data

SHAPE_NAMES = [
    "disc",
    "square",
    "triangle",
    "star",
    "ring",
    "cross",
    "crescent",
    "heart",
    "half-disc",
    "bar",
    "arrow",
    "dumbbell",
]


def load_shapes(split: str = "train", size: int = 64, easy: bool = False) -> datasets.Dataset:
    """The demo data: one of 12 textured shapes on a textured background; 4,000 pictures in "train", 1,000 in "test".

    Columns: ``image``; ``label``, the shape; ``mask``, 255 on the object; ``bbox``, its [x, y, width, height] in
    pixels. Colours, textures, place (anywhere), angle and area (5-50 % of the picture) are drawn without regard to
    the label; of ``easy`` ones, made for learning something in minutes, the angle is 0, and textures are a quarter as
    strong. Drawn once, then cached by ``datasets``. Raises ValueError for another split.
    """
    counts = {"train": 4000, "test": 1000}
    if split not in counts:
        raise ValueError(f"Unknown split {split!r}; there are {list(counts)}")
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=SHAPE_NAMES), mask=datasets.Image(),
        bbox=datasets.List(datasets.Value("float32"), length=4),
    )  # fmt: skip
    drawing = "".join(
        map(inspect.getsource, (draw_shapes, _place, _inside, _texture))
    )  # another drawing, another cache
    how = dict(split=split, count=counts[split], size=size, easy=easy)
    how["drawing"] = hashlib.sha256(drawing.encode()).hexdigest()
    return datasets.Dataset.from_generator(draw_shapes, features, gen_kwargs=how, split=datasets.NamedSplit(split))


def draw_shapes(split: str, count: int, size: int, easy: bool = False, drawing: str = "") -> Iterator[dict]:
    for i in range(count):
        rng = np.random.default_rng((["train", "test"].index(split), i))
        label = i % len(SHAPE_NAMES)
        mask = _place(rng, SHAPE_NAMES[label], size, upright=easy)
        colours = rng.uniform(0, 255, (4, 3))
        while np.linalg.norm(colours[:2].mean(0) - colours[2:].mean(0)) < 90:  # the object must stand out somewhat
            colours = rng.uniform(0, 255, (4, 3))
        if easy:
            pairs = colours.reshape(2, 2, 3)
            colours = (pairs / 4 + pairs.mean(1, keepdims=True) * 3 / 4).reshape(4, 3)
        ground, object_ = (_texture(rng, size, *pair) for pair in (colours[:2], colours[2:]))
        cover = mask.reshape(size, 2, size, 2).mean((1, 3))  # drawn at twice the size, for smooth edges
        pixels = ground + cover[..., None] * (object_ - ground) + rng.normal(0, 6, ground.shape)
        rows, columns = np.nonzero(cover > 0.5)
        x, y = columns.min(), rows.min()
        yield {
            "image": Image.fromarray(pixels.clip(0, 255).astype(np.uint8)),
            "label": label,
            "mask": Image.fromarray(np.where(cover > 0.5, 255, 0).astype(np.uint8)),
            "bbox": [x, y, columns.max() + 1 - x, rows.max() + 1 - y],
        }


def _place(rng: np.random.Generator, name: str, size: int, upright: bool) -> np.ndarray:
    """The shape at a random angle (unless ``upright``), area and place: (2 * size, 2 * size) bool."""
    angle, area = (0 if upright else 2 * math.pi) * rng.random(), rng.uniform(0.07, 0.3) * size * size
    side = (np.arange(2 * size) + 0.5) / 2  # in pixels of the picture
    unit = np.linspace(-1, 1, 64)
    inside = _inside(name, unit[None, :], unit[:, None])
    radius = min(math.sqrt(area / (4 * inside.mean())), 0.49 * size)  # of a shape that fills [-1, 1] x [-1, 1]
    y, x = rng.uniform(radius, size - radius, 2)
    u, v = (side[None, :] - x) / radius, (side[:, None] - y) / radius
    return _inside(name, u * math.cos(angle) + v * math.sin(angle), v * math.cos(angle) - u * math.sin(angle))


def _inside(name: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Whether points (u, v) lie in the shape, which fits the unit disc."""
    r, angle = np.hypot(u, v), np.arctan2(v, u)

    def polygon(corners: int) -> np.ndarray:
        sector = math.pi / corners
        return r * np.cos((angle % (2 * sector)) - sector) < math.cos(sector)

    if name == "disc":
        return r < 1
    if name == "square":
        return polygon(4)
    if name == "triangle":
        return polygon(3)
    if name == "star":
        fold = np.abs((angle % (2 * math.pi / 5)) - math.pi / 5) / (math.pi / 5)  # 1 at a tip, 0 between two
        return r < 0.45 / (1 - 0.55 * fold)
    if name == "ring":
        return (r < 1) & (r > 0.6)
    if name == "cross":
        return (np.minimum(np.abs(u), np.abs(v)) < 0.3) & (np.maximum(np.abs(u), np.abs(v)) < 0.95)
    if name == "crescent":
        return (r < 1) & (np.hypot(u - 0.55, v) > 0.75)
    if name == "heart":
        x, y = 1.2 * u, 1.2 * v + 0.1
        return (x * x + y * y - 0.8) ** 3 < 1.6 * x * x * y**3
    if name == "half-disc":
        return (r < 1) & (u > 0)
    if name == "bar":
        return (np.abs(u) < 0.95) & (np.abs(v) < 0.3)
    if name == "arrow":
        return ((np.abs(v) < 0.2) & (np.abs(u + 0.3) < 0.6)) | ((u > 0.1) & (u + np.abs(v) < 0.95) & (np.abs(v) < 0.75))
    return (np.hypot(np.abs(u) - 0.6, v) < 0.4) | ((np.abs(v) < 0.14) & (np.abs(u) < 0.6))  # dumbbell


def _texture(rng: np.random.Generator, size: int, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """A random texture between two colours (3,): (size, size, 3)."""
    y, x = np.mgrid[:size, :size] / size
    angle, frequency, phase = rng.uniform(0, math.pi), rng.uniform(2, 9), rng.uniform(0, 2 * math.pi, 2)
    u, v = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    wave = np.sin(2 * math.pi * frequency * u + phase[0])
    kind = rng.integers(5)
    if kind == 0:  # stripes
        t = wave
    elif kind == 1:  # checks
        t = np.sign(wave * np.sin(2 * math.pi * frequency * v + phase[1]))
    elif kind == 2:  # wavy stripes
        t = np.sin(2 * math.pi * frequency * u + 3 * np.sin(2 * math.pi * 2 * v + phase[1]))
    elif kind == 3:  # clouds
        coarse = rng.normal(size=(9, 9)).astype(np.float32)
        t = np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC))
    else:  # a gradient
        t = 2 * u - 1
    return first + (second - first) * ((t + 1) / 2).clip(0, 1)[..., None]
