"""Pictures with objects, for detection: boxes, classes, masks, as in COCO.

Letters in shapes: ``k`` objects, ``H``/``W`` image height/width in pixels.
"""

import contextlib
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import datasets
import numpy as np
import torch
from torchvision import tv_tensors

import data
import folders
import pixels
import shapes
from label_maps import map_values, refuse_options

try:
    from faster_coco_eval.core import mask as rle
except ModuleNotFoundError:  # dense.py says so
    rle = None

OBJECT_COLUMNS = ("objects", "annotations")
MASK_COLUMNS = ("instances", "instance_mask", "mask")
ROBOFLOW = "_annotations.coco.json"
FIELDS = {  # of a column of objects, under the names that data sets give them
    "bbox": ("bbox", "bboxes", "boxes", "box"),
    "category": ("category", "categories", "category_id", "label", "labels", "class"),
    "area": ("area", "areas"),
    "iscrowd": ("iscrowd", "is_crowd", "crowd"),
}


class Instances:
    """A data set of pictures and objects.

    ``records`` has the undecoded column image and, in JSON, the column objects: for each object a
    dictionary of COCO's "bbox" (left, top, width, height), "category" (a class from 0), and perhaps
    "area", "iscrowd" and "segmentation". With a column mask, an undecoded picture, object i has the
    value i + 1 in it; a single object has all that is not 0. ``has_masks``: whether objects have
    shapes. ``category_ids``: the numbers of the classes in the files of the data. ``single_class``:
    whether all objects count as the only class.
    """

    def __init__(
        self,
        records: datasets.Dataset,
        classes: Sequence[str],
        form: data.PixelFormat,
        has_masks: bool,
        category_ids: Sequence[int] | None = None,
        single_class: bool = False,
    ):
        self.records, self.classes, self.form, self.has_masks = records, list(classes), form, has_masks
        self.single_class = single_class
        self.category_ids = list(category_ids or range(len(classes)))

    def __len__(self) -> int:
        return len(self.records)

    def select(self, indices: Sequence[int]) -> "Instances":
        """Some of the pictures."""
        records = self.records.select(indices)
        return Instances(records, self.classes, self.form, self.has_masks, self.category_ids, self.single_class)

    def as_one_class(self) -> "Instances":
        """The same objects, all of a class "object"."""
        return Instances(self.records, ["object"], self.form, self.has_masks, self.category_ids[:1], single_class=True)

    def image_ids(self) -> list[int | str]:
        """The numbers of the pictures in their data: their ids, if there are any, else their indices."""
        if "image_id" not in self.records.features:
            return list(range(len(self)))
        return [json.loads(text) for text in self.records["image_id"]]

    def read(self, index: int) -> dict:
        """A picture: "image" (c, H, W) uint8; "objects", COCO's annotations; "has_masks"; "name".

        Their "segmentation" is run-length encoded. Raises ValueError for a class beyond the classes or
        a box beyond the picture; whatever PIL raises for broken files.
        """
        record = self.records[index]
        image = pixels.to_tensor(data.open_picture(record["image"], self.form))
        height, width = image.shape[1:]
        if record.get("size") not in (None, [width, height]):
            raise ValueError(f"its annotations are of a picture of {record['size']} pixels, it has {[width, height]}")
        objects = json.loads(record["objects"])
        for number, each in enumerate(objects):
            each["category"] = 0 if self.single_class else each["category"]
            if not 0 <= each["category"] < len(self.classes):
                raise ValueError(
                    f"object {number} has class {each['category']}, beyond the {len(self.classes)} classes"
                )
            check_box(each["bbox"], width, height)
        if self.has_masks:
            self.encode_masks(objects, record, height, width)
        for each in objects:
            if each.get("area") is None:
                w, h = each["bbox"][2:]
                each["area"] = float(rle.area(each["segmentation"])) if self.has_masks else w * h
            each["iscrowd"] = int(each.get("iscrowd") or 0)
            if not self.has_masks:
                each.pop("segmentation", None)
        name = data.name_of(record["image"], index)
        return dict(image=tv_tensors.Image(image), objects=objects, has_masks=self.has_masks, name=name)

    def encode_masks(self, objects: list[dict], record: dict, height: int, width: int):
        """Give each object its segmentation, run-length encoded."""
        if objects and record.get("mask") is not None:
            values = map_values(data.open_upright(record["mask"]))
            if values.shape != (height, width):  # not turned, unlike label maps: boxes must fit too
                raise ValueError(f"its mask has {values.shape[1]} x {values.shape[0]} pixels, not {width} x {height}")
            numbers = np.arange(1, len(objects) + 1)
            stack = values[..., None] == numbers if len(objects) > 1 else values[..., None] > 0  # (H, W, k)
            for each, segmentation in zip(objects, rle.encode(np.asfortranarray(stack.astype(np.uint8)))):
                each["segmentation"] = segmentation
        for each in objects:
            each["segmentation"] = encode(each.get("segmentation") or [corners(each["bbox"])], height, width)


