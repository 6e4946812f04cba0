import importlib.util
import json
import math
import os
import re
import shlex
import shutil
import signal
import statistics
import sys
import threading
import time
from pathlib import Path

import forked
import numpy as np
import pytest
import scipy.stats
import torch
from helpers import SMALL, contents

import bench
import cli
import data
import eval as evaluation
import pictures
import probes
import reproduce
import shapes
import smae
import train

PRETRAIN = " ".join([*SMALL, *"--max-images 48 --batch-size 16 --workers 0 --precision no".split()])
QUICK = ["--dataset", "shapes", "--arms", "random", "cached", "--seeds", "0", "--epochs", "2", "--judge-at", "1"]
QUICK += ["--pretrain", PRETRAIN, "--probe", "--workers 0 --batch-size 48"]
QUICK += ["--finetune", "--epochs 1 --max-images 48 --batch-size 16 --workers 0"]


LATE = ["--arm", "late=--mask selfguided --guide online --guide-start 200"]


class Forked:
    """In place of subprocess.Popen: a process that need not import everything first."""

    def __init__(self, arguments, stdout, stderr, env):
        (self.process,) = forked.start(stdout.name, *arguments[2:], script=Path(arguments[1]).stem)

    def poll(self) -> int | None:
        return self.process.exitcode

    def terminate(self):
        self.process.terminate()

    def wait(self):
        self.process.join()


@pytest.fixture
def reproduced(monkeypatch, capsys):
    """A function that runs reproduce.main() with options, and gives what it printed."""
    monkeypatch.setattr(reproduce.subprocess, "Popen", Forked)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(cli, "best_precision", lambda: "no")
    monkeypatch.setattr(probes, "LEARNING_RATES", (0.01, 0.1))  # forty heads would take a minute
    monkeypatch.setattr(probes, "WEIGHT_DECAYS", (0.0,))
    monkeypatch.setitem(shapes.COUNTS, "test", 120)
    monkeypatch.setattr(os, "sched_setaffinity", lambda *_: None)  # the server of all forks would stay there
    handler = signal.getsignal(signal.SIGTERM)

    def run(*arguments) -> str:
        monkeypatch.setattr(sys, "argv", ["reproduce.py", *map(str, arguments)])
        reproduce.main()
        return capsys.readouterr().out

    yield run
    signal.signal(signal.SIGTERM, handler)


