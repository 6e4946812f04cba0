import io
import itertools
import json
import struct
import tarfile
import zipfile
import zlib

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import torch
from helpers import dataset_of, image_bytes, picture, with_bad
from PIL import Image

import data
from objects import ObjectMasks, object_mask, sample_pictures

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
    if column:  # in order, but for streams of what has another order
        number = {picture(seed=i).tobytes(): i for i in range(6)}
        found = [number[data.decode(record["image"]).tobytes()] for record in records]
        assert found == list(range(5)) or (streaming and "saved" in kind and len(set(found)) == 5)
        assert [record["label"] for record in records] == [i % 2 for i in found]


@pytest.mark.parametrize("kind", ["zip", "arrow", "json"])
def test_other_single_files_of_pictures_are_read(kind, tmp_path):
    names, file = ["a/1.png", "b/2.png"], tmp_path / f"some.{kind}"
    write_folder(tmp_path, names)
    if kind == "zip":
        with zipfile.ZipFile(file, "w") as archive:
            for name in names:
                archive.write(tmp_path / name, name)
    elif kind == "arrow":
        dataset_of([(tmp_path / name).read_bytes() for name in names]).save_to_disk(tmp_path / "saved")
        next((tmp_path / "saved").glob("*.arrow")).rename(file)
    else:
        file.write_text(json.dumps([dict(image=name) for name in names]))
    found = [np.asarray(data.decode(record)) for record in data.load_images(str(file))["image"]]
    assert len(found) == 2 and all(np.array_equal(x, np.asarray(picture(seed=i))) for i, x in enumerate(found))


def test_a_configuration_of_a_data_set_on_the_hub_is_named_after_a_colon(monkeypatch):
    asked = []
    found = dataset_of([image_bytes(picture())])
    monkeypatch.setattr(datasets, "load_dataset", lambda *given, **how: asked.append((given, how)) or found)
    assert len(data.load_images("user/photos:small", "validation")) == 1
    assert asked == [(("user/photos", "small"), dict(split="validation", streaming=False))]


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


def test_errors_of_loading_say_what_is_wrong_and_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither here nor on the Hugging Face hub"):
        data.load_images(str(tmp_path / "missing"))
    with pytest.raises(FileNotFoundError, match=r"cannot load .*neither images nor parquet"):
        data.load_images(str(tmp_path))
    two = datasets.Dataset.from_dict(
        {"left": [picture()], "right": [picture()], "n": [1]},
        datasets.Features(left=datasets.Image(), right=datasets.Image(), n=datasets.Value("int64")),
    )
    two.save_to_disk(tmp_path / "two")
    with pytest.raises(ValueError, match=r"has 2 image columns.*--image-column: left, right, n"):
        data.load_images(str(tmp_path / "two"))
    with pytest.raises(ValueError, match="no column 'middle'"):
        data.load_images(str(tmp_path / "two"), image_column="middle")
    with pytest.raises(ValueError, match=r"'n' of .* holds .*, not images"):
        data.load_images(str(tmp_path / "two"), image_column="n")
    with pytest.raises(ValueError, match="no column 'y'"):
        data.load_images(str(tmp_path / "two"), image_column="left", label_column="y")
    with pytest.raises(ValueError, match="must be positive"):
        data.load_images(str(tmp_path / "two"), image_column="left", max_images=0)
    with pytest.raises(ValueError, match="not images"):
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


# ------------------------------------------------------------------------------------------- data sets by name


@pytest.fixture
def class_folders(tmp_path):
    """6 training and 4 validation pictures of two classes."""
    for split, count in (("train", 3), ("val", 2)):
        write_folder(tmp_path, [f"classes/{split}/{name}/{i}.png" for name in "ab" for i in range(count)])
    return tmp_path / "classes"


def test_every_known_data_set_has_a_hub_name_or_a_hint_and_a_test_split():
    for name, source in data.DATASETS.items():
        assert source.hub.count("/") == 1 if source.hub else "--dataset" in source.hint
        assert source.test in ("validation", "val", "test"), name


def test_a_folder_goes_before_a_known_data_set_of_its_name(monkeypatch, class_folders, tmp_path):
    class_folders.rename(tmp_path / "cifar10")
    monkeypatch.chdir(tmp_path)
    assert len(data.load_images("cifar10")) == 6 and len(data.load_test_images("cifar10", None)) == 4