def check_box(bbox: Sequence[float], width: int, height: int):
    """Raise ValueError if a box (left, top, width, height) has no place in its picture, or a negative size."""
    left, top, w, h = bbox
    if min(w, h) < 0 or left > width or top > height or left + w < 0 or top + h < 0:
        raise ValueError(f"its box {[round(x, 1) for x in bbox]} lies beyond its {width} x {height} pixels")


def encode(segmentation, height: int, width: int) -> dict:
    """A mask in any of COCO's forms (polygons, run lengths), run-length encoded. Raises ValueError for another size."""
    if isinstance(segmentation, dict):
        if list(segmentation["size"]) != [height, width]:
            raise ValueError(f"an object's mask is of {segmentation['size']} pixels, expected {[height, width]}")
        is_encoded = not isinstance(segmentation["counts"], list)
        return segmentation if is_encoded else rle.frPyObjects(segmentation, height, width)
    if segmentation and not isinstance(segmentation[0], list):
        segmentation = [segmentation]  # a single polygon
    polygons = [polygon for polygon in segmentation if len(polygon) >= 6]
    if not polygons:
        return rle.encode(np.zeros((height, width), np.uint8, order="F"))
    return rle.merge(rle.frPyObjects(polygons, height, width))


def corners(bbox: Sequence[float]) -> list[float]:
    """The polygon of a box: what stands for the mask of an object that has none."""
    left, top, width, height = bbox
    return [left, top, left + width, top, left + width, top + height, left, top + height]


def targets_of(scene: dict) -> dict:
    """What a detector is trained on: the objects of :meth:`Instances.read` as tv_tensors, crowds left out.

    "boxes" (k, 4), left, top, right, bottom; "labels" (k,); "masks" (k, H, W) uint8, if they are known.
    """
    image, objects = scene["image"], [each for each in scene["objects"] if not each["iscrowd"]]
    size = tuple(image.shape[1:])
    boxes = torch.tensor([each["bbox"] for each in objects], dtype=torch.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    limits = torch.tensor(size[::-1] * 2)
    boxes = boxes.clamp(min=0).minimum(limits)
    found = dict(
        image=image,
        boxes=tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size),
        labels=torch.tensor([each["category"] for each in objects], dtype=torch.int64),
    )
    if scene["has_masks"]:
        masks = [rle.decode(each["segmentation"]) for each in objects]
        stack = np.stack(masks) if masks else np.zeros((0, *size), np.uint8)
        found["masks"] = tv_tensors.Mask(torch.from_numpy(stack))
    return found


# ------------------------------------------------------------------------------ loading


def load_instances(
    name: str,
    split: str,
    *,
    image_column: str | None = None,
    mask_column: str | None = None,
    classes: str | None = None,
    boxes: str = "xywh",
    known: tuple[list[str], list[int]] | None = None,
    by_name: bool = True,
) -> Instances:
    """Load pictures with objects.

    ``name``: the demo data; a folder with annotations/instances_SPLIT.json, as COCO has it, or with
    SPLIT/_annotations.coco.json; or what ``data.load_images`` takes, with a column of objects (a
    dictionary of lists: bbox, category, perhaps area and iscrowd) and perhaps one of masks, in which
    object i has the value i + 1. ``classes``: a text file with a name in each line. ``boxes``: "xywh" or
    "xyxy". ``known``: classes and category ids of another split, which this one has too; a
    column's numbers are told by their names if ``by_name``. Raises FileNotFoundError or ValueError.
    """
    file = None if name in data.DEMO else find_annotations(Path(name).expanduser(), split)
    if name in data.DEMO or file is not None:
        refuse_options(file or name, image_column=image_column, mask_column=mask_column, classes=classes)
    if name in data.DEMO:
        return Instances(_demo(data.load_images(name, split)), shapes.SHAPE_NAMES, data.RGB, has_masks=True)
    if file is not None:
        records, names, category_ids, has_masks = read_coco(file, known, boxes)
        return _checked(name, Instances(records, names, data.RGB, has_masks, category_ids), boxes)
    records = data.load_images(name, split, image_column, "")
    column = next((key for key in OBJECT_COLUMNS if key in records.features), None)
    fields = _fields(name, records, column)
    mask = _mask_column(records, mask_column, name)
    given = None if known and not by_name else _given_names(records, column, fields["category"], classes)
    names = known[0] if known else given or _found_names(records, column, fields["category"])
    texts = [json.dumps(_number_classes(_objects(row, fields, boxes), names, given)) for row in records[column]]
    kept = records.select_columns([key for key in ("image", mask) if key])
    if "image_id" in records.features:
        kept = kept.add_column("image_id", [json.dumps(each) for each in records["image_id"]])
    if mask:
        kept = kept.rename_column(mask, "mask") if mask != "mask" else kept
        kept = kept.cast_column("mask", datasets.Image(decode=False))
    return _checked(name, Instances(kept.add_column("objects", texts), names, data.RGB, bool(mask)), boxes)


