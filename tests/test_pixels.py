"""Channels, and the range of values that becomes 8 bits."""

import io

import datasets
import numpy as np
import pytest
import torch
from helpers import QUICK, SMALL, image_bytes, picture, records, train_here
from PIL import Image

import data
import eval as judge
import pixels
import smae
import train
from cropping import random_crops
from pixels import PixelFormat


def npy(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


# ------------------------------------------------------------------------------------------- channels


def test_one_channel_is_grey_and_three_are_rgb_whatever_a_picture_has():
    for image in (picture(), picture().convert("L"), picture().convert("RGBA"), picture().quantize(255)):
        assert pixels.convert(image, PixelFormat(1)).mode == "L"
        assert pixels.convert(image, PixelFormat(3)).mode == "RGB"
    grey = picture().convert("L")
    assert np.array_equal(np.asarray(pixels.convert(grey, PixelFormat(1))), np.asarray(grey))


def test_other_numbers_of_channels_must_be_those_of_the_picture():
    cmyk = picture().convert("CMYK")
    bands = pixels.convert(cmyk, PixelFormat(4))
    assert bands.size == (40, 30) and np.array_equal(np.asarray(bands.bands[2]), np.asarray(cmyk)[..., 2])
    with pytest.raises(ValueError, match=r"it has 3 channels \(RGB\), expected 4 \(--channels\)"):
        pixels.convert(picture(), PixelFormat(4))
    with pytest.raises(ValueError, match=r"array of shape \(5, 6, 7\), expected 4 channels first or last"):
        pixels.convert(np.zeros((5, 6, 7)), PixelFormat(4))


def test_arrays_have_their_channels_first_or_last():
    values = np.random.default_rng(0).integers(0, 256, (20, 30, 5), dtype=np.uint8)
    for array in (values, np.moveaxis(values, -1, 0)):
        for record in (array, dict(bytes=npy(array), path=None)):
            bands = data.decode(record, PixelFormat(5))
            assert np.array_equal(np.stack([np.asarray(band) for band in bands.bands], -1), values)


def test_crops_of_bands_are_those_of_each_band():
    image = picture()
    bands = pixels.Bands(image.split())
    box = np.array([3, 5, 20, 22])
    assert torch.equal(pixels.crop(bands, box, True, 16), pixels.crop(image, box, True, 16))
    assert torch.equal(data.center_crop(bands, 16, 0.8), data.center_crop(image, 16, 0.8))
    assert torch.equal(pixels.stretch(bands, 16), pixels.stretch(image, 16))


@pytest.fixture
def five(tmp_path):
    """Pictures of five channels with labels, in an array column and as .npy bytes."""
    rng = np.random.default_rng(0)
    arrays = [(rng.integers(0, 120, (5, 36, 40)) + 60 * (i % 2)).astype(np.uint8) for i in range(40)]
    labels = [i % 2 for i in range(40)]
    features = datasets.Features(
        image=datasets.Array3D((5, 36, 40), "uint8"), label=datasets.ClassLabel(names=["a", "b"])
    )
    for split in ("train", "test"):
        (tmp_path / "arrays").mkdir(exist_ok=True)
        table = datasets.Dataset.from_dict(dict(image=arrays, label=labels), features)
        table.to_parquet(tmp_path / "arrays" / f"{split}.parquet")
    features = datasets.Features(pixels=datasets.Value("binary"), label=datasets.ClassLabel(names=["a", "b"]))
    table = dict(pixels=[npy(array) for array in arrays], label=labels)
    datasets.Dataset.from_dict(table, features).to_parquet(tmp_path / "npy.parquet")
    return tmp_path


@pytest.mark.parametrize("extra", ["", "--preload", "--streaming --workers 1", "--guide cached", "--guide-from pixels"])
def test_a_model_of_five_channels_trains_and_is_evaluated(extra, five, request, monkeypatch, tmp_path):
    if extra:
        request.getfixturevalue("quick_drawing")
    arguments = [*QUICK, "--channels", 5, "--guide-start", 1, *extra.split(), "--out", tmp_path / "run"]
    train_here(monkeypatch, *arguments, "--dataset", five / "arrays")
    model = smae.load(tmp_path / "run")
    assert model.config["channels"] == 5 and len(model.config["mean"]) == 5
    assert 0.25 < model.config["mean"][0] < 0.45  # measured
    assert records(tmp_path / "run")[-1]["loss"] < 3
    if not extra:
        common = ["--dataset", five / "arrays", "--precision", "no", "--workers", 0]
        checkpoint = ["--checkpoint", tmp_path / "run"]
        result = judge.main(["knn", *checkpoint, *common, "--k", 3, "--out", tmp_path / "knn"])
        assert result["images"] == 40
        short = ["--epochs", 1, "--batch-size", 10]
        judge.main(["finetune", *checkpoint, *common, *short, "--out", tmp_path / "tuned"])
        judge.main(["embed", "--checkpoint", tmp_path / "tuned", *common, "--out", tmp_path / "embedded"])
        floor = ["--checkpoint", "random", *SMALL, "--channels", 5]
        assert judge.main(["knn", *floor, *common, "--k", 3, "--out", tmp_path / "random"])["images"] == 40


def test_npy_bytes_are_pictures(five):
    loaded = data.load_images(str(five / "npy.parquet"), image_column="pixels")
    assert data.decode(loaded[0]["image"], PixelFormat(5)).size == (40, 36)


def test_a_grey_model_reads_colour_pictures_as_grey(quick_drawing, monkeypatch, tmp_path):
    train_here(monkeypatch, *QUICK, "--channels", 1, "--guide-start", 1, "--out", tmp_path / "run")
    model = smae.load(tmp_path / "run")
    assert model.config["channels"] == 1 and model.config["mean"] == pytest.approx([sum(data.MEAN) / 3])
    arguments = ["--max-images", 16, "--k", 3, "--precision", "no", "--workers", 0, "--out", tmp_path / "knn"]
    assert judge.main(["knn", "--checkpoint", tmp_path / "run", *arguments])["images"] == 1000


def test_pictures_of_the_wrong_number_of_channels_are_named(tmp_path, monkeypatch):
    for i in range(20):
        (tmp_path / "photos").mkdir(exist_ok=True)
        picture(seed=i).save(tmp_path / "photos" / f"{i}.png")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(ValueError, match="can be decoded"):
        train.main([*QUICK, "--channels", 4, "--dataset", tmp_path / "photos", "--out", tmp_path / "run"])


def test_a_grey_checkpoint_of_transformers_works_in_every_command(monkeypatch, tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    sizes |= dict(decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2)
    config = transformers.ViTMAEConfig(
        **sizes, decoder_intermediate_size=32, image_size=32, patch_size=8, num_channels=1
    )
    transformers.ViTMAEForPreTraining(config).save_pretrained(tmp_path / "grey")
    assert len(smae.load(tmp_path / "grey").config["mean"]) == 1
    quick = [str(x) for x in QUICK[len(SMALL) :]]
    train_here(monkeypatch, *quick, "--init-from", tmp_path / "grey", "--out", tmp_path / "run")
    import analyze

    analyze.main(
        ["masks", "--checkpoint", str(tmp_path / "grey"), "--max-images", "12", "--out", str(tmp_path / "masks")]
    )
    assert (tmp_path / "masks" / "masks.png").exists()


# ------------------------------------------------------------------------------------------- ranges


def twelve_bits(seed: int) -> Image.Image:
    return Image.fromarray(np.asarray(picture(seed=seed).convert("L")).astype(np.uint16) * 16)


def dataset_of(images, kind="PNG") -> datasets.Dataset:
    table = {"image": [dict(bytes=image_bytes(image, kind), path=None) for image in images]}
    return datasets.Dataset.from_dict(table, datasets.Features(image=datasets.Image(decode=False)))


def levels(image) -> int:
    return len(np.unique(np.asarray(image)))


def test_twelve_bits_in_sixteen_are_noticed_and_a_range_keeps_their_levels(capsys):
    dataset = dataset_of([twelve_bits(i) for i in range(4)])
    form = data.pixel_format(dataset, 1)
    said = capsys.readouterr().err
    assert "of 0 to 65535: few grey levels are left" in said and "--pixel-range" in said
    assert levels(data.decode(dataset[0]["image"], form)) <= 17
    form = data.pixel_format(dataset, 1, ["0", "4080"])
    expected = np.asarray(picture().convert("L"), int)
    assert np.abs(np.asarray(data.decode(dataset[0]["image"], form), int) - expected).max() <= 1
    form = data.pixel_format(dataset, 1, ["auto"])
    assert levels(data.decode(dataset[0]["image"], form)) > 100 and "--pixel-range auto" in capsys.readouterr().err


def test_depths_and_hounsfield_units_have_a_range(capsys):
    values = [np.linspace(-1000, 400, 1200, dtype=np.float32).reshape(30, 40) + i for i in range(3)]
    dataset = dataset_of([Image.fromarray(each) for each in values], "TIFF")
    data.pixel_format(dataset, 1)
    assert "have values from -992.166 to 394.166, of 0 to 65535" in capsys.readouterr().err
    decoded = np.asarray(data.decode(dataset[0]["image"], data.pixel_format(dataset, 1, ["-1000", "400"])))
    assert decoded.min() == 0 and decoded.max() == 255 and levels(decoded) == 256


def test_values_that_are_missing_or_far_out_do_not_darken_a_picture(capsys):
    values = np.asarray(picture().convert("L"), np.float32) / 255
    for hole in (np.nan, np.inf, -np.inf):
        holed = values.copy()
        holed[0, 0] = hole
        decoded = np.asarray(pixels.convert(Image.fromarray(holed), PixelFormat(1)))
        assert decoded[0, 0] == 0 and levels(decoded) > 50
        with np.errstate(invalid="raise"):  # no number is made of a missing one
            ranged = np.asarray(pixels.convert(Image.fromarray(holed), PixelFormat(1, -1, 1)))
        assert ranged[0, 0] == 0 or hole == np.inf
    depth = np.linspace(1, 5, 1200, dtype=np.float32).reshape(30, 40)
    depth[0, 0] = 65535
    assert "few grey levels" in pixels.unused_range([Image.fromarray(depth)])


def test_white_follows_from_the_type_of_an_array():
    """A dark array of 16 bits once became as bright as one of 8."""
    for kind, white in ((np.uint16, 65535), (">u2", 65535), (np.int32, 255), (np.float32, 255)):
        values = np.array([[0, 200]]).astype(kind)
        expected = round(200 * 255 / white)
        assert np.asarray(pixels.convert(values, PixelFormat(1))).tolist() == [[0, expected]], kind
    for values in (np.array([[False, True]]), np.array([[0.0, 1.0]])):
        assert np.asarray(pixels.convert(values, PixelFormat(1))).tolist() == [[0, 255]]


def test_float_pictures_of_one_data_set_share_their_white(capsys):
    values = [np.full((30, 40), top, np.float32) for top in (0.9, 1.0, 0.5)]
    form = data.pixel_format(dataset_of([Image.fromarray(each) for each in values], "TIFF"), 1)
    assert "white 1" in capsys.readouterr().err
    bright = pixels.convert(Image.fromarray(np.array([[0.5, 1.1]], np.float32)), form)
    assert np.asarray(bright).tolist() == [[128, 255]]  # 1.1 does not make 0.5 black


@pytest.mark.parametrize("tops, white", [((200, 3000), 65535), ((200, 3), 255), ((1, 0), 255)])
def test_integers_of_one_data_set_share_their_white(tops, white):
    """A dark picture among bright ones once became 257 times as bright."""
    table = datasets.Dataset.from_dict(dict(image=[np.full((4, 5, 1), top, np.int32) for top in tops]))
    form = data.pixel_format(table, 1)
    assert (form.low, form.high) == (0, white)
    levels = [int(np.asarray(data.decode(record["image"], form)).max()) for record in table]
    assert levels == [round(top * 255 / white) for top in tops]


@pytest.mark.parametrize("values", [np.empty((0, 4)), np.array([["a"]]), np.ones((4, 4), complex)])
def test_arrays_that_are_no_pictures_are_broken_pictures(values):
    sound = np.full((4, 4), 0.5)
    with pytest.raises(ValueError, match="expected real numbers"):
        data.decode(values, PixelFormat(1))
    _, label, bad = data.decode_or_next([dict(image=values, label=1), dict(image=sound, label=2)], 0, 2, PixelFormat(1))
    assert label == 2 and [each.index for each in bad] == [0]


def test_pictures_that_use_their_range_are_left_alone(capsys):
    grey = np.asarray(picture().convert("L"))
    for image in (picture(), Image.fromarray(grey), Image.fromarray(grey.astype(np.uint16) * 257)):
        data.pixel_format(dataset_of([image]), 3)
    assert not capsys.readouterr().err


@pytest.mark.parametrize("given", [["1"], ["5", "5"], ["a", "b"], ["1", "2", "3"], ["0", "inf"]])
def test_a_range_is_two_numbers_in_order(given):
    with pytest.raises(ValueError, match="--pixel-range takes LOW HIGH"):
        data.pixel_format(dataset_of([picture()]), 3, given)


# ------------------------------------------------------------------------------------------- oblong pictures


def test_oblong_crops_have_the_shape_of_the_model_and_keep_proportions():
    image = picture(90, 60)
    assert pixels.center_crop(image, (32, 48)).shape == (3, 32, 48)
    whole = pixels.stretch(image, (32, 48))
    assert (pixels.center_crop(image, (32, 48)).int() - whole.int()).abs().float().mean() < 1  # 2 : 3, like the picture
    assert pixels.center_crop(image, (48, 32), 0.5).shape == (3, 48, 32)
    sizes, noise = np.tile([[200, 300]], (500, 1)), np.random.default_rng(0).random((500, 23))
    boxes = random_crops(sizes, noise, (0.2, 0.5), aspect=2.0).boxes
    ratio = boxes[:, 3] / boxes[:, 2]
    assert 1.9 < np.exp(np.log(ratio).mean()) < 2.1 and ratio.min() > 1.45 and ratio.max() < 2.75


@pytest.mark.parametrize(
    "extra", ["", "--preload", "--streaming --workers 1", "--guide cached", "--guide-from column:mask"]
)
def test_oblong_models_train_resume_and_are_evaluated(extra, quick_drawing, monkeypatch, tmp_path):
    sizes = QUICK[: QUICK.index("--image-size")] + QUICK[QUICK.index("--image-size") + 2 :]
    arguments = [
        *sizes,
        "--image-size",
        32,
        48,
        "--guide-start",
        1,
        "--save-every-steps",
        1,
        "--keep",
        9,
        *extra.split(),
    ]
    train_here(monkeypatch, *arguments, "--out", tmp_path / "run")
    model = smae.load(tmp_path / "run")
    assert model.config["image_size"] == [32, 48] and model.patch_count == 24
    resume = ["--resume", tmp_path / "run" / "checkpoint-00000003", "--out", tmp_path / "again"]
    train_here(monkeypatch, *arguments, *resume)
    again = smae.load(tmp_path / "again").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())
    if not extra:
        common = ["--precision", "no", "--workers", 0, "--max-images", 16]
        checkpoint = ["--checkpoint", tmp_path / "run"]
        result = judge.main(["knn", *checkpoint, *common, "--k", 3, "--out", tmp_path / "knn"])
        assert result["config"]["image_size"] == [32, 48]
        tuned = tmp_path / "tuned"
        judge.main(["finetune", *checkpoint, *common, "--epochs", 1, "--batch-size", 8, "--out", tuned])
        judge.main(["predict", "--checkpoint", tuned, *common, "--out", tmp_path / "predicted"])
        import analyze

        analyze.main(["masks", *map(str, checkpoint), "--max-images", "12", "--out", str(tmp_path / "masks")])


def test_an_image_size_is_one_side_or_two():
    parse = train.build_parser().parse_args
    assert parse(["--image-size", "32"]).image_size == 32 == parse(["--image-size", "32", "32"]).image_size
    assert parse(["--image-size", "32", "48"]).image_size == [32, 48]
    with pytest.raises(SystemExit):
        parse(["--image-size", "1", "2", "3"])
