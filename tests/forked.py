"""Real processes that run our scripts, started in a moment: forked from a server that has imported them already."""

import faulthandler
import importlib
import multiprocessing
import os
import resource
import signal
import socket
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    ["train", "eval", "dense", "torch.utils.tensorboard", "torch._dynamo"]  # the last is imported by optimizers
)


def start(
    log,
    *arguments,
    script: str = "train",
    world: int = 1,
    largest_file: int | None = None,
    patches: str | None = "undrawn",
) -> list:
    """Start ``world`` processes of ``SCRIPT.py arguments``; what they print goes to ``log``-RANK.

    ``largest_file``: bytes beyond which no file can grow, in place of a full disk. ``patches``: a module of tests/
    whose ``apply()`` is called first; by default it leaves out the pictures.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(world):
        environment = dict(ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
        if world > 1:
            environment |= dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, LOCAL_WORLD_SIZE=world)
            environment |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        job = [str(x) for x in arguments], {key: str(value) for key, value in environment.items()}
        processes.append(context.Process(target=_run, args=(script, *job, f"{log}-{rank}", largest_file, patches)))
    for rank, process in enumerate(processes):
        process.log = Path(f"{log}-{rank}")
        process.log.touch()
        process.start()
    return processes


def _run(script, arguments, environment, log, largest_file, patches):
    os.setpgrp()  # with its workers, a group to be signalled
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.fsync = lambda handle: None  # see conftest.py
    os.chdir(ROOT)
    os.environ.update(environment)
    faulthandler.register(signal.SIGQUIT)  # finish() asks what it is at; its workers inherit this
    if largest_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    module = importlib.import_module(script)
    if patches:
        importlib.import_module(patches).apply()
    sys.argv = [f"{script}.py", *arguments]
    module.main()


def finish(processes: list, seconds: float = 120) -> list[int]:
    """Wait for them; their exit codes. Kills what does not end in time: an AssertionError says what it was at."""
    for process in processes:
        process.join(seconds)
    late = [process for process in processes if process.is_alive()]
    for process in late:
        os.killpg(process.pid, signal.SIGQUIT)
    time.sleep(1 if late else 0)
    for process in late:
        os.killpg(process.pid, signal.SIGKILL)
    ends = "\n\n".join(f"{process.log.name}: {process.log.read_text()[-6000:]}" for process in late)
    assert not late, f"{len(late)} processes did not end within {seconds} s\n{ends}"
    return [process.exitcode for process in processes]
