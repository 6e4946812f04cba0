"""Hostile files: whatever a checkpoint holds, it loads or is refused, in little memory and time. How files are written.

Loads run in another process, whose address space is limited: ``python tests/test_safety.py load PATH ...`` or
``python tests/test_safety.py fuzz FOLDER SEED FIRST COUNT``, which a failing test tells to repeat one case.
"""

import argparse
import ast
import errno
import io
import json
import os
import pickle
import pickletools
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
import zlib
from itertools import pairwise
from pathlib import Path

import pytest
import safetensors.torch
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import smae  # noqa: E402

SECONDS, MEBIBYTES, ADDRESS_SPACE = 5, 150, 2**30  # for one load: time, memory in use, bytes that can be asked for
TINY = dict(width=16, depth=2, heads=2, decoder_width=8, decoder_depth=1, decoder_heads=2, image_size=8, patch_size=4)


def model(**changes) -> smae.SMAE:
    return smae.SMAE(**TINY | changes)


# ------------------------------------------------------------------------------------------- the other process


def status(name: str) -> float:
    """A line of /proc/self/status, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1024


def try_load(path: str) -> dict:
    """What becomes of smae.load(path): outcome, message, seconds, MiB at the peak above those before."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, start, message = status("VmRSS"), time.monotonic(), ""
    signal.alarm(3 * SECONDS)  # ends the process, even amidst C code
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
    """The other process: a line of JSON before each load, one after it."""
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
        for path in sorted((folder / "valid").iterdir()):  # for what is imported late not to be counted
            assert try_load(str(path))["outcome"] == "loaded", path
        for number in range(first, first + count):
            kind, path = mutated(folder, seed, number)
            tell(number=number, kind=kind)
            tell(number=number, kind=kind, **try_load(str(path)))


def results_of(*arguments) -> tuple[list[dict], dict | None]:
    """The results of the other process, and what it was about when it ended, if it did not get to its end."""
    command = [sys.executable, __file__, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=3000)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    results = [line for line in lines if "outcome" in line]
    if done.returncode == 0:
        return results, None
    assert lines and "outcome" not in lines[-1], f"{command} did not work: {done.stderr}"
    return results, lines[-1] | dict(outcome=f"ended with {done.returncode}", message=done.stderr[-2000:])


def faults(results: list[dict]) -> list[dict]:
    """Those of another outcome, or that took too much. PyTorch's old files do ask for what they then do not use."""
    good = ("loaded", "ValueError", "FileNotFoundError")
    asked = [r for r in results if "memory" in r["message"] and "legacy" not in r.get("kind", "legacy")]
    return asked + [
        r for r in results if r["outcome"] not in good or r["seconds"] > SECONDS or r["mebibytes"] > MEBIBYTES
    ]


needs_proc = pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="memory is measured on Linux")


# ------------------------------------------------------------------------------------------- hostile files by hand


def run_folder(**changes):
    """Our own folder, with changes of the "model" part of its config.json; None takes a key away."""

    def make(folder: Path):
        smae.save(model(), folder)
        change_json(folder / "config.json", "model", changes)

    return make


def classifier_folder(**changes):
    def make(folder: Path):
        smae.save(smae.Classifier(model(), ["cat", "dog"]), folder)
        change_json(folder / "config.json", "classifier", changes)

    return make


def foreign_folder(format: str, part: str | None = None, **changes):
    """A folder of ours for timm or transformers, with changes of its config.json or a part of it."""

    def make(folder: Path):
        smae.save(model(), folder, format=format)
        change_json(folder / "config.json", part, changes)

    return make


def change_json(file: Path, part: str | None, changes: dict):
    content = json.loads(file.read_text())
    inner = content[part] if part else content
    inner |= changes
    for name in [name for name, value in changes.items() if value is None]:
        del inner[name]
    file.write_text(json.dumps(content))


def config_of(content):
    """Our folder with another config.json: text, bytes, or a function that makes it."""

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


def tensors_file(change, name: str = "x.pth", legacy: bool = False):
    """The tensors of facebookresearch/mae, changed, and saved by PyTorch."""

    def make(folder: Path):
        smae.save(model(), folder / name, format="mae")
        tensors = torch.load(folder / name, weights_only=True)["model"]
        torch.save({"model": change(tensors) or tensors}, folder / name, _use_new_zipfile_serialization=not legacy)
        return folder / name

    return make


def pickle_file(text: bytes, compress: int = zipfile.ZIP_STORED, names: tuple = ("x/data.pkl",)):
    """A zip archive as torch.save makes it, around a pickle of our own."""

    def make(folder: Path):
        with zipfile.ZipFile(folder / "x.pth", "w", compress) as archive:
            for name in names:
                archive.writestr(name, text)
            archive.writestr("x/version", "3\n")
        return folder / "x.pth"

    return make


