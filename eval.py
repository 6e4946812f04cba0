"""Judge what an encoder has learned, by kNN, linear probe or fine-tuning; use it for predictions and features.

    accelerate launch eval.py knn --checkpoint runs/pretrain                       # seconds to minutes, no training
    accelerate launch eval.py linear --checkpoint runs/pretrain                    # probes on features extracted once
    accelerate launch eval.py linear --recipe mae --checkpoint runs/pretrain       # as in the paper
    accelerate launch eval.py finetune --checkpoint runs/pretrain --out runs/finetune
    accelerate launch eval.py predict --checkpoint runs/finetune --dataset FOLDER  # file, class, probability
    accelerate launch eval.py embed --checkpoint runs/pretrain --dataset FOLDER    # features to a parquet file

--checkpoint takes a run folder, a checkpoint of facebookresearch/mae, transformers or timm, ``random`` (an untrained
encoder, which every result should be compared with) or ``pixels`` (no encoder at all).
"""

import argparse
import csv
import functools
import itertools
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from torch import Tensor, nn
from torchvision.transforms import RandomErasing, v2
from tqdm import tqdm

import cli
import data
import encoders
import optim
import probes
import run
import smae
from batches import EvalBatches, Share, TrainBatches
from cropping import RandomStream, uniform
from encoders import Encoder

