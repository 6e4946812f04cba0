import csv
import functools
import json
import os
import signal
import sys
import time

import datasets
import forked
import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from helpers import SMALL, with_bad
from PIL import Image

import checkpoint as checkpoint_file
import data
import encoders
import eval as judge
import optim
import smae
import train
from batches import EvalBatches
from labelled import load_labelled

TINY = ["--precision", "no", "--workers", "0"]
CLASSES = {"blue": (40, 60, 200), "green": (60, 180, 60), "red": (200, 50, 40)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """48 training and 15 validation pictures of noise around three colours, in class folders."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 5)):
        for name, colour in CLASSES.items():
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = (np.array(colour) + rng.normal(0, 40, (40, 36, 3))).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small encoder that has seen nothing."""
    torch.manual_seed(1)
    sizes = dict(width=32, depth=2, heads=2, decoder_width=16, decoder_depth=1, decoder_heads=2)
    path = tmp_path_factory.mktemp("checkpoint")
    smae.save(smae.SMAE(**sizes, image_size=32, patch_size=8), path)
    return path


def evaluate(monkeypatch, command: str, out, *arguments) -> dict:
    """Run eval.main() in this process: result.json."""
    arguments = [command, *arguments, "--out", out, *TINY]
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, arguments)])
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    judge.main()
    return json.loads((out / "result.json").read_text())


# ------------------------------------------------------------------------------------------- kNN


def test_knn_of_an_encoder(monkeypatch, folder, checkpoint, tmp_path, capsys):
    arguments = ["--checkpoint", checkpoint, "--dataset", folder, "--pool", "mean", "--k", 3, 7]
    result = evaluate(monkeypatch, "knn", tmp_path, *arguments)
    assert result["top1"] == result["top1_by_k"]["3"] > 90  # colours are easy
    assert (result["images"], result["train_images"]) == (15, 48)
    assert result["config"]["temperature"] == 0.07 and result["seconds"] > 0
    assert "15 images" in capsys.readouterr().out.strip().splitlines()[-1]
    used, vote = [], judge.knn
    monkeypatch.setattr(judge, "knn", lambda *given: used.append(given[-1]) or vote(*given))
    evaluate(monkeypatch, "knn", tmp_path, *arguments, "--temperature", 0.5, "--overwrite")
    assert used == [0.5]
    with pytest.raises(SystemExit):
        evaluate(monkeypatch, "knn", tmp_path, *arguments)
    assert "add --overwrite" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["knn", "linear"])
def test_features_that_are_not_finite_are_named(command, monkeypatch, folder, checkpoint, tmp_path, capsys):
    """One picture of them would spoil the accuracy of all."""

    def pooled(self, images, how):
        values = images.mean(dim=(2, 3))
        return torch.where(torch.arange(len(images))[:, None] == 1, torch.nan, values)

    monkeypatch.setattr(smae.SMAE, "pooled", pooled)
    with pytest.raises(SystemExit):
        evaluate(monkeypatch, command, tmp_path, "--checkpoint", checkpoint, "--dataset", folder)
    assert "1.png has features that are not finite: try --precision no" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["knn", "linear", "embed", "reconstruct", "predict"])
def test_data_without_a_picture_that_can_be_decoded_end_in_a_line(command, monkeypatch, checkpoint, tmp_path, capsys):
    for name in ("train/cat", "train/dog", "val/cat", "val/dog"):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "1.png").write_bytes(b"broken")
    if command == "predict":
        classifier = smae.Classifier(smae.load(checkpoint), ["cat", "dog"])
        checkpoint = tmp_path / "classifier"
        smae.save(classifier, checkpoint)
    with pytest.raises(SystemExit):
        where = "--checkpoint", checkpoint, "--dataset", tmp_path / "data", "--max-bad-images", 1
        evaluate(monkeypatch, command, tmp_path / "out", *where)
    assert "none of the pictures can be decoded" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["random", "pixels"])
def test_floors_need_no_checkpoint(name, monkeypatch, folder, tmp_path):
    result = evaluate(monkeypatch, "knn", tmp_path, "--checkpoint", name, "--dataset", folder, *SMALL, "--k", 5)
    assert result["images"] == 15 and result["config"]["image_size"] == 32
    if name == "random":
        other = evaluate(
            monkeypatch, "embed", tmp_path / "0", "--checkpoint", name, "--dataset", folder, *SMALL, "--seed", 0
        )
        assert other["images"] == 48


def test_a_stream_gives_the_same_accuracy(monkeypatch, checkpoint, folder, tmp_path):
    arguments = ["--checkpoint", checkpoint, "--dataset", folder, "--k", 5]
    once = evaluate(monkeypatch, "knn", tmp_path / "map", *arguments)
    stream = evaluate(monkeypatch, "knn", tmp_path / "stream", *arguments, "--streaming")
    assert stream["top1"] == once["top1"] and stream["images"] == once["images"] == 15
    assert stream["train_images"] == 48


# ------------------------------------------------------------------------------------------- linear probe


def test_the_fast_probe_never_chooses_by_the_test(monkeypatch, checkpoint, folder, tmp_path):
    arguments = ["--checkpoint", checkpoint, "--dataset", folder, "--pool", "mean", "--epochs", 30]
    result = evaluate(monkeypatch, "linear", tmp_path / "a", *arguments)
    assert result["top1"] > 90 and result["top5"] == 100 and len(result["grid"]) == 40
    scores = [setting["held_out_top1"] for setting in result["grid"]]
    assert result["chosen"]["held_out_top1"] == max(scores)
    labels = data.load_test_images(str(folder), None)["label"]
    load = data.load_test_images

    def with_wrong_labels(*args):
        tests = load(*args)
        return tests.remove_columns("label").add_column(
            "label", [(i + 1) % 3 for i in labels], feature=tests.features["label"]
        )

    monkeypatch.setattr(data, "load_test_images", with_wrong_labels)
    wrong = evaluate(monkeypatch, "linear", tmp_path / "b", *arguments)
    assert wrong["top1"] < 10 and wrong["chosen"] == result["chosen"]


