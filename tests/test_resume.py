"""A run that is interrupted, by whatever, and resumed ends as one that never was: to the bit."""

import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import forked
import numpy as np
import psutil
import pytest
import torch
import undrawn
from helpers import ROOT, SMALL, contents, records, train_here

import checkpoint
import cli
import data
import run
import smae
import train
from batches import TrainBatches
from guide import Guide
from readers import Share, StreamCrops
from run import compare_configurations
from shapes import draw_shapes

BRIEF = [*SMALL, *"--max-images 40 --batch-size 8 --epochs 4 --guide-start 2 --lr 1e-3".split()]
BRIEF += "--workers 0 --precision no --save-every-steps 1 --keep 99".split()  # 5 steps an epoch, a checkpoint each


@pytest.fixture
def photos(photos):
    """40 pictures, four of them broken."""
    for i in (3, 18, 31):
        (photos / f"{i:02d}.png").write_bytes(b"not a picture")
    return photos


def outcome(out, step: int | None = None) -> dict:
    """All that a run has come to (after a step), but for times, names and where it lies."""
    name = f"checkpoint-{step:08d}" if step else checkpoint.folders(out)[0].name
    state = checkpoint.read(out / name)
    for key in ("config", "crc", "extra_steps"):
        del state[key]
    for key in ("seconds", "name"):
        del state["progress"][key]
    for record in state["progress"]["records"]:
        del record["seconds"], record["images_per_second"]
    return state


def differences(a, b, path="") -> list[str]:
    """Where two nests of dicts, lists, tensors and plain values differ."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [text for key in a for text in differences(a[key], b[key], f"{path}/{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [text for i, (x, y) in enumerate(zip(a, b)) for text in differences(x, y, f"{path}/{i}")]
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if torch.equal(a, b) else [path]
    return [] if a == b else [f"{path}: {a} is not {b}"]


def end_alike(whole, resumed, step: int | None = None):
    assert differences(outcome(whole, step), outcome(resumed, step)) == []
    if step is None:
        assert (whole / "model.safetensors").read_bytes() == (resumed / "model.safetensors").read_bytes()
        timeless = [
            [{k: v for k, v in line.items() if k not in ("seconds", "images_per_second")} for line in records(out)]
            for out in (whole, resumed)
        ]
        assert timeless[0] == timeless[1] and len(timeless[0]) == timeless[0][-1]["epoch"]


# ------------------------------------------------------------------------------------------- exact resume


@pytest.mark.parametrize(
    "extra",
    [
        "",
        "--workers 2",
        "--preload",
        "--accumulate 2 --clip-grad 0.5 --raw-pixels",
        "--guide cached --guide-debias --guide-every 1",
        "--guide cached --guide-every 5 --preload host",
        "--guide cached --guide-every 0 --guide-shuffle --hint-end 0.6 --hint-ratio 0.2",
        "--guide-from column:mask --hint-end 0.6 --hint-ratio 0.2",
        "--guide-debias --guide-layer decoder-1 --hint similar",
        "--mask amt --streaming",
        "--mask amt --save-every-steps 3",
        "--guide-start auto",
        "--streaming",
        "--streaming --workers 3",
        "--dataset PHOTOS --max-bad-images 0.2",
        "--dataset PHOTOS --max-bad-images 0.2 --workers 2",
        "--dataset PHOTOS --max-bad-images 0.2 --streaming --workers 2",
    ],
)
def test_a_resumed_run_ends_as_an_uninterrupted_one(extra, quick_drawing, monkeypatch, tmp_path, photos, capfd):
    """Interrupted within an epoch, where the masks change, where the guide looks again, before the last step."""
    monkeypatch.setattr(StreamCrops, "block", 8)
    arguments = [*BRIEF, *extra.replace("PHOTOS", str(photos)).split()]
    train_here(monkeypatch, *arguments, "--out", tmp_path / "whole")
    steps = 3 if "--save-every-steps 3" in extra else 1
    points = (3, 10, 13, 19) if steps == 1 else (9, 15)
    if "PHOTOS" in extra or "--streaming --workers" in extra:  # tests/test_readers.py has more for streams
        points = (3, 10)
    for point in points:
        out = tmp_path / f"from {point}"
        random.seed(9), np.random.seed(9), torch.manual_seed(9)
        resume = tmp_path / "whole" / f"checkpoint-{point:08d}"
        train_here(monkeypatch, *arguments, "--save-every-steps", 99, "--out", out, "--resume", resume)
        assert f"continuing from {resume}: epoch {point // 5 + 1}, {point % 5 * 8} images" in capfd.readouterr().out
        end_alike(tmp_path / "whole", out)


@pytest.fixture(scope="module")
def brief(tmp_path_factory):
    """A run as BRIEF says, which nothing disturbs."""
    out = tmp_path_factory.mktemp("brief") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "draw", undrawn.draw)
        train_here(patch, *BRIEF, "--out", out)
    return out


def test_a_different_point_in_the_data_would_be_noticed(brief, quick_drawing, monkeypatch, tmp_path):
    """The comparison above can fail: a resumed run that begins the epoch anew ends elsewhere."""
    epoch, resume = TrainBatches.epoch, ["--resume", brief / "checkpoint-00000003"]
    for name, part in (("same", slice(24 // 8, None)), ("other", slice(0, 2))):
        monkeypatch.setattr(
            TrainBatches,
            "epoch",
            lambda self, number, seen, part=part: (
                batch for batch in list(epoch(self, number, 0))[part if seen else slice(None)]
            ),
        )
        train_here(monkeypatch, *BRIEF, "--out", tmp_path / name, *resume)
    end_alike(brief, tmp_path / "same")
    assert differences(outcome(brief), outcome(tmp_path / "other"))


def test_all_random_states_are_kept():
    def draw() -> list:
        return [random.random(), np.random.rand(), np.random.normal(), torch.rand(()).item()]

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    np.random.normal()  # leaves a second one behind, which belongs to the state
    states = checkpoint.random_states()
    first = draw()
    random.seed(2), np.random.seed(2), torch.manual_seed(2)
    assert draw() != first
    checkpoint.set_random_states(states)
    assert draw() == first


# ------------------------------------------------------------------------------------------- signals and killing

LONG = [*SMALL, *"--max-images 40 --batch-size 8 --epochs 12 --guide-start 4 --lr 1e-3".split()]
LONG += "--guide cached --guide-every 3 --guide-debias --workers 0 --precision no --save-every 5".split()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of 60 steps that nothing disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    assert forked.finish(forked.start(folder / "log", *LONG, "--out", folder / "run")) == [0]
    return folder / "run"


def wait_for_step(out, step: int, processes: list, seconds: float = 60):
    deadline = time.monotonic() + seconds
    while not any(checkpoint.number(folder) >= step for folder in checkpoint.folders(out)):
        assert time.monotonic() < deadline and all(process.is_alive() for process in processes)
        time.sleep(0.01)


def test_a_signal_ends_a_run_after_the_step_with_a_checkpoint_and_a_code(whole, tmp_path):
    number = signal.SIGUSR1  # SIGTERM and SIGINT: the next test
    arguments = [*LONG, "--save-every-steps", 4, "--out", tmp_path / "run", "--resume", "auto"]
    processes = forked.start(tmp_path / "log", *arguments, patches="slow_steps")
    wait_for_step(tmp_path / "run", 8, processes)
    os.kill(processes[0].pid, number)
    assert forked.finish(processes, 30) == [128 + number]
    text = (tmp_path / "log-0").read_text()
    assert f"stopped by {number.name} in epoch" in text and "with the same command and --resume" in text
    last = checkpoint.folders(tmp_path / "run")[0]
    assert 8 <= checkpoint.number(last) < 60 and f"after step {checkpoint.number(last)}, with a checkpoint" in text
    assert forked.finish(forked.start(tmp_path / "log", *arguments)) == [0]
    end_alike(whole, tmp_path / "run")
    assert f"continuing from {last}" in (tmp_path / "log-0").read_text()


def test_a_signal_to_the_whole_group_does_not_take_the_workers_before_the_step_is_done(whole, tmp_path):
    """torch ends a main process, at any place, as soon as a worker is killed."""
    arguments = [*LONG, "--workers", 2, "--save-every-steps", 4, "--out", tmp_path / "run", "--resume", "auto"]
    for step, number in ((8, signal.SIGTERM), (20, signal.SIGINT)):
        processes = forked.start(tmp_path / "log", *arguments, patches="slow_steps")
        wait_for_step(tmp_path / "run", step, processes)
        os.killpg(processes[0].pid, number)
        assert forked.finish(processes, 30) == [128 + number]
        assert f"stopped by {number.name}" in (tmp_path / "log-0").read_text()
    assert forked.finish(forked.start(tmp_path / "log", *arguments)) == [0]
    end_alike(whole, tmp_path / "run")


def test_a_signal_repeated_by_a_launcher_counts_once_and_a_second_one_ends_the_run_at_once(tmp_path):
    code = """if True:
        import os, signal, time, checkpoint
        with checkpoint.Signals() as signals:
            for pause in (0, 0, 1.2):
                time.sleep(pause)
                print(signals.caught(), flush=True)
                os.kill(os.getpid(), signal.SIGTERM)
            print("never")"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.stdout.split() == ["0", "15", "15"] and result.returncode == 128 + signal.SIGTERM
    before = signal.getsignal(signal.SIGTERM)
    with checkpoint.Signals():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    "line, number",
    [
        ("python /venv/bin/accelerate launch train.py", signal.SIGTERM),
        ("python -m torch.distributed.run --standalone train.py", signal.SIGTERM),
        ("/accelerate/bin/bash", 0),
    ],
)
def test_a_launcher_that_is_gone_counts_as_a_signal(line, number, monkeypatch):
    read = checkpoint.Path.read_text
    monkeypatch.setattr(
        checkpoint.Path, "read_text", lambda self: line.replace(" ", "\0") if self.name == "cmdline" else read(self)
    )
    monkeypatch.setattr(os, "getppid", lambda: 2)  # these tests themselves may be an orphan's
    signals = checkpoint.Signals()
    assert signals.caught() == 0
    monkeypatch.setattr(os, "getppid", lambda: 1)  # as of any orphan
    assert signals.caught() == number


