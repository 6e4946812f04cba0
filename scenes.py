"""Pictures together with what is to be found in them: batches for training, one by one for the test.

What reads them is a :class:`Scenes`, such as ``label_maps.LabelMaps`` and ``instances.Instances``. Every random
choice is a function of (seed, epoch, index of the picture).

Letters in shapes: ``b`` batch, ``c`` channels, ``k`` objects, ``H``/``W`` image height/width in pixels.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

import datasets
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes
from torchvision.transforms import v2

import data
import pixels
from batches import TrainBatches, check_division
from cropping import RandomStream, torch_seeds
from data import BadImage, BadImages
from instances import targets_of
from label_maps import IGNORED
from pixels import PixelFormat
from readers import MapReader, Plan, Request, Share, shared, worker_options

GREY = [round(255 * value) for value in data.MEAN]  # of what lies beyond a picture
MOST_OF_ONE_CLASS = 0.75  # of the labelled pixels of a crop, where ten draws allow it


class Scenes(Protocol):
    """Pictures with labels or objects; ``records`` has the undecoded column image."""

    records: datasets.Dataset
    classes: list[str]
    form: PixelFormat

    def __len__(self) -> int: ...

    def read(self, index: int) -> dict:
        """A picture as "image" (c, H, W), its "name", and what is known of it. Raises any error if it is broken."""

    def select(self, indices: Sequence[int]) -> "Scenes":
        """Some of the pictures."""


class Pictures:
    """Pictures of which nothing is known; ``classes`` and ``category_ids`` are those of a model."""

    def __init__(self, records: datasets.Dataset, classes: list[str], form: PixelFormat, category_ids=None):
        self.records, self.classes, self.form = records.select_columns(["image"]), classes, form
        self.category_ids = category_ids or list(range(len(classes)))

    def __len__(self) -> int:
        return len(self.records)

    def image_ids(self) -> list[int]:
        return list(range(len(self)))

    def read(self, index: int) -> dict:
        record = self.records[index]
        image = pixels.to_tensor(data.open_picture(record["image"], self.form))
        return dict(image=tv_tensors.Image(image), name=data.name_of(record["image"], index))


def hold_out(scenes: Scenes) -> tuple[Scenes, Scenes]:
    """``scenes`` without every tenth, and these. Raises ValueError if there are fewer than ten."""
    held_out = range(9, len(scenes), 10)
    if not held_out:
        raise ValueError(f"{len(scenes)} pictures are too few to hold some out for the test: name a --test-split")
    return scenes.select([i for i in range(len(scenes)) if i not in held_out]), scenes.select(held_out)


# ------------------------------------------------------------------------------ augmentation


class LabelCrop:
    """A random square of a picture and its label map: scaled, cropped, flipped, its colours distorted.

    The short side of the picture becomes ``side`` times a factor drawn from ``scale``. What lies
    beyond the picture is grey and IGNORED. Of ten crops the first is taken in which no class has
    more than MOST_OF_ONE_CLASS. Gives "image" (c, side, side) uint8 and "labels" (side, side) int64.
    """

    def __init__(self, side: int, scale: tuple[float, float], distort: bool = True):
        self.side, self.scale = side, scale
        self.distort = distortion() if distort else None

    def __call__(self, scene: dict) -> dict[str, Tensor]:
        parts = dict(image=scene["image"], labels=scene["labels"])
        parts = scaled(parts, self.side * draw(*self.scale) / min(parts["image"].shape[1:]))
        parts = padded(parts, self.side)
        for _ in range(10):
            found = cropped(parts, self.side)
            counts = torch.bincount(found["labels"][found["labels"] != IGNORED])
            if len(counts) and counts.max() <= MOST_OF_ONE_CLASS * counts.sum():
                break
        found = flipped_by_chance(found)
        image = found["image"].as_subclass(Tensor)
        if self.distort and image.shape[0] == 3:
            image = self.distort(image)
        return dict(image=image, labels=found["labels"].as_subclass(Tensor))


class ObjectCrop:
    """Large-scale jitter: a random square of a picture and its objects, scaled, cropped, flipped.

    The long side of the picture becomes ``side`` times a factor drawn from ``scale``. What lies beyond
    the picture is grey. Objects of which nothing is left are left out; the boxes of the others are
    those of what is left of their masks. Gives "image" (c, side, side) uint8, "boxes" (k, 4) float32
    left, top, right, bottom in pixels, "labels" (k,) int64, and "masks" (k, side, side) uint8 if known.
    """

    def __init__(self, side: int, scale: tuple[float, float]):
        self.side, self.scale = side, scale

    def __call__(self, scene: dict) -> dict[str, Tensor]:
        parts = targets_of(scene)
        labels = parts.pop("labels")
        parts = scaled(parts, self.side * draw(*self.scale) / max(parts["image"].shape[1:]))
        parts = flipped_by_chance(cropped(padded(parts, self.side), self.side))
        found = {name: values.as_subclass(Tensor) for name, values in parts.items()} | dict(labels=labels)
        image, boxes = found.pop("image"), found["boxes"].clamp(0, self.side)
        if "masks" in found:
            seen = found["masks"].flatten(1).bool().any(dim=1)
            boxes[seen] = masks_to_boxes(found["masks"][seen]) + torch.tensor([0, 0, 1, 1])
            boxes[~seen] = 0
        kept = (boxes[:, 2:] - boxes[:, :2]).min(dim=1).values >= 1
        found["boxes"] = boxes
        return dict(image=image) | {name: values[kept] for name, values in found.items()}


def draw(low: float, high: float) -> float:
    """A random number between the two."""
    return low + (high - low) * torch.rand(()).item()


def scaled(parts: dict, factor: float) -> dict:
    """Pictures, label maps, boxes and masks of a scene, ``factor`` times as large."""
    size = [max(1, round(length * factor)) for length in parts["image"].shape[1:]]
    return {name: v2.functional.resize(part, size) for name, part in parts.items()}


def padded(parts: dict, side: int) -> dict:
    """Parts of a scene, at the right and at the bottom filled up to ``side``: grey, IGNORED, no object."""
    height, width = parts["image"].shape[1:]
    beyond = [0, 0, max(0, side - width), max(0, side - height)]
    if not any(beyond):
        return parts
    fills = dict(image=grey(parts["image"]), labels=IGNORED)
    return {name: v2.functional.pad(part, beyond, fill=fills.get(name, 0)) for name, part in parts.items()}


def cropped(parts: dict, side: int) -> dict:
    """A random square of parts of a scene."""
    top, left = (int(torch.randint(length - side + 1, ())) for length in parts["image"].shape[1:])
    return {name: v2.functional.crop(part, top, left, side, side) for name, part in parts.items()}


def flipped_by_chance(parts: dict) -> dict:
    """Parts of a scene, with probability 1/2 mirrored."""
    if torch.rand(()) < 0.5:
        return parts
    return {name: v2.functional.horizontal_flip(part) for name, part in parts.items()}


def grey(image: Tensor) -> list[int]:
    """The colour of what lies beyond a picture."""
    return GREY if image.shape[0] == 3 else [128] * image.shape[0]


def distortion() -> Callable[[Tensor], Tensor]:
    """Photometric distortion: brightness, contrast, saturation and hue, each with probability 1/2."""
    strengths = dict(brightness=32 / 255), dict(contrast=0.5), dict(saturation=0.5), dict(hue=18 / 180)
    return v2.Compose([v2.RandomApply([v2.ColorJitter(**strength)], p=0.5) for strength in strengths])


# ------------------------------------------------------------------------------ training


class SceneBatch(NamedTuple):
    """Crops for training: ``images`` (b, c, H, W) uint8, and the ``indices`` (b,) of their pictures.

    ``targets``: "labels" (b, H, W) int16; or of all pictures one after the other "boxes" (k, 4),
    "labels" (k,) and "masks" (k, H, W), and their "counts" (b,). ``bad``: the broken pictures met.
    """

    images: Tensor
    targets: dict[str, Tensor]
    indices: np.ndarray
    bad: list[BadImage]


class SceneBatches(TrainBatches):
    """Shuffled batches of scenes, augmented: ``for batch in batches.epoch(e)``, as of ``batches.TrainBatches``.

    ``augment`` turns what ``scenes.read`` returns into an "image" and its target. Raises ValueError
    if a step does not divide evenly or takes more pictures than there are.
    """

    def __init__(
        self,
        scenes: Scenes,
        augment: Callable[[dict], dict],
        batch_size: int,
        *,
        accumulate: int = 1,
        seed: int = 0,
        workers: int = 0,
        device: torch.device | str = "cpu",
        share: Share = Share(),  # noqa: B008
        max_bad: float = 0.01,
    ):
        length = len(scenes)
        check_division(length, batch_size, accumulate, share)
        self.length, self.share, self.device = length, share, torch.device(device)
        self.plan = Plan(length, batch_size, accumulate, seed, share)
        self.bad, self.lengths = BadImages(length, max_bad), {}
        crops = SceneCrops(scenes, augment, seed, tries=int(max_bad * length) + 1)
        self.reader = MapReader(crops, 0, self.plan, workers, self.device)  # the size is that of ``augment``

    def _check_and_move(self, batches) -> Iterator[SceneBatch]:
        for batch in super()._check_and_move(batches):
            moved = {
                name: values if name == "counts" else values.to(self.device, non_blocking=True)  # read on the host
                for name, values in batch.targets.items()
            }
            yield batch._replace(targets=moved)


class SceneCrops(torch.utils.data.Dataset):
    """Answers the requests of a MapReader in worker processes."""

    def __init__(self, scenes: Scenes, augment: Callable[[dict], dict], seed: int, tries: int):
        self.scenes, self.augment, self.seed, self.tries = scenes, augment, seed, tries

    def __getitem__(self, request: Request) -> SceneBatch:
        epoch, indices, _ = request
        seeds = torch_seeds((self.seed, epoch, RandomStream.AUGMENT), indices)
        crops, bad = [], {}
        with torch.random.fork_rng(devices=[]):
            for index, seed in zip(indices, seeds):
                crop = self._crop_or_next(int(index), seed, bad)
                if crop is None:  # too many are broken: the caller stops
                    return SceneBatch(torch.empty(0), {}, indices, list(bad.values()))
                crops.append(crop)
        images = torch.stack([crop.pop("image") for crop in crops])
        return SceneBatch(shared(images), in_shared_memory(joined(crops)), indices, list(bad.values()))

    def _crop_or_next(self, index: int, seed: int, bad: dict[int, BadImage]) -> dict | None:
        """A crop of scene ``index`` or of the next one that can be read, or None. Adds the broken ones to ``bad``."""
        for i in range(index, index + self.tries):
            i = i % len(self.scenes)
            if i in bad:  # met before
                continue
            torch.default_generator.manual_seed(seed)
            try:
                return self.augment(self.scenes.read(i))
            except Exception as error:  # a decoder raises anything on a broken file
                bad[i] = describe(self.scenes, i, error)
        return None


def joined(targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The targets of a :class:`SceneBatch`: few tensors, because each takes a file handle on its way."""
    if "boxes" not in targets[0]:
        return dict(labels=torch.stack([target["labels"] for target in targets]).to(torch.int16))
    together = {name: torch.cat([target[name] for target in targets]) for name in targets[0]}
    return together | dict(counts=torch.tensor([len(target["boxes"]) for target in targets]))


