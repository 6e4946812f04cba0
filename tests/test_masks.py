import itertools

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import adjusted_rand_score
from sklearn.metrics.pairwise import cosine_similarity
from torch._subclasses.fake_tensor import FakeTensorMode

import masks

GRID = (8, 8)


def object_features(rows=slice(2, 5), columns=slice(3, 6), spread=0.3, b=3, d=32):
    """Features (b, 64, d) of an 8 x 8 grid: one direction on a rectangle, another elsewhere; and the rectangle."""
    inside = torch.zeros(GRID, dtype=torch.bool)
    inside[rows, columns] = True
    inside = inside.flatten().expand(b, -1)
    directions = torch.randn(2, b, 1, d)
    features = torch.where(inside[..., None], directions[0], directions[1]) + spread * torch.randn(b, 64, d)
    return features, inside


def scipy_cut(affinity: torch.Tensor) -> np.ndarray:
    """The second smallest solution of (D - W) y = lambda D y of one similarity matrix, by an independent solver."""
    w = affinity.double().clamp(min=1e-5).numpy()
    degree = np.diag(w.sum(1))
    return scipy.linalg.eigh(degree - w, degree, subset_by_index=[1, 1])[1][:, 0]


def share_of_same_side(y: torch.Tensor, other: np.ndarray) -> float:
    same = (masks.bipartition(y[None])[0].numpy() == (other > other.mean())).mean()
    return max(same, 1 - same)


# ------------------------------------------------------------------------------------------- counts


@settings(deadline=None, max_examples=200)
@given(
    h=st.integers(2, 9), w=st.integers(1, 9), ratio=st.floats(0.01, 0.99), hint_ratio=st.floats(0, 0.5),
    portion=st.floats(0, 1), hint=st.sampled_from(["none", "random", "similar"]),
    rule=st.sampled_from(["border", "small", "peak"]), b=st.integers(1, 4),
)  # fmt: skip
def test_every_strategy_gives_exact_counts_ascending_and_disjoint(h, w, ratio, hint_ratio, portion, hint, rule, b):
    n, m = h * w, round(ratio * h * w)
    if not 0 < m < n:
        with pytest.raises(ValueError, match=r"leaves no (visible|masked) patch"):
            masks.random_mask(b, n, ratio)
        return
    features = torch.randn(b, n, 5)
    k = 0 if hint == "none" else max(2, int(hint_ratio * n + 1e-6))
    if hint != "none" and (k > n - m or k > int(portion * n + 1e-6)):
        with pytest.raises(ValueError, match="hints, but only" if k > n - m else "too few for"):
            masks.self_guided_mask(features, (h, w), ratio, hint, hint_ratio, rule, hint_portion=portion)
        return
    assert masks.hint_count(n, ratio, hint, hint_ratio, portion) == k
    guided = masks.self_guided_mask(features, (h, w), ratio, hint, hint_ratio, rule, hint_portion=portion)
    for mask in (masks.random_mask(b, n, ratio), guided):
        assert mask.masked.shape == (b, m) and mask.visible.shape == (b, n - m)
        assert mask.masked.dtype == mask.visible.dtype == torch.int64
        assert torch.equal(torch.cat(mask, dim=1).sort(1).values, torch.arange(n).expand(b, -1))
        assert (mask.masked.diff(dim=1) > 0).all() and (mask.visible.diff(dim=1) > 0).all()


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_ratios_outside_zero_and_one_are_refused(ratio):
    with pytest.raises(ValueError, match="between 0 and 1"):
        masks.random_mask(2, 16, ratio)


def test_unknown_strategies_and_wrong_shapes_are_refused():
    features = torch.randn(2, 64, 4)
    with pytest.raises(ValueError, match="hint must be"):
        masks.self_guided_mask(features, GRID, hint="all")
    with pytest.raises(ValueError, match="foreground rule"):
        masks.self_guided_mask(features, GRID, foreground="left")
    with pytest.raises(ValueError, match=r"8 \* 7"):
        masks.self_guided_mask(features, (8, 7))
    with pytest.raises(ValueError, match="noise"):
        masks.random_mask(2, 64, noise=torch.rand(2, 63))


