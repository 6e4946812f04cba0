"""Folders of pictures as people have them."""

import io
import operator
import os
import tarfile

import datasets
import numpy as np
import pytest
from helpers import image_bytes, picture

import data
import folders


def write(root, names, **options):
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture(seed=i).save(root / name, **options)


def labels(dataset) -> list[str]:
    return [dataset.features["label"].int2str(label) for label in dataset["label"]]


def test_a_class_folder_that_is_a_symbolic_link_is_a_class(tmp_path):
    write(tmp_path, ["photos/cat/1.png", "photos/dog/1.png", "store/lynx/1.png", "store/lynx/2.png"])
    os.symlink("../store/lynx", tmp_path / "photos" / "lynx")
    os.symlink("..", tmp_path / "photos" / "cat" / "round")  # in a circle
    loaded = data.load_images(str(tmp_path / "photos"))
    assert labels(loaded) == ["cat", "dog", "lynx", "lynx"]
    assert all(data.decode(record).size == (40, 30) for record in loaded["image"])


@pytest.mark.parametrize("metadata", [False, True])
def test_a_stream_of_a_folder_is_not_sorted_by_class(metadata, tmp_path):
    names = [f"{kind}/{i}.png" for kind in ("cat", "dog", "lynx") for i in range(100)]
    write(tmp_path, names)
    if metadata:
        rows = [f"{name},{number}" for number, name in enumerate(names)]
        (tmp_path / "metadata.csv").write_text("\n".join(["file_name,number", *rows]))
    stream, loaded = (list(data.load_images(str(tmp_path), streaming=streaming)) for streaming in (True, False))
    key = operator.itemgetter("path")
    assert sorted((r["image"] | r for r in stream), key=key) == sorted((r["image"] | r for r in loaded), key=key)
    kinds = [record["label"] for record in stream]
    assert all(len(set(kinds[i : i + 10])) > 1 for i in range(0, 300, 10))
    assert data.load_images(str(tmp_path), streaming=True).num_shards == 256


def test_results_of_our_own_and_hidden_files_are_no_pictures_and_what_is_left_out_is_said(tmp_path, capsys):
    write(tmp_path, ["cat/1.png", "dog/1.png", "dog/.2.png", ".cache/3.png", "run/masks.png", "run/best/x.png"])
    (tmp_path / "run" / "metrics.jsonl").write_text("{}")
    (tmp_path / "cat" / "Thumbs.db").write_bytes(b"")
    (tmp_path / "notes.TXT").write_text("")
    (tmp_path / "old.tar").write_text("")
    assert labels(data.load_images(str(tmp_path))) == ["cat", "dog"]
    said = capsys.readouterr().err
    assert f"{tmp_path}: 2 pictures; left out: 1 .tar, 1 .txt, 3 hidden, 2 results of smae" in said
    data.load_images(str(tmp_path))
    assert not capsys.readouterr().err  # once is enough
    (tmp_path / "metrics.jsonl").write_text("{}")
    write(tmp_path, ["loss.png"])
    assert labels(data.load_images(str(tmp_path))) == ["cat", "dog"]
    write(tmp_path, ["mine.png"])
    assert len(data.load_images(str(tmp_path))) == 3


@pytest.mark.parametrize("suffix", ["pgm", "jfif", "jp2", "tga", "pbm", "PNG", "tif"])
def test_whatever_pillow_decodes_is_a_picture(suffix, tmp_path):
    mode = {"pgm": "L", "pbm": "1"}.get(suffix, "RGB")
    kind = {"jfif": "JPEG", "jp2": "JPEG2000", "pgm": "PPM", "pbm": "PPM", "tif": "TIFF"}.get(suffix)
    for i in range(3):
        picture(seed=i).convert(mode).save(tmp_path / f"{i}.{suffix}", kind)
    loaded = data.load_images(str(tmp_path))
    assert len(loaded) == 3 and all(data.decode(record).size == (40, 30) for record in loaded["image"])


