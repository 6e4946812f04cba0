"""Folders of images to data sets: which files are pictures, which folders are splits or classes.

Files are listed here and nowhere else.
"""

import collections
import contextlib
import functools
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import pyarrow.csv
import pyarrow.parquet
from PIL import Image

TABLE_SUFFIXES = {".parquet", ".arrow", ".tar"}
STREAM_SHARDS = 256  # at most: opening a shard takes longer, the more there are
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
RESULT_PICTURES = (  # what our commands draw beside RESULTS
    r"(loss|epochs|minutes|leads|predictions)\.png|(masks|layers|relations|variance|progress|attention|fourier|tokens"
    r"|clusters|reconstruction)(-.*)?\.png"
)
RESULTS = {"metrics.jsonl", "result.json", "results.json", "model.safetensors"}  # files of our own runs
RESULT_FOLDERS = {"overlays", "label_maps", "reconstructions"}  # of pictures, beside RESULTS
NOT_PIXELS = {"BUFR", "GRIB", "HDF5", "WMF", "EPS", "MPEG"}  # formats that Pillow opens, but does not decode alone
WORDS = r"([-_ ]?(set|split|data|images?|imgs?))?([-_ ]?\d{1,4})?"  # after a split: val2017, test_images, train-256
SPLITS = {  # names of folders, whatever their case
    "train": rf"train(ing)?{WORDS}",
    "validation": rf"(val|valid|validation|dev|eval|evaluation){WORDS}",
    "test": rf"test(ing)?{WORDS}",
}
MASK_FOLDERS = r"masks?|annotations?|labels?|label_?maps?|segmentation(class)?|gt"  # beside PICTURE_FOLDERS
PICTURE_FOLDERS = r"(jpeg)?images?|imgs?|pictures|photos"  # where splits lie beside folders of annotations
THUMBNAILS = r"_?thumb(nail)?s?"

Dataset = datasets.Dataset | datasets.IterableDataset


class Listing(NamedTuple):
    """The files below a folder, relative to it: pictures, tables, metadata; and what is left out, by kind."""

    images: list[str]
    tables: list[str]
    metadata: list[str]
    left_out: collections.Counter


@functools.cache
def image_suffixes() -> frozenset[str]:
    """The suffixes of files that Pillow decodes."""
    Image.init()
    known = Image.registered_extensions().items()
    return frozenset(suffix for suffix, kind in known if kind in Image.OPEN and kind not in NOT_PIXELS)


def list_files(root: Path) -> Listing:
    """List the files below ``root``, symbolic links included, hidden files and our own results excluded."""
    listing, above = Listing([], [], [], collections.Counter()), {}
    for folder, children, names in os.walk(root, followlinks=True):
        parents = above.get(os.path.dirname(folder), frozenset())
        if os.path.realpath(folder) in parents:  # a link that leads in a circle
            children.clear()
            continue
        above[folder] = parents | {os.path.realpath(folder)}
        images = [name for name in names if Path(name).suffix.lower() in image_suffixes()]
        is_result = bool(RESULTS & set(names)) and (Path(folder) == root or all(map(_is_ours, images)))
        if is_result and Path(folder) != root and (images or not children):  # else a stray file beside folders
            listing.left_out["results of smae"] += len(names)
            children.clear()
            continue
        if is_result:
            listing.left_out["results of smae"] += len(RESULT_FOLDERS & set(children))
            children[:] = [child for child in children if child not in RESULT_FOLDERS]
        listing.left_out["hidden"] += sum(_is_hidden(child) for child in children)
        listing.left_out["thumbnails"] += sum(_is_thumbnails(child) for child in children)
        children[:] = sorted(child for child in children if not (_is_hidden(child) or _is_thumbnails(child)))
        stems = {Path(name).stem for name in images}
        for name in names:
            file, suffix = os.path.relpath(os.path.join(folder, name), root), Path(name).suffix.lower()
            if _is_hidden(name):
                listing.left_out["hidden"] += 1
            elif is_result and (name in RESULTS or _is_ours(name)):
                listing.left_out["results of smae"] += 1
            elif name in METADATA:
                listing.metadata.append(file)
            elif suffix in TABLE_SUFFIXES:
                listing.tables.append(file)
            elif suffix in image_suffixes() and _full_size(Path(name).stem) in stems:
                listing.left_out["thumbnails"] += 1
            elif suffix in image_suffixes():
                listing.images.append(file)
            else:
                listing.left_out[suffix or "without a suffix"] += 1
    for files in listing[:3]:
        files.sort()
    return listing


