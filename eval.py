"""Judge what an encoder has learned by kNN, linear probe or fine-tuning; use it for predictions and features.

    accelerate launch eval.py knn --checkpoint runs/pretrain                       # seconds to minutes, no training
    accelerate launch eval.py linear --checkpoint runs/pretrain                    # probes on features extracted once
    accelerate launch eval.py linear --recipe mae --checkpoint runs/pretrain       # as in the paper
    accelerate launch eval.py finetune --checkpoint runs/pretrain --out runs/finetune
    accelerate launch eval.py predict --checkpoint runs/finetune --dataset FOLDER  # file, class, probability
    accelerate launch eval.py embed --checkpoint runs/pretrain --dataset FOLDER    # features to a parquet file
    accelerate launch eval.py reconstruct --checkpoint runs/pretrain --dataset FOLDER  # input, mask, reconstruction

--checkpoint takes a run folder, a checkpoint of facebookresearch/mae, transformers or timm, its name on
the Hugging Face hub, ``random`` (an untrained encoder, the floor of every comparison) or ``pixels`` (no
encoder at all).
"""

import argparse
import csv
import functools
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from PIL import Image
from torch import Tensor, nn

import checkpoint
import cli
import data
import encoders
import masks
import optim
import pictures
import pixels
import probes
import smae
from batches import EvalBatches, TrainBatches
from cropping import RandomStream, uniform
from encoders import Encoder, Rows, accuracy, compute_rows, extract, knn
from labelled import load_labelled
from run import (
    Folder,
    ProcessLost,
    Run,
    Schedule,
    all_processes_or_none,
    compare_configurations,
    find_checkpoint,
    lost_processes,
    read_state,
    take_folder,
)

RESULT_FILES = {  # what each command leaves in --out
    "knn": ("result.json",),
    "linear": ("result.json", "metrics.jsonl"),
    "finetune": ("result.json", "metrics.jsonl", "model.safetensors", "config.json"),
    "predict": ("result.json", "predictions.csv"),
    "embed": ("result.json", "features.parquet"),
    "reconstruct": ("result.json", "reconstruction.png", "reconstructions"),
}
RECIPES = {  # MAE, appendix A.1 and A.2, and a quick one
    "mae": dict(epochs=90, warmup_epochs=10, batch_size=16384, blr=0.1, weight_decay=0.0),
    "fast": dict(epochs=50, batch_size=1024),
    "finetune": dict(epochs=100, warmup_epochs=5, batch_size=1024, blr=5e-4, weight_decay=0.05),
}
IGNORED = {"out", "overwrite", "resume", "save_every_steps", "keep", "max_bad_images"}  # when a training is resumed


