"""Object detection with a ViT encoder: torchvision's Mask R-CNN on a simple feature pyramid (ViTDet).

Imports nothing of ours: an encoder is any module with the methods of ``smae.SMAE``.

Letters in shapes: ``b`` batch, ``c`` channels, ``d`` width, ``k`` objects, ``h``/``w`` cells of a feature map,
``H``/``W`` image height/width in pixels.

Sources: ViTDet (Li et al., ECCV 2022, arXiv 2203.16527), without its relative positions; Mask R-CNN (He et al.,
ICCV 2017).
"""

import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import MultiScaleRoIAlign

LEVELS = (4, 2, 1, 1 / 2)  # resolutions of the pyramid, in that of the encoder


class Detector(nn.Module):
    """A copy of an encoder that finds boxes of objects, and with ``masks`` also their shapes.

    ``window``: side of the windows, in patches, that attention is confined to, but for four blocks
    evenly spaced (0: nowhere). ``side``: the long side, in pixels, that pictures should have.
    ``width``: channels of pyramid and heads. ``rois``: regions per picture that the heads are
    trained on; ``proposals``: regions per picture that they judge. The CLS token and registers are
    left out, as in ViTDet. Raises ValueError where these make no sense.
    """

    task = "detector"

    def __init__(
        self,
        encoder: nn.Module,
        classes: Sequence[str],
        masks: bool = True,
        side: int = 1024,
        window: int = 14,
        width: int = 256,
        rois: int = 512,
        proposals: int = 1000,
        drop_path: float = 0.0,
    ):
        super().__init__()
        if not classes:
            raise ValueError("a detector needs classes, got none")
        numbers = dict(side=side, width=width, rois=rois, proposals=proposals)
        for name, value in numbers.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if window < 0:
            raise ValueError(f"window must not be negative, got {window}")
        self.arguments = dict(classes=list(classes), masks=masks, window=window, **numbers)
        self.classes = list(classes)
        pyramid = Pyramid(encoder.copy_encoder(drop_path), window, width)
        self.config, self.statistics = pyramid.encoder.config, pyramid.encoder.statistics
        self.multiple = pyramid.multiple

        anchor_sizes = tuple((8 * stride,) for stride in pyramid.strides)
        anchors = Anchors(anchor_sizes, ((0.5, 1.0, 2.0),) * len(anchor_sizes))
        options = dict(
            rpn_anchor_generator=anchors,
            rpn_head=RegionHead(width, 3, conv_depth=2),
            rpn_post_nms_top_n_train=proposals,
            rpn_post_nms_top_n_test=proposals,
            box_roi_pool=RegionPool(7, pyramid.strides[0]),
            box_head=FastRCNNConvFCHead((width, 7, 7), [width] * 4, [4 * width], norm_layer=ChannelNorm),
            box_predictor=BoxPredictor(4 * width, len(classes) + 1),
            box_batch_size_per_image=rois,
        )
        if masks:
            options["mask_roi_pool"] = RegionPool(14, pyramid.strides[0])
            options["mask_head"] = MaskRCNNHeads(width, [width] * 4, 1, norm_layer=ChannelNorm)
            options["mask_predictor"] = MaskRCNNPredictor(width, width, len(classes) + 1)
        rcnn = (MaskRCNN if masks else FasterRCNN)(pyramid, **options)
        self.backbone, self.rpn, self.roi_heads = rcnn.backbone, rcnn.rpn, rcnn.roi_heads

    @property
    def encoder(self) -> nn.Module:
        return self.backbone.encoder

    def forward(
        self, images: Tensor, sizes: Sequence[tuple[int, int]], targets: list[dict] | None = None
    ) -> Tensor | list[dict]:
        """The objects in normalised images (b, c, H, W), or with ``targets`` the loss.

        H and W are multiples of ``multiple``. ``sizes``: height and width of each picture, which lies
        at the top left of its image. Targets and results have a dictionary for each picture: "boxes"
        (k, 4), left, top, right, bottom in pixels; "labels" (k,), classes from 0; "masks": for
        training (k, H, W), as a result (k, 1, 28, 28) within the boxes, as probabilities, or None.
        Results also have "scores" (k,).
        """
        maps = self.backbone(images)
        pictures = ImageList(images, [tuple(size) for size in sizes])
        if targets is not None:  # torchvision's class 0 is the background
            targets = [target | dict(labels=target["labels"] + 1) for target in targets]
        proposals, rpn_losses = self.rpn(pictures, maps, targets)
        found, losses = self.roi_heads(maps, proposals, pictures.image_sizes, targets)
        if targets is not None:
            return sum(loss.float() for loss in (rpn_losses | losses).values())
        for result in found:
            result["labels"] = result["labels"] - 1
            result["masks"] = result["masks"].float() if "masks" in result else None
        return found


def stride_of(patch_size: int) -> int:
    """Pixels per patch in a detector: the next power of two."""
    return 2 ** math.ceil(math.log2(patch_size))


def smallest_side(patch_size: int) -> int:
    """What the sides of images must be multiples of: a cell of the coarsest map, in pixels."""
    return 4 * stride_of(patch_size)


