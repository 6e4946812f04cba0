"""Test the claim: does self-guided masking learn better than random masking and AMT in the same number of epochs?

    python reproduce.py                                     # drawn shapes: 15 minutes on two cores
    python reproduce.py --scale cpu --dataset PATH          # photographs, two cores
    python reproduce.py --scale small --dataset PATH        # photographs, one GPU
    python reproduce.py --scale paper                       # ImageNet-1k, 8 GPUs: prints the commands and the hours

Pre-trains one model under each kind of masks, with several seeds; evaluates every run along the way
by kNN and linear probe; fine-tunes it at the end. Finished work is not repeated: interrupt it
(Ctrl-C, timeout 10m python ...) and start the same command as often as needed. Leaves in --out:
table.md, results.json, epochs.png, minutes.png, leads.png, masks-ARM.png, and a run folder for each arm
and seed.
"""

import argparse
import json
import math
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

import bench
import checkpoint
import cli
import data
import encoders
import eval as judge
import pictures
import probes
import smae
import train
from batches import EvalBatches
from labelled import load_labelled
from run import ProcessLost, lost_processes

ROOT = Path(__file__).resolve().parent
ARMS = {  # options of train.py
    "random": "--mask random",
    "amt": "--mask amt --guide cached",
    "cached": "--mask selfguided --guide cached",
    "cached-nohint": "--mask selfguided --guide cached --hint none",
    "online": "--mask selfguided --guide online",
    "online-nohint": "--mask selfguided --guide online --hint none",
    # floors, where asked for: masks of other pictures, and masks of the middle
    "cached-shuffled": "--mask selfguided --guide cached --guide-shuffle",
    "cached-centre": "--mask selfguided --guide cached --guide-from centre",
}
USUAL_ARMS = list(ARMS)[:6]
MINI = "--width 128 --depth 6 --heads 2 --decoder-width 96 --decoder-depth 2 --decoder-heads 3"
LIGHT = "--blr 1e-3 --layer-decay 0.75 --mixup 0 --cutmix 0 --randaugment 0 --erasing 0 --drop-path 0 "
LIGHT += "--crop-scale 0.2 1"  # on the augmentation, as short trainings want it
SCALES = {  # options of train.py and of eval.py finetune; the guide starts after half of the epochs
    "demo": dict(  # no fine-tuning: it learns nothing in the minutes of a demo
        dataset="shapes:easy",
        seeds=[0, 1],
        jobs=2,
        epochs=8,
        pretrain="--width 96 --depth 4 --heads 3 --decoder-width 64 --decoder-depth 1 --decoder-heads 2 "
        "--image-size 64 --warmup-epochs 1 --batch-size 64 --blr 4e-3",
    ),
    "cpu": dict(  # three hours on two cores, on Imagenette
        seeds=[0, 1, 2],
        jobs=2,
        epochs=16,
        pretrain=f"{MINI} --image-size 64 --warmup-epochs 1 --batch-size 64 --blr 4e-3",
        finetune=f"--epochs 4 --warmup-epochs 1 --batch-size 64 {LIGHT}",
    ),
    "small": dict(  # 196 patches, as in the paper
        seeds=[0, 1, 2],
        jobs=3,
        epochs=400,
        pretrain="--model tiny --image-size 112 --patch-size 8 --warmup-epochs 20 --batch-size 256 --blr 1e-3 "
        "--compile",
        finetune=f"--epochs 30 --warmup-epochs 3 --batch-size 256 {LIGHT}",
    ),
    "paper": dict(seeds=[0, 1, 2], jobs=1, epochs=400, pretrain=""),  # only printed
}
METRICS = dict(knn="kNN (k = 20)", linear="linear probe", finetune="fine-tuning")
PROBES = 3  # linear probes per run: which head is chosen depends on the split of the training data
OURS = ("dataset", "epochs", "seed", "mask", "save_every", "keep", "out", "resume", "overwrite")  # not for --pretrain
GUIDING = set(  # options that make no difference before the guide starts
    "mask hint hint_ratio hint_portion hint_end amt_ratio throw_ratio guide guide_start guide_every guide_layer "
    "guide_debias guide_from guide_image_size guide_shuffle foreground relevance object_ids object_void".split()
)


