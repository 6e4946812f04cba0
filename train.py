"""Pre-train a masked autoencoder: first with random masks, then with masks guided by what it has learned itself.

    accelerate launch train.py                                    # the demo: a tiny model on drawn shapes
    accelerate launch train.py --dataset PATH_OR_HUB_NAME ...     # your own pictures
    accelerate launch train.py --preset paper                     # the paper's ImageNet recipe (8 GPUs)

    accelerate launch train.py ... --resume auto                  # go on where it stopped, if it has begun

Leaves in --out: config.json, model.safetensors, metrics.jsonl (one object per epoch), masks.png, loss.png and the
last checkpoints. SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 end it after the step at hand with a checkpoint and exit code
128 + signal; a second one ends it at once.
"""

import argparse
import contextlib
import json
import math
import os
import re
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object, set_seed
from torch import Tensor
from tqdm import tqdm

import checkpoint
import cli
import data
import encoders
import masks
import optim
import pictures
import smae
from batches import Batch, Share, TrainBatches
from cropping import RandomStream, uniform
from guide import Guide, Source

PAPER = dict(  # ViT-B/16 on ImageNet-1k, as in the paper; MAE's recipe
    dataset="imagenet-1k",
    model="base",
    image_size=224,
    patch_size=16,
    epochs=400,
    warmup_epochs=40,
    guide_start=50,
    relevance="foreground",
    batch_size=4096,
    blr=1.5e-4,
    save_every=5,
)
LONGEST = 15 * 60  # seconds of work that an interruption may cost, whatever --save-every
MAPS = "relevance.npy"  # of whole pictures, as long as --guide cached needs it
RUN_FILES = ("config.json", "model.safetensors", "metrics.jsonl", "masks.png", "loss.png")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Pre-train a self-guided masked autoencoder.", formatter_class=cli.HelpFormatter
    )
    parser.add_argument("--preset", choices=["demo", "paper"], default="demo", help="where the defaults come from")
    cli.add_data_options(parser)

    group = cli.add_model_options(parser)
    group.add_argument("--raw-pixels", action="store_true", help="reconstruct pixels as they are, not normalised")
    group.add_argument("--init-from", help="start from this run folder or checkpoint, whose sizes it has")
    group.add_argument("--fresh-decoder", action="store_true", help="take the encoder only of --init-from")

    group = parser.add_argument_group("masks")
    group.add_argument(
        "--mask", choices=["random", "selfguided", "amt"], default="selfguided", help="masks after --guide-start"
    )
    cli.add(group, "mask-ratio")
    group.add_argument("--hint", choices=["none", "random", "similar"], default="random", help="choice of hint patches")
    group.add_argument("--hint-ratio", type=float, default=0.05, help="hints as a share of all patches; at least two")
    group.add_argument(
        "--hint-portion", type=float, default=0.5, help="most relevant share of all patches with the hints"
    )
    group.add_argument(
        "--hint-end", type=float, default=1.0, help="share of hint ratio and portion that is left in the last epoch"
    )
    group.add_argument("--amt-ratio", type=float, default=0.45, help="in place of --mask-ratio where AMT masks")
    group.add_argument("--throw-ratio", type=float, default=0.4, help="share of the patches that AMT throws away")

    group = parser.add_argument_group("guide")
    group.add_argument(
        "--guide",
        choices=["online", "cached"],
        help="look at every crop, or now and then at every whole picture (default: cached for amt and --guide-from, "
        "else online)",
    )
    group.add_argument(
        "--guide-from",
        metavar="WHAT",
        help="guide by something else, no longer self-guided: a frozen model (run folder or checkpoint), column:NAME "
        "(masks in the data), or the floors pixels (raw patches) and centre (of the picture)",
    )
    group.add_argument(
        "--guide-image-size", type=int, help="side of the images that --guide-from sees (default: its own)"
    )
    group.add_argument(
        "--guide-shuffle",
        action="store_true",
        help="give each picture the relevance of another: masks of the same shapes without their content",
    )
    group.add_argument(
        "--guide-start",
        type=cli.epochs_or_auto,
        help="epochs of random masks before, or auto: until mask tokens serve the decoder more than visible ones "
        "(default: an eighth of --epochs; a tenth for amt; 0 with --guide-from)",
    )
    group.add_argument(
        "--guide-every",
        type=int,
        help="epochs between looks of --guide cached, 0: one look, at the start (default: a tenth of --epochs)",
    )
    group.add_argument(
        "--guide-layer",
        type=cli.block,
        help="block whose output guides: a number, or decoder-1, ... (default: the encoder's last but one)",
    )
    cli.add(group, "guide-debias", "foreground", "relevance")

    group = parser.add_argument_group("optimisation")
    cli.add(group, "epochs", "warmup-epochs", "batch-size", "accumulate", epochs=5, warmup_epochs=1, batch_size=128)
    cli.add(group, "blr", "lr", "weight-decay", blr=1e-3, weight_decay=0.05)
    group.add_argument("--clip-grad", type=float, help="largest gradient norm (default: no clipping)")
    cli.add(group, "crop-scale", "precision", "compile", "seed", crop_scale=(0.2, 1.0))

    group = parser.add_argument_group("run")
    cli.add(group, "out", "overwrite", out=Path("runs/pretrain"))
    group.add_argument(
        "--resume", help="go on from a checkpoint, or the newest of a run folder; auto: of --out, if there is one"
    )
    group.add_argument(
        "--save-every", type=int, help="epochs between checkpoints with weights and pictures (default: a tenth)"
    )
    group.add_argument(
        "--save-every-steps", type=int, help="steps between more checkpoints (in any case, one comes every 15 minutes)"
    )
    group.add_argument("--keep", type=int, default=2, help="checkpoints to keep, the newest; unasked ones go sooner")
    group.add_argument("--log-with", help="tracker of Accelerate: tensorboard, wandb, ... (default: none)")

    return parser


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = build_parser()
    if parser.parse_known_args(arguments)[0].preset == "paper":
        parser.set_defaults(**PAPER)
    return parser.parse_args(arguments)


