"""One small interface for every encoder that is evaluated: our own, third-party ones, ``random`` and ``pixels``.

Also what encoders are judged by: something computed for every picture once, over all processes.

Letters in shapes: ``b`` batch, ``n`` patches, ``d`` width, ``k`` pictures.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

import checkpoint
import cli
import data
import probes
import smae
from batches import EvalBatches


class Encoder(Protocol):
    """What an evaluation needs to know of an encoder."""

    image_size: tuple[int, int]  # height and width, in pixels, that it was made for
    channels: int  # of the images
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
        self.channels, self.statistics = model.config["channels"], model.statistics
        self.pools = ("cls", "mean") if model.config["class_token"] else ("mean",)

    def features(self, images: Tensor, layer: int | str | None = None) -> Tensor:
        return self.backbone.features(images, len(self.backbone.blocks) if layer is None else layer)

    def pooled(self, images: Tensor, how: str) -> Tensor:
        return self.backbone.pooled(images, how).float()


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

    def __init__(self, image_size: data.Size, patch_size: int, channels: int):
        super().__init__()
        self.image_size, self.patch_size, self.channels = data.pair(image_size), patch_size, channels
        self.statistics = (data.MEAN, data.STD) if channels == 3 else ((0.5,) * channels, (0.25,) * channels)

    def features(self, images: Tensor, layer: int | str | None = None) -> Tensor:
        return smae.patchify(images, self.patch_size)

    def pooled(self, images: Tensor, how: str) -> Tensor:
        return images.flatten(1)


def load(name: str, *, heads: int | None = None, untrained: dict | None = None) -> Encoder:
    """The encoder that ``name`` stands for: a run folder, checkpoint or hub name, "random" or "pixels".

    ``untrained`` holds the constructor's arguments of a random encoder; "image_size" is also that
    of pixels, and of files without it whose positions form no square. Raises FileNotFoundError or
    ValueError where there is no such encoder.
    """
    size = (untrained or {}).get("image_size")
    untrained = dict(image_size=64, patch_size=8) | smae.PRESETS["tiny"] | (untrained or {})
    if name == "pixels":
        return Pixels(untrained["image_size"], untrained["patch_size"], untrained.get("channels", 3))
    if name == "random":
        return ViT(smae.SMAE(**untrained).eval())
    model = _load(name, heads=heads, image_size=size)
    return FineTuned(model) if isinstance(model, smae.Classifier) else ViT(smae.encoder_of(model))


def resized(encoder: smae.SMAE, image_size: data.Size) -> smae.SMAE:
    """A copy of an encoder, without decoder, whose own image size is ``image_size``, a side or (H, W).

    Learned positions are resized; computed ones are stretched, as they are when used.
    """
    config = encoder.config | dict(image_size=image_size, decoder_depth=0)
    if not config["learned_positions"]:
        config["position_size"] = config["position_size"] or encoder.config["image_size"]
    copy = smae.SMAE(**config)
    smae.initialise(copy, encoder, decoder=False)
    return copy


def backbone(
    name: str, device: torch.device | str = "cpu", heads: int | None = None, image_size: data.Size | None = None
) -> smae.SMAE:
    """The SMAE of a run folder or checkpoint, without the head of a classifier, segmenter or detector.

    ``image_size`` is that of files without it whose positions form no square.
    """
    return smae.encoder_of(_load(name, device, heads=heads, image_size=image_size))


def _load(name: str, device: torch.device | str = "cpu", *, heads: int | None, image_size: data.Size | None):
    try:
        return smae.load(name, device, heads=heads)
    except ValueError as error:
        if "do not form a square grid" not in str(error) or image_size is None:
            raise
        return smae.load(name, device, heads=heads, image_size=image_size)


# ------------------------------------------------------------------------------ every picture once


class Rows(NamedTuple):
    """What was computed for k pictures: ``values`` (k, ...), ``labels`` and ``indices`` (k,), file ``names``."""

    values: Tensor
    labels: Tensor
    indices: Tensor
    names: list[str]


def compute_rows(
    batches: EvalBatches, accelerator: Accelerator, statistics: tuple, compute: Callable[[Tensor, Tensor], Tensor]
) -> Iterator[Rows]:
    """``compute`` for normalised images and their indices, gathered batch by batch, in the order of the indices.

    Processes with fewer pictures take part until all are done, so that each picture comes exactly
    once. Leaves broken pictures out and names them, the first time. Raises TooManyBadImages, in the first process,
    if they exceed ``batches.max_bad``; ValueError if no picture can be decoded.
    """
    iterator, bad, good = iter(batches), [], 0
    bar = cli.progress_bar(batches.length, "image", disable=not accelerator.is_main_process, leave=False)
    while True:
        batch, mine = next(iterator, None), None
        if batch is not None:
            with torch.no_grad(), accelerator.autocast():
                values = compute(data.normalize(batch.images, *statistics), batch.indices).cpu()
            mine = (values, batch.labels, batch.indices, batch.names, batch.bad)
        everyone = [parts for parts in gather_object([mine]) if parts is not None]
        if not everyone:
            break

        values, labels, indices, names, reasons = zip(*everyone)
        values, labels, indices = torch.cat(values), torch.cat(labels), torch.cat(indices)
        names, reasons = list(itertools.chain(*names)), list(itertools.chain(*reasons))
        bad += [reason for reason in reasons if reason is not None]
        order = [i for i in indices.argsort().tolist() if reasons[i] is None]
        good += len(order)
        bar.update(len(reasons))
        if batches.length and len(bad) > batches.max_bad * batches.length:  # the rest is in vain
            break
        if order:
            yield Rows(values[order], labels[order], indices[order], [names[i] for i in order])
    bar.close()

    for picture in bad[: 0 if batches.reported else 20]:
        accelerator.print(f"left out a broken image: {picture.description}")
    batches.reported = True
    total = len(bad) + good
    if len(bad) > batches.max_bad * total:
        with cli.reported_once(data.TooManyBadImages):
            raise data.TooManyBadImages(
                f"{len(bad)} of {total} images are broken, more than --max-bad-images {batches.max_bad}"
            )
    if not good:
        raise ValueError("none of the pictures can be decoded")


def extract(encoder: Encoder, batches: EvalBatches, accelerator: Accelerator, pool: str) -> probes.Features:
    """Features (k, d) float32 and labels (k,) of all pictures, on the CPU of the main process (elsewhere: none).

    Raises ValueError if a label is hidden, a feature is not finite, or no picture can be decoded.
    """
    parts, labels = [], []

    def pooled(images: Tensor, indices: Tensor) -> Tensor:
        return encoder.pooled(images, pool)

    for rows in compute_rows(batches, accelerator, encoder.statistics, pooled):
        check_labels(rows.labels)
        check_finite(rows)
        if accelerator.is_main_process:
            parts.append(rows.values)
            labels.append(rows.labels)
    if not parts:
        return probes.Features(torch.empty(0, 0), torch.empty(0))
    values, end = torch.empty(sum(map(len, parts)), parts[0].shape[1]), 0
    parts.reverse()
    while parts:  # like torch.cat, but never holding everything twice
        part = parts.pop()
        values[end : end + len(part)] = part
        end += len(part)
    return probes.Features(values, torch.cat(labels))


def knn(
    encoder: Encoder,
    training: EvalBatches,
    tests: EvalBatches,
    accelerator: Accelerator,
    classes: int,
    pool: str | None = None,
    ks: Sequence[int] = (20,),
    temperature: float = 0.07,
) -> dict:
    """The accuracy of kNN with an encoder's features (:func:`probes.evaluate_knn`); {} outside the main process."""
    features = [extract(encoder, part, accelerator, pool or encoder.pools[0]) for part in (training, tests)]
    if not accelerator.is_main_process:
        return {}
    how = dict(ks=list(ks), classes=classes, temperature=temperature, device=accelerator.device)
    return probes.evaluate_knn(*features, **how)