@dataclass
class Experiment:
    """What is compared, on which data, and how each run is trained and judged."""

    scale: str
    dataset: str | None
    epochs: int
    seeds: list[int]
    arms: dict[str, str]  # options of train.py, by name
    pretrain: str  # more of them, for all arms
    finetune: str | None  # options of eval.py finetune; None: no fine-tuning
    probe: str  # options common to eval.py knn and linear
    select: bool  # judge on a part of the training data
    jobs: int
    judge_at: list[int]  # epochs
    evidence: Path | None
    gpus: int
    out: Path


def parse_arguments(arguments: list[str] | None = None) -> Experiment:
    parser = argparse.ArgumentParser(
        description="Compare kinds of masks: pre-train, evaluate, tabulate.", formatter_class=cli.HelpFormatter
    )
    parser.add_argument("--scale", choices=list(SCALES), default="demo", help="size of the experiment")
    parser.add_argument(
        "--dataset", help="data with labels and a test split, as in eval.py (default for demo: drawn shapes)"
    )
    parser.add_argument("--epochs", type=int, help="epochs of pre-training (default: the scale's)")
    parser.add_argument("--seeds", type=int, nargs="+", help="one run of each arm for each seed (default: the scale's)")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=USUAL_ARMS, help="kinds of masks")
    parser.add_argument(
        "--arm", action="append", default=[], metavar="NAME=OPTIONS", help="a further arm, given by options of train.py"
    )
    parser.add_argument("--pretrain", default="", metavar="OPTIONS", help="more options of train.py, for all arms")
    parser.add_argument("--finetune", metavar="OPTIONS", help="more options of eval.py finetune; none: no fine-tuning")
    parser.add_argument("--probe", default="", metavar="OPTIONS", help="more options of both eval.py knn and linear")
    parser.add_argument(
        "--select",
        action="store_true",
        help="to choose settings: evaluate on a fifth of the training data instead of the test data, at the end only",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        help="simultaneous runs, divided among the GPUs (default: the scale's, at least one for each GPU)",
    )
    parser.add_argument(
        "--judge-at",
        type=int,
        nargs="+",
        help="epochs after which to evaluate, multiples of an eighth of --epochs (default: a quarter, half, "
        "three quarters; the last one in any case)",
    )
    parser.add_argument(
        "--evidence",
        type=Path,
        help="also copy results to this folder, a few kB per run; results found there need no weights",
    )
    parser.add_argument("--gpus", type=int, default=8, help="number of GPUs, for --scale paper")
    parser.add_argument("--out", type=Path, help="folder of the experiment (default: runs/reproduce-SCALE)")
    return plan_experiment(parser.parse_args(arguments))


def plan_experiment(args: argparse.Namespace) -> Experiment:
    """Fill in what the scale says. Raises ValueError where options make no sense."""
    if args.scale == "paper":
        unused = "dataset epochs pretrain finetune probe select jobs judge_at evidence".split()
        if given := [f"--{name.replace('_', '-')}" for name in unused if getattr(args, name)]:
            raise ValueError(f"--scale paper prints commands of the paper's experiment, without {', '.join(given)}")
    arms = {name: ARMS[name] for name in args.arms}
    for text in args.arm:
        name, equals, options = text.partition("=")
        if not equals or not name or "/" in name or name in ARMS:
            raise ValueError(f"--arm takes NAME=OPTIONS with a name of its own, got {text!r}")
        arms[name] = options
    scale = SCALES[args.scale]
    finetune = " ".join(filter(None, (scale.get("finetune"), args.finetune)))
    experiment = Experiment(
        scale=args.scale,
        dataset=args.dataset or scale.get("dataset"),
        epochs=scale["epochs"] if args.epochs is None else args.epochs,
        seeds=list(dict.fromkeys(args.seeds or scale["seeds"])),
        arms=arms,
        pretrain=f"{scale['pretrain']} {args.pretrain}",
        finetune=None if args.finetune == "none" else finetune or None,
        probe=args.probe,
        select=args.select,
        jobs=max(scale["jobs"], torch.cuda.device_count()) if args.jobs is None else args.jobs,
        judge_at=args.judge_at or [],
        evidence=args.evidence,
        gpus=args.gpus,
        out=args.out or Path("runs") / f"reproduce-{args.scale}",
    )
    if args.scale != "paper":
        check_experiment(experiment, args.pretrain)
    return experiment


