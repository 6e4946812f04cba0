"""What ``dense.py`` trains and tests: segmentation and detection, with one set of methods.

Letters in shapes: ``b`` batch, ``c`` channels, ``k`` objects, ``H``/``W`` image height/width in pixels.
"""

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import paste_masks_in_image
from tqdm import tqdm

import cli
import data
import overlays
import scores
from detector import Detector
from instances import Instances, rle
from label_maps import IGNORED, LabelMaps
from readers import Share
from run import lost_processes
from scenes import LabelCrop, ObjectCrop, Scenes, each_scene, resize
from segmenter import Segmenter

SHOWN_SCORE = 0.5  # of the boxes that are drawn


class Task(Protocol):
    """A model, how to train and to test it."""

    model: nn.Module
    metric: str  # the name of the score that counts

    def augment(self, scale: tuple[float, float]):
        """What turns a scene into a training crop and its target."""

    def loss(self, trained: nn.Module, images: Tensor, targets: list[dict[str, Tensor]]) -> Tensor:
        """The loss of normalised crops (b, c, H, W); ``trained`` is the model to call."""

    def prepare(self, scene: dict) -> dict:
        """Add what a prediction needs to a scene, in a worker process."""

    def predict(self, scene: dict):
        """The prediction for a prepared scene, at the picture's own size."""

    def test(self, scenes: Scenes, accelerator: Accelerator, workers: int, max_bad: float) -> dict:
        """The scores on all pictures, in the main process."""

    def draw(self, scene: dict, found) -> tuple[Tensor, ...]:
        """The picture, the truth if it is known, and the prediction: (3, H, W) uint8 each."""


def predictions(
    task: Task, scenes: Scenes, accelerator: Accelerator, workers: int, max_bad: float
) -> Iterator[tuple[int, dict, object]]:
    """Index, scene and prediction of this process's share of the pictures.

    Broken pictures are left out and named. More than the share ``max_bad`` of all pictures raise
    TooManyBadImages, in all processes at once.
    """
    share, broken = Share(accelerator.process_index, accelerator.num_processes), []
    task.model.eval()
    bar = tqdm(
        total=len(scenes),
        unit="image",
        disable=not accelerator.is_main_process,
        leave=False,
        mininterval=cli.seconds_between_updates(),
    )
    with lost_processes(share.world):
        for index, scene, bad in each_scene(scenes, task.prepare, workers, share):
            bar.update(share.world)
            if bad:
                broken.append(bad)
                continue
            with torch.no_grad(), accelerator.autocast():
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


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def normalized(image: Tensor, model: nn.Module) -> Tensor:
    """A picture (c, H, W) uint8 as a normalised batch of one, on the device of the model."""
    return data.normalize(data.to_device(image, device_of(model))[None], *model.statistics)


# ------------------------------------------------------------------------------ segmentation


class Segmentation:
    """Label maps by a Segmenter.

    ``side``: of the crops; also the short side that pictures get for the test. They are seen whole,
    or with ``slide`` through a window of that side, whose places overlap by a third.
    """

    metric, scales = "miou", (0.5, 2.0)

    def __init__(self, model: Segmenter, side: int, slide: bool = False):
        p = model.encoder.patch_size
        if side % p:
            raise ValueError(f"--image-size must be a multiple of the patch size {p}, got {side}")
        self.model, self.side, self.slide = model, side, slide

    def augment(self, scale: tuple[float, float]) -> LabelCrop:
        return LabelCrop(self.side, scale)

    def loss(self, trained: nn.Module, images: Tensor, targets: list[dict[str, Tensor]]) -> Tensor:
        return trained(images, torch.stack([target["labels"] for target in targets]))

    def prepare(self, scene: dict) -> dict:
        p, size = self.model.encoder.patch_size, scene["image"].shape[1:]
        factor = self.side / min(size)
        size = tuple(max(self.side, round(length * factor / p) * p) for length in size)
        return scene | dict(input=resize(scene["image"], size))

    def predict(self, scene: dict) -> Tensor:
        """The class of each pixel: (H, W) int64."""
        images, size = normalized(scene["input"], self.model), scene["image"].shape[1:]
        if not self.slide:
            logits = self.model(images)
        else:
            logits, counts = 0, torch.zeros(images.shape[2:], device=images.device)
            for top in window_starts(images.shape[2], self.side):
                for left in window_starts(images.shape[3], self.side):
                    window = images[..., top : top + self.side, left : left + self.side]
                    beyond = images.shape[3] - left - self.side, images.shape[2] - top - self.side
                    logits = logits + F.pad(self.model(window), (left, beyond[0], top, beyond[1]))
                    counts[top : top + self.side, left : left + self.side] += 1
            logits = logits / counts
        return F.interpolate(logits, tuple(size), mode="bilinear", align_corners=False)[0].argmax(dim=0)

    def test(self, scenes: LabelMaps, accelerator: Accelerator, workers: int, max_bad: float) -> dict:
        count = len(scenes.classes)
        matrix = torch.zeros(count, count, dtype=torch.int64, device=accelerator.device)
        images = torch.zeros((), dtype=torch.int64, device=accelerator.device)
        for _, scene, found in predictions(self, scenes, accelerator, workers, max_bad):
            truth = data.to_device(scene["labels"].as_subclass(Tensor), found.device)
            matrix += scores.confusion(found, truth, count, IGNORED)
            images += 1
        matrix, images = accelerator.reduce(matrix), accelerator.reduce(images)
        return scores.iou_scores(matrix.cpu(), scenes.classes) | dict(images=int(images))

    def draw(self, scene: dict, found: Tensor) -> tuple[Tensor, ...]:
        image, count = scene["image"], len(self.model.classes)
        truth = [overlays.tinted(image, scene["labels"].as_subclass(Tensor), count)] if "labels" in scene else []
        return overlays.three_channels(image), *truth, overlays.tinted(image, found, count)

    @staticmethod
    def describe(found: dict) -> str:
        """The scores in a line."""
        names = dict(miou="mIoU", mean_accuracy="mean accuracy", pixel_accuracy="pixel accuracy")
        return ", ".join(f"{title} {found[name]:.2f} %" for name, title in names.items())


