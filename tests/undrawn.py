"""Lets runs draw no pictures, which take longer than they."""

from pathlib import Path

import train


def draw(out: Path, *_):
    (out / "masks.png").write_text("drawn")


def apply():
    train.draw = draw
