"""What to mask: random masks, and masks guided by the model's own clusters of patches.

Works alone: needs torch. Pure functions, batched, on any device: tensors in, tensors out, no state. The chain of
the self-guided mask (Shin et al., Self-Guided Masked Autoencoder, NeurIPS 2024, arXiv 2507.19773, section 4):

    features -> similarity -> normalized_cut -> foreground -> relevance -> informed_mask

Letters in shapes: ``b`` batch, ``n`` patches (n = h * w of the patch grid), ``v`` visible, ``m`` masked, ``d`` width.
Randomness comes in as ``noise`` (b, n), uniform in [0, 1), so that the caller decides what it depends on; by default
it is drawn from torch's global generator.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Mask(NamedTuple):
    """Ascending patch indices, int64, the same number in every row, the two disjoint.

    ``visible`` (b, v): what the encoder sees. ``masked`` (b, m): what the loss is taken on. Patches in neither are
    thrown away: not encoded, decoded or scored.
    """

    visible: Tensor
    masked: Tensor


def masked_count(n: int, ratio: float) -> int:
    """How many of ``n`` patches are masked: round(ratio * n). Raises ValueError unless 0 < that < n."""
    if not 0 < ratio < 1:
        raise ValueError(f"the mask ratio must lie between 0 and 1 (exclusive), got {ratio}")
    m = round(ratio * n)
    if not 0 < m < n:
        raise ValueError(f"mask ratio {ratio} of {n} patches leaves no {'visible' if m else 'masked'} patch")
    return m


def hint_count(n: int, ratio: float, hint: str, hint_ratio: float) -> int:
    """How many object patches are shown as hints: round(hint_ratio * m), 0 with ``hint="none"``.

    Raises ValueError for an unknown strategy, a negative ratio, or more hints than visible patches.
    """
    if hint not in ("none", "random", "similar"):
        raise ValueError(f"hint must be none, random or similar, got {hint!r}")
    if not 0 <= hint_ratio < 1:
        raise ValueError(f"the hint ratio must lie in [0, 1), got {hint_ratio}")
    m = masked_count(n, ratio)
    k = 0 if hint == "none" else round(hint_ratio * m)
    if k > n - m:
        raise ValueError(f"hint ratio {hint_ratio} asks for {k} hints, but only {n - m} of {n} patches are visible")
    return k


def random_mask(b: int, n: int, ratio: float = 0.75, *, noise: Tensor | None = None, device=None) -> Mask:
    """Uniformly random masks for ``b`` images of ``n`` patches (MAE); ``noise`` (b, n) decides if given."""
    m = masked_count(n, ratio)
    order = _uniform(noise, b, n, device).argsort(dim=1)
    return _mask(masked=order[:, :m], visible=order[:, m:])


def self_guided_mask(
    features: Tensor,
    grid: tuple[int, int],
    ratio: float = 0.75,
    hint: str = "random",
    hint_ratio: float = 0.05,
    foreground: str = "border",
    *,
    noise: Tensor | None = None,
) -> Mask:
    """Mask the main object of each image, as the patch features (b, n, d) of an (h, w) grid show it.

    No CLS token among the features. Arguments as in :func:`informed_mask` and :func:`foreground_side`. Every image
    gets exactly ``masked_count(n, ratio)`` masked patches; where the features say nothing (a constant image, not a
    number), the mask is random. Raises ValueError if features and grid disagree.
    """
    if features.ndim != 3 or features.shape[1] != grid[0] * grid[1]:
        raise ValueError(f"expected features (b, {grid[0]} * {grid[1]}, d), got {tuple(features.shape)}")
    affinity = similarity(features)
    side = foreground_side(normalized_cut(affinity), grid, foreground)
    return informed_mask(relevance(affinity, side), ratio, hint, hint_ratio, noise=noise)


@torch.no_grad()
def similarity(features: Tensor) -> Tensor:
    """Cosine similarity of all pairs of patches: (b, n, d) in any floating type to (b, n, n) in float32.

    Lengths are normalised in float32. The product takes its operands in the features' own type if that is bfloat16
    or float16 (under autocast: in its type) and sums in float32, so its error stays far below the 1/256 steps of a
    bfloat16 result: cosines of an early model all lie close to 1. Values that are not finite count as zero; a zero
    vector is similar to nothing.
    """
    device = features.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else features.dtype
    x = torch.nan_to_num(features.float(), nan=0.0, posinf=0.0, neginf=0.0)
    x = x / x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-30)  # squares of huge or tiny values stay in range
    x = F.normalize(x, dim=-1).to(dtype)
    with torch.autocast(device, enabled=False):
        if x.is_cuda and dtype in (torch.bfloat16, torch.float16):
            product = torch.bmm(x, x.mT, out_dtype=torch.float32)
        else:
            product = x.float() @ x.float().mT
    length = x.float().norm(dim=-1).clamp(min=0.5)  # rounding to 16 bits has changed it a little; zeros stay zeros
    return product / (length[:, :, None] * length[:, None, :])


@torch.no_grad()
def normalized_cut(affinity: Tensor, eps: float = 1e-5) -> Tensor:
    """The relaxed normalized cut (b, n), float32, of patches with similarities (b, n, n); its sign is arbitrary.

    The second smallest solution y of (D - W) y = lambda D y with W = max(similarity, eps) and D its row sums
    (Shi & Malik 2000, equation 6), from the second largest eigenvector of D^-1/2 W D^-1/2. Exact; on a GPU the solver
    waits for the device.
    """
    with torch.autocast(affinity.device.type, enabled=False):
        w = affinity.float().clamp(min=eps)
        scale = w.sum(dim=-1).rsqrt()  # (b, n)
        matrix = scale[:, :, None] * w * scale[:, None, :]
        try:
            vectors = torch.linalg.eigh(matrix).eigenvectors
        except torch.linalg.LinAlgError:  # GPU solvers may give up on many equal eigenvalues, as of a constant image
            vectors = torch.linalg.eigh(matrix.double().cpu()).eigenvectors.to(matrix)
        return vectors[..., -2] * scale


def bipartition(y: Tensor) -> Tensor:
    """Split the patches at the mean of the cut ``y`` (b, n): True (b, n) on the upper side."""
    return y > y.mean(dim=1, keepdim=True)


def foreground_side(y: Tensor, grid: tuple[int, int], rule: str = "border") -> Tensor:
    """True (b, n) for the side of the cut ``y`` (b, n) that is the object; the sign of ``y`` does not matter.

    ``border``: the side with the smaller share of its patches on the border of the (h, w) grid; of two equal shares,
    the side without the top left patch. ``peak``: the side of the largest absolute value (TokenCut, Wang et al., CVPR
    2022). Raises ValueError for another rule.
    """
    side = bipartition(y)
    if rule == "border":
        border = torch.ones(grid, dtype=torch.bool, device=y.device)
        border[1:-1, 1:-1] = False

        def border_share(side: Tensor) -> Tensor:  # (b, n) -> (b, 1)
            return (side & border.flatten()).sum(1, keepdim=True) / side.sum(1, keepdim=True).clamp(min=1)

        side = side != side[:, :1]  # without the top left patch, whatever the sign of y
        return torch.where(border_share(side) <= border_share(~side), side, ~side)
    if rule == "peak":
        return side == side.gather(1, y.abs().argmax(dim=1, keepdim=True))
    raise ValueError(f"the foreground rule must be border or peak, got {rule!r}")


def relevance(affinity: Tensor, foreground: Tensor) -> Tensor:
    """Mean similarity (b, n) of each patch to the foreground patches: similarities (b, n, n), sides (b, n) bool."""
    total = (affinity * foreground[:, None, :]).sum(dim=-1)  # no matrix product: autocast would round it to 16 bits
    return total / foreground.sum(dim=-1, keepdim=True).clamp(min=1)


@torch.no_grad()
def informed_mask(
    relevance: Tensor,
    ratio: float = 0.75,
    hint: str = "random",
    hint_ratio: float = 0.05,
    *,
    noise: Tensor | None = None,
) -> Mask:
    """Mask the most relevant patches, showing a few of them as hints: relevance (b, n) to a Mask.

    The m + k most relevant patches are candidates; k = ``hint_count(...)`` of them stay visible, the other m are
    masked. ``hint``: "random", uniform among the candidates; "similar", with a probability that rises with
    relevance; "none", k = 0. Rows whose relevance is constant or not finite get a random mask.
    """
    b, n = relevance.shape
    m, k = masked_count(n, ratio), hint_count(n, ratio, hint, hint_ratio)
    noise = _uniform(noise, b, n, relevance.device)
    low, high = relevance.aminmax(dim=1, keepdim=True)
    says_something = (high - low) > 1e-4 * high.abs()  # more than rounding; False for not-a-number, too
    relevance = torch.where(says_something & relevance.isfinite().all(1, keepdim=True), relevance, noise)

    order = relevance.argsort(dim=1, descending=True)
    candidates, rest = order[:, : m + k], order[:, m + k :]
    if hint == "similar":  # sampling without replacement: the k earliest of exponential arrivals at these rates
        scores = relevance.gather(1, candidates)
        rates = (scores - scores[:, -1:]) / (scores[:, :1] - scores[:, -1:]).clamp(min=1e-12)
        arrival = -torch.log1p(-noise.gather(1, candidates)) / rates.clamp(min=1e-6)
    else:
        arrival = noise.gather(1, candidates)
    candidates = candidates.gather(1, arrival.argsort(dim=1))
    return _mask(masked=candidates[:, k:], visible=torch.cat([rest, candidates[:, :k]], dim=1))


def _mask(masked: Tensor, visible: Tensor) -> Mask:
    return Mask(visible=visible.sort(dim=1).values, masked=masked.sort(dim=1).values)


def _uniform(noise: Tensor | None, b: int, n: int, device) -> Tensor:
    if noise is None:
        return torch.rand(b, n, device=device)
    if noise.shape != (b, n):
        raise ValueError(f"noise must have the shape ({b}, {n}), got {tuple(noise.shape)}")
    return noise
