"""Speed, side by side in one process.

    python bench.py step        # a training step of ours against transformers' ViTMAE, and what the guides cost
    python bench.py step --model base --batch-size 8 --precision bf16 --json step.json
    python bench.py cut         # the bipartition against torch.linalg.eigh, and all that follows the features
    python bench.py load        # reading JPEGs against torchvision's ImageFolder with MAE's augmentation, on one core
    python bench.py guide --checkpoint RUN --dataset PICTURES_WITH_MASKS    # what guides cost, and how good they are
    python bench.py all --mae ../mae    # all but guide and scale, into bench.md; also against facebookresearch/mae
    python bench.py scale       # what grows with the number of pictures: 1,281,167 tiny ones, written to --folder

In ``step`` both models see the same batch, draw their random masks inside the step, and use SDPA and fused
AdamW. Times are medians over --repeats rounds; in every round each contestant runs once, so that a
noisy machine treats them alike, and the ratios are medians of the ratios of the rounds.
"""

import argparse
import contextlib
import functools
import io
import itertools
import json
import math
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import simplejpeg
import torch
from PIL import Image
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms
from torchvision.datasets import ImageFolder

import checkpoint
import cli
import data
import encoders
import masks
import measures
import smae
from batches import Batch, EvalCrops, TrainBatches
from contest import load_with_masks
from cropping import CropOptions, Crops, crop_batch
from guide import Guide, write_maps
from objects import ObjectMasks
from readers import MapCrops, Request

BASE = "ours, random masks"
PHOTOGRAPHS = {"500x375": 100, "1600x1200": 24, "4000x3000": 6}  # width x height, and how many are read in a round
PEAK = """
import resource, subprocess, sys  # a small process of its own: a child starts with the peak of its parent
code = subprocess.call(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20))
sys.exit(code)
"""
TYPES = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure speed, side by side.")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, help: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=help, formatter_class=cli.HelpFormatter)

    step = command("step", "a training step against transformers' ViTMAE")
    step.add_argument("--patch-size", type=int, default=16, help="side of a patch, in pixels")
    step.add_argument("--guide-model", choices=list(smae.PRESETS), default="small", help="size of a frozen guide")
    step.add_argument("--guide-side", type=int, default=224, help="side of the images that it sees, in pixels")
    step.add_argument("--guide-patch-size", type=int, default=14, help="side of its patches, in pixels")
    step.add_argument("--compile", action="store_true", help="compile both models")

    cut = command("cut", "the bipartition against torch.linalg.eigh")
    cut.add_argument("--batch-sizes", type=int, nargs="+", default=[64, 256], help="images")
    cut.add_argument("--sides", type=int, nargs="+", default=[14, 24], help="sides of the patch grid, in patches")
    cut.add_argument("--width", type=int, default=768, help="width of the features")

    load = command("load", "reading JPEGs, on one core")
    scale = command("scale", "what grows with the number of pictures")
    scale.add_argument("--images", type=int, default=1_281_167, help="pictures, as many as ImageNet-1k by default")
    scale.add_argument("--folder", type=Path, default=Path("runs/scale"), help="where they are written, and stay")
    scale.add_argument("--read", type=int, default=50_000, help="pictures to read at the end of each of three epochs")
    scale.add_argument("--workers", type=int, default=min(2, cli.cores()), help="data workers")

    guides = command("guide", "guides: cost and quality")
    cli.add(guides, "checkpoint", "dataset", "split", "seed", checkpoint="runs/pretrain")
    guides.add_argument("--mask-column", default="mask", help="column of object masks")
    guides.add_argument("--max-images", type=int, default=512, help="pictures, evenly spaced in the data")

    everything = command("all", "all but guide and scale, in minutes")
    everything.add_argument("--out", type=Path, default=Path("bench.md"), help="file for the tables")
    everything.add_argument("--tiny", action="store_true", help="rehearse: sizes that take seconds, figures of no use")
    for each in (step, load):
        each.add_argument("--image-size", type=int, default=224, help="side of the crops, in pixels")
    for each in (step, scale):
        cli.add(each, "model", model="base")
    for each, size in ((step, 8), (guides, 64)):
        cli.add(each, "batch-size", batch_size=size)
    for each in (step, everything):
        each.add_argument("--mae", type=Path, help="folder of facebookresearch/mae, to compare with it")
    for each in (step, cut):
        each.add_argument("--precision", choices=list(TYPES), default="no", help="type of the autocast")
    for each in (step, cut, load, guides):
        each.add_argument("--repeats", type=int, default=7, help="rounds, after two to warm up")
    for each in (step, cut, load, guides, scale):
        each.add_argument("--json", help="also write the figures to this file")
    return parser.parse_args(arguments)


