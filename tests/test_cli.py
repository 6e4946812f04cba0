"""What the commands share."""

import argparse
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import QUICK, SMALL, records

import cli
import eval as judge
import smae
import train


def test_every_shared_option_is_added_with_its_own_default():
    parser = argparse.ArgumentParser()
    cli.add(parser, "epochs", "mask-ratio", "resume", epochs=7)
    assert vars(parser.parse_args([])) == dict(epochs=7, mask_ratio=0.75, resume=None)
    assert parser.parse_args(["--resume"]).resume == "auto"
    assert parser.parse_args(["--resume", "runs/a"]).resume == "runs/a"


# ------------------------------------------------------------------------------------------- accelerate's settings


@pytest.mark.parametrize(
    "option, launcher, chosen",
    [
        ("auto", None, "bf16"),
        ("auto", "no", "bf16"),  # what accelerate launch says if nobody asked it
        ("auto", "fp16", "fp16"),
        ("no", "bf16", "no"),
    ],
)
def test_precision_auto_follows_the_launcher(option, launcher, chosen, monkeypatch):
    monkeypatch.setattr(cli, "best_precision", lambda: "bf16")
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if launcher:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launcher)
    assert cli.choose_precision(option) == chosen


def test_fp16_is_refused_where_accelerate_would_silently_compute_in_float32(monkeypatch):
    monkeypatch.setattr(cli, "Accelerator", lambda **_: SimpleNamespace(device=torch.device("cpu")))
    with pytest.raises(ValueError, match="fp16 needs a GPU"):
        cli.make_accelerator("fp16")


def test_accumulation_set_for_accelerate_changes_nothing_and_is_named(quick_drawing, monkeypatch, tmp_path, capfd):
    """It once made a quarter of the steps and reported four times the loss."""
    train.main([*QUICK, "--out", tmp_path / "plain"])
    capfd.readouterr()
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    train.main([*QUICK, "--out", tmp_path / "set"])
    printed = capfd.readouterr().out
    assert "--accumulate is 1; accelerate's setting 4 (ACCELERATE_GRADIENT_ACCUMULATION_STEPS) is ignored" in printed
    assert "--precision is no; accelerate's setting bf16 (ACCELERATE_MIXED_PRECISION) is ignored" in printed
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    accelerator = cli.make_accelerator("no", 4)
    monkeypatch.setattr(cli, "Accelerator", lambda **_: accelerator)  # of a process that may choose another one
    cli.make_accelerator("bf16", 4)
    assert "is ignored" not in capfd.readouterr().out
    losses = [[record["loss"] for record in records(tmp_path / name)] for name in ("plain", "set")]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    "variable, value, message",
    [
        ("ACCELERATE_USE_DEEPSPEED", "true", "DeepSpeed is not supported"),
        ("ACCELERATE_USE_FSDP", "true", "FSDP is not supported"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "Megatron-LM is not supported"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "a parallelism configuration is not supported"),
        ("ACCELERATE_MIXED_PRECISION", "fp8", "fp8 is not supported"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "use --compile instead"),
    ],
)
@pytest.mark.parametrize("command", ["train", "eval"])
def test_what_accelerate_cannot_do_here_is_refused(command, variable, value, message, monkeypatch, tmp_path):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=message):
        if command == "train":
            train.main([*QUICK, "--out", tmp_path / "run"])
        else:
            judge.main(["knn", "--checkpoint", "random", *SMALL, "--precision", "no", "--out", tmp_path / "run"])
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------- from Python


def test_commands_can_be_called_from_python(quick_drawing, monkeypatch, tmp_path, capfd):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    out = train.main([*QUICK, "--out", tmp_path / "run"])
    assert out == tmp_path / "run" and smae.load(out).config["width"] == 32
    arguments = ["--max-images", 32, "--k", 3, "--precision", "no", "--workers", 0, "--out", tmp_path / "knn"]
    result = judge.main(["knn", "--checkpoint", out, *arguments])
    assert result["images"] == 1000 and 0 <= result["top1"] <= 100
    capfd.readouterr()
    for call in (
        lambda: train.main([*QUICK, "--out", out]),  # there is a run already
        lambda: train.main(["--epochs", "many"]),
        lambda: judge.main(["knn", "--checkpoint", tmp_path / "nowhere", "--out", tmp_path / "other"]),
    ):
        with pytest.raises((ValueError, OSError)):
            call()
    assert "error:" not in capfd.readouterr().err  # an exception says it


def test_a_run_may_lie_in_a_folder_whose_files_are_no_checkpoint(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    cli.check_out(Path("."), "column:mask")  # no file
    (tmp_path / "model.pth").touch()
    with pytest.raises(ValueError, match="holds the checkpoint itself"):
        cli.check_out(Path("."), "model.pth")
