"""Transfer an encoder to dense tasks: semantic segmentation (mIoU), object detection (AP of boxes and masks).

    accelerate launch dense.py segment                                     # the demo, on drawn shapes
    accelerate launch dense.py segment --checkpoint runs/photos --dataset FOLDER --head upernet
    accelerate launch dense.py detect --checkpoint runs/photos --dataset COCO --preset coco
    accelerate launch dense.py test --checkpoint runs/segment --dataset FOLDER --split test
    accelerate launch dense.py predict --checkpoint runs/segment --dataset PHOTOS    # label maps, or boxes, drawn

Training leaves in --out: config.json, model.safetensors (``smae.load`` reads them), metrics.jsonl, result.json,
predictions.png, checkpoints; detect also detections.json in COCO's result format. On the demo data an untrained
encoder is then trained in the same way, for comparison (--floor).
"""

import argparse
import copy
import json
import re
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from torch import nn

import checkpoint
import cli
import data
import encoders
import folders
import optim
import overlays
import pictures
import scores
import smae
from detector import Detector, smallest_side
from instances import Instances, load_instances
from label_maps import Labels, load_label_maps
from readers import Share
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
from scenes import Pictures, SceneBatches, Scenes, hold_out
from segmenter import HEADS, Segmenter
from tasks import Detection, Segmentation, Task, coco_results, predictions

DEMO = "shapes:easy"  # a few minutes are too short for the classes of shapes, and for any detector
PRESETS = {  # the defaults of each task: on the demo data, on your own, and the recipes of papers
    "segment": {
        "demo": dict(
            head="upernet",
            head_width=32,
            epochs=3,
            warmup_epochs=1,
            batch_size=16,
            lr=1e-3,
            layer_decay=0.9,
            scale=(0.8, 1.25),
            max_images=2000,
            max_test_images=300,
        ),
        "own": dict(epochs=50, warmup_epochs=5, batch_size=16, drop_path=0.1),
        "ade20k": dict(  # MAE's: UPerNet, 160k steps
            head="upernet",
            image_size=512,
            epochs=127,
            warmup_epochs=1,
            batch_size=16,
            schedule="linear",
            drop_path=0.1,
            slide=True,
            test_every=10,
        ),
    },
    "detect": {
        "demo": dict(
            head_width=32,
            rois=32,
            proposals=100,
            epochs=3,
            warmup_epochs=1,
            batch_size=8,
            lr=5e-4,
            layer_decay=0.9,
            scale=(0.8, 1.25),
            max_images=1000,
            max_test_images=300,
        ),
        "own": dict(epochs=50, warmup_epochs=5, batch_size=16, weight_decay=0.1, drop_path=0.1),
        "coco": dict(  # ViTDet's
            image_size=1024,
            epochs=100,
            warmup_epochs=1,
            batch_size=64,
            weight_decay=0.1,
            schedule="steps",
            drop_path=0.1,
            test_every=10,
        ),
    },
}
OTHERWISE = {  # where a preset says nothing
    "segment": dict(head="linear", head_width=512, layer_decay=0.65, weight_decay=0.05, scale=(0.5, 2.0), slide=False),
    "detect": dict(
        head_width=256, rois=512, proposals=1000, layer_decay=0.7, weight_decay=0.05, scale=(0.1, 2.0), lr=1e-4
    ),
}
TRAINED = ("config.json", "model.safetensors", "metrics.jsonl", "result.json", "predictions.png")
FILES = {  # what each command leaves in --out
    "segment": TRAINED,
    "detect": (*TRAINED, "detections.json"),
    "test": ("result.json", "predictions.png", "detections.json"),
    "predict": ("result.json", "predictions.png", "detections.json", "overlays", "label_maps"),
}
IGNORED = {"out", "overwrite", "resume", "save_every_steps", "keep", "max_bad_images", "workers", "log_with"}
IGNORED |= {"preset", "floor"}  # when resuming
SHOWN = 6  # pictures in predictions.png


