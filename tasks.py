"""What ``dense.py`` trains and tests: segmentation and detection, with one set of methods.

Letters in shapes: ``b`` batch, ``c`` channels, ``k`` objects, ``H``/``W`` image height/width in pixels.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.transforms import v2

import cli
import data
import overlays
import scores
from detector import Detector
from instances import Instances, rle
from label_maps import IGNORED, LabelMaps
from readers import Share
from scenes import LabelCrop, ObjectCrop, Scenes, apart, each_scene
from segmenter import Segmenter

SHOWN_SCORE = 0.5  # of the boxes that are drawn
MOST_IN_LEGEND = 24  # classes
BAND = 2**26  # logits that are held at once at the size of a picture


class Task(Protocol):
    """A model, how to train and to test it."""

    model: nn.Module
    metric: str  # the name of the score that counts
    prepare: "Prepare"

    def augment(self, scale: tuple[float, float]) -> Callable[[dict], dict]:
        """What turns a scene into a training crop and its target."""

    def loss(self, trained: nn.Module, images: Tensor, targets: dict[str, Tensor]) -> Tensor:
        """The loss of normalised crops (b, c, H, W); ``trained`` is the model to call."""

    def predict(self, scene: dict):
        """The prediction for a prepared scene, at the picture's own size: what ``draw`` and ``test`` take."""

    def test(self, scenes: Scenes, accelerator: Accelerator, **options) -> dict:
        """The scores on all pictures, in the main process; ``options`` are those of :func:`predictions`."""

    def draw(self, scene: dict, found) -> tuple[Tensor, ...]:
        """The picture, the truth if it is known, and the prediction: (3, H, W) uint8 each."""

    def legend(self) -> dict[str, tuple]:
        """The colours, 0 ... 1, of the first classes, where names are not drawn."""

    @staticmethod
    def describe(found: dict) -> str:
        """The scores in a line."""


class Prepare(NamedTuple):
    """Adds to a scene the "input" of the model, in a worker process: the picture at another size.

    Its short side becomes ``side``, or with ``longest`` its long side. Sides are rounded to multiples
    of ``multiple``; without ``longest``, no side becomes shorter than ``side``.
    """

    side: int
    multiple: int = 1
    longest: bool = False

    def __call__(self, scene: dict) -> dict:
        size = scene["image"].shape[1:]
        factor = self.side / (max if self.longest else min)(size)
        least = 1 if self.longest else self.side
        size = tuple(max(least, round(length * factor / self.multiple) * self.multiple) for length in size)
        return scene | dict(input=v2.functional.resize(scene["image"].as_subclass(Tensor), size))


def predictions(
    task: Task,
    scenes: Scenes,
    accelerator: Accelerator,
    *,
    workers: int,
    max_bad: float,
    stopped: Callable[[], int] = lambda: 0,
) -> Iterator[tuple[int, dict, object]]:
    """Index, scene and prediction of this process's share of the pictures, until it is ``stopped``.

    Broken pictures are left out and named. More than the share ``max_bad`` of all pictures raise
    TooManyBadImages, in all processes at once.
    """
    share, broken = Share(accelerator.process_index, accelerator.num_processes), []
    task.model.eval()
    bar = cli.progress_bar(len(scenes), "image", disable=not accelerator.is_main_process, leave=False)
    for index, scene, bad in each_scene(scenes, task.prepare, workers, share):
        bar.update(share.world)
        if stopped():
            break
        if bad:
            broken.append(bad)
            if len(broken) > max_bad * len(scenes):  # the rest is in vain
                break
            continue
        with accelerator.autocast():
            found = task.predict(scene)
        yield index, scene, found
    bar.close()
    broken = sorted(gather_object(broken))
    for picture in broken[:20]:
        accelerator.print(f"left out a broken picture: {picture.description}")
    if len(broken) > max_bad * len(scenes):
        with cli.reported_once(data.TooManyBadImages):
            raise data.TooManyBadImages(
                f"{len(broken)} of {len(scenes)} pictures are broken, more than --max-bad-images {max_bad}"
            )


def normalized(image: Tensor, model: nn.Module) -> Tensor:
    """A picture (c, H, W) uint8 as a normalised batch of one, on the device of the model."""
    device = next(model.parameters()).device
    return data.normalize(data.to_device(image, device)[None], *model.statistics)


# ------------------------------------------------------------------------------ segmentation