def _is_ours(name: str) -> bool:
    """Whether a picture has the name of one that our commands draw."""
    return re.fullmatch(RESULT_PICTURES, name) is not None


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "__MACOSX", "@eaDir")) or name.lower() in ("thumbs.db", "desktop.ini")


def _is_thumbnails(name: str) -> bool:
    return re.fullmatch(THUMBNAILS, name, re.IGNORECASE) is not None


def _full_size(stem: str) -> str | None:
    """The name of the picture that a picture of this name is a thumbnail of; None if it is none."""
    found = re.fullmatch(r"(?i)(.+)[-_.]thumb(?:nail)?|thumb(?:nail)?[-_.](.+)", stem)
    return found and (found[1] or found[2])


@functools.cache
def say_once(text: str):
    """Print a line to standard error, once, in the first process."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)


def describe_left_out(listing: Listing) -> str:
    """What is left out of a folder of pictures, in a line; empty if nothing is."""
    counts = listing.left_out + collections.Counter(Path(file).suffix.lower() for file in listing.tables)
    return ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()) if count)


# ------------------------------------------------------------------------------ splits


def split_kind(name: str) -> str | None:
    """The split that a folder's name stands for: train, validation, test, or None."""
    return next((kind for kind, names in SPLITS.items() if re.fullmatch(names, name, re.IGNORECASE)), None)


def split_of_table(file: str) -> str:
    """The split that the words in the name of a table stand for; train if none does."""
    kinds = [split_kind(word) for word in re.split(r"[^A-Za-z]+", file)]
    return next((kind for kind in kinds if kind), "train")


def as_split(name: str) -> datasets.NamedSplit:
    """The name of a folder or file as that of a split; ``datasets`` takes only letters, digits and underscores."""
    return datasets.NamedSplit(re.sub(r"\W", "_", name))


def _children(root: Path) -> list[str]:
    return sorted(child.name for child in root.iterdir() if child.is_dir() and not _is_hidden(child.name))


def _place_of_splits(root: Path, levels: int = 4) -> Path | None:
    """The folder that holds the splits: ``root``, its only folder, or its images/ beside annotations/; else None."""
    folders = _children(root)
    if any(map(split_kind, folders)):
        return root
    if len(folders) > 1:
        folders = [name for name in folders if re.fullmatch(PICTURE_FOLDERS, name, re.IGNORECASE)]
    return _place_of_splits(root / folders[0], levels - 1) if levels and len(folders) == 1 else None


def named_like(split: str, names: Iterable[str]) -> list[str]:
    """Those of the ``names`` of folders or files that are the split: the one of that name, else all of its kind."""
    if split in (names := list(names)):
        return [split]
    return [name for name in names if split_kind(name) and split_kind(name) == split_kind(split)]


def find_split(root: Path, split: str) -> Path:
    """The folder of a split of the pictures in ``root``; ``root`` itself if it has no splits.

    A folder for training is a split if it is alone or beside a folder for tests, else a class. The
    folders may lie within the only folder of ``root``, or its images/. Raises ValueError if there is
    no such split, or if several folders could be meant.
    """
    whole, root = root, _place_of_splits(root) or root
    folders = _children(root)
    kinds = {name: split_kind(name) for name in folders}
    tests = [name for name in folders if kinds[name] in ("validation", "test")]
    found = named_like(split, folders)
    if len(found) > 1:
        raise ValueError(f"Unknown split {split!r}: name one of {', '.join(found)} with --split")
    if split_kind(split) == "train":
        if found and (len(folders) == 1 or tests):
            return root / found[0]
        if folders and len(tests) == len(folders):
            raise ValueError(f"Unknown split {split!r}: there are {', '.join(folders)}, name one with --split")
        if found or tests:
            say_once(f"{whole}: all its folders are read, {', '.join(folders)}: name one with --split to read it alone")
        return whole
    if not found:
        raise ValueError(f"Unknown split {split!r}: {root} has no folder of that name")
    return root / found[0]


