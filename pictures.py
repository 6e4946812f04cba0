"""Figures: masks and reconstructions, loss and accuracy curves."""

import json
import os
import statistics
from pathlib import Path

import matplotlib
import matplotlib.ticker
import numpy as np
import torch
from einops import rearrange, repeat
from matplotlib.figure import Figure
from torch import Tensor

import data
import masks
import smae
from cropping import RandomStream, uniform
from guide import Guide

matplotlib.rcParams["savefig.dpi"] = 100
ORANGE, GREEN = "#ff7f0e", "#39ff14"
# of Okabe and Ito, told apart by colour-blind eyes
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000", "#999933"]
MARKERS = "osD^vP*X"
CLUSTERS = [matplotlib.colors.to_rgb(colour) for colour in [*COLOURS, "#F0E442", "#882255"]]


def save(figure: Figure, path: Path):
    """Write a figure as PNG, whole or not at all."""
    with smae.whole_file(path) as part:
        figure.savefig(part, format="png")


def marked(indices: Tensor, grid: tuple[int, int]) -> Tensor:
    """Patches (b, k) by their indices, on a grid (b, h, w) bool."""
    h, w = grid
    empty = torch.zeros(len(indices), h * w, dtype=torch.bool, device=indices.device)
    return empty.scatter(1, indices, True).unflatten(1, grid)


@torch.no_grad()
def mask_sheet(guide: Guide, images: Tensor, truth: Tensor | None, epoch: int) -> Figure:
    """Draw masks and reconstructions of uint8 images (b, c, H, W), one row each.

    Columns: input, random mask, bipartition, relevance, informed mask, informed mask with the
    hints of ``epoch``, reconstruction; with AMT: input, random mask, attention, mask,
    reconstruction. Hints have orange frames. ``truth`` (b, H, W) bool outlines the object in the
    input.
    """
    # mask the images as in training
    model = guide.model
    device = model.positions.device
    statistics = model.statistics
    x = data.normalize(images.to(device), *statistics)
    h, w = model.grid(x)
    noise = data.to_device(uniform((0, RandomStream.MASK), np.arange(len(x)), h * w), device)
    relevance, side = guide.relevance(x, objects=truth)
    if guide.shuffle:
        relevance, side = relevance.roll(1, 0), side if side is None else side.roll(1, 0)
    mask = guide.mask(relevance, noise, epoch)
    pixels = displayable(images)

    def covered(mask: masks.Mask) -> np.ndarray:
        return hide(pixels, marked(mask.visible, (h, w)), marked(mask.masked, (h, w)))

    # draw each step in a column
    columns = {"input": pixels, "random mask": covered(masks.random_mask(len(x), h * w, guide.ratio, noise=noise))}
    rebuilt = displayable(data.denormalize(model.reconstruct(x, mask), *statistics))
    heat = glow(pixels, relevance.view(-1, h, w))
    framed = {}
    if guide.kind == "amt":
        thrown = ~marked(mask.visible, (h, w)) & ~marked(mask.masked, (h, w))
        columns |= {"attention": heat, "AMT mask\n(thrown away: black)": covered(mask)}
        columns["reconstruction"] = hide(rebuilt, ~thrown, ~thrown)
    else:
        hints = masks.choose_hints(relevance, guide.ratio, guide.hint, *guide.hint_shares(epoch), noise=noise)
        hinted = f"informed mask,\n{hints.shape[1]} hints ({guide.hint})"
        columns |= {
            "bipartition\n(object side in colour)": tint(pixels, side.view(-1, h, w)),
            "relevance": heat,
            "informed mask": covered(masks.informed_mask(relevance, guide.ratio, "none", noise=noise)),
            hinted: covered(mask),
            "reconstruction\nfrom hints + rest": rebuilt,
        }
        framed[hinted] = marked(hints, (h, w))

    # name the guide and the masked share
    title = f"epoch {epoch}: "
    if guide.source_name or guide.shuffle:
        origin = f"guided by {guide.source_name}" if guide.source_name else "shuffled"
        title += f"not self-guided but {origin}{', shuffled' * bool(guide.source_name and guide.shuffle)}\n"
    title += f"masked patches hatched, {mask.masked.shape[1] / (h * w):.0%} of {h} x {w}"
    if model.normalize_pixels:
        title += "; rebuilt patches have the input's brightness and contrast"
    return contact_sheet(columns, title, framed, {"input": truth})


def displayable(images: Tensor) -> np.ndarray:
    """uint8 images (b, c, H, W) as pictures (b, H, W, 3) in [0, 1]: grey, RGB, or the first three channels."""
    channels = [0, 0, 0] if images.shape[1] < 3 else [0, 1, 2]
    return rearrange(images[:, channels], "b c h w -> b h w c").cpu().numpy() / 255


