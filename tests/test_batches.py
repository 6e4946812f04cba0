import datasets
import numpy as np
import pytest
import torch
from helpers import dataset_of, image_bytes, picture, with_bad

import data
import pixels
from batches import EvalBatches, TrainBatches
from readers import Share


@pytest.fixture
def pictures():
    return dataset_of([image_bytes(picture(seed=i)) for i in range(20)], labels=[i % 7 for i in range(20)])


def epoch_of(dataset, epoch=1, **options):
    batches = TrainBatches(dataset, 16, 8, **options)
    images, indices, *_ = zip(*batches.epoch(epoch))
    return torch.cat(images), np.concatenate(indices), batches


# ------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("options", [dict(), dict(workers=1), dict(preload="host"), dict(length=16)], ids=str)
def test_all_but_the_images_are_arrays(options, pictures):
    """A tensor from a worker takes an open file."""
    dataset = pictures.to_iterable_dataset() if "length" in options else pictures
    for batch in TrainBatches(dataset, 16, 8, labels=True, **options).epoch(1):
        arrays = batch.indices, batch.labels, *batch.crops
        assert [type(array) for array in arrays] == [np.ndarray] * 4 and torch.is_tensor(batch.images)


@pytest.mark.parametrize("preload", [None, "host", "device"])
def test_batches_do_not_depend_on_workers_processes_or_accumulation(pictures, preload):
    images, indices, batches = epoch_of(pictures, preload=preload)
    assert batches.steps_per_epoch == 2 and len(set(indices)) == 16 and images.shape == (16, 3, 16, 16)
    if preload is None:
        again, same, _ = epoch_of(pictures, workers=2)
        assert torch.equal(again, images) and np.array_equal(same, indices)
    again, same, _ = epoch_of(pictures, preload=preload, accumulate=4)
    assert torch.equal(again, images) and np.array_equal(same, indices)
    parts = [epoch_of(pictures, preload=preload, share=Share(rank, 2), accumulate=2) for rank in (0, 1)]
    assert not set(parts[0][1]) & set(parts[1][1])
    order = np.argsort(np.concatenate([part[1] for part in parts]))
    everywhere = torch.cat([part[0] for part in parts])
    for step in (slice(0, 8), slice(8, 16)):  # every step sees the same pictures, whoever reads them
        assert set(parts[0][1][step.start // 2 : step.stop // 2]) < set(indices[step])
    assert torch.equal(everywhere[order], images[np.argsort(indices)])


def test_epochs_and_seeds_differ_and_repeat(pictures):
    images, indices, batches = epoch_of(pictures)
    assert not np.array_equal(epoch_of(pictures, epoch=2)[1], indices)
    assert not np.array_equal(epoch_of(pictures, seed=1)[1], indices)
    assert torch.equal(torch.cat([batch.images for batch in batches.epoch(1)]), images)
    second = epoch_of(pictures, epoch=2)
    common = set(second[1]) & set(indices)
    i = next(iter(common))
    assert not torch.equal(second[0][list(second[1]).index(i)], images[list(indices).index(i)])


@pytest.mark.parametrize("options", [{}, {"preload": "host"}, {"workers": 2}], ids=str)
def test_an_epoch_continues_where_it_was_left(pictures, options):
    images, indices, batches = epoch_of(pictures, **options)
    rest = list(batches.epoch(1, seen=8))
    assert len(rest) == batches.plan.steps_left(8) == 1
    assert torch.equal(rest[0].images, images[8:]) and np.array_equal(rest[0].indices, indices[8:])


def darker(image: torch.Tensor) -> torch.Tensor:
    return image // int(torch.randint(2, 100, ()))


@pytest.mark.parametrize("preload", [None, "host"])
def test_augmentation_depends_on_seed_epoch_and_picture_only(preload, pictures):
    seen = []
    for workers, batch_size in ((0, 4), (2, 10)):
        options = dict(seed=3, workers=workers, preload=preload, labels=True, augment=darker)
        batches = TrainBatches(pictures, 24, batch_size, **options)
        torch.manual_seed(workers)
        epochs = {}
        for epoch in (1, 2):
            for part in batches.epoch(epoch):
                epochs |= {(epoch, int(i)): image for i, image in zip(part.indices, part.images)}
                assert part.labels.tolist() == [i % 7 for i in part.indices]
        seen.append(epochs)
    assert seen[0].keys() == seen[1].keys() and len(seen[0]) == 40
    assert all(torch.equal(seen[0][key], seen[1][key]) for key in seen[0])
    assert not torch.equal(seen[0][1, 0], seen[0][2, 0])


@pytest.mark.parametrize("preload", [None, "host"])
@pytest.mark.parametrize("world", [1, 3])
def test_every_process_gets_its_share_of_the_uncropped_pictures_in_as_many_batches(pictures, world, preload):
    found = {}
    for rank in range(world):
        batches = TrainBatches(pictures, 16, 6, share=Share(rank, world), preload=preload)
        planned = batches.plan.uncropped()
        assert len(planned) == 4  # of 20 pictures, 6 / world at a time
        read = list(batches.uncropped(size=20))
        assert [batch.indices.tolist() for batch in read] == [indices.tolist() for indices in planned if len(indices)]
        found |= {int(i): image for batch in read for i, image in zip(batch.indices, batch.images)}
    assert sorted(found) == list(range(20))
    expected = torch.stack([pixels.stretch(picture(seed=i), 20) for i in range(20)])
    difference = torch.stack([found[i] for i in range(20)]).int() - expected.int()
    assert difference.abs().float().mean() < 2 if preload else not difference.any()
    some = TrainBatches(pictures, 16, 6, preload=preload).uncropped(3, size=20)  # not all of the first class
    assert [batch.indices.tolist() for batch in some] == [[0, 9, 19]]


def test_what_does_not_divide_or_suffice_is_refused(pictures):
    for options, message in [
        (dict(accumulate=3), "multiple of processes x accumulation"),
        (dict(share=Share(0, 5)), "multiple of processes x accumulation"),
        (dict(preload="device"), "cannot be preloaded"),
    ]:
        source = pictures.to_iterable_dataset() if "preload" in options else pictures
        with pytest.raises(ValueError, match=message):
            TrainBatches(source, 16, 8, length=20, **options)
    with pytest.raises(ValueError, match=r"batch of 24 needs more images than the data has \(20\): lower --batch-size"):
        TrainBatches(pictures, 16, 24)
    with pytest.raises(ValueError, match="--max-images"):
        TrainBatches(pictures.to_iterable_dataset(), 16, 8)


# ------------------------------------------------------------------------------------------- broken pictures


@pytest.mark.parametrize("options", [{}, {"workers": 2}, {"preload": "device"}], ids=str)
def test_broken_pictures_are_replaced_counted_and_named(options):
    images, _, batches = epoch_of(with_bad(), max_bad=0.2, **options)
    for epoch in range(2, 5):
        list(batches.epoch(epoch))
    assert len(images) == 16
    assert sorted(batches.bad.descriptions) == [3, 4, 11, 15]
    assert "image 11" in batches.bad.descriptions[11]


@pytest.mark.parametrize("options", [{}, {"workers": 2}, {"preload": "device"}], ids=str)
def test_too_many_broken_pictures_stop_with_their_names(options):
    with pytest.raises(data.TooManyBadImages, match=r"(?s)of 20 images are broken.*image (3|4|11|15)"):
        for _ in range(5):
            epoch_of(with_bad(), max_bad=0.1, **options)
    with pytest.raises(data.TooManyBadImages):
        epoch_of(with_bad(20, range(20)), max_bad=0.5, **options)


def test_several_processes_count_broken_pictures_only_when_asked_to():
    _, _, batches = epoch_of(with_bad(), max_bad=0.0, share=Share(0, 2))
    assert batches.bad.count
    with pytest.raises(data.TooManyBadImages):
        batches.bad.check()


@pytest.mark.parametrize("preload", [None, "host", "stream"])
def test_the_replacement_of_a_broken_picture_has_its_own_label(preload):
    blobs = [image_bytes(picture(seed=i)) for i in range(40)]
    blobs[7] = b"broken"
    dataset, options = dataset_of(blobs, labels=list(range(40))), dict(labels=True, max_bad=0.1)
    if preload == "stream":
        batches = TrainBatches(dataset.to_iterable_dataset(), 16, 39, length=39, **options)
        assert 7 not in np.concatenate([part.labels for part in batches.epoch(1)])
        return
    batches = TrainBatches(dataset, 16, 20, preload=preload, **options)
    labels = {int(i): int(label) for part in batches.epoch(1) for i, label in zip(part.indices, part.labels)}
    assert labels == {i: 8 if i == 7 else i for i in range(40)}


# ------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("world, batch, workers", [(1, 4, 0), (2, 4, 2), (3, 7, 0), (5, 100, 0), (20, 3, 0)])
def test_evaluation_reads_every_picture_exactly_once(world, batch, workers, tmp_path):
    for i in range(15):
        (tmp_path / f"{i % 3}").mkdir(exist_ok=True)
        picture(seed=i).save(tmp_path / f"{i % 3}" / f"{i}.png")
    dataset, seen = data.load_images(str(tmp_path)), {}
    for rank in range(world):
        batches = EvalBatches(dataset, 32, batch, workers=workers, share=Share(rank, world))
        assert batches.length == 15
        for part in batches:
            for i, image, label, name in zip(part.indices.tolist(), part.images, part.labels, part.names):
                assert i not in seen
                seen[i] = name
                assert label == dataset[i]["label"] and name == dataset[i]["image"]["path"]
                assert torch.equal(image, data.center_crop(data.decode(dataset[i]["image"]), 32, 0.875))
    assert sorted(seen) == list(range(15))


def test_kept_pictures_take_no_shared_memory(pictures):
    batches = EvalBatches(pictures, 16, 5, keep=True, workers=2)
    for _ in range(2):
        assert not any(part.is_shared() for batch in batches for part in batch[:3])


@pytest.mark.parametrize("streaming", [False, True])
def test_evaluation_leaves_broken_pictures_blank_and_names_them(streaming):
    dataset = with_bad(8, (3,)).to_iterable_dataset() if streaming else with_bad(8, (3,))
    batches = EvalBatches(dataset, 16, 5, keep=True)
    assert batches.length == (None if streaming else 8)
    for parts in (list(batches), list(batches)):  # the second time from memory
        bad = [what for part in parts for what in part.bad]
        assert [what is None for what in bad] == [i != 3 for i in range(8)]
        assert bad[3].index == 3 and bad[3].description.startswith("image 3: ")
        images = torch.cat([part.images for part in parts])
        assert not images[3].any() and images[4].any()
        assert torch.cat([part.labels for part in parts]).tolist() == [-1] * 8


def test_a_broken_mask_beside_a_picture_does_not_matter():
    features = datasets.Features(image=datasets.Image(decode=False), mask=datasets.Image())
    good, broken = (dict(bytes=blob, path=None) for blob in (image_bytes(picture()), b"broken"))
    dataset = datasets.Dataset.from_dict({"image": [good] * 2, "mask": [broken] * 2}, features)
    (batch,) = EvalBatches(dataset.add_column("label", [3, 4]), 32, 8)
    assert batch.labels.tolist() == [3, 4] and batch.bad == [None, None]
