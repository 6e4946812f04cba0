"""Speed, side by side in one process.

    python bench.py step        # a training step of ours against transformers' ViTMAE, and what the guides cost
    python bench.py step --model base --batch-size 8 --precision bf16 --json step.json
    python bench.py cut         # the bi-partition against torch.linalg.eigh, and all that follows the features
    python bench.py load        # reading JPEGs against torchvision's ImageFolder with MAE's augmentation, on one core

In ``step`` both models see the same batch, draw their random masks inside the step, and use SDPA and fused
AdamW. Times are medians over --repeats rounds; in every round each contestant runs once, so that a
noisy machine treats them alike, and the ratios are medians of the ratios of the rounds.
"""

import argparse
import io
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.datasets import ImageFolder

import cli
import data
import masks
import smae
from batches import Batch, EvalCrops
from cropping import CropOptions, Crops
from guide import Guide
from readers import MapCrops, Request

BASE = "ours, random masks"
PHOTOGRAPHS = {"500x375": 100, "1600x1200": 24, "4000x3000": 6}  # width x height, and how many are read in a round
TYPES = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure speed, side by side.")
    commands = parser.add_subparsers(dest="command", required=True)
    step = commands.add_parser(
        "step", help="a training step against transformers' ViTMAE", formatter_class=cli.HelpFormatter
    )
    step.add_argument("--model", choices=list(smae.PRESETS), default="base", help="size of the encoder")
    step.add_argument("--image-size", type=int, default=224, help="side of the images, in pixels")
    step.add_argument("--patch-size", type=int, default=16, help="side of a patch, in pixels")
    step.add_argument("--batch-size", type=int, default=8, help="images per step")
    step.add_argument("--guide-model", choices=list(smae.PRESETS), default="small", help="size of a frozen guide")
    step.add_argument("--guide-side", type=int, default=224, help="side of the images that it sees, in pixels")
    step.add_argument("--guide-patch-size", type=int, default=14, help="side of its patches, in pixels")
    step.add_argument("--compile", action="store_true", help="compile both models")

    cut = commands.add_parser(
        "cut", help="the bi-partition against torch.linalg.eigh", formatter_class=cli.HelpFormatter
    )
    cut.add_argument("--batch-sizes", type=int, nargs="+", default=[64, 256], help="images")
    cut.add_argument("--sides", type=int, nargs="+", default=[14, 24], help="sides of the patch grid, in patches")
    cut.add_argument("--width", type=int, default=768, help="width of the features")

    load = commands.add_parser("load", help="reading JPEGs, on one core", formatter_class=cli.HelpFormatter)
    load.add_argument("--image-size", type=int, default=224, help="side of the crops, in pixels")
    for command in (step, cut, load):
        if command is load:
            command.add_argument("--repeats", type=int, default=7, help="rounds, after two to warm up")
            command.add_argument("--json", help="also write the figures to this file")
            continue
        command.add_argument("--precision", choices=list(TYPES), default="no", help="type of the autocast")
        command.add_argument("--repeats", type=int, default=10, help="rounds, after two to warm up")
        command.add_argument("--json", help="also write the figures to this file")
    return parser.parse_args()


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
    frozen = smae.SMAE(**sizes).to(device).eval()
    frozen = Guide(ours, source=frozen, source_name=args.guide_model, compile=args.compile)
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

    features = autocast(lambda: guide.features(images, guide.layer))
    seen = features()

    return measure(
        {
            BASE: training_step(ours, lambda: forward(images, masks.random_mask(b, n, device=device)), images, dtype),
            "transformers": training_step(peer, lambda: peer_forward(images).loss, images, dtype),
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


def bench_load(size: int, repeats: int) -> dict[str, list[float]]:
    """Seconds per picture of reading JPEGs from files, by ours and by torchvision's ImageFolder.

    Training crops and evaluation crops, as in facebookresearch/mae; and libjpeg alone, which
    decodes whole pictures from memory.
    """
    torch.set_num_threads(1)
    normalize = [transforms.ToTensor(), transforms.Normalize(data.MEAN, data.STD)]
    bicubic = transforms.InterpolationMode.BICUBIC
    train = [transforms.RandomResizedCrop(size, (0.2, 1.0), interpolation=bicubic), transforms.RandomHorizontalFlip()]
    centre = [transforms.Resize(round(size / 0.875), interpolation=bicubic), transforms.CenterCrop(size)]
    options, found = CropOptions(size, (0.2, 1.0), seed=0, bad_limit=1), {}
    for name, count in PHOTOGRAPHS.items():
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

            def epoch(ours=ours, count=count):  # in batches, as in training
                for start in range(0, count, 64):
                    ours[Request(1, np.arange(start, min(start + 64, count)), size)]

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
    """A table: pictures per second of one core and of 16, and the ratio to ImageFolder's."""
    lines = [f"{'':24}{'images/s':>10}{'16 cores':>10}{'/ ImageFolder':>15}"]
    for name, values in seconds.items():
        base = seconds["ImageFolder, centre" if "centre" in name else "ImageFolder"]
        rate, ratio = 1 / statistics.median(values), statistics.median(a / b for a, b in zip(base, values))
        lines.append(f"{name:24}{rate:10.1f}{16 * rate:10.0f}{ratio:15.2f}")
    return "\n".join(lines)


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
    if args.command == "step":
        print(f"{args.model}/{args.patch_size} at {args.image_size} px, batch {args.batch_size}", end=", ")
    if args.command == "load":
        print(f"one core of {platform.machine()}, torch {torch.__version__}, simplejpeg {simplejpeg.__version__}")
    else:
        print(
            f"precision {args.precision}, {hardware}, {torch.get_num_threads()} threads, torch {torch.__version__}",
            flush=True,
        )
    if args.command == "step":
        seconds = bench_step(args, device)
    elif args.command == "load":
        seconds = bench_load(args.image_size, args.repeats)
    else:
        seconds = bench_cut(args.sides, args.batch_sizes, args.width, TYPES[args.precision], args.repeats, device)
    if args.command == "step":
        print(report(seconds, BASE))
    if args.json:
        arguments = vars(args)
        with open(args.json, "w") as file:
            json.dump(dict(arguments=arguments, hardware=hardware, torch=torch.__version__, seconds=seconds), file)


if __name__ == "__main__":
    main()