def test_a_name_that_is_not_utf_8_is_a_name(tmp_path):
    write(tmp_path, ["good.png"])
    os.rename(tmp_path / "good.png", os.path.join(os.fsencode(tmp_path), b"caf\xe9.png"))
    (record,) = data.load_images(str(tmp_path))["image"]
    assert data.decode(record).size == (40, 30) and record["path"].endswith("caf\N{REPLACEMENT CHARACTER}.png")


@pytest.mark.parametrize(
    "names, split, expected",
    [
        (["Train/a/1.png", "Testing/a/1.png"], "train", 1),
        (["training/1.png", "training/2.png", "val2017/1.png"], "train", 2),
        (["training/1.png", "training/2.png", "val2017/1.png"], "validation", 1),
        (["train2014/1.png", "train2017/1.png", "val2017/1.png"], "train2017", 1),
        (["train2014/1.png", "train2017/1.png", "val2017/1.png"], "train", "name one of train2014, train2017"),
        (["Testing/1.png", "val2017/1.png"], "train", "there are Testing, val2017, name one with --split"),
        (["cat/1.png", "dog/1.png", "test/1.png"], "train", 3),  # a class, as far as anyone can tell
        (["train/1.png", "val/1.png"], "test", "Unknown split 'test'"),
        (["train_images/1.png", "test_images/1.png"], "train", 1),
        (["training_set/a/1.png", "test_set/a/1.png", "test_set/b/1.png"], "test", 2),
        (["train_256/1.png", "eval/1.png"], "train", 1),
        (["images/train/1.png", "images/val/1.png", "annotations/train/1.png", "annotations/val/1.png"], "train", 1),
        (["data/images/train/1.png", "data/images/val/1.png"], "validation", 1),
        (["photos/cat/1.png", "photos/train/1.png"], "train", 2),  # two classes
    ],
)
def test_folders_named_like_splits_are_splits(names, split, expected, tmp_path):
    write(tmp_path, names)
    if isinstance(expected, int):
        assert len(data.load_images(str(tmp_path), split)) == expected
    else:
        with pytest.raises(ValueError, match=expected):
            data.load_images(str(tmp_path), split)


def test_that_a_folder_called_train_is_read_with_its_neighbours_is_said(tmp_path, capsys):
    write(tmp_path, ["train/1.png", "unlabeled/1.png"])
    assert len(data.load_images(str(tmp_path))) == 2
    assert "all its folders are read, train, unlabeled: name one with --split" in capsys.readouterr().err


def test_pictures_at_different_depths_have_no_labels_which_is_said(tmp_path, capsys):
    write(tmp_path, ["cat/1.png", "dog/1.png", "cover.png"])
    assert "label" not in data.load_images(str(tmp_path)).features
    assert (
        "no labels: the pictures lie at different depths, for example cover.png and cat/1.png"
        in capsys.readouterr().err
    )


def test_thumbnails_are_left_out(tmp_path, capsys):
    write(tmp_path, ["cat/1.png", "cat/1_thumb.png", "cat/thumbs/1.png", "Thumbnails/9.png", "dog/thumb-2.png"])
    loaded = data.load_images(str(tmp_path))
    assert labels(loaded) == ["cat", "dog"]  # thumb-2 has no picture beside it
    assert "3 thumbnails" in capsys.readouterr().err


def test_metadata_without_labels_leaves_those_of_the_folders_and_says_what_does_not_match(tmp_path, capsys):
    write(tmp_path, ["cat/1.png", "dog/1.png", "dog/2.png"])
    rows = ["cat/1.png,a", "dog/1.png,b", "dog/1.png,c", "Dog/3.png,d"]
    (tmp_path / "metadata.csv").write_text("\n".join(["file_name,caption", *rows]))
    loaded = data.load_images(str(tmp_path))
    assert labels(loaded) == ["cat", "dog"] and loaded["caption"][:] == ["a", "c"]
    said = capsys.readouterr().err
    for what in ("that do not exist: 1, for example", "more than once, the last row counts: 1", "are left out: 1"):
        assert what in said


def test_a_label_that_metadata_lacks_for_one_picture_is_not_that_of_its_folder(tmp_path):
    write(tmp_path, ["cat/1.png", "dog/1.png"])
    lines = ['{"file_name": "cat/1.png"}', '{"file_name": "dog/1.png", "label": "wolf"}']
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    assert data.load_images(str(tmp_path), label_column="label")["label"][:] == [None, "wolf"]


