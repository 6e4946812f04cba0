"""What encoders make of pictures, block by block."""

import numpy as np
import pytest
import torch
from foreign import vitmae
from helpers import QUICK, train_here

import data
import encoders
import looks
import masks
import measures
import smae


def subject_of(model, count: int = 5, size: int = 32, objects: bool = False) -> looks.Subject:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
    truth = torch.zeros(count, size, size, dtype=torch.bool)
    truth[:, :16, :16] = True
    return looks.Subject("model", encoders.ViT(model.eval()), images, truth if objects else None)


def test_traced_attention_is_that_of_transformers(tmp_path):
    peer = vitmae("ViTMAEModel", mask_ratio=0.0, attn_implementation="eager")
    peer.save_pretrained(tmp_path)
    ours, images, noise = smae.load(tmp_path), torch.randn(2, 3, 48, 48), torch.arange(36.0).expand(2, -1)
    with torch.no_grad():
        expected = peer(images, noise=noise, output_attentions=True).attentions
    for (_, _, attention), theirs in zip(ours.trace(images), expected, strict=True):
        torch.testing.assert_close(attention, theirs, rtol=1e-4, atol=1e-6)


def test_traced_tokens_of_the_decoder_lie_in_the_order_of_the_grid(small_model):
    images, mask = torch.randn(3, 3, 32, 32), masks.random_mask(3, 16)
    latent = small_model.encode(images, mask.visible)
    expected = small_model.decode(latent, mask, (4, 4))
    blocks = list(small_model.eval().trace(images, mask))
    name, tokens, attention = blocks[-1]
    assert name == f"decoder-{small_model.config['decoder_depth']}"
    predicted = small_model.head(small_model.decoder_norm(tokens[:, 1:]))
    torch.testing.assert_close(smae.gather_tokens(predicted, mask.masked), expected, rtol=1e-5, atol=1e-5)
    shuffled = list(small_model.decoder_attention(images, mask))[-1]  # CLS, visible, masked
    order = torch.cat([mask.visible, mask.masked], 1)[0] + 1
    torch.testing.assert_close(attention[0][:, order][:, :, order], shuffled[0][:, 1:, 1:], rtol=1e-4, atol=1e-6)


def test_a_scan_in_parts_is_that_of_all_at_once(small_model, monkeypatch):
    whole = looks.scan(subject_of(small_model, 7), 0.75, 0)
    monkeypatch.setattr(looks, "MOST_ENTRIES", 2 * 2 * 17**2)  # parts of two pictures
    parts = looks.scan(subject_of(small_model, 7), 0.75, 0)
    assert list(whole["distance"]) == small_model.layers and list(whole["tokens"]) == small_model.layers[3:]
    for name, layers in whole.items():
        for layer, values in layers.items():
            torch.testing.assert_close(parts[name][layer], values, rtol=1e-4, atol=1e-5)
    x = data.normalize(subject_of(small_model, 7).images)
    with torch.no_grad():
        tokens = small_model.encode(x, layer=2)[:, 1:]
    torch.testing.assert_close(whole["spectrum"][2], measures.spectrum(tokens, (4, 4)), rtol=1e-4, atol=1e-5)


def test_objects_are_found_by_every_block_as_by_the_mask_generator(small_model):
    subject = subject_of(small_model, objects=True)
    found = looks.objects_found(subject, "border", "contrast")
    assert list(found) == small_model.layers
    x = data.normalize(subject.images)
    for layer in (2, small_model.layers[-1]):
        tokens = small_model.features(x, layer).detach()
        relevance, side = masks.find_object(tokens, (4, 4), "border", "contrast")
        torch.testing.assert_close(found[layer]["iou"], measures.iou(side, subject.share))
        torch.testing.assert_close(found[layer]["auc"], measures.rank_auc(relevance, subject.share))


def test_errors_under_the_same_random_masks_are_the_loss(small_model):
    subject = subject_of(small_model)
    errors, masked = looks.reconstruction_errors(subject, "random", 0.75, 3)
    mask = subject.random_mask(slice(None), 0.75, 3)
    assert torch.equal(masked, mask.masked)
    with torch.no_grad():
        torch.testing.assert_close(errors.mean(), small_model(data.normalize(subject.images), mask))
    assert errors.shape == (5, 12)
    own = looks.reconstruction_errors(subject, "own", 0.75, 3)[1]
    small = looks.reconstruction_errors(subject, "own", 0.75, 3, "small", "foreground")[1]
    tokens = small_model.features(data.normalize(subject.images), len(small_model.blocks) - 1).detach()
    how = dict(foreground="small", scoring="foreground", noise=subject.noise(slice(None), 3))
    assert torch.equal(small, masks.self_guided_mask(tokens, (4, 4), **how).masked) and not torch.equal(small, own)
    bare = looks.reconstruction_errors(subject, "own, no hints", 0.75, 3)[1]
    assert not torch.equal(own, masked) and not torch.equal(own, bare)


def test_progress_follows_a_run_and_ends_at_no_divergence(quick_drawing, monkeypatch, tmp_path):
    train_here(
        monkeypatch, *QUICK, "--epochs", 4, "--save-every", 1, "--keep", 9, "--lr", 0.01, "--out", tmp_path / "run"
    )
    model = smae.load(tmp_path / "run")
    subject = subject_of(model)
    seen = looks.progress(subject, tmp_path / "run", 12, 0.75, 0)
    assert seen["epochs"] == [1, 2, 3, 4]
    assert list(seen["divergence"]) == [1, 2]
    for values in seen["divergence"].values():
        assert values[-1] == pytest.approx(0, abs=1e-5) and values[0] > values[-2] > values[-1]
    gaps = seen["gaps"]["similarity"]
    assert gaps["own"][-1] == gaps["last"][-1]
    tokens = model.features(data.normalize(subject.images), 1).detach()
    similarity = masks.similarity(tokens)
    side = masks.bipartition(masks.normalized_cut(similarity))
    assert gaps["last"][-1] == pytest.approx(measures.cluster_gap(similarity, side).mean().item(), rel=1e-5)
    assert np.shape(seen["exploited"]["mask"]) == (4, 1)
    assert list(looks.checkpoints_over_time(tmp_path / "run", 2)) == [1, 4]


def test_a_run_without_its_checkpoints_has_no_progress(small_model, tmp_path):
    smae.save(small_model, tmp_path)
    with pytest.raises(ValueError, match="has 0 checkpoints of a run: train with --keep 999 --save-every 1"):
        looks.checkpoints_over_time(tmp_path, 12)
    with pytest.raises(ValueError, match="--checkpoints must be at least 2, got 1"):
        looks.checkpoints_over_time(tmp_path, 1)