TORCHRUN = "torch.distributed.run --standalone --nproc_per_node 2"
ACCELERATE = "accelerate.commands.launch --cpu --num_processes 1"


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE])
@pytest.mark.parametrize("what", ["TERM launcher", "INT group", "TERM group", "USR1 processes", "KILL process"])
def test_under_a_launcher_nothing_is_lost_and_nothing_left_running(launcher, what, tmp_path):
    out = tmp_path / "run"
    arguments = [*launcher.split(), "train.py", *LONG, "--epochs", 4000, "--save-every", 5000, "--save-every-steps", 20]
    command = [str(x) for x in (sys.executable, "-m", *arguments, "--out", out, "--resume", "auto")]
    with open(tmp_path / "log", "w") as log:
        main = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
    deadline = time.monotonic() + 90
    while not checkpoint.folders(out):
        assert time.monotonic() < deadline and main.poll() is None
        time.sleep(0.1)

    def running() -> list:
        found = psutil.process_iter(["pid", "cmdline"])
        return [process.info for process in found if str(out) in (process.info["cmdline"] or [])]

    name, whom = what.split()
    number, processes = getattr(signal, f"SIG{name}"), [child.pid for child in psutil.Process(main.pid).children()]
    if whom == "group":
        os.killpg(main.pid, number)
    for pid in dict(launcher=[main.pid], processes=processes, process=processes[-1:]).get(whom, []):
        os.kill(pid, number)
    assert main.wait(60) != 0
    deadline = time.monotonic() + 10
    while left := running():
        assert time.monotonic() < deadline, f"still running: {left}"
        time.sleep(0.1)
    text = (tmp_path / "log").read_text()
    if what != "KILL process":
        assert f"stopped by SIG{name}" in text
    elif launcher == TORCHRUN:
        assert "error: another process of the run is gone" in text
    assert checkpoint.find(out) == checkpoint.folders(out)[0]


def kill_again_and_again(times: int, whole, tmp_path, seed: int = 0):
    """SIGKILL at random moments of a run that saves at every step, resumed each time: it ends as if it had not been."""
    rng, reached, torn = random.Random(seed), 0, 0
    out, arguments = tmp_path / "run", [*LONG, "--save-every-steps", 1, "--resume", "auto", "--out", tmp_path / "run"]
    for _ in range(times):
        processes = forked.start(tmp_path / "log", *arguments, patches="slow_steps")
        wait_for_step(out, reached + 1, processes)
        time.sleep(rng.uniform(0, 0.1))
        processes[0].kill()
        assert forked.finish(processes) == [-signal.SIGKILL]
        torn += bool(list(out.glob("*.part")) + list(out.glob("*.old")))
        whole_ones = [folder for folder in checkpoint.folders(out) if checkpoint.read(folder)]
        assert whole_ones == checkpoint.folders(out) and 1 <= len(whole_ones) <= 3
        reached = checkpoint.number(whole_ones[0])
        if reached > 50:  # from the start again
            shutil.rmtree(out)
            reached = 0
    assert forked.finish(forked.start(tmp_path / "log", *arguments)) == [0]
    end_alike(whole, out)
    assert not list(out.glob("checkpoint-*.*")) and len(checkpoint.folders(out)) == 2
    return torn


