"""Measures of what a model has learned: pure functions from tensors to tensors.

Works alone, with torch. Letters in shapes: ``b`` images, ``n`` patches, ``v`` visible, ``m``
masked, ``d`` width, ``t`` tokens.
"""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

# --------------------------------------------------------------------------------- known objects


def iou(side: Tensor, share: Tensor) -> Tensor:
    """Intersection over union (b,), in pixels, of patches ``side`` (b, n) bool and an object.

    The object covers ``share`` (b, n) of each patch. NaN where both are empty.
    """
    both = (side * share).sum(1)
    return both / (side.sum(1) + share.sum(1) - both)


def rank_auc(relevance: Tensor, share: Tensor) -> Tensor:
    """The probability (b,) that an object pixel is more relevant than a background pixel.

    Ties count half; this is the area under the ROC curve. A pixel has the relevance (b, n) of its
    patch. The object covers ``share`` (b, n) of each patch. NaN without an object, or without a background.
    """
    areas = []
    for some_relevance, some_share in zip(relevance.split(64), share.split(64)):  # (b, n, n) is large
        order = (some_relevance[:, :, None] - some_relevance[:, None, :]).sign()
        pairs = some_share[:, :, None] * (1 - some_share)[:, None, :]
        areas.append(((order + 1) / 2 * pairs).sum(dim=(1, 2)) / pairs.sum(dim=(1, 2)))
    return torch.cat(areas)


