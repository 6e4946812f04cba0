"""One training harness: steps, learning rate, signals, checks, checkpoints, log and progress bar.

    run = Run(...)
    with run.guarded():
        for epoch in run.epochs():  # continues where the checkpoint left off
            for batch in run.batches_of(epoch):
                run.step(loss_of(batch), batch)
            run.end_epoch()
    run.finish()

What a training adds of its own, and what has a ``state_dict``, goes into ``parts``.
"""

import contextlib
import json
import math
import os
import re
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn
from tqdm import tqdm

import checkpoint
import cli
import data
import optim
import smae
from batches import Batch, TrainBatches

LONGEST = 15 * 60  # seconds of work that an interruption may cost, whatever the options


class Diverged(ArithmeticError):
    """A loss, a weight or a moment of the optimizer is no longer a finite number."""


class Interrupted(Exception):
    """A process was told to stop, by the signal of this number."""


class ProcessLost(RuntimeError):
    """Something outside the training ended it: another process died, or the disk does not take what it needs."""


ERRORS = (data.TooManyBadImages, data.NothingToRead, checkpoint.Locked, Diverged, ProcessLost)


@dataclass
class Progress:
    """How far a run has come: in ``epoch``, of which ``seen`` images are done, after ``step`` steps in all."""

    total: Tensor  # of the losses of all images of the epoch that this process has seen
    epoch: int = 1
    seen: int = 0
    step: int = 0
    seconds: float = 0.0  # of the epoch
    records: list[dict] = field(default_factory=list)  # of metrics.jsonl
    name: str = field(default_factory=lambda: uuid.uuid4().hex)  # for trackers


