"""Scores of dense predictions, against plain computations and pycocotools."""

import contextlib
import io

import numpy as np
import pytest
import torch

import scores
from instances import rle


def test_iou_is_that_of_a_plain_computation():
    rng = np.random.default_rng(0)
    truth, predicted = rng.integers(-1, 4, (5, 20, 30)), rng.integers(0, 5, (5, 20, 30))
    matrix = sum(scores.confusion(torch.tensor(p), torch.tensor(t), 6, -1) for p, t in zip(predicted, truth))
    found = scores.iou_scores(matrix, list("abcdef"))
    seen, ious, recalls = truth != -1, {}, {}
    for number, name in enumerate("abcdef"):
        is_true, is_found = (truth == number) & seen, (predicted == number) & seen
        union, both = (is_true | is_found).sum(), (is_true & is_found).sum()
        ious[name] = 100 * both / union if union else None
        recalls[name] = 100 * both / is_true.sum() if is_true.any() else None
    assert found["iou"] == pytest.approx(ious) and found["accuracy"] == pytest.approx(recalls)
    assert ious["e"] == 0 and recalls["e"] is None and ious["f"] is None  # never true; neither true nor found
    assert found["miou"] == pytest.approx(np.mean([ious[name] for name in "abcde"]))
    assert found["mean_accuracy"] == pytest.approx(np.mean([recalls[name] for name in "abcd"]))
    assert found["pixel_accuracy"] == pytest.approx(100 * (truth == predicted)[seen].mean())


def some_detections():
    """Pictures, truth with a crowd, and detections that are right, shifted, doubled or wrong; in COCO's formats."""
    rng = np.random.default_rng(1)
    images = [dict(id=i, height=200, width=300) for i in range(12)]
    truth, found = [], []

    def masked(x, y, w, h):
        mask = np.zeros((200, 300), np.uint8, order="F")
        mask[y : y + (h + 1) // 2, x : x + w] = 1  # half of the box: another size
        return rle.encode(mask)

    for image in images:
        for _ in range(rng.integers(0, 6)):
            x, y = (int(v) for v in rng.integers(0, 150, 2) // (1, 2))
            w, h = (int(v) for v in rng.integers(5, 120, 2))
            label = int(rng.integers(0, 3))
            truth.append(dict(image_id=image["id"], category_id=label, bbox=[x, y, w, h], area=float(w * h),
                              iscrowd=int(rng.random() < 0.15), segmentation=masked(x, y, w, h)))  # fmt: skip
            for _ in range(rng.integers(0, 3)):
                dx, dy = (int(v) for v in rng.integers(0, 9, 2))
                label = label if rng.random() < 0.9 else 1
                found.append(dict(image_id=image["id"], category_id=label, bbox=[x + dx, y + dy, w, h],
                                  score=float(rng.random()), segmentation=masked(x + dx, y + dy, w, h)))  # fmt: skip
    return images, truth, found


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_average_precision_is_that_of_pycocotools(kind):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    images, truth, found = some_detections()
    ours = scores.average_precision(images, truth, found, ["cat", "dog", "owl", "elk"], kind)
    for each in found:  # as detectron2 does, so that sizes are those of what is judged
        del each["segmentation" if kind == "bbox" else "bbox"]
    with contextlib.redirect_stdout(io.StringIO()):
        theirs = COCO()
        theirs.dataset = dict(
            images=images,
            categories=[dict(id=i, name=name) for i, name in enumerate(["cat", "dog", "owl", "elk"])],
            annotations=[dict(each, id=i) for i, each in enumerate(truth, start=1)],
        )
        theirs.createIndex()
        evaluation = COCOeval(theirs, theirs.loadRes(found), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    assert 10 < ours["ap"] < 90
    assert [ours[name] for name in scores.STATS] == pytest.approx(100 * evaluation.stats[:6], abs=1e-9)
    for number, name in enumerate(["cat", "dog", "owl"]):
        values = evaluation.eval["precision"][:, :, number, 0, -1]
        assert ours["by_class"][name] == pytest.approx(100 * values[values > -1].mean())
    assert ours["by_class"]["elk"] is None


def test_a_model_that_finds_nothing_has_a_precision_of_0():
    images, truth, _ = some_detections()
    found = scores.average_precision(images, truth, [], ["cat", "dog", "owl"], "bbox")
    assert found["ap"] == 0 and found["ap50"] == 0


def test_sizes_without_objects_have_no_precision():
    images, truth, found = some_detections()
    small = [each for each in truth if each["area"] < 32**2]
    assert scores.average_precision(images, small, found, ["cat", "dog", "owl"], "bbox")["ap_large"] is None
