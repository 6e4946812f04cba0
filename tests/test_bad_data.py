"""Whatever lies among the pictures: none of it stops or stalls a run; each is used, or skipped, counted and named."""

import io
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import datasets
import forked
import numpy as np
import pytest
import torch
from PIL import Image
from test_data import image_bytes, picture
from test_safety import needs_proc, status
from test_train import SMALL, records, train_here

import data

TRAIN = [*SMALL, *"--max-images 60 --batch-size 12 --epochs 2 --guide-start 1 --precision no".split()]


def animated() -> bytes:
    buffer = io.BytesIO()
    frames = [picture(seed=i).quantize(64) for i in range(3)]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def bomb() -> bytes:
    """20,000 x 20,000 pixels in 50 kB: 1.2 GB as RGB."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = zlib.compress(bytes(2501 * 20_000), 9)  # of one bit a pixel, and a byte that says how they are filtered
    header = chunk(b"IHDR", struct.pack(">2I5B", 20_000, 20_000, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def sixteen_bits(height: int = 30, width: int = 40) -> Image.Image:
    return Image.fromarray((np.arange(height * width) % 1200 * 50).astype(np.uint16).reshape(height, width))


USABLE = {  # content of a file
    "1 x 1.png": image_bytes(picture(1, 1)),
    "1 x 10000.png": image_bytes(picture(1, 10_000)),
    "10000 x 1.jpg": image_bytes(picture(10_000, 1), "JPEG"),
    "16 bit.png": image_bytes(sixteen_bits()),
    "16 bit.tif": image_bytes(sixteen_bits(), "TIFF"),
    "16 bit, large.png": image_bytes(sixteen_bits(2400, 3000)),
    "CMYK.jpg": image_bytes(picture().convert("CMYK"), "JPEG"),
    "animated.gif": animated(),
    "a picture of another kind than its name says.jpg": image_bytes(picture(), "PNG"),
    "transparent.png": image_bytes(picture().convert("RGBA")),
}
BROKEN = {
    "truncated.jpg": image_bytes(picture(200, 200), "JPEG")[:900],
    "truncated.png": image_bytes(picture(200, 200))[:900],
    "zero bytes.jpg": b"",
    "text.jpg": b"This is not a picture, whatever its name says.\n" * 20,
    "bomb.png": bomb(),
    "header only.png": image_bytes(picture())[:33],
    "zeros.jpg": bytes(5000),
}


def mebibytes_used(use: Callable) -> float:
    """Memory in use at the peak of a call, above that before it."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    use()
    return status("VmHWM") - before


@needs_proc
@pytest.mark.parametrize("name", USABLE)
def test_odd_pictures_are_decoded_cropped_and_centred_in_little_memory(name):
    def use():
        image = data.decode({"bytes": USABLE[name], "path": None})
        assert image.mode == "RGB" and min(image.size) >= 1
        sizes = np.array([(image.height, image.width)])
        crops = data.random_crops(sizes, data.uniform((0,), np.arange(1), 23))
        assert data.crop(image, crops.boxes[0], crops.flips[0], 224).shape == (3, 224, 224)
        assert data.center_crop(image, 224, 256).shape == (3, 224, 224)

    start = time.perf_counter()
    assert mebibytes_used(use) < 100
    assert time.perf_counter() - start < 5


@needs_proc
@pytest.mark.parametrize("name", BROKEN)
def test_broken_pictures_raise_at_once_and_take_no_memory(name):
    def use():
        with pytest.raises(Exception, match=r"."):
            data.decode({"bytes": BROKEN[name], "path": None})

    start = time.perf_counter()
    assert mebibytes_used(use) < 20
    assert time.perf_counter() - start < 5


def test_a_batch_of_a_data_set_that_is_gone_does_not_try_it_all_again_and_again():
    gone = datasets.Dataset.from_dict(
        {"image": [dict(bytes=None, path=f"/nowhere/{i}.png") for i in range(1000)]},
        datasets.Features(image=datasets.Image(decode=False)),
    )
    crops = data.MapCrops(gone, data.CropOptions(16, (0.2, 1.0), 0, tries=100))
    batch = crops[1, np.arange(64)]
    assert len(batch.images) == 64 and len(batch.bad) < 200


def test_a_stream_counts_a_file_once_however_often_it_meets_it():
    rows = [dict(bytes=image_bytes(picture(seed=i)), path=f"{i}.png") for i in range(4)]
    rows[2]["bytes"] = b"broken"
    features = datasets.Features(image=datasets.Image(decode=False))
    stream = datasets.Dataset.from_dict({"image": rows}, features).to_iterable_dataset()
    batches = data.TrainBatches(stream, 16, 10, length=40, max_bad=0.05)
    assert len(list(batches.epoch(1))) == 4 and len(batches.bad) > 2
    assert batches.bad_count() == 1 and len(batches.news()) == 1 and not batches.news()


