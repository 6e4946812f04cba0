"""How well masks find known objects, beside baselines: random masks, the centre, raw pixels, an untrained encoder."""

from collections.abc import Iterator
from typing import NamedTuple

import datasets
import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

import data
import masks
import measures
import pictures
import smae
from cropping import RandomStream, uniform
from objects import BY_THRESHOLD, MaskRule, object_mask

MEASURES = {
    "iou": "IoU of the foreground side with the object",
    "auc": "rank-AUC of relevance against the object",
    "object": "share of the object that is masked",
    "background": "share of the background that is masked",
}


# --------------------------------------------------------------------------------- pictures


class Pictures:
    """Pictures with known objects: ``images`` (N, C, H, W) uint8 and their ``groups``.

    ``truth`` (N, H, W) is the share of object in each pixel. ``units`` (N,) numbers the independent
    units: pictures, or the videos they are from. ``skipped`` counts broken pictures and those where
    the object covers less than 1 % or more than 99 %.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        mask_column: str,
        group_column: str,
        unit_column: str,
        size: data.Size,
        rule: MaskRule = BY_THRESHOLD,
        form: data.PixelFormat = data.RGB,
    ):
        # collect pictures with an object
        images, truth, self.groups, self.skipped, units = [], [], [], 0, {}
        needed = ["image", mask_column, *{group_column, unit_column} & set(dataset.column_names)]
        for record in tqdm(dataset.select_columns(needed), desc="pictures", disable=None):
            try:
                image = data.decode(record["image"], form)
                mask = object_mask(record[mask_column], rule, record["image"])
            except Exception as error:  # a broken file
                tqdm.write(data.describe_bad(len(images) + self.skipped, record["image"], error).description)
                self.skipped += 1
                continue
            if image.size != mask.size:
                raise ValueError(
                    f"a picture of {image.width}x{image.height} pixels has a mask of {mask.width}x{mask.height}"
                )
            image, mask = data.center_crop(image, size), data.center_crop(mask, size)[0] / 255
            if not 0.01 <= mask.mean() <= 0.99:
                self.skipped += 1
                continue
            images.append(image)
            truth.append(mask)
            self.groups.append(_name(dataset, group_column, record))
            units.setdefault(str(record.get(unit_column, len(images))), []).append(len(images) - 1)
        if not images:
            raise ValueError("none of the pictures shows an object")

        # number the units
        self.images, self.truth = torch.stack(images), torch.stack(truth)
        self.units = torch.empty(len(images), dtype=torch.int64)
        for number, members in enumerate(units.values()):
            self.units[members] = number

    def subsets(self) -> dict[str, Tensor]:
        """Subsets (N,) bool to report separately: all, each group, objects off centre."""
        subsets = {"all": torch.ones(len(self.images), dtype=torch.bool)}
        names = sorted(set(self.groups))
        for name in names if len(names) > 1 else []:
            subsets[name] = torch.tensor([group == name for group in self.groups])
        return subsets | {"off-centre": measures.off_centre(self.truth)}


def _name(dataset: datasets.Dataset, column: str, record: dict) -> str:
    """The value of a column as a name; "all" without such a column."""
    value, feature = record.get(column, "all"), dataset.features.get(column)
    return feature.int2str(value) if isinstance(feature, datasets.ClassLabel) else str(value)


# --------------------------------------------------------------------------------- contestants


class Contestant(NamedTuple):
    """A source of masks to compare: patch features (N, n, d), or only relevance (N, n)."""

    name: str
    features: Tensor | None = None
    relevance: Tensor | None = None


class Guess(NamedTuple):
    """Relevance (N, n) and foreground side (N, n) of a contestant, and ``how`` they were found."""

    relevance: Tensor
    side: Tensor
    how: dict


def contestants(model: smae.SMAE, images: Tensor, layers: list[int | str], seed: int) -> Iterator[Contestant]:
    """The baselines, then the model's layers, on uint8 images (N, c, H, W)."""
    count, (h, w) = len(images), model.grid(images)
    generator = torch.Generator().manual_seed(seed)
    yield Contestant("random mask", relevance=torch.rand(count, h * w, generator=generator))
    yield Contestant("centre prior", relevance=masks.centrality((h, w)).expand(count, -1))
    yield Contestant("raw pixels", raw_patches(model, images))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        untrained = smae.SMAE(**model.config).to(model.positions.device).eval()
    last_but_one = model.guiding_layer
    yield Contestant(f"untrained, {last_but_one}", features_of(untrained, images, last_but_one))
    for layer in layers:
        yield Contestant(f"model, {layer}", features_of(model, images, layer))


