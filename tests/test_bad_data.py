"""Odd and broken pictures do not stop or stall a run. Each is used, or else skipped, counted and named."""

import io
import os
import shutil
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from helpers import QUICK, ROOT, SMALL, image_bytes, needs_proc, picture, records, status, train_here
from PIL import Image

import data
import eval as judge
import pixels
import run
from batches import TrainBatches
from cropping import random_crops, uniform

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
    "PNG by content.jpg": image_bytes(picture(), "PNG"),
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
        crops = random_crops(sizes, uniform((0,), np.arange(1), 23))
        assert pixels.crop(image, crops.boxes[0], crops.flips[0], 224).shape == (3, 224, 224)
        assert data.center_crop(image, 224, 0.875).shape == (3, 224, 224)

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
    """Each of the names was counted and named once, and nothing else."""
    assert printed.count("skipped a broken image") == len(names)
    assert all(f"/{name}: " in printed for name in names)
    assert records(out)[-1]["bad_images"] == len(names) and len(records(out)) == 2


@pytest.mark.parametrize("extra", ["--workers 0", "--workers 2", "--preload", "--guide cached --workers 0"])
def test_a_run_skips_broken_pictures_and_names_each_once(extra, folder, quick_drawing, monkeypatch, tmp_path, capfd):
    arguments = [*TRAIN, *extra.split(), "--max-bad-images", 0.2, "--dataset", folder, "--out", tmp_path / "run"]
    train_here(monkeypatch, *arguments)
    check(tmp_path / "run", capfd.readouterr().out, BROKEN)


def test_a_streamed_run_skips_broken_pictures_and_names_each_once(folder, quick_drawing, monkeypatch, tmp_path, capfd):
    arguments = [*TRAIN, "--streaming", "--workers", 1, "--max-bad-images", 0.9, "--dataset", folder]
    train_here(monkeypatch, *arguments, "--epochs", 1, "--out", tmp_path / "run")
    printed = capfd.readouterr().out
    met = [name for name in BROKEN if f"/{name}: " in printed]
    assert len(met) >= 4 and records(tmp_path / "run")[0]["bad_images"] == printed.count("skipped a broken image")


def test_two_processes_add_up_their_broken_pictures(folder, tmp_path):
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
def test_files_that_vanish_or_cannot_be_read_during_a_run_are_skipped(
    workers, folder, quick_drawing, monkeypatch, tmp_path, capfd
):
    epoch, open_image = TrainBatches.epoch, Image.open

    def failing(file, *rest):
        if str(file).endswith("05.png"):
            raise OSError(5, "Input/output error", str(file))
        return open_image(file, *rest)

    def vanishing(self, number, seen=0):
        for name in ("03.png", "17.png"):
            (folder / name).unlink(missing_ok=True)
        return epoch(self, number, seen)

    monkeypatch.setattr(TrainBatches, "epoch", vanishing)
    monkeypatch.setattr(Image, "open", failing)
    arguments = [*TRAIN, "--workers", workers, "--max-bad-images", 0.2, "--dataset", folder]
    train_here(monkeypatch, *arguments, "--out", tmp_path / "run")
    printed = capfd.readouterr().out
    check(tmp_path / "run", printed, [*BROKEN, "03.png", "17.png", "05.png"])
    assert "17.png: FileNotFoundError" in printed and "05.png: OSError: [Errno 5] Input/output error" in printed


def test_too_many_broken_pictures_stop_a_run_before_it_writes_anything(folder, monkeypatch, tmp_path, capfd):
    arguments = [*TRAIN, "--workers", 0, "--dataset", folder, "--max-bad-images", 0, "--out", tmp_path / "run"]
    with pytest.raises(SystemExit):
        train_here(monkeypatch, *arguments)
    errors = [line for line in capfd.readouterr().err.splitlines() if "error:" in line]
    assert len(errors) == 1 and "of 60 images are broken, more than --max-bad-images 0.0:" in errors[0]
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------- shared memory


def no_room(*_):
    raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1_2_3>: No space left on device (28)")


def test_workers_without_room_in_shared_memory_end_the_run_with_a_line(monkeypatch, tmp_path, capfd):
    """The queue dropped the batch, and the training waited for ever."""
    monkeypatch.setattr(torch.Tensor, "share_memory_", no_room)
    with pytest.raises(SystemExit):
        train_here(monkeypatch, *QUICK, "--workers", 1, "--out", tmp_path / "run")
    assert "no room in shared memory (/dev/shm)" in capfd.readouterr().err
    arguments = ["embed", "--checkpoint", "random", *SMALL, "--max-images", 8, "--precision", "no", "--workers", 1]
    with pytest.raises(run.ProcessLost, match="no room in shared memory"):
        judge.main([*arguments, "--out", tmp_path / "embed"])


@pytest.mark.slow
def test_a_container_with_little_shared_memory_gets_a_line(tmp_path):
    command = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=700k tmpfs /dev/shm && exec "$@"', "sh"]
    if not shutil.which("unshare") or subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("this machine does not let a test mount a file system")
    arguments = [*QUICK, "--image-size", 64, "--max-images", 256, "--batch-size", 128, "--workers", 2]
    arguments = [sys.executable, "train.py", *map(str, arguments), "--out", str(tmp_path / "run")]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 1 and "no room in shared memory (/dev/shm)" in ended.stderr