def test_tables_beside_as_many_pictures_are_read_and_the_pictures_counted(tmp_path, capsys):
    write(tmp_path, ["cover.png"])
    table = {"image": [dict(bytes=image_bytes(picture()), path=None)] * 3}
    features = datasets.Features(image=datasets.Image(decode=False))
    datasets.Dataset.from_dict(table, features).to_parquet(tmp_path / "train.parquet")
    assert len(data.load_images(str(tmp_path))) == 3
    assert "read 1 tables; left out: 1 pictures" in capsys.readouterr().err


def test_a_test_set_may_lack_classes(tmp_path):
    write(tmp_path, ["train/cat/1.png", "train/dog/1.png", "val/dog/2.png"])
    assert labels(data.load_test_images(str(tmp_path), None)) == ["dog"]


def test_labels_are_those_of_the_level_that_tells_pictures_apart(tmp_path):
    write(tmp_path, ["n01/images/1.png", "n02/images/2.png"])
    assert labels(data.load_images(str(tmp_path))) == ["n01", "n02"]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_metadata_above_or_beside_the_pictures_label_them(kind, tmp_path):
    write(tmp_path, ["train/1.png", "train/2.png", "train/unnamed.png", "val/1.png", "masks/1.png"])
    rows = [dict(file_name=f"{name}.png", label=label, mask_file_name="masks/1.png")
            for name, label in (("train/1", "a"), ("train/2", "b"), ("val/1", "b"))]  # fmt: skip
    table = datasets.Dataset.from_list(rows)
    write_table = dict(csv=table.to_csv, jsonl=table.to_json, parquet=table.to_parquet)[kind]
    write_table(tmp_path / f"metadata.{kind}")
    loaded = data.load_images(str(tmp_path))
    assert loaded["label"][:] == ["a", "b"] and isinstance(loaded.features["mask"], datasets.Image)
    assert data.load_test_images(str(tmp_path), None)["label"][:] == ["b"]
    os.rename(tmp_path / f"metadata.{kind}", tmp_path / "train" / f"metadata.{kind}")
    with pytest.raises(ValueError, match="names none of the pictures"):
        data.load_images(str(tmp_path))


def test_brackets_in_names_are_no_patterns(tmp_path):
    for folder, seed in (("[DATA] v?", 1), ("D v1", 2), ("A v2", 3)):  # the others would match
        (tmp_path / folder).mkdir()
        table = {"image": [dict(bytes=image_bytes(picture(seed=seed)), path=None)]}
        features = datasets.Features(image=datasets.Image(decode=False))
        dataset = datasets.Dataset.from_dict(table, features)
        dataset.to_parquet(tmp_path / folder / "train-0.parquet")
        dataset.to_parquet(tmp_path / folder / "val-0.parquet")
        dataset.to_parquet(tmp_path / f"{folder}.parquet")
    expected = np.asarray(picture(seed=1))
    for name in ("[DATA] v?", "[DATA] v?.parquet"):
        (record,) = data.load_images(str(tmp_path / name))["image"]
        assert np.array_equal(np.asarray(data.decode(record)), expected)
    assert len(data.load_test_images(str(tmp_path / "[DATA] v?"), None)) == 1
    with pytest.raises(ValueError, match="Unknown split 'test': expected one of"):
        data.load_images(str(tmp_path / "[DATA] v?"), "test")


def test_a_failed_download_called_tar_is_named(tmp_path):
    (tmp_path / "shard-000.tar").write_bytes(b"<html>404</html>" * 100)
    with pytest.raises(ValueError, match=r"shard-000.tar is not a tar archive: perhaps its download failed"):
        data.load_images(str(tmp_path))
    with tarfile.open(tmp_path / "shard-001.tar", "w") as tar:
        blob = image_bytes(picture(), "JPEG")
        info = tarfile.TarInfo("1.jpg")
        info.size = len(blob)
        tar.addfile(info, io.BytesIO(blob))
    assert len(data.load_images(str(tmp_path))) == 1


