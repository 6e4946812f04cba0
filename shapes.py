"""The demo data ``shapes``: textured shapes on textured backgrounds, drawn by code."""

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

SHAPE_NAMES = [
    "disc",
    "square",
    "triangle",
    "star",
    "ring",
    "cross",
    "crescent",
    "heart",
    "half-disc",
    "bar",
    "arrow",
    "dumbbell",
]
COUNTS = {"train": 4000, "test": 1000}  # pictures in each split


def load_shapes(split: str = "train", size: int = 64, easy: bool = False) -> datasets.Dataset:
    """Load the demo data: 4,000 pictures in split "train", 1,000 in "test", of ``size`` pixels.

    Each shows one of 12 shapes. Columns: ``image``; ``label``, the shape; ``mask``, 255 on the
    object; ``bbox``, its [x, y, width, height] in pixels. Colours, textures, position, angle and
    area (5-50 % of the picture) are random and do not depend on the label. ``easy`` pictures show
    upright shapes with textures a quarter as strong, which a model learns within minutes.

    The pictures are drawn once and cached by ``datasets``. Raises ValueError for another split.
    """
    if split not in COUNTS:
        raise ValueError(f"Unknown split {split!r}: expected one of {list(COUNTS)}")
    features = datasets.Features(
        image=datasets.Image(),
        label=datasets.ClassLabel(names=SHAPE_NAMES),
        mask=datasets.Image(),
        bbox=datasets.List(datasets.Value("float32"), length=4),
    )
    arguments = dict(split=split, count=COUNTS[split], size=size, easy=easy)
    arguments["version"] = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    return datasets.Dataset.from_generator(
        draw_shapes, features, gen_kwargs=arguments, split=datasets.NamedSplit(split)
    )


def draw_shapes(split: str, count: int, size: int, easy: bool = False, version: str = "") -> Iterator[dict]:
    """Draw the first ``count`` records of a split.

    ``version`` is only for the cache of ``datasets``: new code gets new drawings.
    """
    for index in range(count):
        rng = np.random.default_rng((list(COUNTS).index(split), index))
        yield _draw_record(rng, index % len(SHAPE_NAMES), size, easy)


def _draw_record(rng: np.random.Generator, label: int, size: int, easy: bool) -> dict:
    shape = _draw_mask(rng, SHAPE_NAMES[label], size, upright=easy)
    colours = _draw_colours(rng, calm=easy)
    background = _draw_texture(rng, size, *colours[:2])
    foreground = _draw_texture(rng, size, *colours[2:])

    cover = shape.reshape(size, 2, size, 2).mean((1, 3))  # drawn at twice the size, for smooth edges
    pixels = background + cover[..., None] * (foreground - background)
    pixels = pixels + rng.normal(0, 6, pixels.shape)

    inside = cover > 0.5
    rows, columns = np.nonzero(inside)
    x, y = columns.min(), rows.min()
    return {
        "image": Image.fromarray(pixels.clip(0, 255).astype(np.uint8)),
        "label": label,
        "mask": Image.fromarray(np.where(inside, 255, 0).astype(np.uint8)),
        "bbox": [x, y, columns.max() + 1 - x, rows.max() + 1 - y],
    }


def _draw_colours(rng: np.random.Generator, calm: bool) -> np.ndarray:
    """Two colours of the background, two of the object: (4, 3). ``calm`` pairs differ little."""
    colours = rng.uniform(0, 255, (4, 3))
    while np.linalg.norm(colours[:2].mean(0) - colours[2:].mean(0)) < 90:  # the object must stand out
        colours = rng.uniform(0, 255, (4, 3))
    if calm:
        pairs = colours.reshape(2, 2, 3)
        colours = (pairs / 4 + pairs.mean(1, keepdims=True) * 3 / 4).reshape(4, 3)
    return colours


