"""Scenes: augmentation of pictures with their truth, batches, broken pictures."""

import datasets
import numpy as np
import pytest
import torch
from helpers import image_bytes, picture
from torchvision import tv_tensors

from data import TooManyBadImages
from instances import load_instances, rle
from label_maps import IGNORED, load_label_maps
from pixels import RGB
from readers import Share
from scenes import LabelCrop, ObjectCrop, Pictures, SceneBatches, apart, each_scene, hold_out


def a_scene(height=24, width=36) -> dict:
    """A picture whose red channel is its label map."""
    labels = torch.arange(6).repeat_interleave(width // 6).expand(height, -1).contiguous()
    image = torch.stack([labels * 40, labels * 0, labels * 0]).to(torch.uint8)
    return dict(image=tv_tensors.Image(image), labels=tv_tensors.Mask(labels))


def test_picture_and_labels_are_cropped_alike():
    crop, sides = LabelCrop(16, (0.5, 2.0), distort=False), []
    for seed in range(40):
        torch.manual_seed(seed)
        found = crop(a_scene())
        image, labels = found["image"], found["labels"]
        assert image.shape == (3, 16, 16) and labels.shape == (16, 16)
        seen = labels != IGNORED
        wrong = (image[0].float() / 40 - labels).abs() > 0.5  # at borders between classes alone
        assert wrong[seen].float().mean() < 0.2
        assert (image[0][~seen] == 124).all()  # grey beyond the picture
        sides.append(seen.float().mean().item())
    assert min(sides) < 0.5 and max(sides) == 1  # small pictures are padded


def test_crops_of_one_class_are_drawn_again():
    labels = torch.zeros(32, 32, dtype=torch.int64)
    labels[:, 28:] = 1
    scene = dict(image=tv_tensors.Image(torch.zeros(3, 32, 32, dtype=torch.uint8)), labels=tv_tensors.Mask(labels))
    shares = []
    for seed in range(60):
        torch.manual_seed(seed)
        shares.append((LabelCrop(8, (4.0, 4.0), distort=False)(scene)["labels"] == 1).any().item())
    assert np.mean(shares) > 0.5  # a single draw would find the rim in 44 %


def test_only_the_colours_of_pictures_are_distorted():
    torch.manual_seed(1)
    plain, distorted = [], []
    for seed in range(10):
        for crop, into in ((LabelCrop(16, (1.0, 1.0), distort=False), plain), (LabelCrop(16, (1.0, 1.0)), distorted)):
            torch.manual_seed(seed)
            into.append(crop(a_scene()))
    assert all(torch.equal(a["labels"], b["labels"]) for a, b in zip(plain, distorted))
    assert sum(not torch.equal(a["image"], b["image"]) for a, b in zip(plain, distorted)) > 5


def test_objects_are_cropped_with_their_picture():
    scenes, crop, kept = load_instances("shapes", "test"), ObjectCrop(64, (0.5, 2.0)), 0
    for seed in range(30):
        torch.manual_seed(seed)
        found = crop(scenes.read(seed))
        assert found["image"].shape == (3, 64, 64)
        for box, mask in zip(found["boxes"], found["masks"]):
            rows, columns = mask.nonzero().unbind(1)
            inside = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            assert torch.equal(box, inside.float())
            kept += 1
    assert 20 < kept <= 30


def test_an_object_of_which_only_the_box_reaches_into_a_crop_is_left_out():
    scene, counts = load_instances("shapes", "test").read(0), []
    height, width = scene["image"].shape[1:]
    corner = np.zeros((height, width), np.uint8, order="F")
    corner[:16, :16] = 1
    scene["objects"][0] |= dict(bbox=[0, 0, width, height], segmentation=rle.encode(corner))
    for seed in range(20):
        torch.manual_seed(seed)
        found = ObjectCrop(64, (1.2, 1.6))(scene)
        counts.append(len(found["boxes"]))
        assert found["masks"].flatten(1).any(dim=1).all()
    assert set(counts) == {0, 1}


def test_a_strip_of_a_picture_can_be_cropped():
    scene = a_scene()
    strip = {name: part[..., :1, :] for name, part in scene.items()}
    strip = dict(image=tv_tensors.Image(strip["image"]), labels=tv_tensors.Mask(strip["labels"]))
    assert LabelCrop(16, (0.5, 0.6))(strip)["image"].shape == (3, 16, 16)
    objects = dict(image=strip["image"], objects=[], has_masks=True)
    assert ObjectCrop(16, (0.02, 0.03))(objects)["image"].shape == (3, 16, 16)


def test_objects_of_a_batch_come_together_and_are_taken_apart():
    scenes = load_instances("shapes", "test").select(range(8))
    batches = SceneBatches(scenes, ObjectCrop(32, (0.2, 3.0)), 8)
    (batch,) = batches.epoch(1)
    parts = apart(batch.targets)
    assert [len(part["boxes"]) for part in parts] == batch.targets["counts"].tolist()
    assert len(batch.targets["masks"]) == sum(len(part["masks"]) for part in parts) > 0


def batches_of(scenes, workers=0, rank=0, world=1, accumulate=1, seen=0) -> list:
    share = Share(rank, world)
    batches = SceneBatches(scenes, LabelCrop(16, (0.5, 2.0)), 8, accumulate=accumulate, workers=workers, share=share)
    found = list(batches.epoch(1, seen))
    batches.close()
    return found


def test_crops_do_not_depend_on_workers_processes_and_accumulation():
    scenes = load_label_maps("shapes", "test").select(range(24))
    expected = {}
    for batch in batches_of(scenes):
        expected |= {int(i): (a, b) for i, a, b in zip(batch.indices, batch.images, batch.targets["labels"])}
    assert len(expected) == 24
    for how in (dict(workers=2), dict(world=2, rank=1), dict(accumulate=4), dict(seen=8)):
        for batch in batches_of(scenes, **how):
            for index, image, labels in zip(batch.indices, batch.images, batch.targets["labels"]):
                assert torch.equal(image, expected[int(index)][0])
                assert torch.equal(labels, expected[int(index)][1])


def test_only_the_pictures_to_predict_are_read():
    features = datasets.Features(image=datasets.Image(decode=False), mask=datasets.Image())
    column = [dict(bytes=image_bytes(picture()), path=None)]
    records = datasets.Dataset.from_dict(dict(image=column, mask=[dict(bytes=b"broken", path=None)]), features)
    assert Pictures(records, [], RGB).read(0)["image"].shape == (3, 30, 40)


class Broken(Pictures):
    """Pictures of which some cannot be read."""

    broken = (3, 4)

    def read(self, index: int) -> dict:
        if index in self.broken:
            raise ValueError("no label map")
        return super().read(index) | dict(labels=tv_tensors.Mask(torch.full((64, 64), index)))


def test_broken_pictures_are_replaced_named_and_counted():
    scenes = Broken(load_label_maps("shapes", "test").records.select(range(16)), [], RGB)
    batches = SceneBatches(scenes, LabelCrop(16, (1.0, 1.0)), 8, max_bad=0.2)
    labels = [int(labels.max()) for batch in batches.epoch(1) for labels in batch.targets["labels"]]
    assert sorted(labels) == sorted([i for i in range(16) if i not in (3, 4)] + [5, 5])
    assert batches.bad.count == 2 and "ValueError: no label map" in next(iter(batches.bad.descriptions.values()))
    scenes.broken = range(16)
    with pytest.raises(TooManyBadImages, match="of 16 images are broken"):
        list(SceneBatches(scenes, LabelCrop(16, (1.0, 1.0)), 8, max_bad=0.2).epoch(1))


def test_broken_pictures_in_a_row_are_tried_once(monkeypatch):
    scenes, tried, read = Broken(load_label_maps("shapes", "test").records.select(range(16)), [], RGB), [], Broken.read
    scenes.broken = range(8)
    monkeypatch.setattr(Broken, "read", lambda self, index: tried.append(index) or read(self, index))
    (batch,) = SceneBatches(scenes, LabelCrop(16, (1.0, 1.0)), 16, max_bad=0.6).epoch(1)
    assert len(batch.images) == 16 and len(tried) == 8 + 16


def test_a_picture_that_cannot_be_augmented_is_broken_too():
    crop = LabelCrop(16, (1.0, 1.0))

    def augment(scene: dict) -> dict:
        if scene["labels"].max() == 7:
            raise RuntimeError("odd")
        return crop(scene)

    scenes = Broken(load_label_maps("shapes", "test").records.select(range(16)), [], RGB)
    batches = SceneBatches(scenes, augment, 8, max_bad=0.5)
    assert len(list(batches.epoch(1))) == 2
    assert "image 7: RuntimeError: odd" in batches.bad.descriptions.values()


def test_every_picture_is_tested_once_over_all_processes():
    scenes = Broken(load_label_maps("shapes", "test").records.select(range(11)), [], RGB)
    found = [item for rank in range(3) for item in each_scene(scenes, dict, 0, Share(rank, 3))]
    assert sorted(index for index, *_ in found) == list(range(11))
    assert [index for index, scene, bad in sorted(found, key=lambda item: item[0]) if bad] == [3, 4]


def test_every_tenth_picture_can_be_held_out():
    scenes = load_label_maps("shapes", "test").select(range(25))
    training, tests = hold_out(scenes)
    assert len(training) == 23 and len(tests) == 2
    assert torch.equal(tests.read(0)["image"], scenes.read(9)["image"])
    with pytest.raises(ValueError, match="too few"):
        hold_out(scenes.select(range(5)))
