"""Objects in pictures: COCO's files, columns of data sets, what is refused."""

import json

import datasets
import numpy as np
import pytest
import torch
from coco_files import HEIGHT, POLYGON, WIDTH, coco_content, make_coco
from helpers import picture
from PIL import Image

from instances import Instances, encode, load_instances, rle, targets_of


def test_the_files_of_coco_are_read_as_pycocotools_reads_them(tmp_path):
    from pycocotools.coco import COCO

    scenes = load_instances(str(make_coco(tmp_path)), "train")
    assert scenes.classes == ["cat", "dog"] and scenes.category_ids == [3, 9]
    assert scenes.image_ids() == [5, 6, 7]
    theirs = COCO(tmp_path / "annotations" / "instances_train2017.json")
    for index in range(3):
        ours, expected = scenes.read(index)["objects"], theirs.loadAnns(theirs.getAnnIds([scenes.image_ids()[index]]))
        assert len(ours) == len(expected)
        for one, other in zip(ours, expected):
            assert np.array_equal(rle.decode(one["segmentation"]), theirs.annToMask(other))
            assert (one["bbox"], one["area"], one["iscrowd"]) == (other["bbox"], other["area"], other["iscrowd"])
            assert scenes.category_ids[one["category"]] == other["category_id"]


def test_crowds_are_not_trained_on_and_pictures_without_objects_are_kept(tmp_path):
    scenes = load_instances(str(make_coco(tmp_path)), "train")
    target = targets_of(scenes.read(2))
    assert target["boxes"].tolist() == [[5, 5, 25, 20]] and target["labels"].tolist() == [0]
    assert target["masks"].shape == (1, HEIGHT, WIDTH) and target["masks"].sum() == 300
    empty = targets_of(scenes.read(1))
    assert empty["boxes"].shape == (0, 4) and empty["masks"].shape == (0, HEIGHT, WIDTH)


def test_another_split_has_the_classes_of_the_first(tmp_path):
    make_coco(tmp_path)
    content = coco_content()
    content["categories"].insert(0, dict(id=1, name="owl"))
    make_coco(tmp_path, "val2017", content)
    training = load_instances(str(tmp_path), "train")
    tests = load_instances(str(tmp_path), "validation", known=(training.classes, training.category_ids))
    assert tests.classes == ["cat", "dog"]
    assert tests.read(2)["objects"][0]["category"] == 0

    # the numbers of the same names may differ, other names may not
    content = coco_content()
    for each in content["categories"]:
        each["name"] = "dog" if each["name"] == "cat" else "cat"
    make_coco(tmp_path / "turned", "val2017", content)
    known = training.classes, training.category_ids
    turned = load_instances(str(tmp_path / "turned"), "validation", known=known)
    assert turned.classes == ["cat", "dog"] and turned.category_ids == [9, 3]
    assert turned.read(2)["objects"][0]["category"] == 1  # category 3, which is called dog there
    content["categories"] = [dict(id=3, name="dog"), dict(id=9, name="house")]
    make_coco(tmp_path / "other", "val2017", content)
    with pytest.raises(ValueError, match="has other classes: house"):
        load_instances(str(tmp_path / "other"), "validation", known=known)
    content["annotations"] = [each for each in content["annotations"] if each["category_id"] == 3]
    make_coco(tmp_path / "unused", "val2017", content)
    unused = load_instances(str(tmp_path / "unused"), "validation", known=known)
    assert unused.category_ids == [10, 3] and unused.read(2)["objects"][0]["category"] == 1


def test_roboflows_folders_are_coco_too(tmp_path):
    content = coco_content()
    content["categories"].insert(0, dict(id=0, name="animals"))  # a super-category without objects
    for split in ("train", "valid"):
        (tmp_path / split).mkdir()
        for number in (5, 6, 7):
            picture(WIDTH, HEIGHT, seed=number).save(tmp_path / split / f"{number}.jpg")
        (tmp_path / split / "_annotations.coco.json").write_text(json.dumps(content))
    scenes = load_instances(str(tmp_path), "validation")
    assert scenes.classes == ["cat", "dog"] and len(scenes) == 3
    assert scenes.read(0)["image"].shape == (3, HEIGHT, WIDTH)