def masked_shares(masked: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """The masked shares (b,) of the object and of the background.

    ``masked`` (b, m) are patch indices. The object covers ``share`` (b, n) of each patch. NaN where there is no
    object, or no background.
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
    y = (objects.sum(2) * _from_centre(height, objects.device)).sum(1) / weight
    x = (objects.sum(1) * _from_centre(width, objects.device)).sum(1) / weight
    return torch.maximum(y.abs(), x.abs()) > 0.25


def _from_centre(pixels: int, device: torch.device) -> Tensor:
    """Positions of pixels along a side, from -1/2 to 1/2."""
    return (torch.arange(pixels, device=device) + 0.5) / pixels - 0.5


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
    ridge = 1e-3 * gram.diagonal().mean() * torch.eye(len(gram), device=gram.device)
    rest = y - x @ torch.linalg.solve(gram + ridge, x.T @ y)
    total = (features - features.mean(dim=(0, 1))).pow(2).mean()
    context = (rest.pow(2).mean() / total).item()
    beside_position = (y.pow(2).mean() / total).item()
    return {"position": 1 - beside_position, "own pixels": beside_position - context, "context": context}


def feature_variance(features: Tensor) -> Tensor:
    """σF (b,): the variance of L2-normalised features (b, n, d) over the patches, averaged over d.

    Our reading of the paper's table 1; the squared deviations are divided by n.
    """
    return F.normalize(features.float(), dim=-1).var(dim=1, correction=0).mean(dim=-1)


def similarity_variance(similarity: Tensor) -> Tensor:
    """σs (b,): the variance of the similarities (b, n, n) of different patches (our reading of table 1)."""
    others = ~torch.eye(similarity.shape[-1], dtype=torch.bool, device=similarity.device)
    return similarity[:, others].var(dim=1, correction=0)


def cluster_gap(weights: Tensor, side: Tensor) -> Tensor:
    """μintra − μinter (b,): mean weight of edges within the two clusters less that of edges between them.

    ``weights`` (b, n, n) are similarities, or attention averaged over heads; ``side`` (b, n) bool.
    Edges join different patches. NaN for an image whose patches are all on one side.
    """
    n = weights.shape[-1]
    same = side[:, :, None] == side[:, None, :]
    within = same & ~torch.eye(n, dtype=torch.bool, device=weights.device)
    intra, inter = ((weights * edges).sum(dim=(1, 2)) / edges.sum(dim=(1, 2)) for edges in (within, ~same))
    return intra - inter


def relation_divergence(last: Tensor, similarity: Tensor) -> Tensor:
    """KL (b,) of token relations from those of the ``last`` checkpoint, in nats.

    Both are similarities (b, n, n). The relations of a patch are the softmax of its row; the result
    is KL(last ‖ this), averaged over rows (our reading of the paper's figure 3b).
    """
    p, q = last.float().log_softmax(dim=-1), similarity.float().log_softmax(dim=-1)
    return (p.exp() * (p - q)).sum(dim=-1).mean(dim=-1)


def spectrum(features: Tensor, grid: tuple[int, int]) -> Tensor:
    """Relative log amplitudes (b, k) of features (b, n, d) of an (h, w) grid, from frequency 0 to the highest.

    The mean over channels of log |FFT|, along the diagonal from the centre outwards, less
    its first entry (Park & Kim, ICLR 2022). On an even, square grid the highest frequency is π.
    """
    (h, w), image = grid, features.float().unflatten(1, grid)  # (b, h, w, d)
    amplitude = torch.fft.fftshift(torch.fft.fft2(image, dim=(1, 2)), dim=(1, 2)).abs()
    logs = (amplitude + 1e-6).log().mean(dim=3)  # (b, h, w), frequency 0 at (h // 2, w // 2)
    k = min(h, w) // 2 + 1
    steps = torch.arange(k)
    diagonal = logs[:, h // 2 - steps, w // 2 - steps]  # towards the corner that even grids have
    return diagonal - diagonal[:, :1]


# --------------------------------------------------------------------------------- attention


def patch_attention(attention: Tensor, prefix: int) -> Tensor:
    """Attention (b, heads, n, n) among patches alone; rows without the first ``prefix`` tokens sum to 1 again."""
    attention = attention[:, :, prefix:, prefix:]
    return attention / attention.sum(dim=-1, keepdim=True)


def attention_distance(attention: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """Mean distance (b, heads) in pixels between the patches that attend and those attended to.

    ``attention`` (b, heads, n, n) among the patches of an (h, w) grid, rows summing to 1; averaged
    over queries (Dosovitskiy et al., ICLR 2021, D.8).
    """
    y, x = torch.meshgrid(*(torch.arange(side, device=attention.device) for side in grid), indexing="ij")
    places = torch.stack([y.flatten(), x.flatten()], dim=1).float()
    distance = patch_size * (places[:, None] - places[None]).norm(dim=-1)
    return (attention * distance).sum(dim=-1).mean(dim=-1)


def attention_information(attention: Tensor) -> Tensor:
    """Normalised mutual information (b, heads) of queries and keys: 0 if all queries attend alike.

    ``attention`` (b, heads, n, n), rows summing to 1. With p(q) = 1/n and p(k) the mean over queries,
    it is I(q; k) / √(H(q) H(k)) (Park et al., ICLR 2023, section 2).
    """
    p_key = attention.mean(dim=-2)
    logs = (attention.clamp(min=1e-30) / p_key.clamp(min=1e-30)[:, :, None]).log()
    information = (attention * logs).sum(dim=-1).mean(dim=-1)
    entropy = -(p_key * p_key.clamp(min=1e-30).log()).sum(dim=-1)
    both = (math.log(attention.shape[-1]) * entropy).sqrt()
    return torch.where(both > 1e-12, information / both, 0)


# --------------------------------------------------------------------------------- decoder


def token_variance(tokens: Tensor, masked: Tensor) -> Tensor:
    """Variance (b,) of the mask tokens of an image, averaged over channels (our reading of figure 7c).

    Of patch tokens (b, n, d) in the order of the grid, ``masked`` (b, m) are mask tokens.
    """
    return _only(tokens, masked).var(dim=1, correction=0).mean(dim=-1)


def direction_variance(tokens: Tensor, masked: Tensor) -> Tensor:
    """Variance (b,) of the directions of mask tokens, as in :func:`token_variance`, from 0 (all alike) to 1.

    Summed over the channels of tokens of unit length: the variance without the part of their length.
    """
    return F.normalize(_only(tokens, masked), dim=-1).var(dim=1, correction=0).sum(dim=-1)


def _only(tokens: Tensor, chosen: Tensor) -> Tensor:
    return tokens.float().gather(1, chosen[:, :, None].expand(-1, -1, tokens.shape[-1]))


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
    sums = values.new_zeros(count).index_add(0, units, values - mean)
    return mean.item(), sums.norm().item() / len(values) * math.sqrt(count / max(count - 1, 1))
