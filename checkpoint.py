"""Resuming a run: checkpoints, random states, a lock, signals, messages between processes.

A checkpoint is a folder ``checkpoint-STEP`` of a run. It holds ``model.safetensors`` and
``config.json``, which ``smae.load`` reads, and ``state.pt`` with everything else needed to resume.
Accelerate's ``save_state`` is not used: it writes in place, from every process, and unpickles
custom states without ``weights_only``.
"""

import contextlib
import os
import random
import shutil
import signal
import time
import zipfile
import zlib
from collections.abc import Callable, Container, Iterable
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

import smae

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

STATE, WEIGHTS = "state.pt", "model.safetensors"


# --------------------------------------------------------------------------------- writing, reading


def write(
    out: Path,
    step: int,
    model: torch.nn.Module,
    state: dict,
    keep: int = 2,
    passing: Container[int] = (),
    attached: Iterable[Path] = (),
):
    """Write ``checkpoint-STEP`` into the folder ``out``; keep the newest ``keep`` checkpoints.

    Checkpoints at ``passing`` steps are kept only while they are among the newest two.

    The folder is written under another name, flushed to the disk, then renamed: a folder with the
    name of a checkpoint is complete. ``state`` holds tensors and plain values, and the content of
    config.json under "config". Files ``attached`` are linked into the folder. Raises OSError if the
    disk fails; the earlier checkpoints then stay.
    """
    # write everything under another name, then rename
    final = out / f"checkpoint-{step:08d}"
    part = final.with_suffix(f".{os.getpid()}.part")
    for left_over in (*out.glob("checkpoint-*.part"), *out.glob("checkpoint-*.old")):
        shutil.rmtree(left_over, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        smae.write_folder(part, smae.tensors_of(model), {"config.json": state["config"]})
        for file in attached:
            link(file, part / file.name)
        with smae.whole_file(part / STATE) as name, open(name, "wb") as file:
            torch.save(state | dict(crc=checksum(part / WEIGHTS)), file)
        if final.exists():
            _remove(final)
        os.rename(part, final)  # smae.whole_file() replaces files only, not folders
        smae.flush(out)
    except (OSError, RuntimeError) as error:
        shutil.rmtree(part, ignore_errors=True)
        raise OSError(f"cannot write {final}: {' '.join(str(error).split())[:200]}") from None

    # remove old checkpoints, and later ones left by a run that resumed from an earlier step
    later = [folder for folder in folders(out) if number(folder) > step]
    for place, folder in enumerate(folders(out), -len(later)):
        if folder in later or place >= keep or (place > 1 and number(folder) in passing):
            _remove(folder)


def link(file: Path, name: Path):
    """Give ``file`` a second ``name``, replacing any file of that name.

    ``file`` must not be changed in place. It is copied if the file system has no links.
    """
    with smae.whole_file(name) as part:
        try:
            os.link(file, part)
        except OSError:
            shutil.copyfile(file, part)


def _remove(folder: Path):
    """Rename a checkpoint and remove it, as far as possible."""
    with contextlib.suppress(OSError):  # for example, a file in use on a network disk
        shutil.rmtree(folder.rename(folder.with_suffix(f".{os.getpid()}.old")))


def remove_all(out: Path):
    """Remove all checkpoints of a run."""
    for folder in folders(out):
        _remove(folder)


def folders(out: Path) -> list[Path]:
    """The checkpoints of a run, newest first."""
    return sorted((folder for folder in out.glob("checkpoint-*") if number(folder) >= 0), key=number, reverse=True)


def number(folder: Path) -> int:
    """The step in the name of a checkpoint; -1 if the folder is not a checkpoint."""
    digits = folder.name.removeprefix("checkpoint-")
    return int(digits) if digits.isdecimal() else -1


def read(folder: Path) -> dict:
    """The state of a checkpoint, with its weights under "model". Raises ValueError if damaged."""
    try:
        with zipfile.ZipFile(folder / STATE) as file:
            if broken := file.testzip():
                raise ValueError(f"{broken} in {STATE} is damaged")
        state = torch.load(folder / STATE, map_location="cpu", weights_only=True)
        if state["crc"] != checksum(folder / WEIGHTS):
            raise ValueError(f"{WEIGHTS} is damaged")
        return state | dict(model=safetensors.torch.load_file(folder / WEIGHTS))
    except Exception as error:  # a damaged file can raise any error
        raise ValueError(f"{folder} is not a complete checkpoint: {' '.join(str(error).split())[:200]}") from None


def find(place: Path, say: Callable = print, aside: bool = False) -> Path | None:
    """The checkpoint ``place``, or the newest intact one of that run folder; None if it has none.

    Reports the broken ones it skips. ``aside`` also renames them after an intact one is found.
    Raises ValueError if ``place`` itself is broken, or every checkpoint is.
    """
    place = place.resolve()
    if (place / STATE).exists() and not folders(place):
        read(place)
        return place
    problems = {}
    for folder in folders(place):
        try:
            read(folder)
        except ValueError as error:
            problems[folder] = error
            say(f"skipped a broken checkpoint: {error}")
            continue
        for broken in problems if aside else ():
            broken.rename(broken.with_suffix(f".{os.getpid()}.broken"))
        return folder
    if problems:
        raise ValueError(f"all checkpoints of {place} are broken, the newest: {next(iter(problems.values()))}")
    return None


class Locked(ValueError):
    """Another run is writing to the same folder."""


class Lock:
    """Lets one run at a time write to a folder: ``with Lock(out) as lock: lock.take()``."""

    def __init__(self, out: Path, patience: float = 15):
        self.out, self.patience, self.handle = out, patience, None

    def __enter__(self) -> "Lock":
        return self

    def take(self):
        """Take the lock, or raise Locked if another run holds it for ``patience`` seconds.

        Does nothing if the folder does not exist.
        """
        # the data workers of a killed run hold its lock a little longer
        deadline = time.monotonic() + self.patience
        while fcntl and self.handle is None and self.out.is_dir():
            handle = os.open(self.out, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(handle)
                if time.monotonic() > deadline:
                    raise Locked(f"another run is writing to {self.out}: stop it or choose another --out") from None
                time.sleep(0.2)
                continue
            except OSError:  # some file systems have no locks
                pass
            self.handle = handle

    def __exit__(self, *_):
        if self.handle is not None:
            os.close(self.handle)


def checksum(path: Path) -> int:
    """The CRC-32 of a file."""
    crc = 0
    with open(path, "rb") as file:
        while chunk := file.read(2**24):
            crc = zlib.crc32(chunk, crc)
    return crc


def all_finite(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> bool:
    """Whether all weights and all moments of the optimizer are finite."""
    moments = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor)]
    device = next(model.parameters()).device
    finite = [tensor.detach().isfinite().all().to(device) for tensor in (*model.parameters(), *moments)]
    return bool(torch.stack(finite).all())


# --------------------------------------------------------------------------------- random states


def random_states() -> dict:
    """The states of all random generators of this process: Python, NumPy, torch on CPU and GPU."""
    kind, key, *rest = np.random.get_state()
    states = dict(python=random.getstate(), numpy=(kind, key.tolist(), *rest), torch=torch.get_rng_state())
    return states | (dict(cuda=torch.cuda.get_rng_state()) if torch.cuda.is_available() else {})


def set_random_states(states: dict):
    """Restore the states that :func:`random_states` returned."""
    random.setstate(states["python"])
    kind, key, *rest = states["numpy"]
    np.random.set_state((kind, np.array(key, np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


# ------------------------------------------------------------------------------- signals, processes


class Signals:
    """Catch requests to stop: ``with Signals() as signals: ... signals.caught()``.

    ``caught()`` returns the number of the signal, or 0. A second request ends the process at once,
    unless it comes within a second: launchers repeat a signal that the terminal has already sent to
    every process. ``accelerate launch`` dies of a signal without passing it on, so a launcher that
    is gone counts as SIGTERM.
    """

    ASK_TO_STOP = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))
    LAUNCHERS = ("accelerate", "accelerate.commands.launch", "torchrun", "torch.distributed.run")

    def __init__(self):
        self._caught, self._when, self._launcher = 0, 0.0, None
        with contextlib.suppress(OSError):  # only Linux has /proc
            words = Path(f"/proc/{os.getppid()}/cmdline").read_text().split("\0")
            if any(word in self.LAUNCHERS or Path(word).name in self.LAUNCHERS for word in words):
                self._launcher = os.getppid()

    def caught(self) -> int:
        """The number of the signal caught, SIGTERM if the launcher is gone, else 0."""
        gone = self._launcher is not None and os.getppid() != self._launcher
        return self._caught or (signal.SIGTERM if gone else 0)

    def __enter__(self) -> "Signals":
        self._before = {number: signal.signal(number, self._note) for number in self.ASK_TO_STOP}
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame):
        if self._caught and time.monotonic() > self._when + 1:
            os._exit(128 + number)
        if not self._caught:
            self._caught, self._when = number, time.monotonic()


class Peers:
    """Exchange numbers between the processes of a run, without waiting for their devices."""

    def __init__(self, world: int):
        self.group = torch.distributed.new_group(backend="gloo") if world > 1 else None

    def largest(self, *values: int) -> list[int]:
        """The largest of each value over all processes. Raises RuntimeError if one is gone."""
        if self.group is None:
            return list(values)
        numbers = torch.tensor(values)
        torch.distributed.all_reduce(numbers, torch.distributed.ReduceOp.MAX, group=self.group)
        return numbers.tolist()
