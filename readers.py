"""Three ways to read training pictures: by index, from memory, and from a stream.

:class:`MapReader` decodes pictures in every epoch, :class:`PreloadedReader` decodes them once,
:class:`StreamReader` reads the shards of a stream. All have the methods of :class:`Reader`.

Letters in shapes: ``b`` batch, ``H``/``W`` image height/width in pixels.
"""

import functools
import itertools
import math
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import datasets
import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

import data
import pixels
from cropping import CropOptions, Crops, crop_batch
from data import BadImage, BadImages
from pixels import Size, pair


class Share(NamedTuple):
    """This process's part of the work: ``rank`` of ``world`` processes."""

    rank: int = 0
    world: int = 1


class Plan(NamedTuple):
    """The division of ``length`` pictures over steps, processes and micro-batches.

    A step takes ``batch_size`` pictures. Each process reads its share of them in ``accumulate``
    micro-batches.
    """

    length: int
    batch_size: int
    accumulate: int
    seed: int
    share: Share

    @property
    def micro_batch_size(self) -> int:
        return self.batch_size // self.share.world // self.accumulate

    def steps_left(self, seen: int = 0) -> int:
        """The number of steps left in an epoch after ``seen`` pictures."""
        return (self.length - seen) // self.batch_size

    def micro_batches(self, epoch: int, seen: int = 0) -> np.ndarray:
        """This process's indices (micro-batches, b) in an epoch after ``seen`` pictures."""
        order = np.random.default_rng((self.seed, epoch)).permutation(self.length)
        steps = self.steps_left(seen)
        if not steps:
            return np.empty((0, self.micro_batch_size), np.int64)
        by_rank = rearrange(
            order[seen : seen + steps * self.batch_size],
            "(step micro rank b) -> rank (step micro) b",
            step=steps,
            micro=self.accumulate,
            rank=self.share.world,
        )
        return by_rank[self.share.rank]

    def uncropped(self, count: int | None = None) -> list[np.ndarray]:
        """Indices of this process's share of all pictures (or ``count`` evenly spaced ones), by batch.

        Process r of w gets every w-th of them, from number r on. All processes get the same number of
        batches; the last may be empty.
        """
        chosen = data.evenly_spaced(self.length, count or self.length)
        mine = chosen[self.share.rank :: self.share.world]
        largest_share = -(-len(chosen) // self.share.world)
        size = self.micro_batch_size
        return [mine[start : start + size] for start in range(0, largest_share, size)]


class Batch(NamedTuple):
    """Crops for training.

    ``images`` (b, c, H, W) uint8. ``indices`` (b,) int64, the key of their random numbers. ``bad``:
    the broken pictures met. ``labels`` (b,) int64; a broken picture has the label of its
    replacement. ``crops``: their boxes in the pictures, as fractions.
    """

    images: Tensor
    indices: np.ndarray
    bad: list[BadImage]
    labels: np.ndarray
    crops: Crops


class Reader(Protocol):
    """Reads the batches of this process."""

    def epoch(self, epoch: int, seen: int) -> Iterable[Batch]:
        """The micro-batches of an epoch after ``seen`` pictures."""

    def uncropped(self, count: int | None, size: Size | None) -> Iterable[Batch]:
        """Whole pictures in the order of ``Plan.uncropped``, stretched to ``size``."""

    def close(self):
        """End the worker processes."""


def make_reader(
    dataset: data.Dataset,
    options: CropOptions,
    plan: Plan,
    bad: BadImages,
    lengths: dict[int, int],
    *,
    preload: str | None,
    workers: int,
    device: torch.device,
) -> Reader:
    """Choose the reader for a data set; :class:`batches.TrainBatches` explains the arguments."""
    if isinstance(dataset, datasets.IterableDataset):
        return StreamReader(dataset, options, plan, bad, lengths, _loader_options(workers, device))
    if preload:
        store = torch.device("cpu") if preload == "host" else device
        return PreloadedReader(dataset, options, plan, bad, workers, store, device)
    return MapReader(MapCrops(dataset, options), options.size, plan, workers, device)


def _loader_options(workers: int, device: torch.device) -> dict:
    return dict(
        batch_size=None,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # resuming changes the state of the global one
        collate_fn=_as_they_are,
        **worker_options(workers),
    )


def _as_they_are(batch):
    """Keep arrays as they are: each tensor from a worker takes an open file."""
    return batch


def worker_options(workers: int) -> dict:
    """Options of a DataLoader for ``workers`` processes, which outlive the signals that stop a run.

    On Linux they are forked, as Python did by default before 3.14. A fork server would die of such a
    signal and its workers with it, and each worker would import torch before it heeds
    :func:`ignore_signals`.
    """
    forked = workers > 0 and sys.platform == "linux"
    return dict(
        num_workers=workers,
        worker_init_fn=ignore_signals,
        multiprocessing_context="fork" if forked else None,
    )


def ignore_signals(worker: int):
    """Let a worker outlive the signals that ask a whole process group to stop.

    A run stops in order and needs its workers for that. They end at SIGUSR2, which
    :meth:`Workers.end` sends, and at the second SIGTERM.
    """
    if not hasattr(signal, "SIGUSR1"):  # Windows has no process groups to be signalled
        return
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, _end_worker))
    signal.signal(signal.SIGUSR2, _end_worker)


