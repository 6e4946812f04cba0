import io
import itertools

import datasets
import numpy as np
import pytest
import scipy.stats
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop

import data


def picture(width=40, height=30, seed=0) -> Image.Image:
    """A smooth colour picture, different for every seed."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def image_bytes(image: Image.Image, kind="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def dataset_of(blobs: list[bytes]) -> datasets.Dataset:
    """An undecoded data set of encoded pictures, as load_images returns it."""
    features = datasets.Features(image=datasets.Image(decode=False))
    records = [None if blob is None else {"bytes": blob, "path": None} for blob in blobs]
    return datasets.Dataset.from_dict({"image": records}, features)


@pytest.fixture
def pictures():
    return dataset_of([image_bytes(picture(seed=i)) for i in range(20)])


# ------------------------------------------------------------------------------------------- loading


def write_folder(root, names):
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture(seed=i).save(root / name)


def test_flat_folder_loads_every_picture_whatever_its_name(tmp_path):
    """datasets alone takes test.png for the whole of a test split, and finds no train split or only part of it."""
    write_folder(tmp_path, ["a.png", "test.png", "train-1.jpg", "[1].png", "deep/er/b.png"])
    (tmp_path / "notes.txt").write_text("not a picture")
    loaded = data.load_images(str(tmp_path))
    assert len(loaded) == 5
    assert "label" not in loaded.features or len(set(loaded["label"])) > 1
    assert all(data.decode(record).size == (40, 30) for record in loaded["image"])


def test_class_folders_give_labels_and_split_folders_splits(tmp_path):
    write_folder(tmp_path, ["train/cat/1.png", "train/dog/1.png", "train/dog/2.png", "val/cat/3.png", "val/dog/3.png"])
    train = data.load_images(str(tmp_path))
    assert train.features["label"].names == ["cat", "dog"]
    assert sorted(train["label"]) == [0, 1, 1]
    assert len(data.load_images(str(tmp_path), "val")) == 2
    with pytest.raises(ValueError, match="Unknown split 'test'"):
        data.load_images(str(tmp_path), "test")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["parquet file", "parquet folder", "saved", "saved splits", "webdataset", "shapes"])
def test_every_format_gives_undecoded_images_and_labels(kind, streaming, tmp_path):
    features = datasets.Features(
        mask=datasets.Image(), photo=datasets.Image(), kind=datasets.ClassLabel(names=["a", "b"])
    )
    rows = {"mask": [picture(seed=9)] * 6, "photo": [picture(seed=i) for i in range(6)], "kind": [0, 1] * 3}
    dataset = datasets.Dataset.from_dict(rows, features)
    column, path = "photo", tmp_path / "data"
    if kind == "parquet file":
        path = tmp_path / "some.parquet"
        dataset.to_parquet(path)
    elif kind == "parquet folder":
        path.mkdir()
        dataset.to_parquet(path / "train-00000-of-00001.parquet")
    elif kind == "saved":
        dataset.save_to_disk(path)
    elif kind == "saved splits":
        datasets.DatasetDict(train=dataset, other=dataset.select([0])).save_to_disk(path)
        assert len(list(data.load_images(str(path), "other", "photo"))) == 1
    elif kind == "webdataset":
        import tarfile

        path, column = tmp_path / "some.tar", None
        with tarfile.open(path, "w") as tar:
            for i, j in itertools.product(range(6), ("jpg", "cls")):
                blob = image_bytes(picture(seed=i), "JPEG") if j == "jpg" else str(i % 2).encode()
                info = tarfile.TarInfo(f"{i:03d}.{j}")
                info.size = len(blob)
                tar.addfile(info, io.BytesIO(blob))
    else:
        path, column = "shapes", None
    loaded = data.load_images(str(path), "train", column, streaming=streaming, max_images=5)
    records = list(loaded)
    assert len(records) == 5
    assert isinstance(loaded, datasets.IterableDataset) == streaming
    assert all(isinstance(record["image"]["bytes"], bytes) for record in records)
    if kind != "webdataset":
        assert "label" in records[0]
    if column:
        assert np.array_equal(np.asarray(data.decode(records[3]["image"])), np.asarray(picture(seed=3)))


def test_a_column_of_raw_bytes_can_be_named(tmp_path):
    blobs = [image_bytes(picture(seed=i)) for i in range(3)]
    datasets.Dataset.from_dict({"jpeg_bytes": blobs, "text": ["x"] * 3}).to_parquet(tmp_path / "x.parquet")
    loaded = data.load_images(str(tmp_path / "x.parquet"), image_column="jpeg_bytes")
    assert data.decode(loaded[1]["image"]).size == (40, 30)


def test_a_class_called_train_is_not_taken_for_a_split(tmp_path):
    write_folder(tmp_path, ["car/1.png", "train/1.png", "train/2.png", "bus/1.png"])
    loaded = data.load_images(str(tmp_path))
    assert len(loaded) == 4 and loaded.features["label"].names == ["bus", "car", "train"]


def test_named_columns_take_the_place_of_columns_called_image_and_label(photographs):
    loaded = data.load_images(photographs("objmask"), image_column="mask", label_column="source", max_images=2)
    assert data.decode(loaded[0]["image"]).size and isinstance(loaded[0]["label"], str | int)


def test_what_cannot_be_loaded_is_said_clearly(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither here nor on the Hugging Face hub"):
        data.load_images(str(tmp_path / "missing"))
    with pytest.raises(FileNotFoundError, match="neither images nor parquet"):
        data.load_images(str(tmp_path))
    two = datasets.Dataset.from_dict(
        {"left": [picture()], "right": [picture()], "n": [1]},
        datasets.Features(left=datasets.Image(), right=datasets.Image(), n=datasets.Value("int64")),
    )
    two.save_to_disk(tmp_path / "two")
    with pytest.raises(ValueError, match=r"no single image column.*left, right, n"):
        data.load_images(str(tmp_path / "two"))
    with pytest.raises(ValueError, match="no column 'middle'"):
        data.load_images(str(tmp_path / "two"), image_column="middle")
    with pytest.raises(ValueError, match="does not hold images"):
        data.load_images(str(tmp_path / "two"), image_column="n")
    with pytest.raises(ValueError, match="no column 'y'"):
        data.load_images(str(tmp_path / "two"), image_column="left", label_column="y")
    with pytest.raises(ValueError, match="must be positive"):
        data.load_images(str(tmp_path / "two"), image_column="left", max_images=0)
    with pytest.raises(ValueError, match="does not hold images"):
        data.load_images(str(tmp_path / "two"), image_column="n", streaming=True)
    (tmp_path / "broken").mkdir()
    two.to_parquet(tmp_path / "broken" / "train-00000-of-00002.parquet")
    (tmp_path / "broken" / "train-00001-of-00002.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(ValueError, match="cannot load"):
        data.load_images(str(tmp_path / "broken"), image_column="left")
    two.select([]).to_parquet(tmp_path / "none.parquet")
    for streaming in (False, True):
        with pytest.raises(ValueError, match="is empty"):
            data.load_images(str(tmp_path / "none.parquet"), image_column="left", streaming=streaming)


def test_an_error_of_datasets_becomes_one_clear_line(monkeypatch, tmp_path):
    """load_from_disk answers an empty data set with an IndexError."""
    dataset_of([image_bytes(picture())]).save_to_disk(tmp_path)
    for error in (
        IndexError("list index out of range"),
        ZeroDivisionError(),
        datasets.exceptions.DatasetsError("a\nb"),
    ):
        monkeypatch.setattr(datasets, "load_from_disk", lambda path, error=error: (_ for _ in ()).throw(error))
        with pytest.raises(ValueError, match=r"^cannot load [^\n]*$"):
            data.load_images(str(tmp_path))


def test_real_photographs_load(photographs):
    loaded = data.load_images(photographs("imagenette128"), "validation")
    assert len(loaded) == 3925 and data.decode(loaded[7]["image"]).size == (128, 128)
    masked = data.load_images(photographs("objmask"), max_images=3)
    assert {"image", "mask"} <= set(masked.features) and isinstance(masked[0]["image"]["bytes"], bytes)


# ------------------------------------------------------------------------------------------- decoding


def modes() -> dict[str, bytes]:
    base = picture()
    grey16 = (np.asarray(base.convert("L")).astype(np.uint16) * 257)[:, :]
    transparent = base.copy()
    transparent.putalpha(255)
    return {
        "RGB": image_bytes(base),
        "grey": image_bytes(base.convert("L")),
        "grey alpha": image_bytes(transparent.convert("LA")),
        "RGBA": image_bytes(transparent),
        "palette": image_bytes(base.quantize(255)),
        "CMYK": image_bytes(base.convert("CMYK"), "JPEG", quality=95),
        "16 bit": image_bytes(Image.fromarray(grey16)),
        "float": image_bytes(Image.fromarray(np.asarray(base.convert("L")).astype(np.float32) / 255), "TIFF"),
        "1 bit": image_bytes(base.convert("1")),
    }


@pytest.mark.parametrize("mode", list(modes()))
def test_every_mode_becomes_rgb_and_looks_the_same(mode):
    image = data.decode({"bytes": modes()[mode], "path": None})
    assert image.mode == "RGB" and image.size == (40, 30)
    expected = picture() if mode in ("RGB", "RGBA", "palette", "CMYK") else picture().convert("L").convert("RGB")
    difference = np.abs(np.asarray(image, dtype=int) - np.asarray(expected, dtype=int)).mean()
    limit = {"palette": 8, "CMYK": 8, "1 bit": 128}.get(mode, 0.5)
    assert difference <= limit


def test_a_dark_picture_of_16_bits_stays_dark():
    assert data.to_rgb(Image.fromarray(np.full((4, 4), 200, np.uint16))).getpixel((0, 0)) == (1, 1, 1)


def test_transparent_parts_become_white_not_what_hides_beneath():
    image = Image.new("RGBA", (4, 4), (200, 0, 0, 0))
    image.putpixel((0, 0), (10, 20, 30, 255))
    decoded = data.to_rgb(image)
    assert decoded.getpixel((0, 0)) == (10, 20, 30) and decoded.getpixel((3, 3)) == (255, 255, 255)


def test_turned_photographs_are_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    image = data.decode({"bytes": image_bytes(picture(), "JPEG", exif=exif, quality=95), "path": None})
    assert image.size == (30, 40)
    difference = np.asarray(image, dtype=int) - np.asarray(picture().transpose(Image.Transpose.ROTATE_270), dtype=int)
    assert np.abs(difference).mean() < 3


def test_normalisation_can_be_undone():
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    assert torch.equal(data.denormalize(data.normalize(images)), images)
    grey = data.normalize(torch.full((1, 3, 1, 1), 128, dtype=torch.uint8)).flatten()
    expected = (128 / 255 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(grey, expected)


# ------------------------------------------------------------------------------------------- random numbers, crops


def test_random_numbers_are_uniform_and_depend_on_key_and_index_only():
    numbers = data.uniform((3, 1), np.arange(2000), 50)
    assert numbers.dtype == np.float32 and numbers.min() >= 0 and numbers.max() < 1
    assert scipy.stats.kstest(numbers.ravel(), "uniform").pvalue > 0.001
    assert abs(np.corrcoef(numbers[:, 0], numbers[:, 1])[0, 1]) < 0.08
    assert abs(np.corrcoef(numbers[:-1, 0], numbers[1:, 0])[0, 1]) < 0.08
    assert np.array_equal(data.uniform((3, 1), np.array([7, 1999]), 50), numbers[[7, 1999]])
    for key in ((3, 2), (4, 1), (1, 3), (3, 1, 0)):
        assert abs(np.corrcoef(data.uniform(key, np.arange(2000), 1)[:, 0], numbers[:, 0])[0, 1]) < 0.08


@pytest.mark.parametrize("size", [(64, 64), (30, 200), (500, 100)])
def test_crops_are_those_of_torchvision_in_distribution(size):
    count = 3000
    boxes, flips = data.random_crops(np.tile(size, (count, 1)), data.uniform((0,), np.arange(count), 23))
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] >= 1).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= np.array(size)).all()
    torch.manual_seed(0)
    canvas = torch.empty(3, *size)
    peer = np.array([RandomResizedCrop.get_params(canvas, (0.2, 1.0), (3 / 4, 4 / 3)) for _ in range(count)])
    for column in range(4):
        assert scipy.stats.ks_2samp(boxes[:, column], peer[:, column]).pvalue > 0.001, column
    assert abs(flips.mean() - 0.5) < 0.05


def test_a_picture_too_slim_for_any_draw_gets_its_central_crop():
    boxes, _ = data.random_crops(np.array([[1, 10000], [10000, 1], [1, 1]]), np.full((3, 23), 0.5, np.float32))
    assert boxes.tolist() == [[0, 4999, 1, 1], [4999, 0, 1, 1], [0, 0, 1, 1]]


@pytest.mark.parametrize("size", [16, 64])
def test_batched_crops_equal_those_of_pil(size):
    count = 30
    images = [picture(40, 40, seed=i) for i in range(count)]
    crops = data.random_crops(np.full((count, 2), 40), data.uniform((0,), np.arange(count), 23))
    expected = torch.stack([data.crop(image, *how, size) for image, *how in zip(images, *crops)])
    stack = torch.stack([data.TF.pil_to_tensor(image) for image in images])
    result = data.crop_batch(stack, torch.from_numpy(crops.boxes), torch.from_numpy(crops.flips), size)
    assert result.dtype == torch.uint8
    assert (result.int() - expected.int()).abs().max() <= 2  # PIL rounds after each of its two passes
    assert crops.flips.any() and not crops.flips.all()


def test_eval_transform_resizes_the_short_side_and_cuts_out_the_centre():
    image = picture(80, 40)
    expected = image.resize((64, 32), Image.Resampling.BICUBIC).crop((20, 4, 44, 28))
    result = data.center_crop(image, 24, 32)
    assert np.array_equal(result.permute(1, 2, 0).numpy(), np.asarray(expected))
    assert data.center_crop(image, 24).shape == (3, 24, 24)


# ------------------------------------------------------------------------------------------- batches


def epoch_of(dataset, epoch=1, **options):
    batches = data.TrainBatches(dataset, 16, 8, **options)
    images, indices, *_ = zip(*batches.epoch(epoch))
    return torch.cat(images), np.concatenate(indices), batches


@pytest.mark.parametrize("preload", [None, "host", "device"])
def test_batches_do_not_depend_on_workers_processes_or_accumulation(pictures, preload):
    images, indices, batches = epoch_of(pictures, preload=preload)
    assert batches.steps_per_epoch == 2 and len(set(indices)) == 16 and images.shape == (16, 3, 16, 16)
    if preload is None:
        again, same, _ = epoch_of(pictures, workers=2)
        assert torch.equal(again, images) and np.array_equal(same, indices)
    again, same, _ = epoch_of(pictures, preload=preload, accumulate=4)
    assert torch.equal(again, images) and np.array_equal(same, indices)
    parts = [epoch_of(pictures, preload=preload, share=data.Share(rank, 2), accumulate=2) for rank in (0, 1)]
    assert not set(parts[0][1]) & set(parts[1][1])
    order = np.argsort(np.concatenate([part[1] for part in parts]))
    together = torch.cat([part[0] for part in parts])
    for step in (slice(0, 8), slice(8, 16)):  # every step sees the same pictures, whoever reads them
        assert set(parts[0][1][step.start // 2 : step.stop // 2]) < set(indices[step])
    assert torch.equal(together[order], images[np.argsort(indices)])


def test_epochs_and_seeds_differ_and_repeat(pictures):
    images, indices, batches = epoch_of(pictures)
    assert not np.array_equal(epoch_of(pictures, epoch=2)[1], indices)
    assert not np.array_equal(epoch_of(pictures, seed=1)[1], indices)
    assert torch.equal(torch.cat([batch.images for batch in batches.epoch(1)]), images)
    second = epoch_of(pictures, epoch=2)
    common = set(second[1]) & set(indices)
    i = next(iter(common))
    assert not torch.equal(second[0][list(second[1]).index(i)], images[list(indices).index(i)])


def test_preloaded_square_pictures_equal_decoding_anew():
    squares = dataset_of([image_bytes(picture(32, 32, seed=i)) for i in range(8)])
    anew, preloaded = epoch_of(squares)[0], epoch_of(squares, preload="device")[0]
    assert (anew.int() - preloaded.int()).abs().max() <= 2


def test_preloaded_pictures_of_other_shapes_keep_their_aspect(pictures):
    anew, preloaded = epoch_of(pictures)[0], epoch_of(pictures, preload="device")[0]
    assert (anew.int() - preloaded.int()).abs().float().mean() < 2  # stretched and back: smooth, nearly the same
    wrong = epoch_of(pictures, seed=1, preload="device")[0]
    assert (anew.int() - wrong.int()).abs().float().mean() > 10


def test_preloading_keeps_no_more_pixels_than_crops_can_use():
    large = dataset_of([image_bytes(picture(300, 200, seed=i)) for i in range(8)])
    batches = data.TrainBatches(large, 16, 8, preload="host")
    assert batches.crops.images.shape == (8, 3, 32, 32)
    assert batches.crops.sizes.tolist() == [[200, 300]] * 8


def test_what_does_not_divide_or_suffice_is_refused(pictures):
    for options, message in [
        (dict(accumulate=3), "multiple of processes x accumulation"),
        (dict(share=data.Share(0, 5)), "multiple of processes x accumulation"),
        (dict(preload="device"), "cannot be preloaded"),
    ]:
        source = pictures.to_iterable_dataset() if "preload" in options else pictures
        with pytest.raises(ValueError, match=message):
            data.TrainBatches(source, 16, 8, length=20, **options)
    with pytest.raises(ValueError, match="there are only 20"):
        data.TrainBatches(pictures, 16, 24)
    with pytest.raises(ValueError, match="--max-images"):
        data.TrainBatches(pictures.to_iterable_dataset(), 16, 8)


def test_a_stream_that_knows_its_length_need_not_be_told(photographs):
    stream = data.load_images(photographs("imagenette128"), "validation", streaming=True)
    assert data.TrainBatches(stream, 16, 8).length == 3925


# ------------------------------------------------------------------------------------------- bad pictures


def with_bad(count=20, bad=(3, 4, 11, 15)):
    blobs = [image_bytes(picture(seed=i)) for i in range(count)]
    kinds = [b"", b"this is text", blobs[0][:100], None]
    for number, i in enumerate(bad):
        blobs[i] = kinds[number % 4]
    return dataset_of(blobs)


@pytest.mark.parametrize("options", [{}, {"workers": 2}, {"preload": "device"}], ids=str)
def test_bad_pictures_are_skipped_counted_and_named(options):
    images, _, batches = epoch_of(with_bad(), max_bad=0.2, **options)
    for epoch in range(2, 5):
        list(batches.epoch(epoch))
    assert len(images) == 16
    assert sorted(batches.bad) == [3, 4, 11, 15]
    assert all("image 11" in batches.bad[i] for i in (11,))


@pytest.mark.parametrize("options", [{}, {"workers": 2}, {"preload": "device"}], ids=str)
def test_too_many_bad_pictures_stop_with_their_names(options):
    with pytest.raises(data.TooManyBadImages, match=r"(?s)of 20 images are broken.*image (3|4|11|15)"):
        for _ in range(5):
            epoch_of(with_bad(), max_bad=0.1, **options)
    with pytest.raises(data.TooManyBadImages):
        epoch_of(with_bad(20, range(20)), max_bad=0.5, **options)


def test_a_replaced_picture_is_the_next_good_one():
    image, _, bad = data.decode_or_next(with_bad(), 3, tries=10)
    assert np.array_equal(np.asarray(image), np.asarray(picture(seed=5)))
    assert [b.index for b in bad] == [3, 4]
    last = with_bad(20, (19,))
    assert np.array_equal(np.asarray(data.decode_or_next(last, 19, 10)[0]), np.asarray(picture(seed=0)))


# ------------------------------------------------------------------------------------------- streams


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("shards", [1, 4])
def test_streams_are_shared_out_without_overlap_and_go_on(workers, shards):
    blobs = [image_bytes(picture(seed=i)) for i in range(32)]
    names = {np.asarray(picture(seed=i)).tobytes(): i for i in range(32)}
    seen, keys = [], []
    for rank in (0, 1):
        stream = dataset_of(blobs).to_iterable_dataset(num_shards=shards)
        batches = data.TrainBatches(stream, 16, 8, length=32, workers=workers, share=data.Share(rank, 2))
        records = [data.decode(r["image"]) for r in itertools.islice(batches.crops._records(), 16)]
        seen.append({names[np.asarray(image).tobytes()] for image in records})
        assert batches.steps_per_epoch == 4
        for epoch in (1, 2, 3):  # three times as many as this process's share: the stream starts anew
            got = list(batches.epoch(epoch))
            assert [batch.images.shape for batch in got] == [(4, 3, 16, 16)] * 4
            keys += [i for batch in got for i in batch.indices]
    assert not seen[0] & seen[1] and len(seen[0] | seen[1]) == 32
    assert len(set(keys)) == len(keys)


def test_a_stream_skips_and_counts_bad_pictures():
    stream = with_bad().to_iterable_dataset()
    batches = data.TrainBatches(stream, 16, 8, length=20, max_bad=0.9)
    assert len(list(batches.epoch(1))) == 2 and 1 <= len(batches.bad) <= 4
    batches = data.TrainBatches(stream, 16, 8, length=20, max_bad=0.0)
    with pytest.raises(data.TooManyBadImages):
        for epoch in range(1, 4):
            list(batches.epoch(epoch))


def test_a_stream_of_nothing_but_bad_pictures_stops():
    batches = data.TrainBatches(with_bad(20, range(20)).to_iterable_dataset(), 16, 8, length=20, max_bad=0.5)
    with pytest.raises(data.TooManyBadImages):
        list(batches.epoch(1))


def test_a_stream_does_not_count_the_same_bad_picture_twice():
    batches = data.TrainBatches(with_bad(20, (3,)).to_iterable_dataset(), 16, 10, length=20, max_bad=0.1)
    for epoch in range(1, 7):
        assert len(list(batches.epoch(epoch))) == 2 and len(batches.bad) <= 2


# ------------------------------------------------------------------------------------------- demo data


@pytest.fixture(scope="module")
def shapes():
    return {split: data.load_shapes(split) for split in ("train", "test")}


def test_shapes_have_one_object_of_the_promised_size_with_mask_and_box(shapes):
    assert shapes["train"].num_rows == 4000 and shapes["test"].num_rows == 1000
    assert np.bincount(shapes["train"]["label"]).min() >= 333 and len(data.SHAPE_NAMES) >= 10
    centres = []
    for row in shapes["test"]:
        mask = np.asarray(row["mask"]) > 0
        assert row["image"].size == (64, 64) and 0.05 <= mask.mean() <= 0.5
        y, x = mask.nonzero()
        assert row["bbox"] == [x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1]
        centres.append([y.mean(), x.mean()])
    centres = np.array(centres)
    assert centres.min() < 16 and centres.max() > 48 and np.abs(centres.mean(0) - 31.5).max() < 2


def test_shapes_are_drawn_the_same_each_time(shapes):
    for row, again in zip(shapes["test"], data.draw_shapes("test", 3, 64)):
        assert np.array_equal(np.asarray(row["image"]), np.asarray(again["image"])) and row["label"] == again["label"]
    assert not np.array_equal(np.asarray(shapes["train"][0]["image"]), np.asarray(shapes["test"][0]["image"]))
    with pytest.raises(ValueError, match="Unknown split"):
        data.load_shapes("validation")


def test_easy_shapes_are_the_same_ones_upright_and_calm(shapes):
    contrast, widths = np.zeros(2), []
    for row, easy in zip(shapes["test"], data.load_images("shapes:easy", "test", max_images=120)):
        masks = [np.asarray(data.object_of(each["mask"])) > 0 for each in (row, easy)]
        pictures = [np.asarray(row["image"]), np.asarray(data.decode(easy["image"]))]
        ground = ~masks[0] & ~masks[1]
        contrast += [picture[ground].astype(float).std(0).sum() for picture in pictures]
        assert row["label"] == easy["label"]
        if data.SHAPE_NAMES[row["label"]] == "bar":
            widths.append(easy["bbox"][2] / easy["bbox"][3])
    assert contrast[1] < contrast[0] / 2 and min(widths) > 2.5 and len(widths) == 10


def test_sample_pictures_come_from_all_over_the_data_past_broken_ones():
    samples, objects = data.sample_pictures(with_bad(40, (0, 20)), 4, 16)
    assert objects is None
    expected = [data.center_crop(picture(seed=i), 16) for i in range(40)]
    found = [next(i for i in range(40) if torch.equal(expected[i], sample)) for sample in samples]
    assert len(samples) == 4 and found[0] < 10 and found[-1] == 39
    with pytest.raises(ValueError, match="decoded"):
        data.sample_pictures(with_bad(3, range(3)), 2, 16)


def test_a_shape_cannot_be_told_from_raw_pixels_or_mean_colour(shapes):
    from sklearn.linear_model import LogisticRegression, RidgeClassifier

    x = {split: np.stack([np.asarray(image) for image in shapes[split]["image"]]) / 255.0 for split in shapes}
    y = {split: np.array(shapes[split]["label"]) for split in shapes}
    colour = {split: x[split].mean((1, 2)) for split in x}
    brightness_and_colour = LogisticRegression(max_iter=500).fit(colour["train"], y["train"])
    assert brightness_and_colour.score(colour["test"], y["test"]) < 0.13  # 1 / 12 = 0.083 is chance
    flat = {split: x[split].reshape(len(x[split]), -1) for split in x}
    probe = RidgeClassifier(alpha=1e4).fit(flat["train"], y["train"])
    assert probe.score(flat["test"], y["test"]) < 0.17
