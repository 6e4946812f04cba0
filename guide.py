"""What guides the masks in training: the relevance of the patches of each crop, or of whole pictures.

``masks.py`` turns features into masks. This file decides which features: whose, of which layer,
computed when, and kept for how long. It also decides when a model is ready to guide itself.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from einops import rearrange
from torch import Tensor

import checkpoint
import data
import masks
import measures
import smae
from batches import Batch, TrainBatches
from cropping import RandomStream, crop_batch, uniform
from objects import ObjectMasks

MOMENTUM = 0.95  # of the running mean of the features, from step to step
MEAN_OVER = 2048  # whole pictures that the mean of the features is taken over
FINE = 4  # cells to the side of a patch, in maps of what is known exactly (the centre, a mask column)

FLOORS = ("pixels", "centre")

Source = smae.SMAE | ObjectMasks | Literal["pixels", "centre"]


class Guide:
    """Relevance of the patches of images, and the masks that follow from it.

    ``kind`` "selfguided": relevance is how much a patch belongs to the main object, by the features
    of ``layer`` (one of the model's ``layers``, default: the last encoder block but one).
    ``debias`` subtracts from the features their mean at each patch position. ``kind`` "amt":
    relevance is how much the CLS token attends to a patch.

    ``source`` replaces the model itself, so that the masks are no longer self-guided. A frozen
    model sees the images as squares of ``source_size`` pixels (default: its own size). A mask
    column of the data is an upper bound. "pixels" (features are the raw patches) and "centre" (the
    more central, the more relevant) are floors. ``source_name`` is the name that the user gave.
    ``shuffle`` gives each picture the cached relevance of another: masks of the same shapes without
    their content.

    ``hint_ratio`` and ``hint_portion`` fall linearly over the guided epochs, of ``epochs`` in all,
    to ``hint_end`` times their value. The other arguments are those of ``masks.find_object``,
    ``masks.informed_mask`` and ``masks.amt_mask``.

    ``maps`` (images, h, w) float16 holds the relevance of whole pictures after
    :meth:`cache_relevance`, in a file that all processes of a machine map into memory. ``mean`` (n,
    d) is the mean of the features. ``start`` is the number of epochs before the guide (None: not
    known yet). ``history`` holds the exploitation rates (:func:`exploitation`) of every epoch.

    Raises ValueError if the model has no such layer or the counts of patches do not fit.
    """

    def __init__(
        self,
        model: smae.SMAE,
        kind: str = "selfguided",
        *,
        source: Source | None = None,
        source_name: str | None = None,
        source_size: int | None = None,
        shuffle: bool = False,
        ratio: float = 0.75,
        hint: str = "random",
        hint_ratio: float = 0.05,
        hint_portion: float = 0.5,
        hint_end: float = 1.0,
        layer: int | str | None = None,
        foreground: str = "border",
        scoring: str = "contrast",
        debias: bool = False,
        amt_ratio: float = 0.45,
        throw_ratio: float = 0.4,
        compile: bool = False,
        cached: bool = False,
        start: int | None = None,
        every: int = 1,
        epochs: int = 1,
        seed: int = 0,
    ):
        self.model, self.kind, self.source, self.shuffle, self.seed = model, kind, source, shuffle, seed
        self.source_name = source if isinstance(source, str) else source_name
        self.ratio, self.hint, self.hint_end = ratio, hint, hint_end
        self.hint_ratio, self.hint_portion = hint_ratio, hint_portion
        self.amt_ratio, self.throw_ratio = amt_ratio, throw_ratio
        self.foreground, self.scoring, self.debias = foreground, scoring, debias
        self.start, self.every, self.epochs, self.cached = start, every, epochs, cached
        self.starts_itself = start is None
        self.maps = self.crc = self.mean = self._step_sum = self._others = None
        self.history: list[dict] = []

        guiding = source if isinstance(source, smae.SMAE) else model
        self.size = (source_size, source_size) if source_size else tuple(guiding.config["image_size"])
        self.layer = guiding.guiding_layer if layer is None else layer
        wrap = torch.compile if compile else lambda function, **_: function
        self.features: Callable = wrap(guiding.features, fullgraph=True, dynamic=False)
        self.attention: Callable = wrap(model.class_attention, fullgraph=True, dynamic=False)
        self._check(guiding)

    @property
    def name(self) -> str:
        """The kind of the masks, in log and metrics."""
        if self.kind == "amt":
            return "shuffled amt" if self.shuffle else "amt"
        return "guided" if self.source is not None or self.shuffle else "selfguided"

    def _check(self, guiding: smae.SMAE):
        n = self.model.patch_count
        masks.masked_count(n, self.ratio)
        if not 0 <= self.hint_end <= 1:
            raise ValueError(f"--hint-end must lie between 0 and 1, got {self.hint_end}")
        if self.layer not in guiding.layers:
            raise ValueError(f"--guide-layer {self.layer}: there are {', '.join(map(str, guiding.layers))}")
        if guiding is not self.model:
            try:
                guiding.grid(torch.empty(0, self.model.config["channels"], *self.size, device="meta"))
            except ValueError as error:
                raise ValueError(
                    f"--guide-from cannot see the pictures: {error}; try another --guide-image-size"
                ) from None
        if self.debias and (self.source == "centre" or isinstance(self.source, ObjectMasks)):
            raise ValueError("--guide-debias takes the mean off features, and this --guide-from has none")
        if self.debias and self.kind == "amt":
            raise ValueError("--guide-debias takes the mean off features, and --mask amt follows attention")
        if self.kind == "amt":
            masks.amt_mask(torch.ones(1, n), self.amt_ratio, self.throw_ratio)
            if not self.model.config["class_token"]:
                raise ValueError("--mask amt needs a model with a CLS token, whose attention it follows")
            return
        if self.hint != "none" and self.hint_portion < self.hint_ratio:
            raise ValueError(
                f"--hint-portion {self.hint_portion} must not be smaller than --hint-ratio {self.hint_ratio}"
            )
        # what fits at the start and at the end fits in between
        for share, option in ((1, ""), (self.hint_end, f"--hint-end {self.hint_end}: ")):
            try:
                masks.hint_count(n, self.ratio, self.hint, share * self.hint_ratio, share * self.hint_portion)
            except ValueError as error:
                raise ValueError(f"{option}{error}") from None

    # ---------------------------------------------------------------------------------------------- relevance

    @torch.no_grad()
    def relevance(
        self, images: Tensor, update_mean: bool = False, objects: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Relevance (b, n) of the patches of normalised images (b, c, H, W), and which are on the object's side.

        ``update_mean``: the next :meth:`finish_step` adds the features to their running mean. If a
        mask column guides, the ``objects`` (b, H, W) bool stand for it. AMT has no sides: None.
        """
        own = self.model.grid(images)
        if isinstance(self.source, ObjectMasks):
            scores = objects.to(images.device).float()
            side = scores > 0.5
        else:
            scores, side = self._source_relevance(images, update_mean)
        if scores.shape[1:] != own:
            (b, *grid), device = scores.shape, scores.device
            whole = data.to_device(torch.tensor([[0, 0, *grid]]), device).expand(b, 4)
            unflipped = torch.zeros(b, dtype=torch.bool, device=device)
            both = torch.stack([scores.float(), side.float()], dim=1)
            with torch.autocast(device.type, enabled=False):
                both = crop_batch(both, whole, unflipped, own, "area")
            scores, side = both[:, 0], both[:, 1] > 0.5
        return scores.flatten(1), side if side is None else side.flatten(1)

    def _source_relevance(self, images: Tensor, update_mean: bool = False) -> tuple[Tensor, Tensor | None]:
        """Relevance (b, h, w) and side of normalised images, on the grid of the source. One forward pass."""
        if self.kind == "amt":
            return masks.attention_weights(self.attention(images)).unflatten(1, self.model.grid(images)), None
        if self.source == "centre":
            grid = self.model.grid(images)
            scores = data.to_device(masks.centrality(grid), images.device).expand(len(images), -1).unflatten(1, grid)
            return scores, scores > scores[0].median()
        features, grid = self._features(images)
        if self.debias and update_mean:
            self._add_to_mean(features)
        if self.debias and self.mean is not None:
            features = features - self.mean
        scores, side = masks.find_object(features, grid, self.foreground, self.scoring)
        return scores.unflatten(1, grid), side.unflatten(1, grid)

    def _features(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """The patch features (b, n, d) that the source has of normalised images, and their grid (h, w)."""
        if self.source == "pixels":
            return smae.patchify(images, self.model.patch_size), self.model.grid(images)
        if self.source is None:
            return self.features(images, self.layer), self.model.grid(images)
        images = self._as_source_sees(images)
        return self.features(images, self.layer), self.source.grid(images)

    def _as_source_sees(self, images: Tensor) -> Tensor:
        """Images normalised for the model, resized and normalised for the frozen model that guides it."""
        ours, theirs = self.model.statistics, self.source.statistics
        if images.shape[2:] != self.size:
            images = F.interpolate(images, self.size, mode="bicubic", antialias=True)
        if ours == theirs:
            return images
        mean, std = data.mean_and_std(images.device, *ours)
        their_mean, their_std = data.mean_and_std(images.device, *theirs)
        return (images * std + mean - their_mean) / their_std

    def _add_to_mean(self, features: Tensor):
        total, count = self._step_sum or (0, 0)
        self._step_sum = total + features.float().sum(dim=0), count + len(features)

    def guides(self, epoch: int) -> bool:
        """Whether the masks of an epoch, counted from 1, are guided."""
        return self.start is not None and epoch > self.start

    def mask_batch(self, images: Tensor, batch: Batch, epoch: int, accelerator: Accelerator) -> masks.Mask:
        """The masks of a batch in training, whose normalised crops are ``images``: random before the guide starts.

        After the last micro-batch of a step, updates the running mean of the features.
        """
        noise = uniform((self.seed, epoch, RandomStream.MASK), batch.indices, self.model.patch_count)
        noise = data.to_device(noise, images.device)
        with accelerator.autocast():
            if not self.guides(epoch):
                return masks.random_mask(*noise.shape, self.ratio, noise=noise)
            relevance = self.cached_relevance(batch) if self.cached else self.relevance(images, update_mean=True)[0]
            if accelerator.sync_gradients:
                self.finish_step(accelerator)
            return self.mask(relevance, noise, epoch)

    def mask(self, relevance: Tensor, noise: Tensor, epoch: int | None = None) -> masks.Mask:
        """The masks of images of this relevance (b, n); ``noise`` (b, n) decides what is random in them.

        ``epoch``, counted from 1, sets the share of hints (default: the first guided epoch).
        """
        if self.kind == "amt":
            return masks.amt_mask(relevance, self.amt_ratio, self.throw_ratio, noise=noise)
        return masks.informed_mask(relevance, self.ratio, self.hint, *self.hint_shares(epoch), noise=noise)

    def hint_shares(self, epoch: int | None = None) -> tuple[float, float]:
        """Hint ratio and portion in ``epoch``, counted from 1 (default: the first guided one)."""
        share = 1.0
        if epoch is not None and self.start is not None and self.epochs > self.start + 1:
            guided = max(0, epoch - self.start - 1)
            share += (self.hint_end - 1) * min(1, guided / (self.epochs - self.start - 1))
        return share * self.hint_ratio, share * self.hint_portion

    def finish_step(self, accelerator: Accelerator):
        """Add the features of a step, of all processes, to their running mean."""
        if self._step_sum is not None:
            total, count = self._step_sum
            count = torch.full((), float(count), device=total.device)
            new = accelerator.reduce(total, "sum") / accelerator.reduce(count, "sum")
            if self.mean is None:
                self.mean = new.nan_to_num(0, 0, 0)
            else:  # a value that is not finite would stay for ever
                self.mean = torch.where(new.isfinite(), MOMENTUM * self.mean + (1 - MOMENTUM) * new, self.mean)
            self._step_sum = None

    # ---------------------------------------------------------------------------------------------- whole pictures

    @property
    def lacks_maps(self) -> bool:
        """Whether :meth:`cache_relevance` must come before :meth:`cached_relevance`."""
        return self.maps is None and self.source != "centre"  # which is the same in every picture

    def is_due(self, epoch: int) -> bool:
        """Whether the relevance of whole pictures is to be computed again before this epoch."""
        once = self.source is not None or self.every == 0
        return not once and (epoch - self.start - 1) % self.every == 0

    @torch.no_grad()
    def cache_relevance(
        self, batches: TrainBatches, accelerator: Accelerator, file: Path, after_each: Callable = lambda: None
    ):
        """Compute the relevance of every whole picture of the data and keep it in ``file``: one pass, shared out.

        ``debias`` takes another pass before, over MEAN_OVER pictures, for the mean of the features.
        ``after_each`` is called after every batch, equally often in each process. Raises
        OSError, in all processes, if the main one cannot write the file; earlier maps then stay.
        """

        def whole(compute: Callable[[Tensor], Tensor], count: int | None = None) -> Iterator[Tensor]:
            pictures = batches.uncropped(count, self.size)
            for indices in batches.plan.uncropped(count):
                if len(indices):  # some processes have no part of the last batch
                    images = data.normalize(next(pictures).images, *self.model.statistics)
                    with accelerator.autocast():
                        found = compute(images)
                yield found[: len(indices)]
                after_each()

        def known() -> Iterator[Tensor]:
            for indices in batches.plan.uncropped():
                yield self._compact(self.source.coverage(indices, self._map_grid()))
                after_each()

        if self.debias and self.kind == "selfguided":
            self.mean = None
            for features in whole(lambda images: self._features(images)[0], MEAN_OVER):
                self._add_to_mean(features)
            self.finish_step(accelerator)
        seen = whole(lambda images: self._compact(self._source_relevance(images)[0]))
        maps = known() if isinstance(self.source, ObjectMasks) else seen
        parts, problem = self._gather(maps, batches, accelerator), None
        if accelerator.is_main_process:
            try:
                write_maps(file, parts, (batches.length, *self._map_grid()))
            except OSError as error:
                problem = data.one_line(error)
        for _ in parts:  # the other processes compute their share and write nothing
            pass
        (problem,) = broadcast_object_list([problem])
        if problem:
            raise OSError(problem)
        self.maps, self.crc = np.load(file, mmap_mode="r"), checkpoint.checksum(file)

    def _gather(self, maps: Iterator[Tensor], batches: TrainBatches, accelerator: Accelerator):
        """The maps of all processes, in the order of the pictures: float16 arrays (b * world, h, w), batch by batch."""
        world, done = accelerator.num_processes, 0
        for part in maps:
            part = F.pad(part, (0, 0, 0, 0, 0, batches.plan.micro_batch_size - len(part)))  # the last one is smaller
            rows = accelerator.gather(part.to(accelerator.device)).cpu() if world > 1 else part
            rows = rearrange(rows, "(world b) h w -> (b world) h w", world=world)
            yield rows[: batches.length - done].numpy()
            done += len(rows)

    def _compact(self, relevance: Tensor) -> Tensor:
        """Relevance (b, h, w) in float16 on the host; stretched to 0 ... 1 where only its order matters."""
        if self.kind == "selfguided":
            low, high = relevance.amin((1, 2), keepdim=True), relevance.amax((1, 2), keepdim=True)
            relevance = (relevance - low) / torch.where(high - low > 1e-4 * high.abs(), high - low, torch.inf)
        return relevance.nan_to_num(0).half().cpu()

    def cached_relevance(self, batch: Batch) -> Tensor:
        """Relevance (b, n) of the crops of a batch, cropped from that of the whole pictures.

        :meth:`cache_relevance` comes first if this guide :attr:`lacks_maps`.
        """
        device, (h, w), own = batch.images.device, self._map_grid(), self.model.grid(batch.images)
        indices = np.asarray(batch.indices)
        if self.shuffle:
            indices = self._other_pictures()[indices]
        if self.source == "centre":
            maps = data.to_device(masks.centrality((h, w)), device).view(h, w).expand(len(indices), h, w)
        else:
            maps = data.to_device(np.array(self.maps[indices]), device)
        boxes = data.to_device(torch.as_tensor(batch.crops.boxes) * torch.tensor([h, w, h, w]), device)
        flips = data.to_device(batch.crops.flips, device)
        how = "beyond" if (h, w) == own else "area"  # neighbours help where a crop is smaller than the map
        with torch.autocast(device.type, enabled=False):
            relevance = crop_batch(maps[:, None].float(), boxes, flips, own, how).flatten(1)
        return relevance if how == "beyond" else (relevance * 1024).round() / 1024  # equal cells stay equal

    def _other_pictures(self) -> np.ndarray:
        """For each picture the one whose relevance it gets: its neighbour in a random ring of all pictures."""
        if self._others is None:
            ring = np.random.default_rng((self.seed, RandomStream.MASK)).permutation(len(self.maps))
            self._others = np.empty_like(ring)
            self._others[ring] = np.roll(ring, 1)
        return self._others

    def _map_grid(self) -> tuple[int, int]:
        (height, width), p = self.model.config["image_size"], self.model.patch_size
        if isinstance(self.source, smae.SMAE):
            (height, width), p = self.size, self.source.patch_size
        fine = FINE if self.source == "centre" or isinstance(self.source, ObjectMasks) else 1
        return fine * height // p, fine * width // p

    # ---------------------------------------------------------------------------------------------- starting

    def measure_exploitation(self, images: Tensor):
        """Add the exploitation rates of the decoder on normalised images to ``history``."""
        noise = uniform((0, RandomStream.MASK), range(len(images)), self.model.patch_count)
        mask = masks.random_mask(*noise.shape, self.ratio, noise=data.to_device(noise, images.device))
        masked, visible = exploitation(self.model, images, mask)
        self.history.append(dict(exploitation_masked=masked.tolist(), exploitation_visible=visible.tolist()))

    def mask_tokens_lead(self, trained: bool = False) -> bool:
        """Whether the decoder has exploited mask tokens more than visible ones for two epochs in a row.

        An untrained decoder attends to all tokens alike, and most are mask tokens: unless it was
        ``trained`` before, their lead at the start does not count.
        """
        ahead = [sum(rates["exploitation_masked"]) > sum(rates["exploitation_visible"]) for rates in self.history]
        return len(ahead) > 1 and all(ahead[-2:]) and (trained or not all(ahead))

    def state_dict(self) -> dict:
        """What a checkpoint holds: for the maps, the checksum of their file."""
        start = self.start if self.starts_itself else None
        return dict(maps=self.crc, mean=self.mean, start=start, history=self.history, look=self._method())

    def load_state_dict(self, state: dict):
        """Continue from a checkpoint. A start that was asked for stays; the mean of other features is dropped."""
        self.start, self.history = state["start"] if self.starts_itself else self.start, list(state["history"])
        if state["look"] == self._method():
            self.mean = None if state["mean"] is None else state["mean"].to(self.model.positions.device)

    def load_maps(self, state: dict, file: Path) -> bool:
        """Map the ``file`` of a checkpoint; False if it is lost, damaged, or was computed by another method."""
        if state["maps"] is None:
            return True
        if state["look"] != self._method() or not file.is_file() or checkpoint.checksum(file) != state["maps"]:
            return False
        self.maps, self.crc = np.load(file, mmap_mode="r"), state["maps"]
        return True

    def _method(self) -> list:
        how = [self.kind, self.layer, self.foreground, self.scoring, self.debias, self.source_name, list(self.size)]
        return how + ([*self.source.rule] if isinstance(self.source, ObjectMasks) else [])


def write_maps(file: Path, parts: Iterator[np.ndarray], shape: tuple[int, int, int]):
    """Write maps (images, h, w) float16 to an .npy file, part by part.

    Not through a memory map, which ends the process when the disk is full.
    """
    with smae.whole_file(file) as part, open(part, "wb") as out:
        np.lib.format.write_array_header_1_0(out, dict(descr="<f2", fortran_order=False, shape=shape))
        for rows in parts:
            assert rows.shape[1:] == shape[1:], (rows.shape, shape)
            out.write(np.ascontiguousarray(rows).data)


# ------------------------------------------------------------------------------------------------- --guide-from


def find_source(
    name: str | None,
    dataset: data.Dataset | None,
    device: torch.device | str,
    object_ids: list[int] | None,
    object_void: int | None,
) -> Source | None:
    """The :data:`Source` that --guide-from names; a path that exists wins over the names of the floors."""
    if name is None or (name in FLOORS and not Path(name).exists()):
        return name
    if column := mask_column(name):
        return ObjectMasks(dataset, column, object_ids, object_void)
    return smae.encoder_of(smae.load(name, device)).requires_grad_(False)


def mask_column(guide_from: str | None) -> str | None:
    """NAME where --guide-from says column:NAME."""
    return guide_from.removeprefix("column:") if (guide_from or "").startswith("column:") else None


def check_source(name: str | None, mask: str, *, cached: bool, streaming: bool, shuffle: bool, source_size: int | None):
    """Raise ValueError where --guide-from, --guide-shuffle and --guide-image-size contradict other options."""
    if name and mask != "selfguided":
        raise ValueError(f"--guide-from guides --mask selfguided, not --mask {mask}")
    if mask_column(name) and streaming:
        raise ValueError(f"--guide-from {name} finds masks by their index, which a stream lacks: drop --streaming")
    if mask_column(name) and not cached:
        raise ValueError(f"--guide-from {name} is read once for all pictures: it takes --guide cached")
    if shuffle and mask == "random":
        raise ValueError("--guide-shuffle is for guided masks, not for --mask random")
    if shuffle and not cached:
        raise ValueError("--guide-shuffle takes the relevance of whole pictures: add --guide cached")
    if shuffle and name == "centre":
        raise ValueError("--guide-shuffle changes nothing with --guide-from centre, the same for every picture")
    frozen_model = name and name not in FLOORS and not mask_column(name)
    if source_size is not None and (not frozen_model or source_size < 1):
        raise ValueError("--guide-image-size takes a positive number of pixels, and a model as --guide-from")


# -------------------------------------------------------------------------------------------------- when to start


@torch.no_grad()
def exploitation(model: smae.SMAE, images: Tensor, mask: masks.Mask, residual: bool = False) -> tuple[Tensor, Tensor]:
    """The exploitation rates of a model's decoder on normalised images: of mask tokens, of visible patches (layers,).

    ``measures.exploitation``, averaged over images.
    """
    v, m = mask.visible.shape[1], mask.masked.shape[1]
    shares = []
    for few, visible, masked in zip(images.split(4), mask.visible.split(4), mask.masked.split(4)):  # maps are large
        attentions = model.decoder_attention(few, masks.Mask(visible, masked))
        shares.append(measures.exploitation(attentions, v, m, residual))
    return torch.cat(shares, dim=-1).mean(dim=-1).unbind()
