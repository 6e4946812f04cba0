import itertools
import multiprocessing
import sys
import time

import datasets
import numpy as np
import pytest
import torch
from helpers import dataset_of, image_bytes, picture, with_bad

import data
import readers
from batches import EvalBatches, TrainBatches
from cropping import CropOptions
from pixels import RGB
from readers import MapCrops, Request, Share, StreamCrops, Workers, worker_options
from scenes import Pictures, each_scene


def crops_of(dataset, **options) -> torch.Tensor:
    return torch.cat([batch.images for batch in TrainBatches(dataset, 16, 8, **options).epoch(1)])


def test_a_data_set_that_is_gone_is_not_tried_again_for_every_picture_of_a_batch():
    gone = datasets.Dataset.from_dict(
        {"image": [dict(bytes=None, path=f"/nowhere/{i}.png") for i in range(1000)]},
        datasets.Features(image=datasets.Image(decode=False)),
    )
    crops = MapCrops(gone, CropOptions(16, (0.2, 1.0), seed=0, bad_limit=100))
    batch = crops[Request(1, np.arange(64), 16)]
    assert len(batch.images) == 64 and len(batch.bad) < 200


@pytest.mark.parametrize("options", [{}, dict(preload="host"), dict(preload="host", workers=2)])
def test_broken_pictures_in_a_row_are_replaced_as_long_as_they_are_allowed(options):
    """Once counted anew by every picture that met them, until black crops of class 0 were taken instead."""
    blobs = [b"broken" if 10 <= i < 14 else image_bytes(picture(seed=i)) for i in range(100)]
    batches = TrainBatches(dataset_of(blobs, [7] * 100), 16, 100, max_bad=0.05, labels=True, **options)
    (batch,) = batches.epoch(1)
    assert (batch.labels == 7).all() and batch.images.flatten(1).amax(dim=1).all()
    assert batches.bad.count == 4


@pytest.mark.parametrize("options", [{}, dict(preload="host")])
def test_broken_pictures_in_a_row_are_tried_once(options, monkeypatch):
    """A damaged folder of a large data set would take hours if every picture in it tried all that follow."""
    tried, decode = [], data.open_picture
    monkeypatch.setattr(data, "open_picture", lambda record, *form: tried.append(1) or decode(record, *form))
    blobs = [b"broken" if 10 <= i < 110 else image_bytes(picture(16, 16, seed=i)) for i in range(200)]
    (batch,) = TrainBatches(dataset_of(blobs), 16, 200, max_bad=0.6, **options).epoch(1)
    assert batch.images.flatten(1).amax(dim=1).all() and len(tried) <= 500


# ------------------------------------------------------------------------------------------- preloaded


def test_preloaded_square_pictures_equal_decoding_anew():
    squares = dataset_of([image_bytes(picture(32, 32, seed=i)) for i in range(8)])
    difference = crops_of(squares).int() - crops_of(squares, preload="device").int()
    assert difference.abs().max() <= 2


def test_preloaded_pictures_of_other_shapes_keep_their_aspect():
    pictures = dataset_of([image_bytes(picture(seed=i)) for i in range(20)])
    anew, preloaded = crops_of(pictures).int(), crops_of(pictures, preload="device").int()
    assert (anew - preloaded).abs().float().mean() < 2  # stretched and back: smooth, nearly the same
    wrong = crops_of(pictures, seed=1, preload="device").int()
    assert (anew - wrong).abs().float().mean() > 10


def test_preloading_keeps_no_more_pixels_than_crops_can_use():
    large = dataset_of([image_bytes(picture(300, 200, seed=i)) for i in range(8)])
    batches = TrainBatches(large, 16, 8, preload="host")
    assert batches.reader.images.shape == (8, 3, 32, 32)
    assert batches.reader.sizes.tolist() == [[200, 300]] * 8


# ------------------------------------------------------------------------------------------- streams


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("shards", [1, 4])
def test_streams_are_divided_without_overlap_and_start_anew(workers, shards):
    blobs = [image_bytes(picture(seed=i)) for i in range(32)]
    names = {np.asarray(picture(seed=i)).tobytes(): i for i in range(32)}
    seen, keys = [], {1: [], 2: [], 3: []}
    for rank in (0, 1):
        stream = dataset_of(blobs).to_iterable_dataset(num_shards=shards)
        batches = TrainBatches(stream, 16, 8, length=32, workers=workers, share=Share(rank, 2))
        records = [data.decode(r["image"]) for r in itertools.islice(batches.reader.crops._records(0), 16)]
        seen.append({names[np.asarray(image).tobytes()] for image in records})
        assert batches.steps_per_epoch == 4
        for epoch in keys:  # three times as many as this process's share
            got = list(batches.epoch(epoch))
            assert [batch.images.shape for batch in got] == [(4, 3, 16, 16)] * 4
            keys[epoch] += [i for batch in got for i in batch.indices.tolist()]
    assert not seen[0] & seen[1] and len(seen[0] | seen[1]) == 32
    assert all(len(set(some)) == len(some) == 32 for some in keys.values())


