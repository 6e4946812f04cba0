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
import math
import os
from pathlib import Path

import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object, set_seed
from torch import Tensor

import checkpoint
import cli
import data
import encoders
import masks
import optim
import pictures
import smae
from batches import TrainBatches
from guide import Guide, Source
from run import (
    Folder,
    ProcessLost,
    Run,
    Schedule,
    all_processes_or_none,
    compare_configurations,
    find_checkpoint,
)

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
MAPS = "relevance.npy"  # of whole pictures, as long as --guide cached needs it
FREE = {"out", "overwrite", "resume", "save_every", "save_every_steps", "keep", "log_with", "max_bad_images"}
FREE |= {"preset", "init_from", "fresh_decoder", "model", *smae.PRESETS["base"], "image_size", "patch_size"}
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
        "--save-every", type=int, help="epochs between checkpoints with weights and pictures (default: a tenth)"
    )
    cli.add(group, "resume", "save-every-steps", "keep")
    group.add_argument("--log-with", help="tracker of Accelerate: tensorboard, wandb, ... (default: none)")

    return parser


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = build_parser()
    if parser.parse_known_args(arguments)[0].preset == "paper":
        parser.set_defaults(**PAPER)
    return parser.parse_args(arguments)


# ------------------------------------------------------------------------------------------------- set-up


def fill_defaults(args: argparse.Namespace):
    """Fill in the defaults that depend on other arguments; raise ValueError where arguments make no sense."""
    cli.check_training(args.epochs, args.warmup_epochs, args.batch_size, args.accumulate, args.crop_scale)
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
    config |= cli.model_sizes(vars(args)) | dict(image_size=args.image_size)
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
        cached=args.guide == "cached",
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


def main():
    args = parse_arguments()
    with checkpoint.Lock(args.out) as lock:
        pretrain(args, lock)


def pretrain(args: argparse.Namespace, lock: checkpoint.Lock):
    """The recipe: model, data, guide, optimizer, loop."""
    with cli.one_line_errors(ValueError, OSError):
        fill_defaults(args)
        accelerator = make_accelerator(args)
        saving = dict(save_every=args.save_every, save_every_steps=args.save_every_steps, keep=args.keep)
        folder = Folder(args.out, lock, RUN_FILES, **saving)
        resumed_from = find_checkpoint(accelerator, folder, args.resume, args.overwrite)
    with all_processes_or_none():
        state = checkpoint.read(resumed_from) if resumed_from else None
        set_seed(args.seed)
        model = build_model(args, state and state["config"]["model"])
        dataset = load_dataset(args, accelerator)
        guide = build_guide(args, model, dataset, accelerator.device)
        batches = TrainBatches(dataset, **cli.batch_options(args, accelerator))
        samples, objects = data.sample_pictures(dataset, 32, args.image_size, mask_column(args.guide_from) or "mask")
        optimizer = optim.adamw(model, args.lr, args.weight_decay, accelerator.device.type)
        seen = dict(images=batches.length, pictures=data.fingerprint(dataset))
        config = dict(model=model.config, train=cli.plain(vars(args)), data=seen)
        free = FREE | (set() if args.streaming else {"workers"})
        if state:
            world = accelerator.num_processes
            changes = compare_configurations(state, config, "train", world, fixed={"seed"}, ignored=free)
    prepare_kernels(model, accelerator.device, args.compile)

    if state:
        model.load_state_dict(state["model"])

    def write_results(epoch: int):
        smae.save(model, args.out, config)
        with accelerator.autocast():
            draw(args.out, epoch, guide, samples, objects)

    run = Run(
        accelerator,
        model,
        optimizer,
        batches,
        Schedule(args.epochs, args.warmup_epochs, args.lr, clip_grad=args.clip_grad),
        folder,
        config=config,
        parts=dict(guide=guide),
        write_results=write_results,
        attached=lambda: [file for file in [args.out / MAPS] if guide.crc is not None and file.exists()],
    )
    if state:
        run.restore(state, resumed_from)
        restore_relevance(run, guide, state["guide"], resumed_from)
    start_trackers(run, config["train"], resumed=bool(state))
    announce(args, accelerator, model, batches)
    if state:
        done = f"epoch {run.progress.epoch}, {run.progress.seen} images of it done"
        accelerator.print(f"going on from {resumed_from}: {done}")
        for change in changes:
            accelerator.print(f"changed: {change}")
    del state

    trained_before = bool(args.init_from) and not args.fresh_decoder
    with run.guarded():
        folder.milestones.add(guide.start)
        for epoch in run.epochs():
            run.phase = kind_of_masks(args) if guide.guides(epoch) else "random"
            if guide.guides(epoch) and guide.cached:
                refresh_relevance(run, guide, epoch)
            for batch in run.batches_of(epoch):
                images = data.normalize(batch.images, *model.statistics)
                mask = guide.mask_batch(images, batch, epoch, accelerator)
                run.step(run.trained(images, mask), batch)
            measure_exploitation(run, guide, samples, trained_before)
            run.end_epoch(**guide.history[-1])
    run.finish()

    if accelerator.is_main_process:
        (args.out / MAPS).unlink(missing_ok=True)
    if guide.start is None:
        accelerator.print("the guide never started: mask tokens never overtook visible ones (see loss.png)")
    accelerator.print(
        f"wrote {', '.join(RUN_FILES)} to {args.out}; next: look at {args.out / 'masks.png'}, use the encoder with "
        f'smae.load("{args.out}"), or train on your own pictures with --dataset FOLDER --out runs/mine'
    )


