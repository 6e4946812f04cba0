"""Pre-train a masked autoencoder: first with random masks, then with masks guided by what it has learned itself.

    accelerate launch train.py                                    # the demo: a tiny model on drawn shapes
    accelerate launch train.py --dataset PATH_OR_HUB_NAME ...     # your own pictures
    accelerate launch train.py --preset paper                     # the paper's ImageNet recipe (8 GPUs)

Leaves in --out: config.json, model.safetensors, metrics.jsonl (one object per epoch), masks.png and loss.png.
"""

import argparse
import contextlib
import json
import math
import os
import re
import sys
import time
from pathlib import Path

import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list, gather_object, set_seed
from torch import Tensor
from tqdm import tqdm

import data
import masks
import pictures
import smae
from guide import Guide

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
)
RUN_FILES = ("config.json", "model.safetensors", "metrics.jsonl", "masks.png", "loss.png")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Pre-train a self-guided masked autoencoder.", formatter_class=data.HelpFormatter
    )
    parser.add_argument("--preset", choices=["demo", "paper"], default="demo", help="where the defaults come from")
    data.add_data_options(parser)

    group = add_model_options(parser)
    group.add_argument("--raw-pixels", action="store_true", help="reconstruct pixels as they are, not normalised")
    group.add_argument("--init-from", help="start from this run folder or checkpoint, whose sizes it has")
    group.add_argument("--fresh-decoder", action="store_true", help="take the encoder only of --init-from")

    group = parser.add_argument_group("masks")
    group.add_argument(
        "--mask", choices=["random", "selfguided", "amt"], default="selfguided", help="masks after --guide-start"
    )
    group.add_argument("--mask-ratio", type=float, default=0.75, help="share of the patches that is masked")
    group.add_argument("--hint", choices=["none", "random", "similar"], default="random", help="choice of hint patches")
    group.add_argument("--hint-ratio", type=float, default=0.05, help="hints as a share of the masked patches")
    group.add_argument("--amt-ratio", type=float, default=0.45, help="in place of --mask-ratio where AMT masks")
    group.add_argument("--throw-ratio", type=float, default=0.4, help="share of the patches that AMT throws away")

    group = parser.add_argument_group("guide")
    group.add_argument(
        "--guide",
        choices=["online", "cached"],
        help="look at every crop, or now and then at every whole picture (default: cached for amt, else online)",
    )
    group.add_argument(
        "--guide-start",
        type=epochs_or_auto,
        help="epochs of random masks before, or auto: until mask tokens serve the decoder more than visible ones "
        "(default: an eighth of --epochs; a tenth for amt)",
    )
    group.add_argument("--guide-every", type=int, help="epochs between looks of --guide cached (default: a tenth)")
    group.add_argument(
        "--guide-layer",
        type=block,
        help="block whose output guides: a number, or decoder-1, ... (default: the encoder's last but one)",
    )
    group.add_argument("--guide-debias", action="store_true", help="take off what features owe to their position")
    group.add_argument("--foreground", choices=["border", "peak"], default="border", help="which side is the object")
    group.add_argument(
        "--relevance",
        choices=["foreground", "contrast"],
        default="contrast",
        help="likeness to the object side, as in the paper, or that less the likeness to the other side",
    )

    group = parser.add_argument_group("optimisation")
    group.add_argument("--epochs", type=int, default=5, help="passes over the data")
    group.add_argument("--warmup-epochs", type=int, default=1, help="epochs of linear warm-up, part of --epochs")
    group.add_argument("--batch-size", type=int, default=128, help="images per step, over all processes together")
    group.add_argument("--accumulate", type=int, default=1, help="micro-batches that a process makes of its share")
    group.add_argument("--blr", type=float, default=1e-3, help="base learning rate, per 256 images of a batch")
    group.add_argument("--lr", type=float, help="learning rate (default: blr * batch size / 256)")
    group.add_argument("--weight-decay", type=float, default=0.05, help="on weight matrices only")
    group.add_argument("--clip-grad", type=float, help="largest gradient norm (default: no clipping)")
    group.add_argument("--crop-scale", type=float, nargs=2, default=(0.2, 1.0), help="range of a crop's share of area")
    group.add_argument("--precision", choices=["auto", "no", "bf16", "fp16"], default="auto", help="auto: bf16 if fast")
    group.add_argument("--compile", action="store_true", help="compile the model (slow start, faster steps)")
    group.add_argument("--seed", type=int, default=0, help="of weights, crops, order and masks")

    group = parser.add_argument_group("run")
    group.add_argument("--out", type=Path, default=Path("runs/pretrain"), help="folder of the run")
    group.add_argument("--overwrite", action="store_true", help="replace the run that is there")
    group.add_argument("--save-every", type=int, help="epochs between weights and pictures (default: a tenth)")
    group.add_argument("--log-with", help="tracker of Accelerate: tensorboard, wandb, ... (default: none)")

    return parser