class Segmentation:
    """Label maps by a Segmenter.

    Its ``side`` is that of the crops, and the short side that pictures get for the test. They are seen
    whole, or with ``slide`` through a window of that side, whose places overlap by a third. ``predict``
    gives classes (H, W) int64; ``test`` the scores of :func:`scores.iou_scores`. Raises ValueError for
    a side that is no multiple of the patches.
    """

    metric = "miou"

    def __init__(self, model: Segmenter, slide: bool | None = None):
        self.model, self.side = model, model.arguments["side"]
        self.slide = model.arguments["slide"] if slide is None else slide
        p = model.encoder.patch_size
        if self.side % p:
            raise ValueError(f"--image-size must be a multiple of the patch size {p}, got {self.side}")
        self.prepare = Prepare(self.side, multiple=p)

    def augment(self, scale: tuple[float, float]) -> LabelCrop:
        return LabelCrop(self.side, scale)

    def loss(self, trained: nn.Module, images: Tensor, targets: dict[str, Tensor]) -> Tensor:
        return trained(images, targets["labels"].long())

    @torch.no_grad()
    def predict(self, scene: dict) -> Tensor:
        """The class of each pixel: (H, W) int64."""
        images, side = normalized(scene["input"], self.model), self.side
        if not self.slide:
            return classes_at(self.model(images), scene["image"].shape[1:])
        logits = torch.zeros(1, len(self.model.classes), *images.shape[2:], device=images.device)
        counts = torch.zeros(images.shape[2:], device=images.device)
        for top in window_starts(images.shape[2], side):
            for left in window_starts(images.shape[3], side):
                window = (..., slice(top, top + side), slice(left, left + side))
                logits[window] += self.model(images[window])
                counts[window] += 1
        return classes_at(logits / counts, scene["image"].shape[1:])

    def test(
        self, scenes: LabelMaps, accelerator: Accelerator, stopped: Callable[[], int] = lambda: 0, **options
    ) -> dict:
        count = len(scenes.classes)
        matrix = torch.zeros(count, count, dtype=torch.int64, device=accelerator.device)
        images = torch.zeros((), dtype=torch.int64, device=accelerator.device)
        for _, scene, found in predictions(self, scenes, accelerator, stopped=stopped, **options):
            truth = data.to_device(scene["labels"].as_subclass(Tensor), found.device)
            matrix += scores.confusion(found, truth, count, IGNORED)
            images += 1
        signals = torch.tensor(stopped(), device=accelerator.device)
        matrix, images, signals = (accelerator.reduce(each) for each in (matrix, images, signals))
        if signals:  # by a signal: a part of the pictures gives no score
            return {}
        if not matrix.any():
            raise ValueError("none of the pictures to test on has a pixel of a known class")
        return scores.iou_scores(matrix.cpu(), scenes.classes) | dict(images=int(images))

    def draw(self, scene: dict, found: Tensor) -> tuple[Tensor, ...]:
        image, count = scene["image"], len(self.model.classes)
        truth = [overlays.tinted(image, scene["labels"].as_subclass(Tensor), count)] if "labels" in scene else []
        return overlays.three_channels(image), *truth, overlays.tinted(image, found, count)

    def legend(self) -> dict[str, tuple]:
        names = self.model.classes[:MOST_IN_LEGEND]
        return dict(zip(names, (overlays.palette(len(names)) / 255).tolist()))

    @staticmethod
    def describe(found: dict) -> str:
        names = dict(miou="mIoU", mean_accuracy="mean accuracy", pixel_accuracy="pixel accuracy")
        return ", ".join(f"{title} {found[name]:.2f} %" for name, title in names.items())


