"""Load data sets by name or path; decode, crop and normalise their pictures.

Pictures are upright, RGB unless a PixelFormat says otherwise, as PIL images or uint8 tensors.
:func:`normalize` turns them into floats on the device.

Letters in shapes: ``b`` batch, ``H``/``W`` image height/width in pixels, ``h``/``w`` cells of a
grid.
"""

import collections
import contextlib
import functools
import glob
import hashlib
import io
import itertools
import math
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from datasets.exceptions import DatasetsError
from PIL import Image
from torch import Tensor

import folders
import pixels
import shapes
from folders import Dataset, say_once
from pixels import RGB, Picture, PixelFormat, Size, center_crop, pair  # noqa: F401

MEAN = (0.485, 0.456, 0.406)  # of ImageNet, as in MAE
STD = (0.229, 0.224, 0.225)
FILES = {  # single files, and the loader of datasets that reads them
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".tar": "webdataset",
    ".csv": "csv",
    ".jsonl": "json",
    ".json": "json",
    ".zip": "imagefolder",
}
IMAGE_COLUMNS = ("image", "img", "jpg", "png")  # preferred, where several columns hold images
NAME_COLUMNS = ("image", "file_name", "filename", "image_path", "path", "file")  # of pictures, in text tables
TEXT_TABLES = (".csv", ".json", ".jsonl")
DEMO = ("shapes", "shapes:easy")
ENCODED_TYPES = {"binary", "large_binary", "string", "large_string"}  # for pictures or their paths


class Source(NamedTuple):
    """A data set known by name.

    ``hub``: its id on the Hugging Face hub, or None. ``image``, ``label``: columns. ``test``: the
    test split. ``hint``: advice if it cannot be loaded.
    """

    hub: str | None
    image: str
    label: str
    test: str
    hint: str = "is this machine online?"


DATASETS = {  # those of the paper; add your own rows
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
        "it is not on the hub: download train_val2019.tar.gz, train2019.json and val2019.json (see "
        "github.com/visipedia/inat_comp/tree/master/2019), sort the pictures into train/CLASS and "
        "val/CLASS folders by these lists, and pass that folder to --dataset",
    ),
    "cifar10": Source("uoft-cs/cifar10", "img", "label", "test"),
    "cifar100": Source("uoft-cs/cifar100", "img", "fine_label", "test"),
    "cub200": Source("bentrevett/caltech-ucsd-birds-200-2011", "image", "label", "test"),
}

# --------------------------------------------------------------------------------- loading


def load_images(
    name_or_path: str,
    split: str = "train",
    image_column: str | None = None,
    label_column: str | None = None,
    streaming: bool = False,
    max_images: int | None = None,
    spread: bool = False,
) -> Dataset:
    """Load a data set of images, with columns ``image`` (undecoded) and, if known, ``label``.

    Other columns stay as they are; in a stream, all of them stay undecoded.

    ``name_or_path``: ``shapes`` or ``shapes:easy`` (the demo data), a folder of images (with or
    without class folders; ``split`` may be a folder in it), a parquet file or a folder of them, a
    WebDataset, a folder written by ``save_to_disk``, one of :data:`DATASETS`, or a Hugging Face hub
    name, ``name`` or ``name:configuration``. The columns are found by their type unless named;
    ``label_column=""`` asks for no label.

    ``max_images`` takes the first ones, or with ``spread`` as many from all over the data, which may
    be sorted by class.

    Raises FileNotFoundError if the data cannot be found, ValueError if the split or an image column
    is missing, or the split is empty.
    """
    # open, then find and rename the columns
    known = _known_source(name_or_path)
    if known:
        image_column = image_column or known.image
        label_column = label_column or known.label
    text_table = Path(name_or_path).suffix.lower() in TEXT_TABLES and Path(name_or_path).expanduser().is_file()
    dataset = _open(name_or_path, split, streaming and not text_table, known)
    features = dataset.features or dict.fromkeys(next(iter(dataset), {}))
    if text_table and image_column is None:
        image_column = next((name for name in NAME_COLUMNS if name in features), None)
    image_column = _find_image_column(name_or_path, features, image_column)
    label_column = _find_label_column(name_or_path, features, label_column)
    dataset = _rename_columns(dataset, features, image_column, label_column)
    if text_table:
        dataset = _absolute_paths(dataset, folder=Path(name_or_path).expanduser().parent)
        dataset = _as_stream(dataset) if streaming else dataset

    # refuse empty splits, then shorten
    first = next(iter(dataset), None) if streaming else len(dataset) or None
    if first is None:
        raise ValueError(f"split {split!r} of {name_or_path} is empty")
    if max_images is None:
        return dataset
    if max_images < 1:
        raise ValueError(f"--max-images must be positive, got {max_images}")
    if streaming:
        return dataset.take(max_images)
    chosen = evenly_spaced(len(dataset), max_images) if spread else range(min(max_images, len(dataset)))
    return dataset.select(chosen)