def test_a_run_that_is_killed_at_random_moments_ends_as_one_that_is_not(whole, tmp_path):
    kill_again_and_again(5, whole, tmp_path)


@pytest.mark.slow
def test_a_hundred_kills_lose_nothing(whole, tmp_path):
    torn = kill_again_and_again(100, whole, tmp_path, seed=1)
    print(f"100 kills, {torn} of them while a checkpoint was being written or removed")
    assert torn > 0


# ------------------------------------------------------------------------------------------- disks


def test_a_disk_that_takes_no_more_stops_nothing_and_breaks_nothing(whole, tmp_path):
    """No file may grow beyond 40 kB, which a checkpoint needs more than; the metrics still fit."""
    out = tmp_path / "run"
    arguments = [*LONG, "--out", out, "--resume", "auto", "--save-every-steps", 4]
    processes = forked.start(tmp_path / "log", *arguments, patches="slow_steps")
    wait_for_step(out, 8, processes)
    os.kill(processes[0].pid, signal.SIGTERM)
    assert forked.finish(processes) == [128 + signal.SIGTERM]
    before = {file: file.read_bytes() for file in out.rglob("checkpoint-*/*")}
    processes = forked.start(tmp_path / "log", *arguments, largest_file=40_000)
    assert forked.finish(processes) == [1]
    text = (tmp_path / "log-0").read_text()
    assert "WARNING: cannot write" in text and "checkpoint-00000060" in text and "File too large" in text
    assert "error: the last checkpoint, or the results, could not be written" in text and "Traceback" not in text
    assert {file: file.read_bytes() for file in out.rglob("checkpoint-*/*")} == before
    assert len(records(out)) == 12 and not list(out.rglob("*.part"))
    assert forked.finish(forked.start(tmp_path / "log", *arguments)) == [0]
    end_alike(whole, out)


def test_a_checkpoint_comes_at_least_every_so_often(quick_drawing, monkeypatch, tmp_path):
    monkeypatch.setattr(run, "LONGEST_UNSAVED", 0)
    train_here(monkeypatch, *BRIEF[: BRIEF.index("--save-every-steps")], "--keep", 99, "--out", tmp_path / "run")
    left = [checkpoint.number(folder) for folder in checkpoint.folders(tmp_path / "run")]
    assert left == [20, 19, 15, 10, 5]  # those that nobody asked for go when there are two newer ones
    monkeypatch.setattr(run, "LONGEST_UNSAVED", 3600)
    again = ["--resume", tmp_path / "run" / "checkpoint-00000019", "--overwrite", "--epochs", 6, "--guide-start", 2]
    train_here(
        monkeypatch, *BRIEF[: BRIEF.index("--save-every-steps")], "--keep", 99, *again, "--out", tmp_path / "run"
    )
    left = [checkpoint.number(folder) for folder in checkpoint.folders(tmp_path / "run")]
    assert left == [30, 25, 20, 15, 10, 5]  # also by a process that did not write them
    arguments = [*BRIEF[: BRIEF.index("--save-every-steps")], "--keep", 99, "--save-every", 2]
    train_here(monkeypatch, *arguments, "--out", tmp_path / "other")
    assert [checkpoint.number(folder) for folder in checkpoint.folders(tmp_path / "other")] == [20, 10]


@pytest.mark.slow
def test_a_full_file_system_loses_nothing(whole, tmp_path):
    """A file system that has room for one checkpoint, not for the next beside it; then for both."""
    disk = tmp_path / "disk"
    disk.mkdir()
    size = sum(file.stat().st_size for file in checkpoint.folders(whole)[0].iterdir())
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={int(1.9 * size)}", "none", disk], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system: {mounted.stderr.decode()}")
    try:
        arguments = [*LONG, "--out", disk / "run", "--resume", "auto", "--save-every-steps", 4]
        processes = forked.start(tmp_path / "log", *arguments, patches="slow_steps")
        assert forked.finish(processes) == [1]
        text = (tmp_path / "log-0").read_text()
        assert "No space left on device" in text and "Traceback" not in text
        assert [folder.name for folder in checkpoint.folders(disk / "run")] == ["checkpoint-00000004"]
        subprocess.run(["mount", "-o", f"remount,size={10 * size}", disk], check=True)
        assert forked.finish(forked.start(tmp_path / "log", *arguments)) == [0]
        assert "continuing from" in (tmp_path / "log-0").read_text()
        end_alike(whole, disk / "run")
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(small_model, monkeypatch, tmp_path):
    events, fsync, rename = [], os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda handle: events.append(("flush", os.fstat(handle).st_ino)) or fsync(handle))
    monkeypatch.setattr(os, "rename", lambda *names: events.append(("rename", str(names[1]))) or rename(*names))
    checkpoint.write(tmp_path, 7, small_model, dict(config={}, x=torch.ones(3)))
    folder = tmp_path / "checkpoint-00000007"
    named = events.index(("rename", str(folder)))
    flushed = [inode for kind, inode in events[:named] if kind == "flush"]
    assert {file.stat().st_ino for file in folder.iterdir()} < set(flushed)
    assert flushed[-1] == folder.stat().st_ino  # with the names of all files in it
    assert events[-1] == ("flush", tmp_path.stat().st_ino) and named < len(events) - 1
    assert torch.equal(checkpoint.read(folder)["x"], torch.ones(3))


def damage(folder, how: str):
    state, weights = folder / "state.pt", folder / "model.safetensors"
    if how == "gone":
        state.unlink()
    elif how == "no weights":
        weights.unlink()
    elif how == "empty":
        state.write_bytes(b"")
    elif how == "short":
        state.write_bytes(state.read_bytes()[:-1000])
    else:
        file = weights if how == "flipped weight" else state
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)


@pytest.mark.parametrize("how", ["gone", "no weights", "empty", "short", "flipped", "flipped weight"])
def test_a_broken_checkpoint_is_passed_over_with_a_warning(how, quick_drawing, monkeypatch, tmp_path, capfd):
    train_here(monkeypatch, *BRIEF, "--epochs", 2, "--out", tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "whole")
    for name in ("checkpoint-00000009", "checkpoint-00000010"):
        damage(tmp_path / "run" / name, how)
    with pytest.raises(SystemExit):
        resume = tmp_path / "run" / "checkpoint-00000010"
        train_here(monkeypatch, *BRIEF, "--epochs", 2, "--out", tmp_path / "new", "--resume", resume)
    errors = capfd.readouterr().err
    assert "checkpoint-00000010" in errors and (
        "not a complete checkpoint" in errors or "there is no checkpoint" in errors
    )
    train_here(monkeypatch, *BRIEF, "--epochs", 2, "--out", tmp_path / "run", "--resume", "auto")
    printed = capfd.readouterr().out
    assert printed.count("skipped a broken checkpoint") == 2 and "continuing from" in printed
    assert "checkpoint-00000008: epoch 2, 24 images" in printed
    end_alike(tmp_path / "whole", tmp_path / "run")
    broken = [folder.name[:19] for folder in (tmp_path / "run").glob("*.broken")]  # put aside, not removed
    assert sorted(broken) == ["checkpoint-00000009", "checkpoint-00000010"]
    for folder in checkpoint.folders(tmp_path / "run"):
        damage(folder, how)
    with pytest.raises(SystemExit):
        train_here(monkeypatch, *BRIEF, "--epochs", 2, "--out", tmp_path / "run", "--resume", "auto")
    assert "all checkpoints of" in (errors := capfd.readouterr().err) and "are broken" in errors


