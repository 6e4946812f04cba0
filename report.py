"""A report of several findings in one HTML file that needs nothing else: figures, tables, patches to point at."""

import base64
import html
import io
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

import data
import masks
import pictures
from looks import Subject

MOST_ROWS = 16  # of patches in the explorer; more are averaged, or the page becomes too large
TEMPLATE = Path(__file__).with_name("explore.html")


@dataclass
class Finding:
    """What a command found: figures by name, numbers to keep, and what had to be left out."""

    figures: dict[str, Figure] = field(default_factory=dict)
    numbers: dict = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    def with_figures(self, figures: dict[str, Figure]) -> "Finding":
        self.figures = figures
        return self

    def text(self, name: str, about: str) -> str:
        """The numbers as lines for the terminal."""
        lines = [f"\n{name}: {about}"] + [f"  left out: {what}" for what in self.left_out]
        return "\n".join(lines + _lines(self.numbers, 1))


def _lines(numbers: dict, depth: int) -> list[str]:
    lines = []
    for key, value in numbers.items():
        if isinstance(value, dict) and any(isinstance(x, dict) and "mean" not in x for x in value.values()):
            lines += [f"{'  ' * depth}{key}", *_lines(value, depth + 1)]
        elif isinstance(value, dict) and "mean" not in value:
            cells = ", ".join(f"{name} {shown(inner)}" for name, inner in value.items())
            lines.append(f"{'  ' * depth}{key}: {cells}")
        else:
            lines.append(f"{'  ' * depth}{key}: {shown(value)}")
    return lines


def shown(value) -> str:
    """A number, a mean with its deviation, or a list of numbers."""
    if isinstance(value, dict):
        return "none" if value["mean"] is None else f"{value['mean']:.4g} ± {value['deviation']:.2g}"
    if isinstance(value, (list, tuple)):
        return "[" + " ".join(shown(x) for x in value) + "]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# ------------------------------------------------------------------------------ the page

CAPTIONS = {  # what to see, and what the paper reports
    "layers": (
        "The cut (the side that is not the object is blue), relevance, and the most relevant patches hatched. "
        "The paper: the last layers of the encoder find objects best, so that one of them guides."
    ),
    "relations": (
        "Similarities of all pairs of patches, of each patch to their mean, and the attention of the CLS "
        "token. Each map spans its own range of values, so compare patterns, not brightness. The paper: an "
        "MAE's similarity matrix has clear blocks, and its mean patch lies in one of them."
    ),
    "variance": (
        "Higher means: the patches of a picture are told apart better. Bars are deviations over pictures. The "
        "paper: MAE's features and similarities vary more than those of supervised and contrastive encoders."
    ),
    "progress": (
        "Left: how much more alike (or attended to) patches of one cluster are; middle: how far token "
        "relations are from those at the end; right: what the decoder draws on. The paper: clusters appear "
        "within the first epochs and hardly change; mask tokens come to be exploited as much as visible ones."
    ),
    "attention": (
        "Dots are heads, lines their means. Long distances and low information: global patterns, which an "
        "untrained encoder has as well. The paper: guided masks make the attention of an MAE more global."
    ),
    "fourier": ("Higher curves: more high frequencies. The paper: guided masks make MAE use more high frequencies."),
    "tokens": (
        "Left: what the paper measures, which grows with the length of tokens; right: of their directions "
        "alone. The paper: with guided masks, mask tokens vary more."
    ),
    "clusters": (
        "Patches in the colours of their clusters, matched between encoders; below, the same patches by "
        "t-SNE, a cloud for each picture. The paper: guided masks make clusters finer."
    ),
    "reconstruction": (
        "Mean squared error of masked patches under random masks, the same for all models of as many patches, "
        "and under the masks that each model makes for itself, with hints and without. Compare models with "
        "one another only if they predict the same target. The paper: hints lower the error."
    ),
}


def write(findings: dict[str, Finding], abouts: dict[str, str], arguments: dict, explorer: dict) -> str:
    """The report as one HTML page; ``explorer`` is the result of :func:`explore`."""
    parts = []
    for name, found in findings.items():
        parts.append(
            f"<h2 id={name}>{name.capitalize()}</h2><p><b>{html.escape(abouts[name])}</b> {CAPTIONS[name]}</p>"
        )
        for title, figure in found.figures.items():
            parts.append(f'<img loading=lazy alt="{html.escape(f"{name}: {title}")}" src="{_png(figure)}">')
        parts += [f"<p class=out>Left out: {html.escape(what)}.</p>" for what in found.left_out]
        if found.numbers:
            text = html.escape("\n".join(_lines(found.numbers, 0)))
            parts.append(
                f"<details><summary>numbers (mean ± deviation over pictures)</summary><pre>{text}</pre></details>"
            )
    private = ("command", "checkpoint", "out", "overwrite")
    public = {k: Path(v).name if k == "dataset" else v for k, v in arguments.items()}  # paths concern nobody
    options = ", ".join(f"{k} {v}" for k, v in public.items() if v is not None and v is not False and k not in private)
    page = TEMPLATE.read_text(encoding="utf-8")
    for mark, content in {
        "<!--FINDINGS-->": "\n".join(parts),
        "<!--OPTIONS-->": html.escape(options),
        "/*DATA*/null": json.dumps(explorer).replace("<", "\\u003c"),
    }.items():
        page = page.replace(mark, content)
    return page


