"""What is taken for the object in a mask."""

import datasets
import numpy as np
import pytest
import torch
from helpers import image_bytes, picture
from PIL import Image

import objects
from objects import understand

GRID = np.hypot(*np.mgrid[-20:20, -24:24])  # distance from the centre (40, 48)


def rings(inner: int, rim: int, outside: int = 0) -> np.ndarray:
    """A disc of one value with a rim of another."""
    values = np.full(GRID.shape, outside, np.uint8)
    values[GRID < 12], values[(GRID >= 12) & (GRID < 14)] = inner, rim
    return values


def soft_edges(values: np.ndarray) -> np.ndarray:
    """A mask that was made smaller and larger again."""
    small = Image.fromarray(values).resize((24, 20), Image.Resampling.BILINEAR)
    return np.asarray(small.resize((48, 40), Image.Resampling.BILINEAR)) // 16 * 17


@pytest.mark.parametrize(
    "masks, kind, inside, on_rim",
    [
        ([rings(255, 0)], "binary", True, False),
        ([rings(1, 0), rings(255, 0)], "binary", True, False),  # each its own way
        ([rings(3, 255), rings(7, 255)], "classes: 3 to 7 are the object, 255 is void", True, False),
        ([rings(15, 9)], "classes: 9 to 15 are the object", True, True),
        ([rings(255, 128)], "trimaps: 255 is the object, 128 is unknown", True, False),
        ([(255 - 5 * GRID).clip(0, 255).astype(np.uint8)], "soft", True, True),
        ([soft_edges(rings(255, 0))], "soft", True, False),
        ([np.arange(1920).reshape(40, 48).astype(np.int64) * (GRID < 12)], "classes: ", True, False),
        ([np.zeros((40, 48), np.uint8), rings(2, 255)], "classes: 2 are the object, 255 is void", True, False),
        ([rings(255, 255), rings(2, 0)], "classes: 2 are the object, 255 is void", True, False),  # void elsewhere
    ],
)
def test_values_of_masks_are_understood_from_a_sample(masks, kind, inside, on_rim):
    rule = understand(masks)
    assert rule.kind.startswith(kind)
    found = rule.is_object(masks[-1])
    assert found[20, 24] == inside and found[20, 24 + 13] == on_rim and not found[0, 0]


def test_masks_without_background_need_to_be_told():
    pet = rings(1, 3, outside=2)
    with pytest.raises(ValueError, match=r"no background \(0\), only the values 1, 2, 3: a trimap\?.*--object-ids"):
        understand([pet])
    found = understand([pet], ids=[1]).is_object(pet)
    assert found.sum() == (GRID < 12).sum()
    assert understand([rings(4, 9)], void=9).is_object(rings(4, 9)).sum() == (GRID < 12).sum()


def test_cut_outs_and_colours_and_palettes_have_values():
    disc = Image.fromarray(rings(255, 0))
    cut_out = picture(48, 40).convert("RGBA")
    cut_out.putalpha(disc)
    assert np.array_equal(objects.mask_values(cut_out), np.asarray(disc))
    opaque = Image.merge("RGBA", [disc] * 3 + [Image.new("L", disc.size, 255)])
    assert np.array_equal(objects.mask_values(opaque), np.asarray(disc))
    coloured = Image.merge("RGB", [disc, Image.new("L", disc.size), Image.new("L", disc.size)])
    assert np.array_equal(objects.mask_values(coloured), np.asarray(disc))
    voc = np.zeros((40, 48, 3), np.uint8)
    voc[GRID < 12], voc[(GRID >= 12) & (GRID < 14)] = (128, 0, 0), (224, 224, 192)
    assert np.array_equal(objects.mask_values(Image.fromarray(voc)), np.asarray(disc))
    shares = Image.fromarray((rings(255, 128) / 255).astype(np.float32))
    assert set(np.unique(objects.mask_values(shares))) == {0, 128, 255}
    palette = Image.fromarray(rings(3, 255))
    palette.putpalette([value for i in range(256) for value in (i, 255 - i, 7)])
    assert set(np.unique(objects.mask_values(palette))) == {0, 3, 255}


def test_a_mask_is_turned_with_the_picture_that_its_exif_turns():
    values = np.zeros((40, 48), np.uint8)
    values[:10] = 255  # the top of the stored picture
    stored, mask = Image.fromarray(values).convert("RGB"), Image.fromarray(values)
    exif = Image.Exif()
    for orientation in (5, 6, 7, 8):
        exif[0x0112] = orientation
        record = dict(bytes=image_bytes(stored, "JPEG", quality=95, exif=exif), path=None)
        upright = np.asarray(objects.data.decode(record).convert("L")) > 127
        assert np.array_equal(np.asarray(objects.object_mask(mask, picture=record)) > 0, upright), orientation
        turned = Image.fromarray((upright * 255).astype(np.uint8))
        assert np.array_equal(np.asarray(objects.object_mask(turned, picture=record)) > 0, upright)


def test_a_turn_that_sizes_do_not_show_is_warned_of(capsys):
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    record = dict(bytes=image_bytes(picture(48, 40), "JPEG", exif=exif), path=None)
    mask = Image.fromarray(rings(255, 0))
    assert np.array_equal(np.asarray(objects.object_mask(mask, picture=record)), np.asarray(mask))
    assert "turned or mirrored by their EXIF" in capsys.readouterr().err


def test_the_column_of_masks_counts_classes_and_leaves_the_void_out():
    blobs = [image_bytes(Image.fromarray(rings(1 + i, 255))) for i in range(4)]
    table = dict(image=[image_bytes(picture(48, 40, seed=i)) for i in range(4)], mask=blobs)
    table = {name: [dict(bytes=blob, path=None) for blob in column] for name, column in table.items()}
    features = datasets.Features(image=datasets.Image(), mask=datasets.Image())
    masks = objects.ObjectMasks(datasets.Dataset.from_dict(table, features), "mask")
    share = (GRID < 12).mean()
    torch.testing.assert_close(
        masks.coverage(np.arange(4), (1, 1)).flatten(), torch.full((4,), share).float(), rtol=0, atol=0.01
    )
    assert "255 is void" in masks.rule.kind


def test_masks_of_pictures_that_are_arrays_are_read():
    features = datasets.Features(image=datasets.Array3D((4, 40, 48), "uint8"), mask=datasets.Image())
    rows = dict(image=[np.zeros((4, 40, 48), np.uint8)] * 2, mask=[Image.fromarray(rings(255, 0))] * 2)
    found = objects.ObjectMasks(datasets.Dataset.from_dict(rows, features), "mask")
    assert found.coverage(np.arange(2), (10, 12))[:, 5, 6].tolist() == [1, 1] and not found.missing
