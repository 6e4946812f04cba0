"""Transfer an encoder to dense tasks: semantic segmentation (mIoU), object detection (AP of boxes and masks).

    accelerate launch dense.py segment                                     # the demo: a linear head, on drawn shapes
    accelerate launch dense.py segment --checkpoint runs/photos --dataset FOLDER --head upernet
    accelerate launch dense.py detect --checkpoint runs/photos --dataset COCO --preset coco
    accelerate launch dense.py test --checkpoint runs/segment --dataset FOLDER --split test
    accelerate launch dense.py predict --checkpoint runs/segment --dataset PHOTOS    # label maps, or boxes, drawn

Training leaves in --out: config.json, model.safetensors (``smae.load`` reads them), metrics.jsonl, result.json,
predictions.png, checkpoints, and detections.json in COCO's result format. On the demo data an untrained
encoder is trained in the same way, for comparison (--floor).
"""

import argparse
import copy
import json
import shutil
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from torch import nn

import checkpoint
import cli
import data
import encoders
import optim
import overlays
import scores
import smae
from cropping import RandomStream, uniform
from detector import Detector
from instances import load_instances
from label_maps import load_label_maps
from readers import Share
from run import Folder, ProcessLost, Run, Schedule, all_processes_or_none, compare_configurations, find_checkpoint
from scenes import Pictures, SceneBatches, Scenes, hold_out
from segmenter import HEADS, Segmenter
from tasks import Detection, Segmentation, Task, coco_results, predictions

PRESETS = {  # where they differ from the demo's
    "ade20k": dict(  # MAE's recipe: UPerNet, 160k steps of 16 pictures
        head="upernet",
        image_size=512,
        epochs=127,
        warmup_epochs=1,
        batch_size=16,
        lr=1e-4,
        schedule="linear",
        drop_path=0.1,
        slide=True,
        test_every=10,
    ),
    "coco": dict(  # ViTDet's recipe
        image_size=1024,
        epochs=100,
        warmup_epochs=1,
        batch_size=64,
        lr=1e-4,
        weight_decay=0.1,
        schedule="steps",
        drop_path=0.1,
        scale=(0.1, 2.0),
        head_width=256,
        rois=512,
        proposals=1000,
        test_every=10,
        clip_grad=1.0,
    ),
}
TRAINED = ("config.json", "model.safetensors", "metrics.jsonl", "result.json", "predictions.png")
FILES = {  # what each command leaves in --out
    "segment": TRAINED,
    "detect": (*TRAINED, "detections.json"),
    "test": ("result.json", "predictions.png", "detections.json"),
    "predict": ("predictions.png", "detections.json"),
}
IGNORED = {"out", "overwrite", "resume", "save_every_steps", "keep", "max_bad_images", "workers", "log_with"}
IGNORED |= {"preset", "floor"}  # when resuming
SHOWN = 6  # pictures in predictions.png


def build_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(description="Transfer an encoder to segmentation and detection.")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, help: str, trains: bool) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help, formatter_class=cli.HelpFormatter)
        cli.add(sub, "checkpoint", checkpoint=None if trains else "runs/segment")
        cli.add(sub, "precision", "seed", "out", "overwrite", out=Path("runs") / name)
        group = sub.add_argument_group("data")
        cli.add(group, "dataset", "split", "image-column", split="train" if trains else "validation")
        cli.add(group, "max-images", "workers", "max-bad-images")
        if name != "predict":
            group.add_argument("--mask-column", help="column of label maps or instance masks (default: found)")
            group.add_argument(
                "--classes",
                metavar="WHAT",
                help="names of the classes: a text file of lines NAME (for label maps also VALUE NAME, or R G B NAME), "
                "or, for label maps, a column that lists them (default: found in the data)",
            )
        if name in ("segment", "test"):
            group.add_argument(
                "--ignore-index", type=int, nargs="+", default=[], help="values of label maps that are no class, as 255"
            )
        if name in ("detect", "test"):
            group.add_argument("--boxes", choices=["xywh", "xyxy"], default="xywh", help="what boxes in a column are")
        if name in ("segment", "test", "predict"):
            sub.add_argument(
                "--slide", action="store_true", help="segment through a sliding window, not whole pictures"
            )
        return sub

    sub = command("segment", "train and test a segmenter: mean IoU", trains=True)
    sub.add_argument("--preset", choices=["demo", "ade20k"], default="demo", help="where the defaults come from")
    sub.add_argument(
        "--head", choices=HEADS, default="linear", help="linear, on a frozen encoder; upernet, on a trained one"
    )
    sub.add_argument("--blocks", type=int, nargs="+", help="encoder blocks that the head reads (default: the last; 4)")
    sub.add_argument("--head-width", type=int, default=512, help="channels of UPerNet")
    add_training_options(sub, epochs=5, batch_size=64, lr=None, weight_decay=0.05, scale=Segmentation.scales)

    sub = command("detect", "train and test a detector: average precision of boxes and masks", trains=True)
    sub.add_argument("--preset", choices=["demo", "coco"], default="demo", help="where the defaults come from")
    sub.add_argument(
        "--window", type=int, default=14, help="side of the windows of attention, in patches, but in 4 blocks (0: none)"
    )
    sub.add_argument("--head-width", type=int, default=32, help="channels of feature pyramid and heads")
    sub.add_argument("--rois", type=int, default=32, help="regions per picture that the heads are trained on")
    sub.add_argument("--proposals", type=int, default=100, help="regions per picture that the heads judge")
    add_training_options(sub, epochs=6, batch_size=16, lr=1e-3, weight_decay=0.05, scale=(0.7, 1.4))

    sub = command("test", "test a segmenter or detector", trains=False)
    sub = command("predict", "draw what a segmenter or detector finds; write it as label maps or boxes", trains=False)
    return parser