def table(boxes, categories, masks=None, **more) -> datasets.Dataset:
    """A data set with a column of objects, as on the hub."""
    objects = dict(
        bbox=datasets.List(datasets.List(datasets.Value("float32"), length=4)),
        category=datasets.List(datasets.ClassLabel(names=["cat", "dog"])),
    )
    kinds = datasets.Features(image=datasets.Image(), objects=objects)
    columns = dict(image=[picture(WIDTH, HEIGHT, seed=i) for i in range(len(boxes))])
    columns["objects"] = [dict(bbox=each, category=which) for each, which in zip(boxes, categories)]
    if masks is not None:
        kinds["instances"], columns["instances"] = datasets.Image(), masks
    return datasets.Dataset.from_dict(columns, kinds)


def test_columns_of_boxes_with_masks(tmp_path):
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[5:20, 5:25], mask[2:8, 30:36] = 1, 2
    data = table(
        [[[5, 5, 20, 15], [30, 2, 6, 6]], []], [[1, 0], []], [Image.fromarray(mask), Image.fromarray(mask * 0)]
    )
    data.save_to_disk(tmp_path / "data")
    scenes = load_instances(str(tmp_path / "data"), "train")
    assert scenes.classes == ["cat", "dog"] and scenes.has_masks
    objects = scenes.read(0)["objects"]
    assert [each["area"] for each in objects] == [300, 36]
    target = targets_of(scenes.read(0))
    assert torch.equal(target["masks"][1].bool(), torch.from_numpy(mask == 2))
    assert target["labels"].tolist() == [1, 0]
    assert scenes.read(1)["objects"] == []


def test_numbers_of_another_split_are_told_by_their_names(tmp_path):
    table([[[5, 5, 20, 15], [30, 2, 6, 6]]], [[1, 0]]).save_to_disk(tmp_path / "data")
    known = ["dog", "owl", "cat"], [0, 1, 2]
    scenes = load_instances(str(tmp_path / "data"), "train", known=known)
    assert scenes.classes == known[0] and [each["category"] for each in scenes.read(0)["objects"]] == [0, 2]
    scenes = load_instances(str(tmp_path / "data"), "train", known=known, by_name=False)
    assert [each["category"] for each in scenes.read(0)["objects"]] == [1, 0]
    with pytest.raises(ValueError, match="an object has the class 'dog', expected cat, owl"):
        load_instances(str(tmp_path / "data"), "train", known=(["cat", "owl"], [0, 1]))
    (tmp_path / "names.txt").write_text("owl\n", encoding="utf-8-sig")  # as Windows writes it
    assert load_instances(str(tmp_path / "data"), "train", classes=str(tmp_path / "names.txt")).classes == ["owl"]
    with pytest.raises(ValueError, match="an object has the class 'class 1', expected dog, owl, cat"):
        load_instances(str(tmp_path / "data"), "train", known=known, classes=str(tmp_path / "names.txt"))


def test_boxes_stand_for_masks_that_are_missing_and_masks_lie_as_their_boxes(tmp_path):
    boxes, mask = [[5, 5, 20, 15]], Image.fromarray(np.ones((HEIGHT, WIDTH), np.uint8))
    data = table([boxes, [], boxes], [[1], [], [0]], [None, None, mask])
    data.save_to_disk(tmp_path / "data")
    scenes = load_instances(str(tmp_path / "data"), "train")
    assert scenes.read(0)["objects"][0]["area"] == 300 and scenes.read(1)["objects"] == []
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter; the mask is not
    picture(WIDTH, HEIGHT).save(tmp_path / "turned.jpg", exif=exif)
    records = scenes.records.map(
        lambda row: row | dict(image=dict(bytes=None, path=str(tmp_path / "turned.jpg"))),
        features=scenes.records.features,
    )
    with pytest.raises(ValueError, match="its mask has 40 x 30 pixels, not 30 x 40"):
        Instances(records, scenes.classes, scenes.form, True).read(2)