def build_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(description="Judge and use an encoder.")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, help: str, tests: bool = True) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help, formatter_class=cli.HelpFormatter)
        cli.add(sub, "checkpoint", checkpoint="runs/pretrain")
        sub.add_argument(
            "--pool",
            choices=["cls", "mean"],
            help="how to pool the tokens of an image (default: a classifier's own; cls, if there is a CLS token, else "
            "mean; finetune: mean)",
        )
        sub.add_argument(
            "--crop-ratio", type=float, default=0.875, help="side of the centre crop, as a fraction of the short side"
        )
        cli.add(sub, "precision", "seed", "out", "overwrite", out=Path("runs") / name)
        cli.add_data_options(sub)
        if tests:
            sub.add_argument("--test-split", help="split to test on (default: validation, val or test)")
            sub.add_argument(
                "--skip-unlabelled",
                action="store_true",
                help="leave out pictures whose label is hidden (-1) or missing",
            )
        cli.add_model_options(sub).description = "For --checkpoint random; --image-size and --heads for any."
        return sub

    sub = command("knn", "accuracy of weighted k-nearest neighbours")
    sub.add_argument("--k", type=int, nargs="+", default=[20, 10, 100, 200], help="neighbours; the first is reported")
    sub.add_argument("--temperature", type=float, default=0.07, help="weights are exp(cosine / temperature)")
    cli.add(sub, "batch-size", batch_size=256)

    sub = command("linear", "accuracy of a linear probe")
    sub.add_argument(
        "--recipe", choices=["fast", "mae"], default="fast", help="fast: on features extracted once; mae: as in MAE"
    )
    add_training_options(sub)

    sub = command("finetune", "accuracy after fine-tuning; saves the classifier")
    add_training_options(sub)
    cli.add(sub, "layer-decay", "drop-path", layer_decay=0.65, drop_path=0.1)
    sub.add_argument("--smoothing", type=float, default=0.1, help="label smoothing")
    sub.add_argument("--mixup", type=float, default=0.8, help="alpha of mixup (0: none)")
    sub.add_argument("--cutmix", type=float, default=1.0, help="alpha of cutmix (0: none)")
    sub.add_argument("--erasing", type=float, default=0.25, help="probability of random erasing")
    sub.add_argument("--randaugment", type=int, default=9, help="magnitude of RandAugment, 0 (none) to 10")
    sub.add_argument("--min-lr", type=float, default=1e-6, help="learning rate at the end")

    sub = command("predict", "classes of pictures, by a fine-tuned checkpoint, to predictions.csv", tests=False)
    sub.set_defaults(checkpoint="runs/finetune")
    cli.add(sub, "batch-size", batch_size=256)
    sub = command("embed", "features of pictures, to features.parquet", tests=False)
    cli.add(sub, "batch-size", batch_size=256)
    sub = command("reconstruct", "pictures masked and rebuilt by a masked autoencoder, to PNG files", tests=False)
    sub.set_defaults(crop_ratio=1.0)
    sub.add_argument(
        "--masked-by", choices=["random", "own"], default="random", help="own: the model's own patch clusters"
    )
    cli.add(sub, "mask-ratio", "batch-size", batch_size=64)
    return parser


def add_training_options(parser: argparse.ArgumentParser):
    """The options of a training with labels; RECIPES has their defaults."""
    group = parser.add_argument_group("optimisation (defaults: the recipe's; a batch is at most a 16th of the data)")
    cli.add(group, "epochs", "warmup-epochs", "batch-size", "accumulate", "blr", "lr", "weight-decay")
    cli.add(group, "crop-scale", crop_scale=(0.08, 1.0))
    cli.add(parser.add_argument_group("run (finetune and --recipe mae)"), "resume", "save-every-steps", "keep")


# ------------------------------------------------------------------------------ set-up


def fill_defaults(args: argparse.Namespace):
    """Fill in the precision; raise ValueError where options make no sense."""
    if args.command == "linear" and args.recipe == "fast" and args.resume:
        raise ValueError("--resume is for finetune and linear --recipe mae; the fast recipe takes seconds")
    if args.command in ("finetune", "linear"):
        cli.check_out(args.out, args.checkpoint)
        cli.check_positive(vars(args), "epochs", "accumulate", "save_every_steps", "keep")
    cli.check_positive(vars(args), "batch_size")
    if not 0 < args.crop_ratio <= 1:
        raise ValueError(f"--crop-ratio must lie in (0, 1], got {args.crop_ratio}")
    if args.command == "knn" and (min(args.k) < 1 or args.temperature <= 0):
        raise ValueError("--k must be at least 1, --temperature positive")
    if args.command == "finetune" and not 0 <= args.randaugment <= 10:
        raise ValueError(f"--randaugment must lie between 0 and 10, got {args.randaugment}")
    cli.check_rates(vars(args))
    args.precision = cli.choose_precision(args.precision)


