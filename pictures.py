"""Pictures of what a model masks and reconstructs, and of its loss."""

import json
import os

import matplotlib
import numpy as np
import torch
from einops import rearrange, repeat
from matplotlib.figure import Figure
from torch import Tensor

import data
import masks
import smae

matplotlib.rcParams["savefig.dpi"] = 100
ORANGE = "#ff7f0e"


@torch.no_grad()
def mask_sheet(
    model: smae.SMAE,
    images: Tensor,
    guide_layer: int,
    ratio: float = 0.75,
    hint: str = "random",
    hint_ratio: float = 0.05,
    foreground: str = "border",
    title: str = "",
) -> Figure:
    """What the model would mask in uint8 images (b, 3, H, W), a row each, and what it makes of the rest.

    Columns: input, random mask, bi-partition, informed mask, informed mask with hints, reconstruction.
    """
    device = model.positions.device
    pixels = model.config["mean"], model.config["std"]
    x = data.normalize(images.to(device), *pixels)
    h, w = grid = model.grid(x)
    noise = data.to_device(data.uniform((0, data.MASKS), np.arange(len(x)), h * w), device)

    affinity = masks.similarity(model.encode(x, layer=guide_layer)[:, model.prefix :])
    side = masks.foreground_side(masks.normalized_cut(affinity), grid, foreground)
    relevance = masks.relevance(affinity, side)
    random = masks.random_mask(len(x), h * w, ratio, noise=noise)
    informed = masks.informed_mask(relevance, ratio, "none", noise=noise)
    hinted = masks.informed_mask(relevance, ratio, hint, hint_ratio, noise=noise)
    rebuilt = data.denormalize(model.reconstruct(x, hinted), *pixels)

    def shown(mask: masks.Mask) -> Tensor:  # (b, h, w) bool
        return torch.zeros(len(x), h * w, device=device).scatter(1, mask.visible, 1).bool().view(-1, h, w)

    k = masks.hint_count(h * w, ratio, hint, hint_ratio)
    candidates = relevance.topk(informed.masked.shape[1] + k, dim=1).indices
    hints = torch.zeros_like(side).scatter(1, candidates, True).view(-1, h, w) & shown(hinted)
    pixels = rearrange(images, "b c h w -> b h w c").cpu().numpy() / 255
    columns = {
        "input": pixels,
        "random mask": hide(pixels, shown(random)),
        "bi-partition\n(object side in colour)": tint(pixels, side.view(-1, h, w)),
        "informed mask": hide(pixels, shown(informed)),
        f"informed mask,\n{k} hints ({hint})": hide(pixels, shown(hinted)),
        "reconstruction\nfrom hints + rest": rearrange(rebuilt, "b c h w -> b h w c").cpu().numpy() / 255,
    }
    figure = Figure(figsize=(1.75 * len(columns), 1.75 * len(x) + 0.9), layout="constrained")
    axes = figure.subplots(len(x), len(columns), squeeze=False)
    for column, (name, pictures) in enumerate(columns.items()):
        axes[0, column].set_title(name, fontsize=11)
        for row, picture in enumerate(pictures):
            axes[row, column].imshow(picture, interpolation="nearest")
            axes[row, column].set_axis_off()
            if "hints (" in name:
                outline(axes[row, column], hints[row], model.patch_size)
    note = "; brightness and contrast of a rebuilt patch are the input's" if model.normalize_pixels else ""
    figure.suptitle(f"{title}masked patches hatched, {ratio:.0%} of {h} x {w}{note}", fontsize=11)
    return figure


def enlarge(cells: Tensor, pixels: np.ndarray) -> np.ndarray:
    """Cells (b, h, w) of the patch grid to the size of ``pixels`` (b, H, W, 3): (b, H, W, 1)."""
    p = pixels.shape[1] // cells.shape[1]
    return repeat(cells.cpu().numpy(), "b h w -> b (h p1) (w p2) 1", p1=p, p2=p)


def hide(pixels: np.ndarray, visible: Tensor) -> np.ndarray:
    """Pictures (b, H, W, 3) in [0, 1], hatched in grey where a patch is not ``visible`` (b, h, w)."""
    y, x = np.indices(pixels.shape[1:3])
    hatching = np.where((x + y) // 2 % 2, 0.62, 0.8)[..., None]  # plain grey would look like a cloudy sky
    return np.where(enlarge(visible, pixels), pixels, hatching)


def tint(pixels: np.ndarray, side: Tensor) -> np.ndarray:
    """Pictures (b, H, W, 3) in [0, 1], dimmed and blue where not on the ``side`` (b, h, w)."""
    return np.where(enlarge(side, pixels), pixels, 0.25 * pixels.mean(-1, keepdims=True) + np.array([0.05, 0.1, 0.45]))


def outline(axis, cells: Tensor, p: int):
    """Draw an orange frame around the True ``cells`` (h, w) of a picture with patches of ``p`` pixels."""
    for row, column in cells.nonzero().tolist():
        frame = matplotlib.patches.Rectangle((column * p - 0.5, row * p - 0.5), p, p, fill=False)
        frame.set(edgecolor=ORANGE, linewidth=1.6)
        axis.add_patch(frame)


def loss_curve(metrics: str | os.PathLike) -> Figure:
    """The loss of each epoch of a ``metrics.jsonl``, coloured by the kind of masks."""
    with open(metrics) as file:
        records = [json.loads(line) for line in file]
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axis = figure.subplots()
    for phase in dict.fromkeys(record["phase"] for record in records):
        epochs, losses = zip(*((r["epoch"], r["loss"]) for r in records if r["phase"] == phase))
        axis.plot(epochs, losses, marker=".", label=f"{phase} masks")
    axis.set(xlabel="epoch", ylabel="loss on masked patches")
    axis.grid(alpha=0.3)
    axis.legend()
    return figure
