"""dense.py from end to end: segmentation, detection, test, predictions, resuming."""

import argparse
import contextlib
import io
import json
import os
import re
import shutil
import signal
import sys

import forked
import numpy as np
import pytest
import torch
import undrawn
from accelerate import Accelerator
from coco_files import coco_content, make_coco
from helpers import ROOT, contents, picture, records, with_bad
from PIL import Image
from torch import nn

import dense
import overlays
import scores
import smae
import tasks
from data import TooManyBadImages
from detector import Detector
from label_maps import load_label_maps
from pixels import RGB
from scenes import Pictures
from segmenter import Segmenter

MODEL = "--checkpoint random --width 32 --depth 2 --heads 2 --image-size 32".split()
QUICK = [
    *MODEL,
    *"--no-floor --epochs 2 --max-images 32 --max-test-images 6 --batch-size 8 --workers 0 --precision no".split(),
]
SEGMENT = ["segment", *QUICK, *"--head upernet --head-width 8".split()]
DETECT = ["detect", *QUICK, *"--no-single-class --head-width 8 --rois 8 --proposals 16".split()]


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


@pytest.fixture
def quick_drawing(monkeypatch):
    """Trainings draw no predictions, which takes two thirds of their time."""
    monkeypatch.setattr(dense, "draw", undrawn.draw_predictions)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A small encoder, saved."""
    folder = tmp_path_factory.mktemp("encoder")
    smae.save(smae.SMAE(width=32, depth=2, heads=2, decoder_depth=0, image_size=32, patch_size=8), folder)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A segmenter and a detector, trained for an epoch."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setattr(dense, "draw", undrawn.draw_predictions)
        for command in (SEGMENT, DETECT):
            dense.main([*command, "--epochs", 1, "--out", folder / command[0]])
    return folder


def test_a_segmenter_is_trained_tested_and_compared_with_its_floor(encoder, tmp_path, capsys):
    out = tmp_path / "run"
    command = ["segment", *QUICK, "--head", "linear", "--checkpoint", encoder, "--floor", "--out", out]
    found = dense.main(command)
    assert set(dense.FILES["segment"]) <= contents(out).keys()
    assert found["images"] == 6 and 0 < found["miou"] < 100 and 0 < found["floor"]["miou"] < 100
    assert json.loads((out / "result.json").read_text()) == json.loads(json.dumps(found))
    assert [record["miou"] for record in records(out)][-1] == found["miou"]
    assert "floor, an untrained encoder: mIoU" in capsys.readouterr().out
    model = smae.load(out)
    assert type(model) is Segmenter and model.classes[0] == "background"
    weights = smae.load(encoder).state_dict()
    assert all(torch.equal(tensor, model.encoder.state_dict()[name]) for name, tensor in weights.items())  # frozen
    assert type(smae.load(out / "floor")) is Segmenter
    with pytest.raises(ValueError, match="holds another run"):
        dense.main(command)


def test_a_detector_is_trained_and_tested(tmp_path):
    found = dense.main([*DETECT, "--out", tmp_path])
    assert set(dense.FILES["detect"]) <= contents(tmp_path).keys()
    assert found["images"] == 6 and {"box_ap", "mask_ap", "box_ap_small", "mask_by_class"} <= found.keys()
    assert type(smae.load(tmp_path)) is Detector
    assert smae.encoder_of(smae.load(tmp_path)).config["width"] == 32
    assert records(tmp_path)[-1]["loss"] > 0


@pytest.mark.parametrize("command", [SEGMENT, DETECT], ids=["segment", "detect"])
def test_a_run_stopped_within_an_epoch_resumes_to_the_bit(tmp_path, quick_drawing, monkeypatch, command):
    dense.main([*command, "--out", tmp_path / "whole", "--workers", 1])
    kind, losses = (tasks.Segmentation if command is SEGMENT else tasks.Detection), []
    loss = kind.loss

    def counted(self, *arguments):
        losses.append(loss(self, *arguments))
        if len(losses) == 6:  # in the second epoch of four steps
            os.kill(os.getpid(), signal.SIGTERM)
        return losses[-1]

    monkeypatch.setattr(kind, "loss", counted)
    with pytest.raises(KeyboardInterrupt, match="stopped by SIGTERM in epoch 2, after step 6"):
        dense.main([*command, "--out", tmp_path / "parts"])
    assert (tmp_path / "parts" / "checkpoint-00000006").is_dir()
    found = dense.main([*command, "--out", tmp_path / "parts", "--resume"])
    assert len(losses) == 8
    whole, parts = contents(tmp_path / "whole"), contents(tmp_path / "parts")
    assert parts["model.safetensors"] == whole["model.safetensors"]
    expected = json.loads(whole["result.json"])
    metric = "miou" if command is SEGMENT else "box_ap"
    assert found[metric] == expected[metric]
    assert [record["loss"] for record in records(tmp_path / "parts")] == [
        record["loss"] for record in records(tmp_path / "whole")
    ]


def test_a_training_does_what_its_options_say(tmp_path, quick_drawing, monkeypatch):
    """Hardly any of it shows in a score."""
    runs, scales, make, augment = [], [], dense.Run, tasks.Segmentation.augment
    monkeypatch.setattr(dense, "Run", lambda *given, **more: runs.append(make(*given, **more)) or runs[0])
    monkeypatch.setattr(tasks.Segmentation, "augment", lambda self, scale: scales.append(scale) or augment(self, scale))
    how = "--lr 2e-3 --schedule steps --clip-grad 0.5 --warmup-epochs 1 --layer-decay 0.5 --weight-decay 0.3"
    how += " --drop-path 0.25 --scale 0.9 1.1 --max-images 8"
    dense.main([*SEGMENT, *how.split(), "--out", tmp_path])
    schedule, groups = runs[0].schedule, runs[0].optimizer.param_groups
    assert (schedule.lr, schedule.shape, schedule.clip_grad, schedule.warmup_epochs) == (2e-3, "steps", 0.5, 1)
    assert {round(group["lr"] / runs[0].lr, 6) for group in groups} == {0.125, 0.25, 0.5, 1}  # embedding, blocks, head
    assert {group["weight_decay"] for group in groups} == {0, 0.3} and scales == [(0.9, 1.1)]
    assert [block.drop_path for block in runs[0].model.encoder.blocks] == [0, 0.25]


def test_a_finished_run_is_resumed_to_the_same_result(trained, quick_drawing, tmp_path):
    shutil.copytree(trained / "segment", tmp_path / "run")
    before = json.loads((tmp_path / "run" / "result.json").read_text())
    found = dense.main([*SEGMENT, "--epochs", 1, "--out", tmp_path / "run", "--resume"])
    assert found["miou"] == before["miou"] and found["iou"] == before["iou"]


def test_a_test_that_fails_costs_no_training(tmp_path, quick_drawing, monkeypatch):
    """The test pictures may be broken, or the time of the job may be over."""
    losses, loss, predict = [], tasks.Segmentation.loss, tasks.Segmentation.predict

    def stopped(self, scene):
        os.kill(os.getpid(), signal.SIGTERM)
        return predict(self, scene)

    monkeypatch.setattr(tasks.Segmentation, "loss", lambda *a: losses.append(loss(*a)) or losses[-1])
    monkeypatch.setattr(tasks.Segmentation, "predict", stopped)
    command = [*SEGMENT, "--epochs", 1, "--out", tmp_path]
    with pytest.raises(KeyboardInterrupt, match="stopped by SIGTERM in epoch 1, after step 4"):
        dense.main(command)
    monkeypatch.setattr(tasks.Segmentation, "predict", predict)
    assert dense.main([*command, "--resume"])["images"] == 6 and len(losses) == 4


def test_broken_test_pictures_cost_no_training(tmp_path, quick_drawing, monkeypatch):
    def broken(*arguments, **options):
        raise TooManyBadImages("2 of 6 pictures are broken")

    losses, loss, judge = [], tasks.Segmentation.loss, tasks.Segmentation.test
    monkeypatch.setattr(tasks.Segmentation, "loss", lambda *a: losses.append(loss(*a)) or losses[-1])
    monkeypatch.setattr(tasks.Segmentation, "test", broken)
    command = [*SEGMENT, "--epochs", 1, "--out", tmp_path]
    with pytest.raises(TooManyBadImages):
        dense.main(command)
    monkeypatch.setattr(tasks.Segmentation, "test", judge)
    assert dense.main([*command, "--max-bad-images", 0.5, "--resume"])["images"] == 6 and len(losses) == 4


def test_what_is_random_does_not_depend_on_what_was_drawn_before(tmp_path, quick_drawing, monkeypatch):
    judge = tasks.Segmentation.test
    command = [*SEGMENT, "--test-every", 1]  # UPerNet has dropout
    dense.main([*command, "--out", tmp_path / "one"])
    monkeypatch.setattr(tasks.Segmentation, "test", lambda *a, **o: torch.rand(7) is None or judge(*a, **o))
    dense.main([*command, "--out", tmp_path / "other"])
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "other")]
    assert files[0] == files[1]


def test_predictions_overwrite_nothing_unless_told_to(trained, photos, tmp_path):
    (tmp_path / "label_maps").mkdir()
    (tmp_path / "label_maps" / "truth.png").write_bytes(b"mine")
    how = ["predict", "--checkpoint", trained / "segment", "--dataset", photos, "--precision", "no", "--out", tmp_path]
    with pytest.raises(ValueError, match="holds another run \\(label_maps\\)"):
        dense.main(how)
    with pytest.raises(FileNotFoundError):
        dense.main([*how, "--checkpoint", tmp_path / "typo", "--overwrite"])
    assert (tmp_path / "label_maps" / "truth.png").read_bytes() == b"mine"


def test_resuming_with_another_head_is_refused(trained, tmp_path):
    shutil.copytree(trained / "segment", tmp_path / "run")
    with pytest.raises(ValueError, match="cannot resume with other options: --head-width was 8"):
        dense.main([*SEGMENT, "--epochs", 1, "--head-width", 16, "--out", tmp_path / "run", "--resume"])


def test_a_test_that_loses_a_process_ends_in_a_line(trained, tmp_path):
    how = ["test", "--checkpoint", trained / "segment", "--split", "test", "--max-images", 6, "--workers", 0]
    how += ["--out", tmp_path / "out"]
    assert forked.finish(forked.start(tmp_path / "log", *how, script="dense", world=2, patches="dying")) == [1, 9]
    said = (tmp_path / "log-0").read_text()
    assert "error: another process of the run is gone" in said and "Traceback" not in said


@pytest.mark.parametrize("task", ["segment", "detect"])
def test_a_test_gives_the_scores_of_the_training_over_any_number_of_processes(trained, quick_drawing, tmp_path, task):
    before = json.loads((trained / task / "result.json").read_text())
    how = ["--checkpoint", trained / task, "--split", "test", "--max-images", 6, "--workers", 0, "--precision", "no"]
    found = dense.main(["test", *how, "--out", tmp_path / "one"])
    processes = forked.start(tmp_path / "log", "test", *how, "--out", tmp_path / "two", script="dense", world=2)
    assert forked.finish(processes) == [0, 0]
    again = json.loads((tmp_path / "two" / "result.json").read_text())
    assert again["processes"] == 2
    for name in ("images", "miou", "iou") if task == "segment" else ("images", "box_ap", "mask_ap", "box_ap50"):
        assert found[name] == before[name] and again[name] == pytest.approx(before[name], abs=1e-9)


def test_two_processes_train_one_model_and_then_its_floor(encoder, tmp_path):
    how = ["--checkpoint", encoder, "--floor", "--epochs", 1, "--log-with", "tensorboard"]
    processes = forked.start(tmp_path / "log", *SEGMENT, *how, "--out", tmp_path / "run", script="dense", world=2)
    assert forked.finish(processes) == [0, 0]
    found = json.loads((tmp_path / "run" / "result.json").read_text())
    assert found["processes"] == 2 and found["images"] == found["floor"]["images"] == 6


def test_predictions_of_a_segmenter_are_label_maps_with_a_palette(trained, photos, tmp_path):
    (photos / "00.png").rename(photos / f"{'0' * 250}.png")  # as long as names of files can be
    how = ["--dataset", photos, "--split", "train", "--max-bad-images", 0.1, "--precision", "no"]
    found = dense.main(["predict", "--checkpoint", trained / "segment", *how, "--out", tmp_path])
    assert found["images"] == 39  # one of 40 is broken
    file = sorted((tmp_path / "label_maps").iterdir())[5]
    with Image.open(file) as labels, Image.open(photos / f"{file.stem.split('-')[1]}.png") as picture:
        assert labels.mode == "P" and labels.size == picture.size
        assert np.asarray(labels).max() < 13 and len(labels.getpalette()) > 39
    assert len(list((tmp_path / "overlays").iterdir())) == 39 and (tmp_path / "predictions.png").exists()


@pytest.mark.parametrize("split", ["", "train"])
def test_masks_beside_the_pictures_are_no_pictures_to_predict(split, trained, tmp_path):
    for number in range(3):
        for name in ("images", "masks"):
            (tmp_path / "data" / name / split).mkdir(parents=True, exist_ok=True)
            picture(40, 32, seed=number).save(tmp_path / "data" / name / split / f"{number}.png")
    how = ["--dataset", tmp_path / "data", "--precision", "no", "--out", tmp_path / "found"]
    assert dense.main(["predict", "--checkpoint", trained / "segment", *how])["images"] == 3


def test_a_named_column_of_pictures_is_predicted(trained, tmp_path):
    for name in ("images/0", "images/1", "masks/0", "scans/0"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        picture(40, 32).save(tmp_path / "data" / f"{name}.png")
    (tmp_path / "data" / "metadata.csv").write_text("file_name,scan_file_name\nimages/0.png,scans/0.png\n")
    how = ["--dataset", tmp_path / "data", "--image-column", "scan", "--precision", "no", "--out", tmp_path / "found"]
    assert dense.main(["predict", "--checkpoint", trained / "segment", *how])["images"] == 1


def test_predictions_of_a_detector_are_boxes_and_pictures(trained, photos, tmp_path, monkeypatch):
    (photos / "16.png").write_bytes(b"not a picture")  # the fourth of eight that are spread over all
    how = ["--dataset", photos, "--split", "train", "--max-images", 8, "--max-bad-images", 0.2, "--precision", "no"]
    monkeypatch.setattr(tasks, "SHOWN_SCORE", 0.0)  # it has hardly learned
    found = dense.main(["predict", "--checkpoint", trained / "detect", *how, "--out", tmp_path])
    boxes = json.loads((tmp_path / "detections.json").read_text())
    assert found["images"] == 7 and boxes[0].keys() >= {
        "image_id",
        "category_id",
        "bbox",
        "score",
        "segmentation",
        "file",
    }
    assert not (tmp_path / "label_maps").exists()
    with Image.open(sorted((tmp_path / "overlays").iterdir())[0]) as drawn:
        assert min(drawn.size) >= 256


def test_detections_are_written_under_the_ids_of_the_data(tmp_path, quick_drawing):
    """And pycocotools gives them the same score."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    for split in ("train2017", "val2017"):
        make_coco(tmp_path / "coco", split)
    torch.manual_seed(0)
    how = ["--dataset", tmp_path / "coco", "--batch-size", 2, "--max-images", 3, "--epochs", 40, "--test-every", 40]
    found = dense.main([*DETECT, *how, "--lr", 3e-3, "--out", tmp_path / "run"])
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(tmp_path / "coco" / "annotations" / "instances_val2017.json")
        boxes = truth.loadRes(str(tmp_path / "run" / "detections.json"))
        evaluation = COCOeval(truth, boxes, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    assert found["box_ap"] == pytest.approx(100 * evaluation.stats[0])
    assert {each["category_id"] for each in json.loads((tmp_path / "run" / "detections.json").read_text())} <= {3, 9}


def test_pictures_are_held_out_where_no_split_is_for_the_test(tmp_path, quick_drawing, capsys):
    for number in range(20):
        for name, image in (("images", picture(40, 32, seed=number)), ("masks", Image.new("L", (40, 32), number % 2))):
            (tmp_path / "data" / name).mkdir(parents=True, exist_ok=True)
            image.save(tmp_path / "data" / name / f"{number}.png")
    command = [*SEGMENT, "--dataset", tmp_path / "data", "--batch-size", 4, "--out", tmp_path / "run"]
    assert dense.main(command)["images"] == 2
    assert "every tenth picture is held out (2)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        (["segment", "--image-size", 30], "is not a positive multiple of the patch size 8"),
        (["detect", "--image-size", 40], "must be a multiple of 32"),
        (["segment", "--head", "upernet", "--batch-size", 1], "BatchNorm needs at least two pictures"),
        (["segment", "--drop-path", 1.5], r"--drop-path must lie in \[0, 1\), got 1.5"),
        (["segment", "--layer-decay", 0], r"--layer-decay must lie in \(0, 1\], got 0"),
        (["segment", "--blocks", 9], "blocks must lie between 1 and 2"),
        (["segment", "--scale", 2, 1], "--scale takes two factors"),
        (["segment", "--test-split", "oak"], "Unknown split 'oak'"),
        (["segment", "--checkpoint", "pixels"], "has nothing to train on"),
        (["detect", "--window", -1], "window must not be negative"),
        (["detect", "--test-every", 0], "--test-every must be at least 1"),
    ],
)
def test_wrong_options_are_one_line(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        dense.main([options[0], *QUICK, *options[1:], "--out", tmp_path / "run"])


def test_a_test_reads_pictures_and_classes_as_the_training_did(tmp_path, monkeypatch):
    """Also, all checkpoints that --keep asks for stay, though each is written before a test."""
    highest = []
    monkeypatch.setattr(dense, "draw", lambda task, scenes, *_: highest.append(scenes.form.high))
    for number in range(12):
        for name, image in (("images", picture(40, 32, seed=number)), ("masks", Image.new("L", (40, 32), number % 3))):
            (tmp_path / "data" / name).mkdir(parents=True, exist_ok=True)
            image.save(tmp_path / "data" / name / f"{number}.png")
    (tmp_path / "names.txt").write_text("sky\nearth\nsea\n")
    data = ["--dataset", tmp_path / "data", "--classes", tmp_path / "names.txt"]
    how = ["--ignore-index", 0, "--pixel-range", 0, 4095, "--batch-size", 4, "--epochs", 3, "--test-every", 1]
    dense.main([*SEGMENT, *data, *how, "--keep", 9, "--out", tmp_path / "run"])
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) == 3
    args = argparse.Namespace(checkpoint=str(tmp_path / "run"), pixel_range=None, slide=None)
    task, config = dense.load_task(args, torch.device("cpu"))
    assert args.pixel_range == config["data"]["pixel_range"] == [0, 4095] and task.model.classes == ["earth", "sea"]
    how = ["--checkpoint", tmp_path / "run", "--split", "train", "--precision", "no", "--out", tmp_path / "test"]
    tested = dense.main(["test", *data, *how])
    assert tested["images"] == 12 and highest == [4095] * 4
    tested_again = dense.main(["test", *data[:2], *how, "--overwrite"])  # the names need not be given again
    assert tested_again["iou"] == tested["iou"]


