"""Label maps: which values are which class, layouts of folders, what is refused."""

import datasets
import numpy as np
import pytest
from helpers import picture
from PIL import Image

from label_maps import COLOUR, IGNORED, Labels, load_label_maps, map_values, read_classes, understand, without

SIZE = (20, 12)  # width and height


def labels_of(*values: int) -> np.ndarray:
    """A map of vertical stripes of these values."""
    columns = np.array(values)[np.arange(SIZE[0]) * len(values) // SIZE[0]]
    return np.broadcast_to(columns, SIZE[::-1]).copy()


def write(file, values, mode="L"):
    file.parent.mkdir(parents=True, exist_ok=True)
    if mode == "P":
        image = Image.fromarray(values.astype(np.uint8), mode="P")
        image.putpalette(np.random.default_rng(0).permutation(768).astype(np.uint8).tobytes())
    elif mode == "I;16":
        image = Image.fromarray(values.astype(np.uint16))
    elif mode in ("1", "RGB"):
        image = Image.fromarray((values * (255 if mode == "1" else 1)).astype(np.uint8)).convert(mode)
    else:
        image = Image.fromarray(values.astype(np.uint8))
    image.save(file)


def make_folder(root, masks: dict[str, np.ndarray], images="images", names="masks", mode="L"):
    """Pictures beside masks, by stem; None for a missing mask."""
    for number, (stem, values) in enumerate(masks.items()):
        (root / images).mkdir(parents=True, exist_ok=True)
        picture(*SIZE, seed=number).save(root / images / f"{stem}.jpg")
        if values is not None:
            write(root / names / f"{stem}.png", values, mode)
    return root


@pytest.mark.parametrize("mode", ["L", "P", "I;16", "RGB"])
def test_numbers_are_read_in_every_mode(tmp_path, mode):
    make_folder(tmp_path, {"a": labels_of(0, 2, 1), "b": labels_of(1, 1, 255)}, mode=mode)
    maps = load_label_maps(str(tmp_path), "train")
    assert maps.classes == ["class 0", "class 1", "class 2"]
    assert np.array_equal(maps.read(0)["labels"], labels_of(0, 2, 1))
    assert np.array_equal(maps.read(1)["labels"], labels_of(1, 1, IGNORED))
    assert maps.read(1)["image"].shape == (3, *SIZE[::-1]) and maps.read(1)["name"].endswith("b.jpg")


def test_masks_of_one_bit_are_two_classes(tmp_path):
    maps = load_label_maps(str(make_folder(tmp_path, {"a": labels_of(0, 1)}, mode="1")), "train")
    assert maps.classes == ["class 0", "class 1"] and np.array_equal(maps.read(0)["labels"], labels_of(0, 1))


def test_colours_are_read_by_a_file_of_names_and_refused_without(tmp_path):
    colours = np.array([[0, 0, 0], [128, 64, 0], [7, 7, 7]])[labels_of(0, 1, 2)]
    make_folder(tmp_path / "data", {"a": colours, "b": colours[:, ::-1]})
    with pytest.raises(ValueError, match=r"colour 128 64 0\): name them with --classes FILE"):
        load_label_maps(str(tmp_path / "data"), "train")
    (tmp_path / "names.txt").write_text("0 0 0 void\n128 64 0 big tree\n7 7 7 car\n")
    maps = load_label_maps(str(tmp_path / "data"), "train", classes=str(tmp_path / "names.txt"), ignored=[0])
    assert maps.classes == ["big tree", "car"]
    assert np.array_equal(maps.read(0)["labels"], labels_of(-1, 0, 1))


def test_modes_without_labels_are_refused_by_name():
    with pytest.raises(ValueError, match="mode RGBA"):
        map_values(Image.new("RGBA", SIZE))
    with pytest.raises(ValueError, match="mode F"):
        map_values(Image.new("F", SIZE))


def test_a_grey_rgb_map_is_one_of_numbers():
    values = labels_of(0, 3)
    assert np.array_equal(map_values(Image.fromarray(np.stack([values] * 3, -1).astype(np.uint8))), values)


def test_files_of_classes(tmp_path):
    file = tmp_path / "names.txt"
    file.write_text("sky\n\nside walk\n")
    assert read_classes(file) == Labels(["sky", "side walk"], {0: 0, 1: 1})
    file.write_text("7 sky\n24 side walk\n")
    assert read_classes(file) == Labels(["sky", "side walk"], {7: 0, 24: 1})
    file.write_text("1 2 3 sky\n9 9 9 grey\n")
    assert read_classes(file) == Labels(["sky", "grey"], {COLOUR + 0x010203: 0, 9: 1, COLOUR + 0x090909: 1})
    file.write_text("\ufeff7 road\n8 road\n9 sky\n0 Void\n", encoding="utf-8")
    assert read_classes(file) == Labels(["road", "sky"], {7: 0, 8: 0, 9: 1, 0: IGNORED})
    file.write_text("7 sky\nroad\n")
    with pytest.raises(ValueError, match="lines of one kind"):
        read_classes(file)


def test_black_and_white_masks_are_background_and_object():
    assert understand([labels_of(0, 255), labels_of(0)]).classes == ["background", "object"]
    assert understand([labels_of(0, 1, 255)]).class_of == {0: 0, 1: 1}  # 255 is void


def test_a_class_in_the_middle_can_be_ignored():
    labels = without(Labels(["a", "b", "c"], {0: 0, 1: 1, 2: 2}), [1, 77])
    assert labels.classes == ["a", "c"]
    assert np.array_equal(labels.apply(np.array([[0, 1, 2, 77, 255]])), [[0, IGNORED, 1, IGNORED, IGNORED]])


def test_what_is_wrong_is_named(tmp_path, capsys):
    make_folder(tmp_path, {"a": labels_of(0, 1), "b": labels_of(0, 1), "c": labels_of(0, 1)[:-1], "d": None})
    maps = load_label_maps(str(tmp_path), "train")
    assert "left out 1 of 4 pictures without a mask, for example d.jpg" in capsys.readouterr().err and len(maps) == 3
    maps.labels = Labels(["class 0"], {0: 0})
    with pytest.raises(ValueError, match=r"labels beyond the 1 classes: 1 \(120 pixels\)"):
        maps.read(0)
    maps.labels = Labels(["class 0", "class 1"], {0: 0, 1: 1})
    with pytest.raises(ValueError, match="label map has 20 x 11 pixels, the picture 20 x 12"):
        maps.read(2)
    columns = dict(image=[picture(*SIZE)], mask=[None])
    kinds = datasets.Features(image=datasets.Image(), mask=datasets.Image())
    maps.records = datasets.Dataset.from_dict(columns, kinds).cast_column("image", datasets.Image(decode=False))
    with pytest.raises(ValueError, match="it has no label map"):
        maps.read(0)


def test_the_folders_of_ade20k(tmp_path, capsys):
    for split, values in {"training": labels_of(0, 150, 3), "validation": labels_of(1, 2)}.items():
        make_folder(tmp_path, {"ADE_1": values}, f"images/{split}", f"annotations/{split}")
    rows = ["Idx\tRatio\tTrain\tVal\tStuff\tName"] + [f"{i}\t0\t0\t0\t0\tthing {i}, also" for i in range(1, 151)]
    (tmp_path / "objectInfo150.txt").write_text("\n".join(rows))
    maps = load_label_maps(str(tmp_path), "train")
    assert len(maps.classes) == 150 and maps.classes[0] == "thing 1" and maps.classes[149] == "thing 150"
    assert np.array_equal(maps.read(0)["labels"], labels_of(IGNORED, 149, 2))
    tests = load_label_maps(str(tmp_path), "validation", labels=maps.labels)
    assert np.array_equal(tests.read(0)["labels"], labels_of(0, 1))
    assert "0 is void" in capsys.readouterr().err
    (tmp_path / "names.txt").write_text("\n".join(f"name {i}" for i in range(1, 151)))
    maps = load_label_maps(str(tmp_path), "train", classes=str(tmp_path / "names.txt"), ignored=[255])
    assert maps.classes[0] == "name 1" and np.array_equal(maps.read(0)["labels"], labels_of(IGNORED, 149, 2))


def test_splits_may_be_above_or_below_the_folders_of_pictures(tmp_path):
    for split in ("train", "val"):
        make_folder(tmp_path / "below", {f"{split}-a": labels_of(0, 1)}, f"images/{split}", f"masks/{split}")
        make_folder(tmp_path / "above" / split, {f"{split}-a": labels_of(0, 1)})
    for root in ("below", "above"):
        for name in ("validation", "val", "valid"):
            assert "val-a" in load_label_maps(str(tmp_path / root), name).read(0)["name"]
        with pytest.raises(ValueError, match="Unknown split 'test'"):
            load_label_maps(str(tmp_path / root), "test")


def test_maps_that_cannot_hold_labels_are_refused(tmp_path):
    make_folder(tmp_path / "lossy", {"a": labels_of(0, 1)})
    Image.fromarray(labels_of(0, 9).astype(np.uint8)).save(tmp_path / "lossy" / "masks" / "a.jpg")
    (tmp_path / "lossy" / "masks" / "a.png").unlink()
    with pytest.raises(ValueError, match=r"none of the 1 label maps can be read.* is a JPEG"):
        load_label_maps(str(tmp_path / "lossy"), "train")
    make_folder(tmp_path / "void", {"a": labels_of(255)})
    with pytest.raises(ValueError, match="the label maps hold no classes"):
        load_label_maps(str(tmp_path / "void"), "train")


def test_of_several_folders_the_one_with_masks_of_the_pictures_is_taken(tmp_path):
    """As in Pascal VOC, whose Annotations are XML, and which has masks for some of the pictures."""
    make_folder(tmp_path, {"a": labels_of(0, 1), "b": None}, "JPEGImages", "SegmentationClass", mode="P")
    (tmp_path / "Annotations").mkdir()
    (tmp_path / "Annotations" / "a.xml").write_text("<annotation/>")
    maps = load_label_maps(str(tmp_path), "train")
    assert len(maps) == 1 and np.array_equal(maps.read(0)["labels"], labels_of(0, 1))
    make_folder(tmp_path / "none", {"a": None})
    (tmp_path / "none" / "masks").mkdir()
    with pytest.raises(ValueError, match="no pictures in images with a mask in masks"):
        load_label_maps(str(tmp_path / "none"), "train")


def test_a_column_of_label_maps_is_found(tmp_path):
    masks = [Image.fromarray(labels_of(0, 1, 2).astype(np.uint8))] * 2
    kinds = datasets.Features(
        image=datasets.Image(),
        annotation=datasets.Image(),
        present=datasets.List(datasets.ClassLabel(names=list("abc"))),
    )
    columns = dict(image=[picture(*SIZE)] * 2, annotation=masks, present=[[0, 1], [2]])
    datasets.Dataset.from_dict(columns, kinds).save_to_disk(tmp_path / "data")
    maps = load_label_maps(str(tmp_path / "data"), "train", ignored=[2])
    assert maps.classes == ["a", "b"]
    assert np.array_equal(maps.read(1)["labels"], labels_of(0, 1, -1))
    with pytest.raises(ValueError, match="no column 'oak' of label maps"):
        load_label_maps(str(tmp_path / "data"), "train", mask_column="oak")


def test_another_split_has_the_classes_of_the_first_by_their_names(tmp_path):
    def save(names: str, *values: int):
        kinds = datasets.Features(
            image=datasets.Image(), mask=datasets.Image(), present=datasets.List(datasets.ClassLabel(names=list(names)))
        )
        mask = Image.fromarray(labels_of(*values).astype(np.uint8))
        columns = dict(image=[picture(*SIZE)], mask=[mask], present=[[0]])
        datasets.Dataset.from_dict(columns, kinds).save_to_disk(tmp_path / names)
        return str(tmp_path / names)

    labels = load_label_maps(save("abc", 0, 1, 2), "train", ignored=[1]).labels
    assert labels.classes == ["a", "c"]
    turned = load_label_maps(save("cba", 0, 2, 255), "train", labels=labels)
    assert turned.classes == labels.classes
    assert np.array_equal(turned.read(0)["labels"], labels_of(1, 0, IGNORED))
    with pytest.raises(ValueError, match=r"labels beyond the 2 classes: 3 \(120 pixels\)"):
        load_label_maps(save("cbad", 0, 2, 3, 3), "train", labels=labels).read(0)
    by_value = load_label_maps(str(tmp_path / "cba"), "train", labels=labels, by_name=False)
    assert np.array_equal(by_value.read(0)["labels"], labels_of(0, 1, IGNORED))
    with pytest.raises(ValueError, match="has other classes: x, y"):
        load_label_maps(save("xy", 0, 1), "train", labels=labels)
    unnamed = make_folder(tmp_path / "folder", {"a": labels_of(0, 2)})
    assert load_label_maps(str(unnamed), "train", labels=labels).read(0)["labels"].unique().tolist() == [0, 1]


def test_a_column_that_is_named_counts_for_more_than_a_folder_of_that_kind(tmp_path):
    make_folder(tmp_path, {"a": labels_of(0, 1)})
    assert len(load_label_maps(str(tmp_path), "train", image_column="image", mask_column="mask")) == 1
    write(tmp_path / "parts" / "a.png", labels_of(5, 6))
    row = "images/a.jpg,masks/a.png,parts/a.png"
    (tmp_path / "metadata.csv").write_text(f"file_name,mask_file_name,parts_file_name\n{row}\n")
    assert load_label_maps(str(tmp_path), "train").classes == ["class 0", "class 1"]
    assert load_label_maps(str(tmp_path), "train", mask_column="mask").classes == ["class 0", "class 1"]
    assert load_label_maps(str(tmp_path), "train", mask_column="parts").classes == ["class 5", "class 6"]
    with pytest.raises(ValueError, match="no column 'oak' of label maps"):
        load_label_maps(str(tmp_path), "train", mask_column="oak")


def test_options_of_the_demo_data_are_used_or_refused():
    assert load_label_maps("shapes", "test", ignored=[0]).read(5)["labels"].unique().tolist() == [IGNORED, 5]
    with pytest.raises(ValueError, match="--classes oak: of no use, shapes names its columns"):
        load_label_maps("shapes", "test", classes="oak")


def test_a_jpeg_is_no_label_map_however_it_is_turned(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
        picture(*SIZE).convert("L").save(tmp_path / name / "a.jpg", exif=exif)
    with pytest.raises(ValueError, match="its label map is a JPEG"):
        load_label_maps(str(tmp_path), "train")
    picture(*SIZE).convert("L").save(tmp_path / "masks" / "a.jpg")  # turned with its picture
    maps = load_label_maps(str(tmp_path), "train", labels=Labels(["a"], dict.fromkeys(range(256), 0)))
    with pytest.raises(ValueError, match="its label map is a JPEG"):
        maps.read(0)


def test_the_demo_data_has_the_background_and_the_shapes():
    maps = load_label_maps("shapes", "test")
    scene = maps.read(5)
    assert len(maps.classes) == 13 and maps.classes[6] == "cross"
    assert scene["labels"].unique().tolist() == [0, 6]


def test_camvid_as_it_lies(photographs, capsys):
    maps = load_label_maps(photographs("camvid11"), "test")
    assert "no class: unlabelled" in capsys.readouterr().err
    assert len(maps) == 233 and maps.classes[:2] == ["sky", "building"] and len(maps.classes) == 11
    assert maps.read(0)["labels"].shape == (240, 320)
    assert maps.read(0)["labels"].min() == IGNORED


def test_a_map_is_turned_with_its_picture(tmp_path):
    make_folder(tmp_path, {"a": labels_of(0, 1)})
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    picture(*SIZE).save(tmp_path / "images" / "a.jpg", exif=exif)
    scene = load_label_maps(str(tmp_path), "train").read(0)
    assert scene["image"].shape == (3, 20, 12)
    assert np.array_equal(scene["labels"], np.rot90(labels_of(0, 1), -1))
