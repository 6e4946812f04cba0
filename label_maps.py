"""Pictures with a class for each pixel, for segmentation: which values of their label maps are which class.

Letters in shapes: ``H``/``W`` image height/width in pixels.
"""

import functools
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import torch
from PIL import Image
from torchvision import tv_tensors

import data
import folders
import objects
import pixels
import shapes

IGNORED = -1  # the label of pixels that are neither trained on nor scored
UNKNOWN = -2  # of values that have no class
VOID_NAMES = ("void", "unlabelled", "unlabeled", "ignore", "ignored")  # of what is no class
VOID = 255  # the value that label maps of 8 bits use for these, unless only it and 0 occur
COLOUR = 1 << 24  # added to the colours of RGB label maps, which thereby differ from numbers
MOST_CLASSES = 1000
MASK_COLUMNS = ("mask", "annotation", "label_map", "segmentation_mask", "semantic_mask", "segmentation", "label")


class Labels(NamedTuple):
    """The names of the classes, and the class (or IGNORED) of each value in a label map."""

    classes: list[str]
    class_of: dict[int, int]

    def apply(self, values: np.ndarray) -> np.ndarray:
        """The class of each value (H, W): int64. Raises ValueError, with counts, for values without a class."""
        table = _table(tuple(self.class_of.items()))
        if values.max() < len(table):
            found = table[values]
        else:  # colours
            known, where = np.unique(values, return_inverse=True)
            found = np.array([self.class_of.get(int(value), UNKNOWN) for value in known])[where].reshape(values.shape)
        if (found == UNKNOWN).any():
            unknown, counts = np.unique(values[found == UNKNOWN], return_counts=True)
            shown = ", ".join(f"{describe_value(value)} ({count} pixels)" for value, count in zip(unknown, counts))
            raise ValueError(f"its label map has labels beyond the {len(self.classes)} classes: {shown[:200]}")
        return found

    def as_named_by(self, own: "Labels", where: str) -> "Labels":
        """The same classes in data that name them as ``own`` does, perhaps with other values.

        Values that are no class here stay so, unless they have the name of one; other names are refused
        where they occur. Raises ValueError if no name is known.
        """
        number = {name: i for i, name in enumerate(self.classes)}
        names = {value: own.classes[i] for value, i in own.class_of.items() if i != IGNORED}
        if names and not number.keys() & set(names.values()):
            raise ValueError(f"{where} has other classes: {', '.join(own.classes[:5])}, ...: see --classes")
        nothing = [value for labels in (self, own) for value, i in labels.class_of.items() if i == IGNORED]
        found = {value: number[name] for value, name in names.items() if name in number}
        return Labels(self.classes, dict.fromkeys(nothing, IGNORED) | found)


@functools.lru_cache(maxsize=8)
def _table(class_of: tuple[tuple[int, int], ...]) -> np.ndarray:
    """The class of each number below 65,536."""
    table = np.full(2**16, UNKNOWN)
    for value, number in class_of:
        if value < len(table):
            table[value] = number
    return table


def describe_value(value: int) -> str:
    """A number, or the three of a colour."""
    if value < COLOUR:
        return str(value)
    colour = value - COLOUR
    return f"colour {colour >> 16} {colour >> 8 & 255} {colour & 255}"


def map_values(mask: Image.Image) -> np.ndarray:
    """The values (H, W) of a label map: numbers, palette indices, or colours (above COLOUR).

    Raises ValueError for modes that hold no labels.
    """
    if getattr(mask, "format", None) == "JPEG":
        raise ValueError("its label map is a JPEG, which blurs labels: expected PNG or another lossless format")
    if mask.mode in ("L", "P", "1", "I") or mask.mode.startswith("I;16"):
        return np.asarray(mask).astype(np.int64)
    if mask.mode != "RGB":
        raise ValueError(f"its label map is a picture of mode {mask.mode}, expected L, P, I;16, I, 1 or RGB")
    red, green, blue = np.moveaxis(np.asarray(mask).astype(np.int64), -1, 0)
    if (red == green).all() and (green == blue).all():
        return red
    return COLOUR + (red << 16) + (green << 8) + blue


# ------------------------------------------------------------------------------ classes