def test_a_split_without_truth_is_no_split_for_the_test(tmp_path, capsys):
    for number in range(20):
        split = "train" if number < 14 else "test"
        for name in ("images", "masks")[: 2 if split == "train" else 1]:
            (tmp_path / name / split).mkdir(parents=True, exist_ok=True)
            Image.new("L", (40, 32), number % 2).save(tmp_path / name / split / f"{number}.png")
    training, tests = dense.load_both(options_of("segment", "--dataset", str(tmp_path)), 3)
    assert (len(training), len(tests)) == (13, 1)
    assert "not tested on split test" in (said := capsys.readouterr().err) and "held out (1)" in said


def test_what_is_trained_on_is_no_split_for_the_test_unless_named(tmp_path, capsys):
    for number in range(20):
        for name in ("images", "masks"):
            (tmp_path / "maps" / name / "val").mkdir(parents=True, exist_ok=True)
            Image.new("L", (40, 32), number % 2).save(tmp_path / "maps" / name / "val" / f"{number}.png")
    options = ["segment", "--dataset", str(tmp_path / "maps"), "--split", "val"]
    training, tests = dense.load_both(options_of(*options), 3)
    assert (len(training), len(tests)) == (18, 2)
    assert "has no other split for the test" in capsys.readouterr().err
    training, tests = dense.load_both(options_of(*options, "--test-split", "val"), 3)
    assert (len(training), len(tests)) == (20, 20)

    make_coco(tmp_path / "coco", "val2017")
    make_coco(tmp_path / "coco", "test2017", coco_content() | dict(images=coco_content()["images"][:2]))
    options = ["detect", "--dataset", str(tmp_path / "coco"), "--split", "val"]
    assert [len(scenes) for scenes in dense.load_both(options_of(*options), 3)] == [3, 2]


