"""Batches of pictures: random crops for training, centre crops for evaluation.

    batches = TrainBatches(data.load_images("shapes"), size=64, batch_size=256)
    for batch in batches.epoch(1):
        batch.images  # (b, c, H, W) uint8, on the device

Letters in shapes: ``b`` batch, ``H``/``W`` image height/width in pixels.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import datasets
import torch
from datasets.distributed import split_dataset_by_node
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

import data
from cropping import CropOptions
from data import BadImage, BadImages
from pixels import RGB, PixelFormat, Size, pair
from readers import Batch, Plan, Share, make_reader, shared, worker_options, worker_place


class TrainBatches:
    """Shuffled, cropped batches: ``for batch in batches.epoch(e)``, epochs counted from 1.

    ``batches.epoch(e, seen)`` resumes an epoch after ``seen`` pictures.

    ``batch_size`` is that of a step, over all processes and ``accumulate`` micro-batches. One item
    is this process's part of one micro-batch, a :class:`Batch` with the crops on the device. The
    last pictures of an epoch are left out if they do not fill a step.

    ``labels``: also read the labels. ``preload``: keep decoded pictures on the "host" or "device".
    ``length``: the number of pictures in an epoch of a stream (default: the number it declares).
    ``scale``, ``augment``, ``form``: see :class:`cropping.CropOptions`.

    ``bad`` holds the broken pictures met so far (of a stream: in this epoch). More than the share
    ``max_bad`` raise TooManyBadImages; several processes must add theirs up and call
    ``bad.check()``. ``lengths``: of the pieces of a stream read so far; with them it resumes faster.
    Raises ValueError if a step does not divide evenly or takes more pictures than
    the data has.
    """

    def __init__(
        self,
        dataset: data.Dataset,
        size: Size,
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
        form: PixelFormat = RGB,
    ):
        streaming = isinstance(dataset, datasets.IterableDataset)
        length = data.length_of(dataset, length)
        check_division(length, batch_size, accumulate, share)
        if streaming and preload:
            raise ValueError("streamed data cannot be preloaded: drop --streaming or --preload")

        self.length, self.share, self.device = length, share, torch.device(device)
        self.plan = Plan(length, batch_size, accumulate, seed, share)
        self.bad = BadImages(length, max_bad, same_file_returns=streaming)
        self.lengths: dict[int, int] = {}
        self.reader = make_reader(
            dataset.select_columns(["image", "label"] if labels else ["image"]),
            CropOptions(size, scale, seed, bad_limit=int(max_bad * length) + 1, augment=augment, form=form),
            self.plan,
            self.bad,
            self.lengths,
            preload=preload,
            workers=workers,
            device=self.device,
        )

    @property
    def steps_per_epoch(self) -> int:
        return self.plan.steps_left()

    def epoch(self, epoch: int, seen: int = 0) -> Iterator[Batch]:
        """This process's micro-batches of an epoch after ``seen`` pictures."""
        return self._check_and_move(self.reader.epoch(epoch, seen))

    def uncropped(self, count: int | None = None, size: Size | None = None) -> Iterator[Batch]:
        """This process's share of all pictures (or ``count`` of them), stretched to one size.

        The batches are those of ``plan.uncropped`` that are not empty. ``size``: side, or height and
        width (default: that of the crops). Raises ValueError for a stream.
        """
        return self._check_and_move(self.reader.uncropped(count, size))

    def _check_and_move(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Record the broken pictures of each batch and copy the crops to the device."""
        for batch in batches:
            self.bad.add(batch.bad)
            if self.share.world == 1 or not len(batch.images):  # several processes stop together
                self.bad.check()
            yield batch._replace(images=batch.images.to(self.device, non_blocking=True))

    def close(self):
        """End the worker processes, which ignore a first signal. Nothing can be read afterwards."""
        self.reader.close()


def check_division(length: int | None, batch_size: int, accumulate: int, share: Share):
    """Raise ValueError if a step does not divide evenly or takes more pictures than the data has."""
    if batch_size % (share.world * accumulate):
        raise ValueError(
            f"the batch size ({batch_size}) must be a multiple of processes x accumulation steps "
            f"({share.world} x {accumulate})"
        )
    if not length:
        raise ValueError("the stream does not declare its number of images: set --max-images")
    if length < batch_size:
        raise ValueError(f"a batch of {batch_size} needs more images than the data has ({length}): lower --batch-size")


# --------------------------------------------------------------------------------- evaluation


class EvalBatch(NamedTuple):
    """Centre crops for evaluation.

    ``images`` (b, c, H, W) uint8, blank for broken pictures. ``indices`` (b,) int64. ``labels``
    (b,) int64, -1 without a label. ``names`` of the files. ``bad``: the reason for each broken
    picture, None for the others.
    """

    images: Tensor
    indices: Tensor
    labels: Tensor
    names: list[str]
    bad: list[BadImage | None]


class EvalBatches:
    """Every picture of a data set once, centre-cropped, in order: an iterable of EvalBatch.

    The pictures are divided over the processes. ``crop_ratio``: side of the crop, as a fraction of
    the short side of the picture. ``keep``: keep the crops in memory. ``max_bad``: the share of
    broken pictures that the caller should accept. ``length``: the number of pictures of all
    processes, None if unknown.
    """

    def __init__(
        self,
        dataset: data.Dataset,
        size: Size,
        batch_size: int,
        *,
        crop_ratio: float = 0.875,
        workers: int = 0,
        device: torch.device | str = "cpu",
        share: Share = Share(),  # noqa: B008
        keep: bool = False,
        max_bad: float = 0.01,
        form: PixelFormat = RGB,
    ):
        self.device, self.max_bad, self.form = torch.device(device), max_bad, form
        self.reported = False  # whether broken pictures have been named
        self.kept: list[EvalBatch] | None = [] if keep else None
        self.length: int | None = None
        columns = [name for name in ("image", "label") if name in (dataset.features or ["image"])]
        crops = EvalCrops(dataset.select_columns(columns), size, crop_ratio, form)
        sampler = None
        if isinstance(dataset, datasets.IterableDataset):
            crops = EvalStream(crops, share)
        else:
            self.length = len(dataset)
            sampler = range(share.rank, self.length, share.world)
        self.loader = DataLoader(
            crops,
            batch_size,
            sampler=sampler,
            pin_memory=self.device.type == "cuda",
            collate_fn=_collate,
            **worker_options(workers),
        )

    def __iter__(self) -> Iterator[EvalBatch]:
        if self.kept is not None and not self.kept:  # clones are not in shared memory, which takes open files
            self.kept = [
                EvalBatch(*(part.clone() if isinstance(part, Tensor) else part for part in batch))
                for batch in self.loader
            ]
        for batch in self.kept or self.loader:
            yield batch._replace(images=batch.images.to(self.device, non_blocking=True))


class EvalCrops(torch.utils.data.Dataset):
    """Prepares the pictures of EvalBatches in worker processes, one by one."""

    def __init__(self, dataset: data.Dataset, size: Size, ratio: float, form: PixelFormat = RGB):
        self.dataset, self.size, self.ratio, self.form = dataset, size, ratio, form

    def __getitem__(self, index: int) -> tuple:
        return self.prepare(index, self.dataset[index])

    def prepare(self, index: int, record: dict) -> tuple:
        image, bad = torch.zeros(self.form.channels, *pair(self.size), dtype=torch.uint8), None
        try:
            image = data.center_crop(data.open_picture(record["image"], self.form), self.size, self.ratio)
        except Exception as error:
            bad = data.describe_bad(index, record["image"], error)
        label = record.get("label")
        name = data.name_of(record["image"], index)
        return image, index, -1 if label is None else label, name, bad


class EvalStream(IterableDataset):
    """Prepares the pictures of a stream, whose shards are divided over worker processes.

    Indices are unique, but are not positions in the stream.
    """

    def __init__(self, crops: EvalCrops, share: Share):
        crops.dataset = split_dataset_by_node(crops.dataset, share.rank, share.world)
        self.crops, self.share = crops, share

    def __iter__(self) -> Iterator[tuple]:
        place, stride = worker_place(self.share)
        for number, record in enumerate(self.crops.dataset):
            yield self.crops.prepare(number * stride + place, record)


def _collate(pictures: list[tuple]) -> EvalBatch:
    images, indices, labels, names, bad = zip(*pictures)
    return EvalBatch(
        images=shared(torch.stack(images)),
        indices=torch.tensor(indices),
        labels=torch.tensor(labels),
        names=list(names),
        bad=list(bad),
    )