def load_test_images(name_or_path: str, split: str | None, *options) -> Dataset:
    """Load the images to test on: ``split``, or the first of validation, val and test that exists.

    ``options`` are those of :func:`load_images`. Raises ValueError if no such split exists.
    """
    known = _known_source(name_or_path)
    if split or known:
        return load_images(name_or_path, split or known.test, *options)
    for split in ("validation", "val", "test"):
        try:
            return load_images(name_or_path, split, *options)
        except ValueError as error:
            if not re.search("(?i)(unknown|bad) split|is empty", str(error)):
                raise
    advice = "name its test split (eval.py --test-split)"
    if Path(name_or_path).expanduser().is_file():
        advice = "name the folder of two files instead, such as train.parquet and test.parquet"
    raise ValueError(f"{name_or_path} has no split validation, val or test: {advice}")


def fingerprint(dataset: Dataset, count: int = 16) -> list[str]:
    """Hashes of ``count`` encoded pictures, evenly spaced (in a stream: the first ones).

    They identify the data set. The hash of a picture that cannot be read is "".
    """
    if isinstance(dataset, datasets.IterableDataset):
        records = dataset.take(count)
    else:
        records = dataset.select(evenly_spaced(len(dataset), count))
    hashes = []
    for record in records.select_columns(["image"]):
        try:
            picture = record["image"]
            if isinstance(picture, dict):
                encoded = picture["bytes"] or Path(picture["path"]).read_bytes()
            else:
                encoded = np.ascontiguousarray(picture).tobytes()
            hashes.append(hashlib.sha256(encoded).hexdigest()[:16])
        except Exception:  # a broken or missing picture
            hashes.append("")
    return hashes


def are_same(one: Dataset, other: Dataset) -> bool:
    """Whether two data sets are the same split, by its name, its length and a sample. No if they cannot be read."""
    names = [folders.split_kind(str(dataset.split)) or str(dataset.split) for dataset in (one, other)]
    if one.split is None or names[0] != names[1] or length_of(one) != length_of(other):
        return False
    hashes = fingerprint(one)
    return any(hashes) and hashes == fingerprint(other)


def hub_id(name_or_path: str) -> str | None:
    """The id of a data set on the Hugging Face hub; None if it is not from there."""
    known = _known_source(name_or_path)
    if known or Path(name_or_path).expanduser().exists() or name_or_path in DEMO:
        return known.hub if known else None
    return name_or_path.partition(":")[0]


def length_of(dataset: Dataset, limit: int | None = None) -> int | None:
    """The number of pictures; of a stream: ``limit``, or the number it declares, or None."""
    if isinstance(dataset, datasets.Dataset):
        return len(dataset)
    if limit:
        return limit
    splits = dataset.info.splits or {}
    return splits[str(dataset.split)].num_examples if str(dataset.split) in splits else None


def evenly_spaced(length: int, count: int) -> np.ndarray:
    """Up to ``count`` indices of ``length`` items, from the first to the last."""
    return np.linspace(0, length - 1, min(count, length)).astype(int)


def _known_source(name: str) -> Source | None:
    """The entry of DATASETS, or None; an existing path of that name takes precedence."""
    return None if Path(name).exists() else DATASETS.get(name)