def _demo(records: datasets.Dataset) -> datasets.Dataset:
    """One object in each picture of the demo data."""
    texts = [json.dumps([dict(bbox=bbox, category=label)]) for bbox, label in zip(records["bbox"], records["label"])]
    return data.undecoded(records, ["image", "mask"]).add_column("objects", texts)


def _fields(name: str, records: datasets.Dataset, column: str | None) -> dict[str, str | None]:
    """The names that boxes, classes, areas and crowds have in a column of objects. Raises ValueError."""
    if column is None:
        columns = ", ".join(records.features)
        raise ValueError(f"{name} has no column {' or '.join(OBJECT_COLUMNS)} of objects, only {columns}")
    feature = records.features[column]
    inner = getattr(feature, "feature", feature)
    keys = list(inner) if isinstance(inner, dict) else []
    fields = {field: next((key for key in known if key in keys), None) for field, known in FIELDS.items()}
    if fields["bbox"] is None or fields["category"] is None:
        raise ValueError(f"column {column} of {name} has {keys or feature}, expected bbox and category")
    return fields


def _mask_column(records: datasets.Dataset, column: str | None, name: str) -> str | None:
    found = [key for key, kind in records.features.items() if isinstance(kind, datasets.Image) and key != "image"]
    if column and column not in found:
        raise ValueError(f"{name} has no column {column!r} of masks: {', '.join(records.features)}")
    return column or next((key for key in MASK_COLUMNS if key in found), None)


def _given_names(records: datasets.Dataset, column: str, field: str, file: str | None) -> list[str] | None:
    """The names of numbered classes: of a file, or of the column's type; None without either."""
    if file:
        if not Path(file).is_file():
            raise ValueError(f"--classes {file}: there is no such text file")
        lines = Path(file).read_text(encoding="utf-8-sig").splitlines()
        return [line.strip() for line in lines if line.strip()]
    feature = records.features[column]
    inner = getattr(feature, "feature", feature)[field]
    return getattr(getattr(inner, "feature", inner), "names", None)


def _found_names(records: datasets.Dataset, column: str, field: str) -> list[str]:
    """The names of the classes that the objects have: their own, or the numbers."""
    values = {value for row in records[column] for value in _by_field(row).get(field) or ()}
    if values and all(isinstance(value, str) for value in values):
        return sorted(values)
    if not all(isinstance(value, int) for value in values):
        kinds = ", ".join(sorted({type(value).__name__ for value in values}))
        raise ValueError(f"the classes of the objects are {kinds}, expected numbers or names")
    return [f"class {i}" for i in range(max(values, default=0) + 1)]


def _by_field(row: dict | list[dict] | None) -> dict[str, list]:
    """The objects of a picture as a dictionary of lists, whether they come so or as a list of dictionaries."""
    if isinstance(row, dict):
        return row
    return {key: [each[key] for each in row] for key in (row[0] if row else ())}


def _number_classes(objects: list[dict], names: list[str], given: list[str] | None) -> list[dict]:
    """The objects, with the number that the name of their class has in ``names``; ``given``: names of their numbers.

    Raises ValueError for another name.
    """
    for each in objects:
        value = each["category"]
        if given not in (None, names) and isinstance(value, int):
            value = given[value] if 0 <= value < len(given) else f"class {value}"
        if isinstance(value, str):
            if value not in names:
                expected = ", ".join(names[:5])
                raise ValueError(f"an object has the class {value!r}, expected {expected}, ...: see --classes")
            value = names.index(value)
        each["category"] = value
    return objects