def _end_worker(*_):
    os._exit(0)


def shared(images: Tensor) -> Tensor:
    """Move a batch to shared memory, if this is a worker process. Raises RuntimeError if that is full.

    The queue would do so in a thread whose errors nobody sees: the training would wait for ever.
    """
    return images.share_memory_() if get_worker_info() else images


class Workers:
    """The worker processes of a DataLoader.

    Python waits for them when it exits. One that waits itself, for a lock of a worker that was
    killed, would keep it waiting for ever: :meth:`end` ends them all.
    """

    def __init__(self):
        self.processes: set = set()

    def iterate(self, loader: DataLoader) -> Iterator:
        """The items of a loader, whose processes start now or have started before."""
        before = set(multiprocessing.active_children())
        iterator = iter(loader)
        self.processes |= set(multiprocessing.active_children()) - before
        yield from iterator

    def end(self):
        for process in self.processes:
            if process.is_alive() and hasattr(signal, "SIGUSR2"):
                os.kill(process.pid, signal.SIGUSR2)
        self.processes.clear()


# --------------------------------------------------------------------------------- by index


class Request(NamedTuple):
    """Pictures ``indices`` (b,) to read, at ``size``: side, or height and width, in pixels.

    Their crops are those of ``epoch``; if it is None, they stay whole.
    """

    epoch: int | None
    indices: np.ndarray
    size: Size


class IndexReader:
    """Base of the readers by index: turns epochs into requests."""

    def __init__(self, size: Size, plan: Plan):
        self.size, self.plan = size, plan

    def epoch(self, epoch: int, seen: int) -> Iterable[Batch]:
        micro_batches = self.plan.micro_batches(epoch, seen)
        return self.read([Request(epoch, indices, self.size) for indices in micro_batches])

    def uncropped(self, count: int | None, size: Size | None) -> Iterable[Batch]:
        size = size or self.size
        batches = [indices for indices in self.plan.uncropped(count) if len(indices)]
        return self.read([Request(None, indices, size) for indices in batches])

    def read(self, requests: list[Request]) -> Iterable[Batch]:
        raise NotImplementedError

    def close(self):
        pass


class MapReader(IndexReader):
    """Decodes and crops in worker processes, in every epoch; ``crops`` maps requests to batches."""

    def __init__(self, crops: torch.utils.data.Dataset, size: Size, plan: Plan, workers: int, device: torch.device):
        super().__init__(size, plan)
        self.requests: list[Request] = []  # the items of the loader
        self.workers = Workers()
        self.loader = DataLoader(
            crops,
            sampler=self.requests,
            persistent_workers=workers > 0,
            **_loader_options(workers, device),
        )

    def read(self, requests: list[Request]) -> Iterable[Batch]:
        self.requests[:] = requests
        return self.workers.iterate(self.loader)

    def close(self):
        self.loader = None
        self.workers.end()


