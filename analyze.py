"""Look at what encoders have learned: the tables and figures of the paper's analysis, on any checkpoints.

    python analyze.py report --checkpoint random ours=runs/pretrain dino=facebook/dinov2-small --dataset PHOTOS
    python analyze.py attention --checkpoint ours=runs/pretrain mae=facebook/vit-mae-base  # or another command
    python analyze.py masks --checkpoint runs/pretrain  # masks against known objects, beside floors

--checkpoint takes NAME=PATH, several times: run folders, checkpoints of others and their names on the
hub, and (but for ``masks``, which has them beside every model) ``random`` and ``pixels``. Each command
writes its figures and result.json to --out; ``report`` all of them, and report.html. What an encoder
lacks (a decoder, a CLS token) is left out, with a message.
"""

import argparse
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
from einops import reduce
from torch import Tensor

import cli
import contest
import data
import encoders
import looks
import masks
import measures
import pictures
import report
import smae
from looks import Subject
from objects import BY_THRESHOLD, sample_pictures, understand_column
from report import Finding


@dataclass
class How:
    """What the commands share: options that change what is measured or drawn."""

    ratio: float
    seed: int
    layers: list[int | str] | None
    foreground: str
    relevance: str
    clusters: int
    drawn: int  # pictures in figures
    checkpoints: int  # of a run, in ``progress``


# --------------------------------------------------------------------------------- the paper's figures


