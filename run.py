"""One training harness: steps, learning rate, signals, checks, checkpoints, log and progress bar.

    run = Run(...)
    with run.guarded():
        for epoch in run.epochs():  # continues where the checkpoint left off
            for batch in run.batches_of(epoch):
                run.step(loss_of(batch), batch)
            run.end_epoch()
    run.finish()

Pre-training, fine-tuning, the linear probe of MAE, segmentation and detection are such loops. What
else a training must remember, and what has a ``state_dict``, goes into ``parts``.
"""

import collections
import contextlib
import json
import math
import re
import shutil
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from PIL import Image
from torch import Tensor, nn

import checkpoint
import cli
import data
import optim
import smae
from batches import Batch, TrainBatches
from cropping import RandomStream, torch_seeds

LONGEST_UNSAVED = 15 * 60  # seconds of work without a checkpoint


class Diverged(ArithmeticError):
    """A loss, a weight or a moment of the optimizer is no longer a finite number."""


class Interrupted(Exception):
    """A process received the signal of this number."""


class ProcessLost(RuntimeError):
    """Another process died, or the disk failed, so that the training cannot continue."""


ERRORS = (data.TooManyBadImages, data.NothingToRead, checkpoint.Locked, Diverged, ProcessLost)


# ------------------------------------------------------------------------------ what a run is made of


@dataclass
class Schedule:
    """The length of a training, and its learning rate: linear warm-up, then ``shape`` (optim.SCHEDULES) to ``min_lr``.

    ``clip_grad`` is the largest norm of the gradient, None for no clipping.
    """

    epochs: int
    warmup_epochs: int
    lr: float
    min_lr: float = 0.0
    clip_grad: float | None = None
    shape: str = "cosine"


@dataclass
class Progress:
    """How far a run has come: in ``epoch``, with ``seen`` of its images done, after ``step`` steps."""

    total: Tensor  # sum of the losses of the images that this process has seen in the epoch
    epoch: int = 1
    seen: int = 0
    step: int = 0
    seconds: float = 0.0  # of training in the epoch
    records: list[dict] = field(default_factory=list)  # the lines of metrics.jsonl
    name: str = field(default_factory=lambda: uuid.uuid4().hex)  # for trackers


