"""Helpers of several test modules. Heavy libraries are imported where they are needed."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent

SMALL = "--width 32 --depth 2 --heads 2 --decoder-width 16 --decoder-depth 1 --decoder-heads 2".split()
SMALL += ["--image-size", "32"]
QUICK = [*SMALL, *"--max-images 32 --batch-size 16 --epochs 2 --workers 0 --precision no".split()]

needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on the CPU")

# ------------------------------------------------------------------------------------------- pictures


def picture(width=40, height=30, seed=0) -> Image.Image:
    """A smooth colour picture, different for every seed."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def image_bytes(image: Image.Image, kind="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def dataset_of(blobs: list[bytes | None], labels: list[int] | None = None):
    """An undecoded data set of encoded pictures, as load_images returns it."""
    import datasets

    features = datasets.Features(image=datasets.Image(decode=False))
    columns = {"image": [None if blob is None else dict(bytes=blob, path=None) for blob in blobs]}
    if labels is not None:
        features["label"] = datasets.Value("int64")
        columns["label"] = labels
    return datasets.Dataset.from_dict(columns, features)


def with_bad(count=20, bad=(3, 4, 11, 15)):
    """A data set of ``count`` pictures, of which some are broken."""
    blobs = [image_bytes(picture(seed=i)) for i in range(count)]
    kinds = [b"", b"this is text", blobs[0][:100], None]
    for number, i in enumerate(bad):
        blobs[i] = kinds[number % 4]
    return dataset_of(blobs)


# ------------------------------------------------------------------------------------------- runs


def run(*arguments, script: str = "train.py") -> subprocess.CompletedProcess:
    """Run a script on the CPU, under ``accelerate launch``."""
    launch = ["accelerate.commands.launch", "--cpu", "--num_processes", 2, "--num_machines", 1]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    command = [str(x) for x in (sys.executable, "-m", *launch, script, *arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def train_here(monkeypatch, *arguments):
    """Run train.main() in this process."""
    import train

    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    train.main()


def contents(folder) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def records(out) -> list[dict]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------------- memory

needs_proc = pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="memory is measured on Linux")


def status(name: str) -> float:
    """A value in /proc/self/status, in MiB: VmRSS now, VmHWM at its peak, VmSize the address space."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1024