def build_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(description="Transfer an encoder to segmentation and detection.")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help, formatter_class=cli.HelpFormatter)
        if name not in PRESETS:
            sub.add_argument("--checkpoint", default="runs/segment", help="run folder of a segmenter or detector")
        else:
            text = cli.OPTIONS["checkpoint"]["help"]
            sub.add_argument("--checkpoint", help=f"{text} (default: runs/pretrain if it exists, else random)")
            sub.add_argument(
                "--preset",
                choices=list(PRESETS[name]),
                help="where the defaults of other options come from (default: demo for the demo data, else own)",
            )
        out = Path("runs") / ("predict-dense" if name == "predict" else name)  # eval.py has a predict, too
        cli.add(sub, "precision", "seed", "out", "overwrite", out=out)
        group = sub.add_argument_group("data")
        cli.add(group, "dataset", "split", "image-column", dataset=DEMO, split=None if name == "test" else "train")
        cli.add(group, "max-images", "pixel-range", "workers", "max-bad-images")
        if name != "predict":
            group.add_argument("--mask-column", help="column of label maps or instance masks (default: found)")
            group.add_argument(
                "--classes",
                metavar="WHAT",
                help="names of the classes: a text file of lines NAME (for label maps also VALUE NAME, or R G B NAME), "
                "or, for label maps, a column that lists them (default: found in the data)",
            )
        if name in ("detect", "test"):
            group.add_argument("--boxes", choices=["xywh", "xyxy"], default="xywh", help="format of the boxes")
        if name == "detect":
            group.add_argument(
                "--single-class",
                action=argparse.BooleanOptionalAction,
                help="find objects of any class, without telling which (default: on the demo data)",
            )
        if name != "detect":
            sub.add_argument(
                "--slide",
                action=argparse.BooleanOptionalAction,
                help="segment through a sliding window, not whole pictures (default: as in training, else not)",
            )
        return sub

    sub = command("segment", "train and test a segmenter: mean IoU")
    sub.add_argument("--ignore-index", type=int, nargs="+", default=[], help="values to ignore, like 255")
    sub.add_argument(
        "--head",
        choices=HEADS,
        help="linear, on a frozen encoder; upernet, on a trained one (default: linear; demo, ade20k: upernet)",
    )
    sub.add_argument(
        "--blocks", type=int, nargs="+", help="encoder blocks that the head reads (default: the last; upernet: four)"
    )
    sub.add_argument("--head-width", type=int, help=f"channels of UPerNet {usual('segment', 'head_width')}")
    add_training_options(sub, "short side of pictures")

    sub = command("detect", "train and test a detector: average precision of boxes and masks")
    sub.add_argument(
        "--window",
        type=int,
        default=14,
        help="side of the attention windows, in patches, in all but four blocks (0: none)",
    )
    sub.add_argument(
        "--head-width", type=int, help=f"channels of feature pyramid and heads {usual('detect', 'head_width')}"
    )
    sub.add_argument("--rois", type=int, help=f"regions per picture to train the heads on {usual('detect', 'rois')}")
    sub.add_argument(
        "--proposals", type=int, help=f"regions per picture for the heads to judge {usual('detect', 'proposals')}"
    )
    add_training_options(sub, "long side of pictures")

    command("test", "test a segmenter or detector")
    command("predict", "draw what a segmenter or detector finds; write it as label maps or boxes")
    return parser


def usual(command: str, name: str) -> str:
    """The default of an option, and that of the demo, for its help text."""
    return f"(default: {OTHERWISE[command][name]}; demo: {PRESETS[command]['demo'][name]})"