class MapCrops(torch.utils.data.Dataset):
    """Answers the requests of :class:`MapReader` in worker processes."""

    def __init__(self, dataset: datasets.Dataset, options: CropOptions):
        self.dataset, self.options = dataset, options

    def __getitem__(self, request: Request) -> Batch:
        epoch, indices, size = request
        bad: dict[int, str] = {}

        # open the pictures, which tells their sizes
        opened = [self._next(int(index), bad) for index in indices]
        sizes = np.array([(picture.height, picture.width) for picture, _, _ in opened])
        labels = np.array([label for _, label, _ in opened])
        crops = self.options.crops(sizes, epoch, indices)

        def crop_another(picture: data.Picture, i: int) -> Tensor:
            sizes[i] = picture.height, picture.width
            own = self.options.crops(sizes[i : i + 1], epoch, indices[i : i + 1])
            crops.boxes[i], crops.flips[i] = own.boxes[0], own.flips[0]
            return pixels.crop(picture, crops.boxes[i], crops.flips[i], size)

        # decode them
        images = []
        for i, (picture, _, place) in enumerate(opened):
            try:
                images.append(pixels.crop(picture, crops.boxes[i], crops.flips[i], size))
            except Exception:  # broken inside
                image, labels[i], _ = self._next(place, bad, use=functools.partial(crop_another, i=i))
                images.append(image)
        images = self.options.augmented(torch.stack(images), epoch, indices)
        bad = [BadImage(*each) for each in bad.items()]
        return Batch(shared(images), indices, bad, labels, crops.as_fractions(sizes))

    def _next(self, index: int, bad: dict[int, str], **use: Callable) -> tuple[Any, int, int]:
        """What ``use`` makes of picture ``index``, or of the next that can be read; its label, and where it lies.

        Adds the broken pictures to ``bad``.
        """
        limit = self.options.bad_limit
        tries = limit if len(bad) < limit else 1  # beyond it the caller stops
        found, label, met = data.decode_or_next(self.dataset, index, tries, self.options.form, known=bad, **use)
        bad.update(met)
        return found, label, index + len(met)


