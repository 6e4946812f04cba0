"""Lets runs trace what they compile, but generate no code, which takes a minute; and draw no pictures."""

import functools

import torch
import undrawn
from torch._dynamo.backends.debugging import aot_eager


def apply():
    def backend(graph, examples):
        print("traced a graph", flush=True)
        return aot_eager(graph, examples)

    torch.compile = functools.partial(torch.compile, backend=backend)
    undrawn.apply()