def add_training_options(parser: argparse.ArgumentParser, side: str):
    """The options of a training; PRESETS and OTHERWISE have their defaults."""
    parser.add_argument(
        "--image-size",
        type=int,
        help=f"side of the training crops, and {side} in the test (default: the checkpoint's, or 64, rounded up)",
    )
    parser.add_argument("--test-split", help="split to test on (default: validation, val or test, else every tenth)")
    parser.add_argument(
        "--max-test-images", type=int, help="test on only so many pictures, evenly spaced (default: all; demo: 300)"
    )
    group = parser.add_argument_group("optimisation (defaults: those of the preset)")
    cli.add(group, "epochs", "warmup-epochs", "batch-size", "accumulate", "weight-decay")
    group.add_argument("--lr", type=float, help="learning rate, not scaled with the batch")
    group.add_argument(
        "--schedule", choices=optim.SCHEDULES, help="learning-rate schedule (default: the preset's, or cosine)"
    )
    cli.add(group, "layer-decay", "drop-path", "clip-grad")
    group.add_argument("--scale", type=float, nargs=2, help="smallest and largest factor on the size of pictures")
    group = parser.add_argument_group("run")
    group.add_argument(
        "--test-every", type=int, help="epochs between tests (default: the preset's, or a fifth of --epochs)"
    )
    group.add_argument(
        "--floor",
        action=argparse.BooleanOptionalAction,
        help="afterwards train an untrained encoder in the same way, in --out/floor (default: on the demo data)",
    )
    cli.add(group, "resume", "save-every-steps", "keep", "log-with")
    group = parser.add_argument_group("model", "For --checkpoint random; --heads for any.")
    cli.add(group, *(name for name in cli.MODEL if name != "image-size"))


# ------------------------------------------------------------------------------ set-up


