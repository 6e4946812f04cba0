import hashlib

import numpy as np
import pytest

import data
from objects import object_mask
from shapes import SHAPE_NAMES, draw_shapes, load_shapes


@pytest.fixture(scope="module")
def shapes():
    return {split: load_shapes(split) for split in ("train", "test")}


def test_each_picture_has_one_object_of_the_promised_size_with_mask_and_box(shapes):
    assert shapes["train"].num_rows == 4000 and shapes["test"].num_rows == 1000
    assert np.bincount(shapes["train"]["label"]).min() >= 333 and len(SHAPE_NAMES) >= 10
    centres = []
    for row in shapes["test"]:
        mask = np.asarray(row["mask"]) > 0
        assert row["image"].size == (64, 64) and 0.05 <= mask.mean() <= 0.5
        y, x = mask.nonzero()
        assert row["bbox"] == [x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1]
        centres.append([y.mean(), x.mean()])
    centres = np.array(centres)
    assert centres.min() < 16 and centres.max() > 48 and np.abs(centres.mean(0) - 31.5).max() < 2


def test_drawings_are_those_of_the_first_version():
    """Published results depend on these pictures."""
    digest = hashlib.sha256()
    for split in ("train", "test"):
        for easy in (False, True):
            for row in draw_shapes(split, 24, 64, easy):
                digest.update(row["image"].tobytes())
                digest.update(row["mask"].tobytes())
                digest.update(bytes([row["label"], *map(int, row["bbox"])]))
    assert digest.hexdigest() == "fef2e756706e982ecfb5afd6703fc728fca966a351ddb9c7075b955d9794b658"


def test_loaded_pictures_are_those_drawn_and_splits_differ(shapes):
    for row, drawn in zip(shapes["test"], draw_shapes("test", 3, 64)):
        assert np.array_equal(np.asarray(row["image"]), np.asarray(drawn["image"]))
        assert row["label"] == drawn["label"]
    first = {split: np.asarray(shapes[split][0]["image"]) for split in shapes}
    assert not np.array_equal(first["train"], first["test"])
    with pytest.raises(ValueError, match="Unknown split"):
        load_shapes("validation")


def test_easy_shapes_are_upright_and_calm(shapes):
    contrast, widths = np.zeros(2), []
    for row, easy in zip(shapes["test"], data.load_images("shapes:easy", "test", max_images=120)):
        masks = [np.asarray(object_mask(each["mask"])) > 0 for each in (row, easy)]
        pictures = [np.asarray(row["image"]), np.asarray(data.decode(easy["image"]))]
        background = ~masks[0] & ~masks[1]
        contrast += [picture[background].astype(float).std(0).sum() for picture in pictures]
        assert row["label"] == easy["label"]
        if SHAPE_NAMES[row["label"]] == "bar":
            widths.append(easy["bbox"][2] / easy["bbox"][3])
    assert contrast[1] < contrast[0] / 2 and min(widths) > 2.5 and len(widths) == 10


@pytest.mark.slow  # the drawings do not change: see above
def test_a_shape_cannot_be_told_from_raw_pixels_or_mean_colour(shapes):
    linear_model = pytest.importorskip("sklearn.linear_model")
    x = {split: np.stack([np.asarray(image) for image in shapes[split]["image"]]) / 255.0 for split in shapes}
    y = {split: np.array(shapes[split]["label"]) for split in shapes}
    colour = {split: x[split].mean((1, 2)) for split in x}
    brightness_and_colour = linear_model.LogisticRegression(max_iter=500).fit(colour["train"], y["train"])
    assert brightness_and_colour.score(colour["test"], y["test"]) < 0.13  # 1 / 12 = 0.083 is chance
    flat = {split: x[split].reshape(len(x[split]), -1) for split in x}
    probe = linear_model.RidgeClassifier(alpha=1e4).fit(flat["train"], y["train"])
    assert probe.score(flat["test"], y["test"]) < 0.17