def apart(targets: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The boxes, labels and masks of each picture of a :class:`SceneBatch`."""
    counts = targets["counts"].tolist()
    parts = {name: values.split(counts) for name, values in targets.items() if name != "counts"}
    return [{name: values[i] for name, values in parts.items()} for i in range(len(counts))]


def in_shared_memory(scene: dict) -> dict:
    """``scene`` with its tensors in shared memory, if this is a worker process."""
    return {name: shared(values) if isinstance(values, Tensor) else values for name, values in scene.items()}


def describe(scenes: Scenes, index: int, error: Exception) -> BadImage:
    """A broken picture: its name, or its number, and the reason."""
    return data.describe_bad(index, scenes.records[index]["image"], error)


# ------------------------------------------------------------------------------ test


class WholeScenes(torch.utils.data.Dataset):
    """Pictures by index, each with its index and, of a broken one, the reason.

    ``prepare`` turns what ``scenes.read`` returns into what the test needs, in worker processes. A
    broken picture gives None and the reason.
    """

    def __init__(self, scenes: Scenes, prepare: Callable[[dict], dict]):
        self.scenes, self.prepare = scenes, prepare

    def __getitem__(self, index: int) -> tuple[int, dict | None, BadImage | None]:
        try:
            return index, in_shared_memory(self.prepare(self.scenes.read(index))), None
        except Exception as error:
            return index, None, describe(self.scenes, index, error)


def each_scene(
    scenes: Scenes, prepare: Callable[[dict], dict], workers: int, share: Share
) -> Iterable[tuple[int, dict | None, BadImage | None]]:
    """Index, scene and, of a broken picture, the reason: every picture once over all processes."""
    return DataLoader(
        WholeScenes(scenes, prepare),
        batch_size=None,
        sampler=range(share.rank, len(scenes), share.world),
        **worker_options(workers),
    )