def fill_recipe(args: argparse.Namespace, images: int | None, world: int):
    """Fill in what the recipe says, for so many training ``images`` (None: unknown) and processes."""
    recipe = RECIPES[getattr(args, "recipe", "finetune")]
    args.epochs = recipe["epochs"] if args.epochs is None else args.epochs
    if args.warmup_epochs is None:
        args.warmup_epochs = recipe.get("warmup_epochs", 0) * args.epochs // recipe["epochs"]
    share = world * max(1, args.accumulate)
    normalises = getattr(args, "recipe", None) == "mae"  # by BatchNorm, which takes two images or more
    least = 2 * share if normalises else share
    if args.batch_size is None:  # of a small data set, so that an epoch has 16 steps
        largest, unit = (images or 2**62) // 16, math.lcm(8, share)  # the same for 1, 2, 4 and 8 processes
        unit = unit if largest >= unit else share
        args.batch_size = max(least, min(recipe["batch_size"], largest // unit * unit))
    if normalises and args.batch_size < least:
        raise ValueError(
            f"--recipe mae needs two images in each micro-batch for BatchNorm: a --batch-size of at least {least}, "
            f"got {args.batch_size}"
        )
    for name in ("blr", "weight_decay"):
        if getattr(args, name) is None:
            setattr(args, name, recipe.get(name))
    cli.check_training(vars(args))
    if args.lr is None and args.blr is not None:
        args.lr = args.blr * args.batch_size / 256


def load_encoder(args: argparse.Namespace) -> Encoder:
    """The encoder that --checkpoint names; fills in --image-size and --pool.

    Raises FileNotFoundError, or ValueError if it cannot do what is asked for.
    """
    untrained = smae.PRESETS[args.model] | cli.model_sizes(vars(args))
    encoder = encoders.load(args.checkpoint, heads=args.heads, untrained=untrained)
    args.image_size = args.image_size or pixels.compact(encoder.image_size)
    image = torch.zeros(1, encoder.channels, *pixels.pair(args.image_size))

    if args.command == "finetune":
        args.pool = args.pool or "mean"
        if encoder.backbone is None:
            raise ValueError(f"--checkpoint {args.checkpoint} has nothing to fine-tune")
        encoder.backbone.grid(image)  # or raise
        if pixels.pair(args.image_size) != encoder.image_size:  # which is also that of the classifier
            return encoders.ViT(encoders.resized(encoder.backbone, args.image_size))
        return encoder
    args.pool = args.pool or encoder.pools[0]
    if isinstance(encoder, encoders.FineTuned) and args.pool not in encoder.pools:
        raise ValueError(f"{args.checkpoint} was fine-tuned with --pool {encoder.pools[0]}")
    if args.command == "predict" and not isinstance(encoder, encoders.FineTuned):
        raise ValueError(f"{args.checkpoint} is no classifier: make one with eval.py finetune")
    if args.command == "reconstruct":
        if not (encoder.backbone and encoder.backbone.config["decoder_depth"]):
            raise ValueError(f"{args.checkpoint} has no decoder to reconstruct with")
        h, w = encoder.backbone.grid(image)
        masks.masked_count(h * w, args.mask_ratio)  # or raise
        if args.masked_by == "own":
            masks.hint_count(h * w, args.mask_ratio, "random", 0.05)  # or raise
    encoder.pooled(image, args.pool)  # or raise
    return encoder


# ------------------------------------------------------------------------------ training with labels


class Probe(nn.Module):
    """BatchNorm without affine parameters and a linear head on a frozen encoder: images to logits (b, classes).

    The encoder is no submodule: it stays in evaluation mode and outside of checkpoints.
    """

    def __init__(self, encoder: Encoder, pool: str, width: int, classes: list[str]):
        super().__init__()
        self.pool, self.classes, self.statistics = pool, classes, encoder.statistics
        self.frozen = (encoder.requires_grad_(False),)
        self.norm = nn.BatchNorm1d(width, affine=False, eps=1e-6)
        self.head = nn.Linear(width, len(classes))
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.frozen[0].pooled(images, self.pool)
        return self.head(self.norm(x))


class Augment:
    """RandAugment, then random erasing, of a uint8 crop (3, H, W).

    As in MAE, which has timm's: two operations, each with probability 1/2, ``magnitude`` on a scale
    of 0 to 10. But the operations are torchvision's, and the magnitude does not vary. What is
    erased becomes noise of ImageNet's mean and deviation.
    """

    def __init__(self, magnitude: int, erasing: float):
        from torchvision.transforms import RandomErasing, v2  # takes a second, and few commands need it

        self.erasing, self.draw_box = erasing, RandomErasing.get_params
        grey = [round(255 * value) for value in data.MEAN]
        operation = v2.RandAugment(
            1, 3 * magnitude, num_magnitude_bins=31, interpolation=v2.InterpolationMode.BILINEAR, fill=grey
        )
        self.operations = [v2.RandomApply([operation], p=0.5)] * 2 if magnitude else []

    def __call__(self, image: Tensor) -> Tensor:
        for operation in self.operations:
            image = operation(image)
        if torch.rand(()) < self.erasing:
            top, left, height, width, noise = self.draw_box(image, scale=(0.02, 1 / 3), ratio=(0.3, 3.3))
            if noise.is_floating_point():  # else no box was found
                image = image.clone()
                image[:, top : top + height, left : left + width] = data.denormalize(noise).to(image.device)
        return image


def fit(
    args: argparse.Namespace,
    accelerator: Accelerator,
    folder: Folder,
    encoder: Encoder,
    training: datasets.Dataset,
    test_batches: EvalBatches,
    classes: list[str],
) -> dict:
    """Train a classifier or a linear probe, tested after every epoch: accuracies in per cent.

    All randomness is a function of seed, epoch and step. Mixup, cutmix, drop path and BatchNorm act
    on a micro-batch of one process, so that their effect depends on how many there are.
    """
    resumed_from = find_checkpoint(accelerator, folder, args.resume, args.overwrite)
    with all_processes_or_none():
        state = read_state(resumed_from, args.command)
        mix, augment, smoothing, min_lr = None, None, 0.0, 0.0
        if args.command == "finetune":
            model = smae.Classifier(encoder.backbone, classes, args.pool, args.drop_path)
            groups = optim.layer_groups(model, args.layer_decay, args.weight_decay)
            optimizer = torch.optim.AdamW(groups, lr=args.lr)
            mix = make_mix(args.mixup, args.cutmix, len(classes))
            if encoder.channels == 3:  # colours are augmented; other channels are cropped and flipped alone
                augment = Augment(args.randaugment, args.erasing)
            smoothing, min_lr = args.smoothing, args.min_lr
            description = smae.describe_model(model)
        else:
            image = torch.zeros(1, encoder.channels, *pixels.pair(args.image_size), device=accelerator.device)
            model = Probe(encoder, args.pool, encoder.pooled(image, args.pool).shape[1], classes)
            optimizer = optim.LARS(model.head.parameters(), args.lr, weight_decay=args.weight_decay)
            description = dict(model=dict(probe=args.checkpoint, classes=classes, pool=args.pool))
        options = cli.batch_options(args, accelerator)
        batches = TrainBatches(training, **options, labels=True, augment=augment, form=test_batches.form)
        seen = dict(images=batches.length, pictures=data.fingerprint(training), hub=data.hub_id(args.dataset))
        seen["pixel_range"] = data.pixel_range(test_batches.form)
        config = description | {args.command: cli.plain(vars(args)), "data": seen}
        if state:
            ignored = IGNORED | (set() if args.streaming else {"workers", "preload"})
            compare_configurations(state, config, args.command, accelerator.num_processes, ignored=ignored)
            model.load_state_dict(state["model"])

    def write_results(epoch: int):
        if args.command == "finetune":
            smae.save(model, args.out, config)
            if best_of(run.progress.records)["best_epoch"] == epoch:
                smae.save(model, args.out / "best", config)

    run = Run(
        accelerator,
        model.to(accelerator.device),
        optimizer,
        batches,
        Schedule(args.epochs, args.warmup_epochs, args.lr, min_lr),
        folder,
        config=config,
        write_results=write_results,
    )
    if state:
        run.restore(state, resumed_from)
    accelerator.print(
        f"{batches.length} training images, {args.epochs} epochs of {batches.steps_per_epoch} steps, "
        f"batch {args.batch_size}, learning rate {args.lr:g}" + (f"; continuing from {resumed_from}" if state else "")
    )

    with run.guarded():
        for epoch in run.epochs():
            for batch in run.seeded_batches_of(epoch):
                images = data.normalize(batch.images, *model.statistics)
                labels = data.to_device(batch.labels, accelerator.device)
                if mix:
                    images, labels = mix(images, labels)
                run.step(F.cross_entropy(run.trained(images), labels, label_smoothing=smoothing), batch)
            run.average_statistics()
            found = accuracy(model, test_batches, accelerator)
            run.end_epoch(f"top-1 {found['top1']:.2f} %, top-5 {found['top5']:.2f} %", **found)
    run.finish()
    last = {name: run.progress.records[-1][name] for name in ("top1", "top5", "images")}
    return last | best_of(run.progress.records)


def best_of(records: list[dict]) -> dict:
    """The best accuracy on the test pictures, and the first epoch that reached it."""
    best = max(records, key=lambda record: record["top1"])
    return dict(best_top1=best["top1"], best_epoch=best["epoch"])


def make_mix(mixup: float, cutmix: float, classes: int) -> Callable | None:
    """Mixup or cutmix by chance, whichever have an alpha above 0."""
    from torchvision.transforms import v2

    mixes = [v2.MixUp(alpha=mixup, num_classes=classes)] if mixup else []
    mixes += [v2.CutMix(alpha=cutmix, num_classes=classes)] if cutmix else []
    return v2.RandomChoice(mixes) if mixes else None


# ------------------------------------------------------------------------------ use


def write_predictions(path: Path, rows: Iterator[Rows], classes: list[str]) -> int:
    """Write file, class and probability of every picture to a CSV file; the number of pictures."""
    count = 0
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "class", "probability"])
        for part in rows:
            found = [(classes[int(i)], f"{p:.6f}") for p, i in part.values.tolist()]
            writer.writerows([name, *which] for name, which in zip(part.names, found))
            count += len(found)
    return count