def test_a_failed_download_comes_with_advice(monkeypatch):
    def gated(*args, **options):
        raise datasets.exceptions.DatasetNotFoundError("Dataset is gated")

    monkeypatch.setattr(datasets, "load_dataset", gated)
    with pytest.raises(FileNotFoundError, match=r"ILSVRC/imagenet-1k.*accept its terms.*hf auth login.*gated"):
        data.load_images("imagenet-1k")
    with pytest.raises(FileNotFoundError, match=r"not on the hub.*inat_comp.*--dataset"):
        data.load_images("inat2019")
    with pytest.raises(FileNotFoundError, match="neither here nor on the Hugging Face hub"):
        data.load_images("someone/something")


def test_training_data_are_never_taken_for_test_data(class_folders, tmp_path):
    dataset = data.load_images(str(class_folders))
    dataset.to_parquet(tmp_path / "pictures.parquet")
    dataset.save_to_disk(tmp_path / "saved")
    for path in (tmp_path / "pictures.parquet", tmp_path / "saved", class_folders / "train"):
        assert len(data.load_images(str(path))) == 6
        with pytest.raises(ValueError, match="no split validation, val or test"):
            data.load_test_images(str(path), None)
        with pytest.raises(ValueError, match="Unknown split 'val'"):
            data.load_test_images(str(path), "val")
    with pytest.raises(ValueError, match="--image-column"):  # the search for a split does not hide it
        data.load_test_images(str(class_folders), None, "nonsense")


def test_fingerprints_tell_data_sets_apart_and_bear_broken_pictures():
    dataset = with_bad(40, (0,))
    found = data.fingerprint(dataset)
    assert len(found) == len(set(found)) == 16
    assert data.fingerprint(dataset.select([0, 39])) == [found[0], found[-1]]
    assert data.fingerprint(dataset.to_iterable_dataset(), 2) == data.fingerprint(dataset.select([0, 1]))
    gone = dict(image=[dict(bytes=None, path="/nowhere.png")])
    gone = datasets.Dataset.from_dict(gone, datasets.Features(image=datasets.Image(decode=False)))
    assert data.fingerprint(gone) == [""]
    arrays = [datasets.Dataset.from_dict(dict(image=np.full((2, 4, 4, 3), value, np.uint8))) for value in (1, 2)]
    one, other = (data.fingerprint(each) for each in arrays)
    assert len(one[0]) == 16 and one[0] == one[1] != other[0]


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


def test_transparent_parts_become_white_not_the_colour_beneath():
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


def test_centre_crops_resize_the_short_side_and_cut_out_the_centre():
    image = picture(80, 40)
    expected = image.resize((64, 32), Image.Resampling.BICUBIC).crop((20, 4, 44, 28))
    result = data.center_crop(image, 24, 0.75)
    assert np.abs(result.permute(1, 2, 0).numpy().astype(int) - np.asarray(expected)).max() <= 1
    assert data.center_crop(image, 24).shape == (3, 24, 24)