def counted_stream(sizes: list[int], opened: list, broken=(), dead=None) -> datasets.IterableDataset:
    """A stream of shards that notes which it opens; with ``broken`` pictures, and an error at the record ``dead``."""

    def rows(shards):
        for shard, size in shards:
            opened.append(shard)
            for i in range(size):
                if (shard, i) == dead:
                    raise ConnectionError("the line is dead")
                blob = b"broken" if (shard, i) in broken else image_bytes(picture(seed=100 * shard + i))
                yield {"image": dict(bytes=blob, path=f"{shard}-{i}.png")}

    features = datasets.Features(image=datasets.Image(decode=False))
    return datasets.IterableDataset.from_generator(rows, features, gen_kwargs=dict(shards=list(enumerate(sizes))))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("sizes", [[40], [9, 0, 13, 2, 5, 11]])
@pytest.mark.parametrize("known", [False, True])
def test_a_stream_continues_where_it_was_left(workers, world, sizes, known, monkeypatch):
    monkeypatch.setattr(StreamCrops, "block", 4)

    def batches(opened):
        stream = counted_stream(sizes, opened, broken=[(0, 3), (0, 7), (5, 2), (5, 9)], dead=(3, 1))
        return TrainBatches(stream, 16, 4, length=80, workers=workers, share=Share(world - 1, world), max_bad=0.5)

    whole = batches([])
    expected = list(whole.epoch(2))
    assert len(expected) == 20  # at least two passes
    for done in (1, 5, 14, 19):
        opened = []
        resumed = batches(opened)
        resumed.bad.add(bad for batch in expected[:done] for bad in batch.bad)
        resumed.lengths.update(whole.lengths if known else {})
        rest = list(resumed.epoch(2, seen=4 * done))
        assert len(rest) == 20 - done
        for one, other in zip(expected[done:], rest):
            assert torch.equal(one.images, other.images) and np.array_equal(one.indices, other.indices)
        assert resumed.bad.descriptions == whole.bad.descriptions
    if known and len(sizes) > 1 and not workers:  # the last four pictures lie in few shards
        assert 0 < len(opened) < len(sizes)


def test_a_stream_reports_the_lengths_of_the_pieces_it_has_read(monkeypatch):
    monkeypatch.setattr(StreamCrops, "block", 4)
    batches = TrainBatches(counted_stream([9, 13, 2], []), 16, 4, length=80, workers=2)
    list(batches.epoch(1))
    assert batches.lengths == {0: 9, 1: 13, 2: 2}


def test_workers_that_outnumber_the_shards_share_them():
    class NotedCrops(StreamCrops):
        def _pass(self, *arguments):
            records = list(super()._pass(*arguments))
            passes.append([record["image"]["path"] for record in records])
            yield from records
            return len(records)

    first = []
    for rank in range(7):
        passes: list[list[str]] = []
        stream = counted_stream([12, 0, 7], [])
        crops = NotedCrops(stream, CropOptions(16, (0.2, 1.0), 0, 1), 4, Share(rank, 7))
        list(itertools.islice(crops._records(0), 40))
        assert len(set(itertools.chain(*passes))) == 19  # in time, each process reads all
        first += passes[0]
    assert len(first) == len(set(first)) == 19


@pytest.mark.parametrize("limit", [None, 600])
def test_loose_files_of_a_stream_are_mixed(limit, monkeypatch):
    monkeypatch.setattr(StreamCrops, "block", 1)
    stream = counted_stream([1] * 768, [])
    crops = StreamCrops(stream.take(limit) if limit else stream, CropOptions(16, (0.2, 1.0), 0, 1), 4, Share(0, 1))
    shards = [int(r["image"]["path"].split("-")[0]) for r in itertools.islice(crops._records(0), limit or 768)]
    assert crops.pieces == 256 and len(set(shards)) == (limit or 768)
    assert np.median(np.abs(np.diff(shards))) > 50


def test_a_broken_shard_of_a_stream_hides_no_other():
    def rows(shards):
        for shard in shards:
            if shard == 3:
                raise ConnectionError("the line is dead")
            for i in range(10):
                yield {"image": dict(bytes=image_bytes(picture(seed=i)), path=f"{shard}-{i}.png")}

    features = datasets.Features(image=datasets.Image(decode=False))
    stream = datasets.IterableDataset.from_generator(rows, features, gen_kwargs=dict(shards=list(range(6))))
    for seed in range(6):
        crops = StreamCrops(stream, CropOptions(16, (0.2, 1.0), seed, 1), 4, Share(0, 1))
        records = list(itertools.islice(crops._records(0), 51))  # a pass
        assert sum(isinstance(record, ConnectionError) for record in records) == 1
        assert len({record["image"]["path"] for record in records if isinstance(record, dict)}) == 50


