"""A tiny data set in the layout of COCO, for tests."""

import json

import numpy as np
from helpers import picture

WIDTH, HEIGHT = 40, 30
POLYGON = [5.0, 5.0, 25.0, 5.0, 25.0, 20.0, 5.0, 20.0]


def coco_content() -> dict:
    """Three pictures: two objects, of which one is a crowd; one object; none."""
    crowd = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
    crowd[2:9, 30:38] = 1
    runs = np.diff(np.flatnonzero(np.diff(np.concatenate([[2], crowd.flatten("F"), [2]])))).tolist()
    objects = [
        dict(image_id=7, category_id=3, bbox=[5, 5, 20, 15], area=300, iscrowd=0, segmentation=[POLYGON]),
        dict(image_id=7, category_id=9, bbox=[30, 2, 8, 7], area=56, iscrowd=1,
             segmentation=dict(size=[HEIGHT, WIDTH], counts=runs)),
        dict(image_id=5, category_id=9, bbox=[1, 1, 10, 10], area=100, iscrowd=0,
             segmentation=[[1, 1, 11, 1, 11, 11, 1, 11]]),
    ]  # fmt: skip
    return dict(
        images=[dict(id=i, file_name=f"{i}.jpg", width=WIDTH, height=HEIGHT) for i in (7, 5, 6)],
        annotations=[dict(each, id=number) for number, each in enumerate(objects, start=1)],
        categories=[dict(id=9, name="dog"), dict(id=3, name="cat")],
    )


def make_coco(root, split="train2017", content=None):
    (root / split).mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    for number in (5, 6, 7):
        picture(WIDTH, HEIGHT, seed=number).save(root / split / f"{number}.jpg")
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content or coco_content()))
    return root