def layers(subjects: list[Subject], how: How) -> Finding:
    """Cut, relevance and mask of several blocks (figure VIII), and how well they find known objects."""
    found, figures = Finding(), {}
    for subject in with_model(subjects, found):
        depth, decoder = len(subject.model.blocks), subject.model.config["decoder_depth"]
        usual = [-(-depth // 4), depth // 2, depth - 1, *[f"decoder-{decoder}"] * bool(decoder)]
        chosen = [layer for layer in how.layers or dict.fromkeys(usual) if layer in subject.model.layers]
        if not chosen:
            found.left_out.append(f"{subject.name} has none of these layers")
            continue
        shown, x = few(subject, how.drawn)
        columns = {"input": shown}
        for layer in chosen:
            relevance, side = masks.find_object(subject.features(x, layer), subject.grid, how.foreground, how.relevance)
            mask = pictures.marked(masks.informed_mask(relevance, how.ratio, "none").masked, subject.grid)
            side, relevance = on_grid(subject, side), on_grid(subject, relevance)
            columns |= {
                f"layer {layer}: cut": pictures.tint(shown, side),
                "relevance" + " " * len(columns): pictures.glow(shown, relevance),
            }
            columns["mask" + " " * len(columns)] = pictures.hide(shown, ~mask, mask)
        figures[subject.name] = pictures.contact_sheet(columns, f"{subject.name}: cut, relevance and mask by layer")
    if any(subject.model and subject.objects is not None for subject in subjects):
        curves = {s.name: looks.objects_found(s, how.foreground, how.relevance) for s in subjects if s.model}
        titles = {"iou": "IoU of the cut with the object", "auc": "rank-AUC of the relevance"}
        panels = {title: pick(curves, key) for key, title in titles.items()}
        figures["by layer"] = pictures.by_layer(panels, order=names(subjects))
        found.numbers = {name: summary(by) for name, by in curves.items()}
    return found.with_figures(figures)


def relations(subjects: list[Subject], how: How) -> Finding:
    """The relations of patches in the last block (figure 2)."""
    found, shown, maps = Finding(), few(subjects[0], how.drawn)[0], [{} for _ in range(how.drawn)]
    for subject in subjects:
        _, x = few(subject, how.drawn)
        tokens = subject.features(x)
        similarity, mean = masks.similarity(tokens), tokens.mean(dim=1, keepdim=True)
        to_mean = torch.cosine_similarity(tokens.float(), mean.float(), dim=-1)
        attention = None
        if subject.model and subject.model.config["class_token"]:
            attention = on_grid(subject, subject.model.class_attention(x).mean(dim=1))
        elif subject.model:
            found.left_out.append(f"{subject.name} has no CLS token, so no attention of it")
        for row, picture_maps in enumerate(maps[: len(x)]):
            picture_maps[f"{subject.name}:\nsimilarity"] = similarity[row].cpu().numpy()
            picture_maps["to the mean patch" + " " * len(picture_maps)] = on_grid(subject, to_mean)[row].cpu().numpy()
            if attention is not None:
                picture_maps["CLS attention" + " " * len(picture_maps)] = attention[row].cpu().numpy()
    return found.with_figures({"relations": pictures.relation_sheet(shown, maps[: len(shown)])})


def variance(subjects: list[Subject], how: How) -> Finding:
    """Variance of features and of similarities, in encoder and decoder (table 1)."""
    found, panels = Finding(), {}
    for subject in subjects:
        places = {"encoder": None} | (
            {"decoder": f"decoder-{subject.model.config['decoder_depth']}"} if subject.has_decoder else {}
        )
        if len(places) == 1:
            found.left_out.append(f"{subject.name} has no decoder")
        for place, layer in places.items():
            for what, values in looks.variances(subject, layer).items():
                panels.setdefault(f"{place}: σ of {what}", {})[subject.name] = spread(values)
    found.numbers = panels
    return found.with_figures({"variance": pictures.points(panels, names(subjects))})


def progress(subjects: list[Subject], how: How) -> Finding:
    """How the patch clusters of a run came about (figures 3, 4 and V)."""
    found, figures = Finding(), {}
    for subject in subjects:
        try:
            seen = looks.progress(subject, Path(subject.path), how.checkpoints, how.ratio, how.seed)
        except (ValueError, OSError) as error:  # not a run, or one without its checkpoints
            found.left_out.append(f"{subject.name}: {error}")
            continue
        epochs = seen["epochs"]
        panels = {
            f"μintra − μinter, by {way}": {f"{cut} cut": (epochs, values) for cut, values in cuts.items()}
            for way, cuts in seen["gaps"].items()
        }
        panels["KL from the last checkpoint, nats"] = {f"layer {k}": (epochs, v) for k, v in seen["divergence"].items()}
        blocks = len(seen["exploited"]["mask"][0]) if seen["exploited"]["mask"] else 0
        panels["exploitation rate"] = {
            f"{kind} tokens, block {block + 1}": (epochs, [rates[block] for rates in seen["exploited"][kind]])
            for block in range(blocks)
            for kind in ("mask", "visible")
        }
        figures[subject.name] = pictures.over_epochs({k: v for k, v in panels.items() if v}, subject.name)
        found.numbers[subject.name] = seen
    return found.with_figures(figures)


def attention(subjects: list[Subject], how: How) -> Finding:
    """Attention distance and normalised mutual information by layer (figures 6 and 7a)."""
    found = Finding()
    scans = {s.name: looks.scan(s, how.ratio, how.seed) for s in with_model(subjects, found)}
    titles = {"distance": "attention distance, pixels", "information": "normalised mutual information"}
    panels = {title: {name: scanned[key] for name, scanned in scans.items()} for key, title in titles.items()}
    found.numbers = {name: {key: spreads(scanned[key]) for key in titles} for name, scanned in scans.items()}
    return found.with_figures(
        {"attention": pictures.by_layer(panels, dots=True, order=names(subjects))} if scans else {}
    )


def fourier(subjects: list[Subject], how: How) -> Finding:
    """Relative log amplitudes of the tokens by frequency and layer (figure 7b)."""
    found = Finding()
    scans = {s.name: looks.scan(s, how.ratio, how.seed)["spectrum"] for s in with_model(subjects, found)}
    if not scans:
        return found
    highest = {name: {layer: values[:, -1] for layer, values in by.items()} for name, by in scans.items()}
    found.numbers = {name: spreads(by) for name, by in highest.items()}
    panel = {"Δ log amplitude of the highest frequency": highest}
    return found.with_figures(
        {"fourier": pictures.by_layer(panel, order=names(subjects)), "spectra": pictures.spectra(scans)}
    )


def tokens(subjects: list[Subject], how: How) -> Finding:
    """Variance of the mask tokens by decoder block (figure 7c)."""
    found, scans = Finding(), {}
    for subject in with_model(subjects, found):
        if subject.has_decoder:
            scans[subject.name] = looks.scan(subject, how.ratio, how.seed)
        else:
            found.left_out.append(f"{subject.name} has no decoder")
    keys = ("tokens", "directions")
    found.numbers = {name: {key: spreads(scanned[key]) for key in keys} for name, scanned in scans.items()}
    titles = {"tokens": "variance of the mask tokens", "directions": "variance of their directions, 0 to 1"}
    panels = {title: {name: scanned[key] for name, scanned in scans.items()} for key, title in titles.items()}
    return found.with_figures({"tokens": pictures.by_layer(panels, order=names(subjects))} if scans else {})


def clusters(subjects: list[Subject], how: How) -> Finding:
    """Clusters of patches, painted and by t-SNE (figures III and VII)."""
    from sklearn.manifold import TSNE
    from sklearn.metrics import silhouette_score

    found, reference, shown = Finding(), None, few(subjects[0], how.drawn)[0]
    columns, clouds, scores = {"input": shown}, [{} for _ in shown], {}
    for subject in subjects:
        own, x = few(subject, how.drawn)
        features = subject.features(x).float().cpu()
        labels = masks.cluster(features, min(how.clusters, features.shape[1]))
        cells = on_grid(subject, labels)
        reference = cells if reference is None else reference
        for row in range(len(x)):
            cells[row] = matched(cells[row], reference[row], how.clusters)
            flat, points = cells[row].flatten(), torch.nn.functional.normalize(features[row], dim=-1).numpy()
            places = TSNE(perplexity=min(20, len(points) - 1), init="pca", random_state=how.seed).fit_transform(points)
            clouds[row][subject.name] = places, flat.numpy()
            if 1 < len(flat.unique()) < len(points):
                scores.setdefault(subject.name, []).append(silhouette_score(points, flat.numpy(), metric="cosine"))
        columns[subject.name] = pictures.paint(own, cells)
    found.numbers = {name: dict(silhouette=spread(torch.tensor(v))) for name, v in scores.items()}
    sheet = pictures.contact_sheet(
        same_size(columns), f"{how.clusters} clusters by recursive normalized cut, last block"
    )
    return found.with_figures({"clusters": sheet, "tsne": pictures.scatter_sheet(clouds)})


def reconstruction(subjects: list[Subject], how: How) -> Finding:
    """The loss of several models under the same random masks, and under their own (table III)."""
    found, figures = Finding(), {}
    for subject in with_model(subjects, found):
        if not subject.has_decoder:
            found.left_out.append(f"{subject.name} has no decoder")
            continue
        rows = found.numbers[subject.name] = {}
        for kind in ("random", "own", "own, no hints"):
            rules = how.foreground, how.relevance
            errors, masked = looks.reconstruction_errors(subject, kind, how.ratio, how.seed, *rules)
            rows[kind] = dict(loss=spread(errors.mean(dim=1)))
            if subject.share is not None:
                of_object = subject.share.gather(1, masked)
                for part, weights in (("object", of_object), ("background", 1 - of_object)):
                    rows[kind][part] = ((errors * weights).sum() / weights.sum()).item() if weights.any() else None
        shown, x = few(subject, how.drawn)
        mask = subject.random_mask(slice(0, len(x)), how.ratio, how.seed)
        hidden = pictures.marked(mask.masked, subject.grid)
        rebuilt = data.denormalize(subject.model.reconstruct(x, mask), *subject.encoder.statistics)
        columns = {"input": shown, "masked": pictures.hide(shown, ~hidden, hidden)}
        columns["reconstruction"] = pictures.displayable(rebuilt)
        figures[subject.name] = pictures.contact_sheet(columns, subject.name)
    return found.with_figures(figures)


FIGURES: dict[str, Callable[[list[Subject], How], Finding]] = {
    function.__name__: function
    for function in (layers, relations, variance, progress, attention, fourier, tokens, clusters, reconstruction)
}

# --------------------------------------------------------------------------------- what they share


def names(subjects: list[Subject]) -> list[str]:
    return [subject.name for subject in subjects]


def with_model(subjects: list[Subject], found: Finding) -> list[Subject]:
    """The subjects that have blocks; the others are named as left out."""
    found.left_out += [f"{subject.name} has no blocks" for subject in subjects if not subject.model]
    return [subject for subject in subjects if subject.model]


def few_rows(subject: Subject, count: int) -> Tensor:
    """The indices of ``count`` pictures from all over."""
    return torch.from_numpy(data.evenly_spaced(len(subject.images), count))


def few(subject: Subject, count: int) -> tuple[np.ndarray, Tensor]:
    """A few pictures, to show (k, H, W, 3) and normalised on the device (k, c, H, W)."""
    images = subject.images[few_rows(subject, count)]
    return pictures.displayable(images), data.normalize(images.to(subject.device), *subject.encoder.statistics)


def on_grid(subject: Subject, values: Tensor) -> Tensor:
    """Values of patches (k, n) as (k, h, w), on the host."""
    return values.cpu().unflatten(1, subject.grid)


def matched(labels: Tensor, reference: Tensor, k: int) -> Tensor:
    """Labels (h, w), renumbered below ``k`` so that they agree with a reference on as much area as possible."""
    from scipy.optimize import linear_sum_assignment

    if labels.shape != reference.shape:
        reference = torch.nn.functional.interpolate(reference[None, None].float(), labels.shape)[0, 0].long()
    overlap = torch.zeros(k, k).index_put((labels.flatten(), reference.flatten()), torch.ones(()), accumulate=True)
    return torch.from_numpy(linear_sum_assignment(overlap.numpy(), maximize=True)[1])[labels]


def same_size(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Columns of pictures, enlarged or reduced to the size of the largest."""
    height, width = max(column.shape[1:3] for column in columns.values())
    resized = {}
    for name, column in columns.items():
        rows = np.arange(height) * column.shape[1] // height
        across = np.arange(width) * column.shape[2] // width
        resized[name] = column[:, rows][:, :, across]
    return resized


def pick(curves: dict[str, dict], key: str) -> dict[str, dict]:
    return {name: {layer: values[key] for layer, values in by.items()} for name, by in curves.items()}


def spread(values: Tensor) -> dict[str, float]:
    """Mean and standard deviation over pictures, without those that have no value."""
    values = values[~values.isnan()].float()
    mean = values.mean().item() if len(values) else None  # JSON knows no NaN
    return dict(mean=mean, deviation=values.std().item() if len(values) > 1 else 0.0)


def spreads(by: dict) -> dict[str, dict]:
    """Mean and deviation over pictures of each layer's values (N,), or (N, heads) averaged over heads."""
    return {str(layer): spread(values.view(len(values), -1).mean(dim=1)) for layer, values in by.items()}


def summary(by: dict[int | str, dict[str, Tensor]]) -> dict[str, dict]:
    """Mean and deviation over pictures of each value of each layer."""
    return {str(layer): {name: spread(v) for name, v in values.items()} for layer, values in by.items()}


# --------------------------------------------------------------------------------- masks


def analyze_masks(args: argparse.Namespace):
    """Run the command ``masks``: for several checkpoints, each in a folder of its own."""
    with cli.one_line_errors(ValueError):
        named = named_checkpoints(args.checkpoint)
    for name, path in named.items():
        out = args.out / name if len(named) > 1 else args.out
        contest_of(argparse.Namespace(**vars(args) | dict(checkpoint=path, out=out)))


def contest_of(args: argparse.Namespace):
    """Masks of one checkpoint against known objects, beside baselines."""
    # check the options, load model and pictures
    with cli.one_line_errors(ValueError, OSError):
        cli.check_folder(args.out, args.overwrite, ("result.json", "masks.png"))
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
        model = encoders.backbone(args.checkpoint, device, image_size=args.image_size)
        layers, size = contest.choose_layers(model, args.layers), args.image_size or model.config["image_size"]
        h, w = grid = model.grid(torch.empty(0, model.config["channels"], *data.pair(size)))
        masks.masked_count(h * w, args.mask_ratio)
        columns = args.image_column, args.mask_column
        dataset = contest.load_with_masks(args.dataset, args.split, *columns, args.max_images)
        rule = understand_column(dataset, args.mask_column, args.object_ids, args.object_void)
        print(f"masks of column {args.mask_column}: {rule.kind}")
        form = data.pixel_format(dataset, model.config["channels"], args.pixel_range)
        columns = args.mask_column, args.group_column, args.unit_column
        seen = contest.Pictures(dataset, *columns, size, rule, form)
    share = reduce(seen.truth, "b (h p1) (w p2) -> b (h w)", "mean", h=h, w=w)
    subsets, pixels = seen.subsets(), contest.raw_patches(model, seen.images)

    # measure every guess, keep those to draw
    wanted = dict(debias=args.guide_debias, foreground=args.foreground, relevance=args.relevance)
    last_but_one = model.guiding_layer
    drawn_layer = last_but_one if last_but_one in layers else layers[0]  # draw one layer only
    rows, drawn, variance = [], {}, {}
    for contestant in contest.contestants(model, seen.images, layers, args.seed):
        name = contestant.name
        if contestant.features is not None and name != "raw pixels":
            variance[name] = measures.variance_shares(contestant.features, pixels)
        for guess in contest.guesses(contestant, grid):
            values = contest.measure(guess, share, args.mask_ratio)
            rows.append(dict(source=name, **guess.how, **contest.summaries(values, subsets, seen.units)))
            if guess.how in ({}, wanted) and (not name.startswith("model") or name == f"model, {drawn_layer}"):
                drawn[name] = guess, contestant.features

    # print the results
    counts = {name: int(members.sum()) for name, members in subsets.items()}
    print(f"{args.dataset}: {len(share)} pictures with an object of {share.mean():.0%} area, {seen.skipped} left out")
    print(contest.table(rows, counts), "\n\nwhere the variance of the features comes from")
    for name, shares in variance.items():
        print(f"{name:18}" + ", ".join(f"{part} {share:.0%}" for part, share in shares.items()))
    loss = (
        contest.losses(model, seen.images, share, args.mask_ratio, args.seed) if model.config["decoder_depth"] else {}
    )
    if loss:
        print(f"loss under random masks: object {loss['object']:.4f}, background {loss['background']:.4f}")

    # write result.json and masks.png
    args.out.mkdir(parents=True, exist_ok=True)
    result = dict(arguments=cli.plain(vars(args)), pictures=counts, measures=contest.MEASURES, rows=rows)
    result |= dict(made_of=variance, loss=loss)
    smae.write_text(args.out / "result.json", json.dumps(result, indent=1))
    how = f"{args.foreground}, {args.relevance}{', debiased' if args.guide_debias else ''}"
    pictures.save(contest.sheet(seen, grid, drawn, args.mask_ratio, how), args.out / "masks.png")
    print(f"wrote result.json and masks.png to {args.out}")


# --------------------------------------------------------------------------------- command line


def open_subjects(args: argparse.Namespace) -> list[Subject]:
    """The encoders of --checkpoint and the pictures of --dataset. Raises ValueError or OSError."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    dataset = data.load_images(args.dataset, contest.usual_split(args.dataset, args.split), args.image_column)
    rule = BY_THRESHOLD
    if isinstance(dataset.features.get(args.mask_column), datasets.Image):
        rule = understand_column(dataset, args.mask_column, args.object_ids, args.object_void)
        print(f"objects of column {args.mask_column}: {rule.kind}")
    elif args.mask_column != "mask" or args.object_ids or args.object_void is not None:
        raise ValueError(f"{args.dataset} has no column {args.mask_column!r} of masks: see --mask-column")
    named = named_checkpoints(args.checkpoint)
    asked = dict(image_size=args.image_size) if args.image_size else {}
    paths = {name: path for name, path in named.items() if path not in ("random", "pixels")}
    loaded = {name: encoders.load(path, untrained=asked) for name, path in paths.items()}
    like = next((encoder.backbone.config for encoder in loaded.values()), {}) | asked  # for encoders without a size
    torch.manual_seed(args.seed)

    found, crops = [], {}
    for name, path in named.items():
        encoder = loaded.get(name) or encoders.load(path, untrained=like)
        size = args.image_size or encoder.image_size
        key = *data.pair(size), encoder.channels
        if key not in crops:
            form = data.pixel_format(dataset, encoder.channels, args.pixel_range)
            crops[key] = sample_pictures(dataset, args.max_images, size, args.mask_column, rule, form)
        subject = Subject(name, encoder.to(device).eval(), *crops[key], device=device, path=path)
        subject.grid  # noqa: B018  # or raise
        found.append(subject)
    if len({each.images.shape[2:] for each in found}) > 1:
        print("the encoders see pictures of different sizes: compare distances in pixels with that in mind")
    return found


def named_checkpoints(texts: list[str]) -> dict[str, str]:
    """Paths by name, from NAME=PATH or PATH, whose last part is the name then. Raises ValueError for bad names."""
    named = {}
    for text in texts:
        given = re.match(r"[^/=]+=", text) and not Path(text).exists()
        name, path = text.split("=", 1) if given else (Path(text.partition("@")[0]).name, text)
        if other := next((other for other in named if other.replace(" ", "-") == name.replace(" ", "-")), None):
            alike = f"are called {name}" if name == other else f"{other} and {name} would share their files"
            raise ValueError(f"two checkpoints {alike}: name them apart with NAME=PATH")
        if not re.fullmatch(r"\w[\w .+-]*", name):
            raise ValueError(f"{name!r} is no name for a checkpoint: letters, digits, spaces and . + - _ are")
        named[name] = path
    return named


def look(args: argparse.Namespace):
    """Run one of the commands of :data:`FIGURES`, or all of them."""
    with cli.one_line_errors(ValueError, OSError):
        files = ("result.json", "report.html") if args.command == "report" else ("result.json",)
        cli.check_folder(args.out, args.overwrite, files)
        subjects = open_subjects(args)
        how = How(
            ratio=args.mask_ratio,
            seed=args.seed,
            layers=args.layers,
            foreground=args.foreground,
            relevance=args.relevance,
            clusters=args.clusters,
            drawn=args.drawn,
            checkpoints=args.checkpoints,
        )
        args.out.mkdir(parents=True, exist_ok=True)
        findings, result = {}, dict(arguments=cli.plain(vars(args)), pictures=len(subjects[0].images))
        if how.layers and not any(layer in subject.encoder.layers for subject in subjects for layer in how.layers):
            raise ValueError(f"--layers {' '.join(map(str, how.layers))}: no encoder has such a block")
        for name, command in FIGURES.items():
            if args.command in (name, "report"):
                start = time.perf_counter()
                try:
                    findings[name] = command(subjects, how)
                except (ValueError, OSError, RuntimeError) as error:  # of these a GPU without memory is one
                    if args.command == name:
                        raise
                    findings[name] = Finding(left_out=[f"everything: {error}"])  # the others matter as well
                print(
                    findings[name].text(name, command.__doc__), f"\n({time.perf_counter() - start:.0f} s)", flush=True
                )
                for title, figure in findings[name].figures.items():
                    file = f"{name}-{title}".replace(" ", "-") if title != name else name
                    pictures.save(figure, args.out / f"{file}.png")
                result[name] = dict(findings[name].numbers, left_out=findings[name].left_out)
        smae.write_text(args.out / "result.json", json.dumps(result, indent=1) + "\n")
        if args.command == "report":
            abouts = {name: function.__doc__ for name, function in FIGURES.items()}
            rows = few_rows(subjects[0], 2 * how.drawn)
            explorer = report.explore(
                subjects, rows, how.layers, how.foreground, how.relevance, how.ratio, how.clusters
            )
            smae.write_text(args.out / "report.html", report.write(findings, abouts, result["arguments"], explorer))
    print(f"wrote {', '.join(files)} and figures to {args.out}")


def count(text: str) -> int:
    """Parse the value of an option: a number above 0."""
    if text.isdecimal() and int(text):
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Look at what encoders have learned.")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, help: str, checkpoint: dict) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help, formatter_class=cli.HelpFormatter)
        sub.add_argument("--checkpoint", required=True, action="extend", **checkpoint)
        cli.add(sub, "dataset", "image-column", "pixel-range", "image-size")
        sub.add_argument("--split", help="split of the data (default: train; of the demo data: test)")
        sub.add_argument("--max-images", type=int, help="pictures to look at, evenly spaced in the data")
        sub.add_argument(
            "--mask-column",
            default="mask",
            help="column of the masks; the log says what is taken for the object in them",
        )
        sub.add_argument(
            "--layers",
            type=cli.block,
            nargs="+",
            help="blocks to show in layers, masks and the page: numbers, decoder-1, ... (default: up to 4)",
        )
        cli.add(sub, "object-ids", "object-void", "mask-ratio", "foreground", "relevance", "seed", "overwrite")
        cli.add(sub, "out", out=Path("runs") / name)
        return sub

    several = dict(nargs="+", metavar="NAME=PATH", help="run folders, checkpoints, names on the hub, random or pixels")
    helps = {name: function.__doc__ for name, function in FIGURES.items()} | dict(
        report="All of the above, in report.html."
    )
    for name, help in helps.items():
        sub = command(name, help, several)
        sub.set_defaults(max_images=256)
        sub.add_argument(
            "--clusters", type=int, choices=range(1, 11), default=8, help="clusters of patches in a picture"
        )
        sub.add_argument("--drawn", type=count, default=6, help="pictures in a figure")
        sub.add_argument("--checkpoints", type=count, default=12, help="checkpoints of a run, at most, in progress")
    sub = command("masks", "How well masks find known objects, beside baselines.", several)
    sub.add_argument("--group-column", default="source", help="column of groups to report separately, if it exists")
    sub.add_argument(
        "--unit-column", default="group", help="column of videos, or other correlated pictures, for standard errors"
    )
    cli.add(sub, "guide-debias")
    return parser


def main(arguments: list[str] | None = None):
    args = build_parser().parse_args(arguments)
    analyze_masks(args) if args.command == "masks" else look(args)


if __name__ == "__main__":
    main()