RESULT_FILES = {  # what each command leaves in --out
    "knn": ("result.json",),
    "linear": ("result.json", "metrics.jsonl", "state.pt"),
    "finetune": ("result.json", "metrics.jsonl", "state.pt", "model.safetensors", "config.json"),
    "predict": ("result.json", "predictions.csv"),
    "embed": ("result.json", "features.parquet"),
}
RECIPES = {  # MAE, appendix A.1 and A.2, and a quick one
    "mae": dict(epochs=90, warmup_epochs=10, batch_size=16384, blr=0.1, weight_decay=0.0),
    "fast": dict(epochs=50, batch_size=1024),
    "finetune": dict(epochs=100, warmup_epochs=5, batch_size=1024, blr=5e-4, weight_decay=0.05),
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Judge and use an encoder.")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, help: str, tests: bool = True) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help, formatter_class=cli.HelpFormatter)
        cli.add(sub, "checkpoint", checkpoint="runs/pretrain")
        sub.add_argument(
            "--pool", choices=["cls", "mean"], help="what stands for an image (default: cls, or mean to finetune)"
        )
        sub.add_argument(
            "--crop-ratio", type=float, default=0.875, help="side of the centre crop over the short side, in tests"
        )
        cli.add(sub, "precision", "seed", "out", "overwrite", out=Path("runs") / name)
        cli.add_data_options(sub)
        if tests:
            sub.add_argument("--test-split", help="split to test on (default: validation, val or test)")
        cli.add_model_options(sub).description = "of --checkpoint random; --image-size and --heads of any"
        return sub

    sub = command("knn", "accuracy of weighted k-nearest neighbours")
    sub.add_argument("--k", type=int, nargs="+", default=[20, 10, 100, 200], help="neighbours; the first is reported")
    sub.add_argument("--temperature", type=float, default=0.07, help="weights are exp(cosine / temperature)")
    cli.add(sub, "batch-size", batch_size=256)

    sub = command("linear", "accuracy of a linear probe")
    sub.add_argument("--recipe", choices=["fast", "mae"], default="fast", help="features extracted once, or as in MAE")
    add_training_options(sub)

    sub = command("finetune", "accuracy after fine-tuning; saves the classifier")
    add_training_options(sub)
    sub.add_argument("--layer-decay", type=float, default=0.65, help="learning rate of a block over that of the next")
    sub.add_argument("--drop-path", type=float, default=0.1, help="stochastic depth of the last block")
    sub.add_argument("--smoothing", type=float, default=0.1, help="label smoothing")
    sub.add_argument("--mixup", type=float, default=0.8, help="alpha of mixup (0: none)")
    sub.add_argument("--cutmix", type=float, default=1.0, help="alpha of cutmix (0: none)")
    sub.add_argument("--erasing", type=float, default=0.25, help="probability of random erasing")
    sub.add_argument("--randaugment", type=int, default=9, help="magnitude of RandAugment, 0 (none) ... 10")
    sub.add_argument("--min-lr", type=float, default=1e-6, help="learning rate at the end")

    sub = command("predict", "classes of pictures, by a fine-tuned checkpoint, to predictions.csv", tests=False)
    cli.add(sub, "batch-size", batch_size=256)
    sub = command("embed", "features of pictures, to features.parquet", tests=False)
    cli.add(sub, "batch-size", batch_size=256)
    return parser


def add_training_options(parser: argparse.ArgumentParser):
    """The options of a training with labels; their defaults are in RECIPES."""
    group = parser.add_argument_group("optimisation (defaults: those of the recipe)")
    cli.add(group, "epochs", "warmup-epochs", "batch-size", "accumulate", "blr", "lr", "weight-decay", "crop-scale")
    group.set_defaults(crop_scale=(0.08, 1.0))
    group.add_argument("--resume", action="store_true", help="go on with the training in --out, if there is one")


# ------------------------------------------------------------------------------------------------- set-up


def load_encoder(args: argparse.Namespace) -> Encoder:
    """The encoder that --checkpoint names; fills in --image-size and --pool. Raises ValueError or FileNotFoundError."""
    untrained = smae.PRESETS[args.model] | cli.model_sizes(args)
    if args.image_size:
        untrained["image_size"] = args.image_size
    encoder = encoders.load(args.checkpoint, heads=args.heads, untrained=untrained)
    args.image_size = args.image_size or encoder.image_size[0]
    image = torch.zeros(1, 3, args.image_size, args.image_size)
    if args.command == "finetune":
        args.pool = args.pool or "mean"
        if encoder.backbone is not None:
            encoder.backbone.grid(image)  # or raise
        return encoder
    args.pool = args.pool or encoder.pools[0]
    if isinstance(encoder, encoders.FineTuned) and args.pool not in encoder.pools:
        raise ValueError(f"{args.checkpoint} was fine-tuned with --pool {encoder.pools[0]}")
    encoder.pooled(image, args.pool)  # or raise
    return encoder


def labelled_data(args: argparse.Namespace) -> tuple[datasets.Dataset, datasets.Dataset, list[str]]:
    """Training and test pictures with labels of the same classes, and the names of these.

    Raises ValueError if there are no labels, or labels of the test that the training does not have.
    """
    options = args.image_column, args.label_column, args.streaming
    training = data.load_images(args.dataset, args.split, *options, args.max_images)
    tests = data.load_test_images(args.dataset, args.test_split, *options)
    for dataset in (training, tests):
        label = (dataset.features or {}).get("label")
        if label is None:
            raise ValueError(f"{args.dataset} has no labels; name a column with --label-column")
        if not re.match("u?int|bool|string|large_string", getattr(label, "dtype", "")):
            raise ValueError(f"labels of {args.dataset} must be classes, numbered or named, not {label}")
    if args.streaming:
        names = [getattr(dataset.features["label"], "names", None) for dataset in (training, tests)]
        if names[0] is None or names[0] != names[1]:
            raise ValueError("the labels of a stream must be of a ClassLabel type: drop --streaming")
        return training, tests, names[0]

    def named(dataset: datasets.Dataset) -> list:
        names = getattr(dataset.features["label"], "names", None)
        return [names[i] if names and i is not None and i >= 0 else i for i in dataset["label"]]

    label, test_label = named(training), named(tests)
    classes = getattr(training.features["label"], "names", None) or sorted(set(label) - {None, -1})
    number = {name: i for i, name in enumerate(classes)}
    for dataset, labels in ((training, label), (tests, test_label)):
        unknown = {name for name in labels if name not in number}
        if unknown:
            which = "hidden" if unknown <= {None, -1} else f"not of the training data: {sorted(map(str, unknown))[:5]}"
            raise ValueError(f"labels of split {dataset.split!s} of {args.dataset} are {which}")
    training = training.remove_columns("label").add_column("label", [number[name] for name in label])
    tests = tests.remove_columns("label").add_column("label", [number[name] for name in test_label])
    return training, tests, [str(name) for name in classes]


def fill_in_recipe(args: argparse.Namespace, length: int | None, world: int):
    """Fill in the recipe; raise ValueError where the arguments make no sense."""
    recipe = RECIPES[getattr(args, "recipe", "finetune")]
    args.epochs = recipe["epochs"] if args.epochs is None else args.epochs
    if args.warmup_epochs is None:
        args.warmup_epochs = recipe.get("warmup_epochs", 0) * args.epochs // recipe["epochs"]
    if args.batch_size is None:
        share = world * max(1, args.accumulate)
        args.batch_size = max(share, min(recipe["batch_size"], (length or 2**62) // 16 // share * share))
    for name in ("blr", "weight_decay"):
        if getattr(args, name) is None:
            setattr(args, name, recipe.get(name))
    cli.check_training(args)
    if not 0 <= getattr(args, "randaugment", 0) <= 10:
        raise ValueError(f"--randaugment must lie between 0 and 10, got {args.randaugment}")
    if args.lr is None and args.blr is not None:
        args.lr = args.blr * args.batch_size / 256


# ------------------------------------------------------------------------------------------------- every image once


class Rows(NamedTuple):
    """What was computed of pictures: values (k, ...), labels and indices (k,), file names."""

    values: Tensor
    labels: Tensor
    indices: Tensor
    names: list[str]


def compute_rows(
    args: argparse.Namespace,
    accelerator: Accelerator,
    batches: EvalBatches,
    statistics: tuple,
    compute: Callable[[Tensor], Tensor],
) -> Iterator[Rows]:
    """``compute`` for normalised images, batch by batch, gathered in every process, in the order of their indices.

    Processes with fewer pictures take part until all are done, so that each picture comes exactly once.
    Pictures that cannot be read are left out and named; if they are too many, TooManyBadImages is raised in the end.
    """
    iterator, bad, good = iter(batches), [], 0
    patience = 1 if sys.stderr.isatty() else 30  # seconds between updates of the bar
    shown = dict(disable=not accelerator.is_main_process, leave=False, mininterval=patience)
    bar = tqdm(total=batches.length, unit="image", **shown)
    while True:
        batch, mine = next(iterator, None), None
        if batch is not None:
            with torch.no_grad(), accelerator.autocast():
                values = compute(data.normalize(batch.images, *statistics)).cpu()
            mine = (values, batch.labels, batch.indices, batch.names, batch.bad)
        everyone = [parts for parts in gather_object([mine]) if parts is not None]
        if not everyone:
            break
        values, labels, indices, names, reasons = zip(*everyone)
        values, labels, indices = torch.cat(values), torch.cat(labels), torch.cat(indices)
        names, reasons = list(itertools.chain(*names)), list(itertools.chain(*reasons))
        bad += [reason for reason in reasons if reason is not None]
        order = [i for i in indices.argsort().tolist() if reasons[i] is None]
        good += len(order)
        bar.update(len(reasons))
        if order:
            yield Rows(values[order], labels[order], indices[order], [names[i] for i in order])
    bar.close()
    for picture in bad[:20]:
        accelerator.print(f"left out a broken image: {picture.description}")
    if len(bad) > args.max_bad_images * (len(bad) + good):
        raise data.TooManyBadImages(
            f"{len(bad)} of {len(bad) + good} images are broken, more than --max-bad-images {args.max_bad_images}"
        )


def eval_batches(args: argparse.Namespace, accelerator: Accelerator, dataset, keep: bool = False) -> EvalBatches:
    share = Share(accelerator.process_index, accelerator.num_processes)
    return EvalBatches(
        dataset,
        args.image_size,
        max(1, min(256, args.batch_size // share.world)),
        crop_ratio=args.crop_ratio,
        workers=args.workers,
        device=accelerator.device,
        share=share,
        keep=keep,
    )


def extract(
    args: argparse.Namespace, accelerator: Accelerator, encoder: Encoder, batches: EvalBatches
) -> probes.Features:
    """Features (n, d) float32 and labels (n,) of all pictures, on the CPU of the main process (elsewhere: none)."""
    parts, labels = [], []
    pooled = functools.partial(encoder.pooled, how=args.pool)
    for rows in compute_rows(args, accelerator, batches, encoder.statistics, pooled):
        check_labels(rows.labels)
        if accelerator.is_main_process:
            parts.append(rows.values)
            labels.append(rows.labels)
    if not parts:
        return probes.Features(torch.empty(0, 0), torch.empty(0))
    values, end = torch.empty(sum(map(len, parts)), parts[0].shape[1]), 0
    parts.reverse()
    while parts:  # as torch.cat, but never holding everything twice
        part = parts.pop()
        values[end : end + len(part)] = part
        end += len(part)
    return probes.Features(values, torch.cat(labels))


def check_labels(labels: Tensor):
    if (labels < 0).any():
        raise ValueError("some labels are hidden (-1 or none)")


def accuracy(args: argparse.Namespace, accelerator: Accelerator, batches: EvalBatches, model: nn.Module) -> dict:
    """Top-1 and top-5 accuracy of a classifier in per cent, and the number of images it was tested on."""
    hits, count = torch.zeros(2, dtype=torch.float64), 0
    model.eval()

    def most_likely(images: Tensor) -> Tensor:  # (b, top)
        return model(images).topk(model.top).indices

    for rows in compute_rows(args, accelerator, batches, model.statistics, most_likely):
        check_labels(rows.labels)
        right = rows.values == rows.labels[:, None]
        hits += torch.stack([right[:, 0].sum(), right.sum()])
        count += len(right)
    top1, top5 = (100 * hits / count).tolist()
    return dict(top1=top1, top5=top5, images=count)


# ------------------------------------------------------------------------------------------------- kNN, linear probe


def knn(args: argparse.Namespace, accelerator: Accelerator, encoder: Encoder) -> dict:
    if min(args.k) < 1 or args.temperature <= 0:
        raise ValueError("--k must be at least 1, --temperature positive")
    training, tests, classes = labelled_data(args)
    seen = [extract(args, accelerator, encoder, eval_batches(args, accelerator, part)) for part in (training, tests)]
    if not accelerator.is_main_process:
        return {}
    how = dict(ks=args.k, classes=len(classes), temperature=args.temperature, device=accelerator.device)
    return dict(test_split=str(tests.split), **probes.evaluate_knn(*seen, **how))


class Probe(nn.Module):
    """A frozen encoder, BatchNorm without affine parameters and a linear head: images to logits (b, classes)."""

    def __init__(self, encoder: Encoder, pool: str, width: int, classes: int):
        super().__init__()
        self.model, self.pool, self.statistics = encoder.requires_grad_(False), pool, encoder.statistics
        self.top = probes.top(classes)
        self.norm = nn.BatchNorm1d(width, affine=False, eps=1e-6)
        self.head = nn.Linear(width, classes)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.model.pooled(images, self.pool)
        return self.head(self.norm(x))


def linear(args: argparse.Namespace, accelerator: Accelerator, encoder: Encoder) -> dict:
    training, tests, classes = labelled_data(args)
    fill_in_recipe(args, data.length_of(training, args.max_images), accelerator.num_processes)
    if args.recipe == "mae":
        image = torch.zeros(1, 3, args.image_size, args.image_size, device=accelerator.device)
        probe = Probe(encoder, args.pool, encoder.pooled(image, args.pool).shape[1], len(classes))
        optimizer = optim.LARS(probe.head.parameters(), args.lr, weight_decay=args.weight_decay)
        return fit(args, accelerator, probe, optimizer, training, tests)

    seen = [extract(args, accelerator, encoder, eval_batches(args, accelerator, part)) for part in (training, tests)]
    if not accelerator.is_main_process:
        return {}
    return dict(test_split=str(tests.split), **evaluate_linear(args, seen, len(classes), accelerator.device))


def evaluate_linear(args: argparse.Namespace, seen: list[probes.Features], classes: int, device) -> dict:
    """``probes.evaluate_linear`` of training and test features, as the arguments have it."""
    return probes.evaluate_linear(
        *seen,
        classes=classes,
        epochs=args.epochs,
        batch_size=args.batch_size,
        lr=args.lr,
        weight_decay=args.weight_decay,
        seed=args.seed,
        device=device,
    )


# ------------------------------------------------------------------------------------------------- fine-tuning


class Augment:
    """RandAugment, then random erasing, of a uint8 crop (3, H, W).

    As in MAE, which has timm's: two operations, each with probability 1/2, ``magnitude`` on a scale of 0 to 10. But
    the operations are torchvision's, and the magnitude does not vary. What is erased becomes noise of ImageNet's mean
    and deviation.
    """

    def __init__(self, magnitude: int, erasing: float):
        self.erasing = erasing
        grey = [round(255 * value) for value in data.MEAN]
        operation = v2.RandAugment(
            1, 3 * magnitude, num_magnitude_bins=31, interpolation=v2.InterpolationMode.BILINEAR, fill=grey
        )
        self.operations = [v2.RandomApply([operation], p=0.5)] * 2 if magnitude else []

    def __call__(self, image: Tensor) -> Tensor:
        for operation in self.operations:
            image = operation(image)
        if torch.rand(()) < self.erasing:
            top, left, height, width, noise = RandomErasing.get_params(image, scale=(0.02, 1 / 3), ratio=(0.3, 3.3))
            if noise.is_floating_point():  # else no box was found
                image = image.clone()
                image[:, top : top + height, left : left + width] = data.denormalize(noise).to(image.device)
        return image


def finetune(args: argparse.Namespace, accelerator: Accelerator, encoder: Encoder) -> dict:
    if encoder.backbone is None:
        raise ValueError(f"--checkpoint {args.checkpoint} has nothing to fine-tune")
    training, tests, classes = labelled_data(args)
    fill_in_recipe(args, data.length_of(training, args.max_images), accelerator.num_processes)
    classifier = smae.Classifier(encoder.backbone, classes, args.pool, args.drop_path)
    classifier.top, classifier.statistics = probes.top(len(classes)), encoder.statistics
    optimizer = torch.optim.AdamW(optim.layer_groups(classifier, args.layer_decay, args.weight_decay), lr=args.lr)
    mixes = [v2.MixUp(alpha=args.mixup, num_classes=len(classes))] if args.mixup else []
    mixes += [v2.CutMix(alpha=args.cutmix, num_classes=len(classes))] if args.cutmix else []
    return fit(
        args,
        accelerator,
        classifier,
        optimizer,
        training,
        tests,
        mix=v2.RandomChoice(mixes) if mixes else None,
        augment=Augment(args.randaugment, args.erasing),
        smoothing=args.smoothing,
        least=args.min_lr,
    )


def fit(
    args: argparse.Namespace,
    accelerator: Accelerator,
    model: Probe | smae.Classifier,
    optimizer: torch.optim.Optimizer,
    training: datasets.Dataset,
    tests: datasets.Dataset,
    *,
    mix: Callable | None = None,
    augment: Augment | None = None,
    smoothing: float = 0.0,
    least: float = 0.0,
) -> dict:
    """Train a model with labels, test it after every epoch, keep all that is needed to go on: accuracies in per cent.

    All randomness is a function of seed, epoch and step, so that a resumed training ends as an uninterrupted one.
    Mixup, cutmix, drop path and BatchNorm see one micro-batch of one process: they do depend on how many there are.
    """
    rank = np.array([accelerator.process_index])
    options = cli.batch_options(args, accelerator)
    batches = TrainBatches(training, **options, labels=True, augment=augment)
    test_batches = eval_batches(args, accelerator, tests, keep=bool(args.preload))
    trained, optimizer = accelerator.prepare(model.to(accelerator.device), optimizer)
    steps, warmup = (epochs * batches.steps_per_epoch for epochs in (args.epochs, args.warmup_epochs))
    state = load_state(args) if args.resume and (args.out / "state.pt").is_file() else None
    first, best = 1, {}
    if state:
        first, best = state["epoch"] + 1, state["best"]
        model.load_state_dict(state["model"], strict=isinstance(model, smae.Classifier))
        optimizer.load_state_dict(state["optimizer"])
        if accelerator.scaler:
            accelerator.scaler.load_state_dict(state["scaler"])
        last = state["last"]
        if accelerator.is_main_process:  # a line more may have been written than the state knows
            lines = (args.out / "metrics.jsonl").read_text().splitlines(keepends=True)
            (args.out / "metrics.jsonl").write_text("".join(lines[: state["epoch"]]))
    accelerator.print(
        f"{batches.length} training images, {args.epochs} epochs of {batches.steps_per_epoch} steps, "
        f"batch {args.batch_size}, learning rate {args.lr:g}" + (f"; going on after epoch {first - 1}" if state else "")
    )

    main, patience = accelerator.is_main_process, 1 if sys.stderr.isatty() else 30  # seconds between updates of the bar
    done = (first - 1) * batches.steps_per_epoch
    bar = tqdm(total=steps, initial=done, unit="step", disable=not main, mininterval=patience)
    for epoch in range(first, args.epochs + 1):
        step, total, start = (epoch - 1) * batches.steps_per_epoch, 0.0, time.perf_counter()
        trained.train()
        with cli.one_line_errors(data.TooManyBadImages, ranks="any"):
            for micro, batch in enumerate(batches.epoch(epoch)):
                lr = optim.learning_rate(step, steps, warmup, args.lr, least)
                for group in optimizer.param_groups:
                    group["lr"] = lr * group.get("scale", 1.0)
                torch.manual_seed(int(uniform((args.seed, epoch, RandomStream.MIX, micro), rank, 1)[0, 0] * 2**24))
                images = data.normalize(batch.images, *model.statistics)
                labels = data.to_device(batch.labels, accelerator.device)
                with accelerator.accumulate(trained):
                    images, labels = mix(images, labels) if mix else (images, labels)
                    loss = F.cross_entropy(trained(images), labels, label_smoothing=smoothing)
                    accelerator.backward(loss)
                    optimizer.step()
                    optimizer.zero_grad()
                total += loss.detach()
                if accelerator.sync_gradients:
                    step += 1
                    bar.update()
                    if step % 10 == 0:
                        run.check_bad_pictures(batches)
            run.check_bad_pictures(batches)
        seconds = time.perf_counter() - start
        mean = accelerator.reduce(total, "mean").item() / (batches.steps_per_epoch * args.accumulate)
        if not np.isfinite(mean):
            raise run.Diverged(f"the loss is {mean} in epoch {epoch}: try a lower --blr")
        if isinstance(model, Probe):  # every process has met other pictures
            for buffer in (model.norm.running_mean, model.norm.running_var):
                buffer.copy_(accelerator.reduce(buffer, "mean"))
        last = accuracy(args, accelerator, test_batches, model)
        best = dict(best_top1=last["top1"], best_epoch=epoch) if last["top1"] > best.get("best_top1", -1) else best
        record = dict(epoch=epoch, loss=mean, lr=lr, **last, seconds=seconds)
        if main:
            bar.write(
                f"epoch {epoch}/{args.epochs}  loss {mean:.4f}  top-1 {last['top1']:.2f} %, top-5 {last['top5']:.2f} %"
            )
            write_epoch(args, accelerator, model, optimizer, record, best)
    bar.close()
    return dict(test_split=str(tests.split), **last, **best)


def write_epoch(args, accelerator: Accelerator, model: nn.Module, optimizer, record: dict, best: dict):
    """Metrics, the classifier, the best classifier so far, and all that is needed to go on."""
    epoch, config = record["epoch"], dict(finetune=cli.plain(args))
    last = {name: record[name] for name in ("top1", "top5", "images")}
    with open(args.out / "metrics.jsonl", "a") as file:
        file.write(json.dumps(record) + "\n")
    if isinstance(model, smae.Classifier):
        smae.save(model, args.out, config)
        if best["best_epoch"] == epoch:
            smae.save(model, args.out / "best", config)
    state = dict(
        epoch=epoch,
        best=best,
        last=last,
        arguments=json.dumps(what_matters(args)),
        model={name: tensor for name, tensor in model.state_dict().items() if not name.startswith("model.")},
        optimizer=optimizer.state_dict(),
        scaler=accelerator.scaler.state_dict() if accelerator.scaler else None,
    )
    with open(args.out / "state.pt.part", "wb") as file:
        torch.save(state, file)
    smae.flush(args.out / "state.pt.part")
    os.replace(args.out / "state.pt.part", args.out / "state.pt")


def load_state(args: argparse.Namespace) -> dict:
    """The state that a training in --out left. Raises ValueError if that training was another one."""
    try:
        state = torch.load(args.out / "state.pt", map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{args.out / 'state.pt'} is damaged: {data.one_line(error)}") from None
    then, now = json.loads(state["arguments"]), json.loads(json.dumps(what_matters(args)))
    other = [f"--{name.replace('_', '-')} was {then.get(name)}" for name in now if then.get(name) != now[name]]
    if other:
        raise ValueError(f"cannot go on with {args.out}, which was another training: {', '.join(other)}")
    return state


def what_matters(args: argparse.Namespace) -> dict:
    """The arguments that must not change when a training is resumed."""
    free = ("out", "overwrite", "resume", "workers", "preload", "max_bad_images")
    return {name: value for name, value in cli.plain(args).items() if name not in free}


# ------------------------------------------------------------------------------------------------- use


def predict(args: argparse.Namespace, accelerator: Accelerator, encoder: Encoder) -> dict:
    if not isinstance(encoder, encoders.FineTuned):
        raise ValueError(f"{args.checkpoint} is no classifier: make one with eval.py finetune")

    def most_likely(images: Tensor) -> Tensor:  # (b, 2): probability and class
        return torch.stack(encoder.classifier(images).float().softmax(dim=1).max(dim=1), dim=1)

    def write(path: str, rows: Iterator[Rows]) -> int:
        count = 0
        with open(path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["file", "class", "probability"])
            for part in rows:
                found = [(encoder.classifier.classes[int(i)], f"{p:.6f}") for p, i in part.values.tolist()]
                writer.writerows([name, *which] for name, which in zip(part.names, found))
                count += len(found)
        return count

    return write_rows(args, accelerator, encoder, most_likely, "predictions.csv", write)


def embed(args: argparse.Namespace, accelerator: Accelerator, encoder: Encoder) -> dict:
    def write(path: str, rows: Iterator[Rows]) -> int:
        count, writer = 0, None
        for part in rows:
            names, vectors = pyarrow.array(part.names), pyarrow.array(part.values.flatten().numpy())
            columns = dict(
                file=names,
                label=pyarrow.array(part.labels.numpy()),
                features=pyarrow.FixedSizeListArray.from_arrays(vectors, part.values.shape[1]),
            )
            table = pyarrow.table(columns)
            writer = writer or pyarrow.parquet.ParquetWriter(path, table.schema)
            writer.write_table(table)
            count += len(names)
        if writer:
            writer.close()
        return count

    pooled = functools.partial(encoder.pooled, how=args.pool)
    return write_rows(args, accelerator, encoder, pooled, "features.parquet", write)


def write_rows(
    args: argparse.Namespace,
    accelerator: Accelerator,
    encoder: Encoder,
    compute: Callable[[Tensor], Tensor],
    name: str,
    write: Callable[[str, Iterator[Rows]], int],
) -> dict:
    """Compute something for every picture and ``write`` it, batch by batch, to the file ``name`` of --out."""
    options = args.image_column, args.label_column, args.streaming, args.max_images
    dataset = data.load_images(args.dataset, args.split, *options)
    label = (dataset.features or {}).get("label")
    if "int" not in getattr(label, "dtype", ""):  # file names tell as much, and more
        dataset = dataset.select_columns(["image"])
    rows = compute_rows(args, accelerator, eval_batches(args, accelerator, dataset), encoder.statistics, compute)
    if not accelerator.is_main_process:
        return dict(images=sum(len(part.names) for part in rows))
    count = write(f"{args.out / name}.part", rows)
    os.replace(f"{args.out / name}.part", args.out / name)
    return dict(images=count, file=name)


# ------------------------------------------------------------------------------------------------- command line


def report(args: argparse.Namespace, result: dict):
    """Write result.json and say in a line what came out."""
    metric = dict(metric="top1") if "top1" in result else {}
    content = dict(command=args.command, checkpoint=args.checkpoint, dataset=args.dataset, **metric, **result)
    content["config"] = cli.plain(args)
    (args.out / "result.json.part").write_text(json.dumps(content, indent=2) + "\n")
    os.replace(args.out / "result.json.part", args.out / "result.json")
    figures = [
        f"{title} {result[name]:.2f} %"
        for name, title in (("top1", "top-1"), ("top5", "top-5"), ("best_top1", "best top-1"))
        if name in result
    ]
    if "top1_by_k" in result:
        figures += ["k " + ", ".join(f"{k}: {top1:.2f}" for k, top1 in result["top1_by_k"].items())]
    print(
        f"{args.command} {args.checkpoint} ({args.pool}, {args.image_size} px) on {args.dataset}: "
        f"{', '.join([*figures, str(result['images']) + ' images'])}, {result['seconds']:.0f} s; wrote "
        f"{args.out / result.get('file', 'result.json')}"
    )


def main():
    args = build_parser().parse_args()
    with cli.one_line_errors(ValueError, OSError, run.Diverged):
        start, resume, files = time.perf_counter(), getattr(args, "resume", False), RESULT_FILES[args.command]
        if resume and (args.streaming or getattr(args, "recipe", None) == "fast"):
            raise ValueError("--resume is for --recipe mae and finetune, and not for streams, which start anew")
        resume = resume and (args.out / "state.pt").is_file()
        if not resume:
            cli.check_folder(args.out, args.overwrite, files)
        if args.command == "finetune" and args.out.resolve() == Path(args.checkpoint).resolve():
            raise ValueError(f"--out {args.out} is the checkpoint itself, which would be lost")
        if args.batch_size is not None and args.batch_size < 1:
            raise ValueError(f"--batch-size must be at least 1, got {args.batch_size}")
        if not 0 < args.crop_ratio <= 1:
            raise ValueError(f"--crop-ratio must lie in (0, 1], got {args.crop_ratio}")
        if args.precision == "auto":
            args.precision = cli.best_precision()
        accelerator = cli.make_accelerator(
            mixed_precision=args.precision, gradient_accumulation_steps=getattr(args, "accumulate", 1)
        )
        set_seed(args.seed)
        encoder = load_encoder(args).to(accelerator.device)
        if accelerator.is_main_process:
            args.out.mkdir(parents=True, exist_ok=True)
            for name in () if resume else files:
                (args.out / name).unlink(missing_ok=True)
        else:
            datasets.disable_progress_bars()
        result = globals()[args.command](args, accelerator, encoder)
        if accelerator.is_main_process:
            seconds, world = time.perf_counter() - start, accelerator.num_processes
            report(args, result | dict(processes=world, seconds=seconds))
        accelerator.end_training()  # or the process group may abort on the way out


if __name__ == "__main__":
    main()
