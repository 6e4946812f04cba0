"""Detectors: windows of attention against plain attention, pyramids, checkpoints."""

import pytest
import torch
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

import smae
from detector import Detector, Pyramid, attend_within
from smae import SMAE

CLASSES = ["cat", "dog"]
SMALL = dict(side=64, width=8, rois=8, proposals=16)


def a_block(width=16) -> smae.Block:
    block = smae.Block(width, 2, 2.0).eval()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return block


@pytest.mark.parametrize("window", [0, 5, 7, 20])
def test_windows_that_cover_everything_are_plain_attention(window):
    block, x = a_block(), torch.randn(2, 5, 4, 16)
    expected = block(x.flatten(1, 2)).view_as(x)
    assert torch.allclose(attend_within(block, x, window), expected, atol=1e-6)


def test_tokens_attend_within_their_windows_only():
    block, x = a_block(), torch.randn(1, 6, 9, 16)
    found = attend_within(block, x, 4)  # windows of 4 x 4, those at the rim padded
    for rows, columns in (((0, 4), (0, 4)), ((4, 6), (0, 4)), ((4, 6), (8, 9))):
        part = x[:, slice(*rows), slice(*columns)]
        expected = block(part.flatten(1, 2)).view_as(part)
        assert torch.allclose(found[:, slice(*rows), slice(*columns)], expected, atol=1e-6)


def test_four_blocks_attend_globally():
    encoder = SMAE(width=16, depth=12, heads=2, decoder_depth=0, image_size=32, patch_size=8)
    assert Pyramid(encoder, 2, 8).attending_globally == {3, 6, 9, 12}


@pytest.mark.parametrize("window", [0, 2, 3])
def test_the_encoder_in_a_detector_computes_what_it_does_alone(window):
    """Where the window covers all, without the CLS token, which detection leaves out."""
    encoder = SMAE(width=16, depth=3, heads=2, decoder_depth=0, image_size=16, patch_size=8, class_token=False).eval()
    images = torch.randn(2, 3, 16, 16)
    found = Pyramid(encoder, window, 8).encode(images)
    assert torch.allclose(found.flatten(2).mT, encoder.encode(images, layer=3), atol=1e-6)


@pytest.mark.parametrize("patch_size, stride", [(8, 8), (14, 16), (16, 16)])
def test_strides_are_powers_of_two_and_maps_have_them(patch_size, stride):
    side = 4 * patch_size
    encoder = SMAE(width=16, depth=2, heads=2, decoder_depth=0, image_size=side, patch_size=patch_size).eval()
    pyramid = Pyramid(encoder, 0, 8)
    images = torch.randn(1, 3, 4 * stride, 8 * stride)
    maps = list(pyramid(images).values())
    assert pyramid.strides == [stride // 4, stride // 2, stride, 2 * stride, 4 * stride]
    for each, pixels in zip(maps, pyramid.strides):
        assert each.shape == (1, 8, 4 * stride // pixels, 8 * stride // pixels)


def some_targets() -> list[dict]:
    """The objects of two pictures: one, and none."""
    mask = torch.zeros(1, 64, 64, dtype=torch.uint8)
    mask[:, 8:40, 4:50] = 1
    none = dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64), masks=mask[:0])
    return [dict(boxes=torch.tensor([[4.0, 8, 50, 40]]), labels=torch.tensor([1]), masks=mask), none]


@pytest.mark.parametrize("masks", [True, False])
def test_everything_that_is_used_is_trained_and_pictures_without_objects_count(small_model, masks):
    model = Detector(small_model, CLASSES, masks, **SMALL).train()
    targets = [{k: v for k, v in target.items() if masks or k != "masks"} for target in some_targets()]
    loss = model(torch.randn(2, 3, 64, 64), [(64, 64)] * 2, targets)
    loss.backward()
    assert loss > 0
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert model(torch.randn(1, 3, 64, 64), [(64, 64)], targets[1:]) > 0


def test_boxes_and_scores_are_not_rounded_to_bfloat16(small_model):
    model = Detector(small_model, CLASSES, **SMALL).eval()
    with torch.autocast("cpu", torch.bfloat16):
        found = model(torch.randn(1, 3, 64, 64), [(64, 64)])[0]
    assert len(found["boxes"])
    maps = list(model.backbone(torch.randn(1, 3, 64, 64)).values())
    anchors = model.rpn.anchor_generator(ImageList(torch.randn(1, 3, 64, 64), [(64, 64)]), [m.bfloat16() for m in maps])
    assert anchors[0].dtype == torch.float32
    for name in ("boxes", "scores"):
        assert found[name].dtype == torch.float32
        assert not torch.equal(found[name], found[name].bfloat16().float())


def test_results_do_not_depend_on_the_first_picture(small_model):
    """Torchvision keeps the scales of its maps from the first picture, whose padding it does not know."""
    models = [Detector(small_model, CLASSES, **SMALL).eval() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    wide, square = torch.randn(1, 3, 64, 64), torch.randn(1, 3, 64, 64)
    models[0](wide, [(20, 64)])
    found = [model(square, [(64, 64)])[0] for model in models]
    assert torch.equal(found[0]["boxes"], found[1]["boxes"])


def test_a_detector_learns_where_one_object_is(small_model):
    torch.manual_seed(0)
    model = Detector(small_model, CLASSES, **SMALL).train()
    optimizer, targets = torch.optim.AdamW(model.parameters(), lr=1e-3), some_targets()[:1]
    image = torch.randn(1, 3, 64, 64) * 0.1
    image[:, :, 8:40, 4:50] += 1
    for _ in range(120):
        loss = model(image, [(64, 64)], targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = model.eval()(image, [(64, 64)])[0]
    best = found["scores"].argmax()
    assert found["labels"][best] == 1
    assert box_iou(found["boxes"][best][None], targets[0]["boxes"]) > 0.6


def test_a_detector_is_saved_and_loaded_to_the_bit(small_model, tmp_path):
    model, images = Detector(small_model, CLASSES, window=3, **SMALL).eval(), torch.randn(1, 3, 64, 64)
    smae.save(model, tmp_path)
    again = smae.load(tmp_path)
    assert type(again) is Detector and again.arguments == model.arguments
    for name, values in model(images, [(64, 64)])[0].items():
        assert torch.equal(again(images, [(64, 64)])[0][name], values)
    assert "object-detection" in (tmp_path / "README.md").read_text()
    assert type(smae.encoder_of(again)) is SMAE


def test_what_makes_no_sense_is_refused(small_model):
    with pytest.raises(ValueError, match="window must not be negative"):
        Detector(small_model, CLASSES, window=-1)
    with pytest.raises(ValueError, match="rois must be at least 1"):
        Detector(small_model, CLASSES, rois=0)
    tiny = SMAE(width=16, depth=1, heads=2, decoder_depth=0, image_size=8, patch_size=2)
    with pytest.raises(ValueError, match="patches of at least 3 pixels"):
        Detector(tiny, CLASSES)