def epochs_or_auto(text: str) -> int | str:
    if text == "auto" or text.lstrip("-").isdigit():
        return text if text == "auto" else int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is neither a number of epochs nor auto")


def block(text: str) -> int | str:
    if re.fullmatch(r"(decoder-)?\d+", text):
        return int(text) if text.isdigit() else text
    raise argparse.ArgumentTypeError(
        f"{text!r} is neither a number (of an encoder block) nor decoder-1, decoder-2, ..."
    )


def add_model_options(parser: argparse.ArgumentParser):
    """The options that name an architecture, the same in every script; returns their group."""
    group = parser.add_argument_group("model")
    group.add_argument("--model", choices=list(smae.PRESETS), default="tiny", help="size of the encoder")
    group.add_argument("--image-size", type=int, help="side of the crops, in pixels (default: the checkpoint's, or 64)")
    group.add_argument("--patch-size", type=int, help="side of a patch, in pixels (default: the model's own, else 8)")
    for name in ("width", "depth", "heads", "decoder-width", "decoder-depth", "decoder-heads"):
        group.add_argument(f"--{name}", type=int, help="overrides that of --model")
    return group


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = build_parser()
    if parser.parse_known_args(arguments)[0].preset == "paper":
        parser.set_defaults(**PAPER)
    return parser.parse_args(arguments)


# ------------------------------------------------------------------------------------------------- set-up


def best_precision() -> str:
    """bf16 where the hardware computes in it, float32 elsewhere."""
    if torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "false").lower() != "true":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    cpuinfo = Path("/proc/cpuinfo")
    return "bf16" if cpuinfo.exists() and "bf16" in cpuinfo.read_text() else "no"