def _find_image_column(name: str, features: dict, column: str | None) -> str:
    images = [key for key, feature in features.items() if _holds_images(feature)]
    images += [key for key in IMAGE_COLUMNS if _is_bytes(features.get(key))]  # pictures by their name alone
    column = column or next((key for key in IMAGE_COLUMNS if key in images), None)
    if column is None and len(images) == 1:
        column = images[0]
    if column not in features:
        found = f"no column {column!r}" if column else f"{len(images)} image columns"
        columns = ", ".join(features)
        raise ValueError(f"{name} has {found}: name the right one with --image-column: {columns}")
    feature = features[column]
    encoded = getattr(feature, "dtype", None) in ENCODED_TYPES
    if not (feature is None or _holds_images(feature) or encoded):
        raise ValueError(f"column {column!r} of {name} holds {feature}, not images")
    return column


def _holds_images(feature) -> bool:
    """Whether a feature is that of images, or of their bytes as ``datasets`` stores them."""
    if isinstance(feature, dict):
        return _is_bytes(feature.get("bytes")) and feature.keys() <= {"bytes", "path"}
    return isinstance(feature, (datasets.Image, datasets.Array2D, datasets.Array3D))


def _is_bytes(feature) -> bool:
    return getattr(feature, "dtype", None) in ("binary", "large_binary")


