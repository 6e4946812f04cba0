"""Segmenters: the UPerNet head against transformers', what is trained, checkpoints."""

import pytest
import torch
from torch import nn
from transformers import UperNetConfig
from transformers.models.upernet.modeling_upernet import UperNetHead

import smae
from segmenter import IGNORED, Segmenter, UPerNet, pixel_loss

CLASSES = ["sky", "road", "tree"]


def settle_norms(model: nn.Module):
    """Give every BatchNorm statistics and parameters that show."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.weight.data, module.bias.data):
                tensor.normal_()
            module.running_var.uniform_(0.5, 2)


def weights_of_theirs(theirs: UperNetHead) -> dict[str, torch.Tensor]:
    """The weights of transformers' head under our names."""
    names = {
        "psp_modules.": "pools.",
        "bottleneck.": "pooled.",
        "lateral_convs.": "lateral.",
        "fpn_convs.": "smooth.",
        "fpn_bottleneck.": "fuse.",
        "classifier.": "classifier.1.",
    }
    weights = {}
    for name, tensor in theirs.state_dict().items():
        name = name.replace(".conv.", ".0.").replace(".batch_norm.", ".1.")
        old = next(old for old in sorted(names, key=len, reverse=True) if name.startswith(old))
        weights[names[old] + name.removeprefix(old)] = tensor
    return weights


def test_upernet_computes_what_that_of_transformers_does():
    theirs = UperNetHead(UperNetConfig(hidden_size=24, num_labels=3), [16, 16, 16, 16]).eval()
    settle_norms(theirs)
    ours = UPerNet([16] * 4, 24, 3).eval()
    ours.load_state_dict(weights_of_theirs(theirs))
    maps = [torch.randn(2, 16, side, side + 4) for side in (24, 12, 6, 3)]
    expected = theirs([each.clone() for each in maps])
    assert expected.std() > 0.1
    assert torch.allclose(ours(maps), expected, atol=1e-5)


def test_the_linear_head_trains_on_a_frozen_encoder(small_model):
    model = Segmenter(small_model, CLASSES, "linear", blocks=[1, 3])
    model(torch.randn(2, 3, 32, 48), torch.randint(0, 3, (2, 32, 48))).backward()
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None} == {"head"}
    assert model.head[1].weight.shape == (3, 64, 1, 1)


def test_upernet_trains_everything_that_it_uses(small_model):
    model = Segmenter(small_model, CLASSES, "upernet", width=8)
    model(torch.randn(2, 3, 32, 32), torch.randint(0, 3, (2, 32, 32))).backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert {"encoder", "neck", "head", "auxiliary"} == {
        name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None
    }
    assert model.blocks == [1, 2, 2, 3]


def test_what_no_head_reads_is_not_trained(small_model):
    model = Segmenter(small_model, CLASSES, "upernet", blocks=[1, 1, 2, 2], width=8, drop_path=0.5)
    model(torch.randn(2, 3, 32, 32), torch.randint(0, 3, (2, 32, 32))).backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    frozen = Segmenter(small_model, CLASSES, "linear", drop_path=0.5)
    assert all(block.drop_path == 0 for block in frozen.encoder.blocks)


def test_the_head_reads_the_blocks_that_it_names(small_model):
    images = torch.randn(1, 3, 32, 32)
    maps = small_model.intermediate(images, [3, 1])
    for layer, found in zip((3, 1), maps):
        expected = small_model.encode(images, layer=layer)[:, 1:]
        assert torch.equal(found.flatten(2).mT, expected)


@pytest.mark.parametrize("head", ["linear", "upernet"])
def test_logits_have_the_size_of_the_images(small_model, head):
    model = Segmenter(small_model, CLASSES, head, width=8).eval()
    assert model(torch.randn(1, 3, 40, 56)).shape == (1, 3, 40, 56)


@pytest.mark.parametrize("head", ["linear", "upernet"])
def test_a_segmenter_is_saved_and_loaded_to_the_bit(small_model, tmp_path, head):
    model = Segmenter(small_model, CLASSES, head, width=8).eval()
    settle_norms(model)
    smae.save(model, tmp_path / "run")
    again, images = smae.load(tmp_path / "run"), torch.randn(1, 3, 32, 32)
    assert type(again) is Segmenter and again.classes == CLASSES and again.blocks == model.blocks
    assert torch.equal(again(images), model(images))
    with pytest.raises(ValueError, match="cannot hold a segmenter"):
        smae.save(model, tmp_path / "timm", format="timm")
    card = (tmp_path / "run" / "README.md").read_text()
    assert "image-segmentation" in card and "A segmenter of 3 classes" in card


def test_ignored_pixels_do_not_count():
    logits, labels = torch.randn(1, 3, 4, 4), torch.randint(0, 3, (1, 8, 8))
    labels[:, :4] = IGNORED
    changed = logits.clone()
    changed[:, :, 0] += 100  # its pixels are ignored, up to those that interpolation mixes with others
    assert pixel_loss(logits, labels) == pytest.approx(pixel_loss(changed, labels).item(), rel=1e-6)
    assert pixel_loss(logits, torch.full_like(labels, IGNORED)) == 0
    same_size = labels[:, ::2, ::2]
    expected = nn.functional.cross_entropy(logits, same_size, ignore_index=IGNORED)  # the mean of the others
    assert pixel_loss(logits, same_size) == pytest.approx(expected.item(), rel=1e-6)


def test_what_makes_no_sense_is_refused(small_model):
    for arguments, message in {
        ("head", "oak"): "linear or upernet",
        ("blocks", (4,)): "between 1 and 3",
        ("blocks", ()): "between 1 and 3",
    }.items():
        with pytest.raises(ValueError, match=message):
            Segmenter(small_model, CLASSES, **dict([arguments]))
    with pytest.raises(ValueError, match="expected classes"):
        Segmenter(small_model, [])
    with pytest.raises(ValueError, match="four blocks"):
        Segmenter(small_model, CLASSES, "upernet", blocks=[1, 2])