def write_features(path: Path, rows: Iterator[Rows]) -> int:
    """Write file, label and features of every picture to a parquet file; the number of pictures."""
    count, writer = 0, None
    for part in rows:
        vectors = pyarrow.array(part.values.flatten().numpy())
        columns = dict(
            file=pyarrow.array(part.names),
            label=pyarrow.array(part.labels.numpy()),
            features=pyarrow.FixedSizeListArray.from_arrays(vectors, part.values.shape[1]),
        )
        table = pyarrow.table(columns)
        writer = writer or pyarrow.parquet.ParquetWriter(path, table.schema)
        writer.write_table(table)
        count += len(part.names)
    writer.close()
    return count


def probability_and_class(classifier: nn.Module, images: Tensor, indices: Tensor) -> Tensor:
    """The most likely class of normalised images, and its probability before it: (b, 2)."""
    return torch.stack(classifier(images).float().softmax(dim=1).max(dim=1), dim=1)


def reconstruct(model: smae.SMAE, kind: str, ratio: float, seed: int, images: Tensor, indices: Tensor) -> Tensor:
    """Mask normalised images at random or by the model's own patch clusters, and rebuild them.

    A row for each image: the values (H, 3 W, 3) of input, mask and reconstruction side by side, and
    the mean loss of its masked patches. What is random in a mask is a function of seed and index.
    """
    grid = model.grid(images)
    noise = uniform((seed, RandomStream.MASK), indices.numpy(), grid[0] * grid[1])
    noise = data.to_device(noise, images.device)
    if kind == "random":
        mask = masks.random_mask(*noise.shape, ratio, noise=noise)
    else:
        features = model.features(images, model.guiding_layer)
        mask = masks.self_guided_mask(features, grid, ratio, noise=noise)
    masked = pictures.marked(mask.masked, grid)
    before, after = (
        pictures.displayable(data.denormalize(each, *model.statistics))
        for each in (images, model.reconstruct(images, mask))
    )
    strips = np.concatenate([before, pictures.hide(before, ~masked, masked), after], axis=2)
    losses = model.errors(images, mask).mean(dim=1, keepdim=True).cpu()
    return torch.cat([torch.from_numpy(strips).float().flatten(1), losses], dim=1)