# ------------------------------------------------------------------------------ pictures


def open_images(root: Path, split: str, streaming: bool, listing: Listing) -> tuple[Dataset, Listing]:
    """The pictures of a split below ``root``, whose ``listing`` is known, with labels or metadata if there are any.

    The label is the name of the folder that a picture lies in, if all lie at the same depth and in more
    than one folder. Masks beside the pictures are left out. A metadata.csv, .jsonl or .parquet beside
    the pictures, or above them up to ``root``, adds columns, or another label: rows with a
    ``file_name``. A stream has the pictures in a fixed random order, not class by class. Raises
    ValueError.
    """
    folder = find_split(root, split)
    listing = listing if folder == root else list_files(folder)
    if not listing.images:
        raise ValueError(f"split {split!r} of {root} is empty")
    parents = [parent for parent in folder.parents if parent.is_relative_to(root)]
    above = [parent / name for parent in parents for name in METADATA if (parent / name).is_file()]
    metadata = [folder / file for file in listing.metadata] + above
    named, place = _read_metadata(metadata), Path(os.path.abspath(folder))
    if masks := {file for file in _masks_among(listing.images) if os.path.normpath(place / file) not in named}:
        listing = listing._replace(images=[file for file in listing.images if file not in masks])
        listing.left_out["masks"] += len(masks)
    name = split if folder == root else folder.name
    how = dict(split=as_split(name))
    files, classes = listing.images, _classes(listing.images, single=split_kind(name) in ("validation", "test"))
    shards = min(STREAM_SHARDS, len(files)) if streaming else 1
    if streaming:
        order = np.random.default_rng(0).permutation(len(files))
        files, classes = [files[i] for i in order], classes and [classes[i] for i in order]
    if metadata:
        rows, images, from_folders = _join_metadata(place, files, metadata[0], named, classes)
        dataset = datasets.Dataset.from_list(rows, **how)
        for column in images:
            dataset = dataset.cast_column(column, datasets.Image())
        if from_folders:
            dataset = dataset.cast_column("label", datasets.ClassLabel(names=sorted(set(classes))))
        return dataset.to_iterable_dataset(num_shards=min(shards, len(rows))) if streaming else dataset, listing

    features = datasets.Features(image=datasets.Image())
    if classes:
        features["label"] = datasets.ClassLabel(names=sorted(set(classes)))
    files, classes = [files[i::shards] for i in range(shards)], classes and [classes[i::shards] for i in range(shards)]
    arguments = dict(folder=str(place), files=files, classes=classes)
    kind = datasets.IterableDataset if streaming else datasets.Dataset
    return kind.from_generator(_records, features=features, gen_kwargs=arguments, **how), listing


def _masks_among(files: list[str]) -> set[str]:
    """Files in a folder of masks, such as masks/1.png, beside a picture of the same name, such as images/1.jpg.

    None where other folders with pictures lie beside these two: they may be classes.
    """

    def kind(folder: str) -> str | None:
        if re.fullmatch(PICTURE_FOLDERS, folder, re.IGNORECASE):
            return "pictures"
        return "masks" if re.fullmatch(rf"{MASK_FOLDERS}|segmentationobject", folder, re.IGNORECASE) else None

    children = collections.defaultdict(set)  # names of folders, by the folder that they lie in
    for folder in {file.rpartition("/")[0] for file in files} - {""}:
        parts = folder.split("/")
        for i, name in enumerate(parts):
            children["/".join(parts[:i])].add(name)
    pairs = {above for above, names in children.items() if set(map(kind, names)) == {"pictures", "masks"}}
    if not pairs:
        return set()

    images, masks = set(), []
    for file in files:
        *parts, stem = os.path.splitext(file)[0].split("/")
        for i, name in enumerate(parts):
            if "/".join(parts[:i]) in pairs:
                elsewhere = *parts[:i], *parts[i + 1 :], stem
                if kind(name) == "masks":
                    masks.append((file, elsewhere))
                else:
                    images.add(elsewhere)
    return {file for file, elsewhere in masks if elsewhere in images}


