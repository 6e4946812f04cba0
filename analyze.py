"""Measure what a masked autoencoder has learned.

    python analyze.py masks --checkpoint runs/pretrain                              # the test pictures of shapes
    python analyze.py masks --checkpoint runs/pretrain --dataset PATH_OR_HUB_NAME   # any data with a mask column

``masks``: how well masks find known objects, beside floors that know nothing of them, and how well the model
reconstructs object and background. Leaves in --out: result.json and masks.png.
"""

import argparse
import itertools
import json
import math
from pathlib import Path

import datasets
import torch
from einops import rearrange, reduce
from torch import Tensor
from tqdm import tqdm

import data
import masks
import pictures
import smae
import train
from cropping import RandomStream, uniform

MEASURES = {
    "iou": "IoU of the foreground side with the object",
    "auc": "rank-AUC of relevance against the object",
    "object": "share of the object that is masked",
    "background": "share of the background that is masked",
}


class Pictures:
    """Pictures with known objects: ``images`` (N, 3, H, W) uint8, ``truth`` (N, H, W) share of object, ``groups``.

    ``units`` (N,) numbers what is independent of one another: pictures, or the videos they are taken from.
    """

    def __init__(self, dataset: datasets.Dataset, mask_column: str, group_column: str, unit_column: str, size: int):
        images, truth, self.groups, self.skipped, units = [], [], [], 0, {}
        for record in tqdm(dataset, desc="pictures", disable=None):
            try:
                image, mask = data.decode(record["image"]), data.object_mask(record[mask_column])
            except Exception as error:  # a broken file
                tqdm.write(data.describe_bad(len(images) + self.skipped, record["image"], error).description)
                self.skipped += 1
                continue
            if image.size != mask.size:
                raise ValueError(f"a picture of {image.size} pixels has a mask of {mask.size}")
            image, mask = data.center_crop(image, size), data.center_crop(mask, size)[0] / 255
            if not 0.01 <= mask.mean() <= 0.99:  # nothing, or nothing but the object, is left in the crop
                self.skipped += 1
                continue
            images.append(image)
            truth.append(mask)
            group = record.get(group_column, "all")
            named = isinstance(dataset.features.get(group_column), datasets.ClassLabel)
            self.groups.append(dataset.features[group_column].int2str(group) if named else str(group))
            units.setdefault(record.get(unit_column, len(images)), []).append(len(images) - 1)
        if not images:
            raise ValueError("no picture shows an object")
        self.images, self.truth = torch.stack(images), torch.stack(truth)
        self.units = torch.empty(len(images), dtype=torch.int64)
        for number, members in enumerate(units.values()):
            self.units[members] = number

    def off_centre(self) -> Tensor:
        """Whether the centroid of the object is nearer to the border of the picture than to its centre: (N,) bool."""
        place = (torch.arange(self.truth.shape[1]) + 0.5) / self.truth.shape[1] - 0.5
        weight = self.truth.sum(dim=(1, 2))
        y, x = (self.truth.sum(2) * place).sum(1) / weight, (self.truth.sum(1) * place).sum(1) / weight
        return torch.maximum(y.abs(), x.abs()) > 0.25


# ------------------------------------------------------------------------------------------------------ measures


def overlap(side: Tensor, share: Tensor) -> Tensor:
    """Intersection over union, in pixels, of patches (b, n) bool and an object with a ``share`` (b, n) of each."""
    both = (side * share).sum(1)
    return both / (side.sum(1) + share.sum(1) - both)


def rank_auc(relevance: Tensor, share: Tensor) -> Tensor:
    """How likely a pixel of the object is more relevant than one of the background, ties counting half: (b,).

    Relevance (b, n) is that of a pixel's patch, of which the object fills a ``share`` (b, n).
    """
    areas = []
    for score, share_ in zip(relevance.split(64), share.split(64)):
        difference = (score[:, :, None] - score[:, None, :]).sign()
        pairs = share_[:, :, None] * (1 - share_)[:, None, :]
        areas.append(((difference + 1) / 2 * pairs).sum(dim=(1, 2)) / pairs.sum(dim=(1, 2)))
    return torch.cat(areas)


def measure(relevance: Tensor, side: Tensor, share: Tensor, ratio: float) -> dict[str, Tensor]:
    """The four measures (b,) of relevance (b, n) and foreground side (b, n) against an object's shares (b, n)."""
    noise = torch.rand(relevance.shape, generator=torch.Generator().manual_seed(0)).to(relevance.device)
    masked = masks.informed_mask(relevance, ratio, "none", noise=noise).masked
    hidden = torch.zeros_like(share).scatter(1, masked, 1)
    return {
        "iou": overlap(side, share),
        "auc": rank_auc(relevance, share),
        "object": (hidden * share).sum(1) / share.sum(1),
        "background": (hidden * (1 - share)).sum(1) / (1 - share).sum(1),
    }


