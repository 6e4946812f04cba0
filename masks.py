"""Masks: random, guided by the model's own clusters of patches, or guided by its attention.

Works alone, with torch. Pure functions, batched, on any device: tensors in, tensors out, no state.

The steps of the self-guided mask (Shin et al., Self-Guided Masked Autoencoder, NeurIPS 2024,
arXiv 2507.19773, section 4):

    features -> similarity -> normalized_cut -> foreground_side -> relevance -> informed_mask

:func:`find_object` takes all but the last step, :func:`self_guided_mask` takes all of them. The
steps of AMT (Liu et al., arXiv 2211.15362): attention -> attention_weights -> amt_mask.

Letters in shapes: ``b`` batch, ``n`` patches (n = h * w of the patch grid), ``v`` visible, ``m``
masked, ``d`` width. The caller passes randomness as ``noise`` (b, n), uniform in [0, 1); by default
it is drawn from torch's global generator.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

DENSE = 2**28  # b * n * n similarities, 1 GiB; above it, blocks of rows are recomputed in each use

ROUNDING = 3e-6  # error of eigenvalues between -1 and 1 in float32
EPS = 1e-5  # the least weight of an edge between two patches
STEPS = 24  # of Lanczos, at most


class Mask(NamedTuple):
    """Indices of the visible and the masked patches: int64, ascending, disjoint.

    ``visible`` (b, v): the input of the encoder. ``masked`` (b, m): the patches of the loss. Every
    row has the same number of each. Patches in neither are thrown away: not encoded, decoded or
    scored.
    """

    visible: Tensor
    masked: Tensor


def masked_count(n: int, ratio: float) -> int:
    """The number of masked patches among ``n``: round(ratio * n).

    Raises ValueError unless it lies above 0 and below ``n``.
    """
    if not 0 < ratio < 1:
        raise ValueError(f"the mask ratio must lie between 0 and 1 (exclusive), got {ratio}")
    m = round(ratio * n)
    if not 0 < m < n:
        raise ValueError(f"mask ratio {ratio} of {n} patches leaves no {'visible' if m else 'masked'} patch")
    return m


def hint_count(n: int, ratio: float, hint: str, hint_ratio: float, hint_portion: float = 0.5) -> int:
    """The number of hints among ``n`` patches: max(2, int(hint_ratio * n)), 0 for ``hint="none"``.

    ``hint_ratio`` and ``hint_portion`` are shares of all patches, which matches the counts in the
    paper's Figure 1 (9 of 196 for 0.05).

    Raises ValueError for an unknown strategy, a share outside [0, 1], more hints than visible
    patches, and more hints than candidates.
    """
    if hint not in ("none", "random", "similar"):
        raise ValueError(f"hint must be none, random or similar, got {hint!r}")
    for name, share in (("ratio", hint_ratio), ("portion", hint_portion)):
        if not 0 <= share <= 1:
            raise ValueError(f"the hint {name} must lie between 0 and 1, got {share}")
    if hint == "none":
        return 0
    k, v, candidates = max(2, _part(n, hint_ratio)), n - masked_count(n, ratio), _part(n, hint_portion)
    if k > v:
        raise ValueError(f"hint ratio {hint_ratio} of {n} patches asks for {k} hints, but only {v} patches are visible")
    if k > candidates:
        raise ValueError(
            f"hint portion {hint_portion} of {n} patches holds {candidates} patches, too few for {k} hints"
        )
    return k


def _part(n: int, share: float) -> int:
    """``share`` of ``n`` patches, rounded down; 29 for 0.29 * 100, the float 28.999999999999996."""
    return int(share * n + 1e-6)


def random_mask(b: int, n: int, ratio: float = 0.75, *, noise: Tensor | None = None, device=None) -> Mask:
    """Uniformly random masks (MAE) for ``b`` images of ``n`` patches, on ``device``.

    ``noise`` (b, n) in [0, 1) decides them, on its own device; by default it is drawn. Raises
    ValueError where :func:`masked_count` does.
    """
    m = masked_count(n, ratio)
    order = _uniform(noise, b, n, device).argsort(dim=1, stable=True)
    return _mask(masked=order[:, :m], visible=order[:, m:])


def self_guided_mask(
    features: Tensor,
    grid: tuple[int, int],
    ratio: float = 0.75,
    hint: str = "random",
    hint_ratio: float = 0.05,
    foreground: str = "border",
    scoring: str = "contrast",
    *,
    hint_portion: float = 0.5,
    noise: Tensor | None = None,
) -> Mask:
    """Mask the main object of each image, found in patch features (b, n, d) of an (h, w) grid.

    The features hold no CLS token. For the other arguments see :func:`informed_mask` and
    :func:`find_object`. Every image gets exactly ``masked_count(n, ratio)`` masked patches. The
    mask is random where features are constant or not finite. Raises ValueError if features and grid
    disagree.
    """
    scores, _ = find_object(features, grid, foreground, scoring)
    return informed_mask(scores, ratio, hint, hint_ratio, hint_portion, noise=noise)


@torch.no_grad()
def find_object(
    features: Tensor, grid: tuple[int, int], foreground: str = "border", scoring: str = "contrast"
) -> tuple[Tensor, Tensor]:
    """Relevance (b, n) of the patches to the main object, and its side of the cut (b, n) bool.

    Takes patch features (b, n, d) of an (h, w) grid, without a CLS token. ``foreground`` is a rule
    of :func:`foreground_side`; for ``scoring`` see :func:`relevance`. Holds at most DENSE
    similarities at a time. Raises ValueError if features and grid disagree.
    """
    if features.ndim != 3 or features.shape[1] != grid[0] * grid[1]:
        raise ValueError(f"expected features (b, {grid[0]} * {grid[1]}, d), got {tuple(features.shape)}")
    b, n = features.shape[:2]
    if b * n * n <= DENSE:
        affinity = similarity(features)
        side = foreground_side(normalized_cut(affinity), grid, foreground)
        return relevance(affinity, side, scoring), side

    # too many similarities to keep: work on blocks of rows
    unit, count = _unit(features), max(1, DENSE // (4 * b * n))
    blocks = [slice(start, start + count) for start in range(0, n, count)]
    side = foreground_side(_blockwise_cut(unit, blocks), grid, foreground)
    return torch.cat([relevance(_cosines(*unit, rows), side, scoring) for rows in blocks], dim=1), side


@torch.no_grad()
def similarity(features: Tensor) -> Tensor:
    """Cosine similarities (b, n, n), float32, of all pairs of features (b, n, d), any float type.

    Lengths are normalised in float32. The operands of the product keep the features' type if that
    is bfloat16 or float16 (under autocast, they take its type); sums are in float32. The error
    stays far below the 1/256 steps of a bfloat16 result, which matters because cosines of an early
    model all lie close to 1. Values that are not finite count as zero; a zero vector has similarity
    0 to all.
    """
    return _cosines(*_unit(features))


def _unit(features: Tensor) -> tuple[Tensor, Tensor]:
    """Features (b, n, d) of unit length, in the type of the product, and their new lengths (b, n).

    Rounding to 16 bits leaves lengths near 1, in float32; those of zero vectors count as 1.
    """
    device = features.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else features.dtype
    x = torch.nan_to_num(features.float(), nan=0.0, posinf=0.0, neginf=0.0)
    x = x / x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-30)  # squares of huge or tiny values stay in range
    x = F.normalize(x, dim=-1).to(dtype)
    length = x.float().norm(dim=-1)
    return x, torch.where(length > 0.5, length, 1)


def _cosines(x: Tensor, length: Tensor, rows: slice = slice(None)) -> Tensor:
    """``rows`` of the cosines (b, n, n), float32, of ``x`` (b, n, d) with lengths (b, n) near 1."""
    with torch.autocast(x.device.type, enabled=False):
        if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16):
            product = torch.bmm(x[:, rows], x.mT, out_dtype=torch.float32)
        else:
            product = x[:, rows].float() @ x.float().mT
    return product / (length[:, rows, None] * length[:, None, :])


@torch.no_grad()
def normalized_cut(affinity: Tensor) -> Tensor:
    """The relaxed normalized cut (b, n), float32, of similarities (b, n, n); its sign is arbitrary.

    This is the second smallest solution y of (D - W) y = lambda D y with W = max(similarity, EPS)
    and D its row sums (Shi & Malik 2000, equation 6), computed from the second largest eigenvector
    of D^-1/2 W D^-1/2 by STEPS of Lanczos. Never waits for the device.
    """
    w = affinity.float().clamp(min=EPS)
    return _cut(lambda v: torch.bmm(v, w), w.sum(dim=-1))


def _blockwise_cut(unit: tuple[Tensor, Tensor], blocks: list[slice]) -> Tensor:
    """Compute :func:`normalized_cut` from the result of _unit(), one block of rows at a time."""

    def multiply(v: Tensor) -> Tensor:
        with torch.autocast(v.device.type, enabled=False):
            return torch.cat([torch.bmm(v, _cosines(*unit, rows).clamp(min=EPS).mT) for rows in blocks], dim=2)

    return _cut(multiply, multiply(torch.ones_like(unit[1])[:, None])[:, 0])


@torch.no_grad()
def _cut(multiply: Callable[[Tensor], Tensor], degree: Tensor) -> Tensor:
    """The relaxed normalized cut (b, n) of graphs with node degrees (b, n).

    ``multiply`` takes v (b, 1, n) to v W. Lanczos iteration with full reorthogonalisation (Golub &
    Van Loan, Matrix Computations, section 10.3) on D^-1/2 W D^-1/2. Its first eigenvector is known,
    D^1/2 1, and every iterate is kept orthogonal to it. Nodes of degree zero get zero; all nodes do
    if they differ by rounding only.
    """
    # start from the known eigenvector and a vector without a pattern
    (b, n), device = degree.shape, degree.device
    steps = max(1, min(STEPS, n - 1))
    scale = torch.where(degree > 0, degree.clamp(min=1e-30).rsqrt(), 0)[:, None]
    basis = torch.zeros(b, steps + 1, n, device=device)  # orthonormal rows
    basis[:, 0] = F.normalize(degree.sqrt(), dim=1)
    diagonal, beside = [], []  # of the tridiagonal matrix, (b, 1) each
    k = torch.arange(1, n + 1, device=device)
    x = ((k * k * 40503 % 65536) / 65536 - 0.5) * (scale > 0)  # (b, 1, n)

    # extend the basis, then combine it by the top eigenvector
    with torch.autocast(device.type, enabled=False):
        for j in range(steps):
            known = basis[:, : j + 1]
            for _ in range(2):  # what the first leaves of a complete basis is rounding, the second removes it
                x = x - torch.bmm(torch.bmm(x, known.mT), known)
            length = x.norm(dim=2, keepdim=True)
            beside.append(length[:, 0])
            x = torch.where(length > ROUNDING, x / length.clamp(min=1e-30), 0)  # 0: basis complete
            basis[:, j + 1] = x[:, 0]
            previous, x = x, scale * multiply(scale * x)
            diagonal.append((previous * x).sum(dim=2))
        beside = torch.cat(beside, dim=1)[:, 1:]
        tridiagonal = torch.diag_embed(torch.cat(diagonal, dim=1))
        tridiagonal += torch.diag_embed(beside, 1) + torch.diag_embed(beside, -1)
        top = _top_eigenvector(tridiagonal) * (tridiagonal.abs().amax(dim=(1, 2)) > ROUNDING)[:, None]
        return (scale * torch.bmm(top[:, None], basis[:, 1:]))[:, 0]


def _top_eigenvector(matrices: Tensor) -> Tensor:
    """An eigenvector (b, s) of the largest eigenvalue of small symmetric matrices (b, s, s).

    Squares repeatedly, because ``torch.linalg.eigh`` would wait for the device.
    """
    # adding a bound on all eigenvalues makes the largest also the largest in absolute value
    bound = matrices.abs().sum(-1).amax(-1)
    power = matrices + torch.diag_embed(bound[:, None].expand(-1, matrices.shape[-1]))
    for _ in range(14):
        power = power / power.diagonal(dim1=1, dim2=2).sum(-1).clamp(min=1e-30)[:, None, None]
        power = torch.bmm(power, power)
    column = power.diagonal(dim1=1, dim2=2).argmax(dim=1)  # all columns are multiples; take the longest
    return power.gather(1, column[:, None, None].expand(-1, 1, matrices.shape[-1]))[:, 0]


def bipartition(y: Tensor) -> Tensor:
    """Split the patches at the mean of the cut ``y`` (b, n): True (b, n) above it."""
    return y > y.mean(dim=1, keepdim=True)


def foreground_side(y: Tensor, grid: tuple[int, int], rule: str = "border") -> Tensor:
    """The object's side of the cut ``y`` (b, n): True (b, n); the sign of ``y`` does not matter.

    ``border``: the side with the smaller share of its patches on the border of the (h, w) grid.
    ``small``: the side with fewer patches, which is the object in the three pictures of the paper's
    Figure 1. Both rules break ties by taking the side without the top left patch. ``peak``: the
    side of the largest absolute value (TokenCut, Wang et al., CVPR 2022). Raises ValueError for
    another rule.
    """
    if rule not in ("border", "small", "peak"):
        raise ValueError(f"the foreground rule must be border, small or peak, got {rule!r}")
    side = bipartition(y)
    if rule == "peak":
        return side == side.gather(1, y.abs().argmax(dim=1, keepdim=True))
    border = torch.ones(grid, dtype=torch.bool, device=y.device)
    border[1:-1, 1:-1] = False

    def extent(side: Tensor) -> Tensor:  # (b, n) -> (b, 1): its patches, or the share of them on the border
        count = side.sum(1, keepdim=True)
        return count if rule == "small" else (side & border.flatten()).sum(1, keepdim=True) / count.clamp(min=1)

    side = side != side[:, :1]  # the side without the top left patch, for either sign of y
    return torch.where(extent(side) <= extent(~side), side, ~side)


def relevance(affinity: Tensor, foreground: Tensor, scoring: str = "contrast") -> Tensor:
    """The relevance (b, n) of patches to the object.

    Takes similarities (b, n, n) and ``foreground`` (b, n) bool. ``scoring``: "foreground" is the
    mean similarity to the foreground patches, from -1 to 1, as in the paper; "contrast" subtracts
    the mean similarity to the others, which finds known objects better if the features are good. Raises
    ValueError for another scoring.
    """
    if scoring not in ("foreground", "contrast"):
        raise ValueError(f"scoring must be foreground or contrast, got {scoring!r}")

    def mean_similarity(side: Tensor) -> Tensor:
        # autocast would round a matrix product to 16 bits
        total = (affinity * side[:, None, :]).sum(dim=-1)
        return total / side.sum(dim=-1, keepdim=True).clamp(min=1)

    return mean_similarity(foreground) - (mean_similarity(~foreground) if scoring == "contrast" else 0)


@torch.no_grad()
def cluster(features: Tensor, k: int) -> Tensor:
    """Up to ``k`` clusters of patches by recursive normalized cut.

    Takes features (b, n, d), returns labels (b, n) int64 below ``k``. Each round splits the cluster
    with the cheapest split, where the cost Ncut is least along its relaxed cut (Shi & Malik 2000,
    section 3). An image of equal patches stays one cluster. Raises ValueError unless 1 <= k <= n.
    """
    b, n = features.shape[:2]
    if not 1 <= k <= n:
        raise ValueError(f"the number of clusters of {n} patches must lie between 1 and {n}, got {k}")
    w = similarity(features).clamp(min=EPS)
    labels = torch.zeros(b, n, dtype=torch.int64, device=features.device)
    halves = torch.zeros(b, k, n, dtype=torch.bool, device=features.device)  # the best split of each cluster
    costs = torch.full((b, k), torch.inf, device=features.device)  # its cost; infinite if there is none

    def consider(clusters: Tensor):  # (b, 1)
        # order the members along their cut
        members = labels == clusters
        part = w * (members[:, :, None] & members[:, None, :])
        y = _cut(lambda v: torch.bmm(v, part), part.sum(dim=-1))
        order = torch.where(members, y, torch.inf).argsort(dim=1)  # members come first
        part = part.gather(1, order[:, :, None].expand_as(part)).gather(2, order[:, None, :].expand_as(part))

        # the cost of splitting after the first 1, 2, ... n patches, (b, n)
        volume = part.sum(dim=-1).cumsum(dim=1)
        cut = volume - part.cumsum(dim=1).cumsum(dim=2).diagonal(dim1=1, dim2=2)
        cost = cut / volume + cut / (volume[:, -1:] - volume)

        # keep the cheapest split that leaves two parts
        inside = torch.arange(1, n + 1, device=y.device) < members.sum(dim=1, keepdim=True)
        alike = (y * members).aminmax(dim=1)
        inside = inside & ((alike.max - alike.min) > 0)[:, None]
        best = torch.where(inside, cost, torch.inf).min(dim=1, keepdim=True)
        half = torch.zeros_like(members).scatter(1, order, torch.arange(n, device=y.device) <= best.indices)
        costs.scatter_(1, clusters, best.values)
        halves.scatter_(1, clusters[..., None].expand(b, 1, n), half[:, None])

    # split the cheapest cluster, k - 1 times
    consider(labels[:, :1])
    for new in range(1, k):
        best = costs.argmin(dim=1, keepdim=True)
        half = halves.gather(1, best[..., None].expand(b, 1, n))[:, 0] & costs.gather(1, best).isfinite()
        labels = torch.where(half, new, labels)
        consider(best)
        consider(torch.full_like(best, new))
    return labels


@torch.no_grad()
def informed_mask(
    relevance: Tensor,
    ratio: float = 0.75,
    hint: str = "random",
    hint_ratio: float = 0.05,
    hint_portion: float = 0.5,
    *,
    noise: Tensor | None = None,
) -> Mask:
    """Mask the most relevant patches except for a few hints: relevance (b, n) to a Mask.

    The hints (:func:`choose_hints`) stay visible; of the other patches the ``masked_count(n,
    ratio)`` most relevant are masked. Patches of equal relevance are ranked at random. Rows that
    are constant up to rounding, or not finite, get a uniformly random mask. ``noise`` (b, n) in
    [0, 1) decides what is random. Raises ValueError where :func:`masked_count` and
    :func:`hint_count` do.
    """
    b, n = relevance.shape
    m, k = masked_count(n, ratio), hint_count(n, ratio, hint, hint_ratio, hint_portion)
    relevance, noise = _meaningful(relevance), _uniform(noise, b, n, relevance.device)
    order = _ranking(relevance, noise)
    hints = _draw_hints(relevance, order[:, : _part(n, hint_portion)], k, hint, noise)
    is_hint = torch.zeros(b, n, dtype=torch.bool, device=order.device).scatter(1, hints, True)
    order = order.gather(1, is_hint.gather(1, order).to(torch.uint8).argsort(dim=1, stable=True))  # hints come last
    return _mask(masked=order[:, :m], visible=order[:, m:])


@torch.no_grad()
def choose_hints(
    relevance: Tensor,
    ratio: float = 0.75,
    hint: str = "random",
    hint_ratio: float = 0.05,
    hint_portion: float = 0.5,
    *,
    noise: Tensor,
) -> Tensor:
    """The hints of :func:`informed_mask`, which stay visible: relevance (b, n) to indices (b, k).

    Draws ``hint_count(...)`` patches without replacement from the most relevant ``hint_portion`` of
    all patches. ``hint``: "random" draws uniformly; "similar" with a probability that rises with
    relevance; "none" draws 0. Raises ValueError where the counts do not fit.
    """
    n = relevance.shape[1]
    k = hint_count(n, ratio, hint, hint_ratio, hint_portion)
    relevance = _meaningful(relevance)
    candidates = _ranking(relevance, noise)[:, : _part(n, hint_portion)]
    return _draw_hints(relevance, candidates, k, hint, noise)


def _draw_hints(relevance: Tensor, candidates: Tensor, k: int, hint: str, noise: Tensor) -> Tensor:
    """Draw ``k`` of the ``candidates`` (b, c), patch indices, without replacement: (b, k)."""
    # the low bits of the noise: the high ones already ranked patches of equal relevance
    arrival = (noise * 2**12 % 1).gather(1, candidates)
    if hint == "similar":  # the k earliest of exponential arrivals at these rates
        scores = relevance.gather(1, candidates)
        low, high = scores.aminmax(dim=1, keepdim=True)
        rates = (scores - low) / (high - low).clamp(min=1e-12)
        arrival = -torch.log1p(-arrival) / rates.clamp(min=1e-6)
    return candidates.gather(1, arrival.argsort(dim=1, stable=True)[:, :k])


def _meaningful(relevance: Tensor) -> Tensor:
    """The relevance (b, n), set to 0 in rows that are constant up to rounding, or not finite."""
    low, high = relevance.aminmax(dim=1, keepdim=True)
    differs = (high - low) > 1e-4 * high.abs()  # also False for NaN
    return torch.where(differs & relevance.isfinite().all(dim=1, keepdim=True), relevance, 0)


def _ranking(relevance: Tensor, noise: Tensor) -> Tensor:
    """Patches (b, n) from the most to the least relevant; ``noise`` (b, n) breaks ties."""
    shuffled = noise.argsort(dim=1, stable=True)
    return shuffled.gather(1, relevance.gather(1, shuffled).argsort(dim=1, descending=True, stable=True))


def centrality(grid: tuple[int, int]) -> Tensor:
    """The centrality (n,) of the patches of an (h, w) grid, in rings of the shape of the image.

    The largest value is that of the centre, near 0; towards the border it falls to about -1/2.
    """
    h, w = grid
    y, x = torch.meshgrid(torch.arange(h) - (h - 1) / 2, torch.arange(w) - (w - 1) / 2, indexing="ij")
    rings = torch.maximum(y.abs() / h, x.abs() / w)
    return (-rings - 1e-3 * torch.hypot(y / h, x / w)).flatten()


def attention_weights(attention: Tensor) -> Tensor:
    """AMT's patch weights (b, n) from the attention (b, heads, n) of the CLS token to the patches.

    Scales each head to 0 ... 1, then averages the heads (arXiv 2211.15362).
    """
    low, high = attention.float().aminmax(dim=-1, keepdim=True)
    return ((attention.float() - low) / (high - low).clamp(min=1e-12)).mean(dim=1)


@torch.no_grad()
def amt_mask(weights: Tensor, ratio: float = 0.45, throw_ratio: float = 0.4, *, noise: Tensor | None = None) -> Mask:
    """Attention-driven masking and throwing (arXiv 2211.15362).

    Takes weights (b, n), not negative. Draws patches without replacement, with probabilities
    proportional to their weights: the first ``masked_count(n, ratio)`` are masked, the next
    round(throw_ratio * n) thrown away, the rest visible. Patches of weight zero come last; rows
    that are not finite are drawn uniformly. Raises ValueError if no patch stays visible.
    """
    b, n = weights.shape
    m, thrown = masked_count(n, ratio), round(throw_ratio * n)
    if throw_ratio < 0 or m + thrown >= n:
        raise ValueError(f"masking {ratio} and throwing {throw_ratio} of {n} patches leaves no visible patch")
    noise = _uniform(noise, b, n, weights.device)
    weights = torch.where(weights.isfinite().all(1, keepdim=True), weights.float(), 1)
    # exponential arrival times at these rates give the order of the draws
    arrival = -torch.log1p(-noise) / weights.clamp(min=1e-12)
    order = arrival.argsort(dim=1, stable=True)
    return _mask(masked=order[:, :m], visible=order[:, m + thrown :])


def _mask(masked: Tensor, visible: Tensor) -> Mask:
    return Mask(visible=visible.sort(dim=1).values, masked=masked.sort(dim=1).values)


def _uniform(noise: Tensor | None, b: int, n: int, device) -> Tensor:
    if noise is None:
        return torch.rand(b, n, device=device)
    if noise.shape != (b, n):
        raise ValueError(f"noise must have the shape ({b}, {n}), got {tuple(noise.shape)}")
    return noise
