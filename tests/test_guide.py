import itertools

import forked
import numpy as np
import pytest
import torch
import undrawn
from accelerate import Accelerator
from einops import reduce
from helpers import QUICK, dataset_of, image_bytes, picture, records, train_here
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import data
import guide as guide_module
import masks
import pixels
import smae
import train
from batches import Batch, TrainBatches
from cropping import Crops
from guide import Guide, exploitation
from objects import ObjectMasks
from shapes import load_shapes


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


def ramps(width: int, height: int) -> bytes:
    """A picture whose red rises from left to right and whose green rises from top to bottom."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width).round()[None, :]
    pixels[..., 1] = np.linspace(0, 255, height).round()[:, None]
    return image_bytes(Image.fromarray(pixels))


def patch_means(images: torch.Tensor, p: int = 8) -> torch.Tensor:
    """Red and green, 0 ... 1, of the patches of uint8 images (b, 3, H, W): (2, b, n)."""
    return reduce(images[:, :2].float() / 255, "b c (h p1) (w p2) -> c b (h w)", "mean", p1=p, p2=p)


# ------------------------------------------------------------------------------------------- looking


def test_online_masks_are_those_of_the_chain_in_masks(small_model):
    images, noise = torch.randn(4, 3, 32, 32), torch.rand(4, 16)
    guide = Guide(small_model, layer="decoder-1", foreground="peak", scoring="contrast", hint="similar", ratio=0.5)
    expected = masks.self_guided_mask(
        small_model.features(images, "decoder-1"), (4, 4), 0.5, "similar", 0.05, "peak", "contrast", noise=noise
    )
    relevance, side = guide.relevance(images)
    assert torch.equal(guide.mask(relevance, noise).masked, expected.masked) and side.shape == (4, 16)
    assert Guide(small_model).layer == 2  # of 3: the last but one

    guide = Guide(small_model, "amt", amt_ratio=0.25, throw_ratio=0.25)
    weights, side = guide.relevance(images)
    assert side is None and torch.equal(weights, masks.attention_weights(small_model.class_attention(images)))
    mask = guide.mask(weights, noise)
    assert mask.masked.shape == (4, 4) and mask.visible.shape == (4, 8)


def test_debiasing_takes_off_the_running_mean_of_each_patch_position(small_model, accelerator):
    guide, first, second = Guide(small_model, debias=True), *torch.randn(2, 6, 3, 32, 32)
    plain = Guide(small_model)
    features = [small_model.features(images, 2).detach() for images in (first, second)]
    torch.testing.assert_close(guide.relevance(first)[0], plain.relevance(first)[0])  # nothing is known yet
    guide.relevance(first[:4], update_mean=True)
    guide.relevance(first[3:], update_mean=True)
    assert guide.mean is None  # a step's micro-batches count together
    guide.finish_step(accelerator)
    mean = torch.cat([features[0][:4], features[0][3:]]).mean(0)
    torch.testing.assert_close(guide.mean, mean)
    expected = masks.find_object(features[1] - mean, (4, 4))
    torch.testing.assert_close(guide.relevance(second, update_mean=True)[0], expected[0])
    guide.finish_step(accelerator)
    torch.testing.assert_close(guide.mean, 0.95 * mean + 0.05 * features[1].mean(0))
    before = guide.mean.clone()
    guide.relevance(first)  # to draw a picture
    guide.finish_step(accelerator)
    assert torch.equal(guide.mean, before)


def test_what_does_not_fit_the_model_is_refused(small_model):
    for layer in (0, 4, "decoder-3", "last"):
        with pytest.raises(ValueError, match=r"--guide-layer .*: there are 1, 2, 3, decoder-1, decoder-2"):
            Guide(small_model, layer=layer)
    with pytest.raises(ValueError, match="leaves no visible patch"):
        Guide(small_model, "amt", amt_ratio=0.6, throw_ratio=0.4)
    with pytest.raises(ValueError, match="needs a model with a CLS token"):
        Guide(smae.SMAE(**small_model.config | dict(class_token=False)), "amt")


# ------------------------------------------------------------------------------------------- remembering


@pytest.mark.parametrize("preload", [None, "host"])
@pytest.mark.parametrize("size", [(64, 64), (400, 40), (40, 400), (33, 150), (16, 20)])
def test_a_crop_of_the_map_is_the_map_of_the_crop(size, preload, small_model):
    """Red and green stand for the relevance: those of the cropped map must be those of the cropped picture.

    At the border of the picture a map has no neighbours to interpolate with: there, off by up to half a patch. The
    picture's own crops are off by half a pixel.
    """
    half_a_pixel = 0.5 / min(size)
    dataset = dataset_of([ramps(*size)] * 8)
    batches = TrainBatches(dataset, 64, 8, scale=(0.1, 1.0), preload=preload, seed=3)
    guide = Guide(smae.SMAE(**small_model.config | dict(image_size=64)))  # 8 x 8 patches
    (whole,) = batches.uncropped()
    maps = patch_means(whole.images)
    flips, at_border, errors = set(), 0, []
    for epoch in range(1, 9):
        (batch,) = batches.epoch(epoch)
        top, left, height, width = batch.crops.boxes.T
        flips |= set(batch.crops.flips.tolist())
        at_border += int(((top == 0) | (left == 0) | (top + height >= 1) | (left + width >= 1)).sum())
        for relevance, expected in zip(maps, patch_means(batch.images)):
            guide.maps = relevance.view(-1, 8, 8).half().numpy()
            error = (guide.cached_relevance(batch) - expected).abs()
            assert (error < 1 / 16 + 0.01 + half_a_pixel).all()
            errors += error[(expected > 3 / 16) & (expected < 13 / 16)].tolist()
    assert flips == {True, False} and at_border > 0
    assert len(errors) > 2000 and max(errors) < 0.01 + half_a_pixel


def test_a_crop_finds_the_object_where_the_picture_shows_it(small_model):
    """On drawn shapes: the map is the object itself."""
    shapes = load_shapes("test", 64).select(range(40))
    drawn = dataset_of([image_bytes(row["mask"].convert("RGB")) for row in shapes])
    batches = TrainBatches(drawn, 32, 40, scale=(0.3, 1.0))
    guide = Guide(small_model)
    (whole,) = batches.uncropped()
    guide.maps = patch_means(whole.images)[0].view(-1, 4, 4).half().numpy()
    (batch,) = batches.epoch(1)
    recalled, shown = guide.cached_relevance(batch), patch_means(batch.images)[0]
    correlation = np.corrcoef(recalled.flatten(), shown.flatten())[0, 1]
    assert correlation > 0.85
    guide.maps = np.flip(guide.maps, 2)
    assert np.corrcoef(guide.cached_relevance(batch).flatten(), shown.flatten())[0, 1] < correlation - 0.2


@pytest.mark.parametrize("kind", ["selfguided", "amt"])
@pytest.mark.parametrize("options", [dict(), dict(workers=2), dict(preload="host")], ids=str)
def test_every_picture_is_remembered_as_a_look_at_the_whole_of_it(kind, options, small_model, accelerator, tmp_path):
    dataset = dataset_of([image_bytes(picture(40 + i, 30 + 2 * i, seed=i)) for i in range(11)])
    batches = TrainBatches(dataset, 32, 4, **options)
    guide = Guide(small_model, kind)
    guide.cache_relevance(batches, accelerator, tmp_path / "maps.npy")
    assert guide.maps.shape == (11, 4, 4) and guide.maps.dtype == np.float16
    assert isinstance(guide.maps, np.memmap) and [file.name for file in tmp_path.iterdir()] == ["maps.npy"]
    np.testing.assert_array_equal(np.load(tmp_path / "maps.npy"), guide.maps)
    for i, record in enumerate(dataset["image"]):
        image = pixels.stretch(data.decode(record), 32)
        expected = guide.relevance(data.normalize(image[None]))[0][0]
        if kind == "selfguided":
            expected = (expected - expected.min()) / (expected.max() - expected.min())
        atol = 0.05 if options.get("preload") else 2e-3  # preloaded pictures are kept smaller
        torch.testing.assert_close(torch.tensor(guide.maps[i]).flatten().float(), expected, rtol=0, atol=atol)
    assert len(list(batches.epoch(1))) == 2  # training goes on as if nothing had been


def test_a_map_that_says_nothing_leaves_the_mask_to_chance(small_model, accelerator, monkeypatch, tmp_path):
    dataset = dataset_of([image_bytes(Image.new("RGB", (40, 40), "gray"))] * 4)
    batches = TrainBatches(dataset, 32, 4)
    with torch.no_grad():
        for block in small_model.blocks:  # no positions come through either
            block.norm1.weight.zero_()
            block.norm2.weight.zero_()
        small_model.positions.zero_()
    guide = Guide(small_model)
    guide.cache_relevance(batches, accelerator, tmp_path / "maps.npy")
    assert (guide.maps == 0).all()
    monkeypatch.setattr(
        masks, "find_object", lambda *_: (1 + 1e-6 * torch.rand(4, 16), torch.zeros(4, 16))
    )  # but for rounding
    guide.cache_relevance(batches, accelerator, tmp_path / "maps.npy")
    assert (guide.maps == 0).all()
    (batch,) = batches.epoch(1)
    noise = torch.rand(4, 16)
    guided, random = (
        guide.mask(guide.cached_relevance(batch), noise),
        masks.informed_mask(torch.zeros(4, 16), noise=noise),
    )
    assert torch.equal(guided.masked, random.masked)


def test_a_new_pass_starts_with_a_new_mean(small_model, accelerator, tmp_path):
    dataset = dataset_of([image_bytes(picture(seed=i)) for i in range(11)])
    batches = TrainBatches(dataset, 32, 4)  # three batches, the last one smaller
    guide = Guide(small_model, debias=True)
    guide.mean = torch.full((16, 32), 1e3)
    guide.cache_relevance(batches, accelerator, tmp_path / "maps.npy")
    images = torch.cat([batch.images for batch in batches.uncropped()])
    expected = small_model.features(data.normalize(images), 2).mean(dim=0)
    torch.testing.assert_close(guide.mean, expected, rtol=1e-4, atol=1e-4)


def test_streams_have_no_index_to_remember_by(small_model, accelerator, monkeypatch, tmp_path, capfd):
    stream = dataset_of([image_bytes(picture(seed=i)) for i in range(8)]).to_iterable_dataset()
    with pytest.raises(ValueError, match="a stream has no index"):
        Guide(small_model).cache_relevance(TrainBatches(stream, 32, 4, length=8), accelerator, tmp_path / "maps.npy")
    with pytest.raises(SystemExit):
        train_here(monkeypatch, *QUICK, "--streaming", "--guide", "cached", "--out", tmp_path / "run")
    assert "with --streaming the guide must be --guide online" in capfd.readouterr().err


def test_the_guide_is_part_of_a_checkpoint(small_model, accelerator, tmp_path):
    guide = Guide(small_model, debias=True, start=None)
    batches = TrainBatches(dataset_of([image_bytes(picture(seed=i)) for i in range(11)]), 32, 4)
    guide.cache_relevance(batches, accelerator, tmp_path / "maps.npy")
    guide.start, guide.history = 7, [dict(exploitation_masked=[0.5])]
    torch.save(guide.state_dict(), tmp_path / "guide.pt")
    state = torch.load(tmp_path / "guide.pt", weights_only=True)
    again = Guide(small_model, debias=True)
    again.load_state_dict(state)
    assert again.load_maps(state, tmp_path / "maps.npy") and np.array_equal(guide.maps, again.maps)
    assert torch.equal(guide.mean, again.mean)
    assert again.start == 7 and again.history == [dict(exploitation_masked=[0.5])]
    assert Guide(small_model, start=2).state_dict()["start"] is None  # not found: --guide-start auto goes on looking
    assert not Guide(small_model, debias=True).load_maps(state, tmp_path / "gone.npy")
    other = bytearray((tmp_path / "maps.npy").read_bytes())
    other[-1] ^= 1
    (tmp_path / "other.npy").write_bytes(other)
    assert not Guide(small_model, debias=True).load_maps(state, tmp_path / "other.npy")
    ways = [dict(debias=False), dict(layer=1), dict(foreground="peak"), dict(source="pixels")]
    ways += [
        dict(kind="amt", debias=False),
        dict(scoring="foreground"),
        dict(source=small_model, source_name="itself", source_size=64),
    ]
    for way in ways:
        changed = Guide(small_model, **dict(debias=True) | way, start=3)
        changed.load_state_dict(state)
        assert not changed.load_maps(state, tmp_path / "maps.npy")  # not lost, but of no use
        assert changed.maps is None and changed.mean is None and changed.start == 3


def test_a_picture_whose_features_are_no_numbers_does_not_spoil_the_mean_for_ever(accelerator, small_model):
    guide = Guide(small_model, debias=True)
    for images in (torch.full((2, 3, 32, 32), torch.nan), torch.randn(2, 3, 32, 32), torch.full((2, 3, 32, 32), 1e38)):
        guide.relevance(images, update_mean=True)
        guide.finish_step(accelerator)
        assert guide.mean.isfinite().all()
    assert guide.mean.abs().max() > 0


# ------------------------------------------------------------------------------------------- guides from elsewhere


def foreign(small_model, **changes) -> smae.SMAE:
    """A model of another grid, patch and normalisation: 6 x 6 patches of 10 pixels."""
    other = dict(image_size=60, patch_size=10, mean=[0.5, 0.4, 0.3], std=[0.2, 0.3, 0.4])
    return smae.SMAE(**small_model.config | other | changes).eval()


def test_a_frozen_model_sees_the_pictures_as_it_was_made_for(small_model):
    source, images = foreign(small_model), torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    guide = Guide(small_model, source=source, source_name="elsewhere")
    assert guide.layer == 2 and guide.size == (60, 60)
    large = torch.nn.functional.interpolate(data.normalize(images), (60, 60), mode="bicubic", antialias=True)
    mean, std = (torch.tensor(source.config[name]).view(3, 1, 1) for name in ("mean", "std"))
    theirs = (large * torch.tensor(data.STD).view(3, 1, 1) + torch.tensor(data.MEAN).view(3, 1, 1) - mean) / std
    scores, side = masks.find_object(source.features(theirs, 2), (6, 6))
    relevance, ours = guide.relevance(data.normalize(images))
    areas = torch.nn.functional.interpolate(scores.view(4, 1, 6, 6), (12, 12), mode="nearest")  # 3 x 3 of these a patch
    expected = reduce(areas, "b 1 (h p1) (w p2) -> b (h w)", "mean", p1=3, p2=3)
    torch.testing.assert_close(relevance, expected, rtol=1e-3, atol=1e-4)
    areas = torch.nn.functional.interpolate(side.view(4, 1, 6, 6).float(), (12, 12), mode="nearest")
    assert torch.equal(ours, reduce(areas, "b 1 (h p1) (w p2) -> b (h w)", "mean", p1=3, p2=3) > 0.5)
    assert Guide(small_model, source=source, source_size=30).size == (30, 30)
    with pytest.raises(ValueError, match=r"multiple of the patch size 10; try another --guide-image-size"):
        Guide(small_model, source=source, source_size=32)
    with pytest.raises(ValueError, match="--guide-layer 4: there are 1, 2, 3"):
        Guide(small_model, source=source, layer=4)


@pytest.mark.parametrize("preload", [None, "host"])
def test_a_frozen_model_looks_at_whole_pictures_at_its_own_size(preload, small_model, accelerator, tmp_path):
    dataset = dataset_of([image_bytes(picture(70, 80, seed=i)) for i in range(11)])
    batches, source = TrainBatches(dataset, 32, 4, preload=preload), foreign(small_model, mean=data.MEAN)
    guide = Guide(small_model, source=source, source_name="elsewhere")
    guide.cache_relevance(batches, accelerator, tmp_path / "maps.npy")
    assert guide.maps.shape == (11, 6, 6)
    seen = torch.cat([batch.images for batch in batches.uncropped(size=60)])
    scores, _ = masks.find_object(source.features(data.normalize(seen, data.MEAN, source.config["std"]), 2), (6, 6))
    low, high = scores.aminmax(dim=1, keepdim=True)
    expected = ((scores - low) / (high - low)).view(11, 6, 6)
    torch.testing.assert_close(torch.tensor(guide.maps).float(), expected, rtol=0, atol=2e-3)
    (batch, _) = batches.epoch(1)
    assert guide.cached_relevance(batch).shape == (4, 16)


def test_cropped_maps_of_another_grid_are_means_over_areas(small_model, accelerator):
    guide = Guide(small_model)
    guide.maps = np.random.default_rng(0).random((1, 12, 12)).astype(np.float16)
    crops = Crops(np.float32([[0, 0, 1, 1]]), np.array([False]))
    batch = Batch(torch.zeros(1, 3, 32, 32), np.array([0]), [], np.zeros(1), crops)
    guide._map_grid = lambda: (12, 12)
    expected = reduce(torch.tensor(guide.maps).float(), "b (h p1) (w p2) -> b (h w)", "mean", p1=3, p2=3)
    torch.testing.assert_close(guide.cached_relevance(batch), expected, rtol=0, atol=1e-3)
    half = Crops(np.float32([[0.5, 0, 0.5, 1 / 3]]), np.array([True]))  # rows 6 to 12, columns 0 to 4: mirrored
    expected = torch.tensor(guide.maps).float()[0, 6:, :4].repeat_interleave(2, 0).unflatten(0, (4, 3)).mean(1)
    found = guide.cached_relevance(batch._replace(crops=half))
    torch.testing.assert_close(found, expected.flip(1).reshape(1, 16), rtol=0, atol=1e-3)


def test_a_mask_column_guides_by_the_share_of_the_object_in_each_patch(small_model, accelerator, tmp_path):
    import datasets

    pixels = np.zeros((64, 64), np.uint8)
    pixels[16:42, 9:32] = 255  # of patches of 16 pixels: rows 1 and 10/16 of 2, 7/16 of column 0, and column 1
    images = [picture(64, 64, seed=i) for i in range(3)]
    blobs = [image_bytes(Image.fromarray(pixels)), image_bytes(Image.fromarray(255 - pixels)), b"broken"]
    table = dict(image=images, truth=[dict(bytes=blob, path=None) for blob in blobs])
    dataset = datasets.Dataset.from_dict(table, datasets.Features(image=datasets.Image(), truth=datasets.Image()))
    column = ObjectMasks(dataset, "truth")
    guide = Guide(small_model, source=column, source_name="column:truth")
    guide.cache_relevance(TrainBatches(dataset, 32, 1), accelerator, tmp_path / "maps.npy")
    assert guide.maps.shape == (3, 16, 16) and column.missing == [2] and (guide.maps[2] == 0).all()
    crops = Crops(np.tile(np.float32([0, 0, 1, 1]), (2, 1)), np.array([False, False]))
    batch = Batch(torch.zeros(2, 3, 32, 32), np.arange(2), [], np.zeros(2), crops)
    shares = torch.zeros(4, 4)
    shares[1, :2] = torch.tensor([7 / 16, 1])
    shares[2, :2] = shares[1, :2] * 10 / 16
    torch.testing.assert_close(
        guide.cached_relevance(batch), torch.stack([shares, 1 - shares]).flatten(1), rtol=0, atol=3e-3
    )
    seen, side = guide.relevance(torch.zeros(1, 3, 32, 32), objects=torch.tensor(pixels[None, ::2, ::2] > 0))
    torch.testing.assert_close(seen, shares.view(1, 16), rtol=0, atol=0.07)
    assert torch.equal(side, seen > 0.5)
    with pytest.raises(ValueError, match="no column 'mask' of mask pictures, only image, truth"):
        ObjectMasks(dataset, "mask")

    # the maps of another object are of no use when resuming
    torch.save(guide.state_dict(), tmp_path / "guide.pt")
    state = torch.load(tmp_path / "guide.pt", weights_only=True)
    for ids, void, kept in ((None, None, True), ([255], None, False), (None, 7, False)):
        again = Guide(small_model, source=ObjectMasks(dataset, "truth", ids, void), source_name="column:truth")
        assert again.load_maps(state, tmp_path / "maps.npy") == kept


def test_the_centre_and_raw_pixels_are_floors(small_model, accelerator, tmp_path):
    centre, pixels = Guide(small_model, source="centre"), Guide(small_model, source="pixels")
    images = torch.randn(5, 3, 32, 32)
    relevance, side = centre.relevance(images)
    middle = torch.zeros(4, 4, dtype=torch.bool)
    middle[1:3, 1:3] = True
    assert torch.equal(relevance.topk(4, dim=1).indices.sort(1).values, middle.flatten().nonzero().T.expand(5, -1))
    assert (side[:, middle.flatten()]).all() and side.sum() <= 5 * 8 and (relevance == relevance[0]).all()
    wide = masks.centrality((2, 6)).view(2, 6)
    assert (wide[:, 2:4].min() > wide[:, [1, 4]].max()) and (wide[:, [1, 4]].min() > wide[:, [0, 5]].max())
    expected = masks.find_object(smae.patchify(images, 8), (4, 4))
    torch.testing.assert_close(pixels.relevance(images), expected)

    batches = TrainBatches(dataset_of([image_bytes(picture(seed=i)) for i in range(8)]), 32, 8)
    assert not centre.lacks_maps and pixels.lacks_maps
    pixels.cache_relevance(batches, accelerator, tmp_path / "maps.npy")
    (batch,) = batches.epoch(1)
    boxes = np.tile(np.float32([0, 0, 0.5, 0.5]), (8, 1))  # the top left quarter: its bottom right is the centre
    corner = batch._replace(crops=Crops(boxes, np.arange(8) % 2 == 1))
    recalled = centre.cached_relevance(corner).view(8, 4, 4)
    assert (recalled[::2].flatten(1).argmax(1) == 15).all() and (recalled[1::2].flatten(1).argmax(1) == 12).all()
    assert pixels.cached_relevance(batch).shape == (8, 16)


@pytest.mark.parametrize("source", ["centre", "pixels", None])
def test_what_goes_to_a_gpu_can_be_pinned(source, small_model, accelerator, monkeypatch, tmp_path):
    """pin_memory() copies into the strides of a tensor, which may not overlap."""
    sent, to_device = [], data.to_device
    monkeypatch.setattr(data, "to_device", lambda values, device: sent.append(values) or to_device(values, device))
    guide = Guide(small_model, source=source, cached=True, start=0)
    batches = TrainBatches(dataset_of([image_bytes(picture(seed=i)) for i in range(8)]), 32, 8)
    if guide.lacks_maps:
        guide.cache_relevance(batches, accelerator, tmp_path / "maps.npy")
    (batch,) = batches.epoch(1)
    guide.mask_batch(data.normalize(batch.images), batch, 1, accelerator)
    assert len(sent) >= 4 and all(torch.as_tensor(values).is_contiguous() for values in sent)


def test_shuffled_maps_are_those_of_other_pictures_each_used_once(small_model):
    guide = Guide(small_model, shuffle=True, seed=3)
    guide.maps = np.tile(np.arange(50, dtype=np.float16)[:, None, None], (1, 4, 4))
    crops = Crops(np.tile(np.float32([0, 0, 1, 1]), (50, 1)), np.zeros(50, bool))
    order = np.random.default_rng(0).permutation(50)
    batch = Batch(torch.zeros(50, 3, 32, 32), order, [], np.zeros(50), crops)
    whose = guide.cached_relevance(batch)[:, 0].round().int().numpy()
    assert sorted(whose) == list(range(50)) and (whose != order).all()
    again = Guide(small_model, shuffle=True, seed=3)
    again.maps = guide.maps
    alone = batch._replace(images=batch.images[:5], indices=order[:5], crops=Crops(*(x[:5] for x in crops)))
    assert (
        again.cached_relevance(alone)[:, 0].round().int().numpy() == whose[:5]
    ).all()  # a function of seed and picture only
    other = Guide(small_model, shuffle=True, seed=4)
    other.maps = guide.maps
    assert (other.cached_relevance(batch)[:, 0].round().int().numpy() != whose).any()


def test_hints_become_fewer_and_more_relevant_over_the_guided_epochs(small_model):
    guide = Guide(small_model, ratio=0.5, hint_ratio=0.4, hint_portion=0.8, hint_end=0.5, start=2, epochs=6)
    shares = [guide.hint_shares(epoch) for epoch in (1, 3, 4, 5, 6, 9)]
    ratios, portions = zip(*shares)
    assert ratios == pytest.approx([0.4, 0.4, 0.4 * 5 / 6, 0.4 * 4 / 6, 0.2, 0.2])
    assert portions == pytest.approx([2 * ratio for ratio in ratios])
    relevance, noise = torch.rand(30, 16), torch.rand(30, 16)
    for epoch, count in ((3, 6), (4, 5), (6, 3)):
        least = relevance.topk(8 + count, dim=1).values[:, -1:]  # masked patches and hints, if all hints are relevant
        mask = guide.mask(relevance, noise, epoch)
        expected = masks.informed_mask(relevance, 0.5, "random", *guide.hint_shares(epoch), noise=noise)
        assert torch.equal(mask.masked, expected.masked) and (relevance.gather(1, mask.masked) >= least).all()
    assert Guide(small_model, start=2, epochs=6).hint_shares(6) == (0.05, 0.5)
    waiting = Guide(small_model, ratio=0.5, hint_ratio=0.4, hint_portion=0.8, hint_end=0.5, start=None, epochs=6)
    assert waiting.hint_shares(5) == (0.4, 0.8)  # --guide-start auto: not started yet


def test_every_step_has_the_hints_of_its_epoch(quick_drawing, monkeypatch, tmp_path):
    epochs, mask = [], Guide.mask
    monkeypatch.setattr(Guide, "mask", lambda self, a, b, epoch=None: epochs.append(epoch) or mask(self, a, b, epoch))
    train_here(monkeypatch, *QUICK, "--epochs", 4, "--guide-start", 2, "--hint-end", 0.9, "--out", tmp_path / "run")
    assert epochs == [3, 3, 4, 4]


def test_maps_that_the_disk_does_not_take_leave_earlier_ones(quick_drawing, monkeypatch, tmp_path, capfd):
    written, write = [], guide_module.write_maps

    def full(file, parts, shape):
        written.append(file)
        if len(written) in refused:
            next(parts)
            raise OSError(28, "No space left on device")
        write(file, parts, shape)

    monkeypatch.setattr(guide_module, "write_maps", full)
    arguments = [*QUICK, "--epochs", 3, "--guide-start", 1, "--guide", "cached", "--guide-every", 1]
    refused = {2}
    train_here(monkeypatch, *arguments, "--out", tmp_path / "run")
    assert (
        "No space left on device; training continues with the relevance of an earlier epoch" in capfd.readouterr().out
    )
    written.clear()
    refused = {1}
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    with pytest.raises(SystemExit):
        train_here(monkeypatch, *arguments, "--guide-start", 0, "--overwrite", "--out", tmp_path / "run")
    assert "error: the relevance of the pictures cannot be kept" in capfd.readouterr().err
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before  # nothing is there to replace it


def test_a_random_run_needs_no_room_for_hints(quick_drawing, monkeypatch, tmp_path):
    train_here(monkeypatch, *QUICK, "--image-size", 16, "--mask", "random", "--out", tmp_path / "run")  # 4 patches
    assert len(records(tmp_path / "run")) == 2


# ------------------------------------------------------------------------------------------- in training


@pytest.mark.parametrize(
    "extra, passes",
    [
        ("--guide-from SOURCE", 1),
        ("--guide-from SOURCE --guide-image-size 30 --guide online", 0),
        ("--guide-from centre", 0),
        ("--guide-from centre --guide online", 0),
        ("--guide-from pixels --guide-start 2", 1),
        ("--guide-from column:mask --guide-shuffle", 1),
        ("--guide cached --guide-shuffle --guide-every 0 --hint-end 0.9", 1),
    ],
)
def test_what_guides_is_named_and_never_called_self_guided(extra, passes, small_model, monkeypatch, tmp_path, capfd):
    looked, remember = [], Guide.cache_relevance
    monkeypatch.setattr(Guide, "cache_relevance", lambda self, *args, **kw: looked.append(remember(self, *args, **kw)))
    sheets = []

    def draw(out, epoch, guide, samples, objects):
        undrawn.draw(out, epoch)
        if epoch == 4:
            some = objects if objects is None else objects[:2]
            sheets.append(train.pictures.mask_sheet(guide, samples[:2], some, epoch))

    monkeypatch.setattr(train, "draw", draw)
    smae.save(foreign(small_model), tmp_path / "source")
    options = extra.replace("SOURCE", str(tmp_path / "source")).split()
    train_here(monkeypatch, *QUICK, "--epochs", 4, *options, "--out", tmp_path / "run")
    printed = capfd.readouterr().out
    assert len(looked) == passes and "selfguided" not in printed
    source = dict(itertools.pairwise(options)).get("--guide-from")
    assert ("not self-guided: relevance comes from" in printed) == bool(source)
    assert ("relevance of another" in printed) == ("--guide-shuffle" in options)
    start = int(dict(itertools.pairwise(options)).get("--guide-start", 2))
    phases = [record["phase"] for record in records(tmp_path / "run")]
    assert phases == ["random"] * start + ["guided"] * (4 - start)
    title = sheets[-1].get_suptitle()
    assert "not self-guided but " + (f"guided by {source}" if source else "shuffled") in title
    assert not (tmp_path / "run" / "relevance.npy").exists()
    for folder in (tmp_path / "run").glob("checkpoint-*"):
        assert (folder / "relevance.npy").exists() == bool(passes)


def test_lost_maps_are_made_again_and_it_is_said(quick_drawing, monkeypatch, tmp_path, capfd):
    arguments = [*QUICK, "--epochs", 4, "--guide-start", 1, "--guide", "cached", "--guide-every", 0, "--save-every", 1]
    train_here(monkeypatch, *arguments, "--keep", 9, "--out", tmp_path / "run")
    checkpoints = sorted((tmp_path / "run").glob("checkpoint-*"))
    resume, *_ = [folder for folder in checkpoints if (folder / "relevance.npy").exists()]
    capfd.readouterr()
    train_here(monkeypatch, *arguments, "--resume", resume, "--out", tmp_path / "kept")
    printed = capfd.readouterr().out
    assert "it will be computed again" not in printed and "whole pictures for the masks" not in printed
    (resume / "relevance.npy").unlink()
    train_here(monkeypatch, *arguments, "--resume", resume, "--out", tmp_path / "lost")
    printed = capfd.readouterr().out
    assert "(relevance.npy) is lost or of another kind" in printed and "relevance of 32 whole pictures" in printed


def test_maps_are_refreshed_every_so_many_epochs_and_used_by_all_alike(quick_drawing, monkeypatch, tmp_path):
    """Worker processes that outlive an epoch have no copy of the maps that could be stale."""
    passes, remember = [], Guide.cache_relevance
    monkeypatch.setattr(Guide, "cache_relevance", lambda self, *args, **kw: passes.append(remember(self, *args, **kw)))
    arguments = [*QUICK, "--epochs", 6, "--lr", 1e-3, "--guide-start", 1, "--guide", "cached", "--guide-every", 2]
    for name, extra in (("a", []), ("b", ["--workers", 2]), ("c", ["--guide-every", 5])):
        train_here(monkeypatch, *arguments, *extra, "--out", tmp_path / name)
        assert len(passes) == {"a": 3, "b": 3, "c": 1}[name]  # before epochs 2, 4, 6; before epoch 2
        passes.clear()
    a, b, c = (smae.load(tmp_path / name).state_dict() for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["embed.weight"], c["embed.weight"])


@pytest.mark.parametrize("extra", ["--guide cached --guide-debias", "--guide online --guide-debias"])
def test_two_processes_are_guided_as_one_is(extra, tmp_path):
    arguments = [*QUICK, "--max-images", 37, "--batch-size", 12, "--epochs", 3, "--guide-start", 1, "--guide-every", 9]
    states = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        out.mkdir()
        command = [*arguments, "--lr", 1e-3, *extra.split(), "--out", out / "run"]
        started = forked.start(out / "log", *command, world=processes, patches="recorder")
        assert forked.finish(started) == [0] * processes
        states += [torch.load(file, weights_only=True)["guide"] for file in sorted(out.glob("*.pt"))]
    one, *two = states
    assert len(two) == 2
    for other in two:  # weights differ in the last bits, which may decide between the sides of a cut
        assert ((one["mean"] - other["mean"]).abs() > 0.02).float().mean() < 0.2
    if "cached" in extra:
        (maps,), (maps2,) = (list((tmp_path / name / "run").glob("checkpoint-*6/relevance.npy")) for name in "12")
        assert (np.abs(np.load(maps) - np.load(maps2)) > 0.02).mean() < 0.2
    assert all((state["maps"] is None) == ("online" in extra) for state in states)
    losses = [[record["loss"] for record in records(tmp_path / name / "run")] for name in "12"]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)


def test_every_option_of_the_guide_reaches_it(small_model):
    given = dict(
        mask_ratio=0.5, hint="similar", hint_ratio=0.3, hint_portion=0.7, hint_end=0.5, amt_ratio=0.2, throw_ratio=0.3,
        guide_layer="decoder-2", guide_debias=True, foreground="peak", relevance="foreground", guide_start=7,
        guide_every=3, epochs=9, seed=5,
    )  # fmt: skip
    line = [f"--{name.replace('_', '-')}={value}" for name, value in given.items() if value is not True]
    guide = train.build_guide(train.parse_arguments([*line, "--guide-debias"]), small_model)
    names = dict(
        mask_ratio="ratio", guide_layer="layer", guide_debias="debias", relevance="scoring", guide_start="start",
        guide_every="every",
    )  # fmt: skip
    assert {name: getattr(guide, names.get(name, name)) for name in given} == given
    assert [
        train.build_guide(train.parse_arguments(["--mask", kind]), small_model).kind for kind in ("amt", "random")
    ] == [
        "amt",
        "selfguided",
    ]
    defaults = train.parse_arguments([])
    train.fill_defaults(defaults)
    assert all(getattr(defaults, name) != value for name, value in given.items())


# ------------------------------------------------------------------------------------------- when to start


def test_a_decoder_that_looks_everywhere_alike_lives_on_its_tokens_by_their_number(small_model):
    for block in small_model.decoder_blocks:
        torch.nn.init.zeros_(block.attention.qkv.weight)
    images, mask = torch.randn(3, 3, 32, 32), masks.random_mask(3, 16, 0.75)
    masked, visible = exploitation(small_model, images, mask)
    torch.testing.assert_close(masked, torch.full((2,), 12 / 17))
    torch.testing.assert_close(visible, torch.full((2,), 4 / 17))
    masked, visible = exploitation(small_model, images, mask, residual=True)
    torch.testing.assert_close(visible, torch.tensor([4 / 17 / 2, (1 - 1 / 4) * 4 / 17]))
    torch.testing.assert_close(masked, torch.tensor([0.5 + 12 / 17 / 2, 1 / 4 + (1 - 1 / 4) * 12 / 17]))


@pytest.mark.parametrize("residual", [False, True])
def test_exploitation_follows_every_path_through_the_decoder(residual, small_model):
    """Against a walk from each mask token down through the two blocks, weight by weight."""
    images, mask = torch.randn(1, 3, 32, 32), masks.random_mask(1, 16, 0.5)
    with torch.no_grad():
        for block in small_model.decoder_blocks:
            block.attention.qkv.weight.mul_(8)
    first, second = (a.mean(1)[0].double().numpy() for a in small_model.decoder_attention(images, mask))
    if residual:
        first, second = (first + np.eye(17)) / 2, (second + np.eye(17)) / 2
    shares = np.zeros((2, 2))  # masked or visible; block
    for start in range(9, 17):
        for token in range(1, 17):
            kind = int(token < 9)
            shares[kind, 0] += first[start, token] / 8
            for between in range(17):
                shares[kind, 1] += second[start, between] * first[between, token] / 8
    got = torch.stack(exploitation(small_model, images, mask, residual))
    np.testing.assert_allclose(got, shares, rtol=1e-5)
    assert abs(shares[0, 0] - 8 / 17) > 0.01


def rates(share: float) -> dict:
    """Exploitation of two blocks: of mask tokens ``share`` on average, of visible ones the rest."""
    return dict(exploitation_masked=[share - 0.2, share + 0.2], exploitation_visible=[1.2 - share, 0.8 - share])


@pytest.mark.parametrize(
    "shares, starts",
    [
        ((0.7,), False),
        ((0.7, 0.6, 0.6), False),  # an untrained decoder's lead
        ((0.7, 0.4, 0.45, 0.51), False),  # one epoch is none
        ((0.7, 0.4, 0.45, 0.51, 0.52), True),
        ((0.4, 0.6, 0.49, 0.6), False),
        ((0.4, 0.6, 0.6), True),
    ],
)
def test_the_guide_starts_when_mask_tokens_overtake_visible_ones_and_not_before(shares, starts, small_model):
    guide = Guide(small_model)
    guide.history = [rates(share) for share in shares]
    assert guide.mask_tokens_lead() == starts


def test_a_decoder_trained_before_may_lead_from_the_start(small_model):
    guide = Guide(small_model)
    guide.history = [rates(0.6), rates(0.6)]
    assert guide.mask_tokens_lead(trained=True) and not guide.mask_tokens_lead()


def test_auto_starts_after_the_epoch_that_is_ready_and_every_run_is_measured(
    quick_drawing, monkeypatch, tmp_path, capfd
):
    measure = Guide.measure_exploitation

    def planned(self, images):
        measure(self, images)
        (masked,), (visible,) = self.history[-1]["exploitation_masked"], self.history[-1]["exploitation_visible"]
        assert len(images) == 32 and 0 < masked < 1 and 0 < visible < 1 - masked
        self.history[-1] = rates(shares[len(self.history) - 1])

    monkeypatch.setattr(Guide, "measure_exploitation", planned)
    arguments = [*QUICK, "--epochs", 5, "--guide-start", "auto"]
    shares = [0.7, 0.4, 0.6, 0.6, 0.4]
    train_here(monkeypatch, *arguments, "--out", tmp_path / "run")
    logged = records(tmp_path / "run")
    assert [record["phase"] for record in logged] == ["random"] * 4 + ["selfguided"]
    assert [record["exploitation_masked"] for record in logged] == [rates(s)["exploitation_masked"] for s in shares]
    printed = capfd.readouterr().out
    assert "start: when mask tokens overtake visible ones" in printed and "starts after epoch 4" in printed
    for extra, shares in (([], [0.4] * 5), (["--mask", "random"], [0.7, 0.4, 0.6, 0.6, 0.6])):  # noqa: B007
        train_here(monkeypatch, *arguments, *extra, "--overwrite", "--out", tmp_path / "run")
        assert {record["phase"] for record in records(tmp_path / "run")} == {"random"}
        printed = capfd.readouterr().out
        assert ("the guide never started" in printed) == (not extra) and "starts after" not in printed


# ------------------------------------------------------------------------------------------- whatever the features are


def strange_features(kinds: list[str], seed: int) -> torch.Tensor:
    """Features (b, 16, 32), those of each image of another kind."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(kinds), 16, 32, generator=generator)
    row = torch.randn(32, generator=generator)
    for i, kind in enumerate(kinds):
        strange = {
            "constant": row.expand(16, 32),
            "zero": torch.zeros(16, 32),
            "rank one": torch.outer(torch.randn(16, generator=generator), row),
            "huge": x[i] * 3e38,
            "tiny": x[i] * 1e-40,
            "nan": torch.full((16, 32), torch.nan),
            "one nan": torch.where(torch.arange(16)[:, None] == 5, torch.nan, x[i]),
            "infinite": torch.where(x[i] > 1, torch.inf, x[i]),
            "zero vectors": torch.where(torch.arange(16)[:, None] < 7, 0, x[i]),
            "plain": x[i],
        }
        x[i] = strange[kind]
    return x