def legacy_file(text: bytes):
    def make(folder: Path):
        head = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
        (folder / "x.pth").write_bytes(b"".join(pickle.dumps(x, 2) for x in head) + text + pickle.dumps([], 2))
        return folder / "x.pth"

    return make


def call(function: str, arguments: bytes) -> bytes:
    """A pickle of {"model": function(*arguments)}."""
    module, name = function.rsplit(".", 1)
    return b"\x80\x02}X\x05\0\0\0model" + f"c{module}\n{name}\n".encode() + arguments + b"Rs."


def put(i: int) -> bytes:
    return b"r" + struct.pack("<I", i)


def get(i: int) -> bytes:
    return b"j" + struct.pack("<I", i)


def storage(numel: int, kind: str = "FloatStorage") -> bytes:
    view = b"NtQ" if kind.startswith("legacy") else b"tQ"
    number = b"\x8a\x08" + struct.pack("<q", numel)
    kind = kind.removeprefix("legacy ")
    return f"(X\x07\0\0\0storagectorch\n{kind}\nX\x01\0\0\x000X\x03\0\0\0cpu".encode() + number + view


DOUBLING = b"N\x85" + put(0) + b"".join(get(i) + get(i) + b"\x86" + put(i + 1) for i in range(60))  # 2 ** 60 leaves
DOUBLING_LIST = b"]" + put(0) + b"".join(b"](" + get(i) + get(i) + b"e" + put(i + 1) for i in range(60))
PRIME = 2**61 - 1  # hash(n * PRIME) == 0
COLLIDING = b"".join(b"\x8a\x0c" + (n * PRIME).to_bytes(12, "little") + b"N" for n in range(60000))
NUMBERS = b"".join(b"M" + struct.pack("<H", n) + b"N" for n in range(60000))
COPIES = b"](" + (b"ccollections\nOrderedDict\n" + put(1)) + (get(1) + get(0) + b"R") * 100000 + b"e"


TEXT = b"x" * 10**6
REPEATED = b"X" + struct.pack("<I", len(TEXT)) + TEXT + put(0) + b"(" + get(0) * 4000 + b"t"


def two_directories(zip64: bool):
    """A zip archive around a hostile pickle, and within the same file an innocent directory at its end."""

    def make(folder: Path):
        hostile = pickle_file(call("builtins.bytearray", b"J\0\0\0\x1e\x85"))(folder).read_bytes()
        other = pickle_file(b"\x80\x02}.")(folder).read_bytes()
        _, size, start, _ = struct.unpack("<4s8x2IH", hostile[-22:])
        innocent = len(hostile) + struct.unpack("<4s8x2IH", other[-22:])[2]
        records, directory, end = other[: innocent - len(hostile)], other[innocent - len(hostile) : -22], other[-22:]
        directory = bytearray(directory)
        at = 0
        while at < len(directory):  # where its records begin
            (offset,) = struct.unpack("<I", directory[at + 42 : at + 46])
            directory[at + 42 : at + 46] = struct.pack("<I", offset + len(hostile))
            at += 46 + sum(struct.unpack("<3H", directory[at + 28 : at + 34]))
        body, count = hostile + records, 2

        def end64(size: int, start: int) -> bytes:
            return b"PK\6\6" + struct.pack("<Q2H2I4Q", 44, 45, 45, 0, 0, count, count, size, start)

        if zip64:
            first = len(body)
            body += end64(size, start) + bytes(directory) + end64(len(directory), first + 56)
            body += b"PK\6\7" + struct.pack("<IQI", 0, first, 1) + end[:12] + b"\xff" * 8 + b"\0\0"
        else:
            body += bytes(directory) + end[:12] + struct.pack("<2IH", len(directory), start, 0)
        (folder / "x.pth").write_bytes(body)
        return folder / "x.pth"

    return make


def renamed_records(folder: Path) -> Path:
    """Two records, each with the name of the other in an extra field, which zipfile prefers and torch does not read."""
    hostile, innocent = call("builtins.bytearray", b"J\0\0\0\x1e\x85"), b"\x80\x02}."
    with zipfile.ZipFile(folder / "x.pth", "w") as archive:
        for name, other, text in (("x/data.pkl", "x/a", hostile), ("x/a", "x/data.pkl", innocent)):
            info = zipfile.ZipInfo(name)
            info.extra = struct.pack("<2HBI", 0x7075, 5 + len(other), 1, zlib.crc32(name.encode())) + other.encode()
            archive.writestr(info, text)
    return folder / "x.pth"


def decoder_beside_classifier(folder: Path):
    classifier_folder()(folder)
    change_json(folder / "config.json", "model", dict(decoder_depth=256, decoder_width=2**16))


def big_strides(tensors):
    tensors["norm.weight"] = torch.zeros(1, dtype=torch.half).expand(10**10)