def add_training_options(parser: argparse.ArgumentParser, **defaults):
    """The options of a training."""
    parser.add_argument(
        "--image-size",
        type=int,
        help="side of the training crops; for the test, the short side of pictures to segment, the long side of others "
        "(default: the checkpoint's, or 64)",
    )
    parser.add_argument("--test-split", help="split to test on (default: validation, val or test, else every tenth)")
    parser.add_argument("--max-test-images", type=int, help="test on only so many pictures, from all over the data")
    group = parser.add_argument_group("optimisation")
    cli.add(
        group, "epochs", "warmup-epochs", "batch-size", "accumulate", "lr", "weight-decay", warmup_epochs=1, **defaults
    )
    group.add_argument("--schedule", choices=optim.SCHEDULES, default="cosine", help="of the learning rate")
    group.add_argument("--layer-decay", type=float, help="learning rate of a block over that of the next")
    group.add_argument("--drop-path", type=float, default=0.0, help="stochastic depth of the last block")
    group.add_argument("--clip-grad", type=float, help="largest gradient norm (default: no clipping)")
    group.add_argument(
        "--scale",
        type=float,
        nargs=2,
        default=defaults["scale"],
        help="smallest and largest factor on the size of pictures",
    )
    group = parser.add_argument_group("run")
    group.add_argument("--test-every", type=int, help="epochs between tests (default: a fifth of --epochs)")
    group.add_argument(
        "--floor",
        action=argparse.BooleanOptionalAction,
        help="afterwards train an untrained encoder in the same way, in --out/floor (default: on the demo data)",
    )
    cli.add(group, "resume", "save-every-steps", "keep")
    group.add_argument("--log-with", help="tracker of Accelerate: tensorboard, wandb, ... (default: none)")
    group = parser.add_argument_group("model", "For --checkpoint random; --heads for any.")
    cli.add(group, *(name for name in cli.MODEL if name != "image-size"))


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options, with the defaults of --preset."""
    parser = build_parser()
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parser.parse_args(arguments)
    preset = PRESETS.get(getattr(args, "preset", None))
    if preset:
        subparsers = next(action for action in parser._actions if isinstance(action.choices, dict))
        subparsers.choices[args.command].set_defaults(**preset)
        args = parser.parse_args(arguments)
    return args


# ------------------------------------------------------------------------------ set-up


def fill_defaults(args: argparse.Namespace):
    """Fill in the defaults that depend on other options; raise ValueError where options make no sense."""
    scores.check_requirements()
    args.precision = cli.choose_precision(args.precision)
    if args.command not in ("segment", "detect"):
        return
    if args.checkpoint is None:
        args.checkpoint = "runs/pretrain"
        if not Path(args.checkpoint).exists():
            args.checkpoint = "random"
            data.say_once("there is no runs/pretrain: --checkpoint random, an untrained encoder")
    linear = getattr(args, "head", None) == "linear"
    if args.lr is None:
        args.lr = 1e-3 if linear else 1e-4
    if args.layer_decay is None:
        args.layer_decay = 0.65 if args.command == "segment" else 0.7
    if args.test_every is None:
        args.test_every = -(-args.epochs // 5)
    if args.floor is None:
        args.floor = args.dataset in data.DEMO
    args.floor = args.floor and args.checkpoint != "random"
    if args.command == "detect" and args.dataset in data.DEMO:  # a few minutes on two cores
        args.max_images, args.max_test_images = args.max_images or 1000, args.max_test_images or 300
    cli.check_training(args.epochs, args.warmup_epochs, args.batch_size, args.accumulate, (0.1, 1.0))
    if args.test_every < 1:
        raise ValueError(f"--test-every must be at least 1, got {args.test_every}")
    if not 0 < args.scale[0] <= args.scale[1]:
        raise ValueError(f"--scale takes two factors, 0 < low <= high, got {args.scale}")
    if args.out.resolve() == Path(args.checkpoint).resolve():
        raise ValueError(f"--out {args.out} is the checkpoint itself, which would be lost")


def load_encoder(args: argparse.Namespace) -> smae.SMAE:
    """The encoder that --checkpoint names; fills in --image-size. Raises FileNotFoundError or ValueError."""
    untrained = smae.PRESETS[args.model] | cli.model_sizes(vars(args))
    if args.image_size:
        untrained["image_size"] = args.image_size
    encoder = encoders.load(args.checkpoint, heads=args.heads, untrained=untrained).backbone
    if encoder is None:
        raise ValueError(f"--checkpoint {args.checkpoint} has nothing to train on")
    args.image_size = args.image_size or max(encoder.config["image_size"])
    return encoder


def load_scenes(args: argparse.Namespace, task: str, split: str, channels: int, like: Scenes | None = None) -> Scenes:
    """A split of the data for a "segmenter" or "detector"; ``like``: that for training, whose classes it has.

    Raises FileNotFoundError or ValueError.
    """
    how = dict(image_column=args.image_column, mask_column=args.mask_column, classes=args.classes)
    if task == "segmenter":
        labels = like and like.labels
        scenes = load_label_maps(args.dataset, split, **how, ignored=args.ignore_index, labels=labels)
    else:
        scenes = load_instances(args.dataset, split, **how, boxes=args.boxes, like=like)
    scenes.form = like.form if like else data.pixel_format(scenes.records, channels)
    return scenes


def load_both(args: argparse.Namespace, task: str, channels: int) -> tuple[Scenes, Scenes]:
    """Pictures to train on and to test on; without a split for the test, every tenth is held out. Raises ValueError."""
    training, tests = load_scenes(args, task, args.split, channels), None
    for split in [args.test_split] if args.test_split else ("validation", "val", "test"):
        try:
            tests = load_scenes(args, task, split, channels, training)
            break
        except ValueError as error:
            if args.test_split or ("Unknown split" not in str(error) and "is empty" not in str(error)):
                raise
    if tests is None:
        training, tests = hold_out(training)
        data.say_once(f"{args.dataset} has no split for the test: every tenth picture is held out ({len(tests)})")
    if args.max_images:
        training = training.select(data.evenly_spaced(len(training), args.max_images))
    if args.max_test_images:
        tests = tests.select(data.evenly_spaced(len(tests), args.max_test_images))
    return training, tests


def build_task(args: argparse.Namespace, encoder: smae.SMAE, training: Scenes) -> Task:
    """The model to train, and how. Raises ValueError where options make no sense."""
    if args.command == "segment":
        model = Segmenter(encoder, training.classes, args.head, args.blocks, args.head_width, args.drop_path)
        return Segmentation(model, args.image_size, args.slide)
    options = dict(side=args.image_size, window=args.window, rois=args.rois, proposals=args.proposals)
    model = Detector(
        encoder, training.classes, training.has_masks, width=args.head_width, drop_path=args.drop_path, **options
    )
    return Detection(model, args.image_size)


# ------------------------------------------------------------------------------ training


def fit(
    args: argparse.Namespace,
    accelerator: Accelerator,
    lock: checkpoint.Lock,
    encoder: smae.SMAE,
    training: Scenes,
    tests: Scenes,
    goes_on: bool = False,
) -> dict:
    """Train and test; the scores. All randomness is a function of seed, epoch and step.

    BatchNorm and drop path act on a micro-batch of one process, so that their effect depends on how
    many there are. ``goes_on``: whether another training follows.
    """
    saving = dict(save_every=args.test_every, save_every_steps=args.save_every_steps, keep=args.keep)
    folder = Folder(args.out, lock, FILES[args.command], **saving)
    resumed_from = find_checkpoint(accelerator, folder, args.resume, args.overwrite)
    with all_processes_or_none():
        state = checkpoint.read(resumed_from) if resumed_from else None
        set_seed(args.seed)
        task = build_task(args, encoder, training)
        model = task.model
        check_batch_norm(model, args.batch_size // accelerator.num_processes // args.accumulate)
        if accelerator.num_processes > 1 and accelerator.device.type == "cuda":
            model = task.model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        groups = optim.layer_groups(model, args.layer_decay, args.weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=args.lr)
        batches = SceneBatches(
            training,
            task.augment(tuple(args.scale)),
            args.batch_size,
            accumulate=args.accumulate,
            seed=args.seed,
            workers=args.workers,
            device=accelerator.device,
            share=Share(accelerator.process_index, accelerator.num_processes),
            max_bad=args.max_bad_images,
        )
        pictures = data.fingerprint(training.records)
        seen = dict(images=len(training), pictures=pictures, hub=data.hub_id(args.dataset))
        seen |= dict(category_ids=getattr(training, "category_ids", None))
        config = smae.describe_model(model) | {args.command: cli.plain(vars(args)), "data": seen}
        if state:
            fixed, world = set(vars(args)) - IGNORED, accelerator.num_processes
            compare_configurations(state, config, args.command, world, fixed=fixed, ignored=IGNORED)
            model.load_state_dict(state["model"])

    def write_results(epoch: int):
        smae.save(model, args.out, config)
        with accelerator.autocast():
            draw(task, tests, args.out / "predictions.png", title(run.progress.records))
        run.track_picture(args.out / "predictions.png")

    run = Run(
        accelerator,
        model.to(accelerator.device),
        optimizer,
        batches,
        Schedule(args.epochs, args.warmup_epochs, args.lr, clip_grad=args.clip_grad, shape=args.schedule),
        folder,
        config=config,
        write_results=write_results,
    )
    if state:
        run.restore(state, resumed_from)
    if args.log_with:
        run.start_trackers(config[args.command])
    parameters = [sum(p.numel() for p in model.parameters() if p.requires_grad or not only) for only in (True, False)]
    accelerator.print(
        f"{args.checkpoint}: {parameters[0] / 1e6:.2f} M of {parameters[1] / 1e6:.1f} M parameters to train; "
        f"{len(training)} training and {len(tests)} test pictures, {len(training.classes)} classes; "
        f"{args.epochs} epochs of {batches.steps_per_epoch} steps, batch {args.batch_size}, learning rate {args.lr:g}"
        + (f"; continuing from {resumed_from}" if state else "")
    )

    rank, found = np.array([accelerator.process_index]), None
    testing = dict(accelerator=accelerator, workers=args.workers, max_bad=args.max_bad_images)
    with run.guarded():
        for epoch in run.epochs():
            done = run.steps_done_in_epoch() * args.accumulate
            for micro, batch in enumerate(run.batches_of(epoch), start=done):
                number = uniform((args.seed, epoch, RandomStream.MIX, micro), rank, 1)[0, 0]
                torch.manual_seed(int(number * 2**24))
                images = data.normalize(batch.images, *model.statistics)
                run.step(task.loss(run.trained, images, batch.targets), batch)
            run.average_statistics()
            found = None
            if epoch % args.test_every == 0 or epoch == args.epochs:
                found = task.test(tests, **testing)
            numbers = {name: value for name, value in (found or {}).items() if isinstance(value, (int, float))}
            run.end_epoch(task.describe(found) if found else "", **numbers)
        if found is None:  # it had ended before
            found = task.test(tests, **testing)
    run.finish(goes_on)
    if accelerator.is_main_process and args.command == "detect":
        write_detections(args.out / "detections.json", task.results, tests)
    return found


def title(records: list[dict]) -> str:
    """What predictions.png is named by."""
    return f"test pictures, after epoch {records[-1]['epoch']}"


def check_batch_norm(model: nn.Module, micro_batch: int):
    """Raise ValueError if BatchNorm has too little to average over."""
    if micro_batch < 2 and any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        raise ValueError("BatchNorm needs at least two pictures in each micro-batch: raise --batch-size")


def untrained(
    args: argparse.Namespace, accelerator: Accelerator, lock: checkpoint.Lock, encoder: smae.SMAE
) -> tuple[argparse.Namespace, Accelerator, checkpoint.Lock, smae.SMAE]:
    """The arguments of :func:`fit` for the floor: the same architecture with random weights."""
    accelerator.print("the floor: an untrained encoder, trained in the same way")
    args = copy.copy(args)
    args.checkpoint, args.out, args.log_with = "random", args.out / "floor", None
    args.resume = args.resume and "auto"
    set_seed(args.seed)
    return args, accelerator, lock, smae.SMAE(**encoder.config)


# ------------------------------------------------------------------------------ use


def draw(task: Task, scenes: Scenes, file: Path, text: str):
    """Draw predictions beside the truth, for pictures from all over the data that can be read."""
    rows, training = [], task.model.training
    task.model.eval()
    for index in data.evenly_spaced(len(scenes), SHOWN):
        try:
            scene = task.prepare(scenes.read(int(index)))
        except Exception:  # a broken picture; the test reports it
            continue
        with torch.no_grad():
            rows.append(task.draw(scene, task.predict(scene)))
    task.model.train(training)
    if not rows:
        return
    titles = ["picture", "truth", "prediction"] if len(rows[0]) == 3 else ["picture", "prediction"]
    with smae.whole_file(file) as part:
        overlays.sheet(rows, titles, text).savefig(part, format="png")


def write_detections(file: Path, results: list[dict], scenes: Scenes):
    """Write detections in COCO's result format, under the image and category ids of the data."""
    ids = [scenes.image_id(index) for index in range(len(scenes))]
    found = []
    for each in results:
        each = each | dict(image_id=ids[each["image_id"]], category_id=scenes.category_ids[each["category_id"]])
        if "segmentation" in each:
            segmentation = each["segmentation"]
            each["segmentation"] = segmentation | dict(counts=segmentation["counts"].decode())
        found.append(each)
    with smae.whole_file(file) as part:
        part.write_text(json.dumps(found))


