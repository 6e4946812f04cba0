import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from einops import reduce

import measures


def test_measures_agree_with_scikit_learn_and_with_counting_pixels():
    from sklearn.metrics import jaccard_score, roc_auc_score

    truth = torch.rand(5, 32, 32) < torch.rand(5, 1, 1)  # objects of several sizes
    share = reduce(truth.float(), "b (h p1) (w p2) -> b (h w)", "mean", p1=8, p2=8)
    relevance, side = torch.randint(0, 6, (5, 16)).float(), torch.rand(5, 16) < 0.5  # with ties
    for i in range(5):
        pixels = [x[i].view(4, 4).repeat_interleave(8, 0).repeat_interleave(8, 1) for x in (relevance, side)]
        auc = roc_auc_score(truth[i].flatten(), pixels[0].flatten())
        assert measures.rank_auc(relevance, share)[i].item() == pytest.approx(auc, abs=1e-5)
        iou = jaccard_score(truth[i].flatten(), pixels[1].flatten())
        assert measures.iou(side, share)[i].item() == pytest.approx(iou, abs=1e-5)
    whole = (torch.arange(16) < 12).float().expand(2, 16)
    assert measures.iou(whole.bool(), whole).tolist() == measures.rank_auc(whole, whole).tolist() == [1, 1]


def test_masked_shares_are_those_of_object_and_background():
    share = torch.tensor([[1.0, 0.5, 0.0, 0.0], [0.0, 0.25, 0.25, 0.0]])
    of_object, of_background = measures.masked_shares(torch.tensor([[0, 1], [1, 3]]), share)
    torch.testing.assert_close(of_object, torch.tensor([1.0, 0.5]))
    torch.testing.assert_close(of_background, torch.tensor([0.5 / 2.5, 1.75 / 3.5]))


def test_off_centre_is_nearer_to_the_border_than_to_the_centre():
    objects = torch.zeros(3, 40, 80)
    objects[0, 18:22, 38:42] = 1
    objects[1, 0:6, 38:42] = 1  # at the top
    objects[2, 18:22, 70:80] = 1  # at the right
    assert measures.off_centre(objects).tolist() == [False, True, True]


def test_features_are_taken_apart_into_position_own_pixels_and_context():
    pixels, positions, d = torch.randn(300, 16, 6), torch.randn(16, 10), 10
    own, context = pixels @ torch.randn(6, d), torch.randn(300, 16, d)
    parts = [2 * positions.expand(300, -1, -1), own, 0.5 * context]
    variances = torch.tensor([(x - x.mean((0, 1))).pow(2).mean() for x in parts])
    shares = measures.variance_shares(sum(parts), pixels)
    assert list(shares.values()) == pytest.approx((variances / variances.sum()).tolist(), abs=0.02)
    assert list(shares) == ["position", "own pixels", "context"]


def test_frames_of_one_video_count_as_one_in_standard_errors():
    values, videos = torch.randn(40), torch.arange(40)
    alone = measures.mean_and_error(values, videos)
    assert alone == pytest.approx((values.mean().item(), values.std().item() / 40**0.5), rel=1e-4)
    together = measures.mean_and_error(values.repeat_interleave(5), videos.repeat_interleave(5) + 7)
    assert together == pytest.approx(alone, rel=1e-4)
    assert measures.mean_and_error(values.repeat_interleave(5), torch.arange(200))[1] < 0.5 * alone[1]


# ------------------------------------------------------------------------------------------- features


def test_variances_are_those_of_a_loop():
    features = torch.randn(2, 6, 5, dtype=torch.float64)
    unit = (features / features.norm(dim=-1, keepdim=True)).float()
    wanted = [np.mean([np.var([unit[i, j, k] for j in range(6)]) for k in range(5)]) for i in range(2)]
    assert measures.feature_variance(features).tolist() == pytest.approx(wanted, rel=1e-5)
    similarity = unit @ unit.mT
    pairs = [[similarity[i, a, b].item() for a in range(6) for b in range(6) if a != b] for i in range(2)]
    assert measures.similarity_variance(similarity).tolist() == pytest.approx([np.var(p) for p in pairs], rel=1e-5)
    assert measures.feature_variance(torch.ones(1, 6, 5)).item() == pytest.approx(0, abs=1e-12)


def test_planted_blocks_have_their_gap():
    side = torch.tensor([[True, True, False, False, False]])
    same = side[:, :, None] == side[:, None, :]
    weights = torch.where(same, 0.7, 0.2)
    weights[:, range(5), range(5)] = 9.0  # of a patch to itself: no edge
    assert measures.cluster_gap(weights, side).item() == pytest.approx(0.5, abs=1e-6)
    assert measures.cluster_gap(weights, torch.ones(1, 5, dtype=torch.bool)).isnan()
    weights = torch.rand(1, 5, 5)
    within = [weights[0, a, b].item() for a in range(5) for b in range(5) if a != b and side[0, a] == side[0, b]]
    between = [weights[0, a, b].item() for a in range(5) for b in range(5) if side[0, a] != side[0, b]]
    assert measures.cluster_gap(weights, side).item() == pytest.approx(np.mean(within) - np.mean(between), rel=1e-5)


