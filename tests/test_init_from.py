"""Training that starts from another checkpoint: train.py --init-from."""

import pytest
import safetensors.torch
import torch
from foreign import mae_checkpoint, same_weights, timm_vit

import smae
import train


def start_from(path, *options) -> tuple[smae.SMAE, smae.SMAE]:
    args = train.parse_arguments(["--init-from", str(path), *map(str, options)])
    train.fill_defaults(args)
    return train.build_model(args), smae.load(path, heads=args.heads)


def test_training_starts_from_encoder_and_decoder_of_another(tmp_path):
    torch.save({"model": mae_checkpoint()}, tmp_path / "mae.pth")
    model, source = start_from(tmp_path / "mae.pth", "--image-size", 64, "--heads", 4)
    assert model.config == source.config | dict(image_size=[64, 64])
    assert same_weights(model, source)
    fresh, _ = start_from(
        tmp_path / "mae.pth", "--image-size", 64, "--heads", 4, "--fresh-decoder", "--decoder-depth", 3
    )
    assert len(fresh.decoder_blocks) == 3 and torch.equal(fresh.cls_token, source.cls_token)
    assert not torch.equal(fresh.mask_token[:32], source.mask_token)


def test_training_starts_from_an_encoder_alone_with_interpolated_positions(tmp_path):
    safetensors.torch.save_file(timm_vit().state_dict(), tmp_path / "vit.safetensors")
    model, source = start_from(tmp_path / "vit.safetensors", "--image-size", 64, "--heads", 4)
    assert model.config["decoder_width"] == 512 and len(model.decoder_blocks) == 8
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model.eval().encode(images), source.encode(images))
    assert isinstance(model.positions, torch.nn.Parameter) and model.positions.shape == (65, 64)
    own_size, _ = start_from(tmp_path / "vit.safetensors", "--heads", 4)
    assert own_size.config["image_size"] == [48, 48] and torch.equal(own_size.positions, source.positions)
    with pytest.raises(ValueError, match=r"another shape: cls_token"):
        start_from(tmp_path / "vit.safetensors", "--heads", 4, "--width", 32)


def test_a_decoder_goes_on_with_its_own_target_and_a_new_one_with_normalised_pixels(tmp_path):
    torch.save({"model": mae_checkpoint(), "args": {"norm_pix_loss": False}}, tmp_path / "mae.pth")
    for options, normalized in (([], False), (["--fresh-decoder"], True), (["--fresh-decoder", "--raw-pixels"], False)):
        model, _ = start_from(tmp_path / "mae.pth", "--heads", 4, *options)
        assert model.normalize_pixels == normalized