class Watch:
    """kNN accuracy of a model's encoder now and then in its training, always on the same pictures.

    The training does not notice: random states and the mode of the model stay as they are.
    """

    def __init__(
        self, model: smae.SMAE, training: EvalBatches, tests: EvalBatches, accelerator: Accelerator, classes: int
    ):
        self.encoder, self.batches, self.accelerator, self.classes = ViT(model), (training, tests), accelerator, classes

    def measure(self) -> dict:
        """``knn``, in per cent, and the ``knn_seconds`` that it took; {} outside the main process."""
        start, states, model = time.perf_counter(), checkpoint.random_states(), self.encoder.backbone
        training = model.training
        model.eval()
        try:
            found = knn(self.encoder, *self.batches, self.accelerator, self.classes)
        except ValueError as error:  # it is no reason to stop the training
            self.accelerator.print(f"WARNING: no kNN accuracy: {error}")
            return {}
        finally:
            model.train(training)
            checkpoint.set_random_states(states)
        return dict(knn=found["top1"], knn_seconds=time.perf_counter() - start) if found else {}


def accuracy(classifier: nn.Module, batches: EvalBatches, accelerator: Accelerator) -> dict:
    """Top-1 and top-5 accuracy in per cent, and the number of images.

    ``classifier``: normalised images to logits; ``statistics`` to normalise with; ``classes``,
    their names. With fewer than five classes, top-5 counts all of them. Raises ValueError if a
    label is hidden, or no picture can be decoded.
    """
    hits, count, top = torch.zeros(2, dtype=torch.float64), 0, probes.top(len(classifier.classes))
    classifier.eval()

    def most_likely(images: Tensor, indices: Tensor) -> Tensor:  # (b, top)
        return classifier(images).topk(top).indices

    for rows in compute_rows(batches, accelerator, classifier.statistics, most_likely):
        check_labels(rows.labels)
        right = rows.values == rows.labels[:, None]
        hits += torch.stack([right[:, 0].sum(), right.sum()])
        count += len(right)
    top1, top5 = (100 * hits / count).tolist()
    return dict(top1=top1, top5=top5, images=count)


def check_finite(rows: Rows):
    """Raise ValueError if a feature is not finite: one such picture would spoil the accuracy of all."""
    if broken := (~rows.values.isfinite().all(dim=1)).nonzero().flatten().tolist():
        raise ValueError(f"{rows.names[broken[0]]} has features that are not finite: try --precision no")


def check_labels(labels: Tensor):
    """Raise ValueError if a label is -1, which stands for a hidden or missing one."""
    if (labels < 0).any():
        raise ValueError("some labels are hidden (-1 or none)")