def test_an_experiment_goes_from_pre_training_to_a_table_and_is_not_done_twice(
    reproduced, monkeypatch, tmp_path, capsys
):
    out = tmp_path / "experiment"

    def interrupt():  # in the midst of the first run
        while not list(out.glob("random-seed0/checkpoint-*")):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(SystemExit) as error:
        reproduced(*QUICK, "--out", out)
    assert error.value.code == 143 and "continue with the same command" in capsys.readouterr().out
    assert not (out / "cached-seed0").exists()

    text = reproduced(*QUICK, "--out", out)
    assert {
        "table.md",
        "results.json",
        "epochs.png",
        "minutes.png",
        "leads.png",
        "masks-random.png",
        "masks-cached.png",
    } <= {file.name for file in out.iterdir()}
    records = json.loads((out / "results.json").read_text())
    assert [(r["arm"], r["epoch"]) for r in records] == [("random", 1), ("random", 2), ("cached", 2)]
    assert all(("finetune" in r) == (r["epoch"] == 2) for r in records)
    for record in records:
        lines = (out / f"{record['arm']}-seed0" / "metrics.jsonl").read_text().splitlines()
        epochs = [json.loads(line) for line in lines][: record["epoch"]]
        assert record["minutes"] == pytest.approx(sum(epoch["seconds"] for epoch in epochs) / 60)
        assert record["loss"] == epochs[-1]["loss"]
    linear = next(
        line for line in (out / "table.md").read_text().split("linear probe")[1].splitlines() if "cached" in line
    )
    lead = records[2]["linear"] - records[1]["linear"]
    assert f"| cached |  | {records[2]['linear']:.1f} | {lead:+.1f} | 1 |" in linear

    # the same to the bit as a run that has been guided from its own first phase on
    alone = tmp_path / "alone"
    options = shlex.split(f"{reproduce.SCALES['demo']['pretrain']} {PRETRAIN} {reproduce.ARMS['cached']}")
    options += ["--preload", "--epochs", 2, "--guide-start", 1, "--out", alone]
    assert forked.finish(forked.start(tmp_path / "log", *options)) == [0]
    assert contents(alone)["model.safetensors"] == contents(out / "cached-seed0")["model.safetensors"]
    assert contents(out / "random-seed0")["model.safetensors"] != contents(alone)["model.safetensors"]

    # as eval.py judges
    last = sorted((out / "cached-seed0").glob("checkpoint-*"))[-1]

    def judged(command: str, seed: int = 0) -> float:
        options = f"--checkpoint {last} --pool mean --max-images 48 --workers 0 --batch-size 48 --seed {seed}"
        judgement = tmp_path / f"{command}-{seed}"
        monkeypatch.setattr(sys, "argv", ["eval.py", command, *options.split(), "--out", str(judgement)])
        evaluation.main()
        return json.loads((judgement / "result.json").read_text())["top1"]

    assert records[2]["knn"] == pytest.approx(judged("knn"))
    assert records[2]["linear"] == pytest.approx(statistics.mean(judged("linear", seed) for seed in (0, 1, 2)))

    before = contents(out)
    again = reproduced(*QUICK, "--out", out)
    after = contents(out)
    assert "pre-training" in text and "fine-tuning" in text
    assert again.splitlines()[-1] == f"wrote {out / 'table.md'}" and "training" not in again and "tuning" not in again
    assert {name for name in before if before[name] != after[name]} <= {"epochs.png", "minutes.png", "leads.png"}
    for folder in (out / "cached-seed0").glob("checkpoint-*"):
        shutil.rmtree(folder)
    assert "training" not in reproduced(*QUICK, "--out", out)  # all that is wanted is known
    (out / "cached-seed0" / "tests.json").unlink()
    assert "pre-training cached-seed0: done" in reproduced(*QUICK, "--out", out)
    assert contents(out)["cached-seed0/model.safetensors"] == after["cached-seed0/model.safetensors"]
    more = reproduced(*QUICK, "--arm", "layer-1=--mask selfguided --guide-layer 1 --guide-every 1", "--out", out)
    assert "pre-training layer-1-seed0" in more and "cached" not in more
    assert "| layer-1 |" in (out / "table.md").read_text()

    with pytest.raises(SystemExit):
        reproduced(*QUICK, "--arm", "mistyped=--mask random --epoch-s 2", "--out", out)
    assert "mistyped" not in json.loads((out / "settings.json").read_text())["arms"]
    capsys.readouterr()
    for other in (
        ["--arm", "layer-1=--mask random"],
        ["--epochs", 4],
        ["--pretrain", PRETRAIN + " --mask-ratio 0.5"],
        ["--finetune", "--epochs 2"],
    ):
        with pytest.raises(SystemExit):
            reproduced(*QUICK, *other, "--out", out)
        assert "holds another experiment" in capsys.readouterr().err


def test_results_that_could_not_be_made_again_stay(monkeypatch, tmp_path, capsys):
    """Asked for one more evaluation, it removed all, to train again, although others may do without it."""
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "--epochs", "8", "--finetune", "none", "--out", str(tmp_path)])
    args, jobs = reproduce.parse_arguments(), []
    monkeypatch.setattr(reproduce, "work", lambda found, count: jobs.extend(found) or [])
    run = reproduce.Run(args, "random", 0)
    run.out.mkdir()
    (run.out / "metrics.jsonl").write_text("{}\n" * 8)
    (run.out / "finetune").mkdir()
    (run.out / "finetune" / "result.json").write_text("{}")
    (run.out / "tests.json").write_text(json.dumps({"8": dict(knn=1.0, linear=2.0)}))  # not after 2, 4, 6
    before = contents(run.out)
    assert reproduce.pretrain(args, [run]) == jobs == [] and contents(run.out) == before
    assert "its checkpoints are gone" in capsys.readouterr().out
    (run.out / "tests.json").unlink()  # without it there is nothing to lose
    reproduce.pretrain(args, [run])
    jobs[0].arguments()
    assert contents(run.out) == {}