def peer_of(model: smae.SMAE) -> torch.nn.Module:
    """transformers' ViTMAE of the same sizes as ``model``, with SDPA attention."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    sizes = model.config
    config = ViTMAEConfig(
        hidden_size=sizes["width"],
        num_hidden_layers=sizes["depth"],
        num_attention_heads=sizes["heads"],
        intermediate_size=4 * sizes["width"],
        decoder_hidden_size=sizes["decoder_width"],
        decoder_num_hidden_layers=sizes["decoder_depth"],
        decoder_num_attention_heads=sizes["decoder_heads"],
        decoder_intermediate_size=4 * sizes["decoder_width"],
        image_size=sizes["image_size"][0],
        patch_size=sizes["patch_size"],
        layer_norm_eps=1e-6,
        norm_pix_loss=True,
        attn_implementation="sdpa",
    )
    return ViTMAEForPreTraining(config)


def training_step(model: torch.nn.Module, loss: Callable[[], Tensor], images: Tensor, dtype) -> Callable[[], None]:
    """A function that does forward, backward and an optimizer's step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)

    def step():
        with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(contestants: dict[str, Callable[[], None]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each contestant in each of ``repeats`` rounds, after two rounds to warm up."""
    seconds = {name: [] for name in contestants}
    for repeat in range(repeats + 2):
        for name, run in contestants.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if repeat >= 2:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def bench_step(args: argparse.Namespace, device: torch.device) -> dict[str, list[float]]:
    """A training step of ours and of transformers'; guides, online and cached: the model itself, and a frozen one."""
    sizes = smae.PRESETS[args.model] | dict(image_size=args.image_size, patch_size=args.patch_size)
    ours = smae.SMAE(**sizes)
    peer = peer_of(ours).to(device).train()
    ours = ours.to(device).train()
    images = torch.randn(args.batch_size, 3, args.image_size, args.image_size, device=device)
    b, grid, dtype = args.batch_size, ours.grid(images), TYPES[args.precision]
    n = grid[0] * grid[1]
    guide, noise = Guide(ours, compile=args.compile), torch.rand(b, n, device=device)
    guide.maps = np.random.default_rng(0).random((b, *grid)).astype(np.float16)
    size = args.guide_side
    sizes = smae.PRESETS[args.guide_model] | dict(image_size=size, patch_size=args.guide_patch_size, decoder_depth=0)
    source = smae.SMAE(**sizes).to(device).eval()
    frozen = Guide(ours, source=source, source_name=args.guide_model, compile=args.compile)
    side = size // args.guide_patch_size
    frozen.maps = np.random.default_rng(0).random((b, side, side)).astype(np.float16)
    crops = Crops(np.tile(np.float32([0.1, 0.2, 0.5, 0.6]), (b, 1)), np.arange(b) % 2 == 0)
    batch = Batch(images, np.arange(b), [], np.zeros(b), crops)
    forward = torch.compile(ours, fullgraph=True) if args.compile else ours
    peer_forward = torch.compile(peer) if args.compile else peer

    def autocast(function: Callable) -> Callable:
        def run():
            with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype is not None):
                return function()

        return run

    others = {}
    if args.mae:
        mae = mae_of(args.mae, ours).to(device).train()
        others["facebookresearch/mae"] = training_step(mae, lambda: mae(images, mask_ratio=0.75)[0], images, dtype)
    features = autocast(lambda: guide.features(images, guide.layer))
    seen = features()

    return measure(
        {
            BASE: training_step(ours, lambda: forward(images, masks.random_mask(b, n, device=device)), images, dtype),
            "transformers": training_step(peer, lambda: peer_forward(images).loss, images, dtype),
            **others,
            "ours, cached guide": training_step(
                ours, lambda: forward(images, guide.mask(guide.cached_relevance(batch), noise)), images, dtype
            ),
            "cached guide alone": autocast(lambda: guide.mask(guide.cached_relevance(batch), noise)),
            "online guide alone": autocast(lambda: guide.mask(guide.relevance(images)[0], noise)),
            "of it the features": features,
            "of it all else": autocast(lambda: masks.self_guided_mask(seen, grid)),
            "frozen guide alone, online": autocast(lambda: frozen.mask(frozen.relevance(images)[0], noise)),
            "frozen guide alone, cached": autocast(lambda: frozen.mask(frozen.cached_relevance(batch), noise)),
        },
        args.repeats,
        device,
    )


def bench_cut(
    sides: list[int], batch_sizes: list[int], width: int, dtype: torch.dtype | None, repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """The solver alone against eigh, and all that follows the features, for several batches and grids."""

    def exact(affinity: Tensor) -> Tensor:
        w = affinity.clamp(min=1e-5)
        scale = w.sum(dim=-1).rsqrt()
        return torch.linalg.eigh(scale[:, :, None] * w * scale[:, None, :]).eigenvectors[..., -2] * scale

    seconds = {}
    for side in sides:
        for b in batch_sizes:
            n = side * side
            object_ = (torch.rand(b, n, 1, device=device) < 0.3).float()  # noisy features of objects and background
            features = torch.randn(b, n, width, device=device) + object_ * torch.randn(width, device=device)
            affinity = masks.similarity(features)

            def everything(features=features, side=side):
                with torch.autocast(device.type, dtype, enabled=dtype is not None):
                    masks.self_guided_mask(features, (side, side))

            contestants = {
                f"eigh, b {b}, n {n}": lambda affinity=affinity: exact(affinity),
                f"ours, b {b}, n {n}": lambda affinity=affinity: masks.normalized_cut(affinity),
                f"features to mask, b {b}, n {n}": everything,
            }
            times = measure(contestants, repeats, device)
            print(report(times, f"eigh, b {b}, n {n}"), flush=True)
            seconds |= times
    return seconds


def photograph(width: int, height: int, seed: int) -> bytes:
    """A JPEG with as much detail as a photograph: noise of all scales, and grain."""
    rng, total, cells = np.random.default_rng(seed), np.zeros((height, width, 3), np.float32), 4
    while cells < width:
        rows = cells * height // width + 1
        for channel in range(3):
            noise = Image.fromarray(rng.normal(size=(rows, cells)).astype(np.float32))
            total[..., channel] += cells**-0.8 * np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC))
        cells *= 2
    total = 0.8 * total.mean(axis=-1, keepdims=True) + 0.3 * total
    values = 128 + 55 * total / total.std() + rng.normal(size=(height, width, 1)) * 3
    buffer = io.BytesIO()
    Image.fromarray(values.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def bench_load(size: int, repeats: int, photographs: dict[str, int]) -> dict[str, list[float]]:
    """Seconds per picture of reading JPEGs from files, by ours and by torchvision's ImageFolder.

    Training crops and evaluation crops, as in facebookresearch/mae; and libjpeg alone, which
    decodes whole pictures from memory. ImageFolder's end as normalised floats; ours as bytes, which
    are normalised on the device.
    """
    torch.set_num_threads(1)
    normalize = [transforms.ToTensor(), transforms.Normalize(data.MEAN, data.STD)]
    bicubic = transforms.InterpolationMode.BICUBIC
    train = [transforms.RandomResizedCrop(size, (0.2, 1.0), interpolation=bicubic), transforms.RandomHorizontalFlip()]
    centre = [transforms.Resize(round(size / 0.875), interpolation=bicubic), transforms.CenterCrop(size)]
    options, found = CropOptions(size, (0.2, 1.0), seed=0, bad_limit=1), {}
    for name, count in photographs.items():
        with tempfile.TemporaryDirectory() as folder:
            encoded = [photograph(*map(int, name.split("x")), seed) for seed in range(count)]
            for number, content in enumerate(encoded):
                file = Path(folder) / "train" / "class" / f"{number}.jpg"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)
            dataset = data.load_images(folder)
            ours, ours_centred = MapCrops(dataset, options), EvalCrops(dataset, size, 0.875)
            theirs = ImageFolder(f"{folder}/train", transforms.Compose(train + normalize))
            theirs_centred = ImageFolder(f"{folder}/train", transforms.Compose(centre + normalize))

            epochs = itertools.count(1)

            def epoch(ours=ours, count=count, epochs=epochs):  # in batches, as in training
                number = next(epochs)
                for start in range(0, count, 64):
                    ours[Request(number, np.arange(start, min(start + 64, count)), size)]

            contestants = {
                "ImageFolder": lambda theirs=theirs: [theirs[i] for i in range(len(theirs))],
                "ours": epoch,
                "ImageFolder, centre": lambda theirs=theirs_centred: [theirs[i] for i in range(len(theirs))],
                "ours, centre": lambda ours=ours_centred, count=count: [ours[i] for i in range(count)],
                "libjpeg alone": lambda encoded=encoded: [simplejpeg.decode_jpeg(each) for each in encoded],
            }
            times = measure(contestants, repeats, torch.device("cpu"))
        times = {key: [value / count for value in values] for key, values in times.items()}
        print(f"\n{name}, {sum(map(len, encoded)) / count / 1000:.0f} kB each, to {size} px")
        print(report_rates(times), flush=True)
        found |= {f"{name}, {key}": values for key, values in times.items()}
    return found