def test_an_encoder_alone_neither_predicts_nor_is_tested(encoder, tmp_path):
    for command in ("test", "predict"):
        with pytest.raises(ValueError, match="is neither a segmenter nor a detector"):
            dense.main([command, "--checkpoint", encoder, "--precision", "no", "--out", tmp_path / "run"])


def test_a_test_on_other_classes_is_refused(trained, tmp_path):
    for number in range(3):
        for name, image in (("images", picture(40, 32, seed=number)), ("masks", Image.new("L", (40, 32), number % 2))):
            (tmp_path / "data" / name).mkdir(parents=True, exist_ok=True)
            image.save(tmp_path / "data" / name / f"{number}.png")
    (tmp_path / "names.txt").write_text("earth\nsea\n")
    how = ["--dataset", tmp_path / "data", "--split", "train", "--precision", "no", "--out", tmp_path / "run"]
    with pytest.raises(ValueError, match="data has other classes: earth, sea"):
        dense.main(["test", "--checkpoint", trained / "segment", "--classes", tmp_path / "names.txt", *how])


@pytest.mark.parametrize("given, by_name", [(None, True), ("names.txt", False)])
def test_names_given_to_the_training_are_not_looked_for_in_the_data(given, by_name, trained, tmp_path, monkeypatch):
    shutil.copytree(trained / "detect", tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["detect"]["classes"] = given
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(dense, "load_tests", lambda args, task, split, known: seen.append(known))
    seen = []
    with pytest.raises(ValueError, match="has no split validation"):
        dense.main(["test", "--checkpoint", tmp_path / "run", "--precision", "no", "--out", tmp_path / "test"])
    assert seen[0].get("by_name", True) == by_name and seen[0]["known"][0] == config["detector"]["classes"]


def test_objects_of_any_class_are_found_as_one(tmp_path, quick_drawing):
    for split in ("train2017", "val2017"):
        make_coco(tmp_path / "coco", split)
    how = ["--dataset", tmp_path / "coco", "--single-class", "--batch-size", 2, "--max-images", 3, "--epochs", 1]
    found = dense.main([*DETECT, *how, "--out", tmp_path / "run"])
    assert smae.load(tmp_path / "run").classes == ["object"] and list(found["box_by_class"]) == ["object"]
    again = ["test", "--checkpoint", tmp_path / "run", "--dataset", tmp_path / "coco", "--precision", "no"]
    assert dense.main([*again, "--out", tmp_path / "test"])["box_ap"] == found["box_ap"]
    assert options_of("detect").single_class and not options_of("detect", "--dataset", "mine").single_class


def test_a_missing_requirement_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(scores, "faster_coco_eval", None)  # as where it cannot be imported: tests/test_layout.py
    monkeypatch.setattr(sys, "argv", ["dense.py", "segment"])
    with pytest.raises(SystemExit):
        dense.main()
    assert capsys.readouterr().err.strip().splitlines()[-1].endswith("pip install torchmetrics faster-coco-eval")


def test_the_example_of_the_docs_runs_as_it_stands(trained, monkeypatch, capsys):
    text = (ROOT / "docs" / "dense.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (trained / "runs").symlink_to(trained)
    monkeypatch.chdir(trained)
    exec(compile(block, "dense.md", "exec"), {})
    classes, *boxes = capsys.readouterr().out.splitlines()
    assert classes.startswith("['") and re.fullmatch(r"\w+ 0\.\d+ \[.*\]", boxes[0])


def test_presets_are_the_recipes():
    args = options_of("segment", "--preset", "ade20k", "--dataset", "ade")
    assert (args.head, args.image_size, args.batch_size, args.lr, args.schedule) == ("upernet", 512, 16, 1e-4, "linear")
    assert args.slide and args.drop_path == 0.1 and tuple(args.scale) == (0.5, 2.0) and args.head_width == 512
    assert round(args.epochs * (20210 // args.batch_size), -4) == 160_000
    assert args.layer_decay == 0.65 and not options_of("segment", "--preset", "ade20k", "--no-slide").slide
    args = options_of("detect", "--preset", "coco", "--dataset", "coco", "--batch-size", "16")
    assert (args.image_size, args.batch_size, args.lr, args.weight_decay, args.epochs) == (1024, 16, 1e-4, 0.1, 100)
    assert args.schedule == "steps" and tuple(args.scale) == (0.1, 2.0) and args.window == 14
    assert args.layer_decay == 0.7 and args.max_images is None and (args.head_width, args.rois) == (256, 512)
    args = options_of("detect", "--dataset", "mine")
    assert args.preset == "own" and args.head_width == 256 and not args.floor
    assert options_of("detect").max_images == 1000
    with pytest.raises(ValueError, match="--max-images must be at least 1, got -5"):
        options_of("detect", "--max-images", "-5")


def options_of(*arguments) -> argparse.Namespace:
    args = dense.build_parser().parse_args([*arguments, "--checkpoint", "somewhere"])
    dense.fill_defaults(args)
    return args


# ------------------------------------------------------------------------------ tasks


class Columns(nn.Module):
    """Stands for a segmenter: its logits are the pixels."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.statistics, self.classes = encoder, ([0.0] * 3, [1.0] * 3), list("abc")
        self.arguments = dict(side=32, slide=False)
        self.sizes = []

    def forward(self, images):
        self.sizes.append(tuple(images.shape[2:]))
        return images


def test_pictures_are_segmented_at_their_own_size(small_model):
    task = tasks.Segmentation(Columns(small_model))
    labels = torch.arange(3).repeat_interleave(30).expand(60, -1)  # (60, 90)
    image = (nn.functional.one_hot(labels, 3) * 255).to(torch.uint8).movedim(-1, 0)
    found = task.predict(task.prepare(dict(image=image)))
    assert task.model.sizes == [(32, 48)]
    assert found.shape == (60, 90) and (found == labels).float().mean() > 0.97


def test_a_sliding_window_covers_all_and_averages(small_model):
    whole, sliding = (tasks.Segmentation(Columns(small_model), slide) for slide in (False, True))
    image = torch.randint(0, 256, (3, 50, 130), dtype=torch.uint8)
    scene = whole.prepare(dict(image=image))
    assert (sliding.predict(scene) == whole.predict(scene)).float().mean() > 0.999
    assert set(sliding.model.sizes) == {(32, 32)} and len(sliding.model.sizes) == 4
    assert tasks.window_starts(83, 32) == [0, 17, 34, 51] and tasks.window_starts(32, 32) == [0]


def test_a_test_without_labelled_pixels_says_so(small_model, monkeypatch):
    scene = dict(labels=torch.full((4, 4), -1))
    monkeypatch.setattr(tasks, "predictions", lambda *_, **__: iter([(0, scene, torch.zeros(4, 4, dtype=torch.int64))]))
    with pytest.raises(ValueError, match="none of the pictures to test on has a pixel of a known class"):
        tasks.Segmentation(Columns(small_model)).test(argparse.Namespace(classes=list("abc")), Accelerator(cpu=True))


def test_a_signal_during_a_test_is_no_lack_of_labels(small_model, monkeypatch):
    """It ended the run with that error, and without the exit code of the signal."""
    monkeypatch.setattr(tasks, "predictions", lambda *_, **__: iter([]))
    task, scenes = tasks.Segmentation(Columns(small_model)), argparse.Namespace(classes=list("abc"))
    assert task.test(scenes, Accelerator(cpu=True), stopped=lambda: 15) == {}


def test_too_many_broken_pictures_end_a_test_at_once(small_model):
    task, seen = argparse.Namespace(model=small_model, prepare=dict, predict=lambda scene: None), []
    scenes, how = Pictures(with_bad(), [], RGB), dict(workers=0, max_bad=0.1)
    with pytest.raises(TooManyBadImages, match="3 of 20 pictures are broken"):
        for index, _, _ in tasks.predictions(task, scenes, Accelerator(cpu=True), **how):
            seen.append(index)
    assert seen == [0, 1, 2, 5, 6, 7, 8, 9, 10]  # of 20


def test_what_is_undefined_is_not_said_to_be_zero():
    found = dict(box_ap=None, box_ap50=0.0, box_ap75=1.234)
    assert tasks.Detection.describe(found) == "box AP undefined, AP50 0.00, AP75 1.23"


@pytest.mark.parametrize("band", [1, 2**26])
def test_classes_at_a_size_are_those_of_interpolated_logits(monkeypatch, band):
    monkeypatch.setattr(tasks, "BAND", band)
    logits = torch.randn(1, 5, 9, 13)
    for size in ((40, 60), (9, 13), (5, 7)):
        expected = nn.functional.interpolate(logits, size, mode="bilinear", align_corners=False)[0].argmax(dim=0)
        assert (tasks.classes_at(logits, size) == expected).float().mean() > 0.999


def test_names_of_classes_are_no_formulas(tmp_path):
    drawn = [(torch.zeros(3, 8, 8, dtype=torch.uint8),)]
    figure = overlays.sheet(drawn, ["picture"], "", {r"a$\foo$": (0, 0, 0)})
    figure.savefig(tmp_path / "sheet.png")
    assert figure.legends[0].get_texts()[0].get_text() == r"a\$\foo\$"  # as matplotlib wants a dollar


def test_boxes_return_to_the_size_of_the_picture(small_model, monkeypatch):
    task = tasks.Detection(Detector(small_model, ["cat"], side=64, width=8, rois=8, proposals=8))
    scene = task.prepare(dict(image=torch.zeros(3, 100, 200, dtype=torch.uint8)))
    assert scene["input"].shape == (3, 32, 64)
    answer = dict(
        boxes=torch.tensor([[8.0, 4, 40, 20]]),
        scores=torch.ones(1),
        labels=torch.zeros(1),
        masks=torch.ones(1, 1, 28, 28),
    )
    monkeypatch.setattr(task.model, "forward", lambda images, sizes: [answer])
    (found,) = task.predict(scene)
    assert found["bbox"] == pytest.approx([25, 12.5, 100, 50])
    left, top, width, height = tasks.rle.toBbox(found["segmentation"])
    assert abs(left - 25) < 4 and abs(top - 12.5) < 4 and abs(width - 100) < 7 and abs(height - 50) < 7


def test_the_demo_scores_are_those_of_the_drawing():
    """A segmenter that knew the truth would have 100 %."""
    maps = load_label_maps("shapes", "test").select(range(24))
    matrix = sum(
        tasks.scores.confusion(labels, labels, 13, -1)
        for labels in (maps.read(i)["labels"].as_subclass(torch.Tensor) for i in range(24))
    )
    assert tasks.scores.iou_scores(matrix, maps.classes)["miou"] == 100