def fill_defaults(args: argparse.Namespace):
    """Fill in the defaults of the preset and of other options; raise ValueError where options make no sense."""
    scores.check_requirements()
    args.precision = cli.choose_precision(args.precision)
    cli.check_positive(vars(args), "max_images")
    if args.command not in PRESETS:
        return
    if args.checkpoint is None:
        args.checkpoint = "runs/pretrain"
        if not Path(args.checkpoint).exists():
            args.checkpoint = "random"
            data.say_once("there is no runs/pretrain: --checkpoint random, an untrained encoder")
    on_demo = args.dataset in data.DEMO
    args.preset = args.preset or ("demo" if on_demo else "own")
    preset = PRESETS[args.command][args.preset]
    if args.epochs and args.warmup_epochs is None:
        args.warmup_epochs = preset["warmup_epochs"] * args.epochs // preset["epochs"]
    common = dict(schedule="cosine", drop_path=0.0, floor=on_demo)
    common |= dict(single_class=on_demo) if args.command == "detect" else {}
    for name, value in (common | OTHERWISE[args.command] | preset).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.lr is None:
        args.lr = 1e-3 if args.head == "linear" else 1e-4
    if args.test_every is None:
        args.test_every = -(-args.epochs // 5)
    args.floor = args.floor and args.checkpoint != "random"
    check_options(args)


def check_options(args: argparse.Namespace):
    """Raise ValueError where options of a training make no sense."""
    cli.check_training(vars(args))
    cli.check_positive(vars(args), "test_every", "head_width", "max_test_images")
    if not 0 < args.scale[0] <= args.scale[1]:
        raise ValueError(f"--scale takes two factors, 0 < low <= high, got {args.scale}")
    if args.lr == 0:
        raise ValueError("--lr must be positive")
    cli.check_out(args.out, args.checkpoint)


def load_encoder(args: argparse.Namespace) -> smae.SMAE:
    """The encoder that --checkpoint names; fills in --image-size. Raises FileNotFoundError or ValueError."""
    untrained = smae.PRESETS[args.model] | cli.model_sizes(vars(args))
    encoder = encoders.load(args.checkpoint, heads=args.heads, untrained=untrained).backbone
    if encoder is None:
        raise ValueError(f"--checkpoint {args.checkpoint} has nothing to train on")
    if not args.image_size:
        multiple = smallest_side(encoder.patch_size) if args.command == "detect" else encoder.patch_size
        args.image_size = -(-max(encoder.config["image_size"]) // multiple) * multiple
    return encoder


def load_scenes(args: argparse.Namespace, task: str, split: str, known: dict) -> Scenes:
    """A split of the data for a "segmenter" or "detector"; ``known``: the result of :func:`classes_of`, or {}.

    Raises FileNotFoundError or ValueError.
    """
    how = dict(image_column=args.image_column, mask_column=args.mask_column, classes=args.classes)
    if task == "segmenter":
        return load_label_maps(args.dataset, split, **how, ignored=args.ignore_index, **known)
    scenes = load_instances(args.dataset, split, **how, boxes=args.boxes, **known)
    return scenes.as_one_class() if args.single_class else scenes


def classes_of(scenes: Scenes) -> dict:
    """The argument by which another split gets the same classes."""
    if not isinstance(scenes, Instances):
        return dict(labels=scenes.labels)
    return {} if scenes.single_class else dict(known=(scenes.classes, scenes.category_ids))


def load_tests(
    args: argparse.Namespace, task: str, split: str | None, known: dict, training: Scenes | None = None
) -> Scenes | None:
    """The pictures to test on: ``split``, or the first of validation, val and test that exists; None if none does.

    What is trained on is not chosen unless it is named.
    """
    for name in [split] if split else ("validation", "val", "test"):
        try:
            tests = load_scenes(args, task, name, known)
            if split or training is None or not data.are_same(tests.records, training.records):
                return tests
        except ValueError as error:
            if split or not re.search("Unknown split|is empty|has no pictures in|has no column", str(error)):
                raise
            if not re.search("Unknown split|is empty", str(error)):  # it exists, but without truth
                data.say_once(f"not tested on split {name}: {error}")
    return None


def load_both(args: argparse.Namespace, channels: int) -> tuple[Scenes, Scenes]:
    """Pictures to train on and to test on; without a split for the test, every tenth is held out. Raises ValueError."""
    task = "segmenter" if args.command == "segment" else "detector"
    training = load_scenes(args, task, args.split, known={})
    training.form = data.pixel_format(training.records, channels, args.pixel_range)
    tests = load_tests(args, task, args.test_split, classes_of(training), training)
    if tests is not None:
        tests.form = training.form
    else:
        training, tests = hold_out(training)
        data.say_once(f"{args.dataset} has no other split for the test: every tenth picture is held out ({len(tests)})")
    return some_of(training, args.max_images), some_of(tests, args.max_test_images)


def some_of(scenes: Scenes, count: int | None) -> Scenes:
    """``count`` of the pictures, from all over the data, or all."""
    return scenes.select(data.evenly_spaced(len(scenes), count)) if count else scenes


def build_task(args: argparse.Namespace, encoder: smae.SMAE, training: Scenes) -> Task:
    """The model to train, and how. Raises ValueError where options make no sense."""
    common = dict(side=args.image_size, width=args.head_width, drop_path=args.drop_path)
    if args.command == "segment":
        return Segmentation(Segmenter(encoder, training.classes, args.head, args.blocks, slide=args.slide, **common))
    heads = dict(rois=args.rois, proposals=args.proposals)
    return Detection(Detector(encoder, training.classes, training.has_masks, window=args.window, **heads, **common))


def check_batch_norm(model: nn.Module, micro_batch: int):
    """Raise ValueError if BatchNorm has too little to average over."""
    if micro_batch < 2 and any(type(module) is nn.BatchNorm2d for module in model.modules()):
        raise ValueError("BatchNorm needs at least two pictures in each micro-batch: raise --batch-size")


# ------------------------------------------------------------------------------ training


def build_run(
    args: argparse.Namespace,
    accelerator: Accelerator,
    lock: checkpoint.Lock,
    encoder: smae.SMAE,
    training: Scenes,
    tests: Scenes,
) -> tuple[Run, Task]:
    """The training, where it was left, and what it trains."""
    saving = dict(save_every=args.test_every, save_every_steps=args.save_every_steps, keep=args.keep)
    folder = Folder(args.out, lock, FILES[args.command], **saving)
    resumed_from = find_checkpoint(accelerator, folder, args.resume, args.overwrite)
    world = accelerator.num_processes
    with all_processes_or_none():
        state = read_state(resumed_from, args.command)
        set_seed(args.seed)
        task = build_task(args, encoder, training)
        if world > 1 and accelerator.device.type == "cuda":
            task.model = nn.SyncBatchNorm.convert_sync_batchnorm(task.model)
        model = task.model
        check_batch_norm(model, args.batch_size // world // args.accumulate)
        optimizer = torch.optim.AdamW(optim.layer_groups(model, args.layer_decay, args.weight_decay), lr=args.lr)
        batches = SceneBatches(
            training,
            task.augment(tuple(args.scale)),
            args.batch_size,
            accumulate=args.accumulate,
            seed=args.seed,
            workers=args.workers,
            device=accelerator.device,
            share=Share(accelerator.process_index, world),
            max_bad=args.max_bad_images,
        )
        seen = dict(images=len(training), pictures=data.fingerprint(training.records), hub=data.hub_id(args.dataset))
        config = smae.describe_model(model) | {args.command: cli.plain(vars(args)), "data": seen | values_of(training)}
        if state:
            compare_configurations(state, config, args.command, world, ignored=IGNORED)
            if state["config"][model.task] != json.loads(json.dumps(config[model.task])):
                raise ValueError("cannot resume with other classes")
            model.load_state_dict(state["model"])

    def write_results(epoch: int):
        smae.save(model, args.out, config)
        with accelerator.autocast():
            draw(task, tests, args.out / "predictions.png", f"test pictures, after epoch {epoch}")
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
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    accelerator.print(
        f"{args.checkpoint}: {trained:,} of {sum(p.numel() for p in model.parameters()):,} parameters to train; "
        f"{len(training)} training and {len(tests)} test pictures, {len(training.classes)} classes; "
        f"{args.epochs} epochs of {batches.steps_per_epoch} steps, batch {args.batch_size}, learning rate {args.lr:g}"
        + (f"; continuing from {resumed_from}" if state else "")
    )
    return run, task


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
    run, task = build_run(args, accelerator, lock, encoder, training, tests)
    testing = dict(workers=args.workers, max_bad=args.max_bad_images, stopped=run.signals.caught)
    found = None
    with run.guarded():
        for epoch in run.epochs():
            for batch in run.seeded_batches_of(epoch):
                images = data.normalize(batch.images, *task.model.statistics)
                run.step(task.loss(run.trained, images, batch.targets), batch)
            run.average_statistics()
            found = None
            if epoch % args.test_every == 0 or epoch == args.epochs:
                run.save()  # a test may take long, or fail
                found = task.test(tests, accelerator, **testing)
                run.poll()
            numbers = {name: value for name, value in (found or {}).items() if isinstance(value, (int, float))}
            run.end_epoch(task.describe(found) if found else "", **numbers)
        if found is None:  # the run had ended before
            found = task.test(tests, accelerator, **testing)
            run.poll()
    run.finish(goes_on)
    if accelerator.is_main_process and args.command == "detect":
        write_detections(args.out / "detections.json", task.results, tests)
    return found


def values_of(scenes: Scenes) -> dict:
    """Which values of the data are which class, and black and white, for config.json: a test must read them alike."""
    if isinstance(scenes, Instances):
        return dict(category_ids=scenes.category_ids, pixel_range=data.pixel_range(scenes.form))
    return dict(class_of=list(scenes.labels.class_of.items()), pixel_range=data.pixel_range(scenes.form))


def untrained(args: argparse.Namespace, encoder: smae.SMAE) -> tuple[argparse.Namespace, smae.SMAE]:
    """The options and the encoder of the floor: the same architecture with random weights."""
    args = copy.copy(args)
    args.checkpoint, args.out, args.log_with = "random", args.out / "floor", None
    args.resume = args.resume and "auto"
    set_seed(args.seed)
    return args, smae.SMAE(**encoder.config)


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
        rows.append(task.draw(scene, task.predict(scene)))
    task.model.train(training)
    if rows:
        titles = ["picture", "truth", "prediction"] if len(rows[0]) == 3 else ["picture", "prediction"]
        pictures.save(overlays.sheet(rows, titles, text, task.legend()), file)


def write_detections(file: Path, results: list[dict], scenes: Scenes):
    """Write detections in COCO's result format, under the image and category ids of the data."""
    ids = scenes.image_ids()
    found = []
    for each in results:
        each = each | dict(image_id=ids[each["image_id"]], category_id=scenes.category_ids[each["category_id"]])
        if "segmentation" in each:
            segmentation = each["segmentation"]
            each["segmentation"] = segmentation | dict(counts=segmentation["counts"].decode())
        found.append(each)
    smae.write_text(file, json.dumps(found))


def load_task(args: argparse.Namespace, device: torch.device) -> tuple[Task, dict]:
    """The segmenter or detector that --checkpoint names, and the content of its config.json.

    Raises FileNotFoundError or ValueError.
    """
    model, config = smae.load(args.checkpoint, device), smae.config_of(args.checkpoint)
    args.pixel_range = args.pixel_range or config.get("data", {}).get("pixel_range")
    if isinstance(model, Segmenter):
        return Segmentation(model, args.slide), config
    if isinstance(model, Detector):
        return Detection(model), config
    raise ValueError(
        f"{args.checkpoint} is neither a segmenter nor a detector: make one with dense.py segment or detect"
    )


def test(args: argparse.Namespace, accelerator: Accelerator, lock: checkpoint.Lock) -> dict:
    """Test a trained model on a split. Raises ValueError if that has other classes."""
    task, config = load_task(args, accelerator.device)
    model, seen, known = task.model, config.get("data", {}), {}
    trained = config.get("segment") or config.get("detect") or {}
    args.ignore_index, args.single_class = trained.get("ignore_index", ()), trained.get("single_class", False)
    if "class_of" in seen:
        known = dict(labels=Labels(model.classes, dict(seen["class_of"])))
    elif "category_ids" in seen and not args.single_class:
        known = dict(known=(model.classes, seen["category_ids"]))
    if trained.get("classes") and not args.classes:  # its names are not those of the data
        known["by_name"] = False
    scenes = load_tests(args, model.task, args.split, known)
    if scenes is None:
        raise ValueError(f"{args.dataset} has no split validation, val or test: name one with --split")
    if scenes.classes != model.classes:
        theirs, ours = (", ".join(names[:5]) for names in (scenes.classes, model.classes))
        raise ValueError(
            f"the classes of {args.dataset} ({theirs}, ...) are not those of {args.checkpoint} ({ours}, ...): "
            "see --classes"
        )
    scenes.form = data.pixel_format(scenes.records, model.config["channels"], args.pixel_range)
    scenes = some_of(scenes, args.max_images)
    take_folder(accelerator, lock, args.overwrite, FILES["test"])
    found = task.test(scenes, accelerator, workers=args.workers, max_bad=args.max_bad_images)
    if accelerator.is_main_process:
        with accelerator.autocast():
            draw(task, scenes, args.out / "predictions.png", f"{args.checkpoint} on {args.dataset}")
        if isinstance(task, Detection):
            write_detections(args.out / "detections.json", task.results, scenes)
    return found


def predict(args: argparse.Namespace, accelerator: Accelerator, lock: checkpoint.Lock) -> dict:
    """Write what is found in pictures without truth, and draw it."""
    task, config = load_task(args, accelerator.device)
    place, split = args.dataset, args.split
    pair = None if args.image_column else folders.pair_of_split(Path(place).expanduser(), split)
    if pair:  # masks are no photographs
        place, split = str(pair[1]), "train"
    records = data.load_images(place, split, args.image_column, "", False, args.max_images, spread=True)
    model, form = task.model, data.pixel_format(records, task.model.config["channels"], args.pixel_range)
    scenes = Pictures(records, model.classes, form, config.get("data", {}).get("category_ids"))
    take_folder(accelerator, lock, args.overwrite, FILES["predict"])
    for name in ("overlays", "label_maps") if isinstance(task, Segmentation) else ("overlays",):
        (args.out / name).mkdir(exist_ok=True)
    found, count = [], torch.zeros((), dtype=torch.int64, device=accelerator.device)
    options = dict(workers=args.workers, max_bad=args.max_bad_images)
    for index, scene, prediction in predictions(task, scenes, accelerator, **options):
        stem = Path(scene["name"]).stem if "." in scene["name"] else "picture"
        name = f"{index:05d}-{stem.encode()[:200].decode(errors='ignore')}.png"  # no longer than file systems take
        *_, drawn = task.draw(scene, prediction)
        overlays.as_picture(drawn).save(args.out / "overlays" / name)
        if isinstance(task, Segmentation):
            overlays.label_picture(prediction, len(model.classes)).save(args.out / "label_maps" / name)
        else:
            found += [each | dict(file=scene["name"]) for each in coco_results(prediction, index)]
        count += 1
    found = gather_object(found)
    if accelerator.is_main_process:
        if isinstance(task, Detection):
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
        args = build_parser().parse_args(arguments)
        with checkpoint.Lock(args.out) as lock, cli.one_line_errors(ValueError, OSError, ProcessLost):
            return transfer(args, lock)


def transfer(args: argparse.Namespace, lock: checkpoint.Lock) -> dict:
    """Every command: model, data, result.json. Returns the content of that."""
    start = time.perf_counter()
    fill_defaults(args)
    if args.command not in PRESETS:
        cli.check_folder(args.out, args.overwrite, FILES[args.command])
    how = dict(log_with=getattr(args, "log_with", None), project_dir=args.out)
    accelerator = cli.make_accelerator(args.precision, getattr(args, "accumulate", 1), **how)
    set_seed(args.seed)

    if args.command in ("test", "predict"):
        command = test if args.command == "test" else predict
        with lost_processes(accelerator.num_processes):
            result = command(args, accelerator, lock)
    else:
        encoder = load_encoder(args)
        scenes = load_both(args, encoder.config["channels"])
        result = fit(args, accelerator, lock, encoder, *scenes, goes_on=args.floor)
        if args.floor:
            accelerator.print("the floor: an untrained encoder, trained in the same way")
            floor, encoder = untrained(args, encoder)
            result["floor"] = fit(floor, accelerator, lock, encoder, *scenes)
    result |= dict(processes=accelerator.num_processes, seconds=time.perf_counter() - start)
    if accelerator.is_main_process:
        result = report(args, result)
    accelerator.end_training()  # otherwise the process group may abort at exit
    return result


def report(args: argparse.Namespace, result: dict) -> dict:
    """Write result.json, print the result in a line, return the content."""
    content = dict(command=args.command, checkpoint=args.checkpoint, dataset=args.dataset)
    content |= result | dict(config=cli.plain(vars(args)))
    smae.write_text(args.out / "result.json", json.dumps(content, indent=2) + "\n")
    kind = next((kind for kind in (Segmentation, Detection) if kind.metric in result), None)
    words = [kind.describe(result)] if kind else []
    words += [f"floor, an untrained encoder: {kind.describe(result['floor'])}"] if "floor" in result else []
    words += [f"{result['images']} images, {result['seconds']:.0f} s"]
    words += [f"wrote {args.out / 'result.json'}, {args.out / 'predictions.png'}"]
    print(f"{args.command} {args.checkpoint} on {args.dataset}: {'; '.join(words)}")
    return content


if __name__ == "__main__":
    main()
