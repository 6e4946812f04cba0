"""What the commands share: options, each defined once; one-line errors; the accelerator.

``args``, the parsed command line, belongs to the command that parsed it. Everything below takes plain, named values.
"""

import argparse
import contextlib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs

import data
import smae
from batches import Share

# ------------------------------------------------------------------------------------------------- options


def epochs_or_auto(text: str) -> int | str:
    """An option's value: a number of epochs, or auto."""
    if text == "auto":
        return text
    if text.lstrip("-").isdigit():
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is neither a number of epochs nor auto")


def block(text: str) -> int | str:
    """An option's value: the number of an encoder block, or decoder-1, decoder-2, ..."""
    if not re.fullmatch(r"(decoder-)?\d+", text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a number (of an encoder block) nor decoder-1, decoder-2, ..."
        )
    return int(text) if text.isdigit() else text


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


FLAG = dict(action="store_true")
OPTIONS = {  # those of more than one command
    # data
    "dataset": dict(
        default="shapes",
        help="shapes or shapes:easy (the demo data), a folder of images, a parquet file or folder, a save_to_disk "
        f"folder, a hub name, or {', '.join(data.DATASETS)}",
    ),
    "split": dict(default="train", help="split of the data"),
    "image-column": dict(help="column of the images (default: found by its type)"),
    "label-column": dict(help="column of the labels (default: found by its type)"),
    "streaming": FLAG | dict(help="read while training, without a download before"),
    "max-images": dict(type=int, help="use only the first images; of a stream: the images that make an epoch"),
    "preload": dict(
        nargs="?",
        const="device",
        choices=["host", "device"],
        help="decode once into the memory of the device (or host) and crop whole batches there",
    ),
    "workers": dict(type=int, default=min(8, cores()), help="decoders of each process"),
    "max-bad-images": dict(type=float, default=0.01, help="share of broken images that stops the run"),
    "crop-scale": dict(type=float, nargs=2, help="smallest and largest crop, as fractions of the image area"),
    # model
    "checkpoint": dict(help="run folder, facebookresearch/mae .pth, transformers folder, or timm .safetensors"),
    "model": dict(choices=list(smae.PRESETS), default="tiny", help="size of the encoder"),
    "image-size": dict(type=int, help="side of the crops, in pixels (default: the checkpoint's, or 64)"),
    "patch-size": dict(type=int, help="side of a patch, in pixels (default: the model's own, else 8)"),
    **{
        name: dict(type=int, help="overrides that of --model")
        for name in ("width", "depth", "heads", "decoder-width", "decoder-depth", "decoder-heads")
    },
    # masks
    "mask-ratio": dict(type=float, default=0.75, help="share of the patches that is masked"),
    "guide-debias": FLAG | dict(help="subtract from the features their mean at each patch position"),
    "foreground": dict(
        choices=["border", "small", "peak"], default="border", help="which side of the cut is the object"
    ),
    "relevance": dict(
        choices=["foreground", "contrast"],
        default="contrast",
        help="mean similarity to the object's side, as in the paper, or that minus the similarity to the other side",
    ),
    # optimisation
    "epochs": dict(type=int, help="passes over the training data"),
    "warmup-epochs": dict(type=int, help="epochs of linear warm-up, part of --epochs"),
    "batch-size": dict(type=int, help="images per step, over all processes together"),
    "accumulate": dict(type=int, default=1, help="micro-batches that a process makes of its share of a step"),
    "blr": dict(type=float, help="base learning rate, per 256 images of a batch"),
    "lr": dict(type=float, help="learning rate (default: blr * batch size / 256)"),
    "weight-decay": dict(type=float, help="on weight matrices only"),
    "precision": dict(choices=["auto", "no", "bf16", "fp16"], default="auto", help="auto: bf16 where it is fast"),
    "compile": FLAG | dict(help="compile the model (slow start, faster steps)"),
    "seed": dict(type=int, default=0, help="of everything random"),
    # run
    "resume": dict(
        nargs="?",
        const="auto",
        help="continue from this checkpoint, or from the newest of this run folder; without a value, or auto: from the "
        "newest in --out, if there is one",
    ),
    "save-every-steps": dict(
        type=int, help="steps between more checkpoints (one is written every 15 minutes in any case)"
    ),
    "keep": dict(type=int, default=2, help="number of checkpoints to keep, the newest"),
    "out": dict(type=Path, help="folder of the result"),
    "overwrite": FLAG | dict(help="replace the result that is there"),
}
DATA = "dataset split image-column label-column streaming max-images preload workers max-bad-images".split()
MODEL = "model image-size patch-size width depth heads decoder-width decoder-depth decoder-heads".split()