def raw_patches(model: smae.SMAE, images: Tensor) -> Tensor:
    """The normalised pixels of each patch (N, n, p * p * c) of uint8 images (N, c, H, W)."""
    statistics = (data.MEAN, data.STD) if images.shape[1] == 3 else model.statistics
    return smae.patchify(data.normalize(images, *statistics), model.patch_size)


@torch.no_grad()
def features_of(model: smae.SMAE, images: Tensor, layer: int | str) -> Tensor:
    """Features (N, n, d) of uint8 images (N, c, H, W), batch by batch, on the host."""
    device, statistics = model.positions.device, model.statistics
    parts = []
    for part in images.split(64):
        part = data.normalize(part.to(device), *statistics)
        parts.append(model.features(part, layer).float().cpu())
    return torch.cat(parts)


def guesses(contestant: Contestant, grid: tuple[int, int]) -> Iterator[Guess]:
    """Guess the object in every way: debiased or not, by each foreground rule and scoring.

    A contestant without features has one guess: its relevance, the upper half as foreground.
    """
    if contestant.features is None:
        relevance = contestant.relevance
        yield Guess(relevance, relevance > relevance.median(dim=1, keepdim=True).values, {})
        return
    found, mean = {}, contestant.features.mean(dim=0)
    for part in contestant.features.split(64):
        for debias in (False, True):
            affinity = masks.similarity(part - mean if debias else part)
            y = masks.normalized_cut(affinity)
            for rule in ("border", "small", "peak"):
                side = masks.foreground_side(y, grid, rule)
                for scoring in ("foreground", "contrast"):
                    relevance = masks.relevance(affinity, side, scoring)
                    found.setdefault((debias, rule, scoring), []).append((relevance, side))
    for way, parts in found.items():
        relevance, side = map(torch.cat, zip(*parts))
        yield Guess(relevance, side, dict(zip(("debias", "foreground", "relevance"), way)))


# --------------------------------------------------------------------------------- measuring


def measure(guess: Guess, share: Tensor, ratio: float) -> dict[str, Tensor]:
    """The MEASURES (N,) of a guess against an object that covers ``share`` (N, n) of each patch."""
    noise = torch.rand(share.shape, generator=torch.Generator().manual_seed(0)).to(share.device)
    masked = masks.informed_mask(guess.relevance, ratio, "none", noise=noise).masked
    of_object, of_background = measures.masked_shares(masked, share)
    iou, auc = measures.iou(guess.side, share), measures.rank_auc(guess.relevance, share)
    return {"iou": iou, "auc": auc, "object": of_object, "background": of_background}


@torch.no_grad()
def losses(model: smae.SMAE, images: Tensor, share: Tensor, ratio: float, seed: int) -> dict[str, float]:
    """The model's losses under random masks, on object and background.

    Takes uint8 images (N, C, H, W) with an object that covers ``share`` (N, n) of each patch.
    The masks depend on ``seed``, not on the model.
    """
    noise = torch.from_numpy(uniform((seed, RandomStream.MASK), range(len(images)), share.shape[1]))
    sums, device = torch.zeros(2, 2), model.positions.device  # of errors and of areas; object, background
    for some_images, some_share, some_noise in zip(images.split(64), share.split(64), noise.split(64)):
        x = data.normalize(some_images.to(device), *model.statistics)
        mask = masks.random_mask(*some_share.shape, ratio, noise=some_noise.to(device))
        errors = model.errors(x, mask).cpu()
        areas = some_share.gather(1, mask.masked.cpu())
        areas = torch.stack([areas, 1 - areas])
        sums += torch.stack([(areas * errors).sum(dim=(1, 2)), areas.sum(dim=(1, 2))])
    return dict(zip(("object", "background"), (sums[0] / sums[1]).tolist()))