# ------------------------------------------------------------------------------------------- what may change


def test_the_newest_checkpoints_are_kept_and_the_others_go(quick_drawing, monkeypatch, tmp_path):
    for keep, left in ((1, [10]), (3, [10, 9, 8])):
        train_here(monkeypatch, *BRIEF, "--epochs", 2, "--keep", keep, "--out", tmp_path / str(keep))
        names = [folder.name for folder in checkpoint.folders(tmp_path / str(keep))]
        assert names == [f"checkpoint-{step:08d}" for step in left]
        model = smae.load(tmp_path / str(keep) / names[0])  # a checkpoint is as good as a run
        again = smae.load(tmp_path / str(keep))
        assert differences(dict(model.state_dict()), dict(again.state_dict())) == []
        config, its = (json.loads((tmp_path / str(keep) / x / "config.json").read_text()) for x in ("", names[0]))
        assert config == its and config["train"]["keep"] == keep


def test_auto_begins_a_run_that_has_not_begun_and_ends_one_that_is_done(quick_drawing, monkeypatch, tmp_path, capfd):
    arguments = [*BRIEF, "--epochs", 2, "--out", tmp_path / "run", "--resume", "auto"]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")  # stopped before its first checkpoint
    train_here(monkeypatch, *arguments)
    assert len(records(tmp_path / "run")) == 2
    before = contents(tmp_path / "run")
    for name in ("model.safetensors", "metrics.jsonl", "masks.png"):  # killed after its last checkpoint
        (tmp_path / "run" / name).unlink()
    train_here(monkeypatch, *arguments)
    assert contents(tmp_path / "run") == before
    assert "epoch 3, 0 images" in capfd.readouterr().out
    train_here(monkeypatch, *arguments[:-4], "--out", tmp_path / "copy", "--resume", tmp_path / "run")
    assert (tmp_path / "copy" / "model.safetensors").read_bytes() == before["model.safetensors"]
    assert [folder.name for folder in checkpoint.folders(tmp_path / "copy")] == ["checkpoint-00000010"]
    for folder in checkpoint.folders(tmp_path / "run"):
        shutil.rmtree(folder)
    with pytest.raises(SystemExit):  # a result without checkpoints is no run to go on with, nor one to lose
        train_here(monkeypatch, *arguments)
    assert "holds another run" in capfd.readouterr().err


def test_going_back_to_an_older_checkpoint_must_be_meant(brief, quick_drawing, monkeypatch, tmp_path, capfd):
    shutil.copytree(brief, tmp_path / "run")
    back = [*BRIEF, "--out", tmp_path / "run", "--resume", tmp_path / "run" / "checkpoint-00000017"]
    with pytest.raises(SystemExit):
        train_here(monkeypatch, *back)
    assert "checkpoint-00000020, checkpoint-00000019, checkpoint-00000018 of" in capfd.readouterr().err
    assert len(checkpoint.folders(tmp_path / "run")) == 20
    train_here(monkeypatch, *back, "--overwrite", "--lr", 2e-3, "--save-every-steps", 2)
    assert "changed: --lr 0.001 -> 0.002" in capfd.readouterr().out
    assert differences(outcome(brief, 17), outcome(tmp_path / "run", 17)) == []
    assert [checkpoint.number(folder) for folder in checkpoint.folders(tmp_path / "run")][:3] == [20, 18, 17]
    for step in (18, 20):
        assert differences(outcome(brief, step), outcome(tmp_path / "run", step))


def test_another_batch_size_goes_on_with_the_pictures_not_yet_seen_and_says_so(
    quick_drawing, monkeypatch, tmp_path, capfd
):
    arguments = [*BRIEF, "--blr", 0.032, "--epochs", 3]
    del arguments[arguments.index("--lr") : arguments.index("--lr") + 2]
    train_here(monkeypatch, *arguments, "--out", tmp_path / "whole")
    seen, epoch = [], TrainBatches.epoch

    def noted(self, number, start):
        for batch in epoch(self, number, start):
            seen.append((number, [int(i) for i in batch.indices]))
            yield batch

    monkeypatch.setattr(TrainBatches, "epoch", noted)
    resume = ["--resume", tmp_path / "whole" / "checkpoint-00000002"]
    train_here(monkeypatch, *arguments, "--batch-size", 4, "--out", tmp_path / "run", *resume)
    printed = capfd.readouterr().out
    assert "changed: --batch-size 8 -> 4" in printed and "changed: --lr 0.001 -> 0.0005" in printed
    order = np.random.default_rng((0, 1)).permutation(40)
    assert [i for number, indices in seen if number == 1 for i in indices] == order[16:].tolist()
    assert len(seen) == 6 + 10 + 10
    losses = [[record["loss"] for record in records(tmp_path / name)] for name in ("whole", "run")]
    assert losses[1] == pytest.approx(losses[0], rel=0.05) and losses[0] != losses[1]
    rates = [records(tmp_path / name)[-1]["lr"] for name in ("whole", "run")]
    assert rates[1] < rates[0] / 2
    # nothing is left of the epoch for a larger batch
    resume[1] = tmp_path / "whole" / "checkpoint-00000004"
    train_here(monkeypatch, *arguments, "--batch-size", 32, "--out", tmp_path / "rest", *resume)
    assert len(seen) == 26 + 2 and records(tmp_path / "rest")[0]["lr"] > 0


def test_a_run_that_goes_on_for_longer_stays_guided(quick_drawing, monkeypatch, tmp_path):
    """The default, half of the epochs, would make its masks random again."""
    arguments = [*SMALL, *"--max-images 16 --batch-size 8 --workers 0 --precision no --warmup-epochs 0".split()]
    arguments += ["--out", tmp_path / "run", "--resume"]
    for epochs in (2, 6):
        train_here(monkeypatch, *arguments, "--epochs", epochs)
    assert [record["phase"] for record in records(tmp_path / "run")] == ["random"] + ["selfguided"] * 5


