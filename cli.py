"""What the commands share: options, each defined once; one-line errors; the accelerator.

``args``, the parsed command line, ends in the command that parsed it. Everything below takes plain,
named values.
"""

import argparse
import contextlib
import os
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin, parse_flag_from_env
from tqdm import tqdm

import data
import pixels
import smae
from batches import Share

# ------------------------------------------------------------------------------------------------- options


def epochs_or_auto(text: str) -> int | str:
    """Parse the value of an option: a number of epochs, or auto."""
    if text == "auto":
        return text
    if text.lstrip("-").isdigit():
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is neither a number of epochs nor auto")


def block(text: str) -> int | str:
    """Parse the value of an option: the number of an encoder block, or decoder-1, decoder-2, ..."""
    if not re.fullmatch(r"(decoder-)?\d+", text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a number (of an encoder block) nor decoder-1, decoder-2, ..."
        )
    return int(text) if text.isdigit() else text


class Sides(argparse.Action):
    """Takes one side of an image, or height and width: an int, or a list of two."""

    def __call__(self, parser, namespace, values, option_string=None):
        if len(values) > 2:
            parser.error(f"{option_string} takes one side, or height and width, got {len(values)} numbers")
        if min(values) < 1:
            parser.error(f"{option_string} must be at least 1, got {min(values)}")
        setattr(namespace, self.dest, pixels.compact(values[0] if len(values) == 1 else values))


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class BaseLearningRate(argparse.Action):
    """Takes --blr, and drops a --lr before it: of the two, the later counts."""

    def __call__(self, parser, namespace, value, option_string=None):
        namespace.blr, namespace.lr = value, None


