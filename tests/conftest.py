import os
import sys
import tempfile

if "PYTEST_XDIST_WORKER" in os.environ and hasattr(os, "sched_setaffinity"):  # a core each, for all that it starts
    cores = sorted(os.sched_getaffinity(0))
    number = int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw"))
    os.sched_setaffinity(0, {cores[number % len(cores)]})

if "PYTEST_XDIST_WORKER" not in os.environ:  # nothing comes from the cache of earlier runs, or stays in it
    cache = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)  # until the end of the run
    os.environ["HF_DATASETS_CACHE"] = cache.name

import pytest
import torch
from helpers import ROOT

os.fsync = lambda handle: None  # no test needs it, and a run of 20 steps would wait for the disk 220 times
sys.path.insert(0, str(ROOT))
LONGEST = "resume train dense eval reproduce pretended_device clusters guide safety smae masks readers hub pixels "
LONGEST += "report bad_data analyze convert data"
REAL = ROOT.parent / "shared" / "data"  # photographs for development, see its README; not part of the project

import undrawn  # noqa: E402

import shapes  # noqa: E402
import smae  # noqa: E402
import train  # noqa: E402


def pytest_configure(config):
    if hasattr(config.option, "loadscopereorder"):  # xdist hands out files in our order, not by their number of tests
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    """Files that take long come first, so that no worker idles at the end."""
    place = {f"test_{name}.py": number for number, name in enumerate(LONGEST.split())}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def small_model():
    """A model of 4 x 4 patches, small enough for anything."""
    return smae.SMAE(
        width=32,
        depth=3,
        heads=2,
        decoder_width=16,
        decoder_depth=2,
        decoder_heads=2,
        image_size=32,
        patch_size=8,
    ).eval()


@pytest.fixture
def photographs():
    """A function that gives the path of a real data set, or skips the test where it is not at hand."""

    def path(name: str) -> str:
        if not (REAL / name).is_dir():
            pytest.skip(f"real photographs ({name}) are not on this machine")
        return str(REAL / name)

    return path


@pytest.fixture
def quick_drawing(monkeypatch):
    """Runs draw no pictures, which take longer than they."""
    monkeypatch.setattr(train, "draw", undrawn.draw)


@pytest.fixture
def photos(tmp_path):
    """A folder of 40 pictures, one of them broken."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, row in enumerate(shapes.draw_shapes("test", 40, 32)):
        row["image"].save(folder / f"{i:02d}.png")
    (folder / "17.png").write_bytes(b"not a picture")
    return folder
