"""Lets runs draw a few pixels in place of their pictures, which take longer than they."""

from pathlib import Path

from PIL import Image

import train


def draw(out: Path, epoch: int, *_):
    Image.new("RGB", (16, 8), (epoch % 256, 0, 0)).save(out / "masks.png")


def draw_predictions(task, scenes, file: Path, text: str):
    Image.new("RGB", (16, 8)).save(file)


def apply():
    import dense  # forked.py has imported it

    train.draw, dense.draw = draw, draw_predictions