@pytest.fixture
def folder(tmp_path):
    """43 good pictures, 10 odd ones, 7 broken ones."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(60 - len(USABLE) - len(BROKEN)):
        picture(seed=i).save(folder / f"{i:02d}.png")
    for name, content in (USABLE | BROKEN).items():
        (folder / name).write_bytes(content)
    return folder


def check(out, printed: str, names):
    """Each of the names was counted and named once, nothing else was."""
    assert printed.count("skipped a broken image") == len(names)
    assert all(f"/{name}: " in printed for name in names)
    assert records(out)[-1]["bad_images"] == len(names) and len(records(out)) == 2


@pytest.mark.parametrize("extra", ["--workers 0", "--workers 2", "--preload", "--guide cached --workers 0"])
def test_a_run_gets_through_whatever_lies_among_the_pictures(extra, folder, monkeypatch, tmp_path, capfd):
    arguments = [*TRAIN, *extra.split(), "--max-bad-images", 0.2, "--dataset", folder, "--out", tmp_path / "run"]
    train_here(monkeypatch, *arguments)
    check(tmp_path / "run", capfd.readouterr().out, BROKEN)


def test_a_stream_gets_through_whatever_lies_among_the_pictures(folder, monkeypatch, tmp_path, capfd):
    arguments = [*TRAIN, "--streaming", "--workers", 1, "--max-bad-images", 0.9, "--dataset", folder]
    train_here(monkeypatch, *arguments, "--epochs", 1, "--out", tmp_path / "run")
    printed = capfd.readouterr().out
    met = [name for name in BROKEN if f"/{name}: " in printed]
    assert len(met) >= 4 and records(tmp_path / "run")[0]["bad_images"] == printed.count("skipped a broken image")


def test_two_processes_get_through_it_too_and_count_together(folder, tmp_path):
    arguments = [*TRAIN, "--workers", 1, "--dataset", folder, "--out", tmp_path / "run"]
    processes = forked.start(tmp_path / "log", *arguments, "--max-bad-images", 0.2, world=2)
    assert forked.finish(processes, 60) == [0, 0]
    check(tmp_path / "run", (tmp_path / "log-0").read_text(), BROKEN)
    # each process meets fewer broken pictures than 6 of 60, both together 7
    processes = forked.start(tmp_path / "log", *arguments, "--overwrite", "--max-bad-images", 0.101, world=2)
    assert forked.finish(processes, 60) == [1, 1]
    texts = [(tmp_path / f"log-{rank}").read_text() for rank in (0, 1)]
    assert "7 of 60 images are broken, more than --max-bad-images 0.101" in texts[0]
    assert all(f"/{name}: " in texts[0] for name in BROKEN) and "Traceback" not in texts[0] + texts[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_files_that_vanish_or_cannot_be_read_during_a_run_are_skipped(workers, folder, monkeypatch, tmp_path, capfd):
    """The second is a read error of the disk."""
    epoch, open_image = data.TrainBatches.epoch, Image.open

    def failing(file, *rest):
        if str(file).endswith("05.png"):
            raise OSError(5, "Input/output error", str(file))
        return open_image(file, *rest)

    def vanishing(self, number, seen=0):
        for name in ("03.png", "17.png"):
            (folder / name).unlink(missing_ok=True)
        return epoch(self, number, seen)

    monkeypatch.setattr(data.TrainBatches, "epoch", vanishing)
    monkeypatch.setattr(Image, "open", failing)
    arguments = [*TRAIN, "--workers", workers, "--max-bad-images", 0.2, "--dataset", folder]
    train_here(monkeypatch, *arguments, "--out", tmp_path / "run")
    printed = capfd.readouterr().out
    check(tmp_path / "run", printed, [*BROKEN, "03.png", "17.png", "05.png"])
    assert "17.png: FileNotFoundError" in printed and "05.png: OSError: [Errno 5] Input/output error" in printed


def test_a_table_that_cannot_be_read_in_places_is_skipped_there(monkeypatch):
    class Failing(datasets.Dataset):
        def __getitem__(self, key):
            if key in (3, 4):
                raise OSError("read error")
            return super().__getitem__(key)

    features = datasets.Features(image=datasets.Image(decode=False))
    rows = [dict(bytes=image_bytes(picture(seed=i)), path=None) for i in range(8)]
    dataset = datasets.Dataset.from_dict({"image": rows}, features)
    dataset.__class__ = Failing
    image, _, bad = data.decode_or_next(dataset, 3, tries=5)
    assert [what.description for what in bad] == ["image 3: OSError: read error", "image 4: OSError: read error"]
    assert np.array_equal(np.asarray(image), np.asarray(picture(seed=5)))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_that_breaks_starts_anew_and_is_counted(workers):
    calls = []

    def rows(shard):
        calls.append(shard)
        for i in range(20):
            if i == 13:
                raise ConnectionError("the line is dead")
            yield {"image": dict(bytes=image_bytes(picture(seed=i)), path=None)}

    features = datasets.Features(image=datasets.Image(decode=False))
    stream = datasets.IterableDataset.from_generator(rows, features, gen_kwargs=dict(shard=[0, 1]))
    batches = data.TrainBatches(stream, 16, 10, length=40, max_bad=0.2, workers=workers)
    got = list(batches.epoch(1))
    assert [len(batch.images) for batch in got] == [10] * 4 and 1 <= len(batches.bad) <= 8
    assert all("ConnectionError: the line is dead" in text for text in batches.bad.values())
    again = list(batches.epoch(1))
    assert all(torch.equal(a.images, b.images) for a, b in zip(got, again))
    with pytest.raises(data.TooManyBadImages, match="the line is dead"):
        list(data.TrainBatches(stream, 16, 10, length=40, max_bad=0.0, workers=workers).epoch(1))


def test_every_kind_of_it_is_named_where_only_it_is_too_much(folder, monkeypatch, tmp_path, capfd):
    arguments = [*TRAIN, "--workers", 0, "--dataset", folder, "--max-bad-images", 0, "--out", tmp_path / "run"]
    with pytest.raises(SystemExit):
        train_here(monkeypatch, *arguments)
    errors = [line for line in capfd.readouterr().err.splitlines() if "error:" in line]
    assert len(errors) == 1 and "of 60 images are broken, more than --max-bad-images 0.0:" in errors[0]
    assert not (tmp_path / "run").exists()