class Folder:
    """The folder of a run: what is in it, when a checkpoint is due, who may write to it.

    ``files`` are the names of everything that a run leaves besides checkpoints. A checkpoint is due
    every ``save_every`` epochs, after the epochs in ``milestones``, and every ``save_every_steps``
    steps; the newest ``keep`` stay.
    """

    def __init__(
        self,
        path: Path,
        lock: checkpoint.Lock,
        files: tuple[str, ...],
        *,
        save_every: int = 1,
        save_every_steps: int | None = None,
        keep: int = 2,
    ):
        self.path, self.lock, self.files = path, lock, files
        self.save_every, self.save_every_steps, self.keep = save_every, save_every_steps, keep
        self.milestones: set[int] = set()
        self.extra_steps: set[int] = set()  # of checkpoints that no option asked for
        self.saved_step: int | None = None  # of the newest checkpoint
        self.last_attempt = time.monotonic()
        self.holds_other_run = True  # until the first file of this run is there
        self.is_new = not path.exists()  # until it is claimed

    def is_due(self, epoch: int, step: int) -> bool:
        """Whether weights and results are due after ``epoch``, which ended with ``step``."""
        return epoch % self.save_every == 0 or epoch in self.milestones or self.is_due_at_step(step)

    def is_due_at_step(self, step: int) -> bool:
        """Whether a checkpoint is due within an epoch."""
        return bool(self.save_every_steps) and step % self.save_every_steps == 0

    def is_overdue(self) -> bool:
        """Whether the last attempt to write one is LONGEST_UNSAVED seconds ago."""
        return time.monotonic() > self.last_attempt + LONGEST_UNSAVED

    def claim(self):
        """Create the folder and lock it.

        Raises OSError, or Locked if another run writes to it or has filled it since this one started.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self.lock.take()
        if self.is_new and (checkpoint.folders(self.path) or any((self.path / name).exists() for name in self.files)):
            raise checkpoint.Locked(f"another run has written to {self.path} meanwhile: choose another --out")
        self.is_new = False

    def prepare(self):
        """Claim the folder; before the first file of this run, remove those of another one."""
        self.claim()
        if self.holds_other_run:
            for name in self.files:
                (self.path / name).unlink(missing_ok=True)
            checkpoint.remove_all(self.path)
        self.holds_other_run = False


class Run:
    """A training, and everything that changes while it goes on.

    ``model`` is the bare model; ``trained`` is the one to call in training. ``config`` is the
    content of config.json. ``parts`` names what else a checkpoint holds: objects with
    ``state_dict`` and ``load_state_dict``. ``write_results(epoch)`` writes the files of a run other
    than its metrics. ``attached`` returns further files that belong to a checkpoint. ``phase``
    names the present part of the training in the log.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        batches: TrainBatches,
        schedule: Schedule,
        folder: Folder,
        *,
        config: dict,
        parts: dict | None = None,
        write_results: Callable[[int], None] = lambda epoch: None,
        attached: Callable[[], list[Path]] = list,
    ):
        self.accelerator, self.model, self.batches = accelerator, model, batches
        self.schedule, self.folder, self.config = schedule, folder, config
        self.parts, self.write_results, self.attached = parts or {}, write_results, attached
        self.trained, self.optimizer = accelerator.prepare(model, optimizer)
        self.progress = Progress(torch.zeros((), device=accelerator.device))
        self.peers, self.signals = checkpoint.Peers(accelerator.num_processes), checkpoint.Signals()
        self.phase = ""
        self.lr = 0.0  # of the last step
        self.clock = time.perf_counter()  # when the epoch began
        self.unchecked: list[tuple[int, Tensor, list[int]]] = []  # step, loss, images
        self.results_written = True
        self.stopped_by = 0  # the number of a signal
        folder.milestones.add(schedule.epochs)
        steps = schedule.epochs * batches.steps_per_epoch
        self.bar = cli.progress_bar(steps, "step", disable=not accelerator.is_main_process)

    # -------------------------------------------------------------------------- the loop

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """Turn signals into a checkpoint and an orderly end, and known errors into one line."""
        lost = lost_processes(self.accelerator.num_processes, "continue from the last checkpoint with --resume")
        with cli.one_line_errors(*ERRORS, ranks="any"), lost, self.signals:
            try:
                yield
            except Interrupted as interrupted:
                self.stopped_by = interrupted.args[0]
            finally:
                self.batches.close()
                self.bar.close()
            self.save()

    def epochs(self) -> Iterator[int]:
        """The epochs that are left, counted from 1."""
        progress = self.progress
        if progress.records and not progress.seen:  # perhaps killed between checkpoint and results
            self.publish()
        while progress.epoch <= self.schedule.epochs:
            self.clock = time.perf_counter() - progress.seconds
            yield progress.epoch

    def seeded_batches_of(self, epoch: int) -> Iterator[Batch]:
        """:meth:`batches_of`, with torch seeded before each by seed, epoch, micro-batch and process."""
        plan, rank = self.batches.plan, np.array([self.accelerator.process_index])
        done = self.steps_done_in_epoch() * plan.accumulate
        for micro, batch in enumerate(self.batches_of(epoch), start=done):
            (seed,) = torch_seeds((plan.seed, epoch, RandomStream.MIX, micro), rank)
            torch.manual_seed(seed)
            yield batch

    def batches_of(self, epoch: int) -> Iterator[Batch]:
        """This process's micro-batches of the rest of an epoch. Sets the learning rate before each."""
        self.trained.train()
        self._set_learning_rate()  # for the log, if no step of the epoch is left
        with contextlib.closing(self.batches.epoch(epoch, self.progress.seen)) as batches:
            for batch in batches:
                self._set_learning_rate()
                with self.accelerator.accumulate(self.trained):
                    yield batch
        self.check_losses()  # waits for the device, so that the time is right
        self.progress.seconds = time.perf_counter() - self.clock

    def _set_learning_rate(self):
        schedule, steps = self.schedule, self.batches.steps_per_epoch
        length, warmup = schedule.epochs * steps, schedule.warmup_epochs * steps
        peak, least = schedule.lr, schedule.min_lr
        self.lr = optim.learning_rate(self.steps_done(), length, warmup, peak, least, schedule.shape)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * group.get("scale", 1.0)

    def steps_done(self) -> int:
        """Finished steps of the schedule."""
        epochs_done = self.progress.epoch - 1
        return epochs_done * self.batches.steps_per_epoch + self.steps_done_in_epoch()

    def steps_done_in_epoch(self) -> int:
        return self.progress.seen // self.batches.plan.batch_size

    def step(self, loss: Tensor, batch: Batch):
        """Backward pass; after the last micro-batch of a step, update, poll signals, save if due.

        ``loss`` is the mean over the images of the micro-batch ``batch``.
        """
        accelerator, progress = self.accelerator, self.progress
        accelerator.backward(loss)
        if self.schedule.clip_grad and accelerator.sync_gradients:
            accelerator.clip_grad_norm_(self.trained.parameters(), self.schedule.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        progress.total += loss.detach() * len(batch.images)
        self.unchecked.append((progress.step + 1, loss.detach(), batch.indices))
        if not accelerator.sync_gradients:
            return

        # The step is complete. At the last step of an epoch, end_epoch() saves and stops.
        progress.step += 1
        progress.seen += self.batches.plan.batch_size
        self.bar.update()
        last = not self.batches.plan.steps_left(progress.seen)
        overdue = self.poll(stop=not last)
        if progress.step % 10 == 0:  # not at every step: this waits for the device
            self.check_losses()
        if (overdue or self.folder.is_due_at_step(progress.step)) and not last:
            self.save()

    def end_epoch(self, note: str = "", **metrics):
        """Log the finished epoch, with ``metrics`` of it and a ``note``, and save what is due."""
        accelerator, progress, epoch = self.accelerator, self.progress, self.progress.epoch
        record = dict(
            loss=accelerator.reduce(progress.total, "sum").item() / progress.seen,
            lr=self.lr,
            images_per_second=progress.seen / progress.seconds,
            seconds=progress.seconds,
            bad_images=self.batches.bad.count,
        )
        self.track(dict(epoch=epoch) | record | metrics)
        phase = dict(phase=self.phase) if self.phase else {}
        progress.records.append(dict(epoch=epoch) | phase | record | metrics)
        speed = f"{record['images_per_second']:.0f} images/s"
        words = [f"epoch {epoch}/{self.schedule.epochs}", f"{self.phase:10}" if self.phase else ""]
        words += [f"loss {record['loss']:.4f}", f"lr {self.lr:.2e}", speed, note]
        self.say("  ".join(word for word in words if word))

        # The next epoch begins; a checkpoint of this moment continues there.
        progress.epoch, progress.seen, progress.seconds = epoch + 1, 0, 0.0
        progress.total.zero_()
        self.clock = time.perf_counter()
        if self.folder.is_due(epoch, progress.step):
            self.save()
        self.publish()
        if self.poll(stop=epoch < self.schedule.epochs):
            self.save()

    def finish(self, goes_on: bool = False):
        """End the command if a signal stopped the run, or if the disk did not take its end.

        Otherwise, if it ``goes_on`` with another run, only its trackers end.
        """
        failed = self.folder.saved_step != self.progress.step or not self.results_written
        if goes_on and not failed and not self.stopped_by:
            for tracker in self.accelerator.trackers:
                tracker.finish()
            self.accelerator.trackers = []
            return self.accelerator.free_memory()
        self.accelerator.end_training()
        if failed:
            with cli.one_line_errors(OSError):
                raise OSError("the last checkpoint, or the results, could not be written, see above")
        if self.stopped_by:
            text = (
                f"stopped by {signal.Signals(self.stopped_by).name} in epoch {self.progress.epoch}, after step "
                f"{self.progress.step}, with a checkpoint: continue with the same command and --resume"
            )
            self.accelerator.print(text)
            cli.leave(128 + self.stopped_by, KeyboardInterrupt(text))

    # -------------------------------------------------------------------------- trackers

    def start_trackers(self, options: dict):
        """Start the trackers of Accelerate, or continue in them (tensorboard: from the checkpoint).

        What another run has logged to the same folder is hidden.
        """
        first_step = 1 if self.folder.holds_other_run else self.progress.step + 1
        self.accelerator.init_trackers(
            "smae",
            config={key: str(value) for key, value in options.items()},
            init_kwargs=dict(
                tensorboard=dict(purge_step=first_step),
                wandb=dict(id=self.progress.name, resume="allow"),
                trackio=dict(name=self.progress.name, resume="allow"),
            ),
        )

    def track(self, values: dict):
        """Log numbers, and lists of them (name/1, name/2, ...), at the present step."""
        numbers = {name: value for name, value in values.items() if not isinstance(value, list)}
        for name, listed in values.items():
            if isinstance(listed, list):
                numbers |= {f"{name}/{i}": value for i, value in enumerate(listed, start=1)}
        self.accelerator.log(numbers, step=self.progress.step)

    def track_picture(self, file: Path):
        """Log a picture, under its name, to the trackers that take any."""
        for tracker in self.accelerator.trackers:
            pixels, step = np.asarray(Image.open(file).convert("RGB")), self.progress.step
            if tracker.name == "tensorboard":
                tracker.log_images({file.stem: pixels[None]}, step=step, dataformats="NHWC")
            elif tracker.name == "trackio":
                import trackio

                tracker.log({file.stem: trackio.Image(pixels)}, step=step)
            elif hasattr(tracker, "log_images"):
                tracker.log_images({file.stem: pixels[None]}, step=step)

    # -------------------------------------------------------------------------- checks

    def say(self, text: str):
        """Print a line above the progress bar, in the main process."""
        if self.accelerator.is_main_process:
            self.bar.write(text)

    def poll(self, stop: bool = True) -> bool:
        """Exchange signals and broken pictures with the other processes. Whether a checkpoint is overdue.

        Raises Interrupted, in all processes, if one of them received a signal, provided that
        ``stop`` allows it.
        """
        overdue = self.accelerator.is_main_process and self.folder.is_overdue()
        unreported = self.batches.bad.unreported
        number, unreported, overdue = self.peers.largest(self.signals.caught(), unreported, overdue)
        if unreported:
            check_bad_pictures(self.batches)
            for description in self.batches.bad.take_unreported():
                self.say(f"skipped a broken image: {description}")
        if number and stop:
            raise Interrupted(number)
        return bool(overdue)

    def check_losses(self):
        """Raise Diverged, in all processes, if a loss since the last call was not finite."""
        values = torch.stack([loss for _, loss, _ in self.unchecked]).tolist() if self.unchecked else []
        wrong = next((i for i, value in enumerate(values) if not math.isfinite(value)), None)
        if self.peers.largest(wrong is not None)[0]:
            rank, found = self.accelerator.process_index, []
            if wrong is not None:
                step, _, images = self.unchecked[wrong]
                found = [(step, rank, values[wrong], [int(i) for i in images])]
            step, rank, value, images = min(gather_object(found))
            with cli.reported_once(Diverged):
                raise Diverged(
                    f"the loss is {value} in epoch {self.progress.epoch}, step {step} of the run"
                    f"{self._of_phase()}, images {', '.join(map(str, images))} of the data; the checkpoints are "
                    "older: continue from one with --resume, with a lower learning rate perhaps, or with --clip-grad 1"
                )
        if values:
            speed = self.progress.seen / (time.perf_counter() - self.clock)
            words = [self.phase, f"loss {values[-1]:.4f}", f"lr {self.lr:.2e}", f"{speed:.0f} images/s"]
            self.bar.set_postfix_str(", ".join(word for word in words if word), refresh=False)
            steps = dict(loss=sum(values) / len(values), lr=self.lr, images_per_second=speed)
            self.track({f"step/{name}": value for name, value in steps.items()})
        self.unchecked.clear()

    def _of_phase(self) -> str:
        return f", {self.phase} masks" if self.phase else ""

    def average_statistics(self):
        """Replace the running statistics of BatchNorm by their mean over the processes."""
        for buffer in running_statistics(self.model).values():
            buffer.copy_(self.accelerator.reduce(buffer, "mean"))

    # -------------------------------------------------------------------------- saving

    def claim_folder(self):
        """Claim the folder, in the main process. Raises OSError, in all processes, if it cannot be written to."""
        problem = None
        if self.accelerator.is_main_process:
            try:
                self.folder.claim()
            except OSError as error:
                problem = data.one_line(error)
        (problem,) = broadcast_object_list([problem])
        if problem:
            raise OSError(problem)

    def write(self, how: Callable[[], object]) -> bool:
        """Write something, in the main process. Warns and returns False if the disk does not take it."""
        if not self.accelerator.is_main_process:
            return True
        try:
            self.folder.prepare()
            how()
        except OSError as error:
            self.say(f"WARNING: {data.one_line(error)}; training continues, the last checkpoint stays")
            return False
        return True

    def publish(self):
        """Write the metrics of the finished epochs, and the results if they are due."""
        epoch = self.progress.epoch - 1
        self.results_written = self.write(self._write_metrics)
        if self.folder.is_due(epoch, self.progress.step):
            self.results_written &= self.write(lambda: self.write_results(epoch))

    def _write_metrics(self):
        text = "".join(json.dumps(record) + "\n" for record in self.progress.records)
        smae.write_text(self.folder.path / "metrics.jsonl", text)

    def save(self):
        """Write a checkpoint of this moment, unless there is one. Raises Diverged if it would be useless."""
        progress, folder = self.progress, self.folder
        if folder.saved_step == progress.step:
            return
        self.check_losses()
        self._check_weights()
        progress.seconds = time.perf_counter() - self.clock
        epoch = progress.epoch - (not progress.seen)
        ended = not progress.seen or not self.batches.plan.steps_left(progress.seen)
        if not (folder.is_due(epoch, progress.step) if ended else folder.is_due_at_step(progress.step)):
            folder.extra_steps.add(progress.step)
        state = self._state()
        how = dict(keep=folder.keep, passing=folder.extra_steps, attached=self.attached())
        done = self.write(lambda: checkpoint.write(folder.path, progress.step, self.model, state, **how))
        if not self.peers.largest(not done)[0]:
            folder.saved_step = progress.step
        folder.last_attempt = time.monotonic()

    def _check_weights(self):
        finite = checkpoint.all_finite(self.model, self.optimizer)
        with cli.reported_once(Diverged):
            if self.peers.largest(not finite)[0]:
                raise Diverged(
                    "weights or moments of the optimizer are no longer finite in epoch "
                    f"{self.progress.epoch}, step {self.progress.step} of the run{self._of_phase()}: "
                    "continue from an earlier checkpoint"
                )

    def _state(self) -> dict:
        """Everything that a checkpoint holds besides the weights."""
        progress, scaler = self.progress, self.accelerator.scaler
        mine = dict(
            random=checkpoint.random_states(),
            total=progress.total.item(),
            statistics={name: buffer.cpu() for name, buffer in running_statistics(self.model).items()},
        )
        return dict(
            config=self.config,
            progress={name: value for name, value in vars(progress).items() if name != "total"},
            processes=gather_object([mine]),
            optimizer=self.optimizer.state_dict(),
            scaler=scaler.state_dict() if scaler else None,
            bad=self.batches.bad.state_dict(),
            lengths=dict(collections.ChainMap(*gather_object([self.batches.lengths]))),
            extra_steps=sorted(self.folder.extra_steps),
            **{name: part.state_dict() for name, part in self.parts.items()},
        )

    def restore(self, state: dict, source: Path):
        """Continue from the checkpoint in ``source``, whose weights the model already has."""
        progress, accelerator = self.progress, self.accelerator
        for name, value in state["progress"].items():
            setattr(progress, name, value)
        self._restore_process(state["processes"])

        # A changed --weight-decay counts: it is not part of what the optimizer has learned.
        decays = [group["weight_decay"] for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, decay in zip(self.optimizer.param_groups, decays):
            group["weight_decay"] = decay
        if accelerator.scaler and state["scaler"]:
            accelerator.scaler.load_state_dict(state["scaler"])
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        self.batches.bad.load_state_dict(state["bad"])
        self.batches.lengths.update(state.get("lengths", {}))

        if source.parent == self.folder.path.resolve():
            self.folder.saved_step, self.folder.holds_other_run = progress.step, False
            self.folder.extra_steps.update(state.get("extra_steps", []))
        else:
            progress.name = uuid.uuid4().hex
        self.bar.update(self.steps_done())

    def _restore_process(self, processes: list[dict]):
        """Restore what each process has of its own, for this or another number of processes."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        totals = [process["total"] for process in processes]
        if len(totals) != world:
            totals = [sum(totals)] + [0.0] * (world - 1)
        self.progress.total.fill_(totals[rank])
        if rank < len(processes):
            checkpoint.set_random_states(processes[rank]["random"])
        for name, buffer in running_statistics(self.model).items():
            values = [process["statistics"][name] for process in processes]
            buffer.copy_(values[rank] if len(values) == world else torch.stack(values).mean(dim=0))


def running_statistics(model: nn.Module) -> dict[str, Tensor]:
    """The running means and variances of BatchNorm, which differ between processes until averaged."""
    names = ("running_mean", "running_var")
    return {name: buffer for name, buffer in model.named_buffers() if name.rpartition(".")[2] in names}


# ------------------------------------------------------------------------------ processes


def check_bad_pictures(batches: TrainBatches):
    """Add up the broken pictures of all processes. Raises TooManyBadImages, in all of them."""
    everywhere = gather_object(list(batches.bad.descriptions.items()))
    with cli.reported_once(data.TooManyBadImages):
        batches.bad.add(everywhere)
        batches.bad.check()


@contextlib.contextmanager
def all_processes_or_none() -> Iterator[None]:
    """End all processes, with one line, if one of them raises a ValueError or OSError."""
    problem = None
    try:
        yield
    except (ValueError, OSError) as error:
        problem = str(error)
    problems = [problem for problem in gather_object([problem]) if problem]
    if problems:
        with cli.one_line_errors(ValueError):
            raise ValueError(problems[0])


@contextlib.contextmanager
def lost_processes(world: int, advice: str = "start the command again") -> Iterator[None]:
    """Turn the errors by which torch reports the death of another process into ProcessLost."""
    try:
        yield
    except RuntimeError as error:
        text = f"({data.one_line(error)}): {advice}"
        if re.search("shared memory|ftruncate|/torch_", str(error)) and "worker process" in str(error):
            raise ProcessLost(
                "the workers have no room in shared memory (/dev/shm): give a container more with docker run "
                "--shm-size, or use --workers 0"
            ) from None
        if re.search(r"DataLoader worker \(pid.*(killed by signal|exited unexpectedly)", text):
            raise ProcessLost(f"a process that reads pictures died, perhaps for lack of memory {text}") from None
        gone = "closed by peer|reset by peer|broken pipe|remote process exited|timed? ?out"
        if world > 1 and re.search(gone, text, re.IGNORECASE):
            raise ProcessLost(f"another process of the run is gone {text}") from None
        raise


def take_folder(accelerator: Accelerator, lock: checkpoint.Lock, overwrite: bool, files: tuple[str, ...]):
    """Make and lock the folder of a command that trains nothing; remove what an earlier one left there.

    ``files`` are the names of its results, which may be folders. Raises ValueError or OSError, in all
    processes, if another command writes there, or has written there meanwhile.
    """
    with all_processes_or_none():
        if accelerator.is_main_process:
            lock.out.mkdir(parents=True, exist_ok=True)
            lock.take()
            cli.check_folder(lock.out, overwrite, files)
            for name in files:
                shutil.rmtree(lock.out / name, ignore_errors=True)
                (lock.out / name).unlink(missing_ok=True)


# ------------------------------------------------------------------------------ resuming


def find_checkpoint(accelerator: Accelerator, folder: Folder, resume: str | None, overwrite: bool) -> Path | None:
    """The checkpoint that --resume names, if any.

    Raises ValueError, in all processes, if there is none or if another run would be lost.
    """
    found = None
    with all_processes_or_none():
        if accelerator.is_main_process:
            folder.lock.take()
            found = _choose_checkpoint(folder, resume, overwrite, accelerator.print)
    return broadcast_object_list([found])[0]


def _choose_checkpoint(folder: Folder, resume: str | None, overwrite: bool, say: Callable) -> Path | None:
    out, auto, found = folder.path, resume == "auto", None
    if resume:
        found = checkpoint.find(out if auto else Path(resume), say, aside=auto)
        if not auto and found is None:
            raise ValueError(f"--resume {resume}: there is no checkpoint")
    if found and found.parent == out.resolve():
        newer = [other.name for other in checkpoint.folders(out) if other.name > found.name]
        if newer and not overwrite:
            raise ValueError(f"{', '.join(newer)} of {out} would be lost; to allow that, add --overwrite")
    else:  # auto: a run that stopped before its first checkpoint has nothing to lose
        results = {"model.safetensors", "result.json"} & set(folder.files)
        checkpoints = [held.name for held in checkpoint.folders(out)]
        cli.check_folder(out, overwrite, tuple(results) if auto else (*folder.files, *checkpoints))
    return found


def read_state(folder: Path | None, command: str) -> dict | None:
    """The state in a checkpoint, if there is one. Raises ValueError if it is not of this ``command``."""
    state = checkpoint.read(folder) if folder else None
    if state and command not in state["config"]:
        raise ValueError(f"cannot resume from {folder}: it is of another command than {command}")
    return state


def compare_configurations(
    state: dict, config: dict, command: str, processes: int, *, ignored: set[str], fixed: set[str] | None = None
) -> list[str]:
    """What has changed since a checkpoint was written, as lines for the log.

    ``config`` holds the options of ``command`` under its name. Options in ``ignored`` are not
    compared. Raises ValueError if the model, the data or an option in ``fixed`` (default: every other)
    has changed, or if there are fewer epochs than were begun.
    """
    then, now = (json.loads(json.dumps(x)) for x in (state["config"], config))
    _compare_models(then["model"], now["model"])
    old, new = then[command], now[command]
    pairs = [(a, b) for a, b in zip(then["data"]["pictures"], now["data"]["pictures"]) if a and b]
    if then["data"]["images"] != now["data"]["images"] or 2 * sum(a != b for a, b in pairs) > len(pairs):
        raise ValueError(
            f"cannot resume with another data set: it was {old['dataset']}, {then['data']['images']} images, "
            f"and is {new['dataset']}, {now['data']['images']} images"
        )
    begun = state["progress"]["epoch"] - (not state["progress"]["seen"])
    if begun > new["epochs"]:
        raise ValueError(f"cannot resume with --epochs {new['epochs']}: epoch {begun} had begun")
    changed = [name for name in new if name not in ignored and old.get(name) != new[name]]
    options = {name: f"--{name.replace('_', '-')}" for name in changed}
    if refused := [f"{options[name]} was {old.get(name)}" for name in changed if fixed is None or name in fixed]:
        raise ValueError(f"cannot resume with other options: {', '.join(refused)}")
    lines = [f"{options[name]} {old.get(name)} -> {new[name]}" for name in changed]
    before = len(state["processes"])
    return lines + ([f"processes {before} -> {processes}"] if before != processes else [])


def _compare_models(old: dict, new: dict):
    with contextlib.suppress(TypeError, ValueError):  # arguments that are newer than the checkpoint had their defaults
        old = json.loads(json.dumps(vars(smae.Config(**old))))
    names = [name for name in new if old.get(name) != new[name]]
    if names:
        other = [f"{name} {old.get(name)}, now {new[name]}" for name in names]
        raise ValueError(f"cannot resume with another model: it had {'; '.join(other)}")