def made_of(features: Tensor, pixels: Tensor) -> dict[str, float]:
    """What the variance of features (N, n, d) is owed to, as shares that add up to 1.

    "position": the mean of each patch position; "own pixels": what a linear map from the patch's own pixels
    (N, n, k) explains of the remainder; "context": the rest, which a patch owes to others (or to its own pixels in
    some other way).
    """
    positions = features.mean(dim=0)
    y = (features - positions).flatten(0, 1)
    x = (pixels - pixels.mean(dim=(0, 1))).flatten(0, 1)
    gram = x.T @ x
    ridge = 1e-3 * gram.diagonal().mean() * torch.eye(len(gram))
    rest = y - x @ torch.linalg.solve(gram + ridge, x.T @ y)
    total = (features - features.mean(dim=(0, 1))).pow(2).mean()
    context, beside_position = (rest.pow(2).mean() / total).item(), (y.pow(2).mean() / total).item()
    return {"position": 1 - beside_position, "own pixels": beside_position - context, "context": context}


# --------------------------------------------------------------------------------------------------------- masks


def guesses(features: Tensor | None, grid: tuple[int, int], relevance: Tensor | None = None):
    """Every way to guess the object: pairs of a name and (relevance (b, n), foreground side (b, n)).

    From features (b, n, d), debiased or not, with both rules for the foreground and both scorings; or from a given
    relevance, whose upper half is the foreground.
    """
    if features is None:
        yield {}, (relevance, relevance > relevance.median(dim=1, keepdim=True).values)
        return
    ways = list(itertools.product((False, True), ("border", "small", "peak"), ("foreground", "contrast")))
    found = {way: [] for way in ways}
    mean = features.mean(dim=0)
    for part in features.split(64):
        for debias, group in itertools.groupby(ways, key=lambda way: way[0]):
            affinity = masks.similarity(part - mean if debias else part)
            y = masks.normalized_cut(affinity)
            for way in group:
                side = masks.foreground_side(y, grid, way[1])
                found[way].append((masks.relevance(affinity, side, way[2]), side))
    for way, parts in found.items():
        yield dict(zip(("debias", "foreground", "relevance"), way)), tuple(map(torch.cat, zip(*parts)))


@torch.no_grad()
def features_of(model: smae.SMAE, images: Tensor, layer: int | str) -> Tensor:
    """Features (N, n, d) of uint8 images (N, 3, H, W), batch by batch, on the host."""
    device, config = model.positions.device, model.config
    parts = images.split(64)
    return torch.cat(
        [
            model.features(data.normalize(part.to(device), config["mean"], config["std"]), layer).float().cpu()
            for part in parts
        ]
    )


def contestants(model: smae.SMAE, images: Tensor, layers: list[int | str], seed: int):
    """Names and either features (N, n, d) or relevance (N, n): the floors first, then the model's layers."""
    h, w = model.grid(images)
    generator = torch.Generator().manual_seed(seed)
    yield "random mask", None, torch.rand(len(images), h * w, generator=generator)
    yield "centre prior", None, masks.centrality((h, w)).expand(len(images), -1)
    yield "raw pixels", smae.patchify(data.normalize(images), model.patch_size), None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        untrained = smae.SMAE(**model.config).to(model.positions.device).eval()
    last_but_one = max(1, len(model.blocks) - 1)
    yield f"untrained, {last_but_one}", features_of(untrained, images, last_but_one), None
    for layer in layers:
        yield f"model, {layer}", features_of(model, images, layer), None


@torch.no_grad()
def losses(model: smae.SMAE, images: Tensor, share: Tensor, ratio: float, seed: int) -> dict[str, float]:
    """The model's loss under random masks, apart for object and background, of which patches have a share (N, n).

    uint8 images (N, 3, H, W); every model meets the same masks.
    """
    noise = torch.from_numpy(uniform((seed, RandomStream.MASK), range(len(images)), share.shape[1]))
    sums, device = torch.zeros(2, 2), model.positions.device  # of errors and of areas; object, background
    for part, share_, noise_ in zip(images.split(64), share.split(64), noise.split(64)):
        x = data.normalize(part.to(device), model.config["mean"], model.config["std"])
        mask = masks.random_mask(*share_.shape, ratio, noise=noise_.to(device))
        prediction = model.decode(model.encode(x, mask.visible), mask, model.grid(x)).float()
        errors = (prediction - model.target(x, mask.masked)).pow(2).mean(dim=-1).cpu()
        areas = share_.gather(1, mask.masked.cpu())
        areas = torch.stack([areas, 1 - areas])
        sums += torch.stack([(areas * errors).sum(dim=(1, 2)), areas.sum(dim=(1, 2))])
    return dict(zip(("object", "background"), (sums[0] / sums[1]).tolist()))