# --------------------------------------------------------------------------------- results


def choose_layers(model: smae.SMAE, layers: list[int | str] | None) -> list[int | str]:
    """``layers``, by default up to four. Raises ValueError for a layer that the model lacks."""
    depth, decoder = len(model.blocks), model.config["decoder_depth"]
    usual = [max(1, depth // 2), max(1, depth - 1), depth, *[f"decoder-{decoder}"] * bool(decoder)]
    layers = list(dict.fromkeys(layers or usual))
    for layer in layers:
        if layer not in model.layers:
            raise ValueError(f"--layers {layer}: expected one of {', '.join(map(str, model.layers))}")
    return layers


def usual_split(name: str, split: str | None) -> str:
    """``split``, by default test of the demo data and train of others."""
    return split or ("test" if name in data.DEMO else "train")


def load_with_masks(name: str, split: str | None, image_column: str | None, mask_column: str, max_images: int | None):
    """Load a data set with its column of masks, undecoded: ``max_images`` from all over it, by default all.

    Raises ValueError if there is no such column.
    """
    dataset = data.load_images(name, usual_split(name, split), image_column, "", max_images=max_images, spread=True)
    if mask_column not in dataset.column_names:
        names = ", ".join(dataset.column_names)
        raise ValueError(f"{name} has no column {mask_column!r}; name one with --mask-column: {names}")
    if not isinstance(dataset.features[mask_column], datasets.Image):
        raise ValueError(f"column {mask_column!r} of {name} does not hold masks")
    return dataset.cast_column(mask_column, datasets.Image(decode=False))  # some may be broken


def summaries(values: dict[str, Tensor], subsets: dict[str, Tensor], units: Tensor) -> dict[str, dict]:
    """Mean and standard error of each measure (N,) over each subset that is not empty."""
    found = {}
    for subset, members in subsets.items():
        if members.any():
            found[subset] = {
                name: list(measures.mean_and_error(value[members], units[members])) for name, value in values.items()
            }
    return found


def table(rows: list[dict], counts: dict[str, int]) -> str:
    """A table for each subset: the four measures in per cent, mean ± standard error."""
    titles = "".join(f"{name:>12}" for name in ("IoU", "rank-AUC", "object", "background"))
    lines = []
    for subset, count in counts.items():
        lines += ["", f"{subset}: {count} pictures", f"{'':48}{titles}"]
        for row in rows if count else []:
            how = ["debiased"] * row.get("debias", False) + [row.get("foreground", ""), row.get("relevance", "")]
            values = "".join(f"{100 * mean:7.1f} ±{100 * error:3.1f}" for mean, error in row[subset].values())
            lines.append(f"{row['source']:18}{' '.join(how):30}{values}")
    return "\n".join(lines)


def sheet(seen: Pictures, grid: tuple[int, int], drawn: dict, ratio: float, how: str) -> Figure:
    """Draw the mask of each contestant, and the model's cut, relevance and clusters."""
    chosen = torch.from_numpy(data.evenly_spaced(len(seen.images), 10))
    pixels = pictures.displayable(seen.images[chosen])
    h, w = grid
    columns = {"input": pixels}
    for name, (guess, features) in drawn.items():
        relevance = guess.relevance[chosen]
        if features is not None and name.startswith("model"):
            columns[f"{name}\ncut"] = pictures.tint(pixels, guess.side[chosen].view(-1, h, w))
            columns[f"{name}\nrelevance"] = pictures.glow(pixels, relevance.view(-1, h, w))
            clusters = masks.cluster(features[chosen], min(4, h * w)).view(-1, h, w)
            columns[f"{name}\n4 clusters"] = pictures.paint(pixels, clusters)
        masked = pictures.marked(masks.informed_mask(relevance, ratio, "none").masked, grid)
        columns[f"{name}\nmask" if features is not None else name] = pictures.hide(pixels, ~masked, masked)
    truth = dict.fromkeys(columns, seen.truth[chosen] > 0.5)
    title = f"green: the object; hatched: masked, the most relevant {ratio:.0%} of {h} x {w} patches ({how})"
    labels = [seen.groups[int(i)] for i in chosen]
    return pictures.contact_sheet(columns, title, outlined=truth, labels=labels)
