"""Lets runs trace what they compile, but generate no code, which takes a minute; and draw no pictures."""

import functools

import torch
import undrawn


def apply():
    torch.compile = functools.partial(torch.compile, backend="aot_eager")
    undrawn.apply()