def write_reconstructions(out: Path, rows: Iterator[Rows], size: tuple[int, int], note: str) -> dict:
    """Write a picture for each row of :func:`reconstruct`, and one of the first eight; the mean loss."""
    folder, first, losses = out / "reconstructions", [], []
    folder.mkdir(exist_ok=True)
    for part in rows:
        strips = part.values[:, :-1].unflatten(1, (size[0], 3 * size[1], 3)).numpy()
        for index, name, strip in zip(part.indices.tolist(), part.names, strips):
            picture = Image.fromarray((strip * 255).round().astype(np.uint8))
            picture.save(folder / f"{index:05d}-{Path(name).stem if '.' in name else 'picture'}.png")
        first += list(strips)[: 8 - len(first)]
        losses += part.values[:, -1].tolist()
    columns = dict(zip(("input", "masked", "reconstruction"), np.split(np.stack(first), 3, axis=2)))
    loss = float(np.mean(losses))
    sheet = pictures.contact_sheet(columns, f"mean loss of {len(losses)} pictures: {loss:.4f}{note}")
    pictures.save(sheet, out / "reconstruction.png")
    return dict(images=len(losses), loss=loss, file="reconstruction.png")


# ------------------------------------------------------------------------------ command line


def main(arguments: list | None = None) -> dict:
    """Evaluate as the command line says, or as ``arguments`` say; return the content of result.json.

    Called from Python with a list, errors are exceptions: ValueError, OSError and those of run.py.
    """
    with cli.called(arguments) as arguments:
        args = build_parser().parse_args(arguments)
        with checkpoint.Lock(args.out) as lock, cli.one_line_errors(ValueError, OSError, ProcessLost):
            return evaluate(args, lock)


