"""What guides the masks of a model in training: its own look at each crop, or at each whole picture now and then.

Between ``masks.py``, which knows nothing but tensors, and ``train.py``: which features or which attention a mask is
made from, what is kept of it from one step to the next, and when a model is ready to guide.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from einops import rearrange
from torch import Tensor

import data
import masks
import smae

MOMENTUM = 0.95  # of the running mean of the features, from step to step
MEAN_OVER = 2048  # whole pictures that the mean of the features is taken over


class Guide:
    """Relevance of the patches of images, and the masks that follow from it.

    ``kind`` "selfguided": how much a patch belongs to the main object, by the features of ``layer`` (one of
    ``model.layers``, default: the last encoder block but one); ``debias`` first takes the mean that the features
    have at each patch position off them. "amt": how much the CLS token attends to it. The other arguments are those
    of ``masks.find_object``, ``masks.informed_mask`` and ``masks.amt_mask``.

    ``maps`` (images, h, w), float16, on the host, holds the relevance of whole pictures after :meth:`remember`,
    ``mean`` (n, d) the mean of the features, ``start`` the number of epochs before the guide (None: not known yet),
    ``history`` the exploitation rates (:func:`exploitation`) after every epoch.

    Raises ValueError where the model has no such layer or the counts of patches do not fit.
    """

    def __init__(
        self,
        model: smae.SMAE,
        kind: str = "selfguided",
        *,
        ratio: float = 0.75,
        hint: str = "random",
        hint_ratio: float = 0.05,
        layer: int | str | None = None,
        foreground: str = "border",
        scoring: str = "contrast",
        debias: bool = False,
        amt_ratio: float = 0.45,
        throw_ratio: float = 0.4,
        compile: bool = False,
        start: int | None = None,
    ):
        self.model, self.kind, self.start = model, kind, start
        self.ratio, self.hint, self.hint_ratio = ratio, hint, hint_ratio
        self.amt_ratio, self.throw_ratio = amt_ratio, throw_ratio
        self.layer = max(1, len(model.blocks) - 1) if layer is None else layer
        self.foreground, self.scoring, self.debias = foreground, scoring, debias
        self.maps = self.mean = self._seen = None
        self.history: list[dict] = []
        wrap = torch.compile if compile else lambda function, **_: function
        self.features: Callable = wrap(model.features, fullgraph=True, dynamic=False)
        self.attention: Callable = wrap(model.class_attention, fullgraph=True, dynamic=False)
        masks.masked_count(model.patch_count, ratio)
        if kind == "selfguided":
            masks.hint_count(model.patch_count, ratio, hint, hint_ratio)
        if self.layer not in model.layers:
            raise ValueError(f"--guide-layer {self.layer}: there are {', '.join(map(str, model.layers))}")
        if kind == "amt":
            masks.amt_mask(torch.ones(1, model.patch_count), amt_ratio, throw_ratio)
            if not model.prefix:
                raise ValueError("--mask amt needs a model with a CLS token, whose attention it follows")

    # ---------------------------------------------------------------------------------------------- looking

    @torch.no_grad()
    def look(self, images: Tensor, learn: bool = False) -> tuple[Tensor, Tensor | None]:
        """Relevance (b, n) of the patches of normalised images (b, 3, H, W), and which are on the object's side.

        One forward pass over all patches. ``learn`` takes the features into the running mean at the next
        :meth:`end_step`. AMT has no sides: None.
        """
        if self.kind == "amt":
            return masks.attention_weights(self.attention(images)), None
        features = self.features(images, self.layer)
        if self.debias and learn:
            self._learn(features)
        if self.debias and self.mean is not None:
            features = features - self.mean
        return masks.find_object(features, self.model.grid(images), self.foreground, self.scoring)

    def _learn(self, features: Tensor):
        total, count = self._seen or (0, 0)
        self._seen = total + features.float().sum(dim=0), count + len(features)

    def mask(self, relevance: Tensor, noise: Tensor) -> masks.Mask:
        """The mask of images of this relevance (b, n); ``noise`` (b, n) decides what is left to chance."""
        if self.kind == "amt":
            return masks.amt_mask(relevance, self.amt_ratio, self.throw_ratio, noise=noise)
        return masks.informed_mask(relevance, self.ratio, self.hint, self.hint_ratio, noise=noise)

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

    @torch.no_grad()
    def remember(self, batches: data.TrainBatches, accelerator: Accelerator, after_each: Callable = lambda: None):
        """Look at every picture of the data, whole and not augmented, and keep its relevance: one pass, shared out.

        With ``debias``, another one over the first MEAN_OVER of them before, for the mean. ``after_each`` is
        called after every batch, as often in each process; should it raise, the whole pass is to be done again.
        """

        def whole(count: int | None = None) -> Iterator[Tensor]:
            calls = batches.whole_batches(count)
            for batch in batches.whole(count):
                yield data.normalize(batch.images, self.model.config["mean"], self.model.config["std"])
                after_each()
                calls -= 1
            for _ in range(calls):
                after_each()

        if self.debias and self.kind == "selfguided":
            self.mean = None
            for images in whole(MEAN_OVER):
                with accelerator.autocast():
                    self._learn(self.features(images, self.layer))
            self.end_step(accelerator)
        mine = []
        for images in whole():
            with accelerator.autocast():
                mine.append(self._compact(self.look(images)[0]))
        world, (h, w) = accelerator.num_processes, self._grid()
        mine = torch.cat(mine)
        mine = F.pad(mine, (0, 0, 0, -(-batches.length // world) - len(mine)))  # some processes have one picture less
        parts = mine.split(2**16)  # not all at once through the device
        parts = [accelerator.gather(part.to(accelerator.device)).cpu() for part in parts]
        parts = [rearrange(part, "(world k) (h w) -> (k world) h w", world=world, h=h, w=w) for part in parts]
        self.maps = torch.cat(parts)[: batches.length]

    def _compact(self, relevance: Tensor) -> Tensor:
        """Relevance (b, n) in float16 on the host; stretched to 0 ... 1 where only its order matters."""
        if self.kind == "selfguided":
            low, high = relevance.aminmax(dim=1, keepdim=True)
            relevance = (relevance - low) / torch.where(high - low > 1e-4 * high.abs(), high - low, torch.inf)
        return relevance.nan_to_num(0).half().cpu()

    def recall(self, batch: data.Batch) -> Tensor:
        """Relevance (b, n) of the crops of a batch, cut out of that of the whole pictures."""
        device, (h, w) = batch.images.device, self._grid()
        maps = data.to_device(self.maps[torch.as_tensor(batch.indices)], device)
        boxes = data.to_device(torch.as_tensor(batch.crops.boxes) * torch.tensor([h, w, h, w]), device)
        flips = data.to_device(batch.crops.flips, device)
        with torch.autocast(device.type, enabled=False):
            return data.crop_batch(maps[:, None].float(), boxes, flips, h, beyond=True).flatten(1)

    def _grid(self) -> tuple[int, int]:
        height, width = self.model.config["image_size"]
        return height // self.model.patch_size, width // self.model.patch_size

    # ---------------------------------------------------------------------------------------------- starting

    def measure(self, images: Tensor):
        """Add to ``history`` how far the decoder lives on mask tokens and on visible ones, on normalised images."""
        noise = data.uniform((0, data.MASKS), range(len(images)), self.model.patch_count)
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
        """All that is kept from one step to the next."""
        return dict(maps=self.maps, mean=self.mean, start=self.start, history=self.history, look=self._way_to_look())

    def load_state_dict(self, state: dict):
        """Go on from there; but a start that was asked for stays, and maps made in another way are left."""
        self.start, self.history = state["start"] if self.start is None else self.start, list(state["history"])
        if state["look"] == self._way_to_look():
            self.maps = state["maps"]
            self.mean = None if state["mean"] is None else state["mean"].to(self.model.positions.device)

    def _way_to_look(self) -> list:
        return [self.kind, self.layer, self.foreground, self.scoring, self.debias]


# -------------------------------------------------------------------------------------------------- when to start


@torch.no_grad()
def exploitation(model: smae.SMAE, images: Tensor, mask: masks.Mask, residual: bool = False) -> tuple[Tensor, Tensor]:
    """How far the decoder lives on mask tokens, and how far on visible ones: two shares for each block, (layers,).

    The paper's exploitation rate (arXiv 2507.19773, figure 4), by attention rollout (Abnar & Zuidema, ACL 2020):
    with A_l the attention of block l, averaged over heads, and R_l = A_l R_(l-1), R_0 = 1, the shares are the sums of
    R_l over the mask tokens and over the visible patches, averaged over the rows of all mask tokens and over images.
    What is missing to 1 is the CLS token's. ``residual`` puts (A_l + 1) / 2 in the place of A_l.
    """
    few = zip(images.split(4), mask.visible.split(4), mask.masked.split(4))  # attention maps are large
    return torch.cat([_exploitation(model, *part, residual) for part in few], dim=-1).mean(dim=-1).unbind()


def _exploitation(model: smae.SMAE, images: Tensor, visible: Tensor, masked: Tensor, residual: bool) -> Tensor:
    """Shares (2, layers, b), of each image."""
    v, m = visible.shape[1], masked.shape[1]
    unit = torch.eye(model.prefix + v + m, device=images.device)
    rollout, shares = unit, []
    for attention in model.decoder_attention(images, masks.Mask(visible, masked)):
        attention = attention.mean(dim=1)  # (b, t, t)
        if residual:
            attention = (attention + unit) / 2
        with torch.autocast(images.device.type, enabled=False):
            rollout = attention @ rollout
        sums = rollout[:, -m:].mean(dim=1)  # (b, t)
        shares.append(torch.stack([sums[:, -m:].sum(dim=1), sums[:, -m - v : -m].sum(dim=1)]))
    return torch.stack(shares, dim=1)