def check_experiment(experiment: Experiment, pretrain: str):
    """Fill in ``judge_at``; raise ValueError where options, the user's ``pretrain`` included, make no sense.

    A wrong option should show now, not after hours.
    """
    if experiment.dataset is None:
        raise ValueError(
            f"--scale {experiment.scale} needs --dataset: Imagenette, or another with labels and a test split"
        )
    if experiment.jobs < 1 or experiment.epochs < 2:
        raise ValueError("--jobs must be at least 1, --epochs at least 2")
    eighth = save_every(experiment.epochs)
    usual = [epoch for epoch in (2 * eighth, 4 * eighth, 6 * eighth) if epoch < experiment.epochs]
    experiment.judge_at = sorted({*(experiment.judge_at or usual), experiment.epochs})
    for epoch in experiment.judge_at:
        if not 0 < epoch <= experiment.epochs or (epoch % eighth and epoch != experiment.epochs):
            raise ValueError(f"--judge-at {epoch}: checkpoints are kept every {eighth} epochs, of {experiment.epochs}")
    parser = train.build_parser()
    parser.set_defaults(**dict.fromkeys(OURS))
    texts = {"--pretrain": pretrain} | {f"--arm {name}": options for name, options in experiment.arms.items()}
    for option, text in texts.items():
        given = vars(parser.parse_args(shlex.split(text)))
        taken = [name for name in OURS if given[name] is not None and (name != "mask" or option == "--pretrain")]
        if taken:
            raise ValueError(f"{option} cannot set {', '.join(taken)}: reproduce.py sets them from its own options")
    for command in ("knn", "linear"):
        given, usual = (vars(probe_arguments(each, command)) for each in (experiment, replace(experiment, probe="")))
        if taken := [name for name in ("checkpoint", "out", "overwrite", "seed") if given[name] != usual[name]]:
            raise ValueError(f"--probe cannot set {', '.join(taken)}: reproduce.py sets them")
    judge.build_parser().parse_args(["finetune", *shlex.split(experiment.finetune or "")])


# ------------------------------------------------------------------------------------------------- runs


