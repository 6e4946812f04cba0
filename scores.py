"""Scores of dense predictions: mean IoU of label maps, average precision of boxes and masks as in COCO.

Sources: Everingham et al. (IJCV 2015) for IoU; Lin et al. (ECCV 2014) for average precision.
"""

import contextlib
import io
from collections.abc import Sequence

import torch
from torch import Tensor

try:
    import faster_coco_eval
    from torchmetrics.functional.classification import multiclass_confusion_matrix
except ModuleNotFoundError:  # check_requirements() says so
    faster_coco_eval = None

STATS = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")  # the first six of COCO's summary


def check_requirements():
    """Raise ValueError, with the command that installs them, if torchmetrics or faster-coco-eval is missing."""
    if faster_coco_eval is None:
        raise ValueError("dense.py needs two more packages: pip install torchmetrics faster-coco-eval")


# ------------------------------------------------------------------------------ label maps


def confusion(predicted: Tensor, truth: Tensor, classes: int, ignored: int) -> Tensor:
    """The numbers of pixels (classes, classes) int64 by true class (rows) and predicted class (columns).

    ``predicted`` and ``truth`` are int64 of one shape; pixels whose truth is ``ignored`` do not count.
    """
    return multiclass_confusion_matrix(predicted, truth, classes, ignore_index=ignored, validate_args=False)


def iou_scores(matrix: Tensor, classes: Sequence[str]) -> dict:
    """Scores, in per cent, from the confusion matrix of all pictures.

    "miou": mean intersection over union of the classes that occur, in truth or prediction;
    "mean_accuracy": mean recall of those that occur in the truth; "pixel_accuracy"; "iou" and "accuracy"
    by class, None where they are not defined.
    """
    matrix = matrix.double()
    right, true, predicted = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
    iou = 100 * right / (true + predicted - right)
    accuracy = 100 * right / true
    return dict(
        miou=iou.nanmean().item(),
        mean_accuracy=accuracy.nanmean().item(),
        pixel_accuracy=(100 * right.sum() / true.sum()).item(),
        iou=_by_class(classes, iou.tolist()),
        accuracy=_by_class(classes, accuracy.tolist()),
    )


def _by_class(classes: Sequence[str], values: Sequence[float]) -> dict[str, float | None]:
    return {name: None if value != value else value for name, value in zip(classes, values)}


# ------------------------------------------------------------------------------ objects


def average_precision(
    images: list[dict], truth: list[dict], found: list[dict], classes: Sequence[str], kind: str
) -> dict:
    """COCO's average precision, in per cent, of detections in its result format.

    ``images``: "id", "height" and "width"; ``truth``: annotations; ``kind``: "bbox" or "segm".
    Category ids are classes from 0. "ap" to "ap_large" are COCO's (None where no object has that
    size); "by_class" has AP, None for classes without objects.
    """
    categories = [dict(id=i, name=name) for i, name in enumerate(classes)]
    numbered = [dict(annotation, id=number) for number, annotation in enumerate(truth, start=1)]
    other = "segmentation" if kind == "bbox" else "bbox"  # the size of a detection is that of what is judged
    found = [{key: value for key, value in each.items() if key != other} for each in found]
    content = dict(images=images, annotations=numbered, categories=categories)
    with contextlib.redirect_stdout(io.StringIO()):
        known = faster_coco_eval.COCO(content)
        detections = known.loadRes(found) if found else faster_coco_eval.COCO(content | dict(annotations=[]))
        evaluation = faster_coco_eval.COCOeval_faster(known, detections, kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    stats = dict(zip(STATS, [None if value < 0 else 100 * value for value in map(float, evaluation.stats)]))
    precision = torch.as_tensor(evaluation.eval["precision"])[:, :, :, 0, -1]  # IoU, recall, class
    by_class = 100 * precision.masked_fill(precision < 0, torch.nan).nanmean(dim=(0, 1))
    return stats | dict(by_class=_by_class(classes, by_class.tolist()))
