"""Makes the steps of train.py last, so that there is time to disturb them."""

import time

import train


def apply():
    learn = train.Run.learn

    def slowly(self, batch):
        learn(self, batch)
        time.sleep(0.03)

    train.Run.learn = slowly
    train.draw = lambda args, *_: (args.out / "masks.png").write_text("drawn")