def test_boxes_of_another_format_are_noticed(tmp_path):
    table([[[30.0, 20, 38, 28]]] * 4, [[0]] * 4).save_to_disk(tmp_path / "data")
    with pytest.raises(ValueError, match="perhaps they are --boxes xyxy"):
        load_instances(str(tmp_path / "data"), "train")
    scenes = load_instances(str(tmp_path / "data"), "train", boxes="xyxy")
    assert scenes.read(0)["objects"][0]["bbox"] == [30, 20, 8, 8] and not scenes.has_masks
    assert "masks" not in targets_of(scenes.read(0))


def test_boxes_in_arrays_of_many_channels_are_compared_too(tmp_path):
    kinds = table([[]], [[]]).features | dict(image=datasets.Array3D((HEIGHT, WIDTH, 5), "uint8"))
    columns = dict(
        image=[np.zeros((HEIGHT, WIDTH, 5), np.uint8)] * 4, objects=[dict(bbox=[[30.0, 20, 38, 28]], category=[0])] * 4
    )
    datasets.Dataset.from_dict(columns, datasets.Features(kinds)).save_to_disk(tmp_path / "data")
    with pytest.raises(ValueError, match="perhaps they are --boxes xyxy"):
        load_instances(str(tmp_path / "data"), "train")
    assert len(load_instances(str(tmp_path / "data"), "train", boxes="xyxy")) == 4


@pytest.mark.parametrize("box", [None, [1, 2, 3], "abcd"])
def test_a_box_that_is_not_four_numbers_is_named(box, tmp_path):
    row = dict(file_name="a.png", objects=dict(bbox=[box], category=["cat"]))
    picture().save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match="expected four numbers"):
        load_instances(str(tmp_path), "train")


@pytest.mark.parametrize(
    "part, key",
    [("images", "file_name"), ("annotations", "image_id"), ("annotations", "category_id"), ("categories", "name")],
)
def test_what_a_file_of_coco_lacks_is_named(part, key, tmp_path):
    content = coco_content()
    del content[part][1][key]
    make_coco(tmp_path, content=content)
    with pytest.raises(ValueError, match=f"number 1 of its {part} has no {key}"):
        load_instances(str(tmp_path), "train")
    content[part] = None
    make_coco(tmp_path / "other", content=content)
    with pytest.raises(ValueError, match=f"has no list of {part}"):
        load_instances(str(tmp_path / "other"), "train")


def test_columns_and_classes_are_not_for_data_that_name_them(tmp_path):
    make_coco(tmp_path)
    for name in ("shapes", str(tmp_path)):
        for option in ("image_column", "mask_column", "classes"):
            with pytest.raises(
                ValueError, match=f"--{option.replace('_', '-')} oak: .* names its columns and classes itself"
            ):
                load_instances(name, "train", **{option: "oak"})


def test_boxes_in_files_of_coco_may_be_corners_too(tmp_path):
    content = coco_content()
    for each in content["annotations"]:
        left, top, width, height = each["bbox"]
        each["bbox"] = [left, top, left + width, top + height]
    make_coco(tmp_path, content=content)
    scenes = load_instances(str(tmp_path), "train", boxes="xyxy")
    assert [each["bbox"] for each in scenes.read(2)["objects"]] == [[5, 5, 20, 15], [30, 2, 8, 7]]
    with pytest.raises(ValueError, match="perhaps they are --boxes xyxy"):
        load_instances(str(tmp_path), "train")