def _draw_mask(rng: np.random.Generator, name: str, size: int, upright: bool) -> np.ndarray:
    """A shape of random angle (unless ``upright``), area, position: (2 * size, 2 * size) bool."""
    angle = (0 if upright else 2 * math.pi) * rng.random()
    area = rng.uniform(0.07, 0.3) * size * size
    unit = np.linspace(-1, 1, 64)
    filled = _inside(name, unit[None, :], unit[:, None]).mean()  # share of the square [-1, 1] x [-1, 1]
    radius = min(math.sqrt(area / (4 * filled)), 0.49 * size)
    y, x = rng.uniform(radius, size - radius, 2)

    side = (np.arange(2 * size) + 0.5) / 2  # in pixels of the picture
    u = (side[None, :] - x) / radius
    v = (side[:, None] - y) / radius
    return _inside(name, *_turn(u, v, angle))


def _turn(u: np.ndarray, v: np.ndarray, angle: float) -> tuple[np.ndarray, np.ndarray]:
    cos, sin = math.cos(angle), math.sin(angle)
    return u * cos + v * sin, v * cos - u * sin


def _inside(name: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Whether points (u, v) lie in the shape, which fits the unit disc."""
    r, angle = np.hypot(u, v), np.arctan2(v, u)

    def polygon(corners: int) -> np.ndarray:
        sector = math.pi / corners
        return r * np.cos((angle % (2 * sector)) - sector) < math.cos(sector)

    if name == "disc":
        return r < 1
    if name == "square":
        return polygon(4)
    if name == "triangle":
        return polygon(3)
    if name == "star":
        fifth = math.pi / 5
        fold = np.abs((angle % (2 * fifth)) - fifth) / fifth  # 1 at a tip, 0 between two
        return r < 0.45 / (1 - 0.55 * fold)
    if name == "ring":
        return (r < 1) & (r > 0.6)
    if name == "cross":
        return (np.minimum(np.abs(u), np.abs(v)) < 0.3) & (np.maximum(np.abs(u), np.abs(v)) < 0.95)
    if name == "crescent":
        return (r < 1) & (np.hypot(u - 0.55, v) > 0.75)
    if name == "heart":
        x, y = 1.2 * u, 1.2 * v + 0.1
        return (x * x + y * y - 0.8) ** 3 < 1.6 * x * x * y**3
    if name == "half-disc":
        return (r < 1) & (u > 0)
    if name == "bar":
        return (np.abs(u) < 0.95) & (np.abs(v) < 0.3)
    if name == "arrow":
        shaft = (np.abs(v) < 0.2) & (np.abs(u + 0.3) < 0.6)
        head = (u > 0.1) & (u + np.abs(v) < 0.95) & (np.abs(v) < 0.75)
        return shaft | head
    weights = np.hypot(np.abs(u) - 0.6, v) < 0.4  # dumbbell
    return weights | ((np.abs(v) < 0.14) & (np.abs(u) < 0.6))


def _draw_texture(rng: np.random.Generator, size: int, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """A random texture between two colours (3,): (size, size, 3)."""
    y, x = np.mgrid[:size, :size] / size
    angle = rng.uniform(0, math.pi)
    frequency = rng.uniform(2, 9)
    phase = rng.uniform(0, 2 * math.pi, 2)
    u, v = _turn(x, y, angle)
    wave = np.sin(2 * math.pi * frequency * u + phase[0])
    kind = rng.integers(5)
    if kind == 0:  # stripes
        t = wave
    elif kind == 1:  # checks
        t = np.sign(wave * np.sin(2 * math.pi * frequency * v + phase[1]))
    elif kind == 2:  # wavy stripes
        t = np.sin(2 * math.pi * frequency * u + 3 * np.sin(2 * math.pi * 2 * v + phase[1]))
    elif kind == 3:  # clouds
        coarse = rng.normal(size=(9, 9)).astype(np.float32)
        t = np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC))
    else:  # a gradient
        t = 2 * u - 1
    return first + (second - first) * ((t + 1) / 2).clip(0, 1)[..., None]