def test_the_probe_of_mae_trains_the_head_alone(monkeypatch, checkpoint, folder, tmp_path):
    arguments = ["--checkpoint", checkpoint, "--dataset", folder, "--recipe", "mae", "--pool", "mean", "--epochs", 12]
    load, models = judge.load_encoder, []
    monkeypatch.setattr(judge, "load_encoder", lambda args: models.append(load(args)) or models[-1])
    result = evaluate(
        monkeypatch, "linear", tmp_path, *arguments, "--warmup-epochs", 1, "--batch-size", 16, "--lr", 100, "--preload"
    )
    assert result["top1"] > 80 and result["config"]["weight_decay"] == 0.0
    before, after = smae.load(checkpoint).state_dict(), models[0].backbone.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    state = checkpoint_file.read(checkpoint_file.folders(tmp_path)[0])["model"]
    assert state.keys() == {
        "norm.running_mean",
        "norm.running_var",
        "norm.num_batches_tracked",
        "head.weight",
        "head.bias",
    }
    assert state["norm.running_mean"].abs().max() > 0
    assert [json.loads(line)["epoch"] for line in (tmp_path / "metrics.jsonl").open()] == list(range(1, 13))


def test_recipes_are_those_of_mae():
    parser = judge.build_parser()
    args = parser.parse_args("linear --recipe mae".split())
    judge.fill_recipe(args, 1281167, 8)
    assert (args.epochs, args.warmup_epochs, args.batch_size, args.lr, args.weight_decay) == (90, 10, 16384, 6.4, 0.0)
    args = parser.parse_args(["finetune"])
    judge.fill_recipe(args, 1281167, 8)
    assert (args.epochs, args.warmup_epochs, args.batch_size, args.lr, args.weight_decay) == (100, 5, 1024, 2e-3, 0.05)
    assert (args.layer_decay, args.drop_path, args.smoothing, args.mixup, args.cutmix) == (0.65, 0.1, 0.1, 0.8, 1.0)
    assert (args.erasing, args.randaugment, args.min_lr, tuple(args.crop_scale)) == (0.25, 9, 1e-6, (0.08, 1.0))
    args = parser.parse_args("finetune --accumulate 2 --epochs 20".split())
    judge.fill_recipe(args, 500, 3)
    assert args.batch_size == 24  # of a small set: 16 steps an epoch, divisible by processes and micro-batches
    assert args.warmup_epochs == 1  # the same share of the epochs
    for images, world, size in ((500, 1, 24), (500, 4, 24), (100, 1, 6), (100, 4, 4)):  # to resume on more processes
        args = parser.parse_args(["finetune"])
        judge.fill_recipe(args, images, world)
        assert args.batch_size == size


# ------------------------------------------------------------------------------------------- fine-tuning


def test_a_fine_tuning_does_what_its_options_say(monkeypatch, checkpoint, folder, tmp_path):
    """Hardly any of it shows in an accuracy."""
    from types import SimpleNamespace

    seen = dict(soft=[], smoothing=set(), augment=set(), augmented=0)

    def cross_entropy(logits, labels, label_smoothing=0.0):
        seen["soft"].append(labels.is_floating_point() and ((labels > 0) & (labels < 1)).any().item())
        seen["smoothing"].add(label_smoothing)
        return F.cross_entropy(logits, labels, label_smoothing=label_smoothing)

    def augment(*given):
        seen["augment"].add(given)

        def noted(image):
            seen["augmented"] += 1
            return image

        return noted

    runs, make = [], judge.Run
    monkeypatch.setattr(judge, "Run", lambda *given, **more: runs.append(make(*given, **more)) or runs[0])
    monkeypatch.setattr(judge, "F", SimpleNamespace(cross_entropy=cross_entropy))
    monkeypatch.setattr(judge, "Augment", augment)
    arguments = ["--checkpoint", checkpoint, "--dataset", folder, "--epochs", 2, "--warmup-epochs", 1]
    arguments += ["--batch-size", 16, "--lr", "1e-3", "--min-lr", "1e-4", "--layer-decay", 0.5, "--weight-decay", 0.3]
    arguments += "--smoothing 0.2 --mixup 5 --cutmix 0 --drop-path 0.25 --randaugment 3 --erasing 0.4".split()
    evaluate(monkeypatch, "finetune", tmp_path, *arguments)
    assert seen["smoothing"] == {0.2} and seen["augment"] == {(3, 0.4)} and seen["augmented"] == 2 * 48
    assert len(seen["soft"]) == 6 and all(seen["soft"])  # mixup, at every step
    rates = [json.loads(line)["lr"] for line in (tmp_path / "metrics.jsonl").open()]
    assert rates == pytest.approx([optim.learning_rate(step, 6, 3, 1e-3, 1e-4) for step in (2, 5)])
    groups = runs[0].optimizer.param_groups
    assert {round(group["lr"] / rates[-1], 6) for group in groups} == {0.125, 0.25, 0.5, 1}  # embedding, blocks, head
    assert {group["weight_decay"] for group in groups} == {0, 0.3}
    assert [block.drop_path for block in runs[0].model.encoder.blocks] == [0, 0.25]


def test_drop_path_leaves_out_branches_of_whole_images_while_training(small_model):
    block = smae.Block(32, 2, 4.0)
    x = torch.randn(1, 5, 32).expand(4000, -1, -1)
    with torch.no_grad():
        whole, attention = block(x[:1]), x[:1] + block.attention(block.norm1(x[:1]))
        block.drop_path = 0.3
        torch.testing.assert_close(block.eval()(x[:2]), whole.expand(2, -1, -1))
        out = block.train()(x)
        unchanged = (out == x).all(-1).all(-1).float().mean()
        mean = block.drop(x).mean(0)
    assert abs(unchanged - 0.09) < 0.02  # both branches left out
    torch.testing.assert_close(mean, x[0], rtol=0.1, atol=0.1)
    assert not torch.allclose(whole, attention)
    classifier = smae.Classifier(small_model, ["a"], drop_path=0.2)
    assert [round(block.drop_path, 3) for block in classifier.encoder.blocks] == [0.0, 0.1, 0.2]