@pytest.mark.parametrize("column", ["image", "file_name"])
@pytest.mark.parametrize("streaming", [False, True])
def test_the_names_of_pictures_in_a_text_table_are_found(column, streaming, tmp_path):
    write(tmp_path, ["a/1.png", "a/2.png"])
    (tmp_path / "list.csv").write_text(f"{column},label\na/1.png,0\na/2.png,1\n")
    records = list(data.load_images(str(tmp_path / "list.csv"), label_column="label", streaming=streaming))
    assert [record["label"] for record in records] == [0, 1]
    assert all(data.decode(record["image"]).size == (40, 30) for record in records)


def test_what_other_commands_have_drawn_is_no_picture_either(tmp_path):
    drawn = "detect/predictions.png", "found/predictions.png", "found/overlays/1.png", "seen/layers-ours.png"
    write(tmp_path, ["cat/1.png", "mine/1.png", *drawn])
    for folder in ("detect", "found", "seen", "mine"):
        (tmp_path / folder / "result.json").write_text("{}")
    assert sorted(labels(data.load_images(str(tmp_path)))) == ["cat", "mine"]


def test_addresses_in_a_text_table_stay_as_they_are(tmp_path):
    write(tmp_path, ["a/1.png"])
    (tmp_path / "list.csv").write_text("file_name\na/1.png\nhttps://example.org/2.png\n")
    paths = [record["image"]["path"] for record in data.load_images(str(tmp_path / "list.csv"))]
    assert paths == [str(tmp_path / "a/1.png"), "https://example.org/2.png"]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_text_table_may_name_pictures(kind, tmp_path):
    write(tmp_path, ["a/1.png", "a/2.png"])
    rows = datasets.Dataset.from_list([dict(photo=f"a/{i}.png", label=i) for i in (1, 2)])
    (rows.to_csv if kind == "csv" else rows.to_json)(tmp_path / f"list.{kind}")
    loaded = data.load_images(str(tmp_path / f"list.{kind}"), image_column="photo")
    assert loaded["label"][:] == [1, 2] and data.decode(loaded[1]["image"]).size == (40, 30)


def test_files_that_are_no_data_sets_get_advice(tmp_path):
    write(tmp_path, ["one.png"])
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ValueError, match="single picture: name the folder"):
        data.load_images(str(tmp_path / "one.png"))
    with pytest.raises(ValueError, match=r"cannot be read: expected \.parquet"):
        data.load_images(str(tmp_path / "notes.txt"))
    with pytest.raises((ValueError, FileNotFoundError), match="~nobody/photos"):
        data.load_images("~nobody/photos")


def test_files_are_listed_in_order_and_links_are_followed(tmp_path):
    write(tmp_path, ["b/2.png", "a/1.png", "b/1.png"])
    os.symlink("b", tmp_path / "c")
    assert folders.list_files(tmp_path).images == ["a/1.png", "b/1.png", "b/2.png", "c/1.png", "c/2.png"]


def test_a_class_folder_with_a_file_called_like_ours_is_no_run(tmp_path):
    write(tmp_path, ["a/1.png", "b/1.png", "run/masks.png", "run/masks-amt.png"])
    for folder in ("a", "run"):
        (tmp_path / folder / "results.json").write_text("{}")
    assert folders.list_files(tmp_path).images == ["a/1.png", "b/1.png"]


def test_a_file_called_like_ours_beside_class_folders_hides_none_of_them(tmp_path):
    write(tmp_path, ["photos/a/1.png", "photos/b/1.png", "other/c/1.png", "run/masks.png", "run/checkpoint-1/2.png"])
    for folder in ("photos", "run"):
        (tmp_path / folder / "results.json").write_text("{}")
    assert folders.list_files(tmp_path).images == ["other/c/1.png", "photos/a/1.png", "photos/b/1.png"]


def test_a_stream_of_tables_is_tested_on_the_split_it_has(tmp_path):
    for split in ("train", "test"):
        table = dict(image=[picture(seed=i) for i in range(3)], label=[0, 1, 0])
        datasets.Dataset.from_dict(table).cast_column("image", datasets.Image()).to_parquet(
            tmp_path / f"{split}.parquet"
        )
    stream = data.load_test_images(str(tmp_path), None, None, None, True)
    assert len(list(stream)) == 3