def test_statistics_of_many_channels_are_measured_once():
    """Another processor, or a picture that has broken since, gave others, so that the run could not be resumed."""
    args = train.parse_arguments([*SMALL, "--channels", "5"])
    sizes = dict(width=32, depth=2, heads=2, image_size=32, patch_size=8)
    began = smae.SMAE(**sizes, channels=5, mean=[0.1] * 5, std=[0.3] * 5)
    model = train.build_model(args, began.config, dataset=[])
    assert model.statistics == began.statistics == ((0.1,) * 5, (0.3,) * 5)


def test_a_checkpoint_of_another_command_is_refused(small_model, tmp_path):
    checkpoint.write(tmp_path, 10, small_model, dict(config=dict(finetune={})), keep=1)
    (folder,) = checkpoint.folders(tmp_path)
    assert run.read_state(None, "train") is None and run.read_state(folder, "finetune")["config"] == dict(finetune={})
    with pytest.raises(ValueError, match="it is of another command than train"):
        run.read_state(folder, "train")


def test_only_what_can_be_resumed_is_told_to_be():
    for options, advice in (([], "start the command again"), (["use --resume"], "use --resume")):
        told = pytest.raises(run.ProcessLost, match=f"perhaps for lack of memory .*: {advice}")
        with told, run.lost_processes(1, *options):
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")


def test_relevance_that_is_not_needed_is_not_missed(small_model, capsys):
    told = []
    stand_in = types.SimpleNamespace(
        folder=types.SimpleNamespace(path=Path("nowhere")),
        accelerator=types.SimpleNamespace(is_main_process=False, wait_for_everyone=lambda: None),
        peers=types.SimpleNamespace(largest=lambda lost: [lost]),
        say=told.append,
    )
    state = dict(maps=17, look="of another kind")
    for guide, lost in (
        (Guide(small_model, cached=True, start=2, epochs=4), 1),
        (Guide(small_model, cached=True, start=4, epochs=4), 0),  # random masks
        (Guide(small_model, cached=True, start=2, epochs=4, source="centre"), 0),
        (Guide(small_model, start=2, epochs=4), 0),
    ):
        told.clear()
        train.restore_relevance(stand_in, guide, state, Path("nowhere"))
        assert len(told) == lost


def test_a_weight_decay_that_was_changed_is_the_new_one(quick_drawing, monkeypatch, tmp_path, capfd):
    train_here(monkeypatch, *BRIEF, "--epochs", 1, "--out", tmp_path / "run")
    resume = ["--resume", tmp_path / "run" / "checkpoint-00000003"]
    for decay in (0.05, 0.9):
        arguments = [*BRIEF, "--epochs", 1, "--weight-decay", decay, "--out", tmp_path / str(decay)]
        train_here(monkeypatch, *arguments, *resume)
        groups = outcome(tmp_path / str(decay))["optimizer"]["param_groups"]
        assert [group["weight_decay"] for group in groups] == [decay, 0]
    assert "changed: --weight-decay 0.05 -> 0.9" in capfd.readouterr().out


def test_two_runs_never_write_to_the_same_folder(started, monkeypatch, tmp_path):
    shutil.copytree(started, tmp_path / "run")
    with checkpoint.Lock(tmp_path / "run") as lock:
        lock.take()
        with (
            checkpoint.Lock(tmp_path / "run", patience=0.3) as other,
            pytest.raises(ValueError, match="another run is"),
        ):
            other.take()
        monkeypatch.setattr(checkpoint.Lock.__init__, "__defaults__", (0.3,))
        for extra in (["--resume", "auto"], ["--overwrite"]):
            with pytest.raises(SystemExit):
                train_here(monkeypatch, *BRIEF, "--epochs", 1, "--out", tmp_path / "run", *extra)
        (tmp_path / "new").mkdir()
        with checkpoint.Lock(tmp_path / "new") as another:
            another.take()
    with checkpoint.Lock(tmp_path / "run", patience=0.3) as next_one:
        next_one.take()
    assert contents(started) == contents(tmp_path / "run")