def window_starts(length: int, side: int) -> list[int]:
    """Where windows of ``side`` begin that cover ``length`` pixels, each 2/3 of a side after the last or less."""
    count = 1 + max(0, -(-(length - side) // (side * 2 // 3)))
    return np.linspace(0, length - side, count).round().astype(int).tolist()


# ------------------------------------------------------------------------------ detection


class Detection:
    """Boxes and masks by a Detector. ``side``: of the crops; also the long side that pictures get for the test."""

    metric, scales = "box_ap", (0.1, 2.0)

    def __init__(self, model: Detector, side: int):
        if side % model.multiple:
            raise ValueError(f"--image-size must be a multiple of {model.multiple} (four patches), got {side}")
        self.model, self.side = model, side

    def augment(self, scale: tuple[float, float]) -> ObjectCrop:
        return ObjectCrop(self.side, scale)

    def loss(self, trained: nn.Module, images: Tensor, targets: list[dict[str, Tensor]]) -> Tensor:
        return trained(images, [tuple(images.shape[2:])] * len(images), targets)

    def prepare(self, scene: dict) -> dict:
        size = scene["image"].shape[1:]
        factor = self.side / max(size)
        size = tuple(max(1, round(length * factor)) for length in size)
        return scene | dict(input=resize(scene["image"], size))

    def predict(self, scene: dict) -> list[dict]:
        """The objects, in COCO's result format but for image and category: "bbox", "score", "label", "segmentation"."""
        images, (height, width) = normalized(scene["input"], self.model), scene["image"].shape[1:]
        h, w = images.shape[2:]
        images = F.pad(images, (0, -w % self.model.multiple, 0, -h % self.model.multiple))
        found = self.model(images, [(h, w)])[0]
        boxes = found["boxes"] * torch.tensor([width / w, height / h] * 2, device=images.device)
        results = [
            dict(bbox=[left, top, right - left, bottom - top], score=score, label=label)
            for (left, top, right, bottom), score, label in zip(
                boxes.tolist(), found["scores"].tolist(), found["labels"].tolist()
            )
        ]
        if found["masks"] is not None and results:
            shapes = paste_masks_in_image(found["masks"], boxes, (height, width))[:, 0] >= 0.5
            stack = np.asfortranarray(shapes.cpu().numpy().transpose(1, 2, 0).astype(np.uint8))
            for result, segmentation in zip(results, rle.encode(stack)):
                result["segmentation"] = segmentation
        return results

    def test(self, scenes: Instances, accelerator: Accelerator, workers: int, max_bad: float) -> dict:
        images, truth, results = [], [], []
        for index, scene, found in predictions(self, scenes, accelerator, workers, max_bad):
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

    @staticmethod
    def describe(found: dict) -> str:
        """The scores in a line."""
        words = []
        for kind in ("box", "mask"):
            if f"{kind}_ap" in found:
                names = dict(ap="AP", ap50="AP50", ap75="AP75")
                values = [f"{title} {found[f'{kind}_{name}'] or 0:.2f}" for name, title in names.items()]
                words.append(f"{kind} {', '.join(values)}")
        return "; ".join(words)


def coco_results(found: list[dict], image_id: int | str) -> list[dict]:
    """A picture's predictions in COCO's result format, with classes as category ids."""
    return [
        {"image_id": image_id, "category_id": each["label"]} | {key: each[key] for key in each if key != "label"}
        for each in found
    ]
