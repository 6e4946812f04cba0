import json
import math
import os
import re
import shlex
import signal
import statistics
import sys
import threading
import time

import forked
import pytest
import torch
from test_train import SMALL, contents

import data
import eval as evaluation
import reproduce
import smae
import train

PRETRAIN = " ".join([*SMALL, *"--max-images 48 --batch-size 16 --workers 0 --precision no".split()])
QUICK = ["--arms", "random", "cached", "--seeds", "0", "--epochs", "2", "--pretrain", PRETRAIN]
QUICK += ["--finetune", "--epochs 1 --max-images 48 --batch-size 16 --workers 0", "--probe", "--workers 0"]


class Forked:
    """In place of subprocess.Popen: a process that need not import everything first."""

    def __init__(self, arguments, stdout, stderr, env, cwd):
        script = arguments[1].removesuffix(".py")
        (self.process,) = forked.start(f"{stdout.name}", *arguments[2:], script=script)

    def wait(self) -> int:
        self.process.join()
        return self.process.exitcode

    def terminate(self):
        self.process.terminate()


@pytest.fixture
def reproduced(monkeypatch, capsys):
    """A function that runs reproduce.main() with options, and gives what it printed."""
    monkeypatch.setattr(reproduce.subprocess, "Popen", Forked)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(train, "best_precision", lambda: "no")
    monkeypatch.setattr(os, "sched_setaffinity", lambda *_: None)  # the server of all forks would stay there
    handler = signal.getsignal(signal.SIGTERM)

    def run(*arguments) -> str:
        monkeypatch.setattr(sys, "argv", ["reproduce.py", *map(str, arguments)])
        reproduce.main()
        return capsys.readouterr().out

    yield run
    signal.signal(signal.SIGTERM, handler)


def test_an_experiment_goes_from_pre_training_to_a_table_and_is_not_done_twice(reproduced, monkeypatch, tmp_path):
    out = tmp_path / "experiment"
    text = reproduced(*QUICK, "--out", out)
    assert {"table.md", "results.json", "epochs.png", "minutes.png", "masks-random.png", "masks-cached.png"} <= {
        file.name for file in out.iterdir()
    }
    records = json.loads((out / "results.json").read_text())
    assert [(r["arm"], r["epoch"]) for r in records] == [(a, e) for a in ("random", "cached") for e in (1, 2)]
    assert records[0]["knn"] == records[2]["knn"] and records[0]["linear"] == records[2]["linear"]  # begun in common
    assert all(("finetune" in r) == (r["epoch"] == 2) for r in records)
    for record in records:
        lines = (out / f"{record['arm']}-seed0" / "metrics.jsonl").read_text().splitlines()
        epochs = [json.loads(line) for line in lines][: record["epoch"]]
        assert record["minutes"] == pytest.approx(sum(epoch["seconds"] for epoch in epochs) / 60)
        assert record["loss"] == epochs[-1]["loss"]
    linear = next(
        line for line in (out / "table.md").read_text().split("linear probe")[1].splitlines() if "cached" in line
    )
    lead = records[3]["linear"] - records[1]["linear"]
    assert f"| {records[2]['linear']:.1f} | {records[3]['linear']:.1f} | {lead:+.1f} | 1 |" in linear

    # the same to the bit as a run that has been guided from its own first phase on
    alone = tmp_path / "alone"
    options = shlex.split(f"{reproduce.SCALES['demo']['pretrain']} {PRETRAIN} {reproduce.ARMS['cached']}")
    options += ["--preload", "--epochs", 2, "--guide-start", 1, "--out", alone]
    assert forked.finish(forked.start(tmp_path / "log", *options)) == [0]
    assert contents(alone)["model.safetensors"] == contents(out / "cached-seed0")["model.safetensors"]
    assert contents(out / "random-seed0")["model.safetensors"] != contents(alone)["model.safetensors"]

    # as eval.py judges
    last = sorted((out / "cached-seed0").glob("checkpoint-*"))[-1]
    for command in ("knn", "linear"):
        options = f"--checkpoint {last} --pool mean --max-images 48 --workers 0 --out {tmp_path / command}".split()
        monkeypatch.setattr(sys, "argv", ["eval.py", command, *options])
        evaluation.main()
        result = json.loads((tmp_path / command / "result.json").read_text())
        assert result["top1"] == pytest.approx(records[3][command])

    before = contents(out)
    again = reproduced(*QUICK, "--out", out)
    after = contents(out)
    assert "pre-training" in text and "fine-tuning" in text
    assert again.splitlines()[-1] == f"wrote {out / 'table.md'}" and "training" not in again and "tuning" not in again
    assert {name for name in before if before[name] != after[name]} <= {"epochs.png", "minutes.png"}
    more = reproduced(*QUICK, "--arm", "layer-1=--mask selfguided --guide-layer 1 --guide-every 1", "--out", out)
    assert "pre-training layer-1-seed0" in more and "cached" not in more
    assert "| layer-1 |" in (out / "table.md").read_text()

    with pytest.raises(SystemExit):
        reproduced(*QUICK, "--epochs", 4, "--out", out)
    assert after["results.json"] != b"" and contents(out)["table.md"] != after["table.md"]


