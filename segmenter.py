"""Semantic segmentation with a ViT encoder: a linear head on a frozen encoder, or UPerNet on a trained one.

Imports nothing of ours: an encoder is any module with the methods of ``smae.SMAE``.

Letters in shapes: ``b`` batch, ``c`` channels, ``d`` width, ``h``/``w`` cells of a feature map, ``H``/``W`` image
height/width in pixels.

Sources: UPerNet (Xiao et al., ECCV 2018, arXiv 1807.10221), on a ViT as in BEiT and MAE.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEADS = ("linear", "upernet")
IGNORED = -1  # the label of pixels that are neither trained on nor scored
POOLS = (1, 2, 3, 6)  # cells of UPerNet's pyramid pooling
AUXILIARY_WEIGHT = 0.4  # of the loss of UPerNet's auxiliary head


class Segmenter(nn.Module):
    """A copy of an encoder with a head that gives every pixel a class.

    ``head``: "linear", BatchNorm and a 1x1 convolution on the patch tokens, whose encoder is frozen;
    or "upernet". ``blocks``: the encoder blocks (counted from 1) whose tokens the head reads: any
    number for the linear head (default: the last), four for UPerNet (default: after 1/3, 1/2, 2/3
    and all of them). ``width``: channels of UPerNet. ``side`` and ``slide``: the short side, in
    pixels, that pictures should have, and whether they are seen through a window of that side.
    Raises ValueError where these make no sense.
    """

    task = "segmenter"

    def __init__(
        self,
        encoder: nn.Module,
        classes: Sequence[str],
        head: str = "linear",
        blocks: Sequence[int] | None = None,
        width: int = 512,
        side: int = 512,
        slide: bool = False,
        drop_path: float = 0.0,
    ):
        super().__init__()
        depth = len(encoder.blocks)
        if blocks is None:
            blocks = [depth] if head == "linear" else [max(1, round(depth * part)) for part in (1 / 3, 1 / 2, 2 / 3, 1)]
        if head not in HEADS:
            raise ValueError(f"the head must be {' or '.join(HEADS)}, got {head!r}")
        if not classes or width < 2 or side < 1:
            raise ValueError(f"expected classes, and a width and side, got {list(classes)}, {width} and {side}")
        if not blocks or not all(1 <= block <= depth for block in blocks):
            raise ValueError(f"blocks must lie between 1 and {depth}, got {blocks}")
        if head == "upernet" and len(blocks) != 4:
            raise ValueError(f"UPerNet reads four blocks, got {len(blocks)}")
        self.classes, self.blocks, self.frozen = list(classes), list(blocks), head == "linear"
        self.encoder = encoder.copy_encoder(0.0 if self.frozen else drop_path)
        for unused in (self.encoder.norm, self.encoder.blocks[max(blocks) :]):
            unused.requires_grad_(False)
        self.arguments = dict(classes=self.classes, head=head, blocks=self.blocks, width=width, side=side, slide=slide)
        self.config, self.statistics = self.encoder.config, self.encoder.statistics
        d = self.config["width"]
        if self.frozen:
            self.encoder.requires_grad_(False)
            self.head = nn.Sequential(nn.BatchNorm2d(d * len(blocks)), nn.Conv2d(d * len(blocks), len(classes), 1))
            nn.init.normal_(self.head[1].weight, std=0.01)
            nn.init.zeros_(self.head[1].bias)
        else:
            self.neck = Neck(d)
            self.head = UPerNet([d] * 4, width, len(classes))
            self.auxiliary = nn.Sequential(
                Convolution(d, width // 2, 3), nn.Dropout2d(0.1), nn.Conv2d(width // 2, len(classes), 1)
            )

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits (b, classes, H, W), float32, of normalised images (b, c, H, W); with ``labels``, the loss.

        ``labels`` (b, H, W) int64 are classes, or IGNORED. The loss is the mean cross-entropy of the
        other pixels, plus that of UPerNet's auxiliary head.
        """
        maps = self.encoder.intermediate(images, self.blocks)
        maps = [torch.cat(maps, dim=1)] if self.frozen else self.neck(maps)
        logits = self.head(maps[0] if self.frozen else maps)
        if labels is None:
            return enlarge(logits.float(), images.shape[2:])
        loss = pixel_loss(logits, labels)
        return loss if self.frozen else loss + AUXILIARY_WEIGHT * pixel_loss(self.auxiliary(maps[2]), labels)


def enlarge(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Resize maps (b, c, h, w) to ``size``, bilinearly."""
    return F.interpolate(maps, tuple(size), mode="bilinear", align_corners=False)


def pixel_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of the labelled pixels, at the size of ``labels`` (b, H, W); 0 if none is labelled."""
    logits = enlarge(logits.float(), labels.shape[1:])
    total = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    return total / (labels != IGNORED).sum().clamp(min=1)


class Neck(nn.Module):
    """Maps of four blocks, all (b, d, h, w), to 4, 2, 1 and 1/2 times that resolution."""

    def __init__(self, d: int):
        super().__init__()
        self.four = nn.Sequential(
            nn.ConvTranspose2d(d, d, 2, stride=2), nn.BatchNorm2d(d), nn.GELU(), nn.ConvTranspose2d(d, d, 2, stride=2)
        )
        self.two = nn.ConvTranspose2d(d, d, 2, stride=2)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        first, second, third, fourth = maps
        half = F.max_pool2d(fourth, 2) if min(fourth.shape[2:]) > 1 else fourth
        return [self.four(first), self.two(second), third, half]


class Convolution(nn.Sequential):
    """A convolution that keeps the resolution, BatchNorm, ReLU."""

    def __init__(self, inputs: int, outputs: int, side: int):
        super().__init__(
            nn.Conv2d(inputs, outputs, side, padding=side // 2, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
        )


class UPerNet(nn.Module):
    """The head of UPerNet: maps (b, d, h, w) from fine to coarse to logits (b, classes, h, w) of the finest size.

    ``widths`` are the channels of the maps, ``width`` those within (Xiao et al., ECCV 2018).
    """

    def __init__(self, widths: Sequence[int], width: int, classes: int):
        super().__init__()
        self.pools = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(cells), Convolution(widths[-1], width, 1)) for cells in POOLS
        )
        self.pooled = Convolution(widths[-1] + len(POOLS) * width, width, 3)
        self.lateral = nn.ModuleList(Convolution(inputs, width, 1) for inputs in widths[:-1])
        self.smooth = nn.ModuleList(Convolution(width, width, 3) for _ in widths[:-1])
        self.fuse = Convolution(len(widths) * width, width, 3)
        self.classifier = nn.Sequential(nn.Dropout2d(0.1), nn.Conv2d(width, classes, 1))

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        # pyramid pooling of the coarsest map
        coarse = maps[-1]
        pooled = [enlarge(pool(coarse), coarse.shape[2:]) for pool in self.pools]
        levels = [self.pooled(torch.cat([coarse, *pooled], dim=1))]

        # from coarse to fine
        for lateral, finer in zip(reversed(self.lateral), reversed(maps[:-1])):
            finer = lateral(finer)
            levels.insert(0, finer + enlarge(levels[0], finer.shape[2:]))

        # all levels at the finest resolution
        smooth = [convolution(level) for convolution, level in zip(self.smooth, levels)] + levels[-1:]
        smooth = [enlarge(level, levels[0].shape[2:]) for level in smooth]
        return self.classifier(self.fuse(torch.cat(smooth, dim=1)))