KINDS = ["constant", "zero", "rank one", "huge", "tiny", "nan", "one nan", "infinite", "zero vectors", "plain"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batches=st.lists(st.lists(st.sampled_from(KINDS), min_size=1, max_size=5), min_size=1, max_size=4),
    kind=st.sampled_from(["selfguided", "amt"]),
    hint=st.sampled_from(["none", "random", "similar"]),
    foreground=st.sampled_from(["border", "small", "peak"]),
    scoring=st.sampled_from(["foreground", "contrast"]),
    debias=st.booleans(),
    cached=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_no_features_whatever_lead_to_anything_but_a_mask(
    batches, kind, hint, foreground, scoring, debias, cached, dtype, small_model, accelerator
):
    """Step by step, with what a guide keeps of the steps before; by way of cached maps, too."""
    guide = Guide(
        small_model,
        kind,
        hint=hint,
        hint_ratio=0.2,
        foreground=foreground,
        scoring=scoring,
        debias=debias and kind != "amt",
    )
    for step, kinds in enumerate(batches):
        x = strange_features(kinds, step).to(dtype)
        guide.features = lambda images, layer, x=x: x
        guide.attention = lambda images, x=x: x.transpose(1, 2)[:, :4].float()
        relevance, _ = guide.relevance(torch.zeros(len(x), 3, 32, 32), update_mean=True)
        if cached:
            guide.maps = guide._compact(relevance.view(-1, 4, 4)).numpy()
            assert np.isfinite(guide.maps).all()
            crops = Crops(np.tile(np.float32([0.1, 0.1, 0.8, 0.7]), (len(x), 1)), np.arange(len(x)) % 2 == 0)
            relevance = guide.cached_relevance(
                Batch(torch.zeros(len(x), 3, 32, 32), np.arange(len(x)), [], np.zeros(len(x)), crops)
            )
        mask = guide.mask(relevance, torch.rand(len(x), 16))
        guide.finish_step(accelerator)
        m = 7 if kind == "amt" else 12
        assert mask.masked.shape == (len(x), m) and (mask.masked.diff(dim=1) > 0).all()
        assert ((mask.masked >= 0) & (mask.masked < 16)).all() and mask.visible.shape[1] == (3 if kind == "amt" else 4)
        assert all(not set(a.tolist()) & set(b.tolist()) for a, b in zip(*mask))
        assert guide.mean is None or guide.mean.isfinite().all()