def read_classes(file: Path, first: int = 0) -> Labels:
    """The classes that a text file lists, one in each line: ``name``, ``VALUE name`` or ``R G B name``.

    Without values, classes are numbered from ``first``. Values of the same name are one class, those
    of VOID_NAMES are none. Raises ValueError.
    """
    lines = [line.split() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    numbers = [_leading_numbers(words) for words in lines]
    counts = {len(values) for values in numbers}
    if len(counts) != 1:
        raise ValueError(f"--classes {file}: expected lines of one kind: name, VALUE name, or R G B name")
    count = counts.pop()
    names = [" ".join(words[count:]) for words in lines]
    if count < 3:
        return numbered(names, [values[0] for values in numbers] if count else range(first, first + len(names)))
    colours = [COLOUR + (red << 16) + (green << 8) + blue for red, green, blue in numbers]
    greys = {red: name for (red, green, blue), name in zip(numbers, names) if red == green == blue}
    return numbered([*names, *greys.values()], [*colours, *greys])  # a map of one colour may look grey


def numbered(names: Sequence[str], values: Iterable[int]) -> Labels:
    """Classes of these ``names``, for the ``values`` in label maps."""
    classes = [name for name in dict.fromkeys(names) if name.lower() not in VOID_NAMES]
    number = {name: i for i, name in enumerate(classes)}
    if void := [name for name in dict.fromkeys(names) if name not in number]:
        data.say_once(f"no class: {', '.join(void)}")
    return Labels(classes, {value: number.get(name, IGNORED) for value, name in zip(values, names)})


def _leading_numbers(words: list[str]) -> tuple[int, ...]:
    """The one or three numbers before a name; none if there are others."""
    count = next((i for i, word in enumerate(words) if not word.isdigit()), len(words))
    return tuple(map(int, words[:count])) if count in (1, 3) and count < len(words) else ()


def understand(maps: Iterable[np.ndarray], ignored: Sequence[int] = ()) -> Labels:
    """The classes that the values of all label maps (H, W) suggest.

    Of maps with 0 and 255 alone these are "background" and "object"; otherwise each value is a class
    of that name, and 255 is void. Raises ValueError for colours and for shades.
    """
    values = set()
    for each in maps:
        values |= set(np.unique(each).tolist())
        if any(value >= COLOUR for value in values):
            colour = describe_value(max(values))
            raise ValueError(
                f"its label map has colours (for example {colour}): name them with --classes FILE, in lines R G B name"
            )
        if len(values) > MOST_CLASSES:
            raise ValueError(f"the label maps have more than {MOST_CLASSES} values: they hold no classes")
    values -= set(ignored)
    if values == {0, VOID}:
        return Labels(["background", "object"], {0: 0, VOID: 1})
    values = sorted(values - {VOID})
    if not values:
        raise ValueError("the label maps hold no classes")
    return Labels([f"class {value}" for value in values], {value: i for i, value in enumerate(values)})


def without(labels: Labels, ignored: Sequence[int]) -> Labels:
    """Leave out the classes of ``ignored`` values; 255 is ignored too unless it is a class."""
    left_out = {labels.class_of[value] for value in ignored if value in labels.class_of}
    kept = [i for i in range(len(labels.classes)) if i not in left_out]
    number = {old: new for new, old in enumerate(kept)} | dict.fromkeys(left_out, IGNORED)
    class_of = {VOID: IGNORED} | {value: number.get(i, IGNORED) for value, i in labels.class_of.items()}
    return Labels([labels.classes[i] for i in kept], class_of | dict.fromkeys(ignored, IGNORED))


# ------------------------------------------------------------------------------ data


class LabelMaps:
    """A data set of pictures and label maps; ``records`` has the undecoded columns image and mask.

    With ``by_picture`` a mask shows an object (255), whose class, from 1, is the label of the picture.
    """

    def __init__(self, records: datasets.Dataset, labels: Labels, form: data.PixelFormat, by_picture: bool = False):
        self.records, self.labels, self.form, self.by_picture = records, labels, form, by_picture
        self.classes = labels.classes

    def __len__(self) -> int:
        return len(self.records)

    def select(self, indices: Sequence[int]) -> "LabelMaps":
        """Some of the pictures."""
        return LabelMaps(self.records.select(indices), self.labels, self.form, self.by_picture)

    def read(self, index: int) -> dict:
        """A picture: "image" (c, H, W) uint8, "labels" (H, W) int64, as tv_tensors; "name".

        Raises ValueError if the map is missing, of another size, or has other labels; whatever PIL
        raises for broken files.
        """
        record = self.records[index]
        image = pixels.to_tensor(data.open_picture(record["image"], self.form))
        values = read_values(record)
        if self.by_picture:  # the shape that is drawn; around it is background
            values = np.where(values > 127, record["label"] + 1, 0)
        labels = self.labels.apply(values)
        if labels.shape != tuple(image.shape[1:]):
            sizes = [f"{width} x {height}" for height, width in (labels.shape, image.shape[1:])]
            raise ValueError(f"its label map has {sizes[0]} pixels, the picture {sizes[1]}")
        labels = torch.from_numpy(labels)
        name = data.name_of(record["image"], index)
        return dict(image=tv_tensors.Image(image), labels=tv_tensors.Mask(labels), name=name)


def read_values(record: dict) -> np.ndarray:
    """The values of a record's label map, turned as its picture is."""
    if record["mask"] is None:
        raise ValueError("it has no label map")
    mask = data.open_upright(record["mask"])
    turn = objects.turn_of(record["image"], mask.size)
    return map_values(mask if turn is None else pixels.turned(mask, turn))


def load_label_maps(
    name: str,
    split: str,
    *,
    image_column: str | None = None,
    mask_column: str | None = None,
    classes: str | None = None,
    ignored: Sequence[int] = (),
    labels: Labels | None = None,
    by_name: bool = True,
) -> LabelMaps:
    """Load pictures with label maps.

    ``name``: the demo data, whose classes are the background and the shapes; a folder with images/
    beside masks/ or annotations/ (in ADE20K's own, 0 is void); or what ``data.load_images`` takes, with
    a column of label maps. ``classes``: a text file (:func:`read_classes`) or a column that lists
    classes, whose names are taken; by default such a column is found, or all label maps are looked
    through. ``ignored``: values that are no class. ``labels``: the classes of another split, which with
    ``by_name`` are found by their names where this one names them, but in ADE20K's own folders.

    Raises FileNotFoundError or ValueError.
    """
    if name in data.DEMO:
        refuse_options(name, image_column=image_column, mask_column=mask_column, classes=classes)
        records = data.load_images(name, split)
        names = ["background", *shapes.SHAPE_NAMES]
        own = Labels(names, {i: i for i in range(len(names))})
        return LabelMaps(_undecoded(records), without(own, ignored) if ignored else own, data.RGB, by_picture=True)
    pairs = None
    if image_column in (None, "image") and mask_column in (None, "mask"):
        pairs = folders.find_pairs(Path(name).expanduser(), split)
    if pairs:
        records, is_ade20k = pairs
    else:
        records, is_ade20k = data.load_images(name, split, image_column, ""), False
        records = _rename_mask(name, records, mask_column)
    if is_ade20k:
        ignored = (0, *ignored)
        data.say_once(f"{name}: the folders are those of ADE20K: 0 is void")
    by_value = labels is not None and (not by_name or (is_ade20k and not classes))
    own = None if by_value else _given_labels(name, records, classes, is_ade20k)
    if labels is not None:
        labels = labels if own is None else labels.as_named_by(own, name)
    else:
        if own is None:
            count = len(records)
            data.say_once(f"{name}: looking through {count} label maps for their classes (--classes would name them)")
            own = understand(_all_values(_undecoded(records)), ignored)
        labels = without(own, ignored)
    return LabelMaps(_undecoded(records), labels, data.RGB)


def refuse_options(where: str | Path, **options: str | None):
    """Raise ValueError for options that say what data themselves say."""
    if given := [f"--{name.replace('_', '-')} {value}" for name, value in options.items() if value]:
        raise ValueError(f"{' '.join(given)}: of no use, {where} names its columns and classes itself")


def _rename_mask(name: str, records: datasets.Dataset, column: str | None) -> datasets.Dataset:
    """Name the column of label maps "mask"."""
    found = [key for key, kind in records.features.items() if isinstance(kind, datasets.Image) and key != "image"]
    column = (
        column or next((key for key in MASK_COLUMNS if key in found), None) or (found[0] if len(found) == 1 else "")
    )
    if column not in found:
        columns = ", ".join(records.features)
        raise ValueError(f"{name} has no column {column!r} of label maps: name it with --mask-column, of {columns}")
    if column == "mask":
        return records
    records = records.remove_columns("mask") if "mask" in records.features else records
    return records.rename_column(column, "mask")


def _undecoded(records: datasets.Dataset) -> datasets.Dataset:
    return data.undecoded(records, [name for name in ("image", "mask", "label") if name in records.features])


def _given_labels(name: str, records: datasets.Dataset, classes: str | None, is_ade20k: bool) -> Labels | None:
    """The classes as --classes, a column, or ADE20K names them; None if nothing does."""
    lists = [key for key, kind in records.features.items() if _class_names(kind)]
    column = classes if classes in records.features else lists[0] if len(lists) == 1 and classes is None else None
    if column:
        names = _class_names(records.features[column])
        if names is None:
            raise ValueError(f"--classes {column}: the column holds no list of named classes")
        return numbered(names, range(len(names)))
    if classes:
        if not Path(classes).is_file():
            raise ValueError(f"--classes {classes} is neither a text file nor a column: {', '.join(records.features)}")
        return read_classes(Path(classes), first=int(is_ade20k))
    if is_ade20k:
        listed = Path(name).expanduser() / "objectInfo150.txt"
        names = [f"class {i}" for i in range(1, 151)]
        if listed.is_file():
            lines = listed.read_text(encoding="utf-8-sig").splitlines()[1:151]
            names = [line.split("\t")[-1].split(",")[0].strip() for line in lines]
        return Labels(names, {i: i - 1 for i in range(1, len(names) + 1)})
    return None


def _class_names(feature) -> list[str] | None:
    """The names of a column that lists classes."""
    return getattr(getattr(feature, "feature", None), "names", None)


def _all_values(records: datasets.Dataset) -> Iterable[np.ndarray]:
    """The values of every label map that can be read. Raises ValueError if none can, with a reason."""
    masks, reasons = records.select_columns(["mask"]), []

    def values(index: int) -> np.ndarray | None:
        try:
            return np.unique(map_values(data.open_upright(masks[index]["mask"])))
        except Exception as error:  # reading reports it
            reasons.append(error)
            return None

    with ThreadPoolExecutor(8) as pool:
        yield from (found for found in pool.map(values, range(len(masks))) if found is not None)
    if len(reasons) == len(masks):
        raise ValueError(f"none of the {len(masks)} label maps can be read, for example {data.one_line(reasons[0])}")
