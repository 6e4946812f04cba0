"""What guides the masks in training: relevance of the patches of each crop, or of whole pictures now and then.

Between ``masks.py``, which knows nothing but tensors, and ``train.py``: which features or which attention a mask is
made from, what is kept of it from one step to the next, and when a model is ready to guide.
"""

import os
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

MOMENTUM = 0.95  # of the running mean of the features, from step to step
MEAN_OVER = 2048  # whole pictures that the mean of the features is taken over
FINE = 4  # cells to the side of a patch, in maps of what is known exactly (the centre, a mask column)

Source = smae.SMAE | data.ObjectMasks | Literal["pixels", "centre"]


class Guide:
    """Relevance of the patches of images, and the masks that follow from it.

    ``kind`` "selfguided": how much a patch belongs to the main object, by the features of ``layer`` (one of the
    model's ``layers``, default: the last encoder block but one); ``debias`` first takes the mean that the features
    have at each patch position off them. "amt": how much the CLS token attends to it.

    ``source`` replaces the model itself, so that the masks are no longer self-guided. A frozen model sees the images
    as squares of ``source_size`` pixels (default: its own size). A mask column of the data is an upper bound. "pixels"
    (features are the raw patches) and "centre" (the more central, the more relevant) are floors. ``source_name`` is
    what the user calls it. ``shuffle`` gives each picture the cached relevance of another: masks of the same shapes
    without their content.

    Hints: ``hint_ratio`` and ``hint_portion`` fall linearly over the guided epochs, of ``epochs`` in all, to
    ``hint_end`` times themselves. The other arguments are those of ``masks.find_object``, ``masks.informed_mask`` and
    ``masks.amt_mask``.

    ``maps`` (images, h, w) float16 holds the relevance of whole pictures after :meth:`remember`, in a file that all
    processes of a machine map into memory; ``mean`` (n, d) is the mean of the features, ``start`` the number of epochs
    before the guide (None: not known yet), ``history`` the exploitation rates (:func:`exploitation`) of every epoch.

    Raises ValueError where the model has no such layer or the counts of patches do not fit.
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
        self.maps = self.crc = self.mean = self._seen = self._others = None
        self.history: list[dict] = []

        looking = source if isinstance(source, smae.SMAE) else model
        self.size = (source_size, source_size) if source_size else tuple(looking.config["image_size"])
        self.layer = max(1, len(looking.blocks) - 1) if layer is None else layer
        wrap = torch.compile if compile else lambda function, **_: function
        self.features: Callable = wrap(looking.features, fullgraph=True, dynamic=False)
        self.attention: Callable = wrap(model.class_attention, fullgraph=True, dynamic=False)
        self._check(looking)

    def _check(self, looking: smae.SMAE):
        n = self.model.patch_count
        masks.masked_count(n, self.ratio)
        if not 0 <= self.hint_end <= 1:
            raise ValueError(f"--hint-end must lie between 0 and 1, got {self.hint_end}")
        if self.layer not in looking.layers:
            raise ValueError(f"--guide-layer {self.layer}: there are {', '.join(map(str, looking.layers))}")
        if looking is not self.model:
            try:
                looking.grid(torch.empty(0, 3, *self.size, device="meta"))
            except ValueError as error:
                raise ValueError(
                    f"--guide-from cannot see the pictures: {error}; try another --guide-image-size"
                ) from None
        if self.debias and (self.source == "centre" or isinstance(self.source, data.ObjectMasks)):
            raise ValueError("--guide-debias takes the mean off features, and this --guide-from has none")
        if self.kind == "amt":
            masks.amt_mask(torch.ones(1, n), self.amt_ratio, self.throw_ratio)
            if not self.model.prefix:
                raise ValueError("--mask amt needs a model with a CLS token, whose attention it follows")
            return
        if self.hint != "none" and self.hint_portion < self.hint_ratio:
            raise ValueError(
                f"--hint-portion {self.hint_portion} must not be smaller than --hint-ratio {self.hint_ratio}"
            )
        for share in (1, self.hint_end):  # what fits at the start and at the end fits in between
            masks.hint_count(n, self.ratio, self.hint, share * self.hint_ratio, share * self.hint_portion)

    # ---------------------------------------------------------------------------------------------- relevance

    @torch.no_grad()
    def look(self, images: Tensor, learn: bool = False, objects: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Relevance (b, n) of the patches of normalised images (b, 3, H, W), and which are on the object's side.

        ``learn`` takes the features into the running mean at the next :meth:`end_step`. A mask column is not in the
        images: then the ``objects`` (b, H, W) bool are. AMT has no sides: None.
        """
        own = self.model.grid(images)
        if isinstance(self.source, data.ObjectMasks):
            scores = objects.to(images.device).float()
            side = scores > 0.5
        else:
            scores, side = self._relevance(images, learn)
        if scores.shape[1:] != own:
            (b, *grid), device = scores.shape, scores.device
            whole = torch.tensor([[0, 0, *grid]], device=device).expand(b, 4)
            unflipped = torch.zeros(b, dtype=torch.bool, device=device)
            both = torch.stack([scores.float(), side.float()], dim=1)
            with torch.autocast(device.type, enabled=False):
                both = crop_batch(both, whole, unflipped, own, "area")
            scores, side = both[:, 0], both[:, 1] > 0.5
        return scores.flatten(1), side if side is None else side.flatten(1)

    def _relevance(self, images: Tensor, learn: bool = False) -> tuple[Tensor, Tensor | None]:
        """Relevance (b, h, w) and side of normalised images on the grid of whatever guides. One forward pass."""
        if self.kind == "amt":
            return masks.attention_weights(self.attention(images)).unflatten(1, self.model.grid(images)), None
        if self.source == "centre":
            grid = self.model.grid(images)
            scores = data.to_device(masks.centrality(grid), images.device).expand(len(images), -1).unflatten(1, grid)
            return scores, scores > scores[0].median()
        features, grid = self._features(images)
        if self.debias and learn:
            self._learn(features)
        if self.debias and self.mean is not None:
            features = features - self.mean
        scores, side = masks.find_object(features, grid, self.foreground, self.scoring)
        return scores.unflatten(1, grid), side.unflatten(1, grid)

    def _features(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """What whatever guides sees in normalised images: patch features (b, n, d), and their grid (h, w)."""
        if self.source == "pixels":
            return smae.patchify(images, self.model.patch_size), self.model.grid(images)
        if self.source is None:
            return self.features(images, self.layer), self.model.grid(images)
        images = self._as_source_sees(images)
        return self.features(images, self.layer), self.source.grid(images)

    def _as_source_sees(self, images: Tensor) -> Tensor:
        """Images normalised for the model, resized and normalised for the frozen model that guides it."""
        ours, theirs = self.model.config, self.source.config
        if images.shape[2:] != self.size:
            images = F.interpolate(images, self.size, mode="bicubic", antialias=True)
        if (ours["mean"], ours["std"]) == (theirs["mean"], theirs["std"]):
            return images
        mean, std = data.mean_and_std(images.device, tuple(ours["mean"]), tuple(ours["std"]))
        their_mean, their_std = data.mean_and_std(images.device, tuple(theirs["mean"]), tuple(theirs["std"]))
        return (images * std + mean - their_mean) / their_std

    def _learn(self, features: Tensor):
        total, count = self._seen or (0, 0)
        self._seen = total + features.float().sum(dim=0), count + len(features)

    def guides(self, epoch: int) -> bool:
        """Whether the masks of an epoch, counted from 1, are guided."""
        return self.start is not None and epoch > self.start

    def mask_batch(self, images: Tensor, batch: Batch, epoch: int, accelerator: Accelerator) -> masks.Mask:
        """The mask of a batch in training, whose normalised crops are ``images``: random before the guide starts.

        With the last micro-batch of a step the running mean of the features is updated.
        """
        noise = uniform((self.seed, epoch, RandomStream.MASK), batch.indices, self.model.patch_count)
        noise = data.to_device(noise, images.device)
        with accelerator.autocast():
            if not self.guides(epoch):
                return masks.random_mask(*noise.shape, self.ratio, noise=noise)
            relevance = self.recall(batch) if self.cached else self.look(images, learn=True)[0]
            if accelerator.sync_gradients:
                self.end_step(accelerator)
            return self.mask(relevance, noise, epoch)

    def mask(self, relevance: Tensor, noise: Tensor, epoch: int | None = None) -> masks.Mask:
        """The mask of images of this relevance (b, n); ``noise`` (b, n) decides what is left to chance.

        With the hints of ``epoch`` (counted from 1; default: those of the first guided one).
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

    def end_step(self, accelerator: Accelerator):
        """Take what all looks of a step, in all processes, have learned into the running mean of the features."""
        if self._seen is not None:
            total, count = self._seen
            count = torch.full((), float(count), device=total.device)
            new = accelerator.reduce(total, "sum") / accelerator.reduce(count, "sum")
            if self.mean is None:
                self.mean = new.nan_to_num(0, 0, 0)
            else:  # what is not finite would stay for ever
                self.mean = torch.where(new.isfinite(), MOMENTUM * self.mean + (1 - MOMENTUM) * new, self.mean)
            self._seen = None

    # ---------------------------------------------------------------------------------------------- remembering

    @property
    def lacks_maps(self) -> bool:
        """Whether :meth:`recall` needs :meth:`remember` first. The centre is the same in every picture."""
        return self.maps is None and self.source != "centre"

    def is_due(self, epoch: int) -> bool:
        """Whether whole pictures are to be looked at before this epoch. What is frozen is looked at once."""
        once = self.source is not None or self.every == 0
        return not once and (epoch - self.start - 1) % self.every == 0

    @torch.no_grad()
    def remember(
        self, batches: TrainBatches, accelerator: Accelerator, file: Path, after_each: Callable = lambda: None
    ):
        """Keep the relevance of every picture of the data, whole and not augmented, in ``file``: one pass, shared out.

        With ``debias``, another one over the first MEAN_OVER of them before, for the mean. ``after_each`` is
        called after every batch, as often in each process; should it raise, the whole pass is to be done again.
        Raises OSError, in all processes, if the main one cannot write the file; earlier maps then stay.
        """

        def whole(look: Callable[[Tensor], Tensor], count: int | None = None) -> Iterator[Tensor]:
            pictures = batches.uncropped(count, max(self.size))
            for indices in batches.plan.uncropped(count):
                if len(indices):  # not in every process the last time
                    images = data.normalize(next(pictures).images, self.model.config["mean"], self.model.config["std"])
                    with accelerator.autocast():
                        found = look(images)
                yield found[: len(indices)]
                after_each()

        def known() -> Iterator[Tensor]:
            for indices in batches.plan.uncropped():
                yield self._compact(self.source.coverage(indices, self._map_grid()))
                after_each()

        if self.debias and self.kind == "selfguided":
            self.mean = None
            for features in whole(lambda images: self._features(images)[0], MEAN_OVER):
                self._learn(features)
            self.end_step(accelerator)
        seen = whole(lambda images: self._compact(self._relevance(images)[0]))
        maps = known() if isinstance(self.source, data.ObjectMasks) else seen
        parts, problem = self._gather(maps, batches, accelerator), None
        if accelerator.is_main_process:
            try:
                _write_maps(file, parts, (batches.length, *self._map_grid()))
            except OSError as error:
                problem = data.one_line(error)
        for _ in parts:  # other processes have nothing to write, but their share to compute
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

    def recall(self, batch: Batch) -> Tensor:
        """Relevance (b, n) of the crops of a batch, cut out of that of the whole pictures."""
        device, (h, w), own = batch.images.device, self._map_grid(), self.model.grid(batch.images)
        indices = np.asarray(batch.indices)
        if self.shuffle:
            indices = self._other_pictures()[indices]
        if self.source == "centre":
            maps = masks.centrality((h, w)).view(1, h, w).expand(len(indices), h, w)
        else:
            maps = torch.from_numpy(np.array(self.maps[indices]))
        maps = data.to_device(maps, device)
        boxes = data.to_device(torch.as_tensor(batch.crops.boxes) * torch.tensor([h, w, h, w]), device)
        flips = data.to_device(batch.crops.flips, device)
        how = "beyond" if (h, w) == own else "area"  # neighbours help where a crop is smaller than the map
        with torch.autocast(device.type, enabled=False):
            relevance = crop_batch(maps[:, None].float(), boxes, flips, own, how).flatten(1)
        return relevance if how == "beyond" else (relevance * 1024).round() / 1024  # what is equal stays equal

    def _other_pictures(self) -> np.ndarray:
        """For each picture another one, whose relevance it gets: all pictures in one random ring."""
        if self._others is None:
            ring = np.random.default_rng((self.seed, RandomStream.MASK)).permutation(len(self.maps))
            self._others = np.empty_like(ring)
            self._others[ring] = np.roll(ring, 1)
        return self._others

    def _map_grid(self) -> tuple[int, int]:
        (height, width), p = self.model.config["image_size"], self.model.patch_size
        if isinstance(self.source, smae.SMAE):
            (height, width), p = self.size, self.source.patch_size
        fine = FINE if self.source == "centre" or isinstance(self.source, data.ObjectMasks) else 1
        return fine * height // p, fine * width // p

    # ---------------------------------------------------------------------------------------------- starting

    def measure(self, images: Tensor):
        """Add to ``history`` how far the decoder lives on mask tokens and on visible ones, on normalised images."""
        noise = uniform((0, RandomStream.MASK), range(len(images)), self.model.patch_count)
        mask = masks.random_mask(*noise.shape, self.ratio, noise=data.to_device(noise, images.device))
        masked, visible = exploitation(self.model, images, mask)
        self.history.append(dict(exploitation_masked=masked.tolist(), exploitation_visible=visible.tolist()))

    def ready(self, trained: bool = False) -> bool:
        """Whether mask tokens have overtaken visible ones, on the average of the blocks, for two epochs in a row.

        An untrained decoder looks everywhere alike, and mask tokens are many: unless it was ``trained`` before, their
        lead at the start does not count.
        """
        ahead = [sum(rates["exploitation_masked"]) > sum(rates["exploitation_visible"]) for rates in self.history]
        return len(ahead) > 1 and all(ahead[-2:]) and (trained or not all(ahead))

    def state_dict(self) -> dict:
        """All that is kept from one step to the next; of the file of the maps its checksum."""
        return dict(maps=self.crc, mean=self.mean, start=self.start, history=self.history, look=self._way_to_look())

    def load_state_dict(self, state: dict):
        """Go on from there; but a start that was asked for stays, and a mean of other features is left."""
        self.start, self.history = state["start"] if self.start is None else self.start, list(state["history"])
        if state["look"] == self._way_to_look():
            self.mean = None if state["mean"] is None else state["mean"].to(self.model.positions.device)

    def load_maps(self, state: dict, file: Path) -> bool:
        """Go on with the maps that a checkpoint knew; False if they are lost or were made in another way."""
        if state["maps"] is None:
            return True
        if state["look"] != self._way_to_look() or not file.is_file() or checkpoint.checksum(file) != state["maps"]:
            return False
        self.maps, self.crc = np.load(file, mmap_mode="r"), state["maps"]
        return True

    def _way_to_look(self) -> list:
        how = [self.kind, self.layer, self.foreground, self.scoring, self.debias]
        return [*how, self.source_name, list(self.size)]


def _write_maps(file: Path, parts: Iterator[np.ndarray], shape: tuple[int, int, int]):
    """Write maps (images, h, w) float16, part by part, to an .npy file that appears whole or not at all.

    Not through a memory map: that ends a process on a full disk.
    """
    part = file.with_suffix(".part")
    try:
        with open(part, "wb") as out:
            np.lib.format.write_array_header_1_0(out, dict(descr="<f2", fortran_order=False, shape=shape))
            for rows in parts:
                assert rows.shape[1:] == shape[1:], (rows.shape, shape)
                out.write(np.ascontiguousarray(rows).data)
        smae.flush(part)
        os.replace(part, file)
        smae.flush(file.parent)
    finally:
        part.unlink(missing_ok=True)


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