def _classes(files: list[str], single: bool) -> list[str] | None:
    """The class of each file, by the deepest level of folders that has more than one; None without one.

    ``single`` accepts one class alone: a test set may lack the others.
    """
    parents = [Path(file).parts[:-1] for file in files]
    depths = {len(parts) for parts in parents}
    if len(depths) > 1:
        outer, inner = min(files, key=_depth), max(files, key=_depth)
        say_once(f"no labels: the pictures lie at different depths, for example {outer} and {inner}")
    if len(depths) != 1 or depths == {0}:
        return None
    for level in reversed(range(depths.pop())):
        names = [parts[level] for parts in parents]
        if len(set(names)) > 1:
            return names
    found = [parts[-1] for parts in parents]
    return found if single and not re.fullmatch(PICTURE_FOLDERS, found[0], re.IGNORECASE) else None


def _depth(file: str) -> int:
    return len(Path(file).parts)


def _records(folder: str, files: list[list[str]], classes: list[list[str]] | None) -> Iterator[dict]:
    """The records of some shards; ``files`` and their ``classes`` by shard."""
    for shard, names in enumerate(files):
        for number, name in enumerate(names):
            label = {"label": classes[shard][number]} if classes else {}
            yield {"image": _image(os.path.join(folder, name))} | label


