import json
import sys

import numpy as np
import pytest
import torch
from helpers import QUICK, image_bytes, picture, train_here
from PIL import Image

import analyze
import contest
import data
import masks
import report
import smae
from cropping import RandomStream, uniform
from objects import object_mask, sample_pictures
from shapes import load_shapes


def judge(monkeypatch, capsys, *arguments) -> str:
    monkeypatch.setattr(sys, "argv", ["analyze.py", "masks", *map(str, arguments)])
    analyze.main()
    return capsys.readouterr().out


def test_loss_of_object_and_background_add_up_to_the_loss_that_is_trained(small_model):
    images = torch.randint(0, 256, (70, 3, 32, 32), dtype=torch.uint8)
    share = torch.rand(70, 16)
    noise = torch.from_numpy(uniform((3, RandomStream.MASK), range(70), 16))
    with torch.no_grad():
        whole = small_model(data.normalize(images), masks.random_mask(70, 16, 0.75, noise=noise)).item()
    everything = contest.losses(small_model, images, torch.ones(70, 16), 0.75, seed=3)
    assert everything["object"] == pytest.approx(whole, rel=1e-5)
    parts = contest.losses(small_model, images, share, 0.75, seed=3)
    area = share.gather(1, masks.random_mask(70, 16, 0.75, noise=noise).masked).mean().item()
    assert area * parts["object"] + (1 - area) * parts["background"] == pytest.approx(whole, rel=1e-5)

    small_model.normalize_pixels = (
        False  # nothing to see in the upper half: there the target is 0, as is the prediction
    )
    images[:, :, :16] = (255 * torch.tensor(data.MEAN)).round().byte()[:, None, None]
    torch.nn.init.zeros_(small_model.head.weight)
    torch.nn.init.zeros_(small_model.head.bias)
    upper = (torch.arange(16) < 8).float().expand(70, -1)
    parts = contest.losses(small_model, images, upper, 0.75, seed=3)
    assert parts["object"] < 1e-4 and parts["background"] > 1


def test_masks_are_judged_beside_their_floors(quick_drawing, monkeypatch, tmp_path, capsys):
    train_here(monkeypatch, *QUICK, "--out", tmp_path / "run")
    out = tmp_path / "judged"
    text = judge(monkeypatch, capsys, "--checkpoint", tmp_path / "run", "--max-images", 120, "--out", out)
    args = analyze.build_parser().parse_args("masks --checkpoint a=1 b=2 --checkpoint c=3".split())
    assert args.checkpoint == ["a=1", "b=2", "c=3"]
    result = json.loads((out / "result.json").read_text())
    assert (out / "masks.png").stat().st_size > 10_000
    rows = result["rows"]
    sources = list(dict.fromkeys(row["source"] for row in rows))
    assert sources == [
        "random mask", "centre prior", "raw pixels", "untrained, 1", "model, 1", "model, 2", "model, decoder-1",
    ]  # fmt: skip
    assert [sum(row["source"] == source for row in rows) for source in sources] == [1, 1, 12, 12, 12, 12, 12]
    assert result["pictures"]["all"] == 120 and 0 < result["pictures"]["off-centre"] < 120
    floor, centre = rows[0]["all"], rows[1]["all"]
    assert abs(floor["auc"][0] - 0.5) < 4 * floor["auc"][1] and 0 < floor["auc"][1] < 0.03
    assert abs(floor["object"][0] - 0.75) < 4 * floor["object"][1]
    assert centre["auc"][0] > 0.55 and rows[1]["off-centre"]["auc"][0] < centre["auc"][0] - 0.1
    for row in rows:
        line = f"{100 * row['all']['iou'][0]:7.1f} ±{100 * row['all']['iou'][1]:3.1f}"
        assert line in text
    assert "off-centre:" in text and "120 pictures with an object of" in text
    assert all(sum(shares.values()) == pytest.approx(1) for shares in result["made_of"].values())
    assert f"object {result['loss']['object']:.4f}, background {result['loss']['background']:.4f}" in text
    by_source = {source: [row["all"] for row in rows if row["source"] == source] for source in sources}
    assert by_source["untrained, 1"] != by_source["model, 1"]
    for ways in list(by_source.values())[2:]:
        assert all(plain != debiased for plain, debiased in zip(ways[:6], ways[6:]))  # plain first, then debiased


def test_the_contact_sheet_shows_the_way_that_was_asked_for(monkeypatch, tmp_path, capsys, small_model):
    smae.save(small_model, tmp_path / "model")
    sheets, drawn = [], contest.pictures.contact_sheet
    monkeypatch.setattr(
        contest.pictures, "contact_sheet", lambda *a, **k: sheets.append((a, drawn(*a, **k))) or sheets[-1][1]
    )
    monkeypatch.setattr(contest.pictures.Figure, "savefig", lambda self, file, **_: file.write_bytes(b""))
    arguments = ["--checkpoint", tmp_path / "model", "--max-images", 30, "--layers", 2, "--out", tmp_path]
    for extra in ([], ["--foreground", "peak"], ["--relevance", "foreground"], ["--guide-debias"]):
        judge(monkeypatch, capsys, *arguments, "--overwrite", *extra)
    names = list(sheets[0][0][0])
    assert names[:3] == ["input", "random mask", "centre prior"] and names[-1] == "model, 2\nmask"
    assert "model, 2\n4 clusters" in names
    first = sheets[0][0]
    shown = (first[0]["model, 2\nmask"] == first[0]["input"]).all(-1).mean()
    assert 0.24 < shown < 0.27  # a quarter of the patches, the rest is hatched
    for (columns, title, *_), figure in sheets[1:]:
        assert title != first[1] and (columns["model, 2\nrelevance"] != first[0]["model, 2\nrelevance"]).any()
        assert (columns["centre prior"] == first[0]["centre prior"]).all()
        outlines = [len(axis.collections) for axis in figure.axes]
        assert outlines == [1] * len(outlines)  # the object, in every picture