def _objects(row: dict | list[dict] | None, fields: dict[str, str | None], boxes: str) -> list[dict]:
    """The objects of a picture as Instances takes them."""
    columns = _by_field(row)
    count = len(columns.get(fields["bbox"]) or [])
    values = {field: columns.get(key) or [None] * count for field, key in fields.items() if key}
    if any(len(column) != count for column in values.values()):
        raise ValueError(f"a picture has lists of objects of different lengths: {row}"[:300])
    found = [dict(zip(values, each)) for each in zip(*values.values())]
    for each in found:
        each["bbox"] = _left_top_width_height(each["bbox"], boxes)
    return found


def _left_top_width_height(box: Sequence[float] | None, boxes: str) -> list[float]:
    """A box as COCO has it, from one that is "xywh" or "xyxy". Raises ValueError if it is not four numbers."""
    try:
        left, top, x, y = map(float, box)
    except (TypeError, ValueError):
        raise ValueError(f"an object has the box {box}, expected four numbers") from None
    return [left, top, x, y] if boxes == "xywh" else [left, top, x - left, y - top]


def _checked(name: str, scenes: Instances, boxes: str) -> Instances:
    """``scenes``, unless boxes or masks of a sample do not fit the pictures. Raises ValueError."""
    beyond, count, empty, largest, example = 0, 0, 0, 0.0, ""
    for index in data.evenly_spaced(len(scenes), 64):
        record = scenes.records[int(index)]
        try:
            width, height = _size_of(record["image"])
            objects = json.loads(record["objects"])
            if scenes.has_masks:
                scenes.encode_masks(objects, record, height, width)
        except Exception:  # a broken picture; reading reports it
            continue
        for each in objects:
            left, top, w, h = each["bbox"]
            fits = left >= -2 and top >= -2 and w > 0 and h > 0 and left + w <= width + 2 and top + h <= height + 2
            count, largest = count + 1, max(largest, w, h)
            empty += scenes.has_masks and not rle.area(each["segmentation"])
            if not fits:
                beyond += 1
                example = f"{[round(x, 1) for x in (left, top, w, h)]} in {width} x {height} pixels"
    if beyond > 0.05 * count:
        raise ValueError(
            f"{beyond} of {count} boxes sampled from {name} do not lie in their pictures, for example (left, top, "
            f"width, height) {example}: perhaps they are --boxes {'xyxy' if boxes == 'xywh' else 'xywh'}"
        )
    if count and largest <= 1:
        raise ValueError(f"the boxes of {name} are fractions of the picture: expected pixels")
    if empty > 0.05 * count:
        advice = (
            ": in a column of masks, the first object of a picture has the value 1, the second 2, ...; name another "
            "with --mask-column"
        )
        advice = advice if "mask" in scenes.records.features else ""
        raise ValueError(f"{empty} of {count} objects sampled from {name} have an empty mask{advice}")
    return scenes


def _size_of(record) -> tuple[int, int]:
    """Width and height of a picture, in an array of many channels too, whose shortest axis is taken for these."""
    with contextlib.suppress(ValueError):  # which an array raises
        return data.open_picture(record).size
    shape = list(data.open_upright(record).shape)
    if len(shape) == 3:
        shape.remove(min(shape))
    return shape[1], shape[0]


# ------------------------------------------------------------------------------ COCO's files


def find_annotations(root: Path, split: str) -> Path | None:
    """The file of a split: annotations/instances_SPLIT.json or SPLIT/_annotations.coco.json; None if there are none.

    Raises ValueError for an unknown split.
    """
    if not root.is_dir():
        return None
    found = {file.stem.removeprefix("instances_"): file for file in sorted(root.glob("annotations/instances_*.json"))}
    found |= {file.parent.name: file for file in sorted(root.glob(f"*/{ROBOFLOW}"))}
    if not found:
        return None
    chosen = folders.named_like(split, found)
    if not chosen:
        raise ValueError(f"Unknown split {split!r}: {root} has {', '.join(found)}")
    return found[chosen[-1]]  # of train2014 and train2017 the newer one