def window_starts(length: int, side: int) -> list[int]:
    """Where windows of ``side`` begin that cover ``length`` pixels, each 2/3 of a side after the last or less."""
    count = 1 + max(0, -(-(length - side) // (side * 2 // 3)))
    return np.linspace(0, length - side, count).round().astype(int).tolist()


def classes_at(logits: Tensor, size: Sequence[int]) -> Tensor:
    """The class (H, W) of each pixel of ``size``, from logits (1, classes, h, w), interpolated bilinearly.

    In bands of rows: the logits of a photograph of 12 megapixels in 150 classes would take 7 GB.
    """
    (height, width), h = size, logits.shape[2]
    logits = F.interpolate(logits, (h, width), mode="bilinear", align_corners=False)[0]
    rows = max(1, BAND // (logits.shape[0] * width))
    place = ((torch.arange(height, device=logits.device) + 0.5) * (h / height) - 0.5).clamp(0, h - 1)
    above = place.floor().long()
    below, weight = (above + 1).clamp(max=h - 1), (place - above)[:, None]
    found = []
    for band in torch.arange(height, device=logits.device).split(rows):
        mixed = torch.lerp(logits[:, above[band]], logits[:, below[band]], weight[band])
        found.append(mixed.argmax(dim=0))
    return torch.cat(found)


# ------------------------------------------------------------------------------ detection


class Detection:
    """Boxes and masks by a Detector.

    Its ``side`` is that of the crops, and the long side of pictures in the test. ``test`` gives
    "box_ap", "mask_ap" and the other values of :func:`scores.average_precision`, {} outside the main
    process. Raises ValueError for a side that does not suit the model.
    """

    metric = "box_ap"

    def __init__(self, model: Detector):
        self.model, self.side = model, model.arguments["side"]
        if self.side % model.multiple:
            raise ValueError(
                f"--image-size must be a multiple of {model.multiple}, the stride of the coarsest map, got {self.side}"
            )
        self.prepare = Prepare(self.side, longest=True)

    def augment(self, scale: tuple[float, float]) -> ObjectCrop:
        return ObjectCrop(self.side, scale)

    def loss(self, trained: nn.Module, images: Tensor, targets: dict[str, Tensor]) -> Tensor:
        return trained(images, [tuple(images.shape[2:])] * len(images), apart(targets))

    @torch.no_grad()
    def predict(self, scene: dict) -> list[dict]:
        """The objects, in COCO's result format but for image and category: "bbox", "score", "label", "segmentation"."""
        images, (height, width) = normalized(scene["input"], self.model), scene["image"].shape[1:]
        h, w = images.shape[2:]
        images = F.pad(images, (0, -w % self.model.multiple, 0, -h % self.model.multiple))
        found = self.model(images, [(h, w)])[0]
        found = {name: values if values is None else values.cpu() for name, values in found.items()}  # one wait for all
        boxes = found["boxes"] * torch.tensor([width / w, height / h] * 2)
        results = [
            dict(bbox=[left, top, right - left, bottom - top], score=score, label=label)
            for (left, top, right, bottom), score, label in zip(
                boxes.tolist(), found["scores"].tolist(), found["labels"].tolist()
            )
        ]
        if found["masks"] is not None:  # one by one: at the size of a photograph they are large
            for result, mask, box in zip(results, found["masks"], boxes):
                shape = paste_masks_in_image(mask[None], box[None], (height, width))[0, 0] >= 0.5
                result["segmentation"] = rle.encode(np.asfortranarray(shape.numpy().astype(np.uint8)))
        return results

    def test(self, scenes: Instances, accelerator: Accelerator, **options) -> dict:
        images, truth, results = [], [], []
        for index, scene, found in predictions(self, scenes, accelerator, **options):
            height, width = scene["image"].shape[1:]
            images.append(dict(id=index, height=height, width=width))
            truth += [dict(each, image_id=index, category_id=each["category"]) for each in scene["objects"]]
            results += coco_results(found, index)
        images, truth, results = gather_object(images), gather_object(truth), gather_object(results)
        if not accelerator.is_main_process:
            return {}
        kinds = dict(box="bbox") | (dict(mask="segm") if scenes.has_masks and self.model.arguments["masks"] else {})
        found = dict(images=len(images))
        for name, kind in kinds.items():
            part = scores.average_precision(images, truth, results, scenes.classes, kind)
            found |= {f"{name}_{key}": value for key, value in part.items()}
        self.results = results  # for detections.json
        return found

    def draw(self, scene: dict, found: list[dict]) -> tuple[Tensor, ...]:
        drawn = [overlays.boxed(scene["image"], torch.empty(0, 4), None, [], [])]
        parts = [[dict(each, label=each["category"]) for each in scene["objects"]]] if "objects" in scene else []
        for objects in [*parts, [each for each in found if each["score"] >= SHOWN_SCORE]]:
            boxes = torch.tensor([each["bbox"] for each in objects], dtype=torch.float32).reshape(-1, 4)
            boxes[:, 2:] += boxes[:, :2]
            masks = None
            if objects and all("segmentation" in each for each in objects):
                masks = torch.from_numpy(np.stack([rle.decode(each["segmentation"]) for each in objects])).bool()
            labels = [each["label"] for each in objects]
            names = [
                self.model.classes[each["label"]] + (f" {each['score']:.2f}" if "score" in each else "")
                for each in objects
            ]
            drawn.append(overlays.boxed(scene["image"], boxes, masks, labels, names))
        return tuple(drawn)

    def legend(self) -> dict[str, tuple]:
        return {}

    @staticmethod
    def describe(found: dict) -> str:
        words = []
        for kind in ("box", "mask"):
            if f"{kind}_ap" in found:
                names = dict(ap="AP", ap50="AP50", ap75="AP75")
                scores_of = {title: found[f"{kind}_{name}"] for name, title in names.items()}
                values = [f"{k} undefined" if v is None else f"{k} {v:.2f}" for k, v in scores_of.items()]
                words.append(f"{kind} {', '.join(values)}")
        return "; ".join(words)


def coco_results(found: list[dict], image_id: int | str) -> list[dict]:
    """A picture's predictions in COCO's result format, with classes as category ids."""
    return [
        {"image_id": image_id, "category_id": each["label"]} | {key: each[key] for key in each if key != "label"}
        for each in found
    ]