def many_views(tensors):
    shared = torch.zeros(10**6, dtype=torch.half)
    tensors |= {f"blocks.{i}.x": shared[:] for i in range(1000)}


def wide(tensors):
    tensors["patch_embed.proj.weight"] = torch.zeros(2**20, 3, 1, 1)  # of a width that would need terabytes


RECORDS = ("x/data.pkl", "x/data/0")

HOSTILE = {  # how to make it, and what is said about it; None: it is loaded nevertheless
    # our own config.json
    "a width of 10**9": (run_folder(width=10**9), "width must be an integer above 0 and at most 65536, got 1000000000"),
    "a width that takes terabytes": (run_folder(width=65536), "of another shape"),
    "a depth of 10**9": (run_folder(depth=10**9), "depth must be an integer above 0 and at most 256"),
    "a depth of 10**400": (run_folder(depth=10**400), "depth must be an integer"),
    "a depth beyond the file": (run_folder(depth=256), r"missing: blocks\.2\."),
    "a decoder of 10**9 blocks": (run_folder(decoder_depth=10**9), "decoder_depth must be an integer above -1"),
    "an image of 10**7 pixels": (run_folder(image_size=10**7, patch_size=1), "more than 65536 patches of 1"),
    "an image of 10**400 pixels": (run_folder(image_size=10**400), "more than 65536 patches"),
    "learned positions of a large grid": (run_folder(image_size=1024, learned_positions=True), r"missing: positions"),
    "a patch of 10**6 pixels": (run_folder(image_size=10**6, patch_size=10**6), "patch_size must be an integer"),
    "a patch of gigabytes": (run_folder(image_size=4096, patch_size=4096, channels=4096), "of another shape"),
    "an image size of three": (run_folder(image_size=[8, 8, 8]), "image_size must be a side or a pair.*got a list"),
    "an image size that is text": (run_folder(image_size="8"), "image_size must be a side or a pair.*got '8'"),
    "an image size that is true": (run_folder(image_size=True), "image_size must be a side or a pair.*got True"),
    "a negative image size": (run_folder(image_size=[-8, -8]), "image_size must be a side or a pair"),
    "heads that are text": (run_folder(heads="2"), "heads must be an integer above 0 and at most 65536, got '2'"),
    "heads that are true": (run_folder(heads=True), "heads must be an integer .*, got True"),
    "heads that are a fraction": (run_folder(heads=2.0), r"heads must be an integer .*, got 2\.0"),
    "heads that are nested": (run_folder(heads={"a": [1]}), "heads must be an integer .*, got a dict"),
    "norm_eps that is no number": (run_folder(norm_eps=float("nan")), "norm_eps must be a number above 0.*, got nan"),
    "mlp_ratio of 10**300": (run_folder(mlp_ratio=1e300), "mlp_ratio must be a number"),
    "mlp_ratio of 1000": (run_folder(mlp_ratio=1000), r"of another shape: blocks\.0\.mlp"),
    "mlp_ratio of next to nothing": (run_folder(mlp_ratio=1e-9), "mlp_ratio .* leaves nothing"),
    "a mean of two numbers": (run_folder(mean=[0.5, 0.5]), "mean must be a list of 3 numbers"),
    "a mean that is infinite": (run_folder(mean=[float("inf"), 0, 0]), "mean must be a number .*, got inf"),
    "a mean of text": (run_folder(mean="rgb"), "mean must be a list of 3 numbers.* got 'rgb'"),
    "a deviation of zero": (run_folder(std=[0, 1, 1]), "std must be a number above 0"),
    "a flag that is a number": (run_folder(class_token=1), "class_token must be true or false, got 1"),
    "an unknown argument": (run_folder(**{"x\n" * 5000: 1}), "cannot be loaded: TypeError: .*unexpected keyword"),
    "a missing argument": (run_folder(width=None), "cannot be loaded: TypeError: .*width"),
    "a model that is a list": (config_of('{"model": [1]}'), "should hold a dictionary as model, not a list"),
    "no model but a list": (config_of("[1]"), "config.json should hold a JSON object, not a list"),
    "JSON of 100,000 levels": (config_of("[" * 100_000), "config.json is not JSON: maximum recursion"),
    "objects of 100,000 levels": (config_of('{"model":' * 100_000), "config.json is not JSON: maximum recursion"),
    "JSON of 5 MiB": (config_of('{"model": {}}' + " " * 5 * 2**20), "larger than any configuration"),
    "a sparse config.json of 1 TiB": (
        config_of(lambda file: file.touch() or os.truncate(file, 2**40)), "larger than any",
    ),
    "bytes instead of JSON": (config_of(bytes(range(256))), "config.json is not JSON"),
    "an integer of 10**6 digits": (config_of('{"model": ' + "9" * 10**6 + "}"), "not JSON|should hold a dictionary"),
    "a folder instead of a config.json": (config_of(Path.mkdir), "it has no config.json"),
    "a pipe instead of a config.json": (config_of(os.mkfifo), "it has no config.json"),
    "an endless config.json": (config_of(lambda file: file.symlink_to("/dev/zero")), "it has no config.json"),
    "a config.json that is its own link": (config_of(lambda file: file.symlink_to(file)), "it has no config.json"),
    # classifiers
    "classes that are text": (classifier_folder(classes="ab"), "classes must be a list of names, got 'ab'"),
    "classes that are numbers": (classifier_folder(classes=[1, 2]), "classes must be a list of names"),
    "no classes": (classifier_folder(classes=[]), "classes must be a list of names"),
    "100,000 classes": (classifier_folder(classes=["x"] * 100_000), r"another shape: head\.weight \(2, 16\)"),
    "an unknown pooling": (classifier_folder(pool=["mean"]), "cannot pool by a list, but by mean or cls"),
    "drop_path that is text": (classifier_folder(drop_path="x"), "drop_path must be a number .* got 'x'"),
    "a classifier with a decoder of terabytes": (decoder_beside_classifier, None),
    # the configurations of others
    "transformers: heads that are text": (foreign_folder("transformers", num_attention_heads="2"), "heads must be"),
    "transformers: an image of 10**9": (foreign_folder("transformers", image_size=10**9), "more than 65536 patches"),
    "transformers: a large image": (
        foreign_folder("transformers", image_size=1024), r"another shape: positions \(5, 16",
    ),
    "transformers: an image size that is text": (foreign_folder("transformers", image_size="8"), "image_size must be"),
    "transformers: a mean that is text": (foreign_folder("transformers", image_mean="8"), "mean must be a list"),
    "transformers: norm_pix_loss that is text": (
        foreign_folder("transformers", norm_pix_loss="no"), "normalize_pixels",
    ),
    "timm: model_args that is a list": (foreign_folder("timm", model_args=[1]), "hold a dictionary as model_args"),
    "timm: pretrained_cfg that is a number": (foreign_folder("timm", pretrained_cfg=3), "dictionary as pretrained_cfg"),
    "timm: an image of 10**9": (foreign_folder("timm", "model_args", img_size=10**9), "more than 65536 patches"),
    "timm: a side of a patch and less": (foreign_folder("timm", "model_args", img_size=[0, 3]), "image_size must be"),
    # safetensors
    "a header of 2**60 bytes": (safetensors_file({}, 2**60), "not a file of tensors alone"),
    "a header of nothing": (safetensors_file(b""), "not a file of tensors alone"),
    "no tensors": (safetensors_file({}), "not a ViT known here"),
    "a header of 100,000 levels": (safetensors_file(b'{"a":' * 100_000), "not a file of tensors alone"),
    "a shape of 2**40": (
        safetensors_file({"pos_embed": dict(dtype="F32", shape=[2**40], data_offsets=[0, 4])}, data=b"1234"),
        "not a file of tensors alone",
    ),
    "zero times 2**40": (
        safetensors_file({"patch_embed.proj.weight": dict(dtype="F32", shape=[2**40, 3, 0, 4], data_offsets=[0, 0]),
                          "pos_embed": dict(dtype="F32", shape=[1, 0, 2**40], data_offsets=[0, 0])}),
        "its patches hold nothing",
    ),
    "a name of control characters": (
        safetensors_file({"\x1b[2J\n\u202e\ud800" * 50: dict(dtype="F32", shape=[0], data_offsets=[0, 0])}),
        "not a file of tensors alone|not a ViT known here",
    ),
    # PyTorch's files
    "a block of number 9999999999": (
        tensors_file(lambda t: t | {"blocks.9999999999.é\n\x1b[2J\u202e\ud800": torch.ones(1)}),
        r"missing: blocks\.2\..*9999999999\.é \\x1b",
    ),
    "5,000 blocks": (
        tensors_file(lambda t: t | {f"blocks.{i}.x": torch.ones(1) for i in range(5000)}), "depth must be an integer",
    ),
    "a width of 2**20": (tensors_file(wide), "width must be an integer"),
    "an expanded tensor": (tensors_file(big_strides), "claims more numbers than it holds"),
    "an expanded tensor, legacy": (tensors_file(big_strides, legacy=True), "claims more numbers than it holds"),
    "one storage seen 1,000 times": (tensors_file(many_views), "claims more numbers than it holds"),
    "a sparse tensor": (
        tensors_file(lambda t: t | {"norm.weight": torch.sparse_coo_tensor([[0]], [1.0], [10**12])}), "makes no tensor",
    ),
    "a quantized tensor": (
        tensors_file(lambda t: t | {"norm.weight": torch.quantize_per_tensor(torch.ones(16), 0.1, 0, torch.qint8)}),
        "not a file of tensors alone",
    ),
    "a tensor of the meta device": (
        tensors_file(lambda t: t | {"norm.weight": torch.empty(10**12, device="meta")}), "makes no tensor",
    ),
    "a number as a name": (tensors_file(lambda t: t | {7: torch.ones(1)}), None),
    "complex numbers": (tensors_file(lambda t: t | {"norm.weight": torch.ones(16, dtype=torch.cfloat)}), None),
    "a convolution of no dimensions": (
        tensors_file(lambda t: t | {"patch_embed.proj.weight": torch.ones(())}), "not a ViT known here",
    ),
    "positions of one dimension": (tensors_file(lambda t: t | {"pos_embed": torch.ones(5)}), "not a ViT known here"),
    "an MLP of no dimensions": (tensors_file(lambda t: t | {"blocks.0.mlp.fc1.weight": torch.ones(())}), "TypeError"),
    "a zip bomb": (
        pickle_file(b"\x80\x02X" + struct.pack("<I", 2**28) + bytes(2**28) + b".", zipfile.ZIP_DEFLATED),
        "it is compressed, which torch.save never does",
    ),
    "two pickles": (pickle_file(b"\x80\x02}.", names=("x/data.pkl", "x/DATA.pkl")), "with 2 pickles, not one"),
    "no pickle": (pickle_file(b"\x80\x02}.", names=("x/data",)), "with 0 pickles, not one"),
    "a pickle of 5 MiB": (pickle_file(b"\x80\x02" + b"N" * 5 * 2**20 + b"}."), "pickle is larger than any of a model"),
    "a bytearray of 500 MB": (
        pickle_file(call("builtins.bytearray", b"J\0\0\0\x1e\x85")), "calls .*, which makes no tensor",
    ),
    "a bytearray of 500 MB, legacy": (legacy_file(call("builtins.bytearray", b"J\0\0\0\x1e\x85")), "makes no tensor"),
    "a bytearray by Python 2's name": (
        pickle_file(call("__builtin__.bytearray", b"J\0\0\0\x1e\x85")), "makes no tensor",
    ),
    "a tensor of 500 MB": (pickle_file(call("torch.FloatTensor", b"J\0\0\0\x1e\x85")), "calls torch FloatTensor, "),
    "text encoded in hex again and again": (
        pickle_file(b"\x80\x02c_codecs\nencode\n" + put(0) + b"X\1\0\0\0xX\6\0\0\0latin1\x86R" + put(1)
                    + (get(0) + get(1) + b"X\3\0\0\0hex\x86R" + put(1)) * 40 + b"."),
        "calls .*, which makes no tensor",
    ),
    "a key of 2**60 leaves": (pickle_file(b"\x80\x02}" + DOUBLING + b"Ns."), "something large twice|tuple of too many"),
    "a key of 2**60 leaves, legacy": (legacy_file(b"\x80\x02}" + DOUBLING + b"Ns."), "twice|tuple of too many"),
    "a key of 100,000 levels": (pickle_file(b"\x80\x02}N" + b"\x85" * 100_000 + b"Ns."), "tuple of too many values"),
    "a storage by a name of 2**60 leaves": (pickle_file(b"\x80\x02" + DOUBLING_LIST + b"\x85Q."), "something large"),
    "a call of 2**60 leaves": (pickle_file(b"\x80\x02" + DOUBLING_LIST + b")R."), "something large twice"),
    "integers that collide": (pickle_file(b"\x80\x02}(" + COLLIDING + b"u."), "an integer of more than 64 bits"),
    "copies of a large dictionary": (
        pickle_file(b"\x80\x02}(" + NUMBERS + b"u\x85" + put(0) + COPIES + b"."), "something large|makes no tensor",
    ),
    "a dictionary within itself": (pickle_file(b"\x80\x02}" + put(0) + b"X\5\0\0\0model" + get(0) + b"s."), "twice"),
    "models in models": (
        pickle_file(b"\x80\x02" + b"}X\5\0\0\0model" * 100_000 + b"}" + b"s" * 100_000 + b"."), "holds no model",
    ),
    "args that are a number": (
        lambda folder: torch.save({"args": 3, "model": {}}, folder / "x.pth") or folder / "x.pth", "no model",
    ),
    "a storage larger than its record": (
        pickle_file(call("torch._utils._rebuild_tensor_v2",
                         b"(" + storage(10**9) + b"K\0J\0\xca\x9a\x3b\x85K\1\x85\x89Nt"), names=RECORDS),
        "not a file of tensors alone",
    ),
    "a storage of 10**15 numbers, legacy": (
        legacy_file(call("torch._utils._rebuild_tensor_v2",
                         b"(" + storage(10**15, "legacy FloatStorage") + b"K\0J\0\xca\x9a\x3b\x85K\1\x85\x89Nt")),
        "can't allocate memory",
    ),
    "a storage of 10**8 numbers that is never filled, legacy": (
        legacy_file(b"\x80\x02}X\1\0\0\0xctorch._utils\n_rebuild_tensor_v2\n("
                    + storage(10**8, "legacy HalfStorage") + b"K\0J\0\xe1\xf5\5\x85K\1\x85\x89NtRs."),
        "claims more numbers than it holds",
    ),
    "a key that repeats a long text": (pickle_file(b"\x80\x02}" + REPEATED + b"Ns."), "something large"),
    "a key that repeats a long text, legacy": (legacy_file(b"\x80\x02}" + REPEATED + b"Ns."), "something large"),
    "another directory before the last": (two_directories(False), "in two places|does not end with the directory"),
    "another directory that only torch would see": (two_directories(True), "its directory is in two places"),
    "other names that only zipfile would see": (renamed_records, "makes no tensor"),
    "an empty file": (lambda folder: (folder / "x.pth").touch() or folder / "x.pth", "does not begin like one"),
    "a pickle of another kind": (lambda folder: plain_pickle(folder), "does not begin like one"),
    "a pipe": (lambda folder: os.mkfifo(folder / "x.pth") or folder / "x.pth", "there is no checkpoint"),
}  # fmt: skip


