"""JPEGs are decoded by simplejpeg, at a part of their size if that will do; the reference is PIL at full size."""

import io

import datasets
import numpy as np
import pytest
import torch
from helpers import dataset_of, image_bytes, picture
from PIL import Image, ImageOps

import data
import pixels
from batches import EvalBatches, TrainBatches
from cropping import CropOptions
from pixels import PixelFormat
from readers import MapCrops, Request


def detailed(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture with detail of every size."""
    rng, total = np.random.default_rng(seed), np.zeros((height, width, 3))
    for cells in (4, 12, 40):
        small = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        total += np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), float) / 3
    return Image.fromarray(total.round().astype(np.uint8))


def reference(encoded: bytes, box, size: tuple[int, int], mode: str = "RGB") -> np.ndarray:
    """A box as PIL decodes and resizes it."""
    top, left, height, width = (int(x) for x in box)
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded))).convert(mode)
    image = image.crop((left, top, left + width, top + height)).resize(size[::-1], Image.Resampling.BICUBIC)
    return np.asarray(image, int).reshape(*size, -1)


def difference(found: torch.Tensor, expected: np.ndarray) -> tuple[float, int]:
    distance = np.abs(found.permute(1, 2, 0).numpy().astype(int) - expected)
    return distance.mean(), distance.max()


def opened(encoded: bytes, form: PixelFormat = pixels.RGB) -> pixels.Jpeg:
    found = data.open_picture(dict(bytes=encoded, path=None), form)
    assert isinstance(found, pixels.Jpeg)
    return found


@pytest.mark.parametrize("channels, mode", [(3, "RGB"), (1, "L")])
@pytest.mark.parametrize("how", [{}, dict(progressive=True), dict(subsampling=0), dict(quality=30)])
def test_crops_of_jpegs_are_those_of_pil(how, channels, mode):
    for image in (detailed(130, 90), detailed(130, 90).convert("L")):
        encoded = image_bytes(image, "JPEG", **how)
        for box in ((7, 11, 60, 81), (7, 11, 81, 50)):  # lying, standing
            found = pixels.crop(opened(encoded, PixelFormat(channels)), box, size=(48, 40))
            mean, largest = difference(found, reference(encoded, box, (48, 40), mode))
            assert mean < 0.3 and largest <= 2


@pytest.mark.parametrize("factor, size", [(1, 60), (2, 40), (4, 20), (8, 10)])
@pytest.mark.parametrize("orientation", [None, 1, 2, 3, 4, 5, 6, 7, 8, 99])
def test_turned_jpegs_are_cropped_upright_at_any_scale(orientation, factor, size, monkeypatch):
    exif = Image.Exif()
    if orientation:
        exif[pixels.ORIENTATION] = orientation
    encoded = image_bytes(detailed(211, 157, seed=1), "JPEG", exif=exif, quality=95)
    jpeg, factors, decode = opened(encoded), [], pixels.Jpeg.decode
    monkeypatch.setattr(pixels.Jpeg, "decode", lambda self, by: factors.append(by) or decode(self, by))
    assert jpeg.size == ((157, 211) if orientation in (5, 6, 7, 8) else (211, 157))
    box = (31, 13, 83, 91)  # no multiples of the factor
    mean, largest = difference(pixels.crop(jpeg, box, size=size), reference(encoded, box, (size, size)))
    assert factors == [factor]
    assert (mean < 0.2 and largest <= 2) if factor == 1 else (mean < 5 and largest < 30)  # one cell off: 8 and 60


def test_pictures_are_never_decoded_smaller_than_the_crop(monkeypatch):
    encoded, made, decode = image_bytes(detailed(320, 200), "JPEG"), [], pixels.Jpeg.decode

    def watched(self, factor):
        values = decode(self, factor)
        made.append((factor, values.shape[:2]))
        return values

    monkeypatch.setattr(pixels.Jpeg, "decode", watched)
    for size in ((33, 33), (50, 80), (25, 40), (12, 160), (101, 40)):
        assert pixels.stretch(opened(encoded), size).shape == (3, *size)
    assert made == [(4, (50, 80)), (4, (50, 80)), (8, (25, 40)), (2, (100, 160)), (1, (200, 320))]


def test_a_jpeg_with_a_second_picture_shows_its_first():
    first = detailed(90, 70, seed=1)
    encoded = image_bytes(first, "MPO", save_all=True, append_images=[detailed(40, 30, seed=2)])
    assert Image.open(io.BytesIO(encoded)).format == "MPO"
    for size in (70, 20):
        mean, _ = difference(pixels.stretch(opened(encoded), size), reference(encoded, (0, 0, 70, 90), (size, size)))
        assert mean < 2


def test_other_pictures_are_read_by_pil():
    cmyk = image_bytes(picture().convert("CMYK"), "JPEG")
    for encoded, form in [(cmyk, pixels.RGB), (cmyk, PixelFormat(4)), (image_bytes(picture()), pixels.RGB)]:
        assert not isinstance(data.open_picture(dict(bytes=encoded, path=None), form), pixels.Jpeg)


def test_pil_decodes_what_simplejpeg_cannot(monkeypatch):
    encoded = image_bytes(detailed(60, 40), "JPEG")

    def refuses(*_, **options):
        raise ValueError("cannot")

    monkeypatch.setattr(pixels.simplejpeg, "decode_jpeg", refuses)
    for size, largest in (((40, 60), 0), ((10, 15), 12)):
        found = pixels.stretch(opened(encoded), size)
        assert difference(found, reference(encoded, (0, 0, 40, 60), size))[1] <= largest


# ------------------------------------------------------------------------------------------- broken inside


def cut_off(seed: int = 0) -> bytes:
    """A JPEG whose header is sound."""
    encoded = image_bytes(detailed(200, 150, seed), "JPEG")
    return encoded[: len(encoded) * 2 // 3]


@pytest.mark.parametrize("size", [120, 16])
def test_a_jpeg_broken_inside_raises_what_pil_raises(size):
    with pytest.raises(OSError, match="image file is truncated"):
        pixels.stretch(opened(cut_off()), size)


def some_broken(count: int = 20, bad=(3, 4, 11)) -> datasets.Dataset:
    blobs = [cut_off(i) if i in bad else image_bytes(detailed(60 + i, 50, i), "JPEG") for i in range(count)]
    return dataset_of(blobs, labels=list(range(count)))


@pytest.mark.parametrize("size", [32, 8])
def test_a_jpeg_broken_inside_is_replaced_by_the_next_with_its_label_and_a_crop_of_its_own(size):
    options = CropOptions(size, (0.2, 1.0), seed=0, bad_limit=10)
    batch = MapCrops(some_broken(), options)[Request(1, np.array([2, 3, 11]), size)]
    assert batch.labels.tolist() == [2, 5, 12] and [each.index for each in batch.bad] == [3, 4, 11]
    assert "OSError: image file is truncated" in batch.bad[0].description
    fifth = some_broken()[5]["image"]["bytes"]
    sizes = np.array([(50, 65)])
    crops = options.crops(sizes, 1, np.array([3]))
    expected = pixels.crop(opened(fifth), crops.boxes[0], crops.flips[0], size)
    assert torch.equal(batch.images[1], expected)
    assert np.allclose(batch.crops.boxes[1], crops.as_fractions(sizes).boxes[0])


@pytest.mark.parametrize("extra", [{}, dict(preload="host"), dict(preload="host", workers=2)])
def test_each_jpeg_broken_inside_is_counted_once(extra):
    batches = TrainBatches(some_broken(), 16, 10, max_bad=0.5, labels=True, **extra)
    labels = np.concatenate([batch.labels for batch in batches.epoch(1)])
    assert set(batches.bad.descriptions) == {3, 4, 11}
    assert sorted(labels) == sorted([*range(3), 5, 5, *range(5, 11), 12, *range(12, 20)])


def test_after_too_many_broken_jpegs_the_rest_is_not_tried():
    crops = MapCrops(some_broken(40, range(40)), CropOptions(16, (0.2, 1.0), seed=0, bad_limit=5))
    batch = crops[Request(1, np.arange(8), 16)]
    assert len(batch.images) == 8 and 5 <= len(batch.bad) <= 13


def test_streams_and_evaluation_leave_out_what_is_broken_inside():
    stream = TrainBatches(some_broken().to_iterable_dataset(), 16, 10, max_bad=0.5, length=20)
    assert sum(len(batch.images) for batch in stream.epoch(1)) == 20 and stream.bad.count
    found = [bad for batch in EvalBatches(some_broken(), 16, 10) for bad in batch.bad]
    assert [i for i, bad in enumerate(found) if bad] == [3, 4, 11]


# ------------------------------------------------------------------------------------------- photographs


@pytest.mark.parametrize("name", ["imagenet1k-sample", "objmask"])
def test_crops_of_photographs_differ_little_from_those_of_pil(name, photographs):
    dataset = data.load_images(photographs(name))
    options, sides, count = CropOptions(64, (0.2, 1.0), seed=0, bad_limit=1), (160, 64, 24), 60
    found = {side: [] for side in sides}
    for index in data.evenly_spaced(len(dataset), count):
        encoded = dataset[int(index)]["image"]["bytes"]
        jpeg = opened(encoded)
        crops = options.crops(np.array([(jpeg.height, jpeg.width)]), 1, np.array([index]))
        for side in sides:
            box = crops.boxes[0]
            found[side].append(difference(pixels.crop(jpeg, box, size=side), reference(encoded, box, (side, side))))
    means = {side: np.mean([mean for mean, _ in values]) for side, values in found.items()}
    largest = {side: max(value for _, value in values) for side, values in found.items()}
    assert means[160] < 0.05 and largest[160] <= 12  # PIL filters columns first, at times
    assert max(means.values()) < 2.5 and max(largest.values()) < 60  # at a half, a quarter or an eighth