@pytest.mark.parametrize("none", [[], None])
def test_pictures_without_objects_hide_no_numbers_or_names_of_classes(none, tmp_path):
    def write(place, categories):
        rows = [dict(bbox=[1.0, 1, 4, 4], category=each) for each in categories]
        columns = dict(image=[picture(WIDTH, HEIGHT)] * 3, objects=[rows, none, rows])
        datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image()).save_to_disk(place)
        return str(place)

    numbered = load_instances(write(tmp_path / "numbered", [0, 2]), "train")
    assert numbered.classes == ["class 0", "class 1", "class 2"] and numbered.read(1)["objects"] == []
    place = write(tmp_path / "named", ["dog", "cat"])
    (tmp_path / "names.txt").write_text("dog\nowl\ncat\n")
    for file, names, numbers in (
        (None, ["cat", "dog"], [1, 0]),
        (tmp_path / "names.txt", ["dog", "owl", "cat"], [0, 2]),
    ):
        named = load_instances(place, "train", classes=file)
        assert named.classes == names and [each["category"] for each in named.read(2)["objects"]] == numbers
    with pytest.raises(ValueError, match="an object has the class 'dog', expected cat"):
        load_instances(place, "train", known=(["cat"], [0]))


def test_boxes_that_are_fractions_are_noticed(tmp_path):
    table([[[0.1, 0.2, 0.3, 0.3]]] * 4, [[0]] * 4).save_to_disk(tmp_path / "data")
    with pytest.raises(ValueError, match="fractions of the picture: expected pixels"):
        load_instances(str(tmp_path / "data"), "train")


def test_files_of_coco_without_masks_give_boxes_and_missing_masks_are_boxes(tmp_path):
    content = coco_content()
    content["annotations"][2]["segmentation"] = []
    scenes = load_instances(str(make_coco(tmp_path / "some", content=content)), "train")
    assert scenes.has_masks and rle.area(scenes.read(0)["objects"][0]["segmentation"]) == 100
    for each in content["annotations"]:
        each["segmentation"] = []
    scenes = load_instances(str(make_coco(tmp_path / "none", content=content)), "train")
    assert not scenes.has_masks and "masks" not in targets_of(scenes.read(0))


def test_annotations_without_a_box_have_that_of_their_polygons(tmp_path):
    content = coco_content()
    expected = load_instances(str(make_coco(tmp_path / "whole", content=content)), "train").read(0)["objects"]
    del content["annotations"][2]["bbox"]
    some = load_instances(str(make_coco(tmp_path / "some", content=content)), "train").read(0)["objects"]
    assert [each["bbox"] for each in some] == [each["bbox"] for each in expected] == [[1, 1, 10, 10]]
    content["annotations"][2]["segmentation"] = content["annotations"][2]["segmentation"][0]  # not in a list
    other = load_instances(str(make_coco(tmp_path / "other", content=content)), "train").read(0)["objects"]
    assert [each["bbox"] for each in other] == [[1, 1, 10, 10]]
    content["annotations"][2] |= dict(bbox=[], segmentation=[])
    with pytest.raises(ValueError, match="annotation 3 has neither a box of four numbers nor polygons"):
        load_instances(str(make_coco(tmp_path / "none", content=content)), "train")


def test_classes_of_one_name_are_told_apart(tmp_path):
    content = coco_content()
    content["categories"] = [dict(id=9, name="dog"), dict(id=3, name="dog"), dict(id=4, name="cat")]
    scenes = load_instances(str(make_coco(tmp_path, content=content)), "train")
    assert scenes.classes == ["dog (3)", "cat", "dog (9)"]


def test_a_split_goes_by_any_of_its_names(tmp_path):
    make_coco(tmp_path)
    make_coco(tmp_path, "val2017")
    for name in ("val", "validation", "val2017"):
        assert len(load_instances(str(tmp_path), name)) == 3
    with pytest.raises(ValueError, match="Unknown split 'test'"):
        load_instances(str(tmp_path), "test")


def test_files_of_coco_in_other_forms(tmp_path):
    content = coco_content()
    content["annotations"][0]["segmentation"] = POLYGON  # not in a list
    for each in (*content["images"], *content["annotations"]):
        for name in {"id", "image_id"} & each.keys() if "file_name" in each else {"image_id"}:
            each[name] = f"picture-{each[name]}"
    scenes = load_instances(str(make_coco(tmp_path, content=content)), "train")
    assert scenes.image_ids()[2] == "picture-7" and rle.area(scenes.read(2)["objects"][0]["segmentation"]) == 300
    with pytest.raises(ValueError, match=r"--classes names.txt: .* names its columns and classes itself"):
        load_instances(str(tmp_path), "train", classes="names.txt")