def evaluate(args: argparse.Namespace, lock: checkpoint.Lock) -> dict:
    """Every command: encoder, data, result.json. Returns the content of that."""
    start, files = time.perf_counter(), RESULT_FILES[args.command]
    trains = args.command == "finetune" or (args.command == "linear" and args.recipe == "mae")
    fill_defaults(args)
    if not trains:
        cli.check_folder(args.out, args.overwrite, files)
    accelerator = cli.make_accelerator(args.precision, getattr(args, "accumulate", 1))
    set_seed(args.seed)
    encoder = load_encoder(args).to(accelerator.device)

    limit = None if args.streaming and trains else args.max_images  # of a stream it is the length of an epoch
    columns = args.image_column, args.label_column, args.streaming, limit
    if args.command in ("knn", "linear", "finetune"):
        where = args.dataset, args.split, args.test_split
        training, tests, classes = load_labelled(*where, *columns, args.skip_unlabelled)
        if args.command != "knn":
            fill_recipe(args, data.length_of(training, args.max_images), accelerator.num_processes)
        parts = [training, tests]
    else:
        classes = []
        parts = [data.load_images(args.dataset, args.split, *columns)]
        if "int" not in getattr((parts[0].features or {}).get("label"), "dtype", ""):  # names of files say more
            if args.label_column and args.command == "embed":
                raise ValueError(f"embed writes numbers, and --label-column {args.label_column} has none")
            parts = [parts[0].select_columns(["image"])]
    options = cli.eval_batch_options(args, accelerator) | dict(crop_ratio=args.crop_ratio)
    trained = smae.config_of(args.checkpoint).get("data", {}) if args.command == "predict" else {}
    form = data.pixel_format(parts[0], encoder.channels, args.pixel_range or trained.get("pixel_range"))
    batches = [EvalBatches(part, **options, keep=trains and bool(args.preload), form=form) for part in parts]

    if trains:
        folder = Folder(args.out, lock, files, save_every_steps=args.save_every_steps, keep=args.keep)
        result = fit(args, accelerator, folder, encoder, training, batches[1], classes)
    else:
        take_folder(accelerator, lock, args.overwrite, files)
        with lost_processes(accelerator.num_processes):
            result = apply(args, accelerator, encoder, batches, len(classes))

    if len(parts) == 2:
        result = dict(test_split=str(parts[1].split)) | result
    result |= dict(processes=accelerator.num_processes, seconds=time.perf_counter() - start)
    if accelerator.is_main_process:
        result = report(args.command, args.out, cli.plain(vars(args)), result)
    accelerator.end_training()  # otherwise the process group may abort at exit
    return result


