"""Hostile files are loaded or refused in little memory and time; files are written whole or not at all.

Loads run in another process with a limited address space: ``python tests/test_safety.py load PATH ...`` or
``python tests/test_safety.py fuzz FOLDER SEED FIRST COUNT``. A failing test prints the command for one case.
"""

import argparse
import ast
import copy
import errno
import io
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
import traceback
import warnings
import zipfile
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from helpers import needs_proc, status  # noqa: E402

import smae  # noqa: E402

SECONDS, MEBIBYTES, ADDRESS_SPACE = 5, 150, 2**30  # for one load: time, memory in use, bytes that can be asked for
TINY = dict(width=16, depth=2, heads=2, decoder_width=8, decoder_depth=1, decoder_heads=2, image_size=8, patch_size=4)


def model(**changes) -> smae.SMAE:
    return smae.SMAE(**TINY | changes)


# ------------------------------------------------------------------------------------------- the other process


def try_load(path: str) -> dict:
    """The result of smae.load(path): outcome, message, seconds, and by how many MiB the peak rose."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, start, message = status("VmRSS"), time.monotonic(), ""
    signal.alarm(3 * SECONDS)  # ends the process even inside C code
    try:
        smae.load(path)
        outcome = "loaded"
    except (ValueError, FileNotFoundError) as error:
        outcome, message = type(error).__name__, str(error)
        if not message.isprintable() or len(message) > 1000 or str(path) not in message:
            outcome = "a message that is long, of several lines, or without the path"
    except BaseException:
        outcome, message = "another exception", traceback.format_exc()
    signal.alarm(0)
    seconds = time.monotonic() - start
    return dict(outcome=outcome, message=message, seconds=seconds, mebibytes=status("VmHWM") - before)


def work(arguments: list[str]):
    """Run in the other process: print a line of JSON before each load and one after it."""
    torch.set_num_threads(1)
    space = int(status("VmSize") * 2**20) + ADDRESS_SPACE
    resource.setrlimit(resource.RLIMIT_AS, (space, space))

    def tell(**what):
        print(json.dumps(what), flush=True)

    if arguments[0] == "load":
        for path in arguments[1:]:
            tell(path=path)
            tell(path=path, **try_load(path))
    else:
        folder, seed, first, count = Path(arguments[1]), *map(int, arguments[2:])
        for path in sorted((folder / "valid").iterdir()):  # imports everything, so that imports are not measured
            assert try_load(str(path))["outcome"] == "loaded", path
        for number in range(first, first + count):
            kind, path = mutated(folder, seed, number)
            tell(number=number, kind=kind)
            tell(number=number, kind=kind, **try_load(str(path)))


def results_of(*arguments) -> tuple[list[dict], dict | None]:
    """The results of the other process, and the load that ended it early, if one did."""
    command = [sys.executable, __file__, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=3000)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    results = [line for line in lines if "outcome" in line]
    if done.returncode == 0:
        return results, None
    assert lines and "outcome" not in lines[-1], f"{command} did not work: {done.stderr}"
    return results, lines[-1] | dict(outcome=f"ended with {done.returncode}", message=done.stderr[-2000:])


def faults(results: list[dict]) -> list[dict]:
    """Results that are wrong, slow or large. torch may ask for much memory, and not get it, for a pickle."""

    def wrong(outcome: str, message: str, seconds: float, mebibytes: float, **file) -> bool:
        asked = "memory" in message and not file.get("kind", file.get("path", "")).endswith((".pth", ".bin"))
        good = outcome in ("loaded", "ValueError", "FileNotFoundError")
        return asked or not good or seconds > SECONDS or mebibytes > MEBIBYTES

    return [result for result in results if wrong(**result)]


# ------------------------------------------------------------------------------------------- hostile files by hand


def changed_folder(format: str, part: str | None = None, classes: tuple = (), /, **changes):
    """A folder of ours with changes in its config.json, or in a part of it; None removes a key."""

    def make(folder: Path):
        smae.save(smae.Classifier(model(), classes) if classes else model(), folder, format=format)
        change_json(folder / "config.json", part, changes)

    return make


run_folder = partial(changed_folder, "smae", "model")
classifier_folder = partial(changed_folder, "smae", "classifier", ("cat", "dog"))


def change_json(file: Path, part: str | None, changes: dict):
    content = json.loads(file.read_text())
    inner = content[part] if part else content
    inner |= changes
    for name in [name for name, value in changes.items() if value is None]:
        del inner[name]
    file.write_text(json.dumps(content))


def config_of(content):
    """A folder of ours with another config.json: text, bytes, or a function that makes the file."""

    def make(folder: Path):
        smae.save(model(), folder)
        file = folder / "config.json"
        file.unlink()
        if callable(content):
            content(file)
        else:
            file.write_bytes(content.encode() if isinstance(content, str) else content)

    return make


def safetensors_file(header: dict | bytes, length: int | None = None, data: bytes = b""):
    def make(folder: Path):
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        count = struct.pack("<Q", len(text) if length is None else length)
        (folder / "x.safetensors").write_bytes(count + text + data)
        return folder / "x.safetensors"

    return make


def tensors_file(change):
    """Tensors with the names of facebookresearch/mae, changed, in a file by PyTorch."""

    def make(folder: Path):
        smae.save(model(), folder / "x.pth", format="mae")
        tensors = torch.load(folder / "x.pth", weights_only=True)["model"]
        torch.save({"model": change(tensors)}, folder / "x.pth")
        return folder / "x.pth"

    return make


def rewritten(change, compress: int = zipfile.ZIP_STORED):
    """A file by PyTorch with one tensor of 54321 numbers, and a change in the pickle that describes it."""

    def make(folder: Path):
        torch.save({"norm.weight": torch.zeros(54321)}, folder / "old.pth")
        with zipfile.ZipFile(folder / "old.pth") as old, zipfile.ZipFile(folder / "x.pth", "w", compress) as new:
            for name in old.namelist():
                new.writestr(name, change(old.read(name)) if name.endswith("data.pkl") else old.read(name))
        return folder / "x.pth"

    return make


def pth_file(content):
    """A file with this content, saved by PyTorch, or with these bytes."""

    def make(folder: Path):
        write = Path.write_bytes if isinstance(content, bytes) else lambda file, content: torch.save(content, file)
        write(folder / "x.pth", content)
        return folder / "x.pth"

    return make


CYCLE = {}
CYCLE["model"] = CYCLE

HOSTILE = {  # how to make the file, and the message; None: it can be loaded
    # our own config.json
    "a width of 10**9": (run_folder(width=10**9), "width must be an integer above 0 and at most 65536, got 1000000000"),
    "a width that takes terabytes": (run_folder(width=65536), "of another shape"),
    "a depth of 10**9": (run_folder(depth=10**9), "depth must be an integer above 0 and at most 256"),
    "a depth of 10**400": (run_folder(depth=10**400), "depth must be an integer"),
    "a depth beyond the file": (run_folder(depth=256), r"missing: blocks\.2\."),
    "an image of 10**7 pixels": (run_folder(image_size=10**7, patch_size=1), "more than 65536 patches of 1"),
    "learned positions of a large grid": (run_folder(image_size=1024, learned_positions=True), r"missing: positions"),
    "a patch of gigabytes": (run_folder(image_size=4096, patch_size=4096, channels=4096), "of another shape"),
    "an image size that is text": (run_folder(image_size="8"), "image_size must be a list of 2 numbers, got '8'"),
    "heads that are text": (run_folder(heads="2"), "heads must be an integer above 0 and at most 65536, got '2'"),
    "mlp_ratio of 1000": (run_folder(mlp_ratio=1000), r"of another shape: blocks\.0\.mlp"),
    "an unknown argument": (run_folder(**{"x\n" * 5000: 1}), "cannot be loaded: TypeError: .*unexpected keyword"),
    "a missing argument": (run_folder(width=None), "cannot be loaded: TypeError: .*width"),
    "a model that is a list": (config_of('{"model": [1]}'), "TypeError: .*must be a mapping, not list"),
    "no model but a list": (config_of("[1]"), "config.json must hold a JSON object, got a list"),
    "JSON of 100,000 levels": (config_of("[" * 100_000), "config.json is not JSON: (maximum recursion|Stack)"),
    "JSON of 5 MiB": (config_of('{"model": {}}' + " " * 5 * 2**20), "too large for a configuration"),
    "a sparse config.json of 1 TiB": (
        config_of(lambda file: file.touch() or os.truncate(file, 2**40)), "too large for",
    ),
    "bytes instead of JSON": (config_of(bytes(range(256))), "config.json is not JSON"),
    "an integer of 10**6 digits": (config_of('{"model": ' + "9" * 10**6 + "}"), "not JSON|must be a mapping"),
    "a folder instead of a config.json": (config_of(Path.mkdir), "it has no config.json"),
    "a pipe instead of a config.json": (config_of(os.mkfifo), "it has no config.json"),
    "an endless config.json": (config_of(lambda file: file.symlink_to("/dev/zero")), "it has no config.json"),
    "a config.json that is its own link": (config_of(lambda file: file.symlink_to(file)), "it has no config.json"),
    # classifiers
    "classes that are text": (classifier_folder(classes="ab"), "classes must be a list of names, got 'ab'"),
    "no classes": (classifier_folder(classes=[]), "classes must be a list of names"),
    "100,000 classes": (classifier_folder(classes=["x"] * 100_000), r"another shape: head\.weight \(2, 16\)"),
    "an unknown pooling": (classifier_folder(pool=["mean"]), "pool must be cls or mean, got a list"),
    "drop_path that is text": (classifier_folder(drop_path="x"), "drop_path must be a number .* got 'x'"),
    "a classifier with a decoder of terabytes": (
        changed_folder("smae", "model", ("cat", "dog"), decoder_depth=256, decoder_width=2**16), None,
    ),
    # the configurations of others
    "transformers: heads that are text": (changed_folder("transformers", num_attention_heads="2"), "heads must be"),
    "transformers: an image of 10**9": (changed_folder("transformers", image_size=10**9), "more than 65536 patches"),
    "transformers: a large image": (
        changed_folder("transformers", image_size=1024), r"another shape: positions \(5, 16",
    ),
    "timm: model_args that is a list": (changed_folder("timm", model_args=[1]), "must be a dictionary, got a list"),
    "timm: an image of 10**9": (changed_folder("timm", "model_args", img_size=10**9), "more than 65536 patches"),
    # safetensors
    "a header of 2**60 bytes": (safetensors_file({}, 2**60), "SafetensorError: Error while"),
    "no tensors": (safetensors_file({}), "not a supported ViT"),
    "a header of 100,000 levels": (safetensors_file(b'{"a":' * 100_000), "SafetensorError: Error while"),
    "a shape of 2**40": (
        safetensors_file({"pos_embed": dict(dtype="F32", shape=[2**40], data_offsets=[0, 4])}, data=b"1234"),
        "SafetensorError: Error while",
    ),
    "zero times 2**40": (
        safetensors_file({"patch_embed.proj.weight": dict(dtype="F32", shape=[2**40, 3, 0, 4], data_offsets=[0, 0]),
                          "pos_embed": dict(dtype="F32", shape=[1, 0, 2**40], data_offsets=[0, 0])}),
        "its patches are empty",
    ),
    "a name of control characters": (
        safetensors_file({"\x1b[2J\n\u202e\ud800" * 50: dict(dtype="F32", shape=[0], data_offsets=[0, 0])}),
        "SafetensorError|not a supported ViT",
    ),
    # PyTorch's files
    "a block of number 9999999999": (
        tensors_file(lambda t: t | {"blocks.9999999999.é\n\x1b[2J\u202e\ud800": torch.ones(1)}),
        r"missing: blocks\.2\..*9999999999\.é \\x1b",
    ),
    "5,000 blocks": (
        tensors_file(lambda t: t | {f"blocks.{i}.x": torch.ones(1) for i in range(5000)}), "depth must be an integer",
    ),
    "a width of 2**20": (
        tensors_file(lambda t: t | {"patch_embed.proj.weight": torch.zeros(2**20, 3, 1, 1)}), "width must be an integer"
    ),
    "an expanded tensor": (
        tensors_file(lambda t: t | {"norm.weight": torch.zeros(1).expand(10**10)}), "claims more numbers than it holds"
    ),
    "one tensor by 1,000 names": (
        tensors_file(lambda t: t | dict.fromkeys(map("blocks.{}.x".format, range(1000)), torch.zeros(10**6))), "claims",
    ),
    "a sparse tensor of 10**12 numbers": (
        tensors_file(lambda t: t | {"norm.weight": torch.sparse_coo_tensor([[0]], [1.0], [10**12])}), "sparse",
    ),
    "a sparse tensor that fits": (tensors_file(lambda t: t | {"norm.weight": torch.ones(16).to_sparse()}), "sparse"),
    "a quantized tensor": (
        tensors_file(lambda t: t | {"norm.weight": torch.quantize_per_tensor(torch.ones(16), 0.1, 0, torch.qint8)}),
        "quantized|must hold tensors and plain values only",
    ),
    "a tensor of the meta device": (
        tensors_file(lambda t: t | {"norm.weight": torch.empty(16, device="meta")}), "meta tensors",
    ),
    "a number as a name": (tensors_file(lambda t: t | {7: torch.ones(1)}), None),
    "complex numbers": (tensors_file(lambda t: t | {"norm.weight": torch.ones(16, dtype=torch.cfloat)}), None),
    "a convolution of no dimensions": (
        tensors_file(lambda t: t | {"patch_embed.proj.weight": torch.ones(())}), "not a supported ViT",
    ),
    "positions of one dimension": (tensors_file(lambda t: t | {"pos_embed": torch.ones(5)}), "not a supported ViT"),
    "an MLP of no dimensions": (tensors_file(lambda t: t | {"blocks.0.mlp.fc1.weight": torch.ones(())}), "TypeError"),
    "a zip bomb": (rewritten(lambda text: text + bytes(2**24), zipfile.ZIP_DEFLATED), "compressed, which torch.save"),
    "a tensor larger than its record": (
        rewritten(lambda text: text.replace(b"M\x31\xd4", b"J" + struct.pack("<i", 10**9))), "plain values only",
    ),
    "a dictionary within itself": (pth_file(CYCLE), "holds no model"),
    "args that are a number": (pth_file({"args": 3, "model": {}}), "holds no model"),
    "a list of tensors": (pth_file([torch.ones(3)]), "holds no model"),
    "an empty file": (pth_file(b""), "plain values only"),
    "a pickle that PyTorch did not write": (pth_file(pickle.dumps({"a": 1}, 2)), "plain values only"),
    "a zip archive of nothing": (pth_file(b"PK\5\6" + bytes(18)), "plain values only"),
    "the beginning of a zip archive": (pth_file(b"PK\3\4" + bytes(100)), "plain values only"),
    "a pipe": (lambda folder: os.mkfifo(folder / "x.pth") or folder / "x.pth", "there is no checkpoint"),
}  # fmt: skip


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """The result for each hostile file. One process loads all; where one ends it, the next goes on."""
    paths, results = {}, {}
    for i, (name, (make, _)) in enumerate(HOSTILE.items()):
        folder = tmp_path_factory.mktemp(f"hostile{i}")
        paths[name] = str(make(folder) or folder)
    valid = tmp_path_factory.mktemp("valid")
    smae.save(model(), valid / "ours")
    smae.save(model(), valid / "mae.pth", format="mae")
    left = list(paths.values())
    while left:
        done, died = results_of("load", valid / "ours", valid / "mae.pth", *left)
        done = [*done[2:], *filter(None, [died])]
        results |= {result["path"]: result for result in done}
        left = left[len(done) :]
    return {name: results[path] for name, path in paths.items()}


@needs_proc
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_in_one_line_within_little_memory_and_time(name, outcomes):
    result, message = outcomes[name], HOSTILE[name][1]
    assert not faults([result]), result
    assert (result["outcome"] == "loaded") == (message is None), result
    assert re.search(message or "", result["message"]), result


class Command:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("kind", ["zipped", "legacy", "plain"])
def test_code_in_a_pickle_is_not_run(kind, tmp_path):
    file, trace = tmp_path / "x.pth", tmp_path / "it was run"
    content = {"model": {"norm.weight": torch.ones(16)}, "args": Command(f"touch '{trace}'")}
    if kind == "plain":
        file.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=kind == "zipped")
    with pytest.raises(ValueError, match="plain values only"):
        smae.load(file)
    assert not trace.exists()
    if kind == "plain":
        pickle.loads(file.read_bytes())
        assert trace.exists(), "this test could not fail"


# ------------------------------------------------------------------------------------------- fuzz


def write_valid(folder: Path):
    """Write a small checkpoint of each kind that load() reads."""
    torch.manual_seed(0)  # for the same bytes each time
    small = model(channels=1)
    smae.save(small, folder / "ours", config={"train": {"epochs": 3, "name": ["x", None, 0.5]}})
    smae.save(smae.Classifier(small, ["cat", "dog"]), folder / "classifier")
    smae.save(small, folder / "transformers", format="transformers")
    smae.save(smae.Classifier(small, ["cat", "dog"]), folder / "timm", format="timm")
    shutil.copy(folder / "timm" / "model.safetensors", folder / "bare.safetensors")
    smae.save(small, folder / "mae.pth", format="mae")
    content = torch.load(folder / "mae.pth", weights_only=True)
    content |= {"args": argparse.Namespace(**content["args"], betas=(0.9, 0.95)), "optimizer": {"state": {0: 1.5}}}
    content["model"] = torch.nn.Module().state_dict() | content["model"]  # with its _metadata
    torch.save(content, folder / "mae.pth")
    torch.save(content, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    shutil.copytree(folder / "transformers", folder / "bin")
    weights = safetensors.torch.load_file(folder / "bin" / "model.safetensors")
    (folder / "bin" / "model.safetensors").unlink()
    torch.save({name: torch.nn.Parameter(t) for name, t in weights.items()}, folder / "bin" / "pytorch_model.bin")


STRANGE = [None, True, -1, 0, 1, 3, 2**16, 2**31, 2**63, -(2**63), 10**9, 10**18, 10**400, 0.5, 1e308]
STRANGE += [float("nan"), float("inf"), "", "x", "8", "\n\x1b\u202e", [], [[[[[]]]]], {}, {"a": {"b": []}}]
STRANGE += [[8, 8], [10**9, 10**9], [1] * 1000]
STRANGE_TENSORS = [torch.flatten, torch.sum, torch.Tensor.half, torch.Tensor.long, torch.Tensor.bool]
STRANGE_TENSORS += [lambda t: t[None], lambda t: t[:0], lambda t: t[:1], lambda t: torch.cat([t, t]), lambda t: t / 0]
UNUSUAL_TENSORS = [lambda t: t.to("meta"), lambda t: t.to_sparse(), lambda t: t.expand(1000, *t.shape)]


def flip(data: bytes, dice: random.Random) -> bytes:
    data = bytearray(data)
    for _ in range(dice.choice([1, 1, 2, 5, 50])):
        data[dice.randrange(len(data))] = dice.choice([0, 0xFF, dice.randrange(256)])
    return bytes(data)


def cut(data: bytes, dice: random.Random) -> bytes:
    """Truncate, splice, duplicate or delete a range, or overwrite 4 or 8 bytes by an integer."""
    a, b = sorted(dice.randrange(len(data) + 1) for _ in range(2))
    b = min(b, a + dice.choice([1, 8, 64, len(data)]))
    c = dice.randrange(len(data) + 1)
    integer = dice.choice([2**31, 2**62, -1, 0, len(data)]).to_bytes(8, "little", signed=True)[: dice.choice([4, 8])]
    ways = [data[:a], data[:c] + data[a:b] + data[c:], data[:c] + data[a:b] + data[c + b - a :], data[:a] + data[b:]]
    return dice.choice([*ways, data[:a] + integer + data[a + len(integer) :]])


def change_value(content, dice: random.Random):
    """Replace, remove, double or copy one value in nested lists and dictionaries."""
    nodes, found = [content], []
    while nodes:
        node = nodes.pop()
        places = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else []
        found += [(node, place) for place in places]
        nodes += [node[place] for place in places]
    if not found or dice.random() < 0.02:
        return copy.deepcopy(dice.choice(STRANGE))
    node, place = dice.choice(found)
    way = dice.randrange(5)
    if way < 2 and isinstance(node[place], torch.Tensor):
        node[place] = dice.choice(STRANGE_TENSORS + UNUSUAL_TENSORS)(node[place].detach())
    elif way < 2:
        node[place] = copy.deepcopy(dice.choice(STRANGE))
    elif way == 2:
        del node[place]
    elif way == 3 and isinstance(node, dict):
        node[dice.choice(["", "x", "model", "classifier", f"{place}.0", "blocks.99999999999.x"])] = node[place]
    else:
        other, where = dice.choice(found)
        node[place] = copy.deepcopy(other[where]) if where in range(len(other)) or where in other else None
    return content


def mutate_json(data: bytes, dice: random.Random) -> bytes:
    content = json.loads(data)
    for _ in range(dice.choice([1, 1, 2, 4])):
        content = change_value(content, dice)
    return json.dumps(content).encode()


def mutate_header(data: bytes, dice: random.Random) -> bytes:
    """Change the header of a safetensors file: names, types, shapes and offsets as JSON."""
    (length,) = struct.unpack("<Q", data[:8])
    header, data = json.loads(data[8 : 8 + length]), data[8 + length :]
    text = json.dumps(change_value(header, dice)).encode()
    return struct.pack("<Q", len(text)) + text + data


def mutate_tensors(data: bytes, dice: random.Random) -> bytes:
    """Change, rename or remove one tensor of a safetensors file, header included."""
    tensors = safetensors.torch.load(data)
    name = dice.choice(sorted(tensors))
    tensor = tensors.pop(name)
    name = dice.choice([name, name, name + ".x", "x." + name, name.replace("0", "1"), ""])
    if name:
        tensors[name] = dice.choice([torch.clone, *STRANGE_TENSORS])(tensor).contiguous()
    return safetensors.torch.save(tensors, metadata={"format": "pt"})


def mutate_content(data: bytes, dice: random.Random) -> bytes:
    """Change the content of a file by PyTorch and save it in the format that it had."""
    zipped, target = zipfile.is_zipfile(io.BytesIO(data)), io.BytesIO()
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(io.BytesIO(data), weights_only=True)
    for _ in range(dice.choice([1, 1, 2, 4])):
        content = change_value(content, dice)
    torch.save(content, target, _use_new_zipfile_serialization=zipped)
    return target.getvalue()


def mutate_records(data: bytes, dice: random.Random) -> bytes:
    """Change the pickle, or the bytes or name of a record, in a zip archive with correct checksums."""
    source, target = zipfile.ZipFile(io.BytesIO(data)), io.BytesIO()
    records = [[info.filename, source.read(info)] for info in source.infolist()]
    pickled = next(record for record in records if record[0].endswith("data.pkl"))
    record = dice.choice([pickled, *records])
    if dice.random() < 0.8 and record[1]:
        record[1] = dice.choice([flip, cut])(record[1], dice)
    else:
        record[0] = dice.choice([record[0] + "x", "x", "../x", "archive/data.pkl", "archive/data/0"])
    with zipfile.ZipFile(target, "w", dice.choice([0] * 9 + [zipfile.ZIP_DEFLATED])) as archive:
        for name, content in records:
            archive.writestr(name, content)
    return target.getvalue()


def mutated(folder: Path, seed: int, number: int) -> tuple[str, Path]:
    """Change something in one of the valid checkpoints, by ``seed`` and ``number``: what changed, and the path."""
    dice = random.Random(f"{seed} {number}")
    source = dice.choice(sorted((folder / "valid").iterdir()))
    path = folder / f"mutated {seed} {number}{source.suffix}"
    for old in folder.glob("mutated *"):
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    (shutil.copytree if source.is_dir() else shutil.copy)(source, path)
    file = dice.choice(sorted(path.iterdir())) if path.is_dir() else path
    special = {".md": [], ".json": [mutate_json], ".safetensors": [mutate_header, mutate_tensors]}
    ways = special.get(file.suffix, [mutate_content, mutate_records])
    if source.name == "legacy.pth":  # no zip archive
        ways.remove(mutate_records)
    way = dice.choice([flip, cut, *ways * 2])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of zipfile about duplicate names
        file.write_bytes(way(file.read_bytes(), dice))
    return f"{way.__name__} of {source.name}{f'/{file.name}' * path.is_dir()}", path


def fuzz(folder: Path, seed: int, count: int):
    write_valid(folder / "valid")
    results, died = results_of("fuzz", folder, seed, 0, count)
    told = {kind: sum(result["outcome"] == kind for result in results) for kind in ("loaded", "ValueError")}
    told |= {key: max((result[key] for result in results), default=0) for key in ("seconds", "mebibytes")}
    print(f"{len(results)} files: {told}")
    bad = [*faults(results), *filter(None, [died])]
    repeat = f"{sys.executable} {__file__} fuzz {folder} {seed} NUMBER 1"
    assert not bad, f"{len(bad)} of {count}; to repeat: {repeat}\n" + "\n".join(map(str, bad[:5]))
    assert len(results) == count
    assert 0.02 < told["loaded"] / count < 0.6, f"the mutations are too strong or too weak: {told}"


@needs_proc
def test_no_mutated_checkpoint_does_more_than_raise_a_valueerror(tmp_path):
    fuzz(tmp_path, seed=0, count=300)


@needs_proc
@pytest.mark.slow
def test_none_of_5000_mutated_checkpoints_does_more_than_raise_a_valueerror(tmp_path):
    fuzz(tmp_path, seed=1, count=5000)


# ------------------------------------------------------------------------------------------- the sources


def unsafe(source: str) -> list[str]:
    """The places of a Python source that could run code from a file."""
    found, words = [], ("pickle", "Unpickler", "allow_pickle", "trust_remote_code")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "torch.serialization.load"):
            if "weights_only=True" not in map(ast.unparse, node.keywords):
                found.append(f"line {node.lineno}: torch.load without weights_only=True")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            found += [f"line {node.lineno}: import of load" for alias in node.names if alias.name in ("load", "*")]
        for field in ("id", "attr", "arg", "value", "name", "module"):
            if getattr(node, field, None) in words:
                found.append(f"line {node.lineno}: {getattr(node, field)}")
    return found


@pytest.mark.parametrize("file", sorted(ROOT.glob("*.py")), ids=lambda file: file.name)
def test_no_source_can_run_code_from_a_file(file):
    assert not unsafe(file.read_text())


UNSAFE = """torch.load(f)
torch.load(f, weights_only=False)
x = [torch.load(f, 'cpu', weights_only=safe)]
from torch import load
import pickle; pickle.load(f)
from pickle import Unpickler
numpy.load(f, allow_pickle=True)
datasets.load_dataset(name, trust_remote_code=True)
options = {'trust_remote_code': True}"""


@pytest.mark.parametrize("line", UNSAFE.splitlines())
def test_lines_that_could_run_code_from_a_file_are_found(line):
    assert unsafe(line)
    assert not unsafe("torch.load(f, map_location='cpu', weights_only=True)")


# ------------------------------------------------------------------------------------------- the constructor


NONSENSE = dict(
    depth=[0, 257, True, None, 10**400],
    decoder_depth=[-1, 257, "1"],
    image_size=[0, -8, 8.0, (8,), (8, -8), (0, 3), "8", None, True, [8, None], [8, 8, 8], 1028],
    mlp_ratio=[0, -1, float("inf"), 1e-9, 1e300],
    mean=[[], [1, 1], "abc", [1, 1, float("nan")], [float("inf"), 0, 0], None],
    std=[[], [1, 1], "abc", [1, 1, float("nan")], None, [1, 1, 0]],
    norm_eps=[float("nan")],
    class_token=[1],
    **{name: [0, -1, 2**17, 1.0] for name in ("width", "heads", "patch_size", "channels")},
)


@pytest.mark.parametrize("wrong", [{name: value} for name in NONSENSE for value in NONSENSE[name]], ids=str)
def test_nonsense_is_refused_by_the_constructor(wrong):
    with pytest.raises(ValueError):
        model(**wrong)


def test_sensible_arguments_are_accepted_by_the_constructor():
    for right in (dict(image_size=(8, 12)), dict(image_size=[4, 4]), dict(mlp_ratio=2), dict(mean=[0, 0, 0])):
        model(**right)
    assert model(channels=1, mean=(0.5,), std=(0.1,)).config["mean"] == [0.5]
    assert model(channels=1).config["mean"] == pytest.approx([0.449])
    with torch.device("meta"):
        assert model(image_size=1024).positions.shape == (2**16 + 1, 16)


def test_a_model_is_built_without_memory_or_random_numbers_on_the_meta_device():
    state = torch.get_rng_state()
    with torch.device("meta"):
        names = {name: tensor.shape for name, tensor in model().state_dict().items()}
    assert torch.equal(state, torch.get_rng_state())
    assert names == {name: tensor.shape for name, tensor in model().state_dict().items()}


# ------------------------------------------------------------------------------------------- writing


@pytest.fixture
def small_disk():
    """A function that limits files to 64 KiB until the end of the test."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def full():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))

    yield full
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("format", ["smae", "timm", "transformers", "mae"])
def test_a_full_disk_leaves_the_old_files_and_says_so_in_one_line(format, small_disk, tmp_path):
    path = tmp_path / ("mae.pth" if format == "mae" else "run")
    large = model(width=128)
    smae.save(large, path, format=format)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    small_disk()
    says = r"^\[Errno 27\] File too large: '.*(model\.safetensors|mae\.pth)'$"
    with pytest.raises(OSError, match=says) as e:
        smae.save(large, path, format=format)
    assert e.value.errno == errno.EFBIG and "\n" not in str(e.value)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_a_failure_of_any_other_kind_leaves_no_parts(monkeypatch, tmp_path):
    smae.save(model(), tmp_path / "run")
    before = (tmp_path / "run" / "config.json").read_text()
    for error in (KeyboardInterrupt(), RuntimeError("not of the disk")):
        monkeypatch.setattr(torch, "save", lambda *_, error=error: (_ for _ in ()).throw(error))
        with pytest.raises(type(error)):
            smae.save(model(), tmp_path / "run" / "mae.pth", format="mae")
    with pytest.raises(TypeError):
        smae.save(model(), tmp_path / "run", config={"x": object()})
    assert sorted(file.name for file in (tmp_path / "run").iterdir()) == [
        "README.md", "config.json", "model.safetensors",
    ]  # fmt: skip
    assert (tmp_path / "run" / "config.json").read_text() == before