def test_a_folder_that_another_run_has_filled_meanwhile_is_left_alone(small_model, tmp_path):
    files = ("config.json", "metrics.jsonl")
    with checkpoint.Lock(tmp_path / "run") as lock, checkpoint.Lock(tmp_path / "own") as own:
        late, alone = run.Folder(tmp_path / "run", lock, files), run.Folder(tmp_path / "own", own, files)
        checkpoint.write(tmp_path / "run", 10, small_model, dict(config={}), keep=1)
        (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
        before = contents(tmp_path / "run")
        for _ in range(2):
            with pytest.raises(checkpoint.Locked, match=r"has written to .* meanwhile"):
                late.prepare()
        assert contents(tmp_path / "run") == before
        alone.prepare()
        (tmp_path / "own" / "metrics.jsonl").write_text("{}\n")
        alone.prepare()
        assert (tmp_path / "own" / "metrics.jsonl").exists()


def test_a_folder_that_cannot_be_claimed_is_an_error_everywhere(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    told = []
    monkeypatch.setattr(run, "broadcast_object_list", lambda values: told.append(values[0]) or values)
    with checkpoint.Lock(tmp_path / "file" / "run") as lock:
        folder = run.Folder(tmp_path / "file" / "run", lock, ())
        process = types.SimpleNamespace(folder=folder, accelerator=types.SimpleNamespace(is_main_process=True))
        with pytest.raises(OSError, match="file"):
            run.Run.claim_folder(process)
    monkeypatch.setattr(run, "broadcast_object_list", lambda values: told)  # what another process is told
    process.accelerator.is_main_process = False
    with pytest.raises(OSError, match="file"):
        run.Run.claim_folder(process)


def test_a_checkpoint_that_cannot_be_removed_does_not_keep_others_from_being_written(
    small_model, monkeypatch, tmp_path
):
    def fails(folder, ignore_errors=False):
        if not ignore_errors:
            raise OSError(39, "Directory not empty")

    monkeypatch.setattr(shutil, "rmtree", fails)
    for step in range(1, 5):
        checkpoint.write(tmp_path, step, small_model, dict(config={}), keep=1)
        assert [checkpoint.number(folder) for folder in checkpoint.folders(tmp_path)] == [step]


def test_a_checkpoint_goes_by_any_path(started, quick_drawing, monkeypatch, tmp_path):
    shutil.copytree(started, tmp_path / "run")
    (tmp_path / "link").symlink_to(tmp_path / "run" / "checkpoint-00000005")
    monkeypatch.chdir(tmp_path)
    for path in ("link", "run/../run/checkpoint-00000005"):
        train_here(monkeypatch, *BRIEF, "--epochs", 1, "--warmup-epochs", 0, "--out", "run", "--resume", path)
        assert len(checkpoint.folders(tmp_path / "run")) == 5


@pytest.mark.parametrize(
    "changed, message",
    [
        ("--width 64", "cannot resume with another model: it had width 32, now 64"),
        ("--raw-pixels", "cannot resume with another model: it had normalize_pixels True, now False"),
        ("--image-size 64", "another model: it had image_size [32, 32], now [64, 64]"),
        ("--dataset PHOTOS", "cannot resume with another data set: it was shapes, 40 images, and is"),
        ("--max-images 39", "another data set: it was shapes, 40 images, and is shapes, 39"),
        ("--split test", "another data set"),
        ("--seed 1", "cannot resume with other options: --seed was 0"),
        ("--resume nowhere", "--resume nowhere: there is no checkpoint"),
        ("--keep 0", "--keep must be at least 1"),
        ("--save-every-steps 0", "--save-every-steps must be at least 1"),
    ],
)
def test_another_model_or_data_set_is_refused(changed, message, started, monkeypatch, tmp_path, photos, capfd):
    arguments = [*BRIEF, "--resume", started / "checkpoint-00000003", "--out", tmp_path / "run"]
    with pytest.raises(SystemExit):
        train_here(monkeypatch, *arguments, *changed.replace("PHOTOS", str(photos)).split())
    errors = [line for line in capfd.readouterr().err.splitlines() if "error:" in line]
    assert len(errors) == 1 and message in errors[0] and not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """A run of one epoch, with a checkpoint at each of its five steps."""
    folder = tmp_path_factory.mktemp("started")
    arguments = [*BRIEF, "--epochs", 1, "--warmup-epochs", 0, "--out", folder / "run"]
    assert forked.finish(forked.start(folder / "log", *arguments)) == [0]
    return folder / "run"


@pytest.mark.parametrize("epoch, seen, epochs, begun", [(3, 8, 2, 3), (9, 0, 7, 8), (3, 0, 2, None), (3, 8, 3, None)])
def test_epochs_that_have_begun_cannot_be_taken_back(epoch, seen, epochs, begun):
    """A run once ended at once, well, and named files that it had not written."""
    config = dict(model={}, train=dict(epochs=epochs), data=dict(images=40, pictures=[]))
    state = dict(config=config, processes=[{}], progress=dict(epoch=epoch, seen=seen))
    how = dict(fixed=set(), ignored=set())
    if begun is None:
        assert compare_configurations(state, config, "train", 1, **how) == []
        return
    with pytest.raises(ValueError, match=f"--epochs {epochs}: epoch {begun} had begun"):
        compare_configurations(state, config, "train", 1, **how)


@pytest.mark.parametrize("extra", [[], ["--resume", "ELSEWHERE"]])
def test_the_checkpoints_of_a_run_that_has_no_results_yet_are_not_lost(extra, started, monkeypatch, tmp_path, capfd):
    """An interrupted first epoch leaves nothing else; the same command without --resume once removed them."""
    shutil.copytree(started / "checkpoint-00000003", tmp_path / "run" / "checkpoint-00000003")
    extra = [str(started) if word == "ELSEWHERE" else word for word in extra]
    with pytest.raises(SystemExit):
        train_here(monkeypatch, *BRIEF, "--epochs", 1, "--warmup-epochs", 0, "--out", tmp_path / "run", *extra)
    assert "run holds another run (checkpoint-00000003)" in capfd.readouterr().err
    assert len(checkpoint.folders(tmp_path / "run")) == 1


def test_data_that_has_moved_are_the_same_data_even_if_a_picture_broke(
    quick_drawing, monkeypatch, tmp_path, photos, capfd
):
    arguments = [*BRIEF, "--epochs", 2, "--max-bad-images", 0.3]
    train_here(monkeypatch, *arguments, "--dataset", photos, "--out", tmp_path / "whole")
    photos = photos.rename(tmp_path / "elsewhere")
    (photos / "05.png").write_bytes(b"broken since")
    resume = ["--resume", tmp_path / "whole" / "checkpoint-00000003"]
    train_here(monkeypatch, *arguments, "--dataset", photos, "--out", tmp_path / "run", *resume)
    assert "changed: --dataset" in capfd.readouterr().out and len(records(tmp_path / "run")) == 2


def test_a_run_that_started_from_another_goes_on_without_it(quick_drawing, monkeypatch, tmp_path, capfd):
    train_here(monkeypatch, *BRIEF, "--epochs", 1, "--out", tmp_path / "first")
    arguments = ["--init-from", tmp_path / "first", *BRIEF[len(SMALL) :], "--guide-start", "auto"]
    train_here(monkeypatch, *arguments, "--out", tmp_path / "whole")
    train_here(monkeypatch, *arguments, "--epochs", 1, "--out", tmp_path / "raw", "--raw-pixels")
    moved = shutil.move(tmp_path / "first", tmp_path / "moved")
    train_here(monkeypatch, *BRIEF, "--epochs", 1, "--out", tmp_path / "own")
    train_here(monkeypatch, "--init-from", moved, *BRIEF, "--epochs", 2, "--out", tmp_path / "own", "--resume")
    assert smae.config_of(tmp_path / "own")["train"]["init_from"] is None  # it began without
    for point, again in ((3, arguments), (13, arguments[2:])):  # it need not be named again
        resume = ["--resume", tmp_path / "whole" / f"checkpoint-{point:08d}"]
        train_here(monkeypatch, *again, "--out", tmp_path / str(point), *resume)
        end_alike(tmp_path / "whole", tmp_path / str(point))
    train_here(monkeypatch, *arguments[2:], "--epochs", 2, "--out", tmp_path / "raw", "--resume")
    config = smae.config_of(tmp_path / "raw")
    assert config["train"]["raw_pixels"] and not config["model"]["normalize_pixels"]
    assert config["train"]["init_from"] == str(tmp_path / "first")
    with pytest.raises(SystemExit):
        train_here(monkeypatch, *arguments, "--depth", 5, "--out", tmp_path / "other", *resume)
    assert "another model: it had depth 2, now 5" in capfd.readouterr().err


def test_a_checkpoint_from_before_an_argument_existed_can_be_resumed(brief, quick_drawing, monkeypatch, tmp_path):
    read = checkpoint.read

    def older(folder):
        state = read(folder)
        for name in ("registers", "norm_after_mean"):
            del state["config"]["model"][name]
        return state

    monkeypatch.setattr(checkpoint, "read", older)
    resume = ["--resume", brief / "checkpoint-00000013"]
    train_here(monkeypatch, *BRIEF, *resume, "--out", tmp_path / "again")
    assert records(tmp_path / "again")[-1]["loss"] == records(brief)[-1]["loss"]


def test_trackers_show_steps_epochs_and_masks_and_go_on_where_the_run_does(quick_drawing, monkeypatch, tmp_path):
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    arguments = [*BRIEF, "--log-with", "tensorboard", "--out", tmp_path / "run"]
    train_here(monkeypatch, *arguments)
    resume = ["--resume", tmp_path / "run" / "checkpoint-00000013", "--overwrite"]
    train_here(monkeypatch, *arguments, *resume)
    events = EventAccumulator(str(tmp_path / "run" / "smae"), size_guidance=dict(images=0))
    events.Reload()
    expected = records(tmp_path / "run")
    steps = [record["epoch"] * expected_steps(tmp_path / "run") for record in expected]

    def values(name: str) -> list:
        return [scalar.value for scalar in events.Scalars(name)]

    for name in ("loss", "lr", "epoch"):
        assert [scalar.step for scalar in events.Scalars(name)] == steps, name
        assert values(name) == pytest.approx([record[name] for record in expected]), name
    blocks = len(expected[0]["exploitation_masked"])
    for block in range(blocks):
        wanted = [record["exploitation_masked"][block] for record in expected]
        assert values(f"exploitation_masked/{block + 1}") == pytest.approx(wanted)
    of_steps = [scalar.step for scalar in events.Scalars("step/loss")]
    assert set(range(10, steps[-1] + 1, 10)) <= set(of_steps) and of_steps == sorted(set(of_steps))
    assert min(values("step/images_per_second")) > 0 and len(values("step/lr")) == len(of_steps)
    with Image.open(tmp_path / "run" / "masks.png") as sheet:
        last = events.Images("masks")[-1]
        assert (last.width, last.height, last.step) == (*sheet.size, steps[-1])
        logged = Image.open(io.BytesIO(last.encoded_image_string))
        assert np.array_equal(np.asarray(logged), np.asarray(sheet.convert("RGB")))

    # another run in its place: its curves begin anew
    train_here(monkeypatch, *arguments, "--epochs", 3, "--overwrite")
    events.Reload()
    assert [scalar.step for scalar in events.Scalars("loss")] == steps[:3]
    # and one that goes on from elsewhere
    shutil.copytree(tmp_path / "run" / "checkpoint-00000010", tmp_path / "kept" / "checkpoint-00000010")
    train_here(monkeypatch, *arguments, "--resume", tmp_path / "kept" / "checkpoint-00000010", "--overwrite")
    events.Reload()
    assert [scalar.step for scalar in events.Scalars("loss")] == steps[2:]


def expected_steps(out) -> int:
    """The steps of an epoch of a run."""
    config = json.loads((out / "config.json").read_text())
    return config["data"]["images"] // config["train"]["batch_size"]


# ------------------------------------------------------------------------------------------- numbers


def test_the_scaler_of_fp16_is_part_of_a_checkpoint(quick_drawing, monkeypatch, tmp_path):
    """On a CPU, Accelerate has none: one of torch stands in its place."""
    scalers, make = [], cli.make_accelerator

    def with_scaler(*arguments, **options):
        accelerator = make(*arguments, **options)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=4)
        scalers.append(accelerator.scaler)
        return accelerator

    monkeypatch.setattr(cli, "make_accelerator", with_scaler)
    train_here(monkeypatch, *BRIEF, "--out", tmp_path / "whole")
    assert outcome(tmp_path / "whole")["scaler"]["scale"] == 8.0 * 2**5
    for point in (6, 11):
        resume = ["--resume", tmp_path / "whole" / f"checkpoint-{point:08d}"]
        train_here(monkeypatch, *BRIEF, "--out", tmp_path / str(point), *resume)
        end_alike(tmp_path / "whole", tmp_path / str(point))


def poisoned_forward(monkeypatch, call: int, value: float, gradient: bool = False):
    """The loss of the n-th batch that is learned from becomes ``value``, or only its gradient does."""
    forward, calls = smae.SMAE.forward, []

    def poisoned(self, images, mask):
        loss = forward(self, images, mask)
        calls.append(1)
        if len(calls) == call and gradient:
            loss.register_hook(lambda slope: slope * value)
        return loss * value if len(calls) == call and not gradient else loss

    monkeypatch.setattr(smae.SMAE, "forward", poisoned)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_with_step_images_and_masks_and_spoils_no_checkpoint(
    value, brief, quick_drawing, monkeypatch, tmp_path, capfd
):
    with monkeypatch.context() as patch:
        poisoned_forward(patch, 14, value)
        with pytest.raises(SystemExit) as stopped:
            train_here(patch, *BRIEF, "--out", tmp_path / "run")
    assert stopped.value.code == 1
    errors = [line for line in capfd.readouterr().err.splitlines() if "error:" in line]
    wrong = np.random.default_rng((0, 3)).permutation(40)[24:32].tolist()
    assert len(errors) == 1 and f"the loss is {value} in epoch 3, step 14 of the run, selfguided masks" in errors[0]
    assert f"images {', '.join(map(str, wrong))} of the data" in errors[0] and "with --resume" in errors[0]
    assert all(torch.isfinite(x).all() for x in smae.load(tmp_path / "run").state_dict().values())
    assert checkpoint.folders(tmp_path / "run")[0].name == "checkpoint-00000013"
    train_here(monkeypatch, *BRIEF, "--out", tmp_path / "run", "--resume", "auto")
    end_alike(brief, tmp_path / "run")


def test_weights_that_are_no_numbers_are_not_saved(quick_drawing, monkeypatch, tmp_path, capfd):
    """The loss still is a number when a gradient is not."""
    poisoned_forward(monkeypatch, 14, float("nan"), gradient=True)
    with pytest.raises(SystemExit):
        train_here(monkeypatch, *BRIEF, "--out", tmp_path / "run")
    errors = capfd.readouterr().err
    assert "no longer finite in epoch 3, step 14 of the run, selfguided masks" in errors
    assert checkpoint.folders(tmp_path / "run")[0].name == "checkpoint-00000013"


def test_a_loss_that_is_no_number_is_found_without_a_checkpoint_being_due(quick_drawing, monkeypatch, tmp_path, capfd):
    arguments = BRIEF[: BRIEF.index("--save-every-steps")]
    poisoned_forward(monkeypatch, 3, float("nan"))
    with pytest.raises(SystemExit):
        train_here(monkeypatch, *arguments, "--keep", 1, "--save-every", 4, "--out", tmp_path / "run")
    assert "the loss is nan in epoch 1, step 3 of the run, random masks" in capfd.readouterr().err


# ------------------------------------------------------------------------------------------- several processes


SHORT = [*LONG, "--epochs", 6]


def test_two_processes_resume_to_the_bit_and_stop_together(tmp_path):
    arguments = [*SHORT, "--save-every-steps", 4]
    processes = forked.start(tmp_path / "log", *arguments, "--out", tmp_path / "whole", world=2, patches="slow_steps")
    assert forked.finish(processes) == [0, 0]
    arguments += ["--out", tmp_path / "run", "--resume", "auto"]
    for step, rank, number in ((8, 1, signal.SIGTERM), (24, 0, signal.SIGUSR1)):
        processes = forked.start(tmp_path / "log", *arguments, world=2, patches="slow_steps")
        wait_for_step(tmp_path / "run", step, processes)
        os.kill(processes[rank].pid, number)  # one of them only
        assert forked.finish(processes, 30) == [128 + number] * 2
    assert forked.finish(forked.start(tmp_path / "log", *arguments, world=2)) == [0, 0]
    end_alike(tmp_path / "whole", tmp_path / "run")

    arguments = [*SHORT, "--resume", tmp_path / "run" / checkpoint.folders(tmp_path / "run")[1].name]
    arguments += ["--out", tmp_path / "one"]
    assert forked.finish(forked.start(tmp_path / "log", *arguments)) == [0]
    assert "changed: processes 2 -> 1" in (tmp_path / "log-0").read_text()
    losses = [[record["loss"] for record in records(tmp_path / name)] for name in ("whole", "one")]
    assert losses[1] == pytest.approx(losses[0], rel=2e-3) and len(losses[1]) == 6


def test_two_processes_leave_another_run_alone(whole, tmp_path):
    processes = forked.start(tmp_path / "log", *SHORT, "--out", whole, world=2)
    assert forked.finish(processes, 60) == [1, 1]
    said = "".join((tmp_path / f"log-{rank}").read_text() for rank in (0, 1))
    assert said.count("holds another run") == 1 and "Traceback" not in said


@pytest.mark.parametrize(
    "extra", ["--streaming --workers 1", "--preload --accumulate 2", "--workers 2 --guide cached --guide-debias"]
)
def test_two_processes_resume_to_the_bit_whatever_they_read(extra, tmp_path):
    arguments = [*BRIEF, *extra.split()]
    for name, resume in (("whole", []), ("run", ["--resume", tmp_path / "whole" / "checkpoint-00000013"])):
        log = tmp_path / f"log {name}"
        processes = forked.start(log, *arguments, "--out", tmp_path / name, *resume, world=2, patches="slow_steps")
        assert forked.finish(processes) == [0, 0]
    end_alike(tmp_path / "whole", tmp_path / "run")


def test_two_processes_stop_together_though_the_disk_takes_no_checkpoint(tmp_path):
    arguments = [*LONG, "--save-every-steps", 4, "--out", tmp_path / "run"]
    started = forked.start(tmp_path / "log", *arguments, world=2, largest_file=40_000, patches="slow_steps")
    deadline = time.monotonic() + 60
    while "WARNING: cannot write" not in (tmp_path / "log-0").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.kill(started[1].pid, signal.SIGTERM)
    assert forked.finish(started, 30) == [1, 1]
    assert "error: the last checkpoint, or the results, could not be written" in (tmp_path / "log-0").read_text()


@pytest.mark.parametrize("rank", [0, 1])
def test_when_a_process_is_killed_the_other_stops_with_a_message_and_the_run_can_be_resumed(rank, tmp_path):
    arguments = [*SHORT, "--save-every-steps", 4, "--out", tmp_path / "run", "--resume", "auto"]
    processes = forked.start(tmp_path / "log", *arguments, world=2, patches="slow_steps")
    wait_for_step(tmp_path / "run", 8, processes)
    processes[rank].kill()
    codes = forked.finish(processes, 60)
    assert codes[rank] == -signal.SIGKILL and codes[1 - rank] == 1
    text = (tmp_path / f"log-{1 - rank}").read_text()
    assert "error: another process of the run is gone" in text and "Traceback" not in text
    assert forked.finish(forked.start(tmp_path / "log", *arguments, world=2)) == [0, 0]
    assert "continuing from" in (tmp_path / "log-0").read_text() and len(records(tmp_path / "run")) == 6


def test_a_dead_worker_ends_the_run_with_a_message(tmp_path):
    arguments = [*LONG, "--workers", 2, "--save-every-steps", 4, "--out", tmp_path / "run", "--resume", "auto"]
    processes = forked.start(tmp_path / "log", *arguments, patches="slow_steps")
    wait_for_step(tmp_path / "run", 4, processes)
    children = psutil.Process(processes[0].pid).children()
    assert len(children) >= 2
    children[-1].kill()
    assert forked.finish(processes, 60) == [1]
    text = (tmp_path / "log-0").read_text()
    assert "error: a process that reads pictures died" in text and "with --resume" in text
    assert checkpoint.find(tmp_path / "run")


@pytest.mark.parametrize("extra", ["", "--streaming"])
def test_fewer_pictures_than_processes_need_end_in_a_line(extra, tmp_path):
    arguments = [*LONG[: LONG.index("--guide")], "--max-images", 1, *extra.split(), "--out", tmp_path / "run"]
    codes = forked.finish(forked.start(tmp_path / "log", *arguments, world=2), 60)
    assert codes == [1, 1]
    assert "needs more images than the data has (1)" in (tmp_path / "log-0").read_text()


def write_shards(folder, sizes):
    folder.mkdir()
    row = next(draw_shapes("test", 1, 32))["image"]
    row.save(folder.parent / "picture.png")
    blob = (folder.parent / "picture.png").read_bytes()
    import datasets

    features = datasets.Features(image=datasets.Image())
    for i, size in enumerate(sizes):
        shard = datasets.Dataset.from_dict({"image": [dict(bytes=blob, path=None)] * size}, features)
        shard.to_parquet(folder / f"train-{i:05d}-of-{len(sizes):05d}.parquet")
    return folder


@pytest.mark.parametrize("sizes, workers", [([20, 0], 0), ([20, 0, 20, 0], 1), ([20, 0, 0], 2), ([3, 40], 2)])
def test_empty_and_uneven_shards_of_a_stream_never_hang(sizes, workers, tmp_path):
    folder = write_shards(tmp_path / "shards", sizes)
    arguments = [*LONG[: LONG.index("--guide")], "--streaming", "--dataset", folder, "--max-images", 20, "--epochs", 3]
    arguments += ["--workers", workers, "--precision", "no", "--out", tmp_path / "run"]
    codes = forked.finish(forked.start(tmp_path / "log", *arguments, world=2, patches="slow_steps"), 90)
    assert codes == [0, 0] and len(records(tmp_path / "run")) == 3


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_that_turns_out_empty_says_so(workers, monkeypatch):
    stream = data.load_images("shapes", streaming=True, max_images=20)
    monkeypatch.setattr(StreamCrops, "_read", lambda self, parts: iter(()))
    batches = TrainBatches(stream, 32, 4, length=20, workers=workers, share=Share(1, 2))
    with pytest.raises(data.NothingToRead, match="no more pictures can be read"):
        list(batches.epoch(1))