def test_evidence_outlives_the_weights_and_seed_comes_after_seed(reproduced, monkeypatch, tmp_path):
    out, kept = tmp_path / "first", tmp_path / "evidence"
    arguments = [*QUICK, "--finetune", "none", "--seeds", "0", "1", "--jobs", "1", "--evidence", kept]
    text = reproduced(*arguments, "--out", out)
    first, second = text.index("random-seed1"), text.rindex("cached-seed0")
    assert text.index("cached-seed0, epoch 2") == second < first  # seed 0 is judged before seed 1 begins
    names = sorted(str(file.relative_to(kept)) for file in kept.rglob("*") if file.is_file())
    runs = [f"{arm}-seed{seed}/{name}" for arm in ("cached", "random") for seed in (0, 1)
            for name in ("metrics.jsonl", "tests.json")]  # fmt: skip
    assert names == sorted([*runs, "results.json", "settings.json", "table.md"])

    again = tmp_path / "second"  # on another machine
    assert "training" not in reproduced(
        *QUICK, "--finetune", "none", "--seeds", "1", "--evidence", kept, "--out", again
    )
    assert (again / "table.md").read_text() == (out / "table.md").read_text()  # of both seeds
    grey = ["--arm", "grey=--mask random --channels 1"]
    judge_all = reproduce.judge_all

    def meanwhile(*given):  # another machine keeps a seed of its own there
        judge_all(*given)
        shutil.copytree(kept / "random-seed1", kept / "random-seed7", dirs_exist_ok=True)
        settings = json.loads((kept / "settings.json").read_text())
        (kept / "settings.json").write_text(json.dumps(settings | dict(seeds=[*settings["seeds"], 7])))

    monkeypatch.setattr(reproduce, "judge_all", meanwhile)
    more = reproduced(*arguments, "--seeds", "2", "--arms", "random", *grey, "--out", again)
    assert "pre-training random-seed2: done" in more and "seed1" not in more
    assert (kept / "random-seed2" / "tests.json").exists()
    records = json.loads((kept / "results.json").read_text())
    assert {(r["arm"], r["seed"]) for r in records} == {
        ("random", 0), ("random", 1), ("random", 2), ("cached", 0), ("cached", 1), ("grey", 2), ("random", 7),
    }  # fmt: skip
    assert json.loads((kept / "settings.json").read_text())["seeds"] == [0, 1, 2, 7]


def test_evidence_of_another_experiment_is_refused_before_it_is_copied(monkeypatch, tmp_path):
    kept, out = tmp_path / "evidence", tmp_path / "out"
    arguments = ["reproduce.py", "--arms", "random", "--seeds", "1", "--evidence", str(kept), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", arguments)
    args = reproduce.parse_arguments()
    (kept / "random-seed0").mkdir(parents=True)
    (kept / "random-seed0" / "metrics.jsonl").write_text("{}\n")
    theirs = dict(scale="demo", dataset="elsewhere", arms={"random": "--mask random", "late": "--mask amt"}, seeds=[0])
    (kept / "settings.json").write_text(json.dumps(theirs))
    with pytest.raises(ValueError, match=r"evidence holds another experiment \(--dataset 'elsewhere'\)"):
        reproduce.note_settings(args)
    assert not out.exists()
    (kept / "settings.json").write_text(json.dumps(theirs | dict(dataset="shapes:easy")))
    reproduce.note_settings(args)
    reproduce.import_evidence(args)
    settings = json.loads((out / "settings.json").read_text())
    assert settings["seeds"] == [0, 1] and list(settings["arms"]) == ["random", "late"]
    assert (out / "random-seed0" / "metrics.jsonl").exists()
    run = reproduce.Run(args, "random", 0)
    reproduce.write(run.out / "tests.json", {"2": dict(knn=1.0, linear=2.0), "8": dict(knn=1.0, linear=2.0)})
    (run.out / "metrics.jsonl").write_text(json.dumps(dict(epoch=2, seconds=60, loss=1.0)) + "\n")
    assert [record["epoch"] for record in reproduce.collect(args, [run])] == [2]  # of what is being trained again


@pytest.mark.parametrize("options, message", [
    ("--judge-at 3", "--judge-at 3: checkpoints are kept every 2 epochs, of 16"),
    ("--judge-at 18", "--judge-at 18"),
])  # fmt: skip
def test_runs_can_be_judged_at_other_epochs(monkeypatch, options, message):
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "--epochs", "16", *options.split()])
    with pytest.raises(ValueError, match=message):
        reproduce.parse_arguments()
    monkeypatch.setattr(sys, "argv", "reproduce.py --epochs 16 --judge-at 12 2".split())
    args = reproduce.parse_arguments()
    assert reproduce.Run(args, "random", 0).epochs_to_judge() == [2, 12, 16]
    assert reproduce.Run(args, "online", 0).epochs_to_judge() == [12, 16]