def make_accelerator(args: argparse.Namespace) -> Accelerator:
    accelerator = cli.make_accelerator(
        mixed_precision=args.precision,
        gradient_accumulation_steps=args.accumulate,
        log_with=args.log_with,
        project_dir=args.out,
    )
    if args.log_with and not accelerator.log_with:
        raise ValueError(f"--log-with {args.log_with}: that tracker is not installed")
    return accelerator


def load_dataset(args: argparse.Namespace, accelerator: Accelerator):
    if not accelerator.is_main_process:
        datasets.disable_progress_bars()
    options = args.image_column, args.label_column, args.streaming, args.max_images
    return data.load_images(args.dataset, args.split, *options)


def prepare_kernels(model: smae.SMAE, device: torch.device, compile: bool):
    """Choose the attention kernel that is faster for the number of patches, and compile the model if asked to."""
    if device.type == "cpu":  # the flash kernel pays for long sequences: 64 patches are faster without
        torch.backends.cuda.enable_flash_sdp(model.patch_count > 128)  # of CPUs, too, in spite of its name
    if compile:
        model.forward = torch.compile(model.forward, fullgraph=True, dynamic=False)


def start_trackers(run: Run, options: dict, resumed: bool):
    """Start the trackers of Accelerate. They go on, too: what came after the checkpoint will come again."""
    run.accelerator.init_trackers(
        "smae",
        config={key: str(value) for key, value in options.items()},
        init_kwargs=dict(
            tensorboard=dict(purge_step=run.progress.epoch) if resumed else {},
            wandb=dict(id=run.progress.name, resume="allow"),
        ),
    )


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


def draw(out: Path, epoch: int, guide: Guide, samples: Tensor, objects: Tensor | None):
    """Refresh masks.png, of eight of the samples, and loss.png."""
    few = torch.linspace(0, len(samples) - 1, min(8, len(samples))).long()
    objects = objects if objects is None else objects[few]
    sheet = pictures.mask_sheet(guide, samples[few], objects, epoch)
    for name, figure in (("masks.png", sheet), ("loss.png", pictures.loss_curve(out / "metrics.jsonl"))):
        with smae.whole_file(out / name) as part:
            figure.savefig(part, format="png")


# ------------------------------------------------------------------------------------------------- the guide


def refresh_relevance(run: Run, guide: Guide, epoch: int):
    """Compute the relevance of all whole pictures, if that is due. It may take long: with a checkpoint before."""
    due = not run.progress.seen and guide.is_due(epoch)
    if not run.peers.largest(due or guide.lacks_maps)[0]:
        return
    if run.progress.step:
        run.save()
    run.say(f"looking at {run.batches.length} whole pictures, for the masks of the next epochs")
    try:
        if run.accelerator.is_main_process:
            run.folder.claim()
        guide.remember(run.batches, run.accelerator, run.folder.path / MAPS, after_each=run.poll)
    except OSError as error:
        if guide.maps is None:
            raise ProcessLost(f"the relevance of the pictures cannot be kept: {data.one_line(error)}") from None
        run.say(f"WARNING: {data.one_line(error)}; training goes on with the relevance of an earlier epoch")
    missing = sorted(gather_object(list(getattr(guide.source, "missing", []))))
    if missing:
        run.say(f"{len(missing)} pictures have no mask that can be read, image {missing[0]} first: theirs are empty")


def restore_relevance(run: Run, guide: Guide, state: dict, folder: Path):
    """Go on with the relevance of whole pictures that the checkpoint in ``folder`` knew; say if it is lost."""
    if run.accelerator.is_main_process and (folder / MAPS).exists():
        with contextlib.suppress(OSError):  # then it is lost
            run.folder.claim()
            checkpoint.link(folder / MAPS, run.folder.path / MAPS)
    run.accelerator.wait_for_everyone()
    found = guide.load_maps(state, run.folder.path / MAPS) or not guide.cached
    if run.peers.largest(not found)[0]:
        run.say(f"the relevance of whole pictures ({MAPS}) is lost or of another kind: they will be looked at again")


def measure_exploitation(run: Run, guide: Guide, samples: Tensor, trained_before: bool):
    """Measure how far the decoder lives on mask tokens; with --guide-start auto, start the guide when they lead."""
    accelerator = run.accelerator
    with accelerator.autocast():
        guide.measure(data.normalize(samples.to(accelerator.device), *run.model.statistics))
    if guide.start is None and broadcast_object_list([guide.ready(trained_before)])[0]:  # in all processes
        guide.start = run.progress.epoch
        run.folder.milestones.add(guide.start)
        run.say(f"mask tokens have overtaken visible ones: the guide starts after epoch {guide.start}")


if __name__ == "__main__":
    main()