def plain_pickle(folder: Path) -> Path:
    (folder / "x.pth").write_bytes(pickle.dumps({"a": 1}, 2))
    return folder / "x.pth"


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What became of each hostile file. All are loaded by one process, by the next one after what ended it."""
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
    assert "memory" not in result["message"] or "memory" in message, "it was asked for, in vain"


# ------------------------------------------------------------------------------------------- fuzz


def write_valid(folder: Path):
    """A small checkpoint of each kind that load() reads."""
    torch.manual_seed(0)  # the same bytes each time
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


STRANGE = [None, True, -1, 0, 1, 3, 2**16, 2**31, 2**63, -(2**63), 10**9, 10**18, 10**400, 0.5, 1e308, float("nan")]
STRANGE += [
    float("inf"),
    "",
    "x",
    "8",
    "\n\x1b\u202e",
    [],
    [[[[[]]]]],
    {},
    {"a": {"b": []}},
    [8, 8],
    [10**9, 10**9],
    [1] * 1000,
]


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


def copied(content):
    return json.loads(json.dumps(content))


def change_value(content, dice: random.Random):
    """Something within nested lists and dictionaries is replaced, taken away, doubled or moved."""
    nodes, found = [content], []
    while nodes:
        node = nodes.pop()
        places = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else []
        found += [(node, place) for place in places]
        nodes += [node[place] for place in places]
    if not found or dice.random() < 0.02:
        return copied(dice.choice(STRANGE))
    node, place = dice.choice(found)
    way = dice.randrange(5)
    if way < 2:
        node[place] = copied(dice.choice(STRANGE))
    elif way == 2:
        del node[place]
    elif way == 3 and isinstance(node, dict):
        node[dice.choice(["", "x", "model", "classifier", f"{place}.0", "blocks.99999999999.x"])] = node[place]
    else:
        other, where = dice.choice(found)
        node[place] = copied(other[where]) if where in range(len(other)) or where in other else None
    return content


def mutate_json(data: bytes, dice: random.Random) -> bytes:
    content = json.loads(data)
    for _ in range(dice.choice([1, 1, 2, 4])):
        content = change_value(content, dice)
    return json.dumps(content).encode()


def mutate_header(data: bytes, dice: random.Random) -> bytes:
    """Of a safetensors file: the JSON of names, types, shapes and offsets; sometimes so that they fit one another."""
    (length,) = struct.unpack("<Q", data[:8])
    header, data = json.loads(data[8 : 8 + length]), data[8 + length :]
    names = [name for name in header if name != "__metadata__"]
    name = dice.choice(names)
    way = dice.randrange(5)
    if way == 0:
        header[name]["dtype"] = dice.choice("BOOL U8 I8 F8_E4M3 F8_E5M2 F4 C64 I16 F16 BF16 I64 F64 X".split())
    elif way == 1:  # as many numbers in another shape
        shape = header[name]["shape"]
        header[name]["shape"] = dice.choice([shape[::-1], [1, *shape], [*shape, 1], [torch.Size(shape).numel()]])
    elif way == 2:  # another name
        header[dice.choice([name + ".x", "x." + name, name.replace("0", "1"), dice.choice(names)])] = header.pop(name)
    elif way == 3:  # the last one of another size, with the numbers for it
        last = max(names, key=lambda name: header[name]["data_offsets"][1])
        start, count = header[last]["data_offsets"][0], dice.choice([0, 1, 7, 1000])
        header[last] |= dict(
            shape=dice.choice([[count], [count, 1], [1, 1, count]]), data_offsets=[start, start + 4 * count]
        )
        data = data[:start] + bytes(4 * count)
    else:
        header = change_value(header, dice)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def mutate_pickle(data: bytes, dice: random.Random) -> bytes:
    """A few instructions of a pickle are changed, taken away, doubled or moved; or any bytes."""
    if dice.random() < 0.3:
        return dice.choice([flip, cut])(data, dice)
    ops = list(pickletools.genops(data))
    starts = [position for _, _, position in ops] + [ops[-1][2] + 1]
    parts = [data[a:b] for a, b in pairwise(starts)]
    rest = data[starts[-1] :]
    for _ in range(dice.choice([1, 1, 2, 5])):
        i, j = dice.randrange(len(parts)), dice.randrange(len(parts))
        way = dice.randrange(6)
        if way == 0:
            parts[i] = b""
        elif way == 1:
            parts[i] = parts[j]
        elif way == 2:
            parts[i] += parts[j]
        elif way == 3:
            parts[i] = dice.choice([b"N", b"}", b"]", b")", b"(", b"t", b"u", b"R", b"b", b"Q", b"\x81", b"\x85", b"."])
        elif way == 4:
            numbers = [i for i, part in enumerate(parts) if part[:1] in (b"K", b"M", b"J")]
            number = dice.choice([-1, 0, 1, 2**16, 2**31 - 1, 10**8])
            huge = b"\x8a\x08" + struct.pack("<q", dice.choice([2**40, 2**62, -(2**62)]))
            parts[dice.choice(numbers or [i])] = dice.choice([b"J" + struct.pack("<i", number), huge])
        else:
            names = [i for i, part in enumerate(parts) if part[:1] == b"c"]
            other = (
                "builtins.bytearray torch.HalfStorage torch.BoolStorage torch.ComplexFloatStorage torch.QInt8Storage "
            )
            other += (
                "torch._utils._rebuild_sparse_tensor torch._utils._rebuild_parameter collections.Counter torch.Size"
            )
            module, name = dice.choice(other.split()).rsplit(".", 1)
            parts[dice.choice(names or [i])] = f"c{module}\n{name}\n".encode()
    return b"".join(parts) + rest


def mutate_legacy(data: bytes, dice: random.Random) -> bytes:
    """One of the five pickles of a file before PyTorch 1.6, mostly that of the content; or the numbers after them."""
    stream, ends = io.BytesIO(data), [0]
    for _ in range(5):
        list(pickletools.genops(stream))
        ends.append(stream.tell())
    i = dice.choice([1, 2, 3, 3, 3, 3, 4, 5])
    if i == 5:
        return data[: ends[5]] + dice.choice([flip, cut])(data[ends[5] :], dice)
    return data[: ends[i]] + mutate_pickle(data[ends[i] : ends[i + 1]], dice) + data[ends[i + 1] :]


def mutate_records(data: bytes, dice: random.Random) -> bytes:
    """Of a zip archive: the pickle changed, or a record of other bytes, name or none; all checksums are right."""
    source, target = zipfile.ZipFile(io.BytesIO(data)), io.BytesIO()
    records = [[info.filename, source.read(info)] for info in source.infolist()]
    record = dice.choice(records)
    if dice.random() < 0.8:
        record = next(record for record in records if record[0].endswith("data.pkl"))
        record[1] = mutate_pickle(record[1], dice)
    elif dice.random() < 0.5 and record[1]:
        record[1] = dice.choice([flip, cut])(record[1], dice)
    else:
        record[0] = dice.choice([record[0] + "x", "x", "../x", "archive/data.pkl", "archive/data/0"])
    with zipfile.ZipFile(target, "w", dice.choice([0] * 9 + [zipfile.ZIP_DEFLATED])) as archive:
        for name, content in records:
            archive.writestr(name, content)
    return target.getvalue()


def mutated(folder: Path, seed: int, number: int) -> tuple[str, Path]:
    """One of the valid checkpoints with something changed, a function of ``seed`` and ``number``: its kind and path."""
    dice = random.Random(f"{seed} {number}")
    source = dice.choice(sorted((folder / "valid").iterdir()))
    path = folder / f"mutated {seed} {number}{source.suffix}"
    for old in folder.glob("mutated *"):
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    (shutil.copytree if source.is_dir() else shutil.copy)(source, path)
    file = dice.choice(sorted(path.iterdir())) if path.is_dir() else path
    special = {".json": mutate_json, ".safetensors": mutate_header, ".pth": mutate_records, ".bin": mutate_records}
    way = dice.choice([flip, cut] + 4 * [mutate_legacy if source.name == "legacy.pth" else special[file.suffix]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile's about names that are there twice
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
    """What in a Python source could run what a file holds."""
    found = []
    for node in ast.walk(ast.parse(source)):
        text = ast.unparse(node) if isinstance(node, (ast.Attribute, ast.Name)) else ""
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "torch.serialization.load"):
            safe = [keyword.value for keyword in node.keywords if keyword.arg == "weights_only"]
            if not (safe and isinstance(safe[0], ast.Constant) and safe[0].value is True):
                found.append(f"line {node.lineno}: torch.load without weights_only=True")
        elif isinstance(node, ast.ImportFrom) and node.module in ("torch", "torch.serialization", "pickle"):
            found += [
                f"line {node.lineno}: {a.name}" for a in node.names if a.name in ("load", "loads", "Unpickler", "*")
            ]
        elif text in ("pickle.load", "pickle.loads", "pickle.Unpickler", "trust_remote_code", "allow_pickle"):
            found.append(f"line {node.lineno}: {text}")
        elif isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle"):
            found.append(f"line {node.lineno}: {node.arg}")
        elif isinstance(node, ast.Constant) and node.value in ("trust_remote_code", "allow_pickle"):
            found.append(f"line {node.lineno}: {node.value}")
    return found


@pytest.mark.parametrize("file", sorted(ROOT.glob("*.py")), ids=lambda file: file.name)
def test_no_source_can_run_what_a_file_holds(file):
    assert not unsafe(file.read_text())


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "x = [torch.load(f, 'cpu', weights_only=safe)]",
        "from torch import load",
        "import pickle; pickle.load(f)",
        "pickle.loads(x)",
        "from pickle import Unpickler",
        "numpy.load(f, allow_pickle=True)",
        "datasets.load_dataset(name, trust_remote_code=True)",
        "options = {'trust_remote_code': True}",
    ],
)
def test_what_could_run_what_a_file_holds_is_found(line):
    assert unsafe(line)
    assert not unsafe("torch.load(f, map_location='cpu', weights_only=True)")


# ------------------------------------------------------------------------------------------- the constructor


@pytest.mark.parametrize(
    "wrong",
    [
        *(
            dict([(name, value)])
            for name in ("width", "heads", "patch_size", "channels")
            for value in (0, -1, 2**17, 1.0)
        ),
        *(dict(depth=value) for value in (0, 257, True, None)),
        *(dict(decoder_depth=value) for value in (-1, 257, "1")),
        *(dict(image_size=value) for value in (0, -8, 8.0, (8,), (8, -8), "8", None, [8, None])),
        *(dict(mlp_ratio=value) for value in (0, -1, float("inf"), 1e-9)),
        *(
            dict([(name, value)])
            for name in ("mean", "std")
            for value in ([], [1, 1], "abc", [1, 1, float("nan")], None)
        ),
        dict(std=(1, 1, 0)),
        dict(norm_eps=float("nan")),
        dict(class_token=1),
        dict(image_size=1028, patch_size=4),
    ],
    ids=str,
)
def test_nonsense_is_refused_by_the_constructor(wrong):
    with pytest.raises(ValueError):
        model(**wrong)


def test_what_makes_sense_is_taken_by_the_constructor():
    for right in (dict(image_size=(8, 12)), dict(image_size=[4, 4]), dict(mlp_ratio=2), dict(mean=[0, 0, 0])):
        model(**right)
    assert model(channels=1, mean=(0.5,), std=(0.1,)).config["mean"] == [0.5]
    assert model(channels=1).config["mean"] == [0.485, 0.456, 0.406]
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
    """A function after which no file can grow beyond 64 KiB, until the end of the test."""
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
    with pytest.raises(
        OSError, match=r"^\[Errno 27\] .*(model\.safetensors|mae\.pth) could not be written: File too"
    ) as e:
        smae.save(large, path, format=format)
    assert e.value.errno == errno.EFBIG and "\n" not in str(e.value)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_a_failure_of_any_other_kind_leaves_no_parts(monkeypatch, tmp_path):
    smae.save(model(), tmp_path / "run")
    before = (tmp_path / "run" / "config.json").read_text()
    for error, expected in ((KeyboardInterrupt(), KeyboardInterrupt), (RuntimeError("no\nreason"), OSError)):
        monkeypatch.setattr(torch, "save", lambda *_, error=error: (_ for _ in ()).throw(error))
        with pytest.raises(expected):
            smae.save(model(), tmp_path / "run" / "mae.pth", format="mae")
    with pytest.raises(TypeError):
        smae.save(model(), tmp_path / "run", config={"x": object()})
    assert sorted(file.name for file in (tmp_path / "run").iterdir()) == ["config.json", "model.safetensors"]
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


def test_a_folder_that_cannot_be_flushed_is_no_failure_but_a_broken_disk_is(monkeypatch, tmp_path):
    def fails(code):
        def fsync(handle):
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, "fsync", fsync)

    fails(errno.EINVAL)
    smae.flush(tmp_path)
    fails(errno.EIO)
    with pytest.raises(OSError):
        smae.flush(tmp_path)
    with pytest.raises(OSError, match="could not be written: Input/output error"):
        smae.save(model(), tmp_path / "run")
    assert not list((tmp_path / "run").iterdir())


if __name__ == "__main__":
    work(sys.argv[1:])