class Run:
    """A training and everything that changes while it goes on.

    ``model`` is the bare one; :attr:`trained` is what a process calls. ``parts`` names what else a checkpoint holds:
    objects with ``state_dict`` and ``load_state_dict``. ``write_results`` writes what a run leaves besides its
    metrics, ``files`` are the names of all of that; ``attached`` gives further files that a checkpoint needs.
    ``milestones`` are epochs after which a checkpoint is written besides every ``save_every``; ``phase`` is what the
    log calls the present part of the training.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        batches: TrainBatches,
        *,
        out: Path,
        lock: checkpoint.Lock,
        config: dict,
        epochs: int,
        warmup_epochs: int,
        lr: float,
        clip_grad: float | None = None,
        save_every: int = 1,
        save_every_steps: int | None = None,
        keep: int = 2,
        files: tuple[str, ...] = (),
        parts: dict | None = None,
        write_results: Callable[[int], None] = lambda epoch: None,
        attached: Callable[[], list[Path]] = list,
    ):
        self.accelerator, self.model, self.batches = accelerator, model, batches
        self.out, self.lock, self.config, self.files = out, lock, config, files
        self.total_epochs, self.warmup_epochs, self.lr, self.clip_grad = epochs, warmup_epochs, lr, clip_grad
        self.save_every, self.save_every_steps, self.keep = save_every, save_every_steps, keep
        self.parts, self.write_results, self.attached = parts or {}, write_results, attached
        self.trained, self.optimizer = accelerator.prepare(model, optimizer)
        self.progress = Progress(torch.zeros((), device=accelerator.device))
        self.peers, self.signals = checkpoint.Peers(accelerator.num_processes), checkpoint.Signals()
        self.phase, self.milestones = "", {epochs}
        self.clock = time.perf_counter()  # when the epoch began
        self.losses: list[tuple[int, Tensor, list[int]]] = []  # step, loss, images: not yet known to be finite
        self.saved, self.saved_at = None, time.monotonic()  # step of the last checkpoint; when one was last tried
        self.passing: set[int] = set()  # steps of checkpoints that no option asked for
        self.replaces, self.published = True, True  # whether another run lies in --out; whether the results are there
        self.stopped_by = 0  # the number of a signal
        self.bar = tqdm(
            total=epochs * batches.steps_per_epoch,
            disable=not accelerator.is_main_process,
            unit="step",
            mininterval=1 if sys.stderr.isatty() else 30,  # seconds between updates
        )

    # ---------------------------------------------------------------------------------------------- the loop

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """Turn signals into a checkpoint and an orderly end, and known errors into one line; save at the end."""
        world = self.accelerator.num_processes
        with cli.one_line_errors(*ERRORS, ranks="any"), lost_processes(world), self.signals:
            try:
                yield
            except Interrupted as interrupted:
                self.stopped_by = interrupted.args[0]
            finally:
                self.batches.close()
            self.save()
        self.bar.close()

    def epochs(self) -> Iterator[int]:
        """The epochs that are left, counted from 1."""
        if self.progress.records and not self.progress.seen:  # killed, perhaps, between checkpoint and results
            self.publish()
        while self.progress.epoch <= self.total_epochs:
            self.clock = time.perf_counter() - self.progress.seconds
            yield self.progress.epoch

    def batches_of(self, epoch: int) -> Iterator[Batch]:
        """This process's micro-batches of what is left of an epoch, each at its learning rate."""
        self.trained.train()
        with contextlib.closing(self.batches.epoch(epoch, self.progress.seen)) as batches:
            for batch in batches:
                for group in self.optimizer.param_groups:
                    group["lr"] = self.learning_rate()
                with self.accelerator.accumulate(self.trained):
                    yield batch

    def learning_rate(self) -> float:
        """That of the step at hand."""
        steps, warmup = (epochs * self.batches.steps_per_epoch for epochs in (self.total_epochs, self.warmup_epochs))
        return optim.learning_rate(self.steps_done(), steps, warmup, self.lr)

    def steps_done(self) -> int:
        """Steps of the schedule that are done."""
        progress = self.progress
        return (progress.epoch - 1) * self.batches.steps_per_epoch + progress.seen // self.batches.plan.batch_size

    def step(self, loss: Tensor, batch: Batch):
        """Backward; with the last micro-batch of a step also update, look out for signals, save if it is time."""
        accelerator, progress = self.accelerator, self.progress
        accelerator.backward(loss)
        if self.clip_grad and accelerator.sync_gradients:
            accelerator.clip_grad_norm_(self.trained.parameters(), self.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        progress.total += loss.detach() * len(batch.images)
        self.losses.append((progress.step + 1, loss.detach(), batch.indices))
        if not accelerator.sync_gradients:
            return

        progress.step += 1
        progress.seen += self.batches.plan.batch_size
        self.bar.update()
        last = not self.batches.plan.steps_left(progress.seen)  # then the end of the epoch does what is due
        overdue = self.poll(stop=not last)
        if progress.step % 10 == 0:  # this waits for the device: not at every step
            self.check_losses()
        if (overdue or self.is_save_step(progress.step)) and not last:
            self.save()

    def end_epoch(self, **metrics):
        """Log the finished epoch, with more ``metrics`` of it, and save what is due."""
        accelerator, progress = self.accelerator, self.progress
        self.check_losses()
        seconds, epoch = time.perf_counter() - self.clock, progress.epoch
        record = dict(
            loss=accelerator.reduce(progress.total, "sum").item() / progress.seen,
            lr=self.optimizer.param_groups[0]["lr"],
            images_per_second=progress.seen / seconds,
            seconds=seconds,
            bad_images=self.batches.bad.count,
        )
        accelerator.log(record, step=epoch)
        progress.records.append(dict(epoch=epoch) | (dict(phase=self.phase) if self.phase else {}) | record | metrics)
        self.say(
            f"epoch {epoch}/{self.total_epochs}  {self.phase:10}  loss {record['loss']:.4f}  lr {record['lr']:.2e}  "
            f"{record['images_per_second']:.0f} images/s"
        )
        progress.epoch, progress.seen, progress.seconds = epoch + 1, 0, 0.0
        progress.total.zero_()
        self.clock = time.perf_counter()
        if self.is_due():
            self.save()
        self.publish()
        if self.poll(stop=epoch < self.total_epochs):
            self.save()

    def finish(self):
        """End the program where the run was stopped, or where its last checkpoint or results could not be written."""
        self.accelerator.end_training()
        if self.saved != self.progress.step or not self.published:
            with cli.one_line_errors(OSError):
                raise OSError("the last checkpoint, or the results, could not be written, see above")
            sys.exit(1)
        if self.stopped_by:
            self.accelerator.print(
                f"stopped by {signal.Signals(self.stopped_by).name}: epoch {self.progress.epoch}, after step "
                f"{self.progress.step} of the run, with a checkpoint: the same command with --resume auto goes on"
            )
            sys.exit(128 + self.stopped_by)

    # ---------------------------------------------------------------------------------------------- checks

    def say(self, text: str):
        """Print a line above the progress bar, in the main process."""
        if self.accelerator.is_main_process:
            self.bar.write(text)

    def poll(self, stop: bool = True) -> bool:
        """Exchange news with the other processes: signals, broken pictures. Whether a checkpoint is overdue.

        Raises Interrupted, in all processes, if one of them was told to stop, unless this is no moment to ``stop``.
        """
        overdue = self.accelerator.is_main_process and time.monotonic() > self.saved_at + LONGEST
        news = self.batches.bad.unreported
        number, news, overdue = self.peers.largest(self.signals.caught(), news, overdue)
        if news:
            check_bad_pictures(self.batches)
            for description in self.batches.bad.take_unreported():
                self.say(f"skipped a broken image: {description}")
        if number and stop:
            raise Interrupted(number)
        return bool(overdue)

    def check_losses(self):
        """Raise Diverged, in all processes, if a loss since the last call was not finite."""
        values = torch.stack([loss for _, loss, _ in self.losses]).tolist() if self.losses else []
        wrong = next((i for i, value in enumerate(values) if not math.isfinite(value)), None)
        if self.peers.largest(wrong is not None)[0]:
            rank, found = self.accelerator.process_index, []
            if wrong is not None:
                step, _, images = self.losses[wrong]
                found = [(step, rank, values[wrong], [int(i) for i in images])]
            step, rank, value, images = min(gather_object(found))
            with reported_once(Diverged):
                raise Diverged(
                    f"the loss is {value} in epoch {self.progress.epoch}, step {step} of the run{self._of_phase()}, "
                    f"images {', '.join(map(str, images))} of the data; the checkpoints are from before it: --resume "
                    "auto goes on from there, with a lower --blr perhaps, or --clip-grad 1"
                )
        if values:
            text = f"loss {values[-1]:.4f}, lr {self.optimizer.param_groups[0]['lr']:.2e}"
            text = f"{self.phase}, {text}" if self.phase else text
            speed = self.progress.seen / (time.perf_counter() - self.clock)
            self.bar.set_postfix_str(f"{text}, {speed:.0f} images/s", refresh=False)
        self.losses.clear()

    def _of_phase(self) -> str:
        return f", {self.phase} masks" if self.phase else ""

    # ---------------------------------------------------------------------------------------------- saving

    def is_due(self) -> bool:
        """Whether weights and results are due, the epoch being finished."""
        epoch = self.progress.epoch - 1
        due = epoch % self.save_every == 0 or epoch in self.milestones
        return due or self.is_save_step(self.progress.step)

    def is_save_step(self, step: int) -> bool:
        return bool(self.save_every_steps) and step % self.save_every_steps == 0

    def claim(self):
        """Make --out the folder of this run, in the main process. Raises OSError, or Locked if it is another's."""
        if self.accelerator.is_main_process:
            self.out.mkdir(parents=True, exist_ok=True)
            self.lock.take()

    def write(self, how: Callable[[], object]) -> bool:
        """Write something, in the main process; warn where the disk does not take it, and go on. Whether it did."""
        if not self.accelerator.is_main_process:
            return True
        try:
            if self.replaces:  # until there is something to put in its place
                for name in self.files:
                    (self.out / name).unlink(missing_ok=True)
                checkpoint.remove_all(self.out)
            self.claim()
            self.replaces = False
            how()
        except OSError as error:
            self.say(f"WARNING: {data.one_line(error)}; training goes on, the last checkpoint stays")
            return False
        return True

    def publish(self):
        """Write what a run leaves, the epoch being finished: metrics, and the results if they are due."""
        self.published = self.write(self._write_metrics)
        if self.is_due():
            self.published &= self.write(lambda: self.write_results(self.progress.epoch - 1))

    def _write_metrics(self):
        text = "".join(json.dumps(record) + "\n" for record in self.progress.records)
        with smae.whole_file(self.out / "metrics.jsonl") as part:
            part.write_text(text)

    def save(self):
        """Write a checkpoint of this very moment, unless there is one. Raises Diverged where it would be of no use."""
        progress, accelerator = self.progress, self.accelerator
        if self.saved == progress.step:
            return
        self.check_losses()
        finite = checkpoint.all_finite(self.model, self.optimizer)
        with reported_once(Diverged):
            if self.peers.largest(not finite)[0]:
                raise Diverged(
                    f"weights or moments of the optimizer are no longer finite in epoch {progress.epoch}, step "
                    f"{progress.step} of the run{self._of_phase()}: go on from a checkpoint before it"
                )
        progress.seconds = time.perf_counter() - self.clock
        mine = dict(random=checkpoint.random_states(), total=progress.total.item())
        state = dict(
            config=self.config,
            progress={name: value for name, value in vars(progress).items() if name != "total"},
            processes=gather_object([mine]),
            optimizer=self.optimizer.state_dict(),
            scaler=accelerator.scaler.state_dict() if accelerator.scaler else None,
            bad=self.batches.bad.state_dict(),
            **{name: part.state_dict() for name, part in self.parts.items()},
        )
        if not (self.is_save_step(progress.step) if progress.seen else self.is_due()):
            self.passing.add(progress.step)
        keep = self.keep, self.passing, self.attached()
        done = self.write(lambda: checkpoint.write(self.out, progress.step, self.model, state, *keep))
        if not self.peers.largest(not done)[0]:
            self.saved = progress.step
        self.saved_at = time.monotonic()

    def restore(self, state: dict, folder: Path):
        """Go on from a checkpoint in ``folder``: everything but the weights, which the model has already."""
        progress, accelerator, rank = self.progress, self.accelerator, self.accelerator.process_index
        for name, value in state["progress"].items():
            setattr(progress, name, value)
        totals = [process["total"] for process in state["processes"]]
        if len(totals) != accelerator.num_processes:
            totals = [sum(totals)] + [0.0] * (accelerator.num_processes - 1)
        progress.total.fill_(totals[rank])

        decays = [group["weight_decay"] for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, decay in zip(self.optimizer.param_groups, decays):
            group["weight_decay"] = decay
        if accelerator.scaler and state["scaler"]:
            accelerator.scaler.load_state_dict(state["scaler"])
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        self.batches.bad.load_state_dict(state["bad"])
        if rank < len(state["processes"]):
            checkpoint.set_random_states(state["processes"][rank]["random"])

        if folder.parent == self.out.resolve():
            self.saved, self.replaces = progress.step, False
        else:
            progress.name = uuid.uuid4().hex
        self.bar.update(self.steps_done())


# ------------------------------------------------------------------------------------------------- processes


def check_bad_pictures(batches: TrainBatches):
    """Add up the bad pictures of all processes. Raises TooManyBadImages, in all of them, if they are too many."""
    everywhere = gather_object(list(batches.bad.descriptions.items()))
    with reported_once(data.TooManyBadImages):
        batches.bad.add(everywhere)
        batches.bad.check()


@contextlib.contextmanager
def reported_once(*kinds: type[Exception]) -> Iterator[None]:
    """Let only the first process raise errors of these ``kinds``, which all meet at once; the others end."""
    try:
        yield
    except kinds:
        if os.environ.get("RANK", "0") == "0":
            raise
        sys.exit(1)


@contextlib.contextmanager
def all_processes_or_none() -> Iterator[None]:
    """End all processes, with one line, if one of them meets a ValueError or OSError."""
    problem = None
    try:
        yield
    except (ValueError, OSError) as error:
        problem = str(error)
    problems = [problem for problem in gather_object([problem]) if problem]
    if problems:
        with cli.one_line_errors(ValueError):
            raise ValueError(problems[0])
        sys.exit(1)


@contextlib.contextmanager
def lost_processes(world: int) -> Iterator[None]:
    """Turn the errors by which torch reports the death of another process into ProcessLost."""
    try:
        yield
    except RuntimeError as error:
        text = f"({data.one_line(error)}): --resume auto goes on from the last checkpoint"
        if re.search(r"DataLoader worker \(pid.*(killed by signal|exited unexpectedly)", text):
            raise ProcessLost(f"a process that reads pictures died, for want of memory perhaps {text}") from None
        gone = "closed by peer|reset by peer|broken pipe|remote process exited|timed? ?out"
        if world > 1 and re.search(gone, text, re.IGNORECASE):
            raise ProcessLost(f"another process of the run is gone {text}") from None
        raise


# ------------------------------------------------------------------------------------------------- resuming


def find_checkpoint(
    accelerator: Accelerator,
    lock: checkpoint.Lock,
    out: Path,
    resume: str | None,
    overwrite: bool,
    files: tuple[str, ...],
) -> Path | None:
    """The checkpoint that --resume names, if any. Raises ValueError if it is not there or would cost another run."""
    folder, problem = None, None
    if accelerator.is_main_process:
        try:
            lock.take()
            folder = _choose_checkpoint(out, resume, overwrite, files, accelerator.print)
        except (ValueError, OSError) as error:
            problem = str(error)
    folder, problem = broadcast_object_list([folder, problem])
    if problem:
        raise ValueError(problem)
    return folder


def _choose_checkpoint(
    out: Path, resume: str | None, overwrite: bool, files: tuple[str, ...], say: Callable
) -> Path | None:
    auto, folder = resume == "auto", None
    if resume:
        folder = checkpoint.find(out if auto else Path(resume), say, aside=auto)
        if not auto and folder is None:
            raise ValueError(f"--resume {resume}: there is no checkpoint")
    if folder and folder.parent == out.resolve():
        newer = [other.name for other in checkpoint.folders(out) if other.name > folder.name]
        if newer and not overwrite:
            raise ValueError(f"{', '.join(newer)} of {out} would be lost; if they may be, add --overwrite")
    else:  # what is left of a run stopped before its first checkpoint is not worth a question
        cli.check_folder(out, overwrite, ("model.safetensors",) if auto else files)
    return folder


def compare_configurations(state: dict, config: dict, processes: int, free: set[str]) -> list[str]:
    """What has changed since a checkpoint was written, where that may be; options in ``free`` are not listed.

    Raises ValueError if it is something that must not change: model, data set or seed.
    """
    then, now = (json.loads(json.dumps(x)) for x in (state["config"], config))
    if then["model"] != now["model"]:
        names = [name for name in now["model"] if then["model"].get(name) != now["model"][name]]
        other = [f"{name} {then['model'].get(name)}, now {now['model'][name]}" for name in names]
        raise ValueError(f"cannot go on with another model: it had {'; '.join(other)}")
    pairs = [(a, b) for a, b in zip(then["data"]["pictures"], now["data"]["pictures"]) if a and b]
    if then["data"]["images"] != now["data"]["images"] or 2 * sum(a != b for a, b in pairs) > len(pairs):
        raise ValueError(
            f"cannot go on with another data set: it was {then['train']['dataset']}, {then['data']['images']} images, "
            f"and is {now['train']['dataset']}, {now['data']['images']} images"
        )
    then, now = then["train"], now["train"]
    if then["seed"] != now["seed"]:
        raise ValueError(
            f"cannot resume with another --seed, on which data order and crops depend: it was {then['seed']}"
        )
    names = [name for name in now if name not in free and then.get(name) != now[name]]
    changed = [f"--{name.replace('_', '-')} {then.get(name)} -> {now[name]}" for name in names]
    before = len(state["processes"])
    return changed + ([f"processes {before} -> {processes}"] if before != processes else [])