def test_selection_leaves_the_test_data_alone(reproduced, monkeypatch, tmp_path):
    seen, load = [], reproduce.EvalBatches
    monkeypatch.setattr(reproduce, "EvalBatches", lambda part, **how: seen.append(part) or load(part, **how))
    out = tmp_path / "experiment"
    text = reproduced(*QUICK, "--select", "--arms", "random", "--out", out)
    pictures = [[record["image"]["bytes"] for record in part] for part in seen]
    training = [record["image"]["bytes"] for record in data.load_images("shapes", max_images=48, spread=True)]
    assert [len(part) for part in pictures] == [38, 10] and sorted(pictures[0] + pictures[1]) == sorted(training)
    assert "fine-tuning" not in text and "held out" in (out / "selection-table.md").read_text()
    assert not (out / "random-seed0" / "tests.json").exists() and not (out / "table.md").exists()


@pytest.mark.parametrize("options, expected", [
    ("", None),
    ("--finetune none", None),
    ("--scale cpu --dataset x --finetune none", None),
    ("--finetune=--smoothing=0", "--smoothing=0"),
    ("--scale cpu --dataset x --finetune=--smoothing=0", reproduce.SCALES["cpu"]["finetune"] + " --smoothing=0"),
    ("--scale small --dataset x", reproduce.SCALES["small"]["finetune"]),
])  # fmt: skip
def test_a_scale_is_fine_tuned_as_it_says_and_as_asked(monkeypatch, options, expected):
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *options.split()])
    assert reproduce.parse_arguments().finetune == expected