FLAG = dict(action="store_true")
OPTIONS = {  # that several commands have
    # data
    "dataset": dict(
        default="shapes",
        help="shapes or shapes:easy (the demo data), a folder of pictures, parquet, csv or jsonl files, a WebDataset, "
        f"a save_to_disk folder, a hub name, or {', '.join(data.DATASETS)}",
    ),
    "split": dict(default="train", help="split of the data"),
    "image-column": dict(help="column of the images (default: found by its type)"),
    "label-column": dict(help="column of the labels (default: label, or one of type ClassLabel)"),
    "streaming": FLAG | dict(help="read the data as a stream, without downloading it first"),
    "max-images": dict(
        type=int,
        help="use only so many images (to train on, where there are others to test on); of a stream: images per epoch",
    ),
    "pixel-range": dict(
        nargs="+",
        metavar="VALUE",
        help="LOW HIGH: the values of black and white in pictures of more than 8 bits; auto: measured on a sample "
        "(default: 0, and 1, 255 or 65535 by their type and values)",
    ),
    "preload": dict(
        nargs="?",
        const="device",
        choices=["host", "device"],
        help="when training: decode once into the memory of the device (or host) and crop whole batches there",
    ),
    "workers": dict(type=int, default=min(8, cores()), help="data workers of each process"),
    "max-bad-images": dict(type=float, default=0.01, help="largest accepted fraction of broken images"),
    "crop-scale": dict(type=float, nargs=2, help="smallest and largest crop, as fractions of the image area"),
    # model
    "checkpoint": dict(
        help="run folder; checkpoint of facebookresearch/mae, transformers or timm; the name of one on the hub; random "
        "(untrained) or pixels, where the command can use them"
    ),
    "model": dict(choices=list(smae.PRESETS), default="tiny", help="size of the encoder"),
    "image-size": dict(
        type=int,
        nargs="+",
        action=Sides,
        metavar="SIDE",
        help="side of the crops, or height and width, in pixels (default: the checkpoint's, or 64)",
    ),
    "patch-size": dict(type=int, help="side of a patch, in pixels (default: the model's own, else 8)"),
    "channels": dict(
        type=int,
        help="channels of the images: 1 (grey), 3 (RGB), or as many as the files or arrays have (default: the "
        "checkpoint's, else 3)",
    ),
    **{
        name: dict(type=int, help="overrides that of --model")
        for name in ("width", "depth", "heads", "decoder-width", "decoder-depth", "decoder-heads")
    },
    # masks
    "mask-ratio": dict(type=float, default=0.75, help="fraction of the patches that is masked"),
    "guide-debias": FLAG | dict(help="subtract from the features their mean at each patch position"),
    "foreground": dict(
        choices=["border", "small", "peak"], default="border", help="which side of the cut is the object"
    ),
    "relevance": dict(
        choices=["foreground", "contrast"],
        default="contrast",
        help="foreground: mean similarity to the object's side (the paper's); contrast: minus that to the other side",
    ),
    "object-ids": dict(
        type=int, nargs="+", help="values of the object in a mask column (default: understood from the masks)"
    ),
    "object-void": dict(type=int, help="value in a mask column that is not the object, though it is not 0"),
    # optimisation
    "epochs": dict(type=int, help="passes over the training data"),
    "warmup-epochs": dict(type=int, help="epochs of linear warm-up, part of --epochs"),
    "batch-size": dict(type=int, help="images per step, over all processes together"),
    "accumulate": dict(type=int, default=1, help="micro-batches per step in each process (gradient accumulation)"),
    "blr": dict(type=float, action=BaseLearningRate, help="base learning rate, for a batch of 256 images"),
    "lr": dict(
        type=float,
        help="learning rate (default: blr * batch size / 256; eval.py linear --recipe fast: the best of ten)",
    ),
    "weight-decay": dict(type=float, help="weight decay, on weight matrices only"),
    "clip-grad": dict(type=float, help="largest gradient norm (default: no clipping)"),
    "layer-decay": dict(type=float, help="ratio of the learning rate of each block to that of the next"),
    "drop-path": dict(type=float, help="stochastic depth of the last block"),
    "precision": dict(
        choices=["auto", "no", "bf16", "fp16"],
        default="auto",
        help="no: float32; auto: accelerate's own setting, else bf16 where the hardware has it, else fp16 on a GPU",
    ),
    "compile": FLAG | dict(help="compile the model (slow start, faster steps)"),
    "seed": dict(type=int, default=0, help="random seed"),
    # run
    "resume": dict(
        nargs="?",
        const="auto",
        help="continue from this checkpoint, or from the newest of this run folder; without a value, or auto: from the "
        "newest in --out, if there is one",
    ),
    "save-every-steps": dict(
        type=int, help="write another checkpoint every so many steps (one is written every 15 minutes in any case)"
    ),
    "keep": dict(type=int, default=2, help="number of checkpoints to keep, the newest"),
    "log-with": dict(help="tracker of Accelerate: tensorboard, wandb, ... (default: none)"),
    "out": dict(type=Path, help="folder for the results"),
    "overwrite": FLAG | dict(help="replace earlier results there"),
}
DATA = "dataset split image-column label-column streaming max-images pixel-range preload workers max-bad-images".split()
MODEL = "model image-size patch-size channels width depth heads decoder-width decoder-depth decoder-heads".split()


def add(parser, *names: str, **defaults):
    """Add the shared options ``names`` to a parser or group, some of them with other ``defaults``."""
    for name in names:
        how, default = dict(OPTIONS[name]), name.replace("-", "_")
        if default in defaults:
            how["default"] = defaults[default]
        parser.add_argument(f"--{name}", **how)


def add_data_options(parser: argparse.ArgumentParser):
    """Add the options of the data."""
    add(parser.add_argument_group("data"), *DATA)


def add_model_options(parser: argparse.ArgumentParser):
    """Add the options of an architecture and return their group."""
    group = parser.add_argument_group("model")
    add(group, *MODEL)
    return group


def model_sizes(options: dict) -> dict:
    """The arguments of SMAE among the ``options`` of a command line, without those that were not given."""
    names = [name.replace("-", "_") for name in MODEL if name != "model"]
    return {name: options[name] for name in names if options[name] is not None}


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the default of an option, unless it is None, False or empty."""

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.default is None or action.default is False or action.default in ("", []):
            return action.help
        return super()._get_help_string(action)


def plain(options: dict) -> dict:
    """The ``options`` of a command line as values that JSON can hold."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}