def test_groups_are_named_and_masks_of_any_kind_understood(monkeypatch, tmp_path, capsys, small_model):
    import datasets

    smae.save(small_model, tmp_path / "model")
    rows = []
    for i in range(12):
        values = np.zeros((48, 64), np.uint8)
        values[10:30, 10 + i : 40 + i] = 255
        mask = Image.fromarray(values if i % 2 else values // 255)  # 0 and 255, or 0 and 1
        mask = mask.convert("RGB") if i == 3 else Image.fromarray(values).convert("1") if i == 5 else mask
        rows.append(dict(image=picture(64, 48, seed=i), truth=mask, place=i % 3))
    features = datasets.Features(
        image=datasets.Image(), truth=datasets.Image(), place=datasets.ClassLabel(names=["sea", "land", "air"])
    )
    datasets.Dataset.from_list(rows, features).to_parquet(tmp_path / "data.parquet")
    arguments = ["--checkpoint", tmp_path / "model", "--dataset", tmp_path / "data.parquet", "--layers", 3]
    arguments += ["--mask-column", "truth", "--group-column", "place"]
    text = judge(monkeypatch, capsys, *arguments, "--image-size", 40, "--out", tmp_path / "a")
    assert json.loads((tmp_path / "a" / "result.json").read_text())["pictures"] == {
        "all": 12, "air": 4, "land": 4, "sea": 4, "off-centre": 0,
    }  # fmt: skip
    assert "sea: 4 pictures" in text and "off-centre: 0 pictures" in text
    for row in rows:
        assert set(np.unique(object_mask(row["truth"]))) == {0, 255}
        assert (np.asarray(object_mask(row["truth"])) > 0).sum() == 600


def test_a_broken_mask_is_left_out(monkeypatch, tmp_path, capsys, small_model):
    import datasets

    smae.save(small_model, tmp_path / "model")
    shapes = load_shapes("test").select(range(6))
    blobs = [image_bytes(mask) for mask in shapes["mask"]]
    blobs[2] = b"not a picture"
    broken = [dict(bytes=b"nor is this, but nobody looks at it", path=None)] * 6
    table = datasets.Dataset.from_dict(
        dict(image=list(shapes["image"]), mask=[dict(bytes=blob, path=None) for blob in blobs], depth=broken),
        datasets.Features(image=datasets.Image(), mask=datasets.Image(), depth=datasets.Image()),
    )
    table.to_parquet(tmp_path / "data.parquet")
    arguments = ["--checkpoint", tmp_path / "model", "--dataset", tmp_path / "data.parquet", "--layers", 2]
    text = judge(monkeypatch, capsys, *arguments, "--out", tmp_path / "out")
    assert "5 pictures with an object" in text and "1 left out" in text
    images, objects = sample_pictures(data.load_images(str(tmp_path / "data.parquet")), 6, 32)
    assert len(images) == 6 and [bool(shape.any()) for shape in objects] == [True, True, False, True, True, True]


def test_the_usual_split_is_the_test_of_the_demo_data_alone():
    names = dict.fromkeys(("shapes", "shapes:easy"), "test") | dict.fromkeys(("shapes-own.parquet", "photos"), "train")
    assert {name: contest.usual_split(name, None) for name in names} == names
    assert contest.usual_split("shapes", "train") == "train"


def test_a_few_pictures_with_masks_are_from_all_over():
    few, everything = (contest.load_with_masks("shapes", None, None, "mask", count) for count in (3, None))
    places = data.evenly_spaced(len(everything), 3)
    assert few["bbox"][:] == [everything[int(i)]["bbox"] for i in places] != everything["bbox"][:3]


def test_no_value_is_none_in_json():
    assert analyze.spread(torch.tensor([torch.nan] * 2)) == dict(mean=None, deviation=0.0)
    assert report.shown(analyze.spread(torch.empty(0))) == "none"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--mask-column nothing", "has no column 'nothing'; name one with --mask-column"),
        ("--mask-column bbox", "does not hold masks"),
        ("--layers 9", "--layers 9: expected one of 1, 2, 3, decoder-1"),
        ("--dataset ./nowhere", "cannot find data set './nowhere'"),
        ("--checkpoint ./nothing", "nothing"),
        ("--mask-ratio 2", "between 0 and 1"),
        ("--image-size 30", "30x30 is not a positive multiple of the patch size 8"),
    ],
)
def test_wrong_calls_give_one_line(arguments, message, monkeypatch, tmp_path, capsys, small_model):
    smae.save(small_model, tmp_path / "model")
    with pytest.raises(SystemExit):
        model = [] if "--checkpoint" in arguments else ["--checkpoint", tmp_path / "model"]
        judge(monkeypatch, capsys, *model, "--out", tmp_path / "out", *arguments.split())
    errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(errors) == 1 and message in errors[0] and not (tmp_path / "out").exists()