@pytest.mark.parametrize("options, shared", [
    ("--mask selfguided --guide-start 2", 2),
    ("--mask selfguided --guide-start 3 --hint none --guide-layer 1", 3),
    ("--mask selfguided --guide-start 6", 4),
    ("--mask selfguided --guide-start 3 --guide cached --guide-shuffle --hint-end 0.5 --hint-portion 0.7", 3),
    ("--mask selfguided --guide-start 2 --guide-from elsewhere --guide-image-size 8", 2),
    ("--mask selfguided --guide-start 2 --guide-from column:mask --object-ids 1 --object-void 9", 2),
    ("--mask selfguided --guide-start 0", None),
    ("--mask selfguided --guide-start 2 --mask-ratio 0.6", None),
    ("--mask selfguided --guide-start 2 --blr 1e-4", None),
    ("--mask selfguided --guide-start auto", None),
])  # fmt: skip
def test_only_what_is_the_same_until_the_guide_starts_goes_on_from_random_masks(monkeypatch, tmp_path, options, shared):
    arguments = ["reproduce.py", "--epochs", "8", "--arm", f"mine={options}", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    args = reproduce.parse_arguments()
    random, mine = reproduce.Run(args, "random", 0), reproduce.Run(args, "mine", 0)
    assert mine.resume(random) == ["--resume"]  # as long as that is not trained
    for step in (20, 40, 60, 70, 80, 150):
        (random.out / f"checkpoint-{step:08d}").mkdir(parents=True)
    (random.out / "config.json").write_text(json.dumps(dict(data=dict(images=20 * 64 + 63))))
    (random.out / "metrics.jsonl").write_text("{}\n" * 8)
    assert sorted(random.checkpoints()) == [1, 2, 3, 4] and not random.done
    (random.out / "checkpoint-00000160").mkdir()
    assert sorted(random.epochs_to_judge()) == [2, 4, 6, 8] and random.done
    wanted = ["--resume", str(random.out / f"checkpoint-{20 * shared:08d}"), "--overwrite"] if shared else None
    assert mine.resume(random) == (wanted or ["--resume"])
    assert mine.epochs_to_judge() == [
        epoch for epoch in (2, 4, 6, 8) if not shared or epoch > mine.settings.guide_start
    ]
    (mine.out / "checkpoint-00000060").mkdir(parents=True)
    assert mine.resume(random) == ["--resume"]


@pytest.mark.parametrize(
    "epochs, looks", [(8, {2, 4, 6, 8}), (20, {4, 8, 12, 20}), (100, {24, 48, 72, 100}), (3, {2, 3})]
)
def test_runs_are_judged_after_each_quarter_of_their_epochs(monkeypatch, tmp_path, epochs, looks):
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "--epochs", str(epochs), "--out", str(tmp_path)])
    run = reproduce.Run(reproduce.parse_arguments(), "random", 0)
    saved = {epoch for epoch in range(1, epochs + 1) if epoch % run.settings.save_every == 0} | {epochs}
    assert set(run.epochs_to_judge()) == looks <= saved
    guided = reproduce.Run(reproduce.parse_arguments(), "online", 0)
    start = guided.settings.guide_start
    assert start in saved and epochs // 3 <= start <= epochs / 2
    assert set(guided.epochs_to_judge()) == {look for look in looks if look > start}


def test_the_floors_are_arms_where_asked_for():
    usual = "random amt cached cached-nohint online online-nohint".split()
    assert list(reproduce.parse_arguments([]).arms) == usual
    assert reproduce.parse_arguments(["--seeds", "3", "1", "3"]).seeds == [3, 1]
    experiment = reproduce.parse_arguments(["--arms", "cached-shuffled", "cached-centre"])
    shuffled, centre = (reproduce.Run(experiment, arm, 0).settings for arm in experiment.arms)
    assert shuffled.guide_shuffle and shuffled.guide_from is None and centre.guide_from == "centre"
    assert {shuffled.mask, centre.mask} == {"selfguided"} and {shuffled.guide, centre.guide} == {"cached"}