def test_augmentation_erases_a_quarter_of_the_crops_and_does_nothing_when_told_so():
    image = torch.randint(256, (3, 32, 32), dtype=torch.uint8)
    assert torch.equal(judge.Augment(0, 0.0)(image), image)
    erase = judge.Augment(0, 0.25)
    changed = torch.stack([(erase(image) != image).any(0).float().mean() for _ in range(1000)])
    assert 0.2 < (changed > 0).float().mean() < 0.3
    assert changed[changed > 0].min() > 0.01 and changed.max() < 0.36
    randomly = judge.Augment(9, 0.0)
    same = np.mean([torch.equal(randomly(image), image) for _ in range(300)])
    assert 0.2 < same < 0.45  # neither operation: 1/4, and one of the 14 operations does nothing


FINETUNE = ["--epochs", 4, "--warmup-epochs", 1, "--batch-size", 16, "--lr", "3e-3", "--layer-decay", 0.9]


@pytest.fixture
def finetuned(monkeypatch, checkpoint, folder, tmp_path):
    arguments = ["--checkpoint", checkpoint, "--dataset", folder, *FINETUNE, "--randaugment", 0]
    return tmp_path / "tuned", evaluate(monkeypatch, "finetune", tmp_path / "tuned", *arguments)


def test_fine_tuning_learns_and_leaves_a_classifier(finetuned):
    out, result = finetuned
    assert result["top1"] > 60 and result["top5"] == 100 and result["images"] == 15
    assert result["best_top1"] >= result["top1"] and 1 <= result["best_epoch"] <= 4
    lines = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    assert [line["top1"] for line in lines][-1] == result["top1"] and lines[-1]["loss"] < lines[0]["loss"]
    classifier, best = smae.load(out), smae.load(out / "best")
    assert classifier.classes == sorted(CLASSES) and not classifier.training
    assert classifier.encoder.config["decoder_depth"] == 0
    assert (result["best_epoch"] == 4) == torch.equal(best.head.weight, classifier.head.weight)


def test_a_classifier_has_the_size_of_its_fine_tuning(monkeypatch, checkpoint, folder, tmp_path):
    """It kept that of the encoder, at which its predictions are poor."""
    short = ["--checkpoint", checkpoint, "--dataset", folder, *FINETUNE, "--epochs", 1, "--image-size", 48]
    tuned = evaluate(monkeypatch, "finetune", tmp_path / "tuned", *short)
    classifier = smae.load(tmp_path / "tuned")
    assert classifier.config["image_size"] == [48, 48] and classifier.config["position_size"] == [32, 32]
    arguments = ["--checkpoint", tmp_path / "tuned", "--dataset", folder, "--split", "val"]
    evaluate(monkeypatch, "predict", tmp_path / "predicted", *arguments)
    rows = list(csv.DictReader((tmp_path / "predicted" / "predictions.csv").open()))
    assert 100 * np.mean([row["class"] in row["file"] for row in rows]) == pytest.approx(tuned["top1"])
    untouched = smae.load(checkpoint)
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        same = encoders.resized(untouched, 48).encode(images), untouched.encode(images)
    torch.testing.assert_close(*same)


def test_predictions_and_features_of_a_classifier(finetuned, monkeypatch, folder, tmp_path):
    out, _ = finetuned
    classifier = smae.load(out)
    files = sorted((folder / "val").rglob("*.png"))
    crops = torch.stack([data.center_crop(Image.open(file), 32, 0.875) for file in files])  # 32 / 0.875
    with torch.no_grad():
        probability = classifier(data.normalize(crops)).softmax(1)
        features = classifier.features(data.normalize(crops))

    arguments = ["--checkpoint", out, "--dataset", folder / "val", "--batch-size", 4]
    evaluate(monkeypatch, "predict", tmp_path / "predict", *arguments)
    rows = list(csv.DictReader((tmp_path / "predict" / "predictions.csv").open()))
    assert [row["file"] for row in rows] == [str(file) for file in files]
    assert [row["class"] for row in rows] == [classifier.classes[i] for i in probability.argmax(1)]
    torch.testing.assert_close(
        torch.tensor([float(row["probability"]) for row in rows]), probability.max(1).values, rtol=0, atol=1e-5
    )

    evaluate(monkeypatch, "embed", tmp_path / "embed", *arguments)
    table = datasets.load_dataset("parquet", data_files=str(tmp_path / "embed" / "features.parquet"))["train"]
    torch.testing.assert_close(torch.tensor(table["features"][:]), features, rtol=1e-4, atol=1e-5)
    assert table["file"][:] == [str(file) for file in files] and set(table["label"]) == {0, 1, 2}


# ------------------------------------------------------------------------------------------- interrupted trainings

TRAININGS = {
    "finetune": ["finetune", *FINETUNE],
    "linear": ["linear", "--recipe", "mae", "--epochs", 4, "--batch-size", 12, "--accumulate", 2, "--lr", 1],
}


def outcome(out) -> dict:
    """All that a training leaves that its interruption must not change."""
    state = checkpoint_file.read(checkpoint_file.folders(out)[0])
    lines = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    timeless = [{k: v for k, v in line.items() if k not in ("seconds", "images_per_second")} for line in lines]
    result = json.loads((out / "result.json").read_text())
    names = ("top1", "top5", "images", "best_top1", "best_epoch", "test_split")
    return dict(
        weights={name: tensor.tolist() for name, tensor in state["model"].items()},
        moments={i: {k: v.tolist() for k, v in s.items()} for i, s in state["optimizer"]["state"].items()},
        metrics=timeless,
        result={name: result[name] for name in names},
    )


