"""Measures of what a model has learned: pure functions from tensors to tensors.

Works alone, with torch. Letters in shapes: ``b`` images, ``n`` patches, ``v`` visible, ``m``
masked, ``d`` width, ``t`` tokens.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

# --------------------------------------------------------------------------------- known objects


def iou(side: Tensor, share: Tensor) -> Tensor:
    """Intersection over union (b,), in pixels, of patches ``side`` (b, n) bool and an object.

    The object covers ``share`` (b, n) of each patch.
    """
    both = (side * share).sum(1)
    return both / (side.sum(1) + share.sum(1) - both)


def rank_auc(relevance: Tensor, share: Tensor) -> Tensor:
    """The probability (b,) that an object pixel is more relevant than a background pixel.

    Ties count half; this is the area under the ROC curve. A pixel has the relevance (b, n) of its
    patch. The object covers ``share`` (b, n) of each patch.
    """
    areas = []
    for some_relevance, some_share in zip(relevance.split(64), share.split(64)):  # (b, n, n) is large
        order = (some_relevance[:, :, None] - some_relevance[:, None, :]).sign()
        pairs = some_share[:, :, None] * (1 - some_share)[:, None, :]
        areas.append(((order + 1) / 2 * pairs).sum(dim=(1, 2)) / pairs.sum(dim=(1, 2)))
    return torch.cat(areas)


def masked_shares(masked: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """The masked shares (b,) of the object and of the background.

    ``masked`` (b, m) are patch indices. The object covers ``share`` (b, n) of each patch.
    """
    hidden = torch.zeros_like(share).scatter(1, masked, 1)
    of_object = (hidden * share).sum(1) / share.sum(1)
    of_background = (hidden * (1 - share)).sum(1) / (1 - share).sum(1)
    return of_object, of_background


def off_centre(objects: Tensor) -> Tensor:
    """Whether an object's centroid is nearer to the border than to the centre: (b,) bool.

    ``objects`` (b, H, W) is the share of object in each pixel.
    """
    height, width = objects.shape[1:]
    weight = objects.sum(dim=(1, 2))
    y = (objects.sum(2) * _from_centre(height)).sum(1) / weight
    x = (objects.sum(1) * _from_centre(width)).sum(1) / weight
    return torch.maximum(y.abs(), x.abs()) > 0.25


def _from_centre(pixels: int) -> Tensor:
    """Positions of pixels along a side, from -1/2 to 1/2."""
    return (torch.arange(pixels) + 0.5) / pixels - 0.5


# --------------------------------------------------------------------------------- features


def variance_shares(features: Tensor, pixels: Tensor) -> dict[str, float]:
    """The sources of the variance of features (b, n, d), as shares that add up to 1.

    "position": explained by the mean of each patch position. "own pixels": explained, of the
    remainder, by a linear map from the patch's own pixels (b, n, k). "context": the rest, which
    comes from other patches or, nonlinearly, from the own pixels.
    """
    y = (features - features.mean(dim=0)).flatten(0, 1)
    x = (pixels - pixels.mean(dim=(0, 1))).flatten(0, 1)
    gram = x.T @ x
    ridge = 1e-3 * gram.diagonal().mean() * torch.eye(len(gram))
    rest = y - x @ torch.linalg.solve(gram + ridge, x.T @ y)
    total = (features - features.mean(dim=(0, 1))).pow(2).mean()
    context = (rest.pow(2).mean() / total).item()
    beside_position = (y.pow(2).mean() / total).item()
    return {"position": 1 - beside_position, "own pixels": beside_position - context, "context": context}


# --------------------------------------------------------------------------------- decoder


def exploitation(attentions: Iterable[Tensor], v: int, m: int, residual: bool = False) -> Tensor:
    """Exploitation rates (2, layers, b): shares of mask and visible tokens in each decoder block.

    They tell how much mask tokens draw on either (paper, arXiv 2507.19773, figure 4), by attention
    rollout (Abnar & Zuidema, ACL 2020). ``attentions`` are those of the decoder blocks in order,
    (b, heads, t, t); the last ``m`` tokens are mask tokens, the ``v`` before them visible patches.
    Let A_l be the attention of block l, averaged over heads, and R_l = A_l R_(l-1), R_0 = 1. The
    shares are the sums of R_l over mask tokens and over visible patches, averaged over the rows of
    mask tokens; the CLS token has the rest. ``residual`` replaces A_l by (A_l + 1) / 2.
    """
    rollout, shares = None, []
    for attention in attentions:
        attention = attention.mean(dim=1)  # (b, t, t)
        if residual:
            attention = (attention + torch.eye(attention.shape[-1], device=attention.device)) / 2
        with torch.autocast(attention.device.type, enabled=False):
            rollout = attention if rollout is None else attention @ rollout
        drawn = rollout[:, -m:].mean(dim=1)  # (b, t)
        shares.append(torch.stack([drawn[:, -m:].sum(dim=1), drawn[:, -m - v : -m].sum(dim=1)]))
    return torch.stack(shares, dim=1)


# --------------------------------------------------------------------------------- statistics


def mean_and_error(values: Tensor, units: Tensor) -> tuple[float, float]:
    """Mean and cluster-robust standard error of values (b,); those of one unit may correlate.

    ``units`` (b,) are, for instance, the videos that frames come from.
    """
    units = units.unique(return_inverse=True)[1]
    count, mean = int(units.max()) + 1, values.mean()
    sums = torch.zeros(count).index_add(0, units, values - mean)
    return mean.item(), sums.norm().item() / len(values) * math.sqrt(count / max(count - 1, 1))
