"""Memory of this process, as Linux tells it."""

import os
from pathlib import Path

import pytest

needs_proc = pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="memory is measured on Linux")


def status(name: str) -> float:
    """A value in /proc/self/status, in MiB: VmRSS now, VmHWM at its peak, VmSize the address space."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1024