def test_tables_with_capital_suffixes_are_read_from_a_folder_with_brackets(tmp_path):
    folder = tmp_path / "[2024]"
    folder.mkdir()
    table = datasets.Dataset.from_dict(dict(image=[picture()])).cast_column("image", datasets.Image())
    table.to_parquet(folder / "train.PARQUET")
    assert len(data.load_images(str(folder))) == 1


def test_a_caption_may_hold_what_python_takes_for_the_end_of_a_line(tmp_path):
    write(tmp_path, ["1.png"])
    row = '\ufeff{"file_name": "1.png", "caption": "two\u2028lines"}\n'  # with the mark that Windows writes
    (tmp_path / "metadata.jsonl").write_text(row, encoding="utf-8")
    assert data.load_images(str(tmp_path))[0]["caption"] == "two\u2028lines"


@pytest.mark.parametrize("above", ["", "train/", "photos/", "pets/a/"])
def test_masks_beside_the_pictures_are_no_pictures(above, tmp_path, capsys):
    """They were, and the two folders became classes."""
    write(
        tmp_path, [f"{above}{name}" for name in ("Images/a/1.jpg", "Images/a/2.jpg", "masks/a/1.png", "masks/a/1.bmp")]
    )
    loaded = data.load_images(str(tmp_path))
    assert len(loaded) == 2 and "label" not in loaded.features
    assert "2 pictures; left out: 2 masks" in capsys.readouterr().err
    write(tmp_path, [f"{above}masks/b/3.png"])  # the mask of no picture
    assert len(data.load_images(str(tmp_path))) == 3
    write(tmp_path, [f"{above}{name}/a/1.png" for name in ("drawings", "photos")])  # so these are classes
    assert len(data.load_images(str(tmp_path))) == 7


def test_masks_that_metadata_names_are_pictures(tmp_path):
    names = ["images/1.png", "images/2.png", "masks/1.png", "masks/2.png"]
    write(tmp_path, names)
    (tmp_path / "metadata.csv").write_text("\n".join(["file_name,label", *(f"{name},{name[:4]}" for name in names)]))
    assert data.load_images(str(tmp_path))["label"][:] == ["imag", "imag", "mask", "mask"]
    (tmp_path / "metadata.csv").write_text("file_name,mask_file_name\nimages/1.png,masks/1.png\n")
    loaded = data.load_images(str(tmp_path))
    assert len(loaded) == 1 and set(loaded.features) == {"image", "mask"}


def test_a_test_split_of_pictures_beside_masks_has_no_classes(tmp_path):
    write(tmp_path, [f"{split}/{name}/1.png" for split in ("train", "test") for name in ("images", "masks")])
    assert "label" not in data.load_images(str(tmp_path), "test").features


def test_predictions_among_the_pictures_are_no_pictures(tmp_path):
    write(tmp_path, ["1.png", "overlays/0.png", "label_maps/0.png", "reconstructions/0.png"])
    assert len(data.load_images(str(tmp_path))) == 4  # folders of anyone's
    (tmp_path / "result.json").write_text("{}")
    assert len(data.load_images(str(tmp_path))) == 1


def test_metadata_may_lack_a_mask_and_must_hold_objects(tmp_path):
    write(tmp_path, ["1.png", "2.png", "masks/1.png"])
    rows = ['{"file_name": "1.png", "mask_file_name": "masks/1.png"}', '{"file_name": "2.png", "mask_file_name": null}']
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    loaded = data.load_images(str(tmp_path))
    assert len(loaded) == 2 and loaded[1]["mask"] is None
    (tmp_path / "metadata.csv").write_text("file_name,mask_file_name\n1.png,masks/1.png\n2.png,\n")
    (tmp_path / "metadata.jsonl").unlink()
    assert data.load_images(str(tmp_path))[1]["mask"] is None
    (tmp_path / "metadata.jsonl").write_text("[1]")
    with pytest.raises(ValueError, match="has no column file_name"):
        data.load_images(str(tmp_path))