def test_pictures_that_are_not_there_are_named_and_found_once_they_are(tmp_path):
    make_coco(tmp_path)
    (tmp_path / "train2017").rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"the pictures of .*, such as 7.jpg, are not in"):
        load_instances(str(tmp_path), "train")
    (tmp_path / "images").mkdir()
    (tmp_path / "elsewhere").rename(tmp_path / "images" / "train2017")
    assert load_instances(str(tmp_path), "train").read(0)["image"].shape == (3, HEIGHT, WIDTH)


def test_missing_values_of_objects_do_not_hide_them(tmp_path):
    objects = [dict(bbox=[[5.0, 5, 20, 15]] * 2, category=[1, 0], area=None), dict(bbox=[], category=[], area=[])]
    data = datasets.Dataset.from_dict(dict(image=[picture(WIDTH, HEIGHT)] * 2, objects=objects))
    data.cast_column("image", datasets.Image()).save_to_disk(tmp_path / "data")
    scenes = load_instances(str(tmp_path / "data"), "train")
    assert len(scenes.read(0)["objects"]) == 2 and scenes.classes == ["class 0", "class 1"]


def test_masks_that_do_not_number_the_objects_are_noticed(tmp_path):
    white = Image.fromarray(np.full((HEIGHT, WIDTH), 255, np.uint8))
    table([[[5, 5, 20, 15], [30, 2, 6, 6]]] * 3, [[1, 0]] * 3, [white] * 3).save_to_disk(tmp_path / "data")
    with pytest.raises(ValueError, match=r"objects sampled from .* have an empty mask"):
        load_instances(str(tmp_path / "data"), "train")


def test_what_is_wrong_with_a_picture_is_named(tmp_path):
    scenes = load_instances(str(make_coco(tmp_path)), "train")
    narrow = Instances(scenes.records, ["cat"], scenes.form, True)
    with pytest.raises(ValueError, match="object 0 has class 1, beyond the 1 classes"):
        narrow.read(0)
    turned = scenes.records.map(lambda row: dict(size=[HEIGHT, WIDTH]))
    with pytest.raises(ValueError, match=r"annotations are of a picture of \[30, 40\] pixels, it has \[40, 30\]"):
        Instances(turned, scenes.classes, scenes.form, True).read(0)
    with pytest.raises(ValueError, match=r"mask is of \[4, 4\] pixels"):
        encode(dict(size=[4, 4], counts=[16]), HEIGHT, WIDTH)
    beyond = scenes.records.map(lambda row: dict(objects=row["objects"].replace("[5.0, 5.0,", "[50.0, 5.0,")))
    with pytest.raises(ValueError, match=r"box \[50.0, 5.0, 20.0, 15.0\] lies beyond its 40 x 30 pixels"):
        Instances(beyond, scenes.classes, scenes.form, True).read(2)


def test_the_demo_data_has_one_object_in_each_picture():
    scenes = load_instances("shapes", "test")
    target = targets_of(scenes.read(5))
    rows, columns = target["masks"][0].nonzero().unbind(1)
    box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert target["boxes"].tolist() == [box] and target["labels"].tolist() == [5]


def test_coco_mini_as_it_lies(photographs):
    scenes = load_instances(photographs("coco-mini"), "train")
    assert len(scenes) == 308 and scenes.classes[0] == "person" and scenes.has_masks
    sizes = [len(json.loads(text)) for text in scenes.records["objects"]]
    assert min(sizes) == 0 and sum(sizes) > 2000
    crowded = next(i for i, text in enumerate(scenes.records["objects"]) if '"iscrowd": true' in text)
    scene = scenes.read(crowded)
    assert len(targets_of(scene)["boxes"]) < len(scene["objects"])