def prepare(args: argparse.Namespace) -> tuple[smae.SMAE, list[int | str], Pictures]:
    """The model, the layers to look at, and the pictures; raises ValueError where the arguments make no sense."""
    train.check_folder(args.out, args.overwrite, ("result.json", "masks.png"))
    model = smae.load(args.checkpoint)
    model = (model.encoder if isinstance(model, smae.Classifier) else model).eval()
    model.to(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")
    depth, decoder = len(model.blocks), model.config["decoder_depth"]
    usual = [max(1, depth // 2), max(1, depth - 1), depth, *[f"decoder-{decoder}"] * bool(decoder)]
    layers = list(dict.fromkeys(args.layers or usual))
    for layer in layers:
        if layer not in model.layers:
            raise ValueError(f"--layers {layer}: there are {', '.join(map(str, model.layers))}")
    size = args.image_size or model.config["image_size"][0]
    h, w = model.grid(torch.empty(0, model.config["channels"], size, size))
    masks.masked_count(h * w, args.mask_ratio)

    split = args.split or ("test" if args.dataset.startswith("shapes") else "train")
    dataset = data.load_images(args.dataset, split, args.image_column, "", max_images=args.max_images)
    if args.mask_column not in dataset.column_names:
        names = ", ".join(dataset.column_names)
        raise ValueError(f"{args.dataset} has no column {args.mask_column!r}; name one with --mask-column: {names}")
    if not isinstance(dataset.features[args.mask_column], datasets.Image):
        raise ValueError(f"column {args.mask_column!r} of {args.dataset} does not hold masks")
    dataset = dataset.cast_column(args.mask_column, datasets.Image(decode=False))  # some may be broken
    return model, layers, Pictures(dataset, args.mask_column, args.group_column, args.unit_column, size)


def analyze_masks(args: argparse.Namespace):
    with train.one_line_errors(ValueError, OSError):
        model, layers, seen = prepare(args)
    h, w = grid = model.grid(seen.images)
    share = reduce(seen.truth, "b (h p1) (w p2) -> b (h w)", "mean", h=h, w=w)
    groups = {"all": torch.ones(len(share), dtype=torch.bool)}
    for name in sorted(set(seen.groups)):
        if len(set(seen.groups)) > 1:
            groups[name] = torch.tensor([group == name for group in seen.groups])
    groups["off-centre"] = seen.off_centre()

    last_but_one = max(1, len(model.blocks) - 1)
    shown = last_but_one if last_but_one in layers else layers[0]  # one layer is enough to look at
    wanted = dict(debias=args.guide_debias, foreground=args.foreground, relevance=args.relevance)
    rows, drawn, made, pixels = [], {}, {}, smae.patchify(data.normalize(seen.images), model.patch_size)
    for name, features, relevance in contestants(model, seen.images, layers, args.seed):
        if features is not None and name != "raw pixels":
            made[name] = made_of(features, pixels)
        for how, (scores, side) in guesses(features, grid, relevance):
            results = measure(scores, side, share, args.mask_ratio)
            found = {group: summary(results, of, seen.units) for group, of in groups.items() if of.any()}
            rows.append(dict(source=name, **how, **found))
            if how in ({}, wanted) and (not name.startswith("model") or name == f"model, {shown}"):
                drawn[name] = scores, side, features

    counts = {group: int(of.sum()) for group, of in groups.items()}
    print(f"{args.dataset}: {len(share)} pictures with an object of {share.mean():.0%}, {seen.skipped} left out")
    print(report(rows, counts), "\n\nwhat the features are made of")
    for name, shares in made.items():
        print(f"{name:18}" + ", ".join(f"{part} {share:.0%}" for part, share in shares.items()))
    loss = losses(model, seen.images, share, args.mask_ratio, args.seed) if model.config["decoder_depth"] else {}
    if loss:
        print(f"loss under random masks: object {loss['object']:.4f}, background {loss['background']:.4f}")
    args.out.mkdir(parents=True, exist_ok=True)
    arguments = {name: str(value) for name, value in vars(args).items() if name != "run"}
    result = dict(arguments=arguments, pictures=counts, measures=MEASURES, rows=rows, made_of=made, loss=loss)
    (args.out / "result.json").write_text(json.dumps(result, indent=1))
    draw(seen, grid, drawn, args).savefig(args.out / "masks.png")
    print(f"wrote result.json and masks.png to {args.out}")


def summary(results: dict[str, Tensor], of: Tensor, units: Tensor) -> dict[str, list[float]]:
    """Mean and standard error of each measure over the pictures ``of`` (N,) bool, clustered by ``units`` (N,)."""
    units = units[of].unique(return_inverse=True)[1]
    count = int(units.max()) + 1

    def mean_and_error(values: Tensor) -> list[float]:
        mean = values.mean()
        sums = torch.zeros(count).index_add(0, units, values - mean)  # those of a unit may err together
        return [mean.item(), sums.norm().item() / len(values) * math.sqrt(count / max(count - 1, 1))]

    return {name: mean_and_error(values[of]) for name, values in results.items()}


def report(rows: list[dict], counts: dict[str, int]) -> str:
    """A table for each group of pictures: the four measures in per cent, mean +- standard error."""
    titles = "".join(f"{name:>12}" for name in ("IoU", "rank-AUC", "object", "background"))
    lines = []
    for group, count in counts.items():
        lines += ["", f"{group}: {count} pictures", f"{'':48}{titles}"]
        for row in rows if count else []:
            how = ["debiased"] * row.get("debias", False) + [row.get("foreground", ""), row.get("relevance", "")]
            values = "".join(f"{100 * mean:7.1f} ±{100 * error:3.1f}" for mean, error in row[group].values())
            lines.append(f"{row['source']:18}{' '.join(how):30}{values}")
    return "\n".join(lines)


def draw(seen: Pictures, grid: tuple[int, int], drawn: dict, args: argparse.Namespace):
    """The contact sheet: what each contestant masks, of the model also cut, relevance and clusters."""
    chosen = torch.linspace(0, len(seen.images) - 1, min(10, len(seen.images))).long()
    pixels = rearrange(seen.images[chosen], "b c h w -> b h w c").numpy() / 255
    h, w = grid
    columns = {"input": pixels}
    for name, (scores, side, features) in drawn.items():
        if features is not None and name.startswith("model"):
            columns[f"{name}\ncut"] = pictures.tint(pixels, side[chosen].view(-1, h, w))
            columns[f"{name}\nrelevance"] = pictures.glow(pixels, scores[chosen].view(-1, h, w))
            clusters = masks.cluster(features[chosen], min(4, h * w)).view(-1, h, w)
            columns[f"{name}\n4 clusters"] = pictures.paint(pixels, clusters)
        masked = masks.informed_mask(scores[chosen], args.mask_ratio, "none").masked
        masked = torch.zeros(len(chosen), h * w).scatter(1, masked, 1).bool().view(-1, h, w)
        columns[f"{name}\nmask" if features is not None else name] = pictures.hide(pixels, ~masked, masked)
    truth = dict.fromkeys(columns, seen.truth[chosen] > 0.5)
    how = f"{args.foreground}, {args.relevance}{', debiased' if args.guide_debias else ''}"
    title = f"green: the object; hatched: masked, the most relevant {args.mask_ratio:.0%} of {h} x {w} patches ({how})"
    labels = [seen.groups[int(i)] for i in chosen]
    return pictures.contact_sheet(columns, title, outlined=truth, labels=labels)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Measure what a masked autoencoder has learned.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "masks", help="how well masks find known objects, beside floors", formatter_class=data.HelpFormatter
    )
    command.set_defaults(run=analyze_masks)
    command.add_argument("--checkpoint", required=True, help="run folder, or somebody else's checkpoint")
    command.add_argument("--dataset", default="shapes", help="shapes (the demo data), path or hub name: as in train.py")
    command.add_argument("--split", help="split of the data (default: test of shapes, else train)")
    command.add_argument("--image-column", help="column of the images (default: found by its type)")
    command.add_argument(
        "--mask-column",
        default="mask",
        help="column of the masks: object is what exceeds 127; if nothing does, what is not 0",
    )
    command.add_argument("--group-column", default="source", help="column to report separately by, if there is one")
    command.add_argument(
        "--unit-column", default="group", help="column of what errs together (frames of a video), for standard errors"
    )
    command.add_argument("--max-images", type=int, help="use the first so many images")
    command.add_argument("--image-size", type=int, help="side of the centre crops, in pixels (default: the model's)")
    command.add_argument(
        "--layers", type=train.block, nargs="+", help="blocks: numbers, decoder-1, ... (default: 4 of them)"
    )
    command.add_argument("--mask-ratio", type=float, default=0.75, help="share of the patches that is masked")
    command.add_argument("--guide-debias", action="store_true", help="draw debiased features (the table has both)")
    command.add_argument("--foreground", choices=["border", "small", "peak"], default="border", help="draw this rule")
    command.add_argument(
        "--relevance", choices=["foreground", "contrast"], default="contrast", help="draw this scoring"
    )
    command.add_argument("--seed", type=int, default=0, help="of random masks and untrained encoder")
    command.add_argument("--out", type=Path, default=Path("runs/masks"), help="folder for result.json and masks.png")
    command.add_argument("--overwrite", action="store_true", help="replace the result that is there")
    return parser


def main():
    args = build_parser().parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