def apply(
    args: argparse.Namespace, accelerator: Accelerator, encoder: Encoder, batches: list[EvalBatches], classes: int
) -> dict:
    """The result of a command that trains no encoder, for all pictures."""
    statistics, main = encoder.statistics, accelerator.is_main_process
    if args.command == "knn":
        return knn(encoder, *batches, accelerator, classes, args.pool, args.k, args.temperature)
    if args.command == "linear":
        features = [extract(encoder, part, accelerator, args.pool) for part in batches]
        how = dict(epochs=args.epochs, batch_size=args.batch_size, lr=args.lr, weight_decay=args.weight_decay)
        how |= dict(classes=classes, seed=args.seed, device=accelerator.device)
        return probes.evaluate_linear(*features, **how) if main else {}
    if args.command == "predict":
        compute = functools.partial(probability_and_class, encoder.classifier)
        write = functools.partial(write_predictions, classes=encoder.classifier.classes)
        return write_table(args.out / "predictions.csv", batches[0], accelerator, statistics, compute, write)
    if args.command == "embed":

        def compute(images: Tensor, indices: Tensor) -> Tensor:
            return encoder.pooled(images, args.pool)

        return write_table(args.out / "features.parquet", batches[0], accelerator, statistics, compute, write_features)
    compute = functools.partial(reconstruct, encoder.backbone, args.masked_by, args.mask_ratio, args.seed)
    rows = compute_rows(batches[0], accelerator, statistics, compute)
    note = "\n(rebuilt patches have the input's brightness and contrast)" * encoder.backbone.normalize_pixels
    if main:
        return write_reconstructions(args.out, rows, pixels.pair(args.image_size), note)
    return dict(images=sum(len(part.names) for part in rows))


def write_table(
    file: Path,
    batches: EvalBatches,
    accelerator: Accelerator,
    statistics: tuple,
    compute: Callable[[Tensor, Tensor], Tensor],
    write: Callable[[Path, Iterator[Rows]], int],
) -> dict:
    """Compute something for every picture and let the main process ``write`` it to ``file``."""
    rows = compute_rows(batches, accelerator, statistics, compute)
    if not accelerator.is_main_process:
        return dict(images=sum(len(part.names) for part in rows))
    with smae.whole_file(file) as part:
        return dict(images=write(part, rows), file=file.name)


def report(command: str, out: Path, options: dict, result: dict) -> dict:
    """Write result.json, print the result in a line, return the content."""
    metric = dict(metric="top1") if "top1" in result else {}
    content = dict(command=command, checkpoint=options["checkpoint"], dataset=options["dataset"])
    content |= metric | result | dict(config=options)
    smae.write_text(out / "result.json", json.dumps(content, indent=2) + "\n")
    titles = dict(top1="top-1", top5="top-5", best_top1="best top-1")
    figures = [f"{title} {result[name]:.2f} %" for name, title in titles.items() if name in result]
    figures += [f"mean loss {result['loss']:.4f}"] if command == "reconstruct" else []
    if "top1_by_k" in result:
        figures += ["k " + ", ".join(f"{k}: {top1:.2f}" for k, top1 in result["top1_by_k"].items())]
    figures += [f"{result['images']} images"]
    size = " x ".join(map(str, dict.fromkeys(pixels.pair(options["image_size"]))))
    print(
        f"{command} {options['checkpoint']} ({options['pool']}, {size} px) on {options['dataset']}: "
        f"{', '.join(figures)}, {result['seconds']:.0f} s; wrote {out / result.get('file', 'result.json')}"
    )
    return content


if __name__ == "__main__":
    main()
