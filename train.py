"""Pre-train a masked autoencoder: first with random masks, then with masks guided by its own patch clusters.

    accelerate launch train.py                                    # the demo: a tiny model on drawn shapes
    accelerate launch train.py --dataset PATH_OR_HUB_NAME ...     # your own pictures
    accelerate launch train.py --preset paper                     # the paper's ImageNet recipe (8 GPUs)

    accelerate launch train.py ... --resume                       # continue where it stopped, or start

Leaves in --out: config.json, model.safetensors, metrics.jsonl (one object per epoch), masks.png,
loss.png, README.md (a model card) and the newest checkpoints. SIGTERM, SIGINT (Ctrl-C) and SIGUSR1
end it after the current step, with a checkpoint and exit code 128 + signal; a second one, at least a
second later, ends it at once.
"""

import argparse
import contextlib
import math
import os
import sys
from pathlib import Path

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
import pixels
import smae
from batches import EvalBatches, TrainBatches
from guide import Guide, check_source, find_source, mask_column
from labelled import load_labelled
from objects import BY_THRESHOLD, sample_pictures
from run import (
    Folder,
    ProcessLost,
    Run,
    Schedule,
    all_processes_or_none,
    compare_configurations,
    find_checkpoint,
    read_state,
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
NOT_REPEATED = {"config", "preset", "out", "overwrite", "resume"}
MAPS = "relevance.npy"  # of whole pictures, as long as --guide cached needs it
IGNORED = set(  # when resuming: what makes no difference, and what the model's configuration says
    "out overwrite resume save_every save_every_steps keep log_with max_bad_images config probe_every probe_dataset "
    "probe_images preset init_from fresh_decoder model image_size patch_size".split()
) | set(smae.PRESETS["base"])
RUN_FILES = ("config.json", "model.safetensors", "metrics.jsonl", "masks.png", "loss.png")


def build_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(description="Pre-train a self-guided masked autoencoder.", formatter_class=cli.HelpFormatter)
    parser.add_argument("--preset", choices=["demo", "paper"], default="demo", help="where the defaults come from")
    parser.add_argument(
        "--config",
        metavar="RUN",
        help="repeat this run, by folder or config.json: options that are given as well take precedence",
    )
    cli.add_data_options(parser)

    group = cli.add_model_options(parser)
    group.add_argument(
        "--raw-pixels", action="store_true", help="reconstruct pixels as they are, not normalised by patch"
    )
    group.add_argument("--init-from", help="start from weights and sizes of this run, checkpoint or name on the hub")
    group.add_argument("--fresh-decoder", action="store_true", help="take only the encoder of --init-from")

    group = parser.add_argument_group("masks")
    group.add_argument(
        "--mask", choices=["random", "selfguided", "amt"], default="selfguided", help="masks after --guide-start"
    )
    cli.add(group, "mask-ratio")
    group.add_argument("--hint", choices=["none", "random", "similar"], default="random", help="how hints are drawn")
    group.add_argument("--hint-ratio", type=float, default=0.05, help="hints, as a fraction of all patches; at least 2")
    group.add_argument(
        "--hint-portion",
        type=float,
        default=0.5,
        help="hints are drawn from the most relevant patches, this fraction of all",
    )
    group.add_argument(
        "--hint-end",
        type=float,
        default=1.0,
        help="factor on hint ratio and portion, in the last epoch",
    )
    group.add_argument("--amt-ratio", type=float, default=0.45, help="fraction of the patches that AMT masks")
    group.add_argument("--throw-ratio", type=float, default=0.4, help="fraction of the patches that AMT throws away")

    group = parser.add_argument_group("guide")
    group.add_argument(
        "--guide",
        choices=["online", "cached"],
        help="online: relevance of each crop, at every step; cached: of whole pictures, every --guide-every epochs "
        "(default: cached for amt and --guide-from, but online for streams; else online)",
    )
    group.add_argument(
        "--guide-from",
        metavar="WHAT",
        help="guide by something other than the model itself: a frozen model (run, checkpoint or hub name), "
        "column:NAME (masks in the data), or the floors pixels (raw patches) and centre (of the picture)",
    )
    group.add_argument(
        "--guide-image-size",
        type=int,
        help="side of what the model of --guide-from sees, in pixels (default: its own)",
    )
    group.add_argument(
        "--guide-shuffle",
        action="store_true",
        help="give each picture the relevance of another: masks of the same shapes without their content",
    )
    group.add_argument(
        "--guide-start",
        type=cli.epochs_or_auto,
        help="epochs of random masks before guiding starts, or auto: until the decoder exploits mask tokens more than "
        "visible ones (default: half of --epochs)",
    )
    group.add_argument(
        "--guide-every",
        type=int,
        help="epochs between two passes of --guide cached; 0: one pass, at the start, as with --guide-from (default: a "
        "tenth of --epochs)",
    )
    group.add_argument(
        "--guide-layer",
        type=cli.block,
        help="block whose output guides: a number, or decoder-1, ... (default: the encoder's last but one)",
    )
    cli.add(group, "guide-debias", "foreground", "relevance", "object-ids", "object-void")

    group = parser.add_argument_group("optimisation")
    cli.add(group, "epochs", "warmup-epochs", "batch-size", "accumulate", epochs=5, warmup_epochs=1, batch_size=128)
    cli.add(group, "blr", "lr", "weight-decay", blr=1e-3, weight_decay=0.05)
    cli.add(group, "clip-grad", "crop-scale", "precision", "compile", "seed", crop_scale=(0.2, 1.0))

    group = parser.add_argument_group("run")
    cli.add(group, "out", "overwrite", out=Path("runs/pretrain"))
    group.add_argument(
        "--save-every", type=int, help="epochs between checkpoints, weights and pictures (default: a tenth of --epochs)"
    )
    cli.add(group, "resume", "save-every-steps", "keep", "log-with")
    group.add_argument(
        "--probe-every",
        type=int,
        help="epochs between two measurements of kNN accuracy, on a fixed part of the data, which takes a forward pass "
        "over that (default: never)",
    )
    group.add_argument("--probe-dataset", help="labelled data for it (default: the training data and its test split)")
    group.add_argument(
        "--probe-images",
        type=int,
        nargs=2,
        default=(5000, 2000),
        help="how many training and test pictures",
    )
    return parser


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options, with the defaults of --preset, or those of --config before them."""
    parser = build_parser()
    arguments = sys.argv[1:] if arguments is None else arguments
    known, _ = parser.parse_known_args(arguments)
    if known.preset == "paper":
        parser.set_defaults(**PAPER)
    if known.config:
        if known.preset != "demo":
            parser.error("--config has the options of a whole run: leave out --preset")
        with cli.one_line_errors(ValueError, OSError):
            arguments = [*arguments_of_run(known.config, parser), *arguments]
    return parser.parse_args(arguments)


def arguments_of_run(run: str, parser: argparse.ArgumentParser) -> list[str]:
    """The options that a run was started with, as a command line; except where it wrote. Raises ValueError."""
    file = Path(run) / "config.json" if Path(run).is_dir() else Path(run)
    if not file.is_file():
        raise ValueError(f"--config {run}: there is no such run folder or config.json")
    options = smae.read_json(file).get("options")
    if not isinstance(options, dict):
        raise ValueError(f"--config {run}: {file} holds no options, as runs of train.py write them since 2026-11-25")
    known, found = vars(parser.parse_args([])), []
    if unknown := sorted(options.keys() - known.keys()):
        data.say_once(f"--config {run}: left out {', '.join(unknown)}, which are no options of train.py")
    for name, value in options.items():
        if name in known and name not in NOT_REPEATED and value is not None and value is not False:  # 0 is a value
            values = [] if value is True else value if isinstance(value, list) else [value]
            found += [f"--{name.replace('_', '-')}", *map(str, values)]
    return found


def describe_repeat(run: str, options: dict) -> str:
    """Which ``options`` differ from those of a run, in a line."""
    parser = build_parser()
    then = cli.plain(vars(parser.parse_args(arguments_of_run(run, parser))))
    changed = [name for name in then if name not in NOT_REPEATED and options[name] != then[name]]
    words = [f"--{name.replace('_', '-')} {options[name]} (there {then[name]})" for name in changed]
    return f"repeating {run}, " + (f"but with {', '.join(words)}" if words else "with the same options")


# ------------------------------------------------------------------------------ set-up


def fill_defaults(args: argparse.Namespace):
    """Fill in the defaults that depend on other options; raise ValueError where options make no sense."""
    cli.check_training(vars(args))
    if args.guide_start is None:
        args.guide_start = max(1, args.epochs // 2)
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
    check_source(
        args.guide_from,
        args.mask,
        cached=args.guide == "cached",
        streaming=args.streaming,
        shuffle=args.guide_shuffle,
        source_size=args.guide_image_size,
    )
    if args.guide_from:
        cli.check_out(args.out, args.guide_from)
    if args.lr is None:
        args.lr = args.blr * args.batch_size / 256
    if args.save_every is None:
        args.save_every = math.ceil(args.epochs / 10)
    if args.fresh_decoder and not args.init_from:
        raise ValueError("--fresh-decoder takes the encoder of --init-from: name one")
    if (args.object_ids or args.object_void is not None) and not mask_column(args.guide_from):
        raise ValueError("--object-ids and --object-void explain the masks of --guide-from column:NAME: add it")
    if args.probe_dataset and not args.probe_every:
        raise ValueError("--probe-dataset is for --probe-every: add it")
    if min(args.probe_images) < 1:
        raise ValueError(f"--probe-images takes two numbers of pictures, got {args.probe_images}")
    cli.check_positive(vars(args), "save_every", "probe_every", "channels")
    args.precision = cli.choose_precision(args.precision)


def build_model(args: argparse.Namespace, resumed: dict | None = None, dataset=None) -> smae.SMAE:
    """The model that the options describe. ``resumed``: the sizes in a checkpoint, in place of --init-from.

    The statistics of channels that are neither grey nor RGB are measured on ``dataset``.
    """
    source = None
    if args.init_from and resumed:
        config = dict(resumed)
        args.image_size = args.image_size or pixels.compact(config["image_size"])
    elif args.init_from:
        source = encoders.backbone(args.init_from, heads=args.heads, image_size=args.image_size)
        fresh = args.fresh_decoder = args.fresh_decoder or not source.config["decoder_depth"]
        config = source.config | (decoder_sizes(source) | dict(normalize_pixels=True) if fresh else {})
        args.image_size = args.image_size or pixels.compact(config["image_size"])
        config["norm_after_mean"] = False  # the decoder reads tokens after the norm
        if not config["learned_positions"]:  # stretched for other sizes, as they are when used
            config["position_size"] = config["position_size"] or config["image_size"]
    else:
        config = smae.PRESETS[args.model] | dict(normalize_pixels=True)
        config.setdefault("patch_size", 8)
        if resumed and resumed["channels"] == args.channels:
            config |= dict(mean=resumed["mean"], std=resumed["std"])
        elif args.channels not in (None, 1, 3) and dataset is not None:
            form = data.pixel_format(dataset, args.channels, args.pixel_range)
            config["mean"], config["std"] = data.measure_statistics(dataset, form)
        args.image_size = args.image_size or 64
    config |= cli.model_sizes(vars(args))
    model = smae.SMAE(**config | (dict(normalize_pixels=False) if args.raw_pixels else {}))
    if not model.config["decoder_depth"]:
        raise ValueError("--decoder-depth must be at least 1: the decoder reconstructs what is masked, got 0")
    if source:
        smae.initialise(model, source, decoder=not fresh)
    args.patch_size = model.patch_size
    return model


def decoder_sizes(encoder: smae.SMAE) -> dict:
    """The sizes of a new decoder: those of the preset of the encoder's width, else those of the paper."""
    width = encoder.config["width"]
    preset = next((sizes for sizes in smae.PRESETS.values() if sizes["width"] == width), smae.PRESETS["base"])
    return {name: preset[name] for name in preset if name.startswith("decoder_")}


def build_guide(args: argparse.Namespace, model: smae.SMAE, dataset=None, device="cpu") -> Guide:
    """What guides the masks after the first phase. --guide-from may name a column of ``dataset``."""
    hint, start = args.hint, args.guide_start
    if start == "auto":
        start = None
    if args.mask == "random":
        start = args.epochs
        try:  # hints only show in masks.png, where they fit
            for share in (1, args.hint_end):
                shares = share * args.hint_ratio, share * args.hint_portion
                masks.hint_count(model.patch_count, args.mask_ratio, hint, *shares)
        except ValueError:
            hint = "none"
    guide = Guide(
        model,
        "selfguided" if args.mask == "random" else args.mask,
        source=find_source(args.guide_from, dataset, device, args.object_ids, args.object_void),
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
        start=start,
        every=args.guide_every,
        epochs=args.epochs,
        seed=args.seed,
    )
    args.guide_layer = guide.layer
    return guide


# ------------------------------------------------------------------------------ training


def main(arguments: list | None = None) -> Path:
    """Train as the command line says, or as ``arguments`` say; return the folder of the run.

    Called from Python with a list, errors are exceptions: ValueError, OSError and those of run.py.
    """
    with cli.called(arguments) as arguments:
        args = parse_arguments(arguments)
        with checkpoint.Lock(args.out) as lock:
            pretrain(args, lock)
    return args.out


def pretrain(args: argparse.Namespace, lock: checkpoint.Lock):
    """The recipe: model, data, guide, optimizer, loop."""
    options = cli.plain(vars(args))  # as they were given
    with cli.one_line_errors(ValueError, OSError):
        fill_defaults(args)
        accelerator = cli.make_accelerator(
            args.precision, args.accumulate, log_with=args.log_with, project_dir=args.out
        )
        saving = dict(save_every=args.save_every, save_every_steps=args.save_every_steps, keep=args.keep)
        folder = Folder(args.out, lock, RUN_FILES, **saving)
        resumed_from = find_checkpoint(accelerator, folder, args.resume, args.overwrite)

    # What the options describe; an error in one process ends all of them.
    with all_processes_or_none():
        state = read_state(resumed_from, "train")
        if state:  # its model began from these, whatever is named now
            began = state["config"]["train"]
            args.init_from, args.fresh_decoder = began.get("init_from"), began.get("fresh_decoder", False)
            args.raw_pixels = args.raw_pixels or bool(args.init_from and began["raw_pixels"])
            if options["guide_start"] is None and began["mask"] != "random":  # longer, but guided from the same epoch
                args.guide_start = began["guide_start"]
        set_seed(args.seed)
        columns = args.image_column, args.label_column, args.streaming
        limit = None if args.streaming else args.max_images  # of a stream it is the length of an epoch
        dataset = data.load_images(args.dataset, args.split, *columns, limit)
        model = build_model(args, state and state["config"]["model"], dataset)
        form = data.pixel_format(dataset, model.config["channels"], args.pixel_range)
        guide = build_guide(args, model, dataset, accelerator.device)
        batches = TrainBatches(dataset, **cli.batch_options(args, accelerator), form=form)
        rule = getattr(guide.source, "rule", BY_THRESHOLD)
        mask_name = mask_column(args.guide_from) or "mask"
        samples, objects = sample_pictures(dataset, 32, args.image_size, mask_name, rule, form)
        watch = build_watch(args, model, accelerator) if args.probe_every else None
        optimizer = optim.adamw(model, args.lr, args.weight_decay, accelerator.device.type)
        seen = dict(images=batches.length, pictures=data.fingerprint(dataset), hub=data.hub_id(args.dataset))
        config = dict(model=model.config, train=cli.plain(vars(args)), options=options, data=seen)
        changes = []
        if state:
            ignored, world = IGNORED | (set() if args.streaming else {"workers"}), accelerator.num_processes
            changes = compare_configurations(state, config, "train", world, fixed={"seed"}, ignored=ignored)
            model.load_state_dict(state["model"])
    prepare_kernels(model, accelerator.device, args.compile)

    def write_results(epoch: int):
        smae.save(model, args.out, config)
        with accelerator.autocast():
            draw(args.out, epoch, guide, samples, objects)
        run.track_picture(args.out / "masks.png")

    # The run, where it was left.
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
    run.start_trackers(config["train"])
    if args.config:
        accelerator.print(describe_repeat(args.config, options))
    announce(args, accelerator, guide, batches)
    if state:
        accelerator.print(
            f"continuing from {resumed_from}: epoch {run.progress.epoch}, {run.progress.seen} images of it done"
        )
    for change in changes:
        accelerator.print(f"changed: {change}")
    del state

    trained_before = bool(args.init_from) and not args.fresh_decoder
    with run.guarded():
        folder.milestones.add(guide.start)
        for epoch in run.epochs():
            run.phase = guide.name if guide.guides(epoch) else "random"
            if guide.guides(epoch) and guide.cached:
                refresh_relevance(run, guide, epoch)
            for batch in run.batches_of(epoch):
                images = data.normalize(batch.images, *model.statistics)
                mask = guide.mask_batch(images, batch, epoch, accelerator)
                run.step(run.trained(images, mask), batch)
            measure_exploitation(run, guide, samples, trained_before)
            found = watch.measure() if watch and (epoch % args.probe_every == 0 or epoch == args.epochs) else {}
            note = f"kNN {found['knn']:.2f} % ({found['knn_seconds']:.0f} s)" if found else ""
            run.end_epoch(note, **guide.history[-1], **found)
    run.finish()

    if accelerator.is_main_process:
        (args.out / MAPS).unlink(missing_ok=True)
    if guide.start is None:
        accelerator.print("the guide never started: the decoder never exploited mask tokens more (see loss.png)")
    accelerator.print(
        f"wrote {', '.join(RUN_FILES)} to {args.out}; next: look at {args.out / 'masks.png'}, use the encoder with "
        f'smae.load("{args.out}"), or train on your own pictures with --dataset FOLDER --out runs/mine'
    )


def prepare_kernels(model: smae.SMAE, device: torch.device, compile: bool):
    """Choose the faster attention kernel for the number of patches, and compile the model if asked to."""
    if device.type == "cpu":  # the flash kernel pays for long sequences; 64 patches are faster without
        torch.backends.cuda.enable_flash_sdp(model.patch_count > 128)  # despite its name, for CPUs too
    if compile:
        torch.compiler.reset()  # the models of earlier runs in this process count against the limit of graphs
        model.forward = torch.compile(model.forward, fullgraph=True, dynamic=False)


def build_watch(args: argparse.Namespace, model: smae.SMAE, accelerator: Accelerator) -> encoders.Watch | None:
    """What --probe-every measures; None, with a word, if the training data has no labels or no test split."""
    source = args.probe_dataset or args.dataset
    most_training, most_tests = args.probe_images
    try:
        if args.streaming and not args.probe_dataset:
            raise ValueError("a stream is read once: name other pictures with --probe-dataset")
        columns = (None, None) if args.probe_dataset else (args.image_column, args.label_column)
        where = "train" if args.probe_dataset else args.split
        training, tests, classes = load_labelled(
            source, where, None, *columns, streaming=False, max_images=most_training, skip_unlabelled=True
        )
    except (ValueError, FileNotFoundError) as error:
        if args.probe_dataset:
            raise
        accelerator.print(f"--probe-every is left out: {data.one_line(error)}")
        return None
    tests = tests.select(data.evenly_spaced(len(tests), most_tests))
    form = data.pixel_format(training, model.config["channels"], args.pixel_range)
    options = cli.eval_batch_options(args, accelerator) | dict(keep=bool(args.preload), max_bad=1.0, form=form)
    accelerator.print(
        f"--probe-every {args.probe_every}: kNN on {len(training)} and {len(tests)} pictures of {source}, "
        "which takes a forward pass over them"
    )
    return encoders.Watch(
        model, *(EvalBatches(part, **options) for part in (training, tests)), accelerator, len(classes)
    )


def announce(args: argparse.Namespace, accelerator: Accelerator, guide: Guide, batches: TrainBatches):
    """Print what is about to be trained, on which data, and how."""
    auto = args.guide_start == "auto"
    when = "when mask tokens overtake visible ones" if auto else f"epoch {args.guide_start + 1}"
    world, parameters = accelerator.num_processes, sum(p.numel() for p in guide.model.parameters())
    kind = "random" if args.mask == "random" else guide.name
    lines = [
        f"{args.dataset}: {batches.length} images; {args.init_from or args.model}: {parameters / 1e6:.1f} M "
        f"parameters, {guide.model.patch_count} patches",
        f"{world} process(es) on {accelerator.device.type}, precision {args.precision}; effective batch "
        f"{args.batch_size} = {world} processes x {args.accumulate} micro-batches x "
        f"{args.batch_size // world // args.accumulate}; learning rate {args.lr:g}",
        f"{args.epochs} epochs of {batches.steps_per_epoch} steps, {kind} masks"
        + (f" ({args.guide} guide), start: {when}" if args.mask != "random" else ""),
    ]
    if args.mask != "random" and not auto and args.guide_start >= args.epochs:
        lines += [f"all masks are random: {args.epochs} epochs end before the guide starts (--guide-start)"]
    if args.guide_from:
        rule = getattr(guide.source, "rule", None)
        lines += [f"not self-guided: relevance comes from {args.guide_from}" + (f" ({rule.kind})" if rule else "")]
    if args.guide_shuffle:
        lines += ["shuffled: each picture is masked by the relevance of another"]
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    if on_cpu and "MASTER_ADDR" in os.environ and world == 1:  # several were asked for
        lines += ["on a CPU, accelerate launch starts one process only; for more: torchrun --nproc_per_node N"]
    accelerator.print("\n".join(lines))


def draw(out: Path, epoch: int, guide: Guide, samples: Tensor, objects: Tensor | None):
    """Refresh masks.png, of eight of the samples, and loss.png."""
    few = torch.from_numpy(data.evenly_spaced(len(samples), 8))
    objects = objects if objects is None else objects[few]
    pictures.save(pictures.mask_sheet(guide, samples[few], objects, epoch), out / "masks.png")
    pictures.save(pictures.loss_curve(out / "metrics.jsonl"), out / "loss.png")


# ------------------------------------------------------------------------------ the guide


def refresh_relevance(run: Run, guide: Guide, epoch: int):
    """Compute the relevance of all whole pictures, if due. It may take long: a checkpoint comes first."""
    due = not run.progress.seen and guide.is_due(epoch)
    if not run.peers.largest(due or guide.lacks_maps)[0]:
        return
    if run.progress.step:
        run.save()
    run.say(f"computing the relevance of {run.batches.length} whole pictures for the masks of the next epochs")
    try:
        run.claim_folder()
        guide.cache_relevance(run.batches, run.accelerator, run.folder.path / MAPS, after_each=run.poll)
    except OSError as error:
        if guide.maps is None:
            raise ProcessLost(f"the relevance of the pictures cannot be kept: {data.one_line(error)}") from None
        run.say(f"WARNING: {data.one_line(error)}; training continues with the relevance of an earlier epoch")
    missing = sorted(gather_object(list(getattr(guide.source, "missing", []))))
    if missing:
        run.say(f"{len(missing)} pictures have no readable mask, image {missing[0]} first: they count as empty")


def restore_relevance(run: Run, guide: Guide, state: dict, source: Path):
    """Continue with the relevance maps of the checkpoint ``source``; say if they are lost."""
    file = run.folder.path / MAPS
    if run.accelerator.is_main_process and (source / MAPS).exists():
        with contextlib.suppress(OSError):  # then they are lost
            run.folder.claim()
            checkpoint.link(source / MAPS, file)
    run.accelerator.wait_for_everyone()
    found = guide.load_maps(state, file) or not (guide.cached and guide.lacks_maps and guide.guides(guide.epochs))
    if run.peers.largest(not found)[0]:
        run.say(f"the relevance of whole pictures ({MAPS}) is lost or of another kind: it will be computed again")


def measure_exploitation(run: Run, guide: Guide, samples: Tensor, trained_before: bool):
    """Measure how much the decoder exploits mask tokens; with --guide-start auto, start the guide when they lead."""
    accelerator = run.accelerator
    with accelerator.autocast():
        guide.measure_exploitation(data.normalize(samples.to(accelerator.device), *run.model.statistics))
    if guide.start is None and broadcast_object_list([guide.mask_tokens_lead(trained_before)])[0]:  # in all processes
        guide.start = run.progress.epoch
        run.folder.milestones.add(guide.start)
        run.say(f"mask tokens have overtaken visible ones: the guide starts after epoch {guide.start}")


if __name__ == "__main__":
    main()