def batch_options(args: argparse.Namespace, accelerator: Accelerator) -> dict:
    """The arguments of ``batches.TrainBatches`` that follow from data and training options."""
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
    """The arguments of ``batches.EvalBatches`` that follow from data and model options."""
    world = accelerator.num_processes
    return dict(
        size=args.image_size,
        batch_size=max(1, min(256, args.batch_size // world)),
        workers=args.workers,
        device=accelerator.device,
        share=Share(accelerator.process_index, world),
        max_bad=args.max_bad_images,
    )


# ------------------------------------------------------------------------------------------------- checks


def check_positive(options: dict, *names: str):
    """Raise ValueError if one of these ``options`` of a command line is given and below 1."""
    for name in names:
        if options[name] is not None and options[name] < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {options[name]}")


def check_training(options: dict):
    """Raise ValueError if an option that every training has makes no sense."""
    check_positive(options, "epochs", "batch_size", "accumulate", "save_every_steps", "keep")
    low, high = scale = options.get("crop_scale", (1, 1))  # dense.py scales whole pictures
    if not 0 < low <= high <= 1:
        raise ValueError(f"--crop-scale takes two fractions of the area, 0 < low <= high <= 1, got {scale}")
    check_rates(options)
    clip_grad = options.get("clip_grad")
    if clip_grad is not None and not clip_grad > 0:  # torch would turn the gradient round
        raise ValueError(f"--clip-grad must be positive, got {clip_grad:g}; to clip nothing, leave it out")
    if not 0 <= options["warmup_epochs"] <= options["epochs"]:
        raise ValueError(f"--warmup-epochs must lie between 0 and --epochs, got {options['warmup_epochs']}")


def check_rates(options: dict):
    """Raise ValueError if a rate of a training is given and makes no sense."""
    given = {name: value for name, value in options.items() if value is not None}
    for name in ("lr", "blr", "weight_decay", "mixup", "cutmix"):
        if given.get(name, 0) < 0:
            raise ValueError(f"--{name.replace('_', '-')} must not be negative, got {given[name]:g}")
    for name in ("smoothing", "erasing"):
        if not 0 <= given.get(name, 0) <= 1:
            raise ValueError(f"--{name} must lie between 0 and 1, got {given[name]:g}")
    if not 0 <= given.get("drop_path", 0) < 1:
        raise ValueError(f"--drop-path must lie in [0, 1), got {given['drop_path']:g}")
    if not 0 < given.get("layer_decay", 1) <= 1:
        raise ValueError(f"--layer-decay must lie in (0, 1], got {given['layer_decay']:g}")


def check_out(out: Path, checkpoint: str):
    """Raise ValueError if a training to ``out`` would remove the ``checkpoint``, or others of the same run."""
    path = Path(checkpoint).resolve()
    if path.exists() and out.resolve() in (path, path.parent):
        raise ValueError(f"--out {out} holds the checkpoint itself, which would be lost: choose another --out")


def check_folder(out: Path, overwrite: bool, files: tuple[str, ...]):
    """Raise ValueError if ``out`` cannot be written to, or holds one of ``files`` without ``overwrite``."""
    found = [name for name in files if (out / name).exists()]
    if found and not overwrite:
        raise ValueError(f"{out} holds another run ({', '.join(found)}); choose another --out or add --overwrite")
    place = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not place.is_dir():
        raise ValueError(f"{place} is not a folder")
    if not os.access(place, os.W_OK):
        raise ValueError(f"--out {out}: {place} cannot be written to")


_from_python = False  # whether the command is a function call, whose errors are exceptions


class Parser(argparse.ArgumentParser):
    """Raises ValueError for wrong options if the command is called from Python."""

    def error(self, message: str):
        if _from_python:
            raise ValueError(message)
        super().error(message)


@contextlib.contextmanager
def called(arguments: list | None) -> Iterator[list[str] | None]:
    """Run a command with ``arguments`` from Python, or with those of the command line if None.

    From Python, its errors are exceptions; from the command line, they are a line and an exit code.
    """
    global _from_python
    before, _from_python = _from_python, arguments is not None
    try:
        yield None if arguments is None else [str(argument) for argument in arguments]
    finally:
        _from_python = before


def leave(code: int, reason: BaseException):
    """End the command: raise ``reason`` if it was called from Python, else exit with ``code``."""
    if _from_python:
        raise reason
    sys.exit(code)


@contextlib.contextmanager
def one_line_errors(*kinds: type[Exception], ranks: str = "first") -> Iterator[None]:
    """End the program with one line on standard error for errors of these ``kinds``, which the user can fix.

    ``ranks``: who prints it, only the "first" process, or "any" that raised it.
    """
    try:
        yield
    except kinds as error:
        if _from_python:
            raise
        if ranks == "any" or os.environ.get("RANK", "0") == "0":
            print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)


@contextlib.contextmanager
def reported_once(*kinds: type[Exception]) -> Iterator[None]:
    """Let only the first process raise errors of these ``kinds``, which all raise at once; end the others."""
    try:
        yield
    except kinds:
        if _from_python or os.environ.get("RANK", "0") == "0":
            raise
        sys.exit(1)


def progress_bar(total: int | None, unit: str, **options) -> tqdm:
    """A progress bar, renewed often on a terminal and seldom in a log file."""
    return tqdm(total=total, unit=unit, mininterval=1 if sys.stderr.isatty() else 30, **options)


# ------------------------------------------------------------------------------------------------- the machine


UNSUPPORTED = {  # what accelerate's environment can ask for, and how it is called
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism configuration",
}


def best_precision() -> str:
    """bf16 where the hardware computes in it; else fp16 on a GPU, float32 on a CPU."""
    if torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU"):
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    cpuinfo = Path("/proc/cpuinfo")
    return "bf16" if cpuinfo.exists() and "bf16" in cpuinfo.read_text() else "no"


def choose_precision(option: str) -> str:
    """The precision that --precision names; auto takes accelerate's fp16 or bf16, else the best one."""
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if option != "auto":
        return option
    return launcher if launcher in ("fp16", "bf16") else best_precision()


def check_launcher():
    """Raise ValueError if accelerate's configuration asks for something that is not supported."""
    for variable, name in UNSUPPORTED.items():
        if os.environ.get(variable, "false").lower() in ("1", "true"):
            raise ValueError(f"{name} is not supported: run accelerate config for plain data parallelism ({variable})")
    if os.environ.get("ACCELERATE_MIXED_PRECISION", "").lower() == "fp8":
        raise ValueError("precision fp8 is not supported: take bf16, fp16 or no (ACCELERATE_MIXED_PRECISION)")
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if backend != "no":
        raise ValueError(
            f"accelerate's dynamo backend {backend} is not supported: set it to no and use --compile instead"
        )


def make_accelerator(precision: str, accumulate: int = 1, **options) -> Accelerator:
    """Create an Accelerator that also works on CPUs.

    ``precision`` and ``accumulate`` overrule accelerate's environment; the log says where they
    differ. Only the first process shows progress bars. Raises ValueError if the options or accelerate's
    configuration ask for something unsupported.
    """
    check_launcher()
    # Accelerate has no other name for it yet.
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    try:
        accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),  # without it, torchrun's processes on a CPU ignore one another
            mixed_precision=precision,
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=accumulate),  # ignores the environment
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],  # positions never change
            **options,
        )
    except ValueError as error:
        if "already been initialized" not in str(error):
            raise
        raise ValueError(f"--precision {precision}: this Python process has used another one; restart it") from None
    if precision == "fp16" and accelerator.device.type == "cpu":  # accelerate would compute in float32, silently
        raise ValueError("--precision fp16 needs a GPU: on a CPU take bf16, or no for float32")
    if accelerator.device.type == "cpu":  # accelerate launch leaves a CPU process a single thread
        torch.set_num_threads(max(torch.get_num_threads(), cores() // accelerator.num_processes))
    for option, value, variable in (
        ("precision", precision, "ACCELERATE_MIXED_PRECISION"),
        ("accumulate", str(accumulate), "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"),
    ):
        told = os.environ.get(variable, value).lower()
        if told not in (value, "no"):  # no: what accelerate launch says if nobody asked it
            accelerator.print(f"--{option} is {value}; accelerate's setting {told} ({variable}) is ignored")
    if options.get("log_with") and not accelerator.log_with:
        raise ValueError(f"--log-with {options['log_with']}: that tracker is not installed")
    if not accelerator.is_main_process:
        datasets.disable_progress_bars()
    return accelerator
