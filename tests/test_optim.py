from itertools import pairwise

import pytest
import torch

import convert
import detector
import optim
import segmenter
import smae


def test_learning_rate_warms_up_linearly_and_falls_as_a_cosine():
    rates = [optim.learning_rate(step, 100, 10, 2.0) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[55] == pytest.approx(1.0) and rates[10] == 2.0 and 0 < rates[99] < 0.002
    assert all(a >= b for a, b in pairwise(rates[10:]))
    assert optim.learning_rate(0, 5, 5, 1.0) == pytest.approx(0.2)


def test_learning_rate_falls_in_a_straight_line_or_in_steps():
    line = [optim.learning_rate(step, 100, 10, 2.0, schedule="linear") for step in range(100)]
    assert line[9] == line[10] == 2.0 and line[55] == pytest.approx(1.0) and line[99] == pytest.approx(2 / 90)
    steps = [optim.learning_rate(step, 54, 2, 2.0, schedule="steps") for step in range(54)]
    assert steps[1:48] == [2.0] * 47 and steps[48:52] == pytest.approx([0.2] * 4)
    assert steps[52:] == pytest.approx([0.02] * 2)


def test_tokens_and_positions_are_not_decayed(small_model):
    model = smae.SMAE(**small_model.config | dict(registers=2, learned_positions=True))
    left = {name for name, parameter in model.named_parameters() if not optim.decays(name, parameter)}
    assert {"cls_token", "registers", "mask_token", "positions", "decoder_positions", "norm.weight"} <= left
    assert not {name for name in left if name.endswith("weight") and "norm" not in name}


def test_layers_of_every_model_on_an_encoder_have_their_learning_rates(small_model):
    for model in (
        segmenter.Segmenter(small_model, ["a", "b"], "upernet", width=8),
        detector.Detector(small_model, ["a"], side=64, width=8),
    ):
        scale = {id(p): group["scale"] for group in optim.layer_groups(model, 0.5, 0.05) for p in group["params"]}
        scales = {name: scale[id(p)] for name, p in model.named_parameters() if p.requires_grad}
        assert {s for name, s in scales.items() if "encoder." not in name} == {1.0}
        assert {s for name, s in scales.items() if "encoder.blocks.0." in name} == {0.5**3}
        assert {s for name, s in scales.items() if "encoder.embed." in name} == {0.5**4}


@pytest.mark.parametrize("learned_positions", [False, True])
def test_only_weight_matrices_are_decayed(learned_positions, small_model):
    model = smae.SMAE(**small_model.config | dict(learned_positions=learned_positions))
    optimizer = optim.adamw(model, 1e-3, 0.05)
    decayed, spared = optimizer.param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert decayed["weight_decay"] == 0.05 and spared["weight_decay"] == 0 and decayed["betas"] == (0.9, 0.95)
    assert all(names[id(p)].endswith("weight") and "norm" not in names[id(p)] for p in decayed["params"])
    assert {"cls_token", "mask_token", "norm.weight", "embed.bias"} <= {names[id(p)] for p in spared["params"]}
    assert len(decayed["params"]) + len(spared["params"]) == len(names)


def test_lars_is_that_of_timm_and_decays_as_that_of_mae():
    timm_optim = pytest.importorskip("timm.optim")
    ours, theirs, decayed = (torch.nn.Parameter(torch.linspace(-1, 2, 12).view(3, 4)) for _ in range(3))
    mine, decaying = optim.LARS([ours], lr=0.3), optim.LARS([decayed], lr=0.3, weight_decay=0.1)
    peer = timm_optim.Lars([theirs], lr=0.3, momentum=0.9, always_adapt=True)
    by_hand, momentum = decayed.detach().clone(), torch.zeros(3, 4)
    for _ in range(5):
        gradient = torch.randn(3, 4)
        for parameter, optimizer in ((ours, mine), (theirs, peer), (decayed, decaying)):
            parameter.grad = gradient.clone()
            optimizer.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
        update = gradient + 0.1 * by_hand  # timm adds the norms of these two where MAE takes that of the sum
        momentum = 0.9 * momentum + update * 0.001 * by_hand.norm() / update.norm()
        by_hand -= 0.3 * momentum
        torch.testing.assert_close(decayed, by_hand, rtol=1e-5, atol=1e-7)


def test_lars_neither_scales_nor_decays_vectors_and_starts_from_zero():
    vector, zero = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.zeros(2, 2))
    optimizer = optim.LARS([vector, zero], lr=0.1, momentum=0.0, weight_decay=0.5)
    vector.grad, zero.grad = torch.ones(3), torch.ones(2, 2)
    optimizer.step()
    assert torch.allclose(vector, torch.full((3,), 0.9)) and torch.allclose(zero, torch.full((2, 2), -0.1))


def test_learning_rates_fall_by_layer_as_in_timm(small_model):
    timm = pytest.importorskip("timm")
    from timm.optim import param_groups_layer_decay

    classifier = smae.Classifier(small_model, ["a", "b"], "mean")
    ours = {
        id(parameter): (group["scale"], group["weight_decay"])
        for group in optim.layer_groups(classifier, 0.65, 0.05)
        for parameter in group["params"]
    }
    names = convert.rename(dict(classifier.encoder.named_parameters()), convert.MAE_NAMES | {"norm": "fc_norm"})
    named = names | {f"head.{name}": p for name, p in classifier.head.named_parameters()}
    peer = timm.create_model(
        "vit_base_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=2,
        global_pool="avg",
    )  # fmt: skip
    theirs = {
        id(parameter): (group["lr_scale"], group["weight_decay"])
        for group in param_groups_layer_decay(peer, 0.05, layer_decay=0.65, no_weight_decay_list=["cls_token"])
        for parameter in group["params"]
    }
    peer_names = {name: p for name, p in peer.named_parameters() if name not in ("cls_token", "pos_embed")}
    assert peer_names.keys() <= named.keys() and len(ours) == len(list(classifier.parameters()))
    for name, parameter in peer_names.items():
        assert ours[id(named[name])] == pytest.approx(theirs[id(parameter)]), name
    assert ours[id(classifier.encoder.cls_token)] == pytest.approx((0.65**4, 0.0))
