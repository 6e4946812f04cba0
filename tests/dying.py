"""Ends the second process of an evaluation at its first pictures."""

import os

import data


def apply():
    if os.environ["RANK"] == "1":
        data.normalize = lambda *_: os._exit(9)
