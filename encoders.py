"""One small contract for every encoder that is judged: our own, foreign ones, ``random`` and ``pixels``.

Letters in shapes: ``b`` batch, ``n`` patches, ``d`` width.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

import data
import smae


class Encoder(Protocol):
    """What an evaluation needs to know of an encoder."""

    image_size: tuple[int, int]  # height and width, in pixels, that it was made for
    statistics: tuple[Sequence[float], Sequence[float]]  # mean and standard deviation to normalise images with
    layers: list[int | str]  # names of the blocks; none if there are none
    pools: tuple[str, ...]  # ways to pool its patches, the default first
    backbone: smae.SMAE | None  # what can be fine-tuned

    def features(self, images: Tensor, layer: int | str | None = None) -> Tensor:
        """Patch tokens (b, n, d) of normalised images after a block (default: the last)."""

    def pooled(self, images: Tensor, how: str) -> Tensor:
        """What stands for each of the normalised images: (b, d) float32."""


class ViT(nn.Module):
    """The encoder of an SMAE."""

    def __init__(self, model: smae.SMAE):
        super().__init__()
        self.backbone, self.layers = model, model.layers
        self.image_size = tuple(model.config["image_size"])
        self.statistics = model.config["mean"], model.config["std"]
        self.pools = ("cls", "mean") if model.prefix else ("mean",)

    def features(self, images: Tensor, layer: int | str | None = None) -> Tensor:
        return self.backbone.features(images, len(self.backbone.blocks) if layer is None else layer)

    def pooled(self, images: Tensor, how: str) -> Tensor:
        return smae.pool(self.backbone.encode(images), how, self.backbone.prefix).float()


class FineTuned(ViT):
    """The encoder of a classifier, which pools as the classifier does."""

    def __init__(self, classifier: smae.Classifier):
        super().__init__(classifier.encoder)
        self.classifier, self.pools = classifier, (classifier.pool,)

    def pooled(self, images: Tensor, how: str) -> Tensor:
        return self.classifier.features(images).float()


class Pixels(nn.Module):
    """No encoder: the pixels themselves are the features."""

    pools, layers, backbone = ("cls", "mean"), [], None

    def __init__(self, image_size: int, patch_size: int = 8):
        super().__init__()
        self.image_size, self.patch_size = (image_size, image_size), patch_size
        self.statistics = data.MEAN, data.STD

    def features(self, images: Tensor, layer: int | str | None = None) -> Tensor:
        return smae.patchify(images, self.patch_size)

    def pooled(self, images: Tensor, how: str) -> Tensor:
        return images.flatten(1)


def load(name: str, *, heads: int | None = None, untrained: dict | None = None) -> Encoder:
    """The encoder that ``name`` stands for: a run folder or checkpoint, "random" or "pixels".

    ``untrained`` holds the constructor's arguments of a random encoder; "image_size" is also that of pixels. Raises
    FileNotFoundError or ValueError where there is no such encoder.
    """
    untrained = dict(image_size=64, patch_size=8) | smae.PRESETS["tiny"] | (untrained or {})
    if name == "pixels":
        return Pixels(untrained["image_size"])
    if name == "random":
        return ViT(smae.SMAE(**untrained).eval())
    model = smae.load(name, heads=heads)
    return FineTuned(model) if isinstance(model, smae.Classifier) else ViT(model)


def backbone(name: str, device: torch.device | str = "cpu", heads: int | None = None) -> smae.SMAE:
    """The SMAE of a run folder or checkpoint, without the head of a classifier."""
    model = smae.load(name, device, heads=heads)
    return model.encoder if isinstance(model, smae.Classifier) else model