def test_a_stream_knows_its_length_by_its_description(tmp_path):
    rows = [dict(bytes=image_bytes(picture(seed=i)), path=None) for i in range(20)]
    features = datasets.Features(image=datasets.Image(decode=False))
    datasets.Dataset.from_dict({"image": rows}, features).to_parquet(tmp_path / "validation-00000-of-00001.parquet")
    with pytest.raises(ValueError, match="does not declare its number of images: set --max-images"):
        TrainBatches(data.load_images(str(tmp_path), "validation", streaming=True), 16, 8)
    card = "---\ndataset_info:\n  splits:\n  - name: validation\n    num_bytes: 1\n    num_examples: 20\n---\n"
    (tmp_path / "README.md").write_text(card)
    stream = data.load_images(str(tmp_path), "validation", streaming=True)
    assert TrainBatches(stream, 16, 8).length == 20


def test_a_stream_skips_and_counts_broken_pictures():
    stream = with_bad().to_iterable_dataset()
    batches = TrainBatches(stream, 16, 8, length=20, max_bad=0.9)
    assert len(list(batches.epoch(1))) == 2 and 1 <= batches.bad.count <= 4
    batches = TrainBatches(stream, 16, 8, length=20, max_bad=0.0)
    with pytest.raises(data.TooManyBadImages):
        for epoch in range(1, 4):
            list(batches.epoch(epoch))


def test_a_stream_of_nothing_but_broken_pictures_stops():
    stream = with_bad(20, range(20)).to_iterable_dataset()
    with pytest.raises(data.TooManyBadImages):
        list(TrainBatches(stream, 16, 8, length=20, max_bad=0.5).epoch(1))


def test_a_stream_counts_a_file_once_however_often_it_meets_it():
    rows = [dict(bytes=image_bytes(picture(seed=i)), path=f"{i}.png") for i in range(4)]
    rows[2]["bytes"] = b"broken"
    features = datasets.Features(image=datasets.Image(decode=False))
    stream = datasets.Dataset.from_dict({"image": rows}, features).to_iterable_dataset()
    batches = TrainBatches(stream, 16, 10, length=40, max_bad=0.05)
    for epoch in (1, 2, 3):
        assert len(list(batches.epoch(epoch))) == 4 and len(batches.bad.descriptions) > 2
        assert batches.bad.count == 1 and len(batches.bad.take_unreported()) == 1
        assert not batches.bad.take_unreported()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_that_breaks_starts_anew_and_is_counted(workers):
    def rows(shard):
        for i in range(20):
            if i == 13:
                raise ConnectionError("the line is dead")
            yield {"image": dict(bytes=image_bytes(picture(seed=i)), path=None)}

    features = datasets.Features(image=datasets.Image(decode=False))
    stream = datasets.IterableDataset.from_generator(rows, features, gen_kwargs=dict(shard=[0, 1]))
    batches = TrainBatches(stream, 16, 10, length=40, max_bad=0.2, workers=workers)
    got = list(batches.epoch(1))
    assert [len(batch.images) for batch in got] == [10] * 4 and 1 <= batches.bad.count <= 8
    assert all("ConnectionError: the line is dead" in text for text in batches.bad.descriptions.values())
    again = list(batches.epoch(1))
    assert all(torch.equal(a.images, b.images) for a, b in zip(got, again))
    with pytest.raises(data.TooManyBadImages, match="the line is dead"):
        list(TrainBatches(stream, 16, 10, length=40, max_bad=0.0, workers=workers).epoch(1))


def test_whole_pictures_of_a_stream_are_refused():
    with pytest.raises(ValueError, match="a stream has no index"):
        TrainBatches(with_bad().to_iterable_dataset(), 16, 8, length=20).uncropped()


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux only")
def test_workers_are_forked_whatever_the_default_of_python(monkeypatch):
    """A fork server, the default since 3.14, died of the signals that stop a run, and its workers with it."""
    monkeypatch.setattr(readers, "ignore_signals", lambda worker: None)  # no server could be sent this
    pictures = with_bad(8, ())
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("forkserver", force=True)
    try:
        for dataset in (pictures, pictures.to_iterable_dataset()):
            assert len(list(TrainBatches(dataset, 16, 8, length=8, workers=1).epoch(1))) == 1
            assert len(list(EvalBatches(dataset, 16, 8, workers=1))) == 1
        assert len(list(each_scene(Pictures(pictures, [], RGB), dict, 1, Share(0, 1)))) == 8
    finally:
        multiprocessing.set_start_method(before, force=True)


class Stuck(torch.utils.data.Dataset):
    """Answers the first request and waits for ever at the second."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        if index >= 2:
            lock = multiprocessing.Lock()
            lock.acquire()
            lock.acquire()
        return index


def test_workers_that_wait_for_ever_can_be_ended():
    """A worker killed while it held a lock left the others, and with them the whole run, waiting."""
    workers = Workers()
    loader = torch.utils.data.DataLoader(Stuck(), batch_size=None, **worker_options(2))
    items = workers.iterate(loader)
    assert [next(items), next(items)] == [0, 1]
    processes = set(workers.processes)
    assert len(processes) == 2
    time.sleep(0.5)
    for process in processes:
        process.terminate()  # as Python does when it exits
    time.sleep(0.5)
    assert all(process.is_alive() for process in processes)
    workers.end()
    for process in processes:
        process.join(10)
    assert not any(process.is_alive() for process in processes)