def test_random_masks_are_uniform_and_follow_the_noise():
    noise = torch.rand(4000, 16)
    mask = masks.random_mask(4000, 16, 0.75, noise=noise)
    share = torch.zeros(4000, 16).scatter(1, mask.masked, 1).mean(0)
    assert (share - 0.75).abs().max() < 5 * (0.75 * 0.25 / 4000) ** 0.5
    again = masks.random_mask(4000, 16, 0.75, noise=noise)
    assert torch.equal(mask.masked, again.masked)
    rows = masks.random_mask(10, 16, 0.75, noise=noise[50:60])
    assert torch.equal(rows.visible, mask.visible[50:60])


# ------------------------------------------------------------------------------------------- similarity and cut


def test_similarity_is_the_cosine_of_scikit_learn():
    features = torch.randn(2, 10, 7) * 100
    expected = np.stack([cosine_similarity(x) for x in features.numpy()])
    np.testing.assert_allclose(masks.similarity(features), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_features_are_multiplied_with_float32_sums(dtype):
    """A result rounded to bfloat16 would be off by up to 1/512 where cosines are close to 1."""
    features = 10 * torch.randn(1, 1, 192) + torch.randn(2, 50, 192)  # every cosine above 0.9
    close = masks.similarity(features.to(dtype))
    assert close.dtype == torch.float32
    exact = masks.similarity(features)
    assert exact.min() > 0.9
    assert (close - exact).abs().max() < 2e-4
    assert close.unique().numel() > 1000
    with torch.autocast("cpu", dtype):
        under_autocast = masks.similarity(features)
    assert under_autocast.dtype == torch.float32
    assert 0 < (under_autocast - exact).abs().max() < 2e-4


def test_relevance_and_cut_do_not_lose_precision_under_autocast():
    """A product under autocast once rounded relevance to bfloat16, and ties decided which patches were masked."""
    features, _ = object_features()
    affinity = masks.similarity(features)
    side = masks.foreground_side(masks.normalized_cut(affinity), GRID)
    expected = masks.normalized_cut(affinity), masks.relevance(affinity, side)
    with torch.autocast("cpu", torch.bfloat16):
        got = masks.normalized_cut(affinity), masks.relevance(affinity, side)
    for x, y in zip(got, expected):
        assert x.dtype == torch.float32
        torch.testing.assert_close(x, y)


def test_values_that_are_not_finite_or_huge_do_not_spread():
    features = torch.randn(1, 6, 4)
    expected = masks.similarity(features)
    broken = features.clone()
    broken[0, 2] = torch.tensor([float("nan"), float("inf"), 1e38, 0])
    broken[0, 3] *= 1e30
    broken[0, 4] *= 1e-30
    result = masks.similarity(broken)
    assert result.isfinite().all()
    others = [0, 1, 3, 4, 5]
    torch.testing.assert_close(result[0][others][:, others], expected[0][others][:, others])


@pytest.mark.parametrize("spread", [0.3, 1.0, 3.0])
def test_cut_agrees_with_the_generalised_eigenproblem_of_scipy(spread):
    features, _ = object_features(spread=spread, b=8)
    affinity = masks.similarity(features)
    y = masks.normalized_cut(affinity)
    shares = [share_of_same_side(y[i], scipy_cut(affinity[i])) for i in range(8)]
    assert np.mean(shares) >= 0.99, shares


def test_cut_agrees_with_scipy_on_photographs(photographs):
    import data

    dataset = data.load_images(photographs("objmask"), max_images=8)
    images = torch.stack([data.center_crop(data.decode(record), 112) for record in dataset["image"]])
    features = torch.nn.functional.unfold(data.normalize(images), 8, stride=8).mT  # raw pixels of 14 x 14 patches
    affinity = masks.similarity(features)
    y = masks.normalized_cut(affinity)
    assert np.mean([share_of_same_side(y[i], scipy_cut(affinity[i])) for i in range(8)]) >= 0.99


@pytest.mark.parametrize("size", [6, 20, 32])
def test_planted_blocks_are_recovered_exactly(size):
    member = torch.arange(64) < size
    for seed in range(10):
        noise = 0.1 * torch.randn(64, 64, generator=torch.Generator().manual_seed(seed))
        order = torch.randperm(64, generator=torch.Generator().manual_seed(seed))
        planted = 0.2 + 0.5 * (member[:, None] == member[None, :]) + (noise + noise.T) / 2
        side = masks.bipartition(masks.normalized_cut(planted[order][:, order][None]))[0]
        assert torch.equal(side, member[order]) or torch.equal(side, ~member[order])


@pytest.mark.parametrize("b, n", [(1, 2), (3, 5), (4, 64), (2, 400)])
def test_cut_is_the_second_eigenvector_of_eigh(b, n):
    """With its size and, up to the sign, its every entry: Lanczos has converged."""
    member = torch.rand(b, n, 1) < 0.3
    affinity = masks.similarity(torch.where(member, 1.0, -0.5) * torch.ones(16) + 0.5 * torch.randn(b, n, 16))
    w = affinity.double().clamp(min=1e-5)
    scale = w.sum(-1).rsqrt()
    expected = torch.linalg.eigh(scale[:, :, None] * w * scale[:, None, :]).eigenvectors[..., -2] * scale
    y = masks.normalized_cut(affinity).double()
    cosine = torch.nn.functional.cosine_similarity(y, expected, dim=1).abs()
    assert (1 - cosine).max() < 1e-5


def test_the_cut_is_found_whatever_the_rest_of_the_spectrum_looks_like():
    """A second eigenvalue near 1 (blocks hardly joined), near 0 (hardly a cut), and a strongly negative last one."""
    blocks = torch.block_diag(torch.ones(20, 20), torch.ones(30, 30))
    bipartite = 1 - torch.block_diag(torch.ones(25, 25), torch.ones(25, 25))  # last eigenvalue: -1
    faint = 0.99 + 0.001 * blocks
    for matrix in (blocks, faint, bipartite + 0.3 * blocks):
        y = masks.normalized_cut(matrix[None])[0]
        assert share_of_same_side(y, scipy_cut(matrix)) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dense", [2**28, 4 * 64 * 63])
def test_nothing_on_the_way_to_a_mask_waits_for_the_device(dtype, dense, monkeypatch):
    """Fake tensors have shapes but no values: whatever wants to know a value fails, as item() would."""
    monkeypatch.setattr(masks, "DENSE", dense)
    monkeypatch.setattr(masks, "STEPS", 3)  # all do the same
    for name in ("eigh", "eigvalsh", "svd", "qr", "solve"):  # these check their results
        monkeypatch.delattr(torch.linalg, name)
    with FakeTensorMode():
        try:
            devices = [torch.empty(2, device="cuda")[:1].device.type, "cpu"]
        except RuntimeError:  # some versions of torch want a driver even for fake tensors
            devices = ["cpu"]
        for device in devices:
            features, noise = torch.empty(4, 64, 16, device=device, dtype=dtype), torch.empty(4, 64, device=device)
            for foreground, scoring, hint in (("border", "contrast", "random"), ("peak", "foreground", "similar")):
                mask = masks.self_guided_mask(features, GRID, 0.75, hint, 0.05, foreground, scoring, noise=noise)
                assert mask.masked.shape == (4, 48) and mask.masked.device.type == device
            assert masks.amt_mask(noise, noise=noise).visible.shape == (4, 9)
            assert masks.cluster(features, 3).shape == (4, 64)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_many_patches_are_cut_block_by_block_with_the_same_result(dtype, monkeypatch):
    """With cosines close to 1, as those of an early model: rounding any of it to 16 bits would ruin the cut."""
    features, inside = object_features(d=64)
    features = features + 4 * torch.randn(64)
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        expected = masks.find_object(features, GRID)
        made, cosines = [], masks._cosines
        monkeypatch.setattr(masks, "_cosines", lambda *arguments: made.append(cosines(*arguments)) or made[-1])
        monkeypatch.setattr(masks, "DENSE", 3 * 64 * 60)
        relevance, side = masks.find_object(features, GRID)
    assert len(made) > 24 and max(block.shape[1] for block in made) == 15
    assert torch.equal(side, expected[1]) and torch.equal(side, inside)
    torch.testing.assert_close(relevance, expected[0], rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------- clusters


@pytest.mark.parametrize("sizes", [[64], [40, 24], [10, 20, 34], [8, 8, 16, 32], [1, 3, 20, 20, 20]])
def test_planted_clusters_are_recovered_exactly(sizes):
    b, k, d = 6, len(sizes), 64
    member = torch.repeat_interleave(torch.arange(k), torch.tensor(sizes))
    orders = torch.rand(b, 64).argsort(1)
    directions = torch.linalg.qr(torch.randn(b, d, d))[0][:, :k]
    features = torch.stack([directions[i, member[orders[i]]] for i in range(b)]) + 0.02 * torch.randn(b, 64, d)
    labels = masks.cluster(features, k)
    assert labels.dtype == torch.int64
    for found, order in zip(labels, orders):
        assert adjusted_rand_score(member[order].numpy(), found.numpy()) == 1
        assert set(found.tolist()) == set(range(k))


def test_a_cut_of_few_nodes_is_right_when_there_are_more_steps_than_vectors():
    b, i = 200, torch.arange(200)[:, None, None]
    few = 0.97 + 0.01 * torch.rand(b, 4, 4)  # three that are alike, and a fourth
    few[:, 3] = few[:, :, 3] = 0.05 * torch.rand(b, 4)
    few = (few + few.mT) / 2
    few.diagonal(dim1=1, dim2=2).fill_(1)
    nodes, w = torch.rand(b, 64).argsort(1)[:, :4], torch.zeros(b, 64, 64)  # the others have no edges
    w[i, nodes[:, :, None], nodes[:, None, :]] = few
    y = masks._cut(lambda v: torch.bmm(v, w), w.sum(-1)).gather(1, nodes)
    assert (y[:, :3].sign() == -y[:, 3:].sign()).all()


def test_the_split_has_the_least_normalized_cut_along_the_relaxed_one():
    features, _ = object_features(spread=2.0)
    w = masks.similarity(features).clamp(min=1e-5)
    y, labels = masks.normalized_cut(w), masks.cluster(features, 2)

    def cost(w: torch.Tensor, side: torch.Tensor) -> float:
        cut = w[side][:, ~side].sum()
        return (cut / w[side].sum() + cut / w[~side].sum()).item()

    for i in range(3):
        best = min(cost(w[i], y[i] <= t) for t in y[i].sort().values[:-1])
        assert cost(w[i], labels[i].bool()) == pytest.approx(best, rel=1e-4)


def test_an_image_is_clustered_alike_whatever_else_is_in_the_batch_and_the_constant_one_not_at_all():
    features, _ = object_features(spread=1.0)
    features[1] = 1.0
    together = masks.cluster(features, 5)
    assert (together[1] == 0).all() and together[0].unique().numel() == together[2].unique().numel() == 5
    assert torch.equal(masks.cluster(features[:1], 5), together[:1])
    assert masks.cluster(torch.randn(2, 6, 3), 6).max() <= 5
    for k in (0, 65):
        with pytest.raises(ValueError, match="of 64 patches must lie between 1 and 64"):
            masks.cluster(features, k)


# ------------------------------------------------------------------------------------------- foreground, relevance


def test_border_rule_takes_the_side_away_from_the_border():
    _, inside = object_features(slice(3, 6), slice(0, 4))  # touches the border, but with a small share
    y = torch.where(inside, 1.0, -0.2)
    assert torch.equal(masks.foreground_side(y, GRID, "border"), inside)
    assert torch.equal(masks.foreground_side(-y, GRID, "border"), inside)


@pytest.mark.parametrize("rule", ["border", "small"])
@pytest.mark.parametrize("grid", [(4, 4), (2, 6)])
def test_no_rule_depends_on_the_sign_even_where_the_sides_tie(grid, rule):
    y = torch.arange(grid[1]).float().expand(grid).reshape(1, -1)  # left half against right half
    side = masks.foreground_side(y, grid, rule)
    assert torch.equal(side, masks.foreground_side(-y, grid, rule)) and not side[0, 0]


@pytest.mark.parametrize("sign", [1, -1])
def test_small_rule_takes_the_side_with_fewer_patches(sign):
    _, inside = object_features(slice(0, 3), slice(0, 8))  # 24 of 64, at the border: "border" would not choose it
    y = sign * torch.where(inside, 1.0, -0.2)
    assert torch.equal(masks.foreground_side(y, GRID, "small"), inside)
    assert torch.equal(masks.foreground_side(y, GRID, "border"), ~inside)


@pytest.mark.parametrize("sign", [1, -1])
def test_peak_rule_takes_the_side_of_the_largest_magnitude(sign):
    _, inside = object_features(slice(0, 2), slice(0, 8))  # at the border: the other rule would not choose it
    y = sign * torch.where(inside, 1.0, -0.2)
    assert torch.equal(masks.foreground_side(y, GRID, "peak"), inside)
    assert torch.equal(masks.foreground_side(y, GRID, "border"), ~inside)


def test_relevance_is_the_mean_similarity_to_the_foreground():
    affinity, side = torch.rand(2, 5, 5), torch.tensor([[1, 0, 0, 1, 0], [0, 1, 1, 1, 1]]).bool()
    expected = torch.stack([affinity[i][:, side[i]].mean(1) for i in range(2)])
    torch.testing.assert_close(masks.relevance(affinity, side, "foreground"), expected)
    nowhere = torch.zeros(2, 5, dtype=torch.bool)
    assert torch.equal(masks.relevance(affinity, nowhere, "foreground"), torch.zeros(2, 5))


# ------------------------------------------------------------------------------------------- the mask


def test_contrast_takes_off_the_mean_similarity_to_the_background():
    affinity = torch.tensor([[[1.0, 0.5, 0.1], [0.5, 1.0, 0.3], [0.1, 0.3, 1.0]]])
    side = torch.tensor([[True, True, False]])
    expected = torch.tensor([[0.75 - 0.1, 0.75 - 0.3, 0.2 - 1.0]])
    torch.testing.assert_close(masks.relevance(affinity, side, "contrast"), expected)
    with pytest.raises(ValueError, match="foreground or contrast"):
        masks.relevance(affinity, side, "background")


def test_the_object_is_masked_whole_without_hints_and_nearly_whole_with_them():
    features, inside = object_features(spread=0.5, b=20)
    whole = masks.self_guided_mask(features, GRID, 0.5, "none")
    assert inside.gather(1, whole.masked).sum() == inside.sum()
    hinted = masks.self_guided_mask(features, GRID, 0.5, "random", 0.1)
    shown = inside.gather(1, hinted.visible).sum() / inside.sum()
    assert 0.02 < shown < 0.2  # 3 of the 35 candidates are shown; 9 candidates are object
    peak = masks.self_guided_mask(features, GRID, 0.5, "none", foreground="peak")
    assert inside.gather(1, peak.masked).sum() == inside.sum()


def test_without_hints_exactly_the_most_relevant_patches_are_masked():
    relevance = torch.rand(5, 20)
    mask = masks.informed_mask(relevance, 0.6, "none")
    assert torch.equal(mask.masked, relevance.topk(12, dim=1).indices.sort(1).values)


@pytest.mark.parametrize("hint", ["random", "similar"])
def test_hints_come_from_the_portion_and_the_most_relevant_of_the_rest_are_masked(hint):
    relevance, noise = torch.rand(500, 20), torch.rand(500, 20)
    mask = masks.informed_mask(relevance, 0.6, hint, 0.15, 0.45, noise=noise)  # 12 masked, 3 hints of 9
    hints = masks.choose_hints(relevance, 0.6, hint, 0.15, 0.45, noise=noise)
    rank = relevance.argsort(1, descending=True).argsort(1)
    assert hints.shape == (500, 3) and rank.gather(1, hints).max() in (7, 8)
    is_hint = torch.zeros(500, 20).scatter(1, hints, 1)
    assert (is_hint.gather(1, mask.visible).sum(1) == 3).all()
    others = torch.where(is_hint.bool(), -1, relevance)
    assert torch.equal(mask.masked, others.topk(12, dim=1).indices.sort(1).values)


def test_hints_are_those_of_the_first_figure_of_the_paper():
    """196 patches, 45 of them foreground: 9 hints, half of them there, and no gap in what is masked of the rest."""
    inside = torch.zeros(14, 14)
    inside[4:9, 3:12] = 1
    relevance = inside.flatten() + 0.1 * torch.rand(400, 196)
    noise = torch.rand(400, 196)
    mask, hints = masks.informed_mask(relevance, noise=noise), masks.choose_hints(relevance, noise=noise)
    assert mask.masked.shape[1] == 147 and hints.shape[1] == 9
    assert 0.4 < inside.flatten()[hints].mean() < 0.52  # of the 98 most relevant patches, 45; of all masked ones, 31 %
    visible = torch.zeros(400, 196).scatter(1, mask.visible, 1).scatter(1, hints, 0).bool()
    least_masked = relevance.gather(1, mask.masked).amin(1)
    assert (least_masked > torch.where(visible, relevance, -1).amax(1)).all()


@pytest.mark.parametrize("objects", [8, 16, 24])
def test_hints_are_uniform_in_the_portion_also_among_patches_of_equal_relevance(objects):
    """One noise once ranked the background and drew the hints: half as many of them fell on the object as should."""
    relevance = (torch.arange(64) < objects).float().expand(4000, -1)
    hints = masks.choose_hints(relevance, noise=torch.rand(4000, 64))  # of the 32 most relevant
    assert abs((hints < objects).float().mean() - objects / 32) < 0.03


def test_patches_of_equal_relevance_are_ranked_by_chance():
    """The shares of an object in the patches are 0 for most: then the first patches were masked, never the last."""
    relevance = (torch.arange(64) < 16).float().expand(2000, -1)
    for hint in ("none", "random", "similar"):
        mask = masks.informed_mask(relevance, 0.5, hint, 0.05)
        share = torch.zeros(2000, 64).scatter(1, mask.masked, 1).mean(0)
        assert (share[16:] - share[16:].mean()).abs().max() < 0.06 and share[:16].min() > 0.7


def test_shares_are_rounded_down_but_for_the_rounding_of_floats():
    assert masks.hint_count(196, 0.75, "random", 0.05) == 9 and masks.hint_count(64, 0.75, "random", 0.05) == 3
    assert masks.hint_count(16, 0.75, "random", 0.0) == 2  # never less
    assert masks.hint_count(100, 0.5, "random", 0.29) == 29  # 0.29 * 100 is 28.999999999999996
    assert masks.hint_count(16, 0.75, "none", 0.9, 0.0) == 0


def test_random_hints_are_uniform_and_similar_hints_prefer_the_relevant():
    relevance = torch.linspace(1, 0, 20).expand(20000, -1)  # patch 0 is the most relevant; 15 candidates, 3 hints

    def chosen(hint):
        hints = masks.choose_hints(relevance, 0.6, hint, 0.15, 0.75, noise=torch.rand(20000, 20))
        return torch.zeros(20000, 20).scatter(1, hints, 1).mean(0)[:15]

    random, similar = chosen("random"), chosen("similar")
    assert (random - 0.2).abs().max() < 0.02
    assert (similar.diff() < 0.005).all() and similar[0] > 2 * similar[10]


def test_the_same_noise_gives_the_same_mask_whatever_else_is_in_the_batch():
    features, _ = object_features(b=6)
    noise = torch.rand(6, 64)
    together = masks.self_guided_mask(features, GRID, noise=noise)
    for i in range(6):
        alone = masks.self_guided_mask(features[i : i + 1], GRID, noise=noise[i : i + 1])
        assert torch.equal(alone.masked, together.masked[i : i + 1])
    other = masks.self_guided_mask(features, GRID, noise=1 - noise)
    assert not torch.equal(other.masked, together.masked)


@pytest.mark.parametrize(
    "features",
    [
        torch.zeros(64, 8),
        torch.ones(64, 8),
        torch.full((64, 8), float("nan")),
        torch.full((64, 8), float("inf")),
        torch.full((64, 8), 3e38),
        torch.rand(64, 1) @ torch.rand(1, 8),
    ],
    ids=["zero", "constant", "nan", "inf", "huge", "rank one"],
)
@pytest.mark.parametrize("rule", ["border", "small", "peak"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_that_say_nothing_give_valid_random_masks(features, rule, dtype):
    """Ties once fell to the first patches: a degenerate image must be masked at random, not always alike."""
    relevance, _ = masks.find_object(features.to(dtype).expand(400, -1, -1), GRID, rule)
    for hint in ("none", "random", "similar"):
        mask = masks.informed_mask(relevance, 0.75, hint, noise=torch.rand(400, 64))
        assert torch.equal(torch.cat(mask, dim=1).sort(1).values, torch.arange(64).expand(400, -1))
        share = torch.zeros(400, 64).scatter(1, mask.masked, 1).mean(0)
        assert (share - 0.75).abs().max() < 6 * (0.75 * 0.25 / 400) ** 0.5


def test_one_degenerate_image_leaves_the_others_alone():
    features, _ = object_features(b=3)
    noise = torch.rand(3, 64)
    expected = masks.self_guided_mask(features, GRID, noise=noise)
    features[1] = float("nan")
    mask = masks.self_guided_mask(features, GRID, noise=noise)
    assert torch.equal(mask.masked[::2], expected.masked[::2])
    assert not torch.equal(mask.masked[1], expected.masked[1])


# ------------------------------------------------------------------------------------------- AMT


def one_by_one(weights: list[float], draws: tuple[int, ...]) -> float:
    """The probability of drawing these patches in this order, one by one in proportion to the weights left."""
    probability, left = 1.0, dict(enumerate(weights))
    for i in draws:
        probability *= left[i] / sum(left.values())
        del left[i]
    return probability


def test_amt_draws_as_a_reading_of_the_algorithm_does():
    """Of 5 patches 2 are masked, 2 thrown away and 1 stays: how often each outcome comes, against all orders."""
    weights, trials = [0.05, 0.1, 0.2, 0.5, 0.15], 40_000
    expected = {}
    for order in itertools.permutations(range(5)):
        outcome = tuple(sorted(order[:2])), order[4]
        expected[outcome] = expected.get(outcome, 0) + one_by_one(weights, order)
    assert len(expected) == 30 and sum(expected.values()) == pytest.approx(1)
    mask = masks.amt_mask(3 * torch.tensor(weights).expand(trials, -1), 0.4, 0.4)
    got = {outcome: 0 for outcome in expected}
    for masked, (visible,) in zip(mask.masked.tolist(), mask.visible.tolist()):
        got[tuple(masked), visible] += 1
    for outcome, probability in expected.items():
        assert abs(got[outcome] / trials - probability) < 5 * (probability / trials) ** 0.5


def test_amt_masks_throws_and_shows_what_was_asked_for():
    mask = masks.amt_mask(torch.rand(50, 196))
    assert mask.masked.shape == (50, 88) and mask.visible.shape == (50, 196 - 88 - 78)  # 45 %, 40 %
    assert (mask.masked.diff(dim=1) > 0).all() and (mask.visible.diff(dim=1) > 0).all()
    assert all(not set(m) & set(v) for m, v in zip(mask.masked.tolist(), mask.visible.tolist()))
    noise = torch.rand(3, 196)
    assert torch.equal(masks.amt_mask(torch.ones(3, 196), noise=noise).masked, noise.argsort(1)[:, :88].sort(1).values)


def test_amt_takes_patches_without_weight_last_and_broken_weights_as_none():
    weights = torch.ones(20, 10)
    weights[:, 3:7] = 0
    weights[0, 1] = float("nan")
    mask = masks.amt_mask(weights, 0.3, 0.3)
    assert set(mask.masked[1:].flatten().tolist()) <= {0, 1, 2, 7, 8, 9}
    assert set(mask.visible[1:].flatten().tolist()) == {3, 4, 5, 6}
    assert mask.masked[0].unique().numel() == 3
    for ratio, throw_ratio in ((0.5, 0.5), (0.9, 0.2), (0.5, -0.1)):
        with pytest.raises(ValueError, match="leaves no visible patch"):
            masks.amt_mask(weights, ratio, throw_ratio)


def test_amt_weights_average_heads_scaled_to_one():
    attention = torch.rand(3, 4, 9) * torch.tensor([1, 10, 0.1, 0])[:, None]
    expected = np.zeros((3, 9))
    for image in range(3):
        for head in range(3):  # the last says nothing: it adds nothing
            row = attention[image, head].numpy()
            expected[image] += (row - row.min()) / (row.max() - row.min()) / 4
    np.testing.assert_allclose(masks.attention_weights(attention), expected, atol=1e-6)