@pytest.mark.parametrize("name, extra", [
    ("finetune", []),
    ("linear", []),
    ("finetune", ["--streaming", "--max-images", 48, "--workers", 1]),
])  # fmt: skip
def test_a_resumed_training_ends_as_an_uninterrupted_one(name, extra, monkeypatch, checkpoint, folder, tmp_path, capfd):
    """Interrupted within an epoch, at its end, and before the last step."""
    command, *options = TRAININGS[name]
    arguments = ["--checkpoint", checkpoint, "--dataset", folder, *options, "--pool", "mean", *extra]
    often = ["--save-every-steps", 1, "--keep", 99]
    evaluate(monkeypatch, command, tmp_path / "whole", *arguments, *often)
    whole = outcome(tmp_path / "whole")
    steps = checkpoint_file.number(checkpoint_file.folders(tmp_path / "whole")[0])
    for step in (1, steps // 4, steps - 1) if not extra else (steps // 4 + 2,):
        resume = tmp_path / "whole" / f"checkpoint-{step:08d}"
        evaluate(monkeypatch, command, tmp_path / f"{step}", *arguments, "--resume", resume)
        assert f"continuing from {resume}" in capfd.readouterr().out
        assert outcome(tmp_path / f"{step}") == whole
    if name == "finetune":
        a, b = (smae.load(tmp_path / out).state_dict() for out in ("whole", f"{step}"))
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_training_is_not_resumed_with_other_options(monkeypatch, checkpoint, folder, tmp_path, capfd):
    arguments = ["--checkpoint", checkpoint, "--dataset", folder, *FINETUNE]
    evaluate(monkeypatch, "finetune", tmp_path, *arguments)
    before = (tmp_path / "result.json").read_text()
    for other, message in ((["--mixup", 0.5], "--mixup was 0.8"), (["--epochs", 9], "--epochs was 4")):
        with pytest.raises(SystemExit):
            evaluate(monkeypatch, "finetune", tmp_path, *arguments, "--resume", *other)
        assert message in capfd.readouterr().err
    with pytest.raises(SystemExit):
        evaluate(monkeypatch, "finetune", tmp_path, *arguments)
    assert "add --overwrite" in capfd.readouterr().err
    assert (tmp_path / "result.json").read_text() == before
    again = evaluate(monkeypatch, "finetune", tmp_path, *arguments, "--resume")  # there is nothing left to do
    assert again["top1"] == json.loads(before)["top1"]


def test_a_signal_ends_a_fine_tuning_with_a_checkpoint(checkpoint, folder, tmp_path):
    arguments = ["finetune", "--checkpoint", checkpoint, "--dataset", folder, *FINETUNE, *TINY]
    start = functools.partial(forked.start, script="eval", patches="slow_steps")
    assert forked.finish(start(tmp_path / "log", *arguments, "--out", tmp_path / "whole")) == [0]
    arguments += ["--out", tmp_path / "run", "--resume"]
    processes = start(tmp_path / "log", *arguments, "--save-every-steps", 1)
    while not checkpoint_file.folders(tmp_path / "run"):
        assert processes[0].is_alive()
        time.sleep(0.01)
    os.kill(processes[0].pid, signal.SIGTERM)
    assert forked.finish(processes, 30) == [143]
    assert "stopped by SIGTERM" in (tmp_path / "log-0").read_text()
    assert not (tmp_path / "run" / "result.json").exists()
    assert forked.finish(start(tmp_path / "log", *arguments)) == [0]
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")
    best = (safetensors.torch.load_file(tmp_path / n / "best" / "model.safetensors") for n in ("run", "whole"))
    assert torch.equal(*(weights["head.weight"] for weights in best))


def test_two_trainings_never_write_to_the_same_folder(monkeypatch, checkpoint, folder, tmp_path, capfd):
    monkeypatch.setattr(checkpoint_file.Lock.__init__, "__defaults__", (0.1,))  # seconds of patience
    with checkpoint_file.Lock(tmp_path) as lock:
        lock.take()
        with pytest.raises(SystemExit):
            evaluate(monkeypatch, "finetune", tmp_path, "--checkpoint", checkpoint, "--dataset", folder, *FINETUNE)
    assert "another run is writing to" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


def test_two_processes_resume_a_probe_with_their_own_statistics_of_batch_norm(checkpoint, folder, tmp_path):
    arguments = ["linear", "--recipe", "mae", "--checkpoint", checkpoint, "--dataset", folder, "--epochs", 2]
    arguments += ["--batch-size", 12, "--lr", 1, *TINY]
    start = functools.partial(forked.start, script="eval", world=2)
    often = ["--save-every-steps", 1, "--keep", 99, "--out", tmp_path / "whole"]
    assert forked.finish(start(tmp_path / "log", *arguments, *often)) == [0, 0]
    resume = tmp_path / "whole" / "checkpoint-00000002"
    ours, theirs = (process["statistics"] for process in checkpoint_file.read(resume)["processes"])
    assert not torch.equal(ours["norm.running_mean"], theirs["norm.running_mean"])
    rest = ["--out", tmp_path / "rest", "--resume", resume]
    assert forked.finish(start(tmp_path / "log", *arguments, *rest)) == [0, 0]
    assert outcome(tmp_path / "rest") == outcome(tmp_path / "whole")


def test_a_fine_tuning_that_diverges_ends_in_a_line(monkeypatch, checkpoint, folder, tmp_path, capfd):
    arguments = ["--checkpoint", checkpoint, "--dataset", folder, "--epochs", 3, "--warmup-epochs", 0, "--lr", 1e30]
    with pytest.raises(SystemExit):
        evaluate(monkeypatch, "finetune", tmp_path, *arguments)
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("eval.py: error: ") and "in epoch" in error


# ------------------------------------------------------------------------------------------- every image once


def test_an_evaluation_that_loses_a_process_ends_in_a_line(checkpoint, folder, tmp_path):
    arguments = ["embed", "--checkpoint", checkpoint, "--dataset", folder, *TINY, "--out", tmp_path / "out"]
    assert forked.finish(forked.start(tmp_path / "log", *arguments, script="eval", world=2, patches="dying")) == [1, 9]
    said = (tmp_path / "log-0").read_text()
    assert "error: another process of the run is gone" in said and "Traceback" not in said


def test_two_processes_count_every_picture_once_and_agree_with_one(monkeypatch, finetuned, folder, tmp_path):
    tuned, _ = finetuned
    for command, extra in (("knn", ["--k", 5]), ("predict", []), ("embed", [])):
        arguments = ["--checkpoint", tuned, "--dataset", folder, "--batch-size", 8, *extra]
        arguments += ["--split", "val"] if command != "knn" else []
        alone = evaluate(monkeypatch, command, tmp_path / f"{command}-1", *arguments)
        arguments = [command, *arguments, *TINY, "--out", tmp_path / f"{command}-2"]
        assert forked.finish(forked.start(tmp_path / "log", *arguments, script="eval", world=2)) == [0, 0]
        both = json.loads((tmp_path / f"{command}-2" / "result.json").read_text())
        assert both["images"] == alone["images"] == 15
        assert both.get("top1") == alone.get("top1")
    one, two = (list(csv.DictReader((tmp_path / f"predict-{n}" / "predictions.csv").open())) for n in (1, 2))
    assert [(row["file"], row["class"]) for row in one] == [(row["file"], row["class"]) for row in two]
    assert [float(row["probability"]) for row in one] == pytest.approx([float(row["probability"]) for row in two], 1e-4)
    one, two = (
        datasets.Dataset.from_parquet(str(tmp_path / f"embed-{n}" / "features.parquet")).with_format("torch")
        for n in (1, 2)
    )
    torch.testing.assert_close(one["features"][:], two["features"][:], rtol=1e-4, atol=1e-5)
    assert one["file"][:] == two["file"][:]


@pytest.mark.parametrize("command", [["finetune"], ["linear", "--recipe", "mae"]])
def test_two_processes_train_together_as_one(command, monkeypatch, folder, checkpoint, tmp_path):
    arguments = [*command, "--checkpoint", checkpoint, "--dataset", folder, "--epochs", 2, "--warmup-epochs", 1]
    arguments += ["--batch-size", 16, "--lr", "1e-3", "--pool", "mean", *TINY]
    if command == ["finetune"]:  # what depends on the other pictures of a process
        arguments += ["--mixup", 0, "--cutmix", 0, "--drop-path", 0]
    evaluate(monkeypatch, arguments[0], tmp_path / "one", *arguments[1:])
    processes = forked.start(tmp_path / "log", *arguments, "--out", tmp_path / "two", script="eval", world=2)
    assert forked.finish(processes) == [0, 0]
    first, other = ((tmp_path / f"log-{rank}").read_text() for rank in (0, 1))
    assert "48 training images, 2 epochs of 3 steps" in first and "Warning" not in first + other
    one, two = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "two"))
    assert (two["images"], two["processes"], one["processes"], two["test_split"]) == (15, 2, 1, "val")
    one, two = (checkpoint_file.read(checkpoint_file.folders(tmp_path / n)[0])["model"] for n in ("one", "two"))
    tolerance = dict(rtol=1e-4, atol=1e-5) if command == ["finetune"] else dict(rtol=0.2, atol=0.02)  # BatchNorm
    for name in one:
        torch.testing.assert_close(two[name], one[name], **tolerance)


