"""What encoders make of pictures, block by block: the measures of the paper, picture by picture.

Each function runs one pass over the pictures, in parts small enough for their attention maps.
Letters in shapes: ``N`` pictures, ``n`` patches, ``d`` width.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from einops import reduce
from torch import Tensor

import checkpoint
import cli
import data
import encoders
import masks
import measures
import smae
from cropping import RandomStream, uniform
from guide import exploitation

MOST_ENTRIES = 2**24  # of the attention maps of a part, all heads together: 64 MiB


@dataclass
class Subject:
    """An encoder under a name, and the pictures as it sees them.

    ``images`` (N, c, H, W) uint8; ``objects`` (N, H, W) bool, None if they are not known.
    ``path``: where the encoder is from.
    """

    name: str
    encoder: encoders.Encoder
    images: Tensor
    objects: Tensor | None = None
    device: torch.device | str = "cpu"
    path: str = ""
    scans: dict = field(default_factory=dict)

    @property
    def model(self) -> smae.SMAE | None:
        """The ViT, None for pixels."""
        return self.encoder.backbone

    @property
    def patch_size(self) -> int:
        return self.model.patch_size if self.model else self.encoder.patch_size

    @property
    def grid(self) -> tuple[int, int]:
        return smae.patch_grid(*self.images.shape[2:], self.patch_size)

    @property
    def has_decoder(self) -> bool:
        return bool(self.model and self.model.config["decoder_depth"])

    @property
    def share(self) -> Tensor | None:
        """How much of each patch the object covers: (N, n)."""
        if self.objects is None:
            return None
        h, w = self.grid
        return reduce(self.objects.float(), "b (h p1) (w p2) -> b (h w)", "mean", h=h, w=w)

    def parts(self, what: str = "") -> Iterator[tuple[slice, Tensor]]:
        """Slices of the pictures, and these normalised on the device."""
        n, heads = self.grid[0] * self.grid[1], self.model.config["heads"] if self.model else 1
        size = max(1, min(64, MOST_ENTRIES // (heads * (n + 1) ** 2)))
        said = f"{self.name}{', ' * bool(what)}{what}"
        with cli.progress_bar(len(self.images), "picture", desc=said, leave=False) as bar:
            for start in range(0, len(self.images), size):
                rows = slice(start, start + size)
                yield rows, data.normalize(self.images[rows].to(self.device), *self.encoder.statistics)
                bar.update(len(self.images[rows]))

    def features(self, images: Tensor, layer: int | str | None = None) -> Tensor:
        """Patch tokens (b, n, d) of normalised images after a block (default: the last of the encoder)."""
        with torch.no_grad():
            return self.encoder.features(images, layer)

    def noise(self, rows: slice, seed: int) -> Tensor:
        """Uniform noise (b, n) for some pictures: a function of seed, index and the number of patches."""
        noise = uniform((seed, RandomStream.MASK), range(len(self.images))[rows], self.grid[0] * self.grid[1])
        return data.to_device(noise, torch.device(self.device))

    def random_mask(self, rows: slice, ratio: float, seed: int) -> masks.Mask:
        noise = self.noise(rows, seed)
        return masks.random_mask(*noise.shape, ratio, noise=noise)


# ------------------------------------------------------------------------------ one pass over the blocks


def scan(subject: Subject, ratio: float, seed: int) -> dict[str, dict]:
    """Attention and spectra of every block, by name of the measure and of the block.

    ``distance``, ``information`` (N, heads); ``spectrum`` (N, k); ``tokens`` and ``directions`` (N,),
    of the decoder alone. The encoder sees whole pictures, the decoder what it is trained with:
    visible patches and mask tokens, put back in the order of the grid.
    """
    if (ratio, seed) in subject.scans:
        return subject.scans[ratio, seed]
    names = ("distance", "information", "spectrum", "tokens", "directions")
    found: dict[str, dict] = {name: {} for name in names}
    model, grid = subject.model, subject.grid
    for rows, x in subject.parts("blocks"):
        mask = subject.random_mask(rows, ratio, seed) if subject.has_decoder else None
        for layer, tokens, attention in model.trace(x, mask):
            attention, tokens = measures.patch_attention(attention, model.prefix), tokens[:, model.prefix :]
            values = dict(
                distance=measures.attention_distance(attention, grid, model.patch_size),
                information=measures.attention_information(attention),
                spectrum=measures.spectrum(tokens, grid),
            )
            if isinstance(layer, str):
                values["tokens"] = measures.token_variance(tokens, mask.masked)
                values["directions"] = measures.direction_variance(tokens, mask.masked)
            for name, value in values.items():
                found[name].setdefault(layer, []).append(value.float().cpu())
    found = {name: {layer: torch.cat(parts) for layer, parts in layers.items()} for name, layers in found.items()}
    subject.scans[ratio, seed] = found
    return found


def variances(subject: Subject, layer: int | str | None) -> dict[str, Tensor]:
    """``features`` and ``similarities`` (N,): the two variances of the paper's table 1 after a block."""
    found = dict(features=[], similarities=[])
    for _, x in subject.parts("variance"):
        tokens = subject.features(x, layer)
        found["features"].append(measures.feature_variance(tokens).cpu())
        found["similarities"].append(measures.similarity_variance(masks.similarity(tokens)).cpu())
    return {name: torch.cat(parts) for name, parts in found.items()}