def test_selection_leaves_the_test_data_alone(reproduced, monkeypatch, tmp_path):
    seen, load = [], evaluation.eval_batches
    monkeypatch.setattr(
        evaluation,
        "eval_batches",
        lambda args, accelerator, part, **how: seen.append(part) or load(args, accelerator, part, **how),
    )
    out = tmp_path / "experiment"
    text = reproduced(*QUICK, "--select", "--arms", "random", "--out", out)
    pictures = [[record["image"]["bytes"] for record in part] for part in seen]
    training = [record["image"]["bytes"] for record in data.load_images("shapes", max_images=48)]
    assert [len(part) for part in pictures] == [38, 10] and sorted(pictures[0] + pictures[1]) == sorted(training)
    assert "fine-tuning" not in text and "held out" in (out / "table.md").read_text()
    assert not (out / "random-seed0" / "tests.json").exists()


@pytest.mark.parametrize("options, shared", [
    ("--mask selfguided --guide-start 2", 2),
    ("--mask selfguided --guide-start 3 --hint none --guide-layer 1", 2),
    ("--mask selfguided --guide-start 0", None),
    ("--mask selfguided --mask-ratio 0.6", None),
    ("--mask selfguided --blr 1e-4", None),
    ("--mask selfguided --guide-start auto", None),
])  # fmt: skip
def test_only_what_is_the_same_until_the_guide_starts_goes_on_from_random_masks(monkeypatch, tmp_path, options, shared):
    arguments = ["reproduce.py", "--epochs", "8", "--arm", f"mine={options}", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    args = reproduce.parse_arguments()
    random, mine = reproduce.Run(args, "random", 0), reproduce.Run(args, "mine", 0)
    assert mine.resume(random) == "auto"  # as long as that is not trained
    for step in (20, 40, 60, 70, 80, 160):
        (random.out / f"checkpoint-{step:08d}").mkdir(parents=True)
    (random.out / "metrics.jsonl").write_text(json.dumps(dict(epoch=8)))
    assert sorted(random.checkpoints()) == [1, 2, 3, 4, 8]
    wanted = str(random.out / "checkpoint-00000040") if shared == 2 else "auto"
    if "start 3" in options:
        wanted = str(random.out / "checkpoint-00000060")
    assert mine.resume(random) == wanted and random.resume(random) == "auto"
    (mine.out / "checkpoint-00000060").mkdir(parents=True)
    assert mine.resume(random) == "auto"


def test_the_table_has_means_deviations_and_leads_over_the_same_seeds(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "--arms", "random", "amt"])
    args = reproduce.parse_arguments()
    scores = {("random", 0): 50.0, ("random", 1): 54.0, ("random", 2): 52.5, ("amt", 0): 51.0, ("amt", 2): 55.5}
    records = [
        dict(arm=arm, seed=seed, epoch=epoch, minutes=epoch * 1.0, knn=score - 20, linear=score - 10 + epoch)
        for (arm, seed), score in scores.items()
        for epoch in (4, 8)
    ]
    records[-1]["finetune"] = 70.25
    text = reproduce.table(args, records)
    random = [score - 2 for (arm, _), score in scores.items() if arm == "random"]
    mean, deviation = statistics.mean(random), torch.tensor(random).std().item()
    assert f"| random | {mean - 4:.1f} ± {deviation:.1f} | {mean:.1f} ± {deviation:.1f} |  | 3 | 8.0 ± 0.0 |" in text
    assert f"| amt | 47.2 ± 3.2 | 51.2 ± 3.2 | +2.0 ± {math.sqrt(2):.1f} | 2 | 8.0 ± 0.0 |" in text
    assert "| amt | 70.2 |  | 1 | 8.0 ± 0.0 |" in text  # there is no random run fine-tuned to compare it with
    figure = reproduce.curves(records, "minutes", "minutes")
    line = figure.axes[1].containers[0]
    assert line.get_label() == "random" and line.lines[0].get_xdata().tolist() == [4, 8]
    assert line.lines[0].get_ydata().tolist() == pytest.approx([mean - 4, mean])


class Slow:
    """In place of subprocess.Popen: a process that sleeps until it is told to stop, or fails at once."""

    started = []  # noqa: RUF012

    def __init__(self, arguments, **_):
        self.arguments, self.end, self.cores = arguments, threading.Event(), os.sched_getaffinity(0)
        self.started.append(self)

    def wait(self) -> int:
        if self.arguments == ["fails"]:
            return 3
        return 143 if self.end.wait(20) else 0

    def terminate(self):
        self.end.set()