def add(parser, *names: str, **defaults):
    """Add the shared options ``names`` to a parser or group, some of them with other ``defaults``."""
    for name in names:
        how, default = dict(OPTIONS[name]), name.replace("-", "_")
        if default in defaults:
            how["default"] = defaults[default]
        parser.add_argument(f"--{name}", **how)


def add_data_options(parser: argparse.ArgumentParser):
    """The options that name the data, and how it is read."""
    add(parser.add_argument_group("data"), *DATA)


def add_model_options(parser: argparse.ArgumentParser):
    """The options that name an architecture; returns their group."""
    group = parser.add_argument_group("model")
    add(group, *MODEL)
    return group


def model_sizes(options: dict) -> dict:
    """The arguments of SMAE among the ``options`` of a command line, without those that were not given."""
    names = [name.replace("-", "_") for name in MODEL if name not in ("model", "image-size")]
    return {name: options[name] for name in names if options[name] is not None}


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, but not that a flag is off or that an option is not given."""

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


def plain(options: dict) -> dict:
    """The ``options`` of a command line as values that JSON can hold."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}


def batch_options(args: argparse.Namespace, accelerator: Accelerator) -> dict:
    """What the data and training options say to ``batches.TrainBatches``."""
    return dict(
        size=args.image_size,
        batch_size=args.batch_size,
        scale=tuple(args.crop_scale),
        accumulate=args.accumulate,
        seed=args.seed,
        workers=args.workers,
        preload=args.preload,
        device=accelerator.device,
        share=Share(accelerator.process_index, accelerator.num_processes),
        length=args.max_images,
        max_bad=args.max_bad_images,
    )


def eval_batch_options(args: argparse.Namespace, accelerator: Accelerator) -> dict:
    """What the data options say to ``batches.EvalBatches``."""
    world = accelerator.num_processes
    return dict(
        size=args.image_size,
        batch_size=max(1, min(256, args.batch_size // world)),
        crop_ratio=args.crop_ratio,
        workers=args.workers,
        device=accelerator.device,
        share=Share(accelerator.process_index, world),
        max_bad=args.max_bad_images,
    )


# ------------------------------------------------------------------------------------------------- checks


def check_training(epochs: int, warmup_epochs: int, batch_size: int, accumulate: int, crop_scale: Sequence[float]):
    """Raise ValueError where options that every training has make no sense."""
    for name, value in dict(epochs=epochs, batch_size=batch_size, accumulate=accumulate).items():
        if value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if not 0 < crop_scale[0] <= crop_scale[1] <= 1:
        raise ValueError(f"--crop-scale takes two fractions of the area, 0 < low <= high <= 1, got {crop_scale}")
    if not 0 <= warmup_epochs <= epochs:
        raise ValueError(f"--warmup-epochs must lie between 0 and --epochs, got {warmup_epochs}")


def check_folder(out: Path, overwrite: bool, files: tuple[str, ...]):
    """Raise ValueError if ``out`` holds one of these ``files`` that is not to be overwritten, or is no folder."""
    found = [name for name in files if (out / name).exists()]
    if found and not overwrite:
        raise ValueError(f"{out} holds another run ({', '.join(found)}); choose another --out or add --overwrite")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is not a folder")


@contextlib.contextmanager
def one_line_errors(*kinds: type[Exception], ranks: str = "first") -> Iterator[None]:
    """End the program with one line on standard error for errors of these ``kinds``, which the user can mend.

    ``ranks``: "first", only the first process prints it; "any", the process that met it does.
    """
    try:
        yield
    except kinds as error:
        if ranks == "any" or os.environ.get("RANK", "0") == "0":
            print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)


@contextlib.contextmanager
def reported_once(*kinds: type[Exception]) -> Iterator[None]:
    """Let only the first process raise errors of these ``kinds``, which all processes meet at once; end the others."""
    try:
        yield
    except kinds:
        if os.environ.get("RANK", "0") == "0":
            raise
        sys.exit(1)


def seconds_between_updates() -> float:
    """The interval of progress bars: short on a terminal, long in a log file."""
    return 1 if sys.stderr.isatty() else 30


# ------------------------------------------------------------------------------------------------- the machine


def best_precision() -> str:
    """bf16 where the hardware computes in it, float32 elsewhere."""
    if torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "false").lower() != "true":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    cpuinfo = Path("/proc/cpuinfo")
    return "bf16" if cpuinfo.exists() and "bf16" in cpuinfo.read_text() else "no"


def make_accelerator(**options) -> Accelerator:
    """An Accelerator set up for CPUs, too."""
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # without it, torchrun's processes on a CPU ignore one another
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],  # positions never change
        **options,
    )
    if accelerator.device.type == "cpu":  # accelerate launch leaves a CPU process a single thread
        torch.set_num_threads(max(torch.get_num_threads(), cores() // accelerator.num_processes))
    return accelerator