def load_task(args: argparse.Namespace, device: torch.device) -> Task:
    """The segmenter or detector that --checkpoint names. Raises FileNotFoundError or ValueError."""
    model = smae.load(args.checkpoint, device)
    if isinstance(model, Segmenter):
        side = smae.read_json(Path(args.checkpoint) / "config.json").get("segment", {}).get("image_size")
        return Segmentation(model, side or max(model.config["image_size"]), args.slide)
    if isinstance(model, Detector):
        return Detection(model, model.arguments["side"])
    raise ValueError(
        f"{args.checkpoint} is neither a segmenter nor a detector: make one with dense.py segment or detect"
    )


def predict(args: argparse.Namespace, accelerator: Accelerator, task: Task, category_ids: list[int] | None) -> dict:
    """Write what is found in pictures without truth, and draw it."""
    records = data.load_images(args.dataset, args.split, args.image_column, "", False, args.max_images, spread=True)
    form = data.pixel_format(records, task.model.config["channels"])
    scenes = Pictures(records, task.model.classes, form, category_ids)
    segments = isinstance(task, Segmentation)
    for name in ["overlays"] + ["label_maps"] * segments:
        (args.out / name).mkdir(parents=True, exist_ok=True)
    found, count = [], torch.zeros((), dtype=torch.int64, device=accelerator.device)
    for index, scene, prediction in predictions(task, scenes, accelerator, args.workers, args.max_bad_images):
        name = f"{index:05d}-{Path(scene['name']).stem if '.' in scene['name'] else 'picture'}.png"
        *_, drawn = task.draw(scene, prediction)
        overlays.as_picture(drawn).save(args.out / "overlays" / name)
        if segments:
            overlays.label_picture(prediction).save(args.out / "label_maps" / name)
        else:
            found += [each | dict(file=scene["name"]) for each in coco_results(prediction, index)]
        count += 1
    found = gather_object(found)
    if accelerator.is_main_process:
        if not segments:
            write_detections(args.out / "detections.json", found, scenes)
        with accelerator.autocast():
            draw(task, scenes, args.out / "predictions.png", f"{args.checkpoint} on {args.dataset}")
    return dict(images=int(accelerator.reduce(count)))