def _png(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90)
    return _as_address(buffer.getvalue(), "image/png")


def _as_address(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def explore(
    subjects: list[Subject], rows: Tensor, layers: list | None, foreground: str, scoring: str, ratio: float, k: int
) -> dict:
    """What the explorer shows for the pictures ``rows``: by encoder and layer, similarities and attention in bytes.

    Similarities -1 ... 1 become 0 ... 255; attention and relevance span each picture's own range.
    """
    with torch.no_grad():
        return dict(
            pictures=[_jpeg(picture) for picture in pictures.displayable(subjects[0].images[rows])],
            encoders=[
                _explored(each, rows, layers, foreground, scoring, ratio, k)
                for each in subjects
                if not each.model or not layers or set(layers) & set(each.model.layers)
            ],
        )


def _explored(subject: Subject, rows: Tensor, layers, foreground, scoring, ratio: float, k: int) -> dict:
    x = data.normalize(subject.images[rows].to(subject.device), *subject.encoder.statistics)
    depth = len(subject.model.blocks) if subject.model else 1
    usual = list(dict.fromkeys([-(-depth // 4), -(-depth // 2), max(1, depth - 1), depth]))
    chosen = [layer for layer in layers or usual if layer in subject.model.layers] if subject.model else [None]
    prefix, found = subject.model.prefix if subject.model else 0, []
    attentions = {}
    if subject.model and subject.model.config["class_token"]:
        attentions = {layer: a.mean(dim=1)[:, 0, prefix:] for layer, _, a in subject.model.trace(x) if layer in chosen}
    (h, w), name = subject.grid, subject.name
    small = min(h, MOST_ROWS), min(w, MOST_ROWS)
    if small != (h, w):
        name += f" ({h} x {w} patches, averaged to {small[0]} x {small[1]})"

    def reduced(values: Tensor) -> Tensor:  # (b, n, ...) to the patches of the page
        image = values.float().flatten(2) if values.ndim > 2 else values.float()[..., None]
        image = F.adaptive_avg_pool2d(image.mT.unflatten(2, (h, w)), small).flatten(2).mT
        return image if values.ndim > 2 else image[..., 0]

    attentions = {layer: reduced(values) for layer, values in attentions.items()}
    for layer in chosen:
        tokens = subject.features(x, layer)
        relevance, _ = masks.find_object(tokens, subject.grid, foreground, scoring)
        masked = masks.informed_mask(relevance, ratio, "none").masked
        hidden = (reduced(torch.zeros_like(relevance).scatter(1, masked, 1)) > 0.5).float()
        tokens = reduced(tokens)
        similarity = masks.similarity(tokens)
        found.append(
            dict(
                layer="pixels" if layer is None else str(layer),
                similarity=[_bytes((each + 1) / 2) for each in similarity],
                attention=[_bytes(_spanned(each)) for each in attentions[layer]] if layer in attentions else None,
                clusters=[_bytes(each / 255) for each in masks.cluster(tokens, min(k, tokens.shape[1]))],
                mask=[_bytes(each) for each in hidden],
            )
        )
    rows, columns = small
    return dict(name=name, rows=rows, columns=columns, layers=found)


def _spanned(values: Tensor) -> Tensor:
    return (values - values.min()) / (values.max() - values.min()).clamp(min=1e-12)


def _bytes(values: Tensor) -> str:
    """Values in 0 ... 1 as bytes, in base 64."""
    return base64.b64encode(
        (values.float() * 255).round().clamp(0, 255).to(torch.uint8).cpu().numpy().tobytes()
    ).decode()


def _jpeg(picture: np.ndarray) -> str:
    image, buffer = Image.fromarray((picture * 255).round().astype(np.uint8)), io.BytesIO()
    scale = max(1, round(224 / image.height))
    image.resize((image.width * scale, image.height * scale), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=85)
    return _as_address(buffer.getvalue(), "image/jpeg")