def objects_found(subject: Subject, foreground: str, scoring: str) -> dict[int | str, dict[str, Tensor]]:
    """``iou`` and ``auc`` (N,) of the cut and the relevance of every block against the subject's known objects.

    NaN for pictures without an object.
    """
    found: dict = {}
    shares, n = subject.share, subject.grid[0] * subject.grid[1]
    for rows, x in subject.parts("objects"):
        everything = torch.arange(n, device=x.device).expand(len(x), -1)
        whole = masks.Mask(masked=everything[:, :0], visible=everything)
        for layer, tokens, _ in subject.model.trace(x, whole):
            tokens = tokens[:, subject.model.prefix :]
            relevance, side = masks.find_object(tokens, subject.grid, foreground, scoring)
            share = shares[rows].to(x.device)
            iou = torch.where(share.sum(dim=1) > 0, measures.iou(side, share), torch.nan)  # no object: no value
            values = dict(iou=iou, auc=measures.rank_auc(relevance, share))
            for name, value in values.items():
                found.setdefault(layer, {}).setdefault(name, []).append(value.cpu())
    return {layer: {name: torch.cat(parts) for name, parts in both.items()} for layer, both in found.items()}


def reconstruction_errors(
    subject: Subject, masked_by: str, ratio: float, seed: int, foreground: str = "border", scoring: str = "contrast"
) -> tuple[Tensor, Tensor]:
    """The loss of every masked patch (N, m) under some masks, and which patches these are (N, m).

    ``masked_by``: "random", the same for every model of as many patches, or the model's own clusters
    with hints ("own") or without ("own, no hints"); ``foreground`` and ``scoring`` are those of masks.py.
    """
    errors, masked = [], []
    for rows, x in subject.parts(f"reconstruction, {masked_by} masks"):
        if masked_by == "random":
            mask = subject.random_mask(rows, ratio, seed)
        else:
            tokens = subject.features(x, subject.model.guiding_layer)
            hint = "none" if "no hints" in masked_by else "random"
            how = dict(foreground=foreground, scoring=scoring, noise=subject.noise(rows, seed))
            mask = masks.self_guided_mask(tokens, subject.grid, ratio, hint, **how)
        errors.append(subject.model.errors(x, mask).cpu())
        masked.append(mask.masked.cpu())
    return torch.cat(errors), torch.cat(masked)


# ------------------------------------------------------------------------------ a run over time


def checkpoints_over_time(run: Path, most: int) -> dict[float, Path]:
    """Up to ``most`` checkpoints of a run by epochs done, denser at the start. Raises ValueError for fewer than two."""
    if most < 2:
        raise ValueError(f"--checkpoints must be at least 2, got {most}")
    config = smae.read_json(run / "config.json")
    options = config.get("train", {})
    images, batch = config.get("data", {}).get("images"), options.get("batch_size")
    found = {checkpoint.number(folder): folder for folder in reversed(checkpoint.folders(run))}
    if len(found) < 2 or not images or not batch:
        raise ValueError(f"{run.name} has {len(found)} checkpoints of a run: train with --keep 999 --save-every 1")
    steps = sorted(found)
    chosen = {steps[round((len(steps) - 1) * (i / (most - 1)) ** 1.5)] for i in range(most)}
    return {step / (images // batch): found[step] for step in sorted(chosen)}


def progress(subject: Subject, run: Path, most: int, ratio: float, seed: int) -> dict:
    """How a run has developed, by epoch: ``epochs``, and for each a mean over the pictures.

    ``gaps``: μintra - μinter by "similarity" and "attention", each for the "own" cut and the "last"
    one, after the block that guides, the last but one. ``divergence``: KL of the token relations
    from the last checkpoint, for each block. ``exploited``: by mask tokens, for each decoder block.
    """
    times = checkpoints_over_time(run, most)
    guiding = subject.model.guiding_layer
    gaps = {how: {cut: [] for cut in ("own", "last")} for how in ("similarity", "attention")}
    divergence, exploited = {}, {"mask": [], "visible": []}
    last = None
    for path in reversed(list(times.values())):  # the last one first: the others are compared with it
        model = encoders.backbone(str(path), subject.device)
        now = Subject(f"{subject.name}, {path.name}", encoders.ViT(model), subject.images, device=subject.device)
        relations, sides, sums, rates = {}, [], {}, []
        for rows, x in now.parts():
            for layer, tokens, attention in model.trace(x):
                similarity = masks.similarity(tokens[:, model.prefix :])
                if last is None:
                    relations.setdefault(layer, []).append(similarity.half().cpu())
                before = similarity if last is None else last[0][layer][rows].to(x.device).float()
                kl = measures.relation_divergence(before, similarity)
                sums.setdefault(f"kl {layer}", []).append(kl.cpu())
                if layer == guiding:
                    side = masks.bipartition(masks.normalized_cut(similarity))
                    sides.append(side.cpu())
                    final = side if last is None else last[1][rows].to(x.device)
                    weights = measures.patch_attention(attention, model.prefix).mean(dim=1)
                    for how, edges in (("similarity", similarity), ("attention", weights)):
                        for cut, halves in (("own", side), ("last", final)):
                            sums.setdefault(f"{how} {cut}", []).append(measures.cluster_gap(edges, halves).cpu())
            if now.has_decoder:
                rates.append(torch.stack(exploitation(model, x, now.random_mask(rows, ratio, seed))) * len(x))
        means = {name: torch.cat(parts).nanmean().item() for name, parts in sums.items()}
        for how, cuts in gaps.items():
            for cut in cuts:
                cuts[cut].insert(0, means[f"{how} {cut}"])
        for layer in range(1, len(model.blocks) + 1):
            divergence.setdefault(layer, []).insert(0, means[f"kl {layer}"])
        if rates:
            of_mask, of_visible = (torch.stack(rates).sum(0) / len(subject.images)).tolist()
            exploited["mask"].insert(0, of_mask)
            exploited["visible"].insert(0, of_visible)
        if last is None:
            last = {layer: torch.cat(parts) for layer, parts in relations.items()}, torch.cat(sides)
    return dict(epochs=list(times), gaps=gaps, divergence=divergence, exploited=exploited)