def _find_label_column(name: str, features: dict, column: str | None) -> str | None:
    if column is None:
        labels = [key for key, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
        column = "label" if "label" in features else next(iter(labels), None)
    if column and column not in features:
        columns = ", ".join(features)
        raise ValueError(f"{name} has no column {column!r}: name the right one with --label-column: {columns}")
    return column


def _rename_columns(dataset: Dataset, features: dict, image_column: str, label_column: str | None) -> Dataset:
    """Rename the columns to ``image`` and ``label``; drop others of these names; decode nothing."""
    names = {image_column: "image"}
    if label_column:
        names |= {label_column: "label"}
    names = {old: new for old, new in names.items() if old != new}
    replaced = [new for new in names.values() if new in features]
    if isinstance(dataset, datasets.IterableDataset):
        dataset = dataset.decode(False)  # before renaming, which decodes a stream
    if replaced:
        dataset = dataset.remove_columns(replaced)
    for column, feature in features.items():
        if column != image_column and isinstance(feature, dict) and _holds_images(feature):  # masks, perhaps
            dataset = dataset.cast_column(column, datasets.Image())
    dataset = dataset.rename_columns(names)
    if isinstance(features[image_column], (datasets.Array2D, datasets.Array3D)):
        return dataset
    return dataset.cast_column("image", datasets.Image(decode=False))


def _absolute_paths(dataset: datasets.Dataset, folder: Path) -> datasets.Dataset:
    """Let the names of pictures in a text table start in its folder."""
    records = dataset.data.column("image").to_pylist()
    names = [(record or {}).get("path") for record in records]
    names = [name if not name or "://" in name else str(folder / name) for name in names]
    images = [dict(bytes=None, path=name) if name else record for name, record in zip(names, records)]
    images = datasets.Dataset.from_dict(dict(image=images), datasets.Features(image=datasets.Image(decode=False)))
    return datasets.concatenate_datasets([dataset.remove_columns("image"), images], axis=1)


# --------------------------------------------------------------------------------- opening


def _open(name: str, split: str, streaming: bool, known: Source | None) -> Dataset:
    """Open the data set with ``datasets``. Raises FileNotFoundError or ValueError, in one line."""
    if name in DEMO:
        dataset = shapes.load_shapes(split, easy=name == "shapes:easy")
        return _as_stream(dataset) if streaming else dataset
    try:
        path = Path(os.path.expanduser(name))
        if path.is_file():
            return _open_file(path, split, streaming)
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            return _open_saved(path, split, streaming)
        if path.is_dir():
            return _open_folder(path, split, streaming)
        return _open_hub(name, split, streaming, known)
    except (FileNotFoundError, ConnectionError) as error:
        reason = root_cause(error)
        if path.exists():  # something else is missing, such as a cache that can be written
            raise FileNotFoundError(f"cannot load {name}: {reason}") from None
        if known and known.hub:
            reason = f"cannot download {known.hub}: {known.hint} ({reason})"
        raise FileNotFoundError(
            f"cannot find data set {name!r}, neither here nor on the Hugging Face hub: {reason}"
        ) from None
    except (ValueError, LookupError, ArithmeticError, OSError, RuntimeError, DatasetsError) as error:
        if "corresponds to no data" in str(error):
            raise ValueError(f"split {split!r} of {name} is empty") from None
        raise ValueError(f"cannot load {name}: {root_cause(error)}") from None


def _open_file(path: Path, split: str, streaming: bool) -> Dataset:
    """Open a table or an archive in a single file."""
    if split != "train":
        raise ValueError(f"Unknown split {split!r}: a single file has only 'train'")
    suffix = path.suffix.lower()
    if suffix in folders.image_suffixes():
        raise ValueError("it is a single picture: name the folder that it lies in")
    if suffix not in FILES:
        raise ValueError(f"a file of this kind cannot be read: expected {', '.join(FILES)}, or a folder")
    files = {split: glob.escape(str(path))}  # a name, not a pattern
    how = dict(drop_labels=True) if suffix == ".zip" else {}  # datasets 5.2 takes its own folder for a class
    return datasets.load_dataset(FILES[suffix], data_files=files, split=split, streaming=streaming, **how)


def _open_saved(path: Path, split: str, streaming: bool) -> Dataset:
    """Open a folder written by ``save_to_disk``."""
    dataset = datasets.load_from_disk(str(path))
    if isinstance(dataset, datasets.DatasetDict):
        if split not in dataset:
            raise ValueError(f"Unknown split {split!r}: expected one of {list(dataset)}")
        dataset = dataset[split]
    elif split != "train":
        raise ValueError(f"Unknown split {split!r}: a single data set has only 'train'")
    return _as_stream(dataset) if streaming else dataset


def _as_stream(dataset: datasets.Dataset) -> datasets.IterableDataset:
    """The stream of a data set, in a fixed random order: a table may be sorted by class."""
    dataset = dataset.shuffle(seed=0)
    return dataset.to_iterable_dataset(num_shards=max(1, min(folders.STREAM_SHARDS, len(dataset))))


def _open_folder(path: Path, split: str, streaming: bool) -> Dataset:
    """Open a folder of images, or of tables, whichever it has more of."""
    listing = folders.list_files(path)
    if not listing.images and not listing.tables:
        suffixes = ", ".join(kind for kind in listing.left_out if kind.startswith(".")) or "no files"
        raise FileNotFoundError(f"{path} holds neither images nor parquet, arrow or tar files, but {suffixes}")
    if len(listing.tables) >= len(listing.images):
        if listing.images:
            say_once(f"{path}: read {len(listing.tables)} tables; left out: {len(listing.images)} pictures")
        return _open_tables(path, listing.tables, split, streaming)
    dataset, listing = folders.open_images(path, split, streaming, listing)
    if left_out := folders.describe_left_out(listing):
        say_once(f"{path}: {len(listing.images)} pictures; left out: {left_out}")
    return dataset


def _open_tables(path: Path, tables: list[str], split: str, streaming: bool) -> Dataset:
    """Open a folder of parquet or arrow files or tar archives, whose splits ``datasets`` finds."""
    how = dict(split=split, streaming=streaming)
    broken = [file for file in tables if file.endswith(".tar") and not tarfile.is_tarfile(path / file)]
    tables = [file for file in tables if file not in broken]
    if not tables:
        raise ValueError(f"{path / broken[0]} is not a tar archive: perhaps its download failed")
    if broken:
        say_once(f"{path}: left out what is not a tar archive: {', '.join(broken[:5])}")
    elif glob.escape(str(path)) == str(path):  # datasets would take other paths for patterns
        return datasets.load_dataset(str(path), **how)
    kinds = {file: folders.split_of_table(file) for file in tables}
    chosen = [file for file in tables if kinds[file] == (folders.split_kind(split) or split)]
    if not chosen:
        raise ValueError(f"Unknown split {split!r}: expected one of {sorted(set(kinds.values()))}")
    suffix, _ = collections.Counter(Path(file).suffix.lower() for file in chosen).most_common(1)[0]
    files = {split: [glob.escape(str(path / file)) for file in chosen if file.lower().endswith(suffix)]}
    return datasets.load_dataset(FILES[suffix], data_files=files, **how)


def _open_hub(name: str, split: str, streaming: bool, known: Source | None) -> Dataset:
    if name[0] in ".~/" or name.count("/") > 1:
        raise FileNotFoundError("it looks like a path, but no such file or folder exists")
    if known and not known.hub:
        raise FileNotFoundError(known.hint)
    hub, _, configuration = (known.hub if known else name).partition(":")
    return datasets.load_dataset(hub, configuration or None, split=split, streaming=streaming)


def root_cause(error: BaseException) -> str:
    """The message of an error on one line, with that of the error which caused it all."""
    first = error
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__
    text, cause = one_line(first), one_line(error)
    return text if cause in text else f"{text} ({cause})"


def one_line(error: BaseException) -> str:
    """The message of an error in one line of at most 500 characters."""
    return " ".join(str(error).split())[:500]


# --------------------------------------------------------------------------------- decoding


def decode(record, form: PixelFormat = RGB) -> Picture:
    """Decode a record of an image or array column to an upright picture of this format.

    Records become pictures here and nowhere else. Raises whatever PIL raises, ValueError for a
    record without a picture.
    """
    return pixels.convert(open_upright(record), form)


def open_picture(record, form: PixelFormat = RGB) -> Picture:
    """The picture of a record. A JPEG is not decoded before its pixels are wanted, which may then raise."""
    if isinstance(record, dict):
        encoded, path = record.get("bytes"), record.get("path")
        if encoded is None and path and "://" not in path:
            with open(path, "rb") as file:
                start = file.read(2)
                encoded = start + file.read() if start == pixels.Jpeg.START else None
        if encoded and (jpeg := pixels.Jpeg.open(encoded, form)):
            return jpeg
    return decode(record, form)


def open_upright(record) -> Image.Image | np.ndarray:
    """The picture of a record, turned as its EXIF says, unless that is damaged; an array of an array column."""
    if record is not None and not isinstance(record, dict):
        return _numbers(np.asarray(record))
    encoded, path = (record or {}).get("bytes"), (record or {}).get("path")
    if encoded is None and path is None:
        raise ValueError("there is no picture (null)")
    if encoded is None and "://" in path:
        return datasets.Image().decode_example(record)
    if encoded is not None and encoded.startswith(b"\x93NUMPY"):
        return _numbers(np.load(io.BytesIO(encoded)))  # never an object array
    with Image.open(path if encoded is None else io.BytesIO(encoded)) as image:
        image.load()
    turn = pixels.TURNS.get(pixels.orientation_of(image))
    return image if turn is None else pixels.turned(image, turn)


def _numbers(values: np.ndarray) -> np.ndarray:
    """An array, if it has real numbers. Raises ValueError."""
    if values.dtype.kind not in "buif" or not values.size:
        raise ValueError(f"it is an array of shape {values.shape} and type {values.dtype}, expected real numbers")
    return values


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any PIL picture to RGB: 16 bits are scaled to 8, transparency is laid over white."""
    return pixels.convert(image)


def pixel_format(dataset: Dataset, channels: int, value_range: list[str] | None = None) -> PixelFormat:
    """The format for ``channels`` and --pixel-range: LOW and HIGH, "auto", or None, which warns if it is of little use.

    Raises ValueError for any other range.
    """
    sample = _sample_pictures_as_they_are(dataset, 16)
    if not value_range:
        if warning := pixels.unused_range(sample):
            say_once(f"WARNING: {warning}")
        if (white := pixels.common_white(sample)) is not None:
            say_once(f"pictures of more than 8 bits: black is 0, white {white} (--pixel-range)")
            return PixelFormat(channels, 0, white)
        return PixelFormat(channels)
    if value_range == ["auto"]:
        found = pixels.measure_range(sample)
        text = f"{found[0]:g} to {found[1]:g}" if found else "no pictures of more than 8 bits in a sample"
        say_once(f"--pixel-range auto: {text}")
        return PixelFormat(channels, *(found or (None, None)))
    try:
        low, high = map(float, value_range)
    except ValueError:
        low = high = math.nan
    if not low < high or math.isinf(high - low):
        raise ValueError(f"--pixel-range takes LOW HIGH with LOW < HIGH, or auto, got {' '.join(value_range)}")
    return PixelFormat(channels, low, high)


def pixel_range(form: PixelFormat) -> list[float] | None:
    """What --pixel-range would be for this format; None if the type of each picture decides."""
    return None if form.low is None else [form.low, form.high]


def _sample_pictures_as_they_are(dataset: Dataset, count: int) -> list:
    found = []
    for record in sample_records(dataset, count, ["image"]):
        with contextlib.suppress(Exception):  # a broken picture
            found.append(open_upright(record["image"]))
    return found


def undecoded(dataset: datasets.Dataset, columns: list[str]) -> datasets.Dataset:
    """These columns of a data set, their pictures undecoded, since some may be broken."""
    dataset = dataset.select_columns(columns)
    for column in columns:
        if isinstance(dataset.features[column], datasets.Image):
            dataset = dataset.cast_column(column, datasets.Image(decode=False))
    return dataset


def sample_records(dataset: Dataset, count: int, columns: list[str]) -> Iterator[dict]:
    """Up to ``count`` undecoded records from all over the data (the first of a stream)."""
    if isinstance(dataset, datasets.IterableDataset):
        yield from dataset.take(count)
        return
    dataset = undecoded(dataset, columns)
    for index in evenly_spaced(len(dataset), count):
        yield dataset[int(index)]


def measure_statistics(dataset: Dataset, form: PixelFormat) -> tuple[list[float], list[float]]:
    """Mean and deviation of each channel, in 0 ... 1, over centre crops of 64 pictures.

    Raises ValueError if none can be decoded.
    """
    crops = []
    for record in sample_records(dataset, 64, ["image"]):
        with contextlib.suppress(Exception):  # a broken picture
            crops.append(center_crop(decode(record["image"], form), 64))
    if not crops:
        raise ValueError("none of the pictures sampled from the data can be decoded")
    values = torch.stack(crops).float().div(255)
    return values.mean(dim=(0, 2, 3)).tolist(), values.std(dim=(0, 2, 3)).clamp(min=1e-3).tolist()


# --------------------------------------------------------------------------------- pixels


def normalize(images: Tensor, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> Tensor:
    """Turn uint8 images (b, c, H, W) into floats of about zero mean and unit deviation.

    ``mean`` and ``std`` have c entries; those that a model was trained with are its ``statistics``.
    """
    mean, std = mean_and_std(images.device, tuple(mean), tuple(std))
    return (images.float() / 255 - mean) / std


def denormalize(images: Tensor, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> Tensor:
    """Undo :func:`normalize`, rounded to uint8."""
    mean, std = mean_and_std(images.device, tuple(mean), tuple(std))
    return ((images.float() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


@functools.cache
def mean_and_std(device: torch.device, mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Mean and deviation as tensors (c, 1, 1) on the device.

    They are copied once, because a copy at every step would wait for the device.
    """
    mean, std = torch.tensor(mean, device=device), torch.tensor(std, device=device)
    return mean.view(-1, 1, 1), std.view(-1, 1, 1)


def to_device(values: Tensor | np.ndarray, device: torch.device) -> Tensor:
    """Copy an array or tensor from the host to ``device``, without waiting for the device."""
    tensor = torch.as_tensor(values)
    if device.type == "cuda":
        return tensor.contiguous().pin_memory().to(device, non_blocking=True)  # what is expanded cannot be pinned
    return tensor.to(device)


# --------------------------------------------------------------------------------- broken pictures


class BadImage(NamedTuple):
    """A picture that could not be decoded: its index in the data, its name and the reason."""

    index: int
    description: str


def name_of(record: dict | None, index: int) -> str:
    """The file of an undecoded picture, or its number in the data."""
    path = record.get("path") if isinstance(record, dict) else None
    return path or f"image {index}"


def describe_bad(index: int, record: dict | None, error: Exception) -> BadImage:
    """Describe the picture of an undecoded ``record`` whose decoding raised ``error``."""
    in_memory = r" <_io\.BytesIO object at \w+>"  # PIL's name for the file
    reason = re.sub(in_memory, "", one_line(error))
    return BadImage(index, f"{name_of(record, index)}: {type(error).__name__}: {reason}")


def decode_or_next(
    dataset: datasets.Dataset,
    index: int,
    tries: int,
    form: PixelFormat = RGB,
    use: Callable = lambda picture: picture,
    known: Mapping[int, str] | None = None,
) -> tuple[Any, int, list[BadImage]]:
    """What ``use`` makes of picture ``index`` or the next that is not broken, its label, and the broken ones before.

    A JPEG that is only broken inside counts as broken if ``use`` wants its pixels. The label is 0
    if there is none. After ``tries`` broken pictures a blank one is used: the caller then has
    enough reason to stop. ``known``: broken pictures, which are not tried again.
    """
    bad = []
    for i in range(index, index + tries):
        i, record = i % len(dataset), {}
        if known and i in known:
            bad.append(BadImage(i, known[i]))
            continue
        try:
            record = dataset[i]
            return use(open_picture(record["image"], form)), record.get("label", 0), bad
        except Exception as error:  # a decoder raises anything on a broken file
            bad.append(describe_bad(i, record.get("image"), error))
    return use(pixels.blank(form)), 0, bad


class TooManyBadImages(ValueError):
    """More pictures than allowed could not be decoded."""


class NothingToRead(ValueError):
    """No more pictures can be read from a stream."""


class BadImages:
    """The broken pictures met so far: ``descriptions`` by index.

    The first ``reported`` of them have been reported. ``max_share`` of ``length`` pictures may be
    broken. ``same_file_returns``: count files, not indices, because a stream repeats a file under
    another index.
    """

    def __init__(self, length: int, max_share: float, same_file_returns: bool = False):
        self.length, self.max_share = length, max_share
        self.same_file_returns = same_file_returns
        self.descriptions: dict[int, str] = {}
        self.reported = 0

    def add(self, bad: Iterable[BadImage]):
        """Add pictures; those that are known already count once."""
        self.descriptions.update(bad)

    def clear(self):
        self.descriptions.clear()
        self.reported = 0

    @property
    def count(self) -> int:
        """How many different pictures are broken."""
        return len(set(self.descriptions.values()) if self.same_file_returns else self.descriptions)

    @property
    def unreported(self) -> int:
        return len(self.descriptions) - self.reported

    def take_unreported(self) -> list[str]:
        """Return the descriptions not reported before, and count them as reported."""
        descriptions = list(self.descriptions.values())
        known, new = descriptions[: self.reported], descriptions[self.reported :]
        self.reported = len(descriptions)
        return [description for description in dict.fromkeys(new) if description not in known]

    def check(self):
        """Raise TooManyBadImages if more than ``max_share`` of the pictures are broken."""
        if self.count > self.max_share * self.length:
            first = itertools.islice(self.descriptions.values(), 20)
            names = "".join(f"\n  {description}" for description in first)
            count = f"{self.count} of {self.length} images are broken"
            raise TooManyBadImages(f"{count}, more than --max-bad-images {self.max_share}:{names}")

    def state_dict(self) -> dict[int, str]:
        return dict(self.descriptions)

    def load_state_dict(self, state: dict[int, str]):
        """Add the broken pictures of an earlier run, which has reported them."""
        self.descriptions.update(state)
        self.reported = len(self.descriptions)