def contact_sheet(
    columns: dict[str, np.ndarray],
    title: str,
    framed: dict[str, Tensor] | None = None,
    outlined: dict[str, Tensor | None] | None = None,
    labels: list[str] | None = None,
) -> Figure:
    """Draw named columns of pictures (b, H, W, 3) in [0, 1], side by side.

    ``framed`` maps columns to patches (b, h, w) that get orange frames where True, ``outlined``
    maps columns to pixels (b, H, W) whose True shape is outlined in green. ``labels`` stand to the
    left of the rows.
    """
    rows, height, width, _ = next(iter(columns.values())).shape
    figure = Figure(figsize=(1.75 * len(columns), 1.75 * rows * height / width + 0.9), layout="constrained")
    axes = figure.subplots(rows, len(columns), squeeze=False)
    for column, (name, pictures) in enumerate(columns.items()):
        axes[0, column].set_title(name, fontsize=11)
        for row, picture in enumerate(pictures):
            axis = axes[row, column]
            axis.imshow(picture, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            if framed and name in framed:
                outline_patches(axis, framed[name][row], height // framed[name].shape[1])
            if outlined and outlined.get(name) is not None and outlined[name][row].any():
                axis.contour(outlined[name][row].cpu().numpy(), levels=[0.5], colors=GREEN, linewidths=1.2)
    for row, label in enumerate(labels or []):
        axes[row, 0].set_ylabel(label, fontsize=9)
    figure.suptitle(title, fontsize=11)
    return figure


def enlarge(cells: Tensor | np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """Enlarge patch values (b, h, w, ...) to (b, H, W, ...), the size of ``pixels``."""
    p = pixels.shape[1] // cells.shape[1]
    cells = cells.cpu().numpy() if isinstance(cells, Tensor) else cells
    return repeat(cells, "b h w ... -> b (h p1) (w p2) ...", p1=p, p2=p)


def hide(pixels: np.ndarray, visible: Tensor, masked: Tensor) -> np.ndarray:
    """Hatch the ``masked`` (b, h, w) patches of pictures (b, H, W, 3) in [0, 1].

    Patches that are neither masked nor ``visible`` (b, h, w) become black.
    """
    y, x = np.indices(pixels.shape[1:3])
    hatching = np.where((x + y) // 2 % 2, 0.62, 0.8)[..., None]  # plain grey would look like a cloudy sky
    cover = np.where(enlarge(masked, pixels)[..., None], hatching, 0.08)
    return np.where(enlarge(visible, pixels)[..., None], pixels, cover)


def tint(pixels: np.ndarray, side: Tensor) -> np.ndarray:
    """Dim pictures (b, H, W, 3) in [0, 1] and tint them blue outside the ``side`` (b, h, w)."""
    dimmed = 0.25 * pixels.mean(-1, keepdims=True) + np.array([0.05, 0.1, 0.45])
    return np.where(enlarge(side, pixels)[..., None], pixels, dimmed)


def glow(pixels: np.ndarray, relevance: Tensor) -> np.ndarray:
    """Lay the relevance (b, h, w) in colours over grey pictures (b, H, W, 3) in [0, 1].

    The colours span the relevance of each picture, from least to most.
    """
    low, high = relevance.float().flatten(1).aminmax(dim=1)
    scaled = (relevance.float() - low[:, None, None]) / (high - low).clamp(min=1e-12)[:, None, None]
    colours = matplotlib.colormaps["inferno"](scaled.cpu().numpy())[..., :3]
    return 0.35 * pixels.mean(-1, keepdims=True) + 0.65 * enlarge(colours, pixels)


def paint(pixels: np.ndarray, labels: Tensor) -> np.ndarray:
    """Lay a colour per cluster (b, h, w) over grey pictures (b, H, W, 3) in [0, 1]."""
    colours = np.array(CLUSTERS)[labels.cpu().numpy() % len(CLUSTERS)]
    return 0.45 * pixels.mean(-1, keepdims=True) + 0.55 * enlarge(colours, pixels)


def outline_patches(axis, cells: Tensor, p: int):
    """Draw orange frames around the True ``cells`` (h, w) of a picture with patch side ``p``."""
    for row, column in cells.nonzero().tolist():
        frame = matplotlib.patches.Rectangle((column * p - 0.5, row * p - 0.5), p, p, fill=False)
        frame.set(edgecolor=ORANGE, linewidth=1.6)
        axis.add_patch(frame)


def loss_curve(metrics: str | os.PathLike) -> Figure:
    """Draw loss (coloured by kind of mask), exploitation and any kNN accuracy, by epoch, from a ``metrics.jsonl``."""
    with open(metrics) as file:
        records = [json.loads(line) for line in file]
    probed = [record for record in records if "knn" in record]
    heights = [3, 2, 2] if probed else [3, 2]
    figure = Figure(figsize=(6, sum(heights)), layout="constrained")
    axes = figure.subplots(len(heights), sharex=True, height_ratios=heights)
    loss, rates = axes[:2]
    for phase in dict.fromkeys(record["phase"] for record in records):
        epochs, losses = zip(*((r["epoch"], r["loss"]) for r in records if r["phase"] == phase))
        loss.plot(epochs, losses, marker=".", label=f"{phase} masks")
    loss.set(ylabel="loss on masked patches")
    for name, tokens in (("mask", "masked"), ("visible", "visible")):
        shares = [np.mean(record[f"exploitation_{tokens}"]) for record in records]
        rates.plot([record["epoch"] for record in records], shares, marker=".", label=f"{name} tokens")
    rates.set(ylabel="exploitation by\nthe decoder of", ylim=(0, 1))
    if probed:
        axes[2].plot([r["epoch"] for r in probed], [r["knn"] for r in probed], marker=".", label="kNN (k = 20)")
        axes[2].set(ylabel="top-1 accuracy, %")
    axes[-1].set(xlabel="epoch")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend()
    return figure


def accuracy_curves(records: list[dict], x: str, label: str) -> Figure:
    """Draw the accuracy of each arm against ``x`` (epoch or minutes).

    Points are means over seeds, bars are one deviation. An arm branches off random masks, with which it shares the
    epochs before its own records.
    """
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, (metric, title) in zip(axes, (("knn", "kNN (k = 20)"), ("linear", "linear probe")), strict=True):
        for number, arm in enumerate(dict.fromkeys(record["arm"] for record in records)):
            rows = [row for row in records if row["arm"] == arm]
            first, seeds = min(row["epoch"] for row in rows), {row["seed"] for row in rows}
            before = [r for r in records if r["arm"] == "random" and r["epoch"] < first and r["seed"] in seeds]
            rows += [row for row in before if row["epoch"] == max(r["epoch"] for r in before)]
            points = []
            for epoch in sorted({row["epoch"] for row in rows}):
                now = [row for row in rows if row["epoch"] == epoch]
                values = [row[metric] for row in now]
                deviation = statistics.stdev(values) if len(values) > 1 else 0
                points.append((statistics.mean(row[x] for row in now), statistics.mean(values), deviation))
            places, means, deviations = zip(*points)
            look = dict(color="black", linewidth=2) if arm == "random" else dict(color=f"C{number}", linewidth=1.3)
            look |= dict(marker=MARKERS[number % len(MARKERS)], markersize=4, capsize=3)
            axis.errorbar(places, means, deviations, label=arm, **look)
        axis.set(xlabel=label, ylabel="top-1 accuracy, %", title=title)
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
    return figure


def leads(panels: dict[str, dict[str, tuple[list[float], tuple[float, float]]]]) -> Figure:
    """Draw the leads of arms over random masks: a dot for each seed, the mean and its 95 % confidence interval.

    ``panels`` hold, by metric and arm, the leads by seed and the interval, which is nan for one seed.
    """
    arms = list(dict.fromkeys(arm for found in panels.values() for arm in found))
    figure = Figure(figsize=(1.6 + 3.4 * len(panels), 1.2 + 0.35 * len(arms)), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axis, (title, found) in zip(axes, panels.items()):
        axis.axvline(0, color="black", linewidth=1)
        for arm, (values, (low, high)) in found.items():
            row, mean = arms.index(arm), statistics.mean(values)
            axis.plot(values, [row] * len(values), "o", color=COLOURS[0], alpha=0.35, markersize=5, markeredgewidth=0)
            axis.plot([low, high], [row, row], color=COLOURS[5], linewidth=1.5)
            axis.plot(mean, row, "D", color=COLOURS[5], markersize=5)
        axis.set_yticks(range(len(arms)), arms)
        axis.set(xlabel="lead over random masks, points", title=title, ylim=(len(arms) - 0.5, -0.5))
        axis.grid(alpha=0.3)
    return figure


# ------------------------------------------------------------------------------ what encoders have learned


def style(number: int) -> dict:
    """Colour and marker of the ``number``-th encoder, the same in all figures."""
    return dict(color=COLOURS[number % len(COLOURS)], marker=MARKERS[number % len(MARKERS)], markersize=4)


def by_layer(panels: dict[str, dict[str, dict]], order: list[str], dots: bool = False) -> Figure:
    """Draw values by layer: panels by their axis label, in them curves by encoder and layer.

    Values are tensors whose mean is drawn; ``dots`` adds the mean over pictures (N, heads) of each
    head. The decoder follows the encoder after a dotted line. ``order`` has the names of all
    encoders, which settle the colours.
    """
    figure = Figure(figsize=(5.2 * len(panels), 4.2), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (label, subjects) in zip(axes, panels.items()):
        for name, layers in subjects.items():
            look = style(order.index(name))
            depth = sum(isinstance(layer, int) for layer in layers)
            places = [layer if isinstance(layer, int) else depth + int(layer.split("-")[1]) for layer in layers]
            means = [values.float().nanmean().item() for values in layers.values()]
            for part in (slice(0, depth), slice(depth, None)):
                if places[part]:
                    axis.plot(places[part], means[part], label=name if part.start == 0 or not depth else None, **look)
            if dots:
                for place, values in zip(places, layers.values()):
                    heads = values.float().mean(dim=0)
                    axis.scatter([place] * len(heads), heads, s=8, alpha=0.5, color=look["color"], linewidths=0)
            if depth and len(places) > depth:
                axis.axvline(depth + 0.5, linestyle=":", color=look["color"], linewidth=1)
        axis.set(
            xlabel="layer (after a dotted line: of the decoder)" if depth else "layer of the decoder", ylabel=label
        )
        axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


def spectra(subjects: dict[str, dict]) -> Figure:
    """Draw relative log amplitudes (N, k), averaged, by frequency, a curve for each layer, a panel for each encoder."""
    figure = Figure(figsize=(4 * len(subjects), 3.6), layout="constrained")
    axes = figure.subplots(1, len(subjects), squeeze=False, sharey=True)[0]
    for axis, (name, layers) in zip(axes, subjects.items()):
        colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.92, len(layers)))
        for (layer, values), colour in zip(layers.items(), colours):
            axis.plot(np.linspace(0, 1, values.shape[1]), values.mean(0), color=colour, label=f"{layer}", linewidth=1.2)
        axis.set(xlabel="frequency, in parts of the highest", title=name)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=6, title="layer", title_fontsize=7, ncols=2)
    axes[0].set_ylabel("relative log amplitude")
    return figure


def over_epochs(panels: dict[str, dict[str, tuple[list, list]]], title: str) -> Figure:
    """Draw curves over epochs: panels by their axis label, in them (epochs, values) by name."""
    figure = Figure(figsize=(5.2 * len(panels), 4.2), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (label, curves) in zip(axes, panels.items()):
        for number, (name, (epochs, values)) in enumerate(curves.items()):
            axis.plot(epochs, values, label=name, **style(number))
        axis.set(xlabel="epoch", ylabel=label)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.suptitle(title)
    return figure


def points(panels: dict[str, dict[str, dict]], order: list[str]) -> Figure:
    """Draw means with a deviation, by panel and encoder."""
    figure = Figure(figsize=(3.4 * len(panels), 3.6), layout="constrained")
    for axis, (label, values) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        for number, (name, value) in enumerate(values.items()):
            axis.errorbar([number], [value["mean"]], [value["deviation"]], capsize=4, **style(order.index(name)))
        axis.set_xticks(range(len(values)), values, rotation=30, ha="right")
        axis.set(title=label, ylabel="variance", ylim=(0, None))
        axis.grid(alpha=0.3, axis="y")
    return figure


def relation_sheet(pixels: np.ndarray, rows: list[dict[str, np.ndarray]]) -> Figure:
    """Draw, for each picture, named maps of any size beside it, each in its own range of colours."""
    names = list(rows[0])
    figure = Figure(figsize=(1.6 * (1 + len(names)), 1.6 * len(rows) + 0.6), layout="constrained")
    axes = figure.subplots(len(rows), 1 + len(names), squeeze=False)
    for row, (picture, maps) in enumerate(zip(pixels, rows)):
        axes[row, 0].imshow(picture, interpolation="nearest")
        for column, name in enumerate(names, start=1):
            axes[row, column].imshow(maps[name], cmap="inferno", interpolation="nearest")
            if row == 0:
                axes[row, column].set_title(name, fontsize=7)
        for axis in axes[row]:
            axis.set(xticks=[], yticks=[])
    return figure


def scatter_sheet(rows: list[dict[str, tuple[np.ndarray, np.ndarray]]]) -> Figure:
    """Draw, for each picture, points (n, 2) of named encoders in the colours of their clusters (n,)."""
    names = list(rows[0])
    figure = Figure(figsize=(2.2 * len(names), 2.2 * len(rows) + 0.4), layout="constrained")
    axes = figure.subplots(len(rows), len(names), squeeze=False)
    for row, clouds in enumerate(rows):
        for column, (name, (places, labels)) in enumerate(clouds.items()):
            axis = axes[row, column]
            axis.scatter(*places.T, c=np.array(CLUSTERS)[labels % len(CLUSTERS)], s=9)
            axis.set(xticks=[], yticks=[])
            if row == 0:
                axis.set_title(name, fontsize=8)
    return figure