def test_the_divergence_of_relations_is_that_of_scipy():
    last, now = torch.rand(2, 4, 4), torch.rand(2, 4, 4)
    p, q = scipy.special.softmax(last.numpy(), -1), scipy.special.softmax(now.numpy(), -1)
    wanted = [np.mean([scipy.stats.entropy(p[i, row], q[i, row]) for row in range(4)]) for i in range(2)]
    assert measures.relation_divergence(last, now).tolist() == pytest.approx(wanted, rel=1e-4)
    assert measures.relation_divergence(last, last).abs().max() < 1e-6


@pytest.mark.parametrize("grid", [(4, 6), (5, 5), (8, 8)])
def test_the_spectrum_is_that_of_numpy(grid):
    h, w = grid
    features = torch.randn(3, h * w, 2)
    logs = np.zeros((h, w))
    for image in features.view(3, h, w, 2).numpy():
        for channel in range(2):
            logs += np.log(np.abs(np.fft.fftshift(np.fft.fft2(image[..., channel]))) + 1e-6) / 6
    diagonal = [logs[h // 2 - i, w // 2 - i] for i in range(min(h, w) // 2 + 1)]
    assert measures.spectrum(features, grid).mean(0).tolist() == pytest.approx(
        np.array(diagonal) - diagonal[0], abs=1e-4
    )


def test_the_spectrum_of_a_constant_falls_to_the_floor_and_of_a_chessboard_rises():
    flat = measures.spectrum(torch.ones(1, 16, 3), (4, 4))[0]
    assert flat[0] == 0 and flat[1:].max() < -10
    y, x = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
    board = ((-1.0) ** (y + x)).flatten()[None, :, None]
    assert measures.spectrum(board, (4, 4))[0, -1] > 10


# ------------------------------------------------------------------------------------------- attention


def slow_distance(attention: torch.Tensor, h: int, w: int, p: int) -> float:
    total = 0.0
    for i in range(h * w):
        for j in range(h * w):
            apart = p * np.hypot(i // w - j // w, i % w - j % w)
            total += attention[i, j].item() * apart / (h * w)
    return total


def slow_information(attention: np.ndarray) -> float:
    n = len(attention)
    joint = attention / n
    p_key = joint.sum(0)
    information = sum(
        joint[q, k] * np.log(joint[q, k] / (p_key[k] / n)) for q in range(n) for k in range(n) if joint[q, k] > 0
    )
    return information / np.sqrt(np.log(n) * -(p_key[p_key > 0] * np.log(p_key[p_key > 0])).sum())


def test_attention_distance_and_information_are_those_of_loops():
    attention = torch.rand(2, 3, 12, 12).mul(5).softmax(-1)
    distance = measures.attention_distance(attention, (3, 4), 16)
    information = measures.attention_information(attention)
    for image in range(2):
        for head in range(3):
            one = attention[image, head]
            assert distance[image, head].item() == pytest.approx(slow_distance(one, 3, 4, 16), rel=1e-5)
            assert information[image, head].item() == pytest.approx(slow_information(one.double().numpy()), rel=1e-4)


def test_uniform_attention_and_attention_to_oneself():
    uniform, own = torch.full((1, 1, 16, 16), 1 / 16), torch.eye(16)[None, None]
    assert measures.attention_information(uniform).abs().item() < 1e-6
    mean = np.mean([8 * np.hypot(a // 4 - b // 4, a % 4 - b % 4) for a in range(16) for b in range(16)])
    assert measures.attention_distance(uniform, (4, 4), 8).item() == pytest.approx(mean, rel=1e-6)
    assert measures.attention_information(own).item() == pytest.approx(1, abs=1e-6)
    assert measures.attention_distance(own, (4, 4), 8).item() == 0
    all_to_one = torch.zeros(1, 1, 16, 16).index_fill(-1, torch.tensor([3]), 1.0)
    assert measures.attention_information(all_to_one).item() == 0  # every query attends alike


def test_attention_among_patches_sums_to_one_without_the_tokens_before_them():
    attention = torch.rand(2, 3, 7, 7).softmax(-1)
    patches = measures.patch_attention(attention, 2)
    torch.testing.assert_close(patches.sum(-1), torch.ones(2, 3, 5))
    torch.testing.assert_close(patches[0, 0, 1, 2] / patches[0, 0, 1, 3], attention[0, 0, 3, 4] / attention[0, 0, 3, 5])


def test_the_variance_of_mask_tokens_is_that_of_these_alone():
    tokens, masked = torch.randn(2, 6, 4), torch.tensor([[0, 2, 5], [1, 2, 3]])
    wanted = [tokens[i, masked[i]].numpy().var(axis=0).mean() for i in range(2)]
    assert measures.token_variance(tokens, masked).tolist() == pytest.approx(wanted, rel=1e-5)
    unit = tokens / tokens.norm(dim=-1, keepdim=True)
    wanted = [unit[i, masked[i]].numpy().var(axis=0).sum() for i in range(2)]
    assert measures.direction_variance(7 * tokens, masked).tolist() == pytest.approx(wanted, rel=1e-5)