def report_rates(seconds: dict[str, list[float]]) -> str:
    """A table: pictures per second of one core, 16 times that, and the ratio to ImageFolder's."""
    lines = [f"{'':24}{'images/s':>10}{'x 16 cores':>12}{'/ ImageFolder':>15}"]
    for name, values in seconds.items():
        base = seconds["ImageFolder, centre" if "centre" in name else "ImageFolder"]
        rate, ratio = 1 / statistics.median(values), statistics.median(a / b for a, b in zip(base, values))
        lines.append(f"{name:24}{rate:10.1f}{16 * rate:12.0f}{ratio:15.2f}")
    return "\n".join(lines)


def bench_guides(args: argparse.Namespace, device: torch.device) -> dict[str, list[float]]:
    """Guides of a checkpoint on random crops: what they add to a training step, and their rank-AUC against the object.

    Online at the usual layer and at half the depth; cached, which cuts the crops out of the
    relevance of whole pictures; and the floor that knows only the centre of the picture.
    """
    model = encoders.backbone(args.checkpoint, device)
    dataset = load_with_masks(args.dataset, args.split, None, args.mask_column, args.max_images)
    objects, size, depth = ObjectMasks(dataset, args.mask_column), tuple(model.config["image_size"]), len(model.blocks)
    batches = TrainBatches(dataset, size, min(args.batch_size, len(dataset)), seed=args.seed, device=device)
    guides = {
        f"online, layer {depth - 1} of {depth}": Guide(model),
        f"online, layer {-(-depth // 2)} of {depth}": Guide(model, layer=-(-depth // 2)),
        "cached": Guide(model, cached=True),
        "centre of the picture": Guide(model, source="centre", cached=True),
    }
    accelerator = cli.make_accelerator("no", 1)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        guides["cached"].cache_relevance(batches, accelerator, Path(folder) / "maps.npy")
        print(f"the pass of the cached guide: {len(dataset) / (time.perf_counter() - start):.0f} images/s")

        def scores(guide: Guide, batch: Batch, images: Tensor) -> Tensor:
            with torch.no_grad():
                return guide.cached_relevance(batch) if guide.cached else guide.relevance(images)[0]

        found: dict[str, list[Tensor]] = {name: [] for name in guides}
        for batch in batches.epoch(1):
            images = data.normalize(batch.images, *model.statistics)
            truth = objects.coverage(batch.indices, (64, 64))[:, None]
            boxes, flips = torch.as_tensor(batch.crops.boxes) * 64, torch.as_tensor(batch.crops.flips)
            share = crop_batch(truth, boxes, flips, model.grid(images), "area").flatten(1)
            shows = ((share > 0.5).float().mean(dim=1) - 0.5).abs() < 0.48
            for name, guide in guides.items():
                found[name].append(measures.rank_auc(scores(guide, batch, images).cpu()[shows], share[shows]))

        noise = torch.rand(images.shape[0], model.patch_count, device=device)
        random = masks.random_mask(*noise.shape, device=device)
        contestants = {BASE: training_step(model, lambda: model(images, random), images, None)}
        for name, guide in guides.items():
            contestants[name] = lambda guide=guide: guide.mask(scores(guide, batch, images), noise)
        seconds = measure(contestants, args.repeats, device)
    print(f"{'':30}{'share of a step':>16}{'rank-AUC':>10}")
    for name, parts in found.items():
        ratio, auc = statistics.median(a / b for a, b in zip(seconds[name], seconds[BASE])), torch.cat(parts)
        print(f"{name:30}{ratio:16.3f}{auc.nanmean().item():10.3f}")
    print(f"rank-AUC over {len(auc)} crops of {args.dataset} that show an object")
    return seconds


# ------------------------------------------------------------------------------ everything


class Tables:
    """A markdown file that grows section by section, so that nothing is lost if the command is cut off."""

    def __init__(self, file: Path, hardware: str):
        self.file, self.start = file, time.perf_counter()
        revision, here = "", Path(__file__).resolve().parent
        with contextlib.suppress(FileNotFoundError):  # no git
            command = ["git", "rev-parse", "--short", "HEAD"]
            revision = subprocess.run(command, cwd=here, capture_output=True, text=True).stdout.strip()
        versions = ", ".join(
            f"{name} {metadata.version(name)}" for name in ("torch", "torchvision", "accelerate", "pillow")
        )
        self.file.write_text(
            f"# bench.py all\n\n{hardware}, {cli.cores()} cores, {torch.get_num_threads()} threads; {versions}; "
            f"commit {revision or 'unknown'}\n"
        )

    def add(self, title: str, columns: list[str], rows: list[list]):
        lines = [f"\n## {title}\n", "| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
        lines += ["| " + " | ".join(f"{x:.4g}" if isinstance(x, float) else str(x) for x in row) + " |" for row in rows]
        with self.file.open("a") as file:
            file.write("\n".join(lines) + "\n")
        print("\n".join(lines), f"\n({time.perf_counter() - self.start:.0f} s so far)", flush=True)

    def add_times(self, title: str, seconds: dict[str, list[float]], base: str):
        """Medians in ms, and how many times as long as ``base``, in the same rounds."""
        rows = []
        for name, values in seconds.items():
            ratio = statistics.median(a / b for a, b in zip(values, seconds[base]))
            rows.append([name, 1000 * statistics.median(values), ratio])
        self.add(title, ["", "ms", f"/ {base}"], rows)


def mae_of(folder: Path, model: smae.SMAE) -> torch.nn.Module:
    """facebookresearch/mae, imported from its folder, of the sizes of ``model``."""
    sys.path.insert(0, str(folder))
    try:
        import models_mae
    finally:
        sys.path.remove(str(folder))
    sizes = model.config
    return models_mae.MaskedAutoencoderViT(
        img_size=sizes["image_size"][0],
        patch_size=sizes["patch_size"],
        embed_dim=sizes["width"],
        depth=sizes["depth"],
        num_heads=sizes["heads"],
        decoder_embed_dim=sizes["decoder_width"],
        decoder_depth=sizes["decoder_depth"],
        decoder_num_heads=sizes["decoder_heads"],
        norm_layer=functools.partial(torch.nn.LayerNorm, eps=1e-6),
        norm_pix_loss=True,
    )


def bench_all(args: argparse.Namespace, device: torch.device, hardware: str):
    """Everything that a reader may ask: reading, steps, guides, cuts, evaluation, whole runs, memory, ceilings."""
    tables, gpu, tiny = Tables(args.out, hardware), device.type == "cuda", args.tiny
    precision, repeats = cli.best_precision(), 2 if tiny else 5

    # a training step and the guides
    cases = [("tiny", 64, 8, 16 if tiny else 128)] if not gpu or tiny else [("base", 224, 16, 256)]
    cases += [("base", 224, 16, 8)] if not gpu and not tiny else []
    for name, side, patch, batch in cases:
        case = dict(
            model=name, image_size=side, patch_size=patch, batch_size=batch, precision=precision, repeats=repeats
        )
        case |= dict(guide_model="tiny" if tiny else "small", guide_side=side, guide_patch_size=patch)
        seconds = bench_step(argparse.Namespace(**case, compile=False, mae=args.mae), device)
        tables.add_times(f"Training step: {name}/{patch}, {side} px, batch {batch}, {precision}", seconds, BASE)

    # the cut
    sides, batches = ([4], [4]) if tiny else ([14, 24], [64, 256]) if gpu else ([14], [64])
    with contextlib.redirect_stdout(io.StringIO()):
        seconds = bench_cut(sides, batches, 64 if tiny else 768, TYPES[precision], repeats, device)
    tables.add_times("Bi-partition", seconds, next(iter(seconds)))

    # evaluation and whole runs, in processes of their own, whose memory can be measured
    count, epochs = (64, 1) if tiny else (4000, 2)
    with tempfile.TemporaryDirectory() as folder:
        common = ["--max-images", count, "--out"]
        runs = {
            "train.py, random masks": ["train.py", "--mask", "random"],
            "train.py, self-guided": ["train.py", "--guide-start", 1],
            "train.py, self-guided, --preload": ["train.py", "--guide-start", 1, "--preload"],
            "eval.py knn": ["eval.py", "knn", "--checkpoint", f"{folder}/0"],
            "eval.py linear": ["eval.py", "linear", "--checkpoint", f"{folder}/0"],
        }
        rows = []
        for number, (name, (script, *options)) in enumerate(runs.items()):
            if script == "train.py":
                options += ["--epochs", epochs, "--batch-size", 32 if tiny else 128]
            start = time.perf_counter()
            command = [sys.executable, "-c", PEAK, sys.executable, script]
            command += [*map(str, options), *map(str, common), f"{folder}/{number}"]
            done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)}: {done.stderr[-500:]}")
            records = Path(folder, str(number), "metrics.jsonl")
            rate = json.loads(records.read_text().splitlines()[-1])["images_per_second"] if records.exists() else ""
            peak = float(done.stdout.split()[-1])
            rows.append([name, time.perf_counter() - start, rate, peak])
        columns = ["", "s, all in all", "images/s in the last epoch", "GiB, largest process"]
        tables.add(f"Whole runs, {count} pictures of shapes", columns, rows)

    if gpu or tiny:
        bench_ceiling(tables, device, tiny)

    # reading, last: it confines torch to one thread
    with contextlib.redirect_stdout(io.StringIO()):
        kinds = {"500x375": 8} if tiny else PHOTOGRAPHS
        seconds = bench_load(32 if tiny else 224, 1 if tiny else 5, kinds)
    rows = []
    for name, values in seconds.items():
        kind = name.split(", ", 1)[0]
        base = seconds[f"{kind}, ImageFolder" + (", centre" if "centre" in name else "")]
        ratio = statistics.median(a / b for a, b in zip(base, values))
        rows.append([name, 1 / statistics.median(values), ratio])
    tables.add("Reading JPEGs, one core", ["", "images/s", "/ ImageFolder"], rows)
    print(f"wrote {args.out} in {time.perf_counter() - tables.start:.0f} s")


def bench_ceiling(tables: Tables, device: torch.device, tiny: bool):
    """What the hardware can do, and how near training comes to it."""
    n, dtype = 256 if tiny else 8192, torch.bfloat16
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    seconds = statistics.median(measure({"matmul": lambda: a @ b}, 10, device)["matmul"])
    ceiling = 2 * n**3 / seconds
    rows = []
    for name, batch in [("tiny", 8)] if tiny else [("base", 256), ("large", 128)]:
        sizes = smae.PRESETS[name] | (dict(image_size=64, patch_size=8) if tiny else {})
        for compiled in (False, True):
            model = smae.SMAE(**sizes).to(device)
            images = torch.randn(batch, 3, *model.config["image_size"], device=device)
            forward = torch.compile(model, fullgraph=True) if compiled else model

            def loss(model=model, images=images, forward=forward):
                return forward(images, masks.random_mask(len(images), model.patch_count, device=device))

            flops = FlopCounterMode(display=False)  # which does not know every attention kernel
            with flops, sdpa_kernel(SDPBackend.MATH), torch.autocast(device.type, dtype):
                loss(forward=model).backward()
            model.zero_grad()
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            step, start = training_step(model, loss, images, dtype), time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            first = time.perf_counter() - start
            seconds = statistics.median(measure({name: step}, 2 if tiny else 10, device)[name])
            peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else math.nan
            share = flops.get_total_flops() / seconds / ceiling
            label = f"{name}, batch {batch}" + ", --compile" * compiled
            rows.append([label, batch / seconds, 100 * share, peak, first])
    columns = ["bf16", "images/s", "% of the matmul ceiling", "peak GiB", "first step, s"]
    tables.add(f"Share of the ceiling: a matmul of {n} runs at {ceiling / 1e12:.3g} TFLOP/s", columns, rows)


# ------------------------------------------------------------------------------ scale


def write_shards(folder: Path, images: int, shards: int = 16):
    """Write parquet files of tiny JPEGs with labels, unless they are there."""
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(num_classes=1000))
    tiny = [photograph(16, 16, seed) for seed in range(1000)]
    for number in range(shards):
        file = folder / "data" / f"train-{number:05d}-of-{shards:05d}.parquet"
        rows = np.arange(images * number // shards, images * (number + 1) // shards)
        if file.exists() and pyarrow.parquet.read_metadata(file).num_rows == len(rows):
            continue
        file.parent.mkdir(parents=True, exist_ok=True)
        table = dict(image=[dict(bytes=tiny[i % 1000], path=None) for i in rows.tolist()], label=rows % 1000)
        table = pyarrow.table(table, schema=features.arrow_schema)
        with smae.whole_file(file) as part:
            pyarrow.parquet.write_table(table, part, use_dictionary=False, row_group_size=10_000)


def own_memory(process: int | str = "self") -> float:
    """Memory that a process shares with no other and no file, in MiB; NaN where /proc does not tell."""
    rollup = Path(f"/proc/{process}/smaps_rollup")
    if not rollup.exists():
        return math.nan
    line = next(line for line in rollup.read_text().splitlines() if line.startswith("Private_Dirty"))
    return int(line.split()[1]) / 1024


def bench_scale(args: argparse.Namespace) -> dict[str, str]:
    """Time and memory that a large data set costs besides reading its pictures."""
    found: dict[str, str] = {}

    def note(name: str, value: str):
        found[name] = value
        print(f"{name:58} {value}", flush=True)

    @contextlib.contextmanager
    def timed(name: str):
        start = time.perf_counter()
        yield
        note(name, f"{time.perf_counter() - start:.2f} s")

    def read(batches: TrainBatches, epoch: int, seen: int, count: int | None = None):
        with contextlib.closing(batches.epoch(epoch, seen)) as iterator:
            for _ in itertools.islice(iterator, count):
                pass

    datasets.disable_progress_bars()
    datasets.config.HF_DATASETS_CACHE = args.folder / "cache"
    shutil.rmtree(args.folder / "cache", ignore_errors=True)
    with timed(f"write {args.images:,} pictures"):
        write_shards(args.folder, args.images)
    source, size, batch = str(args.folder / "data"), 16, 256
    with timed("open for the first time (datasets copies into its cache)"):
        data.load_images(source, "train", None, "label")
    with timed("open again"):
        dataset = data.load_images(source, "train", None, "label")
    how = dict(size=size, batch_size=batch, workers=args.workers)
    batches = TrainBatches(dataset, **how)
    end = batches.steps_per_epoch * batch
    with timed("first batch of an epoch"):
        read(batches, 1, 0, 1)
    with timed("order and requests of an epoch"):
        batches.plan.micro_batches(2)
    half = end // 2 // batch * batch
    with timed("first batch when resumed in the middle of an epoch"):
        read(batches, 2, half, 1)

    workers = [process.pid for process in batches.reader.workers.processes]
    for epoch in (3, 4, 5):
        start = time.perf_counter()
        read(batches, epoch, max(0, end - args.read // batch * batch))
        rate = min(args.read, end) / (time.perf_counter() - start)
        memory = f"main process {own_memory():.0f} MiB"
        memory += "".join(f", a worker {own_memory(pid):.0f} MiB" for pid in workers[:1])
        note(f"epoch {epoch - 2}, its last {args.read:,} pictures", f"{rate:.0f} images/s; {memory}")
    batches.close()

    stream = TrainBatches(data.load_images(source, "train", None, "label", streaming=True), length=args.images, **how)
    with timed("stream: first batch"):
        read(stream, 1, 0, 1)
    with timed("stream: first batch when resumed in the middle of an epoch"):
        read(stream, 1, half, max(1, args.workers))  # a batch of each worker, with the lengths it found
    with timed("the same with the lengths of the shards, as a checkpoint has them"):
        read(stream, 1, half, max(1, args.workers))
    stream.close()

    file, part = args.folder / "relevance.npy", np.random.default_rng(0).random((batch, 14, 14)).astype(np.float16)
    with timed("cached guide: write the maps of all pictures (196 patches)"):
        parts = (part[: args.images - start] for start in range(0, args.images, batch))
        write_maps(file, parts, (args.images, 14, 14))
    note("cached guide: their size", f"{file.stat().st_size / args.images:.0f} bytes a picture")
    maps = np.load(file, mmap_mode="r")
    with timed("cached guide: read the maps of 100 batches"):
        for indices in batches.plan.micro_batches(6)[:100]:
            maps[indices].astype(np.float32)

    model = smae.SMAE(**smae.PRESETS[args.model])
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = dict(optimizer=optimizer.state_dict(), config=dict(model=model.config))
    with timed(f"write a checkpoint of {args.model}"):
        checkpoint.write(args.folder, 1, model, state)
    content = sum(file.stat().st_size for file in (args.folder / "checkpoint-00000001").iterdir())
    note("its size", f"{content / 1e9:.2f} GB")
    with timed("read it"):
        checkpoint.read(args.folder / "checkpoint-00000001")
    checkpoint.remove_all(args.folder)
    return found


def report(seconds: dict[str, list[float]], base: str) -> str:
    """A table: median, least and most milliseconds, and the ratio to ``base``."""
    lines = [f"{'':34}{'median ms':>10}{'min':>9}{'max':>9}{'/ ' + base:>24}"]
    for name, values in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(values, seconds[base]))
        ms = [1000 * x for x in (statistics.median(values), min(values), max(values))]
        lines.append(f"{name:34}{ms[0]:10.1f}{ms[1]:9.1f}{ms[2]:9.1f}{ratio:24.4f}")
    return "\n".join(lines)


def paper_step_times(device: torch.device, batch: int) -> dict[str, list[float]]:
    """Seconds of training steps of ViT-B/16 with random and AMT masks, and of the relevance of all patches."""
    model = smae.SMAE(**smae.PRESETS["base"]).to(device)
    images, n = torch.randn(batch, 3, 224, 224, device=device), model.patch_count
    weights, guide = torch.rand(batch, n, device=device), Guide(model)

    def relevance():
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            guide.mask(guide.relevance(images)[0], weights)

    def step(mask: Callable) -> Callable:
        return training_step(model, lambda: model(images, mask()), images, torch.bfloat16)

    contestants = {
        "random": step(lambda: masks.random_mask(batch, n, device=device)),
        "amt": step(lambda: masks.amt_mask(weights)),
        "relevance": relevance,
    }
    return measure(contestants, 5, device)


def main():
    args = parse_arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU"
    torch.manual_seed(0)
    where = f"{hardware}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    if args.command == "all":
        return bench_all(args, device, hardware)
    if args.command == "step":
        case = f"{args.model}/{args.patch_size} at {args.image_size} px, batch {args.batch_size}"
        print(f"{case}, precision {args.precision}, {where}", flush=True)
        seconds = bench_step(args, device)
        print(report(seconds, BASE))
    elif args.command == "cut":
        print(f"precision {args.precision}, {where}", flush=True)
        seconds = bench_cut(args.sides, args.batch_sizes, args.width, TYPES[args.precision], args.repeats, device)
    elif args.command == "load":
        print(f"one core of {platform.machine()}, torch {torch.__version__}, simplejpeg {simplejpeg.__version__}")
        seconds = bench_load(args.image_size, args.repeats, PHOTOGRAPHS)
    elif args.command == "scale":
        print(f"{args.workers} workers on {cli.cores()} cores of {platform.machine()}, datasets {datasets.__version__}")
        seconds = bench_scale(args)
    else:
        seconds = bench_guides(args, device)
    if args.json:
        content = dict(arguments=vars(args), hardware=hardware, torch=torch.__version__, seconds=seconds)
        Path(args.json).write_text(json.dumps(content, default=str))


if __name__ == "__main__":
    main()
