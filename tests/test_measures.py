import pytest
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