def test_broken_pictures_are_left_out_and_named_or_stop_the_evaluation(
    monkeypatch, folder, checkpoint, tmp_path, capsys
):
    import shutil

    shutil.copytree(folder, tmp_path / "pictures")
    (tmp_path / "pictures" / "val" / "green" / "3.png").write_bytes(b"not a picture")
    arguments = ["--checkpoint", checkpoint, "--dataset", tmp_path / "pictures", "--k", 5]
    with pytest.raises(SystemExit):
        evaluate(monkeypatch, "knn", tmp_path / "a", *arguments)
    assert "1 of 15 images are broken" in capsys.readouterr().err
    result = evaluate(monkeypatch, "knn", tmp_path / "b", *arguments, "--max-bad-images", 0.1)
    assert result["images"] == 14
    assert "left out a broken image" in (out := capsys.readouterr().out) and "green/3.png" in out


def test_images_are_normalised_as_the_encoder_wants(monkeypatch, checkpoint, folder, tmp_path):
    model = smae.load(checkpoint)
    for name, mean in (("plain", [0.485, 0.456, 0.406]), ("other", [0.5, 0.5, 0.5])):
        other = smae.SMAE(**model.config | dict(mean=mean)).eval()
        other.load_state_dict(model.state_dict())
        smae.save(other, tmp_path / name)
        arguments = ["--checkpoint", tmp_path / name, "--dataset", folder, "--split", "val", "--pool", "mean"]
        evaluate(monkeypatch, "embed", tmp_path / f"{name}-out", *arguments)
        table = datasets.Dataset.from_parquet(str(tmp_path / f"{name}-out" / "features.parquet"))
        crop = data.center_crop(Image.open(table[4]["file"]), 32, 0.875)[None]
        with torch.no_grad():
            expected = other.encode(
                (crop / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(data.STD).view(3, 1, 1)
            )
        torch.testing.assert_close(torch.tensor(table[4]["features"]), expected[0, 1:].mean(0), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------- data and labels


def pictures_with(labels, names=None) -> datasets.Dataset:
    image = Image.new("RGB", (32, 32))
    feature = (
        datasets.ClassLabel(names=names)
        if names
        else datasets.Value("string" if labels and isinstance(labels[0], str) else "int64")
    )
    return datasets.Dataset.from_dict(
        {"img": [image] * len(labels), "fine_label": labels},
        datasets.Features(img=datasets.Image(), fine_label=feature),
    )


def labelled(monkeypatch, splits: dict[str, datasets.Dataset], *arguments):
    """load_labelled() of a hub that has these splits, and what was asked of it."""
    asked = []

    def load_dataset(hub, configuration=None, *, split, streaming):
        asked.append((hub, configuration, split))
        if split not in splits:
            raise ValueError(f"Unknown split {split!r}")
        return splits[split]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    args = judge.build_parser().parse_args(["knn", *arguments])
    columns = args.image_column, args.label_column
    where = args.dataset, args.split, args.test_split
    return load_labelled(*where, *columns, skip_unlabelled=args.skip_unlabelled), asked


def test_a_data_set_of_the_paper_goes_by_its_name(monkeypatch):
    splits = {"train": pictures_with([1, 0], ["a", "b"]), "test": pictures_with([0], ["a", "b"])}
    (training, tests, classes), asked = labelled(monkeypatch, splits, "--dataset", "cifar100")
    assert asked == [("uoft-cs/cifar100", None, "train"), ("uoft-cs/cifar100", None, "test")]
    assert classes == ["a", "b"] and training["label"][:] == [1, 0] and tests["label"][:] == [0]
    assert train.PAPER["dataset"] in data.DATASETS


@pytest.mark.parametrize(
    "train_labels, test_labels, classes, expected",
    [
        ((["cat", "dog", "cat"], None), (["dog"], None), ["cat", "dog"], [1]),  # words
        (([0, 1, 2], ["a", "b", "c"]), ([0, 1], ["b", "c"]), ["a", "b", "c"], [1, 2]),  # a class less, numbered anew
        (([5, 7, 5], None), ([7, 5], None), ["5", "7"], [1, 0]),  # numbers with gaps
    ],
)
def test_labels_of_training_and_test_are_matched_by_name(monkeypatch, train_labels, test_labels, classes, expected):
    splits = {"train": pictures_with(*train_labels), "val": pictures_with(*test_labels)}
    arguments = ["--dataset", "someone/something", "--label-column", "fine_label"]
    (_, tests, found), _ = labelled(monkeypatch, splits, *arguments)
    assert found == classes and tests["label"][:] == expected


@pytest.mark.parametrize(
    "splits, message",
    [
        ({"train": ([0, 1], ["a", "b"])}, r"no split validation, val or test.*--test-split"),
        (
            {"train": ([0, 1], ["a", "b"]), "test": ([-1, -1], ["a", "b"])},
            "2 of 2 labels of split .* are hidden.*--skip-unlabelled",
        ),
        ({"train": (["a"], None), "test": (["b"], None)}, r"not of the training data: \['b'\]"),
    ],
)
def test_unusable_labels_are_refused_in_a_line(monkeypatch, splits, message):
    splits = {name: pictures_with(*labels) for name, labels in splits.items()}
    with pytest.raises(ValueError, match=message):
        labelled(monkeypatch, splits, "--dataset", "someone/something", "--label-column", "fine_label")


def test_pictures_without_a_label_can_be_left_out(monkeypatch, capsys):
    splits = {"train": pictures_with([0, 1, -1], ["a", "b"]), "test": pictures_with([1, -1, -1], ["a", "b"])}
    arguments = ["--dataset", "someone/something", "--label-column", "fine_label"]
    with pytest.raises(ValueError, match=r"1 of 3 labels of split"):
        labelled(monkeypatch, splits, *arguments)
    (training, tests, _), _ = labelled(monkeypatch, splits, *arguments, "--skip-unlabelled")
    assert training["label"][:] == [0, 1] and tests["label"][:] == [1]
    assert "left out 2 of 3 pictures, which have no label" in capsys.readouterr().err


def test_a_limit_on_sorted_data_takes_pictures_of_all_classes(folder):
    training, tests, classes = load_labelled(str(folder), "train", None, max_images=6)
    assert sorted(set(training["label"])) == [0, 1, 2]
    assert len(training) == 6 and len(tests) == 15 and len(classes) == 3


def test_splits_of_one_name_with_different_pictures_are_two(folder, tmp_path):
    """Those of datasets' train_test_split are both called train."""
    whole = datasets.load_dataset("imagefolder", data_dir=str(folder / "train"), split="train")
    whole.train_test_split(12, seed=0).save_to_disk(tmp_path / "halves")
    training, tests, _ = load_labelled(str(tmp_path / "halves"), "train", None)
    assert str(training.split) == str(tests.split) and (len(training), len(tests)) == (36, 12)


def test_the_probe_of_mae_needs_two_pictures_in_a_batch():
    parser = judge.build_parser()
    args = parser.parse_args("linear --recipe mae".split())
    judge.fill_recipe(args, 20, 1)
    assert args.batch_size == 2
    args = parser.parse_args("linear --recipe mae --accumulate 2".split())
    judge.fill_recipe(args, 20, 2)
    assert args.batch_size == 8
    args = parser.parse_args("linear --recipe mae --batch-size 1".split())
    with pytest.raises(ValueError, match="BatchNorm: a --batch-size of at least 2, got 1"):
        judge.fill_recipe(args, 20, 1)
    judge.fill_recipe(parser.parse_args("finetune --batch-size 2 --accumulate 4".split()), 20, 1)  # refused elsewhere


@pytest.mark.parametrize("label", [[1, 2], 0.5])
def test_labels_that_are_no_classes_are_refused_but_for_features(label, monkeypatch, tmp_path, capsys):
    for split in ("train", "test"):
        (tmp_path / "data").mkdir(exist_ok=True)
        content = {"image": [Image.new("RGB", (32, 32))] * 3, "label": [label] * 3}
        feature = datasets.List(datasets.Value("int64")) if isinstance(label, list) else datasets.Value("float32")
        features = datasets.Features(image=datasets.Image(), label=feature)
        datasets.Dataset.from_dict(content, features).to_parquet(tmp_path / "data" / f"{split}.parquet")
    with pytest.raises(SystemExit):
        evaluate(monkeypatch, "knn", tmp_path / "knn", "--checkpoint", "pixels", "--dataset", tmp_path / "data")
    assert "must be classes" in capsys.readouterr().err
    result = evaluate(monkeypatch, "embed", tmp_path / "out", "--checkpoint", "pixels", "--dataset", tmp_path / "data")
    assert result["images"] == 3


def test_the_checkpoint_that_is_judged_is_never_lost(monkeypatch, checkpoint, folder, tmp_path, capsys):
    smae.save(smae.load(checkpoint), tmp_path)
    arguments = ["--checkpoint", tmp_path, "--dataset", folder, "--overwrite"]
    (tmp_path / "checkpoint-00000007").mkdir()
    for command in ("finetune", "linear"):
        for judged in (tmp_path, tmp_path / "checkpoint-00000007"):
            with pytest.raises(SystemExit):
                evaluate(monkeypatch, command, tmp_path, *arguments, "--checkpoint", judged)
            assert "holds the checkpoint itself" in capsys.readouterr().err
    evaluate(monkeypatch, "knn", tmp_path, *arguments, "--k", 5)
    assert smae.load(tmp_path).config["width"] == 32


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["knn", "--checkpoint", "random", "--k", "0"], "--k must be at least 1"),
        (["knn", "--checkpoint", "random", "--crop-ratio", "0"], "--crop-ratio must lie in (0, 1], got 0.0"),
        (["knn", "--checkpoint", "random", "--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["finetune", "--checkpoint", "random", "--randaugment", "12"], "between 0 and 10, got 12"),
        (["finetune", "--checkpoint", "random", "--smoothing", "1.5"], "--smoothing must lie between 0 and 1, got 1.5"),
        (["finetune", "--checkpoint", "random", "--layer-decay", "-1"], "--layer-decay must lie in (0, 1], got -1"),
        (["finetune", "--checkpoint", "random", "--mixup", "-1"], "--mixup must not be negative, got -1"),
        (["linear", "--recipe", "mae", "--checkpoint", "random", "--lr", "-1"], "--lr must not be negative, got -1"),
        (["knn", "--checkpoint", "random", "--split", "test"], "name a test split (eval.py --test-split)"),
        (["finetune", "--checkpoint", "random", "--drop-path", "1"], "--drop-path must lie in [0, 1), got 1"),
        (["finetune", "--checkpoint", "random", "--crop-scale", "0.5", "0.2"], "--crop-scale takes two fractions"),
        (["linear", "--checkpoint", "random", "--resume"], "--resume is for"),
        (["finetune", "--checkpoint", "random", "--keep", "0"], "--keep must be at least 1, got 0"),
        (["finetune", "--checkpoint", "random", "--save-every-steps", "0"], "--save-every-steps must be at least 1"),
        (["knn", "--checkpoint", "nowhere"], "there is no checkpoint nowhere"),
        (["knn", "--checkpoint", "random", "--image-size", "30"], "not a positive multiple"),
        (["knn", "--checkpoint", "random", "--test-split", "elsewhere"], "elsewhere"),
        (["predict", "--checkpoint", "random"], "is no classifier"),
        (["finetune", "--checkpoint", "pixels"], "nothing to fine-tune"),
        (["knn", "--checkpoint", "random", "--streaming", "--skip-unlabelled"], "drop it, or --streaming"),
        (["finetune", "--checkpoint", "random", "--epochs", "0"], "at least 1"),
        (["linear", "--checkpoint", "random", "--dataset", "nowhere/at/all"], "cannot find data set"),
    ],
)
def test_wrong_calls_end_in_one_line(arguments, message, monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate(monkeypatch, arguments[0], tmp_path, *arguments[1:])
    assert stop.value.code == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("eval.py: error: ") and message in error


def test_unlabelled_pictures_are_refused_by_what_needs_labels(monkeypatch, folder, tmp_path, capsys):
    import shutil

    for split in ("train", "val"):
        (tmp_path / "flat" / split).mkdir(parents=True)
        shutil.copy(folder / split / "red" / "0.png", tmp_path / "flat" / split)
    with pytest.raises(SystemExit):
        evaluate(monkeypatch, "knn", tmp_path / "out", "--checkpoint", "pixels", "--dataset", tmp_path / "flat")
    assert "split train of" in (said := capsys.readouterr().err) and "or another split with --split" in said
    shutil.rmtree(tmp_path / "flat" / "train")
    shutil.copytree(folder / "train", tmp_path / "flat" / "train")
    with pytest.raises(SystemExit):
        evaluate(monkeypatch, "knn", tmp_path / "out", "--checkpoint", "pixels", "--dataset", tmp_path / "flat")
    assert "split val of" in (said := capsys.readouterr().err) and "or another split with --test-split" in said


def test_a_mistake_costs_no_earlier_results(monkeypatch, tmp_path, capsys):
    """They were removed before the data were looked for."""
    for name in ("result.json", "features.parquet"):
        (tmp_path / name).write_text("earlier")
    with pytest.raises(SystemExit):
        evaluate(monkeypatch, "embed", tmp_path, "--checkpoint", "pixels", "--dataset", "nowhere/at/all", "--overwrite")
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {
        "result.json": "earlier", "features.parquet": "earlier",
    }  # fmt: skip


def test_two_commands_do_not_write_to_one_folder(monkeypatch, folder, tmp_path, capsys):
    monkeypatch.setattr(checkpoint_file.Lock.__init__, "__defaults__", (0,))
    arguments = ["--checkpoint", "pixels", "--dataset", folder]
    with checkpoint_file.Lock(tmp_path) as lock:
        lock.take()
        with pytest.raises(SystemExit):
            evaluate(monkeypatch, "embed", tmp_path, *arguments)
        assert "another run is writing" in capsys.readouterr().err and not list(tmp_path.iterdir())
    assert evaluate(monkeypatch, "embed", tmp_path, *arguments)["images"] == 48


def test_a_few_pictures_have_the_classes_of_all(tmp_path, monkeypatch):
    for split, count in (("train", 24), ("test", 12)):
        content = dict(image=[Image.new("RGB", (8, 8))] * count, label=[10 * (i * 12 // count) for i in range(count)])
        features = datasets.Features(image=datasets.Image(), label=datasets.Value("int64"))
        datasets.Dataset.from_dict(content, features).to_parquet(tmp_path / f"{split}.parquet")
    training, tests, classes = load_labelled(str(tmp_path), "train", None, max_images=5)
    assert training["label"] == [0, 2, 5, 8, 11] and tests["label"] == list(range(12))
    assert classes == [str(10 * number) for number in range(12)]
    monkeypatch.setenv("HOME", str(tmp_path))
    for file in (str(tmp_path / "train.parquet"), "~/train.parquet"):
        with pytest.raises(ValueError, match="name the folder of two files instead"):
            data.load_test_images(file, None)


def test_too_many_broken_pictures_end_an_evaluation_at_once():
    batches, seen = EvalBatches(with_bad(), 8, 2, max_bad=0.1), []
    with pytest.raises(data.TooManyBadImages, match="3 of 12 images are broken"):
        for rows in encoders.compute_rows(batches, Accelerator(cpu=True), (data.MEAN, data.STD), lambda x, i: x):
            seen += rows.indices.tolist()
    assert seen == [0, 1, 2, 5, 6, 7, 8, 9]  # of 20


def test_a_classifier_sees_pictures_of_many_bits_as_in_its_training(monkeypatch, folder, checkpoint, tmp_path):
    how = ["--checkpoint", checkpoint, "--dataset", folder, "--pixel-range", 0, 4095, "--epochs", 1]
    evaluate(monkeypatch, "finetune", tmp_path / "tuned", *how, "--warmup-epochs", 0, "--batch-size", 16)
    ranges, pixel_format = [], data.pixel_format
    monkeypatch.setattr(data, "pixel_format", lambda *given: ranges.append(given[2]) or pixel_format(*given))
    evaluate(monkeypatch, "predict", tmp_path / "found", "--checkpoint", tmp_path / "tuned", "--dataset", folder)
    assert ranges == [[0, 4095]]


def test_names_of_classes_are_not_written_as_a_number_that_means_none(monkeypatch, folder, tmp_path, capsys):
    (tmp_path / "list.csv").write_text(f"file_name,kind\n{folder / 'train' / 'red' / '0.png'},felis\n")
    arguments = ["--checkpoint", "random", "--dataset", tmp_path / "list.csv", "--label-column", "kind"]
    with pytest.raises(SystemExit):
        evaluate(monkeypatch, "embed", tmp_path / "out", *arguments)
    assert "embed writes numbers, and --label-column kind has none" in capsys.readouterr().err


def test_oblong_positions_take_the_size_that_is_given(tmp_path):
    oblong = smae.SMAE(width=32, depth=1, heads=2, image_size=[32, 64], patch_size=8, learned_positions=True)
    smae.save(oblong, tmp_path / "oblong.pth", format="mae")
    weights = torch.load(tmp_path / "oblong.pth", weights_only=True)["model"]
    torch.save(dict(model=weights), tmp_path / "oblong.pth")  # as others leave it, without options
    with pytest.raises(ValueError, match="or --image-size H W"):
        encoders.load(str(tmp_path / "oblong.pth"), heads=2)
    given = encoders.load(str(tmp_path / "oblong.pth"), heads=2, untrained=dict(image_size=[32, 64]))
    assert given.image_size == (32, 64)
    own = encoders.backbone(str(tmp_path / "oblong.pth"), heads=2, image_size=[32, 64])
    assert own.config["image_size"] == [32, 64]
    args = train.parse_arguments(
        ["--init-from", str(tmp_path / "oblong.pth"), "--heads", "2", "--image-size", "32", "64"]
    )
    assert train.build_model(args).config["image_size"] == [32, 64]


# ------------------------------------------------------------------------------------------- reconstruction


@pytest.mark.parametrize("masked_by", ["random", "own"])
def test_pictures_are_masked_and_rebuilt(masked_by, monkeypatch, checkpoint, folder, tmp_path):
    arguments = ["--checkpoint", checkpoint, "--dataset", folder, "--masked-by", masked_by, "--mask-ratio", 0.5]
    result = evaluate(monkeypatch, "reconstruct", tmp_path / "a", *arguments, "--max-images", 10)
    assert result["images"] == 10 and result["loss"] > 0
    strips = sorted((tmp_path / "a" / "reconstructions").iterdir())
    assert len(strips) == 10 and Image.open(tmp_path / "a" / "reconstruction.png").width > 300
    strip = np.asarray(Image.open(strips[0])).astype(int)
    assert strip.shape == (32, 96, 3)
    before, covered, after = np.split(strip, 3, axis=1)
    with Image.open(sorted((folder / "train").rglob("*.png"))[0]) as whole:  # to its edges
        assert np.abs(data.center_crop(whole, 32).permute(1, 2, 0).numpy().astype(int) - before).max() <= 1

    def unchanged(other: np.ndarray) -> np.ndarray:  # patches of 8 x 8
        return (np.abs(other - before) <= 1).reshape(4, 8, 4, 8, 3).all((1, 3, 4))

    assert unchanged(covered).sum() == 8 and (unchanged(after) >= unchanged(covered)).all()
    assert not unchanged(after).all()
    again = evaluate(monkeypatch, "reconstruct", tmp_path / "b", *arguments, "--max-images", 10, "--batch-size", 3)
    assert again["loss"] == pytest.approx(result["loss"], rel=1e-5)  # masks are those of the pictures
    assert np.abs(np.asarray(Image.open(tmp_path / "b" / "reconstructions" / strips[0].name)) - strip).max() <= 1


def test_new_reconstructions_replace_the_old_ones(monkeypatch, checkpoint, folder, tmp_path, capsys):
    arguments = ["--checkpoint", checkpoint, "--dataset", folder, "--overwrite"]
    evaluate(monkeypatch, "reconstruct", tmp_path / "a", *arguments, "--max-images", 5)
    with pytest.raises(SystemExit):
        evaluate(monkeypatch, "reconstruct", tmp_path / "a", *arguments, "--mask-ratio", 2)
    assert len(list((tmp_path / "a" / "reconstructions").iterdir())) == 5  # noticed before they are removed
    evaluate(monkeypatch, "reconstruct", tmp_path / "a", *arguments, "--max-images", 2)
    assert len(list((tmp_path / "a" / "reconstructions").iterdir())) == 2


def test_masks_without_room_for_hints_are_refused(monkeypatch, checkpoint, folder, tmp_path, capsys):
    arguments = ["--checkpoint", checkpoint, "--masked-by", "own", "--mask-ratio", 0.95, "--dataset", folder]
    with pytest.raises(SystemExit):
        evaluate(monkeypatch, "reconstruct", tmp_path / "out", *arguments)
    assert "only 1 patches are visible" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_without_a_decoder_nothing_is_rebuilt(monkeypatch, folder, tmp_path, capsys):
    sizes = dict(width=32, depth=1, heads=2, decoder_depth=0, image_size=32, patch_size=8)
    smae.save(smae.SMAE(**sizes), tmp_path / "encoder")
    for name in (tmp_path / "encoder", "pixels"):
        with pytest.raises(SystemExit):
            evaluate(monkeypatch, "reconstruct", tmp_path / "out", "--checkpoint", name, "--dataset", folder)
        assert "has no decoder to reconstruct with" in capsys.readouterr().err
