"""The benchmark's commands, at sizes that take seconds: what they measure, not how fast."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import torch
from helpers import SMALL, train_here

import bench
import smae


@pytest.fixture
def run(monkeypatch, capsys):
    """A function that runs bench.py and returns what it printed."""

    def run(*arguments) -> str:
        monkeypatch.setattr(sys, "argv", ["bench.py", *map(str, arguments)])
        cache = datasets.config.HF_DATASETS_CACHE  # bench.py scale has one of its own
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
        threads = torch.get_num_threads()
        bench.main()
        torch.set_num_threads(threads)
        return capsys.readouterr().out

    return run


def test_made_up_photographs_have_as_many_bytes_as_real_ones():
    sizes = [len(bench.photograph(500, 375, seed)) for seed in (0, 1)]
    assert all(30_000 < size < 90_000 for size in sizes) and sizes[0] != sizes[1]


def test_load_reads_the_same_pictures_by_both(run, monkeypatch, tmp_path):
    read = Counter()
    for kind in (bench.ImageFolder, bench.MapCrops, bench.EvalCrops):

        def noted(self, which, kind=kind, get=kind.__getitem__):
            read.update((kind, int(i)) for i in np.atleast_1d(getattr(which, "indices", which)))
            return get(self, which)

        monkeypatch.setattr(kind, "__getitem__", noted)
    monkeypatch.setattr(bench, "PHOTOGRAPHS", {"60x40": 3})
    text = run("load", "--image-size", 16, "--repeats", 2, "--json", tmp_path / "load.json")
    assert "60x40" in text and text.count("ImageFolder, centre") == 1
    rounds = {bench.ImageFolder: 8, bench.MapCrops: 4, bench.EvalCrops: 4}  # two to warm up, two to measure
    assert read == {(kind, i): count for kind, count in rounds.items() for i in range(3)}
    seconds = json.loads((tmp_path / "load.json").read_text())["seconds"]
    assert set(seconds) == {
        f"60x40, {name}" for name in ("ImageFolder", "ours", "ImageFolder, centre", "ours, centre", "libjpeg alone")
    }
    assert all(len(values) == 2 and min(values) > 0 for values in seconds.values())


def test_scale_measures_opening_reading_and_resuming(run, tmp_path):
    sizes = ["--images", 1100, "--read", 256, "--model", "tiny", "--workers", 1]
    text = run("scale", *sizes, "--folder", tmp_path, "--json", tmp_path / "scale.json")
    assert "write 1,100 pictures" in json.loads((tmp_path / "scale.json").read_text())["seconds"]
    for words in ("write 1,100 pictures", "first batch of an epoch", "stream: first batch when resumed", "392 bytes"):
        assert words in text
    assert np.load(tmp_path / "relevance.npy").shape == (1100, 14, 14)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_a_shard_that_was_interrupted_is_written_again(monkeypatch, tmp_path):
    write, files = pyarrow.parquet.write_table, []

    def interrupted(table, file, **options):
        files.append(file)
        if len(files) == 2:
            Path(file).write_bytes(b"PAR1, and then nothing")
            raise KeyboardInterrupt
        write(table, file, **options)

    monkeypatch.setattr(pyarrow.parquet, "write_table", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bench.write_shards(tmp_path, 6, 3)
    bench.write_shards(tmp_path, 6, 3)
    assert len(files) == 4
    assert [pyarrow.parquet.read_metadata(file).num_rows for file in sorted(tmp_path.glob("data/*"))] == [2, 2, 2]


def test_guides_are_measured_on_crops_that_show_an_object(run, quick_drawing, monkeypatch, tmp_path):
    train_here(
        monkeypatch,
        *SMALL,
        *"--max-images 32 --batch-size 16 --epochs 1 --workers 0 --precision no".split(),
        "--out",
        tmp_path,
    )
    common = ["--checkpoint", tmp_path, "--dataset", "shapes:easy", "--max-images", 64, "--batch-size", 32]
    lines = run("guide", *common, "--repeats", 2).splitlines()
    rows = {line.rsplit(None, 2)[0].strip(): float(line.split()[-1]) for line in lines if "0." in line[30:46]}
    assert {"online, layer 1 of 2", "cached", "centre of the picture"} <= set(rows)
    assert rows["centre of the picture"] > 0.6 and all(0 <= value <= 1 for value in rows.values())


def test_facebookresearch_mae_is_measured_from_its_folder(tmp_path):
    (tmp_path / "models_mae.py").write_text(
        "class MaskedAutoencoderViT:\n    def __init__(self, **sizes):\n        self.sizes = sizes\n"
    )
    model = smae.SMAE(width=32, depth=2, heads=2, decoder_width=16, decoder_depth=1, decoder_heads=2, image_size=32)
    sizes = bench.mae_of(tmp_path, model).sizes
    assert (sizes["img_size"], sizes["embed_dim"], sizes["decoder_depth"], sizes["norm_pix_loss"]) == (32, 32, 1, True)
    assert str(tmp_path) not in sys.path


def test_the_peak_of_a_run_is_its_own(tmp_path):
    large = np.ones(2**26)  # half a GiB in this process
    small = subprocess.run([sys.executable, "-c", bench.PEAK, sys.executable, "-c", "pass"], capture_output=True)
    assert 0 < float(small.stdout) < 0.2 < large.nbytes / 2**30
    hungry = [sys.executable, "-c", bench.PEAK, sys.executable, "-c", "b'x' * 2**28"]
    assert 0.25 < float(subprocess.run(hungry, capture_output=True).stdout) < 0.4


@pytest.mark.slow
def test_everything_ends_in_a_table(run, tmp_path):
    run("all", "--tiny", "--out", tmp_path / "bench.md")
    text = (tmp_path / "bench.md").read_text()
    for title in ("Training step", "Bi-partition", "Whole runs", "Share of the ceiling", "Reading JPEGs"):
        assert f"## {title}" in text