def read_coco(
    file: Path, known: tuple[list[str], list[int]] | None = None, boxes: str = "xywh"
) -> tuple[datasets.Dataset, list[str], list[int], bool]:
    """What :class:`Instances` takes: records, names of the classes, their category ids, whether there are masks.

    The classes are those that are ``known``, found by their names; the ids are those of the file.
    Raises ValueError, for an object of another class too, or FileNotFoundError.
    """
    content = json.loads(file.read_text(encoding="utf-8-sig"))
    _check_entries(file, content)
    categories = sorted(content["categories"], key=lambda category: category["id"])
    if file.name == ROBOFLOW:  # its files begin with a category 0 that no object has
        used = {each["category_id"] for each in content["annotations"]}
        categories = [each for each in categories if each["id"] in used or each["id"] != 0]
    has_masks = any(each.get("segmentation") for each in content["annotations"])
    place = _place_of_pictures(file, content["images"])
    names, ids = [each["name"] for each in categories], [each["id"] for each in categories]
    names = [f"{name} ({number})" if names.count(name) > 1 else name for name, number in zip(names, ids)]
    for each in content["annotations"]:
        _box(each, boxes)  # or raise
    if known:
        own = dict(zip(names, ids))
        used = {each["category_id"] for each in content["annotations"]}
        if other := [name for name in own if name not in known[0] and own[name] in used]:
            raise ValueError(f"{file} has other classes: {', '.join(other[:5])}")
        names, free = known[0], itertools.count(max(ids, default=0) + 1)  # ids of classes that the file lacks
        ids = [own[name] if name in own else next(free) for name in names]
    features = datasets.Features(
        image=datasets.Image(decode=False),
        image_id=datasets.Value("string"),
        size=datasets.List(datasets.Value("int32")),
        objects=datasets.Value("string"),
    )
    status = file.stat()
    version = status.st_mtime_ns, status.st_size
    # datasets would divide a list
    arguments = dict(file=str(file.resolve()), place=str(place), version=version, ids=tuple(ids), boxes=boxes)
    del content
    name = file.parent.name if file.name == ROBOFLOW else file.stem.removeprefix("instances_")
    how = dict(gen_kwargs=arguments, split=folders.as_split(name))
    records = datasets.Dataset.from_generator(coco_records, features=features, **how)
    return records, names, ids, has_masks


def _check_entries(file: Path, content: dict):
    """Raise ValueError, with the first entry that lacks something, if a file is not one of COCO's instances."""
    needed = dict(images=("id", "file_name"), annotations=("image_id", "category_id"), categories=("id", "name"))
    for part, keys in needed.items():
        if not isinstance(content, dict) or not isinstance(content.get(part), list):
            raise ValueError(f"{file} has no list of {part}: it is no file of COCO's instances")
        for number, entry in enumerate(content[part]):
            missing = [key for key in keys if not isinstance(entry, dict) or entry.get(key) is None]
            if missing:
                raise ValueError(f"{file}: number {number} of its {part} has no {' and no '.join(missing)}")


def coco_records(file: str, place: str, version: tuple, ids: tuple[int, ...], boxes: str) -> Iterator[dict]:
    """A record for each picture of a file of COCO. ``version`` is only for the cache of ``datasets``."""
    content = json.loads(Path(file).read_text(encoding="utf-8-sig"))
    category = {number: i for i, number in enumerate(ids)}
    objects = {}
    for each in content["annotations"]:
        kept = {key: each[key] for key in ("area", "iscrowd", "segmentation") if key in each}
        kept |= dict(bbox=_box(each, boxes), category=category.get(each["category_id"], -1))
        objects.setdefault(each["image_id"], []).append(kept)
    for image in sorted(content["images"], key=lambda image: str(image["file_name"])):
        size = [image.get("width"), image.get("height")]
        yield dict(
            image=dict(bytes=None, path=str(Path(place) / image["file_name"])),
            image_id=json.dumps(image["id"]),
            size=size if all(size) else None,
            objects=json.dumps(objects.get(image["id"], [])),
        )


def _box(annotation: dict, boxes: str) -> list[float]:
    """The box of an annotation, by default that around its polygons. Raises ValueError if it has neither."""
    box, polygons = annotation.get("bbox"), annotation.get("segmentation")
    if isinstance(box, list) and len(box) == 4:
        return _left_top_width_height(box, boxes)
    if not isinstance(polygons, list) or not any(polygons):
        raise ValueError(f"annotation {annotation.get('id')} has neither a box of four numbers nor polygons")
    polygons = polygons if isinstance(polygons[0], list) else [polygons]
    x, y = ([value for polygon in polygons for value in polygon[start::2]] for start in (0, 1))
    return [min(x), min(y), max(x) - min(x), max(y) - min(y)]


def _place_of_pictures(file: Path, images: list[dict]) -> Path:
    """Where the pictures lie that a file of annotations names. Raises FileNotFoundError."""
    root, name = file.parent.parent, file.stem.removeprefix("instances_")
    places = [file.parent, root / name, root / "images" / name, root / "images", root]
    for image in images[:10]:
        for place in places:
            if (place / image["file_name"]).is_file():
                return place
    example = images[0]["file_name"] if images else "none"
    raise FileNotFoundError(f"the pictures of {file}, such as {example}, are not in {', '.join(map(str, places))}")