# ------------------------------------------------------------------------------ command line


def main(arguments: list | None = None) -> dict:
    """Run a command as the command line says, or as ``arguments`` say; return the content of result.json.

    Called from Python with a list, errors are exceptions: ValueError, OSError and those of run.py.
    """
    with cli.called(arguments) as arguments:
        args = parse_arguments(arguments)
        with checkpoint.Lock(args.out) as lock, cli.one_line_errors(ValueError, OSError, ProcessLost):
            return transfer(args, lock)


def transfer(args: argparse.Namespace, lock: checkpoint.Lock) -> dict:
    """Every command: model, data, result.json. Returns the content of that."""
    start, trains = time.perf_counter(), args.command in ("segment", "detect")
    fill_defaults(args)
    if not trains:
        cli.check_folder(args.out, args.overwrite, FILES[args.command])
    log_with = getattr(args, "log_with", None)
    accelerator = cli.make_accelerator(
        args.precision, getattr(args, "accumulate", 1), log_with=log_with, project_dir=args.out
    )
    if log_with and not accelerator.log_with:
        raise ValueError(f"--log-with {log_with}: that tracker is not installed")
    if not accelerator.is_main_process:
        datasets.disable_progress_bars()
    set_seed(args.seed)

    if trains:
        encoder = load_encoder(args)
        scenes = load_both(args, "segmenter" if args.command == "segment" else "detector", encoder.config["channels"])
        result = fit(args, accelerator, lock, encoder, *scenes, goes_on=args.floor)
        if args.floor:
            result["floor"] = fit(*untrained(args, accelerator, lock, encoder), *scenes)
    else:
        clear(args, accelerator)
        task = load_task(args, accelerator.device)
        config = smae.read_json(Path(args.checkpoint) / "config.json")
        if args.command == "predict":
            result = predict(args, accelerator, task, config.get("data", {}).get("category_ids"))
        else:
            result = test(args, accelerator, task)
    result |= dict(processes=accelerator.num_processes, seconds=time.perf_counter() - start)
    if accelerator.is_main_process:
        result = report(args, result)
    accelerator.end_training()  # otherwise the process group may abort at exit
    return result