# ------------------------------------------------------------------------------------------------- set-up


def complete(args: argparse.Namespace):
    """Fill in the defaults that depend on other arguments; raise ValueError where arguments make no sense."""
    cli.check_training(args)
    if args.guide_start is None:
        args.guide_start = max(1, args.epochs // (10 if args.mask == "amt" else 8))
        args.guide_start = 0 if args.guide_from else args.guide_start
    if args.guide_start != "auto" and args.guide_start < 0:
        raise ValueError(f"--guide-start must not be negative, got {args.guide_start}")
    if args.guide is None:
        args.guide = "cached" if (args.mask == "amt" or args.guide_from) and not args.streaming else "online"
    if args.guide == "cached" and args.streaming and args.mask != "random":
        raise ValueError("a stream has no index to keep maps by: with --streaming the guide must be --guide online")
    if args.guide_every is None:
        args.guide_every = max(1, args.epochs // 10)
    if args.guide_every < 0:
        raise ValueError(f"--guide-every must not be negative, got {args.guide_every}")
    check_guide_source(args)
    if args.lr is None:
        args.lr = args.blr * args.batch_size / 256
    if args.save_every is None:
        args.save_every = math.ceil(args.epochs / 10)
    for name in ("save_every", "save_every_steps", "keep"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if args.precision == "auto":
        args.precision = cli.best_precision()


def check_guide_source(args: argparse.Namespace):
    """Raise ValueError where --guide-from and --guide-shuffle do not go with the other options."""
    if args.guide_from and args.mask != "selfguided":
        raise ValueError(f"--guide-from guides --mask selfguided, not --mask {args.mask}")
    if mask_column(args.guide_from) and args.streaming:
        raise ValueError(
            f"--guide-from {args.guide_from} finds masks by their index, which a stream has not: drop --streaming"
        )
    if mask_column(args.guide_from) and args.guide != "cached":
        raise ValueError(f"--guide-from {args.guide_from} is read once for all pictures: it takes --guide cached")
    if args.guide_shuffle and args.mask == "random":
        raise ValueError("--guide-shuffle is for guided masks, not for --mask random")
    if args.guide_shuffle and args.guide != "cached":
        raise ValueError("--guide-shuffle takes the relevance of whole pictures: add --guide cached")
    if args.guide_shuffle and args.guide_from == "centre":
        raise ValueError("--guide-shuffle changes nothing with --guide-from centre, the same for every picture")
    frozen = args.guide_from and args.guide_from not in ("centre", "pixels") and not mask_column(args.guide_from)
    if args.guide_image_size is not None and (not frozen or args.guide_image_size < 1):
        raise ValueError("--guide-image-size takes a positive number of pixels, and a model to --guide-from")


def build_model(args: argparse.Namespace, resumed: dict | None = None) -> smae.SMAE:
    """The model that the arguments describe; ``resumed``: the sizes of one to go on with, in place of --init-from."""
    source = None
    if args.init_from and resumed:
        config = dict(resumed)
        args.image_size = args.image_size or config["image_size"][0]
    elif args.init_from:
        source = encoders.backbone(args.init_from, heads=args.heads)
        fresh = args.fresh_decoder or not source.config["decoder_depth"]
        config = source.config | (decoder_sizes(source) | dict(normalize_pixels=True) if fresh else {})
        args.image_size = args.image_size or config["image_size"][0]
    else:
        config = smae.PRESETS[args.model] | dict(normalize_pixels=True)
        config.setdefault("patch_size", 8)
        args.image_size = args.image_size or 64
    config |= cli.model_sizes(args) | dict(image_size=args.image_size)
    model = smae.SMAE(**config | (dict(normalize_pixels=False) if args.raw_pixels else {}))
    if source:
        smae.initialise(model, source, decoder=not fresh)
    args.patch_size = model.patch_size
    return model


def build_guide(args: argparse.Namespace, model: smae.SMAE, dataset=None, device="cpu") -> Guide:
    """What guides the masks after the first phase, as the arguments have it; ``dataset`` may have a column for it."""
    hint = args.hint
    if args.mask == "random" and not hints_fit(args, model.patch_count):  # only masks.png would show them
        hint = "none"
    made = Guide(
        model,
        "amt" if args.mask == "amt" else "selfguided",
        source=guide_source(args.guide_from, dataset, device),
        source_name=args.guide_from,
        source_size=args.guide_image_size,
        shuffle=args.guide_shuffle,
        ratio=args.mask_ratio,
        hint=hint,
        hint_ratio=args.hint_ratio,
        hint_portion=args.hint_portion,
        hint_end=args.hint_end,
        layer=args.guide_layer,
        foreground=args.foreground,
        scoring=args.relevance,
        debias=args.guide_debias,
        amt_ratio=args.amt_ratio,
        throw_ratio=args.throw_ratio,
        compile=args.compile,
        start=args.epochs if args.mask == "random" else None if args.guide_start == "auto" else args.guide_start,
        every=args.guide_every,
        epochs=args.epochs,
        seed=args.seed,
    )
    args.guide_layer = made.layer
    return made


def hints_fit(args: argparse.Namespace, n: int) -> bool:
    """Whether ``n`` patches have room for the hints."""
    try:
        masks.hint_count(n, args.mask_ratio, args.hint, args.hint_ratio, args.hint_portion)
    except ValueError:
        return False
    return True


def guide_source(name: str | None, dataset, device) -> Source | None:
    """What --guide-from names; a path that exists wins over the names of the floors."""
    if name is None or (name in ("centre", "pixels") and not Path(name).exists()):
        return name
    if column := mask_column(name):
        return data.ObjectMasks(dataset, column)
    return encoders.backbone(name, device).requires_grad_(False)


def mask_column(guide_from: str | None) -> str | None:
    """NAME where --guide-from says column:NAME."""
    return guide_from.removeprefix("column:") if (guide_from or "").startswith("column:") else None


def decoder_sizes(encoder: smae.SMAE) -> dict:
    """A new decoder for an encoder that has none: that of the preset of the same width, else that of the paper."""
    width = encoder.config["width"]
    preset = next((sizes for sizes in smae.PRESETS.values() if sizes["width"] == width), smae.PRESETS["base"])
    return {name: preset[name] for name in preset if name.startswith("decoder_")}


# ------------------------------------------------------------------------------------------------- training


def train_batches(args: argparse.Namespace, accelerator: Accelerator, dataset, **options) -> TrainBatches:
    """This process's batches of the data set, as the arguments have them."""
    return TrainBatches(
        dataset,
        args.image_size,
        args.batch_size,
        scale=tuple(args.crop_scale),
        accumulate=args.accumulate,
        seed=args.seed,
        workers=args.workers,
        preload=args.preload,
        device=accelerator.device,
        share=Share(accelerator.process_index, accelerator.num_processes),
        length=args.max_images,
        max_bad=args.max_bad_images,
        **options,
    )


def choose_mask(
    args: argparse.Namespace, phase: str, epoch: int, batch: Batch, images: Tensor, guide: Guide, noise: Tensor
) -> masks.Mask:
    """The mask of a batch whose normalised crops are ``images``: random, or guided by what they show."""
    if phase == "random":
        return masks.random_mask(*noise.shape, args.mask_ratio, noise=noise)
    relevance = guide.recall(batch) if args.guide == "cached" else guide.look(images, learn=True)[0]
    return guide.mask(relevance, noise, epoch)


def stop_if_too_many_are_bad(batches: TrainBatches):
    """Add up the bad pictures of all processes; if they are too many, all stop together."""
    everywhere = gather_object(list(batches.bad.descriptions.items()))
    with together(data.TooManyBadImages):
        batches.bad.add(everywhere)
        batches.bad.check()


@contextlib.contextmanager
def together(*kinds: type[Exception]):
    """What every process meets at the same time is for the first of them to report; the others just end."""
    try:
        yield
    except kinds:
        if os.environ.get("RANK", "0") == "0":
            raise
        sys.exit(1)


def kind_of_masks(args: argparse.Namespace) -> str:
    """Whose masks those after the first phase are, in log and metrics."""
    if args.guide_shuffle and args.mask == "amt":
        return "shuffled amt"
    return "guided" if args.guide_from or args.guide_shuffle else args.mask


def announce(args: argparse.Namespace, accelerator: Accelerator, model: smae.SMAE, batches: TrainBatches):
    """Say what is about to be trained, on what, and how."""
    when = "when mask tokens overtake visible ones" if args.guide_start == "auto" else f"epoch {args.guide_start + 1}"
    world, parameters = accelerator.num_processes, sum(p.numel() for p in model.parameters())
    accelerator.print(
        f"{args.dataset}: {batches.length} images; {args.init_from or args.model}: {parameters / 1e6:.1f} M "
        f"parameters, {model.patch_count} patches\n"
        f"{world} process(es) on {accelerator.device.type}, precision {args.precision}; "
        f"effective batch {args.batch_size} = {world} processes x {args.accumulate} micro-batches "
        f"x {args.batch_size // world // args.accumulate}; learning rate {args.lr:g}\n"
        f"{args.epochs} epochs of {batches.steps_per_epoch} steps, {kind_of_masks(args)} masks"
        + (f" ({args.guide} guide), start: {when}" if args.mask != "random" else "")
    )
    if args.guide_from:
        accelerator.print(f"not self-guided: relevance comes from {args.guide_from}")
    if args.guide_shuffle:
        accelerator.print("shuffled: each picture is masked by the relevance of another")
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    if on_cpu and "MASTER_ADDR" in os.environ and world == 1:  # several were asked for
        accelerator.print("on a CPU, accelerate launch starts one process only; for more: torchrun --nproc_per_node N")


def draw(args: argparse.Namespace, epoch: int, guide: Guide, samples: Tensor, objects: Tensor | None):
    """Refresh masks.png, of eight of the samples, and loss.png."""
    few = torch.linspace(0, len(samples) - 1, min(8, len(samples))).long()
    objects = objects if objects is None else objects[few]
    sheet = pictures.mask_sheet(guide, samples[few], objects, epoch)
    for name, figure in (("masks.png", sheet), ("loss.png", pictures.loss_curve(args.out / "metrics.jsonl"))):
        figure.savefig(args.out / f"{name}.part", format="png")
        os.replace(args.out / f"{name}.part", args.out / name)


# ------------------------------------------------------------------------------------------------- going on


class Diverged(ArithmeticError):
    """The loss is no longer a finite number."""


class Interrupted(Exception):
    """A process was told to stop, by the signal of this number."""


class Mishap(RuntimeError):
    """What befalls a run from outside."""


@dataclass
class Progress:
    """How far a run has come: in ``epoch``, of which ``seen`` images are done, after ``step`` steps in all."""

    total: Tensor  # of the losses of all images of the epoch that this process has seen
    epoch: int = 1
    seen: int = 0
    step: int = 0
    seconds: float = 0.0  # of the epoch
    records: list[dict] = field(default_factory=list)  # of metrics.jsonl
    name: str = field(default_factory=lambda: uuid.uuid4().hex)  # for trackers


def find_checkpoint(args: argparse.Namespace, accelerator: Accelerator, lock: checkpoint.Lock) -> Path | None:
    """What --resume names, if anything. Raises ValueError if it is not there or would cost another run."""
    folder, problem = None, None
    if accelerator.is_main_process:
        try:
            lock.take()
            folder = choose_checkpoint(args, accelerator.print)
        except (ValueError, OSError) as error:
            problem = str(error)
    folder, problem = broadcast_object_list([folder, problem])
    if problem:
        raise ValueError(problem)
    return folder


def choose_checkpoint(args: argparse.Namespace, say: Callable) -> Path | None:
    """The same, in the main process."""
    auto, folder = args.resume == "auto", None
    if args.resume:
        folder = checkpoint.find(args.out if auto else Path(args.resume), say, aside=auto)
        if not auto and folder is None:
            raise ValueError(f"--resume {args.resume}: there is no checkpoint")
    if folder and folder.parent == args.out.resolve():
        newer = [other.name for other in checkpoint.folders(args.out) if other.name > folder.name]
        if newer and not args.overwrite:
            raise ValueError(f"{', '.join(newer)} of {args.out} would be lost; if they may be, add --overwrite")
    else:  # what is left of a run stopped before its first checkpoint is not worth a question
        cli.check_folder(args.out, args.overwrite, ("model.safetensors",) if auto else RUN_FILES)
    return folder


FREE = {"out", "overwrite", "resume", "save_every", "save_every_steps", "keep", "log_with", "max_bad_images"}
FREE |= {"preset", "init_from", "fresh_decoder", "model", *smae.PRESETS["base"], "image_size", "patch_size"}


def compare(state: dict, config: dict, processes: int) -> list[str]:
    """What is not as it was when a checkpoint was written, where that may be. Raises ValueError where it may not."""
    then, now = (json.loads(json.dumps(x)) for x in (state["config"], config))
    if then["model"] != now["model"]:
        other = [f"{key} {then['model'].get(key)}, now {now['model'][key]}" for key in now["model"]]
        other = [text for text, key in zip(other, now["model"]) if then["model"].get(key) != now["model"][key]]
        raise ValueError(f"cannot go on with another model: it had {'; '.join(other)}")
    pairs = [(a, b) for a, b in zip(then["data"]["pictures"], now["data"]["pictures"]) if a and b]
    if then["data"]["images"] != now["data"]["images"] or 2 * sum(a != b for a, b in pairs) > len(pairs):
        raise ValueError(
            f"cannot go on with another data set: it was {then['train']['dataset']}, {then['data']['images']} images, "
            f"and is {now['train']['dataset']}, {now['data']['images']} images"
        )
    if then["train"]["seed"] != now["train"]["seed"]:
        raise ValueError(f"cannot go on with another seed, on which order and crops hang: {then['train']['seed']}")
    free = FREE | (set() if now["train"]["streaming"] else {"workers"})
    changed = [(f"--{name.replace('_', '-')}", then["train"].get(name), now["train"][name]) for name in now["train"]]
    changed = [change for change in changed if change[1] != change[2] and change[0][2:].replace("-", "_") not in free]
    changed += [("processes", len(state["processes"]), processes)]
    return [f"{name} {before} -> {after}" for name, before, after in changed if before != after]


@contextlib.contextmanager
def all_or_none() -> Iterator[None]:
    """End all processes, with one line, if one of them meets something that the user can mend."""
    problem = None
    try:
        yield
    except (ValueError, OSError) as error:
        problem = str(error)
    problems = [problem for problem in gather_object([problem]) if problem]
    if problems:
        with cli.one_line_errors(ValueError):
            raise ValueError(problems[0])
        sys.exit(1)


@contextlib.contextmanager
def mishaps(world: int) -> Iterator[None]:
    """Turn the errors by which torch reports the death of another process into a Mishap."""
    try:
        yield
    except RuntimeError as error:
        text = f"({data.one_line(error)}): --resume auto goes on from the last checkpoint"
        if re.search(r"DataLoader worker \(pid.*(killed by signal|exited unexpectedly)", text):
            raise Mishap(f"a process that reads pictures died, for want of memory perhaps {text}") from None
        gone = "closed by peer|reset by peer|broken pipe|remote process exited|timed? ?out"
        if world > 1 and re.search(gone, text, re.IGNORECASE):
            raise Mishap(f"another process of the run is gone {text}") from None
        raise


# ------------------------------------------------------------------------------------------------- the run


class Run:
    """A pre-training with all that changes while it goes on."""

    def __init__(self, args, accelerator, model, optimizer, guide, batches, samples, objects, config, lock):
        self.args, self.accelerator, self.model, self.guide, self.batches = args, accelerator, model, guide, batches
        self.samples, self.objects, self.config, self.lock = samples, objects, config, lock
        self.trained, self.optimizer = accelerator.prepare(model, optimizer)  # ``model`` stays the bare one
        self.progress = Progress(torch.zeros((), device=accelerator.device))
        self.peers, self.signals = checkpoint.Peers(accelerator.num_processes), checkpoint.Signals()
        self.phase, self.clock = "random", time.perf_counter()  # whose masks; when the epoch began
        self.losses: list[tuple[int, Tensor, list[int]]] = []  # step, loss, images: not yet known to be finite
        self.saved, self.written = None, time.monotonic()  # step of the last checkpoint; when one was last tried
        self.passing: set[int] = set()  # steps of checkpoints that no option asked for
        self.replaces, self.published = True, True  # whether another run lies in --out; whether the results are there
        self.bar = tqdm(
            total=args.epochs * batches.steps_per_epoch,
            disable=not accelerator.is_main_process,
            unit="step",
            mininterval=1 if sys.stderr.isatty() else 30,  # seconds between updates
        )

    def place(self) -> int:
        """Steps of the schedule that are done."""
        return (self.progress.epoch - 1) * self.batches.steps_per_epoch + self.progress.seen // self.args.batch_size

    # ---------------------------------------------------------------------------------------------- one epoch

    def train_epoch(self):
        """What is left of the epoch, up to its last step. Raises Interrupted before, if a signal asks for it."""
        args, guide, progress = self.args, self.guide, self.progress
        self.clock = time.perf_counter() - progress.seconds
        guided = guide.start is not None and progress.epoch > guide.start
        self.phase = kind_of_masks(args) if guided else "random"
        if guided and args.guide == "cached":
            due = not progress.seen and guide.is_due(progress.epoch)
            if self.peers.largest(due or guide.lacks_maps)[0]:
                self.remember()
        self.trained.train()
        with contextlib.closing(self.batches.epoch(progress.epoch, progress.seen)) as batches:
            for batch in batches:
                self.learn(batch)
                if not self.accelerator.sync_gradients:
                    continue
                guide.end_step(self.accelerator)
                progress.step += 1
                progress.seen += args.batch_size
                self.bar.update()
                last = not self.batches.plan.steps_left(progress.seen)  # then the end of the epoch does what is due
                overdue = self.listen(stop=not last)
                if progress.step % 10 == 0:  # this waits for the device: not at every step
                    self.check_losses()
                if (overdue or self.save_after(progress.step)) and not last:
                    self.save()

    def remember(self):
        """Let the guide look at all whole pictures, which may take long: with a checkpoint before."""
        if self.progress.step:
            self.save()
        self.say(f"looking at {self.batches.length} whole pictures, for the masks of the next epochs")
        try:
            self.claim()
            self.guide.remember(self.batches, self.accelerator, self.args.out / MAPS, after_each=self.listen)
        except OSError as error:
            if self.guide.maps is None:
                raise Mishap(f"the relevance of the pictures cannot be kept: {data.one_line(error)}") from None
            self.say(f"WARNING: {data.one_line(error)}; training goes on with the relevance of an earlier epoch")
        missing = sorted(gather_object(list(getattr(self.guide.source, "missing", []))))
        if missing:
            self.say(
                f"{len(missing)} pictures have no mask that can be read, image {missing[0]} first: theirs are empty"
            )

    def claim(self):
        """Make --out the folder of this run, in the main process. Raises OSError, or Locked if it is another's."""
        if self.accelerator.is_main_process:
            self.args.out.mkdir(parents=True, exist_ok=True)
            self.lock.take()

    def save_after(self, step: int) -> bool:
        return bool(self.args.save_every_steps) and step % self.args.save_every_steps == 0

    def learn(self, batch: Batch):
        """Forward, backward and, at the end of a step, update."""
        args, accelerator, model, progress = self.args, self.accelerator, self.model, self.progress
        images = data.normalize(batch.images, model.config["mean"], model.config["std"])
        noise = uniform((args.seed, progress.epoch, RandomStream.MASK), batch.indices, model.patch_count)
        with accelerator.autocast():
            noise = data.to_device(noise, images.device)
            mask = choose_mask(args, self.phase, progress.epoch, batch, images, self.guide, noise)
        steps = args.epochs * self.batches.steps_per_epoch
        lr = optim.learning_rate(self.place(), steps, args.warmup_epochs * self.batches.steps_per_epoch, args.lr)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with accelerator.accumulate(self.trained):
            loss = self.trained(images, mask)
            accelerator.backward(loss)
            if args.clip_grad and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(self.trained.parameters(), args.clip_grad)
            self.optimizer.step()
            self.optimizer.zero_grad()
        progress.total += loss.detach() * len(images)
        self.losses.append((progress.step + 1, loss.detach(), batch.indices))

    def end_epoch(self):
        """Take stock of an epoch that is through; save what is due."""
        args, accelerator, guide, progress = self.args, self.accelerator, self.guide, self.progress
        self.check_losses()
        seconds, epoch = time.perf_counter() - self.clock, progress.epoch
        record = dict(
            epoch=epoch,
            phase=self.phase,
            loss=accelerator.reduce(progress.total, "sum").item() / progress.seen,
            lr=self.optimizer.param_groups[0]["lr"],
            images_per_second=progress.seen / seconds,
            seconds=seconds,
            bad_images=self.batches.bad.count,
        )
        with accelerator.autocast():
            mean, std = self.model.config["mean"], self.model.config["std"]
            guide.measure(data.normalize(self.samples.to(accelerator.device), mean, std))
        learned_before = bool(args.init_from) and not args.fresh_decoder
        if guide.start is None and broadcast_object_list([guide.ready(learned_before)])[0]:  # in all processes
            guide.start = epoch
            self.say(f"mask tokens have overtaken visible ones: the guide starts after epoch {epoch}")
        accelerator.log({key: value for key, value in record.items() if key not in ("epoch", "phase")}, step=epoch)
        progress.records.append(record | guide.history[-1])
        self.say(
            f"epoch {epoch}/{args.epochs}  {self.phase:10}  loss {record['loss']:.4f}  lr {record['lr']:.2e}  "
            f"{record['images_per_second']:.0f} images/s"
        )
        progress.epoch, progress.seen, progress.seconds = epoch + 1, 0, 0.0
        progress.total.zero_()
        self.clock = time.perf_counter()
        if self.due():
            self.save()
        self.publish()
        if self.listen(stop=epoch < args.epochs):
            self.save()

    def due(self) -> bool:
        """Whether weights and pictures are due, the epoch being through."""
        epoch = self.progress.epoch - 1
        due = epoch % self.args.save_every == 0 or epoch in (self.guide.start, self.args.epochs)
        return due or self.save_after(self.progress.step)

    def publish(self):
        """Write what a run leaves, the epoch being through: metrics, and what is due. Once more after resuming."""
        self.published = self.write(self.write_metrics)
        if self.due():
            self.published &= self.write(self.write_results)

    # ---------------------------------------------------------------------------------------------- looking out

    def say(self, text: str):
        if self.accelerator.is_main_process:
            self.bar.write(text)

    def listen(self, stop: bool = True) -> bool:
        """Whether a checkpoint is overdue, for all processes; they also tell one another of broken pictures.

        Raises Interrupted, in all processes, if one of them was told to stop, unless this is no moment to ``stop``.
        """
        overdue = self.accelerator.is_main_process and time.monotonic() > self.written + LONGEST
        news = self.batches.bad.unreported
        number, news, overdue = self.peers.largest(self.signals.caught(), news, overdue)
        if news:
            stop_if_too_many_are_bad(self.batches)
            for description in self.batches.bad.take_unreported():
                self.say(f"skipped a broken image: {description}")
        if number and stop:
            raise Interrupted(number)
        return bool(overdue)

    def check_losses(self):
        """Raise Diverged, in all processes, if a loss since the last call was not finite."""
        values = torch.stack([loss for _, loss, _ in self.losses]).tolist() if self.losses else []
        wrong = next((i for i, value in enumerate(values) if not math.isfinite(value)), None)
        if self.peers.largest(wrong is not None)[0]:
            rank, found = self.accelerator.process_index, []
            if wrong is not None:
                step, _, images = self.losses[wrong]
                found = [(step, rank, values[wrong], [int(i) for i in images])]
            step, rank, value, images = min(gather_object(found))
            with together(Diverged):
                raise Diverged(
                    f"the loss is {value} in epoch {self.progress.epoch}, step {step} of the run, {self.phase} masks, "
                    f"images {', '.join(map(str, images))} of the data; the checkpoints are from before it: --resume "
                    "auto goes on from there, with a lower --blr perhaps, or --clip-grad 1"
                )
        if values:
            text = f"{self.phase}, loss {values[-1]:.4f}, lr {self.optimizer.param_groups[0]['lr']:.2e}"
            speed = self.progress.seen / (time.perf_counter() - self.clock)
            self.bar.set_postfix_str(f"{text}, {speed:.0f} images/s", refresh=False)
        self.losses.clear()

    # ---------------------------------------------------------------------------------------------- saving

    def write(self, how: Callable) -> bool:
        """Write something, in the main process; a full disk is no reason to lose what has been learned."""
        if not self.accelerator.is_main_process:
            return True
        try:
            if self.replaces:  # until there is something to put in its place
                for name in RUN_FILES:
                    (self.args.out / name).unlink(missing_ok=True)
                checkpoint.remove_all(self.args.out)
            self.claim()
            self.replaces = False
            how()
        except OSError as error:
            for part in self.args.out.glob("*.part"):
                if part.is_file():
                    part.unlink()
            self.say(f"WARNING: {data.one_line(error)}; training goes on, the last checkpoint stays")
            return False
        return True

    def write_metrics(self):
        text = "".join(json.dumps(record) + "\n" for record in self.progress.records)
        (self.args.out / "metrics.jsonl.part").write_text(text)
        smae.flush(self.args.out / "metrics.jsonl.part")
        os.replace(self.args.out / "metrics.jsonl.part", self.args.out / "metrics.jsonl")

    def write_results(self):
        smae.save(self.model, self.args.out, self.config)
        with self.accelerator.autocast():
            draw(self.args, self.progress.epoch - 1, self.guide, self.samples, self.objects)

    def save(self):
        """Write a checkpoint of this very moment, unless there is one. Raises Diverged where it would be of no use."""
        progress, accelerator = self.progress, self.accelerator
        if self.saved == progress.step:
            return
        self.check_losses()
        finite = checkpoint.all_finite(self.model, self.optimizer)
        with together(Diverged):
            if self.peers.largest(not finite)[0]:
                raise Diverged(
                    f"weights or moments of the optimizer are no longer finite in epoch {progress.epoch}, step "
                    f"{progress.step} of the run ({self.phase} masks): go on from a checkpoint before it"
                )
        progress.seconds = time.perf_counter() - self.clock
        mine = dict(random=checkpoint.random_states(), total=progress.total.item())
        state = dict(
            config=self.config,
            progress={name: value for name, value in vars(progress).items() if name != "total"},
            processes=gather_object([mine]),
            optimizer=self.optimizer.state_dict(),
            scaler=accelerator.scaler.state_dict() if accelerator.scaler else None,
            guide=self.guide.state_dict(),
            bad=self.batches.bad.state_dict(),
        )
        if not (self.save_after(progress.step) if progress.seen else self.due()):
            self.passing.add(progress.step)
        attached = [file for file in [self.args.out / MAPS] if self.guide.crc is not None and file.exists()]
        keep = self.args.keep, self.passing, attached
        done = self.write(lambda: checkpoint.write(self.args.out, progress.step, self.model, state, *keep))
        if not self.peers.largest(not done)[0]:
            self.saved = progress.step
        self.written = time.monotonic()

    def restore(self, state: dict, folder: Path):
        """Go on from a checkpoint: all but the weights, which the model has already."""
        progress, accelerator, rank = self.progress, self.accelerator, self.accelerator.process_index
        for name, value in state["progress"].items():
            setattr(progress, name, value)
        totals = [process["total"] for process in state["processes"]]
        if len(totals) != accelerator.num_processes:
            totals = [sum(totals)] + [0.0] * (accelerator.num_processes - 1)
        progress.total.fill_(totals[rank])
        decays = [group["weight_decay"] for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, decay in zip(self.optimizer.param_groups, decays):
            group["weight_decay"] = decay
        if accelerator.scaler and state["scaler"]:
            accelerator.scaler.load_state_dict(state["scaler"])
        self.guide.load_state_dict(state["guide"])
        self.batches.bad.load_state_dict(state["bad"])
        if rank < len(state["processes"]):
            checkpoint.set_random_states(state["processes"][rank]["random"])
        if folder.parent == self.args.out.resolve():
            self.saved, self.replaces = progress.step, False
        else:
            progress.name = uuid.uuid4().hex
        if accelerator.is_main_process and (folder / MAPS).exists():
            with contextlib.suppress(OSError):  # then it is lost
                self.claim()
                checkpoint.link(folder / MAPS, self.args.out / MAPS)
        accelerator.wait_for_everyone()
        found = self.guide.load_maps(state["guide"], self.args.out / MAPS) or self.args.guide != "cached"
        if self.peers.largest(not found)[0]:
            self.say(
                f"the relevance of whole pictures ({MAPS}) is lost or of another kind: they will be looked at again"
            )
        self.bar.update(self.place())
        if progress.records and not progress.seen:  # it may have been killed in between the two
            self.publish()


def main():
    args = parse_arguments()
    with checkpoint.Lock(args.out) as lock:
        pretrain(args, lock)


def pretrain(args: argparse.Namespace, lock: checkpoint.Lock):
    with cli.one_line_errors(ValueError, OSError):
        complete(args)
        accelerator = cli.make_accelerator(
            mixed_precision=args.precision,
            gradient_accumulation_steps=args.accumulate,
            log_with=args.log_with,
            project_dir=args.out,
        )
        if args.log_with and not accelerator.log_with:
            raise ValueError(f"--log-with {args.log_with}: that tracker is not installed")
        folder = find_checkpoint(args, accelerator, lock)
    with all_or_none():
        state = checkpoint.read(folder) if folder else None
        set_seed(args.seed)
        model = build_model(args, state and state["config"]["model"])
        if not accelerator.is_main_process:
            datasets.disable_progress_bars()
        dataset = data.load_images(
            args.dataset, args.split, args.image_column, args.label_column, args.streaming, args.max_images
        )
        guide = build_guide(args, model, dataset, accelerator.device)
        batches = train_batches(args, accelerator, dataset)
        samples, objects = data.sample_pictures(dataset, 32, args.image_size, mask_column(args.guide_from) or "mask")
        optimizer = optim.adamw(model, args.lr, args.weight_decay, accelerator.device.type)
        config = dict(
            model=model.config,
            train=cli.plain(args),
            data=dict(images=batches.length, pictures=data.fingerprint(dataset)),
        )
        changes = compare(state, config, accelerator.num_processes) if state else []

    if accelerator.device.type == "cpu":  # the flash kernel pays for long sequences: 64 patches are faster without
        torch.backends.cuda.enable_flash_sdp(model.patch_count > 128)  # of CPUs, too, in spite of its name
    if args.compile:
        model.forward = torch.compile(model.forward, fullgraph=True, dynamic=False)
    if state:
        model.load_state_dict(state["model"])
    run = Run(args, accelerator, model, optimizer, guide, batches, samples, objects, config, lock)
    if state:
        run.restore(state, folder)
    progress = run.progress
    accelerator.init_trackers(
        "smae",
        config={key: str(value) for key, value in config["train"].items()},
        init_kwargs=dict(  # trackers go on, too: what came after the checkpoint, will come again
            tensorboard=dict(purge_step=progress.epoch) if state else {},
            wandb=dict(id=progress.name, resume="allow"),
        ),
    )
    announce(args, accelerator, model, batches)
    if state:
        accelerator.print(f"going on from {folder}: epoch {progress.epoch}, {progress.seen} images of it done")
        for change in changes:
            accelerator.print(f"changed: {change}")
    del state

    stopped_by = 0
    errors = (data.TooManyBadImages, data.NothingToRead, checkpoint.Locked, Diverged, Mishap)
    with cli.one_line_errors(*errors, ranks="any"), mishaps(accelerator.num_processes), run.signals:
        try:
            while progress.epoch <= args.epochs:
                run.train_epoch()
                run.end_epoch()
        except Interrupted as interrupted:
            stopped_by = interrupted.args[0]
        finally:
            batches.close()
        run.save()
    run.bar.close()
    accelerator.end_training()

    if run.saved != progress.step or not run.published:
        with cli.one_line_errors(OSError):
            raise OSError("the last checkpoint, or the results, could not be written, see above")
        sys.exit(1)
    if stopped_by:
        accelerator.print(
            f"stopped by {signal.Signals(stopped_by).name}: epoch {progress.epoch}, after step {progress.step} of the "
            "run, with a checkpoint: the same command with --resume auto goes on"
        )
        sys.exit(128 + stopped_by)
    if accelerator.is_main_process:
        (args.out / MAPS).unlink(missing_ok=True)
    if guide.start is None:
        accelerator.print("the guide never started: mask tokens never overtook visible ones (see loss.png)")
    accelerator.print(
        f"wrote {', '.join(RUN_FILES)} to {args.out}; next: look at {args.out / 'masks.png'}, use the encoder with "
        f'smae.load("{args.out}"), or train on your own pictures with --dataset FOLDER --out runs/mine'
    )


if __name__ == "__main__":
    main()