class PreloadedReader(IndexReader):
    """Decodes once into one uint8 tensor (images, c, side, side); crops whole batches.

    The tensor lies on ``store``, crops are made on ``device``. Every picture is stored stretched to
    a square. Crops are drawn in the original picture and undo the stretching. ``side`` is the
    largest short side of the first 100 pictures, at most twice the side of a crop. Raises
    TooManyBadImages.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        options: CropOptions,
        plan: Plan,
        bad: BadImages,
        threads: int,
        store: torch.device,
        device: torch.device,
    ):
        super().__init__(options.size, plan)
        self.options, self.device, self.bad = options, device, bad
        count = len(dataset)
        self.sizes, self.labels = np.empty((count, 2), np.int64), np.empty(count, np.int64)
        side = self._side(dataset)
        self.images = torch.empty(count, options.form.channels, side, side, dtype=torch.uint8)
        with ThreadPoolExecutor(max(threads, 1)) as pool:
            list(pool.map(lambda index: self._store(dataset, index), range(count)))
        self.images = self.images.to(store)
        bad.check()

    def _side(self, dataset: datasets.Dataset) -> int:
        short_sides = []
        for index in range(min(100, len(dataset))):
            picture = self._decode(dataset, index, lambda picture: picture)
            short_sides.append(min(picture.size))
        return min(max(short_sides), 2 * max(pair(self.options.size)))

    def _store(self, dataset: datasets.Dataset, index: int):
        def store(picture: data.Picture):
            self.images[index] = pixels.stretch(picture, self.images.shape[-1])
            self.sizes[index] = picture.height, picture.width

        self._decode(dataset, index, store)

    def _decode(self, dataset: datasets.Dataset, index: int, use: Callable) -> Any:
        """What ``use`` makes of picture ``index``, or of the next that can be read, whose label it notes."""
        limit = self.options.bad_limit
        tries = limit if self.bad.count < limit else 1
        known = self.bad.descriptions
        found, self.labels[index], met = data.decode_or_next(dataset, index, tries, self.options.form, use, known)
        self.bad.add(met)
        return found

    def read(self, requests: list[Request]) -> Iterable[Batch]:
        return map(self._answer, requests)

    def _answer(self, request: Request) -> Batch:
        epoch, indices, size = request
        sizes = self.sizes[indices]
        crops = self.options.crops(sizes, epoch, indices).as_fractions(sizes)
        boxes = data.to_device(crops.boxes * np.float32(self.images.shape[-1]), self.device)
        flips = data.to_device(crops.flips, self.device)
        images = self.images.index_select(0, data.to_device(indices, self.images.device))
        if images.device.type == "cpu":
            images = data.to_device(images, self.device)
        images = crop_batch(images, boxes, flips, pair(size))
        images = self.options.augmented(images, epoch, indices)
        return Batch(images, indices, [], self.labels[indices], crops)


# --------------------------------------------------------------------------------- streams


class StreamReader:
    """Reads shards of a stream in worker processes, which restart in each epoch.

    ``lengths``: the numbers of records of the pieces read so far, which it adds to. A resumed epoch
    does not open such pieces again that lie before its first batch.
    """

    def __init__(
        self,
        dataset: datasets.IterableDataset,
        options: CropOptions,
        plan: Plan,
        bad: BadImages,
        lengths: dict[int, int],
        loader_options: dict,
    ):
        self.plan, self.bad, self.lengths = plan, bad, lengths
        self.crops = StreamCrops(dataset, options, plan.micro_batch_size, plan.share)
        self.loader = DataLoader(self.crops, **loader_options)
        self.workers = Workers()

    def epoch(self, epoch: int, seen: int) -> Iterable[Batch]:
        if not seen:
            self.bad.clear()  # pictures have other indices in this epoch
        done = seen * self.plan.accumulate // self.plan.batch_size
        wanted = self.plan.steps_left(seen) * self.plan.accumulate
        if not wanted:
            return
        rounds, first = divmod(done, max(1, self.loader.num_workers))
        self.crops.start(epoch, rounds, set(self.bad.descriptions), self.lengths)
        for number, (batch, lengths) in enumerate(self.workers.iterate(self.loader)):
            self.lengths.update(lengths)
            if number < first:  # of the round that was interrupted
                continue
            yield batch
            wanted -= 1
            if not wanted:
                return
        raise data.NothingToRead("no more pictures can be read from the stream")

    def uncropped(self, count: int | None, size: Size | None) -> Iterable[Batch]:
        raise ValueError("a stream has no index to find whole pictures by: drop --streaming")

    def close(self):
        self.loader = None
        self.workers.end()


class Part(NamedTuple):
    """Every ``step``-th record of a piece of a stream, from record ``first`` on."""

    piece: int
    first: int
    step: int

    def length(self, lengths: dict[int, int]) -> float:
        """The number of its records, infinite if that of the piece is unknown."""
        known = lengths.get(self.piece)
        return math.inf if known is None else len(range(self.first, known, self.step))


class StreamCrops(IterableDataset):
    """Endless batches of one worker process of :class:`StreamReader`, each with lengths it found.

    The stream is cut into pieces: its shards or, if they are more than 512 (mostly loose files), 256
    groups of them, each from all over. The workers of all processes divide the pieces anew in each
    pass. If they outnumber the pieces, several read the same piece and share its records. A worker
    reads one piece after the other and shuffles the records in blocks of ``block``.

    A stream has no index, so its order depends on the number of processes and workers; given these,
    it is a function of seed and epoch. Resuming leaves out the first ``rounds`` batches of each
    worker: pieces of known length are not opened, others are read and not decoded.
    """

    block = 1000

    def __init__(self, dataset: datasets.IterableDataset, options: CropOptions, batch_size: int, share: Share):
        self.pieces = dataset.num_shards if dataset.num_shards <= 512 else 256
        self.dataset, self.options, self.batch_size, self.share = dataset, options, batch_size, share
        self.start(epoch=0, rounds=0, bad=set(), lengths={})

    def start(self, epoch: int, rounds: int, bad: set[int], lengths: dict[int, int]):
        """Set what to read next; ``bad`` and ``lengths``: what is known of the pictures and pieces."""
        self.epoch, self.rounds, self.bad, self.lengths = epoch, rounds, bad, lengths
        self.found: dict[int, int] = {}  # lengths not reported yet

    def __iter__(self) -> Iterator[tuple[Batch, dict[int, int]]]:
        place, stride = worker_place(self.share)
        start = self._position(self.rounds * self.batch_size)
        parts, bad = [], []
        for number, record in enumerate(self._records(start), start):
            index = number * stride + place
            try:
                parts.append(self._crop(self._open(record), index, record.get("label", 0)))
            except Exception as error:  # a broken file can raise any error
                image = None if isinstance(record, Exception) else record["image"]
                bad.append(data.describe_bad(index, image, error))
                if self._is_hopeless(bad):
                    yield self._join([], bad), {}
                    return
            if len(parts) == self.batch_size:
                yield self._join(parts, bad), self.found
                parts, bad, self.found = [], [], {}

    def _position(self, good: int) -> int:
        """The number of this worker's records up to the last of ``good`` ones."""
        place, stride = worker_place(self.share)
        position = good
        for index in sorted(self.bad):
            position += index % stride == place and index // stride < position
        return position

    def _open(self, record: dict | Exception) -> data.Picture:
        if isinstance(record, Exception):
            raise record
        return data.open_picture(record["image"], self.options.form)

    def _crop(self, picture: data.Picture, index: int, label: int) -> tuple:
        size = np.array([(picture.height, picture.width)])
        crops = self.options.crops(size, self.epoch, np.array([index]))
        image = pixels.crop(picture, crops.boxes[0], crops.flips[0], self.options.size)
        return image, index, label, crops.as_fractions(size)

    def _is_hopeless(self, bad: list[BadImage]) -> bool:
        """Whether a batch has met so many broken pictures that training must stop."""
        limit = self.options.bad_limit
        files = {picture.description for picture in bad[-limit:]}
        return len(files) == limit or len(bad) == 100 * limit

    def _join(self, parts: list[tuple], bad: list[BadImage]) -> Batch:
        """Join single crops into a batch, which may be empty."""
        if not parts:
            images = torch.empty(0, self.options.form.channels, *pair(self.options.size))
            crops = Crops(np.empty((0, 4)), np.empty(0, bool))
            return Batch(images, np.array([], np.int64), bad, np.array([]), crops)
        images, indices, labels, crops = zip(*parts)
        indices = np.array(indices, np.int64)
        images = self.options.augmented(torch.stack(images), self.epoch, indices)
        crops = Crops(*map(np.concatenate, zip(*crops)))
        return Batch(shared(images), indices, bad, np.array(labels), crops)

    # the records of this worker, in order

    def _records(self, start: int) -> Iterator[dict | Exception]:
        """This worker's records from number ``start`` on, pass after pass; an exception where the stream breaks.

        Ends when the stream is empty.
        """
        place, stride = worker_place(self.share)
        sharing = -(-stride // self.pieces)  # workers that read the same piece
        order = np.random.default_rng((self.options.seed, self.epoch)).permutation(self.pieces * sharing)
        empty = 0
        for number in itertools.count():
            mine = [Part(*divmod(int(i), sharing), sharing) for i in order[(place + number) % stride :: stride]]
            length = yield from self._pass(mine, start, (self.options.seed, self.epoch, number, place))
            start = max(0, start - length)
            empty = 0 if length else empty + 1
            if empty == stride:  # these passes have covered all pieces
                return

    def _pass(self, mine: list[Part], start: int, key: tuple[int, ...]) -> Generator[dict | Exception, None, int]:
        """The records of ``mine``, shuffled by ``key``, from number ``start`` on. Returns the number of all."""
        # leave out what lies before the block of the first record
        block = start // self.block * self.block
        length = 0
        while mine and length + mine[0].length(self.lengths) <= block:
            length += mine.pop(0).length(self.lengths)
        records = self._read(mine)
        length += sum(1 for _ in itertools.islice(records, block - length))

        # shuffle each block while the next is read
        buffer = list(itertools.islice(records, self.block))
        while buffer:
            following = []
            for i in np.random.default_rng((*key, length)).permutation(len(buffer)):
                record, buffer[i] = buffer[i], None  # free its memory
                if length >= start:
                    yield record
                length += 1
                following += itertools.islice(records, 1)
            buffer = following
        return length

    def _read(self, parts: list[Part]) -> Iterator[dict | Exception]:
        """The records of ``parts``, in order, and the exceptions that end some of them early."""
        for piece, first, step in parts:
            count = 0
            try:
                # iter(1): a plain loop in a worker would divide the records among the workers once more
                for record in self.dataset.shard(self.pieces, piece, contiguous=False).iter(1):
                    if count % step == first:
                        yield {name: value for name, (value,) in record.items()}
                    count += 1
            except Exception as error:
                yield error
            else:
                self.found[piece] = count


def worker_place(share: Share) -> tuple[int, int]:
    """The index of this worker among the workers of all processes, and their number."""
    worker = get_worker_info()
    number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
    return share.rank + share.world * number, share.world * workers