def clear(args: argparse.Namespace, accelerator: Accelerator):
    """Make --out, without what an earlier command left there."""
    if accelerator.is_main_process:
        args.out.mkdir(parents=True, exist_ok=True)
        for name in FILES[args.command]:
            (args.out / name).unlink(missing_ok=True)
        for name in ("overlays", "label_maps"):
            shutil.rmtree(args.out / name, ignore_errors=True)
    accelerator.wait_for_everyone()


def test(args: argparse.Namespace, accelerator: Accelerator, task: Task) -> dict:
    """Test a trained model on a split. Raises ValueError if that has other classes."""
    scenes = load_scenes(args, task.model.task, args.split, task.model.config["channels"])
    if scenes.classes != task.model.classes:
        theirs, ours = (
            ", ".join(names[:5]) + ", ..." * (len(names) > 5) for names in (scenes.classes, task.model.classes)
        )
        raise ValueError(
            f"the classes of {args.dataset} ({theirs}) are not those of {args.checkpoint} ({ours}): see --classes"
        )
    if args.max_images:
        scenes = scenes.select(data.evenly_spaced(len(scenes), args.max_images))
    found = task.test(scenes, accelerator, args.workers, args.max_bad_images)
    if accelerator.is_main_process:
        with accelerator.autocast():
            draw(task, scenes, args.out / "predictions.png", f"{args.checkpoint} on {args.dataset}, {args.split}")
        if isinstance(task, Detection):
            write_detections(args.out / "detections.json", task.results, scenes)
    return found


def report(args: argparse.Namespace, result: dict) -> dict:
    """Write result.json, print the result in a line, return the content."""
    content = dict(command=args.command, checkpoint=args.checkpoint, dataset=args.dataset)
    content |= result | dict(config=cli.plain(vars(args)))
    with smae.whole_file(args.out / "result.json") as part:
        part.write_text(json.dumps(content, indent=2) + "\n")
    words = [Segmentation.describe(result)] if "miou" in result else []
    words += [Detection.describe(result)] if "box_ap" in result else []
    if "floor" in result:
        kind = Segmentation if "miou" in result else Detection
        words += [f"floor, an untrained encoder: {kind.describe(result['floor'])}"]
    words += [f"{result['images']} images, {result['seconds']:.0f} s", f"wrote {args.out / 'result.json'}"]
    words += ["predictions.png"]
    print(f"{args.command} {args.checkpoint} on {args.dataset}: {'; '.join(words)}")
    return content


if __name__ == "__main__":
    main()