class Pyramid(nn.Module):
    """ViTDet's simple feature pyramid: the encoder's last map at five resolutions.

    The strides of torchvision's region pooling are powers of two. An encoder whose patches have
    another side, such as 14, therefore sees the images shrunk so that a patch covers 16 pixels.
    Normalised images (b, c, H, W) give maps (b, width, ., .) "0" to "3", from fine to coarse, and
    "pool". Raises ValueError for patches of fewer than 3 pixels.
    ``strides``: pixels per cell of each map. ``multiple``: what the sides of images must divide by.
    """

    def __init__(self, encoder: nn.Module, window: int, width: int):
        super().__init__()
        self.encoder, self.window, self.out_channels = encoder, window, width
        encoder.norm.requires_grad_(False)  # like the tokens before the patches, of no use here
        for name in ("cls_token", "registers"):
            if hasattr(encoder, name):
                getattr(encoder, name).requires_grad_(False)
        depth = len(encoder.blocks)
        self.attending_globally = {round(depth * part / 4) for part in (1, 2, 3, 4)}
        self.stride = stride_of(encoder.patch_size)
        if self.stride < 4:
            raise ValueError(f"detection needs patches of at least 3 pixels, got {encoder.patch_size}")
        self.strides = [round(self.stride / level) for level in LEVELS] + [4 * self.stride]
        self.multiple = smallest_side(encoder.patch_size)
        d = encoder.config["width"]
        self.scale = nn.ModuleList(
            [
                nn.Sequential(
                    nn.ConvTranspose2d(d, d // 2, 2, stride=2),
                    ChannelNorm(d // 2),
                    nn.GELU(),
                    nn.ConvTranspose2d(d // 2, d // 4, 2, stride=2),
                ),
                nn.ConvTranspose2d(d, d // 2, 2, stride=2),
                nn.Identity(),
                nn.MaxPool2d(2),
            ]
        )
        self.smooth = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(inputs, width, 1, bias=False),
                ChannelNorm(width),
                nn.Conv2d(width, width, 3, padding=1, bias=False),
                ChannelNorm(width),
            )
            for inputs in (d // 4, d // 2, d, d)
        )

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        tokens = self.encode(images)
        maps = [smooth(scale(tokens)) for scale, smooth in zip(self.scale, self.smooth)]
        maps.append(F.max_pool2d(maps[-1], 1, stride=2))
        return OrderedDict((str(i) if i < len(LEVELS) else "pool", each) for i, each in enumerate(maps))

    def encode(self, images: Tensor) -> Tensor:
        """The patch tokens of images after the last block: (b, d, h, w)."""
        encoder, p = self.encoder, self.encoder.patch_size
        h, w = images.shape[2] // self.stride, images.shape[3] // self.stride
        if p != self.stride:
            images = F.interpolate(images, (h * p, w * p), mode="bilinear", antialias=True)
        x = rearrange(encoder.embed_patches(images)[:, encoder.prefix :], "b (h w) d -> b h w d", h=h)
        for number, block in enumerate(encoder.blocks, start=1):
            x = attend_within(block, x, 0 if number in self.attending_globally else self.window)
        return rearrange(x, "b h w d -> b d h w")


def attend_within(block: nn.Module, x: Tensor, window: int) -> Tensor:
    """Apply a transformer block to tokens (b, h, w, d) that attend within windows; everywhere if ``window`` is 0.

    Windows that reach beyond the map are padded; nothing attends to the padding.
    """
    b, h, w, d = x.shape
    rows, columns = (window or h), (window or w)
    y = block.norm1(x)
    down, right = -h % rows, -w % columns
    y = F.pad(y, (0, 0, 0, right, 0, down))
    y = rearrange(y, "b (i r) (j c) d -> (b i j) (r c) d", r=rows, c=columns)
    inside = None
    if down or right:
        inside = F.pad(torch.ones(h, w, dtype=torch.bool, device=x.device), (0, right, 0, down))
        inside = rearrange(inside, "(i r) (j c) -> (i j) (r c)", r=rows, c=columns).repeat(b, 1)
    y = block.attention(y, inside)
    y = rearrange(y, "(b i j) (r c) d -> b (i r) (j c) d", b=b, i=(h + down) // rows, r=rows)[:, :h, :w]
    x = (x + block.drop(y.flatten(1, 2)).view_as(x)).flatten(1, 2)
    return (x + block.drop(block.mlp(block.norm2(x)))).view(b, h, w, d)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of maps (b, c, h, w)."""

    def __init__(self, channels: int):
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class Anchors(AnchorGenerator):
    """Torchvision's, in float32 whatever the type of the maps."""

    def forward(self, pictures: ImageList, maps: list[Tensor]) -> list[Tensor]:
        return super().forward(pictures, [each[:, :1].float() for each in maps])


class RegionPool(MultiScaleRoIAlign):
    """Torchvision's pooling of regions to ``cells`` a side, where a cell of the finest map has ``stride`` pixels.

    Torchvision takes the scales of all maps from the size of the first picture without its padding,
    which may be much smaller than what the maps cover.
    """

    def __init__(self, cells: int, stride: int):
        super().__init__([str(i) for i in range(len(LEVELS))], cells, sampling_ratio=2)
        self.stride = stride

    def forward(self, maps: dict[str, Tensor], boxes: list[Tensor], sizes: list[tuple[int, int]]) -> Tensor:
        covered = tuple(cells * self.stride for cells in maps["0"].shape[2:])
        return super().forward(maps, boxes, [covered] * len(sizes))


class RegionHead(RPNHead):
    """Torchvision's, whose results stay float32 under autocast: torchvision would round coordinates to their type."""

    def forward(self, maps: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        scores, shifts = super().forward(maps)
        return [each.float() for each in scores], [each.float() for each in shifts]


class BoxPredictor(FastRCNNPredictor):
    """Torchvision's, whose results stay float32 under autocast."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores, shifts = super().forward(x)
        return scores.float(), shifts.float()
