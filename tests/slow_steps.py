"""Makes the steps of train.py last, so that there is time to disturb them."""

import time

import run
import train


def apply():
    step = run.Run.step

    def slowly(self, loss, batch):
        step(self, loss, batch)
        time.sleep(0.03)

    run.Run.step = slowly
    train.draw = lambda out, *_: (out / "masks.png").write_text("drawn")