def _image(path: str) -> dict:
    """The record of a picture: its path, or its bytes if the path is not UTF-8, which tables demand."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return dict(bytes=Path(path).read_bytes(), path=path.encode(errors="surrogateescape").decode(errors="replace"))
    return dict(bytes=None, path=path)


def _read_metadata(metadata: list[Path]) -> dict[str, tuple[Path, dict]]:
    """The pictures that some files of metadata name: by path, the folder of the file and the last row."""
    named, twice = {}, []
    for file in metadata:
        for row in _rows(file):
            if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
                raise ValueError(f"{file} has no column file_name with the name of each picture")
            path = os.path.normpath(os.path.abspath(file.parent / row["file_name"]))
            twice += [path] if path in named else []
            named[path] = file.parent, row
    if twice:
        say_once(
            f"{metadata[0]} names a picture more than once, the last row counts: {len(twice)}, for example {twice[0]}"
        )
    return named


def _join_metadata(
    place: Path, files: list[str], metadata: Path, named: dict[str, tuple[Path, dict]], classes: list[str] | None
) -> tuple[list[dict], list[str], bool]:
    """A row for each picture that the metadata names, the columns that hold pictures, whether ``classes`` are used.

    ``classes`` are the labels of the files: those of their folders, used if the metadata has no labels.
    What does not match is said.
    """
    paths = [os.path.normpath(place / file) for file in files]
    present = set(paths)
    if not named.keys() & present:
        raise ValueError(f"{metadata} names none of the pictures in {place}")
    from_folders = bool(classes) and not any("label" in row for _, row in named.values())
    rows, columns = [], {"image"}
    for number, path in enumerate(paths):
        if path not in named:
            continue
        parent, row = named[path]
        record = {"image": _image(path)} | ({"label": classes[number]} if from_folders else {})
        for key, value in row.items():
            if key.endswith("_file_name"):  # another picture, such as a mask
                key = key.removesuffix("_file_name")
                value = _image(os.path.abspath(parent / value)) if value else None
                columns.add(key)
            if key != "file_name":
                record[key] = value
        rows.append(record)
    inside = [path for path in named if Path(path).is_relative_to(place)]
    for what, wrong in {
        "names pictures that do not exist": [path for path in inside if path not in present],
        "does not name pictures, which are left out": [path for path in paths if path not in named],
    }.items():
        if wrong:
            say_once(f"{metadata} {what}: {len(wrong)}, for example {wrong[0]}")
    names = dict.fromkeys(name for row in rows for name in row)  # the first row may lack some
    return [{name: row.get(name) for name in names} for row in rows], sorted(columns), from_folders


def _rows(file: Path) -> list[dict]:
    """The rows of a metadata file."""
    if file.suffix == ".jsonl":
        with contextlib.suppress(json.JSONDecodeError):
            return [json.loads(line) for line in file.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
        raise ValueError(f"{file} does not hold a JSON object in each line")
    read = pyarrow.csv.read_csv if file.suffix == ".csv" else pyarrow.parquet.read_table
    return read(file).to_pylist()


# ------------------------------------------------------------------------------ pictures beside masks


class Pairs(NamedTuple):
    """Pictures beside masks: ``records`` with columns image and mask; whether the folders are those of ADE20K."""

    records: datasets.Dataset
    is_ade20k: bool


def find_pairs(root: Path, split: str) -> Pairs | None:
    """The pictures of a split in images/ and their masks, of the same name, in masks/ or annotations/.

    Splits are folders in both (images/train), or hold both (train/images); without any, all pictures
    are "train". Pictures without a mask are left out, which is said. None if there are no such
    folders. Raises ValueError for an unknown split, or one without masks.
    """
    place = pair_of_split(root, split)
    if place is None:
        return None
    name, images, masks = place
    found = _masks_of(images, masks)
    pairs = {file: mask for file, mask in found.items() if mask is not None}
    missing = [file for file in found if file not in pairs]
    if not pairs:
        raise ValueError(f"split {split!r} of {root} has no pictures in {images.name} with a mask in {masks.name}")
    if missing:
        say_once(f"{images}: left out {len(missing)} of {len(found)} pictures without a mask, for example {missing[0]}")
    columns = dict(
        image=[_image(os.path.abspath(images / file)) for file in pairs],
        mask=[_image(os.path.abspath(masks / mask)) for mask in pairs.values()],
    )
    features = datasets.Features(image=datasets.Image(), mask=datasets.Image())
    return Pairs(
        datasets.Dataset.from_dict(columns, features, split=as_split(name)),
        is_ade20k=masks.parent.name == "annotations" and next(iter(pairs)).startswith("ADE_"),
    )


def _masks_of(images: Path, masks: Path) -> dict[str, str | None]:
    """For each picture in ``images`` the mask of the same name in ``masks``, None if there is none."""
    listed = list_files(masks).images if masks.is_dir() else []
    by_stem = {os.path.splitext(file)[0]: file for file in listed}
    return {file: by_stem.get(os.path.splitext(file)[0]) for file in list_files(images).images}


def pair_of_split(root: Path, split: str) -> tuple[str, Path, Path] | None:
    """Name, pictures and masks of a split of folders as :func:`find_pairs` knows them; None without any.

    Raises ValueError for an unknown split.
    """
    if not root.is_dir():
        return None
    both = _pair_in(root)
    if both:
        images, masks = both
        places = {name: (images / name, masks / name) for name in _children(images) if split_kind(name)}
        places = places or {"train": both}
    else:
        found = {name: _pair_in(root / name) for name in _children(root)}
        places = {name: pair for name, pair in found.items() if pair and split_kind(name)}
    if not places:
        return None
    names = named_like(split, places)
    if not names:
        raise ValueError(f"Unknown split {split!r}: {root} has {', '.join(sorted(places))}")
    return names[0], *places[names[0]]


def _pair_in(folder: Path) -> tuple[Path, Path] | None:
    """The folders of pictures and of masks in ``folder``, those that share the most names."""
    names = _children(folder)
    images = [name for name in names if re.fullmatch(PICTURE_FOLDERS, name, re.IGNORECASE)]
    masks = [name for name in names if re.fullmatch(MASK_FOLDERS, name, re.IGNORECASE)]
    pairs = [(folder / one, folder / other) for one in images for other in masks]
    if len(pairs) < 2:
        return pairs[0] if pairs else None
    return max(pairs, key=lambda pair: sum(mask is not None for mask in _masks_of(*pair).values()))