@pytest.mark.parametrize("options, start, every, preload", [
    ("", 8, 2, "device"),
    ("--guide-start 5 --guide-every 3 --preload host", 5, 3, "host"),
])  # fmt: skip
def test_options_of_all_arms_have_their_way(monkeypatch, tmp_path, options, start, every, preload):
    arguments = ["reproduce.py", "--epochs", "16", f"--pretrain={options}", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    settings = reproduce.Run(reproduce.parse_arguments(), "cached", 0).settings
    assert (settings.guide_start, settings.guide_every, settings.preload) == (start, every, preload)


def test_a_folder_is_drawn_up_with_all_arms_and_seeds_it_was_ever_asked_for(monkeypatch, tmp_path):
    for options in ("--arms random --seeds 1 0", "--arms amt --seeds 2"):
        monkeypatch.setattr(sys, "argv", ["reproduce.py", *options.split(), "--out", str(tmp_path)])
        reproduce.note_settings(reproduce.parse_arguments())
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert settings["seeds"] == [0, 1, 2] and list(settings["arms"]) == ["random", "amt"]


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
    assert f"| amt | 47.2 ± 3.2 | 51.2 ± 3.2 | +2.0 ± {math.sqrt(2):.1f} (-10.7 to +14.7) | 2 | 8.0 ± 0.0 |" in text
    assert "| amt | 70.2 |  | 1 | 8.0 ± 0.0 |" in text  # there is no random run fine-tuned to compare it with
    figure = pictures.accuracy_curves(records, "minutes", "minutes")
    line = figure.axes[1].containers[0]
    assert line.get_label() == "random" and line.lines[0].get_xdata().tolist() == [4, 8]
    assert line.lines[0].get_ydata().tolist() == pytest.approx([mean - 4, mean])


def test_curves_branch_off_random_masks_of_the_same_seeds():
    scores = {("random", 2): (30.0, 32.0), ("random", 4): (40.0, 50.0), ("random", 8): (48.0, 60.0)}
    scores |= {("first", 2): (31.0,), ("late", 8): (49.0,)}
    records = [
        dict(arm=arm, seed=seed, epoch=epoch, knn=score, linear=score + 1)
        for (arm, epoch), values in scores.items()
        for seed, score in enumerate(values)
    ]
    curves = pictures.accuracy_curves(records, "epoch", "epochs").axes[1].containers
    points = {curve.get_label(): curve.lines[0].get_xydata().tolist() for curve in curves}
    assert points == {"random": [[2, 32], [4, 46], [8, 55]], "first": [[2, 32]], "late": [[4, 41], [8, 50]]}


def test_the_confidence_interval_is_that_of_a_paired_t_test():
    rng = np.random.default_rng(0)
    random, arm = rng.normal(50, 2, 7), rng.normal(51, 2, 7)
    records = [dict(arm="random", seed=seed, epoch=8, linear=value) for seed, value in enumerate(random)]
    records += [dict(arm="self", seed=seed, epoch=8, linear=value) for seed, value in reversed(list(enumerate(arm)))]
    records += [dict(arm="self", seed=9, epoch=8, linear=99.0), dict(arm="self", seed=0, epoch=4, linear=1.0)]
    values = reproduce.leads(records, "self", "linear")
    assert values == pytest.approx(arm - random)
    expected = scipy.stats.ttest_rel(arm, random).confidence_interval(0.95)
    assert reproduce.interval(values) == pytest.approx((expected.low, expected.high))
    figure = pictures.leads({"linear probe": {"self": (values, reproduce.interval(values))}})
    dots, bar, mean = figure.axes[0].lines[1:]
    assert list(dots.get_xdata()) == values and mean.get_xdata() == pytest.approx([np.mean(values)])
    assert bar.get_xdata() == pytest.approx([expected.low, expected.high])


def test_the_summary_of_evidence_has_leads_and_paired_tests(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("summary", reproduce.ROOT / "docs" / "evidence" / "summary.py")
    summary = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(summary)
    scores = dict(random=[50.0, 52.0, 51.0, 10.0], self=[51.0, 54.0, 52.0, 90.0])
    records = [
        dict(arm=arm, seed=seed, epoch=8, linear=value)
        for arm, values in scores.items()
        for seed, value in enumerate(values)
    ]
    reproduce.write(tmp_path / "results.json", records)
    summary.main(tmp_path, ["self:random"], [0, 1, 2])
    said, p = capsys.readouterr().out, scipy.stats.ttest_rel(scores["self"][:3], scores["random"][:3]).pvalue
    assert "| self | 3 |  | 52.3 ± 1.5 | +1.3 ± 0.6 (-0.1 to +2.8) |" in said
    assert f"linear, self minus random, 3 seeds: +1.33 ± 0.58 (-0.10 to +2.77), p = {p:.2g}" in said
    reproduce.write(tmp_path / "results.json", [record | dict(knn=record["linear"]) for record in records])
    repeats = [dict(arm=arm, seed=2, epoch=8, linear=value) for arm, value in (("random", 49.0), ("self", 51.0))]
    (tmp_path / "again").mkdir()
    reproduce.write(tmp_path / "again" / "results.json", repeats)
    summary.main(tmp_path, ["self:random"], [0, 1, 2], again=tmp_path / "again")
    said = capsys.readouterr().out
    assert "by seed: +1.0, +2.0, +2.0" in said and "knn, self minus random, 2 seeds" in said
    with pytest.raises(SystemExit, match="there are no arms oak"):
        summary.main(tmp_path, ["oak:random"], None)


class Fake:
    """In place of subprocess.Popen: a process that does what its arguments say: fail at once, or wait to be stopped."""

    started = []  # noqa: RUF012

    def __init__(self, arguments, stdout, stderr, env):
        self.arguments, self.cores, self.environment, self.code = arguments, os.sched_getaffinity(0), env, None
        self.polled = 0
        self.started.append(self)

    def poll(self) -> int | None:
        self.polled += 1
        return self.code if self.arguments[0] == "waits" else 3 if self.polled > 1 else None

    def terminate(self):
        self.code = 143

    def wait(self) -> int:
        assert self.code is not None
        return self.code


@pytest.fixture
def fakes(monkeypatch, tmp_path):
    """A function that makes a job of fake processes; those started are in Fake.started."""
    monkeypatch.setattr(reproduce.subprocess, "Popen", Fake)
    Fake.started.clear()
    (tmp_path / "log").write_text("what went wrong")
    return lambda name, what, after=None: reproduce.Job(name, lambda: [what, name], tmp_path / "log", after)


def test_a_signal_stops_all_jobs_and_starts_no_more(fakes, monkeypatch):
    def interrupt():
        while len(Fake.started) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell starts with &
    try:
        threading.Thread(target=interrupt).start()
        with pytest.raises(KeyboardInterrupt):
            reproduce.work([fakes(f"job {i}", "waits") for i in range(5)], 2)
    finally:
        signal.signal(signal.SIGINT, before)
    assert [process.code for process in Fake.started] == [143, 143]


def test_an_error_leaves_no_jobs_behind(fakes, tmp_path):
    job = fakes("second", "waits")
    with pytest.raises(OSError):
        reproduce.work([fakes("first", "waits"), job._replace(log=tmp_path / "nowhere" / "log")], 2)
    assert [process.code for process in Fake.started] == [143]


def test_a_job_waits_for_the_one_it_needs_and_failures_are_named(fakes, capsys):
    jobs = [fakes("second", "fails", "first"), fakes("first", "fails"), fakes("third", "fails", "not to be done")]
    assert sorted(reproduce.work(jobs, 2)) == ["first", "second", "third"]
    order = [process.arguments[1] for process in Fake.started]
    assert sorted(order[:2]) == ["first", "third"] and order[2] == "second"
    assert "what went wrong" in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system pins nothing to cores")
def test_jobs_share_out_the_cores_or_the_gpus(fakes, monkeypatch):
    cores = os.sched_getaffinity(0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    reproduce.work([fakes(f"job {i}", "fails") for i in range(len(cores))], len(cores))
    assert sorted(sorted(process.cores) for process in Fake.started) == [[core] for core in sorted(cores)]
    assert os.sched_getaffinity(0) == cores
    Fake.started.clear()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for visible, wanted in (("4,6", ["4", "6", "4"]), ("", ["0", "1", "0"])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        reproduce.work([fakes(f"job {i}", "fails") for i in range(3)], 3)
        assert [process.environment["CUDA_VISIBLE_DEVICES"] for process in Fake.started] == wanted
        Fake.started.clear()


def test_the_scale_of_the_paper_prints_commands_that_run_and_hours_that_follow(monkeypatch, tmp_path, capsys):
    times = {"random": [0.8], "amt": [0.4], "relevance": [0.1]}  # seconds of 8 images
    monkeypatch.setattr(
        bench, "paper_step_times", lambda device, batch: {k: [v[0] * batch / 8] for k, v in times.items()}
    )
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "--scale", "paper", "--gpus", "4", "--seeds", "7", *LATE])
    reproduce.main()
    lines = capsys.readouterr().out.splitlines()
    assert not (tmp_path / "runs").exists() and "random 10 images/s" in lines[0]
    hours, others = {}, []
    for line in lines:
        if match := re.match(
            r"\s*(?:\[.*\] \|\| )?accelerate launch --num_processes 4 (train|eval)\.py (.*?)(?:  # ([\d.]+) hours)?$",
            line,
        ):
            script, options, cost = match.groups()
            options = shlex.split(options.replace("$probe", "knn"))
            if script == "train":
                args = train.parse_arguments(options)
                train.fill_defaults(args)
                assert (args.model, args.epochs, args.batch_size, args.save_every, args.seed) == (
                    "base",
                    400,
                    4096,
                    50,
                    7,
                )
                assert args.guide_start == (200 if "late" in str(args.out) else 50)
                hours[args.out.name] = float(cost)
            else:
                args = evaluation.build_parser().parse_args(options)
                assert args.dataset == "imagenet-1k"
                others += [float(cost)] if cost else []
    images, tests = 1_281_167 / 4 / 3600, 50_000 / 4 / 3600
    assert hours == pytest.approx(
        {
            "random-seed7": 400 * 0.1 * images,
            "amt-seed7": (50 * 0.1 + 350 * 0.05 + 9 * 0.0125) * images,
            "cached-seed7": (400 * 0.1 + 9 * 0.0125) * images,
            "cached-nohint-seed7": (400 * 0.1 + 9 * 0.0125) * images,
            "online-seed7": (400 * 0.1 + 350 * 0.0125) * images,
            "online-nohint-seed7": (400 * 0.1 + 350 * 0.0125) * images,
            "late-seed7": (400 * 0.1 + 200 * 0.0125) * images,
        },
        abs=0.06,
    )
    assert others == pytest.approx(
        [7 * 90 * 0.0125 * (images + tests), 7 * 100 * 0.0125 * (3 * images + tests)], abs=0.06
    )
    probes = float(re.search(r"for probe in knn linear; do  # ([\d.]+) hours", "\n".join(lines)).group(1))
    assert probes == pytest.approx(7 * 16 * 0.0125 * (images + tests), abs=0.06)
    total = float(re.search(r"([\d.]+) hours in all", "\n".join(lines)).group(1))
    assert total == pytest.approx(sum(hours.values()) + sum(others) + probes, abs=0.6)
    steps = re.search("for step in (.*?); do", "\n".join(lines)).group(1).split()
    assert [int(step) for step in steps] == [312 * epoch for epoch in range(50, 401, 50)]


def test_steps_of_the_scale_of_the_paper_are_measured(monkeypatch):
    sizes = smae.PRESETS["tiny"] | dict(image_size=224, patch_size=32)
    monkeypatch.setitem(smae.PRESETS, "base", sizes)
    seconds = bench.paper_step_times(torch.device("cpu"), 2)
    assert set(seconds) == {"random", "amt", "relevance"}
    assert all(len(values) == 5 and min(values) > 0 for values in seconds.values())


@pytest.mark.parametrize("arguments, words", [
    (["--arm", "nothing"], "NAME=OPTIONS"),
    (["--arm", "random=--mask random"], "a name of its own"),
    (["--jobs", "0"], "--jobs must be at least 1"),
    (["--scale", "paper", "--finetune", "none", "--judge-at", "50"], "without --finetune, --judge-at"),
    (["--scale", "small"], "--scale small needs --dataset"),
    (["--pretrain", "--guide-start 3 --epochs 9 --keep 1"], "--pretrain cannot set epochs, keep"),
    (["--pretrain=--seed=0"], "--pretrain cannot set seed"),
    (["--arm", "long=--mask random --epochs 16"], "--arm long cannot set epochs"),
    (["--probe=--nonsense"], "unrecognized arguments: --nonsense"),
    (["--probe=--seed 7 --overwrite"], "--probe cannot set overwrite, seed"),
    (["--finetune=--nonsense"], "unrecognized arguments: --nonsense"),
    (["--dataset", "no/such/data", "--arms", "random", "--seeds", "0"], "failed: pre-training random-seed0"),
])  # fmt: skip
def test_mistakes_end_with_a_line(reproduced, tmp_path, capsys, arguments, words):
    with pytest.raises(SystemExit) as error:
        reproduced(*arguments, "--out", tmp_path / "experiment")
    assert words in capsys.readouterr().err + str(error.value)