def test_a_signal_stops_all_jobs_and_starts_no_more(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(reproduce.subprocess, "Popen", Slow)
    Slow.started.clear()
    workers = reproduce.Workers(2)
    jobs = [reproduce.Job(f"job {i}", lambda: ["sleeps"], tmp_path / "log") for i in range(5)]

    def interrupt():
        while len(Slow.started) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    def stop(number, _):
        raise reproduce.Stopped(number)

    handler = signal.signal(signal.SIGINT, stop)
    try:
        threading.Thread(target=interrupt).start()
        start = time.perf_counter()
        with pytest.raises(KeyboardInterrupt):
            workers.run(jobs)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert time.perf_counter() - start < 10 and len(Slow.started) == 2
    assert not workers.failed and "stopped" in capsys.readouterr().out


def test_a_job_waits_for_the_one_it_needs_and_failures_are_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(reproduce.subprocess, "Popen", Slow)
    Slow.started.clear()
    (tmp_path / "log").write_text("what went wrong")
    workers, order = reproduce.Workers(2), []
    jobs = [
        reproduce.Job("first", lambda: order.append("first") or ["fails"], tmp_path / "log"),
        reproduce.Job("second", lambda: order.append("second") or ["fails"], tmp_path / "log", after="first"),
        reproduce.Job("third", lambda: order.append("third") or ["fails"], tmp_path / "log", after="not to be done"),
    ]
    workers.run(jobs)
    assert order.index("first") < order.index("second") and sorted(workers.failed) == ["first", "second", "third"]
    assert "what went wrong" in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system pins nothing to cores")
def test_jobs_share_the_cores_out(monkeypatch, tmp_path):
    monkeypatch.setattr(reproduce.subprocess, "Popen", Slow)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    Slow.started.clear()
    cores = os.sched_getaffinity(0)
    workers = reproduce.Workers(len(cores))
    together = threading.Barrier(len(cores))  # all at a time
    jobs = [
        reproduce.Job(f"job {i}", lambda: [str(together.wait(20)), "fails"][1:], tmp_path / "log")
        for i in range(len(cores))
    ]
    (tmp_path / "log").touch()
    workers.run(jobs)
    assert sorted(sorted(process.cores) for process in Slow.started) == [[core] for core in sorted(cores)]
    assert os.sched_getaffinity(0) == cores and reproduce.Workers(5 * len(cores)).places[-1]


def test_the_scale_of_the_paper_prints_commands_that_run_and_hours_that_follow(monkeypatch, tmp_path, capsys):
    times = {"random": [0.8], "amt": [0.4], "look": [0.1]}  # seconds of 8 images
    monkeypatch.setattr(
        reproduce, "step_times", lambda device, batch: {k: [v[0] * batch / 8] for k, v in times.items()}
    )
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "--scale", "paper", "--gpus", "4", "--seeds", "7"])
    reproduce.main()
    lines = capsys.readouterr().out.splitlines()
    assert not (tmp_path / "runs").exists() and "random 10 images/s" in lines[0]
    hours = {}
    for line in lines:
        if match := re.match(r"\s*accelerate launch (train|eval)\.py (.*?)(?:  # ([\d.]+) hours)?$", line):
            script, options, cost = match.groups()
            options = shlex.split(options.replace("$probe", "knn"))
            if script == "train":
                args = train.parse_arguments(options)
                train.complete(args)
                assert (args.model, args.epochs, args.batch_size, args.guide_start, args.seed) == (
                    "base",
                    400,
                    4096,
                    50,
                    7,
                )
                hours[args.out.name] = float(cost)
            else:
                args = evaluation.build_parser().parse_args(options)
                assert args.dataset == "imagenet-1k"
    images = 1_281_167 / 4 / 3600
    assert hours == pytest.approx(
        {
            "random-seed7": 400 * 0.1 * images,
            "amt-seed7": (50 * 0.1 + 350 * 0.05 + 350 / 40 * 0.0125) * images,
            "cached-seed7": (400 * 0.1 + 350 / 40 * 0.0125) * images,
            "cached-nohint-seed7": (400 * 0.1 + 350 / 40 * 0.0125) * images,
            "online-seed7": (400 * 0.1 + 350 * 0.0125) * images,
            "online-nohint-seed7": (400 * 0.1 + 350 * 0.0125) * images,
        },
        abs=0.06,
    )


def test_steps_of_the_scale_of_the_paper_are_measured(monkeypatch):
    sizes = smae.PRESETS["tiny"] | dict(image_size=224, patch_size=32)
    monkeypatch.setitem(smae.PRESETS, "base", sizes)
    seconds = reproduce.step_times(torch.device("cpu"), 2)
    assert set(seconds) == {"random", "amt", "look"}
    assert all(len(values) == 5 and min(values) > 0 for values in seconds.values())


@pytest.mark.parametrize("arguments, words", [
    (["--arm", "nothing"], "NAME=OPTIONS"),
    (["--arm", "random=--mask random"], "a name of its own"),
    (["--jobs", "0"], "--jobs must be at least 1"),
    (["--dataset", "no/such/data", "--arms", "random", "--seeds", "0"], "failed: pre-training random-seed0"),
])  # fmt: skip
def test_mistakes_end_with_a_line(reproduced, tmp_path, capsys, arguments, words):
    with pytest.raises(SystemExit) as error:
        reproduced(*arguments, "--out", tmp_path / "experiment")
    assert words in capsys.readouterr().err + str(error.value)
