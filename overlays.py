"""Dense predictions as pictures: label maps in colours, boxes and masks with names and scores.

Letters in shapes: ``c`` channels, ``k`` objects, ``H``/``W`` image height/width in pixels.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torchvision.utils
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image
from torch import Tensor

import pictures
from label_maps import IGNORED

LEAST_SIDE = 256  # of a picture with boxes and names, in pixels


def palette(count: int) -> np.ndarray:
    """Colours (count, 3) uint8 of classes, those of Pascal VOC: the bits of the class, dealt out to the channels."""
    index, colours = np.arange(count), np.zeros((count, 3), np.int64)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= (index >> (3 * bit + channel) & 1) << (7 - bit)
    return colours.astype(np.uint8)


def label_picture(labels: Tensor, classes: int) -> Image.Image:
    """A label map (H, W) as a picture with a palette; of more than 256 ``classes``, of 16 bits without one."""
    values = labels.cpu().numpy()
    if classes > 256:
        return Image.fromarray(values.astype(np.uint16))
    picture = Image.fromarray(values.astype(np.uint8), mode="P")
    picture.putpalette(palette(256).tobytes())
    return picture


def tinted(image: Tensor, labels: Tensor, classes: int) -> Tensor:
    """A picture (c, H, W) uint8 in the colours of its label map (H, W); IGNORED pixels white: (3, H, W) uint8."""
    colours = torch.from_numpy(palette(classes).astype(np.float32))
    painted = colours[labels.clamp(min=0).cpu()].movedim(-1, 0)
    mixed = (0.6 * painted + 0.4 * three_channels(image)).round()
    return torch.where(labels.cpu() == IGNORED, 255, mixed).to(torch.uint8)


def three_channels(image: Tensor) -> Tensor:
    """A picture (c, H, W) as (3, H, W): grey, RGB, or the first three channels."""
    image = image.as_subclass(Tensor).cpu()
    return image[:3] if len(image) >= 3 else image[:1].expand(3, -1, -1)


def boxed(image: Tensor, boxes: Tensor, masks: Tensor | None, labels: Sequence[int], names: Sequence[str]) -> Tensor:
    """A picture (c, H, W) uint8 with boxes (k, 4), masks (k, H, W) bool and names: (3, H', W') uint8.

    A small picture is enlarged, so that names can be read. ``labels`` (k,) choose the colours.
    """
    image = three_channels(image)
    factor = -(-LEAST_SIDE // min(image.shape[1:]))
    image = image.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    if not len(boxes):
        return image
    colours = [tuple(map(int, palette(256)[1 + label % 255])) for label in labels]
    if masks is not None:
        masks = masks.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
        image = torchvision.utils.draw_segmentation_masks(image, masks, alpha=0.5, colors=colours)
    width = max(1, round(min(image.shape[1:]) / 200))
    return torchvision.utils.draw_bounding_boxes(image, boxes * factor, list(names), colours, width=width)


def as_picture(image: Tensor) -> Image.Image:
    """A picture (3, H, W) uint8 as a PIL image."""
    return Image.fromarray(np.ascontiguousarray(image.movedim(0, -1).numpy()))


def sheet(rows: list[tuple[Tensor, ...]], titles: Sequence[str], text: str, legend: dict[str, tuple]) -> Figure:
    """A figure of rows of pictures (3, H, W) uint8, fitted into frames of one size, and a ``legend`` of colours."""
    fitted = [[_fitted(picture) for picture in row] for row in rows]
    width, height = (max(sizes) for sizes in zip(*(picture.size for row in fitted for picture in row)))
    columns = {}
    for i, title in enumerate(titles):
        columns[title] = np.stack([_framed(row[i], width, height) for row in fitted])
    figure = pictures.contact_sheet(columns, text)
    if legend:
        patches = [Patch(color=colour, label=name.replace("$", r"\$")) for name, colour in legend.items()]
        figure.legend(handles=patches, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


def _fitted(image: Tensor, side: int = 384) -> Image.Image:
    """A picture (3, H, W) whose long side has ``side`` pixels."""
    image = as_picture(image)
    factor = side / max(image.size)
    how = Image.Resampling.NEAREST if factor >= 2 else Image.Resampling.BILINEAR
    return image.resize([max(1, round(length * factor)) for length in image.size], how)


def _framed(image: Image.Image, width: int, height: int) -> np.ndarray:
    """A picture in the middle of a white frame: (height, width, 3), in 0 ... 1."""
    canvas = Image.new("RGB", (width, height), "white")
    canvas.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
    return np.asarray(canvas) / 255