@pytest.mark.parametrize("format", ["smae", "timm", "transformers", "mae"])
def test_files_are_on_the_disk_before_they_have_their_names_and_the_folder_after(format, monkeypatch, tmp_path):
    events, replace = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: events.append(("sync", os.fstat(handle).st_ino)))

    def note(source, target):
        events.append(("name", os.stat(source).st_ino))
        replace(source, target)

    monkeypatch.setattr(os, "replace", note)
    path = tmp_path / "run" / ("mae.pth" if format == "mae" else "")
    smae.save(model(), path, format=format)
    files = [file.stat().st_ino for file in (tmp_path / "run").iterdir()]
    assert {event for event in events if event[0] == "name"} == {("name", file) for file in files}
    for file in files:
        assert events.index(("sync", file)) < events.index(("name", file))
    assert events[-1] == ("sync", (tmp_path / "run").stat().st_ino)


def test_a_whole_file_takes_its_name_after_the_block_and_not_after_an_error(tmp_path):
    file = tmp_path / "notes.txt"
    with smae.whole_file(file) as part:
        part.write_text("first")
        assert not file.exists() and part.parent == tmp_path
    assert file.read_text() == "first"
    for error in (ValueError("x"), KeyboardInterrupt(), FileNotFoundError(errno.ENOENT, "no picture", "cat.png")):
        with pytest.raises(type(error)) as raised, smae.whole_file(file) as part:
            part.write_text("second")
            raise error
        assert raised.value is error
    assert file.read_text() == "first" and list(tmp_path.iterdir()) == [file]
    with pytest.raises(FileNotFoundError), smae.whole_file(file):
        pass  # writes nothing
    assert file.read_text() == "first"


def test_a_left_over_part_that_is_a_link_does_not_change_the_file_behind_it(tmp_path):
    live, file = tmp_path / "live", tmp_path / "file"
    live.write_text("in use")
    os.link(live, tmp_path / "file.part")
    with smae.whole_file(file) as part:
        part.write_text("new")
    assert (live.read_text(), file.read_text()) == ("in use", "new")


def test_a_folder_that_cannot_be_flushed_is_accepted_and_a_broken_disk_is_not(monkeypatch, tmp_path):
    def fails(code):
        def fsync(handle):
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, "fsync", fsync)

    fails(errno.EINVAL)
    smae.flush(tmp_path)
    fails(errno.EIO)
    with pytest.raises(OSError):
        smae.flush(tmp_path)
    with pytest.raises(OSError, match=r"Input/output error: '.*model\.safetensors'"):
        smae.save(model(), tmp_path / "run")
    assert not list((tmp_path / "run").iterdir())


if __name__ == "__main__":
    work(sys.argv[1:])