def make_accelerator(**options) -> Accelerator:
    """An Accelerator that knows the peculiarities of CPUs."""
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # without it, torchrun's processes on a CPU ignore one another
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],  # positions never change
        **options,
    )
    if accelerator.device.type == "cpu":  # accelerate launch leaves a CPU process a single thread
        torch.set_num_threads(max(torch.get_num_threads(), data.cores() // accelerator.num_processes))
    return accelerator


def check_training(args: argparse.Namespace):
    """Raise ValueError where arguments that every training has make no sense."""
    for name in ("epochs", "batch_size", "accumulate"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if not 0 < args.crop_scale[0] <= args.crop_scale[1] <= 1:
        raise ValueError(f"--crop-scale takes two shares of the area, 0 < low <= high <= 1, got {args.crop_scale}")
    if not 0 <= args.warmup_epochs <= args.epochs:
        raise ValueError(f"--warmup-epochs must lie between 0 and --epochs, got {args.warmup_epochs}")


def complete(args: argparse.Namespace):
    """Fill in the defaults that depend on other arguments; raise ValueError where arguments make no sense."""
    check_training(args)
    if args.guide_start is None:
        args.guide_start = max(1, args.epochs // (10 if args.mask == "amt" else 8))
    if args.guide_start != "auto" and args.guide_start < 0:
        raise ValueError(f"--guide-start must not be negative, got {args.guide_start}")
    if args.guide is None:
        args.guide = "cached" if args.mask == "amt" and not args.streaming else "online"
    if args.guide == "cached" and args.streaming and args.mask != "random":
        raise ValueError("a stream has no index to keep maps by: with --streaming the guide must be --guide online")
    if args.guide_every is None:
        args.guide_every = max(1, args.epochs // 10)
    if args.guide_every < 1:
        raise ValueError(f"--guide-every must be at least 1, got {args.guide_every}")
    if args.lr is None:
        args.lr = args.blr * args.batch_size / 256
    if args.save_every is None:
        args.save_every = math.ceil(args.epochs / 10)
    if args.save_every < 1:
        raise ValueError(f"--save-every must be at least 1, got {args.save_every}")
    if args.precision == "auto":
        args.precision = best_precision()


def sizes(args: argparse.Namespace) -> dict:
    """The constructor's arguments that the model options give by themselves, those not given left out."""
    given = {name: getattr(args, name) for name in (*smae.PRESETS["base"], "patch_size")}
    return {name: value for name, value in given.items() if value is not None}


def build_model(args: argparse.Namespace) -> smae.SMAE:
    """The model that the arguments describe."""
    if args.init_from:
        source = smae.load(args.init_from, heads=args.heads)
        source = source.encoder if isinstance(source, smae.Classifier) else source
        fresh = args.fresh_decoder or not source.config["decoder_depth"]
        config = source.config | (decoder_sizes(source) | dict(normalize_pixels=True) if fresh else {})
        args.image_size = args.image_size or config["image_size"][0]
    else:
        config = smae.PRESETS[args.model] | dict(normalize_pixels=True)
        config.setdefault("patch_size", 8)
        args.image_size = args.image_size or 64
    config |= sizes(args) | dict(image_size=args.image_size)
    model = smae.SMAE(**config | (dict(normalize_pixels=False) if args.raw_pixels else {}))
    if args.init_from:
        smae.initialise(model, source, decoder=not fresh)
    args.patch_size = model.patch_size
    return model


def build_guide(args: argparse.Namespace, model: smae.SMAE) -> Guide:
    """What guides the masks after the first phase, as the arguments have it."""
    made = Guide(
        model,
        "amt" if args.mask == "amt" else "selfguided",
        ratio=args.mask_ratio,
        hint=args.hint,
        hint_ratio=args.hint_ratio,
        layer=args.guide_layer,
        foreground=args.foreground,
        scoring=args.relevance,
        debias=args.guide_debias,
        amt_ratio=args.amt_ratio,
        throw_ratio=args.throw_ratio,
        compile=args.compile,
        start=args.epochs if args.mask == "random" else None if args.guide_start == "auto" else args.guide_start,
    )
    args.guide_layer = made.layer
    return made


def decoder_sizes(encoder: smae.SMAE) -> dict:
    """A new decoder for an encoder that has none: that of the preset of the same width, else that of the paper."""
    width = encoder.config["width"]
    preset = next((sizes for sizes in smae.PRESETS.values() if sizes["width"] == width), smae.PRESETS["base"])
    return {name: preset[name] for name in preset if name.startswith("decoder_")}


def build_optimizer(model: smae.SMAE, device: str, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW as in MAE; biases, norms, positions and, unlike there, CLS and mask token are not decayed."""
    groups = [
        dict(params=[p for name, p in model.named_parameters() if decays(name, p)], weight_decay=weight_decay),
        dict(params=[p for name, p in model.named_parameters() if not decays(name, p)], weight_decay=0.0),
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=device in ("cuda", "cpu"))


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: to weight matrices."""
    return parameter.ndim > 1 and not name.endswith("positions")


def learning_rate(step: int, steps: int, warmup: int, peak: float, least: float = 0.0) -> float:
    """Linear warm-up over ``warmup`` steps, then half a cosine to ``least`` at ``steps``; steps count from 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return least + (peak - least) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def check_folder(out: Path, overwrite: bool, files: tuple[str, ...] = RUN_FILES):
    """Raise ValueError if ``out`` holds a result already that is not to be overwritten, or is no folder."""
    found = [name for name in files if (out / name).exists()]
    if found and not overwrite:
        raise ValueError(f"{out} holds another run ({', '.join(found)}); choose another --out or add --overwrite")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is not a folder")


@contextlib.contextmanager
def one_line_errors(*kinds: type[Exception], ranks: str = "first"):
    """End the program with one line on standard error where the user can mend what is wrong."""
    try:
        yield
    except kinds as error:
        if ranks == "any" or os.environ.get("RANK", "0") == "0":
            print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)


# ------------------------------------------------------------------------------------------------- training


class Diverged(ArithmeticError):
    """The loss is no longer a finite number."""


def train_batches(args: argparse.Namespace, accelerator: Accelerator, dataset, **options) -> data.TrainBatches:
    """This process's batches of the data set, as the arguments have them."""
    return data.TrainBatches(
        dataset,
        args.image_size,
        args.batch_size,
        scale=tuple(args.crop_scale),
        accumulate=args.accumulate,
        seed=args.seed,
        workers=args.workers,
        preload=args.preload,
        device=accelerator.device,
        share=data.Share(accelerator.process_index, accelerator.num_processes),
        length=args.max_images,
        max_bad=args.max_bad_images,
        **options,
    )


def choose_mask(
    args: argparse.Namespace, phase: str, batch: data.Batch, images: Tensor, guide: Guide, noise: Tensor
) -> masks.Mask:
    """The mask of a batch whose normalised crops are ``images``: random, or guided by what they show."""
    if phase == "random":
        return masks.random_mask(*noise.shape, args.mask_ratio, noise=noise)
    relevance = guide.recall(batch) if args.guide == "cached" else guide.look(images, learn=True)[0]
    return guide.mask(relevance, noise)


def stop_if_too_many_are_bad(batches: data.TrainBatches):
    """Add up the bad pictures of all processes; if they are too many, all stop together."""
    everywhere = gather_object(list(batches.bad.items()))
    with one_line_errors(data.TooManyBadImages):
        batches.check_bad(everywhere)


def announce(args: argparse.Namespace, accelerator: Accelerator, model: smae.SMAE, batches: data.TrainBatches):
    """Say what is about to be trained, on what, and how."""
    when = "when mask tokens overtake visible ones" if args.guide_start == "auto" else f"epoch {args.guide_start + 1}"
    world, parameters = accelerator.num_processes, sum(p.numel() for p in model.parameters())
    accelerator.print(
        f"{args.dataset}: {batches.length} images; {args.init_from or args.model}: {parameters / 1e6:.1f} M "
        f"parameters, {model.patch_count} patches\n"
        f"{world} process(es) on {accelerator.device.type}, precision {args.precision}; "
        f"effective batch {args.batch_size} = {world} processes x {args.accumulate} micro-batches "
        f"x {args.batch_size // world // args.accumulate}; learning rate {args.lr:g}\n"
        f"{args.epochs} epochs of {batches.steps_per_epoch} steps, {args.mask} masks"
        + (f" ({args.guide} guide), start: {when}" if args.mask != "random" else "")
    )
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    if on_cpu and "MASTER_ADDR" in os.environ and world == 1:  # several were asked for
        accelerator.print("on a CPU, accelerate launch starts one process only; for more: torchrun --nproc_per_node N")


def draw(args: argparse.Namespace, epoch: int, guide: Guide, samples: Tensor, objects: Tensor | None):
    """Refresh masks.png, of eight of the samples, and loss.png."""
    few = torch.linspace(0, len(samples) - 1, min(8, len(samples))).long()
    objects = objects if objects is None else objects[few]
    pictures.mask_sheet(guide, samples[few], objects, f"epoch {epoch}: ").savefig(args.out / "masks.png")
    pictures.loss_curve(args.out / "metrics.jsonl").savefig(args.out / "loss.png")


def main():
    args = parse_arguments()

    with one_line_errors(ValueError, OSError):
        complete(args)
        check_folder(args.out, args.overwrite)
        accelerator = make_accelerator(
            mixed_precision=args.precision,
            gradient_accumulation_steps=args.accumulate,
            log_with=args.log_with,
            project_dir=args.out,
        )
        if args.log_with and not accelerator.log_with:
            raise ValueError(f"--log-with {args.log_with}: that tracker is not installed")
        set_seed(args.seed)
        model = build_model(args)
        guide = build_guide(args, model)
        if not accelerator.is_main_process:
            datasets.disable_progress_bars()
        dataset = data.load_images(
            args.dataset, args.split, args.image_column, args.label_column, args.streaming, args.max_images
        )
        batches = train_batches(args, accelerator, dataset)
        samples, objects = data.sample_pictures(dataset, 32, args.image_size)
        optimizer = build_optimizer(model, accelerator.device.type, args.lr, args.weight_decay)

    if args.compile:
        model.forward = torch.compile(model.forward, fullgraph=True, dynamic=False)
    trained, optimizer = accelerator.prepare(model, optimizer)  # ``model`` stays the bare one, on the device
    accelerator.register_for_checkpointing(guide)

    steps = args.epochs * batches.steps_per_epoch
    warmup = args.warmup_epochs * batches.steps_per_epoch
    config = dict(train={name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()})
    accelerator.init_trackers("smae", config={key: str(value) for key, value in config["train"].items()})
    announce(args, accelerator, model, batches)

    patience = 1 if sys.stderr.isatty() else 30  # seconds between updates of the bar
    bar = tqdm(total=steps, disable=not accelerator.is_main_process, unit="step", mininterval=patience)
    trained.train()
    step = 0
    for epoch in range(1, args.epochs + 1):
        guided = guide.start is not None and epoch > guide.start
        phase = args.mask if guided else "random"
        total, start = torch.zeros((), device=accelerator.device), time.perf_counter()
        with one_line_errors(data.TooManyBadImages, Diverged, ranks="any"):
            if guided and args.guide == "cached" and (epoch - guide.start - 1) % args.guide_every == 0:
                if accelerator.is_main_process:
                    bar.write(f"looking at {batches.length} whole pictures, for the masks of the next epochs")
                guide.remember(batches, accelerator)
            for batch in batches.epoch(epoch):
                images = data.normalize(batch.images, model.config["mean"], model.config["std"])
                noise = data.uniform((args.seed, epoch, data.MASKS), batch.indices, model.patch_count)
                with accelerator.autocast():
                    mask = choose_mask(args, phase, batch, images, guide, data.to_device(noise, images.device))
                lr = learning_rate(step, steps, warmup, args.lr)
                for group in optimizer.param_groups:
                    group["lr"] = lr

                with accelerator.accumulate(trained):
                    loss = trained(images, mask)
                    accelerator.backward(loss)
                    if args.clip_grad and accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(trained.parameters(), args.clip_grad)
                    optimizer.step()
                    optimizer.zero_grad()
                total += loss.detach()
                if accelerator.sync_gradients:
                    guide.end_step(accelerator)
                    step += 1
                    bar.update()
                    if step % 10 == 0:  # these wait for the device and the other processes: not at every step
                        stop_if_too_many_are_bad(batches)
                        speed = (step % batches.steps_per_epoch or batches.steps_per_epoch) * args.batch_size
                        speed /= time.perf_counter() - start
                        text = f"{phase}, loss {loss.item():.4f}, lr {lr:.2e}, {speed:.0f} images/s"
                        bar.set_postfix_str(text, refresh=False)

            mean = accelerator.reduce(total, "mean").item() / (batches.steps_per_epoch * args.accumulate)
            seconds = time.perf_counter() - start
            stop_if_too_many_are_bad(batches)
            if not math.isfinite(mean):
                raise Diverged(
                    f"the loss is {mean} in epoch {epoch} ({phase} masks): try a lower --blr or --clip-grad 1"
                )
        record = dict(
            epoch=epoch,
            phase=phase,
            loss=mean,
            lr=lr,
            images_per_second=batches.steps_per_epoch * args.batch_size / seconds,
            seconds=seconds,
            bad_images=len(batches.bad),
        )
        with accelerator.autocast():
            images = data.normalize(samples.to(accelerator.device), model.config["mean"], model.config["std"])
            guide.measure(images)
        learned_before = bool(args.init_from) and not args.fresh_decoder
        if guide.start is None and broadcast_object_list([guide.ready(learned_before)])[0]:  # in all processes
            guide.start = epoch
            accelerator.print(f"mask tokens have overtaken visible ones: the guide starts after epoch {epoch}")
        accelerator.log({key: value for key, value in record.items() if key not in ("epoch", "phase")}, step=epoch)
        if accelerator.is_main_process:
            if epoch == 1:  # whatever a run before left stays until there is something to put in its place
                args.out.mkdir(parents=True, exist_ok=True)
                for name in RUN_FILES:
                    (args.out / name).unlink(missing_ok=True)
            with open(args.out / "metrics.jsonl", "a") as file:
                file.write(json.dumps(record | guide.history[-1]) + "\n")
            bar.write(
                f"epoch {epoch}/{args.epochs}  {phase:10}  loss {mean:.4f}  lr {lr:.2e}  "
                f"{record['images_per_second']:.0f} images/s"
            )
            if epoch % args.save_every == 0 or epoch in (guide.start, args.epochs):
                smae.save(model, args.out, config)
                with accelerator.autocast():
                    draw(args, epoch, guide, samples, objects)
    bar.close()
    accelerator.end_training()
    if guide.start is None:
        accelerator.print("the guide never started: mask tokens never overtook visible ones (see loss.png)")

    for description in batches.bad.values():
        accelerator.print(f"skipped a broken image: {description}")
    accelerator.print(
        f"wrote {', '.join(RUN_FILES)} to {args.out}; next: look at {args.out / 'masks.png'}, use the encoder with "
        f'smae.load("{args.out}"), or train on your own pictures with --dataset FOLDER --out runs/mine'
    )


if __name__ == "__main__":
    main()