def test_normalisation_can_be_undone():
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    assert torch.equal(data.denormalize(data.normalize(images)), images)
    grey = data.normalize(torch.full((1, 3, 1, 1), 128, dtype=torch.uint8)).flatten()
    expected = (128 / 255 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(grey, expected)


# ------------------------------------------------------------------------------------------- broken pictures


def test_a_broken_picture_is_replaced_by_the_next_good_one():
    image, _, bad = data.decode_or_next(with_bad(), 3, tries=10)
    assert np.array_equal(np.asarray(image), np.asarray(picture(seed=5)))
    assert [b.index for b in bad] == [3, 4]
    last = with_bad(20, (19,))
    assert np.array_equal(np.asarray(data.decode_or_next(last, 19, 10)[0]), np.asarray(picture(seed=0)))
    blank, _, bad = data.decode_or_next(with_bad(20, range(20)), 7, tries=5)
    assert blank.size == (1, 1) and [b.index for b in bad] == [7, 8, 9, 10, 11]


def test_records_that_cannot_be_read_are_replaced_too():
    class Failing(datasets.Dataset):
        def __getitem__(self, key):
            if key in (3, 4):
                raise OSError("read error")
            return super().__getitem__(key)

    dataset = dataset_of([image_bytes(picture(seed=i)) for i in range(8)])
    dataset.__class__ = Failing
    image, _, bad = data.decode_or_next(dataset, 3, tries=5)
    assert [what.description for what in bad] == ["image 3: OSError: read error", "image 4: OSError: read error"]
    assert np.array_equal(np.asarray(image), np.asarray(picture(seed=5)))


def test_broken_pictures_are_reported_once_and_counted_by_index_or_by_file():
    by_index, by_file = data.BadImages(100, 0.02), data.BadImages(100, 0.02, same_file_returns=True)
    for bad in (by_index, by_file):
        bad.add([data.BadImage(3, "a.png: broken"), data.BadImage(50, "b.png: broken")])
        assert bad.unreported == 2
        assert bad.take_unreported() == ["a.png: broken", "b.png: broken"] and not bad.unreported
        bad.check()
        bad.add([data.BadImage(3, "a.png: broken"), data.BadImage(70, "a.png: broken")])  # a file met again
        assert bad.take_unreported() == []
    by_file.check()
    assert by_file.count == 2 and by_index.count == 3
    with pytest.raises(data.TooManyBadImages, match=r"3 of 100 images .*--max-bad-images 0.02:\n  a.png: broken\n"):
        by_index.check()


def test_broken_pictures_of_a_checkpoint_count_and_are_not_reported_again():
    bad, again = data.BadImages(100, 0.02), data.BadImages(100, 0.02)
    bad.add([data.BadImage(3, "a.png: broken")])
    again.load_state_dict(bad.state_dict())
    again.add([data.BadImage(3, "a.png: broken"), data.BadImage(4, "b.png: broken")])
    assert again.count == 2 and again.take_unreported() == ["b.png: broken"]
    again.clear()
    assert again.count == again.unreported == 0


# ------------------------------------------------------------------------------------------- object masks, samples


def test_the_object_of_a_mask_is_bright_or_else_not_zero():
    grey = np.array([[0, 1, 2], [127, 128, 255]], np.uint8)
    assert np.asarray(object_mask(Image.fromarray(grey))).tolist() == [[0, 0, 0], [0, 255, 255]]
    classes = np.array([[0, 1, 2]], np.uint8)
    record = dict(bytes=image_bytes(Image.fromarray(classes)), path=None)
    assert np.asarray(object_mask(record)).tolist() == [[0, 255, 255]]
    assert np.asarray(object_mask(Image.new("RGB", (1, 1), "white"))).tolist() == [[255]]


def test_coverage_is_the_share_of_the_object_in_each_cell():
    mask = np.zeros((8, 8), np.uint8)
    mask[:4, :2] = 255
    blobs = [image_bytes(Image.fromarray(mask)), b"broken", image_bytes(Image.fromarray(255 - mask))]
    dataset = dataset_of(blobs).cast_column("image", datasets.Image())
    masks = ObjectMasks(dataset, "image")
    half = torch.tensor([[0.5, 0], [0, 0]])
    expected = torch.stack([1 - half, torch.zeros(2, 2), half])
    found = masks.coverage(np.array([2, 1, 0]), (2, 2))
    torch.testing.assert_close(found, expected, rtol=0, atol=0.01)
    assert masks.missing == [1]
    with pytest.raises(ValueError, match="no column 'truth' of mask pictures, only image"):
        ObjectMasks(dataset, "truth")
    with pytest.raises(ValueError, match="--streaming"):
        ObjectMasks(dataset.to_iterable_dataset(), "image")


def test_sample_pictures_come_from_all_over_the_data_past_broken_ones():
    samples, objects = sample_pictures(with_bad(40, (0, 20)), 4, 16)
    assert objects is None
    expected = [data.center_crop(picture(seed=i), 16) for i in range(40)]
    found = [next(i for i in range(40) if torch.equal(expected[i], sample)) for sample in samples]
    assert len(samples) == 4 and found[0] < 10 and found[-1] == 39
    with pytest.raises(ValueError, match="none of the pictures sampled"):
        sample_pictures(with_bad(3, range(3)), 2, 16)


@pytest.mark.parametrize("streaming", [False, True])
def test_sample_pictures_come_with_their_objects(streaming):
    shapes = data.load_images("shapes", "test", streaming=streaming, max_images=10)
    images, objects = sample_pictures(shapes, 5, 64)
    assert images.shape == (5, 3, 64, 64) and objects.shape == (5, 64, 64) and objects.dtype == torch.bool
    first = next(iter(shapes))
    assert torch.equal(objects[0], torch.from_numpy(np.array(object_mask(first["mask"]))) > 0)


# ------------------------------------------------------------------------------------------- odd but sound


def test_damaged_exif_does_not_cost_a_picture():
    expected = np.asarray(picture())
    raw = image_bytes(picture())
    body = b"eXIf" + b"Exif\x00\x00garbage"
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    for encoded in (
        raw[:33] + chunk + raw[33:],
        image_bytes(picture(), "WEBP", lossless=True, exif=b"Exif\0\0II*\0\x08\0"),
    ):
        assert np.array_equal(np.asarray(data.decode(dict(bytes=encoded, path=None))), expected)


def test_missing_values_of_a_float_picture_are_black_and_the_others_keep_their_levels():
    values = np.asarray(picture().convert("L"), np.float32) / 255
    holes = values.copy()
    holes[:2, :2] = np.nan
    decoded = np.asarray(data.decode(dict(bytes=image_bytes(Image.fromarray(holes), "TIFF"), path=None)))[..., 0]
    assert (decoded[:2, :2] == 0).all() and len(np.unique(decoded)) > 50
    assert np.array_equal(decoded[2:], np.asarray(data.to_rgb(Image.fromarray(values)))[2:, :, 0])


def test_a_null_picture_says_so():
    for record in (None, dict(bytes=None, path=None)):
        with pytest.raises(ValueError, match="there is no picture"):
            data.decode(record)


def test_a_struct_of_bytes_and_path_holds_pictures(tmp_path):
    blobs = [image_bytes(picture(seed=i)) for i in range(3)]
    for name, image in (
        ("both", [dict(bytes=b, path="x.png") for b in blobs]),
        ("bytes", [dict(bytes=b) for b in blobs]),
    ):
        pyarrow.parquet.write_table(pyarrow.table({"image": image, "label": [0, 1, 0]}), tmp_path / f"{name}.parquet")
        loaded = data.load_images(str(tmp_path / f"{name}.parquet"))
        assert np.array_equal(np.asarray(data.decode(loaded[2]["image"])), np.asarray(picture(seed=2)))


def test_bytes_in_a_column_called_image_are_pictures_and_structs_beside_it_masks(tmp_path):
    blobs = [image_bytes(picture(seed=i)) for i in range(3)]
    masks = [dict(bytes=blob, path=None) for blob in blobs]
    pyarrow.parquet.write_table(
        pyarrow.table({"image": blobs, "mask": masks, "text": ["x"] * 3}), tmp_path / "x.parquet"
    )
    loaded = data.load_images(str(tmp_path / "x.parquet"))
    assert data.decode(loaded[1]["image"]).size == (40, 30) and isinstance(loaded.features["mask"], datasets.Image)


def test_an_error_of_datasets_comes_with_its_cause(monkeypatch, tmp_path):
    def fails(*_, **__):
        try:
            raise OSError("[Errno 28] No space left on device: '/cache/x.arrow'")
        except OSError as cause:
            raise datasets.exceptions.DatasetGenerationError(
                "An error occurred while generating the dataset"
            ) from cause

    monkeypatch.setattr(datasets, "load_dataset", fails)
    (tmp_path / "x.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match=r"while generating the dataset \(.*No space left on device: '/cache/x.arrow'"):
        data.load_images(str(tmp_path / "x.parquet"))


def test_the_same_split_is_known_by_any_of_its_names_and_by_what_it_holds():
    def split(name: str, *paths: str):
        features = datasets.Features(image=datasets.Image(decode=False))
        columns = dict(image=[dict(bytes=None if "://" in path else path.encode(), path=path) for path in paths])
        return datasets.Dataset.from_dict(columns, features, split=name)

    assert data.are_same(split("val", "a", "b"), split("validation", "a", "b"))
    assert not data.are_same(split("train", "a", "b"), split("test", "a", "b"))
    assert not data.are_same(split("train", "a", "b"), split("train", "c", "d"))
    assert not data.are_same(split("train", "zip://a"), split("train", "zip://b"))  # nobody knows