def save_every(epochs: int) -> int:
    """The epochs between checkpoints: an eighth of all."""
    return max(1, epochs // 8)


def guide_start(epochs: int) -> int:
    """The usual start of the guide: half of the epochs, where the run with random masks is saved."""
    return max(1, epochs // 2 // save_every(epochs) * save_every(epochs))


class Run:
    """One arm with one seed: its folder, and the options of ``train.py`` that make it."""

    def __init__(self, experiment: Experiment, arm: str, seed: int):
        self.arm, self.seed, self.name = arm, seed, f"{arm}-seed{seed}"
        self.out, self.log = experiment.out / self.name, experiment.out / f"{self.name}.log"
        self.judge_at = experiment.judge_at
        every, start = save_every(experiment.epochs), guide_start(experiment.epochs)
        common = [
            *shlex.split(f"--guide-start {start} --guide-every {every} --preload {experiment.pretrain}"),
            *("--dataset", experiment.dataset),
            *f"--epochs {experiment.epochs} --seed {seed} --save-every {every} --keep 9999".split(),
        ]
        self.options = [*common, *shlex.split(experiment.arms[arm]), "--out", str(self.out)]
        self.settings = train.parse_arguments(self.options)
        ours, theirs = vars(self.settings), vars(train.parse_arguments([*common, *shlex.split(ARMS["random"])]))
        same = all(ours[name] == theirs[name] for name in set(ours) - GUIDING - {"out"})
        self.begins_random = same and self.settings.guide_start != "auto"  # as the run with random masks does

    @property
    def done(self) -> bool:
        return self.settings.epochs in self.checkpoints() and len(self.records()) == self.settings.epochs

    def records(self) -> list[dict]:
        """The finished epochs, from metrics.jsonl."""
        file = self.out / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def checkpoints(self) -> dict[int, Path]:
        """The checkpoints at the ends of epochs, by epoch."""
        if not (self.out / "config.json").exists():
            return {}
        steps = smae.read_json(self.out / "config.json")["data"]["images"] // self.settings.batch_size
        found = {checkpoint.number(folder): folder for folder in checkpoint.folders(self.out)}
        return {step // steps: folder for step, folder in sorted(found.items()) if step % steps == 0}

    def epochs_to_judge(self) -> list[int]:
        """The epochs to evaluate after: only those that can differ from the run with random masks."""
        guided = self.begins_random and self.settings.mask != "random"
        first = self.settings.guide_start if guided else 0
        return [epoch for epoch in self.judge_at if epoch > first]

    def due(self, experiment: Experiment) -> list[int]:
        """The epochs whose evaluation is asked for: with --select the last one."""
        return self.epochs_to_judge()[-1:] if experiment.select else self.epochs_to_judge()

    def is_judged(self, experiment: Experiment) -> bool:
        """Whether all its results are there, so that its weights are no longer needed."""
        due, known = self.due(experiment), smae.read_json(judgements(experiment, self))
        tuned = experiment.select or not experiment.finetune or (self.out / "finetune" / "result.json").exists()
        return tuned and len(self.records()) == self.settings.epochs and all(str(epoch) in known for epoch in due)

    def outlives_its_weights(self) -> bool:
        """Whether it is trained and has results, but no longer its weights, so that results could not be made again."""
        judged = any((self.out / name).exists() for name in ("tests.json", "selection.json"))
        return judged and len(self.records()) == self.settings.epochs and not checkpoint.folders(self.out)

    def resume(self, random: "Run") -> list[str]:
        """The options to resume with: from itself, or at first from the run with random masks, which begins alike."""
        if not self.begins_random or not random.done or checkpoint.folders(self.out):
            return ["--resume"]
        start = self.settings.guide_start
        before = {epoch: folder for epoch, folder in random.checkpoints().items() if epoch <= start}
        return ["--resume", str(before[max(before)]), "--overwrite"] if before else ["--resume"]


class Job(NamedTuple):
    """A program to run: its arguments, computed when it starts; its log; the job that must end before it."""

    name: str
    arguments: Callable[[], list[str]]
    log: Path
    after: str | None = None


def work(jobs: list[Job], count: int) -> list[str]:
    """Run jobs, ``count`` at a time, each on a part of the cores or on one GPU; return the names of failed ones."""
    waiting, running, failed = list(jobs), {}, []
    try:
        while waiting or running:
            ahead = {job.name for job in waiting} | {job.name for job, *_ in running.values()}
            ready = [job for job in waiting if job.after not in ahead]
            free = [place for place in range(count) if place not in running]
            for place, job in zip(free, ready):
                print(f"{job.name} ...", flush=True)
                running[place] = job, start(job, place, count), time.perf_counter()
                waiting.remove(job)
            time.sleep(0.2)
            for place, (job, process, since) in list(running.items()):
                if (code := process.poll()) is not None:
                    del running[place]
                    print(
                        f"{job.name}: {'failed' if code else 'done'}, {time.perf_counter() - since:.0f} s", flush=True
                    )
                    if code:
                        failed.append(job.name)
                        print(f"exit code {code}: {job.log.read_text().strip()[-1000:]}", file=sys.stderr)
    except BaseException:  # a signal, a full disk
        for _, process, _ in running.values():
            process.terminate()  # training then writes a checkpoint
        for _, process, _ in running.values():
            process.wait()
        raise
    return failed


def start(job: Job, place: int, count: int) -> subprocess.Popen:
    """Start a job at one of ``count`` places."""
    environment, cores = dict(os.environ), None
    if torch.cuda.device_count() > 1:
        visible = environment.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[place % torch.cuda.device_count()]
    elif not torch.cuda.is_available() and hasattr(os, "sched_getaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[place::count] or cores)  # for what is started now
    try:
        with open(job.log, "a") as log:
            return subprocess.Popen(job.arguments(), stdout=log, stderr=log, env=environment)
    finally:
        if cores:
            os.sched_setaffinity(0, cores)


def pretrain(experiment: Experiment, runs: list[Run]) -> list[str]:
    """Train the runs that are not trained yet, those with random masks before those that continue from them."""
    random = {run.seed: run for run in runs if run.arm == "random"}
    jobs = []
    for run in (run for run in runs if not run.done and not run.is_judged(experiment)):
        if run.outlives_its_weights():
            print(f"{run.name}: its checkpoints are gone, so that other results than those in {run.out} need a new run")
            continue
        first = random.get(run.seed, run)

        def arguments(run: Run = run, first: Run = first) -> list[str]:
            if not checkpoint.folders(run.out):  # results of other weights are void
                for name in EVIDENCE:
                    (run.out / name).unlink(missing_ok=True)
                shutil.rmtree(run.out / "finetune", ignore_errors=True)
            return [sys.executable, str(ROOT / "train.py"), *run.options, *run.resume(first)]

        after = None if first is run else f"pre-training {first.name}"  # no such job: it is done
        jobs.append(Job(f"pre-training {run.name}", arguments, run.log, after))
    return work(jobs, experiment.jobs)


def finetune(experiment: Experiment, runs: list[Run]) -> list[str]:
    """Fine-tune the runs that are trained and not fine-tuned yet."""
    jobs = []
    for run in runs:
        out = run.out / "finetune"
        if run.done and not (out / "result.json").exists():
            last = run.checkpoints()[run.settings.epochs]
            command = [sys.executable, str(ROOT / "eval.py"), "finetune", "--checkpoint", str(last)]
            command += ["--dataset", experiment.dataset, "--seed", str(run.seed), "--preload"]
            command += [*shlex.split(experiment.finetune), "--resume", "--overwrite", "--out", str(out)]
            jobs.append(Job(f"fine-tuning {run.name}", lambda command=command: command, run.log))
    return work(jobs, experiment.jobs)


# ------------------------------------------------------------------------------------------------- judging


def judgements(experiment: Experiment, run: Run) -> Path:
    return run.out / ("selection.json" if experiment.select else "tests.json")


def write(file: Path, content: dict | list):
    smae.write_text(file, json.dumps(content, indent=1) + "\n")


def judge_all(experiment: Experiment, runs: list[Run]):
    """Evaluate every checkpoint that is due by kNN and linear probe (mean of PROBES). Decodes the pictures once."""
    due = []
    for run in (run for run in runs if run.done):
        known, checkpoints = smae.read_json(judgements(experiment, run)), run.checkpoints()
        wanted = [epoch for epoch in run.due(experiment) if str(epoch) not in known]
        if gone := [epoch for epoch in wanted if epoch not in checkpoints]:
            print(f"{run.name}: not evaluated after epochs {gone}, whose checkpoints are gone", flush=True)
        due += [(run, epoch, checkpoints[epoch]) for epoch in wanted if epoch in checkpoints]
    if not due:
        return
    knn, linear = (probe_arguments(experiment, command) for command in ("knn", "linear"))
    accelerator = cli.make_accelerator(cli.choose_precision(linear.precision))
    columns = linear.image_column, linear.label_column, linear.streaming, linear.max_images
    where = linear.dataset, linear.split, linear.test_split
    training, tests, classes = load_labelled(*where, *columns, linear.skip_unlabelled)
    if experiment.select:
        training, tests = training.train_test_split(0.2, seed=0).values()
    judge.fill_recipe(linear, len(training), 1)
    crops, size_wanted = {}, linear.image_size  # of the pictures, by size and channels
    for run, epoch, folder in due:
        since = time.perf_counter()
        encoder = encoders.load(str(folder)).to(accelerator.device)
        linear.image_size = data.pair(size_wanted or encoder.image_size)
        kind = *linear.image_size, encoder.channels
        if kind not in crops:
            options = cli.eval_batch_options(linear, accelerator) | dict(crop_ratio=linear.crop_ratio)
            form = data.pixel_format(training, encoder.channels, linear.pixel_range)
            crops[kind] = [EvalBatches(part, **options, keep=True, form=form) for part in (training, tests)]
        with lost_processes(world=1):
            seen = [encoders.extract(encoder, part, accelerator, linear.pool) for part in crops[kind]]
        common = dict(classes=len(classes), device=accelerator.device)
        how = dict(epochs=linear.epochs, batch_size=linear.batch_size)
        seeds = range(PROBES * run.seed, PROBES * (run.seed + 1))
        found = [probes.evaluate_linear(*seen, **how, **common, seed=seed)["top1"] for seed in seeds]
        how = dict(ks=knn.k, temperature=knn.temperature)
        scores = dict(knn=probes.evaluate_knn(*seen, **how, **common)["top1"], linear=statistics.mean(found))
        write(judgements(experiment, run), smae.read_json(judgements(experiment, run)) | {str(epoch): scores})
        figures = f"kNN {scores['knn']:.2f} %, linear {scores['linear']:.2f} %"
        print(f"{run.name}, epoch {epoch}: {figures}, {time.perf_counter() - since:.0f} s", flush=True)


def probe_arguments(experiment: Experiment, command: str) -> argparse.Namespace:
    """The arguments of eval.py knn or linear, with the --max-images of pre-training."""
    limit = train.parse_arguments(shlex.split(experiment.pretrain)).max_images
    options = ["--max-images", str(limit)] if limit else []
    options += ["--test-split", "train"] if experiment.select else []
    options = [command, "--pool", "mean", "--dataset", experiment.dataset, *options, *shlex.split(experiment.probe)]
    return judge.build_parser().parse_args(options)


# ------------------------------------------------------------------------------------------------- reporting


def collect(experiment: Experiment, runs: list[Run]) -> list[dict]:
    """All results: for each run and epoch a record of arm, seed, epoch, minutes, loss, knn, linear, finetune.

    Runs share the epochs before their guides start; ``minutes`` counts these for each run.
    """
    found = []
    for run in runs:
        past = {record["epoch"]: record for record in run.records()}
        for epoch, scores in smae.read_json(judgements(experiment, run)).items():
            if int(epoch) not in run.epochs_to_judge() or int(epoch) not in past:
                continue
            minutes = sum(record["seconds"] for e, record in past.items() if e <= int(epoch)) / 60
            known = dict(arm=run.arm, seed=run.seed, epoch=int(epoch), minutes=minutes, loss=past[int(epoch)]["loss"])
            known |= scores
            result = smae.read_json(run.out / "finetune" / "result.json")
            if result and int(epoch) == run.settings.epochs and not experiment.select:
                known["finetune"] = result["top1"]
            found.append(known)
    return found


def mean_and_deviation(values: list[float]) -> tuple[float, float]:
    """Mean and standard deviation over seeds; of a single one the deviation is nan."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def show(values: list[float], sign: str = "") -> str:
    if not values:
        return ""
    mean, deviation = mean_and_deviation(values)
    return f"{mean:{sign}.1f}" + ("" if math.isnan(deviation) else f" ± {deviation:.1f}")


def interval(values: list[float]) -> tuple[float, float]:
    """The 95 % confidence interval of the mean, by Student's t; of a single value it is nan."""
    from scipy.stats import t

    mean, deviation = mean_and_deviation(values)
    half = t.ppf(0.975, max(1, len(values) - 1)) * deviation / math.sqrt(len(values))
    return mean - half, mean + half


def by_seed(records: list[dict], arm: str, epoch: int, metric: str) -> dict[int, float]:
    return {r["seed"]: r[metric] for r in records if (r["arm"], r["epoch"]) == (arm, epoch) and metric in r}


def leads(records: list[dict], arm: str, metric: str) -> list[float]:
    """What an arm is ahead of random masks of the same seed at the end, seed by seed."""
    last = max(record["epoch"] for record in records)
    values, baseline = (by_seed(records, name, last, metric) for name in (arm, "random"))
    return [values[seed] - baseline[seed] for seed in sorted(values.keys() & baseline.keys())]


def show_leads(values: list[float]) -> str:
    if len(values) < 2:
        return show(values, "+")
    low, high = interval(values)
    return f"{show(values, '+')} ({low:+.1f} to {high:+.1f})"


def table(experiment: Experiment, records: list[dict]) -> str:
    """A Markdown table: accuracy of each arm by epoch, mean ± deviation over seeds, and lead over random masks."""
    epochs = sorted({record["epoch"] for record in records})
    arms = [arm for arm in experiment.arms if any(record["arm"] == arm for record in records)]
    where = "a fifth of the training data, held out" if experiment.select else "the test data"
    lines = [
        f"{experiment.dataset}, {experiment.scale}: top-1 in per cent on {where}, mean ± deviation over seeds; "
        "differences to random masks of the same seed (95 % confidence interval) and minutes of pre-training at the "
        "end. Empty: not judged, masks still random."
    ]
    for metric, title in METRICS.items():
        columns = epochs if metric != "finetune" else epochs[-1:]
        if not any(metric in record for record in records):
            continue
        lines += ["", f"| {title} | " + " | ".join(f"epoch {e}" for e in columns) + " | - random | seeds | minutes |"]
        lines += ["|---" * (len(columns) + 4) + "|"]
        for arm in arms:
            cells = [show(list(by_seed(records, arm, epoch, metric).values())) for epoch in columns]
            cells += ["" if arm == "random" else show_leads(leads(records, arm, metric))]
            cells += [str(len(by_seed(records, arm, epochs[-1], metric)))]
            cells += [show(list(by_seed(records, arm, epochs[-1], "minutes").values()))]
            lines += [f"| {arm} | " + " | ".join(cells) + " |"]
    return "\n".join(lines) + "\n"


def report(experiment: Experiment):
    """Write tables and figures of all results so far, for all arms and seeds that the folder has been used for."""
    settings, kind = smae.read_json(experiment.out / "settings.json"), "selection-" if experiment.select else ""
    experiment = replace(experiment, arms=settings["arms"])
    runs = [Run(experiment, arm, seed) for seed in settings["seeds"] for arm in settings["arms"]]
    if records := collect(experiment, runs):
        write(experiment.out / f"{kind}results.json", records)
        smae.write_text(experiment.out / f"{kind}table.md", table(experiment, records))
        for x, name in (("epoch", "epochs"), ("minutes", "minutes")):
            curves = pictures.accuracy_curves(records, x, f"{name} of pre-training")
            pictures.save(curves, experiment.out / f"{kind}{name}.png")
        panels = {}
        for metric, title in METRICS.items():
            found = {arm: leads(records, arm, metric) for arm in experiment.arms if arm != "random"}
            if found := {arm: (values, interval(values)) for arm, values in found.items() if values}:
                panels[title] = found
        if panels:
            pictures.save(pictures.leads(panels), experiment.out / f"{kind}leads.png")
    for run in reversed(runs):  # so that the first seed comes last, and stays
        if (run.out / "masks.png").exists():
            shutil.copy(run.out / "masks.png", experiment.out / f"masks-{run.arm}.png")


EVIDENCE = ("tests.json", "selection.json", "metrics.jsonl", "finetune/result.json")  # of a run


def import_evidence(experiment: Experiment):
    """Copy to --out the results in --evidence that it lacks."""
    if not experiment.evidence:
        return
    for file in experiment.evidence.glob("*/metrics.jsonl"):
        if not (experiment.out / file.parent.name / "metrics.jsonl").exists():
            copy_files(file.parent, experiment.out / file.parent.name, EVIDENCE)


def export_evidence(experiment: Experiment, runs: list[Run]):
    """Copy the results of complete runs to --evidence."""
    if experiment.evidence:
        for run in runs:
            if run.is_judged(experiment):
                copy_files(run.out, experiment.evidence / run.name, EVIDENCE)
        tables = [f"{kind}{name}" for kind in ("", "selection-") for name in ("results.json", "table.md")]
        copy_files(experiment.out, experiment.evidence, ("settings.json", *tables))


def copy_files(source: Path, target: Path, names: tuple[str, ...]):
    """Copy those of the files that exist."""
    for name in names:
        if (source / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, target / name)


# ------------------------------------------------------------------------------------------------- paper


def paper(experiment: Experiment):
    """Print the commands of the paper's experiment, and the hours they take by steps measured here."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "a CPU"
    batch, images, tests = 256 if device.type == "cuda" else 8, 1_281_167, 50_000
    seconds = {key: statistics.median(values) / batch for key, values in bench.paper_step_times(device, batch).items()}
    launch, ran = f"accelerate launch --num_processes {experiment.gpus}", []

    def hours(images: float, seconds_per_image: float) -> float:
        return images * seconds_per_image / experiment.gpus / 3600

    speed = ", ".join(f"{key} {1 / value:.4g} images/s" for key, value in seconds.items())
    print(f"# hours on {experiment.gpus} of these: {name}, bf16, measured at batch {batch}, not compiled: {speed}")
    for arm, options in experiment.arms.items():
        settings = train.parse_arguments(["--preset", "paper", *shlex.split(options)])
        train.fill_defaults(settings)
        before = settings.epochs if settings.mask == "random" else settings.guide_start
        before = settings.epochs // 2 if before == "auto" else before  # a guess
        after = settings.epochs - before
        passes = after  # over the data, for relevance
        if settings.guide == "cached":
            once = settings.guide_from or settings.guide_every == 0
            passes = min(after, 1) if once else math.ceil(after / settings.guide_every)
        passes = 0 if settings.guide_from == "centre" else passes
        cost = before * seconds["random"] + after * seconds["amt" if settings.mask == "amt" else "random"]
        cost = hours(images, cost + passes * seconds["relevance"])
        for seed in experiment.seeds:
            out = experiment.out / f"{arm}-seed{seed}"
            command = f"{launch} train.py --preset paper --compile {options} --seed {seed} --save-every 50 --keep 9999"
            print(f"{command} --resume --out {out}  # {cost:.1f} hours")
            ran.append((out, cost))
    steps = " ".join(f"{epoch * (images // 4096):08d}" for epoch in range(50, 401, 50))
    both = hours(images + tests, seconds["relevance"]) * 2 * 8 * len(ran)
    slow = hours(images + tests, seconds["relevance"]) * 90 * len(ran)
    tuned = hours(3 * images + tests, seconds["relevance"]) * 100 * len(ran)
    print(f"for run in {' '.join(str(out) for out, _ in ran)}; do")
    print(f"  for step in {steps}; do for probe in knn linear; do  # {both:.1f} hours")
    judged = "--dataset imagenet-1k --checkpoint $run/checkpoint-$step --out $run/$probe-$step"
    print(f"    [ -e $run/$probe-$step/result.json ] || {launch} eval.py $probe --pool mean {judged}")
    print("  done; done")
    for how, cost in (("linear --recipe mae", slow), ("finetune", tuned)):
        where = f"--dataset imagenet-1k --checkpoint $run --resume --out $run/{how.split()[0]}"
        print(f"  {launch} eval.py {how} {where}  # {cost:.1f} hours")
    total = sum(cost for _, cost in ran) + both + slow + tuned
    print(f"done  # {total:.1f} hours in all")
    print("# counted: a forward pass for relevance or features, three for a step of fine-tuning; not: reading, fitting")
    print("# every run leaves 8 checkpoints of 1.3 GB; delete the state.pt in them when it is done")


# ------------------------------------------------------------------------------------------------- command line


def note_settings(experiment: Experiment):
    """Write settings.json. Raises ValueError if --out or --evidence holds runs of other settings.

    Arms and seeds may be added to those that are there.
    """
    ours = {name: getattr(experiment, name) for name in ("scale", "dataset", "epochs", "pretrain", "finetune", "probe")}
    ours = {name: value for name, value in ours.items() if value is not None}
    known = dict(arms={}, seeds=[])
    for folder in filter(None, (experiment.evidence, experiment.out)):
        theirs = dict(arms={}, seeds=[]) | smae.read_json(folder / "settings.json")
        other = [f"--{name} {theirs[name]!r}" for name in ours if theirs.get(name, ours[name]) != ours[name]]
        expected = known["arms"] | experiment.arms
        for name, options in theirs["arms"].items():
            if expected.get(name, options) != options:
                other.append(f"--arm {name}={options!r}")
        if other:
            raise ValueError(
                f"{folder} holds another experiment ({', '.join(other)}): choose another --out or --evidence"
            )
        both = dict(arms=known["arms"] | theirs["arms"], seeds=known["seeds"] + theirs["seeds"])
        known |= theirs | both
    experiment.out.mkdir(parents=True, exist_ok=True)
    both = dict(arms=known["arms"] | experiment.arms, seeds=sorted({*known["seeds"], *experiment.seeds}))
    write(experiment.out / "settings.json", known | ours | both)


def main():
    def stop(number, _):
        raise KeyboardInterrupt(number)

    with cli.one_line_errors(ValueError, OSError, ProcessLost):
        experiment = parse_arguments()
        if experiment.scale == "paper":
            return paper(experiment)
        everything = [Run(experiment, arm, seed) for seed in experiment.seeds for arm in experiment.arms]
        note_settings(experiment)
        import_evidence(experiment)
        signal.signal(signal.SIGTERM, stop)
        failed = []
        try:
            for first in range(0, len(experiment.seeds), experiment.jobs):  # as many seeds at a time as jobs
                runs = [run for run in everything if run.seed in experiment.seeds[first : first + experiment.jobs]]
                failed += pretrain(experiment, runs)
                judge_all(experiment, runs)
                if experiment.finetune and not experiment.select:
                    failed += finetune(experiment, runs)
                if experiment.evidence:  # to which others may have added
                    note_settings(experiment)
                    import_evidence(experiment)
                report(experiment)
                export_evidence(experiment, runs)
        except KeyboardInterrupt as interrupt:
            print("stopped: continue with the same command", flush=True)
            sys.exit(128 + (interrupt.args[0] if interrupt.args else signal.SIGINT))
        finally:
            report(experiment)
    if (summary := experiment.out / ("selection-" * experiment.select + "table.md")).exists():
        print(f"wrote {summary}")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
